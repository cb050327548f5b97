"""Train ALDM: `generator_loss`, `train_step` and `fit` are the paper's algorithm (Sec. 3, Fig. 2).

    python train.py                                              the toy world: a CPU, minutes
    python train.py --data cityscapes --root DIR                 Stable Diffusion 1.5 on a GPU
    torchrun --nproc-per-node 2 train.py --data cityscapes ...   several GPUs
    python train.py --train segmenter --data toy --extra DIR     the segmenter of Table 4
"""
import os
import signal

SIGNALS = (signal.SIGINT, signal.SIGTERM)
if __name__ == "__main__":
    for which in SIGNALS:  # until the training begins, they end the program silently
        signal.signal(which, lambda which, _: os._exit(128 + which))
    # Waiting threads soon sleep: spinning, they slow down everything beside them, and themselves.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import argparse
import fcntl
import json
import math
import sys
import time
import zipfile
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from aldm import (ALDM, LAST, OFFICIAL, PRESETS, Schedule, TextEncoder, check_finite,
                  load_class_embeddings, load_frozen, load_into, load_segmenter, pick_device,
                  read_adapter, save_adapter, save_tensors, unrolled_adversarial_loss)
from data import (ASSETS, IGNORE, InputError, Toy, atomic, batches, class_table, colorize,
                  open_dataset, refuse, remove_leftovers, write_png, write_text)
from discriminator import (Bottleneck, UperNet, confusion_matrix, discriminator_loss, mean_iou,
                           segment)
from sample import (device_name, draw_curves, evaluate, from_pixels, generate, grid, measure,
                    number, rounded, to_pixels, toy_judges)
from unet import ResBlock, SpatialTransformer, UNet
from vae import VAE, ResnetBlock

# Where a flag is not given: for Cityscapes and ADE20K the official training's values. COCO-Stuff
# takes ADE20K's, any folder takes Cityscapes', whatever runs with --preset toy takes the toy's.
DEFAULTS = {
    #               toy      cityscapes     ade20k
    "preset":       ("toy",  "sd15",        "sd15"),            # size of the networks
    "size":         (64,     512,           512),               # side of the crops, pixels
    "steps":        (250,    120_000,       200_000),
    "batch":        (16,     4,             4),                 # per process and micro batch
    "lr":           (5e-4,   1e-5,          2e-5),              # the adapter's, AdamW
    "lr_d":         (1e-4,   1e-6,          1e-6),              # D's one-cycle maximum, AdamW
    "d_warmup":     (20,     200,           200),               # D's updates up to the maximum
    "d_cycle":      (None,   120_000,       None),              # D's updates until 1/1000 of it
    "d_start":      (0,      0,             5000),              # D is trained from this step on
    "lambda_adv":   (1.0,    0.1,           0.5),               # weight of L_adv
    "fake_weight":  (0.01,   0.01,          0.001),             # weight of L_Dis's fake term
    "ramp":         ((0, 50), (5000, 10_000), (10_000, 15_000)),  # steps: lambda_adv grows from 0
    "lazy":         (2,      8,             8),                 # L_adv and D every n-th step
    "unroll":       (3,      9,             9),                 # K
    "unroll_grad":  ("each", "first",       "first"),           # estimates that carry gradient
    "save_every":   (100,    1000,          1000),
    "sample_every": (100,    500,           500),
}
COLUMN = {"toy": 0, "cityscapes": 1, "ade20k": 2, "coco": 2}


# -- the paper's algorithm -------------------------------------------------------------------------


def generator_loss(model, discriminator, batch, step, args):
    """L = L_noise + lambda_adv * L_adv on one (micro) batch (Sec. 3.1 and 3.2).

    batch has label [B,H,W], x0 [B,4,h,w], context [B,77,C] -> loss, its parts {name: scalar}, and
    fakes [B,3,H,W] for the discriminator, or None where it does not learn from this step.
    """
    label, x0, context = batch["label"], batch["x0"], batch["context"]
    schedule = model.schedule
    timesteps = schedule.ddim_timesteps(args.ddim_steps)
    weight = args.lambda_adv * ramp(step, *args.ramp)
    d_learns = args.discriminator == "trained" and step >= args.d_start
    adversarial = args.discriminator != "none" and weight > 0
    lazy_turn = step % args.lazy == 0 and (adversarial or d_learns)

    noise = torch.randn_like(x0)
    if lazy_turn:  # the chain starts on the DDIM subset, with K of its steps still to go
        unroll = args.unroll if adversarial else 0  # before the ramp only D learns
        last = args.starts_below if adversarial else args.ddim_steps  # (D alone sees all t)
        start = torch.randint(unroll, last, (len(x0),), device=x0.device)
        t = timesteps[start]
    else:
        t = torch.randint(0, 1000, (len(x0),), device=x0.device)

    x_t = schedule.add_noise(x0, t, noise)
    layout = model.encode_layout(label)
    eps = model.eps(x_t, t, context, layout)
    noise_loss = F.mse_loss(eps, noise)
    if not lazy_turn:
        return noise_loss, {"noise": noise_loss}, None

    with torch.set_grad_enabled(adversarial):
        adv, fakes = unrolled_adversarial_loss(
            model, discriminator, x_t, eps, start, timesteps, label, context, layout, unroll,
            args.unroll_grad)
    loss = noise_loss + weight * adv
    return loss, {"noise": noise_loss, "adv": adv}, fakes if d_learns else None


def ramp(step, first, last):
    """The adversarial term's coefficient: 0 up to `first`, 1 from `last` on, linear between."""
    return min(max((step - first) / max(last - first, 1), 0.0), 1.0)


def train_step(model, discriminator, opt_g, opt_d, micro_batches, step, args):
    """One iteration: the adapter's step, then, on its turns, the discriminator's on what the
    adapter has just made. -> {name: scalar}; `dropped` is 1, 2 or 3 where the update of the
    adapter, the discriminator or both was left out because it was not finite."""
    losses = {}
    fakes = []
    for batch in micro_batches:  # more than one with --accumulate
        with autocast(args):
            loss, parts, fake = generator_loss(model, discriminator, batch, step, args)
        (loss / len(micro_batches)).backward()
        add_up(losses, parts, len(micro_batches))
        fakes.append(fake)
    losses["dropped"] = update(opt_g, losses)

    if fakes[0] is not None:
        d_losses = discriminator_step(model, discriminator, opt_d, micro_batches, fakes, args)
        losses["dropped"] = losses["dropped"] + 2 * d_losses.pop("dropped")
        losses |= d_losses
    return losses


def discriminator_step(model, discriminator, opt_d, micro_batches, fakes, args):
    """L_Dis on real images and the adapter's fakes. -> {name: scalar}"""
    losses = {}
    buffers = [b.clone() for b in discriminator.buffers()]
    discriminator.train().requires_grad_(True)  # it is frozen in the adapter's step
    for batch, fake in zip(micro_batches, fakes):
        with autocast(args):
            with torch.no_grad():  # real, but decoded: the VAE's marks must not tell fakes apart
                real = model.vae.decode(batch["x0"]).float().clamp(-1, 1)
            real_logits, fake_logits = discriminator(torch.cat([real, fake])).chunk(2)
            loss, parts = discriminator_loss(real_logits, fake_logits, batch["label"],
                                             args.fake_weight)
        (loss / len(micro_batches)).backward()
        add_up(losses, {f"D_{name}": value for name, value in parts.items()}, len(micro_batches))
    discriminator.eval().requires_grad_(False)
    dropped = update(opt_d, losses)
    average([b for b in discriminator.buffers() if b.is_floating_point()])
    for b, old in zip(discriminator.buffers(), buffers):  # a dropped step leaves these, too
        b.copy_(old.where(dropped > 0, b))
    return {**losses, "dropped": dropped}


def autocast(args):
    """Convolutions and matrix products in bf16, our losses in fp32: always on CUDA, on the CPU with
    --bf16."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16)


def add_up(losses, parts, n):
    for name, value in parts.items():
        losses[name] = losses.get(name, 0) + value.detach() / n


@torch.no_grad()
def update(optimizer, losses):
    """Average gradients and losses over the processes and step, unless one of them is not finite.

    -> 1.0 where the step was dropped, else 0.0 [scalar]. Nothing here waits for the GPU: the fused
    optimisers look at `found_inf` themselves.
    """
    grads = [p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None]
    average([*grads, *losses.values()])
    norm = torch.nn.utils.get_total_norm(grads)
    finite = torch.stack([norm, *losses.values()]).isfinite().all()
    optimizer.found_inf = (~finite).float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer.found_inf


def warm_up(lr, steps, step):
    """The adapter's learning rate: linear up to `lr`, then constant."""
    return lr * min(1, (step + 1) / steps)


def one_cycle(args, step):
    """The discriminator's learning rate: from 1/10 of --lr-d to all of it in --d-warmup of its own
    updates, then down to 1/1000 in --d-cycle updates (None: those of the run), by cosines."""
    updates = max(step - args.d_start, 0) // args.lazy
    length = args.d_cycle or max(args.steps - args.d_start, 0) // args.lazy
    if updates < args.d_warmup:
        return args.lr_d * cosine(0.1, 1, updates / args.d_warmup)
    return args.lr_d * cosine(1, 1e-3, (updates - args.d_warmup) / max(length - args.d_warmup, 1))


def cosine(a, b, fraction):
    """From a, at 0, to b, from 1 on, along half a cosine."""
    return b + (a - b) * (1 + math.cos(math.pi * min(fraction, 1))) / 2


# -- the loop --------------------------------------------------------------------------------------


@dataclass
class Job:
    """What `fit` trains."""
    state: dict       # {name: module or optimiser}, all that a checkpoint holds
    meta: dict        # plain values that a resumed run must share, and a user of the file wants
    stream: Callable  # first step -> endless batches from there on
    rates: list       # (optimiser, function: step -> learning rate)
    step: Callable    # batch, step -> {name: scalar}, "dropped" among them
    columns: list     # of log.csv: the names that step and show may give, but for "dropped"
    show: Callable = None    # step -> {name: scalar}: draws the run's pictures
    export: Callable = None  # step: writes what users take from the run


def fit(job, args):
    """Train up to --steps, in a folder from `open_run`. A run that was stopped, or killed, goes on
    with --resume. -> how many steps were done here"""
    out = Path(args.out)
    first = load_checkpoint(out, job, args) if args.resume else 0
    log = Log(out / "log.csv", job.columns, first)
    stream = job.stream(first)
    bar = tqdm(total=args.steps, initial=first, disable=rank() > 0, mininterval=1)
    with bar, guarded(out) as signals:
        for step in range(first, args.steps):
            # All randomness of a step comes from its number: a resumed run is as one never stopped.
            torch.manual_seed(hash((args.seed, step, rank())) % 2 ** 63)
            batch, trouble = None, "another process was stopped"
            try:
                batch = next(stream)
            except InputError as error:  # an image that can no longer be read
                trouble = error
            if largest(int(batch is None)):  # all processes stop where one must
                if step > first:
                    log.flush()
                    save_checkpoint(out, job, step, args)
                largest(0)  # no process ends before it is written
                raise Stopped(f"step {step}: {trouble}")
            for optimizer, rate in job.rates:
                optimizer.param_groups[0]["lr"] = rate(step)
            losses = job.step(batch, step)
            done = step + 1
            at_end = done == args.steps
            draw_now = at_end or done % args.sample_every == 0
            if draw_now and job.show and rank() == 0:
                losses |= job.show(done)  # before the checkpoint: a run killed here draws once more
            log.add(done, losses)
            bar.update()
            bar.set_postfix(log.last, refresh=False)

            stop = largest(max(signals, default=0))
            at_end = at_end or stop > 0
            if at_end or done % args.save_every == 0:
                is_finite = log.flush(at_end)
                if is_finite or at_end:
                    save_checkpoint(out, job, done, args)
                largest(0)  # no process ends before it is written
            if stop:
                note(f"stopped at step {done}, go on with --resume")
                raise SystemExit(128 + stop)
    return args.steps - first


def save_checkpoint(out, job, step, args):
    """Write all that --resume needs, and what users take from the run; keep the newest --keep."""
    if rank() > 0:
        return
    content = {"step": step, "meta": job.meta, "flags": flags_of(args)}
    for name, part in job.state.items():
        content[name] = part.state_dict()
        if isinstance(part, torch.nn.Module):
            check_finite(content[name], f"step {step}: {name}")
    newest = out / f"checkpoint_{step:07d}.pt"
    with atomic(newest) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # so torch reports a full disk
            raise OSError(f"no checkpoint can be written, is the disk full? ({error})") from None
    done = [path for path in checkpoints(out) if path <= newest]  # a damaged one may be further on
    for path in done[:-args.keep]:
        path.unlink()
    if job.export:
        job.export(step)


def load_checkpoint(out, job, args):
    """Fill `job` from the newest checkpoint that is whole. -> its step, or 0 without any.

    Raises InputError where the run is of other settings, already longer than --steps, or where all
    checkpoints are damaged.
    """
    damaged = []
    for path in reversed(checkpoints(out)):
        try:
            saved = read_checkpoint(path)
            break
        except Exception:  # whatever the two libraries raise at a damaged file
            damaged.append(str(path))
    else:
        if damaged:
            raise InputError(f"{damaged[0]}: damaged, and no checkpoint is whole; choose another "
                             "--out")
        note(f"{out}: nothing to resume yet, so it starts at step 0")
        return 0
    if damaged:
        note(f"{', '.join(damaged)}: damaged; going back to {path.name}")
    if not saved.keys() >= job.state.keys():
        raise InputError(f"{path}: is of another kind of training; choose another --out")
    for key, value in job.meta.items():
        if saved["meta"].get(key, value) != value:
            raise InputError(f"{path}: its run has {key} {saved['meta'].get(key)!r:.60}, this one "
                             f"{value!r:.60}; resume with the same flags, or choose another --out")
    if saved["step"] > args.steps:
        raise InputError(f"--steps {args.steps}: {path} is further on; give a larger number")
    old, new = saved["flags"], flags_of(args)
    differ = [f"{name} {value}, now {new[name]}" for name, value in old.items()
              if value != new.get(name, value)]
    if differ:
        note(f"{path}: its run had {'; '.join(differ)}")
    for name, part in job.state.items():
        part.load_state_dict(saved[name])
    for optimizer, _ in job.rates:
        match_strides(optimizer)
    return saved["step"]


def match_strides(optimizer):
    """Lay the moments out in memory as their weights are, which the fused kernels take for granted:
    of the device that a checkpoint was written on, `make_fast` may have asked another layout."""
    for p, moments in optimizer.state.items():
        for name, t in moments.items():
            if t.shape == p.shape:  # not the number of the step
                moments[name] = torch.empty_like(p).copy_(t)


def read_checkpoint(path):
    with zipfile.ZipFile(path) as file:  # torch.load does not look at the checksums
        if file.testzip():
            raise ValueError("a bad checksum")
    return torch.load(path, map_location="cpu", weights_only=True)


def checkpoints(out):
    return sorted(out.glob("checkpoint_" + "[0-9]" * 7 + ".pt"))


# Flags that a resumed run may change without a word. (Where rates fall until the end of the run,
# --steps moves it.)
MAY_CHANGE = {"root", "out", "lock", "workers", "cache", "device", "recompute", "compile",
              "resume", "steps", "save_every", "keep", "sample_every", "adapter_dtype", "eval",
              "before", "test", "starts_below"}


def flags_of(args):
    """All other flags, as plain values: a resumed run names those that differ."""
    return {name: str(value) for name, value in vars(args).items() if name not in MAY_CHANGE}


class Stopped(Exception):
    """A run cannot go on. Its text says why, in one line."""


class Log:
    """log.csv, a row per step; on a GPU written ten at a time, as reading a loss makes the CPU
    wait."""

    def __init__(self, path, columns, first):
        self.path = path
        self.columns = [*columns, "dropped"]
        self.waiting = []  # steps and losses that are not written yet
        self.last = {}
        self.dropped = deque(maxlen=100)  # of each step, whether it was
        rows = [",".join(["step", *self.columns])]
        if path.exists():  # of a run that is resumed: steps after its checkpoint are done again
            done = {str(step) for step in range(1, first + 1)}
            for row in path.read_text(errors="replace").splitlines():
                cells = row.split(",")
                if cells[0] in done and len(cells) == len(columns) + 2:
                    rows.append(row)
        if rank() == 0:
            write_text(path, "\n".join(rows) + "\n")

    def add(self, step, losses):
        self.waiting.append((step, losses))
        if len(self.waiting) == 10 or losses["dropped"].device.type == "cpu":
            self.flush()

    def flush(self, at_end=False):
        """Write what waits. -> whether the last step was not dropped. Raises Stopped where ten of
        the last hundred steps were; at the end of a run, where all were."""
        rows = []
        for step, losses in self.waiting:
            values = {name: value.item() for name, value in losses.items()}
            cells = [f"{values[name]:.7g}" if name in values else "" for name in self.columns]
            rows.append(",".join([str(step), *cells]) + "\n")
            self.dropped.append(values.pop("dropped") > 0)
            self.last |= values
        self.waiting.clear()
        if rank() == 0:
            with open(self.path, "a") as file:
                file.writelines(rows)
        count = sum(self.dropped)
        if count >= 10 or (at_end and count == len(self.dropped)):
            raise Stopped(f"{count} of the last {len(self.dropped)} steps had losses or gradients "
                          f"that were not finite; {self.path} tells whose, in the column dropped")
        return not self.dropped[-1]


def open_run(args):
    """Make --out, lock it for this run, and remove what a killed run has left half-written."""
    out = Path(args.out)
    if rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        args.lock = open(out / ".lock", "w")  # held as long as this process lives
        try:
            fcntl.lockf(args.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{out}: another run is writing here; choose another --out") from None
        refuse_second_run(args)
        remove_leftovers(out)
    largest(0)  # the other processes wait for that
    return out


def refuse_second_run(args):
    """InputError where --out holds a run that is not to be resumed."""
    out = Path(args.out)
    if not args.resume and (checkpoints(out) or (out / "log.csv").exists()):
        raise InputError(f"{out}: holds a run; go on with --resume, or choose another --out")


@contextmanager
def guarded(out):
    """Within it SIGINT and SIGTERM are only noted, in the list that it yields; an error that ends
    the run becomes Stopped, which names the last good checkpoint."""
    noted = []
    before = [signal.signal(which, lambda which, _: noted.append(which)) for which in SIGNALS]
    try:
        yield noted
    except (Stopped, InputError, OSError, SafetensorError, torch.OutOfMemoryError) as error:
        reason = " ".join(str(error).split())
        last = max(checkpoints(out), default="none")
        raise Stopped(f"{reason}; last good checkpoint: {last}") from None
    finally:
        for which, handler in zip(SIGNALS, before):
            signal.signal(which, handler)


def note(text):
    if rank() == 0:
        print(text, file=sys.stderr)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def average(tensors):
    """Mean over the processes, in place: one message for all of them."""
    if not dist.is_initialized() or not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat /= world()
    for t, mean in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(mean.view_as(t))


def largest(value):
    """The largest of the processes' numbers. All wait for it, on the CPU: no GPU does."""
    value = torch.tensor(value)
    if dist.is_initialized():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


# -- training an adapter ---------------------------------------------------------------------------


def train_adapter(args):
    """The main job: an adapter, with adversarial supervision."""
    dataset = load_dataset(args, args.data, args.root, "train")
    model, discriminator, parts, meta = build(args)
    shown = [dataset[i] for i in range(min(6, len(dataset)))]
    if args.cache:
        dataset = Cache(args.cache, dataset, model)
    opt_g, opt_d = optimizers(model, discriminator, args)
    job = Job(
        state={"adapter": model.adapter, "layout": model.layout, "discriminator": discriminator,
               "opt_g": opt_g, "opt_d": opt_d},
        meta=meta,
        stream=partial(stream, args, dataset, args.batch * args.accumulate),
        rates=[(opt_g, partial(warm_up, args.lr, args.warmup)), (opt_d, partial(one_cycle, args))],
        step=partial(adapter_step, args, model, discriminator, opt_g, opt_d),
        columns=["noise", "adv", "D_real", "D_fake", "D_caught", "D_mIoU"],
        show=partial(save_pictures, args, model, discriminator, shown),
        export=partial(export_adapter, args, model, meta))

    out = open_run(args)
    before = None
    if (out / "before.json").exists():  # of a run that is resumed
        before = json.loads((out / "before.json").read_text())
    elif args.before and not checkpoints(out):
        before = judge_toy(model, parts, args)
        if before:
            write_text(out / "before.json", json.dumps(before, indent=1))
    began = time.time()
    done = fit(job, args)
    if done == 0 and (out / "judged.json").exists():
        note(f"{out}: finished already, nothing is changed")
        return
    if rank() == 0:
        draw_curves(out / "log.csv", out / "curves.png")  # with the last step's losses
    # Of the whole training, also where this process has seen only its end.
    seconds = (time.time() - began) * args.steps / done if done else None
    after = judge_toy(model, parts, args)
    if after:
        after["seconds"] = seconds
        print_table(before, after)
        write_text(out / "judged.json", json.dumps({**after, "before": before}, indent=1))


def optimizers(model, discriminator, args):
    """-> the adapter's, the discriminator's"""
    opt_g = torch.optim.AdamW(model.adapter.parameters(), args.lr, fused=True)
    opt_d = torch.optim.AdamW(discriminator.parameters(), args.lr_d, weight_decay=0.005, fused=True)
    return opt_g, opt_d


def load_dataset(args, data, root, split, grid=None, augment=True):
    """A split of a data set as the flags ask for it; see data.open_dataset."""
    captions = args.captions if data == args.data else None
    grid = grid or PRESETS[args.preset].vae.factor
    return open_dataset(data, root, split, args.size, augment=augment, captions=captions,
                        grid=grid, skip_broken=args.skip_broken)


def stream(args, dataset, batch, first):
    return batches(dataset, batch, args.seed, first, args.workers, rank(), world(),
                   pin=args.device != "cpu")


def build(args):
    """-> model, discriminator, the base file's other parts, the run's meta, as the flags ask."""
    device = torch.device(args.device)
    preset = PRESETS[args.preset]
    classes = class_table(args.data)
    start, init = read_adapter(args.init) if args.init else ({}, {})
    for key in ("adapter", "preset", "hint"):
        given = getattr(args, key)
        found = start.get(key, given)
        if given and found != given:
            raise InputError(f"{args.init}: its {key} is {found}: give --{key} {found}")
    frozen_dtype = torch.float32
    if device.type == "cuda" and args.adapter != "freestyle":
        frozen_dtype = torch.bfloat16
    unet, vae, text, parts = load_frozen(args.preset, args.sd, device, frozen_dtype)

    hint = start.get("hint") or args.hint or "classes"
    table = None  # the text encoder's
    if args.class_embeddings:
        if hint == "color" or args.adapter in ("t2i", "freestyle"):
            raise InputError("--class-embeddings: the hint of this adapter has none")
        table = load_class_embeddings(args.class_embeddings, classes, text)
    elif tuple(start.get("names") or ()) == classes.names:
        table = init.get("layout", {}).get("table")
    torch.manual_seed(args.seed)
    model = ALDM(preset, unet, vae, text, classes, args.adapter, hint, table,
                 start.get("hint_colors")).to(device)
    if args.init:
        load_into(model.adapter, init["adapter"], args.init)

    discriminator = UperNet(len(classes.names) + 1, **preset.segmenter)
    if args.segmenter:
        load_segmenter(args.segmenter, discriminator, classes)
    elif "segmenter" in init:
        load_segmenter(init["segmenter"], discriminator, classes, start)
    elif "segmenter" in parts:  # the toy's, or that of an official checkpoint
        outputs = len(parts["segmenter"][LAST[1]])
        names = class_table(OFFICIAL.get(outputs, "toy")).names
        load_segmenter(parts["segmenter"], discriminator, classes, {"names": names})
    elif args.discriminator != "none":
        note("the discriminator starts at random; a pretrained one trains more stably: --segmenter")
    discriminator.to(device)
    make_fast(model, discriminator, args)

    meta = dict(preset=args.preset, dataset=classes.key, names=list(classes.names),
                palette=classes.palette.tolist(), file_ids=classes.file_ids.tolist(),
                void=classes.void.tolist(), adapter=args.adapter, hint=model.layout.hint,
                hint_colors=start.get("hint_colors"), normalize=discriminator.normalize)
    return model, discriminator, parts, meta


def make_fast(model, discriminator, args):
    """What changes speed and memory, but neither values nor names: channels_last (from which the
    UNet gains nothing on a CPU), --recompute and --compile, both block by block."""
    (model.vae if args.device == "cpu" else model).to(memory_format=torch.channels_last)
    discriminator.to(memory_format=torch.channels_last).eval().requires_grad_(False)
    if args.compile:
        torch._dynamo.config.cache_size_limit = 256  # shapes and gradients differ by block
    blocks = ResBlock, SpatialTransformer, ResnetBlock
    for module in [*model.modules(), *discriminator.modules()]:
        if args.compile and isinstance(module, (*blocks, Bottleneck)):
            module.forward = torch.compile(module.forward, dynamic=False)
        if args.recompute and isinstance(module, blocks):  # (not D: batch norms would count twice)
            module.forward = partial(checkpoint, module.forward, use_reentrant=False,
                                     preserve_rng_state=False)


def adapter_step(args, model, discriminator, opt_g, opt_d, items, step):
    micro_batches = []
    for i in range(0, len(items["label"]), args.batch):
        part = {name: values[i:i + args.batch] for name, values in items.items()}
        micro_batches.append(prepare(model, part))
    return train_step(model, discriminator, opt_g, opt_d, micro_batches, step, args)


@torch.no_grad()
def prepare(model, items):
    """Loaded items -> what a step needs: label [B,H,W], x0 [B,4,h,w] (a draw from the encoder's
    Gaussian), context [B,77,C]."""
    there = {name: values.to(model.device, non_blocking=True)
             for name, values in items.items() if torch.is_tensor(values)}
    if "moments" in items:  # of a Cache
        x0 = model.vae.draw(*there["moments"].float().chunk(2, dim=1))
        context = there["context"].float()
    else:
        x0 = model.vae.encode(there["image"], sample=True)
        context = model.text.encode(items["caption"])
    return {"label": there["label"].long(), "x0": x0, "context": context}


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def export_adapter(args, model, meta, step):
    """adapter.safetensors; at every tenth checkpoint also one that stays: adapter_0010000."""
    names = ["adapter"]
    if step % (10 * args.save_every) == 0:
        names.append(f"adapter_{step:07d}")
    for name in names:
        save_adapter(Path(args.out) / f"{name}.safetensors", model, {**meta, "step": step},
                     DTYPES[args.adapter_dtype])


@torch.no_grad()
def save_pictures(args, model, discriminator, items, step):
    """step_*.png, a row per layout, and log.csv as curves. -> {"D_mIoU": of what the discriminator
    finds in the generated images}"""
    label = torch.stack([item["label"] for item in items]).to(model.device)
    image = torch.stack([item["image"] for item in items]).to(model.device)
    captions = [item["caption"] for item in items]
    samples = generate(model, label, captions, seeds=range(len(items)), steps=args.ddim_steps,
                       batch=args.batch)
    with autocast(args):
        x0 = model.vae.encode(image)
        t = torch.full((len(items),), 401, device=model.device)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0)
        x_t = model.schedule.add_noise(x0, t, noise)
        x0_hat = model.schedule.predict_x0(x_t, t, model.eps(x_t, t, captions, label))
        seen = model.vae.decode(x0_hat).float().clamp(-1, 1)
        found = discriminator(seen).argmax(1)
        answer = discriminator(from_pixels(samples, model.device)).argmax(1)
    N = len(model.classes.names)
    columns = {
        "layout": paint(label, model.classes),
        "real": to_pixels(image),
        "generated": samples,
        "x0_hat, t = 401": to_pixels(seen),
        "what D finds there": paint(found.where(found < N, IGNORE), model.classes),  # fake: black
    }
    out = Path(args.out)
    rows = list(zip(*columns.values()))
    write_png(out / f"step_{step:07d}.png", grid(rows, titles=list(columns)))
    draw_curves(out / "log.csv", out / "curves.png")
    _, iou = mean_iou(confusion_matrix(answer, label, N + 1))
    return {"D_mIoU": iou[:N].nanmean()}


def paint(labels, classes):
    return [np.asarray(colorize(label, classes)) for label in labels.cpu()]


def judge_toy(model, parts, args):
    """What the toy's judges say of images of layouts that no training has seen, or None."""
    toy = class_table("toy")
    if "judge" not in parts or not args.eval or rank() > 0 or model.classes.names != toy.names:
        return None
    judge, classifier = toy_judges(parts, model.device)
    dataset = Toy("val", ("day",), length=args.eval, augment=False)
    items = [dataset[i] for i in range(len(dataset))]
    return evaluate(model, items, judge, classifier, n=2, diverse=16, batch=16,
                    steps=args.ddim_steps)


FIGURES = {  # a column of our tables -> its key in judged.json
    "mIoU": "mIoU_generated",
    "mIoU, edited prompt": "mIoU_edited",
    "domain accuracy": "editability",
    "Frechet distance": "frechet_distance",
    "precision": "precision",
    "recall": "recall",
    "diversity": "diversity",
    "seconds": "seconds",
}


def print_table(before, after):
    print(f"{'':20}{'before':>9}{'after':>9}")
    for title, key in FIGURES.items():
        values = [(result or {}).get(key) for result in (before, after)]
        print(f"{title:20}" + "".join(f"{'-':>9}" if v is None else f"{v:9.3f}" for v in values))


class Cache(torch.utils.data.Dataset):
    """--cache DIR: a file per image with what the frozen parts make of it, computed once, so that a
    step needs neither JPEGs nor the VAE's encoder nor the text encoder.

    Each holds the latent's moments of the whole resized image and of its mirror image (fp16), the
    labels, and the states of its captions (where there is none, of one composed of the whole
    image's classes). Random crops are cut from the latents, which at the borders have seen what
    lies beyond.
    """

    def __init__(self, folder, dataset, model):
        self.folder = Path(folder)
        self.dataset = dataset
        self.factor = model.vae.cfg.factor
        frozen = [*model.vae.parameters(), *model.text.parameters()]
        weights = sum(p.double().abs().sum().item() for p in frozen)
        made_of = f"{dataset.stamp()}, all captions, size {dataset.size}, weights {weights:.6e}"
        self.folder.mkdir(parents=True, exist_ok=True)
        sign = self.folder / "cache.txt"
        if sign.exists() and sign.read_text() != made_of:
            raise InputError(f"--cache {folder}: is of other images, labels, captions or weights; "
                             "choose another folder")
        if rank() == 0:
            remove_leftovers(self.folder)
            write_text(sign, made_of)
        mine = range(rank(), len(dataset), world())
        with torch.compiler.set_stance("force_eager"):  # nothing is compiled for one image's size
            for i in tqdm(mine, "cache", disable=rank() > 0, mininterval=1):
                if not self.is_whole(i):
                    self.write(i, model)
        largest(0)  # until all have written

    def file(self, index):
        return self.folder / f"{index:08d}.safetensors"

    def is_whole(self, index):
        """Whether the file is there; a damaged one is named, and made anew."""
        if not self.file(index).exists():
            return False
        try:
            with safe_open(self.file(index), "pt"):  # checks that it is as long as it says
                return True
        except SafetensorError as error:
            print(f"{self.file(index)}: damaged ({error}), made anew", file=sys.stderr)
            return False

    @torch.no_grad()
    def write(self, index, model):
        image, label = self.dataset.full(index)
        both = torch.stack([image, image.flip(-1)]).to(model.device)
        moments = torch.cat(model.vae.moments(both), dim=1)  # (2, 2z, h, w)
        captions = self.dataset.captions.get(self.dataset.names[index])
        if not isinstance(captions, list):
            captions = [self.dataset.caption(index, label)]
        context = model.text.encode(captions)  # (n, 77, C)
        content = {"moments": moments.half(), "label": label.byte(), "context": context.half()}
        save_tensors(self.file(index), content, {})

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        index, seed = key
        flip, top, left = self.dataset.window(index, seed)
        content = load_file(self.file(index))
        label = content["label"].flip(-1) if flip else content["label"]
        moments = content["moments"][int(flip)]
        f, size = self.factor, self.dataset.size
        rows = slice(top // f, (top + size) // f)
        columns = slice(left // f, (left + size) // f)
        context = content["context"]
        return {"moments": moments[:, rows, columns], "context": context[seed % len(context)],
                "label": label[top:top + size, left:left + size]}


# -- training a plain segmenter (Table 4) ----------------------------------------------------------


def train_segmenter(args):
    """--train segmenter: on real images, and on synthetic ones in the proportion --mix; then mIoU
    on each of --test, as a table and as segmenter.json."""
    real = load_dataset(args, args.data, args.root, "train", grid=1)
    extra = [load_dataset(args, folder, folder, "train", grid=1) for folder in args.extra]
    tests = {}
    for name in args.test or [args.data]:
        data, _, root = name.partition("=")
        tests[name] = load_dataset(args, data, root or args.root, "val", grid=1, augment=False)
    for name, dataset in [*zip(args.extra, extra), *tests.items()]:
        if dataset.classes.names != real.classes.names:
            raise InputError(f"{name}: its {len(dataset.classes.names)} classes are not the "
                             f"{len(real.classes.names)} of {args.data}")
    torch.manual_seed(args.seed)
    net = UperNet(len(real.classes.names), **PRESETS[args.preset].segmenter)
    if args.segmenter:
        load_segmenter(args.segmenter, net, real.classes)
    net.to(args.device, memory_format=torch.channels_last).train()
    opt = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=0.9, weight_decay=1e-4, fused=True)
    for p in net.parameters():  # which torch leaves uninitialised where the first step is dropped
        opt.state[p]["momentum_buffer"] = torch.zeros_like(p)
    meta = dict(preset=args.preset, dataset=real.classes.key, names=list(real.classes.names),
                normalize=net.normalize)
    open_run(args)
    fit(Job(
        state={"segmenter": net, "opt": opt},
        meta=meta,
        stream=partial(mixed_stream, args, real, extra),
        rates=[(opt, partial(polynomial, args))],
        step=partial(segmenter_step, args, net, opt),
        columns=["ce"],
        export=partial(export_segmenter, args, net, meta)), args)
    if rank() == 0:
        test_segmenter(args, net.eval(), tests)


def synthetic_share(args):
    """-> how many images of each batch come from each of the --extra sets"""
    return round(args.mix * args.batch / max(len(args.extra), 1))


def mixed_stream(args, real, extra, first):
    """Batches of which the share --mix comes from the extra sets, equally from each of them."""
    each = synthetic_share(args)
    streams = [stream(args, real, args.batch - each * len(extra), first)]
    streams += [stream(args, dataset, each, first) for dataset in extra]
    for shares in zip(*streams):
        yield {key: torch.cat([share[key] for share in shares]) for key in ("image", "label")}


def polynomial(args, step):
    """Linear up in 50 steps, then mit-semseg's polynomial, down to 0 at the end."""
    return args.lr * min(1, (step + 1) / 50) * (1 - step / args.steps) ** 0.9


def segmenter_step(args, net, opt, batch, step):
    image = batch["image"].to(args.device, non_blocking=True)
    label = batch["label"].to(args.device, non_blocking=True)
    with autocast(args):
        logits = net(image)
    loss = F.cross_entropy(logits.float(), label, ignore_index=IGNORE)
    loss.backward()
    losses = {"ce": loss.detach()}
    dropped = update(opt, losses)
    average([b for b in net.buffers() if b.is_floating_point()])
    return {**losses, "dropped": dropped}


def export_segmenter(args, net, meta, step):
    tensors = {f"segmenter.{name}": t for name, t in net.state_dict().items()}
    save_tensors(Path(args.out) / "segmenter.safetensors", tensors,
                 {**meta, "step": step, "format": "aldm-segmenter"})


@torch.no_grad()
def test_segmenter(args, net, tests):
    """mIoU on whole images of the data sets {name: dataset}, in windows of the training size."""
    results = {}
    for name, dataset in tests.items():
        names = dataset.classes.names
        confusion = torch.zeros(len(names), len(names), dtype=torch.int64)
        for i in tqdm(range(len(dataset)), name, leave=False):
            image, label = dataset.full(i)
            with autocast(args):
                logits = segment(net, image[None].to(args.device), args.size)
            confusion += confusion_matrix(logits[0].argmax(0).cpu(), label, len(names))
        miou, iou = mean_iou(confusion)
        per_class = {c: rounded(value) for c, value in zip(names, iou.tolist())}
        results[name] = {"mIoU": rounded(miou), "IoU": per_class}
        print(f"{name}: mIoU {miou:.3f}")
        for c, value in per_class.items():
            print(f"  {c:20} {value}")
    write_text(Path(args.out) / "segmenter.json", json.dumps(results, indent=1))


# -- what a step costs -----------------------------------------------------------------------------


def bench(args):
    """--bench: a noise step, and an adversarial step with the discriminator's, of random weights.

    A step begins with loaded images and captions; with --cache, with latents and text states.
    """
    device = torch.device(args.device)
    preset = PRESETS[args.preset]
    classes = class_table(args.data)
    torch.manual_seed(args.seed)
    with device:
        unet, vae, text = UNet(preset.unet), VAE(preset.vae), TextEncoder(**preset.text)
        discriminator = UperNet(len(classes.names) + 1, **preset.segmenter)
    if device.type == "cuda" and args.adapter != "freestyle":
        unet.bfloat16()
    model = ALDM(preset, unet, vae, text, classes, args.adapter, args.hint or "classes").to(device)
    make_fast(model, discriminator, args)
    opt_g, opt_d = optimizers(model, discriminator, args)
    B = args.batch * args.accumulate
    items = {"image": torch.rand(B, 3, args.size, args.size) * 2 - 1, "caption": ["a street"] * B,
             "label": torch.randint(0, len(classes.names), (B, args.size, args.size))}
    if args.cache:
        moments = torch.cat(model.vae.moments(items.pop("image").to(device)), 1).detach()
        items |= {"moments": moments, "context": model.text.encode(items.pop("caption"))}
    args.ramp, args.d_start, args.lazy = (0, 1), 0, 8  # step 8 is adversarial, 9 is not
    count = sum(p.numel() for p in model.adapter.parameters()) / 1e6
    print(f"{device_name(device)}, preset {args.preset}, {args.size} x {args.size}, batch {B}, "
          f"{args.adapter} ({count:.1f} M weights), {'bf16' if args.bf16 else 'fp32'}")
    print(f"{'':36}{'TFLOP':>9}{'ms':>10}{'TFLOP/s':>9}{'GiB peak':>10}")
    for title, step in (("noise step", 9), (f"adversarial step, K = {args.unroll}, with D's", 8)):
        run = partial(adapter_step, args, model, discriminator, opt_g, opt_d, items, step)
        if args.compile:
            run()  # under the counter of `measure` nothing is compiled
        flops, seconds, peak = measure(run, device, args.repeat)
        tera = flops / 1e12
        print(f"{title:36}{tera:9.3g}{seconds * 1e3:10.1f}{tera / seconds:9.3g}{peak:10.2f}")


# -- the command line ------------------------------------------------------------------------------


def parse_args(argv=None):
    defaults = "\n".join(f"  {name:13}{values}" for name, values in DEFAULTS.items())
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False,
        formatter_class=argparse.RawTextHelpFormatter,
        epilog=f"defaults for toy, cityscapes (or a folder), ade20k (or coco):\n{defaults}")
    p.error = refuse
    add_data_flags(p.add_argument_group("data, weights and files").add_argument)
    add_method_flags(p.add_argument_group("the method").add_argument)
    add_run_flags(p.add_argument_group("the run").add_argument)
    add_segmenter_flags(p.add_argument_group("--train segmenter").add_argument)
    return p.parse_args(argv)


whole = partial(number, kind=int)


def add_data_flags(add):
    add("--data", default="toy", help="toy, cityscapes, ade20k, coco, or a folder with images/,\n"
        "labels/, classes.txt (default toy)")
    add("--root", help="the data set's folder")
    add("--captions", help="JSON, name -> caption (default: captions*.json in --root, or composed)")
    add("--skip-broken", action="store_true", help="leave out the pairs that the check names")
    add("--out", help="the run's folder (default runs/DATA)")
    add("--preset", choices=list(PRESETS), help="size of the networks")
    add("--sd", help="Stable Diffusion 1.x: one file, or a diffusers folder (default: downloaded;\n"
        "toy: assets/toy.safetensors)")
    add("--init", help="start the adapter from this file, or none (default: none; toy: a\n"
        "ControlNet trained with the noise loss)")
    add("--class-embeddings", help="the official .pth (default: computed by the text encoder)")
    add("--segmenter", nargs="+", help="start the discriminator (or segmenter) from mit-semseg's\n"
        "ADE20K files (encoder and decoder), or from one of ours")
    add("--size", type=whole(16), help="side of the crops, pixels")
    add("--cache", help="folder for latents and text states, computed once")
    add("--workers", type=whole(0), default=0, help="loading processes (default 0)")


def add_method_flags(add):
    add("--adapter", choices=["controlnet", "t2i", "oft", "freestyle"],
        help="what brings the layout in (default controlnet)")
    add("--hint", choices=["classes", "color"],
        help="the ControlNet's: ALDM's class embeddings (default), or colours")
    add("--discriminator", choices=["trained", "frozen", "none"], default="trained",
        help="none: the noise loss alone")
    add("--lambda-adv", type=number(0), help="weight of L_adv")
    add("--ramp", type=interval, metavar="A:B", help="steps in which that weight grows from 0")
    add("--lazy", type=whole(1), help="L_adv and D every n-th step")
    add("--unroll", type=whole(0), help="K, unrolled DDIM steps")
    add("--unroll-grad", choices=["first", "each", "full"],
        help="the estimates that carry gradient")
    add("--ddim-steps", type=whole(1, 1000), default=25, help="of chain and pictures (default 25)")
    add("--t-max", type=whole(1, 1000), default=1000, help="chains start at a t below\n"
        "(default 1000)")
    add("--lr", type=number(0, exclusive=True), help="the adapter's, AdamW")
    add("--warmup", type=whole(1), default=20, help="steps until --lr is reached (default 20)")
    add("--lr-d", type=number(0, exclusive=True), help="D's maximum, AdamW")
    add("--d-warmup", type=whole(1), help="D's updates until then")
    add("--d-cycle", type=whole(1), help="D's updates until 1/1000 of it (None: the run's)")
    add("--d-start", type=whole(0), help="D is trained from this step on")
    add("--fake-weight", type=number(0), help="weight of L_Dis's fake term")


def add_run_flags(add):
    add("--train", choices=["adapter", "segmenter"], default="adapter", help="(default adapter)")
    add("--steps", type=whole(1), help="iterations")
    add("--batch", type=whole(1), help="images per process and micro batch")
    add("--accumulate", type=whole(1), default=1, help="micro batches per step (default 1)")
    add("--seed", type=whole(0, 2 ** 32 - 1), default=0, help="of everything (default 0)")
    add("--device", help="cpu or cuda (default: cuda if there)")
    add("--bf16", action="store_true", help="autocast on a CPU, too: faster where it has AMX")
    add("--recompute", action="store_true", help="blocks again in the backward pass: saves memory")
    add("--compile", action="store_true", help="compile the blocks: slow to start, then faster")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    add("--save-every", type=whole(1), help="steps between checkpoints")
    add("--keep", type=whole(1), default=2, help="checkpoints that stay (default 2)")
    add("--adapter-dtype", choices=list(DTYPES), default="fp16",
        help="of adapter*.safetensors (default fp16)")
    add("--sample-every", type=whole(1), help="steps between pictures")
    add("--eval", type=whole(0), default=96, help="toy layouts that are judged (default 96)")
    add("--no-before", action="store_false", dest="before", help="judge after the training only")
    add("--bench", action="store_true", help="measure a step at this size, and stop")
    add("--repeat", type=whole(1), default=3, help="runs of --bench, shown by median (default 3)")


def add_segmenter_flags(add):
    add("--extra", nargs="+", default=[], help="folders that sample.py --layouts has written")
    add("--mix", type=number(0, 1), default=0.5, help="their share of each batch (default 0.5)")
    add("--test", nargs="+", help="data sets to test on, NAME or NAME=ROOT (default: --data)")


def interval(text):
    """An argparse type: "A:B" -> (A, B), whole numbers"""
    first, last = map(int, text.split(":"))
    return first, last


SEGMENTER_DEFAULTS = {"steps": 2000, "batch": 16, "lr": 0.02}


def complete(args):
    """Fill in what --data implies, and check what argparse cannot. Raises InputError."""
    if args.bench and args.preset == "sd15" and args.data == "toy":
        args.data = "cityscapes"  # --bench takes only its classes
    toy = args.data.split(":")[0] == "toy"
    if args.init is None and toy and args.adapter in (None, "controlnet") and args.hint != "color":
        args.init = str(ASSETS / "toy_controlnet.safetensors")
    args.init = None if args.init == "none" else args.init
    if args.adapter is None:
        args.adapter = read_adapter(args.init)[0]["adapter"] if args.init else "controlnet"
    column = 0 if args.preset == "toy" else COLUMN.get(args.data.split(":")[0], 1)
    defaults = {name: values[column] for name, values in DEFAULTS.items()}
    if args.train == "segmenter":
        defaults |= SEGMENTER_DEFAULTS
    fill_in(args, defaults)
    name = Path(args.data.replace(":", "-")).resolve().name
    if args.train == "segmenter":
        name += "-segmenter"
    args.out = args.out or f"runs/{name}"
    args.device = pick_device(args.device)
    if args.device == "cpu":  # whose flash attention is slow backwards in bf16
        torch.backends.cuda.enable_flash_sdp(not args.bf16)
    args.bf16 = args.bf16 or args.device != "cpu"
    if args.lambda_adv == 0:
        args.discriminator = "none"
    timesteps = Schedule().ddim_timesteps(args.ddim_steps)
    args.starts_below = int((timesteps < args.t_max).sum())  # DDIM steps that chains start from
    check(args)
    return args


def fill_in(args, defaults):
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def check(args):
    """Raise InputError for flags that do not go together."""
    toy = args.data.split(":")[0] == "toy"
    of_adapter = args.train == "adapter"
    if of_adapter and args.discriminator != "none" and args.unroll >= args.starts_below:
        raise InputError(f"--unroll {args.unroll}: must be below the number of DDIM steps, of "
                         f"--ddim-steps {args.ddim_steps} those below --t-max {args.t_max}: "
                         f"{args.starts_below}")
    if args.extra and not 0 < synthetic_share(args) * len(args.extra) < args.batch:
        raise InputError(f"--mix {args.mix}: of a batch of {args.batch}, that is nothing or all")
    if toy and args.size != 64:
        raise InputError(f"--size {args.size}: the toy world is 64x64")
    if toy and (args.root or args.captions):
        raise InputError("--root and --captions: the toy world has no files")
    if of_adapter and args.size % PRESETS[args.preset].multiple:
        raise InputError(f"--size {args.size}: preset {args.preset} takes multiples of "
                         f"{PRESETS[args.preset].multiple}")
    if args.hint == "color" and args.adapter != "controlnet":
        raise InputError(f"--hint color: is the ControlNet's; {args.adapter} has its own hint")
    if not args.bench:
        refuse_second_run(args)


def main():
    try:
        args = complete(parse_args())
        if "RANK" in os.environ:  # started by torchrun
            dist.init_process_group("gloo" if args.device == "cpu" else "cpu:gloo,cuda:nccl")
            if args.device != "cpu":
                args.device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        if args.bench:
            bench(args)
        elif args.train == "segmenter":
            train_segmenter(args)
        else:
            train_adapter(args)
    except (InputError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        raise SystemExit(2)
    except (Stopped, torch.OutOfMemoryError) as error:
        print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()

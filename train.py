"""Train ALDM: read `generator_loss` and `train_step` as the paper's algorithm (Sec. 3, Fig. 2).

    python train.py                                              the embedded toy world, on a CPU, in minutes
    python train.py --data cityscapes --root DIR                 Stable Diffusion 1.5 on Cityscapes, on a GPU
    torchrun --nproc-per-node 2 train.py --data cityscapes ...   several GPUs (or processes)
"""
import os
import signal

SIGNALS = signal.SIGINT, signal.SIGTERM
if __name__ == "__main__":      # before the slow imports: until the training begins, a signal ends this without a word
    for sign in SIGNALS:        # (an exception would get lost if it came within a fork or a destructor)
        signal.signal(sign, lambda number, _: os._exit(128 + number))

import argparse
import copy
import csv
import fcntl
import json
import math
import pickle
import re
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from aldm import (ALDM, JUDGE, PRESETS, Schedule, TextEncoder, atomic, base_file, keep_memory, load_class_embeddings,
                  load_frozen, load_into, load_segmenter, load_weights, pick_device, read_adapter, save_adapter, save_base,
                  unrolled_adversarial_loss)
from data import DOMAINS, InputError, Toy, batches, class_table, colorize, open_dataset, refuse
from discriminator import Bottleneck, Classifier, UperNet, discriminator_loss
from sample import evaluate, from_pixels, generate, grid, number
from unet import ResBlock, SpatialTransformer, UNet
from vae import VAE, ResnetBlock

# What --data sets when a flag does not: for Cityscapes and ADE20K the values of the official training.
DEFAULTS = {
    #                  toy      cityscapes   ade20k      coco       a folder
    "preset":       ("toy",     "sd15",     "sd15",     "sd15",     "sd15"),
    "adapter":      ("oft", "controlnet", "controlnet", "controlnet", "controlnet"),
    "size":         (64,        512,        512,        512,        512),      # pixels
    "steps":        (300,       120_000,    200_000,    200_000,    100_000),
    "batch":        (16,        4,          4,          4,          4),        # per process
    "lr":           (5e-4,      1e-5,       2e-5,       2e-5,       1e-5),     # of the adapter
    "lr_d":         (5e-5,      1e-6,       1e-6,       1e-6,       1e-6),     # of the discriminator: one-cycle maximum
    "lambda_adv":   (4.0,       0.1,        0.5,        0.5,        0.1),
    "fake_weight":  (0.01,      0.01,       0.001,      0.001,      0.01),     # of the fake term of L_Dis
    "ramp":         ((100, 150), (5000, 10_000), (10_000, 15_000), (10_000, 15_000), (5000, 10_000)),
    "d_start":      (100,       0,          5000,       5000,       0),        # D is trained from this step on
    "lazy":         (2,         8,          8,          8,          8),        # adversarial term and D every n-th step
    "unroll":       (3,         9,          9,          9,          9),        # K
    "save_every":   (100,       1000,       1000,       1000,       1000),
    "sample_every": (100,       500,        500,        500,        500),
}
DATASETS = ("toy", "cityscapes", "ade20k", "coco")


# -- the paper's algorithm --------------------------------------------------------------------------------------------


def ramp(step, first, last):
    """The adversarial term's coefficient: 0 before `first`, 1 from `last` on, linear between."""
    return min(max((step - first) / max(last - first, 1), 0.0), 1.0)


def generator_loss(model, discriminator, batch, step, args):
    """L = L_noise + lambda_adv * ramp * L_adv on one (micro) batch: label [B,H,W], x0 [B,4,h,w], context [B,77,C].

    -> loss, {name: scalar}, fakes [B,3,H,W]: the images of x0_hat(t), or None where the discriminator has no turn
    """
    label, x0, context = batch["label"], batch["x0"], batch["context"]
    schedule, timesteps = model.schedule, model.schedule.ddim_timesteps(args.ddim_steps)
    turn = step >= args.d_start and step % args.lazy == 0 and args.discriminator != "none" and args.lambda_adv > 0
    weight = args.lambda_adv * ramp(step, *args.ramp) if turn else 0
    noise = torch.randn_like(x0)
    if turn:        # the chain starts on the DDIM subset, at least K steps before its end
        last = max(-(-(args.t_max - 1) * args.ddim_steps // 1000), args.unroll + 1)     # timesteps[last - 1] < t_max
        start = torch.randint(args.unroll, last, (len(x0),), device=x0.device)
        t = timesteps[start]
    else:
        t = torch.randint(0, 1000, (len(x0),), device=x0.device)

    x_t = schedule.add_noise(x0, t, noise)
    layout = model.encode_layout(label)
    eps = model.eps(x_t, t, context, layout)                    # used thrice: noise loss, start of the chain, D's fakes
    noise_loss = F.mse_loss(eps, noise)
    if not turn:
        return noise_loss, {"noise": noise_loss}, None
    unroll = args.unroll if weight else 0                       # before the ramp only D learns
    with torch.set_grad_enabled(weight > 0):
        adv, fakes = unrolled_adversarial_loss(model, discriminator, x_t, eps, start, timesteps, label, context, layout,
                                               unroll, args.unroll_grad, args.group)
    return noise_loss + weight * adv, {"noise": noise_loss, "adv": adv}, fakes


def train_step(model, discriminator, opt_g, opt_d, micro_batches, step, args):
    """One iteration: the adapter's step, then (on its turns) the discriminator's, on what the adapter just made."""
    losses, fakes = {}, []
    for batch in micro_batches:                                 # more than one with --accumulate
        with autocast(args):
            loss, parts, fake = generator_loss(model, discriminator, batch, step, args)
        (loss / len(micro_batches)).backward()
        accumulate(losses, parts, len(micro_batches))
        fakes.append(fake)
    dropped = update(opt_g, losses)

    if fakes[0] is not None and args.discriminator == "trained":
        discriminator.train().requires_grad_(True)              # (frozen in the adapter's step)
        before, d_losses = [b.clone() for b in discriminator.buffers()], {}
        for batch, fake in zip(micro_batches, fakes):
            with autocast(args):
                with torch.no_grad():                           # real: reconstructed, so the VAE's marks tell nothing
                    real = model.vae.decode(batch["x0"]).float().clamp(-1, 1)
                logits = discriminator(torch.cat([real, fake]))
                loss, parts = discriminator_loss(*logits.chunk(2), batch["label"], args.fake_weight)
            (loss / len(micro_batches)).backward()
            accumulate(d_losses, {f"D_{name}": value for name, value in parts.items()}, len(micro_batches))
        discriminator.eval().requires_grad_(False)
        d_dropped = update(opt_d, d_losses)
        average([b for b in discriminator.buffers() if b.is_floating_point()])
        for b, old in zip(discriminator.buffers(), before):     # a dropped step leaves the batch norm as it was, too
            b.copy_(old.where(d_dropped > 0, b))
        losses, dropped = losses | d_losses, dropped + 2 * d_dropped
    return {**losses, "dropped": dropped}


def autocast(args):
    """bf16, with norms, softmax and our losses in fp32: always on CUDA, on the CPU with --bf16."""
    return torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.bf16)


def accumulate(losses, parts, n):
    for name, value in parts.items():
        losses[name] = losses.get(name, 0) + value.detach() / n


def average(tensors):
    """Mean over the processes, in place: one message for all of them."""
    if dist.is_initialized() and tensors:
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, mean in zip(tensors, (flat / dist.get_world_size()).split([t.numel() for t in tensors])):
            t.copy_(mean.view_as(t))


@torch.no_grad()
def update(optimizer, losses, clip=math.inf):
    """Average gradients and losses {name: scalar} over processes and step; if any is not finite, the step is dropped.
    -> 1.0 if so [scalar]. Nothing here waits for the GPU: the fused AdamW itself skips where `found_inf` says so."""
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    average([p.grad for p in params] + [*losses.values()])
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    if clip < math.inf:
        torch.nn.utils.clip_grads_with_norm_(params, clip, norm)
    optimizer.found_inf = (~torch.stack([norm, *losses.values()]).isfinite().all()).float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer.found_inf


def one_cycle(fraction):
    """The discriminator's learning rate over a run, over its maximum: up for 30 %, then down (cosines)."""
    cos = lambda a, b, f: b + (a - b) * (1 + math.cos(math.pi * f)) / 2
    return cos(1 / 25, 1, fraction / 0.3) if fraction < 0.3 else cos(1, 1e-4, (fraction - 0.3) / 0.7)


# -- a run: its folder, log, checkpoints and signals ------------------------------------------------------------------


class Run:
    """What any training needs around its step: one folder with a lock, log.csv and atomic checkpoints.

    state   {name: module or optimiser}: what a checkpoint holds besides the step. Randomness needs no state: every draw
            of step s comes from (seed, s, rank), so that a resumed run continues as if it had not been stopped.
    meta    plain values that must be the same when the run is resumed
    """

    def __init__(self, args, state, meta):
        self.out, self.state, self.meta, self.args = Path(args.out), state, meta, args
        self.columns, self.step, self.rows, self.last, self.streak = ["step", *args.columns], 0, [], {}, {}
        if rank() == 0:
            self.claim()
        largest(0)                                                  # the other processes wait for that
        if args.resume:
            self.restore()

    def claim(self):
        """The folder is ours as long as this process lives. Removes what a killed run left half written."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.out / ".lock", "w")
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)   # (the loader's processes do not inherit it)
        except BlockingIOError:
            raise InputError(f"{self.out}: another run is writing here; choose another --out") from None
        except OSError as error:
            raise InputError(f"--out {self.out}: {error.strerror}; choose another folder") from None
        if not self.args.resume and (self.checkpoints() or (self.out / "log.csv").exists()):
            raise InputError(f"{self.out}: holds a run already; go on with --resume, or choose another --out")
        for name in ("checkpoint_*.pt", "step_*.png", "adapter.safetensors", "log.csv"):
            for path in [*self.out.glob(f".[0-9]*.{name}"), *self.out.glob(".tmp??????")]:      # atomic's, safetensors'
                path.unlink()

    def checkpoints(self):
        return sorted(self.out.glob(f"checkpoint_{7 * '[0-9]'}.pt"))

    def restore(self):
        """Load the newest checkpoint that is whole, set newer ones aside, and cut the log back to its step."""
        damaged = {}
        for path in reversed(self.checkpoints()):
            try:
                with zipfile.ZipFile(path) as file:                 # torch.load itself does not look at the checksums
                    if bad := file.testzip():
                        raise zipfile.BadZipFile(f"bad checksum of {bad}")
                saved = torch.load(path, map_location="cpu", weights_only=True)
                self.step, meta = saved["step"], saved["meta"]
                break
            except pickle.UnpicklingError:                          # (nothing of it was executed)
                damaged[path] = "it holds more than weights"
            except Exception as error:                              # whatever the two raise at a damaged file
                damaged[path] = (str(error) or type(error).__name__).splitlines()[0]
        else:
            if damaged:
                path, why = damaged.popitem()
                raise InputError(f"{path}: damaged ({why}), and no other checkpoint is whole; choose another --out")
            note(f"{self.out}: nothing to resume yet, so it starts at step 0")
        if self.step:
            for key, value in self.meta.items():
                if meta.get(key) != value:
                    raise InputError(f"{path}: its run has {key} {meta.get(key)!r:.60}, this one {value!r:.60}: resume "
                                     "with the same flags, or choose another --out")
            for name, part in self.state.items():
                part.load_state_dict(saved[name])
        largest(0)                                                  # until all have read
        if rank() == 0:
            for bad, why in damaged.items():
                note(f"{bad}: damaged ({why}); renamed, going back to {path.name}")
                bad.rename(f"{bad}.damaged")                        # else it would count as one of those to --keep
            self.cut_log()

    def cut_log(self):
        log = self.out / "log.csv"
        if log.exists():
            with open(log, newline="", errors="replace") as file:
                rows = [row for row in csv.reader(file) if len(row) == len(self.columns) and row[0].isdigit()]
            with atomic(log) as temporary, open(temporary, "w", newline="") as file:
                csv.writer(file).writerows([self.columns, *(row for row in rows if int(row[0]) <= self.step)])

    def save(self):
        self.flush()
        if rank() == 0:
            with atomic(self.out / f"checkpoint_{self.step:07d}.pt") as temporary:
                try:
                    torch.save({"step": self.step, "meta": self.meta,
                                **{name: part.state_dict() for name, part in self.state.items()}}, temporary)
                except RuntimeError as error:                       # so torch calls a full disk
                    raise OSError(f"the checkpoint could not be written, is the disk full? ({error})") from None
            milestone = 10 * self.args.save_every
            for path in [p for p in self.checkpoints() if int(p.stem[-7:]) % milestone][:-self.args.keep]:
                path.unlink()
        largest(0)                                                  # until it is written: none may exit before

    def log(self, losses):
        """Keep this step's losses, and write them out in tens: reading them from a GPU makes it wait."""
        self.step += 1
        self.rows.append((self.step, losses))
        if len(self.rows) == 10 or losses["dropped"].device.type == "cpu":
            self.flush()

    def flush(self):
        rows, self.rows = self.rows, []
        for step, losses in rows:
            self.last |= {name: value.item() for name, value in losses.items()}
            if rank() == 0:
                with open(self.out / "log.csv", "a", newline="") as file:
                    writer = csv.writer(file)
                    if file.tell() == 0:
                        writer.writerow(self.columns)
                    writer.writerow([step, *(f"{self.last[n]:.7g}" if n in losses else "" for n in self.args.columns)])
            dropped = self.last["dropped"]
            for name in losses:                                     # among the steps that have it: "adv" on its turns
                self.streak[name] = self.streak.get(name, 0) + 1 if dropped else 0
            if max(self.streak.values()) == 10:
                raise Stopped(f"step {step}: loss or gradients of {DROPPED[dropped]} not finite, ten times in a row")

    @contextmanager
    def guarded(self):
        """Signals are taken down instead of obeyed; what stops the run is told with the checkpoint that is left."""
        self.signal = 0
        before = [signal.signal(sign, lambda number, _: setattr(self, "signal", number)) for sign in SIGNALS]
        try:
            yield
        except (Stopped, OSError, SafetensorError, torch.OutOfMemoryError) as error:            # (two of a full disk)
            last = max(self.checkpoints(), default="none")
            raise Stopped(f"{' '.join(str(error).split())}; last good checkpoint: {last}") from None
        finally:
            for sign, handler in zip(SIGNALS, before):
                signal.signal(sign, handler)

    def loop(self, step_fn, on_sample=None):
        """step_fn(step) -> losses, until --steps; draws pictures and saves on the way, stops cleanly on a signal."""
        args = self.args
        with self.guarded(), tqdm(total=args.steps, initial=self.step, disable=rank() > 0, dynamic_ncols=True,
                                  mininterval=1) as bar:
            while self.step < args.steps:
                torch.manual_seed(hash((args.seed, self.step, rank())) % 2 ** 63)
                self.log(step_fn(self.step))
                bar.update()
                bar.set_postfix({n: f"{v:.3g}" for n, v in self.last.items() if v or n != "dropped"}, refresh=False)
                stop, end = largest(self.signal), self.step == args.steps
                if on_sample and rank() == 0 and (self.step % args.sample_every == 0 or end):
                    on_sample(self.step)        # before the checkpoint: a run that is killed here draws it once more
                if self.step % args.save_every == 0 or end or stop:
                    self.save()
                if stop:
                    raise SystemExit(128 + stop)


DROPPED = {1: "the generator", 2: "the discriminator", 3: "generator and discriminator"}


class Stopped(Exception):
    """A run cannot go on: ten steps in a row were dropped, or nothing more can be written."""


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def largest(number):
    """The largest of the processes' numbers, which all of them wait for: so they stop at the same step. By way of the
    CPU: no GPU waits."""
    value = torch.tensor(number)
    if dist.is_initialized():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def note(text):
    if rank() == 0:
        print(text, file=sys.stderr)


# -- adapter training -------------------------------------------------------------------------------------------------


def build(args):
    """-> model, discriminator, judges {part: state dict} as the flags ask for them, on the device."""
    device, preset, classes = torch.device(args.device), PRESETS[args.preset], class_table(args.data)
    dtype = torch.bfloat16 if device.type == "cuda" and args.adapter != "freestyle" else torch.float32
    meta, init = read_adapter(args.init) if args.init else ({}, {})
    for key, flag in (("adapter", args.adapter), ("preset", args.preset)):
        if meta.get(key, flag) != flag:
            raise InputError(f"{args.init}: is of {key} {meta[key]}, not {flag}: train it with --{key} {meta[key]}")
    unet, vae, text, parts = load_frozen(args.preset, args.sd, device, dtype)
    table = init.get("layout", {}).get("table") if tuple(meta.get("names") or ()) == classes.names else None
    if args.class_embeddings:
        table = load_class_embeddings(args.class_embeddings, classes, text)
    torch.manual_seed(args.seed)
    model = ALDM(preset, unet, vae, text, classes, args.adapter, meta.get("hint", args.hint), table).to(device)
    if args.init:
        load_into(model.adapter, init["adapter"], args.init, device, torch.float32)
    discriminator = UperNet(len(classes.names) + 1, **preset.segmenter, normalize=args.data == "ade20k")
    start = args.segmenter or init.get("segmenter") or parts.get("segmenter")
    if start:
        load_segmenter(start, discriminator, classes)
    elif args.discriminator != "none":
        note("the discriminator starts at random; a pretrained one trains more stably (--segmenter ENCODER DECODER)")
    return *fast(model, discriminator.to(device), args), parts


def fast(model, discriminator, args):
    """What changes a step's speed and memory, but neither values nor weights and their names: the memory format that
    convolutions like (on a CPU those of the UNet gain nothing by it), --recompute and --compile. These go block by block:
    only one block's activations are anew in memory at a time, and blocks of a kind and shape share their compiled code."""
    for part in (model.vae if args.device == "cpu" else model, discriminator):
        part.to(memory_format=torch.channels_last)
    for module in model.modules() if args.recompute else ():        # (not D's: its batch norms would count twice)
        if isinstance(module, (ResBlock, SpatialTransformer, ResnetBlock)):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
    if args.compile:
        torch._dynamo.config.recompile_limit = 256                  # shapes, modes and gradients differ by block
        for module in [*model.modules(), *discriminator.modules()]:
            if isinstance(module, (ResBlock, SpatialTransformer, ResnetBlock, Bottleneck)):
                module.compile(dynamic=False)
    return model, discriminator.eval().requires_grad_(False)


def train(args):
    """The main job: train an adapter with adversarial supervision."""
    dataset = open_dataset(args.data, args.root, "train", args.size, captions=args.captions,
                           grid=PRESETS[args.preset].vae.factor, skip_broken=args.skip_broken)
    model, discriminator, parts = build(args)
    shown = [dataset[i] for i in range(min(6, len(dataset)))]
    trained = [p for p in model.adapter.parameters() if p.requires_grad]
    opt_g = torch.optim.AdamW(trained, lr=args.lr, fused=True)
    opt_d = torch.optim.AdamW(discriminator.parameters(), lr=args.lr_d, weight_decay=0.005, fused=True)
    meta = dict(preset=args.preset, dataset=model.classes.key, names=list(model.classes.names),
                palette=model.classes.palette.tolist(), adapter=args.adapter, hint=model.layout.kind)
    if args.cache:
        dataset = Cache(args.cache, dataset, model)
    run = Run(args, {"adapter": model.adapter, "layout": model.layout, "discriminator": discriminator,
                     "opt_g": opt_g, "opt_d": opt_d}, meta)
    stream = batches(dataset, args.batch * args.accumulate, args.seed, run.step, args.workers, rank(), world())

    def step_fn(step):
        items = next(stream)
        for group in opt_g.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / args.warmup)
        for group in opt_d.param_groups:
            group["lr"] = args.lr_d * one_cycle(step / args.steps)
        micro = [prepare(model, items, slice(i, i + args.batch)) for i in range(0, len(items["label"]), args.batch)]
        return train_step(model, discriminator, opt_g, opt_d, micro, step, args)

    def on_sample(step):
        save_pictures(run.out / f"step_{step:07d}.png", model, discriminator, shown, args)
        save_adapter(run.out / "adapter.safetensors", model, {**meta, "step": step})

    before = judged(model, parts, args) if run.step == 0 and args.before else None
    began, first = time.time(), run.step
    run.loop(step_fn, on_sample)
    steps = run.step - first                                        # fewer than all if it was resumed
    seconds = (time.time() - began) * run.step / steps if steps else None
    if after := judged(model, parts, args):
        print_table(before, after, seconds)
        with atomic(run.out / "judged.json") as temporary:
            Path(temporary).write_text(json.dumps({**after, "seconds": seconds, "before": before}, indent=1))


def judged(model, parts, args):
    """What the toy's judges say of images generated for layouts that no training has seen; None without judges."""
    if "judge" not in parts or not args.eval or rank():
        return None
    judge = UperNet(len(model.classes.names), **JUDGE)
    domain = Classifier(len(DOMAINS))
    for net, name in ((judge, "judge"), (domain, "domain")):
        load_into(net, parts[name], name, model.device, torch.float32)
        net.eval()
    toy = Toy("val", ("day",), length=args.eval, augment=False)
    return evaluate(model, [toy[i] for i in range(len(toy))], judge, domain, n=2, batch=16, steps=args.ddim_steps)


FIGURES = {"mIoU": lambda r: r["mIoU_generated"],
           **{c: lambda r, c=c: r["IoU_generated"][c] for c in ("pole", "traffic sign", "person", "car")},
           "domain accuracy": lambda r: r["editability"], "Frechet distance": lambda r: r["frechet_distance"],
           "diversity": lambda r: r["diversity"], "seconds": lambda r: r["seconds"]}


def print_table(before, after, seconds):
    print(f"{'':16}{'before':>8}{'after':>8}")
    show = lambda v: f"{v:8.3f}" if v is not None else f"{'-':>8}"
    for i, name in enumerate(list(FIGURES)[:-1]):
        a, b = (FIGURES[name](r) if r else None for r in (before, after))
        print(f"{name:16}{show(a)}{show(b)}  {'#' * round(40 * (b or 0)) if i < 6 else ''}")         # shares have bars
    if seconds:
        print(f"trained in {seconds:.0f} s")


# -- the paper's tables in small --------------------------------------------------------------------------------------

NOISE = "--discriminator none"
REPORTS = {         # --report NAME: the rows of a table, each by its flags; "" is ALDM with the toy's defaults
    "main": [NOISE, f"{NOISE} --lr 1e-3 --steps 600", f"--adapter controlnet {NOISE} --lr 2e-3 --steps 500", ""],
    "unrolling": [NOISE, "--unroll 0", "", "--unroll-grad each", "--unroll-grad full", "--unroll 9"],
    "discriminator": ["", "--discriminator frozen", NOISE],
    "lambda": ["--lambda-adv 1", "", "--lambda-adv 16", "--t-max 500", "--t-max 750"],
    "adapters": [f"--adapter {adapter} {flags}" for adapter in ("controlnet", "t2i", "oft", "freestyle")
                 for flags in (NOISE, "--unroll 0", "--unroll 3")]}


def report(args):
    """--report NAME: each row of REPORTS with each of the seeds, as runs of their own (those that are finished are kept,
    also between reports), then the judges' figures: mean and standard deviation over the seeds."""
    rest, out, words, own = [], Path(args.out), iter(sys.argv[1:]), ("--report", "--seeds", "--jobs", "--out")
    for word in words:
        if word in own:
            next(words)
        elif word.partition("=")[0] not in own:
            rest.append(word)
    env = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}

    def run(job):
        flags, seed = job
        folder = out / (re.sub(r"\W+", "-", " ".join([flags, *rest])).strip("-") + f"-seed-{seed}")
        if not (folder / "judged.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, __file__, *rest, *flags.split(), "--seed", str(seed), "--no-before", "--resume",
                       "--out", str(folder)]
            with open(folder / "output.txt", "w") as output:
                if subprocess.run(command, env=env, stdout=output, stderr=output).returncode:
                    raise InputError(f"{' '.join(command)}: failed; see {output.name}")
        return json.loads((folder / "judged.json").read_text())

    jobs = [(flags, seed) for flags in REPORTS[args.report] for seed in range(args.seeds)]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(tqdm(pool.map(run, jobs), args.report, len(jobs)))
    print(f"| `train.py` ... | {' | '.join(FIGURES)} |\n|---|{'---|' * len(FIGURES)}")
    for flags in REPORTS[args.report]:
        own = [result for job, result in zip(jobs, results) if job[0] == flags]
        cells = []
        for get in FIGURES.values():
            values = np.array([get(result) for result in own], float)
            digits = 0 if values.mean() > 10 else 3
            cells.append(f"{values.mean():.{digits}f} ± {values.std(ddof=len(values) > 1):.{digits}f}")
        print(f"| `{flags or '(the defaults)'}` | {' | '.join(cells)} |")


@torch.no_grad()
def prepare(model, items, part):
    """What a step needs of a (micro) batch: label [B,H,W], x0 [B,4,h,w] (a draw from the encoder), context [B,77,C]."""
    move = lambda x: x[part].to(model.device, non_blocking=True)
    if "moments" in items:                                          # from a Cache
        mean, logvar = move(items["moments"]).float().chunk(2, dim=1)
        x0 = (mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)) * model.vae.cfg.scale
        return {"label": move(items["label"]).long(), "x0": x0, "context": move(items["context"]).float()}
    return {"label": move(items["label"]), "x0": model.vae.encode(move(items["image"]), sample=True),
            "context": model.text.encode(items["caption"][part])}


class Cache(torch.utils.data.Dataset):
    """--cache DIR: a file per image with what the frozen parts make of it, so that a step touches neither JPEG nor VAE
    encoder nor text encoder: the latent's mean and log-variance of the whole resized image and of its mirror image
    (fp16), the labels, the caption's states. A random crop is cut from the latents: its offsets are multiples of the
    VAE's factor. What that costs: latents at the crop's border have seen the pixels beyond it."""

    def __init__(self, folder, dataset, model):
        self.folder, self.dataset, self.factor = Path(folder), dataset, model.vae.cfg.factor
        self.names, self.size = dataset.names, dataset.size
        weights = sum(p.double().abs().sum().item() for p in [*model.vae.parameters(), *model.text.parameters()])
        names = zlib.crc32(json.dumps([self.names, dataset.captions]).encode())
        mark = json.dumps({"images": len(dataset), "names and captions": names, "size": self.size,
                           "weights": f"{weights:.6e}"})
        self.folder.mkdir(parents=True, exist_ok=True)
        sign = self.folder / "cache.json"
        if sign.exists() and sign.read_text() != mark:
            raise InputError(f"--cache {folder}: is of {sign.read_text()}, not of {mark}: choose another folder")
        with atomic(sign) as temporary:
            temporary.write_text(mark)
        for i in tqdm(range(rank(), len(dataset), world()), desc="cache", disable=rank() > 0, mininterval=1):
            if not self.file(i).exists():
                self.write(i, model)
        if dist.is_initialized():
            dist.barrier()

    def file(self, index):
        return self.folder / f"{index:08d}.safetensors"

    @torch.no_grad()
    def write(self, index, model):
        image, label = self.dataset.full(index)
        both = torch.stack([image, image.flip(-1)]).to(model.device)
        moments = torch.cat(model.vae.moments(both), dim=1).contiguous()        # [2 (as it is, mirrored), 2z, h, w]
        context = model.text.encode([self.dataset[index]["caption"]])[0]
        with atomic(self.file(index)) as temporary:
            save_file({"moments": moments.half().cpu(), "label": label.byte(), "context": context.half().cpu()},
                      temporary)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        index, seed = key
        flip, top, left = self.dataset.window(index, seed)
        f, size = self.factor, self.size
        with safe_open(self.file(index), "pt") as file:
            label = file.get_tensor("label")
            y, x = top // f, left // f
            moments = file.get_slice("moments")[int(flip), :, y:y + size // f, x:x + size // f]
            context = file.get_tensor("context")
        label = (label.flip(-1) if flip else label)[top:top + size, left:left + size]
        return {"moments": moments, "label": label, "context": context, "index": index}


@torch.no_grad()
def save_pictures(path, model, discriminator, items, args):
    """A row per layout: layout | real image | generated | x0_hat at t = 401 as D sees it | D's segmentation of that."""
    label = torch.stack([item["label"] for item in items]).to(model.device)
    captions = [item["caption"] for item in items]
    samples = generate(model, label, captions, seeds=range(len(items)), steps=args.ddim_steps)
    with autocast(args):
        image = torch.stack([item["image"] for item in items]).to(model.device)
        x0, t = model.vae.encode(image), torch.full((len(items),), 401, device=model.device)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0)
        x_t = model.schedule.add_noise(x0, t, noise)
        eps = model.eps(x_t, t, captions, label)
        seen = model.vae.decode(model.schedule.predict_x0(x_t, t, eps)).float().clamp(-1, 1)
        found = discriminator(seen).argmax(1)
    found = found.where(found < len(model.classes.names), 255)      # "fake" is shown black
    pixels = lambda x: ((x.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().cpu().numpy()
    paint = lambda y: [np.asarray(colorize(one, model.classes)) for one in y.cpu()]
    columns = [paint(label), pixels(image), samples, pixels(seen), paint(found)]
    with atomic(path) as temporary:
        grid(list(zip(*columns))).save(temporary, format="png")


# -- the toy world's Stable Diffusion ---------------------------------------------------------------------------------
# `--stage vae`, `--stage base` and `--stage judge` make what assets/toy.safetensors holds, each from the one before.


def cosine(step, steps, warmup=100):
    return min(1, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2


def stage_run(args, modules, step_loss, columns):
    """A plain training of `modules`, step_loss(step) -> loss, {name: scalar}: AdamW, cosine decay, clipped norm."""
    opt = torch.optim.AdamW([p for m in modules.values() for p in m.parameters()], lr=args.lr, betas=(0.9, 0.99),
                            weight_decay=0.01, fused=True)
    args.columns = [*columns, "dropped"]

    def step_fn(step):
        for group in opt.param_groups:
            group["lr"] = args.lr * cosine(step, args.steps)
        with autocast(args):
            loss, losses = step_loss(step)
        loss.backward()
        losses = {name: value.detach() for name, value in losses.items()}
        return {**losses, "dropped": update(opt, losses, clip=1.0)}

    Run(args, {**modules, "opt": opt}, {"stage": args.stage}).loop(step_fn)


def toy_pixels(toy, index, device):
    """-> image [B,3,64,64] in [-1,1]"""
    return from_pixels(toy.images[index], device).contiguous(memory_format=torch.channels_last)


def stage_vae(args):
    """The autoencoder, on all domains: L1, weighted by local contrast (small objects live by their edges), and a small
    KL term. Its latents are brought to zero mean and, as a whole, unit variance at the end: like those of Stable
    Diffusion they keep a spectrum, in which the large and bright outlives more noise than the fine."""
    torch.manual_seed(args.seed)
    toy, vae = Toy("train", DOMAINS, length=args.scenes), VAE(PRESETS["toy"].vae)
    linear_start(vae, toy_pixels(toy, slice(0, 500), "cpu"))
    vae.to(args.device, memory_format=torch.channels_last)

    def step_loss(step):
        x = toy_pixels(toy, torch.randint(0, len(toy), (args.batch,)).numpy(), args.device)
        mean, logvar = vae.moments(x)
        error = vae.decode(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)) - x
        contrast = (x - F.avg_pool2d(F.pad(x, (3, 3, 3, 3), mode="reflect"), 7, 1)).abs().mean(1, keepdim=True)
        weight = 1 + 8 * contrast
        l1 = (weight / weight.mean() * error.abs()).mean()
        kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
        return l1 + 1e-5 * kl, {"l1": l1, "kl": kl, "mse": (error ** 2).mean()}

    stage_run(args, {"vae": vae}, step_loss, ["l1", "kl", "mse"])
    normalize_latents(vae, toy_pixels(toy, slice(0, 2000), args.device))
    write_base(args, {"vae": vae})


@torch.no_grad()
def linear_start(vae, image):
    """Start as the best linear autoencoder, the patches' principal components, which plain training takes long to find.

    It passes silu as pairs (x, -x), since silu(x) - silu(-x) = x; residual branches start at 0; a pair of large constants
    keeps the statistics of the last group norm, and so its gain, nearly the same for all images.
    """
    z, patches = vae.cfg.z_channels, F.pixel_unshuffle(image, vae.cfg.patch)
    x = patches.permute(0, 2, 3, 1).flatten(0, 2)                   # [n, 3 patch^2]
    m = x.mean(0)
    V = torch.linalg.eigh((x - m).double().T @ (x - m).double())[1].flip(1)[:, :z].float()
    s, eye, const = ((x - m) @ V).std(), torch.eye(z), torch.tensor([6.0, -6.0])
    for name, module in vae.named_modules():
        if name.endswith(("conv2", "proj_out")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)

    def linear(conv, rows, weight, bias):                           # 1x1, within what may be a 3x3 convolution
        conv.weight[:rows], conv.bias[:rows] = 0, bias
        conv.weight[:rows, :weight.shape[1], conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] = weight

    def into_pairs(conv, weight, bias):
        rows = torch.cat([weight, -weight, torch.zeros(2, weight.shape[1])])
        linear(conv, len(rows), rows, torch.cat([bias, -bias, const]))

    def gain(net, x):                                               # undoes the norm's division
        seen = []
        hook = net.norm_out.register_forward_pre_hook(lambda module, x: seen.append(x[0]))
        net(x)
        hook.remove()
        net.norm_out.weight.fill_(seen[0].std((1, 2, 3)).mean())

    encoder, decoder = vae.encoder, vae.decoder
    into_pairs(encoder.conv_in, V.T / s, -m @ V / s)
    linear(encoder.conv_out, 2 * z, torch.cat([torch.cat([eye, -eye], 1), torch.zeros(z, 2 * z)]), torch.zeros(2 * z))
    linear(vae.quant_conv, 2 * z, torch.eye(2 * z), torch.cat([torch.zeros(z), torch.full((z,), -6.0)]))
    linear(vae.post_quant_conv, z, eye, torch.zeros(z))
    into_pairs(decoder.conv_in, eye, torch.zeros(z))
    linear(decoder.conv_out, len(m), torch.cat([V * s, -V * s], 1), m)
    gain(encoder, patches[:100])
    gain(decoder, vae.moments(image[:100])[0])


@torch.no_grad()
def normalize_latents(vae, image):
    """Fold the latents' mean and overall standard deviation into the convolutions beside them: z' = (z - m) / s."""
    z = torch.cat([vae.moments(x)[0] for x in image.split(100)])
    m, c = z.mean((0, 2, 3)), z.shape[1]
    s = (z - m[:, None, None]).std()
    inner, outer = vae.quant_conv, vae.post_quant_conv
    inner.weight[:c] /= s
    inner.bias[:c] = (inner.bias[:c] - m) / s
    inner.bias[c:] -= 2 * s.log()                                   # the log-variances
    outer.bias += outer.weight[:, :, 0, 0] @ m
    outer.weight *= s


def stage_base(args):
    """Text-to-image: the UNet and the text tower, on all domains, without layouts. One caption in ten is empty (for
    guidance), one in seven names a class ("A photo of car"), so that class embeddings mean something."""
    device, vae, path = torch.device(args.device), VAE(PRESETS["toy"].vae), args.sd or base_file("toy")
    load_into(vae, load_weights(path).get("vae", {}), f"{path}: vae", device, torch.float32)
    toy = Toy("train", DOMAINS, length=args.scenes)
    torch.manual_seed(args.seed)
    text, unet = TextEncoder(**PRESETS["toy"].text).to(device), UNet(PRESETS["toy"].unet).to(device)
    unet.to(memory_format=torch.channels_last)
    names = class_table("toy").names
    ids = text.tokenize(list(toy.captions.values()) + [f"A photo of {name}" for name in names] + [""]).to(device)
    present = torch.stack([torch.from_numpy((toy.labels == c).any((1, 2))) for c in range(len(names))], 1).float()
    with torch.no_grad():
        moments = torch.cat([torch.cat(vae.moments(toy_pixels(toy, slice(i, i + 100), device)), 1).half()
                             for i in tqdm(range(0, len(toy), 100), desc="latents")])
    ema, schedule = torch.nn.ModuleList([text, unet]), Schedule().to(device)
    average_model = copy.deepcopy(ema)

    def step_loss(step):
        index = torch.randint(0, len(toy), (args.batch,))
        mean, logvar = moments[index.to(device)].float().chunk(2, 1)
        x0 = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        choice = torch.rand(args.batch)
        words = index.where(choice > 0.25, len(toy) + present[index].multinomial(1)[:, 0])
        words = words.where(choice > 0.1, len(ids) - 1)
        t = (torch.arange(args.batch) + torch.rand(1)) * 1000 / args.batch      # spread over all t: less noisy gradients
        noise, t = torch.randn_like(x0), t.long().to(device)
        loss = F.mse_loss(unet(schedule.add_noise(x0, t, noise), t, text(ids[words.to(device)])), noise)
        with torch.no_grad():
            rate = min(0.9995, (step + 1) / (step + 10))
            torch._foreach_lerp_([*average_model.parameters()], [*ema.parameters()], 1 - rate)
        return loss, {"noise": loss}

    modules = {"text": text, "unet": unet, "ema": average_model}
    stage_run(args, modules, step_loss, ["noise"])
    write_base(args, {"text": average_model[0], "unet": average_model[1]}, ids.unique())


def stage_judge(args):
    """The segmenter that the discriminator starts from (clear days only), and the judges that no training sees: another
    segmenter, at full resolution and on all domains, and a classifier of the domain."""
    device, classes = torch.device(args.device), class_table("toy")
    torch.manual_seed(args.seed)
    nets = {"segmenter": UperNet(len(classes.names), **PRESETS["toy"].segmenter),
            "judge": UperNet(len(classes.names), **JUDGE), "domain": Classifier(len(DOMAINS))}
    nets = {name: net.to(device, memory_format=torch.channels_last).train() for name, net in nets.items()}
    days, all_domains = Toy("train", ("day",), length=args.scenes // 5), Toy("train", DOMAINS, length=args.scenes)

    def step_loss(step):
        day, index = (torch.randint(0, len(toy), (args.batch,)).numpy() for toy in (days, all_domains))
        image = toy_pixels(all_domains, index, device)
        truth = lambda toy, i: torch.from_numpy(toy.labels[i]).long().to(device)
        segment = lambda net, x, toy, i: F.cross_entropy(net(x).float(), truth(toy, i), ignore_index=255)
        losses = {"segmenter": segment(nets["segmenter"], toy_pixels(days, day, device), days, day),
                  "judge": segment(nets["judge"], image, all_domains, index),
                  "domain": F.cross_entropy(nets["domain"](image).float(),
                                            torch.from_numpy(index % len(DOMAINS)).to(device))}
        return sum(losses.values()), losses

    stage_run(args, nets, step_loss, list(nets))
    write_base(args, nets)


def write_base(args, parts, token_ids=None):
    """Put these parts into the base file, beside what other stages have put there."""
    path = Path(args.sd or base_file("toy"))
    old = load_weights(path) if path.exists() else {}
    if rank() == 0:
        save_base(path, {**old, **parts}, token_ids)
    note(f"{path}: {', '.join(parts)} written, {path.stat().st_size / 1e6:.1f} MB")


# -- what it costs ----------------------------------------------------------------------------------------------------


def measure(fn, device, repeat):
    """-> FLOPs by count, median seconds (CUDA events, or the clock on a CPU) of fn()."""
    with FlopCounterMode(display=False) as counter:
        fn()
    seconds = []
    for _ in range(repeat):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            fn()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            fn()
            seconds.append(time.perf_counter() - began)
    return counter.get_total_flops(), sorted(seconds)[len(seconds) // 2]


def loading(args, model):
    """Images per second from disk to what a step takes, without and with --cache; nothing where the data is not named."""
    if args.data != "toy" and not args.root and not Path(args.data).is_dir():
        return
    dataset = open_dataset(args.data, args.root, "train", args.size, captions=args.captions,
                           grid=model.preset.vae.factor, skip_broken=args.skip_broken)
    dataset.names = dataset.names[:max(4 * args.batch, 16)]
    with tempfile.TemporaryDirectory() as folder:
        for name, source in (("loading", dataset), ("loading with --cache", Cache(folder, dataset, model))):
            stream, count = batches(source, args.batch, args.seed, workers=args.workers), max(args.repeat, 4)
            prepare(model, next(stream), slice(None))
            began = time.perf_counter()
            for _ in range(count):
                prepare(model, next(stream), slice(None))["x0"].mean().item()
            yield name, count * args.batch / (time.perf_counter() - began)


def bench(args):
    """--bench: each part of a step, and the steps themselves, with random weights and data of the preset's size."""
    device, preset = torch.device(args.device), PRESETS[args.preset]
    classes = class_table(args.data)
    torch.manual_seed(args.seed)
    with device:
        unet, vae, text = UNet(preset.unet), VAE(preset.vae), TextEncoder(**preset.text)
        discriminator = UperNet(len(classes.names) + 1, **preset.segmenter).eval()
    if device.type == "cuda" and args.adapter != "freestyle":
        unet.bfloat16()
    model = ALDM(preset, unet, vae, text, classes, args.adapter, args.hint).to(device)
    model, discriminator = fast(model, discriminator, args)
    trained = [p for p in model.adapter.parameters() if p.requires_grad]
    opt_g = torch.optim.AdamW(trained, lr=1e-9, fused=True)
    opt_d = torch.optim.AdamW(discriminator.parameters(), lr=1e-9, fused=True)
    B, f, S = args.batch, preset.vae.factor, args.size
    image = torch.rand(B, 3, S, S, device=device) * 2 - 1
    label = torch.randint(0, len(classes.names), (B, S, S), device=device)
    x, t = torch.randn(B, preset.vae.z_channels, S // f, S // f, device=device), torch.full((B,), 401, device=device)
    args.ramp, args.d_start, args.t_max = (0, 1), 0, 1000           # step 8: in the middle of the training

    def rows():
        with torch.no_grad():
            context, layout = model.text.encode(["a street"] * B), model.encode_layout(label)
            yield "text encoder", lambda: model.text.encode(["a street"] * B)
            yield "VAE encoder", lambda: vae.encode(image)
            kw = {k: v for k, v in layout.items() if k in ("features", "mask")}
            words = layout.get("context", context)
            state = unet.encode(x, t, words, **kw)
            yield "UNet, encoder half", lambda: unet.encode(x, t, words, **kw)
            yield "UNet, decoder half", lambda: unet.decode(*state, words, mask=kw.get("mask"))
            yield "layout's hint", lambda: model.encode_layout(label)
            if "hint" in layout:
                yield "adapter", lambda: model.adapter.residuals(x, t, context, layout["hint"])
            yield "VAE decoder", lambda: vae.decode(x)
            yield "segmenter", lambda: discriminator(image)
        through = lambda fn, y: fn(y.detach().requires_grad_()).float().square().mean().backward()
        yield "eps, forward + backward", lambda: model.eps(x, t, context, label).square().mean().backward()
        yield "VAE decoder, forward + backward", lambda: through(vae.decode, x)
        yield "segmenter, forward + backward", lambda: through(discriminator.requires_grad_(False), image)
        batch = [{"label": label, "x0": x, "context": context}]
        for name, step, kind in (("noise step", 9, "trained"), (f"adversarial step, K = {args.unroll}", 8, "frozen"),
                                 ("the same + D step", 8, "trained")):
            args.discriminator, args.lazy = kind, 8
            yield name, lambda step=step: train_step(model, discriminator, opt_g, opt_d, batch, step, args)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    kind = "bf16" if args.bf16 else "fp32"
    print(f"{name}; preset {args.preset}, {S} x {S}, batch {B}, {args.adapter} ({sum(p.numel() for p in trained) / 1e6:.1f} M "
          f"trained parameters), {kind}{', compiled' * args.compile}")
    print(f"{'':34}{'TFLOP':>9}{'ms':>10}{'TFLOP/s':>9}{'GiB peak':>10}")
    took = {}
    for name, fn in rows():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with autocast(args):
            flops, took[name] = measure(fn, device, args.repeat)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else \
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(f"{name:34}{flops / 1e12:9.3f}{took[name] * 1e3:10.1f}{flops / 1e12 / took[name]:9.2f}"
              f"{peak / 2 ** 30:10.2f}", flush=True)
    for name, rate in loading(args, model):
        print(f"{name:34}{rate:9.1f} images per second")
    noise, full = took["noise step"], took["the same + D step"]
    print(f"a lazy period of 8: {7 * noise + full:.3f} s, {(7 * noise + full) / 8:.3f} s a step "
          f"(with --cache; without it add {took['VAE encoder'] + took['text encoder']:.3f} s to each)")


# -- the command line -------------------------------------------------------------------------------------------------

STAGES = {"vae": (stage_vae, dict(steps=6000, batch=16, lr=1e-3)),
          "base": (stage_base, dict(steps=8000, batch=32, lr=1e-3)),
          "judge": (stage_judge, dict(steps=1500, batch=8, lr=2e-3))}


def interval(text):
    first, last = (int(part) for part in text.split(":"))
    if not 0 <= first <= last:
        raise ValueError
    return first, last


interval.__name__ = "interval A:B with whole numbers 0 <= A <= B"


def parse_args(argv=None):
    whole, positive = (lambda low, high=math.inf: number(low, high, int)), number(0, exclusive=True)
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.RawTextHelpFormatter,
                                allow_abbrev=False)

    def add(flag, kind, text, **kw):
        name = flag.lstrip("-").replace("-", "_")
        if name in DEFAULTS:
            text += "\n" + ", ".join(f"{d} {':'.join(map(str, v)) if isinstance(v, tuple) else v}"
                                     for d, v in zip((*DATASETS, "folder"), DEFAULTS[name]))
        elif kw.get("default") not in (None, False):
            text += f" (default {kw['default']})"
        p.add_argument(flag, help=text, **kw, **({"type": kind} if kind else {}))

    add("--data", str, "toy, cityscapes, ade20k, coco, or a folder with images/, labels/, classes.txt", default="toy")
    add("--root", str, "the dataset's folder")
    add("--captions", str, "a JSON, name -> caption (default: captions*.json in --root, else composed of the classes)")
    add("--out", str, "folder of checkpoints, log.csv, pictures and adapter.safetensors (default runs/DATA)")
    add("--preset", str, "size of the networks", choices=list(PRESETS))
    add("--sd", str, "Stable Diffusion 1.x, .safetensors or .ckpt (default: downloaded; toy: assets/toy.safetensors)")
    add("--init", str, "start the adapter from this file: ours, official ALDM, a ControlNet, a T2I-Adapter")
    add("--adapter", str, "what brings the layout in", choices=["controlnet", "t2i", "oft", "freestyle"])
    add("--hint", str, "the ControlNet's hint: ALDM's class embeddings, or colours", choices=["classes", "color"],
        default="classes")
    add("--class-embeddings", str, "the official .pth file (default: computed by the text encoder)")
    add("--segmenter", str, "start the discriminator from mit-semseg's ADE20K files, or from one of ours", nargs="+")
    add("--discriminator", str, "the paper's ablation", choices=["trained", "frozen", "none"], default="trained")
    add("--steps", whole(1), "iterations")
    add("--batch", whole(1), "images per process and micro batch")
    add("--accumulate", whole(1), "micro batches per step", default=1)
    add("--size", whole(16), "side of the training crops, pixels")
    add("--lr", positive, "learning rate of the adapter (AdamW)")
    add("--lr-d", positive, "learning rate of the discriminator (AdamW, one-cycle)")
    add("--warmup", whole(1), "steps until --lr is reached", default=20)
    add("--lambda-adv", number(0), "weight of the adversarial term; 0: the noise loss alone")
    add("--fake-weight", number(0), "weight of the discriminator's fake term")
    add("--ramp", interval, "A:B, the steps in which the adversarial coefficient goes from 0 to 1")
    add("--d-start", whole(0), "the discriminator is trained from this step on")
    add("--lazy", whole(1), "adversarial term and discriminator run every n-th step")
    add("--unroll", whole(0), "K, unrolled DDIM steps")
    add("--unroll-grad", str, "where the gradient flows in them", choices=["first", "each", "full"], default="first")
    add("--ddim-steps", whole(1, 1000), "DDIM subset of the unrolling, and steps of the pictures", default=25)
    add("--t-max", whole(1, 1000), "the adversarial term starts from timesteps below this", default=1000)
    add("--recompute", None, "the networks' blocks anew in the backward pass: less memory", action="store_true")
    add("--group", whole(0), "unrolled estimates decoded in one batch (0: all)", default=0)
    add("--seed", whole(0, 2 ** 32 - 1), "of everything", default=0)
    add("--device", str, "cpu or cuda (default: cuda if there)")
    add("--compile", None, "compile the networks' blocks: slow to start, then faster", action="store_true")
    add("--bf16", None, "bf16 autocast on the CPU as well: faster where it has AMX", action="store_true")
    add("--cache", str, "folder for the images' latents and the captions' states: computed once, used in every epoch")
    add("--skip-broken", None, "go on without the images that the check of the dataset names", action="store_true")
    add("--workers", whole(0), "processes that load images", default=0)
    add("--save-every", whole(1), "steps between checkpoints")
    add("--sample-every", whole(1), "steps between pictures")
    add("--eval", whole(0), "toy layouts judged before and after the training", default=96)
    add("--no-before", None, "judge after the training only", action="store_false", dest="before")
    add("--keep", whole(1), "checkpoints kept, besides every tenth", default=2)
    add("--resume", None, "go on from the newest checkpoint in --out", action="store_true")
    add("--bench", None, "measure the parts of a step at this size, and stop", action="store_true")
    add("--repeat", whole(1), "runs of --bench, of which the median is printed", default=3)
    add("--report", str, "train and judge the rows of a table on the toy (further flags go to each run)",
        choices=list(REPORTS))
    add("--seeds", whole(1), "runs of each row of --report", default=3)
    add("--jobs", whole(1), "runs at a time of --report, each with its share of the cores", default=1)
    add("--stage", str, "make a part of the toy world's base model instead", choices=list(STAGES))
    add("--scenes", whole(100), "toy scenes that --stage trains on", default=20_000)

    p.error = refuse
    return p.parse_args(argv)


def complete(args):
    """Fill in what --data implies, and check what argparse cannot."""
    if args.bench and args.preset == "sd15" and args.data == "toy":
        args.data = "cityscapes"                                    # of which --bench takes the classes alone
    column = DATASETS.index(args.data) if args.data in DATASETS else len(DATASETS)
    if args.preset == "toy":
        args.size = args.size or PRESETS["toy"].size
    if args.init:
        args.adapter = args.adapter or read_adapter(args.init)[0]["adapter"]
    for name, values in DEFAULTS.items():
        if args.stage and name in STAGES[args.stage][1]:
            values = [STAGES[args.stage][1][name]] * 5
        if getattr(args, name) is None:
            setattr(args, name, values[column])
    args.out = args.out or f"runs/{args.stage or (args.report and 'report') or Path(args.data).name}"
    args.device = pick_device(args.device)
    if args.device == "cpu":
        keep_memory()
        torch.backends.cuda.enable_flash_sdp(not args.bf16)     # on the CPU its backward pass is slow in bf16
    args.bf16 = args.bf16 or args.device != "cpu"
    args.columns = ["noise", "adv", "D_real", "D_fake", "dropped"]
    if args.unroll >= args.ddim_steps:
        raise InputError(f"--unroll {args.unroll}: must be below --ddim-steps {args.ddim_steps}, the chain's length")
    if args.data == "toy" and args.size != 64:
        raise InputError(f"--size {args.size}: the toy world is 64x64")
    if args.size % PRESETS[args.preset].multiple:
        raise InputError(f"--size {args.size}: preset {args.preset} takes multiples of {PRESETS[args.preset].multiple}")
    return args


def main():
    try:
        args = complete(parse_args())
        if "RANK" in os.environ:                                    # started by torchrun
            dist.init_process_group("gloo" if args.device == "cpu" else "cpu:gloo,cuda:nccl")
            if args.device != "cpu":
                args.device = f"cuda:{os.environ['LOCAL_RANK']}"
                torch.cuda.set_device(args.device)
        (STAGES[args.stage][0] if args.stage else report if args.report else bench if args.bench else train)(args)
    except (InputError, Stopped, OSError, SafetensorError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, Stopped) else 2)


if __name__ == "__main__":
    main()

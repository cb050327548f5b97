"""Train ALDM. `train_step` is the paper's algorithm (Sec. 3, Fig. 2), `train` the loop around it.

    python train.py                                              the toy world: a CPU, minutes
    python train.py --data cityscapes --root DIR                 Stable Diffusion 1.5 on a GPU
    torchrun --nproc-per-node 2 train.py --data cityscapes ...   several GPUs
"""
import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of the slow imports below
    # Idle OpenMP threads sleep instead of spinning, which would slow down every other program.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import argparse
import json
import math
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from aldm import (ADAPTERS, ALDM, OFFICIAL, PRESETS, Schedule, count_outputs,
                  load_class_embeddings, load_frozen, load_into, load_segmenter, pick_device,
                  read_adapter, save_adapter, unrolled_adversarial_loss)
from data import ASSETS, IGNORE, InputError, batches, class_table, colorize, open_dataset
from discriminator import Bottleneck, UperNet, confusion_matrix, discriminator_loss, mean_iou
from sample import draw_judged, from_pixels, generate, to_pixels
from tools.command import number, whole
from tools.files import refuse, write_png, write_text
from tools.judge import judge_folder, toy_judges
from tools.pictures import draw_curves, grid
from tools.run import (Run, average, largest, note, rank, read_json, refuse_second_run, run_command,
                       start_processes, world)
from tools.weight_files import read_file, save_tensors
from unet import ResBlock, SpatialTransformer
from vae import ResnetBlock

# The settings of each data set. A flag of the same name, where there is one, overrides a setting.
# Those of Cityscapes and ADE20K are the official training's, except for `judged`. COCO-Stuff, for
# which there is no official script, has ADE20K's; a folder of one's own has Cityscapes'; --preset
# toy has the toy's.
CITYSCAPES = dict(
    preset="sd15",          # size of the networks
    size=512,               # side of the crops, pixels
    steps=120_000,
    batch=4,                # per process and micro batch
    lr=1e-5,                # the adapter's, AdamW
    warmup=1,               # steps until the adapter's rate is reached
    lr_d=1e-6,              # maximum of D's one-cycle rate, AdamW
    d_warmup=200,           # D's updates until the maximum
    d_cycle=120_000,        # D's updates until 1/1000 of it; None: those of the run
    d_beta1=(0.95, 0.85),   # AdamW's beta1 at the lowest rate and at the maximum
    d_momentum=0.001,       # of D's batch norms, mit-semseg's
    d_start=0,              # step at which D's training begins
    lambda_adv=0.1,         # weight of L_adv
    fake_weight=0.01,       # weight of the fake term in L_Dis
    ramp=(5000, 10_000),    # steps in which lambda_adv grows from 0
    lazy=8,                 # L_adv and D's update every n-th step
    unroll=9,               # K
    judged=1,               # of the K further estimates, how many D sees (official: all)
    unroll_grad="first",    # the estimates that carry gradient
    save_every=1000,
    sample_every=500)
ADE20K = CITYSCAPES | dict(
    steps=200_000, lr=2e-5, d_warmup=24, d_cycle=25_000, d_start=5000, lambda_adv=0.5,
    fake_weight=0.001, ramp=(10_000, 15_000))
TOY = dict(
    preset="toy", size=64, steps=250, batch=16, lr=5e-4, warmup=20, lr_d=1e-4, d_warmup=20,
    d_cycle=None, d_beta1=(0.9, 0.9), d_momentum=0.1, d_start=0, lambda_adv=1.0, fake_weight=0.01,
    ramp=(0, 50), lazy=2, unroll=9, judged=2, unroll_grad="each", save_every=100,
    sample_every=100)
SETTINGS = {"toy": TOY, "cityscapes": CITYSCAPES, "ade20k": ADE20K, "coco": ADE20K}


# -- the paper's algorithm -------------------------------------------------------------------------


def train_step(model, discriminator, opt_g, opt_d, micro_batches, step, args):
    """One iteration: the adapter's update, then, on its turns, the discriminator's, on images that
    the adapter has just made.

    micro_batches  dicts of `prepare`; more than one with --accumulate
    -> {name: scalar}; `dropped` and `D_dropped` are 1 where the adapter's or D's update was left
    out because a loss or gradient was not finite
    """
    weight = args.lambda_adv * ramp(step, *args.ramp)
    is_lazy_turn = step % args.lazy == 0
    d_learns = args.discriminator == "trained" and step >= args.d_start and is_lazy_turn
    is_adversarial = args.discriminator != "none" and weight > 0 and is_lazy_turn

    losses = {}
    fakes = []
    for batch in micro_batches:
        with autocast(args):
            if is_adversarial:
                loss, parts, fake = adversarial_loss(model, discriminator, batch, weight, args)
            elif d_learns:  # before the ramp, D learns alone
                loss, parts, fake = loss_and_fakes(model, batch, args)
            else:
                loss, parts, fake = plain_loss(model, batch)
        (loss / len(micro_batches)).backward()
        add_up(losses, parts, len(micro_batches))
        fakes.append(fake)
    losses["dropped"] = update(opt_g, losses)

    if d_learns:
        losses |= discriminator_step(model, discriminator, opt_d, micro_batches, fakes, args)
    return losses


def plain_loss(model, batch):
    """L_noise at timesteps drawn from all of them -> loss, {name: scalar}, no fakes."""
    noise = torch.randn_like(batch["x0"])
    t = torch.randint(0, 1000, (len(noise),), device=noise.device)
    loss, *_ = noise_loss(model, batch, t, noise)
    return loss, {"noise": loss}, None


def noise_loss(model, batch, t, noise):
    """L_noise = ||eps - eps_theta(x_t, y, t)||^2 (Sec. 3.1) at t [B]; batch: see `prepare`.

    -> loss, and what the adversarial loss continues from: x_t, eps_theta [B,4,h,w] and the encoded
    layout
    """
    x_t = model.schedule.add_noise(batch["x0"], t, noise)
    layout = model.encode_layout(batch["label"])
    eps = model.eps(x_t, t, batch["context"], layout)
    return F.mse_loss(eps, noise), x_t, eps, layout


def adversarial_loss(model, discriminator, batch, weight, args):
    """L = L_noise + lambda_adv * L_adv (Sec. 3.1 and 3.2), `weight` being lambda_adv.

    The chain starts on the DDIM subset, with K of its steps still to go -> loss, {name: scalar},
    fakes [B,3,H,W] for D's update
    """
    noise = torch.randn_like(batch["x0"])
    timesteps = model.schedule.ddim_timesteps(args.ddim_steps)
    start = torch.randint(args.unroll, args.starts_below, (len(noise),), device=noise.device)
    noise_part, x_t, eps, layout = noise_loss(model, batch, timesteps[start], noise)

    shown = torch.randint(0, args.unroll + 1, start.shape, device=start.device)
    judged = draw_judged_steps(args.unroll, args.judged)
    adv, images = unrolled_adversarial_loss(
        model, discriminator, x_t, eps, start, timesteps, batch["label"], batch["context"], layout,
        args.unroll, args.unroll_grad, judged)
    loss = noise_part + weight * adv
    return loss, {"noise": noise_part, "adv": adv}, pick_fakes(images, judged, shown)


def draw_judged_steps(unroll, judged):
    """-> which of the steps 1..K the discriminator sees, a list of `judged` (at most K) of them."""
    if judged >= unroll:
        return list(range(1, unroll + 1))
    return [1 + k for k in torch.randperm(unroll)[:judged].tolist()]


def pick_fakes(images, judged, shown):
    """D's fakes: for each image one of its judged estimates, so that D learns at every t at which
    it judges.

    images {k: [B,3,H,W]}, judged steps, shown [B] in 0..K (evenly drawn) -> [B,3,H,W]
    """
    fakes = images[0]
    for i, k in enumerate(judged):
        is_shown = (shown > 0) & ((shown - 1) % len(judged) == i)
        fakes = torch.where(is_shown.view(-1, 1, 1, 1), images[k], fakes)
    return fakes


def loss_and_fakes(model, batch, args):
    """L_noise at timesteps of the DDIM subset, and the denoised estimates there as D's fakes."""
    noise = torch.randn_like(batch["x0"])
    timesteps = model.schedule.ddim_timesteps(args.ddim_steps)
    start = torch.randint(0, args.ddim_steps, (len(noise),), device=noise.device)
    t = timesteps[start]
    loss, x_t, eps, _ = noise_loss(model, batch, t, noise)
    with torch.no_grad():
        fakes = model.vae.decode(model.schedule.predict_x0(x_t, t, eps)).float().clamp(-1, 1)
    return loss, {"noise": loss}, fakes


def ramp(step, first, last):
    """The adversarial term's coefficient: 0 up to `first`, 1 from `last` on, linear between."""
    return min(max((step - first) / max(last - first, 1), 0.0), 1.0)


def discriminator_step(model, discriminator, opt_d, micro_batches, fakes, args):
    """L_Dis on real images and the adapter's fakes -> {name: scalar}."""
    losses = {}
    buffers = [b.clone() for b in discriminator.buffers()]
    discriminator.train().requires_grad_(True)  # it is frozen in the adapter's step
    for batch, fake in zip(micro_batches, fakes):
        with autocast(args):
            with torch.no_grad():  # decoded latents: else the VAE's artefacts would give fakes away
                real = model.vae.decode(batch["x0"]).float().clamp(-1, 1)
            real_logits, fake_logits = discriminator(torch.cat([real, fake])).chunk(2)
            loss, parts = discriminator_loss(real_logits, fake_logits, batch["label"],
                                             args.fake_weight)
        (loss / len(micro_batches)).backward()
        add_up(losses, {f"D_{name}": value for name, value in parts.items()}, len(micro_batches))
    discriminator.eval().requires_grad_(False)
    dropped = update(opt_d, losses)
    average([b for b in discriminator.buffers() if b.is_floating_point()])
    for b, old in zip(discriminator.buffers(), buffers):  # a dropped update restores these too
        b.copy_(old.where(dropped > 0, b))
    return {**losses, "D_dropped": dropped}


def autocast(args):
    """--precision bf16: convolutions and matrix products in bf16, our losses in fp32."""
    is_bf16 = args.precision == "bf16"
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=is_bf16)


def add_up(losses, parts, n):
    """Add value / n to `losses[name]` for each value, in place."""
    for name, value in parts.items():
        losses[name] = losses.get(name, 0) + value.detach() / n


@torch.no_grad()
def update(optimizer, losses):
    """Average gradients and losses over the processes and step, unless one of them is not finite.

    -> 1.0 where the update was dropped, else 0.0 [scalar]. The CPU does not wait for the GPU here:
    the fused optimisers read `found_inf` themselves.
    """
    grads = [p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None]
    average([*grads, *losses.values()])
    norm = torch.nn.utils.get_total_norm(grads)
    finite = torch.stack([norm, *losses.values()]).isfinite().all()
    optimizer.found_inf = (~finite).float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer.found_inf


def set_rates(opt_g, opt_d, step, args):
    """The learning rates of this step, and D's beta1."""
    opt_g.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / args.warmup)
    if opt_d:
        rate, beta1 = one_cycle(args, step)
        opt_d.param_groups[0] |= {"lr": rate, "betas": (beta1, 0.999)}


def one_cycle(args, step):
    """The discriminator's one-cycle schedule -> learning rate, beta1.

    During D's first --d-warmup updates the rate rises from 1/10 of --lr-d to all of it. Then it
    falls to 1/1000 until update --d-cycle. Both by cosines; beta1 moves the opposite way.
    """
    high, low = args.d_beta1
    updates = max(step - args.d_start, 0) // args.lazy
    length = args.d_cycle or max(args.steps - args.d_start, 0) // args.lazy
    if updates < args.d_warmup:
        done = updates / args.d_warmup
        return args.lr_d * cosine(0.1, 1, done), cosine(high, low, done)
    done = (updates - args.d_warmup) / max(length - args.d_warmup, 1)
    return args.lr_d * cosine(1, 1e-3, done), cosine(low, high, done)


def cosine(a, b, fraction):
    """Half a cosine from a (fraction 0) to b (fraction 1 or more)."""
    return b + (a - b) * (1 + math.cos(math.pi * min(fraction, 1))) / 2


# -- the loop --------------------------------------------------------------------------------------


def train(args):
    """Train an adapter, by default with adversarial supervision; judge it before and after."""
    dataset = load_dataset(args, "train")
    note(dataset.description)
    if dataset.only_void:
        raise InputError(f"{args.data}: all training layouts are void; nothing can be learned")
    args.images, args.processes = len(dataset), world()
    model, discriminator, base, meta = build(args)
    meta["coding"] = dataset.coding
    judges = None
    if args.eval and rank() == 0:
        judges = toy_judges(base, model.classes, model.device)
    shown = [dataset[i] for i in range(min(6, len(dataset)))]
    if args.cache:
        dataset = Cache(args.cache, dataset, model)
    opt_g, opt_d = optimizers(model, discriminator, args)
    state = {"adapter": model.adapter, "layout": model.layout, "opt_g": opt_g}
    if discriminator:
        state |= {"discriminator": discriminator, "opt_d": opt_d}

    with Run(args, state, meta, COLUMNS) as run:
        if run.first:
            export_adapter(args, model, meta, run.first)  # a kill may have prevented it
        before = judge_start(run, model, judges, args)
        note(f"training; every {args.sample_every} steps a picture: {run.out}/step_*.png")
        stream = batches(dataset, args.batch * args.accumulate, args.seed, run.first, args.workers,
                         rank(), world(), pin=args.device != "cpu")
        for step in run:
            items = run.next(stream)
            micro_batches = [prepare(model, part) for part in split_items(items, args.batch)]
            set_rates(opt_g, opt_d, step, args)
            losses = train_step(model, discriminator, opt_g, opt_d, micro_batches, step, args)
            if run.due(args.sample_every):
                losses |= save_pictures(args, model, discriminator, shown, run.done + 1)
            run.log(losses)
            if run.saved:
                export_adapter(args, model, meta, run.done)
        finish(run, model, judges, before, args)


COLUMNS = ["noise", "adv", "D_real", "D_fake", "D_caught", "D_mIoU", "dropped", "D_dropped"]


def load_dataset(args, split, augment=True):
    """A split of --data as the flags ask for it; see data.open_dataset."""
    return open_dataset(args.data, args.root, split, args.size, augment=augment,
                        grid=PRESETS[args.preset].vae.factor, captions=args.captions,
                        skip_broken=args.skip_broken, ids=args.ids)


def build(args):
    """-> model, discriminator (or None), the base file's other parts, the run's meta."""
    classes = class_table(args.data)
    start, init = read_adapter(args.init) if args.init else ({}, {})
    for key in "adapter", "preset", "hint":
        given = getattr(args, key)
        found = start.get(key, given)
        if given and found != given:
            raise InputError(f"--init {args.init}: its {key} is {found}; use --{key} {found}")
    model, base = build_model(args, classes, start, init)
    discriminator = None
    if args.discriminator != "none":
        discriminator = build_discriminator(args, classes, start, init, base).to(args.device)
    make_fast(model, discriminator, args)
    meta = dict(preset=args.preset, dataset=classes.key, names=list(classes.names),
                palette=classes.palette.tolist(), file_ids=classes.file_ids.tolist(),
                void=classes.void.tolist(), adapter=args.adapter, hint=model.layout.hint,
                hint_colors=start.get("hint_colors"),
                normalize=discriminator.normalize if discriminator else None)
    return model, discriminator, base, meta


def build_model(args, classes, start, init):
    """-> the ALDM on --device, its adapter from --init, and the base file's other parts."""
    device = torch.device(args.device)
    trains_unet = args.adapter in ("freestyle", "piti")
    is_half = args.precision == "bf16" and device.type == "cuda" and not trains_unet
    dtype = torch.bfloat16 if is_half else torch.float32
    unet, vae, text, base = load_frozen(args.preset, args.sd, device, dtype, own=init)

    hint = start.get("hint") or args.hint or "classes"
    table = None  # the text encoder's
    if args.class_embeddings:
        if hint == "color" or args.adapter in ("t2i", "freestyle"):
            raise InputError("--class-embeddings: the hint of this adapter has none")
        table = load_class_embeddings(args.class_embeddings, classes, text)
    elif tuple(start.get("names") or ()) == classes.names:
        table = init.get("layout", {}).get("table")
    torch.manual_seed(args.seed)
    model = ALDM(PRESETS[args.preset], unet, vae, text, classes, args.adapter, hint, table,
                 start.get("hint_colors")).to(device)
    if args.init:
        load_into(model.adapter, init["adapter"], args.init)
    if args.finetune:
        unet.requires_grad_(True)
    return model, base


def build_discriminator(args, classes, start, init, base):
    """-> UperNet with N+1 outputs, from --segmenter, else from the --init or base file."""
    discriminator = UperNet(len(classes.names) + 1, **PRESETS[args.preset].segmenter)
    if args.segmenter:
        load_segmenter(args.segmenter, discriminator, classes)
    elif "segmenter" in init:
        load_segmenter(init["segmenter"], discriminator, classes, start)
    elif "segmenter" in base:  # the toy's, or that of an official checkpoint
        outputs = count_outputs(base["segmenter"])
        names = class_table(OFFICIAL.get(outputs, "toy")).names  # other numbers are refused
        load_segmenter(base["segmenter"], discriminator, classes, {"names": names})
    else:
        note("the discriminator starts from random weights; a pretrained one trains more stably: "
             "use --segmenter")
    for module in discriminator.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = args.d_momentum
    return discriminator


def make_fast(model, discriminator, args):
    """What changes speed and memory, but neither values nor names: channels_last (from which the
    UNet gains nothing on a CPU), --recompute and --compile, both block by block."""
    (model.vae if args.device == "cpu" else model).to(memory_format=torch.channels_last)
    modules = [*model.modules()]
    if discriminator:
        discriminator.to(memory_format=torch.channels_last).eval().requires_grad_(False)
        modules += discriminator.modules()
    if args.compile:
        torch._dynamo.config.cache_size_limit = 256  # shapes and gradients differ by block
    blocks = ResBlock, SpatialTransformer, ResnetBlock
    for module in modules:
        if args.compile and isinstance(module, (*blocks, Bottleneck)):
            module.forward = torch.compile(module.forward, dynamic=False)
        if args.recompute and isinstance(module, blocks):  # not D: batch norms would count twice
            module.forward = partial(checkpoint, module.forward, use_reentrant=False,
                                     preserve_rng_state=False)


def optimizers(model, discriminator, args):
    """-> the adapter's, and the discriminator's or None"""
    opt_g = torch.optim.AdamW(model.adapter.parameters(), args.lr, fused=True)
    if discriminator is None:
        return opt_g, None
    return opt_g, torch.optim.AdamW(discriminator.parameters(), args.lr_d, weight_decay=0.005,
                                    fused=True)


def split_items(items, batch):
    """A loaded batch -> micro batches of `batch` items."""
    for i in range(0, len(items["label"]), batch):
        yield {name: values[i:i + batch] for name, values in items.items()}


@torch.no_grad()
def prepare(model, items):
    """Loaded items -> what a step needs: label [B,H,W], x0 [B,4,h,w] (a draw from the encoder's
    Gaussian), context [B,77,C]."""
    on_device = {name: values.to(model.device, non_blocking=True)
                 for name, values in items.items() if torch.is_tensor(values)}
    if "moments" in items:  # from a Cache
        x0 = model.vae.draw(*on_device["moments"].float().chunk(2, dim=1))
        context = on_device["context"].float()
    else:
        x0 = model.vae.encode(on_device["image"], sample=True)
        context = model.text.encode(items["caption"])
    return {"label": on_device["label"].long(), "x0": x0, "context": context}


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def export_adapter(args, model, meta, step):
    """Write adapter.safetensors; at every tenth checkpoint also adapter_0010000, which stays. Skips
    files that were already written at this step."""
    if rank() > 0:
        return
    names = ["adapter"]
    if step % (10 * args.save_every) == 0:
        names.append(f"adapter_{step:07d}")
    for name in names:
        path = Path(args.out) / f"{name}.safetensors"
        if not is_of_step(path, step):
            save_adapter(path, model, {**meta, "step": step}, DTYPES[args.adapter_dtype])


def is_of_step(path, step):
    """Whether a file of ours is whole and was exported at this step."""
    try:
        return read_file(path)[1].get("step") == step
    except InputError:
        return False


@torch.no_grad()
def save_pictures(args, model, discriminator, items, step):
    """step_*.png, a row per layout, and log.csv as curves.png -> {"D_mIoU": how well D segments
    the generated images}, or {} without D."""
    label = torch.stack([item["label"] for item in items]).to(model.device)
    image = torch.stack([item["image"] for item in items]).to(model.device)
    captions = [item["caption"] for item in items]
    N = len(model.classes.names)
    losses = {}
    # Nothing is compiled for the shapes of a few pictures.
    with torch.compiler.set_stance("force_eager"), autocast(args):
        samples = generate(model, label, captions, seeds=range(len(items)), steps=args.ddim_steps,
                           batch=args.batch, precision=args.precision)
        x0 = model.vae.encode(image)
        t = torch.full((len(items),), 401, device=model.device)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0)
        x_t = model.schedule.add_noise(x0, t, noise)
        x0_hat = model.schedule.predict_x0(x_t, t, model.eps(x_t, t, captions, label))
        seen = model.vae.decode(x0_hat).float().clamp(-1, 1)
        columns = {
            "layout": paint(label, model.classes),
            "real": to_pixels(image),
            "generated": samples,
            "x0_hat, t = 401": to_pixels(seen),
        }
        if discriminator:
            found = discriminator(seen).argmax(1)  # fake is painted black
            columns["D's segmentation"] = paint(found.where(found < N, IGNORE), model.classes)
            answer = discriminator(from_pixels(samples, model.device)).argmax(1)
            _, iou = mean_iou(confusion_matrix(answer, label, N + 1))
            losses["D_mIoU"] = iou[:N].nanmean()
    out = Path(args.out)
    rows = list(zip(*columns.values()))
    write_png(out / f"step_{step:07d}.png", grid(rows, titles=list(columns)))
    draw_curves(out / "log.csv", out / "curves.png")
    return losses


def paint(labels, classes):
    return [np.asarray(colorize(label, classes)) for label in labels.cpu()]


# -- before and after ------------------------------------------------------------------------------


def judge(model, judges, args):
    """How well --eval layouts of the validation split are obeyed, and how real the images look ->
    the dict of judge_folder."""
    dataset = load_dataset(args, "val", augment=False)
    with (torch.compiler.set_stance("force_eager"), tempfile.TemporaryDirectory() as folder):
        draw_judged(model, dataset, folder, args.eval, n=2, diverse=16, edits=dataset.edits,
                    batch=16, steps=args.ddim_steps, precision=args.precision)
        return judge_folder(folder, dataset, judges, counted=1, batch=16)


def judge_start(run, model, judges, args):
    """-> what before.json holds: the judgement of the adapter that the run started from."""
    path = run.out / "before.json"
    if run.first:
        return read_json(path)
    if judges is None or not args.before:
        return None
    note(f"judging what the training starts from, on {args.eval} layouts (on a CPU: a minute)")
    before = judge(model, judges, args)
    write_text(path, json.dumps(before, indent=1))
    return before


def finish(run, model, judges, before, args):
    """Judge the trained adapter if there are judges: a table, and judged.json. Then say how to use
    it."""
    path = run.out / "judged.json"
    if not run.did and (judges is None or (read_json(path) or {}).get("step") == args.steps):
        note(f"{run.out}: finished already, nothing is changed")
        return
    if rank() > 0:
        return
    draw_curves(run.out / "log.csv", run.out / "curves.png")  # with the last step's losses
    if judges is not None:
        note(f"judging what has been trained, on {args.eval} layouts")
        after = judge(model, judges, args)
        # extrapolated to the whole training if this process resumed it
        after["seconds"] = run.seconds * args.steps / run.did if run.did else None
        after["step"] = args.steps
        write_text(path, json.dumps({**after, "before": before}, indent=1))
        print_table(before, after)
    adapter = f"--adapter {run.out}" + (f" --sd {args.sd}" if args.sd else "")
    layout = "assets/layout_1.png" if model.classes.key == "toy" else "FILE"
    print(f"\nTry it:\n  python sample.py {adapter} --layout {layout} "
          f'--prompt "a street at night"\n  python tools/paint.py {adapter}')


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
        cells = [f"{v:9.3f}" if isinstance(v, float) else f"{'-':>9}" for v in values]
        print(f"{title:20}" + "".join(cells))


# -- the cache -------------------------------------------------------------------------------------


class Cache(torch.utils.data.Dataset):
    """--cache DIR: a file per image with what the frozen parts make of it, computed once, so that a
    step needs neither image files nor the VAE's encoder nor the text encoder.

    Each file holds the latent's moments of the whole resized image and of its mirror image (fp16),
    the labels, and the states of its captions; a composed caption is that of the whole image.
    Random crops are cut from the latents, whose borders have thus seen what lies beyond. Raises
    InputError if the folder is of other data or weights.
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
        if sign.exists() and sign.read_text(errors="replace") != made_of:
            raise InputError(f"--cache {folder}: made from other images, labels, captions or "
                             "weights; choose another folder")
        if rank() == 0:
            write_text(sign, made_of)
        with torch.compiler.set_stance("force_eager"):  # nothing is compiled for one image's size
            for i in tqdm(range(rank(), len(dataset), world()), "cache", disable=rank() > 0):
                if self.read(i) is None:
                    self.write(i, model)
        largest(0)  # until all have written

    def file(self, index):
        return self.folder / f"{index:08d}.safetensors"

    def read(self, index):
        """-> {name: tensor}, memory-mapped, or None if the file is missing or damaged."""
        try:
            return load_file(self.file(index))
        except (OSError, SafetensorError):
            return None

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
        content = self.read(index)
        if content is None:
            raise InputError(f"{self.file(index)}: vanished or damaged; start again to renew it")
        label = content["label"].flip(-1) if flip else content["label"]
        f, size = self.factor, self.dataset.size
        rows = slice(top // f, (top + size) // f)
        columns = slice(left // f, (left + size) // f)
        context = content["context"]
        return {"moments": content["moments"][int(flip)][:, rows, columns],
                "context": context[seed % len(context)],
                "label": label[top:top + size, left:left + size]}


# -- the command line ------------------------------------------------------------------------------


def interval(text):
    """An argparse type: "A:B" -> (A, B), whole numbers with 0 <= A <= B"""
    first, last = map(int, text.split(":"))
    if not 0 <= first <= last:
        raise ValueError
    return first, last


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults, where there are any."""

    def _get_help_string(self, action):
        if isinstance(action.default, tuple):  # A:B
            return f"{action.help} (default: {':'.join(map(str, action.default))})"
        has_default = not isinstance(action.default, (bool, type(None)))
        return super()._get_help_string(action) if has_default else action.help


def make_parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                formatter_class=HelpFormatter)
    p.error = refuse
    add_data_flags(p.add_argument_group("data, weights and files").add_argument)
    add_method_flags(p.add_argument_group("the method").add_argument)
    add_run_flags(p.add_argument_group("the run").add_argument)
    return p


def add_data_flags(add):
    add("--data", default="toy", help="toy, cityscapes, ade20k, coco, or a folder with images/, "
        "labels/ and classes.txt")
    add("--root", help="the data set's folder")
    add("--captions", help="JSON, name -> caption; by default those in --root, or composed ones")
    add("--ids", choices=["own", "train"], help="the label files hold the data set's own ids, or "
        "train ids; by default their names and contents decide")
    add("--skip-broken", action="store_true", help="read all files first and leave out broken ones")
    add("--out", help="the run's folder; by default runs/DATA")
    add("--preset", choices=list(PRESETS), help="size of the networks")
    add("--sd", help="Stable Diffusion 1.x: one file, or a diffusers folder; by default downloaded "
        "(toy: assets/toy.safetensors)")
    add("--init", help="start the adapter from this file, or none; by default none (toy: a "
        "ControlNet trained with the noise loss)")
    add("--class-embeddings", help="the official .pth; by default computed by the text encoder")
    add("--segmenter", nargs="+", help="start the discriminator from mit-semseg's ADE20K files "
        "(encoder and decoder), or from one of ours")
    add("--size", type=whole(16), help="side of the crops, pixels")
    add("--cache", help="folder for latents and text states, computed once")
    add("--workers", type=whole(0), help="loading processes; by default 4 on CUDA, else 0")


def add_method_flags(add):
    add("--adapter", choices=list(ADAPTERS), help="what brings the layout in; by default --init's, "
        "or a ControlNet")
    add("--hint", choices=["classes", "color"], help="of the ControlNet: ALDM's class embeddings "
        "(the default), or colours")
    add("--finetune", action="store_true", help="of PITI: train the UNet as well")
    add("--discriminator", choices=["trained", "frozen", "none"], default="trained",
        help="none: the noise loss alone")
    add("--lambda-adv", type=number(0), help="weight of L_adv")
    add("--ramp", type=interval, metavar="A:B", help="steps in which that weight grows from 0")
    add("--lazy", type=whole(1), help="L_adv and D's update every n-th step")
    add("--unroll", type=whole(0), help="K, unrolled DDIM steps")
    add("--judged", type=whole(1), help="of the K further estimates, how many D sees, drawn anew "
        "each time; more than K: all")
    add("--unroll-grad", choices=["first", "each", "full"], help="estimates that carry gradient")
    add("--ddim-steps", type=whole(1, 1000), default=25, help="of the unrolled chains' subset, "
        "and of pictures")
    add("--t-max", type=whole(1, 1000), default=1000, help="chains start below this "
        "timestep")
    add("--lr", type=number(0, exclusive=True), help="the adapter's learning rate, AdamW")
    add("--warmup", type=whole(1), help="steps until --lr is reached")
    add("--lr-d", type=number(0, exclusive=True), help="D's maximum learning rate, AdamW")
    add("--d-warmup", type=whole(1), help="D's updates until its rate reaches --lr-d")
    add("--d-cycle", type=whole(1), help="D's updates until its rate is down to 1/1000 of "
        "--lr-d; for the toy by default all of the run's")
    add("--d-momentum", type=number(0, 1), help="momentum of D's batch norms")
    add("--d-start", type=whole(0), help="D is trained from this step on")
    add("--fake-weight", type=number(0), help="weight of the fake term in L_Dis")


def add_run_flags(add):
    add("--steps", type=whole(1), help="iterations")
    add("--batch", type=whole(1), help="images per process and micro batch")
    add("--accumulate", type=whole(1), default=1, help="micro batches per step")
    add("--seed", type=whole(0, 2 ** 32 - 1), default=0, help="of everything random")
    add("--device", help="cpu or cuda; by default cuda if there is one")
    add("--precision", choices=["bf16", "fp32"], help="by default bf16 on CUDA, fp32 on a CPU")
    add("--recompute", action="store_true", help="compute blocks again in the backward pass, which "
        "saves memory")
    add("--compile", action="store_true", help="compile the blocks: slow to start, then faster")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    add("--save-every", type=whole(1), help="steps between checkpoints")
    add("--keep", type=whole(1), default=2, help="number of checkpoints to keep")
    add("--adapter-dtype", choices=list(DTYPES), default="fp16", help="of adapter*.safetensors")
    add("--sample-every", type=whole(1), help="steps between pictures")
    add("--eval", type=whole(0), default=96, help="toy layouts that are judged before and after")
    add("--no-before", action="store_false", dest="before", help="judge after the training only")


def parse_args(argv=None):
    """The flags; the settings of --data are their defaults. Raises InputError."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.error = refuse
    first.add_argument("--data", default="toy")
    first.add_argument("--preset")
    given, _ = first.parse_known_args(argv)
    key = given.data.split(":")[0]
    settings = SETTINGS.get(key, CITYSCAPES)
    if given.preset == "toy":
        settings = TOY
    elif given.preset == "sd15" and key == "toy":
        settings = CITYSCAPES | {"size": 64}
    parser = make_parser()
    parser.set_defaults(**settings)
    args = parser.parse_args(argv)
    if key == "toy":
        is_default = args.adapter in (None, "controlnet") and args.hint != "color"
        if args.init is None and args.preset == "toy" and is_default:
            args.init = str(ASSETS / "toy_controlnet.safetensors")
    args.out = args.out or f"runs/{Path(args.data.replace(':', '-')).resolve().name}"
    args.init = None if args.init == "none" else args.init
    if args.adapter is None:
        args.adapter = read_adapter(args.init)[0]["adapter"] if args.init else "controlnet"
    if args.lambda_adv == 0:
        args.discriminator = "none"
    timesteps = Schedule().ddim_timesteps(args.ddim_steps)
    args.starts_below = int((timesteps < args.t_max).sum())  # index past the last possible start
    check(args)
    return set_device(args)


def set_device(args):
    """Resolve --device, --precision and --workers, in place."""
    args.device = pick_device(args.device)
    on_cpu = args.device == "cpu"
    args.precision = args.precision or ("fp32" if on_cpu else "bf16")
    if args.workers is None:
        args.workers = 0 if on_cpu else 4
    if on_cpu:  # the CPU's flash attention is slow backwards in bf16
        torch.backends.cuda.enable_flash_sdp(args.precision == "fp32")
    return args


def check(args):
    """Raise InputError for flags that contradict each other."""
    if args.discriminator != "none" and args.unroll >= args.starts_below:
        raise InputError(f"--unroll {args.unroll}: must be below the number of DDIM steps below "
                         f"--t-max {args.t_max}, which is {args.starts_below} of --ddim-steps "
                         f"{args.ddim_steps}")
    multiple = PRESETS[args.preset].multiple
    if args.size % multiple:
        raise InputError(f"--size {args.size}: preset {args.preset} needs multiples of {multiple}")
    if args.hint == "color" and args.adapter != "controlnet":
        raise InputError(f"--hint color: only for the ControlNet; {args.adapter} has its own hint")
    if args.finetune and args.adapter != "piti":
        raise InputError(f"--finetune: only for --adapter piti, not {args.adapter}")
    refuse_second_run(args)


def start():
    args = parse_args()
    start_processes(args)
    train(args)


def main():
    run_command("train.py", start)


if __name__ == "__main__":
    main()

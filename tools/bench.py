"""Measure what a training step and an image cost, with random weights: no files are needed.

    python tools/bench.py                             the toy's step
    python tools/bench.py --preset sd15 --size 256 --batch 1
    python tools/bench.py --preset sd15 --sample 512x1024
    python tools/bench.py --preset sd15 --all         all of it on a rented GPU, ten minutes

A step is measured in three compositions on the same networks, in turn: the official one
(`official_step`, whose docstring lists what ours saves), ours (`train.train_step`), and "cached",
ours with `train.py --cache`, which starts from latents and text states. Operations are those of
matrix products, convolutions and attention. Peak memory is that of a process of its own for each
composition: on a CPU all of its memory, on CUDA its tensors.
"""
import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # see train.py
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import argparse
import math
import multiprocessing
import resource
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import train
from aldm import ADAPTERS, ALDM, PRESETS, TextEncoder, pick_device, unrolled_adversarial_loss
from data import ASSETS, IGNORE, InputError, class_table
from discriminator import UperNet, discriminator_loss
from sample import generate
from tools.command import number, whole
from tools.files import refuse
from tools.run import Stopped, run_command
from train import SETTINGS, make_fast, noise_loss, optimizers, prepare, set_device, train_step
from unet import OFT, ResBlock, SpatialTransformer, UNet
from vae import VAE

LAZY = 8  # the adversarial term and D's update take part in every eighth step
STEPS = {"noise step": LAZY + 1, "adversarial step": LAZY}  # numbers of two such steps
PERIOD = f"period of {LAZY} steps"


# -- the two compositions --------------------------------------------------------------------------


def our_step(networks, items, step, args):
    """One iteration of train.py. The chain ends at the last judged step, so how long it is depends
    on the draw; here the steps lie where those of a random draw lie on average."""
    with mock.patch.object(train, "draw_judged_steps", mean_draw):
        train_step(*networks, [prepare(networks[0], items)], step, args)


def mean_draw(unroll, judged):
    """The mean positions of `judged` steps drawn from 1..unroll, rounded: 3, 7 for 2 of 9."""
    judged = min(judged, unroll)
    return [round(j * (unroll + 1) / (judged + 1)) for j in range(1, judged + 1)]


def official_step(networks, items, step, args):
    """One iteration as the official code composes it. Beside it, train.py saves:

    - encoding images and captions anew at every step ("cached")
    - a UNet pass of its own for D's fakes: ours are estimates that the adapter's step has judged
    - decoding and judging all K+1 estimates (--judged)
    - encoding the layout for every estimate: ours once per step
    - weight gradients of the UNet's frozen decoder half   } see Bench.compose
    - computing blocks again in the backward pass          }
    - fp32 throughout (--precision)
    """
    model, discriminator, opt_g, opt_d = networks
    batch = prepare(model, items)
    label, context = batch["label"], batch["context"]
    timesteps = model.schedule.ddim_timesteps(args.ddim_steps)
    is_lazy_turn = step % args.lazy == 0
    if is_lazy_turn:
        official_discriminator_step(networks, batch, timesteps, args)

    start = torch.randint(args.unroll, args.ddim_steps, label.shape[:1], device=label.device)
    noise = torch.randn_like(batch["x0"])
    loss, x_t, eps, _ = noise_loss(model, batch, timesteps[start], noise)
    if is_lazy_turn:
        adv, _ = unrolled_adversarial_loss(model, discriminator, x_t, eps, start, timesteps, label,
                                           context, label, args.unroll, grad="first")
        loss = loss + args.lambda_adv * adv
    loss.backward()
    opt_g.step()
    opt_g.zero_grad()
    model.unet.zero_grad()  # gradients that nobody uses


def official_discriminator_step(networks, batch, timesteps, args):
    """D's update, before the adapter's: fakes at a timestep of their own, from a pass of their own;
    fakes and real images in two passes."""
    model, discriminator, _, opt_d = networks
    start = torch.randint(0, args.ddim_steps, batch["label"].shape[:1], device=model.device)
    t = timesteps[start]
    with torch.no_grad():
        _, x_t, eps, _ = noise_loss(model, batch, t, torch.randn_like(batch["x0"]))
        fake = model.vae.decode(model.schedule.predict_x0(x_t, t, eps)).clamp(-1, 1)
        real = model.vae.decode(batch["x0"]).clamp(-1, 1)
    discriminator.requires_grad_(True)
    loss, _ = discriminator_loss(discriminator(real), discriminator(fake), batch["label"],
                                 args.fake_weight)
    loss.backward()
    opt_d.step()
    opt_d.zero_grad()
    discriminator.requires_grad_(False)


COMPOSITIONS = {"official": official_step, "ours": our_step, "cached": our_step}


def build_model(args):
    """-> an ALDM with random weights."""
    torch.manual_seed(args.seed)
    preset = PRESETS[args.preset]
    with torch.device(args.device):
        unet, vae, text = UNet(preset.unet), VAE(preset.vae), TextEncoder(**preset.text)
    return ALDM(preset, unet, vae, text, class_table("cityscapes"), args.adapter).to(args.device)


class Bench:
    """The compositions, on the same networks and the same batch of random images."""

    def __init__(self, args):
        self.args = set_device(args)
        self.model = build_model(args)
        classes = len(self.model.classes.names)
        self.discriminator = UperNet(classes + 1, **PRESETS[args.preset].segmenter)
        self.discriminator.to(args.device)
        modules = [*self.model.modules(), *self.discriminator.modules()]
        self.plain = {module: module.forward for module in modules}
        make_fast(self.model, self.discriminator, args)  # --compile and --recompute: ours alone
        self.fast = {module: module.forward for module in modules}

        opt_g, opt_d = optimizers(self.model, self.discriminator, args)
        self.networks = self.model, self.discriminator, opt_g, opt_d
        for opt in opt_g, opt_d:  # memory as in a long run: AdamW's moments exist
            for p in opt.param_groups[0]["params"]:
                p.grad = torch.zeros_like(p)
            opt.step()
            opt.zero_grad()

        shape = args.batch, args.size, args.size
        image = torch.rand(args.batch, 3, args.size, args.size) * 2 - 1
        label = torch.randint(0, classes, shape)
        items = {"image": image, "caption": ["a street"] * args.batch, "label": label}
        with torch.no_grad():
            moments = torch.cat(self.model.vae.moments(image.to(args.device)), dim=1)
            context = self.model.text.encode(items["caption"])
        cached = {"moments": moments, "context": context, "label": label}
        self.items = {"official": items, "ours": items, "cached": cached}

        # Frozen weights of the UNet: all, and those behind the place where control enters.
        unet = self.model.unet
        self.frozen = [p for p in unet.parameters() if not p.requires_grad]
        behind = [*unet.output_blocks.parameters(), *unet.out.parameters()]
        self.decoder = [p for p in behind if not p.requires_grad]

    def compose(self, name):
        """Make the networks what they are in one of COMPOSITIONS."""
        is_official = name == "official"
        for module, forward in (self.plain if is_official else self.fast).items():
            if is_official and isinstance(module, (ResBlock, SpatialTransformer)):
                forward = partial(checkpoint, forward, use_reentrant=False)
            module.forward = forward
        on_cuda = self.model.device.type == "cuda"
        is_half = on_cuda and self.args.precision == "bf16" and not is_official
        for p in self.frozen:
            p.data = p.data.to(torch.bfloat16 if is_half else torch.float32)
        for p in self.decoder:
            p.requires_grad_(is_official)
        self.discriminator.train(is_official).requires_grad_(False)

    def run(self, name, step):
        """One step, to its end -> seconds."""
        self.compose(name)
        wait(self.args)
        start = time.perf_counter()
        COMPOSITIONS[name](self.networks, self.items[name], step, self.args)
        wait(self.args)
        return time.perf_counter() - start


# -- measuring -------------------------------------------------------------------------------------


def wait(args):
    """Wait until the GPU has done all that it was given."""
    if args.device != "cpu":
        torch.cuda.synchronize()


# PyTorch does not count attention on a CPU: count it like a GPU's.
for name in "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward":
    on_cpu = name.replace("attention", "attention_for_cpu")
    flop_registry[getattr(torch.ops.aten, on_cpu)] = flop_registry[getattr(torch.ops.aten, name)]


def count(run, args):
    """-> TFLOP of run(), and the peak memory in GiB."""
    with FlopCounterMode(display=False) as counter:
        run()
    tera = counter.get_total_flops() / 1e12
    if args.device == "cpu":  # of the whole process
        return tera, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    run()  # compiles: under the counter nothing is
    torch.cuda.reset_peak_memory_stats()
    run()
    return tera, torch.cuda.max_memory_allocated() / 2 ** 30


def count_steps(args, name):
    """-> {step: (TFLOP, GiB)} of a composition; in a process of its own, see `in_new_process`."""
    bench = Bench(args)
    return {title: count(partial(bench.run, name, step), args) for title, step in STEPS.items()}


def in_new_process(function, *args):
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, context) as pool:
            return pool.submit(function, *args).result()
    except BrokenExecutor:
        raise Stopped("a measuring process was killed, perhaps for lack of memory; use a smaller "
                      "--size or --batch") from None


def measure_steps(args):
    """Print the table of the compositions, which take turns."""
    names = [args.only] if args.only else list(COMPOSITIONS)
    counts = {name: in_new_process(count_steps, args, name) for name in names}
    bench = Bench(args)
    times = {name: {title: [] for title in STEPS} for name in names}
    for _ in range(1 + args.repeat):
        for title, step in STEPS.items():
            for name in names:
                times[name][title].append(bench.run(name, step))
    weights = sum(p.numel() for p in bench.model.adapter.parameters()) / 1e6
    judged = min(args.judged, args.unroll)
    print(f"{device_name(args)}, preset {args.preset}, {args.size} x {args.size}, batch "
          f"{args.batch}, {args.adapter} ({weights:.1f} M weights), K = {args.unroll}; ours: "
          f"{judged} judged, {args.unroll_grad}, {args.precision}")
    print(f"{'':28}{'TFLOP':>10}{'ms':>11}{'TFLOP/s':>9}{'GiB peak':>10}{'speedup':>9}")
    rows = {name: summarize(counts[name], times[name]) for name in names}
    for title in [*STEPS, PERIOD]:
        for name in names:
            tera, seconds, gib = rows[name][title]
            line = (f"{title + ', ' + name:28}{tera:10.4g}{seconds * 1e3:11.1f}"
                    f"{tera / seconds:9.3g}{gib:10.2f}")
            if name != "official" and "official" in rows:
                line += f"{rows['official'][title][1] / seconds:9.2f}"
            print(line)


def summarize(counts, times):
    """-> {step: (TFLOP, seconds, GiB)}; a period is one adversarial and LAZY - 1 noise steps."""
    rows = {}
    for title in STEPS:
        tera, gib = counts[title]
        rows[title] = tera, median(times[title][1:]), gib  # the first was to warm up
    noise, adversarial = rows.values()
    rows[PERIOD] = ((LAZY - 1) * noise[0] + adversarial[0], (LAZY - 1) * noise[1] + adversarial[1],
                    max(noise[2], adversarial[2]))
    return rows


def measure_image(args):
    """Print what an image costs, by `sample.generate`."""
    height, width = args.sample
    set_device(args)
    model = build_model(args)
    if args.adapter == "oft":  # from here on as sample.load_model
        OFT.merge(model.unet)
    if args.precision == "bf16":
        model.unet.bfloat16()
        model.adapter.bfloat16()
    on_cpu = args.device == "cpu"
    (model.vae if on_cpu else model).to(memory_format=torch.channels_last)
    label = torch.full((args.batch, height, width), IGNORE)
    run = partial(generate, model, label, ["a street"] * args.batch, range(args.batch),
                  steps=args.steps, batch=args.batch, precision=args.precision)
    tera, gib = count(run, args)
    seconds = []
    for _ in range(args.repeat):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    tera = tera / args.batch
    second = median(seconds) / args.batch
    print(f"{device_name(args)}, preset {args.preset}, {height} x {width}, batch {args.batch}, "
          f"{args.steps} steps with guidance, {args.precision}")
    print(f"{second:.4g} s per image, {tera:.4g} TFLOP, {tera / second:.3g} TFLOP/s, "
          f"{gib:.2f} GiB peak")


def device_name(args):
    if args.device == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name()


def run_all(args):
    """--all: each command gets a quarter of the time at most, the last one all that is left."""
    seconds = 60 * args.minutes
    end = time.time() + seconds
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ASSETS / "toy.safetensors", folder)
    *commands, last = list_commands(args)
    for command in [*commands, last]:
        left = end - time.time()
        if command is not last:
            left = min(left, seconds / 4)
        if left > 0:
            limit = str(math.ceil(left))  # 0 would mean no limit
            print(f"\npython {command}  (within {limit} s)", flush=True)
            subprocess.run(["timeout", limit, sys.executable, *shlex.split(command)], cwd=ROOT)


def list_commands(args):
    """What is worth measuring on a rented GPU, the most important first."""
    bench = (f"tools/bench.py --preset {args.preset} --size {args.size} --batch {args.batch} "
             f"--unroll {args.unroll} --repeat {args.repeat} --device {args.device}")
    folder = shlex.quote(str(Path(args.out).resolve()))
    return [
        f"{bench} --precision bf16",
        f"{bench} --batch 1 --sample {args.size}x{2 * args.size}",
        "-m pytest -q -k cuda",
        f"{bench} --precision fp32 --only ours",
        f"{bench} --precision bf16 --only ours --compile",
        f"{bench} --precision fp32 --only ours --compile",
        f"tools/make_toy.py base --resume --device {args.device} --out {folder}"]


# -- the command line ------------------------------------------------------------------------------


def extent(text):
    """An argparse type: "512x1024" -> (512, 1024)"""
    height, width = map(int, text.split("x"))
    return height, width


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = refuse
    add = p.add_argument
    add("--preset", choices=list(PRESETS), default="toy", help="size of the networks (toy)")
    add("--batch", type=whole(1), help="images at a time; by default the training's, 1 for "
        "--sample")
    add("--adapter", choices=list(ADAPTERS), default="controlnet", help="(controlnet)")
    add("--precision", choices=["bf16", "fp32"], help="ours; by default bf16 on CUDA, else fp32")
    add("--repeat", type=whole(1), default=3, help="runs, of which the median is shown (3)")
    add("--device", help="cpu or cuda; by default cuda if there is one")
    add = p.add_argument_group("a step (settings are by default the training's)").add_argument
    add("--size", type=whole(16), help="side of the images, pixels")
    add("--unroll", type=whole(0, 24), help="K")
    add("--judged", type=whole(1), help="of the K further estimates, how many our D sees")
    add("--unroll-grad", choices=["first", "each", "full"], help="our estimates with gradient")
    add("--recompute", action="store_true", help="ours computes blocks again, to save memory")
    add("--compile", action="store_true", help="ours compiles its blocks")
    add("--only", choices=list(COMPOSITIONS), help="measure one composition")
    add = p.add_argument_group("an image").add_argument
    add("--sample", type=extent, metavar="HxW", help="measure an image of this size")
    add("--steps", type=whole(1, 1000), default=25, help="DDIM steps (25)")
    add = p.add_argument_group("a rented GPU").add_argument
    add("--all", action="store_true", help="steps in bf16 and fp32, compiled or not, an image, the "
        "tests with cuda in their names, and the toy's base as far as it comes")
    add("--minutes", type=number(0, exclusive=True), default=10, help="for all of that (10)")
    add("--out", default="runs/bench", metavar="DIR", help="for the toy's base (runs/bench)")
    args = p.parse_args(argv)
    settings = SETTINGS["toy" if args.preset == "toy" else "cityscapes"] | dict(
        steps=25, ramp=(0, 1), d_start=0, lazy=LAZY, discriminator="trained", ddim_steps=25,
        starts_below=25, seed=0, workers=0)
    if args.sample:
        settings["batch"] = 1
    p.set_defaults(**settings)
    args = p.parse_args(argv)
    multiple = PRESETS[args.preset].multiple
    if args.size % multiple:
        raise InputError(f"--size {args.size}: preset {args.preset} needs multiples of {multiple}")
    args.device = pick_device(args.device)
    return args


def start():
    args = parse_args()
    if args.all:
        run_all(args)
    elif args.sample:
        measure_image(args)
    else:
        measure_steps(args)


def main():
    run_command("bench.py", start)


if __name__ == "__main__":
    main()

"""Train and test a plain segmenter, on real images or on real and generated ones (Table 4).

    python tools/segmenter.py --data cityscapes --root DIR
    python tools/segmenter.py --data cityscapes --root DIR --extra GENERATED --mix 0.25 \\
        --test cityscapes cityscapes:night=ACDC

GENERATED is a folder that `sample.py --layouts` has written. The run's folder gets
segmenter.safetensors, which `sample.py --judge` and `train.py --segmenter` read, and
segmenter.json, the mIoU on each of --test.
"""
import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # see train.py
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import argparse
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from aldm import PRESETS, load_segmenter
from data import IGNORE, InputError, batches, open_dataset, split_key
from discriminator import UperNet, confusion_matrix, mean_iou
from tools.command import number, whole
from tools.files import refuse, write_text
from tools.judge import rounded
from tools.run import (Run, average, note, rank, refuse_second_run, run_command, start_processes,
                       world)
from tools.weight_files import save_tensors
from train import autocast, set_device, update


def train(args):
    """Train on --data and --extra, then test on each of --test."""
    real, extra, tests = load_datasets(args)
    torch.manual_seed(args.seed)
    net = UperNet(len(real.classes.names), **PRESETS[args.preset].segmenter)
    if args.segmenter:
        load_segmenter(args.segmenter, net, real.classes)
    net.to(args.device, memory_format=torch.channels_last).train()
    opt = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=0.9, weight_decay=1e-4, fused=True)
    for p in net.parameters():  # torch leaves these uninitialised if the first step is dropped
        opt.state[p]["momentum_buffer"] = torch.zeros_like(p)
    meta = dict(preset=args.preset, dataset=real.classes.key, names=list(real.classes.names),
                normalize=net.normalize)

    with Run(args, {"segmenter": net, "opt": opt}, meta, ["ce", "dropped"]) as run:
        if run.first:
            export(args, net, meta, run.first)  # a kill may have prevented it
        stream = mixed_batches(args, real, extra, run.first)
        for step in run:
            batch = run.next(stream)
            opt.param_groups[0]["lr"] = learning_rate(args, step)
            run.log(train_step(args, net, opt, batch))
            if run.saved:
                export(args, net, meta, run.done)
    if rank() == 0:
        test(args, net.eval(), tests)


def train_step(args, net, opt, batch):
    """Cross-entropy, void pixels left out -> {name: scalar}."""
    image = batch["image"].to(args.device, non_blocking=True)
    label = batch["label"].to(args.device, non_blocking=True)
    with autocast(args):
        logits = net(image)  # (B, N, H, W)
    loss = F.cross_entropy(logits.float(), label, ignore_index=IGNORE)
    loss.backward()
    losses = {"ce": loss.detach()}
    dropped = update(opt, losses)
    average([b for b in net.buffers() if b.is_floating_point()])
    return {**losses, "dropped": dropped}


def learning_rate(args, step):
    """Rises linearly for 50 steps, then falls to 0 at the end by mit-semseg's polynomial."""
    return args.lr * min(1, (step + 1) / 50) * (1 - step / args.steps) ** 0.9


@torch.no_grad()
def test(args, net, tests):
    """mIoU on whole images of {name: data set}, in windows of the training size: printed, and
    written to segmenter.json."""
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
        per_class = dict(zip(names, map(rounded, iou.tolist())))
        results[name] = {"mIoU": rounded(miou), "IoU": per_class}
        print(f"{name}: mIoU {miou:.3f}")
        for class_name, value in per_class.items():
            print(f"  {class_name:20} {value}")
    write_text(Path(args.out) / "segmenter.json", json.dumps(results, indent=1))


def segment(net, image, size):
    """Segment a whole image in windows of the size that the net was trained at.

    image [B,3,H,W] -> logits [B,N,H,W]. Windows overlap by at least half, and overlapping logits
    are averaged. An image smaller than a window is passed to the net as it is.
    """
    B, _, H, W = image.shape
    total = None
    count = image.new_zeros(H, W)
    for top in window_starts(H, size):
        for left in window_starts(W, size):
            here = (..., slice(top, top + size), slice(left, left + size))
            logits = net(image[here]).float()
            if total is None:
                total = logits.new_zeros(B, logits.shape[1], H, W)
            total[here] += logits
            count[here] += 1
    return total / count


def window_starts(length, size):
    """Starts of windows of `size` that cover `length` evenly and overlap by at least half."""
    if length <= size:
        return [0]
    steps = math.ceil((length - size) / (size // 2))
    return [round(i * (length - size) / steps) for i in range(steps + 1)]


def export(args, net, meta, step):
    """Write segmenter.safetensors."""
    if rank() > 0:
        return
    tensors = {f"segmenter.{name}": t for name, t in net.state_dict().items()}
    save_tensors(Path(args.out) / "segmenter.safetensors", tensors,
                 {**meta, "step": step, "format": "aldm-segmenter"})


# -- data ------------------------------------------------------------------------------------------


def load_datasets(args):
    """-> the real training set, a list of the --extra sets, {name in --test: its val split}."""
    real = load(args, args.data, args.root, "train")
    extra = [load(args, folder, folder, "train") for folder in args.extra]
    tests = {}
    for name in args.test or [args.data]:
        data, _, root = name.partition("=")
        tests[name] = load(args, data, root or args.root, "val", augment=False)
    for name, dataset in [(args.data, real), *zip(args.extra, extra), *tests.items()]:
        note(dataset.description)
        if dataset.only_void:
            raise InputError(f"{name}: all layouts are void; use data with labels")
        if dataset.classes.names != real.classes.names:
            raise InputError(f"{name}: its {len(dataset.classes.names)} classes are not the "
                             f"{len(real.classes.names)} classes of {args.data}")
    return real, extra, tests


def load(args, data, root, split, augment=True):
    return open_dataset(data, root, split, args.size, grid=1, augment=augment,
                        skip_broken=args.skip_broken, ids=args.ids)


def generated_share(args):
    """-> how many images of each batch come from each of the --extra sets."""
    return round(args.mix * args.batch / max(len(args.extra), 1))


def mixed_batches(args, real, extra, first):
    """Endless batches: the share --mix comes from the extra sets, equally from each of them."""
    each = generated_share(args)
    sizes = [args.batch - each * len(extra), *[each] * len(extra)]
    streams = []
    for dataset, size in zip([real, *extra], sizes):
        streams.append(batches(dataset, size, args.seed, first, args.workers, rank(), world(),
                               pin=args.device != "cpu"))
    for shares in zip(*streams):
        yield {key: torch.cat([share[key] for share in shares]) for key in ("image", "label")}


# -- the command line ------------------------------------------------------------------------------


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                allow_abbrev=False)
    p.error = refuse
    add = p.add_argument
    add("--data", default="toy", help="toy, cityscapes, ade20k, coco, or a folder with images/, "
        "labels/ and classes.txt (%(default)s)")
    add("--root", help="the data set's folder")
    add("--ids", choices=["own", "train"], help="the label files hold the data set's own ids, or "
        "train ids; by default their names and contents decide")
    add("--skip-broken", action="store_true", help="read all files first and leave out broken ones")
    add("--extra", nargs="+", default=[], metavar="DIR", help="folders of generated images")
    add("--mix", type=number(0, 1), default=0.5, help="their share of each batch (%(default)s)")
    add("--test", nargs="+", metavar="NAME", help="data sets to test on, NAME or NAME=ROOT; by "
        "default --data")
    add("--preset", choices=list(PRESETS), help="size of the network; by default toy for the toy, "
        "else sd15")
    add("--size", type=whole(16), help="side of the crops, pixels; by default the preset's")
    add("--segmenter", nargs="+", metavar="FILE", help="start from mit-semseg's ADE20K files "
        "(encoder and decoder), or from one of ours; by default from random weights")
    add("--steps", type=whole(1), default=2000, help="iterations (%(default)s)")
    add("--batch", type=whole(1), default=16, help="images per process (%(default)s)")
    add("--lr", type=number(0, exclusive=True), default=0.02,
        help="maximum learning rate, SGD (%(default)s)")
    add("--seed", type=whole(0, 2 ** 32 - 1), default=0, help="of everything random (%(default)s)")
    add("--device", help="cpu or cuda; by default cuda if there is one")
    add("--precision", choices=["bf16", "fp32"], help="by default bf16 on CUDA, fp32 on a CPU")
    add("--workers", type=whole(0), help="loading processes; by default 4 on CUDA, else 0")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    add("--save-every", type=whole(1), default=500, help="steps between checkpoints (%(default)s)")
    add("--keep", type=whole(1), default=2, help="number of checkpoints to keep (%(default)s)")
    add("--out", help="the run's folder; by default runs/DATA-segmenter")
    args = p.parse_args(argv)

    is_toy = split_key(args.data)[0] == "toy"
    args.preset = args.preset or ("toy" if is_toy else "sd15")
    args.size = args.size or PRESETS[args.preset].size
    name = Path(args.data.replace(":", "-")).resolve().name
    args.out = args.out or f"runs/{name}-segmenter"
    if args.extra and not 0 < generated_share(args) * len(args.extra) < args.batch:
        raise InputError(f"--mix {args.mix:g}: of a batch of {args.batch}, none or all images "
                         "would be generated; choose a share between, or a larger --batch")
    refuse_second_run(args)
    return set_device(args)


def start():
    args = parse_args()
    start_processes(args)
    train(args)


def main():
    run_command("segmenter.py", start)


if __name__ == "__main__":
    main()

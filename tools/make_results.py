"""Run the rows of our tables, and write them as Markdown.

    python tools/make_results.py main k --runs runs/results --out runs/results/results.md

Each row is train.py with some flags, run with each seed in a folder of its own under --runs. Runs
that are finished are kept: the same command continues after an interruption, and tables share runs.
Folders are named after the rows' flags: choose a new --runs after a change of the code, of its
defaults or of --train-flags.
"""
import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

import train
from aldm import unrolled_adversarial_loss
from data import batches
from tools.command import number, whole
from tools.files import check_target, refuse, write_text
from tools.run import Stopped, run_command
from tools.toy_world import DOMAINS
from train import FIGURES

# Adapters from which rows start, as START/NAME in their flags. One may start from another.
STARTS = {
    "piti": "--adapter piti --discriminator none --lr 1e-3 --steps 1500",
    "freestyle": "--adapter freestyle --discriminator none --steps 1500",
    "t2i": "--adapter t2i --discriminator none --lr 1e-3 --steps 1500",
    "oft": "--adapter oft --discriminator none --lr 1e-3 --steps 1500",
}
NOISE = "--discriminator none --steps 1000"  # takes as long as 250 steps of ALDM
K3 = "--unroll 3 --judged 3"
TABLES = {  # name -> title, {row: flags of train.py}
    "main": ("Noise loss and ALDM for the same time, both from the shipped ControlNet", {
        "noise loss": NOISE,
        "ALDM": ""}),
    "k": ("Unrolled steps K, and how many of their estimates are judged", {
        "K = 0": "--unroll 0",
        "K = 3, 1 judged": "--unroll 3 --judged 1",
        "K = 3, all judged": K3,
        "K = 9, 1 judged": "--judged 1",
        "K = 9, 2 judged (default)": "",
        "K = 9, 4 judged": "--judged 4",
        "K = 9, all judged": "--judged 9"}),
    "first": ("The same with the official gradient", {
        "K = 9, 1 judged, `first`": "--unroll-grad first --judged 1",
        "K = 9, 2 judged, `first`": "--unroll-grad first",
        "K = 9, all judged, `first`": "--unroll-grad first --judged 9"}),
    "comparison": ("The paper's comparison: strategies of adaptation, and ALDM on top", {
        "PITI, its encoder alone": "START/piti",
        "PITI, encoder and UNet": f"--init START/piti --finetune {NOISE}",
        "FreestyleNet": "START/freestyle",
        "FreestyleNet, longer": f"--init START/freestyle {NOISE}",
        "T2I-Adapter": "START/t2i",
        "T2I-Adapter, noise loss": f"--init START/t2i {NOISE}",
        "T2I-Adapter, ALDM": "--init START/t2i",
        "OFT": "START/oft",
        "OFT, noise loss": f"--init START/oft {NOISE}",
        "OFT, ALDM": "--init START/oft",
        "ControlNet, noise loss": NOISE,
        "ControlNet, ALDM": ""}),
    "long": ("Four times as long: does the noise loss catch up?", {
        "noise loss": "--discriminator none --steps 4000",
        "noise loss, as long as K = 3": "--discriminator none --steps 3200",
        "ALDM, K = 3, a slower discriminator": f"{K3} --steps 1000 --lr-d 5e-5",
        "ALDM, K = 3, the discriminator frozen": f"{K3} --discriminator frozen --steps 1000",
        "ALDM, K = 9, a slower discriminator": "--steps 1000 --lr-d 5e-5",
        "ALDM, K = 9, the discriminator frozen": "--steps 1000 --discriminator frozen"}),
    "gradient": ("Where the gradient flows in the unrolled steps", {
        "`first`": "--unroll-grad first",
        "`each` (default)": "",
        "`full`": "--unroll-grad full"}),
    "discriminator": ("The discriminator", {
        "trained": "",
        "frozen": "--discriminator frozen",
        "none, the noise loss alone": NOISE}),
    "lambda": ("lambda_adv, and the weight of the fake term", {
        "lambda 0.3": "--lambda-adv 0.3",
        "lambda 1, fake weight 0.01 (default)": "",
        "lambda 2": "--lambda-adv 2",
        "lambda 4": "--lambda-adv 4",
        "fake weight 0.1": "--fake-weight 0.1",
        "fake weight 0.001": "--fake-weight 0.001"}),
}
PROMPTS = ("a street at night", "a street in fog", "a street in snow", "a street in rain")


# -- runs ------------------------------------------------------------------------------------------


def call(command):
    """Run a command to its end. If a signal ends this process, stop the command and wait until it
    has saved. Raises Stopped if it fails."""
    print(shlex.join(command[1:]), flush=True)
    # In a session of its own: from a terminal, Ctrl-C would reach it twice.
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if process.returncode:
        raise Stopped(f"{shlex.join(command[1:])}: failed with exit code {process.returncode}")


def finish(out, script, flags, product, args):
    """Run a script in `out`, or resume it there, unless it is finished -> the content of the JSON
    file out/product, the last file that it writes."""
    if not (out / product).exists():
        call([sys.executable, str(ROOT / script), "--resume", "--keep", "1", *shlex.split(flags),
              *shlex.split(args.train_flags), "--out", str(out)])
    return json.loads((out / product).read_text())


def finish_training(out, flags, args):
    """Run train.py, after the starts that its flags name -> judged.json."""
    for name in re.findall(r"START/(\w+)", flags):
        finish_training(args.runs / name, STARTS[name], args)
    flags = re.sub(r"START/(\w+)", lambda found: shlex.quote(str(args.runs / found[1])), flags)
    return finish(out, "train.py", f"{flags} --no-before", "judged.json", args)


def folder_name(flags, seed):
    words = re.sub(r"[^\w.]+", "-", flags).strip("-") or "default"
    return f"{words}-seed-{seed}"


# -- tables ----------------------------------------------------------------------------------------


def table(name, args):
    """-> the table as Markdown: mean and standard deviation of each figure over the seeds."""
    title, rows = TABLES[name]
    lines = [f"## {title}", "", f"| | `train.py` ... | {' | '.join(FIGURES)} |",
             "|---|---|" + "---|" * len(FIGURES)]
    for row, flags in rows.items():
        if flags.startswith("START/"):  # the start itself, which all seeds share
            start = flags.removeprefix("START/")
            flags = STARTS[start]
            results = [finish_training(args.runs / start, flags, args)]
        else:
            results = [finish_training(args.runs / folder_name(flags, seed),
                                       f"{flags} --seed {seed}", args)
                       for seed in range(args.seeds)]
        cells = [spread([result[key] for result in results]) for key in FIGURES.values()]
        lines.append(f"| {row} | `{flags or '(defaults)'}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def spread(values):
    """Mean and standard deviation, or a single value alone; "" if any is unknown."""
    if None in values:
        return ""
    digits = 0 if max(values) > 10 else 3
    text = f"{np.mean(values):.{digits}f}"
    return f"{text} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else text


def generalisation(args):
    """-> the table of the paper's domain generalisation (Table 4), in the toy world."""
    images = args.runs / "weather"
    call([sys.executable, str(ROOT / "sample.py"), "--layouts", "train", "--limit", "250",
          "--out", str(images), "--prompts", *PROMPTS, "--adapter", str(args.adapter)])
    tests = " ".join(f"toy:{domain}" for domain in DOMAINS)
    rows = {"clear days": "--data toy", "real images of all weathers": "--data toy:all"}
    for mix in args.mix:
        row = f"clear days and ALDM's images, {mix:g} of each batch"
        rows[row] = f"--data toy --mix {mix:g} --extra IMAGES"
    lines = ["## What images of unseen weather are good for: mIoU of a segmenter", "",
             f"| trained on | {' | '.join(DOMAINS)} |", "|---|" + "---|" * len(DOMAINS)]
    for row, flags in rows.items():
        results = []
        for seed in range(args.seeds):
            out = args.runs / folder_name(f"segmenter {flags}", seed)
            training = flags.replace("IMAGES", shlex.quote(str(images)))
            training += f" --steps 1000 --test {tests} --seed {seed}"
            results.append(finish(out, "tools/segmenter.py", training, "segmenter.json", args))
        cells = [spread([result[f"toy:{domain}"]["mIoU"] for result in results])
                 for domain in DOMAINS]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def variance(args):
    """-> how much the gradient of L_adv varies more if M of K estimates are judged, as a table.

    Exact, at the start of the training, on 8 batches: the gradient is linear in what is judged, so
    with M steps it is the mean of M of the K gradients with one step each, drawn without
    replacement.
    """
    rows = {}
    for mode in "each", "first":
        flags = ["--unroll-grad", mode, "--out", str(args.runs / "variance")]
        settings = train.parse_args([*flags, *shlex.split(args.train_flags)])
        dataset = train.load_dataset(settings, "train")
        model, discriminator, *_ = train.build(settings)
        stream = batches(dataset, settings.batch, settings.seed)
        gradients = torch.stack([single_gradients(model, discriminator, next(stream), settings)
                                 for _ in range(8)])  # (8, K, weights)
        rows[mode] = gradients.mean(1), gradients.var(1).sum(1).mean()
    K = settings.unroll
    choices = [M for M in (1, 2, 4, 9) if M <= K]
    lines = [f"## What judging M of {K} estimates adds to the variance of L_adv's gradient", "",
             "| | relative to | " + " | ".join(f"M = {M}" for M in choices) + " |",
             "|---|---|" + "---|" * len(choices)]
    for mode, (full, spread_of_one) in rows.items():
        added = [spread_of_one / M * (1 - M / K) for M in choices]
        scales = {"its square": full.square().sum(1).mean(),
                  "its variance over batches": full.var(0).sum()}
        for name, scale in scales.items():
            cells = " | ".join(f"{value / scale:.3g}" for value in added)
            lines.append(f"| `{mode}` | {name} | {cells} |")
    return "\n".join(lines) + "\n"


def single_gradients(model, discriminator, items, args):
    """-> [K,weights]: the gradients of L_adv with one step k = 1..K judged beside x0_hat(t)."""
    batch = train.prepare(model, items)
    timesteps = model.schedule.ddim_timesteps(args.ddim_steps)
    start = torch.randint(args.unroll, args.starts_below, (args.batch,))
    noise = torch.randn_like(batch["x0"])
    _, x_t, eps, layout = train.noise_loss(model, batch, timesteps[start], noise)
    rows = []
    for k in range(1, args.unroll + 1):
        loss, _ = unrolled_adversarial_loss(
            model, discriminator, x_t, eps, start, timesteps, batch["label"], batch["context"],
            layout, args.unroll, args.unroll_grad, [k])
        grads = torch.autograd.grad(loss, list(model.adapter.parameters()), retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


OTHERS = {"generalisation": generalisation, "variance": variance}


# -- the command line ------------------------------------------------------------------------------


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawTextHelpFormatter)
    p.error = refuse
    p.add_argument("tables", nargs="+", choices=[*TABLES, *OTHERS])
    p.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    p.add_argument("--out", type=Path, required=True, help="the Markdown file")
    p.add_argument("--seeds", type=whole(1), default=3, help="runs per row (3)")
    p.add_argument("--train-flags", default="",
                   help="flags for every training: --train-flags='--precision bf16'")
    p.add_argument("--adapter", type=Path, default=ROOT / "assets" / "toy_aldm.safetensors",
                   help="makes the images of generalisation; by default the shipped ALDM")
    p.add_argument("--mix", type=number(0, 1), nargs="+", default=[0.25],
                   help="their shares of each batch, a row each (0.25)")
    return p.parse_args(argv)


def start():
    args = parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    check_target(args.out)
    texts = []
    for name in args.tables:
        texts.append(OTHERS[name](args) if name in OTHERS else table(name, args))
    print("\n".join(texts))
    write_text(args.out, "\n".join(texts))


def main():
    run_command("make_results.py", start)


if __name__ == "__main__":
    main()

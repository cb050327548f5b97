"""Runs the rows of our tables, and writes them as Markdown.

    python assets/make_results.py main k --runs runs/results --out runs/results/results.md

Each row is train.py with some flags, run with each seed into a folder of its own under --runs. What
is finished there is kept: the same command goes on after a stop, and tables share their runs. The
folders are named by the rows' flags: after a change of the code, of its defaults or of
--train-flags take a new --runs.
"""
import argparse
import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np

from data import DOMAINS, InputError, check_target, write_text
from sample import number
from train import FIGURES

# Adapters that the noise loss has trained, from which others start, as the shipped ControlNet.
STARTS = {
    "t2i": "--adapter t2i --discriminator none --lr 1e-3 --steps 1500",
    "oft": "--adapter oft --discriminator none --lr 1e-3 --steps 1500",
}
NOISE = "--discriminator none --steps 800"  # as long as ALDM's 250 take
TABLES = {  # name -> title, {row: flags}; START/x is the adapter x of STARTS
    "main": ("Noise loss and ALDM for the same time, both from the shipped ControlNet", {
        "noise loss": NOISE,
        "ALDM": ""}),
    "adapters": ("The same with other adapters, from their own noise loss", {
        "T2I-Adapter, noise loss": f"--init START/t2i {NOISE}",
        "T2I-Adapter, ALDM": "--init START/t2i",
        "OFT, noise loss": f"--init START/oft {NOISE}",
        "OFT, ALDM": "--init START/oft"}),
    "k": ("Unrolled steps K", {
        "K = 0": "--unroll 0",
        "K = 3 (default)": "",
        "K = 9": "--unroll 9"}),
    "gradient": ("Where the gradient flows in the unrolled steps", {
        "`first`": "--unroll-grad first",
        "`each` (default)": "",
        "`full`": "--unroll-grad full"}),
    "discriminator": ("The discriminator", {
        "trained (default)": "",
        "frozen": "--discriminator frozen",
        "none, the noise loss alone": NOISE}),
    "lambda": ("lambda_adv, and the weight of the fake term", {
        "lambda 0.3": "--lambda-adv 0.3",
        "lambda 1 (default)": "",
        "lambda 2": "--lambda-adv 2",
        "lambda 4": "--lambda-adv 4",
        "fake weight 0.1": "--fake-weight 0.1",
        "fake weight 0.001": "--fake-weight 0.001"}),
    "long": ("Four times as long: does the noise loss catch up?", {
        "noise loss": "--discriminator none --steps 3200",
        "ALDM, a slower discriminator": "--steps 1000 --lr-d 5e-5",
        "ALDM, the discriminator frozen": "--discriminator frozen --steps 1000"}),
}
PROMPTS = ("a street at night", "a street in fog", "a street in snow", "a street in rain")


def finish(out, flags, product, args):
    """-> what the JSON file out/product holds, the last that train.py writes; where it is not there
    yet, train.py is run, or resumed, in `out`."""
    if not (out / product).exists():
        command = [sys.executable, str(ROOT / "train.py"), "--resume", "--keep", "1",
                   *shlex.split(flags), *shlex.split(args.train_flags), "--out", str(out)]
        call(command)
    return json.loads((out / product).read_text())


def call(command):
    """Run a command to its end. If we are stopped, so is it, and we wait until it has saved."""
    print(shlex.join(command[1:]), flush=True)
    with subprocess.Popen(command) as process:
        try:
            process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def finish_row(flags, seed, args):
    """-> judged.json of train.py with these flags"""
    out = args.runs / folder_name(flags, seed)
    for word in re.findall(r"START/\w+", flags):
        start = args.runs / word.lower()
        finish(start, f"{STARTS[start.name]} --no-before", "judged.json", args)
        flags = flags.replace(word, shlex.quote(str(start)))
    return finish(out, f"{flags} --seed {seed} --no-before", "judged.json", args)


def folder_name(flags, seed):
    words = re.sub(r"[^\w.]+", "-", flags).strip("-") or "default"
    return f"{words}-seed-{seed}"


def table(name, args):
    """-> the table as Markdown: of each figure its mean and standard deviation over the seeds."""
    title, rows = TABLES[name]
    lines = [f"## {title}", "", f"| | `train.py` ... | {' | '.join(FIGURES)} |",
             "|---|---|" + "---|" * len(FIGURES)]
    for row, flags in rows.items():
        results = [finish_row(flags, seed, args) for seed in range(args.seeds)]
        cells = [spread([result[key] for result in results]) for key in FIGURES.values()]
        lines.append(f"| {row} | `{flags or '(defaults)'}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def spread(values):
    """Mean and standard deviation; of a single value, that alone; "" where one is not known."""
    if None in values:
        return ""
    digits = 0 if max(values) > 10 else 3
    text = f"{np.mean(values):.{digits}f}"
    return f"{text} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else text


def generalisation(args):
    """-> the table of the paper's domain generalisation (Table 4), in the toy world."""
    images = args.runs / "weather"
    make = [sys.executable, str(ROOT / "sample.py"), "--layouts", "train", "--limit", "250",
            "--out", str(images), "--prompts", *PROMPTS, "--adapter", str(args.adapter)]
    call(make)  # it makes what is not there yet
    tests = "--test " + " ".join(f"toy:{domain}" for domain in DOMAINS)
    rows = {"clear days": "--data toy", "real images of all weathers": "--data toy:all"}
    for mix in args.mix:
        row = f"clear days and ALDM's images, {mix:g} of each batch"
        rows[row] = f"--data toy --mix {mix:g} --extra {shlex.quote(str(images))}"
    lines = ["## What images of unseen weather are good for: mIoU of a segmenter", "",
             f"| trained on | {' | '.join(DOMAINS)} |", "|---|" + "---|" * len(DOMAINS)]
    for row, flags in rows.items():
        results = []
        for seed in range(args.seeds):
            words = flags.replace(shlex.quote(str(images)), "aldm")
            out = args.runs / folder_name(f"segmenter {words}", seed)
            training = f"--train segmenter --steps 1000 {flags} {tests} --seed {seed}"
            results.append(finish(out, training, "segmenter.json", args))
        cells = [spread([result[f"toy:{domain}"]["mIoU"] for result in results])
                 for domain in DOMAINS]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("tables", nargs="+", choices=[*TABLES, "generalisation"])
    p.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    p.add_argument("--out", type=Path, required=True, help="the Markdown file")
    p.add_argument("--seeds", type=number(1, kind=int), default=3)
    p.add_argument("--train-flags", default="", help="given to every run: --train-flags='--bf16'")
    p.add_argument("--adapter", type=Path, default=ROOT / "assets" / "toy_aldm.safetensors",
                   help="whose images generalisation uses")
    p.add_argument("--mix", type=number(0, 1), nargs="+", default=[0.25])
    args = p.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # `call` ends the run as well
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        check_target(args.out)
        texts = []
        for name in args.tables:
            texts.append(generalisation(args) if name == "generalisation" else table(name, args))
        print("\n".join(texts))
        write_text(args.out, "\n".join(texts))
    except KeyboardInterrupt:
        raise SystemExit(130)
    except (InputError, OSError, subprocess.CalledProcessError) as error:
        print(f"make_results.py: {error}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()

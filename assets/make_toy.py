"""Makes the toy world's Stable Diffusion, its judges, adapters and pictures, from nothing.

    python assets/make_toy.py vae --out DIR         the autoencoder
    python assets/make_toy.py base --out DIR        text tower and UNet: text to image, no layouts
    python assets/make_toy.py judges --out DIR      the discriminator's start, and the judges
    python assets/make_toy.py adapters --out DIR    a ControlNet by the noise loss, ALDM from there
    python assets/make_toy.py pictures --out DIR    toy.png and the example layouts

In this order: each fills DIR/toy.safetensors, or uses it; DIR/STAGE (of adapters DIR/toy_controlnet
and DIR/toy_aldm) holds its checkpoints, from which --resume goes on. The shipped base was trained
twice: 8,000 steps with the defaults, then, with DIR/base out of the way, `base --start
DIR/toy.safetensors --steps 6800 --lr 6e-4 --scenes 40000`.
"""
import argparse
import copy
import itertools
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from aldm import (JUDGE, PRESETS, Schedule, TextEncoder, load_into, load_weights, pick_device,
                  save_base)
from data import DOMAINS, IGNORE, InputError, Toy, class_table, colorize, toy_scene, write_png
from discriminator import Classifier, UperNet
from make_results import call
from sample import from_pixels, generate, grid, load_model, number, toy_judges
from train import Job, Stopped, autocast, cosine, fill_in, fit, open_run, paint, update
from unet import UNet
from vae import VAE

DEFAULTS = {
    "vae": {"steps": 6000, "batch": 16, "lr": 1e-3},
    "base": {"steps": 8000, "batch": 32, "lr": 1e-3},
    "judges": {"steps": 1500, "batch": 8, "lr": 2e-3},
}


def train_stage(args, modules, loss, columns):
    """Train `modules` {name: module} by loss(step) -> loss, its parts {name: scalar}: AdamW, cosine
    decay, clipped gradients, with train.py's loop and checkpoints."""
    parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(parameters, args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    run = copy.copy(args)
    run.out = Path(args.out) / args.stage
    open_run(run)
    fit(Job(state={**modules, "opt": opt},
            meta={"stage": args.stage},
            stream=itertools.count,
            rates=[(opt, partial(learning_rate, args))],
            step=partial(stage_step, args, opt, loss),
            columns=columns), run)


def learning_rate(args, step):
    return min(1, (step + 1) / 100) * cosine(args.lr, 0, step / args.steps)


def stage_step(args, opt, loss, _, step):
    with autocast(args):
        value, parts = loss(step)
    value.backward()
    torch.nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], 1.0)
    losses = {name: part.detach() for name, part in parts.items()}
    return {**losses, "dropped": update(opt, losses)}


def write_parts(args, parts, token_ids=None):
    """Put these parts into DIR/toy.safetensors, beside what other stages have put there."""
    path = Path(args.out) / "toy.safetensors"
    old = load_weights(path) if path.exists() else {}
    save_base(path, {**old, **parts}, token_ids)
    print(f"{path}: {', '.join(parts)} written, {path.stat().st_size / 1e6:.1f} MB")


def draw_scenes(toy, n):
    return torch.randint(0, len(toy), (n,)).numpy()


def toy_pixels(toy, index, device):
    """-> image [B,3,64,64] in [-1,1]"""
    image = from_pixels(toy.images[index], device)
    return image.contiguous(memory_format=torch.channels_last)


# -- the autoencoder -------------------------------------------------------------------------------


def make_vae(args):
    """At the end the latents are brought to zero mean and, as a whole, unit variance. As those of
    Stable Diffusion they keep a spectrum: what is large outlives more noise than what is fine."""
    torch.manual_seed(args.seed)
    toy = Toy("train", DOMAINS, length=args.scenes)
    vae = VAE(PRESETS["toy"].vae)
    linear_start(vae, toy_pixels(toy, slice(0, 500), "cpu"))
    vae.to(args.device, memory_format=torch.channels_last)
    loss = partial(vae_loss, args, vae, toy)
    train_stage(args, {"vae": vae}, loss, ["l1", "kl", "mse"])
    normalize_latents(vae, toy_pixels(toy, slice(0, 2000), args.device))
    write_parts(args, {"vae": vae})


def vae_loss(args, vae, toy, step):
    """L1, weighted by local contrast since small objects live by their edges; a small KL term."""
    x = toy_pixels(toy, draw_scenes(toy, args.batch), args.device)
    mean, logvar = vae.moments(x)
    error = vae.decode(vae.draw(mean, logvar)) - x
    blurred = F.avg_pool2d(F.pad(x, (3, 3, 3, 3), mode="reflect"), 7, 1)
    contrast = (x - blurred).abs().mean(1, keepdim=True)
    weight = 1 + 8 * contrast
    l1 = (weight / weight.mean() * error.abs()).mean()
    kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
    return l1 + 1e-5 * kl, {"l1": l1, "kl": kl, "mse": (error ** 2).mean()}


@torch.no_grad()
def linear_start(vae, image):
    """Start as the best linear autoencoder, the principal components of the patches of `image`
    [n,3,64,64], which plain training takes long to find.

    They pass silu as pairs (x, -x), since silu(x) - silu(-x) = x; residual branches start at 0; a
    pair of large constants keeps the statistics of the last group norm nearly the same for all
    images, and its gain undoes the norm's division.
    """
    z = vae.cfg.z_channels
    for name, module in vae.named_modules():
        if name.endswith(("conv2", "proj_out", "conv_out", "quant_conv")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    patches = F.pixel_unshuffle(image, vae.cfg.patch)
    x = patches.permute(0, 2, 3, 1).flatten(0, 2)  # (n, 3 patch^2)
    m = x.mean(0)
    _, eigenvectors = torch.linalg.eigh(torch.cov(x.double().T))  # ascending
    V = eigenvectors.flip(1)[:, :z].float()
    s = ((x - m) @ V).std()
    encoder, decoder = vae.encoder, vae.decoder
    eye = torch.eye(z)
    set_pairs(encoder.conv_in, V.T / s, -m @ V / s)
    set_linear(encoder.conv_out, torch.cat([eye, -eye], 1), 0)
    set_linear(vae.quant_conv, torch.eye(2 * z), 0)
    set_linear(vae.post_quant_conv, eye, 0)
    set_pairs(decoder.conv_in, eye, torch.zeros(z))
    set_linear(decoder.conv_out, torch.cat([V * s, -V * s], 1), m)
    vae.quant_conv.bias[z:] = -6.0  # the log-variances
    set_gain(encoder, patches[:100])
    set_gain(decoder, vae.moments(image[:100])[0])


def set_linear(conv, weight, bias):
    """The first len(weight) outputs of a convolution become a linear map of each pixel."""
    rows, columns = weight.shape
    centre = conv.kernel_size[0] // 2
    conv.weight[:rows] = 0
    conv.weight[:rows, :columns, centre, centre] = weight
    conv.bias[:rows] = bias


def set_pairs(conv, weight, bias):
    """The same, and its negative, and a pair of large constants."""
    constants = torch.zeros(2, weight.shape[1])
    weight = torch.cat([weight, -weight, constants])
    bias = torch.cat([bias, -bias, torch.tensor([6.0, -6.0])])
    set_linear(conv, weight, bias)


def set_gain(net, x):
    """Let the last norm of `net` multiply by the standard deviation that it divides by."""
    seen = []
    hook = net.norm_out.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    net(x)
    hook.remove()
    deviation = seen[0].std((1, 2, 3))
    net.norm_out.weight.fill_(deviation.mean())


@torch.no_grad()
def normalize_latents(vae, image):
    """Fold the latents' mean and deviation into the convolutions beside them: z' = (z - m) / s."""
    z = torch.cat([vae.moments(x)[0] for x in image.split(100)])
    c = z.shape[1]
    m = z.mean((0, 2, 3))
    s = (z - m[:, None, None]).std()
    inner, outer = vae.quant_conv, vae.post_quant_conv
    inner.weight[:c] /= s
    inner.bias[:c] = (inner.bias[:c] - m) / s
    inner.bias[c:] -= 2 * s.log()  # the log-variances
    outer.bias += outer.weight[:, :, 0, 0] @ m
    outer.weight *= s


# -- text to image ---------------------------------------------------------------------------------


def make_base(args):
    """UNet and text tower, in all weathers, without layouts. The file gets the running average of
    the weights."""
    path = Path(args.out) / "toy.safetensors"
    preset = PRESETS["toy"]
    vae = VAE(preset.vae).to(args.device)
    load_into(vae, load_weights(path).get("vae", {}), f"{path}: vae")
    toy = Toy("train", DOMAINS, length=args.scenes)
    torch.manual_seed(args.seed)
    text = TextEncoder(**preset.text).to(args.device)
    unet = UNet(preset.unet).to(args.device, memory_format=torch.channels_last)
    if args.start:
        start = load_weights(args.start)
        load_into(text, start.get("text", {}), args.start)
        load_into(unet, start.get("unet", {}), args.start)
    trained = nn.ModuleList([text, unet])
    averaged = copy.deepcopy(trained).requires_grad_(False)
    moments = encode_scenes(vae, toy, args.device)
    ids, present = tokenize_scenes(text, toy)
    ids = ids.to(args.device)

    loss = partial(base_loss, args, vae, trained, averaged, moments, ids, present)
    modules = {"text": text, "unet": unet, "averaged": averaged}
    train_stage(args, modules, loss, ["noise"])
    write_parts(args, {"text": averaged[0], "unet": averaged[1]}, ids.unique())


@torch.no_grad()
def encode_scenes(vae, toy, device):
    """-> the latents' moments [scenes,2z,16,16], in half precision"""
    moments = []
    for i in tqdm(range(0, len(toy), 100), desc="latents"):
        pixels = toy_pixels(toy, slice(i, i + 100), device)
        moments.append(torch.cat(vae.moments(pixels), dim=1).half())
    return torch.cat(moments)


def tokenize_scenes(text, toy):
    """-> ids [scenes + N + 1, 77] of the scenes' captions, of "A photo of {class}" for each of the
    N classes, and of the empty caption; present [scenes,N], whether a class is in a scene"""
    names = class_table("toy").names
    captions = [toy.captions[name] for name in toy.names]
    photos = [f"A photo of {name}" for name in names]
    ids = text.tokenize([*captions, *photos, ""])
    present = np.stack([(toy.labels == c).any((1, 2)) for c in range(len(names))], axis=1)
    return ids, torch.from_numpy(present).float()


def base_loss(args, vae, trained, averaged, moments, ids, present, step):
    """The noise loss. One caption in ten is empty (for guidance), one in seven names a class of the
    scene ("A photo of car"), so that class embeddings mean something."""
    text, unet = trained
    scenes, B = len(present), args.batch
    index = torch.randint(0, scenes, (B,))
    x0 = vae.draw(*moments[index.to(args.device)].float().chunk(2, dim=1))
    choice = torch.rand(B)
    photo = scenes + present[index].multinomial(1)[:, 0]
    words = index.where(choice > 0.25, photo).where(choice > 0.1, len(ids) - 1)
    # Spread evenly over all t, which makes the gradient less noisy than independent draws.
    t = ((torch.arange(B) + torch.rand(1)) * 1000 / B).long().to(args.device)
    noise = torch.randn_like(x0)
    x_t = Schedule().to(args.device).add_noise(x0, t, noise)
    context = text(ids[words.to(args.device)])
    loss = F.mse_loss(unet(x_t, t, context), noise)

    rate = min(0.9997, (step + 1) / (step + 10))
    with torch.no_grad():
        torch._foreach_lerp_([*averaged.parameters()], [*trained.parameters()], 1 - rate)
    return loss, {"noise": loss}


# -- the judges ------------------------------------------------------------------------------------


def make_judges(args):
    """The segmenter that the discriminator starts from, trained on clear days only; and the judges,
    in all weathers, for no other training: a segmenter at full resolution, a classifier of the
    weather."""
    N = len(class_table("toy").names)
    torch.manual_seed(args.seed)
    nets = {
        "segmenter": UperNet(N, **PRESETS["toy"].segmenter),
        "judge": UperNet(N, **JUDGE),
        "domain": Classifier(len(DOMAINS)),
    }
    for net in nets.values():
        net.to(args.device, memory_format=torch.channels_last).train()
    days = Toy("train", ("day",), length=args.scenes // 5)
    everything = Toy("train", DOMAINS, length=args.scenes)
    loss = partial(judges_loss, args, nets, days, everything)
    train_stage(args, nets, loss, list(nets))
    write_parts(args, nets)


def judges_loss(args, nets, days, everything, step):
    day = draw_scenes(days, args.batch)
    index = draw_scenes(everything, args.batch)
    domain = torch.from_numpy(index % len(DOMAINS)).to(args.device)
    weather = nets["domain"](toy_pixels(everything, index, args.device)).float()
    losses = {
        "segmenter": segmentation_loss(nets["segmenter"], days, day, args.device),
        "judge": segmentation_loss(nets["judge"], everything, index, args.device),
        "domain": F.cross_entropy(weather, domain),
    }
    return sum(losses.values()), losses


def segmentation_loss(net, toy, index, device):
    label = torch.from_numpy(toy.labels[index]).long().to(device)
    logits = net(toy_pixels(toy, index, device)).float()
    return F.cross_entropy(logits, label, ignore_index=IGNORE)


# -- adapters and pictures -------------------------------------------------------------------------


def make_adapters(args):
    """toy_controlnet.safetensors by the noise loss; from it toy_aldm.safetensors."""
    run_train(args, "toy_controlnet", "none", "--discriminator none --lr 1e-3 --steps 1500")
    start = Path(args.out) / "toy_controlnet.safetensors"
    run_train(args, "toy_aldm", str(start), "--steps 1000 --lr-d 5e-5")


def run_train(args, name, init, flags):
    out = Path(args.out)
    command = [sys.executable, str(ROOT / "train.py"), "--device", args.device, "--seed",
               str(args.seed), "--sd", str(out / "toy.safetensors"), "--init", init,
               "--out", str(out / name), *flags.split()]
    if args.resume:
        command.append("--resume")
    if args.bf16:
        command.append("--bf16")
    call(command)
    shutil.copy(out / name / "adapter.safetensors", out / f"{name}.safetensors")


@torch.no_grad()
def make_pictures(args):
    """toy.png: layout, real image, noise loss and ALDM with their errors, ALDM in other weathers;
    layout_1..3.png. Prints the share of wrong pixels of both adapters, of 32 layouts."""
    out = Path(args.out)
    for i in range(3):
        write_png(out / f"layout_{i + 1}.png", colorize(toy_scene(10_000_001 + i)[1], "toy"))
    judge, _ = toy_judges(load_weights(out / "toy.safetensors"), args.device)
    toy = Toy("val", length=32)
    labels = torch.from_numpy(toy.labels).long()
    shown = [30, 29, 5, 19, 2]
    columns = {"layout": paint(labels[shown], "toy"), "real": toy.images[shown]}
    for title, adapter in ("noise loss", "toy_controlnet"), ("ALDM", "toy_aldm"):
        model = load_model(out / f"{adapter}.safetensors", out / "toy.safetensors", args.device)
        images = generate(model, labels, ["a street on a clear day"] * 32, range(32))
        found = judge(from_pixels(images, args.device)).argmax(1).cpu()
        wrong = ((found != labels) & (labels != IGNORE)).numpy()
        print(f"{title}: {wrong.mean():.1%} of the pixels are wrong")
        columns[title] = images[shown]
        columns[f"{title}: wrong"] = [mark(images[i], wrong[i]) for i in shown]
    for weather in ("at night", "in snow", "in fog"):
        prompts = [f"a street {weather}"] * len(shown)
        columns[f"ALDM, {weather}"] = generate(model, labels[shown], prompts, shown)
    rows = list(zip(*columns.values()))
    write_png(out / "toy.png", grid(rows, titles=list(columns)))


def mark(image, wrong):
    """An image in pale grey, its wrong pixels in red."""
    pixels = (150 + 0.35 * image.mean(2, keepdims=True)).repeat(3, axis=2)
    pixels[wrong] = 230, 0, 0
    return pixels.astype(np.uint8)


STAGES = {"vae": make_vae, "base": make_base, "judges": make_judges, "adapters": make_adapters,
          "pictures": make_pictures}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("stage", choices=list(STAGES))
    p.add_argument("--out", required=True, help="folder of toy.safetensors and what else is made")
    p.add_argument("--start", help="base: go on from the UNet and text tower of this file")
    p.add_argument("--steps", type=number(1, kind=int))
    p.add_argument("--batch", type=number(1, kind=int))
    p.add_argument("--lr", type=number(0, exclusive=True))
    p.add_argument("--scenes", type=number(100, kind=int), default=20_000, help="of the training")
    p.add_argument("--seed", type=number(0, kind=int), default=0)
    p.add_argument("--device")
    p.add_argument("--bf16", action="store_true")
    p.add_argument("--resume", action="store_true")
    args = p.parse_args()
    fill_in(args, DEFAULTS.get(args.stage, {}))
    args.save_every = args.sample_every = 500
    args.keep = 1
    try:
        args.device = pick_device(args.device)
        args.bf16 = args.bf16 or args.device != "cpu"
        Path(args.out).mkdir(parents=True, exist_ok=True)
        STAGES[args.stage](args)
    except KeyboardInterrupt:
        raise SystemExit(130)
    except (InputError, OSError, Stopped, subprocess.CalledProcessError) as error:
        print(f"make_toy.py: {error}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()

"""Make the toy world's Stable Diffusion, its judges, adapters and pictures, from nothing.

    python tools/make_toy.py vae --out DIR         the autoencoder
    python tools/make_toy.py base --out DIR        text encoder and UNet: text to image, no layouts
    python tools/make_toy.py judges --out DIR      the discriminator's start, and the judges
    python tools/make_toy.py adapters --out DIR    a ControlNet by the noise loss, ALDM from there
    python tools/make_toy.py pictures --out DIR    toy.png and the example layouts

Run them in this order: each fills DIR/toy.safetensors, or uses it. DIR/STAGE (for adapters
DIR/toy_controlnet and DIR/toy_aldm) holds a stage's checkpoints, which --resume continues from. The
shipped base was trained twice: 8,000 steps with the defaults, then, with DIR/base out of the way,
`base --start DIR/toy.safetensors --steps 6800 --lr 6e-4 --scenes 40000`.
"""
import argparse
import copy
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from aldm import PRESETS, Schedule, TextEncoder, load_into, load_weights, save_base
from data import IGNORE, class_table, colorize
from discriminator import UperNet
from sample import from_pixels, generate, load_model
from tools.command import number, whole
from tools.files import refuse, write_png
from tools.judge import JUDGE, Classifier, toy_judges
from tools.make_results import K3, call
from tools.pictures import grid
from tools.run import Run, run_command
from tools.toy_world import DOMAINS, SIDE, SPLITS, toy_scene
from train import autocast, cosine, paint, set_device, update
from unet import UNet
from vae import VAE

SETTINGS = {
    "vae": dict(steps=6000, batch=16, lr=1e-3),
    "base": dict(steps=8000, batch=32, lr=1e-3),
    "judges": dict(steps=1500, batch=8, lr=2e-3),
}


class Scenes:
    """Scenes of the toy world in memory: scene i is number `first` + i, in domains[i % n].

    .images uint8 [count,64,64,3], .labels uint8 [count,64,64], .captions
    """

    def __init__(self, count, domains=DOMAINS, first=SPLITS["train"][0]):
        self.images = np.empty((count, SIDE, SIDE, 3), np.uint8)
        self.labels = np.empty((count, SIDE, SIDE), np.uint8)
        self.captions = []
        for i in tqdm(range(count), "scenes", leave=False):
            scene = toy_scene(first + i, domains[i % len(domains)])
            self.images[i], self.labels[i], caption = scene
            self.captions.append(caption)

    def __len__(self):
        return len(self.captions)

    def draw(self, n):
        """-> the indices of n random scenes."""
        return torch.randint(0, len(self), (n,)).numpy()

    def pixels(self, index, device):
        """-> image [B,3,64,64] in [-1,1]."""
        image = from_pixels(self.images[index], device)
        return image.contiguous(memory_format=torch.channels_last)


# -- what the stages share -------------------------------------------------------------------------


def start_stage(args, modules, columns):
    """-> a Run in DIR/STAGE, and the optimiser of `modules` {name: module}."""
    parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(parameters, args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    run_args = copy.copy(args)
    run_args.out = Path(args.out) / args.stage
    run = Run(run_args, {**modules, "opt": opt}, {"stage": args.stage}, [*columns, "dropped"])
    return run, opt


def descend(args, opt, step, loss, parts):
    """A step of AdamW with clipped gradients; its rate falls by a cosine -> {name: scalar}."""
    opt.param_groups[0]["lr"] = min(1, (step + 1) / 100) * cosine(args.lr, 0, step / args.steps)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], 1.0)
    losses = {name: part.detach() for name, part in parts.items()}
    return {**losses, "dropped": update(opt, losses)}


def write_parts(args, parts, token_ids=None):
    """Put these parts into DIR/toy.safetensors, beside those of other stages."""
    path = Path(args.out) / "toy.safetensors"
    old = load_weights(path) if path.exists() else {}
    save_base(path, {**old, **parts}, token_ids)
    print(f"{path}: {', '.join(parts)} written, {path.stat().st_size / 1e6:.1f} MB")


# -- the autoencoder -------------------------------------------------------------------------------


def make_vae(args):
    """Train it, then shift and scale its latents to zero mean and unit variance as a whole. Like
    Stable Diffusion's they keep a spectrum: coarse structure outlives more noise than detail."""
    torch.manual_seed(args.seed)
    scenes = Scenes(args.scenes)
    vae = VAE(PRESETS["toy"].vae)
    linear_start(vae, scenes.pixels(slice(0, 500), "cpu"))
    vae.to(args.device, memory_format=torch.channels_last)
    run, opt = start_stage(args, {"vae": vae}, ["l1", "kl", "mse"])
    with run:
        for step in run:
            image = scenes.pixels(scenes.draw(args.batch), args.device)
            with autocast(args):
                loss, parts = vae_loss(vae, image)
            run.log(descend(args, opt, step, loss, parts))
    normalize_latents(vae, scenes.pixels(slice(0, 2000), args.device))
    write_parts(args, {"vae": vae})


def vae_loss(vae, x):
    """L1, weighted by local contrast since edges are all that small objects have; a small KL term.

    x [B,3,64,64] -> loss, {name: scalar}
    """
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
    """Initialise as the best linear autoencoder, the principal components of the patches of `image`
    [n,3,64,64], which plain training takes long to find.

    They pass silu as pairs (x, -x), since silu(x) - silu(-x) = x. Residual branches start at 0. A
    pair of large constants makes the last group norm's statistics nearly the same for all images;
    the norm's gain undoes its division.
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
    """The same, followed by its negative and by a pair of large constants."""
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
    """Fold the latents' mean and deviation into the adjacent convolutions: z' = (z - m) / s."""
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
    """Train UNet and text encoder, in all weathers, without layouts. The file gets the running
    average of the weights."""
    path = Path(args.out) / "toy.safetensors"
    preset = PRESETS["toy"]
    vae = VAE(preset.vae).to(args.device)
    load_into(vae, load_weights(path).get("vae", {}), f"{path}: vae")
    scenes = Scenes(args.scenes)
    torch.manual_seed(args.seed)
    text = TextEncoder(**preset.text).to(args.device)
    unet = UNet(preset.unet).to(args.device, memory_format=torch.channels_last)
    if args.start:
        start = load_weights(args.start)
        load_into(text, start.get("text", {}), args.start)
        load_into(unet, start.get("unet", {}), args.start)
    trained = nn.ModuleList([text, unet])
    averaged = copy.deepcopy(trained).requires_grad_(False)
    moments = encode_scenes(vae, scenes, args.device)
    ids, present = tokenize_scenes(text, scenes)

    modules = {"text": text, "unet": unet, "averaged": averaged}
    run, opt = start_stage(args, modules, ["noise"])
    with run:
        for step in run:
            index = torch.randint(0, len(scenes), (args.batch,))
            x0 = vae.draw(*moments[index.to(args.device)].float().chunk(2, dim=1))
            words = choose_words(index, present, len(ids))
            with autocast(args):
                loss = base_loss(text, unet, x0, ids[words.to(args.device)])
            move_average(averaged, trained, step)
            run.log(descend(args, opt, step, loss, {"noise": loss}))
    write_parts(args, {"text": averaged[0], "unet": averaged[1]}, ids.unique())


@torch.no_grad()
def encode_scenes(vae, scenes, device):
    """-> the latents' moments [scenes,2z,16,16], in half precision."""
    moments = []
    for i in tqdm(range(0, len(scenes), 100), "latents", leave=False):
        pixels = scenes.pixels(slice(i, i + 100), device)
        moments.append(torch.cat(vae.moments(pixels), dim=1).half())
    return torch.cat(moments)


def tokenize_scenes(text, scenes):
    """-> ids [scenes + N + 1, 77] of the scenes' captions, of "A photo of {class}" for each of the
    N classes, and of the empty caption; present [scenes,N]: whether a scene shows a class."""
    names = class_table("toy").names
    photos = [f"A photo of {name}" for name in names]
    ids = text.tokenize([*scenes.captions, *photos, ""])
    present = np.stack([(scenes.labels == c).any((1, 2)) for c in range(len(names))], axis=1)
    return ids, torch.from_numpy(present).float()


def choose_words(index, present, captions):
    """Scenes [B] -> which of the `captions` each is trained with [B]: mostly its own; one in ten is
    empty, for guidance; one in seven names a class of the scene, which gives the class embeddings
    their meaning."""
    choice = torch.rand(len(index))
    photo = len(present) + present[index].multinomial(1)[:, 0]
    return index.where(choice > 0.25, photo).where(choice > 0.1, captions - 1)


def base_loss(text, unet, x0, ids):
    """The noise loss. t is spread evenly, which makes the gradient less noisy than independent
    draws. x0 [B,16,16,16], ids [B,77] -> scalar"""
    B = len(x0)
    t = ((torch.arange(B) + torch.rand(1)) * 1000 / B).long().to(x0.device)
    noise = torch.randn_like(x0)
    x_t = Schedule().to(x0.device).add_noise(x0, t, noise)
    return F.mse_loss(unet(x_t, t, text(ids)), noise)


@torch.no_grad()
def move_average(averaged, trained, step):
    """Exponential moving average of the weights, in place: short at first, later 3,000 steps."""
    rate = min(0.9997, (step + 1) / (step + 10))
    torch._foreach_lerp_([*averaged.parameters()], [*trained.parameters()], 1 - rate)


# -- the judges ------------------------------------------------------------------------------------


def make_judges(args):
    """Train the segmenter that the discriminator starts from, on clear days only; and the judges,
    which take part in no other training, in all weathers: a segmenter at full resolution and a
    classifier of the weather."""
    N = len(class_table("toy").names)
    torch.manual_seed(args.seed)
    nets = {
        "segmenter": UperNet(N, **PRESETS["toy"].segmenter),
        "judge": UperNet(N, **JUDGE),
        "domain": Classifier(len(DOMAINS)),
    }
    for net in nets.values():
        net.to(args.device, memory_format=torch.channels_last).train()
    days = Scenes(args.scenes // 5, ("day",))
    scenes = Scenes(args.scenes)
    run, opt = start_stage(args, nets, list(nets))
    with run:
        for step in run:
            day = days.draw(args.batch)
            index = scenes.draw(args.batch)
            with autocast(args):
                losses = judges_losses(args, nets, days, day, scenes, index)
            run.log(descend(args, opt, step, sum(losses.values()), losses))
    write_parts(args, nets)


def judges_losses(args, nets, days, day, scenes, index):
    """The losses of the three networks, by name, on the scenes days[day] and scenes[index]."""
    domain = torch.from_numpy(index % len(DOMAINS)).to(args.device)
    weather = nets["domain"](scenes.pixels(index, args.device)).float()
    return {
        "segmenter": segmentation_loss(nets["segmenter"], days, day, args.device),
        "judge": segmentation_loss(nets["judge"], scenes, index, args.device),
        "domain": F.cross_entropy(weather, domain),
    }


def segmentation_loss(net, scenes, index, device):
    label = torch.from_numpy(scenes.labels[index]).long().to(device)
    logits = net(scenes.pixels(index, device)).float()
    return F.cross_entropy(logits, label, ignore_index=IGNORE)


# -- adapters and pictures -------------------------------------------------------------------------


def make_adapters(args):
    """Train toy_controlnet.safetensors by the noise loss, and from it toy_aldm.safetensors."""
    start = Path(args.out) / "toy_controlnet.safetensors"
    run_train(args, "toy_controlnet", "none", "--discriminator none --lr 1e-3 --steps 1500")
    run_train(args, "toy_aldm", str(start), f"{K3} --steps 1000 --lr-d 5e-5")


def run_train(args, name, init, flags):
    out = Path(args.out)
    command = [sys.executable, str(ROOT / "train.py"), "--device", args.device, "--precision",
               args.precision, "--seed", str(args.seed), "--sd", str(out / "toy.safetensors"),
               "--init", init, "--out", str(out / name), *flags.split()]
    if args.resume:
        command.append("--resume")
    call(command)
    shutil.copy(out / name / "adapter.safetensors", out / f"{name}.safetensors")


@torch.no_grad()
def make_pictures(args):
    """toy.png: layout, real image, noise loss and ALDM with their errors, ALDM in other weathers;
    layout_1..3.png. Prints each adapter's share of wrong pixels on 32 layouts."""
    out = Path(args.out)
    first, _ = SPLITS["val"]
    scenes = Scenes(32, ("day",), first)
    for i in (1, 2, 3):
        write_png(out / f"layout_{i}.png", colorize(scenes.labels[i], "toy"))
    parts = load_weights(out / "toy.safetensors")
    judge = toy_judges(parts, class_table("toy"), args.device).segmenter
    labels = torch.from_numpy(scenes.labels).long()
    shown = [30, 29, 5, 19, 2]
    columns = {"layout": paint(labels[shown], "toy"), "real": scenes.images[shown]}
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


# -- the command line ------------------------------------------------------------------------------

STAGES = {"vae": make_vae, "base": make_base, "judges": make_judges, "adapters": make_adapters,
          "pictures": make_pictures}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawTextHelpFormatter)
    p.error = refuse
    p.add_argument("stage", choices=list(STAGES))
    p.add_argument("--out", required=True, metavar="DIR", help="folder of all that is made")
    p.add_argument("--start", metavar="FILE", help="base: start from this file's UNet and text")
    p.add_argument("--steps", type=whole(1), help="iterations; by default the stage's")
    p.add_argument("--batch", type=whole(1), help="scenes per step; by default the stage's")
    p.add_argument("--lr", type=number(0, exclusive=True), help="by default the stage's")
    p.add_argument("--scenes", type=whole(100), default=20_000, help="of the training (20000)")
    p.add_argument("--seed", type=whole(0), default=0, help="of everything random (0)")
    p.add_argument("--device", help="cpu or cuda; by default cuda if there is one")
    p.add_argument("--precision", choices=["bf16", "fp32"],
                   help="by default bf16 on CUDA, fp32 on a CPU")
    p.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    args = p.parse_args(argv)
    p.set_defaults(save_every=500, keep=1, workers=0, **SETTINGS.get(args.stage, {}))
    return set_device(p.parse_args(argv))


def start():
    args = parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    STAGES[args.stage](args)


def main():
    run_command("make_toy.py", start)


if __name__ == "__main__":
    main()

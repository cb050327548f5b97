"""Layout and prompt -> image, whole data sets of such images, and how good they are.

    python sample.py --layout FILE --prompt "a street at night"     images, and a grid of them
    python sample.py --layouts val --prompts "night scene" "{caption}, in snow" --n 4 --out DIR
                                                                    a labelled data set
    python sample.py --evaluate --limit 128                         a table, a JSON, the images
    python sample.py --serve                                        a page to paint layouts on
    python sample.py --bench                                        seconds and FLOP per image
"""
import os
import signal

if __name__ == "__main__":
    # Ctrl-C during the slow imports below ends without a traceback; `main` catches it later.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    # OpenMP's waiting threads soon sleep, instead of taking the CPU from other programs.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import argparse
import base64
import csv
import fcntl
import io
import json
import math
import re
import resource
import sys
import tempfile
import threading
import time
import zlib
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from aldm import (ALDM, JUDGE, PRESETS, base_file, load_class_embeddings, load_frozen, load_into,
                  load_segmenter, load_weights, pick_device, read_adapter, read_parts)
from data import (ASSETS, DOMAINS, IGNORE, PHRASES, Classes, InputError, check_target, class_table,
                  classes_text, colorize, compose_caption, find_images, open_dataset, read_captions,
                  read_layout, refuse, remove_leftovers, toy_scene, write_png, write_text)
from discriminator import Classifier, UperNet, confusion_matrix, mean_iou
from unet import OFT

ADAPTER = ASSETS / "toy_aldm.safetensors"
CLIP = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
EDITS = ("{caption}, night scene", "{caption}, snowy scene", "{caption}, foggy scene",
         "{caption}, rainy scene")  # what --evaluate asks for, as the authors do


# -- the model -------------------------------------------------------------------------------------


def load_model(path=ADAPTER, sd=None, device="cpu", data=None, embeddings=None):
    """An adapter's file (all that aldm.read_adapter reads) on the frozen Stable Diffusion `sd`
    (None: the preset's own) -> ALDM on `device`, fast, and unfit for training: OFT's rotations go
    into the weights, and on CUDA the UNet and the adapter become bf16.

    data          another dataset than the one that the file names, of the same classes
    embeddings    a file of class embeddings, instead of the adapter's own

    Raises InputError for unusable files.
    """
    meta, parts = read_adapter(path)
    classes = classes_of(meta, path, data)
    device = torch.device(device)
    fast = device.type == "cuda"
    # OFT multiplies the UNet's weights: rotate them in fp32, round afterwards.
    dtype = torch.bfloat16 if fast and meta["adapter"] != "oft" else torch.float32
    unet, vae, text, _ = load_frozen(meta["preset"], sd, device, dtype)
    table = parts.get("layout", {}).get("table")
    if embeddings:
        table = load_class_embeddings(embeddings, classes, text)
    model = ALDM(PRESETS[meta["preset"]], unet, vae, text, classes, meta["adapter"], meta["hint"],
                 table, hint_colors=meta.get("hint_colors"))
    embeds = model.kind in ("controlnet", "oft") and model.layout.hint == "classes"
    if embeddings and not embeds:
        raise InputError(f"--class-embeddings: the hint of {path} has none")
    if embeds and table is None:
        note(f"{path}: has no class embeddings: the text encoder's serve, which differ from the "
             "official ones (Cityscapes: in road, sidewalk, wall and sky): give the file that it "
             "was trained with as --class-embeddings")
    load_into(model.adapter, parts["adapter"], path)
    model.to(device)
    if model.kind == "oft":
        OFT.merge(model.unet)
    if fast:
        model.unet.bfloat16()
        model.adapter.bfloat16()
        model.to(memory_format=torch.channels_last)
    else:
        model.vae.to(memory_format=torch.channels_last)  # on a CPU the UNet gains nothing by it
    return model.requires_grad_(False).eval()


def classes_of(meta, path, data=None):
    """The Classes of the adapter in `path`, by its metadata. `data` may name another dataset, if
    that has the same classes."""
    names = tuple(meta["names"] or ())
    key = data or meta["dataset"]
    if key is None:
        raise InputError(f"{path}: does not say of which dataset it is: name it with --data")
    if not data and names and key not in ("toy", "cityscapes", "ade20k", "coco"):
        file_ids = meta["file_ids"] or [*range(len(names)), *[-1] * (IGNORE - len(names)), IGNORE]
        palette = np.array(meta["palette"], np.uint8)
        void = np.array(meta["void"] or [(0, 0, 0)], np.uint8)
        return Classes(key, names, palette, (None,) * len(names), np.int16(file_ids), void)
    classes = class_table(key)
    if names and classes.names != names:
        raise InputError(f"{path}: is of the {len(names)} classes of {meta['dataset']}, not of the "
                         f"{len(classes.names)} of {key}")
    return classes


@torch.no_grad()
def generate(model, labels, prompts, seeds, negative="", steps=25, cfg=None, eta=0.0, batch=8,
             on_step=None):
    """Sample x_0 by DDIM with guidance, and decode it.

    labels [B,H,W], B prompts, B seeds -> uint8 [B,H,W,3] (numpy). Sides that are not multiples of
    `preset.multiple` pixels are padded with void, and the images cropped back. All randomness of
    an image comes from its own seed, so it depends on no other in the batch (but for rounding).
    on_step(i, x0_hat [b,C,h,w]) is called after each step of each batch of b <= `batch` images.
    """
    device = model.device
    preset = model.preset
    cfg = preset.guidance if cfg is None else cfg
    if eta:
        batch = 1  # stochastic steps draw from the global stream: make it that of one seed
    H, W = labels.shape[1:]
    padding = (0, -W % preset.multiple, 0, -H % preset.multiple)
    labels = F.pad(labels.long(), padding, value=IGNORE)
    shape = preset.vae.z_channels, *(side // preset.vae.factor for side in labels.shape[1:])
    cuda = device.type == "cuda"
    images = []
    for i in range(0, len(labels), batch):
        label = labels[i:i + batch].to(device)
        context = model.text.encode(prompts[i:i + batch])
        uncond = model.text.encode([negative] * len(label))
        with (torch.random.fork_rng([device] if cuda else []),
              torch.autocast(device.type, torch.bfloat16, enabled=cuda)):
            noise = [torch.randn(shape, generator=torch.manual_seed(seed))
                     for seed in seeds[i:i + batch]]
            z = model.sample(label, context, uncond, steps, cfg, torch.stack(noise), eta, on_step)
        images.append(to_pixels(model.vae.decode(z.float())[:, :, :H, :W]))
    return np.concatenate(images)


def to_pixels(image):
    """image [B,3,H,W], about [-1,1] -> uint8 [B,H,W,3] (numpy)"""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def from_pixels(pixels, device):
    """uint8 [B,H,W,3] (numpy) -> image [B,3,H,W] in [-1,1]"""
    return torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def image_seed(seed, name):
    """The seed of the image `name` in a run with --seed `seed`: in every batch the same."""
    return zlib.crc32(f"{seed}/{name}".encode())


# -- pictures and files ----------------------------------------------------------------------------


def grid(rows, titles=()):
    """Rows of uint8 pictures [H,W,3] -> PIL.Image, with gaps of 2 pixels; pictures of up to 128
    pixels are doubled. `titles` stand above the columns, as much of each as there is room for."""
    height = max(pixels.shape[0] for row in rows for pixels in row)
    width = max(pixels.shape[1] for row in rows for pixels in row)
    scale = 2 if max(height, width) <= 128 else 1
    height, width = scale * height + 2, scale * width + 2  # from one picture to the next
    top = 14 if titles else 0
    columns = max(map(len, rows))
    canvas = Image.new("RGB", (columns * width - 2, top + len(rows) * height - 2), "white")
    for i, row in enumerate(rows):
        for j, pixels in enumerate(row):
            picture = Image.fromarray(pixels.repeat(scale, 0).repeat(scale, 1))
            canvas.paste(picture, (j * width, top + i * height))
    pen = ImageDraw.Draw(canvas)
    for j, title in enumerate(titles):
        while pen.textlength(title) > width - 4:
            title = title[:-1]
        pen.text((j * width + 2, 1), title, fill="black")
    return canvas


def draw_curves(log_csv, path, width=320, height=100):
    """log.csv of train.py (step, then losses; a cell is empty where a loss was not computed) -> a
    PNG with a panel per loss that there is, its scale from its least to its largest value. Long
    curves are averaged over neighbouring steps. Without losses there is no file."""
    curves = {}
    with open(log_csv, newline="") as file:
        for row in csv.DictReader(file):
            step = float(row.pop("step"))
            for name, text in row.items():
                value = float(text or "nan")
                if math.isfinite(value):
                    curves.setdefault(name, []).append((step, value))
    if not curves:
        return
    canvas = Image.new("RGB", (width, len(curves) * height), "white")
    pen = ImageDraw.Draw(canvas)
    for panel, (name, points) in enumerate(curves.items()):
        top = panel * height
        step, last = points[-1]
        parts = np.array_split(np.array(points), min(len(points), width // 2))
        points = np.array([part.mean(0) for part in parts])
        low, high = points.min(0), points.max(0)
        x, y = ((points - low) / np.maximum(high - low, 1e-12)).T  # 0..1
        title = f"{name}: {last:.4g} at step {step:.0f} ({low[1]:.3g} to {high[1]:.3g})"
        pen.text((4, top + 2), title, fill="black")
        pen.line(list(zip(4 + x * (width - 8), top + height - 6 - y * (height - 26))), fill="navy")
    write_png(path, canvas)


def note(text):
    """Tell the user something that does not stop the work."""
    print(text, file=sys.stderr)


def make_folder(path):
    """Make a folder where files can be written -> its Path. InputError if that is impossible."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: choose another folder") from None
    if not os.access(path, os.W_OK):
        raise InputError(f"{path}: may not be written to: choose another folder")
    return Path(path)


# -- one layout ------------------------------------------------------------------------------------


def resize_layout(label, preset, size):
    """label [H,W] -> [h,w], its shorter side `size` pixels (None: the preset's training size, if
    the label is larger; 0: as it is)."""
    H, W = label.shape
    if size is None:
        size = min(preset.size, H, W)
    scale = size / min(H, W) if size else 1
    return resize_nearest(label, round(H * scale), round(W * scale))


def resize_nearest(label, height, width):
    """label [H,W] -> [height,width]"""
    picture = Image.fromarray(label.byte().numpy()).resize((width, height), Image.NEAREST)
    return torch.from_numpy(np.array(picture)).long()


def sampling(args):
    """The arguments of `generate` that flags set."""
    return {name: getattr(args, name) for name in ("negative", "steps", "cfg", "eta", "batch")}


def sample_layout(args, model):
    """--layout: n images of one label map, and a grid of layout and images, go to --out."""
    whole = read_layout(args.layout, model.classes)
    label = resize_layout(whole, model.preset, args.size)
    if label.shape != whole.shape:
        note(f"{args.layout}: resized to {label.shape[1]} x {label.shape[0]} pixels; --size 0 "
             "keeps its size")
    out = make_folder(args.out)
    stem = Path(args.layout).stem
    seeds = range(args.seed, args.seed + args.n)
    images = []
    with tqdm(desc="DDIM steps", total=args.n * args.steps) as bar:
        for i in range(0, args.n, args.batch):  # written as they come
            group = seeds[i:i + args.batch]
            images += [*generate(model, label.expand(len(group), -1, -1),
                                 [args.prompt] * len(group), group, **sampling(args),
                                 on_step=lambda _, x0_hat: bar.update(len(x0_hat)))]
            for seed, image in zip(group, images[i:]):
                write_png(out / f"{stem}_{seed}.png", image)
    row = [np.asarray(colorize(label, model.classes)), *images]
    titles = ["layout", *(f"seed {seed}" for seed in seeds)]
    path = out / f"{stem}_{args.seed}_grid.png"
    write_png(path, grid([row], titles))
    print(f"images in {out}, and beside their layout in {path}")


# -- a whole data set ------------------------------------------------------------------------------


def open_split(args, model, split):
    """A split of --data, at the size of the training."""
    if (args.root or args.captions) and model.classes.key == "toy":
        raise InputError("--root and --captions: the toy world has no files")
    size = args.size or model.preset.size
    key = args.data or model.classes.key
    return open_dataset(key, args.root, split, size, captions=args.captions,
                        grid=model.preset.vae.factor, skip_broken=args.skip_broken)


def load_picture(dataset, i):
    """A picture of a data set, uncropped -> dict(image [3,H,W], label [H,W], caption, name)."""
    image, label = dataset.full(i)
    caption = dataset.caption(i, label)
    return dict(image=image, label=label, caption=caption, name=dataset.names[i])


def load_layout(file, caption, model, size):
    """A layout's file, its caption or None -> dict(label [H,W], caption)."""
    label = resize_layout(read_layout(file, model.classes), model.preset, size)
    if isinstance(caption, list):  # COCO's captions: several for each image
        caption = caption[0]
    return dict(label=label, caption=caption or compose_caption(label, model.classes.names))


def open_layouts(args, model):
    """--layouts, a split of --data or a folder of PNGs -> {name: a function that loads it}, which
    returns dict(label, caption)."""
    place = Path(args.layouts)
    if not place.is_dir():
        dataset = open_split(args, model, args.layouts)
        names = dataset.names[:args.limit]
        return {name: partial(load_picture, dataset, i) for i, name in enumerate(names)}
    folder = place / "labels" if (place / "labels").is_dir() else place
    files = find_images(folder)[:args.limit]
    if not files:
        raise InputError(f"--layouts {folder}: no .png in there")
    out = Path(args.out).resolve()
    if {out, out / "labels"} & {place.resolve(), folder.resolve()}:
        raise InputError(f"--out {args.out}: the layouts are there: choose another folder")
    captions = read_captions(place, "", args.captions)
    layouts = {}
    for file in files:
        load = partial(load_layout, file, captions.get(file.stem), model, args.size)
        load()  # what cannot be read is found now, not after hours
        layouts[file.stem] = load
    return layouts


def same_size(items, batch):
    """Dicts with a `label` [H,W] -> lists of at most `batch` of them, each of one size only."""
    waiting = {}
    for item in items:
        size = item["label"].shape
        group = waiting.setdefault(size, [])
        group.append(item)
        if len(group) == batch:
            yield waiting.pop(size)
    yield from waiting.values()


def add_captions(out, new):
    """Put {name: caption} into out/captions.json, one shard's process after the other."""
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        captions = read_captions(out, "") | new
        text = json.dumps(dict(sorted(captions.items())), indent=1, ensure_ascii=False)
        write_text(out / "captions.json", text)


def open_output(args, classes):
    """The folder --out of --layouts. InputError where it holds other data, or images of another
    adapter or of other flags."""
    out = make_folder(args.out)
    path = out / "made.json"
    settings = dict(sampling(args), adapter=str(args.ckpt), seed=args.seed, prompts=args.prompts,
                    size=args.size)
    del settings["batch"]
    if path.exists():
        made = json.loads(path.read_text("utf-8"))
        if made != settings:
            raise InputError(f"{out}: its images were made with {made}: choose another --out")
    elif (out / "images").exists() or (out / "classes.txt").exists():
        raise InputError(f"{out}: holds other images: choose another --out")
    write_text(path, json.dumps(settings, indent=1))
    for folder in (out, make_folder(out / "images"), make_folder(out / "labels")):
        remove_leftovers(folder)
    write_text(out / "classes.txt", classes_text(classes))
    return out


def sample_dataset(args, model):
    """--layouts: n images of each layout with each prompt, as a data set for `--data OUT`: images/,
    labels/, classes.txt, captions.json. What is there is left alone: the same command resumes."""
    layouts = open_layouts(args, model)
    out = open_output(args, model.classes)
    shard, shards = args.shard
    todo = []
    for layout in list(layouts)[shard::shards]:
        for p, prompt in enumerate(args.prompts):
            for k in range(args.n):
                name = f"{layout}_{p}_{k}"
                if not (out / "images" / f"{name}.png").exists():
                    todo.append((layout, name, prompt))
    jobs = (dict(layouts[layout](), name=name, prompt=prompt) for layout, name, prompt in todo)
    with tqdm(total=len(todo), unit="image", dynamic_ncols=True) as bar:
        for group in same_size(jobs, args.batch):
            names = [job["name"] for job in group]
            prompts = [job["prompt"].replace("{caption}", job["caption"]) for job in group]
            labels = torch.stack([job["label"] for job in group])
            seeds = [image_seed(args.seed, name) for name in names]
            images = generate(model, labels, prompts, seeds, **sampling(args))
            add_captions(out, dict(zip(names, prompts)))
            write_pairs(out, names, images, labels)
            bar.update(len(group))
    print(f"{out}: {len(todo)} new images; train on them with --data {out}")


def write_pairs(out, names, images, labels):
    """Images uint8 [B,H,W,3] and labels [B,H,W], as ids -> out/images, out/labels. The image comes
    last: where it is there, the rest is."""
    for name, image, label in zip(names, images, labels):
        write_png(out / "labels" / f"{name}.png", label.byte().numpy())
        write_png(out / "images" / f"{name}.png", image)


# -- how good the images are -----------------------------------------------------------------------


def frechet_distance(mu1, cov1, mu2, cov2):
    """Of two Gaussians, squared as the field reports it: |mu1-mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2).

    mu [C], C [C,C], float64 -> float. C1 C2 has the eigenvalues, all >= 0, of the symmetric
    C1^1/2 C2 C1^1/2.
    """
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return distance.clamp(min=0).item()


def share_among(points, others, k=3):
    """The share of points [M,C] that lie among the others [L,C]: no farther from one of them than
    that one's own k-th neighbour is. Of fakes among the real, it is the precision of Kynkaanniemi
    et al. 2019; of the real among the fakes, the recall."""
    radius = torch.cdist(others, others).kthvalue(k + 1).values  # (the nearest is itself)
    return (torch.cdist(points, others) <= radius).any(1).double().mean().item()


def diversity(features):
    """features [L,n,C] of n samples for each of L layouts -> the mean distance between two samples
    of the layout [L]."""
    n = features.shape[1]
    return torch.cdist(features, features).sum((1, 2)) / (n * (n - 1))


def toy_edit(caption, i):
    """A caption in another domain's words, by turns: "..., in daylight" -> "..., at night", and
    that domain's index."""
    for own, phrases in PHRASES.items():
        for phrase in phrases:
            if phrase in caption:
                others = [domain for domain in DOMAINS if domain != own]
                target = others[i % len(others)]
                edited = caption.replace(phrase, PHRASES[target][0])
                return edited, DOMAINS.index(target)
    target = i % len(DOMAINS)
    return f"{caption}, {PHRASES[DOMAINS[target]][0]}", target


def prompt_edit(prompts, caption, i):
    """The prompts by turns, {caption} filled in, and the index of the prompt."""
    target = i % len(prompts)
    return prompts[target].replace("{caption}", caption), target


class Clip:
    """open_clip's cosines of images and texts."""

    def __init__(self, path, device):
        self.net = open_clip.create_model("ViT-B-32", pretrained=path, device=device).eval()
        self.tokenize = open_clip.get_tokenizer("ViT-B-32")

    def encode_images(self, images):
        """images [B,3,H,W] in [-1,1] -> unit vectors [B,512]"""
        mean = images.new_tensor(open_clip.OPENAI_DATASET_MEAN)[:, None, None]
        std = images.new_tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]
        images = F.interpolate(images, (224, 224), mode="bicubic", antialias=True).clamp(-1, 1)
        return F.normalize(self.net.encode_image(((images + 1) / 2 - mean) / std), dim=1)

    def __call__(self, images, texts):
        """images [B,3,H,W] in [-1,1], P texts -> their cosines [B,P]"""
        said = self.net.encode_text(self.tokenize(texts).to(images.device))
        return self.encode_images(images) @ F.normalize(said, dim=1).T


def draw_samples(model, group, prompts, k, seed, options):
    """The sample called k of each layout of a group, with these prompts -> [b,3,H,W] in [-1,1]."""
    labels = torch.stack([item["label"] for item in group])
    seeds = [image_seed(seed, f"{item['name']}/{k}") for item in group]
    return from_pixels(generate(model, labels, prompts, seeds, **options), model.device)


KINDS = "generated", "edited", "reconstructed", "real"  # of images that are judged


@torch.no_grad()
def evaluate(model, items, judge, classifier=None, edit=toy_edit, targets=DOMAINS, clip=None,
             features=None, n=4, diverse=None, unjudged=(), seed=0, batch=8, folder=None,
             **options):
    """Do images generated from the items' layouts obey them, look real, obey words, and vary?

    items        dicts of image [3,H,W] in [-1,1], label [H,W], caption, name
    judge        an independent segmenter: UperNet with the model's classes
    classifier   images [B,3,H,W] in [-1,1] -> scores [B,len(targets)]: do images of edited prompts
                 show their target? edit(caption, i) -> the i-th layout's edited prompt, and the
                 index of its target. None: left out
    clip         images, B prompts -> their cosines [B,B]; None: the text score is left out
    features     images -> [B,C], for the distances; None: the judge's
    n            samples of each layout; all count
    diverse      quicker: only the first so many layouts (in whole batches) have n samples, for
                 the diversity alone; all else is said of one sample of each layout
    unjudged     names of classes that the judge cannot tell: left out of the mIoU
    folder       where the generated images and their labels are kept; None: nowhere
    options      of `generate`: steps, cfg, ...
    -> dict of plain values, ready for JSON ("reconstructed" images are the autoencoder's: the best
    that generated ones can be); None: cannot be told, as the IoU of a class that is not there
    """
    options["batch"] = batch
    features = features or partial(judge_features, judge)
    found = {kind: [] for kind in KINDS}  # of each batch (features, confusion matrix)
    distances, scores, answers = [], [], []
    layouts = 0
    for group in same_size(items, batch):
        label = torch.stack([item["label"] for item in group])
        captions = [item["caption"] for item in group]
        real = torch.stack([item["image"] for item in group]).to(model.device)
        decoded = model.vae.decode(model.vae.encode(real)).clamp(-1, 1)
        several = n if diverse is None or layouts < diverse else 1
        samples = [draw_samples(model, group, captions, k, seed, options) for k in range(several)]
        judged = samples if diverse is None else samples[:1]
        shown = {"real": [real], "reconstructed": [decoded], "generated": judged}
        if several > 1:
            points = torch.stack([features(images) for images in samples], 1)  # (b, n, C)
            distances += diversity(points).tolist()
        if clip:
            for images in judged:
                scores += clip(images, captions).diag().tolist()
        if folder:
            for k, images in enumerate(samples):
                names = [f"{item['name']}_{k}" for item in group]
                write_pairs(folder, names, to_pixels(images), label)
        if classifier:
            edits = [edit(caption, layouts + i) for i, caption in enumerate(captions)]
            prompts, wanted = zip(*edits)
            images = draw_samples(model, group, list(prompts), "edited", seed, options)
            shown["edited"] = [images]
            answers += zip(wanted, classifier(images).argmax(1).tolist())
        for kind, batches in shown.items():
            for images in batches:
                confusion = ask_judge(judge, images, label, model.classes)
                found[kind].append((features(images).double().cpu(), confusion))
        layouts += len(group)
    return {"layouts": layouts, "clip_score": mean(scores), "diversity": mean(distances),
            **summarize_judgement(found, model.classes.names, unjudged),
            **summarize_answers(answers, targets if classifier else ())}


def judge_features(judge, images):
    """images [B,3,H,W] -> [B,C]: the last map of the judge's encoder, averaged over its places"""
    return judge.features(images)[-1].mean((2, 3))


def ask_judge(judge, images, label, classes):
    """images [b,3,H,W] against label [b,H,W] -> what the judge takes the classes for [N,N], a row
    per true class. Its outputs beyond N are passed over."""
    N = len(classes.names)
    found = judge(images)[:, :N].argmax(1).cpu()
    return confusion_matrix(found, label, N)


def summarize_judgement(found, names, unjudged):
    """found: kind of image -> list of (features, confusion) -> mIoU, IoU and distances."""
    result = {}
    for kind in KINDS:
        if found[kind]:
            _, iou = mean_iou(sum(confusion for _, confusion in found[kind]))
            iou[[names.index(name) for name in unjudged]] = math.nan
            result[f"mIoU_{kind}"] = rounded(iou.nanmean().item())
            result[f"IoU_{kind}"] = dict(zip(names, map(rounded, iou.tolist())))
    real = torch.cat([features for features, _ in found["real"]])
    fake = torch.cat([features for features, _ in found["generated"]])
    result |= dict(frechet_distance=None, precision=None, recall=None)
    if len(real) > 3:  # else too few to tell
        moments = real.mean(0), torch.cov(real.T), fake.mean(0), torch.cov(fake.T)
        result["frechet_distance"] = rounded(frechet_distance(*moments))
        result["precision"] = rounded(share_among(fake, real))
        result["recall"] = rounded(share_among(real, fake))
    return result


def summarize_answers(answers, targets):
    """answers: pairs of the target's index and what the classifier says -> editability: the share
    of its answers that are right, of all and of each target."""
    hits = [said == wanted for wanted, said in answers]
    each = {target: mean([said == i for wanted, said in answers if wanted == i])
            for i, target in enumerate(targets)}
    return {"editability": mean(hits), "editability_of": each}


def rounded(value):
    """For JSON, which has no nan."""
    return None if math.isnan(value) else round(value, 5)


def mean(values):
    return rounded(sum(values) / len(values)) if values else None


def toy_judges(parts, device):
    """The parts of the toy's base file -> its judge, and its classifier of DOMAINS."""
    judge = UperNet(len(class_table("toy").names), **JUDGE)
    classifier = Classifier(len(DOMAINS))
    load_into(judge, parts["judge"], "judge")
    load_into(classifier, parts["domain"], "domain")
    return judge.to(device).eval(), classifier.to(device).eval()


def load_judge(files, preset, classes):
    """--judge, a segmenter of ours or mit-semseg's two files -> UperNet, and the names of the
    classes that it cannot tell: an ADE20K segmenter has one output for several of them, or none."""
    shape = preset.segmenter
    unjudged = []
    _, meta = read_parts(files[0])
    if meta.get("format") == "aldm-segmenter":
        if tuple(meta["names"]) != classes.names:
            raise InputError(f"--judge {files[0]}: knows the {len(meta['names'])} classes of "
                             f"{meta['dataset']}, not those of {classes.key}")
        shape = PRESETS[meta["preset"]].segmenter
    elif len(files) == 2 and classes.names != class_table("ade20k").names:
        unjudged = [name for name, ade in zip(classes.names, classes.ade)
                    if ade is None or classes.ade.count(ade) > 1]
        note(f"--judge: knows ADE20K's classes: {', '.join(unjudged)} are left out of the mIoU")
    judge = UperNet(len(classes.names), **shape)
    judge.decoder.conv_last[1].bias.data.fill_(-1e4)  # classes that no file has are never seen
    load_segmenter(files, judge, classes)
    return judge.eval(), unjudged


def is_toy(model):
    return model.preset == PRESETS["toy"] and model.classes.names == class_table("toy").names


def choose_judges(args, model):
    """--judge, --prompts, and what there is on this machine -> those arguments of `evaluate` that
    judge, by name."""
    chosen = {}
    parts = load_weights(args.sd or base_file("toy")) if is_toy(model) else {}
    if "judge" in parts:
        chosen["judge"], chosen["classifier"] = toy_judges(parts, model.device)
    if args.judge:
        judge, chosen["unjudged"] = load_judge(args.judge, model.preset, model.classes)
        chosen["judge"] = judge.to(model.device)
    if not chosen:
        raise InputError("--evaluate needs a segmenter that the training has not seen: name its "
                         "file, or files, with --judge")
    path = try_to_load_from_cache(CLIP, "open_clip_model.safetensors")
    if not isinstance(path, str):
        missing = f"{CLIP} is not in the Hugging Face cache"
        if args.features == "clip" or args.prompts:
            raise InputError(f"--features clip, --prompts: {missing}")
        note(f"{missing}: its figures are left out")
        return chosen
    chosen["clip"] = Clip(path, model.device)
    if args.features == "clip":
        chosen["features"] = chosen["clip"].encode_images
    if args.prompts or "classifier" not in chosen:
        prompts = args.prompts or EDITS
        targets = [prompt.replace("{caption}", "").strip(" ,") or prompt for prompt in prompts]
        chosen |= dict(targets=targets, classifier=partial(chosen["clip"], texts=targets),
                       edit=partial(prompt_edit, prompts))
    return chosen


def sample_and_judge(args, model):
    """--evaluate: a table, the same as JSON, and the images."""
    if args.json:
        check_target(args.json)
    dataset = open_split(args, model, args.split)
    judges = choose_judges(args, model)
    out = make_folder(args.out)
    path = Path(args.json or out / "evaluation.json")
    make_folder(out / "labels")
    if find_images(make_folder(out / "images")):
        raise InputError(f"--out {out}: has images already: choose another folder")
    count = len(dataset.names[:args.limit])
    settings = dict(sampling(args), n=args.n, seed=args.seed)
    items = (load_picture(dataset, i) for i in tqdm(range(count), unit="layout"))
    result = evaluate(model, items, **judges, **settings, folder=out)
    show(result)  # before it is written, as the disk may be full
    about = dict(adapter=str(args.ckpt), data=args.data or model.classes.key, split=args.split)
    write_text(path, json.dumps({**result, **settings, **about}, indent=1))
    print(f"written to {path}; the images are in {out}")


def show(result):
    """The table of --evaluate: a row per class that is there, a column per kind of image."""
    kinds = [kind for kind in KINDS if f"mIoU_{kind}" in result]
    rows = {f"{result['layouts']} layouts": kinds}
    rows["mIoU"] = [result[f"mIoU_{kind}"] for kind in kinds]
    for name, iou in result["IoU_real"].items():
        if iou is not None:
            rows[f"  {name}"] = [result[f"IoU_{kind}"][name] for kind in kinds]
    for name in ("frechet_distance", "precision", "recall", "diversity", "clip_score",
                 "editability"):
        rows[name.replace("_", " ")] = [result[name]]
    for target, share in result["editability_of"].items():
        rows[f"  {target}"] = [share]
    for name, values in rows.items():
        print(name.ljust(20) + "".join(str(value).rjust(14) for value in values))


# -- how fast --------------------------------------------------------------------------------------


def bench(args, model):
    """--bench: seconds, TFLOP and memory of sampling."""
    side = args.size or model.preset.size
    label = torch.full((args.batch, side, side), IGNORE)
    sample = partial(generate, model, label, [args.prompt] * args.batch, range(args.batch),
                     **sampling(args))
    flops, seconds, peak = measure(sample, model.device, repeat=1)
    tflop, seconds = flops / args.batch / 1e12, seconds / args.batch
    print(f"{device_name(model.device)}: {side} x {side} pixels, batch {args.batch}, "
          f"{args.steps} steps, guidance {args.cfg:g}")
    print(f"{seconds:.4g} s per image, {tflop:.4g} TFLOP, {tflop / seconds:.3g} TFLOP/s, "
          f"{peak:.2f} GiB peak")


def measure(run, device, repeat):
    """-> FLOP by PyTorch's count, median seconds, peak memory in GiB (on a CPU the process's) of
    run(), after one run to warm up."""
    with FlopCounterMode(display=False) as counter:
        run()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if cuda:
        peak = torch.cuda.max_memory_allocated(device)
    return counter.get_total_flops(), sorted(seconds)[repeat // 2], peak / 2 ** 30


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


# -- the page to paint layouts on ------------------------------------------------------------------

PAGE = ASSETS / "paint.html"
BODY = 4 * 2 ** 20  # bytes of a layout at most; a painted 512 x 1024 takes a small part of it
PREVIEWS = 6  # estimates decoded on the way: on a CPU that takes as long as a step
POLICY = ("default-src 'self' 'unsafe-inline' data:; base-uri 'none'; form-action 'none'; "
          "frame-ancestors 'none'")


def read_bytes(content, name, classes):
    """What is in a layout's file of this name -> label [H,W]."""
    # read_layout takes files, and their names tell the kinds of ids
    kind = re.search("labelTrainIds|labelIds|$", name)[0]
    with tempfile.NamedTemporaryFile(suffix=f"_{kind}.png") as file:
        file.write(content)
        file.flush()
        try:
            return read_layout(file.name, classes)
        except InputError as error:
            raise InputError(str(error).replace(file.name, "the layout")) from None


def read_words(given):
    """A request's fields, texts -> prompt, negative, seed, steps, cfg."""
    words = dict(prompt=given.get("prompt", ""), negative=given.get("negative", ""))
    for key, parse in (("seed", number(0, 2 ** 32 - 1, int)), ("steps", number(1, 1000, int)),
                       ("cfg", number(0, 50))):
        try:
            words[key] = parse(given.get(key, ""))
        except argparse.ArgumentTypeError as error:
            raise InputError(f"{key} {error}") from None
    return words


def base64_text(content):
    return base64.b64encode(content).decode()


def base64_png(pixels):
    """uint8 [H,W,3]"""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return base64_text(file.getvalue())


class PageServer(ThreadingHTTPServer):
    """page (bytes), size of its canvas, model, lock (of whoever uses the model)"""

    def handle_error(self, request, client_address):
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):  # an OSError: the client has gone
            note(f"a request failed: {error!r}")


class PageHandler(BaseHTTPRequestHandler):
    """GET is the page. POST /layout?name=... reads a layout's file, the request's body; POST
    /generate?prompt=... paints such a layout, and streams lines of JSON, one for each step."""
    timeout = 30  # seconds without a byte from a client, or to one

    def log_message(self, *args):
        pass

    def answer(self, code, kind, body=b""):
        """The connection's end is the body's end: more may follow."""
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()
        self.wfile.write(body)

    def send(self, **line):
        self.wfile.write(json.dumps(line).encode() + b"\n")

    def check_origin(self):
        """Pages of other sites get nothing, neither by their own name nor by one of theirs that
        points here."""
        port = self.server.server_port
        hosts = f"127.0.0.1:{port}", f"localhost:{port}"
        origins = None, f"http://{hosts[0]}", f"http://{hosts[1]}"
        if self.headers["Host"] not in hosts or self.headers["Origin"] not in origins:
            raise InputError(f"only for {origins[1]} (forward a port to the same number)")

    def do_GET(self):
        try:
            self.check_origin()
            self.answer(200, "text/html; charset=utf-8", self.server.page)
        except InputError as error:
            self.answer(400, "text/plain", str(error).encode())

    def do_POST(self):
        try:
            content = self.read_body()
            self.check_origin()
            url = urlsplit(self.path)
            given = dict(parse_qsl(url.query))
            layout = read_bytes(content, given.get("name", ""), self.server.model.classes)
            label = resize_nearest(layout, *self.server.size)
            words = read_words(given) if url.path == "/generate" else None
        except (InputError, OSError) as error:  # an OSError: no room for the layout's file
            self.answer(400, "application/json")
            return self.send(error=str(error))
        self.answer(200, "application/x-ndjson")
        if words is None:
            text = base64_text(label.byte().numpy().tobytes())
            return self.send(layout=text, size=layout.shape[::-1])
        with self.server.lock:
            self.paint(label, **words)

    def read_body(self):
        length = self.headers["Content-Length"] or ""
        if not re.fullmatch("[0-9]{1,12}", length) or int(length) > BODY:
            raise InputError(f"a request must say its length, at most {BODY} bytes")
        return self.rfile.read(int(length))

    def send_step(self, steps, i, x0_hat):
        """After each of the steps: a line, and some estimates as images."""
        line = dict(step=i + 1, of=steps)
        if i % (steps // PREVIEWS + 1) == 0:
            image = self.server.model.vae.decode(x0_hat.float())
            line["image"] = base64_png(to_pixels(image)[0])
        self.send(**line)

    def paint(self, label, prompt, negative, seed, steps, cfg):
        """Send what becomes of label [H,W]."""
        model, start = self.server.model, time.time()
        try:
            cut = model.text.cut(prompt)
            if cut:
                self.send(note=f"the prompt is too long: the model does not see its end, {cut}")
            image = generate(model, label[None], [prompt], [seed], negative, steps, cfg,
                             on_step=partial(self.send_step, steps))[0]
        except (RuntimeError, ValueError) as error:  # such as a full memory of the card
            return self.send(error=f"the generation failed: {' '.join(str(error).split()):.300}")
        self.send(image=base64_png(image), done=True, seconds=time.time() - start)


def painter(model, port, examples, prompts, steps, cfg):
    """The page's server, for this machine only. examples: labels [H,W] of one size, whose classes
    are offered first; without any, the canvas is the preset's square."""
    height, width = examples[0].shape if examples else (model.preset.size,) * 2
    world = dict(names=model.classes.names, palette=model.classes.palette.tolist(),
                 examples=[base64_text(label.tobytes()) for label in examples],
                 height=height, width=width, prompts=prompts, steps=steps, cfg=cfg, limit=BODY)
    text = json.dumps(world).replace("<", "\\u003c")  # no name ends the script
    server = PageServer(("127.0.0.1", port), PageHandler)
    server.page = PAGE.read_text("utf-8").replace("__WORLD__", text).encode()
    server.model, server.size, server.lock = model, (height, width), threading.Lock()
    return server


def serve(args, model):
    """--serve: the page, until Ctrl+C."""
    examples, prompts = [], []
    if is_toy(model):
        examples = [toy_scene(10_000_001 + i)[1] for i in range(12)]
    if model.classes.key in ("toy", "cityscapes"):
        prompts = ["a street on a clear day", "a street at night", "a street in snow"]
    try:
        server = painter(model, args.port, examples, prompts, args.steps, args.cfg)
    except OSError as error:
        raise InputError(f"port {args.port}: {error.strerror}: choose another --port") from None
    print(f"paint a layout at http://127.0.0.1:{server.server_port} (Ctrl+C ends)", flush=True)
    with server:
        server.serve_forever()


# -- the command line ------------------------------------------------------------------------------


def number(low, high=math.inf, kind=float, exclusive=False):
    """An argparse type: a finite number of `kind` in [low, high], or in (low, high]."""
    wanted = "a whole number" if kind is int else "a number"
    wanted += f" above {low}" if exclusive else f" from {low}"
    if high < math.inf:
        wanted += f" to {high}"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        inside = low <= value <= high and value < math.inf  # not so for nan
        if not inside or exclusive and value == low:
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text!r}")
        return value
    return parse


def utf8(text):
    """An argparse type: a text that can be written to files."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"is not UTF-8: {text!r}") from None
    return text


def shard(text):
    """An argparse type: "i/n" with 0 <= i < n -> i, n"""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"must be a shard i/n with 0 <= i < n, not {text!r}")
    return int(found[1]), int(found[2])


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = refuse
    mode = p.add_mutually_exclusive_group(required=True)
    mode.add_argument("--layout", metavar="FILE", help="a label map: ids or colours, PNG")
    mode.add_argument("--layouts", metavar="DIR|SPLIT",
                      help="make a labelled data set of a folder's layouts, or a split's of --data")
    mode.add_argument("--evaluate", action="store_true", help="judge images of --split's layouts")
    mode.add_argument("--serve", action="store_true", help="a page to paint layouts on")
    mode.add_argument("--bench", action="store_true", help="how fast is sampling?")
    add = p.add_argument
    add("--prompt", type=utf8, default="", help="what to paint; may be empty")
    add("--negative", type=utf8, default="", help="what guidance leads away from")
    add("--prompts", type=utf8, nargs="+", help="of --layouts: one or more for each; {caption} "
        "is its own (default: {caption}). Of --evaluate: what edited prompts ask for")
    add("--ckpt", "--adapter", default=ADAPTER, help="an adapter, or a run's folder")
    add("--sd", metavar="FILE", help="Stable Diffusion 1.x (default: downloaded; toy: in assets/)")
    add("--preset", choices=list(PRESETS), help="refuse adapters of any other")
    add("--class-embeddings", metavar="FILE", help="what an official adapter was trained with")
    add("--data", help="toy (or toy:night, ...), cityscapes, ade20k, coco or a folder (default: "
        "the adapter's)")
    add("--root", metavar="DIR", help="where the files of --data are")
    add("--captions", metavar="FILE", help="JSON, name -> caption, as train.py's")
    add("--skip-broken", action="store_true", help="leave out the pairs that the check names")
    add("--split", default="val", help="of --evaluate (val)")
    add("--limit", type=number(1, kind=int), help="only the first so many layouts")
    add("--shard", type=shard, default=(0, 1), metavar="i/n", help="each n-th layout from the i-th "
        "on: for n processes")
    add("--out", metavar="DIR", default="samples", help="(samples)")
    add("--json", metavar="FILE", help="of --evaluate (default: evaluation.json in --out)")
    add("--n", type=number(1, kind=int), help="images per layout (default: 1; --evaluate: 2)")
    add("--seed", type=number(0, 2 ** 32 - 1, int), default=0, help="of --layout's first image; "
        "elsewhere mixed with each image's name (0)")
    add("--steps", type=number(1, 1000, int), default=25, help="of DDIM (25)")
    add("--cfg", type=number(0), help="guidance scale, 1 for none (toy: 5, sd15: 7.5)")
    add("--eta", type=number(0, 1), default=0.0, help="0: deterministic, 1: as noisy as DDPM")
    add("--size", type=number(0, kind=int), help="shorter side in pixels (default: the training "
        "size, or a smaller file's own); 0: a file's own")
    add("--batch", type=number(1, kind=int), default=8, help="images at a time (8)")
    add("--judge", nargs="+", metavar="FILE", help="segmenter that judges: one of train.py's, or "
        "mit-semseg's encoder and decoder")
    add("--features", choices=["judge", "clip"], default="judge", help="of the Frechet distance")
    add("--port", type=number(0, 65535, int), default=8000, help="of --serve")
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    args = p.parse_args(argv)
    if args.n is None:
        args.n = 2 if args.evaluate else 1
    if args.layouts and not args.prompts:
        args.prompts = ["{caption}"]
    if args.prompts and not (args.layouts or args.evaluate):
        refuse("--prompts: is of --layouts and --evaluate: give --prompt")
    if args.prompt and (args.layouts or args.evaluate):
        refuse("--prompt: is of --layout: give --prompts")
    if args.layout and not Path(args.layout).is_file():  # said before large files are read
        refuse(f"{args.layout}: there is no such file")
    return args


def open_model(args):
    """The model that flags name; sets the guidance that it is used with, where no flag does."""
    device = pick_device(args.device)
    model = load_model(args.ckpt, args.sd, device, data=args.data,
                       embeddings=args.class_embeddings)
    if args.preset and model.preset != PRESETS[args.preset]:
        raise InputError(f"{args.ckpt}: is not of the {args.preset} preset")
    if args.cfg is None:
        args.cfg = model.preset.guidance
    for prompt in [args.prompt, args.negative, *(args.prompts or [])]:
        cut = model.text.cut(prompt)
        if cut:
            note(f"a prompt is longer than the 77 tokens that the model reads; cut off is: {cut}")
    return model


def run(args):
    model = open_model(args)
    if args.layout:
        sample_layout(args, model)
    elif args.layouts:
        sample_dataset(args, model)
    elif args.evaluate:
        sample_and_judge(args, model)
    elif args.serve:
        serve(args, model)
    else:
        bench(args, model)


def main():
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no UTF-8
        run(parse_args())
    except InputError as error:
        note(f"sample.py: {error}")
        raise SystemExit(2)
    except torch.OutOfMemoryError:
        note("sample.py: out of GPU memory: choose a smaller --batch or --size")
        raise SystemExit(1)
    except OSError as error:  # such as a full disk: nothing is half-written
        note(f"sample.py: {error}")
        raise SystemExit(1)
    except KeyboardInterrupt:
        raise SystemExit(130)


if __name__ == "__main__":
    main()

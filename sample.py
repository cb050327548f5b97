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
    # OpenMP's threads sleep while they wait, instead of taking the CPU from other programs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import base64
import csv
import fcntl
import io
import json
import math
import platform
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

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from aldm import (ALDM, JUDGE, PRESETS, atomic, base_file, check_target, load_class_embeddings,
                  load_frozen, load_into, load_segmenter, load_weights, pick_device, read_adapter,
                  read_parts, remove_leftovers)
from data import (ASSETS, DOMAINS, IGNORE, PHRASES, Classes, InputError, class_table, classes_text,
                  colorize, compose_caption, find_images, open_dataset, read_captions, read_layout,
                  refuse, toy_scene)
from discriminator import Classifier, UperNet, confusion_matrix, mean_iou
from unet import OFT

ADAPTER = ASSETS / "toy_aldm.safetensors"
GUIDANCE = {"toy": 5.0, "sd15": 7.5}        # --cfg where none is given
MAX_PIXELS = 4 * 2 ** 20                    # of one image
WEATHER = ("{caption}, night scene", "{caption}, snowy scene", "{caption}, foggy scene",
           "{caption}, rainy scene")        # what --evaluate asks for, as the authors do


# -- the model ------------------------------------------------------------------------------------


def load_model(path=ADAPTER, sd=None, device="cpu", merge=True):
    """An adapter's file (all that aldm.read_adapter reads) on the frozen Stable Diffusion `sd`
    (None: the preset's own) -> ALDM, see `build_model`. Raises InputError for unusable files."""
    meta, parts = read_adapter(path)
    return build_model(meta, parts, path, classes_of(meta, path), sd, device, merge)


def build_model(meta, parts, path, classes, sd=None, device="cpu", merge=True, embeddings=None):
    """What aldm.read_adapter has read from `path` -> ALDM on `device`, ready for sampling.

    merge         make it fast, and unfit for training: OFT's rotations go into the weights, and
                  on CUDA the UNet and the adapter become bf16
    embeddings    a file of class embeddings, where the adapter's own file has none
    """
    device = torch.device(device)
    fast = merge and device.type == "cuda"
    # OFT multiplies the UNet's weights: rotate them in fp32, round afterwards.
    dtype = torch.bfloat16 if fast and meta["adapter"] != "oft" else torch.float32
    unet, vae, text, _ = load_frozen(meta["preset"], sd, device, dtype)
    table = parts.get("layout", {}).get("table")
    if embeddings:
        table = load_class_embeddings(embeddings, classes, text)
    model = ALDM(PRESETS[meta["preset"]], unet, vae, text, classes, meta["adapter"], meta["hint"],
                 table, hint_colors=meta.get("hint_colors"))
    load_into(model.adapter, parts["adapter"], path)
    model.to(device)
    if merge and meta["adapter"] == "oft":
        OFT.merge(model.unet)
    if fast:
        model.unet.bfloat16()
        model.adapter.bfloat16()
        model.to(memory_format=torch.channels_last)
    else:
        model.vae.to(memory_format=torch.channels_last)     # on a CPU the UNet gains nothing by it
    return model.requires_grad_(False).eval()


def classes_of(meta, path, data=None):
    """The Classes of the adapter in `path`, by its metadata. `data` may name another dataset, if
    that has the same classes."""
    names, key = tuple(meta["names"] or ()), data or meta["dataset"]
    if key is None:
        raise InputError(f"{path}: does not say of which dataset it is: name it with --data")
    if data or not names or key in ("toy", "cityscapes", "ade20k", "coco"):
        classes = class_table(key)
        if names and classes.names != names:
            raise InputError(f"{path}: is of {meta['dataset']}, {len(names)} classes "
                             f"({', '.join(names[:3])}, ...), not of {key}, "
                             f"{len(classes.names)} ({', '.join(classes.names[:3])}, ...)")
        return classes
    palette = np.array(meta["palette"], np.uint8)
    file_ids = np.full(256, -1, np.int16)           # a folder's: the ids are the classes
    file_ids[:len(names)] = np.arange(len(names))
    file_ids[IGNORE] = IGNORE
    black = np.zeros((1, 3), np.uint8)
    return Classes(key, names, palette, (None,) * len(names), file_ids, black)


def default_guidance(preset):
    """The guidance scale where none is given."""
    for name, scale in GUIDANCE.items():
        if PRESETS[name] == preset:
            return scale
    return 1.0


@torch.no_grad()
def generate(model, labels, prompts, seeds, negative="", steps=25, cfg=None, eta=0.0, batch=8,
             on_step=None):
    """Sample x_0 by DDIM with guidance, and decode it.

    labels [B,H,W], B prompts, B seeds -> uint8 [B,H,W,3] (numpy). Sides that are not multiples of
    `preset.multiple` pixels are padded with void, and the images cropped back. All randomness of
    an image comes from its own seed, so it depends on no other in the batch (but for rounding).
    on_step(i, x0_hat [b,C,h,w]) is called after each step of each batch of b <= `batch` images.
    """
    device, preset = model.device, model.preset
    if cfg is None:
        cfg = default_guidance(preset)
    if eta:
        batch = 1       # stochastic steps draw from the global stream: make it that of one seed
    labels = torch.as_tensor(labels).long()
    H, W = labels.shape[1:]
    padding = (0, -W % preset.multiple, 0, -H % preset.multiple)
    labels = F.pad(labels, padding, value=IGNORE)
    h, w = (side // preset.vae.factor for side in labels.shape[1:])
    cuda = device.type == "cuda"
    images = []
    for i in range(0, len(labels), batch):
        label = labels[i:i + batch].to(device)
        context = model.text.encode(prompts[i:i + batch])
        uncond = model.text.encode([negative] * len(label))
        with (torch.random.fork_rng([device] if cuda else []),
              torch.autocast(device.type, torch.bfloat16, enabled=cuda)):
            noise = torch.stack([torch.randn((preset.vae.z_channels, h, w),
                                             generator=torch.manual_seed(seed))
                                 for seed in seeds[i:i + batch]])
            z = model.sample(label, context, uncond, steps, cfg, noise, eta, on_step)
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
    return zlib.crc32(f"{seed}/{name}".encode(errors="surrogateescape"))


# -- pictures and files ---------------------------------------------------------------------------


def grid(rows, titles=()):
    """Rows of uint8 pictures [H,W,3] -> PIL.Image, with gaps of 2 pixels; pictures of up to 128
    pixels are doubled. `titles` stand above the columns, as much of each as there is room for."""
    height = max(pixels.shape[0] for row in rows for pixels in row)
    width = max(pixels.shape[1] for row in rows for pixels in row)
    scale = 2 if max(height, width) <= 128 else 1
    height, width = scale * height + 2, scale * width + 2       # from one picture to the next
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
    PNG with a panel per loss, its scale from its least to its largest value. Long curves are
    averaged over neighbouring steps. Without rows there is nothing to draw, and no file."""
    with open(log_csv, newline="") as file:
        rows = list(csv.DictReader(file))
    names = list(rows[0])[1:] if rows else []
    if not names:
        return
    canvas = Image.new("RGB", (width, len(names) * height), "white")
    pen = ImageDraw.Draw(canvas)
    for panel, name in enumerate(names):
        top = panel * height
        points = [(float(row["step"]), float(row[name])) for row in rows if row[name]]
        points = np.array([point for point in points if math.isfinite(point[1])])
        if not len(points):
            pen.text((4, top + 2), f"{name}: none yet", fill="black")
            continue
        step, last = points[-1]
        parts = np.array_split(points, min(len(points), width // 2))
        points = np.array([part.mean(0) for part in parts])
        low, high = points.min(0), points.max(0)
        x, y = ((points - low) / np.maximum(high - low, 1e-12)).T      # 0..1
        title = f"{name}: {last:.4g} at step {step:.0f} ({low[1]:.3g} to {high[1]:.3g})"
        pen.text((4, top + 2), title, fill="black")
        pen.line(list(zip(4 + x * (width - 8), top + height - 6 - y * (height - 26))), fill="navy")
    write_png(path, canvas)


def note(text):
    """Tell the user something that does not stop the work."""
    print(text, file=sys.stderr)


def write_png(path, image):
    """image: a PIL.Image, or uint8 [H,W] or [H,W,3]. The file is there whole or not at all."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    with atomic(path) as temporary:
        image.save(temporary, format="PNG")


def write_text(path, text):
    """The file is there whole or not at all."""
    with atomic(path) as temporary:
        Path(temporary).write_text(text, "utf-8")


def make_folder(path):
    """Make a folder where files can be written -> its Path. InputError if that is impossible."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: choose another folder") from None
    if not os.access(path, os.W_OK):
        raise InputError(f"{path}: may not be written to: choose another folder")
    return Path(path)


def safe_name(name):
    """A file name that leads out of no folder, from the name of an item."""
    return re.sub(r"[^\w.-]", "_", name).lstrip(".") or "_"


# -- one layout -----------------------------------------------------------------------------------


def resize_layout(label, preset, size, what, say=True):
    """label [H,W] -> [h,w], by nearest, its shorter side `size` pixels (None: the preset's
    training size, if the label is larger; 0: as it is). Says what is done, here and by `generate`.
    Raises InputError where that is too large to sample."""
    H, W = label.shape
    if size is None:
        size = min(preset.size, H, W)
    scale = size / min(H, W) if size else 1
    h, w = round(H * scale), round(W * scale)
    if h * w > MAX_PIXELS:
        raise InputError(f"{what}: {w} x {h} pixels are too many to sample (at most "
                         f"{MAX_PIXELS >> 20} Mpixel): give a smaller --size")
    if say and (h, w) != (H, W):
        note(f"{what}: {W} x {H} pixels, resized to {w} x {h} (--size 0 keeps it as it is)")
    m = preset.multiple
    if say and (h % m or w % m):
        note(f"{what}: {w} x {h}, padded with void to {w + -w % m} x {h + -h % m} "
             f"(multiples of {m}), images cropped")
    picture = Image.fromarray(np.asarray(label, np.uint8)).resize((w, h), Image.NEAREST)
    return torch.from_numpy(np.array(picture)).long()


def sampling(args):
    """The arguments of `generate` that flags set."""
    return {name: getattr(args, name) for name in ("negative", "steps", "cfg", "eta", "batch")}


def sample_layout(model, label, args):
    """--layout: n images of one label map [H,W], and a grid of layout and images, go to --out."""
    out, stem = Path(args.out), Path(args.layout).stem
    seeds = range(args.seed, args.seed + args.n)
    batch = 1 if args.eta else args.batch
    with tqdm(total=args.steps * math.ceil(args.n / batch), desc="DDIM steps") as bar:
        images = generate(model, label.expand(args.n, -1, -1), [args.prompt] * args.n, seeds,
                          **sampling(args), on_step=lambda i, x0_hat: bar.update())
    layout = np.asarray(colorize(label, model.classes))
    titles = ["layout", *(f"seed {seed}" for seed in seeds)]
    files = {f"{stem}_{seed}.png": image for seed, image in zip(seeds, images)}
    files[f"{stem}_{args.seed}_grid.png"] = grid([[layout, *images]], titles)
    for name, image in files.items():
        write_png(out / name, image)
    print(f"{out}: {', '.join(files)}")


# -- a whole data set -----------------------------------------------------------------------------


def open_split(args, preset, classes, split):
    """A split of --data, uncropped, at the size of the training -> dataset,
    load(i) -> dict(image [3,H,W], label [H,W], caption, name)."""
    key = args.data or classes.key
    size = args.size or preset.size
    dataset = open_dataset(key, args.root, split, size, grid=preset.vae.factor)

    def load(i):
        name = dataset.names[i]
        image, label = dataset.full(i)
        return dict(image=image, label=label, caption=dataset.caption(i, label), name=name)
    return dataset, load


def open_layouts(args, preset, classes):
    """--layouts, a split of --data or a folder of PNGs -> names, load(i) -> dict(label, caption).
    A layout that cannot be read is found here, not after hours."""
    place = Path(args.layouts)
    if not place.is_dir():
        if os.sep in args.layouts:
            raise InputError(f"--layouts {args.layouts}: no such folder")
        dataset, load = open_split(args, preset, classes, args.layouts)
        return dataset.names[:args.limit], load
    folder = place / "labels" if (place / "labels").is_dir() else place
    files = find_images(folder)
    if not files:
        raise InputError(f"--layouts {folder}: no .png in there: name a folder with layouts, or a "
                         "split of --data")
    out = Path(args.out)
    if folder.resolve() in (out.resolve(), (out / "labels").resolve()):
        raise InputError(f"--out {args.out}: the layouts are there: choose another folder")
    captions, files = read_captions(place, "", None), files[:args.limit]

    def load(i, say=False):
        label = read_layout(files[i], classes)
        label = resize_layout(label, preset, args.size, files[i], say)
        caption = captions.get(files[i].stem) or compose_caption(label, classes.names)
        return dict(label=label, caption=caption)
    for i in range(len(files)):
        load(i, say=i == 0)
    return [file.stem for file in files], load


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
    """Put {name: caption} into out/captions.json, one process after the other."""
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        captions = read_captions(out, "", None) | new
        text = json.dumps(dict(sorted(captions.items())), indent=1, ensure_ascii=False)
        write_text(out / "captions.json", text)


def data_settings(args):
    """What made.json keeps: all that decides how an image of --layouts looks, beside its layout."""
    keys = "prompts", "seed", "negative", "steps", "cfg", "eta", "size"
    adapter = str(Path(args.ckpt).resolve())
    return {"adapter": adapter, **{key: getattr(args, key) for key in keys}}


def check_settings(out, settings):
    """Raises InputError where `out` holds images that were made with other settings."""
    path = out / "made.json"
    if not path.exists():
        return
    made = json.loads(path.read_text("utf-8"))
    for key, value in settings.items():
        if made.get(key) != value:
            raise InputError(f"{out}: its images were made with --{key} {made.get(key)!r}, not "
                             f"{value!r}: choose another --out")


def plan_dataset(args, preset, classes):
    """--layouts -> load(i) of `open_layouts`, and a list of (i, name, prompt): this shard's images
    that are not in --out yet."""
    names, load = open_layouts(args, preset, classes)
    stems = [safe_name(name) for name in names]
    if len(set(stems)) < len(stems):
        twin = max(stems, key=stems.count)
        raise InputError(f"--layouts {args.layouts}: two layouts are called {twin}: rename one")
    out = Path(args.out)
    folders = make_folder(out / "images"), make_folder(out / "labels")
    check_settings(out, data_settings(args))
    shard, shards = args.shard
    todo = []
    for i in range(shard, len(stems), shards):
        for p, prompt in enumerate(args.prompts):
            for k in range(args.n):
                name = f"{stems[i]}_{p}_{k}"
                if not all((folder / f"{name}.png").exists() for folder in folders):
                    todo.append((i, name, prompt))
    return load, todo


def sample_dataset(model, load, todo, args):
    """--layouts: n images of each layout with each prompt, as a data set for `--data OUT`: images/,
    labels/, classes.txt, captions.json. What is there is left alone: the same command resumes."""
    out = Path(args.out)
    jobs = (dict(load(i), name=name, prompt=prompt) for i, name, prompt in todo)
    for folder in (out, out / "images", out / "labels"):
        remove_leftovers(folder)
    with tqdm(total=len(todo), unit="image", dynamic_ncols=True) as bar:
        write_text(out / "classes.txt", classes_text(model.classes))
        write_text(out / "made.json", json.dumps(data_settings(args), indent=1))
        for group in same_size(jobs, args.batch):
            names = [job["name"] for job in group]
            prompts = [job["prompt"].replace("{caption}", job["caption"]) for job in group]
            labels = torch.stack([job["label"] for job in group])
            seeds = [image_seed(args.seed, name) for name in names]
            images = generate(model, labels, prompts, seeds, **sampling(args))
            add_captions(out, dict(zip(names, prompts)))
            for name, label, image in zip(names, labels, images):
                write_png(out / "labels" / f"{name}.png", label.byte().numpy())
                write_png(out / "images" / f"{name}.png", image)    # last: so the rest is there
            bar.update(len(group))
    print(f"{out}: {len(todo)} new images; train on them with --data {out}")


# -- how good the images are ----------------------------------------------------------------------


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


def precision_recall(real, fake, k=3):
    """Kynkaanniemi et al. 2019: real [L,C], fake [M,C] -> the share of fakes that lie among the
    real (precision), and of the real that lie among the fakes (recall): nearer to one of them
    than its own k-th neighbour."""
    return share_among(fake, real, k), share_among(real, fake, k)


def share_among(points, others, k):
    """The share of points [M,C] that lie among the others [L,C]."""
    radius = torch.cdist(others, others).kthvalue(k + 1).values     # (the nearest is itself)
    return (torch.cdist(points, others) <= radius).any(1).double().mean().item()


def diversity(features):
    """features [L,n,C] of n samples for each of L layouts -> the mean distance between two
    samples of one layout."""
    L, n, _ = features.shape
    return (torch.cdist(features, features).sum() / (L * n * (n - 1))).item()


def pixel_features(images):
    """images [B,3,H,W] -> [B,C], so that distances are RMS differences of pixels, from 0 to 1"""
    return images.flatten(1) / 2 / images[0].numel() ** 0.5


def pooled_features(judge, images):
    """images [B,3,H,W] -> [B,C]: the last map of the judge's encoder, averaged over its places"""
    return judge.features(images)[-1].mean((2, 3))


def toy_edit(caption, i):
    """A caption in another domain's words, by turns: "..., in daylight" -> "..., at night", and
    that domain's index."""
    own = [d for d in DOMAINS if any(phrase in caption for phrase in PHRASES[d])][:1]
    others = [d for d in DOMAINS if d not in own]
    target = others[i % len(others)]
    phrase = PHRASES[target][0]
    if not own:
        return f"{caption}, {phrase}", DOMAINS.index(target)
    for old in PHRASES[own[0]]:
        caption = caption.replace(old, phrase)
    return caption, DOMAINS.index(target)


def prompt_edit(prompts, caption, i):
    """The prompts by turns, {caption} filled in, and the index of the prompt."""
    target = i % len(prompts)
    return prompts[target].replace("{caption}", caption), target


class Clip:
    """open_clip's image and text features, if the weights are in the Hugging Face cache; they are
    never downloaded."""
    NAME, REPO = "ViT-B-32", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"

    @classmethod
    def find(cls):
        """-> the path of the weights, or None"""
        for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"):
            path = try_to_load_from_cache(cls.REPO, name)
            if isinstance(path, str):
                return path
        return None

    def __init__(self, device):
        self.net = open_clip.create_model(self.NAME, pretrained=self.find(), device=device).eval()
        self.tokenize = open_clip.get_tokenizer(self.NAME)
        self.device = device

    @torch.no_grad()
    def encode_images(self, images):
        """images [B,3,H,W] in [-1,1] -> unit vectors [B,512]"""
        mean = images.new_tensor(open_clip.OPENAI_DATASET_MEAN)[:, None, None]
        std = images.new_tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]
        images = F.interpolate(images, (224, 224), mode="bicubic", antialias=True).clamp(-1, 1)
        return F.normalize(self.net.encode_image(((images + 1) / 2 - mean) / std), dim=1)

    @torch.no_grad()
    def encode_texts(self, texts):
        """B texts -> unit vectors [B,512]"""
        return F.normalize(self.net.encode_text(self.tokenize(texts).to(self.device)), dim=1)

    def classify(self, texts, images):
        """P texts, images [B,3,H,W] -> cosines [B,P]"""
        return self.encode_images(images) @ self.encode_texts(texts).T

    def score(self, images, prompts):
        """images [B,3,H,W], B prompts -> the cosine of each image and its prompt [B]"""
        return (self.encode_images(images) * self.encode_texts(prompts)).sum(1)


def draw_samples(model, group, prompts, k, seed, options):
    """The sample called k of each layout of a group, with these prompts -> [b,3,H,W] in [-1,1]."""
    labels = torch.stack([item["label"] for item in group])
    seeds = [image_seed(seed, f"{item['name']}/{k}") for item in group]
    return from_pixels(generate(model, labels, prompts, seeds, **options), model.device)


class Tally:
    """What `evaluate` has found so far.

    confusion    kind of image -> [N,N]; rows are the true classes
    features     kind of image -> list of [b,C]
    spread       for each layout the diversity of its samples in features, and in pixels
    scores       the cosines of images and their prompts
    hits         target -> whether the classifier sees it in each image that should show it
    """
    KINDS = "generated", "edited", "reconstructed", "real"

    def __init__(self, judge, features, names, targets):
        self.judge, self.describe, self.names = judge, features, names
        self.confusion, self.features = {}, {}
        self.spread, self.scores = [], []
        self.hits = {target: [] for target in targets}
        self.layouts = 0

    def add(self, kind, images, label):
        """images [b,3,H,W] against label [b,H,W]. Outputs of the judge beyond N are passed over."""
        N = len(self.names)
        found = self.judge(images)[:, :N].argmax(1)
        confusion = confusion_matrix(found.cpu(), label, N)
        self.confusion[kind] = self.confusion.get(kind, 0) + confusion
        self.features.setdefault(kind, []).append(self.describe(images).double().cpu())

    def add_spread(self, samples):
        """n batches [b,3,H,W], each with a sample of the same b layouts"""
        features = torch.stack([self.describe(images) for images in samples], 1)    # [b,n,C]
        pixels = torch.stack([pixel_features(images) for images in samples], 1)
        self.spread += [(diversity(features), diversity(pixels))] * len(features)

    def result(self, unjudged):
        """-> the dict that `evaluate` returns"""
        result = {"layouts": self.layouts}
        for kind in self.KINDS:
            if kind in self.confusion:
                _, iou = mean_iou(self.confusion[kind])
                iou[[self.names.index(name) for name in unjudged]] = math.nan
                result[f"mIoU_{kind}"] = rounded(iou.nanmean().item())
                result[f"IoU_{kind}"] = dict(zip(self.names, map(rounded, iou.tolist())))
        real, fake = torch.cat(self.features["real"]), torch.cat(self.features["generated"])
        result |= compare_features(real, fake)
        result["diversity"] = mean([features for features, _ in self.spread])
        result["diversity_pixels"] = mean([pixels for _, pixels in self.spread])
        result["clip_score"] = mean(self.scores)
        result["editability"] = mean(sum(self.hits.values(), []))
        result["editability_of"] = {target: mean(hits) for target, hits in self.hits.items()}
        return result


def compare_features(real, fake):
    """real [L,C], fake [M,C] -> dict of the distances between them; None: too few to tell"""
    found = dict(frechet_distance=None, precision=None, recall=None)
    if len(real) > 1:
        moments = real.mean(0), torch.cov(real.T), fake.mean(0), torch.cov(fake.T)
        found["frechet_distance"] = rounded(frechet_distance(*moments))
    if len(real) > 3:
        precision, recall = precision_recall(real, fake)
        found |= dict(precision=rounded(precision), recall=rounded(recall))
    return found


def rounded(value):
    """For JSON, which has no nan."""
    return None if math.isnan(value) else round(value, 5)


def mean(values):
    return rounded(sum(values) / len(values)) if values else None


@torch.no_grad()
def evaluate(model, items, judge, classifier=None, edit=toy_edit, targets=DOMAINS, features=None,
             text_score=None, n=4, diverse=None, unjudged=(), seed=0, batch=8, folder=None,
             bar=None, **options):
    """Do images generated from the items' layouts obey them, look like the items' images, obey
    words, and vary?

    items        dicts of image [3,H,W] in [-1,1], label [H,W], caption, name
    judge        an independent segmenter: UperNet with the model's classes
    classifier   images [B,3,H,W] in [-1,1] -> scores [B,len(targets)]: do images of edited prompts
                 show their target? edit(caption, i) -> the i-th layout's edited prompt, and the
                 index of its target. None: left out
    features     images -> [B,C] for Frechet distance, precision, recall, diversity; None: the
                 judge's
    text_score   images, B prompts -> the cosine of each image and its prompt [B]; None: left out
    n            samples of each layout; all count
    diverse      quicker: only the first so many layouts (in whole batches) have n samples, for
                 the diversity alone; all else is said of one sample of each layout
    unjudged     names of classes that the judge cannot tell: left out of the mIoU
    folder       where the generated images and their labels are kept; None: nowhere
    options      of `generate`: steps, cfg, ...
    -> dict of plain values, ready for JSON ("reconstructed" images are the autoencoder's: the best
    that generated ones can be); None: cannot be told, as the IoU of a class that is not there
    """
    features = features or partial(pooled_features, judge)
    targets = list(targets) if classifier else []
    tally = Tally(judge, features, model.classes.names, targets)
    options["batch"] = batch
    for group in same_size(items, batch):
        label = torch.stack([item["label"] for item in group])
        captions = [item["caption"] for item in group]
        real = torch.stack([item["image"] for item in group]).to(model.device)
        tally.add("real", real, label)
        decoded = model.vae.decode(model.vae.encode(real)).clamp(-1, 1)
        tally.add("reconstructed", decoded, label)
        several = n if diverse is None or tally.layouts < diverse else 1
        samples = [draw_samples(model, group, captions, k, seed, options) for k in range(several)]
        for images in samples if diverse is None else samples[:1]:
            tally.add("generated", images, label)
            if text_score:
                tally.scores += text_score(images, captions).tolist()
        if several > 1:
            tally.add_spread(samples)
        if folder:
            keep_samples(folder, group, samples, n)
        if classifier:
            edits = [edit(caption, tally.layouts + i) for i, caption in enumerate(captions)]
            prompts, wanted = map(list, zip(*edits))
            images = draw_samples(model, group, prompts, "edited", seed, options)
            tally.add("edited", images, label)
            for target, answer in zip(wanted, classifier(images).argmax(1).tolist()):
                tally.hits[targets[target]].append(answer == target)
        tally.layouts += len(group)
        if bar:
            bar.update(len(group))
    return tally.result(unjudged)


def sample_name(name, k, n):
    """The file name of sample k of n of the item `name`."""
    return safe_name(name) if n == 1 else f"{safe_name(name)}_{k}"


def keep_samples(folder, group, samples, n):
    """Write samples (each [b,3,H,W]) of b layouts, and their labels as ids, beside the figures. A
    full disk does not stop the evaluation."""
    try:
        for k, images in enumerate(samples):
            for item, pixels in zip(group, to_pixels(images)):
                name = sample_name(item["name"], k, n)
                write_png(folder / "images" / f"{name}.png", pixels)
                write_png(folder / "labels" / f"{name}.png", item["label"].byte().numpy())
    except OSError as error:
        note(f"{error}: this image is judged, but not kept")


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
    _, meta = read_parts(files[0])
    ours = meta.get("format") == "aldm-segmenter"
    if ours and tuple(meta["names"]) != classes.names:
        raise InputError(f"--judge {files[0]}: knows the {len(meta['names'])} classes of "
                         f"{meta['dataset']}, not those of {classes.key}")
    shape = PRESETS[meta["preset"]].segmenter if ours else preset.segmenter
    judge = UperNet(len(classes.names), **shape)
    judge.decoder.conv_last[1].bias.data.fill_(-1e4)    # classes that no file has are never seen
    load_segmenter(files, judge, classes)
    unjudged = []
    if len(files) == 2 and classes.names != class_table("ade20k").names:
        unjudged = [name for name, ade in zip(classes.names, classes.ade)
                    if ade is None or classes.ade.count(ade) > 1]
        note(f"--judge: knows ADE20K's classes, and so cannot tell {', '.join(unjudged)}: these "
             "are left out of the mIoU (a segmenter that train.py has trained knows them)")
    return judge.eval(), unjudged


def choose_judges(args, preset, classes):
    """--judge, --features, --prompts, and what there is on this machine -> those arguments of
    `evaluate` that judge, by name."""
    chosen = {}
    if preset == PRESETS["toy"] and classes.names == class_table("toy").names:
        parts = load_weights(args.sd or base_file("toy"))
        chosen["judge"], chosen["classifier"] = toy_judges(parts, args.device)
    if args.judge:
        judge, chosen["unjudged"] = load_judge(args.judge, preset, classes)
        chosen["judge"] = judge.to(args.device)
    if not chosen:
        raise InputError("--evaluate needs a segmenter that the training has not seen: name its "
                         "file, or files, with --judge")
    by_prompts = args.prompts or "classifier" not in chosen
    if not Clip.find():
        missing = f"{Clip.REPO} is not in the Hugging Face cache"
        if args.features == "clip":
            raise InputError(f"--features clip: {missing}")
        if by_prompts:
            note(f"the editability by prompts is left out: {missing}")
        return chosen
    clip = Clip(args.device)
    chosen["text_score"] = clip.score
    if args.features == "clip":
        chosen["features"] = clip.encode_images
    if by_prompts:
        prompts = args.prompts or WEATHER
        targets = [prompt.replace("{caption}", "").strip(" ,") or prompt for prompt in prompts]
        chosen |= dict(classifier=partial(clip.classify, targets), targets=targets,
                       edit=partial(prompt_edit, prompts))
    return chosen


def plan_evaluation(args, preset, classes):
    """--evaluate -> the items to judge (an iterator) and their number, the judges, and the file of
    the figures: all that can be refused before the work."""
    dataset, load = open_split(args, preset, classes, args.split)
    names = dataset.names[:args.limit]
    out = Path(args.out)
    path = Path(args.json or out / "evaluation.json")
    make_folder(out / "labels")
    check_target(path)
    ours = {f"{sample_name(name, k, args.n)}.png" for name in names for k in range(args.n)}
    others = sorted({file.name for file in make_folder(out / "images").glob("*.png")} - ours)
    if others:
        raise InputError(f"--out {out}: has {len(others)} other images, such as {others[0]}: "
                         "choose another folder")
    return map(load, range(len(names))), len(names), choose_judges(args, preset, classes), path


def sample_and_judge(model, items, count, judges, path, args):
    """--evaluate: a table, and the same as JSON."""
    settings = {**sampling(args), "n": args.n, "seed": args.seed}
    with tqdm(total=count, unit="layout", dynamic_ncols=True) as bar:
        result = evaluate(model, items, **judges, **settings, folder=Path(args.out), bar=bar)
    show(result)        # before it is written, as the disk may be full
    about = dict(adapter=str(args.ckpt), data=args.data or model.classes.key, split=args.split,
                 features=args.features)
    write_text(path, json.dumps({**result, **settings, **about}, indent=1))
    print(f"written to {path}; the images are in {args.out}")


def show(result):
    """The table of --evaluate: a row per class that is there, a column per kind of image."""
    kinds = [kind for kind in Tally.KINDS if f"mIoU_{kind}" in result]
    rows = {"mIoU": [result[f"mIoU_{kind}"] for kind in kinds]}
    for name in result["IoU_real"]:
        rows[f"  {name}"] = [result[f"IoU_{kind}"][name] for kind in kinds]
    for name in ("frechet_distance", "precision", "recall", "diversity", "diversity_pixels",
                 "clip_score", "editability"):
        rows[name.replace("_", " ")] = [result[name]]
    for target, share in result["editability_of"].items():
        rows[f"  {target}"] = [share]
    print(f"{result['layouts']} layouts".ljust(20) + "".join(kind.rjust(14) for kind in kinds))
    for name, values in rows.items():
        if values != [None] * len(values):
            cells = ["-" if value is None else f"{value:.3f}" for value in values]
            print(name.ljust(20) + "".join(cell.rjust(14) for cell in cells))


# -- how fast -------------------------------------------------------------------------------------


def bench(model, args):
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


# -- the page to paint layouts on -----------------------------------------------------------------

PAGE = ASSETS / "paint.html"
BODY = 4 * 2 ** 20      # bytes of a request at most; a painted 512 x 1024 takes a small part of it
PREVIEWS = 6            # estimates decoded on the way: on a CPU that takes as long as a step
HEADERS = {"Content-Security-Policy": "default-src 'self' 'unsafe-inline' data:; base-uri 'none'; "
                                      "form-action 'none'; frame-ancestors 'none'",
           "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Connection": "close"}


def get_text(given, key):
    """given[key], a text of at most 2000 characters; "" if it is not there."""
    value = given.get(key, "")
    if not isinstance(value, str) or len(value) > 2000 or re.search("[\ud800-\udfff]", value):
        raise InputError(f"{key} must be a text of at most 2000 characters, "
                         f"not {json.dumps(value):.60}")
    return value


def get_number(given, key, low, high, kinds=(int,)):
    """given[key], a number of one of these kinds in [low, high]."""
    value = given.get(key)
    if type(value) not in kinds or not low <= value <= high:
        what = "whole number" if kinds == (int,) else "number"
        raise InputError(f"{key} must be a {what} from {low} to {high}, "
                         f"not {json.dumps(value):.60}")
    return value


def read_request(raw, classes):
    """The body of a request -> its layout [H,W], and the object with the other fields."""
    try:
        given = dict(json.loads(raw))
        png = base64.b64decode(given.get("layout"), validate=True)
    except (ValueError, TypeError, RecursionError):
        raise InputError("the request is no JSON object with a layout, a PNG in base64") from None
    # read_layout takes files, and their names tell the kinds of ids
    kind = re.search("labelTrainIds|labelIds|$", str(given.get("name")))[0]
    try:
        with tempfile.NamedTemporaryFile(suffix=f"_{kind}.png") as file:
            file.write(png)
            file.flush()
            return read_layout(file.name, classes), given
    except InputError as error:
        raise InputError(str(error).replace(file.name, "the layout")) from None
    except OSError as error:
        raise InputError(f"there is no room for the layout: {error.strerror}") from None


def encode(array):
    """uint8 [H,W,3] -> a PNG, uint8 [H,W] -> one byte per pixel; both in base64."""
    if array.ndim == 2:
        return base64.b64encode(array.tobytes()).decode()
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


class PageServer(ThreadingHTTPServer):
    """model, lock (of whoever uses the model), page (what assets/paint.html must know)"""

    def handle_error(self, request, client_address):
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):          # an OSError: the client has gone
            note(f"a request failed: {error!r}")


class PageHandler(BaseHTTPRequestHandler):
    """GET / is the page; POST /layout reads a layout's file; POST /generate streams lines of JSON,
    one for each step, and the image."""
    timeout = 30        # seconds without a byte from a client, or to one

    def log_message(self, *args):
        pass

    def answer(self, code, body=b"", kind="application/json"):
        """body: bytes, or a dict. The connection's end is its end: more may follow."""
        self.send_response(code)
        for name, value in {"Content-Type": kind, **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode() if isinstance(body, dict) else body)

    def is_foreign(self):
        """Pages of other sites get nothing, neither by their own name nor by one of theirs that
        points here -> whether this is one, and has been told."""
        port = self.server.server_port
        hosts = f"127.0.0.1:{port}", f"localhost:{port}"
        origins = None, f"http://{hosts[0]}", f"http://{hosts[1]}"
        if self.headers["Host"] in hosts and self.headers["Origin"] in origins:
            return False
        self.answer(403, {"error": f"only for {origins[1]} (a forwarded port keeps its number)"})
        return True

    def do_GET(self):
        if self.is_foreign():
            return
        if self.path != "/":
            return self.answer(404)
        text = json.dumps(self.server.page).replace("<", "\\u003c")     # no name ends the script
        page = PAGE.read_text("utf-8").replace("__WORLD__", text)
        self.answer(200, page.encode(), "text/html; charset=utf-8")

    def do_POST(self):
        length = self.headers["Content-Length"] or ""
        if not re.fullmatch("[0-9]{1,12}", length):
            return self.answer(400, {"error": "a request needs its Content-Length"})
        left = int(length)
        if left > BODY:
            self.answer(413, {"error": f"the request has {left} bytes; at most {BODY} are taken"})
            # most clients read the answer only when they have sent it all
            while left > 0 and (got := len(self.rfile.read(min(left, 2 ** 16)))):
                left -= got
            return
        raw = self.rfile.read(left)
        if self.is_foreign():
            return
        page = self.server.page
        try:
            label, given = read_request(raw, self.server.model.classes)
            size = label.shape[::-1]
            label = F.interpolate(label[None, None].float(), (page["height"], page["width"]),
                                  mode="nearest-exact")[0, 0].long()
            if self.path == "/layout":
                return self.answer(200, {"layout": encode(label.byte().numpy()), "size": size})
            words = dict(prompt=get_text(given, "prompt"), negative=get_text(given, "negative"),
                         seed=get_number(given, "seed", 0, 2 ** 32 - 1),
                         steps=get_number(given, "steps", 1, page["max_steps"]),
                         cfg=get_number(given, "cfg", 0, 50, (int, float)))
        except InputError as error:
            return self.answer(400, {"error": str(error)})
        if self.path != "/generate":
            return self.answer(404, {"error": "there are /layout and /generate"})
        self.answer(200, kind="application/x-ndjson")
        if self.server.lock.locked():
            self.send(waiting=True)
        with self.server.lock:
            self.generate(label, words)

    def send(self, **line):
        self.wfile.write(json.dumps(line).encode() + b"\n")

    def generate(self, label, words):
        """Send what becomes of label [H,W]: a line for each step, some with its estimate."""
        model, steps, start = self.server.model, words["steps"], time.time()
        shown = {steps * k // PREVIEWS for k in range(PREVIEWS)}
        cut = model.text.cut(words["prompt"])
        if cut:
            self.send(note=f"the prompt is too long: the model does not see its end, {cut:.200}")

        def send_step(i, x0_hat):
            line = dict(step=i + 1, of=steps)
            if i in shown:
                line["image"] = encode(to_pixels(model.vae.decode(x0_hat.float()))[0])
            self.send(**line)
        try:
            image = generate(model, label[None], [words["prompt"]], [words["seed"]],
                             words["negative"], steps, words["cfg"], on_step=send_step)[0]
        except OSError:
            raise
        except Exception as error:          # the card's memory is full, ...: the server lives on
            return self.send(error=f"the generation failed: {' '.join(str(error).split()):.300}")
        self.send(image=encode(image), done=True, seconds=time.time() - start)


def painter(model, port=8000, examples=(), prompts=(), steps=25, cfg=2.0):
    """The page's server, for this machine only. examples: labels [H,W] of one size, whose classes
    are offered first; without any, the canvas is the preset's square."""
    height, width = examples[0].shape if examples else (model.preset.size,) * 2
    server = PageServer(("127.0.0.1", port), PageHandler)
    server.model, server.lock = model, threading.Lock()
    server.page = dict(names=model.classes.names, palette=model.classes.palette.tolist(),
                       examples=[encode(label) for label in examples], height=height, width=width,
                       prompts=prompts, steps=steps, cfg=cfg, limit=BODY,
                       max_steps=len(model.schedule.alphas_cumprod))
    return server


def serve(model, args):
    """--serve: the page, until Ctrl+C."""
    examples = []
    if model.preset == PRESETS["toy"]:
        examples = [toy_scene(10_000_001 + i)[1] for i in range(12)]
    prompts = ("a street with a red car and trees, on a clear day", "a street at night",
               "a street in snow", "a street in fog", "a street in rain")
    try:
        server = painter(model, args.port, examples, prompts, args.steps, args.cfg)
    except OSError as error:
        raise InputError(f"port {args.port}: {error.strerror}: choose another --port") from None
    print(f"paint a layout at http://127.0.0.1:{server.server_port} (Ctrl+C ends)", flush=True)
    with server:
        server.serve_forever()


# -- the command line -----------------------------------------------------------------------------


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
        too_low = value <= low if exclusive else value < low
        if too_low or not value <= high or value == math.inf:       # nan fails the second
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
    mode.add_argument("--layouts", metavar="DIR|SPLIT", help="make a data set from the layouts in "
                      "a folder, or of a split of --data")
    mode.add_argument("--evaluate", action="store_true", help="how good is --split of --data?")
    mode.add_argument("--serve", action="store_true", help="a page to paint layouts on")
    mode.add_argument("--bench", action="store_true", help="how fast is sampling?")
    add = p.add_argument
    add("--prompt", type=utf8, default="", help="what to paint; may be empty")
    add("--negative", type=utf8, default="", help="what guidance leads away from")
    add("--prompts", type=utf8, nargs="+", help="of --layouts: one or more for each; {caption} "
        "is its own (default: {caption}). Of --evaluate: what edited prompts ask for")
    add("--ckpt", "--adapter", default=ADAPTER, help="an adapter, or a run's folder")
    add("--sd", metavar="FILE", help="Stable Diffusion 1.x (default: downloaded; toy: in assets/)")
    add("--preset", choices=list(PRESETS), help="refuse an adapter of another one")
    add("--class-embeddings", metavar="FILE", help="what an official adapter was trained with")
    add("--data", help="toy (or toy:night, ...), cityscapes, ade20k, coco or a folder (default: "
        "the adapter's)")
    add("--root", metavar="DIR", help="where the files of --data are")
    add("--split", default="val", help="of --evaluate (default: %(default)s)")
    add("--limit", type=number(1, kind=int), help="only the first so many layouts")
    add("--shard", type=shard, default=(0, 1), metavar="i/n", help="each n-th layout from the i-th "
        "on: for n processes")
    add("--out", metavar="DIR", default="samples", help="(default: %(default)s)")
    add("--json", metavar="FILE", help="of --evaluate (default: evaluation.json in --out)")
    add("--n", type=number(1, kind=int), help="images per layout (default: 1; --evaluate: 2)")
    add("--seed", type=number(0, 2 ** 32, int), default=0, help="(default: %(default)s)")
    add("--steps", type=number(1, 1000, int), default=25, help="of DDIM (default: %(default)s)")
    add("--cfg", type=number(0), help="guidance scale, 1 for none (default: "
        + ", ".join(f"{name} {scale:g}" for name, scale in GUIDANCE.items()) + ")")
    add("--eta", type=number(0, 1), default=0.0, help="0: deterministic, 1: as noisy as DDPM")
    add("--size", type=number(0, kind=int), help="shorter side in pixels; 0: the layout's "
        "(default: at most the training size)")
    add("--batch", type=number(1, kind=int), default=8, help="(default: %(default)s)")
    add("--judge", nargs="+", metavar="FILE", help="segmenter that judges: one of train.py's, or "
        "mit-semseg's encoder and decoder")
    add("--features", choices=["judge", "clip"], default="judge", help="of the Frechet distance")
    add("--port", type=number(0, 65535, int), default=8000, help="of --serve")
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    return p.parse_args(argv)


def check_args(args, meta, parts, classes):
    """Raises InputError for flags that do not go with the adapter; sets the defaults that depend
    on it."""
    if args.preset not in (None, meta["preset"]):
        raise InputError(f"{args.ckpt}: is of the {meta['preset']} preset, not --preset "
                         f"{args.preset}")
    if args.root and classes.key == "toy":
        raise InputError("--root: the toy has no files")
    embeds = meta["adapter"] in ("controlnet", "oft") and meta["hint"] == "classes"
    if args.class_embeddings and not embeds:
        raise InputError(f"--class-embeddings: the hint of {args.ckpt} has none")
    if embeds and "layout" not in parts and not args.class_embeddings:
        note(f"{args.ckpt}: has no class embeddings: the text encoder's serve, which differ from "
             "the official ones (Cityscapes: in road, sidewalk, wall and sky): give the file that "
             "it was trained with as --class-embeddings")
    if args.n is None:
        args.n = 2 if args.evaluate else 1
    if args.layouts and not args.prompts:
        args.prompts = ["{caption}"]
    if args.cfg is None:
        args.cfg = GUIDANCE[meta["preset"]]


def run(args):
    """Everything that can be refused is, before the large files are read."""
    args.device = pick_device(args.device)
    meta, parts = read_adapter(args.ckpt)
    classes = classes_of(meta, args.ckpt, args.data)
    check_args(args, meta, parts, classes)
    preset = PRESETS[meta["preset"]]
    if args.layout:
        label = read_layout(args.layout, classes)
        work = sample_layout, resize_layout(label, preset, args.size, args.layout)
        make_folder(args.out)
    elif args.layouts:
        work = sample_dataset, *plan_dataset(args, preset, classes)
    elif args.evaluate:
        work = sample_and_judge, *plan_evaluation(args, preset, classes)
    else:
        work = (serve if args.serve else bench,)
    model = build_model(meta, parts, args.ckpt, classes, args.sd, args.device,
                        embeddings=args.class_embeddings)
    for prompt in dict.fromkeys([args.prompt, args.negative, *(args.prompts or [])]):
        if cut := model.text.cut(prompt):
            note(f"a prompt is longer than the 77 tokens that the model reads; cut off is: {cut}")
    task, *plan = work
    task(model, *plan, args)


def main():
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdout.reconfigure(errors="backslashreplace")       # names of files may be no UTF-8
        run(parse_args())
    except InputError as error:
        note(f"sample.py: {error}")
        raise SystemExit(2)
    except torch.OutOfMemoryError:
        note("sample.py: out of GPU memory: choose a smaller --batch or --size")
        raise SystemExit(1)
    except OSError as error:                # such as a full disk: nothing is half-written
        note(f"sample.py: {error}")
        raise SystemExit(1)
    except KeyboardInterrupt:
        raise SystemExit(130)


if __name__ == "__main__":
    main()

"""Layout and prompt -> image, whole data sets of such images, and how good they are.

    python sample.py --layout FILE --prompt "a street at night"                                     images and a grid
    python sample.py --layouts val --prompts "night scene" "{caption}, in snow" --n 4 --out DIR     a labelled data set
    python sample.py --evaluate --limit 128                                                         a table and a JSON
    python sample.py --serve                                                                        a page to paint layouts on
    python sample.py --bench                                                                        seconds and FLOP/s
"""
import argparse
import base64
import contextlib
import fcntl
import io
import json
import math
import os
import platform
import re
import statistics
import sys
import tempfile
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from aldm import (ALDM, JUDGE, PRESETS, atomic, base_file, keep_memory, load_frozen, load_into, load_segmenter,
                  load_weights, pick_device, read_adapter)
from data import (DOMAINS, IGNORE, PHRASES, Classes, InputError, class_table, colorize, compose_caption, open_dataset,
                  read_captions, read_layout, refuse, toy_scene)
from discriminator import Classifier, UperNet, confusion_matrix, mean_iou
from unet import OFT

ADAPTER = Path(__file__).parent / "assets" / "toy_adapter.safetensors"
GUIDANCE = {"toy": 5.0, "sd15": 7.5}                                        # --cfg where none is given
WEATHER = ("night scene", "snowy scene", "foggy scene", "rainy scene")      # asked of real layouts by --evaluate


# -- the model --------------------------------------------------------------------------------------------------------


def load_model(adapter=ADAPTER, sd=None, device="cpu", classes=None, merge=True):
    """An adapter (what aldm.read_adapter reads) on the frozen Stable Diffusion `sd` (None: the preset's own) -> ALDM.

    classes   None: those that the file describes
    merge     make it fast, and fit for sampling alone: OFT's rotations go into the weights; on CUDA, UNet and adapter
              become bf16
    Raises InputError for files that cannot be used.
    """
    device, (meta, parts) = torch.device(device), read_adapter(adapter)
    fast = merge and device.type == "cuda"
    early = torch.bfloat16 if fast and meta["adapter"] != "oft" else torch.float32     # rotate first, then round
    unet, vae, text, _ = load_frozen(meta["preset"], sd, device, early)
    model = ALDM(PRESETS[meta["preset"]], unet, vae, text, classes or classes_of(meta, adapter), meta["adapter"],
                 meta["hint"], parts.get("layout", {}).get("table")).to(device)
    load_into(model.adapter, parts["adapter"], adapter, device, torch.float32)
    if merge and meta["adapter"] == "oft":
        OFT.merge(model.unet)
    for part in (model.unet, model.adapter) if fast else ():
        part.bfloat16()
    (model if fast else model.vae).to(memory_format=torch.channels_last)        # on a CPU the UNet gains nothing by it
    return model.requires_grad_(False).eval()


def classes_of(meta, adapter, data=None):
    """The classes of an adapter, by its metadata; `data` may name another dataset only if that has the same classes."""
    names, key = tuple(meta["names"] or ()), data or meta["dataset"]
    if key is None:
        raise InputError(f"{adapter}: does not say of which dataset it is: name it with --data")
    if data or not names or key in ("toy", "cityscapes", "ade20k", "coco"):
        classes = class_table(key)
        if names and classes.names != names:
            raise InputError(f"{adapter}: is of {meta['dataset']}, {len(names)} classes ({', '.join(names[:3])}, ...),"
                             f" not of {key}, {len(classes.names)} ({', '.join(classes.names[:3])}, ...)")
        return classes
    ids = np.where(np.arange(256) < len(names), np.arange(256), -1).astype(np.int16)    # a folder's: ids as they are
    ids[IGNORE] = IGNORE
    palette = np.array(meta["palette"], np.uint8)
    return Classes(key, names, palette, (None,) * len(names), ids, np.zeros((1, 3), np.uint8))


@torch.no_grad()
def generate(model, labels, prompts, seeds, negative="", steps=25, cfg=None, eta=0.0, batch=8, on_step=None):
    """Sample x_0 by DDIM with guidance and decode it: labels [B,H,W], B prompts, B seeds -> uint8 [B,H,W,3] (numpy).

    Sides that are not multiples of `preset.multiple` pixels are padded with void, and the images cropped back. All
    randomness of an image comes from its own seed: it does not depend on the others in the batch (but for rounding).
    on_step(i, x0_hat [b,4,h,w]) is called after each of the `steps` steps of each batch of b <= `batch` images.
    """
    device, preset, images = model.device, model.preset, []
    cfg = next((GUIDANCE[name] for name, p in PRESETS.items() if p == preset), 1.0) if cfg is None else cfg
    labels = torch.as_tensor(labels).long()
    H, W = labels.shape[1:]
    labels = F.pad(labels, (0, -W % preset.multiple, 0, -H % preset.multiple), value=IGNORE)
    shape = (preset.vae.z_channels, *(side // preset.vae.factor for side in labels.shape[1:]))
    batch = 1 if eta else batch         # stochastic steps draw from the global stream, which then is that of one seed
    for i in range(0, len(labels), batch):
        part = slice(i, i + batch)
        context, uncond = (model.text.encode(texts) for texts in (prompts[part], [negative] * len(prompts[part])))
        with torch.random.fork_rng([device] if device.type == "cuda" else []), \
                torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            noise = torch.stack([torch.randn(shape, generator=torch.manual_seed(seed)) for seed in seeds[part]])
            z = model.sample(labels[part].to(device), context, uncond, steps, cfg, noise, eta, on_step)
        images.append(to_pixels(model.vae.decode(z.float())[:, :, :H, :W]))
    return np.concatenate(images)


def to_pixels(image):
    """image [B,3,H,W], about [-1,1] -> uint8 [B,H,W,3] (numpy)"""
    return ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def from_pixels(pixels, device):
    """uint8 [B,H,W,3] (numpy) -> image [B,3,H,W] in [-1,1]"""
    return torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def image_seed(seed, name):
    """The seed of the image called `name` in a run with --seed `seed`: the same in every batch, on every machine."""
    return zlib.crc32(f"{seed}/{name}".encode())


def grid(rows):
    """Rows of uint8 pictures [H,W,3] -> one PIL.Image with gaps of 2 pixels; pictures up to 128 pixels are doubled."""
    h, w = (max(p.shape[axis] for row in rows for p in row) for axis in (0, 1))
    k = 2 if max(h, w) <= 128 else 1
    canvas = np.full((len(rows) * (k * h + 2) - 2, max(map(len, rows)) * (k * w + 2) - 2, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, p in enumerate(row):
            p, y, x = p.repeat(k, 0).repeat(k, 1), i * (k * h + 2), j * (k * w + 2)
            canvas[y:y + p.shape[0], x:x + p.shape[1]] = p
    return Image.fromarray(canvas)


# -- one layout -------------------------------------------------------------------------------------------------------


def fit(label, preset, size, what, say=True):
    """label [H,W] -> the same, resized by nearest until its shorter side is `size` pixels (None: the preset's training
    size, where the label is larger; 0: not at all). Says in a line each what is done to it, here and in `generate`."""
    (h, w), m = label.shape, preset.multiple
    target = (min(preset.size, h, w) if size is None else size) or min(h, w)
    H, W = (round(side * target / min(h, w)) for side in (h, w))
    if H * W > 2 ** 22:
        raise InputError(f"{what}: {W} x {H} pixels are too many to sample (at most 4 Mpixel): give a smaller --size")
    if say and (H, W) != (h, w):
        note(f"{what}: {w} x {h} pixels, resized to {W} x {H} (--size 0 keeps it as it is)")
    if say and (H % m or W % m):
        note(f"{what}: {W} x {H}, padded with void to {W + -W % m} x {H + -H % m} (multiples of {m}), images cropped")
    resized = Image.fromarray(np.asarray(label, np.uint8)).resize((W, H), Image.NEAREST)        # (as data.Pairs)
    return torch.from_numpy(np.array(resized)).long()


def note(text):
    print(text, file=sys.stderr)


def write_png(path, image):
    """image: a PIL.Image, or uint8 [H,W] or [H,W,3]. The file is there whole or not at all."""
    with atomic(path) as temporary:
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(temporary, format="PNG")


def write_text(path, text):
    with atomic(path) as temporary:
        Path(temporary).write_text(text, "utf-8")


def make_folder(path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: choose another folder") from None
    if not os.access(path, os.W_OK):
        raise InputError(f"{path}: may not be written to: choose another folder")
    return Path(path)


def sample_layout(model, layout, args):
    """--layout: n images of one label map [H,W], and a grid of layout and images, go to --out."""
    path, label = Path(args.layout), fit(layout, model.preset, args.size, args.layout)
    out, seeds = make_folder(args.out), range(args.seed, args.seed + args.n)
    with tqdm(total=args.steps * math.ceil(args.n / (1 if args.eta else args.batch)), desc="DDIM steps") as bar:
        images = generate(model, label.expand(args.n, -1, -1), [args.prompt] * args.n, seeds, **sampling(args),
                          on_step=lambda i, x0_hat: bar.update())
    files = {f"{path.stem}_{seed}.png": image for seed, image in zip(seeds, images)}
    files[f"{path.stem}_{args.seed}_grid.png"] = grid([[np.asarray(colorize(label, model.classes)), *images]])
    for name, image in files.items():
        write_png(out / name, image)
    print(f"{out}: {', '.join(files)}")


def sampling(args):
    return {name: getattr(args, name) for name in ("negative", "steps", "cfg", "eta", "batch")}


# -- a whole data set -------------------------------------------------------------------------------------------------


def open_split(model, args, split):
    """A split of --data, at the size the model was trained at -> dataset, load(i) -> dict(image, label, caption, name),
    uncropped."""
    key = args.data or model.classes.key
    options = {} if key.startswith("toy") else dict(grid=model.preset.vae.factor)
    dataset = open_dataset(key, args.root, split, args.size or model.preset.size, **options)

    def load(i):
        (image, label), name = dataset.full(i), dataset.names[i]
        caption = dataset.captions.get(name) or compose_caption(label, dataset.classes.names)
        return dict(image=image, label=label, caption=caption, name=name)
    return dataset, load


def find_layouts(model, args):
    """--layouts, a split of --data or a folder of PNGs -> names, load(i) -> dict(label, caption, ...)"""
    place = Path(args.layouts)
    if not place.is_dir():
        if os.sep in args.layouts:
            raise InputError(f"--layouts {args.layouts}: no such folder")
        dataset, load = open_split(model, args, args.layouts)
        return dataset.names, load
    folder = place / "labels" if (place / "labels").is_dir() else place
    files, captions = sorted(folder.glob("*.png")), read_captions(place, "", None)
    if not files:
        raise InputError(f"--layouts {folder}: no .png in there: name a folder with layouts, or a split of --data")
    if Path(args.out).resolve() in (place.resolve(), folder.resolve(), folder.resolve().parent):
        raise InputError(f"--out {args.out}: the layouts are there: choose another folder")

    def load(i, say=False):
        label = fit(read_layout(files[i], model.classes), model.preset, args.size, files[i], say)
        return dict(label=label, caption=captions.get(files[i].stem) or compose_caption(label, model.classes.names))
    for i in range(len(files)):                                     # a broken one is found now, not hours later
        load(i, say=i == 0)
    return [file.stem for file in files], load


def same_size(items, batch):
    """Dicts with a `label` [H,W] -> lists of at most `batch` of them, all of one size in each."""
    waiting = {}
    for item in items:
        group = waiting.setdefault(item["label"].shape, [])
        group.append(item)
        if len(group) == batch:
            yield waiting.pop(item["label"].shape)
    yield from waiting.values()


def classes_txt(classes):
    """The text by which data.class_table knows these classes again; a colour that two share goes to the first."""
    colours = [tuple(c) for c in classes.palette.tolist()]
    return "".join(f"{name} {' '.join(map(str, c)) if colours.index(c) == i else ''}".strip() + "\n"
                   for i, (name, c) in enumerate(zip(classes.names, colours)))


def add_captions(out, new):
    """Put {name: caption} into out/captions.json, one process after the other."""
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        captions = dict(sorted((read_captions(out, "", None) | new).items()))
        write_text(out / "captions.json", json.dumps(captions, indent=1, ensure_ascii=False))


def sample_dataset(model, args):
    """--layouts: n images of each layout with each prompt, as a dataset that `--data DIR` takes: images/, labels/,
    classes.txt, captions.json. Images that are there are left alone, so that the same command resumes."""
    names, load = find_layouts(model, args)
    stems = [re.sub(r"[^\w.-]", "_", name).lstrip(".") or "_" for name in names[:args.limit]]    # (none leads out)
    if len(set(stems)) < len(stems):
        raise InputError(f"--layouts {args.layouts}: two layouts are called {max(stems, key=stems.count)}: rename one")
    out, known, missing = Path(args.out), read_captions(Path(args.out), "", None), {}
    for i, stem in list(enumerate(stems))[args.shard[0]::args.shard[1]]:
        for p, prompt in enumerate(args.prompts):
            for name in (f"{stem}_{p}_{k}" for k in range(args.n)):
                if "{caption}" not in prompt and known.get(name, prompt) != prompt:
                    raise InputError(f"{out}: there, {name} is {known[name]!r}, not {prompt!r}: choose another --out")
                if not all((out / kind / f"{name}.png").exists() for kind in ("images", "labels")):
                    missing.setdefault(i, []).append((name, prompt))
    for kind in ("images", "labels"):
        make_folder(out / kind)
    write_text(out / "classes.txt", classes_txt(model.classes))

    def jobs():
        for i, todo in missing.items():
            item = load(i)
            for name, prompt in todo:
                yield dict(label=item["label"], name=name, prompt=prompt.replace("{caption}", item["caption"]))

    count = sum(map(len, missing.values()))
    with tqdm(total=count, unit="image", dynamic_ncols=True) as bar:
        for group in same_size(jobs(), args.batch):
            labels, names, prompts = ([job[key] for job in group] for key in ("label", "name", "prompt"))
            seeds = [image_seed(args.seed, name) for name in names]
            images = generate(model, torch.stack(labels), prompts, seeds, **sampling(args))
            add_captions(out, dict(zip(names, prompts)))
            for name, label, image in zip(names, labels, images):   # the image last: where it is, the rest is, too
                write_png(out / "labels" / f"{name}.png", label.byte().numpy())
                write_png(out / "images" / f"{name}.png", image)
            bar.update(len(group))
    print(f"{out}: {count} new images; train on them with --data {out}")


# -- how good the images are ------------------------------------------------------------------------------------------


def frechet_distance(mu1, cov1, mu2, cov2):
    """Of two Gaussians, squared as the field reports it: |mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    mu [C], C [C,C], float64 -> float. C1 C2 has the eigenvalues, all >= 0, of the symmetric C1^(1/2) C2 C1^(1/2).
    """
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross).clamp(min=0).item()


def precision_recall(real, fake, k=3):
    """Kynkaanniemi et al. 2019: real [L,C], fake [M,C] -> the share of fakes that lie among the real (precision), and
    of the real that lie among the fakes (recall): nearer to one of them than its own k-th neighbour."""
    def share(points, among):
        radius = torch.cdist(among, among).kthvalue(k + 1).values   # (the nearest to each is itself)
        return (torch.cdist(points, among) <= radius).any(1).double().mean().item()
    return share(fake, real), share(real, fake)


def diversity(features):
    """features [L,n,C] of n samples for each of L layouts -> the mean distance between two samples of one layout."""
    L, n, _ = features.shape
    return (torch.cdist(features, features).sum() / (L * n * (n - 1))).item()


def toy_edit(caption, i):
    """A caption in another domain's words, by turns: "..., in daylight" -> "..., at night", and that domain's index."""
    own = next((d for d in DOMAINS if any(phrase in caption for phrase in PHRASES[d])), DOMAINS[0])
    target = [d for d in DOMAINS if d != own][i % (len(DOMAINS) - 1)]
    for phrase in PHRASES[own]:
        caption = caption.replace(phrase, PHRASES[target][0])
    return caption, DOMAINS.index(target)


class Clip:
    """open_clip's image and text features, if the weights are in the Hugging Face cache; they are never downloaded."""
    NAME, REPO = "ViT-B-32", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"

    @classmethod
    def find(cls):
        """-> the path of the weights, or None"""
        files = [try_to_load_from_cache(cls.REPO, f"open_clip_{f}") for f in ("model.safetensors", "pytorch_model.bin")]
        return next((file for file in files if isinstance(file, str)), None)

    def __init__(self, device):
        self.net = open_clip.create_model(self.NAME, pretrained=self.find(), device=device).eval()
        self.tokenize, self.device = open_clip.get_tokenizer(self.NAME), device

    def image(self, x):
        """x [B,3,H,W] in [-1,1] -> unit vectors [B,512]"""
        x = (F.interpolate(x, (224, 224), mode="bicubic", antialias=True).clamp(-1, 1) + 1) / 2
        mean, std = (x.new_tensor(getattr(open_clip, f"OPENAI_DATASET_{v}"))[:, None, None] for v in ("MEAN", "STD"))
        return F.normalize(self.net.encode_image((x - mean) / std), dim=1)

    def similarity(self, prompts):
        """P prompts -> a function: x [B,3,H,W] -> cosines [B,P]"""
        with torch.no_grad():
            text = F.normalize(self.net.encode_text(self.tokenize(prompts).to(self.device)), dim=1)
        return lambda x: self.image(x) @ text.T


@torch.no_grad()
def evaluate(model, items, judge, classifier=None, edit=toy_edit, targets=DOMAINS, features=None, n=4, diverse=16,
             seed=0, batch=8, bar=None, **options):
    """Do images generated from the items' layouts obey them, look like the items' images, obey words, and vary?

    items        dicts of image [3,H,W] in [-1,1], label [H,W], caption, name: one image is generated for each
    judge        an independent segmenter: UperNet with the model's classes (further outputs are passed over)
    classifier   images [B,3,H,W] in [-1,1] -> scores [B,len(targets)]: do images of edited prompts show their target?
                 edit(caption, i) -> the i-th layout's edited prompt, and the index of its target. None: left out
    features     images -> [B,C] for Frechet distance, precision, recall, diversity; None: the judge's last map, pooled
    n, diverse   n samples (1: none) of each of the first `diverse` layouts (in whole batches) for the diversity
    options      of `generate`: steps, cfg, ...
    -> dict of plain values, ready for JSON (what the judge finds in "reconstructed" images, the autoencoder's, is the most
    that generated ones can reach); None: cannot be told, as the IoU of a class that is not there
    """
    N, kinds = len(model.classes.names), ["generated", *["edited"] * bool(classifier), "reconstructed", "real"]
    features = features or (lambda x: judge.features(x)[-1].mean((2, 3)))
    confusion, found = {kind: torch.zeros(N, N, dtype=torch.int64) for kind in kinds}, {kind: [] for kind in kinds}
    hits, spread, count = [], [], 0
    for group in same_size(items, batch):
        labels, captions = torch.stack([item["label"] for item in group]), [item["caption"] for item in group]

        def draw(prompts, k):           # the sample called k of each layout -> [b,3,H,W] in [-1,1]
            seeds = [image_seed(seed, f"{item['name']}/{k}") for item in group]
            return from_pixels(generate(model, labels, prompts, seeds, batch=batch, **options), model.device)

        images = {"generated": draw(captions, 0)}
        images["real"] = torch.stack([item["image"] for item in group]).to(model.device)
        images["reconstructed"] = model.vae.decode(model.vae.encode(images["real"])).clamp(-1, 1)       # the ceiling
        if classifier:
            prompts, wanted = zip(*(edit(caption, count + i) for i, caption in enumerate(captions)))
            images["edited"] = draw(prompts, "edited")
            hits += zip(wanted, (classifier(images["edited"]).argmax(1).cpu() == torch.tensor(wanted)).tolist())
        for kind, x in images.items():
            confusion[kind] += confusion_matrix(judge(x)[:, :N].argmax(1).cpu(), labels.cpu(), N)
            found[kind].append(features(x).double().cpu())
        if n > 1 and count < diverse:
            samples = [images["generated"]] + [draw(captions, k) for k in range(1, n)]
            pixels = [x.flatten(1) / 2 / x[0].numel() ** 0.5 for x in samples]      # distance = RMS difference, 0..1
            spread += [[diversity(torch.stack(v, 1)) for v in ([features(x) for x in samples], pixels)]] * len(group)
        count += len(group)
        bar and bar.update(len(group))

    plain = lambda v: None if math.isnan(v) else round(v, 5)
    mean = lambda values: plain(sum(values) / len(values)) if values else None
    result = {"layouts": count}
    for kind in kinds:
        miou, per_class = mean_iou(confusion[kind])
        result[f"mIoU_{kind}"] = plain(miou)
        result[f"IoU_{kind}"] = dict(zip(model.classes.names, map(plain, per_class.tolist())))
    real, fake = torch.cat(found["real"]), torch.cat(found["generated"])
    gaussians = [moment for v in (real, fake) for moment in (v.mean(0), torch.cov(v.T))] if count > 1 else None
    result["frechet_distance"] = plain(frechet_distance(*gaussians)) if gaussians else None
    result["precision"], result["recall"] = map(plain, precision_recall(real, fake)) if count > 3 else (None, None)
    result["diversity"], result["diversity_pixels"] = map(mean, zip(*spread)) if spread else (None, None)
    result["editability"] = mean([hit for _, hit in hits])
    result["editability_of"] = {t: mean([hit for w, hit in hits if w == i]) for i, t in enumerate(targets) if hits}
    return result


def load_judge(model, args):
    """--judge, --features and what the base file holds -> judge, and the arguments of `evaluate` that depend on it."""
    toy, device, targets = model.preset == PRESETS["toy"], model.device, args.prompts or WEATHER
    parts = load_weights(args.sd or base_file("toy")) if toy and model.classes.key == "toy" else {}
    if args.judge:                                          # mit-semseg's, in two files, wants normalised images
        shape = dict(model.preset.segmenter, normalize=len(args.judge) == 2)
    elif "judge" in parts:
        shape = JUDGE
    else:
        raise InputError("--evaluate needs a segmenter that the training has not seen: name its file(s) with --judge")
    judge = UperNet(len(model.classes.names) + 1, **shape)
    judge.decoder.conv_last[1].bias.data.fill_(-1e4)        # classes that the file does not know are never seen
    load_segmenter(args.judge or parts["judge"], judge, model.classes)
    clip = Clip(device) if Clip.find() and ("domain" not in parts or args.features == "clip") else None
    if args.features == "clip" and not clip:
        raise InputError(f"--features clip: {Clip.REPO} is not in the Hugging Face cache: put it there")
    options = dict(features=clip.image if args.features == "clip" else None)
    if "domain" in parts:
        classifier = Classifier(len(DOMAINS))
        load_into(classifier, parts["domain"], "domain", device, torch.float32)
        options |= dict(classifier=classifier.eval())
    elif clip:
        options |= dict(classifier=clip.similarity(targets), targets=targets,
                        edit=lambda caption, i: (targets[i % len(targets)], i % len(targets)))
    else:
        note(f"text editability is left out: {Clip.REPO} is not in the Hugging Face cache")
    return judge.to(device).eval(), options


def sample_and_judge(model, args):
    """--evaluate: a split of --data -> a table, and the JSON."""
    dataset, load = open_split(model, args, args.split)
    judge, options = load_judge(model, args)
    count = min(args.limit or len(dataset), len(dataset))
    settings = {**sampling(args), "n": args.n, "seed": args.seed}
    with tqdm(total=count, unit="layout", dynamic_ncols=True) as bar:
        result = evaluate(model, map(load, range(count)), judge, bar=bar, **options, **settings)
    path = Path(args.json or Path(args.out) / "evaluation.json")
    make_folder(path.parent)
    about = dict(adapter=str(args.ckpt), data=args.data or model.classes.key, split=args.split, features=args.features)
    write_text(path, json.dumps({**result, **settings, **about}, indent=1))
    show(result)
    print(f"written to {path}")


def show(result):
    """The table of --evaluate: a row per class that is there, a column per kind of image."""
    kinds = [kind for kind in ("generated", "edited", "reconstructed", "real") if f"mIoU_{kind}" in result]
    rows = {"mIoU": [result[f"mIoU_{kind}"] for kind in kinds]}
    rows |= {f"  {c}": [result[f"IoU_{kind}"][c] for kind in kinds] for c in result["IoU_real"]}
    rows |= {name.replace("_", " "): [result[name]] for name in
             ("frechet_distance", "precision", "recall", "diversity", "diversity_pixels", "editability")}
    rows |= {f"  {target}": [share] for target, share in result["editability_of"].items()}
    print(f"{result['layouts']} layouts".ljust(20) + "".join(kind.rjust(14) for kind in kinds))
    for name, values in rows.items():
        if any(v is not None for v in values):
            print(name.ljust(20) + "".join(("-" if v is None else f"{v:.3f}").rjust(14) for v in values))


# -- how fast ---------------------------------------------------------------------------------------------------------


def bench(model, args):
    """--bench: seconds per image and per DDIM step (median), and FLOP/s by PyTorch's count of the operations."""
    side, cuda, stamps = args.size or model.preset.size, model.device.type == "cuda", []
    label = torch.full((args.batch, side, side), IGNORE)

    def run(steps):
        """-> the seconds it takes; `stamps` are the times at which steps ended"""
        def stamp(*_):
            cuda and torch.cuda.synchronize()
            stamps.append(time.perf_counter())
        stamps.clear()
        began = time.perf_counter()
        options = {**sampling(args), "steps": steps, "on_step": stamp}
        generate(model, label, [args.prompt] * args.batch, range(args.batch), **options)
        return time.perf_counter() - began

    flops = []
    for steps in (1, 2):                                            # (this warms up, too)
        with FlopCounterMode(display=False) as counter:
            run(steps)
        flops.append(counter.get_total_flops())
    run(2)
    total, per_step = run(args.steps), flops[1] - flops[0]          # the rest: text, layout, decoder
    work = flops[0] + (args.steps - 1) * per_step
    step = statistics.median(np.diff(stamps)) if args.steps > 1 else math.nan
    device = torch.cuda.get_device_name(model.device) if cuda else f"{cpu_name()}, {torch.get_num_threads()} threads"
    print(f"{device}: {side} x {side} pixels, batch {args.batch}, {args.steps} steps, guidance {args.cfg}")
    for what, seconds, count, n in (("image", total, work, args.batch), ("step", step, per_step, 1)):
        print(f"{seconds / n:.4g} s per {what}, {count / n / 1e9:.4g} GFLOP, {count / seconds / 1e9:.0f} GFLOP/s")


def cpu_name():
    lines = open("/proc/cpuinfo").read().splitlines() if os.path.exists("/proc/cpuinfo") else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


# -- the page to paint layouts on -------------------------------------------------------------------------------------

PAGE = Path(__file__).parent / "assets" / "paint.html"
BODY = 4 * 2**20                # bytes that a request may have; a painted layout of 512 x 1024 takes a small part of it
PREVIEWS = 6                    # estimates that are decoded on the way: on a CPU the decoder takes as long as a step
HEADERS = {"Content-Security-Policy": "default-src 'self' 'unsafe-inline' data:; base-uri 'none'; form-action 'none'; "
           "frame-ancestors 'none'", "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


def generate_steps(model, label, prompt, negative, seed, steps, cfg, on_step):
    """label [H,W] -> uint8 [H,W,3]. on_step(i, the image of x0_hat, or None) is called after each step."""
    shown = {steps * k // PREVIEWS for k in range(PREVIEWS)}

    def step(i, x0_hat):
        on_step(i, to_pixels(model.vae.decode(x0_hat.float()))[0] if i in shown else None)
    return generate(model, label[None], [prompt], [seed], negative, steps, cfg, on_step=step)[0]


def read_request(raw, model, size):
    """A request's body -> label [H,W] brought to `size`, its own (w, h), the other arguments of generate_steps."""
    try:
        given = dict(json.loads(raw))
    except (ValueError, TypeError, RecursionError):
        raise InputError("the request is not a JSON object") from None
    args, T = {}, len(model.schedule.alphas_cumprod)
    text = lambda v: type(v) is str and not re.search("[\ud800-\udfff]|.{2001}", v, re.S)    # (no halves of characters)
    for key, default, good, wanted in (
            ("prompt", "", text, "a text of at most 2000 characters"),
            ("negative", "", text, "a text of at most 2000 characters"),
            ("seed", 0, lambda v: type(v) is int and 0 <= v < 2**32, "a whole number from 0 to 4294967295"),
            ("steps", 25, lambda v: type(v) is int and 1 <= v <= T, f"a whole number from 1 to {T}"),
            ("cfg", None, lambda v: type(v) in (int, float) and 0 <= v <= 50, "a number from 0 to 50")):
        args[key] = given.get(key, default)
        if key in given and not good(args[key]):
            raise InputError(f"{key} must be {wanted}, not {json.dumps(args[key]):.60}")
    try:
        png = base64.b64decode(given.get("layout"), validate=True)
    except (TypeError, ValueError):
        raise InputError("layout must be a PNG in base64") from None
    with tempfile.TemporaryDirectory() as folder:        # read_layout takes files; their names tell kinds of ids
        path = Path(folder) / f"layout_{re.search('labelTrainIds|labelIds|$', str(given.get('name')))[0]}.png"
        path.write_bytes(png)
        try:
            label = read_layout(path, model.classes)
        except InputError as error:
            raise InputError(str(error).replace(str(path), "the layout")) from None
    resized = F.interpolate(label[None, None].float(), size, mode="nearest-exact")[0, 0].long()
    return resized, label.shape[::-1], args


def encode(array):
    """uint8 [H,W,3] -> a PNG, uint8 [H,W] -> one byte per pixel; both in base64."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG") if array.ndim == 3 else file.write(array.tobytes())
    return base64.b64encode(file.getvalue()).decode()


def painter(model, port=8000, examples=(), prompts=(), steps=25, cfg=2.0):
    """The page's server, for this machine only. examples: labels [H,W] of one size that suits the model, whose classes
    are offered first; without any, the canvas is the preset's square."""
    examples = [np.asarray(label, np.uint8) for label in examples]
    size = examples[0].shape if examples else (model.preset.size,) * 2
    palette = np.asarray(model.classes.palette).tolist()
    usual = set(np.unique(examples).tolist()) if examples else set(range(12))
    classes = [dict(id=i, name=name, color=color, common=i in usual, twin=palette.index(color) < i)      # read as another
               for i, (name, color) in enumerate(zip(model.classes.names, palette))]
    if [0, 0, 0] not in palette:
        classes.append(dict(id=IGNORE, name="void", color=[0, 0, 0], common=IGNORE in usual, twin=False))
    world = dict(classes=classes, examples=[encode(label) for label in examples], height=size[0], width=size[1],
                 prompts=list(prompts), steps=steps, cfg=cfg, limit=BODY, max_steps=len(model.schedule.alphas_cumprod))
    queue, turn = [], threading.Condition()              # those who wait for the model, first come first served

    class Handler(BaseHTTPRequestHandler):
        timeout = 30                                     # seconds without a byte from a client, or to one
        log_message = lambda self, *args: None

        def answer(self, code, body=None, kind="application/json"):
            body = json.dumps(body).encode() if isinstance(body, dict) else body
            self.send_response(code)
            for name, value in {"Content-Type": kind, "Connection": "close", **HEADERS}.items():
                self.send_header(name, value)
            if body is not None:                         # otherwise lines follow, up to the connection's end
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body or b"")

        def foreign(self):
            """Pages of other sites get nothing, neither by their own name nor by a name of theirs that points here."""
            hosts = [f"{name}:{self.server.server_port}" for name in ("127.0.0.1", "localhost")]
            if self.headers["Host"] in hosts and self.headers["Origin"] in (None, *(f"http://{h}" for h in hosts)):
                return False
            self.answer(403, {"error": f"only for http://{hosts[0]} (a forwarded port must keep its number)"})
            return True

        def do_GET(self):
            if not self.foreign():
                text = json.dumps(world).replace("<", "\\u003c")              # a class's name cannot end the script
                page = PAGE.read_text("utf-8").replace("__WORLD__", text).encode()
                self.answer(200, page, "text/html; charset=utf-8") if self.path == "/" else self.answer(404, b"")

        def do_POST(self):
            if not re.fullmatch("[0-9]{1,12}", self.headers["Content-Length"] or ""):
                return self.answer(400, {"error": "a request needs its Content-Length"})
            if (left := int(self.headers["Content-Length"])) > BODY:
                self.answer(413, {"error": f"the request has {left} bytes; at most {BODY} are taken"})
                while left > 0 and (got := len(self.rfile.read(min(left, 2**16)))):
                    left -= got                          # most clients read the answer only when they have sent it all
                return
            raw = self.rfile.read(left)
            if self.foreign():
                return
            try:
                label, own_size, args = read_request(raw, model, size)
            except InputError as error:
                return self.answer(400, {"error": str(error)})
            if self.path == "/layout":
                return self.answer(200, {"layout": encode(label.byte().numpy()), "size": own_size})
            if self.path != "/generate":
                return self.answer(404, {"error": "there are /layout and /generate"})
            with contextlib.suppress(OSError):           # the client went away: a send fails and ends it
                self.answer(200, kind="application/x-ndjson")
                self.generate(label, args)

        def generate(self, label, args):
            def send(image=None, **line):
                line |= {} if image is None else {"image": encode(image)}
                self.wfile.write(json.dumps(line).encode() + b"\n")

            me = object()
            queue.append(me)
            try:
                ready = False
                while not ready:
                    send(queued=queue.index(me))
                    with turn:
                        ready = turn.wait_for(lambda: queue[0] is me, timeout=1)
                start = time.time()
                if cut := model.text.cut(args["prompt"]):
                    send(note=f"the prompt is too long: the model does not see its end, {cut!r:.200}")
                image = generate_steps(model, label, **args, on_step=lambda i, x: send(x, step=i + 1, of=args["steps"]))
                send(image, done=True, seconds=time.time() - start)
            except OSError:
                raise
            except Exception as error:                   # the card's memory is full, ...: the server lives on
                print(f"the generation failed: {error!r}", file=sys.stderr)
                send(error=f"the generation failed: {' '.join(str(error).split()):.300}")
            finally:
                with turn:
                    queue.remove(me)
                    turn.notify_all()

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def serve(model, port=8000, **options):
    """Serve the page until Ctrl+C; the options are `painter`'s."""
    try:
        server = painter(model, port, **options)
    except (OSError, OverflowError) as error:
        raise InputError(f"port {port}: {error}; choose another with --port") from None
    print(f"paint a layout at http://127.0.0.1:{server.server_port} (Ctrl+C ends)", flush=True)
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


# -- the command line -------------------------------------------------------------------------------------------------


def number(low, high=math.inf, kind=float, exclusive=False):
    """An argparse type: a finite number of `kind` in [low, high], or in (low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf or exclusive and value == low:     # (nan fails the first)
            raise ValueError
        return value
    parse.__name__ = f"{'whole ' if kind is int else ''}number {'above' if exclusive else 'from'} {low}" + \
        (f" to {high}" if high < math.inf else "")
    return parse


def shard(text):
    """An argparse type: "i/n" with 0 <= i < n -> i, n"""
    i, n = map(int, text.split("/"))
    if not 0 <= i < n:
        raise ValueError
    return i, n


shard.__name__ = "shard i/n, 0 <= i < n,"


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, whole = p.add_argument, lambda low, high=math.inf: number(low, high, int)
    add("--layout", metavar="FILE", help="a label map: ids or colours, PNG")
    add("--prompt", default="", help="what to paint; may be empty")
    add("--negative", default="", help="what guidance leads away from")
    add("--ckpt", "--adapter", default=ADAPTER, help="an adapter, or a run's folder (default: the toy's)")
    add("--sd", metavar="FILE", help="Stable Diffusion 1.x, one file (default: downloaded; toy: in assets/)")
    add("--preset", choices=list(PRESETS), help="refuse a checkpoint of another one")
    add("--data", help="toy (or toy:night, ...), cityscapes, ade20k, coco or a folder (default: the checkpoint's)")
    add("--root", metavar="DIR", help="where the files of --data are")
    add("--out", metavar="DIR", default="samples", help="folder of the results (default: %(default)s)")
    add("--n", type=whole(1), help="images per layout, seeds: seed, seed + 1, ... (default: 1; --evaluate: 4)")
    add("--steps", type=whole(1, 1000), default=25, help="DDIM steps (default: %(default)s)")
    add("--cfg", type=number(0), help="guidance scale, 1 for none (default: " +
        ", ".join(f"{name} {value:g}" for name, value in GUIDANCE.items()) + ")")
    add("--eta", type=number(0, 1), default=0.0, help="0: deterministic, 1: as noisy as DDPM (default: %(default)s)")
    add("--seed", type=whole(0, 2 ** 32), default=0, help="(default: %(default)s)")
    add("--size", type=whole(0), help="shorter side in pixels; 0: the layout's (default: at most the training size)")
    add("--batch", type=whole(1), default=8, help="images at a time (default: %(default)s)")
    add("--device", help="cpu or cuda (default: cuda if there)")
    add("--layouts", metavar="DIR|SPLIT", help="make a data set from the layouts in a folder or of a split of --data")
    add("--prompts", nargs="+", help="one or more for each of --layouts; {caption}: its own (default: {caption})")
    add("--shard", type=shard, default=(0, 1), metavar="i/n", help="each n-th layout from the i-th on: for n processes")
    add("--limit", type=whole(1), help="only the first so many layouts")
    add("--evaluate", action="store_true", help="measure quality on --split of --data")
    add("--split", default="val", help="(default: %(default)s)")
    add("--judge", nargs="+", metavar="FILE", help="segmenter that judges: ours, or mit-semseg's encoder and decoder")
    add("--features", choices=["judge", "clip"], default="judge", help="of Frechet distance ... (default: %(default)s)")
    add("--json", metavar="FILE", help="where the figures go (default: evaluation.json in --out)")
    add("--bench", action="store_true", help="measure speed")
    add("--serve", action="store_true", help="a page on localhost to paint layouts on")
    add("--port", type=whole(0, 65535), default=8000, help="of --serve (default: %(default)s)")

    p.error = refuse
    args = p.parse_args(argv)
    if not (args.layout or args.layouts or args.evaluate or args.bench or args.serve):
        raise InputError("nothing to do: give --layout FILE, --layouts DIR|SPLIT, --evaluate, --bench or --serve")
    args.device = pick_device(args.device)
    if args.device == "cpu":
        keep_memory()
    args.n = args.n or (4 if args.evaluate else 1)
    args.prompts = args.prompts or (["{caption}"] if args.layouts else None)
    return args


def run(args):
    meta, _ = read_adapter(args.ckpt)
    if args.preset not in (None, meta["preset"]):
        raise InputError(f"{args.ckpt}: is of the {meta['preset']} preset, not of --preset {args.preset}")
    classes = classes_of(meta, args.ckpt, args.data)
    layout = read_layout(args.layout, classes) if args.layout else None     # quick to check, so before the large files
    args.cfg = GUIDANCE[meta["preset"]] if args.cfg is None else args.cfg
    model = load_model(args.ckpt, args.sd, args.device, classes)
    for prompt in dict.fromkeys([args.prompt, args.negative, *(args.prompts or [])]):
        if cut := model.text.cut(prompt):
            note(f"a prompt is longer than the 77 tokens that the model reads; cut off is: {cut}")
    if args.bench:
        bench(model, args)
    elif args.serve:
        toy = model.preset == PRESETS["toy"]
        serve(model, args.port, examples=[toy_scene(10_000_001 + i)[1] for i in range(12)] if toy else (),
              prompts=("a street with a red car and trees, on a clear day", "a street at night", "a street in snow",
                       "a street in fog", "a street in rain"), steps=args.steps, cfg=args.cfg)
    elif args.evaluate:
        sample_and_judge(model, args)
    elif args.layouts:
        sample_dataset(model, args)
    else:
        sample_layout(model, layout, args)


def main():
    try:
        run(parse_args())
    except InputError as error:
        note(f"sample.py: {error}")
        raise SystemExit(2)
    except torch.OutOfMemoryError:
        note("sample.py: out of GPU memory: choose a smaller --batch or --size")
        raise SystemExit(1)
    except OSError as error:                                        # such as a full disk: nothing is half-written
        note(f"sample.py: {error}")
        raise SystemExit(1)
    except KeyboardInterrupt:
        raise SystemExit(130)


if __name__ == "__main__":
    main()

"""How good a folder of generated images is: the second pass of `sample.py --evaluate`.

`Judges` are networks that the training has not seen, and `judge_folder` asks them. A reader of the
paper can skip this file.
"""
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from torch import nn

from aldm import PRESETS, base_file, load_into, load_segmenter, load_weights, read_parts
from data import (PICTURES, InputError, class_table, find_images, read_edits, read_image,
                  read_layout, read_text)
from discriminator import ResNet, UperNet, confusion_matrix, mean_iou
from tools.run import note

CLIP = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
# The size of the toy's own judge, a UperNet.
JUDGE = dict(layers=(1, 1, 1, 1), width=8, fpn_dim=24, ppm_dim=48, stem_stride=1)
KINDS = "generated", "edited", "reconstructed", "real"  # of images


# -- the judges ------------------------------------------------------------------------------------


@dataclass
class Judges:
    """Networks that judge images [B,3,H,W] in [-1,1]."""
    segmenter: nn.Module  # a UperNet
    classifier: nn.Module = None  # of the targets of the data set's own edited prompts
    unjudged: tuple = ()  # names of the classes that the segmenter cannot tell
    clip: nn.Module = None
    clip_features: bool = False  # CLIP's embeddings for the distances

    @property
    def device(self):
        return next(self.segmenter.parameters()).device

    def features(self, images):
        """-> [B,C] float64 for the distances; unless CLIP's, the average over the last map of the
        segmenter's encoder"""
        if self.clip_features:
            return self.clip.encode_images(images).double().cpu()
        return self.segmenter.features(images)[-1].mean((2, 3)).double().cpu()


class Classifier(nn.Module):
    """image [B,3,H,W] in [-1,1] -> logits [B,num_classes]: recognises the toy's weather."""

    def __init__(self, num_classes):
        super().__init__()
        self.encoder = ResNet((1, 1, 1, 1), width=8, stem_stride=2)
        self.head = nn.Linear(32 * 8, num_classes)

    def forward(self, image):
        coarsest = self.encoder(image)[-1]
        return self.head(coarsest.mean((2, 3)))


class Clip(nn.Module):
    """open_clip's cosines of images and texts."""

    def __init__(self, path, device):
        super().__init__()
        self.net = open_clip.create_model("ViT-B-32", pretrained=path, device=device).eval()
        self.tokenize = open_clip.get_tokenizer("ViT-B-32")

    def encode_images(self, images):
        """images [B,3,H,W] in [-1,1] -> unit vectors [B,512]"""
        mean = images.new_tensor(open_clip.OPENAI_DATASET_MEAN)[:, None, None]
        std = images.new_tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]
        images = F.interpolate(images, (224, 224), mode="bicubic", antialias=True).clamp(-1, 1)
        return F.normalize(self.net.encode_image(((images + 1) / 2 - mean) / std), dim=1)

    def forward(self, images, texts):
        """images [B,3,H,W] in [-1,1], P texts -> their cosines [B,P]"""
        said = self.net.encode_text(self.tokenize(texts).to(images.device))
        return self.encode_images(images) @ F.normalize(said, dim=1).T


def toy_judges(parts, classes, device):
    """The parts of the toy's base file -> Judges: its segmenter and its classifier of weathers.
    None for another file, or if they do not know these classes."""
    if "judge" not in parts or classes.names != class_table("toy").names:
        return None
    segmenter = UperNet(len(classes.names), **JUDGE)
    classifier = Classifier(len(parts["domain"]["head.bias"]))
    load_into(segmenter, parts["judge"], "judge")
    load_into(classifier, parts["domain"], "domain")
    return Judges(segmenter.to(device).eval(), classifier.to(device).eval())


def load_judge(files, classes):
    """--judge, a segmenter of ours or mit-semseg's two files -> UperNet, and the names of the
    classes it cannot judge: an ADE20K segmenter has one output for several of them, or none."""
    unjudged = ()
    _, meta = read_parts(files[0])
    if meta.get("format") == "aldm-segmenter":
        if tuple(meta["names"]) != classes.names:
            raise InputError(f"--judge {files[0]}: has the {len(meta['names'])} classes of "
                             f"{meta['dataset']}, not those of {classes.key}")
    elif len(files) == 2 and classes.names != class_table("ade20k").names:
        unjudged = tuple(name for name, ade in zip(classes.names, classes.ade)
                         if ade is None or classes.ade.count(ade) > 1)
        left_out = ", ".join(unjudged) or "none of yours"
        note(f"--judge: has ADE20K's classes; the mIoU leaves out {left_out}")
    preset = PRESETS[meta.get("preset", "sd15")]
    judge = UperNet(len(classes.names), **preset.segmenter)
    judge.decoder.conv_last[1].bias.data.fill_(-1e4)  # never predict classes the files lack
    load_segmenter(files, judge, classes)
    return judge.eval(), unjudged


def choose_judges(args, classes, preset):
    """-> Judges by --judge and --features. The toy's judges are in its base file. CLIP is used if
    it is in the Hugging Face cache."""
    judges = None
    if preset == PRESETS["toy"]:
        judges = toy_judges(load_weights(args.sd or base_file("toy")), classes, args.device)
    if args.judge:
        segmenter, unjudged = load_judge(args.judge, classes)
        classifier = judges.classifier if judges else None
        judges = Judges(segmenter.to(args.device), classifier, unjudged)
    if judges is None:
        raise InputError("--evaluate needs a segmenter that the training has not seen; give its "
                         "file, or files, as --judge")
    path = try_to_load_from_cache(CLIP, "open_clip_model.safetensors")
    if isinstance(path, str):
        judges.clip = Clip(path, args.device)
        judges.clip_features = args.features == "clip"
    elif args.features == "clip":
        raise InputError(f"--features clip: {CLIP} is not in the Hugging Face cache")
    else:
        note(f"{CLIP} is not in the Hugging Face cache; its figures are left out")
    return judges


# -- the folder ------------------------------------------------------------------------------------


def flat_names(names):
    """Names of layouts, perhaps with folders -> {name of their files: index}; InputError if two
    are the same."""
    flat = {}
    for i, name in enumerate(names):
        file_name = name.replace("/", "_")
        if file_name in flat:
            raise InputError(f"{names[flat[file_name]]} and {name}: the images of both would be "
                             f"named {file_name}; rename one of them")
        flat[file_name] = i
    return flat


def same_size(items, batch):
    """Dicts with a `label` [H,W] -> lists of at most `batch` of them, all of one size."""
    waiting = {}
    for item in items:
        size = item["label"].shape
        group = waiting.setdefault(size, [])
        group.append(item)
        if len(group) == batch:
            yield waiting.pop(size)
    yield from waiting.values()


def load_picture(dataset, i):
    """A picture of Pairs, uncropped -> dict of image [3,H,W], label [H,W], caption."""
    image, label = dataset.full(i)
    return {"image": image, "label": label, "caption": dataset.caption(i, label)}


def find_samples(folder, names=None):
    """The images in a folder -> {name of the layout: [file of each sample]}.

    NAME_k.png, NAME.png and NAME_p_k.png (of --layouts) are samples of NAME in `names`, those of
    the real pictures. None: NAME is what precedes the last number. Raises InputError."""
    samples = {}
    for file in find_images(folder / "images", PICTURES):
        once = re.sub(r"_\d+$", "", file.stem)
        twice = re.sub(r"_\d+$", "", once)
        found = [name for name in (once, file.stem, twice) if names is None or name in names]
        if not found:
            raise InputError(f"{file}: matches none of the real pictures, e.g. "
                             f"{next(iter(names))}; name images NAME_0.png, NAME_1.png, ...")
        samples.setdefault(found[0], []).append(file)
    if not samples:
        raise InputError(f"{folder / 'images'}: no images in there")
    return dict(sorted(samples.items()))


def load_samples(samples, classes, k=0, kind="images"):
    """Yield the k-th sample of each layout that has one, or its picture in the folder of another
    kind -> dict of name, image [3,H,W] in [-1,1], label [H,W], caption or None."""
    for name, files in samples.items():
        if k >= len(files):
            continue
        folder = files[k].parents[1]
        file = files[k] if kind == "images" else folder / kind / f"{name}.png"
        if not file.exists():
            continue
        image = torch.tensor(np.array(read_image(file))).permute(2, 0, 1).float() / 127.5 - 1
        label = read_layout(folder / "labels" / f"{files[k].stem}.png", classes)
        if image.shape[1:] != label.shape:
            raise InputError(f"{file}: {image.shape[2]} x {image.shape[1]} pixels, but its label "
                             f"has {label.shape[1]} x {label.shape[0]}")
        text = file.with_suffix(".txt")
        caption = read_text(text) if text.exists() else None
        yield {"name": name, "image": image, "label": label, "caption": caption}


@torch.no_grad()
def judge_folder(folder, dataset, judges, counted=None, batch=8):
    """Do the images in a folder obey their layouts, look real, obey words, and vary?

    folder    as sample.draw_judged writes it; images/, labels/ and classes.txt are enough
    dataset   Pairs with the real pictures; None: the figures that need them are None
    counted   how many samples of each layout count (None: all); the others show diversity only
    -> dict of plain values, ready for JSON; None where undefined, e.g. the IoU of an absent class
    """
    folder = Path(folder)
    classes = class_table(folder)
    if dataset is not None and dataset.classes.names != classes.names:
        raise InputError(f"{folder}/classes.txt: not the classes of {dataset.classes.key}")
    places = flat_names(dataset.names) if dataset is not None else None
    samples = find_samples(folder, places)
    confusions = {kind: 0 for kind in KINDS}
    points = {name: [] for name in samples}  # the features of its samples
    scores = []
    for k in range(max(map(len, samples.values()))):
        items = load_samples(samples, classes, k)
        features, confusion = ask_segmenter(judges, items, classes, batch)
        for name, point in features.items():
            points[name].append(point)
        if counted is None or k < counted:
            confusions["generated"] += confusion
            scores += ask_clip(judges, load_samples(samples, classes, k), batch)
    for kind in ("edited", "reconstructed"):
        items = load_samples(samples, classes, kind=kind)
        _, confusions[kind] = ask_segmenter(judges, items, classes, batch)
    items = []
    if dataset is not None:
        items = ({**load_picture(dataset, places[name]), "name": name} for name in samples)
    real, confusions["real"] = ask_segmenter(judges, items, classes, batch)
    fake = [point for several in points.values() for point in several[:counted]]
    apart = [diversity(torch.stack(several)) for several in points.values() if len(several) > 1]
    edits = read_edits(folder / "edits.json") or {"targets": [], "edits": {}}
    items = load_samples(samples, classes, kind="edited")
    return {"layouts": len(samples), "clip_score": mean(scores), "diversity": mean(apart),
            **summarize(confusions, classes.names, judges.unjudged),
            **compare([*real.values()], fake),
            **ask_about_edits(judges, items, edits, dataset, batch)}


def stack_images(group, device):
    return torch.stack([item["image"] for item in group]).to(device)


def ask_segmenter(judges, items, classes, batch):
    """Dicts of name, image, label -> {name: features [C]}, confusion matrix [N,N]. Outputs of the
    segmenter beyond N are ignored."""
    N = len(classes.names)
    features = {}
    confusion = torch.zeros(N, N, dtype=torch.int64)
    for group in same_size(items, batch):
        images = stack_images(group, judges.device)
        label = torch.stack([item["label"] for item in group])
        found = judges.segmenter(images)[:, :N].argmax(1).cpu()
        confusion += confusion_matrix(found, label, N)
        features |= zip([item["name"] for item in group], judges.features(images))
    return features, confusion


def ask_clip(judges, items, batch):
    """-> list of CLIP's cosines of images and their captions"""
    scores = []
    items = (item for item in items if judges.clip and item["caption"])
    for group in same_size(items, batch):
        captions = [item["caption"] for item in group]
        scores += judges.clip(stack_images(group, judges.device), captions).diag().tolist()
    return scores


def ask_about_edits(judges, items, edits, dataset, batch):
    """Do images of edited prompts show their target? -> editability, the share that do, of all and
    of each target. The classifier knows the data set's own targets, CLIP any. None for a single
    target: there is nothing to confuse it with."""
    targets = edits["targets"]
    score = judges.clip and partial(judges.clip, texts=targets)
    if dataset is not None and dataset.edits and dataset.edits["targets"] == targets:
        score = judges.classifier or score
    hits = {target: [] for target in targets}
    is_asked = score and len(targets) > 1
    items = (item for item in items if is_asked and item["name"] in edits["edits"])
    for group in same_size(items, batch):
        seen = score(stack_images(group, judges.device)).argmax(1).tolist()
        for item, answer in zip(group, seen):
            _, target = edits["edits"][item["name"]]
            hits[target].append(targets[answer] == target)
    return {"editability": mean(sum(hits.values(), [])),
            "editability_of": {target: mean(hits[target]) for target in targets}}


# -- the figures -----------------------------------------------------------------------------------


def summarize(confusions, names, unjudged):
    """{kind of image: confusion matrix} -> mIoU and IoU of each kind"""
    result = {}
    for kind, confusion in confusions.items():
        _, iou = mean_iou(confusion)
        iou[[names.index(name) for name in unjudged]] = math.nan
        result[f"mIoU_{kind}"] = rounded(iou.nanmean().item())
        result[f"IoU_{kind}"] = dict(zip(names, map(rounded, iou.tolist())))
    return result


def compare(real, fake):
    """Lists of features [C] float64 -> Frechet distance, precision and recall"""
    if len(real) <= 3:
        return {"frechet_distance": None, "precision": None, "recall": None}
    real = torch.stack(real)
    fake = torch.stack(fake)
    distance = frechet_distance(real.mean(0), torch.cov(real.T), fake.mean(0), torch.cov(fake.T))
    return {"frechet_distance": rounded(distance),
            "precision": rounded(share_among(fake, real)),
            "recall": rounded(share_among(real, fake))}


def frechet_distance(mu1, cov1, mu2, cov2):
    """Between two Gaussians, squared as is customary: |mu1-mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2).

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
    that one's own k-th neighbour. For fakes among reals it is the precision of Kynkaanniemi et al.
    2019, for reals among fakes the recall."""
    radius = torch.cdist(others, others).kthvalue(k + 1).values  # the nearest is the point itself
    return (torch.cdist(points, others) <= radius).any(1).double().mean().item()


def diversity(features):
    """features [n,C] of a layout's samples -> the mean distance between two of them"""
    n = len(features)
    return torch.cdist(features, features).sum().item() / (n * (n - 1))


def rounded(value):
    """For JSON, which has no nan."""
    return None if math.isnan(value) else round(value, 5)


def mean(values):
    return rounded(sum(values) / len(values)) if values else None


def show(result):
    """Print the result as a table: a row per class, a column per kind of image."""
    kinds = [kind for kind in KINDS if result[f"mIoU_{kind}"] is not None]
    rows = {f"{result['layouts']} layouts": kinds}
    rows["mIoU"] = [result[f"mIoU_{kind}"] for kind in kinds]
    for name in result["IoU_real"]:
        values = [result[f"IoU_{kind}"][name] for kind in kinds]
        if any(value is not None for value in values):
            rows[f"  {name}"] = values
    for name in ("frechet_distance", "precision", "recall", "diversity", "clip_score",
                 "editability"):
        rows[name.replace("_", " ")] = [result[name]]
    if result["layouts"] < 50 and result["frechet_distance"] is not None:
        rows["frechet distance"].append("  (unreliable: of fewer than 50 images)")
    for target, share in result["editability_of"].items():
        rows[f"  {target}"] = [share]
    for name, values in rows.items():
        print(name.ljust(20) + "".join(str(value).rjust(14) for value in values))

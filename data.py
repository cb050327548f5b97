"""Data: class tables, layouts, captions, image/label pairs on disk, batches.

A layout is a label map, int64 [H,W]: class ids 0..N-1, and 255 for void (no class, no loss).
`Pairs` is the only data set. Its items depend on their keys alone, so a resumed run sees the same
batches. `Layouts` reads label maps without images. tools/files.py reads and writes files;
tools/layout_files.py and tools/caption_files.py know the forms of layouts and captions.
"""
import colorsys
import functools
import glob
import hashlib
import itertools
import json
import multiprocessing.connection
import os
import re
import signal
import unicodedata
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tools import toy_world
from tools.caption_files import find_captions, read_captions
from tools.files import (PICTURES, InputError, find_images, image_size, read_image, read_text,
                         report, try_all)
from tools.layout_files import (IGNORE, LAYOUTS, PUBLISHED, Survey, by_name, classes_of_ids,
                                coding_of_name, decide_coding, read_values)

HERE = Path(__file__).parent
ASSETS = HERE / "assets"
warnings.filterwarnings("ignore", "This process.*use of fork", DeprecationWarning)  # DataLoader's


# -- class tables ----------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Classes:
    """What the ids and the colours in a data set's label files mean. N classes."""
    key: str  # one of PUBLISHED, or a folder
    names: tuple  # N str
    palette: np.ndarray  # uint8 [N,3]; a shared colour reads as the first class
    ade: tuple  # N str or None: the nearest class of ADE20K
    file_ids: np.ndarray  # int16 [256]: id in a file -> class, 255 for void, -1 for no such id
    void: np.ndarray  # uint8 [M,3]: the colours of void


def split_key(data):
    """"toy:night" -> ("toy", "night"); "cityscapes" -> ("cityscapes", ""); folders stay whole."""
    key, _, part = str(data).partition(":")
    if key in ("toy", "cityscapes"):
        return key, part
    return str(data), ""


def class_table(data):
    """data: "toy", "cityscapes", "ade20k", "coco", or a folder with classes.txt -> Classes.

    Parts of a data set ("toy:night", "cityscapes:fog") have the classes of the whole. Classes are
    returned unchanged. Raises InputError for any other name, and for a list with mistakes.
    """
    if isinstance(data, Classes):
        return data
    key, _ = split_key(data)
    if key in PUBLISHED:
        return published_classes(key)
    path = Path(key, "classes.txt")
    if not path.is_file():
        raise InputError(f"{key}: expected {', '.join(PUBLISHED)} or a folder with classes.txt")
    return read_classes(path, key)


@functools.cache
def published_classes(key):
    name = "cityscapes" if key == "toy" else key  # the toy world has Cityscapes' classes
    return read_classes(ASSETS / f"{name}.txt", key)


CLASS = re.compile(r"(\w[\w ()&'/.+-]*?)" + r"[ ,\t]+(\d{1,3})" * 3 + r"|(\w[\w ()&'/.+-]*)")


def parse_class(line):
    """`name [R G B] [= nearest class of ADE20K]` -> name ("" for void), (R, G, B) or None, nearest.

    Fields are separated by spaces, commas or tabs. Raises ValueError for anything else.
    """
    entry, _, nearest = line.partition("=")
    found = CLASS.fullmatch(entry.rstrip(" ,\t"))
    if found is None:
        raise ValueError("expected `name` or `name R G B`")
    name = (found[1] or found[5]).strip()
    if not re.search(r"[^\W\d_]", name) or re.search(r"(?<!\S)[\d.+-]*\d(?!\S)", name):
        raise ValueError("a name consists of words, then come three numbers or none")
    if re.fullmatch("__?(ignore|background|void)__?", name, re.I):
        raise ValueError("write `void` for an id without a class, or `background` for a class")
    colour = None
    if found[1]:
        colour = int(found[2]), int(found[3]), int(found[4])
        if max(colour) > 255:
            raise ValueError("colours are numbers in 0..255")
    return "" if name.lower() == "void" else name, colour, nearest.strip()


def read_classes(path, key):
    """A class list, such as assets/*.txt and a folder's classes.txt -> Classes.

    Each line is a class (see `parse_class`). Its place is the id in label files, from 0; blank
    lines and lines with # do not count. `void`, perhaps with a colour, stands for an id without a
    class. Classes without a colour get one. Raises InputError that names the line.
    """
    text = unicodedata.normalize("NFC", read_text(path))
    entries = []  # (name, colour, nearest) by the id in label files
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line[0] == "#":
            continue
        try:
            entries.append(parse_class(line))
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {line!r}: {error}") from None

    is_class = np.array([name != "" for name, _, _ in entries], bool)
    if not is_class.any() or len(entries) > 255:
        raise InputError(f"{path}: {is_class.sum()} classes on {len(entries)} lines; expected 1 to "
                         "255")
    names, colours, nearest = zip(*itertools.compress(entries, is_class))
    file_ids = np.full(256, -1, np.int16)
    file_ids[:len(entries)] = np.where(is_class, is_class.cumsum() - 1, IGNORE)
    file_ids[IGNORE] = IGNORE

    taken = [colour for _, colour, _ in entries if colour]
    twins = [name for name, colour in zip(names, colours) if taken.count(colour) > 1]
    if twins and key != "ade20k":  # which publishes road and skyscraper in one colour
        raise InputError(f"{path}: {', '.join(twins)} share colours: give each its own, or none")
    fresh = fresh_colours(taken)
    palette = np.array([colour or next(fresh) for colour in colours], np.uint8)
    void = {colour for name, colour, _ in entries if colour and not name}
    if (0, 0, 0) not in taken:
        void.add((0, 0, 0))
    if not void:  # black is a class
        void.add(next(fresh))
    void = np.array(sorted(void), np.uint8)

    known = names if key == "ade20k" else class_table("ade20k").names
    missing = set(nearest) - {"", *known}
    if missing:
        raise InputError(f"{path}: ADE20K has no classes {missing}")
    nearest = [other or name for name, other in zip(names, nearest)]
    ade = tuple(name if name in known else None for name in nearest)
    return Classes(key, names, palette, ade, file_ids, void)


def fresh_colours(taken):
    """Yield colours that are not in `taken`; the golden ratio keeps neighbours' hues apart."""
    for k in itertools.count():
        saturation = (0.9, 0.55, 0.75)[k % 3]
        value = (0.95, 0.75, 0.5, 0.85)[k % 4]
        rgb = colorsys.hsv_to_rgb(k * 0.618034 % 1, saturation, value)
        colour = tuple(int(255 * v) for v in rgb)
        if colour not in taken:
            yield colour


def classes_text(classes):
    """The text of a classes.txt that `class_table` reads as these classes, with ids 0..N-1."""
    lines = []
    taken = []
    for name, colour, ade in zip(classes.names, classes.palette.tolist(), classes.ade):
        line = name
        if colour not in taken:  # a shared colour stays with the first class
            line += ", {}, {}, {}".format(*colour)
        if ade not in (None, name):
            line += f" = {ade}"
        taken.append(colour)
        lines.append(line + "\n")
    return "".join(lines)


# -- layouts ---------------------------------------------------------------------------------------

def read_layout(file, dataset, coding=None, name=None):
    """A layout file -> label int64 [H,W], 255 = void.

    file: a path or a binary file. dataset: a key, a folder with classes.txt, or Classes. name: what
    messages call the file; it may tell the coding of its ids. coding: "own" or "train" (see
    `id_table`), for a file whose name does not tell; None: its ids decide. Accepts single-channel
    ids, colours in RGB or RGBA, and palette PNGs (see `read_palette`). Transparent pixels are void.
    Raises InputError for anything else.
    """
    classes = class_table(dataset)
    name = str(name or file)
    values, is_coloured = read_values(file, classes, name)
    if not is_coloured:
        coding = coding_of_name(name, classes) or coding
        if coding is None:
            coding, _ = decide_coding(np.unique(values), classes)
        values = classes_of_ids(values, classes, coding, name)
    return torch.from_numpy(values.astype(np.int64))


def colorize(label, dataset):
    """label [H,W] -> PIL.Image RGB in the data set's palette, void in its first colour (black)."""
    classes = class_table(dataset)
    palette = np.empty((256, 3), np.uint8)
    palette[:] = classes.void[0]
    palette[:len(classes.names)] = classes.palette
    return Image.fromarray(palette[np.asarray(label)])


class Layouts:
    """Label maps for an adapter of `classes`: a file, or all files in a folder or its labels/.

    A classes.txt in the folder or its parent says what its ids mean; its classes go to the
    adapter's by name. .names are relative paths without suffix; .description is a line on what was
    read; .only_void: no class in any file. Raises InputError that names the unreadable layouts;
    skip_broken: leaves them out.
    """

    def __init__(self, place, classes, ids=None, captions=None, skip_broken=False):
        self.classes = class_table(classes)
        place = Path(place)
        folder = place.parent
        notes = []
        if place.is_dir():
            folder = place / "labels" if (place / "labels").is_dir() else place
            self.files, notes = by_name(find_images(folder, LAYOUTS), folder)
            if not self.files:
                raise InputError(f"{folder}: no layouts ({', '.join(LAYOUTS)}) in there")
        elif os.path.lexists(place):
            self.files = {place.stem: place}
        else:
            raise InputError(f"{place}: no such file or folder")
        lists = [root for root in (folder, folder.parent) if (root / "classes.txt").is_file()]
        self.source = class_table(lists[0]) if lists else self.classes

        survey = Survey(list(self.files.values()), self.source, ids, everything=True)
        self.coding = survey.coding
        self.only_void = survey.only_void
        _, lacking = try_all(partial(self.translate, survey.labels), list(survey.labels), "")
        broken = dict(sorted((survey.broken | lacking).items()))
        if place in broken:
            raise broken[place]
        notes += report(broken, len(self.files), f"{place}, layouts", skip_broken)
        self.files = {name: path for name, path in self.files.items() if path not in broken}
        self.names = sorted(self.files)
        self.captions = {}
        if place.is_dir():
            images = self.files
            if folder.name == "labels":
                images = {name: folder.parent / "images" / f"{name}.png" for name in self.names}
            read = read_captions(folder, "", captions) or read_captions(folder.parent, "")
            self.captions, more = find_captions(read, images, folder)
            notes += more
        self.description = "; ".join([f"{place}: {survey.describe()}", *notes])

    def translate(self, labels, path):
        """labels[path] in the layouts' own classes -> in the adapter's classes of the same names"""
        label = labels[path]
        if self.source.names == self.classes.names:
            return label
        table = np.full(256, -1)
        table[IGNORE] = IGNORE
        for c, name in enumerate(self.source.names):
            if name in self.classes.names:
                table[c] = self.classes.names.index(name)
        missing = np.unique(label[table[label] < 0])
        if len(missing):
            names = ", ".join(self.source.names[c] for c in missing)
            raise InputError(f"{path}: classes that {self.classes.key} does not have: {names}")
        return table[label]

    def read(self, name):
        """-> label int64 [H,W] in the adapter's classes"""
        path = self.files[name]
        label = read_layout(path, self.source, self.coding).numpy()
        return torch.from_numpy(self.translate({path: label}, path))

    def caption(self, name):
        """-> the layout's caption, the first of several; or None"""
        caption = self.captions.get(name)
        return caption[0] if isinstance(caption, list) else caption


# -- captions --------------------------------------------------------------------------------------

def compose_caption(label, names):
    """A caption for an image without one: "a photo of " the classes in label [H,W], six at most."""
    pixels = np.bincount(np.asarray(label).ravel(), minlength=256)[:len(names)]
    largest_first = np.argsort(-pixels, kind="stable")
    seen = list(dict.fromkeys(names[c] for c in largest_first if pixels[c]))[:6]
    if not seen:
        return "a photo"
    return f"a photo of {toy_world.join_words(seen)}"


# -- image/label pairs on disk ---------------------------------------------------------------------

# The first folder that has a file of some name counts. ACDC stands beside Cityscapes: its layouts
# mean the same.
FOLDERS = {  # key: the folders of images, those of labels, where they come from
    "cityscapes": (
        ["leftImg8bit/{split}", "rgb_anon/{part}/{split}"],
        ["gtFine/{split}", "gt/{part}/{split}"],
        "unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip (cityscapes-dataset.com), "
        "or rgb_anon_trainvaltest.zip and gt_trainval.zip (acdc.vision.ee.ethz.ch) there"),
    "ade20k": (
        ["images/{split}"], ["annotations/{split}"],
        "unpack ADEChallengeData2016.zip (sceneparsing.csail.mit.edu), name the folder inside it"),
    "coco": (
        ["{split}", "images/{split}"],
        ["stuffthingmaps/{split}", "annotations/{split}", "{split}"],
        "unpack train2017.zip, val2017.zip (cocodataset.org) and stuffthingmaps_trainval2017.zip "
        "(COCO-Stuff) there"),
    "folder": (
        ["images/{split}"], ["labels/{split}"],
        "put pictures into images/, layouts of the same names into labels/"),
}
SPLITS = {"ade20k": {"train": "training", "val": "validation"},
          "coco": {"train": "train2017", "val": "val2017"}}


def find_files(data, root, split, which, known=()):
    """The files of a data set -> {name: path}, and notes. which: 0 for images, 1 for labels.

    known: names that label files may have as a whole, see `by_name`.
    """
    key, part = split_key(data)
    key = "cityscapes" if key == "toy" else key
    form = FOLDERS.get(key, FOLDERS["folder"])
    places = form[which]
    source = "the toy world has train and val" if data == "toy" else form[2]
    try:
        os.scandir(root).close()
    except OSError as error:
        raise InputError(f"{root}: {error.strerror}: {source}") from None
    if part:  # a condition of ACDC
        places = [place for place in places if "{part}" in place]
    notes = []
    folders = (Path(root, places[0].format(split=name)) for name in ("train", "val", split))
    if form is FOLDERS["folder"] and not any(map(os.path.isdir, folders)):
        places = [places[0].removesuffix("/{split}")]
        if split != "train" and which == 0:
            notes.append(f"no images/{split}: the training images serve as {split}")
    suffixes = PICTURES
    if key == "coco":  # photos and layouts may lie in one folder
        suffixes = (".png",) if which else (".jpg", ".jpeg")
    names = dict(split=SPLITS.get(key, {}).get(split, split), part=part or "*")
    found = {}
    for place in places:
        pattern = place.format(**{word: glob.escape(name) for word, name in names.items()})
        for folder in sorted(glob.glob(pattern.replace("[*]", "*"), root_dir=root)):
            folder = Path(root, folder)
            new, more = by_name(find_images(folder, suffixes), folder, which == 1, known)
            if key == "cityscapes":  # names without the city's folder
                new = {name.rpartition("/")[2]: path for name, path in new.items()}
            found = new | found
            notes += more
    if not found:
        place = Path(root, places[0].format(**names))
        raise InputError(f"{data}: no {split} files in {place}: {source}")
    return found, notes


class Pairs(torch.utils.data.Dataset):
    """Image/label pairs: Cityscapes, ACDC, ADE20K, COCO-Stuff, the toy world, or any folder with
    images/, labels/ and classes.txt. data: as in `class_table`; "cityscapes:night" is ACDC's
    condition.

    Cityscapes is resized to (size, 2 size), ADE20K and COCO-Stuff to (size, size), all else to
    `size` at the shorter side and a multiple of `grid` at the longer. A picture of size x size
    stays as it is.

    .names; .images, .labels {name: path}; .shapes {name: (H, W) as resized}; .captions {name:
    caption or list}; .edits, the content of edits_{split}.json or None; .coding of the ids; .size,
    .grid, .augment, .classes; .only_void: no class in any label; .description: a line on what was
    read. The start reads the headers of all files and the pixels of some labels. Raises InputError
    with a report on broken pairs. skip_broken: reads everything, and leaves broken pairs out.
    """

    def __init__(self, data, root=None, split="train", size=512, *, grid=8, augment=True,
                 captions=None, skip_broken=False, ids=None):
        if size < grid or size % grid:
            raise InputError(f"size {size}: the autoencoder needs a multiple of {grid} pixels")
        self.size = size
        self.grid = grid
        self.augment = augment
        self.classes = class_table(data)
        key = self.classes.key
        root = Path(root or key)
        self.images, notes = find_files(data, root, split, 0)
        self.labels, more = find_files(data, root, split, 1, known=self.images)
        notes += more
        names = sorted(self.images.keys() | self.labels.keys())
        self.shapes, broken = try_all(self.check, names, f"checking {split}")
        survey = Survey([self.labels[name] for name in self.shapes], self.classes, ids)
        self.coding = survey.coding
        if skip_broken:
            _, unreadable = try_all(self.load, list(self.shapes), f"reading {split}")
            broken |= unreadable
        else:
            broken |= survey.broken
        notes += report(broken, len(names), f"{root}, pairs of {split}", skip_broken)
        self.shapes = {name: shape for name, shape in self.shapes.items() if name not in broken}
        self.names = list(self.shapes)
        self.only_void = survey.only_void
        read = read_captions(root, split, captions, key)
        images = {name: self.images[name] for name in self.names}
        self.captions, more = find_captions(read, images, root)
        if read and not self.captions:
            raise InputError(
                f"{captions or root}: captions of none of the {len(names)} {split} images: "
                f"{next(iter(read))!r} there, {self.names[0]!r} here")
        self.edits = read_edits(root / f"edits_{split}.json")
        about = f"{root}, split {split}: {survey.describe()}"
        self.description = "; ".join([about, *notes, *more])

    def __len__(self):
        return len(self.names)

    def check(self, name):
        """-> (H, W) of the resized picture. InputError for a broken pair; reads headers alone."""
        if name not in self.images:
            raise InputError(f"{name}: a label without an image")
        if name not in self.labels:
            raise InputError(f"{name}: an image without a label")
        w, h = image_size(self.images[name])
        check_sizes(name, (w, h), image_size(self.labels[name]))
        S = self.size
        if self.classes.key in ("ade20k", "coco") or (h, w) == (S, S):
            return S, S
        if self.classes.key == "cityscapes" and self.images[name].stem.endswith("_leftImg8bit"):
            return S, 2 * S
        return tuple(round(side * S / min(h, w) / self.grid) * self.grid for side in (h, w))

    def load(self, name):
        """-> image and label as PIL.Images, as they are in the files"""
        image = read_image(self.images[name])
        label = read_layout(self.labels[name], self.classes, self.coding)
        label = Image.fromarray(label.byte().numpy())
        check_sizes(name, image.size, label.size)
        return image, label

    def read(self, name):
        """-> image uint8 [H,W,3], label uint8 [H,W], resized"""
        H, W = self.shapes[name]
        image, label = self.load(name)
        image = image.resize((W, H), Image.BICUBIC)  # PIL's averages over a pixel's whole area
        label = label.resize((W, H), Image.NEAREST)
        return np.asarray(image), np.asarray(label)

    def full(self, index, flip=False):
        """The whole picture -> image float32 [3,H,W] in [-1,1], label int64 [H,W]."""
        image, label = map(torch.tensor, self.read(self.names[index]))
        image = image.permute(2, 0, 1).float() / 127.5 - 1
        label = label.long()
        if flip:
            return image.flip(-1), label.flip(-1)
        return image, label

    def caption(self, index, label, seed=None):
        """The image's caption; the seed chooses among several (None: the first). An image without
        one gets a caption composed of the classes in label [H,W]."""
        caption = self.captions.get(self.names[index])
        if caption is None:
            return compose_caption(label, self.classes.names)
        if isinstance(caption, list):
            return caption[(seed or 0) % len(caption)]
        return caption

    def window(self, index, seed=None):
        """-> (flip, top, left) of an S x S crop of the whole picture, which is flipped first.

        The offsets are multiples of `grid` pixels, so that a latent can be cropped in the picture's
        place. Without a seed: the centre, not flipped.
        """
        H, W = self.shapes[self.names[index]]
        rows = (H - self.size) // self.grid
        cols = (W - self.size) // self.grid
        if seed is None or not self.augment:
            return False, rows // 2 * self.grid, cols // 2 * self.grid
        rng = np.random.default_rng(seed)
        flip = rng.random() < 0.5
        top = int(rng.integers(rows + 1)) * self.grid
        left = int(rng.integers(cols + 1)) * self.grid
        return flip, top, left

    def __getitem__(self, key):
        """key: (index, seed of crop, flip and caption), or an index alone: the centre.

        -> dict(image float32 [3,S,S] in [-1,1], label int64 [S,S], caption str)
        """
        index, seed = key if isinstance(key, tuple) else (key, None)
        flip, top, left = self.window(index, seed)
        image, label = self.full(index, flip)
        rows = slice(top, top + self.size)
        cols = slice(left, left + self.size)
        label = label[rows, cols]
        return {
            "image": image[:, rows, cols],
            "label": label,
            "caption": self.caption(index, label, seed),
        }

    def stamp(self):
        """A text that changes with the items, but not with the place of the files."""
        made_of = [self.captions, self.classes.names, self.classes.file_ids.tolist(), self.coding]
        for name in self.names:
            files = [fingerprint(self.images[name]), fingerprint(self.labels[name])]
            made_of.append([name, self.shapes[name], files])
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def check_sizes(name, image, label):
    if image != label:
        raise InputError(f"{name}: a label of {label[0]} x {label[1]}, an image of "
                         f"{image[0]} x {image[1]}")


def fingerprint(path):
    """A file's size and last bytes, among which a PNG has checksums of its pixels."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 64))
        return size, file.read().hex()


def read_edits(path):
    """edits_{split}.json of tools/toy_world.py, or None if there is no such file."""
    if not path.is_file():
        return None
    try:
        content = json.loads(read_text(path))
        {**content["edits"]}, [*content["targets"]]  # TypeError unless a dict and a list
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); remove it") from None
    return content


def open_dataset(data, root=None, split="train", size=None, **options):
    """data: "toy" (day), "toy:night" (one weather), "toy:all" (by turns), or as for `Pairs`.

    The toy world is drawn into root/WEATHER if it is not there; root is datasets/toy by default.
    """
    key, weather = split_key(data)
    if key != "toy":
        return Pairs(data, root, split, size or 512, **options)
    weather = weather or "day"
    if weather not in (*toy_world.DOMAINS, "all"):
        raise InputError(f"{data}: the toy world's weathers are {', '.join(toy_world.DOMAINS)}; or "
                         "all")
    if size not in (None, toy_world.SIDE):
        raise InputError(f"size {size}: the toy world's pictures have {toy_world.SIDE} pixels")
    root = Path(root or HERE / "datasets" / "toy")
    try:
        folder = toy_world.draw(root, weather)
    except OSError as error:
        raise InputError(f"--root {root}: the toy world cannot be drawn there: {error.strerror}; "
                         "name another folder with --root") from None
    return Pairs("toy", folder, split, toy_world.SIDE, **options)


# -- batches ---------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=2)
def order(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch_keys(n, batch, seed, step, rank, world):
    """One rank's share of batch `step`: epochs of n items without a seam, each in its own order."""
    keys = []
    first = (step * world + rank) * batch
    for position in range(first, first + batch):
        epoch = position // n
        index = int(order(n, seed, epoch)[position % n])
        item_seed = np.random.SeedSequence((seed, epoch, index)).generate_state(1)[0]
        keys.append((index, int(item_seed)))
    return keys


def outlive_signals(worker):
    """In a loader process: signals reach it as well, but its parent decides when the run ends.

    Python ends left-over processes by SIGTERM, so this one leaves half a minute.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


def batches(dataset, batch, seed, start=0, workers=0, rank=0, world=1, pin=False):
    """Endless batches of stacked items, from number `start` on.

    Batch `step` depends on (seed, step, rank, world) alone, not on the workers or on where the run
    began. pin: in pinned memory, for a GPU. Raises InputError for a file that can no longer be
    read, and if a worker is killed.
    """
    keys = (batch_keys(len(dataset), batch, seed, step, rank, world)
            for step in itertools.count(start))
    # With a generator of its own, the loader does not draw from torch's global one.
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=keys, num_workers=workers, persistent_workers=workers > 0,
        pin_memory=pin, generator=torch.Generator(), worker_init_fn=outlive_signals)
    others = set(multiprocessing.active_children())
    items = iter(loader)  # starts the workers
    processes = set(multiprocessing.active_children()) - others
    if workers:  # torch's handler would raise the error of a killed worker anywhere in the program
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield from items
    except Exception as error:
        ended = multiprocessing.connection.wait([process.sentinel for process in processes], 0.5)
        for process in processes:
            process.kill()  # after an error they do not end by themselves
        if isinstance(error, InputError):  # a worker's has its traceback before it
            raise InputError(str(error).rpartition("InputError: ")[2].strip()) from None
        if not ended:
            raise
        raise InputError(f"--workers {workers}: a process that loads data was killed, often for "
                         "lack of memory: give fewer workers") from None

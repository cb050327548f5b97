"""Data: class tables, layout files, captions, image/label pairs on disk, batches, atomic files.

A layout is a label map, int64 [H,W]: class ids 0..N-1, and 255 for void (no class, no loss).
`Pairs` is the only data set. Its items depend on their keys alone, so a resumed run sees the same
batches. `Layouts` reads label maps without images.
"""
import colorsys
import contextlib
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
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from tools import toy_world

HERE = Path(__file__).parent
ASSETS = HERE / "assets"
IGNORE = 255  # the void label
MAX_PIXELS = 64 * 2**20  # larger images are refused before they are decoded
FORMATS = "PNG", "JPEG", "WEBP", "BMP", "TIFF"  # PIL would start Ghostscript for others
PICTURES = ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"  # suffixes, in any case
LAYOUTS = ".png", ".bmp", ".tif", ".tiff"
PUBLISHED = "toy", "cityscapes", "ade20k", "coco"
Image.MAX_IMAGE_PIXELS = None  # `opened` has a limit of its own
warnings.filterwarnings("ignore", "This process.*use of fork", DeprecationWarning)  # DataLoader's


class InputError(Exception):
    """A file or an argument that cannot be used: what is wrong, where, and what to do."""


def refuse(message):
    """argparse's `error` for the command lines: one line, no usage."""
    raise InputError(message)


def read_text(path):
    """A text file's content, or InputError."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("not a regular file")
        return Path(path).read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from None


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
    """Yields colours that are not in `taken`; the golden ratio keeps neighbours' hues apart."""
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


# -- image files -----------------------------------------------------------------------------------

@contextlib.contextmanager
def opened(file, name):
    """Yields the PIL.Image of a path or a binary file, with only the header read.

    Whatever goes wrong, in decoding too, is raised as an InputError that begins with `name`.
    """
    try:
        if not hasattr(file, "read") and os.path.exists(file) and not os.path.isfile(file):
            raise ValueError("not a regular file")
        with Image.open(file, formats=FORMATS) as image:
            w, h = image.size
            if min(w, h) < 8 or w * h > MAX_PIXELS:
                raise ValueError(f"{w} x {h} pixels; expected 8 x 8 to {MAX_PIXELS >> 20} Mpixel")
            yield image
    except Exception as error:  # for a broken file PIL raises nearly anything
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name}: cannot be read as an image: {reason}") from None


def open_image(file, name=None):
    """A path or a binary file -> PIL.Image in the file's own mode, turned as its EXIF data says.

    name: what error messages call the file. Raises InputError unless it is a whole image of
    8 x 8 pixels to 64 Mpixel.
    """
    with opened(file, name or file) as image:
        image.load()
        if image.mode == "P" and not (image.palette and image.getpalette("RGB")):
            raise ValueError("a palette image without a palette")
    with contextlib.suppress(Exception):  # broken EXIF data says nothing about the picture
        ImageOps.exif_transpose(image, in_place=True)
    return image


def image_size(path):
    """-> (width, height) of the upright picture, from the file's header alone."""
    with opened(path, path) as image:
        turn = 1
        with contextlib.suppress(Exception):
            turn = image.getexif().get(0x112, 1)
        if turn in (5, 6, 7, 8) and image.format != "TIFF":  # PIL has turned TIFF's size already
            return image.size[::-1]
        return image.size


def read_image(file, name=None):
    """A photo -> PIL.Image in RGB; 16 bits are scaled to 8 (PIL alone would clip grey to white)."""
    image = open_image(file, name)
    if image.mode[0] == "I":
        grey = np.asarray(image).clip(0, 65535) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    return image.convert("RGB")


def fail_to_list(error):
    raise InputError(f"{error.filename}: {error.strerror}") from None


def find_images(folder, suffixes=(".png",)):
    """-> sorted list of the image files in a folder and its subfolders, except hidden ones.

    Raises InputError for a folder that cannot be listed, and for names that are not UTF-8, which
    caption files cannot hold.
    """
    files = []
    seen = set()  # symbolic links are followed, but not in circles
    for place, folders, names in os.walk(folder, onerror=fail_to_list, followlinks=True):
        if os.path.realpath(place) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in names:
            if name[0] != "." and name.lower().endswith(suffixes):
                files.append(Path(place, name))
    for file in files:
        try:
            file.name.encode()
        except UnicodeEncodeError:
            raise InputError(f"{str(file)!a}: a name that is not UTF-8: rename it") from None
    return sorted(files)


# What a label file's name says about it, after the name of its picture.
KIND = re.compile(r"(_gtFine|_gtCoarse|_gt)?_(labelIds|labelTrainIds|trainIds|train_ids?|"
                  r"color|labelColor|instanceIds|instanceTrainIds|invIds)$")
CAMERA = re.compile("_(leftImg8bit|rgb_anon)$")
RANKS = {"labelIds": 0, "labelTrainIds": 1, "trainIds": 1, "train_id": 1, "train_ids": 1,
         None: 2, "color": 3, "labelColor": 3}  # the lowest is read; 4 for all others


def spell(path):
    """A picture's file name, in any spelling -> its name without suffix and camera, in NFC."""
    path = unicodedata.normalize("NFC", str(path))
    stem, suffix = os.path.splitext(path)
    return CAMERA.sub("", stem if suffix.lower() in PICTURES else path)


def by_name(files, folder, known=()):
    """Files below a folder -> {name: path}, and a list with a note on what was chosen, if anything.

    Names are relative paths without suffix, in NFC. Of the files of one picture ("x_gtFine_color",
    "x_gtFine_labelIds") one is taken, and the name is the picture's, unless the whole name is
    `known`. Raises InputError for two files of one name.
    """
    groups = {}
    for path in files:
        name = spell(path.relative_to(folder).as_posix())
        found = None if name in known else KIND.search(name)
        kind = found and found[2]
        name = name[:found.start()] if found else name
        groups.setdefault(name, []).append((RANKS.get(kind, 4), path, kind or "plain"))
    chosen = {}
    kinds = set()
    for name, group in groups.items():
        (rank, path, kind), *others = sorted(group)
        if others and others[0][0] == rank:
            raise InputError(f"{path} and {others[0][1]}: two files of one name; remove one")
        if others:
            kinds.add(kind)
        chosen[name] = path
    notes = [f"of several files for one picture: {' and '.join(sorted(kinds))}"] if kinds else []
    return chosen, notes


# -- layout files ----------------------------------------------------------------------------------

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


def read_values(file, classes, name):
    """A layout file -> values int [H,W], is_coloured.

    Coloured files: classes 0..N-1 and 255, as their colours tell. Others: their ids, and -1 for
    void in every coding, which is transparent pixels and Cityscapes' licence plates.
    """
    image = open_image(file, name)
    clear = find_transparent(image, name)
    is_jpeg = image.format == "JPEG"
    if image.mode in ("LA", "RGBA"):
        image = image.convert(image.mode[:-1])
    pixels = np.asarray(image)
    if image.mode == "RGB":
        values = colour_table(classes)[pack(pixels)]
        values[clear] = IGNORE
        if values.min() < 0:
            strange = np.unique(pixels[values < 0], axis=0)
            raise InputError(
                f"{name}: {(values < 0).sum()} pixels in colours that {classes.key} does not have, "
                f"such as {strange[0].tolist()}: save its own RGB colours as PNG, resized by "
                "nearest, or ids in a single channel")
        return values, True
    if is_jpeg or image.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
        raise InputError(f"{name}: a file of mode {image.mode}{', JPEG,' if is_jpeg else ''} holds "
                         "no layout: save 8-bit ids or RGB colours as PNG")
    values = pixels.astype(np.int32)
    values[clear] = -1
    if image.mode == "P":
        table = read_palette(image, np.unique(values), classes, name)
        if table is not None:
            return table[values], True
    return values, False


def find_transparent(image, name):
    """-> bool [H,W]: the pixels that an alpha channel or PNG's tRNS chunk hides."""
    if not image.has_transparency_data:
        return np.zeros(image.size[::-1], bool)
    alpha = np.asarray(image.convert("RGBA").getchannel("A"))
    half = np.count_nonzero((alpha > 0) & (alpha < 255))
    if half:
        raise InputError(f"{name}: {half} pixels are half transparent: save it opaque (alpha 255)")
    return alpha == 0


def pack(rgb):
    """uint8 [...,3] -> int [...], one number for each colour."""
    return rgb @ np.int32([2**16, 2**8, 1])


@functools.lru_cache(maxsize=2)
def colour_table(classes):
    """-> int16 [2**24]: the class of each colour, by its number; 255 for void, -1 for none."""
    table = np.full(2**24, -1, np.int16)
    table[pack(classes.void)] = IGNORE
    ids = np.arange(len(classes.names))
    table[pack(classes.palette)[::-1]] = ids[::-1]  # backwards, so that the first of twins remains
    return table


def read_palette(image, ids, classes, name):
    """Whether a palette image is read by its colours: their classes, int16 [257] by id; or None.

    Colours count if all those in use are the data set's, ids if none is. Black, which fills
    palettes, and a ramp of greys decide nothing. Raises InputError if only some are the data set's.
    """
    palette = np.zeros((256, 3), np.int32)
    entries = np.reshape(image.getpalette("RGB"), (-1, 3))
    palette[:len(entries)] = entries
    used = ids[ids >= 0]
    colours = palette[used]
    told = colour_table(classes)[pack(colours)]
    is_known = told[colours.any(1)] >= 0
    if not is_known.any() or (colours == used[:, None]).all():
        return None
    if not is_known.all():
        strange = colours[told < 0].tolist()
        raise InputError(f"{name}: {is_known.sum()} of its palette's colours are {classes.key}'s, "
                         f"others such as {strange[0]} are not: mend these, or save ids in a "
                         "single channel")
    first = np.full(257, -1)  # of each class: the first class of its colour
    first[:len(classes.names)] = colour_table(classes)[pack(classes.palette)]
    first[IGNORE] = IGNORE
    for coding in ("own", "train"):
        by_id = id_table(classes, coding)[used]
        if (first[by_id] == told).all():  # a palette in the order of the ids tells twins apart
            told = by_id
            break
    table = np.full(257, -1, np.int16)
    table[used] = told
    table[-1] = IGNORE
    return table


# Published label files have one of two codings. "own": the ids as published, such as labelIds.
# "train": the classes' numbers 0..N-1 and 255 for void, such as labelTrainIds. What a file's name
# says is true. All other files of a folder have one coding, which is decided once.

@functools.lru_cache(maxsize=8)
def id_table(classes, coding):
    """-> int16 [258]: the class of ids 0..255 in a coding, 255 for void, -1 for none.

    [256] is -1, for all other ids; [-1] is void.
    """
    table = np.full(258, -1, np.int16)
    if coding == "own" or classes.key not in PUBLISHED:
        table[:256] = classes.file_ids
    else:
        table[:len(classes.names)] = np.arange(len(classes.names))
        if len(classes.names) == 19:
            table[19] = IGNORE  # a common void in Cityscapes' train ids
    table[[IGNORE, -1]] = IGNORE
    return table


def clip_ids(ids):
    """ids int [...] -> indices of `id_table`."""
    return np.where((ids < -1) | (ids > 255), 256, ids)


def classes_of_ids(ids, classes, coding, name):
    """ids int [...] in a coding -> classes int16 [...]; InputError for ids without a class."""
    table = id_table(classes, coding)
    label = table[clip_ids(ids)]
    if label.min() < 0:
        strange = np.unique(ids[label < 0])
        most = np.flatnonzero(table[:IGNORE] >= 0).max()
        raise InputError(f"{name}: {classes.key} has no class for the ids {strange[:5].tolist()}: "
                         f"expected 0 to {most}, and 255 for void")
    return label


def coding_of_name(name, classes):
    """-> the coding that a label file's name tells, or None."""
    if classes.key in PUBLISHED:
        if re.search(r"[tT]rainIds|_train_ids?(?![A-Za-z])", Path(name).name):
            return "train"
        if "labelIds" in Path(name).name:
            return "own"
    return None


def fits(ids, classes, coding):
    """Whether label files of a coding can hold these ids."""
    table = id_table(classes, coding)
    label = table[clip_ids(ids)]
    possible = label >= 0
    if coding == "own" and classes.key == "ade20k":
        possible &= ids != IGNORE  # void is 0 there
    if coding == "own" and classes.key == "coco":
        possible &= (label != IGNORE) | (ids == IGNORE)  # eleven ids are not in use
    return possible.all()


def decide_coding(ids, classes):
    """The distinct ids of files whose names tell nothing -> their coding, and another possible one.

    The only coding that fits, otherwise the default: train ids for Cityscapes, own ids for others.
    The second value is None if the other coding does not fit, or means the same.
    """
    if classes.key not in PUBLISHED:
        return "own", None
    ids = ids[ids != -1]
    default, other = ("train", "own") if len(classes.names) == 19 else ("own", "train")
    if not fits(ids, classes, other):
        return default, None
    if not fits(ids, classes, default):
        return other, None
    a, b = (id_table(classes, coding)[ids] for coding in (default, other))
    return default, None if (a == b).all() else other


def colorize(label, dataset):
    """label [H,W] -> PIL.Image RGB in the data set's palette, void in its first colour (black)."""
    classes = class_table(dataset)
    palette = np.empty((256, 3), np.uint8)
    palette[:] = classes.void[0]
    palette[:len(classes.names)] = classes.palette
    return Image.fromarray(palette[np.asarray(label)])


# -- what a folder of layouts holds ----------------------------------------------------------------

def attempt(function, name):
    """-> the function's result, or the InputError that it raised."""
    try:
        return function(name)
    except InputError as error:
        return error


def try_all(function, names, title):
    """Calls function(name) for each name, in threads -> {name: result}, {name: InputError}."""
    with ThreadPoolExecutor() as pool:
        results = pool.map(partial(attempt, function), names)
        results = tqdm(results, title, len(names), leave=False, disable=len(names) <= 500)
        results = dict(zip(names, results))
    broken = {name: x for name, x in results.items() if isinstance(x, InputError)}
    return {name: x for name, x in results.items() if name not in broken}, broken


def report(broken, total, what, skip_broken):
    """Raises InputError with the first five of the broken ones; skip_broken: a note on them."""
    if not broken:
        return []
    first = [str(error) for error in broken.values()][:5]
    title = f"{what}: {len(broken)} of {total} are broken"
    if not skip_broken or len(broken) == total:
        lines = [title, *first, "mend them, or leave them out with --skip-broken"]
        raise InputError("\n  ".join(lines))
    return [f"{len(broken)} of {total} are broken and left out, the first: {first[0]}"]


def spread(items, n):
    """At most n items, evenly spaced."""
    places = np.linspace(0, len(items) - 1, min(n, len(items))).astype(int)
    return [items[i] for i in places]


class Survey:
    """What layout files hold, and the coding of those whose names do not tell it.

    Reads everything, or else up to 500 files if their ids must decide and 50 if not. ids: "own" or
    "train" decides instead. .coding: what `read_layout` needs; .labels {path: the classes in the
    file}; .broken {path: InputError}; .only_void: the files hold nothing else.
    """

    def __init__(self, paths, classes, ids=None, everything=False):
        self.classes = classes
        self.total = len(paths)
        silent = [path for path in paths if coding_of_name(path, classes) is None]
        if not everything and silent and ids is None and classes.key in PUBLISHED:
            paths = spread(silent, 500)
        elif not everything:
            paths = spread(paths, 50)
        self.values, self.broken = try_all(self.look, paths, "reading layouts")
        in_use = [np.int32([])]
        for path in silent:
            values, _, is_coloured = self.values.get(path, ([], [], True))
            if not is_coloured:
                in_use.append(values)
        self.coding, self.other = decide_coding(np.unique(np.concatenate(in_use)), classes)
        if ids and classes.key in PUBLISHED:
            self.coding, self.other = ids, None
        self.labels, unknown = try_all(self.decode, list(self.values), "reading layouts")
        self.broken |= unknown
        self.pixels = np.zeros(256)
        for path, label in self.labels.items():
            self.pixels += np.bincount(label, self.values[path][1], 256)
        self.only_void = bool(self.labels) and not self.pixels[:IGNORE].any()

    def look(self, path):
        """-> the file's distinct values, how many pixels have each, is_coloured"""
        values, is_coloured = read_values(path, self.classes, path)
        if -1 <= values.min() and values.max() <= 255:  # faster than np.unique
            pixels = np.bincount(values.ravel() + 1)
            return np.flatnonzero(pixels) - 1, pixels[pixels > 0], is_coloured
        return *np.unique(values, return_counts=True), is_coloured

    def decode(self, path):
        """-> the classes that the file's distinct values mean"""
        values, _, is_coloured = self.values[path]
        if is_coloured:
            return values
        coding = coding_of_name(path, self.classes) or self.coding
        return classes_of_ids(values, self.classes, coding, path)

    def describe(self):
        """Text: the codings, and the share of each class in the pixels."""
        words = {"own": "published ids", "train": "train ids"}
        if self.classes.key in ("toy", "cityscapes"):
            words["own"] = "labelIds"
        if self.classes.key not in PUBLISHED:
            words["own"] = f"ids of {self.classes.key}/classes.txt"
        codings = set()
        coloured = set()  # classes in colour-coded files
        for path, label in self.labels.items():
            if self.values[path][2]:
                codings.add("colours")
                coloured.update(label.tolist())
            else:
                codings.add(words[coding_of_name(path, self.classes) or self.coding])
        text = " and ".join(sorted(codings))
        if self.other:
            text += f" ({words[self.other]} are possible, too: --ids {self.other})"
        files = f"of {len(self.labels)} of {self.total} files: " if self.total > 1 else ""
        text += f"; {files}{self.shares()}"
        void = sum((label == IGNORE).all() for label in self.labels.values())
        if void and not self.only_void:
            text += f"; {void} of them hold nothing but void"
        for c in sorted(coloured - {IGNORE}):
            colour = self.classes.palette[c]
            twins = np.flatnonzero((self.classes.palette == colour).all(1))
            if len(twins) > 1:
                names = " and ".join(self.classes.names[twin] for twin in twins)
                text += f"; {tuple(colour.tolist())} is the colour of {names}"
        return text

    def shares(self):
        if self.only_void:
            return "nothing but void"
        names = [*self.classes.names, "void"]
        percent = np.append(self.pixels[:len(names) - 1], self.pixels[IGNORE])
        percent *= 100 / percent.sum()
        order = np.argsort(-percent, kind="stable")
        large = [f"{names[c]} {percent[c]:.0f} %" for c in order if percent[c] >= 0.5]
        small = np.count_nonzero((percent > 0) & (percent < 0.5))
        return ", ".join(large) + (f", {small} more below 0.5 %" if small else "")


class Layouts:
    """Label maps on disk for an adapter of `classes`: one file, or those in a folder or its labels/.

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
                raise InputError(f"{folder}: no layouts (PNG) in there")
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
        images = self.files
        if folder.name == "labels":
            images = {name: folder.parent / "images" / f"{name}.png" for name in self.names}
        read = read_captions(folder.parent, "") | read_captions(folder, "", captions)
        self.captions, more = find_captions(read, images, folder)
        self.description = "; ".join([f"{place}: {survey.describe()}", *notes, *more])

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
            raise InputError(f"{path}: holds classes that {self.classes.key} does not have: {names}")
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


def read_captions(root, split, path=None, key=""):
    """-> {name of the image: caption, or a list of captions}; {} if there is no file.

    Reads `path`, or else the first of these in `root`: captions_{split}.json, captions.json, COCO's
    annotations/captions_{split}2017.json, the official {key}_caption_{split}.json. Names may be
    file names in any spelling. Raises InputError for a file that cannot be read.
    """
    places = [f"captions_{split}.json", "captions.json", f"annotations/captions_{split}2017.json",
              f"{key}_caption_{split}.json", f"dataloader/{key}_caption_{split}.json"]
    files = [Path(root, place) for place in places]
    file = Path(path) if path else next(filter(os.path.isfile, files), None)
    if file is None:
        return {}
    try:
        content = json.loads(read_text(file))
        captions = group_by_image(content) if "annotations" in content else content
        json.dumps(captions, ensure_ascii=False).encode()  # fails for half a surrogate pair
        if not all(map(is_caption, captions.values())):
            raise ValueError("a caption is a string, or a list of strings")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{file}: captions cannot be read ({error}): expected UTF-8 JSON, "
                         "{name: caption}") from None
    return {KIND.sub("", spell(name)): caption for name, caption in captions.items()}


def is_caption(value):
    texts = value if isinstance(value, list) and value else [value]
    return all(isinstance(text, str) for text in texts)


def group_by_image(content):
    """COCO's captions_*.json -> {file name: list of captions}."""
    names = {image["id"]: image["file_name"] for image in content["images"]}
    captions = {}
    for annotation in content["annotations"]:
        name = names[annotation["image_id"]]
        captions.setdefault(name, []).append(annotation["caption"])
    return captions


def find_captions(read, files, root):
    """Captions for {name: path of an image} -> {name: caption}, and notes on what was found.

    read: what `read_captions` found; its names may have more folders than ours, or none. Images
    that it lacks get the text of NAME.txt beside them.
    """
    by_end = {}
    for key in read:
        by_end.setdefault(key.rpartition("/")[2], []).append(key)
    ends = Counter(name.rpartition("/")[2] for name in files)
    folders = {path.parent for path in files.values()}
    texts = {text for folder in folders for text in folder.glob("*.txt")}
    captions = {}
    for name, path in files.items():
        end = name.rpartition("/")[2]
        keys = by_end.get(end, [])
        longer = [key for key in keys if key.endswith(f"/{name}")]
        if name in read:
            captions[name] = read[name]
        elif len(longer) == 1:
            captions[name] = read[longer[0]]
        elif end in read and ends[end] == 1:
            captions[name] = read[end]
        elif path.with_suffix(".txt") in texts:
            captions[name] = " ".join(read_text(path.with_suffix(".txt")).split())
    notes = []
    if len(captions) < len(files):
        notes.append(f"captions for {len(captions)} of {len(files)} images; the others are composed "
                     "of their classes")
    for folder in sorted({Path(root), *folders}):
        for path in sorted(folder.glob("metadata.*")):
            notes.append(f"{path}: captions in this form are not read, only captions.json, "
                         "{name: caption}, and NAME.txt beside the image")
    return captions, notes


# -- image/label pairs on disk ---------------------------------------------------------------------

# Where a data set's images and labels lie, and where they come from. The first folder that has a
# file of some name counts. ACDC stands beside Cityscapes: its layouts mean the same.
FOLDERS = {
    "cityscapes": (
        ["leftImg8bit/{split}", "rgb_anon/{part}/{split}"],
        ["gtFine/{split}", "gt/{part}/{split}"],
        "unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip (cityscapes-dataset.com), "
        "or rgb_anon_trainvaltest.zip and gt_trainval.zip (acdc.vision.ee.ethz.ch) there"),
    "ade20k": (
        ["images/{split}"],
        ["annotations/{split}"],
        "unpack ADEChallengeData2016.zip (sceneparsing.csail.mit.edu), name the folder inside it"),
    "coco": (
        ["{split}", "images/{split}"],
        ["stuffthingmaps/{split}", "annotations/{split}", "{split}"],
        "unpack train2017.zip, val2017.zip (cocodataset.org) and stuffthingmaps_trainval2017.zip "
        "(COCO-Stuff) there"),
    "folder": (
        ["images/{split}"],
        ["labels/{split}"],
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
    source = form[2]
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
        if split == "val" and which == 0:
            notes.append("no images/val: the training images serve as val")
    suffixes = PICTURES
    if key == "coco":  # photos and layouts may lie in one folder
        suffixes = (".png",) if which else (".jpg", ".jpeg")
    names = dict(split=SPLITS.get(key, {}).get(split, split), part=part or "*")
    found = {}
    for place in places:
        pattern = place.format(**{word: glob.escape(name) for word, name in names.items()})
        for folder in sorted(glob.glob(pattern.replace("[*]", "*"), root_dir=root)):
            folder = Path(root, folder)
            new, more = by_name(find_images(folder, suffixes), folder, known)
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
            _, unreadable = try_all(self.read, list(self.shapes), f"reading {split}")
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
        """-> (H, W) of the resized picture; InputError if the pair is broken. Reads headers only."""
        if name not in self.images:
            raise InputError(f"{name}: a label without an image")
        if name not in self.labels:
            raise InputError(f"{name}: an image without a label")
        w, h = image_size(self.images[name])
        check_sizes(name, (w, h), image_size(self.labels[name]))
        S = self.size
        if self.classes.key in ("ade20k", "coco") or (h, w) == (S, S):
            return S, S
        if self.images[name].stem.endswith("_leftImg8bit"):
            return S, 2 * S
        return tuple(round(side * S / min(h, w) / self.grid) * self.grid for side in (h, w))

    def read(self, name):
        """-> image uint8 [H,W,3], label uint8 [H,W], resized"""
        H, W = self.shapes[name]
        image = read_image(self.images[name])
        label = read_layout(self.labels[name], self.classes, self.coding)
        label = Image.fromarray(label.byte().numpy())
        check_sizes(name, image.size, label.size)
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

        -> dict(image float32 [3,S,S] in [-1,1], label int64 [S,S], caption str, name str, index
        int, flip bool, top int, left int); (top, left) is the crop's corner in the flipped picture.
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
            "name": self.names[index],
            "index": index,
            "flip": flip,
            "top": top,
            "left": left,
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


def ignore_signals(worker):
    """For loader processes: Ctrl-C and the like reach them as well, but their parent decides."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


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
        pin_memory=pin, generator=torch.Generator(), worker_init_fn=ignore_signals)
    others = set(multiprocessing.active_children())
    items = iter(loader)  # starts the workers
    processes = set(multiprocessing.active_children()) - others
    if workers:  # torch's handler would raise the error of a killed worker anywhere in the program
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield from items
    except InputError as error:  # a worker's has its traceback before it
        raise InputError(str(error).rpartition("InputError: ")[2].strip()) from None
    except Exception:
        ended = multiprocessing.connection.wait([process.sentinel for process in processes], 1)
        if not ended:
            raise
        for process in processes:
            process.kill()  # the others may wait for the dead one, and they ignore milder signals
        raise InputError(f"--workers {workers}: a process that loads data was killed, often for "
                         "lack of memory: give fewer workers") from None


# -- writing files: atomically ---------------------------------------------------------------------

@contextlib.contextmanager
def atomic(path):
    """Yields a temporary path beside `path`, whose file replaces `path` once it is on the disk.

    If anything fails, it is removed and `path` is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}_{os.urandom(4).hex()}.part")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(folder):
    """Removes the half-written files of killed processes. The caller holds the folder's lock, so
    nobody else is writing there."""
    for path in Path(folder).glob(".*.part"):
        path.unlink(missing_ok=True)


def check_target(path):
    """InputError if no file can be written at `path`: for command lines, before the work."""
    path = Path(path)
    if os.path.isdir(path) or not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: must be a file in an existing folder that can be written to")


def write_png(path, image, **options):
    """image: a PIL.Image, or uint8 [H,W] or [H,W,3]. options: of PIL's `save`, such as pnginfo."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    with atomic(path) as temporary:
        image.save(temporary, "png", **options)


def write_text(path, text):
    with atomic(path) as temporary:
        temporary.write_text(text, "utf-8")

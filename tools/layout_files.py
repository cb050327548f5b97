"""Layout files: what their names, ids and colours mean.

Published label files have one of two codings. "own": the ids as published, such as labelIds.
"train": the classes' numbers 0..N-1 and 255 for void, such as labelTrainIds. What a file's name
says is true. All other files of a folder have one coding, which `Survey` decides once. Files in a
folder with a classes.txt have that list's ids. `classes` below is a data.Classes.
"""
import functools
import os
import re
import unicodedata
from pathlib import Path

import numpy as np

from tools.files import PICTURES, InputError, open_image, try_all

IGNORE = 255  # the void label
PUBLISHED = "toy", "cityscapes", "ade20k", "coco"
LAYOUTS = ".png", ".bmp", ".tif", ".tiff"  # suffixes of layout files


# -- names -----------------------------------------------------------------------------------------

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


def picture_name(path):
    """An image's or a label's file name, in any spelling -> the name of its picture."""
    return KIND.sub("", spell(path))


def by_name(files, folder, are_labels=True, known=()):
    """Files below a folder -> {name: path}, and a list with a note on what was chosen, if anything.

    Names are relative paths without suffix, in NFC. Of the labels of one picture
    ("x_gtFine_color", "x_gtFine_labelIds") one is taken, and the name is the picture's, unless the
    whole name is `known`. Raises InputError for two files of one name.
    """
    groups = {}
    for path in files:
        name = spell(path.relative_to(folder).as_posix())
        found = KIND.search(name) if are_labels and name not in known else None
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
    notes = [f"pictures with several files: read {' and '.join(sorted(kinds))}"] if kinds else []
    return chosen, notes


# -- pixels ----------------------------------------------------------------------------------------

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
                         f"others such as {strange[0]} are not: fix these, or save ids in a "
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


# -- ids -------------------------------------------------------------------------------------------

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


# -- all files of a folder -------------------------------------------------------------------------

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
        if paths and not silent:
            self.coding = coding_of_name(paths[0], classes)
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
            text += f" (could also be {words[self.other]}: use --ids {self.other})"
        files = f"of {len(self.labels)} of {self.total} files: " if self.total > 1 else ""
        text += f"; {files}{self.shares()}"
        void = sum((label == IGNORE).all() for label in self.labels.values())
        if void and not self.only_void:
            text += f"; {void} of them hold nothing but void"
        palette = self.classes.palette.tolist()
        for colour in sorted({tuple(palette[c]) for c in coloured - {IGNORE}}):
            twins = [name for name, own in zip(self.classes.names, palette) if tuple(own) == colour]
            if len(twins) > 1:
                text += f"; {colour} is the colour of {' and '.join(twins)}"
        return text

    def shares(self):
        if self.only_void:
            return "nothing but void"
        names = [*self.classes.names, "void"]
        percent = np.append(self.pixels[:len(names) - 1], self.pixels[IGNORE])
        percent *= 100 / max(percent.sum(), 1)
        order = np.argsort(-percent, kind="stable")
        large = [f"{names[c]} {percent[c]:.0f} %" for c in order if percent[c] >= 0.5]
        small = np.count_nonzero((percent > 0) & (percent < 0.5))
        return ", ".join(large) + (f", {small} more below 0.5 %" if small else "")

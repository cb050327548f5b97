"""Data: class tables, layout files, image/label pairs on disk, the toy world, captions, batches.

A layout is a label map, int64 [H,W]: class ids 0..N-1, and 255 where nothing is known (void). Every
dataset yields the same dict (see `Scenes`), and an item is a pure function of its key, so that a
resumed run sees the very same batches.

    python data.py --show world.png          eight layouts of the toy world in its five domains
    python data.py --write-toy DIR           the toy world as files, in Cityscapes' folders
"""
import os
import signal

if __name__ == "__main__":  # Ctrl-C while the slow imports run
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import colorsys
import contextlib
import functools
import hashlib
import itertools
import json
import re
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from tqdm import tqdm

IGNORE = 255  # the void label: no class, no loss
MAX_PIXELS = 64 * 2**20  # a larger image is refused before it is decoded
ASSETS = Path(__file__).parent / "assets"
PICTURES = ".png", ".jpg", ".jpeg"  # the suffixes of image files, in any case
Image.MAX_IMAGE_PIXELS = None  # open_image has a limit of its own
warnings.filterwarnings("ignore", "This process.*use of fork", DeprecationWarning)  # DataLoader's


class InputError(Exception):
    """A file or an argument that cannot be used: what is wrong, where, and what to do."""


def refuse(message):
    """What the command lines do with wrong arguments (argparse's `error`): one line, no usage."""
    raise InputError(message)


# -- class tables ----------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Classes:
    """What the ids and the colours in a dataset's label files mean. N classes."""
    key: str  # "toy", "cityscapes", "ade20k", "coco", or a folder
    names: tuple  # N str
    palette: np.ndarray  # uint8 [N,3]; of twins, the first is read
    ade: tuple  # N str or None: the nearest class of ADE20K
    file_ids: np.ndarray  # int16 [256]: id in a file -> class, 255 for void, -1 for no such id
    void: np.ndarray  # uint8 [M,3]: the colours of void, black first


def split_key(data):
    """"toy:night" -> ("toy", "night"); "cityscapes" -> ("cityscapes", ""); folders stay whole."""
    key, _, part = str(data).partition(":")
    if key in ("toy", "cityscapes"):
        return key, part
    return str(data), ""


def class_table(data):
    """data: "toy", "cityscapes", "ade20k", "coco", or a folder with classes.txt -> Classes.

    A part of a dataset ("toy:night", "cityscapes:fog") has the classes of the whole; Classes are
    returned as they are. Raises InputError for any other name, and for a list with mistakes.
    """
    if isinstance(data, Classes):
        return data
    key, _ = split_key(data)
    if key == "toy":  # speaks Cityscapes
        return published_classes(ASSETS / "cityscapes.txt", key)
    if key in ("cityscapes", "ade20k", "coco"):
        return published_classes(ASSETS / f"{key}.txt", key)
    path = Path(key) / "classes.txt"
    if not path.is_file():
        raise InputError(f"{key}: name toy, cityscapes, ade20k, coco or a folder with classes.txt")
    return read_classes(path, key)


HEADER = re.compile(r"((id|index)\W)?(name|class|label)(\Wr(ed)?\Wg(reen)?\Wb(lue)?)?", re.I)
SEPARATOR = re.compile(r"\s*[,;:\t][\s,;:\t]*")
CLASS = re.compile(r"""
    (?:(\d+)[ ,][ ]*)?                                # an id, as other tools write it
    ([^,#]*[^\W\d][^ ,#]*(?:[ ]+[^ ,#]+(?=,|$))?)     # the name
    (?:[ ,]+(\d+)[ ,]+(\d+)[ ,]+(\d+)(?:,255)?)?     # R, G, B; an alpha of 255
    """, re.VERBOSE)


def parse_class(line, file_id):
    """A class's line, the id that it has by its place -> name, (R, G, B) or None, nearest or "".

    The name of void is "". Fields are set apart by spaces, or by some of , ; : and tabs. Raises
    ValueError where the meaning is not plain, as in `platform 9 1 2 3`.
    """
    entry, _, nearest = line.partition("=")
    entry = SEPARATOR.sub(",", entry.replace('"', ""))
    found = CLASS.fullmatch(entry.strip(" ,"))
    if found is None:
        raise ValueError("wanted is `name`, `name R G B` or `name, R, G, B`")
    given_id, name, *colour = found.groups()
    if given_id and int(given_id) != file_id:
        raise ValueError(f"id {given_id} in the place of id {file_id}; `void` fills gaps")
    if name.lower() == "void":
        name = ""
    if colour[0] is None:
        return name, None, nearest.strip()
    colour = tuple(int(value) for value in colour)
    if max(colour) > 255:
        raise ValueError("colours are numbers in 0..255")
    return name, colour, nearest.strip()


def read_classes(path, key):
    """A list of classes, as assets/*.txt and a folder's classes.txt -> Classes.

    A line holds a class, `name` or `name R G B`, where needed with `= tree`, its nearest class of
    ADE20K. The line's number is the id in label files, from 0; blank lines and lines with # are
    passed over. `void`, perhaps with a colour, stands for an id without a class. A class without a
    colour gets one of its own. Raises InputError that names the line.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    entries = []  # (name, colour, nearest) by the id in label files
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line[0] == "#" or (not entries and HEADER.fullmatch(line)):
            continue
        try:
            entries.append(parse_class(line, file_id=len(entries)))
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {line!r}: {error}") from None

    is_class = np.array([name != "" for name, _, _ in entries], bool)
    if not is_class.any() or len(entries) > 255:
        raise InputError(f"{path}: {is_class.sum()} classes on {len(entries)} lines: wanted are "
                         "1 to 255")
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
    void = [colour for name, colour, _ in entries if colour and not name]
    void = np.unique([(0, 0, 0), *void], axis=0).astype(np.uint8)

    known = names if key == "ade20k" else class_table("ade20k").names
    missing = set(nearest) - {"", *known}
    if missing:
        raise InputError(f"{path}: ADE20K has no classes {missing}")
    nearest = [other or name for name, other in zip(names, nearest)]
    ade = tuple(name if name in known else None for name in nearest)
    return Classes(key, names, palette, ade, file_ids, void)


published_classes = functools.cache(read_classes)  # (those of folders may change)


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
    """The text of a classes.txt by which `class_table` knows these classes again, as ids 0..N-1."""
    lines = []
    taken = []
    for name, colour, ade in zip(classes.names, classes.palette.tolist(), classes.ade):
        line = name
        if colour not in taken:  # of twins, one has the colour
            line += ", {}, {}, {}".format(*colour)
        if ade not in (None, name):
            line += f" = {ade}"
        taken.append(colour)
        lines.append(line + "\n")
    return "".join(lines)


# -- image files -----------------------------------------------------------------------------------

def open_image(path, decode=True):
    """An image file -> PIL.Image in the file's own mode, turned as EXIF says.

    decode=False: the file is only checked, which for PNG is faster. Raises InputError unless it is
    a whole image of 8 x 8 to 64 Mpixel.
    """
    try:
        with Image.open(path) as image:  # reads the header only
            w, h = image.size
            if min(w, h) < 8 or w * h > MAX_PIXELS:
                raise ValueError(f"{w} x {h} pixels; wanted are 8 x 8 to {MAX_PIXELS >> 20} Mpixel")
            may_turn = image.format != "PNG" or "exif" in image.info
            if decode or may_turn:
                image.load()
            else:
                image.verify()
    except Exception as error:  # for a broken file PIL raises nearly anything
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read as an image: {reason}") from None
    if may_turn:
        with contextlib.suppress(Exception):  # broken EXIF says nothing of the picture
            ImageOps.exif_transpose(image, in_place=True)
    return image


def read_image(path):
    """A photo -> PIL.Image in RGB; 16 bits are scaled to 8 (PIL alone would clip grey to white)."""
    image = open_image(path)
    if image.mode[0] == "I":
        grey = np.asarray(image).clip(0, 65535) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    return image.convert("RGB")


def find_images(folder, pattern="*", suffixes=(".png",)):
    """-> sorted list of the image files in a folder, without hidden ones; suffixes in any case.

    pattern: as in Path.glob, without the suffix. Raises InputError for names that are not UTF-8,
    which caption files cannot hold.
    """
    files = []
    for file in sorted(Path(folder).glob(pattern + ".*")):
        if file.suffix.lower() not in suffixes or file.name[0] == ".":
            continue
        try:
            file.name.encode()
        except UnicodeEncodeError:
            raise InputError(f"{str(file)!a}: a name that is not UTF-8: rename it") from None
        files.append(file)
    return files


# -- layout files ----------------------------------------------------------------------------------

def read_layout(path, dataset):
    """A layout file -> label int64 [H,W], 255 = void.

    dataset: a key, a folder with classes.txt, or a Classes. Taken are ids in one channel (those of
    the dataset's own files, and -1 and 255 for void; see `choose_ids` for Cityscapes' two kinds),
    colours in RGB or RGBA, and palette PNGs (see `choose_colours`). Black and transparent are void.
    Raises InputError for anything else.
    """
    classes = class_table(dataset)
    image = open_image(path)
    clear = find_transparent(image, path)
    if image.mode in ("LA", "RGBA"):
        image = image.convert(image.mode[:-1])
    pixels = np.asarray(image)
    if image.mode == "RGB":
        label = colour_table(classes)[pack(pixels)]
        wanted = "its own RGB colours as PNG, resized by nearest, or ids in a single channel"
    elif image.format != "JPEG" and image.mode in ("1", "L", "P", "I", "I;16", "I;16B"):
        ids = np.where(pixels == -1, IGNORE, pixels)  # -1: Cityscapes' license plate
        table = choose_ids(ids, classes, Path(path).name)
        if image.mode == "P":
            table = choose_colours(image, ids[~clear], table, classes, path)
        is_byte = (ids >= 0) & (ids <= 255)
        label = np.where(is_byte, table[ids.clip(0, 255)], -1)
        wanted = f"ids 0-{np.flatnonzero(table[:IGNORE] >= 0).max()}, 255 for void"
    else:
        raise InputError(f"{path}: {image.format} of mode {image.mode} holds no layout: save 8-bit "
                         "ids or RGB colours as PNG")
    unknown = (label < 0) & ~clear
    if unknown.any():
        values, counts = np.unique(pixels[unknown], axis=0, return_counts=True)
        most = values[counts.argmax()].tolist()
        raise InputError(f"{path}: {unknown.sum()} pixels are no class of {classes.key}, most "
                         f"often {most}: wanted are {wanted}")
    return torch.from_numpy(np.where(clear, IGNORE, label).astype(np.int64))


def find_transparent(image, path):
    """-> bool [H,W], or a single False: pixels that an alpha channel or PNG's tRNS chunk hides."""
    if not image.has_transparency_data:
        return np.False_
    alpha = np.asarray(image.convert("RGBA").getchannel("A"))
    half = np.count_nonzero((alpha > 0) & (alpha < 255))
    if half:
        raise InputError(f"{path}: {half} pixels are half transparent: save it opaque (alpha 255)")
    return alpha == 0


def choose_ids(ids, classes, name):
    """The ids [H,W] of a file of this name -> the table that they follow, as Classes.file_ids.

    Cityscapes has two kinds of files, labelIds (0..33) and labelTrainIds (0..18). The file's name
    tells which; where it does not, any of 19..33 means labelIds, and otherwise they are train ids.
    """
    if classes.key not in ("toy", "cityscapes"):
        return classes.file_ids
    has_label_ids = ((ids > 18) & (ids < 34)).any()
    if "labelIds" in name or (has_label_ids and "labelTrainIds" not in name):
        return classes.file_ids
    return np.array([*range(19), *[-1] * 236, IGNORE], np.int16)


def pack(rgb):
    """uint8 [...,3] -> int [...], one number for each colour."""
    return rgb @ np.int32([2**16, 2**8, 1])


@functools.lru_cache(maxsize=2)
def colour_table(classes):
    """-> int16 [2**24]: the class of each colour, by its number; 255 for void, -1 for none."""
    table = np.full(2**24, -1, np.int16)
    table[pack(classes.void)] = IGNORE
    ids = np.arange(len(classes.names))
    table[pack(classes.palette)[::-1]] = ids[::-1]  # backwards: of twins, the first stays
    return table


def choose_colours(image, ids, table, classes, path):
    """A palette image, its ids in sight -> the table that they follow, as Classes.file_ids.

    That is the one given, unless the palette's colours are the dataset's and say something else:
    then these count, as image editors and quantisers number colours anew. Raises InputError where
    half of its colours or more are, or are within 8 of, the classes' and say something else, but
    not all the dataset's.
    """
    palette = np.zeros((256, 3), int)
    entries = np.reshape(image.getpalette("RGB"), (-1, 3))
    palette[:len(entries)] = entries
    used = np.unique(ids)  # (n,)
    colours = palette[used]
    by_id = table[used]
    by_colour = colour_table(classes)[pack(colours)]
    of_class = np.full((256, 3), 999)  # of void and of no class: far from any colour
    of_class[:len(classes.names)] = classes.palette
    off = np.abs(colours[:, None] - of_class).max(-1)  # (n, 256): in the worst channel
    off_by_id = off[np.arange(len(used)), by_id]
    tells = by_colour != IGNORE
    if tells.any() and (by_colour >= 0).all():
        table = table.copy()
        table[used] = np.where(off_by_id == 0, by_id, by_colour)
        return table
    near = tells & (off.min(1) <= 8)
    if 2 * near.sum() >= tells.sum() and (off_by_id[near] > 8).any():
        strange = [tuple(colour) for colour in colours[by_colour < 0].tolist()]
        raise InputError(f"{path}: its palette is {classes.key}'s in another order, but for "
                         f"{strange[:4]}: mend these colours, or save ids in a single channel")
    return table


def colorize(label, dataset):
    """label [H,W] -> PIL.Image RGB in the dataset's palette, void in black."""
    classes = class_table(dataset)
    palette = np.zeros((256, 3), np.uint8)
    palette[:len(classes.names)] = classes.palette
    return Image.fromarray(palette[np.asarray(label)])


# -- captions --------------------------------------------------------------------------------------

def join_words(words):
    """["a", "b", "c"] -> "a, b and c"."""
    if len(words) < 2:
        return "".join(words)
    return ", ".join(words[:-1]) + " and " + words[-1]


def compose_caption(label, names):
    """A caption where there is none: "a photo of " the classes in label [H,W], six at most."""
    count = np.bincount(np.asarray(label).ravel(), minlength=256)[:len(names)]
    largest_first = np.argsort(-count, kind="stable")
    seen = dict.fromkeys(names[c] for c in largest_first if count[c])
    if not seen:
        return "a photo"
    return f"a photo of {join_words(list(seen)[:6])}"


def read_captions(root, split, path=None):
    """-> {name of the image: caption, or a list of captions}; {} where there is no file.

    Read is `path`, else what is in root: captions_{split}.json, captions.json, or COCO's own
    annotations/captions_{split}2017.json. Names may carry the image's suffix. Raises InputError.
    """
    places = f"captions_{split}.json", "captions.json", f"annotations/captions_{split}2017.json"
    files = [Path(root, place) for place in places]
    file = Path(path) if path else next(filter(Path.is_file, files), None)
    if file is None:
        return {}
    try:
        content = json.loads(file.read_text("utf-8-sig"))
        captions = group_by_image(content) if "annotations" in content else content
        json.dumps(captions, ensure_ascii=False).encode()  # (half a surrogate pair fails)
        if not all(map(is_caption, captions.values())):
            raise ValueError("a caption is a string, or a list of strings")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: captions cannot be read ({error}): wanted is UTF-8 JSON, "
                         "{name: caption}") from None
    return {strip_suffix(name): caption for name, caption in captions.items()}


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


def strip_suffix(name):
    """"val/p0.png" -> "p0"; a name without an image's suffix stays as it is."""
    return Path(name).stem if Path(name).suffix.lower() in PICTURES else name


# -- the toy world: streets in five kinds of weather, for training in minutes and for the tests ----

SIDE = 64  # its pictures are 64 x 64 pixels
DOMAINS = "day", "night", "fog", "snow", "rain"
PHRASES = {
    "day": ("on a clear day", "in daylight", "on a sunny day"),
    "night": ("at night", "in the dark"),
    "fog": ("in fog", "on a foggy day"),
    "snow": ("in snow", "on a snowy day"),
    "rain": ("in rain", "on a rainy day"),
}
PAINTS = {
    "red": (205, 35, 35),
    "blue": (40, 80, 215),
    "white": (236, 236, 236),
    "black": (34, 34, 40),
    "yellow": (232, 200, 40),
    "green": (30, 140, 70),
}
COATS = [rgb for name, rgb in PAINTS.items() if name != "white"]  # white is lost in the snow
COATS.append((150, 70, 170))
WALLS = {
    "brick": (158, 84, 62),
    "grey": (138, 138, 144),
    "beige": (206, 186, 150),
    "pink": (212, 146, 156),
}
SKIES = {  # zenith, horizon
    "day": ((70, 132, 222), (198, 220, 242)),
    "night": ((8, 10, 28), (34, 36, 66)),
    "fog": ((176, 181, 188), (190, 194, 198)),
    "snow": ((176, 184, 200), (212, 216, 224)),
    "rain": ((84, 92, 108), (140, 146, 156)),
}
ROAD, SIDEWALK, BUILDING, POLE, SIGN = 0, 1, 2, 5, 7  # Cityscapes' train ids
VEGETATION, TERRAIN, SKY, PERSON, CAR = 8, 9, 10, 11, 13
GROUND = ROAD, SIDEWALK, TERRAIN
SMALL = PERSON, CAR, POLE, SIGN


def by_class(others, values):
    """-> [256,1], so that by_class(...)[label] is [64,64,1]."""
    table = np.full((256, 1), others, float)
    for c, value in values.items():
        table[c] = value
    return table


AT_NIGHT = by_class(1, {  # how much of its daylight a class keeps: small things stay in sight
    ROAD: 0.38, SIDEWALK: 0.42, TERRAIN: 0.36, BUILDING: 0.4, VEGETATION: 0.4,
    PERSON: 0.72, CAR: 0.66, POLE: 0.62, SIGN: 0.8})
IN_FOG = by_class(1, {SKY: 0, **dict.fromkeys(SMALL, 0.85)})  # how much of the fog is before it
IN_SNOW = by_class(0.06, {ROAD: 0.5, SIDEWALK: 0.86, TERRAIN: 0.72})  # how much of it is white
IN_RAIN = by_class(0, {ROAD: 0.5, SIDEWALK: 0.3})  # how much it is a mirror
YY, XX = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)


def toy_scene(seed, domain="day"):
    """A street in perspective -> image uint8 [64,64,3], label uint8 [64,64], caption.

    Labels are Cityscapes' train ids, and 255 for void. A pure function of its arguments: layout and
    colours come from the seed alone, the domains show the same street.
    """
    street = Street(seed, domain)
    paint_sky(street)
    paint_buildings(street)
    paint_ground(street)
    paint_things(street)
    image = WEATHER[domain](street, street.shade_ground())
    label = cover_with_void(street)
    caption = describe(street, label)
    return image.clip(0, 255).astype(np.uint8), label, caption


class Street:
    """What the parts of a toy scene share: its chances, its perspective and its four canvases.

    All stands on a ground plane with its vanishing point at (vanish, horizon): the point X to the
    right and at closeness d (0 at the horizon, 1 at the lower edge) is drawn at
    (vanish + X d, horizon + depth d), and sizes grow with d. The painters add .walls, .left, .right
    and .car, for those that come later.
    """

    def __init__(self, seed, domain):
        self.domain = domain
        self.rng = np.random.default_rng(seed)  # layout and colours
        self.look = np.random.default_rng((seed, DOMAINS.index(domain)))  # weather
        self.chance = self.rng.random  # uniform in [0,1)
        self.horizon = int(self.rng.integers(25, 35))
        self.vanish = int(self.rng.integers(20, 45))
        self.depth = SIDE - self.horizon
        zenith, low = np.array(SKIES[domain], np.float32)
        k = (YY / self.horizon).clip(0, 1)[..., None]
        sky = zenith * (0.9 + 0.2 * self.chance()) * (1 - k) + low * k
        self.canvases = [
            Image.fromarray(sky.astype(np.uint8)),  # colour
            Image.new("RGB", (SIDE, SIDE)),  # light that shines by itself
            Image.new("L", (SIDE, SIDE), SKY),  # class
            Image.new("L", (SIDE, SIDE), 255)]  # distance, for the fog
        self.pens = [ImageDraw.Draw(canvas) for canvas in self.canvases]

    def y(self, d):
        """The picture's row at closeness d."""
        return self.horizon + self.depth * d

    def paint(self, shape, xy, colour, what=(), glow=(0, 0, 0)):
        """what: (class, distance); () leaves the class beneath as it is (shadows, windows)."""
        for pen, fill in zip(self.pens, (colour, glow, *what)):
            getattr(pen, shape)(xy, fill=fill)

    def box(self, x0, y0, x1, y1, *how, **glow):
        self.paint("rectangle", [x0, y0, x1, y1], *how, **glow)

    def oval(self, x, y, r, edges, *how):
        """edges: left, top, right and lower end, in radii r from (x, y)."""
        left, top, right, low = (r * edge for edge in edges)
        self.paint("ellipse", [x + left, y + top, x + right, y + low], *how)

    def trapezoid(self, x, y0, half0, y1, half1, *how):
        """half0 to the left and right of x at y0, half1 at y1."""
        xy = [(x - half0, y0), (x - half1, y1), (x + half1, y1), (x + half0, y0)]
        self.paint("polygon", xy, *how)

    def strip(self, x0, x1, d0, d1, *how):
        """A strip of the ground plane from X = x0 to x1 and from closeness d0 to d1."""
        corners = (x0, d0), (x1, d0), (x1, d1), (x0, d1)
        xy = [(self.vanish + x * d, self.y(d)) for x, d in corners]
        self.paint("polygon", xy, *how)

    def beside(self, d, spread):
        """x of a place within `spread` pixels (at d = 1) of a kerb, in the frame if it can be."""
        is_left = self.chance() < 0.5
        kerb = self.vanish - self.left * d if is_left else self.vanish + self.right * d
        room = (kerb if is_left else SIDE - kerb) - 4
        away = 2 + self.chance() * min(spread * d, max(3, room))
        return int(kerb - away if is_left else kerb + away)

    def shade_ground(self):
        """Ends the painting: sets .light, .label, .ground and .small (bool), .far -> image."""
        image, self.light, self.label, far = map(np.asarray, self.canvases)
        self.ground = np.isin(self.label, GROUND)[..., None]
        self.small = np.isin(self.label, SMALL)[..., None]
        d = ((YY - self.horizon) / self.depth).clip(0, 1)[..., None]
        far = far.astype(np.float32)[..., None] / 255
        self.far = np.where(self.ground, 0.9 * (1 - d) ** 1.5, far)
        return image.astype(np.float32) * np.where(self.ground, 1.1 - 0.2 * d, 1)


def tone(colour, k):
    """An RGB tuple made k times as bright."""
    return tuple(min(255, int(c * k)) for c in colour)


def paint_sky(street):
    """Clouds by day, a moon by night."""
    chance = street.chance
    for _ in range(street.rng.integers(0, 4)):
        x = chance() * SIDE
        y = chance() * street.horizon * 0.6
        r = 4 + chance() * 5
        if street.domain == "day":
            street.oval(x, y, r, (-2, -1 / 2, 2, 1 / 2), (226, 236, 248))
            street.oval(x, y, r, (-1, -1, 1, 1 / 3), (240, 245, 252))
    if street.domain == "night" and street.look.random() < 0.4:
        x = int(street.look.integers(4, SIDE - 8))
        street.paint("ellipse", [x, 3, x + 5, 8], (238, 236, 210), glow=(120, 118, 100))


def paint_buildings(street):
    """Buildings along the horizon, taller towards the frame's edges. Sets .walls: their name."""
    rng, chance, horizon = street.rng, street.chance, street.horizon
    kinds = list(WALLS)
    street.walls = kinds[rng.integers(4)]  # of most
    x = -int(rng.integers(0, 6))
    while x < SIDE:
        w = int(rng.integers(9, 20))
        side = abs(x + w / 2 - street.vanish) / 32
        top = int(horizon - 8 - rng.integers(0, 9) - side * 14 * chance())
        kind = street.walls if chance() < 0.75 else kinds[rng.integers(4)]
        colour = tone(WALLS[kind], 0.8 + 0.35 * chance())
        step = int(rng.integers(4, 6))
        pane = tone((52, 66, 92), 0.7 + 0.7 * chance())
        if chance() < 0.8:  # else a gap
            roof = (236, 240, 246) if street.domain == "snow" else tone(colour, 0.72)
            right = x + w - 1
            base = horizon + 2
            street.box(x, top, right, base, colour, (BUILDING, int(205 - 50 * side)))
            street.box(right - 1, top, right, base, tone(colour, 0.8))
            street.box(x, top, right, top + 1, roof)
            for wy in range(top + 4, horizon - 2, step):
                for wx in range(x + 2, right - 2, step):
                    is_lit = street.domain == "night" and street.look.random() < 0.45
                    glow = (240, 200, 105) if is_lit else (0, 0, 0)
                    street.box(wx, wy, wx + 1, wy + 1, pane, glow=glow)
        x += w


def paint_ground(street):
    """Grass or paving, sidewalks with kerbs, the road with its markings or its tracks in the snow.

    Sets .left and .right: how far the road reaches from the vanishing point, in pixels at d = 1.
    """
    rng, chance = street.rng, street.chance
    left = street.left = int(rng.integers(26, 54))
    right = street.right = int(rng.integers(26, 54))
    walk = int(rng.integers(12, 30))
    middle = (right - left) / 2
    paving = tone((172, 160, 152), 0.9 + 0.2 * chance())
    grass = tone((116, 148, 70), 0.85 + 0.3 * chance())
    asphalt = tone((88, 88, 94), 0.85 + 0.3 * chance())
    has_grass = chance() < 0.5
    has_walk = chance() < 0.85
    has_line = chance() < 0.8
    has_zebra = chance() < 0.25

    if has_grass:
        street.box(0, street.horizon, SIDE, SIDE, grass, (TERRAIN, 0))
    else:
        street.box(0, street.horizon, SIDE, SIDE, paving, (SIDEWALK, 0))
    if has_walk:
        street.strip(-left - walk, right + walk, 0.02, 1.2, paving, (SIDEWALK, 0))
    if has_walk or not has_grass:
        for d in (0.16, 0.34, 0.6, 0.88):  # joints between the slabs
            street.strip(-left - walk, right + walk, d, d * 1.07, tone(paving, 0.86))
    street.strip(-left - 3, right + 3, 0.02, 1.2, tone(paving, 1.2))
    street.strip(-left, right, 0.03, 1.2, asphalt, (ROAD, 0))
    if street.domain == "snow":
        for X in (-left / 2 - 8, -left / 2 + 4, right / 2 - 6, right / 2 + 6):
            street.strip(X - 2, X + 3, 0.04, 1.2, tone(asphalt, 0.35))
    if has_line:
        for d0, d1 in ((0.1, 0.17), (0.24, 0.36), (0.47, 0.66), (0.85, 1.1)):
            street.strip(middle - 1.4, middle + 1.4, d0, d1, (222, 222, 218))
    if has_zebra:
        for X in np.arange(-left + 3, right - 4, 11):
            street.strip(X, X + 6, 0.5, 0.72, (226, 226, 222))


THINGS = (  # how many at most, their least closeness, by how much they come closer, to which power
    ("car", 4, 0.14, 0.7, 1.4),
    ("person", 5, 0.14, 0.7, 1.5),
    ("pole", 4, 0.12, 0.6, 1.3),
    ("tree", 4, 0.06, 0.4, 1.3),
)


def paint_things(street):
    """Cars, people, poles and trees, from far to near."""
    things = []
    for kind, most, least, reach, power in THINGS:
        for _ in range(street.rng.integers(0, most + 1)):
            d = least + reach * street.chance() ** power
            thing = kind
            if kind == "pole":
                thing = ("lamp", "sign", "sign", "bare")[street.rng.integers(4)]
            things.append((d, thing))
    street.car = None
    for d, thing in sorted(things):
        y = int(street.y(d))
        distance = int(225 * (1 - d))
        if thing == "car":
            paint_car(street, y, d, (CAR, distance))
        elif thing == "person":
            paint_person(street, y, d, (PERSON, distance))
        elif thing == "tree":
            paint_tree(street, y, d, (VEGETATION, distance))
        else:
            paint_pole(street, y, d, thing, distance)


def paint_tree(street, y, d, what):
    x = street.beside(d, 150)
    r = 3 + 12 * d + 3 * street.chance()
    leaf = tone((58, 120, 46), 0.75 + 0.5 * street.chance())
    middle = y - 1.9 * r
    street.box(x - r / 9, y - r, x + max(1, r / 9), y, (84, 62, 46), what)  # trunk
    street.oval(x, middle, r, (-1, -1, 1, 1.1), tone(leaf, 0.78), what)
    street.oval(x, middle, r, (-0.9, -1, 0.6, 0.5), leaf)
    if street.domain == "snow":
        street.oval(x, middle, r, (-0.75, -0.9, 0.7, -0.1), (232, 236, 242))
    else:
        street.oval(x, middle, r, (-0.75, -0.9, 0.1, -0.1), tone(leaf, 1.25))


def paint_car(street, y, d, what):
    """A car as wide as 0.36 of the road, seen from behind in the right lane.

    Sets .car: the name of its colour, and its rows and columns in the picture.
    """
    lane = street.right / 2 if street.chance() < 0.5 else -street.left / 2
    x = int(street.vanish + lane * d + (street.chance() - 0.5) * 16 * d)
    width = max(8, int(0.36 * (street.left + street.right) * d))
    height = int(0.74 * width)
    half = width // 2
    wheel = max(2, width // 6)
    left = x - half
    right = x + half
    top = y - height
    low = y - max(1, height // 7)
    name = list(PAINTS)[street.rng.integers(6)]
    body = tone(PAINTS[name], 0.9 + 0.15 * street.chance())
    glass = (74, 92, 112)
    street.box(left - 1, y - 1, right + 1, y, (24, 24, 28))  # its shadow
    for side in (left, right - wheel):
        street.box(side, y - height // 4, side + wheel, y, (16, 16, 18), what)
    street.trapezoid(x, y - height // 2, half - half // 5, top, half * 0.6, body, what)
    street.trapezoid(x, y - height * 0.56, half * 0.66, y - height * 0.9, half * 0.48, glass)
    street.box(left, y - int(height * 0.56), right, low, body, what)
    street.box(left, y - max(2, int(height * 0.26)), right, low, tone(body, 0.66))
    if street.domain == "snow":  # on its roof
        reach = int(half * 0.55)
        street.box(x - reach, top, x + reach, top + height // 9, (244, 246, 250))
    away = x > street.vanish + (street.right - street.left) / 2 * d
    lamp = (255, 40, 30) if away else (255, 246, 200)
    for side in (left, right - wheel + 1):
        end = side + wheel - 1
        street.box(side, y - int(height * 0.5), end, y - int(height * 0.36), lamp, glow=lamp)
    street.car = name, slice(max(0, top), y), slice(max(0, left), right + 1)


def paint_person(street, y, d, what):
    """A person nearly as tall as a car is wide, on the road or beside it."""
    road = street.left + street.right
    if street.chance() < 0.25:
        X = street.chance() * road - street.left
        x = int(street.vanish + X * d)
    else:
        x = street.beside(d, 30)
    height = max(8, int(0.34 * road * d))
    w = max(2, round(height * 0.28))
    head = max(2, round(height * 0.2))
    skin = tone((216, 170, 140), 0.55 + 0.5 * street.chance())
    coat = COATS[street.rng.integers(6)]
    trousers = tone((70, 76, 110), 0.5 + 0.9 * street.chance())
    top = y - height
    neck = top + head
    hip = y - int(height * 0.4)
    x -= w // 2
    leg = w // 2 - 1 if w > 3 else w - 1  # two legs where a gap between them has room
    for side in (x, x + w - 1 - leg):
        street.box(side, hip, side + leg, y, trousers, what)
    street.box(x, neck, x + w - 1, hip, coat, what)
    x += (w - head) // 2
    shape = "ellipse" if head > 3 else "rectangle"
    street.paint(shape, [x, top, x + head - 1, neck - 1], skin, what)


def paint_pole(street, y, d, head, distance):
    """head: "lamp", "sign" or "bare"."""
    chance = street.chance
    x = street.beside(d, 14)
    top = max(1, int(y - 14 - 38 * d - 4 * chance()))
    w = int(d > 0.2)
    grey = 0.8 + 0.3 * chance()
    iron = tone((84, 84, 88), grey)
    arm = -1 if chance() < 0.5 else 1
    r = int(2 + 3 * d + 1.4 * chance())
    colour = PAINTS[("red", "blue", "yellow", "green")[street.rng.integers(4)]]
    shape = "ellipse" if chance() < 0.5 and r > 2 else "rectangle"
    street.box(x, top, x + w, y, iron, (POLE, distance))
    if w:  # light and dark side: seen before any background
        street.box(x, top, x, y, tone((184, 184, 186), grey))
    if head == "lamp":
        left, right = sorted((x + arm, x + 5 * arm))
        street.box(left, top, right, top + 1, iron, (POLE, distance))
        street.box(left, top + 1, right, top + 1, (226, 222, 200), glow=(255, 236, 180))
    if head == "sign":
        white = (242, 242, 242)
        left = x - r
        right = x + r + 1 if w else x + r - 1
        low = top + 2 * r
        street.paint(shape, [left, top, right, low], white, (SIGN, distance))
        street.paint(shape, [left + 1, top + 1, right - 1, low - 1], colour)
        if r > 3:
            street.box(left + 2, top + r - 1, right - 2, top + r, white)


# Light and weather, by class and by distance: image float32 [64,64,3] -> the same, in 0..255 or so.

def add_day(street, image):
    return image * 1.04


def add_night(street, image):
    """Our own headlights, and a halo around every light."""
    far = (YY - SIDE) ** 2 + (XX - SIDE / 2) ** 2
    beam = np.exp(-far / 700)[..., None] * street.ground
    light = np.float32(AT_NIGHT[street.label]) + 0.4 * beam
    image = image * (light * np.float32([0.86, 0.9, 1.12]))
    halo = Image.fromarray(street.light).filter(ImageFilter.GaussianBlur(1.6))
    return np.maximum(image, street.light) + 0.8 * np.asarray(halo, np.float32)


def add_fog(street, image):
    thickness = (0.3 + 0.55 * street.far) * (0.92 + 0.14 * street.look.random())
    grey = np.float32([188, 192, 197])
    image += (grey - image) * thickness * IN_FOG[street.label]
    return image


def add_snow(street, image):
    """Snow on the ground, and twelve flakes, none on a small thing."""
    white = np.float32([208, 216, 232])
    image += (white - image) * IN_SNOW[street.label]
    for x, y in street.look.integers(0, SIDE - 2, (12, 2)):
        flake = image[y:y + 2, x:x + 2]
        if not street.small[y, x]:
            flake += (255 - flake) * 0.8
    return image


def add_rain(street, image):
    """The ground is a mirror, and nine streaks fall."""
    rows = np.abs(2 * street.horizon - np.arange(SIDE)).clip(0, SIDE - 1)
    mirror = image[rows]
    image += (mirror - image) * IN_RAIN[street.label]
    image = image * 0.7 + np.float32([4, 8, 16])
    for x, y in street.look.integers(0, SIDE - 6, (9, 2)):
        streak = np.arange(y, y + 6), x - np.arange(6) // 3
        image[streak] += (200 - image[streak]) * 0.3 * ~street.small[streak]
    return image


WEATHER = {"day": add_day, "night": add_night, "fog": add_fog, "snow": add_snow, "rain": add_rain}


def cover_with_void(street):
    """Void as at the borders of real labels: a strip at the lower edge, a patch anywhere."""
    label = street.label.copy()
    if street.chance() < 0.2:
        label[-street.rng.integers(2, 5):] = IGNORE
    if street.chance() < 0.2:
        y, x, h, w = street.rng.integers([0, 0, 3, 3], [SIDE - 8, SIDE - 8, 8, 8])
        label[y:y + h, x:x + w] = IGNORE
    return label


def describe(street, label):
    """The caption: what is there to be seen, or, in a quarter of the scenes, the weather alone."""
    pixels = np.bincount(label.ravel(), minlength=256)
    parts = []
    if street.car:
        colour, rows, columns = street.car
        if (label[rows, columns] == CAR).sum() >= 24:
            parts.append(f"a {colour} car")
    others = [  # class, at least how many pixels, how often it is said
        (PERSON, 24, 0.7, "people"),
        (VEGETATION, 60, 0.7, "trees"),
        (BUILDING, 150, 0.7, f"{street.walls} buildings"),
        (SIGN, 16, 0.5, "signs"),
        (POLE, 24, 0.5, "poles"),
    ]
    for c, least_pixels, often, words in others:
        if pixels[c] >= least_pixels and street.chance() < often:
            parts.append(words)
    phrases = PHRASES[street.domain]
    when = phrases[street.look.integers(len(phrases))]
    if street.chance() < 0.25 or not parts:
        return f"a street {when}"
    return f"a street with {join_words(parts)}, {when}"


# -- datasets --------------------------------------------------------------------------------------

class Scenes(torch.utils.data.Dataset):
    """What the datasets have in common. Each has .classes, .names, .captions, .shapes (name ->
    (H, W)), .size S, .grid, .augment, read(index) -> uint8 [H,W,3] and [H,W], caption(index, label,
    seed), and stamp(), a text that changes with whatever lies behind the items."""

    def __len__(self):
        return len(self.names)

    def window(self, index, seed=None):
        """-> (flip, top, left) of an S x S crop of the whole picture, which is flipped first.

        The offsets are multiples of `grid` pixels, so that a latent can be cropped in the picture's
        stead. Without a seed it is the centre, not flipped.
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

    def full(self, index, flip=False):
        """The whole picture -> image float32 [3,H,W] in [-1,1], label int64 [H,W]."""
        image, label = map(torch.tensor, self.read(index))
        image = image.permute(2, 0, 1).float() / 127.5 - 1
        label = label.long()
        if flip:
            return image.flip(-1), label.flip(-1)
        return image, label

    def __getitem__(self, key):
        """key: (index, seed of crop, flip and caption), or an index alone: the centre.

        -> dict(image float32 [3,S,S] in [-1,1], label int64 [S,S], caption str, name str, index
        int, flip bool, top int, left int), the corner in pixels of the whole picture, flipped.
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


render = functools.cache(toy_scene)  # a scene is drawn when it is first asked for, and kept
TOY_SPLITS = {"train": (0, 2000), "val": (10_000_000, 256)}  # the first seed, the usual length


class Toy(Scenes):
    """The toy world. Item i is scene (first seed + i) in domain domains[i % len(domains)].

    .images uint8 [n,64,64,3], .labels uint8 [n,64,64] and .captions draw all of them.
    """
    size, grid = SIDE, 4

    def __init__(self, split="train", domains=("day",), length=None, augment=True):
        if split not in TOY_SPLITS or not set(domains) <= set(DOMAINS):
            raise InputError(f"toy, split {split!r}, domains {domains!r}: splits are train, val; "
                             f"domains are {', '.join(DOMAINS)}")
        first, usual = TOY_SPLITS[split]
        self.classes = class_table("toy")
        self.augment = augment
        self.keys = [(first + i, domains[i % len(domains)]) for i in range(length or usual)]
        self.names = [f"toy_{seed:08d}" for seed, _ in self.keys]
        self.shapes = dict.fromkeys(self.names, (SIDE, SIDE))

    @functools.cached_property
    def images(self):
        return np.stack([render(*key)[0] for key in self.keys])

    @functools.cached_property
    def labels(self):
        return np.stack([render(*key)[1] for key in self.keys])

    @functools.cached_property
    def captions(self):
        return {name: render(*key)[2] for name, key in zip(self.names, self.keys)}

    def read(self, index):
        image, label, _ = render(*self.keys[index])
        return image, label

    def caption(self, index, label, seed=None):
        return render(*self.keys[index])[2]

    def stamp(self):
        return f"toy {self.keys}"


# Where a dataset's images and labels lie: patterns without suffix, whose end after the last * is no
# part of the name; of two files of one name the first pattern's is taken. ACDC stands beside
# Cityscapes: its layouts mean the same.
FOLDERS = {
    "cityscapes": (
        ["leftImg8bit/{split}/*/*_leftImg8bit", "rgb_anon/{part}/{split}/*/*_rgb_anon"],
        ["gtFine/{split}/*/*_gtFine_labelIds", "gtFine/{split}/*/*_gtFine_labelTrainIds",
         "gt/{part}/{split}/*/*_gt_labelIds", "gt/{part}/{split}/*/*_gt_labelTrainIds"],
        "unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip (cityscapes-dataset.com), "
        "or rgb_anon_trainvaltest.zip and gt_trainval.zip (acdc.vision.ee.ethz.ch) there"),
    "ade20k": (
        ["images/{split}/*"],
        ["annotations/{split}/*"],
        "unpack ADEChallengeData2016.zip (sceneparsing.csail.mit.edu), name the folder inside it"),
    "coco": (
        ["{split}/*", "images/{split}/*"],
        ["stuffthingmaps/{split}/*", "annotations/{split}/*"],
        "unpack train2017.zip, val2017.zip (cocodataset.org) and stuffthingmaps_trainval2017.zip "
        "(COCO-Stuff) there"),
    "path": (
        ["images/{split}/*", "images/*"],
        ["labels/{split}/*", "labels/*"],
        "put pictures into images/, layouts of the same names into labels/"),
}
SPLITS = {"ade20k": {"train": "training", "val": "validation"},
          "coco": {"train": "train2017", "val": "val2017"}}


def find_pairs(data, root, split):
    """-> {name: path} of the images, and of the labels. Raises InputError where there are none."""
    key, part = split_key(data)
    *patterns, source = FOLDERS.get(key, FOLDERS["path"])
    split = SPLITS.get(key, {}).get(split, split)
    results = []
    for places in patterns:
        if part:  # a condition of ACDC
            places = [place for place in places if "{part}" in place]
        places = [place.format(split=split, part=part or "*") for place in places]
        found = {}
        for place in places:
            end = place.rpartition("*")[2]
            for file in find_images(root, place, PICTURES):
                found.setdefault(file.stem.removesuffix(end), file)
        if not found:
            raise InputError(f"{data}: no {split} files {root}/{places[0]}.png: {source}")
        results.append(found)
    if "images/*" in patterns[0] and split == "val" and not Path(root, "images", split).is_dir():
        print(f"{root}: has no images/val: the training's images serve as val", file=sys.stderr)
    return results


class Pairs(Scenes):
    """Image/label pairs on disk: Cityscapes, ACDC, ADE20K, COCO-Stuff, or any folder with images/,
    labels/ and classes.txt. data: as in `class_table`; "cityscapes:night" is ACDC's condition.

    Cityscapes is resized to (size, 2 size), all else to `size` at the shorter side and a multiple
    of `grid` at the longer; a picture of size x size stays as it is. Raises InputError with a
    report of the pairs that are broken; skip_broken prints it instead, and leaves them out.
    """

    def __init__(self, data, root=None, split="train", size=512, captions=None, grid=8,
                 augment=True, skip_broken=False):
        if size < grid or size % grid:
            raise InputError(f"size {size}: the autoencoder wants a multiple of {grid} pixels")
        self.size = size
        self.grid = grid
        self.augment = augment
        self.classes = class_table(data)
        root = Path(root or self.classes.key)
        self.images, self.labels = find_pairs(data, root, split)
        self.captions = read_captions(root, split, captions)
        names = sorted(self.images.keys() | self.labels.keys())
        with ThreadPoolExecutor() as pool:
            found = list(tqdm(pool.map(self.check, names), f"checking {split}", len(names),
                              leave=False, disable=len(names) <= 500))
        broken = [trouble for trouble in found if isinstance(trouble, str)]
        self.shapes = {name: x for name, x in zip(names, found) if not isinstance(x, str)}
        self.names = list(self.shapes)
        if broken:
            report = "\n  ".join([
                f"{root}: {len(broken)} of {len(names)} pairs of {split} are broken", *broken[:5]])
            if not skip_broken or not self.names:
                raise InputError(f"{report}\n  mend them, or leave them out with --skip-broken")
            print(report, file=sys.stderr)
        if self.captions and not self.captions.keys() & self.shapes.keys():
            raise InputError(
                f"{captions or root}: captions of none of the {len(names)} {split} images: "
                f"{next(iter(self.captions))!r} there, {self.names[0]!r} here")

    def check(self, name):
        """-> (H, W) of the resized picture, or a text: what is wrong with the pair."""
        if name not in self.images:
            return f"{name}: a label without an image"
        if name not in self.labels:
            return f"{name}: an image without a label"
        try:
            h, w = read_layout(self.labels[name], self.classes).shape
            image = open_image(self.images[name], decode=False)
        except InputError as error:
            return str(error)
        if image.size != (w, h):
            return f"{name}: a label of {w} x {h}, an image of {image.width} x {image.height}"
        S = self.size
        if self.images[name].stem.endswith("_leftImg8bit") and (h, w) != (S, S):
            return S, 2 * S
        return tuple(round(side * S / min(h, w) / self.grid) * self.grid for side in (h, w))

    def read(self, index):
        name = self.names[index]
        H, W = self.shapes[name]
        image = read_image(self.images[name])
        label = read_layout(self.labels[name], self.classes)
        label = Image.fromarray(label.byte().numpy())
        image = image.resize((W, H), Image.BICUBIC)  # PIL's averages over a pixel's whole area
        label = label.resize((W, H), Image.NEAREST)
        return np.asarray(image), np.asarray(label)

    def caption(self, index, label, seed=None):
        """The image's caption; of several, one by the seed (None: the first); of none, one composed
        of the classes in label [H,W]."""
        caption = self.captions.get(self.names[index])
        if caption is None:
            return compose_caption(label, self.classes.names)
        if isinstance(caption, list):
            return caption[(seed or 0) % len(caption)]
        return caption

    def stamp(self):
        made_of = [self.captions, self.classes.names, self.classes.file_ids.tolist()]
        for path in (*self.images.values(), *self.labels.values()):
            status = path.stat()
            made_of.append((path.name, status.st_size, status.st_mtime_ns))
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def open_dataset(data, root=None, split="train", size=None, augment=True, **options):
    """data: "toy" (day), "toy:night" (one domain), "toy:all", or as for `Pairs`."""
    key, part = split_key(data)
    if key != "toy":
        return Pairs(data, root, split, size or 512, augment=augment, **options)
    if size not in (None, SIDE):
        raise InputError(f"size {size}: the toy world has {SIDE} pixels")
    domains = DOMAINS if part == "all" else (part or "day",)
    return Toy(split, domains, augment=augment)


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


def batches(dataset, batch, seed, start=0, workers=0, rank=0, world=1, pin=False):
    """Endless batches of stacked items, from number `start` on.

    Batch `step` depends on (seed, step, rank, world) alone: neither on the workers nor on where the
    run began. pin: in pinned memory, for a GPU. Raises InputError for a file that can no longer be
    read, from workers as well.
    """
    keys = (batch_keys(len(dataset), batch, seed, step, rank, world)
            for step in itertools.count(start))
    # With a generator of its own, the loader does not draw from torch's global one.
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=keys, num_workers=workers, persistent_workers=workers > 0,
        pin_memory=pin, generator=torch.Generator())
    try:
        yield from loader
    except InputError as error:  # a worker's has its traceback before it
        raise InputError(str(error).rpartition("InputError: ")[2].strip()) from None


# -- writing files ---------------------------------------------------------------------------------

# Here and everywhere: a file is there whole, or not at all.

@contextlib.contextmanager
def atomic(path):
    """Yields a temporary path beside `path`: what is written there takes the place of `path` once
    all of it is on the disk. If anything fails it is removed, and `path` is as it was."""
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}.part")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(folder):
    """Remove the half-written files of `atomic` in a folder whose processes were killed."""
    for path in Path(folder).glob(".[0-9]*.part"):
        process = path.name.split(".")[1]
        try:
            os.kill(int(process), 0)  # only asks whether the process lives
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except (ValueError, OverflowError, PermissionError):
            pass  # not one of these; somebody else's, who is still writing


def check_target(path):
    """InputError if no file can be written at `path`: for command lines, before the work."""
    path = Path(path)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: must be a file in a folder that is there and may be written to")


def write_png(path, image):
    """image: a PIL.Image, or uint8 [H,W] or [H,W,3]."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    with atomic(path) as temporary:
        image.save(temporary, "png")


def write_text(path, text):
    with atomic(path) as temporary:
        temporary.write_text(text, "utf-8")


# -- the toy world as files ------------------------------------------------------------------------

TOY_FILES = {
    "cityscapes": ("leftImg8bit/{split}/toy/{name}_leftImg8bit.png",
                   "gtFine/{split}/toy/{name}_gtFine_labelTrainIds.png"),
    "acdc": ("rgb_anon/{domain}/{split}/toy/{name}_rgb_anon.png",
             "gt/{domain}/{split}/toy/{name}_gt_labelTrainIds.png"),
    "path": ("images/{split}/{name}.png", "labels/{split}/{name}.png"),
}


def write_toy(folder, form, split="train", length=None, domains=("day",)):
    """Writes the toy world as a dataset's files; Pairs(size=64, grid=4) then has Toy's very items.

    form: "cityscapes" or "acdc" (their folders, labelTrainIds), "path" (a folder of one's own).
    """
    toy = Toy(split, domains, length)
    folder = Path(folder)
    for (seed, domain), name in zip(toy.keys, toy.names):
        for place, array in zip(TOY_FILES[form], render(seed, domain)):
            path = folder / place.format(split=split, name=name, domain=domain)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(path, array)
    write_text(folder / f"captions_{split}.json", json.dumps(toy.captions, indent=1))
    if form == "path":
        write_text(folder / "classes.txt", classes_text(toy.classes))
    print(f"wrote {len(toy)} {split} pairs of the toy world")


def show_toy(path):
    """Writes a PNG: eight columns, each a layout above the five domains, twice enlarged."""
    columns = []
    for seed, _ in Toy("val", length=8).keys:
        _, label, _ = render(seed, "day")
        column = [np.asarray(colorize(label, "toy"))]
        column += [render(seed, domain)[0] for domain in DOMAINS]
        columns.append(np.concatenate(column))
    write_png(path, np.concatenate(columns, 1).repeat(2, 0).repeat(2, 1))


def main():
    parser = argparse.ArgumentParser(description="Writes the toy world as files, or as a picture.")
    parser.error = refuse
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--show", metavar="FILE.png", help="eight layouts in five domains")
    target.add_argument("--write-toy", metavar="DIR", help="image/label pairs and captions")
    add = parser.add_argument
    add("--format", choices=TOY_FILES, default="cityscapes", help="the folders of --write-toy")
    add("--split", choices=("train", "val"), default="train")
    add("--n", type=int, help="how many pairs (2000 for train, 256 for val)")
    add("--domains", default="day", help=f"comma-separated, out of {','.join(DOMAINS)}")
    try:
        args = parser.parse_args()
        if args.n is not None and args.n < 1:
            refuse(f"--n {args.n}: must be 1 or more")
        if args.show:
            show_toy(args.show)
        else:
            write_toy(args.write_toy, args.format, args.split, args.n, args.domains.split(","))
    except (InputError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # half-written files are removed
    main()

"""Data: class tables, layout files, image/label pairs on disk, the toy world, captions, batches.

A layout is a label map, int64 [H,W]: class ids 0..N-1, and 255 where nothing is known (void). Every dataset yields the
same dict (see `item`), and an item is a pure function of its key, so that a resumed run sees the very same batches.

    python data.py --show world.png                         eight layouts of the toy world in its five domains
    python data.py --write-toy DIR --format cityscapes      the toy world as files, in Cityscapes' folders
"""
import argparse
import colorsys
import functools
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, UnidentifiedImageError
from tqdm import tqdm

IGNORE = 255                                               # the void label: no class, no loss
MAX_PIXELS = 64 * 2**20                                    # a larger image file is refused before it is decoded
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)      # PIL's limit lies above ours
warnings.filterwarnings("ignore", "This process.*is multi-threaded, use of fork", DeprecationWarning)      # see Toy


class InputError(Exception):
    """A file or an argument that cannot be used. Its text says what is wrong, where, and what to do."""


def refuse(message):
    """What the command lines do with wrong arguments (argparse's `error`): one line, without the usage."""
    raise InputError(message)


# ---- Class tables: names, palettes (six hex digits a class) and file ids, as their publishers give them.

CITYSCAPES_NAMES = """
road,sidewalk,building,wall,fence,pole,traffic light,traffic sign,vegetation,terrain,sky,person,rider,car,truck,bus,
train,motorcycle,bicycle"""
CITYSCAPES_PALETTE = """
804080f423e846464666669cbe9999999999faaa1edcdc006b8e2398fb984682b4dc143cff000000008e000046003c640050640000e6770b20"""
CITYSCAPES_IDS = 7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33      # labelIds of these 19
CITYSCAPES_VOID = "000000 00005a 00006e 510051 6f4a00 966464 96785a b4a5b4 e6968c faaaa0"      # caravan, trailer, ...
ADE20K_NAMES = """
wall,building,sky,floor,tree,ceiling,road,bed,window,grass,cabinet,sidewalk,person,ground,door,table,mountain,plant,
curtain,chair,car,water,painting,sofa,shelf,house,sea,mirror,carpet,field,armchair,seat,fence,desk,stone,wardrobe,lamp,
bathtub,railing,cushion,pedestal,box,pillar,signboard,dresser,counter,sand,sink,skyscraper,fireplace,refrigerator,
grandstand,path,stairs,runway,case,pool table,pillow,screen door,stairway,river,bridge,bookcase,blinds,coffee table,
toilet,flower,book,hill,bench,countertop,stove,palm,kitchen island,computer,swivel chair,boat,bar,arcade machine,hovel,
bus,towel,light,truck,tower,chandelier,awning,streetlight,booth,television,airplane,dirt road,apparel,pole,land,
bannister,escalator,pouf,bottle,sideboard,poster,stage,van,ship,fountain,conveyer,canopy,washer,plaything,
swimming pool,stool,barrel,basket,waterfall,tent,bag,motorbike,cradle,oven,ball,food,stair,tank,brand,microwave,pot,
animal,bicycle,lake,dishwasher,screen,blanket,sculpture,hood,sconce,vase,traffic light,tray,ashcan,fan,pier,screen,
plate,monitor,bulletin board,shower,radiator,glass,clock,flag"""
ADE20K_PALETTE = """
787878b4787806e6e650323204c8037878508c8c8ccc05ffe6e6e604fa07e005ffebff0796053d78784608ff33ff06528fff8cccff04ff3307cc4603
0066c83de6faff06330b66ffff0747ff09e00907e6dcdcdcff095c7009ff08ffd607ffe0ffb8060aff47ff290a07ffffe0ff086608ffff3d06ffc207
ff7a0800ff14ff0829ff05990633ffeb0cffa0961400a3ff8c8c8cfa0a0f14ff001fff00ff1f00ffe00099ff000000ffff470000ebff00adff1f00ff
0bc8c8ff520000fff5003dff00ff7000ff85ff0000ffa300ff6600c2ff00008fff33ff000052ff00ff2900ffad0a00ffadff0000ff99ff5c00ff00ff
ff00f5ff0066ffad00ff0014ffb8b8001fff00ff3d0047ffff00cc00ffc200ff52000aff0070ff3300ff00c2ff007aff00ffa3ff990000ff0aff7000
8fff005200ffa3ff00ffeb0008b8aa8500ff00ff5cb800ffff001f00b8ff00d6ffff00705cff0000e0ff70e0ff46b8a0a300ff9900ff47ff00ff00a3
ffcc00ff008f00ffeb85ff00ff00ebf500ffff007afff5000abed4d6ff0000ccff1400ffffff000099ff0029ff00ffcc2900ff29ff00ad00ff00f5ff
4700ff7a00ff00ffb8005cffb8ff000085ffffd60019c2c266ff005c00ff"""
COCO_NAMES = """
person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,bench,
bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,
sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,
bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,
toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,
teddy bear,hair drier,toothbrush,banner,blanket,branch,bridge,building,bush,cabinet,cage,cardboard,carpet,ceiling,
tile ceiling,cloth,clothes,clouds,counter,cupboard,curtain,desk,dirt,door,fence,marble floor,floor,stone floor,
tile floor,wood floor,flower,fog,food,fruit,furniture,grass,gravel,ground,hill,house,leaves,light,mat,metal,mirror,
moss,mountain,mud,napkin,net,paper,pavement,pillow,plant,plastic,platform,playingfield,railing,railroad,river,road,
rock,roof,rug,salad,sand,sea,shelf,sky,skyscraper,snow,solid,stairs,stone,straw,structural,table,tent,textile,towel,
tree,vegetable,brick wall,concrete wall,wall,panel wall,stone wall,tile wall,wood wall,water,waterdrops,blind window,
window,wood"""
COCO_PALETTE = """
dc143c770b2000008e0000e66a00e4003c640050640000460000c0faaa1e64aa1edcdc00af74affa001ea52a2aff4dff00e2fcb6b6ff00520078a69d
6e4c00ae39ffc76400480076ffb3f0007d5cd10097bcd0b600dcb0ff63a45c00498581ff4eb4ff00e400aefff32d59ff8686679194aeffd0bac5e2ff
ab86016d3f36cf8aff97005f09503d5469334a4169a6c466d0c3d2ff6d41008f95b300c2d1636a057900e3ffcd93bad0994501035fa1a3ff007700aa
00b6c700a578b782585f20008272876e8185a64a76db8eb94fd272b25a3e41460f7fa7733b696a8e6c2dc4ac005f3650804cffc93901f6007abfa2d0
ffff8093d3cbc0608096646440006040e08086c79cc000e0a8abac80c080928b8dc0e08080c040c00060c060009270c6008060d2aa64404040d0e5e4
5c8859be99990080e080e00040c040808060da58b8f1810000406000a080d911ff8040e098fb987c4ab50040e080a080464646804020ffe4ffc00080
40c0209ad00040000040aa40002040408080c1005ccebaab6060604c5b718060c0400080ffb4c36a9ab0c00000e6968c3c8fff80408000728f5c5237
fa8dffc04020fed47c494daeffa06240e040400040ffffff40604068546d00c0a0c0e040408040d1e28ca9a4834040c0e1c7ff6b8e23c0404089364a
4020c0c0c0c00040a0879edf07f6e76bffc83a2995c04080b7798eff4961404000"""
COCO_GAPS = 11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90     # of the ids 0..181 these have no class

# The nearest ADE20K class by meaning (ADE20K's: the others'); a name that both have needs no entry.
NEAREST_ADE = """
animal:bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe;apparel:tie,clothes;bag:backpack,handbag,suitcase
ball:sports ball;blanket:cloth;blinds:blind window;box:cardboard;building:structural;bus:train;canopy:umbrella
cabinet:cupboard,furniture;carpet:mat,rug;ceiling:tile ceiling;computer:laptop,keyboard;curtain:textile;flag:banner
field:playingfield;floor:marble floor,stone floor,tile floor,wood floor;glass:wine glass,cup;grass:terrain,moss,straw
food:banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,fruit,salad,vegetable;ground:dirt,mud
house:roof;motorbike:motorcycle;oven:toaster;path:gravel,railroad;person:rider;plant:potted plant,bush;pot:bowl
plaything:teddy bear,frisbee,kite,skateboard;poster:paper;sidewalk:pavement;signboard:traffic sign,stop sign
sky:clouds,fog;sofa:couch;stage:platform;stone:rock;streetlight:parking meter;table:dining table;television:tv
towel:napkin;tree:vegetation,branch,leaves;wall:brick wall,concrete wall,panel wall,stone wall,tile wall,wood wall
water:waterdrops"""
NEAREST_ADE = {name: ade for ade, names in re.findall(r"([\w ]+):(.+?)[;\n]", NEAREST_ADE + "\n")
               for name in names.split(",")}


@dataclass(frozen=True, eq=False)
class Classes:
    """What the ids and the colours in a dataset's label files mean. N classes."""
    key: str                                               # "toy", "cityscapes", "ade20k", "coco", or a folder
    names: tuple                                           # N str
    palette: np.ndarray                                    # uint8 [N,3]; a colour of two classes reads as the first
    ade: tuple                                             # N str or None: the nearest class of ADE20K, where an ADE20K
                                                           # segmenter's last layer is taken from (None: at random)
    file_ids: np.ndarray                                   # int16 [256]: id in a file -> class or 255; -1: no such id
    void: np.ndarray                                       # uint8 [M,3]: the colours of void, black first


def make_classes(key, names, palette, ids, void_ids=(), void="000000"):
    """ids: the id in a file of each class; void_ids: those that mean void beside 255; void: colours in hex."""
    table, ade = np.full(256, -1, np.int16), ADE20K_NAMES.strip().replace("\n", "").split(",")
    table[list(ids)], table[list(void_ids) + [IGNORE]] = np.arange(len(names)), IGNORE
    return Classes(key, tuple(names), palette, tuple(n if n in ade else NEAREST_ADE.get(n) for n in names), table,
                   np.frombuffer(bytes.fromhex(void), np.uint8).reshape(-1, 3))


@functools.cache
def published(key):
    names, palette, *ids = {
        "ade20k": (ADE20K_NAMES, ADE20K_PALETTE, range(1, 151), [0]),
        "coco": (COCO_NAMES, COCO_PALETTE, [i for i in range(182) if i not in COCO_GAPS]),
    }.get(key, (CITYSCAPES_NAMES, CITYSCAPES_PALETTE, CITYSCAPES_IDS, sorted({*range(34)} - {*CITYSCAPES_IDS}),
                CITYSCAPES_VOID))                          # the toy world speaks Cityscapes
    palette = np.frombuffer(bytes.fromhex(palette), np.uint8).reshape(-1, 3)
    return make_classes(key, names.strip().replace("\n", "").split(","), palette, *ids)


def class_table(data):
    """data: "toy", "cityscapes", "ade20k", "coco", or a folder with classes.txt -> Classes.

    classes.txt holds a class per line, in the order of the ids 0..N-1 (N <= 255): its name, and perhaps its colour,
    `road 128 64 128`. A class without a colour gets one of its own. Blank lines and lines with # are passed over.
    """
    data = "toy" if str(data).startswith("toy:") else str(data)
    if data in ("toy", "cityscapes", "ade20k", "coco"):
        return published(data)
    path, names, given = Path(data) / "classes.txt", [], []
    if not os.path.isfile(path):
        raise InputError(f"{data}: name toy, cityscapes, ade20k, coco or a folder with a classes.txt")
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not to be read as UTF-8 text ({error}): save it as such")
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line[0] == "#":
            continue
        found = re.fullmatch(r"(.+?)[\s,]+(-?\d+)[\s,]+(-?\d+)[\s,]+(-?\d+)", line)
        name, rgb = (found[1], tuple(int(v) for v in found.groups()[1:])) if found else (line, None)
        if re.search(r"[\s,]-?\d+[\s,]+-?\d+$", name) or rgb and not 0 <= min(rgb) <= max(rgb) <= 255:
            raise InputError(f"{path}, line {number}: {line!r} is not `name` or `name R G B` with numbers in 0..255")
        names.append(name)
        given.append(rgb)
    if not 1 <= len(names) <= 255:
        raise InputError(f"{path}: {len(names)} classes, where a layout file can hold 1 to 255")
    if twins := [name for name, c in zip(names, given) if c and given.count(c) > 1]:
        raise InputError(f"{path}: {', '.join(twins)} share colours: give each its own, or none")
    wheel = (colorsys.hsv_to_rgb(i * 0.618034 % 1, (0.9, 0.55, 0.75)[i % 3], (0.95, 0.75, 0.5, 0.85)[i % 4])
             for i in itertools.count())                   # the golden ratio keeps neighbours apart
    fresh = (c for c in (tuple(int(255 * v) for v in c) for c in wheel) if c not in given)
    return make_classes(str(data), names, np.array([c or next(fresh) for c in given], np.uint8), range(len(names)))


# ---- Layout files.

def open_image(path, decode=True):
    """An image file -> PIL.Image, decoded; or only checked, which for PNG is faster.

    Raises InputError unless it is a whole image of 8 x 8 to 64 Mpixel.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: {'a folder, not an image file' if os.path.isdir(path) else 'no such file'}")
    try:
        with Image.open(path) as image:                    # reads the header only
            w, h = image.size
            if min(w, h) < 8 or w * h > MAX_PIXELS:
                raise InputError(f"{path}: {w} x {h} pixels; wanted are 8 x 8 to {MAX_PIXELS >> 20} Mpixel")
            image.load() if decode or image.format != "PNG" else image.verify()
            return image
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"{path}: more than {MAX_PIXELS >> 20} Mpixel; make it smaller")
    except UnidentifiedImageError:
        what = "no image of a known format" if os.path.getsize(path) else "an empty file"
        raise InputError(f"{path}: {what}: save it as PNG")
    except Exception as error:                             # for a broken file PIL raises nearly anything
        raise InputError(f"{path}: a broken image ({' '.join(str(error).split())}): fetch or write it again")


def pack(rgb):
    """uint8 [...,3] -> int32 [...], one number for each colour."""
    r, g, b = np.moveaxis(np.asarray(rgb, np.int32), -1, 0)
    return r << 16 | g << 8 | b


def match_colours(rgb, classes):
    """uint8 [H,W,3] -> class of each pixel (255: void) int16 [H,W], and where the colour is no class's, bool [H,W]."""
    table = dict.fromkeys(pack(classes.void).tolist(), IGNORE)
    table |= {c: i for i, c in reversed(list(enumerate(pack(classes.palette).tolist())))}
    known, code = np.array(sorted(table)), pack(rgb)
    at = np.searchsorted(known, code).clip(max=len(known) - 1)
    return np.array([table[c] for c in known.tolist()], np.int16)[at], known[at] != code


def match_ids(ids, classes, name):
    """Integers [H,W] -> class of each pixel int16 [H,W] (-1: no such id); the table [256] that was used.

    Cityscapes has two kinds of files, labelIds (0..33) and labelTrainIds (0..18). The file's name tells which; where it
    does not, any of 19..33 means labelIds, and otherwise they are train ids.
    """
    table = classes.file_ids
    if classes.key in ("toy", "cityscapes"):
        named = [kind for kind in ("labelTrainIds", "labelIds") if kind in name]
        if named[:1] == ["labelTrainIds"] or not named and not ((ids > 18) & (ids < 34)).any():
            table = np.array([*range(19)] + [-1] * 236 + [IGNORE], np.int16)
    if ids.dtype == np.uint8:
        return table[ids], table
    ids = np.where(ids == -1, IGNORE, ids)                 # Cityscapes' license plate
    return np.where((ids < 0) | (ids > 255), -1, table[ids.clip(0, 255)]), table


def read_layout(path, dataset):
    """A layout file -> label int64 [H,W], 255 = void. dataset: a key, a folder with classes.txt, or a Classes.

    Taken are ids in one channel (those of the dataset's own files, and -1 and 255 for void; see `match_ids`), colours
    in RGB or RGBA (black and transparent are void), and palette PNGs. These hold ids as well, unless all their colours
    are the dataset's and say something else than the ids: then the colours count, as image editors and quantisers
    number colours anew. Raises InputError for anything else.
    """
    classes = dataset if isinstance(dataset, Classes) else class_table(dataset)
    image = open_image(path)
    jpeg, clear = image.format == "JPEG", np.zeros((), bool)
    if image.mode in ("LA", "RGBA"):
        alpha = np.asarray(image.getchannel("A"))
        if half := np.count_nonzero((alpha > 0) & (alpha < 255)):
            raise InputError(f"{path}: {half} pixels are half transparent: save the layout opaque (alpha 255)")
        image, clear = image.convert(image.mode[:-1]), alpha == 0
    if image.mode == "RGB":
        label, unknown = match_colours(np.asarray(image), classes)
        if (unknown & ~clear).any():
            raise InputError(f"{path}: {colour_trouble(np.asarray(image), unknown & ~clear, classes, jpeg)}")
    elif jpeg or image.mode.split(";")[0] not in ("1", "L", "P", "I"):           # a grey JPEG has lost its ids
        kind = "JPEG" if jpeg else "picture"
        raise InputError(f"{path}: a {kind} of mode {image.mode} holds no layout: save 8-bit ids or RGB colours as PNG")
    else:
        ids = np.asarray(image)
        ids = ids.astype(np.uint8) if ids.dtype == bool else ids
        label, table = match_ids(ids, classes, Path(path).name)
        if image.mode == "P":
            rgb = np.asarray(image.convert("RGB"))
            by_colour, unknown = match_colours(rgb, classes)
            if not unknown.any() and (by_colour != IGNORE).any():
                own = np.full(257, -1)                     # each class's colour; none for 255, nor for -1, the last
                own[:len(classes.names)] = pack(classes.palette)
                label = np.where(own[label] == pack(rgb), label, by_colour)
        if (bad := (label < 0) & ~clear).any():
            values, counts = np.unique(ids[bad], return_counts=True)
            some = ", ".join(f"{v} ({n} pixels)" for v, n in zip(values[:4], counts)) + ", ..." * (len(values) > 4)
            valid = np.flatnonzero(table >= 0)
            runs = np.split(valid, np.flatnonzero(np.diff(valid) > 1) + 1)
            spans = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
            raise InputError(f"{path}: ids that {classes.key} does not have: {some}; valid are {spans}")
    return torch.from_numpy(np.where(clear, IGNORE, label).astype(np.int64))


def colour_trouble(rgb, unknown, classes, jpeg):
    """Says what is wrong with a picture whose colours are not all the dataset's, and the likeliest cause."""
    if not match_colours(rgb[..., ::-1], classes)[1].any():
        return f"its colours are {classes.key}'s with red and blue swapped (BGR, as OpenCV has them): swap them back"
    codes, counts = np.unique(pack(rgb)[unknown], return_counts=True)
    found, palette = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], 1), classes.palette.astype(int)
    most = found[counts.argmax()]
    nearest = [classes.names[i] for i in np.square(palette - most).sum(1).argsort(kind="stable")[:3]]
    off = [np.abs(palette - c).max(1).min() for c in found[np.argsort(-counts)[:256]]]         # distance to the palette
    if (jpeg or len(codes) > 2 * len(palette)) and np.median(off) < 32:
        advice = "near the palette, not on it, as JPEG and smooth resizing leave them: save as PNG, resize by nearest"
    elif np.ptp(found, axis=1).max() == 0:
        advice = "all grey, so perhaps ids: save those in a single channel"
    else:
        advice = "use the dataset's own colours, or ids"
    return (f"{unknown.sum()} pixels have colours that {classes.key} does not have, most often {tuple(most.tolist())} "
            f"({counts.max()} pixels; nearest are {', '.join(nearest)}): {advice}")


def colorize(label, dataset):
    """label [H,W] -> PIL.Image RGB in the dataset's palette, void in black; `read_layout` reads it back."""
    classes = dataset if isinstance(dataset, Classes) else class_table(dataset)
    palette = np.zeros((256, 3), np.uint8)
    palette[:len(classes.names)] = classes.palette
    return Image.fromarray(palette[np.asarray(label)])


def listing(parts):
    """["a", "b", "c"] -> "a, b and c"."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def compose_caption(label, names):
    """A caption where there is none: "a photo of " the classes in label [H,W], largest first, six at most."""
    count = np.bincount(np.asarray(label).ravel(), minlength=256)[:len(names)]
    seen = dict.fromkeys(names[c] for c in np.argsort(-count, kind="stable") if count[c])
    return f"a photo of {listing(list(seen)[:6])}" if seen else "a photo"


# ---- The toy world: streets in five kinds of weather, for training in minutes and for the tests.

S = 64                                                     # the toy world is 64 x 64 pixels
DOMAINS = "day", "night", "fog", "snow", "rain"
PHRASES = {"day": ("on a clear day", "in daylight", "on a sunny day"), "night": ("at night", "in the dark"),
           "fog": ("in fog", "on a foggy day"), "snow": ("in snow", "on a snowy day"),
           "rain": ("in rain", "on a rainy day")}
PAINTS = {"red": (205, 35, 35), "blue": (40, 80, 215), "white": (236, 236, 236), "black": (34, 34, 40),
          "yellow": (232, 200, 40), "green": (30, 140, 70)}
COATS = *(c for name, c in PAINTS.items() if name != "white"), (150, 70, 170)        # white would be lost in the snow
WALLS = {"brick": (158, 84, 62), "grey": (138, 138, 144), "beige": (206, 186, 150), "pink": (212, 146, 156)}
SKIES = {"day": ((70, 132, 222), (198, 220, 242)), "night": ((8, 10, 28), (34, 36, 66)),       # zenith, horizon
         "fog": ((176, 181, 188), (190, 194, 198)), "snow": ((176, 184, 200), (212, 216, 224)),
         "rain": ((84, 92, 108), (140, 146, 156))}
ROAD, SIDEWALK, BUILDING, POLE, SIGN, VEGETATION, TERRAIN, SKY, PERSON, CAR = 0, 1, 2, 5, 7, 8, 9, 10, 11, 13
NIGHT = np.ones(256, np.float32)                           # how much of its daylight a class keeps at night
NIGHT[[ROAD, SIDEWALK, TERRAIN, BUILDING, VEGETATION]] = 0.38, 0.42, 0.36, 0.40, 0.40
NIGHT[[PERSON, CAR, POLE, SIGN]] = 0.72, 0.66, 0.62, 0.80  # small things are to stay in sight
YY, XX = np.mgrid[0:S, 0:S].astype(np.float32)


def tone(colour, k):
    """An RGB tuple made k times as bright."""
    return tuple(min(255, int(c * k)) for c in colour)


def toy_scene(seed, domain="day"):
    """A street in perspective -> image uint8 [64,64,3], label uint8 [64,64] (Cityscapes' train ids, 255 void), caption.

    A pure function of its arguments. Layout and colours come from the seed alone: the domains show the same street. All
    stands on a ground plane with its vanishing point at (vx, h): the point X to the right and at closeness d (0 at the
    horizon, 1 at the lower edge) is drawn at (vx + X d, h + G d), and sizes grow with d.
    """
    rng, look = np.random.default_rng(seed), np.random.default_rng((seed, DOMAINS.index(domain)))
    snow, u = domain == "snow", rng.random                 # u() is uniform in [0,1)
    h, vx = int(rng.integers(25, 35)), int(rng.integers(20, 45))
    G = S - h

    # Four canvases: colour, light that shines by itself (for the night), class, and depth (for the fog; 255 is far).
    top, low = (np.array(c, np.float32) for c in SKIES[domain])
    k = (YY / h).clip(0, 1)[..., None]
    canvases = [Image.fromarray((top * (0.9 + 0.2 * u()) * (1 - k) + low * k).astype(np.uint8)),
                Image.new("RGB", (S, S)), Image.new("L", (S, S), SKY), Image.new("L", (S, S), 255)]
    pens = [ImageDraw.Draw(c) for c in canvases]

    def paint(shape, xy, colour, what=None, glow=(0, 0, 0)):
        """what: (class, depth), or None for what leaves the class beneath as it is: shadows, markings, windows."""
        for pen, fill in zip(pens, (colour, glow) + (what or ())):
            getattr(pen, shape)(xy, fill=fill)

    def box(x0, y0, x1, y1, *how):
        paint("rectangle", [x0, y0, x1, y1], *how)

    def ground(x0, x1, d0, d1, *how):
        """A strip of the ground plane from X = x0 to x1 and from closeness d0 to d1."""
        corners = (x0, d0), (x1, d0), (x1, d1), (x0, d1)
        paint("polygon", [(vx + x * d, h + G * d) for x, d in corners], *how)

    # Sky: clouds by day, a moon by night.
    for _ in range(rng.integers(0, 4)):
        x, y, r = u() * S, u() * h * 0.6, 4 + u() * 5
        if domain == "day":
            paint("ellipse", [x - 2 * r, y - r / 2, x + 2 * r, y + r / 2], (226, 236, 248))
            paint("ellipse", [x - r, y - r, x + r, y + r / 3], (240, 245, 252))
    if domain == "night" and look.random() < 0.4:
        x = int(look.integers(4, S - 8))
        paint("ellipse", [x, 3, x + 5, 8], (238, 236, 210), None, (120, 118, 100))

    # Buildings along the horizon, taller towards the edges of the frame; some windows are lit at night.
    wall, walls, x = list(WALLS)[rng.integers(4)], list(WALLS), -int(rng.integers(0, 6))
    while x < S:
        w = int(rng.integers(9, 20))
        side = abs(x + w / 2 - vx) / 32
        y = int(h - 8 - rng.integers(0, 9) - side * 14 * u())
        colour = tone(WALLS[wall if u() < 0.75 else walls[rng.integers(4)]], 0.8 + 0.35 * u())
        step, pane = int(rng.integers(4, 6)), tone((52, 66, 92), 0.7 + 0.7 * u())
        if u() < 0.8:
            box(x, y, x + w - 1, h + 2, colour, (BUILDING, int(205 - 50 * side)))
            box(x + w - 2, y, x + w - 1, h + 2, tone(colour, 0.8))
            box(x, y, x + w - 1, y + 1, (236, 240, 246) if snow else tone(colour, 0.72))
            for wy, wx in itertools.product(range(y + 4, h - 2, step), range(x + 2, x + w - 3, step)):
                lit = domain == "night" and look.random() < 0.45
                box(wx, wy, wx + 1, wy + 1, pane, None, (240, 200, 105) if lit else (0, 0, 0))
        x += w

    # Ground: grass or paving, sidewalks with kerbs, the road with its markings (in snow: with wheel tracks).
    wl, wr, sw = (int(rng.integers(a, b)) for a, b in ((26, 54), (26, 54), (12, 30)))      # road to left, right; walk
    paving, grass = tone((172, 160, 152), 0.9 + 0.2 * u()), tone((116, 148, 70), 0.85 + 0.3 * u())
    asphalt, lane = tone((88, 88, 94), 0.85 + 0.3 * u()), (wr - wl) / 2
    green, walk, marked, zebra = u() < 0.5, u() < 0.85, u() < 0.8, u() < 0.25
    box(0, h, S, S, grass if green else paving, (TERRAIN if green else SIDEWALK, 0))
    if walk:
        ground(-wl - sw, wr + sw, 0.02, 1.2, paving, (SIDEWALK, 0))
    for d in (0.16, 0.34, 0.6, 0.88) if walk or not green else ():
        ground(-wl - sw, wr + sw, d, d * 1.07, tone(paving, 0.86))
    ground(-wl - 3, wr + 3, 0.02, 1.2, tone(paving, 1.2))
    ground(-wl, wr, 0.03, 1.2, asphalt, (ROAD, 0))
    for X in (-wl / 2 - 8, -wl / 2 + 4, wr / 2 - 6, wr / 2 + 6) if snow else ():
        ground(X - 2, X + 3, 0.04, 1.2, tone(asphalt, 0.35))
    for d0, d1 in ((0.1, 0.17), (0.24, 0.36), (0.47, 0.66), (0.85, 1.1)) if marked else ():
        ground(lane - 1.4, lane + 1.4, d0, d1, (222, 222, 218))
    for X in np.arange(-wl + 3, wr - 4, 11) if zebra else ():
        ground(X, X + 6, 0.5, 0.72, (226, 226, 222))

    # Objects, sized in pixels at d = 1: a car has 0.36 of the road's width, a person nearly as much height.
    def beside(d, spread):
        """x of a place beside the road: within `spread` pixels (at d = 1) of a kerb, inside the frame if it can be."""
        s = -1 if u() < 0.5 else 1
        edge = vx + (-wl if s < 0 else wr) * d
        return int(edge + s * (2 + u() * min(spread * d, max(3, (edge if s < 0 else S - edge) - 4))))

    def tree(x, y, d, what):
        r, leaf = 3 + 12 * d + 3 * u(), tone((58, 120, 46), 0.75 + 0.5 * u())
        cy = y - 1.9 * r
        box(x - max(0, r / 9), y - r, x + max(1, r / 9), y, (84, 62, 46), what)
        paint("ellipse", [x - r, cy - r, x + r, cy + r * 1.1], tone(leaf, 0.78), what)
        paint("ellipse", [x - r * 0.9, cy - r, x + r * 0.6, cy + r * 0.5], leaf)
        paint("ellipse", [x - r * 0.75, cy - r * 0.9, x + r * (0.7 if snow else 0.1), cy - r * 0.1],
              (232, 236, 242) if snow else tone(leaf, 1.25))

    def car(x, y, d, what):
        W = max(8, int(0.36 * (wl + wr) * d))
        H, w, q, name = int(0.74 * W), W // 2, max(2, W // 6), list(PAINTS)[rng.integers(6)]
        body, away = tone(PAINTS[name], 0.9 + 0.15 * u()), x > vx + lane * d         # right lane: seen from behind
        low, lamp = y - max(1, H // 7), (255, 40, 30) if away else (255, 246, 200)
        box(x - w - 1, y - 1, x + w + 1, y, (24, 24, 28))                            # its shadow
        for side in (x - w, x + w - q):
            box(side, y - H // 4, side + q, y, (16, 16, 18), what)                   # wheels
        paint("polygon", [(x - w + w // 5, y - H // 2), (x - w * 0.6, y - H), (x + w * 0.6, y - H),
                          (x + w - w // 5, y - H // 2)], body, what)
        paint("polygon", [(x - w * 0.66, y - H * 0.56), (x - w * 0.48, y - H * 0.9), (x + w * 0.48, y - H * 0.9),
                          (x + w * 0.66, y - H * 0.56)], (74, 92, 112))
        box(x - w, y - int(H * 0.56), x + w, low, body, what)
        box(x - w, y - max(2, int(H * 0.26)), x + w, low, tone(body, 0.66))
        if snow:
            box(x - int(w * 0.55), y - H, x + int(w * 0.55), y - H + H // 9, (244, 246, 250))
        for side in (x - w, x + w - q + 1):
            box(side, y - int(H * 0.5), side + q - 1, y - int(H * 0.36), lamp, None, lamp)
        return name, (slice(max(0, y - H), y), slice(max(0, x - w), x + w + 1))

    def person(x, y, d, what):
        s = max(8, int(0.34 * (wl + wr) * d))
        w, head = max(2, round(s * 0.28)), max(2, round(s * 0.2))
        skin, coat = tone((216, 170, 140), 0.55 + 0.5 * u()), COATS[rng.integers(6)]
        legs, neck, hip, x = tone((70, 76, 110), 0.5 + 0.9 * u()), y - s + head, y - int(s * 0.4), x - w // 2
        foot = w // 2 - 1 if w > 3 else w - 1              # two legs where there is room for a gap between them
        for side in {x, x + w - 1 - foot}:
            box(side, hip, side + foot, y, legs, what)
        box(x, neck, x + w - 1, hip, coat, what)
        x += (w - head) // 2
        paint("ellipse" if head > 3 else "rectangle", [x, y - s, x + head - 1, neck - 1], skin, what)

    def pole(x, y, d, what, kind):
        y0, w = max(1, int(y - 14 - 38 * d - 4 * u())), int(d > 0.2)
        grey, s, r = 0.8 + 0.3 * u(), -1 if u() < 0.5 else 1, int(2 + 3 * d + 1.4 * u())
        colour, disc = PAINTS[("red", "blue", "yellow", "green")[rng.integers(4)]], u() < 0.5 and r > 2
        box(x, y0, x + w, y, tone((84, 84, 88), grey), what)
        if w:                                              # a light and a dark side: seen before any background
            box(x, y0, x, y, tone((184, 184, 186), grey), what)
        if kind == "lamp":
            a, b = sorted((x + s, x + s * 5))
            box(a, y0, b, y0 + 1, tone((84, 84, 88), grey), what)
            box(a, y0 + 1, b, y0 + 1, (226, 222, 200), None, (255, 236, 180))
        if kind == "sign":
            a, b, shape = x - r, x + r + w - (not w), "ellipse" if disc else "rectangle"
            paint(shape, [a, y0, b, y0 + 2 * r], (242, 242, 242), (SIGN, what[1]))
            paint(shape, [a + 1, y0 + 1, b - 1, y0 + 2 * r - 1], colour)
            if r > 3:
                box(a + 2, y0 + r - 1, b - 2, y0 + r, (242, 242, 242))

    things = [(0.14 + 0.7 * u() ** 1.4, "car") for _ in range(rng.integers(0, 5))]
    things += [(0.14 + 0.7 * u() ** 1.5, "person") for _ in range(rng.integers(0, 6))]
    things += [(0.12 + 0.6 * u() ** 1.3, ("lamp", "sign", "sign", "bare")[rng.integers(4)])
               for _ in range(rng.integers(0, 5))]
    things += [(0.06 + 0.4 * u() ** 1.3, "tree") for _ in range(rng.integers(0, 5))]
    nearest_car = None
    for d, kind in sorted(things):                         # from far to near
        y, z = int(h + G * d), int(225 * (1 - d))
        if kind == "car":
            lane_x = wr * 0.5 if u() < 0.5 else -wl * 0.5
            nearest_car = car(int(vx + lane_x * d + (u() - 0.5) * 16 * d), y, d, (CAR, z))
        elif kind == "person":                             # one in four is on the road
            person(int(vx + (u() * (wl + wr) - wl) * d) if u() < 0.25 else beside(d, 30), y, d, (PERSON, z))
        elif kind == "tree":
            tree(beside(d, 150), y, d, (VEGETATION, z))
        else:
            pole(beside(d, 14), y, d, (POLE, z), kind)
    image, light, label, z = (np.asarray(c) for c in canvases)
    image, z, label = image.astype(np.float32), z.astype(np.float32)[..., None] / 255, label.copy()

    # Light and weather, by class and by depth.
    on_ground, small = np.isin(label, (ROAD, SIDEWALK, TERRAIN)), np.isin(label, (PERSON, CAR, POLE, SIGN))[..., None]
    d = ((YY - h) / G).clip(0, 1)[..., None]
    z = np.where(on_ground[..., None], 0.9 * (1 - d) ** 1.5, z)
    image *= np.where(on_ground[..., None], 1.1 - 0.2 * d, 1)
    if domain == "day":
        image *= 1.04
    elif domain == "night":                                # our own headlights, and a halo around every light
        pool = np.exp(-((YY - S) ** 2 + (XX - S / 2) ** 2) / 700)[..., None] * on_ground[..., None]
        image *= (NIGHT[label][..., None] + 0.4 * pool) * np.array((0.86, 0.9, 1.12), np.float32)
        halo = np.asarray(canvases[1].filter(ImageFilter.GaussianBlur(1.6)), np.float32)
        image = np.maximum(image, light) + 0.8 * halo
    elif domain == "fog":
        a = (0.3 + 0.55 * z) * (0.92 + 0.14 * look.random()) * np.where(small, 0.85, 1)
        image += (np.array((188, 192, 197), np.float32) - image) * np.where(label[..., None] == SKY, 0, a)
    elif domain == "snow":
        a = np.select([label == ROAD, label == TERRAIN, on_ground], [0.5, 0.72, 0.86], 0.06)[..., None]
        image += (np.array((208, 216, 232), np.float32) - image) * a
        for x, y in look.integers(0, S - 2, (12, 2)):
            if not small[y, x]:
                image[y:y + 2, x:x + 2] += (255 - image[y:y + 2, x:x + 2]) * 0.8
    else:                                                  # rain: the ground is a mirror, and a few streaks fall
        mirror = image[np.abs(2 * h - YY.astype(int)).clip(0, S - 1), XX.astype(int)]
        image += (mirror - image) * np.select([label == ROAD, label == SIDEWALK], [0.5, 0.3], 0)[..., None]
        image = image * 0.7 + np.array((4, 8, 16), np.float32)
        for x, y in look.integers(0, S - 6, (9, 2)):
            at = np.arange(y, y + 6), x - np.arange(6) // 3
            image[at] += (200 - image[at]) * 0.3 * ~small[at]

    # Void, as at the borders of real labels: a strip at the lower edge, a patch anywhere.
    if u() < 0.2:
        label[S - int(rng.integers(2, 5)):] = IGNORE
    if u() < 0.2:
        y, x, a, b = (int(v) for v in rng.integers((0, 0, 3, 3), (S - 8, S - 8, 8, 8)))
        label[y:y + a, x:x + b] = IGNORE

    # The caption names what is there to be seen; in a quarter of the scenes, the weather alone.
    parts = [f"a {nearest_car[0]} car"] if nearest_car and (label[nearest_car[1]] == CAR).sum() >= 24 else []
    for c, least, chance, words in ((PERSON, 24, 0.7, "people"), (VEGETATION, 60, 0.7, "trees"),
                                    (BUILDING, 150, 0.7, f"{wall} buildings"), (SIGN, 16, 0.5, "signs"),
                                    (POLE, 24, 0.5, "poles")):
        if (label == c).sum() >= least and u() < chance:
            parts.append(words)
    when = PHRASES[domain][look.integers(len(PHRASES[domain]))]
    caption = f"a street {when}" if u() < 0.25 or not parts else f"a street with {listing(parts)}, {when}"
    return image.clip(0, 255).astype(np.uint8), label, caption


# ---- Datasets. Both kinds have .classes, .names, .size S, .grid, window(index, seed), full(index, flip), and `item`s.

def draw_window(H, W, size, grid, seed):
    """-> (flip, top, left) of a size x size crop of an H x W picture, which is flipped first.

    The offsets are multiples of `grid` pixels, so that a latent can be cropped in the picture's stead. seed None gives
    the centre, not flipped.
    """
    rows, cols = (H - size) // grid, (W - size) // grid
    if seed is None:
        return False, rows // 2 * grid, cols // 2 * grid
    rng = np.random.default_rng(seed)
    return bool(rng.random() < 0.5), int(rng.integers(rows + 1)) * grid, int(rng.integers(cols + 1)) * grid


def item(dataset, key):
    """key: an index, or (index, seed of the crop and flip); a bare index gives the centre crop, not flipped.

    -> dict(image float32 [3,S,S] in [-1,1], label int64 [S,S], caption str, name str, index int, flip bool, top int,
    left int), the corner in pixels of the whole picture, flipped.
    """
    index, seed = key if isinstance(key, tuple) else (key, None)
    flip, top, left = dataset.window(index, seed)
    image, label = dataset.full(index, flip)
    name, S = dataset.names[index], dataset.size
    return dict(image=image[:, top:top + S, left:left + S], label=label[top:top + S, left:left + S],
                caption=dataset.captions[name] if name in dataset.captions else
                compose_caption(label, dataset.classes.names), name=name, index=index, flip=flip, top=top, left=left)


def tensors(image, label, flip):
    """uint8 [H,W,3] and [H,W] -> image float32 [3,H,W] in [-1,1], label int64 [H,W], mirrored if flip."""
    image, label = torch.tensor(image).permute(2, 0, 1).float() / 127.5 - 1, torch.tensor(label).long()
    return (image.flip(-1), label.flip(-1)) if flip else (image, label)


class Toy(torch.utils.data.Dataset):
    """The toy world, rendered once. Item i is scene (first seed + i) in domain domains[i % len(domains)]."""
    size, grid = S, 4

    def __init__(self, split="train", domains=("day",), length=None, augment=True):
        if split not in ("train", "val") or not domains or not set(domains) <= set(DOMAINS):
            raise InputError(f"toy, split {split!r}, domains {domains!r}: splits are train, val; domains are {DOMAINS}")
        first, usual = {"train": (0, 2000), "val": (10_000_000, 256)}[split]
        self.augment, self.classes = augment, class_table("toy")
        keys = [(first + i, domains[i % len(domains)]) for i in range(length or usual)]
        if len(keys) >= 512 and sys.platform == "linux":   # fork is safe here: the children use numpy and PIL alone
            default = signal.SIGTERM, signal.SIG_DFL       # by which a pool ends: a handler of ours could miss it, asleep
            with multiprocessing.get_context("fork").Pool(CORES, signal.signal, default) as pool:
                scenes = pool.starmap(toy_scene, keys, chunksize=64)
        else:
            scenes = [toy_scene(*key) for key in keys]
        self.names = [f"toy_{seed:08d}" for seed, _ in keys]
        self.images, self.labels = (np.stack([scene[i] for scene in scenes]) for i in (0, 1))
        self.captions = {name: scene[2] for name, scene in zip(self.names, scenes)}

    def __len__(self):
        return len(self.names)

    def window(self, index, seed=None):
        return draw_window(S, S, S, self.grid, seed if self.augment else None)

    def full(self, index, flip=False):
        return tensors(self.images[index], self.labels[index], flip)

    __getitem__ = item


# Folders of the images and of the labels ({}: the split; the first that exists), what ends their files' names, and a
# source. Where there are two ends, the second serves where the first is missing.
FOLDERS = {
    "cityscapes": (["leftImg8bit/{}"], ["gtFine/{}"], ["_leftImg8bit"], ["_gtFine_labelIds", "_gtFine_labelTrainIds"],
                   "unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from cityscapes-dataset.com there"),
    "ade20k": (["images/{}"], ["annotations/{}"], [""], [""],
               "unpack ADEChallengeData2016.zip from sceneparsing.csail.mit.edu, and name the folder inside it"),
    "coco": (["{}", "images/{}"], ["stuffthingmaps/{}", "annotations/{}"], [""], [""],
             "unpack train2017.zip, val2017.zip (cocodataset.org), stuffthingmaps_trainval2017.zip (COCO-Stuff) there"),
    "path": (["images/{}", "images"], ["labels/{}", "labels"], [""], [""],
             "put pictures into images/, layouts of the same names into labels/"),
}
SPLITS = {"ade20k": {"train": "training", "val": "validation"}, "coco": {"train": "train2017", "val": "val2017"}}


def find_files(data, root, split):
    """-> {name: path} of the images and of the labels, by name; the name is the file's without its end."""
    kind, found = data if data in FOLDERS else "path", []
    *folders, image_ends, label_ends, source = FOLDERS[kind]
    if kind == "path" and any((root / "images" / s).is_dir() for s in ("train", "val")):
        folders = [folders[0][:1], folders[1][:1]]         # without these split folders, every split is the whole
    for places, ends in zip(folders, (image_ends, label_ends)):
        places = [root / p.format(SPLITS.get(kind, {}).get(split, split)) for p in places]
        files = next((p for p in places if p.is_dir()), places[0]).glob("*/*" if kind == "cityscapes" else "*")
        files = [f for f in files if f.suffix.lower() in (".png", ".jpg", ".jpeg") and f.name[0] != "."]
        found.append({f.stem.removesuffix(e): f for e in reversed(ends) for f in files if f.stem.endswith(e)})
        if not found[-1]:
            looked = " or ".join(f"{place}/*{end}.png" for place in places for end in ends)
            raise InputError(f"{data}: no {split} files {looked}: {source}")
    return [dict(sorted(files.items())) for files in found]


def read_captions(root, split, path):
    """-> {name: caption} from `path`, else from captions_{split}.json or captions.json in root, else {}."""
    places = [p for p in (root / f"captions_{split}.json", root / "captions.json") if p.is_file()]
    places = [Path(path)] if path else places
    try:
        captions = json.loads(places[0].read_text("utf-8")) if places else {}
        if not isinstance(captions, dict) or not all(isinstance(c, str) for c in captions.values()):
            raise ValueError("not an object of strings")
    except (OSError, ValueError) as error:
        raise InputError(f"{places[0]}: no captions to be read ({error}): wanted is JSON, {{name: caption}}")
    return captions


class Pairs(torch.utils.data.Dataset):
    """Images and label maps on disk: Cityscapes, ADE20K, COCO-Stuff, or a folder with images/, labels/, classes.txt.

    Cityscapes is resized to (size, 2 size), everything else to `size` at the shorter side and a multiple of `grid` at
    the longer; a picture of size x size stays as it is. Then comes a crop (`draw_window`). Raises InputError with a
    report of all pairs that are not whole; skip_broken prints it instead, and leaves them out.
    """

    def __init__(self, data, root=None, split="train", size=512, captions=None, grid=8, augment=True,
                 skip_broken=False):
        if size < grid or size % grid:
            raise InputError(f"size {size}: the autoencoder wants a multiple of {grid} pixels")
        data, root, self.classes = str(data), Path(root or data), class_table(data)
        self.size, self.grid, self.augment = size, grid, augment
        self.images, self.labels = find_files(data, root, split)
        self.captions = read_captions(root, split, captions)
        broken = {"images without a label": [n for n in self.images if n not in self.labels],
                  "labels without an image": [n for n in self.labels if n not in self.images]}
        self.shapes, names = {}, [n for n in self.images if n in self.labels]        # name -> (H, W) once resized
        with ThreadPoolExecutor(CORES) as pool:
            checks = pool.map(self.check, names)
            for name, (trouble, found) in tqdm(zip(names, checks), f"checking {split}", len(names), leave=False,
                                               disable=len(names) <= 500):
                if trouble:
                    broken.setdefault(trouble, []).append(found)
                else:
                    self.shapes[name] = found
        self.names = list(self.shapes)
        if any(broken.values()):
            report = [f"{root}: broken pairs in {split} ({len(self.names)} are whole)"]
            report += [f"  {len(b)} {what}: {', '.join(b[:3] + ['...'] * (len(b) > 3))}"
                       for what, b in broken.items() if b]
            if not skip_broken or not self.names:
                raise InputError("\n".join([*report, "  mend them, or leave them out with --skip-broken"]))
            print("\n".join(report), file=sys.stderr)
        if captions and not self.captions.keys() & self.shapes.keys():
            raise InputError(f"{captions}: names none of the {len(self.names)} images, as {self.names[0]!r} is")

    def check(self, name):
        """-> (None, (H, W) of the resized picture), or (what is wrong, where)."""
        try:
            label = read_layout(self.labels[name], self.classes)
        except InputError as error:
            return "labels that cannot be read", str(error)
        try:
            w, h = open_image(self.images[name], decode=False).size
        except InputError as error:
            return "images that cannot be read", str(error)
        if label.shape != (h, w):
            return "labels of another size", f"{name} ({label.shape[1]} x {label.shape[0]}, image {w} x {h})"
        S, g = self.size, self.grid
        if self.classes.key == "cityscapes" and (h, w) != (S, S):
            return None, (S, 2 * S)
        return None, tuple(max(S, round(side * S / min(h, w) / g) * g) for side in (h, w))

    def __len__(self):
        return len(self.names)

    def window(self, index, seed=None):
        return draw_window(*self.shapes[self.names[index]], self.size, self.grid, seed if self.augment else None)

    def full(self, index, flip=False):
        """The whole picture, resized -> image float32 [3,H,W] in [-1,1], label int64 [H,W]."""
        name = self.names[index]
        image, (h, w) = open_image(self.images[name]).convert("RGB"), self.shapes[name]
        label = Image.fromarray(read_layout(self.labels[name], self.classes).numpy().astype(np.uint8))
        if image.size != (w, h):                           # PIL's bicubic averages over the area that a pixel covers
            image, label = image.resize((w, h), Image.BICUBIC), label.resize((w, h), Image.NEAREST)
        return tensors(np.asarray(image), np.asarray(label), flip)

    __getitem__ = item


def open_dataset(data, root=None, split="train", size=None, **options):
    """data: "toy", "toy:night" (one domain), "toy:all" (those of the options that Toy has count), or another key or a
    folder (options are Pairs')."""
    kind, _, domain = str(data).partition(":")
    if kind != "toy":
        return Pairs(data, root, split, size or 512, **options)
    if size not in (None, S):
        raise InputError(f"size {size}: the toy world has {S} pixels")
    options = {k: v for k, v in options.items() if k in ("domains", "length", "augment")}
    return Toy(split, **options | ({"domains": DOMAINS if domain == "all" else (domain,)} if domain else {}))


# ---- Batches.

@functools.lru_cache(maxsize=2)
def order(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch_keys(n, batch, seed, step, rank, world):
    """One rank's share of batch number `step`: epochs of n items without a seam, each in an order of its own."""
    keys = []
    for position in range((step * world + rank) * batch, (step * world + rank + 1) * batch):
        epoch = position // n
        index = int(order(n, seed, epoch)[position % n])
        keys.append((index, int(np.random.SeedSequence((seed, epoch, index)).generate_state(1)[0])))
    return keys


def batches(dataset, batch, seed, start=0, workers=0, rank=0, world=1):
    """Endless batches of stacked items, from number `start` on.

    Number `step` depends on (seed, step, rank, world) alone: neither on the workers nor on where the run began.
    """
    keys = (batch_keys(len(dataset), batch, seed, step, rank, world) for step in itertools.count(start))
    # The loader gets a generator of its own: otherwise it draws from torch's global one, and so changes the run.
    yield from torch.utils.data.DataLoader(
        dataset, batch_sampler=keys, num_workers=workers, persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(), generator=torch.Generator())


# ---- The toy world as files.

def write_toy(folder, form, split="train", length=None, domains=("day",)):
    """Writes the toy world as a dataset's files; Pairs(size=64, grid=4) then has the very items of Toy."""
    toy, folder, to_file = Toy(split, domains, length), Path(folder), np.arange(256, dtype=np.uint8)
    places = "images/{}/{}.png", "labels/{}/{}.png"
    if form == "cityscapes":
        places = "leftImg8bit/{}/toy/{}_leftImg8bit.png", "gtFine/{}/toy/{}_gtFine_labelIds.png"
        to_file[:19], to_file[IGNORE] = CITYSCAPES_IDS, 0
    for name, image, label in zip(toy.names, toy.images, toy.labels):
        for place, array in zip(places, (image, to_file[label])):
            path = folder / place.format(split, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    (folder / f"captions_{split}.json").write_text(json.dumps(toy.captions, indent=1))
    if form == "path":
        lines = [f"{name} {r} {g} {b}\n" for name, (r, g, b) in zip(toy.classes.names, toy.classes.palette)]
        (folder / "classes.txt").write_text("".join(lines))
    print(f"{folder}: {len(toy)} {split} pairs of the toy world")


def show_toy(path, seeds=range(10_000_000, 10_000_008)):
    """Writes a picture: a column per scene, its layout above the five domains, twice enlarged."""
    scenes = [[toy_scene(seed, domain) for domain in DOMAINS] for seed in seeds]
    columns = [np.concatenate([np.asarray(colorize(s[0][1], "toy")), *(image for image, _, _ in s)]) for s in scenes]
    Image.fromarray(np.concatenate(columns, 1).repeat(2, 0).repeat(2, 1)).save(path)


def main():
    parser = argparse.ArgumentParser(description="Writes the toy world: as a dataset's files, or as one picture.")
    parser.add_argument("--write-toy", metavar="DIR", help="write image/label pairs and captions into this folder")
    parser.add_argument("--format", choices=("cityscapes", "path"), default="cityscapes", help="its layout")
    parser.add_argument("--split", choices=("train", "val"), default="train")
    parser.add_argument("--n", type=int, help="how many pairs (2000 for train, 256 for val)")
    parser.add_argument("--domains", default="day", help=f"comma-separated, out of {','.join(DOMAINS)}")
    parser.add_argument("--show", metavar="FILE", help="write a picture: eight layouts in five domains")
    parser.error = refuse
    try:
        args = parser.parse_args()
        if not (args.write_toy or args.show) or args.n is not None and args.n < 1:
            refuse("give --write-toy DIR or --show FILE, and no --n below 1")
        if args.write_toy:
            write_toy(args.write_toy, args.format, args.split, args.n, tuple(args.domains.split(",")))
        if args.show:
            show_toy(args.show)
    except (InputError, OSError, ValueError) as error:     # ValueError: a suffix that PIL does not know
        parser.exit(2, f"data.py: {error}\n")


if __name__ == "__main__":
    main()

"""The toy world: streets in five kinds of weather, drawn as a miniature Cityscapes.

`python train.py --data toy` draws it when it is first needed: one folder per weather, in which
Cityscapes' own folders lie. Each scene is a pure function of its seed and its weather.
"""
import json
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE = 64  # pictures are SIDE x SIDE pixels
VOID = 255
DOMAINS = "day", "night", "fog", "snow", "rain"
SPLITS = {"train": (0, 2000), "val": (10_000_000, 256)}  # first seed, number of scenes
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
COATS = [rgb for name, rgb in PAINTS.items() if name != "white"]  # white would vanish in snow
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
    """-> [256,1] table of values, so that by_class(...)[label] is [64,64,1]."""
    table = np.full((256, 1), others, float)
    for c, value in values.items():
        table[c] = value
    return table


AT_NIGHT = by_class(1, {  # share of daylight that a class keeps; small things stay visible
    ROAD: 0.38, SIDEWALK: 0.42, TERRAIN: 0.36, BUILDING: 0.4, VEGETATION: 0.4,
    PERSON: 0.72, CAR: 0.66, POLE: 0.62, SIGN: 0.8})
IN_FOG = by_class(1, {SKY: 0, **dict.fromkeys(SMALL, 0.85)})  # share of the fog in front of it
IN_SNOW = by_class(0.06, {ROAD: 0.5, SIDEWALK: 0.86, TERRAIN: 0.72})  # share that is white
IN_RAIN = by_class(0, {ROAD: 0.5, SIDEWALK: 0.3})  # how strongly it reflects
YY, XX = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)


def toy_scene(seed, domain="day"):
    """A street in perspective -> image uint8 [64,64,3], label uint8 [64,64], caption.

    Labels are Cityscapes' train ids, and 255 for void. The result depends on the arguments alone.
    Layout and colours depend on the seed only, so all domains show the same street.
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
    """A scene in the making: its random numbers, its perspective and its four canvases.

    Everything stands on a ground plane whose vanishing point is (vanish, horizon). A point at
    offset X to the right and closeness d (0 at the horizon, 1 at the lower edge) is drawn at
    (vanish + X d, horizon + depth d), and sizes grow with d. The painters set .walls, .left, .right
    and .car for the painters after them.
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
            Image.new("RGB", (SIDE, SIDE)),  # light that it emits
            Image.new("L", (SIDE, SIDE), SKY),  # class
            Image.new("L", (SIDE, SIDE), 255)]  # distance, for the fog
        self.pens = [ImageDraw.Draw(canvas) for canvas in self.canvases]

    def y(self, d):
        """The row of the picture at closeness d."""
        return self.horizon + self.depth * d

    def paint(self, shape, xy, colour, what=(), glow=(0, 0, 0)):
        """what: (class, distance); () keeps the class beneath (shadows, windows)."""
        for pen, fill in zip(self.pens, (colour, glow, *what)):
            getattr(pen, shape)(xy, fill=fill)

    def box(self, x0, y0, x1, y1, *how, **glow):
        self.paint("rectangle", [x0, y0, x1, y1], *how, **glow)

    def oval(self, x, y, r, edges, *how):
        """edges: left, top, right and lower edge, in radii r from (x, y)."""
        left, top, right, low = (r * edge for edge in edges)
        self.paint("ellipse", [x + left, y + top, x + right, y + low], *how)

    def trapezoid(self, x, y0, half0, y1, half1, *how):
        """Reaches half0 to either side of x at row y0, and half1 at row y1."""
        xy = [(x - half0, y0), (x - half1, y1), (x + half1, y1), (x + half0, y0)]
        self.paint("polygon", xy, *how)

    def strip(self, x0, x1, d0, d1, *how):
        """A strip of the ground plane from X = x0 to x1 and from closeness d0 to d1."""
        corners = (x0, d0), (x1, d0), (x1, d1), (x0, d1)
        xy = [(self.vanish + x * d, self.y(d)) for x, d in corners]
        self.paint("polygon", xy, *how)

    def beside(self, d, spread):
        """A random x within `spread` pixels (at d = 1) of a kerb, in the frame if possible."""
        is_left = self.chance() < 0.5
        kerb = self.vanish - self.left * d if is_left else self.vanish + self.right * d
        room = (kerb if is_left else SIDE - kerb) - 4
        away = 2 + self.chance() * min(spread * d, max(3, room))
        return int(kerb - away if is_left else kerb + away)

    def shade_ground(self):
        """Shade the ground; set .light, .label, .far, and the masks .ground, .small -> image."""
        image, self.light, self.label, far = map(np.asarray, self.canvases)
        self.ground = np.isin(self.label, GROUND)[..., None]
        self.small = np.isin(self.label, SMALL)[..., None]
        d = ((YY - self.horizon) / self.depth).clip(0, 1)[..., None]
        far = far.astype(np.float32)[..., None] / 255
        self.far = np.where(self.ground, 0.9 * (1 - d) ** 1.5, far)
        return image.astype(np.float32) * np.where(self.ground, 1.1 - 0.2 * d, 1)


def tone(colour, k):
    """An RGB tuple, k times as bright."""
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
    """Buildings along the horizon, taller towards the frame's edges. Sets .walls, their kind."""
    rng, chance, horizon = street.rng, street.chance, street.horizon
    kinds = list(WALLS)
    street.walls = kinds[rng.integers(4)]  # most buildings have these
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
    """Grass or paving, sidewalks with kerbs, and the road with markings or tracks in the snow.

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


THINGS = (  # name, largest number, least closeness, range of closeness, exponent of its draw
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
    """A car 0.36 times as wide as the road, seen from behind in the right lane.

    Sets .car: its colour's name, and its rows and columns in the picture.
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
    street.box(left - 1, y - 1, right + 1, y, (24, 24, 28))  # shadow
    for side in (left, right - wheel):
        street.box(side, y - height // 4, side + wheel, y, (16, 16, 18), what)
    street.trapezoid(x, y - height // 2, half - half // 5, top, half * 0.6, body, what)
    street.trapezoid(x, y - height * 0.56, half * 0.66, y - height * 0.9, half * 0.48, glass)
    street.box(left, y - int(height * 0.56), right, low, body, what)
    street.box(left, y - max(2, int(height * 0.26)), right, low, tone(body, 0.66))
    if street.domain == "snow":  # on the roof
        reach = int(half * 0.55)
        street.box(x - reach, top, x + reach, top + height // 9, (244, 246, 250))
    away = x > street.vanish + (street.right - street.left) / 2 * d
    lamp = (255, 40, 30) if away else (255, 246, 200)
    for side in (left, right - wheel + 1):
        end = side + wheel - 1
        street.box(side, y - int(height * 0.5), end, y - int(height * 0.36), lamp, glow=lamp)
    street.car = name, slice(max(0, top), y), slice(max(0, left), right + 1)


def paint_person(street, y, d, what):
    """A person, about as tall as a car is wide, on the road or beside it."""
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
    leg = w // 2 - 1 if w > 3 else w - 1  # two legs if a gap fits between them
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
    if w:  # a light and a dark side stand out against any background
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


# Light and weather, by class and distance: image float32 [64,64,3] -> the same, roughly in 0..255.

def add_day(street, image):
    return image * 1.04


def add_night(street, image):
    """Our own headlights, and a halo around every lamp."""
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
    """Snow on the ground, and up to twelve flakes, none of them on a small thing."""
    white = np.float32([208, 216, 232])
    image += (white - image) * IN_SNOW[street.label]
    for x, y in street.look.integers(0, SIDE - 2, (12, 2)):
        flake = image[y:y + 2, x:x + 2]
        if not street.small[y, x]:
            flake += (255 - flake) * 0.8
    return image


def add_rain(street, image):
    """The ground reflects, and nine streaks fall."""
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
    """Add void, which real labels have too: a strip at the lower edge, a patch anywhere."""
    label = street.label.copy()
    if street.chance() < 0.2:
        label[-street.rng.integers(2, 5):] = VOID
    if street.chance() < 0.2:
        y, x, h, w = street.rng.integers([0, 0, 3, 3], [SIDE - 8, SIDE - 8, 8, 8])
        label[y:y + h, x:x + w] = VOID
    return label


def join_words(words):
    """["a", "b", "c"] -> "a, b and c"."""
    if len(words) < 2:
        return "".join(words)
    return ", ".join(words[:-1]) + " and " + words[-1]


def describe(street, label):
    """The caption: things in sight and the weather, or in a quarter of scenes the weather alone."""
    pixels = np.bincount(label.ravel(), minlength=256)
    parts = []
    if street.car:
        colour, rows, columns = street.car
        if (label[rows, columns] == CAR).sum() >= 24:
            parts.append(f"a {colour} car")
    others = [  # class, least pixels, probability of being mentioned, words
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


# -- the toy world on disk -------------------------------------------------------------------------

def toy_edit(caption, i):
    """The i-th caption, moved to another domain -> the edited prompt, the domain that it names.

    "a street with trees, in daylight" -> "a street with trees, at night", "night". The other
    domains take turns.
    """
    for own, phrases in PHRASES.items():
        for phrase in phrases:
            if phrase in caption:
                others = [domain for domain in DOMAINS if domain != own]
                target = others[i % len(others)]
                return caption.replace(phrase, PHRASES[target][0]), target
    target = DOMAINS[i % len(DOMAINS)]
    return f"{caption}, {PHRASES[target][0]}", target


def write_split(folder, split, scenes):
    """Draw one split in Cityscapes' form, with captions_{split}.json and edits_{split}.json.

    scenes: list of (seed, domain). edits_{split}.json holds the evaluation's edited prompts:
    {"targets": the domains, "edits": {name: [prompt, target]}}.
    """
    folder = Path(folder)
    images = folder / "leftImg8bit" / split / "toy"
    labels = folder / "gtFine" / split / "toy"
    images.mkdir(parents=True, exist_ok=True)
    labels.mkdir(parents=True, exist_ok=True)
    captions = {}
    edits = {}
    for i, (seed, domain) in enumerate(scenes):
        name = f"toy_{seed:08d}"
        image, label, caption = toy_scene(seed, domain)
        Image.fromarray(image).save(images / f"{name}_leftImg8bit.png")
        Image.fromarray(label).save(labels / f"{name}_gtFine_labelTrainIds.png")
        captions[name] = caption
        edits[name] = toy_edit(caption, i)
    write_json(folder / f"captions_{split}.json", captions)
    write_json(folder / f"edits_{split}.json", {"targets": DOMAINS, "edits": edits})


def write_json(path, content):
    path.write_text(json.dumps(content, indent=1), "utf-8")


def draw(root, weather):
    """The toy world's folder for one weather, drawn if it does not exist yet -> its Path.

    weather: one of DOMAINS, or "all", in which the domains take turns. The folder is drawn under
    another name and then renamed, so an interrupted drawing leaves no half of it. Raises OSError
    if `root` cannot be written to.
    """
    folder = Path(root) / weather
    if folder.is_dir():
        return folder
    domains = DOMAINS if weather == "all" else (weather,)
    drawing = folder.with_name(f".{weather}.{os.urandom(4).hex()}")
    drawing.mkdir(parents=True)
    try:
        for split, (first, count) in SPLITS.items():
            scenes = [(first + i, domains[i % len(domains)]) for i in range(count)]
            write_split(drawing, split, scenes)
        os.rename(drawing, folder)
    except BaseException as error:
        shutil.rmtree(drawing, ignore_errors=True)
        lost_race = isinstance(error, OSError) and folder.is_dir()  # another process was faster
        if not lost_race:
            raise
    return folder

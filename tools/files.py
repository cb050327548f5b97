"""Reads and writes files. Incomplete files are refused; writes are atomic.

Everything that cannot be read is an InputError: one line that names the file.
"""
import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

MAX_PIXELS = 64 * 2**20  # larger images are refused before they are decoded
FORMATS = "PNG", "JPEG", "WEBP", "BMP", "TIFF"  # PIL would start Ghostscript for others
PICTURES = ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"  # suffixes, in any case
Image.MAX_IMAGE_PIXELS = None  # `opened` has a limit of its own


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


def attempt(function, name):
    """-> the function's result, or the InputError that it raised."""
    try:
        return function(name)
    except InputError as error:
        return error


def try_all(function, names, title):
    """Call function(name) for each name, in threads -> {name: result}, {name: InputError}."""
    with ThreadPoolExecutor() as pool:
        results = pool.map(partial(attempt, function), names)
        results = tqdm(results, title, len(names), leave=False, disable=len(names) <= 500)
        results = dict(zip(names, results))
    broken = {name: x for name, x in results.items() if isinstance(x, InputError)}
    return {name: x for name, x in results.items() if name not in broken}, broken


def report(broken, total, what, skip_broken):
    """Raise InputError with the first five of the broken ones; skip_broken: a note on them."""
    if not broken:
        return []
    first = [str(error) for error in broken.values()][:5]
    title = f"{what}: {len(broken)} of {total} are broken"
    if not skip_broken or len(broken) == total:
        lines = [title, *first, "fix them, or skip them with --skip-broken"]
        raise InputError("\n  ".join(lines))
    return [f"{len(broken)} of {total} are broken and left out, the first: {first[0]}"]


# -- image files -----------------------------------------------------------------------------------

@contextlib.contextmanager
def opened(file, name):
    """Yield the PIL.Image of a path or a binary file, with only the header read.

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
    except UnidentifiedImageError:
        raise InputError(f"{name}: cannot be read as an image: not {', '.join(FORMATS)}") from None
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
        size = image.size
        if "exif" in image.info and image.format != "TIFF":  # PIL has turned TIFF's size already
            with contextlib.suppress(Exception):
                if image.getexif().get(0x112) in (5, 6, 7, 8):
                    size = image.size[::-1]
        return size


def read_image(file):
    """A photo -> PIL.Image in RGB; 16 bits are scaled to 8 (PIL alone would clip grey to white)."""
    image = open_image(file)
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


# -- writing files: atomically ---------------------------------------------------------------------

@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path beside `path`, whose file replaces `path` once it is on the disk.

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
    """Remove the half-written files of killed processes. The caller holds the folder's lock, so
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

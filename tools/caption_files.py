"""Caption files, in the forms in which they are published and the forms that people use."""
import json
import os
from collections import Counter
from pathlib import Path

from tools.files import InputError, read_text
from tools.layout_files import picture_name, spell


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
    return {spell(name): caption for name, caption in captions.items()}


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
    labels = {picture_name(key): caption for key, caption in read.items() if key not in files}
    read = labels | read
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
        notes.append(f"captions for {len(captions)} of {len(files)} images; the others are "
                     "composed of their classes")
    for folder in sorted({Path(root), *folders}):
        for path in sorted(folder.glob("metadata.*")):
            notes.append(f"{path}: captions in this form are not read, only captions.json, "
                         "{name: caption}, and NAME.txt beside the image")
    return captions, notes

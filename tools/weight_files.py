"""Weight files: reading them without executing anything, and naming what is in them.

`read_parts` turns a file, or a diffusers folder, into {part: {name: tensor}} under the names of our
networks; aldm.py fills the networks with these. The tensors stay memory-mapped throughout. A reader
of the paper can skip this file.
"""
import json
import os
import pickle
import re
import tarfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from safetensors.torch import save_file

from data import ASSETS, IGNORE, InputError
from tools.files import atomic

PRESET_NAMES = "sd15", "toy"  # those of aldm.PRESETS
HUB_FILE = re.compile(r"(\w[\w.-]*/\w[\w.-]*)/(.+\.(?:safetensors|ckpt|pth|pt|bin))")
WANTED = ("expected Stable Diffusion 1.x (a .safetensors or .ckpt file, or a diffusers folder), "
          "or an adapter for it")
SEGMENTERS = ("give mit-semseg's UperNet-101 (encoder_epoch_50.pth and decoder_epoch_50.pth), "
              "a segmenter of train.py, or an official ALDM checkpoint")

# How the names of each part begin in a file; the first match counts, the rest is the name within
# the part. Where a part has several prefixes, we write the last.
PREFIXES = {
    "model.diffusion_model.": "unet",
    "first_stage_model.": "vae",
    "cond_stage_model.transformer.text_model.": "text",
    "cond_stage_model.transformer.": "text",
    "text_model.": "text",  # Hugging Face's
    "text.": "text",
    "control_model.": "control",
    "segmenter.segmenter.": "segmenter",  # official ALDM's discriminator
    "segmenter.": "segmenter",
    "adapter.": "adapter",
    "layout.": "layout",
    "judge.": "judge",
    "domain.": "domain",
}
KNOWN = re.compile(f"({'|'.join(map(re.escape, PREFIXES))})(.*)")
PREFIX = {part: prefix for prefix, part in PREFIXES.items()}
ADAPTER_PART = {"controlnet": "control", "t2i": "adapter", "oft": "adapter",
                "freestyle": "adapter", "piti": "adapter"}
CHECKPOINT = {"adapter": "adapter.", "layout": "layout.", "discriminator": "segmenter."}

VOCABULARY = 49408  # CLIP's tokens

# Files of a single part omit its prefix: how one of their names begins -> the prefix.
SINGLE_PARTS = {
    "controlnet_mid_block.": "control_model.",
    "zero_convs.": "control_model.",
    "up_blocks.": "model.diffusion_model.",
    "quant_conv.": "first_stage_model.",
    "body.": "adapter.",
    "layer4.": "segmenter.encoder.",  # mit-semseg's two files
    "conv_last.": "segmenter.decoder.",
}

# Segmenters that do not fit: how one of their names begins -> what the file is.
FOREIGN = {
    r"segformer\.": "a SegFormer of Hugging Face's transformers",
    r"(backbone|decode_head)\.": "a segmenter of mmsegmentation, or NVIDIA's SegFormer",
    r"(ppm|cbr|cbr_deepsup|conv_last_deepsup)\.": "a mit-semseg decoder other than UperNet",
}

# What files hold besides the weights; the last two belong to mit-semseg's synchronised batch norm.
SKIPPED = re.compile(r"position_ids$|text_projection|loss\.|_tmp_running_|_running_iter$")

# The metadata of an adapter, or of our segmenters; None where the file does not say.
META = ("preset", "dataset", "names", "palette", "file_ids", "void", "adapter", "hint",
        "hint_colors", "step", "normalize")

def locate(path, advice="give its path"):
    """A path on disk, or USER/REPO/FILE of the Hugging Face hub, downloaded into its cache -> Path.
    InputError if the hub has no such file or cannot be reached."""
    found = HUB_FILE.fullmatch(str(path))
    if found is None or os.path.exists(path) or os.path.exists(Path(path).parts[0]):
        return Path(path)
    repo, file = found.groups()
    try:
        return Path(hf_hub_download(repo, file))
    except Exception as error:  # offline, no such file, disk full: each has its own class
        raise InputError(f"{path}: neither on disk nor to be had from the Hugging Face hub "
                         f"({type(error).__name__}); download {file} from huggingface.co/{repo} "
                         f"and {advice}") from None


# -- files -> tensors ------------------------------------------------------------------------------


# A pickle can name any function. None of them is imported or called.


class Inert:
    """Stands in for any class or function of a pickle: accepts arguments, state and items, and
    does nothing with them."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __call__(self, *args, **kwargs):
        return self

    def __init__(self, *args, **kwargs):
        pass

    __setstate__ = __setitem__ = append = extend = add = __init__


class PlainTensor(Inert):
    """torch's function that rebuilds a tensor, as a class: state given to it changes nothing."""

    def __new__(cls, storage, offset, size, stride, *options):
        return torch._utils._rebuild_tensor(storage, offset, size, stride)


class PlainParameter(Inert):
    """A parameter: the tensor itself."""

    def __new__(cls, tensor, *options):
        return tensor


class PlainDict(dict):
    """OrderedDict and defaultdict, without attributes and factory."""
    __slots__ = ()

    def __init__(self, *args):
        super().__init__(*[a for a in args if isinstance(a, list)])  # items, in Python 2's pickles

    def __setstate__(self, state):
        pass


PICKLED = {
    "collections.OrderedDict": PlainDict,
    "collections.defaultdict": PlainDict,
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor": PlainTensor,
    "torch._utils._rebuild_tensor_v2": PlainTensor,
    "torch._utils._rebuild_parameter": PlainParameter,
    "torch._utils._rebuild_parameter_with_state": PlainParameter,
}


class Unpickler(pickle.Unpickler):
    """Tensors and plain containers become what they are (torch.load itself makes the storages),
    anything else Inert."""

    def find_class(self, module, name):
        return PICKLED.get(f"{module}.{name}", Inert)


def unpickle(file, **options):
    return Unpickler(file, **options).load()


RESTRICTED = SimpleNamespace(__name__="restricted", Unpickler=Unpickler, load=unpickle)


def load_pickle(path, is_zip):
    """A file of torch.save -> its content. ValueError for the two kinds of files that torch.load
    reads in another way: programs, which it would compile, and archives, which it would extract."""
    if is_zip and "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
        raise ValueError("a TorchScript program")
    if not is_zip and tarfile.is_tarfile(path):
        raise ValueError("a tar archive")
    return torch.load(path, map_location="cpu", mmap=is_zip, weights_only=False,
                      pickle_module=RESTRICTED)


def read_file(path):
    """One file of safetensors or torch.save -> its content; its metadata if it is ours, else {}.

    Tensors are memory-mapped (but for torch's format of before 2020). Nothing is executed, whatever
    a pickle asks for. InputError if the file is missing, unreadable or damaged."""
    metadata = {}
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("not a regular file")
        with open(path, "rb") as file:
            head = file.read(512)
        if b"\0" not in head:
            raise ValueError("empty, or a web page or a Git LFS pointer in place of the file")
        if head[8:9] == b"{":
            with safe_open(path, "pt") as file:
                content = {name: file.get_tensor(name) for name in file.keys()}
                metadata = file.metadata() or {}
        else:
            content = load_pickle(path, is_zip=head.startswith(b"PK"))
        if "aldm-" not in metadata.get("format", ""):
            return content, {}
        return content, {key: json.loads(value) for key, value in metadata.items()}
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except Exception as error:  # whatever the two libraries raise for a damaged file
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: no weights can be read from it ({reason}); if it is damaged or "
                         "cut short, download it again") from None


def list_weight_files(path):
    """-> lists of files: [[path]] for a file; for a diffusers folder, or a repository in Hugging
    Face's cache, the file (or the shards) of each of its components; [] if it has none."""
    if not os.path.isdir(path):
        return [[path]]
    path = max(path.glob("snapshots/*"), key=os.path.getmtime, default=path)
    components = []
    for folder in path, path / "unet", path / "vae", path / "text_encoder":
        files = list(folder.glob("*model*.safetensors")) or list(folder.glob("*model*.bin"))
        full = [file for file in files if "." not in file.stem]  # not model.fp16.safetensors
        if files:
            components.append(full or files)
    return components


# -- tensors -> parts ------------------------------------------------------------------------------


# Whether a file is what it claims to be is checked here, once.


@cache
def diffusers_names():
    """{network: [(a piece of a name in diffusers' files, the same in ours), ...]}"""
    names = {}
    for line in (ASSETS / "diffusers_names.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            network, theirs, ours = line.split()
            names.setdefault(network, []).append((theirs, ours))
    return names


def convert_names(part, state):
    """A part's tensors under diffusers', Hugging Face's or our names -> under our names."""
    if part != "text" and not any(".resnets." in name for name in state):
        return state
    network = "unet" if part == "control" else part
    converted = {}
    for name, t in state.items():
        for theirs, ours in diffusers_names()[network]:
            name = name.replace(theirs, ours)
        if ".attn_1." in name and t.ndim == 2:  # linear in diffusers, a 1x1 convolution here
            t = t[:, :, None, None]
        converted[name] = t
    return convert_text(converted) if part == "text" else converted


def convert_text(state):
    """Fuse q, k and v, as open_clip does; fill in the token embedding of the toy's file. Tensors
    that do not fit together keep their names, and are reported when the part is loaded."""
    for name in [name for name in state if ".q_proj." in name]:
        names = [name.replace("q_proj", f"{letter}_proj") for letter in "qkv"]
        q, k, v = [state.get(n, torch.empty(0)) for n in names]
        if q.ndim and q.shape == k.shape == v.shape:
            state[name.replace("q_proj.", "in_proj_")] = torch.cat([q, k, v])
            for n in names:
                del state[n]
    rows = state.get("token_embedding.rows", torch.empty(0))
    ids = state.get("token_embedding.ids", torch.empty(0))
    are_tokens = ids.dtype == torch.int64 and bool(((ids >= 0) & (ids < VOCABULARY)).all())
    if are_tokens and rows.ndim == 2 and ids.shape == rows.shape[:1]:
        table = initial_tokens(rows.shape[1])
        state["token_embedding.weight"] = table.index_copy_(0, ids, rows.float())
        del state["token_embedding.rows"], state["token_embedding.ids"]
    return state


def split_parts(path, tensors):
    """{name in the file: tensor} -> {part: {name in our network: tensor}}."""
    for beginning, what in FOREIGN.items():
        if any(re.match(beginning, name) for name in tensors):
            raise InputError(f"{path}: {what} does not fit; {SEGMENTERS}")
    omitted = ""
    for beginning, prefix in SINGLE_PARTS.items():
        if any(name.startswith(beginning) for name in tensors):
            omitted = prefix
    parts = {}
    for name, t in tensors.items():
        found = KNOWN.match(name) or KNOWN.match(omitted + name)
        if found and not SKIPPED.search(name):
            prefix, ours = found.groups()
            parts.setdefault(PREFIXES[prefix], {})[ours] = t
    if not parts:
        names = ", ".join(list(tensors)[:3])
        raise InputError(f"{path}: no known tensor ({names}, ...); {WANTED}")
    return {part: convert_names(part, state) for part, state in parts.items()}


def read_tensors(path):
    """One file -> {name: tensor}, its metadata if it is ours. A checkpoint of train.py gets the
    names that its parts have in our other files."""
    content, meta = read_file(path)
    found = {"": content}
    if isinstance(content, dict) and "meta" in content and "adapter" in content:
        found = {prefix: content.get(key, {}) for key, prefix in CHECKPOINT.items()}
        meta = content["meta"] if isinstance(content["meta"], dict) else {}
        meta = {**meta, "step": content.get("step")}
    elif isinstance(content, dict) and "state_dict" in content:
        found = {"": content["state_dict"]}
    tensors = {}
    for prefix, state in found.items():
        if not isinstance(state, dict):
            raise InputError(f"{path}: holds a {type(state).__name__} where named tensors belong; "
                             f"{WANTED}")
        for name, t in state.items():
            if torch.is_tensor(t):
                tensors[f"{prefix}{name}"] = t.detach()
    return tensors, meta


def read_parts(path):
    """A file or folder -> {part: {name: tensor}}, as load_weights, and its metadata (META) if it is
    ours, else {}. InputError if there are no weights, if they are not floating-point numbers, or if
    the metadata makes no sense."""
    parts, meta = {}, {}
    for files in list_weight_files(locate(path)):
        tensors = {}
        for file in files:
            found, meta = read_tensors(file)
            tensors |= found
        parts |= split_parts(path, tensors)
    if not parts:
        raise InputError(f"{path}: a folder without weights; {WANTED}")
    for part, state in parts.items():
        for name, t in state.items():
            if not t.is_floating_point() and not name.endswith("num_batches_tracked"):
                raise InputError(f"{path}: {part}: {name} is {t.dtype}, expected floating-point "
                                 "numbers")
    return parts, check_meta(path, meta) if meta else {}


def whole_numbers(value, *lengths, low=0, high=255):
    """Whether `value` is a whole number in [low, high], or a list of them, or lists of lists, of
    these lengths (None: any)."""
    if not lengths:
        return isinstance(value, int) and low <= value <= high
    length, *inner = lengths
    if not isinstance(value, (list, tuple)) or length not in (None, len(value)):
        return False
    return all(whole_numbers(item, *inner, low=low, high=high) for item in value)


def check_meta(path, meta):
    """The metadata of a file of ours -> the same with all of META. InputError if it lacks what is
    needed, or has a value that means nothing here."""
    meta = {**dict.fromkeys(META), **meta}
    names = meta["names"] if isinstance(meta["names"], (list, tuple)) else ()
    is_segmenter = meta.get("format") == "aldm-segmenter"
    valid = {
        "preset": meta["preset"] in PRESET_NAMES,
        "names": 0 < len(names) <= IGNORE and all(isinstance(name, str) for name in names),
        "adapter": meta["adapter"] in list(ADAPTER_PART) or is_segmenter,
        "palette": whole_numbers(meta["palette"], len(names), 3) or is_segmenter,
        "file_ids": meta["file_ids"] is None or whole_numbers(meta["file_ids"], 256, low=-1),
        "void": meta["void"] is None or whole_numbers(meta["void"], None, 3),
        "hint": meta["hint"] in (None, "classes", "color", "words"),
        "hint_colors": meta["hint_colors"] in (None, "ade20k"),
        "dataset": meta["dataset"] is None or isinstance(meta["dataset"], str),
        "step": meta["step"] is None or whole_numbers(meta["step"], high=float("inf")),
        "normalize": meta["normalize"] in (None, False, True),
    }
    for key, is_valid in valid.items():
        if not is_valid:
            raise InputError(f"{path}: its metadata says {key} {meta[key]!r:.60}: not valid")
    return meta


# -- tensors -> files ------------------------------------------------------------------------------


def is_finite(t):
    """Whether a tensor is free of NaN and infinity: its sum tells in a hundredth of isfinite()'s
    time."""
    return t.is_meta or not t.is_floating_point() or bool(t.float().sum().isfinite())


def check_finite(state, what):
    """InputError with the tensor's name if one holds a NaN or an infinity."""
    for name, t in state.items():
        if not is_finite(t):
            raise InputError(f"{what}: {name} holds NaN or infinite values")


def save_tensors(path, tensors, metadata):
    """A safetensors file; the values of `metadata` as JSON. InputError, and no file, if a tensor
    holds a NaN or an infinity."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    for name, t in tensors.items():
        if not is_finite(t):
            raise InputError(f"{path}: not written: {name} is not finite in {t.dtype}")
    # default: arrays, such as palettes
    metadata = {k: json.dumps(v, default=lambda a: a.tolist()) for k, v in metadata.items()}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata)
        os.chmod(temporary, 0o644)  # safetensors makes files that only their owner can read


def initial_tokens(width):
    """The toy's token embedding [49408,width] before training; its file has the trained rows."""
    generator = torch.Generator().manual_seed(0)
    return torch.empty(VOCABULARY, width).normal_(std=0.02, generator=generator)

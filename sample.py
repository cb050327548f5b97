"""Layout + prompt -> image, data sets of such images, and how good they are.

    python sample.py --layout FILE --prompt "a street at night"     images, and a grid of them
    python sample.py --layouts val --prompts "night scene" "{caption}, in snow" --n 4 --out DIR
                                                                    a labelled data set
    python sample.py --evaluate --limit 128                         draws images and judges them
    python sample.py --evaluate FOLDER --data cityscapes --root DIR --judge FILE
                                                                    judges images already drawn
"""
import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # see train.py
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import argparse
import contextlib
import fcntl
import itertools
import json
import re
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from aldm import (ALDM, PRESETS, load_class_embeddings, load_frozen, load_into, pick_device,
                  read_adapter)
from data import (ASSETS, IGNORE, PICTURES, Classes, InputError, Layouts, class_table,
                  classes_text, colorize, compose_caption, find_images, open_dataset, read_text,
                  split_key)
from tools.command import make_folder, number, utf8, whole
from tools.files import check_target, open_image, refuse, remove_leftovers, write_png, write_text
from tools.judge import choose_judges, flat_names, judge_folder, load_picture, same_size, show
from tools.pictures import grid
from tools.run import note, run_command
from unet import OFT

ADAPTER = ASSETS / "toy_aldm.safetensors"
EDITS = ("{caption}, night scene", "{caption}, snowy scene", "{caption}, foggy scene",
         "{caption}, rainy scene")  # the authors' edited prompts


# -- the model -------------------------------------------------------------------------------------


def load_model(path=ADAPTER, sd=None, device="cpu", data=None, embeddings=None, precision=None):
    """An adapter (see aldm.read_adapter) on its frozen Stable Diffusion -> ALDM on `device`.

    sd          the base model; None: the one in the adapter's own file, or else the preset's
    data        another data set with the same classes as the one the file names
    embeddings  a file of class embeddings to use instead of the adapter's own
    precision   see uses_bf16

    The model is for sampling only: OFT's rotations are merged into the UNet. Its `source` says
    which adapter it is. Raises InputError for unusable files.
    """
    meta, parts = read_adapter(path)
    classes = adapter_classes(meta, path, data)
    device = torch.device(device)
    half = uses_bf16(precision, device)
    # OFT multiplies the UNet's weights: rotate them in fp32 and round afterwards.
    dtype = torch.bfloat16 if half and meta["adapter"] != "oft" else torch.float32
    unet, vae, text, _ = load_frozen(meta["preset"], sd, device, dtype, own=parts)
    table = parts.get("layout", {}).get("table")
    if embeddings:
        table = load_class_embeddings(embeddings, classes, text)
    model = ALDM(PRESETS[meta["preset"]], unet, vae, text, classes, meta["adapter"], meta["hint"],
                 table, meta["hint_colors"])
    embeds = model.layout.hint == "classes"
    if embeddings and not embeds:
        raise InputError(f"--class-embeddings: the adapter in {path} does not use any")
    if embeds and table is None:
        note(f"{path}: contains no class embeddings. Those of the text encoder are used, which "
             "differ from the official ones (Cityscapes: road, sidewalk, wall and sky); give the "
             "file it was trained with as --class-embeddings")
    load_into(model.adapter, parts["adapter"], path)
    model.to(device)
    if model.kind == "oft":
        OFT.merge(model.unet)
    if half:
        model.unet.bfloat16()
        model.adapter.bfloat16()
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)
    else:
        model.vae.to(memory_format=torch.channels_last)  # no gain for the UNet on a CPU
    model.source = {"adapter": str(path), "step": meta["step"]}
    return model.requires_grad_(False).eval()


def uses_bf16(precision, device):
    """--precision "bf16" or "fp32" -> bool; None: bf16 on CUDA, fp32 on a CPU."""
    if precision is None:
        return device.type == "cuda"
    return precision == "bf16"


def adapter_classes(meta, path, data=None):
    """The Classes of the adapter in `path`, from its metadata. `data` may name another data set
    with the same classes."""
    names = tuple(meta["names"] or ())
    key = data or meta["dataset"]
    if key is None:
        raise InputError(f"{path}: does not say which data set it is for; name it with --data")
    if not data and names and key not in ("toy", "cityscapes", "ade20k", "coco"):
        file_ids = meta["file_ids"] or [*range(len(names)), *[-1] * (IGNORE - len(names)), IGNORE]
        palette = np.array(meta["palette"], np.uint8)
        void = np.array(meta["void"] or [(0, 0, 0)], np.uint8)
        return Classes(key, names, palette, (None,) * len(names), np.int16(file_ids), void)
    classes = class_table(key)
    if names and classes.names != names:
        raise InputError(f"{path}: trained on the {len(names)} classes of {meta['dataset']}, not "
                         f"on the {len(classes.names)} of {key}")
    return classes


@torch.no_grad()
def generate(model, labels, prompts, seeds, negative="", steps=25, cfg=None, eta=0.0, batch=8,
             precision=None, on_step=None):
    """Sample x_0 by DDIM with guidance and decode it.

    labels [B,H,W], B prompts, B seeds -> uint8 [B,H,W,3] (numpy). Sides that are not multiples of
    `preset.multiple` pixels are padded with void, and the images are cropped back. All randomness
    of an image comes from its own seed, so it does not depend on the rest of the batch (except for
    rounding). on_step(i, x0_hat [b,C,h,w]) is called after each step of each batch of b images.
    """
    device = model.device
    preset = model.preset
    cfg = preset.guidance if cfg is None else cfg
    if eta:
        batch = 1  # stochastic steps draw from the global stream, seeded for one image
    H, W = labels.shape[1:]
    padding = (0, -W % preset.multiple, 0, -H % preset.multiple)
    labels = F.pad(labels.long(), padding, value=IGNORE)
    shape = preset.vae.z_channels, *(side // preset.vae.factor for side in labels.shape[1:])
    cuda = device.type == "cuda"
    half = uses_bf16(precision, device)
    images = []
    for i in range(0, len(labels), batch):
        label = labels[i:i + batch].to(device)
        context = model.text.encode(prompts[i:i + batch])
        uncond = model.text.encode([negative] * len(label))
        with (torch.random.fork_rng([device] if cuda else []),
              torch.autocast(device.type, torch.bfloat16, enabled=half)):
            noise = [torch.randn(shape, generator=torch.manual_seed(seed))
                     for seed in seeds[i:i + batch]]
            z = model.sample(label, context, uncond, steps, cfg, torch.stack(noise), eta, on_step)
        images.append(to_pixels(model.vae.decode(z.float())[:, :, :H, :W]))
    return np.concatenate(images)


def to_pixels(image):
    """image [B,3,H,W], about [-1,1] -> uint8 [B,H,W,3] (numpy)"""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def from_pixels(pixels, device):
    """uint8 [B,H,W,3] (numpy) -> image [B,3,H,W] in [-1,1]"""
    return torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def image_seed(seed, name):
    """The seed of the image `name` in a run with --seed `seed`, whatever batch it is in."""
    return zlib.crc32(f"{seed}/{name}".encode())


# -- pictures and files ----------------------------------------------------------------------------


def parameters_text(model, job, options):
    """How an image is made, in the form in which this field's web UIs store it in PNGs.

    job: a dict of prompt, seed and label [H,W]; options: of `generate`."""
    options = {"negative": "", "steps": 25, "cfg": None, "eta": 0.0, **options}
    cfg = model.preset.guidance if options["cfg"] is None else options["cfg"]
    height, width = job["label"].shape
    layout = zlib.crc32(job["label"].byte().numpy().tobytes())
    text = job["prompt"]
    if options["negative"]:
        text += f"\nNegative prompt: {options['negative']}"
    text += (f"\nSteps: {options['steps']}, Sampler: DDIM, CFG scale: {cfg:g}, "
             f"Seed: {job['seed']}, Size: {width}x{height}, Eta: {options['eta']:g}, "
             f"Layout hash: {layout:08x}")
    if hasattr(model, "source"):  # not while it is trained
        adapter = json.dumps(model.source["adapter"], ensure_ascii=False)
        text += f", Model: {adapter}, Model step: {model.source['step']}"
    return text


def write_image(path, image, parameters):
    """A picture, as write_png takes it -> a PNG that carries its parameters_text."""
    info = PngInfo()
    info.add_text("parameters", parameters)
    write_png(path, image, pnginfo=info)


def free_path(path, parameters):
    """`path`, or NAME-2.png, NAME-3.png, ... if a picture made otherwise already has that name."""
    free = path
    number = 1
    while free.exists() and open_image(free).info.get("parameters") != parameters:
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free


# -- one layout ------------------------------------------------------------------------------------


def resize_layout(label, preset, size):
    """label [H,W] -> [h,w] with a shorter side of `size` pixels (None: the preset's training size,
    if the label is larger; 0: unchanged)."""
    H, W = label.shape
    if size is None:
        size = min(preset.size, H, W)
    scale = size / min(H, W) if size else 1
    return resize_nearest(label, round(H * scale), round(W * scale))


def resize_nearest(label, height, width):
    """label [H,W] -> [height,width]"""
    picture = Image.fromarray(label.byte().numpy()).resize((width, height), Image.NEAREST)
    return torch.from_numpy(np.array(picture)).long()


def sampling(args):
    """The arguments of `generate` that flags set."""
    names = "negative", "steps", "cfg", "eta", "batch", "precision"
    return {name: getattr(args, name) for name in names}


def draw_images(model, folder, jobs, options, on_step=None):
    """Draw an image for each job, a dict of name, label [H,W] (all of one size), prompt and seed ->
    folder/NAME.png, and uint8 [B,H,W,3]."""
    labels = torch.stack([job["label"] for job in jobs])
    prompts = [job["prompt"] for job in jobs]
    seeds = [job["seed"] for job in jobs]
    images = generate(model, labels, prompts, seeds, **options, on_step=on_step)
    for job, image in zip(jobs, images):
        text = parameters_text(model, job, options)
        write_image(folder / f"{job['name']}.png", image, text)
    return images


def sample_layout(args, model):
    """--layout: n images of one label map, and a grid of layout and images, in --out. Pictures that
    were made otherwise keep their names."""
    layouts = Layouts(args.layout, model.classes, ids=args.ids)
    note(layouts.description)
    whole = layouts.read(layouts.names[0])
    label = resize_layout(whole, model.preset, args.size)
    if label.shape != whole.shape:
        note(f"{args.layout}: resized to {label.shape[1]} x {label.shape[0]} pixels; --size 0 "
             "keeps its size")
    out = make_folder(args.out)
    stem = Path(args.layout).stem
    options = sampling(args)
    jobs = []
    for seed in range(args.seed, args.seed + (args.n or 1)):
        job = {"label": label, "prompt": args.prompt, "seed": seed}
        path = free_path(out / f"{stem}_{seed}.png", parameters_text(model, job, options))
        jobs.append({**job, "name": path.stem})
    images = []
    with tqdm(desc="DDIM steps", total=len(jobs) * args.steps) as bar:
        for i in range(0, len(jobs), args.batch):  # written as they come
            images += [*draw_images(model, out, jobs[i:i + args.batch], options,
                                    on_step=lambda _, x0_hat: bar.update(len(x0_hat)))]
    row = [np.asarray(colorize(label, model.classes)), *images]
    titles = ["layout", *(f"seed {job['seed']}" for job in jobs)]
    text = f"{parameters_text(model, jobs[0], options)}, Images: {len(jobs)}"
    path = free_path(out / f"{stem}_{args.seed}_grid.png", text)
    write_image(path, grid([row], titles), text)
    print(f"images in {out}; {path} shows them beside their layout")


# -- a whole data set ------------------------------------------------------------------------------


def open_split(args, data, split, preset):
    """A split of a data set at the training's size -> Pairs."""
    dataset = open_dataset(data, args.root, split, args.size or preset.size,
                           grid=preset.vae.factor, captions=args.captions, ids=args.ids,
                           skip_broken=args.skip_broken)
    note(dataset.description)
    return dataset


def open_layouts(args, model):
    """--layouts: a folder, or else a split of --data -> Layouts or Pairs"""
    place = Path(args.layouts)
    if not place.is_dir():
        try:
            return open_split(args, args.data or model.classes.key, args.layouts, model.preset)
        except InputError as error:
            raise InputError(f"--layouts {place}: no such folder; as a split: {error}") from None
    out = Path(args.out).resolve()
    if out in (place.resolve(), (place / "labels").resolve()):
        raise InputError(f"--out {args.out}: contains the layouts; choose another folder")
    layouts = Layouts(place, model.classes, args.ids, args.captions, args.skip_broken)
    note(layouts.description)
    return layouts


def load_layout(layouts, i, model, size):
    """The i-th of open_layouts -> label [H,W], caption"""
    if not isinstance(layouts, Layouts):
        _, label = layouts.full(i)
        return label, layouts.caption(i, label)
    name = layouts.names[i]
    label = resize_layout(layouts.read(name), model.preset, size)
    return label, layouts.caption(name) or compose_caption(label, model.classes.names)


def check_made(out, settings):
    """InputError if `out` has images of other settings, or of something else."""
    path = out / "made.json"
    if not path.exists():
        if (out / "images").exists() or (out / "classes.txt").exists():
            raise InputError(f"{out}: contains other images; choose another --out")
        return
    try:
        made = json.loads(read_text(path))
        other = [f"{name} {made.get(name)!r}" for name in settings
                 if made.get(name) != settings[name]]
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); choose another --out") from None
    if other:
        raise InputError(f"{out}: its images were made with {', '.join(other)}; choose another "
                         "--out")


@contextlib.contextmanager
def open_output(args, model):
    """The folder --out of --layouts, which the processes of several shards share. Whoever comes
    first removes what killed processes left there."""
    out = make_folder(args.out)
    names = ("sd", "class_embeddings", "root", "ids", "layouts", "captions", "prompts", "seed",
             "size")
    settings = {**sampling(args), **model.source, "data": args.data or model.classes.key,
                **{name: getattr(args, name) for name in names}}
    del settings["batch"]
    check_made(out, settings)
    lock = os.open(out, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # another shard is at work, or there are no locks here
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for folder in (out, out / "images", out / "labels"):
                remove_leftovers(folder)
        with contextlib.suppress(OSError):  # some network file systems have no locks on folders
            fcntl.flock(lock, fcntl.LOCK_SH)
        write_text(out / "made.json", json.dumps(settings, indent=1))
        # After it: check_made takes a folder with these alone for somebody else's.
        write_text(out / "classes.txt", classes_text(model.classes))
        make_folder(out / "images")
        make_folder(out / "labels")
        yield out
    finally:
        os.close(lock)


def list_missing(args, names, out):
    """-> [(index of the layout, name of the image, template of its prompt)] still to be drawn"""
    shard, shards = args.shard
    missing = []
    for name, i in list(names.items())[shard::shards]:
        for p, template in enumerate(args.prompts or ["{caption}"]):
            for k in range(args.n or 1):
                image = f"{name}_{p}_{k}"
                if not (out / "images" / f"{image}.png").exists():
                    missing.append((i, image, template))
    return missing


def load_jobs(args, model, layouts, missing):
    """Yield the dicts that draw_pairs takes; each layout is read once."""
    for i, images in itertools.groupby(missing, key=lambda image: image[0]):
        label, caption = load_layout(layouts, i, model, args.size)
        for _, name, template in images:
            prompt, shortened = model.text.fit(template, caption)
            yield {"name": name, "label": label, "prompt": prompt, "shortened": shortened,
                   "seed": image_seed(args.seed, name)}


def draw_pairs(model, folder, jobs, options):
    """As draw_images, into a data set: labels/NAME.png, images/NAME.txt with the prompt as caption,
    images/NAME.png. The image comes last: where it exists, so do the others."""
    for job in jobs:
        write_png(folder / "labels" / f"{job['name']}.png", job["label"].byte().numpy())
        write_text(folder / "images" / f"{job['name']}.txt", job["prompt"])
    draw_images(model, folder / "images", jobs, options)


def tell_shortened(total):
    if total:
        note(f"{total} captions were shortened so that their prompts fit into 75 tokens")


def sample_dataset(args, model):
    """--layouts: n images of each layout with each prompt, as a data set for `--data OUT`: images/
    with their captions, labels/, classes.txt. Existing images are kept: repeat the command to
    continue."""
    layouts = open_layouts(args, model)
    names = flat_names(layouts.names[:args.limit])
    shortened = 0
    with open_output(args, model) as out:
        missing = list_missing(args, names, out)
        with tqdm(total=len(missing), unit="image", dynamic_ncols=True) as bar:
            for group in same_size(load_jobs(args, model, layouts, missing), args.batch):
                draw_pairs(model, out, group, sampling(args))
                shortened += sum(job["shortened"] for job in group)
                bar.update(len(group))
    tell_shortened(shortened)
    print(f"{out}: {len(missing)} new images; train on them with --data {out}")


# -- how good the images are (the second pass is tools/judge.py) -----------------------------------


def edit_in_turn(model, dataset, prompts, count):
    """Edited prompts in the form of Pairs.edits: for each picture the next of `prompts`, with its
    {caption}. What a prompt adds to the caption is its target."""
    targets = [prompt.replace("{caption}", "").strip(" ,") or prompt for prompt in prompts]
    edits = {}
    total = 0
    for i, name in enumerate(dataset.names[:count]):
        turn = i % len(prompts)
        prompt, shortened = model.text.fit(prompts[turn], load_picture(dataset, i)["caption"])
        edits[name] = [prompt, targets[turn]]
        total += shortened
    tell_shortened(total)
    return {"targets": targets, "edits": edits}


@torch.no_grad()
def draw_judged(model, dataset, folder, count, n=2, diverse=None, edits=None, seed=0, batch=8,
                **options):
    """Draw images of a data set's first `count` layouts into a folder, for judge_folder:

    images/NAME_k.png, labels/NAME_k.png   n samples of each layout, with its caption
    edited/NAME.png, edits.json            one with an edited prompt
    reconstructed/NAME.png                 the VAE's copy of the real image, an upper bound

    diverse   only the first `diverse` layouts (in whole batches) get n samples, the others one
    edits     {"targets": [...], "edits": {name: [prompt, target]}}, as Pairs.edits; None: none
    options   of `generate`: steps, cfg, ...
    """
    options["batch"] = batch
    folder = Path(folder)
    for part in ("images", "labels", "edited", "reconstructed"):
        make_folder(folder / part)
    write_text(folder / "classes.txt", classes_text(model.classes))
    names = flat_names(dataset.names[:count])
    asked = {}  # {name: [prompt, target]}
    if edits:
        asked = {name: edits["edits"][dataset.names[i]] for name, i in names.items()
                 if dataset.names[i] in edits["edits"]}
        write_text(folder / "edits.json", json.dumps({**edits, "edits": asked}, indent=1))
    bar = tqdm(names.items(), "drawing", disable=None)  # None: shown on a terminal only
    items = ({**load_picture(dataset, i), "name": name} for name, i in bar)
    drawn = 0
    for group in same_size(items, batch):
        several = n if diverse is None or drawn < diverse else 1
        drawn += len(group)
        for k in range(several):
            jobs = [{"name": f"{item['name']}_{k}", "label": item["label"],
                     "prompt": item["caption"], "seed": image_seed(seed, f"{item['name']}/{k}")}
                    for item in group]
            draw_pairs(model, folder, jobs, options)
        jobs = [{"name": item["name"], "label": item["label"], "prompt": asked[item["name"]][0],
                 "seed": image_seed(seed, f"{item['name']}/edited")}
                for item in group if item["name"] in asked]
        if jobs:
            draw_images(model, folder / "edited", jobs, options)
        real = torch.stack([item["image"] for item in group]).to(model.device)
        copies = to_pixels(model.vae.decode(model.vae.encode(real)))
        for item, copy in zip(group, copies):
            write_png(folder / "reconstructed" / f"{item['name']}.png", copy)


def draw_and_judge(args, model):
    """--evaluate: draw images of a split's layouts into --out, and judge them."""
    data = args.data or model.classes.key
    dataset = open_split(args, data, args.split, model.preset)
    judges = choose_judges(args, model.classes, model.preset)
    count = len(dataset.names[:args.limit])
    edits = dataset.edits if judges.classifier or judges.clip else None
    if args.prompts or (judges.clip and not edits):
        edits = edit_in_turn(model, dataset, args.prompts or EDITS, count)
    out = make_folder(args.out)
    if find_images(make_folder(out / "images"), PICTURES):
        raise InputError(f"--out {out}: has images already; choose another folder, or judge these "
                         f"with --evaluate {out}")
    about = {**sampling(args), "n": args.n or 2, "seed": args.seed, **model.source, "data": data,
             "split": args.split}
    draw_judged(model, dataset, out, count, about["n"], None, edits, args.seed, **sampling(args))
    report(args, out, dataset, judges, about)


def judge_only(args):
    """--evaluate FOLDER: judge the images there; --data has the real ones."""
    classes = class_table(args.evaluate)
    preset = PRESETS["toy" if split_key(args.data)[0] == "toy" else "sd15"]
    dataset = None
    if args.data:
        dataset = open_split(args, args.data, args.split, preset)
    else:
        note("without --data there are no real images; the figures that need them are left out")
    judges = choose_judges(args, classes, preset)
    about = {"folder": args.evaluate, "data": args.data, "split": args.split}
    report(args, Path(args.evaluate), dataset, judges, about)


def report(args, folder, dataset, judges, about):
    """Judge a folder: evaluation.json, and a table."""
    result = judge_folder(folder, dataset, judges, batch=args.batch)
    path = Path(args.json or folder / "evaluation.json")
    try:
        write_text(path, json.dumps({**about, **result}, indent=1))
    finally:  # the figures are shown even if the disk is full
        show(result)
    print(f"written to {path}; the images are in {folder}")


# -- the command line ------------------------------------------------------------------------------


def shard(text):
    """An argparse type: "i/n" with 0 <= i < n -> i, n"""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"must be i/n with 0 <= i < n, not {text!r}")
    return int(found[1]), int(found[2])


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = refuse
    mode = p.add_mutually_exclusive_group(required=True)
    mode.add_argument("--layout", metavar="FILE", help="a label map: PNG with ids or colours")
    mode.add_argument("--layouts", metavar="DIR|SPLIT",
                      help="make a labelled data set from a folder of layouts or a split of --data")
    mode.add_argument("--evaluate", metavar="FOLDER", nargs="?", const=True,
                      help="draw images of --split and judge them, or judge those in FOLDER")
    add = p.add_argument
    add("--prompt", type=utf8, default="", help="what --layout should show; may be empty")
    add("--negative", type=utf8, default="", help="what guidance leads away from")
    add("--prompts", type=utf8, nargs="+", help="for --layouts: one or more, {caption} is the "
        "layout's own (default: {caption}). For --evaluate: edited prompts, used in turn")
    add("--adapter", "--ckpt", default=ADAPTER, help="a file, a run's folder, or USER/REPO/FILE on "
        "the Hugging Face hub")
    add("--sd", metavar="FILE", help="Stable Diffusion 1.x (default: the one in the adapter's "
        "file, else downloaded; toy: in assets/)")
    add("--class-embeddings", metavar="FILE", help="those an official adapter was trained with")
    add("--data", help="toy (or toy:night, ...), cityscapes, ade20k, coco or a folder (default: "
        "the adapter's)")
    add("--root", metavar="DIR", help="folder of the files of --data")
    add("--ids", choices=["own", "train"], help="what the ids in layouts are: the data set's own "
        "(labelIds) or train ids (default: decided by the files)")
    add("--captions", metavar="FILE", help="JSON, {name: caption}")
    add("--skip-broken", action="store_true", help="leave out unreadable files")
    add("--split", default="val", help="for --evaluate (default: val)")
    add("--limit", type=whole(1), metavar="N", help="use only the first N layouts")
    add("--shard", type=shard, default=(0, 1), metavar="i/n", help="for --layouts in n processes: "
        "every n-th layout, from the i-th")
    add("--out", metavar="DIR", default="samples", help="folder of the images (default: samples)")
    add("--json", metavar="FILE", help="for --evaluate (default: evaluation.json with the images)")
    add("--n", type=whole(1), help="images per layout (default: 1; --evaluate: 2)")
    add("--seed", type=whole(0, 2 ** 32 - 1), default=0, help="for --layout, of the first "
        "image; otherwise mixed with each image's name (default: 0)")
    add("--steps", type=whole(1, 1000), default=25, help="of DDIM (default: 25)")
    add("--cfg", type=number(0), help="guidance scale, 1 for none (toy: 5, sd15: 7.5)")
    add("--eta", type=number(0, 1), default=0.0, help="0: deterministic, 1: as noisy as DDPM")
    add("--size", type=whole(0), help="shorter side in pixels (default: the training "
        "size, or the file's own if smaller); 0: the file's own")
    add("--batch", type=whole(1), default=8, help="images at a time (default: 8)")
    add("--precision", choices=["bf16", "fp32"], help="default: bf16 on CUDA, fp32 on a CPU")
    add("--judge", nargs="+", metavar="FILE", help="the segmenter that judges: one of "
        "tools/segmenter.py, or mit-semseg's encoder and decoder")
    add("--features", choices=["judge", "clip"], default="judge", help="for the Frechet distance")
    add("--device", help="cpu or cuda (default: cuda if available)")
    args = p.parse_args(argv)
    check_args(args)
    return args


def check_args(args):
    """What argparse cannot check, before large files are read."""
    several = args.layouts or args.evaluate
    if args.prompts and not several:
        refuse("--prompts needs --layouts or --evaluate; use --prompt for one image")
    if args.prompt and several:
        refuse("--prompt needs --layout; use --prompts for several images")
    if args.layout and Path(args.layout).is_dir():
        refuse(f"--layout {args.layout}: a folder; use --layouts for all its files")
    if args.layout and not Path(args.layout).is_file():
        refuse(f"--layout {args.layout}: no such file")
    is_split = args.evaluate or (args.layouts and not Path(args.layouts).is_dir())
    if args.size == 0 and is_split:
        refuse("--size 0: for layout files only; all images of a split have one size")
    if args.layouts and Path(args.layouts).is_file():
        refuse(f"--layouts {args.layouts}: a file; use --layout for a single one")
    if args.evaluate and args.evaluate is not True and not Path(args.evaluate, "images").is_dir():
        refuse(f"--evaluate {args.evaluate}: needs a folder with images/, labels/ and classes.txt")
    if args.json:
        check_target(args.json)


def open_model(args):
    """-> the model that flags name; sets the guidance that no flag does."""
    model = load_model(args.adapter, args.sd, args.device, args.data, args.class_embeddings,
                       args.precision)
    if args.cfg is None:
        args.cfg = model.preset.guidance
    for prompt in [args.prompt, args.negative, *(args.prompts or [])]:
        unread = model.text.cut(prompt)
        if unread:
            note(f"a prompt is longer than the 77 tokens the model reads; it ignores: {unread}")
    return model


def run():
    args = parse_args()
    args.device = pick_device(args.device)
    if args.layout:
        sample_layout(args, open_model(args))
    elif args.layouts:
        sample_dataset(args, open_model(args))
    elif args.evaluate is True:
        draw_and_judge(args, open_model(args))
    else:
        judge_only(args)


def main():
    run_command("sample.py", run)


if __name__ == "__main__":
    main()

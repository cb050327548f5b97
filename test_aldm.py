"""The tests: golden files of independent implementations, analytic cases, invariances, and the
command lines themselves.

    python -m pytest -q
"""
import os

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as the command lines do, before torch is imported

import base64
import contextlib
import copy
import csv
import dataclasses
import fcntl
import functools
import hashlib
import http.client
import io
import itertools
import json
import pickle
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import types
import weakref
import zipfile
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
from urllib.parse import urlencode

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import aldm
import data
import discriminator as disc
import sample
import train
from aldm import (ALDM, load_class_embeddings, load_frozen, load_into, load_segmenter,
                  load_weights, PRESETS, read_adapter, save_adapter, save_base, Schedule,
                  TextEncoder, unrolled_adversarial_loss)
from data import class_table, colorize, IGNORE, InputError, open_dataset, read_layout
from discriminator import discriminator_loss, UperNet
from tools import (bench, judge, make_results, make_toy, paint, pictures as charts, run as runs,
                   segmenter as plain, toy_world as toy, weight_files)
from tools.files import atomic, write_text
from tools.judge import Classifier, find_samples, JUDGE, judge_folder, Judges
from tools.paint import BODY, find_wrong, PageHandler, painter
from tools.run import Run, Stopped
from tools.toy_world import DOMAINS, toy_scene
from unet import ControlNet, OFT, Rotation, T2IAdapter, UNet, UNetConfig
from vae import ResnetBlock, VAE, VAEConfig

HERE = Path(aldm.__file__).parent
SHARED = HERE.parent / "shared"
needs_shared = pytest.mark.skipif(not (SHARED / "golden").is_dir(),
                                  reason="the folder ../shared is not there")
torch.set_num_threads(2)
# Ignored in a script's background and under nohup, and then by what the tests start, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def launch(module, *argv):
    """The command line of a module of ours, in this process -> what it prints; it must end well."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
        module.main()
    out.seek(0)
    return out.read()


def outcome(module, capsys, *argv):
    """The command line of a module of ours, in this process -> exit code, stdout, stderr."""
    code = 0
    with mock.patch.object(sys, "argv", [f"{module.__name__}.py", *map(str, argv)]):
        try:
            module.main()
        except SystemExit as stop:
            code = stop.code
    return code, *capsys.readouterr()


def refuses_with(words, call, *args, **options):
    """`call` raises InputError with all these words -> its text."""
    with pytest.raises(InputError) as caught:
        call(*args, **options)
    text = str(caught.value)
    assert all(word in text for word in words), text
    return text


def relative(a, b):
    return float(np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b))


def same(a, b):
    """Two state dicts are equal, types included."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def same_run(a, b, where=""):
    """Nested dicts and lists of tensors and plain values are equal, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, (dict, list, tuple)):
        assert len(a) == len(b), where
        for key, value in a.items() if isinstance(a, dict) else enumerate(a):
            same_run(value, b[key], f"{where}/{key}")
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, where


def toy_labels(n, first=10_000_000):
    """Labels [n,64,64] int64 of scenes of the toy world."""
    return torch.from_numpy(np.stack([toy_scene(first + i)[1] for i in range(n)])).long()


# layouts and data sets on disk


def blocks(*ids, palette=None, clear=None, kind=np.uint8):
    """A layout with one square per id, 16 pixels wide -> PIL.Image; clear: PNG's tRNS."""
    image = Image.fromarray(np.array([ids], kind).repeat(16, 0).repeat(16, 1))
    if palette is not None:
        image.putpalette(np.asarray(palette, np.uint8).ravel().tolist())
    if clear is not None:
        image.info["transparency"] = clear
    return image


def save(path, picture, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    image.save(path, **options)
    return path


def as_png(picture):
    """-> the bytes of a PNG"""
    file = io.BytesIO()
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    picture.save(file, "PNG")
    return file.getvalue()


def pictures(folder):
    return {p.name: np.asarray(Image.open(p)) for p in sorted(folder.glob("*.png"))}


def files(out):
    return sorted(p.name for p in out.iterdir()) if out.exists() else []


def write_city(root, n, split="train", domain="day"):
    """n scenes of the toy world in Cityscapes' folders, as tools/toy_world.py writes them."""
    first, _ = toy.SPLITS[split]
    toy.write_split(Path(root), split, [(first + i, domain) for i in range(n)])


def tiny_model(adapter="controlnet", hint="classes"):
    """The toy's networks with random weights."""
    torch.manual_seed(0)
    preset = PRESETS["toy"]
    text = TextEncoder(**preset.text)
    unet = UNet(preset.unet)
    return ALDM(preset, unet, VAE(preset.vae), text, class_table("toy"), adapter, hint)


ADAPTERS = [("controlnet", "classes"), ("controlnet", "color"), ("t2i", "color"),
            ("oft", "classes"), ("freestyle", "words"), ("piti", "classes")]


def adapter_meta(kind, hint="classes"):
    """What a file of ours says of an adapter of the toy."""
    classes = class_table("toy")
    return dict(preset="toy", dataset="toy", names=list(classes.names),
                palette=classes.palette.tolist(), file_ids=classes.file_ids.tolist(),
                void=classes.void.tolist(), adapter=kind, hint=hint, hint_colors=None, step=12,
                normalize=False, format="aldm-adapter")


def write_folder(root, n):
    """n scenes of the toy world as a folder of one's own, with ids 0..18."""
    for i in range(n):
        image, label, _ = toy_scene(i)
        save(Path(root) / f"images/train/{i}.png", image)
        save(Path(root) / f"labels/train/{i}.png", label)
    (Path(root) / "classes.txt").write_text(data.classes_text(class_table("cityscapes")))


@pytest.fixture(scope="session")
def toy_world(tmp_path_factory):
    """A folder: toy.safetensors, a base model of random weights; day, eight toy scenes in
    Cityscapes' folders, and as many to validate. As --root it is a small toy world."""
    folder, preset = tmp_path_factory.mktemp("world"), PRESETS["toy"]
    torch.manual_seed(0)
    save_base(folder / "toy.safetensors", dict(
        unet=UNet(preset.unet), vae=VAE(preset.vae), text=TextEncoder(**preset.text),
        judge=UperNet(19, **JUDGE), segmenter=UperNet(19, **preset.segmenter),
        domain=Classifier(5)), token_ids=range(200))
    write_city(folder / "day", 8)
    write_city(folder / "day", 8, "val")
    return folder


@pytest.fixture(scope="session")
def flags(toy_world):
    """Flags of a training that takes seconds."""
    return [str(f) for f in (
        "--data", "cityscapes", "--root", toy_world / "day", "--preset", "toy",
        "--sd", toy_world / "toy.safetensors", "--device", "cpu", "--batch", 2, "--steps", 8,
        "--ddim-steps", 2, "--unroll", 1, "--ramp", "1:3", "--lazy", 1, "--d-start", 1,
        "--lambda-adv", 1, "--lr", 1e-3, "--save-every", 2, "--sample-every", 3, "--eval", 0)]


# -- golden files ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    """Outputs of independent implementations, and the inputs and weights that belong to them."""
    if not (SHARED / "golden").is_dir():
        pytest.skip("the folder ../shared is not there")
    sys.path.insert(0, str(SHARED / "golden"))
    import fill
    outputs = np.load(SHARED / "golden" / "small.npz")

    def draw(name, shape):
        return torch.from_numpy(fill.draw("input/" + name, shape))

    def agrees(name, found):
        return relative(found, outputs[name]) < 1e-4
    return SimpleNamespace(outputs=outputs, fill=fill.fill_, draw=draw, agrees=agrees)


def filled(module, golden, prefix):
    golden.fill({prefix + name: t for name, t in module.state_dict().items()})
    return module.eval()


SMALL = UNetConfig(model_channels=32, context_dim=64)


@torch.no_grad()
def test_golden_unet(golden):
    x = golden.draw("unet.x", (3, 4, 16, 24))
    context = golden.draw("unet.context", (3, 77, 64))
    t = torch.tensor([1, 481, 961])
    unet = filled(UNet(SMALL), golden, "model.diffusion_model.")
    control = filled(ControlNet(SMALL, 64, (64, 48, 32)), golden, "control_model.")
    residuals = control(x, t, context, golden.draw("control.hint", (3, 64, 32, 48)))
    assert golden.agrees("unet.eps", unet(x, t, context))
    assert len(residuals) == 13
    for i, residual in enumerate(residuals):
        assert golden.agrees(f"control.{i}", residual)
    assert golden.agrees("control.eps", unet(x, t, context, residuals))
    drawn = [0.3 * golden.draw(f"unet.control{i}", r.shape) for i, r in enumerate(residuals)]
    assert golden.agrees("unet.eps_with_control", unet(x, t, context, drawn))


@torch.no_grad()
def test_golden_vae(golden):
    vae = filled(VAE(VAEConfig(ch=32)), golden, "first_stage_model.")
    image = golden.draw("vae.image", (2, 3, 64, 96)).clamp(-1, 1)
    mean, logvar = vae.moments(image)
    assert golden.agrees("vae.mean", mean)
    assert golden.agrees("vae.logvar", logvar)
    assert golden.agrees("vae.decoded", vae.decode(golden.draw("vae.z", (2, 4, 8, 12))))
    assert torch.equal(vae.encode(image), mean * 0.18215)


@torch.no_grad()
def test_golden_text(golden):
    """From Hugging Face's tensors; the ids are CLIP's, padded with END as SD pads them."""
    names = json.loads((SHARED / "sd15_format.json").read_text())["text_small"]
    state = golden.fill({name: torch.zeros(shape) for name, shape in names.items()})
    text = TextEncoder(64, 2, 4)
    text.load_state_dict(weight_files.split_parts("text_small", state)["text"])
    ids = torch.from_numpy(golden.outputs["text.ids"])
    hidden = golden.outputs["text.hidden"]
    assert golden.agrees("text.hidden", text(ids))
    assert torch.equal(text.tokenize([""])[0], ids[0])
    end = (ids == TextEncoder.END).int().argmax(1)
    assert relative(text.pooled(ids), hidden[np.arange(len(ids)), end]) < 1e-4


@torch.no_grad()
def test_golden_segmenter(golden):
    segmenter = filled(UperNet(20, layers=(1, 1, 2, 1)), golden, "segmenter.segmenter.")
    image = golden.draw("seg.image", (2, 3, 64, 96)).clamp(-1, 1)
    assert golden.agrees("seg.logits", segmenter(image))


def test_golden_ddim(golden):
    schedule = Schedule()
    x = golden.draw("ddim.x", (1, 4, 8, 8))
    eps = golden.draw("ddim.eps", (1, 4, 8, 8))
    assert golden.agrees("ddim.alphas_cumprod", schedule.alphas_cumprod)
    timesteps = schedule.ddim_timesteps(25).tolist()
    assert timesteps == golden.outputs["ddim.timesteps"].tolist()[::-1]
    for t, previous in (961, 921), (481, 441), (1, -1):
        assert golden.agrees(f"ddim.x0.{t}", schedule.predict_x0(x, t, eps))
        assert golden.agrees(f"ddim.prev.{t}", schedule.ddim_step(x, eps, t, previous))


# -- diffusion -------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 7, 25, 30, 999, 1000])
def test_ddim_with_the_true_eps_returns_x0(steps):
    schedule, x0, noise = Schedule(), torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    timesteps = schedule.ddim_timesteps(steps)
    assert len(timesteps) == steps
    assert timesteps[0] == (steps < 1000) and timesteps[-1] <= 999
    assert (timesteps.diff() > 0).all()
    chain = [*timesteps.tolist()[::-1], -1]
    x = schedule.add_noise(x0, torch.tensor([chain[0]] * 2), noise)
    for t, previous in zip(chain, chain[1:]):
        a = schedule.a(t)
        eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
        assert torch.allclose(schedule.predict_x0(x, t, eps), x0, atol=1e-4)
        x = schedule.ddim_step(x, eps, t, previous)
    a0 = schedule.alphas_cumprod[0]  # where the chain ends: not at 1
    assert torch.allclose(x, a0.sqrt() * x0 + (1 - a0).sqrt() * noise, atol=1e-4)


def test_ddim_with_noise_has_the_right_variance():
    """eta = 1: from x_t ~ q(x_t | x0) a step leads to q(x_s | x0), whose variance is 1 - a_s."""
    torch.manual_seed(0)
    schedule, noise = Schedule(), torch.randn(200, 4, 16, 16)
    x_t = schedule.add_noise(torch.zeros_like(noise), torch.tensor(800), noise)
    x = schedule.ddim_step(x_t, noise, 800, 400, eta=1.0)
    assert abs(x.var().item() / (1 - schedule.alphas_cumprod[400].item()) - 1) < 0.02


# -- losses ----------------------------------------------------------------------------------------


def random_case(void=0.2, C=5):
    """Logits of real and fake images, and a layout in which class 1 is absent; 4 is "fake"."""
    rng = np.random.default_rng(0)
    label = rng.choice([0, 0, 0, 2, 3], size=(2, 6, 7))
    label[rng.random(label.shape) < void] = 255
    real, fake = 3 * rng.standard_normal((2, 2, C, 6, 7))
    return torch.from_numpy(real), torch.from_numpy(fake), torch.from_numpy(label)


def test_losses_by_hand():
    """gamma_c = n_valid / (count_c * n_present * C): the mean is 1/C of that over the classes."""
    real, fake, y = random_case()
    log_p, log_p_fake = (z - z.logsumexp(1, keepdim=True) for z in (real, fake))
    want = torch.zeros(y.shape, dtype=torch.float64)
    n_valid = (y != 255).sum()
    per_class = []
    for c in (0, 2, 3):
        here = y == c
        want[here] = -log_p[:, c][here] * n_valid / (here.sum() * 3 * 5)
        per_class.append(-log_p[:, c][here].mean().item())
    loss_map = disc.layout_loss_map(real, y)
    assert np.allclose(loss_map, want, rtol=1e-5)
    assert (disc.class_balance(y, 5)[y == 255] == 0).all()
    assert torch.equal(disc.layout_loss_map(real, y, disc.class_balance(y, 5)), loss_map)
    assert np.isclose(disc.per_valid_pixel(loss_map, y), np.mean(per_class) / 5, rtol=1e-5)
    loss, parts = discriminator_loss(real, fake, y, 0.25)
    want_fake = -log_p_fake[:, 4].mean()  # every pixel, void or not, should be class N
    assert np.isclose(parts["real"], want.sum() / n_valid, rtol=1e-5)
    assert np.isclose(parts["fake"], want_fake, rtol=1e-5)
    assert np.isclose(loss, parts["real"] + 0.25 * want_fake, rtol=1e-5)


def test_a_layout_that_is_all_void_gives_neither_loss_nor_gradient():
    real, fake, y = random_case()
    real.requires_grad_()
    loss, _ = discriminator_loss(real, fake, torch.full_like(y, 255), 0.0)
    loss.backward()
    assert loss == 0 and (real.grad == 0).all()


def test_mean_iou_by_hand():
    label = torch.tensor([0, 0, 0, 1, 1, 255])
    pred = torch.tensor([0, 0, 1, 1, 0, 1])
    confusion = disc.confusion_matrix(pred, label, 3)
    assert confusion.tolist() == [[2, 1, 0], [1, 1, 0], [0, 0, 0]]
    miou, iou = disc.mean_iou(confusion)
    assert np.isclose(miou, (2 / 4 + 1 / 3) / 2) and torch.isnan(iou[2])


def test_windows_cover_the_whole_image():
    """The logits of a net that looks at each pixel alone do not depend on the windows."""
    image = torch.randn(1, 3, 40, 100)
    for size in (16, 40, 64, 100):
        logits = plain.segment(lambda x: x * 2 + 1, image, size)
        assert torch.allclose(logits, image * 2 + 1, atol=1e-6)
    seen = []
    plain.segment(lambda x: seen.append(x.shape[2:]) or x, image, 32)
    assert set(seen) == {(32, 32)} and len(seen) == 2 * 6


# -- the unrolled objective (Sec. 3.2) -------------------------------------------------------------


class OneParameter(nn.Module):
    """eps_theta = theta x_t; the "decoder" passes three channels on."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.schedule = Schedule().double()
        self.vae = SimpleNamespace(decode=lambda z: F.interpolate(z[:, :3], scale_factor=2.0))

    def eps(self, x_t, t, context, layout):
        return self.theta * x_t


def colour_judge(image):
    """Logits linear in the pixel's colour."""
    w = torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3)
    return torch.einsum("nc,bchw->bnhw", w, image.double())


@pytest.fixture
def chain():
    """A start of chains of the one-parameter model, and a layout with void."""
    torch.manual_seed(0)
    model = OneParameter()
    label = random_case(void=0.3)[2][:, :6, :6]
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64) * 0.1

    def loss_of(K, mode, judged=None):
        """-> L_adv, its gradient, the images that D saw"""
        timesteps = model.schedule.ddim_timesteps(25)
        start = torch.tensor([5, 9])
        loss, images = unrolled_adversarial_loss(
            model, colour_judge, x, model.theta * x, start, timesteps, label, None, None, K, mode,
            judged)
        return loss.detach(), torch.autograd.grad(loss, model.theta)[0], images
    return SimpleNamespace(model=model, label=label, x=x, loss_of=loss_of)


def chain_by_hand(chain, K, mode):
    """-> images and loss maps of the K+1 estimates, each with the gradient that it may carry."""
    s, theta, x = chain.model.schedule, chain.model.theta, chain.x
    timesteps, start = s.ddim_timesteps(25), torch.tensor([5, 9])
    images, maps = [], []
    for k in range(K + 1):
        a = s.alphas_cumprod[timesteps[start - k]].view(-1, 1, 1, 1)
        a_prev = s.alphas_cumprod[timesteps[start - k - 1]].view(-1, 1, 1, 1)
        eps = x * (theta.detach() if mode == "first" and k > 0 else theta)
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        images.append(chain.model.vae.decode(x0).clamp(-1, 1))
        maps.append(disc.layout_loss_map(colour_judge(images[-1]), chain.label))
        x = a_prev.sqrt() * x0 + (1 - a_prev).sqrt() * eps
        x = x if mode == "full" else x.detach()
    return images, maps


@pytest.mark.parametrize("K", [0, 2, 4])
@pytest.mark.parametrize("mode", ["first", "each", "full"])
def test_gradient_modes_do_what_they_say(mode, K, chain):
    """All agree in value. `first` is the official L_0 / stop(L_0) * mean_k L_k, whose mean keeps
    L_0's graph. Void pixels count nowhere."""
    loss, gradient, seen = chain.loss_of(K, mode)
    images, maps = chain_by_hand(chain, K, mode)
    valid, mean = chain.label != 255, torch.stack(maps).mean(0)
    assert torch.isclose(loss, mean.sum() / valid.sum(), rtol=1e-6)
    if mode == "first":
        mean = (mean / maps[0] + 1 / (K + 1)).detach() * maps[0]
    want = torch.autograd.grad(mean[valid].sum() / valid.sum(), chain.model.theta)[0]
    assert torch.isclose(gradient, want, rtol=1e-4) and want.abs() > 1e-3
    assert list(seen) == list(range(K + 1))
    for image, found in zip(images, seen.values()):
        assert torch.allclose(image.float(), found, atol=1e-6) and not found.requires_grad


def test_first_leaves_pixels_alone_of_which_the_discriminator_is_certain(chain, monkeypatch):
    """There L_0 is 0 to the last bit of fp32, but not its gradient; the other estimates have a
    loss. The value stays the mean."""
    right = F.one_hot(chain.label.where(chain.label != 255, 0), 5).permute(0, 3, 1, 2)
    certain = iter([30, 0])
    monkeypatch.setitem(globals(), "colour_judge",
                        lambda image, judge=colour_judge: judge(image) + next(certain) * right)
    loss, gradient, _ = chain.loss_of(1, "first")
    monkeypatch.undo()
    _, (_, second) = chain_by_hand(chain, 1, "first")
    assert torch.isclose(loss, second.sum() / 2 / (chain.label != 255).sum(), rtol=1e-6)
    assert gradient.abs() < 1e-9 * loss


@pytest.mark.parametrize("M", [1, 2, 3])
@pytest.mark.parametrize("mode", ["first", "each", "full"])
def test_judging_some_estimates_is_unbiased(mode, M, chain):
    """The mean over all choices of M of K = 3 estimates is the loss of all, and its gradient."""
    whole, gradient, _ = chain.loss_of(3, mode)
    choices = list(itertools.combinations((1, 2, 3), M))
    found = [chain.loss_of(3, mode, judged) for judged in choices]
    assert torch.isclose(torch.stack([loss for loss, *_ in found]).mean(), whole, rtol=1e-6)
    mean_gradient = torch.stack([grad for _, grad, _ in found]).mean()
    assert torch.isclose(mean_gradient, gradient, rtol=1e-5)
    for judged, (_, grad, images) in zip(choices, found):
        assert sorted(images) == [0, *judged]
        single = [chain.loss_of(3, mode, [k])[1] for k in judged]  # linear: see make_results.py
        assert torch.isclose(torch.stack(single).mean(), grad, rtol=1e-5)
    if M == 3:  # all of them: bit for bit
        assert found[0][0] == whole and found[0][1] == gradient


# -- the toy's networks with random weights --------------------------------------------------------


@pytest.fixture(scope="module")
def scene():
    torch.manual_seed(1)
    return SimpleNamespace(label=toy_labels(2, first=0), x=torch.randn(2, 16, 16, 16),
                           t=torch.tensor([1, 700]), words=["a street", "at night"])


@pytest.mark.parametrize("adapter, hint", ADAPTERS)
def test_gradient_reaches_the_adapter_and_nothing_else(adapter, hint, scene):
    model = tiny_model(adapter, hint)
    trained = {id(p) for p in model.adapter.parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt = torch.optim.AdamW([p for p in model.adapter.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # zero convolutions: what lies behind them moves in the second step
        eps = model.eps(scene.x, scene.t, scene.words, scene.label)
        F.mse_loss(eps, scene.x * 0.5).backward()
        assert all(p.requires_grad or p.grad is None for p in model.parameters())
        opt.step()
        opt.zero_grad()
    mine = {name for name, p in model.named_parameters() if id(p) in trained}
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    silent = {name for name in mine - changed if ".norm" not in name}
    assert changed <= mine and len(silent) <= 0.02 * len(mine), silent


@pytest.mark.parametrize("adapter, hint", ADAPTERS[:4])
def test_an_adapter_of_a_frozen_unet_starts_as_an_identity(adapter, hint, scene):
    model, base = tiny_model(adapter, hint), tiny_model("controlnet").unet
    eps = model.eps(scene.x, scene.t, scene.words, scene.label)
    want = base(scene.x, scene.t, model.text.encode(scene.words))
    assert eps.requires_grad and torch.allclose(eps, want, atol=1e-5)


def test_a_controlnet_has_its_gradient_through_the_decoder_half_alone(scene):
    model = tiny_model("controlnet")
    has_graph = []
    for block in [*model.unet.input_blocks, model.unet.middle_block]:
        block.register_forward_hook(lambda block, x, h: has_graph.append(h.requires_grad))
    assert model.eps(scene.x, scene.t, scene.words, scene.label).requires_grad
    assert len(has_graph) > 5 and not any(has_graph)


def test_rotations_are_orthogonal_and_merge(scene):
    model = tiny_model("oft")
    with torch.no_grad():
        for p in model.adapter.parameters():
            p.add_(torch.randn_like(p) * 0.3)
        for p in model.adapter.rotations.values():
            R = Rotation(p.double()).matrix()
            eye = torch.eye(R.shape[-1]).double().expand_as(R)
            assert torch.allclose(R @ R.mT, eye, atol=1e-10)
        before = model.eps(scene.x, scene.t, scene.words, scene.label)
        OFT.merge(model.unet)
        after = model.eps(scene.x, scene.t, scene.words, scene.label)
    assert torch.allclose(after, before, atol=1e-4)


@pytest.fixture
def freestyle():
    """FreestyleNet, and a layout of a car (13) above a road (0) above void."""
    label = torch.full((1, 64, 64), 13)
    label[:, 28:] = 0
    label[:, 60:] = 255
    return SimpleNamespace(model=tiny_model("freestyle"), label=label,
                           x=torch.randn(1, 16, 16, 16), t=torch.tensor([500]))


def test_freestylenet_opens_a_classs_words_to_its_pixels_and_the_prompt_to_all(freestyle):
    model, label = freestyle.model, freestyle.label
    words, mask = model.encode_layout(label)
    listed = model.text(model.text.tokenize(["road,car,"]))  # in the order of their ids
    assert torch.allclose(words, listed, atol=1e-5)
    shut = [(~mask[0, :, row, 0]).nonzero()[:, 0].tolist() for row in (0, 10, 15)]
    assert shut == [[1, 2], [3, 4], [1, 2, 3, 4]] and mask.shape == (1, 77, 16, 16)
    given = model.adapter.condition(None, None, torch.zeros(1, 77, 96), (words, mask))
    assert given["context"].shape == (1, 154, 96) and given["mask"][:, 77:].all()


def test_rectified_attention_at_lower_resolutions_takes_the_top_left_pixel(freestyle):
    model, masks = freestyle.model, []
    attention = model.unet.input_blocks[4][1].transformer_blocks[0].attn2
    attention.register_forward_pre_hook(lambda module, inputs: masks.append(inputs[2]))
    layout = model.encode_layout(freestyle.label)
    model.eps(freestyle.x, freestyle.t, [""], layout)  # 8 x 8 pixels there
    want = layout[1][0, :, ::2, ::2].flatten(1).T
    assert torch.equal(masks[0][0, 0, :, :77], want)


def test_piti_ignores_the_prompt_and_obeys_the_layout(scene):
    model = tiny_model("piti")
    for p in model.adapter.input_hint_block.parameters():
        nn.init.normal_(p, std=0.1)
    tokens = model.encode_layout(scene.label)
    assert tokens.shape == (2, 77, 96)
    day, night = (model.eps(scene.x, scene.t, [word] * 2, scene.label) for word in "ab")
    other = model.eps(scene.x, scene.t, ["a"] * 2, scene.label.flip(0))
    assert torch.equal(day, night) and not torch.allclose(day, other, atol=1e-4)


def test_class_embeddings_are_of_photos_and_whitening_puts_them_equally_far_apart():
    text = TextEncoder(32, 1, 2)
    table = text.class_embeddings(["car", "traffic sign"])
    photos = text.tokenize(["A photo of car", "A photo of traffic sign", ""])
    assert torch.allclose(table, text.pooled(photos), atol=1e-6)
    white = aldm.whiten(5 + torch.randn(20, 96) / 100)
    assert torch.allclose(torch.pdist(white), torch.tensor((2 * 96) ** 0.5), atol=1e-3)
    assert white.mean(0).abs().max() < 1e-4


def test_colours_of_a_hint():
    city, ade = class_table("cityscapes"), class_table("ade20k")
    own, of_ade = aldm.hint_palette(city, None), aldm.hint_palette(city, "ade20k")
    assert own[13].mul(255).tolist() == pytest.approx([0, 0, 142])
    assert own[19].tolist() == [0, 0, 0]
    car = ade.palette[ade.names.index("car")].tolist()
    assert of_ade[13].mul(255).tolist() == pytest.approx(car)
    assert of_ade.shape == (20, 3) and of_ade[19].tolist() == [0, 0, 0]
    published = torch.tensor(ade.palette).float()
    assert torch.equal(aldm.hint_palette(ade, "ade20k")[:150] * 255, published)


@pytest.mark.parametrize("average", [False, True])
def test_the_folded_hint_is_the_map_of_class_embeddings(average, scene):
    """Embeddings looked up pixel by pixel, then subsampled or averaged, through the hint block's
    plain convolutions = the one-hot layout through the folded ones."""
    model = tiny_model()
    model.layout.average = average
    nn.init.normal_(model.adapter.input_hint_block[-1].weight)
    label = scene.label.where(scene.label != 255, 19)
    embeddings = model.layout.table[label].permute(0, 3, 1, 2)  # (2, 96, 64, 64)
    hint = F.avg_pool2d(embeddings, 2) if average else embeddings[:, :, ::2, ::2]
    assert torch.allclose(aldm.class_hint(label, model.layout.table, 2, average), hint)
    want = model.adapter.encode(hint)
    assert torch.allclose(model.encode_layout(scene.label), want, atol=1e-4)


def test_tokens_and_what_is_cut():
    text = TextEncoder(32, 1, 2)
    assert text.tokenize(["a street!"])[0, :5].tolist() == [49406, 320, 2012, 256, 49407]
    long = " ".join(["car"] * 80)
    assert text.tokenize([long])[0, -1] == 49407
    assert text.cut(long).split() == ["car"] * 5 and text.cut("a car") == ""
    assert aldm.tokens_of("x" * 60_000 + " car") == aldm.tokens_of("x" * 300 + " car")  # not 31 s


@torch.no_grad()
def test_guidance_is_one_batch_of_two(scene):
    model = tiny_model()
    noise, label = scene.x[:1], scene.label[:1]
    context, uncond = model.text.encode(["night"]), model.text.encode([""])
    x, layout = noise, model.encode_layout(label)
    for t, previous in ((501, 1), (1, -1)):
        e = [model.eps(x, torch.tensor([t]), c, layout) for c in (uncond, context)]
        x = model.schedule.ddim_step(x, e[0] + 3.0 * (e[1] - e[0]), t, previous)
    found = model.sample(label, context, uncond, steps=2, guidance=3.0, noise=noise)
    assert torch.allclose(found, x, atol=1e-4)


# -- weight files ----------------------------------------------------------------------------------


TINY = dataclasses.replace(
    PRESETS["sd15"],
    unet=UNetConfig(model_channels=16, num_heads=4, context_dim=64, groups=16),
    vae=VAEConfig(ch=16, groups=16),
    text=dict(width=64, layers=2, heads=4),
    segmenter=dict(layers=(1, 1, 2, 1), width=8, fpn_dim=16, ppm_dim=8),
    hint_widths=(64, 48, 32))
SD_PREFIX = {"unet": "model.diffusion_model.", "vae": "first_stage_model.",
             "text": "cond_stage_model.transformer.text_model.", "control": "control_model."}
WEIGHT, BIAS = aldm.LAST
ZEROS = torch.zeros(2, 2)


@functools.cache
def shared_names(file):
    """One of the lists of names and shapes beside the project."""
    if not SHARED.exists():
        pytest.skip("the folder ../shared is not there")
    return json.loads((SHARED / file).read_text())


def random_state(module):
    """A module's state dict with random values; its counters are 7."""
    return {name: 0.1 * torch.randn(t.shape) if t.is_floating_point() else torch.tensor(7)
            for name, t in module.state_dict().items()}


def tiny_segmenter(outputs):
    return UperNet(outputs, **TINY.segmenter)


def prefixed(prefix, tensors):
    return {prefix + name: t for name, t in tensors.items()}


def stripped(tensors, prefix):
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


@functools.cache
def tiny_sd(dtype=torch.float32):
    """Stable Diffusion's tensors in the tiny preset; the text encoder's under Hugging Face's names,
    as in the real files."""
    names = shared_names("sd15_format.json")["text_small"]
    tensors = {name: 0.1 * torch.randn(shape) for name, shape in names.items()}
    tensors |= prefixed(SD_PREFIX["unet"], random_state(UNet(TINY.unet)))
    tensors |= prefixed(SD_PREFIX["vae"], random_state(VAE(TINY.vae)))
    return {name: t.to(dtype) for name, t in tensors.items()}


def write_weights(content, path, zipped=True):
    """Write weights in the format that the path's suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({name: t.clone() for name, t in content.items()}, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.fixture
def tiny_preset(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)


def refuses(call, *words):
    """`call` raises InputError with these words, in one line."""
    assert "\n" not in refuses_with(words, call)


@functools.cache
def tiny_text():
    return TextEncoder(**TINY.text)


def readers(path):
    """Every function that reads a file of weights, as a call."""
    toy = class_table("toy")
    return [lambda: load_weights(path), lambda: read_adapter(path),
            lambda: load_frozen("tiny", path),
            lambda: load_class_embeddings(path, toy, tiny_text()),
            lambda: load_segmenter([path], tiny_segmenter(20), toy)]


# the published forms: names and shapes of real files


@pytest.mark.parametrize("differs, outputs, dataset", [
    (None, 20, "cityscapes"), ("aldm_ade20k_differs", 151, "ade20k"),
    ("aldm_coco_stuff_differs", 172, "coco")])
def test_official_aldm_checkpoints_at_full_size(monkeypatch, differs, outputs, dataset):
    formats = shared_names("real_formats.json")
    names = formats["aldm_cityscapes"] | formats.get(differs, {})
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in names.items()}
        nets = dict(unet=UNet(), vae=VAE(), text=TextEncoder(), control=ControlNet())
        discriminator = UperNet(outputs)
    monkeypatch.setattr(weight_files, "read_file", lambda path: ({"state_dict": state}, {}))
    meta, parts = read_adapter("a.ckpt")
    assert (meta["adapter"], meta["hint"], meta["dataset"]) == ("controlnet", "classes", dataset)
    for part, net in nets.items():
        load_into(net, parts[part], part)
    load_segmenter(parts["segmenter"], discriminator, class_table(dataset), meta)
    assert discriminator.normalize == (outputs != 20)


def test_mit_semseg_at_full_size(monkeypatch):
    """The files of 2018 lack num_batches_tracked and hold the synchronised batch norm's keys."""
    formats = shared_names("real_formats.json")
    with torch.device("meta"):
        files = {part: {name: torch.empty(shape)
                        for name, shape in formats[f"mit_semseg_{part}"].items()
                        if "num_batches_tracked" not in name}
                 for part in ("encoder", "decoder")}
        judge = UperNet(150)
    assert any("_tmp_running_mean" in name for name in files["encoder"])
    monkeypatch.setattr(weight_files, "read_file", lambda path: (files[str(path)], {}))
    load_segmenter(["encoder", "decoder"], judge, class_table("ade20k"))
    assert judge.normalize


def test_t2i_adapter_at_full_size():
    names = shared_names("real_formats.json")["t2i_adapter"]
    with torch.device("meta"):
        tensors = {name: torch.empty(shape) for name, shape in names.items()}
        adapter = T2IAdapter()
    load_into(adapter, weight_files.split_parts("a.pth", tensors)["adapter"], "a.pth")


@pytest.mark.parametrize("part, key", [
    ("unet", "unet"), ("vae", "vae"), ("control", "controlnet")])
def test_every_name_of_diffusers(part, key):
    """Each tensor of the whole table holds its number: it arrives under our name, in our shape."""
    names = shared_names("diffusers_names.json")[key]
    tensors = {name: torch.tensor(float(i)).expand(shape)
               for i, (name, (_, shape)) in enumerate(names.items())}
    parts = weight_files.split_parts("file", tensors)
    with torch.device("meta"):
        nets = {"unet": UNet(), "vae": VAE(), "control": ControlNet(hint_channels=3)}
    assert list(parts) == [part]
    wanted = {name: t.shape for name, t in nets[part].state_dict().items()}
    assert {name: t.shape for name, t in parts[part].items()} == wanted
    for i, (ours, _) in enumerate(names.values()):
        assert parts[part][ours].flatten()[0] == i, ours


# the same forms in the tiny preset, on disk


def lightning_checkpoint(state):
    """A whole checkpoint of a training framework, from torch 1.x: its scheduler pickles a bound
    method, hence itself and its optimiser."""
    p = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([p], 1e-6)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-6, total_steps=10)
    kept = {k: v for k, v in vars(scheduler).items() if k != "optimizer" and not callable(v)}
    kept["anneal_func"] = scheduler.get_lr
    vars(optimizer).pop("step", None)
    return {"epoch": 9, "step": np.float64(3), "pytorch-lightning_version": "1.4.2",
            "state_dict": state, "optimizer_states": [optimizer.state_dict()],
            "lr_schedulers": [kept], "names": {"a set"}, "shape": torch.Size([2, 3]),
            "dtype": torch.float16, "path": Path("x"), "defaults": defaultdict(list, a=[1])}


@pytest.mark.parametrize("kind, dtype", [
    ("safetensors", torch.float16), ("zip", torch.float16), ("legacy", torch.float32)])
def test_sd_single_file(tmp_path, tiny_preset, kind, dtype):
    """The format is told by the content, not the name. What training leaves in the file is skipped,
    even a class of a package that is not installed."""
    tensors, path = tiny_sd(dtype), tmp_path / "sd.ckpt"
    if kind == "safetensors":
        save_file(tensors, path, {"format": "pt"})
    else:
        skipped = ("model_ema.diffusion_modelout2bias", "betas", "logvar",
                   "first_stage_model.loss.logvar", SD_PREFIX["text"] + "embeddings.position_ids",
                   "cond_stage_model.transformer.text_projection.weight")
        content = lightning_checkpoint(tensors | dict.fromkeys(skipped, ZEROS))
        package = "pytorch_lightning.callbacks.model_checkpoint"
        Callback = type("ModelCheckpoint", (), {"__module__": package})
        content["callbacks"] = {Callback: {"best_model_path": "x"}, "object": Callback()}
        modules = {"pytorch_lightning": types.ModuleType("pytorch_lightning"),
                   package: SimpleNamespace(ModelCheckpoint=Callback)}
        with mock.patch.dict(sys.modules, modules):
            write_weights(content, path, zipped=kind == "zip")
    parts = load_weights(path)
    assert set(parts) == {"unet", "vae", "text"}
    assert "pytorch_lightning" not in sys.modules
    unet, vae, text, rest = load_frozen("tiny", path, "cpu", dtype)
    assert rest == {}
    assert same(unet.state_dict(), stripped(tensors, SD_PREFIX["unet"]))
    wanted = {n: t.float() for n, t in stripped(tensors, SD_PREFIX["vae"]).items()}
    assert same(vae.state_dict(), wanted)
    assert same(text.state_dict(), {n: t.float() for n, t in parts["text"].items()})
    assert torch.equal(text.attn_mask, tiny_text().attn_mask)


@pytest.mark.parametrize("name, kind, hint, colors, bare", [
    ("c.safetensors", "controlnet", "classes", None, True),
    ("c.pth", "controlnet", "classes", None, False),
    ("c.ckpt", "controlnet", "color", "ade20k", False),
    ("c/diffusion_pytorch_model.bin", "controlnet", "color", "ade20k", True),
    ("t2iadapter_seg_sd14v1.pth", "t2i", "color", None, True)])
def test_adapters_of_others(tmp_path, name, kind, hint, colors, bare):
    """ControlNets and T2I-Adapters: their tensors tell which hint they take."""
    if kind == "t2i":
        state = random_state(T2IAdapter(TINY.unet))
    elif hint == "color":
        state = random_state(ControlNet(TINY.unet, 3))
    else:
        state = random_state(ControlNet(TINY.unet, 64, TINY.hint_widths))
    content = state if bare else prefixed("control_model.", state)
    if name == "c.ckpt":  # with a base model
        content = tiny_sd() | content
    if "diffusion" in name:
        content = to_diffusers("controlnet", state)
    path = write_weights(content, tmp_path / name)
    meta, parts = read_adapter(path.parent if "diffusion" in name else path)
    assert same(parts["adapter"], state)
    assert "layout" not in parts
    assert [meta[key] for key in ("adapter", "hint", "hint_colors")] == [kind, hint, colors]
    assert meta["dataset"] is meta["step"] is meta["names"] is None


def test_t2i_adapters_of_diffusers():
    """body.{2 i + j} is diffusers' body.{i}.resnets.{j}; a level's first block has in_conv."""
    theirs = ["conv_in.bias", "body.1.in_conv.bias", "body.2.in_conv.bias", "body.3.in_conv.bias",
              "body.1.resnets.0.block1.bias", "body.3.resnets.1.block2.bias"]
    names = prefixed("adapter.", dict.fromkeys(theirs))
    parts = weight_files.split_parts("a", dict.fromkeys(names, ZEROS))
    assert list(parts["adapter"]) == ["conv_in.bias", "body.2.in_conv.bias", "body.4.in_conv.bias",
                                      "body.6.in_conv.bias", "body.2.block1.bias",
                                      "body.7.block2.bias"]


def test_official_aldm_checkpoint_is_all_that_one_needs(tmp_path, tiny_preset):
    classes, segmenter = class_table("ade20k"), random_state(tiny_segmenter(151))
    control = random_state(ControlNet(TINY.unet, 64, TINY.hint_widths))
    tensors = tiny_sd() | prefixed("control_model.", control)
    tensors |= prefixed("segmenter.segmenter.", segmenter)
    path = write_weights(lightning_checkpoint(tensors), tmp_path / "a.ckpt")
    meta, parts = read_adapter(path)
    assert set(parts) == {"unet", "vae", "text", "control", "segmenter", "adapter"}
    assert same(parts["control"], control)
    assert meta["names"] == list(classes.names)
    judge = tiny_segmenter(151)
    load_segmenter([path], judge, classes)
    assert same(judge.state_dict(), segmenter)
    assert judge.normalize
    unet, *_ = load_frozen("tiny", own=parts)
    assert same(unet.state_dict(), parts["unet"])
    assert set(load_frozen("tiny", path)[3]) == {"control", "segmenter"}


def to_diffusers(key, state):
    """A part under our names -> under diffusers', by the table; its VAE's attention is linear."""
    names = shared_names("diffusers_names.json")[key]
    theirs = {name: state[ours] for name, (ours, _) in names.items()}
    return {name: t[:, :, 0, 0] if ".attentions.0.to_" in name and t.ndim == 4 else t
            for name, t in theirs.items()}


@pytest.mark.parametrize("kind, suffix", [
    ("old names", ".bin"), ("hub", ".fp16.safetensors"), ("shards", ".safetensors")])
def test_pipeline_folder(tmp_path, tiny_preset, kind, suffix):
    """diffusers' folder, or that of the Hugging Face cache around it."""
    tensors = tiny_sd(torch.float16 if "fp16" in suffix else torch.float32)
    unet = to_diffusers("unet", stripped(tensors, SD_PREFIX["unet"]))
    vae = to_diffusers("vae", stripped(tensors, SD_PREFIX["vae"]))
    text = stripped(tensors, SD_PREFIX["text"])
    folder = tmp_path / "p"
    if kind == "old names":
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"),
                         ("to_out.0", "proj_attn")):
            vae = {name.replace(new, old): t for name, t in vae.items()}
    if kind == "hub":  # beside an older snapshot
        (folder / "snapshots" / "ffff").mkdir(parents=True)
        os.utime(folder / "snapshots" / "ffff", (1, 1))
        folder = folder / "snapshots" / "0123abc"
    write_weights(vae, folder / "vae" / f"diffusion_pytorch_model{suffix}")
    write_weights(prefixed("text_model.", text), folder / "text_encoder" / f"model{suffix}")
    path = folder / "unet" / f"diffusion_pytorch_model{suffix}"
    if kind == "shards":  # full precision is preferred, and safetensors to pickles
        for i in range(2):
            shard = path.with_stem(f"{path.stem}-0000{i + 1}-of-00002")
            write_weights(dict(list(unet.items())[i::2]), shard)
        for ending in (".fp16.safetensors", ".non_ema.safetensors", ".bin"):
            write_weights({"conv_in.weight": torch.zeros(3)}, path.with_suffix(ending))
    else:
        write_weights(unet, path)
    want = load_weights(write_weights(tensors, tmp_path / "sd.safetensors"))
    parts = load_weights(tmp_path / "p")
    assert parts.keys() == want.keys()
    assert all(same(parts[part], want[part]) for part in want)


# segmenters


@pytest.mark.parametrize("key", ["cityscapes", "ade20k", "coco", "toy"])
def test_ade20k_segmenter_starts_every_class_from_its_nearest(tmp_path, key):
    """From mit-semseg's pair of files, in torch's old format, as its batch norm left them."""
    classes, ade = class_table(key), class_table("ade20k").names
    state = random_state(tiny_segmenter(150))
    leftovers = {n.replace("running_var", "_tmp_running_var"): t for n, t in state.items()}
    content = {n: t for n, t in (state | leftovers).items() if "num_batches" not in n}
    files = [write_weights(stripped(content, part), tmp_path / f"{part}pth", zipped=False)
             for part in ("encoder.", "decoder.")]
    judge = tiny_segmenter(len(classes.names) + 1)
    before = judge.decoder.conv_last[1].weight.detach().clone()
    load_segmenter(files, judge, classes)
    after = judge.state_dict()
    name = "encoder.layer3.1.bn2.running_var"
    assert torch.equal(after[name], state[name])
    assert after["encoder.bn1.num_batches_tracked"] == 0
    for i, name in enumerate(classes.ade):
        if name is None:
            assert torch.equal(after[WEIGHT][i], before[i])
            continue
        row = i if key == "ade20k" else ade.index(name)  # (two are named screen)
        assert torch.equal(after[WEIGHT][i], state[WEIGHT][row])
        assert after[BIAS][i] == state[BIAS][row]
    assert torch.equal(after[WEIGHT][-1], before[-1])  # "fake"
    assert judge.normalize  # ImageNet's mean and deviation
    assert sum(name is not None for name in classes.ade) > 0.7 * len(classes.names)


@pytest.mark.parametrize("names, ours, theirs, rows", [  # with and without the output for fakes
    (None, 20, 20, {i: i for i in range(20)}),
    (None, 20, 19, {i: i for i in range(19)}),
    (None, 19, 20, {i: i for i in range(19)}),
    (["car", "moon", "road"], 4, 19, {0: 13, 2: 0}),
    (["moon"], 2, 19, {}),
    ([*"abcdefghijklmnopqr", "sky"], 20, 20, {18: 10, 19: 19})])
def test_classes_start_from_a_segmenter_by_their_names(tmp_path, names, ours, theirs, rows):
    toy, judge = class_table("toy"), tiny_segmenter(ours)
    state = random_state(tiny_segmenter(theirs))
    classes = write_classes(tmp_path, "\n".join(names or toy.names))
    before = judge.decoder.conv_last[1].weight.detach().clone()
    load_segmenter(state, judge, classes, {"names": list(toy.names), "normalize": True})
    assert judge.normalize
    for i, row in enumerate(judge.decoder.conv_last[1].weight):
        assert torch.equal(row, state[WEIGHT][rows[i]] if i in rows else before[i])


@pytest.mark.parametrize("names, word", [
    (["backbone.layer1.0.conv1.weight", "decode_head.conv_seg.weight"], "mmsegmentation"),
    (["backbone.patch_embed1.proj.weight", "decode_head.linear_c4.proj.weight"], "SegFormer"),
    (["segformer.encoder.patch_embeddings.0.proj.weight", "decode_head.linear_c.0.proj.weight"],
     "transformers"),
    (["cbr.0.weight", "conv_last.weight", "conv_last.bias"], "other than UperNet")])
def test_segmenters_that_do_not_fit_are_called_what_they_are(tmp_path, names, word):
    encoder = {"layer4.0.conv1.weight": ZEROS}
    files = [write_weights(encoder, tmp_path / "encoder.pth"),
             write_weights({"state_dict": dict.fromkeys(names, ZEROS)}, tmp_path / "b.pth")]
    refuses(lambda: load_segmenter(files, tiny_segmenter(20), class_table("toy")),
            str(files[1]), word, "give mit-semseg's UperNet-101")


# files of our own


@pytest.mark.parametrize("kind, hint", ADAPTERS)
def test_adapter_round_trip(tmp_path, kind, hint):
    model, other = tiny_model(kind, hint), tiny_model(kind, hint)
    for p in model.adapter.parameters():
        p.data.normal_(std=0.1)
    state = {name: t.detach() for name, t in model.adapter.state_dict().items()}
    meta, path = adapter_meta(kind, hint), tmp_path / "run" / "adapter.safetensors"
    checkpoint = write_weights(
        {"step": 12, "meta": meta, "adapter": state, "layout": model.layout.state_dict(),
         "discriminator": random_state(tiny_segmenter(20)),
         "opt_g": {"state": {0: {"exp_avg": ZEROS}}}},
        path.with_name("checkpoint_0000012.pt"))
    save_adapter(path, model, {**meta, "palette": model.classes.palette})
    prefix = {"controlnet": "control_model.", "t2i": ""}.get(kind, "adapter.")
    assert set(load_file(path)) == {prefix + name for name in state} | {"layout.table"}
    for file in (path, path.parent, checkpoint):
        found, parts = read_adapter(file)
        assert found == meta
        assert same(parts["adapter"], state)
        assert torch.equal(parts["layout"]["table"], model.layout.table)
        assert ("segmenter" in parts) == (file == checkpoint)
    load_into(other.adapter, parts["adapter"], "adapter")  # in place: some share the UNet's weights
    assert same(other.adapter.state_dict(), state)
    save_adapter(path, model, meta, torch.bfloat16)
    parts = read_adapter(path)[1]
    assert same(parts["adapter"], {name: t.bfloat16() for name, t in state.items()})
    assert torch.equal(parts["layout"]["table"], model.layout.table)  # fp32 as before
    path.unlink()
    assert same(read_adapter(path.parent)[1]["adapter"], state)  # from the checkpoint


def test_older_metadata(tmp_path):
    meta = adapter_meta("t2i", "color")
    new_keys = ("hint_colors", "normalize", "step", "dataset")
    older = {key: value for key, value in meta.items() if key not in new_keys}
    aldm.save_tensors(tmp_path / "a.safetensors", {"body.0.block2.bias": ZEROS}, older)
    assert read_adapter(tmp_path / "a.safetensors")[0] == {**older, **dict.fromkeys(new_keys)}


@pytest.mark.parametrize("key, value", [
    ("adapter", "gligen"), ("preset", ["toy"]), ("names", None), ("names", [5] * 19),
    ("names", ["x"] * 256), ("palette", None), ("palette", [[128, 64, 128]] * 18),
    ("palette", [[1, 2]] * 19), ("palette", [[1, 2, 300]] * 19), ("void", 3),
    ("file_ids", [0.5] * 256), ("hint", {}), ("hint_colors", "coco"), ("step", "4"), ("step", -3),
    ("normalize", "yes"), ("dataset", 7)])
def test_metadata_that_lies(tmp_path, key, value):
    path, checkpoint = tmp_path / "adapter.safetensors", tmp_path / "checkpoint_1.pt"
    state, meta = {"body.0.block2.bias": ZEROS}, adapter_meta("t2i", "color")
    aldm.save_tensors(path, state, {**meta, key: value})
    content = {"step": 3, "meta": {**meta, key: value}, "adapter": state}
    content["step"] = value if key == "step" else 3
    torch.save(content, checkpoint)
    for file in (path, checkpoint):
        refuses(lambda: read_adapter(file), str(file), f"metadata says {key} {value!r:.60}")


def test_toy_base_file(tmp_path):
    """It is made part by part, and keeps the rows of the token embedding that were trained."""
    preset, path, trained = PRESETS["toy"], tmp_path / "toy.safetensors", [5, 320, 49407]
    text, vae = TextEncoder(**preset.text), VAE(preset.vae)
    segmenter = UperNet(19, **preset.segmenter)
    segmenter.encoder.bn1.num_batches_tracked += 70000  # more than fp16 could hold
    save_base(path, {"vae": vae})
    save_base(path, {**load_weights(path), "text": text}, trained)
    save_base(path, {**load_weights(path), "segmenter": segmenter})
    assert load_file(path)["text.token_embedding.ids"].tolist() == trained
    parts = load_weights(path)
    generator = torch.Generator().manual_seed(0)
    table = torch.empty(49408, 96).normal_(std=0.02, generator=generator)
    table[trained] = text.token_embedding.weight[trained].half().float()
    assert torch.equal(parts["text"]["token_embedding.weight"], table)
    assert same(parts["vae"], {name: t.half() for name, t in vae.state_dict().items()})
    assert set(parts) == {"vae", "text", "segmenter"}
    assert parts["segmenter"]["encoder.bn1.num_batches_tracked"] == 70000


@pytest.mark.parametrize("value, dtype", [(1e5, torch.float16), (float("nan"), None)])
def test_an_export_that_overflows_is_not_written(tmp_path, value, dtype):
    """The last good file stays."""
    model, path = tiny_model("t2i"), tmp_path / "adapter.safetensors"
    save_adapter(path, model, adapter_meta("t2i", "color"), dtype)
    before = path.read_bytes()
    model.adapter.conv_in.bias.data[3] = value
    with pytest.raises(InputError, match="conv_in.bias is not finite"):
        save_adapter(path, model, adapter_meta("t2i", "color"), dtype)
    assert path.read_bytes() == before
    assert files(tmp_path) == ["adapter.safetensors"]


# class embeddings


def test_file_of_class_embeddings(tmp_path):
    text, classes = tiny_text(), class_table("cityscapes")
    table, void = torch.randn(19, 64), text.class_embeddings([])
    path = tmp_path / "table.pth"
    torch.save(table, path)
    found = load_class_embeddings(path, classes, text)
    assert torch.equal(found, torch.cat([table, void]))
    torch.save(void + 1, tmp_path / "null_embedding.pth")
    found = load_class_embeddings(path, classes, text)
    assert torch.equal(found, torch.cat([table, void + 1]))


@pytest.mark.parametrize("name", ["table.pth", "null_embedding.pth"])
@pytest.mark.parametrize("wrong", [
    torch.randn(19, 32), torch.randn(3, 64), torch.ones(19, 64, dtype=torch.int64), "text"])
def test_class_embeddings_that_do_not_fit(tmp_path, name, wrong):
    text, classes = tiny_text(), class_table("cityscapes")
    torch.save(torch.randn(19, 64), tmp_path / "table.pth")
    torch.save(wrong, tmp_path / name)
    refuses(lambda: load_class_embeddings(tmp_path / "table.pth", classes, text),
            str(tmp_path / name), "[19, 64]" if name == "table.pth" else "void needs [1, 64]")


@needs_shared
def test_official_class_embeddings():
    for key, name in (("cityscapes", "cityscapes"), ("ade20k", "ade20k"), ("coco", "coco_stuff")):
        path = SHARED / "class_embeddings" / f"class_embeddings_{name}.pth"
        classes, text = class_table(key), TextEncoder(width=768, layers=1, heads=12)
        table = load_class_embeddings(path, classes, text)
        assert table.shape == (len(classes.names) + 1, 768)
        assert torch.equal(table[:-1], torch.load(path))
        assert torch.equal(table[-1:], torch.load(path.with_name("null_embedding.pth")))


# files that do not fit, lie or are damaged


UNET_IN = SD_PREFIX["unet"] + "input_blocks.0.0.weight"


@pytest.mark.parametrize("rest, changes, words", [  # with or without the rest of the base model
    (False, {"unet.lora_A.weight": ZEROS},
     ["no known tensor (unet.lora_A", "expected Stable Diffusion 1.x"]),
    (False, {SD_PREFIX["unet"] + "out.2.bias": ZEROS, "conditioner.embedders.0.x": ZEROS,
             SD_PREFIX["vae"] + "decoder.conv_out.bias": ZEROS}, ["unet: does not fit"]),  # SD XL
    (True, {UNET_IN: torch.zeros(16, 9, 3, 3)},
     ["unet: does not fit", "size mismatch for input_blocks.0.0.weight", "[16, 9, 3, 3]"]),
    (True, {SD_PREFIX["vae"] + "decoder.norm_out.bias": None}, ["vae", "Missing", "norm_out"]),
    (True, {UNET_IN: torch.zeros(16, 4, 3, 3, dtype=torch.int8)}, ["int8", "floating-point"]),
    (True, {SD_PREFIX["text"] + "encoder.layers.1.self_attn.k_proj.bias": torch.tensor(1.0)},
     ["text", "Missing", "resblocks.1.attn.in_proj_bias"])])
def test_base_model_that_does_not_fit(tmp_path, tiny_preset, rest, changes, words):
    tensors = (tiny_sd() if rest else {}) | changes
    tensors = {name: t for name, t in tensors.items() if t is not None}
    path = write_weights(tensors, tmp_path / "sd.ckpt")
    refuses(lambda: load_frozen("tiny", path), str(path), *words)
    refuses(lambda: read_adapter(path), str(path))


def test_a_base_model_is_no_adapter(tmp_path):
    """FreestyleNet's own checkpoints have the same names."""
    path = write_weights(tiny_sd(), tmp_path / "freestyle.ckpt")
    refuses(lambda: read_adapter(path), str(path), "no whole adapter", "FreestyleNet", "--sd")


@pytest.mark.parametrize("change, word", [
    ({"rows": None}, "token_embedding.ids"), ({"ids": None}, "token_embedding.weight"),
    ({"ids": torch.tensor([-1, 49408])}, "int64"), ({"ids": torch.tensor([0, 1, 2])}, "int64"),
    ({"rows": torch.zeros(2, 5)}, "token_embedding.weight")])
def test_token_rows_that_lie(tmp_path, change, word):
    tensors = load_file(HERE / "assets" / "toy.safetensors")
    for name in ("rows", "ids"):
        tensors[f"text.token_embedding.{name}"] = tensors[f"text.token_embedding.{name}"][:2]
    for name, t in change.items():
        tensors[f"text.token_embedding.{name}"] = t
    tensors = {name: t for name, t in tensors.items() if t is not None}
    path = write_weights(tensors, tmp_path / "toy.safetensors")
    refuses(lambda: load_frozen("toy", path), str(path), word)


@pytest.mark.parametrize("content, words", [
    ([ZEROS], "holds a list"), ({"state_dict": None}, "holds a NoneType"),
    ({"epoch": 3}, "no known tensor"), ({}, "no known tensor"),
    ({"meta": [1], "adapter": {"conv_in.bias": ZEROS}}, "preset None"),
    ({"meta": {}, "adapter": {}, "layout": 3}, "holds a int"),
    ({"zero_convs.0.0.weight": ZEROS, "input_hint_block.0.weight": ZEROS}, "no whole adapter"),
    ({"conv_last.1.bias": torch.zeros(20)}, "no whole adapter")])
def test_content_that_is_no_adapter(tmp_path, content, words):
    torch.save(content, tmp_path / "a.pt")
    refuses(lambda: read_adapter(tmp_path / "a.pt"), str(tmp_path / "a.pt"), words)


def test_class_table_that_lies(tmp_path):
    path = tmp_path / "a.safetensors"
    aldm.save_tensors(path, {"control_model.x": ZEROS, "layout.table": torch.zeros(5, 64)},
                      adapter_meta("controlnet"))
    refuses(lambda: read_adapter(path), str(path), "layout.table", "expected 20 rows")


@pytest.mark.parametrize("change", [
    {WEIGHT: None}, {BIAS: torch.tensor(1.0)}, {WEIGHT: torch.zeros(20, 5, 1, 1)},
    {WEIGHT: torch.zeros(7, 16, 1, 1), BIAS: torch.zeros(7)},
    {"encoder.layer4.0.conv1.weight": None}, {BIAS: torch.zeros(20, dtype=torch.int64)}])
def test_segmenter_whose_layers_are_missing(tmp_path, change):
    state = random_state(tiny_segmenter(20)) | change
    state = {name: t for name, t in state.items() if t is not None}
    path = write_weights(prefixed("segmenter.", state), tmp_path / "s.pth")
    refuses(lambda: load_segmenter([path], tiny_segmenter(20), class_table("toy")), str(path))


def spoil(tensors, name, value):
    tensors = {n: t.clone() for n, t in tensors.items()}
    tensors[name].view(-1)[-1] = value
    return tensors


def test_weights_that_are_not_finite(tmp_path, tiny_preset):
    nan, infinite = float("nan"), -float("inf")
    name = "decoder.up.1.block.0.conv1.weight"
    tensors = spoil(tiny_sd(torch.float16), SD_PREFIX["vae"] + name, infinite)
    sd = write_weights(tensors, tmp_path / "sd.ckpt")
    refuses(lambda: load_frozen("tiny", sd), f"{sd}: vae: {name} holds NaN or infinite")
    adapter = T2IAdapter(TINY.unet)
    state = spoil(adapter.state_dict(), "conv_in.bias", nan)
    refuses(lambda: load_into(adapter, state, "a.pth"), "a.pth: conv_in.bias")
    judge = spoil(random_state(tiny_segmenter(20)), BIAS, infinite)
    refuses(lambda: load_segmenter(judge, tiny_segmenter(20), class_table("toy")), "conv_last.1")
    torch.save(torch.full((19, 64), nan), tmp_path / "t.pth")
    refuses(lambda: load_class_embeddings(tmp_path / "t.pth", class_table("toy"),
                                          tiny_text()), "t.pth", "NaN")
    path = tmp_path / "a.safetensors"
    metadata = {k: json.dumps(v) for k, v in adapter_meta("t2i", "color").items()}
    save_file({**adapter.state_dict(), "layout.table": torch.full((20, 64), nan)}, path, metadata)
    refuses(lambda: read_adapter(path), str(path), "layout: table")


def test_damaged_files(tmp_path, tiny_preset, monkeypatch):
    vae = random_state(VAE(TINY.vae))
    st = write_weights(vae, tmp_path / "ok.safetensors")
    zipped = write_weights(vae, tmp_path / "ok.ckpt")
    old = write_weights(vae, tmp_path / "old", zipped=False)
    contents = [(b"", "Git LFS"), (b"<!DOCTYPE html><html>Not found</html>", "web page"),
                (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "Git LFS"),
                (bytes(range(256)) * 9, "cut short")]
    for path, sizes in ((st, (10, 900, -100)), (zipped, (700, -100)), (old, (1000, -100))):
        contents += [(path.read_bytes()[:size], "cut short") for size in sizes]
    (tmp_path / "void" / "unet").mkdir(parents=True)
    os.mkfifo(tmp_path / "fifo")
    cases = [("nowhere.ckpt", "no such file"), ("void", ""), ("x" * 300, "too long"),
             ("fifo", "not a regular file")]
    for i, (content, word) in enumerate(contents):
        (tmp_path / f"{i}.ckpt").write_bytes(content)
        cases.append((f"{i}.ckpt", word))
    for name, word in cases:
        for call in readers(tmp_path / name):
            refuses(call, str(tmp_path / name), word)
    refuses(lambda: load_weights("/dev/zero"), "/dev/zero", "not a regular file")
    denied = mock.Mock(side_effect=PermissionError(13, "Permission denied"))
    monkeypatch.setattr(weight_files, "open", denied, raising=False)  # (root may read everything)
    refuses(lambda: load_weights(st), f"{st}: permission denied")


# pickles


class Call:
    """An object that is pickled as a call: unpickling it calls `function`."""

    def __init__(self, function, *args, state=None):
        self.pickled = (function, args, state)

    def __call__(self):
        """Objects in the place of a function must be callable."""

    def __reduce__(self):
        return self.pickled


def spells(marker):
    """Pickles that create the file `marker` when an ordinary unpickler reads them."""
    write = f"open({str(marker)!r}, 'w')"
    plain = marker.with_name("plain.pickle")
    plain.write_bytes(pickle.dumps(Call(eval, write)))
    module = Call(__import__, "os")
    unsafe = functools.partial(torch.load, weights_only=False)
    return {
        "os.system": Call(os.system, f"touch {marker}"),
        "eval": Call(eval, write),
        "getattr": Call(Call(getattr, module, "system"), f"touch {marker}"),
        "a method": Call(Path.touch, Path(marker)),
        "inside a state": Call(SimpleNamespace, state={"x": Call(eval, write)}),
        "torch.load": Call(unsafe, str(plain)),
        "a process": Call(subprocess.run, ["touch", str(marker)]),
    }


@pytest.mark.parametrize("kind", ["zip", "legacy", 0, 2, 4])
def test_nothing_of_a_pickle_is_executed(tmp_path, tiny_preset, kind, monkeypatch):
    marker, path = tmp_path / "executed", tmp_path / "run" / "checkpoint_0000001.pt"
    path.parent.mkdir()
    monkeypatch.chdir(path.parent)
    weights = {"body.0.weight": torch.randn(3, 4), "conv_in.bias": torch.randn(5)}
    for name, spell in spells(marker).items():
        beside = {"state_dict": {**weights, "x": spell}, "callbacks": spell}
        adapter = {"meta": spell, "adapter": weights}
        for content in (beside, adapter, spell, [ZEROS, spell], {spell: ZEROS}):
            if kind in ("zip", "legacy"):
                write_weights(content, path, zipped=kind == "zip")
            else:
                path.write_bytes(pickle.dumps(content, kind))
            if content is beside and kind in ("zip", "legacy"):
                assert same(read_adapter(path)[1]["adapter"], weights)
            else:
                for call in (*readers(path), lambda: read_adapter(path.parent)):
                    refuses(call, str(path))
            assert not marker.exists(), name
            assert files(path.parent) == [path.name]
    for name, spell in spells(marker).items():  # each of them would have
        marker.unlink(missing_ok=True)
        with contextlib.suppress(Exception):
            pickle.loads(pickle.dumps(spell))
        assert marker.exists(), name


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
STATE = b"}(S'__defaults__'\n(NtS'__doc__'\nS'spoilt'\nu"


@pytest.mark.parametrize("opcodes", [
    REBUILD + STATE + b"b.",  # attributes of a function, by its dict
    REBUILD + b"(}" + STATE + b"tb.",  # and by setattr
    b"ctorch._utils\n_rebuild_parameter\n(}" + STATE + b"tb.",
    b"ccollections\nOrderedDict\n(}" + STATE + b"tb.",
    b"ctorch\nTensor\n(}" + STATE + b"tb.",
    b"(S'touch executed'\nios\nsystem\n.",  # the opcode INST
    b"(cos\nsystem\nS'touch executed'\no.",  # OBJ
    b"cos\nsystem\n(S'touch executed'\nt\x81.",  # NEWOBJ
    b"cos\nsystem\n(S'touch executed'\nt}\x92.",  # NEWOBJ_EX
    b"\x8c\x02os\x8c\x06system\x93\x8c\x0etouch executed\x85R.",  # STACK_GLOBAL
    b"cthis\nd\n.",  # a module that is not imported yet
    b"cos\nsystem\n)R(S'a'\nS'b'\ne(S'a'\nS'b'\nu(S'a'\n\x90S'x'\na.",  # items for a placeholder
    b"ccollections\ndefaultdict\ncos\nsystem\n\x85R.",
    b"P0\n.", b"I5\nQ."])  # persistent ids that are none
def test_opcodes_leave_no_trace(tmp_path, monkeypatch, opcodes):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", opcodes)
        archive.writestr("archive/version", "3\n")
    function = torch._utils._rebuild_tensor_v2
    before = function.__defaults__, function.__doc__, dict(vars(function))
    refuses(lambda: load_weights("a.pt"), "a.pt")
    assert (function.__defaults__, function.__doc__, vars(function)) == before
    assert weight_files.Inert.__doc__ != "spoilt"
    assert weight_files.PlainTensor.__doc__ != "spoilt"
    assert torch.Tensor.__doc__ != "spoilt"
    assert "this" not in sys.modules
    assert files(tmp_path) == ["a.pt"]


@pytest.mark.filterwarnings("ignore")
def test_files_that_torch_would_read_in_another_way(tmp_path, monkeypatch):
    """Programs, archives, and whole modules, of whose sources torch keeps patches."""
    monkeypatch.chdir(tmp_path)
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), "script.pt")
    with tarfile.open("old.pt", "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.add(__file__, name)
    module = type("Module", (nn.Module,), {"dump_patches": True, "__module__": "sources"})
    with mock.patch.dict(sys.modules, {"sources": SimpleNamespace(Module=module)}):
        torch.save({"a": module()}, "module.pt", _use_new_zipfile_serialization=False)
    before = files(tmp_path)
    refuses(lambda: load_weights("script.pt"), "script.pt", "TorchScript")
    refuses(lambda: load_weights("old.pt"), "old.pt", "tar archive")
    refuses(lambda: load_weights("module.pt"), "module.pt")
    assert files(tmp_path) == before


def test_parameters_and_views_are_plain_tensors(tmp_path):
    p = nn.Parameter(torch.randn(4, 6))
    p.note = "a state"
    q = nn.Parameter(torch.randn(3))
    content = {"body.0.weight": p, "body.1.weight": q, "body.2.weight": p.detach()[1:, ::2],
               "body.3.weight": p.detach().t(), "body.4.weight": torch.randn(2).bfloat16()}
    for zipped in (True, False):
        path = write_weights(content, tmp_path / "a.pt", zipped)
        found = load_weights(path)["adapter"]
        assert same(prefixed("body.", stripped(found, "body.")), content)
        assert not any(t.requires_grad for t in found.values())


def own_memory():
    """Megabytes of this process that are not mapped to files."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_reading_a_file_does_not_copy_it(tmp_path, suffix):
    path = write_weights({"body.0.weight": torch.zeros(4096, 16384)}, tmp_path / f"a{suffix}")
    before = own_memory()
    parts = load_weights(path)  # 256 MB
    aldm.check_finite(parts["adapter"], "a")
    assert own_memory() - before < 32


# paths: on disk, in the cache, on the hub


def test_files_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = random_state(ControlNet(TINY.unet, 64, TINY.hint_widths))
    local = write_weights(state, tmp_path / "cache" / "a.ckpt")
    download = mock.Mock(return_value=str(local))
    monkeypatch.setattr(weight_files, "hf_hub_download", download)
    assert same(read_adapter("a-b/c.d_e/x/y/z.safetensors")[1]["adapter"], state)
    download.assert_called_with("a-b/c.d_e", "x/y/z.safetensors")
    download.reset_mock(side_effect=True)
    (tmp_path / "runs").mkdir()
    for path in ("runs/a/adapter.safetensors", "cache/a.ckpt", "/a/b/c.ckpt", "a/b.ckpt", "a/b/c",
                 "../a/b.pt", "./a/b/c.pt"):
        with contextlib.suppress(InputError):
            read_adapter(path)
    download.assert_not_called()
    download.side_effect = OSError("offline\nsecond line")
    refuses(lambda: read_adapter("a/b/c/d.ckpt"), "a/b/c/d.ckpt: neither on disk", "download "
            "c/d.ckpt from huggingface.co/a/b and give its path")
    text = tiny_text()
    for call in (lambda: load_frozen("sd15", "a/b/c.ckpt"), lambda: load_weights("a/b/c.ckpt"),
                 lambda: load_segmenter(["a/b/c.ckpt"], None, class_table("toy")),
                 lambda: load_class_embeddings("a/b/c.ckpt", class_table("toy"), text)):
        refuses(call, "a/b/c.ckpt: neither on disk")


def test_base_model_is_looked_up_where_it_may_be(tmp_path, monkeypatch):
    cached, download = {}, mock.Mock(side_effect=OSError("offline\nsecond line"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weight_files, "hf_hub_download", download)
    monkeypatch.setattr(aldm, "try_to_load_from_cache", lambda repo, name: cached.get((repo, name)))
    new = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    file = "v1-5-pruned-emaonly.safetensors"
    cached[new, "model_index.json"] = str(tmp_path / "model_index.json")  # and nothing but that
    refuses(lambda: load_frozen("sd15"), file, "--sd PATH", "huggingface.co/")
    download.assert_called_once_with(new, file)
    pipeline = tmp_path / "pipeline"
    for name in ("unet", "vae", "text_encoder"):
        write_weights({"x": ZEROS}, pipeline / name / "model.safetensors")
    cached["runwayml/stable-diffusion-v1-5", "model_index.json"] = f"{pipeline}/model_index.json"
    assert aldm.base_file("sd15") == pipeline
    cached["runwayml/stable-diffusion-v1-5", file] = str(tmp_path / file)
    assert aldm.base_file("sd15") == str(tmp_path / file)  # where there are both, the single file


# -- class lists -----------------------------------------------------------------------------------


def read_blocks(path, dataset="cityscapes", **options):
    """What `read_layout` reads from a file of `blocks`: a list."""
    return read_layout(path, dataset, **options)[0, ::16].tolist()


def write_classes(folder, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text(text, "utf-8")
    return class_table(folder)


@pytest.mark.parametrize("key, value", [
    ("cityscapes", "f4b9ebc410c9ddfe"),
    ("ade20k", "9cf6d91603db70d8"),
    ("coco", "bcbd73363f772936")])
def test_published_classes_go_to_ids_and_colours_and_back(tmp_path, key, value):
    classes = class_table(key)
    content = (classes.names, classes.palette.tolist(), classes.ade, classes.file_ids.tolist(),
               classes.void.tolist())
    assert hashlib.sha256(repr(content).encode()).hexdigest().startswith(value)
    want = [*range(len(classes.names)), IGNORE]
    ids = [classes.file_ids.tolist().index(c) for c in want]
    for name, kind in (("a.png", np.uint8), ("wide.png", np.uint16), ("wide.tif", np.int32)):
        assert read_blocks(save(tmp_path / name, blocks(*ids, kind=kind)), classes) == want
    again = write_classes(tmp_path, data.classes_text(classes))
    assert again.names == classes.names
    assert again.ade == classes.ade
    assert (again.palette != classes.palette).any(1).sum() == (key == "ade20k")
    path = save(tmp_path / "colours.png", colorize(blocks(*want), key))
    if key == "ade20k":
        want[48] = 6  # skyscraper has the colour of road
    assert read_blocks(path, key) == want
    assert read_layout(path, key).dtype == torch.int64


def test_a_palette_in_the_order_of_the_ids_tells_road_from_skyscraper(tmp_path):
    palette = class_table("ade20k").palette
    own = save(tmp_path / "own.png", blocks(7, 49, palette=[[0] * 3, *palette]))
    train = save(tmp_path / "train.png", blocks(6, 48, palette=palette))
    assert read_blocks(own, "ade20k") == read_blocks(train, "ade20k") == [6, 48]


def test_class_table_of_a_folder(tmp_path):
    classes = write_classes(tmp_path, "\ufeff# mine\r\nroad 128 64 128\r\n\r\nbrick house = house\n"
                                      "Sign (Back) - 2nd\t1 2 3\nvoid 9 9 9\ncar, 7, 8, 9\nVOID\n")
    assert classes.names == ("road", "brick house", "Sign (Back) - 2nd", "car")
    assert classes.palette[[0, 2, 3]].tolist() == [[128, 64, 128], [1, 2, 3], [7, 8, 9]]
    assert classes.ade == ("road", "house", None, "car")
    assert classes.void.tolist() == [[0, 0, 0], [9, 9, 9]]
    assert classes.file_ids.tolist() == [0, 1, 2, 255, 3, 255] + [-1] * 249 + [255]
    assert read_blocks(save(tmp_path / "ids.png", blocks(0, 1, 4, 3)), tmp_path) == [0, 1, 3, 255]
    path = save(tmp_path / "colours.png", colorize(blocks(0, 1, 3, 255), tmp_path))
    assert read_blocks(path, tmp_path) == [0, 1, 3, 255]


def test_classes_without_colours_get_different_ones(tmp_path):
    palette = write_classes(tmp_path, "\n".join(f"class{i}" for i in range(255))).palette
    assert len(np.unique(palette, axis=0)) == 255
    assert palette.any(1).all()
    first = palette[0].tolist()
    palette = write_classes(tmp_path, "a\nb {} {} {}".format(*first)).palette.tolist()
    assert palette[1] == first != palette[0]  # a given colour is given to no other class


def test_a_class_may_be_black(tmp_path):
    classes = write_classes(tmp_path, "background 0 0 0\ncat 9 9 9\n")
    want = [0, 1, 255]
    assert read_blocks(save(tmp_path / "a.png", colorize(blocks(*want), classes)), classes) == want
    palette = save(tmp_path / "p.png", blocks(0, 1, palette=[[9, 9, 9], [0, 0, 0]]))
    assert read_blocks(palette, classes) == [1, 0]


@pytest.mark.parametrize("text, word", [
    ("road 128 64", "line 1"), ("a\nroad 300 0 0", "line 2"), ("128 64 128", "line 1"),
    ("road 0.5 0.1 0.2", "line 1"), ("road #804080", "line 1"), ("road 128 64 128 255", "line 1"),
    ("7 road 1 2 3", "line 1"), ("name,r,g,b\nroad,1,2,3", "line 1"), ("- road", "line 1"),
    ("names: [road, sky]", "line 1"), ("('road', 128, 64, 128),", "line 1"),
    ("a\n__ignore__", "`void`"), ("_background_", "`background`"),
    ("road = street", "'street'"), ("a 1 2 3\nb 1 2 3", "share"), ("a 1 2 3\nvoid 1 2 3", "share"),
    ("\n# none\n", "0 classes"), ("stra\udcdfe", "UTF-8"),
    ("\n".join(f"c{i}" for i in range(256)), "256 classes")])
def test_class_table_refuses(tmp_path, text, word):
    (tmp_path / "classes.txt").write_bytes(text.encode(errors="surrogateescape"))
    refuses(lambda: class_table(tmp_path), word, "classes.txt")


# -- layout files ----------------------------------------------------------------------------------


CITY = class_table("cityscapes").palette.astype(int)
MOVED = CITY[[13, 0, 10, 2]]  # car, road, sky, building
FOREIGN = np.arange(768).reshape(256, 3) % 251
FURTHER = np.concatenate([MOVED, [[1, 250, 3], [0, 0, 0]]])
GREYS = np.arange(256)[:, None].repeat(3, 1)
RGB = np.asarray(colorize(blocks(0, 13, 8), "toy"))
KEYED = Image.fromarray(RGB)
KEYED.info["transparency"] = tuple(CITY[13].tolist())
CLEAR_CAR = np.dstack([RGB, blocks(255, 0, 255)])  # RGB and alpha


@pytest.mark.parametrize("name, picture, want", [
    # The name decides before the content.
    ("a_labelIds.png", blocks(0, 7, 11, 33, 255), [255, 0, 2, 18, 255]),
    ("a_labelTrainIds.png", blocks(0, 7, 11, 255), [0, 7, 11, 255]),
    ("a_train_id.png", blocks(0, 7, 19), [0, 7, 255]),
    # Then the ids.
    ("a.png", blocks(7, 11, 26), [0, 2, 13]),
    ("a.png", blocks(7, 11, 255), [7, 11, 255]),
    ("a.png", blocks(7, 18, 19), [7, 18, 255]),
    ("a.tif", blocks(26, -1, kind=np.int32), [13, 255]),  # -1: licence plates
    # Palettes: all colours in use are the data set's, or none is.
    ("p.png", blocks(0, 2, 18, palette=CITY), [0, 2, 18]),
    ("p.png", blocks(0, 2, 3, palette=MOVED), [13, 10, 2]),
    ("p.png", blocks(40, 41, palette=CITY[[8] * 42]), [8, 8]),
    ("p.png", blocks(0, 5, palette=FURTHER), [13, 255]),
    ("p.png", blocks(0, 2, 255, palette=FOREIGN), [0, 2, 255]),
    ("p.png", blocks(0, 2, 1, palette=GREYS), [0, 2, 1]),
    ("p.png", blocks(0, 2, 3, palette=MOVED + 9), [0, 2, 3]),
    # Transparent pixels are void: by alpha, or by tRNS (a colour, a grey, an index, alphas).
    ("a.png", CLEAR_CAR, [0, 255, 8]),
    ("a.png", KEYED, [0, 255, 8]),
    ("a.png", np.dstack([blocks(7, 8), blocks(255, 0)]), [7, 255]),
    ("a.png", blocks(7, 8, clear=8), [7, 255]),
    ("a.png", blocks(7, 8, clear=8, kind=np.uint16), [7, 255]),
    ("p.png", blocks(0, 2, palette=CITY, clear=2), [0, 255]),
    ("p.png", blocks(0, 2, palette=FOREIGN, clear=2), [0, 255]),
    ("p.png", blocks(0, 2, palette=CITY, clear=b"\xff\xff\0"), [0, 255])])
def test_layouts_that_are_read(tmp_path, name, picture, want):
    assert read_blocks(save(tmp_path / name, picture)) == want


@pytest.mark.parametrize("key, name, picture, words", [
    ("ade20k", "a.png", blocks(0, 150, 151, 151, 200), ["[151, 200]", "0 to 150, and 255"]),
    ("coco", "a.png", blocks(1000, kind=np.uint16), ["[1000]", "0 to 181"]),
    ("toy", "a_labelTrainIds.png", blocks(7, 26), ["[26]"]),
    ("toy", "a_labelIds.png", blocks(7, 34), ["[34]", "0 to 33"]),
    ("toy", "a.png", RGB[..., ::-1], ["512 pixels", "RGB"]),
    ("toy", "a.jpg", blocks(7), ["mode L", "JPEG"]),
    ("toy", "a.png", np.hstack([RGB, np.full((16, 1, 3), 5, np.uint8)]), ["16 p", "[5, 5, 5]"]),
    ("toy", "a.png", Image.fromarray(RGB).resize((200, 200), Image.BICUBIC), ["by nearest"]),
    ("toy", "a.png", np.dstack([blocks(7, 26)] * 3), ["ids in a single channel"]),
    ("toy", "a.png", blocks(7).resize((20, 7)), ["20 x 7"]),
    ("toy", "a.png", Image.new("1", (14000, 14000)), ["64 Mpixel"]),
    ("toy", "a.png", CLEAR_CAR // 2, ["512 pixels are half transparent"]),
    # A palette with some of the data set's colours is read neither way.
    ("toy", "p.png", blocks(0, 1, 2, palette=MOVED + [[0], [1], [0], [0]]), ["[129, 65, 129]"]),
    ("toy", "p.png", blocks(5, 0, 4, palette=FURTHER), ["[1, 250, 3]", "single channel"]),
    ("toy", "p.png", blocks(0, 40, palette=FOREIGN), ["[40]"])])
def test_layouts_that_are_refused(tmp_path, key, name, picture, words):
    path = save(tmp_path / name, picture)
    refuses(lambda: read_layout(path, key), name, *words)


def without_palette():
    """A palette PNG that lacks its PLTE chunk."""
    content = as_png(blocks(0, 1, palette=CITY))
    start = content.index(b"PLTE") - 4
    length = int.from_bytes(content[start:start + 4], "big")
    return content[:start] + content[start + length + 12:]


def test_files_that_are_no_images(tmp_path):
    noise = np.random.default_rng(0).integers(0, 19, (64, 64)).astype(np.uint8)
    path = tmp_path / "a.png"
    whole = save(path, noise).read_bytes()
    flipped = whole[:200] + bytes([whole[200] ^ 255]) + whole[201:]
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    for content in (b"", whole[:len(whole) // 2], flipped, postscript, without_palette()):
        path.write_bytes(content)
        refuses(lambda: read_layout(path, "toy"), "a.png: cannot be read")


def test_places_that_are_no_files(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, words in (("missing", "No such file"), ("folder", "not a regular file"),
                        ("fifo", "not a regular file"), ("/dev/zero", "not a regular file"),
                        ("loop", "symbolic links"), ("a" * 300, "too long")):
        refuses(lambda: read_layout(tmp_path / name, "toy"), name, words)


@needs_shared
def test_real_cityscapes_frame():
    root = SHARED / "cityscapes_sample"
    stem = root / "gtFine/val/frankfurt/frankfurt_000000_000576_gtFine"
    ids = read_layout(f"{stem}_labelIds.png", "cityscapes")
    train = read_layout(f"{stem}_labelTrainIds.png", "cityscapes")
    colour = read_layout(f"{stem}_color.png", "cityscapes")
    assert ids.shape == (1024, 2048)
    assert (ids == colour).all()
    assert 0 < (ids != train).float().mean() < 0.004
    pairs = data.Pairs("cityscapes", root, "val")
    assert "split val: labelIds; road 35 %" in pairs.description
    assert pairs.coding == "own"
    image, label = pairs.full(0)
    assert image.shape == (3, 512, 1024)
    assert torch.equal(label, ids[1::2, 1::2])  # halved by nearest
    photo = root / "leftImg8bit/val/frankfurt/frankfurt_000000_000576_leftImg8bit.png"
    photo = np.asarray(data.read_image(photo))
    mean = photo.reshape(512, 2, 1024, 2, 3).mean((1, 3)) / 127.5 - 1  # while the photo is averaged
    assert np.abs(image.permute(1, 2, 0).numpy() - mean).mean() < 0.006


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_photos_are_turned_upright(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x112] = 6  # the file's lower left is the upright top left
    corners = np.array([[40, 100], [160, 220]], np.uint8).repeat(16, 0).repeat(24, 1)
    path = save(tmp_path / f"a.{suffix}", corners[..., None].repeat(3, 2), exif=exif)
    image = data.read_image(path)
    assert image.size == data.image_size(path) == (32, 48)
    assert abs(int(np.asarray(image)[4, 4, 0]) - 160) < 4


@pytest.mark.parametrize("suffix, kind", [("png", np.uint16), ("tif", np.int32)])
def test_photos_of_16_bits_are_scaled(tmp_path, suffix, kind):
    grey = blocks(0, 255, 0x1234, 0x8000, 0xffff, kind=kind)
    image = np.asarray(data.read_image(save(tmp_path / f"grey.{suffix}", grey)))
    assert image.shape == (16, 80, 3)
    assert image[0, ::16, 0].tolist() == [0, 0, 0x12, 0x80, 255]


def test_find_images(tmp_path):
    for name in ("b.PNG", "a.png", ".hidden.png", "c.txt", "d.jpg", "e.JPEG", "in/f.png"):
        save(tmp_path / name, blocks(0), format="png")
    (tmp_path / "in/loop").symlink_to(tmp_path)
    names = [str(file.relative_to(tmp_path)) for file in data.find_images(tmp_path)]
    assert names == ["a.png", "b.PNG", "in/f.png"]
    names = [file.name for file in data.find_images(tmp_path, data.PICTURES)]
    assert names == ["a.png", "b.PNG", "d.jpg", "e.JPEG", "f.png"]
    (tmp_path / os.fsdecode(b"stra\xdfe.png")).touch()
    refuses_with(["not UTF-8"], data.find_images, tmp_path).encode()


# -- which ids a folder's files hold ---------------------------------------------------------------


def read_all(place, classes, **options):
    """{name: the blocks of the layout}, and the description."""
    layouts = data.Layouts(place, classes, **options)
    read = {name: layouts.read(name)[0, ::16].tolist() for name in layouts.names}
    return read, layouts.description


@pytest.mark.parametrize("key, contents, want, word", [
    # Cityscapes: labelIds 0..33, train ids 0..18, 19 or 255 for void.
    ("cityscapes", [(7, 8), (7, 26)], [[0, 1], [0, 13]], "labelIds;"),
    ("cityscapes", [(7, 8), (18, 19)], [[7, 8], [18, 255]], "train ids (could also be labelIds"),
    ("cityscapes", [(255, 255)], [[255, 255]], "train ids; nothing but void"),
    # ADE20K: 0 is void and 1..150 are classes; or 0..149, and 255 for void.
    ("ade20k", [(1, 7), (0, 150)], [[0, 6], [255, 149]], "published ids;"),
    ("ade20k", [(1, 7), (0, 255)], [[1, 7], [0, 255]], "train ids;"),
    ("ade20k", [(1, 7)], [[0, 6]], "published ids (could also be train"),
    ("ade20k", [(150, 255)], [[149, 255]], "published ids;"),
    # COCO-Stuff: 0..181 without eleven, such as 11; or 0..170.
    ("coco", [(0, 12), (181, 255)], [[0, 11], [170, 255]], "published ids;"),
    ("coco", [(0, 12), (11, 255)], [[0, 12], [11, 255]], "train ids;"),
    ("coco", [(0, 12), (170, 255)], [[0, 11], [159, 255]], "published ids (could also be train")])
def test_the_ids_of_a_folder_decide_their_coding_together(tmp_path, key, contents, want, word):
    for i, ids in enumerate(contents):
        save(tmp_path / f"{i}.png", blocks(*ids))
    read, description = read_all(tmp_path, key)
    assert list(read.values()) == want
    assert word in description


def test_names_and_the_flag_decide_before_the_ids(tmp_path):
    save(tmp_path / "a_labelIds.png", blocks(7, 11))
    save(tmp_path / "b_labelTrainIds.png", blocks(7, 11))
    save(tmp_path / "c.png", blocks(7, 11))
    read, description = read_all(tmp_path, "cityscapes")
    assert read == {"a": [0, 2], "b": [7, 11], "c": [7, 11]}
    assert "labelIds and train ids (could also be labelIds: use --ids own)" in description
    read, description = read_all(tmp_path, "cityscapes", ids="own")
    assert read == {"a": [0, 2], "b": [7, 11], "c": [0, 2]}
    assert "--ids" not in description
    save(tmp_path / "d.png", blocks(26, 33))
    text = refuses_with(["d.png", "[26, 33]"], data.Layouts, tmp_path, "cityscapes", ids="train")
    assert "1 of 4" in text


def test_colours_do_not_decide_the_coding_of_ids(tmp_path):
    save(tmp_path / "colours.png", RGB)
    save(tmp_path / "palette.png", blocks(33, palette=CITY[[8] * 34]))
    save(tmp_path / "ids.png", blocks(7, 11))
    read, description = read_all(tmp_path, "cityscapes")
    assert read == {"colours": [0, 13, 8], "palette": [8], "ids": [7, 11]}
    assert "colours and train ids" in description


def test_classes_of_one_colour_are_named_where_it_occurs(tmp_path):
    palette = class_table("ade20k").palette
    both = "(140, 140, 140) is the colour of road and skyscraper"
    for c, is_shared in ((48, True), (2, False)):
        picture = np.full((16, 16, 3), palette[c], np.uint8)
        layouts = data.Layouts(save(tmp_path / "a.png", picture), "ade20k")
        assert (both in layouts.description) == is_shared


def test_nothing_but_void_is_said(tmp_path):
    paths = [save(tmp_path / f"{i}.png", blocks(255)) for i in range(3)]
    layouts = data.Layouts(tmp_path, "cityscapes")
    assert layouts.only_void
    assert "nothing but void" in layouts.description
    save(paths[0], blocks(8))
    layouts = data.Layouts(tmp_path, "cityscapes")
    assert not layouts.only_void
    assert "2 of them hold nothing but void" in layouts.description


def test_a_folder_with_its_own_list_is_read_by_names(tmp_path):
    write_classes(tmp_path, "void\nsky\nroad\nboat")
    save(tmp_path / "labels/a_labelIds.png", blocks(0, 1, 2, 255))
    for place in (tmp_path, tmp_path / "labels", tmp_path / "labels/a_labelIds.png"):
        read, description = read_all(place, "cityscapes")
        assert list(read.values()) == [[255, 10, 0, 255]]
        assert f"ids of {tmp_path}/classes.txt" in description
    save(tmp_path / "labels/b.png", blocks(1, 3))
    refuses_with(["b.png", "cityscapes", "boat"], data.Layouts, tmp_path, "cityscapes")
    read, description = read_all(tmp_path, "cityscapes", skip_broken=True)
    assert list(read) == ["a"]
    assert "1 of 2 are broken and left out" in description


def test_of_a_citys_files_one_kind_is_taken(tmp_path):
    save(tmp_path / "ulm_0_gtFine_instanceIds.png", blocks(26000, kind=np.uint16))
    for kind, picture in (("color", colorize(blocks(0, 2), "toy")),
                          ("labelTrainIds", blocks(0, 2)), ("labelIds", blocks(7, 11))):
        save(tmp_path / f"ulm_0_gtFine_{kind}.png", picture)
        read, description = read_all(tmp_path, "cityscapes")
        assert read == {"ulm_0": [0, 2]}
        assert f"pictures with several files: read {kind}" in description


def test_unreadable_layouts_are_reported_together(tmp_path):
    for i in range(7):
        save(tmp_path / f"{i}.png", blocks(77))
    save(tmp_path / "7.png", blocks(8))
    (tmp_path / "8.png").write_bytes(b"")
    text = refuses_with(["8 of 9", "0.png", "4.png"], data.Layouts, tmp_path, "toy")
    assert len(text.splitlines()) == 7
    assert data.Layouts(tmp_path, "toy", skip_broken=True).names == ["7"]


# -- captions --------------------------------------------------------------------------------------


def own_folder(root, n=5, places=("images/{}.png", "labels/{}.png")):
    """A folder data set: smooth pictures of 40 x 56, ids as labels, no captions."""
    write_classes(root, "sand\nsea 0 0 200\n")
    y, x = np.mgrid[:40, :56].astype(np.uint8)
    image, label = places
    for i in range(n):
        save(root / image.format(f"p{i}"), np.dstack([4 * x, 6 * y, 0 * x + 40 * i]))
        save(root / label.format(f"p{i}"), (x > y).astype(np.uint8))
    return root


def test_captions_of_a_folder(tmp_path):
    root = own_folder(tmp_path, 3)
    file = root / "captions.json"
    content = {"p0.png": "a", "train/p1.JPG": ["b", "c", "d"], "p9": "e"}
    file.write_text(json.dumps(content), "utf-8-sig")
    pairs = data.Pairs(root, size=32)
    assert pairs.captions == {"p0": "a", "p1": ["b", "c", "d"]}
    assert pairs[0]["caption"] == pairs[0, 5]["caption"] == "a"
    assert pairs[1]["caption"] == "b"
    drawn = [pairs[1, seed]["caption"] for seed in range(30)]
    assert set(drawn) == {"b", "c", "d"}
    assert drawn == [pairs[1, seed]["caption"] for seed in range(30)]
    assert pairs.caption(2, torch.ones(8, 8).long(), 4) == "a photo of sea"
    said = "captions for 2 of 3 images; the others are composed of their classes"
    assert said in pairs.description
    file.rename(tmp_path / "mine.json")
    assert data.Pairs(root, size=32, captions=tmp_path / "mine.json")[0]["caption"] == "a"
    file.write_text('{"x0": "a"}')
    refuses_with(["'x0'", "'p0'", "none of the 3"], data.Pairs, root, size=32)


def test_captions_as_text_beside_the_images(tmp_path):
    root = own_folder(tmp_path, 4)
    (root / "images/p1.txt").write_text("a beach\n", "utf-8-sig")
    (root / "images/metadata.jsonl").write_text("{}")
    pairs = data.Pairs(root, size=32)
    assert pairs.captions == {"p1": "a beach"}
    assert "captions for 1 of 4 images" in pairs.description
    assert "images/metadata.jsonl: captions in this form are not read" in pairs.description
    layouts = data.Layouts(root, root)
    assert [layouts.caption(name) for name in layouts.names] == [None, "a beach", None, None]
    (root / "captions.json").write_text('{"p1": ["the sea", "x"]}')
    assert data.Pairs(root, size=32).captions == {"p1": ["the sea", "x"]}
    for place in (root, root / "labels"):
        assert data.Layouts(place, root).caption("p1") == "the sea"


@pytest.mark.parametrize("place, key", [
    ("", "toy_00000001.jpg"), ("", "train/toy/toy_00000001_leftImg8bit.png"),
    ("dataloader", "toy_00000001_gtFine_labelIds")])
def test_official_captions_in_any_spelling(tmp_path, place, key):
    write_city(tmp_path, 2)
    (tmp_path / "captions_train.json").unlink()
    file = tmp_path / place / "cityscapes_caption_train.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({key: "a street"}))
    pairs = data.Pairs("cityscapes", tmp_path, size=64)
    assert pairs.captions == {"toy_00000001": "a street"}


def test_cocos_own_captions(tmp_path):
    images = [{"id": 7, "file_name": "000001.jpg"}, {"id": 3, "file_name": "000002.jpg"}]
    texts = ((3, "x"), (7, "y"), (3, "z"))
    captions = [{"image_id": i, "caption": text} for i, text in texts]
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations/captions_train2017.json"
    file.write_text(json.dumps({"images": images, "annotations": captions}))
    assert data.read_captions(tmp_path, "train") == {"000001": ["y"], "000002": ["x", "z"]}
    assert data.read_captions(tmp_path, "val") == {}


def test_composed_captions():
    names = class_table("cityscapes").names
    compose = data.compose_caption
    assert compose(blocks(10, 0, 13, 10, 0, 10, 255), names) == "a photo of sky, road and car"
    assert compose(blocks(255), names) == "a photo"
    six = "a photo of road, sidewalk, building, pole, traffic sign and vegetation"
    assert compose(blocks(0, 1, 2, 5, 7, 8, 9), names) == six


@pytest.mark.parametrize("content", [
    b"{", b"[1]", b'{"p3": []}', b'{"p3": ["a", 1]}', b'{"p3": "stra\xdfe"}',
    b'{"p3": "\\udc80"}', b'{"images": [{}], "annotations": []}', b"[" * 100_000, None])
def test_captions_that_cannot_be_read(tmp_path, content):
    file = tmp_path / "c.json"
    if content:
        file.write_bytes(content)
    refuses(lambda: data.read_captions(tmp_path, "val", file), "c.json")


# -- the toy world ---------------------------------------------------------------------------------


@pytest.mark.parametrize("domain, value", [
    ("day", "45f8a39ce5b54000"), ("night", "d3178c273b540ff6"), ("fog", "a965a68726175a40"),
    ("snow", "08ba43569f694f45"), ("rain", "2c1d94c59e117c42")])
def test_toy_scenes_are_those_that_the_shipped_weights_were_trained_on(domain, value):
    digest = hashlib.sha256()
    for seed in (*range(20), *range(10_000_000, 10_000_010)):
        image, label, caption = toy_scene(seed, domain)
        digest.update(image.tobytes() + label.tobytes() + caption.encode())
    assert digest.hexdigest().startswith(value)


@pytest.fixture
def small_toy(monkeypatch):
    monkeypatch.setattr(toy, "SPLITS", {"train": (0, 10), "val": (10_000_000, 6)})


def test_toy_items(tmp_path, small_toy):
    pairs = open_dataset("toy:fog", tmp_path, "val", grid=4)
    image, label, caption = toy_scene(10_000_003, "fog")
    item = pairs[3]
    assert len(pairs) == 6
    assert pairs.classes.key == "toy"
    assert pairs.coding == "train"
    assert pairs.names[3] == "toy_10000003"
    assert item["caption"] == caption
    pixels = ((item["image"] + 1) * 127.5).round().byte()
    assert torch.equal(pixels, torch.from_numpy(image).permute(2, 0, 1))
    assert torch.equal(item["label"], torch.from_numpy(label).long())
    assert (label == toy_scene(10_000_003)[1]).all()  # the domains show the same street
    flipped = next(pairs[3, seed] for seed in range(20) if pairs.window(3, seed)[0])
    assert all(torch.equal(flipped[key], item[key].flip(-1)) for key in ("image", "label"))
    still = open_dataset("toy:fog", tmp_path, "val", augment=False)
    assert not any(still.window(0, seed)[0] for seed in range(20))


def test_the_toys_weathers_and_edits(tmp_path, small_toy):
    stamps = set()
    for weather in ("", ":night", ":all"):
        for split in ("train", "val"):
            pairs = open_dataset(f"toy{weather}", tmp_path, split)
            stamps.add(pairs.stamp())
    assert len(stamps) == 6
    assert files(tmp_path) == ["all", "day", "night"]
    assert pairs.edits["targets"] == list(DOMAINS)
    for i, name in enumerate(pairs.names):  # the domains take turns
        assert pairs.captions[name] == toy_scene(10_000_000 + i, DOMAINS[i % 5])[2]
        assert pairs.edits["edits"][name] == list(toy.toy_edit(pairs.captions[name], i))
    for i in range(5):
        prompt, target = toy.toy_edit("a street with trees, in daylight", i)
        assert prompt == f"a street with trees, {toy.PHRASES[target][0]}"
        assert target != "day"
    assert toy.toy_edit("a street", 1) == ("a street, at night", "night")


@pytest.mark.parametrize("words, options", [
    (["test"], dict(split="test")), (["dusk"], dict(data="toy:dusk")), (["64"], dict(size=512)),
    (["--root", "drawn"], dict(root="/proc/nowhere"))])
def test_what_the_toy_world_does_not_have(tmp_path, small_toy, words, options):
    refuses_with(words, open_dataset, **{"data": "toy", "root": tmp_path, **options})


def test_the_toy_world_is_whole_or_not_there(tmp_path, small_toy, monkeypatch):
    """A drawing that fails leaves nothing; of two at once, one wins."""
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(toy, "toy_edit", stop)
    with pytest.raises(KeyboardInterrupt):
        toy.draw(tmp_path, "day")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setattr(toy, "SPLITS", {"train": (0, 3), "val": (0, 3)})
    threads = [threading.Thread(target=toy.draw, args=(tmp_path, "day")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files(tmp_path) == ["day"]
    assert len(open_dataset("toy", tmp_path)) == 3


# -- data sets on disk -----------------------------------------------------------------------------


def test_a_folder_of_ones_own(tmp_path):
    root = own_folder(tmp_path)
    pairs = data.Pairs(root, size=32, grid=8)
    assert pairs.classes.names == ("sand", "sea")
    assert pairs[2]["caption"] == "a photo of sea and sand"
    assert f"{root}, split train: ids of {root}/classes.txt; of 5 of 5 files" in pairs.description
    image, label = pairs.full(1)
    assert image.shape == (3, 32, 48)  # 44.8 rounds to a multiple of 8
    assert label.shape == (32, 48)
    corners = set()
    for seed in range(30):
        item = pairs[1, seed]
        flip, top, left = pairs.window(1, seed)
        whole, whole_label = pairs.full(1, flip)
        assert torch.equal(item["image"], whole[:, top:top + 32, left:left + 32])
        assert torch.equal(item["label"], whole_label[top:top + 32, left:left + 32])
        corners.add((flip, top, left))
    assert corners == set(itertools.product((False, True), (0,), (0, 8, 16)))
    other = data.Pairs(root, split="tset", size=32)
    assert "no images/tset: the training images serve as tset" in other.description
    still = data.Pairs(root, size=32, augment=False)
    assert pairs.window(1) == still.window(1, 5) == (False, 0, 8)
    refuses_with(["30", "multiple"], data.Pairs, root, size=30)


CITY_FILES = {  # file -> what its label holds; one picture has both kinds of ids
    "gtFine/train/ulm/u_gtFine_labelIds": 7,
    "gtFine/train/ulm/u_gtFine_labelTrainIds": 5,
    "gtFine/train/ulm/u_gtFine_color": 0,
    "gtFine/train/bonn/b_gtFine_labelTrainIds": 7,
    "leftImg8bit/train/ulm/u_leftImg8bit": None,
    "leftImg8bit/train/bonn/b_leftImg8bit": None,
    "rgb_anon/night/train/G/n_rgb_anon": None,
    "gt/night/train/G/n_gt_labelIds": 26,
    "gt/night/train/G/n_gt_labelColor": 0,
    "gt/night/train/G/n_gt_invIds": 0,
}


@pytest.mark.parametrize("key, split, contents, names, classes", [
    ("cityscapes", "train", CITY_FILES, ["b", "n", "u"], [7, 13, 0]),
    ("cityscapes:night", "train", CITY_FILES, ["n"], [13]),
    ("ade20k", "train", {"images/training/a": None, "annotations/training/a": 7}, ["a"], [6]),
    ("coco", "val", {"val2017/1": None, "val2017/1.": 181}, ["1"], [170]),
    ("coco", "train", {"images/train2017/1": None, "annotations/train2017/1_labelTrainIds": 12,
                       "annotations/train2017/1": 13}, ["1"], [12]),
    ("own", "val", {"images/val/p": None, "labels/val/p": 1, "images/train/q": None}, ["p"], [1]),
    ("own", "train", {"images/train/s/p": None, "labels/train/s/p": 1,
                      "images/train/p": None, "labels/train/p": 0}, ["p", "s/p"], [0, 1]),
    ("own", "val", {"images/s/p": None, "labels/s/p": 1}, ["s/p"], [1])])
def test_folders_of_data_sets(tmp_path, monkeypatch, key, split, contents, names, classes):
    monkeypatch.chdir(tmp_path)
    for name, value in contents.items():
        shape = (32, 64, 3) if value is None else (32, 64)
        suffix = "jpg" if value is None and key == "coco" else "png"
        name = name.rstrip(".")
        save(tmp_path / f"own/{name}.{suffix}", np.full(shape, value or 0, np.uint8))
    write_classes(tmp_path / "own", "a\nb")
    pairs = data.Pairs(key, "own", split, size=32)
    assert pairs.names == names
    side = 32 if key in ("ade20k", "coco") else 64  # those two are squashed
    assert set(pairs.shapes.values()) == {(32, side)}
    assert [int(pairs.full(i)[1].unique()) for i in range(len(pairs))] == classes
    if key != "own":
        text = refuses_with([key, "own/", "test"], data.Pairs, key, "own", "test")
        assert ".zip" in text
    if (key, names) == ("own", ["p"]):
        refuses_with(["own/images/test"], data.Pairs, key, "own", "test")


def test_two_files_of_one_name(tmp_path):
    root = own_folder(tmp_path, 2)
    save(root / "images/p1.jpg", np.zeros((40, 56, 3), np.uint8))
    refuses_with(["p1.jpg", "p1.png"], data.Pairs, root, size=32)
    save(root / "labels/p1.tif", np.zeros((40, 56), np.uint8))
    refuses_with(["p1.tif", "p1.png"], data.Layouts, root, root)


@pytest.mark.parametrize("image, label", [
    ("p0_color", "p0_color"),  # it ends like a kind of label
    ("stra\u00dfe_e\u0301", "stra\u00dfe_\u00e9")])  # two Unicode forms of one name
def test_odd_names(tmp_path, image, label):
    root = own_folder(tmp_path, 2)
    (root / "images/p1.png").rename(root / f"images/{image}.png")
    (root / "labels/p1.png").rename(root / f"labels/{label}.png")
    (root / "captions.json").write_text(json.dumps({f"{image}.png": "a beach"}))
    pairs = data.Pairs(root, size=32)
    assert pairs.names == ["p0", label]
    assert pairs.captions == {label: "a beach"}
    if image != label:  # alone, p0_color is a colour layout of p0
        assert data.Layouts(root, root).caption(label) == "a beach"


@pytest.mark.parametrize("split", ["**x", "no/../../x", "a" * 300])
def test_splits_that_are_not_there(tmp_path, split):
    root = own_folder(tmp_path, 1, ("images/train/{}.png", "labels/train/{}.png"))
    refuses(lambda: data.Pairs(root, split=split, size=32), str(root))
    write_city(tmp_path / "city", 1)
    refuses_with(["city"], data.Pairs, "cityscapes", tmp_path / "city", split)


def test_broken_pairs_are_reported_together(tmp_path):
    root = own_folder(tmp_path, 6)
    (root / "labels/p0.png").unlink()
    (root / "images/p1.png").unlink()
    (root / "images/p2.png").write_bytes(b"not an image")
    save(root / "labels/p3.png", np.full((40, 56), 9, np.uint8))
    save(root / "labels/p4.png", np.zeros((40, 55), np.uint8))
    words = ["5 of 6", "p0: an image without a label", "p1: a label without an image", "p2.png",
             "p3.png: ", "[9]", "p4: a label of 55 x 40", "--skip-broken"]
    refuses_with(words, data.Pairs, root, size=32)
    pairs = data.Pairs(root, size=32, skip_broken=True)
    assert pairs.names == ["p5"]
    assert "5 of 6 are broken and left out, the first: p0" in pairs.description
    (root / "images/p5.png").write_bytes(b"")
    refuses_with(["6 of 6"], data.Pairs, root, size=32, skip_broken=True)


def test_the_start_reads_headers_and_skip_broken_reads_everything(tmp_path):
    root = own_folder(tmp_path, 3)
    half = root / "images/p1.png"
    half.write_bytes(half.read_bytes()[:90])
    pairs = data.Pairs(root, size=32)
    assert pairs.names == ["p0", "p1", "p2"]
    refuses_with(["p1.png"], pairs.full, 1)
    assert data.Pairs(root, size=32, skip_broken=True).names == ["p0", "p2"]


def test_stamp_changes_with_the_items_and_not_with_their_place(tmp_path):
    root = own_folder(tmp_path / "a", 3)
    shutil.copytree(root, tmp_path / "b")

    def stamp(place=root):
        return data.Pairs(place, size=32).stamp()
    stamps = [stamp()]
    assert stamps == [stamp(tmp_path / "b")] == [stamp(f"{root}/")]
    save(root / "labels/p1.png", np.eye(40, 56, dtype=np.uint8))
    stamps.append(stamp())
    for kind in ("images", "labels"):
        (root / kind / "p0.png").rename(root / kind / "p5.png")
    stamps.append(stamp())
    (root / "captions.json").write_text('{"p1": "a beach"}')
    stamps.append(stamp())
    write_classes(root, "sand\nocean 0 0 200")
    stamps.append(stamp())
    assert len(set(stamps)) == 5
    assert stamp() == stamps[-1]


# -- batches ---------------------------------------------------------------------------------------


def take(n, *args, **options):
    return list(itertools.islice(data.batches(*args, **options), n))


@pytest.fixture(scope="module")
def ten_scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ten")
    write_city(folder, 10)
    return data.Pairs("toy", folder, size=64, grid=4)


def test_batches_depend_on_seed_and_step_alone(ten_scenes):
    torch.manual_seed(7)
    run = take(8, ten_scenes, 4, seed=3)
    left_alone = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(left_alone, torch.rand(1))
    assert run[0]["image"].shape == (4, 3, 64, 64)
    assert run[0]["label"].dtype == torch.int64
    resumed = take(3, ten_scenes, 4, seed=3, start=5)
    by_workers = take(8, ten_scenes, 4, seed=3, workers=2)
    for a, b in zip(run[5:] + run, resumed + by_workers):
        same_run(a, b)
    keys = [key for step in range(5) for key in data.batch_keys(10, 4, 3, step, 0, 1)]
    order = [index for index, _ in keys]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]  # every epoch in its own order
    assert len(set(keys)) == 20  # and with crops of its own
    other = [key for step in range(5) for key in data.batch_keys(10, 4, 4, step, 0, 1)]
    assert order != [index for index, _ in other]


def test_two_ranks_share_batches(ten_scenes):
    run = take(4, ten_scenes, 4, seed=3)
    halves = [take(4, ten_scenes, 2, seed=3, rank=rank, world=2) for rank in (0, 1)]
    for whole, left, right in zip(run, *halves):
        assert torch.equal(whole["image"], torch.cat([left["image"], right["image"]]))
        assert whole["caption"] == left["caption"] + right["caption"]


def test_a_batch_may_be_larger_than_the_data_set():
    count = np.bincount([index for index, _ in data.batch_keys(10, 24, 0, 0, 0, 1)])
    assert sorted(count) == [2] * 6 + [3] * 4


@pytest.mark.parametrize("workers, kind", [(0, "images"), (2, "labels")])
def test_a_file_that_gets_lost_in_the_middle_is_named(tmp_path, workers, kind):
    root = own_folder(tmp_path, 4)
    source = data.batches(data.Pairs(root, size=32), 4, seed=0, workers=workers)
    next(source)
    (root / kind / "p2.png").unlink()
    refuses(lambda: list(itertools.islice(source, 20)), f"{root}/{kind}/p2.png", "No such file")


def children():
    """Process ids of this process's children."""
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def test_workers_ignore_signals_and_a_killed_one_is_one_line(ten_scenes):
    before = children()
    source = data.batches(ten_scenes, 4, seed=0, workers=2)
    next(source), next(source)  # one of each worker: both have started
    workers = children() - before
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(worker, number)
    assert len(list(itertools.islice(source, 8))) == 8
    os.kill(min(workers), signal.SIGKILL)
    refuses(lambda: list(source), "--workers 2", "killed")


# -- writing files ---------------------------------------------------------------------------------


def test_atomic_files_are_whole_or_as_they_were(tmp_path):
    path = tmp_path / f"{'n' * 240}.txt"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), atomic(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert files(tmp_path) == [path.name]
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"


# -- the model, one image --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy_model():
    return sample.load_model()


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """sample.py's command line, in an empty folder -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(judge, "try_to_load_from_cache", lambda *_: None)
    return functools.partial(outcome, sample, capsys, "--device", "cpu")


LAYOUT = HERE / "assets" / "layout_1.png"


def shake(model):
    """Move the adapter a little off its start."""
    for p in model.adapter.parameters():
        p.data += 0.02 * torch.randn_like(p)


def save_changed_adapter(path, kind="controlnet", hint="classes", dataset="toy", classes=None):
    """-> the toy's model with an adapter a little off its start, whose file is `path`."""
    torch.manual_seed(0)
    classes = classes or class_table(dataset)
    model = ALDM(PRESETS["toy"], *load_frozen("toy")[:3], classes, kind, hint)
    shake(model)
    save_adapter(path, model, adapter_meta(kind, hint) | dict(
        dataset=dataset, names=classes.names, palette=classes.palette, file_ids=classes.file_ids,
        void=classes.void))
    return model


def alike(a, b):
    """Equal images, except for the rounding of other batches."""
    return np.abs(np.asarray(a).astype(int) - b).max() <= 1


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_an_image_depends_on_its_own_seed_alone(toy_model, eta):
    """Not on its batch or its place in it; and torch's own random stream is left alone."""
    labels = toy_labels(3)
    prompts = ["a street at night", "", "fog"]
    options = dict(steps=2, eta=eta, cfg=2.0)
    before = torch.get_rng_state()
    at_once = sample.generate(toy_model, labels, prompts, [5, 6, 7], **options)
    assert torch.equal(before, torch.get_rng_state())
    assert at_once.dtype == np.uint8 and at_once.shape == (3, 64, 64, 3)
    in_pairs = sample.generate(toy_model, labels.flip(0), prompts[::-1], [7, 6, 5], batch=2,
                               **options)
    assert alike(in_pairs[::-1], at_once)
    other = sample.generate(toy_model, labels[:1], prompts[:1], [8], **options)
    assert np.abs(other[0].astype(int) - at_once[0]).mean() > 2


def test_seeds_of_images_differ():
    seeds = {sample.image_seed(seed, name) for seed in (0, 1) for name in ("x/0", "x/1", "y/0")}
    assert len(seeds) == 6


def test_generate_pads_with_void_and_crops_back(toy_model):
    label = toy_labels(1)[:, :20, :50]
    seen = []
    images = sample.generate(toy_model, label, ["x"], [0], steps=2,
                             on_step=lambda i, x0: seen.append(x0.shape))
    assert images.shape == (1, 20, 50, 3) and seen == [(1, 16, 8, 16)] * 2
    padded = F.pad(label, (0, 14, 0, 12), value=IGNORE)
    whole = sample.generate(toy_model, padded, ["x"], [0], steps=2)
    assert np.array_equal(images, whole[:, :20, :50])


@pytest.mark.parametrize("kind, hint", ADAPTERS)
def test_every_adapter_samples_from_its_file(kind, hint, tmp_path):
    model = save_changed_adapter(tmp_path / "a.safetensors", kind, hint)
    layout = toy_labels(1)[:, :32, :32], ["night"], [0]
    expected = sample.generate(model, *layout, steps=2)
    loaded = sample.load_model(tmp_path / "a.safetensors")
    assert alike(sample.generate(loaded, *layout, steps=2), expected)


def test_precision_follows_the_device():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert sample.uses_bf16(None, cuda) and not sample.uses_bf16(None, cpu)
    assert sample.uses_bf16("bf16", cpu) and not sample.uses_bf16("fp32", cuda)


def test_a_base_in_the_adapters_own_file_is_used(tmp_path, monkeypatch):
    """As in official ALDM's checkpoints; --sd has precedence."""
    tensors = load_file(HERE / "assets" / "toy.safetensors") | load_file(sample.ADAPTER)
    bias = "model.diffusion_model.out.2.bias"
    tensors[bias] = tensors[bias] + 1
    aldm.save_tensors(tmp_path / "all.safetensors", tensors, adapter_meta("controlnet"))
    other = sample.load_model(tmp_path / "all.safetensors", sd=HERE / "assets" / "toy.safetensors")
    monkeypatch.setattr(aldm, "base_file", mock.Mock(side_effect=InputError("no download")))
    own = sample.load_model(tmp_path / "all.safetensors")
    difference = own.unet.out[2].bias - other.unet.out[2].bias
    assert (difference - 1).abs().max() < 2e-3  # fp16


def test_an_adapter_knows_the_ids_of_its_folder(tmp_path):
    """Ids without a class, too, and the colours of void."""
    (tmp_path / "classes.txt").write_text("void 9 9 9\nroad 1 2 3\nvoid\nsky 4 5 6\n")
    folder = class_table(tmp_path)
    file = tmp_path / "a.safetensors"
    save_changed_adapter(file, dataset=str(tmp_path))
    (tmp_path / "classes.txt").unlink()
    found = sample.adapter_classes(read_adapter(file)[0], file)
    for name in ("names", "palette", "file_ids", "void"):
        assert np.array_equal(getattr(found, name), getattr(folder, name))


def test_class_embeddings(tmp_path, capsys):
    """An adapter without a table wants --class-embeddings; with it, the table is the file's."""
    meta = read_adapter(sample.ADAPTER)[0]
    parts = load_file(sample.ADAPTER)
    table = -parts.pop("layout.table")
    bare = tmp_path / "bare.safetensors"
    aldm.save_tensors(bare, parts, {**meta, "format": "aldm-adapter"})
    embeddings = tmp_path / "embeddings.pth"
    torch.save(table[:19], embeddings)
    torch.save(table[19:], tmp_path / "null_embedding.pth")
    for file, given, sign in ((sample.ADAPTER, None, -1), (sample.ADAPTER, embeddings, 1),
                              (bare, embeddings, 1)):
        model = sample.load_model(file, embeddings=given)
        assert torch.equal(model.layout.table, sign * table)
        assert capsys.readouterr().err == ""
    sample.load_model(bare)
    assert "--class-embeddings" in capsys.readouterr().err


def test_one_layout(cli, tmp_path):
    night = ["--prompt", "a street at night", "--steps", 1]
    code, out, err = cli("--layout", LAYOUT, *night, "--n", 2, "--seed", 3)
    first = pictures(tmp_path / "samples")
    assert code == 0 and {name: p.shape for name, p in first.items()} == {
        "layout_1_3.png": (64, 64, 3), "layout_1_4.png": (64, 64, 3),
        "layout_1_3_grid.png": (142, 3 * 128 + 4, 3)}
    ids = read_layout(LAYOUT, "toy").byte().numpy()
    save(tmp_path / "ids.png", ids)
    (tmp_path / "captions.json").write_text("somebody's own")  # read for --layouts alone
    cli("--layout", "ids.png", *night, "--seed", 4, "--out", "ids")
    assert alike(pictures(tmp_path / "ids")["ids_4.png"], first["layout_1_4.png"])


def test_the_size_of_one_layout(cli, tmp_path):
    for preset, size, shape in (("toy", 0, (130, 200)), ("sd15", None, (130, 200)),
                                ("sd15", 512, (512, 788))):
        label = sample.resize_layout(torch.zeros(130, 200), PRESETS[preset], size)
        assert label.shape == shape
    save(tmp_path / "odd.png", np.zeros((130, 200), np.uint8))
    code, out, err = cli("--layout", "odd.png", "--steps", 1)
    assert pictures(tmp_path / "samples")["odd_0.png"].shape == (64, 98, 3)
    assert "resized to 98 x 64" in err


def test_what_is_read_and_what_is_not_is_said(cli, tmp_path):
    save(tmp_path / "road.png", np.full((64, 64), 7, np.uint8))
    code, out, err = cli("--layout", "road.png", "--steps", 1, "--ids", "own")
    assert "labelIds; road 100 %" in err
    assert "traffic sign 100 %" in cli("--layout", "road.png", "--steps", 1)[2]
    save(tmp_path / "void.png", np.full((64, 64), 255, np.uint8))
    assert "nothing but void" in cli("--layout", "void.png", "--steps", 1)[2]
    code, out, err = cli("--layout", LAYOUT, "--prompt", "street " * 80 + "lighthouse",
                         "--steps", 1)
    assert code == 0 and "77 tokens" in err and "lighthouse\n" in err


def test_other_pictures_are_not_overwritten(cli, tmp_path):
    """The same picture is, and each says in the web UIs' form how it was made."""
    flags = ["--layout", LAYOUT, "--steps", 1]
    for prompt in ("a street at night", "ein Tag in Ōsaka", "a street at night"):
        cli(*flags, "--prompt", prompt, "--negative", "blur")
    assert files(tmp_path / "samples") == ["layout_1_0-2.png", "layout_1_0.png",
                                           "layout_1_0_grid-2.png", "layout_1_0_grid.png"]
    cli(*flags, "--prompt", "a street at night", "--negative", "blur", "--cfg", 2)
    other = save(tmp_path / "other/layout_1.png", blocks(0, 8, 10, 13))
    cli("--layout", other, "--steps", 1, "--prompt", "a street at night", "--negative", "blur")
    assert len(files(tmp_path / "samples")) == 8
    first = Image.open(tmp_path / "samples" / "layout_1_0.png").info["parameters"]
    prompt, negative, facts = first.split("\n")
    assert prompt == "a street at night" and negative == "Negative prompt: blur"
    assert facts.startswith("Steps: 1, Sampler: DDIM, CFG scale: 5, Seed: 0, Size: 64x64, ")
    assert f'Model: "{sample.ADAPTER}", Model step: 1000' in facts
    second = Image.open(tmp_path / "samples" / "layout_1_0-2.png").info["parameters"]
    assert second.startswith("ein Tag in Ōsaka\n")


# -- grids and curves ------------------------------------------------------------------------------


def test_grid():
    a = np.full((4, 6, 3), 10, np.uint8)
    b = np.full((4, 6, 3), 20, np.uint8)
    picture = np.asarray(charts.grid([[a, b], [b]], ["a title too long for its column", "b"]))
    titles, picture = picture[:14], picture[14:]
    wanted = np.full((2 * 8 + 2, 2 * 12 + 2, 3), 255)  # small ones are doubled
    wanted[:8, :12] = 10
    wanted[:8, 14:] = 20
    wanted[10:, :12] = 20
    assert np.array_equal(picture, wanted)
    assert (titles[:, 2:10] < 128).any() and (titles[:, 12:15] == 255).all()


def test_curves(tmp_path):
    """A panel per loss; a falling curve goes from its panel's upper left to the lower right."""
    log, picture = tmp_path / "log.csv", tmp_path / "curves.png"
    lines = [f"{i},{100 - i},{'' if i % 8 else 0.5}," for i in range(1, 60)]
    log.write_text("\n".join(["step,falls,lazy,nothing", *lines, "60"]))  # the last line is torn
    charts.draw_curves(log, picture)
    pixels = np.asarray(Image.open(picture))
    assert pixels.shape == (200, 320, 3)  # no panel for `nothing`
    y, x = np.nonzero((pixels[20:100] == (0, 0, 128)).all(-1))  # navy
    assert y[x == x.min()].max() < 10 and y[x == x.max()].min() > 65 and np.ptp(x) > 300


def test_curves_of_a_log_that_was_edited(tmp_path):
    log, picture = tmp_path / "log.csv", tmp_path / "curves.png"
    charts.draw_curves(log, picture)  # there is none
    for text in ("", "step,falls\n", "step,a\nx,y\n"):
        log.write_text(text)
        charts.draw_curves(log, picture)
    assert not picture.exists()
    log.write_text("step,noise\n1,0.5\nwhat is this?\n2,0.25,3,4\n3,oops\n4,0.125\n")
    assert charts.read_curves(log)["noise"].tolist() == [[1, 0.5], [4, 0.125]]


# -- data sets -------------------------------------------------------------------------------------


@pytest.fixture
def make_flags(tmp_path):
    """Flags that make six images of three layouts and two prompts, into the folder made."""
    source = tmp_path / "in" / "labels"
    save(source / "street1.png", Image.open(LAYOUT))
    save(source / "street2.PNG", Image.open(HERE / "assets" / "layout_2.png"))
    save(source / "wide.png", np.zeros((64, 96), np.uint8))
    (source / "._street1.png").write_text("what macOS leaves")
    captions = {"street1": "a street with trees", "street2": ["one", "two"]}
    (tmp_path / "in" / "captions.json").write_text(json.dumps(captions))
    return ["--layouts", "in", "--prompts", "night scene", "{caption}, in snow", "--steps", 1,
            "--batch", 3, "--cfg", 1, "--out", "made"]


def test_images_become_a_data_set(cli, tmp_path, make_flags):
    assert "2 new images" in cli(*make_flags, "--shard", "1/2")[1]
    assert "4 new images" in cli(*make_flags, "--shard", "0/2")[1]
    pairs = open_dataset(tmp_path / "made", tmp_path / "made", size=64, grid=4)
    assert pairs.classes.names == class_table("toy").names
    captions = {name: pairs[i]["caption"] for i, name in enumerate(pairs.names)}
    assert captions == {
        "street1_0_0": "night scene", "street1_1_0": "a street with trees, in snow",
        "street2_0_0": "night scene", "street2_1_0": "one, in snow",
        "wide_0_0": "night scene", "wide_1_0": "a photo of road, in snow"}
    _, label = pairs.full(pairs.names.index("street2_0_0"))
    assert torch.equal(label, read_layout(tmp_path / "in" / "labels" / "street2.PNG", "toy"))
    image = Image.open(tmp_path / "made" / "images" / "street2_1_0.png")
    assert image.info["parameters"].startswith("one, in snow\nSteps: 1,")
    made = json.loads((tmp_path / "made" / "made.json").read_text())
    assert made["step"] == 1000 and made["data"] == "toy" and made["layouts"] == "in"
    assert {"sd", "class_embeddings", "adapter", "root", "precision"} <= made.keys()


def test_a_data_set_is_continued(cli, tmp_path, make_flags):
    """What is missing comes back the same, also without shards; what exists, or what another shard
    is writing, is not touched."""
    cli(*make_flags, "--shard", "1/2")
    cli(*make_flags, "--shard", "0/2")
    images = tmp_path / "made" / "images"
    before = pictures(images)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "made").glob("*/*.png")}
    (images / "street1_0_0.png").unlink()
    growing = images / ".1_half.part"
    growing.write_text("half")
    lock = os.open(tmp_path / "made", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_SH)
    assert "1 new images" in cli(*make_flags)[1] and growing.exists()
    os.close(lock)
    assert cli(*make_flags)[0] == 0 and not growing.exists()
    assert sum(p.stat().st_mtime_ns != time for p, time in times.items()) == 2
    after = pictures(images)
    assert before.keys() == after.keys()
    assert all(alike(before[name], after[name]) for name in before)


def test_a_data_set_on_a_disk_without_locks(cli, make_flags, monkeypatch):
    missing = mock.Mock(side_effect=OSError(38, "Function not implemented"))
    monkeypatch.setattr(fcntl, "flock", missing)
    assert "1 new images" in cli(*make_flags, "--limit", 1, "--prompts", "night")[1]


@pytest.mark.parametrize("flags, word", [
    ("--prompts day", "night scene"), ("--cfg 2", "cfg 1"), ("--ids own", "ids None"),
    ("--out in", "contains the layouts"), ("--adapter other.safetensors", "step 1000")])
def test_a_data_set_is_continued_with_the_same_flags_only(cli, tmp_path, make_flags, flags, word):
    save_changed_adapter(tmp_path / "other.safetensors")
    cli(*make_flags, "--limit", 1)
    code, out, err = cli(*make_flags, *flags.split())
    assert code == 2 and word in err.splitlines()[-1]


def test_a_damaged_made_json_is_one_line(cli, tmp_path, make_flags):
    cli(*make_flags, "--limit", 1)
    for text in ("{", "[1]", "\0"):
        (tmp_path / "made" / "made.json").write_text(text)
        code, out, err = cli(*make_flags)
        assert code == 2 and "made.json: cannot be read" in err.splitlines()[-1]


def test_our_own_data_sets_serve_as_layouts(cli, tmp_path):
    """Twice round, ADE20K's classes stay what they are."""
    save_changed_adapter(tmp_path / "a.safetensors", dataset="ade20k")
    ids = np.repeat(np.uint8([[0, 1, 19, 149, 255]]), 16, 0).repeat(16, 1)
    save(tmp_path / "in/x.png", np.where(ids == 255, 0, ids + 1).astype(np.uint8))
    flags = ["--adapter", "a.safetensors", "--steps", 1, "--cfg", 1]
    for source, name in (("in", "x_0_0"), ("first", "x_0_0_0_0")):
        out = {"in": "first", "first": "second"}[source]
        assert cli("--layouts", source, "--out", out, *flags)[0] == 0
        label = read_layout(tmp_path / out / "labels" / f"{name}.png", tmp_path / out)
        assert np.array_equal(label, ids)


def test_long_captions_leave_room_for_what_the_prompt_adds(cli, tmp_path):
    save(tmp_path / "in/x.png", Image.open(LAYOUT))
    (tmp_path / "in" / "captions.json").write_text(json.dumps({"x": "street " * 99}))
    code, out, err = cli("--layouts", "in", "--prompts", "{caption}, night scene", "fog",
                         "--steps", 1)
    caption = (tmp_path / "samples" / "images" / "x_0_0.txt").read_text()
    assert caption == "street " * 71 + "street, night scene"
    assert "1 captions were shortened" in err


def test_layouts_in_folders_become_flat_names(cli, tmp_path):
    save(tmp_path / "in/a/x.png", Image.open(LAYOUT))
    flags = ["--layouts", "in", "--steps", 1, "--out"]
    assert cli(*flags, "made")[0] == 0
    assert files(tmp_path / "made" / "images") == ["a_x_0_0.png", "a_x_0_0.txt"]
    save(tmp_path / "in/a_x.png", Image.open(LAYOUT))
    code, out, err = cli(*flags, "other")
    assert code == 2 and "a/x and a_x" in err and not (tmp_path / "other").exists()


# -- evaluation: formulas, against known cases and NumPy -------------------------------------------


def frechet_by_hand(real, fake):
    """real [L,C], fake [M,C]"""
    m1, m2 = real.mean(0), fake.mean(0)
    c1, c2 = np.cov(real.T), np.cov(fake.T)
    cross = np.sqrt(np.linalg.eigvals(c1 @ c2).real.clip(0)).sum()  # of the product itself
    return ((m1 - m2) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * cross


def test_frechet_distance():
    t = torch.tensor
    # With the same axes, it is the sum of (m1 - m2)^2 + (s1 - s2)^2.
    a = t([0., 1.]), t([[9., 0], [0, 1]])
    b = t([2., 1.]), t([[1., 0], [0, 16]])
    assert judge.frechet_distance(*a, *b) == pytest.approx(4 + 4 + 9)
    rng = np.random.default_rng(0)
    few = torch.cov(t(rng.normal(size=(4, 7))).T)  # singular, as of few images
    assert 0 <= judge.frechet_distance(few[0], few, few[0], few) < 1e-6
    real = rng.normal(size=(40, 3))
    fake = rng.normal(size=(30, 3)) + 1
    moments = [t(real.mean(0)), t(np.cov(real.T)), t(fake.mean(0)), t(np.cov(fake.T))]
    expected = frechet_by_hand(real, fake)
    assert judge.frechet_distance(*moments) == pytest.approx(expected, rel=1e-9)


def test_precision_and_recall():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(40, 3))
    fake = rng.normal(size=(30, 3)) + 1
    radius = np.sort(np.linalg.norm(real[:, None] - real, axis=-1), axis=1)[:, 3]
    inside = (np.linalg.norm(fake[:, None] - real, axis=-1) <= radius).any(1).mean()
    found = judge.share_among(torch.tensor(fake), torch.tensor(real))
    assert found == pytest.approx(inside) and 0 < inside < 1
    one_mode = real[:10] * 1e-3  # precise, but without variety
    result = judge.compare([*torch.tensor(real)], [*torch.tensor(one_mode)])
    assert result["precision"] == 1 and result["recall"] < 0.2
    assert result["frechet_distance"] == pytest.approx(frechet_by_hand(real, one_mode), abs=1e-5)


def save_judge(path, names):
    """-> the UperNet of 19 classes, in the toy's size, whose file is `path`."""
    net = UperNet(19, **PRESETS["toy"].segmenter)
    meta = dict(format="aldm-segmenter", preset="toy", dataset="toy", normalize=False, names=names)
    aldm.save_tensors(path, prefixed("segmenter.", net.state_dict()), meta)
    return net


# -- evaluation: a folder of images ----------------------------------------------------------------


class RedSegmenter(nn.Module):
    """Reads the class back from an image whose red is 10 times the class."""

    def __init__(self):
        super().__init__()
        self.device_of = nn.Parameter(torch.zeros(1))

    def features(self, images):
        return [images]

    def forward(self, images):
        classes = ((images[:, 0] + 1) * 12.75).round().long().clamp(max=3)
        return F.one_hot(classes, 4).permute(0, 3, 1, 2)


def in_red(label):
    """label [...,H,W] -> the image uint8 that RedSegmenter reads; void is as class 0"""
    label = np.where(label == IGNORE, 0, label)
    return np.repeat(label[..., None] * 10, 3, -1).astype(np.uint8)


@pytest.fixture
def red_world(tmp_path):
    """A folder with images of five layouts of three classes, and the data set of the real ones.
    Samples 0 and edited images lack class 2, the other two samples class 1."""
    labels = np.random.default_rng(0).integers(0, 3, (5, 8, 8))
    labels[0, 0] = IGNORE
    wrong = np.where(labels == 2, 1, labels)
    worse = np.where(labels == 1, 0, labels)
    folder, root = tmp_path / "drawn", tmp_path / "real"
    for place in (folder, root):
        place.mkdir()
        (place / "classes.txt").write_text("a\nb\nc\n")
    for i in range(5):
        save(root / f"images/val/x{i}.png", in_red(labels[i]))
        save(root / f"labels/val/x{i}.png", labels[i].astype(np.uint8))
        save(folder / f"edited/x{i}.png", in_red(wrong[i]))
        save(folder / f"reconstructed/x{i}.png", in_red(labels[i]))
        for k in range(3):
            save(folder / f"images/x{i}_{k}.png", in_red(worse[i] if k else wrong[i]))
            save(folder / f"labels/x{i}_{k}.png", labels[i].astype(np.uint8))
            (folder / f"images/x{i}_{k}.txt").write_text(f"c{i}")
    edits = {"targets": ["x", "y", "z"], "edits": {f"x{i}": ["!", "xyz"[i % 3]] for i in range(5)}}
    for file in (folder / "edits.json", root / "edits_val.json"):
        file.write_text(json.dumps(edits))
    dataset = open_dataset(root, root, "val", 8, grid=8)
    return SimpleNamespace(labels=labels, wrong=wrong, worse=worse, folder=folder, dataset=dataset)


def iou_by_hand(labels, found):
    valid = labels != IGNORE
    iou = []
    for c in range(3):
        both = (labels == c) & (found == c)
        either = (labels == c) | (found == c)
        iou.append((both & valid).sum() / (either & valid).sum())
    return iou


def red_features(labels):
    return in_red(labels).reshape(len(labels), 64, 3).mean(1) / 127.5 - 1


def always_the_second(images):
    return torch.tensor([[0., 1, 0]]).expand(len(images), 3)


@pytest.mark.parametrize("counted", [1, None])
def test_a_folder_is_judged_as_by_hand(red_world, counted):
    w = red_world
    judges = Judges(RedSegmenter(), always_the_second)
    result = judge_folder(w.folder, w.dataset, judges, counted, batch=2)
    labels, found = w.labels, w.wrong
    if counted is None:
        labels = np.tile(w.labels, (3, 1, 1))
        found = np.concatenate([w.wrong, w.worse, w.worse])
    iou = iou_by_hand(labels, found)
    assert list(result["IoU_generated"].values()) == pytest.approx(iou, abs=1e-5)
    assert result["mIoU_generated"] == pytest.approx(np.mean(iou), abs=1e-5)
    edited = iou_by_hand(w.labels, w.wrong)
    assert list(result["IoU_edited"].values()) == pytest.approx(edited, abs=1e-5)
    assert result["mIoU_real"] == result["mIoU_reconstructed"] == 1 and result["layouts"] == 5
    distance = frechet_by_hand(red_features(w.labels), red_features(found))
    assert result["frechet_distance"] == pytest.approx(distance, abs=1e-4)
    assert result["editability"] == 0.4  # targets x y z x y, answers y
    assert result["editability_of"] == {"x": 0, "y": 1, "z": 0}
    apart = np.linalg.norm(red_features(w.wrong) - red_features(w.worse), axis=1).mean()
    assert result["diversity"] == pytest.approx(apart * 2 / 3, abs=1e-5)  # one pair of 3 is equal
    assert result["clip_score"] is None


def test_another_methods_folder_is_judged(red_world):
    """Images and labels alone, one sample each, as JPEG or with names of other forms."""
    w = red_world
    for kind in ("edited", "reconstructed"):
        shutil.rmtree(w.folder / kind)
    (w.folder / "edits.json").unlink()
    for i in range(5):
        name = ["x0", "x1_0_0", "x2_7", "x3_12_3", "x4"][i]
        (w.folder / f"images/x{i}_0.png").rename(w.folder / f"images/{name}.png")
        (w.folder / f"labels/x{i}_0.png").rename(w.folder / f"labels/{name}.png")
        for k in (1, 2):
            (w.folder / f"images/x{i}_{k}.png").unlink()
    judges = Judges(RedSegmenter(), unjudged=("c",))
    result = judge_folder(w.folder, w.dataset, judges)
    expected = np.mean(iou_by_hand(w.labels, w.wrong)[:2])
    assert result["mIoU_generated"] == pytest.approx(expected, abs=1e-5)
    assert result["IoU_generated"]["c"] is None and result["mIoU_real"] == 1
    for name in ("mIoU_edited", "mIoU_reconstructed", "editability", "diversity", "clip_score"):
        assert result[name] is None
    alone = judge_folder(w.folder, None, judges)
    assert alone["mIoU_generated"] == result["mIoU_generated"]
    for name in ("mIoU_real", "frechet_distance", "precision", "recall"):
        assert alone[name] is None


def test_folders_that_cannot_be_judged(red_world, tmp_path):
    w = red_world
    judges = Judges(RedSegmenter())
    save(w.folder / "images/y_0.png", in_red(w.labels[0]))
    refuses_with(["y_0.png", "real pictures"], judge_folder, w.folder, w.dataset, judges)
    (w.folder / "images/y_0.png").unlink()
    save(w.folder / "labels/x1_0.png", np.zeros((8, 9), np.uint8))
    refuses_with(["x1_0.png", "9 x 8"], judge_folder, w.folder, w.dataset, judges)
    (w.folder / "labels/x1_0.png").unlink()
    refuses_with(["x1_0.png"], judge_folder, w.folder, w.dataset, judges)
    (w.folder / "edits.json").write_text("[]")
    (w.folder / "classes.txt").write_text("a\nb\nd\n")
    refuses_with(["classes.txt"], judge_folder, w.folder, w.dataset, judges)
    (tmp_path / "images").mkdir()
    refuses_with(["no images"], find_samples, tmp_path)


def test_clip_scores_captions_and_edits(red_world):
    """With CLIP, images are compared with their captions, and with targets of any name."""
    w = red_world

    def clip(images, texts):
        if texts == ["p", "q"]:
            return torch.tensor([[1., 0]]).expand(len(images), 2)
        return torch.tensor([float(text[1:]) for text in texts]).diag()
    edits = {"targets": ["p", "q"], "edits": {f"x{i}": ["!", "pq"[i % 2]] for i in range(5)}}
    (w.folder / "edits.json").write_text(json.dumps(edits))
    judges = Judges(RedSegmenter(), always_the_second, clip=clip)
    result = judge_folder(w.folder, w.dataset, judges, batch=2)
    assert result["clip_score"] == 2  # the mean of 0 .. 4
    assert result["editability_of"] == {"p": 1, "q": 0} and result["editability"] == 0.6
    edits = {"targets": ["p"], "edits": {f"x{i}": ["!", "p"] for i in range(5)}}
    (w.folder / "edits.json").write_text(json.dumps(edits))
    assert judge_folder(w.folder, w.dataset, judges)["editability"] is None  # no choice, no figure


def test_drawing_what_is_judged(toy_model, toy_world, tmp_path):
    """n samples of the first layouts, one of the others; each from its own seed and prompt."""
    dataset = open_dataset("toy", toy_world, "val")
    sample.draw_judged(toy_model, dataset, tmp_path, 3, n=2, diverse=1, edits=dataset.edits,
                       seed=4, batch=2, steps=1)
    names = ["toy_10000000", "toy_10000001", "toy_10000002"]
    samples = [f"{names[0]}_0", f"{names[0]}_1", f"{names[1]}_0", f"{names[1]}_1", f"{names[2]}_0"]
    images = pictures(tmp_path / "images")
    labels = pictures(tmp_path / "labels")
    assert list(images) == list(labels) == [f"{name}.png" for name in samples]
    image, label = dataset.full(2)
    assert np.array_equal(labels[f"{names[2]}_0.png"], label)

    seeds = [sample.image_seed(4, f"{names[2]}/{k}") for k in ("0", "edited")]
    prompts = [dataset.captions[names[2]], dataset.edits["edits"][names[2]][0]]
    plain, edited = sample.generate(toy_model, torch.stack([label] * 2), prompts, seeds, steps=1)
    assert alike(images[f"{names[2]}_0.png"], plain)
    assert alike(pictures(tmp_path / "edited")[f"{names[2]}.png"], edited)
    vae = toy_model.vae
    copy = sample.to_pixels(vae.decode(vae.encode(image[None])))[0]
    assert alike(pictures(tmp_path / "reconstructed")[f"{names[2]}.png"], copy)
    assert (tmp_path / "images" / f"{names[2]}_0.txt").read_text() == prompts[0]
    assert find_samples(tmp_path).keys() == set(names)


def test_prompts_are_used_in_turn(toy_model, toy_world):
    dataset = open_dataset("toy", toy_world, "val")
    edits = sample.edit_in_turn(toy_model, dataset, ["{caption}, at dusk", "snow, {caption}"], 3)
    assert edits["targets"] == ["at dusk", "snow"]
    captions = [dataset.captions[name] for name in dataset.names[:3]]
    assert list(edits["edits"].values()) == [
        [f"{captions[0]}, at dusk", "at dusk"], [f"snow, {captions[1]}", "snow"],
        [f"{captions[2]}, at dusk", "at dusk"]]


def test_evaluate_writes_figures_and_images(cli, tmp_path, toy_world, monkeypatch):
    evaluate = ["--evaluate", "--root", toy_world, "--limit", 4, "--steps", 1, "--cfg", 1]
    code, out, err = cli(*evaluate, "--json", "figures.json")
    result = json.loads((tmp_path / "figures.json").read_text(), parse_constant=pytest.fail)
    assert code == 0 and "mIoU" in out and result["IoU_real"]["train"] is None
    assert "fewer than 50 images" in out
    for key in ("mIoU_generated", "mIoU_edited", "mIoU_reconstructed", "mIoU_real",
                "frechet_distance", "precision", "recall", "diversity", "editability"):
        assert result[key] >= 0
    assert result["step"] == 1000 and result["n"] == 2 and result["data"] == "toy"

    assert "has images already" in cli(*evaluate)[2]
    again = ["--evaluate", "samples", "--data", "toy", "--root", toy_world]
    code, table, err = cli(*again)
    assert code == 0 and table.splitlines()[:-1] == out.splitlines()[:-1]
    same = json.loads((tmp_path / "samples" / "evaluation.json").read_text())
    assert all(result[key] == same[key] for key in ("IoU_generated", "diversity", "editability"))

    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(sample, "write_text", full)
    code, out, err = cli(*again)
    assert code > 0 and "No space left" in err
    assert "mIoU" in out  # the figures are shown nevertheless


def test_a_folder_without_real_images_needs_a_judge(cli, tmp_path, toy_world):
    cli("--layouts", "val", "--root", toy_world, "--limit", 2, "--steps", 1, "--out", "made")
    code, out, err = cli("--evaluate", "made")
    assert code == 2 and "--judge" in err and "without --data there are no real images" in err
    save_judge(tmp_path / "judge.safetensors", class_table("toy").names)
    code, out, err = cli("--evaluate", "made", "--judge", "judge.safetensors")
    assert code == 0 and "generated" in out and "real" not in out.splitlines()[0]


# -- judges ----------------------------------------------------------------------------------------


def test_mit_semsegs_judge_leaves_out_classes_it_cannot_tell_apart(tmp_path, monkeypatch):
    """It has one class for person and rider, and one for bus and train."""
    monkeypatch.setitem(PRESETS, "sd15", PRESETS["toy"])
    classes = class_table("cityscapes")
    net = UperNet(150, **PRESETS["toy"].segmenter)
    parts = []
    for part in ("encoder", "decoder"):
        parts.append(tmp_path / f"{part}_epoch_50.pth")
        torch.save(getattr(net, part).state_dict(), parts[-1])
    found, unjudged = judge.load_judge(parts, classes)
    rows = [class_table("ade20k").names.index(name) for name in classes.ade]
    last = net.decoder.conv_last[1].weight
    assert torch.equal(found.decoder.conv_last[1].weight, last[rows])
    assert unjudged == ("person", "rider", "bus", "train")
    assert judge.load_judge(parts, class_table("ade20k"))[1] == ()
    poor = dataclasses.replace(classes, ade=(*[None] * 18, "bicycle"))
    found, unjudged = judge.load_judge(parts, poor)
    *others, seen = found(torch.rand(1, 3, 64, 64)).amax((0, 2, 3))
    assert unjudged == classes.names[:18] and seen > max(others) + 1000


def test_our_own_judge_has_the_size_and_the_classes_of_its_file(tmp_path):
    file, classes = tmp_path / "ours.safetensors", class_table("cityscapes")
    net = save_judge(file, classes.names)
    found, unjudged = judge.load_judge([file], classes)
    last = net.decoder.conv_last[1].weight
    assert unjudged == () and torch.equal(found.decoder.conv_last[1].weight, last)
    save_judge(file, ("a",) * 19)
    refuses_with(["19 classes of toy"], judge.load_judge, [file], classes)
    save_judge(file, None)
    refuses_with([str(file), "names None"], judge.load_judge, [file], classes)


def test_clip_is_used_where_it_is_at_hand(monkeypatch):
    args = SimpleNamespace(sd=None, judge=None, features="clip", device="cpu")
    toy = class_table("toy"), PRESETS["toy"]
    monkeypatch.setattr(judge, "try_to_load_from_cache", lambda *_: "here")
    monkeypatch.setattr(judge, "Clip", lambda path, device: path)
    chosen = judge.choose_judges(args, *toy)
    assert chosen.clip == "here" and chosen.clip_features
    assert isinstance(chosen.classifier, Classifier)
    monkeypatch.setattr(judge, "try_to_load_from_cache", lambda *_: None)
    refuses_with(["--features clip"], judge.choose_judges, args, *toy)
    args.features = "judge"
    assert judge.choose_judges(args, *toy).clip is None


# -- the command line ------------------------------------------------------------------------------


def test_ctrl_c_is_no_traceback(cli, monkeypatch):
    monkeypatch.setattr(sample, "generate", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    code, out, err = cli("--layout", LAYOUT)
    assert code == 130 and "Traceback" not in err


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError(
    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")])
def test_memory_that_a_cpu_does_not_have_is_one_line(cli, monkeypatch, error):
    monkeypatch.setattr(sample, "generate", mock.Mock(side_effect=error))
    code, out, err = cli("--layout", LAYOUT)
    assert code == 1 and "out of memory" in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.parametrize("streams", [">&- 2>/dev/full", "2>&1 | true"])
def test_the_command_as_it_is_started(streams, tmp_path):
    """From another folder. Whoever does not listen loses no file, and the exit code is that of the
    work."""
    line = f"{sys.executable} {HERE / 'sample.py'} --layout {LAYOUT} --steps 1 {streams}"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], cwd=tmp_path)
    assert done.returncode == 0 and len(files(tmp_path / "samples")) == 2


@pytest.fixture
def bad_inputs(tmp_path):
    for name in ("ok", "whole/a", "own/labels/val/a", "empty folder/a"):
        save(tmp_path / f"{name}.png", np.zeros((64, 64), np.uint8))
    save(tmp_path / "own/images/val/a.png", np.zeros((64, 64, 3), np.uint8))
    save(tmp_path / "broken/bad.png", np.full((64, 64), 200, np.uint8))
    (tmp_path / "own" / "classes.txt").write_text("road\nsky\n")
    (tmp_path / "text.png").write_text("not what you think")
    (tmp_path / "empty").mkdir()
    return {p: p.read_bytes() for p in tmp_path.rglob("*.*") if p.is_file()}


@pytest.mark.parametrize("flags, word", [  # a word of the one line that says so
    ("", "--evaluate"), ("--layout ok.png --layouts val", "--layouts"),
    ("--layout ok.png --prompt \udcff", "UTF-8"), ("--layouts val --shard 2/2", "i/n"),
    ("--layout ok.png --steps 0", "1 to 1000"), ("--layout ok.png --out text.png", "text.png"),
    ("--layout text.png", "text.png"), ("--layout no.png", "no such file"),
    ("--layout whole", "use --layouts"), ("--layouts ok.png", "use --layout "),
    ("--layouts test --root ROOT", "no such folder; as a split"), ("--layouts empty", "no layouts"),
    ("--layouts val --size 0", "--size 0"),
    ("--layouts whole --out whole", "--out"), ("--layouts whole --out own", "other images"),
    ("--layouts val --prompt night", "use --prompts"),
    ("--layout ok.png --prompts night", "use --prompt "),
    ("--evaluate --captions ok.png --root ROOT", "ok.png"), ("--evaluate own", "--judge"),
    ("--evaluate empty", "needs a folder with images/"), ("--evaluate --json empty", "empty"),
    ("--layout ok.png --adapter no.safetensors", "no.safetensors"),
    ("--layout ok.png --sd ADAPTER", "unet"),
    ("--layout ok.png --class-embeddings text.png", "text.png"),
    ("--layout ok.png --data ade20k", "150"),
    ("--evaluate --judge ADAPTER --root ROOT", "toy_aldm.safetensors")])
def test_bad_input_to_sample_is_one_line(flags, word, cli, tmp_path, bad_inputs, toy_world):
    argv = flags.replace("ADAPTER", str(sample.ADAPTER)).replace("ROOT", str(toy_world)).split()
    code, out, err = cli(*argv)
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith("sample.py: ") and word in last, err
    assert "Traceback" not in err
    assert all(p.read_bytes() == content for p, content in bad_inputs.items())
    assert set(tmp_path.rglob("*.png")) == {p for p in bad_inputs if p.suffix == ".png"}


@pytest.mark.parametrize("flags, word", [
    ("--layout ok.png --data toy", "elsewhere"), ("--evaluate --data own --root own", "--judge")])
def test_adapters_of_other_classes_are_refused(flags, word, cli, tmp_path, bad_inputs):
    other = tmp_path / "other.safetensors"
    save_changed_adapter(other, dataset="elsewhere", classes=class_table(tmp_path / "own"))
    code, out, err = cli("--adapter", other, *flags.split())
    assert code == 2 and word in err.splitlines()[-1]


# -- the page --------------------------------------------------------------------------------------


LABEL = toy_scene(3)[1]


@contextlib.contextmanager
def running(models, **options):
    """The page's server, in a thread."""
    prompts = ["a street at night", "</script><b>"]
    server = painter(models, 0, [LABEL], prompts, steps=4, cfg=2.0, **options)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def server(toy_model):
    with running({"ALDM": toy_model}) as server:
        yield server


def shipped_judges():
    return judge.toy_judges(load_weights(aldm.base_file("toy")), class_table("toy"), "cpu")


@pytest.fixture(scope="module")
def toy_segmenter():
    return shipped_judges().segmenter


@pytest.fixture(scope="module")
def pair_server(toy_model, toy_segmenter):
    """Compares two adapters."""
    models = {"noise loss": sample.load_model(paint.TOY["noise loss"]), "ALDM": toy_model}
    with running(models, segmenter=toy_segmenter) as server:
        yield server


REQUEST = {"prompt": "a street", "seed": 0, "steps": 2, "cfg": 1}
PNG = as_png(colorize(LABEL, "toy"))


def call(server, path="/generate", words=REQUEST, body=PNG, method="POST", headers=()):
    """-> status, text"""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, f"{path}?{urlencode(words)}", body, dict(headers))
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def painted(server, body=PNG, **more):
    """-> the lines of an answer"""
    status, text = call(server, words={**REQUEST, **more}, body=body)
    assert status == 200, text
    return [json.loads(line) for line in text.splitlines()]


def painted_image(server, body=PNG, **more):
    """-> the image of the only adapter, as base64"""
    image, done = painted(server, body, **more)[-2:]
    assert done["done"]
    return image["image"]


def pixels(text):
    """A PNG as base64 -> uint8 [H,W,3]"""
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    assert image.format == "PNG" and image.mode == "RGB"
    return np.array(image)


def open_page(server):
    """-> its text, and what the server has filled in"""
    status, text = call(server, "/", method="GET")
    assert status == 200
    return text, json.loads(text.split('id="world">')[1].split("</script>")[0])


def test_page(server):
    text, world = open_page(server)
    assert world["titles"] == ["ALDM"] and not world["judged"]
    assert server.server_address[0] == "127.0.0.1"
    assert world["width"] == world["height"] == 64 and world["prompts"][1] == "</script><b>"
    assert base64.b64decode(world["examples"][0]) == LABEL.tobytes()
    assert world["names"][:2] == ["road", "sidewalk"] and world["palette"][0] == [128, 64, 128]
    for word in ('src="http', "@import", "url(http", '<link rel="stylesheet'):
        assert word not in text


def test_the_same_seed_streams_the_same_picture(server):
    lines = painted(server, seed=5, cfg=2)
    assert [line["step"] for line in lines if "step" in line] == [1, 2]
    image = lines[-2]["image"]
    assert pixels(image).shape == (64, 64, 3) and "errors" not in lines[-2]
    assert painted_image(server, seed=5, cfg=2) == image
    assert painted_image(server, seed=6, cfg=2) != image
    assert painted_image(server, as_png(LABEL), seed=5, cfg=2) == image
    assert 2 <= sum("preview" in line for line in painted(server, steps=12)) <= 6
    assert "zebra" in painted(server, prompt="street " * 90 + "zebra")[0]["note"]


def test_two_adapters_paint_the_same_request(pair_server, server, toy_segmenter):
    """Each as if it were alone; every line says whose it is."""
    _, world = open_page(pair_server)
    assert world["titles"] == ["noise loss", "ALDM"] and world["judged"]
    *lines, done = painted(pair_server, seed=5, steps=2)
    assert done["done"] and done["seconds"] > 0
    steps = [(line["adapter"], line["step"]) for line in lines if "step" in line]
    assert steps == [(0, 1), (0, 2), (1, 1), (1, 2)]
    first, second = [line for line in lines if "image" in line]
    assert (first["adapter"], second["adapter"]) == (0, 1)
    assert second["image"] == painted_image(server, seed=5, steps=2) != first["image"]
    for line in (first, second):
        wrong, share = find_wrong(toy_segmenter, pixels(line["image"]), torch.tensor(LABEL))
        red = (pixels(line["errors"]) == (230, 0, 0)).all(2)
        assert np.array_equal(red, wrong) and line["wrong"] == share == wrong.mean()


def test_what_is_wrong_in_a_picture(toy_segmenter):
    """Hardly anything in a real one, much in its mirror image; only labelled pixels count."""
    image, label, _ = toy_scene(10_000_003)
    label = torch.tensor(label)
    assert find_wrong(toy_segmenter, image, label)[1] < 0.05
    assert find_wrong(toy_segmenter, image[:, ::-1].copy(), label)[1] > 0.15
    label[:32] = IGNORE
    label[32:] = 18  # a bicycle: not in the toy world
    wrong, share = find_wrong(toy_segmenter, image, label)
    assert not wrong[:32].any() and share == wrong[32:].mean() > 0.9
    assert find_wrong(toy_segmenter, image, torch.full_like(label, IGNORE))[1] == 0


def test_layout_files_in_the_page(server):
    big = LABEL.repeat(3, 0).repeat(5, 1)  # resized by nearest
    reply = json.loads(call(server, "/layout", {}, as_png(big))[1])
    assert reply["size"] == [320, 192]
    assert base64.b64decode(reply["layout"]) == LABEL.tobytes()
    ids = as_png(np.full((64, 64), 8, np.uint8))  # label id 8 is sidewalk
    for name, c in (("a_labelTrainIds.png", 8), ("a_gtFine_labelIds.png", 1), ("", 8)):
        reply = json.loads(call(server, "/layout", {"name": name}, ids)[1])
        assert set(base64.b64decode(reply["layout"])) == {c}


@pytest.mark.parametrize("words, body, says", [
    ({"steps": 1001}, PNG, "steps"), ({"steps": 2.5}, PNG, "steps"), ({"seed": -1}, PNG, "seed"),
    ({"cfg": float("nan")}, PNG, "cfg"), ({}, b"GIF89a", "the layout: "),
    ({}, as_png(Image.new("RGB", (64, 64), (1, 2, 3))), "[1, 2, 3]")])
def test_bad_requests_are_one_line(server, words, body, says):
    status, text = call(server, words={**REQUEST, **words}, body=body)
    error = json.loads(text)["error"]
    assert status == 400 and says in error and "\n" not in error and " at 0x" not in error


def test_only_from_here_and_not_too_large(server):
    port = server.server_port
    foreign = [{"Origin": origin} for origin in (
        "http://evil.example", "null", "http://[::1/", f"http://localhost:{port + 1}")]
    foreign += [{"Host": host} for host in (
        f"evil.example:{port}", "localhost", f"127.0.0.1:{port + 1}", "", "http://[::1/")]
    for headers in foreign:
        assert call(server, headers=headers)[0] == 400
        assert call(server, "/", method="GET", headers=headers)[0] == 400
    headers = {"Origin": f"http://localhost:{port}", "Host": f"localhost:{port}"}
    assert call(server, headers=headers)[0] == 200
    for length in ("99999999999", "-1", "1e3"):
        assert str(BODY) in call(server, headers={"Content-Length": length})[1]


@pytest.mark.parametrize("method, status", [("GET", b"200"), ("POST", b"400")])
def test_odd_paths_get_an_answer(server, method, status):
    port = server.server_port
    for path in ("http://[::1/", "//[::1/", "/%ff%00", "/generate?%"):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: localhost:{port}\r\n"
                               "Content-Length: 0\r\n\r\n".encode())
            assert connection.makefile("rb").read().startswith(b"HTTP/1.0 " + status)


def test_a_client_that_leaves_stops_its_generation(server, capfd):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    send_step = PageHandler.send_step
    with mock.patch.object(PageHandler, "send_step", autospec=True, side_effect=send_step) as sent:
        connection.request("POST", "/generate?seed=0&steps=1000&cfg=1", PNG)
        with connection.getresponse() as answer:
            assert answer.readline()
        connection.close()
        assert painted(server, seed=1)[-1]["done"]
    assert sent.call_count < 500
    assert capfd.readouterr().err == ""


def test_two_clients_are_answered_in_turn(server):
    alone = painted_image(server, seed=1)
    results = {}
    threads = [threading.Thread(target=lambda k=k: results.update({k: painted(server, seed=k)}))
               for k in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[2][-1]["done"] and results[1][-2]["image"] == alone


def test_a_failure_is_one_line_and_the_server_lives_on(server, monkeypatch):
    monkeypatch.setattr(paint, "generate", mock.Mock(side_effect=RuntimeError("no\n memory")))
    assert painted(server)[-1] == {"error": "the generation failed: no memory"}
    monkeypatch.undo()
    assert painted(server)[-1]["done"]


@pytest.mark.parametrize("flags, titles, judged", [
    ("", ["noise loss", "ALDM"], True), ("--adapter ALDM ALDM", ["ALDM"], False),
    ("--adapter ALDM other", ["ALDM", "other"], True),
    ("--sd unjudged", ["noise loss", "ALDM"], False)])
def test_what_the_page_compares(flags, titles, judged, tmp_path, monkeypatch):
    """The toy's two adapters, or those named; the judge is in the toy's base file, or missing."""
    monkeypatch.chdir(tmp_path)
    Path("ALDM").symlink_to(sample.ADAPTER)
    save_changed_adapter("other")
    parts = load_file(aldm.base_file("toy"))
    save_file({n: t for n, t in parts.items() if not n.startswith("judge.")}, "unjudged")
    monkeypatch.setattr(sys, "argv", ["paint.py", "--device", "cpu", *flags.split()])
    args = paint.parse_args()
    args.device = torch.device("cpu")
    models = paint.load_models(args)
    assert [*models] == titles
    assert (paint.toy_segmenter(args, models) is not None) == judged


@pytest.mark.parametrize("adapters, word", [
    (["ALDM", "other"], "their classes or presets differ"), (["ALDM"] * 3, "one or two, not 3")])
def test_adapters_that_are_not_compared(adapters, word, tmp_path, monkeypatch, capsys, bad_inputs):
    monkeypatch.chdir(tmp_path)
    Path("ALDM").symlink_to(sample.ADAPTER)
    save_changed_adapter("other", dataset="elsewhere", classes=class_table(tmp_path / "own"))
    code, out, err = outcome(paint, capsys, "--device", "cpu", "--adapter", *adapters)
    assert code == 2 and out == "" and word in err.splitlines()[-1]


def test_the_page_as_it_is_started(tmp_path):
    """From another folder; Ctrl-C ends it without a traceback."""
    argv = [sys.executable, HERE / "tools" / "paint.py", "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    line = process.stdout.readline().decode()
    port = int(re.search(r"http://127.0.0.1:(\d+)", line)[1])
    status, text = call(SimpleNamespace(server_port=port), "/", method="GET")
    assert status == 200 and "Paint a layout" in text
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and b"Traceback" not in err


# -- training: killed, stopped, out of room --------------------------------------------------------


@pytest.fixture
def train_cli(flags, capsys):
    """train.py's command line, after these flags -> exit code, stdout, stderr."""
    return functools.partial(outcome, train, capsys, *flags)


def start(*argv, **kw):
    return subprocess.Popen([sys.executable, "train.py", *map(str, argv)], cwd=HERE, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **kw)


def until(process, condition):
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)


def end(process, code):
    """The process ends with this code and no traceback -> the lines of its stderr."""
    err = process.communicate()[1]
    assert process.returncode == code, f"exit {process.returncode}, not {code}:\n{err}"
    assert "Traceback" not in err
    return notes(err)


def notes(err):
    """The lines of stderr without those of progress bars and of what was read."""
    lines = [line for line in re.split("[\r\n]", err) if line.strip()]
    return [line for line in lines if "it/s" not in line and "s/it" not in line
            and not re.search("split (train|val)|judging what|training; every", line)]


def rows(out):
    log = out / "log.csv"
    return log.read_text().count("\n") - 1 if log.exists() else 0


def saved_steps(out):
    return [int(p.stem[-7:]) for p in sorted(out.glob("checkpoint_0*.pt"))]


def leftovers(out):
    return [name for name in files(out) if name.startswith(".")]


@pytest.fixture
def one_thread(monkeypatch):
    """Several threads need not round alike on a busy machine."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(2)


def test_a_killed_run_ends_as_if_it_had_not_been_killed(flags, train_cli, tmp_path, monkeypatch,
                                                        one_thread):
    whole, out = tmp_path / "whole", tmp_path / "parts"
    assert train_cli("--out", whole, "--eval", 2)[0] == 0  # judging does not disturb the run

    run_ = start(*flags, "--out", out, "--resume")  # there is nothing to resume
    until(run_, lambda: rows(out) == 2 and leftovers(out) != [])
    run_.kill()  # in the midst of writing the first checkpoint
    assert any("step 0" in line for line in end(run_, -signal.SIGKILL))
    assert rows(out) == 2 and leftovers(out) != []

    run_ = start(*flags, "--out", out, "--resume")
    until(run_, lambda: rows(out) == 3)
    run_.send_signal(signal.SIGSTOP)
    code, _, err = train_cli("--out", out, "--resume")
    assert code == 2 and "another run is writing here" in err
    run_.kill()  # between two checkpoints
    end(run_, -signal.SIGKILL)
    code, _, err = train_cli("--out", out)
    assert code == 2 and "--resume" in err and len(notes(err)) == 1

    stop_at(monkeypatch, {4: signal.SIGTERM, 5: signal.SIGHUP, 7: signal.SIGINT})
    for step, number in (4, signal.SIGTERM), (5, signal.SIGHUP), (7, signal.SIGINT):
        code, _, err = train_cli("--out", out, "--resume")
        assert code == 128 + number and f"stopped at step {step}; continue with --resume" in err
        assert rows(out) == saved_steps(out)[-1] == step
        assert read_adapter(out / "adapter.safetensors")[0]["step"] == step
    (out / "before.json").write_text((whole / "before.json").read_text())
    assert train_cli("--out", out, "--resume", "--eval", 2)[0] == 0
    same_folder(whole, out)

    content = {p: p.read_bytes() for p in out.iterdir()}
    code, _, err = train_cli("--out", out, "--resume", "--eval", 2)
    assert code == 0 and "finished already" in err
    assert content == {p: p.read_bytes() for p in out.iterdir()}


def stop_at(monkeypatch, moments):
    """Send the process a signal after certain steps, once each."""
    log = Run.log

    def log_and_signal(run, losses):
        if run.done + 1 in moments:
            signal.raise_signal(moments.pop(run.done + 1))
        log(run, losses)
    monkeypatch.setattr(Run, "log", log_and_signal)


def same_folder(whole, out):
    """Two runs of 8 steps have left the same files, bit for bit."""
    judged = [json.loads((folder / "judged.json").read_text()) for folder in (whole, out)]
    assert judged[0].pop("seconds") > 0 and judged[1].pop("seconds") > 0
    assert judged[0]["before"]["layouts"] == 2 and judged[0]["step"] == 8
    assert judged[0] == judged[1]
    assert (whole / "log.csv").read_text() == (out / "log.csv").read_text()
    assert rows(out) == 8 and leftovers(out) == []
    a, b = (torch.load(folder / "checkpoint_0000008.pt", weights_only=True)
            for folder in (whole, out))
    assert a.keys() == {"step", "meta", "flags", "adapter", "layout", "discriminator", "opt_g",
                        "opt_d"}
    same_run(a, b)
    same_run(load_file(whole / "adapter.safetensors"), load_file(out / "adapter.safetensors"))
    log = csv.DictReader((out / "log.csv").read_text().splitlines())
    assert [row["step"] for row in log if row["D_mIoU"]] == ["3", "6", "8"]
    assert saved_steps(whole) == [6, 8]
    drawn = [name for name in files(out) if name.startswith("step")]
    assert drawn == [f"step_000000{i}.png" for i in (3, 6, 8)]
    assert all((whole / name).read_bytes() == (out / name).read_bytes() for name in drawn)


def test_a_signal_before_the_first_step(flags, tmp_path):
    """While what the adapter starts from is judged."""
    out = tmp_path / "out"
    run_ = start(*flags, "--eval", 4, "--out", out, start_new_session=True)
    until(run_, lambda: (out / "log.csv").exists())
    os.killpg(run_.pid, signal.SIGTERM)  # as a terminal does: to all of its processes
    assert end(run_, 128 + signal.SIGTERM) == [] and files(out) == ["log.csv"]


def test_a_second_signal_ends_a_run_at_once(flags, tmp_path):
    run_ = start(*flags, "--steps", 1000, "--save-every", 1000, "--out", tmp_path / "out")
    until(run_, lambda: rows(tmp_path / "out") >= 1)
    run_.send_signal(signal.SIGSTOP)  # so that both arrive within one step
    run_.send_signal(signal.SIGINT)
    run_.send_signal(signal.SIGTERM)
    run_.send_signal(signal.SIGCONT)
    run_.communicate()
    assert run_.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    assert saved_steps(tmp_path / "out") == []


def test_a_signal_with_loading_processes_saves(flags, tmp_path):
    out = tmp_path / "out"
    run_ = start(*flags, "--steps", 1000, "--save-every", 1000, "--workers", 2, "--out", out,
                 start_new_session=True)
    until(run_, lambda: rows(out) >= 2)
    os.killpg(run_.pid, signal.SIGTERM)
    lines = end(run_, 128 + signal.SIGTERM)
    assert len(lines) == 1 and "stopped at step" in lines[0] and saved_steps(out) == [rows(out)]


def test_full_disk(train_cli, tmp_path):
    assert train_cli("--out", tmp_path, "--steps", 2)[0] == 0
    before = (tmp_path / "checkpoint_0000002.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, limits[1]))  # a checkpoint has 30 MB
    try:
        code, _, err = train_cli("--out", tmp_path, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1 and "disk" in err and "Traceback" not in err
    assert f"last good checkpoint: {tmp_path / 'checkpoint_0000002.pt'}" in err
    assert (tmp_path / "checkpoint_0000002.pt").read_bytes() == before
    assert leftovers(tmp_path) == [] and saved_steps(tmp_path) == [2]


def test_what_users_take_is_restored_with_the_checkpoint(train_cli, tmp_path):
    """As after a kill between the checkpoint and the export, or when somebody deletes it."""
    flags = ("--out", tmp_path, "--steps", 10, "--save-every", 1, "--discriminator", "none",
             "--sample-every", 99)
    assert train_cli(*flags)[0] == 0
    written = [name for name in files(tmp_path) if "adapter" in name]
    assert written == ["adapter.safetensors", "adapter_0000010.safetensors"]
    for lost in written:
        meta, parts = read_adapter(tmp_path / lost)
        (tmp_path / lost).unlink()
        assert train_cli(*flags, "--resume")[0] == 0
        again, restored = read_adapter(tmp_path / lost)
        assert again == meta and meta["step"] == 10
        assert same(restored["adapter"], parts["adapter"])
    saved = torch.load(tmp_path / "checkpoint_0000010.pt", weights_only=True)
    assert saved.keys() == {"step", "meta", "flags", "adapter", "layout", "opt_g"}  # and no D


def test_a_longer_run_is_judged_anew(train_cli, tmp_path):
    """A finished run made longer, and killed before its verdict: it is not "finished already"."""
    flags = ("--out", tmp_path, "--eval", 1, "--no-before", "--discriminator", "none")
    train_cli(*flags, "--steps", 1)
    verdict = (tmp_path / "judged.json").read_text()
    train_cli(*flags, "--steps", 2, "--resume")
    (tmp_path / "judged.json").write_text(verdict)
    train_cli(*flags, "--steps", 2, "--resume")
    assert json.loads(verdict)["step"] == 1
    assert json.loads((tmp_path / "judged.json").read_text())["step"] == 2


def test_weights_that_overflow_are_not_exported(train_cli, tmp_path):
    """A learning rate of 1e30: the run ends with 1, and the last good adapter stays."""
    flags = ("--out", tmp_path, "--discriminator", "none", "--sample-every", 99)
    assert train_cli(*flags, "--steps", 2)[0] == 0
    content = (tmp_path / "adapter.safetensors").read_bytes()
    code, _, err = train_cli(*flags, "--steps", 4, "--lr", 1e30, "--warmup", 1, "--resume")
    assert code == 1 and "Traceback" not in err
    assert (tmp_path / "adapter.safetensors").read_bytes() == content


# -- the folder of a run, with next to nothing to train --------------------------------------------


def run_args(out, **kw):
    args = dict(out=out, steps=1, resume=False, seed=0, save_every=1, keep=1)
    return SimpleNamespace(**args | kw)


def little_run(out, steps=4, step=None, stream=itertools.count, **kw):
    """A run of a layer with two weights, to which each step adds one -> the layer, and the steps at
    which it was saved. step(i): more losses."""
    layer, saved = nn.Linear(2, 1, bias=False), []
    nn.init.zeros_(layer.weight)
    args = run_args(out, **dict(steps=steps, keep=2) | kw)
    meta = {"dataset": "toy", "names": ["road"]}
    with Run(args, {"layer": layer}, meta, ["noise", "dropped"]) as run:
        batches = stream(run.first)
        for i in run:
            run.next(batches)
            layer.weight.data += 1
            losses = {"noise": torch.rand(()), "dropped": torch.tensor(0.)}
            run.log(losses | (step(i) if step else {}))
            if run.saved:
                saved.append(run.done)
    return layer, saved


def test_the_randomness_of_a_step_comes_from_its_number_the_seed_and_the_process(tmp_path,
                                                                                 monkeypatch):
    def draws(name, steps, **kw):
        drawn = []

        def step(i):
            drawn.append(torch.rand(()).item())
            return {}
        little_run(tmp_path / name, steps, step, **kw)
        return drawn
    whole, other = draws("whole", 4), draws("other", 4, seed=1)
    assert draws("parts", 2) + draws("parts", 4, resume=True) == whole
    monkeypatch.setattr(runs, "rank", lambda: 1)
    assert len({*whole, *other, *draws("third", 4)}) == 12


def test_keeps_the_last_checkpoints(tmp_path):
    (tmp_path / "checkpoint_best.pt").write_text("somebody's own")
    _, saved = little_run(tmp_path, 47, save_every=2, keep=3)
    assert saved_steps(tmp_path) == [44, 46, 47] and rows(tmp_path) == 47
    assert "checkpoint_best.pt" in files(tmp_path)
    assert saved == [*range(2, 47, 2), 47]


FOURS = b"\0\0\x80\x40\0\0\x80\x40"  # the weights (4, 4)
DAMAGE = {
    "truncated": lambda b: b[:len(b) // 2],
    "empty": lambda b: b"",
    "a flipped byte": lambda b: b.replace(FOURS, b"\0\0\x81\x40\0\0\x80\x40")}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint(damage, tmp_path, capsys):
    little_run(tmp_path)
    log = (tmp_path / "log.csv").read_text()
    newest, before = tmp_path / "checkpoint_0000004.pt", tmp_path / "checkpoint_0000003.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    (tmp_path / "log.csv").write_bytes(log.encode()[:-9] + b"\xff")  # and a log that was torn
    capsys.readouterr()
    layer, _ = little_run(tmp_path, resume=True)  # falls back to the one before
    lines = notes(capsys.readouterr().err)
    assert len(lines) == 1 and str(newest) in lines[0] and "damaged" in lines[0]
    assert layer.weight.tolist() == [[4, 4]] and (tmp_path / "log.csv").read_text() == log
    for path in newest, before:
        path.write_bytes(damage(path.read_bytes().replace(b"\0\0\x40\x40", b"\0\0\x80\x40")))
    with pytest.raises(InputError, match="as are all checkpoints"):
        little_run(tmp_path, resume=True)


LIES = {  # checkpoints that are whole, but not what they say
    "a list": lambda c: [1, 2],
    "no meta": lambda c: {key: value for key, value in c.items() if key != "meta"},
    "a negative step": lambda c: c | {"step": -3},
    "flags 5": lambda c: c | {"flags": 5}}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_checkpoint_that_lies(lie, tmp_path, capsys):
    little_run(tmp_path)
    newest = tmp_path / "checkpoint_0000004.pt"
    torch.save(lie(torch.load(newest, weights_only=True)), newest)
    layer, _ = little_run(tmp_path, resume=True)
    assert "damaged; going back to checkpoint_0000003.pt" in capsys.readouterr().err
    assert layer.weight.tolist() == [[4, 4]]


OTHER_NETWORKS = [  # the fused optimiser would read past the end of smaller moments
    {"layer": {"bias": torch.zeros(1)}}, {"layer": {"weight": torch.zeros(1, 3)}}, {"layer": 5},
    {"opt": {"state": {}}}, {"opt": []}, {"moments": {7: {"exp_avg": torch.zeros(1, 2)}}},
    {"moments": {0: {"exp_avg": None}}}, {"moments": {0: {"exp_avg": torch.zeros(2, 1)}}},
    {"moments": {0: {"exp_avg_sq": torch.zeros(3)}}},
    {"moments": {0: {"exp_avg_sq": torch.zeros(7, 2)}}}]


@pytest.mark.parametrize("change", OTHER_NETWORKS)
def test_a_checkpoint_of_other_networks(change, tmp_path):
    layer = nn.Linear(2, 1, bias=False)
    opt = torch.optim.AdamW(layer.parameters(), fused=True)
    state, saved = {"layer": layer, "opt": opt}, tmp_path / "checkpoint_0000001.pt"
    content = {name: part.state_dict() for name, part in state.items()} | change
    if "moments" in change:
        content["opt"]["state"] = content.pop("moments")
    torch.save({"step": 1, "meta": {}, "flags": {}, **content}, saved)
    with pytest.raises(InputError, match="another kind of training"):
        Run(run_args(tmp_path, resume=True), state, {}, ["dropped"]).__enter__()


def test_what_is_kept_beside_a_damaged_checkpoint(tmp_path):
    """A damaged one that is further on replaces neither a good one nor a row of the log."""
    little_run(tmp_path, save_every=2)
    (tmp_path / "checkpoint_0000004.pt").write_bytes(b"")

    def one_more(first):
        yield first
        raise InputError("an image is gone")
    with pytest.raises(Stopped, match="an image is gone.*checkpoint_0000003"):
        little_run(tmp_path, 9, save_every=9, keep=1, resume=True, stream=one_more)
    assert saved_steps(tmp_path) == [3, 4] and rows(tmp_path) == 3


DROPPED = [  # is step i dropped? steps, why the run stops, its rows, its checkpoints
    (lambda i: 3 <= i < 11 or i in (23, 30), 99, "10 of the last 31", 31, [18, 30]),
    (lambda i: i % 2 == 0, 99, "10 of the last 19", 19, [12, 18]),
    (lambda i: True, 3, "3 of the last 3", 3, []),
    (lambda i: i == 6, 7, "1 of the last 7", 7, [6])]  # the last step of a run


@pytest.mark.parametrize("name", ["dropped", "D_dropped"])
@pytest.mark.parametrize("is_dropped, steps, why, last, saved", DROPPED)
def test_steps_that_are_not_finite_stop_a_run(is_dropped, steps, why, last, saved, name, tmp_path):
    def step(i):
        return {name: torch.tensor(float(is_dropped(i)))}
    with pytest.raises(Stopped, match=f"{why} .* last good checkpoint"):
        little_run(tmp_path, steps, step=step, save_every=6)
    assert rows(tmp_path) == last and saved_steps(tmp_path) == saved


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    """As SIGHUP under nohup: a run outlives the terminal."""
    handled = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        def hang_up(i):
            signal.raise_signal(signal.SIGHUP)
            return {}
        runs.run_command("x", lambda: little_run(tmp_path, step=hang_up))
    finally:
        signal.signal(signal.SIGHUP, handled)
    assert saved_steps(tmp_path) == [3, 4]


def test_one_run_holds_a_folder(tmp_path):
    """Whatever becomes of its files; whoever holds it removes all half-written ones."""
    (tmp_path / ".4711.checkpoint_0000002.pt.part").write_text("half, of a container's process")
    args = run_args(tmp_path, resume=True)
    target = tmp_path / "linked"
    target.write_text("precious")
    (tmp_path / ".lock").symlink_to(target)
    with Run(args, {}, {}, ["dropped"]):
        assert not list(tmp_path.glob(".*.part"))
        (tmp_path / ".lock").unlink()
        with pytest.raises(InputError, match="another run is writing here"):
            Run(args, {}, {}, ["dropped"]).__enter__()
    assert target.read_text() == "precious"
    with Run(args, {}, {}, ["dropped"]):
        pass  # it is free again


LAYOUTS = [torch.channels_last, torch.contiguous_format]


@pytest.mark.parametrize("first, second", [LAYOUTS, LAYOUTS[::-1]])
def test_a_run_continues_where_weights_lie_otherwise_in_memory(first, second, tmp_path):
    """A GPU's checkpoint on a CPU, and the reverse: only there the adapter is channels_last."""
    def train_conv(out, steps, layout, resume):
        torch.manual_seed(0)
        conv = nn.Conv2d(8, 8, 3).to(memory_format=layout)
        opt = torch.optim.AdamW(conv.parameters(), lr=0.01, fused=True)
        args = run_args(out, steps=steps, resume=resume, save_every=9)
        with Run(args, {"conv": conv, "opt": opt}, {}, ["dropped"]) as run:
            for _ in run:
                conv(torch.randn(2, 8, 5, 5)).square().mean().backward()
                run.log({"dropped": train.update(opt, {"noise": torch.ones(())})})
        return conv.weight.detach()
    train_conv(tmp_path / "moved", 3, first, resume=False)
    moved = train_conv(tmp_path / "moved", 6, second, resume=True)
    stayed = train_conv(tmp_path / "stayed", 6, second, resume=False)
    assert torch.allclose(moved, stayed, atol=1e-5)


# -- a step ----------------------------------------------------------------------------------------


def setting(**kw):
    args = dict(d_start=0, lazy=1, discriminator="trained", lambda_adv=1., ramp=(0, 1),
                starts_below=4, unroll=1, judged=9, ddim_steps=4, unroll_grad="first",
                fake_weight=0.5, device="cpu", precision="fp32", lr=1e-3, lr_d=1e-3)
    return SimpleNamespace(**args | kw)


def make_trainee(adapter="controlnet"):
    """Model, discriminator, their optimisers, and a batch."""
    model, D = tiny_model(adapter), UperNet(20, **PRESETS["toy"].segmenter)
    scenes = [toy_scene(i) for i in range(2)]
    images = np.stack([image for image, _, _ in scenes])
    items = {"image": sample.from_pixels(images, "cpu"), "label": toy_labels(2, first=0),
             "caption": [caption for _, _, caption in scenes]}
    optimizers = train.optimizers(model, D.eval().requires_grad_(False), setting())
    return model, D, *optimizers, train.prepare(model, items)


POISON = {  # -> the updates that are dropped: the adapter's, D's
    "latents": (1, 1), "a gradient": (1, 0), "D's loss": (0, 1), "D's weights": (1, 1)}


@pytest.mark.parametrize("what", POISON)
def test_a_step_that_is_not_finite_is_dropped(what):
    model, D, opt_g, opt_d, batch = make_trainee()
    inf = float("inf")

    def step(batch, **kw):
        return train.train_step(model, D, opt_g, opt_d, [batch], 5, setting(**kw))

    def states():
        parts = (model.adapter, opt_g), (D, opt_d)
        return copy.deepcopy([[part.state_dict() for part in pair] for pair in parts])
    losses = step(batch)
    assert losses["dropped"] == losses["D_dropped"] == 0
    before, poisoned = states(), dict(batch)
    if what == "latents":
        poisoned["x0"] = batch["x0"].index_fill(0, torch.tensor(1), float("nan"))
    elif what == "a gradient":
        weight = next(model.adapter.parameters())
        hook = weight.register_hook(lambda gradient: gradient * inf)
    elif what == "D's weights":
        D.decoder.conv_last[1].bias.data[0] = inf
        before[1][0]["decoder.conv_last.1.bias"][0] = inf
    losses = step(poisoned, fake_weight=inf if what == "D's loss" else 0.5)
    assert (losses["dropped"], losses["D_dropped"]) == POISON[what]
    assert set(losses) == {"noise", "adv", "D_real", "D_fake", "D_caught", "dropped", "D_dropped"}
    for was_dropped, old, new in zip(POISON[what], before, states()):
        if was_dropped:
            same_run(old, new)
        else:
            with pytest.raises(AssertionError):
                same_run(old, new)
    if what == "a gradient":
        hook.remove()
    if what != "D's weights":
        assert step(batch)["dropped"] == 0  # and the next one is as ever


def noise_gradient(model, D, opt_g, opt_d, micro_batches):
    """The gradient of the noise loss with which the adapter is updated. The randomness is that of a
    scene, wherever in a batch it stands."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda x: torch.sin(1000 * x))
        patch.setattr(torch, "randint", lambda low, high, size, device=None: torch.full(
            size, (low + high) // 2))
        trained = model.adapter.parameters()
        patch.setattr(opt_g, "step", lambda: seen.extend(
            p.grad.flatten() for p in trained if p.grad is not None))
        losses = train.train_step(model, D, opt_g, opt_d, micro_batches, 5,
                                  setting(discriminator="none"))
    return torch.cat([*seen, losses["noise"].view(1)])


def halves(batch):
    return [{key: value[i:i + 1] for key, value in batch.items()} for i in range(2)]


def near(a, b):
    return a.abs().max() > 0 and (a - b).abs().max() < 1e-4 * a.abs().max()


def test_accumulated_batches_are_one_batch():
    *parts, batch = make_trainee()
    joint = noise_gradient(*parts, [batch])
    parted = noise_gradient(*parts, halves(batch))
    half = noise_gradient(*parts, halves(batch)[:1])
    assert near(joint, parted) and not near(joint, half)


def slow_step(model, D, batch, args, weight):
    """Sec. 3 as it is written, with none of our savings: class embeddings looked up pixel by pixel,
    a graph through the whole UNet, every estimate decoded and judged on its own, loops over images
    and classes, a second pass for D's fakes. weight: L_adv's.
    -> losses, gradients of the adapter, gradients of D"""
    label, x0, context = batch["label"], batch["x0"], batch["context"]
    a = model.schedule.alphas_cumprod
    timesteps = model.schedule.ddim_timesteps(args.ddim_steps).tolist()
    noise = torch.randn_like(x0)  # the same draws, in the same order
    start = torch.randint(args.unroll, args.ddim_steps, (len(x0),)).tolist()
    shown = torch.randint(0, args.unroll + 1, (len(x0),)).tolist()
    embeddings = model.layout.table[label.where(label != IGNORE, 19)].permute(0, 3, 1, 2)
    hint, n_valid = F.avg_pool2d(embeddings, 2), (label != IGNORE).sum()
    model.unet.requires_grad_(True)

    def balanced(logits):
        """1/C times the mean over the classes present of each class's mean CE."""
        chosen = label.where(label != IGNORE, 0)[:, None]
        ce = -F.log_softmax(logits, 1).gather(1, chosen)[:, 0]
        present = [c for c in range(19) if (label == c).any()]
        n = len(present) * logits.shape[1]
        return sum(ce * (label == c) * n_valid / ((label == c).sum() * n) for c in present)

    def chain():
        estimates, predicted = [], []
        x = [a[t].sqrt() * x0[i] + (1 - a[t]).sqrt() * noise[i]
             for i, t in enumerate(timesteps[s] for s in start)]
        for k in range(args.unroll + 1):
            t = [timesteps[s - k] for s in start]
            x_t, t_k = torch.stack(x), torch.tensor(t)
            eps = model.unet(x_t, t_k, context, control=model.adapter(x_t, t_k, context, hint))
            predicted.append(eps)
            x0_hat = [(x[i] - (1 - a[t[i]]).sqrt() * eps[i]) / a[t[i]].sqrt()
                      for i in range(len(x))]
            estimates.append(torch.stack(x0_hat))
            if k < args.unroll:
                prev = [timesteps[s - k - 1] for s in start]
                x = [a[p].sqrt() * x0_hat[i] + (1 - a[p]).sqrt() * eps[i]
                     for i, p in enumerate(prev)]
                x = x if args.unroll_grad == "full" else [v.detach() for v in x]
        return predicted[0], estimates

    def judge(estimate):
        images = [model.vae.decode(z[None]).clamp(-1, 1) for z in estimate]
        return balanced(torch.cat([D(image) for image in images]))

    eps, estimates = chain()
    maps = [judge(estimate) for estimate in estimates]
    if args.unroll_grad == "first":  # the official code's: L_0 / stop(L_0) * mean
        mean = torch.stack([maps[0], *(m.detach() for m in maps[1:])]).mean(0)
        mean = maps[0] / maps[0].detach().where(maps[0] != 0, 1) * mean
    else:
        mean = torch.stack(maps).mean(0)
    noise_loss, adv = ((eps - noise) ** 2).mean(), mean.sum() / n_valid
    (noise_loss + weight * adv).backward()
    grads = [p.grad.clone() for p in model.adapter.parameters()]

    with torch.no_grad():
        estimates = chain()[1]
        fakes = torch.stack([estimates[k][i] for i, k in enumerate(shown)])
        fakes = model.vae.decode(fakes).clamp(-1, 1)
        real = model.vae.decode(x0).clamp(-1, 1)
    D.train().requires_grad_(True)
    real_logits, fake_logits = D(torch.cat([real, fakes])).chunk(2)
    d_real = balanced(real_logits).sum() / n_valid
    d_fake = -F.log_softmax(fake_logits, 1)[:, 19].mean()
    (d_real + args.fake_weight * d_fake).backward()
    losses = {"noise": noise_loss, "adv": adv, "D_real": d_real, "D_fake": d_fake}
    return losses, grads, [p.grad for p in D.parameters()]


@pytest.mark.parametrize("mode", ["first", "each", "full"])
def test_a_step_computes_what_the_paper_says(mode):
    """The fast step has the losses and gradients of the plain, slow one."""
    seen, (model, D, opt_g, opt_d, batch) = {}, make_trainee()
    shake(model)
    slow_model, slow_D = copy.deepcopy(model), copy.deepcopy(D)
    # At step 5 the ramp gives a quarter of lambda_adv, which is large, since an untrained D has
    # hardly a gradient to give.
    args = setting(unroll=2, unroll_grad=mode, lambda_adv=4e4, ramp=(4, 8))
    for opt in opt_g, opt_d:
        parameters = opt.param_groups[0]["params"]
        opt.step = functools.partial(keep_gradients, seen, opt, parameters)
    torch.manual_seed(0)
    losses = train.train_step(model, D, opt_g, opt_d, [batch], 5, args)
    torch.manual_seed(0)
    want, adapter_grads, d_grads = slow_step(slow_model, slow_D, batch, args, weight=1e4)
    for name, value in want.items():
        assert torch.allclose(losses[name], value, rtol=1e-4), name
    # D learns with the statistics of its batch: over four images they amplify rounding.
    for got, grads, error in ((seen[opt_g], adapter_grads, 1e-3), (seen[opt_d], d_grads, 1e-2)):
        got, wanted = (torch.cat([g.flatten() for g in gradients]) for gradients in (got, grads))
        assert wanted.norm() > 1e-4 and (got - wanted).norm() < error * wanted.norm()


def keep_gradients(seen, opt, parameters):
    seen[opt] = [p.grad.clone() for p in parameters]


def test_d_sees_each_estimate_equally_often():
    """Of K = 3 estimates and x0_hat(t), whatever M are judged."""
    images = {k: torch.full((8000, 1, 1, 1), float(k)) for k in range(4)}
    torch.manual_seed(0)
    for M in (1, 2, 3):
        count = torch.zeros(4)
        for _ in range(50):
            judged = train.draw_judged_steps(3, M)
            shown = torch.randint(0, 4, (8000,))
            seen = {k: images[k] for k in (0, *judged)}
            fakes = train.pick_fakes(seen, judged, shown)
            count += torch.bincount(fakes.flatten().long(), minlength=4)
        assert len(judged) == M and count.sum() == 400_000
        assert (count / count.sum() - 0.25).abs().max() < (0.2 if M < 3 else 0.01)
        assert abs(count[0] / count.sum() - 0.25) < 0.01


TWO_PROCESSES = """
import sys, torch, train
sys.path.insert(0, {tests!r})
from {module} import halves, make_trainee, noise_gradient
build, kept, job = train.build, [], train.train
train.build = lambda args: kept.append(build(args)) or kept[0]
def check_and_train(args):
    *parts, batch = make_trainee()
    gradient = noise_gradient(*parts, [halves(batch)[train.rank()]])
    job(args)
    model, D, *_ = kept[0]
    torch.save([gradient, model.adapter.state_dict(), D.state_dict()], f"rank{{train.rank()}}.pt")
train.train = check_and_train
train.main()
"""


def test_torchrun(flags, tmp_path):
    """Two processes of one image each: their gradient is that of both images, and they train the
    same networks."""
    tests = Path(__file__)
    script = TWO_PROCESSES.format(tests=str(tests.parent), module=tests.stem)
    (tmp_path / "two.py").write_text(script)
    paths = os.pathsep.join([str(HERE), str(tests.parent)])
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                    "--standalone", tmp_path / "two.py", *flags, "--batch", "1", "--steps", "2",
                    "--out", "out"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths},
                   check=True, timeout=300)
    *parts, batch = make_trainee()
    one, two = (torch.load(tmp_path / f"rank{i}.pt", weights_only=True) for i in range(2))
    same_run(one, two)
    assert near(noise_gradient(*parts, [batch]), one[0])
    saved = torch.load(tmp_path / "out" / "checkpoint_0000002.pt", weights_only=True)
    same_run(saved["adapter"], one[1])
    same_run(saved["discriminator"], one[2])
    assert rows(tmp_path / "out") == 2 and leftovers(tmp_path / "out") == []


def test_a_rank_without_the_rest_of_torchrun_is_one_line(train_cli, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    code, _, err = train_cli("--out", tmp_path / "out")
    assert code == 2 and "WORLD_SIZE" in err and err.count("\n") == 1


# -- the cache -------------------------------------------------------------------------------------


@pytest.fixture
def city(toy_world):
    """Eight scenes in Cityscapes' folders, at some size."""
    return functools.partial(open_dataset, "cityscapes", toy_world / "day", grid=4)


def test_the_cache_changes_nothing_but_the_time(city, tmp_path):
    model, both = tiny_model(), []
    cache = train.Cache(tmp_path, city(size=64), model)
    for source in city(size=64), cache:
        torch.manual_seed(3)
        batch = train.prepare(model, next(data.batches(source, 4, seed=0)))
        both.append((batch, train.plain_loss(model, batch)[0].item()))
    (a, loss_a), (b, loss_b) = both
    assert torch.equal(a["label"], b["label"]) and loss_a == pytest.approx(loss_b, rel=1e-3)
    assert torch.allclose(a["x0"], b["x0"], atol=2e-3)
    assert torch.allclose(a["context"], b["context"], atol=2e-3)


def test_a_cached_crop_is_cut_from_the_latents_of_the_whole(city, tmp_path):
    model, wide = tiny_model(), city(size=32)
    cut = train.Cache(tmp_path, wide, model)
    places = set()
    for key in data.batch_keys(8, 8, 0, 0, 0, 1):
        item, cached = wide[key], cut[key]
        flip, top, left = wide.window(*key)
        image, _ = wide.full(key[0], flip)
        top, left = top // 4, left // 4
        moments = torch.cat(model.vae.moments(image[None]), 1)[0]
        moments = moments[:, top:top + 8, left:left + 8]
        assert torch.allclose(moments, cached["moments"].float(), atol=5e-3)
        assert torch.equal(item["label"], cached["label"].long())
        places.add((flip, top, left))
    assert {flip for flip, *_ in places} == {False, True}


def test_a_cache_is_made_once_and_serves_only_what_it_was_made_of(city, toy_world, tmp_path):
    model = tiny_model()
    train.Cache(tmp_path, city(size=64), model)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    damaged = tmp_path / "00000003.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-9])  # a damaged file is made anew, and nothing else
    train.Cache(tmp_path, city(size=64), model)
    assert damaged.read_bytes() == content
    assert [path for path, t in times.items() if path.stat().st_mtime_ns != t] == [damaged]
    next(model.vae.parameters()).data *= 1.01
    with pytest.raises(InputError, match="choose another folder"):
        train.Cache(tmp_path, city(size=64), model)
    next(model.vae.parameters()).data /= 1.01
    label = next((toy_world / "day").glob("gtFine/train/*/*"))
    content = label.read_bytes()
    save(label, np.zeros((64, 64), np.uint8))  # another label
    with pytest.raises(InputError, match="choose another folder"):
        train.Cache(tmp_path, city(size=64), model)
    label.write_bytes(content)


def test_the_cache_has_all_captions(city, tmp_path):
    model = tiny_model()
    for captions, words in (('{"toy_00000000": ["one", "two"]}', ["one", "two"]), ("{}", None)):
        (tmp_path / "captions.json").write_text(captions)
        pairs = city(size=64, captions=tmp_path / "captions.json")
        cache = train.Cache(tmp_path / str(words), pairs, model)
        words = words or [pairs[0]["caption"]]
        for seed in range(2):
            context = model.text.encode(words)[seed % len(words)]
            assert torch.allclose(cache[0, seed]["context"].float(), context, atol=2e-3)


# -- fast, and the same ----------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_compute_the_same(recompute):
    """--compile changes neither values nor gradients nor names."""
    plain = nn.ModuleDict({"vae": ResnetBlock(32, 64, 8)})
    compiled, x = copy.deepcopy(plain), torch.randn(2, 32, 16, 16)
    compiled.vae = compiled["vae"]
    args = SimpleNamespace(device="cpu", compile=True, recompute=recompute)
    train.make_fast(compiled, nn.Identity(), args)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    values = [net["vae"](x) for net in (plain, compiled)]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert torch.allclose(*values, atol=1e-5)
    for value in values:
        value.square().mean().backward()
    assert all(near(p.grad, q.grad) for p, q in zip(plain.parameters(), compiled.parameters()))
    assert list(plain.state_dict()) == list(compiled.state_dict())


@pytest.mark.parametrize("adapter, mode", [("controlnet", "first"), ("oft", "each"),
                                           ("controlnet", "full")])
def test_recomputed_blocks_compute_the_same(adapter, mode):
    found = []
    for recompute in False, True:
        model, D, _, _, batch = make_trainee(adapter)
        shake(model)
        args = SimpleNamespace(device="cpu", compile=False, recompute=recompute)
        train.make_fast(model, D, args)
        args = setting(unroll_grad=mode)
        loss, *_ = train.adversarial_loss(model, D, batch, 1e5, args)
        loss.backward()
        found.append((loss, torch.cat([p.grad.flatten() for p in model.adapter.parameters()])))
    (loss_a, grad_a), (loss_b, grad_b) = found
    assert torch.allclose(loss_a, loss_b) and near(grad_a, grad_b)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive; with fake tensors, without having them."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for t in filter(torch.is_tensor, tree_leaves(result)):
            storage = t.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.drop, storage._cdata)
        return result

    def drop(self, key):
        self.now -= self.sizes.pop(key)


def norm_in_fp32(self, x):
    """A norm as CUDA's autocast computes it; the CPU's keeps bf16."""
    if isinstance(self, nn.GroupNorm):
        return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(),
                            self.eps)
    return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(),
                        self.eps)


def peak_memory(flags):
    """GiB that live tensors take at most in a noise step and in an adversarial step with D's, at
    SD's size in bf16."""
    common_flags = "--data cityscapes --device cpu --precision bf16 --out nowhere"
    args = train.parse_args(f"{common_flags} {flags}".split())
    preset, B, side = PRESETS["sd15"], args.batch, args.size // 8
    with torch.device("meta"):
        unet, vae, text = UNet(preset.unet), VAE(preset.vae), TextEncoder(**preset.text)
        model = ALDM(preset, unet.bfloat16(), vae, text, class_table("cityscapes"), args.adapter,
                     "classes", torch.empty(20, 768)).to("meta")
        D = UperNet(20, **preset.segmenter)
        train.make_fast(model, D, args)
    flash = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION)
    norms = [mock.patch.object(kind, "forward", norm_in_fp32)
             for kind in (nn.GroupNorm, nn.LayerNorm)]
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, LiveBytes() as live, flash, norms[0], norms[1]:
        for module in model, D:
            module.to_empty(device="cpu")
        optimizers = train.optimizers(model, D, args)
        for opt in optimizers:  # AdamW's moments
            for p in opt.param_groups[0]["params"]:
                p.grad = torch.empty_like(p)
            train.update(opt, {})
        label = torch.zeros(B, args.size, args.size, dtype=torch.int64)
        batch = {"label": label, "x0": torch.randn(B, 4, side, side),
                 "context": torch.randn(B, 77, 768)}
        peaks, args.ramp = [], (0, 1)
        for step in 9, 8:
            live.peak = live.now
            train.train_step(model, D, *optimizers, [batch] * args.accumulate, step, args)
            peaks.append(live.peak / 2 ** 30)
    return peaks


def test_batch_4_of_512_pixels_with_9_unrolled_steps_fits_a_24_gb_card():
    noise, adversarial = peak_memory("--batch 4 --size 512 --unroll 9 --judged 9 --recompute")
    assert 8 < noise < adversarial < 20.5  # room for cuDNN and the allocator


# -- the discriminator's start, rate and fakes -----------------------------------------------------


FAKES = [  # loss, steps below which chains start -> twelfths of the fakes at each of six timesteps
    (lambda *a: train.adversarial_loss(*a)[2], 6, [1, 2, 3, 3, 2, 1]),
    (lambda model, D, batch, _, args: train.loss_and_fakes(model, batch, args)[2], 6, [2] * 6),
    (lambda model, D, batch, _, args: train.loss_and_fakes(model, batch, args)[2], 5, [2] * 6)]


@pytest.mark.parametrize("loss, starts_below, shares", FAKES)
def test_the_discriminator_sees_every_t(loss, starts_below, shares):
    """Its fakes are estimates at every step of the DDIM subset: with K = 3 a start in 3, 4, 5, then
    one of the four from there down; before the ramp all alike, whatever --t-max is."""
    schedule = Schedule()

    def eps(x_t, t, *_):  # the noise that makes the estimate t / 1000
        a = schedule.a(t)
        return (x_t - a.sqrt() * t.view(-1, 1, 1, 1) / 1000) / (1 - a).sqrt()

    def blind(image):
        return torch.zeros(len(image), 20, 2, 2)
    model = SimpleNamespace(schedule=schedule, encode_layout=lambda label: None, eps=eps,
                            vae=SimpleNamespace(decode=lambda z: z[:, :3]))
    batch = {"label": torch.zeros(4000, 2, 2).long(), "x0": torch.randn(4000, 4, 2, 2),
             "context": None}
    args = setting(unroll=3, ddim_steps=6, starts_below=starts_below)
    fakes = loss(model, blind, batch, 1.0, args)
    t = (fakes[:, 0, 0, 0] * 1000).round().long()
    share = (t[:, None] == schedule.ddim_timesteps(6)).float().mean(0).numpy()
    assert share.sum() == pytest.approx(1)
    assert np.abs(share - np.array(shares) / 12).max() < 4 * np.sqrt(0.25 * 0.75 / 4000), share


TURNS = [  # step, flags -> the losses that the step has
    (5, {}, {"noise", "adv", "D_real", "D_fake", "D_caught"}),
    (5, {"discriminator": "frozen"}, {"noise", "adv"}),
    (5, {"discriminator": "none"}, {"noise"}),
    (5, {"lazy": 2}, {"noise"}),
    (4, {"ramp": (4, 8)}, {"noise", "D_real", "D_fake", "D_caught"}),  # before the ramp
    (4, {"ramp": (4, 8), "d_start": 5}, {"noise"}),
    (5, {"d_start": 6}, {"noise", "adv"})]


@pytest.mark.parametrize("step, flags, names", TURNS)
def test_which_losses_a_step_has(step, flags, names):
    *parts, batch = make_trainee()
    losses = train.train_step(*parts, [batch], step, setting(**flags))
    assert {name for name in losses if "dropped" not in name} == names


def test_the_discriminators_schedule_is_the_official_one_cycle():
    """By PyTorch's own OneCycleLR, stepped at D's updates: every eighth step, from step 16 on."""
    args = SimpleNamespace(lr_d=1e-6, d_start=16, lazy=8, d_warmup=200, d_cycle=120_000, steps=99,
                           d_beta1=(0.95, 0.85))
    opt = torch.optim.AdamW([torch.zeros(1)], lr=1)
    official = torch.optim.lr_scheduler.OneCycleLR(
        opt, 1e-6, total_steps=120_001, pct_start=201 / 120_001, div_factor=10,
        final_div_factor=100)
    for update in range(2000):
        rate, beta1 = train.one_cycle(args, 16 + 8 * update)
        assert rate == pytest.approx(official.get_last_lr()[0], rel=1e-3)
        assert beta1 == pytest.approx(opt.param_groups[0]["betas"][0], rel=1e-3)
        opt.step()
        official.step()
    ends = [train.one_cycle(args, 0)[0], train.one_cycle(args, 16 + 8 * 120_000)[0]]
    args.d_cycle, args.steps = None, 16 + 8 * 1000  # the toy: the run's own updates
    last = train.one_cycle(args, args.steps)[0]
    assert [*ends, last] == pytest.approx([1e-7, 1e-9, 1e-9])


def test_the_rate_of_the_adapter():
    opt = torch.optim.AdamW([torch.zeros(1)], lr=1)
    rates = []
    for warmup, step in (20, 0), (20, 9), (20, 19), (20, 500), (1, 0):
        train.set_rates(opt, None, step, SimpleNamespace(lr=2e-3, warmup=warmup))
        rates.append(opt.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-4, 1e-3, 2e-3, 2e-3, 2e-3])


def test_settings_of_data_sets():
    """The official training's, unless a flag says otherwise; --preset toy takes the toy's."""
    for argv, want in (
            ("--data cityscapes", dict(lr=1e-5, warmup=1, d_warmup=200, d_cycle=120_000, unroll=9)),
            ("--data ade20k", dict(lr=2e-5, d_warmup=24, d_cycle=25_000, lambda_adv=0.5)),
            ("--data coco --lr 1e-4", dict(lr=1e-4, ramp=(10_000, 15_000), fake_weight=0.001)),
            ("--data cityscapes --preset toy --lazy 5", dict(lr=5e-4, size=64, lazy=5)),
            ("--data toy --seed 3", dict(steps=250, preset="toy", adapter="controlnet", seed=3))):
        args = train.parse_args([*argv.split(), "--out", "nowhere", "--device", "cpu"])
        assert {name: getattr(args, name) for name in want} == want
        assert args.precision == "fp32" and args.workers == 0


def test_what_a_run_starts_from_stands_in_its_files(train_cli, tmp_path):
    """A discriminator from mit-semseg's files sees ImageNet's mean and deviation, the toy's does
    not; --init, the judge and a resumed run know it. --init takes its file's kind of adapter."""
    encoder, decoder = tmp_path / "encoder.pth", tmp_path / "decoder.pth"
    first, second, third = (tmp_path / name for name in "123")
    checkpoint = first / "checkpoint_0000002.pt"
    ade = UperNet(150, **PRESETS["toy"].segmenter)
    torch.save(ade.encoder.state_dict(), encoder)
    torch.save(ade.decoder.state_dict(), decoder)
    semseg = ("--segmenter", encoder, decoder)
    for argv in (
            (*semseg, "--adapter", "t2i", "--lr", 0.1, "--steps", 2, "--out", first),
            ("--init", checkpoint, "--lr", 1e-9, "--steps", 1, "--out", second),
            ("--steps", 1, "--out", third)):
        assert train_cli(*argv)[0] == 0
    (meta, before), (meta_2, after), (meta_3, _) = (
        read_adapter(path) for path in (checkpoint, second, third))
    assert [m["normalize"] for m in (meta, meta_2, meta_3)] == [True, True, False]
    assert meta_2["adapter"] == "t2i" and before["adapter"]["conv_in.weight"].abs().max() > 0.01
    for name, t in before["adapter"].items():
        assert torch.allclose(t, after["adapter"][name].float(), atol=2e-3)
    net = UperNet(20, **PRESETS["toy"].segmenter)
    load_segmenter([checkpoint], net, class_table("cityscapes"))
    assert net.normalize
    code, _, err = train_cli("--steps", 2, "--out", third, "--resume", *semseg)
    assert code == 2 and "normalize" in err


def test_a_resumed_run_tells_what_differs(train_cli, toy_world, tmp_path):
    """Flags and the number of images, but not where the data set lies."""
    flags = ("--out", tmp_path / "run", "--discriminator", "none")
    assert train_cli(*flags, "--steps", 1)[0] == 0
    moved = tmp_path / "moved"
    shutil.copytree(toy_world / "day", moved)
    for file in (*moved.rglob("toy_00000003*"), moved / "captions_train.json"):
        file.unlink()
    code, _, err = train_cli(*flags, "--root", moved, "--steps", 2, "--resume", "--lr", 1e-4,
                             "--batch", 1, "--seed", 5)
    told = [line for line in notes(err) if "the run was started with" in line]
    assert code == 0 and len(told) == 1
    for words in "seed 0, now 5", "batch 2, now 1", "lr 0.001, now 0.0001", "images 8, now 7":
        assert words in told[0]


# -- half precision, and devices -------------------------------------------------------------------


@pytest.mark.parametrize("adapter", sorted(dict(ADAPTERS)))
def test_half_precision(adapter):
    """A step and a picture in bf16 are those of fp32, roughly."""
    found = []
    for precision in "fp32", "bf16":
        model, D, opt_g, opt_d, batch = make_trainee(adapter)
        torch.manual_seed(0)
        args = setting(precision=precision, unroll=0)
        losses = train.train_step(model, D, opt_g, opt_d, halves(batch)[:1], 5, args)
        image = sample.generate(model, toy_labels(1, first=0), ["at night"], [0], steps=2, cfg=1.0,
                                precision=precision)
        found.append((losses, image.astype(float)))
    (a, image), (b, half) = found
    assert a["dropped"] == b["dropped"] == 0
    a.pop("D_caught")  # a fraction of pixels: it jumps where two classes tie
    for name, value in a.items():
        assert value.item() == pytest.approx(b[name].item(), rel=0.05, abs=0.02)
    assert np.abs(image - half).mean() < 4  # of 255


@pytest.mark.parametrize("adapter", sorted(dict(ADAPTERS)))
def test_no_tensor_is_left_behind_on_the_cpu(adapter):
    """Fake CUDA tensors: mixed devices raise, as does whatever must wait for the GPU within a step.
    (Without a driver there is neither autocast nor a backward pass.)"""
    model, D, *_ = make_trainee(adapter)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for module in [*model.modules(), *D.modules()]:
            move_to_fake_cuda(module)
        batch = {"x0": torch.empty(2, 16, 16, 16, device="cuda"),
                 "context": torch.empty(2, 77, 96, device="cuda"),
                 "label": torch.empty(2, 64, 64, dtype=torch.int64, device="cuda")}
        args = setting(unroll=2)
        train.plain_loss(model, batch)
        train.loss_and_fakes(model, batch, args)
        loss, _, fakes = train.adversarial_loss(model, D, batch, 1.0, args)
        logits = D.train()(fakes)
        d_loss, _ = discriminator_loss(logits, logits, batch["label"], 0.1)
        assert loss.device.type == fakes.device.type == d_loss.device.type == "cuda"


def move_to_fake_cuda(module):
    for tensors in module._parameters, module._buffers:
        for name, t in tensors.items():
            if t is None:
                continue
            t = torch.empty(t.shape, dtype=t.dtype, device="cuda")
            tensors[name] = nn.Parameter(t, False) if tensors is module._parameters else t


def test_oft_is_built_on_a_unet_on_cuda():
    with FakeTensorMode():
        with torch.device("cuda"):
            unet = UNet(PRESETS["toy"].unet)
        OFT.on(unet, 96, (64, 48, 32), 4)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("adapter", sorted(dict(ADAPTERS)))
def test_cuda_gives_the_losses_and_gradients_of_a_cpu(adapter):
    model, D, _, _, batch = make_trainee(adapter)
    timesteps, start = model.schedule.ddim_timesteps(25), torch.tensor([3, 20])
    noise, found = torch.randn(batch["x0"].shape), []
    for device in "cpu", "cuda":
        model.to(device), D.to(device)
        on = {name: value.to(device) for name, value in batch.items()}
        times, first = timesteps.to(device), start.to(device)
        loss, x_t, eps, layout = train.noise_loss(model, on, times[first], noise.to(device))
        adv, _ = unrolled_adversarial_loss(model, D, x_t, eps, first, times, on["label"],
                                           on["context"], layout, 2, "each")
        trained = [p for p in model.adapter.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss + adv, trained)
        found.append((loss.item(), adv.item(), torch.nn.utils.get_total_norm(grads).item()))
    assert found[0] == pytest.approx(found[1], rel=0.02)  # convolutions in TF32


@needs_cuda
@pytest.mark.parametrize("more", [
    ["--precision", "fp32"], ["--recompute"], ["--compile"], ["--workers", "2"]])
def test_cuda_trains_resumes_and_samples(more, flags, toy_world, tmp_path):
    """bf16 by default; each saving beside it."""
    run_, base = tmp_path / "run", ("--sd", toy_world / "toy.safetensors")
    for steps in 2, 4:
        launch(train, *flags, "--device", "cuda", *more, "--steps", steps, "--resume", "--out",
               run_)
    rows = [*csv.DictReader((run_ / "log.csv").read_text().splitlines())]
    assert len(rows) == 4 and all(float(row["dropped"]) == 0 for row in rows)
    launch(sample, "--adapter", run_, *base, "--layout", HERE / "assets/layout_1.png", "--prompt",
           "a street", "--device", "cuda", "--steps", 2, "--out", tmp_path / "images")
    assert "layout_1_0.png" in files(tmp_path / "images")


# -- own classes -----------------------------------------------------------------------------------


def test_own_classes_in_a_small_trial(toy_world, tmp_path):
    """--data FOLDER --preset toy: any number of own classes, by the commands that README names."""
    names = ["floor", "car", *(f"thing_{i}" for i in range(169))]
    for i in range(2):
        label = np.random.default_rng(i).integers(0, len(names), (64, 64), np.uint8)
        save(tmp_path / f"labels/{i}.png", label)
        save(tmp_path / f"images/{i}.png", np.dstack([label] * 3))
    (tmp_path / "classes.txt").write_text("\n".join(names))
    base, run_ = ("--sd", toy_world / "toy.safetensors", "--device", "cpu"), tmp_path / "run"
    out = launch(train, "--data", tmp_path, "--preset", "toy", *base, "--steps", 1, "--batch", 2,
                 "--out", run_)
    assert "mIoU" not in out  # the toy's judges know none of these classes
    launch(sample, "--layout", tmp_path / "labels/0.png", "--adapter", run_, *base, "--steps", 2,
           "--out", tmp_path)
    saved = torch.load(run_ / "checkpoint_0000001.pt", weights_only=True)["discriminator"]
    last = load_weights(toy_world / "toy.safetensors")["segmenter"]
    car = last[WEIGHT][13].float()  # a class that the toy knows starts from its row
    assert torch.allclose(saved[WEIGHT][1], car, atol=1e-3)


# -- bad input -------------------------------------------------------------------------------------


BAD_TRAINING = [  # arguments, words of the one line that says so
    ("--steps 0", "--steps", "from 1"), ("--lr nan", "--lr", "above 0"), ("--ramp 9", "--ramp"),
    ("--ramp 9:8", "--ramp"), ("--step 3", "--step"),
    ("--unroll 4 --ddim-steps 4", "--unroll 4", "below"),
    ("--size 63", "63", "multiples of 16"), ("--device cuda:99", "no such CUDA"),
    ("--t-max 300 --ddim-steps 25 --unroll 9", "--t-max 300", "--unroll 9"),
    ("--adapter oft --hint color", "--hint color", "oft"), ("--finetune", "--finetune", "piti"),
    ("--data nowhere", "nowhere", "toy, cityscapes"), ("--root NONE", "NONE", "leftImg8bit"),
    ("--root UNPAIRED", "without a label"), ("--root VOIDS", "void"),
    ("--captions TEXT", "TEXT", "JSON"),
    ("--sd NONE", "NONE", "no such"), ("--sd ADAPTER", "ADAPTER"),
    ("--sd HEADLESS", "segmenter: has 0 outputs"),
    ("--preset sd15 --size 64", "toy.safetensors"), ("--init TEXT", "TEXT"),
    ("--init ADAPTER --adapter t2i", "ADAPTER", "controlnet", "--adapter"),
    ("--init BASE", "BASE"), ("--init OTHER", "OTHER", "sd15", "--preset"),
    ("--segmenter SEVEN", "SEVEN", "7"),
    ("--class-embeddings TABLE", "TABLE", "[7, 96]", "[19, 96]"), ("--cache TEXT", "TEXT"),
    ("--cache CACHE", "CACHE", "another folder"), ("--out TEXT/out", "TEXT/out"),
    ("--out RUN", "RUN", "--resume"), ("--out RUN --resume --steps 1", "--steps 1"),
    ("--out RUN --resume --adapter t2i", "adapter", "t2i", "RUN"),
    ("--out RUN --resume --discriminator none", "RUN"),
    ("--init ADAPTER --hint color", "ADAPTER", "--hint classes"),
    ("--adapter t2i --class-embeddings TABLE", "--class-embeddings"),
    ("--out RUN --resume --data FOLDER --root FOLDER", "file_ids", "RUN"),
    ("--out EVILRUN --resume", "EVILRUN", "as are all checkpoints")]


@pytest.fixture(scope="session")
def bad_files(toy_world, flags, tmp_path_factory):
    """{WORD: path} of what the cases name."""
    folder = tmp_path_factory.mktemp("bad")
    flags_of_all = " ".join(argv for argv, *_ in BAD_TRAINING + BAD_SEGMENTERS)
    words = re.findall("[A-Z]{3,}", flags_of_all)
    at = {word: folder / word for word in words}
    for word in ("CACHE", "EVILRUN"):
        at[word].mkdir()
    at["TEXT"].write_text("not what you think")
    (at["CACHE"] / "cache.txt").write_text("others")
    shutil.copytree(toy_world / "day", at["UNPAIRED"])
    next(at["UNPAIRED"].glob("gtFine/train/toy/*")).unlink()
    for file in shutil.copytree(toy_world / "day", at["VOIDS"]).glob("gtFine/train/*/*"):
        save(file, np.full((64, 64), 255, np.uint8))
    for word in ("FOLDER", "OTHERS", "BLANK"):
        write_folder(at[word], 2)
    (at["OTHERS"] / "classes.txt").write_text("\n".join(f"thing {i}." for i in range(20)))
    for path in at["BLANK"].glob("labels/train/*"):
        save(path, np.full((64, 64), 255, np.uint8))
    for kind in ("images", "labels"):
        shutil.copytree(at["BLANK"] / kind / "train", at["BLANK"] / kind / "val")
    evil = {"step": 1, "x": Call(os.system, f"touch {folder}/executed")}
    torch.save(evil, at["EVILRUN"] / "checkpoint_0000002.pt")
    base = load_frozen("toy", toy_world / "toy.safetensors")[:3]
    model = ALDM(PRESETS["toy"], *base, class_table("cityscapes"))
    meta = dict(preset="toy", dataset="cityscapes", names=model.classes.names, step=0,
                palette=model.classes.palette, adapter="controlnet", hint="classes")
    save_adapter(at["ADAPTER"], model, meta)
    save_adapter(at["OTHER"], model, {**meta, "preset": "sd15"})
    seven = UperNet(7, **PRESETS["toy"].segmenter).state_dict()
    torch.save(prefixed("segmenter.", seven), at["SEVEN"])
    torch.save(torch.zeros(7, 96), at["TABLE"])
    parts = load_file(toy_world / "toy.safetensors")
    save_file({n: t for n, t in parts.items() if WEIGHT not in n}, at["HEADLESS"])
    launch(train, *flags, "--out", at["RUN"], "--steps", 2)
    return {**at, "BASE": toy_world / "toy.safetensors"}


def put(text, at):
    """A case with the paths of its words."""
    return re.sub("[A-Z]{3,}", lambda word: str(at.get(word[0], word[0])), text)


@pytest.mark.parametrize("argv, words", [(argv, words) for argv, *words in BAD_TRAINING])
def test_bad_input_is_one_line_and_writes_nothing(argv, words, bad_files, train_cli, tmp_path,
                                                  monkeypatch):
    def content():
        folder = bad_files["TEXT"].parent
        return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    monkeypatch.chdir(tmp_path)
    before = content()
    code, out, err = train_cli("--out", "out", *put(argv, bad_files).split())
    lines = notes(err)
    assert code == 2 and out == "" and lines[0].startswith("train.py: "), (code, err)
    assert len(lines) == (3 if "UNPAIRED" in argv else 1)
    assert all(put(word, bad_files) in err for word in words), err
    assert files(tmp_path) == [] and content() == before  # an evil file is not executed, either


def test_a_folder_without_permission(train_cli, toy_world):
    aldm.byte_pairs()  # nobody may be unable to read open_clip's vocabulary
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to all but their owner
        shutil.copytree(toy_world, f"{folder}/world")
        closed = Path(folder, "closed", "inside")
        closed.mkdir(parents=True)
        subprocess.run(["chmod", "-R", "a+rwX", folder], check=True)
        closed.parent.chmod(0)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)  # root may do anything: be nobody
            found = [train_cli("--root", f"{folder}/world/day", "--out", f"{folder}/out", "--sd",
                               f"{folder}/world/toy.safetensors", flag, closed)
                     for flag in ("--out", "--root", "--cache", "--sd")]
        finally:
            os.seteuid(user)
            closed.parent.chmod(0o755)
        for code, _, err in found:
            assert code == 2 and len(notes(err)) == 1, err
            assert str(closed) in err and "ermission denied" in err
        assert files(Path(folder)) == ["closed", "world"]


# -- the plain segmenter (Table 4) -----------------------------------------------------------------


def write_night(root, n):
    """n dark scenes of the toy world in ACDC's folders."""
    first, _ = toy.SPLITS["val"]
    for i in range(n):
        image, label, _ = toy_scene(first + i, "night")
        name = f"night/val/GOPR1/toy_{i}"
        save(root / f"rgb_anon/{name}_rgb_anon.png", image)
        save(root / f"gt/{name}_gt_labelTrainIds.png", label)


@pytest.fixture(scope="session")
def small_segmenter(toy_world, tmp_path_factory):
    """A finished run of six steps, and its flags."""
    flags = ["--data", "cityscapes", "--root", toy_world / "day", "--preset", "toy", "--device",
             "cpu", "--steps", 6, "--batch", 4, "--save-every", 2, "--keep", 9]
    out = tmp_path_factory.mktemp("segmenter") / "run"
    launch(plain, *flags, "--out", out)
    return out, flags


def test_domain_generalisation_from_end_to_end(toy_world, tmp_path):
    """README's chain of commands, on the toy world in the form of Cityscapes and ACDC."""
    write_city(tmp_path / "city", 24)
    write_city(tmp_path / "city", 4, "val")
    write_night(tmp_path / "acdc", 4)
    night, run, out = (tmp_path / name for name in ("night", "run", "segmenter"))
    dark = f"cityscapes:night={tmp_path / 'acdc'}"
    real = ("--data", "cityscapes", "--root", tmp_path / "city", "--device", "cpu")
    model = (*real, "--sd", toy_world / "toy.safetensors")
    launch(train, *model, "--preset", "toy", "--steps", 1, "--eval", 0, "--batch", 4,
           "--ddim-steps", 4, "--unroll", 3, "--out", run)
    for i in range(2):
        launch(sample, *model, "--adapter", run, "--steps", 2, "--layouts", "train", "--limit", 4,
               "--shard", f"{i}/2", "--prompts", "{caption}, night scene", "--out", night)
    printed = launch(plain, *real, "--preset", "toy", "--extra", night, "--mix", 0.25,
                     "--steps", 40, "--batch", 4, "--test", "cityscapes", dark, "--out", out)
    results = json.loads((out / "segmenter.json").read_text())
    assert list(results) == ["cityscapes", dark] and "road" in printed
    assert results["cityscapes"]["mIoU"] > 0.1  # random: 0.03
    assert results["cityscapes"]["IoU"]["road"] > 0.3
    launch(sample, "--evaluate", *model, "--adapter", run, "--steps", 2, "--limit", 2, "--n", 1,
           "--judge", out / "segmenter.safetensors", "--out", tmp_path / "judged")


def test_generated_images_are_mixed_in(tmp_path):
    """A share of each batch, equally from each folder; labels stay with their images."""
    sets, places = [], {}
    for place, domain in enumerate(("day", "night", "fog")):
        write_city(tmp_path / domain, 8, domain=domain)
        sets.append(open_dataset("cityscapes", tmp_path / domain, size=64, augment=False))
        for item in map(sets[-1].__getitem__, range(8)):
            places[item["image"].numpy().tobytes(), item["label"].numpy().tobytes()] = place
    args = SimpleNamespace(mix=0.5, batch=8, extra=["a", "b"], seed=0, workers=0, device="cpu")
    batch = next(plain.mixed_batches(args, sets[0], sets[1:], 0))
    found = [places[image.numpy().tobytes(), label.numpy().tobytes()]
             for image, label in zip(batch["image"], batch["label"])]
    assert found == [0, 0, 0, 0, 1, 1, 2, 2]


def test_the_rate_of_the_segmenter():
    args = SimpleNamespace(lr=0.02, steps=1000)
    rates = [plain.learning_rate(args, step) for step in (24, 500, 999)]
    assert rates == pytest.approx([0.01 * 0.976 ** 0.9, 0.02 * 0.5 ** 0.9, 0.02 * 0.001 ** 0.9])


def test_a_segmenter_continues_and_is_exported_again(small_segmenter, tmp_path):
    """A run without its last two checkpoints and its product, as after a kill, becomes the same."""
    whole, flags = small_segmenter
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for name in ("checkpoint_0000004.pt", "checkpoint_0000006.pt", "segmenter.safetensors",
                 "segmenter.json"):
        (out / name).unlink()
    trained, again = (folder / "segmenter.safetensors" for folder in (whole, out))
    launch(plain, *flags, "--out", out, "--resume")
    assert same(load_file(trained), load_file(again))
    for name in ("segmenter.json", "log.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    again.unlink()
    launch(plain, *flags, "--out", out, "--resume")  # nothing is left to train
    assert same(load_file(trained), load_file(again))


def test_two_processes_train_a_segmenter(small_segmenter, tmp_path):
    """torchrun: each process takes its own images; the file holds the mean of the statistics."""
    _, flags = small_segmenter
    command = ["torch.distributed.run", "--nproc-per-node", 2, "--standalone",
               HERE / "tools" / "segmenter.py", *flags, "--steps", 2, "--out", "run"]
    done = subprocess.run([sys.executable, "-m", *map(str, command)], cwd=tmp_path, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mIoU") == 1
    assert len((tmp_path / "run/log.csv").read_text().splitlines()) == 3
    net = UperNet(19, **PRESETS["toy"].segmenter)
    load_segmenter([tmp_path / "run/segmenter.safetensors"], net, class_table("cityscapes"))


BAD_SEGMENTERS = [  # arguments, words of the one line that says so
    ("--lr -1", "--lr", "above 0"), ("--extra FOLDER --mix 1", "--mix 1", "batch of 4"),
    ("--extra OTHERS", "OTHERS", "classes"), ("--extra BLANK", "BLANK", "void"),
    ("--test BLANK=BLANK", "BLANK", "void"), ("--data BLANK --root BLANK", "BLANK", "void"),
    ("--segmenter NONE", "NONE"), ("--out RUN", "RUN", "--resume")]


@pytest.mark.parametrize("argv, words", [(argv, words) for argv, *words in BAD_SEGMENTERS])
def test_bad_input_for_a_segmenter(argv, words, bad_files, small_segmenter, capsys, tmp_path):
    run, flags = small_segmenter
    at = {**bad_files, "RUN": run}
    code, out, err = outcome(plain, capsys, *flags, "--out", tmp_path / "out",
                             *put(argv, at).split())
    last = err.splitlines()[-1]  # the lines above say what was read
    assert code == 2 and out == "" and last.startswith("segmenter.py: "), err
    assert all(put(word, at) in last for word in words), err
    assert files(tmp_path) == []


# -- the toy's base model --------------------------------------------------------------------------


def test_the_autoencoder_starts_as_the_principal_components():
    """Its first reconstructions are nearly those of the best linear map of 4x4 patches to 16
    numbers, by NumPy; normalised latents change nothing."""
    torch.manual_seed(0)
    vae = VAE(PRESETS["toy"].vae)
    image = make_toy.Scenes(200).pixels(slice(0, 200), "cpu")
    make_toy.linear_start(vae, image)
    patches = F.pixel_unshuffle(image, 4).permute(0, 2, 3, 1).reshape(-1, 48).double().numpy()
    best = np.linalg.eigvalsh(np.cov(patches.T))[:-16].sum() / 48
    with torch.no_grad():
        error = (vae.decode(vae.encode(image)) - image).square().mean().item()
        make_toy.normalize_latents(vae, image)
        z = vae.encode(image)
        again = (vae.decode(z) - image).square().mean().item()
    assert best < error < 2 * best  # the last norm takes its share
    assert np.isclose(error, again, rtol=1e-3)
    assert z.mean((0, 2, 3)).abs().max() < 1e-3 and abs(z.std() - 1) < 1e-3


def test_the_words_of_the_base():
    """A tenth of the captions are empty; of the rest a sixth name a class that is in the scene."""
    present = torch.zeros(50, 19)
    present[torch.arange(50), torch.arange(50) % 19] = 1
    index = torch.arange(50).repeat(400)
    words = make_toy.choose_words(index, present, 50 + 19 + 1)
    names_class = (words >= 50) & (words < 69)
    assert (words[names_class] - 50 == index[names_class] % 19).all()
    assert (words == 69).float().mean() == pytest.approx(0.1, abs=0.01)
    assert names_class.float().mean() == pytest.approx(0.15, abs=0.01)
    assert (words[words < 50] == index[words < 50]).all()


def test_make_toy_makes_a_base_that_trains(tmp_path):
    """Its stages fill one file, and each can be resumed; an adapter trains on it and is judged."""
    base = tmp_path / "toy.safetensors"
    common = ("--device", "cpu", "--steps", 2, "--batch", 4, "--scenes", 100)
    for stage in ("vae", "base", "judges"):
        launch(make_toy, stage, "--out", tmp_path, *common)
    before = base.read_bytes()
    launch(make_toy, "vae", "--out", tmp_path, *common, "--resume")
    assert base.read_bytes() == before
    assert set(load_weights(base)) == {"vae", "unet", "text", "segmenter", "judge", "domain"}
    shutil.rmtree(tmp_path / "base")
    launch(make_toy, "base", "--out", tmp_path, *common, "--start", base)
    assert base.read_bytes() != before
    out = launch(train, "--sd", base, "--init", "none", "--device", "cpu", "--steps", 1, "--batch",
                 2, "--eval", 4, "--ddim-steps", 2, "--unroll", 0, "--out", tmp_path / "run")
    after = json.loads((tmp_path / "run" / "judged.json").read_text())
    assert "before" in out
    assert all(f"{after[key]:9.3f}" in out for key in ("mIoU_generated", "seconds"))


def test_what_is_shipped_works(tmp_path):
    """assets/: both adapters fit the base model and obey layouts (the judge finds 0.2 in what the
    base makes of prompts alone), ALDM's better; the autoencoder costs at most a tenth."""
    first, _ = toy.SPLITS["val"]
    scenes = [(first + i, DOMAINS[i % 5]) for i in range(20)]
    toy.write_split(tmp_path / "world", "val", scenes)
    dataset = open_dataset("toy", tmp_path / "world", "val", 64, augment=False)
    judges = shipped_judges()
    found = []
    for name in ("toy_controlnet", "toy_aldm"):
        model = sample.load_model(data.ASSETS / f"{name}.safetensors")
        sample.draw_judged(model, dataset, tmp_path / name, 20, n=1, batch=20, steps=10, cfg=1.0)
        result = judge.judge_folder(tmp_path / name, dataset, judges)
        found.append(result["mIoU_generated"])
        assert result["mIoU_reconstructed"] > 0.9 * result["mIoU_real"] > 0.8
    assert found[1] > found[0] > 0.4
    assert sum(path.stat().st_size for path in data.ASSETS.iterdir()) < 24e6


# -- tables ----------------------------------------------------------------------------------------


def test_the_flags_of_all_rows_are_flags():
    for flags in make_results.STARTS.values():
        train.make_parser().parse_args(flags.split())
    for _, rows in make_results.TABLES.values():
        for flags in rows.values():
            if not flags.startswith("START/"):
                train.make_parser().parse_args(flags.split())


def test_a_rows_folder_is_named_after_its_flags():
    name = make_results.folder_name
    assert name("", 0) == "default-seed-0"
    assert name("--init START/t2i --steps 800", 1) == "init-START-t2i-steps-800-seed-1"


def test_the_variance_of_judging_some(flags, tmp_path):
    """With all K = 2 judged there is none."""
    small = shlex.join([*flags, "--unroll", "2", "--ddim-steps", "4", "--batch", "1"])
    out = launch(make_results, "variance", "--runs", tmp_path, "--out", tmp_path / "table.md",
                 f"--train-flags={small}")
    rows = [line.split(" | ")[2:] for line in out.splitlines() if line.startswith("| `")]
    assert len(rows) == 4
    for one, both in rows:
        assert float(one) > 0 == float(both.strip(" |"))


def test_tables(tmp_path, monkeypatch):
    """Rows are runs of train.py, after those that they start from; finished runs are kept."""
    monkeypatch.setitem(make_results.STARTS, "one", "--discriminator none")
    rows = {"start": "START/one", "row": "--init START/one --unroll 0"}
    monkeypatch.setitem(make_results.TABLES, "k", ("Title", rows))
    flags = "--steps 1 --batch 2 --eval 4 --ddim-steps 2 --device cpu"
    command = ("k", "--seeds", 1, "--runs", tmp_path, "--out", tmp_path / "new" / "results.md",
               "--train-flags", flags)
    text = launch(make_results, *command)
    file = tmp_path / "init-START-one-unroll-0-seed-0" / "judged.json"
    figures = json.loads(file.read_text())
    cells = f"{figures['mIoU_generated']:.3f} | {figures['mIoU_edited']:.3f}"
    assert f"| row | `--init START/one --unroll 0` | {cells} | " in text
    assert "| start | `--discriminator none` | " in text
    file.write_text(json.dumps({**figures, "mIoU_generated": 0.75}))
    assert "| 0.750 | " in launch(make_results, *command)
    assert "0.750" in (tmp_path / "new" / "results.md").read_text()
    assert make_results.spread([0.5, 0.7]) == "0.600 ± 0.141"


def test_a_row_that_fails_is_named(tmp_path, capsys):
    code, out, err = outcome(make_results, capsys, "main", "--runs", tmp_path, "--out",
                             tmp_path / "results.md", "--train-flags=--bogus")
    assert code == 1 and "exit code 2" in err and "--bogus" in err
    assert files(tmp_path) == []


PATIENT = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (open("saved", "w").close(), sys.exit(143)))
print("ready", flush=True)
time.sleep(60)
"""


def test_a_stopped_table_stops_its_run(tmp_path):
    """make_results.py, told to end, ends the training and waits until that has saved."""
    script = ("import sys; from tools.make_results import call; from tools.run import run_command; "
              f"run_command('x', lambda: call([sys.executable, '-c', {PATIENT!r}]))")
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(HERE)})
    while process.stdout.readline() != "ready\n":
        pass
    process.terminate()
    assert process.wait(30) == 143 and (tmp_path / "saved").exists()


# -- what a step and an image cost -----------------------------------------------------------------


def bench_args(flags=""):
    return bench.parse_args(f"--size 32 --batch 1 --device cpu --repeat 1 {flags}".split())


@functools.cache
def step_tflop(name, flags=""):
    """TFLOP of an adversarial step at toy size."""
    args = bench_args(f"--unroll 2 --judged 2 --unroll-grad first {flags}")
    run = functools.partial(bench.Bench(args).run, name, bench.STEPS["adversarial step"])
    return bench.count(run, args)[0]


def test_each_saving_saves_operations():
    ours = step_tflop("ours")
    assert step_tflop("official") > ours > step_tflop("ours", "--judged 1") > 0
    assert ours > step_tflop("cached")
    assert ours < step_tflop("ours", "--recompute")
    each = step_tflop("ours", "--unroll-grad each")
    assert ours < each < step_tflop("ours", "--unroll-grad full")


def test_the_official_composition_trains_both_networks():
    both = bench.Bench(bench_args())
    parts = both.model.adapter, both.discriminator, both.model.unet, both.model.vae
    before = copy.deepcopy([part.state_dict() for part in parts])
    both.run("official", bench.STEPS["adversarial step"])
    changed = [not same(part.state_dict(), old) for part, old in zip(parts, before)]
    assert changed == [True, True, False, False]


def test_bench_prints_all_compositions(capsys):
    out = launch(bench, "--size", 32, "--batch", 1, "--unroll", 1, "--device", "cpu", "--repeat", 1)
    rows = {line[:28].strip(): [*map(float, line[28:].split())] for line in out.splitlines()[2:]}
    assert len(rows) == 9
    for name in ("official", "ours", "cached"):
        noise, adversarial, period = (rows[f"{title}, {name}"] for title in (
            "noise step", "adversarial step", "period of 8 steps"))
        for column in (0, 1):  # TFLOP, ms
            eight = 7 * noise[column] + adversarial[column]
            assert period[column] == pytest.approx(eight, rel=1e-3)
        assert 0.2 < noise[3] <= adversarial[3] == period[3]
        assert noise[2] == pytest.approx(1e3 * noise[0] / noise[1], rel=0.01)
    speedup = rows["noise step, official"][1] / rows["noise step, ours"][1]
    assert rows["noise step, ours"][4] == pytest.approx(speedup, abs=0.01)


def test_bench_counts_what_an_image_costs():
    flags = ("--sample", "32x64", "--batch", 2, "--steps", 2, "--device", "cpu", "--repeat", 1)
    cells = launch(bench, *flags).splitlines()[1].split(", ")
    seconds, tflop, rate, peak = (float(cell.split()[0]) for cell in cells)
    assert rate == pytest.approx(tflop / seconds, rel=0.01) and peak > 0.2
    model = tiny_model()
    layouts = torch.full((2, 32, 64), IGNORE)
    run = functools.partial(sample.generate, model, layouts, ["", ""], [0, 1], steps=2)
    counted, _ = bench.count(run, SimpleNamespace(device="cpu"))
    assert tflop == pytest.approx(counted / 2, rel=1e-3)  # per image


def test_attention_is_counted():
    """Two matrix products forwards, five backwards, in a CPU's fused kernel."""
    q = torch.randn(1, 2, 64, 16, requires_grad=True)
    k = torch.randn(1, 2, 32, 16, requires_grad=True)
    counted, _ = bench.count(lambda: F.scaled_dot_product_attention(q, k, k).sum().backward(),
                             SimpleNamespace(device="cpu"))
    assert counted == pytest.approx(7 * 2 * 2 * 64 * 32 * 16 / 1e12)


def test_bench_has_the_official_settings():
    args = bench.parse_args("--preset sd15 --device cpu".split())
    assert (args.size, args.batch, args.unroll, args.unroll_grad) == (512, 4, 9, "first")
    assert bench.parse_args("--preset sd15 --sample 512x1024 --device cpu".split()).batch == 1


def test_bench_judges_where_a_mean_draw_does():
    assert bench.mean_draw(9, 2) == [3, 7] and bench.mean_draw(9, 1) == [5]
    assert bench.mean_draw(9, 4) == [2, 4, 6, 8]
    assert bench.mean_draw(3, 9) == [1, 2, 3] and bench.mean_draw(0, 2) == []


def test_what_a_rented_gpu_is_asked(tmp_path):
    """The commands of --all are commands; each gets the time that is left."""
    for command in bench.list_commands(bench_args(f"--out {tmp_path}")):
        script, *flags = shlex.split(command)
        if script == "tools/bench.py":
            bench.parse_args(flags)
        elif script == "tools/make_toy.py":
            make_toy.parse_args(flags)
    out = launch(bench, "--all", "--minutes", 0.05, "--out", tmp_path, "--device", "cpu")
    assert out.count("tools/bench.py") >= 1 and files(tmp_path) == ["toy.safetensors"]


# -- the companion ---------------------------------------------------------------------------------


README = (HERE / "README.md").read_text()
SCRIPTS = {"train.py": train, "sample.py": sample, "tools/segmenter.py": plain,
           "tools/paint.py": paint, "tools/bench.py": bench, "tools/make_toy.py": make_toy,
           "tools/make_results.py": make_results}


def test_what_the_readme_names_is_there():
    links = re.findall(r"`(\w+)\.py:([\w.]+)`", README)
    assert len(links) >= 12
    for module, name in links:
        if module == "test_aldm":
            assert f"def {name}(" in Path(__file__).read_text()
            continue
        thing = sys.modules[module]
        for part in name.split("."):
            thing = getattr(thing, part)
    for file in re.findall(r"\((assets/[\w.]+)\)", README):
        assert (HERE / file).exists(), file
    for file in re.findall(r"\b(?:tools/)?\w+\.py\b", README):
        assert (HERE / file).exists() or f"tools/{file}" in README, file
    for path in [*HERE.glob("*.py"), *HERE.glob("tools/[!_]*.py")]:
        assert path.relative_to(HERE).as_posix() in README


def test_the_readme_commands(tmp_path, capsys, monkeypatch):
    """Every flag in a command of README is one that the script has; the first sample is drawn."""
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S)).replace("\\\n", " ")
    commands = [line.partition(" #")[0] for line in shell.splitlines()]
    flags = {name: outcome(module, capsys, "--help")[1] for name, module in SCRIPTS.items()}
    for command in commands:
        for script, rest in re.findall(r"([\w/]+\.py)(.*)", command):
            for flag in re.findall(r"(?<=\s)--[\w-]+", rest):
                assert re.search(rf"{flag}\b", flags[script]), f"no {flag}: {command}"
    first = next(c for c in commands if c.startswith("python sample.py --layout"))
    monkeypatch.chdir(HERE)
    launch(sample, *shlex.split(first)[2:], "--steps", 2, "--device", "cpu", "--out", tmp_path)
    assert len(commands) > 8 and Image.open(tmp_path / "layout_1_0.png").size == (64, 64)


def test_the_readme_table_of_shapes():
    """The toy's and SD's shapes of the paper's symbols, by a dry run on torch's meta device."""
    cells = [[cell.strip() for cell in row.split("|")] for row in README.splitlines()
             if re.match(r"\| (\$|what)", row)]
    rows = [row for row in cells if "`" in row[2]]
    assert len(rows) == 8
    for preset, column in (PRESETS["toy"], 3), (PRESETS["sd15"], 4):
        assert {row[2]: row[column] for row in rows} == shapes_of(preset)


def shapes_of(preset):
    """{code, as README names it: the shape of what it returns}"""
    def show(x):
        return " x ".join(map(str, x.shape[1:]))
    with torch.device("meta"):
        unet, vae, text = UNet(preset.unet), VAE(preset.vae), TextEncoder(**preset.text)
        table = torch.empty(20, preset.text["width"])
        model = ALDM(preset, unet, vae, text, class_table("cityscapes"), table=table).to("meta")
        image = torch.empty(1, 3, preset.size, preset.size)
        label = torch.empty(1, preset.size, preset.size).long()
        context, t = torch.empty(1, 77, preset.text["width"]), torch.empty(1).long()
        x0 = vae.encode(image)
        onehot, _ = model.layout(label, text)
        hint = torch.empty(1, table.shape[1], *onehot.shape[2:])
        control = model.adapter.residuals(x0, t, context, model.encode_layout(label))
        logits = UperNet(20, **preset.segmenter)(vae.decode(x0))
    return {
        "`data.py:read_layout`": show(label), "`aldm.py:folded_class_hint`": show(onehot),
        "`aldm.py:class_hint`": show(hint), "`aldm.py:TextEncoder`": show(context),
        "`vae.py:VAE.encode`, `aldm.py:ALDM.eps`": show(x0),
        "`unet.py:ControlNet.residuals`": f"{len(control)} maps",
        "`vae.py:VAE.decode`": show(image), "`discriminator.py:UperNet`": show(logits)}

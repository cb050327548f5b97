"""The tests: golden files of independent implementations, analytic cases, invariances, and the command lines themselves.

    python -m pytest -q
"""
import os
os.environ.setdefault("GOMP_SPINCOUNT", "3000")     # as the command lines do, before torch is imported

import base64
import contextlib
import copy
import dataclasses
import csv
import functools
import hashlib
import http.client
import io
import itertools
import json
import pickle
import re
import shlex
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
import weakref
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
from aldm import (ALDM, JUDGE, PRESETS, Preset, Schedule, TextEncoder, load_class_embeddings, load_frozen, load_into,
                  load_segmenter, load_weights, read_adapter, save_adapter, save_base,
                  unrolled_adversarial_loss)
from data import (DOMAINS, IGNORE, InputError, Toy, class_table, colorize, open_dataset, read_layout, toy_scene,
                  write_toy)
from discriminator import Classifier, UperNet, discriminator_loss
from sample import BODY, painter
from unet import ControlNet, OFT, Rotation, T2IAdapter, UNet, UNetConfig
from vae import VAE, ResnetBlock, VAEConfig

HERE = Path(__file__).parent
SHARED = HERE.parent / "shared"
needs_shared = pytest.mark.skipif(not (SHARED / "golden").is_dir(), reason="the folder ../shared is not there")
torch.set_num_threads(2)


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


def relative(a, b):
    return float(np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b))


# -- golden files ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    sys.path.insert(0, str(SHARED / "golden"))
    import fill
    outputs = np.load(SHARED / "golden" / "small.npz")
    return SimpleNamespace(want=lambda name: outputs[name], fill=fill.fill_,
                           draw=lambda name, shape: torch.from_numpy(fill.draw("input/" + name, shape)),
                           agrees=lambda name, found: relative(found, outputs[name]) < 1e-4)


def filled(module, golden, prefix):
    golden.fill({prefix + name: t for name, t in module.state_dict().items()})
    return module.eval()


SMALL = UNetConfig(model_channels=32, context_dim=64)


@needs_shared
@torch.no_grad()
def test_golden_unet(golden):
    x, context = golden.draw("unet.x", (3, 4, 16, 24)), golden.draw("unet.context", (3, 77, 64))
    t = torch.tensor([1, 481, 961])
    unet = filled(UNet(SMALL), golden, "model.diffusion_model.")
    control = filled(ControlNet(SMALL, 64, (64, 48, 32)), golden, "control_model.")
    residuals = control(x, t, context, golden.draw("control.hint", (3, 64, 32, 48)))
    assert len(residuals) == 13 and golden.agrees("unet.eps", unet(x, t, context))
    assert all(golden.agrees(f"control.{i}", residual) for i, residual in enumerate(residuals))
    assert golden.agrees("control.eps", unet(x, t, context, residuals))
    drawn = [0.3 * golden.draw(f"unet.control{i}", r.shape) for i, r in enumerate(residuals)]
    assert golden.agrees("unet.eps_with_control", unet(x, t, context, drawn))


@needs_shared
@torch.no_grad()
def test_golden_vae(golden):
    vae = filled(VAE(VAEConfig(ch=32)), golden, "first_stage_model.")
    image = golden.draw("vae.image", (2, 3, 64, 96)).clamp(-1, 1)
    mean, logvar = vae.moments(image)
    assert golden.agrees("vae.mean", mean) and golden.agrees("vae.logvar", logvar)
    assert golden.agrees("vae.decoded", vae.decode(golden.draw("vae.z", (2, 4, 8, 12))))
    assert torch.equal(vae.encode(image), mean * 0.18215)


@needs_shared
@torch.no_grad()
def test_golden_text(golden):
    """Our encoder from Hugging Face's tensors; the ids are CLIP's, padded with END as Stable Diffusion pads."""
    names, text = read_names("sd15_format.json")["text_small"], TextEncoder(64, 2, 4)
    state = golden.fill({name: torch.zeros(shape) for name, shape in names.items()})
    text.load_state_dict(aldm.split_parts("text_small", state)["text"])
    ids = torch.from_numpy(golden.want("text.ids"))
    assert golden.agrees("text.hidden", text(ids))
    assert torch.equal(text.tokenize([""])[0], ids[0])
    end = (ids == TextEncoder.END).int().argmax(1)
    assert relative(text.pooled(ids), golden.want("text.hidden")[np.arange(len(ids)), end]) < 1e-4


@needs_shared
@torch.no_grad()
def test_golden_segmenter(golden):
    segmenter = filled(UperNet(20, layers=(1, 1, 2, 1)), golden, "segmenter.segmenter.")
    assert golden.agrees("seg.logits", segmenter(golden.draw("seg.image", (2, 3, 64, 96)).clamp(-1, 1)))


@needs_shared
def test_golden_ddim(golden):
    schedule, x, eps = Schedule(), golden.draw("ddim.x", (1, 4, 8, 8)), golden.draw("ddim.eps", (1, 4, 8, 8))
    assert golden.agrees("ddim.alphas_cumprod", schedule.alphas_cumprod)
    timesteps = schedule.ddim_timesteps(25).tolist()
    assert timesteps == golden.want("ddim.timesteps").tolist()[::-1]
    for t, previous in (961, 921), (481, 441), (1, -1):
        assert golden.agrees(f"ddim.x0.{t}", schedule.predict_x0(x, t, eps))
        assert golden.agrees(f"ddim.prev.{t}", schedule.ddim_step(x, eps, t, previous))


# -- diffusion -------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 7, 25, 30, 999, 1000])
def test_ddim_with_the_true_eps_returns_x0(steps):
    schedule, x0, noise = Schedule(), torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    timesteps = schedule.ddim_timesteps(steps)
    assert len(timesteps) == steps and timesteps.min() >= 1 and timesteps.max() <= 999 and (timesteps.diff() >= 0).all()
    chain = [*timesteps.tolist()[::-1], -1]
    x = schedule.add_noise(x0, torch.tensor([chain[0]] * 2), noise)
    for t, previous in zip(chain, chain[1:]):
        a = schedule.a(t)
        eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
        assert torch.allclose(schedule.predict_x0(x, t, eps), x0, atol=1e-4)
        x = schedule.ddim_step(x, eps, t, previous)
    a0 = schedule.alphas_cumprod[0]
    assert torch.allclose(x, a0.sqrt() * x0 + (1 - a0).sqrt() * noise, atol=1e-4)   # the chain ends at a_0, not at 1


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
    """DESIGN's formulas: gamma_c = n_valid / (count_c * n_present * C), whose mean is 1/C of that over classes."""
    real, fake, y = random_case()
    log_p, log_p_fake = (z - z.logsumexp(1, keepdim=True) for z in (real, fake))
    want, n_valid, per_class = torch.zeros(y.shape, dtype=torch.float64), (y != 255).sum(), []
    for c in (0, 2, 3):
        here = y == c
        want[here] = -log_p[:, c][here] * n_valid / (here.sum() * 3 * 5)
        per_class.append(-log_p[:, c][here].mean().item())
    loss_map = disc.layout_loss_map(real, y)
    assert np.allclose(loss_map, want, rtol=1e-5) and (disc.class_balance(y, 5)[y == 255] == 0).all()
    assert np.isclose(disc.per_valid_pixel(loss_map, y), np.mean(per_class) / 5, rtol=1e-5)
    loss, parts = discriminator_loss(real, fake, y, 0.25)
    want_fake = -log_p_fake[:, 4].mean()                            # every pixel, void or not, should be class N
    assert np.isclose(parts["real"], want.sum() / n_valid, rtol=1e-5)
    assert np.isclose(parts["fake"], want_fake, rtol=1e-5)
    assert np.isclose(loss, parts["real"] + 0.25 * want_fake, rtol=1e-5)
    real.requires_grad_()
    loss, _ = discriminator_loss(real, fake, torch.full_like(y, 255), 0.0)          # all void
    loss.backward()
    assert loss == 0 and (real.grad == 0).all()


def test_mean_iou_by_hand():
    label, pred = torch.tensor([0, 0, 0, 1, 1, 255]), torch.tensor([0, 0, 1, 1, 0, 1])
    confusion = disc.confusion_matrix(pred, label, 3)
    assert confusion.tolist() == [[2, 1, 0], [1, 1, 0], [0, 0, 0]]
    miou, iou = disc.mean_iou(confusion)
    assert np.isclose(miou, (2 / 4 + 1 / 3) / 2) and torch.isnan(iou[2])


# -- the unrolled objective (Sec. 3.2) -------------------------------------------------------------


class OneParameter(nn.Module):
    """eps_theta = theta x_t; the "decoder" passes three channels on."""

    def __init__(self):
        super().__init__()
        self.theta, self.schedule = nn.Parameter(torch.tensor(0.3, dtype=torch.float64)), Schedule().double()
        self.vae = SimpleNamespace(decode=lambda z: F.interpolate(z[:, :3], scale_factor=2.0))

    def eps(self, x_t, t, context, layout):
        return self.theta * x_t


def colour_judge(image):
    """Logits linear in the pixel's colour."""
    w = torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3)
    return torch.einsum("nc,bchw->bnhw", w, image.double())


@pytest.mark.parametrize("K", [0, 2, 4])
@pytest.mark.parametrize("mode", ["first", "each", "full"])
def test_gradient_modes_do_what_they_say(mode, K):
    """All agree in value. `first` is the official code's L_0 / stop(L_0) * mean_k L_k, whose mean keeps L_0's graph.
    Void pixels count nowhere."""
    torch.manual_seed(0)
    model, label = OneParameter(), random_case(void=0.3)[2][:, :6, :6]
    theta, s, timesteps = model.theta, model.schedule, model.schedule.ddim_timesteps(25)
    x, start = torch.randn(2, 4, 3, 3, dtype=torch.float64) * 0.1, torch.tensor([5, 9])
    loss, fakes = unrolled_adversarial_loss(model, colour_judge, x, theta * x, start, timesteps, label, None, None,
                                            K, mode)
    gradient = torch.autograd.grad(loss, theta)[0]

    images, maps = [], []               # the K+1 estimates one by one, with what gradient each may carry
    for k in range(K + 1):
        a, a_prev = (s.alphas_cumprod[timesteps[start - i]].view(-1, 1, 1, 1) for i in (k, k + 1))
        eps = x * (theta.detach() if mode == "first" and k > 0 else theta)
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        images.append(model.vae.decode(x0).clamp(-1, 1))
        maps.append(disc.layout_loss_map(colour_judge(images[-1]), label))
        x = a_prev.sqrt() * x0 + (1 - a_prev).sqrt() * eps
        x = x if mode == "full" else x.detach()
    valid, mean = label != 255, torch.stack(maps).mean(0)
    assert torch.isclose(loss, mean.sum() / valid.sum(), rtol=1e-6)
    if mode == "first":
        mean = (mean / maps[0] + 1 / (K + 1)).detach() * maps[0]
    want = torch.autograd.grad(mean[valid].sum() / valid.sum(), theta)[0]
    assert torch.isclose(gradient, want, rtol=1e-4) and want.abs() > 1e-3
    assert not fakes.requires_grad
    for i in range(2):                                              # each fake is one of the estimates
        assert any(torch.allclose(fakes[i], image[i].float(), atol=1e-6) for image in images)


# -- the toy's networks with random weights --------------------------------------------------------


def tiny_model(adapter="controlnet", hint="classes"):
    torch.manual_seed(0)
    preset = PRESETS["toy"]
    text = TextEncoder(**preset.text)
    return ALDM(preset, UNet(preset.unet), VAE(preset.vae), text, class_table("toy"), adapter, hint)


@pytest.fixture(scope="module")
def scene():
    torch.manual_seed(1)
    label = torch.stack([torch.from_numpy(toy_scene(i)[1]).long() for i in range(2)])
    words = ["a street", "at night"]
    return SimpleNamespace(label=label, x=torch.randn(2, 16, 16, 16), t=torch.tensor([1, 700]), words=words)


ADAPTERS = [("controlnet", "classes"), ("controlnet", "color"), ("t2i", "color"), ("oft", "classes"),
            ("freestyle", "classes")]


@pytest.mark.parametrize("adapter, hint", ADAPTERS)
def test_an_adapter_starts_as_an_identity_and_gradient_reaches_exactly_it(adapter, hint, scene):
    model, base = tiny_model(adapter, hint), tiny_model("freestyle").unet
    encoder_has_graph = []
    for block in [*model.unet.input_blocks, model.unet.middle_block]:
        block.register_forward_hook(lambda block, x, h: encoder_has_graph.append(h.requires_grad))
    eps = model.eps(scene.x, scene.t, scene.words, scene.label)
    assert eps.requires_grad and len(encoder_has_graph) > 5
    if adapter == "controlnet":                                     # its gradient comes through the decoder half alone
        assert not any(encoder_has_graph)
    if adapter != "freestyle":
        assert torch.allclose(eps, base(scene.x, scene.t, model.text.encode(scene.words)), atol=1e-5)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt = torch.optim.AdamW([p for p in model.adapter.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):          # zero convolutions: what lies behind them moves in the second step
        F.mse_loss(model.eps(scene.x, scene.t, scene.words, scene.label), scene.x * 0.5).backward()
        assert all(p.requires_grad or p.grad is None for p in model.parameters())
        opt.step()
        opt.zero_grad()
    trained = {id(p) for p in model.adapter.parameters()}
    mine = {name for name, p in model.named_parameters() if id(p) in trained}
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    silent = {name for name in mine - changed if ".norm" not in name}
    assert changed <= mine and len(silent) <= 0.02 * len(mine), silent      # (only what does not matter stands still)


def test_rotations_are_orthogonal_and_merge(scene):
    model = tiny_model("oft")
    with torch.no_grad():
        for p in model.adapter.parameters():
            p.add_(torch.randn_like(p) * 0.3)
        for p in model.adapter.rotations.values():
            R = Rotation(p.double()).matrix()
            assert torch.allclose(R @ R.mT, torch.eye(R.shape[-1]).double().expand_as(R), atol=1e-10)
        before = model.eps(scene.x, scene.t, scene.words, scene.label)
        OFT.merge(model.unet)
        assert torch.allclose(model.eps(scene.x, scene.t, scene.words, scene.label), before, atol=1e-4)


def test_rectified_attention_keeps_classes_apart():
    """Each pixel attends to the words of its own class, and to those that name none; the text is the classes' names."""
    model, label = tiny_model("freestyle"), torch.full((1, 64, 64), 13)
    label[:, 28:], label[:, 60:] = 0, 255           # a car above, road below, then void; in the order of their ids
    layout = model.encode_layout(label)
    assert torch.allclose(layout["context"], model.text(model.text.tokenize(["road,car,"])), atol=1e-5)
    shut = [(~layout["mask"][0, :, row, 0]).nonzero()[:, 0].tolist() for row in (0, 10, 15)]
    assert shut == [[1, 2], [3, 4], [1, 2, 3, 4]] and layout["mask"].shape == (1, 77, 16, 16)
    x, t = torch.randn(1, 16, 16, 16), torch.tensor([500])
    day, night, road = (model.eps(x, t, [words], y) for words, y in (("day", label), ("night", label),
                                                                     ("day", torch.zeros_like(label))))
    assert torch.equal(day, night) and not torch.allclose(day, road, atol=1e-3)     # the prompt is passed over

    masks, attention = [], model.unet.input_blocks[4][1].transformer_blocks[0].attn2
    attention.register_forward_pre_hook(lambda module, inputs: masks.append(inputs[2]))
    model.eps(x, t, [""], layout)                   # of 8 x 8 pixels, each sees the words of its top left one
    assert torch.equal(masks[0][0, 0], layout["mask"][0, :, ::2, ::2].flatten(1).T)


def test_class_embeddings_are_of_photos_and_whitening_puts_them_equally_far_apart():
    text = TextEncoder(32, 1, 2)
    table = text.class_table(["car", "traffic sign"])
    photos = text.tokenize(["A photo of car", "A photo of traffic sign", ""])
    assert torch.allclose(table, text.pooled(photos), atol=1e-6)
    white = aldm.whiten(5 + torch.randn(20, 96) / 100)
    assert torch.allclose(torch.pdist(white), torch.tensor((2 * 96) ** 0.5), atol=1e-3)
    assert white.mean(0).abs().max() < 1e-4


def test_colours_of_a_hint():
    city, ade = class_table("cityscapes"), class_table("ade20k")
    own, of_ade = aldm.hint_palette(city, None), aldm.hint_palette(city, "ade20k")
    assert own[13].mul(255).tolist() == pytest.approx([0, 0, 142]) and own[19].tolist() == [0, 0, 0]
    assert of_ade[13].mul(255).tolist() == pytest.approx(ade.palette[ade.names.index("car")].tolist())
    assert of_ade.shape == (20, 3) and of_ade[19].tolist() == [0, 0, 0]
    assert torch.equal(aldm.hint_palette(ade, "ade20k")[:150] * 255, torch.tensor(ade.palette).float())


def test_class_hint_folded_with_its_table(scene):
    """A one-hot layout through the folded first convolution = the map of class embeddings through the plain one."""
    model = tiny_model()
    model.layout.average = False
    nn.init.normal_(model.adapter.input_hint_block[-1].weight)
    small = scene.label[:, ::2, ::2]
    hint = model.layout.table[small.where(small != 255, 19)].permute(0, 3, 1, 2)     # subsample, look up
    want = model.adapter.input_hint_block(hint)
    assert torch.allclose(model.encode_layout(scene.label)["hint"], want, atol=1e-4)


def test_tokens_and_what_is_cut():
    text = TextEncoder(32, 1, 2)
    assert text.tokenize(["a street!"])[0, :5].tolist() == [49406, 320, 2012, 256, 49407]
    long = " ".join(["car"] * 80)
    assert text.tokenize([long])[0, -1] == 49407 and text.cut(long).split() == ["car"] * 5 and text.cut("a car") == ""


@torch.no_grad()
def test_guidance_is_one_batch_of_two(scene):
    model = tiny_model()
    noise, label = scene.x[:1], scene.label[:1]
    context, uncond = model.text.encode(["night"]), model.text.encode([""])
    x, layout = noise, model.encode_layout(label)
    for t, previous in ((501, 1), (1, -1)):
        e = [model.eps(x, torch.tensor([t]), c, layout) for c in (uncond, context)]
        x = model.schedule.ddim_step(x, e[0] + 3.0 * (e[1] - e[0]), t, previous)
    assert torch.allclose(model.sample(label, context, uncond, steps=2, guidance=3.0, noise=noise), x, atol=1e-4)


# -- weight files ----------------------------------------------------------------------------------


TINY = Preset(UNetConfig(model_channels=16, num_heads=4, context_dim=64, groups=16), VAEConfig(ch=16, groups=16),
              dict(width=64, layers=2, heads=4), dict(layers=(1, 1, 2, 1), width=8, fpn_dim=16), (64, 48, 32), 512,
              hint_average=False, whiten=False, guidance=7.5)
SD_PREFIX = {"unet": "model.diffusion_model.", "vae": "first_stage_model.",
             "text": "cond_stage_model.transformer.text_model.", "control": "control_model."}
WEIGHT, BIAS = "decoder.conv_last.1.weight", "decoder.conv_last.1.bias"
T = torch.zeros(2, 2)


@functools.cache
def read_names(file):
    """One of the lists of names and shapes beside the project."""
    if not SHARED.exists():
        pytest.skip("the folder ../shared is not there")
    return json.loads((SHARED / file).read_text())


def draw(module):
    """A module's state dict with random values; the counters in it are whole numbers."""
    return {name: 0.1 * torch.randn(t.shape) if t.is_floating_point() else torch.tensor(7)
            for name, t in module.state_dict().items()}


def segmenter_of(outputs):
    return UperNet(outputs, **TINY.segmenter)


@functools.cache
def sd_file(dtype=torch.float32):
    """A Stable Diffusion file in the tiny configuration; its text encoder has Hugging Face's names."""
    text = {name: 0.1 * torch.randn(shape) for name, shape in read_names("sd15_format.json")["text_small"].items()}
    tensors = add(SD_PREFIX["unet"], draw(UNet(TINY.unet))) | add(SD_PREFIX["vae"], draw(VAE(TINY.vae))) | text
    return {name: t.to(dtype) for name, t in tensors.items()}


def same(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def add(prefix, tensors):
    return {prefix + n: t for n, t in tensors.items()}


def cut(tensors, prefix):
    return {n[len(prefix):]: t for n, t in tensors.items() if n.startswith(prefix)}


def write_weights(tensors, path):
    """Write weights in the format that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({n: t.clone() for n, t in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)


def refuses(call, *words):
    assert "\n" not in refuses_with(words, call)


def ways_to_read(path):
    """All that reads a file of weights."""
    toy, text = class_table("toy"), SimpleNamespace(class_table=lambda names: torch.zeros(1, 64))
    return (lambda: load_weights(path), lambda: read_adapter(path), lambda: load_frozen("tiny", path),
            lambda: load_segmenter([path], segmenter_of(20), toy), lambda: load_class_embeddings(path, toy, text))


def test_full_size_names_load_strictly(monkeypatch):
    names = read_names("sd15_format.json")
    passed_over = "betas", "alphas_cumprod", "model_ema.decay", SD_PREFIX["text"] + "embeddings.position_ids"
    with torch.device("meta"):
        nets = dict(unet=UNet(), vae=VAE(), text=TextEncoder(), control=ControlNet(), segmenter=UperNet(20))
        tensors = {n: torch.empty(shape) for part in nets for n, shape in names[part].items()}
        tensors |= {n: torch.empty(7) for n in passed_over}
    assert len(tensors) == 686 + 248 + 196 + 334 + 1064 + len(passed_over)
    monkeypatch.setattr(aldm, "read_file", lambda path: (tensors, {}))
    parts = load_weights("sd.safetensors")
    assert set(parts) == set(nets)
    for part, net in nets.items():
        load_into(net, parts[part], part)


@pytest.mark.parametrize("kind, dtype", [
    ("safetensors", torch.float16), ("zip", torch.float16), ("legacy", torch.float32)])
def test_sd_single_file(tmp_path, tiny, kind, dtype):
    """Told by its content, not its name; what training leaves in it, a class of a package that is not there, too, is
    passed over."""
    tensors, path = sd_file(dtype), tmp_path / "sd.ckpt"
    if kind == "safetensors":
        save_file(tensors, path, {"format": "pt"})
    else:
        package = "pytorch_lightning.callbacks.model_checkpoint"
        Callback = type("ModelCheckpoint", (), {"__module__": package})
        there = {"pytorch_lightning": types.ModuleType(""), package: SimpleNamespace(ModelCheckpoint=Callback)}
        names = ("model_ema.diffusion_modelout2bias", "betas", "logvar", "first_stage_model.loss.logvar",
                 "cond_stage_model.transformer.text_projection.weight", SD_PREFIX["text"] + "embeddings.position_ids")
        content = {"state_dict": tensors | dict.fromkeys(names, T), "step": np.float64(3), "optimizer_states": [{}],
                   "callbacks": {Callback: {"best_model_path": "x"}, "object": Callback()}}
        with mock.patch.dict(sys.modules, there):
            torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    parts = load_weights(path)
    assert set(parts) == {"unet", "vae", "text"} and "pytorch_lightning" not in sys.modules
    assert not any("Ignored" in str(g) for g in torch.serialization.get_safe_globals())
    if kind != "legacy" and sys.platform == "linux":
        assert str(path) in Path("/proc/self/maps").read_text()     # memory-mapped
    unet, vae, text, rest = load_frozen("tiny", path, "cpu", dtype)
    assert rest == {} and same(unet.state_dict(), cut(tensors, SD_PREFIX["unet"]))
    assert same(vae.state_dict(), {n: t.float() for n, t in cut(tensors, SD_PREFIX["vae"]).items()})
    assert same(text.state_dict(), {n: t.float() for n, t in parts["text"].items()})
    assert torch.equal(text.attn_mask, TextEncoder(**TINY.text).attn_mask)


def test_adapters_of_others(tmp_path):
    """ControlNets and T2I-Adapters: their tensors tell which hint they take."""
    networks = ControlNet(TINY.unet, 64, TINY.hint_widths), ControlNet(TINY.unet, 3), T2IAdapter(TINY.unet)
    classes, colors, t2i = map(draw, networks)
    theirs = to_diffusers("controlnet", colors)
    for name, state, tensors, *wanted in (
            ("c.safetensors", classes, classes, "controlnet", "classes", None),
            ("c.pth", classes, add("control_model.", classes), "controlnet", "classes", None),
            ("c.ckpt", colors, sd_file() | add("control_model.", colors), "controlnet", "color", "ade20k"),
            ("c/diffusion_pytorch_model.bin", colors, theirs, "controlnet", "color", "ade20k"),
            ("t2iadapter_seg_sd14v1.pth", t2i, t2i, "t2i", "color", None)):
        path = write_weights(tensors, tmp_path / name)
        meta, parts = read_adapter(path.parent if "/" in name else path)
        assert same(parts["adapter"], state) and "layout" not in parts
        assert [meta[key] for key in ("adapter", "hint", "hint_colors")] == wanted
        assert meta["dataset"] is meta["step"] is meta["names"] is None
    # body.{2 i + j} is diffusers' body.{i}.resnets.{j}; a level's first block has in_conv
    theirs = ("adapter.conv_in.bias", "adapter.body.1.in_conv.bias", "adapter.body.3.resnets.1.block2.bias")
    found = aldm.split_parts("a.safetensors", dict.fromkeys(theirs, T))
    assert list(found["adapter"]) == ["conv_in.bias", "body.2.in_conv.bias", "body.7.block2.bias"]


@pytest.mark.parametrize("outputs, dataset, normalize", [
    (20, "cityscapes", False), (151, "ade20k", True), (172, "coco", True)])
def test_official_aldm_checkpoint(tmp_path, tiny, outputs, dataset, normalize):
    classes, segmenter = class_table(dataset), draw(segmenter_of(outputs))
    control = draw(ControlNet(TINY.unet, 64, TINY.hint_widths))
    tensors = sd_file() | add("control_model.", control) | add("segmenter.segmenter.", segmenter)
    path = write_weights({"state_dict": tensors}, tmp_path / "a.ckpt")
    meta, parts = read_adapter(path)
    assert set(parts) == {"unet", "vae", "text", "control", "segmenter", "adapter"}
    assert same(parts["segmenter"], segmenter) and same(parts["control"], control)
    assert (meta["dataset"], meta["adapter"], meta["hint"]) == (dataset, "controlnet", "classes")
    assert meta["names"] == list(classes.names) and meta["normalize"] == normalize
    judge = segmenter_of(outputs)
    load_segmenter([path], judge, classes)
    assert same(judge.state_dict(), segmenter) and judge.normalize is normalize
    assert set(load_frozen("tiny", path)[3]) == {"control", "segmenter"}    # a base model, too


@pytest.mark.parametrize("part, key", [("unet", "unet"), ("vae", "vae"), ("control", "controlnet")])
def test_every_name_of_diffusers(part, key):
    """Each tensor of the whole table holds its number: it arrives under our name, in our shape."""
    names = read_names("diffusers_names.json")[key]
    tensors = {name: torch.tensor(float(i)).expand(shape) for i, (name, (_, shape)) in enumerate(names.items())}
    parts = aldm.split_parts("file", tensors)
    with torch.device("meta"):
        net = {"unet": UNet, "vae": VAE, "control": lambda: ControlNet(hint_channels=3)}[part]()
    assert list(parts) == [part]
    assert {n: t.shape for n, t in parts[part].items()} == {n: t.shape for n, t in net.state_dict().items()}
    for i, (ours, _) in enumerate(names.values()):
        assert parts[part][ours].flatten()[0] == i, ours


def to_diffusers(key, state):
    """A part in our names -> in diffusers', by the table; its VAE's attention is linear."""
    names = read_names("diffusers_names.json")[key]
    theirs = {name: state[ours] for name, (ours, _) in names.items()}
    return {n: t[:, :, 0, 0] if ".attentions.0.to_" in n and t.ndim == 4 else t for n, t in theirs.items()}


@pytest.mark.parametrize("kind, suffix", [
    ("old names", ".bin"), ("hub", ".fp16.safetensors"), ("shards", ".safetensors")])
def test_pipeline_folder(tmp_path, tiny, kind, suffix):
    """diffusers' folder, or that of the Hugging Face cache around it."""
    tensors = sd_file(torch.float16 if "fp16" in suffix else torch.float32)
    unet, vae, text = (cut(tensors, SD_PREFIX[part]) for part in ("unet", "vae", "text"))
    unet, vae = to_diffusers("unet", unet), to_diffusers("vae", vae)
    folder = tmp_path / "p"
    if kind == "old names":
        for new, old in ("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"):
            vae = {n.replace(new, old): t for n, t in vae.items()}
    if kind == "hub":       # an older snapshot lies beside it
        (folder / "snapshots" / "ffff").mkdir(parents=True)
        os.utime(folder / "snapshots" / "ffff", (1, 1))
        folder = folder / "snapshots" / "0123abc"
    write_weights(vae, folder / "vae" / f"diffusion_pytorch_model{suffix}")
    write_weights(add("text_model.", text), folder / "text_encoder" / f"model{suffix}")
    path = folder / "unet" / f"diffusion_pytorch_model{suffix}"
    if kind == "shards":    # of full precision, which comes first; safetensors come before pickles
        for i in range(2):
            write_weights(dict(list(unet.items())[i::2]), path.with_stem(f"{path.stem}-0000{i + 1}-of-00002"))
        for ending in (".fp16.safetensors", ".non_ema.safetensors", ".bin"):
            write_weights({"conv_in.weight": torch.zeros(3)}, path.with_suffix(ending))
    else:
        write_weights(unet, path)
    want = load_weights(write_weights(tensors, tmp_path / "sd.safetensors"))
    parts = load_weights(tmp_path / "p")
    assert parts.keys() == want.keys() and all(same(parts[part], want[part]) for part in want)


@pytest.mark.parametrize("key", ["cityscapes", "ade20k", "coco", "toy"])
def test_ade20k_segmenter_starts_every_class_from_its_nearest(tmp_path, key):
    """From mit-semseg's pair of files, as its synchronised batch norm left them."""
    classes, ade, state = class_table(key), class_table("ade20k").names, draw(segmenter_of(150))
    leftovers = {n.replace("running_var", "_tmp_running_var"): t for n, t in state.items()}
    content = {n: t for n, t in (state | leftovers).items() if "num_batches" not in n}      # too new
    files = [write_weights(cut(content, part), tmp_path / f"{part}pth") for part in ("encoder.", "decoder.")]
    judge = segmenter_of(len(classes.names) + 1)
    before = judge.decoder.conv_last[1].weight.detach().clone()
    load_segmenter(files, judge, classes)
    after = judge.state_dict()
    assert torch.equal(after["encoder.layer3.1.bn2.running_var"], state["encoder.layer3.1.bn2.running_var"])
    for i, name in enumerate(classes.ade):
        row = i if key == "ade20k" else ade.index(name) if name else None       # (two are named screen)
        assert torch.equal(after[WEIGHT][i], before[i] if row is None else state[WEIGHT][row])
        assert row is None or after[BIAS][i] == state[BIAS][row]
    assert torch.equal(after[WEIGHT][-1], before[-1]) and judge.normalize       # "fake"; ImageNet's mean and deviation
    assert sum(name is not None for name in classes.ade) > 0.7 * len(classes.names)


@pytest.mark.parametrize("names, ours, theirs, rows", [     # with and without the output for fakes
    (None, 20, 20, {i: i for i in range(20)}), (None, 20, 19, {i: i for i in range(19)}),
    (None, 19, 20, {i: i for i in range(19)}),
    (["car", "moon", "road"], 4, 19, {0: 13, 2: 0}), (["moon"], 2, 19, {}),
    ([*(f"class {i}" for i in range(18)), "sky"], 20, 20, {18: 10, 19: 19})])
def test_classes_start_from_a_segmenter_by_their_names(tmp_path, names, ours, theirs, rows):
    toy, judge, state = class_table("toy"), segmenter_of(ours), draw(segmenter_of(theirs))
    (tmp_path / "classes.txt").write_text("\n".join(names or toy.names))
    before = judge.decoder.conv_last[1].weight.detach().clone()
    load_segmenter(state, judge, class_table(tmp_path), {"names": list(toy.names), "normalize": True})
    assert judge.normalize
    for i, row in enumerate(judge.decoder.conv_last[1].weight):
        assert torch.equal(row, state[WEIGHT][rows[i]] if i in rows else before[i])


def adapter_meta(kind, hint="classes"):
    classes = class_table("toy")
    return dict(preset="toy", dataset="toy", names=list(classes.names), palette=classes.palette.tolist(),
                file_ids=classes.file_ids.tolist(), void=classes.void.tolist(), adapter=kind, hint=hint,
                hint_colors=None, step=12, normalize=False, format="aldm-adapter")


@pytest.mark.parametrize("kind, hint", ADAPTERS)
def test_adapter_round_trip(tmp_path, kind, hint, scene):
    model, other, classes = tiny_model(kind, hint), tiny_model(kind, hint), class_table("toy")
    for p in model.adapter.parameters():
        p.data.normal_(std=0.1)
    state = {n: t.detach() for n, t in model.adapter.state_dict().items()}
    meta, path = adapter_meta(kind, hint), tmp_path / "run" / "adapter.safetensors"
    checkpoint = write_weights(
        {"step": 12, "meta": meta, "adapter": state, "layout": model.layout.state_dict(),
         "discriminator": draw(segmenter_of(20)), "opt_g": {"state": {0: {"exp_avg": T}}}},
        path.with_name("checkpoint_0000012.pt"))
    save_adapter(path, model, {**meta, "palette": classes.palette})
    prefix = {"controlnet": "control_model.", "t2i": "", "oft": "adapter.", "freestyle": "model.diffusion_model."}[kind]
    assert set(load_file(path)) == {prefix + n for n in state} | {"layout.table"}
    for file in (path, path.parent, checkpoint):
        found, parts = read_adapter(file)
        assert found == meta and same(parts["adapter"], state)
        assert torch.equal(parts["layout"]["table"], model.layout.table)
        assert ("segmenter" in parts) == (file == checkpoint)
    load_into(other.adapter, parts["adapter"], "adapter")   # in place: OFT's rotations are shared with the UNet
    with torch.no_grad():
        eps, again = (m.eps(scene.x, scene.t, scene.words, scene.label) for m in (model, other))
    assert eps.isfinite().all() and torch.equal(eps, again)
    save_adapter(path, model, meta, torch.bfloat16)
    parts = read_adapter(path)[1]
    assert same(parts["adapter"], {n: t.bfloat16() for n, t in state.items()})
    assert torch.equal(parts["layout"]["table"], model.layout.table)        # fp32 as before
    path.unlink()
    assert read_adapter(path.parent)[0]["step"] == 12       # the checkpoint, then
    judge = segmenter_of(20)
    load_segmenter([checkpoint], judge, classes)
    assert same(judge.state_dict(), load_weights(checkpoint)["segmenter"])


def test_odd_metadata(tmp_path):
    path, checkpoint = tmp_path / "adapter.safetensors", tmp_path / "checkpoint_1.pt"
    state, meta = {"body.0.block2.bias": T}, adapter_meta("t2i", "color")
    new_keys = ("hint_colors", "normalize", "step", "dataset")
    older = {key: value for key, value in meta.items() if key not in new_keys}
    aldm.save_tensors(path, state, older)
    assert read_adapter(path)[0] == {**older, **dict.fromkeys(new_keys)}
    for key, value in (("adapter", "gligen"), ("preset", "sd21"), ("preset", ["toy"]),
                       ("names", None), ("names", []), ("palette", None)):
        aldm.save_tensors(path, state, {**meta, key: value})
        torch.save({"step": 3, "meta": {**meta, key: value}, "adapter": state}, checkpoint)
        for file in (path, checkpoint):
            refuses(lambda: read_adapter(file), str(file), key, repr(value))
    aldm.save_tensors(path, {"segmenter.x": T}, {"format": "aldm-segmenter", "preset": "toy"})
    refuses(lambda: load_segmenter([path], None, class_table("toy")), str(path), "names")


def test_toy_base_file(tmp_path):
    """It is made part after part, and keeps those rows of the token embedding that were trained."""
    preset, path, trained = PRESETS["toy"], tmp_path / "toy.safetensors", [5, 320, 49407]
    text, vae, segmenter = TextEncoder(**preset.text), VAE(preset.vae), UperNet(19, **preset.segmenter)
    segmenter.encoder.bn1.num_batches_tracked += 70000      # more than fp16 could hold
    save_base(path, {"vae": vae})
    save_base(path, {**load_weights(path), "text": text}, trained)
    save_base(path, {**load_weights(path), "segmenter": segmenter})
    assert load_file(path)["text.token_embedding.ids"].tolist() == trained
    parts = load_weights(path)
    table = torch.empty(49408, 96).normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    table[trained] = text.token_embedding.weight[trained].half().float()
    assert torch.equal(parts["text"]["token_embedding.weight"], table)
    assert same(parts["vae"], {n: t.half() for n, t in vae.state_dict().items()})
    assert set(parts) == {"vae", "text", "segmenter"}
    assert parts["segmenter"]["encoder.bn1.num_batches_tracked"] == 70000


def test_file_of_class_embeddings(tmp_path):
    text, classes = TextEncoder(**TINY.text), class_table("cityscapes")
    table, null, path = torch.randn(19, 64), text.class_table([]), tmp_path / "table.pth"
    torch.save(table, path)
    assert torch.equal(load_class_embeddings(path, classes, text), torch.cat([table, null]))
    refuses(lambda: load_class_embeddings(path, class_table("ade20k"), text), "[19, 64], but ade20k wants [150, 64]")
    torch.save(null + 1, tmp_path / "null_embedding.pth")
    assert torch.equal(load_class_embeddings(path, classes), torch.cat([table, null + 1]))
    for wrong in (torch.randn(19, 32), torch.tensor(1.0), {"a": table}):
        torch.save(wrong, path)
        refuses(lambda: load_class_embeddings(path, classes, text), str(path), "[19, 64]")


@pytest.mark.parametrize("rest, changes, words", [          # with or without the rest of a Stable Diffusion file
    (False, {"unet.lora_A.weight": T}, ["known here (unet.lora_A", "expected is Stable Diffusion 1.x"]),
    (False, {SD_PREFIX["unet"] + "out.2.bias": T, SD_PREFIX["vae"] + "decoder.conv_out.bias": T,
             "conditioner.embedders.0.x": T}, ["holds no text", "expected"]),     # Stable Diffusion XL
    (True, {SD_PREFIX["unet"] + "input_blocks.0.0.weight": torch.zeros(16, 9, 3, 3)},
     ["unet: does not fit", "size mismatch for input_blocks.0.0.weight", "[16, 9, 3, 3]"]),
    (True, {SD_PREFIX["vae"] + "decoder.norm_out.bias": None}, ["vae", "Missing", "norm_out"])])
def test_base_model_that_does_not_fit(tmp_path, tiny, rest, changes, words):
    tensors = {name: t for name, t in ((sd_file() if rest else {}) | changes).items() if t is not None}
    path = write_weights(tensors, tmp_path / "sd.safetensors")
    refuses(lambda: load_frozen("tiny", path), str(path), *words)
    refuses(lambda: read_adapter(path), str(path))


def spoil(tensors, name, value):
    tensors = {n: t.clone() for n, t in tensors.items()}
    tensors[name].view(-1)[-1] = value
    return tensors


def test_weights_that_are_not_finite(tmp_path, tiny):
    nan, infinite, name = float("nan"), -float("inf"), SD_PREFIX["vae"] + "decoder.up.1.block.0.conv1.weight"
    sd = write_weights(spoil(sd_file(torch.float16), name, infinite), tmp_path / "sd")
    refuses(lambda: load_frozen("tiny", sd), f"{sd}: vae: decoder.up.1.block.0.conv1.weight holds NaN or infinite")
    adapter, path = T2IAdapter(TINY.unet), tmp_path / "a.safetensors"
    state = adapter.state_dict()
    refuses(lambda: load_into(adapter, spoil(state, "conv_in.bias", nan), "a.pth"), "a.pth: conv_in.bias")
    aldm.save_tensors(path, state | {"layout.table": torch.full((20, 64), nan)}, adapter_meta("t2i", "color"))
    refuses(lambda: read_adapter(path), str(path), "layout: table")
    judge = spoil(draw(segmenter_of(20)), BIAS, infinite)
    refuses(lambda: load_segmenter(judge, segmenter_of(20), class_table("toy")), "conv_last.1")
    torch.save(torch.full((19, 64), nan), tmp_path / "t.pth")
    refuses(ways_to_read(tmp_path / "t.pth")[-1], "t.pth", "NaN")


def test_damaged_files(tmp_path, tiny, monkeypatch):
    vae, old = draw(VAE(TINY.vae)), tmp_path / "old"
    st, zipped = (write_weights(vae, tmp_path / name) for name in ("ok.safetensors", "ok.ckpt"))
    torch.save(vae, old, _use_new_zipfile_serialization=False)
    contents = [(b"", "Git LFS"), (b"<!DOCTYPE html><html>Not found</html>", "web page"), (bytes(range(256)) * 9, ""),
                (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "Git LFS")]
    for path, sizes in ((st, (10, 900, -100)), (zipped, (700, -100)), (old, (1000, -100))):
        contents += [(path.read_bytes()[:size], "cut short") for size in sizes]
    (tmp_path / "void" / "unet").mkdir(parents=True)
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    cases = [("nowhere.ckpt", "no such file"), ("void", ""), ("list.pt", "")]
    for i, (content, word) in enumerate(contents):
        (tmp_path / f"{i}.ckpt").write_bytes(content)
        cases.append((f"{i}.ckpt", word))
    for name, word in cases:
        for call in ways_to_read(tmp_path / name):
            refuses(call, str(tmp_path / name), word)
    denied = mock.Mock(side_effect=PermissionError(13, "Permission denied"))
    monkeypatch.setattr(aldm, "open", denied, raising=False)        # (root may read everything)
    refuses(lambda: load_weights(st), f"{st}: permission denied")


class Evil:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("kind", ["zip", "legacy", 0, 2])
def test_nothing_of_a_pickle_is_executed(tmp_path, tiny, kind):
    marker, path = tmp_path / "executed", tmp_path / "run" / "checkpoint_0000001.pt"
    evil, word = Evil(f"touch {marker}"), "refused, nothing of it was executed"
    path.parent.mkdir()
    for content in (evil, {"state_dict": {"quant_conv.weight": T, "x": evil}},
                    {"meta": evil, "adapter": {"conv_in.weight": T}}, [T, evil]):
        if kind in ("zip", "legacy"):
            torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
        else:
            path.write_bytes(pickle.dumps(content, kind))
        for call in (*ways_to_read(path), lambda: read_adapter(path.parent)):
            refuses(call, str(path), word if kind in ("zip", "legacy") else "")
    assert not marker.exists()
    pickle.loads(pickle.dumps(evil))
    assert marker.exists()      # it would have


def test_base_model_is_looked_up_where_it_may_be(tmp_path, monkeypatch):
    cached, download = {}, mock.Mock(side_effect=OSError("offline\nsecond line"))
    monkeypatch.setattr(aldm, "hf_hub_download", download)
    monkeypatch.setattr(aldm, "try_to_load_from_cache", lambda repo, name: cached.get((repo, name)))
    new, file = "stable-diffusion-v1-5/stable-diffusion-v1-5", "v1-5-pruned-emaonly.safetensors"
    cached[new, "model_index.json"] = str(tmp_path / "model_index.json")    # and nothing but that
    refuses(lambda: load_frozen("sd15"), file, "--sd PATH", "huggingface.co/")
    download.assert_called_once_with(new, file)
    pipeline = tmp_path / "pipeline"
    for name in ("unet", "vae", "text_encoder"):
        write_weights({"x": T}, pipeline / name / "model.safetensors")
    cached["runwayml/stable-diffusion-v1-5", "model_index.json"] = f"{pipeline}/model_index.json"
    assert aldm.base_file("sd15") == pipeline
    cached["runwayml/stable-diffusion-v1-5", file] = str(tmp_path / file)
    assert aldm.base_file("sd15") == str(tmp_path / file)   # where there are both, the single file


# -- layouts and data sets -------------------------------------------------------------------------


def blocks(*ids, palette=None, clear=None, kind=np.uint8):
    """A layout with one square per id, 16 pixels wide each -> PIL.Image; clear: what PNG's tRNS makes transparent."""
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


def read_blocks(path, dataset="cityscapes"):
    """What `read_layout` reads from a file of `blocks`: a list."""
    return read_layout(path, dataset)[0, ::16].tolist()


def write_classes(folder, text):
    (folder / "classes.txt").write_text(text, "utf-8")
    return class_table(folder)


def refuses_with(words, call, *args, **options):
    """`call` raises InputError with all these words -> its text."""
    with pytest.raises(InputError) as caught:
        call(*args, **options)
    text = str(caught.value)
    assert all(word in text for word in words), text
    return text


@pytest.mark.parametrize("key, value", [
    ("cityscapes", "f4b9ebc410c9ddfe"), ("ade20k", "9cf6d91603db70d8"), ("coco", "bcbd73363f772936")])
def test_published_classes_go_to_ids_and_colours_and_back(tmp_path, key, value):
    classes = class_table(key)
    content = classes.names, classes.palette.tolist(), classes.ade, classes.file_ids.tolist(), classes.void.tolist()
    assert hashlib.sha256(repr(content).encode()).hexdigest().startswith(value)
    want = [*range(len(classes.names)), IGNORE]
    ids = [content[3].index(c) for c in want]
    for name, kind in (("a.png", np.uint8), ("wide.png", np.uint16), ("wide.tif", np.int32)):
        assert read_blocks(save(tmp_path / name, blocks(*ids, kind=kind)), classes) == want
    again = write_classes(tmp_path, data.classes_text(classes))
    assert again.names == classes.names and again.ade == classes.ade
    assert (again.palette != classes.palette).any(1).sum() == (key == "ade20k")
    colours = save(tmp_path / "colour.png", colorize(blocks(*want), key))
    if key == "ade20k":                       # its palette gives road and skyscraper one colour; ids tell them apart
        path = save(tmp_path / "a.png", blocks(7, 49, palette=[[0] * 3, *classes.palette]))
        assert read_blocks(path, key) == [6, 48]
        want[48] = 6
    assert read_blocks(colours, key) == want and read_layout(colours, key).dtype == torch.int64


def test_class_table_of_a_folder(tmp_path):
    classes = write_classes(tmp_path, "\ufeff# mine\r\nroad 128 64 128\r\n\r\nbrick house = house\nplatform 9\n"
                                      "void 9 9 9\nplatform 10: 1 2 3\ncar, 7, 8, 9\nVOID\n")
    assert classes.names == ("road", "brick house", "platform 9", "platform 10", "car")
    assert classes.palette[[0, 3, 4]].tolist() == [[128, 64, 128], [1, 2, 3], [7, 8, 9]]
    assert classes.ade == ("road", "house", None, None, "car") and classes.void.tolist() == [[0, 0, 0], [9, 9, 9]]
    assert classes.file_ids.tolist() == [0, 1, 2, 255, 3, 4, 255] + [-1] * 248 + [255]
    assert read_blocks(save(tmp_path / "ids.png", blocks(0, 1, 5, 3)), tmp_path) == [0, 1, 4, 255]
    path = save(tmp_path / "colours.png", colorize(blocks(0, 1, 4, 255), tmp_path))
    assert read_blocks(path, tmp_path) == [0, 1, 4, 255]
    palette = write_classes(tmp_path, "\n".join(f"class{i}" for i in range(255))).palette
    assert len(np.unique(palette, axis=0)) == 255 and palette.any(1).all()
    first = palette[0].tolist()                                     # a colour that is given is given to no other class
    palette = write_classes(tmp_path, "a\nb {} {} {}".format(*first)).palette.tolist()
    assert palette[1] == first != palette[0]


@pytest.mark.parametrize("text", [
    "traffic light 1 2 3\nroad 4 5 6", "traffic light;1;2;3\nroad; 4; 5; 6", "traffic light: 1 2 3\nroad: 4 5 6",
    "traffic light\t1\t2\t3\nroad\t4\t5\t6", "name,r,g,b\ntraffic light,1,2,3\nroad,4,5,6",
    "id,name,R,G,B\n0,traffic light,1,2,3\n1,road,4,5,6", "0 traffic light 1 2 3\n1 road 4 5 6",
    "# label:color_rgb:parts:actions\ntraffic light:1,2,3::\nroad:4,5,6::",
    '"traffic light",1,2,3,255\n"road",4,5,6,255'])
def test_other_tools_class_lists_are_read(tmp_path, text):
    classes = write_classes(tmp_path, text)
    assert classes.names == ("traffic light", "road") and classes.palette.tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("text, word", [
    ("road 128 64", "line 1"), ("a\nroad 300 0 0", "line 2"), ("128 64 128", "line 1"), ("road -1 0 0", "line 1"),
    ("road 0.5 0.1 0.2", "line 1"), ("road #804080", "line 1"), ("road,128", "line 1"), (",,", "line 1"),
    ("road 128 64 128 255", "line 1"), ("road,128,64,128,7", "line 1"), ("platform 9 1 2 3", "line 1"),
    ("name,b,g,r\nroad,1,2,3", "line 1"), ("7 road 1 2 3", "line 1"), ("Idx,Ratio,Name\n1,0.15,wall", "line 1"),
    ("1,road\n2,sky", "id 1 in the place of id 0"), ("road = street", "'street'"), ("a 1 2 3\nb 1 2 3", "share"),
    ("a 1 2 3\nvoid 1 2 3", "share"), ("\n# none\n", "0 classes"), ("stra\udcdfe", "UTF-8"),
    ("\n".join(f"c{i}" for i in range(256)), "256 classes")])
def test_class_table_refuses(tmp_path, text, word):
    (tmp_path / "classes.txt").write_bytes(text.encode(errors="surrogateescape"))
    refuses_with([word, "classes.txt"], class_table, tmp_path)


CITY = class_table("cityscapes").palette.astype(int)
MOVED = CITY[[13, 0, 10, 2]]                                      # car, road, sky, building
FOREIGN = np.arange(768).reshape(256, 3) % 251
FURTHER = np.concatenate([MOVED, [[1, 250, 3], [0, 0, 0]]])
IN_ORDER = CITY + np.eye(19, 3, -2, int)                          # colours a little off, each in its class's place
ONE_BY_CHANCE = np.concatenate([np.arange(39).reshape(13, 3) * 4, CITY[:1]])
LABEL_IDS = np.zeros((34, 3), int)
LABEL_IDS[[7, 11, 26]] = CITY[[0, 2, 13]] + 2
GREYS = np.arange(256)[:, None].repeat(3, 1)
RGB = np.asarray(colorize(blocks(0, 13, 8), "toy"))
KEYED = Image.fromarray(RGB)
KEYED.info["transparency"] = tuple(CITY[13].tolist())
CLEAR_CAR = np.dstack([RGB, blocks(255, 0, 255)])                 # RGB and alpha


@pytest.mark.parametrize("name, picture, want", [
    ("a_labelIds.png", blocks(0, 7, 11, 33, 255), [255, 0, 2, 18, 255]),
    ("a_labelIds.png", blocks(0, 7, 11), [255, 0, 2]),                     # the name decides before the content
    ("a_labelTrainIds.png", blocks(0, 7, 11, 255), [0, 7, 11, 255]),
    ("a.png", blocks(7, 11, 26), [0, 2, 13]),                              # 26 is a labelId
    ("a.png", blocks(7, 11, 255), [7, 11, 255]),                           # nothing above 18: train ids
    ("a.tif", blocks(26, -1, kind=np.int32), [13, 255]),                   # -1: Cityscapes' licence plate
    # Palettes: ids, or the dataset's colours.
    ("p.png", blocks(0, 2, 18, palette=CITY), [0, 2, 18]), ("p.png", blocks(0, 2, 255, palette=FOREIGN), [0, 2, 255]),
    ("p.png", blocks(0, 2, 1, palette=0 * GREYS), [0, 2, 1]), ("p.png", blocks(18, 7, palette=GREYS), [18, 7]),
    ("p.png", blocks(0, 2, 3, palette=MOVED), [13, 10, 2]), ("p.png", blocks(40, 41, palette=CITY[[8] * 42]), [8, 8]),
    ("p.png", blocks(0, 2, 3, palette=MOVED + 9), [0, 2, 3]), ("p.png", blocks(0, 5, palette=FURTHER), [13, 255]),
    ("p.png", blocks(0, 1, 2, 13, palette=IN_ORDER), [0, 1, 2, 13]),
    ("p.png", blocks(0, 1, 2, 13, palette=ONE_BY_CHANCE), [0, 1, 2, 13]),
    ("p.png", blocks(7, 11, 26, 0, palette=LABEL_IDS), [0, 2, 13, 255]),
    # Transparent pixels are void: by alpha; by tRNS, which holds a colour, a grey value, an index or alphas.
    ("a.png", CLEAR_CAR, [0, 255, 8]), ("a.png", KEYED, [0, 255, 8]),
    ("a.png", np.dstack([blocks(7, 8), blocks(255, 0)]), [7, 255]),
    ("a.png", blocks(7, 8, clear=8), [7, 255]), ("a.png", blocks(7, 8, clear=8, kind=np.uint16), [7, 255]),
    ("p.png", blocks(0, 2, palette=CITY, clear=2), [0, 255]),
    ("p.png", blocks(0, 2, palette=FOREIGN, clear=2), [0, 255]),
    ("p.png", blocks(0, 2, palette=CITY, clear=b"\xff\xff\0"), [0, 255])])
def test_layouts_that_are_read(tmp_path, name, picture, want):
    assert read_blocks(save(tmp_path / name, picture)) == want


@pytest.mark.parametrize("key, name, picture, words", [
    ("ade20k", "a.png", blocks(0, 150, 151, 151, 200), ["768 pixels", "often 151", "ids 0-150, 255"]),
    ("coco", "a.png", blocks(0, 182), ["256 pixels", "182", "ids 0-181, 255"]),
    ("coco", "a.png", blocks(1000, kind=np.uint16), ["256 pixels", "1000"]),
    ("toy", "a_labelTrainIds.png", blocks(7, 26), ["26", "ids 0-18, 255"]),
    ("toy", "a_labelIds.png", blocks(7, 34), ["34", "ids 0-33, 255"]),
    ("toy", "a.png", RGB[..., ::-1], ["RGB"]), ("toy", "a.jpg", RGB, ["PNG"]), ("toy", "a.jpg", blocks(7), ["mode L"]),
    ("toy", "a.png", np.hstack([RGB, np.full((16, 1, 3), 5, np.uint8)]), ["16 pixels", "[5, 5, 5]"]),
    ("toy", "a.png", Image.fromarray(RGB).resize((200, 200), Image.BICUBIC), ["resized by nearest"]),
    ("toy", "a.png", np.dstack([blocks(7, 26)] * 3), ["ids in a single channel"]),
    ("toy", "a.png", blocks(7).resize((20, 7)), ["20 x 7"]),
    ("toy", "a.png", Image.new("1", (14000, 14000)), ["64 Mpixel"]),
    ("toy", "a.png", CLEAR_CAR // 2, ["512 pixels are half transparent"]),
    # A palette in another order is never read by its index.
    ("toy", "p.png", blocks(0, 1, 2, palette=MOVED + [[0], [1], [0], [0]]), ["another order", "(129, 65, 129)"]),
    ("toy", "p.png", blocks(0, 1, 2, 3, palette=MOVED + 8), ["another order", "(8, 8, 150)"]),
    ("toy", "p.png", blocks(0, 1, 2, 3, 4, palette=FURTHER), ["another order", "(1, 250, 3)"]),
    ("toy", "p.png", blocks(0, 1, palette=FURTHER[[0, 4]]), ["another order", "(1, 250, 3)"]),
    ("toy", "p.png", blocks(5, 0, 1, 4, palette=FURTHER), ["another order", "(1, 250, 3)"]),    # black does not count
    ("toy", "p.png", blocks(0, 40, palette=FOREIGN), ["most often 40", "ids 0-18, 255"])])
def test_layouts_that_are_refused(tmp_path, key, name, picture, words):
    path = save(tmp_path / name, picture)
    assert "\n" not in refuses_with([name, *words], read_layout, path, key)


def test_files_that_are_no_images(tmp_path):
    whole = save(tmp_path / "a.png", np.random.default_rng(0).integers(0, 19, (64, 64)).astype(np.uint8)).read_bytes()
    for content in (b"", whole[:len(whole) // 2], whole[:200] + bytes([whole[200] ^ 255]) + whole[201:]):
        (tmp_path / "a.png").write_bytes(content)
        assert "\n" not in refuses_with(["a.png: cannot be read"], read_layout, tmp_path / "a.png", "toy")
    refuses_with(["b.png", "No such file"], read_layout, tmp_path / "b.png", "toy")
    refuses_with([str(tmp_path), "Is a directory"], read_layout, tmp_path, "toy")


@needs_shared
def test_real_cityscapes_frame():
    root = SHARED / "cityscapes_sample"
    stem = root / "gtFine/val/frankfurt/frankfurt_000000_000576_gtFine"
    ids, colour, train = (read_layout(f"{stem}_{kind}.png", "cityscapes")
                          for kind in ("labelIds", "color", "labelTrainIds"))
    assert ids.shape == (1024, 2048) and (ids == colour).all() and 0 < (ids != train).float().mean() < 0.004
    image, label = data.Pairs("cityscapes", root, "val").full(0)
    assert image.shape == (3, 512, 1024) and torch.equal(label, ids[1::2, 1::2])           # halved by nearest
    full = np.asarray(data.read_image(root / "leftImg8bit/val/frankfurt/frankfurt_000000_000576_leftImg8bit.png"))
    mean = full.reshape(512, 2, 1024, 2, 3).mean((1, 3)) / 127.5 - 1                       # while the image is averaged
    assert np.abs(image.permute(1, 2, 0).numpy() - mean).mean() < 0.006


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_photos_are_turned_upright_and_16_bits_are_scaled(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x112] = 6                                               # the file's lower left is the upright top left
    corners = np.array([[40, 100], [160, 220]], np.uint8).repeat(16, 0).repeat(24, 1)[..., None].repeat(3, 2)
    image = data.read_image(save(tmp_path / f"a.{suffix}", corners, exif=exif))
    assert image.size == (32, 48) and abs(np.asarray(image)[4, 4, 0].astype(int) - 160) < 4
    if suffix != "jpg":
        grey = blocks(0, 255, 0x1234, 0x8000, 0xffff, kind=np.uint16 if suffix == "png" else np.int32)
        image = np.asarray(data.read_image(save(tmp_path / f"grey.{suffix}", grey)))
        assert image.shape == (16, 80, 3) and image[0, ::16, 0].tolist() == [0, 0, 0x12, 0x80, 255]


def test_find_images(tmp_path):
    for name in ("b.PNG", "a.png", ".hidden.png", "c.txt", "d.jpg", "e.JPEG"):
        (tmp_path / name).touch()
    assert [f.name for f in data.find_images(tmp_path)] == ["a.png", "b.PNG"]
    names = [f.name for f in data.find_images(tmp_path, suffixes=data.PICTURES)]
    assert names == ["a.png", "b.PNG", "d.jpg", "e.JPEG"]
    (tmp_path / os.fsdecode(b"stra\xdfe.png")).touch()
    refuses_with(["not UTF-8"], data.find_images, tmp_path).encode()


def test_captions_of_a_folder(tmp_path):
    root = custom(tmp_path, 3)
    file = root / "captions.json"
    file.write_text(json.dumps({"p0.png": "a", "train/p1.JPG": ["b", "c", "d"], "p9": "e"}), "utf-8-sig")
    pairs = data.Pairs(root, size=32)
    assert pairs.captions == {"p0": "a", "p1": ["b", "c", "d"], "p9": "e"}
    assert pairs[0]["caption"] == pairs[0, 5]["caption"] == "a" and pairs[1]["caption"] == "b"
    drawn = [pairs[1, seed]["caption"] for seed in range(30)]
    assert set(drawn) == {"b", "c", "d"} and drawn == [pairs[1, s]["caption"] for s in range(30)]
    assert pairs.caption(2, torch.ones(8, 8).long(), 4) == "a photo of sea"
    file.rename(tmp_path / "mine.json")
    assert data.Pairs(root, size=32, captions=tmp_path / "mine.json")[0]["caption"] == "a"
    file.write_text('{"x0": "a"}')
    refuses_with(["'x0'", "'p0'", "none of the 3"], data.Pairs, root, size=32)
    names = class_table("cityscapes").names
    assert data.compose_caption(blocks(10, 0, 13, 10, 0, 10, 255), names) == "a photo of sky, road and car"
    assert data.compose_caption(blocks(255), names) == "a photo"
    six = "a photo of road, sidewalk, building, pole, traffic sign and vegetation"
    assert data.compose_caption(blocks(0, 1, 2, 5, 7, 8, 9), names) == six


def test_cocos_own_captions(tmp_path):
    images = [{"id": 7, "file_name": "000001.jpg"}, {"id": 3, "file_name": "000002.jpg"}]
    captions = [{"image_id": i, "caption": text} for i, text in ((3, "x"), (7, "y"), (3, "z"))]
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations/captions_train2017.json"
    file.write_text(json.dumps({"images": images, "annotations": captions}))
    assert data.read_captions(tmp_path, "train") == {"000001": ["y"], "000002": ["x", "z"]}
    assert data.read_captions(tmp_path, "val") == {}


@pytest.mark.parametrize("content", [
    b"{", b"[1]", b"3", b'{"p3": 1}', b'{"p3": []}', b'{"p3": ["a", 1]}', b'{"p3": "stra\xdfe"}',
    b'{"p3": "\\udc80"}', b'{"images": [{}], "annotations": []}', None])
def test_captions_that_cannot_be_read(tmp_path, content):
    file = tmp_path / "c.json"
    if content:
        file.write_bytes(content)
    assert "\n" not in refuses_with(["c.json"], data.read_captions, tmp_path, "val", file)


@pytest.mark.parametrize("domain, value", [
    ("day", "45f8a39ce5b54000"), ("night", "d3178c273b540ff6"), ("fog", "a965a68726175a40"),
    ("snow", "08ba43569f694f45"), ("rain", "2c1d94c59e117c42")])
def test_toy_scenes_are_those_that_the_shipped_weights_were_trained_on(domain, value):
    digest = hashlib.sha256()
    for seed in (*range(20), *range(10_000_000, 10_000_010)):
        image, label, caption = toy_scene(seed, domain)
        digest.update(image.tobytes() + label.tobytes() + caption.encode())
    assert digest.hexdigest().startswith(value)


def test_toy_items():
    toy = Toy("val", ("night", "fog"), 6)
    image, label, caption = toy_scene(10_000_003, "fog")
    item = toy[3]
    assert len(toy) == 6 and item["name"] == "toy_10000003" and item["caption"] == caption
    assert torch.equal(((item["image"] + 1) * 127.5).round().byte(), torch.from_numpy(image).permute(2, 0, 1))
    assert torch.equal(item["label"], torch.from_numpy(label).long())
    assert (toy.images[3] == image).all() and (toy.labels[3] == label).all()
    assert toy.captions["toy_10000003"] == caption and list(toy.captions) == toy.names
    assert (label == toy_scene(10_000_003)[1]).all()              # the domains show the same street
    flipped = next(toy[3, seed] for seed in range(20) if toy[3, seed]["flip"])
    assert all(torch.equal(flipped[key], item[key].flip(-1)) for key in ("image", "label"))
    assert not any(Toy("val", length=1, augment=False)[0, seed]["flip"] for seed in range(20))
    for word, options in (("test", dict(split="test")), ("dusk", dict(data="toy:dusk")), ("64", dict(size=512))):
        refuses_with([word], open_dataset, **{"data": "toy", **options})
    stamps = [open_dataset(key, None, split).stamp()
              for key in ("toy", "toy:night", "toy:all") for split in ("train", "val")]
    assert len(set(stamps)) == 6 and toy.stamp() == Toy("val", ("night", "fog"), 6).stamp()


@pytest.mark.parametrize("form", ["cityscapes", "acdc", "path"])
def test_written_toy_world_reads_back_as_the_same_batches(tmp_path, form):
    launch(data, "--write-toy", tmp_path, "--format", form, "--n", 7, "--domains", "fog,rain")
    toy = Toy("train", ("fog", "rain"), 7)
    pairs = open_dataset(tmp_path if form == "path" else "cityscapes", tmp_path, size=64, grid=4)
    assert len(pairs) == 7 and pairs.classes.names == toy.classes.names
    for a, b in zip(take(4, toy, 4, 0), take(4, pairs, 4, 0)):
        same_run(a, b)
    if form == "acdc":
        rain = open_dataset("cityscapes:rain", tmp_path, size=64, grid=4)
        assert rain.names == toy.names[1::2] and rain.classes.key == "cityscapes"
        refuses_with(["snow/", "acdc.vision"], open_dataset, "cityscapes:snow", tmp_path)


def test_command_line(tmp_path, capsys):
    def fails(*argv):
        code, _, error = outcome(data, capsys, *argv)
        assert code == 2 and error.count("\n") == 1 and error.startswith("data.py: ")

    picture = tmp_path / "world.png"
    launch(data, "--show", picture)
    assert data.open_image(picture).size == (8 * 128, 6 * 128)
    shown = picture.read_bytes()
    for bad in (["--write-toy", tmp_path, "--domains", "dusk"], ["--write-toy", tmp_path, "--n", 0],
                ["--show", tmp_path / "no/world.png"], []):
        fails(*bad)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as a full disk: there is room for small files alone
    try:
        fails("--show", picture)
        fails("--write-toy", tmp_path / "toy", "--n", 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [f for f in tmp_path.rglob("*") if f.is_file()] == [picture] and picture.read_bytes() == shown


@pytest.mark.parametrize("command", ["data.py --write-toy OUT", "sample.py --bench", "train.py --out OUT"])
def test_ctrl_c_while_the_imports_run(command, tmp_path):
    """numpy is there, torch is not yet."""
    process = subprocess.Popen([sys.executable, *command.replace("OUT", str(tmp_path / "out")).split()], cwd=HERE,
                               stderr=subprocess.PIPE, text=True)
    until(process, lambda: "numpy" in Path(f"/proc/{process.pid}/maps").read_text())
    process.send_signal(signal.SIGINT)
    assert end(process, 130) == files(tmp_path) == []


def test_ctrl_c_ends_data_py_without_a_traceback(tmp_path):
    command = [sys.executable, "data.py", "--write-toy", str(tmp_path / "toy"), "--n", "100000"]
    process = subprocess.Popen(command, cwd=HERE, stderr=subprocess.PIPE, text=True)
    until(process, lambda: list(tmp_path.glob("toy/gtFine/train/toy/*")))
    process.send_signal(signal.SIGINT)
    assert end(process, 130) == list(tmp_path.rglob(".*")) == []


def custom(root, n=5):
    """A folder dataset: smooth pictures of 40 x 56, ids as labels, no captions."""
    write_classes(root, "sand\nsea 0 0 200\n")
    y, x = np.mgrid[:40, :56].astype(np.uint8)
    for i in range(n):
        save(root / f"images/p{i}.png", np.dstack([4 * x, 6 * y, 0 * x + 40 * i]))
        save(root / f"labels/p{i}.png", (x > y).astype(np.uint8))
    return root


def test_a_folder_of_ones_own(tmp_path):
    root = custom(tmp_path)
    pairs = data.Pairs(root, size=32, grid=8)
    assert pairs.classes.names == ("sand", "sea") and pairs[2]["caption"] == "a photo of sea and sand"
    image, label = pairs.full(1)
    assert image.shape == (3, 32, 48) and label.shape == (32, 48)             # 44.8 rounds to a multiple of 8
    corners = set()
    for seed in range(30):
        item = pairs[1, seed]
        flip, top, left = pairs.window(1, seed)
        assert (item["flip"], item["top"], item["left"]) == (flip, top, left)
        whole, whole_label = pairs.full(1, flip)
        assert torch.equal(item["image"], whole[:, top:top + 32, left:left + 32])
        assert torch.equal(item["label"], whole_label[top:top + 32, left:left + 32])
        corners.add((flip, top, left))
    assert corners == set(itertools.product((False, True), (0,), (0, 8, 16)))
    assert pairs.window(1) == data.Pairs(root, size=32, augment=False).window(1, 5) == (False, 0, 8)
    refuses_with(["30", "multiple"], data.Pairs, root, size=30)


CITY_FILES = {                                        # file -> what its label holds; one picture has both kinds of ids
    "gtFine/train/ulm/u_gtFine_labelIds": 7, "gtFine/train/ulm/u_gtFine_labelTrainIds": 5,
    "gtFine/train/bonn/b_gtFine_labelTrainIds": 7, "leftImg8bit/train/ulm/u_leftImg8bit": None,
    "leftImg8bit/train/bonn/b_leftImg8bit": None, "rgb_anon/night/train/G/n_rgb_anon": None,
    "gt/night/train/G/n_gt_labelIds": 26, "gt/night/train/G/n_gt_labelColor": 0}


@pytest.mark.parametrize("key, split, files, names, classes", [
    ("cityscapes", "train", CITY_FILES, ["b", "n", "u"], [7, 13, 0]),
    ("cityscapes:night", "train", CITY_FILES, ["n"], [13]),
    ("ade20k", "train", {"images/training/a": None, "annotations/training/a": 7}, ["a"], [6]),
    ("coco", "val", {"val2017/1": None, "stuffthingmaps/val2017/1": 181}, ["1"], [170]),
    ("coco", "train", {"images/train2017/1": None, "annotations/train2017/1": 0}, ["1"], [0]),
    ("own", "val", {"images/val/p": None, "labels/val/p": 1, "images/train/q": None}, ["p"], [1])])
def test_folders_of_data_sets(tmp_path, monkeypatch, key, split, files, names, classes):
    monkeypatch.chdir(tmp_path)
    for name, value in files.items():
        shape = (32, 64, 3) if value is None else (32, 64)
        save(tmp_path / "own" / f"{name}.png", np.full(shape, value or 0, np.uint8))
    write_classes(tmp_path / "own", "a\nb")
    pairs = data.Pairs(key, "own", split, size=32)
    assert pairs.names == names and set(pairs.shapes.values()) == {(32, 64)}
    assert [int(pairs.full(i)[1].unique()) for i in range(len(pairs))] == classes
    text = refuses_with([key, "own/", "test"], data.Pairs, key, "own", "test")
    assert ".zip" in text or key == "own"


def test_broken_pairs_are_reported_together(tmp_path, capsys):
    root = custom(tmp_path, 6)
    (root / "labels/p0.png").unlink()
    (root / "images/p1.png").unlink()
    (root / "images/p2.png").write_bytes((root / "images/p2.png").read_bytes()[:90])
    save(root / "labels/p3.png", np.full((40, 56), 9, np.uint8))
    save(root / "labels/p4.png", np.zeros((40, 55), np.uint8))
    words = ("5 of 6 pairs", "p0: an image without a label", "p1: a label without an image",
             "p2.png", "p3.png: 2240 pixels", "p4: a label of 55 x 40", "--skip-broken")
    refuses_with(words, data.Pairs, root, size=32)
    assert data.Pairs(root, size=32, skip_broken=True).names == ["p5"] and words[0] in capsys.readouterr().err
    (root / "images/p5.png").write_bytes(b"")
    refuses_with(["6 of 6 pairs"], data.Pairs, root, size=32, skip_broken=True)


def test_stamp_changes_with_every_file(tmp_path):
    root = custom(tmp_path, 3)
    stamps = []
    for change in (lambda: None, lambda: os.utime(root / "labels/p1.png", ns=(1, 1)),
                   lambda: [(root / k / "p0.png").rename(root / k / "p5.png") for k in ("images", "labels")],
                   lambda: (root / "captions.json").write_text('{"p1": "a beach"}'),
                   lambda: write_classes(root, "sand\nocean 0 0 200")):
        change()
        stamps += [data.Pairs(root, size=32).stamp() for _ in range(2)]
    assert stamps[::2] == stamps[1::2] and len(set(stamps)) == 5


def take(n, *args, **kw):
    return list(itertools.islice(data.batches(*args, **kw), n))


def test_batches_depend_on_seed_and_step_alone():
    toy = Toy("val", length=10)
    torch.manual_seed(7)
    run = take(8, toy, 4, seed=3)
    assert torch.equal(torch.rand(1), torch.manual_seed(7) and torch.rand(1))         # left untouched
    assert run[0]["image"].shape == (4, 3, 64, 64) and run[0]["label"].dtype == torch.int64
    for a, b in zip(run[5:] + run, take(3, toy, 4, seed=3, start=5) + take(8, toy, 4, seed=3, workers=2)):
        same_run(a, b)                                                              # resumed; by workers
    halves = [take(8, toy, 2, seed=3, rank=r, world=2) for r in (0, 1)]               # two ranks share batches
    for whole, left, right in zip(run, *halves):
        assert torch.equal(whole["image"], torch.cat([left["image"], right["image"]]))
        assert whole["name"] == left["name"] + right["name"]
    order = torch.cat([b["index"] for b in run]).tolist()
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20]                                                 # every epoch in its own order
    keys = [key for step in range(5) for key in data.batch_keys(10, 4, 3, step, 0, 1)]
    assert len(set(keys)) == 20                                                       # and with crops of its own
    assert order != torch.cat([b["index"] for b in take(8, toy, 4, seed=4)]).tolist()
    small = take(1, Toy("val", length=3), 8, seed=0)[0]                               # larger than the dataset
    assert sorted(torch.bincount(small["index"]).tolist()) == [2, 3, 3]


@pytest.mark.parametrize("workers, kind", [(0, "images"), (2, "labels")])
def test_a_file_that_gets_lost_in_the_middle_is_named(tmp_path, workers, kind):
    root = custom(tmp_path, 4)
    source = data.batches(data.Pairs(root, size=32), 4, seed=0, workers=workers)
    next(source)
    (root / kind / "p2.png").unlink()
    text = refuses_with([f"{kind}/p2.png", "No such file"], lambda: [next(source) for _ in range(20)])
    assert text.startswith(str(root)) and "\n" not in text


# -- sampling, generation, evaluation --------------------------------------------------------------


@pytest.fixture(scope="module")
def toy_model():
    return sample.load_model()


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """sample.py's command line, in an empty folder -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "try_to_load_from_cache", lambda *_: None)
    return functools.partial(outcome, sample, capsys, "--device", "cpu")


def save_changed_adapter(path, kind="controlnet", **more):
    """-> the toy's model with an adapter of this kind, a little off its start; `more` goes into the file's metadata."""
    classes = class_table("toy")
    model = ALDM(PRESETS["toy"], *load_frozen("toy")[:3], classes, kind)
    for p in model.adapter.parameters():
        p.data = p + 0.02 * torch.randn_like(p)
    meta = dict(preset="toy", dataset="toy", names=classes.names, palette=classes.palette, adapter=kind,
                hint=model.layout.hint, step=0)
    save_adapter(path, model, meta | more)
    return model


def pictures(folder):
    return {p.name: np.asarray(Image.open(p)) for p in sorted(folder.glob("*.png"))}


def alike(a, b):
    """Equal images, but for the rounding of other batches."""
    return np.abs(np.asarray(a).astype(int) - b).max() <= 1


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_an_image_depends_on_its_own_seed_alone(toy_model, eta):
    """Not on the batch, nor on its place in it; and torch's own stream of random numbers is left alone."""
    labels, prompts, seeds = torch.from_numpy(Toy("val", length=3).labels), ["a street at night", "", "fog"], [5, 6, 7]
    options = dict(steps=2, eta=eta, cfg=2.0)
    before = torch.get_rng_state()
    at_once = sample.generate(toy_model, labels, prompts, seeds, **options)
    assert torch.equal(before, torch.get_rng_state())
    assert at_once.dtype == np.uint8 and at_once.shape == (3, 64, 64, 3)
    pairs = sample.generate(toy_model, labels.flip(0), prompts[::-1], seeds[::-1], batch=2, **options)
    assert alike(pairs[::-1], at_once)
    other = sample.generate(toy_model, labels[:1], prompts[:1], [8], **options)
    assert np.abs(other[0].astype(int) - at_once[0]).mean() > 2
    assert len({sample.image_seed(seed, name) for seed in (0, 1) for name in ("x/0", "x/1", "y/0")}) == 6


def test_generate_pads_with_void_and_crops_back(toy_model):
    label, seen = torch.from_numpy(Toy("val", length=1).labels)[:, :20, :50], []
    images = sample.generate(toy_model, label, ["x"], [0], steps=2, on_step=lambda i, x0: seen.append(x0.shape))
    assert images.shape == (1, 20, 50, 3) and seen == [(1, 16, 8, 16)] * 2
    padded = F.pad(label, (0, 14, 0, 12), value=IGNORE)
    assert np.array_equal(images, sample.generate(toy_model, padded, ["x"], [0], steps=2)[:, :20, :50])


@pytest.mark.parametrize("kind", ["t2i", "oft", "freestyle"])
def test_every_adapter_samples_from_its_file(kind, tmp_path):
    model = save_changed_adapter(tmp_path / "a.safetensors", kind)
    layout = torch.from_numpy(Toy("val", length=1).labels)[:, :32, :32], ["night"], [0]
    expected = sample.generate(model, *layout, steps=2)
    loaded = sample.load_model(tmp_path / "a.safetensors")
    assert alike(sample.generate(loaded, *layout, steps=2), expected)


def test_grid():
    a, b = np.full((4, 6, 3), 10, np.uint8), np.full((4, 6, 3), 20, np.uint8)
    picture = np.asarray(sample.grid([[a, b], [b]], ["a title too long for its column", "b"]))
    titles, picture = picture[:14], picture[14:]
    wanted = np.full((2 * 8 + 2, 2 * 12 + 2, 3), 255)                   # small ones are doubled
    wanted[:8, :12], wanted[:8, 14:], wanted[10:, :12] = 10, 20, 20
    assert np.array_equal(picture, wanted)
    assert (titles[:, 2:10] < 128).any() and (titles[:, 12:15] == 255).all()


def test_curves(tmp_path):
    """A panel per loss; a falling curve goes from its panel's upper left to the lower right."""
    log, picture = tmp_path / "log.csv", tmp_path / "curves.png"
    log.write_text("step,falls,lazy,nothing\n")
    sample.draw_curves(log, picture)
    assert not picture.exists()
    log.write_text(log.read_text() + "".join(f"{i},{100 - i},{'' if i % 8 else 0.5},\n" for i in range(1, 60)) + "60")
    sample.draw_curves(log, picture)                                    # (the last row is torn)
    pixels = np.asarray(Image.open(picture))
    assert pixels.shape == (200, 320, 3)                                # none for `nothing`
    y, x = np.nonzero((pixels[20:100] == (0, 0, 128)).all(-1))          # navy
    assert y[x == x.min()].max() < 10 and y[x == x.max()].min() > 65 and np.ptp(x) > 300


# Formulas, against known cases and NumPy.


def frechet_by_hand(real, fake):
    """real [L,C], fake [M,C]"""
    (m1, c1), (m2, c2) = ((v.mean(0), np.cov(v.T)) for v in (real, fake))
    cross = np.sqrt(np.linalg.eigvals(c1 @ c2).real.clip(0)).sum()      # of the product itself
    return ((m1 - m2) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * cross


def test_frechet_distance_precision_recall():
    t, rng = torch.tensor, np.random.default_rng(0)
    # where the axes are the same, the distance is the sum of (m1 - m2)^2 + (s1 - s2)^2
    a, b = (t([0., 1.]), t([[9., 0], [0, 1]])), (t([2., 1.]), t([[1., 0], [0, 16]]))
    assert sample.frechet_distance(*a, *b) == pytest.approx(4 + 4 + 9)
    few = torch.cov(t(rng.normal(size=(4, 7))).T)           # singular, as of few images
    assert 0 <= sample.frechet_distance(few[0], few, few[0], few) < 1e-6
    real, fake = rng.normal(size=(40, 3)), rng.normal(size=(30, 3)) + 1
    moments = [t(value) for v in (real, fake) for value in (v.mean(0), np.cov(v.T))]
    assert sample.frechet_distance(*moments) == pytest.approx(frechet_by_hand(real, fake), rel=1e-9)
    radius = np.sort(np.linalg.norm(real[:, None] - real, axis=-1), axis=1)[:, 3]
    inside = (np.linalg.norm(fake[:, None] - real, axis=-1) <= radius).any(1).mean()
    assert sample.share_among(t(fake), t(real)) == pytest.approx(inside) and 0 < inside < 1
    one_mode = real[:10] * 1e-3                             # precise, but without variety
    found = {kind: [] for kind in sample.KINDS}
    found |= {kind: [(t(v), torch.eye(3))] for kind, v in (("real", real), ("generated", one_mode))}
    result = sample.summarize_judgement(found, "abc", unjudged=())
    assert result["precision"] == 1 and result["recall"] < 0.2
    assert result["frechet_distance"] == pytest.approx(frechet_by_hand(real, one_mode), abs=1e-5)


def test_toy_edit_names_another_domain():
    for i, caption in enumerate(Toy("val", DOMAINS, length=40).captions.values()):
        edited, target = sample.toy_edit(caption, i // 5)
        assert target != i % 5 and edited.endswith(sample.PHRASES[DOMAINS[target]][0])
        assert edited.rpartition(",")[0] == caption.rpartition(",")[0]
    assert {sample.toy_edit("a street at night", i)[1] for i in range(4)} == {0, 2, 3, 4}
    assert sample.toy_edit("a road", 1) == ("a road, at night", 1)      # it names no weather


@pytest.fixture
def red_world(monkeypatch):
    """Images whose red is the class, of five layouts of three classes: the judge reads it back, the generator makes
    known mistakes: samples 0 and "edited" have no class 2, the others no class 1."""
    labels = np.random.default_rng(0).integers(0, 3, (5, 8, 8))
    labels[0, 0] = IGNORE
    wrong, worse = np.where(labels == 2, 1, labels), np.where(labels == 1, 0, labels)

    def paint(label):
        return np.repeat(label[..., None] % 256 * 10, 3, -1).astype(np.uint8)
    drawn, asked = {}, []
    for i, k in itertools.product(range(5), (0, 1, 2, "edited")):
        drawn[sample.image_seed(4, f"x{i}/{k}")] = paint(worse[i] if k in (1, 2) else wrong[i])

    def generate(model, labels, prompts, seeds, batch, steps):
        asked.extend(zip(prompts, seeds))
        return np.stack([drawn[seed] for seed in seeds])
    monkeypatch.setattr(sample, "generate", generate)
    judge = mock.Mock(features=lambda x: [x], side_effect=lambda x: F.one_hot(
        ((x[:, 0] + 1) * 12.75).round().long().clamp(max=3), 4).permute(0, 3, 1, 2))
    model = SimpleNamespace(classes=SimpleNamespace(names=("a", "b", "c")), device="cpu",
                            vae=SimpleNamespace(encode=lambda x: -x, decode=lambda z: -z))
    items = [dict(label=torch.tensor(y), image=sample.from_pixels(paint(y)[None], "cpu")[0], name=f"x{i}",
                  caption=f"c{i}") for i, y in enumerate(labels)]
    evaluate = functools.partial(sample.evaluate, model, judge=judge, steps=7, seed=4, batch=2)
    return SimpleNamespace(labels=labels, wrong=wrong, worse=worse, paint=paint, asked=asked, items=items,
                           evaluate=evaluate)


def iou_by_hand(labels, found):
    valid, iou = labels != IGNORE, []
    for c in range(3):
        both, either = (labels == c) & (found == c), (labels == c) | (found == c)
        iou.append((both & valid).sum() / (either & valid).sum())
    return iou


def test_evaluate_against_confusion_by_hand(red_world):
    w = red_world

    def features(labels):
        return w.paint(labels).reshape(len(labels), 64, 3).mean(1) / 127.5 - 1
    options = dict(classifier=lambda x: torch.tensor([[0., 1, 0]]).expand(len(x), 3), targets="xyz", n=3,
                   edit=lambda caption, i: (f"{caption}!", i % 3), clip=lambda images, prompts: torch.tensor(
                       [float(prompt[1:]) for prompt in prompts]).diag())
    quick = w.evaluate(w.items, **options, diverse=5)       # of each layout, one sample counts
    assert len(w.asked) == len(set(w.asked)) == 5 * (1 + 1 + 2)         # plain, edited, two more
    assert w.asked[0] == ("c0", sample.image_seed(4, "x0/0"))
    every = w.evaluate(w.items, **options)
    found = np.concatenate([w.wrong, w.worse, w.worse])
    apart = np.linalg.norm(features(w.wrong) - features(w.worse), axis=1).mean()
    for result, labels, seen in ((quick, w.labels, w.wrong), (every, np.tile(w.labels, (3, 1, 1)), found)):
        iou, edited = iou_by_hand(labels, seen), iou_by_hand(w.labels, w.wrong)
        assert list(result["IoU_generated"].values()) == pytest.approx(iou, abs=1e-5)
        assert result["mIoU_generated"] == pytest.approx(np.mean(iou), abs=1e-5)
        distance = frechet_by_hand(features(w.labels), features(seen))
        assert result["frechet_distance"] == pytest.approx(distance, abs=1e-4)
        assert result["mIoU_real"] == result["mIoU_reconstructed"] == 1 and result["layouts"] == 5
        assert list(result["IoU_edited"].values()) == pytest.approx(edited, abs=1e-5)
        assert result["clip_score"] == 2                    # the mean of 0 .. 4
        assert result["editability"] == 0.4                 # targets 0 1 2 0 1, answers 1
        assert result["editability_of"] == {"x": 0, "y": 1, "z": 0}
        assert result["diversity"] == pytest.approx(apart * 2 / 3, abs=1e-5)    # one pair of three is equal


def test_evaluate_keeps_its_images_and_leaves_out_what_cannot_be_told(red_world, tmp_path):
    w = red_world
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    result = w.evaluate(w.items, n=2, folder=tmp_path, unjudged=("c",))
    images, labels = pictures(tmp_path / "images"), pictures(tmp_path / "labels")
    assert list(images) == list(labels) == [f"x{i}_{k}.png" for i in range(5) for k in range(2)]
    assert np.array_equal(images["x3_0.png"], w.paint(w.wrong[3]))
    assert np.array_equal(images["x3_1.png"], w.paint(w.worse[3]))
    assert np.array_equal(labels["x3_1.png"], w.labels[3])
    expected = iou_by_hand(np.tile(w.labels, (2, 1, 1)), np.concatenate([w.wrong, w.worse]))[:2]
    assert result["mIoU_generated"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert result["IoU_generated"]["c"] is None and result["editability_of"] == {} and result["clip_score"] is None
    alone = w.evaluate(w.items[:1], n=1)
    assert alone["frechet_distance"] is alone["precision"] is alone["diversity"] is None


def test_judges(tmp_path):
    """mit-semseg's files have one class for person and rider, and one for bus and train; our own file has its own."""
    toy, classes = PRESETS["toy"], class_table("cityscapes")
    net, files = UperNet(150, **toy.segmenter), []
    for part in ("encoder", "decoder"):
        files.append(tmp_path / f"{part}_epoch_50.pth")
        torch.save(getattr(net, part).state_dict(), files[-1])
    judge, unjudged = sample.load_judge(files, toy, classes)
    rows = [class_table("ade20k").names.index(name) for name in classes.ade]
    assert torch.equal(judge.decoder.conv_last[1].weight, net.decoder.conv_last[1].weight[rows])
    assert unjudged == ["person", "rider", "bus", "train"]
    assert sample.load_judge(files, toy, class_table("ade20k"))[1] == []
    poor = dataclasses.replace(classes, ade=(*[None] * 18, "bicycle"))
    judge, unjudged = sample.load_judge(files, toy, poor)
    *others, seen = judge(torch.rand(1, 3, 64, 64)).amax((0, 2, 3))
    assert unjudged == [*classes.names[:18]] and seen > max(others) + 1000

    file, net = tmp_path / "ours.safetensors", UperNet(19, **toy.segmenter)
    tensors = {f"segmenter.{name}": t for name, t in net.state_dict().items()}
    meta = dict(format="aldm-segmenter", preset="toy", dataset="toy", normalize=False)
    aldm.save_tensors(file, tensors, dict(meta, names=classes.names))
    judge, unjudged = sample.load_judge([file], PRESETS["sd15"], classes)       # its size is its file's
    assert unjudged == [] and torch.equal(judge.decoder.conv_last[1].weight, net.decoder.conv_last[1].weight)
    aldm.save_tensors(file, tensors, dict(meta, names=("a",) * 19))
    with pytest.raises(InputError, match="19 classes of toy"):
        sample.load_judge([file], toy, classes)


def test_prompts_of_an_evaluation(monkeypatch, toy_model):
    """With CLIP, {caption} is filled in, and the image is compared with the rest of the prompts."""
    monkeypatch.setattr(sample, "try_to_load_from_cache", lambda *_: "here")
    monkeypatch.setattr(sample, "Clip", lambda path, device: lambda images, texts: (images, texts))
    args = SimpleNamespace(sd=None, judge=None, prompts=None, features="judge")
    chosen = sample.choose_judges(args, toy_model)
    assert isinstance(chosen["classifier"], Classifier) and "edit" not in chosen and "clip" in chosen
    args.prompts = ["{caption}, at dusk", "snow, {caption}"]
    chosen = sample.choose_judges(args, toy_model)
    assert chosen["edit"]("a street", 0) == ("a street, at dusk", 0)
    assert chosen["edit"]("a road", 3) == ("snow, a road", 1)
    assert chosen["targets"] == ["at dusk", "snow"]
    assert chosen["classifier"]("images") == ("images", ["at dusk", "snow"])
    monkeypatch.setattr(sample, "try_to_load_from_cache", lambda *_: None)
    with pytest.raises(InputError, match="--prompts"):
        sample.choose_judges(args, toy_model)
    args.prompts, args.features = None, "clip"
    with pytest.raises(InputError, match="--features clip"):
        sample.choose_judges(args, toy_model)


# The command line.


def test_one_layout(cli, tmp_path):
    layout, night = HERE / "assets" / "layout_1.png", ["--prompt", "a street at night", "--steps", 1]
    code, out, err = cli("--layout", layout, *night, "--n", 2, "--seed", 3)
    first = pictures(tmp_path / "samples")
    assert code == 0 and {name: p.shape for name, p in first.items()} == {
        "layout_1_3.png": (64, 64, 3), "layout_1_4.png": (64, 64, 3), "layout_1_3_grid.png": (142, 3 * 128 + 4, 3)}
    Image.fromarray(read_layout(layout, "toy").byte().numpy()).save(tmp_path / "ids.png")
    cli("--layout", "ids.png", *night, "--seed", 4, "--out", "ids")
    assert alike(pictures(tmp_path / "ids")["ids_4.png"], first["layout_1_4.png"])
    Image.fromarray(np.zeros((130, 200), np.uint8)).save(tmp_path / "odd.png")
    for preset, size, shape in (("toy", 0, (130, 200)), ("sd15", None, (130, 200)), ("sd15", 512, (512, 788))):
        assert sample.resize_layout(torch.zeros(130, 200), PRESETS[preset], size).shape == shape
    code, out, err = cli("--layout", "odd.png", "--prompt", "street " * 80 + "lighthouse", "--steps", 1)
    assert code == 0 and pictures(tmp_path / "samples")["odd_0.png"].shape == (64, 98, 3)
    assert "resized to 98 x 64" in err and "77 tokens" in err and "lighthouse\n" in err


def test_dataset_is_resumable_and_trains(cli, tmp_path):
    source, made = tmp_path / "in" / "labels", tmp_path / "made"
    source.mkdir(parents=True)
    shutil.copy(HERE / "assets" / "layout_1.png", source / "street1.png")
    shutil.copy(HERE / "assets" / "layout_2.png", source / "street2.PNG")
    (source / "._street1.png").write_text("what macOS leaves")
    Image.fromarray(np.zeros((64, 96), np.uint8)).save(source / "wide.png")
    (tmp_path / "in" / "captions.json").write_text('{"street1": "a street with trees", "street2": ["one", "two"]}')
    make = ["--layouts", "in", "--prompts", "night scene", "{caption}, in snow", "--steps", 1, "--batch", 3, "--cfg", 1,
            "--out", "made"]
    assert "2 new images" in cli(*make, "--shard", "1/2")[1] and "4 new images" in cli(*make, "--shard", "0/2")[1]
    pairs = open_dataset(made, size=64, grid=4)
    assert pairs.classes.names == class_table("toy").names
    assert {name: pairs[i]["caption"] for i, name in enumerate(pairs.names)} == {
        "street1_0_0": "night scene", "street1_1_0": "a street with trees, in snow",
        "street2_0_0": "night scene", "street2_1_0": "one, in snow",
        "wide_0_0": "night scene", "wide_1_0": "a photo of road, in snow"}
    _, label = pairs.full(pairs.names.index("street2_0_0"))
    assert torch.equal(label, read_layout(source / "street2.PNG", "toy"))
    # what is missing comes back the same, also without shards; what is there is not touched, what a kill left goes
    before, times = pictures(made / "images"), {p: p.stat().st_mtime_ns for p in made.glob("*/*.png")}
    (made / "images" / "street1_0_0.png").unlink()
    left, growing = (made / "labels" / f".{process}.a.png.part" for process in (999999999, os.getpid()))
    left.write_text("half")
    growing.write_text("of a process that lives")
    assert "1 new images" in cli(*make)[1] and not left.exists() and growing.exists()
    assert sum(p.stat().st_mtime_ns != t for p, t in times.items()) == 2
    after = pictures(made / "images")
    assert before.keys() == after.keys() and all(alike(before[name], after[name]) for name in before)
    for flags, word in ((["--prompts", "day"], "night scene"), (["--seed", 1], "'seed': 0"), (["--cfg", 2], "'cfg': 1"),
                        (["--out", "in"], "the layouts are there")):
        code, out, err = cli(*make, *flags)
        assert code == 2 and word in err and len(err.splitlines()) == 1


def test_an_adapter_knows_the_ids_of_its_folder(tmp_path):
    """Ids without a class, too, and the colours of void."""
    write_toy(tmp_path, "path", length=1)
    (tmp_path / "classes.txt").write_text("void 9 9 9\nroad 1 2 3\nvoid\nsky 4 5 6\n")
    folder = class_table(tmp_path)
    train.save_adapter(tmp_path / "a.safetensors", tiny_model(), dict(
        preset="toy", adapter="controlnet", hint="classes", dataset=str(tmp_path), names=folder.names,
        palette=folder.palette, file_ids=folder.file_ids, void=folder.void))
    found = sample.classes_of(read_adapter(tmp_path / "a.safetensors")[0], "")
    for name in ("names", "palette", "file_ids", "void"):
        assert np.array_equal(getattr(found, name), getattr(folder, name))


def test_the_adapter_of_a_folder(tmp_path):
    """The furthest, whatever the files' times; the last one's name has no number."""
    for name, step in (("adapter", 25), ("adapter_0000020", 20), ("adapter_0000010", 10)):
        shutil.copy(sample.ADAPTER, tmp_path / f"{name}.safetensors")
        os.utime(tmp_path / f"{name}.safetensors", (step, -step % 40))
    for name in ("adapter", "adapter_0000020", "adapter_0000010"):
        with mock.patch("aldm.read_parts", side_effect=InputError) as read, pytest.raises(InputError):
            read_adapter(tmp_path)
        assert read.call_args.args[0].name == f"{name}.safetensors"
        (tmp_path / f"{name}.safetensors").unlink()


def test_evaluate_writes_figures_and_images(cli, tmp_path, monkeypatch):
    evaluate = ["--evaluate", "--limit", 4, "--steps", 1, "--cfg", 1]
    code, out, err = cli(*evaluate, "--json", "figures.json")
    result = json.loads((tmp_path / "figures.json").read_text(), parse_constant=pytest.fail)
    assert code == 0 and "mIoU" in out and result["IoU_real"]["train"] is None
    for key in ("mIoU_generated", "mIoU_edited", "mIoU_real", "frechet_distance", "precision", "recall", "diversity",
                "editability"):
        assert result[key] >= 0
    images = pictures(tmp_path / "samples" / "images")
    assert list(images) == [f"toy_1000000{i}_{k}.png" for i in range(4) for k in range(2)]
    label = pictures(tmp_path / "samples" / "labels")["toy_10000003_1.png"]
    assert np.array_equal(label, Toy("val", length=4).labels[3])
    assert "has images already" in cli(*evaluate)[2]
    monkeypatch.setattr(sample, "write_text", mock.Mock(side_effect=OSError(28, "No space left on device")))
    code, out, err = cli(*evaluate, "--limit", 1, "--out", "late", "--json", "late.json")
    assert code == 1 and "mIoU" in out and "No space left" in err       # what was measured is said all the same


def test_bench_counts_operations(cli, toy_model):
    code, out, err = cli("--bench", "--steps", 2, "--batch", 2, "--cfg", 2, "--size", 32)
    seconds, tflop, rate, peak = (float(part.split()[0]) for part in out.splitlines()[1].split(", "))
    assert code == 0 and rate == pytest.approx(tflop / seconds, rel=0.01) and peak > 0.1
    with sample.FlopCounterMode(display=False) as counter:
        sample.generate(toy_model, torch.full((2, 32, 32), IGNORE), ["", ""], [0, 1], steps=2, cfg=2.0)
    assert tflop == pytest.approx(counter.get_total_flops() / 2e12, rel=1e-3)   # per image


def test_class_embeddings(tmp_path, capsys):
    """An adapter without a table wants --class-embeddings; with it, the table is the file's."""
    meta, parts = read_adapter(sample.ADAPTER)[0], load_file(sample.ADAPTER)
    table = -parts.pop("layout.table")
    aldm.save_tensors(tmp_path / "bare.safetensors", parts, {**meta, "format": "aldm-adapter"})
    torch.save(table[:19], tmp_path / "embeddings.pth")
    torch.save(table[19:], tmp_path / "null_embedding.pth")
    for file, embeddings, sign in ((sample.ADAPTER, None, -1), (sample.ADAPTER, "embeddings.pth", 1),
                                   (tmp_path / "bare.safetensors", "embeddings.pth", 1)):
        model = sample.load_model(file, embeddings=embeddings and tmp_path / embeddings)
        assert torch.equal(model.layout.table, sign * table) and capsys.readouterr().err == ""
    sample.load_model(tmp_path / "bare.safetensors")
    assert "--class-embeddings" in capsys.readouterr().err


def test_ctrl_c_is_no_traceback(cli, monkeypatch):
    monkeypatch.setattr(sample, "generate", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    code, out, err = cli("--layout", HERE / "assets" / "layout_1.png")
    assert code == 130 and "Traceback" not in err


@pytest.mark.parametrize("flags, word", [       # a word of the one line that says so
    ("", "--serve"), ("--layout ok.png --bench", "--bench"), ("--layouts val --shard 2/2", "shard"),
    ("--layout ok.png --prompt \udcff", "UTF-8"), ("--evaluate --root empty", "--root"),
    ("--evaluate --json empty", "folder"), ("--layout ok.png --out text.png", "text.png"),
    ("--layout no.png", "no.png"), ("--layout text.png", "text.png"), ("--layouts test", "splits"),
    ("--layouts empty", "no .png"), ("--layouts broken", "bad.png"), ("--layouts whole --out whole", "--out"),
    ("--layouts val --out own", "other images"), ("--layouts val --prompt night", "--prompts"),
    ("--layout ok.png --prompts night", "give --prompt"), ("--evaluate --captions ok.png", "--captions"),
    ("--layout ok.png --ckpt no.safetensors", "no.safetensors"), ("--layout ok.png --preset sd15", "sd15"),
    ("--layout ok.png --sd ADAPTER", "unet"), ("--layout ok.png --class-embeddings text.png", "text.png"),
    ("--layout ok.png --data ade20k", "150"), ("--layout ok.png --data toy --ckpt other.safetensors", "elsewhere"),
    ("--evaluate --ckpt other.safetensors --data own", "--judge"),
    ("--evaluate --judge ADAPTER", "toy_aldm.safetensors")])
def test_bad_input_is_one_line(flags, word, cli, tmp_path):
    for name in ("ok.png", "whole/a.png", "own/labels/val/a.png", "own/images/val/a.png", "broken/bad.png",
                 "empty/a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".png"):
            Image.new("RGB" if "images" in name else "L", (64, 64), 200 if "bad" in name else 0).save(tmp_path / name)
    (tmp_path / "own" / "classes.txt").write_text("road\nsky\n")
    (tmp_path / "text.png").write_text("not what you think")
    if "other" in flags:
        save_changed_adapter(tmp_path / "other.safetensors", dataset="elsewhere", names=("road", "sky"),
                             palette=[(1, 2, 3), (4, 5, 6)])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.*") if p.is_file()}
    code, out, err = cli(*flags.replace("ADAPTER", str(sample.ADAPTER)).split())
    assert code == 2 and len(err.splitlines()) == 1 and err.startswith("sample.py: "), err
    assert word in err and all(p.read_bytes() == content for p, content in before.items())
    assert set(tmp_path.rglob("*.png")) == {p for p in before if p.suffix == ".png"}


# -- the page to paint layouts on ------------------------------------------------------------------


LABEL = toy_scene(3)[1]


@pytest.fixture(scope="module")
def server(toy_model):
    server = painter(toy_model, 0, [LABEL], ["a street at night", "</script><b>"], steps=4, cfg=2.0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


REQUEST, PNG = {"prompt": "a street", "seed": 0, "steps": 2, "cfg": 1}, png(colorize(LABEL, "toy"))


def call(server, path="/generate", words=REQUEST, body=PNG, method="POST", headers=()):
    """-> status, text"""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, f"{path}?{urlencode(words)}", body, dict(headers))
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def generate(server, body=PNG, **more):
    status, text = call(server, words={**REQUEST, **more}, body=body)
    assert status == 200, text
    return [json.loads(line) for line in text.splitlines()]


def test_page(server):
    status, text = call(server, "/", method="GET")
    world = json.loads(text.split('id="world">')[1].split("</script>")[0])
    assert status == 200 and server.server_address[0] == "127.0.0.1"
    assert world["width"] == world["height"] == 64 and world["prompts"][1] == "</script><b>"
    assert base64.b64decode(world["examples"][0]) == LABEL.tobytes()
    assert world["names"][:2] == ["road", "sidewalk"] and world["palette"][0] == [128, 64, 128]
    for word in ('src="http', "@import", "url(http", '<link rel="stylesheet'):
        assert word not in text


def test_generate_streams_the_same_picture_for_the_same_seed(server):
    a, b, c = (generate(server, seed=seed, cfg=2) for seed in (5, 5, 6))
    assert [line["step"] for line in a if "step" in line] == [1, 2] and a[-1]["done"]
    assert a[-1]["image"] == b[-1]["image"] != c[-1]["image"]
    assert generate(server, png(Image.fromarray(LABEL)), seed=5, cfg=2)[-1]["image"] == a[-1]["image"]
    image = Image.open(io.BytesIO(base64.b64decode(a[-1]["image"])))
    assert image.format == "PNG" and image.size == (64, 64) and image.mode == "RGB"
    assert 2 <= sum("image" in line for line in generate(server, steps=12)) <= 7
    assert "zebra" in generate(server, prompt="street " * 90 + "zebra")[0]["note"]


def test_layout_files(server):
    big = Image.fromarray(LABEL.repeat(3, 0).repeat(5, 1))          # resized by nearest
    reply = json.loads(call(server, "/layout", {}, png(big))[1])
    assert reply["size"] == [320, 192] and base64.b64decode(reply["layout"]) == LABEL.tobytes()
    ids = png(Image.fromarray(np.full((64, 64), 8, np.uint8)))      # label id 8 is sidewalk
    for name, c in (("a_labelTrainIds.png", 8), ("a_gtFine_labelIds.png", 1), ("", 8)):
        reply = json.loads(call(server, "/layout", {"name": name}, ids)[1])
        assert set(base64.b64decode(reply["layout"])) == {c}


@pytest.mark.parametrize("words, body, says", [
    ({"steps": 0}, PNG, "steps"), ({"steps": 1001}, PNG, "steps"), ({"steps": 2.5}, PNG, "steps"),
    ({"steps": ""}, PNG, "steps"), ({"seed": -1}, PNG, "seed"), ({"seed": True}, PNG, "seed"),
    ({"cfg": float("nan")}, PNG, "cfg"), ({}, b"", "the layout: "), ({}, b"GIF89a", "the layout: "),
    ({}, png(Image.new("RGB", (64, 64), (1, 2, 3))), "[1, 2, 3]")])
def test_bad_requests_are_one_line(server, words, body, says):
    status, text = call(server, words={**REQUEST, **words}, body=body)
    error = json.loads(text)["error"]
    assert status == 400 and says in error and "\n" not in error and "/tmp" not in error


def test_only_from_here_and_not_too_large(server):
    port = server.server_port
    foreign = [{"Origin": origin} for origin in ("http://evil.example", "null", f"http://localhost:{port + 1}")]
    foreign += [{"Host": host} for host in (f"evil.example:{port}", "localhost", f"127.0.0.1:{port + 1}", "")]
    for headers in foreign:
        assert call(server, headers=headers)[0] == call(server, "/", method="GET", headers=headers)[0] == 400
    headers = {"Origin": f"http://localhost:{port}", "Host": f"localhost:{port}"}
    assert call(server, headers=headers)[0] == 200
    for length in ("99999999999", "-1", "1e3"):
        assert str(BODY) in call(server, headers={"Content-Length": length})[1]


def test_a_client_that_leaves_stops_its_generation_and_two_are_answered_in_turn(server, capfd):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    send_step = sample.PageHandler.send_step
    with mock.patch.object(sample.PageHandler, "send_step", autospec=True, side_effect=send_step) as sent:
        connection.request("POST", "/generate?seed=0&steps=1000&cfg=1", PNG)
        with connection.getresponse() as answer:
            assert answer.readline()
        connection.close()
        alone, results = generate(server, seed=1), {}
    assert alone[-1]["done"] and sent.call_count < 500
    assert capfd.readouterr().err == ""
    threads = [threading.Thread(target=lambda k=k: results.update({k: generate(server, seed=k)})) for k in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[2][-1]["done"] and results[1][-1]["image"] == alone[-1]["image"]


def test_a_failure_is_one_line_and_the_server_lives_on(server, monkeypatch):
    monkeypatch.setattr(sample, "generate", mock.Mock(side_effect=RuntimeError("no\n memory")))
    assert generate(server)[-1] == {"error": "the generation failed: no memory"}
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", "/proc/none")          # no temporary files
    status, text = call(server)
    assert status == 400 and "/proc/none" in json.loads(text)["error"]
    monkeypatch.undo()
    assert generate(server)[-1]["done"]


# -- training: killed, stopped, out of room --------------------------------------------------------


@pytest.fixture(scope="session")
def toy_world(tmp_path_factory):
    """A folder: toy.safetensors, a base model of random weights; city, eight toy scenes in Cityscapes' layout."""
    folder, preset = tmp_path_factory.mktemp("world"), PRESETS["toy"]
    torch.manual_seed(0)
    save_base(folder / "toy.safetensors", dict(
        unet=UNet(preset.unet), vae=VAE(preset.vae), text=TextEncoder(**preset.text), judge=UperNet(19, **JUDGE),
        segmenter=UperNet(19, **preset.segmenter), domain=Classifier(5)), token_ids=range(200))
    write_toy(folder / "city", "cityscapes", "train", 8)
    write_toy(folder / "city", "cityscapes", "val", 2)
    return folder


@pytest.fixture(scope="session")
def flags(toy_world):
    """A training in seconds."""
    return [str(f) for f in (
        "--data", "cityscapes", "--root", toy_world / "city", "--preset", "toy", "--sd", toy_world / "toy.safetensors",
        "--device", "cpu", "--batch", 2, "--steps", 8, "--ddim-steps", 2, "--unroll", 1, "--ramp", "1:3", "--lazy", 1,
        "--d-start", 1, "--lambda-adv", 1, "--lr", 1e-3, "--save-every", 2, "--sample-every", 3, "--eval", 0)]


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
    err = process.communicate()[1]
    assert process.returncode == code and "Traceback" not in err, f"exit {process.returncode}, not {code}:\n{err}"
    return notes(err)


def notes(err):
    """The lines of stderr but for the bar's."""
    return [line for line in re.split("[\r\n]", err) if line.strip() and "it/s" not in line and "s/it" not in line]


def rows(out):
    return (out / "log.csv").read_text().count("\n") - 1 if (out / "log.csv").exists() else 0


def files(out):
    return sorted(p.name for p in out.iterdir()) if out.exists() else []


def saved_steps(out):
    return [int(p.stem[-7:]) for p in sorted(out.glob("checkpoint_0*.pt"))]


def same_run(a, b, where=""):
    """Nested dicts and lists of tensors and plain values are equal, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, (dict, list, tuple)):
        assert len(a) == len(b), where
        for key, value in a.items() if isinstance(a, dict) else enumerate(a):
            same_run(value, b[key], f"{where}/{key}")
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, where


@pytest.fixture
def one_thread(monkeypatch):
    """Several need not round alike on a busy machine."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(2)


def test_a_killed_run_ends_as_if_it_had_not_been_killed(flags, train_cli, tmp_path, monkeypatch, one_thread):
    whole, out = tmp_path / "whole", tmp_path / "parts"
    assert train_cli("--out", whole, "--eval", 4)[0] == 0           # (the judgement does not disturb the run either)

    run_ = start(*flags, "--out", out, "--resume")                      # there is nothing to resume
    until(run_, lambda: any(re.match(r"\.\d+\.checkpoint", name) for name in files(out)))
    run_.kill()                                                         # in the midst of writing the first checkpoint
    assert any("step 0" in line for line in end(run_, -signal.SIGKILL)) and rows(out) == 2
    for left in ("checkpoint_0000002.pt", "step_0000003.png", "adapter.safetensors"):
        (out / f".999999999.{left}.part").write_text("half")

    run_ = start(*flags, "--out", out, "--resume")
    until(run_, lambda: rows(out) == 3)
    run_.send_signal(signal.SIGSTOP)
    code, _, err = train_cli("--out", out, "--resume")
    assert code == 2 and "another run is writing here" in err and err.count("\n") == 1
    run_.kill()                                                         # between two checkpoints
    end(run_, -signal.SIGKILL)
    code, _, err = train_cli("--out", out)
    assert code == 2 and "--resume" in err and err.count("\n") == 1

    moments, add = {4: signal.SIGTERM, 7: signal.SIGINT}, train.Log.add

    def add_and_signal(log, step, losses):
        add(log, step, losses)
        if step in moments:
            signal.raise_signal(moments.pop(step))
    monkeypatch.setattr(train.Log, "add", add_and_signal)
    for step, number in list(moments.items()):
        code, _, err = train_cli("--out", out, "--resume")
        assert code == 128 + number and f"stopped at step {step}, go on with --resume" in err
        assert rows(out) == saved_steps(out)[-1] == step
    (out / "before.json").write_text((whole / "before.json").read_text())
    assert train_cli("--out", out, "--resume", "--eval", 4)[0] == 0

    judged = [json.loads((folder / "judged.json").read_text()) for folder in (whole, out)]
    assert judged[0].pop("seconds") > 0 and judged[1].pop("seconds", 0) != 0 and judged[0]["before"]["layouts"] == 4
    assert judged[0] == judged[1]
    content = {p: p.read_bytes() for p in out.iterdir()}
    assert "finished already" in train_cli("--out", out, "--resume", "--eval", 4)[2]
    assert content == {p: p.read_bytes() for p in out.iterdir()}
    assert (whole / "log.csv").read_text() == (out / "log.csv").read_text() and rows(out) == 8
    assert not any(name.startswith(".") for name in files(out) if name != ".lock")
    a, b = (torch.load(folder / "checkpoint_0000008.pt", weights_only=True) for folder in (whole, out))
    assert a.keys() == {"step", "meta", "flags", "adapter", "layout", "discriminator", "opt_g", "opt_d"}
    same_run(a, b)
    same_run(load_file(whole / "adapter.safetensors"), load_file(out / "adapter.safetensors"))
    log = csv.DictReader((out / "log.csv").read_text().splitlines())
    assert [row["step"] for row in log if row["D_mIoU"]] == ["3", "6", "8"] and saved_steps(whole) == [6, 8]
    pictures = [name for name in files(out) if name.startswith("step")]
    assert pictures == [f"step_000000{i}.png" for i in (3, 6, 8)]
    assert all((whole / name).read_bytes() == (out / name).read_bytes() for name in pictures)


def test_a_signal_before_the_first_step(flags, tmp_path):
    """While what the adapter starts from is judged."""
    run_ = start(*flags, "--eval", 4, "--out", tmp_path, start_new_session=True)
    until(run_, lambda: (tmp_path / ".lock").exists())
    os.killpg(run_.pid, signal.SIGTERM)                                 # as a terminal does: all of its processes
    assert end(run_, 128 + signal.SIGTERM) == [] and files(tmp_path) == [".lock"]


def test_full_disk(train_cli, tmp_path):
    assert train_cli("--out", tmp_path, "--steps", 2)[0] == 0
    before = (tmp_path / "checkpoint_0000002.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, limits[1]))  # a checkpoint has 30 MB
    try:
        code, _, err = train_cli("--out", tmp_path, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1 and len(notes(err)) == 1 and str(tmp_path / "checkpoint_0000002.pt") in err and "disk" in err
    assert (tmp_path / "checkpoint_0000002.pt").read_bytes() == before
    assert not [name for name in files(tmp_path) if re.match(r"\.\d", name)] and saved_steps(tmp_path) == [2]


# -- the folder of a run, with next to nothing to train --------------------------------------------


def little_run(out, steps=4, step=None, show=None, stream=itertools.count, **kw):
    """A run of a layer with two weights; each step adds one to them, unless another `step` is given -> the layer, and
    the steps at which it was exported."""
    layer, exported = torch.nn.Linear(2, 1, bias=False), []
    torch.nn.init.zeros_(layer.weight)
    args = dict(out=out, steps=steps, resume=False, seed=0, save_every=1, sample_every=99, keep=2) | kw
    args = SimpleNamespace(**args)

    def add_one(batch, i):
        layer.weight.data += float("inf") if step == "explode" else 1
        return {"noise": torch.rand(()), "dropped": torch.tensor(0.)}
    train.open_run(args)
    train.fit(train.Job({"layer": layer}, {"dataset": "toy"}, stream, [], step if callable(step) else add_one,
                        ["noise", "adv"], show, exported.append), args)
    return layer, exported


def test_the_randomness_of_a_step_comes_from_its_number_the_seed_and_the_process(tmp_path, monkeypatch):
    def draws(name, steps, **kw):
        drawn = []

        def step(batch, i):
            drawn.append(torch.rand(()).item())
            return {"dropped": torch.tensor(0.)}
        little_run(tmp_path / name, steps, step, **kw)
        return drawn
    whole, other = draws("whole", 4), draws("other", 4, seed=1)
    assert draws("parts", 2) + draws("parts", 4, resume=True) == whole
    monkeypatch.setattr(train, "rank", lambda: 1)
    assert len({*whole, *other, *draws("whole", 4)}) == 12


def test_keeps_the_last_checkpoints_and_every_tenth_adapter(tmp_path, monkeypatch):
    (tmp_path / "checkpoint_best.pt").write_text("of the user")
    _, exported = little_run(tmp_path, 47, save_every=2, keep=3)
    assert saved_steps(tmp_path) == [44, 46, 47] and rows(tmp_path) == 47 and "checkpoint_best.pt" in files(tmp_path)
    assert exported == [*range(2, 47, 2), 47]
    written = []
    monkeypatch.setattr(train, "save_adapter", lambda path, *_: written.append(path.stem))
    for step in exported:
        train.export_adapter(SimpleNamespace(out=".", save_every=2, adapter_dtype="fp16"), None, {}, step)
    assert set(written) == {"adapter", "adapter_0000020", "adapter_0000040"} and written.count("adapter") == 24


DAMAGE = {"truncated": lambda b: b[:len(b) // 2], "empty": lambda b: b"", "text": lambda b: b"not a checkpoint",
          "a flipped byte": lambda b: b.replace(b"\0\0\x80\x40\0\0\x80\x40", b"\0\0\x81\x40\0\0\x80\x40")}      # (4, 4)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint(damage, tmp_path, capsys):
    little_run(tmp_path)
    log = (tmp_path / "log.csv").read_text()
    newest, before = tmp_path / "checkpoint_0000004.pt", tmp_path / "checkpoint_0000003.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    (tmp_path / "log.csv").write_bytes(log.encode()[:-9] + b"\xff")      # and a log that was torn
    capsys.readouterr()
    layer, _ = little_run(tmp_path, resume=True)                        # falls back to the one before, with a line
    lines = notes(capsys.readouterr().err)
    assert len(lines) == 1 and str(newest) in lines[0] and "damaged" in lines[0]
    assert layer.weight.tolist() == [[4, 4]] and (tmp_path / "log.csv").read_text() == log
    for path in newest, before:
        path.write_bytes(damage(path.read_bytes().replace(b"\0\0\x40\x40", b"\0\0\x80\x40")))
    with pytest.raises(InputError, match="no checkpoint is whole"):
        little_run(tmp_path, resume=True)


def test_what_is_kept_beside_a_damaged_checkpoint(tmp_path):
    """A damaged one that is further on does not take the place of a good one, nor a step's row in the log."""
    little_run(tmp_path, save_every=2)
    (tmp_path / "checkpoint_0000004.pt").write_bytes(b"")

    def one_more(first):
        yield first
        raise InputError("an image is gone")
    with pytest.raises(train.Stopped, match="an image is gone.*checkpoint_0000004"):
        little_run(tmp_path, 9, save_every=9, keep=1, resume=True, stream=one_more)
    assert saved_steps(tmp_path) == [3, 4] and rows(tmp_path) == 3


def test_the_picture_is_drawn_before_the_checkpoint(tmp_path):
    """So that a run that is killed between the two lacks nothing when it is resumed."""
    with pytest.raises(train.Stopped, match="No space left.*checkpoint_0000002.pt$"):
        little_run(tmp_path, 4, sample_every=3, show=mock.Mock(side_effect=OSError(28, "No space left on device")))
    show = mock.Mock(return_value={})
    little_run(tmp_path, 4, resume=True, sample_every=3, show=show)
    assert [call.args for call in show.mock_calls] == [(3,), (4,)] and rows(tmp_path) == 4


DROPPED = [     # what step i says, steps, why the run stops, its rows, its checkpoints
    (lambda i: 3 <= i < 11 or i in (23, 30), 99, "10 of the last 31", 31, [18, 30]),    # 24 ends with a dropped step
    (lambda i: 2 * (i % 2 == 0), 99, "10 of the last 19", 19, [12, 18]),
    (lambda i: 1, 3, "3 of the last 3", 3, [])]


@pytest.mark.parametrize("dropped,steps,why,last,saved", DROPPED)
def test_steps_that_are_not_finite_stop_a_run(dropped, steps, why, last, saved, tmp_path):
    def step(batch, i):
        return {"noise": torch.tensor(1.), "dropped": torch.tensor(float(dropped(i)))}
    with pytest.raises(train.Stopped, match=f"{why} .* last good checkpoint"):
        little_run(tmp_path, steps, step=step, save_every=6)
    assert rows(tmp_path) == last and saved_steps(tmp_path) == saved


def test_nothing_spoiled_is_saved_and_nothing_done_is_lost(tmp_path):
    with pytest.raises(train.Stopped, match="layer.*weight.*finite"):
        little_run(tmp_path, step="explode")
    assert saved_steps(tmp_path) == []

    def stream(first):
        yield from range(2)
        raise InputError("images/a.png: a broken image")
    with pytest.raises(train.Stopped, match="step 2: images/a.png"):
        little_run(tmp_path / "b", 9, stream=stream, save_every=9)
    assert saved_steps(tmp_path / "b") == [2]


@pytest.mark.parametrize("layouts", [(torch.channels_last, torch.contiguous_format),
                                     (torch.contiguous_format, torch.channels_last)])
def test_a_run_goes_on_where_weights_lie_otherwise_in_memory(layouts, tmp_path):
    """A GPU's checkpoint on a CPU, and the reverse: the adapter is channels_last on the former alone."""
    def run(out, steps, layout, resume):
        torch.manual_seed(0)
        conv = nn.Conv2d(8, 8, 3).to(memory_format=layout)
        opt = torch.optim.AdamW(conv.parameters(), fused=True)

        def step(batch, i):
            conv(torch.randn(2, 8, 5, 5)).square().mean().backward()
            return {"dropped": train.update(opt, {"noise": torch.ones(())})}
        args = SimpleNamespace(out=out, steps=steps, resume=resume, seed=0, save_every=9, sample_every=99, keep=1)
        train.open_run(args)
        train.fit(train.Job({"conv": conv, "opt": opt}, {}, itertools.count, [(opt, lambda i: 0.01)], step, []), args)
        return conv.weight.detach()
    run(tmp_path / "moved", 3, layouts[0], resume=False)
    moved = run(tmp_path / "moved", 6, layouts[1], resume=True)
    assert torch.allclose(moved, run(tmp_path / "stayed", 6, layouts[1], resume=False), atol=1e-5)


# -- a step ----------------------------------------------------------------------------------------


def setting(**kw):
    args = dict(d_start=0, lazy=1, discriminator="trained", lambda_adv=1., ramp=(0, 1), starts_below=4, unroll=1,
                ddim_steps=4, unroll_grad="first", fake_weight=0.5, device="cpu", bf16=False, lr=1e-3, lr_d=1e-3)
    return SimpleNamespace(**{**args, **kw})


def make_trainee(adapter="controlnet"):
    """Model, discriminator, their optimisers, and a batch."""
    model, D, toy = tiny_model(adapter), UperNet(20, **PRESETS["toy"].segmenter), data.Toy(length=2)
    items = {key: [toy[i][key] for i in range(2)] for key in ("image", "label", "caption")}
    items |= {key: torch.stack(items[key]) for key in ("image", "label")}
    optimizers = train.optimizers(model, D.eval().requires_grad_(False), setting())
    return model, D, *optimizers, train.prepare(model, items)


POISON = {"latents": 3, "a gradient": 1, "D's loss": 2, "D's weights": 3}       # -> whose step is dropped: 2 is D's


@pytest.mark.parametrize("what", POISON)
def test_a_step_that_is_not_finite_is_dropped(what):
    model, D, opt_g, opt_d, batch = make_trainee()

    def step(batch, **kw):
        return train.train_step(model, D, opt_g, opt_d, [batch], 5, setting(**kw))

    def states():
        return copy.deepcopy([[part.state_dict() for part in parts] for parts in ((model.adapter, opt_g), (D, opt_d))])
    assert step(batch)["dropped"] == 0
    before, poisoned, inf = states(), dict(batch), float("inf")
    if what == "latents":
        poisoned["x0"] = batch["x0"].index_fill(0, torch.tensor(1), float("nan"))
    elif what == "a gradient":
        hook = next(model.adapter.parameters()).register_hook(lambda gradient: gradient * inf)
    elif what == "D's weights":
        before[1][0]["decoder.conv_last.1.bias"][0] = D.decoder.conv_last[1].bias.data[0] = inf
    losses = step(poisoned, fake_weight=inf if what == "D's loss" else 0.5)
    assert losses["dropped"] == POISON[what]
    assert set(losses) == {"noise", "adv", "D_real", "D_fake", "D_caught", "dropped"}
    for code, old, new in zip((1, 2), before, states()):
        if POISON[what] & code:
            same_run(old, new)
        else:
            with pytest.raises(AssertionError):
                same_run(old, new)
    if what == "a gradient":
        hook.remove()
    if what != "D's weights":
        assert step(batch)["dropped"] == 0                              # and the next one is as ever


def noise_gradient(model, D, opt_g, opt_d, micro_batches):
    """The gradient of the noise loss with which the adapter is updated. Randomness is that of a scene, wherever in a
    batch it stands."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda x: torch.sin(1000 * x))
        patch.setattr(torch, "randint", lambda low, high, size, device=None: torch.full(size, (low + high) // 2))
        trained = model.adapter.parameters()
        patch.setattr(opt_g, "step", lambda: seen.extend(p.grad.flatten() for p in trained if p.grad is not None))
        losses = train.train_step(model, D, opt_g, opt_d, micro_batches, 5, setting(discriminator="none"))
    return torch.cat([*seen, losses["noise"].view(1)])


def halves(batch):
    return [{key: value[i:i + 1] for key, value in batch.items()} for i in range(2)]


def near(a, b):
    return a.abs().max() > 0 and (a - b).abs().max() < 1e-4 * a.abs().max()


def test_accumulated_batches_are_one_batch():
    *parts, batch = make_trainee()
    joint, parted, half = (noise_gradient(*parts, micro) for micro in ([batch], halves(batch), halves(batch)[:1]))
    assert near(joint, parted) and not near(joint, half)


def slow_step(model, D, batch, args, weight):
    """Sec. 3 as it is written, with none of our savings: the class embeddings looked up pixel by pixel, a graph through
    the whole UNet, every estimate decoded and judged on its own, loops over images and classes, a second pass for D's
    fakes. weight: L_adv's. -> losses, gradients of the adapter, gradients of D"""
    label, x0, context = batch["label"], batch["x0"], batch["context"]
    a, timesteps = model.schedule.alphas_cumprod, model.schedule.ddim_timesteps(args.ddim_steps).tolist()
    noise = torch.randn_like(x0)                                    # the same draws, in the same order
    start = torch.randint(args.unroll, args.ddim_steps, (len(x0),)).tolist()
    shown = torch.randint(0, args.unroll + 1, (len(x0),)).tolist()
    embeddings = model.layout.table[label.where(label != IGNORE, 19)].permute(0, 3, 1, 2)           # [B,C,H,W]
    hint, n_valid = F.avg_pool2d(embeddings, 2), (label != IGNORE).sum()
    model.unet.requires_grad_(True)

    def eps_of(x, t):
        return model.unet(x, t, context, control=model.adapter(x, t, context, hint))

    def balanced(logits):                   # 1/C times the mean over the classes present of the class's mean CE
        ce = -F.log_softmax(logits, 1).gather(1, label.where(label != IGNORE, 0)[:, None])[:, 0]
        present = [c for c in range(19) if (label == c).any()]
        n = len(present) * logits.shape[1]
        return sum(ce * (label == c) * n_valid / ((label == c).sum() * n) for c in present)

    def chain():
        estimates, predicted = [], []
        x = [a[t].sqrt() * x0[i] + (1 - a[t]).sqrt() * noise[i] for i, t in enumerate(timesteps[s] for s in start)]
        for k in range(args.unroll + 1):
            t = [timesteps[s - k] for s in start]
            eps = eps_of(torch.stack(x), torch.tensor(t))
            predicted.append(eps)
            x0_hat = [(x[i] - (1 - a[t[i]]).sqrt() * eps[i]) / a[t[i]].sqrt() for i in range(len(x))]
            estimates.append(torch.stack(x0_hat))
            if k < args.unroll:
                prev = [timesteps[s - k - 1] for s in start]
                x = [a[p].sqrt() * x0_hat[i] + (1 - a[p]).sqrt() * eps[i] for i, p in enumerate(prev)]
                x = [v.detach() for v in x] if args.unroll_grad != "full" else x
        return predicted[0], estimates

    def judge(estimate):
        images = [model.vae.decode(z[None]).clamp(-1, 1) for z in estimate]
        return balanced(torch.cat([D(image) for image in images]))

    eps, estimates = chain()
    maps = [judge(estimate) for estimate in estimates]
    mean = torch.stack([maps[0], *(m.detach() for m in maps[1:])] if args.unroll_grad == "first" else maps).mean(0)
    if args.unroll_grad == "first":         # the official code's: L_0 / stop(L_0) * mean
        mean = maps[0] / maps[0].detach().where(maps[0] != 0, 1) * mean
    noise_loss, adv = ((eps - noise) ** 2).mean(), mean.sum() / n_valid
    (noise_loss + weight * adv).backward()
    grads = [p.grad.clone() for p in model.adapter.parameters()]

    with torch.no_grad():
        estimates = chain()[1]
        fakes = model.vae.decode(torch.stack([estimates[k][i] for i, k in enumerate(shown)])).clamp(-1, 1)
        real = model.vae.decode(x0).clamp(-1, 1)
    D.train().requires_grad_(True)
    real_logits, fake_logits = D(torch.cat([real, fakes])).chunk(2)
    d_real, d_fake = balanced(real_logits).sum() / n_valid, -F.log_softmax(fake_logits, 1)[:, 19].mean()
    (d_real + args.fake_weight * d_fake).backward()
    losses = {"noise": noise_loss, "adv": adv, "D_real": d_real, "D_fake": d_fake}
    return losses, grads, [p.grad for p in D.parameters()]


@pytest.mark.parametrize("mode", ["first", "each", "full"])
def test_a_step_computes_what_the_paper_says(mode):
    """The fast step has the losses and gradients of the plain, slow one."""
    seen, (model, D, opt_g, opt_d, batch) = {}, make_trainee()
    for p in model.adapter.parameters():
        p.data += 0.02 * torch.randn_like(p)
    slow_model, slow_D = copy.deepcopy(model), copy.deepcopy(D)
    # At step 5 a quarter of lambda_adv, which is large, as an untrained D hardly has a gradient to give.
    args = setting(unroll=2, unroll_grad=mode, lambda_adv=4e4, ramp=(4, 8))
    for opt in opt_g, opt_d:
        opt.step = lambda opt=opt: seen.update({opt: [p.grad.clone() for p in opt.param_groups[0]["params"]]})
    torch.manual_seed(0)
    losses = train.train_step(model, D, opt_g, opt_d, [batch], 5, args)
    torch.manual_seed(0)
    want, adapter_grads, d_grads = slow_step(slow_model, slow_D, batch, args, weight=1e4)
    for name, value in want.items():
        assert torch.allclose(losses[name], value, rtol=1e-4), name
    # (D learns with the statistics of its batch: over four images they amplify what is rounded)
    for got, grads, error in (seen[opt_g], adapter_grads, 1e-3), (seen[opt_d], d_grads, 1e-2):
        joint = [torch.cat([g.flatten() for g in gradients]) for gradients in (got, grads)]
        assert joint[1].norm() > 1e-4 and (joint[0] - joint[1]).norm() < error * joint[1].norm()


def test_torchrun(flags, tmp_path):
    """Two processes of one image each: their gradient is that of both images, and they train the same networks."""
    (tmp_path / "two.py").write_text(f"""
import sys, torch, train
sys.path.insert(0, {str(HERE)!r})
from {Path(__file__).stem} import halves, make_trainee, noise_gradient
build, kept, job = train.build, [], train.train_adapter
train.build = lambda args: kept.append(build(args)) or kept[0]
def check_and_train(args):
    *parts, batch = make_trainee()
    gradient = noise_gradient(*parts, [halves(batch)[train.rank()]])
    job(args)
    model, D, *_ = kept[0]
    torch.save([gradient, model.adapter.state_dict(), D.state_dict()], f"rank{{train.rank()}}.pt")
train.train_adapter = check_and_train
train.main()
""")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
                    tmp_path / "two.py", *flags, "--batch", "1", "--steps", "2", "--out", "out"], cwd=tmp_path,
                   env={**os.environ, "PYTHONPATH": str(HERE)}, check=True, timeout=200)
    *parts, batch = make_trainee()
    one, two = (torch.load(tmp_path / f"rank{i}.pt", weights_only=True) for i in range(2))
    same_run(one, two)
    assert near(noise_gradient(*parts, [batch]), one[0])
    saved = torch.load(tmp_path / "out" / "checkpoint_0000002.pt", weights_only=True)
    same_run(saved["adapter"], one[1]), same_run(saved["discriminator"], one[2])
    assert rows(tmp_path / "out") == 2 and not [name for name in files(tmp_path / "out") if re.match(r"\.\d", name)]


# -- the cache -------------------------------------------------------------------------------------


def test_the_cache_changes_nothing_but_the_time(toy_world, tmp_path, monkeypatch):
    model, both = tiny_model(), []
    city = lambda size=64: open_dataset("cityscapes", toy_world / "city", size=size, grid=4)
    cache = train.Cache(tmp_path, city(), model)
    for source in city(), cache:
        torch.manual_seed(3)
        batch = train.prepare(model, next(data.batches(source, 4, seed=0)))
        both.append((batch, train.generator_loss(model, None, batch, 1, setting(lazy=2))[0].item()))
    (a, loss_a), (b, loss_b) = both
    assert torch.equal(a["label"], b["label"]) and loss_a == pytest.approx(loss_b, rel=1e-3)
    assert torch.allclose(a["x0"], b["x0"], atol=2e-3) and torch.allclose(a["context"], b["context"], atol=2e-3)
    # a crop is cut from the latents of the whole
    places, wide = set(), city(32)                          # resized to 32 x 64
    cut = train.Cache(tmp_path / "wide", wide, model)
    for key in data.batch_keys(8, 8, 0, 0, 0, 1):
        item, cached = wide[key], cut[key]
        left = item["left"] // 4
        moments = torch.cat(model.vae.moments(wide.full(key[0], item["flip"])[0][None]), 1)[0, :, :, left:left + 8]
        assert torch.allclose(moments, cached["moments"].float(), atol=5e-3)
        assert torch.equal(item["label"], cached["label"].long())
        places.add((item["flip"], item["left"]))
    assert len(places) > 4 and {flip for flip, _ in places} == {False, True}
    # it is made once, and serves only what it was made of
    content = {path: path.read_bytes() for path in tmp_path.glob("*.*")}
    damaged, written, write = tmp_path / "00000003.safetensors", [], train.Cache.write
    damaged.write_bytes(content[damaged][:-9])              # (and a damaged file is made anew, and nothing else)
    monkeypatch.setattr(train.Cache, "write", lambda self, i, model: written.append(i) or write(self, i, model))
    train.Cache(tmp_path, city(), model)
    assert written == [3]
    next(model.vae.parameters()).data *= 1.01
    with pytest.raises(InputError, match="choose another folder"):
        train.Cache(tmp_path, city(), model)
    next(model.vae.parameters()).data /= 1.01
    label = next((toy_world / "city").glob("gtFine/train/*/*"))
    was = label.stat()
    os.utime(label, (1, 1))                                 # a label file that was written anew
    with pytest.raises(InputError, match="choose another folder"):
        train.Cache(tmp_path, city(), model)
    os.utime(label, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert content == {path: path.read_bytes() for path in tmp_path.glob("*.*")} and len(content) == 9


def test_the_cache_has_all_captions(toy_world, tmp_path):
    model = tiny_model()
    for captions, words in (('{"toy_00000000": ["one", "two"]}', ["one", "two"]), ("{}", None)):
        (tmp_path / "captions.json").write_text(captions)
        pairs = open_dataset("cityscapes", toy_world / "city", size=64, grid=4, captions=tmp_path / "captions.json")
        cache = train.Cache(tmp_path / str(words), pairs, model)
        words = words or [pairs[0]["caption"]]
        for seed in range(2):
            context = model.text.encode(words)[seed % len(words)]
            assert torch.allclose(cache[0, seed]["context"].float(), context, atol=2e-3)


# -- the toy's base model, tables, --bench ---------------------------------------------------------


sys.path.insert(0, str(HERE / "assets"))


def test_the_autoencoder_starts_as_the_principal_components():
    """Its first reconstructions are those of the best linear map of 4x4 patches to 16 numbers, by NumPy."""
    import make_toy
    torch.manual_seed(0)
    vae, image = VAE(PRESETS["toy"].vae), sample.from_pixels(Toy("train", DOMAINS, 200).images, "cpu")
    make_toy.linear_start(vae, image)
    patches = F.pixel_unshuffle(image, 4).permute(0, 2, 3, 1).reshape(-1, 48).double().numpy()
    best = np.linalg.eigvalsh(np.cov(patches.T))[:-16].sum() / 48
    with torch.no_grad():
        error = (vae.decode(vae.encode(image)) - image).square().mean().item()
        make_toy.normalize_latents(vae, image)
        z = vae.encode(image)
        again = (vae.decode(z) - image).square().mean().item()
    assert best < error < 2 * best and np.isclose(error, again, rtol=1e-3)      # the last norm takes its share
    assert z.mean((0, 2, 3)).abs().max() < 1e-3 and abs(z.std() - 1) < 1e-3


def test_make_toy_makes_a_base_that_trains(tmp_path):
    """Its stages fill one file, each resumable; an adapter trains on it, and is judged."""
    import make_toy
    base, common = tmp_path / "toy.safetensors", ("--device", "cpu", "--steps", 2, "--batch", 4, "--scenes", 100)
    for stage in ("vae", "base", "judges"):
        launch(make_toy, stage, "--out", tmp_path, *common)
    before = base.read_bytes()
    launch(make_toy, "vae", "--out", tmp_path, *common, "--resume")
    assert base.read_bytes() == before
    assert set(load_weights(base)) == {"vae", "unet", "text", "segmenter", "judge", "domain"}
    out = launch(train, "--sd", base, "--init", "none", "--device", "cpu", "--steps", 1, "--batch", 2, "--eval", 4,
                 "--ddim-steps", 4, "--out", tmp_path / "run")
    after = json.loads((tmp_path / "run" / "judged.json").read_text())
    assert "before" in out and all(f"{after[key]:9.3f}" in out for key in ("mIoU_generated", "seconds"))


def test_what_is_shipped_works():
    """assets/: both adapters fit the base model and obey layouts (the judge finds 0.2 in what the base makes of prompts
    alone), ALDM's better; the autoencoder costs the judge at most a tenth."""
    parts = load_weights(aldm.base_file("toy"))
    judge, _ = sample.toy_judges(parts, "cpu")
    toy, found = Toy("val", DOMAINS, length=20), []
    for name in ("toy_controlnet", "toy_aldm"):
        model = sample.load_model(aldm.ASSETS / f"{name}.safetensors")
        result = sample.evaluate(model, [toy[i] for i in range(20)], judge, n=1, batch=20, steps=10, cfg=1.0)
        found.append(result["mIoU_generated"])
        assert result["mIoU_reconstructed"] > 0.9 * result["mIoU_real"] > 0.8
    assert found[1] > found[0] > 0.4
    assert sum(path.stat().st_size for path in aldm.ASSETS.iterdir()) < 24e6


def test_tables(tmp_path, monkeypatch):
    """A table's rows are runs of train.py; what is finished is not run again."""
    import make_results
    for _, rows in make_results.TABLES.values():
        for flags in rows.values():
            train.parse_args(flags.split())
    monkeypatch.setitem(make_results.TABLES, "k", ("Title", {"one": "--unroll 0"}))
    flags = "--steps 1 --batch 2 --eval 4 --ddim-steps 4 --device cpu"
    command = ("k", "--seeds", 1, "--runs", tmp_path, "--out", tmp_path / "new" / "results.md", "--train-flags", flags)
    text = launch(make_results, *command)
    file = tmp_path / "unroll-0-seed-0" / "judged.json"
    figures = json.loads(file.read_text())
    assert f"| one | `--unroll 0` | {figures['mIoU_generated']:.3f} | {figures['mIoU_edited']:.3f} | " in text
    file.write_text(json.dumps({**figures, "mIoU_generated": 0.75}))
    assert "| 0.750 | " in launch(make_results, *command) and "0.750" in (tmp_path / "new" / "results.md").read_text()
    assert make_results.spread([0.5, 0.7]) == "0.600 ± 0.141"


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_compute_the_same(recompute):
    """--compile changes neither values nor gradients nor names."""
    plain = nn.ModuleDict({"vae": ResnetBlock(32, 64, 8)})
    compiled, x = copy.deepcopy(plain), torch.randn(2, 32, 16, 16)
    compiled.vae = compiled["vae"]
    train.make_fast(compiled, nn.Identity(), SimpleNamespace(device="cpu", compile=True, recompute=recompute))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    values = [net["vae"](x) for net in (plain, compiled)]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0 and torch.allclose(*values, atol=1e-5)
    for value in values:
        value.square().mean().backward()
    assert all(near(p.grad, q.grad) for p, q in zip(plain.parameters(), compiled.parameters()))
    assert list(plain.state_dict()) == list(compiled.state_dict())


@pytest.mark.parametrize("adapter,unroll_grad", [("controlnet", "first"), ("oft", "each"), ("controlnet", "full")])
def test_recomputed_blocks_compute_the_same(adapter, unroll_grad):
    found = []
    for recompute in False, True:
        model, D, _, _, batch = make_trainee(adapter)
        for p in model.adapter.parameters():
            p.data += 0.01 * torch.randn_like(p)
        train.make_fast(model, D, SimpleNamespace(device="cpu", compile=False, recompute=recompute))
        loss, *_ = train.generator_loss(model, D, batch, 5, setting(unroll_grad=unroll_grad, lambda_adv=1e5))
        loss.backward()
        found += [loss, torch.cat([p.grad.flatten() for p in model.adapter.parameters()])]
    assert torch.allclose(found[0], found[2]) and near(found[1], found[3])


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive; with fake tensors, without having them."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for t in tree_leaves(result):
            if torch.is_tensor(t) and (key := (storage := t.untyped_storage())._cdata) not in self.sizes:
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.drop, key)
        return result

    def drop(self, key):
        self.now -= self.sizes.pop(key)


def peak_memory(flags):
    """GiB that live tensors take at most in a noise step and in an adversarial step with D's, at SD's size in bf16."""
    args = train.complete(train.parse_args(f"--bench --preset sd15 --device cpu --bf16 {flags}".split()))
    preset, B, side = PRESETS["sd15"], args.batch, args.size // 8
    with torch.device("meta"):
        unet, vae, text = UNet(preset.unet), VAE(preset.vae), TextEncoder(**preset.text)
        model = ALDM(preset, unet.bfloat16(), vae, text, class_table("cityscapes"), args.adapter, "classes",
                     torch.empty(20, 768)).to("meta")
        D = UperNet(20, **preset.segmenter)
        train.make_fast(model, D, args)
    def norm(self, x):                                              # CUDA's autocast has norms in fp32, the CPU's not
        shape = (self.num_groups,) if isinstance(self, nn.GroupNorm) else (self.normalized_shape,)
        function = F.group_norm if isinstance(self, nn.GroupNorm) else F.layer_norm
        return function(x.float(), *shape, self.weight.float(), self.bias.float(), self.eps)
    norms = [mock.patch.object(kind, "forward", norm) for kind in (nn.GroupNorm, nn.LayerNorm)]
    flash = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION)      # as on a GPU
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live, flash, norms[0], norms[1]:
        for module in model, D:
            module.to_empty(device="cpu")
        optimizers = train.optimizers(model, D, args)
        for opt in optimizers:                                      # AdamW's states are there
            for p in opt.param_groups[0]["params"]:
                p.grad = torch.empty_like(p)
            train.update(opt, {})
        batch = {"label": torch.zeros(B, args.size, args.size, dtype=torch.int64), "x0": torch.randn(B, 4, side, side),
                 "context": torch.randn(B, 77, 768)}
        peaks, args.ramp, args.d_start = [], (0, 1), 0
        for step in 9, 8:
            live.peak = live.now
            train.train_step(model, D, *optimizers, [batch] * args.accumulate, step, args)
            peaks.append(live.peak / 2 ** 30)
    return peaks


def test_batch_4_of_512_pixels_with_9_unrolled_steps_fits_a_24_gb_card():
    noise, adversarial = peak_memory("--batch 4 --size 512 --unroll 9 --recompute")
    assert 8 < noise < adversarial < 20                             # room for cuDNN and the allocator


def test_bench(train_cli):
    code, out, _ = train_cli("--bench", "--repeat", 1, "--size", 64)
    table = {line[:36].strip(): line[36:].split() for line in out.splitlines()}
    names = ("noise step", "adversarial step, K = 1, with D's")
    noise, adversarial = ([float(v) for v in table[name]] for name in names)
    assert code == 0 and adversarial[0] > noise[0] > 0 and all(v > 0 for v in noise + adversarial)
    args = train.complete(train.parse_args("--bench --preset sd15 --device cpu".split()))     # the official training's
    assert (args.data, args.size, args.batch, args.unroll) == ("cityscapes", 512, 4, 9)


# -- the discriminator's start, rate and fakes -----------------------------------------------------


@pytest.mark.parametrize("ramp,starts_below,shares", [
    ((0, 1), 6, [1, 2, 3, 3, 2, 1]), ((50, 60), 6, [2, 2, 2, 2, 2, 2]), ((50, 60), 5, [2, 2, 2, 2, 2, 2])])
def test_the_discriminator_sees_every_t(ramp, starts_below, shares):
    """Its fakes are estimates at every step of the DDIM subset: with K = 3 a start in 3, 4, 5, then one of the four
    from there down; before the ramp, where nothing is unrolled, all alike, whatever --t-max is."""
    schedule = Schedule()

    def eps(x_t, t, *_):                                            # of which the estimate is t / 1000
        a = schedule.a(t)
        return (x_t - a.sqrt() * t.view(-1, 1, 1, 1) / 1000) / (1 - a).sqrt()

    model = SimpleNamespace(schedule=schedule, encode_layout=lambda label: None, eps=eps,
                            vae=SimpleNamespace(decode=lambda z: z[:, :3]))
    batch = {"label": torch.zeros(4000, 2, 2).long(), "x0": torch.randn(4000, 4, 2, 2), "context": None}
    blind = lambda image: torch.zeros(len(image), 20, 2, 2)
    args = setting(ramp=ramp, unroll=3, ddim_steps=6, starts_below=starts_below)
    _, _, fakes = train.generator_loss(model, blind, batch, 5, args)
    t = (fakes[:, 0, 0, 0] * 1000).round().long()
    share = (t[:, None] == schedule.ddim_timesteps(6)).float().mean(0).numpy()
    assert share.sum() == pytest.approx(1)
    assert np.abs(share - np.array(shares) / 12).max() < 4 * np.sqrt(0.25 * 0.75 / 4000), share
    args.d_start = 6
    assert train.generator_loss(model, blind, batch, 5, args)[2] is None


def test_the_discriminator_learning_rate_is_the_official_one_cycle():
    """By PyTorch's own OneCycleLR, stepped at the discriminator's updates: every eighth step, from step 16 on."""
    args = SimpleNamespace(lr_d=1e-6, d_start=16, lazy=8, d_warmup=200, d_cycle=120_000, steps=99)
    opt = torch.optim.SGD([torch.zeros(1)], lr=1)
    official = torch.optim.lr_scheduler.OneCycleLR(
        opt, 1e-6, total_steps=120_001, pct_start=201 / 120_001, div_factor=10, final_div_factor=100)
    for update in range(2000):
        assert train.one_cycle(args, 16 + 8 * update) == pytest.approx(official.get_last_lr()[0], rel=1e-3)
        opt.step(), official.step()
    ends = [train.one_cycle(args, 0), train.one_cycle(args, 16 + 8 * 120_000)]
    args.d_cycle, args.steps = None, 16 + 8 * 1000                  # ADE20K: the run's own updates
    assert [*ends, train.one_cycle(args, args.steps)] == pytest.approx([1e-7, 1e-9, 1e-9])


def test_the_rates_of_adapter_and_segmenter():
    assert [train.warm_up(2e-3, 20, step) for step in (0, 9, 19, 500)] == pytest.approx([1e-4, 1e-3, 2e-3, 2e-3])
    args = SimpleNamespace(lr=0.02, steps=1000)
    rates = [train.polynomial(args, step) for step in (24, 500, 999)]
    assert rates == pytest.approx([0.01 * 0.976 ** 0.9, 0.02 * 0.5 ** 0.9, 0.02 * 0.001 ** 0.9])


def test_what_a_run_starts_from_stands_in_its_files(train_cli, tmp_path):
    """A discriminator from mit-semseg's files sees ImageNet's mean and deviation, the toy's does not; --init, the judge
    and a resumed run know it. --init takes its file's kind of adapter. A resumed run tells what differs."""
    encoder, decoder, first, second, third = (tmp_path / name for name in ("encoder.pth", "decoder.pth", "1", "2", "3"))
    ade, checkpoint = UperNet(150, **PRESETS["toy"].segmenter), first / "checkpoint_0000002.pt"
    torch.save(ade.encoder.state_dict(), encoder), torch.save(ade.decoder.state_dict(), decoder)
    semseg = ("--segmenter", encoder, decoder)
    for argv in ((*semseg, "--adapter", "t2i", "--lr", 0.1, "--steps", 2, "--out", first),
                 ("--init", checkpoint, "--lr", 1e-9, "--steps", 1, "--out", second), ("--steps", 1, "--out", third)):
        assert train_cli(*argv)[0] == 0
    (meta, before), (meta_2, after), (meta_3, _) = (read_adapter(path) for path in (checkpoint, second, third))
    assert [m["normalize"] for m in (meta, meta_2, meta_3)] == [True, True, False] and meta_2["adapter"] == "t2i"
    assert before["adapter"]["conv_in.weight"].abs().max() > 0.01
    assert all(torch.allclose(t, after["adapter"][name].float(), atol=2e-3) for name, t in before["adapter"].items())
    net = UperNet(20, **PRESETS["toy"].segmenter)
    load_segmenter([checkpoint], net, class_table("cityscapes"))
    assert net.normalize
    code, _, err = train_cli("--steps", 2, "--out", third, "--resume", *semseg)
    assert code == 2 and "normalize" in err
    code, _, err = train_cli("--steps", 2, "--out", third, "--resume", "--lr", 1e-4, "--batch", 1, "--seed", 5)
    told = [line for line in notes(err) if "its run had" in line]
    assert code == 0 and len(told) == 1
    assert all(words in told[0] for words in ("seed 0, now 5", "batch 2, now 1", "lr 0.001, now 0.0001"))


# -- own classes, plain segmenter, half precision --------------------------------------------------


@pytest.mark.parametrize("names", [["floor", "car"], [f"thing {i}" for i in range(171)]])
def test_own_classes_in_a_small_trial(names, toy_world, tmp_path):
    """--data FOLDER --preset toy: any number of own classes, by the commands that README names."""
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
        for i in range(2):
            picture = Image.fromarray(np.random.default_rng(i).integers(0, len(names), (64, 64), np.uint8))
            picture.convert("RGB" if kind == "images" else "L").save(tmp_path / kind / f"{i}.png")
    (tmp_path / "classes.txt").write_text("\n".join(names))
    base, run_ = ("--sd", toy_world / "toy.safetensors", "--device", "cpu"), tmp_path / "run"
    out = launch(train, "--data", tmp_path, "--preset", "toy", *base, "--steps", 1, "--batch", 2, "--out", run_)
    assert "mIoU" not in out                                        # the toy's judges know none of these classes
    launch(sample, "--layout", tmp_path / "labels/0.png", "--adapter", run_, *base, "--steps", 2, "--out", tmp_path)
    if "car" in names:          # the class that the toy knows, too, starts from its row, the rest at random
        D = torch.load(run_ / "checkpoint_0000001.pt", weights_only=True)["discriminator"]
        last = load_weights(toy_world / "toy.safetensors")["segmenter"]["decoder.conv_last.1.weight"].float()
        assert torch.allclose(D["decoder.conv_last.1.weight"][1], last[13], atol=1e-3)


def test_domain_generalisation_from_end_to_end(toy_world, tmp_path):
    """README's chain of commands on the toy written as Cityscapes' and ACDC's files."""
    write_toy(tmp_path / "city", "cityscapes", "train", 24)
    write_toy(tmp_path / "city", "cityscapes", "val", 4)
    write_toy(tmp_path / "acdc", "acdc", "val", 4, ("night",))
    night, run_, segmenter, dark = (tmp_path / "night", tmp_path / "run", tmp_path / "segmenter",
                                    f"cityscapes:night={tmp_path / 'acdc'}")
    real = ("--data", "cityscapes", "--root", tmp_path / "city", "--device", "cpu")
    model = (*real, "--sd", toy_world / "toy.safetensors")
    launch(train, *model, "--preset", "toy", "--steps", 1, "--eval", 0, "--batch", 4, "--ddim-steps", 4, "--out", run_)
    model = (*model, "--adapter", run_, "--steps", 2)
    for i in range(2):
        launch(sample, *model, "--layouts", "train", "--limit", 4, "--shard", f"{i}/2",
               "--prompts", "{caption}, night scene", "--out", night)
    out = launch(train, *real, "--train", "segmenter", "--preset", "toy", "--extra", night, "--mix", 0.25,
                 "--steps", 60, "--batch", 4, "--test", "cityscapes", dark, "--out", segmenter)
    results = json.loads((segmenter / "segmenter.json").read_text())
    assert list(results) == ["cityscapes", dark] and "road" in out
    assert results["cityscapes"]["mIoU"] > 0.1 and results["cityscapes"]["IoU"]["road"] > 0.3       # (random: 0.03)
    launch(sample, "--evaluate", *model, "--limit", 2, "--n", 1, "--judge", segmenter / "segmenter.safetensors",
           "--out", tmp_path / "judged")


def test_synthetic_images_are_mixed_in():
    """A share of each batch, equally from each folder; the labels go with their images."""
    sets = [Toy("train", (domain,), length=20, augment=False) for domain in ("day", "night", "fog")]
    args = SimpleNamespace(mix=0.5, batch=8, extra=["a", "b"], seed=0, workers=0, device="cpu")
    batch = next(train.mixed_stream(args, sets[0], sets[1:], 0))
    found = []
    for image, label in zip(batch["image"], batch["label"]):
        found += [domain for domain, toy in enumerate(sets) for i in range(20)
                  if torch.equal(image, toy[i]["image"]) and torch.equal(label, toy[i]["label"])]
    assert found == [0, 0, 0, 0, 1, 1, 2, 2]


def test_windows_cover_the_whole_image():
    """Logits of a net that looks at each pixel alone do not depend on the windows; all of the image is seen."""
    image = torch.randn(1, 3, 40, 100)
    for size in (16, 40, 64, 100):
        assert torch.allclose(disc.segment(lambda x: x * 2 + 1, image, size), image * 2 + 1, atol=1e-6)
    seen = []
    disc.segment(lambda x: seen.append(x.shape[2:]) or x, image, 32)
    assert set(seen) == {(32, 32)} and len(seen) == 2 * 6


@pytest.mark.parametrize("adapter", ["controlnet", "t2i", "oft", "freestyle"])
def test_half_precision(adapter, scene):
    """A step and a picture under bf16 autocast are those of fp32, roughly."""
    found = []
    for bf16 in False, True:
        model, D, opt_g, opt_d, batch = make_trainee(adapter)
        torch.manual_seed(0)
        losses = train.train_step(model, D, opt_g, opt_d, halves(batch)[:1], 5, setting(bf16=bf16, unroll=0))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            image = sample.generate(model, scene.label[:1], ["at night"], [0], steps=2, cfg=1.0)
        found.append((losses, image.astype(float)))
    (a, image), (b, half) = found
    assert a["dropped"] == b["dropped"] == 0
    a.pop("D_caught")                                             # a share of pixels: it jumps where two classes tie
    assert all(a[name].item() == pytest.approx(b[name].item(), rel=0.05, abs=0.02) for name in a)
    assert np.abs(image - half).mean() < 4                          # of 255


@pytest.mark.parametrize("adapter", ["controlnet", "t2i", "oft", "freestyle"])
def test_no_tensor_is_left_behind_on_the_cpu(adapter):
    """Fake CUDA tensors: mixed devices raise, and whatever must wait for the GPU within a step. (Without a driver there
    is no autocast and no way backwards.)"""
    model, D, *_ = make_trainee(adapter)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for module in [*model.modules(), *D.modules()]:
            for tensors in module._parameters, module._buffers:
                for name, t in tensors.items():
                    if t is not None:
                        t = torch.empty(t.shape, dtype=t.dtype, device="cuda")
                        tensors[name] = nn.Parameter(t, False) if tensors is module._parameters else t
        shapes = {"x0": (2, 16, 16, 16), "context": (2, 77, 96)}
        batch = {name: torch.empty(shape, device="cuda") for name, shape in shapes.items()}
        batch["label"] = torch.empty(2, 64, 64, dtype=torch.int64, device="cuda")
        train.generator_loss(model, D, batch, 5, setting(lazy=2))   # a noise step, and one on D's turn
        loss, _, fakes = train.generator_loss(model, D, batch, 5, setting())
        logits = D.train()(fakes)
        d_loss, _ = discriminator_loss(logits, logits, batch["label"], 0.1)
        assert loss.device.type == fakes.device.type == d_loss.device.type == "cuda"


def test_oft_is_built_on_a_unet_on_cuda():
    with FakeTensorMode():
        with torch.device("cuda"):
            unet = UNet(PRESETS["toy"].unet)
        OFT(unet, 96, (64, 48, 32)).attach(unet)


# -- bad input -------------------------------------------------------------------------------------


BAD_TRAINING = [     # arguments, words of the one line that says so
    ("--steps 0", "--steps", "from 1"), ("--lr nan", "--lr", "above 0"), ("--ramp 9", "--ramp"), ("--step 3", "--step"),
    ("--unroll 4 --ddim-steps 4", "--unroll 4", "below"), ("--size 63", "63", "multiples of 16"),
    ("--t-max 300 --ddim-steps 25 --unroll 9", "--t-max 300", "--unroll 9"), ("--device cuda:99", "no such CUDA"),
    ("--train segmenter --lr -1", "--lr", "above 0"), ("--train segmenter --extra FOLDER --mix 1", "--mix"),
    ("--train segmenter --extra OTHERS", "OTHERS", "classes"), ("--data toy", "--root", "toy"),
    ("--data toy --size 128", "128", "64x64"), ("--adapter oft --hint color", "--hint color", "oft"),
    ("--data nowhere", "nowhere", "toy, cityscapes"), ("--root NONE", "NONE", "leftImg8bit"),
    ("--data ade20k --root EMPTY", "EMPTY"), ("--root UNPAIRED", "without a label"),
    ("--captions TEXT", "TEXT", "JSON"), ("--sd NONE", "NONE", "no such"), ("--sd TEXT", "TEXT"),
    ("--sd ADAPTER", "ADAPTER"), ("--preset sd15 --size 64", "toy.safetensors"), ("--init TEXT", "TEXT"),
    ("--init ADAPTER --adapter t2i", "ADAPTER", "controlnet", "--adapter"), ("--init BASE", "BASE"),
    ("--init OTHER", "OTHER", "sd15", "--preset"), ("--segmenter SEVEN", "SEVEN", "7"),
    ("--class-embeddings TABLE", "TABLE", "[7, 96]", "[19, 96]"), ("--cache TEXT", "TEXT"),
    ("--cache CACHE", "CACHE", "another folder"), ("--out TEXT", "TEXT"), ("--out TEXT/out", "TEXT/out"),
    ("--out RUN", "RUN", "--resume"), ("--out RUN --resume --steps 1", "--steps 1"),
    ("--out RUN --resume --adapter t2i", "adapter", "t2i", "RUN"), ("--out RUN --resume --hint color", "hint", "color"),
    ("--out RUN --resume --train segmenter", "RUN", "another kind of training"),
    ("--init ADAPTER --hint color", "ADAPTER", "give --hint classes"),
    ("--adapter t2i --class-embeddings TABLE", "--class-embeddings"),
    ("--out RUN --resume --data FOLDER --root FOLDER", "dataset", "RUN"),
    ("--out EVILRUN --resume", "EVILRUN", "no checkpoint is whole")]


@pytest.fixture(scope="session")
def bad_files(toy_world, flags, tmp_path_factory):
    """{WORD: path} of what the cases name."""
    folder = tmp_path_factory.mktemp("bad")
    at = {word: folder / word for word in re.findall("[A-Z]+", " ".join(argv for argv, *_ in BAD_TRAINING))}
    for word in ("EMPTY", "CACHE", "EVILRUN"):
        at[word].mkdir()
    at["TEXT"].write_text("not what you think")
    (at["CACHE"] / "cache.txt").write_text("others")
    shutil.copytree(toy_world / "city", at["UNPAIRED"])
    next(at["UNPAIRED"].glob("gtFine/train/toy/*")).unlink()
    for word in ("FOLDER", "OTHERS"):
        write_toy(at[word], "path", "train", 2)
    (at["OTHERS"] / "classes.txt").write_text("\n".join(f"thing {i}" for i in range(20)))
    torch.save({"step": 1, "x": Evil(f"touch {folder}/executed")}, at["EVILRUN"] / "checkpoint_0000002.pt")
    model = ALDM(PRESETS["toy"], *load_frozen("toy", toy_world / "toy.safetensors")[:3], class_table("cityscapes"))
    meta = dict(preset="toy", dataset="cityscapes", names=model.classes.names, palette=model.classes.palette,
                adapter="controlnet", hint="classes", step=0)
    save_adapter(at["ADAPTER"], model, meta), save_adapter(at["OTHER"], model, {**meta, "preset": "sd15"})
    seven = UperNet(7, **PRESETS["toy"].segmenter).state_dict()
    torch.save({f"segmenter.{name}": t for name, t in seven.items()}, at["SEVEN"])
    torch.save(torch.zeros(7, 96), at["TABLE"])
    launch(train, *flags, "--out", at["RUN"], "--steps", 2)
    return {**at, "BASE": toy_world / "toy.safetensors"}


@pytest.mark.parametrize("argv,words", [(argv, words) for argv, *words in BAD_TRAINING])
def test_bad_input_is_one_line_and_writes_nothing(argv, words, bad_files, train_cli, tmp_path, monkeypatch):
    def put(text):
        return re.sub("[A-Z]{3,}", lambda word: str(bad_files.get(word[0], word[0])), text)

    def content():
        folder = bad_files["TEXT"].parent
        return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    monkeypatch.chdir(tmp_path)
    before = content()
    code, out, err = train_cli("--out", "out", *map(put, argv.split()))
    assert code == 2 and out == "" and err.startswith("train.py: "), (code, err)
    assert err.count("\n") == (3 if "UNPAIRED" in argv else 1) and all(put(word) in err for word in words), err
    assert files(tmp_path) == [] and content() == before                # an evil file is not executed, either


@pytest.mark.parametrize("flag", ["--out", "--root", "--cache", "--sd"])
def test_a_folder_without_permission(flag, train_cli, toy_world):
    aldm.byte_pairs()                                       # nobody may be unable to read open_clip's vocabulary
    with tempfile.TemporaryDirectory() as folder:           # (pytest's own folders are closed to all but their owner)
        shutil.copytree(toy_world, f"{folder}/world")
        closed = Path(folder, "closed", "inside")
        closed.mkdir(parents=True)
        subprocess.run(["chmod", "-R", "a+rwX", folder], check=True)
        closed.parent.chmod(0)
        user = os.geteuid()
        try:
            user or os.seteuid(65534)                       # root may do anything: be nobody
            code, _, err = train_cli("--root", f"{folder}/world/city", "--sd", f"{folder}/world/toy.safetensors",
                                     "--out", f"{folder}/out", flag, closed)
        finally:
            user or os.seteuid(0)
            closed.parent.chmod(0o755)
        assert code == 2 and err.count("\n") == 1 and str(closed) in err and "ermission denied" in err, err
        assert files(Path(folder)) == ["closed", "world"]


# -- the companion ---------------------------------------------------------------------------------


README = (HERE / "README.md").read_text()


def test_what_the_readme_names_is_there():
    links = re.findall(r"`(\w+)\.py:([\w.]+)`", README)
    assert len(links) >= 12
    for module, name in links:
        thing = sys.modules[module]
        for part in name.split("."):
            thing = getattr(thing, part)
    for file in re.findall(r"\((assets/[\w.]+)\)", README):
        assert (HERE / file).exists()
    assert len(README.encode()) <= 12 * 1024


def test_the_readme_commands(tmp_path, capsys):
    """Every flag in a command of README is one that the script has; the first sample is drawn."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S)).replace("\\\n", " ")
    commands = [line.partition(" #")[0] for line in blocks.splitlines()]
    told = {}
    for module in train, sample:
        with pytest.raises(SystemExit):
            module.parse_args(["--help"])
        told[f"{module.__name__}.py"] = capsys.readouterr().out
    for command in commands:
        for script, rest in re.findall(r"([\w/]+\.py)(.*)", command):
            for flag in re.findall(r"(?<=\s)--[\w-]+", rest):
                assert re.search(rf"{flag}\b", told[script]), f"{script} has no {flag}: {command}"
    first = next(command for command in commands if command.startswith("python sample.py --layout"))
    launch(sample, *shlex.split(first)[2:], "--steps", 2, "--device", "cpu", "--out", tmp_path)
    assert len(commands) > 8 and Image.open(tmp_path / "layout_1_0.png").size == (64, 64)


def test_the_readme_table_of_shapes():
    """The toy's and SD's shapes of the paper's symbols, by a dry run (on torch's meta device)."""
    cells = [[cell.strip() for cell in row.split("|")] for row in README.splitlines() if re.match(r"\| (\$|what)", row)]
    show = lambda x: " x ".join(map(str, x.shape[1:]))
    for preset, column in (PRESETS["toy"], 3), (PRESETS["sd15"], 4):
        with torch.device("meta"):
            unet, vae, text = UNet(preset.unet), VAE(preset.vae), TextEncoder(**preset.text)
            table, context = torch.empty(20, preset.text["width"]), torch.empty(1, 77, preset.text["width"])
            model = ALDM(preset, unet, vae, text, class_table("cityscapes"), table=table).to("meta")
            image, label = torch.empty(1, 3, preset.size, preset.size), torch.empty(1, preset.size, preset.size).long()
            x0, t = vae.encode(image), torch.empty(1).long()
            control = model.adapter.residuals(x0, t, context, model.encode_layout(label)["hint"])
            logits = UperNet(20, **preset.segmenter)(vae.decode(x0))
        assert {row[2]: row[column] for row in cells if "`" in row[2]} == {
            "`data.py:read_layout`": show(label), "`aldm.py:LayoutEncoder`": show(model.layout(label)),
            "`aldm.py:TextEncoder`": show(context), "`vae.py:VAE.encode`, `aldm.py:ALDM.eps`": show(x0),
            "`unet.py:ControlNet.residuals`": f"{len(control)} maps", "`vae.py:VAE.decode`": show(image),
            "`discriminator.py:UperNet`": show(logits)}

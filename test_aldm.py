"""The tests: golden files of independent implementations, analytic cases, invariances, and the command lines themselves.

    python -m pytest -q
"""
import ast
import base64
import copy
import csv
import functools
import hashlib
import http.client
import io
import json
import os
import pickle
import re
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
from aldm import (ALDM, JUDGE, PRESETS, Preset, Schedule, TextEncoder, atomic, load_class_embeddings, load_frozen,
                  load_into, load_segmenter, load_weights, read_adapter, save_adapter, save_base,
                  unrolled_adversarial_loss)
from data import (DOMAINS, IGNORE, InputError, Toy, class_table, colorize, open_dataset, read_layout, toy_scene,
                  write_toy)
from discriminator import Classifier, UperNet, discriminator_loss
from sample import BODY, painter
from unet import ControlNet, OFT, Rotation, T2IAdapter, UNet, UNetConfig, rectify
from vae import VAE, ResnetBlock, VAEConfig

HERE = Path(__file__).parent
SHARED = HERE.parent / "shared"
needs_shared = pytest.mark.skipif(not (SHARED / "golden").is_dir(), reason="the folder ../shared is not there")
torch.set_num_threads(2)


def run(*args, code=0, **kw):
    """Run a command line of ours -> stdout + stderr; it must end with this exit code."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=HERE, capture_output=True, text=True, **kw)
    text = done.stdout + done.stderr
    assert done.returncode == code, f"exit {done.returncode}, not {code}:\n{text[-3000:]}"
    return text


def relative(a, b):
    return float(np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b))


# -- golden files -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    sys.path.insert(0, str(SHARED / "golden"))
    import fill
    outputs = np.load(SHARED / "golden" / "small.npz")
    return SimpleNamespace(want=lambda name: outputs[name], fill=fill.fill_,
                           draw=lambda name, shape: torch.from_numpy(fill.draw("input/" + name, shape)))


def filled(module, golden, prefix):
    golden.fill({prefix + name: t for name, t in module.state_dict().items()})
    return module.eval()


SMALL = UNetConfig(model_channels=32, context_dim=64)


@needs_shared
@torch.no_grad()
def test_golden_unet(golden):
    x, t, context = golden.draw("unet.x", (3, 4, 16, 24)), torch.tensor([1, 481, 961]), golden.draw("unet.context", (3, 77, 64))
    unet = filled(UNet(SMALL), golden, "model.diffusion_model.")
    control = filled(ControlNet(SMALL, 64, (64, 48, 32)), golden, "control_model.")
    residuals = control(x, t, context, golden.draw("control.hint", (3, 64, 32, 48)))
    assert len(residuals) == 13
    assert relative(unet(x, t, context), golden.want("unet.eps")) < 1e-4
    for i, residual in enumerate(residuals):
        assert relative(residual, golden.want(f"control.{i}")) < 1e-4
    assert relative(unet(x, t, context, residuals), golden.want("control.eps")) < 1e-4
    drawn = [0.3 * golden.draw(f"unet.control{i}", r.shape) for i, r in enumerate(residuals)]
    assert relative(unet(x, t, context, drawn), golden.want("unet.eps_with_control")) < 1e-4


@needs_shared
@torch.no_grad()
def test_golden_vae(golden):
    vae = filled(VAE(VAEConfig(ch=32)), golden, "first_stage_model.")
    image = golden.draw("vae.image", (2, 3, 64, 96)).clamp(-1, 1)
    mean, logvar = vae.moments(image)
    assert relative(mean, golden.want("vae.mean")) < 1e-4 and relative(logvar, golden.want("vae.logvar")) < 1e-4
    assert relative(vae.decode(golden.draw("vae.z", (2, 4, 8, 12))), golden.want("vae.decoded")) < 1e-4
    assert torch.equal(vae.encode(image), mean * 0.18215)


@needs_shared
@torch.no_grad()
def test_golden_text(golden):
    """Our encoder from Hugging Face's tensors; the ids are CLIP's, padded with END as Stable Diffusion pads."""
    names = json.loads((SHARED / "sd15_format.json").read_text())["text_small"]
    state = golden.fill({name: torch.zeros(shape) for name, shape in names.items()})
    text = TextEncoder(64, 2, 4)
    text.load_state_dict(aldm.text_from_huggingface(state))
    ids = torch.from_numpy(golden.want("text.ids"))
    assert relative(text(ids), golden.want("text.hidden")) < 1e-4
    assert torch.equal(text.tokenize([""])[0], ids[0])
    end = (ids == TextEncoder.END).int().argmax(1)
    assert relative(text.pooled(ids), golden.want("text.hidden")[np.arange(len(ids)), end]) < 1e-4


@needs_shared
@torch.no_grad()
def test_golden_segmenter(golden):
    segmenter = filled(disc.UperNet(20, layers=(1, 1, 2, 1)), golden, "segmenter.segmenter.")
    assert relative(segmenter(golden.draw("seg.image", (2, 3, 64, 96)).clamp(-1, 1)), golden.want("seg.logits")) < 1e-4


@needs_shared
def test_golden_ddim(golden):
    schedule, x, eps = Schedule(), golden.draw("ddim.x", (1, 4, 8, 8)), golden.draw("ddim.eps", (1, 4, 8, 8))
    assert relative(schedule.alphas_cumprod, golden.want("ddim.alphas_cumprod")) < 1e-4
    timesteps = schedule.ddim_timesteps(25).tolist()
    assert timesteps == golden.want("ddim.timesteps").tolist()[::-1]
    for t in (961, 481, 1):
        previous = timesteps[timesteps.index(t) - 1] if t > 1 else -1
        assert relative(schedule.predict_x0(x, t, eps), golden.want(f"ddim.x0.{t}")) < 1e-4
        assert relative(schedule.ddim_step(x, eps, t, previous), golden.want(f"ddim.prev.{t}")) < 1e-4


# -- diffusion --------------------------------------------------------------------------------------------------------


def test_ddim_with_the_true_eps_returns_x0():
    schedule, x0, noise = Schedule(), torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    timesteps = schedule.ddim_timesteps(25).tolist()
    x = schedule.add_noise(x0, torch.tensor([961, 961]), noise)
    for t, previous in zip(timesteps[::-1], timesteps[-2::-1] + [-1]):
        a = schedule.a(t)
        eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
        assert torch.allclose(schedule.predict_x0(x, t, eps), x0, atol=1e-4)
        x = schedule.ddim_step(x, eps, t, previous)
    a0 = schedule.alphas_cumprod[0]
    assert torch.allclose(x, a0.sqrt() * x0 + (1 - a0).sqrt() * noise, atol=1e-4)   # the chain ends at a_0, not at 1


def test_ddim_with_noise_has_the_right_variance():
    """eta = 1: from x_t ~ q(x_t | x0) a step leads to q(x_s | x0), whose variance is 1 - a_s."""
    torch.manual_seed(0)
    schedule, x0 = Schedule(), torch.zeros(200, 4, 16, 16)
    noise = torch.randn_like(x0)
    x = schedule.ddim_step(schedule.add_noise(x0, torch.tensor(800), noise), noise, 800, 400, eta=1.0)
    assert abs(x.var().item() / (1 - schedule.alphas_cumprod[400].item()) - 1) < 0.02


@pytest.mark.parametrize("steps", [1, 7, 25, 30, 999, 1000])
def test_ddim_timesteps(steps):
    t = Schedule().ddim_timesteps(steps)
    assert len(t) == steps and t.min() >= 1 and t.max() <= 999 and (t.diff() >= 0).all()


# -- losses -----------------------------------------------------------------------------------------------------------


def numpy_balanced(logits, label):
    """The class-balanced cross-entropy's map, pixel by pixel, straight from DESIGN's formula."""
    B, C, H, W = logits.shape
    n_valid, classes = (label != 255).sum(), [c for c in range(C) if (label == c).any()]
    out = np.zeros((B, H, W))
    for b, i, j in np.ndindex(B, H, W):
        c = label[b, i, j]
        if c != 255:
            z = logits[b, :, i, j].astype(np.float64)
            ce = np.log(np.exp(z - z.max()).sum()) + z.max() - z[c]
            out[b, i, j] = ce * n_valid / ((label == c).sum() * len(classes) * C)
    return out


def random_case(seed=0, C=5, void=0.2):
    rng = np.random.default_rng(seed)
    label = rng.choice([0, 0, 0, 2, 3], size=(2, 6, 7))             # class 1 is absent, 4 is "fake"
    label[rng.random(label.shape) < void] = 255
    return rng.standard_normal((2, C, 6, 7)).astype(np.float32) * 3, label


def test_losses_against_numpy():
    logits, label = random_case()
    fake = random_case(1)[0]
    want = numpy_balanced(logits, label)
    real, y = torch.from_numpy(logits), torch.from_numpy(label)
    assert np.allclose(disc.layout_loss_map(real, y), want, rtol=1e-5)
    per_class = [-(torch.log_softmax(real, 1)[:, c][y == c]).mean().item() for c in (0, 2, 3)]
    assert np.isclose(disc.per_valid_pixel(disc.layout_loss_map(real, y), y).item(), np.mean(per_class) / 5, rtol=1e-5)
    loss, parts = disc.discriminator_loss(real, torch.from_numpy(fake), y, 0.25)
    z = fake.astype(np.float64)
    want_fake = (np.log(np.exp(z).sum(1)) - z[:, 4]).mean()          # every pixel, void or not, should be class N
    assert np.isclose(parts["real"].item(), want.sum() / (label != 255).sum(), rtol=1e-5)
    assert np.isclose(parts["fake"].item(), want_fake, rtol=1e-5)
    assert np.isclose(loss.item(), parts["real"].item() + 0.25 * want_fake, rtol=1e-5)


def test_losses_of_a_layout_that_is_all_void():
    logits, label = torch.randn(1, 5, 4, 4, requires_grad=True), torch.full((1, 4, 4), 255)
    loss, _ = disc.discriminator_loss(logits, torch.zeros(1, 5, 4, 4), label, 0.0)
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def test_mean_iou_by_hand():
    label, pred = torch.tensor([0, 0, 0, 1, 1, 255]), torch.tensor([0, 0, 1, 1, 0, 1])
    confusion = disc.confusion_matrix(pred, label, 3)
    assert confusion.tolist() == [[2, 1, 0], [1, 1, 0], [0, 0, 0]]
    miou, iou = disc.mean_iou(confusion)
    assert np.isclose(miou, (2 / 4 + 1 / 3) / 2) and torch.isnan(iou[2])


# -- the unrolled objective (Sec. 3.2) --------------------------------------------------------------------------------


class OneParameter(nn.Module):
    """eps_theta = theta x_t, the "decoder" passes three channels on."""

    def __init__(self, theta=0.3):
        super().__init__()
        self.theta, self.schedule = nn.Parameter(torch.tensor(theta, dtype=torch.float64)), Schedule().double()
        self.vae = SimpleNamespace(decode=lambda z: z[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3))

    def eps(self, x_t, t, context, layout):
        return self.theta * x_t


class ColourJudge(nn.Module):
    """Logits linear in the pixel's colour."""

    def forward(self, image):
        w = torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3)
        return torch.einsum("nc,bchw->bnhw", w, image.double())


def unrolled(grad, K=3, **kw):
    torch.manual_seed(0)
    model, label = OneParameter(), torch.from_numpy(random_case(void=0.3)[1])[:, :6, :6]
    x_t, start = torch.randn(2, 4, 3, 3, dtype=torch.float64) * 0.1, torch.tensor([5, 9])
    timesteps = model.schedule.ddim_timesteps(25)
    eps = model.eps(x_t, timesteps[start], None, None)
    loss, images = unrolled_adversarial_loss(model, ColourJudge(), x_t, eps, start, timesteps, label, None, None, K, grad, **kw)
    loss.backward()
    return model, label, x_t, start, timesteps, loss.item(), model.theta.grad.item(), images


def reference_maps(theta, mode, label, x_t, start, timesteps, K):
    """The K+1 loss maps, computed one by one, and what gradient each may carry."""
    model, judge, maps = OneParameter(), ColourJudge(), []
    s = model.schedule
    for k in range(K + 1):
        t, th = timesteps[start - k], theta if mode != "first" or k == 0 else theta.detach()
        eps = th * x_t
        a = s.alphas_cumprod[t].view(-1, 1, 1, 1)
        x0 = (x_t - (1 - a).sqrt() * eps) / a.sqrt()
        image = model.vae.decode(x0).clamp(-1, 1)
        maps.append(disc.layout_loss_map(judge(image), label))
        if k < K:
            b = s.alphas_cumprod[timesteps[start - k - 1]].view(-1, 1, 1, 1)
            x_t = b.sqrt() * x0 + (1 - b).sqrt() * eps
            if mode != "full":
                x_t = x_t.detach()
    return torch.stack(maps)


@pytest.mark.parametrize("mode", ["first", "each", "full"])
def test_gradient_modes_do_what_they_say(mode):
    K = 3
    _, label, x_t, start, timesteps, value, gradient, images = unrolled(mode)
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    maps, n_valid = reference_maps(theta, mode, label, x_t, start, timesteps, K), (label != 255).sum()
    want_value = maps.mean(0).sum() / n_valid
    if mode == "first":     # L_0 / stop(L_0) * stop(mean_k L_k)
        L0, mean = maps[0], maps.mean(0).detach()
        (L0 / L0.detach().where(L0 != 0, 1) * mean).sum().div(n_valid).backward()
    else:
        want_value.backward()
    assert np.isclose(value, want_value.item(), rtol=1e-6)
    assert np.isclose(gradient, theta.grad.item(), rtol=1e-4)
    assert images.shape == (2, 3, 6, 6) and not images.requires_grad


def test_gradient_modes_agree_in_value_and_differ_in_gradient():
    runs = {mode: unrolled(mode) for mode in ("first", "each", "full")}
    values, gradients = ([run[i] for run in runs.values()] for i in (5, 6))
    assert np.allclose(values, values[0], rtol=1e-6)
    assert len({round(g, 8) for g in gradients}) == 3
    assert np.isclose(*(unrolled(mode, K=0)[6] for mode in ("first", "full")))     # one estimate: nothing to differ in


@pytest.mark.parametrize("mode", ["first", "each", "full"])
def test_groups_of_estimates_change_nothing(mode):
    plain, lean = unrolled(mode), unrolled(mode, group=2)
    assert np.isclose(plain[5], lean[5], rtol=1e-6) and np.isclose(plain[6], lean[6], rtol=1e-6)


# -- the toy's networks with random weights ---------------------------------------------------------------------------


def tiny_model(adapter="controlnet", hint="classes", seed=0):
    torch.manual_seed(seed)
    preset = PRESETS["toy"]
    text = TextEncoder(**preset.text)
    return ALDM(preset, UNet(preset.unet), VAE(preset.vae), text, data.class_table("toy"), adapter, hint)


@pytest.fixture(scope="module")
def scene():
    torch.manual_seed(1)
    label = torch.stack([torch.from_numpy(data.toy_scene(i)[1]).long() for i in range(2)])
    return SimpleNamespace(label=label, x=torch.randn(2, 16, 16, 16), t=torch.tensor([1, 700]), words=["a street", "at night"])


ADAPTERS = [("controlnet", "classes"), ("controlnet", "color"), ("t2i", "color"), ("oft", "classes")]


@pytest.mark.parametrize("adapter,hint", ADAPTERS)
@torch.no_grad()
def test_a_fresh_adapter_is_an_identity(adapter, hint, scene):
    model, base = tiny_model(adapter, hint), tiny_model("freestyle").unet
    context = model.text.encode(scene.words)
    assert torch.allclose(model.eps(scene.x, scene.t, scene.words, scene.label), base(scene.x, scene.t, context), atol=1e-5)


def changed_by_a_step(model, scene):
    """One AdamW step on everything that may carry gradient -> names of the tensors that changed."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt = torch.optim.AdamW([p for p in model.adapter.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):          # zero convolutions: what lies behind them moves in the second step
        F.mse_loss(model.eps(scene.x, scene.t, scene.words, scene.label), scene.x * 0.5).backward()
        for name, p in model.named_parameters():
            assert p.requires_grad or p.grad is None, name
        opt.step()
        opt.zero_grad()
    return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


@pytest.mark.parametrize("adapter,hint", ADAPTERS + [("freestyle", "classes")])
def test_gradient_reaches_exactly_the_adapter(adapter, hint, scene):
    model = tiny_model(adapter, hint)
    trained = {id(p) for p in model.adapter.parameters()}
    mine = {n for n, p in model.named_parameters() if id(p) in trained}
    changed = changed_by_a_step(model, scene)
    assert changed <= mine
    silent = {n for n in mine - changed if ".norm" not in n}
    assert len(silent) <= 0.02 * len(mine), silent      # (nothing but what does not matter may stand still)


def test_the_encoder_half_has_no_graph(scene):
    model = tiny_model()
    seen = []
    for block in [*model.unet.input_blocks, model.unet.middle_block]:
        block.register_forward_hook(lambda m, i, o: seen.append(o.requires_grad))
    assert model.eps(scene.x, scene.t, scene.words, scene.label).requires_grad and not any(seen) and len(seen) > 5


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


def test_rectified_attention_keeps_classes_apart(scene):
    """Changing the words of one class changes nothing in the attention's output at pixels of another."""
    label = torch.tensor([[[0, 0, 1, 255]]])
    token_class = torch.full((1, 77), -1)
    token_class[0, 1], token_class[0, 2] = 0, 1
    mask = rectify(label, token_class)
    assert mask[0, :, 0, 0].nonzero()[:, 0].tolist() == [0, 1] and mask[0, :, 0, 2].nonzero()[:, 0].tolist() == [0, 2]
    assert mask[0, :, 0, 3].nonzero()[:, 0].tolist() == [0]
    model = tiny_model("freestyle")
    layout = model.encode_layout(scene.label)
    assert layout["mask"].shape == (2, 77, 16, 16) and layout["mask"].any(1).all()


def test_class_hint_folded_with_its_table(scene):
    """A one-hot layout through the folded first convolution = the map of class embeddings through the plain one."""
    model = tiny_model()
    model.layout.average = False
    nn.init.normal_(model.adapter.input_hint_block[-1].weight)
    onehot = model.layout(scene.label)
    hint = torch.einsum("bnhw,nc->bchw", onehot, model.layout.table)
    small = scene.label[:, ::2, ::2]
    assert torch.equal(hint, model.layout.table[small.where(small != 255, 19)].permute(0, 3, 1, 2))   # subsample, look up
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
    assert torch.allclose(model.sample(label, context, uncond, steps=2, cfg=3.0, noise=noise), x, atol=1e-4)


# -- weight files -----------------------------------------------------------------------------------------------------


SMALL_PRESET = Preset(UNetConfig(model_channels=32, context_dim=64), VAEConfig(ch=32), dict(width=64, layers=2, heads=4),
               dict(layers=(1, 1, 2, 1), width=8, fpn_dim=16), (64, 48, 32), 512, False, False)


@functools.cache
def names_and_shapes():
    if not (SHARED / "sd15_format.json").exists():
        pytest.skip("sd15_format.json is not here")
    return json.loads((SHARED / "sd15_format.json").read_text())


def draw(shapes, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randint(0, 9, s, generator=g) if n.endswith("num_batches_tracked")
            else (0.1 * torch.randn(s, generator=g)).to(dtype) for n, s in shapes.items()}


def shapes_of(module, prefix=""):
    return {prefix + n: list(t.shape) for n, t in module.state_dict().items()}


@functools.cache
def small_shapes():
    """Names and shapes of a Stable Diffusion file in the small configuration."""
    f = names_and_shapes()
    return f["unet_small"] | f["vae_small"] | f["text_small"]


@functools.cache
def small_file(dtype=torch.float32):
    return draw(small_shapes(), dtype=dtype)


def same(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def cut(tensors, prefix):
    return {n[len(prefix):]: t for n, t in tensors.items() if n.startswith(prefix)}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(PRESETS, "small", SMALL_PRESET)


def refuses(call, *words):
    with pytest.raises(InputError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text
    return text


# the formats

def test_full_size_names_load_strictly(monkeypatch):
    everything = {n: torch.empty(s, device="meta") for part in ("unet", "vae", "text", "control", "segmenter")
                  for n, s in names_and_shapes()[part].items()}
    assert len(everything) == 686 + 248 + 196 + 334 + 1064
    passed_over = ("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_one_minus_alphas_cumprod", "logvar",
                   "model_ema.decay", "cond_stage_model.transformer.text_model.embeddings.position_ids")
    everything |= {n: torch.empty(7, device="meta") for n in passed_over}
    monkeypatch.setattr(aldm, "read_file", lambda path: (everything, {}))
    parts = load_weights("sd.safetensors")
    assert set(parts) == {"unet", "vae", "text", "control", "segmenter"}
    with torch.device("meta"):
        nets = dict(unet=UNet(), vae=VAE(), text=TextEncoder(), control=ControlNet(), segmenter=UperNet(20))
    for part, net in nets.items():
        load_into(net, parts[part], part, "meta", torch.float16)
        assert all(p.dtype == torch.float16 for p in net.parameters())
    unet, vae, text, rest = load_frozen("sd15", "sd.safetensors", "meta", torch.bfloat16)
    assert unet.out[2].weight.dtype == torch.bfloat16 and vae.quant_conv.weight.dtype == torch.float32
    assert set(rest) == {"control", "segmenter"}
    monkeypatch.setattr(aldm, "read_file", lambda path: ({n: everything[n] for n in names_and_shapes()["control"]}, {}))
    assert read_adapter("x")[0]["hint"] == "classes"


@pytest.mark.parametrize("kind, dtype", [("safetensors", torch.float16), ("safetensors", torch.float32),
                                         ("zip", torch.float16), ("bare zip", torch.float32),
                                         ("legacy", torch.float32)])
def test_sd_single_file(tmp_path, small, kind, dtype):
    tensors, path = small_file(dtype), tmp_path / ("sd.safetensors" if kind == "safetensors" else "sd.ckpt")
    if kind == "safetensors":
        save_file(tensors, path, {"format": "pt"})
    else:
        checkpoint = {"state_dict": tensors, "epoch": 3, "optimizer_states": [{"state": {}}]}
        torch.save(tensors if kind == "bare zip" else checkpoint, path,
                   _use_new_zipfile_serialization=kind != "legacy")
    parts = load_weights(path)
    assert set(parts) == {"unet", "vae", "text"}
    assert same(parts["unet"], cut(tensors, "model.diffusion_model."))
    assert same(parts["vae"], cut(tensors, "first_stage_model."))
    hf = cut(tensors, "cond_stage_model.transformer.text_model.")
    layer = "encoder.layers.1.self_attn."
    fused = torch.cat([hf[f"{layer}{p}_proj.bias"] for p in "qkv"])
    assert torch.equal(parts["text"]["transformer.resblocks.1.attn.in_proj_bias"], fused)
    projection = parts["text"]["transformer.resblocks.0.mlp.c_proj.weight"]
    assert torch.equal(projection, hf["encoder.layers.0.mlp.fc2.weight"])
    assert torch.equal(parts["text"]["positional_embedding"], hf["embeddings.position_embedding.weight"])
    if kind != "legacy" and sys.platform == "linux":
        assert str(path) in Path("/proc/self/maps").read_text()     # memory-mapped
    unet, vae, text, rest = load_frozen("small", path, "cpu", dtype)
    assert rest == {} and same(unet.state_dict(), parts["unet"])
    assert same(vae.state_dict(), {n: t.float() for n, t in parts["vae"].items()})
    assert same(text.state_dict(), {n: text.state_dict()[n] for n in parts["text"]})
    fresh = TextEncoder(**SMALL_PRESET.text)
    assert torch.equal(text.attn_mask, fresh.attn_mask)
    load_into(fresh, parts["text"], "text")
    ids = text.tokenize(["a street", ""])
    with torch.no_grad():
        assert torch.equal(text(ids), fresh(ids))
        unet(torch.zeros(1, 4, 8, 8, dtype=dtype), torch.tensor([1]), torch.zeros(1, 77, 64, dtype=dtype))


def test_averaged_weights_are_preferred_and_leftovers_passed_over(tmp_path):
    tensors = dict(small_file())
    names = [n for n in tensors if n.startswith("model.diffusion_model.")]
    ema = {n: torch.randn(tensors[n].shape) for n in names}
    tensors |= {"model_ema." + n[len("model."):].replace(".", ""): t for n, t in ema.items()}
    clip = "cond_stage_model.transformer."
    tensors |= {n: torch.rand(9) for n in (
        "model_ema.decay", "model_ema.num_updates", "betas", "alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "logvar",
        "first_stage_model.loss.logvar", clip + "text_projection.weight", clip + "text_model.embeddings.position_ids")}
    torch.save({"state_dict": tensors, "global_step": 7}, tmp_path / "full.ckpt")
    parts = load_weights(tmp_path / "full.ckpt")
    assert same(parts["unet"], cut(ema, "model.diffusion_model."))
    assert set(parts) == {"unet", "vae", "text"}
    assert {part: len(state) for part, state in parts.items()} == {"unet": 686, "vae": 248, "text": 28}


def test_lightning_leftovers_are_neither_imported_nor_a_hindrance(tmp_path):
    package = "pytorch_lightning.callbacks.model_checkpoint"
    modules = {package[:i]: types.ModuleType(package[:i]) for i in (17, 27, len(package))}
    saved = {name: sys.modules.get(name) for name in modules}
    Callback = type("ModelCheckpoint", (), {"__module__": package})
    modules[package].ModelCheckpoint = Callback
    sys.modules.update(modules)
    try:
        callbacks = {Callback: {"best_model_path": "x"}, "object": Callback()}
        torch.save({"state_dict": small_file(), "callbacks": callbacks}, tmp_path / "a.ckpt")
    finally:
        for name in modules:
            sys.modules.pop(name)
            if saved[name]:
                sys.modules[name] = saved[name]
    assert set(load_weights(tmp_path / "a.ckpt")) == {"unet", "vae", "text"}
    assert package not in sys.modules and not any("Ignored" in str(g) for g in torch.serialization.get_safe_globals())


def test_controlnet_files(tmp_path):
    classes = cut(draw(names_and_shapes()["control_small"], 1), "control_model.")
    colors = draw(shapes_of(ControlNet(SMALL_PRESET.unet, 3)), 2)
    for state, hint in ((classes, "classes"), (colors, "color")):
        for prefix in ("", "control_model."):
            save_file({prefix + n: t for n, t in state.items()}, tmp_path / "c.safetensors")
            torch.save({prefix + n: t for n, t in state.items()}, tmp_path / "c.pth")
            for name in ("c.safetensors", "c.pth"):
                meta, parts = read_adapter(tmp_path / name)
                assert set(parts) == {"control", "adapter"}
                assert same(parts["control"], state) and same(parts["adapter"], state)
                assert [meta[k] for k in ("adapter", "hint", "dataset", "step")] == ["controlnet", hint, None, None]
    path = tmp_path / "control_sd15_seg.pth"                           # the first ControlNets came with the whole model
    torch.save({**small_file(), **{"control_model." + n: t for n, t in colors.items()}}, path)
    meta, parts = read_adapter(path)
    assert meta["adapter"] == "controlnet" and meta["hint"] == "color" and same(parts["control"], colors)
    control = ControlNet(SMALL_PRESET.unet, 3)
    load_into(control, parts["control"], "control")
    assert same(control.state_dict(), colors)


@pytest.mark.parametrize("outputs, dataset", [(20, "cityscapes"), (151, "ade20k"), (172, None)])
def test_official_aldm_checkpoint(tmp_path, small, outputs, dataset):
    judge = UperNet(outputs, **SMALL_PRESET.segmenter)
    segmenter = draw(shapes_of(judge), 3)
    leftovers = {n.replace("running_mean", "_tmp_running_mean"): t for n, t in segmenter.items() if "running_mean" in n}
    leftovers |= {n.replace("running_mean", "_running_iter"): torch.ones(1) for n in segmenter if "running_mean" in n}
    control = draw(names_and_shapes()["control_small"], 4)
    judged = {"segmenter.segmenter." + n: t for n, t in (segmenter | leftovers).items()}
    torch.save({"state_dict": {**small_file(), **control, **judged}}, tmp_path / "step9.ckpt")
    meta, parts = read_adapter(tmp_path / "step9.ckpt")
    assert set(parts) == {"unet", "vae", "text", "control", "segmenter", "adapter"}
    assert same(parts["segmenter"], segmenter)
    assert meta["dataset"] == dataset and meta["adapter"] == "controlnet" and meta["hint"] == "classes"
    assert same(parts["control"], cut(control, "control_model."))
    assert meta["names"] == (list(class_table(dataset).names) if dataset else None)
    if dataset:
        classes = class_table(dataset)
        assert load_segmenter(tmp_path / "step9.ckpt", judge, classes) == outputs
        assert same(judge.state_dict(), segmenter)
    rest = load_frozen("small", tmp_path / "step9.ckpt")[3]             # it is a base model, too
    assert set(rest) == {"control", "segmenter"}


def test_t2i_adapter_file(tmp_path):
    state = draw(shapes_of(T2IAdapter(SMALL_PRESET.unet)))
    torch.save(state, tmp_path / "t2iadapter_seg_sd14v1.pth")
    meta, parts = read_adapter(tmp_path / "t2iadapter_seg_sd14v1.pth")
    assert (meta["adapter"], meta["hint"]) == ("t2i", "color") and same(parts["adapter"], state)


# the segmenter

def semseg_files(folder, outputs=150, legacy=True, extra=()):
    """mit-semseg's pair of files, as its synchronised batch norm left them."""
    state = draw(shapes_of(UperNet(outputs, **SMALL_PRESET.segmenter)), 5)
    state |= {n.replace("running_var", "_tmp_running_var"): t for n, t in state.items() if "running_var" in n}
    state |= {n: torch.zeros(2) for n in extra}
    paths = folder / "encoder_epoch_50.pth", folder / "decoder_epoch_50.pth"
    for path, part in zip(paths, ("encoder.", "decoder.")):
        torch.save(cut(state, part), path, _use_new_zipfile_serialization=not legacy)
    return paths, state


@pytest.mark.parametrize("key", ["cityscapes", "ade20k", "coco", "toy"])
def test_ade20k_segmenter_starts_every_class_from_its_nearest(tmp_path, key):
    (encoder, decoder), state = semseg_files(tmp_path, legacy=key != "coco")
    classes, ade = class_table(key), class_table("ade20k").names
    judge = UperNet(len(classes.names) + 1, **SMALL_PRESET.segmenter)
    before = judge.decoder.conv_last[1].weight.detach().clone()
    n = load_segmenter([encoder, decoder], judge, classes)
    last = judge.decoder.conv_last[1].weight.detach()
    assert torch.equal(judge.encoder.layer3[1].bn2.running_var, state["encoder.layer3.1.bn2.running_var"])
    for i, name in enumerate(classes.ade):
        row = i if key == "ade20k" else ade.index(name) if name else None    # (ADE20K has two classes named screen)
        assert torch.equal(last[i], before[i] if row is None else state["decoder.conv_last.1.weight"][row])
        assert row is None or judge.decoder.conv_last[1].bias[i] == state["decoder.conv_last.1.bias"][row]
    assert torch.equal(last[-1], before[-1])                                 # fake
    assert n == sum(name is not None for name in classes.ade) and n > 0.7 * len(classes.names)
    assert load_segmenter([encoder, decoder], UperNet(len(classes.names), **SMALL_PRESET.segmenter), classes) == n


def test_segmenter_of_the_same_classes_is_taken_whole(tmp_path):
    classes, judge = class_table("cityscapes"), UperNet(20, **SMALL_PRESET.segmenter)
    fake = judge.decoder.conv_last[1].weight[-1].detach().clone()
    nineteen = draw(shapes_of(UperNet(19, **SMALL_PRESET.segmenter)))
    assert load_segmenter(nineteen, judge, classes) == 19
    assert torch.equal(judge.decoder.conv_last[1].weight[:19], nineteen["decoder.conv_last.1.weight"])
    assert torch.equal(judge.decoder.conv_last[1].weight[19], fake)
    twenty = draw(shapes_of(UperNet(20, **SMALL_PRESET.segmenter)), 9)
    assert load_segmenter(twenty, judge, classes) == 20 and same(judge.state_dict(), twenty)
    plain = UperNet(19, **SMALL_PRESET.segmenter)                                   # a judge, which knows no fakes
    assert load_segmenter(twenty, plain, classes) == 19
    assert torch.equal(plain.decoder.conv_last[1].bias, twenty["decoder.conv_last.1.bias"][:19])
    coco = UperNet(172, **SMALL_PRESET.segmenter)                                   # ADE20K's discriminator for other classes
    old = draw(shapes_of(UperNet(151, **SMALL_PRESET.segmenter)), 9)
    assert load_segmenter(old, coco, class_table("coco")) == sum(n is not None for n in class_table("coco").ade) + 1
    assert torch.equal(coco.decoder.conv_last[1].weight[-1], old["decoder.conv_last.1.weight"][-1])


def test_segmenter_that_does_not_fit(tmp_path):
    classes, judge = class_table("cityscapes"), UperNet(20, **SMALL_PRESET.segmenter)
    (encoder, decoder), state = semseg_files(tmp_path, extra=["decoder.conv_last_deepsup.weight"])
    refuses(lambda: load_segmenter([encoder, decoder], judge, classes),
            "unexpected: 1 (decoder.conv_last_deepsup.weight)")
    refuses(lambda: load_segmenter(encoder, judge, classes), "missing", "decoder.ppm_conv.0.0.weight")
    refuses(lambda: load_segmenter([encoder, encoder], judge, classes), "missing", "decoder.ppm_conv.0.0.weight")
    refuses(lambda: load_segmenter(draw(shapes_of(UperNet(33, **SMALL_PRESET.segmenter))), judge, classes), "33 classes", "19")
    (encoder, decoder), _ = semseg_files(tmp_path)
    refuses(lambda: load_segmenter([encoder, decoder], UperNet(20, (1, 1, 2, 1), 8, 24), classes), "of another shape")
    save_file(small_file(), tmp_path / "sd.safetensors")
    refuses(lambda: load_segmenter(tmp_path / "sd.safetensors", judge, classes), "missing", "encoder.conv1.weight")


# our own files

@pytest.mark.parametrize("kind", ["controlnet", "controlnet color", "t2i", "oft", "freestyle"])
def test_adapter_round_trip(tmp_path, small, kind):
    kind, _, hint = kind.partition(" ")
    save_file(small_file(), tmp_path / "sd.safetensors")
    classes, nets = class_table("toy"), load_frozen("small", tmp_path / "sd.safetensors")[:3]
    model = ALDM(SMALL_PRESET, *nets, classes, kind, hint or "classes")
    with torch.no_grad():
        for p in model.adapter.parameters():
            p.normal_(std=0.1)
    meta = dict(preset="small", dataset="toy", names=list(classes.names), palette=classes.palette, adapter=kind,
                hint=model.layout.kind, step=12)
    path = tmp_path / "run" / "adapter.safetensors"
    path.parent.mkdir()
    save_adapter(path, model, meta)
    torch.save({"step": 12, "meta": {**meta, "palette": classes.palette.tolist()},
                "adapter": model.adapter.state_dict(), "layout": model.layout.state_dict(),
                "discriminator": UperNet(20, **SMALL_PRESET.segmenter).state_dict(),
                "opt_g": {"state": {0: {"exp_avg": torch.zeros(3)}}}}, tmp_path / "run" / "checkpoint_0000012.pt")
    prefix = {"controlnet": "control_model.", "t2i": "", "oft": "adapter.", "freestyle": "model.diffusion_model."}[kind]
    assert set(load_file(path)) == {prefix + n for n in model.adapter.state_dict()} | {"layout.table"}
    for file in (path, path.parent, path.parent / "checkpoint_0000012.pt"):
        found, parts = read_adapter(file)
        for key, value in meta.items():
            assert found[key] == (value.tolist() if key == "palette" else value), key
        assert same(parts["adapter"], {n: t.detach() for n, t in model.adapter.state_dict().items()})
        assert torch.equal(parts["layout"]["table"], model.layout.table)
        assert ("segmenter" in parts) == (file.suffix == ".pt")
    other = ALDM(SMALL_PRESET, *load_frozen("small", tmp_path / "sd.safetensors")[:3], classes, kind, hint or "classes")
    load_into(other.adapter, parts["adapter"], "adapter", "cpu", torch.float32)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([481])
    label = torch.randint(0, 19, (1, 64, 64))
    with torch.no_grad():       # in place: OFT's rotations are shared with the UNet
        eps = model.eps(x, t, ["a car"], label)
        assert eps.isfinite().all() and torch.equal(eps, other.eps(x, t, ["a car"], label))
    path.unlink()
    assert read_adapter(path.parent)[0]["step"] == 12               # the checkpoint, then
    load_segmenter(path.parent / "checkpoint_0000012.pt", UperNet(20, **SMALL_PRESET.segmenter), classes)


def test_files_are_told_by_their_content(tmp_path):
    save_file(small_file(), tmp_path / "named_wrongly.ckpt")
    assert set(load_weights(tmp_path / "named_wrongly.ckpt")) == {"unet", "vae", "text"}


def test_damaged_metadata(tmp_path):
    path, state = tmp_path / "adapter.safetensors", draw(shapes_of(T2IAdapter(SMALL_PRESET.unet)))
    save_file(state, path, {"format": '"aldm-adapter"', "adapter": '"t2i'})
    refuses(lambda: read_adapter(path), "damaged")
    save_file(state, path, {"format": '"aldm-adapter"', "adapter": '"gligen"'})
    refuses(lambda: read_adapter(path), "kind gligen")
    save_file(state, path, {"format": '"aldm-adapter"', "adapter": '"controlnet"'})
    refuses(lambda: load_into(ControlNet(SMALL_PRESET.unet), read_adapter(path)[1]["adapter"], path), "missing: 334")
    torch.save({"state_dict": 3}, tmp_path / "a.ckpt")
    refuses(lambda: read_adapter(tmp_path / "a.ckpt"), "0 tensors")


def test_toy_base_file(tmp_path, monkeypatch):
    p = PRESETS["toy"]
    torch.manual_seed(0)
    text, unet, vae = TextEncoder(**p.text), UNet(p.unet), VAE(p.vae)
    segmenter, domain = UperNet(19, **p.segmenter), Classifier(5)
    segmenter.encoder.bn1.num_batches_tracked += 70000              # more than fp16 could hold
    with torch.no_grad():
        text.token_embedding.weight[49407] = 3
    path = tmp_path / "assets" / "toy.safetensors"
    path.parent.mkdir()
    save_base(path, {"vae": vae}, None)                             # as training makes it: one part after the other
    save_base(path, {**load_weights(path), "unet": unet, "text": text}, {5, 49407, 320}, {"step": 3})
    save_base(path, {**load_weights(path), "segmenter": segmenter, "domain": domain})
    names = load_file(path)
    assert names["text.token_embedding.rows"].shape == (3, 96)
    assert names["text.token_embedding.ids"].tolist() == [5, 320, 49407]
    assert "text.token_embedding.weight" not in names
    assert all(t.dtype == (torch.float16 if t.is_floating_point() else torch.int64) for t in names.values())
    monkeypatch.setattr(aldm, "__file__", str(tmp_path / "aldm.py"))
    unet2, vae2, text2, parts = load_frozen("toy")
    half = lambda net: {n: t.half().float() if t.is_floating_point() else t for n, t in net.state_dict().items()}
    assert same(unet2.state_dict(), half(unet)) and same(vae2.state_dict(), half(vae))
    table = torch.empty(49408, 96).normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    table[[5, 320, 49407]] = text.token_embedding.weight[[5, 320, 49407]].detach().half().float()
    assert torch.equal(text2.token_embedding.weight, table)
    assert set(parts) == {"segmenter", "domain"} and parts["segmenter"]["encoder.bn1.num_batches_tracked"] == 70000
    load_into(Classifier(5), parts["domain"], "domain")
    with torch.device("meta"):
        judge = UperNet(19, **p.segmenter)
    load_into(judge, parts["segmenter"], "segmenter", "cpu", torch.float32)
    assert same(judge.state_dict(), half(segmenter)) and all(q.requires_grad for q in judge.parameters())


def test_atomic(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), atomic(path) as temporary:
            assert temporary.parent == tmp_path and temporary.suffix == ".txt"
            temporary.write_text("half")
            raise error
        assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    with atomic(str(path)) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


# class embeddings

def test_class_embeddings(tmp_path):
    table, null = torch.randn(19, 64), torch.randn(1, 64)
    classes, path = class_table("cityscapes"), tmp_path / "class_embeddings_cityscapes.pth"
    torch.save(table, path)
    assert torch.equal(load_class_embeddings(path, classes, null), torch.cat([table, null]))
    text = TextEncoder(**SMALL_PRESET.text)
    assert torch.equal(load_class_embeddings(path, classes, text)[19:], text.pooled(text.tokenize([""])).detach())
    refuses(lambda: load_class_embeddings(path, classes), "NoneType", "void")
    refuses(lambda: load_class_embeddings(path, class_table("ade20k"), null), "[19, 64]", "[150, 64]", "ade20k")
    refuses(lambda: load_class_embeddings(path, classes, torch.randn(1, 96)), "[19, 64]", "[19, 96]")
    torch.save(null + 1, tmp_path / "null_embedding.pth")
    assert torch.equal(load_class_embeddings(path, classes, null), torch.cat([table, null + 1]))
    assert torch.equal(load_class_embeddings(path, classes), torch.cat([table, null + 1]))
    torch.save(torch.randn(1, 32), tmp_path / "null_embedding.pth")
    refuses(lambda: load_class_embeddings(path, classes, null), "[1, 32]", "[1, 64]")
    torch.save({"a": table}, path)
    refuses(lambda: load_class_embeddings(path, classes, null), "dict")


@pytest.mark.parametrize("key, file", [("cityscapes", "cityscapes"), ("ade20k", "ade20k"), ("coco", "coco_stuff")])
def test_official_class_embeddings(key, file):
    path = SHARED / "class_embeddings" / f"class_embeddings_{file}.pth"
    if not path.exists():
        pytest.skip("the official class embeddings are not here")
    table = load_class_embeddings(path, class_table(key))
    assert table.shape == (len(class_table(key).names) + 1, 768)
    assert torch.equal(table[-1:], torch.load(path.with_name("null_embedding.pth"), weights_only=True))
    other = class_table("cityscapes" if key != "cityscapes" else "coco")
    refuses(lambda: load_class_embeddings(path, other), str(len(other.names)))


# what does not fit

T, WIDE = torch.zeros(2, 2), torch.zeros(320, 1024)
FOREIGN = {
    "Stable Diffusion 2": [{"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": WIDE},
                           {"control_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": WIDE},
                           {"cond_stage_model.model.transformer.resblocks.0.ln_1.weight": T, "betas": T}],
    "XL": [{"conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": T, "first_stage_model.x": T},
           {"model.diffusion_model.label_emb.0.0.weight": T}],
    "FLUX": [{"model.diffusion_model.joint_blocks.0.x_block.attn.proj.bias": T},
             {"double_blocks.0.img_attn.proj.bias": T}],
    "LoRA": [{"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": T},
             {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": T},
             {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.lora_A.weight": T}],
    "diffusers": [{"down_blocks.0.resnets.0.conv1.weight": T, "conv_in.weight": T},
                  {"adapter.body.0.resnets.0.block1.weight": T}, {"encoder.down_blocks.0.resnets.0.conv1.weight": T}],
    "inpainting": [{"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 9, 3, 3)}],
    "a UNet without": [{"input_blocks.0.0.weight": T, "output_blocks.0.0.in_layers.0.weight": T}],
    "2 tensors, none known here (emb_params, other)": [{"emb_params": T, "other": T}],
}


@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_models_are_told_apart(tmp_path, what):
    for tensors in FOREIGN[what]:
        save_file(dict(zip(tensors, (t.clone() for t in tensors.values()))), tmp_path / "a.safetensors")
        torch.save({"state_dict": tensors}, tmp_path / "a.ckpt")
        for path in (tmp_path / "a.safetensors", tmp_path / "a.ckpt"):
            for call in (load_weights, read_adapter, functools.partial(load_frozen, "sd15")):
                refuses(lambda: call(path), what, str(path))


def damaged(folder):
    """Files that are no weights: {name: what the message must say}."""
    st, zipped, legacy = (folder / n for n in ("ok.safetensors", "ok.ckpt", "old.ckpt"))
    save_file(small_vae := cut(small_file(), "first_stage_model."), st)
    torch.save(small_vae, zipped)
    torch.save(small_vae, legacy, _use_new_zipfile_serialization=False)
    files = {"empty.ckpt": b"", "page.ckpt": b"<!DOCTYPE html><html>Not found</html>", "page2.ckpt": b"\n <html>",
             "lfs.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265146304\n",
             "text.ckpt": b"I will upload it later.\n", "noise.ckpt": bytes(range(256)) * 9,
             "ten.safetensors": st.read_bytes()[:10],
             "cut.safetensors": st.read_bytes()[:-100], "cut2.safetensors": st.read_bytes()[:900],
             "cut.ckpt": zipped.read_bytes()[:-100], "cut2.ckpt": zipped.read_bytes()[:700],
             "cutold.ckpt": legacy.read_bytes()[:-100], "cutold2.ckpt": legacy.read_bytes()[:1000]}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "diffusers").mkdir()
    (folder / "diffusers" / "model_index.json").write_text("{}")
    (folder / "void").mkdir()
    torch.save([torch.zeros(2)], folder / "list.pt")
    torch.save({"epoch": 3}, folder / "nothing.pt")
    words = {"empty.ckpt": "empty", "page.ckpt": "web page", "page2.ckpt": "web page", "text.ckpt": "text file",
             "lfs.safetensors": "Git LFS pointer", "diffusers": "a folder of diffusers", "void": "a folder",
             "nowhere.ckpt": "no such file", "list.pt": "0 tensors", "nothing.pt": "0 tensors", "noise.ckpt": ""}
    return words | {name: "cut short" for name in files if name.startswith(("cut", "ten"))}


def test_damaged_files(tmp_path):
    for name, word in damaged(tmp_path).items():
        path, judge = tmp_path / name, UperNet(20, **SMALL_PRESET.segmenter)
        for call in (load_weights, read_adapter, functools.partial(load_frozen, "sd15"),
                     lambda p: load_segmenter([p, p], judge, class_table("toy")),
                     lambda p: load_class_embeddings(p, class_table("toy"), torch.zeros(1, 64))):
            refuses(lambda: call(path), str(path), "" if "tensors" in word and call is not load_weights else word)


class Evil:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_nothing_of_a_pickle_is_executed(tmp_path):
    marker = tmp_path / "executed"
    evils = {"system": Evil(os.system, f"touch {marker}"), "open": Evil(open, str(marker), "w"),
             "exec": Evil(exec, f"open({str(marker)!r}, 'w')")}
    for name, evil in evils.items():
        for i, content in enumerate((evil, {"state_dict": {"quant_conv.weight": T, "x": evil}},
                                     {"meta": evil, "adapter": {"conv_in.weight": T}}, [torch.zeros(1, 64), evil])):
            torch.save(content, tmp_path / f"{name}{i}.ckpt")
            torch.save(content, tmp_path / f"{name}{i}_legacy.pth", _use_new_zipfile_serialization=False)
            for protocol in (0, 2, 4):
                (tmp_path / f"{name}{i}_{protocol}.pt").write_bytes(pickle.dumps(content, protocol))
    files = sorted(p for p in tmp_path.iterdir() if p.suffix in (".ckpt", ".pth", ".pt"))
    assert len(files) == 3 * 4 * 5
    judge, good = UperNet(20, **SMALL_PRESET.segmenter), tmp_path / "good"
    (good / "run").mkdir(parents=True)
    torch.save(torch.zeros(19, 64), good / "table.pth")
    for path in files:
        os.replace(path, good / "null_embedding.pth")
        refuses(lambda: load_class_embeddings(good / "table.pth", class_table("toy"), torch.zeros(1, 64)))
        os.replace(good / "null_embedding.pth", good / "run" / "checkpoint_0000001.pt")
        refuses(lambda: read_adapter(good / "run"))
        os.replace(good / "run" / "checkpoint_0000001.pt", path)
        for call in (load_weights, read_adapter, functools.partial(load_frozen, "sd15"),
                     lambda p: load_segmenter([p, p], judge, class_table("toy")),
                     lambda p: load_segmenter(p, judge, class_table("toy")),
                     lambda p: load_class_embeddings(p, class_table("toy"), torch.zeros(1, 64))):
            text = refuses(lambda: call(path))
            if path.suffix != ".pt":        # (pickle's protocol 0 is text, and is called that)
                assert "refused, nothing of it was executed" in text
                assert "calls posix.system" in text or "system" not in path.name
    assert not marker.exists()
    pickle.loads(pickle.dumps(evils["system"]))
    assert marker.exists()                  # it would have


def test_base_model_that_does_not_fit(tmp_path, small):
    path, load = tmp_path / "sd.safetensors", lambda: load_frozen("small", tmp_path / "sd.safetensors")
    vae = cut(small_file(), "first_stage_model.")
    for tensors in (vae, {"first_stage_model." + n: t for n, t in vae.items()}):
        save_file(tensors, path)
        assert same(load_weights(path)["vae"], vae)
        refuses(load, "vae alone, without unet and text")
    refuses(lambda: read_adapter(path), "no adapter", "--sd")
    tensors = dict(small_file())
    for i in (1, 2, 4, 5, 7):
        tensors.pop(f"model.diffusion_model.input_blocks.{i}.0.in_layers.2.bias")
    tensors["model.diffusion_model.new.weight"] = T
    tensors["model.diffusion_model.out.2.bias"] = torch.zeros(8)
    save_file(tensors, path)
    text = refuses(load, str(path), "unet", "missing: 5 (input_blocks.1.0.in_layers.2.bias, ", ", ...)",
                   "unexpected: 1 (new.weight)", "of another shape: 1 (out.2.bias [8] instead of [4])")
    assert text.count("in_layers") == 3
    tensors = dict(small_file())
    tensors.pop("cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.v_proj.bias")
    save_file(tensors, path)
    refuses(load, "text", "missing: 1 (transformer.resblocks.1.attn.in_proj_bias)", "unexpected: 2")
    save_file(small_file(), path)
    refuses(lambda: load_frozen("sd15", path), "of another shape")


def test_base_model_is_looked_up_where_it_may_be(tmp_path, monkeypatch):
    asked = []

    def download(*args, **kwargs):
        asked.append(args)
        raise OSError("offline\nsecond line")
    monkeypatch.setattr(aldm, "hf_hub_download", download)
    monkeypatch.setattr(aldm, "try_to_load_from_cache", lambda repo, name: None)
    refuses(lambda: load_frozen("sd15"), "v1-5-pruned-emaonly.safetensors", "--sd PATH", "huggingface.co/")
    assert asked == [("stable-diffusion-v1-5/stable-diffusion-v1-5", "v1-5-pruned-emaonly.safetensors")]
    monkeypatch.setattr(aldm, "try_to_load_from_cache",
                        lambda repo, name: str(tmp_path / name) if "runwayml" in repo else None)
    refuses(lambda: load_frozen("sd15"), str(tmp_path / "v1-5-pruned-emaonly.safetensors"), "no such file")
    assert len(asked) == 1


# -- a plain segmenter on real and synthetic data -----------------------------------------------------------------------


def test_segmenter_command(tmp_path):
    """Trained on a day and on an extra folder, tested per domain; the weights can judge afterwards."""
    write_toy(tmp_path / "night", "path", "train", 16, ("night",))
    out = run("discriminator.py", "--data", "toy", "--extra", tmp_path / "night", "--test", "toy:day", "toy:night",
              "--steps", 60, "--device", "cpu", "--out", tmp_path / "segmenter.pt", "--seed", 3)
    figures = {line.split(":")[1]: float(line.split("mIoU ")[1].split()[0]) for line in out.splitlines() if "mIoU" in line}
    assert figures["day"] > 0.15 and figures["night"] > 0.1 and "road 0." in out       # (random: 0.03)
    net = UperNet(20, **PRESETS["toy"].segmenter)
    load_segmenter([tmp_path / "segmenter.pt"], net, class_table("toy"))


@pytest.mark.parametrize("flags,word", [
    ("--data nowhere", "nowhere"), ("--extra other", "1 classes are not the 19"), ("--steps 0", "--steps"),
    ("--data toy:dusk", "dusk"), ("--out no/where/s.pt", "no/where")])
def test_segmenter_command_refuses(flags, word, tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / "other" / kind).mkdir(parents=True)
        Image.new("L", (64, 64)).save(tmp_path / "other" / kind / "a.png")
    (tmp_path / "other" / "classes.txt").write_text("thing\n")
    done = subprocess.run([sys.executable, HERE / "discriminator.py", "--device", "cpu", *flags.split()], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and word in done.stderr, done.stderr
    assert not list(tmp_path.glob("*.pt"))


# -- layouts and data sets --------------------------------------------------------------------------------------------


KEYS = ("cityscapes", "ade20k", "coco")


def save(path, array, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array), mode).save(path, **options)
    return path


def blocks(values, size=8):
    """A label map with one square per value, 16 pixels wide each: uint8 [16, 16 len(values)]."""
    return np.repeat(np.repeat(np.array(values, np.uint8)[None], 16, 0), 16, 1)


def refuses_with(call, *words):
    with pytest.raises(InputError) as caught:
        call()
    text = str(caught.value)
    assert all(word in text for word in words), text
    return text


# class tables

@pytest.mark.parametrize("key", KEYS)
def test_tables_are_the_published_ones(key):
    if not (SHARED / "class_tables.json").exists():
        pytest.skip("no ../shared/class_tables.json here")
    published = json.loads((SHARED / "class_tables.json").read_text())
    classes, table = data.class_table(key), np.full(256, -1)
    if key == "cityscapes":
        labels = sorted((l for l in published[key]["labels"] if 0 <= l["trainId"] < 19), key=lambda l: l["trainId"])
        names, palette = [l["name"] for l in labels], [l["color"] for l in labels]
        for label in published[key]["labels"]:
            if label["id"] >= 0:
                table[label["id"]] = label["trainId"]
        void = {tuple(l["color"]) for l in published[key]["labels"]} - {tuple(c) for c in palette}
        assert {tuple(c) for c in classes.void.tolist()} == void
    elif key == "ade20k":
        names, palette = published[key]["names"], published[key]["palette"]
        table[:151] = [255, *range(150)]
    else:
        names, palette = published["coco_stuff"]["names"], published["coco_stuff"]["palette"]
        table[published["coco_stuff"]["file_ids"]] = range(171)
    table[255] = 255
    assert list(classes.names) == names and classes.palette.tolist() == palette
    assert classes.file_ids.tolist() == table.tolist()
    assert data.class_table("toy").names == data.class_table("cityscapes").names


def test_nearest_ade_classes():
    ade = data.class_table("ade20k")
    assert ade.ade == ade.names
    for key in ("cityscapes", "coco"):
        classes = data.class_table(key)
        assert len(classes.ade) == len(classes.names) and set(classes.ade) - {None} <= set(ade.names)
    assert set(data.NEAREST_ADE) <= set(data.class_table("cityscapes").names + data.class_table("coco").names)
    city = dict(zip(data.class_table("cityscapes").names, data.class_table("cityscapes").ade))
    assert city["road"] == "road" and city["vegetation"] == "tree" and city["traffic sign"] == "signboard"


def test_class_table_of_a_folder(tmp_path):
    text = "\ufeff# my classes\r\nroad 128 64 128\r\n\r\nbrick house\nplatform 9\nplatform 10 1 2 3\ncar, 7, 8, 9\n"
    (tmp_path / "classes.txt").write_text(text, "utf-8")
    classes = data.class_table(tmp_path)
    assert classes.names == ("road", "brick house", "platform 9", "platform 10", "car")
    assert classes.palette[[0, 3, 4]].tolist() == [[128, 64, 128], [1, 2, 3], [7, 8, 9]]
    assert classes.ade == ("road", None, None, None, "car")
    assert (data.class_table(str(tmp_path)).palette == classes.palette).all()
    (tmp_path / "classes.txt").write_text("\n".join(f"class{i}" for i in range(255)))
    palette = data.class_table(tmp_path).palette
    assert len(np.unique(palette, axis=0)) == 255 and palette.any(1).all()


@pytest.mark.parametrize("text, word", [
    ("road 128 64", "line 1"), ("a\nroad 300 0 0", "line 2"), ("128 64 128", "line 1"), ("road -1 0 0", "line 1"),
    ("a 1 2 3\nb 1 2 3", "share"), ("\n# none\n", "0 classes"), ("\n".join(f"c{i}" for i in range(256)), "256 classes")])
def test_class_table_refuses(tmp_path, text, word):
    (tmp_path / "classes.txt").write_text(text)
    refuses_with(lambda: data.class_table(tmp_path), word, "classes.txt")


def test_class_table_refuses_unknown_names_and_bytes(tmp_path):
    refuses_with(lambda: data.class_table("citiscapes"), "citiscapes", "cityscapes", "classes.txt")
    (tmp_path / "classes.txt").write_bytes(b"stra\xdfe\n")
    refuses_with(lambda: data.class_table(tmp_path), "UTF-8")


# layouts

@pytest.mark.parametrize("key", KEYS)
def test_every_class_goes_to_ids_and_colours_and_back(tmp_path, key):
    classes = data.class_table(key)
    n = len(classes.names)
    label = blocks([*range(n), 255])
    back = data.read_layout(save(tmp_path / "colour.png", data.colorize(label, key)), key)
    assert back.dtype == torch.int64 and back.shape == label.shape
    expected = label.copy()
    if key == "ade20k":                                    # its palette gives road and skyscraper one colour
        expected[label == classes.names.index("skyscraper")] = classes.names.index("road")
    assert (back.numpy() == expected).all()
    file_id = {c: i for i, c in reversed(list(enumerate(classes.file_ids.tolist()))) if c >= 0}
    ids = np.vectorize(file_id.get)(label).astype(np.uint8)
    assert (data.read_layout(save(tmp_path / "ids.png", ids), classes).numpy() == label).all()
    for name, wide in (("wide.png", np.uint16), ("wide.tif", np.int32)):
        assert (data.read_layout(save(tmp_path / name, ids.astype(wide)), key).numpy() == label).all()


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_cityscapes_frame_reads_the_same_from_ids_and_colours(split):
    stem = SHARED / f"cityscapes_sample/gtFine/{split}/frankfurt/frankfurt_000000_000576_gtFine"
    if not stem.parent.exists():
        pytest.skip("no ../shared/cityscapes_sample here")
    ids, colour, train = (data.read_layout(f"{stem}_{k}.png", "cityscapes") for k in ("labelIds", "color", "labelTrainIds"))
    assert ids.shape == (1024, 2048) and (ids == colour).all()
    assert 0 < (ids != train).float().mean() < 0.004


def test_cityscapes_kind_of_ids(tmp_path):
    read = lambda name, values: data.read_layout(save(tmp_path / name, blocks(values)), "cityscapes")[0, ::16].tolist()
    assert read("a_labelIds.png", [0, 7, 11, 33, 255]) == [255, 0, 2, 18, 255]
    assert read("a_labelIds.png", [0, 7, 11]) == [255, 0, 2]             # the name decides before the content
    assert read("a_labelTrainIds.png", [0, 7, 11, 255]) == [0, 7, 11, 255]
    assert read("a.png", [7, 11, 26]) == [0, 2, 13]                      # 26 is a labelId
    assert read("a.png", [7, 11, 255]) == [7, 11, 255]                   # nothing above 18: train ids
    refuses_with(lambda: read("a_labelTrainIds.png", [7, 26]), "26 (256 pixels)", "valid are 0-18, 255")
    refuses_with(lambda: read("a_labelIds.png", [7, 34]), "34 (256 pixels)", "0-33, 255")
    minus = np.full((8, 8), -1, np.int32)
    minus[0] = 26
    assert data.read_layout(save(tmp_path / "a.tif", minus), "cityscapes")[:2, 0].tolist() == [13, 255]


def palette_png(path, ids, colours):
    image = Image.fromarray(np.asarray(ids, np.uint8), "P")
    image.putpalette(np.asarray(colours, np.uint8).ravel().tolist())
    image.save(path)
    return path


def test_palette_pngs(tmp_path):
    classes = data.class_table("cityscapes")
    read = lambda ids, colours: data.read_layout(palette_png(tmp_path / "p.png", blocks(ids), colours), classes)[0, ::16].tolist()
    pal = np.zeros((256, 3), np.uint8)
    pal[:19] = classes.palette
    assert read([0, 2, 13, 255], pal) == [0, 2, 13, 255]                 # ids and colours agree
    assert read([0, 2, 13, 255], np.arange(768) % 251) == [0, 2, 13, 255]        # foreign colours: ids
    assert read([0, 2, 13, 1], np.zeros((256, 3))) == [0, 2, 13, 1]      # no colours at all: ids
    assert read([0, 1, 2, 3], classes.palette[[13, 0, 10, 2]]) == [13, 0, 10, 2]         # numbered anew: colours
    assert read([40, 41], np.repeat(classes.palette[[8]], 256, 0)) == [8, 8]     # ids do not fit, colours do
    refuses_with(lambda: read([0, 40], np.arange(768) % 251), "40 (256 pixels)")
    ade = data.class_table("ade20k")                                     # ids tell road from skyscraper
    pal[1:151] = ade.palette
    assert data.read_layout(palette_png(tmp_path / "a.png", blocks([7, 49]), pal), ade)[0, ::16].tolist() == [6, 48]
    quantised = data.colorize(blocks([13, 0, 10, 8, 255]), classes).quantize(5)
    quantised.save(tmp_path / "q.png")
    assert data.read_layout(tmp_path / "q.png", classes)[0, ::16].tolist() == [13, 0, 10, 8, 255]


def test_transparency(tmp_path):
    rgba = np.asarray(data.colorize(blocks([13, 0, 8]), "toy").convert("RGBA")).copy()
    rgba[:, :16] = (1, 2, 3, 0)
    assert data.read_layout(save(tmp_path / "a.png", rgba), "toy")[0, ::16].tolist() == [255, 0, 8]
    rgba[0, :5, 3] = 128
    refuses_with(lambda: data.read_layout(save(tmp_path / "a.png", rgba), "toy"), "5 pixels", "opaque")
    la = np.stack([blocks([7, 8]), blocks([255, 0])], -1)
    assert data.read_layout(save(tmp_path / "la.png", la, "LA"), "toy")[0, ::16].tolist() == [7, 255]


def test_read_layout_refuses_files_that_are_no_images(tmp_path):
    read = lambda name: data.read_layout(tmp_path / name, "cityscapes")
    refuses_with(lambda: read("none.png"), "none.png", "no such file")
    refuses_with(lambda: read("."), "folder")
    (tmp_path / "empty.png").touch()
    refuses_with(lambda: read("empty.png"), "empty")
    (tmp_path / "text.png").write_text("a label map, honestly")
    refuses_with(lambda: read("text.png"), "no image")
    whole = save(tmp_path / "whole.png", np.random.default_rng(0).integers(0, 19, (64, 64)).astype(np.uint8)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:len(whole) // 2])
    refuses_with(lambda: read("cut.png"), "cut.png", "broken")
    (tmp_path / "flipped.png").write_bytes(whole[:200] + bytes([whole[200] ^ 255]) + whole[201:])
    refuses_with(lambda: read("flipped.png"), "broken")
    save(tmp_path / "small.png", np.zeros((7, 20), np.uint8))
    refuses_with(lambda: read("small.png"), "20 x 7")
    for side in (8200, 9600, 14000):                       # beyond our limit, PIL's warning, PIL's error
        Image.new("1", (side, side)).save(tmp_path / "bomb.png")
        refuses_with(lambda: read("bomb.png"), "64 Mpixel")
    Image.new("CMYK", (16, 16)).save(tmp_path / "cmyk.jpg")
    refuses_with(lambda: read("cmyk.jpg"), "CMYK")


def test_read_layout_refuses_ids_and_colours_it_does_not_know(tmp_path):
    read = lambda array, key, name="a.png", **kw: data.read_layout(save(tmp_path / name, array, **kw), key)
    refuses_with(lambda: read(blocks([0, 150, 151, 200]), "ade20k"), "151 (256 pixels), 200 (256 pixels)", "0-150, 255")
    refuses_with(lambda: read(blocks([0, 11, 181]), "coco"), "11 (256 pixels)", "0-10, 12-24, 26-27")
    refuses_with(lambda: read(blocks([0]).astype(np.uint16) + 1000, "coco"), "1000 (256 pixels)")
    rgb = np.asarray(data.colorize(blocks([0, 13, 8, 10]), "toy")).copy()
    refuses_with(lambda: read(rgb[..., ::-1], "toy"), "red and blue swapped")
    rgb[:3, :5] = (0, 5, 140)
    text = refuses_with(lambda: read(rgb, "toy"), "15 pixels", "(0, 5, 140)")
    assert "nearest are car, " in text and text.count("\n") == 0
    refuses_with(lambda: read(np.stack([blocks([7, 26])] * 3, -1), "toy"), "grey", "single channel")
    scene = np.asarray(data.colorize(data.toy_scene(3)[1], "toy"))
    refuses_with(lambda: read(scene, "toy", "a.jpg"), "JPEG", "save as PNG")
    smooth = np.asarray(Image.fromarray(scene).resize((200, 200), Image.BICUBIC))
    refuses_with(lambda: read(smooth, "toy"), "nearest")
    refuses_with(lambda: read(blocks([7, 8]), "toy", "grey.jpg"), "JPEG of mode L")


def test_compose_caption():
    names = data.class_table("cityscapes").names
    label = torch.full((32, 32), 10)
    label[:8], label[:2], label[0, 0] = 0, 13, 255
    assert data.compose_caption(label, names) == "a photo of sky, road and car"
    assert data.compose_caption(torch.full((8, 8), 255), names) == "a photo"
    many = data.compose_caption(blocks(range(19)), names)
    assert many == "a photo of road, sidewalk, building, wall, fence and pole"
    assert data.compose_caption(blocks([130, 141]), data.class_table("ade20k").names).count("screen") == 1


# the toy world

def test_toy_scenes_are_a_function_of_seed_and_domain():
    captions = set()
    for seed in range(12):
        scenes = {d: data.toy_scene(seed, d) for d in data.DOMAINS}
        for domain, (image, label, caption) in scenes.items():
            again = data.toy_scene(seed, domain)
            assert image.shape == (64, 64, 3) and image.dtype == label.dtype == np.uint8
            assert (again[0] == image).all() and (label == scenes["day"][1]).all() and again[2] == caption
            assert caption.endswith(data.PHRASES[domain])
            captions.add(caption)
        assert len({image.tobytes() for image, _, _ in scenes.values()}) == 5
    assert len(captions) > 30
    assert np.unique([data.toy_scene(s)[1] for s in range(60)]).tolist() == [0, 1, 2, 5, 7, 8, 9, 10, 11, 13, 255]


def test_toy_items():
    toy = data.Toy("val", ("night", "fog"), 6)
    image, label, caption = data.toy_scene(10_000_003, "fog")
    item = toy[3]
    assert len(toy) == 6 and item["name"] == "toy_10000003" and item["caption"] == caption and not item["flip"]
    assert torch.equal(((item["image"] + 1) * 127.5).round().byte(), torch.from_numpy(image).permute(2, 0, 1))
    assert item["image"].dtype == torch.float32 and torch.equal(item["label"], torch.from_numpy(label).long())
    flipped = next(toy[3, seed] for seed in range(20) if toy[3, seed]["flip"])
    assert torch.equal(flipped["image"], item["image"].flip(-1)) and torch.equal(flipped["label"], item["label"].flip(-1))
    assert not any(data.Toy("val", length=1, augment=False)[0, seed]["flip"] for seed in range(20))
    refuses_with(lambda: data.Toy("test"), "test")
    refuses_with(lambda: data.Toy(domains=("dusk",)), "dusk")
    refuses_with(lambda: data.open_dataset("toy", size=512), "64")
    assert len(data.open_dataset("toy", None, "val", 64, captions=None, grid=8, length=3)) == 3


def test_toy_renders_the_same_in_a_pool():
    toy = data.Toy("train", data.DOMAINS, 600)
    for i in (0, 299, 599):
        assert (toy.images[i] == data.toy_scene(i, data.DOMAINS[i % 5])[0]).all()


# pairs on disk

def same_items(a, b):
    assert a.keys() == b.keys()
    for k in a:
        assert torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k], k


@pytest.mark.parametrize("form", ["cityscapes", "path"])
def test_written_toy_world_reads_back_as_the_same_batches(tmp_path, form, monkeypatch):
    for split in ("train", "val"):
        monkeypatch.setattr(sys, "argv", ["data.py", "--write-toy", str(tmp_path), "--format", form, "--split", split,
                                          "--n", "7", "--domains", "day,rain"])
        data.main()
        toy = data.Toy(split, ("day", "rain"), 7)
        source = "cityscapes" if form == "cityscapes" else tmp_path
        pairs = data.open_dataset(source, tmp_path, split, size=64, grid=4)
        assert len(pairs) == 7
        for a, b, _ in zip(data.batches(toy, 4, 0), data.batches(pairs, 4, 0), range(4)):
            same_items(a, b)


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["data.py", "--show", str(tmp_path / "world.png")])
    data.main()
    with Image.open(tmp_path / "world.png") as picture:
        assert picture.size == (8 * 128, 6 * 128)
    for bad in (["--write-toy", str(tmp_path), "--domains", "dusk"], ["--show", str(tmp_path / "no/world.png")]):
        monkeypatch.setattr(sys, "argv", ["data.py", *bad])
        with pytest.raises(SystemExit) as caught:
            data.main()
        error = capsys.readouterr().err
        assert caught.value.code == 2 and error.count("\n") == 1 and error.startswith("data.py: ")


def custom(root, n=5, size=(40, 56)):
    """A folder dataset: smooth pictures, ids as labels, no captions."""
    (root / "images").mkdir(parents=True)
    (root / "classes.txt").write_text("sand\nsea 0 0 200\n")
    for i in range(n):
        y, x = np.mgrid[:size[0], :size[1]]
        save(root / f"images/p{i}.png", np.stack([4 * x, 6 * y, 0 * x + 40 * i], -1).astype(np.uint8))
        save(root / f"labels/p{i}.png", (x > y).astype(np.uint8))
    return root


def test_a_folder_of_ones_own(tmp_path):
    root = custom(tmp_path)
    (root / "captions.json").write_text(json.dumps({"p1": "a beach"}))
    pairs = data.Pairs(root, size=32, grid=8)
    assert len(pairs) == 5 and pairs.classes.names == ("sand", "sea")
    image, label = pairs.full(1)
    assert image.shape == (3, 32, 48) and label.shape == (32, 48)        # 44.8 rounds to a multiple of 8
    assert pairs[1]["caption"] == "a beach" and pairs[2]["caption"] == "a photo of sea and sand"
    corners = set()
    for seed in range(30):
        item = pairs[1, seed]
        whole, whole_label = pairs.full(1, item["flip"])
        window = slice(item["top"], item["top"] + 32), slice(item["left"], item["left"] + 32)
        assert torch.equal(item["image"], whole[:, window[0], window[1]]) and torch.equal(item["label"], whole_label[window])
        assert pairs.window(1, seed) == (item["flip"], item["top"], item["left"])
        corners.add((item["flip"], item["top"], item["left"]))
    assert corners == {(f, 0, x) for f in (False, True) for x in (0, 8, 16)}
    assert pairs.window(1) == data.Pairs(root, size=32, augment=False).window(1, 5) == (False, 0, 8)
    for f in (root / "labels").iterdir():                                # colours instead of ids
        data.colorize(np.asarray(Image.open(f)), root).save(f)
    assert torch.equal(data.Pairs(root, size=32).full(1)[1], label)


def test_own_folder_with_splits_and_captions(tmp_path):
    root = custom(tmp_path / "d", 4)
    for i, split in enumerate(("train", "train", "train", "val")):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(exist_ok=True)
            (root / kind / f"p{i}.png").rename(root / kind / split / f"p{i}.png")
    assert data.Pairs(root, size=32).names == ["p0", "p1", "p2"] and data.Pairs(root, split="val", size=32).names == ["p3"]
    refuses_with(lambda: data.Pairs(root, split="test", size=32), "images/test")
    captions = tmp_path / "c.json"
    captions.write_text('{"p3": "waves"}')
    assert data.Pairs(root, split="val", size=32, captions=captions)[0]["caption"] == "waves"
    refuses_with(lambda: data.Pairs(root, split="train", size=32, captions=captions), "c.json", "none of the 3")
    for text in ("{", "[1]", '{"p3": 1}'):
        captions.write_text(text)
        refuses_with(lambda: data.Pairs(root, split="val", size=32, captions=captions), "c.json")
    refuses_with(lambda: data.Pairs(root, split="val", size=32, captions=tmp_path / "no.json"), "no.json")
    refuses_with(lambda: data.Pairs(root, split="val", size=30), "30", "multiple")


def test_cityscapes_folders(tmp_path):
    for city, k in (("ulm", "labelIds"), ("bonn", "labelTrainIds")):
        save(tmp_path / f"leftImg8bit/train/{city}/{city}_0_1_leftImg8bit.png", np.zeros((64, 128, 3), np.uint8))
        save(tmp_path / f"gtFine/train/{city}/{city}_0_1_gtFine_{k}.png", np.full((64, 128), 7, np.uint8))
    save(tmp_path / "gtFine/train/ulm/ulm_0_1_gtFine_labelTrainIds.png", np.full((64, 128), 5, np.uint8))
    pairs = data.Pairs("cityscapes", tmp_path, size=32)
    assert pairs.names == ["bonn_0_1", "ulm_0_1"]
    assert [int(pairs.full(i)[1].unique()) for i in (0, 1)] == [7, 0] and pairs.full(0)[0].shape == (3, 32, 64)
    refuses_with(lambda: data.Pairs("cityscapes", tmp_path / "no"), "leftImg8bit/train", "leftImg8bit_trainvaltest.zip")
    refuses_with(lambda: data.Pairs("cityscapes", tmp_path, "val"), "leftImg8bit/val")


def test_real_cityscapes_pair():
    root = SHARED / "cityscapes_sample"
    if not root.exists():
        pytest.skip("no ../shared/cityscapes_sample here")
    pairs = data.Pairs("cityscapes", root, "val")
    image, label = pairs.full(0)
    assert image.shape == (3, 512, 1024) and label.shape == (512, 1024)
    assert pairs[0, 1]["image"].shape == (3, 512, 512) and pairs[0]["name"] == "frankfurt_000000_000576"
    assert pairs[0]["caption"] == json.loads((root / "captions_val.json").read_text())["frankfurt_000000_000576"]
    assert data.Pairs("cityscapes", root, "train")[0]["caption"].startswith("a photo of road, ")


def test_ade20k_and_coco_folders(tmp_path):
    grey = np.full((32, 48, 3), 90, np.uint8)
    save(tmp_path / "images/training/ADE_train_1.jpg", grey)
    save(tmp_path / "annotations/training/ADE_train_1.png", np.repeat([[0, 7]], 24, 1).repeat(32, 0).astype(np.uint8))
    assert data.Pairs("ade20k", tmp_path, size=32)[0]["label"].unique().tolist() == [6, 255]
    for images, labels in (("val2017", "stuffthingmaps/val2017"), ("images/train2017", "annotations/train2017")):
        save(tmp_path / f"{images}/000001.jpg", grey)
        save(tmp_path / f"{labels}/000001.png", np.full((32, 48), 181, np.uint8))
    for split in ("train", "val"):
        assert data.Pairs("coco", tmp_path, split, size=32)[0]["label"].unique().tolist() == [170]
    refuses_with(lambda: data.Pairs("coco", tmp_path / "images"), "stuffthingmaps")
    refuses_with(lambda: data.Pairs("ade20k", tmp_path, "val"), "images/validation", "ADEChallengeData2016.zip")


def test_broken_pairs_are_reported_together(tmp_path, capsys):
    root = custom(tmp_path, 9)
    for i in range(4):
        (root / f"labels/p{i}.png").unlink()
    (root / "images/p4.png").unlink()
    (root / "images/p5.png").write_bytes((root / "images/p5.png").read_bytes()[:90])
    save(root / "labels/p6.png", np.full((40, 56), 9, np.uint8))
    save(root / "labels/p7.png", np.zeros((40, 55), np.uint8))
    text = refuses_with(lambda: data.Pairs(root, size=32), "4 images without a label: p0, p1, p2, ...",
                   "1 labels without an image: p4", "p5.png", "p6.png", "9 (2240 pixels)", "p7 (55 x 40, image 56 x 40)", "(1 are whole)", "--skip-broken")
    assert text.count("\n") == 6
    pairs = data.Pairs(root, size=32, skip_broken=True)
    assert pairs.names == ["p8"] and "4 images without a label" in capsys.readouterr().err
    (root / "images/p8.png").write_bytes(b"")
    refuses_with(lambda: data.Pairs(root, size=32, skip_broken=True), "(0 are whole)")


# batches

def take(n, *args, **kw):
    return [b for b, _ in zip(data.batches(*args, **kw), range(n))]


def test_batches_depend_on_seed_and_step_alone(tmp_path):
    toy = data.Toy("val", length=10)
    torch.manual_seed(7)
    run = take(8, toy, 4, seed=3)
    assert torch.equal(torch.rand(1), torch.manual_seed(7) and torch.rand(1))    # the global generator is not touched
    assert run[0]["image"].shape == (4, 3, 64, 64) and run[0]["label"].dtype == torch.int64
    assert run[0]["flip"].dtype == torch.bool and len(run[0]["caption"]) == 4
    for a, b in zip(run[5:], take(3, toy, 4, seed=3, start=5)):                  # resumed
        same_items(a, b)
    for a, b in zip(run, take(8, toy, 4, seed=3, workers=2)):
        same_items(a, b)
    halves = [take(8, toy, 2, seed=3, rank=r, world=2) for r in (0, 1)]          # two ranks share the same batches
    for whole, left, right in zip(run, *halves):
        assert torch.equal(whole["image"], torch.cat([left["image"], right["image"]]))
        assert whole["name"] == left["name"] + right["name"]
    order = torch.cat([b["index"] for b in run])
    assert sorted(order[:10].tolist()) == sorted(order[10:20].tolist()) == list(range(10))
    assert order[:10].tolist() != order[10:20].tolist()                          # every epoch in its own order
    assert not torch.equal(order, torch.cat([b["index"] for b in take(8, toy, 4, seed=4)]))


def test_batch_larger_than_the_dataset_wraps_around():
    batch = take(1, data.Toy("val", length=3), 8, seed=0)[0]
    assert sorted(batch["index"].tolist())[:6] == [0, 0, 0, 1, 1, 1] or len(set(batch["index"].tolist())) == 3
    assert len(batch["name"]) == 8


# -- sampling, generation, evaluation ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy_files(tmp_path_factory):
    """A base model, its judges and an adapter of the toy's real sizes, at random; three layouts in labels/."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    preset, classes = PRESETS["toy"], class_table("toy")
    save_base(folder / "toy.safetensors", dict(
        unet=UNet(preset.unet), vae=VAE(preset.vae), text=TextEncoder(**preset.text), judge=UperNet(19, **JUDGE),
        domain=Classifier(5)), token_ids=range(100))
    model = ALDM(preset, *load_frozen("toy", folder / "toy.safetensors")[:3], classes)
    for p in model.adapter.parameters():
        p.data += 0.02 * torch.randn_like(p)
    meta = dict(preset="toy", dataset="toy", names=classes.names, palette=classes.palette, adapter="controlnet",
                hint="classes", step=0)
    save_adapter(folder / "adapter.safetensors", model, meta)
    names = ("road", "sky")
    model.classes = SimpleNamespace(names=names, palette=np.array([(1, 2, 3), (4, 5, 6)]))
    save_adapter(folder / "other.safetensors", model, {**meta, "dataset": "elsewhere", "names": names,
                                                       "palette": model.classes.palette})
    (folder / "labels").mkdir()
    for i, label in enumerate(Toy("val", length=3).labels):
        Image.fromarray(label).save(folder / "labels" / f"street{i}.png")
    return folder


@pytest.fixture(scope="module")
def toy_model(toy_files):
    return sample.load_model(toy_files / "adapter.safetensors", toy_files / "toy.safetensors")


@pytest.fixture
def cli(toy_files, tmp_path, monkeypatch, capsys):
    """sample.py's command line, in this process, on the toy's files -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        files = ["--ckpt", toy_files / "adapter.safetensors"] * ("--ckpt" not in argv) + \
                ["--sd", toy_files / "toy.safetensors"] * ("--sd" not in argv)
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, [*files, "--device", "cpu", *argv])])
        code = 0
        try:
            sample.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return run


def pictures(folder):
    return {p.name: np.asarray(Image.open(p)) for p in sorted(folder.glob("*.png"))}


# -- generate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_an_image_depends_on_its_own_seed_alone(toy_model, eta):
    labels, seeds = torch.from_numpy(Toy("val", length=4).labels), [5, 6, 7, 5]
    prompts = ["a street at night", "", "a street in fog", "a street at night"]
    before = torch.get_rng_state()
    at_once = sample.generate(toy_model, labels, prompts, seeds, steps=3, eta=eta, cfg=2.0)
    assert torch.equal(before, torch.get_rng_state()) and at_once.dtype == np.uint8 and at_once.shape == (4, 64, 64, 3)
    for i in (3, 1):
        alone = sample.generate(toy_model, labels[i:i + 1], prompts[i:i + 1], seeds[i:i + 1], steps=3, eta=eta, cfg=2.0)
        assert np.abs(alone[0].astype(int) - at_once[i]).max() <= 1
    pairs = sample.generate(toy_model, labels, prompts, seeds, steps=3, eta=eta, cfg=2.0, batch=2)
    assert np.abs(pairs.astype(int) - at_once).max() <= 1
    other = sample.generate(toy_model, labels[:1], prompts[:1], [8], steps=3, eta=eta, cfg=2.0)
    assert np.abs(other[0].astype(int) - at_once[0]).mean() > 2


def test_generate_pads_with_void_and_crops_back(toy_model):
    label, seen = torch.from_numpy(Toy("val", length=1).labels)[:, :40, :50], []
    images = sample.generate(toy_model, label, ["x"], [0], steps=2, on_step=lambda i, x0_hat: seen.append(x0_hat.shape))
    assert images.shape == (1, 40, 50, 3) and seen == [(1, 16, 12, 16)] * 2
    padded = torch.full((1, 48, 64), IGNORE)
    padded[:, :40, :50] = label
    assert np.array_equal(images, sample.generate(toy_model, padded, ["x"], [0], steps=2)[:, :40, :50])


def test_fit_resizes_by_nearest():
    toy, sd15 = PRESETS["toy"], PRESETS["sd15"]
    label = torch.from_numpy(np.random.default_rng(0).integers(0, 19, (96, 200)))
    for preset, size, shape in ((toy, None, (64, 133)), (toy, 0, (96, 200)), (toy, 32, (32, 67)), (toy, 96, (96, 200)),
                                (toy, 128, (128, 267)), (sd15, None, (96, 200)), (sd15, 512, (512, 1067))):
        small = sample.fit(label, preset, size, "x")
        by_pil = Image.fromarray(label.numpy().astype(np.uint8)).resize(shape[::-1], Image.NEAREST)
        assert small.shape == shape and np.array_equal(small, np.asarray(by_pil))
    with pytest.raises(InputError, match="--size"):
        sample.fit(torch.zeros(3000, 3000).long(), toy, 0, "x")


def test_grid():
    a, b = np.full((4, 6, 3), 10, np.uint8), np.full((4, 6, 3), 20, np.uint8)
    picture = np.asarray(sample.grid([[a, b], [b]]))
    assert picture.shape == (2 * 8 + 2, 2 * 12 + 2, 3)
    assert (picture[:8, :12] == 10).all() and (picture[:8, 14:] == 20).all() and (picture[10:, :12] == 20).all()
    assert (picture[8:10] == 255).all() and (picture[:, 12:14] == 255).all() and (picture[10:, 14:] == 255).all()
    assert sample.grid([[np.zeros((200, 300, 3), np.uint8)] * 2]).size == (602, 200)       # large ones stay


@pytest.mark.parametrize("kind", ["t2i", "oft", "freestyle"])
def test_every_adapter_samples_from_its_file(kind, toy_files, tmp_path):
    classes = class_table("toy")
    model = ALDM(PRESETS["toy"], *load_frozen("toy", toy_files / "toy.safetensors")[:3], classes, kind)
    for p in model.adapter.parameters():
        p.data = p + 0.02 * torch.randn_like(p)
    save_adapter(tmp_path / "a.safetensors", model, dict(preset="toy", dataset="toy", names=classes.names, adapter=kind,
                                                         palette=classes.palette, hint=model.layout.kind, step=0))
    label = torch.from_numpy(Toy("val", length=1).labels)
    expected = sample.generate(model, label, ["night"], [0], steps=2)
    for merge in (True, False):
        loaded = sample.load_model(tmp_path / "a.safetensors", toy_files / "toy.safetensors", merge=merge)
        image = sample.generate(loaded, label, ["night"], [0], steps=2)
        assert np.abs(image.astype(int) - expected).max() <= 1


# -- formulas, against known cases and NumPy --------------------------------------------------------------------------


def test_frechet_distance():
    t = lambda v: torch.tensor(v, dtype=torch.float64)
    # in one dimension (m1 - m2)^2 + (s1 - s2)^2; where the axes are the same, the sum of these
    assert sample.frechet_distance(t([1.]), t([[4.]]), t([4.]), t([[25.]])) == pytest.approx(9 + 9)
    diagonal = t([0., 1.]), torch.diag(t([9., 1.])), t([2., 1.]), torch.diag(t([1., 16.]))
    assert sample.frechet_distance(*diagonal) == pytest.approx(4 + 4 + 9)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 7)), rng.normal(size=(60, 7)) @ rng.normal(size=(7, 7)) + 1
    c1, c2 = np.cov(x.T), np.cov(y.T)
    cross = np.sqrt(np.linalg.eigvals(c1 @ c2).real).sum()          # of the product itself, which is not symmetric
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * cross
    ours = sample.frechet_distance(t(x.mean(0)), t(c1), t(y.mean(0)), t(c2))
    assert ours == pytest.approx(expected, rel=1e-9)
    assert sample.frechet_distance(t(x.mean(0)), t(c1), t(x.mean(0)), t(c1)) == pytest.approx(0, abs=1e-9)
    few = torch.cov(t(rng.normal(size=(4, 7))).T)                   # singular covariances, as of few images
    assert 0 <= sample.frechet_distance(t(np.zeros(7)), few, t(np.zeros(7)), few) < 1e-6


def test_precision_recall():
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(40, 3)), rng.normal(size=(30, 3)) * 0.6 + 0.5

    def share(points, among, k):
        hits = 0
        for p in points:
            hits += any(np.linalg.norm(p - q) <= sorted(np.linalg.norm(q - r) for r in among)[k] for q in among)
        return hits / len(points)

    for k in (1, 3):
        assert sample.precision_recall(torch.tensor(real), torch.tensor(fake), k) == \
            pytest.approx((share(fake, real, k), share(real, fake, k)))
    assert sample.precision_recall(torch.tensor(real), torch.tensor(real)) == (1, 1)
    assert sample.precision_recall(torch.tensor(real), torch.tensor(real) + 100) == (0, 0)
    one_mode = torch.tensor(real[:10] * 1e-3)                       # precise, but without variety
    precision, recall = sample.precision_recall(torch.tensor(real), one_mode)
    assert precision == 1 and recall < 0.2


def test_diversity():
    features = torch.tensor([[[0., 0], [3, 4], [0, 0]], [[1., 1], [1, 1], [1, 1]]])
    assert sample.diversity(features) == pytest.approx((5 + 5 + 0) / 3 / 2)


def test_toy_edit_names_another_domain():
    scenes = Toy("val", DOMAINS, length=40)
    for i, caption in enumerate(scenes.captions.values()):
        edited, target = sample.toy_edit(caption, i // 5)
        assert target != i % 5 and edited.endswith(sample.PHRASES[DOMAINS[target]][0])
        assert edited.split(" with ")[-1].rpartition(",")[0] == caption.split(" with ")[-1].rpartition(",")[0]
    assert {sample.toy_edit("a street at night", i)[1] for i in range(4)} == {0, 2, 3, 4}


def test_evaluate_against_confusion_by_hand(monkeypatch):
    """Images whose red is the class: the judge reads it back, the generator makes known mistakes."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (5, 8, 8))
    labels[0, 0] = IGNORE
    paint = lambda label: np.repeat(label[..., None] % 256 * 10, 3, -1).astype(np.uint8)
    wrong = np.where(labels == 2, 1, labels)                        # it never paints class 2
    items = [dict(label=torch.tensor(y), image=sample.from_pixels(paint(y)[None], "cpu")[0], name=str(i),
                  caption=f"c{i}") for i, y in enumerate(labels)]
    asked = []

    def generate(model, label, prompts, seeds, batch, steps):
        asked.extend(zip(prompts, seeds))
        index = [next(i for i in range(5) if np.array_equal(labels[i], y)) for y in label]
        return paint(wrong[index])

    class Judge:
        def __call__(self, x):
            return F.one_hot(((x[:, 0] + 1) * 12.75).round().long().clamp(max=3), 4).permute(0, 3, 1, 2)

        def features(self, x):
            return [x]
    monkeypatch.setattr(sample, "generate", generate)
    vae = SimpleNamespace(encode=lambda x: -x, decode=lambda z: -z)
    model = SimpleNamespace(classes=SimpleNamespace(names=("a", "b", "c")), device="cpu", vae=vae)
    classifier, edit = lambda x: torch.tensor([[0., 1, 0]]).expand(len(x), 3), lambda caption, i: (f"{caption}!", i % 3)
    result = sample.evaluate(model, items, Judge(), classifier, edit, "xyz", n=3, batch=2, steps=7, seed=4)
    valid = labels != IGNORE
    iou = [((labels == c) & (wrong == c) & valid).sum() / ((labels == c) | (wrong == c))[valid].sum() for c in range(3)]
    assert result["mIoU_generated"] == pytest.approx(np.mean(iou), abs=1e-5)
    assert result["mIoU_real"] == result["mIoU_reconstructed"] == 1
    assert list(result["IoU_generated"].values()) == pytest.approx(iou, abs=1e-5) and iou[2] == 0
    assert result["layouts"] == 5 and result["editability"] == 0.4       # targets 0 1 2 0 1, answers 1
    assert result["editability_of"] == {"x": 0, "y": 1, "z": 0}
    assert result["diversity"] == result["diversity_pixels"] == 0        # this generator does not heed the seed
    f = lambda y: paint(y).reshape(5, 64, 3).mean(1) / 127.5 - 1
    mu, cov = zip(*((v.mean(0), np.cov(v.T)) for v in (f(labels), f(wrong))))
    root = np.sqrt(np.linalg.eigvals(cov[0] @ cov[1]).real.clip(0)).sum()
    expected = ((mu[0] - mu[1]) ** 2).sum() + np.trace(cov[0]) + np.trace(cov[1]) - 2 * root
    assert result["frechet_distance"] == pytest.approx(expected, abs=1e-4)
    assert len(asked) == len(set(asked)) == 5 * (1 + 1 + 2)              # of each layout: plain, edited, two more
    assert asked[0] == ("c0", sample.image_seed(4, "0/0"))
    assert sample.evaluate(model, items[:1], Judge(), n=1, steps=1)["frechet_distance"] is None


@pytest.mark.parametrize("data", ["toy", "ade20k", "coco"])
def test_classes_txt_is_read_back(data, tmp_path):
    ours = class_table(data)
    (tmp_path / "classes.txt").write_text(sample.classes_txt(ours))
    again = class_table(tmp_path)
    colours = list(map(tuple, ours.palette))
    assert again.names == ours.names
    assert all(tuple(c) == colours[i] for i, c in enumerate(again.palette) if colours.index(colours[i]) == i)


# -- the command line -------------------------------------------------------------------------------------------------


def test_one_layout(cli, toy_files, tmp_path):
    label = read_layout(toy_files / "labels" / "street0.png", "toy")
    colorize(label, "toy").save(tmp_path / "colours.png")
    layout = toy_files / "labels" / "street0.png"
    code, out, err = cli("--layout", layout, "--prompt", "a street at night", "--n", 2, "--seed", 3, "--steps", 2)
    assert code == 0 and "street0_3_grid.png" in out
    first = pictures(tmp_path / "samples")
    assert {name: p.shape for name, p in first.items()} == {"street0_3.png": (64, 64, 3), "street0_4.png": (64, 64, 3),
                                                            "street0_3_grid.png": (128, 3 * 128 + 4, 3)}
    cli("--layout", layout, "--prompt", "a street at night", "--n", 2, "--seed", 3, "--steps", 2, "--out", "again")
    assert all(np.array_equal(p, first[name]) for name, p in pictures(tmp_path / "again").items())
    cli("--layout", "colours.png", "--prompt", "a street at night", "--seed", 4, "--steps", 2, "--out", "colours")
    assert np.abs(pictures(tmp_path / "colours")["colours_4.png"].astype(int) - first["street0_4.png"]).max() <= 1


def test_says_what_is_done_to_sizes_and_long_prompts(cli, tmp_path):
    Image.fromarray(np.zeros((130, 200), np.uint8)).save(tmp_path / "odd.png")
    code, out, err = cli("--layout", "odd.png", "--prompt", "street " * 80 + "lighthouse", "--steps", 1)
    assert code == 0 and pictures(tmp_path / "samples")["odd_0.png"].shape == (64, 98, 3)
    notes = [line for line in err.splitlines() if line and "it/s" not in line and "DDIM" not in line]
    assert len(notes) == 3 and "77 tokens" in notes[0] and notes[0].endswith("lighthouse")
    assert "resized to 98 x 64" in notes[1] and "padded with void to 112 x 64" in notes[2]


def test_dataset_is_resumable_and_trains(cli, toy_files, tmp_path):
    shutil.copytree(toy_files / "labels", tmp_path / "in" / "labels")
    (tmp_path / "in" / "captions.json").write_text('{"street1": "a street with trees"}')
    (tmp_path / "in" / "labels" / "street0.png").unlink()
    Image.fromarray(np.zeros((64, 96), np.uint8)).save(tmp_path / "in" / "labels" / "wide.png")
    make = ["--layouts", "in", "--prompts", "night scene", "{caption}, in snow", "--n", 2, "--steps", 1, "--batch", 3,
            "--cfg", 1]
    code, out, err = cli(*make, "--out", "made")
    assert code == 0 and "12 new images" in out
    made = open_dataset(tmp_path / "made", size=64, grid=4)
    assert len(made) == 12 and made.classes.names == class_table("toy").names
    captions = json.loads((tmp_path / "made" / "captions.json").read_text())
    assert captions["street1_1_0"] == made[made.names.index("street1_1_0")]["caption"] == "a street with trees, in snow"
    assert captions["wide_0_1"] == "night scene" and captions["wide_1_0"] == "a photo of road, in snow"
    image, label = made.full(made.names.index("street2_0_1"))
    assert np.array_equal(label, read_layout(tmp_path / "in" / "labels" / "street2.png", "toy"))
    # what is missing comes back the same; what is there is not touched
    before = pictures(tmp_path / "made" / "images")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "made").glob("*/*.png")}
    for gone in ("images/street1_0_0.png", "labels/wide_1_1.png"):
        (tmp_path / "made" / gone).unlink()
    assert "2 new images" in cli(*make, "--out", "made")[1]
    assert sum(p.stat().st_mtime_ns != t for p, t in times.items()) == 4
    after = pictures(tmp_path / "made" / "images")
    assert before.keys() == after.keys() and all(np.abs(before[n].astype(int) - after[n]).max() <= 1 for n in before)
    assert "0 new images" in cli(*make, "--out", "made")[1]
    # other prompts under the same names
    code, out, err = cli("--layouts", "in", "--prompts", "day", "--out", "made")
    assert code == 2 and "night scene" in err


def test_shards_make_what_one_process_makes(cli, tmp_path):
    make = ["--layouts", "val", "--limit", 3, "--steps", 1, "--prompts", "{caption} x", "--cfg", 1]
    assert cli(*make, "--out", "whole")[0] == 0
    assert [cli(*make, "--out", "parts", "--shard", f"{i}/2", "--batch", 1)[0] for i in (1, 0)] == [0, 0]
    whole, parts = (pictures(tmp_path / out / "images") for out in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(np.abs(whole[n].astype(int) - parts[n]).max() <= 1 for n in whole)
    assert (tmp_path / "whole" / "captions.json").read_text() == (tmp_path / "parts" / "captions.json").read_text()


def test_dataset_from_a_split_and_hostile_names(cli, tmp_path, monkeypatch):
    assert cli("--layouts", "val", "--limit", 2, "--steps", 1, "--out", "made")[0] == 0
    assert sorted(pictures(tmp_path / "made" / "labels")) == ["toy_10000000_0_0.png", "toy_10000001_0_0.png"]
    load = lambda i: dict(label=torch.zeros(64, 64).long(), caption="x")
    monkeypatch.setattr(sample, "find_layouts", lambda model, args: (["../../up", "/etc/abs", "..", "a b"], load))
    assert cli("--layouts", "val", "--steps", 1, "--out", "deep/er/made")[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "made"] and len(list(tmp_path.glob("deep/*"))) == 1
    assert sorted(pictures(tmp_path / "deep/er/made/images")) == ["_.._up_0_0.png", "__0_0.png", "_etc_abs_0_0.png",
                                                                  "a_b_0_0.png"]


def test_evaluate_writes_one_json(cli, tmp_path):
    code, out, err = cli("--evaluate", "--limit", 5, "--steps", 1, "--n", 2, "--json", "e/figures.json")
    result = json.loads((tmp_path / "e" / "figures.json").read_text(), parse_constant=pytest.fail)      # no NaN
    assert code == 0 and "mIoU" in out and result["layouts"] == 5 and result["IoU_real"]["train"] is None
    assert all(0 <= result[key] for key in ("mIoU_generated", "mIoU_edited", "mIoU_real", "frechet_distance",
                                            "precision", "recall", "diversity", "editability"))


def test_evaluate_reads_a_segmenter_of_ours(cli, toy_files, tmp_path):
    net = UperNet(19, **PRESETS["toy"].segmenter)
    torch.save({f"segmenter.{k}": v for k, v in net.state_dict().items()}, tmp_path / "judge.pt")
    code, out, err = cli("--evaluate", "--limit", 1, "--steps", 1, "--n", 1, "--judge", "judge.pt")
    assert code == 0 and "evaluation.json" in out


def test_bench_counts_operations(cli):
    code, out, err = cli("--bench", "--steps", 3, "--batch", 2)
    (_, image), (_, step) = (line.split(", ")[:2] for line in out.splitlines()[1:])
    assert code == 0 and "64 x 64" in out and 0 < float(step.split()[0]) < 2 * float(image.split()[0])


BAD = {     # arguments -> a word of the one line that says so
    "nothing to do": ("", "nothing to do"),
    "no such layout": ("--layout no.png", "no.png"),
    "a folder": ("--layout .", "folder"),
    "not an image": ("--layout text.png", "text.png"),
    "unknown colours": ("--layout colours.png", "colours"),
    "ids out of range": ("--layout ids.png", "200"),
    "tiny": ("--layout tiny.png", "1 x 1"),
    "huge": ("--layout ok.png --size 9000", "Mpixel"),
    "steps 0": ("--layout ok.png --steps 0", "1 to 1000"),
    "steps -1": ("--layout ok.png --steps -1", "1 to 1000"),
    "steps 1001": ("--layout ok.png --steps 1001", "1 to 1000"),
    "steps 2.5": ("--layout ok.png --steps 2.5", "whole number"),
    "cfg nan": ("--layout ok.png --cfg nan", "--cfg"),
    "cfg inf": ("--layout ok.png --cfg inf", "--cfg"),
    "cfg negative": ("--layout ok.png --cfg -1", "--cfg"),
    "eta": ("--layout ok.png --eta 1.1", "0 to 1"),
    "n 0": ("--layout ok.png --n 0", "--n"),
    "batch 0": ("--layout ok.png --batch 0", "--batch"),
    "seed": ("--layout ok.png --seed -1", "--seed"),
    "size": ("--layout ok.png --size -64", "--size"),
    "shard": ("--layouts val --shard 2/2", "shard"),
    "no cuda": ("--layout ok.png --device cuda:99", "no such CUDA"),
    "device": ("--layout ok.png --device gpu", "cpu or cuda"),
    "unknown flag": ("--layout ok.png --sedd 1", "--sedd"),
    "no adapter": ("--layout ok.png --ckpt no.safetensors", "no.safetensors"),
    "text for an adapter": ("--layout ok.png --ckpt text.png", "text"),
    "base for an adapter": ("--layout ok.png --ckpt BASE", "--sd"),
    "adapter for a base": ("--layout ok.png --sd ADAPTER", "unet"),
    "truncated adapter": ("--layout ok.png --ckpt cut.safetensors", "cut"),
    "truncated base": ("--layout ok.png --sd cut.safetensors", "cut"),
    "another preset": ("--layout ok.png --preset sd15", "toy preset"),
    "another dataset": ("--layout ok.png --data ade20k", "150"),
    "no dataset": ("--layout ok.png --data nowhere", "classes.txt"),
    "other classes": ("--layout ok.png --data toy --ckpt OTHER", "elsewhere"),
    "no such folder": ("--layouts no/where", "no such folder"),
    "no such split": ("--layouts test", "splits"),
    "empty folder": ("--layouts empty", "no .png"),
    "broken layout in a folder": ("--layouts broken", "bad.png"),
    "onto the layouts": ("--layouts broken --out broken", "--out"),
    "no root": ("--evaluate --data cityscapes --root empty", "empty"),
    "no judge": ("--evaluate --data cityscapes --root city", "--judge"),
    "judge that is none": ("--evaluate --judge BASE", "toy.safetensors"),
    "no clip": ("--evaluate --features clip", "cache"),
    "out is a file": ("--layout ok.png --out text.png", "text.png"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, cli, toy_files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "try_to_load_from_cache", lambda *_: None)
    save = lambda name, *shape, value=0: Image.fromarray(np.full(shape, value, np.uint8)).save(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    save("ok.png", 64, 64), save("ids.png", 64, 64, value=200), save("colours.png", 64, 64, 3, value=77)
    save("tiny.png", 1, 1), save("broken/bad.png", 64, 64, value=200)
    (tmp_path / "text.png").write_text("not what you think")
    if case == "no judge":
        write_toy(tmp_path / "city", "cityscapes", "val", 1, ("day",))
    whole = (toy_files / "adapter.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:len(whole) // 2])
    words = {"BASE": toy_files / "toy.safetensors", "ADAPTER": toy_files / "adapter.safetensors",
             "OTHER": toy_files / "other.safetensors"}
    snapshot = lambda: {p: hashlib.md5(p.read_bytes()).digest() for p in tmp_path.rglob("*") if p.is_file()}
    capsys.readouterr()
    before, (flags, word) = snapshot(), BAD[case]
    code, out, err = cli(*(words.get(flag, flag) for flag in flags.split()))
    lines = err.splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("sample.py: ") and word in lines[0], err
    after = snapshot()
    assert {p for p in after if p.suffix == ".png"} == {p for p in before if p.suffix == ".png"}
    assert all(after[p] == before[p] for p in before)


# -- the page to paint layouts on -------------------------------------------------------------------------------------


LABEL = toy_scene(3)[1]


@pytest.fixture(scope="module")
def server():
    torch.manual_seed(0)
    preset = PRESETS["toy"]
    model = ALDM(preset, UNet(preset.unet), VAE(preset.vae), TextEncoder(**preset.text), class_table("toy")).eval()
    server = painter(model, 0, examples=[LABEL], prompts=["a street at night", "</script><b>"], steps=4)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def connect(server):
    return http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)


def call(server, path="/generate", body=None, method="POST", headers=()):
    body = json.dumps(body) if isinstance(body, dict) else body
    connection = connect(server)
    connection.request(method, path, body, dict(headers))
    answer = connection.getresponse()
    return answer, answer.read()


def lines(raw):
    return [json.loads(line) for line in raw.splitlines()]


def generate(server, **more):
    answer, raw = call(server, body={"layout": png(colorize(LABEL, "toy")), "prompt": "a street", "steps": 4, "cfg": 2, **more})
    assert answer.status == 200, raw
    return lines(raw)


def refused(answer, raw, status):
    assert answer.status == status and answer.headers["Content-Type"] == "application/json"
    error = json.loads(raw)["error"]
    assert error and "\n" not in error and "Traceback" not in error
    return error


def test_page(server):
    answer, raw = call(server, "/", method="GET")
    text = raw.decode()
    assert answer.status == 200 and answer.headers["Content-Type"].startswith("text/html")
    assert answer.headers["X-Content-Type-Options"] == "nosniff" and answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'self' 'unsafe-inline' data:")
    world = json.loads(text.split('id="world">')[1].split("</script>")[0])
    assert world["width"] == world["height"] == 64 and world["prompts"][1] == "</script><b>"
    assert base64.b64decode(world["examples"][0]) == LABEL.tobytes()
    assert [c["name"] for c in world["classes"]][:3] == ["road", "sidewalk", "building"]
    assert {c["id"] for c in world["classes"] if c["common"]} == set(np.unique(LABEL).tolist())
    assert not any(word in text for word in ('src="http', "@import", "url(http", '<link rel="stylesheet'))
    assert call(server, "/../data.py", method="GET")[0].status == 404
    assert server.server_address[0] == "127.0.0.1"


def test_generate_streams_the_same_picture_for_the_same_seed(server):
    a, b, c = generate(server, seed=5), generate(server, seed=5), generate(server, seed=6)
    assert a[0] == {"queued": 0} and [x["step"] for x in a if "step" in x] == [1, 2, 3, 4] and a[-1]["done"]
    assert a[-1]["image"] == b[-1]["image"] != c[-1]["image"]
    assert 1 <= sum("image" in x for x in generate(server, steps=20)) <= 7
    for line in a:
        if "image" in line:
            image = Image.open(io.BytesIO(base64.b64decode(line["image"])))
            assert image.format == "PNG" and image.size == (64, 64) and image.mode == "RGB"
    ids = png(Image.fromarray(LABEL))
    assert generate(server, seed=5, layout=ids)[-1]["image"] == a[-1]["image"]
    note = next(x["note"] for x in generate(server, prompt="street " * 90 + "zebra") if "note" in x)
    assert "zebra" in note


def test_layout_files(server):
    big = Image.fromarray(LABEL).resize((128, 96), Image.NEAREST)
    answer, raw = call(server, "/layout", {"layout": png(big)})
    reply = json.loads(raw)
    assert reply["size"] == [128, 96] and len(base64.b64decode(reply["layout"])) == 64 * 64
    ids = Image.fromarray(np.full((64, 64), 8, np.uint8))               # train id 8 is vegetation, label id 8 is sidewalk
    for name, c in (("a_labelTrainIds.png", 8), ("a_gtFine_labelIds.png", 1), ("../../x", 8), (None, 8)):
        reply = json.loads(call(server, "/layout", {"layout": png(ids), "name": name})[1])
        assert set(base64.b64decode(reply["layout"])) == {c}


@pytest.mark.parametrize("change, says", [
    ({"steps": 0}, "steps"), ({"steps": 1001}, "steps"), ({"steps": 2.5}, "steps"), ({"steps": True}, "steps"),
    ({"steps": None}, "steps"), ({"seed": -1}, "seed"), ({"seed": 2**32}, "seed"), ({"seed": "1"}, "seed"),
    ({"cfg": float("nan")}, "cfg"), ({"cfg": 1e9}, "cfg"), ({"prompt": 5}, "prompt"), ({"prompt": "x" * 2001}, "prompt"),
    ({"negative": ["x"]}, "negative"), ({"prompt": "\ud800"}, "prompt"), ({"layout": None}, "layout"), ({"layout": "%%%"}, "layout"),
    ({"layout": "\u00e9"}, "layout"), ({"layout": base64.b64encode(b"GIF89a").decode()}, "the layout: "),
    ({"layout": png(Image.new("RGB", (64, 64), (1, 2, 3)))}, "(1, 2, 3)"),
    ({"layout": png(Image.new("L", (64, 64), 99))}, "99 (4096 pixels)"),
    ({"layout": png(Image.new("L", (64, 64)))[:60]}, "the layout: "),
    ({"layout": png(Image.new("L", (4, 4)))}, "4 x 4")])
def test_bad_values(server, change, says):
    body = {"layout": png(colorize(LABEL, "toy")), "prompt": "a street", "steps": 2, **change}
    error = refused(*call(server, body=body), 400)
    assert says in error and "/tmp" not in error


@pytest.mark.parametrize("body", ["", "{", "[]", "[1]", "5", "null", "[" * 100_000, b"\xff\xfe", '{"layout": ' + "9" * 5000 + "}"])
def test_bad_json(server, body):
    refused(*call(server, body=body), 400)


def test_size_limit(server):
    assert "4194304" in refused(*call(server, body=b" " * (BODY + 1)), 413)
    connection = connect(server)                                        # refused before it is sent
    connection.putrequest("POST", "/generate")
    connection.putheader("Content-Length", "99999999999")
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    for length in (None, "-1", "1e3", "9" * 30):
        connection = connect(server)
        connection.putrequest("POST", "/generate")
        if length:
            connection.putheader("Content-Length", length)
        connection.endheaders()
        assert connection.getresponse().status == 400
    assert generate(server)[-1]["done"]


def test_only_this_origin(server):
    port = server.server_port
    body = {"layout": png(colorize(LABEL, "toy")), "steps": 1}
    for origin in ("http://evil.example", "null", "https://localhost", f"http://localhost:{port + 1}", f"https://localhost:{port}"):
        refused(*call(server, body=body, headers={"Origin": origin}), 403)
        refused(*call(server, "/", method="GET", headers={"Origin": origin}), 403)
    for host in ("evil.example", f"evil.example:{port}", "localhost", f"127.0.0.1:{port + 1}", f"localhost.evil.example:{port}", ""):
        refused(*call(server, body=body, headers={"Host": host}), 403)
        refused(*call(server, "/", method="GET", headers={"Host": host}), 403)
    for name in ("localhost", "127.0.0.1"):
        headers = {"Origin": f"http://{name}:{port}", "Host": f"{name}:{port}"}
        assert call(server, body=body, headers=headers)[0].status == 200


def test_two_at_once_are_both_answered_in_turn(server):
    alone = generate(server, seed=1, steps=10)[-1]["image"]
    results = {}
    threads = [threading.Thread(target=lambda k=k: results.update({k: generate(server, seed=k, steps=10)})) for k in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results[k][-1]["done"] for k in (1, 2, 3)) and results[1][-1]["image"] == alone
    assert max(line.get("queued", 0) for k in results for line in results[k]) >= 1


def test_a_client_that_leaves_stops_its_generation(server):
    body = json.dumps({"layout": png(colorize(LABEL, "toy")), "steps": 1000})
    answers = []
    for ahead in (0, 1):
        connection = connect(server)
        connection.request("POST", "/generate", body)
        answers.append(connection.getresponse())
        assert json.loads(answers[-1].readline()) == {"queued": ahead}
    for answer in reversed(answers):
        answer.close()
    start = time.time()
    assert generate(server, steps=2)[-1]["done"] and time.time() - start < 15


def test_a_failure_is_one_line_and_the_server_lives_on(server, monkeypatch):
    import sample
    monkeypatch.setattr(sample, "generate_steps", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no\n memory")))
    assert generate(server)[-1] == {"error": "the generation failed: no memory"}
    monkeypatch.undo()
    assert generate(server)[-1]["done"]


def test_classes_that_share_a_colour(server):
    import sample
    model = type("Model", (), dict(classes=class_table("ade20k"), preset=PRESETS["toy"], schedule=type("S", (), dict(alphas_cumprod=[0] * 9))))
    ade = sample.painter(model, 0)
    threading.Thread(target=ade.serve_forever, daemon=True).start()
    world = json.loads(call(ade, "/", method="GET")[1].decode().split('id="world">')[1].split("</script>")[0])
    assert [c["name"] for c in world["classes"] if c["twin"]] == ["skyscraper"] and world["examples"] == []
    assert len(world["classes"]) == 150 + ([0, 0, 0] not in model.classes.palette.tolist())
    reply = json.loads(call(ade, "/layout", {"layout": png(Image.fromarray(np.full((8, 8), 49, np.uint8)))})[1])
    assert set(base64.b64decode(reply["layout"])) == {48}               # the id in the file is one more
    ade.shutdown()
    ade.server_close()


# -- training: resume, signals, bad input -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def toy_world(tmp_path_factory):
    """A folder: toy.safetensors, a base model of random weights; city, eight toy scenes in Cityscapes' layout."""
    folder, preset = tmp_path_factory.mktemp("world"), PRESETS["toy"]
    torch.manual_seed(0)
    save_base(folder / "toy.safetensors", dict(
        unet=UNet(preset.unet), vae=VAE(preset.vae), text=TextEncoder(**preset.text), judge=UperNet(19, **JUDGE),
        segmenter=UperNet(19, **preset.segmenter), domain=Classifier(5)), token_ids=range(200))
    write_toy(folder / "city", "cityscapes", "train", 8)
    return folder


@pytest.fixture(scope="session")
def flags(toy_world):
    """A training in seconds."""
    return [str(f) for f in (
        "--data", "cityscapes", "--root", toy_world / "city", "--preset", "toy", "--sd", toy_world / "toy.safetensors",
        "--device", "cpu", "--batch", 2, "--steps", 8, "--ddim-steps", 2, "--unroll", 1, "--ramp", "1:3", "--lazy", 1,
        "--d-start", 1, "--lambda-adv", 1, "--lr", 1e-3, "--save-every", 2, "--sample-every", 3, "--eval", 0)]


@pytest.fixture
def train_cli(flags, monkeypatch, capsys):
    """train.py's command line in this process, after these flags -> exit code, stdout, stderr."""
    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["train.py", *flags, *map(str, argv)])
        code = 0
        try:
            train.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return call


def start(*argv, **kw):
    return subprocess.Popen([sys.executable, "train.py", *map(str, argv)], cwd=HERE, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **kw)


def until(process, condition):
    while not condition() and process.poll() is None:
        time.sleep(0.002)
    assert condition(), process.stderr.read()


def end(process, code):
    err = process.communicate()[1]
    assert process.returncode == code, f"exit {process.returncode}, not {code}:\n{err[-3000:]}"
    assert "Traceback" not in err, err
    return [line for line in re.split("[\r\n]", err) if line.strip() and "it/s" not in line and "s/it" not in line]


def rows(out):
    return (out / "log.csv").read_text().count("\n") - 1 if (out / "log.csv").exists() else 0


def files(out):
    return sorted(p.name for p in out.iterdir()) if out.exists() else []


def same_run(a, b, where=""):
    """Nested dicts and lists of tensors and plain values are equal, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, (dict, list, tuple)):
        assert len(a) == len(b), where
        for key, value in a.items() if isinstance(a, dict) else enumerate(a):
            same_run(value, b[key], f"{where}/{key}")
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, where


# -- a run that is killed again and again -----------------------------------------------------------------------------


def test_a_killed_run_ends_as_if_it_had_not_been_killed(flags, train_cli, tmp_path, monkeypatch):
    """Six processes, as each must die another death: 35 s. One thread: several need not round alike on a busy machine."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    whole, out = tmp_path / "whole", tmp_path / "parts"
    run("train.py", *flags, "--out", whole, "--eval", 1)                # (the report does not disturb the run either)

    run_ = start(*flags, "--out", out, "--resume")                      # there is nothing to resume
    until(run_, lambda: any(re.match(r"\.\d+\.checkpoint", name) for name in files(out)))
    run_.kill()                                                         # in the midst of writing the first checkpoint
    assert any("step 0" in line for line in end(run_, -signal.SIGKILL))
    assert rows(out) == 2
    for left in (".1.checkpoint_0000002.pt", ".1.step_0000003.png", ".1.adapter.safetensors", ".tmpa1B2c3"):
        (out / left).write_text("half")

    run_ = start(*flags, "--out", out, "--resume")
    until(run_, lambda: rows(out) == 3)
    run_.send_signal(signal.SIGSTOP)
    code, _, err = train_cli("--out", out, "--resume")
    assert code == 2 and "another run is writing here" in err and err.count("\n") == 1
    run_.kill()                                                         # between two checkpoints
    end(run_, -signal.SIGKILL)
    code, _, err = train_cli("--out", out)
    assert code == 2 and "--resume" in err and err.count("\n") == 1

    for row, number in (4, signal.SIGTERM), (7, signal.SIGINT):
        run_ = start(*flags, "--out", out, "--resume")
        until(run_, lambda: rows(out) >= row)
        run_.send_signal(number)
        end(run_, 128 + number)
        assert rows(out) == int(sorted(out.glob("checkpoint_*.pt"))[-1].stem[-7:]) >= row
    run("train.py", *flags, "--out", out, "--resume")

    assert (whole / "log.csv").read_text() == (out / "log.csv").read_text() and rows(out) == 8
    assert not any(name.startswith(".") for name in files(out) if name != ".lock")
    load = lambda folder: torch.load(folder / "checkpoint_0000008.pt", weights_only=True)
    assert load(whole).keys() == {"step", "meta", "adapter", "layout", "discriminator", "opt_g", "opt_d"}
    same_run(load(whole), load(out))
    same_run(load_file(whole / "adapter.safetensors"), load_file(out / "adapter.safetensors"))
    pictures = [f"step_000000{i}.png" for i in (3, 6, 8)]
    assert [name for name in files(out) if name.startswith("step")] == pictures
    assert all((whole / name).read_bytes() == (out / name).read_bytes() for name in pictures)
    assert [p.name for p in sorted(whole.glob("c*.pt"))] == ["checkpoint_0000006.pt", "checkpoint_0000008.pt"]
    code, _, err = train_cli("--out", whole)
    assert code == 2 and "--resume" in err and err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_while_it_starts(number, flags, tmp_path):
    for i, seconds in enumerate((0.3, 1, 2.5)):                         # imports and all that is before the first step
        run_ = start(*flags, "--out", tmp_path / str(i), start_new_session=True)
        time.sleep(seconds)
        os.killpg(run_.pid, number)                                     # as a terminal does: all of its processes
        assert end(run_, 128 + number) == []


def test_full_disk(flags, train_cli, tmp_path):
    out = tmp_path / "out"
    assert train_cli("--out", out, "--steps", 2)[0] == 0
    before = (out / "checkpoint_0000002.pt").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000,) * 2)        # a checkpoint has 30 MB
    lines = end(start(*flags, "--out", out, "--resume", preexec_fn=limit), 1)
    assert len(lines) == 1 and str(out / "checkpoint_0000002.pt") in lines[0] and "disk" in lines[0]
    assert (out / "checkpoint_0000002.pt").read_bytes() == before
    assert [name for name in files(out) if name[0] in ".c"] == [".lock", "checkpoint_0000002.pt"]


# -- the folder of a run, with next to nothing to train ---------------------------------------------------------------


def little_run(out, steps=4, resume=False, step_fn=None, on_sample=None, **kw):
    """A Run of a layer with two weights that adds one to them in each step -> the layer."""
    layer = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(layer.weight)
    args = SimpleNamespace(**{**dict(out=out, steps=steps, resume=resume, seed=0, save_every=1, sample_every=99, keep=2,
                                     columns=["noise", "adv", "dropped"]), **kw})
    job = train.Run(args, {"layer": layer}, {"dataset": "toy", "names": ["a"]})

    def add_one(step):
        layer.weight.data += 1
        return {"noise": torch.rand(()), "dropped": torch.tensor(0.)}
    job.loop(step_fn or add_one, on_sample)
    return layer


def test_keeps_the_last_and_every_tenth_checkpoint(tmp_path):
    (tmp_path / "checkpoint_best.pt").write_text("of the user")
    little_run(tmp_path, 47, save_every=2, keep=3)
    steps = [int(p.stem[-7:]) for p in tmp_path.glob("checkpoint_0*.pt")]
    assert sorted(steps) == [20, 40, 44, 46, 47] and rows(tmp_path) == 47


DAMAGE = {"truncated": lambda b: b[:len(b) // 2], "empty": lambda b: b"", "text": lambda b: b"not a checkpoint",
          "a flipped byte": lambda b: b.replace(b"\0\0\x80\x40\0\0\x80\x40", b"\0\0\x81\x40\0\0\x80\x40")}      # (4, 4)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint(damage, tmp_path, capsys):
    little_run(tmp_path)
    log = (tmp_path / "log.csv").read_text()
    newest, before = tmp_path / "checkpoint_0000004.pt", tmp_path / "checkpoint_0000003.pt"
    whole = newest.read_bytes()
    newest.write_bytes(damage(whole))
    assert newest.read_bytes() != whole
    capsys.readouterr()
    layer = little_run(tmp_path, resume=True)                           # falls back to the one before, with a line
    lines = [line for line in capsys.readouterr().err.splitlines() if "it/s" not in line and line]
    assert len(lines) == 1 and str(newest) in lines[0] and before.name in lines[0]
    assert layer.weight.tolist() == [[4, 4]] and (tmp_path / "log.csv").read_text() == log
    newest.with_suffix(".pt.damaged").unlink()                          # it was set aside, and is whole again
    assert little_run(tmp_path, resume=True).weight.tolist() == [[4, 4]]
    for path in newest, before:
        path.write_bytes(damage(path.read_bytes().replace(b"\0\0\x40\x40", b"\0\0\x80\x40")))
    content = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    with pytest.raises(InputError, match="no other checkpoint is whole") as refused:
        little_run(tmp_path, resume=True)
    assert "\n" not in str(refused.value) and content == {n: (tmp_path / n).read_bytes() for n in files(tmp_path)}


@pytest.mark.parametrize("damage", [lambda log: log[:-9], lambda log: log + "4,0.5", lambda log: log[:-2] + "12,0\0",
                                    lambda log: log + "4,1,,0\r\n5,1,,0\r\n\r\n\xff", lambda log: "", lambda log: "5,"])
def test_a_log_that_was_torn(damage, tmp_path):
    little_run(tmp_path, 3)
    log = tmp_path / "log.csv"
    log.write_text(damage(log.read_text()), "latin1", newline="")
    little_run(tmp_path, 4, resume=True)
    lines = list(csv.DictReader(open(log, newline="")))
    assert all(line.keys() == {"step", "noise", "adv", "dropped"} and float(line["noise"]) >= 0 for line in lines)
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)) and steps[-1] == "4" and set(steps) <= set("1234")


def test_the_picture_is_drawn_before_the_checkpoint(tmp_path):
    """So that a run that is killed between the two lacks nothing when it is resumed."""
    def full(step):
        raise OSError(28, "No space left on device")
    with pytest.raises(train.Stopped, match="No space left.*checkpoint_0000002.pt$"):
        little_run(tmp_path, 4, sample_every=3, on_sample=full)
    drawn = []
    little_run(tmp_path, 4, resume=True, sample_every=3, on_sample=drawn.append)
    assert drawn == [3, 4] and rows(tmp_path) == 4


def test_ten_dropped_steps_in_a_row_stop_a_run(tmp_path):
    def step(step):
        dropped = 3 <= step < 12 or step > 20
        losses = {"noise": torch.tensor(float("nan")), "dropped": torch.tensor(1. if dropped else 0.)}
        return losses if step % 2 else {**losses, "adv": torch.tensor(1.)}
    with pytest.raises(train.Stopped, match="step 31: .* the generator .*checkpoint_0000030.pt$"):
        little_run(tmp_path / "a", 99, step_fn=step, save_every=6)
    assert rows(tmp_path / "a") == 31                                   # nine in a row did not stop it

    def adversarial(step):      # every second step has an adversarial term, and is dropped
        losses = {"noise": torch.tensor(1.), "dropped": torch.tensor(2. * (step % 2))}
        return {**losses, "adv": torch.tensor(1.)} if step % 2 else losses
    with pytest.raises(train.Stopped, match="step 20: .* the discriminator .*: none"):
        little_run(tmp_path / "b", 99, step_fn=adversarial, save_every=50)


# -- a step -----------------------------------------------------------------------------------------------------------


def setting(**kw):
    args = dict(d_start=0, lazy=1, discriminator="trained", lambda_adv=1., ramp=(0, 1), t_max=1000, unroll=1,
                ddim_steps=4, unroll_grad="first", group=0, fake_weight=0.5,
                device="cpu", bf16=False)
    return SimpleNamespace(**{**args, **kw})


def make_trainee():
    """Model, discriminator, their optimisers, and a batch."""
    model = tiny_model()
    D = UperNet(20, **PRESETS["toy"].segmenter).eval().requires_grad_(False)
    opt_g, opt_d = (torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True) for net in (model.adapter, D))
    toy = data.Toy(length=2)
    items = {key: [toy[i][key] for i in range(2)] for key in ("image", "label", "caption")}
    items |= {key: torch.stack(items[key]) for key in ("image", "label")}
    return model, D, opt_g, opt_d, train.prepare(model, items, slice(0, 2))


trainee = pytest.fixture(make_trainee)


def snapshot(*parts):
    return [copy.deepcopy(part.state_dict()) for part in parts]


POISON = {      # what is not finite -> the code of what is dropped
    "latents": 3, "the discriminator's loss": 2, "the discriminator's weights": 3}


@pytest.mark.parametrize("what", POISON)
def test_a_step_that_is_not_finite_is_dropped(what, trainee):
    model, D, opt_g, opt_d, batch = trainee
    args, poisoned = setting(), batch
    step = lambda batch, args: train.train_step(model, D, opt_g, opt_d, [batch], 5, args)
    assert step(batch, args)["dropped"] == 0
    if what == "latents":
        poisoned = {**batch, "x0": batch["x0"].index_fill(0, torch.tensor(1), float("nan"))}
    elif what == "the discriminator's loss":
        args = setting(fake_weight=float("inf"))
    else:
        D.state_dict()[aldm.LAST[1]][0] = float("inf")
    before = snapshot(model.adapter, opt_g), snapshot(D, opt_d)
    losses = step(poisoned, args)
    assert losses["dropped"] == POISON[what] and set(losses) == {"noise", "adv", "D_real", "D_fake", "dropped"}
    for code, old, parts in (1, before[0], (model.adapter, opt_g)), (2, before[1], (D, opt_d)):
        if POISON[what] & code:
            same_run(old, snapshot(*parts))
        else:
            with pytest.raises(AssertionError):
                same_run(old, snapshot(*parts))
    if what != "the discriminator's weights":
        assert step(batch, setting())["dropped"] == 0                   # and the next one is as ever


@pytest.mark.parametrize("loss,gradient", [(float("nan"), 1.), (1., float("inf")), (float("inf"), float("nan"))])
def test_update_looks_at_loss_and_gradient(loss, gradient):
    p = torch.nn.Parameter(torch.ones(3))
    opt = torch.optim.AdamW([p], lr=0.1, fused=True)
    p.grad = torch.tensor([1., gradient, 1.])
    assert train.update(opt, {"a": torch.tensor(1.), "b": torch.tensor(loss)}) == 1
    assert p.tolist() == [1, 1, 1] and p.grad is None and opt.state[p]["step"] == 0
    p.grad = torch.ones(3)
    assert train.update(opt, {"a": torch.tensor(1.)}) == 0 and (p < 1).all() and opt.state[p]["step"] == 1


def test_each_network_learns_from_its_own_loss(trainee, monkeypatch):
    """The adversarial term passes through the discriminator, and leaves no gradient in it."""
    model, D, opt_g, opt_d, batch = trainee
    for p in model.adapter.parameters():
        p.data += 0.01 * torch.randn_like(p)
    fakes, grads = [], {}

    def generator_loss(*args):
        result = generator_loss.real(*args)
        fakes.append(result[2])
        return result

    def update(opt, losses, clip=None):
        grads[opt] = [p.grad.clone() for g in opt.param_groups for p in g["params"] if p.grad is not None]
        opt.zero_grad()
        return torch.tensor(0.)
    generator_loss.real = train.generator_loss
    monkeypatch.setattr(train, "generator_loss", generator_loss)
    monkeypatch.setattr(train, "update", update)
    for unroll_grad in ("first", "each", "full"):
        reference = UperNet(20, **PRESETS["toy"].segmenter).train()
        reference.load_state_dict(D.state_dict())
        train.train_step(model, D, opt_g, opt_d, [batch], 5, setting(unroll_grad=unroll_grad))
        real = model.vae.decode(batch["x0"]).clamp(-1, 1).detach()
        loss, _ = discriminator_loss(*reference(torch.cat([real, fakes.pop()])).chunk(2), batch["label"], 0.5)
        loss.backward()
        assert not D.training and all(not p.requires_grad and p.grad is None for p in D.parameters())
        for opt, net in (opt_g, model.adapter), (opt_d, D):
            assert len(grads[opt]) == len([*net.parameters()])
        for p, g in zip(reference.parameters(), grads[opt_d]):
            assert torch.allclose(p.grad, g, rtol=1e-4, atol=1e-7)


def noise_gradient(model, D, opt_g, opt_d, micro_batches):
    """The gradient of the noise loss with which the adapter is updated. Randomness is that of a scene, wherever in a
    batch it stands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda x: torch.sin(1000 * x))
        patch.setattr(torch, "randint", lambda low, high, size, device=None: torch.full(size, (low + high) // 2))
        seen = []
        patch.setattr(opt_g, "step", lambda: seen.extend(p.grad.flatten() for p in model.adapter.parameters()
                                                         if p.grad is not None))
        losses = train.train_step(model, D, opt_g, opt_d, micro_batches, 5, setting(discriminator="none"))
    return torch.cat([*seen, losses["noise"].view(1)])


def halves(batch):
    return [{key: value[i:i + 1] for key, value in batch.items()} for i in range(2)]


def near(a, b):
    return a.abs().max() > 0 and (a - b).abs().max() < 1e-4 * a.abs().max()


def test_accumulated_batches_are_one_batch(trainee):
    *parts, batch = trainee
    joint, parted, half = (noise_gradient(*parts, micro) for micro in ([batch], halves(batch), halves(batch)[:1]))
    assert near(joint, parted) and not near(joint, half)


def slow_step(model, D, batch, args):
    """Sec. 3 as it is written, with none of our savings: the class embeddings looked up pixel by pixel, a graph through
    the whole UNet, every estimate decoded and judged on its own, loops over images and classes, a second pass for D's
    fakes. -> losses, gradients of the adapter, gradients of D"""
    label, x0, context = batch["label"], batch["x0"], batch["context"]
    a, timesteps = model.schedule.alphas_cumprod, model.schedule.ddim_timesteps(args.ddim_steps).tolist()
    noise = torch.randn_like(x0)                                    # the same draws, in the same order
    start = torch.randint(args.unroll, args.ddim_steps, (len(x0),)).tolist()
    embeddings = model.layout.table[label.where(label != IGNORE, 19)].permute(0, 3, 1, 2)           # [B,C,H,W]
    hint = F.avg_pool2d(embeddings, 2)
    model.unet.requires_grad_(True)

    def eps_of(x, t):
        control = model.adapter(x, t, context, hint)
        return model.unet(x, t, context, control=control)

    def balanced(logits, label):            # 1/C times the mean over the classes present of the class's mean CE
        ce = -F.log_softmax(logits, 1).gather(1, label.where(label != IGNORE, 0)[:, None])[:, 0]
        present = [c for c in range(19) if (label == c).any()]
        n, maps = (label != IGNORE).sum(), torch.zeros_like(ce)
        for c in present:
            maps = maps + ce * (label == c) * n / ((label == c).sum() * len(present) * logits.shape[1])
        return maps, maps.sum() / n

    def chain():
        x, estimates, predicted = [], [], []
        for i in range(len(x0)):
            t = timesteps[start[i]]
            x.append(a[t].sqrt() * x0[i] + (1 - a[t]).sqrt() * noise[i])
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
        images = torch.cat([model.vae.decode(z[None]).clamp(-1, 1) for z in estimate])
        logits = torch.cat([D(image[None]) for image in images])
        return balanced(logits, label)

    eps, estimates = chain()
    maps = [judge(estimate)[0] for estimate in estimates]
    mean = torch.stack(maps).mean(0)
    if args.unroll_grad == "first":
        mean = maps[0] / maps[0].detach().clamp(min=1e-12) * mean.detach()
    noise_loss, adv = ((eps - noise) ** 2).mean(), mean.sum() / (label != IGNORE).sum()
    (noise_loss + args.lambda_adv * adv).backward()
    grads = [p.grad.clone() for p in model.adapter.parameters()]

    with torch.no_grad():
        fakes = model.vae.decode(chain()[1][0]).clamp(-1, 1)
        real = model.vae.decode(x0).clamp(-1, 1)
    D.train().requires_grad_(True)
    real_logits, fake_logits = D(torch.cat([real, fakes])).chunk(2)
    d_real, d_fake = balanced(real_logits, label)[1], -F.log_softmax(fake_logits, 1)[:, 19].mean()
    (d_real + args.fake_weight * d_fake).backward()
    losses = {"noise": noise_loss, "adv": adv, "D_real": d_real, "D_fake": d_fake}
    return losses, grads, [p.grad for p in D.parameters()]


@pytest.mark.parametrize("mode", ["first", "each", "full"])
def test_a_step_computes_what_the_paper_says(mode):
    """The fast step has the losses and gradients of the plain, slow one."""
    seen, (model, D, opt_g, opt_d, batch) = {}, make_trainee()
    for p in model.adapter.parameters():
        p.data += 0.02 * torch.randn_like(p)
    slow_model, slow_D, args = copy.deepcopy(model), copy.deepcopy(D), setting(unroll=2, unroll_grad=mode)
    for opt in opt_g, opt_d:
        opt.step = lambda opt=opt: seen.update({opt: [p.grad.clone() for p in opt.param_groups[0]["params"]]})
    torch.manual_seed(0)
    losses = train.train_step(model, D, opt_g, opt_d, [batch], 5, args)
    torch.manual_seed(0)
    want, adapter_grads, d_grads = slow_step(slow_model, slow_D, batch, args)
    for name, value in want.items():
        assert torch.allclose(losses[name], value, rtol=1e-4), name
    # (D learns with the statistics of its batch: over four images they amplify what is rounded)
    for got, grads, error in (seen[opt_g], adapter_grads, 1e-3), (seen[opt_d], d_grads, 1e-2):
        joint = [torch.cat([g.flatten() for g in gradients]) for gradients in (got, grads)]
        assert joint[1].norm() > 1e-4 and (joint[0] - joint[1]).norm() < error * joint[1].norm()


def test_torchrun(flags, trainee, tmp_path):
    """Two processes of one image each: their gradient is that of both images, and they train the same networks. They
    start one after the other on a single core: 25 s."""
    script = f"""
import sys, torch, train
sys.path.insert(0, {str(HERE)!r})
from {Path(__file__).stem} import halves, make_trainee, noise_gradient
build, kept, job = train.build, [], train.train
train.build = lambda args: kept.append(build(args)) or kept[0]
def check_and_train(args):
    *parts, batch = make_trainee()
    gradient = noise_gradient(*parts, [halves(batch)[train.rank()]])
    job(args)
    model, D, _ = kept[0]
    torch.save([gradient, model.adapter.state_dict(), D.state_dict()], f"rank{{train.rank()}}.pt")
train.train = check_and_train
train.main()
"""
    (tmp_path / "two.py").write_text(script)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
                    tmp_path / "two.py", *flags, "--batch", "1", "--steps", "4", "--out", "out"], cwd=tmp_path,
                   env={**os.environ, "PYTHONPATH": str(HERE)}, check=True, timeout=200)
    *parts, batch = trainee
    one, two = (torch.load(tmp_path / f"rank{i}.pt", weights_only=True) for i in range(2))
    same_run(one, two)
    assert near(noise_gradient(*parts, [batch]), one[0])
    saved = torch.load(tmp_path / "out" / "checkpoint_0000004.pt", weights_only=True)
    same_run(saved["adapter"], one[1]), same_run(saved["discriminator"], one[2])
    assert rows(tmp_path / "out") == 4 and not [name for name in files(tmp_path / "out") if re.match(r"\.[\dt]", name)]


# -- the cache --------------------------------------------------------------------------------------------------------


def test_the_cache_changes_nothing_but_the_time(toy_world, tmp_path, monkeypatch):
    model, both = tiny_model(), []
    dataset = data.open_dataset("cityscapes", toy_world / "city", size=64, grid=4)
    cache = train.Cache(tmp_path, dataset, model)
    for source in dataset, cache:
        torch.manual_seed(3)
        batch = train.prepare(model, next(data.batches(source, 4, seed=0)), slice(0, 4))
        both.append((batch, train.generator_loss(model, None, batch, 1, setting(lazy=2))[0].item()))
    (a, loss_a), (b, loss_b) = both
    assert torch.equal(a["label"], b["label"]) and loss_a == pytest.approx(loss_b, rel=1e-3)
    assert torch.allclose(a["x0"], b["x0"], atol=2e-3) and torch.allclose(a["context"], b["context"], atol=2e-3)
    assert len({dataset[key]["flip"] for key in data.batch_keys(8, 4, 0, 0, 0, 1)}) == 2
    # a crop is cut from the latents of the whole
    wide = data.open_dataset("cityscapes", toy_world / "city", size=32, grid=4)             # resized to 32 x 64
    places, cut = set(), train.Cache(tmp_path / "wide", wide, model)
    for key in data.batch_keys(8, 8, 0, 0, 0, 1):
        item, cached = wide[key], cut[key]
        places.add((item["flip"], item["left"]))
        moments = torch.cat(model.vae.moments(wide.full(key[0], item["flip"])[0][None]), 1)[0]
        left = item["left"] // 4
        assert torch.allclose(moments[:, :, left:left + 8], cached["moments"].float(), atol=5e-3)
        assert torch.equal(item["label"], cached["label"].long())
    assert len(places) > 4
    # it is made once, and serves only what it was made of
    monkeypatch.setattr(train.Cache, "write", lambda *_: pytest.fail("written again"))
    content = {path: path.read_bytes() for path in tmp_path.glob("*.*")}
    train.Cache(tmp_path, dataset, model)
    next(model.vae.parameters()).data *= 1.01
    with pytest.raises(InputError, match="choose another folder"):
        train.Cache(tmp_path, dataset, model)
    next(model.vae.parameters()).data /= 1.01
    dataset.captions = {**dataset.captions, dataset.names[3]: "something else"}
    with pytest.raises(InputError, match="choose another folder"):
        train.Cache(tmp_path, dataset, model)
    assert content == {path: path.read_bytes() for path in tmp_path.glob("*.*")} and len(content) == 9


# -- the toy's base model, reports, --bench ---------------------------------------------------------------------------


def test_the_autoencoder_starts_as_the_principal_components():
    """Its first reconstructions are those of the best linear map of 4x4 patches to 16 numbers, by NumPy."""
    torch.manual_seed(0)
    vae, image = VAE(PRESETS["toy"].vae), sample.from_pixels(Toy("train", DOMAINS, 200).images, "cpu")
    train.linear_start(vae, image)
    patches = F.pixel_unshuffle(image, 4).permute(0, 2, 3, 1).reshape(-1, 48).double().numpy()
    best = np.linalg.eigvalsh(np.cov(patches.T))[:-16].sum() / 48
    with torch.no_grad():
        error = (vae.decode(vae.encode(image)) - image).square().mean().item()
        train.normalize_latents(vae, image)
        z = vae.encode(image)
        again = (vae.decode(z) - image).square().mean().item()
    assert best < error < 2 * best and np.isclose(error, again, rtol=1e-3)      # the last norm takes its share
    assert z.mean((0, 2, 3)).abs().max() < 1e-3 and abs(z.std() - 1) < 1e-3


def test_stages_make_a_base_that_trains(tmp_path):
    """--stage vae, base, judge fill one file, each resumable; an adapter trains on it, and is judged.
    Seven processes: 30 s."""
    base, common = tmp_path / "base.safetensors", ("--device", "cpu", "--steps", 2, "--batch", 4, "--scenes", 100)
    for stage in ("vae", "base", "judge"):
        run("train.py", "--stage", stage, "--sd", base, "--out", tmp_path / stage, *common)
        before = base.read_bytes()
        run("train.py", "--stage", stage, "--sd", base, "--out", tmp_path / stage, *common, "--resume")
        assert base.read_bytes() == before
    assert set(load_weights(base)) == {"vae", "unet", "text", "segmenter", "judge", "domain"}
    flags = ("--sd", base, "--device", "cpu", "--steps", 1, "--batch", 2, "--eval", 4, "--ddim-steps", 4)
    out = run("train.py", *flags, "--out", tmp_path / "run")
    after = json.loads((tmp_path / "run" / "judged.json").read_text())
    assert "before" in out and "trained in" in out and f"{after['mIoU_generated']:8.3f}" in out


def test_what_is_shipped_works(tmp_path):
    """assets/: the adapter fits the base model, obeys layouts (the judge finds 0.2 in what the base makes of prompts
    alone), and the autoencoder costs the judge at most a tenth."""
    model, parts = sample.load_model(), load_weights(aldm.base_file("toy"))
    judge = UperNet(19, **JUDGE)
    load_into(judge, parts["judge"], "judge", "cpu", torch.float32)
    toy = Toy("val", DOMAINS, length=10)
    result = sample.evaluate(model, [toy[i] for i in range(10)], judge.eval(), n=1, batch=10)
    assert result["mIoU_generated"] > 0.35 and result["mIoU_reconstructed"] > 0.9 * result["mIoU_real"] > 0.8


def test_report(tmp_path, toy_world):
    """A report's rows are runs; what is finished is not run again. Five processes: 21 s."""
    command = ("train.py", "--report", "discriminator", "--seeds", 1, "--jobs", 2, "--out", tmp_path, "--sd",
               toy_world / "toy.safetensors", "--device", "cpu", "--steps", 1, "--batch", 2, "--eval", 4, "--ddim-steps", 4)
    rows = [line for line in run(*command).splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:]] == [f"| `{name}`" for name in (
        "(the defaults)", "--discriminator frozen", "--discriminator none")]
    runs = sorted(tmp_path.glob("*/judged.json"))
    assert len(runs) == 3 and (tmp_path / runs[0].parent / "log.csv").exists()
    result = json.loads(runs[0].read_text())
    runs[0].write_text(json.dumps({**result, "mIoU_generated": 0.75}))
    assert "| 0.750 ± 0.000 |" in run(*command)


def test_bench_at_full_size_is_of_the_official_training():
    args = train.complete(train.parse_args("--bench --preset sd15 --device cpu".split()))
    assert (args.data, args.size, args.batch, args.unroll) == ("cityscapes", 512, 4, 9)


def test_compiled_blocks_compute_the_same():
    """--compile changes neither values nor gradients nor names."""
    plain = nn.ModuleDict({"vae": ResnetBlock(32, 64, 8)})
    compiled, x = copy.deepcopy(plain), torch.randn(2, 32, 16, 16)
    train.fast(compiled, nn.Identity(), SimpleNamespace(device="cpu", compile=True, recompute=True))
    values = [net["vae"](x) for net in (plain, compiled)]
    assert compiled["vae"]._compiled_call_impl and torch.allclose(*values, atol=1e-5)
    for value in values:
        value.square().mean().backward()
    assert all(near(p.grad, q.grad) for p, q in zip(plain.parameters(), compiled.parameters()))
    assert list(plain.state_dict()) == list(compiled.state_dict())


@pytest.mark.parametrize("unroll_grad", ["first", "each", "full"])
@pytest.mark.parametrize("adapter", ["controlnet", "oft"])
def test_recompute_keeps_less_and_changes_nothing(adapter, unroll_grad):
    def run(recompute):
        model, D = tiny_model(adapter), UperNet(20, **PRESETS["toy"].segmenter)
        for p in model.adapter.parameters():
            p.data += 0.01 * torch.randn_like(p)
        train.fast(model, D, SimpleNamespace(device="cpu", compile=False, recompute=recompute))
        kept, label = [], torch.randint(0, 19, (2, 64, 64))
        keep = lambda x: kept.append(x.untyped_storage()) or x
        batch = {"label": label, "x0": torch.randn(2, 16, 16, 16), "context": model.text.encode(["a street", ""])}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss, *_ = train.generator_loss(model, D, batch, 5, setting(unroll_grad=unroll_grad))
        loss.backward()
        size = sum({storage.data_ptr(): storage.nbytes() for storage in kept}.values())
        return loss, torch.cat([p.grad.flatten() for p in model.adapter.parameters()]), size

    (loss, grad, size), (lean_loss, lean_grad, lean_size) = run(False), run(True)
    assert torch.allclose(loss, lean_loss) and near(grad, lean_grad) and lean_size < size / 2


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
    """The GiB that live tensors take at most in a noise step and in an adversarial step with D's, at SD's size in bf16."""
    args = train.complete(train.parse_args(f"--bench --preset sd15 --device cpu --bf16 {flags}".split()))
    preset, B, side = PRESETS["sd15"], args.batch, args.size // 8
    with torch.device("meta"):
        unet, vae, text = UNet(preset.unet), VAE(preset.vae), TextEncoder(**preset.text)
        model = ALDM(preset, unet.bfloat16(), vae, text, class_table("cityscapes"), args.adapter, args.hint,
                     torch.empty(20, 768)).to("meta")
        model, D = train.fast(model, UperNet(20, **preset.segmenter), args)
    flash = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION)      # as on a GPU
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live, flash:
        optimizers = []
        for module, net in (model, model.adapter), (D, D):
            module.to_empty(device="cpu")
            optimizers.append(torch.optim.AdamW([p for p in net.parameters() if p.requires_grad or net is D], fused=True))
            for p in optimizers[-1].param_groups[0]["params"]:
                p.grad = torch.empty_like(p)
            train.update(optimizers[-1], {})                        # AdamW's states are there
        batch = {"label": torch.zeros(B, args.size, args.size, dtype=torch.int64), "x0": torch.randn(B, 4, side, side),
                 "context": torch.randn(B, 77, 768)}
        peaks, args.ramp, args.d_start = [], (0, 1), 0
        for step in 9, 8:
            live.peak = live.now
            train.train_step(model, D, *optimizers, [batch] * args.accumulate, step, args)
            peaks.append(live.peak / 2 ** 30)
    return peaks


def test_batch_4_of_512_pixels_with_9_unrolled_steps_fits_a_24_gb_card():
    noise, adversarial = peak_memory("--batch 4 --size 512 --unroll 9 --group 1 --recompute")
    assert 8 < noise < adversarial < 20                             # room for cuDNN and the allocator


def test_init_starts_from_a_file_whose_kind_of_adapter_it_takes(train_cli, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train_cli("--adapter", "t2i", "--lr", 0.1, "--steps", 2, "--out", first)[0] == 0
    assert train_cli("--init", first, "--lr", 1e-9, "--steps", 1, "--out", second)[0] == 0
    (meta, before), (_, after) = read_adapter(first), read_adapter(second)
    assert meta["adapter"] == "t2i" and before["adapter"]["conv_in.weight"].abs().max() > 0.01
    assert all(torch.allclose(t, after["adapter"][name], atol=1e-6) for name, t in before["adapter"].items())


def test_bench(train_cli):
    code, out, err = train_cli("--bench", "--repeat", 1, "--size", 64)
    figures = {line[:34].strip(): line[34:].split() for line in out.splitlines()}
    assert code == 0 and "M trained parameters" in out
    assert float(figures["adversarial step, K = 1"][0]) > float(figures["noise step"][0]) > 0
    assert float(figures["loading with --cache"][0]) > 0 and float(figures["loading"][0]) > 0


# -- bad input --------------------------------------------------------------------------------------------------------


class EvilFile:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


BAD_TRAINING = {     # arguments -> words of the one line that says so
    "steps 0": ("--steps 0", "--steps", "from 1"), "steps -1": ("--steps -1", "--steps", "from 1"),
    "steps 1.5": ("--steps 1.5", "--steps", "whole number"), "steps nothing": ("--steps", "--steps"),
    "batch 0": ("--batch 0", "--batch", "from 1"), "accumulate 0": ("--accumulate 0", "--accumulate"),
    "unroll = ddim-steps": ("--unroll 4 --ddim-steps 4", "--unroll 4", "below"),
    "unroll -1": ("--unroll -1", "--unroll", "from 0"), "unroll-grad": ("--unroll-grad last", "each"),
    "ddim-steps 1001": ("--ddim-steps 1001", "--ddim-steps", "to 1000"),
    "ddim-steps 0": ("--ddim-steps 0", "--ddim-steps", "from 1"), "t-max 0": ("--t-max 0", "--t-max"),
    "lr nan": ("--lr nan", "--lr", "above 0"), "lr 0": ("--lr 0", "--lr", "above 0"), "lr inf": ("--lr inf", "--lr"),
    "lr text": ("--lr fast", "--lr", "fast"), "lr-d": ("--lr-d -0.1", "--lr-d", "above 0"),
    "lambda nan": ("--lambda-adv nan", "--lambda-adv", "from 0"), "lambda -1": ("--lambda-adv -1", "--lambda-adv"),
    "fake-weight": ("--fake-weight inf", "--fake-weight"),
    "ramp garbage": ("--ramp soon", "--ramp", "A:B"), "ramp of one": ("--ramp 5", "--ramp", "A:B"),
    "ramp backwards": ("--ramp 9:5", "--ramp", "A <= B"), "ramp of three": ("--ramp 1:2:3", "--ramp", "A:B"),
    "lazy 0": ("--lazy 0", "--lazy"), "keep 0": ("--keep 0", "--keep"), "workers -1": ("--workers -1", "--workers"),
    "seed": (f"--seed {2 ** 32}", "--seed"), "eval -1": ("--eval -1", "--eval"),
    "size 63": ("--size 63", "63", "multiples of 16"), "size of the toy": ("--data toy --size 128", "128", "64x64"),
    "no cuda": ("--device cuda:99", "no such CUDA"), "device": ("--device nonsense", "nonsense", "cpu or cuda"),
    "preset": ("--preset sd3", "--preset", "sd15"), "adapter": ("--adapter lora", "--adapter", "controlnet"),
    "unknown flag": ("--step 3", "--step"), "unknown data": ("--data nowhere", "nowhere", "toy, cityscapes"),
    "no root": ("--root NONE", "NONE", "leftImg8bit"), "empty root": ("--root EMPTY", "EMPTY", "leftImg8bit"),
    "empty ade20k": ("--data ade20k --root EMPTY", "EMPTY/images/training"),
    "captions that are not JSON": ("--captions TEXT", "TEXT", "JSON"), "no captions": ("--captions NONE", "NONE"),
    "a label is missing": ("--root UNPAIRED", "without a label"),
    "no base": ("--sd NONE", "NONE", "no such file"), "truncated base": ("--sd CUT", "CUT", "cut short"),
    "text for a base": ("--sd TEXT", "TEXT", "text file"), "evil base": ("--sd EVIL", "EVIL", "refused"),
    "adapter for a base": ("--sd ADAPTER", "ADAPTER", "without"), "folder for a base": ("--sd EMPTY", "EMPTY", "fold"),
    "base of another preset": ("--preset sd15 --size 64", "toy.safetensors", "does not fit"),
    "init of another adapter": ("--init ADAPTER --adapter t2i", "ADAPTER", "controlnet", "--adapter"),
    "init of another preset": ("--init OTHER", "OTHER", "sd15", "--preset"),
    "init is a base": ("--init BASE", "BASE", "--sd"), "no init": ("--init NONE", "NONE"),
    "evil init": ("--init EVIL", "EVIL", "refused"), "truncated init": ("--init CUT", "CUT"),
    "evil segmenter": ("--segmenter EVIL", "EVIL", "refused"), "no segmenter": ("--segmenter NONE", "NONE"),
    "segmenter of other classes": ("--segmenter SEVEN", "SEVEN", "7 classes"),
    "half a segmenter": ("--segmenter ENCODER", "ENCODER", "missing"),
    "class embeddings of another dataset": ("--class-embeddings TABLE", "TABLE", "[7, 96]", "[19, 96]"),
    "evil class embeddings": ("--class-embeddings EVIL", "EVIL", "refused"),
    "text for class embeddings": ("--class-embeddings TEXT", "TEXT"),
    "out is a file": ("--out TEXT", "TEXT", "--out"), "out within a file": ("--out TEXT/out", "TEXT/out", "--out"),
    "cache of other weights": ("--cache CACHE", "CACHE", "another folder"), "cache is a file": ("--cache TEXT", "TEXT"),
    "resume of another adapter": ("--out RUN --resume --adapter t2i", "adapter", "t2i", "RUN"),
    "resume with another hint": ("--out RUN --resume --hint color", "hint", "color", "RUN"),
    "resume with other classes": ("--out RUN --resume --data FOLDER --root FOLDER", "dataset", "RUN"),
    "resume of an evil checkpoint": ("--out EVILRUN --resume", "EVILRUN", "no other checkpoint"),
    "resume a stage as a training": ("--out STAGERUN --resume", "STAGERUN", "preset"),
    "into a finished run": ("--out RUN", "RUN", "--resume"), "stage": ("--stage text", "--stage", "vae"),
    "stage without its base": ("--stage base --size 64 --sd ADAPTER", "ADAPTER", "vae"),
}


@pytest.fixture(scope="session")
def bad_files(toy_world, flags, tmp_path_factory):
    """{WORD: path} of what the cases name."""
    f = tmp_path_factory.mktemp("bad")
    at = {word: f / word for word in ("TEXT", "EMPTY", "NONE", "UNPAIRED", "CUT", "EVIL", "ADAPTER", "OTHER",
                                      "SEVEN", "ENCODER", "TABLE", "CACHE", "RUN", "EVILRUN", "STAGERUN", "FOLDER")}
    for word in ("EMPTY", "CACHE", "EVILRUN", "STAGERUN"):
        at[word].mkdir()
    at["TEXT"].write_text("not what you think")
    shutil.copytree(toy_world / "city", at["UNPAIRED"])
    next(at["UNPAIRED"].glob("gtFine/train/toy/*")).unlink()
    write_toy(at["FOLDER"], "path", "train", 2)
    base = (toy_world / "toy.safetensors").read_bytes()
    at["CUT"].write_bytes(base[:len(base) // 2])
    torch.save({"state_dict": {"quant_conv.weight": torch.zeros(1), "x": EvilFile(f / "executed")}}, at["EVIL"])
    shutil.copy(at["EVIL"], at["EVILRUN"] / "checkpoint_0000002.pt")
    torch.save({"step": 2, "meta": {"stage": "vae"}}, at["STAGERUN"] / "checkpoint_0000002.pt")
    model = ALDM(PRESETS["toy"], *load_frozen("toy", toy_world / "toy.safetensors")[:3], class_table("cityscapes"))
    meta = dict(preset="toy", dataset="cityscapes", names=model.classes.names, palette=model.classes.palette,
                adapter="controlnet", hint="classes", step=0)
    save_adapter(at["ADAPTER"], model, meta), save_adapter(at["OTHER"], model, {**meta, "preset": "sd15"})
    seven = UperNet(7, **PRESETS["toy"].segmenter)
    torch.save({f"segmenter.{name}": t for name, t in seven.state_dict().items()}, at["SEVEN"])
    torch.save(seven.encoder.state_dict(), at["ENCODER"])
    torch.save(torch.zeros(7, 96), at["TABLE"])
    (at["CACHE"] / "cache.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *flags, "--out", str(at["RUN"]), "--steps", "2"])
        train.main()
    return {**at, "BASE": toy_world / "toy.safetensors"}


@pytest.mark.parametrize("case", BAD_TRAINING)
def test_bad_input_is_one_line_and_writes_nothing(case, bad_files, train_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def put(text):
        return re.sub(rf"\b({'|'.join(bad_files)})\b", lambda word: str(bad_files[word[0]]), text)

    def content():
        there = [p for p in bad_files["RUN"].parent.rglob("*") if p.is_file() and p.name != ".lock"]
        return {p: p.stat().st_mtime_ns for p in there}

    argv, *said = BAD_TRAINING[case]
    before = content()
    code, out, err = train_cli("--out", "out", *map(put, argv.split()))
    assert code == 2 and out == "" and err.startswith("train.py: "), (code, err)
    lines = err.splitlines()
    assert len(lines) == 1 or case == "a label is missing" and len(lines) == 3, err
    assert all(put(words) in err for words in said), err
    assert files(tmp_path) == [] and content() == before and not (bad_files["TEXT"].parent / "executed").exists()


@pytest.mark.parametrize("flag", ["--out", "--root", "--cache", "--sd"])
def test_a_folder_without_permission(flag, train_cli, toy_world):
    aldm.byte_pairs()                                       # nobody may be unable to read open_clip's vocabulary
    with tempfile.TemporaryDirectory() as folder:           # (pytest's own folders are closed to all but their owner)
        shutil.copytree(toy_world, Path(folder, "world"))
        closed = Path(folder, "closed", "inside")
        closed.mkdir(parents=True)
        for path in Path(folder), *Path(folder).rglob("*"):
            path.chmod(0o755)
        Path(folder).chmod(0o777), closed.parent.chmod(0)
        user = os.geteuid()
        try:
            user or os.seteuid(65534)                       # root may do anything: be nobody
            code, out, err = train_cli("--root", f"{folder}/world/city", "--sd", f"{folder}/world/toy.safetensors",
                                 "--out", f"{folder}/out", flag, closed)
        finally:
            user or os.seteuid(0)
            closed.parent.chmod(0o755)
        assert code == 2 and err.count("\n") == 1 and str(closed) in err and "ermission denied" in err, err
        assert sorted(os.listdir(folder)) == ["closed", "world"]


def test_every_flag_is_explained(train_cli):
    code, out, _ = train_cli("--help")
    assert code == 0 and all(word in out for word in ("--unroll", "cityscapes 0.1", "(default 25)"))


def test_every_torch_load_is_weights_only():
    for path in HERE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.loads", "np.load"):
                safe = any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords)
                assert safe or path.name.startswith("test_"), f"{path}, line {node.lineno}: {ast.unparse(node)}"


# -- the companion ----------------------------------------------------------------------------------------------------


def test_what_the_readme_names_is_there():
    import importlib
    import re
    text = (HERE / "README.md").read_text()
    links = re.findall(r"`(\w+)\.py:([\w.]+)`", text)
    assert len(links) >= 8
    for module, name in links:
        thing = importlib.import_module(module)
        for part in name.split("."):
            thing = getattr(thing, part)
    for file in re.findall(r"\((assets/[\w.]+)\)", text):
        assert (HERE / file).stat().st_size < 400_000


def test_the_map():
    text = run("aldm.py")
    assert "Schedule.predict_x0" in text and "1 x 320 x 64 x 64" in text

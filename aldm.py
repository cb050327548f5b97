"""ALDM: what ties the networks together, in the order in which the paper introduces it.

    TextEncoder, LayoutEncoder      the two conditions: words and label map
    Schedule                        x_t, x0_hat and DDIM steps
    ALDM                            frozen Stable Diffusion + adapter: eps_theta, sampling
    unrolled_adversarial_loss       Sec. 3.1 and 3.2: L_adv over K unrolled steps
    load_weights                    weights in the usual formats
"""
import ctypes
import json
import math
import os
import pickle
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import QuickGELU, TextTransformer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from data import ASSETS, IGNORE, InputError, atomic, class_table
from discriminator import layout_loss_map, per_valid_pixel
from unet import OFT, ControlNet, T2IAdapter, UNet, UNetConfig, apply_hint_block, rectify
from vae import VAE, VAEConfig


@dataclass(frozen=True)
class Preset:
    """The size of all networks. Sides of images must be multiples of `multiple` pixels."""
    unet: UNetConfig
    vae: VAEConfig
    text: dict          # arguments of TextEncoder
    segmenter: dict     # arguments of UperNet
    hint_widths: tuple  # channels of the convolutions that take the class hint in
    size: int           # pixels of a training image's side
    hint_average: bool  # a cell of the class hint: its pixels' mean, or its top left pixel
    whiten: bool        # spread the class embeddings, which a small text tower hardly tells apart
    guidance: float     # scale of sampling, where none is given

    @property
    def multiple(self):
        return self.vae.factor * 2 ** (len(self.unet.channel_mult) - 1)


PRESETS = {
    "sd15": Preset(
        unet=UNetConfig(),
        vae=VAEConfig(),
        text=dict(width=768, layers=12, heads=12),
        segmenter=dict(layers=(3, 4, 23, 3), width=64, fpn_dim=256),
        hint_widths=(768, 512, 256),
        size=512,
        hint_average=False,  # as the official code
        whiten=False,
        guidance=7.5),
    "toy": Preset(  # 64x64 images, 16x16 latents of 16 channels
        unet=UNetConfig(in_channels=16, out_channels=16, model_channels=32, channel_mult=(2, 2, 3),
                        attention_resolutions=(2,), num_heads=4, context_dim=96, groups=8),
        vae=VAEConfig(ch=64, ch_mult=(1,), num_res_blocks=1, z_channels=16, scale=1.0, groups=1,
                      patch=4),
        text=dict(width=96, layers=2, heads=4),
        segmenter=dict(layers=(1, 1, 1, 1), width=16, fpn_dim=32, stem_stride=2),
        hint_widths=(64, 48, 32),
        size=64,
        hint_average=True,  # keeps poles that are one pixel wide
        whiten=True,
        guidance=5.0),
}

JUDGE = dict(layers=(1, 1, 1, 1), width=8, fpn_dim=24, stem_stride=1)  # the toy's own judge


def pick_device(name=None):
    """--device: "cpu", "cuda", "cuda:1" -> the same; None: cuda if there is one, else cpu.

    This also sets torch up for it. Raises InputError if there is no such device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if not found:
        raise InputError(f"--device {name}: must be cpu or cuda")
    if name == "cpu":
        keep_memory()
    elif int(found[1] or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: there is no such CUDA device; use --device cpu")
    elif found[1]:
        torch.cuda.set_device(name)  # else the loader would use the first
    return name


def keep_memory():
    """Let glibc keep freed memory: otherwise it returns that of every large tensor to the system
    and has it zeroed page by page for the next one, which takes a fifth of SD's UNet's time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, -1)  # M_TRIM_THRESHOLD
        mallopt(-8, 1)  # M_ARENA_MAX


# -- the conditions: words and layout --------------------------------------------------------------


@cache
def byte_pairs():
    """CLIP's tokenizer, read once."""
    return SimpleTokenizer()


class TextEncoder(TextTransformer):
    """CLIP's text tower (open_clip's) as Stable Diffusion uses it: quick-GELU, the states of all 77
    tokens after the final norm."""
    START = 49406
    END = 49407

    def __init__(self, width=768, layers=12, heads=12):
        super().__init__(width=width, layers=layers, heads=heads, output_dim=None,
                         pool_type="none", act_layer=QuickGELU)

    def tokenize(self, texts):
        """list of B strings -> ids [B,77] int64, on this encoder's device: START, at most 75
        tokens, then END to the end."""
        ids = torch.full((len(texts), 77), self.END)
        for row, text in zip(ids, texts):
            tokens = [self.START, *byte_pairs().encode(text)[:75]]
            row[:len(tokens)] = torch.tensor(tokens)
        return ids.to(self.positional_embedding.device, non_blocking=True)

    def cut(self, text):
        """The words of `text` beyond the 75 tokens that the model sees, or an empty string."""
        unseen = byte_pairs().encode(text)[75:]
        return byte_pairs().decode(unseen).strip()

    def forward(self, ids):
        """ids [B,77] int64 -> hidden states [B,77,width]."""
        x = self.token_embedding(ids) + self.positional_embedding
        return self.ln_final(self.transformer(x, attn_mask=self.attn_mask))

    def pooled(self, ids):
        """ids [B,77] int64 -> the state of the first END token [B,width]: it has seen all words."""
        end = (ids == self.END).int().argmax(dim=1)
        return self(ids)[torch.arange(len(ids)), end]

    @torch.no_grad()
    def encode(self, texts):
        """list of B strings -> context [B,77,width]."""
        return self(self.tokenize(texts))

    @torch.no_grad()
    def class_table(self, names):
        """N names -> [N+1,width]: embeddings of "A photo of {name}", and of "" for void pixels."""
        texts = [f"A photo of {name}" for name in names]
        return self.pooled(self.tokenize([*texts, ""]))


def whiten(table):
    """[N+1,C] -> the same embeddings, centred and equally far apart: all singular values become
    equal, but for the one that centring makes 0."""
    centred = table.double() - table.double().mean(0)
    U, S, V = torch.linalg.svd(centred, full_matrices=False)
    U = U * (S > 1e-9 * S[0])
    return (U @ V * table.shape[1] ** 0.5).float()


def hint_palette(classes, colors):
    """Colours [N+1,3] in [0,1] of a colour hint, void black: the data set's own, or (colors
    "ade20k", for a ControlNet that has learned these) those of each class's nearest in ADE20K."""
    black = [0, 0, 0]
    palette = classes.palette.tolist()
    if colors == "ade20k" and classes.key != "ade20k":
        ade = class_table("ade20k")
        colour = dict(zip(ade.names, ade.palette.tolist()))
        palette = [colour.get(name, black) for name in classes.ade]
    return torch.tensor([*palette, black]) / 255


class LayoutEncoder(nn.Module):
    """Label map y [B,H,W] int64 (255 = void) -> what an adapter's hint block takes in.

    hint "classes"  [B,N+1,2h,2w]: one-hot (or the average of that over each cell), void last, at
                    twice the latents' resolution. Multiplied with `table` [N+1,C] it is the paper's
                    hint, a map of CLIP embeddings; that is done inside the hint block's first
                    convolution (unet.apply_hint_block)
    hint "color"    [B,3,H,W] in [0,1]
    """

    def __init__(self, table, palette, hint, cell, average):
        super().__init__()
        self.hint = hint
        self.cell = cell  # pixels per cell of the class hint, along one side
        self.average = average
        self.register_buffer("table", table)
        self.register_buffer("palette", palette, persistent=False)

    def forward(self, label):
        void = len(self.palette) - 1
        label = label.where(label != IGNORE, void)
        if self.hint == "color":
            return self.palette[label].permute(0, 3, 1, 2)
        if not self.average:  # subsample, then look up: equals the official order, but cheaper
            label = label[:, ::self.cell, ::self.cell]
        classes = torch.arange(void + 1, device=label.device).view(-1, 1, 1)
        onehot = (label[:, None] == classes).float()
        return F.avg_pool2d(onehot, self.cell) if self.average else onehot


# -- diffusion (Sec. 3.1) --------------------------------------------------------------------------


class Schedule(nn.Module):
    """SD's noise schedule: sqrt(beta) is linear, alphas_cumprod[t] = prod_{s<=t} (1 - beta_s)."""

    def __init__(self, num_timesteps=1000, beta_start=0.00085, beta_end=0.012):
        super().__init__()
        first, last = beta_start ** 0.5, beta_end ** 0.5
        betas = torch.linspace(first, last, num_timesteps, dtype=torch.float64) ** 2
        alphas_cumprod = (1 - betas).cumprod(0).float()
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)

    def ddim_timesteps(self, S):
        """S ascending timesteps [S] int64, evenly spaced from 1: 1, 41, ..., 961 for S = 25."""
        T = len(self.alphas_cumprod)
        steps = torch.arange(S, device=self.alphas_cumprod.device)
        return (steps * T // S + 1).clamp(max=T - 1)

    def a(self, t):
        """a_t [B,1,1,1] for t [B] or a number; past the chain's end (t < 0) it is a_0, not 1."""
        if not torch.is_tensor(t):
            t = torch.full((1,), t, device=self.alphas_cumprod.device)
        return self.alphas_cumprod[t.clamp(min=0)].view(-1, 1, 1, 1)

    def add_noise(self, x0, t, noise):
        """x_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps"""
        return self.a(t).sqrt() * x0 + (1 - self.a(t)).sqrt() * noise

    def predict_x0(self, x_t, t, eps):
        """The denoised estimate: x0_hat = (x_t - sqrt(1 - a_t) eps) / sqrt(a_t)"""
        return (x_t - (1 - self.a(t)).sqrt() * eps) / self.a(t).sqrt()

    def ddim_step(self, x_t, eps, t, t_prev, eta=0.0, noise=None):
        """x_{t_prev} = sqrt(a_prev) x0_hat + sqrt(1 - a_prev - sigma^2) eps + sigma noise

        (DDIM, Song et al. 2021.) t_prev < 0 means the end of the chain; eta = 0 is deterministic,
        eta = 1 has DDPM's variance.
        """
        a = self.a(t)
        a_prev = self.a(t_prev)
        sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
        x0_hat = self.predict_x0(x_t, t, eps)
        x = a_prev.sqrt() * x0_hat + (1 - a_prev - sigma ** 2).sqrt() * eps
        if eta == 0:
            return x
        return x + sigma * (torch.randn_like(x) if noise is None else noise)


# -- the model -------------------------------------------------------------------------------------


class ALDM(nn.Module):
    """The frozen Stable Diffusion (unet, vae, text), the trained adapter, and its layout encoder.

    adapter      controlnet | t2i | oft | freestyle (which trains the UNet itself)
    hint         classes | color, for the ControlNet; T2I-Adapter takes colours, OFT classes
    table        [N+1,C] class embeddings, void last; None: the text encoder's
    hint_colors  of a colour hint: None, the data set's own; "ade20k" (see hint_palette)
    """

    def __init__(self, preset, unet, vae, text, classes, adapter="controlnet", hint="classes",
                 table=None, hint_colors=None):
        super().__init__()
        self.preset = preset
        self.classes = classes
        self.kind = adapter
        self.unet = unet.requires_grad_(False).eval()
        self.vae = vae.requires_grad_(False).eval()
        self.text = text.requires_grad_(False).eval()
        self.schedule = Schedule()
        hint = {"t2i": "color", "oft": "classes"}.get(adapter, hint)
        if table is None:
            table = text.class_table(classes.names)
            if preset.whiten:
                table = whiten(table)
        self.layout = LayoutEncoder(table.float(), hint_palette(classes, hint_colors), hint,
                                    vae.cfg.factor // 2, preset.hint_average)
        hint_channels = 3 if hint == "color" else table.shape[1]
        if adapter == "controlnet":
            halvings = int(math.log2(vae.cfg.factor))
            self.adapter = ControlNet(unet.cfg, hint_channels, preset.hint_widths, halvings)
            self.adapter.start_from(unet)
        elif adapter == "t2i":
            self.adapter = T2IAdapter(unet.cfg, vae.cfg.factor)
        elif adapter == "oft":
            self.adapter = OFT(unet, hint_channels, preset.hint_widths)
            self.adapter.attach(unet)
        else:
            self.adapter = unet.requires_grad_(True)
            self.register_buffer("class_tokens", self.list_class_tokens(), persistent=False)

    def list_class_tokens(self):
        """-> [T,2] int64: the tokens of all class names in one row, of which FreestyleNet's text is
        made, each with its class; and 75 END tokens of no class, -1."""
        rows = []
        for c, name in enumerate(self.classes.names):
            for token in byte_pairs().encode(name + ","):
                rows.append([token, c])
        return torch.tensor(rows + [[TextEncoder.END, -1]] * 75)

    @property
    def device(self):
        return self.schedule.alphas_cumprod.device

    def encode_layout(self, label):
        """label [B,H,W] int64 -> what `eps` needs of it. It depends on neither x_t nor t: compute
        it once per layout."""
        if self.kind == "freestyle":
            return self.rectified_text(label)
        hint = self.layout(label)
        if self.kind == "t2i":
            return {"features": self.adapter(hint)}
        table = self.layout.table if self.layout.hint == "classes" else None
        features = apply_hint_block(self.adapter.input_hint_block, hint, table)  # (B, c, h, w)
        if self.kind == "oft":
            return {"features": {0: features}}
        return {"hint": features}

    def rectified_text(self, label):
        """FreestyleNet's conditions: the text is the list of the layout's classes, and each pixel
        attends to the words of its own class. -> context [B,77,C], mask [B,77,h,w] bool

        Nothing here waits for the GPU: of all class tokens those of the layout's classes are sorted
        to the front, END after them, and the first 75 are taken.
        """
        present = torch.zeros(len(label), 256, dtype=torch.bool, device=label.device)
        present.scatter_(1, label.flatten(1), True)
        tokens, owner = self.class_tokens.unbind(1)  # (T,) each
        used = present[:, owner] | (owner < 0)  # (B, T)
        order = used.int().argsort(dim=1, descending=True, stable=True)[:, :75]
        ids = F.pad(tokens[order], (1, 1), value=TextEncoder.END)  # (B, 77)
        ids[:, 0] = TextEncoder.START
        token_class = F.pad(owner[order], (1, 1), value=-1)
        with torch.no_grad():
            context = self.text(ids)
        f = self.vae.cfg.factor
        return {"context": context, "mask": rectify(label[:, ::f, ::f], token_class)}

    def eps(self, x_t, t, text, layout):
        """eps_theta(x_t, y, t), the noise in x_t: x_t [B,4,h,w], t [B] int64 -> [B,4,h,w] fp32.

        text    B prompts, or their context [B,77,C]
        layout  label map [B,H,W] int64, or what encode_layout made of it
        """
        context = text if torch.is_tensor(text) else self.text.encode(text)
        layout = self.encode_layout(layout) if torch.is_tensor(layout) else layout
        context = layout.get("context", context)  # FreestyleNet's takes the prompts' place
        control = None
        if "hint" in layout:
            control = self.adapter.residuals(x_t, t, context, layout["hint"])
        features, mask = layout.get("features"), layout.get("mask")
        return self.unet(x_t, t, context, control, features, mask).float()

    @torch.no_grad()
    def sample(self, label, context, uncond, steps, guidance, noise, eta=0.0, on_step=None):
        """DDIM from noise [B,4,h,w] to a latent x_0, with eps_u + guidance (eps_c - eps_u); the
        layout is in both halves, which run as one batch. (FreestyleNet has no guidance here, as its
        text is the layout's.)

        label [B,H,W], context and uncond [B,77,C]; on_step(i, x0_hat) is called after each step.
        """
        guided = guidance != 1 and self.kind != "freestyle"
        if guided:
            label = torch.cat([label, label])
            context = torch.cat([uncond, context])
        layout = self.encode_layout(label)
        x = noise.to(self.device)
        timesteps = self.schedule.ddim_timesteps(steps).flip(0).tolist()
        for i, t in enumerate(timesteps):
            t_prev = timesteps[i + 1] if i + 1 < steps else -1
            x_t = torch.cat([x, x]) if guided else x
            eps = self.eps(x_t, torch.full((len(x_t),), t, device=x.device), context, layout)
            if guided:
                eps_u, eps_c = eps.chunk(2)
                eps = eps_u + guidance * (eps_c - eps_u)
            if on_step:
                on_step(i, self.schedule.predict_x0(x, t, eps))
            x = self.schedule.ddim_step(x, eps, t, t_prev, eta)
        return x


# -- the objective (Sec. 3.1 and 3.2) --------------------------------------------------------------


def unrolled_adversarial_loss(model, discriminator, x_t, eps, start, timesteps, label, context,
                              layout, unroll, grad="first"):
    """L_adv: the discriminator's layout loss, averaged over x0_hat(t) and K further DDIM steps.

    model       has eps(x_t, t, context, layout), vae.decode and schedule
    x_t, eps    [B,4,h,w]: where the chain starts, and eps_theta there, as in the noise loss
    start       [B] int64: x_t's index in the ascending DDIM `timesteps` [S]; at least `unroll`
    label       [B,H,W] int64
    unroll      K
    grad        which estimates carry gradient (the three agree in value):
                first   x0_hat(t) alone, its loss map scaled to the mean of all (official code)
                each    every one, but the state x_{t-k} that the next step starts from is detached
                full    every one, through the whole chain
    -> L_adv (scalar), and fakes [B,3,H,W] in [-1,1] for D's next step: of each image a random one
    of the K+1 estimates, so that D learns at every t at which it judges
    """
    schedule = model.schedule
    shown = torch.randint(0, unroll + 1, start.shape, device=start.device)
    fakes = torch.zeros((), device=label.device)
    loss_maps = []
    for k in range(unroll + 1):
        t = timesteps[start - k]
        with torch.set_grad_enabled(torch.is_grad_enabled() and (k == 0 or grad != "first")):
            if k > 0:  # one DDIM step on, with the model as it is
                x_t = schedule.ddim_step(x_t, eps, timesteps[start - k + 1], t)
                if grad != "full":
                    x_t = x_t.detach()
                eps = model.eps(x_t, t, context, layout)
            x0_hat = schedule.predict_x0(x_t, t, eps)
            image = model.vae.decode(x0_hat).float().clamp(-1, 1)  # (B, 3, H, W)
            loss_maps.append(layout_loss_map(discriminator(image), label))
        fakes = torch.where((shown == k).view(-1, 1, 1, 1), image.detach(), fakes)

    loss_map = torch.stack(loss_maps).mean(0)  # (B, H, W)
    if grad == "first":
        # Its gradient as the official code has it, (mean / L_0 + 1 / (K+1)) dL_0 at each pixel: of
        # L_0 / stop(L_0) * mean, whose mean keeps L_0's graph. The value stays the mean.
        first = loss_maps[0]
        ratio = torch.where(first > 0, loss_map / first.clamp(min=1e-12), 0).detach()
        loss_map = loss_map + ratio * (first - first.detach())
    return per_valid_pixel(loss_map, label), fakes


# -- weights ---------------------------------------------------------------------------------------
#
# Weights are read in three steps: a file's tensors by their names there; {part: {name: tensor}} in
# the names of our networks; a network, strictly. The tensors stay memory-mapped on the way.

SD_FILE = "v1-5-pruned-emaonly.safetensors"
SD_REPOS = ("stable-diffusion-v1-5/stable-diffusion-v1-5",
            "runwayml/stable-diffusion-v1-5")  # its old name, in older caches
WANTED = ("expected is Stable Diffusion 1.x (a .safetensors or .ckpt file, or diffusers' folder), "
          "or an adapter for it")

# How names in a file begin, and the part that they belong to; the first that fits. What follows
# is the name within the part. Where a part has several, we write the last.
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
KNOWN = re.compile(f"(?P<prefix>{'|'.join(map(re.escape, PREFIXES))})(?P<name>.*)")
PREFIX = {part: prefix for prefix, part in PREFIXES.items()}
ADAPTER_PART = {"controlnet": "control", "t2i": "adapter", "oft": "adapter", "freestyle": "unet"}

# Files of a single part do without: how one of their names begins -> the prefix that they lack.
SINGLE_PARTS = {
    "controlnet_mid_block.": "control_model.",
    "zero_convs.": "control_model.",
    "up_blocks.": "model.diffusion_model.",
    "quant_conv.": "first_stage_model.",
    "body.": "adapter.",
    "layer4.": "segmenter.encoder.",  # mit-semseg's two files
    "conv_last.": "segmenter.decoder.",
}

# What files hold besides the weights; the last two are of mit-semseg's synchronised batch norm.
PASSED_OVER = re.compile(r"position_ids$|text_projection|loss\.|_tmp_running_|_running_iter$")


def layer(match):
    """Layer j of diffusers' block i is layer 3 i + j in SD, which counts on through all blocks."""
    return 3 * int(match[1]) + int(match[2])


# Names in diffusers' files (regular expressions) -> the names here, replaced one after the other.
UNET_NAMES = {
    r"(resnets\.\d)\.norm1": r"\1.in_layers.0",
    r"(resnets\.\d)\.conv1": r"\1.in_layers.2",
    r"(resnets\.\d)\.time_emb_proj": r"\1.emb_layers.1",
    r"(resnets\.\d)\.norm2": r"\1.out_layers.0",
    r"(resnets\.\d)\.conv2": r"\1.out_layers.3",
    r"(resnets\.\d)\.conv_shortcut": r"\1.skip_connection",
    r"^down_blocks\.(\d)\.resnets\.(\d)": lambda m: f"input_blocks.{layer(m) + 1}.0",
    r"^down_blocks\.(\d)\.attentions\.(\d)": lambda m: f"input_blocks.{layer(m) + 1}.1",
    r"^down_blocks\.(\d)\.downsamplers\.(0)\.conv": lambda m: f"input_blocks.{layer(m) + 3}.0.op",
    r"^up_blocks\.(\d)\.resnets\.(\d)": lambda m: f"output_blocks.{layer(m)}.0",
    r"^up_blocks\.(\d)\.attentions\.(\d)": lambda m: f"output_blocks.{layer(m)}.1",
    r"^up_blocks\.(\d)\.upsamplers\.(0)": lambda m: f"output_blocks.{layer(m) + 2}.2",
    r"^output_blocks\.2\.2": "output_blocks.2.1",  # the coarsest level has no attention before it
    r"^mid_block\.resnets\.0": "middle_block.0",
    r"^mid_block\.attentions\.0": "middle_block.1",
    r"^mid_block\.resnets\.1": "middle_block.2",
    r"^time_embedding\.linear_1": "time_embed.0",
    r"^time_embedding\.linear_2": "time_embed.2",
    r"^conv_in": "input_blocks.0.0",
    r"^conv_norm_out": "out.0",
    r"^conv_out": "out.2",
    r"^controlnet_down_blocks\.(\d+)": r"zero_convs.\1.0",
    r"^controlnet_mid_block": "middle_block_out.0",
    r"^controlnet_cond_embedding\.conv_in": "input_hint_block.0",
    r"^controlnet_cond_embedding\.blocks\.(\d)": lambda m: f"input_hint_block.{2 * int(m[1]) + 2}",
    r"^controlnet_cond_embedding\.conv_out": "input_hint_block.14",
}
VAE_NAMES = {
    r"down_blocks\.(\d)\.downsamplers\.0": r"down.\1.downsample",
    r"down_blocks\.(\d)\.resnets": r"down.\1.block",
    r"up_blocks\.(\d)": lambda m: f"up.{3 - int(m[1])}",  # SD counts levels from the finest
    r"(up\.\d)\.upsamplers\.0": r"\1.upsample",
    r"(up\.\d)\.resnets": r"\1.block",
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.attentions\.0": "mid.attn_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"attn_1\.group_norm": "attn_1.norm",
    r"attn_1\.(to_q|query)": "attn_1.q",
    r"attn_1\.(to_k|key)": "attn_1.k",
    r"attn_1\.(to_v|value)": "attn_1.v",
    r"attn_1\.(to_out\.0|proj_attn)": "attn_1.proj_out",
    r"conv_shortcut": "nin_shortcut",
    r"conv_norm_out": "norm_out",
}
T2I_NAMES = {
    r"^body\.(\d)\.resnets\.(\d)": lambda m: f"body.{2 * int(m[1]) + int(m[2])}",
    r"^body\.(\d)\.in_conv": lambda m: f"body.{2 * int(m[1])}.in_conv",
}
TEXT_NAMES = {  # Hugging Face's CLIP -> open_clip's
    r"^embeddings\.position_embedding\.weight": "positional_embedding",
    r"^embeddings\.token_": "token_",
    r"^final_layer_norm": "ln_final",
    r"^encoder\.layers": "transformer.resblocks",
    r"self_attn": "attn",
    r"layer_norm": "ln_",
    r"mlp\.fc1": "mlp.c_fc",
    r"mlp\.fc2": "mlp.c_proj",
}
NAMES = {"unet": UNET_NAMES, "control": UNET_NAMES, "vae": VAE_NAMES, "adapter": T2I_NAMES,
         "text": TEXT_NAMES}

# What is known of an adapter, or of a segmenter of ours; None where its file does not say.
META = ("preset", "dataset", "names", "palette", "file_ids", "void", "adapter", "hint",
        "hint_colors", "step", "normalize")

# The segmenter's only layer that depends on the classes, and what its number of outputs tells.
LAST = "decoder.conv_last.1.weight", "decoder.conv_last.1.bias"
OFFICIAL = {20: "cityscapes", 151: "ade20k", 172: "coco"}  # official ALDM's checkpoints
IMAGENET_OUTPUTS = (150, 151, 172)  # trained on images with ImageNet's mean and deviation


# files -> tensors


class Ignored:
    """Stands in for what training frameworks leave in a checkpoint; none of that is imported."""

    def __init__(self, *args):
        pass

    __setstate__ = __init__


LEFTOVERS = [(Ignored, name) for name in (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar")]


def read_file(path):
    """One file of safetensors or torch.save -> what it holds; its metadata if it is ours, else {}.

    Tensors are memory-mapped (but for torch's format of before 2020). Nothing is executed.
    InputError if the file is not there, may not be read, is damaged or holds more than weights."""
    metadata = {}
    try:
        with open(path, "rb") as file:
            head = file.read(512)
        if b"\0" not in head:
            raise ValueError("empty, a web page or a Git LFS pointer in place of the file")
        if head[8:9] == b"{":
            with safe_open(path, "pt") as file:
                content = {name: file.get_tensor(name) for name in file.keys()}
                metadata = file.metadata() or {}
        else:
            is_zip = head.startswith(b"PK")
            with torch.serialization.safe_globals(LEFTOVERS):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        if "aldm-" not in metadata.get("format", ""):
            return content, {}
        return content, {key: json.loads(value) for key, value in metadata.items()}
    except OSError as error:
        raise InputError(f"{path}: {error.strerror.lower()}") from None
    except pickle.UnpicklingError:
        raise InputError(f"{path}: a pickle that holds more than weights: refused, nothing of it "
                         "was executed; look for the same file as .safetensors") from None
    except Exception as error:  # whatever the two libraries raise at a damaged file
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: damaged or cut short ({reason}); download it again") from None


def check_meta(path, meta):
    """The metadata of a file of ours -> the same with all of META. InputError if it lacks what is
    needed, or says what is not known here."""
    known = {"preset": PRESETS, "adapter": ADAPTER_PART}
    needed = ["preset", "names"]
    if meta.get("format") != "aldm-segmenter":
        needed += ["palette", "adapter"]
    for key in needed:
        value = meta.get(key)
        if not value or (key in known and str(value) not in known[key]):
            raise InputError(f"{path}: its metadata says {key} {value!r:.60}, which is not known")
    return {**dict.fromkeys(META), **meta}


def list_weight_files(path):
    """-> a list of lists of files: [[path]] for a file; for a folder of diffusers, or of Hugging
    Face's cache, the file (or the shards) of each of its components; [] if it has none."""
    path = Path(path)
    if not path.is_dir():
        return [[path]]
    path = max(path.glob("snapshots/*"), key=os.path.getmtime, default=path)
    components = []
    for folder in path, path / "unet", path / "vae", path / "text_encoder":
        files = list(folder.glob("*model*.safetensors")) or list(folder.glob("*model*.bin"))
        full = [file for file in files if "." not in file.stem]  # not model.fp16.safetensors
        if files:
            components.append(full or files)
    return components


# tensors -> parts


def convert_names(part, state):
    """A part's tensors in diffusers' or Hugging Face's names, or in ours -> in ours."""
    if part != "text" and not any(".resnets." in name for name in state):
        return state
    converted = {}
    for name, t in state.items():
        for pattern, new in NAMES[part].items():
            name = re.sub(pattern, new, name)
        if ".attn_1." in name and t.ndim == 2:  # linear in diffusers, a 1x1 convolution here
            t = t[:, :, None, None]
        converted[name] = t
    return convert_text(converted) if part == "text" else converted


def convert_text(state):
    """Fuse q, k and v, as open_clip does; fill up the token embedding of the toy's file."""
    for name in [name for name in state if ".q_proj." in name]:
        qkv = [state.pop(name.replace("q_proj", letter + "_proj")) for letter in "qkv"]
        state[name.replace("q_proj.", "in_proj_")] = torch.cat(qkv)
    if "token_embedding.rows" in state:
        rows, ids = state.pop("token_embedding.rows"), state.pop("token_embedding.ids")
        table = initial_tokens(rows.shape[1])
        state["token_embedding.weight"] = table.index_copy_(0, ids, rows.float())
    return state


def split_parts(path, tensors):
    """{name in the file: tensor} -> {part: {name in our network: tensor}}."""
    lacks = ""
    for beginning, prefix in SINGLE_PARTS.items():
        if any(name.startswith(beginning) for name in tensors):
            lacks = prefix
    parts = {}
    for name, t in tensors.items():
        found = KNOWN.match(name) or KNOWN.match(lacks + name)
        if found and not PASSED_OVER.search(name):
            part = PREFIXES[found["prefix"]]
            parts.setdefault(part, {})[found["name"]] = t
    if not parts:
        names = ", ".join(list(tensors)[:3])
        raise InputError(f"{path}: no tensor is known here ({names}); {WANTED}")
    return {part: convert_names(part, state) for part, state in parts.items()}


def read_parts(path):
    """A file or folder -> {part: {name: tensor}}, as load_weights, and its metadata (META) if it is
    ours, else {}."""
    parts, meta = {}, {}
    for files in list_weight_files(path):
        content = {}
        for file in files:
            found, meta = read_file(file)
            content |= found if isinstance(found, dict) else {}
        if "meta" in content and "adapter" in content:  # a checkpoint of train.py
            meta = {**content["meta"], "step": content.get("step")}
            names = {"adapter": "adapter", "layout": "layout", "discriminator": "segmenter"}
            parts = {part: content[name] for name, part in names.items() if name in content}
        else:
            content = content.get("state_dict", content)
            tensors = {str(name): t.detach() for name, t in content.items() if torch.is_tensor(t)}
            parts |= split_parts(path, tensors)
    if not parts:
        raise InputError(f"{path}: a folder without weights; {WANTED}")
    return parts, check_meta(path, meta) if meta else {}


def load_weights(path):
    """A file in a usual format, or diffusers' folder -> {part: {name: tensor}}, the tensors as they
    are in the file, memory-mapped. Parts: unet, vae, text, control, segmenter, adapter (T2I, OFT);
    in our own files also layout, judge, domain. InputError if it is something else."""
    return read_parts(path)[0]


# parts -> networks


def check_finite(state, what):
    """InputError with the tensor's name if one holds a NaN or an infinity."""
    for name, t in state.items():
        # a sum shows them as well, and takes a hundredth of isfinite()'s time
        if t.is_floating_point() and not t.is_meta and not t.float().sum().isfinite():
            raise InputError(f"{what}: {name} holds NaN or infinite values")


def load_into(module, state, what):
    """Fill `module` with `state` {name: tensor}, strictly.

    A module on the meta device takes the tensors themselves, in their precision; another is
    overwritten in place, since others may share its parameters. Missing, unexpected, misshapen and
    non-finite tensors are an InputError that begins with `what`."""
    check_finite(state, what)
    on_meta = next(module.parameters()).is_meta
    try:
        module.load_state_dict(state, strict=True, assign=on_meta)
    except RuntimeError as error:
        reason = " ".join(str(error).partition(":")[2].split())  # torch's, a line for each fault
        raise InputError(f"{what}: does not fit: {reason[:400]}") from None


def base_file(preset_name):
    """The base model when --sd names none: assets/ for the toy; SD 1.5 from Hugging Face's cache,
    as one file or as diffusers' folder, or a download."""
    if preset_name == "toy":
        return ASSETS / "toy.safetensors"
    for repo in SD_REPOS:
        found = try_to_load_from_cache(repo, SD_FILE)
        if isinstance(found, str):
            return found
        found = try_to_load_from_cache(repo, "model_index.json")
        if isinstance(found, str) and len(list_weight_files(Path(found).parent)) == 3:
            return Path(found).parent  # unet, vae and text_encoder are there
    try:
        return hf_hub_download(SD_REPOS[0], SD_FILE)
    except Exception as error:  # offline, no such host, disk full: each has its own class
        raise InputError(f"{SD_FILE}: could not be downloaded ({type(error).__name__}); fetch it "
                         f"from huggingface.co/{SD_REPOS[0]} and say --sd PATH") from None


def load_frozen(preset_name, sd=None, device="cpu", dtype=torch.float32):
    """-> unet (stored in `dtype`), vae, text (fp32), {part: state dict} of what else the file has.

    There is never a second copy of the weights. What has the wanted precision on a CPU stays mapped
    to the file: do not overwrite that meanwhile."""
    preset = PRESETS[preset_name]
    path = sd or base_file(preset_name)
    parts = load_weights(path)
    for part in ("unet", "vae", "text"):
        if part not in parts:
            raise InputError(f"{path}: holds no {part}; {WANTED}")
    with torch.device("meta"):
        unet = UNet(preset.unet)
        vae = VAE(preset.vae)
        text = TextEncoder(**preset.text)
    for part, network in ("unet", unet), ("vae", vae), ("text", text):
        load_into(network, parts.pop(part), f"{path}: {part}")
    text.attn_mask = text.build_causal_mask()  # a buffer that no file has
    return unet.to(device, dtype), vae.to(device).float(), text.to(device).float(), parts


def read_adapter(path):
    """What --init, --adapter and --ckpt accept -> meta, {part: state dict}, the adapter's part also
    under "adapter".

    Our adapter.safetensors, a checkpoint_*.pt of train.py, or the folder with these (its last
    adapter, or its last checkpoint): meta is what was saved with it, and parts["layout"] has the
    class embeddings ("table"). Files of official ALDM, ControlNet and T2I-Adapter, in SD's or
    diffusers' names, have no "layout"; their meta has the same keys, META."""
    folder = Path(path)
    found = [*sorted(folder.glob("checkpoint_*.pt")), *sorted(folder.glob("adapter_*.safetensors")),
             *folder.glob("adapter.safetensors")]
    path = found[-1] if found else path
    parts, meta = read_parts(path)
    if not meta.get("adapter"):
        meta = describe_foreign_adapter(path, parts)
    parts.setdefault("adapter", parts.get(ADAPTER_PART[meta["adapter"]], {}))
    check_finite(parts.get("layout", {}), f"{path}: layout")
    return meta, parts


def describe_foreign_adapter(path, parts):
    """The meta of an adapter that is not ours, by what its tensors tell."""
    meta = dict.fromkeys(META) | {"preset": "sd15"}
    if "control" in parts:
        meta |= {"adapter": "controlnet", "hint": "classes"}
        if parts["control"]["input_hint_block.0.weight"].shape[1] == 3:
            # ControlNet-seg was trained with ADE20K's colours
            meta |= {"hint": "color", "hint_colors": "ade20k"}
    elif "adapter" in parts:
        meta |= {"adapter": "t2i", "hint": "color"}
    else:
        raise InputError(f"{path}: holds no adapter, but {' and '.join(parts)}; a base model is "
                         "given with --sd")
    outputs = len(parts.get("segmenter", {}).get(LAST[1], ()))
    if outputs in OFFICIAL:
        classes = class_table(OFFICIAL[outputs])
        meta |= {"dataset": classes.key, "names": list(classes.names),
                 "normalize": outputs in IMAGENET_OUTPUTS}
    return meta


def load_class_embeddings(path, classes, text=None):
    """An official .pth, [N,C] -> the class table [N+1,C]. Its last row, for void pixels, is that of
    null_embedding.pth beside the file, else the one that the text encoder `text` computes."""
    table = read_file(path)[0]
    beside = Path(path).with_name("null_embedding.pth")
    null = read_file(beside)[0] if beside.exists() else text.class_table([]).cpu()
    found = list(table.shape) if torch.is_tensor(table) else []
    wanted = [len(classes.names), null.shape[1]]
    if found != wanted:
        raise InputError(f"{path}: holds {found}, but {classes.key} wants {wanted}; give the file "
                         "of this dataset, or none: the text encoder computes them")
    table = torch.cat([table, null]).float()
    check_finite({"the table": table}, path)
    return table


def match_outputs(classes, ours, names, theirs):
    """Which output of a segmenter of the classes `names`, with `theirs` outputs, each of `ours` for
    `classes` starts from -> {our output: its}. The one after the classes is "fake"."""
    if names == classes.names:  # by number: ADE20K has two classes named screen
        return {i: i for i in range(min(ours, theirs))}
    wanted = classes.names
    if names == class_table("ade20k").names:
        wanted = classes.ade
    wanted = [*wanted, "fake"][:ours]
    found = [*names, "fake"][:theirs]
    return {i: found.index(name) for i, name in enumerate(wanted) if name in found}


def load_segmenter(files, segmenter, classes, meta=None):
    """Start a discriminator (or judge) of `classes` with a file's weights, in place, and set
    whether it `normalize`s its input. Outputs for classes that the file lacks stay at random.

    files    a list of paths: one of ours or official ALDM's, or mit-semseg's encoder and decoder;
             or a state dict, with the `meta` of its file
    meta     its "names" are the file's classes; without, 150 or 151 outputs are ADE20K's, and N or
             N+1 the same `classes`
    InputError if the file does not fit."""
    if isinstance(files, dict):
        what = "segmenter"
        state = files
    else:
        what = " + ".join(map(str, files))
        state = {}
        for path in files:
            parts, meta = read_parts(path)
            state |= parts.get("segmenter", {})
    meta = meta or {}
    weight, bias = LAST
    outputs = len(state.get(bias, ()))
    names = meta.get("names")
    if not names:
        names = class_table("ade20k").names if outputs in (150, 151) else classes.names
    if outputs not in (len(names), len(names) + 1):
        raise InputError(f"{what}: the last layer knows {outputs} classes, not {len(names)}; give "
                         "mit-semseg's encoder and decoder, or a segmenter of these classes")

    ours = segmenter.state_dict()
    last = {weight: ours[weight], bias: ours[bias]}
    rows = match_outputs(classes, len(ours[bias]), tuple(names), outputs)
    check_finite(state, what)
    load_into(segmenter, state | last, what)
    for name, t in last.items():
        t[list(rows)] = state[name][list(rows.values())].to(t)
    segmenter.normalize = bool(meta.get("normalize", outputs in IMAGENET_OUTPUTS))


# networks -> files


def save_tensors(path, tensors, metadata):
    """A safetensors file; the values of `metadata` as JSON."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    # default: arrays, such as palettes
    metadata = {k: json.dumps(v, default=lambda a: a.tolist()) for k, v in metadata.items()}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata)
        os.chmod(temporary, 0o644)  # safetensors makes files that only their owner can read


def save_adapter(path, model, meta, dtype=None):
    """adapter.safetensors: all that one needs besides the base model, in names that other tools
    read: control_model.* (ControlNet), conv_in and body.* (T2I-Adapter), adapter.* (OFT) or
    model.diffusion_model.* (Freestyle). dtype: of the stored weights, e.g. torch.bfloat16 (None:
    as they are); the class table stays fp32."""
    prefix = "" if model.kind == "t2i" else PREFIX[ADAPTER_PART[model.kind]]
    state = model.adapter.state_dict()
    tensors = {prefix + name: t.to(dtype or t.dtype) for name, t in state.items()}
    tensors["layout.table"] = model.layout.table.float()
    save_tensors(path, tensors, {**meta, "format": "aldm-adapter"})


def initial_tokens(width):
    """The toy's token embedding [49408,width] before training; its file has the trained rows."""
    return torch.empty(49408, width).normal_(std=0.02, generator=torch.Generator().manual_seed(0))


def save_base(path, parts, token_ids=None):
    """The toy's base model in one fp16 file. parts: {part: module or state dict}; of the text
    encoder's token embedding only the rows `token_ids` are kept, those that it was trained on
    (None: those that are not as they were initialised)."""
    tensors = {}
    for part, state in parts.items():
        state = dict(state.state_dict() if isinstance(state, nn.Module) else state)
        if part == "text":
            table = state.pop("token_embedding.weight").float().cpu()
            if token_ids is None:
                token_ids = (table != initial_tokens(table.shape[1])).any(dim=1).nonzero()[:, 0]
            ids = torch.tensor(sorted(token_ids))
            state |= {"token_embedding.rows": table[ids], "token_embedding.ids": ids}
        for name, t in state.items():
            tensors[PREFIX[part] + name] = t.half() if t.is_floating_point() else t
    save_tensors(path, tensors, {})

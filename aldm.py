"""ALDM: what ties the networks together, in the order in which the paper introduces it.

    TextEncoder, LayoutEncoder      the two conditions: prompt and label map
    Schedule                        x_t, x0_hat and DDIM steps
    ALDM                            frozen Stable Diffusion + adapter: eps_theta, sampling
    unrolled_adversarial_loss       Sec. 3.1 and 3.2: L_adv over K unrolled steps
    load_weights                    weights in the usual formats
"""
import ctypes
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import QuickGELU, TextTransformer
from torch import nn

from data import ASSETS, IGNORE, InputError, class_table
from discriminator import class_balance, layout_loss_map, per_valid_pixel
from tools.weight_files import (ADAPTER_PART, META, PREFIX, SEGMENTERS, WANTED, check_finite,
                                initial_tokens, list_weight_files, locate, read_file, read_parts,
                                save_tensors)
from unet import OFT, PITI, ControlNet, FreestyleNet, T2IAdapter, UNet, UNetConfig, rectify
from vae import VAE, VAEConfig


@dataclass(frozen=True)
class Preset:
    """The size of all networks."""
    unet: UNetConfig
    vae: VAEConfig
    text: dict          # arguments of TextEncoder
    segmenter: dict     # arguments of UperNet
    hint_widths: tuple  # channels of the convolutions that take in the class hint
    size: int           # side of a training image, pixels
    hint_average: bool  # True: average each cell of the class hint; False: take its top left pixel
    whiten: bool        # spread the class embeddings, which a small text encoder hardly separates
    guidance: float     # default guidance scale

    @property
    def multiple(self):
        """Image sides must be multiples of this many pixels."""
        return self.vae.factor * 2 ** (len(self.unet.channel_mult) - 1)


PRESETS = {
    "sd15": Preset(
        unet=UNetConfig(),
        vae=VAEConfig(),
        text=dict(width=768, layers=12, heads=12),
        segmenter=dict(layers=(3, 4, 23, 3), width=64, fpn_dim=512, ppm_dim=512),
        hint_widths=(768, 512, 256),
        size=512,
        hint_average=False,  # as in the official code
        whiten=False,
        guidance=7.5),
    "toy": Preset(  # 64x64 images, 16x16 latents of 16 channels
        unet=UNetConfig(in_channels=16, out_channels=16, model_channels=32, channel_mult=(2, 2, 3),
                        attention_resolutions=(2,), num_heads=4, context_dim=96, groups=8),
        vae=VAEConfig(ch=64, ch_mult=(1,), num_res_blocks=1, z_channels=16, scale=1.0, groups=1,
                      patch=4),
        text=dict(width=96, layers=2, heads=4),
        segmenter=dict(layers=(1, 1, 1, 1), width=16, fpn_dim=32, ppm_dim=64, stem_stride=2),
        hint_widths=(64, 48, 32),
        size=64,
        hint_average=True,  # keeps poles that are one pixel wide
        whiten=True,
        guidance=5.0),
}


def pick_device(name=None):
    """--device: "cpu", "cuda" or "cuda:1", returned unchanged; None: cuda if there is one, else
    cpu. Also configures torch for it. Raises InputError if there is no such device."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if not found:
        raise InputError(f"--device {name}: must be cpu or cuda")
    if name == "cpu":
        keep_memory()
    elif int(found[1] or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: there is no such CUDA device; use --device cpu")
    elif found[1]:
        torch.cuda.set_device(name)  # the data loader pins memory for the current device
    return name


def keep_memory():
    """Let glibc keep freed memory. Otherwise every large tensor is returned to the system and the
    next one is zeroed page by page, which takes a fifth of the time of SD's UNet."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, -1)  # M_TRIM_THRESHOLD
        mallopt(-8, 1)  # M_ARENA_MAX


# -- the conditions: prompt and layout -------------------------------------------------------------


@cache
def byte_pairs():
    """CLIP's tokenizer, loaded once."""
    return SimpleTokenizer()


def tokens_of(text):
    """text -> CLIP's tokens, a list of int. Runs of more than 300 letters are truncated: merging
    byte pairs takes quadratic time in them."""
    return byte_pairs().encode(" ".join(word[:300] for word in text.split()))


class TextEncoder(TextTransformer):
    """CLIP's text tower (open_clip's) as Stable Diffusion uses it: quick-GELU, and the states of
    all 77 tokens after the final norm."""
    START = 49406
    END = 49407
    ROOM = 75  # tokens between them

    def __init__(self, width=768, layers=12, heads=12):
        super().__init__(width=width, layers=layers, heads=heads, output_dim=None,
                         pool_type="none", act_layer=QuickGELU)

    def tokenize(self, texts):
        """list of B strings -> ids [B,77] int64, on this encoder's device: START, at most 75
        tokens, then END to the end."""
        ids = torch.full((len(texts), 77), self.END)
        for row, text in zip(ids, texts):
            tokens = [self.START, *tokens_of(text)[:self.ROOM]]
            row[:len(tokens)] = torch.tensor(tokens)
        return ids.to(self.positional_embedding.device, non_blocking=True)

    def cut(self, text):
        """The end of `text` that exceeds the 75 tokens the model reads, or an empty string."""
        return byte_pairs().decode(tokens_of(text)[self.ROOM:]).strip()

    def fit(self, template, caption):
        """Fill `caption` into a template such as "{caption}, night scene" -> text, was_shortened.

        A long caption loses its last words, so that the rest of the template fits into 75 tokens.
        """
        text = template.replace("{caption}", caption)
        if "{caption}" not in template or len(tokens_of(text)) <= self.ROOM:
            return text, False
        words = caption.split()[:self.ROOM]  # each has at least one token
        while words and len(tokens_of(text)) > self.ROOM:
            words.pop()
            text = template.replace("{caption}", " ".join(words))
        return text, True

    def forward(self, ids):
        """ids [B,77] int64 -> hidden states [B,77,width]."""
        x = self.token_embedding(ids) + self.positional_embedding
        return self.ln_final(self.transformer(x, attn_mask=self.attn_mask))

    def pooled(self, ids):
        """ids [B,77] int64 -> the state of the first END token, which sees all words [B,width]."""
        end = (ids == self.END).int().argmax(dim=1)
        return self(ids)[torch.arange(len(ids)), end]

    @torch.no_grad()
    def encode(self, texts):
        """list of B strings -> context [B,77,width]."""
        return self(self.tokenize(texts))

    @torch.no_grad()
    def class_embeddings(self, names):
        """N names -> [N+1,width]: embeddings of "A photo of {name}", and of "" for void pixels."""
        texts = [f"A photo of {name}" for name in names]
        return self.pooled(self.tokenize([*texts, ""]))


def whiten(table):
    """[N+1,C] -> the same embeddings, centred and, if N <= C, pairwise equally far apart: all
    singular values are made equal, except the one that centring makes 0."""
    centred = table.double() - table.double().mean(0)
    U, S, V = torch.linalg.svd(centred, full_matrices=False)
    U = U * (S > 1e-9 * S[0])
    return (U @ V * table.shape[1] ** 0.5).float()


def class_hint(label, table, cell, average=False):
    """The layout as ALDM's adapter takes it in: a map of CLIP text embeddings, where each pixel is
    replaced by the embedding of "A photo of {class}" (Sec. 4, implementation details).

    label [B,H,W] int64 with void as class N, table [N+1,C] -> [B,C,H/cell,W/cell]: `cell` pixels
    per cell of the hint, along one side. average: the mean over each cell, else its first pixel.
    """
    if not average:
        label = label[:, ::cell, ::cell]  # equals subsampling the map of embeddings, but cheaper
    # Contiguous for the reason given in ALDM.eps.
    hint = table[label].permute(0, 3, 1, 2).contiguous()  # (B, C, h, w)
    return F.avg_pool2d(hint, cell) if average else hint


def folded_class_hint(label, rows, cell, average=False):
    """The same as class probabilities [B,N+1,H/cell,W/cell], which times the table [N+1,C] are the
    map of embeddings; unet.HintBlock folds that product into its first convolution. rows: N+1"""
    onehot = torch.eye(rows, device=label.device)
    return class_hint(label, onehot, cell, average)


def hint_palette(classes, colors):
    """Colours [N+1,3] in [0,1] of a colour hint, with black for void. colors: None, the data set's
    own; "ade20k", the colour of each class's nearest class there, which the published ControlNet
    was trained on."""
    black = [0, 0, 0]
    palette = classes.palette.tolist()
    if colors == "ade20k" and classes.key != "ade20k":
        ade = class_table("ade20k")
        colour = dict(zip(ade.names, ade.palette.tolist()))
        palette = [colour.get(name, black) for name in classes.ade]
    return torch.tensor([*palette, black]) / 255


def class_tokens(names):
    """-> [T,2] int64: the tokens of all class names, each with its class, then 75 END tokens of no
    class (-1): the pool from which FreestyleNet's list of words is taken."""
    rows = []
    for c, name in enumerate(names):
        for token in tokens_of(name + ","):
            rows.append([token, c])
    return torch.tensor(rows + [[TextEncoder.END, -1]] * TextEncoder.ROOM)


class LayoutEncoder(nn.Module):
    """Label map y [B,H,W] int64 (255 = void) -> the arguments of an adapter's `encode`:

    hint "classes"  one-hot map [B,N+1,2h,2w] (folded_class_hint) and table [N+1,C]
    hint "color"    colour-coded layout [B,3,H,W] in [0,1]
    hint "words"    the encoded names of the layout's classes [B,77,C], and which of them each
                    latent pixel may attend to [B,77,h,w] bool
    """

    def __init__(self, classes, hint, table, preset, hint_colors=None):
        super().__init__()
        self.hint = hint
        self.factor = preset.vae.factor
        self.average = preset.hint_average
        self.register_buffer("table", table)
        self.register_buffer("palette", hint_palette(classes, hint_colors), persistent=False)
        self.register_buffer("class_tokens", class_tokens(classes.names), persistent=False)

    def forward(self, label, text):
        """text: the TextEncoder, for hint "words"."""
        if self.hint == "words":
            return self.list_words(label, text)
        void = len(self.palette) - 1
        label = label.where(label != IGNORE, void)
        if self.hint == "color":
            return (self.palette[label].permute(0, 3, 1, 2),)
        cell = self.factor // 2
        return folded_class_hint(label, void + 1, cell, self.average), self.table

    def list_words(self, label, text):
        """Sort the tokens of the classes present to the front, END after them, and keep 75: no
        operation here makes the CPU wait for the GPU."""
        present = torch.zeros(len(label), 256, dtype=torch.bool, device=label.device)
        present.scatter_(1, label.flatten(1), True)
        tokens, owner = self.class_tokens.unbind(1)  # (T,) each
        used = present[:, owner] | (owner < 0)  # (B, T)
        order = used.int().argsort(dim=1, descending=True, stable=True)[:, :text.ROOM]
        ids = F.pad(tokens[order], (1, 1), value=text.END)  # (B, 77)
        ids[:, 0] = text.START
        token_class = F.pad(owner[order], (1, 1), value=-1)
        with torch.no_grad():
            words = text(ids)
        return words, rectify(label[:, ::self.factor, ::self.factor], token_class)


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
        """S ascending timesteps [S] int64, evenly spaced from 1: 1, 41, ..., 961 for S = 25; from 0
        if S is the number of all timesteps."""
        T = len(self.alphas_cumprod)
        steps = torch.arange(S, device=self.alphas_cumprod.device) * T // S
        return steps + 1 if S < T else steps

    def a(self, t):
        """a_t [B,1,1,1] for t [B] or a number; past the end of the chain (t < 0) it is a_0."""
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

        (DDIM, Song et al. 2021.) t_prev < 0 ends the chain; eta = 0 is deterministic, eta = 1 has
        the variance of DDPM.
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

ADAPTERS = {"controlnet": ControlNet, "t2i": T2IAdapter, "oft": OFT, "freestyle": FreestyleNet,
            "piti": PITI}


class ALDM(nn.Module):
    """The frozen Stable Diffusion (unet, vae, text), the trained adapter, and its layout encoder.

    adapter      a key of ADAPTERS
    hint         "classes" or "color", for the ControlNet; the other adapters have their own
    table        [N+1,C] class embeddings, void last; None: computed by the text encoder
    hint_colors  of a colour hint, see hint_palette
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
        if table is None:
            table = text.class_embeddings(classes.names)
            if preset.whiten:
                table = whiten(table)
        hint = getattr(ADAPTERS[adapter], "hint", hint)  # a ControlNet takes either
        hint_channels = 3 if hint == "color" else table.shape[1]
        self.layout = LayoutEncoder(classes, hint, table.float(), preset, hint_colors)
        self.adapter = ADAPTERS[adapter].on(unet, hint_channels, preset.hint_widths,
                                            vae.cfg.factor)

    @property
    def device(self):
        return self.schedule.alphas_cumprod.device

    def encode_layout(self, label):
        """label [B,H,W] int64 -> what `eps` needs of it. It depends on neither x_t nor t: compute
        it once per layout."""
        return self.adapter.encode(*self.layout(label, self.text))

    def eps(self, x_t, t, text, layout):
        """eps_theta(x_t, y, t), the noise in x_t: x_t [B,4,h,w], t [B] int64 -> [B,4,h,w] fp32.

        text    B prompts, or their context [B,77,C]
        layout  label map [B,H,W] int64, or the result of encode_layout
        """
        context = text if torch.is_tensor(text) else self.text.encode(text)
        if torch.is_tensor(layout) and layout.dtype == torch.int64:
            layout = self.encode_layout(layout)
        # Not in the VAE's channels_last: on a CPU each convolution would copy its weights for that.
        x_t = x_t.contiguous()
        return self.unet(x_t, t, **self.adapter.condition(x_t, t, context, layout)).float()

    @torch.no_grad()
    def sample(self, label, context, uncond, steps, guidance, noise, eta=0.0, on_step=None):
        """DDIM from noise [B,4,h,w] to a latent x_0, with eps_u + guidance (eps_c - eps_u). Both
        halves see the layout and run as one batch.

        label [B,H,W], context and uncond [B,77,C]; on_step(i, x0_hat) is called after each step.
        """
        guided = guidance != 1
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
                              layout, unroll, grad="first", judged=None):
    """L_adv: the discriminator's layout loss, averaged over x0_hat(t) and K further DDIM steps.

    model       has eps(x_t, t, context, layout), vae.decode and schedule
    x_t, eps    [B,4,h,w]: where the chain starts, and eps_theta there, as in the noise loss
    start       [B] int64: x_t's index in the ascending DDIM `timesteps` [S]; at least `unroll`
    label       [B,H,W] int64
    context     the words, as for model.eps; layout: the result of model.encode_layout
    unroll      K
    grad        which estimates carry gradient (the three agree in value):
                first   x0_hat(t) alone, its loss map scaled to the mean of all (official code)
                each    every one, but the state x_{t-k} that the next step starts from is detached
                full    every one, through the whole chain
    judged      the steps k in 1..K whose estimates the discriminator sees (None: all). M of them
                count K/M times: if they are drawn at random, value and gradient are unbiased
    -> L_adv (scalar), and what the discriminator saw: {k: image [B,3,H,W] in [-1,1], detached}
    """
    schedule = model.schedule
    judged = range(1, unroll + 1) if judged is None else judged
    images, loss_maps = {}, {}
    for k in range(max(judged, default=0) + 1):  # later steps change nothing
        t = timesteps[start - k]
        is_judged = k == 0 or k in judged
        has_grad = k == 0 or grad == "full" or (grad == "each" and is_judged)
        with torch.set_grad_enabled(torch.is_grad_enabled() and has_grad):
            if k > 0:  # one DDIM step on, with the model as it is
                x_t = schedule.ddim_step(x_t, eps, timesteps[start - k + 1], t)
                if grad != "full":
                    x_t = x_t.detach()
                eps = model.eps(x_t, t, context, layout)
            if not is_judged:
                continue
            x0_hat = schedule.predict_x0(x_t, t, eps)
            image = model.vae.decode(x0_hat).float().clamp(-1, 1)  # (B, 3, H, W)
            logits = discriminator(image)  # (B, N+1, H, W)
            if k == 0:
                gamma = class_balance(label, logits.shape[1])
            loss_maps[k] = layout_loss_map(logits, label, gamma)  # (B, H, W)
        images[k] = image.detach()

    first = loss_maps.pop(0)
    weighted = [unroll / len(judged) * loss_map for loss_map in loss_maps.values()]
    mean = torch.stack([first, *weighted]).sum(0) / (unroll + 1)  # (B, H, W)
    if grad == "first":
        # As in the official code: the value stays the mean, the gradient is L_0's, at each pixel
        # (mean / L_0 + 1 / (K+1)) dL_0. Where L_0 is 0 to the last bit there is hardly a dL_0.
        change = first - first.detach()  # 0, with L_0's gradient
        mean = mean * (1 + change / first.detach().where(first > 0, 1))
    return per_valid_pixel(mean, label), images


# -- weights ---------------------------------------------------------------------------------------
#
# tools/weight_files.py reads a file's tensors as {part: {name: tensor}}, under the names of our
# networks. Here the networks are filled with them, strictly. They stay memory-mapped throughout.

SD_FILE = "v1-5-pruned-emaonly.safetensors"
SD_REPOS = ("stable-diffusion-v1-5/stable-diffusion-v1-5",
            "runwayml/stable-diffusion-v1-5")  # its old name, in older caches
BASE_PARTS = ("unet", "vae", "text")

# The segmenter's only layer that depends on the classes; its number of outputs tells the dataset.
LAST = "decoder.conv_last.1.weight", "decoder.conv_last.1.bias"
OFFICIAL = {20: "cityscapes", 151: "ade20k", 172: "coco"}  # official ALDM's checkpoints
IMAGENET_OUTPUTS = (150, 151, 172)  # trained on images with ImageNet's mean and deviation


def load_weights(path):
    """A file in a usual format, or a diffusers folder -> {part: {name: tensor}}, the tensors as in
    the file, memory-mapped. Parts: unet, vae, text, control (ControlNet), adapter (other kinds),
    segmenter; in our own files also layout, judge, domain. InputError for anything else."""
    return read_parts(path)[0]


def load_into(module, state, what):
    """Fill `module` with `state` {name: tensor}, strictly.

    A module on the meta device takes the tensors themselves, in their precision; any other is
    overwritten in place, since others may share its parameters. Missing, unexpected, misshapen and
    non-finite tensors are an InputError that begins with `what`."""
    check_finite(state, what)
    on_meta = next(module.parameters()).is_meta
    try:
        module.load_state_dict(state, strict=True, assign=on_meta)
    except RuntimeError as error:
        reason = " ".join(str(error).partition(":")[2].split())  # torch's has a line for each fault
        raise InputError(f"{what}: does not fit: {reason[:400]}") from None


def base_file(preset_name):
    """The base model when --sd names none: assets/ for the toy; SD 1.5 from Hugging Face's cache,
    as one file or as a diffusers folder, or a download."""
    if preset_name == "toy":
        return ASSETS / "toy.safetensors"
    for repo in SD_REPOS:
        found = try_to_load_from_cache(repo, SD_FILE)
        if isinstance(found, str):
            return found
        found = try_to_load_from_cache(repo, "model_index.json")
        if isinstance(found, str) and len(list_weight_files(Path(found).parent)) == len(BASE_PARTS):
            return Path(found).parent
    return locate(f"{SD_REPOS[0]}/{SD_FILE}", "give it as --sd PATH")


def load_frozen(preset_name, sd=None, device="cpu", dtype=torch.float32, own=None):
    """-> unet (stored in `dtype`), vae, text (fp32), {part: state dict} of what else the file has.

    sd     the base model's file; None: the parts `own` of an adapter's file if they include a base
           model, as official ALDM's do, else base_file(preset_name)

    There is never a second copy of the weights. What has the wanted precision on a CPU stays mapped
    to the file, which must not be overwritten meanwhile."""
    preset = PRESETS[preset_name]
    if sd is None and own and own.keys() >= set(BASE_PARTS):
        path = "the adapter's file"
        parts = dict(own)
    else:
        path = sd or base_file(preset_name)
        parts = load_weights(path)
    with torch.device("meta"):
        unet = UNet(preset.unet)
        vae = VAE(preset.vae)
        text = TextEncoder(**preset.text)
    for part, network in zip(BASE_PARTS, (unet, vae, text)):
        if part not in parts:
            raise InputError(f"{path}: holds no {part}; {WANTED}")
        load_into(network, parts.pop(part), f"{path}: {part}")
    text.attn_mask = text.build_causal_mask()  # a buffer that no file has
    return unet.to(device, dtype), vae.to(device).float(), text.to(device).float(), parts


def read_adapter(path):
    """What --init and --adapter accept -> meta, {part: state dict}, the adapter's part also under
    "adapter".

    Our adapter.safetensors, a checkpoint_*.pt of train.py, or the folder with these (its last
    adapter, or its last checkpoint): meta is what was saved with it, and parts["layout"] has the
    class embeddings ("table"). Files of official ALDM, ControlNet and T2I-Adapter, under SD's or
    diffusers' names, have no "layout"; their meta has the same keys, META."""
    if os.path.isdir(path):
        folder = Path(path)
        found = [*sorted(folder.glob("checkpoint_*.pt")),
                 *sorted(folder.glob("adapter_*.safetensors")), *folder.glob("adapter.safetensors")]
        path = found[-1] if found else path
    parts, meta = read_parts(path)
    if not meta.get("adapter"):
        meta = describe_foreign_adapter(path, parts)
    parts.setdefault("adapter", parts.get(ADAPTER_PART[meta["adapter"]], {}))
    for name, table in parts.get("layout", {}).items():
        rows = len(meta["names"] or ()) + 1
        if table.ndim != 2 or len(table) != rows:
            raise InputError(f"{path}: layout.{name} is {list(table.shape)}, expected {rows} rows: "
                             "the classes and void")
    check_finite(parts.get("layout", {}), f"{path}: layout")
    return meta, parts


def describe_foreign_adapter(path, parts):
    """The meta of an adapter that is not ours, as far as its tensors tell."""
    meta = dict.fromkeys(META) | {"preset": "sd15"}
    first = parts.get("control", {}).get("input_hint_block.0.weight", torch.empty(0))
    if first.ndim == 4:
        meta |= {"adapter": "controlnet", "hint": "classes"}
        if first.shape[1] == 3:  # ControlNet-seg was trained with ADE20K's colours
            meta |= {"hint": "color", "hint_colors": "ade20k"}
    elif "adapter" in parts:
        meta |= {"adapter": "t2i", "hint": "color"}
    else:
        found = " and ".join(parts)
        if parts.keys() == set(BASE_PARTS):
            found = "Stable Diffusion (--sd takes it), as FreestyleNet's own checkpoints do"
        raise InputError(f"{path}: no whole adapter: holds {found}; expected a ControlNet, a "
                         "T2I-Adapter, an official ALDM checkpoint or a file of train.py")
    outputs = count_outputs(parts.get("segmenter", {}))
    if outputs in OFFICIAL:
        classes = class_table(OFFICIAL[outputs])
        meta |= {"dataset": classes.key, "names": list(classes.names),
                 "normalize": outputs in IMAGENET_OUTPUTS}
    return meta


def read_table(path, key, shape):
    """A file of class embeddings -> its tensor, which must have this shape."""
    table = read_file(path)[0]
    found = list(table.shape) if torch.is_tensor(table) else type(table).__name__
    if found != shape or not table.is_floating_point():
        raise InputError(f"{path}: holds {found}, but {key} needs {shape}; give the file of this "
                         "dataset, or none: the text encoder computes the embeddings")
    check_finite({"the table": table}, path)
    return table.float()


def load_class_embeddings(path, classes, text):
    """An official .pth, [N,C] -> the class table [N+1,C]. Its last row, for void pixels, is read
    from null_embedding.pth beside the file, or else computed by the text encoder `text`."""
    path = locate(path)
    void = text.class_embeddings([]).cpu()  # (1, C)
    table = read_table(path, classes.key, [len(classes.names), void.shape[1]])
    beside = path.with_name("null_embedding.pth")
    if beside.exists():
        void = read_table(beside, "void", list(void.shape))
    return torch.cat([table, void])


def count_outputs(state):
    """The number of a segmenter's outputs; 0 if its last layer is missing or damaged."""
    weight, bias = [state.get(name, torch.empty(0)) for name in LAST]
    is_whole = weight.ndim == 4 and weight.shape[:1] == bias.shape
    return len(bias) if is_whole else 0


def match_outputs(classes, ours, names, theirs):
    """Map each of our outputs to the pretrained output that initialises it, by the class's name.

    ours, theirs    numbers of outputs for `classes` and `names`; one more than these is "fake"
    """
    if names == classes.names:  # by number: ADE20K has two classes named screen
        return {i: i for i in range(min(ours, theirs))}
    wanted = classes.names
    if names == class_table("ade20k").names:
        wanted = classes.ade
    wanted = [*wanted, "fake"][:ours]
    found = [*names, "fake"][:theirs]
    return {i: found.index(name) for i, name in enumerate(wanted) if name in found}


def load_segmenter(files, segmenter, classes, meta=None):
    """Start a discriminator (or judge) of `classes` from a file's weights, in place, and set its
    `normalize`. Outputs for classes that the file lacks stay random.

    files    a list of paths: one of ours or official ALDM's, or mit-semseg's encoder and decoder;
             or a state dict, with the `meta` of its file
    meta     its "names" are the file's classes; without them, 150 or 151 outputs are ADE20K's, and
             N or N+1 those of `classes`
    InputError if the file does not fit."""
    what = "segmenter"
    state = files
    if not isinstance(files, dict):
        what = " + ".join(map(str, files))
        state = {}
        for path in files:
            parts, meta = read_parts(path)
            state |= parts.get("segmenter", {})
    meta = meta or {}
    last = {name: segmenter.state_dict()[name] for name in LAST}
    outputs = count_outputs(state)
    names = meta.get("names")
    if not names:
        names = class_table("ade20k").names if outputs in (150, 151) else classes.names
    if outputs not in (len(names), len(names) + 1):
        raise InputError(f"{what}: has {outputs} outputs, expected {len(names)} or "
                         f"{len(names) + 1} for {classes.key}; {SEGMENTERS}")
    if state[LAST[0]].shape[1:] != last[LAST[0]].shape[1:]:
        raise InputError(f"{what}: {LAST[0]} is {list(state[LAST[0]].shape)}, expected "
                         f"{list(last[LAST[0]].shape)[1:]} per output; {SEGMENTERS}")
    rows = match_outputs(classes, len(last[LAST[1]]), tuple(names), outputs)
    check_finite({name: state[name] for name in LAST}, what)
    load_into(segmenter, state | last, what)
    for name, t in last.items():
        t[list(rows)] = state[name][list(rows.values())].to(t)
    segmenter.normalize = bool(meta.get("normalize", outputs in IMAGENET_OUTPUTS))


# networks -> files


def save_adapter(path, model, meta, dtype=None):
    """adapter.safetensors: all that one needs besides the base model, under names that other tools
    read: control_model.* (ControlNet), conv_in and body.* (T2I-Adapter), adapter.* (the others).
    dtype: of the stored weights, e.g. torch.float16 (None: as they are); the class table stays
    fp32. InputError, and no file, if a weight is not finite in that precision."""
    prefix = "" if model.kind == "t2i" else PREFIX[ADAPTER_PART[model.kind]]
    state = model.adapter.state_dict()
    tensors = {prefix + name: t.to(dtype or t.dtype) for name, t in state.items()}
    tensors["layout.table"] = model.layout.table.float()
    save_tensors(path, tensors, {**meta, "format": "aldm-adapter"})


def save_base(path, parts, token_ids=None):
    """The toy's base model in one fp16 file. parts: {part: module or state dict}; of the text
    encoder's token embedding only the rows `token_ids` are kept, those that were trained (None:
    those that differ from initial_tokens)."""
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

"""ALDM: what ties the networks together, in the order in which the paper introduces it.

    TextEncoder, LayoutEncoder      the two conditions: words and label map
    Schedule                        x_t, x0_hat and DDIM steps
    ALDM                            the frozen Stable Diffusion and the adapter: eps_theta(x_t, y, t), sampling
    unrolled_adversarial_loss       Sec. 3.1 and 3.2: L_adv over K unrolled steps
    load_weights                    the files of the field
"""
import ctypes
import json
import os
import pickle
import re
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, reduce
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import QuickGELU, TextTransformer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from data import IGNORE, InputError, class_table
from discriminator import UperNet, layout_loss_map, per_valid_pixel
from unet import OFT, ControlNet, T2IAdapter, UNet, UNetConfig, apply_hint_block, rectify
from vae import VAE, VAEConfig


@dataclass(frozen=True)
class Preset:
    unet: UNetConfig
    vae: VAEConfig
    text: dict              # arguments of TextEncoder
    segmenter: dict         # arguments of UperNet
    hint_widths: tuple      # of the class-embedding hint block
    size: int               # pixels of a training image's side
    hint_average: bool      # class hint: average the classes of a cell, or take its first pixel's, as the official code
    whiten: bool            # the class embeddings: the toy's small text tower hardly keeps them apart

    @property
    def multiple(self):
        """Sides of images must be multiples of this many pixels."""
        return self.vae.factor * 2 ** (len(self.unet.channel_mult) - 1)


PRESETS = {
    "sd15": Preset(UNetConfig(), VAEConfig(), dict(width=768, layers=12, heads=12),
                   dict(layers=(3, 4, 23, 3), width=64, fpn_dim=256), (768, 512, 256), 512, hint_average=False, whiten=False),
    # 64x64 images, 16x16x16 latents. A cell of the hint is 2x2 pixels: averaging keeps poles that are one pixel wide.
    "toy": Preset(UNetConfig(16, 16, model_channels=32, channel_mult=(2, 2, 3), attention_resolutions=(2,), num_heads=4,
                             context_dim=96, groups=8),
                  VAEConfig(ch=64, ch_mult=(1,), num_res_blocks=1, z_channels=16, scale=1.0, groups=1, patch=4),
                  dict(width=96, layers=2, heads=4), dict(layers=(1, 1, 1, 1), width=16, fpn_dim=32, stem_stride=2),
                  (64, 48, 32), 64, hint_average=True, whiten=True),
}

JUDGE = dict(layers=(1, 1, 1, 1), width=8, fpn_dim=24, stem_stride=1)      # the toy's independent segmenter


# -- the conditions: words and layout ---------------------------------------------------------------------------------


@cache
def byte_pairs():
    """CLIP's tokenizer, read once."""
    return SimpleTokenizer()


class TextEncoder(TextTransformer):
    """CLIP's text tower (open_clip's), as Stable Diffusion uses it: quick-GELU, all 77 states after the final norm."""
    START, END = 49406, 49407

    def __init__(self, width=768, layers=12, heads=12):
        super().__init__(width=width, layers=layers, heads=heads, output_dim=None, pool_type="none",
                         act_layer=QuickGELU)

    @property
    def bpe(self):
        return byte_pairs()

    def tokenize(self, texts):
        """list of B strings -> ids [B,77] int64: start, at most 75 tokens, and END up to the end, as SD pads."""
        ids = torch.full((len(texts), 77), self.END)
        for row, text in zip(ids, texts):
            tokens = [self.START, *self.bpe.encode(text)[:75]]
            row[:len(tokens)] = torch.tensor(tokens)
        return ids

    def cut(self, text):
        """The words of `text` beyond the 75 tokens that the model sees, or an empty string."""
        return self.bpe.decode(self.bpe.encode(text)[75:]).strip()

    def forward(self, ids):
        """ids [B,77] int64 -> hidden states [B,77,width]."""
        x = self.token_embedding(ids) + self.positional_embedding
        return self.ln_final(self.transformer(x, attn_mask=self.attn_mask))

    def pooled(self, ids):
        """ids [B,77] int64 -> the state of the first END token [B,width], which has seen the whole text."""
        end = (ids == self.END).int().argmax(dim=1)
        return self(ids)[torch.arange(len(ids)), end]

    @torch.no_grad()
    def encode(self, texts):
        """list of B strings -> context [B,77,width], on this encoder's device."""
        return self(self.tokenize(texts).to(self.positional_embedding.device))

    @torch.no_grad()
    def class_table(self, names):
        """N class names -> [N+1,width]: the embedding of "A photo of {class}" for each, and of "" for void pixels."""
        ids = self.tokenize([f"A photo of {name}" for name in names] + [""])
        return self.pooled(ids.to(self.positional_embedding.device))


def pick_device(name=None):
    """--device: "cpu", "cuda", "cuda:1" -> the same; None: cuda if there is one. InputError if there is none such."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if not (found := re.fullmatch(r"cpu|cuda(?::(\d+))?", name)):
        raise InputError(f"--device {name}: must be cpu or cuda")
    if name != "cpu" and int(found[1] or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: no such CUDA device here; use --device cpu")
    return name


def keep_memory():
    """For CPUs: glibc gives the memory of large tensors back to the system as soon as they are freed, and gets it anew,
    zeroed page by page, for the next ones. Here it keeps it: SD's UNet takes a fifth less time."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for option, value in (-4, 0), (-1, -1), (-8, 1):        # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX
            mallopt(option, value)


def whiten(table):
    """[N+1,C] -> the nearest table whose rows, but for their mean, are orthogonal; entries of unit size."""
    U, _, V = torch.linalg.svd(table.double() - table.double().mean(0), full_matrices=False)
    return (U @ V * table.shape[1] ** 0.5).float()


class LayoutEncoder(nn.Module):
    """Label map y [B,H,W] int64 (255 = void) -> hint, either a one-hot map for a class table, or colours.

    classes   [B,N+1,2h,2w]: the classes at twice the latents' resolution, void last. Multiplied with `table` [N+1,C]
              it is the paper's hint, a map of CLIP embeddings; apply_hint_block does that inside its first convolution.
    color     [B,3,H,W] in [0,1]: the palette's colours, void black
    """

    def __init__(self, table, palette, kind, cell, average):
        super().__init__()
        self.kind, self.cell, self.average = kind, cell, average
        self.register_buffer("table", table)
        self.register_buffer("palette", torch.cat([torch.tensor(palette.tolist()) / 255, torch.zeros(1, 3)]).float(),
                             persistent=False)

    def forward(self, label):
        void = len(self.palette) - 1
        label = label.where(label != IGNORE, void)
        if self.kind == "color":
            return self.palette[label].permute(0, 3, 1, 2)
        if not self.average:    # subsample, then look up: the same as the official code's order, and cheaper
            label = label[:, ::self.cell, ::self.cell]
        onehot = (label[:, None] == torch.arange(void + 1, device=label.device)[:, None, None]).float()
        return F.avg_pool2d(onehot, self.cell) if self.average else onehot


# -- diffusion (Sec. 3.1) ---------------------------------------------------------------------------------------------


class Schedule(nn.Module):
    """Stable Diffusion's noise schedule: sqrt(beta) is linear, a_t = alphas_cumprod[t] = prod_{s<=t} (1 - beta_s)."""

    def __init__(self, num_timesteps=1000, beta_start=0.00085, beta_end=0.012):
        super().__init__()
        betas = torch.linspace(beta_start ** 0.5, beta_end ** 0.5, num_timesteps, dtype=torch.float64) ** 2
        self.register_buffer("alphas_cumprod", (1 - betas).cumprod(0).float(), persistent=False)

    def ddim_timesteps(self, S):
        """S ascending timesteps [S] int64, evenly spaced from 1: 1, 41, ..., 961 for S = 25."""
        T = len(self.alphas_cumprod)
        return (torch.arange(S, device=self.alphas_cumprod.device) * T // S + 1).clamp(max=T - 1)

    def a(self, t):
        """a_t for t [B] (or a number), as [B,1,1,1]; behind the end of the chain (t < 0) it is a_0, not 1."""
        return self.alphas_cumprod[torch.as_tensor(t, device=self.alphas_cumprod.device).clamp(min=0)].view(-1, 1, 1, 1)

    def add_noise(self, x0, t, noise):
        """x_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps"""
        return self.a(t).sqrt() * x0 + (1 - self.a(t)).sqrt() * noise

    def predict_x0(self, x_t, t, eps):
        """The denoised estimate: x0_hat = (x_t - sqrt(1 - a_t) eps) / sqrt(a_t)"""
        return (x_t - (1 - self.a(t)).sqrt() * eps) / self.a(t).sqrt()

    def ddim_step(self, x_t, eps, t, t_prev, eta=0.0, noise=None):
        """x_{t_prev} = sqrt(a_prev) x0_hat + sqrt(1 - a_prev - sigma^2) eps + sigma noise (DDIM, Song et al. 2021);
        t_prev < 0 means the end of the chain; eta = 0 is deterministic, eta = 1 is DDPM's variance."""
        a, a_prev = self.a(t), self.a(t_prev)
        sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).clamp(min=0).sqrt()
        x = a_prev.sqrt() * self.predict_x0(x_t, t, eps) + (1 - a_prev - sigma ** 2).clamp(min=0).sqrt() * eps
        return x if eta == 0 else x + sigma * (torch.randn_like(x) if noise is None else noise)


# -- the model --------------------------------------------------------------------------------------------------------


class ALDM(nn.Module):
    """The frozen Stable Diffusion (unet, vae, text), the adapter that is trained, and the layout encoder it sees by.

    adapter   controlnet | t2i | oft | freestyle (which trains the UNet itself)
    hint      classes | color, for the ControlNet; the T2I-Adapter takes colours, OFT classes, Freestyle neither
    table     [N+1,C] class embeddings, void last; None: the text encoder's
    """

    def __init__(self, preset, unet, vae, text, classes, adapter="controlnet", hint="classes", table=None):
        super().__init__()
        self.preset, self.classes, self.kind = preset, classes, adapter
        self.unet, self.vae, self.text = (part.requires_grad_(False).eval() for part in (unet, vae, text))
        self.schedule = Schedule()
        hint = {"t2i": "color", "oft": "classes"}.get(adapter, hint)
        if table is None:
            table = text.class_table(classes.names)
            table = whiten(table) if preset.whiten else table
        self.layout = LayoutEncoder(table.float(), classes.palette, hint, vae.cfg.factor // 2, preset.hint_average)
        channels, halvings = 3 if hint == "color" else table.shape[1], vae.cfg.factor.bit_length() - 1
        if adapter == "controlnet":
            self.adapter = ControlNet(unet.cfg, channels, preset.hint_widths, halvings)
            self.adapter.start_from(unet)
        elif adapter == "t2i":
            self.adapter = T2IAdapter(unet.cfg, vae.cfg.factor)
        elif adapter == "oft":
            self.adapter = OFT(unet, channels, preset.hint_widths)
            self.adapter.attach(unet)
        else:
            self.adapter = unet.requires_grad_(True)

    @property
    def device(self):
        return self.schedule.alphas_cumprod.device

    def encode_layout(self, label):
        """label [B,H,W] int64 -> what `eps` needs of it. It does not depend on x_t or t: compute it once per layout."""
        if self.kind == "freestyle":
            return self.rectified_text(label)
        hint = self.layout(label)
        if self.kind == "t2i":
            return {"features": self.adapter(hint)}
        table = self.layout.table if self.layout.kind == "classes" else None
        features = apply_hint_block(self.adapter.input_hint_block, hint, table)
        return {"features": {0: features}} if self.kind == "oft" else {"hint": features}

    def rectified_text(self, label):
        """FreestyleNet's conditions: the text is the list of the layout's classes, largest first, and each pixel attends
        to the words of its own class. label [B,H,W] -> {"context": [B,77,C], "mask": [B,77,h,w] bool}"""
        ids = torch.full((len(label), 77), self.text.END)
        token_class = torch.full((len(label), 77), -1)
        for row, owner, y in zip(ids, token_class, label.cpu()):
            present, count = y[y != IGNORE].unique(return_counts=True)
            words = [(c, token) for c in present[count.argsort(descending=True)].tolist()
                     for token in self.text.bpe.encode(self.classes.names[c] + ",")][:75]
            row[0] = self.text.START
            if words:
                owner[1:len(words) + 1], row[1:len(words) + 1] = torch.tensor(words).T
        f = self.vae.cfg.factor
        with torch.no_grad():
            context = self.text(ids.to(self.device))
        return {"context": context, "mask": rectify(label[:, ::f, ::f], token_class.to(self.device))}

    def eps(self, x_t, t, text, layout):
        """eps_theta(x_t, y, t): x_t [B,4,h,w], t [B] int64, text (B prompts, or their context [B,77,C]), layout (label
        map [B,H,W] int64, or what encode_layout made of it) -> the noise in x_t [B,4,h,w] fp32."""
        context = text if torch.is_tensor(text) else self.text.encode(text)
        layout = self.encode_layout(layout) if torch.is_tensor(layout) else dict(layout)
        if "hint" in layout:
            layout = {"control": self.adapter.residuals(x_t, t, context, layout["hint"])}
        return self.unet(x_t, t, layout.pop("context", context), **layout).float()

    @torch.no_grad()
    def sample(self, label, context, uncond=None, steps=25, cfg=1.0, noise=None, eta=0.0, on_step=None):
        """DDIM from noise [B,4,h,w] to a latent x_0, with classifier-free guidance: eps_u + cfg (eps_c - eps_u), the
        layout in both halves, which run as one batch. label [B,H,W], context and uncond [B,77,C]. on_step(i, x0_hat)
        is called after each of the `steps` steps."""
        guided = cfg != 1.0 and uncond is not None and self.kind != "freestyle"         # (its text is the layout's)
        if guided:
            label, context = torch.cat([label, label]), torch.cat([uncond, context])
        layout = self.encode_layout(label)
        x, timesteps = noise.to(self.device), self.schedule.ddim_timesteps(steps).flip(0).tolist()
        for i, (t, t_prev) in enumerate(zip(timesteps, timesteps[1:] + [-1])):
            batch = torch.cat([x, x]) if guided else x
            eps = self.eps(batch, torch.full((len(batch),), t, device=self.device), context, layout)
            if guided:
                eps_u, eps_c = eps.chunk(2)
                eps = eps_u + cfg * (eps_c - eps_u)
            if on_step:
                on_step(i, self.schedule.predict_x0(x, t, eps))
            x = self.schedule.ddim_step(x, eps, t, t_prev, eta)
        return x


# -- the objective (Sec. 3.1 and 3.2) ---------------------------------------------------------------------------------


def unrolled_adversarial_loss(model, discriminator, x_t, eps, start, timesteps, label, context, layout,
                              unroll, grad="first", group=0):
    """L_adv: the layout loss of the discriminator, averaged over x0_hat(t) and K further DDIM steps (Fig. 2 C).

    model          has eps(x_t, t, context, layout), vae.decode and schedule
    x_t, eps       [B,4,h,w]: where the chain starts, and eps_theta there (the noise loss has computed it already)
    start          [B] int64: x_t's index in the ascending DDIM `timesteps` [S]; at least `unroll` (= K)
    label          [B,H,W] int64
    grad           first: of x0_hat(t) only, its loss map rescaled pixel by pixel to the mean over all estimates
                   each:  of every estimate, but not through the states x_{t-1}, x_{t-2}, ...
                   full:  through the whole chain. The three agree in value.
    group          how many estimates are decoded and judged in one batch (0: all)
    -> L_adv (scalar), the images of x0_hat(t) [B,3,H,W] in [-1,1], detached: the discriminator's next fakes
    """
    schedule, t = model.schedule, timesteps[start]
    estimates = [schedule.predict_x0(x_t, t, eps)]
    for k in range(1, unroll + 1):
        if grad != "full":
            x_t, eps = x_t.detach(), eps.detach()
        t_prev = timesteps[start - k]
        x_t, t = schedule.ddim_step(x_t, eps, t, t_prev), t_prev
        with torch.no_grad() if grad == "first" else nullcontext():
            eps = model.eps(x_t, t, context, layout)
        estimates.append(schedule.predict_x0(x_t, t, eps))

    def judge(x0_hat):              # [nB,4,h,w] -> images, loss maps [n,B,H,W]
        image = model.vae.decode(x0_hat).float().clamp(-1, 1)
        n = len(image) // len(label)
        return image, layout_loss_map(discriminator(image), label.repeat(n, 1, 1)).unflatten(0, (n, -1))

    def judge_all(estimates):
        size = group or len(estimates)
        images, maps = zip(*(judge(torch.cat(estimates[i:i + size])) for i in range(0, len(estimates), size)))
        return images[0][:len(label)].detach(), torch.cat(maps)

    if grad != "first" or unroll == 0:
        images, maps = judge_all(estimates)
        return per_valid_pixel(maps.mean(0), label), images
    images, first = judge_all(estimates[:1])                        # L_0, with gradient
    with torch.no_grad():
        _, rest = judge_all(estimates[1:])                          # L_1 .. L_K, without
        mean = torch.cat([first, rest]).mean(0)
        scale = torch.where(first[0] > 0, mean / first[0].clamp(min=1e-12), 0)
    rescaled = first[0] * scale                                     # L_0 / stop(L_0) * stop(mean_k L_k)
    return per_valid_pixel(rescaled + (mean - rescaled).detach(), label), images


# -- weights ----------------------------------------------------------------------------------------------------------

SD_FILE = "v1-5-pruned-emaonly.safetensors"
SD_REPOS = "stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5"    # its new, its old name
PREFIXES = {            # how a name in a file begins -> the part it belongs to; the first that fits
    "model.diffusion_model.": "unet", "first_stage_model.": "vae", "control_model.": "control", "text.": "text",
    "judge.": "judge", "domain.": "domain", "adapter.": "adapter", "layout.": "layout",
    "segmenter.segmenter.": "segmenter", "segmenter.": "segmenter",     # official ALDM; ours
    "cond_stage_model.transformer.text_model.": "hf_text", "cond_stage_model.transformer.": "hf_text"}
PREFIX = {part: prefix for prefix, part in PREFIXES.items()}            # as we write them
BARE = {                # a file of one part has no prefixes: a name that tells -> the part, and what its names lack
    "zero_convs.": ("control", ""), "quant_conv.": ("vae", ""), "body.": ("adapter", ""),
    "layer4.": ("segmenter", "encoder."), "conv_last.": ("segmenter", "decoder.")}      # mit-semseg's two files
PASSED_OVER = re.compile(r"position_ids$|\._tmp_running_(mean|var)$|\._running_iter$|^(first_stage_model\.)?loss\.|"
                         r"transformer\.text_projection")
HF_TEXT = {             # CLIP's names: Hugging Face's -> open_clip's
    "cond_stage_model.transformer.text_model.": "", "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_": "token_", "final_layer_norm": "ln_final", "encoder.layers": "transformer.resblocks",
    "self_attn": "attn", "layer_norm": "ln_", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
FOREIGN = {             # a name, or name and shape, that tells a file which does not fit -> what the file is
    r"lora[_.](up|down|unet|te|A|B)|^lora_": "a LoRA, a change to a model",
    r"^conditioner\.embedders\.|label_emb\.": "Stable Diffusion XL",
    r"^cond_stage_model\.model\.|attn2\.to_k\.weight \[\d+, 1024\]": "Stable Diffusion 2.x",
    r"joint_blocks\.|double_blocks\.": "Stable Diffusion 3 or FLUX",
    r"input_blocks\.0\.0\.weight \[\d+, 9,": "an inpainting model, whose UNet takes 9 channels",
    r"(^|\.)(down_blocks|mid_block|up_blocks|time_embedding|resnets)\.": "weights with diffusers' names",
    r"^output_blocks\.": "a UNet without its prefix, autoencoder and text encoder"}
WANTED = "wanted is Stable Diffusion 1.x as one .safetensors or .ckpt file, or an adapter for it"
LAST = "decoder.conv_last.1.weight", "decoder.conv_last.1.bias"         # the segmenter's layer that depends on classes
ADAPTER_PART = {"controlnet": "control", "t2i": "adapter", "oft": "adapter", "freestyle": "unet"}


class Ignored:
    """Stands in for what training frameworks leave in a checkpoint: nothing of theirs is imported or run."""
    NAMES = ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "numpy.dtype",
             "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")

    def __init__(self, *args):
        pass

    __setstate__ = __init__


def read_file(path):
    """A file of safetensors or torch.save -> what it holds, and the metadata if it is an adapter of ours, else {}.
    Tensors are memory-mapped (but for torch's format of before 2020) and nothing is executed. Raises InputError."""
    path = Path(path)
    if path.is_dir():
        ours = not any((path / name).exists() for name in ("model_index.json", "config.json"))
        raise InputError(f"{path}: a folder{'' if ours else ' of diffusers'}; {WANTED}")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with open(path, "rb") as f:
            head = f.read(512)
        what = ("an empty file" if not head else
                "a web page saved in place of the file" if head.lstrip()[:1] == b"<" else
                "a Git LFS pointer, not the file itself" if head.startswith(b"version https://git-lfs") else
                "a text file, not weights" if not re.search(rb"[\0-\x08\x0e-\x1f]", head) else None)
        if what:
            raise InputError(f"{path}: {what}; download it again")
        if head[8:9] == b"{":
            with safe_open(path, "pt") as f:
                ours = (f.metadata() or {}).get("format") == '"aldm-adapter"'
                return ({name: f.get_tensor(name) for name in f.keys()},
                        {k: json.loads(v) for k, v in f.metadata().items()} if ours else {})
        with torch.serialization.safe_globals([(Ignored, name) for name in Ignored.NAMES]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=head[:2] == b"PK"), {}
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        called = re.search(r"GLOBAL (\S+)", str(error))
        raise InputError(f"{path}: a pickle that {f'calls {called[1]}' if called else 'holds more than weights'}: "
                         "refused, nothing of it was executed; look for the same file as .safetensors") from None
    except Exception as error:                              # whatever the two libraries raise at a damaged file
        raise InputError(f"{path}: damaged, cut short or not weights ({path.stat().st_size:,} bytes; "
                         f"{(str(error) or type(error).__name__).splitlines()[0][:120]}); download it again") from None


def read_parts(path):
    """-> {part: state dict}, the metadata if it is an adapter of ours, else {}."""
    content, meta = read_file(path)
    content = isinstance(content, dict) and content.get("state_dict", content)
    content = content if isinstance(content, dict) else {}
    checkpoint = all(isinstance(content.get(k), dict) for k in ("meta", "adapter"))         # of train.py
    meta = {**content["meta"], "step": content.get("step")} if checkpoint else meta
    if meta and meta.get("adapter") not in ADAPTER_PART:
        raise InputError(f"{path}: an adapter of the kind {meta.get('adapter')}; known are {', '.join(ADAPTER_PART)}")
    if checkpoint:
        inside = {PREFIX[ADAPTER_PART[meta["adapter"]]]: content["adapter"], "layout.": content.get("layout", {}),
                  "segmenter.": content.get("discriminator", {})}
        content = {prefix + name: t for prefix, state in inside.items() for name, t in state.items()}
    tensors = {str(name): t.detach() for name, t in content.items() if torch.is_tensor(t)}
    for pattern, what in FOREIGN.items():
        if any(re.search(pattern, f"{name} {list(t.shape)}") for name, t in tensors.items()):
            raise InputError(f"{path}: {what}; {WANTED}")
    parts, bare = {}, {}
    for name, t in tensors.items():
        prefix = next((p for p in PREFIXES if name.startswith(p)), "")
        if not PASSED_OVER.search(name):
            (parts.setdefault(PREFIXES[prefix], {}) if prefix else bare)[name[len(prefix):]] = t
    for tell, (part, lacks) in BARE.items():
        if part not in parts and any(name.startswith(tell) for name in bare):
            parts[part] = {lacks + name: t for name, t in bare.items()}
    if not parts:
        raise InputError(f"{path}: {len(tensors)} tensors, none known here ({', '.join(list(tensors)[:3])}); {WANTED}")
    for name in parts.get("unet", ()):                      # averaged weights, if any; their names have lost the dots
        averaged = "model_ema.diffusion_model" + name.replace(".", "")
        parts["unet"][name] = tensors.get(averaged, parts["unet"][name])
    if "hf_text" in parts:
        parts["text"] = text_from_huggingface(parts.pop("hf_text"))
    if "token_embedding.rows" in (text := parts.get("text", {})):
        rows, ids = text.pop("token_embedding.rows"), text.pop("token_embedding.ids")
        text["token_embedding.weight"] = initial_tokens(rows.shape[1]).index_copy_(0, ids, rows.float())
    return parts, meta


def load_weights(path):
    """Any file of the field -> {part: state dict}, the tensors memory-mapped as they are in the file. Parts: unet, vae,
    text (TextEncoder's names), control, segmenter (UperNet's); of our own files also judge, domain, adapter, layout."""
    return read_parts(path)[0]


def text_from_huggingface(state):
    """CLIP's text tower in Hugging Face's names -> in open_clip's, where q, k and v are fused into one projection."""
    state = dict(state)
    for name in [name for name in state if "q_proj" in name]:
        qkv = [name.replace("q_proj", p) for p in ("q_proj", "k_proj", "v_proj")]
        if all(n in state for n in qkv):
            state[name.replace("q_proj.", "in_proj_")] = torch.cat([state.pop(n) for n in qkv])
    return {reduce(lambda n, pair: n.replace(*pair), HF_TEXT.items(), name): t for name, t in state.items()}


def initial_tokens(width):
    """The toy's token embedding [49408,width] before training: its file has only the rows that were trained."""
    return torch.empty(49408, width).normal_(std=0.02, generator=torch.Generator().manual_seed(0))


def load_into(module, state, what, device=None, dtype=None):
    """Fill `module` with `state`, strictly: missing, unexpected and misshapen tensors are counted and named in an
    InputError that begins with `what`. It ends on `device` in `dtype` (None: where and as it is). On the meta device it
    takes the file's tensors one by one; elsewhere it is overwritten in place, as others may share its parameters."""
    if not any(p.is_meta for p in module.parameters()):
        module.to(device=device, dtype=dtype)
    ours = module.state_dict()
    state = {**{k: torch.tensor(0) for k in ours if k.endswith("num_batches_tracked")}, **state}   # (old files lack it)
    faults = {"missing": [k for k in ours if k not in state], "unexpected": [k for k in state if k not in ours],
              "of another shape": [f"{k} {list(state[k].shape)} instead of {list(v.shape)}" for k, v in ours.items()
                                   if k in state and state[k].shape != v.shape]}
    if any(faults.values()):
        raise InputError(f"{what}: does not fit, tensors are " + "; ".join(
            f"{how}: {len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for how, names in faults.items() if names))
    for name, t in state.items():
        if not ours[name].is_meta:
            ours[name].copy_(t)                             # (in the module's own memory)
            continue
        owner, _, leaf = name.rpartition(".")
        owner, t = module.get_submodule(owner), t.to(device=device, dtype=dtype if t.is_floating_point() else None)
        old = owner._parameters.get(leaf)
        setattr(owner, leaf, t if old is None else nn.Parameter(t, requires_grad=old.requires_grad))


def base_file(preset_name):
    """The base model when --sd names none: assets/ for the toy; SD 1.5 from Hugging Face's cache, or a download."""
    if preset_name == "toy":
        return Path(__file__).parent / "assets" / "toy.safetensors"
    for repo in SD_REPOS:
        if isinstance(found := try_to_load_from_cache(repo, SD_FILE), str):
            return found
    try:
        return hf_hub_download(SD_REPOS[0], SD_FILE)
    except Exception as error:                              # offline, no such host, disk full: each has its own class
        raise InputError(f"{SD_FILE}: could not be downloaded ({type(error).__name__}); fetch it from huggingface.co/"
                         f"{SD_REPOS[0]}, put it anywhere and say --sd PATH") from None


def load_frozen(preset_name, sd=None, device="cpu", dtype=torch.float32):
    """-> unet (stored in `dtype`), vae, text (fp32), {part: state dict} of what else the file has. They are built
    without memory and take the file's tensors one by one, so that there is never a second copy of the weights. What is
    in the wanted precision on a CPU is not even read, but stays mapped: do not overwrite the file meanwhile."""
    preset, path = PRESETS[preset_name], sd or base_file(preset_name)
    parts = load_weights(path)
    if lacks := [part for part in ("unet", "vae", "text") if part not in parts]:
        raise InputError(f"{path}: {' and '.join(parts)} alone, without {' and '.join(lacks)}; {WANTED}")
    with torch.device("meta"):
        unet, vae, text = UNet(preset.unet), VAE(preset.vae), TextEncoder(**preset.text)
    for part, net in ("unet", unet), ("vae", vae), ("text", text):
        load_into(net, parts.pop(part), f"{path}: {part}", device, dtype if part == "unet" else torch.float32)
    text.attn_mask = text.build_causal_mask().to(device)    # a buffer that no file has
    return unet, vae, text, parts


def read_adapter(path):
    """What --init, --adapter and --ckpt accept -> meta, {part: state dict}; the adapter's is also under "adapter".

    Our adapter.safetensors, a checkpoint_*.pt of train.py, or the folder with these (its newest adapter, else newest
    checkpoint): meta is what was saved with it. Official ALDM, ControlNet and T2I-Adapter files: the same keys (preset,
    dataset, names, palette, adapter, hint, step), None where the file does not say."""
    found = list(Path(path).glob("adapter*.safetensors")) or list(Path(path).glob("checkpoint_*.pt"))
    path = max(found, key=os.path.getmtime, default=path)
    parts, meta = read_parts(path)
    if not meta:
        if not (kind := "controlnet" if "control" in parts else "t2i" if "adapter" in parts else None):
            raise InputError(f"{path}: {' and '.join(parts)}, but no adapter; a base model is given with --sd")
        first = parts.get("control", {}).get("input_hint_block.0.weight")
        dataset = {20: "cityscapes", 151: "ade20k"}.get(len(parts.get("segmenter", {}).get(LAST[1], ())))
        classes = class_table(dataset) if dataset else None
        meta = dict(preset="sd15", dataset=dataset, names=dataset and list(classes.names), step=None, adapter=kind,
                    palette=dataset and classes.palette.tolist(),
                    hint="color" if first is None or first.shape[1] == 3 else "classes")
    return meta, {**parts, "adapter": parts.get(ADAPTER_PART[meta["adapter"]], {})}


@contextmanager
def atomic(path):
    """Yields a temporary path beside `path`: what is written there takes the place of `path` once all of it is on the
    disk. If anything fails on the way it is removed, and `path` is as it was."""
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_tensors(path, tensors, metadata):
    """A safetensors file; the values of `metadata` as JSON."""
    with atomic(path) as temporary:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary,
                  {k: json.dumps(v, default=lambda array: array.tolist()) for k, v in metadata.items()})
        os.chmod(temporary, 0o644)                          # (safetensors makes files that only their owner can read)


def save_adapter(path, model, meta):
    """adapter.safetensors: all that one needs beside the base model, in names that other tools read: control_model.*
    (ControlNet), conv_in and body.* (T2I-Adapter), adapter.* (OFT) or model.diffusion_model.* (Freestyle)."""
    prefix = "" if model.kind == "t2i" else PREFIX[ADAPTER_PART[model.kind]]
    tensors = {prefix + name: t for name, t in model.adapter.state_dict().items()}
    save_tensors(path, {**tensors, "layout.table": model.layout.table}, {**meta, "format": "aldm-adapter"})


def save_base(path, parts, token_ids=None, metadata={}):
    """The toy's base model in one fp16 file. parts: {part: module or state dict}; of the text encoder's token embedding
    only the rows `token_ids` are kept, those it was trained on (None: those that are not as they were initialised)."""
    states = {part: dict(x.state_dict() if isinstance(x, nn.Module) else x) for part, x in parts.items()}
    if "text" in states:
        table = states["text"].pop("token_embedding.weight").float().cpu()
        ids = (table != initial_tokens(table.shape[1])).any(1).nonzero()[:, 0] if token_ids is None else \
            torch.as_tensor(list(token_ids)).unique().cpu()
        states["text"] |= {"token_embedding.rows": table[ids], "token_embedding.ids": ids}
    save_tensors(path, {PREFIX[part] + name: t.half() if t.is_floating_point() else t
                        for part, state in states.items() for name, t in state.items()}, metadata)


def load_class_embeddings(path, classes, null=None):
    """An official .pth, [N,C] -> the class table [N+1,C]. Its last row, for void pixels: null_embedding.pth beside the
    file, else `null`: the embedding of "" [1,C], or the text encoder that computes it."""
    null = null.class_table([]) if isinstance(null, TextEncoder) else null
    beside = Path(path).with_name("null_embedding.pth")
    tables = [read_file(path)[0], read_file(beside)[0] if beside.exists() else null]
    width = next((t.shape[-1] for t in (null, tables[1]) if torch.is_tensor(t) and t.ndim), None)
    have = [list(t.shape) if torch.is_tensor(t) else type(t).__name__ for t in tables]
    want = [[len(classes.names), width], [1, width]]
    if have != want:
        raise InputError(f"{path}: {have[0]} and, for void pixels, {have[1]}, but {classes.key} wants {want[0]} and "
                         f"{want[1]}; give the file of this dataset, or none: the text encoder computes them")
    return torch.cat([t.float().cpu() for t in tables])


def load_segmenter(files, segmenter, classes):
    """Start a discriminator (or judge) from a path (official ALDM, or ours), the paths of mit-semseg's encoder and
    decoder, or a state dict -> how many of its N+1 (or N) outputs start from the file's; the others stay at random.

    N+1 outputs, or N: the same classes. 150 or 151: ADE20K's, of which each class takes the one nearest to it."""
    paths = [] if isinstance(files, dict) else [files] if isinstance(files, (str, os.PathLike)) else list(files)
    what, state = " + ".join(map(str, paths)) or "segmenter", dict(files) if isinstance(files, dict) else {}
    for path in paths:
        state |= load_weights(path).get("segmenter", {})
    ours, N, ade = segmenter.state_dict(), len(classes.names), class_table("ade20k").names
    outputs, rows = len(state.get(LAST[1], ())), {i: i for i in range(N + 1)}
    if outputs in (150, 151) and (len(paths) == 2 or outputs != N + 1) and classes.names != ade:
        rows = {**{i: ade.index(name) for i, name in enumerate(classes.ade) if name}, N: 150}      # 150: fake, if any
    elif outputs not in (0, N, N + 1):
        raise InputError(f"{what}: a segmenter of {outputs} classes, neither the {N} of {classes.key} nor ADE20K's")
    rows = {i: row for i, row in rows.items() if row < outputs and i < len(ours[LAST[1]])}
    for name in LAST:
        if name in state and state[name].shape[1:] == ours[name].shape[1:]:     # (if not: load_into says so)
            start = ours[name].clone()
            start[list(rows)] = state[name][list(rows.values())].to(start)
            state[name] = start
    load_into(segmenter, state, what)
    return len(rows)


# -- the map ----------------------------------------------------------------------------------------------------------


def print_map():
    """`python aldm.py`: the paper's symbols, the functions that compute them, and their shapes for one image. The shapes
    are those of a dry run through the networks (on torch's meta device, which computes shapes only)."""
    def shapes(preset):
        size, classes = preset.size, class_table("cityscapes")
        with torch.device("meta"):
            unet, vae, text = UNet(preset.unet), VAE(preset.vae), TextEncoder(**preset.text)
            discriminator = UperNet(len(classes.names) + 1, **preset.segmenter).eval()
            image, label = torch.empty(1, 3, size, size), torch.empty(1, size, size, dtype=torch.int64)
            table = torch.empty(len(classes.names) + 1, preset.text["width"])
            context = torch.empty(1, 77, preset.text["width"])
            model = ALDM(preset, unet, vae, text, classes, table=table).to("meta")
            t = torch.empty(1, dtype=torch.int64)
            x0 = vae.encode(image)
            onehot, hint = model.layout(label), model.encode_layout(label)["hint"]
            control = model.adapter.residuals(x0, t, context, hint)
            decoded = vae.decode(unet(x0, t, context, control))
            logits = discriminator(decoded)
            count = lambda module: f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M weights"
            adapters = [count(T2IAdapter(preset.unet, preset.vae.factor)),
                        count(OFT(unet, preset.text["width"], preset.hint_widths))]
        return [label, x0, x0, context, onehot, hint, x0, f"{len(control)} residuals", x0, decoded, logits, label,
                count(unet), count(model.adapter), *adapters, count(vae), count(text), count(discriminator)]

    rows = [("y", "the layout", "data.read_layout"), ("x_0", "clean latent", "VAE.encode"),
            ("x_t", "noised latent", "Schedule.add_noise"), ("c", "the words", "TextEncoder"),
            ("y, one-hot", "classes at the hint's resolution", "LayoutEncoder"),
            ("", "the hint's features", "apply_hint_block"), ("eps_theta(x_t, y, t)", "predicted noise", "ALDM.eps"),
            ("", "what the adapter adds", "ControlNet.residuals"), ("x0_hat", "denoised estimate", "Schedule.predict_x0"),
            ("", "the estimate as an image", "VAE.decode"), ("Dis(x0_hat)", "N+1 logits per pixel", "UperNet"),
            ("gamma_c CE", "layout loss map", "layout_loss_map"),
            ("", "frozen UNet", "UNet"), ("", "adapter", "ControlNet"), ("", "adapter", "T2IAdapter"), ("", "adapter", "OFT"),
            ("", "autoencoder", "VAE"), ("", "text encoder", "TextEncoder"), ("Dis", "discriminator", "UperNet")]
    show = lambda v: v if isinstance(v, str) else " x ".join(map(str, v.shape))
    print(f"{'symbol':22}{'what it is':34}{'function':24}{'toy':20}sd15")
    for (symbol, what, function), toy, sd in zip(rows, *(shapes(PRESETS[name]) for name in ("toy", "sd15"))):
        print(f"{symbol:22}{what:34}{function:24}{show(toy):20}{show(sd)}")
    print("L_noise                train.generator_loss\nL_adv, unrolled        aldm.unrolled_adversarial_loss\n"
          "L_Dis                  discriminator.discriminator_loss")


if __name__ == "__main__":
    print_map()

"""The KL autoencoder of Stable Diffusion 1.x: images of 512x512 become latents of 64x64x4 and back.

The paper trains and samples in its latent space, and decodes the denoised estimates with it so that the discriminator
judges pixels (Sec. 3.1). Attribute names are the checkpoint's key names under `first_stage_model.`.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


@dataclass(frozen=True)
class VAEConfig:
    ch: int             = 128           # channels at full resolution
    ch_mult: tuple      = (1, 2, 4, 4)  # channels at each halving of the resolution
    num_res_blocks: int = 2             # per level of the encoder; the decoder has one more
    z_channels: int     = 4
    scale: float        = 0.18215       # brings the latents to unit variance
    groups: int         = 32            # of the group norms
    patch: int          = 1             # side of the squares of pixels that are folded into channels first

    @property
    def factor(self):
        """Pixels per latent cell, along one side."""
        return self.patch * 2 ** (len(self.ch_mult) - 1)


def norm(channels, groups):
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))"""

    def __init__(self, cin, cout, groups):
        super().__init__()
        self.norm1 = norm(cin, groups)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = norm(cout, groups)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        if cin != cout:
            self.nin_shortcut = nn.Conv2d(cin, cout, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """One head of self-attention over all pixels, at the lowest resolution."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = norm(c, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (rearrange(f(h), "b c h w -> b 1 (h w) c") for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Middle(nn.Module):
    def __init__(self, c, groups):
        super().__init__()
        self.block_1, self.block_2 = ResnetBlock(c, c, groups), ResnetBlock(c, c, groups)
        self.attn_1 = AttnBlock(c, groups)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Resample(nn.Module):
    """Halve (stride 2, padded at the right and bottom only) or double (nearest, then a convolution) the resolution."""

    def __init__(self, c, up):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(c, c, 3, padding=1) if up else nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """The residual blocks of one resolution, then the way to the next one."""

    def __init__(self, cin, cout, blocks, groups, resample=None):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(cin if i == 0 else cout, cout, groups) for i in range(blocks))
        self.resample = resample
        if resample:
            self.add_module(resample, Resample(cout, up=resample == "upsample"))

    def forward(self, x):
        for block in self.block:
            x = block(x)
        return getattr(self, self.resample)(x) if self.resample else x


class Encoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        ch = [cfg.ch * m for m in cfg.ch_mult]
        last = len(ch) - 1
        self.conv_in = nn.Conv2d(3 * cfg.patch ** 2, cfg.ch, 3, padding=1)
        self.down = nn.ModuleList(Level(ch[i - 1] if i else cfg.ch, c, cfg.num_res_blocks, cfg.groups,
                                        None if i == last else "downsample") for i, c in enumerate(ch))
        self.mid = Middle(ch[-1], cfg.groups)
        self.norm_out = norm(ch[-1], cfg.groups)
        self.conv_out = nn.Conv2d(ch[-1], 2 * cfg.z_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        ch = [cfg.ch * m for m in cfg.ch_mult]
        last = len(ch) - 1
        self.conv_in = nn.Conv2d(cfg.z_channels, ch[-1], 3, padding=1)
        self.mid = Middle(ch[-1], cfg.groups)
        self.up = nn.ModuleList(Level(ch[min(i + 1, last)], c, cfg.num_res_blocks + 1, cfg.groups,
                                      "upsample" if i else None) for i, c in enumerate(ch))
        self.norm_out = norm(ch[0], cfg.groups)
        self.conv_out = nn.Conv2d(ch[0], 3 * cfg.patch ** 2, 3, padding=1)

    def forward(self, z):
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):     # up.0 is the full resolution
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VAE(nn.Module):
    """Stable Diffusion's first stage. Images are [B,3,H,W] in [-1,1]; latents [B,z,H/f,W/f], scaled to unit variance."""

    def __init__(self, cfg=VAEConfig()):
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * cfg.z_channels, 2 * cfg.z_channels, 1)
        self.post_quant_conv = nn.Conv2d(cfg.z_channels, cfg.z_channels, 1)

    def moments(self, image):
        """image [B,3,H,W] in [-1,1] -> mean, logvar of the (unscaled) latent's Gaussian, each [B,z,H/f,W/f]."""
        mean, logvar = self.quant_conv(self.encoder(F.pixel_unshuffle(image, self.cfg.patch))).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, image, sample=False):
        """image [B,3,H,W] in [-1,1] -> scaled latent z [B,z,H/f,W/f]: the Gaussian's mean, or a draw from it."""
        mean, logvar = self.moments(image)
        if sample:
            mean = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        return mean * self.cfg.scale

    def decode(self, z):
        """Scaled latent z [B,z,h,w] -> image [B,3,h*f,w*f], about [-1,1] (not clamped)."""
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(z / self.cfg.scale)), self.cfg.patch)

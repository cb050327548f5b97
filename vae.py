"""The KL autoencoder of Stable Diffusion 1.x: 512x512 images become latents of 64x64x4 and back.

The paper trains and samples in its latent space, and decodes the denoised estimates with it so that
the discriminator judges pixels (Sec. 3.1). Attribute names are the key names of checkpoints, after
`first_stage_model.`.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


@dataclass(frozen=True)
class VAEConfig:
    """The defaults are Stable Diffusion 1.x."""
    ch: int = 128  # channels at full resolution
    ch_mult: tuple = (1, 2, 4, 4)  # channels at each halving of the resolution, in units of ch
    num_res_blocks: int = 2  # per level of the encoder; the decoder has one more
    z_channels: int = 4
    scale: float = 0.18215  # brings the latents to unit variance
    groups: int = 32  # of the group norms
    patch: int = 1  # side of the squares of pixels that are first folded into channels

    @property
    def factor(self):
        """Pixels per latent cell, along one side."""
        return self.patch * 2 ** (len(self.ch_mult) - 1)


# -- layers ----------------------------------------------------------------------------------------


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
        self.nin_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        """x [B,cin,h,w] -> [B,cout,h,w]."""
        h = self.conv1(F.silu(self.norm1(x)))  # (B, cout, h, w)
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """One head of self-attention over all pixels, at the lowest resolution."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = norm(c, groups)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x):
        """x [B,c,h,w] -> [B,c,h,w]."""
        h = self.norm(x)
        q = rearrange(self.q(h), "b c h w -> b 1 (h w) c")  # (B, 1, h*w, c): one head
        k = rearrange(self.k(h), "b c h w -> b 1 (h w) c")
        v = rearrange(self.v(h), "b c h w -> b 1 (h w) c")
        h = F.scaled_dot_product_attention(q, k, v)
        h = rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2])  # (B, c, h, w)
        return x + self.proj_out(h)


class Middle(nn.Module):
    """Attention between two residual blocks, at the lowest resolution."""

    def __init__(self, c, groups):
        super().__init__()
        self.block_1 = ResnetBlock(c, c, groups)
        self.block_2 = ResnetBlock(c, c, groups)
        self.attn_1 = AttnBlock(c, groups)

    def forward(self, x):
        x = self.block_1(x)
        x = self.attn_1(x)
        return self.block_2(x)


class Downsample(nn.Module):
    """Halve the resolution: a strided convolution, padded at the right and bottom only."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        x = F.pad(x, (0, 1, 0, 1))  # (B, c, h+1, w+1)
        return self.conv(x)  # (B, c, h/2, w/2)


class Upsample(nn.Module):
    """Double the resolution: nearest neighbours, then a convolution."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        x = F.interpolate(x, scale_factor=2.0)  # (B, c, 2h, 2w)
        return self.conv(x)


class Level(nn.Module):
    """The residual blocks of one resolution, then the way to the next one down or up, if any."""

    def __init__(self, cin, cout, blocks, groups, down=False, up=False):
        super().__init__()
        self.block = nn.ModuleList()
        for _ in range(blocks):
            self.block.append(ResnetBlock(cin, cout, groups))
            cin = cout
        self.downsample = Downsample(cout) if down else nn.Identity()
        self.upsample = Upsample(cout) if up else nn.Identity()

    def forward(self, x):
        for block in self.block:
            x = block(x)
        return self.upsample(self.downsample(x))


# -- the autoencoder -------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Image, folded into channels -> mean and log variance of the latent, in one tensor."""

    def __init__(self, cfg):
        super().__init__()
        c = cfg.ch
        self.conv_in = nn.Conv2d(3 * cfg.patch ** 2, c, 3, padding=1)
        self.down = nn.ModuleList()
        lowest = len(cfg.ch_mult) - 1
        for i, mult in enumerate(cfg.ch_mult):
            width = cfg.ch * mult
            self.down.append(Level(c, width, cfg.num_res_blocks, cfg.groups, down=i < lowest))
            c = width
        self.mid = Middle(c, cfg.groups)
        self.norm_out = norm(c, cfg.groups)
        self.conv_out = nn.Conv2d(c, 2 * cfg.z_channels, 3, padding=1)

    def forward(self, x):
        """x [B,3*patch^2,H/patch,W/patch] -> [B,2z,H/f,W/f]."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        x = self.mid(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Latent -> image, folded into channels."""

    def __init__(self, cfg):
        super().__init__()
        widths = [cfg.ch * mult for mult in cfg.ch_mult]
        self.conv_in = nn.Conv2d(cfg.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], cfg.groups)
        self.up = nn.ModuleList()  # up.0 is the full resolution
        inputs = widths[1:] + widths[-1:]  # what the level below puts out; the lowest gets mid's
        for i, width in enumerate(widths):
            self.up.append(Level(inputs[i], width, cfg.num_res_blocks + 1, cfg.groups, up=i > 0))
        self.norm_out = norm(widths[0], cfg.groups)
        self.conv_out = nn.Conv2d(widths[0], 3 * cfg.patch ** 2, 3, padding=1)

    def forward(self, z):
        """z [B,z,H/f,W/f] -> [B,3*patch^2,H/patch,W/patch]."""
        x = self.conv_in(z)
        x = self.mid(x)
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VAE(nn.Module):
    """Images [B,3,H,W] in [-1,1] to latents [B,z,H/f,W/f], scaled to unit variance, and back."""

    def __init__(self, cfg=VAEConfig()):
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * cfg.z_channels, 2 * cfg.z_channels, 1)
        self.post_quant_conv = nn.Conv2d(cfg.z_channels, cfg.z_channels, 1)

    def moments(self, image):
        """image [B,3,H,W] in [-1,1] -> mean, logvar of the (unscaled) latent's Gaussian, each
        [B,z,H/f,W/f]."""
        x = F.pixel_unshuffle(image, self.cfg.patch)  # (B, 3*patch^2, H/patch, W/patch)
        x = self.quant_conv(self.encoder(x))  # (B, 2z, H/f, W/f)
        mean, logvar = x.chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def draw(self, mean, logvar):
        """-> scaled latent z [B,z,H/f,W/f], a draw from the Gaussian of `moments`."""
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        return z * self.cfg.scale

    def encode(self, image, sample=False):
        """image [B,3,H,W] in [-1,1] -> scaled latent z [B,z,H/f,W/f]: a draw, or the mean."""
        mean, logvar = self.moments(image)
        return self.draw(mean, logvar) if sample else mean * self.cfg.scale

    def decode(self, z):
        """Scaled latent z [B,z,h,w] -> image [B,3,h*f,w*f], about [-1,1] (not clamped)."""
        x = self.post_quant_conv(z / self.cfg.scale)
        x = self.decoder(x)  # (B, 3*patch^2, H/patch, W/patch)
        return F.pixel_shuffle(x, self.cfg.patch)

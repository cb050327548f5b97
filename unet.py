"""The latent UNet of Stable Diffusion 1.x and the adapters that bring a layout into it.

The UNet predicts the noise eps_theta(x_t, y, t) of Sec. 3.1 and stays frozen; what is trained is one of
    ControlNet   a copy of the encoder half whose outputs are added to the skips (Zhang & Agrawala 2023; ALDM's choice)
    T2IAdapter   a small pyramid whose features are added to the encoder's levels (Mou et al. 2023)
    OFT          orthogonal rotations of the attention projections (Qiu et al. 2023)
or, as the baseline FreestyleNet (Xue et al. 2023), the UNet itself under rectified cross-attention (`rectify`).
Attribute names are the checkpoints' key names (`model.diffusion_model.`, `control_model.`).
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.utils import parametrize


@dataclass(frozen=True)
class UNetConfig:
    in_channels: int             = 4
    out_channels: int            = 4
    model_channels: int          = 320
    channel_mult: tuple          = (1, 2, 4, 4)   # channels of each level, in units of model_channels
    num_res_blocks: int          = 2              # per level of the encoder; the decoder has one more
    attention_resolutions: tuple = (4, 2, 1)      # downsampling rates at which there are transformers
    num_heads: int               = 8
    context_dim: int             = 768
    groups: int                  = 32             # of the group norms


def timestep_embedding(t, dim):
    """t [B] int64 -> [B,dim] fp32: cosines, then sines, of t at geometric frequencies from 1 to 1/10000."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    args = t[:, None].float() * freqs
    return torch.cat([args.cos(), args.sin()], dim=-1)


class ResBlock(nn.Module):
    """Two convolutions around the addition of the time embedding, and a skip connection."""

    def __init__(self, cin, cout, cfg):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(cfg.groups, cin), nn.SiLU(), nn.Conv2d(cin, cout, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * cfg.model_channels, cout))
        self.out_layers = nn.Sequential(nn.GroupNorm(cfg.groups, cout), nn.SiLU(), nn.Identity(),      # (dropout)
                                        nn.Conv2d(cout, cout, 3, padding=1))
        self.skip_connection = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x, emb):
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    """Attention of the pixels x [B,n,dim] over context [B,m,context_dim]; mask [B,1,n,m], True = may attend."""

    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x, context, mask=None):
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=self.heads)
                   for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(rearrange(h, "b h n d -> b n (h d)"))


class GEGLU(nn.Module):
    def __init__(self, dim, inner):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    """Pixels attend to each other (attn1), then to the words (attn2), then each is transformed on its own (ff)."""

    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.attn1 = Attention(dim, dim, heads)
        self.attn2 = Attention(dim, context_dim, heads)
        self.ff = FeedForward(dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x, context, mask):
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer over the pixels of a feature map x [B,c,h,w]."""

    def __init__(self, channels, cfg):
        super().__init__()
        self.norm = nn.GroupNorm(cfg.groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, cfg.context_dim, cfg.num_heads)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x, context, mask=None):
        if mask is not None:    # [B,m,H,W], the words each latent pixel may attend to -> [B,1,h*w,m] at this resolution
            mask = rearrange(F.interpolate(mask.float(), size=x.shape[2:]), "b m h w -> b 1 (h w) m") > 0
        h = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        for block in self.transformer_blocks:
            h = block(h, context, mask)
        return x + self.proj_out(rearrange(h, "b (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.op = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0))


class Block(nn.Sequential):
    """A sequence that hands the time embedding to residual blocks, and the words to transformers."""

    def forward(self, x, emb, context, mask=None):
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, mask)
            else:
                x = layer(x)
        return x


def time_embed(cfg):
    d = cfg.model_channels
    return nn.Sequential(nn.Linear(d, 4 * d), nn.SiLU(), nn.Linear(4 * d, 4 * d))


def encoder_half(cfg):
    """-> input_blocks, middle_block and the channels of each input block's output: the half that a ControlNet copies."""
    c = cfg.model_channels
    blocks, channels = [Block(nn.Conv2d(cfg.in_channels, c, 3, padding=1))], [c]
    for level, mult in enumerate(cfg.channel_mult):
        for _ in range(cfg.num_res_blocks):
            layers, c = [ResBlock(c, cfg.model_channels * mult, cfg)], cfg.model_channels * mult
            if 2 ** level in cfg.attention_resolutions:
                layers.append(SpatialTransformer(c, cfg))
            blocks.append(Block(*layers))
            channels.append(c)
        if level < len(cfg.channel_mult) - 1:
            blocks.append(Block(Downsample(c)))
            channels.append(c)
    middle = Block(ResBlock(c, c, cfg), SpatialTransformer(c, cfg), ResBlock(c, c, cfg))
    return nn.ModuleList(blocks), middle, channels


class UNet(nn.Module):
    """eps_theta: the noise in x_t, given the time and the words; the layout enters as control, features or mask."""

    def __init__(self, cfg=UNetConfig()):
        super().__init__()
        self.cfg = cfg
        self.time_embed = time_embed(cfg)
        self.input_blocks, self.middle_block, skips = encoder_half(cfg)
        c, blocks = skips[-1], []
        for level, mult in reversed(list(enumerate(cfg.channel_mult))):
            for i in range(cfg.num_res_blocks + 1):
                layers = [ResBlock(c + skips.pop(), cfg.model_channels * mult, cfg)]
                c = cfg.model_channels * mult
                if 2 ** level in cfg.attention_resolutions:
                    layers.append(SpatialTransformer(c, cfg))
                if level and i == cfg.num_res_blocks:
                    layers.append(Upsample(c))
                blocks.append(Block(*layers))
        self.output_blocks = nn.ModuleList(blocks)
        self.out = nn.Sequential(nn.GroupNorm(cfg.groups, c), nn.SiLU(), nn.Conv2d(c, cfg.out_channels, 3, padding=1))

    def forward(self, x, t, context, control=None, features=None, mask=None):
        """x [B,4,h,w], t [B] int64, context [B,77,768] -> eps [B,4,h,w].

        control   ControlNet's residuals: one per input block, added to its skip, and a last one for the middle block
        features  {i: tensor added to the output of input block i} (T2I-Adapter, OFT)
        mask      [B,77,h,w] bool: the words that each pixel may attend to (FreestyleNet)

        With frozen weights only `features`, or an x that carries gradient, give the encoder half a graph: control
        enters behind it, so that its gradient comes through the decoder half alone.
        """
        h, skips, emb = self.encode(x, t, context, features, mask)
        return self.decode(h, skips, emb, context, control, mask)

    def encode(self, x, t, context, features=None, mask=None):
        """The encoder half and the middle -> h, the skips (one per input block), the time embedding."""
        emb = self.time_embed(timestep_embedding(t, self.cfg.model_channels).to(self.time_embed[0].weight.dtype))
        h, skips = x, []
        for i, block in enumerate(self.input_blocks):
            h = block(h, emb, context, mask)
            if features and i in features:
                h = h + features[i]
            skips.append(h)
        return self.middle_block(h, emb, context, mask), skips, emb

    def decode(self, h, skips, emb, context, control=None, mask=None):
        """The decoder half, in front of which control enters -> eps."""
        if control is not None:
            skips = [skip + residual for skip, residual in zip(skips, control)]
            h = h + control[-1]
        for block, skip in zip(self.output_blocks, reversed(skips)):
            h = block(torch.cat([h, skip], dim=1), emb, context, mask)
        return self.out(h)


# -- adapters ---------------------------------------------------------------------------------------------------------


def zero(module):
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


COLOR_WIDTHS = (16, 16, 32, 32, 96, 96, 256)   # the hint block of the original ControlNet, for a colour-coded layout


def hint_block(cin, widths, cout, halvings):
    """A stack of 3x3 convolutions that takes the hint to the resolution of the latents; the last one starts at zero.

    A class hint comes at twice that resolution and is halved by the third convolution; a colour hint comes at the
    image's, and every convolution that widens it halves it.
    """
    widths = [*widths, widths[-1]] if cin != 3 else list(widths)
    strided = {2} if cin != 3 else set(range(2, 2 + 2 * halvings, 2))
    layers = []
    for i, width in enumerate(widths):
        layers += [nn.Conv2d(cin, width, 3, padding=1, stride=2 if i in strided else 1), nn.SiLU()]
        cin = width
    return nn.Sequential(*layers, zero(nn.Conv2d(cin, cout, 3, padding=1)))


def apply_hint_block(block, hint, table=None):
    """hint [B,C,H,W] -> features [B,c,h,w].

    With `table` [N+1,C], the class embeddings, hint is the one-hot layout [B,N+1,H,W]: embedding the classes and the
    first convolution are both linear, so they are one convolution from N+1 channels, C/(N+1) times cheaper.
    """
    first, rest = block[0], block[1:]
    weight = first.weight if table is None else torch.einsum("ocij,nc->onij", first.weight, table.to(first.weight))
    return rest(F.conv2d(hint, weight, first.bias, first.stride, first.padding))


class ControlNet(nn.Module):
    """The encoder half once more, with the layout's features added behind its first convolution; through convolutions
    that start at zero its outputs are added to the frozen UNet's skips. ALDM's hint are class embeddings (hint_channels
    of them at 2h x 2w); with hint_channels=3 it is the original ControlNet, with a colour-coded layout at 8h x 8w."""

    def __init__(self, cfg=UNetConfig(), hint_channels=768, hint_widths=(768, 512, 256), halvings=3):
        super().__init__()
        self.cfg = cfg
        self.time_embed = time_embed(cfg)
        self.input_blocks, self.middle_block, channels = encoder_half(cfg)
        self.input_hint_block = hint_block(hint_channels, COLOR_WIDTHS if hint_channels == 3 else hint_widths,
                                           cfg.model_channels, halvings)
        self.zero_convs = nn.ModuleList(nn.Sequential(zero(nn.Conv2d(c, c, 1))) for c in channels)
        self.middle_block_out = nn.Sequential(zero(nn.Conv2d(channels[-1], channels[-1], 1)))

    def start_from(self, unet):
        """Copy the UNet's encoder half, as the field does."""
        for part in ("time_embed", "input_blocks", "middle_block"):
            getattr(self, part).load_state_dict(getattr(unet, part).state_dict())

    def residuals(self, x, t, context, hint_features):
        """As forward, from the hint's features [B,c,h,w]: these are the same at every timestep, so compute them once."""
        emb = self.time_embed(timestep_embedding(t, self.cfg.model_channels))
        h, out = x, []
        for i, (block, conv) in enumerate(zip(self.input_blocks, self.zero_convs)):
            h = block(h, emb, context)
            if i == 0:
                h = h + hint_features
            out.append(conv(h))
        return out + [self.middle_block_out(self.middle_block(h, emb, context))]

    def forward(self, x, t, context, hint):
        """x [B,4,h,w], t [B], context [B,77,768], hint [B,768,2h,2w] -> 13 residuals (input blocks 0..11, middle)."""
        return self.residuals(x, t, context, apply_hint_block(self.input_hint_block, hint))


class AdapterBlock(nn.Module):
    """A residual block of the T2I-Adapter; it starts as its skip path."""

    def __init__(self, cin, cout, down):
        super().__init__()
        self.down_opt = nn.AvgPool2d(2) if down else nn.Identity()
        self.in_conv = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        self.block1 = nn.Conv2d(cout, cout, 3, padding=1)
        self.block2 = zero(nn.Conv2d(cout, cout, 1))
        if cin != cout:
            nn.init.zeros_(self.in_conv.bias)

    def forward(self, x):
        x = self.in_conv(self.down_opt(x))
        return x + self.block2(F.relu(self.block1(x)))


class T2IAdapter(nn.Module):
    """T2I-Adapter (Mou et al. 2023), key names of its official files: a colour-coded layout, folded 8x8 into channels,
    and a pyramid of one feature map per level of the UNet's encoder. It starts at zero (conv_in and every block2)."""

    def __init__(self, cfg=UNetConfig(), factor=8):
        super().__init__()
        channels = [cfg.model_channels * m for m in cfg.channel_mult]
        self.last_of_level = [(cfg.num_res_blocks + 1) * (i + 1) - 1 for i in range(len(channels))]
        self.unshuffle = nn.PixelUnshuffle(factor)
        self.conv_in = zero(nn.Conv2d(3 * factor ** 2, channels[0], 3, padding=1))
        self.body = nn.ModuleList(AdapterBlock(channels[max(i - (j == 0), 0)], c, down=i > 0 and j == 0)
                                  for i, c in enumerate(channels) for j in range(2))

    def forward(self, hint):
        """Colour-coded layout [B,3,8h,8w] in [0,1] -> {input block: features}, for the last block of each level."""
        h, features = self.conv_in(self.unshuffle(hint)), {}
        for i, block in enumerate(self.body):
            h = block(h)
            if i % 2:
                features[self.last_of_level[i // 2]] = h
        return features


class Rotation(nn.Module):
    """weight -> weight R^T with R block-diagonal and orthogonal: R = (I + S)(I - S)^-1, S skew-symmetric (Cayley)."""

    def __init__(self, params):
        super().__init__()
        self.params = params                                # [blocks,d,d]; S is their antisymmetric part

    def matrix(self):
        """-> R's blocks [blocks,d,d], in fp32 at least."""
        p = self.params if self.params.dtype == torch.float64 else self.params.float()
        S, I = (p - p.mT) / 2, torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
        return torch.linalg.solve(I - S, I + S)             # the two factors commute

    def forward(self, weight):
        with torch.autocast(weight.device.type, enabled=False):
            R = self.matrix()
            w = rearrange(weight.to(R.dtype), "o (b i) -> b o i", b=len(R)) @ R.mT
        return rearrange(w, "b o i -> o (b i)").to(weight.dtype)


class OFT(nn.Module):
    """OFT (Qiu et al. 2023): the inputs of the UNet's attention projections are rotated, block by block, starting at the
    identity; the layout enters through a hint block, added behind the first convolution, that starts at zero."""

    def __init__(self, unet, hint_channels=768, hint_widths=(768, 512, 256), blocks=4):
        super().__init__()
        self.input_hint_block = hint_block(hint_channels, hint_widths, unet.cfg.model_channels, halvings=1)
        self.rotations = nn.ParameterDict({
            name.replace(".", "/"): nn.Parameter(torch.zeros(blocks, w.in_features // blocks, w.in_features // blocks))
            for name, w in self.projections(unet)})

    @staticmethod
    def projections(unet):
        return [(f"{name}.{proj}", getattr(attn, proj) if proj != "to_out" else attn.to_out[0])
                for name, attn in unet.named_modules() if isinstance(attn, Attention)
                for proj in ("to_q", "to_k", "to_v", "to_out")]

    def attach(self, unet):
        """From now on the UNet computes its projections from frozen weights and these rotations."""
        for name, linear in self.projections(unet):
            parametrize.register_parametrization(linear, "weight", Rotation(self.rotations[name.replace(".", "/")]))

    @staticmethod
    def merge(unet):
        """Write the rotations into the weights: sampling then costs what it cost before."""
        for _, linear in OFT.projections(unet):
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)


def rectify(label, token_class):
    """FreestyleNet's rectified cross-attention: each pixel attends only to the words that name its class.

    label [B,h,w] int64 at the latents' resolution (255 = void), token_class [B,77] int64: the class that a token
    names, or -1 -> mask [B,77,h,w] bool. The start token, which says nothing, is open to all, so that no row is empty.
    """
    mask = token_class[:, :, None, None] == label[:, None]
    mask[:, 0] = True
    return mask

"""The latent UNet of Stable Diffusion 1.x and the adapters that bring a layout into it.

The UNet predicts the noise eps_theta(x_t, y, t) of Sec. 3.1 and stays frozen. What is trained is an
adapter. Each is a class with the same three members,

    hint        what it takes in: "classes", "color" or "words" (see aldm.LayoutEncoder)
    encode      a hint -> whatever depends on the layout alone, computed once per layout
    condition   x_t, t, context and that -> keyword arguments of UNet.forward

and `on(unet, ...)`, which builds it in its initial state on a frozen UNet:

    ControlNet     a copy of the encoder half whose outputs are added to the skips, ALDM's choice
                   (Zhang & Agrawala 2023)
    T2IAdapter     a small pyramid whose features are added to the encoder (Mou et al. 2023)
    OFT            orthogonal rotations of attention and feed-forward weights (Qiu et al. 2023)
    FreestyleNet   trains the UNet itself under rectified cross-attention (Xue et al. 2023)
    PITI           encodes the layout into the text's place (Wang et al. 2022)

Attribute names are the checkpoints' key names, after `model.diffusion_model.` and `control_model.`.
In shapes: B images, c channels, h x w latent pixels, m tokens of text (77).
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
    """The defaults are Stable Diffusion 1.x."""
    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple = (1, 2, 4, 4)  # channels of each level, in units of model_channels
    num_res_blocks: int = 2  # per level of the encoder; the decoder has one more
    attention_resolutions: tuple = (4, 2, 1)  # downsampling rates at which there are transformers
    num_heads: int = 8
    context_dim: int = 768
    groups: int = 32  # of each group norm


# -- layers ----------------------------------------------------------------------------------------


class TimeEmbed(nn.Sequential):
    """t [B] int64 -> the time embedding [B,4c]: cosines and sines of t at geometric frequencies
    between 1 and 1/10000, then two linear layers."""

    def __init__(self, c):
        super().__init__(nn.Linear(c, 4 * c), nn.SiLU(), nn.Linear(4 * c, 4 * c))

    def forward(self, t):
        half = self[0].in_features // 2
        freqs = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
        args = t[:, None].float() * freqs  # (B, c/2)
        return super().forward(torch.cat([args.cos(), args.sin()], dim=-1))


class ResBlock(nn.Module):
    """Two convolutions, with the time embedding added between them, and a skip connection."""

    def __init__(self, cin, cout, cfg):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(cfg.groups, cin),
            nn.SiLU(),
            nn.Conv2d(cin, cout, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * cfg.model_channels, cout))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(cfg.groups, cout),
            nn.SiLU(),
            nn.Identity(),  # the original's dropout: keeps the numbering of the keys
            nn.Conv2d(cout, cout, 3, padding=1),
        )
        self.skip_connection = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x, emb):
        """x [B,cin,h,w], emb [B,4*model_channels] -> [B,cout,h,w]."""
        h = self.in_layers(x)  # (B, cout, h, w)
        emb = self.emb_layers(emb)  # (B, cout)
        h = h + emb[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    """Multi-head attention of the pixels over themselves or over the tokens of the text."""

    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x, context, mask=None):
        """x [B,n,dim], context [B,m,context_dim], mask [B,1,n,m] (True: may attend) -> [B,n,dim]"""
        q = rearrange(self.to_q(x), "b n (h d) -> b h n d", h=self.heads)  # (B, heads, n, d)
        k = rearrange(self.to_k(context), "b m (h d) -> b h m d", h=self.heads)  # (B, heads, m, d)
        v = rearrange(self.to_v(context), "b m (h d) -> b h m d", h=self.heads)  # (B, heads, m, d)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, n, d)
        h = rearrange(h, "b h n d -> b n (h d)")  # (B, n, dim)
        return self.to_out(h)


class GEGLU(nn.Module):
    """A linear layer, one half of whose outputs gates the other half."""

    def __init__(self, dim, inner):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)  # (B, n, inner) each
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """A gated two-layer network, applied to each pixel."""

    def __init__(self, dim):
        super().__init__()
        inner = 4 * dim
        self.net = nn.Sequential(GEGLU(dim, inner), nn.Identity(), nn.Linear(inner, dim))

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention (attn1), cross-attention to the text (attn2), and a feed-forward network."""

    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.attn1 = Attention(dim, dim, heads)
        self.attn2 = Attention(dim, context_dim, heads)
        self.ff = FeedForward(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x, context, mask):
        """x [B,n,dim] -> [B,n,dim]; attn2 takes context [B,m,context_dim] and mask [B,1,n,m]."""
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer over the pixels of a feature map."""

    def __init__(self, channels, cfg):
        super().__init__()
        self.norm = nn.GroupNorm(cfg.groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        block = TransformerBlock(channels, cfg.context_dim, cfg.num_heads)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x, context, mask=None):
        """x [B,c,h,w], mask [B,m,H,W] at the latents' resolution (see UNet) -> [B,c,h,w]."""
        height, width = x.shape[2:]
        if mask is not None:
            mask = F.interpolate(mask.float(), size=(height, width))  # (B, m, h, w), nearest
            mask = rearrange(mask, "b m h w -> b 1 (h w) m") > 0  # (B, 1, h*w, m)
        h = self.proj_in(self.norm(x))
        h = rearrange(h, "b c h w -> b (h w) c")  # (B, h*w, c)
        h = self.transformer_blocks[0](h, context, mask)  # SD 1.x has one
        h = rearrange(h, "b (h w) c -> b c h w", h=height)  # (B, c, h, w)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Halve the resolution by a strided convolution."""

    def __init__(self, c):
        super().__init__()
        self.op = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)  # (B, c, h/2, w/2)


class Upsample(nn.Module):
    """Double the resolution: nearest neighbours, then a convolution."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        x = F.interpolate(x, scale_factor=2.0)  # (B, c, 2h, 2w)
        return self.conv(x)


class Block(nn.Sequential):
    """A sequence that passes the time embedding to ResBlocks and the context to transformers."""

    def forward(self, x, emb, context, mask=None):
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, mask)
            else:
                x = layer(x)
        return x


# -- the UNet --------------------------------------------------------------------------------------


def encoder_half(cfg):
    """The half that a ControlNet copies -> input_blocks, middle_block, and the number of channels
    that each input block returns."""
    c = cfg.model_channels
    blocks = nn.ModuleList([Block(nn.Conv2d(cfg.in_channels, c, 3, padding=1))])
    channels = [c]
    lowest = len(cfg.channel_mult) - 1
    for level, mult in enumerate(cfg.channel_mult):
        width = cfg.model_channels * mult
        for _ in range(cfg.num_res_blocks):
            layers = [ResBlock(c, width, cfg)]
            c = width
            if 2 ** level in cfg.attention_resolutions:
                layers.append(SpatialTransformer(c, cfg))
            blocks.append(Block(*layers))
            channels.append(c)
        if level < lowest:
            blocks.append(Block(Downsample(c)))
            channels.append(c)
    middle = Block(ResBlock(c, c, cfg), SpatialTransformer(c, cfg), ResBlock(c, c, cfg))
    return blocks, middle, channels


class UNet(nn.Module):
    """eps_theta: predicts the noise in x_t from t and the context. The layout enters as control,
    features or mask, or within the context."""

    def __init__(self, cfg=UNetConfig()):
        super().__init__()
        self.cfg = cfg
        self.time_embed = TimeEmbed(cfg.model_channels)
        self.input_blocks, self.middle_block, skips = encoder_half(cfg)

        # The decoder, from the lowest level up: each block consumes the last unused skip.
        c = skips[-1]
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(cfg.channel_mult))):
            width = cfg.model_channels * cfg.channel_mult[level]
            for i in range(cfg.num_res_blocks + 1):
                layers = [ResBlock(c + skips.pop(), width, cfg)]
                c = width
                if 2 ** level in cfg.attention_resolutions:
                    layers.append(SpatialTransformer(c, cfg))
                if level > 0 and i == cfg.num_res_blocks:
                    layers.append(Upsample(c))
                self.output_blocks.append(Block(*layers))

        last_conv = nn.Conv2d(c, cfg.out_channels, 3, padding=1)
        self.out = nn.Sequential(nn.GroupNorm(cfg.groups, c), nn.SiLU(), last_conv)

    def forward(self, x, t, context, control=None, features=None, mask=None):
        """x [B,4,h,w], t [B] int64, context [B,77,768] -> eps [B,4,h,w].

        control   ControlNet's residuals: one per input block, added to its skip, and one more,
                  added to the output of the middle block
        features  {i: tensor added to the output of input block i} (T2I-Adapter, OFT)
        mask      [B,m,h,w] bool: the tokens that each pixel may attend to (FreestyleNet)

        With frozen weights, and an x that needs no gradient, control builds a graph through the
        decoder half alone, since it enters after the encoder half; features build it through both.
        """
        emb = self.time_embed(t)  # (B, 4c)
        h = x
        skips = []
        for i, block in enumerate(self.input_blocks):
            h = block(h, emb, context, mask)
            if features and i in features:
                h = h + features[i]
            skips.append(h)
        h = self.middle_block(h, emb, context, mask)

        if control is not None:
            skips = [skip + residual for skip, residual in zip(skips, control)]
            h = h + control[-1]
        for block, skip in zip(self.output_blocks, reversed(skips)):
            h = torch.cat([h, skip], dim=1)
            h = block(h, emb, context, mask)
        return self.out(h)


# -- adapters --------------------------------------------------------------------------------------


def zero(module):
    """Set all parameters to zero, so that a new branch starts without effect -> the module."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class HintBlock(nn.Sequential):
    """3x3 convolutions that bring a hint to the latents' resolution; the last one starts at zero.

    cin        3: a colour hint, at the image's resolution, halved `halvings` times, in the widths
               of the original ControlNet; else a class hint, at twice the latents' resolution
    widths     channels of a class hint's convolutions
    cout       channels of the result
    """
    COLOR_WIDTHS = (16, 16, 32, 32, 96, 96, 256)

    def __init__(self, cin, widths, cout, halvings=1):
        if cin == 3:
            widths = self.COLOR_WIDTHS
        else:
            widths = [*widths, widths[-1]]
            halvings = 1
        layers = []
        for i, width in enumerate(widths):
            stride = 2 if i in range(2, 2 + 2 * halvings, 2) else 1  # the third, fifth, ...
            layers.append(nn.Conv2d(cin, width, 3, stride, padding=1))
            layers.append(nn.SiLU())
            cin = width
        layers.append(zero(nn.Conv2d(cin, cout, 3, padding=1)))
        super().__init__(*layers)

    def forward(self, hint, table=None):
        """hint [B,C,H,W] -> features [B,cout,h,w].

        With `table` [N+1,C], the class embeddings, hint is the one-hot layout [B,N+1,H,W]. Looking
        embeddings up and the first convolution are both linear: together they are one convolution
        from N+1 channels, C/(N+1) times cheaper.
        """
        first, *rest = self
        weight = first.weight  # (O, C, 3, 3)
        if table is not None:
            weight = torch.einsum("ocij,nc->onij", weight, table.to(weight))  # (O, N+1, 3, 3)
        h = F.conv2d(hint, weight, first.bias, first.stride, first.padding)
        for layer in rest:
            h = layer(h)
        return h


class ControlNet(nn.Module):
    """A second encoder half, with the layout's features added after its first convolution.

    Its outputs are added to the frozen UNet's skips through convolutions that start at zero. ALDM's
    hint is a map of class embeddings (hint_channels numbers per cell, at 2h x 2w); hint_channels=3
    is the original ControlNet's, a colour-coded layout at 8h x 8w.
    """

    def __init__(self, cfg=UNetConfig(), hint_channels=768, hint_widths=(768, 512, 256),
                 halvings=3):
        super().__init__()
        self.time_embed = TimeEmbed(cfg.model_channels)
        self.input_blocks, self.middle_block, channels = encoder_half(cfg)
        self.input_hint_block = HintBlock(hint_channels, hint_widths, cfg.model_channels, halvings)
        self.zero_convs = nn.ModuleList()
        for c in channels:
            self.zero_convs.append(nn.Sequential(zero(nn.Conv2d(c, c, 1))))
        c = channels[-1]
        self.middle_block_out = nn.Sequential(zero(nn.Conv2d(c, c, 1)))

    @classmethod
    def on(cls, unet, hint_channels, hint_widths, factor):
        """A ControlNet that starts as a copy of the UNet's encoder half."""
        adapter = cls(unet.cfg, hint_channels, hint_widths, halvings=int(math.log2(factor)))
        for part in "time_embed", "input_blocks", "middle_block":
            getattr(adapter, part).load_state_dict(getattr(unet, part).state_dict())
        return adapter

    def encode(self, hint, table=None):
        """A hint (see HintBlock) -> its features [B,c,h,w], the same at every timestep."""
        return self.input_hint_block(hint, table)

    def condition(self, x_t, t, context, features):
        return {"context": context, "control": self.residuals(x_t, t, context, features)}

    def residuals(self, x_t, t, context, features):
        """x_t [B,4,h,w], t [B], context [B,77,768], features [B,c,h,w] -> what is added to the
        UNet: 13 tensors, for input blocks 0..11 and the middle block."""
        emb = self.time_embed(t)  # (B, 4c)
        h = x_t
        out = []
        for i, block in enumerate(self.input_blocks):
            h = block(h, emb, context)
            if i == 0:
                h = h + features
            out.append(self.zero_convs[i](h))
        h = self.middle_block(h, emb, context)
        out.append(self.middle_block_out(h))
        return out

    def forward(self, x_t, t, context, hint):
        """As `residuals`, from the hint itself: [B,768,2h,2w], or [B,3,8h,8w]."""
        return self.residuals(x_t, t, context, self.encode(hint))


class AdapterBlock(nn.Module):
    """A residual block of the T2I-Adapter; block2 starts at zero."""

    def __init__(self, cin, cout, down):
        super().__init__()
        self.down_opt = nn.AvgPool2d(2) if down else nn.Identity()
        self.in_conv = nn.Identity()
        if cin != cout:
            self.in_conv = nn.Conv2d(cin, cout, 1)
            nn.init.zeros_(self.in_conv.bias)
        self.block1 = nn.Conv2d(cout, cout, 3, padding=1)
        self.block2 = zero(nn.Conv2d(cout, cout, 1))

    def forward(self, x):
        x = self.in_conv(self.down_opt(x))  # (B, cout, h, w), or h/2, w/2
        h = F.relu(self.block1(x))
        return x + self.block2(h)


class T2IAdapter(nn.Module):
    """A pyramid of feature maps, one per level of the UNet's encoder, from a colour-coded layout
    whose squares of factor x factor pixels are folded into channels. It starts at zero (conv_in and
    every block2). Key names are those of the official files."""
    hint = "color"

    def __init__(self, cfg=UNetConfig(), factor=8):
        super().__init__()
        self.unshuffle = nn.PixelUnshuffle(factor)
        c = cfg.model_channels * cfg.channel_mult[0]
        self.conv_in = zero(nn.Conv2d(3 * factor ** 2, c, 3, padding=1))

        # Two blocks per level. Their output is added after the level's last ResBlock: the UNet's
        # input blocks are a convolution, then each level's ResBlocks and its Downsample.
        self.body = nn.ModuleList()
        self.last_of_level = []
        for level, mult in enumerate(cfg.channel_mult):
            width = cfg.model_channels * mult
            self.body.append(AdapterBlock(c, width, down=level > 0))
            self.body.append(AdapterBlock(width, width, down=False))
            self.last_of_level.append((cfg.num_res_blocks + 1) * (level + 1) - 1)
            c = width

    @classmethod
    def on(cls, unet, hint_channels, hint_widths, factor):
        return cls(unet.cfg, factor)

    def encode(self, hint):
        """Colour-coded layout [B,3,8h,8w] in [0,1] -> {index of an input block: its features}."""
        h = self.unshuffle(hint)  # (B, 3*8*8, h, w)
        h = self.conv_in(h)  # (B, c, h, w)
        features = {}
        for level, last in enumerate(self.last_of_level):
            h = self.body[2 * level](h)
            h = self.body[2 * level + 1](h)
            features[last] = h
        return features

    def condition(self, x_t, t, context, features):
        return {"context": context, "features": features}


class Rotation(nn.Module):
    """weight -> weight R^T, with R block-diagonal and orthogonal.

    Cayley: R = (I + S)(I - S)^-1 is orthogonal for every skew-symmetric S.
    """

    def __init__(self, params):
        super().__init__()
        self.params = params  # (blocks, d, d); S is their antisymmetric part

    def matrix(self):
        """-> the blocks of R [blocks,d,d]."""
        S = (self.params - self.params.mT) / 2
        I = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
        # The two factors commute. solve_ex skips a check for which the CPU would wait for the GPU.
        return torch.linalg.solve_ex(I - S, I + S)[0]

    def forward(self, weight):
        """weight [o,blocks*d] -> the same shape and dtype, computed in the parameters' fp32."""
        with torch.autocast(weight.device.type, enabled=False):
            R = self.matrix()
            w = rearrange(weight.to(R.dtype), "o (b i) -> b o i", b=len(R))  # (blocks, o, d)
            w = w @ R.mT
        w = rearrange(w, "b o i -> o (b i)")  # (o, blocks*d)
        return w.to(weight.dtype)


class OFT(nn.Module):
    """Rotates, block by block, the inputs of the UNet's attention projections and gated
    feed-forward layers, starting at the identity. The layout enters through a hint block that
    starts at zero and is added after the first convolution."""
    hint = "classes"

    def __init__(self, unet, hint_channels=768, hint_widths=(768, 512, 256), blocks=4):
        super().__init__()
        self.input_hint_block = HintBlock(hint_channels, hint_widths, unet.cfg.model_channels)
        self.rotations = nn.ParameterDict()
        for name, linear in self.projections(unet):
            d = linear.in_features // blocks
            zeros = torch.zeros(blocks, d, d, device=linear.weight.device)
            self.rotations[name] = nn.Parameter(zeros)

    @classmethod
    def on(cls, unet, hint_channels, hint_widths, factor):
        """From now on the UNet computes its rotated weights from the frozen ones."""
        adapter = cls(unet, hint_channels, hint_widths)
        for name, linear in cls.projections(unet):
            rotation = Rotation(adapter.rotations[name])
            parametrize.register_parametrization(linear, "weight", rotation)
        return adapter

    @staticmethod
    def projections(unet):
        """-> [(name, linear layer)] of all rotated layers; parameter names cannot contain dots."""
        found = []
        for name, module in unet.named_modules():
            if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0", ".proj")):
                found.append((name.removesuffix(".0").replace(".", "/"), module))
        return found

    @staticmethod
    def merge(unet):
        """Write the rotations into the weights, so that sampling costs no more than without."""
        for _, linear in OFT.projections(unet):
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)

    def encode(self, hint, table=None):
        """A class hint (see HintBlock) -> its features [B,c,h,w]."""
        return self.input_hint_block(hint, table)

    def condition(self, x_t, t, context, features):
        return {"context": context, "features": {0: features}}


class FreestyleNet(nn.Module):
    """Trains the UNet itself. Its text is the list of the layout's classes and the prompt: each
    pixel attends to the words of its own class (`rectify`) and to the whole prompt."""
    hint = "words"

    def __init__(self, unet):
        super().__init__()
        self.unet = unet.requires_grad_(True)

    @classmethod
    def on(cls, unet, hint_channels, hint_widths, factor):
        return cls(unet)

    def encode(self, words, mask):
        """words [B,77,C], the encoded list of classes, and mask [B,77,h,w] from `rectify`."""
        return words, mask

    def condition(self, x_t, t, context, encoded):
        words, mask = encoded
        to_all = torch.ones_like(mask[:, :1]).expand(-1, context.shape[1], -1, -1)
        return {"context": torch.cat([words, context], dim=1),  # (B, 77 + 77, C)
                "mask": torch.cat([mask, to_all], dim=1)}  # (B, 77 + 77, h, w)


def rectify(label, token_class):
    """FreestyleNet's rectified cross-attention: of the tokens that name a class, a pixel attends
    only to those of its own; tokens that name none (start, end, padding) are open to all pixels.

    label [B,h,w] int64 at the latents' resolution (255 = void), token_class [B,77] int64: the class
    that a token names, or -1 -> mask [B,77,h,w] bool
    """
    label = label[:, None]  # (B, 1, h, w)
    token_class = token_class[:, :, None, None]  # (B, 77, 1, 1)
    names_none = token_class < 0
    return (token_class == label) | names_none


class PITI(nn.Module):
    """Encodes the layout into the space of the text, whose place it takes. So the prompt is
    ignored, and guidance has no effect.

    As in PITI's paper, training has two stages: first the encoder alone, then encoder and UNet
    together (`train.py --finetune`, started with --init from the first).
    """
    hint = "classes"
    GRID = 7, 11  # 77 tokens, as many as a text has

    def __init__(self, unet, hint_channels=768, hint_widths=(768, 512, 256)):
        super().__init__()
        c = unet.cfg.context_dim
        self.unet = unet
        self.input_hint_block = HintBlock(hint_channels, hint_widths, c)
        self.position = nn.Parameter(0.02 * torch.randn(77, c))  # tells the tokens apart
        self.norm = nn.LayerNorm(c)  # as the text encoder's last layer

    @classmethod
    def on(cls, unet, hint_channels, hint_widths, factor):
        return cls(unet, hint_channels, hint_widths)

    def encode(self, hint, table=None):
        """A class hint (see HintBlock) -> context [B,77,C]: a grid of 7 x 11 tokens."""
        h = self.input_hint_block(hint, table)  # (B, C, h, w)
        h = F.adaptive_avg_pool2d(h, self.GRID)  # (B, C, 7, 11)
        tokens = rearrange(h, "b c i j -> b (i j) c")  # (B, 77, C)
        return self.norm(tokens + self.position)

    def condition(self, x_t, t, context, tokens):
        return {"context": tokens}

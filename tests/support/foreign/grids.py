"""Models whose tokens are images: VOLO's outlook attention, PTNet's U-shape of T2T steps."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from t2t_fast import reference
from t2t_fast.reference.blocks import Attention, Mlp


class OutlookAttention(nn.Module):
    """VOLO's: each token gives the weights of its whole window; the weighted windows are added up."""

    def __init__(self, dim, heads, kernel=3, padding=1, stride=1):
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.kernel_size, self.padding, self.stride = kernel, padding, stride
        self.v, self.attn, self.proj = nn.Linear(dim, dim), nn.Linear(dim, kernel**4 * heads), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.unfold = nn.Unfold(kernel, padding=padding, stride=stride)
        self.pool = nn.AvgPool2d(stride, stride, ceil_mode=True)

    def forward(self, x):
        batch, height, width, dim = x.shape
        count, taps = math.ceil(height / self.stride) * math.ceil(width / self.stride), self.kernel_size**2
        v = self.unfold(self.v(x).permute(0, 3, 1, 2))
        v = v.reshape(batch, self.num_heads, -1, taps, count).permute(0, 1, 4, 3, 2)
        weights = self.attn(self.pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        weights = weights.reshape(batch, count, self.num_heads, taps, taps).permute(0, 2, 1, 3, 4)
        weights = self.attn_drop((weights * self.scale).softmax(-1))
        y = (weights @ v).permute(0, 1, 4, 3, 2).reshape(batch, dim * taps, count)
        y = F.fold(y, (height, width), self.kernel_size, 1, self.padding, self.stride)
        return self.proj_drop(self.proj(y.permute(0, 2, 3, 1)))


class GridAttention(Attention):
    """Self-attention of tokens (B, H, W, dim)."""

    def forward(self, x):
        batch, height, width, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, height * width, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = self.attn_drop((q @ k.mT * self.scale).softmax(-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).reshape(batch, height, width, dim)))


class GridBlock(nn.Module):
    """VOLO's ``Outlooker`` and ``Transformer``."""

    def __init__(self, dim, attention):
        super().__init__()
        self.norm1, self.attn, self.drop_path = nn.LayerNorm(dim), attention, nn.Identity()
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim, 3 * dim, dim)

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Volo(nn.Module):
    def __init__(self, dim=24, heads=3, depth=2, patch=8):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, patch, patch)
        self.outlookers = nn.Sequential(*(GridBlock(dim, OutlookAttention(dim, heads, stride=2)) for _ in range(depth)))
        self.down = nn.Conv2d(dim, 2 * dim, 2, 2)
        self.transformers = nn.Sequential(
            *(GridBlock(2 * dim, GridAttention(2 * dim, 2 * heads)) for _ in range(depth))
        )

    def forward(self, x):
        x = self.outlookers(self.patch_embed(x).permute(0, 2, 3, 1))
        return self.transformers(self.down(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Down(nn.Module):
    """PTNet's ``SWT4``: soft split and Performer layer; the innermost step only splits."""

    def __init__(self, channels, out, window):
        super().__init__()
        kernel, stride, padding = window
        self.sw = nn.Unfold(kernel, stride=stride, padding=padding)
        self.transformer = reference.Token_performer(channels * kernel**2, out, dp1=0.0, dp2=0.0)

    def forward(self, x, attention=True):
        x = self.sw(x).transpose(1, 2)
        return self.transformer(x) if attention else x


class Up(nn.Module):
    """PTNet's ``SWT_up4``: bilinear upsampling and a Performer layer on single pixels. Its ``sw`` is never called."""

    def __init__(self, channels, out, factor):
        super().__init__()
        self.sw = nn.Unfold(3, padding=1)
        self.up_sample, self.factor = nn.UpsamplingBilinear2d(scale_factor=factor), factor
        self.transformer = reference.Token_performer(channels, out, dp1=0.0, dp2=0.0)

    def forward(self, x, skip=None, size=None):
        x = self.up_sample(x)
        x = x if skip is None else torch.cat([x, skip], 1)
        grid = x.shape[2:]
        return self.transformer(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, grid)


class PTNet(nn.Module):
    """A U-shape for images that need not be square: two steps down, blocks, two steps up."""

    def __init__(self, width=8, dim=48, heads=3, depth=2):
        super().__init__()
        self.down_blocks = nn.ModuleList(
            [Down(1, width, (7, 1, 3)), Down(width, 2 * width, (3, 2, 1)), Down(2 * width, 4 * width, (3, 2, 1))]
        )
        self.bot_proj, self.bot_proj2 = nn.Linear(18 * width, dim), nn.Linear(dim, 2 * width)
        self.bottleneck = nn.ModuleList(reference.Block(dim, heads, mlp_ratio=2.0) for _ in range(depth))
        self.up_blocks = nn.ModuleList([Up(4 * width, width, 2), Up(2 * width, width, 2)])
        self.final_proj = nn.Conv2d(width, 1, 1)

    def forward(self, x):
        height, width = x.shape[2:]
        full = self.down_blocks[0](x).transpose(1, 2).unflatten(2, (height, width))
        half = self.down_blocks[1](full).transpose(1, 2).unflatten(2, (height // 2, width // 2))
        x = self.bot_proj(self.down_blocks[2](half, attention=False))
        for block in self.bottleneck:
            x = block(x)
        x = self.bot_proj2(x).transpose(1, 2).unflatten(2, (height // 4, width // 4))
        x = self.up_blocks[1](self.up_blocks[0](x, half), full)
        return self.final_proj(x).tanh()

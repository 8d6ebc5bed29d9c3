"""Video inpainting: transformers on the tokens of several frames, whose feed-forward folds and unfolds them.

FuseFormer has ``nn.Fold`` and ``nn.Unfold`` and one image size; E2FGVI's tokens are on a grid; E2FGVI-HQ and
ProPainter call functions with the image size of each call.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

WINDOW = {"kernel_size": (7, 7), "stride": (3, 3), "padding": (3, 3)}


def grid_of(size):
    numbers = zip(size, *WINDOW.values(), strict=True)
    return [(n + 2 * padding - kernel) // stride + 1 for n, kernel, stride, padding in numbers]


class FixedFeedForward(nn.Module):
    """FuseFormer's and E2FGVI's."""

    def __init__(self, dim, hidden, size, act=nn.ReLU):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Linear(dim, hidden))
        self.conv2 = nn.Sequential(act(), nn.Dropout(0.1), nn.Linear(hidden, dim), nn.Dropout(0.1))
        self.fold, self.unfold = nn.Fold(size, **WINDOW), nn.Unfold(**WINDOW)
        self.n_vecs = math.prod(grid_of(size))

    def forward(self, x):
        x = self.conv1(x)
        shape = x.shape
        x = x.view(-1, self.n_vecs, shape[2]).transpose(1, 2)
        count = self.fold(x.new_ones(len(x), 49, self.n_vecs))
        return self.conv2(self.unfold(self.fold(x) / count).transpose(1, 2).reshape(shape))


class SizedFeedForward(nn.Module):
    """E2FGVI-HQ's, and ProPainter's with the names fc1 and fc2."""

    def __init__(self, dim, hidden, names=("fc1", "fc2")):
        super().__init__()
        self.names = names
        self.add_module(names[0], nn.Sequential(nn.Linear(dim, hidden)))
        self.add_module(names[1], nn.Sequential(nn.GELU(), nn.Linear(hidden, dim)))
        self.t2t_params = WINDOW

    def _between(self, x, output_size):
        shape, count = x.shape, math.prod(grid_of(output_size))
        x = x.view(-1, count, shape[2]).transpose(1, 2)
        ones = F.fold(x.new_ones(len(x), 49, count), output_size, **self.t2t_params)
        x = F.fold(x, output_size, **self.t2t_params) / ones
        return F.unfold(x, **self.t2t_params).transpose(1, 2).reshape(shape)


class ProPainterFeedForward(SizedFeedForward):
    def forward(self, x, output_size):
        return self.fc2(self._between(self.fc1(x), output_size))


class HighQualityFeedForward(SizedFeedForward):
    def __init__(self, dim, hidden):
        super().__init__(dim, hidden, ("conv1", "conv2"))

    def forward(self, x, output_size):
        return self.conv2(self._between(self.conv1(x), output_size))


class SoftSplit(nn.Module):
    """FuseFormer's: tokens of all frames in one axis."""

    def __init__(self, channels, dim):
        super().__init__()
        self.t2t, self.embedding = nn.Unfold(**WINDOW), nn.Linear(49 * channels, dim)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x, b):
        x = self.embedding(self.t2t(x).transpose(1, 2))
        return self.dropout(x.view(b, -1, x.shape[2]))


class GridSoftSplit(nn.Module):
    """E2FGVI's: tokens on the grid of one image size."""

    def __init__(self, channels, dim, size):
        super().__init__()
        self.t2t, self.embedding = nn.Unfold(**WINDOW), nn.Linear(49 * channels, dim)
        self.f_h, self.f_w = grid_of(size)

    def forward(self, x, b):
        x = self.embedding(self.t2t(x).transpose(1, 2))
        return x.view(b, -1, self.f_h, self.f_w, x.shape[2])


class SizedSoftSplit(nn.Module):
    """That of E2FGVI-HQ and ProPainter."""

    def __init__(self, channels, dim):
        super().__init__()
        self.t2t, self.embedding = nn.Unfold(**WINDOW), nn.Linear(49 * channels, dim)

    def forward(self, x, b, output_size):
        x = self.embedding(self.t2t(x).transpose(1, 2))
        return x.view(b, -1, *grid_of(output_size), x.shape[2])


class SoftComp(nn.Module):
    """That of FuseFormer and E2FGVI, with a bias for each pixel."""

    def __init__(self, channels, dim, size):
        super().__init__()
        self.embedding, self.t2t = nn.Linear(dim, 49 * channels), nn.Fold(size, **WINDOW)
        self.bias = nn.Parameter(torch.zeros(channels, *size))

    def forward(self, x, t):
        x = self.embedding(x)
        return self.t2t(x.view(len(x) * t, -1, x.shape[-1]).transpose(1, 2)) + self.bias


class SizedSoftComp(nn.Module):
    """That of E2FGVI-HQ and ProPainter."""

    def __init__(self, channels, dim):
        super().__init__()
        self.relu, self.embedding = nn.LeakyReLU(0.2), nn.Linear(dim, 49 * channels)
        self.kernel_size, self.stride, self.padding = WINDOW.values()
        self.bias_conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, t, output_size):
        x = self.embedding(x.flatten(1, -2))
        x = x.view(len(x) * t, -1, x.shape[2]).transpose(1, 2)
        return self.bias_conv(F.fold(x, output_size, self.kernel_size, 1, self.padding, self.stride))


class Block(nn.Module):
    """Attention over the tokens of all frames, then the feed-forward."""

    def __init__(self, dim, heads, ffn):
        super().__init__()
        self.norm1, self.norm2, self.ffn = nn.LayerNorm(dim), nn.LayerNorm(dim), ffn
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, x, *size):
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.ffn(self.norm2(x), *size)


class FuseFormer(nn.Module):
    """Features (B*t, C, H, W) of t frames -> the same shape."""

    def __init__(self, channels=4, dim=48, hidden=98, heads=3, depth=2, size=(20, 32), batch=1):
        super().__init__()
        self.batch = batch
        self.ss, self.sc = SoftSplit(channels, dim), SoftComp(channels, dim, size)
        self.transformer = nn.Sequential(
            *(Block(dim, heads, FixedFeedForward(dim, hidden, size)) for _ in range(depth))
        )

    def forward(self, x):
        return x + self.sc(self.transformer(self.ss(x, self.batch)), len(x) // self.batch)


class E2FGVI(nn.Module):
    """The same with tokens (B, t, h, w, dim)."""

    def __init__(self, channels=4, dim=48, hidden=98, heads=3, depth=2, size=(20, 32), batch=1):
        super().__init__()
        self.batch = batch
        self.ss, self.sc = GridSoftSplit(channels, dim, size), SoftComp(channels, dim, size)
        ffn = (FixedFeedForward(dim, hidden, size, nn.GELU) for _ in range(depth))
        self.transformer = nn.Sequential(*(Block(dim, heads, each) for each in ffn))

    def forward(self, x):
        tokens = self.ss(x, self.batch)
        tokens = self.transformer(tokens.flatten(1, 3)).view(tokens.shape)
        return x + self.sc(tokens.flatten(1, 3), len(x) // self.batch)


class ProPainter(nn.Module):
    """The same for any image size; ``ffn`` also makes E2FGVI-HQ of it."""

    def __init__(self, channels=4, dim=48, hidden=98, heads=3, depth=2, batch=1, ffn=ProPainterFeedForward):
        super().__init__()
        self.batch = batch
        self.ss, self.sc = SizedSoftSplit(channels, dim), SizedSoftComp(channels, dim)
        self.transformers = nn.ModuleList(Block(dim, heads, ffn(dim, hidden)) for _ in range(depth))

    def forward(self, x):
        size = tuple(x.shape[2:])
        tokens = self.ss(x, self.batch, size)
        y = tokens.flatten(1, 3)
        for block in self.transformers:
            y = block(y, size)
        return x + self.sc(y.view(tokens.shape), len(x) // self.batch, size)

"""The tokens-to-token module, with upstream's parameter names, for any image size."""

from collections.abc import Sequence

import torch
from torch import nn

from ..errors import check_pair
from ..functional import image_values, soft_split_linear
from ..functional import window as make_window
from ..functional.arguments import check_pixel_norm
from ..functional.layers import check_memory
from ..ops.spec import T2T_WINDOWS
from .fusion import is_plain, is_watched
from .options import check_choice, check_options
from .soft_split import SoftSplit
from .token_performer import TokenPerformer
from .token_transformer import TokenTransformer

TOKENS_TYPES = ("performer", "transformer", "convolution")


def _values(x, pixel_norm, module):
    """An image of bytes as values, in the dtype of the module that takes them next."""
    return image_values(x, pixel_norm, next(module.parameters()).dtype) if x.dtype == torch.uint8 else x


def walk(x, splits, layers, project, pixel_norm=None):
    """Soft split and layer, again and again, then soft split and projection, each pair fused where nothing forbids it.

    Args:
        x: image (B, C, H, W).
        splits: :class:`SoftSplit` modules; layers: one for each but the last; project: the last one's ``nn.Linear``.
        pixel_norm: (mean, std) for an image of uint8.

    Returns:
        a list of (tokens, grid), one a stage.
    """
    grid, stages = None, []
    for split, layer in zip(splits, layers, strict=False):
        size = x.shape[2:] if grid is None else grid
        if is_plain(split, SoftSplit) and hasattr(layer, "forward_window") and not is_watched(layer):
            x = layer.forward_window(x, split.window, grid, pixel_norm if x.dtype == torch.uint8 else None)
        else:
            x = layer(split(_values(x, pixel_norm, layer), grid))
        grid = split.window.grid(*size)
        stages.append((x, grid))
    split = splits[-1]
    size = x.shape[2:] if grid is None else grid
    if is_plain(split, SoftSplit) and is_plain(project, nn.Linear):
        x = soft_split_linear(x, project.weight, project.bias, *split.window, grid=grid)
    else:
        x = project(split(x, grid))
    stages.append((x, split.window.grid(*size)))
    return stages


class T2TModule(nn.Module):
    """Three soft splits with two attention layers between them: image (B, in_chans, H, W) -> tokens (B, L, embed_dim).

    Upstream: ``T2T_module`` of ``models/t2t_vit.py`` (T2T-ViT paper, figure 3); parameters have its names and shapes.
    Any H and W at call time: the grid follows from the window formula, never from the square root of a token count.

    Args:
        img_size: int or (H, W); only sets :attr:`grid_size` and :attr:`num_patches`.
        tokens_type: "performer", "transformer" or "convolution" (the paper's comparison: three convolutions).
        in_chans, embed_dim, token_dim: channels of the image, width of the outgoing and of the inner tokens.
        windows: three (kernel, stride, padding); the paper's by default.
        memory: see :attr:`memory`; pixel_norm: see :attr:`pixel_norm`.
    """

    pixel_norm = None
    """(mean, std) of the channels, for images of uint8: they are read as they are and normalised on the way.

    As torchvision's ``Normalize`` takes them, of pixels from 0 to 1. May be set at any time, also on a swapped model;
    images of floating dtype are taken for normalised.
    """

    def __init__(
        self,
        img_size=224,
        tokens_type="performer",
        in_chans=3,
        embed_dim=768,
        token_dim=64,
        windows=T2T_WINDOWS,
        memory="fast",
        pixel_norm=None,
    ):
        super().__init__()
        check_options("T2TModule", locals())
        check_choice("T2TModule", "tokens_type", tokens_type, TOKENS_TYPES)
        if pixel_norm is not None:
            check_pixel_norm("T2TModule", pixel_norm, in_chans)
        check_memory("T2TModule", memory)
        if (
            not isinstance(windows, Sequence)
            or [isinstance(each, Sequence) and len(each) for each in windows] != [3] * 3
        ):
            raise ValueError(f"T2TModule: windows must be three (kernel, stride, padding), got {windows!r}")
        self.tokens_type = tokens_type
        self.windows = tuple(make_window(*each, function="T2TModule") for each in windows)
        self.img_size = check_pair("T2TModule", "img_size", img_size, minimum=1)
        first, second, third = self.windows
        if tokens_type == "convolution":
            self.soft_split0 = nn.Conv2d(in_chans, token_dim, *first)
            self.soft_split1 = nn.Conv2d(token_dim, token_dim, *second)
            self.project = nn.Conv2d(token_dim, embed_dim, *third)
        else:
            layer = TokenPerformer if tokens_type == "performer" else TokenTransformer
            self.soft_split0 = SoftSplit(*first)
            self.soft_split1 = SoftSplit(*second)
            self.soft_split2 = SoftSplit(*third)
            self.attention1 = layer(dim=in_chans * first.taps, in_dim=token_dim)
            self.attention2 = layer(dim=token_dim * second.taps, in_dim=token_dim)
            self.project = nn.Linear(token_dim * third.taps, embed_dim)
        self.memory = memory
        self.pixel_norm = pixel_norm

    @property
    def memory(self):
        """What the two Performer layers keep for backward: "fast", or "low" for less memory and more time.

        May be set at any time, also on a swapped model; see :func:`t2t_fast.functional.performer_layer`. Only "fast"
        for the other token types, whose attention is PyTorch's.
        """
        layers = self._performers()
        return layers[0].memory if layers else "fast"

    @memory.setter
    def memory(self, memory):
        check_memory("T2TModule", memory)
        layers = self._performers()
        if memory != "fast" and not layers:
            raise ValueError(f"T2TModule: memory must be 'fast' without a Performer layer of t2t_fast, got {memory!r}")
        for layer in layers:
            layer.memory = memory

    def _performers(self):
        layers = (getattr(self, name, None) for name in ("attention1", "attention2"))
        return [layer for layer in layers if isinstance(layer, TokenPerformer)]

    @property
    def grid_size(self):
        """Token grid (h, w) of an image of ``img_size``."""
        return self.grid(*self.img_size)

    @property
    def num_patches(self):
        """Tokens of an image of ``img_size``. (Upstream's floors where its splits round up; this counts.)"""
        h, w = self.grid_size
        return h * w

    def grid(self, height, width):
        """Token grid (h, w) of an image of ``height`` x ``width``."""
        for window in self.windows:
            height, width = window.grid(height, width)
        return height, width

    def forward(self, x):
        """(B, in_chans, H, W) -> (B, h*w, embed_dim)."""
        return self.forward_with_grid(x)[0]

    def forward_with_grid(self, x):
        """As :meth:`forward`, and the grid (h, w) of the tokens."""
        return self.forward_stages(x)[-1]

    def forward_stages(self, x):
        """Tokens and grid after each of the three stages: a list of three ((B, L, C), (h, w))."""
        if self.tokens_type == "convolution":
            stages, x = [], _values(x, self.pixel_norm, self)
            for convolution in (self.soft_split0, self.soft_split1, self.project):
                x = convolution(x)
                stages.append((x.flatten(2).transpose(1, 2), tuple(x.shape[2:])))
            return stages
        splits = (self.soft_split0, self.soft_split1, self.soft_split2)
        return walk(x, splits, (self.attention1, self.attention2), self.project, self.pixel_norm)

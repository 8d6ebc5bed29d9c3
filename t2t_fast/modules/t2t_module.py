"""The tokens-to-token module, with upstream's parameter names, for any image size."""

from collections.abc import Sequence
from functools import partial
from math import isqrt, prod
from typing import Any, TypeAlias

import torch
from torch import nn

from .._deprecated import renamed_arguments
from ..errors import check_bool, check_pair, check_tensor
from ..functional import image_values, soft_split_linear
from ..functional import window as make_window
from ..functional.arguments import IMAGES, check_pixel_norm
from ..functional.performer_layer import recompute_of
from ..ops._common.pixels import PixelNorm
from ..ops._common.spec import T2T_WINDOWS, Pair, Window, grid_after
from ..ops._common.windows import as_image
from . import fusion, remembered
from .options import check_choice, check_options, deprecated_memory
from .soft_split import Unfold
from .token_layer import TokenLayer
from .token_performer import TokenPerformer
from .token_transformer import TokenTransformer

Stage: TypeAlias = tuple[torch.Tensor, tuple[int, int]]
"""Tokens (B, L, C) and their grid (h, w)."""

TOKENS_TYPES = ("performer", "transformer", "convolution")


def window_of(split: nn.Module) -> Window | None:
    """The :class:`Window` that the attributes of an ``nn.Unfold`` or a convolution describe; ``None`` if dilated."""
    numbers: list[Any] = [getattr(split, name, None) for name in ("kernel_size", "stride", "padding")]
    if None in numbers or getattr(split, "dilation", 1) not in (1, (1, 1)):
        return None
    return Window(*[(n, n) if isinstance(n, int) else tuple(n) for n in numbers])


def windows_of(splits: Sequence[nn.Module]) -> list[Window]:
    """The windows of soft splits, each of which must have window attributes."""
    windows: list[Any] = [window_of(split) for split in splits]
    if None in windows:
        name = type(splits[windows.index(None)]).__name__
        raise ValueError(f"T2TModule: the token grid is unknown, since a soft split is {name}, which has no window")
    return windows


def stage_obstacle(
    split: nn.Module,
    layer: nn.Module,
    window: Window | None,
    names: tuple[str, str] = ("the soft split", "the layer behind it"),
) -> str | None:
    """Why a soft split with a window cannot be fused with the layer behind it, for a message, or ``None``."""
    if fusion.watched():
        return "a hook is registered for all modules"
    why = fusion.difference(split, Unfold if isinstance(split, Unfold) else nn.Unfold)
    if why is None and window is None:
        why = "is dilated"
    if why is not None:
        return f"{names[0]} {why}"
    kinds = [kind for kind in (TokenPerformer, TokenTransformer) if isinstance(layer, kind)]
    why = fusion.difference(layer, kinds[0]) if kinds else fusion.linear(layer) or fusion.unreadable(layer)
    return None if why is None else f"{names[1]} {why}"


def stages_obstacle(module: nn.Module, *layers: str) -> str | None:
    """The first :func:`stage_obstacle` of ``soft_split0``, ``soft_split1``, ... and the named layers behind them."""
    for index, layer in enumerate(layers):
        names = f"soft_split{index}", layer
        split, behind = (getattr(module, name) for name in names)
        why = stage_obstacle(split, behind, window_of(split), names)
        if why is not None:
            return why
    return None


def _grid_of(split: nn.Module, window: Window | None, tokens: torch.Tensor, height: int, width: int) -> tuple[int, int]:
    """The grid of a soft split's tokens (B, L, C): from its window; without one, a square grid as upstream."""
    if window is not None:
        return window.grid(height, width)
    side = isqrt(tokens.shape[1])
    if side * side != tokens.shape[1]:
        raise ValueError(
            f"T2TModule: a soft split that is {type(split).__name__}, without kernel_size, stride and padding, must "
            f"give a square number of tokens, got {tokens.shape[1]}"
        )
    return side, side


def _projected(x: torch.Tensor, project: nn.Linear, window: Window) -> torch.Tensor:
    """The last stage: soft split and Linear."""
    tensors = x, project.weight, project.bias, None, None
    kernel, stride, padding = window
    found = remembered.entry(project, tensors, (window,))
    options = {"kernel_size": kernel, "stride": stride, "padding": padding}
    out: torch.Tensor = remembered.run(found, soft_split_linear, tensors, **options)
    return out


def walk(
    x: torch.Tensor,
    splits: Sequence[nn.Module],
    layers: Sequence[nn.Module],
    project: nn.Module,
    pixel_norm: PixelNorm | None = None,
) -> list[Stage]:
    """Alternate soft splits and layers, then soft split and projection; each pair is fused unless there is an obstacle.

    Tokens (B, L, C) with their grid *are* an image in channels-last memory, the input of the next soft split.

    Args:
        x: image (B, C, H, W).
        splits: ``nn.Unfold`` modules; layers: one for each soft split except the last; project: the last one's
        ``nn.Linear``. pixel_norm: (mean, std) for an image of uint8.

    Returns:
        a list of (tokens, grid), one per stage.
    """
    found: remembered.Entry | None = None
    tensors: Sequence[Any] = (x,)
    pairs = [(split, layer, window_of(split)) for split, layer in zip(splits, (*layers, project), strict=True)]
    if remembered.replays(x):
        call = _dependencies(x, pairs, pixel_norm)
        if call is not None:
            found, tensors = remembered.entry(project, *call), call[0]
    out: list[Stage] = remembered.forward(found, partial(_walk, x, pairs, pixel_norm), tensors)
    return out


_Pairs: TypeAlias = Sequence[tuple[nn.Module, nn.Module, Any]]
"""Soft split, the layer behind it, and the split's window."""


def _dependencies(x: Any, pairs: _Pairs, pixel_norm: PixelNorm | None) -> remembered.Dependencies | None:
    """What a walk depends on, for :func:`remembered.entry`; ``None`` if a stage is not fused."""
    tensors: list[Any] = [x]
    options: list[Any] = []
    for split, layer, window in pairs:
        if stage_obstacle(split, layer, window) is not None:
            return None
        if isinstance(layer, TokenLayer):
            call = layer.dependencies(x, window, pixel_norm)
            if call is None:
                return None
            tensors += call[0][1:]
            options += call[1]
        else:
            tensors += fusion.weights(layer)
            options.append(window)
    return tensors, tuple(options)


def _walk(x: torch.Tensor, pairs: _Pairs, pixel_norm: PixelNorm | None) -> list[Stage]:
    """:func:`walk`, stage by stage."""
    stages: list[Stage] = []
    for split, layer, window in pairs:
        if stages:
            x = as_image(*stages[-1])
        if stage_obstacle(split, layer, window) is not None:
            tokens = layer(split(image_values(x, pixel_norm, fusion.values_dtype(layer))).transpose(1, 2))
        elif isinstance(layer, nn.Linear):
            tokens = _projected(x, layer, window)
        else:
            norm = pixel_norm if x.dtype == torch.uint8 else None
            tokens = layer(x, window=window, pixel_norm=norm)
        stages.append((tokens, _grid_of(split, window, tokens, *x.shape[2:])))
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
        recompute: see :attr:`recompute`; pixel_norm: see :attr:`pixel_norm`.
    """

    pixel_norm = None
    """(mean, std) of the channels, for images of uint8, which are normalised while they are read.

    The same numbers as for torchvision's ``Normalize``, for pixels from 0 to 1. May be set at any time, also on a
    swapped model. Floating images must already be normalised.
    """

    tokens_type = None

    @renamed_arguments(memory=("recompute", recompute_of))
    def __init__(
        self,
        img_size: Pair = 224,
        tokens_type: str = "performer",
        in_chans: int = 3,
        embed_dim: int = 768,
        token_dim: int = 64,
        windows: Sequence[Sequence[Pair]] = T2T_WINDOWS,
        recompute: bool = False,
        pixel_norm: PixelNorm | None = None,
    ) -> None:
        super().__init__()
        check_options("T2TModule", locals())
        check_choice("T2TModule", "tokens_type", tokens_type, TOKENS_TYPES)
        if pixel_norm is not None:
            check_pixel_norm("T2TModule", pixel_norm, in_chans)
        check_bool("T2TModule", "recompute", recompute)
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
            self.soft_split0: nn.Module = nn.Conv2d(in_chans, token_dim, *first)
            self.soft_split1: nn.Module = nn.Conv2d(token_dim, token_dim, *second)
            self.project: nn.Module = nn.Conv2d(token_dim, embed_dim, *third)
        else:
            layer = TokenPerformer if tokens_type == "performer" else TokenTransformer
            self.soft_split0, self.soft_split1, self.soft_split2 = (Unfold.of(window) for window in self.windows)
            self.attention1 = layer(dim=in_chans * first.taps, in_dim=token_dim)
            self.attention2 = layer(dim=token_dim * second.taps, in_dim=token_dim)
            self.project = nn.Linear(token_dim * third.taps, embed_dim)
        self.recompute = recompute
        self.pixel_norm = pixel_norm

    memory = deprecated_memory("T2TModule")

    @property
    def recompute(self) -> bool:
        """Whether the two Performer layers recompute k, q and v in backward: less memory, more time.

        May be set at any time, also on a swapped model; see :func:`t2t_fast.functional.performer_layer`. Always
        ``False`` for other token types, whose attention is PyTorch's.
        """
        layers = self._performers()
        return layers[0].recompute if layers else False

    @recompute.setter
    def recompute(self, recompute: bool) -> None:
        check_bool("T2TModule", "recompute", recompute)
        layers = self._performers()
        if recompute and not layers:
            raise ValueError("T2TModule: recompute must be False without a Performer layer of t2t_fast, got True")
        for layer in layers:
            layer.recompute = recompute

    def _performers(self) -> list[TokenPerformer]:
        layers = (getattr(self, name, None) for name in ("attention1", "attention2"))
        return [layer for layer in layers if isinstance(layer, TokenPerformer)]

    @property
    def img_size(self) -> tuple[int, int] | None:
        """(H, W) for :attr:`grid_size`; of a swapped module derived from upstream's ``num_patches``, or ``None``."""
        if "_img_size" in self.__dict__:
            return self._img_size
        patches = self.__dict__.get("num_patches")
        if not isinstance(patches, int):
            return None
        side, windows = isqrt(patches), self._windows()
        return side * prod(win.stride[0] for win in windows), side * prod(win.stride[1] for win in windows)

    @img_size.setter
    def img_size(self, img_size: tuple[int, int] | None) -> None:
        self._img_size = img_size

    @property
    def grid_size(self) -> tuple[int, int] | None:
        """Token grid (h, w) of an image of ``img_size``."""
        return None if self.img_size is None else self.grid(*self.img_size)

    @property
    def num_patches(self) -> int | None:
        """Tokens of an image of ``img_size``. (Upstream's attribute rounds down, although its splits round up; this is
        the actual number.)
        """
        grid = self.grid_size
        return None if grid is None else prod(grid)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token grid (h, w) of an image of ``height`` x ``width``."""
        return grid_after(self._windows(), height, width)

    def _windows(self) -> list[Window]:
        return windows_of(self._splits())

    def _splits(self) -> tuple[nn.Module, ...]:
        last = self.project if self.tokens_type == "convolution" else self.soft_split2
        return self.soft_split0, self.soft_split1, last

    def obstacle(self) -> str | None:
        """The first reason why a soft split is not fused with the layer behind it, or ``None``."""
        if self.tokens_type == "convolution":
            return None
        return stages_obstacle(self, "attention1", "attention2", "project")

    def forward(self, x: torch.Tensor, stages: bool = False) -> Any:
        """(B, in_chans, H, W) -> (B, h*w, embed_dim); with ``stages`` the result of :meth:`forward_stages`."""
        results = self._stages(x)
        return results if stages else results[-1][0]

    def forward_with_grid(self, x: torch.Tensor) -> Stage:
        """As :meth:`forward`, and the grid (h, w) of the tokens."""
        return self._stages(x)[-1]

    def forward_stages(self, x: torch.Tensor) -> list[Stage]:
        """Tokens and grid after each of the three stages: a list of three ((B, L, C), (h, w))."""
        return self._stages(x)

    def _stages(self, x: torch.Tensor) -> list[Stage]:
        check_tensor(type(self).__name__, "x", x, ndim=4, dtypes=IMAGES)
        if self.tokens_type != "convolution":
            return walk(x, self._splits(), (self.attention1, self.attention2), self.project, self.pixel_norm)
        stages, x = [], image_values(x, self.pixel_norm, fusion.values_dtype(self))
        for convolution in self._splits():
            x = convolution(x)
            height, width = x.shape[2:]
            stages.append((x.flatten(2).transpose(1, 2), (height, width)))
        return stages

"""Tokenisers: soft splits of free kernel sizes, and plain patches; non-square images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ...errors import check_tensor
from ...functional import window as make_window
from ...modules.options import check_options, check_series
from ...modules.soft_split import Unfold
from ...modules.t2t_module import Stage, stages_obstacle, walk, windows_of
from ...ops._common.spec import Window, grid_after
from .layers import TokenTransformer


def check_image(owner: str, img_size: Sequence[int]) -> tuple[int, int, int]:
    """``img_size`` as (C, H, W).

    Raises:
        TypeError, ValueError: it is not three integers of at least 1; the text begins with ``owner``.
    """
    check_series(owner, "img_size", img_size, length=3)
    channels, height, width = img_size
    return channels, height, width


def split_window(kernel: int) -> Window:
    """The articles' window of a kernel size k: stride ``(k + 1) // 2``, padding ``(k + 1) // 4``."""
    return make_window(kernel, (kernel + 1) // 2, (kernel + 1) // 4, function="Tokens2Token")


def count_tokens(w: int, h: int, k: int, s: int, p: int) -> tuple[int, int, int]:
    """Grid of a soft split: (new_w, new_h, tokens). Width comes first, as in the articles."""
    new_h, new_w = make_window(k, s, p, function="count_tokens").grid(h, w)
    return new_w, new_h, new_w * new_h


class Tokens2Token(nn.Module):
    """Soft splits of free kernel sizes with two token transformers between: (B, C, H, W) -> (B, tokens, token_len).

    Args:
        img_size: (C, H, W); H and W only set :attr:`num_tokens`.
        softsplit_kernels: three kernel sizes; see :func:`split_window`.
        token_chan, token_len: width of the inner and of the outgoing tokens.
        others: as the articles' class.
    """

    def __init__(
        self,
        img_size: Sequence[int] = (1, 1000, 300),
        softsplit_kernels: Sequence[int] = (7, 3, 3),
        num_heads: int = 1,
        token_chan: int = 64,
        token_len: int = 768,
        hidden_chan_mul: float = 1.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        check_options("Tokens2Token", locals())
        check_series("Tokens2Token", "softsplit_kernels", softsplit_kernels, length=3)
        channels, height, width = check_image("Tokens2Token", img_size)
        first, second, third = windows = tuple(split_window(k) for k in softsplit_kernels)
        self.windows = windows
        self.grid_size = grid_after(windows, height, width)
        self.num_tokens = self.grid_size[0] * self.grid_size[1]
        options: dict[str, Any] = dict(
            num_heads=num_heads,
            hidden_chan_mul=hidden_chan_mul,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            act_layer=act_layer,
            norm_layer=norm_layer,
        )
        self.token_chan = token_chan
        self.soft_split0, self.soft_split1, self.soft_split2 = (Unfold.of(window) for window in windows)
        self.transformer1 = TokenTransformer(channels * first.taps, token_chan, **options)
        self.transformer2 = TokenTransformer(token_chan * second.taps, token_chan, **options)
        self.project = nn.Linear(token_chan * third.taps, token_len)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token grid (h, w) of an image of ``height`` x ``width``."""
        return grid_after(windows_of((self.soft_split0, self.soft_split1, self.soft_split2)), height, width)

    def obstacle(self) -> str | None:
        """The first reason why a soft split is not fused with the layer behind it, or ``None``."""
        return stages_obstacle(self, "transformer1", "transformer2", "project")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, h*w, token_len)."""
        return self._stages(x)[-1][0]

    def forward_with_grid(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """As :meth:`forward`, and the grid (h, w) of the tokens."""
        return self._stages(x)[-1]

    def _stages(self, x: torch.Tensor) -> list[Stage]:
        check_tensor("Tokens2Token", "x", x, ndim=4)
        splits = (self.soft_split0, self.soft_split1, self.soft_split2)
        return walk(x, splits, (self.transformer1, self.transformer2), self.project)


class PatchTokenization(nn.Module):
    """Square, non-overlapping patches by unfold and Linear: (B, C, H, W) -> (B, tokens, token_len)."""

    def __init__(self, img_size: Sequence[int] = (1, 60, 100), patch_size: int = 50, token_len: int = 768) -> None:
        super().__init__()
        check_options("PatchTokenization", locals())
        channels, height, width = check_image("PatchTokenization", img_size)
        self.patch_size = patch_size
        self.grid_size = self.grid(height, width)
        self.num_tokens = self.grid_size[0] * self.grid_size[1]
        self.split = Unfold(patch_size, stride=patch_size)
        self.project = nn.Linear(channels * patch_size**2, token_len)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token grid (h, w) of an image of ``height`` x ``width``.

        Raises:
            ValueError: the patch does not divide the image.
        """
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"PatchTokenization: patch_size {self.patch_size} must divide the image, "
                f"got height {height}, width {width}"
            )
        return height // self.patch_size, width // self.patch_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, h*w, token_len)."""
        return self.forward_with_grid(x)[0]

    def forward_with_grid(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """As :meth:`forward`, and the grid (h, w) of the tokens."""
        check_tensor("PatchTokenization", "x", x, ndim=4)
        self.grid(*x.shape[2:])
        return walk(x, (self.split,), (), self.project)[-1]

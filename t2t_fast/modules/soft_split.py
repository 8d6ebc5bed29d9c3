"""Soft split and soft composition as modules without parameters."""

from math import prod

import torch
from torch import nn

from ..errors import check_pair, check_tensor
from ..functional import fused_fold_unfold, soft_composition, soft_split, window
from ..ops._common.spec import Pair, Window


class SoftSplit(nn.Module):
    """Overlapping windows of an image as tokens (T2T-ViT paper, section 3.1).

    Args:
        kernel_size, stride, padding: int or (height, width) pair.
    """

    def __init__(self, kernel_size: Pair, stride: Pair = 1, padding: Pair = 0) -> None:
        super().__init__()
        self.window = window(kernel_size, stride, padding, function="SoftSplit")

    def forward(self, x: torch.Tensor, grid: Pair | None = None) -> torch.Tensor:
        """(B, C, H, W), or tokens (B, H*W, C) with ``grid=(H, W)`` -> tokens (B, h*w, C*k*k)."""
        return soft_split(x, *self.window, grid=grid)

    def forward_with_grid(self, x: torch.Tensor, grid: Pair | None = None) -> tuple[torch.Tensor, tuple[int, int]]:
        """As :meth:`forward`, and the grid (h, w) of the tokens."""
        tokens = self(x, grid)
        size = x.shape[2:] if grid is None else check_pair("SoftSplit", "grid", grid, minimum=1)
        return tokens, self.window.grid(*size)

    def extra_repr(self) -> str:
        return str(self.window)


class SoftComposition(nn.Module):
    """Overlapping tokens added up into an image; the adjoint of :class:`SoftSplit`.

    Args:
        output_size: int or (H, W) of the image.
        kernel_size, stride, padding: int or (height, width) pair.
    """

    def __init__(self, output_size: Pair, kernel_size: Pair, stride: Pair = 1, padding: Pair = 0) -> None:
        super().__init__()
        self.output_size = check_pair("SoftComposition", "output_size", output_size, minimum=1)
        self.window = window(kernel_size, stride, padding, function="SoftComposition")

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, h*w, C*k*k) -> (B, C, H, W)."""
        return soft_composition(tokens, self.output_size, *self.window)

    def extra_repr(self) -> str:
        return f"{self.output_size[0]}x{self.output_size[1]}, {self.window}"


class FusedFoldUnfold(nn.Module):
    """Fold, normalise by the overlap, unfold: F3N of FuseFormer, E2FGVI and ProPainter in one operator.

    It replaces ``unfold(fold(x) / fold(ones))``, and the transposes and views around it, between the two Linears of
    their ``FusionFeedForward``.

    Args:
        kernel_size, stride, padding: int or (height, width) pair; ``FusedFoldUnfold(**t2t_params)`` works as upstream.
        output_size: int or (H, W) of the image in between, unless each call passes one.
    """

    def __init__(self, kernel_size: Pair, stride: Pair = 1, padding: Pair = 0, output_size: Pair | None = None) -> None:
        super().__init__()
        self.window = window(kernel_size, stride, padding, function="FusedFoldUnfold")
        self.output_size = (
            None if output_size is None else check_pair("FusedFoldUnfold", "output_size", output_size, minimum=1)
        )

    def forward(self, tokens: torch.Tensor, output_size: Pair | None = None) -> torch.Tensor:
        """(B, h*w, C*k*k) -> the same shape; also (B, t*h*w, C*k*k), the concatenated tokens of t frames."""
        check_tensor("FusedFoldUnfold", "tokens", tokens, ndim=3)
        size = self.output_size if output_size is None else output_size
        if size is None:
            raise ValueError("FusedFoldUnfold: output_size is needed, at construction or at the call")
        size = check_pair("FusedFoldUnfold", "output_size", size, minimum=1)
        length = prod(self.window.grid(*size))
        if length > 0 and tokens.shape[1] > 0 and tokens.shape[1] % length == 0:
            frames = tokens.unflatten(1, (tokens.shape[1] // length, length)).flatten(0, 1)
            return fused_fold_unfold(frames, size, *self.window).view(tokens.shape)
        return fused_fold_unfold(tokens, size, *self.window)

    def extra_repr(self) -> str:
        return (
            str(self.window) if self.output_size is None else f"{'x'.join(map(str, self.output_size))}, {self.window}"
        )


class Unfold(nn.Unfold):
    """Drop-in for ``nn.Unfold`` (dilation 1) whose output, transposed, is contiguous tokens.

    Every T2T model transposes the output of ``nn.Unfold``; here the output is a transposed view of contiguous tokens.

    Args:
        kernel_size, dilation, padding, stride: as ``nn.Unfold``; dilation must be 1.
    """

    def __init__(self, kernel_size: Pair, dilation: Pair = 1, padding: Pair = 0, stride: Pair = 1) -> None:
        _check_dilation("Unfold", dilation)
        window(kernel_size, stride, padding, function="Unfold")
        super().__init__(kernel_size, dilation, padding, stride)  # type: ignore[arg-type]

    @classmethod
    def of(cls, win: Window) -> "Unfold":
        """The module for a :class:`Window`."""
        return cls(win.kernel, stride=win.stride, padding=win.padding)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C*k*k, h*w), or without B."""
        check_tensor("Unfold", "input", input, ndim=(3, 4))
        if input.ndim == 3:
            return self.forward(input[None])[0]
        return soft_split(input, self.kernel_size, self.stride, self.padding).transpose(1, 2)


class Fold(nn.Fold):
    """Drop-in for ``nn.Fold`` (dilation 1); its output is contiguous, like upstream's.

    Args:
        output_size, kernel_size, dilation, padding, stride: as ``nn.Fold``; dilation must be 1.
    """

    def __init__(
        self, output_size: Pair, kernel_size: Pair, dilation: Pair = 1, padding: Pair = 0, stride: Pair = 1
    ) -> None:
        _check_dilation("Fold", dilation)
        check_pair("Fold", "output_size", output_size, minimum=1)
        window(kernel_size, stride, padding, function="Fold")
        super().__init__(output_size, kernel_size, dilation, padding, stride)  # type: ignore[arg-type]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(B, C*k*k, h*w) -> (B, C, H, W), or without B."""
        check_tensor("Fold", "input", input, ndim=(2, 3))
        if input.ndim == 2:
            return self.forward(input[None])[0]
        return soft_composition(
            input.transpose(1, 2), self.output_size, self.kernel_size, self.stride, self.padding
        ).contiguous()


def _check_dilation(name: str, dilation: Pair) -> None:
    if dilation not in (1, (1, 1), [1, 1]):
        raise ValueError(f"{name}: dilation must be 1, got {dilation!r}")

"""Soft split: an image's overlapping windows as tokens."""

import torch

from ..ops._common.spec import Pair
from ..ops.soft_split.op import soft_split as _soft_split
from .arguments import as_image, check_window, choose, window


def soft_split(
    x: torch.Tensor,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair = 0,
    *,
    grid: Pair | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Soft split: overlapping windows of an image as tokens (T2T-ViT paper, section 3.1, equation 3).

    The same numbers as ``F.unfold(x, kernel_size, stride=stride, padding=padding).transpose(1, 2)``.

    Args:
        x: (B, C, H, W) image with any strides, or (B, H*W, C) tokens with ``grid=(H, W)``; float16, bfloat16,
            float32 or float64.
        kernel_size, stride, padding: int or (height, width) pair.
        grid: the image size of tokens.

    Returns:
        (B, h*w, C*k*k) contiguous tokens in ``x``'s dtype; column ``c*k*k + dy*k + dx`` of token (i, j) is pixel
        (i*s - p + dy, j*s - p + dx) of channel c, 0 outside. h = floor((H + 2p - k) / s) + 1, w likewise.

    Raises:
        TypeError, ValueError: an argument of the wrong type, rank, dtype or value, or a window larger than the image.
    """
    x = as_image("soft_split", x, grid)
    win = window(kernel_size, stride, padding, function="soft_split")
    check_window("soft_split", win, x.shape)
    return _soft_split(x, *win, choose("soft_split", x, backend, kernel=win.kernel))

"""Soft split, LayerNorm and Linear in one operator; and the cache of folded weights of its Triton kernels."""

from typing import Any

import torch

from .._deprecated import deprecated_alias
from ..errors import check_count, check_filled, check_number, check_shape, check_tensor
from ..ops._common.cached import FOLDED
from ..ops._common.library import wants_gradient
from ..ops._common.pixels import PixelNorm
from ..ops._common.spec import Pair
from ..ops.soft_split_linear.op import soft_split_linear as _soft_split_linear
from .arguments import (
    IMAGES,
    as_image,
    check_parameters,
    check_pixels,
    check_window,
    checked,
    choose,
    running_dtype,
    window,
)


@checked(_soft_split_linear, tensors={"x": 0, "weight": 1, "bias": 2, "norm_weight": 3, "norm_bias": 4})
def soft_split_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    kernel_size: Pair = 1,
    stride: Pair = 1,
    padding: Pair = 0,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    norm_eps: float | None = None,
    pixel_norm: PixelNorm | None = None,
    grid: Pair | None = None,
    backend: str = "auto",
) -> tuple[Any, ...]:
    """Soft split, LayerNorm and Linear in one: ``Linear(LayerNorm(soft_split(x)))`` without the unfolded tokens.

    Upstream: ``self.kqv(self.norm1(self.soft_split0(x).transpose(1, 2)))`` of ``Token_performer``, ``self.project`` of
    ``T2T_module``. Zero padding counts in LayerNorm's statistics, as upstream.

    Args:
        x: (B, C, H, W) image with any strides, or (B, H*W, C) tokens with ``grid=(H, W)``.
        weight: (O, C*k*k), upstream's column order; bias: (O) or ``None``.
        kernel_size, stride, padding: int or (height, width) pair.
        norm_weight, norm_bias: (C*k*k) LayerNorm parameters or ``None``; need ``norm_eps``.
        norm_eps: LayerNorm's eps; ``None`` for no LayerNorm.
        pixel_norm: (mean, std) for an image of uint8, each with C numbers: the input is
            ``(x / 255 - mean) / std``; the Triton kernels read the bytes, other backends convert them first.
        grid: the image size of tokens.

    Returns:
        (B, h*w, O) contiguous tokens in ``weight``'s dtype (under autocast: autocast's), which is ``x``'s unless that
        is uint8.

    Numerics:
        statistics, sums and the normalisation in float32 (float64 for float64), also for half inputs; precision
        does not degrade with a large common offset. Gradients for x, weight, bias, norm_weight, norm_bias; a second
        derivative raises an error.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
    """
    function = "soft_split_linear"
    x = as_image(function, x, grid, dtypes=IMAGES)
    pixels = check_pixels(function, x, pixel_norm)
    win = window(kernel_size, stride, padding, function=function)
    h, w = check_window(function, win, x.shape)
    check_tensor(function, "weight", weight, ndim=2)
    check_filled(function, "weight", weight)
    columns = x.shape[1] * win.taps
    check_count(function, "the result", x.shape[0], h, w, weight.shape[0])
    if norm_eps is None and (norm_weight is not None or norm_bias is not None):
        raise ValueError(f"{function}: norm_weight and norm_bias need norm_eps, got norm_eps=None")
    if norm_eps is not None:
        norm_eps = check_number(function, "norm_eps", norm_eps, above=0)
    parameters = {"weight": weight, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    leader = check_parameters(function, x, pixels, parameters)
    for name, value, shape, meaning in (
        ("weight", weight, (weight.shape[0], columns), "(O, channels * window pixels)"),
        ("bias", bias, (weight.shape[0],), "weight's rows"),
        ("norm_weight", norm_weight, (columns,), "channels * window pixels"),
        ("norm_bias", norm_bias, (columns,), "channels * window pixels"),
    ):
        if value is not None:
            check_shape(function, name, value, shape, meaning)
    chosen = choose(
        function,
        x,
        backend,
        dtype=running_dtype(leader),
        channels=x.shape[1],
        bytes=x.dtype == torch.uint8,
        window=win,
        outputs=weight.shape[0],
        normed=norm_eps is not None,
        training=wants_gradient(x, weight, bias, norm_weight, norm_bias),
        index=x.device.index,
    )
    return x, weight, bias, norm_weight, norm_bias, norm_eps, *win, leader.dtype, pixels, chosen


def clear_weight_cache() -> None:
    """Drop the folded and packed weights that are cached between inference calls.

    Triton's soft splits and native transformer blocks cache them. A cached weight is recomputed when a parameter's
    version counter changes, which every in-place operation visible to autograd increments. A write through
    ``parameter.data`` does not. A backward pass of a fused operator drops the cache too, so this function is needed
    only after such a write without a backward pass, or with a compiled one.
    """
    FOLDED.clear()


refold = deprecated_alias("t2t_fast.functional.refold", "t2t_fast.functional.clear_weight_cache", clear_weight_cache)

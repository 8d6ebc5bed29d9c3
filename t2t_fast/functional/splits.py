"""Soft split, soft composition, and what is fused with them."""

import torch

from ..errors import check_count, check_filled, check_number, check_pair, check_shape, check_tensor, known
from ..ops._common.cached import FOLDED
from ..ops._common.library import wants_gradient
from ..ops.fused_fold_unfold.op import fused_fold_unfold as _fused_fold_unfold
from ..ops.soft_composition.op import soft_composition as _soft_composition
from ..ops.soft_split.op import soft_split as _soft_split
from ..ops.soft_split_linear.op import soft_split_linear as _soft_split_linear
from .arguments import (
    IMAGES,
    as_image,
    check_parameters,
    check_pixels,
    check_window,
    choose,
    running_dtype,
    window,
)


def soft_split(x, kernel_size, stride=1, padding=0, *, grid=None, backend="auto"):
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


def soft_composition(tokens, output_size, kernel_size, stride=1, padding=0, *, backend="auto"):
    """Soft composition: overlapping tokens added up into an image; the adjoint of :func:`soft_split`.

    The same numbers as ``F.fold(tokens.transpose(1, 2), output_size, ...)``, summed in a fixed order.

    Args:
        tokens: (B, h*w, C*k*k), columns as :func:`soft_split` makes them.
        output_size: int or (H, W) of the image.
        kernel_size, stride, padding: int or (height, width) pair.

    Returns:
        (B, C, H, W) in ``tokens``' dtype, in channels-last or contiguous memory.

    Numerics:
        native: sums in float32 (float64 for float64), rounded once; aten and reference: sums in ``tokens``' dtype.

    Raises:
        TypeError, ValueError: as :func:`soft_split`, or token counts and widths that do not fit the window.
    """
    size, win = _composition("soft_composition", tokens, output_size, kernel_size, stride, padding)
    return _soft_composition(tokens, size, *win, choose("soft_composition", tokens, backend, kernel=win.kernel))


def fused_fold_unfold(tokens, output_size, kernel_size, stride=1, padding=0, *, backend="auto"):
    """Fold, normalise by the overlap, unfold: each pixel of a token becomes the mean over all tokens that show it.

    F3N of FuseFormer (Liu et al., ICCV 2021; its ``FusionFeedForward``, as also in E2FGVI and ProPainter) without
    folding ones. An orthogonal projection of the tokens, so it is its own gradient.

    Args:
        tokens: (B, h*w, C*k*k), columns as :func:`soft_split` makes them.
        output_size: int or (H, W) of the image in between.
        kernel_size, stride, padding: int or (height, width) pair.

    Returns:
        (B, h*w, C*k*k) contiguous tokens in ``tokens``' dtype; what lies in the padding is 0.

    Numerics:
        sums and their division in float32 (float64 for float64), rounded once. A second derivative is refused.

    Raises:
        TypeError, ValueError: as :func:`soft_composition`.
    """
    function = "fused_fold_unfold"
    size, win = _composition(function, tokens, output_size, kernel_size, stride, padding)
    return _fused_fold_unfold(tokens, size, *win, choose(function, tokens, backend, kernel=win.kernel))


def _composition(function, tokens, output_size, kernel_size, stride, padding):
    """The checked image size and window of tokens that are to be composed."""
    check_tensor(function, "tokens", tokens, ndim=3)
    check_filled(function, "tokens", tokens, first=1)
    size = check_pair(function, "output_size", output_size, minimum=1)
    win = window(kernel_size, stride, padding, function=function)
    h, w = check_window(function, win, (tokens.shape[0], tokens.shape[2] // win.taps, *size))
    if known(tokens.shape[1] != h * w):
        raise ValueError(
            f"{function}: tokens must have {h} x {w} = {h * w} tokens for output_size {size} and {win}, "
            f"got {tokens.shape[1]}"
        )
    if known(tokens.shape[2] % win.taps != 0):
        raise ValueError(
            f"{function}: tokens must have a width that is a multiple of the window's {win.taps} pixels, "
            f"got {tokens.shape[2]}"
        )
    return size, win


def refold():
    """Forget the folded weights that the Triton kernels keep between calls of inference.

    They are made anew whenever a parameter changes, as far as its version counter tells: all that autograd notices.
    Only a write through ``parameter.data`` is hidden from it. A backward pass between two calls forgets everything,
    too: call this after such a write without one.
    """
    FOLDED.clear()


def soft_split_linear(
    x,
    weight,
    bias=None,
    kernel_size=1,
    stride=1,
    padding=0,
    *,
    norm_weight=None,
    norm_bias=None,
    norm_eps=None,
    pixel_norm=None,
    grid=None,
    backend="auto",
):
    """Soft split, LayerNorm and Linear in one: ``Linear(LayerNorm(soft_split(x)))`` without the unfolded tokens.

    Upstream: ``self.kqv(self.norm1(self.soft_split0(x).transpose(1, 2)))`` of ``Token_performer``, ``self.project`` of
    ``T2T_module``. Zero padding counts in LayerNorm's statistics, as upstream.

    Args:
        x: (B, C, H, W) image with any strides, or (B, H*W, C) tokens with ``grid=(H, W)``.
        weight: (O, C*k*k), upstream's column order; bias: (O) or ``None``.
        kernel_size, stride, padding: int or (height, width) pair.
        norm_weight, norm_bias: (C*k*k) LayerNorm parameters or ``None``; need ``norm_eps``.
        norm_eps: LayerNorm's eps; ``None`` leaves LayerNorm out.
        pixel_norm: (mean, std) for an image of uint8, each with C numbers: ``x / 255`` less the mean over the std is
            what enters; the Triton kernels read the bytes themselves, others make the values first.
        grid: the image size of tokens.

    Returns:
        (B, h*w, O) contiguous tokens in ``weight``'s dtype (under autocast: autocast's), which is ``x``'s unless that
        is uint8.

    Numerics:
        statistics, sums and the normalisation in float32 (float64 for float64), also for half inputs; they survive a
        large common offset. Gradients for x, weight, bias, norm_weight, norm_bias; a second derivative is refused.

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
    check_shape(function, "weight", weight, (weight.shape[0], columns), "(O, channels * window pixels)")
    check_count(function, "the result", x.shape[0], h, w, weight.shape[0])
    if norm_eps is None and (norm_weight is not None or norm_bias is not None):
        raise ValueError(f"{function}: norm_weight and norm_bias need norm_eps, got norm_eps=None")
    if norm_eps is not None:
        norm_eps = check_number(function, "norm_eps", norm_eps, above=0)
    parameters = {"weight": weight, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    leader = check_parameters(function, x, pixels, parameters)
    for name, value, shape, meaning in (
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
    return _soft_split_linear(x, weight, bias, norm_weight, norm_bias, norm_eps, *win, leader.dtype, pixels, chosen)

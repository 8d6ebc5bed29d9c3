"""The kernels' operands made of a call's parameters: LayerNorm folded in, packed, cached between inference calls."""

import torch

from ..._common import triton_runtime as runtime
from ..._common.cached import FOLDED
from ..aten import fold_norm
from .call import Folded
from .layout import layout, pack_taps, pad_outputs


def _folded(weight, bias, norm_weight, norm_bias, norm_eps, dtype):
    """The weight as an operand, its row sums (``None`` without LayerNorm) and the offset."""
    if norm_eps is not None:
        return fold_norm(weight, bias, norm_weight, norm_bias, dtype)
    offset = weight.new_zeros(weight.shape[0]) if bias is None else bias
    return weight.to(dtype), None, offset


def pixel_columns(pixels, weight, channels, window):
    """Scale and shift of every column of windows over an image of bytes (``ops/pixels.py``); ``None`` for values.

    Filled value by value, because a copy from the host is not allowed while a CUDA graph is captured.
    """
    if not pixels:
        return None
    filled = [torch.stack([weight.new_full((), p, dtype=torch.float32) for p in part]) for part in _halves(pixels)]
    return [layout(channels, window).spread(row.repeat_interleave(window.taps)) for row in filled]


def _halves(pixels):
    return pixels[: len(pixels) // 2], pixels[len(pixels) // 2 :]


def packed(weight, bias, norm_weight, norm_bias, norm_eps, channels, window, dtype):
    """The parameters for a forward kernel, a :class:`Folded`."""
    operand, row_sums, offset = _folded(weight, bias, norm_weight, norm_bias, norm_eps, dtype)
    found = layout(channels, window)
    used = None
    if found.columns != weight.shape[1] or (found.gather and row_sums is not None):
        used = found.spread(torch.ones_like(weight[0], dtype=torch.float32))
    if row_sums is not None:
        row_sums = pad_outputs(row_sums)
    return Folded(found.pack(operand), used, row_sums, pad_outputs(offset))


def packed_taps(weight, bias, norm_weight, norm_bias, norm_eps, channels, dtype):
    """The parameters for the image's gradient: weight, offset (``None`` without LayerNorm)."""
    operand, row_sums, offset = _folded(weight, bias, norm_weight, norm_bias, norm_eps, dtype)
    return pack_taps(operand, channels), None if row_sums is None else pad_outputs(offset)


def operands(x, weight, bias, norm_weight, norm_bias, norm_eps, window, dtype, pixels, keep):
    """A forward kernel's operands other than the image: :func:`packed` and :func:`pixel_columns`.

    keep: whether to cache them for the next call with the same parameters.
    """
    tensors, rest = (weight, bias, norm_weight, norm_bias), (runtime.fixed(x.shape[1]), window)

    def make():
        return packed(*tensors, norm_eps, *rest, dtype), pixel_columns(pixels, weight, *rest)

    return FOLDED.get(tensors, (norm_eps is not None, *rest, dtype, *pixels), make) if keep else make()

"""Soft split + LayerNorm + Linear as a convolution and box-filtered statistics.

With ``u`` a window's C*kh*kw values, LayerNorm then Linear is ``r Wg (u - mu) + b'`` where ``Wg = W diag(gamma)``,
``b' = W beta + b``, and a convolution of the image computes ``Wg (u - mu)``: no tensor of the unfolded width is formed,
forward or backward. A common offset of the image costs no precision, because only differences enter:

* the convolution reads each pixel less the mean of its channels; these means enter as differences inside each window,
  one channel unfolded (:func:`mean_differences`);
* ``r`` merges per-pixel means and deviations (:func:`merge_statistics`), never a difference of squares.

A value that is not finite reaches the outputs only through ``r``, that is only for the windows that contain it.

Saved for backward: the image and ``r`` (4 bytes a token), and the output if the image requires a gradient.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .._common.library import accumulation_dtype, matmul_precision
from .._common.pixels import values
from .._common.windows import cover_deviations, in_layout, merge_statistics
from .autograd import differentiable, parameter_gradients


class Centred(NamedTuple):
    """An image in the accumulation dtype, split into each pixel's mean over channels and the deviations from it.

    The mean is ``mean + rest``, (B, H, W) each, where ``rest`` is the rounding error of ``mean``; ``within`` is the
    image less the mean, (B, C, H, W).
    """

    within: torch.Tensor
    mean: torch.Tensor
    rest: torch.Tensor


def centred_pixels(x):
    """An image's :class:`Centred`."""
    x = x.to(accumulation_dtype(x.dtype))
    mean = x.mean(1, keepdim=True)
    within = x - mean
    rest = within.mean(1, keepdim=True)
    return Centred(within.sub_(rest), mean.squeeze(1), rest.squeeze(1))


def patch_statistics(parts, window, eps):
    """The means of every window, as ``levels`` of :func:`merge_statistics`, and 1 / standard deviation (B, h, w)."""
    within, mean, rest = parts
    channels = within.shape[1]
    # ONNX has no vecdot
    m2 = within.square().sum(1) if torch.jit.is_tracing() else torch.linalg.vecdot(within, within, dim=1)
    levels, m2 = merge_statistics(channels, mean, rest, m2, window)
    return levels, torch.rsqrt(m2 / (channels * window.taps) + eps)


def finite(x):
    """Set values of ``x`` that are not finite to 0, in place: they reach a window's outputs through ``r``."""
    return x.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def mean_differences(parts, window):
    """The channel mean of each pixel of a window minus that of the window's first pixel: (B*h*w, kh*kw)."""
    (kh, kw), (sh, sw), (ph, pw) = window

    def windows(means):
        if torch.jit.is_tracing():  # ONNX has no unfold of one axis of free size
            return (
                F.unfold(means.unsqueeze(1), window.kernel, padding=window.padding, stride=window.stride)
                .transpose(1, 2)
                .unflatten(2, window.kernel)
            )
        return F.pad(means, (pw, pw, ph, ph)).unfold(1, kh, sh).unfold(2, kw, sw)

    mean, rest = windows(parts.mean), windows(parts.rest)
    found = mean.clone(memory_format=torch.contiguous_format)
    return found.sub_(mean[..., :1, :1]).add_(rest).sub_(rest[..., :1, :1]).view(-1, window.taps)


def fold_norm(weight, bias, norm_weight, norm_bias, x_dtype):
    """LayerNorm's affine part folded into the Linear.

    Returns:
        the centred weight rounded to the operand dtype (O, K), its remaining row sums (O), the folded bias (O); the
        last two in the accumulation dtype.
    """
    wide = accumulation_dtype(x_dtype)
    weight = weight.to(wide)
    folded = weight if norm_weight is None else weight * norm_weight.to(wide)
    rounded = (folded - folded.mean(1, keepdim=True)).to(x_dtype)
    offset = weight.new_zeros(weight.shape[0]) if bias is None else bias.to(wide)
    if norm_bias is not None:
        offset = offset + weight @ norm_bias.to(wide)
    return rounded, rounded.to(wide).sum(1), offset


def _convolve(x, weight, bias, window):
    """(B, C, H, W), (O, C, kh, kw) -> (B, h, w, O) contiguous."""
    x = x.contiguous(memory_format=torch.channels_last)
    with matmul_precision(x):
        y = F.conv2d(x, weight, bias, stride=window.stride, padding=window.padding)
    return y.permute(0, 2, 3, 1).contiguous()


def _unfolded(weight, window):
    """(O, C*kh*kw) as (O, C, kh, kw)."""
    return weight.unflatten(1, (-1, *window.kernel))


def run(x, weight, bias, norm_weight, norm_bias, norm_eps, window, dtype, pixels=()):
    """Forward without autograd (:func:`autograd.differentiable`); no means, since backward does not need them."""
    x = values(x, pixels, accumulation_dtype(dtype) if norm_eps is not None else dtype)
    if norm_eps is None:
        bias = None if bias is None else bias.to(x.dtype)
        y = _convolve(x, _unfolded(weight.to(x.dtype), window), bias, window)
        return y.flatten(1, 2).to(dtype), *(y.new_empty(0) for _ in range(2))
    parts = centred_pixels(x)
    _, rstd = patch_statistics(parts, window, norm_eps)
    centred, _, offset = fold_norm(weight, bias, norm_weight, norm_bias, rstd.dtype)
    kernel = _unfolded(centred, window)
    y = _convolve(finite(parts.within).to(x.dtype), kernel.to(x.dtype), None, window).to(rstd.dtype).flatten(0, 2)
    y.addmm_(mean_differences(parts, window), kernel.sum(1).flatten(1).T)
    y.mul_(rstd.view(-1, 1)).add_(offset)
    # not unflatten(), which would fix the batch size in an ONNX file
    return y.view(*rstd.shape, y.shape[1]).flatten(1, 2).to(dtype), rstd.new_empty(0), rstd


def _convolution_backward(grad, x, weight, window, need_x, need_weight):
    """Gradients of image and weight, each ``None`` unless needed, from ``grad`` (B, h, w, O), in its dtype.

    PyTorch's own weight gradient has two faults on a CPU (oneDNN; seen in 2.11.0 and 2.14.1). For a 1 x 1 window with a
    stride it writes out of bounds; here that gradient is one matrix product. In bfloat16 it leaves taps that only see
    padding unwritten; here they are set to 0.
    """
    dtype, d_weight = grad.dtype, None
    pixels = need_weight and window.taps == 1 and window.padding == (0, 0)
    if pixels:
        down, across = window.stride
        rows = x[:, :, ::down, ::across].permute(0, 2, 3, 1).flatten(0, 2).to(dtype)
        d_weight = (grad.flatten(0, 2).T @ rows).view(weight.shape)
    if pixels and not need_x:
        return None, d_weight
    with matmul_precision(grad):
        d_x, of_convolution, _ = torch.ops.aten.convolution_backward(
            grad.permute(0, 3, 1, 2),
            x.to(dtype).contiguous(memory_format=torch.channels_last),
            weight.to(dtype),
            None,
            window.stride,
            window.padding,
            (1, 1),
            False,
            (0, 0),
            1,
            (need_x, need_weight and not pixels, False),
        )
    if need_weight and not pixels:
        d_weight = of_convolution
        if dtype == torch.bfloat16 and x.device.type == "cpu":
            d_weight = d_weight.where(_seen(window, *x.shape[2:]), 0)
    return d_x, d_weight


def _seen(window, *size):
    """Which taps of a window see at least one pixel of an image of ``size``: bool (kh, kw)."""
    axes = []
    for n, tokens, k, s, p in zip(size, window.grid(*size), *window, strict=True):
        tap = torch.arange(k)
        first, last = (-((tap - p) // s)).clamp_min(0), ((n - 1 + p - tap) // s).clamp_max(tokens - 1)
        axes.append(first <= last)
    return axes[0].unsqueeze(1) & axes[1]


def _centred_backward(grad, parts, weight, window, need_x, need_products):
    """Gradients of the convolution for windows less their means (derivation: docs/math.md, section 1).

    The result is ``P = sum_t grad_t (u_t - mu_t)^T``. On a flat patch LayerNorm magnifies ``grad_t`` up to 316 times,
    so subtracting ``sum_t grad_t mu_t`` from the convolution's weight gradient would cancel two large numbers and leave
    their rounding errors. Instead, the weight gradient is computed for each pixel minus the mean of its channels; the
    contribution of these means, equal for all channels, is added from their differences inside each window.

    Args:
        grad: (B, h, w, O), in the accumulation dtype; parts: :class:`Centred`, finite; weight: (O, C, kh, kw).

    Returns:
        the image's gradient through the convolution (B, C, H, W), and P (O, C*kh*kw); ``None`` unless needed.
    """
    d_x, within = _convolution_backward(grad, parts.within, weight, window, need_x, need_products)
    if not need_products:
        return d_x, None
    of_means = grad.flatten(0, 2).T @ mean_differences(parts, window)
    of_means = of_means - of_means.mean(1, keepdim=True)  # differences from the window's mean, not from its first pixel
    return d_x, (within + _unfolded(of_means, window)).flatten(1)


def _normed_backward(grad, x, centred, offset, window, norm_eps, y, rstd, need_x, need_products):
    """Gradients of the image and of the centred windows' product, ``None`` unless needed.

    LayerNorm's two row means need neither the unfolded tokens nor their gradient: the mean of ``Wg^T G`` vanishes with
    centred weights, and the mean of ``Wg^T G * xhat`` is ``G . (y - b') / K``.
    """
    parts = centred_pixels(x)
    levels = patch_statistics(parts, window, norm_eps)[0] if need_x else None
    finite(parts.within)
    scaled = grad * rstd.unsqueeze(-1)  # in the accumulation dtype: rstd reaches 316 and could overflow float16
    kernel = _unfolded(centred, window)
    d_x, products = _centred_backward(scaled, parts, kernel, window, need_x, need_products)
    if need_x:
        y = y.to(grad.dtype).unflatten(1, rstd.shape[1:])
        alpha = rstd.square() * (grad * (y - offset)).sum(-1) / (x.shape[1] * window.taps)
        sums = cover_deviations(alpha, levels, x.shape[2:], window)
        scale, shift = (part.unsqueeze(1) for part in sums)
        d_x = d_x - parts.within * scale + shift
    return d_x, products


def run_backward(grad, x, weight, bias, norm_weight, norm_bias, norm_eps, window, y, mean, rstd, needed, pixels=()):
    """Gradients of the image and every parameter (:func:`autograd.differentiable`)."""
    channels_last = x.stride(1) == 1
    x = values(x, pixels, accumulation_dtype(grad.dtype) if norm_eps is not None else grad.dtype)
    need_x, need_weight, _, need_gamma, _ = needed
    # A weight gradient sums over every token, which can overflow float16.
    unnormed = torch.float32 if x.dtype == torch.float16 else x.dtype
    grad = grad.to(unnormed if norm_eps is None else accumulation_dtype(grad.dtype))
    grad = grad.unflatten(1, window.grid(*x.shape[2:]))
    d_x = products = None
    if norm_eps is not None:
        centred, _, offset = fold_norm(weight, bias, norm_weight, norm_bias, grad.dtype)
        need_products = need_weight or need_gamma
        d_x, products = _normed_backward(grad, x, centred, offset, window, norm_eps, y, rstd, need_x, need_products)
    elif need_x or need_weight:
        kernel = _unfolded(weight.to(x.dtype), window)
        d_x, products = _convolution_backward(grad, x, kernel, window, need_x, need_weight)
        products = products.flatten(1) if need_weight else None
    gradients = parameter_gradients(products, None, grad, weight, bias, norm_weight, norm_bias, needed[1:])
    return in_layout(d_x.to(x.dtype), channels_last) if need_x else None, *gradients


forward = differentiable(run, run_backward)

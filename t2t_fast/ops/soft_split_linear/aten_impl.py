"""Soft split + LayerNorm + Linear as one convolution and box-filtered statistics.

With ``u`` a window's C*kh*kw values, LayerNorm then Linear is ``r (Wg u - mu Wg 1) + b'`` where ``Wg = W diag(gamma)``,
``b' = W beta + b``, and ``Wg u`` is a convolution of the image: nothing of the unfolded width is formed, forward or
backward. Two details decide the accuracy:

* the rows of ``Wg`` are centred, so the convolution itself removes the window's mean and its result stays small even
  where the image has a large offset; what rounding the centred weight to the operand dtype leaves of the row sums is
  taken from the *rounded* weight and subtracted with ``mu``;
* ``mu`` and ``r`` merge per-pixel means and deviations (:func:`merge_statistics`), never a difference of squares.

Saved for backward: the image, ``mu`` and ``r`` (8 bytes a token), and, where the image wants a gradient, the output.
"""

import torch
import torch.nn.functional as F

from ..library import accumulation_dtype, matmul_precision
from ..pixels import values
from ..windows import cover_sum, merge_statistics
from .gradient import differentiable, parameter_gradients


def patch_statistics(x, window, eps):
    """Mean and reciprocal standard deviation of every window of (B, C, H, W): two (B, h, w), accumulation dtype."""
    x = x.to(accumulation_dtype(x.dtype))
    channels = x.shape[1]
    mean = x.mean(1)
    m2 = (x - mean.unsqueeze(1)).square().sum(1)
    mean, m2 = merge_statistics(channels, mean, m2, window)
    return mean, torch.rsqrt(m2 / (channels * window.taps) + eps)


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
    """(B, C, H, W) -> (B, h, w, O) contiguous."""
    weight = weight.reshape(weight.shape[0], x.shape[1], *window.kernel)
    x = x.contiguous(memory_format=torch.channels_last)
    with matmul_precision(x):
        y = F.conv2d(x, weight, bias, stride=window.stride, padding=window.padding)
    return y.permute(0, 2, 3, 1).contiguous()


def run(x, weight, bias, norm_weight, norm_bias, norm_eps, window, dtype, pixels=()):
    """Forward without autograd (:func:`gradient.differentiable`)."""
    x = values(x, pixels, accumulation_dtype(dtype) if norm_eps is not None else dtype)
    if norm_eps is None:
        bias = None if bias is None else bias.to(x.dtype)
        y = _convolve(x, weight.to(x.dtype), bias, window)
        return y.flatten(1, 2).to(dtype), *(y.new_empty(0) for _ in range(2))
    mean, rstd = patch_statistics(x, window, norm_eps)
    centred, rows, offset = fold_norm(weight, bias, norm_weight, norm_bias, x.dtype)
    y = _convolve(x, centred, None, window).to(mean.dtype)
    y.addcmul_(mean.unsqueeze(-1), -rows).mul_(rstd.unsqueeze(-1)).add_(offset)
    return y.flatten(1, 2).to(dtype), mean, rstd


def _convolution_backward(grad, x, weight, window, need_x, need_weight):
    """Gradients of image and weight, each ``None`` unless needed, from ``grad`` (B, h, w, O), in its dtype."""
    dtype = grad.dtype
    with matmul_precision(grad):
        d_x, d_weight, _ = torch.ops.aten.convolution_backward(
            grad.permute(0, 3, 1, 2),
            x.to(dtype).contiguous(memory_format=torch.channels_last),
            weight.to(dtype).reshape(weight.shape[0], x.shape[1], *window.kernel),
            None,
            window.stride,
            window.padding,
            (1, 1),
            False,
            (0, 0),
            1,
            (need_x, need_weight, False),
        )
    return d_x, d_weight


def _centred_backward(grad, x, weight, window, need_x, need_products):
    """Gradients of the convolution for windows less their means (derivation: docs/math.md, section 1).

    What is wanted is ``P = sum_t grad_t (u_t - mu_t)^T``. On a flat patch LayerNorm magnifies ``grad_t`` up to 316
    times, so subtracting ``sum_t grad_t mu_t`` from the convolution's weight gradient would leave the rounding of two
    large equal numbers. Nothing large is formed instead: each pixel less its own channel mean (a convolution of a small
    image), plus what the channel means m add, the same for all channels. That part is known by its *differences* from
    tap to tap, which are weight gradients for the differences of m between neighbouring pixels (0 where the image is
    flat), and by its sum over taps, which is 0.

    Args:
        grad: (B, h, w, O), in the accumulation dtype; x: (B, C, H, W); weight: (O, C*kh*kw), rows centred.

    Returns:
        the image's gradient through the convolution (B, C, H, W), and P (O, C*kh*kw); ``None`` unless needed.
    """
    x = x.to(grad.dtype)
    means = x.mean(1, keepdim=True)
    d_x, within = _convolution_backward(grad, x - means, weight, window, need_x, need_products)
    if not need_products:
        return d_x, None
    ph, pw = window.padding
    means = F.pad(means, (pw, pw, ph, ph))
    differences = torch.cat([F.pad(means.diff(dim=2), (0, 0, 0, 1)), F.pad(means.diff(dim=3), (0, 1))], dim=1)
    unpadded = window._replace(padding=(0, 0))
    unused = weight.new_empty(weight.shape[0], 2 * window.taps)  # a weight gradient asks for the weight's shape only
    _, steps = _convolution_backward(grad, differences, unused, unpadded, False, True)  # (O, 2, kh, kw)
    down = F.pad(steps[:, 0, :-1, :1].cumsum(1), (0, 0, 1, 0))  # along the first column, (O, kh, 1)
    right = F.pad(steps[:, 1, :, :-1].cumsum(2), (1, 0))  # along every row, (O, kh, kw)
    across = down + right
    across = across - across.mean((1, 2), keepdim=True)
    return d_x, (within + across.unsqueeze(1)).flatten(1)


def _normed_backward(grad, x, centred, offset, window, y, mean, rstd, need_x, need_products):
    """Gradients of the image and of the centred windows' product, ``None`` unless needed.

    LayerNorm's two row means need neither the unfolded tokens nor their gradient: the mean of ``Wg^T G`` vanishes with
    centred weights, and the mean of ``Wg^T G * xhat`` is ``G . (y - b') / K``.
    """
    # In the accumulation dtype: rstd reaches 316 and could overflow float16.
    scaled = grad * rstd.unsqueeze(-1)
    d_image, products = _centred_backward(scaled, x, centred, window, need_x, need_products)
    if not need_x:
        return None, products
    y = y.to(grad.dtype).unflatten(1, mean.shape[1:])
    alpha = rstd.square() * (grad * (y - offset)).sum(-1) / (x.shape[1] * window.taps)
    size = x.shape[2:]
    scale, shift = (cover_sum(value, size, window).unsqueeze(1) for value in (alpha, alpha * mean))
    return d_image - x * scale + shift, products


def run_backward(grad, x, weight, bias, norm_weight, norm_bias, norm_eps, window, y, mean, rstd, needed, pixels=()):
    """Gradients of the image and every parameter (:func:`gradient.differentiable`)."""
    x = values(x, pixels, mean.dtype if norm_eps is not None else grad.dtype)
    need_x, need_weight, _, need_gamma, _ = needed
    # A weight gradient sums over every token, which can overflow float16.
    unnormed = torch.float32 if x.dtype == torch.float16 else x.dtype
    grad = grad.to(unnormed if norm_eps is None else mean.dtype).unflatten(1, window.grid(*x.shape[2:]))
    d_x = products = None
    if norm_eps is not None:
        centred, _, offset = fold_norm(weight, bias, norm_weight, norm_bias, x.dtype)
        need_products = need_weight or need_gamma
        d_x, products = _normed_backward(grad, x, centred, offset, window, y, mean, rstd, need_x, need_products)
    elif need_x or need_weight:
        d_x, products = _convolution_backward(grad, x, weight.to(x.dtype), window, need_x, need_weight)
        products = products.flatten(1) if need_weight else None
    gradients = parameter_gradients(products, grad, weight, bias, norm_weight, norm_bias, needed[1:])
    return d_x.to(x.dtype) if need_x else None, *gradients


forward = differentiable(run, run_backward)

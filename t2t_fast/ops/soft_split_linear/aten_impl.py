"""Soft split + LayerNorm + Linear as one convolution and box-filtered statistics.

With ``u`` a window's C*kh*kw values, LayerNorm then Linear is ``r Wg (u - mu) + b'`` where ``Wg = W diag(gamma)``,
``b' = W beta + b``, and a convolution of the image makes ``Wg (u - mu)``: nothing of the unfolded width is formed,
forward or backward. A common offset of the image costs no digits, since only differences enter:

* the convolution reads each pixel less the mean of its channels, and how those means differ from one pixel to the
  next, as two more channels, with weights to match (:func:`image_of_differences`, :func:`weight_of_differences`);
* ``r`` merges per-pixel means and deviations (:func:`merge_statistics`), never a difference of squares.

What is not finite reaches the outputs through ``r`` alone, that is those of the windows that hold it.

Saved for backward: the image and ``r`` (4 bytes a token), and, where the image wants a gradient, the output.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..library import accumulation_dtype, matmul_precision
from ..pixels import values
from ..windows import cover_deviations, in_layout, merge_statistics
from .gradient import differentiable, parameter_gradients


class Centred(NamedTuple):
    """An image in the accumulation dtype as each pixel's mean over channels and the rest of its values.

    The mean is ``mean + rest``, (B, H, W) each, where ``rest`` is what rounding ``mean`` has lost; ``within`` is the
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


def _steps(mean, rest, dim):
    """How ``mean + rest`` changes from one entry along ``dim`` to the next."""
    count = mean.shape[dim] - 1
    return sum(part.narrow(dim, 1, count) - part.narrow(dim, 0, count) for part in (mean, rest))


def image_of_differences(parts, window, dtype):
    """(B, C + 2, H + 2 ph, W + 2 pw), channels-last: ``within`` of :class:`Centred`, padded, and how their means differ
    from those of the pixels below and to the right. What is not finite is 0: a tap of weight 0 may meet it.
    """
    (within, mean, rest), (ph, pw) = parts, window.padding
    batch, channels, height, width = within.shape
    if torch.jit.is_tracing():  # which loses what is written into slices
        within, mean, rest = (F.pad(part, (pw, pw, ph, ph)) for part in (within, mean, rest))
        down, right = F.pad(_steps(mean, rest, 1), (0, 0, 0, 1)), F.pad(_steps(mean, rest, 2), (0, 1))
        image = torch.cat([within, down.unsqueeze(1), right.unsqueeze(1)], 1)
        return image.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).to(dtype)
    # written in place: every further pass over an image costs as much as its arithmetic
    image = within.new_zeros(batch, height + 2 * ph, width + 2 * pw, channels + 2, dtype=dtype).permute(0, 3, 1, 2)
    image[:, :channels, ph : ph + height, pw : pw + width] = within
    mean, rest = (F.pad(part, (pw, pw, ph, ph)) for part in (mean, rest))
    image[:, channels, :-1] = _steps(mean, rest, 1)
    image[:, channels + 1, :, :-1] = _steps(mean, rest, 2)
    return image.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def weight_of_differences(weight):
    """The weight (O, C, kh, kw) of a convolution, rows centred, as one (O, C + 2, kh, kw) for such an image.

    With A the sum of the weight over channels, ``sum A[dy, dx] m[dy, dx]`` over a window's means m is
    ``sum U[dy, dx] (m[dy, dx + 1] - m[dy, dx]) + sum V[dy] (m[dy + 1, 0] - m[dy, 0])``, U[dy, dx] the sum of A[dy]
    beyond dx, V[dy] that of all rows beyond dy, since all of A sums to 0.
    """
    beyond = weight.sum(1, keepdim=True).flip(3).cumsum(3).flip(3)  # from dx on
    down = beyond[..., :1].flip(2).cumsum(2).flip(2)
    return torch.cat([weight, F.pad(down[:, :, 1:], (0, weight.shape[3] - 1, 0, 1)), F.pad(beyond[..., 1:], (0, 1))], 1)


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
    """Forward without autograd (:func:`gradient.differentiable`); no means, which backward does not want."""
    x = values(x, pixels, accumulation_dtype(dtype) if norm_eps is not None else dtype)
    if norm_eps is None:
        bias = None if bias is None else bias.to(x.dtype)
        y = _convolve(x, _unfolded(weight.to(x.dtype), window), bias, window)
        return y.flatten(1, 2).to(dtype), *(y.new_empty(0) for _ in range(2))
    parts = centred_pixels(x)
    _, rstd = patch_statistics(parts, window, norm_eps)
    centred, _, offset = fold_norm(weight, bias, norm_weight, norm_bias, rstd.dtype)
    image, kernel = image_of_differences(parts, window, x.dtype), weight_of_differences(_unfolded(centred, window))
    y = _convolve(image, kernel.to(x.dtype), None, window.unpadded).to(rstd.dtype)
    y.mul_(rstd.unsqueeze(-1)).add_(offset)
    return y.flatten(1, 2).to(dtype), rstd.new_empty(0), rstd


def _convolution_backward(grad, x, weight, window, need_x, need_weight):
    """Gradients of image and weight, each ``None`` unless needed, from ``grad`` (B, h, w, O), in its dtype."""
    dtype = grad.dtype
    with matmul_precision(grad):
        d_x, d_weight, _ = torch.ops.aten.convolution_backward(
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
            (need_x, need_weight, False),
        )
    return d_x, d_weight


def _centred_products(grad, image, window):
    """``P = sum_t grad_t (u_t - mu_t)^T`` (O, C*kh*kw) of windows less their means (docs/math.md, section 1).

    On a flat patch LayerNorm magnifies ``grad_t`` up to 316 times, so subtracting ``sum_t grad_t mu_t`` from the
    convolution's weight gradient would leave the rounding of two large equal numbers. Nothing large is formed instead:
    the weight gradient for each pixel less the mean of its channels, plus what these means m add, the same for all
    channels. That part is known by its differences from tap to tap, which are weight gradients for the differences of
    m between neighbouring pixels (0 where the image is flat), and by its sum over taps, which is 0.

    Args:
        grad: (B, h, w, O), in the accumulation dtype; image: of :func:`image_of_differences`.
    """
    kh, kw = window.kernel
    shape = grad.new_empty(grad.shape[-1], image.shape[1], kh, kw)  # all that is read of the weight
    _, found = _convolution_backward(grad, image, shape, window.unpadded, False, True)
    down = F.pad(found[:, -2, :-1, :1].cumsum(1), (0, 0, 1, 0))  # along the first column, (O, kh, 1)
    right = F.pad(found[:, -1, :, :-1].cumsum(2), (1, 0))  # along every row, (O, kh, kw)
    across = down + right
    across = across - across.mean((1, 2), keepdim=True)
    return (found[:, :-2] + across.unsqueeze(1)).flatten(1)


def _normed_backward(grad, x, centred, offset, window, norm_eps, y, rstd, need_x, need_products):
    """Gradients of the image and of the centred windows' product, ``None`` unless needed.

    LayerNorm's two row means need neither the unfolded tokens nor their gradient: the mean of ``Wg^T G`` vanishes with
    centred weights, and the mean of ``Wg^T G * xhat`` is ``G . (y - b') / K``.
    """
    d_x = products = None
    parts = centred_pixels(x)
    scaled = grad * rstd.unsqueeze(-1)  # in the accumulation dtype: rstd reaches 316 and could overflow float16
    image = image_of_differences(parts, window, grad.dtype)
    if need_products:
        products = _centred_products(scaled, image, window)
    if need_x:
        d_x, _ = _convolution_backward(scaled, parts.within, _unfolded(centred, window), window, True, False)
        y = y.to(grad.dtype).unflatten(1, rstd.shape[1:])
        alpha = rstd.square() * (grad * (y - offset)).sum(-1) / (x.shape[1] * window.taps)
        (ph, pw), (height, width) = window.padding, x.shape[2:]
        levels, _ = patch_statistics(parts, window, norm_eps)
        scale, shift = (part.unsqueeze(1) for part in cover_deviations(alpha, levels, (height, width), window))
        d_x = d_x - image[:, :-2, ph : ph + height, pw : pw + width] * scale + shift
    return d_x, products


def run_backward(grad, x, weight, bias, norm_weight, norm_bias, norm_eps, window, y, mean, rstd, needed, pixels=()):
    """Gradients of the image and every parameter (:func:`gradient.differentiable`)."""
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
    gradients = parameter_gradients(products, grad, weight, bias, norm_weight, norm_bias, needed[1:])
    return in_layout(d_x.to(x.dtype), channels_last) if need_x else None, *gradients


forward = differentiable(run, run_backward)

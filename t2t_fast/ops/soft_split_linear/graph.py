"""soft_split_linear for the compilers of other runtimes: few large nodes, and constants of everything that only
depends on weights.

As in ``aten.py``, a window less its mean is multiplied by the centred weight, and the result scaled by ``r``; but all
of it is one convolution. An image of few channels is replaced by differences (:func:`differences`), which cancel its
offset before anything is rounded. Tokens of many channels have no such offset, and are convolved as they are.

Values that are not finite are not replaced: behind a T2T module's layers they reach every token of their image in any
case. There is no backward, and nothing is written in place.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .._common.library import accumulation_dtype
from .._common.pixels import values
from .._common.spec import Window
from .aten import fold_norm


class Windows(NamedTuple):
    """An image, ready for :func:`projected`.

    Attributes:
        image: what is convolved (B, C', H', W'); padding: of that convolution.
        window: the window; differences: whether ``image`` holds :func:`differences`.
        rstd: 1 / standard deviation of every window (B, 1, h, w), in the accumulation dtype.
    """

    image: torch.Tensor
    padding: tuple[int, int]
    window: Window
    differences: bool
    rstd: torch.Tensor


def windows(x, window, eps, dtype):
    """The :class:`Windows` of an image in the accumulation dtype; dtype: of the convolution."""
    rstd = _reciprocal_deviation(x, window, eps)
    # of half types always, whose rounded weights do not cancel the mean of the channels either
    if x.shape[1] < window.taps or dtype != x.dtype:
        return Windows(differences(x, window).to(dtype), (0, 0), window, True, rstd)
    return Windows(x.to(dtype), window.padding, window, False, rstd)


def projected(found, weight, bias, norm_weight, norm_bias):
    """LayerNorm and Linear of all windows: (B, L, O) in the accumulation dtype."""
    wide = found.rstd.dtype
    centred, _, offset = fold_norm(weight, bias, norm_weight, norm_bias, wide)
    kernel = centred.unflatten(1, (-1, *found.window.kernel))
    kernel = _of_differences(kernel) if found.differences else kernel
    y = F.conv2d(found.image, kernel.to(found.image.dtype), stride=found.window.stride, padding=found.padding)
    # scaled before the change to tokens: OpenVINO then reads the convolution's layout without a copy
    return tokens(y.to(wide) * found.rstd) + offset


def tokens(y):
    """(B, O, h, w) -> (B, L, O).

    Of the two ways OpenVINO copies nothing in the one for a fixed size, and least in the other for a free size.
    """
    free = any(isinstance(size, torch.SymInt) for size in y.shape)
    return y.flatten(2).transpose(1, 2) if free else y.permute(0, 2, 3, 1).flatten(1, 2)


def differences(x, window):
    """(B, C, H, W) -> (B, C + 1, H + 2 ph, W + 2 pw): differences that determine a padded image up to a constant.

    The channels less the first one, and the first one's differences to the next column and to the next row. A
    convolution by -1, 0 and 1 computes them, without rounding anything but the differences themselves.
    """
    (ph, pw), channels = window.padding, x.shape[1]
    # [y, x] of a 2 x 2 kernel
    here, right, below = (x.new_tensor(cell).view(1, 2, 2) for cell in ([1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]))
    others = torch.eye(channels, dtype=x.dtype, device=x.device)
    first = others[:1].view(1, channels, 1, 1)
    parts = [(others[1:].view(-1, channels, 1, 1) - first) * here, first * (right - here), first * (below - here)]
    return F.conv2d(F.pad(x, (pw, pw + 1, ph, ph + 1)), torch.cat(parts))


def _of_differences(kernel):
    """The kernel (O, C + 1, kh, kw) that does to :func:`differences` what ``kernel`` (O, C, kh, kw) does to the image,
    apart from a constant of the image.

    Summation by parts of the first channel, whose factors are the sums over channels: along each row up to the last
    column, then down that column, ``sum_i a_i m_i = sum_i (a_0 + ... + a_i) (m_i - m_{i+1})`` plus the last of the
    sums times the last ``m``. The last sum of all is 0 for a centred kernel, so it is left out.
    """
    sums = kernel.sum(1).cumsum(2)
    below = F.pad(sums[:, :-1, -1:].cumsum(1), (kernel.shape[3] - 1, 0, 0, 1))
    right = F.pad(sums[:, :, :-1], (0, 1))
    return torch.cat([kernel[:, 1:], -right.unsqueeze(1), -below.unsqueeze(1)], 1)


def _reciprocal_deviation(x, window, eps):
    """1 / standard deviation of every window (B, 1, h, w), from the means and deviations of its pixels' channels.

    The means enter as differences from that of the window's middle pixel, computed by a convolution by -1, 0 and 1.
    """
    channels, taps = x.shape[1], window.taps
    place = {"stride": window.stride, "padding": window.padding}
    mean = x.mean(1, keepdim=True)
    squares = (x - mean).square().sum(1, keepdim=True)
    m2 = F.conv2d(squares, squares.new_ones(1, 1, *window.kernel), **place)
    if taps > 1:
        cells = torch.eye(taps, dtype=x.dtype, device=x.device)
        apart = F.conv2d(mean, (cells - cells[taps // 2]).view(taps, 1, *window.kernel), **place)
        m2 = m2 + (apart - apart.mean(1, keepdim=True)).square().sum(1, keepdim=True) * channels
    return torch.rsqrt(m2 / (channels * taps) + eps)


def forward(x, weight, bias, norm_weight, norm_bias, norm_eps, kernel, stride, padding, dtype, pixels):
    """The operator's result, for inference."""
    window = Window(tuple(kernel), tuple(stride), tuple(padding))
    if norm_eps is None:
        x = values(x, pixels, dtype)
        weight = weight.to(x.dtype).unflatten(1, (-1, *window.kernel))
        bias = None if bias is None else bias.to(x.dtype)
        return tokens(F.conv2d(x, weight, bias, window.stride, window.padding)).to(dtype)
    wide = accumulation_dtype(dtype)
    x = values(x, pixels, wide)
    found = windows(x.to(wide), window, norm_eps, x.dtype)
    return projected(found, weight, bias, norm_weight, norm_bias).to(dtype)

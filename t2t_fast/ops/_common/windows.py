"""Window arithmetic in plain PyTorch that several operators share: split, compose, and sums over windows.

A window of kh x kw pixels is processed as kh + kw (separable sums) or kh * kw (composition) strided slices; no tensor
of the unfolded width is built. All loops run over Python integers, so export and Inductor see plain slices,
or views of windows where the size is free.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from .spec import Window


def in_layout(image: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """(B, C, H, W) of any strides, with the strides of ``torch.empty`` in one of the two memory formats.

    Gradients of an image are returned in its format. With another format, or other strides in a dimension of size 1
    (possible for a permuted view), some backward formulas of torch read the wrong elements.
    """
    if channels_last:
        image = image.permute(0, 2, 3, 1)
    # flattening removes the strides; torch.vmap does not support memory_format
    image = image.contiguous().flatten().view(image.shape)
    return image.permute(0, 3, 1, 2) if channels_last else image


def gradient_in_layout(x: torch.Tensor) -> torch.Tensor:
    """A view of ``x`` whose gradient has x's format (:func:`in_layout`), for operations that torch differentiates."""
    if not x.requires_grad or x.is_contiguous():
        return x
    channels_last = x.stride(1) == 1
    x = torch.ops.aten.alias(x)  # a hook on the caller's tensor would persist; view_as changes strides
    x.register_hook(lambda gradient: None if gradient is None else in_layout(gradient, channels_last))
    return x


def taps_along(x: torch.Tensor, dim: int, kernel: int, stride: int) -> Iterator[torch.Tensor]:
    """The ``kernel`` strided slices of ``x`` along ``dim``, one value per window each; ``x`` is padded already."""
    index = [slice(None)] * x.ndim
    for tap in range(kernel):
        # not tap + stride * (steps - 1) + 1, which export cannot prove to be within a dynamic size
        index[dim] = slice(tap, x.shape[dim] - (kernel - 1 - tap), stride)
        yield x[tuple(index)]


def values_along(x: torch.Tensor, dim: int, kernel: int, stride: int) -> Sequence[torch.Tensor]:
    """The slices of :func:`taps_along`, only to be read; of a free size views, whose length torch writes as a grid."""
    if isinstance(x.shape[dim], torch.SymInt):
        return x.unfold(dim, kernel, stride).unbind(-1)
    return list(taps_along(x, dim, kernel, stride))


def as_image(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Tokens (B, h*w, C) as an image (B, C, h, w) in channels-last memory, which is a view."""
    # not unflatten(), which would fix the batch size in an ONNX file; permute() last, which OpenVINO does not execute
    return tokens.view(tokens.shape[0], *grid, tokens.shape[2]).permute(0, 3, 1, 2)


def merge_statistics(
    count: int, mean: torch.Tensor, rest: torch.Tensor, m2: torch.Tensor, window: Window
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """Mean and sum of squared deviations of every window, from those of its cells of ``count`` values each.

    Chan, Golub and LeVeque's merge, first along rows, then along columns, with deviations from the merged mean:
    no difference of large squares is formed. A mean is represented by two summands, the value of one cell and a small
    rest, and only differences are summed, so a common offset of the image costs no precision. Zero padding counts as a
    cell with mean 0 and deviation 0, as in LayerNorm over an unfolded image.

    Args:
        count: values per cell (the image's channels).
        mean, rest, m2: (B, H, W) statistics of the cells; ``mean + rest`` is the mean.
        window: a :class:`Window`.

    Returns:
        the (mean, rest) pairs of the cells (padded), of rows of kw cells, and of windows (B, h, w); the windows' m2.
    """
    ph, pw = window.padding
    mean, rest, m2 = (F.pad(part, (pw, pw, ph, ph)) for part in (mean, rest, m2))
    levels = [(mean, rest)]
    for dim, kernel, stride in ((2, window.kernel[1], window.stride[1]), (1, window.kernel[0], window.stride[0])):
        cells, rests, squares = (values_along(part, dim, kernel, stride) for part in (mean, rest, m2))
        mean = cells[kernel // 2]
        apart = [(cell - mean) + other for cell, other in zip(cells, rests, strict=True)]
        rest = sum(apart[1:], apart[0]) / kernel
        m2 = sum(squares[1:], squares[0]) + count * sum((each - rest).square() for each in apart)
        count = count * kernel  # not in place, since a traced size is a tensor
        levels.append((mean, rest))
    return levels, m2


def cover_deviations(
    alpha: torch.Tensor, levels: Sequence[Sequence[torch.Tensor]], size: tuple[int, int], window: Window
) -> tuple[torch.Tensor, torch.Tensor]:
    """For every cell c of an image of ``size``, ``sum_t alpha_t`` and ``sum_t alpha_t (mean_t - mean_c)``.

    The sums are over the windows t that cover c. They are computed from differences of means, first along columns,
    then along rows. Cells that no window covers get 0, whatever their value.

    Args:
        alpha: (B, h, w).
        levels: result of :func:`merge_statistics`.

    Returns:
        two (B, H, W).
    """
    # values that are not finite enter through alpha, and only reach the cells of their windows
    levels = [[part.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) for part in level] for level in levels]
    scale, shift = alpha, torch.zeros_like(alpha)
    for dim, (fine, coarse) in ((1, levels[1:]), (2, levels[:2])):
        kernel, stride = window.kernel[dim - 1], window.stride[dim - 1]
        sums = [torch.zeros_like(fine[0]) for _ in range(2)]
        taps = [taps_along(part, dim, kernel, stride) for part in (*sums, *fine)]
        for to_scale, to_shift, mean, rest in zip(*taps, strict=True):
            to_shift += scale * ((coarse[0] - mean) + (coarse[1] - rest)) + shift
            to_scale += scale
        scale, shift = sums
    (ph, pw), (height, width) = window.padding, size
    scale, shift = (part[:, ph : ph + height, pw : pw + width] for part in (scale, shift))
    return scale, shift


def overlap(size: tuple[int, int], window: Window, like: torch.Tensor) -> torch.Tensor:
    """How many windows cover each pixel of an image of ``size``: (H, W) in ``like``'s dtype, 1 for uncovered pixels."""
    counts = []
    for n, k, s, p in zip(size, *window, strict=True):
        pixel = torch.arange(n, device=like.device) + p
        first = torch.div(pixel - k + s, s, rounding_mode="floor").clamp_min(0)
        last = torch.div(pixel, s, rounding_mode="floor").clamp_max((n + 2 * p - k) // s)
        counts.append((last - first + 1).clamp_min(0).to(like.dtype))
    return (counts[0][:, None] * counts[1]).clamp_min(1)


def split(x: torch.Tensor, window: Window) -> torch.Tensor:
    """(B, C, H, W) of any strides -> contiguous (B, L, C*kh*kw)."""
    (kh, kw), (sh, sw), (ph, pw) = window
    view = F.pad(x, (pw, pw, ph, ph)).unfold(2, kh, sh).unfold(3, kw, sw)  # (B, C, h, w, kh, kw), no copy yet
    batch, channels, h, w = view.shape[:4]
    tokens = view.permute(0, 2, 3, 1, 4, 5).clone(memory_format=torch.contiguous_format)
    return tokens.view(batch, h * w, channels * kh * kw)


def compose(tokens: torch.Tensor, size: tuple[int, int], window: Window) -> torch.Tensor:
    """Adjoint of the soft split: (B, L, C*kh*kw) tokens -> (B, C, H, W) image, in one of the two memory formats.

    Small windows are added tap by tap in channels-last memory, in a fixed order: twice as fast as ``F.fold`` on a CPU
    for 3x3 taps of 64 channels, but not for 7x7, where a graph of 49 additions would only cost compile time.
    """
    (kh, kw), (sh, sw), (ph, pw) = window
    height, width = size
    if window.taps > 9:
        return F.fold(tokens.transpose(1, 2), size, window.kernel, stride=window.stride, padding=window.padding)
    h, w = window.grid(height, width)
    batch, _, columns = tokens.shape
    cells = tokens.view(batch, h, w, columns // window.taps, kh, kw)
    image = tokens.new_zeros(batch, height + 2 * ph, width + 2 * pw, columns // window.taps)
    for dy, band in enumerate(taps_along(image, 1, kh, sh)):
        for dx, pixels in enumerate(taps_along(band, 2, kw, sw)):
            pixels += cells[..., dy, dx]
    return in_layout(image[:, ph : ph + height, pw : pw + width].permute(0, 3, 1, 2), True)

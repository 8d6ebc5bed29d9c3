"""Window arithmetic in plain PyTorch that several operators share: split, compose, and sums over windows.

A window of kh x kw pixels is walked as kh + kw (separable sums) or kh * kw (composition) strided slices; nothing of
the unfolded width is built. All loops run over Python integers, so export and Inductor see plain slices.
"""

import torch
import torch.nn.functional as F


def taps_along(x, dim, kernel, stride):
    """The ``kernel`` strided slices of ``x`` along ``dim``, one value per window each; ``x`` is padded already."""
    index = [slice(None)] * x.ndim
    for tap in range(kernel):
        # not tap + stride * (steps - 1) + 1, which export cannot prove to lie within a free size
        index[dim] = slice(tap, x.shape[dim] - (kernel - 1 - tap), stride)
        yield x[tuple(index)]


def as_image(tokens, grid):
    """Tokens (B, h*w, C) as the image (B, C, h, w) in channels-last memory that they are: a view."""
    # not unflatten(), which an ONNX file would give the batch size of the trace
    return tokens.transpose(1, 2).view(tokens.shape[0], tokens.shape[2], *grid)


def merge_statistics(count, mean, m2, window):
    """Mean and sum of squared deviations of every window, from those of its cells of ``count`` values each.

    Chan, Golub and LeVeque's merge, first along rows, then along columns, with the deviations taken from the merged
    mean: no difference of large squares is ever formed, so a common offset of the image costs no digits. Zero padding
    is a cell of mean 0 and deviation 0, and counts (as LayerNorm over an unfolded image counts it).

    Args:
        count: values per cell (the image's channels).
        mean, m2: (B, H, W) statistics of the cells.
        window: a :class:`Window`.

    Returns:
        mean and m2 of the windows, (B, h, w) each.
    """
    ph, pw = window.padding
    mean, m2 = F.pad(mean, (pw, pw, ph, ph)), F.pad(m2, (pw, pw, ph, ph))
    for dim, kernel, stride in ((2, window.kernel[1], window.stride[1]), (1, window.kernel[0], window.stride[0])):
        if kernel == 1 and stride == 1:
            continue
        cells = list(taps_along(mean, dim, kernel, stride))
        centre = sum(cells[1:], cells[0]) / kernel
        spread = sum((cell - centre).square() for cell in cells)
        m2 = sum(taps_along(m2, dim, kernel, stride)) + count * spread
        mean, count = centre, count * kernel
    return mean, m2


def cover_sum(x, size, window):
    """For every pixel of an image of ``size``, the sum of (B, h, w) values of the windows that cover it: (B, H, W)."""
    (kh, kw), (sh, sw), (ph, pw) = window
    for dim, kernel, stride, padding, length in ((1, kh, sh, ph, size[0]), (2, kw, sw, pw, size[1])):
        shape = list(x.shape)
        shape[dim] = max(length + 2 * padding, kernel)
        out = x.new_zeros(shape)
        for tap in taps_along(out, dim, kernel, stride):
            tap += x
        x = out.narrow(dim, padding, length)
    return x


def overlap(size, window, like):
    """How many windows cover each pixel of an image of ``size``: (H, W) in ``like``'s dtype, 1 where none does."""
    counts = []
    for n, k, s, p in zip(size, *window, strict=True):
        pixel = torch.arange(n, device=like.device) + p
        first = torch.div(pixel - k + s, s, rounding_mode="floor").clamp_min(0)
        last = torch.div(pixel, s, rounding_mode="floor").clamp_max((n + 2 * p - k) // s)
        counts.append((last - first + 1).clamp_min(0).to(like.dtype))
    return (counts[0][:, None] * counts[1]).clamp_min(1)


def split(x, window):
    """(B, C, H, W) of any strides -> contiguous (B, L, C*kh*kw)."""
    (kh, kw), (sh, sw), (ph, pw) = window
    view = F.pad(x, (pw, pw, ph, ph)).unfold(2, kh, sh).unfold(3, kw, sw)  # (B, C, h, w, kh, kw), no copy yet
    batch, channels, h, w = view.shape[:4]
    tokens = view.permute(0, 2, 3, 1, 4, 5).clone(memory_format=torch.contiguous_format)
    return tokens.view(batch, h * w, channels * kh * kw)


def compose(tokens, size, window):
    """Adjoint of the soft split: (B, L, C*kh*kw) tokens -> (B, C, H, W) image.

    Small windows tap by tap in channels-last memory, each tap one strided addition in a fixed order: twice as fast as
    ``F.fold`` on a CPU for 3x3 taps of 64 channels, no faster for 7x7, where a graph of 49 additions would only
    cost compile time.
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
    return image[:, ph : ph + height, pw : pw + width].permute(0, 3, 1, 2)

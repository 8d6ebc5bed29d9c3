"""Triton kernels of the image's gradient, gathered: each pixel sums over the windows that cover it.

Letters as in kernels.py.
"""

import triton
import triton.language as tl

from ..tiles import dot, narrowed, rounded

VARYING = ("height", "image_width", "grid_height", "grid_width", "length", "batch", "tokens")
"""Arguments whose values make no other kernel, so that another image size or batch compiles nothing."""


@triton.jit(do_not_specialize=VARYING)
def token_scalars_kernel(
    grad,
    y,
    offset,
    mean,
    rstd,
    alpha,
    kappa,
    tokens,
    outputs,
    VALUES: tl.constexpr,
    TOKENS: tl.constexpr,
    NARROW: tl.constexpr,
    EVEN: tl.constexpr,
):
    """``alpha_t = r^2 G_t . (y_t - b') / K`` and ``kappa_t = alpha_t mu_t``: LayerNorm's share of the image's gradient.

    Grid (token tiles). VALUES: K. With centred weights the other scalar of docs/math.md, c1, is 0.
    """
    first = tl.program_id(0).to(tl.int64) * TOKENS
    row = tl.arange(0, TOKENS)
    there = row < tokens - first
    along = tl.zeros([TOKENS], tl.float32)
    for begin in range(0, outputs, NARROW):
        column = begin + tl.arange(0, NARROW)
        inside = there[:, None] if EVEN else there[:, None] & (column < outputs)[None, :]
        place = first * outputs + row[:, None] * outputs + column[None, :]
        values = tl.load(y + place, mask=inside, other=0.0).to(tl.float32) - tl.load(offset + column)[None, :]
        along += tl.sum(tl.load(grad + place, mask=inside, other=0.0).to(tl.float32) * values, 1)
    scale = tl.load(rstd + first + row, mask=there, other=0.0)
    value = scale * scale * along / VALUES
    tl.store(alpha + first + row, value, mask=there)
    tl.store(kappa + first + row, value * tl.load(mean + first + row, mask=there, other=0.0), mask=there)


@triton.jit
def _pixels(tile, batch, height, image_width, STRIDE: tl.constexpr, PIXELS: tl.constexpr):
    """The pixels of a tile of a phase: image, row and column of each, and whether there is such a pixel.

    A phase holds the pixels of one remainder by the strides; phases have different numbers of pixels.
    """
    down, right = tl.program_id(1) // STRIDE[1], tl.program_id(1) % STRIDE[1]
    phase_height = (height - down + STRIDE[0] - 1) // STRIDE[0]
    phase_width = (image_width - right + STRIDE[1] - 1) // STRIDE[1]
    area = phase_height * phase_width
    first = tile.to(tl.int64) * PIXELS
    # a phase without pixels (an image smaller than the stride) has none to number
    earlier = first // tl.maximum(area, 1)
    index = (first - earlier * area).to(tl.int32) + tl.arange(0, PIXELS)
    there = tl.arange(0, PIXELS) < batch.to(tl.int64) * area - first
    area, phase_width = tl.maximum(area, 1), tl.maximum(phase_width, 1)
    row = index % area // phase_width * STRIDE[0] + down
    column = index % area % phase_width * STRIDE[1] + right
    return earlier + index // area, row, column, there


@triton.jit(do_not_specialize=VARYING)
def split_linear_image_kernel(
    grad,
    weight,
    rstd,
    alpha,
    kappa,
    x,
    x_strides,
    d_x,
    height,
    image_width,
    grid_height,
    grid_width,
    length,
    batch,
    outputs,
    CHANNELS: tl.constexpr,
    WINDOW: tl.constexpr,
    NORM: tl.constexpr,
    OPERAND: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
    NARROW: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``d_x = sum_t W^T (r G_t) - x sum_t alpha_t + sum_t kappa_t`` over the windows t that cover a pixel, gathered.

    Grid (pixel tiles, phases, blocks of channels): all pixels of a tile are covered through the same taps. ``weight``
    is packed (layout.py): (taps, whole blocks of outputs, WIDTH channels). d_x is channels-last.
    """
    KERNEL: tl.constexpr = WINDOW[0]
    STRIDE: tl.constexpr = WINDOW[1]
    PADDING: tl.constexpr = WINDOW[2]
    image, row, column, there = _pixels(tl.program_id(0), batch, height, image_width, STRIDE, PIXELS)
    channel = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([PIXELS, BLOCK], tl.float32)
    scale = tl.zeros([PIXELS], tl.float32)
    shift = tl.zeros([PIXELS], tl.float32)
    down = (tl.program_id(1) // STRIDE[1] + PADDING[0]) % STRIDE[0]
    right = (tl.program_id(1) % STRIDE[1] + PADDING[1]) % STRIDE[1]
    # of the window's taps, every stride-th meets this phase; none where windows leave gaps
    taps_down = tl.maximum(KERNEL[0] - down + STRIDE[0] - 1, 0) // STRIDE[0]
    taps_across = tl.maximum(KERNEL[1] - right + STRIDE[1] - 1, 0) // STRIDE[1]
    blocks = tl.cdiv(outputs, NARROW)
    for step in range(0, taps_down * taps_across * blocks):
        tap = tl.zeros([], tl.int32) + step // blocks
        begin = step % blocks * NARROW
        tap_row, tap_column = down + tap // taps_across * STRIDE[0], right + tap % taps_across * STRIDE[1]
        above, before = row + PADDING[0] - tap_row, column + PADDING[1] - tap_column
        token_row, token_column = above // STRIDE[0], before // STRIDE[1]
        covers = there & (above >= 0) & (before >= 0) & (token_row < grid_height) & (token_column < grid_width)
        token = image * length + token_row * grid_width + token_column
        output = begin + tl.arange(0, NARROW)
        inside = covers[:, None] if EVEN else covers[:, None] & (output < outputs)[None, :]
        upstream = tl.load(grad + token[:, None] * outputs + output[None, :], mask=inside, other=0.0).to(tl.float32)
        if NORM:
            upstream *= tl.load(rstd + token, mask=covers, other=0.0)[:, None]
            if begin == 0:
                scale += tl.load(alpha + token, mask=covers, other=0.0)
                shift += tl.load(kappa + token, mask=covers, other=0.0)
        rows = ((tap_row * KERNEL[1] + tap_column) * blocks * NARROW + output)[:, None] * WIDTH + channel[None, :]
        second = rounded(tl.load(weight + rows).to(tl.float32), OPERAND, PRECISION)
        sums = dot(rounded(upstream, OPERAND, PRECISION), second, sums, PRECISION)
    inside = there[:, None] & (channel < CHANNELS)[None, :]
    if NORM:
        x_batch, x_channel, x_row, x_column = x_strides
        place = image * x_batch + row.to(tl.int64) * x_row + column.to(tl.int64) * x_column
        pixels = tl.load(x + place[:, None] + channel[None, :].to(tl.int64) * x_channel, mask=inside, other=0.0)
        sums += shift[:, None] - pixels.to(tl.float32) * scale[:, None]
    place = (image * height + row) * image_width + column
    target = d_x + place[:, None] * CHANNELS + channel[None, :]
    tl.store(target, narrowed(sums, d_x.dtype.element_ty), mask=inside)

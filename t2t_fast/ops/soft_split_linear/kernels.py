"""Triton kernels of soft split, LayerNorm and Linear: implicit matrix products over the window's taps.

Letters as in docs/math.md, section 1: a token's window has K = C kh kw values u, O outputs. Columns are ordered by tap,
then channel, so that a tap of channels-last tokens is a run of memory. Tokens of all images are numbered in one row and
cut into tiles of TOKENS. Matrices of O columns are held in PARTS of NARROW.

With GATHER a block of columns may span taps (images of few channels), without it lies within one.
"""

import triton
import triton.language as tl

from ..tiles import dot, narrowed, rounded

VARYING = ("height", "image_width", "grid_height", "grid_width", "length", "tokens", "batch", "tiles_per_split")
"""Arguments whose values make no other kernel, so that another image size or batch compiles nothing."""


@triton.jit
def _places(tile, total, length, grid_width, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W, COUNT: tl.constexpr):
    """Of the tokens of a tile: the first one's number and image; for each the image after that one, its window's first
    row and column, and whether there is such a token. Only the first number needs 64 bits.
    """
    first = tl.full([], COUNT, tl.int64) * tile
    image = first // length
    index = (first - image * length).to(tl.int32) + tl.arange(0, COUNT)
    there = tl.arange(0, COUNT) < total - first
    inside = index % length
    top = inside // grid_width * STRIDE_H - PADDING_H
    left = inside % grid_width * STRIDE_W - PADDING_W
    return first, image, index // length, top, left, there


@triton.jit
def _columns(
    begin,
    top,
    left,
    there,
    height,
    image_width,
    x_channel,
    x_row,
    x_column,
    CHANNELS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    BLOCK: tl.constexpr,
    GATHER: tl.constexpr,
):
    """Where columns ``begin`` onwards of the windows lie from their first pixel, (1, BLOCK); which are in the image."""
    column = begin + tl.arange(0, BLOCK)
    if GATHER:
        tap, channel = column // CHANNELS, column % CHANNELS
        down, right = tap // KERNEL_W, tap % KERNEL_W
        offsets = down * x_row + right * x_column + channel * x_channel
        y, x = top[:, None] + down[None, :], left[:, None] + right[None, :]
        mask = there[:, None] & (column < CHANNELS * KERNEL_H * KERNEL_W)[None, :]
        mask &= (y >= 0) & (y < height) & (x >= 0) & (x < image_width)
    else:
        tap = begin // CHANNELS
        down, right = tap // KERNEL_W, tap % KERNEL_W
        channel = tl.max_contiguous(tl.multiple_of(begin % CHANNELS + tl.arange(0, BLOCK), BLOCK), BLOCK)
        offsets = down * x_row + right * x_column + channel * x_channel
        y, x = top + down, left + right
        mask = (there & (y >= 0) & (y < height) & (x >= 0) & (x < image_width))[:, None]
    return offsets[None, :], mask


@triton.jit(do_not_specialize=VARYING)
def split_linear_kernel(
    x,
    x_batch,
    x_channel,
    x_row,
    x_column,
    weight,
    row_sums,
    offset,
    eps,
    out,
    mean,
    rstd,
    height,
    image_width,
    grid_width,
    length,
    tokens,
    outputs,
    CHANNELS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    NORM: tl.constexpr,
    SHIFT: tl.constexpr,
    OPERAND: tl.constexpr,
    GATHER: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    NARROW: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``y = r (Wg u - mu Wg 1) + b'``, and the windows' ``mu`` and ``r``; without NORM ``y = W u + b``.

    Grid (token tiles, groups of PARTS x NARROW outputs). ``weight`` is packed: (columns up to whole blocks, outputs up
    to whole groups), ``row_sums`` and ``offset`` likewise. The statistics gather in the same loop as the product, from
    the windows less the value s at their centre, block by block by Chan's rule: no offset of the image reaches them.
    SHIFT: the product takes u - s too, so that rounding it to OPERAND costs no more than rounding what LayerNorm makes
    of it.
    """
    COLUMNS: tl.constexpr = CHANNELS * KERNEL_H * KERNEL_W
    first, image, further, top, left, there = _places(
        tl.program_id(0), tokens, length, grid_width, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W, TOKENS
    )
    x += image * x_batch
    begin_row = further.to(tl.int64) * x_batch + top.to(tl.int64) * x_row + left.to(tl.int64) * x_column
    if NORM:
        y, z = top + KERNEL_H // 2, left + KERNEL_W // 2
        centred = there & (y >= 0) & (y < height) & (z >= 0) & (z < image_width)
        centre = begin_row + (KERNEL_H // 2) * x_row + (KERNEL_W // 2) * x_column
        shift = tl.load(x + centre, mask=centred, other=0.0).to(tl.float32)
        average = tl.zeros([TOKENS], tl.float32)
        squares = tl.zeros([TOKENS], tl.float32)
    group = tl.program_id(1) * PARTS * NARROW
    stride = tl.num_programs(1) * PARTS * NARROW
    output = tl.arange(0, NARROW)
    sums = ()
    for _ in tl.static_range(PARTS):
        sums = sums + (tl.zeros([TOKENS, NARROW], tl.float32),)
    for begin in range(0, COLUMNS, BLOCK):
        offsets, mask = _columns(
            begin,
            top,
            left,
            there,
            height,
            image_width,
            x_channel,
            x_row,
            x_column,
            CHANNELS,
            KERNEL_H,
            KERNEL_W,
            BLOCK,
            GATHER,
        )
        tile = tl.load(x + begin_row[:, None] + offsets, mask=mask, other=0.0)
        if NORM:
            wide = tile.to(tl.float32) - shift[:, None]
            count = BLOCK
            if GATHER:
                known = (begin + tl.arange(0, BLOCK) < COLUMNS)[None, :]
                wide = tl.where(known, wide, 0.0)
                count = tl.minimum(BLOCK, COLUMNS - begin)
            here = tl.sum(wide, 1) / count
            apart = wide - here[:, None]
            if GATHER:
                apart = tl.where(known, apart, 0.0)
            step = here - average
            part = count / (begin + count)
            squares += tl.sum(apart * apart, 1) + step * step * (begin * part)
            average += step * part
            operand = rounded(wide if SHIFT else tile, OPERAND, PRECISION)
        else:
            operand = rounded(tile, OPERAND, PRECISION)
        rows = weight + (begin + tl.arange(0, BLOCK))[:, None] * stride + group + output[None, :]
        products = ()
        for index in tl.static_range(PARTS):
            products = products + (dot(operand, tl.load(rows + index * NARROW), sums[index], PRECISION),)
        sums = products
    if NORM:
        scale = 1.0 / tl.sqrt(squares / COLUMNS + eps)
        if tl.program_id(1) == 0:
            place = first + tl.arange(0, TOKENS)
            tl.store(mean + place, average + shift, mask=there)
            tl.store(rstd + place, scale, mask=there)
        if not SHIFT:
            average += shift
    out += first * outputs
    for index in tl.static_range(PARTS):
        column = group + index * NARROW + output
        y = sums[index]
        if NORM:
            y -= average[:, None] * tl.load(row_sums + column)[None, :]
            y *= scale[:, None]
        y += tl.load(offset + column)[None, :]
        inside = there[:, None] if EVEN else there[:, None] & (column < outputs)[None, :]
        place = tl.arange(0, TOKENS)[:, None] * outputs + column[None, :]
        tl.store(out + place, narrowed(y, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def split_linear_weight_kernel(
    x,
    x_batch,
    x_channel,
    x_row,
    x_column,
    grad,
    mean,
    rstd,
    d_weight,
    height,
    image_width,
    grid_width,
    length,
    tokens,
    outputs,
    tiles_per_split,
    CHANNELS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    NORM: tl.constexpr,
    OPERAND: tl.constexpr,
    GATHER: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    NARROW: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """This split's share of ``P = sum_t xhat_t G_t^T``, packed as the weight is.

    Grid (blocks of columns, groups of outputs, splits); xhat is u without NORM. The windows are read and normalised
    again: a normalised value is at most sqrt(K), so that neither it nor G leaves the range of float16.
    """
    begin = tl.program_id(0) * BLOCK
    group = tl.program_id(1) * PARTS * NARROW
    stride = tl.num_programs(1) * PARTS * NARROW
    split = tl.program_id(2)
    output = tl.arange(0, NARROW)
    sums = ()
    for _ in tl.static_range(PARTS):
        sums = sums + (tl.zeros([BLOCK, NARROW], tl.float32),)
    earliest = split * tiles_per_split
    for index in range(earliest, tl.minimum(earliest + tiles_per_split, tl.cdiv(tokens, TOKENS))):
        first, image, further, top, left, there = _places(
            index, tokens, length, grid_width, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W, TOKENS
        )
        offsets, mask = _columns(
            begin,
            top,
            left,
            there,
            height,
            image_width,
            x_channel,
            x_row,
            x_column,
            CHANNELS,
            KERNEL_H,
            KERNEL_W,
            BLOCK,
            GATHER,
        )
        begin_row = further.to(tl.int64) * x_batch + top.to(tl.int64) * x_row + left.to(tl.int64) * x_column
        tile = tl.load(x + image * x_batch + begin_row[:, None] + offsets, mask=mask, other=0.0)
        row = tl.arange(0, TOKENS)
        if NORM:
            centre = tl.load(mean + first + row, mask=there, other=0.0)
            scale = tl.load(rstd + first + row, mask=there, other=0.0)
            normalised = (tile.to(tl.float32) - centre[:, None]) * scale[:, None]
            operand = rounded(normalised, OPERAND, PRECISION)
        else:
            operand = rounded(tile.to(tl.float32), OPERAND, PRECISION)
        turned = tl.trans(operand)
        products = ()
        for part in tl.static_range(PARTS):
            column = group + part * NARROW + output
            inside = there[:, None] if EVEN else there[:, None] & (column < outputs)[None, :]
            place = row[:, None] * outputs + column[None, :]
            upstream = tl.load(grad + first * outputs + place, mask=inside, other=0.0)
            products = products + (
                dot(turned, rounded(upstream.to(tl.float32), OPERAND, PRECISION), sums[part], PRECISION),
            )
        sums = products
    for part in tl.static_range(PARTS):
        column = group + part * NARROW + output
        rows = (split * tl.num_programs(0) * BLOCK + begin + tl.arange(0, BLOCK)).to(tl.int64)
        tl.store(d_weight + rows[:, None] * stride + column[None, :], sums[part])


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
    columns,
    TOKENS: tl.constexpr,
    NARROW: tl.constexpr,
    EVEN: tl.constexpr,
):
    """``alpha_t = r^2 G_t . (y_t - b') / K`` and ``kappa_t = alpha_t mu_t``: LayerNorm's share of the image's gradient.

    Grid (token tiles). With centred weights the other scalar of docs/math.md, c1, is 0.
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
    value = scale * scale * along / columns
    tl.store(alpha + first + row, value, mask=there)
    tl.store(kappa + first + row, value * tl.load(mean + first + row, mask=there, other=0.0), mask=there)


@triton.jit(do_not_specialize=VARYING)
def split_linear_image_kernel(
    grad,
    weight,
    rstd,
    alpha,
    kappa,
    x,
    x_batch,
    x_channel,
    x_row,
    x_column,
    d_x,
    d_x_batch,
    d_x_channel,
    d_x_row,
    d_x_column,
    height,
    image_width,
    grid_height,
    grid_width,
    length,
    batch,
    outputs,
    CHANNELS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    NORM: tl.constexpr,
    OPERAND: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
    NARROW: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``d_x = sum_t W^T (r G_t) - x sum_t alpha_t + sum_t kappa_t`` over the windows t that cover a pixel, gathered.

    Grid (pixel tiles, phases, blocks of channels). A phase holds the pixels of one remainder by the strides, so that
    all pixels of a tile are covered through the same taps. ``weight`` is packed: (taps, whole groups of outputs,
    channels up to whole blocks).
    """
    phase_y, phase_x = tl.program_id(1) // STRIDE_W, tl.program_id(1) % STRIDE_W
    high = (height - phase_y + STRIDE_H - 1) // STRIDE_H
    wide = (image_width - phase_x + STRIDE_W - 1) // STRIDE_W
    first = tl.program_id(0).to(tl.int64) * PIXELS
    many = high * wide
    if first < batch.to(tl.int64) * many:
        image = first // many
        number = (first - image * many).to(tl.int32) + tl.arange(0, PIXELS)
        there = tl.arange(0, PIXELS) < batch.to(tl.int64) * many - first
        further = (number // many).to(tl.int64)
        inner = number % many
        pixel_y = inner // wide * STRIDE_H + phase_y
        pixel_x = inner % wide * STRIDE_W + phase_x
        channel = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        sums = tl.zeros([PIXELS, BLOCK], tl.float32)
        scale = tl.zeros([PIXELS], tl.float32)
        shift = tl.zeros([PIXELS], tl.float32)
        down, right = (phase_y + PADDING_H) % STRIDE_H, (phase_x + PADDING_W) % STRIDE_W
        across = tl.cdiv(KERNEL_W, STRIDE_W)
        padded: tl.constexpr = tl.cdiv(CHANNELS, BLOCK) * BLOCK
        blocks = tl.cdiv(outputs, NARROW)
        for step in range(0, tl.cdiv(KERNEL_H, STRIDE_H) * across * blocks):
            tap = tl.zeros([], tl.int32) + step // blocks
            begin = step % blocks * NARROW
            tap_y, tap_x = down + tap // across * STRIDE_H, right + tap % across * STRIDE_W
            # a tap beyond the window is as good as one above the image
            above = tl.where(tap_y < KERNEL_H, pixel_y + PADDING_H - tap_y, -1)
            before = tl.where(tap_x < KERNEL_W, pixel_x + PADDING_W - tap_x, -1)
            token_y, token_x = above // STRIDE_H, before // STRIDE_W
            covers = there & (above >= 0) & (before >= 0) & (token_y < grid_height) & (token_x < grid_width)
            token = (image + further) * length + token_y * grid_width + token_x
            column = begin + tl.arange(0, NARROW)
            inside = covers[:, None] if EVEN else covers[:, None] & (column < outputs)[None, :]
            upstream = tl.load(grad + token[:, None] * outputs + column[None, :], mask=inside, other=0.0)
            if NORM:
                upstream = upstream.to(tl.float32) * tl.load(rstd + token, mask=covers, other=0.0)[:, None]
                if begin == 0:
                    scale += tl.load(alpha + token, mask=covers, other=0.0)
                    shift += tl.load(kappa + token, mask=covers, other=0.0)
            usable = tl.minimum(tap_y * KERNEL_W + tap_x, KERNEL_H * KERNEL_W - 1)
            rows = (usable * blocks * NARROW + column)[:, None] * padded + channel[None, :]
            operand = rounded(upstream.to(tl.float32), OPERAND, PRECISION)
            sums = dot(operand, rounded(tl.load(weight + rows).to(tl.float32), OPERAND, PRECISION), sums, PRECISION)
        inside = there[:, None] & (channel < CHANNELS)[None, :]
        if NORM:
            place = (image + further) * x_batch + pixel_y.to(tl.int64) * x_row + pixel_x.to(tl.int64) * x_column
            pixels = tl.load(x + place[:, None] + channel[None, :] * x_channel, mask=inside, other=0.0)
            sums += shift[:, None] - pixels.to(tl.float32) * scale[:, None]
        place = (image + further) * d_x_batch + pixel_y.to(tl.int64) * d_x_row + pixel_x.to(tl.int64) * d_x_column
        target = d_x + place[:, None] + channel[None, :] * d_x_channel
        tl.store(target, narrowed(sums, d_x.dtype.element_ty), mask=inside)

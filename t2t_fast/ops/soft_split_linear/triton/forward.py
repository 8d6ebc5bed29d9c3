"""Triton kernels of soft split, LayerNorm and Linear: implicit matrix products over the window's taps.

Notation as in docs/math.md, section 1: a token's window has K = C kh kw values u, O outputs. Columns are ordered by
tap, then channel, so that a tap of channels-last tokens is contiguous. Tokens of all images are numbered consecutively
and divided into tiles of TOKENS. Matrices of O columns are held in PARTS of NARROW columns.

layout.py's ``Layout`` describes how windows lie in memory, one of three cases: tokens, where a block of columns is
within one tap; cells of an image, written by :func:`cells_kernel`; or gathered single values, where a block may span
taps. call.py's ``Image`` is the image or its cells.
"""

import torch
import triton
import triton.language as tl

from ..._common import replay
from ..._common.tiles import dot, narrowed, rounded, widened
from .call import Call, Folded
from .layout import NARROW
from .statistics import final_statistics, no_statistics, observed

VARYING = (
    "height",
    "image_width",
    "grid_width",
    "length",
    "tokens",
    "tiles_per_split",
    "cell_rows",
    "cell_columns",
    "cells",
)
"""Arguments excluded from specialisation: a new image size or batch size needs no new compilation."""


@triton.jit(do_not_specialize=VARYING)
def cells_kernel(
    x,
    x_strides,
    out,
    height,
    image_width,
    cell_rows,
    cell_columns,
    cells,
    CELL: tl.constexpr,
    PADDING: tl.constexpr,
    BYTES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Divide an image into cells of a window's stride, (cells of all images, channels x height x width of a cell).

    Grid (tiles of TILE cells); a program writes BLOCK values of each of its cells at a time. CELL: layout.py's
    ``Layout.cell``; height, image_width: of the part that windows cover. Pixels in the padding, or that no window
    covers, are 0, or -1 with BYTES.
    """
    x_batch, x_channel, x_row, x_column = x_strides
    HIGH: tl.constexpr = CELL[0]
    WIDE: tl.constexpr = CELL[1]
    SIZE: tl.constexpr = HIGH * WIDE * CELL[2]
    number = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    image, index = number // (cell_rows * cell_columns), number % (cell_rows * cell_columns)
    top = (index // cell_columns).to(tl.int32) * HIGH - PADDING[0]
    left = (index % cell_columns).to(tl.int32) * WIDE - PADDING[1]
    start = image * x_batch + top.to(tl.int64) * x_row + left.to(tl.int64) * x_column
    # as unsigned, a negative index is out of range as well
    heights, widths = height.to(tl.uint32), image_width.to(tl.uint32)
    there = (number < cells)[:, None]
    for begin in tl.static_range(0, SIZE, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        channel, down, right = column // (HIGH * WIDE), column // WIDE % HIGH, column % WIDE
        offset = channel.to(tl.int64) * x_channel + down.to(tl.int64) * x_row + right.to(tl.int64) * x_column
        pixel_row, pixel_column = top[:, None] + down[None, :], left[:, None] + right[None, :]
        mask = there & (pixel_row.to(tl.uint32) < heights) & (pixel_column.to(tl.uint32) < widths)
        if CELL[3] < HIGH or CELL[4] < WIDE:  # gaps between windows
            mask &= ((down < CELL[3]) & (right < CELL[4]))[None, :]
        values = tl.load(x + start[:, None] + offset[None, :], mask=mask, other=0)
        if BYTES:
            values = tl.where(mask, values.to(tl.float32), -1.0)
        tl.store(out + number[:, None] * SIZE + column[None, :], narrowed(values, out.dtype.element_ty), mask=there)


@triton.jit
def places_of(number, index, grid_width, image, LAYOUT: tl.constexpr):
    """For tokens ``index`` of image ``number`` (or images): the offset of each window's first pixel, and that pixel's
    row and column. Image numbers and offsets are 64-bit, the others 32-bit.
    """
    top = index // grid_width * LAYOUT.window.stride[0] - LAYOUT.window.padding[0]
    left = index % grid_width * LAYOUT.window.stride[1] - LAYOUT.window.padding[1]
    start = number * image.batch + top.to(tl.int64) * image.row + left.to(tl.int64) * image.column
    return start, top, left


@triton.jit
def tile_places(tile, total, length, grid_width, image, LAYOUT: tl.constexpr, COUNT: tl.constexpr):
    """For the tokens of a tile, numbered through all images: the first one's number, :func:`places_of` each, and
    whether the token exists.
    """
    first = tl.full([], COUNT, tl.int64) * tile
    number = first // length
    index = (first - number * length).to(tl.int32) + tl.arange(0, COUNT)
    start, top, left = places_of(number + index // length, index % length, grid_width, image, LAYOUT)
    return first, (start, top, left, tl.arange(0, COUNT) < total - first)


@triton.jit
def window_tile(image, extent, places, begin, LAYOUT: tl.constexpr, BLOCK: tl.constexpr):
    """The columns from ``begin`` of a tile's windows, (TOKENS, BLOCK), 0 outside the image.

    extent: the image's height and width; places: the result of :func:`tile_places` for the tokens.
    """
    start, top, left, there = places
    height, width = extent
    column = begin + tl.arange(0, BLOCK)
    wide: tl.constexpr = LAYOUT.window.kernel[1]
    if LAYOUT.gather:
        tap, channel = column // LAYOUT.channels, column % LAYOUT.channels
        down, right = (tap // wide)[None, :], (tap % wide)[None, :]
        pixel_row, pixel_column = top[:, None] + down, left[:, None] + right
        mask = there[:, None] & (column < LAYOUT.columns)[None, :]
    else:
        tap = begin // LAYOUT.channels
        down, right = tap // wide, tap % wide
        channel = tl.max_contiguous(tl.multiple_of(begin % LAYOUT.channels + tl.arange(0, BLOCK), BLOCK), BLOCK)
        pixel_row, pixel_column = (top + down)[:, None], (left + right)[:, None]
        mask = there[:, None]
    if LAYOUT.window.padding[0] + LAYOUT.window.padding[1] > 0:  # without padding, windows are inside the image
        # as unsigned, a negative index is out of range as well
        mask &= pixel_row.to(tl.uint32) < height.to(tl.uint32)
        mask &= pixel_column.to(tl.uint32) < width.to(tl.uint32)
    offset = down.to(tl.int64) * image.row + right.to(tl.int64) * image.column
    if LAYOUT.gather:
        offset += channel[None, :].to(tl.int64) * image.channel
        tile = tl.load(image.pointer + start[:, None] + offset, mask=mask, other=0)
    else:
        tile = tl.load(image.pointer + start[:, None] + offset + channel[None, :], mask=mask, other=0)
    if image.scale is not None:
        scale, shift = tl.load(image.scale + column), tl.load(image.shift + column)
        tile = tile.to(tl.float32)
        if LAYOUT.cell is not None:
            mask &= tile >= 0
        tile = tl.where(mask, tile * scale[None, :] + shift[None, :], 0.0)
    return tile


@triton.jit
def _centre(image, extent, places, LAYOUT: tl.constexpr):
    """The value at each window's centre in float32, 0 outside the image."""
    start, top, left, there = places
    height, width = extent
    if LAYOUT.cell is None:
        down: tl.constexpr = LAYOUT.window.kernel[0] // 2
        right: tl.constexpr = LAYOUT.window.kernel[1] // 2
        row, column = top + down, left + right
        there &= (row >= 0) & (row < height) & (column >= 0) & (column < width)
        place = start + down * image.row + right * image.column
    else:
        down: tl.constexpr = LAYOUT.cell[3] // 2
        right: tl.constexpr = LAYOUT.cell[4] // 2
        within: tl.constexpr = down % LAYOUT.cell[0] * LAYOUT.cell[1] + right % LAYOUT.cell[1]
        place = start + down // LAYOUT.cell[0] * image.row + right // LAYOUT.cell[1] * image.column + within
    value = tl.load(image.pointer + place, mask=there, other=0).to(tl.float32)
    if image.scale is not None:
        if LAYOUT.cell is not None:
            there &= value >= 0
        value = tl.where(there, value * tl.load(image.scale) + tl.load(image.shift), 0.0)
    return value


@triton.jit
def tile_products(
    image,
    extent,
    places,
    folded,
    eps,
    group,
    LAYOUT: tl.constexpr,
    NORM: tl.constexpr,
    SHIFT: tl.constexpr,
    OPERAND: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    NARROW: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    GUARD: tl.constexpr,
):
    """Products of a tile's windows with the PARTS x NARROW outputs from ``group``. extent, places:
    :func:`window_tile`; the other arguments are those of :func:`split_linear_kernel`.

    Returns the PARTS products, (TOKENS, NARROW) each; and with NORM the mean ``mu``, the mean of the operands
    (``mu``, under SHIFT minus the centre) and ``r``, (TOKENS) each; all in float32.

    A window's cells also hold pixels of its neighbours, whose weight is 0. Since 0 times NaN is NaN, GUARD replaces
    them by 0. It cannot under NORM without SHIFT, where the product reads the tile as loaded, which takes a third fewer
    instructions.
    """
    mean, product_mean, rstd = 0.0, 0.0, 1.0
    if NORM:
        shift = _centre(image, extent, places, LAYOUT)
        statistics = no_statistics(TOKENS, BLOCK, OPERAND)
    output = tl.arange(0, NARROW)
    sums = ()
    for _ in tl.static_range(PARTS):
        sums = sums + (tl.zeros([TOKENS, NARROW], tl.float32),)
    for begin in range(0, LAYOUT.columns, BLOCK):
        tile = window_tile(image, extent, places, begin, LAYOUT, BLOCK)
        known = None
        if folded.used is not None:
            known = tl.load(folded.used + begin + tl.arange(0, BLOCK))
        if NORM:
            wide = widened(tile) - shift[:, None]
            if known is not None:
                if GUARD and SHIFT and image.scale is None:
                    wide = tl.where(known[None, :] > 0.0, wide, 0.0)
                else:
                    wide *= known[None, :]
            statistics = observed(statistics, wide, known, OPERAND)
            operand = rounded(wide if SHIFT else tile, OPERAND, PRECISION)
        else:
            if known is not None:
                tile = tl.where(known[None, :] > 0.0, tile, 0.0)
            operand = rounded(tile, OPERAND, PRECISION)
        rows = folded.weight + (begin + tl.arange(0, BLOCK))[:, None] * WIDTH + group + output[None, :]
        products = ()
        for index in tl.static_range(PARTS):
            if WIDTH % (PARTS * NARROW) == 0:
                second = tl.load(rows + index * NARROW)
            else:
                second = tl.load(rows + index * NARROW, mask=group + index * NARROW < WIDTH, other=0.0)
            products = products + (dot(operand, rounded(second, OPERAND, PRECISION), sums[index], PRECISION),)
        sums = products
    if NORM:
        off_centre, squares = final_statistics(statistics, LAYOUT.values, OPERAND)
        mean = off_centre + shift
        product_mean = off_centre if SHIFT else mean
        rstd = 1.0 / tl.sqrt(squares / LAYOUT.values + eps)
    return sums, mean, product_mean, rstd


@triton.jit
def normalised(product, product_mean, rstd, folded, column, WIDTH: tl.constexpr, NORM: tl.constexpr):
    """(TOKENS, NARROW) outputs in float32, from one product and the other values that :func:`tile_products` returns."""
    if NORM:
        row_sums = tl.load(folded.row_sums + column, mask=column < WIDTH, other=0.0)
        product -= product_mean[:, None] * row_sums[None, :]
        product *= rstd[:, None]
    return product + tl.load(folded.offset + column, mask=column < WIDTH, other=0.0)[None, :]


@triton.jit(do_not_specialize=VARYING)
def split_linear_kernel(
    image,
    folded,
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
    LAYOUT: tl.constexpr,
    NORM: tl.constexpr,
    SHIFT: tl.constexpr,
    OPERAND: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    NARROW: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``y = r (Wg u - mu Wg 1) + b'``, and the windows' ``mu`` and ``r``; without NORM ``y = W u + b``.

    Grid (token tiles, groups of PARTS x NARROW outputs); a program writes one group of outputs of one tile. image,
    folded: call.py's ``Image`` and ``Folded``; the weight is packed (layout.py), (columns, WIDTH). The statistics are
    accumulated in the same loop as the product, from the windows minus the value s at their centre (statistics.py).
    SHIFT: the product also reads u - s, so that rounding it to OPERAND costs no more than rounding LayerNorm's output.
    """
    first, places = tile_places(tl.program_id(0), tokens, length, grid_width, image, LAYOUT, TOKENS)
    there = places[3]
    group = tl.program_id(1) * PARTS * NARROW
    sums, window_mean, product_mean, window_rstd = tile_products(
        image,
        (height, image_width),
        places,
        folded,
        eps,
        group,
        LAYOUT,
        NORM,
        SHIFT,
        OPERAND,
        TOKENS,
        BLOCK,
        NARROW,
        PARTS,
        WIDTH,
        PRECISION,
        True,
    )
    if NORM:
        if tl.program_id(1) == 0:
            token = first + tl.arange(0, TOKENS)
            tl.store(mean + token, window_mean, mask=there)
            tl.store(rstd + token, window_rstd, mask=there)
    out += first * outputs
    for index in tl.static_range(PARTS):
        column = group + index * NARROW + tl.arange(0, NARROW)
        y = normalised(sums[index], product_mean, window_rstd, folded, column, WIDTH, NORM)
        mask = there[:, None] if EVEN else there[:, None] & (column < outputs)[None, :]
        target = out + tl.arange(0, TOKENS)[:, None] * outputs + column[None, :]
        tl.store(target, narrowed(y, out.dtype.element_ty), mask=mask)


def _groups(outputs, parts):
    """The number of groups of ``parts`` x NARROW outputs."""
    return -(-outputs // (NARROW * parts))


def launch_split_linear(x, weight, used, row_sums, offset, outputs, norm_eps, kernel, stride, padding, dtype, pixels):
    """Launch :func:`split_linear_kernel`. Returns tokens (B, L, outputs), and each token's mean and 1 / deviation.

    The parameters are those of :class:`call.Folded` and :class:`call.Call`; without LayerNorm (``norm_eps`` is
    ``None``) the statistics are empty.
    """
    call = Call(x, dtype, (kernel, stride, padding), outputs, pixels)
    parameters = call.parameters("forward")
    out = torch.empty((x.shape[0], call.length, outputs), dtype=dtype, device=x.device)
    mean, rstd = (offset.new_empty(0) if norm_eps is None else call.singles() for _ in range(2))
    if out.numel():
        grid = -(-call.tokens // parameters["tokens"]), _groups(outputs, parameters["parts"])
        replay.launch(
            split_linear_kernel,
            grid,
            call.image(),
            Folded(weight, used, row_sums, offset),
            norm_eps,
            out,
            *((None, None) if norm_eps is None else (mean, rstd)),
            *x.shape[2:],
            call.grid[1],
            call.length,
            call.tokens,
            outputs,
            LAYOUT=call.layout,
            NORM=norm_eps is not None,
            SHIFT=x.dtype == torch.float32 or x.dtype != dtype,
            TOKENS=parameters["tokens"],
            BLOCK=call.layout.block(parameters["block"]),
            PARTS=parameters["parts"],
            WIDTH=weight.shape[1],
            **call.constants(parameters),
        )
    return out, mean, rstd

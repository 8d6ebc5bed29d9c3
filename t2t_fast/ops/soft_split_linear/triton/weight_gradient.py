"""Triton kernel of the weight's gradient: normalised windows times the upstream gradient, summed over the tokens.

Notation and windows as in forward.py.
"""

import torch
import triton
import triton.language as tl

from ..._common import replay
from ..._common import triton_runtime as runtime
from ..._common.cached import FOLDED
from ..._common.launch_table import cut
from ..._common.tiles import dot, no_sum, rounded, sum_of, summed
from .call import Call, divisor
from .forward import VARYING, tile_places, window_tile
from .layout import NARROW
from .parameters import launch_parameter_gradients


@triton.jit(do_not_specialize=VARYING)
def split_linear_weight_kernel(
    image,
    grad,
    mean,
    rstd,
    d_weight,
    d_bias,
    height,
    image_width,
    grid_width,
    length,
    tokens,
    outputs,
    tiles_per_split,
    LAYOUT: tl.constexpr,
    NORM: tl.constexpr,
    OPERAND: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    NARROW: tl.constexpr,
    PARTS: tl.constexpr,
    TURNED: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The split's part of ``P = sum_t G_t xhat_t^T``, (outputs, columns), padded as the weight is, and of ``sum_t G_t``
    unless ``d_bias`` is ``None``.

    Grid (groups of BLOCKS x BLOCK columns, groups of PARTS x NARROW outputs, splits); a program owns one group of each
    for the tokens of one split. xhat is u without NORM. The windows are read and normalised again: a normalised value
    is at most sqrt(K), so that neither it nor G exceeds the range of float16. Each G is read once for each group of
    columns. TURNED: the sums are held as (outputs, columns) instead of (columns, outputs), so that the normalised tile
    is an operand without a transpose.

    Every program adds up its G, and those of the first group of columns store the sum. In a branch of the loop, Triton
    3.8 would let the prefetch of the next tile overwrite G before it is added.
    """
    begin = tl.program_id(0) * (BLOCKS * BLOCK)
    columns = tl.num_programs(0) * (BLOCKS * BLOCK)
    group = tl.program_id(1) * (PARTS * NARROW)
    split = tl.program_id(2)
    output = tl.arange(0, NARROW)
    row = tl.arange(0, TOKENS)
    sums, totals = (), ()
    for _ in tl.static_range(BLOCKS * PARTS):
        sums = sums + (tl.zeros([NARROW, BLOCK] if TURNED else [BLOCK, NARROW], tl.float32),)
    if d_bias is not None:
        for _ in tl.static_range(PARTS):
            totals = totals + (no_sum(NARROW, OPERAND, TURNED),)
    earliest = split * tiles_per_split
    tiles = tl.minimum(tiles_per_split, tl.cdiv(tokens, TOKENS) - earliest)
    # the first tile's position is computed by division; each further tile adds to it with carry
    place, places = tile_places(earliest, tokens, length, grid_width, image, LAYOUT, TOKENS)
    start, top, left, _ = places
    STRIDE: tl.constexpr = LAYOUT.window.stride
    PADDING: tl.constexpr = LAYOUT.window.padding
    end_column, end_row = grid_width * STRIDE[1], length // grid_width * STRIDE[0]
    row_step, column_step = TOKENS % length // grid_width * STRIDE[0], TOKENS % length % grid_width * STRIDE[1]
    step = TOKENS // length * image.batch + row_step * image.row + column_step * image.column
    next_row = STRIDE[0] * image.row - end_column * image.column
    next_image = image.batch - end_row * image.row
    for _ in range(tiles):
        there = row < tl.minimum(tokens - place, TOKENS).to(tl.int32)
        if NORM:
            centre = tl.load(mean + place + row, mask=there, other=0.0)
            scale = tl.load(rstd + place + row, mask=there, other=0.0)
        upstreams, further = (), ()
        source = grad + place * outputs + group + row[:, None] * outputs + output[None, :]
        for part in tl.static_range(PARTS):
            inside = there[:, None]
            if not EVEN:
                inside &= (group + part * NARROW + output < outputs)[None, :]
            upstream = tl.load(source + part * NARROW, mask=inside, other=0.0)
            if d_bias is not None:
                further = further + (summed(upstream, totals[part], TURNED, PRECISION),)
            upstream = rounded(upstream, OPERAND, PRECISION)
            upstreams = upstreams + (tl.trans(upstream) if TURNED else upstream,)
        products = ()
        for block in tl.static_range(BLOCKS):
            places = start, top, left, there
            tile = window_tile(image, (height, image_width), places, begin + block * BLOCK, LAYOUT, BLOCK)
            if NORM:
                # in float32, subtracting two products would lose precision
                if tl.float32 == OPERAND:
                    tile = (tile.to(tl.float32) - centre[:, None]) * scale[:, None]
                else:
                    tile = tile.to(tl.float32) * scale[:, None] - (centre * scale)[:, None]
            tile = rounded(tile.to(tl.float32), OPERAND, PRECISION)
            if not TURNED:
                # no effect on the result; keeps Triton 3.8 from computing the tile twice, once in every warp
                tile = tl.trans(tl.where(there[:, None], tile, 0.0))
            for part in tl.static_range(PARTS):
                first, second = (upstreams[part], tile) if TURNED else (tile, upstreams[part])
                products = products + (dot(first, second, sums[block * PARTS + part], PRECISION),)
        sums, totals = products, further
        place += TOKENS
        left += column_step
        wraps = left >= end_column - PADDING[1]
        left -= tl.where(wraps, end_column, 0)
        top += row_step + tl.where(wraps, STRIDE[0], 0)
        ends = top >= end_row - PADDING[0]
        top -= tl.where(ends, end_row, 0)
        # for a product, unlike tl.where, the compiler can infer that addresses stay aligned
        start += step + wraps.to(tl.int32) * next_row + ends.to(tl.int32) * next_image
    for part in tl.static_range(PARTS):
        rows = (split * tl.num_programs(1) * (PARTS * NARROW) + group + part * NARROW + output).to(tl.int64)
        if d_bias is not None:
            tl.store(d_bias + rows, sum_of(totals[part], TURNED), mask=begin == 0)
        rows *= columns
        for block in tl.static_range(BLOCKS):
            column = begin + block * BLOCK + tl.arange(0, BLOCK)
            places = rows[:, None] + column[None, :] if TURNED else rows[None, :] + column[:, None]
            tl.store(d_weight + places, sums[block * PARTS + part])


_forget = replay.atomic(FOLDED.clear)


def launch_weight_gradient(
    x, grad, mean, rstd, norm, kernel, stride, padding, pixels, weight, norm_weight, norm_bias, bias_dtype, needed
):
    """The gradients of weight, bias and LayerNorm's two parameters that are ``needed``, each in its dtype.

    For a G in float32, PyTorch computes its column sums: in the kernel they cost more instructions than that pass.
    """
    _forget()  # in training, parameters may be written without a change of their version counters
    call = Call(x, grad.dtype, (kernel, stride, padding), grad.shape[2], pixels)
    half = grad.dtype != torch.float32
    parameters = weight, norm_weight, norm_bias, bias_dtype, x.shape[1], call.layout, needed
    if not grad.numel():
        found = grad.new_zeros((1, call.outputs, call.layout.columns), dtype=torch.float32)
        return launch_parameter_gradients(found, None, grad, *parameters)
    selected = call.parameters("weight")
    parts = divisor(-(-call.outputs // NARROW), selected["parts"])
    groups = -(-call.outputs // (NARROW * parts))
    block = call.layout.block(selected["block"])
    blocks = divisor(-(-call.layout.columns // block), selected["blocks"])
    column_groups = -(-call.layout.columns // (block * blocks))
    wanted = selected["programs"] * runtime.multiprocessors(x.device)
    splits, tiles = cut(call.tokens, column_groups * groups, selected["tokens"], wanted)
    shape = splits, groups * parts * NARROW, column_groups * blocks * block
    d_weight = torch.empty(shape, dtype=torch.float32, device=x.device)
    d_bias = d_weight.new_empty(shape[:2]) if half else None
    replay.launch(
        split_linear_weight_kernel,
        (column_groups, groups, splits),
        call.image(),
        grad.contiguous(),
        mean,
        rstd,
        d_weight,
        d_bias,
        *x.shape[2:],
        call.grid[1],
        call.length,
        call.tokens,
        call.outputs,
        tiles,
        LAYOUT=call.layout,
        NORM=norm,
        TOKENS=selected["tokens"],
        BLOCK=block,
        BLOCKS=blocks,
        PARTS=parts,
        TURNED=selected["turned"],
        **call.constants(selected),
    )
    total = d_bias.sum(0)[: call.outputs] if half else None
    return launch_parameter_gradients(d_weight, total, grad, *parameters)

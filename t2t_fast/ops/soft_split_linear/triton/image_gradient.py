"""Triton kernels of the image's gradient. Each pixel gathers a sum over the windows that cover it.

Notation as in forward.py.
"""

import torch
import triton
import triton.language as tl

from ..._common import replay
from ..._common import triton_runtime as runtime
from ..._common.tiles import dot, narrowed, rounded
from ..._common.windows import in_layout
from .call import Call, divisor
from .layout import NARROW

VARYING = ("height", "image_width", "grid_height", "grid_width", "length", "batch", "tokens", "own_phases")
"""Arguments excluded from specialisation: a new image size or batch size needs no new compilation."""


@triton.jit(do_not_specialize=VARYING)
def token_scalars_kernel(
    grad,
    y,
    offset,
    rstd,
    alpha,
    tokens,
    outputs,
    VALUES: tl.constexpr,
    TOKENS: tl.constexpr,
    NARROW: tl.constexpr,
    EVEN: tl.constexpr,
):
    """``alpha_t = r^2 G_t . (y_t - b') / K``, LayerNorm's part of the image's gradient.

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
    tl.store(alpha + first + row, scale * scale * along / VALUES, mask=there)


@triton.jit
def _steps(tile, batch, down, across, COUNT: tl.constexpr):
    """For the stride steps of a tile, numbered through all images, ``down`` x ``across`` in each: the first one's
    image, and for each its image number relative to that, its row and column, and whether it exists.
    """
    first = tile.to(tl.int64) * COUNT
    area = down * across
    there = tl.arange(0, COUNT) < batch.to(tl.int64) * area - first
    earlier = first // area
    # unsigned division takes fewer instructions
    area, across = area.to(tl.uint32), across.to(tl.uint32)
    index = (first - earlier * area).to(tl.uint32) + tl.arange(0, COUNT).to(tl.uint32)
    image = index // area
    index -= image * area
    row = index // across
    return earlier, image.to(tl.int32), row.to(tl.int32), (index - row * across).to(tl.int32), there


@triton.jit(do_not_specialize=VARYING)
def split_linear_image_kernel(
    grad,
    weight,
    mean,
    rstd,
    alpha,
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
    own_phases,
    CHANNELS: tl.constexpr,
    WINDOW: tl.constexpr,
    NORM: tl.constexpr,
    OPERAND: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
    NARROW: tl.constexpr,
    PARTS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``d_x = sum_t r_t W^T G_t + alpha_t (mu_t - x)`` over the windows t that cover a pixel.

    Grid (tiles of PIXELS stride steps, groups of phases, blocks of channels). A phase is the set of pixels at the same
    position within their stride step, which are covered through the same taps. A program computes ``own_phases``
    phases, one after another; they read the same G. ``weight`` is packed (layout.py): (taps, GROUPS x PARTS x NARROW
    outputs, WIDTH channels). d_x is channels-last. The product reads G unscaled: each tap maps a pixel to one window,
    so r can scale the product, and r G need not fit into half precision. One value of the pixel is subtracted from both
    x and mu, so that a large offset of the image costs no precision.
    """
    KERNEL: tl.constexpr = WINDOW[0]
    STRIDE: tl.constexpr = WINDOW[1]
    PADDING: tl.constexpr = WINDOW[2]
    down, across = tl.cdiv(height, STRIDE[0]), tl.cdiv(image_width, STRIDE[1])
    earlier, image, step_row, step_column, there = _steps(tl.program_id(0), batch, down, across, PIXELS)
    token = image * length + step_row * grid_width + step_column
    channel = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    output = tl.arange(0, NARROW)
    upstreams = grad + token.to(tl.int64)[:, None] * outputs + output[None, :]
    weights = weight + output[:, None] * WIDTH + channel[None, :]
    first_phase = tl.program_id(1) * own_phases
    for phase in range(first_phase, tl.minimum(first_phase + own_phases, STRIDE[0] * STRIDE[1])):
        place_row, place_column = phase // STRIDE[1], phase % STRIDE[1]
        # every stride-th tap of the window covers this phase; none if windows leave gaps
        tap_row, tap_column = (place_row + PADDING[0]) % STRIDE[0], (place_column + PADDING[1]) % STRIDE[1]
        taps_down = tl.maximum(KERNEL[0] - tap_row + STRIDE[0] - 1, 0) // STRIDE[0]
        taps_across = tl.maximum(KERNEL[1] - tap_column + STRIDE[1] - 1, 0) // STRIDE[1]
        # the first of them belongs to the window so many steps ahead, each further one to the window before
        ahead_row, ahead_column = (place_row + PADDING[0]) // STRIDE[0], (place_column + PADDING[1]) // STRIDE[1]
        row, column = step_row * STRIDE[0] + place_row, step_column * STRIDE[1] + place_column
        within = there & (row < height) & (column < image_width)
        if NORM:
            x_batch, x_channel, x_row, x_column = x_strides
            place = image.to(tl.int64) * x_batch + row.to(tl.int64) * x_row + column.to(tl.int64) * x_column
            start = x + earlier * x_batch + place
            own = tl.load(start + (tl.program_id(2) * BLOCK).to(tl.int64) * x_channel, mask=within, other=0.0)
            own = own.to(tl.float32)
            own = tl.where(tl.abs(own) < float("inf"), own, 0.0)  # 0 times NaN is NaN, for pixels that no window covers
        sums = tl.zeros([PIXELS, BLOCK], tl.float32)
        scale = tl.zeros([PIXELS], tl.float32)
        shift = tl.zeros([PIXELS], tl.float32)
        back_row, back_column = 0, 0
        for step in range(0, taps_down * taps_across * GROUPS):
            group = step % GROUPS
            covers = (step_row + (ahead_row - back_row)).to(tl.uint32) < grid_height.to(tl.uint32)
            covers &= (step_column + (ahead_column - back_column)).to(tl.uint32) < grid_width.to(tl.uint32)
            covers &= there
            ahead = earlier * length + ((ahead_row - back_row) * grid_width + ahead_column - back_column)
            begin = group * PARTS * NARROW
            tap = (tap_row + back_row * STRIDE[0]) * KERNEL[1] + tap_column + back_column * STRIDE[1]
            to_upstream = ahead * outputs + begin
            to_weight = (tap * GROUPS + group).to(tl.int64) * (PARTS * NARROW * WIDTH)
            part = tl.zeros([PIXELS, BLOCK], tl.float32) if NORM else sums
            for index in tl.static_range(PARTS):
                inside = covers[:, None]
                if not EVEN:
                    inside &= (begin + index * NARROW + output < outputs)[None, :]
                first = tl.load(upstreams + to_upstream + index * NARROW, mask=inside, other=0.0)
                second = tl.load(weights + to_weight + index * NARROW * WIDTH)
                part = dot(rounded(first, OPERAND, PRECISION), rounded(second, OPERAND, PRECISION), part, PRECISION)
            if NORM:
                sums += part * tl.load(rstd + ahead + token, mask=covers, other=0.0)[:, None]
                once = covers if GROUPS == 1 else covers & (group == 0)
                share = tl.load(alpha + ahead + token, mask=once, other=0.0)
                scale += share
                shift += share * (tl.load(mean + ahead + token, mask=covers, other=0.0) - own)
            else:
                sums = part
            # a branch would prevent the compiler from prefetching
            back_column += 1 if GROUPS == 1 else (group == GROUPS - 1).to(tl.int32)
            back_row += (back_column == taps_across).to(tl.int32)
            back_column = tl.where(back_column == taps_across, 0, back_column)
        inside = within[:, None] & (channel < CHANNELS)[None, :]
        if NORM:
            places = start[:, None] + channel.to(tl.int64)[None, :] * x_channel
            values = tl.load(places, mask=inside, other=0.0).to(tl.float32) - own[:, None]
            sums += shift[:, None] - tl.where(scale[:, None] == 0.0, 0.0, values * scale[:, None])
        start = d_x + earlier * (height * image_width) * CHANNELS + channel[None, :]
        place = (image * height + row) * image_width + column
        tl.store(start + place.to(tl.int64)[:, None] * CHANNELS, narrowed(sums, d_x.dtype.element_ty), mask=inside)


def launch_image_gradient(grad, x, weight, offset, y, mean, rstd, kernel, stride, padding):
    """d_x in x's dtype and memory format (:func:`windows.in_layout`); ``offset`` with LayerNorm only."""

    call = Call(x, grad.dtype, (kernel, stride, padding), grad.shape[2])
    grad, norm = grad.contiguous(), offset is not None
    alpha = None
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if not d_x.numel():
        return in_layout(d_x, x.stride(1) == 1)
    if norm:
        parameters = call.parameters("scalars")
        alpha = call.singles()
        replay.launch(
            token_scalars_kernel,
            (-(-call.tokens // parameters["tokens"]),),
            grad,
            y,
            offset,
            rstd,
            alpha,
            call.tokens,
            call.outputs,
            VALUES=call.layout.values,
            TOKENS=parameters["tokens"],
            NARROW=NARROW,
            EVEN=call.outputs % NARROW == 0,
            num_warps=parameters["warps"],
            **runtime.FUSION,
        )
    parameters = call.parameters("image")
    (height, width), (down, right) = x.shape[2:], call.window.stride
    tiles = -(-x.shape[0] * -(-height // down) * -(-width // right) // parameters["tokens"])
    block = min(parameters["block"], weight.shape[2])
    blocks = -(-x.shape[1] // block)
    parts = divisor(weight.shape[1] // NARROW, parameters["parts"])
    # phases of one program share G; group them if enough programs remain
    wanted = parameters["programs"] * runtime.multiprocessors(x.device)
    groups = min(down * right, max(1, wanted // (tiles * blocks)))
    own = -(-down * right // groups)
    replay.launch(
        split_linear_image_kernel,
        (tiles, -(-down * right // own), blocks),
        grad,
        weight,
        mean,
        rstd,
        alpha,
        x,
        x.stride(),
        d_x,
        height,
        width,
        *call.grid,
        call.length,
        x.shape[0],
        call.outputs,
        own,
        CHANNELS=x.shape[1],
        WINDOW=tuple(call.window),
        NORM=norm,
        PIXELS=parameters["tokens"],
        BLOCK=block,
        PARTS=parts,
        GROUPS=weight.shape[1] // NARROW // parts,
        WIDTH=weight.shape[2],
        **call.constants(parameters),
    )
    return in_layout(d_x, x.stride(1) == 1)

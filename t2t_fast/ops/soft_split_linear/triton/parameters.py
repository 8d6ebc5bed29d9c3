"""Triton kernels on the parameters: LayerNorm folded into the Linear before the products, and their gradients after.

Notation as in docs/math.md, section 1: weight W (O, K), gamma and beta of LayerNorm, ``Wg`` the centred W diag(gamma).
Upstream's order of the K values of a window is channel, then tap; layout.py's order of columns has padding.
"""

import math

import torch
import triton
import triton.language as tl

from ..._common import replay
from ..._common import triton_runtime as runtime
from ..._common.spec import Window
from ..._common.tiles import narrowed
from .layout import NARROW, layout, operand_shapes

HELD = 4096
"""Values that a program of ``fold_kernel`` holds at once."""
BLOCK = 32
"""Columns of a program of ``parameter_gradients_kernel``."""


@triton.jit
def _value_of(column, CHANNELS: tl.constexpr, PITCH: tl.constexpr, TAPS: tl.constexpr, CELL: tl.constexpr):
    """The window's value that a column holds: its index in upstream's order, its channel, and whether there is one.

    PITCH: columns of a tap. CELL: layout.py's ``Layout.cell``.
    """
    if CELL is None:
        tap, channel = column // PITCH, column % PITCH
        index = channel * TAPS + tap
        there = (tap < TAPS) & (channel < CHANNELS)
    else:
        SIZE: tl.constexpr = CELL[0] * CELL[1] * CELL[2]
        ACROSS: tl.constexpr = (CELL[4] + CELL[1] - 1) // CELL[1] * SIZE
        within = column % SIZE
        channel = within // (CELL[0] * CELL[1])
        down = column // ACROSS * CELL[0] + within // CELL[1] % CELL[0]
        right = column % ACROSS // SIZE * CELL[1] + within % CELL[1]
        index = (channel * CELL[3] + down) * CELL[4] + right
        there = (down < CELL[3]) & (right < CELL[4])
    return index, channel, there


@triton.jit
def _column_of(index, CHANNELS: tl.constexpr, TAPS: tl.constexpr, CELL: tl.constexpr):
    """The column that holds a window's value; the inverse of :func:`_value_of`."""
    channel, tap = index // TAPS, index % TAPS
    if CELL is None:
        column = tap * CHANNELS + channel
    else:
        ACROSS: tl.constexpr = (CELL[4] + CELL[1] - 1) // CELL[1]
        down, right = tap // CELL[4], tap % CELL[4]
        cell = down // CELL[0] * ACROSS + right // CELL[1]
        column = ((cell * CELL[2] + channel) * CELL[0] + down % CELL[0]) * CELL[1] + right % CELL[1]
    return column


@triton.jit
def fold_kernel(
    weight,
    bias,
    gamma,
    beta,
    operands,
    pixels,
    outputs,
    columns: tl.constexpr,
    VALUES: tl.constexpr,
    CHANNELS: tl.constexpr,
    PITCH: tl.constexpr,
    TAPS: tl.constexpr,
    CELL: tl.constexpr,
    NORM: tl.constexpr,
    TURNED: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ``operands``, layout.py's ``Operands``: ``Wg`` in the operands' dtype, ``b' = b + W beta``, and vectors.

    Grid (WIDTH / ROWS); a program reads ROWS rows of the weight twice, BLOCK columns at a time, and writes them once.
    Without NORM, the weight and the bias. The row sums are those of the rounded weight. The first program also writes
    the vectors with one value for each column. pixels: scales and shifts of an image of bytes, by channel. The weight
    is (columns, WIDTH), with TURNED (taps, WIDTH, PITCH); its padding is 0.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = weight + row.to(tl.int64)[:, None] * VALUES
    mean = tl.zeros([ROWS], tl.float32)
    constant = tl.zeros([ROWS], tl.float32)
    if bias is not None:
        constant += tl.load(bias + row, mask=row < outputs, other=0.0).to(tl.float32)
    if NORM:
        for begin in range(0, columns, BLOCK):
            index, _, there = _value_of(begin + tl.arange(0, BLOCK), CHANNELS, PITCH, TAPS, CELL)
            mask = (row < outputs)[:, None] & there[None, :]
            values = tl.load(rows + index[None, :], mask=mask, other=0.0).to(tl.float32)
            if beta is not None:
                constant += tl.sum(values * tl.load(beta + index, mask=there, other=0.0).to(tl.float32)[None, :], 1)
            if gamma is not None:
                values *= tl.load(gamma + index, mask=there, other=0.0).to(tl.float32)[None, :]
            mean += tl.sum(values, 1)
        mean /= VALUES
    tl.store(operands.offset + row, constant)
    total = tl.zeros([ROWS], tl.float32)
    for begin in range(0, columns, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        index, channel, there = _value_of(column, CHANNELS, PITCH, TAPS, CELL)
        mask = (row < outputs)[:, None] & there[None, :]
        values = tl.load(rows + index[None, :], mask=mask, other=0.0).to(tl.float32)
        if NORM:
            if gamma is not None:
                values *= tl.load(gamma + index, mask=there, other=0.0).to(tl.float32)[None, :]
            values = tl.where(mask, values - mean[:, None], 0.0)
        values = narrowed(values, operands.weight.dtype.element_ty)
        if NORM:
            total += tl.sum(values.to(tl.float32), 1)
        if TURNED:
            place = (column // PITCH * WIDTH)[None, :] * PITCH + row[:, None] * PITCH + (column % PITCH)[None, :]
        else:
            place = column[None, :] * WIDTH + row[:, None]
        tl.store(operands.weight + place, values, mask=(column < columns)[None, :])
        if tl.program_id(0) == 0:
            if operands.used is not None:
                tl.store(operands.used + column, there.to(tl.float32), mask=column < columns)
            if operands.scale is not None:
                factor = tl.zeros([BLOCK], tl.float32)
                summand = tl.zeros([BLOCK], tl.float32)
                for number in tl.static_range(CHANNELS):
                    factor = tl.where(there & (channel == number), pixels[number], factor)
                    summand = tl.where(there & (channel == number), pixels[CHANNELS + number], summand)
                tl.store(operands.scale + column, factor, mask=column < columns)
                tl.store(operands.shift + column, summand, mask=column < columns)
    if operands.row_sums is not None:
        tl.store(operands.row_sums + row, total)


def launch_fold(weight, bias, gamma, beta, norm, channels, kernel, stride, padding, dtype, pixels, turned):
    """The tensors of :class:`layout.Operands` that a call needs, in order, in one launch.

    turned: those of the image's gradient, else those of a forward kernel.
    """
    window = Window(tuple(kernel), tuple(stride), tuple(padding))
    shapes = operand_shapes(*weight.shape, norm, channels, window, bool(pixels), turned)
    operands = shapes.filled(
        [
            torch.empty(shape, dtype=torch.float32 if index else dtype, device=weight.device)
            for index, shape in enumerate(shapes.present())
        ]
    )
    columns = math.prod(shapes.weight) // shapes.offset[0]
    block = min(1 << (columns - 1).bit_length(), 1024)
    rows = min(HELD // block, NARROW)
    replay.launch(
        fold_kernel,
        (shapes.offset[0] // rows,),
        *(None if t is None else t.contiguous() for t in (weight, bias, gamma, beta)),
        operands,
        tuple(pixels),
        weight.shape[0],
        columns,
        VALUES=weight.shape[1],
        CHANNELS=channels,
        PITCH=shapes.weight[2] if turned else channels,
        TAPS=weight.shape[1] // channels,
        CELL=None if turned else layout(channels, window).cell,
        NORM=norm,
        TURNED=turned,
        WIDTH=shapes.offset[0],
        ROWS=rows,
        BLOCK=block,
        num_warps=4,
        **runtime.FUSION,
    )
    return operands.present()


@triton.jit
def parameter_gradients_kernel(
    products,
    total,
    weight,
    gamma,
    beta,
    d_weight,
    d_gamma,
    d_beta,
    pitch,
    outputs,
    VALUES: tl.constexpr,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    CELL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of weight, gamma and beta from ``P = sum_t G_t xhat_t^T`` and ``g = sum_t G_t``.

        dW = P diag(gamma) + g beta^T    dgamma = sum_o W_o P_o    dbeta = W^T g

    Grid (blocks of the K values); a program reads its columns of P and W once, ROWS at a time. products: (O, columns)
    with ``pitch`` values a row. A gradient that is ``None`` is not needed; ``total`` is ``None`` if none needs it.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = index < VALUES
    column = _column_of(index, CHANNELS, TAPS, CELL)
    scale = tl.full([BLOCK], 1.0, tl.float32)
    if gamma is not None:
        scale = tl.load(gamma + index, mask=there, other=0.0).to(tl.float32)
    if beta is not None:
        summand = tl.load(beta + index, mask=there, other=0.0).to(tl.float32)
    of_gamma = tl.zeros([BLOCK], tl.float32)
    of_beta = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, outputs, ROWS):
        row = begin + tl.arange(0, ROWS)
        mask = (row < outputs)[:, None] & there[None, :]
        place = row.to(tl.int64)[:, None] * VALUES + index[None, :]
        part = tl.load(products + row.to(tl.int64)[:, None] * pitch + column[None, :], mask=mask, other=0.0)
        if total is not None:
            along = tl.load(total + row, mask=row < outputs, other=0.0)
        if d_weight is not None:
            value = part * scale[None, :]
            if beta is not None:
                value += along[:, None] * summand[None, :]
            tl.store(d_weight + place, narrowed(value, d_weight.dtype.element_ty), mask=mask)
        if d_gamma is not None or d_beta is not None:
            values = tl.load(weight + place, mask=mask, other=0.0).to(tl.float32)
            if d_gamma is not None:
                of_gamma += tl.sum(values * part, 0)
            if d_beta is not None:
                of_beta += tl.sum(values * along[:, None], 0)
    if d_gamma is not None:
        tl.store(d_gamma + index, narrowed(of_gamma, d_gamma.dtype.element_ty), mask=there)
    if d_beta is not None:
        tl.store(d_beta + index, narrowed(of_beta, d_beta.dtype.element_ty), mask=there)


def launch_parameter_gradients(products, total, grad, weight, gamma, beta, bias_dtype, channels, found, needed):
    """The gradients of weight, bias, gamma and beta, each in the parameter's dtype; only those ``needed``.

    products: (splits, O or more, columns or more) in the columns of ``found``, the windows' ``Layout``; total: the
    column sums of ``grad``, ``None`` if they have yet to be computed.
    """
    need_weight, need_bias, need_gamma, need_beta = needed
    if total is None and (need_bias or need_beta or (need_weight and beta is not None)):
        total = grad.flatten(0, -2).sum(0, dtype=torch.float32)
    products = products[0] if products.shape[0] == 1 else products.sum(0)
    outputs, values = weight.shape
    gradients = [
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) if wanted else None
        for tensor, wanted in ((weight, need_weight), (gamma, need_gamma), (beta, need_beta))
    ]
    replay.launch(
        parameter_gradients_kernel,
        (-(-values // BLOCK),),
        products,
        total,
        *(None if t is None else t.contiguous() for t in (weight, gamma, beta)),
        *gradients,
        products.shape[1],
        outputs,
        VALUES=values,
        CHANNELS=channels,
        TAPS=values // channels,
        CELL=found.cell,
        ROWS=NARROW,
        BLOCK=BLOCK,
        num_warps=4,
        **runtime.FUSION,
    )
    d_bias = total.to(bias_dtype) if need_bias else None
    return [t for t in (gradients[0], d_bias, *gradients[1:]) if t is not None]

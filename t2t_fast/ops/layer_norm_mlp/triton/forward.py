"""Triton kernel of layer_norm_mlp: a matrix product with what follows it in its epilogue, forward and backward.

Notation: rows are the tokens of all samples, ``length`` a sample. The product is (rows, K) by (K, N), with K ``inner``
and N ``outer``; a tile is TOKENS x COLUMNS of it. Operands are in the inputs' dtype, sums and epilogue in float32.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ..._common import replay
from ..._common.elementwise import branch_dropped, dropped, gelu_and_slope_of, gelu_of, path_factors, random_lanes
from ..._common.philox import HIDDEN, kernel_drops
from ..._common.tiles import dot, load, row_of, store, widened
from ...add_layer_norm.triton.launch import masks, strided
from .launch import planned

GROUP = tl.constexpr(8)
"""Tiles of rows that consecutive programs share, so that a second-level cache keeps their operands."""

HIDDEN_STREAM = tl.constexpr(HIDDEN)
VARYING = ("seed", "rows", "length", "steps")
"""Arguments excluded from specialisation: another number of tokens or samples needs no new compilation."""


@triton.jit
def _tile_of(rows, outer, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    """The program's tile: its number among the tiles of rows, and among those of columns."""
    tiles, across = tl.cdiv(rows, TOKENS), tl.cdiv(outer, COLUMNS)
    program, members = tl.program_id(0), GROUP * across
    first = program // members * GROUP
    size = tl.minimum(tiles - first, GROUP)
    return first + program % members % size, program % members // size


@triton.jit
def _product(
    x,
    weight,
    start,
    columns,
    rows,
    steps,
    inner: tl.constexpr,
    outer: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of the product, in ``steps`` of BLOCK. Rows beyond the last one repeat it, so that they need no mask.

    The number of steps is an argument, because the compiler would unroll a constant number of them into more registers.
    """
    WHOLE: tl.constexpr = inner % BLOCK == 0
    lines = tl.minimum(tl.arange(0, TOKENS), (rows - 1 - start).to(tl.int32))
    x += start * inner
    acc = tl.zeros([TOKENS, columns.shape[0]], tl.float32)
    for step in range(0, steps):
        depth = step * BLOCK + tl.arange(0, BLOCK)
        there, exists = depth < inner, columns < outer
        left = x + (lines[:, None] * inner + depth[None, :])
        if TRANSPOSED:
            right = weight + (columns[:, None] * inner + depth[None, :])
            inside = exists[:, None] & there[None, :]
        else:
            right = weight + (depth[:, None] * outer + columns[None, :])
            inside = there[:, None] & exists[None, :]
        a = tl.load(left) if WHOLE else tl.load(left, mask=there[None, :], other=0.0)
        b = tl.load(right) if WHOLE and EVEN else tl.load(right, mask=inside, other=0.0)
        acc = dot(a, tl.trans(b) if TRANSPOSED else b, acc, PRECISION)
    return acc


@triton.jit
def _halves(p):
    """The left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(p, [p.shape[0], 2, p.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def _finish(
    p,
    tile,
    column,
    bias,
    h,
    t,
    t_stride,
    out,
    again,
    shares,
    seed,
    drop,
    factors,
    rows,
    outer: tl.constexpr,
    OCTETS: tl.constexpr,
    EVEN: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    """The epilogue of :func:`product_kernel` for a part of a tile, from ``column``."""
    TOKENS: tl.constexpr = p.shape[0]
    COLUMNS: tl.constexpr = p.shape[1]
    start, lines, columns = tile.to(tl.int64) * TOKENS, tl.arange(0, TOKENS), column + tl.arange(0, COLUMNS)
    there = lines < rows - start
    if bias is not None:
        p += row_of(bias + column, outer - column, COLUMNS, 0.0)[None, :]
    if EPILOGUE == "add":
        p = branch_dropped(p, seed, start, factors, drop, outer, TOKENS, COLUMNS, OCTETS, column)
        if t is not None:
            p += widened(load(t, start, lines, there, columns, outer, t_stride, 1, EVEN))
        store(out, p, start, lines, there, columns, outer, outer, 1, EVEN)
    else:
        lanes = 0
        if drop[1] is not None:
            lanes = random_lanes(tl.load(seed), start, outer, TOKENS, COLUMNS, OCTETS, column, HIDDEN_STREAM)
        if EPILOGUE == "gelu":
            if h is not None:
                store(h, p, start, lines, there, columns, outer, outer, 1, EVEN)
            store(out, dropped(gelu_of(p), lanes, drop), start, lines, there, columns, outer, outer, 1, EVEN)
        else:
            value, slope = gelu_and_slope_of(widened(load(h, start, lines, there, columns, outer, outer, 1, EVEN)))
            store(again, dropped(value, lanes, drop), start, lines, there, columns, outer, outer, 1, EVEN)
            p = dropped(p * slope, lanes, drop)
            store(out, p, start, lines, there, columns, outer, outer, 1, EVEN)
            sums = tl.sum(tl.where(there[:, None], p, 0.0), 0)
            tl.store(shares + tile * outer + columns, sums, mask=columns < outer)


@triton.jit(do_not_specialize=VARYING)
def product_kernel(
    x,
    weight,
    bias,
    h,
    t,
    t_stride,
    out,
    again,
    shares,
    seed,
    drop,
    path,
    rows,
    length,
    steps,
    inner: tl.constexpr,
    outer: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    OCTETS: tl.constexpr,
    FUSED: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``p = x W^T + b`` or, in backward, ``p = x W``; then what EPILOGUE names:

        gelu:           out = m gelu(p), h = p (unless ``None``)
        add:            out = t + m p, without t (``None``) m p
        gelu_backward:  out = m p gelu'(h), again = m gelu(h), and the column sums of out

    Grid (tiles of rows x tiles of columns, grouped); a program owns one tile. It reads its rows of x and columns of
    the weight, and h or t once, and writes each result once; ``shares``, (tiles of rows, N), takes the tiles' sums.
    With FUSED off, x is the product without its bias.

    drop, path: the masks m, ``elementwise.left_out``; of the hidden units except for "add", where they are those of the
    block's second branch. PARTS: the epilogue handles as many parts of a tile one after the other, to save registers.
    """
    EVEN: tl.constexpr = outer % COLUMNS == 0
    PART: tl.constexpr = COLUMNS // PARTS
    tile, across = _tile_of(rows, outer, TOKENS, COLUMNS)
    start, column = tile.to(tl.int64) * TOKENS, across * COLUMNS
    columns = column + tl.arange(0, COLUMNS)
    if FUSED:
        TRANSPOSED: tl.constexpr = EPILOGUE != "gelu_backward"
        p = _product(x, weight, start, columns, rows, steps, inner, outer, TOKENS, BLOCK, EVEN, TRANSPOSED, PRECISION)
    else:
        lines = tl.arange(0, TOKENS)
        p = widened(load(x, start, lines, lines < rows - start, columns, outer, outer, 1, EVEN))
    factors = path_factors(seed, start, length, path, TOKENS)
    parts = (p,)
    if PARTS > 1:
        parts = _halves(p)
    if PARTS > 2:
        parts = _halves(parts[0]) + _halves(parts[1])
    for part in tl.static_range(PARTS):
        _finish(
            parts[part],
            tile,
            column + part * PART,
            bias,
            h,
            t,
            t_stride,
            out,
            again,
            shares,
            seed,
            drop,
            factors,
            rows,
            outer,
            OCTETS,
            EVEN,
            EPILOGUE,
        )


def _launch(name, epilogue, x, weight, outer, masking, length, **arguments):
    """Launch :func:`product_kernel` for an operator's pass; arguments: the kernel's others. Returns the sums' tiles."""
    across, steps, constants = planned(name, x, outer)
    x, weight = x.contiguous(), weight.contiguous()
    rows = x.numel() // x.shape[-1]
    tiles = -(-rows // constants["TOKENS"])  # triton.cdiv takes as long as a launch
    if not constants["FUSED"]:
        x = x @ weight if epilogue == "gelu_backward" else F.linear(x, weight)
    shares = None
    if epilogue == "gelu_backward":
        shares = torch.empty(tiles, outer, dtype=torch.float32, device=x.device)
    seed, drop, path = masking
    replay.launch(
        product_kernel,
        (tiles * across,),
        x,
        weight,
        **{"bias": None, "h": None, "t": None, "t_stride": 0, "again": None, **arguments},
        shares=shares,
        seed=seed,
        drop=drop,
        path=path,
        rows=rows,
        length=length,
        steps=steps,
        EPILOGUE=epilogue,
        **constants,
    )
    return shares


def _hidden(seed, p):
    """The masks of the hidden units' dropout."""
    drop, path = kernel_drops(p, 0.0)
    return seed if p > 0 else None, drop, path


def launch_fc1_gelu(n, weight, bias, seed, hidden_drop, keep):
    """h (empty unless ``keep``) and fc2's input, in n's dtype."""
    shape = *n.shape[:-1], weight.shape[0]
    h, a = n.new_empty(shape if keep else 0), n.new_empty(shape)
    if a.numel():
        bias = None if bias is None else bias.contiguous()
        arguments = {"bias": bias, "h": h if keep else None, "out": a}
        _launch("fc1_gelu", "gelu", n, weight, shape[-1], _hidden(seed, hidden_drop), 1, **arguments)
    return h, a


def launch_fc2_add(a, weight, bias, t, seed, drops):
    """The stream in t's dtype, or without one the branch in a's. drops: the probabilities of both branches."""
    shape = *a.shape[:-1], weight.shape[0]
    out = torch.empty(shape, dtype=a.dtype if t is None else t.dtype, device=a.device)
    if out.numel():
        t, stride = strided(t)
        bias = None if bias is None else bias.contiguous()
        masking = masks(seed, drops[:2], drops[2:], 1)
        arguments = {"bias": bias, "t": t, "t_stride": stride, "out": out}
        _launch("fc2_add", "add", a, weight, shape[-1], masking, a.shape[1], **arguments)
    return out


def launch_fc2_gelu_backward(d_f, weight, h, seed, hidden_drop):
    """The gradient of h, fc2's input again, and the gradient's column sums in float32."""
    d_h, a = (torch.empty(h.shape, dtype=d_f.dtype, device=h.device) for _ in range(2))
    outer = h.shape[-1]
    if not math.prod(h.shape):
        return d_h, a, h.new_zeros(outer, dtype=torch.float32)
    arguments = {"h": h, "out": d_h, "again": a}
    masking = _hidden(seed, hidden_drop)
    return d_h, a, _launch("fc2_gelu_backward", "gelu_backward", d_f, weight, outer, masking, 1, **arguments).sum(0)

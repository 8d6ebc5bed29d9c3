"""Triton kernel of the tail of a token layer, backward: one pass over the tokens that computes all else again.

Letters, padding and precision as in ``kernels.py``.
"""

import triton
import triton.language as tl

from ..tiles import dot, matrix, rounded
from .kernels import (
    VARYING,
    cdf_of,
    dropped,
    fc1_of,
    fc2_of,
    kept_weights,
    load_tile,
    normalised,
    place_of,
    proj_of,
    random_lanes,
    row_of,
    store_tile,
)

DENSITY = tl.constexpr(0.3989422804014327)
"""1 / sqrt(2 pi)"""

LOG2E = tl.constexpr(1.4426950408889634)
TOP = tl.constexpr(2.0**-3)
"""Where scaled gradients start: float16 has 2^19 above it and 2^21 below."""


@triton.jit
def _power(value):
    """The power of two at most ``value`` > 0, by its bits; 1 for 0, and for infinity, which is left to where it is."""
    power = (value.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where((value > 0.0) & (value < float("inf")), power, 1.0)


@triton.jit
def _store_matrix(pointer, value, height, width, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """A contiguous (height, width) matrix."""
    rows, columns = tl.arange(0, HEIGHT), tl.arange(0, WIDTH)
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    tl.store(pointer + (rows[:, None] * width + columns[None, :]), value, mask=inside)


@triton.jit
def _store_row(pointer, value, size, SIZE: tl.constexpr):
    columns = tl.arange(0, SIZE)
    tl.store(pointer + columns, value, mask=columns < size)


@triton.jit
def _store_shares(
    pointer, tail, sums, width, hidden, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, PROJ: tl.constexpr, MLP: tl.constexpr
):
    """Wp, bp (PROJ), W1, gamma, beta, b1, W2, b2 (MLP) one behind the other, at this program's place.

    With ``P = sum_t d_h xhat^T``, ``dW1 = P diag(gamma) + db1 beta^T``, ``dgamma = sum_o W1 P``, ``dbeta = W1^T db1``.
    """
    d_proj, d_proj_bias, d_fc1, d_fc1_bias, d_fc2, d_fc2_bias = sums
    area = width * hidden
    pointer += tl.program_id(0).to(tl.int64) * ((width + 4) * width + 2 * area + hidden)
    if PROJ:
        _store_matrix(pointer, d_proj, width, width, WIDTH, WIDTH)
        _store_row(pointer + width * width, d_proj_bias, width, WIDTH)
    if MLP:
        gamma, beta = row_of(tail.norm_weight, width, WIDTH, 1.0), row_of(tail.norm_bias, width, WIDTH, 0.0)
        pointer += (width + 1) * width
        outer = d_fc1_bias[:, None] * beta[None, :]
        _store_matrix(pointer, d_fc1 * gamma[None, :] + outer, hidden, width, HIDDEN, WIDTH)
        pointer += area
        fc1 = matrix(tail.fc1_weight, hidden, width, width, 1, HIDDEN, WIDTH)
        _store_row(pointer, tl.sum(fc1 * d_fc1, 0), width, WIDTH)
        _store_row(pointer + width, tl.sum(fc1 * d_fc1_bias[:, None], 0), width, WIDTH)
        _store_row(pointer + 2 * width, d_fc1_bias, hidden, HIDDEN)
        pointer += 2 * width + hidden
        _store_matrix(pointer, d_fc2, width, hidden, WIDTH, HIDDEN)
        _store_row(pointer + area, d_fc2_bias, width, WIDTH)


@triton.jit(do_not_specialize=VARYING)
def tail_backward_kernel(
    grad,
    y,
    v,
    d_y,
    d_v,
    shares,
    tail,
    norm_eps,
    seed,
    drop_proj,
    drop_mlp,
    length,
    width,
    hidden,
    all_tiles,
    own_tiles,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    TOKENS: tl.constexpr,
    EVEN: tl.constexpr,
    OCTETS: tl.constexpr,
    NEED_INPUTS: tl.constexpr,
    NEED_PROJ: tl.constexpr,
    NEED_MLP: tl.constexpr,
    SCALED: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_y, d_v, and this program's share of the parameters' gradients; all else is computed again from y and v

        d_f = m2 G    d_h = (d_f W2) gelu'(h)    f = gamma (d_h W1)
        d_t = G + (f - mean(f) - xhat mean(f xhat)) / sigma    d_p = m1 d_t    d_y = d_p Wp    d_v = d_t

    Grid (programs), each with ``own_tiles`` tiles of ``all_tiles``; reads G, y and v once (G twice where SCALED),
    writes d_y and d_v once, and in the end its row of ``shares``. Arguments as of kernels.tail_kernel.

    NEED_INPUTS: d_y and d_v, and with NEED_PROJ the projection's gradients. NEED_MLP: those of LayerNorm, fc1 and fc2.
    One launch may do all, or each of two a part, so that not all three matrices of sums are kept at once.

    SCALED, for float16: all gradients inside are divided by a power of two, so that the program's largest upstream
    entry is near TOP.
    """
    DTYPE: tl.constexpr = y[0].dtype.element_ty
    kept, proj_bias, shift, _ = kept_weights(tail, width, hidden, WIDTH, HIDDEN, DTYPE, KEEP, PRECISION)
    if seed is not None:
        seed = tl.load(seed)
    first = tl.program_id(0) * own_tiles
    last = tl.minimum(first + own_tiles, all_tiles)
    up, down = 1.0, 1.0
    if SCALED:
        largest = tl.zeros([TOKENS, WIDTH], tl.float32)
        for index in range(first, last):
            upstream = load_tile(grad, place_of(index, length, TOKENS), width, TOKENS, WIDTH, EVEN)
            largest = tl.maximum(largest, tl.abs(upstream.to(tl.float32)))
        up = _power(tl.max(tl.max(largest, 1), 0)) / TOP
        down = 1.0 / up
    d_proj = tl.zeros([WIDTH, WIDTH], tl.float32)
    d_fc1 = tl.zeros([HIDDEN, WIDTH], tl.float32)
    d_fc2 = tl.zeros([WIDTH, HIDDEN], tl.float32)
    d_proj_bias = tl.zeros([WIDTH], tl.float32)
    d_fc1_bias = tl.zeros([HIDDEN], tl.float32)
    d_fc2_bias = tl.zeros([WIDTH], tl.float32)
    for index in range(first, last):
        place = place_of(index, length, TOKENS)
        tile = load_tile(y, place, width, TOKENS, WIDTH, EVEN)
        skip = load_tile(v, place, width, TOKENS, WIDTH, EVEN)
        upstream = load_tile(grad, place, width, TOKENS, WIDTH, EVEN).to(tl.float32)
        if SCALED:
            upstream *= down
        lanes = 0
        if seed is not None:
            lanes = random_lanes(seed, place[0] * length + place[1], width, TOKENS, WIDTH, OCTETS)
        proj = kept[0] if KEEP else proj_of(tail, width, WIDTH, DTYPE, PRECISION)
        t = dot(tile, tl.trans(proj), None, PRECISION) + proj_bias[None, :]
        t = dropped(t, lanes, drop_proj) + skip.to(tl.float32)
        n, scale = normalised(t, width, norm_eps, WIDTH, EVEN)
        n = rounded(n, DTYPE, PRECISION)
        fc1 = kept[1] if KEEP else fc1_of(tail, width, hidden, WIDTH, HIDDEN, DTYPE, PRECISION)
        h = dot(n, tl.trans(fc1), None, PRECISION) + shift[None, :]
        cdf = cdf_of(h)

        if not (KEEP or NEED_INPUTS):
            tl.debug_barrier()  # without a write in the loop the compiler takes the weights' loads out of it
        d_f = dropped(upstream, lanes, drop_mlp)
        if NEED_MLP:
            d_fc2_bias += tl.sum(d_f, 0)
        d_f = rounded(d_f, DTYPE, PRECISION)
        if NEED_MLP:
            a = rounded(h * cdf, DTYPE, PRECISION)
            d_fc2 = dot(tl.trans(d_f), a, d_fc2, PRECISION)
        fc2 = kept[2] if KEEP else fc2_of(tail, width, hidden, WIDTH, HIDDEN, DTYPE, PRECISION)
        d_h = dot(d_f, fc2, None, PRECISION) * (cdf + h * DENSITY * tl.exp2(h * h * (-0.5 * LOG2E)))
        if NEED_MLP:
            d_fc1_bias += tl.sum(d_h, 0)
        d_h = rounded(d_h, DTYPE, PRECISION)
        if NEED_MLP:
            d_fc1 = dot(tl.trans(d_h), n, d_fc1, PRECISION)
        if NEED_INPUTS:
            if not KEEP and PRECISION != "tf32":
                # less to hold in between: fewer spills in float32, 76 KiB of shared memory, not 108, at E = F = 128;
                # without a barrier the compiler makes the two reads one
                tl.debug_barrier()
                fc1 = fc1_of(tail, width, hidden, WIDTH, HIDDEN, DTYPE, PRECISION)
            f = dot(d_h, fc1, None, PRECISION)
            xhat = n.to(tl.float32)
            along = tl.sum(f * xhat, 1) / width
            f -= (tl.sum(f, 1) / width)[:, None]
            if not EVEN:
                f = tl.where((tl.arange(0, WIDTH) < width)[None, :], f, 0.0)
            d_t = upstream + (f - xhat * along[:, None]) * scale[:, None]
            store_tile(d_v, d_t * up, place, length, width, TOKENS, WIDTH, EVEN)
            d_t = dropped(d_t, lanes, drop_proj)
            if NEED_PROJ:
                d_proj_bias += tl.sum(d_t, 0)
            d_t = rounded(d_t, DTYPE, PRECISION)
            if NEED_PROJ:
                d_proj = dot(tl.trans(d_t), tile, d_proj, PRECISION)
            proj = kept[0] if KEEP else proj_of(tail, width, WIDTH, DTYPE, PRECISION)
            store_tile(d_y, dot(d_t, proj, None, PRECISION) * up, place, length, width, TOKENS, WIDTH, EVEN)
    sums = d_proj * up, d_proj_bias * up, d_fc1 * up, d_fc1_bias * up, d_fc2 * up, d_fc2_bias * up
    _store_shares(shares, tail, sums, width, hidden, WIDTH, HIDDEN, NEED_PROJ, NEED_MLP)

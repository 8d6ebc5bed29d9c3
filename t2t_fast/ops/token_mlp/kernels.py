"""Triton kernels of the tail of a token layer: one pass over the tokens forward, one backward.

Letters as everywhere: L tokens, E token width, F hidden width. The tiles of TOKENS tokens of all sequences stand in one
row; a program owns some neighbours among them, however many sequences those belong to, and keeps the weight matrices.
WIDTH and HIDDEN are E and F rounded up to what a matrix instruction takes; what is beyond is zero and never stored.

Operands of matrix products are in the inputs' dtype; LayerNorm, GELU, dropout and sums in float32.
"""

import triton
import triton.language as tl

from ..tiles import dot, load, matrix, rounded, store

ROUNDS = tl.constexpr(7)
HALF_SQRT2 = tl.constexpr(0.7071067811865476)
DENSITY = tl.constexpr(0.3989422804014327)
"""1 / sqrt(2 pi)"""

LOG2E = tl.constexpr(1.4426950408889634)
TOP = tl.constexpr(2.0**-3)
"""Where scaled gradients start: float16 has 2^19 above it and 2^21 below."""

VARYING = ("length", "tiles", "all_tiles", "own_tiles", "seed", "proj_end", "mlp_begin", "mlp_count")
"""Arguments whose values make no other kernel, so that another image size or batch compiles nothing."""


@triton.jit
def _row(pointer, size, SIZE: tl.constexpr, NONE: tl.constexpr):
    """A parameter of ``size`` values in float32, zero beyond them; NONE everywhere where it is absent."""
    if pointer is None:
        row = tl.full([SIZE], NONE, tl.float32)
    else:
        columns = tl.arange(0, SIZE)
        row = tl.load(pointer + columns, mask=columns < size, other=0.0).to(tl.float32)
    return row


@triton.jit
def _weight(
    pointer, height, width, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr
):
    """A contiguous weight matrix as an operand."""
    return rounded(matrix(pointer, height, width, width, 1, HEIGHT, WIDTH), DTYPE, PRECISION)


@triton.jit
def _scaled_weight(
    fc1,
    gamma,
    width,
    hidden,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``W1 diag(gamma)`` as an operand: LayerNorm's affine part goes into fc1."""
    weight = matrix(fc1, hidden, width, width, 1, HIDDEN, WIDTH)
    if gamma is not None:
        weight *= _row(gamma, width, WIDTH, 1.0)[None, :]
    return rounded(weight, DTYPE, PRECISION)


@triton.jit
def _shifted_bias(fc1, fc1_bias, beta, width, hidden, WIDTH: tl.constexpr, HIDDEN: tl.constexpr):
    """``W1 beta + b1``, likewise."""
    bias = _row(fc1_bias, hidden, HIDDEN, 0.0)
    if beta is not None:
        weight = matrix(fc1, hidden, width, width, 1, HIDDEN, WIDTH)
        bias += tl.sum(weight * _row(beta, width, WIDTH, 0.0)[None, :], 1)
    return bias


@triton.jit
def _lanes(seed, token, width, TOKENS: tl.constexpr, WIDTH: tl.constexpr, OCTETS: tl.constexpr):
    """The 16 random bits of each element of a tile from ``token`` on, as philox.py has them: (TOKENS, WIDTH) uint32.

    OCTETS: rows are whole groups of 8 elements, of which each takes one call.
    """
    rows = tl.arange(0, TOKENS)
    if OCTETS:
        calls = width // 8
        first = token * calls
        base = (first & 0xFFFFFFFF).to(tl.uint32)
        columns = tl.arange(0, WIDTH // 8)
        low = base + (rows[:, None] * calls + columns[None, :]).to(tl.uint32)
        high = (first >> 32).to(tl.uint32) + (low < base).to(tl.uint32)
    else:
        columns = tl.arange(0, WIDTH)
        element = token * width + (rows[:, None] * width + columns[None, :])
        low, high = (element >> 3 & 0xFFFFFFFF).to(tl.uint32), (element >> 35).to(tl.uint32)
    zero = tl.zeros_like(low)
    a, b, c, d = tl.philox(seed, low, high, zero, zero, ROUNDS)
    if OCTETS:
        words = tl.join(tl.join(a, c), tl.join(b, d))
        lanes = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [TOKENS, WIDTH])
    else:
        lane = (element & 7).to(tl.int32)
        word = tl.where(lane < 4, tl.where(lane < 2, a, b), tl.where(lane < 6, c, d))
        lanes = tl.where(lane % 2 == 0, word, word >> 16) & 0xFFFF
    return lanes


@triton.jit
def _skip(
    y,
    v,
    proj,
    proj_bias,
    lanes,
    proj_end,
    proj_scale,
    DROP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``t = v + m1 (y Wp^T + bp)`` of a tile, in float32."""
    t = dot(y, tl.trans(proj), None, PRECISION) + proj_bias[None, :]
    if DROP:
        t *= tl.where(lanes < proj_end.to(tl.uint32), 0.0, proj_scale)
    return t + v.to(tl.float32)


@triton.jit
def _normalised(t, width, norm_eps, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """LayerNorm of each row before its affine part, and ``1 / sigma``."""
    t -= (tl.sum(t, 1) / width)[:, None]
    if not EVEN:
        t = tl.where((tl.arange(0, WIDTH) < width)[None, :], t, 0.0)
    scale = tl.rsqrt(tl.sum(t * t, 1) / width + norm_eps)
    return t * scale[:, None], scale


@triton.jit
def _cdf(h):
    """The standard normal's distribution function, exact as erf is."""
    return 0.5 * tl.math.erf(h * HALF_SQRT2) + 0.5


@triton.jit(do_not_specialize=VARYING)
def tail_kernel(
    y,
    y_batch,
    y_token,
    y_column,
    v,
    v_batch,
    v_token,
    v_column,
    proj,
    proj_bias,
    gamma,
    beta,
    fc1,
    fc1_bias,
    fc2,
    fc2_bias,
    norm_eps,
    seed,
    proj_end,
    proj_scale,
    mlp_begin,
    mlp_count,
    mlp_scale,
    out,
    length,
    width,
    hidden,
    tiles,
    all_tiles,
    own_tiles,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    TOKENS: tl.constexpr,
    EVEN: tl.constexpr,
    OCTETS: tl.constexpr,
    DROP_PROJ: tl.constexpr,
    DROP_MLP: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out = t + m2 (gelu(LN(t) W1^T + b1) W2^T + b2)``. Grid (programs); reads y and v once, writes out once.

    KEEP: the weights are kept, not read again for every tile.
    """
    DTYPE: tl.constexpr = y.dtype.element_ty
    rows, columns = tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    shift = _shifted_bias(fc1, fc1_bias, beta, width, hidden, WIDTH, HIDDEN)
    if KEEP:
        kept_linear = _scaled_weight(fc1, gamma, width, hidden, WIDTH, HIDDEN, DTYPE, PRECISION)
        kept_proj = _weight(proj, width, width, WIDTH, WIDTH, DTYPE, PRECISION)
        kept_fc2 = _weight(fc2, width, hidden, WIDTH, HIDDEN, DTYPE, PRECISION)
    proj_bias, fc2_bias = _row(proj_bias, width, WIDTH, 0.0), _row(fc2_bias, width, WIDTH, 0.0)
    if DROP_PROJ or DROP_MLP:
        seed = tl.load(seed)
    first = tl.program_id(0) * own_tiles
    for index in range(first, tl.minimum(first + own_tiles, all_tiles)):
        sequence = (index // tiles).to(tl.int64)
        start = index % tiles * TOKENS
        there = rows < length - start
        tile = load(y + sequence * y_batch, start, rows, there, columns, width, y_token, y_column, EVEN)
        skip = load(v + sequence * v_batch, start, rows, there, columns, width, v_token, v_column, EVEN)
        lanes = 0
        if DROP_PROJ or DROP_MLP:
            lanes = _lanes(seed, sequence * length + start, width, TOKENS, WIDTH, OCTETS)
        weight = kept_proj if KEEP else _weight(proj, width, width, WIDTH, WIDTH, DTYPE, PRECISION)
        t = _skip(tile, skip, weight, proj_bias, lanes, proj_end, proj_scale, DROP_PROJ, PRECISION)
        n, _ = _normalised(t, width, norm_eps, WIDTH, EVEN)
        linear = kept_linear if KEEP else _scaled_weight(fc1, gamma, width, hidden, WIDTH, HIDDEN, DTYPE, PRECISION)
        h = dot(rounded(n, DTYPE, PRECISION), tl.trans(linear), None, PRECISION) + shift[None, :]
        a = rounded(h * _cdf(h), DTYPE, PRECISION)
        weight = kept_fc2 if KEEP else _weight(fc2, width, hidden, WIDTH, HIDDEN, DTYPE, PRECISION)
        f = dot(a, tl.trans(weight), None, PRECISION) + fc2_bias[None, :]
        if DROP_MLP:
            f *= tl.where(lanes - mlp_begin.to(tl.uint32) < mlp_count.to(tl.uint32), 0.0, mlp_scale)
        place = out + sequence * length * width
        store(place, t + f, start, rows, there, columns, width, width, 1, EVEN)


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


@triton.jit(do_not_specialize=VARYING)
def tail_backward_kernel(
    grad,
    grad_batch,
    grad_token,
    grad_column,
    y,
    y_batch,
    y_token,
    y_column,
    v,
    v_batch,
    v_token,
    v_column,
    proj,
    proj_bias,
    gamma,
    beta,
    fc1,
    fc1_bias,
    fc2,
    norm_eps,
    seed,
    proj_end,
    proj_scale,
    mlp_begin,
    mlp_count,
    mlp_scale,
    d_y,
    d_v,
    shares,
    length,
    width,
    hidden,
    tiles,
    all_tiles,
    own_tiles,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    TOKENS: tl.constexpr,
    EVEN: tl.constexpr,
    OCTETS: tl.constexpr,
    DROP_PROJ: tl.constexpr,
    DROP_MLP: tl.constexpr,
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

    With ``P = sum_t d_h xhat^T``, ``dW1 = P diag(gamma) + db1 beta^T``, ``dgamma = sum_o W1 P``, ``dbeta = W1^T db1``.
    NEED_INPUTS: d_y and d_v, and with NEED_PROJ the projection's gradients. NEED_MLP: those of LayerNorm, fc1 and fc2.
    One launch may do all, or each of two a part, so that not all three matrices of sums are kept at once.

    SCALED, for float16: all gradients inside are divided by a power of two, so that the program's largest upstream
    entry is near TOP. KEEP: the weights are kept, not read again for every tile. Grid (programs); reads G, y and v
    once (G twice where SCALED), writes d_y and d_v once.
    """
    DTYPE: tl.constexpr = y.dtype.element_ty
    rows, columns = tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    shift = _shifted_bias(fc1, fc1_bias, beta, width, hidden, WIDTH, HIDDEN)
    if KEEP:
        kept_linear = _scaled_weight(fc1, gamma, width, hidden, WIDTH, HIDDEN, DTYPE, PRECISION)
        kept_proj = _weight(proj, width, width, WIDTH, WIDTH, DTYPE, PRECISION)
        kept_fc2 = _weight(fc2, width, hidden, WIDTH, HIDDEN, DTYPE, PRECISION)
    proj_bias = _row(proj_bias, width, WIDTH, 0.0)
    if DROP_PROJ or DROP_MLP:
        seed = tl.load(seed)
    first = tl.program_id(0) * own_tiles
    last = tl.minimum(first + own_tiles, all_tiles)
    up, down = 1.0, 1.0
    if SCALED:
        largest = tl.zeros([TOKENS, WIDTH], tl.float32)
        for index in range(first, last):
            start = index % tiles * TOKENS
            place = grad + (index // tiles).to(tl.int64) * grad_batch
            there = rows < length - start
            upstream = load(place, start, rows, there, columns, width, grad_token, grad_column, EVEN)
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
        sequence = (index // tiles).to(tl.int64)
        start = index % tiles * TOKENS
        there = rows < length - start
        tile = load(y + sequence * y_batch, start, rows, there, columns, width, y_token, y_column, EVEN)
        skip = load(v + sequence * v_batch, start, rows, there, columns, width, v_token, v_column, EVEN)
        place = grad + sequence * grad_batch
        upstream = load(place, start, rows, there, columns, width, grad_token, grad_column, EVEN).to(tl.float32)
        if SCALED:
            upstream *= down
        lanes = 0
        if DROP_PROJ or DROP_MLP:
            lanes = _lanes(seed, sequence * length + start, width, TOKENS, WIDTH, OCTETS)
        weight = kept_proj if KEEP else _weight(proj, width, width, WIDTH, WIDTH, DTYPE, PRECISION)
        t = _skip(tile, skip, weight, proj_bias, lanes, proj_end, proj_scale, DROP_PROJ, PRECISION)
        xhat, scale = _normalised(t, width, norm_eps, WIDTH, EVEN)
        n = rounded(xhat, DTYPE, PRECISION)
        linear = kept_linear if KEEP else _scaled_weight(fc1, gamma, width, hidden, WIDTH, HIDDEN, DTYPE, PRECISION)
        h = dot(n, tl.trans(linear), None, PRECISION) + shift[None, :]
        cdf = _cdf(h)

        if not (KEEP or NEED_INPUTS):
            tl.debug_barrier()  # without a write in the loop the compiler takes the weights' loads out of it
        d_f = upstream
        if DROP_MLP:
            d_f *= tl.where(lanes - mlp_begin.to(tl.uint32) < mlp_count.to(tl.uint32), 0.0, mlp_scale)
        if NEED_MLP:
            d_fc2_bias += tl.sum(d_f, 0)
        d_f = rounded(d_f, DTYPE, PRECISION)
        if NEED_MLP:
            a = rounded(h * cdf, DTYPE, PRECISION)
            d_fc2 = dot(tl.trans(d_f), a, d_fc2, PRECISION)
        second = kept_fc2 if KEEP else _weight(fc2, width, hidden, WIDTH, HIDDEN, DTYPE, PRECISION)
        d_h = dot(d_f, second, None, PRECISION) * (cdf + h * DENSITY * tl.exp2(h * h * (-0.5 * LOG2E)))
        if NEED_MLP:
            d_fc1_bias += tl.sum(d_h, 0)
        d_h = rounded(d_h, DTYPE, PRECISION)
        if NEED_MLP:
            d_fc1 = dot(tl.trans(d_h), n, d_fc1, PRECISION)
        if NEED_INPUTS:
            f = dot(d_h, linear, None, PRECISION)
            xhat = n.to(tl.float32)
            along = tl.sum(f * xhat, 1) / width
            f -= (tl.sum(f, 1) / width)[:, None]
            if not EVEN:
                f = tl.where((columns < width)[None, :], f, 0.0)
            d_t = upstream + (f - xhat * along[:, None]) * scale[:, None]
            store(d_v + sequence * length * width, d_t * up, start, rows, there, columns, width, width, 1, EVEN)
            if DROP_PROJ:
                d_t *= tl.where(lanes < proj_end.to(tl.uint32), 0.0, proj_scale)
            if NEED_PROJ:
                d_proj_bias += tl.sum(d_t, 0)
            d_t = rounded(d_t, DTYPE, PRECISION)
            if NEED_PROJ:
                d_proj = dot(tl.trans(d_t), tile, d_proj, PRECISION)
            weight = kept_proj if KEEP else _weight(proj, width, width, WIDTH, WIDTH, DTYPE, PRECISION)
            d_tile = dot(d_t, weight, None, PRECISION) * up
            store(d_y + sequence * length * width, d_tile, start, rows, there, columns, width, width, 1, EVEN)

    # the shares stand one behind the other: Wp, bp, W1, gamma, beta, b1, W2, b2
    area = width * hidden
    shares += tl.program_id(0).to(tl.int64) * ((width + 4) * width + 2 * area + hidden)
    if NEED_PROJ:
        _store_matrix(shares, d_proj * up, width, width, WIDTH, WIDTH)
        _store_row(shares + width * width, d_proj_bias * up, width, WIDTH)
    if NEED_MLP:
        shares += (width + 1) * width
        d_fc1 *= up
        d_fc1_bias *= up
        outer = d_fc1_bias[:, None] * _row(beta, width, WIDTH, 0.0)[None, :]
        _store_matrix(shares, d_fc1 * _row(gamma, width, WIDTH, 1.0)[None, :] + outer, hidden, width, HIDDEN, WIDTH)
        fc1 = matrix(fc1, hidden, width, width, 1, HIDDEN, WIDTH)
        shares += area
        _store_row(shares, tl.sum(fc1 * d_fc1, 0), width, WIDTH)
        _store_row(shares + width, tl.sum(fc1 * d_fc1_bias[:, None], 0), width, WIDTH)
        _store_row(shares + 2 * width, d_fc1_bias, hidden, HIDDEN)
        shares += 2 * width + hidden
        _store_matrix(shares, d_fc2 * up, width, hidden, WIDTH, HIDDEN)
        _store_row(shares + area, d_fc2_bias * up, width, WIDTH)

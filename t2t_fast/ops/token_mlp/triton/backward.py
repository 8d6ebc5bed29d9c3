"""Triton kernel of token_mlp, backward: one pass over the tokens that recomputes all else.

Notation, padding and precision as in ``forward.py``.
"""

import torch
import triton
import triton.language as tl

from ..._common import replay
from ..._common.elementwise import dropped, gelu_and_slope_of, random_lanes, scale_of, spared
from ..._common.tiles import dot, matrix, no_sum, rounded, row_of, sum_of, summed, widened
from ..autograd import MlpParameters, Options
from .forward import (
    VARYING,
    fc1_of,
    fc2_of,
    kept_weights,
    load_tile,
    normalised,
    place_of,
    proj_of,
    store_tile,
)
from .launch import dropout, inner_strides, planned, strided
from .operators import lengths

TOP = tl.constexpr(2.0**-3)
"""Magnitude of the largest scaled gradient: float16 has 2^19 above it and 2^21 below."""


@triton.jit
def _power(value):
    """The largest power of two not above ``value`` > 0, from its bits; 1 for 0 and infinity (no scaling)."""
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
    pointer, mlp, sums, width, hidden, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, PROJ: tl.constexpr, MLP: tl.constexpr
):
    """Store the gradients of Wp, bp (PROJ), W1, gamma, beta, b1, W2, b2 (MLP) consecutively, in the program's row.

    With ``P = sum_t d_h xhat^T``, ``dW1 = P diag(gamma) + db1 beta^T``, ``dgamma = sum_o W1 P``, ``dbeta = W1^T db1``.
    """
    d_proj, d_proj_bias, d_fc1, d_fc1_bias, d_fc2, d_fc2_bias = sums
    area = width * hidden
    pointer += tl.program_id(0).to(tl.int64) * ((width + 4) * width + 2 * area + hidden)
    if PROJ:
        _store_matrix(pointer, d_proj, width, width, WIDTH, WIDTH)
        _store_row(pointer + width * width, d_proj_bias, width, WIDTH)
    if MLP:
        gamma, beta = row_of(mlp.norm_weight, width, WIDTH, 1.0), row_of(mlp.norm_bias, width, WIDTH, 0.0)
        pointer += (width + 1) * width
        outer = d_fc1_bias[:, None] * beta[None, :]
        _store_matrix(pointer, d_fc1 * gamma[None, :] + outer, hidden, width, HIDDEN, WIDTH)
        pointer += area
        fc1 = matrix(mlp.fc1_weight, hidden, width, width, 1, HIDDEN, WIDTH)
        _store_row(pointer, tl.sum(fc1 * d_fc1, 0), width, WIDTH)
        _store_row(pointer + width, tl.sum(fc1 * d_fc1_bias[:, None], 0), width, WIDTH)
        _store_row(pointer + 2 * width, d_fc1_bias, hidden, HIDDEN)
        pointer += 2 * width + hidden
        _store_matrix(pointer, d_fc2, width, hidden, WIDTH, HIDDEN)
        _store_row(pointer + area, d_fc2_bias, width, WIDTH)


@triton.jit(do_not_specialize=VARYING)
def token_mlp_backward_kernel(
    grad,
    y,
    v,
    d_y,
    d_v,
    shares,
    mlp,
    norm_eps,
    seed,
    drop_proj,
    drop_mlp,
    length,
    width: tl.constexpr,
    hidden: tl.constexpr,
    all_tiles,
    own_tiles,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    TOKENS: tl.constexpr,
    EVEN: tl.constexpr,
    OCTETS: tl.constexpr,
    STRIDES: tl.constexpr,
    NEED_INPUTS: tl.constexpr,
    NEED_PROJ: tl.constexpr,
    NEED_MLP: tl.constexpr,
    SCALED: tl.constexpr,
    KEEP: tl.constexpr,
    LEAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_y, d_v, and the program's part of the parameters' gradients; all else is recomputed from y and v.

        d_f = m2 G    d_h = (d_f W2) gelu'(h)    f = gamma (d_h W1)
        d_t = G + (f - mean(f) - xhat mean(f xhat)) / sigma    d_p = m1 d_t    d_y = d_p Wp    d_v = d_t

    Grid (programs); a program owns ``own_tiles`` of ``all_tiles`` tiles. It reads y and v once, and G once, again with
    SCALED and with LEAN 2. It writes d_y and d_v once, and at the end its row of ``shares``, which until then holds the
    vectors that are added to rows. Arguments as in ``token_mlp_kernel``; STRIDES: of token and column of G, y and v.

    Inside the kernel, d_f and d_p exclude dropout's scale, which is applied once to the values linear in them.

    NEED_INPUTS: d_y and d_v, and with NEED_PROJ the projection's gradients. NEED_MLP: those of LayerNorm, fc1 and fc2.
    One launch may compute all of them, or two launches a part each, to hold fewer matrices of sums at once.

    SCALED, for float16: all gradients inside are divided by a power of two, so that the program's largest upstream
    entry is near TOP.

    LEAN: how registers are saved. 1: addresses are recomputed in every iteration. 2: masks too, and G is read again
    where it is needed. 3: as 1, and the three parts of a product are separated by barriers (tiles.dot).
    """
    DTYPE: tl.constexpr = y[0].dtype.element_ty
    THREE: tl.constexpr = tl.float32 == DTYPE and PRECISION != "tf32"
    LARGE: tl.constexpr = TOKENS > 32  # products of smaller tiles do not run as wgmma
    grad = grad[0], grad[1], STRIDES[0], STRIDES[1]
    y = y[0], y[1], STRIDES[2], STRIDES[3]
    v = v[0], v[1], STRIDES[4], STRIDES[5]
    kept, proj_bias, shift, _ = kept_weights(mlp, width, hidden, WIDTH, HIDDEN, DTYPE, KEEP, PRECISION)
    proj_scale, mlp_scale = scale_of(drop_proj), scale_of(drop_mlp)
    # rows are held in memory, in the place of bp's and b1's gradients: a thread would hold 16 values of each
    rows = shares + tl.program_id(0).to(tl.int64) * ((width + 4) * width + 2 * width * hidden + hidden)
    proj_bias_at = rows + width * width
    shift_at = proj_bias_at + (hidden + 3) * width
    if NEED_PROJ:
        _store_row(proj_bias_at, proj_bias, width, WIDTH)
    if NEED_MLP:
        _store_row(shift_at, shift, hidden, HIDDEN)
    tl.debug_barrier()
    seed_at = seed
    if seed is not None:
        seed = tl.load(seed_at)
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
    d_proj, d_proj_bias = tl.zeros([WIDTH, WIDTH], tl.float32), no_sum(WIDTH, DTYPE, LARGE)
    d_fc1, d_fc1_bias = tl.zeros([HIDDEN, WIDTH], tl.float32), no_sum(HIDDEN, DTYPE, LARGE)
    d_fc2, d_fc2_bias = tl.zeros([WIDTH, HIDDEN], tl.float32), no_sum(WIDTH, DTYPE, LARGE)
    for index in tl.range(first, last, disable_licm=LEAN > 0):
        place = place_of(index, length, TOKENS)
        tile = load_tile(y, place, width, TOKENS, WIDTH, EVEN)
        skip = load_tile(v, place, width, TOKENS, WIDTH, EVEN)
        upstream = load_tile(grad, place, width, TOKENS, WIDTH, EVEN)
        lanes = 0
        if seed is not None:
            lanes = random_lanes(seed, place[0] * length + place[1], width, TOKENS, WIDTH, OCTETS).to(tl.uint16)
        d_f = upstream
        if SCALED:
            d_f = d_f.to(tl.float32) * down
        d_f = rounded(spared(d_f, lanes, drop_mlp), DTYPE, PRECISION)
        if NEED_MLP:
            d_fc2_bias = summed(d_f, d_fc2_bias, LARGE, PRECISION)
        proj = kept[0] if KEEP else proj_of(mlp, width, WIDTH, DTYPE, PRECISION)
        if NEED_PROJ:
            proj_bias = row_of(proj_bias_at, width, WIDTH, 0.0)
        t = dot(tile, tl.trans(proj), None, PRECISION, LEAN == 3) + proj_bias[None, :]
        t = dropped(t, lanes, drop_proj) + widened(skip)
        n, scale = normalised(t, width, norm_eps, WIDTH, EVEN)
        n = rounded(n, DTYPE, PRECISION)
        fc1 = kept[1] if KEEP else fc1_of(mlp, width, hidden, WIDTH, HIDDEN, DTYPE, PRECISION)
        if NEED_MLP:
            shift = row_of(shift_at, hidden, HIDDEN, 0.0)
        a, slope = gelu_and_slope_of(dot(n, tl.trans(fc1), None, PRECISION, LEAN == 3) + shift[None, :])

        if NEED_MLP and THREE:  # early, while no other product is live: fewer spills
            d_fc2 = dot(tl.trans(d_f), a, d_fc2, PRECISION, LEAN == 3)
        if not (KEEP or NEED_INPUTS):
            tl.debug_barrier()  # without a write in the loop the compiler hoists the weights' loads
        fc2 = kept[2] if KEEP else fc2_of(mlp, width, hidden, WIDTH, HIDDEN, DTYPE, PRECISION)
        d_h = rounded(dot(d_f, fc2, None, PRECISION, LEAN == 3) * slope, DTYPE, PRECISION)
        if NEED_MLP and not THREE:
            a = rounded(a, DTYPE, PRECISION)
            d_fc2 = dot(tl.trans(d_f), a, d_fc2, PRECISION, LEAN == 3)
        if NEED_MLP:
            d_fc1 = dot(tl.trans(d_h), n, d_fc1, PRECISION, LEAN == 3)
            d_fc1_bias = summed(d_h, d_fc1_bias, LARGE, PRECISION)
        if NEED_INPUTS:
            if not KEEP and PRECISION != "tf32":
                # fewer live values: fewer spills in float32, 76 KiB of shared memory, not 108, at E = F = 128;
                # without a barrier the compiler merges the two reads
                tl.debug_barrier()
                fc1 = fc1_of(mlp, width, hidden, WIDTH, HIDDEN, DTYPE, PRECISION)
            f = dot(d_h, fc1, None, PRECISION, LEAN == 3)
            xhat = widened(n)
            along = tl.sum(f * xhat, 1) / width
            f -= (tl.sum(f, 1) / width)[:, None]
            if not EVEN:
                f = tl.where((tl.arange(0, WIDTH) < width)[None, :], f, 0.0)
            if LEAN == 2:
                tl.debug_barrier()
                upstream = load_tile(grad, place, width, TOKENS, WIDTH, EVEN)
            d_t = widened(upstream) + (f - xhat * along[:, None]) * (scale * (mlp_scale * up))[:, None]
            store_tile(d_v, d_t, place, length, width, TOKENS, WIDTH, EVEN)
            if LEAN == 2 and drop_proj[1] is not None:
                # load the seed again, otherwise the compiler keeps the first masks
                again = tl.load(seed_at, eviction_policy="evict_last")
                lanes = random_lanes(again, place[0] * length + place[1], width, TOKENS, WIDTH, OCTETS).to(tl.uint16)
            if SCALED:
                d_t *= down
            d_t = rounded(spared(d_t, lanes, drop_proj), DTYPE, PRECISION)
            if NEED_PROJ:
                d_proj = dot(tl.trans(d_t), tile, d_proj, PRECISION, LEAN == 3)
                d_proj_bias = summed(d_t, d_proj_bias, LARGE, PRECISION)
            proj = kept[0] if KEEP else proj_of(mlp, width, WIDTH, DTYPE, PRECISION)
            d_p = dot(d_t, proj, None, PRECISION, LEAN == 3) * (up * proj_scale)
            store_tile(d_y, d_p, place, length, width, TOKENS, WIDTH, EVEN)
    proj_up, mlp_up = up * proj_scale, up * mlp_scale
    sums = (
        d_proj * proj_up,
        sum_of(d_proj_bias, LARGE) * proj_up,
        d_fc1 * mlp_up,
        sum_of(d_fc1_bias, LARGE) * mlp_up,
        d_fc2 * mlp_up,
        sum_of(d_fc2_bias, LARGE) * mlp_up,
    )
    _store_shares(shares, mlp, sums, width, hidden, WIDTH, HIDDEN, NEED_PROJ, NEED_MLP)


def launch_token_mlp_backward(grad, y, v, seed, options, mlp, need_parameters):
    """d_y and d_v in y's dtype, and the gradients of the parameters, concatenated, in float32."""
    mlp, options = MlpParameters(*mlp), Options(*options)
    d_y, d_v = (torch.empty(y.shape, dtype=y.dtype, device=y.device) for _ in range(2))
    length = sum(lengths(mlp)) if need_parameters else 0
    if not y.numel():
        return d_y, d_v, torch.zeros(length, dtype=torch.float32, device=y.device)
    operands = [strided(x) for x in (grad, y, v)]
    programs, sizes, parameters, constants = planned("token_mlp_backward", operands, mlp)
    shares = torch.empty(programs, length, dtype=torch.float32, device=y.device)
    mlp = MlpParameters(*(None if t is None else t.contiguous() for t in mlp))
    # what a launch computes: d_y and d_v, the projection's gradients, the others
    parts = [(True, need_parameters, need_parameters)]
    if parameters["split"] and need_parameters:
        parts = [(True, True, False), (False, False, True)]
    for need_inputs, need_proj, need_parameters in parts:
        replay.launch(
            token_mlp_backward_kernel,
            (programs,),
            *operands,
            d_y,
            d_v,
            shares,
            mlp,
            options.norm_eps,
            *dropout(options, seed),
            *sizes,
            STRIDES=inner_strides(operands),
            NEED_INPUTS=need_inputs,
            NEED_PROJ=need_proj,
            NEED_MLP=need_parameters,
            SCALED=y.dtype == torch.float16,
            LEAN=parameters["lean"],
            **constants,
        )
    return d_y, d_v, shares.sum(0)

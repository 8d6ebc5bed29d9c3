"""Triton kernels of the passes in forward.py and backward.py for states too large for one program.

The features are processed in chunks of FEATURES, which are read again for each tile.

The forward pass over the keys needs no chunked kernel: features are independent there, so a program owns one chunk. A
query's softmax runs over all features, so its statistics are accumulated chunk by chunk with a running maximum. Where a
program accumulates sums over tokens for one chunk, the programs of a split divide the per-token gradients: tile t of
the sequence is written by the program of chunk ``t mod chunks``.
"""

import triton
import triton.language as tl

from ..._common.tiles import dot, rounded
from .backward import state_gradients, token_gradients
from .forward import (
    LOG2E,
    LOWEST,
    VARYING,
    features_of,
    half_square,
    load_tile,
    mask_of,
    own_tiles,
    scores_of,
    sequence_of,
    state_of,
    store_features,
    store_tile,
    taking_part,
)


@triton.jit
def _query_chunk(
    tile,
    w,
    lz,
    state,
    begin,
    width,
    features,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """For the features from ``begin``: w, a tile's exponents in base 2 without ``|q|^2 / 2``, and S as an operand."""
    directions, parts = features_of(w, begin, features, width, tile.dtype, WIDTH, FEATURES)
    logs, values = state_of(lz, state, begin, features, width, float("-inf"), WIDTH, FEATURES)
    exponents = scores_of(tile, parts, PRECISION) * LOG2E + logs[None, :]
    return directions, exponents, rounded(values, tile.dtype, PRECISION)


@triton.jit(do_not_specialize=VARYING)
def queries_chunked_kernel(
    q,
    w,
    lz,
    state,
    log_eps,
    out,
    heads,
    length,
    width,
    features,
    tiles_per_split,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
    TOKENS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``y_t = gate_t softmax_i(w_i q_t + lz_i) S``. Grid (sequences, splits); a program owns one split."""
    DTYPE: tl.constexpr = q[0].dtype.element_ty
    sequence, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q, out = sequence_of(q, sequence, heads), sequence_of(out, sequence, heads)
    lz, state = lz + sequence * features, state + sequence * features * width
    rows, columns = tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    first, last = own_tiles(split, tiles_per_split, length, TOKENS)
    for index in range(first, last):
        start = index * TOKENS
        there = rows < length - start
        tile = load_tile(q, start, rows, there, columns, width, EVEN)
        top = tl.full([TOKENS], LOWEST, tl.float32)
        total = tl.zeros([TOKENS], tl.float32)
        y = tl.zeros([TOKENS, WIDTH], tl.float32)
        for begin in range(0, features, FEATURES):
            _, exponents, values = _query_chunk(tile, w, lz, state, begin, width, features, WIDTH, FEATURES, PRECISION)
            above = tl.maximum(top, tl.max(exponents, 1))
            before = tl.exp2(top - above)
            weights = rounded(tl.exp2(exponents - above[:, None]), DTYPE, PRECISION)
            total = total * before + tl.sum(weights.to(tl.float32), 1)
            y = dot(weights, values, y * before[:, None], PRECISION)
            top = above
        scale = tl.where(total == 0.0, 0.0, 1.0 / (total + tl.exp2(log_eps + half_square(tile) - top)))
        store_tile(out, y * scale[:, None], start, rows, there, columns, width, EVEN)


@triton.jit(do_not_specialize=VARYING)
def queries_backward_chunked_kernel(
    grad,
    q,
    w,
    lz,
    state,
    log_eps,
    d_q,
    d_lz,
    d_state,
    d_w,
    heads,
    length,
    width,
    features,
    tiles_per_split,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
    TOKENS: tl.constexpr,
    EVEN: tl.constexpr,
    GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The chunked form of ``queries_backward_kernel``, with the same formulas.

    Grid (sequences, splits, chunks). Every program reads q and dY and accumulates the sum of weights T and the inner
    product of each tile; it writes d_lz, d_S (and d_w) of its chunk for its split, and d_q of its part of the tiles.
    """
    DTYPE: tl.constexpr = q[0].dtype.element_ty
    WIDER: tl.constexpr = "tf32" if GRADIENT != DTYPE else PRECISION
    sequence, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q, grad = sequence_of(q, sequence, heads), sequence_of(grad, sequence, heads)
    d_q = sequence_of(d_q, sequence, heads)
    lz, state = lz + sequence * features, state + sequence * features * width
    rows, columns, feature = tl.arange(0, TOKENS), tl.arange(0, WIDTH), tl.arange(0, FEATURES)
    sums = tl.zeros([TOKENS, FEATURES], tl.float32)
    wide = tl.zeros([WIDTH, FEATURES], tl.float32)
    turned = tl.zeros([WIDTH, FEATURES], tl.float32)
    first, last = own_tiles(split, tiles_per_split, length, TOKENS)
    for index in range(first, last):
        start = index * TOKENS
        there = rows < length - start
        tile = load_tile(q, start, rows, there, columns, width, EVEN)
        upstream = load_tile(grad, start, rows, there, columns, width, EVEN)
        top = tl.full([TOKENS], LOWEST, tl.float32)
        total = tl.zeros([TOKENS], tl.float32)
        inner = tl.zeros([TOKENS], tl.float32)
        for begin in range(0, features, FEATURES):
            _, exponents, values = _query_chunk(tile, w, lz, state, begin, width, features, WIDTH, FEATURES, PRECISION)
            above = tl.maximum(top, tl.max(exponents, 1))
            before = tl.exp2(top - above)
            weights = tl.exp2(exponents - above[:, None])
            along = dot(upstream, tl.trans(values), None, PRECISION)
            total = total * before + tl.sum(weights, 1)
            inner = inner * before + tl.sum(weights * along, 1)
            top = above
        closed = tl.exp2(log_eps + half_square(tile) - top)
        gate = tl.where(total == 0.0, 0.0, total / (total + closed))
        part = tl.where(total == 0.0, 0.0, gate / total)
        inner *= part

        mine = index % tl.num_programs(2) == tl.program_id(2)
        d_tile = -(inner * (1.0 - gate))[:, None] * tile.to(tl.float32)
        for begin in range(0, features, FEATURES):
            own = begin == tl.program_id(2) * FEATURES
            if mine | own:
                directions, exponents, values = _query_chunk(
                    tile, w, lz, state, begin, width, features, WIDTH, FEATURES, PRECISION
                )
                weights = tl.exp2(exponents - top[:, None]) * part[:, None]
                along = dot(upstream, tl.trans(values), None, PRECISION)
                d_scores = weights * (along - inner[:, None])
                operand = rounded(d_scores, GRADIENT, WIDER)
                if own:
                    sums += d_scores
                    wide = dot(tl.trans(upstream), rounded(weights, DTYPE, PRECISION), wide, PRECISION)
                    if d_w is not None:
                        turned = dot(tl.trans(tile.to(GRADIENT)), operand, turned, WIDER)
                d_tile = dot(operand, rounded(directions, GRADIENT, WIDER), d_tile, WIDER)
        if mine:
            store_tile(d_q, d_tile, start, rows, there, columns, width, EVEN)
    begin = tl.program_id(2) * FEATURES
    place = (sequence * tl.num_programs(1) + split) * features + begin + feature
    there = feature < features - begin
    tl.store(d_lz + place, tl.sum(sums, 0), mask=there)
    store_features(d_state, wide, place, there, columns, width)
    if d_w is not None:
        store_features(d_w, turned, place, there, columns, width)


@triton.jit(do_not_specialize=VARYING)
def keys_backward_chunked_kernel(
    k,
    v,
    w,
    mask,
    lz,
    state,
    d_lz,
    d_state,
    skip,
    d_k,
    d_v,
    d_w,
    heads,
    length,
    width,
    features,
    tiles_per_split,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
    TOKENS: tl.constexpr,
    EVEN: tl.constexpr,
    GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The chunked form of ``keys_backward_kernel``, with the same formulas.

    Grid (sequences, splits, chunks); without d_w there is one chunk. A program writes d_k and d_v of its part of the
    tiles, and d_w of its chunk for its split; it reads the other tiles only for d_w. In float32, k and v are read again
    for every chunk.
    """
    DTYPE: tl.constexpr = k[0].dtype.element_ty
    WIDER: tl.constexpr = "tf32" if GRADIENT != DTYPE else PRECISION
    sequence, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k, v = sequence_of(k, sequence, heads), sequence_of(v, sequence, heads)
    if mask is not None:
        mask = mask_of(mask, sequence, heads)
    d_k, d_v = sequence_of(d_k, sequence, heads), sequence_of(d_v, sequence, heads)
    if skip is not None:
        skip = sequence_of(skip, sequence, heads)
    lz, state = lz + sequence * features, state + sequence * features * width
    d_lz, d_state = d_lz + sequence * features, d_state + sequence * features * width
    rows, columns, feature = tl.arange(0, TOKENS), tl.arange(0, WIDTH), tl.arange(0, FEATURES)
    turned = tl.zeros([WIDTH, FEATURES], tl.float32)
    first, last = own_tiles(split, tiles_per_split, length, TOKENS)
    for index in range(first, last):
        start = index * TOKENS
        inside = rows < length - start
        there = taking_part(start, rows, length, mask)
        tile = load_tile(k, start, rows, there, columns, width, EVEN)
        tokens = load_tile(v, start, rows, there, columns, width, EVEN)
        mine = index % tl.num_programs(2) == tl.program_id(2)
        held = tl.zeros([TOKENS], tl.float32)
        d_key = tl.zeros([TOKENS, WIDTH], tl.float32)
        d_value = tl.zeros([TOKENS, WIDTH], tl.float32)
        for begin in range(0, features, FEATURES):
            own = begin == tl.program_id(2) * FEATURES
            if mine | (own & (d_w is not None)):
                if tl.float32 == DTYPE:
                    # keeping the split operands of both tiles through the loop would fill the registers
                    tile = load_tile(k, start, rows, there, columns, width, EVEN)
                    tokens = load_tile(v, start, rows, there, columns, width, EVEN)
                directions, parts = features_of(w, begin, features, width, DTYPE, WIDTH, FEATURES)
                values = state_of(lz, state, begin, features, width, float("inf"), WIDTH, FEATURES)
                gradients = state_of(d_lz, d_state, begin, features, width, 0.0, WIDTH, FEATURES)
                of_state = state_gradients(values, gradients, DTYPE, GRADIENT, PRECISION, FEATURES)
                weights, d_scores = token_gradients(tile, tokens, there, parts, of_state, GRADIENT, PRECISION)
                held += tl.sum(d_scores, 1)
                d_scores = rounded(d_scores, GRADIENT, WIDER)
                weights = rounded(weights, GRADIENT, WIDER)
                d_value = dot(weights, of_state[1].to(GRADIENT), d_value, WIDER)
                d_key = dot(d_scores, rounded(directions, GRADIENT, WIDER), d_key, WIDER)
                if d_w is not None:
                    if own:
                        turned = dot(tl.trans(tile.to(GRADIENT)), d_scores, turned, WIDER)
        if mine:
            if skip is not None:
                more = load_tile(skip, start, rows, inside, columns, width, EVEN)
                d_value += more.to(tl.float32)
            d_key -= held[:, None] * tile.to(tl.float32)
            store_tile(d_v, d_value, start, rows, inside, columns, width, EVEN)
            store_tile(d_k, d_key, start, rows, inside, columns, width, EVEN)
    if d_w is not None:
        begin = tl.program_id(2) * FEATURES
        place = (sequence * tl.num_programs(1) + split) * features + begin + feature
        store_features(d_w, turned, place, feature < features - begin, columns, width)

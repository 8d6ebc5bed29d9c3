"""The passes of kernels.py for states too large for one program: by chunks of FEATURES features, read for each tile.

The pass over the keys needs no second form: features know nothing of each other there, and a program owns a chunk.
A query's softmax runs over all features, so its statistics are gathered chunk by chunk, with a running maximum.
Where sums over tokens are kept for a chunk, the programs of one split share its tiles: number t, counted from the
start of the sequence, has its gradients written by the program of chunk ``t mod chunks``.
"""

import triton
import triton.language as tl

from ..tiles import dot, load, matrix, rounded, store
from .kernels import (
    LOG2E,
    LOWEST,
    VARYING,
    _half_square,
    _key_gradients,
    _key_state,
    _parts,
    _scores,
    _sequence,
    _taking_part,
    _token_gradients,
)


@triton.jit
def _query_chunk(
    w,
    w_row,
    w_column,
    lz,
    state,
    begin,
    width,
    features,
    DTYPE: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Features ``begin`` onwards as the passes over the queries take them: w, w in two parts, lz in base 2, S."""
    own = features - begin
    directions = matrix(w + begin * w_row, own, width, w_row, w_column, FEATURES, WIDTH)
    high, low = _parts(directions, DTYPE, SPLIT)
    logs, values = _key_state(lz + begin, state + begin * width, width, own, float("-inf"), WIDTH, FEATURES)
    return directions, high, low, logs, rounded(values, DTYPE, PRECISION)


@triton.jit(do_not_specialize=VARYING)
def queries_chunked_kernel(
    q,
    q_batch,
    q_head,
    q_token,
    q_column,
    w,
    w_row,
    w_column,
    lz,
    state,
    log_eps,
    out,
    out_batch,
    out_head,
    out_token,
    out_column,
    heads,
    length,
    width,
    features,
    tiles_per_split,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
    TOKENS: tl.constexpr,
    EVEN: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``y_t = gate_t softmax_i(w_i q_t + lz_i) S``. Grid (sequences, splits); reads q once, writes y once."""
    DTYPE: tl.constexpr = q.dtype.element_ty
    sequence, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q = _sequence(q, sequence, heads, q_batch, q_head)
    out = _sequence(out, sequence, heads, out_batch, out_head)
    lz, state = lz + sequence * features, state + sequence * features * width
    rows, columns = tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    first = split * tiles_per_split
    for index in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(length, TOKENS))):
        start = index * TOKENS
        there = rows < length - start
        tile = load(q, start, rows, there, columns, width, q_token, q_column, EVEN)
        top = tl.full([TOKENS], LOWEST, tl.float32)
        total = tl.zeros([TOKENS], tl.float32)
        y = tl.zeros([TOKENS, WIDTH], tl.float32)
        for begin in range(0, features, FEATURES):
            _, high, low, logs, values = _query_chunk(
                w, w_row, w_column, lz, state, begin, width, features, DTYPE, SPLIT, PRECISION, WIDTH, FEATURES
            )
            exponents = _scores(tile, high, low, SPLIT, PRECISION) * LOG2E + logs[None, :]
            above = tl.maximum(top, tl.max(exponents, 1))
            before = tl.exp2(top - above)
            weights = rounded(tl.exp2(exponents - above[:, None]), DTYPE, PRECISION)
            total = total * before + tl.sum(weights.to(tl.float32), 1)
            y = dot(weights, values, y * before[:, None], PRECISION)
            top = above
        scale = tl.where(total == 0.0, 0.0, 1.0 / (total + tl.exp2(log_eps + _half_square(tile) - top)))
        store(out, y * scale[:, None], start, rows, there, columns, width, out_token, out_column, EVEN)


@triton.jit(do_not_specialize=VARYING)
def queries_backward_chunked_kernel(
    grad,
    grad_batch,
    grad_head,
    grad_token,
    grad_column,
    q,
    q_batch,
    q_head,
    q_token,
    q_column,
    w,
    w_row,
    w_column,
    lz,
    state,
    log_eps,
    d_q,
    d_q_batch,
    d_q_head,
    d_q_token,
    d_q_column,
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
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    GRADIENT: tl.constexpr,
    NEED_W: tl.constexpr,
):
    """The gradients of ``queries_backward_kernel``, which has the formulas.

    Grid (sequences, splits, chunks). Every program streams q and dY and gathers each tile's sum of weights T and inner
    product; it writes d_lz, d_S (and d_w) of its chunk for its split, and d_q of its share of the tiles.
    """
    DTYPE: tl.constexpr = q.dtype.element_ty
    WIDER: tl.constexpr = "tf32" if GRADIENT != DTYPE else PRECISION
    sequence, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q = _sequence(q, sequence, heads, q_batch, q_head)
    grad = _sequence(grad, sequence, heads, grad_batch, grad_head)
    d_q = _sequence(d_q, sequence, heads, d_q_batch, d_q_head)
    lz, state = lz + sequence * features, state + sequence * features * width
    rows, columns, feature = tl.arange(0, TOKENS), tl.arange(0, WIDTH), tl.arange(0, FEATURES)
    sums = tl.zeros([TOKENS, FEATURES], tl.float32)
    wide = tl.zeros([WIDTH, FEATURES], tl.float32)
    turned = tl.zeros([WIDTH, FEATURES], tl.float32)
    first = split * tiles_per_split
    for index in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(length, TOKENS))):
        start = index * TOKENS
        there = rows < length - start
        tile = load(q, start, rows, there, columns, width, q_token, q_column, EVEN)
        upstream = load(grad, start, rows, there, columns, width, grad_token, grad_column, EVEN)
        top = tl.full([TOKENS], LOWEST, tl.float32)
        total = tl.zeros([TOKENS], tl.float32)
        inner = tl.zeros([TOKENS], tl.float32)
        for begin in range(0, features, FEATURES):
            _, high, low, logs, values = _query_chunk(
                w, w_row, w_column, lz, state, begin, width, features, DTYPE, SPLIT, PRECISION, WIDTH, FEATURES
            )
            exponents = _scores(tile, high, low, SPLIT, PRECISION) * LOG2E + logs[None, :]
            above = tl.maximum(top, tl.max(exponents, 1))
            before = tl.exp2(top - above)
            weights = tl.exp2(exponents - above[:, None])
            along = dot(upstream, tl.trans(values), None, PRECISION)
            total = total * before + tl.sum(weights, 1)
            inner = inner * before + tl.sum(weights * along, 1)
            top = above
        closed = tl.exp2(log_eps + _half_square(tile) - top)
        gate = tl.where(total == 0.0, 0.0, total / (total + closed))
        part = tl.where(total == 0.0, 0.0, gate / total)
        inner *= part

        mine = index % tl.num_programs(2) == tl.program_id(2)
        d_tile = -(inner * (1.0 - gate))[:, None] * tile.to(tl.float32)
        for begin in range(0, features, FEATURES):
            own = begin == tl.program_id(2) * FEATURES
            if mine | own:
                directions, high, low, logs, values = _query_chunk(
                    w, w_row, w_column, lz, state, begin, width, features, DTYPE, SPLIT, PRECISION, WIDTH, FEATURES
                )
                exponents = _scores(tile, high, low, SPLIT, PRECISION) * LOG2E + logs[None, :]
                weights = tl.exp2(exponents - top[:, None]) * part[:, None]
                along = dot(upstream, tl.trans(values), None, PRECISION)
                d_scores = weights * (along - inner[:, None])
                operand = rounded(d_scores, GRADIENT, WIDER)
                if own:
                    sums += d_scores
                    wide = dot(tl.trans(upstream), rounded(weights, DTYPE, PRECISION), wide, PRECISION)
                    if NEED_W:
                        turned = dot(tl.trans(tile.to(GRADIENT)), operand, turned, WIDER)
                d_tile = dot(operand, rounded(directions, GRADIENT, WIDER), d_tile, WIDER)
        if mine:
            store(d_q, d_tile, start, rows, there, columns, width, d_q_token, d_q_column, EVEN)
    begin = tl.program_id(2) * FEATURES
    place = (sequence * tl.num_programs(1) + split) * features + begin + feature
    there = feature < features - begin
    inside = there[None, :] & (columns < width)[:, None]
    offsets = place[None, :] * width + columns[:, None]
    tl.store(d_lz + place, tl.sum(sums, 0), mask=there)
    tl.store(d_state + offsets, wide, mask=inside)
    if NEED_W:
        tl.store(d_w + offsets, turned, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def keys_backward_chunked_kernel(
    k,
    k_batch,
    k_head,
    k_token,
    k_column,
    v,
    v_batch,
    v_head,
    v_token,
    v_column,
    w,
    w_row,
    w_column,
    mask,
    mask_batch,
    mask_token,
    lz,
    state,
    d_lz,
    d_state,
    skip,
    skip_batch,
    skip_head,
    skip_token,
    skip_column,
    d_k,
    d_k_batch,
    d_k_head,
    d_k_token,
    d_k_column,
    d_v,
    d_v_batch,
    d_v_head,
    d_v_token,
    d_v_column,
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
    MASKED: tl.constexpr,
    SKIP: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    GRADIENT: tl.constexpr,
    NEED_W: tl.constexpr,
):
    """The gradients of ``keys_backward_kernel``, which has the formulas.

    Grid (sequences, splits, chunks), one chunk without NEED_W. A program writes d_k and d_v of its share of the tiles,
    and d_w of its chunk for its split, for which alone it reads the other tiles.
    """
    DTYPE: tl.constexpr = k.dtype.element_ty
    WIDER: tl.constexpr = "tf32" if GRADIENT != DTYPE else PRECISION
    sequence, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k = _sequence(k, sequence, heads, k_batch, k_head)
    v = _sequence(v, sequence, heads, v_batch, v_head)
    d_k = _sequence(d_k, sequence, heads, d_k_batch, d_k_head)
    d_v = _sequence(d_v, sequence, heads, d_v_batch, d_v_head)
    if SKIP:
        skip = _sequence(skip, sequence, heads, skip_batch, skip_head)
    if MASKED:
        mask += sequence // heads * mask_batch
    lz, state = lz + sequence * features, state + sequence * features * width
    d_lz, d_state = d_lz + sequence * features, d_state + sequence * features * width
    rows, columns, feature = tl.arange(0, TOKENS), tl.arange(0, WIDTH), tl.arange(0, FEATURES)
    turned = tl.zeros([WIDTH, FEATURES], tl.float32)
    first = split * tiles_per_split
    for index in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(length, TOKENS))):
        start = index * TOKENS
        inside = rows < length - start
        there = _taking_part(start, rows, length, mask, mask_token, MASKED)
        tile = load(k, start, rows, there, columns, width, k_token, k_column, EVEN)
        tokens = load(v, start, rows, there, columns, width, v_token, v_column, EVEN)
        mine = index % tl.num_programs(2) == tl.program_id(2)
        held = tl.zeros([TOKENS], tl.float32)
        d_key = tl.zeros([TOKENS, WIDTH], tl.float32)
        d_value = tl.zeros([TOKENS, WIDTH], tl.float32)
        for begin in range(0, features, FEATURES):
            own = begin == tl.program_id(2) * FEATURES
            if mine | (own & NEED_W):
                count = features - begin
                directions = matrix(w + begin * w_row, count, width, w_row, w_column, FEATURES, WIDTH)
                high, low = _parts(directions, DTYPE, SPLIT)
                logs, d_values, scale, shift = _key_gradients(
                    lz + begin,
                    state + begin * width,
                    d_lz + begin,
                    d_state + begin * width,
                    width,
                    count,
                    DTYPE,
                    GRADIENT,
                    PRECISION,
                    WIDTH,
                    FEATURES,
                )
                weights, d_scores = _token_gradients(
                    tile, tokens, there, high, low, logs, d_values, scale, shift, GRADIENT, SPLIT, PRECISION
                )
                held += tl.sum(d_scores, 1)
                d_scores = rounded(d_scores, GRADIENT, WIDER)
                weights = rounded(weights, GRADIENT, WIDER)
                d_value = dot(weights, d_values.to(GRADIENT), d_value, WIDER)
                d_key = dot(d_scores, rounded(directions, GRADIENT, WIDER), d_key, WIDER)
                if NEED_W:
                    if own:
                        turned = dot(tl.trans(tile.to(GRADIENT)), d_scores, turned, WIDER)
        if mine:
            if SKIP:
                more = load(skip, start, rows, inside, columns, width, skip_token, skip_column, EVEN)
                d_value += more.to(tl.float32)
            d_key -= held[:, None] * tile.to(tl.float32)
            store(d_v, d_value, start, rows, inside, columns, width, d_v_token, d_v_column, EVEN)
            store(d_k, d_key, start, rows, inside, columns, width, d_k_token, d_k_column, EVEN)
    if NEED_W:
        begin = tl.program_id(2) * FEATURES
        place = (sequence * tl.num_programs(1) + split) * features + begin + feature
        inside = (feature < features - begin)[None, :] & (columns < width)[:, None]
        tl.store(d_w + place[None, :] * width + columns[:, None], turned, mask=inside)

"""Triton kernels of Performer attention: two passes forward, two backward, and a merge (docs/performer.md).

Letters as everywhere: L tokens, E token width, m random features; a sequence is one (sample, head). A program owns
the tokens of one *split* of one sequence, in tiles of TOKENS, and keeps (m, E) values in registers. WIDTH and FEATURES
are E and m rounded up to what a matrix instruction takes; what is beyond E or m is never stored.

Exponents are kept in base 2. Operands of matrix products are in the inputs' dtype (SPLIT: the features in two parts, so
that float32 features lose nothing), sums, states and exponents in float32. What weighs a value is summed as rounded.
Gradients that may leave the range of float16 go through TF32 (GRADIENT) or carry a scale for each feature.
"""

import triton
import triton.language as tl

from ..tiles import dot, load, matrix, narrowed, rounded, store

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.0e38)
"""Stands for minus infinity where a difference of two must not be NaN."""

TRUSTED = tl.constexpr(2.0**60)
"""A sum of weights below this was formed without overflow in any supported dtype."""

VARYING = ("heads", "length", "tiles_per_split", "splits")
"""Arguments whose values make no other kernel, so that another image size or batch compiles nothing."""


@triton.jit
def _sequence(pointer, sequence, heads, batch_stride, head_stride):
    """Where a sequence of a (B, heads, L, E) view starts."""
    return pointer + sequence // heads * batch_stride + sequence % heads * head_stride


@triton.jit
def _parts(w, DTYPE: tl.constexpr, SPLIT: tl.constexpr):
    """The features as operands: rounded, and with SPLIT what the rounding lost."""
    high = narrowed(w, DTYPE)
    low = narrowed(w - high.to(tl.float32), DTYPE) if SPLIT else high
    return high, low


@triton.jit
def _scores(x, high, low, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """``w x`` of a tile (TOKENS, WIDTH): (TOKENS, FEATURES)."""
    scores = dot(x, tl.trans(high), None, PRECISION)
    if SPLIT:
        scores = dot(x, tl.trans(low), scores, PRECISION)
    return scores


@triton.jit
def _half_square(x):
    """``|x|^2 / 2`` of each token, in base 2."""
    x = x.to(tl.float32)
    return tl.sum(x * x, 1) * (0.5 * LOG2E)


@triton.jit
def _taking_part(start, rows, length, mask, mask_stride, MASKED: tl.constexpr):
    """Which tokens of a tile there are, and the key mask lets through."""
    there = rows < length - start
    if MASKED:
        there &= tl.load(mask + start.to(tl.int64) * mask_stride + rows * mask_stride, mask=there, other=0) != 0
    return there


@triton.jit
def _key_exponents(k, taking_part, high, low, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """``a(k)`` in base 2, minus infinity for tokens that take no part."""
    half = tl.where(taking_part, _half_square(k), float("inf"))
    return _scores(k, high, low, SPLIT, PRECISION) * LOG2E - half[:, None]


@triton.jit(do_not_specialize=VARYING)
def keys_kernel(
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
    SPLIT: tl.constexpr,
    HEADROOM: tl.constexpr,
    SPECULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The key state of one split: ``lz_i = logsumexp_t a_i(k_t)`` and ``S_i = sum_t softmax_t(a_i(k_t)) v_t``.

    Grid (sequences, splits, chunks of FEATURES features). Reads k and v once, writes lz and S of its features in
    float32 for its split.

    A running maximum needs every warp's opinion on every tile. With SPECULATE the maximum over the first tile, HEADROOM
    below the top of the operands' range, serves as shift for all; only where the sums show that a weight left the range
    does the program stream its tokens again, with a running maximum.
    """
    DTYPE: tl.constexpr = k.dtype.element_ty
    sequence, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k = _sequence(k, sequence, heads, k_batch, k_head)
    v = _sequence(v, sequence, heads, v_batch, v_head)
    if MASKED:
        mask += sequence // heads * mask_batch
    rows, columns = tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    begin = tl.program_id(2) * FEATURES
    own = features - begin
    high, low = _parts(matrix(w + begin * w_row, own, width, w_row, w_column, FEATURES, WIDTH), DTYPE, SPLIT)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(length, TOKENS))

    shift = tl.full([FEATURES], LOWEST, tl.float32)
    total = tl.zeros([FEATURES], tl.float32)
    wide = tl.zeros([WIDTH, FEATURES], tl.float32)
    running, again = not SPECULATE, True
    while again:
        shift = tl.full([FEATURES], LOWEST, tl.float32)
        sums = tl.zeros([TOKENS, FEATURES], tl.float32)
        wide = tl.zeros([WIDTH, FEATURES], tl.float32)
        for index in range(first, last):
            start = index * TOKENS
            there = _taking_part(start, rows, length, mask, mask_token, MASKED)
            tile = load(k, start, rows, there, columns, width, k_token, k_column, EVEN)
            values = load(v, start, rows, there, columns, width, v_token, v_column, EVEN)
            exponents = _key_exponents(tile, there, high, low, SPLIT, PRECISION)
            if running | (index == first):
                above = tl.maximum(shift, tl.max(exponents, 0) + HEADROOM)
                before = tl.exp2(shift - above)[None, :]
                sums, wide, shift = sums * before, wide * before, above
            weights = rounded(tl.exp2(exponents - shift[None, :]), DTYPE, PRECISION)
            sums += weights.to(tl.float32)
            wide = dot(tl.trans(values), weights, wide, PRECISION)
        total = tl.sum(sums, 0)
        again = (not running) & (tl.sum(tl.where(total < TRUSTED, 0, 1), 0) > 0)  # NaN is not below
        running = True

    feature = tl.arange(0, FEATURES)
    place = (sequence * tl.num_programs(1) + split) * features + begin + feature
    tl.store(lz + place, (shift + tl.log2(total)) * LN2, mask=feature < own)
    wide = wide * tl.where(total == 0.0, 0.0, 1.0 / total)[None, :]
    inside = (feature < own)[None, :] & (columns < width)[:, None]
    tl.store(state + place[None, :] * width + columns[:, None], wide, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def merge_kernel(lz, state, merged_lz, merged_state, width, features, splits, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One key state of several splits', in their order. Grid (sequences, m); a program owns one feature."""
    sequence, feature = tl.program_id(0).to(tl.int64), tl.program_id(1)
    block, columns = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    lz += sequence * splits * features + feature
    state += (sequence * splits * features + feature) * width
    top = tl.full([BLOCK], LOWEST, tl.float32)
    for first in range(0, splits, BLOCK):
        index = first + block
        top = tl.maximum(top, tl.load(lz + index * features, mask=index < splits, other=float("-inf")))
    top = tl.max(top, 0)
    total = tl.zeros([BLOCK], tl.float32)
    wide = tl.zeros([BLOCK, WIDTH], tl.float32)
    for first in range(0, splits, BLOCK):
        index = first + block
        there = index < splits
        weights = tl.exp2((tl.load(lz + index * features, mask=there, other=float("-inf")) - top) * LOG2E)
        inside = there[:, None] & (columns < width)[None, :]
        offsets = index.to(tl.int64)[:, None] * features * width + columns[None, :]
        wide += tl.load(state + offsets, mask=inside, other=0.0) * weights[:, None]
        total += weights
    total = tl.sum(total, 0)
    row = tl.sum(wide, 0) * tl.where(total == 0.0, 0.0, 1.0 / total)
    place = sequence * features + feature
    tl.store(merged_lz + place, top + tl.log2(total) * LN2)
    tl.store(merged_state + place * width + columns, row, mask=columns < width)


@triton.jit
def _key_state(lz, state, width, features, missing, WIDTH: tl.constexpr, FEATURES: tl.constexpr):
    """lz in base 2, ``missing`` beyond the last feature, and S (FEATURES, WIDTH)."""
    feature = tl.arange(0, FEATURES)
    logs = tl.load(lz + feature, mask=feature < features, other=missing) * LOG2E
    return logs, matrix(state, features, width, width, 1, FEATURES, WIDTH)


@triton.jit
def _query_weights(q, logs, log_eps, high, low, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Softmax weights over the features before their division, and what the closed part of the gate adds to their sum.

    ``log_eps = log2(m eps)``. With T the sum of the weights and c the second value, ``gate / T = 1 / (T + c)``; where
    the gate is shut c is infinite.
    """
    exponents = _scores(q, high, low, SPLIT, PRECISION) * LOG2E + logs[None, :]
    top = tl.maximum(tl.max(exponents, 1), LOWEST)
    return tl.exp2(exponents - top[:, None]), tl.exp2(log_eps + _half_square(q) - top)


@triton.jit(do_not_specialize=VARYING)
def queries_kernel(
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
    rows, columns = tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    high, low = _parts(matrix(w, features, width, w_row, w_column, FEATURES, WIDTH), DTYPE, SPLIT)
    lz, state = lz + sequence * features, state + sequence * features * width
    logs, values = _key_state(lz, state, width, features, float("-inf"), WIDTH, FEATURES)
    values = rounded(values, DTYPE, PRECISION)
    first = split * tiles_per_split
    for index in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(length, TOKENS))):
        start = index * TOKENS
        there = rows < length - start
        tile = load(q, start, rows, there, columns, width, q_token, q_column, EVEN)
        weights, closed = _query_weights(tile, logs, log_eps, high, low, SPLIT, PRECISION)
        weights = rounded(weights, DTYPE, PRECISION)
        total = tl.sum(weights.to(tl.float32), 1)
        scale = tl.where(total == 0.0, 0.0, 1.0 / (total + closed))
        y = dot(weights, values, None, PRECISION) * scale[:, None]
        store(out, y, start, rows, there, columns, width, out_token, out_column, EVEN)


@triton.jit(do_not_specialize=VARYING)
def queries_backward_kernel(
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
    """d_q, and this split's share of the gradients of lz, S (and w); with p the softmax weights and g the gate

        along_i = dY . S_i    inner = sum_i p_i along_i    d_l_i = p_i g (along_i - g inner)
        d_q = sum_i d_l_i w_i - g (1 - g) inner q    d_S_i = sum_t p_i g dY    d_lz_i = sum_t d_l_i

    Grid (sequences, splits); reads q and dY once, writes d_q once and (m), (m, E) float32 for its split.
    """
    DTYPE: tl.constexpr = q.dtype.element_ty
    WIDER: tl.constexpr = "tf32" if GRADIENT != DTYPE else PRECISION
    sequence, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q = _sequence(q, sequence, heads, q_batch, q_head)
    grad = _sequence(grad, sequence, heads, grad_batch, grad_head)
    d_q = _sequence(d_q, sequence, heads, d_q_batch, d_q_head)
    rows, columns, feature = tl.arange(0, TOKENS), tl.arange(0, WIDTH), tl.arange(0, FEATURES)
    directions = matrix(w, features, width, w_row, w_column, FEATURES, WIDTH)
    high, low = _parts(directions, DTYPE, SPLIT)
    directions = rounded(directions, GRADIENT, WIDER)
    lz, state = lz + sequence * features, state + sequence * features * width
    logs, values = _key_state(lz, state, width, features, float("-inf"), WIDTH, FEATURES)
    values = rounded(values, DTYPE, PRECISION)
    sums = tl.zeros([TOKENS, FEATURES], tl.float32)
    wide = tl.zeros([WIDTH, FEATURES], tl.float32)
    turned = tl.zeros([WIDTH, FEATURES], tl.float32)
    first = split * tiles_per_split
    for index in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(length, TOKENS))):
        start = index * TOKENS
        there = rows < length - start
        tile = load(q, start, rows, there, columns, width, q_token, q_column, EVEN)
        upstream = load(grad, start, rows, there, columns, width, grad_token, grad_column, EVEN)
        weights, closed = _query_weights(tile, logs, log_eps, high, low, SPLIT, PRECISION)
        total = tl.sum(weights, 1)
        gate = tl.where(total == 0.0, 0.0, total / (total + closed))
        weights *= tl.where(total == 0.0, 0.0, 1.0 / total)[:, None]
        along = dot(upstream, tl.trans(values), None, PRECISION)
        inner = tl.sum(weights * along, 1) * gate
        weights *= gate[:, None]
        d_scores = weights * (along - inner[:, None])
        sums += d_scores
        d_scores = rounded(d_scores, GRADIENT, WIDER)
        wide = dot(tl.trans(upstream), rounded(weights, DTYPE, PRECISION), wide, PRECISION)
        if NEED_W:
            turned = dot(tl.trans(tile.to(GRADIENT)), d_scores, turned, WIDER)
        d_tile = dot(d_scores, directions, None, WIDER)
        d_tile -= (inner * (1.0 - gate))[:, None] * tile.to(tl.float32)
        store(d_q, d_tile, start, rows, there, columns, width, d_q_token, d_q_column, EVEN)
    place = (sequence * tl.num_programs(1) + split) * features + feature
    inside = (feature < features)[None, :] & (columns < width)[:, None]
    offsets = place[None, :] * width + columns[:, None]
    tl.store(d_lz + place, tl.sum(sums, 0), mask=feature < features)
    tl.store(d_state + offsets, wide, mask=inside)
    if NEED_W:
        tl.store(d_w + offsets, turned, mask=inside)


@triton.jit
def _key_gradients(
    lz,
    state,
    d_lz,
    d_state,
    width,
    features,
    DTYPE: tl.constexpr,
    GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """What :func:`_token_gradients` needs of the key state: lz, d_S and its scale, and ``d_S_i . S_i - d_lz_i``."""
    logs, values = _key_state(lz, state, width, features, float("inf"), WIDTH, FEATURES)
    logs = tl.where(logs == float("-inf"), float("inf"), logs)  # no key took part
    slope, d_values = _key_state(d_lz, d_state, width, features, 0.0, WIDTH, FEATURES)
    if GRADIENT != DTYPE:
        scale = tl.max(tl.abs(d_values), 1)
        scale = tl.where(scale > 0.0, scale, 1.0)
        d_values /= scale[:, None]
        d_values = narrowed(d_values, DTYPE)
        shift = scale * tl.sum(d_values.to(tl.float32) * values, 1) - slope * LN2
    else:
        scale = tl.full([FEATURES], 1.0, tl.float32)
        d_values = rounded(d_values, DTYPE, PRECISION)
        shift = tl.sum(d_values.to(tl.float32) * values, 1) - slope * LN2
    return logs, d_values, scale, shift


@triton.jit
def _token_gradients(
    k,
    v,
    there,
    high,
    low,
    logs,
    d_values,
    scale,
    shift,
    GRADIENT: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The weights P of a tile's keys, times the scale of d_S, and ``d_a``; both (TOKENS, FEATURES) float32."""
    DTYPE: tl.constexpr = k.dtype
    weights = tl.exp2(_key_exponents(k, there, high, low, SPLIT, PRECISION) - logs[None, :])
    along = dot(v, tl.trans(d_values), None, PRECISION)
    if GRADIENT != DTYPE:
        along *= scale[None, :]
    d_scores = weights * (along - shift[None, :])
    if GRADIENT != DTYPE:
        weights *= scale[None, :]
    return weights, d_scores


@triton.jit(do_not_specialize=VARYING)
def keys_backward_kernel(
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
    """d_k and d_v (and this split's share of d_w); with P the softmax weights over tokens

        d_a_i = P_i (v . d_S_i - (d_S_i . S_i - d_lz_i))
        d_k = sum_i d_a_i w_i - k sum_i d_a_i    d_v = sum_i P_i d_S_i

    SKIP: what else flows into v is added to d_v. In float16, d_S is scaled to a largest entry of 1 for each feature;
    the scale goes onto P, whose products therefore run in TF32. Grid (sequences, splits).
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
    rows, columns, feature = tl.arange(0, TOKENS), tl.arange(0, WIDTH), tl.arange(0, FEATURES)
    directions = matrix(w, features, width, w_row, w_column, FEATURES, WIDTH)
    high, low = _parts(directions, DTYPE, SPLIT)
    directions = rounded(directions, GRADIENT, WIDER)
    lz, state = lz + sequence * features, state + sequence * features * width
    d_lz, d_state = d_lz + sequence * features, d_state + sequence * features * width
    logs, d_values, scale, shift = _key_gradients(
        lz, state, d_lz, d_state, width, features, DTYPE, GRADIENT, PRECISION, WIDTH, FEATURES
    )
    turned = tl.zeros([WIDTH, FEATURES], tl.float32)
    first = split * tiles_per_split
    for index in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(length, TOKENS))):
        start = index * TOKENS
        there = _taking_part(start, rows, length, mask, mask_token, MASKED)
        tile = load(k, start, rows, there, columns, width, k_token, k_column, EVEN)
        skipped = load(v, start, rows, there, columns, width, v_token, v_column, EVEN)
        weights, d_scores = _token_gradients(
            tile, skipped, there, high, low, logs, d_values, scale, shift, GRADIENT, SPLIT, PRECISION
        )
        held = tl.sum(d_scores, 1)
        d_scores = rounded(d_scores, GRADIENT, WIDER)
        d_tile = dot(rounded(weights, GRADIENT, WIDER), d_values.to(GRADIENT), None, WIDER)
        if SKIP:
            inside = rows < length - start
            d_tile += load(skip, start, rows, inside, columns, width, skip_token, skip_column, EVEN).to(tl.float32)
        inside = rows < length - start
        store(d_v, d_tile, start, rows, inside, columns, width, d_v_token, d_v_column, EVEN)
        if NEED_W:
            turned = dot(tl.trans(tile.to(GRADIENT)), d_scores, turned, WIDER)
        d_tile = dot(d_scores, directions, None, WIDER) - held[:, None] * tile.to(tl.float32)
        store(d_k, d_tile, start, rows, inside, columns, width, d_k_token, d_k_column, EVEN)
    if NEED_W:
        place = (sequence * tl.num_programs(1) + split) * features + feature
        inside = (feature < features)[None, :] & (columns < width)[:, None]
        tl.store(d_w + place[None, :] * width + columns[:, None], turned, mask=inside)

"""Triton kernels of Performer attention: the two forward passes and a merge (docs/performer.md).

Notation: L tokens, E token width, m random features; a sequence is one (sample, head). A program owns the tokens of one
*split* of one sequence, in tiles of TOKENS, and holds (m, E) values in registers. WIDTH and FEATURES are E and m
rounded up to a size that matrix instructions support; entries beyond E or m are never stored.

A tensor and its strides are one argument: (B, heads, L, E) is a pointer and four strides, w a pointer and two. If the
dtype of w differs from that of the tokens, w is split into two parts, so that float32 features lose no precision.

Exponents are in base 2. Operands of matrix products have the inputs' dtype; sums, states and exponents are float32. A
sum of weights adds the rounded weights that the products use.
"""

import torch
import triton
import triton.language as tl

from ..._common import replay
from ..._common import triton_runtime as runtime
from ..._common.launch_table import padded
from ..._common.tiles import dot, load, matrix, narrowed, rounded, store, widened
from .call import HEADROOM, Call, mask, readable, strided

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.0e38)
"""A finite stand-in for minus infinity, so that the difference of two is not NaN."""

TRUSTED = tl.constexpr(2.0**60)
"""A sum of weights below this limit did not overflow in any supported dtype."""

VARYING = ("heads", "length", "tiles_per_split", "splits")
"""Arguments excluded from specialisation: a new image size or batch size needs no new compilation."""


@triton.jit
def sequence_of(x, sequence, heads):
    """One sequence of a (B, heads, L, E) tensor: a pointer and the strides of tokens and columns."""
    pointer, batch, head, token, column = x
    return pointer + sequence // heads * batch + sequence % heads * head, token, column


@triton.jit
def load_tile(x, start, rows, there, columns, width, EVEN: tl.constexpr):
    """A tile of a sequence, loaded by :func:`tiles.load`."""
    return load(x[0], start, rows, there, columns, width, x[1], x[2], EVEN)


@triton.jit
def store_tile(x, value, start, rows, there, columns, width, EVEN: tl.constexpr):
    store(x[0], value, start, rows, there, columns, width, x[1], x[2], EVEN)


@triton.jit
def own_tiles(split, tiles_per_split, length, TOKENS: tl.constexpr):
    """The first tile of a split, and one past its last tile."""
    first = split * tiles_per_split
    return first, tl.minimum(first + tiles_per_split, tl.cdiv(length, TOKENS))


@triton.jit
def features_of(w, begin, features, width, DTYPE: tl.constexpr, WIDTH: tl.constexpr, FEATURES: tl.constexpr):
    """The features from ``begin`` in float32, and as operands: rounded, and the remainder if it is not 0."""
    pointer, row, column = w
    whole = matrix(pointer + begin * row, features - begin, width, row, column, FEATURES, WIDTH)
    high = narrowed(whole, DTYPE)
    parts = (high,)
    if pointer.dtype.element_ty != DTYPE:
        parts = (high, narrowed(whole - high.to(tl.float32), DTYPE))
    return whole, parts


@triton.jit
def scores_of(x, parts, PRECISION: tl.constexpr):
    """``w x`` of a tile (TOKENS, WIDTH): (TOKENS, FEATURES)."""
    scores = dot(x, tl.trans(parts[0]), None, PRECISION)
    if len(parts) > 1:
        scores = dot(x, tl.trans(parts[1]), scores, PRECISION)
    return scores


@triton.jit
def half_square(x):
    """``|x|^2 / 2`` of each token, in base 2."""
    x = widened(x)
    return tl.sum(x * x, 1) * (0.5 * LOG2E)


@triton.jit
def mask_of(mask, sequence, heads):
    """The row of a (B, L) mask for one sequence: a pointer and the token stride."""
    pointer, batch, token = mask
    return pointer + sequence // heads * batch, token


@triton.jit
def taking_part(start, rows, length, mask):
    """Which tokens of a tile exist and are not masked."""
    there = rows < length - start
    if mask is not None:
        pointer, stride = mask
        there &= tl.load(pointer + start.to(tl.int64) * stride + rows * stride, mask=there, other=0) != 0
    return there


@triton.jit
def key_exponents(k, there, parts, PRECISION: tl.constexpr):
    """``a(k)`` in base 2, minus infinity for missing and masked tokens."""
    half = tl.where(there, half_square(k), float("inf"))
    return scores_of(k, parts, PRECISION) * LOG2E - half[:, None]


@triton.jit
def store_features(pointer, value, place, there, columns, width):
    """A (WIDTH, FEATURES) value, transposed, as the rows ``place`` (if ``there``) of a contiguous (..., E) tensor."""
    inside = there[None, :] & (columns < width)[:, None]
    tl.store(pointer + place[None, :] * width + columns[:, None], value, mask=inside)


@triton.jit
def gathered(
    exponents, values, sums, wide, shift, follow, HEADROOM: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr
):
    """Add a tile's keys to the running sums: weights, S^T before its division, and the shift.

    follow: whether the shift is raised to this tile's maximum. HEADROOM: :func:`keys_kernel`.
    """
    if follow:
        above = tl.maximum(shift, tl.max(exponents, 0) + HEADROOM)
        before = tl.exp2(shift - above)[None, :]
        sums, wide, shift = sums * before, wide * before, above
    weights = rounded(tl.exp2(exponents - shift[None, :]), DTYPE, PRECISION)
    return sums + weights.to(tl.float32), dot(tl.trans(values), weights, wide, PRECISION), shift


@triton.jit
def overflown(total):
    """Whether a weight overflowed, judged by the sums of weights."""
    return tl.sum(tl.where(total < TRUSTED, 0, 1), 0) > 0  # also true for NaN


@triton.jit
def store_key_state(lz, state, place, total, wide, shift, begin, features, width):
    """Store lz and S of the features from ``begin`` at row ``place`` of contiguous (..., m) and (..., m, E) tensors."""
    FEATURES: tl.constexpr = wide.shape[1]
    WIDTH: tl.constexpr = wide.shape[0]
    feature, columns = tl.arange(0, FEATURES), tl.arange(0, WIDTH)
    place, there = place * features + begin + feature, feature < features - begin
    tl.store(lz + place, (shift + tl.log2(total)) * LN2, mask=there)
    wide = wide * tl.where(total == 0.0, 0.0, 1.0 / total)[None, :]
    store_features(state, wide, place, there, columns, width)


@triton.jit(do_not_specialize=VARYING)
def keys_kernel(
    k,
    v,
    w,
    mask,
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
    HEADROOM: tl.constexpr,
    SPECULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The key state of one split: ``lz_i = logsumexp_t a_i(k_t)`` and ``S_i = sum_t softmax_t(a_i(k_t)) v_t``.

    Grid (sequences, splits, chunks of FEATURES features). A program owns one chunk of features for one split: it reads
    k and v once and writes lz and S in float32.

    A running maximum needs a reduction across warps for every tile. With SPECULATE the shift of all tiles is the
    maximum of the first one, placed HEADROOM below the top of the operands' range; if the sums show that a weight
    overflowed, the program reads its tokens again with a running maximum.
    """
    DTYPE: tl.constexpr = k[0].dtype.element_ty
    sequence, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k, v = sequence_of(k, sequence, heads), sequence_of(v, sequence, heads)
    if mask is not None:
        mask = mask_of(mask, sequence, heads)
    rows, columns = tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    begin = tl.program_id(2) * FEATURES
    _, parts = features_of(w, begin, features, width, DTYPE, WIDTH, FEATURES)
    first, last = own_tiles(split, tiles_per_split, length, TOKENS)

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
            there = taking_part(start, rows, length, mask)
            tile = load_tile(k, start, rows, there, columns, width, EVEN)
            values = load_tile(v, start, rows, there, columns, width, EVEN)
            exponents = key_exponents(tile, there, parts, PRECISION)
            follow = running | (index == first)
            sums, wide, shift = gathered(exponents, values, sums, wide, shift, follow, HEADROOM, DTYPE, PRECISION)
        total = tl.sum(sums, 0)
        again = (not running) & overflown(total)
        running = True
    place = sequence * tl.num_programs(1) + split
    store_key_state(lz, state, place, total, wide, shift, begin, features, width)


@triton.jit(do_not_specialize=VARYING)
def merge_kernel(lz, state, merged_lz, merged_state, width, features, splits, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Merge the key states of the splits, in order. Grid (sequences, m); a program owns one feature."""
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
def state_of(lz, state, begin, features, width, missing, WIDTH: tl.constexpr, FEATURES: tl.constexpr):
    """lz of the features from ``begin`` in base 2 (``missing`` beyond the last one), and S (FEATURES, WIDTH)."""
    feature = tl.arange(0, FEATURES)
    logs = tl.load(lz + begin + feature, mask=feature < features - begin, other=missing) * LOG2E
    return logs, matrix(state + begin * width, features - begin, width, width, 1, FEATURES, WIDTH)


@triton.jit
def query_weights(q, logs, log_eps, parts, PRECISION: tl.constexpr):
    """Unnormalised softmax weights over the features, and the term that the gate adds to their sum.

    ``log_eps = log2(m eps)``. With T the sum of the weights and c the second value, ``gate / T = 1 / (T + c)``; c
    is infinite where the gate is closed.
    """
    exponents = scores_of(q, parts, PRECISION) * LOG2E + logs[None, :]
    top = tl.maximum(tl.max(exponents, 1), LOWEST)
    return tl.exp2(exponents - top[:, None]), tl.exp2(log_eps + half_square(q) - top)


@triton.jit
def read_out(q, logs, values, log_eps, parts, PRECISION: tl.constexpr):
    """y of a tile in float32 before its division (at most FEATURES times as large as S), and the scale of its rows.

    ``values``: S as an operand.
    """
    weights, closed = query_weights(q, logs, log_eps, parts, PRECISION)
    weights = rounded(weights, q.dtype, PRECISION)
    total = tl.sum(widened(weights), 1)
    scale = tl.where(total == 0.0, 0.0, 1.0 / (total + closed))
    return dot(weights, values, None, PRECISION), scale


@triton.jit(do_not_specialize=VARYING)
def queries_kernel(
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
    rows, columns = tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    _, parts = features_of(w, 0, features, width, DTYPE, WIDTH, FEATURES)
    lz, state = lz + sequence * features, state + sequence * features * width
    logs, values = state_of(lz, state, 0, features, width, float("-inf"), WIDTH, FEATURES)
    values = rounded(values, DTYPE, PRECISION)
    first, last = own_tiles(split, tiles_per_split, length, TOKENS)
    for index in range(first, last):
        start = index * TOKENS
        there = rows < length - start
        tile = load_tile(q, start, rows, there, columns, width, EVEN)
        y, scale = read_out(tile, logs, values, log_eps, parts, PRECISION)
        store_tile(out, y * scale[:, None], start, rows, there, columns, width, EVEN)


def launch_key_state(call, k, v, key_mask):
    length = k.shape[-2]
    splits, tiles, chunks, constants = call.plan("keys", length)
    lz, state = call.key_states(splits)
    if call.sequences:
        replay.launch(
            keys_kernel,
            (call.sequences, splits, chunks or 1),
            readable(k),
            readable(v),
            call.directions,
            mask(key_mask),
            lz,
            state,
            *call.sizes(length, tiles),
            HEADROOM=HEADROOM[call.dtype],
            SPECULATE=call.dtype != torch.float32,  # in float32, products in three parts need the registers
            **constants,
        )
    return merged(call, splits, lz, state)


def merged(call, splits, lz, state):
    """The key state of whole sequences, from those of their splits (``Call.key_states``)."""

    if splits > 1:
        parts, (lz, state) = (lz, state), call.key_states()
        if call.sequences:
            replay.launch(
                merge_kernel,
                (call.sequences, call.features),
                *parts,
                lz,
                state,
                call.width,
                call.features,
                splits,
                WIDTH=padded(call.width),
                BLOCK=32,
                **runtime.FUSION,
            )
    return lz, state


def launch_read_out(q, w, eps, lz, state):
    """The pass over the queries, forward: y (..., L, E), contiguous."""

    from . import chunked  # imports this module

    call, length = Call(q.shape, w, q.dtype), q.shape[-2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    splits, tiles, chunks, constants = call.plan("queries", length)
    kernel = chunked.queries_chunked_kernel if chunks else queries_kernel
    if out.numel():
        replay.launch(
            kernel,
            (call.sequences, splits),
            readable(q),
            call.directions,
            lz,
            state,
            call.log_eps(eps),
            strided(out),
            *call.sizes(length, tiles),
            **constants,
        )
    return out

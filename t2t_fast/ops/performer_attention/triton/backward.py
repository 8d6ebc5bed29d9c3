"""Triton kernels of Performer attention, backward: two passes. Notation and shared functions are in forward.py.

Gradients that may exceed the range of float16 are multiplied in TF32 (GRADIENT, the dtype of the operands, is then
float32 instead of float16) or are scaled per feature.
"""

import torch
import triton
import triton.language as tl

from ..._common import replay
from ..._common.tiles import dot, narrowed, rounded, widened
from .call import Call, mask, readable, strided
from .forward import (
    LN2,
    VARYING,
    features_of,
    key_exponents,
    load_tile,
    mask_of,
    own_tiles,
    query_weights,
    sequence_of,
    state_of,
    store_features,
    store_tile,
    taking_part,
)


@triton.jit(do_not_specialize=VARYING)
def queries_backward_kernel(
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
    """d_q, and the split's part of the gradients of lz, S (and w); p: softmax weights, g: gate.

        along_i = dY . S_i    inner = sum_i p_i along_i    d_l_i = p_i g (along_i - g inner)
        d_q = sum_i d_l_i w_i - g (1 - g) inner q    d_S_i = sum_t p_i g dY    d_lz_i = sum_t d_l_i

    Grid (sequences, splits). A program owns one split: it reads q and dY once, and writes d_q and the split's (m) and
    (m, E) float32 partial sums once.
    """
    DTYPE: tl.constexpr = q[0].dtype.element_ty
    WIDER: tl.constexpr = "tf32" if GRADIENT != DTYPE else PRECISION
    sequence, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q, grad = sequence_of(q, sequence, heads), sequence_of(grad, sequence, heads)
    d_q = sequence_of(d_q, sequence, heads)
    rows, columns, feature = tl.arange(0, TOKENS), tl.arange(0, WIDTH), tl.arange(0, FEATURES)
    directions, parts = features_of(w, 0, features, width, DTYPE, WIDTH, FEATURES)
    directions = rounded(directions, GRADIENT, WIDER)
    lz, state = lz + sequence * features, state + sequence * features * width
    logs, values = state_of(lz, state, 0, features, width, float("-inf"), WIDTH, FEATURES)
    values = rounded(values, DTYPE, PRECISION)
    sums = tl.zeros([TOKENS, FEATURES], tl.float32)
    wide = tl.zeros([WIDTH, FEATURES], tl.float32)
    turned = tl.zeros([WIDTH, FEATURES], tl.float32)
    first, last = own_tiles(split, tiles_per_split, length, TOKENS)
    for index in range(first, last):
        start = index * TOKENS
        there = rows < length - start
        tile = load_tile(q, start, rows, there, columns, width, EVEN)
        upstream = load_tile(grad, start, rows, there, columns, width, EVEN)
        weights, closed = query_weights(tile, logs, log_eps, parts, PRECISION)
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
        if d_w is not None:
            turned = dot(tl.trans(tile.to(GRADIENT)), d_scores, turned, WIDER)
        d_tile = dot(d_scores, directions, None, WIDER)
        d_tile -= (inner * (1.0 - gate))[:, None] * tile.to(tl.float32)
        store_tile(d_q, d_tile, start, rows, there, columns, width, EVEN)
    place, there = (sequence * tl.num_programs(1) + split) * features + feature, feature < features
    tl.store(d_lz + place, tl.sum(sums, 0), mask=there)
    store_features(d_state, wide, place, there, columns, width)
    if d_w is not None:
        store_features(d_w, turned, place, there, columns, width)


@triton.jit
def state_gradients(
    values, gradients, DTYPE: tl.constexpr, GRADIENT: tl.constexpr, PRECISION: tl.constexpr, FEATURES: tl.constexpr
):
    """The inputs of :func:`token_gradients`: lz, d_S, the scale of d_S, and ``d_S_i . S_i - d_lz_i``."""
    logs, values = values
    logs = tl.where(logs == float("-inf"), float("inf"), logs)  # no key contributed
    slope, d_values = gradients
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
def token_gradients(k, v, there, parts, of_state, GRADIENT: tl.constexpr, PRECISION: tl.constexpr):
    """The weights P of a tile's keys, times the scale of d_S, and ``d_a``; both (TOKENS, FEATURES) float32."""
    DTYPE: tl.constexpr = k.dtype
    logs, d_values, scale, shift = of_state
    weights = tl.exp2(key_exponents(k, there, parts, PRECISION) - logs[None, :])
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
    """d_k and d_v (and the split's part of d_w); P: softmax weights over tokens.

        d_a_i = P_i (v . d_S_i - (d_S_i . S_i - d_lz_i))
        d_k = sum_i d_a_i w_i - k sum_i d_a_i    d_v = sum_i P_i d_S_i

    ``skip``, the gradient that reaches v by other paths, is added to d_v. In float16, d_S is scaled per feature to a
    largest entry of 1; P is multiplied by the scale, so its products run in TF32. Grid (sequences, splits).
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
    rows, columns, feature = tl.arange(0, TOKENS), tl.arange(0, WIDTH), tl.arange(0, FEATURES)
    directions, parts = features_of(w, 0, features, width, DTYPE, WIDTH, FEATURES)
    directions = rounded(directions, GRADIENT, WIDER)
    lz, state = lz + sequence * features, state + sequence * features * width
    d_lz, d_state = d_lz + sequence * features, d_state + sequence * features * width
    values = state_of(lz, state, 0, features, width, float("inf"), WIDTH, FEATURES)
    gradients = state_of(d_lz, d_state, 0, features, width, 0.0, WIDTH, FEATURES)
    of_state = state_gradients(values, gradients, DTYPE, GRADIENT, PRECISION, FEATURES)
    turned = tl.zeros([WIDTH, FEATURES], tl.float32)
    first, last = own_tiles(split, tiles_per_split, length, TOKENS)
    for index in range(first, last):
        start = index * TOKENS
        inside, there = rows < length - start, taking_part(start, rows, length, mask)
        tile = load_tile(k, start, rows, there, columns, width, EVEN)
        tokens = load_tile(v, start, rows, there, columns, width, EVEN)
        weights, d_scores = token_gradients(tile, tokens, there, parts, of_state, GRADIENT, PRECISION)
        held = tl.sum(d_scores, 1)
        d_scores = rounded(d_scores, GRADIENT, WIDER)
        d_tile = dot(rounded(weights, GRADIENT, WIDER), of_state[1].to(GRADIENT), None, WIDER)
        if skip is not None:
            d_tile += load_tile(skip, start, rows, inside, columns, width, EVEN).to(tl.float32)
        store_tile(d_v, d_tile, start, rows, inside, columns, width, EVEN)
        if d_w is not None:
            turned = dot(tl.trans(tile.to(GRADIENT)), d_scores, turned, WIDER)
        d_tile = dot(d_scores, directions, None, WIDER) - held[:, None] * widened(tile)
        store_tile(d_k, d_tile, start, rows, inside, columns, width, EVEN)
    if d_w is not None:
        place = (sequence * tl.num_programs(1) + split) * features + feature
        store_features(d_w, turned, place, feature < features, columns, width)


def _queries_backward(call, grad, q, eps, lz, state, need_w, d_q):
    from . import chunked  # imports this module

    length = q.shape[-2]
    splits, tiles, chunks, constants = call.plan("queries_backward", length)
    d_lz, d_state = call.key_states(splits)
    d_w = torch.empty_like(d_state) if need_w else None
    kernel = chunked.queries_backward_chunked_kernel if chunks else queries_backward_kernel
    if call.sequences:
        replay.launch(
            kernel,
            (call.sequences, splits, chunks or 1),
            readable(grad),
            readable(q),
            call.directions,
            lz,
            state,
            call.log_eps(eps),
            strided(d_q),
            d_lz,
            d_state,
            d_w,
            *call.sizes(length, tiles),
            **constants,
        )
    if splits == 1:
        return d_lz, d_state, d_w
    return d_lz.sum(1), d_state.sum(1), d_w


def _keys_backward(call, k, v, key_mask, lz, state, d_lz, d_state, skip, need_w, d_k, d_v):
    from . import chunked  # imports this module

    length = k.shape[-2]
    splits, tiles, chunks, constants = call.plan("keys_backward", length)
    d_w = call.key_states(splits)[1] if need_w else None
    kernel = chunked.keys_backward_chunked_kernel if chunks else keys_backward_kernel
    if call.sequences:
        replay.launch(
            kernel,
            (call.sequences, splits, chunks if chunks and need_w else 1),
            readable(k),
            readable(v),
            call.directions,
            mask(key_mask),
            lz,
            state,
            d_lz,
            d_state,
            None if skip is None else readable(skip),
            strided(d_k),
            strided(d_v),
            d_w,
            *call.sizes(length, tiles),
            **constants,
        )
    return d_w


def launch_backward(grad, q, k, v, w, eps, key_mask, lz, state, skip, need_w, d_q, d_k, d_v):
    """Write d_q, d_k and d_v (any strides; ``skip`` is added to d_v). Returns d_w (m, E) float32, or ``None``."""
    call = Call(q.shape, w, q.dtype)
    d_lz, d_state, from_queries = _queries_backward(call, grad, q, eps, lz, state, need_w, d_q)
    from_keys = _keys_backward(call, k, v, key_mask, lz, state, d_lz, d_state, skip, need_w, d_k, d_v)
    return from_queries.flatten(0, -3).sum(0) + from_keys.flatten(0, -3).sum(0) if need_w else None

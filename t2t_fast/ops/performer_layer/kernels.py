"""Triton kernel of a Performer layer: the attention's pass over the queries and the tail in one."""

import triton
import triton.language as tl

from ..performer_attention.kernels import features_of, load_tile, own_tiles, read_out, sequence_of, state_of, store_tile
from ..tiles import rounded
from ..token_mlp.kernels import kept_weights, random_lanes, tail_of

VARYING = ("length", "tiles_per_split", "seed")
"""Arguments whose values make no other kernel, so that another image size or batch compiles nothing."""


@triton.jit(do_not_specialize=VARYING)
def read_out_tail_kernel(
    q,
    v,
    w,
    lz,
    state,
    log_eps,
    out,
    tail,
    norm_eps,
    seed,
    drop_proj,
    drop_mlp,
    length,
    features,
    hidden,
    tiles_per_split,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
    HIDDEN: tl.constexpr,
    TOKENS: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out = tail(y, v)`` with y as ``queries_kernel`` reads it out of the key state; y never reaches memory.

    Grid (sequences, splits); a program owns the tokens of one split, reads q and v once and writes out once; nothing
    is saved. The arguments are those of ``queries_kernel`` and of ``tail_kernel``; one head, WIDTH channels exactly.
    """
    DTYPE: tl.constexpr = q[0].dtype.element_ty
    sequence, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q, v, out = sequence_of(q, sequence, 1), sequence_of(v, sequence, 1), sequence_of(out, sequence, 1)
    rows, columns = tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    _, parts = features_of(w, 0, features, WIDTH, DTYPE, WIDTH, FEATURES)
    lz, state = lz + sequence * features, state + sequence * features * WIDTH
    logs, values = state_of(lz, state, 0, features, WIDTH, float("-inf"), WIDTH, FEATURES)
    values = rounded(values, DTYPE, PRECISION)
    kept = kept_weights(tail, WIDTH, hidden, WIDTH, HIDDEN, DTYPE, KEEP, PRECISION)
    if seed is not None:
        seed = tl.load(seed)
    first, last = own_tiles(split, tiles_per_split, length, TOKENS)
    for index in range(first, last):
        start = index * TOKENS
        there = rows < length - start
        tile = load_tile(q, start, rows, there, columns, WIDTH, True)
        skip = load_tile(v, start, rows, there, columns, WIDTH, True)
        y = rounded(read_out(tile, logs, values, log_eps, parts, PRECISION), DTYPE, PRECISION)
        lanes = 0
        if seed is not None:
            lanes = random_lanes(seed, sequence * length + start, WIDTH, TOKENS, WIDTH, True)
        found = tail_of(
            y, skip, lanes, tail, kept, norm_eps, drop_proj, drop_mlp, WIDTH, hidden, WIDTH, HIDDEN, True, PRECISION
        )
        store_tile(out, found, start, rows, there, columns, WIDTH, True)

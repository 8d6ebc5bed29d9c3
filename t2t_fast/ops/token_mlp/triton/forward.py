"""Triton kernel of token_mlp, forward: one pass over the tokens; and functions shared with backward.

Notation: L tokens, E token width, F hidden width. The tiles of TOKENS tokens of all sequences are numbered
consecutively; a program owns consecutive tiles, which may belong to several sequences, and holds the weight matrices.
WIDTH and HIDDEN are E and F rounded up to a size that matrix instructions support; the padding is zero and not stored.

Operands of matrix products are in the inputs' dtype; LayerNorm, GELU, dropout and sums in float32.
"""

import torch
import triton
import triton.language as tl

from ..._common import replay
from ..._common.elementwise import dropped, gelu_of, random_lanes
from ..._common.tiles import dot, load, matrix, rounded, row_of, store, widened
from ..autograd import MlpParameters, Options
from .launch import dropout, inner_strides, planned, strided

VARYING = ("length", "all_tiles", "own_tiles", "seed")
"""Arguments excluded from specialisation: a new image size or batch size needs no new compilation."""


@triton.jit
def proj_of(mlp, width, WIDTH: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """``Wp`` as an operand."""
    return rounded(matrix(mlp.proj_weight, width, width, width, 1, WIDTH, WIDTH), DTYPE, PRECISION)


@triton.jit
def fc1_of(mlp, width, hidden, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """``W1 diag(gamma)`` as an operand: fc1 with the affine part of LayerNorm folded in."""
    weight = matrix(mlp.fc1_weight, hidden, width, width, 1, HIDDEN, WIDTH)
    if mlp.norm_weight is not None:
        weight *= row_of(mlp.norm_weight, width, WIDTH, 1.0)[None, :]
    return rounded(weight, DTYPE, PRECISION)


@triton.jit
def fc2_of(mlp, width, hidden, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """``W2`` as an operand."""
    return rounded(matrix(mlp.fc2_weight, width, hidden, hidden, 1, WIDTH, HIDDEN), DTYPE, PRECISION)


@triton.jit
def _shift(mlp, width, hidden, WIDTH: tl.constexpr, HIDDEN: tl.constexpr):
    """``W1 beta + b1``: the bias of fc1 with LayerNorm's affine part folded in."""
    shift = row_of(mlp.fc1_bias, hidden, HIDDEN, 0.0)
    if mlp.norm_bias is not None:
        fc1 = matrix(mlp.fc1_weight, hidden, width, width, 1, HIDDEN, WIDTH)
        shift += tl.sum(fc1 * row_of(mlp.norm_bias, width, WIDTH, 0.0)[None, :], 1)
    return shift


@triton.jit
def place_of(index, length, TOKENS: tl.constexpr):
    """The position of a tile: its sequence, its first token, and which of its tokens exist."""
    tiles = tl.cdiv(length, TOKENS)
    start = index % tiles * TOKENS
    return (index // tiles).to(tl.int64), start, tl.arange(0, TOKENS) < length - start


@triton.jit
def load_tile(x, place, width, TOKENS: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Load a tile of ``x``, which is a pointer and the strides of sequence, token and column."""
    pointer, batch, token, column = x
    sequence, start, there = place
    rows, columns = tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    return load(pointer + sequence * batch, start, rows, there, columns, width, token, column, EVEN)


@triton.jit
def store_tile(pointer, value, place, length, width, TOKENS: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Store that tile of a contiguous tensor."""
    sequence, start, there = place
    rows, columns = tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    store(pointer + sequence * length * width, value, start, rows, there, columns, width, width, 1, EVEN)


@triton.jit
def centred_half(t, width, norm_eps, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Half of each row minus its mean, which is in the range of float16 if the row is; and ``2 / sigma``."""
    t = t * 0.5 - (tl.sum(t, 1) / width * 0.5)[:, None]
    if not EVEN:
        t = tl.where((tl.arange(0, WIDTH) < width)[None, :], t, 0.0)
    return t, tl.rsqrt(tl.sum(t * t, 1) / width + 0.25 * norm_eps)


@triton.jit
def normalised(t, width, norm_eps, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """LayerNorm of each row before its affine part, and ``1 / sigma``."""
    t, scale = centred_half(t, width, norm_eps, WIDTH, EVEN)
    return t * scale[:, None], 0.5 * scale


@triton.jit
def kept_weights(
    mlp,
    width,
    hidden,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    DTYPE: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The parameters that a program holds: with KEEP the weights as operands, and always the vectors added to rows."""
    weights = ()
    if KEEP:
        fc1 = fc1_of(mlp, width, hidden, WIDTH, HIDDEN, DTYPE, PRECISION)
        proj = proj_of(mlp, width, WIDTH, DTYPE, PRECISION)
        weights = proj, fc1, fc2_of(mlp, width, hidden, WIDTH, HIDDEN, DTYPE, PRECISION)
    proj_bias, fc2_bias = row_of(mlp.proj_bias, width, WIDTH, 0.0), row_of(mlp.fc2_bias, width, WIDTH, 0.0)
    return weights, proj_bias, _shift(mlp, width, hidden, WIDTH, HIDDEN), fc2_bias


@triton.jit
def mlp_of(
    y,
    y_scale,
    v,
    lanes,
    mlp,
    kept,
    norm_eps,
    drop_proj,
    drop_mlp,
    width,
    hidden,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    EVEN: tl.constexpr,
    LEAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """token_mlp of one tile in float32. y_scale: a pending scale of the rows of y, or ``None``; lanes:
    :func:`random_lanes`; kept: :func:`kept_weights`.

    A row's scale is applied after the product, by the multiply-add that also adds the bias.
    """
    DTYPE: tl.constexpr = y.dtype
    weights, proj_bias, shift, fc2_bias = kept
    proj = proj_of(mlp, width, WIDTH, DTYPE, PRECISION) if len(weights) == 0 else weights[0]
    if LEAN:
        proj_bias, fc2_bias = row_of(mlp.proj_bias, width, WIDTH, 0.0), row_of(mlp.fc2_bias, width, WIDTH, 0.0)
    t = dot(y, tl.trans(proj), None, PRECISION)
    if y_scale is not None:
        t *= y_scale[:, None]
    t = dropped(t + proj_bias[None, :], lanes, drop_proj) + widened(v)
    centred, scale = centred_half(t, width, norm_eps, WIDTH, EVEN)
    fc1 = fc1_of(mlp, width, hidden, WIDTH, HIDDEN, DTYPE, PRECISION) if len(weights) == 0 else weights[1]
    h = dot(rounded(centred, DTYPE, PRECISION), tl.trans(fc1), None, PRECISION) * scale[:, None] + shift[None, :]
    a = rounded(gelu_of(h), DTYPE, PRECISION)
    fc2 = fc2_of(mlp, width, hidden, WIDTH, HIDDEN, DTYPE, PRECISION) if len(weights) == 0 else weights[2]
    if drop_mlp[1] is None and tl.float32 != DTYPE:
        # in float32, accumulating onto t would be less exact: matrix units truncate their sums
        t = dot(a, tl.trans(fc2), t + fc2_bias[None, :], PRECISION)
    else:
        f = dot(a, tl.trans(fc2), None, PRECISION) + fc2_bias[None, :]
        t += dropped(f, lanes, drop_mlp)
    return t


@triton.jit(do_not_specialize=VARYING)
def token_mlp_kernel(
    y,
    v,
    out,
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
    KEEP: tl.constexpr,
    LEAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out = t + m2 (gelu(LN(t) W1^T + b1) W2^T + b2)`` with ``t = v + m1 (y Wp^T + bp)``.

    Grid (programs); a program owns ``own_tiles`` of ``all_tiles`` tiles. It reads y and v once and writes out once;
    nothing else is saved. y, v: :func:`load_tile`; STRIDES: of token and column of y and v; drop_proj, drop_mlp:
    :func:`spared`; mlp: autograd.MlpParameters of pointers.

    KEEP: the weights are held, not read again for every tile. LEAN: addresses are recomputed and the vectors added to
    rows are read in every iteration, to save registers.
    """
    DTYPE: tl.constexpr = y[0].dtype.element_ty
    y = y[0], y[1], STRIDES[0], STRIDES[1]
    v = v[0], v[1], STRIDES[2], STRIDES[3]
    kept = kept_weights(mlp, width, hidden, WIDTH, HIDDEN, DTYPE, KEEP, PRECISION)
    if seed is not None:
        seed = tl.load(seed)
    first = tl.program_id(0) * own_tiles
    for index in tl.range(first, tl.minimum(first + own_tiles, all_tiles), disable_licm=LEAN > 0):
        place = place_of(index, length, TOKENS)
        tile = load_tile(y, place, width, TOKENS, WIDTH, EVEN)
        skip = load_tile(v, place, width, TOKENS, WIDTH, EVEN)
        lanes = 0
        if seed is not None:
            lanes = random_lanes(seed, place[0] * length + place[1], width, TOKENS, WIDTH, OCTETS).to(tl.uint16)
        value = mlp_of(
            tile,
            None,
            skip,
            lanes,
            mlp,
            kept,
            norm_eps,
            drop_proj,
            drop_mlp,
            width,
            hidden,
            WIDTH,
            HIDDEN,
            EVEN,
            LEAN,
            PRECISION,
        )
        store_tile(out, value, place, length, width, TOKENS, WIDTH, EVEN)


def launch_token_mlp(y, v, seed, options, mlp):
    """Launch :func:`token_mlp_kernel`; returns the output in y's dtype, contiguous."""
    mlp, options = MlpParameters(*mlp), Options(*options)
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if not out.numel():
        return out
    operands = [strided(x) for x in (y, v)]
    programs, sizes, selected, constants = planned("token_mlp", operands, mlp)
    parameters = MlpParameters(*(None if t is None else t.contiguous() for t in mlp))
    replay.launch(
        token_mlp_kernel,
        (programs,),
        *operands,
        out,
        parameters,
        options.norm_eps,
        *dropout(options, seed),
        *sizes,
        STRIDES=inner_strides(operands),
        LEAN=selected["lean"],
        **constants,
    )
    return out

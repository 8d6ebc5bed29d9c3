"""Triton kernels of a Performer layer. Each fuses two steps: the soft split with Linear and the attention's pass over
the keys; the pass over the queries and token_mlp.

Notation, padding and precision are those of the kernels of the single operators.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..._common import replay
from ..._common import triton_runtime as runtime
from ..._common.elementwise import random_lanes
from ..._common.launch_table import cut, padded
from ..._common.spec import Window
from ..._common.tiles import narrowed, rounded
from ...performer_attention.triton import call as attention
from ...performer_attention.triton.forward import (
    LOWEST,
    features_of,
    gathered,
    key_exponents,
    launch_key_state,
    launch_read_out,
    load_tile,
    merged,
    overflown,
    own_tiles,
    read_out,
    sequence_of,
    state_of,
    store_key_state,
    store_tile,
)
from ...soft_split_linear.triton.call import Call, Folded, products
from ...soft_split_linear.triton.forward import launch_split_linear, normalised, places_of, tile_products
from ...token_mlp.autograd import MlpParameters, Options
from ...token_mlp.triton import operators as mlp
from ...token_mlp.triton.forward import kept_weights, mlp_of
from ...token_mlp.triton.launch import dropout
from . import launch
from .fusion import queries_fused

VARYING = ("height", "image_width", "grid_width", "length", "tiles_per_split", "seed")
"""Arguments excluded from specialisation: a new image size or batch size needs no new compilation."""


@triton.jit
def _store_part(out, value, place, there, part, OUTPUTS: tl.constexpr):
    """Store a tile of the values ``part * E`` to ``(part + 1) * E`` of each row; rows have OUTPUTS values, and
    ``place`` is the tile's first row.
    """
    TOKENS: tl.constexpr = value.shape[0]
    WIDTH: tl.constexpr = value.shape[1]
    out += place * OUTPUTS + part * WIDTH
    offsets = tl.arange(0, TOKENS)[:, None] * OUTPUTS + tl.arange(0, WIDTH)[None, :]
    tl.store(out + offsets, value, mask=there[:, None])


@triton.jit(do_not_specialize=VARYING)
def split_keys_kernel(
    image,
    folded,
    norm_eps,
    out,
    mean,
    rstd,
    w,
    lz,
    state,
    height,
    image_width,
    grid_width,
    length,
    features,
    tiles_per_split,
    LAYOUT: tl.constexpr,
    SHIFT: tl.constexpr,
    OPERAND: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
    HEADROOM: tl.constexpr,
    SPECULATE: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """k, q and v of the windows as in ``split_linear_kernel``, and the key state of one split as in ``keys_kernel``.

    Grid (images, splits). A program owns the tokens of one split: it reads their windows once (twice if the speculated
    shift fails) and never reads k or v. WHOLE, for training: k, q and v are written to ``out``, and ``mean`` and
    ``rstd`` are saved; otherwise only q and v are written. PACKED: outputs of the packed weight,
    ``split_linear_kernel``'s WIDTH. The other arguments are those of the two kernels. The token width is exactly WIDTH.
    """
    OUTPUTS: tl.constexpr = 3 * WIDTH if WHOLE else 2 * WIDTH
    sample, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    _, parts = features_of(w, 0, features, WIDTH, OPERAND, WIDTH, FEATURES)
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
            token, there = sample * length + start, tl.arange(0, TOKENS) < length - start
            offsets, top, left = places_of(sample, start + tl.arange(0, TOKENS), grid_width, image, LAYOUT)
            products, window_mean, product_mean, window_rstd = tile_products(
                image,
                (height, image_width),
                (offsets, top, left, there),
                folded,
                norm_eps,
                0,
                LAYOUT,
                True,
                SHIFT,
                OPERAND,
                TOKENS,
                BLOCK,
                WIDTH,
                3,
                PACKED,
                PRECISION,
                False,  # NaN reaches every token through the state
            )
            if WHOLE:
                rows = token + tl.arange(0, TOKENS)
                tl.store(mean + rows, window_mean, mask=there)
                tl.store(rstd + rows, window_rstd, mask=there)
            column = tl.arange(0, WIDTH)
            q = normalised(products[1], product_mean, window_rstd, folded, WIDTH + column, PACKED, True)
            _store_part(out, narrowed(q, OPERAND), token, there, 1 if WHOLE else 0, OUTPUTS)
            k = normalised(products[0], product_mean, window_rstd, folded, column, PACKED, True)
            k = narrowed(k, OPERAND)
            if WHOLE:
                _store_part(out, k, token, there, 0, OUTPUTS)
            v = normalised(products[2], product_mean, window_rstd, folded, 2 * WIDTH + column, PACKED, True)
            v = narrowed(v, OPERAND)
            _store_part(out, v, token, there, 2 if WHOLE else 1, OUTPUTS)
            exponents = key_exponents(k, there, parts, PRECISION)
            follow = running | (index == first)
            sums, wide, shift = gathered(exponents, v, sums, wide, shift, follow, HEADROOM, OPERAND, PRECISION)
        total = tl.sum(sums, 0)
        again = (not running) & overflown(total)
        running = True
    place = sample * tl.num_programs(1) + split
    store_key_state(lz, state, place, total, wide, shift, 0, features, WIDTH)


@triton.jit(do_not_specialize=VARYING)
def read_out_mlp_kernel(
    q,
    v,
    w,
    lz,
    state,
    log_eps,
    out,
    mlp,
    norm_eps,
    seed,
    drop_proj,
    drop_mlp,
    length,
    features: tl.constexpr,
    hidden: tl.constexpr,
    tiles_per_split,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
    HIDDEN: tl.constexpr,
    TOKENS: tl.constexpr,
    STRIDES: tl.constexpr,
    KEEP: tl.constexpr,
    LEAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out = mlp(y, v)`` with y as in ``queries_kernel``; y is never written to memory.

    Grid (sequences, splits). A program owns the tokens of one split: it reads q and v once and writes out once; nothing
    is saved. The arguments are those of ``queries_kernel`` and ``token_mlp_kernel``; STRIDES are those of q and v. One
    head; the token width is exactly WIDTH.
    """
    DTYPE: tl.constexpr = q[0].dtype.element_ty
    sequence, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q = sequence_of(q, sequence, 1)[0], STRIDES[0], STRIDES[1]
    v = sequence_of(v, sequence, 1)[0], STRIDES[2], STRIDES[3]
    out = out + sequence * length * WIDTH, WIDTH, 1
    rows, columns = tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    _, parts = features_of(w, 0, features, WIDTH, DTYPE, WIDTH, FEATURES)
    lz, state = lz + sequence * features, state + sequence * features * WIDTH
    logs, values = state_of(lz, state, 0, features, WIDTH, float("-inf"), WIDTH, FEATURES)
    values = rounded(values, DTYPE, PRECISION)
    kept = kept_weights(mlp, WIDTH, hidden, WIDTH, HIDDEN, DTYPE, KEEP, PRECISION)
    if seed is not None:
        seed = tl.load(seed)
    first, last = own_tiles(split, tiles_per_split, length, TOKENS)
    for index in tl.range(first, last, disable_licm=LEAN > 0):
        start = index * TOKENS
        there = rows < length - start
        tile = load_tile(q, start, rows, there, columns, WIDTH, True)
        skip = load_tile(v, start, rows, there, columns, WIDTH, True)
        y, scale = read_out(tile, logs, values, log_eps, parts, PRECISION)
        if tl.float16 == DTYPE:  # y might overflow; otherwise the projection applies the scale with its bias
            y, scale = y * scale[:, None], None
        y = rounded(y, DTYPE, PRECISION)
        lanes = 0
        if seed is not None:
            lanes = random_lanes(seed, sequence * length + start, WIDTH, TOKENS, WIDTH, True).to(tl.uint16)
        value = mlp_of(
            y,
            scale,
            skip,
            lanes,
            mlp,
            kept,
            norm_eps,
            drop_proj,
            drop_mlp,
            WIDTH,
            hidden,
            WIDTH,
            HIDDEN,
            True,
            LEAN,
            PRECISION,
        )
        store_tile(out, value, start, rows, there, columns, WIDTH, True)


@lru_cache(maxsize=1024)
def _split_plan(selected, found, images, width, features, packed, dtype, shift, whole, processors, tf32):
    """Splits of an image's tokens, their tiles, and the kernel's constants. found: call.py's ``Sizes``."""
    parameters = dict(selected)
    wanted = parameters["programs"] * processors
    splits, tiles = cut(found.length, images, parameters["tokens"], wanted)
    constants = {
        "LAYOUT": found.layout,
        "SHIFT": shift,
        "TOKENS": parameters["tokens"],
        "BLOCK": found.layout.block(parameters["block"]),
        "PACKED": packed,
        "WIDTH": width,
        "FEATURES": padded(features),
        "HEADROOM": attention.HEADROOM[dtype],
        "SPECULATE": dtype != torch.float32,
        "WHOLE": whole,
        **products(dtype, tf32),
        "num_warps": parameters["warps"],
        "num_stages": parameters["stages"],
    }
    return splits, tiles, constants


def launch_split_keys(x, folded, w, norm_eps, window, dtype, pixels, whole):
    """kqv (only q and v unless ``whole``), the key state, and with ``whole`` the windows' statistics; a list.

    One launch, for the sizes that launch.py accepts. folded, pixels: ``soft_split_linear``'s ``operands``.
    """

    features, width = w.shape
    call, device, images = Call(x, dtype, window, 3 * width, pixels), x.device, x.shape[0]
    section = runtime.section(device, call.tokens)
    selected = launch.TABLE.chosen("split_keys", section, dtype, width, features, call.layout.channels)
    splits, tiles, constants = _split_plan(
        tuple(selected.items()),
        call.sizes,
        images,
        width,
        features,
        folded.weight.shape[1],
        dtype,
        x.dtype == torch.float32 or x.dtype != dtype,
        whole,
        runtime.multiprocessors(device),
        dtype == torch.float32 and runtime.allows_tf32(),
    )
    out = torch.empty((images, call.length, (3 if whole else 2) * width), dtype=dtype, device=device)
    mean, rstd = (call.singles(), call.singles()) if whole else (None, None)
    sequences = attention.Call((images, call.length, width), w, dtype)
    lz, state = sequences.key_states(splits)
    if images:
        replay.launch(
            split_keys_kernel,
            (images, splits),
            call.image(),
            folded,
            norm_eps,
            out,
            mean,
            rstd,
            sequences.directions,
            lz,
            state,
            *x.shape[2:],
            call.grid[1],
            call.length,
            features,
            tiles,
            **constants,
        )
    lz, state = merged(sequences, splits, lz, state)
    return [out, lz, state, mean, rstd] if whole else [out, lz, state]


@lru_cache(maxsize=1024)
def _plan(selected, dtype, width, features, hidden, length, sequences, processors, tf32):
    """Splits of a sequence, the kernel arguments after its tensors, and its constants."""
    parameters = dict(selected)
    splits, tiles = cut(length, sequences, parameters["tokens"], parameters["programs"] * processors)
    constants = {
        "WIDTH": width,
        "FEATURES": padded(features),
        "HIDDEN": padded(hidden),
        "TOKENS": parameters["tokens"],
        "KEEP": bool(parameters["keep"]),
        "LEAN": parameters["lean"],
        "PRECISION": "tf32" if tf32 else "tf32x3",
        "num_warps": parameters["warps"],
        "num_stages": parameters["stages"],
        **runtime.FUSION,
    }
    return splits, (length, features, hidden, tiles), constants


def queries_and_values(kqv, width):
    """q and v of kqv, or of a tensor with q and v only."""
    first = kqv.shape[2] - 2 * width
    return kqv.narrow(2, first, width), kqv.narrow(2, first + width, width)


def launch_read_out_mlp(kqv, w, eps, lz, state, parameters, options, seed):
    """The layer's output from the key state, q and v, in one launch, for the sizes that launch.py accepts."""
    q, v = queries_and_values(kqv, w.shape[1])
    call, length, device = attention.Call(q.shape, w, q.dtype), q.shape[1], q.device
    out = torch.empty(q.shape, dtype=q.dtype, device=device)
    if not call.sequences:
        return out
    hidden = parameters.fc1_weight.shape[0]
    section = runtime.section(device, call.sequences * length)
    selected = launch.TABLE.chosen("read_out_mlp", section, q.dtype, call.width, call.features, hidden)
    splits, sizes, constants = _plan(
        tuple(selected.items()),
        q.dtype,
        call.width,
        call.features,
        hidden,
        length,
        call.sequences,
        runtime.multiprocessors(device),
        q.dtype == torch.float32 and runtime.allows_tf32(),
    )
    q, v = attention.readable(q), attention.readable(v)
    replay.launch(
        read_out_mlp_kernel,
        (call.sequences, splits),
        q,
        v,
        call.directions,
        lz,
        state,
        call.log_eps(eps),
        out,
        MlpParameters(*(None if t is None else t.contiguous() for t in parameters)),
        options.norm_eps,
        *dropout(options, seed),
        *sizes,
        STRIDES=(*q[-2:], *v[-2:]),
        **constants,
    )
    return out


def launch_project(
    x, weight, used, row_sums, offset, w, norm_eps, kernel, stride, padding, dtype, pixels, fused, whole
):
    """The result of :func:`launch_split_keys`, in one launch or in two, which write all of kqv."""
    window, folded = Window(tuple(kernel), tuple(stride), tuple(padding)), Folded(weight, used, row_sums, offset)
    if fused:
        return launch_split_keys(x, folded, w, norm_eps, window, dtype, pixels, whole)
    kqv, mean, rstd = launch_split_linear(x, *folded, 3 * w.shape[1], norm_eps, *window, dtype, pixels)
    k, q, v = kqv.chunk(3, dim=-1)
    lz, state = launch_key_state(attention.Call(q.shape, w, q.dtype), k, v, None)
    return [kqv, lz, state, mean, rstd] if whole else [kqv, lz, state]


def launch_output(kqv, w, eps, lz, state, seed, options, parameters):
    """The layer's output from the key state, q and v, in one launch or in two."""
    parameters, options = MlpParameters(*parameters), Options(*options)
    if queries_fused(kqv, w, parameters, seed is not None):
        return launch_read_out_mlp(kqv, w, eps, lz, state, parameters, options, seed)
    q, v = queries_and_values(kqv, w.shape[1])
    return mlp.run(launch_read_out(q, w, eps, lz, state), v, parameters, options, seed)

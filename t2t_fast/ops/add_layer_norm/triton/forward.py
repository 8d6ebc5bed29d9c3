"""Triton kernel of add_layer_norm, forward; and the statistics that backward computes again.

Notation: rows are the tokens of all samples, ``length`` a sample; D columns, WIDTH is D rounded up to a power of two. A
tile is TOKENS whole rows, held in registers, so that mean and centred squares are two exact passes over one read.
Arithmetic is in float32.
"""

import torch
import triton
import triton.language as tl

from ..._common import replay
from ..._common.elementwise import branch_dropped, path_factors
from ..._common.tiles import load, narrowed, row_of, store, widened
from .launch import masks, planned, strided

VARYING = ("seed", "rows", "length", "tiles", "own_tiles")
"""Arguments excluded from specialisation: another number of tokens or samples needs no new compilation."""


@triton.jit
def standardised(t, width, eps, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """LayerNorm of each row before its affine part, and ``1 / sigma``."""
    t -= (tl.sum(t, 1) / width)[:, None]
    if not EVEN:
        t = tl.where((tl.arange(0, WIDTH) < width)[None, :], t, 0.0)
    scale = tl.rsqrt(tl.sum(t * t, 1) / width + eps)
    return t * scale[:, None], scale


@triton.jit(do_not_specialize=VARYING)
def add_layer_norm_kernel(
    x,
    x_stride,
    branch,
    branch_stride,
    gamma,
    beta,
    t,
    n,
    eps,
    seed,
    drop,
    path,
    rows,
    length,
    width: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    OCTETS: tl.constexpr,
):
    """``t = x + m branch`` and ``n = LayerNorm(t)``.

    Grid (tiles); a program owns one tile. It reads x and branch once and writes t and n once. Without a branch
    (``None``), t is x and not written; with eps ``None``, n is t in n's dtype. drop, path: the masks m,
    ``elementwise.left_out``.
    """
    start = tl.program_id(0).to(tl.int64) * TOKENS
    lines, columns = tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    there = lines < rows - start
    value = widened(load(x, start, lines, there, columns, width, x_stride, 1, EVEN))
    if branch is not None:
        added = widened(load(branch, start, lines, there, columns, width, branch_stride, 1, EVEN))
        factors = path_factors(seed, start, length, path, TOKENS)
        value += branch_dropped(added, seed, start, factors, drop, width, TOKENS, WIDTH, OCTETS)
        value = narrowed(value, t.dtype.element_ty)
        store(t, value, start, lines, there, columns, width, width, 1, EVEN)
        value = widened(value)
    if eps is not None:
        value, _ = standardised(value, width, eps, WIDTH, EVEN)
        value = value * row_of(gamma, width, WIDTH, 1.0)[None, :] + row_of(beta, width, WIDTH, 0.0)[None, :]
    store(n, value, start, lines, there, columns, width, width, 1, EVEN)


def launch_add_layer_norm(x, branch, gamma, beta, eps, dtype, seed, drops):
    """Launch :func:`add_layer_norm_kernel`. Returns t in x's dtype (empty without a branch) and n in ``dtype``."""
    t = x.new_empty(x.shape if branch is not None else 0)
    n = torch.empty(x.shape, dtype=dtype, device=x.device)
    if n.numel():
        (_, _, tiles), constants = planned("add_layer_norm", x, dtype)
        replay.launch(
            add_layer_norm_kernel,
            (tiles,),
            *strided(x),
            *strided(branch),
            *(None if p is None else p.contiguous() for p in (gamma, beta)),
            None if branch is None else t,
            n,
            eps,
            *masks(seed, drops, (0.0, 0.0), 0),
            x.numel() // x.shape[-1],
            x.shape[1],
            **constants,
        )
    return t, n

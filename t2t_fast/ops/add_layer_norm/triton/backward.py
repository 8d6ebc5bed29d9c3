"""Triton kernel of add_layer_norm, backward. Notation as in ``forward.py``."""

import torch
import triton
import triton.language as tl

from ..._common import replay
from ..._common.elementwise import branch_dropped, path_factors
from ..._common.tiles import load, row_of, store, widened
from .forward import VARYING, standardised
from .launch import masks, planned, strided


@triton.jit
def _store_sums(pointer, sums, width, WIDTH: tl.constexpr):
    """Store the sum of a tile's rows in the program's row."""
    columns = tl.arange(0, WIDTH)
    tl.store(pointer + columns, tl.sum(sums, 0), mask=columns < width)


@triton.jit(do_not_specialize=VARYING)
def layer_norm_backward_kernel(
    grad,
    grad_stride,
    skip,
    skip_stride,
    t,
    t_stride,
    gamma,
    beta,
    d_x,
    d_branch,
    n,
    shares,
    eps,
    seed,
    drop,
    path,
    rows,
    length,
    tiles,
    own_tiles,
    width: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    OCTETS: tl.constexpr,
):
    """The gradients of x and of the branch, n again, and the program's part of sums over all rows.

        f = gamma G    d_x = S + (f - mean(f) - xhat mean(f xhat)) / sigma    d_branch = m d_x

    Grid (programs); a program owns ``own_tiles`` of ``tiles`` tiles. It reads ``t``, ``grad`` (G) and ``skip`` (S)
    once, writes d_x, d_branch and n once (each may be ``None``), and at the end its row of ``shares`` (or ``None``):
    the sums of ``G xhat`` and of ``G``, the gradients of gamma and beta.

    With eps ``None`` there is no LayerNorm: ``d_x = S + G``, n is t in n's dtype, and a row of ``shares`` is the sum of
    d_branch.
    """
    first = tl.program_id(0) * own_tiles
    start = first.to(tl.int64) * TOKENS
    lines, columns = tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    along, plain = tl.zeros([TOKENS, WIDTH], tl.float32), tl.zeros([TOKENS, WIDTH], tl.float32)
    for _ in range(first, tl.minimum(first + own_tiles, tiles)):
        there = lines < rows - start
        d = widened(load(grad, start, lines, there, columns, width, grad_stride, 1, EVEN))
        if eps is not None or n is not None:
            value = widened(load(t, start, lines, there, columns, width, t_stride, 1, EVEN))
        if eps is not None:
            value, scale = standardised(value, width, eps, WIDTH, EVEN)
            if shares is not None:
                along += d * value
                plain += d
            factor = row_of(gamma, width, WIDTH, 1.0)[None, :]
            d *= factor
            if n is not None:
                again = value * factor + row_of(beta, width, WIDTH, 0.0)[None, :]
                store(n, again, start, lines, there, columns, width, width, 1, EVEN)
            mean, slope = tl.sum(d, 1) / width, tl.sum(d * value, 1) / width
            d = (d - mean[:, None] - value * slope[:, None]) * scale[:, None]
        elif n is not None:
            store(n, value, start, lines, there, columns, width, width, 1, EVEN)
        if skip is not None:
            d += widened(load(skip, start, lines, there, columns, width, skip_stride, 1, EVEN))
        if d_x is not None:
            store(d_x, d, start, lines, there, columns, width, width, 1, EVEN)
        if d_branch is not None:
            factors = path_factors(seed, start, length, path, TOKENS)
            d = branch_dropped(d, seed, start, factors, drop, width, TOKENS, WIDTH, OCTETS)
            store(d_branch, d, start, lines, there, columns, width, width, 1, EVEN)
            if eps is None and shares is not None:
                plain += d
        start += TOKENS
    if shares is not None:
        shares += tl.program_id(0) * ((1 if eps is None else 2) * width)
        if eps is not None:
            _store_sums(shares, along, width, WIDTH)
            shares += width
        _store_sums(shares, plain, width, WIDTH)


def _launch(grad, skip, t, gamma, beta, eps, found, sums, masking):
    """Launch :func:`layer_norm_backward_kernel`; found: d_x, d_branch and n. Returns ``sums`` summed rows or none."""
    width = grad.shape[-1]
    if not grad.numel():
        return grad.new_zeros(sums, width, dtype=torch.float32)
    (programs, own, tiles), constants = planned("layer_norm_backward", grad, grad.dtype)
    shares = torch.empty(programs, sums, width, dtype=torch.float32, device=grad.device)
    replay.launch(
        layer_norm_backward_kernel,
        (programs,),
        *strided(grad),
        *strided(skip),
        *strided(t),
        *(None if p is None else p.contiguous() for p in (gamma, beta)),
        *(out if out is not None and out.numel() else None for out in found),
        shares if sums else None,
        eps,
        *masking,
        grad.numel() // width,
        grad.shape[1],
        tiles,
        own,
        **constants,
    )
    return shares.sum(0)


def launch_layer_norm_backward(grad, skip, t, gamma, beta, eps, branch_dtype, seed, drops, again):
    """d_x in t's dtype, d_branch in ``branch_dtype`` and n in grad's (empty if not wanted), and the gradients of gamma
    and beta in float32, (2, D), (0, D) without LayerNorm's parameters.
    """
    d_x = torch.empty(t.shape, dtype=t.dtype, device=t.device)
    d_branch = torch.empty(0 if branch_dtype is None else t.shape, dtype=branch_dtype or t.dtype, device=t.device)
    n = torch.empty(t.shape if again else 0, dtype=grad.dtype, device=t.device)
    sums = 0 if gamma is None and beta is None else 2
    masking = masks(seed, drops, (0.0, 0.0), 0)
    return d_x, d_branch, n, _launch(grad, skip, t, gamma, beta, eps, (d_x, d_branch, n), sums, masking)


def launch_branch_gradient(grad, dtype, seed, drops):
    """The gradient of a block's second branch in ``dtype``, and its column sums in float32, (1, D)."""
    d_branch = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    masking = masks(seed, drops[:2], drops[2:], 1)
    return d_branch, _launch(grad, None, None, None, None, None, (None, d_branch, None), 1, masking)

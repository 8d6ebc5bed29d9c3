"""add_layer_norm in PyTorch operations; its parts also serve the operators that begin with a LayerNorm.

    t = x + m branch      n = LayerNorm(t)

``m`` is the product of dropout's and stochastic depth's factors. Statistics are in float32 (float64 for float64); they
are computed again in backward.
"""

import torch

from .._common.library import accumulation_dtype
from .._common.philox import NONE, branch_masks, dropout_
from .._common.transforms import constant
from .autograd import differentiable


def dropped(branch, seed, drops, index, dtype):
    """One of the block's residual branches after dropout and stochastic depth, in ``dtype``.

    Args:
        drops: the :class:`philox.Drops` of both branches; index: which one this is.
    """
    masks = branch_masks(seed, branch.shape, *drops, index)
    if masks == (None, None):
        return branch.to(dtype)
    found = branch.to(accumulation_dtype(branch.dtype), copy=True)
    for mask, p in zip(masks, drops[index], strict=True):
        dropout_(found, p, mask)
    return found.to(dtype)


def _layer_norm(t, norm):
    """``t`` and LayerNorm's parameters in the accumulation dtype, and the normalised tokens with their statistics."""
    wide = accumulation_dtype(t.dtype)
    t, gamma, beta = (None if each is None else each.to(wide) for each in (t, norm.weight, norm.bias))
    shape = (constant(t.shape[-1]),)
    return (t, shape, gamma, beta), torch.ops.aten.native_layer_norm(t, shape, gamma, beta, norm.eps)


def add_normalised(x, norm, dtype, branch=None, seed=None, drops=NONE):
    """The stream and its LayerNorm.

    Args:
        norm: :class:`autograd.Norm`; dtype: of the normalised tokens.
        branch: added to x with the masks of ``seed`` and :class:`philox.Drops`; or ``None``.

    Returns:
        ``t`` in x's dtype, x itself without a branch; ``n`` in ``dtype``, t itself if there is nothing to do.
    """
    t = x
    if branch is not None:
        t = (x + (dropped(branch, seed, (drops, NONE), 0, accumulation_dtype(x.dtype)) if any(drops) else branch)).to(
            x.dtype
        )
    n = t if norm.eps is None else _layer_norm(t, norm)[1][0]
    return t, n.to(dtype)


def normalised_backward(grad, skip, t, norm, branch_dtype=None, seed=None, drops=NONE, again=True):
    """The gradients of x, the branch and LayerNorm's parameters, and ``n`` again.

    Args:
        grad: of ``n``; skip: the gradient that reaches t by other paths, or ``None``; norm, seed, drops:
            :func:`add_normalised`; branch_dtype: the branch's, ``None`` without one; again: whether n is needed.

    Returns:
        the gradient of x in t's dtype; that of the branch, or ``None``; n in grad's dtype, or ``None``; the gradients
        of the two parameters in their dtypes, ``None`` where there is none.
    """
    n, d_t, d_gamma, d_beta = t, grad, None, None
    if norm.eps is not None:
        (wide, shape, gamma, beta), (n, mean, rstd) = _layer_norm(t, norm)
        needed = [True, gamma is not None, beta is not None]
        d_t, d_gamma, d_beta = torch.ops.aten.native_layer_norm_backward(
            grad.to(wide.dtype), wide, shape, mean, rstd, gamma, beta, needed
        )
    if skip is not None:
        d_t = d_t + skip if norm.eps is None else d_t.add_(skip)
    d_branch = None if branch_dtype is None else dropped(d_t, seed, (drops, NONE), 0, branch_dtype)
    of_norm = (None if p is None else d.to(p.dtype) for d, p in ((d_gamma, norm.weight), (d_beta, norm.bias)))
    return d_t.to(t.dtype), d_branch, n.to(grad.dtype) if again else None, *of_norm


forward = differentiable(add_normalised, normalised_backward)

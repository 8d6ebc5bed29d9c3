"""add_layer_norm in PyTorch operations; its parts also serve the operators that begin with a LayerNorm.

    t = x + m branch      n = LayerNorm(t)

``m`` is the product of dropout's and stochastic depth's factors. Statistics are in float32 (float64 for float64); they
are computed again in backward.
"""

import torch

from .._common.library import accumulation_dtype
from .._common.philox import branch_masks, dropout_
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


def add(x, branch, seed, drops):
    """The stream ``t`` in x's dtype, a new tensor."""
    if not any(drops[0]):
        return (x + branch).to(x.dtype)
    return (x + dropped(branch, seed, drops, 0, accumulation_dtype(x.dtype))).to(x.dtype)


def _layer_norm(t, norm_weight, norm_bias, norm_eps):
    """``t`` and LayerNorm's parameters in the accumulation dtype, and the normalised tokens with their statistics."""
    wide = accumulation_dtype(t.dtype)
    t, gamma, beta = (None if each is None else each.to(wide) for each in (t, norm_weight, norm_bias))
    shape = (constant(t.shape[-1]),)
    return (t, shape, gamma, beta), torch.ops.aten.native_layer_norm(t, shape, gamma, beta, norm_eps)


def normalised(t, norm_weight, norm_bias, norm_eps, dtype):
    """``n`` in ``dtype``, a new tensor."""
    return _layer_norm(t, norm_weight, norm_bias, norm_eps)[1][0].to(dtype)


def normalised_backward(grad, skip, t, norm_weight, norm_bias, norm_eps):
    """The gradients of t and of LayerNorm's parameters, and ``n`` again.

    Args:
        grad: of ``n``; skip: the gradient that reaches t by other paths, or ``None``.

    Returns:
        ``n`` in grad's dtype; the gradient of t in the accumulation dtype, a new tensor; those of the two parameters in
        their dtypes, ``None`` where there is none.
    """
    (wide, shape, gamma, beta), (n, mean, rstd) = _layer_norm(t, norm_weight, norm_bias, norm_eps)
    needed = [True, gamma is not None, beta is not None]
    d_t, d_gamma, d_beta = torch.ops.aten.native_layer_norm_backward(
        grad.to(wide.dtype), wide, shape, mean, rstd, gamma, beta, needed
    )
    if skip is not None:
        d_t.add_(skip)
    d_gamma, d_beta = (None if p is None else d.to(p.dtype) for d, p in ((d_gamma, norm_weight), (d_beta, norm_bias)))
    return n.to(grad.dtype), d_t, d_gamma, d_beta


forward = differentiable(add, normalised, normalised_backward, dropped)

"""The operators ``t2t_fast_triton::add_layer_norm``, ``layer_norm_backward`` and ``branch_gradient``, and the parts
made of them, with the interface of ``aten.py``.

Triton is imported at the first launch.
"""

import torch

from ..._common.philox import NONE
from ..._common.triton_runtime import fake, operator, operators
from ..autograd import differentiable


@operator(
    "add_layer_norm(Tensor x, Tensor? branch, Tensor? gamma, Tensor? beta, float? eps, ScalarType dtype, Tensor? seed, "
    "float[] drops) -> (Tensor, Tensor)"
)
def _forward(*arguments):
    from .forward import launch_add_layer_norm

    return launch_add_layer_norm(*arguments)


@fake("add_layer_norm")
def _fake(x, branch, gamma, beta, eps, dtype, seed, drops):
    return x.new_empty(x.shape if branch is not None else 0), x.new_empty(x.shape, dtype=dtype)


@operator(
    "layer_norm_backward(Tensor grad, Tensor? skip, Tensor t, Tensor? gamma, Tensor? beta, float? eps, "
    "ScalarType? branch_dtype, Tensor? seed, float[] drops, bool again) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _backward(*arguments):
    from .backward import launch_layer_norm_backward

    return launch_layer_norm_backward(*arguments)


@fake("layer_norm_backward")
def _fake_backward(grad, skip, t, gamma, beta, eps, branch_dtype, seed, drops, again):
    return (
        t.new_empty(t.shape),
        t.new_empty(0 if branch_dtype is None else t.shape, dtype=branch_dtype or t.dtype),
        grad.new_empty(t.shape if again else 0),
        t.new_empty(0 if gamma is None and beta is None else 2, t.shape[-1], dtype=torch.float32),
    )


@operator("branch_gradient(Tensor grad, ScalarType dtype, Tensor? seed, float[] drops) -> (Tensor, Tensor)")
def _branch_gradient(*arguments):
    from .backward import launch_branch_gradient

    return launch_branch_gradient(*arguments)


@fake("branch_gradient")
def _fake_branch_gradient(grad, dtype, seed, drops):
    return grad.new_empty(grad.shape, dtype=dtype), grad.new_empty(1, grad.shape[-1], dtype=torch.float32)


def add_normalised(x, norm, dtype, branch=None, seed=None, drops=NONE):
    """The stream and its LayerNorm, as in ``aten.py``."""
    if branch is None and norm.eps is None:
        return x, x.to(dtype)
    t, n = operators.add_layer_norm(x, branch, *norm, dtype, seed, list(drops))
    return x if branch is None else t, n


def normalised_backward(grad, skip, t, norm, branch_dtype=None, seed=None, drops=NONE, again=True):
    """The gradients of x, the branch and LayerNorm's parameters, and ``n`` again, as in ``aten.py``."""
    d_x, d_branch, n, sums = operators.layer_norm_backward(grad, skip, t, *norm, branch_dtype, seed, list(drops), again)
    of_norm = (None if p is None else sums[index].to(p.dtype) for index, p in enumerate(norm[:2]))
    return d_x, None if branch_dtype is None else d_branch, n if again else None, *of_norm


def branch_gradient(grad, dtype, seed, drops):
    """The gradient of a block's second branch in ``dtype``, and its column sums, ``None``: to be computed.

    drops: the :class:`philox.Drops` of both branches.
    """
    if grad.dtype == dtype and not any(drops[1]):
        return grad, None
    d_branch, sums = operators.branch_gradient(grad, dtype, seed, [*drops[0], *drops[1]])
    return d_branch, sums[0]


forward = differentiable(add_normalised, normalised_backward)

"""The operators ``t2t_fast_triton::fc1_gelu``, ``fc2_add`` and ``fc2_gelu_backward``, and the parts made of them, with
the interface of ``aten.py``.

Triton is imported at the first launch. The other products, which need no epilogue, are PyTorch's.
"""

import sys

import torch

from ..._common.triton_runtime import fake, operator, operators
from ...add_layer_norm.triton import operators as norm
from ..autograd import differentiable


@operator(
    "fc1_gelu(Tensor n, Tensor weight, Tensor? bias, Tensor? seed, float hidden_drop, bool keep) -> (Tensor, Tensor)"
)
def _fc1_gelu(*arguments):
    from .forward import launch_fc1_gelu

    return launch_fc1_gelu(*arguments)


@fake("fc1_gelu")
def _fake_fc1_gelu(n, weight, bias, seed, hidden_drop, keep):
    shape = *n.shape[:-1], weight.shape[0]
    return n.new_empty(shape if keep else 0), n.new_empty(shape)


@operator("fc2_add(Tensor a, Tensor weight, Tensor? bias, Tensor? t, Tensor? seed, float[] drops) -> Tensor")
def _fc2_add(*arguments):
    from .forward import launch_fc2_add

    return launch_fc2_add(*arguments)


@fake("fc2_add")
def _fake_fc2_add(a, weight, bias, t, seed, drops):
    return a.new_empty((*a.shape[:-1], weight.shape[0]), dtype=a.dtype if t is None else t.dtype)


@operator(
    "fc2_gelu_backward(Tensor d_f, Tensor weight, Tensor h, Tensor? seed, float hidden_drop) "
    "-> (Tensor, Tensor, Tensor)"
)
def _fc2_gelu_backward(*arguments):
    from .forward import launch_fc2_gelu_backward

    return launch_fc2_gelu_backward(*arguments)


@fake("fc2_gelu_backward")
def _fake_fc2_gelu_backward(d_f, weight, h, seed, hidden_drop):
    d_h, a = (d_f.new_empty(h.shape) for _ in range(2))
    return d_h, a, h.new_empty(h.shape[-1], dtype=torch.float32)


def fc1_gelu(n, parameters, options, seed, keep):
    """fc1's output and the input of fc2, as in ``aten.py``."""
    weight = parameters.fc1_weight.to(n.dtype)
    h, a = operators.fc1_gelu(n, weight, parameters.fc1_bias, seed, options.hidden_drop, keep)
    return h if keep else None, a


def fc2_add(a, t, parameters, options, seed, buffer):
    """The output, as in ``aten.py``."""
    weight, drops = parameters.fc2_weight.to(a.dtype), [p for each in options.drops for p in each]
    return operators.fc2_add(a, weight, parameters.fc2_bias, t if options.residual else None, seed, drops)


def fc2_gradient(grad, options, seed):
    """The gradient of fc2's output and its column sums, as in ``aten.py``."""
    return norm.branch_gradient(grad, options.dtype, seed, options.drops)


def fc2_gelu_backward(d_f, h, parameters, options, seed):
    """The gradient of fc1's output, fc2's input and the gradient's column sums, as in ``aten.py``."""
    weight = parameters.fc2_weight.to(d_f.dtype)
    return operators.fc2_gelu_backward(d_f, weight, h, seed, options.hidden_drop)


forward = differentiable(norm, sys.modules[__name__])

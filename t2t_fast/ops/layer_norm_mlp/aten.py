"""layer_norm_mlp in PyTorch operations.

    t = x + m1 branch    h = LayerNorm(t) W1^T + b1    out = t + m2 ((m gelu(h)) W2^T + b2)

Matrix products run in ``dtype``. Buffers of dead values are reused: on a CPU, the first access to new memory costs
more than the arithmetic.
"""

import sys

import torch
import torch.nn.functional as F

from .._common.library import product
from .._common.philox import HIDDEN, dropout_, keep_masks
from ..add_layer_norm import aten as norm
from .autograd import differentiable


def _hidden_mask(shape, options, seed):
    """The mask of the hidden units' dropout, or ``None``."""
    return keep_masks(seed, shape, options.hidden_drop, 0.0, HIDDEN)[0] if options.hidden_drop else None


def _linear(x, weight, bias, into=None):
    return product(x, weight.to(x.dtype).T, into, None if bias is None else bias.to(x.dtype))


def fc1_gelu(n, parameters, options, seed, keep):
    """fc1's output ``h`` (``None`` unless ``keep``) and the input of fc2."""
    h = _linear(n, parameters.fc1_weight, parameters.fc1_bias)
    a = F.gelu(h) if keep else torch.ops.aten.gelu_(h)
    return h if keep else None, dropout_(a, options.hidden_drop, _hidden_mask(a.shape, options, seed))


def fc2_add(a, t, parameters, options, seed, buffer):
    """The output: fc2, dropout, stochastic depth, with ``residual`` the stream; buffer: a dead tensor or ``None``."""
    weight, bias = (None if p is None else p.to(a.dtype) for p in parameters[4:])
    if not options.residual:
        return norm.dropped(_linear(a, weight, bias, buffer), seed, options.drops, 1, a.dtype)
    if any(options.drops[1]) or a.dtype != t.dtype or torch.jit.is_tracing():
        return (t + norm.dropped(_linear(a, weight, bias, buffer), seed, options.drops, 1, a.dtype)).to(t.dtype)
    out = (t.clone() if bias is None else t + bias).contiguous()
    rows = out.flatten(0, -2)  # accumulates onto the stream, so the sum needs no pass of its own
    torch.addmm(rows, a.flatten(0, -2), weight.T, out=rows)
    return out


def fc2_gradient(grad, options, seed):
    """The gradient of fc2's output, from the operator's; and its column sums, ``None``: to be computed."""
    return norm.dropped(grad, seed, options.drops, 1, options.dtype), None


def fc2_gelu_backward(d_f, h, parameters, options, seed):
    """The gradient of fc1's output, from that of fc2's; fc2's input again; the gradient's column sums or ``None``."""
    keep = _hidden_mask(h.shape, options, seed)
    d_h = dropout_(d_f @ parameters.fc2_weight.to(d_f.dtype), options.hidden_drop, keep)
    torch.ops.aten.gelu_backward.grad_input(d_h, h, grad_input=d_h)
    return d_h, dropout_(F.gelu(h), options.hidden_drop, keep), None


forward = differentiable(norm, sys.modules[__name__])

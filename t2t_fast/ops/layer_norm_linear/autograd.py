"""The operator's autograd function, composed of add_layer_norm's parts and PyTorch's matrix products."""

import torch
import torch.nn.functional as F

from .._common.library import accumulation_dtype, first_order, wants_gradient
from .._common.replay import recorded_forward
from ..add_layer_norm.autograd import Norm


def linear_gradients(grad, x, weight, bias, needed, sums=None):
    """The gradients of a Linear's weight and bias, ``None`` unless needed, from those of its output (..., O).

    sums: the column sums of ``grad``, if they are known.
    """
    need_weight, need_bias = needed
    grad = grad.flatten(0, -2)
    d_weight = (grad.T @ x.flatten(0, -2)).to(weight.dtype) if need_weight else None
    if need_bias and sums is None:
        sums = grad.sum(0, dtype=accumulation_dtype(grad.dtype))
    return d_weight, sums.to(bias.dtype) if need_bias else None


def differentiable(norm):
    """The operator's forward; saves x and the parameters, and no normalised tokens.

    norm: add_layer_norm's implementation, a module with the functions of its ``aten.py``.
    """

    def run(x, norm_weight, norm_bias, norm_eps, weight, bias, dtype):
        _, n = norm.add_normalised(x, Norm(norm_weight, norm_bias, norm_eps), dtype)
        return F.linear(n, weight.to(dtype), None if bias is None else bias.to(dtype))

    class LayerNormLinear(torch.autograd.Function):
        """Gradients for x and every parameter; x's own path and LayerNorm's are added where they are computed."""

        @staticmethod
        @recorded_forward
        def forward(ctx, x, norm_weight, norm_bias, norm_eps, weight, bias, dtype):
            ctx.norm_eps = norm_eps
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(x, norm_weight, norm_bias, weight, bias)
            return run(x, norm_weight, norm_bias, norm_eps, weight, bias, dtype), x.view_as(x)

        @staticmethod
        @first_order
        def backward(ctx, grad, skip):
            x, norm_weight, norm_bias, weight, bias = ctx.saved_tensors
            needed = ctx.needs_input_grad[4:6]
            d_n = grad @ weight.to(grad.dtype)
            d_x, _, n, *d_norm = norm.normalised_backward(
                d_n, skip, x, Norm(norm_weight, norm_bias, ctx.norm_eps), again=needed[0]
            )
            return d_x, *d_norm, None, *linear_gradients(grad, n, weight, bias, needed), None

    def forward(x, norm_weight, norm_bias, norm_eps, weight, bias, dtype):
        arguments = x, norm_weight, norm_bias, norm_eps, weight, bias, dtype
        if wants_gradient(x, norm_weight, norm_bias, weight, bias):
            return LayerNormLinear.apply(*arguments)
        return run(*arguments), x

    return forward

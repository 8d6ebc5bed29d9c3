"""The operator's autograd function, composed of an implementation's forward and backward."""

import torch

from .._common.library import accumulation_dtype, first_order, wants_gradient
from .._common.replay import recorded_forward
from .._common.spec import Window


def differentiable(run, run_backward, infer=None):
    """The forward of ``soft_split_linear`` with its gradients.

    Args:
        run: (x, weight, bias, norm_weight, norm_bias, norm_eps, window, dtype, pixels) -> tokens (B, L, O) in dtype,
            and each window's mean and reciprocal standard deviation (B, h, w); empty if ``run_backward`` does not
            need them, as without LayerNorm.
        run_backward: (grad, x, weight, bias, norm_weight, norm_bias, norm_eps, window, y, mean, rstd, needed, pixels)
            -> the gradients of the five tensors, each in its tensor's dtype, ``None`` unless needed. y: the tokens,
            needed only for the gradient of x with LayerNorm.
        infer: the ``run`` of calls that autograd does not record, if it differs.
    """

    class SoftSplitLinear(torch.autograd.Function):
        """Gradients for the image and every parameter (derivation: docs/math.md, section 1)."""

        @staticmethod
        @recorded_forward
        def forward(ctx, *inputs):
            *tensors, ctx.norm_eps, ctx.window, _, ctx.pixels = inputs
            y, mean, rstd = run(*inputs)
            keep = ctx.needs_input_grad[0] and ctx.norm_eps is not None
            ctx.save_for_backward(*tensors, y if keep else None, mean, rstd)
            return y

        @staticmethod
        @first_order
        def backward(ctx, grad):
            saved, needed = ctx.saved_tensors, ctx.needs_input_grad[:5]
            arguments = grad, *saved[:5], ctx.norm_eps, ctx.window, *saved[5:], needed, ctx.pixels
            gradients = run_backward(*arguments)
            return *gradients, None, None, None, None

    def forward(x, weight, bias, norm_weight, norm_bias, norm_eps, kernel, stride, padding, dtype, pixels=()):
        window = Window(tuple(kernel), tuple(stride), tuple(padding))
        record = wants_gradient(x, weight, bias, norm_weight, norm_bias)
        inputs = x, weight, bias, norm_weight, norm_bias, norm_eps, window, dtype, pixels
        return SoftSplitLinear.apply(*inputs) if record else (infer or run)(*inputs)[0]

    return forward


def parameter_gradients(products, total, grad, weight, bias, norm_weight, norm_bias, needed):
    """Gradients of the four parameters, each in the parameter's dtype, ``None`` unless needed.

    Args:
        products: ``P = sum_t G_t xhat_t^T`` (O, K); ``None`` where neither weight nor norm_weight needs a gradient.
        total: ``sum_t G_t`` (O); ``None`` if it has yet to be computed.
        grad: ``G`` (..., O).
        needed: four bools.
    """
    need_weight, need_bias, need_gamma, need_beta = needed
    d_weight = d_bias = d_gamma = d_beta = None
    wide = accumulation_dtype(grad.dtype)
    if total is None and (need_bias or need_beta or (need_weight and norm_bias is not None)):
        total = grad.flatten(0, -2).sum(0, dtype=wide)
    if need_weight:
        d_weight = products if norm_weight is None else products * norm_weight.to(wide)
        if norm_bias is not None:
            d_weight = torch.addcmul(d_weight, total.unsqueeze(1), norm_bias.to(wide))
        d_weight = d_weight.to(weight.dtype)
    if need_bias:
        d_bias = total.to(bias.dtype)
    if need_gamma:
        d_gamma = (weight.to(wide) * products).sum(0).to(norm_weight.dtype)
    if need_beta:
        d_beta = (total @ weight.to(wide)).to(norm_bias.dtype)
    return d_weight, d_bias, d_gamma, d_beta

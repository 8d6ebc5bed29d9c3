"""The operator's autograd function, composed of an implementation's parts."""

import torch

from .._common.library import first_order, wants_gradient
from .._common.philox import NONE, Drops


def differentiable(add, normalised, normalised_backward, dropped):
    """The operator's forward; saves the stream, the seed and the parameters.

    Args: functions without autograd, as in ``aten.py``.
    """

    class AddLayerNorm(torch.autograd.Function):
        """Gradients for the stream, the branch and LayerNorm's parameters."""

        @staticmethod
        def forward(x, branch, seed, drops, norm_eps, dtype, norm_weight, norm_bias):
            t = add(x, branch, seed, drops)
            return t, normalised(t, norm_weight, norm_bias, norm_eps, dtype)

        @staticmethod
        def setup_context(ctx, inputs, output):
            x, branch, seed, ctx.drops, ctx.norm_eps, _, *norm = inputs
            ctx.dtypes = x.dtype, branch.dtype
            ctx.save_for_backward(output[0], seed, *norm)

        @staticmethod
        @first_order
        def backward(ctx, d_stream, d_normalised):
            t, seed, *norm = ctx.saved_tensors
            x_dtype, branch_dtype = ctx.dtypes
            _, d_t, *d_norm = normalised_backward(d_normalised, d_stream, t, *norm, ctx.norm_eps)
            d_branch = dropped(d_t, seed, ctx.drops, 0, branch_dtype) if ctx.needs_input_grad[1] else None
            return d_t.to(x_dtype), d_branch, None, None, None, None, *d_norm

    def forward(x, branch, norm_weight, norm_bias, norm_eps, drop, drop_path, dtype, seed):
        drops = Drops(drop, drop_path), NONE
        if wants_gradient(x, branch, norm_weight, norm_bias):
            return AddLayerNorm.apply(x, branch, seed, drops, norm_eps, dtype, norm_weight, norm_bias)
        t = add(x, branch, seed, drops)
        return t, normalised(t, norm_weight, norm_bias, norm_eps, dtype)

    return forward

"""The operator's autograd function, composed of an implementation's parts."""

from typing import NamedTuple

import torch

from .._common.library import first_order, wants_gradient
from .._common.philox import Drops
from .._common.replay import recorded_forward


class Norm(NamedTuple):
    """A LayerNorm: parameters that may be ``None``, and eps, ``None`` for no LayerNorm at all."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float | None


def differentiable(add_normalised, normalised_backward):
    """The operator's forward; saves the stream, the seed and the parameters.

    Args: functions without autograd, as in ``aten.py``.
    """

    class AddLayerNorm(torch.autograd.Function):
        """Gradients for the stream, the branch and LayerNorm's parameters."""

        @staticmethod
        @recorded_forward
        def forward(ctx, x, branch, seed, drops, eps, dtype, *norm):
            ctx.drops, ctx.eps, ctx.branch_dtype = drops, eps, branch.dtype
            t, n = add_normalised(x, Norm(*norm, eps), dtype, branch, seed, drops)
            ctx.save_for_backward(t, seed, *norm)
            return t, n

        @staticmethod
        @first_order
        def backward(ctx, d_stream, d_normalised):
            t, seed, *norm = ctx.saved_tensors
            branch_dtype = ctx.branch_dtype if ctx.needs_input_grad[1] else None
            d_x, d_branch, _, *d_norm = normalised_backward(
                d_normalised, d_stream, t, Norm(*norm, ctx.eps), branch_dtype, seed, ctx.drops, again=False
            )
            return d_x, d_branch, None, None, None, None, *d_norm

    def forward(x, branch, norm_weight, norm_bias, norm_eps, drop, drop_path, dtype, seed):
        drops = Drops(drop, drop_path)
        if wants_gradient(x, branch, norm_weight, norm_bias):
            return AddLayerNorm.apply(x, branch, seed, drops, norm_eps, dtype, norm_weight, norm_bias)
        return add_normalised(x, Norm(norm_weight, norm_bias, norm_eps), dtype, branch, seed, drops)

    return forward

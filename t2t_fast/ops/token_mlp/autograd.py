"""The arguments of token_mlp, shared by all operators that end with it, and its autograd function."""

from typing import NamedTuple

import torch

from .._common.library import first_order, wants_gradient
from .._common.replay import recorded_forward


class MlpParameters(NamedTuple):
    """The parameters of token_mlp; biases and LayerNorm's two may be ``None``."""

    proj_weight: torch.Tensor
    proj_bias: torch.Tensor | None
    norm_weight: torch.Tensor | None
    norm_bias: torch.Tensor | None
    fc1_weight: torch.Tensor
    fc1_bias: torch.Tensor | None
    fc2_weight: torch.Tensor
    fc2_bias: torch.Tensor | None


class Options(NamedTuple):
    """LayerNorm's eps and the two dropout probabilities."""

    norm_eps: float
    proj_drop: float
    mlp_drop: float


def unpack(
    proj_weight,
    proj_bias,
    norm_weight,
    norm_bias,
    norm_eps,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    proj_drop,
    mlp_drop,
    seed,
):
    """The operators' last arguments, as :class:`MlpParameters`, :class:`Options` and the seed."""
    mlp = MlpParameters(proj_weight, proj_bias, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return mlp, Options(norm_eps, proj_drop, mlp_drop), seed


def differentiable(run, run_backward):
    """The operator's forward, composed of an implementation's forward and backward; saves y, v, the seed and the
    parameters.

    Args:
        run: (y, v, mlp, options, seed) -> the output; without autograd.
        run_backward: (grad, y, v, mlp, options, seed, needed) -> d_y, d_v (of the skip, in v's dtype or a wider one),
            and a list of gradients in the order of ``mlp``: ``None`` for an absent parameter, ``None`` or any value
            for one that is not ``needed``. Recomputes everything from y, v and the seed; grad: (..., L, E).
    """

    class TokenMlp(torch.autograd.Function):
        """Gradients for y, v and every parameter."""

        @staticmethod
        @recorded_forward
        def forward(ctx, y, v, seed, options, *mlp):
            ctx.options = options
            ctx.save_for_backward(y, v, seed, *mlp)
            return run(y, v, MlpParameters(*mlp), options, seed)

        @staticmethod
        @first_order
        def backward(ctx, grad):
            saved, needed = ctx.saved_tensors, ctx.needs_input_grad[4:]
            y, v, seed, *mlp = saved
            arguments = grad, y, v, MlpParameters(*mlp), ctx.options, seed, needed
            d_y, d_v, gradients = run_backward(*arguments)
            return d_y, d_v if d_v.dtype == v.dtype else d_v.to(v.dtype), None, None, *gradients

    def forward(y, v, *arguments):
        mlp, options, seed = unpack(*arguments)
        if wants_gradient(y, v, *mlp):
            return TokenMlp.apply(y, v, seed, options, *mlp)
        return run(y, v, mlp, options, seed)

    return forward

"""The arguments of the tail of a token layer, shared by all operators that end with it, and its autograd function."""

from typing import NamedTuple

import torch

from .._common.library import first_order, wants_gradient


class Tail(NamedTuple):
    """The parameters of the tail; biases and LayerNorm's two may be ``None``."""

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
    """The operators' last arguments (op.SIGNATURE), in their order: a :class:`Tail`, :class:`Options` and the seed."""
    tail = Tail(proj_weight, proj_bias, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return tail, Options(norm_eps, proj_drop, mlp_drop), seed


def differentiable(run, run_backward):
    """The operator's forward, composed of an implementation's forward and backward; saves y, v, the seed and the
    parameters.

    Args:
        run: (y, v, tail, options, seed) -> the output; without autograd.
        run_backward: (grad, y, v, tail, options, seed, needed) -> d_y, d_v (of the skip, in v's dtype or a wider one),
            and a list of gradients in the order of ``tail``: ``None`` for an absent parameter, ``None`` or any value
            for one that is not ``needed``. Recomputes everything from y, v and the seed; grad: (..., L, E).
    """

    class TokenMlp(torch.autograd.Function):
        """Gradients for y, v and every parameter."""

        @staticmethod
        def forward(y, v, seed, options, *tail):
            return run(y, v, Tail(*tail), options, seed)

        @staticmethod
        def setup_context(ctx, inputs, output):
            y, v, seed, ctx.options, *tail = inputs
            ctx.save_for_backward(y, v, seed, *tail)

        @staticmethod
        @first_order
        def backward(ctx, grad):
            y, v, seed, *tail = ctx.saved_tensors
            needed = ctx.needs_input_grad[4:]
            d_y, d_v, gradients = run_backward(grad, y, v, Tail(*tail), ctx.options, seed, needed)
            return d_y, d_v.to(v.dtype), None, None, *gradients

    def forward(y, v, *arguments):
        tail, options, seed = unpack(*arguments)
        if wants_gradient(y, v, *tail):
            return TokenMlp.apply(y, v, seed, options, *tail)
        return run(y, v, tail, options, seed)

    return forward

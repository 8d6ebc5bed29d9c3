"""A Performer layer made of ``soft_split_linear``, an attention and the tail, with what lies behind kqv in one.

The attention's output is computed again in backward, never saved: the tail's backward reads it, and its gradient is
where the attention's own backward starts. Saved: kqv, the key state (m (E + 1) floats a sample), the dropout seed, the
parameters.
"""

import torch

from ..library import first_order, wants_gradient
from ..token_mlp.tail import Tail, unpack


def compose(split, attend, rebuild, run_tail, run_tail_backward):
    """The layer's forward, made of one implementation of each operator.

    Args:
        split: soft_split_linear's forward.
        run_tail, run_tail_backward: token_mlp's ``run`` and ``run_backward``.
        attend: (kqv, w, eps) -> y in kqv's dtype, v, lz, state.
        rebuild: (kqv, w, eps, lz, state) -> y, v as above, and a function (d_y, d_skip, need_w) -> d_kqv, d_w (``None``
            if not needed), each in its tensor's dtype, where d_skip is what flows into v beside the attention.
    """

    def block(kqv, w, eps, tail, options, seed):
        y, v, lz, state = attend(kqv, w, eps)
        return run_tail(y, v, tail, options, seed), lz, state

    class PerformerBlock(torch.autograd.Function):
        """Gradients for kqv, the tail's parameters, and w where it is asked for."""

        @staticmethod
        def forward(kqv, w, eps, seed, options, *tail):
            return block(kqv, w, eps, Tail(*tail), options, seed)

        @staticmethod
        def setup_context(ctx, inputs, output):
            kqv, w, ctx.eps, seed, ctx.options, *tail = inputs
            _, lz, state = output
            ctx.mark_non_differentiable(lz, state)
            ctx.save_for_backward(kqv, w, seed, lz, state, *tail)

        @staticmethod
        @first_order
        def backward(ctx, grad, _lz, _state):
            kqv, w, seed, lz, state, *tail = ctx.saved_tensors
            y, v, finish = rebuild(kqv, w, ctx.eps, lz, state)
            needed = ctx.needs_input_grad[5:]
            d_y, d_skip, gradients = run_tail_backward(grad, y, v, Tail(*tail), ctx.options, seed, needed)
            return *finish(d_y, d_skip, ctx.needs_input_grad[1]), None, None, None, *gradients

    def forward(
        x,
        kqv_weight,
        kqv_bias,
        norm1_weight,
        norm1_bias,
        norm1_eps,
        kernel,
        stride,
        padding,
        dtype,
        w,
        eps,
        *arguments,
    ):
        kqv = split(x, kqv_weight, kqv_bias, norm1_weight, norm1_bias, norm1_eps, kernel, stride, padding, dtype)
        tail, options, seed = unpack(*arguments)
        if wants_gradient(kqv, w, *tail):
            return PerformerBlock.apply(kqv, w, eps, seed, options, *tail)[0]
        return block(kqv, w, eps, tail, options, seed)[0]

    return forward

"""A Performer layer made of ``soft_split_linear``, an attention and the tail, with what lies behind kqv in one.

The attention's output is computed again in backward, never saved: the tail's backward reads it, and its gradient is
where the attention's own backward starts. Saved: the image or tokens, kqv (in low memory it is computed again too), the
key state (m (E + 1) floats a sample), the dropout seed, the parameters.
"""

from typing import NamedTuple

import torch

from ..library import first_order, wants_gradient
from ..spec import Window
from ..token_mlp.tail import Options, Tail, unpack


class Layer(NamedTuple):
    """The arguments of a whole layer that are no tensors."""

    norm1_eps: float
    window: Window
    dtype: torch.dtype
    pixels: list
    eps: float
    tail: Options


def compose(split, block, rebuild, run_tail_backward):
    """The layer's forward, made of one implementation of each operator.

    Args:
        split: soft_split_linear's implementation, a module with ``forward``, ``run`` and ``run_backward``.
        block: (kqv, w, eps, tail, options, seed) -> the layer's output, lz, state; without autograd.
        rebuild: (kqv, w, eps, lz, state) -> y in kqv's dtype, v, and a function (d_y, d_skip, need_w) -> d_kqv, d_w
            (``None`` if not needed), each in its tensor's dtype, where d_skip is what flows into v beside the
            attention.
        run_tail_backward: token_mlp's ``run_backward``.
    """

    def block_backward(grad, kqv, w, eps, lz, state, tail, options, seed, need_w, needed):
        """d_kqv, d_w and the gradients of the tail's parameters."""
        y, v, finish = rebuild(kqv, w, eps, lz, state)
        d_y, d_skip, d_tail = run_tail_backward(grad, y, v, tail, options, seed, needed)
        return *finish(d_y, d_skip, need_w), d_tail

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
            _, need_w, _, _, _, *needed = ctx.needs_input_grad
            d_kqv, d_w, d_tail = block_backward(
                grad, kqv, w, ctx.eps, lz, state, Tail(*tail), ctx.options, seed, need_w, needed
            )
            return d_kqv, d_w, None, None, None, *d_tail

    class LowMemoryLayer(torch.autograd.Function):
        """Gradients for the image, every parameter, and w where it is asked for; kqv is computed again."""

        @staticmethod
        def forward(layer, seed, w, x, kqv_weight, kqv_bias, norm1_weight, norm1_bias, *tail):
            linear = (kqv_weight, kqv_bias, norm1_weight, norm1_bias)
            kqv, _, _ = split.run(x, *linear, layer.norm1_eps, layer.window, layer.dtype, layer.pixels)
            return block(kqv, w, layer.eps, Tail(*tail), layer.tail, seed)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.layer, *tensors = inputs
            _, lz, state = output
            ctx.mark_non_differentiable(lz, state)
            ctx.save_for_backward(lz, state, *tensors)

        @staticmethod
        @first_order
        def backward(ctx, grad, _lz, _state):
            lz, state, seed, w, x, *parameters = ctx.saved_tensors
            _, _, need_w, *needed = ctx.needs_input_grad
            layer = ctx.layer
            linear = (*parameters[:4], layer.norm1_eps, layer.window)
            kqv, mean, rstd = split.run(_unknown_before(grad, x), *linear, layer.dtype, layer.pixels)
            d_kqv, d_w, d_tail = block_backward(
                grad, kqv, w, layer.eps, lz, state, Tail(*parameters[4:]), layer.tail, seed, need_w, needed[5:]
            )
            if not needed[0]:
                kqv = None  # its memory is free for the rest
            d_linear = split.run_backward(d_kqv, x, *linear, kqv, mean, rstd, needed[:5], layer.pixels)
            return None, None, d_w, *d_linear, *d_tail

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
        pixels,
        w,
        eps,
        *arguments,
    ):
        *tail_arguments, low_memory = arguments
        tail, options, seed = unpack(*tail_arguments)
        linear = (kqv_weight, kqv_bias, norm1_weight, norm1_bias)
        if low_memory and wants_gradient(x, *linear, w, *tail):
            window = Window(tuple(kernel), tuple(stride), tuple(padding))
            layer = Layer(norm1_eps, window, dtype, pixels, eps, options)
            return LowMemoryLayer.apply(layer, seed, w, x, *linear, *tail)[0]
        kqv = split.forward(x, *linear, norm1_eps, kernel, stride, padding, dtype, pixels)
        if wants_gradient(kqv, w, *tail):
            return PerformerBlock.apply(kqv, w, eps, seed, options, *tail)[0]
        return block(kqv, w, eps, tail, options, seed)[0]

    return forward


def _unknown_before(grad, x):
    """``x``, for a compiler a value that depends on ``grad``.

    It would see otherwise that forward computed the same from the same, and keep that for backward.
    """
    # torch 2.11 says that it compiles only while dynamo traces, not while the operator is traced through
    if type(grad) is torch.Tensor and not torch.compiler.is_compiling():
        return x
    return torch.where(grad.flatten()[:1].isnan().any(), x, x)

"""A Performer layer made of ``soft_split_linear``, an attention and the tail, as autograd sees it.

The attention's output is computed again in backward, never saved: the tail's backward reads it, and its gradient is
where the attention's own backward starts. Saved: the image or tokens, kqv and its windows' statistics (in low memory
they are computed again too), the key state (m (E + 1) floats a sample), the dropout seed, the parameters.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .._common.library import first_order, wants_gradient
from .._common.spec import Window
from ..token_mlp.autograd import Options, Tail, unpack


class Layer(NamedTuple):
    """The arguments of a whole layer that are no tensors."""

    norm1_eps: float
    window: Window
    dtype: torch.dtype
    pixels: list
    eps: float
    tail: Options
    recompute: bool


class Composed(NamedTuple):
    """A layer's ``forward``, of the operator's arguments; and its two halves without autograd.

    ``run`` returns the output and what is kept for backward, ``run_backward`` the gradients of w, the Linear's five
    tensors and the tail's parameters.
    """

    forward: Callable
    run: Callable
    run_backward: Callable


def compose(split, project, output, recompute_attention, run_tail_backward):
    """The layer made of one implementation of each operator, a :class:`Composed`.

    Args:
        split: soft_split_linear's implementation, a module with ``run`` and ``run_backward``.
        project: (x, linear, w, layer, whole, keep) -> kqv, each window's mean and reciprocal standard deviation, lz and
            state; without autograd. ``linear``: the Linear's four tensors. Not ``whole``: of kqv, q and v do, and the
            statistics are not wanted. ``keep``: what is made of the parameters may be kept for the next call.
        output: (kqv or its q and v, w, eps, lz, state, tail, options, seed) -> the layer's output; without autograd.
        recompute_attention: (kqv, w, eps, lz, state) -> y in kqv's dtype, v, and a function (d_y, d_skip, need_w) ->
            d_kqv, d_w (``None`` if not needed), each in its tensor's dtype, where d_skip is what flows into v beside
            the attention.
        run_tail_backward: token_mlp's ``run_backward``.
    """

    def behind_kqv(grad, kqv, w, lz, state, tail, layer, seed, need_kqv, need_w, needed):
        """d_kqv, d_w (``None`` unless needed) and the gradients of the tail's parameters; frees all else it made."""
        y, v, attention_backward = recompute_attention(kqv, w, layer.eps, lz, state)
        d_y, d_skip, d_tail = run_tail_backward(grad, y, v, tail, layer.tail, seed, needed)
        d_kqv, d_w = attention_backward(d_y, d_skip, need_w) if need_kqv or need_w else (None, None)
        return d_kqv, d_w, d_tail

    def run(layer, seed, w, x, *parameters):
        """The output, lz, state, and kqv with its statistics unless in low memory."""
        linear, tail = parameters[:4], Tail(*parameters[4:])
        kqv, mean, rstd, lz, state = project(x, linear, w, layer, not layer.recompute, False)
        out = output(kqv, w, layer.eps, lz, state, tail, layer.tail, seed)
        return (out, lz, state) if layer.recompute else (out, lz, state, kqv, mean, rstd)

    def run_backward(grad, kept, layer, seed, w, x, *parameters, needed):
        """The gradients of w, x and each of the parameters, ``None`` unless needed."""
        (lz, state, *found), tail = kept, Tail(*parameters[4:])
        linear = (*parameters[:4], layer.norm1_eps, layer.window)
        need_w, *needed = needed
        need_kqv = any(needed[:5])
        if not found:
            found = split.run(_unknown_before(grad, x), *linear, layer.dtype, layer.pixels)
        kqv, mean, rstd = found
        d_kqv, d_w, d_tail = behind_kqv(grad, kqv, w, lz, state, tail, layer, seed, need_kqv, need_w, needed[5:])
        d_linear = [None] * 5
        if need_kqv:
            if not needed[0]:
                kqv = found = None  # if it was computed again, its memory is free for the rest
            d_linear = split.run_backward(d_kqv, x, *linear, kqv, mean, rstd, needed[:5], layer.pixels)
        return d_w, *d_linear, *d_tail

    class PerformerLayer(torch.autograd.Function):
        """Gradients for the image, every parameter, and w where it is asked for."""

        forward = staticmethod(run)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.layer, *tensors = inputs
            _, *kept = output
            ctx.mark_non_differentiable(*kept)
            ctx.set_materialize_grads(False)  # else zeros as large as kqv would be made for it
            ctx.kept = len(kept)
            ctx.save_for_backward(*kept, *tensors)

        @staticmethod
        @first_order
        def backward(ctx, grad, *_):
            saved, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
            kept, tensors = saved[: ctx.kept], saved[ctx.kept :]
            return None, None, *run_backward(grad, kept, ctx.layer, *tensors, needed=needed)

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
        *tail_arguments, recompute = arguments
        tail, options, seed = unpack(*tail_arguments)
        linear = (kqv_weight, kqv_bias, norm1_weight, norm1_bias)
        window = Window(tuple(kernel), tuple(stride), tuple(padding))
        layer = Layer(norm1_eps, window, dtype, pixels, eps, options, recompute)
        if wants_gradient(x, *linear, w, *tail):
            return PerformerLayer.apply(layer, seed, w, x, *linear, *tail)[0]
        kqv, _, _, lz, state = project(x, linear, w, layer, False, True)
        return output(kqv, w, eps, lz, state, tail, options, seed)

    return Composed(forward, run, run_backward)


def _unknown_before(grad, x):
    """``x``, for a compiler a value that depends on ``grad``.

    It would see otherwise that forward computed the same from the same, and keep that for backward.
    """
    # torch 2.11 says that it compiles only while dynamo traces, not while the operator is traced through
    if type(grad) is torch.Tensor and not torch.compiler.is_compiling():
        return x
    return torch.where(grad.flatten()[:1].isnan().any(), x, x)

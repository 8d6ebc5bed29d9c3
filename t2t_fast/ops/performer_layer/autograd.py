"""The autograd function of a Performer layer composed of ``soft_split_linear``, an attention and token_mlp.

The attention's output is recomputed in backward and never saved: token_mlp's backward reads it, and the attention's
backward starts from its gradient. Saved: the image or tokens, kqv and its windows' statistics (recomputed as well with
``recompute``), the key state (m (E + 1) floats a sample), the dropout seed, the parameters.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .._common.library import first_order, wants_gradient
from .._common.replay import recorded_forward
from .._common.spec import Window
from ..token_mlp.autograd import MlpParameters, Options, unpack


class Layer(NamedTuple):
    """The arguments of a layer that are not tensors."""

    norm1_eps: float
    window: Window
    dtype: torch.dtype
    pixels: list
    eps: float
    mlp: Options
    recompute: bool


class Composed(NamedTuple):
    """A layer's ``forward``, which takes the operator's arguments, and its two halves without autograd.

    ``run`` returns the output and the tensors saved for backward; ``run_backward`` returns the gradients of w, the
    Linear's five tensors and token_mlp's parameters.
    """

    forward: Callable
    run: Callable
    run_backward: Callable


def compose(split, project, output, recompute_attention, run_mlp_backward):
    """Compose a layer, a :class:`Composed`, of one implementation of each operator.

    Args:
        split: soft_split_linear's implementation, a module with ``run`` and ``run_backward``.
        project: (x, linear, w, layer, whole, keep) -> kqv, each window's mean and reciprocal standard deviation, lz and
            state; without autograd. ``linear``: the Linear's four tensors. Unless ``whole``, only q and v of kqv are
            needed, and no statistics. ``keep``: values derived from the parameters may be cached for the next call.
        output: (kqv or its q and v, w, eps, lz, state, mlp, options, seed) -> the layer's output; without autograd.
        recompute_attention: (kqv, w, eps, lz, state) -> y in kqv's dtype, v, and a function (d_y, d_skip, need_w) ->
            d_kqv, d_w (``None`` if not needed), each in its tensor's dtype, where d_skip is the gradient that reaches
            v by the skip.
        run_mlp_backward: token_mlp's ``run_backward``.
    """

    def behind_kqv(grad, kqv, w, lz, state, mlp, layer, seed, need_kqv, need_w, needed):
        """d_kqv, d_w (``None`` unless needed) and the gradients of token_mlp's parameters; frees its other tensors."""
        y, v, attention_backward = recompute_attention(kqv, w, layer.eps, lz, state)
        d_y, d_skip, d_mlp = run_mlp_backward(grad, y, v, mlp, layer.mlp, seed, needed)
        d_kqv, d_w = attention_backward(d_y, d_skip, need_w) if need_kqv or need_w else (None, None)
        return d_kqv, d_w, d_mlp

    def run(layer, seed, w, x, *parameters):
        """The output, lz, state, and, unless ``recompute``, kqv with its statistics."""
        linear, mlp = parameters[:4], MlpParameters(*parameters[4:])
        kqv, mean, rstd, lz, state = project(x, linear, w, layer, not layer.recompute, False)
        out = output(kqv, w, layer.eps, lz, state, mlp, layer.mlp, seed)
        return (out, lz, state) if layer.recompute else (out, lz, state, kqv, mean, rstd)

    def run_backward(grad, kept, layer, seed, w, x, *parameters, needed):
        """The gradients of w, x and each of the parameters, ``None`` unless needed."""
        (lz, state, *found), mlp = kept, MlpParameters(*parameters[4:])
        linear = (*parameters[:4], layer.norm1_eps, layer.window)
        need_w, *needed = needed
        need_kqv = any(needed[:5])
        if not found:
            found = split.run(_unknown_before(grad, x), *linear, layer.dtype, layer.pixels)
        kqv, mean, rstd = found
        d_kqv, d_w, d_mlp = behind_kqv(grad, kqv, w, lz, state, mlp, layer, seed, need_kqv, need_w, needed[5:])
        d_linear = [None] * 5
        if need_kqv:
            if not needed[0]:
                kqv = found = None  # if it was recomputed, this frees its memory
            d_linear = split.run_backward(d_kqv, x, *linear, kqv, mean, rstd, needed[:5], layer.pixels)
        return d_w, *d_linear, *d_mlp

    class PerformerLayer(torch.autograd.Function):
        """Gradients for the image, every parameter, and w if it requires one."""

        @staticmethod
        @recorded_forward
        def forward(ctx, layer, *tensors):
            out, *kept = run(layer, *tensors)
            ctx.layer, ctx.kept = layer, len(kept)
            ctx.save_for_backward(*kept, *tensors)
            return out

        @staticmethod
        @first_order
        def backward(ctx, grad):
            saved, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
            kept, tensors = saved[: ctx.kept], saved[ctx.kept :]
            gradients = run_backward(grad, kept, ctx.layer, *tensors, needed=needed)
            return None, None, *gradients

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
        *mlp_arguments, recompute = arguments
        mlp, options, seed = unpack(*mlp_arguments)
        linear = (kqv_weight, kqv_bias, norm1_weight, norm1_bias)
        window = Window(tuple(kernel), tuple(stride), tuple(padding))
        layer = Layer(norm1_eps, window, dtype, pixels, eps, options, recompute)
        if wants_gradient(x, *linear, w, *mlp):
            return PerformerLayer.apply(layer, seed, w, x, *linear, *mlp)
        kqv, _, _, lz, state = project(x, linear, w, layer, False, True)
        return output(kqv, w, eps, lz, state, mlp, options, seed)

    return Composed(forward, run, run_backward)


def _unknown_before(grad, x):
    """``x``, as a value that depends on ``grad`` for the compiler.

    Otherwise the compiler would detect the same computation in forward and save its result for backward.
    """
    # torch 2.11 reports compilation only while dynamo traces, not while the operator itself is traced
    if type(grad) is torch.Tensor and not torch.compiler.is_compiling():
        return x
    return torch.where(grad.flatten()[:1].isnan().any(), x, x)

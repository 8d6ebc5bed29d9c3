"""A Performer layer as one native operator (``csrc/cpu``): it holds kqv of one image at a time.

Saved for backward: the image or tokens, the key state (m (E + 1) floats a sample), the dropout seed, the parameters.
Backward always recomputes kqv, overwrites it with its gradient, and computes the gradients of the weight and the image
from that.
"""

from typing import NamedTuple

import torch

from .._common import native_library
from .._common.library import first_order, wants_gradient
from .._common.native_library import fake_gradients, gradient, image_gradient, single
from .._common.pixels import values
from .._common.spec import Window
from ..token_mlp.autograd import unpack

_KINDS = native_library.devices("performer_layer")


class Options(NamedTuple):
    """The arguments that are not tensors, and their positions."""

    norm1_eps: float
    window: tuple
    eps: float
    norm_eps: float
    drops: tuple
    bf16: bool

    def arguments(self, x, kqv_weight, kqv_bias, norm1_weight, norm1_bias, w, *mlp_and_seed):
        """The native operator's arguments, with tensors in float32."""
        *mlp, seed = mlp_and_seed
        linear = single(x, kqv_weight, kqv_bias, norm1_weight, norm1_bias)
        w, proj_weight, proj_bias, norm_weight, norm_bias, *fc = single(w, *mlp)
        head = (proj_weight, proj_bias, norm_weight, norm_bias, self.norm_eps)
        return (*linear, self.norm1_eps, *self.window, w, self.eps, *head, *fc, *self.drops, seed)


def supports(request):
    return native_library.reason(request, _KINDS, native_library.SINGLE)


@native_library.fake("performer_layer")
def _fake(x, weight, bias, norm1_weight, norm1_bias, norm1_eps, kernel, stride, padding, w, *rest):
    h, w_grid = Window(tuple(kernel), tuple(stride), tuple(padding)).grid(*x.shape[2:])
    features, width = w.shape
    batch = x.shape[0]
    out = x.new_empty(batch, h * w_grid, width)
    return out, x.new_empty(batch, features), x.new_empty(batch, features, width)


@native_library.fake("performer_layer_backward")
def _fake_backward(grad, x, weight, bias, norm1_weight, norm1_bias, norm1_eps, kernel, stride, padding, w, eps, *rest):
    proj_weight, proj_bias, norm_weight, norm_bias, _, *fc, _, _, _, _, _, need_image, need_weight, need_w = rest[:17]
    return (
        native_library.fake_image_gradient(x, need_image),
        *fake_gradients(x, weight if need_weight else None, bias, norm1_weight if need_weight else None, norm1_bias),
        *fake_gradients(x, w if need_w else None, proj_weight, proj_bias, norm_weight, norm_bias, *fc),
    )


class PerformerLayer(torch.autograd.Function):
    """Gradients for the image, every parameter, and w if it requires one."""

    @staticmethod
    def forward(options, *tensors):
        return torch.ops.t2t_fast_native.performer_layer(*options.arguments(*tensors), options.bf16)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options, *tensors = inputs
        _, lz, state = output
        ctx.mark_non_differentiable(lz, state)
        ctx.save_for_backward(lz, state, *tensors)

    @staticmethod
    @first_order
    def backward(ctx, grad, _lz, _state):
        lz, state, *tensors = ctx.saved_tensors
        need_x, need_weight, _, need_gamma, _, need_w = ctx.needs_input_grad[1:7]
        arguments = ctx.options.arguments(*tensors)
        d_image, *found = torch.ops.t2t_fast_native.performer_layer_backward(
            grad, *arguments, lz, state, need_x, need_weight or need_gamma, need_w, ctx.options.bf16
        )
        d_x = image_gradient(d_image, arguments[0])
        gradients = [gradient(value, tensor) for value, tensor in zip(found, tensors[1:-1], strict=True)]
        return None, None if d_x is None else d_x.to(tensors[0].dtype), *gradients, None


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
    *mlp_arguments, _ = arguments
    x = values(x, pixels, torch.float32)
    mlp, (norm_eps, *drops), seed = unpack(*mlp_arguments)
    options = Options(norm1_eps, (kernel, stride, padding), eps, norm_eps, tuple(drops), dtype == torch.bfloat16)
    linear = (kqv_weight, kqv_bias, norm1_weight, norm1_bias)
    run = PerformerLayer.apply if wants_gradient(x, *linear, w, *mlp) else PerformerLayer.forward
    return run(options, x, *linear, w, *mlp, seed)[0].to(dtype)

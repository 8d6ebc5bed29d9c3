"""Soft split, LayerNorm and Linear in one native operator (``csrc/cpu``), which unfolds one tile of tokens at a time.

Products are of bfloat16 for a result of that dtype, everything else is float32.

Saved for backward: the image and the parameters; backward unfolds and normalises again.
"""

import torch

from .._common import native_library
from .._common.library import first_order, wants_gradient
from .._common.native_library import fake_gradients, gradient, image_gradient, single
from .._common.pixels import values
from .._common.spec import Window

_KINDS = native_library.devices("soft_split_linear")


def supports(request):
    return native_library.reason(request, _KINDS, native_library.SINGLE)


@native_library.fake("soft_split_linear")
def _fake(x, weight, bias, norm_weight, norm_bias, norm_eps, kernel, stride, padding, bf16=False):
    h, w = Window(tuple(kernel), tuple(stride), tuple(padding)).grid(*x.shape[2:])
    return x.new_empty(x.shape[0], h * w, weight.shape[0])


@native_library.fake("soft_split_linear_backward")
def _fake_backward(grad, x, weight, bias, norm_weight, norm_bias, norm_eps, kernel, stride, padding, *rest):
    image, products = rest[:2]
    parameters = (weight if products else None, bias, norm_weight if products else None, norm_bias)
    return native_library.fake_image_gradient(x, image), *fake_gradients(x, *parameters)


class SoftSplitLinear(torch.autograd.Function):
    """Gradients for the image and every parameter."""

    @staticmethod
    def forward(x, weight, bias, norm_weight, norm_bias, norm_eps, window, bf16):
        tensors = single(x, weight, bias, norm_weight, norm_bias)
        return torch.ops.t2t_fast_native.soft_split_linear(*tensors, norm_eps, *window, bf16)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.norm_eps, ctx.window, ctx.bf16 = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @first_order
    def backward(ctx, grad):
        tensors = ctx.saved_tensors
        need_x, need_weight, _, need_gamma, _ = ctx.needs_input_grad[:5]
        x, *parameters = single(*tensors)
        d_image, *found = torch.ops.t2t_fast_native.soft_split_linear_backward(
            grad.to(torch.float32),
            x,
            *parameters,
            ctx.norm_eps,
            *ctx.window,
            need_x,
            need_weight or need_gamma,
            ctx.bf16,
        )
        d_x = image_gradient(d_image, x)
        gradients = [gradient(value, tensor) for value, tensor in zip(found, tensors[1:], strict=True)]
        return None if d_x is None else d_x.to(tensors[0].dtype), *gradients, None, None, None


def forward(x, weight, bias, norm_weight, norm_bias, norm_eps, kernel, stride, padding, dtype, pixels=()):
    options = norm_eps, (kernel, stride, padding), dtype == torch.bfloat16
    tensors = (values(x, pixels, torch.float32), weight, bias, norm_weight, norm_bias)
    run = SoftSplitLinear.apply if wants_gradient(*tensors) else SoftSplitLinear.forward
    return run(*tensors, *options).to(dtype)

"""Soft split as one native copy (``csrc/cpu``, ``csrc/cuda``); its gradient is the native soft composition."""

import torch

from .._common import native_library
from .._common.library import first_order, wants_gradient
from .._common.spec import Window

_KINDS = native_library.devices("soft_split")


def supports(request):
    return native_library.reason(request, _KINDS)


@native_library.fake("soft_split")
def _fake(x, kernel, stride, padding):
    batch, channels, height, width = x.shape
    window = Window(tuple(kernel), tuple(stride), tuple(padding))
    h, w = window.grid(height, width)
    return x.new_empty(batch, h * w, channels * window.taps)


class SoftSplit(torch.autograd.Function):
    """Saves only sizes. The image's gradient has the image's memory format."""

    @staticmethod
    def forward(x, window):
        return torch.ops.t2t_fast_native.soft_split(x, *window)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.window = inputs
        ctx.size, ctx.channels_last = x.shape[2:], x.stride(1) == 1

    @staticmethod
    @first_order
    def backward(ctx, grad):
        return torch.ops.t2t_fast_native.soft_composition(grad, ctx.size, *ctx.window, ctx.channels_last), None


def forward(x, kernel, stride, padding):
    if wants_gradient(x):
        return SoftSplit.apply(x, (kernel, stride, padding))
    return torch.ops.t2t_fast_native.soft_split(x, kernel, stride, padding)

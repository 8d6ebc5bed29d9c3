"""Soft split as one strided copy of a window view; its gradient is the soft composition."""

import torch

from .._common.library import first_order, wants_gradient
from .._common.spec import Window
from .._common.windows import compose, in_layout, split


class SoftSplit(torch.autograd.Function):
    """Saves only sizes. The image's gradient has the image's memory format."""

    @staticmethod
    def forward(x, window):
        return split(x, window)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.window = inputs
        ctx.size, ctx.channels_last = tuple(x.shape[2:]), x.stride(1) == 1

    @staticmethod
    @first_order
    def backward(ctx, grad):
        return in_layout(compose(grad, ctx.size, ctx.window), ctx.channels_last), None


def forward(x, kernel, stride, padding):
    window = Window(tuple(kernel), tuple(stride), tuple(padding))
    return SoftSplit.apply(x, window) if wants_gradient(x) else split(x, window)

"""Soft split as one strided copy of a window view; its gradient is the soft composition."""

import torch

from ..library import first_order, wants_gradient
from ..spec import Window
from ..windows import compose, split


class SoftSplit(torch.autograd.Function):
    """Saves nothing but sizes."""

    @staticmethod
    def forward(x, window):
        return split(x, window)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.window = inputs
        ctx.size = tuple(x.shape[2:])

    @staticmethod
    @first_order
    def backward(ctx, grad):
        return compose(grad, ctx.size, ctx.window), None


def forward(x, kernel, stride, padding):
    window = Window(tuple(kernel), tuple(stride), tuple(padding))
    return SoftSplit.apply(x, window) if wants_gradient(x) else split(x, window)

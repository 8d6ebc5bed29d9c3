"""Fold, normalise, unfold with the overlap count in closed form; the gradient is the same computation."""

import torch

from .._common.library import accumulation_dtype, first_order, wants_gradient
from .._common.spec import Window
from .._common.windows import compose, overlap, split


def _project(tokens, size, window):
    """The image is formed in float32 (float64 for float64) and rounded once."""
    image = compose(tokens.to(accumulation_dtype(tokens.dtype)), size, window)
    return split((image / overlap(size, window, image)).to(tokens.dtype), window)


class FusedFoldUnfold(torch.autograd.Function):
    """The operator is symmetric, so backward applies forward to the gradient. Saves only sizes."""

    @staticmethod
    def forward(tokens, size, window):
        return _project(tokens, size, window)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.size, ctx.window = inputs

    @staticmethod
    @first_order
    def backward(ctx, grad):
        return _project(grad, ctx.size, ctx.window), None, None


def forward(tokens, size, kernel, stride, padding):
    window = Window(tuple(kernel), tuple(stride), tuple(padding))
    run = FusedFoldUnfold.apply if wants_gradient(tokens) else _project
    return run(tokens, tuple(size), window)

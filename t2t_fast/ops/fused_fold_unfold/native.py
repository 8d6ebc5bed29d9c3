"""Fold, normalise, unfold in one native pass (``csrc/cpu``, ``csrc/cuda``); the gradient is the same pass."""

import torch

from .._common import native_library
from .._common.library import first_order, wants_gradient

_KINDS = native_library.devices("fused_fold_unfold")


def supports(request):
    return native_library.reason(request, _KINDS)


@native_library.fake("fused_fold_unfold")
def _fake(tokens, size, kernel, stride, padding):
    return tokens.new_empty(tokens.shape)


class FusedFoldUnfold(torch.autograd.Function):
    """The operator is symmetric, so backward applies forward to the gradient. Saves only sizes."""

    @staticmethod
    def forward(tokens, geometry):
        return torch.ops.t2t_fast_native.fused_fold_unfold(tokens, *geometry)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.geometry = inputs

    @staticmethod
    @first_order
    def backward(ctx, grad):
        return torch.ops.t2t_fast_native.fused_fold_unfold(grad, *ctx.geometry), None


def forward(tokens, size, kernel, stride, padding):
    geometry = (size, kernel, stride, padding)
    if wants_gradient(tokens):
        return FusedFoldUnfold.apply(tokens, geometry)
    return torch.ops.t2t_fast_native.fused_fold_unfold(tokens, *geometry)

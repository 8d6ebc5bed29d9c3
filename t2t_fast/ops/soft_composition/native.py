"""Soft composition in one native pass (``csrc/cpu``, ``csrc/cuda``); its gradient is the native soft split."""

import torch

from .._common import native_library
from .._common.library import first_order, wants_gradient
from .._common.spec import Window

_KINDS = native_library.devices("soft_composition")


def supports(request):
    return native_library.reason(request, _KINDS)


@native_library.fake("soft_composition")
def _fake(tokens, size, kernel, stride, padding, channels_last):
    taps = Window(tuple(kernel), tuple(stride), tuple(padding)).taps
    shape = (tokens.shape[0], tokens.shape[2] // taps, *size)
    order = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=tokens.dtype, device=tokens.device, memory_format=order)


class SoftComposition(torch.autograd.Function):
    """Saves only sizes."""

    @staticmethod
    def forward(tokens, size, window):
        return torch.ops.t2t_fast_native.soft_composition(tokens, size, *window, False)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, ctx.window = inputs

    @staticmethod
    @first_order
    def backward(ctx, grad):
        return torch.ops.t2t_fast_native.soft_split(grad, *ctx.window), None, None


def forward(tokens, size, kernel, stride, padding):
    window = (kernel, stride, padding)
    if wants_gradient(tokens):
        return SoftComposition.apply(tokens, size, window)
    return torch.ops.t2t_fast_native.soft_composition(tokens, size, *window, False)

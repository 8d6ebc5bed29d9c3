"""Performer attention as a native operator (``csrc/cpu``): one pass over the keys, one over the queries, in float32.

Saved for backward: q, k, v, w and the key state, m (E + 1) floats a sample.
"""

import torch

from .._common import native_library
from .._common.library import first_order, wants_gradient
from .._common.native_library import gradient, single
from . import aten

_KINDS = native_library.devices("performer_attention")


def supports(request):
    masked = "no key mask in the native kernels" if request.sizes.get("masked") else None
    return (
        masked
        or aten.beyond_kernels(request, "native")
        or native_library.reason(request, _KINDS, native_library.SINGLE)
    )


@native_library.fake("performer_attention")
def _fake(q, k, v, w, eps, bf16=False):
    return q.new_empty(q.shape), q.new_empty(q.shape[0], w.shape[0]), q.new_empty(q.shape[0], *w.shape)


@native_library.fake("performer_attention_backward")
def _fake_backward(grad, q, k, v, w, eps, lz, state, need_w, bf16=False):
    return q.new_empty(q.shape), q.new_empty(k.shape), q.new_empty(k.shape), q.new_empty(w.shape if need_w else 0)


class PerformerAttention(torch.autograd.Function):
    """Gradients for q, k, v (B, L, E), and w if it requires one."""

    @staticmethod
    def forward(q, k, v, w, eps):
        return torch.ops.t2t_fast_native.performer_attention(*single(q, k, v, w), eps, q.dtype == torch.bfloat16)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.eps = inputs
        _, lz, state = output
        ctx.mark_non_differentiable(lz, state)
        ctx.save_for_backward(*tensors, lz, state)

    @staticmethod
    @first_order
    def backward(ctx, grad, _lz, _state):
        *tensors, lz, state = ctx.saved_tensors
        found = torch.ops.t2t_fast_native.performer_attention_backward(
            *single(grad, *tensors), ctx.eps, lz, state, ctx.needs_input_grad[3], tensors[0].dtype == torch.bfloat16
        )
        return *(gradient(value, tensor) for value, tensor in zip(found, tensors, strict=True)), None


def forward(q, k, v, w, eps, key_mask, causal, normalize):
    """``supports`` rejects key masks, ``causal`` and ``normalize``."""
    shape = q.shape
    if q.dim() == 4:  # each head is a separate sequence
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    run = PerformerAttention.apply if wants_gradient(q, k, v, w) else PerformerAttention.forward
    return run(q, k, v, w, eps)[0].to(q.dtype).view(shape)

"""The operators ``t2t_fast_triton::performer_attention...``, and the function that autograd records.

Two passes over the tokens forward, two backward. Saved for backward: q, k, v, w, the mask and the key state, m (E + 1)
floats a sequence. No float32 tensor of token length is written. Triton is imported at the first launch.
"""

import torch

from ..._common.library import first_order, wants_gradient
from ..._common.triton_runtime import fake, operator, operators
from .call import Call


@operator("performer_read_out(Tensor q, Tensor w, float eps, Tensor lz, Tensor state) -> Tensor")
def _read_out(*arguments):
    from .forward import launch_read_out

    return launch_read_out(*arguments)


@fake("performer_read_out")
def _fake_read_out(q, w, eps, lz, state):
    return q.new_empty(q.shape)


@operator(
    "performer_attention(Tensor q, Tensor k, Tensor v, Tensor w, float eps, Tensor? key_mask) "
    "-> (Tensor, Tensor, Tensor)"
)
def _forward(q, k, v, w, eps, key_mask):
    from .forward import launch_key_state, launch_read_out

    lz, state = launch_key_state(Call(q.shape, w, q.dtype), k, v, key_mask)
    return launch_read_out(q, w, eps, lz, state), lz, state


@fake("performer_attention")
def _fake(q, k, v, w, eps, key_mask):
    single = q.new_empty(0, dtype=torch.float32)
    lz = single.new_empty(*q.shape[:-2], w.shape[0])
    return q.new_empty(q.shape), lz, single.new_empty(*q.shape[:-2], *w.shape)


@operator(
    "performer_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor w, float eps, Tensor? key_mask, "
    "Tensor lz, Tensor state, bool need_w) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _backward(grad, q, k, v, w, eps, key_mask, lz, state, need_w):
    from .backward import launch_backward

    d_q, d_k, d_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    d_w = launch_backward(grad, q, k, v, w, eps, key_mask, lz, state, None, need_w, d_q, d_k, d_v)
    return d_q, d_k, d_v, lz.new_empty(0) if d_w is None else d_w


@fake("performer_attention_backward")
def _fake_backward(grad, q, k, v, w, eps, key_mask, lz, state, need_w):
    return *(t.new_empty(t.shape) for t in (q, k, v)), lz.new_empty(w.shape if need_w else 0)


class PerformerAttention(torch.autograd.Function):
    """Gradients for q, k, v, and w if it requires one."""

    @staticmethod
    def forward(q, k, v, w, eps, key_mask):
        return operators.performer_attention(q, k, v, w, eps, key_mask)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.eps, key_mask = inputs
        _, lz, state = output
        ctx.mark_non_differentiable(lz, state)
        ctx.save_for_backward(*tensors, key_mask, lz, state)

    @staticmethod
    @first_order
    def backward(ctx, grad, _lz, _state):
        q, k, v, w, key_mask, lz, state = ctx.saved_tensors
        need_w = ctx.needs_input_grad[3]
        *found, d_w = operators.performer_attention_backward(grad, q, k, v, w, ctx.eps, key_mask, lz, state, need_w)
        return *found, d_w.to(w.dtype) if need_w else None, None, None


def forward(q, k, v, w, eps, key_mask, causal, normalize):
    """``supports`` rejects ``causal`` and ``normalize``."""
    if wants_gradient(q, k, v, w):
        return PerformerAttention.apply(q, k, v, w, eps, key_mask)[0]
    return operators.performer_attention(q, k, v, w, eps, key_mask)[0]

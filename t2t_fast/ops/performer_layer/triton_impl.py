"""A Performer layer of Triton kernels: the soft split with Linear, the attention, the tail.

The gradients of k, q and v, the skip's share of v's among them, are written side by side into one tensor.
"""

import torch

from ..performer_attention import triton_impl as attention
from ..soft_split_linear import triton_impl as split
from ..token_mlp import triton_impl as tail
from ..triton_runtime import fake, operator
from .composed import compose


def supports(request):
    """Why one of the kernels cannot run a call, or ``None``."""
    return attention.supports(request) or split.supports(request) or tail.supports(request)


@operator(
    "performer_kqv_backward(Tensor grad, Tensor kqv, Tensor w, float eps, Tensor lz, Tensor state, Tensor skip, "
    "bool need_w) -> (Tensor, Tensor)"
)
def _kqv_backward(grad, kqv, w, eps, lz, state, skip, need_w):
    k, q, v = kqv.chunk(3, dim=-1)
    d_kqv = torch.empty(kqv.shape, dtype=kqv.dtype, device=kqv.device)
    d_k, d_q, d_v = d_kqv.chunk(3, dim=-1)
    d_w = attention.gradients(grad, q, k, v, w, eps, None, lz, state, skip, need_w, d_q, d_k, d_v)
    return d_kqv, lz.new_empty(0) if d_w is None else d_w


@fake("performer_kqv_backward")
def _fake_kqv_backward(grad, kqv, w, eps, lz, state, skip, need_w):
    return kqv.new_empty(kqv.shape), lz.new_empty(w.shape if need_w else 0)


def _attend(kqv, w, eps):
    k, q, v = kqv.chunk(3, dim=-1)
    y, lz, state = torch.ops.t2t_fast_triton.performer_attention(q, k, v, w, eps, None)
    return y, v, lz, state


def _rebuild(kqv, w, eps, lz, state):
    _, q, v = kqv.chunk(3, dim=-1)

    def finish(d_y, d_skip, need_w):
        d_kqv, d_w = torch.ops.t2t_fast_triton.performer_kqv_backward(d_y, kqv, w, eps, lz, state, d_skip, need_w)
        return d_kqv, d_w.to(w.dtype) if need_w else None

    return torch.ops.t2t_fast_triton.performer_read_out(q, w, eps, lz, state), v, finish


forward = compose(split.forward, _attend, _rebuild, tail.run, tail.run_backward)

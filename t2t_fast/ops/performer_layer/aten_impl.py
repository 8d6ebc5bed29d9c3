"""A Performer layer: ``soft_split_linear``, then all after ``kqv`` in one, its attention computed again, never saved.

Backward walks the queries once for both: it rebuilds the attention output for the tail and, with the tail's gradient
of it, makes the attention's own query pass. The gradients of k, q and v are written side by side into one tensor.
Saved: kqv, the key state (m (E + 1) floats a sample), the dropout seed, the parameters.
"""

import torch

from ..library import accumulation_dtype, first_order, wants_gradient
from ..performer_attention import aten_impl as attention
from ..soft_split_linear import aten_impl as split
from ..token_mlp.aten_impl import Options, Tail, run, run_backward


def _parts(kqv, dtype):
    return (part.to(dtype) for part in kqv.chunk(3, dim=-1))


def block(kqv, w, eps, tail, options, seed):
    """Forward without autograd: the tokens, and the key state that backward needs."""
    wide = accumulation_dtype(kqv.dtype)
    k, q, v = _parts(kqv, wide)
    w = w.to(wide)
    lz, state = attention.key_state(k, v, w)
    y = attention.read_out(q, lz, state, w, eps)[0].to(kqv.dtype)
    return run(y, v, tail, options, seed), lz, state


class PerformerBlock(torch.autograd.Function):
    """Gradients for kqv, the tail's parameters, and w where it is asked for."""

    @staticmethod
    def forward(kqv, w, eps, seed, options, *tail):
        return block(kqv, w, eps, Tail(*tail), options, seed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        kqv, w, ctx.eps, seed, ctx.options, *tail = inputs
        _, lz, state = output
        ctx.mark_non_differentiable(lz, state)
        ctx.save_for_backward(kqv, w, seed, lz, state, *tail)

    @staticmethod
    @first_order
    def backward(ctx, grad, _lz, _state):
        kqv, w, seed, lz, state, *tail = ctx.saved_tensors
        wide = lz.dtype
        k, q, v = _parts(kqv, wide)
        w_wide = w.to(wide)
        y, p, gate = attention.read_out(q, lz, state, w_wide, ctx.eps)
        d_y, d_skip, gradients = run_backward(
            grad, y.to(kqv.dtype), v, Tail(*tail), ctx.options, seed, ctx.needs_input_grad[5:]
        )
        gated = d_y.to(wide).mul_(gate)
        d_kqv = torch.empty_like(kqv, dtype=wide, memory_format=torch.contiguous_format)
        into_k, into_q, into_v = d_kqv.chunk(3, dim=-1)
        _, d_state, d_lz, d_scores = attention.query_backward(gated, p, gate, q, state, w_wide, into_q)
        _, weights, d_a = attention.key_backward(d_state, d_lz, k, v, lz, state, w_wide, into_k)
        into_v.copy_(d_skip.baddbmm_(weights, d_state))
        d_w = attention.w_gradient(d_scores, q, d_a, k).to(w.dtype) if ctx.needs_input_grad[1] else None
        return d_kqv.to(kqv.dtype), d_w, None, None, None, *gradients


def forward(
    x,
    kqv_weight,
    kqv_bias,
    norm1_weight,
    norm1_bias,
    norm1_eps,
    kernel,
    stride,
    padding,
    dtype,
    w,
    eps,
    proj_weight,
    proj_bias,
    norm_weight,
    norm_bias,
    norm_eps,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    proj_drop,
    mlp_drop,
    seed,
):
    kqv = split.forward(x, kqv_weight, kqv_bias, norm1_weight, norm1_bias, norm1_eps, kernel, stride, padding).to(dtype)
    tail = Tail(proj_weight, proj_bias, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    options = Options(norm_eps, proj_drop, mlp_drop)
    if wants_gradient(kqv, w, *tail):
        return PerformerBlock.apply(kqv, w, eps, seed, options, *tail)[0]
    return block(kqv, w, eps, tail, options, seed)[0]

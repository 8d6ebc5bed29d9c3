"""A Performer layer in PyTorch operations; backward makes one pass over the queries for token_mlp and the attention.

The gradients of k, q and v are written side by side into one tensor.
"""

import torch

from .._common.library import accumulation_dtype
from ..performer_attention import aten as attention
from ..soft_split_linear import aten as split
from ..token_mlp import aten as mlp
from .autograd import compose


def _parts(kqv, dtype):
    return (part.to(dtype) for part in kqv.chunk(3, dim=-1))


def _project(x, linear, w, layer, whole, keep):
    kqv, mean, rstd = split.run(x, *linear, layer.norm1_eps, layer.window, layer.dtype, layer.pixels)
    wide = accumulation_dtype(kqv.dtype)
    k, _, v = _parts(kqv, wide)
    return kqv, mean, rstd, *attention.key_state(k, v, w.to(wide))


def _output(kqv, w, eps, lz, state, parameters, options, seed):
    wide = lz.dtype
    _, q, v = _parts(kqv, wide)
    y, _, _ = attention.read_out(q, lz, state, w.to(wide), eps)
    return mlp.run(y.to(kqv.dtype), v, parameters, options, seed)


def _recompute_attention(kqv, w, eps, lz, state):
    wide = lz.dtype
    k, q, v = _parts(kqv, wide)
    w_wide = w.to(wide)
    y, p, gate = attention.read_out(q, lz, state, w_wide, eps)

    def attention_backward(d_y, d_skip, need_w):
        d_kqv = torch.empty_like(kqv, dtype=wide, memory_format=torch.contiguous_format)
        into_k, into_q, into_v = d_kqv.chunk(3, dim=-1)
        gated = d_y.to(wide).mul_(gate)
        _, d_state, d_lz, d_scores = attention.query_backward(gated, p, gate, q, state, w_wide, into_q)
        _, weights, d_a = attention.key_backward(d_state, d_lz, k, v, lz, state, w_wide, into_k)
        into_v.copy_(d_skip.baddbmm_(weights, d_state))
        d_w = attention.w_gradient(d_scores, q, d_a, k).to(w.dtype) if need_w else None
        return d_kqv.to(kqv.dtype), d_w

    return y.to(kqv.dtype), v, attention_backward


forward, run, run_backward = compose(split, _project, _output, _recompute_attention, mlp.run_backward)

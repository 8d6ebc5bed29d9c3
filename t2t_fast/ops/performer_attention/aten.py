"""Performer attention in log space: two exact softmaxes through the m random features, and a gate.

With ``a_i(x) = w_i x - |x|^2 / 2`` the defining form (reference.py) is, for every ``eps > 0``, exactly

    lz_i = logsumexp_t a_i(k_t)          S_i = sum_t softmax_t(a_i(k_t)) v_t         features attend to tokens
    p_t  = softmax_i(w_i q_t + lz_i)     y_t = g_t p_t S                             tokens attend to features
    g_t  = sigmoid(logsumexp_i(w_i q_t + lz_i) - |q_t|^2 / 2 - ln(m eps))            eps is a gate, not a guard

No term can overflow and no sum can vanish, so the result is finite where the defining form divides 0 by 0 or
overflows. Everything is computed in float32 (float64 for float64) whatever the inputs' dtype.

Saved for backward: q, k, v, w, lz and S. Backward makes one pass over the queries and one over the keys.

A masked key has ``a_i = -inf``. Its k and v are zeroed first, so that NaN or inf in them reaches
neither the output nor any gradient. A key whose ``|k|^2`` overflows also has ``a_i = -inf``: its features are 0.
A feature without keys has ``S_i = 0`` and ``lz_i`` = :data:`NOTHING`, and contributes nothing. If no feature of a
sample has a key, the output and every gradient are 0.
"""

import math

import torch
import torch.nn.functional as F

from .._common.library import accumulation_dtype, first_order, product, wants_gradient

NOTHING = -1e30
"""The logarithm of an empty sum over keys: like -inf it closes the gate, but its sum with a finite score is finite."""


def half_square_norm(x):
    """``|x|^2 / 2`` over the last dimension, kept: (..., 1)."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().mul_(0.5)


def left_out(key_mask, k, v):
    """The mask of dropped keys (B, ..., L, 1), and k and v with zeros there; (``None``, k, v) without a mask."""
    if key_mask is None:
        return None, k, v
    dropped = key_mask.logical_not().view(k.shape[0], *(1,) * (k.ndim - 3), k.shape[-2], 1)
    return dropped, k.masked_fill(dropped, 0), v.masked_fill(dropped, 0)


def key_scores(k, w, dropped=None):
    """``a_i(k_t)`` (..., L, m), -inf where a key is dropped."""
    a = F.linear(k, w).sub_(half_square_norm(k))
    return a if dropped is None else a.masked_fill_(dropped, -math.inf)


def key_state(k, v, w, dropped=None):
    """The key state, ``lz`` (..., m, 1) and ``S`` (..., m, E); ``dropped``: the mask that :func:`left_out` returns."""
    a = key_scores(k, w, dropped)
    top = a.amax(-2, keepdim=True).clamp_min(NOTHING)
    weights = a.sub_(top).exp_()
    total = weights.sum(-2, keepdim=True).clamp_min(1)  # without keys the sum is 0; with keys it is at least 1
    state = (weights.transpose(-2, -1) @ v).div_(total.transpose(-2, -1))
    return (top + total.log()).transpose(-2, -1), state


def query_weights(q, lz, w, eps):
    """Softmax over features and the gate.

    Returns:
        unnormalised weights (..., L, m), their sum (..., L, 1), the gate (..., L, 1).
    """
    scores = F.linear(q, w).add_(lz.transpose(-2, -1))
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    if eps == 0:
        return weights, total, torch.ones_like(total)
    lse = (top + total.log()).sub_(half_square_norm(q))
    return weights, total, torch.sigmoid_(lse.sub_(math.log(w.shape[0] * eps)))


def read_out(q, lz, state, w, eps):
    """Pass over the queries: the attention output (..., L, E), and the values that backward needs.

    Returns:
        y, the softmax weights p (..., L, m), the gate (..., L, 1).
    """
    weights, total, gate = query_weights(q, lz, w, eps)
    p = weights.div_(total)
    return (p @ state).mul_(gate), p, gate


def query_backward(gated, p, gate, q, state, w, into=None):
    """Pass over the queries, backward.

    Args:
        gated: (..., L, E) gradient of the output, times the gate.
        p, gate: as :func:`read_out` returns them.
        into: a buffer for d_q, or ``None``.

    Returns:
        d_q, the gradients of the key state's S (..., m, E) and lz (..., m, 1), and the score gradient (..., L, m).
    """
    along = gated @ state.transpose(-2, -1)  # (..., L, m)
    delta = torch.linalg.vecdot(p, along).unsqueeze(-1)  # = gated . y0
    d_lse = delta * (1 - gate)
    d_state = p.transpose(-2, -1) @ gated
    d_scores = along.sub_(delta - d_lse).mul_(p)
    d_q = product(d_scores, w, into).addcmul_(d_lse, q, value=-1)
    return d_q, d_state, d_scores.sum(-2, keepdim=True).transpose(-2, -1), d_scores


def key_backward(d_state, d_lz, k, v, lz, state, w, into=None, dropped=None):
    """Pass over the keys, backward; ``into``: a buffer for d_k; ``dropped`` as in :func:`key_state`.

    Returns:
        d_k, the softmax weights (..., L, m) whose product with ``d_state`` is d_v, the score gradient (..., L, m).
    """
    weights = key_scores(k, w, dropped).sub_(lz.transpose(-2, -1)).exp_()
    shift = (d_state * state).sum(-1, keepdim=True).sub_(d_lz).transpose(-2, -1)  # (..., 1, m)
    d_a = (v @ d_state.transpose(-2, -1)).sub_(shift).mul_(weights)
    d_k = product(d_a, w, into).addcmul_(d_a.sum(-1, keepdim=True), k, value=-1)
    return d_k, weights, d_a


def w_gradient(d_scores, q, d_a, k):
    """Gradient of w, summed over all dimensions except (m, E)."""
    d_w = d_scores.transpose(-2, -1) @ q + d_a.transpose(-2, -1) @ k
    return d_w.sum(tuple(range(d_w.ndim - 2))) if d_w.ndim > 2 else d_w


def attend(q, k, v, w, eps, key_mask):
    """Forward without autograd: y, and the key state that backward needs."""
    wide = accumulation_dtype(q.dtype)
    w = w.to(wide)
    dropped, k, v = left_out(key_mask, k, v)
    lz, state = key_state(k.to(wide), v.to(wide), w, dropped)
    return read_out(q.to(wide), lz, state, w, eps)[0].to(q.dtype), lz, state


def gradients(grad, q, k, v, w, eps, key_mask, lz, state, need_w):
    """Gradients of q, k, v and, if needed, w (else ``None``), each in the dtype of its tensor."""
    dropped, k, v = left_out(key_mask, k, v)
    wide = lz.dtype
    dtype, w_dtype = q.dtype, w.dtype
    q, k, v, w, grad = (t.to(wide) for t in (q, k, v, w, grad))
    _, p, gate = read_out(q, lz, state, w, eps)
    d_q, d_state, d_lz, d_scores = query_backward(grad * gate, p, gate, q, state, w)
    d_k, weights, d_a = key_backward(d_state, d_lz, k, v, lz, state, w, dropped=dropped)
    d_v = weights @ d_state
    d_w = w_gradient(d_scores, q, d_a, k).to(w_dtype) if need_w else None
    return d_q.to(dtype), d_k.to(dtype), d_v.to(dtype), d_w


class PerformerAttention(torch.autograd.Function):
    """Gradients for q, k, v, and w if it requires one."""

    @staticmethod
    def forward(q, k, v, w, eps, key_mask):
        return attend(q, k, v, w, eps, key_mask)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, w, ctx.eps, key_mask = inputs
        _, lz, state = output
        ctx.mark_non_differentiable(lz, state)
        ctx.save_for_backward(q, k, v, w, key_mask, lz, state)

    @staticmethod
    @first_order
    def backward(ctx, grad, _lz, _state):
        q, k, v, w, key_mask, lz, state = ctx.saved_tensors
        return *gradients(grad, q, k, v, w, ctx.eps, key_mask, lz, state, ctx.needs_input_grad[3]), None, None


def forward(q, k, v, w, eps, key_mask):
    run = PerformerAttention.apply if wants_gradient(q, k, v, w) else attend
    return run(q, k, v, w, eps, key_mask)[0]

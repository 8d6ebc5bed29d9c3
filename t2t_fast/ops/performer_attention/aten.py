"""Performer attention in log space: two exact softmaxes through the m random features, and a gate.

With ``a_i(x) = w_i x - |x|^2 / 2`` the defining form (reference.py) is, for every ``eps > 0``, exactly

    lz_i = logsumexp_t a_i(k_t)          S_i = sum_t softmax_t(a_i(k_t)) v_t         features attend to tokens
    p_t  = softmax_i(w_i q_t + lz_i)     y_t = g_t p_t S                             tokens attend to features
    g_t  = sigmoid(logsumexp_i(w_i q_t + lz_i) - |q_t|^2 / 2 - ln(m eps))            eps is a gate, not a guard

No term can overflow and no sum can vanish, so the result is finite where the defining form divides 0 by 0 or
overflows. Everything is computed in float32 (float64 for float64) whatever the inputs' dtype.

Saved for backward: q, k, v, w, lz and S. Backward makes one pass over the queries and one over the keys.

The logarithm of a key's weight is added to its ``a_i``, so a masked key has ``a_i = -inf``. Its k and v are zeroed
first, so that NaN or inf in them reaches neither the output nor any gradient. A key whose ``|k|^2`` overflows also has
``a_i = -inf``: its features are 0. A feature without keys has ``S_i = 0`` and ``lz_i`` = :data:`NOTHING`, and
contributes nothing. If no feature of a sample has a key, the output and every gradient are 0.

Causal attention has an lz and an S for every query. They are never formed: ``_common/causal.py`` sums over pairs of a
query and a key with the shift ``top_t = max_i (w_i q_t + max_{s <= t} a_i(k_s))``. Backward has in its place the
logarithm of the denominator, ``log(sum_i exp(w_i q_t + lz_i) + m eps exp(|q_t|^2 / 2))``. Saved: q, k, v, w, that
logarithm, the gate, and y in float32 (float64 for float64).
"""

import math

import torch
import torch.nn.functional as F

from ...errors import known
from .._common import causal as pairs
from .._common.causal import NOTHING
from .._common.library import accumulation_dtype, first_order, product, wants_gradient

OPTIONS = {
    "causal": "causal attention",
    "normalize": "normalization of q and k",
    "weighted": "weights of keys",
    "head_mask": "key mask per head",
    "head_features": "random features per head",
}
"""Sizes of a request that mean a call which only PyTorch operations can run."""


def beyond_kernels(request, kind):
    """Why compiled kernels of a kind ("native", "Triton") cannot run a call that this form can, or ``None``."""
    sizes = request.sizes
    for name, words in OPTIONS.items():
        if sizes.get(name):
            return f"no {words} in the {kind} kernels"
    width, v_width = sizes.get("width"), sizes.get("v_width")
    if v_width is not None and known(v_width != width):
        return f"the {kind} kernels need v as wide as k, got {v_width} and {width}"
    return None


def half_square_norm(x):
    """``|x|^2 / 2`` over the last dimension, kept: (..., 1)."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().mul_(0.5)


def left_out(key_mask, k, v, dtype):
    """The logarithms of the keys' weights (B, ..., L, 1), and k and v with zeros where they are -inf.

    Without a mask: ``None``, and k and v as they are. A bool mask has the weights 0 and 1.
    """
    if key_mask is None:
        return None, k, v
    weights = (key_mask.unsqueeze(1) if k.ndim - key_mask.ndim == 2 else key_mask).unsqueeze(-1)
    dropped = weights == 0
    return weights.to(dtype).log(), k.masked_fill(dropped, 0), v.masked_fill(dropped, 0)


def scores(x, w):
    """``w_i x`` (..., L, m); w: (m, E) or (heads, m, E)."""
    return F.linear(x, w) if w.ndim == 2 else x @ w.mT


def key_scores(k, w, logs=None):
    """``a_i(k_t)`` (..., L, m), -inf where a key is dropped; ``logs``: of the keys' weights (:func:`left_out`)."""
    a = scores(k, w).sub_(half_square_norm(k))
    return a if logs is None else a.add_(logs)


def key_state(k, v, w, logs=None):
    """The key state, ``lz`` (..., m, 1) and ``S`` (..., m, E); ``logs`` as in :func:`key_scores`."""
    a = key_scores(k, w, logs)
    top = pairs.largest(a)
    weights = a.sub_(top).exp_()
    total = weights.sum(-2, keepdim=True).clamp_min(1)  # without keys the sum is 0; with keys it is at least 1
    state = (weights.transpose(-2, -1) @ v).div_(total.transpose(-2, -1))
    return (top + total.log()).transpose(-2, -1), state


def query_weights(q, lz, w, eps):
    """Softmax over features and the gate.

    Returns:
        unnormalised weights (..., L, m), their sum (..., L, 1), the gate (..., L, 1).
    """
    along = scores(q, w).add_(lz.transpose(-2, -1))
    top = along.amax(-1, keepdim=True)
    weights = along.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    if eps == 0:
        return weights, total, torch.ones_like(total)
    lse = (top + total.log()).sub_(half_square_norm(q))
    return weights, total, torch.sigmoid_(lse.sub_(math.log(w.shape[-2] * eps)))


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


def key_backward(d_state, d_lz, k, v, lz, state, w, into=None, logs=None):
    """Pass over the keys, backward; ``into``: a buffer for d_k; ``logs`` as in :func:`key_scores`.

    Returns:
        d_k, the softmax weights (..., L, m) whose product with ``d_state`` is d_v, the score gradient (..., L, m).
    """
    weights = key_scores(k, w, logs).sub_(lz.transpose(-2, -1)).exp_()
    shift = (d_state * state).sum(-1, keepdim=True).sub_(d_lz).transpose(-2, -1)  # (..., 1, m)
    d_a = (v @ d_state.transpose(-2, -1)).sub_(shift).mul_(weights)
    d_k = product(d_a, w, into).addcmul_(d_a.sum(-1, keepdim=True), k, value=-1)
    return d_k, weights, d_a


def w_gradient(d_scores, q, d_a, k, dims=2):
    """Gradient of w, summed over all dimensions but the last ``dims``: (m, E), or (heads, m, E)."""
    d_w = d_scores.transpose(-2, -1) @ q + d_a.transpose(-2, -1) @ k
    return d_w.sum(tuple(range(d_w.ndim - dims))) if d_w.ndim > dims else d_w


def mask_gradient(d_a, key_mask):
    """Gradient of the keys' weights from that of ``a`` (..., L, m): ``da / dweight = 1 / weight``; 0 for weight 0."""
    d_logs = d_a.sum(-1)
    if d_logs.ndim > key_mask.ndim:
        d_logs = d_logs.sum(1)
    return (d_logs / key_mask).masked_fill_(key_mask == 0, 0)


def operands(q, k, v, w, key_mask, normalize):
    """The operands in the wide dtype, q and k scaled by E^(-1/4) if ``normalize``, and the logarithms of the weights.

    Returns:
        q, k, v, w, logs, and the scale.
    """
    wide = accumulation_dtype(q.dtype)
    logs, k, v = left_out(key_mask, k, v, wide)
    q, k, v, w = (t.to(wide) for t in (q, k, v, w))
    scale = q.shape[-1] ** -0.25 if normalize else 1.0
    return (q * scale, k * scale, v, w, logs, scale) if normalize else (q, k, v, w, logs, scale)


def attend(q, k, v, w, eps, key_mask, normalize=False):
    """Forward without autograd: y, and the key state that backward needs."""
    dtype = q.dtype
    q, k, v, w, logs, _ = operands(q, k, v, w, key_mask, normalize)
    lz, state = key_state(k, v, w, logs)
    return read_out(q, lz, state, w, eps)[0].to(dtype), lz, state


def gradients(grad, q, k, v, w, eps, key_mask, lz, state, need_w, need_mask=False, normalize=False):
    """Gradients of q, k, v and, if needed (else ``None``), of w and key_mask, each in the dtype of its tensor."""
    dtypes = q.dtype, k.dtype, v.dtype, w.dtype
    q, k, v, w, logs, scale = operands(q, k, v, w, key_mask, normalize)
    _, p, gate = read_out(q, lz, state, w, eps)
    d_q, d_state, d_lz, d_scores = query_backward(grad.to(gate) * gate, p, gate, q, state, w)
    d_k, weights, d_a = key_backward(d_state, d_lz, k, v, lz, state, w, logs=logs)
    d_v = weights @ d_state
    d_w = w_gradient(d_scores, q, d_a, k, w.ndim) if need_w else None
    return _as_given(d_q, d_k, d_v, d_w, d_a, key_mask if need_mask else None, scale, dtypes)


def _as_given(d_q, d_k, d_v, d_w, d_a, key_mask, scale, dtypes):
    """The gradients of the unscaled tensors, in their dtypes."""
    if scale != 1:
        d_q, d_k = d_q.mul_(scale), d_k.mul_(scale)
    found = (None if each is None else each.to(dtype) for each, dtype in zip((d_q, d_k, d_v, d_w), dtypes, strict=True))
    return *found, None if key_mask is None else mask_gradient(d_a, key_mask).to(key_mask.dtype)


def attend_causally(q, k, v, w, eps, key_mask, normalize=False):
    """Causal forward without autograd: y, and what backward needs besides the inputs.

    Returns:
        y; the logarithm of the denominator (..., L, 1), inf for a query without keys; the gate (..., L, 1); y in the
        wide dtype, empty if y has that dtype.
    """
    dtype = q.dtype
    q, k, v, w, logs, _ = operands(q, k, v, w, key_mask, normalize)
    a, b = key_scores(k, w, logs), scores(q, w)
    top = (b + a.cummax(-2).values).amax(-1, keepdim=True).clamp_min_(NOTHING)
    sums = pairs.weighted_sums(a, b.sub_(top), with_ones(v))
    weight, total = sums[..., -1:], sums[..., -1:]
    if eps > 0:
        total = total + half_square_norm(q).sub_(top).add_(math.log(w.shape[-2] * eps)).exp_()
    total = total.clamp_min(torch.finfo(total.dtype).tiny)  # without keys and eps it is 0; with keys it is at least 1
    y = sums[..., :-1] / total
    logarithm = (top + total.log()).masked_fill_(weight == 0, math.inf)
    exact = y.new_empty(0) if y.dtype == dtype else y
    return y.to(dtype), logarithm, weight / total, exact


def with_ones(v):
    """v with a column of ones, whose sums are the weights': (..., L, E + 1)."""
    return F.pad(v, (0, 1), value=1.0)


def causal_gradients(grad, q, k, v, w, eps, key_mask, logarithm, gate, y, need_w, need_mask=False, normalize=False):
    """:func:`gradients` of causal attention from what :func:`attend_causally` returns."""
    dtypes = q.dtype, k.dtype, v.dtype, w.dtype
    q, k, v, w, logs, scale = operands(q, k, v, w, key_mask, normalize)
    grad = grad.to(y)
    delta = torch.linalg.vecdot(grad, y).unsqueeze(-1)
    a, b = key_scores(k, w, logs), scores(q, w).sub_(logarithm)
    d_scores, d_a, d_v = pairs.backward(a, b, with_ones(v), torch.cat([grad, -delta], -1))
    d_q = (d_scores @ w).addcmul_(delta * (1 - gate), q, value=-1)
    d_k = (d_a @ w).addcmul_(d_a.sum(-1, keepdim=True), k, value=-1)
    d_w = w_gradient(d_scores, q, d_a, k, w.ndim) if need_w else None
    return _as_given(d_q, d_k, d_v[..., :-1], d_w, d_a, key_mask if need_mask else None, scale, dtypes)


class PerformerAttention(torch.autograd.Function):
    """Gradients for q, k, v, and for w and a key mask of weights if they require one."""

    @staticmethod
    def forward(q, k, v, w, eps, key_mask, causal, normalize):
        return (attend_causally if causal else attend)(q, k, v, w, eps, key_mask, normalize)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, w, ctx.eps, key_mask, ctx.causal, ctx.normalize = inputs
        y, *kept = output
        ctx.mark_non_differentiable(*kept)
        if ctx.causal and y.dtype == kept[-1].dtype:
            kept[-1] = y
        ctx.save_for_backward(q, k, v, w, key_mask, *kept)

    @staticmethod
    @first_order
    def backward(ctx, grad, *_):
        q, k, v, w, key_mask, *kept = ctx.saved_tensors  # read once: a checkpoint lets go of what was read
        needed = ctx.needs_input_grad
        found = (causal_gradients if ctx.causal else gradients)(
            grad, q, k, v, w, ctx.eps, key_mask, *kept, needed[3], needed[5], ctx.normalize
        )
        return *found[:4], None, found[4], None, None


def forward(q, k, v, w, eps, key_mask, causal, normalize):
    if wants_gradient(q, k, v, w, key_mask):
        return PerformerAttention.apply(q, k, v, w, eps, key_mask, causal, normalize)[0]
    return (attend_causally if causal else attend)(q, k, v, w, eps, key_mask, normalize)[0]

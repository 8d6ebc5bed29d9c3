"""Performer attention: softmax attention by positive random features."""

import torch

from ..errors import check_count, check_number, check_shape, check_tensor, check_together, known
from ..ops._common.library import wants_gradient
from ..ops.performer_attention.op import performer_attention as _performer_attention
from .arguments import choose, running_dtype, same_dtype


def performer_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    w: torch.Tensor,
    eps: float = 1e-8,
    *,
    key_mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Performer attention with positive random features (Choromanski et al., lemma 1; upstream ``token_performer.py``).

    With ``phi(x) = exp(w x - |x|^2 / 2) / sqrt(m)``, ``y_t = phi(q_t) S / (phi(q_t) z + eps)`` where
    ``S = sum_t phi(k_t) v_t^T`` and ``z = sum_t phi(k_t)``. ``eps`` acts as a gate, which closes as the
    norms of q and k grow; checkpoints are trained with it, so it is reproduced exactly.

    Args:
        q, k, v: (B, L, E) or (B, heads, L, E), any strides (views of one packed tensor too); L of q may differ.
        w: (m, E) random features, in q's dtype or float32.
        eps: at least 0.
        key_mask: (B, L of k) bool, ``True`` for tokens that are attended, the same for all heads; ``None`` for all.

    Returns:
        (B, L, E) or (B, heads, L, E), in q's dtype; 0 in a sample whose keys are all masked.

    Numerics:
        float32 inside (float64 for float64), in log space: equal to the definition where that is finite in exact
        arithmetic, and finite where the definition overflows or divides 0 by 0 in floating point. Gradients for q, k,
        v and w; a second derivative raises an error. Masked values of k and v (NaN and inf too) affect neither the
        output nor a gradient, and their gradients are exactly 0. The "reference" backend multiplies by the mask: it
        guarantees neither this nor the output 0 without keys at ``eps = 0``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
    """
    function = "performer_attention"
    check_tensor(function, "q", q, ndim=(3, 4))
    check_tensor(function, "k", k, ndim=q.ndim)
    check_tensor(function, "v", v, ndim=q.ndim)
    check_tensor(function, "w", w, ndim=2)
    check_together(function, "q", q, same_dtype=same_dtype(q), k=k, v=v)
    check_together(function, "q", q, same_dtype=False, w=w)
    check_shape(function, "k", k, (*q.shape[:-2], k.shape[-2], q.shape[-1]), "batch and width of q")
    check_shape(function, "v", v, k.shape, "the shape of k")
    check_features(function, w, q.shape[-1], q.dtype)
    check_count(function, "q", *q.shape)
    check_count(function, "k", *k.shape)
    if known(k.shape[-2] < 1):
        raise ValueError(f"{function}: k must have at least one token, got shape {tuple(k.shape)}")
    eps = check_number(function, "eps", eps, minimum=0)
    check_together(function, "q", q, same_dtype=False, dtypes=(torch.bool,), key_mask=key_mask)
    if key_mask is not None:
        check_tensor(function, "key_mask", key_mask, ndim=2, dtypes=(torch.bool,))
        check_shape(function, "key_mask", key_mask, (k.shape[0], k.shape[-2]), "batch and tokens of k")
    chosen = choose(
        function,
        q,
        backend,
        dtype=running_dtype(q),
        width=q.shape[-1],
        features=w.shape[0],
        masked=key_mask is not None,
        training=wants_gradient(q, k, v, w),
        index=q.device.index,
    )
    return _performer_attention(q, k, v, w, eps, key_mask, chosen)


def check_features(function: str, w: torch.Tensor, width: int, dtype: torch.dtype) -> None:
    check_shape(function, "w", w, (w.shape[0], width), "(random features, token width)")
    if known(w.shape[0] < 1):
        raise ValueError(f"{function}: w must have at least one random feature, got shape {tuple(w.shape)}")
    if w.dtype not in (dtype, torch.float32):
        allowed = " or ".join(map(str, dict.fromkeys((dtype, torch.float32))))
        raise ValueError(f"{function}: w must be {allowed}, got {w.dtype}")

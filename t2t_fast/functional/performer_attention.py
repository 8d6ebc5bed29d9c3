"""Performer attention: softmax attention by positive random features."""

import torch

from ..errors import (
    check_bool,
    check_count,
    check_number,
    check_shape,
    check_tensor,
    check_together,
    known,
)
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
    causal: bool = False,
    normalize: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Performer attention with positive random features (Choromanski et al., lemma 1; upstream ``token_performer.py``).

    With ``phi(x) = exp(w x - |x|^2 / 2) / sqrt(m)``, ``y_t = phi(q_t) S / (phi(q_t) z + eps)`` where
    ``S = sum_s c_s phi(k_s) v_s^T`` and ``z = sum_s c_s phi(k_s)`` over all keys, or those with ``s <= t`` if
    ``causal``, and the weights c are those of ``key_mask``. ``eps`` acts as a gate, which closes as the norms of q and
    k grow; checkpoints are trained with it, so it is reproduced exactly.

    Args:
        q, k, v: (B, L, E) or (B, heads, L, E), any strides (views of one packed tensor too). L of q may differ unless
            ``causal``; E of v may differ.
        w: (m, E) random features, or (heads, m, E) for each head its own, in q's dtype or float32.
        eps: at least 0.
        key_mask: (B, L of k), the same for all heads, or (B, heads, L of k); ``None`` for all keys. Either bool,
            ``True`` for keys that are attended, or finite weights of at least 0 in q's dtype or float32, by which a
            key's features are multiplied: weight 0 drops the key, weight 2 counts it twice. (It is no mask that is
            added to scores; ``mask.exp()`` of such a mask is one.)
        causal: whether a query attends only to the keys of its own and of earlier tokens.
        normalize: whether q and k are multiplied by ``E ** -0.25``, as in FAVOR+ and performer-pytorch, so that
            the features estimate ``exp(q k / sqrt(E))``. T2T-ViT does not.

    Returns:
        (B, L, E) or (B, heads, L, E), L of q and E of v, in q's dtype; 0 where no key is attended.

    Numerics:
        float32 inside (float64 for float64), in log space: equal to the definition where that is finite in exact
        arithmetic, and finite where the definition overflows or divides 0 by 0 in floating point. Gradients for q, k,
        v, w and weights; a second derivative raises an error. Values of k and v of dropped keys (NaN and inf too)
        affect neither the output nor a gradient, and their gradients, and that of a weight 0, are exactly 0. Weights
        are not checked, since that would wait for the device: one that is negative or NaN gives NaN. The "reference"
        backend multiplies by the weights: it guarantees none of this, nor the output 0 without keys at ``eps = 0``.
        "triton" and "native" support none of the options that T2T-ViT does not need; ``auto`` then selects "aten".

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
    """
    function = "performer_attention"
    check_tensor(function, "q", q, ndim=(3, 4))
    check_tensor(function, "k", k, ndim=q.ndim)
    check_tensor(function, "v", v, ndim=q.ndim)
    check_tensor(function, "w", w, ndim=2 if q.ndim == 3 else (2, 3))
    check_together(function, "q", q, same_dtype=same_dtype(q), k=k, v=v)
    check_together(function, "q", q, same_dtype=False, w=w)
    check_shape(function, "k", k, (*q.shape[:-2], k.shape[-2], q.shape[-1]), "batch and width of q")
    check_shape(function, "v", v, (*k.shape[:-1], v.shape[-1]), "batch and tokens of k")
    check_features(function, w, q.shape[-1], q.dtype, *q.shape[1:-2])
    check_count(function, "q", *q.shape)
    check_count(function, "k", *k.shape)
    check_count(function, "v", *v.shape)
    if known(v.shape[-1] < 1):
        raise ValueError(f"{function}: v must have at least one channel, got shape {tuple(v.shape)}")
    if known(k.shape[-2] < 1):
        raise ValueError(f"{function}: k must have at least one token, got shape {tuple(k.shape)}")
    eps = check_number(function, "eps", eps, minimum=0)
    check_mask(function, key_mask, q, k)
    check_bool(function, "causal", causal)
    check_bool(function, "normalize", normalize)
    if causal and known(q.shape[-2] != k.shape[-2]):
        raise ValueError(
            f"{function}: causal=True needs q with as many tokens as k, got {q.shape[-2]} and {k.shape[-2]}"
        )
    chosen = choose(
        function,
        q,
        backend,
        dtype=running_dtype(q),
        width=q.shape[-1],
        v_width=v.shape[-1],
        features=w.shape[-2],
        head_features=w.ndim == 3,
        masked=key_mask is not None,
        head_mask=key_mask is not None and key_mask.ndim == 3,
        weighted=key_mask is not None and key_mask.dtype != torch.bool,
        causal=causal,
        normalize=normalize,
        training=wants_gradient(q, k, v, w, key_mask),
        index=q.device.index,
    )
    return _performer_attention(q, k, v, w, eps, key_mask, causal, normalize, chosen)


def check_features(function: str, w: torch.Tensor, width: int, dtype: torch.dtype, *heads: int) -> None:
    """``w``: (m, width), or (heads, m, width) if it has three dimensions."""
    meaning = "random features, token width" if w.ndim == 2 else "heads of q, random features, token width"
    check_shape(function, "w", w, (*heads[: w.ndim - 2], w.shape[-2], width), meaning)
    if known(w.shape[-2] < 1):
        raise ValueError(f"{function}: w must have at least one random feature, got shape {tuple(w.shape)}")
    if w.dtype not in (dtype, torch.float32):
        allowed = " or ".join(map(str, dict.fromkeys((dtype, torch.float32))))
        raise ValueError(f"{function}: w must be {allowed}, got {w.dtype}")


def check_mask(function: str, key_mask: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> None:
    dtypes = tuple(dict.fromkeys((torch.bool, q.dtype, torch.float32)))
    check_together(function, "q", q, same_dtype=False, dtypes=dtypes, key_mask=key_mask)
    if key_mask is None:
        return
    check_tensor(function, "key_mask", key_mask, ndim=2 if k.ndim == 3 else (2, 3), dtypes=dtypes)
    if key_mask.ndim == 2:
        check_shape(function, "key_mask", key_mask, (k.shape[0], k.shape[-2]), "batch and tokens of k")
    else:
        check_shape(function, "key_mask", key_mask, k.shape[:-1], "batch, heads and tokens of k")

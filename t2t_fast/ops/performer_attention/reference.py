"""Performer attention in its defining form, as upstream's ``models/token_performer.py`` computes it."""

import math

import torch

from .._common.library import accumulation_dtype
from .._common.transforms import constant


def features(x, w):
    """Positive random features ``exp(w x - |x|^2 / 2) / sqrt(m)``: (..., L, E), (m, E) -> (..., L, m)."""
    return torch.exp(x @ w.transpose(-2, -1) - x.square().sum(-1, keepdim=True) / 2) / math.sqrt(constant(w.shape[-2]))


def forward(q, k, v, w, eps, key_mask=None, causal=False, normalize=False):
    """(..., L, E) twice, (..., L, Ev) and (m, E) or (heads, m, E) -> (..., L, Ev).

    Features of a key are multiplied by its weight in the mask (B, L) or (B, heads, L). If it drops all keys, 0 / 0 is
    avoided only by ``eps > 0``. Causal attention has a weight for each pair of tokens, (..., L, L).
    """
    wide = accumulation_dtype(q.dtype)
    scale = constant(q.shape[-1]) ** -0.25 if normalize else 1
    w, v = w.to(wide), v.to(wide)
    qp, kp = features(q.to(wide) * scale, w), features(k.to(wide) * scale, w)
    if key_mask is not None:
        kp = kp * (key_mask.unsqueeze(1) if k.ndim - key_mask.ndim == 2 else key_mask).unsqueeze(-1)
    if causal:
        pairs = (qp @ kp.transpose(-2, -1)).tril()
        numerator, denominator = pairs @ v, pairs.sum(-1, keepdim=True)
    else:
        numerator, denominator = qp @ (kp.transpose(-2, -1) @ v), qp @ kp.sum(-2).unsqueeze(-1)
    return (numerator / (denominator + eps)).to(q.dtype)

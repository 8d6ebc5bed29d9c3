"""Performer attention in its defining form, as upstream's ``models/token_performer.py`` computes it."""

import math

import torch

from .._common.library import accumulation_dtype
from .._common.transforms import constant


def features(x, w):
    """Positive random features ``exp(w x - |x|^2 / 2) / sqrt(m)``: (..., L, E), (m, E) -> (..., L, m)."""
    return torch.exp(x @ w.transpose(-2, -1) - x.square().sum(-1, keepdim=True) / 2) / math.sqrt(constant(w.shape[0]))


def forward(q, k, v, w, eps, key_mask=None):
    """(..., L, E) three times and (m, E) -> (..., L, E).

    Features of a key that the mask (B, L) drops are 0. If it drops all keys, 0 / 0 is avoided only by ``eps > 0``.
    """
    wide = accumulation_dtype(q.dtype)
    w = w.to(wide)
    qp, kp = features(q.to(wide), w), features(k.to(wide), w)
    if key_mask is not None:
        kp = kp * key_mask.view(k.shape[0], *(1,) * (k.ndim - 3), k.shape[-2], 1)
    denominator = qp @ kp.sum(-2).unsqueeze(-1)
    return (qp @ (kp.transpose(-2, -1) @ v.to(wide)) / (denominator + eps)).to(q.dtype)

"""Performer attention in its defining form, as upstream's ``models/token_performer.py`` computes it."""

import math

import torch

from ..library import accumulation_dtype


def features(x, w):
    """Positive random features ``exp(w x - |x|^2 / 2) / sqrt(m)``: (..., L, E), (m, E) -> (..., L, m)."""
    return torch.exp(x @ w.mT - x.square().sum(-1, keepdim=True) / 2) / math.sqrt(w.shape[0])


def forward(q, k, v, w, eps):
    """(..., L, E) three times and (m, E) -> (..., L, E)."""
    wide = accumulation_dtype(q.dtype)
    w = w.to(wide)
    qp, kp = features(q.to(wide), w), features(k.to(wide), w)
    denominator = qp @ kp.sum(-2).unsqueeze(-1)
    return (qp @ (kp.mT @ v.to(wide)) / (denominator + eps)).to(q.dtype)

"""The tail of a token layer as upstream computes it: projection, skip through v, LayerNorm, MLP, skip."""

import torch.nn.functional as F

from ..library import accumulation_dtype
from ..philox import keep_mask


def _cast(dtype, *tensors):
    return (None if t is None else t.to(dtype) for t in tensors)


def _dropout(x, p, seed, stream):
    return x * keep_mask(seed, stream, x.shape, p) / (1 - p) if p else x


def forward(
    y,
    v,
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
    """(..., L, E) twice -> (..., L, E)."""
    wide = accumulation_dtype(y.dtype)
    wp, bp, w1, b1, w2, b2 = _cast(y.dtype, proj_weight, proj_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    gamma, beta = _cast(wide, norm_weight, norm_bias)
    t = v + _dropout(F.linear(y, wp, bp), proj_drop, seed, 1)
    n = F.layer_norm(t.to(wide), t.shape[-1:], gamma, beta, norm_eps).to(y.dtype)
    return t + _dropout(F.linear(F.gelu(F.linear(n, w1, b1)), w2, b2), mlp_drop, seed, 2)

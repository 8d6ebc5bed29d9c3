"""token_mlp as upstream computes it: projection, skip through v, LayerNorm, MLP, skip."""

import torch.nn.functional as F

from .._common.library import accumulation_dtype
from .._common.philox import keep_masks
from .._common.transforms import constant


def _cast(dtype, *tensors):
    return (None if t is None else t.to(dtype) for t in tensors)


def _dropout(x, p, keep):
    return x if keep is None else x * keep / (1 - p)


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
    keep_proj, keep_mlp = keep_masks(seed, y.shape, proj_drop, mlp_drop)
    t = v + _dropout(F.linear(y, wp, bp), proj_drop, keep_proj)
    n = F.layer_norm(t.to(wide), (constant(t.shape[-1]),), gamma, beta, norm_eps).to(y.dtype)
    return t + _dropout(F.linear(F.gelu(F.linear(n, w1, b1)), w2, b2), mlp_drop, keep_mlp)

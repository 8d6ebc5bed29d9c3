"""add_layer_norm as upstream computes it: dropout and stochastic depth of the branch, the sum, then LayerNorm."""

import torch.nn.functional as F

from .._common.library import accumulation_dtype
from .._common.philox import Drops, branch_masks
from .._common.transforms import constant


def dropped(branch, masks, drops):
    """A branch after dropout and stochastic depth; masks: :func:`philox.branch_masks`."""
    for mask, p in zip(masks, drops, strict=True):
        branch = branch if mask is None else branch * mask / (1 - p)
    return branch


def normalised(t, norm_weight, norm_bias, norm_eps, dtype):
    """LayerNorm over the last axis in ``dtype``, with statistics in the accumulation dtype."""
    wide = accumulation_dtype(t.dtype)
    gamma, beta = (None if p is None else p.to(wide) for p in (norm_weight, norm_bias))
    return F.layer_norm(t.to(wide), (constant(t.shape[-1]),), gamma, beta, norm_eps).to(dtype)


def forward(x, branch, norm_weight, norm_bias, norm_eps, drop, drop_path, dtype, seed):
    """(B, N, D) twice -> the stream in x's dtype, and its LayerNorm in ``dtype``."""
    drops = Drops(drop, drop_path)
    t = (x + dropped(branch, branch_masks(seed, branch.shape, drops), drops)).to(x.dtype)
    return t, normalised(t, norm_weight, norm_bias, norm_eps, dtype)

"""layer_norm_mlp as upstream computes it: sum, LayerNorm, Linear, GELU, dropout, Linear, dropout, sum."""

import torch.nn.functional as F

from .._common.philox import HIDDEN, branch_masks, keep_masks
from ..add_layer_norm import reference as norm
from .autograd import unpack


def forward(x, branch, *arguments):
    """(B, N, D) -> (B, N, O)."""
    mlp, options, seed = unpack(*arguments)
    first, second = options.drops
    t = x
    if branch is not None:
        t = (x + norm.dropped(branch, branch_masks(seed, branch.shape, first), first)).to(x.dtype)
    dtype = options.dtype
    n = t.to(dtype)
    if options.norm_eps is not None:
        n = norm.normalised(t, mlp.norm_weight, mlp.norm_bias, options.norm_eps, dtype)
    w1, b1, w2, b2 = (None if p is None else p.to(dtype) for p in mlp[2:])
    a = F.gelu(F.linear(n, w1, b1))
    if options.hidden_drop:
        keep, _ = keep_masks(seed, a.shape, options.hidden_drop, 0.0, HIDDEN)
        a = a * keep / (1 - options.hidden_drop)
    f = F.linear(a, w2, b2)
    f = norm.dropped(f, branch_masks(seed, f.shape, first, second, 1), second)
    return (t + f).to(t.dtype) if options.residual else f

"""token_mlp for the compilers of other runtimes, which recognise LayerNorm, GELU and a Linear with its bias."""

import torch.nn.functional as F

from .._common.library import accumulation_dtype
from . import aten
from .autograd import unpack


def run(y, v, mlp, eps):
    """(B, L, E) twice -> (B, L, E) in y's dtype, without dropout."""
    dtype, wide = y.dtype, accumulation_dtype(y.dtype)
    norm = (None if p is None else p.to(wide) for p in (mlp.norm_weight, mlp.norm_bias))
    t = v.to(wide) + _linear(y, mlp.proj_weight, mlp.proj_bias).to(wide)
    n = F.layer_norm(t, t.shape[-1:], *norm, eps).to(dtype)
    h = F.gelu(_linear(n, mlp.fc1_weight, mlp.fc1_bias))
    return (t + _linear(h, mlp.fc2_weight, mlp.fc2_bias).to(wide)).to(dtype)


def _linear(x, weight, bias):
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def forward(y, v, *arguments):
    """The operator's result, for inference."""
    mlp, options, _ = unpack(*arguments)
    if options.proj_drop or options.mlp_drop:
        return aten.forward(y, v, *arguments)
    return run(y, v, mlp, options.norm_eps)

"""layer_norm_mlp for the compilers of other runtimes, which recognise LayerNorm, GELU and a Linear with its bias."""

import torch.nn.functional as F

from ..add_layer_norm import aten as norm
from ..add_layer_norm.autograd import Norm
from . import aten
from .autograd import unpack


def forward(x, branch, *arguments):
    """The operator's result, for inference."""
    parameters, options, _ = unpack(*arguments)
    if any(options.drops[0]) or any(options.drops[1]) or options.hidden_drop:
        return aten.forward(x, branch, *arguments)
    dtype = options.dtype
    t, n = norm.add_normalised(x, Norm(*parameters[:2], options.norm_eps), dtype, branch)
    fc1, fc2 = ([None if p is None else p.to(dtype) for p in pair] for pair in (parameters[2:4], parameters[4:]))
    out = F.linear(F.gelu(F.linear(n, *fc1)), *fc2)
    return (t + out).to(t.dtype) if options.residual else out

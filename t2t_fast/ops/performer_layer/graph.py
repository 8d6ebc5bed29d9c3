"""A Performer layer for the compilers of other runtimes: k, q and v are three convolutions, the attention is products.

One convolution for all three would be followed by a copy of each part.
"""

import math

import torch
import torch.nn.functional as F

from .._common.library import accumulation_dtype
from .._common.pixels import values
from .._common.spec import Window
from ..soft_split_linear import graph as split
from ..token_mlp import graph as mlp
from ..token_mlp.autograd import unpack
from . import aten


def _attention(k, q, v, w, eps):
    """performer_attention of (B, L, E) in log space (its ``aten.py``), in the dtype of its operands."""
    a = F.linear(k, w) - k.square().sum(-1, keepdim=True) * 0.5
    top = a.amax(-2, keepdim=True)
    weights = (a - top).exp()
    total = weights.sum(-2, keepdim=True)
    state = torch.bmm(weights.transpose(1, 2), v) / total.transpose(1, 2)
    along = F.linear(q, w) + (top + total.log())
    top = along.amax(-1, keepdim=True)
    weights = (along - top).exp()
    total = weights.sum(-1, keepdim=True)
    scale = total.reciprocal()
    if eps != 0:
        lse = top + total.log() - q.square().sum(-1, keepdim=True) * 0.5
        scale = scale * torch.sigmoid(lse - math.log(w.shape[0] * eps))
    return torch.bmm(weights, state) * scale


def forward(
    x, kqv_weight, kqv_bias, norm1_weight, norm1_bias, norm1_eps, kernel, stride, padding, dtype, pixels, w, eps, *rest
):
    """The operator's result, for inference."""
    *mlp_arguments, recompute = rest
    parameters, options, _ = unpack(*mlp_arguments)
    if options.proj_drop or options.mlp_drop:
        layer = kqv_weight, kqv_bias, norm1_weight, norm1_bias, norm1_eps, kernel, stride, padding, dtype, pixels
        return aten.forward(x, *layer, w, eps, *mlp_arguments, recompute)
    wide = accumulation_dtype(dtype)
    x = values(x, pixels, wide)
    found = split.windows(x.to(wide), Window(tuple(kernel), tuple(stride), tuple(padding)), norm1_eps, x.dtype)
    biases = (None, None, None) if kqv_bias is None else kqv_bias.chunk(3)
    k, q, v = (
        split.projected(found, weight, bias, norm1_weight, norm1_bias).to(dtype)
        for weight, bias in zip(kqv_weight.chunk(3), biases, strict=True)
    )
    y = _attention(k.to(wide), q.to(wide), v.to(wide), w.to(wide), eps)
    return mlp.run(y.to(dtype), v, parameters, options.norm_eps)

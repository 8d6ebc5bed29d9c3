"""transformer_block as upstream computes it: LayerNorm, qkv, softmax of all scores, projection, sum, MLP."""

from .._common.library import accumulation_dtype
from ..layer_norm_linear import reference as linear
from ..layer_norm_mlp import reference as mlp
from .autograd import composed


def _attention(q, k, v, scale):
    weights = ((q @ k.transpose(-2, -1)).to(accumulation_dtype(q.dtype)) * scale).softmax(dim=-1)
    return weights.to(q.dtype) @ v


forward = composed(linear.forward, _attention, mlp.forward)

"""transformer_block as layer_norm_linear, attention, projection, layer_norm_mlp."""

import torch.nn.functional as F

from .._common.attention import heads, merged, softmax_attention
from .._common.library import accumulation_dtype
from ..layer_norm_linear import aten as linear
from ..layer_norm_linear import reference as reference_linear
from ..layer_norm_mlp import aten as mlp
from ..layer_norm_mlp import reference as reference_mlp
from .arguments import unpack


def _forward(linear, attention, mlp):
    """The operator's forward, of the implementations of its parts."""

    def forward(x, *arguments):
        p, o, seed = unpack(*arguments)
        packed, x = linear(x, p.norm1_weight, p.norm1_bias, o.norm1_eps, p.qkv_weight, p.qkv_bias, o.dtype)
        y = merged(attention(*heads(packed, o.heads), o.scale))
        branch = F.linear(y, p.proj_weight.to(o.dtype), None if p.proj_bias is None else p.proj_bias.to(o.dtype))
        norm = p.norm2_weight, p.norm2_bias, o.norm2_eps
        drops = 0.0, o.drop_path1, 0.0, 0.0, o.drop_path2
        return mlp(
            x, branch, *norm, p.fc1_weight, p.fc1_bias, p.fc2_weight, p.fc2_bias, *drops, True, False, o.dtype, seed
        )

    return forward


def _plain_attention(q, k, v, scale):
    """As upstream computes it: the softmax in the accumulation dtype."""
    weights = ((q @ k.transpose(-2, -1)).to(accumulation_dtype(q.dtype)) * scale).softmax(dim=-1)
    return weights.to(q.dtype) @ v


aten = _forward(linear.forward, softmax_attention, mlp.forward)
reference = _forward(reference_linear.forward, _plain_attention, reference_mlp.forward)

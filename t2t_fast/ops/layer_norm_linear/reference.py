"""layer_norm_linear as upstream computes it: LayerNorm, then Linear."""

import torch.nn.functional as F

from ..add_layer_norm import reference as norm


def forward(x, norm_weight, norm_bias, norm_eps, weight, bias, dtype):
    """(B, N, D) -> (B, N, O) in ``dtype``, and x."""
    n = norm.normalised(x, norm_weight, norm_bias, norm_eps, dtype)
    return F.linear(n, weight.to(dtype), None if bias is None else bias.to(dtype)), x

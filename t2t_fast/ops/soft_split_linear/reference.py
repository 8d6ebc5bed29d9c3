"""Soft split, LayerNorm and Linear as upstream computes them, one after the other."""

import torch.nn.functional as F

from .._common.library import accumulation_dtype
from .._common.pixels import values
from .._common.transforms import constant
from .._common.windows import gradient_in_layout


def forward(x, weight, bias, norm_weight, norm_bias, norm_eps, kernel, stride, padding, dtype, pixels=()):
    """(B, C, H, W) -> (B, L, O) in ``dtype``; LayerNorm over the C*kh*kw columns unless ``norm_eps`` is ``None``."""
    x = values(x, pixels, accumulation_dtype(dtype))
    tokens = F.unfold(gradient_in_layout(x), kernel, stride=stride, padding=padding).transpose(1, 2)
    if norm_eps is None:
        return F.linear(tokens, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)).to(dtype)
    wide = accumulation_dtype(x.dtype)
    gamma = None if norm_weight is None else norm_weight.to(wide)
    beta = None if norm_bias is None else norm_bias.to(wide)
    tokens = F.layer_norm(tokens.to(wide), (constant(tokens.shape[-1]),), gamma, beta, norm_eps).to(x.dtype)
    return F.linear(tokens, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)).to(dtype)

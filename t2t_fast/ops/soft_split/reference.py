"""Soft split as upstream computes it: ``nn.Unfold`` and a transpose (``models/t2t_vit.py``)."""

import torch.nn.functional as F

from .._common.windows import gradient_in_layout


def forward(x, kernel, stride, padding):
    """(B, C, H, W) -> (B, L, C*kh*kw), columns ``c*kh*kw + dy*kw + dx``."""
    return F.unfold(gradient_in_layout(x), kernel, stride=stride, padding=padding).transpose(1, 2).contiguous()

"""Soft composition as upstream users compute it: a transpose and ``nn.Fold``."""

import torch.nn.functional as F


def forward(tokens, size, kernel, stride, padding):
    """(B, L, C*kh*kw) -> (B, C, H, W); overlapping windows add up."""
    return F.fold(tokens.transpose(1, 2), size, kernel, stride=stride, padding=padding)

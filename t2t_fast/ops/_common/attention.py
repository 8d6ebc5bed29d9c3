"""Softmax attention in PyTorch operations, and the layout of its heads."""

import torch
import torch.nn.functional as F

from . import transforms


def softmax_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, drop: float = 0.0
) -> torch.Tensor:
    """``dropout(softmax(scale q k^T)) v``: (B, heads, N, D) three times -> (B, heads, N, D).

    PyTorch's fused attention, except under transformations without a rule for it, where the weights are materialised.
    """
    if transforms.active() in (None, transforms.TRACING):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=drop, scale=scale)
    weights = (q * scale @ k.transpose(-2, -1)).softmax(dim=-1)
    return F.dropout(weights, drop) @ v


def heads(qkv: torch.Tensor, number: int) -> tuple[torch.Tensor, ...]:
    """q, k and v of packed (B, T, 3 * number * D), each (B, number, T, D)."""
    # not unflatten(), which would fix the batch size in an ONNX file
    batch, tokens, width = qkv.shape
    parts = qkv.view(batch, tokens, 3, number, width // (3 * number)).unbind(2)
    # in this order, backward copies the three gradients once, into the packed one
    return tuple(part.transpose(1, 2) for part in parts)


def merged(y: torch.Tensor) -> torch.Tensor:
    """(B, heads, T, D) -> (B, T, heads * D)."""
    return y.transpose(1, 2).flatten(2)

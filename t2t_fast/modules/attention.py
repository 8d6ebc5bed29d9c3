"""Softmax attention, shared by the attention modules."""

import torch
import torch.nn.functional as F
from torch import nn

from ..ops._common import transforms
from . import fusion


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, drop: nn.Module | float = 0.0
) -> torch.Tensor:
    """``dropout(softmax(scale q k^T)) v``: (B, heads, N, D) three times -> (B, heads, N, D).

    PyTorch's fused attention, except where the weights must be materialised: for a dropout module with hooks or of
    another class, and under transformations without a rule for fused attention.

    Args:
        drop: the dropout module of the weights, or its current probability.
    """
    plain = isinstance(drop, (int, float)) or (fusion.dropout(drop) is None and not fusion.watched())
    if plain and transforms.active() in (None, transforms.TRACING):
        rate = drop if isinstance(drop, (int, float)) else fusion.rate(drop)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=rate, scale=scale)
    weights = (q * scale @ k.transpose(-2, -1)).softmax(dim=-1)
    return (F.dropout(weights, drop) if isinstance(drop, (int, float)) else drop(weights)) @ v


def heads(qkv: torch.Tensor, number: int, linear: nn.Module | None = None) -> tuple[torch.Tensor, ...]:
    """q, k and v of packed (B, T, 3 * number * D), each (B, number, T, D).

    Args:
        linear: the layer that returned ``qkv``.

    Raises:
        ValueError: ``qkv`` is a part of that layer's result, as under tensor parallelism; it would not be divided into
            q, k and v but anywhere.
    """
    # not unflatten(), which would fix the batch size in an ONNX file
    batch, tokens, width = qkv.shape
    whole = getattr(linear, "out_features", width)
    if width != whole:
        raise ValueError(
            f"attention: qkv must return its {whole} channels, which q, k and v share, got {width}; under tensor "
            "parallelism gather them: ColwiseParallel(output_layouts=Replicate())"
        )
    parts = qkv.view(batch, tokens, 3, number, width // (3 * number)).unbind(2)
    # in this order, backward copies the three gradients once, into the packed one
    return tuple(part.transpose(1, 2) for part in parts)


def merged(y: torch.Tensor) -> torch.Tensor:
    """(B, heads, T, D) -> (B, T, heads * D)."""
    return y.transpose(1, 2).flatten(2)

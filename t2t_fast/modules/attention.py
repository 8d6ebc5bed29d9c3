"""Softmax attention, shared by the attention modules."""

import torch
from torch import nn

from ..ops._common.attention import heads as split_heads
from ..ops._common.attention import merged as merged
from ..ops._common.attention import softmax_attention
from . import fusion


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, drop: nn.Module | float = 0.0
) -> torch.Tensor:
    """``dropout(softmax(scale q k^T)) v``: (B, heads, N, D) three times -> (B, heads, N, D).

    The weights are materialised for a dropout module with hooks or of another class.

    Args:
        drop: the dropout module of the weights, or its current probability.
    """
    if isinstance(drop, (int, float)) or (fusion.dropout(drop) is None and not fusion.watched()):
        return softmax_attention(q, k, v, scale, drop if isinstance(drop, (int, float)) else fusion.rate(drop))
    return drop((q * scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v


def heads(qkv: torch.Tensor, number: int, linear: nn.Module | None = None) -> tuple[torch.Tensor, ...]:
    """q, k and v of packed (B, T, 3 * number * D), each (B, number, T, D).

    Args:
        linear: the layer that returned ``qkv``.

    Raises:
        ValueError: ``qkv`` is a part of that layer's result, as under tensor parallelism; it would not be divided into
            q, k and v but anywhere.
    """
    width = qkv.shape[-1]
    whole = getattr(linear, "out_features", width)
    if width != whole:
        raise ValueError(
            f"attention: qkv must return its {whole} channels, which q, k and v share, got {width}; under tensor "
            "parallelism gather them: ColwiseParallel(output_layouts=Replicate())"
        )
    return split_heads(qkv, number)

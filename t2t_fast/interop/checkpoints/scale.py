"""The attention scale of mmpretrain 1.2: q k is multiplied by sqrt(head width), where upstream multiplies by ``scale``.

Source: ``mmpretrain/models/utils/attention.py``, which divides by the scale (tests/golden/README.md).
"""

from __future__ import annotations

from typing import Any

import torch

from .report import Refused


def queries_of(name: str) -> bool:
    """Whether a tensor of this name holds queries, keys and values, in this order."""
    return name.split(".")[-2:-1] == ["qkv"]


def factor(name: str, value: torch.Tensor, attention: Any) -> float:
    """The factor of the queries for which ``attention`` computes with mmpretrain's weights what mmpretrain computes.

    Args:
        name: of the tensor, for messages; value: qkv's weight or bias, (3 * width, ...).
        attention: the module around it, with ``num_heads`` and ``scale``.

    Raises:
        Refused: it has no ``num_heads`` or ``scale``.
    """
    try:
        return (value.shape[0] // 3 / attention.num_heads) ** 0.5 / attention.scale
    except AttributeError as error:
        raise Refused(f"trained_with='mmpretrain' needs an attention with num_heads and scale around {name}") from error


def multiply_queries(value: torch.Tensor, by: float) -> torch.Tensor:
    """qkv's weight or bias, in float64, with its first third multiplied."""
    width = value.shape[0] // 3
    queries, rest = value.double().split([width, value.shape[0] - width])
    return torch.cat([queries * by, rest])

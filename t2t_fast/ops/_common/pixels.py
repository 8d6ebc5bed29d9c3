"""Images of bytes: their normalisation, and conversion to values for implementations that do not read bytes.

The operators' argument ``pixels`` holds the scales of all channels, then their shifts: the value of a byte u is
``scale u + shift``. It is empty for floating images.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch

PixelNorm: TypeAlias = Sequence[Sequence[float]]
"""(mean, std), each with one number per channel."""


def normalisation(mean: Sequence[float], std: Sequence[float]) -> list[float]:
    """``pixels`` for the values ``(u / 255 - mean) / std`` of bytes u."""
    return [1 / (255 * s) for s in std] + [-m / s for m, s in zip(mean, std, strict=True)]


def values(x: torch.Tensor, pixels: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """(B, C, H, W) bytes as values in ``dtype``; other images unchanged."""
    if not pixels:
        return x
    channels = x.shape[1]
    scales, shifts = pixels[:channels], pixels[channels:]
    return torch.stack([x[:, c].to(dtype) * scales[c] + shifts[c] for c in range(channels)], 1)

"""Images of bytes: what each byte stands for, and the values for implementations that do not read bytes themselves.

``pixels``, as operators take it, holds the scales of all channels and then their shifts: a byte u of a channel is
``scale u + shift``. Empty for images that hold values already.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch

PixelNorm: TypeAlias = Sequence[Sequence[float]]
"""(mean, std), each with one number per channel."""


def normalisation(mean: Sequence[float], std: Sequence[float]) -> list[float]:
    """``pixels`` for bytes that are 255 times a value which is then normalised: ``(u / 255 - mean) / std``."""
    return [1 / (255 * s) for s in std] + [-m / s for m, s in zip(mean, std, strict=True)]


def values(x: torch.Tensor, pixels: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """(B, C, H, W) bytes as values in ``dtype``; anything else as it is."""
    if not pixels:
        return x
    channels = x.shape[1]
    scales, shifts = pixels[:channels], pixels[channels:]
    return torch.stack([x[:, c].to(dtype) * scales[c] + shifts[c] for c in range(channels)], 1)

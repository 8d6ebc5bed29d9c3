"""Launch parameters of soft_split_linear's Triton kernels: defaults, and candidates for a measurement."""

from pathlib import Path

import torch

from ..launch import DTYPES, Table
from .layout import NARROW

PASSES = ("forward", "weight", "image", "scalars")


def shape_class(name, dtype, channels, outputs):
    """What the parameters depend on, as words: operand dtype, values of a tap (layout.py), outputs."""
    return f"{DTYPES[dtype]}-C{channels}-O{outputs}"


def default(name, dtype, channels, outputs):
    """Parameters that compile without spills for T2T's shapes on every architecture.

    tokens: of a tile; warps: of a program; stages: tiles on their way; block: columns of a product, at most; parts:
    NARROW outputs each, of a program; programs: wanted on a multiprocessor.
    """
    found = {"tokens": 64, "warps": 8, "stages": 2, "block": 32, "programs": 2}
    if dtype == torch.float32:
        warps, stages = 8 if name == "scalars" else 4, 2 if name == "forward" else 1
        return found | {"tokens": 32, "warps": warps, "stages": stages, "parts": 1}
    if name == "forward" and channels % 64:  # cells, or gathered values
        found |= {"tokens": 32, "warps": 4}
    if name == "image" and dtype == torch.bfloat16:  # in float16, it multiplies in TF32
        found["block"] = 64
    return found | {"parts": min(-(-outputs // NARROW), 3)}


def candidates(name, present):
    """Parameters worth a measurement where ``present`` is in use; the rest means nothing to the pass."""
    tiles = ((32, 4), (64, 4), (64, 8), (128, 8))
    if name == "scalars":
        return [{**present, "tokens": tokens, "warps": warps} for tokens, warps in tiles]
    return [
        {**present, "tokens": tokens, "warps": warps, "stages": stages, "block": block, "parts": parts}
        for tokens, warps in tiles
        for stages in (2, 3, 4)
        for block in (32, 64)
        for parts in sorted({1 if name != "image" else present["parts"], present["parts"]})
    ]


TABLE = Table(Path(__file__).with_name("launch.json"), PASSES, shape_class, default, candidates)

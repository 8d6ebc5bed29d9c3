"""Launch parameters of soft_split_linear's Triton kernels: defaults, and candidates for a measurement."""

from pathlib import Path

import torch

from ..._common.launch_table import DTYPES, Table
from .layout import NARROW

PASSES = ("forward", "weight", "image", "scalars")


def shape_class(name, dtype, channels, outputs):
    """The key of a row of the launch table: operand dtype, values of a tap (layout.py), outputs."""
    return f"{DTYPES[dtype]}-C{channels}-O{outputs}"


def default(name, dtype, channels, outputs):
    """Parameters that compile without spills for T2T's shapes on every architecture.

    tokens: tokens per tile; warps: warps per program; stages: pipeline stages; block: maximum columns of a product;
    parts: groups of NARROW outputs per program; programs: target per multiprocessor. For the weight's gradient, blocks:
    blocks of columns per program; turned: whether the sums are held as (outputs, columns), which suits wgmma.
    """
    found = {"tokens": 64, "warps": 8, "stages": 2, "block": 32, "programs": 2}
    if name == "weight":
        found |= {"blocks": 3, "turned": 0}
    if dtype == torch.float32:
        found |= {"tokens": 32, "warps": 8 if name == "scalars" else 4, "stages": 2 if name == "forward" else 1}
        if name == "weight":
            found |= {"blocks": 1, "turned": 1}
        if name == "image" and channels % 64 == 0:
            found["tokens"] = 16
        return found | {"parts": 1}
    if name == "forward" and channels % 64:  # cells and gathered values
        found |= {"tokens": 32, "warps": 4}
    if name == "image":
        return found | {"warps": 4, "stages": 1, "block": 64, "parts": 1}
    return found | {"parts": min(-(-outputs // NARROW), 3)}


def candidates(name, present):
    """Parameters that the tuner measures, given the ``present`` ones; the others have no effect on the pass."""
    tiles = ((32, 4), (64, 4), (64, 8), (128, 8))
    if name == "scalars":
        return [{**present, "tokens": tokens, "warps": warps} for tokens, warps in tiles]
    if name == "forward":
        tiles += ((256, 16),)  # half as many reads of the weight
    stages = {"image": (1, 2, 3), "weight": (2, 3)}.get(name, (2, 3, 4))
    parts = {"image": {1, 3}, "weight": set()}.get(name, {1})
    found = [
        {**present, "tokens": tokens, "warps": warps, "stages": number, "block": block, "parts": part}
        for tokens, warps in tiles
        for number in stages
        for block in (32, 64)
        for part in sorted(parts | {present["parts"]})
    ]
    if name == "weight":
        more = [{"blocks": blocks, "turned": turned} for blocks in (1, 2, 3) for turned in (0, 1)]
        found = [each | others for each in found for others in more]
    return found


TABLE = Table(Path(__file__).with_name("launch.json"), PASSES, shape_class, default, candidates)

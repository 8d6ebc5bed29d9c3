"""Launch parameters of the Performer layer's Triton kernels: defaults, and candidates for a measurement."""

from pathlib import Path

import torch

from ..._common.launch_table import DTYPES, Table, padded

LARGEST = 64
"""Channels, features and hidden units that one program holds at once."""

PASSES = ("split_keys", "read_out_mlp")


def fits(width, *others):
    """Whether two steps can be fused for these channels, features (and hidden units).

    The width must need no padding: padded rows would take too many registers.
    """
    return width == padded(width) and max(width, *others) <= LARGEST


def shape_class(name, dtype, width, features, other):
    """The key of a row of the launch table: dtype, padded sizes, and for the split the values of a tap (layout.py).

    other: values of a tap, or hidden units.
    """
    last = f"C{other}" if name == "split_keys" else f"F{padded(other)}"
    return f"{DTYPES[dtype]}-E{padded(width)}-m{padded(features)}-{last}"


def candidates(name, present):
    """Parameters that the tuner measures, independent of the ``present`` ones.

    fused: 1 for one launch, 0 for two, where the others have no effect; tokens: tokens per tile; warps: warps per
    program; stages: pipeline stages; programs: target per multiprocessor; block: maximum columns of a product; keep: 1
    if a program holds token_mlp's weights, 0 if it reads them again for every tile; lean: 1 if token_mlp saves
    registers (token_mlp/triton/forward.py).
    """
    if name == "split_keys":
        special = [{"block": block} for block in (32, 64)]
        shapes, depths = ((32, 4), (64, 4), (64, 8), (128, 8)), (2, 3)
    else:
        special = [{"keep": 1, "lean": lean} for lean in (0, 1)]
        shapes, depths = ((32, 4), (64, 4), (64, 8), (128, 8)), (1, 2)
    fused = [
        {"fused": 1, "tokens": tokens, "warps": warps, "stages": stages, "programs": programs, **rest}
        for tokens, warps in shapes
        for stages in depths
        for programs in (2, 3, 4)
        for rest in special
    ]
    return [*fused, {**fused[0], "fused": 0}]


def default(name, dtype, width, features, other):
    """Parameters that compile without spills for T2T's shape on every architecture.

    The fused queries and mlp take 45 KiB of shared memory, so that two programs fit into the 100 KiB of the smallest
    multiprocessors; holding token_mlp's weights in float32 would take more.
    """
    single = dtype == torch.float32
    if name == "split_keys":
        tokens, warps, stages = 32, 4, 2
        if single:  # cells and gathered values need one more operand, the mask of used columns
            tokens, warps, stages = (16, 4, 1) if other % 64 else (32, 8, 1)
        return {"fused": 1, "tokens": tokens, "warps": warps, "stages": stages, "programs": 2, "block": 32}
    return {
        "fused": 1,
        "tokens": 32,
        "warps": 8 if single else 4,
        "stages": 1,
        "programs": 2,
        "keep": int(not single),
        "lean": 0,
    }


TABLE = Table(Path(__file__).with_name("launch.json"), PASSES, shape_class, default, candidates)

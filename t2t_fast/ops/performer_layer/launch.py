"""Launch parameters of the Performer layer's Triton kernel: defaults, and candidates for a measurement."""

from pathlib import Path

import torch

from ..launch import DTYPES, Table, padded

LARGEST = 64
"""Channels, features and hidden units that one program holds at once."""

PASSES = ("read_out_tail",)


def fits(width, features, hidden):
    """Whether the pass over the queries and the tail can be one launch; else they are two.

    Rows that are not as long as the matrix instructions' would take too many registers.
    """
    return width == padded(width) and max(width, features, hidden) <= LARGEST


def shape_class(dtype, width, features, hidden):
    """What the parameters depend on, as words: dtype and padded sizes."""
    return f"{DTYPES[dtype]}-E{padded(width)}-m{padded(features)}-F{padded(hidden)}"


def candidates(name, present):
    """Parameters worth a measurement, whatever is in use at ``present``.

    fused: 1 for one launch, 0 for two, to which the others mean nothing; tokens: of a tile; warps: of a program;
    stages: tiles on their way; programs: wanted on a multiprocessor; keep: 1 where a program keeps the tail's weights,
    0 where it reads them again for every tile.
    """
    fused = [
        {"fused": 1, "tokens": tokens, "warps": warps, "stages": stages, "programs": programs, "keep": 1}
        for tokens, warps in ((32, 4), (64, 4), (64, 8), (128, 8))
        for stages in (1, 2)
        for programs in (2, 3, 4)
    ]
    return [*fused, {**fused[0], "fused": 0}]


def default(name, dtype, width, features, hidden):
    """Parameters that compile without spills for T2T's shape on every architecture.

    In 45 KiB of shared memory, so that two programs fit into the 100 KiB of the smallest cards' multiprocessors; the
    tail's weights in float32, kept, would take more.
    """
    single = dtype == torch.float32
    return {"fused": 1, "tokens": 32, "warps": 8 if single else 4, "stages": 1, "programs": 2, "keep": int(not single)}


TABLE = Table(Path(__file__).with_name("launch.json"), PASSES, shape_class, default, candidates)

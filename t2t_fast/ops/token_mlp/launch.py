"""Launch parameters of the tail's Triton kernels: defaults, and candidates for a measurement."""

from pathlib import Path

import torch

from ..launch import DTYPES, Table, padded

LARGEST = 128
"""Channels and hidden units that the kernels take."""

PASSES = ("tail", "tail_backward")


def shape_class(name, dtype, width, hidden):
    """What the parameters depend on, as words: dtype and padded sizes."""
    return f"{DTYPES[dtype]}-E{padded(width)}-F{padded(hidden)}"


def candidates(name, present):
    """Parameters worth a measurement, whatever is in use at ``present``.

    tokens: of a tile; warps: of a program; stages: tiles on their way; programs: wanted on a multiprocessor; keep: 1
    where a program keeps the weights, 0 where it reads them again for every tile; split: 1 where backward is two
    launches; lean: how far registers are saved, what could be held computed or read again (the kernels tell).
    """
    backward = name == "tail_backward"
    return [
        {
            "tokens": tokens,
            "warps": warps,
            "stages": stages,
            "programs": programs,
            "keep": keep,
            "split": split,
            "lean": lean,
        }
        for split in ((0, 1) if backward else (0,))
        for tokens, warps in ((16, 4), (16, 8), (32, 4), (32, 8), (64, 4), (128, 8))
        for stages, keep in ((1, 0), (1, 1), (2, 1))
        for programs in ((1, 2) if backward else (2, 3, 4))
        for lean in (((2,) if tokens > 32 else (0, 1, 2)) if backward else (0, 1))
    ]


def default(name, dtype, width, hidden):
    """Parameters that compile without spills for T2T's shape; backward in float32 may have a few.

    Weights in float32, kept, would not fit into the 99 KiB of shared memory that every card has; nor would large ones.
    """
    single, backward = dtype == torch.float32, name == "tail_backward"
    large = max(padded(width), padded(hidden)) > 64
    tokens = 16 if backward or (single and large) else 32
    return {
        "tokens": tokens,
        "warps": 8 if backward or single or large else 4,
        "stages": 1 if backward or single or large else 2,
        "programs": 1 if backward else 2,
        "keep": int(not single and not large),
        "split": 0,
        "lean": int(backward and single),
    }


TABLE = Table(Path(__file__).with_name("launch.json"), PASSES, shape_class, default, candidates)

"""Launch parameters of Performer attention's Triton kernels: defaults, and candidates for a measurement.

``python -m benchmarks.kernels.tune`` measures the candidates on a card and rewrites its part of ``launch.json``.
"""

from pathlib import Path

import torch

from ..._common.launch_table import DTYPES, Table, padded

LARGEST_WIDTH = 256
ALIKE = 256
"""From this number of features on, the defaults are the same."""

PASSES = ("keys", "queries", "queries_backward", "keys_backward")

_WHOLE = {
    "keys": (2048, 8192, 8192),
    "queries": (4096, 8192, 8192),
    "queries_backward": (2048, 8192, 8192),
    "keys_backward": (2048, 4096, 8192),
}
"""Largest E m that a program of a pass holds at once by default, for float32, float16 and bfloat16."""

_CHUNK = {
    "keys": (2048, 8192, 8192),
    "queries": (4096, 4096, 4096),
    "queries_backward": (8192, 8192, 8192),
    "keys_backward": (2048, 4096, 4096),
}
"""E times the features of a chunk, likewise."""


def shape_class(name, dtype, width, features):
    """The key of a row of the launch table: dtype and padded sizes."""
    return f"{DTYPES[dtype]}-E{padded(width)}-m{padded(features)}"


def candidates(name, present):
    """Parameters that the tuner measures, given the ``present`` ones: with their chunks and without.

    tokens: tokens per tile; warps: warps per program; stages: pipeline stages; programs: target per multiprocessor;
    features: features per chunk, 0 if a program holds all at once.
    """
    programs = (2, 4, 6) if name.startswith("keys") else (4, 8, 16)
    return [
        {"tokens": tokens, "warps": warps, "stages": stages, "programs": count, "features": features}
        for features in sorted({0, present["features"]})
        for tokens, warps in ((32, 4), (64, 4), (128, 4), (64, 8), (128, 8))
        for stages in (2, 3, 4)
        for count in programs
    ]


def default(name, dtype, width, features):
    """Parameters that compile without spills for T2T's shape on every architecture, and for most others.

    The larger the (E, m) values that a program holds, and the more of them the pass has, the fewer tokens per tile.
    States beyond :data:`_WHOLE` are cut into chunks of features, which fit into the 99 KiB of shared memory that every
    card has. ``python -m benchmarks.kernels.report --all`` reports how each shape compiles.
    """
    width, features = padded(width), padded(features)
    single, index = dtype == torch.float32, list(DTYPES).index(dtype)
    crowded = {
        "queries_backward": single or features > 32 or width > 64,
        "keys_backward": width + features > 128 or (single and width * features >= 2048),
    }
    tokens, warps, chunk = 32, 4, 0
    if width * features > _WHOLE[name][index] or features > max(64, 2 * width):
        chunk = min(32 if single else 64, max(16, _CHUNK[name][index] // width))
        tokens = 16 if single or width > 128 or name.endswith("backward") else 32
        warps = 4 if width <= 64 else 8
    elif width > 128:
        tokens, warps = 16, 8
    elif crowded.get(name, False):
        tokens = 16
    elif name == "keys" and single and width * features == 2048:
        tokens, warps = (32, 8) if width <= 64 else (16, 8)
    elif width * features > 4096:
        warps = 8
    programs = 8 if name == "queries" else 4
    stages = 1 if chunk or width > 128 else 2
    return {"tokens": tokens, "warps": warps, "stages": stages, "programs": programs, "features": chunk}


TABLE = Table(Path(__file__).with_name("launch.json"), PASSES, shape_class, default, candidates)

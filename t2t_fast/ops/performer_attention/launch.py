"""Launch parameters of the Triton kernels: a committed table, its defaults, and how a call is cut into programs.

Nothing is tuned at a user's first call. ``python -m benchmarks.tune`` measures the candidates on a card and rewrites
its part of ``launch.json``: architecture -> pass -> shape class -> parameters.
"""

import json
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

TABLE_PATH = Path(__file__).with_name("launch.json")
LARGEST_WIDTH, LARGEST_TILE = 256, 128
ALIKE = 256
"""From this number of features on, defaults differ no more."""


_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_PASSES = ("keys", "queries", "queries_backward", "keys_backward")
_overrides: dict[str, dict] = {}

_WHOLE = {
    "keys": (2048, 8192, 8192),
    "queries": (4096, 8192, 8192),
    "queries_backward": (2048, 8192, 8192),
    "keys_backward": (2048, 4096, 8192),
}
"""Largest E m that a program of a pass holds at once by default; in float32, float16, bfloat16."""

_CHUNK = {
    "keys": (2048, 8192, 8192),
    "queries": (4096, 4096, 4096),
    "queries_backward": (8192, 8192, 8192),
    "keys_backward": (2048, 4096, 4096),
}
"""E times the features of a chunk, likewise."""


class Cut(NamedTuple):
    """How the tokens of each sequence are divided: into ``splits`` of ``tiles`` tiles (the last may have fewer)."""

    splits: int
    tiles: int


def passes():
    """The passes that have launch parameters."""
    return _PASSES


def padded(size):
    """The power of two, at least 16, that a kernel works with instead of ``size``."""
    return max(16, 1 << (size - 1).bit_length())


def shape_class(dtype, width, features):
    """What the parameters depend on, as words: dtype and padded sizes."""
    return f"{_NAMES[dtype]}-E{padded(width)}-m{padded(features)}"


def candidates(name, present):
    """Parameters worth a measurement where ``present`` is in use: with its chunks and without.

    tokens: of a tile; warps: of a program; stages: tiles on their way; programs: wanted on a multiprocessor; features:
    those of a chunk, 0 where a program takes all at once.
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

    The larger the (E, m) values that a program holds, and the more there are of them in this pass, the fewer tokens.
    States beyond :data:`_WHOLE` are cut into chunks of features, which fit into the 99 KiB of shared memory that every
    card has. ``python -m benchmarks.kernel_report --all`` tells how each shape compiles.
    """
    width, features = padded(width), padded(features)
    single, index = dtype == torch.float32, list(_NAMES).index(dtype)
    crowded = {
        "queries_backward": single or features > 32 or width > 64,
        "keys_backward": width + features > 128 or (single and features > 32),
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


@cache
def _table():
    return json.loads(TABLE_PATH.read_text())


def chosen(name, architecture, dtype, width, features):
    """The parameters of a pass: what an override or the table has, the rest by default."""
    found = _found(name, architecture, dtype, width, features)
    return {**found, **_overrides[name]} if name in _overrides else found


@cache
def _found(name, architecture, dtype, width, features):
    row = _table().get(architecture, {}).get(name, {}).get(shape_class(dtype, width, features), {})
    return {**default(name, dtype, width, features), **row}


@contextmanager
def override(name, parameters):
    """Every launch of pass ``name`` inside the block takes ``parameters``; for tuning and tests."""
    if name not in _PASSES:
        raise ValueError(f"override: name must be one of {', '.join(_PASSES)}, got {name!r}")
    before = _overrides.get(name)
    _overrides[name] = dict(parameters)
    try:
        yield
    finally:
        del _overrides[name]
        if before is not None:
            _overrides[name] = before


def cut(length, sequences, tokens, programs):
    """Divide ``length`` tokens so that about ``programs`` programs run in all; by sizes alone, so always the same."""
    tiles = -(-length // tokens)
    splits = max(1, min(programs // max(sequences, 1), tiles))
    each = max(1, -(-tiles // splits))
    return Cut(max(1, -(-tiles // each)), each)

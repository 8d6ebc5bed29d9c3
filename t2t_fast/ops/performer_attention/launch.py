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
LARGEST_WIDTH, LARGEST_FEATURES, LARGEST_TILE = 256, 128, 128

_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_PASSES = ("keys", "queries", "queries_backward", "keys_backward")
_overrides: dict[str, dict] = {}


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


def candidates(name):
    """Parameters worth a measurement.

    tokens: of a tile; warps: of a program; stages: tiles on their way; programs: wanted on a multiprocessor.
    """
    programs = (2, 4, 6) if name.startswith("keys") else (4, 8, 16)
    return [
        {"tokens": tokens, "warps": warps, "stages": stages, "programs": count}
        for tokens, warps in ((32, 4), (64, 4), (128, 4), (64, 8), (128, 8))
        for stages in (2, 3, 4)
        for count in programs
    ]


def default(name, dtype, width, features):
    """Parameters that compile without a spill and within 99 KiB of shared memory on every architecture."""
    state = padded(width) * padded(features)
    wide = 4 if dtype == torch.float32 else 2
    tokens = 64 if state * wide <= 8192 else 32 if state * wide <= 32768 else 16
    warps = 4 if state <= 4096 else 8
    stages = 3 if padded(width) * wide <= 128 else 2
    return {"tokens": tokens, "warps": warps, "stages": stages, "programs": 4}


@cache
def _table():
    return json.loads(TABLE_PATH.read_text())


def chosen(name, architecture, dtype, width, features):
    """The parameters of a pass: an override, else the table's, else the default."""
    return _overrides[name] if name in _overrides else _found(name, architecture, dtype, width, features)


@cache
def _found(name, architecture, dtype, width, features):
    row = _table().get(architecture, {}).get(name, {}).get(shape_class(dtype, width, features))
    return default(name, dtype, width, features) if row is None else row


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

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
    """Parameters that compile without spills for T2T's shape on every architecture, and for most others.

    The larger the (m, E) values that a program holds, and the more there are of them in this pass, the fewer tokens. A
    large state may need more shared memory than a card has; the first call's self-test then finds that. ``python -m
    benchmarks.kernel_report --all`` tells how each shape compiles.
    """
    width, features = padded(width), padded(features)
    state, single, many = width * features, dtype == torch.float32, features > 32
    crowded = {
        "queries_backward": single or many or width > 64,
        "keys_backward": width + features > 128 or (single and many),
    }
    tokens, warps = 32, 4
    if crowded.get(name, False):
        tokens, warps = 16, 8 if width > 128 else 4
    elif single and name.startswith("keys") and state >= 2048:
        tokens, warps = (32, 8) if state == 2048 else (16, 8)
    elif state > 4096:
        warps = 8
    if state > 8192:
        tokens, warps = 16, 8
    return {"tokens": tokens, "warps": warps, "stages": 2, "programs": 8 if name == "queries" else 4}


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

"""Launch parameters of Triton kernels: committed tables, their defaults, and how a call is cut into programs.

Nothing is tuned at a user's first call. An operator's folder has a ``launch.json`` (architecture -> pass -> shape class
-> parameters) and a ``launch.py`` with its :class:`Table` and its defaults. Some passes have parameters of their own
for few tokens, under the architecture's name with ``-few`` behind it (``triton_runtime.section``).
"""

import json
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

import torch

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
"""Their names in tables."""


def padded(size):
    """The power of two, at least 16, that a kernel works with instead of ``size``."""
    return max(16, 1 << (size - 1).bit_length())


class Cut(NamedTuple):
    """How the tokens of each sequence are divided: into ``splits`` of ``tiles`` tiles (the last may have fewer)."""

    splits: int
    tiles: int


def cut(length, sequences, tokens, programs):
    """Divide ``length`` tokens so that about ``programs`` programs run in all; by sizes alone, so always the same."""
    tiles = -(-length // tokens)
    splits = max(1, min(programs // max(sequences, 1), tiles))
    each = max(1, -(-tiles // splits))
    return Cut(max(1, -(-tiles // each)), each)


class Table:
    """The launch parameters of an operator's passes.

    Args:
        path: of its ``launch.json``.
        passes: their names.
        shape_class: function of (pass, dtype, *sizes): what the parameters depend on, as words.
        default: function of (pass, dtype, *sizes): all parameters where the table has none.
        candidates: function of (pass, present parameters): those worth a measurement.
    """

    def __init__(self, path, passes, shape_class, default, candidates):
        self.path, self.passes = path, passes
        self.shape_class, self.default, self.candidates = shape_class, default, candidates
        self._found, self._overrides = {}, {}

    @cached_property
    def rows(self):
        """What the file holds."""
        return json.loads(self.path.read_text())

    def chosen(self, name, architecture, dtype, *sizes):
        """The parameters of a pass: what an override or the table has, the rest by default."""
        key = (name, architecture, dtype, *sizes)
        if key not in self._found:
            row = self.rows.get(architecture, {}).get(name, {}).get(self.shape_class(name, dtype, *sizes), {})
            self._found[key] = {**self.default(name, dtype, *sizes), **row}
        found = self._found[key]
        return {**found, **self._overrides[name]} if name in self._overrides else found

    @contextmanager
    def override(self, name, parameters):
        """Every launch of pass ``name`` inside the block takes ``parameters``; for tuning and tests."""
        if name not in self.passes:
            raise ValueError(f"override: name must be one of {', '.join(self.passes)}, got {name!r}")
        before = self._overrides.get(name)
        self._overrides[name] = dict(parameters)
        try:
            yield
        finally:
            del self._overrides[name]
            if before is not None:
                self._overrides[name] = before

"""Launch parameters of Triton kernels: committed tables, defaults, and the division of a call into programs.

There is no tuning at the first call. An operator's folder has a ``launch.json`` (architecture -> pass -> shape class
-> parameters) and a ``launch.py`` with its :class:`Table` and its defaults. Some passes have separate
parameters for few tokens, under the architecture's name with the suffix ``-few`` (``triton_runtime.section``).
"""

import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch

from ...errors import LaunchTableError
from . import guards

Parameters: TypeAlias = dict[str, int]

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
"""Names of dtypes in the tables."""


def padded(size: int) -> int:
    """``size`` rounded up to a power of two, at least 16, as kernels use it."""
    return max(16, 1 << (size - 1).bit_length())


class Cut(NamedTuple):
    """How the tokens of each sequence are divided: into ``splits`` of ``tiles`` tiles (the last may have fewer)."""

    splits: int
    tiles: int


WAVES = 8
"""How many numbers of waves :func:`cut` compares. More would pay off for long sequences only."""


@lru_cache(maxsize=1024)
def cut(length: int, sequences: int, tokens: int, programs: int) -> Cut:
    """Divide ``length`` tokens of each sequence for a GPU that runs ``programs`` programs at a time.

    Programs run in waves, and the last wave may be almost empty: 140 sequences with one program each take two waves of
    132, while 7 splits each fill 7.4 of 8. Chosen is the number of splits with the least time, which is waves times
    tiles of a program; a program costs one more tile, for what it does once. Depends only on sizes.
    """
    tiles, sequences, programs = max(1, -(-length // tokens)), max(1, sequences), max(1, programs)
    least = -(-sequences // programs)
    found = []
    for waves in range(least, least + WAVES):
        each = -(-tiles // min(tiles, waves * programs // sequences))
        splits = -(-tiles // each)
        found.append((-(-splits * sequences // programs) * (each + 1), splits, each))
    _, splits, each = min(found)
    return Cut(splits, each)


class Table:
    """The launch parameters of an operator's passes.

    Args:
        path: path of ``launch.json``.
        passes: names of the passes.
        shape_class: function of (pass, dtype, *sizes): the key of a row.
        default: function of (pass, dtype, *sizes): the parameters without a row.
        candidates: function of (pass, present parameters): the parameters that the tuner measures.
    """

    def __init__(
        self,
        path: Path,
        passes: Sequence[str],
        shape_class: Callable[..., str],
        default: Callable[..., Parameters],
        candidates: Callable[[str, Parameters], Any],
    ) -> None:
        self.path, self.passes = path, passes
        self.shape_class, self.default, self.candidates = shape_class, default, candidates
        self._selected: dict[tuple[Any, ...], Parameters] = {}
        self._overrides: dict[str, Parameters] = {}

    @cached_property
    def rows(self) -> dict[str, dict[str, dict[str, Parameters]]]:
        """The file's content: architecture -> pass -> shape class -> parameters.

        Raises:
            LaunchTableError: no readable JSON, an unknown architecture, pass, shape class or parameter, a key that is
                there twice, or a value that is no integer.
        """
        try:
            rows = json.loads(self.path.read_text(), object_pairs_hook=self._without_duplicates)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise LaunchTableError(f"{self._name}: must be a readable JSON file, got {error}") from error
        self._check(type(rows) is dict, "the table", rows, "an object")
        for architecture, of_passes in rows.items():
            self._check(
                re.fullmatch(r"sm_\d+(-few)?", architecture), "architecture", architecture, "sm_90 or sm_90-few"
            )
            self._check(type(of_passes) is dict, architecture, of_passes, "an object")
            for name, of_shapes in of_passes.items():
                self._check(name in self.passes, "pass", name, ", ".join(self.passes))
                self._check(type(of_shapes) is dict, f"{architecture}, {name}", of_shapes, "an object")
                for shape, parameters in of_shapes.items():
                    self._check_parameters(
                        f"{architecture}, {name}, {shape}", name, self._sizes(name, shape), parameters
                    )
        return rows

    def _without_duplicates(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """A JSON object as a dictionary, in which a repeated key would silently replace the first one."""
        keys = [key for key, _ in pairs]
        for key in keys:
            self._check(keys.count(key) == 1, f"key {key!r}", f"{keys.count(key)} times", "there once")
        return dict(pairs)

    @property
    def _name(self) -> str:
        return f"{self.path.name} of {self.path.parents[1].name}"

    def _check(self, right: object, what: str, got: object, expected: str) -> None:
        if not right:
            raise LaunchTableError(f"{self._name}: {what} must be {expected}, got {got!r}")

    def _sizes(self, name: str, shape: str) -> tuple[Any, ...]:
        """Dtype and sizes of a shape class."""
        dtypes = {word: dtype for dtype, word in DTYPES.items()}
        word, *rest = shape.split("-")
        expected = self.shape_class(
            name, torch.float32, *[64] * (len(inspect.signature(self.shape_class).parameters) - 2)
        )
        pattern = re.sub(r"\d+", r"\\d+", expected.partition("-")[2])
        self._check(word in dtypes and re.fullmatch(pattern, "-".join(rest)), "shape class", shape, f"like {expected}")
        sizes = dtypes[word], *(int(re.sub(r"\D", "", size)) for size in rest)
        selected = self.shape_class(name, *sizes)  # with padded sizes: another row would never be used
        self._check(selected == shape, "shape class", shape, selected)
        return sizes

    def _check_parameters(self, where: str, name: str, sizes: Any, parameters: Parameters) -> None:
        self._check_keys(where, self.default(name, *sizes), parameters)

    def _check_keys(self, where: str, known: Parameters, parameters: Parameters) -> None:
        self._check(type(parameters) is dict, where, parameters, "an object")
        for key, value in parameters.items():
            self._check(key in known, f"a parameter of {where}", key, f"one of {', '.join(known)}")
            self._check(type(value) is int, f"{key} of {where}", value, "an integer")

    def chosen(self, name: str, architecture: str, dtype: torch.dtype, *sizes: int) -> Parameters:
        """The parameters of a pass: those of an override, else of the table, else the defaults."""
        key = (name, architecture, dtype, *sizes)
        if key not in self._selected:
            row = self.rows.get(architecture, {}).get(name, {}).get(self.shape_class(name, dtype, *sizes), {})
            self._selected[key] = {**self.default(name, dtype, *sizes), **row}
        selected = self._selected[key]
        if name not in self._overrides:
            return selected
        # one override may serve several passes, whose parameters differ
        known = {key: value for each in self.passes for key, value in self.default(each, dtype, *sizes).items()}
        self._check_keys(f"override, {name}", known, self._overrides[name])
        return {**selected, **self._overrides[name]}

    @contextmanager
    def override(self, name: str, parameters: Parameters) -> Iterator[None]:
        """Every launch of pass ``name`` inside the block uses ``parameters``; for tuning and tests."""
        if name not in self.passes:
            raise ValueError(f"override: name must be one of {', '.join(self.passes)}, got {name!r}")
        before = self._overrides.get(name)
        self._overrides[name] = dict(parameters)
        try:
            with guards.suspended():
                yield
        finally:
            del self._overrides[name]
            if before is not None:
                self._overrides[name] = before

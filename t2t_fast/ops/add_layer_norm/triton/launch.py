"""Launch parameters of add_layer_norm's Triton kernels: defaults, and candidates for a measurement."""

from functools import lru_cache
from pathlib import Path

from ..._common import triton_runtime as runtime
from ..._common.launch_table import DTYPES, Table, cut, padded
from ..._common.philox import kernel_drops

LARGEST = 4096
"""Largest width: a program holds whole rows in registers."""

PASSES = ("add_layer_norm", "layer_norm_backward")


def shape_class(name, dtype, width):
    """The key of a row of the launch table: dtype of the normalised tokens, and padded width."""
    return f"{DTYPES[dtype]}-D{padded(width)}"


def candidates(name, present):
    """Parameters that the tuner measures, independent of the ``present`` ones.

    tokens: tokens per tile; warps: warps per program; programs: target per multiprocessor, of backward, where a program
    owns several tiles; a forward program owns one.
    """
    found = [{"tokens": tokens, "warps": warps} for tokens in (1, 2, 4, 8, 16) for warps in (1, 2, 4, 8)]
    if name == "add_layer_norm":
        return found
    return [{**each, "programs": programs} for each in found for programs in (2, 4, 8)]


def default(name, dtype, width):
    """Parameters that compile without spills on every architecture: 16 elements a thread, backward for four tensors."""
    backward, values = name == "layer_norm_backward", padded(width)
    warps = 4 if values <= 2048 else 8
    parameters = {"tokens": max(1, (2048 if backward else 4096) // values), "warps": warps}
    return {**parameters, "programs": 12 // warps} if backward else parameters


TABLE = Table(Path(__file__).with_name("launch.json"), PASSES, shape_class, default, candidates)


def rows_of(x):
    """A (..., D) tensor as (rows, D), in place if its strides allow it, with neighbouring columns."""
    x = x.flatten(0, -2)
    return runtime.readable(x if x.stride(-1) == 1 else x.contiguous())


def strided(x):
    """A tensor as kernel arguments: its rows (:func:`rows_of`), and their stride; ``None`` for ``None``."""
    if x is None:
        return None, 0
    x = rows_of(x)
    return x, x.stride(0)


def masks(seed, first, second, index):
    """The seed and the arguments ``drop`` and ``path`` of ``elementwise.branch_dropped`` for one of two branches.

    first, second: :class:`philox.Drops`.
    """
    drop, path = (kernel_drops(*pair)[index] for pair in zip(first, second, strict=True))
    return None if drop[1] is None and path[1] is None else seed, drop, path


@lru_cache(maxsize=1024)
def _constants(tokens, warps, width):
    return {
        "width": width,
        "TOKENS": tokens,
        "WIDTH": padded(width),
        "EVEN": padded(width) == width,
        "OCTETS": width % 8 == 0,
        "num_warps": warps,
        **runtime.FUSION,
    }


def planned(name, x, dtype):
    """The number of programs, tiles of all and of a program, and the kernels' constants; x: (..., D) with rows."""
    width = x.shape[-1]
    selected = TABLE.chosen(name, runtime.architecture(x.device), dtype, width)
    tokens = selected["tokens"]
    rows = x.numel() // width
    tiles = -(-rows // tokens)
    programs, own = cut(rows, 1, tokens, selected.get("programs", 0) * runtime.multiprocessors(x.device))
    return (programs, own, tiles), _constants(tokens, selected["warps"], width)

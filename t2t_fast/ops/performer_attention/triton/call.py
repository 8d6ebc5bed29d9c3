"""State shared by the passes of one call: sizes, launch parameters, operands with their strides."""

import math
from functools import lru_cache
from typing import NamedTuple

import torch

from ..._common import triton_runtime as runtime
from ..._common.launch_table import cut, padded
from . import launch

HEADROOM = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 6.0}
"""The largest weight of the first tile is 2^-HEADROOM, so that later weights may be larger: float16 ends at 2^16."""


class Plan(NamedTuple):
    """A pass over the tokens of a call: how it is divided, and the constants of its kernel."""

    splits: int
    tiles: int
    chunks: int
    """Chunks of features; 0: a program holds all features at once."""
    constants: dict


@lru_cache(maxsize=1024)
def _plan(selected, dtype, width, features, length, sequences, processors, tf32, backward):
    from triton import language as tl

    parameters = dict(selected)
    whole = padded(width)
    constants = {
        "WIDTH": whole,
        "FEATURES": parameters["features"] or padded(features),
        "TOKENS": parameters["tokens"],
        "EVEN": whole == width,
        "PRECISION": "tf32" if tf32 else "tf32x3",
        "num_warps": parameters["warps"],
        "num_stages": parameters["stages"],
        **runtime.FUSION,
    }
    if parameters["features"]:
        constants["maxnreg"] = 255
    if backward:
        constants["GRADIENT"] = tl.bfloat16 if dtype == torch.bfloat16 else tl.float32
    divided = cut(length, sequences, parameters["tokens"], parameters["programs"] * processors)
    chunks = -(-features // parameters["features"]) if parameters["features"] else 0
    return Plan(divided.splits, divided.tiles, chunks, constants)


class Call:
    """State shared by the passes of one call on sequences of ``shape`` (B, L, E) or (B, heads, L, E) in ``dtype``."""

    def __init__(self, shape, w, dtype):
        self.dtype, self.device, self.w = dtype, w.device, w
        self.outer, self.width, self.features = shape[:-2], shape[-1], w.shape[0]
        self.heads = shape[1] if len(shape) == 4 else 1
        self.sequences = shape[0] * self.heads
        self.directions = (w, *w.stride())

    def plan(self, name, length):
        """The :class:`Plan` of a pass."""
        architecture = runtime.architecture(self.device)
        selected = launch.TABLE.chosen(name, architecture, self.dtype, self.width, self.features)
        tf32 = self.dtype == torch.float32 and runtime.allows_tf32()
        return _plan(
            tuple(selected.items()),
            self.dtype,
            self.width,
            self.features,
            length,
            self.sequences,
            runtime.multiprocessors(self.device),
            tf32,
            name.endswith("backward"),
        )

    def sizes(self, length, tiles):
        return self.heads, length, self.width, self.features, tiles

    def log_eps(self, eps):
        return math.log2(self.features * eps) if eps > 0 else -math.inf

    def key_states(self, *splits):
        """Empty lz and S in float32; one split has no axis."""
        outer = self.outer if splits in ((), (1,)) else (self.sequences, *splits)
        lz = torch.empty((*outer, self.features), dtype=torch.float32, device=self.device)
        return lz, torch.empty((*outer, self.features, self.width), dtype=torch.float32, device=self.device)


def strided(x):
    """A (B, L, E) or (B, heads, L, E) tensor as a kernel argument: the tensor and four strides."""
    strides = x.stride()
    return (x, strides[0], 0, *strides[1:]) if len(strides) == 3 else (x, *strides)


def readable(x):
    """:func:`strided` of an input, or of a copy if its offsets exceed 32 bits."""
    return strided(runtime.readable(x))


def mask(key_mask):
    return None if key_mask is None else (key_mask, *key_mask.stride())

"""Launch parameters of token_mlp's Triton kernels: defaults, and candidates for a measurement."""

import math
from functools import lru_cache
from pathlib import Path

import torch

from ..._common import triton_runtime as runtime
from ..._common.launch_table import DTYPES, Table, cut, padded
from ..._common.philox import kernel_drops

LARGEST = 128
"""Largest number of channels and of hidden units that the kernels support."""

PASSES = ("token_mlp", "token_mlp_backward")


def shape_class(name, dtype, width, hidden):
    """The key of a row of the launch table: dtype and padded sizes."""
    return f"{DTYPES[dtype]}-E{padded(width)}-F{padded(hidden)}"


def candidates(name, present):
    """Parameters that the tuner measures, independent of the ``present`` ones.

    tokens: tokens per tile; warps: warps per program; stages: pipeline stages; programs: target per multiprocessor;
    keep: 1 if a program holds the weights, 0 if it reads them again for every tile; split: 1 if backward is two
    launches; lean: how registers are saved by recomputation (LEAN in backward.py).
    """
    backward = name == "token_mlp_backward"
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

    Weights in float32, and large ones, do not fit into the 99 KiB of shared memory that every card has.
    """
    single, backward = dtype == torch.float32, name == "token_mlp_backward"
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


@lru_cache(maxsize=1024)
def _plan(selected, dtype, width, hidden, sequences, length, processors, tf32):
    """Grid, the kernel arguments after the tensors, the launch parameters, and the kernels' common constants."""
    parameters = dict(selected)
    tokens = parameters["tokens"]
    tiles = -(-length // tokens)
    programs, own = cut(sequences * tiles * tokens, 1, tokens, parameters["programs"] * processors)
    constants = {
        "WIDTH": padded(width),
        "HIDDEN": padded(hidden),
        "TOKENS": tokens,
        "EVEN": padded(width) == width,
        "OCTETS": width % 8 == 0,
        "KEEP": bool(parameters["keep"]),
        "PRECISION": "tf32" if tf32 else "tf32x3",
        "num_warps": parameters["warps"],
        "num_stages": parameters["stages"],
        **runtime.FUSION,
    }
    sizes = length, width, hidden, sequences * tiles, own
    return programs, sizes, parameters, constants


def planned(name, operands, mlp):
    """:func:`_plan` for some operands (:func:`strided`), all of the shape of y.

    Sequences that follow each other without a gap in every operand are one: a tile may then have tokens of two.
    """
    y = operands[0][0]
    sequences, length, width = y.shape
    if all(batch == length * token for _, batch, token, _ in operands):
        sequences, length = 1, sequences * length
    hidden = mlp.fc1_weight.shape[0]
    # forward also depends on the number of tokens
    section = runtime.section(y.device, sequences * length) if name == "token_mlp" else runtime.architecture(y.device)
    selected = TABLE.chosen(name, section, y.dtype, width, hidden)
    tf32 = y.dtype == torch.float32 and runtime.allows_tf32()
    return _plan(
        tuple(selected.items()),
        y.dtype,
        width,
        hidden,
        sequences,
        length,
        runtime.multiprocessors(y.device),
        tf32,
    )


def strided(x):
    """A (..., L, E) tensor as kernel arguments: the tensor, and the strides of sequence, token and column."""
    x = runtime.readable(x if x.ndim == 3 else x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:]))
    return x, *x.stride()


def inner_strides(operands):
    """The strides of token and column of some tensors (:func:`strided`), concatenated."""
    return tuple(stride for _, _, *of_token_and_column in operands for stride in of_token_and_column)


def dropout(options, seed):
    """The seed and the mask parameters of projection and MLP (philox.py), ``None`` without dropout."""
    drops = options.proj_drop, options.mlp_drop
    return seed if max(drops) > 0 else None, *kernel_drops(*drops)

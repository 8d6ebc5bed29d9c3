"""Launch parameters of layer_norm_mlp's Triton kernels: defaults, and candidates for a measurement."""

from functools import lru_cache
from pathlib import Path

import torch

from ..._common import triton_runtime as runtime
from ..._common.launch_table import DTYPES, Table, padded

PASSES = ("fc1_gelu", "fc2_add", "fc2_gelu_backward")


def shape_class(name, dtype, outer, inner):
    """The key of a row of the launch table: dtype, and padded columns and depth of the product."""
    return f"{DTYPES[dtype]}-N{padded(outer)}-K{padded(inner)}"


def candidates(name, present):
    """Parameters that the tuner measures, independent of the ``present`` ones.

    fused: 1 for a product with its epilogue, 0 for PyTorch's product and one pass over it; tokens, columns: of a tile;
    block: depth of a step; warps: warps per program; stages: pipeline stages; parts: 1, 2 or 4, in which the epilogue
    handles a tile, of at least 16 columns, to save registers.
    """
    fused = [
        {"fused": 1, "tokens": tokens, "columns": columns, "block": block, "warps": warps, "stages": stages, "parts": 4}
        for tokens, columns, warps in ((64, 128, 4), (128, 64, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8))
        for block, stages in ((32, 4), (64, 3), (64, 4), (128, 2))
    ]
    passes = [
        {**fused[0], "fused": 0, "tokens": tokens, "columns": columns, "warps": warps}
        for tokens, columns, warps in ((16, 128, 4), (32, 128, 4), (64, 128, 8), (128, 64, 8))
    ]
    return [*fused, *passes]


def default(name, dtype, outer, inner):
    """Parameters that compile without spills for T2T's shapes on every architecture.

    In half types three stages take 96 KiB of shared memory, and on sm_90 an epilogue in four parts at most 128
    registers a thread: two programs share a multiprocessor, and one computes while the other is in its epilogue.
    PyTorch's product in float32 is exact, and takes so long that a pass of its own hardly counts.
    """
    single = dtype == torch.float32
    columns, block = (64, 32) if single else (128, 64)
    return {
        "fused": int(not single),
        "tokens": 128,
        "columns": min(columns, padded(outer)),
        "block": min(block, padded(inner)),
        "warps": 8,
        "stages": 3,
        "parts": 4,
    }


TABLE = Table(Path(__file__).with_name("launch.json"), PASSES, shape_class, default, candidates)


@lru_cache(maxsize=1024)
def _constants(selected, outer, inner, tf32):
    parameters = dict(selected)
    constants = {
        "inner": inner,
        "outer": outer,
        "TOKENS": parameters["tokens"],
        "COLUMNS": parameters["columns"],
        "BLOCK": parameters["block"],
        "OCTETS": outer % 8 == 0,
        "PARTS": min(parameters["parts"], parameters["columns"] // 16),
        "FUSED": bool(parameters["fused"]),
        "PRECISION": "tf32" if tf32 else "tf32x3",
        "num_warps": parameters["warps"],
        "num_stages": parameters["stages"],
        **runtime.FUSION,
    }
    return -(-outer // constants["COLUMNS"]), -(-inner // constants["BLOCK"]), constants


def planned(name, x, outer):
    """Of a product of ``x`` with ``outer`` columns: tiles of columns, steps along the depth, the kernels' constants."""
    inner = x.shape[-1]
    selected = TABLE.chosen(name, runtime.architecture(x.device), x.dtype, outer, inner)
    tf32 = x.dtype == torch.float32 and runtime.allows_tf32()
    return _constants(tuple(selected.items()), outer, inner, tf32)

"""Compile the package's Triton kernels for an architecture without its GPU.

The operators' own launch functions run on meta tensors. Each launch compiles its kernel instead of running it, so
every constant, stride and launch parameter is that of a real call.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import product
from types import SimpleNamespace
from unittest.mock import patch

import torch

from t2t_fast.ops._common import triton_runtime
from t2t_fast.ops._common.pixels import normalisation
from t2t_fast.ops._common.spec import T2T_WINDOWS, square
from t2t_fast.ops.performer_attention.triton import launch
from t2t_fast.ops.performer_attention.triton import operators as attention
from t2t_fast.ops.soft_split_linear.triton import operators as split
from t2t_fast.ops.soft_split_linear.triton.layout import layout
from t2t_fast.ops.soft_split_linear.triton.operands import operands, packed, packed_taps, pixel_columns
from t2t_fast.ops.token_mlp.autograd import MlpParameters, Options
from t2t_fast.ops.token_mlp.triton import operators as token_mlp

from . import machine_code

SHARED_LIMITS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}
"""Maximum shared memory per block in bytes (CUDA C++ programming guide, technical specifications)."""

MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "sm_120": 188}
"""Of an A100, H100, B200 and RTX PRO 6000; they set the number of splits of a call, not how a kernel is compiled."""

FEW_TOKENS = 10_000
"""With this many times as many multiprocessors, every call counts as one of few tokens."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
"""fp32: float32 with PyTorch's default precision; tf32: float32 where PyTorch's setting allows TF32."""

BATCH, LENGTH, IMAGE = 32, 12544, 224
"""Large enough that with any launch parameters a sequence has several splits of several tiles each."""


@dataclass(frozen=True)
class Case:
    """One call to compile, forward and backward: of an operator, with its own sizes (:data:`OPERATORS`).

    ``full``: the attention with a key mask, a gradient for the features, and an extra gradient into v. ``few``: with
    the launch parameters for few tokens.
    """

    architecture: str
    dtype: str
    operator: str = "performer_attention"
    sizes: tuple[int, ...] = (64, 32)
    full: bool = False
    few: bool = False

    def words(self):
        """The case as words."""
        full = " with mask, skip and the gradient of w" if self.full else ""
        few = ", few tokens," if self.few else ""
        return f"{self.operator} in {self.dtype}, {' '.join(map(str, self.sizes))}{full}{few} on {self.architecture}"


def every_shape():
    """E and m of the attention: every padded width, up to 256 features; more features only add chunks."""
    sizes = (16, 32, 64, 128, 256)
    return [(width, features) for width, features in product(sizes, sizes) if width <= launch.LARGEST_WIDTH]


def cases(shapes=None, full=False, few=False, architectures=tuple(SHARED_LIMITS), dtypes=tuple(DTYPES)):
    """The calls to compile: the attention in some shapes (E, m), or T2T's calls of every operator.

    few: only operators with launch parameters of their own for few tokens, with these.
    """
    names = OF_FEW if few else OPERATORS
    calls = [(name, sizes) for name in names for sizes in OPERATORS[name][1]]
    if shapes is not None:
        calls = [("performer_attention", shape) for shape in shapes]
    return [Case(*target, *call, full, few) for call in calls for target in product(architectures, dtypes)]


def reason():
    """Why no kernel can be compiled here, or ``None``."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if triton_runtime.INTERPRETED:
        return "under TRITON_INTERPRET=1 there is nothing to compile"
    if _tool() is None:
        return machine_code.NO_TOOL
    return None


@cache
def _tool():
    return machine_code.find_tool(triton_first=True)


@contextmanager
def _compiling(case):
    """Inside, a launch of one of the operator's kernels compiles it; yields a list of (name, arguments, compiled).

    Launches of other kernels do nothing. The process can launch nothing afterwards.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    number = int(case.architecture.removeprefix("sm_"))
    # Triton caches compiled kernels by device, so each architecture is a device of its own
    device = {"get_current_target": GPUTarget("cuda", number, 32), "get_current_device": number}
    methods = {name: lambda value=value: value for name, value in device.items()}
    driver.set_active(SimpleNamespace(**methods, get_current_stream=lambda device: 0))
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.dtype == "tf32" else "ieee"
    launch, kernels = JITFunction.run, []

    def compile_only(kernel, *arguments, grid, warmup, **named):
        if f".{case.operator}." in kernel.fn.__module__:
            kernels.append((kernel.fn.__name__, named, launch(kernel, *arguments, grid=grid, warmup=True, **named)))

    processors = MULTIPROCESSORS[case.architecture] * (FEW_TOKENS if case.few else 1)
    machine = {"architecture": lambda device: case.architecture, "multiprocessors": lambda device: processors}
    with patch.multiple(triton_runtime, **machine), patch.object(JITFunction, "run", compile_only):
        yield kernels


def _meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def _image(channels, dtype):
    """The image of the first stage, or tokens of the second."""
    side = IMAGE if channels == 3 else IMAGE // 4
    x = _meta(BATCH, channels, side, side, dtype=dtype)
    return x if channels == 3 else x.to(memory_format=torch.channels_last)


def _mlp(width, hidden):
    """The parameters of token_mlp."""
    shapes = (width, width), (width,), (width,), (width,), (hidden, width), (hidden,), (width, hidden), (width,)
    return [_meta(*shape) for shape in shapes]


def _dropout(on):
    """Dropout probability and seed."""
    return (0.1, _meta(dtype=torch.int64)) if on else (0.0, None)


def _performer_attention(case):
    """Forward and backward as under AMP: w stays float32."""
    width, features = case.sizes
    q, k, v, grad, d_q, d_k, d_v = (_meta(BATCH, LENGTH, width, dtype=DTYPES[case.dtype]) for _ in range(7))
    w = _meta(features, width)
    mask, skip = (_meta(BATCH, LENGTH, dtype=torch.bool), v) if case.full else (None, None)
    from t2t_fast.ops.performer_attention.triton.backward import launch_backward

    _, lz, state = attention._forward(q, k, v, w, 1e-8, mask)
    launch_backward(grad, q, k, v, w, 1e-8, mask, lz, state, skip, case.full, d_q, d_k, d_v)


def _soft_split_linear(case):
    """Forward and backward, parameters in float32; without LayerNorm or bytes where its size for that is 0.

    An image of bytes has no gradient.
    """
    channels, outputs, kernel, stride, padding, normed, as_bytes = case.sizes
    window, dtype = square(kernel, stride, padding), DTYPES[case.dtype]
    x = _image(channels, torch.uint8 if as_bytes else dtype)
    pixels = normalisation([0.5] * channels, [0.25] * channels) if as_bytes else ()
    columns = channels * window.taps
    weight, bias, gamma, beta = _meta(outputs, columns), _meta(outputs), _meta(columns), _meta(columns)
    parameters = (weight, bias, gamma, beta, 1e-5) if normed else (weight, bias, None, None, None)
    h, w = window.grid(*x.shape[2:])
    grad = _meta(BATCH, h * w, outputs, dtype=dtype)
    pixels = pixel_columns(pixels, weight, channels, window)
    weights = packed(*parameters, channels, window, dtype)
    y, mean, rstd = split._forward(x, *weights, outputs, parameters[-1], *window, dtype, pixels)
    split._products(x, grad, mean, rstd, bool(normed), *window, pixels)
    if not as_bytes:
        taps = packed_taps(*parameters, channels, dtype)
        split._image_gradient(grad, x, *taps, y, mean, rstd, *window)


def _token_mlp(case):
    """Forward and backward on a view of a packed v, parameters in float32, every gradient; dropout unless 0."""
    width, hidden, dropout = case.sizes
    kqv, y, grad = (_meta(BATCH, LENGTH, n, dtype=DTYPES[case.dtype]) for n in (3 * width, width, width))
    v, mlp = kqv[..., 2 * width :], _mlp(width, hidden)
    drop, seed = _dropout(dropout)
    token_mlp._forward(y, v, seed, [1e-5, drop, drop], mlp)
    token_mlp._backward(grad, y, v, seed, [1e-5, drop, drop], mlp, True)


def _performer_layer(case):
    """Both launches of a layer's forward in training, in T2T's first or second stage; parameters in float32."""
    channels, width, features, hidden, dropout = case.sizes
    window, dtype = T2T_WINDOWS[0 if channels == 3 else 1], DTYPES[case.dtype]
    x, columns = _image(channels, dtype), channels * window.taps
    weight, bias, gamma, beta = _meta(3 * width, columns), _meta(3 * width), _meta(columns), _meta(columns)
    w, mlp = _meta(features, width), MlpParameters(*_mlp(width, hidden))
    drop, seed = _dropout(dropout)
    folded, _ = operands(x, weight, bias, gamma, beta, 1e-5, window, dtype, (), False)
    from t2t_fast.ops.performer_layer.triton.forward import launch_read_out_mlp, launch_split_keys

    kqv, _, _, lz, state = launch_split_keys(x, folded, w, 1e-5, window, dtype, None, bool(dropout))
    launch_read_out_mlp(kqv, w, 1e-8, lz, state, mlp, Options(1e-5, drop, drop), seed)


def _rounds(name, case, arguments):
    """How often all programs together run a kernel's main loop for one tile, and how often the code around it, where
    that runs per tile; ``None``: unknown."""
    if "_chunked" in name:
        return None
    if not name.startswith(("split", "token_scalars")):
        return 1, 0
    channels, outputs, kernel, stride, padding, *_ = case.sizes
    window = square(kernel, stride, padding)
    if case.operator == "performer_layer":
        window, outputs = T2T_WINDOWS[0 if channels == 3 else 1], 3 * outputs
    columns = layout(channels, window).columns
    if name in ("split_linear_kernel", "split_keys_kernel"):
        # a loop over the columns of a tile's windows, once for each group of outputs
        groups = -(-outputs // (arguments.get("NARROW", outputs) * arguments.get("PARTS", 1)))
        return -(-columns // arguments["BLOCK"]) * groups, groups
    parts = -(-outputs // arguments["NARROW"])
    if name == "token_scalars_kernel":
        return parts, 1
    if name == "split_linear_image_kernel":
        # each tap belongs to one of stride^2 phases of pixels
        return (kernel / stride) ** 2 * parts / arguments["PARTS"] * -(-channels // arguments["BLOCK"]), 0
    return -(-columns // (arguments["BLOCK"] * arguments["BLOCKS"])) * -(-parts // arguments["PARTS"]), 0


SPLITS = (3, 192, 7, 4, 2, 1, 0), (3, 192, 7, 4, 2, 1, 1), (64, 192, 3, 2, 1, 1, 0), (64, 384, 3, 2, 1, 0, 0)
LAYERS = (3, 64, 32, 64, 1), (64, 64, 32, 64, 1)

OPERATORS = {
    "performer_attention": (_performer_attention, ((64, 32),)),
    "soft_split_linear": (_soft_split_linear, SPLITS),
    "token_mlp": (_token_mlp, ((64, 64, 1),)),
    "performer_layer": (_performer_layer, LAYERS),
}
"""A call of a case's operator, and T2T-ViT's sizes."""

OF_FEW = ("soft_split_linear", "token_mlp", "performer_layer")
"""Operators with launch parameters of their own for few tokens."""


@dataclass
class Row:
    """A kernel as one case launches it, with ``chunk`` features or columns per step, or all at once (``None``).

    ``instructions_per_token``: at least this many, of all warps of all programs; per pixel for an image's gradient.
    """

    case: Case
    warps: int
    stages: int
    tokens: int | None
    chunk: int | None
    kernel: machine_code.Kernel
    instructions_per_token: float | None

    def faults(self):
        """What is wrong with the kernel, as words."""
        limit, found = SHARED_LIMITS[self.case.architecture], []
        if self.kernel.code.spills or self.kernel.stack:
            found.append(f"spills ({self.kernel.code.spills} instructions, {self.kernel.stack} bytes of stack)")
        if self.kernel.shared > limit:
            found.append(f"{self.kernel.shared} bytes of shared memory where {limit} are allowed")
        return found

    def plain(self):
        """The row as a dictionary; :class:`machine_code.Code` objects are in it."""
        own = {name: value for name, value in vars(self).items() if name not in ("case", "kernel")}
        return {**vars(self.case), **own, **vars(self.kernel), "faults": self.faults()}


def compiled(case) -> list[Row]:
    """Compile and read every kernel of a case."""
    rows = []
    with _compiling(case) as kernels:
        OPERATORS[case.operator][0](case)
    for name, arguments, result in kernels:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(result.asm["cubin"])
            file.flush()
            (kernel,) = machine_code.read(file.name, _tool())
        # the machine code declares less shared memory: the rest is requested at launch
        kernel.name, kernel.architecture, kernel.shared = name, case.architecture, result.metadata.shared
        tokens, warps = arguments.get("TOKENS", arguments.get("PIXELS")), result.metadata.num_warps
        rounds = _rounds(name, case, arguments) if tokens else None
        per_token = rounds and (kernel.once_round * rounds[0] + kernel.around * rounds[1]) * warps / tokens
        chunk = arguments.get("FEATURES", arguments.get("BLOCK")) if tokens else None
        if rounds == (1, 0) and "FEATURES" in arguments and arguments["FEATURES"] >= case.sizes[1]:
            chunk = None
        rows.append(Row(case, warps, result.metadata.num_stages, tokens, chunk, kernel, per_token))
    return rows


def rows(wanted) -> Iterator[list[Row]]:
    """:func:`compiled` of each case, in order, with one process per core."""
    cores = len(os.sched_getaffinity(0))  # Triton runs on Linux
    # spawn: a process that has used CUDA or threads must not fork
    with ProcessPoolExecutor(min(cores, len(wanted)), multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(compiled, wanted)

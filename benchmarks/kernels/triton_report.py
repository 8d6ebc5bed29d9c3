"""What Triton makes of the package's kernels on an architecture that need not be here; no GPU is needed.

The operators' own launch functions run on tensors without memory, and where they launch a kernel, Triton compiles it
and nothing more: every constant, stride and launch parameter is the one of a real call.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import product
from typing import NamedTuple
from unittest.mock import patch

import torch

from t2t_fast.ops._common import triton_runtime
from t2t_fast.ops._common.pixels import normalisation
from t2t_fast.ops._common.spec import T2T_WINDOWS, square
from t2t_fast.ops.performer_attention.triton import launch
from t2t_fast.ops.performer_attention.triton import operators as triton_impl
from t2t_fast.ops.performer_layer.triton import operators as layer_impl
from t2t_fast.ops.soft_split_linear.triton import operators as split_impl
from t2t_fast.ops.soft_split_linear.triton.layout import layout
from t2t_fast.ops.token_mlp.autograd import Options, Tail
from t2t_fast.ops.token_mlp.triton import operators as tail_impl

from . import machine_code

KIB = 1024
SHARED_LIMITS = {"sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "sm_120": 99 * KIB}
"""Bytes of shared memory that a block may ask for (CUDA C++ programming guide, technical specifications)."""

MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "sm_120": 188}
"""Of an A100, H100, B200 and RTX PRO 6000; they decide how a call is cut into splits, not how a kernel is compiled."""

ENOUGH = 10_000
"""With that many times as many, every call has few tokens."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
"""fp32 is float32 as PyTorch has it by default, tf32 is float32 where PyTorch's setting allows TF32."""

IMAGE = 224
BATCH, LENGTH = 32, 12544
"""So large that with any launch parameters a sequence is cut into several splits, each of several tiles."""


@dataclass(frozen=True)
class Case:
    """One call to compile, forward and backward: of an operator, with its own sizes (:data:`OPERATORS`).

    ``full``: the attention with a key mask, with a gradient for the features, and with one that flows into v from
    elsewhere. ``few``: with the launch parameters for few tokens.
    """

    architecture: str
    dtype: str
    operator: str = "performer_attention"
    sizes: tuple[int, ...] = (64, 32)
    full: bool = False
    few: bool = False

    def words(self):
        """The case as words."""
        names = OPERATORS[self.operator].names
        sizes = " ".join(f"{name} {size}" for name, size in zip(names, self.sizes, strict=True))
        full = " with mask, skip and the gradient of w" if self.full else ""
        few = ", few tokens," if self.few else ""
        return f"{self.operator} in {self.dtype}, {sizes}{full}{few} on {self.architecture}"


def every_shape():
    """E and m of the attention: every padded width with up to 256 features; of more, the kernels take more chunks."""
    widths = [size for size in (2**power for power in range(4, 20)) if size <= launch.LARGEST_WIDTH]
    return list(product(widths, (16, 32, 64, 128, 256)))


def cases(shapes=None, full=False, few=False, architectures=tuple(SHARED_LIMITS)):
    """Calls in every dtype on some architectures: the attention in some shapes (E, m), or T2T's of every operator.

    few: those of operators that have launch parameters of their own for few tokens, with these.
    """
    if shapes is None:
        named = {name: OPERATORS[name] for name in (OF_FEW if few else OPERATORS)}
        calls = [(name, sizes) for name, operator in named.items() for sizes in operator.usual]
    else:
        calls = [("performer_attention", shape) for shape in shapes]
    return [Case(*names, *call, full, few) for call in calls for names in product(architectures, DTYPES)]


def reason():
    """Why no kernel can be compiled here, or ``None``."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if triton_runtime.INTERPRETED:
        return "under TRITON_INTERPRET=1 there is nothing to compile"
    if _tool() is None:
        return f"{machine_code.TOOL} is neither in Triton's package nor on PATH nor in a CUDA toolkit"
    return None


@cache
def _tool():
    return machine_code.find_tool(triton_first=True)


class _Driver:
    """What Triton asks of a driver in order to compile; there is no device behind it."""

    def __init__(self, architecture):
        from triton.backends.compiler import GPUTarget

        self.number = int(architecture.removeprefix("sm_"))
        self.target = GPUTarget("cuda", self.number, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        """Triton keeps what it compiled by device: one for each architecture."""
        return self.number

    def get_current_stream(self, device):
        return 0


@contextmanager
def _products(precision):
    """What products of float32 matrices may be rounded to."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


@contextmanager
def _compiling(module, case, *others, unused=()):
    """Inside, a launch of any ``*_kernel`` of some modules compiles it; yields a list of (name, arguments, compiled).

    Of ``x_kernel`` and ``x_chunked_kernel`` a call launches one; ``unused``: kernels that this call need not launch.
    The process can launch nothing afterwards.
    """
    from triton.runtime import driver

    driver.set_active(_Driver(case.architecture))
    kernels = {
        name: kernel for each in (module, *others) for name, kernel in vars(each).items() if name.endswith("_kernel")
    }
    found = []

    def instead_of(name, run):
        def compile_only(*arguments, grid, warmup, **named):
            found.append((name, named, run(*arguments, grid=grid, warmup=True, **named)))

        return compile_only

    machine = {
        "architecture": lambda device: case.architecture,
        "multiprocessors": lambda device: MULTIPROCESSORS[case.architecture] * (ENOUGH if case.few else 1),
    }
    with ExitStack() as stack:
        stack.enter_context(_products("tf32" if case.dtype == "tf32" else "ieee"))
        stack.enter_context(patch.multiple(triton_runtime, **machine))
        for name, kernel in kernels.items():
            stack.enter_context(patch.object(kernel, "run", instead_of(name, kernel.run)))
        yield found
    passes = {name.replace("_chunked", "") for name in kernels} - set(unused)
    if missing := passes - {name.replace("_chunked", "") for name, *_ in found}:
        raise RuntimeError(f"{module.__name__}: a call with {case.words()} did not launch {', '.join(sorted(missing))}")


def _performer_attention(case):
    """A call forward and backward on tensors without memory, as AMP makes it: w stays float32."""
    from t2t_fast.ops.performer_attention.triton import backward as kernels_backward
    from t2t_fast.ops.performer_attention.triton import chunked as kernels_chunked
    from t2t_fast.ops.performer_attention.triton import forward as kernels

    def empty(*shape, dtype=DTYPES[case.dtype]):
        return torch.empty(shape, dtype=dtype, device="meta")

    width, features = case.sizes
    q, k, v, grad, d_q, d_k, d_v = (empty(BATCH, LENGTH, width) for _ in range(7))
    w = empty(features, width, dtype=torch.float32)
    mask = empty(BATCH, LENGTH, dtype=torch.bool) if case.full else None
    skip = v if case.full else None
    with _compiling(kernels, case, kernels_backward, kernels_chunked) as found:
        _, lz, state = triton_impl._forward(q, k, v, w, 1e-8, mask)
        triton_impl.gradients(grad, q, k, v, w, 1e-8, mask, lz, state, skip, case.full, d_q, d_k, d_v)
    return found


def _soft_split_linear(case):
    """A call forward and backward, parameters in float32; without LayerNorm or bytes where its size for that is 0.

    The gradient of an image of bytes is none.
    """
    from t2t_fast.ops.soft_split_linear.triton import forward as kernels
    from t2t_fast.ops.soft_split_linear.triton import image_gradient as kernels_image
    from t2t_fast.ops.soft_split_linear.triton import weight_gradient as kernels_weight

    channels, outputs, kernel, stride, padding, normed, as_bytes = case.sizes
    window = square(kernel, stride, padding)
    side = IMAGE if channels == 3 else IMAGE // 4
    dtype = DTYPES[case.dtype]
    x = torch.empty(BATCH, channels, side, side, dtype=torch.uint8 if as_bytes else dtype, device="meta")
    pixels = normalisation([0.5] * channels, [0.25] * channels) if as_bytes else ()
    if channels > 3:  # tokens
        x = x.to(memory_format=torch.channels_last)
    columns = channels * window.taps
    weight, bias, gamma, beta = (
        torch.empty(shape, device="meta") for shape in ((outputs, columns), outputs, columns, columns)
    )
    parameters = (weight, bias, gamma, beta, 1e-5) if normed else (weight, bias, None, None, None)
    h, w = window.grid(side, side)
    grad = torch.empty(BATCH, h * w, outputs, dtype=dtype, device="meta")
    unused = [] if normed and not as_bytes else ["token_scalars_kernel"]
    if as_bytes:
        unused.append("split_linear_image_kernel")
    if channels % 16 == 0:
        unused.append("cells_kernel")
    rest = channels, window, dtype
    pixels = split_impl.pixel_columns(pixels, weight, channels, window)
    with _compiling(kernels, case, kernels_image, kernels_weight, unused=unused) as found:
        y, mean, rstd = split_impl._forward(
            x, *split_impl.packed(*parameters, *rest), outputs, parameters[-1], *window, dtype, pixels
        )
        split_impl._products(x, grad, mean, rstd, bool(normed), *window, pixels)
        if not as_bytes:
            taps = split_impl.packed_taps(*parameters, channels, dtype)
            split_impl._image_gradient(grad, x, *taps, y, mean, rstd, *window)
    return found


def _token_mlp(case):
    """A call forward and backward on a view of a packed v, parameters in float32, every gradient; dropout unless 0."""
    from t2t_fast.ops.token_mlp.triton import backward as kernels_backward
    from t2t_fast.ops.token_mlp.triton import forward as kernels

    width, hidden, dropout = case.sizes
    kqv, y, grad = (
        torch.empty(BATCH, LENGTH, n, dtype=DTYPES[case.dtype], device="meta") for n in (3 * width, width, width)
    )
    v = kqv[..., 2 * width :]
    shapes = ((width, width), width, width, width, (hidden, width), hidden, (width, hidden), width)
    tail = [torch.empty(shape, device="meta") for shape in shapes]
    drop = 0.1 if dropout else 0.0
    seed = torch.empty((), dtype=torch.int64, device="meta") if dropout else None
    with _compiling(kernels, case, kernels_backward) as found:
        tail_impl._forward(y, v, seed, [1e-5, drop, drop], tail)
        tail_impl._backward(grad, y, v, seed, [1e-5, drop, drop], tail, True)
    return found


def _performer_layer(case):
    """Both launches of a layer forward, in training, on T2T's first stage or its second; parameters in float32."""
    from t2t_fast.ops.performer_attention.triton import forward as attention_kernels
    from t2t_fast.ops.performer_layer.triton import forward as kernels
    from t2t_fast.ops.soft_split_linear.triton import forward as split_kernels

    channels, width, features, hidden, dropout = case.sizes
    window = T2T_WINDOWS[0 if channels == 3 else 1]
    side, dtype = IMAGE if channels == 3 else IMAGE // 4, DTYPES[case.dtype]
    x = torch.empty(BATCH, channels, side, side, dtype=dtype, device="meta")
    if channels > 3:  # tokens
        x = x.to(memory_format=torch.channels_last)
    columns = channels * window.taps
    weight, bias, gamma, beta, w = (
        torch.empty(shape, device="meta")
        for shape in ((3 * width, columns), 3 * width, columns, columns, (features, width))
    )
    shapes = ((width, width), width, width, width, (hidden, width), hidden, (width, hidden), width)
    tail = Tail(*(torch.empty(shape, device="meta") for shape in shapes))
    drop = 0.1 if dropout else 0.0
    seed = torch.empty((), dtype=torch.int64, device="meta") if dropout else None
    # of the single operators, their own cases tell
    others = attention_kernels, split_kernels
    unused = [name for each in others for name in vars(each) if name.endswith("_kernel")]
    with _compiling(kernels, case, *others, unused=unused) as found:
        folded, _ = split_impl.operands(x, weight, bias, gamma, beta, 1e-5, window, dtype, (), False)
        kqv, _, _, lz, state = layer_impl.split_keys(x, folded, w, 1e-5, window, dtype, None, bool(dropout))
        layer_impl.read_out_tail(kqv, w, 1e-8, lz, state, tail, Options(1e-5, drop, drop), seed)
    return [each for each in found if each[0] not in unused]


def _attention_rounds(name, sizes, arguments):
    return None if "_chunked" in name else (1, 0)


def _window_rounds(channels, window, outputs, arguments):
    """A loop over the columns of a tile's windows, once for each group of outputs."""
    groups = -(-outputs // (arguments.get("NARROW", outputs) * arguments.get("PARTS", 1)))
    return -(-layout(channels, window).columns // arguments["BLOCK"]) * groups, groups


def _split_rounds(name, sizes, arguments):
    channels, outputs, kernel, stride, padding, *_ = sizes
    window = square(kernel, stride, padding)
    if name == "split_linear_kernel":
        return _window_rounds(channels, window, outputs, arguments)
    parts = -(-outputs // arguments["NARROW"])
    if name == "token_scalars_kernel":
        return parts, 1
    if name == "split_linear_image_kernel":
        # each tap meets one of stride^2 phases of pixels
        taps = (kernel / stride) ** 2
        return taps * parts / arguments["PARTS"] * -(-channels // arguments["BLOCK"]), 0
    blocks = -(-layout(channels, window).columns // (arguments["BLOCK"] * arguments["BLOCKS"]))
    return blocks * -(-parts // arguments["PARTS"]), 0


def _layer_rounds(name, sizes, arguments):
    if name != "split_keys_kernel":
        return 1, 0
    channels, width, *_ = sizes
    return _window_rounds(channels, T2T_WINDOWS[0 if channels == 3 else 1], 3 * width, arguments)


class Operator(NamedTuple):
    """How a case is compiled, what its sizes are called, and those of T2T-ViT.

    ``rounds``, of a kernel's name, the sizes and its arguments: how often all programs together run the kernel's main
    loop for a tile, and how often what is around it, where that is done for each tile; ``None``: unknown.
    """

    compile: Callable
    names: tuple[str, ...]
    usual: tuple[tuple[int, ...], ...]
    rounds: Callable


OPERATORS = {
    "performer_attention": Operator(_performer_attention, ("E", "m"), ((64, 32),), _attention_rounds),
    "soft_split_linear": Operator(
        _soft_split_linear,
        ("C", "O", "k", "s", "p", "LayerNorm", "bytes"),
        ((3, 192, 7, 4, 2, 1, 0), (3, 192, 7, 4, 2, 1, 1), (64, 192, 3, 2, 1, 1, 0), (64, 384, 3, 2, 1, 0, 0)),
        _split_rounds,
    ),
    "token_mlp": Operator(_token_mlp, ("E", "F", "dropout"), ((64, 64, 1),), lambda *_: (1, 0)),
    "performer_layer": Operator(
        _performer_layer,
        ("C", "E", "m", "F", "dropout"),
        ((3, 64, 32, 64, 1), (64, 64, 32, 64, 1)),
        _layer_rounds,
    ),
}


OF_FEW = ("soft_split_linear", "token_mlp", "performer_layer")
"""Operators with launch parameters of their own for few tokens."""


@dataclass
class Row:
    """A kernel as one case launches it, by ``chunk`` features or columns at a time or all at once (``None``).

    ``instructions_per_token``: of all warps of all programs, at least; for an image's gradient, per pixel.
    """

    case: Case
    warps: int
    stages: int
    tokens: int | None
    chunk: int | None
    kernel: machine_code.Kernel
    instructions_per_token: float | None

    def faults(self):
        """What should not be, as words."""
        limit = SHARED_LIMITS[self.case.architecture]
        found = []
        if self.kernel.code.spills or self.kernel.stack:
            found.append(f"spills ({self.kernel.code.spills} instructions, {self.kernel.stack} bytes of stack)")
        if self.kernel.shared > limit:
            found.append(f"{self.kernel.shared} bytes of shared memory where {limit} are allowed")
        return found

    def plain(self):
        """The row as dictionaries, for JSON."""
        found = {**vars(self.case), "warps": self.warps, "stages": self.stages}
        found |= {"tokens": self.tokens, "chunk": self.chunk, "instructions_per_token": self.instructions_per_token}
        return found | self.kernel.plain() | {"faults": self.faults()}


def compiled(case) -> list[Row]:
    """Every kernel of a call in a case, compiled and read.

    Raises:
        RuntimeError: the call did not launch every kernel of its operator.
    """
    rows = []
    for name, arguments, result in OPERATORS[case.operator].compile(case):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(result.asm["cubin"])
            file.flush()
            (kernel,) = machine_code.read(file.name, _tool())
        # what the machine code declares is less: the rest is asked for at the launch
        kernel.name, kernel.architecture, kernel.shared = name, case.architecture, result.metadata.shared
        tokens, warps = arguments.get("TOKENS", arguments.get("PIXELS")), result.metadata.num_warps
        rounds = OPERATORS[case.operator].rounds(name, case.sizes, arguments) if tokens else None
        per_token = None
        if rounds is not None:
            per_token = (kernel.once_round * rounds[0] + kernel.around * rounds[1]) * warps / tokens
        chunk = arguments.get("FEATURES", arguments.get("BLOCK")) if tokens else None
        if rounds == (1, 0) and "FEATURES" in arguments and arguments["FEATURES"] >= case.sizes[1]:
            chunk = None
        rows.append(Row(case, warps, result.metadata.num_stages, tokens, chunk, kernel, per_token))
    return rows


def rows(wanted) -> Iterator[list[Row]]:
    """:func:`compiled` of each case, in order, by as many processes as there are cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # not by fork: a process that has used CUDA or threads must not be copied
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(cores, len(wanted)), mp_context=context) as pool:
        yield from pool.map(compiled, wanted)

"""Compile the package's Triton kernels for an architecture without its GPU.

The operators' own launch functions run on meta tensors. Each launch compiles its kernel instead of running it, so
every constant, stride and launch parameter is that of a real call. Parameters are float32, as under AMP.
"""

import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from types import SimpleNamespace
from unittest.mock import patch

import torch

from t2t_fast.ops._common import triton_runtime
from t2t_fast.ops._common.pixels import normalisation
from t2t_fast.ops._common.spec import T2T_WINDOWS, square
from t2t_fast.ops.add_layer_norm.triton import operators as norm
from t2t_fast.ops.layer_norm_mlp.triton import operators as block_mlp
from t2t_fast.ops.performer_attention.triton import operators as attention
from t2t_fast.ops.soft_split_linear.triton import operators as split
from t2t_fast.ops.soft_split_linear.triton.layout import layout, operand_shapes
from t2t_fast.ops.soft_split_linear.triton.operands import folded_of
from t2t_fast.ops.token_mlp.autograd import MlpParameters, Options
from t2t_fast.ops.token_mlp.triton import operators as token_mlp

from . import machine_code

SHARED_LIMITS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}
"""Maximum shared memory per block in bytes (CUDA C++ programming guide, technical specifications)."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
"""fp32: float32 with PyTorch's default precision; tf32: float32 where PyTorch's setting allows TF32."""

BATCH, LENGTH, IMAGE = 32, 12544, 224
"""Large enough that a sequence has several splits of several tiles each with any launch parameters."""

TOKENS = 197
"""Tokens of a sample in T2T-ViT's transformer blocks."""

EVERY_SHAPE = tuple(product((16, 32, 64, 128, 256), repeat=2))
"""E and m of the attention: every padded E, and m up to 256; more features only add chunks."""

FULL = (64, 32, 1)  # T2T's attention with a key mask, a gradient of w, and a gradient that reaches v by another path


@dataclass(frozen=True)
class Case:
    """A call to compile, forward and backward: an operator and its sizes (:data:`OPERATORS`).

    ``few``: with the launch parameters for few tokens.
    """

    architecture: str
    dtype: str
    operator: str = "performer_attention"
    sizes: tuple[int, ...] = (64, 32)
    few: bool = False


def cases(shapes=None, few=False, architectures=tuple(SHARED_LIMITS), dtypes=tuple(DTYPES)):
    """The calls to compile: T2T's calls of every operator, or the attention in some shapes (E, m).

    few: with the launch parameters for few tokens, and without the attention, which has none.
    """
    calls = [(name, sizes) for name, (_, all_sizes) in OPERATORS.items() for sizes in all_sizes]
    if shapes is not None:
        calls = [("performer_attention", tuple(shape)) for shape in shapes]
    elif few:
        calls = [call for call in calls if call[0] != "performer_attention"]
    return [Case(*target, *call, few) for call in calls for target in product(architectures, dtypes)]


def reason():
    """Why no kernel can be compiled here, or ``None``."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if triton_runtime.INTERPRETED:
        return "under TRITON_INTERPRET=1 there is nothing to compile"
    return None if machine_code.find_tool(triton_first=True) else machine_code.NO_TOOL


@contextmanager
def _compiling(case):
    """Inside, tensors are meta tensors, and a launch compiles its kernel if it is one of the operator's own.

    Yields a list of (name, arguments, compiled kernel). The process can launch no kernel afterwards.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    target = GPUTarget("cuda", int(case.architecture.removeprefix("sm_")), 32)
    # Triton caches compiled kernels by device, so each architecture is a device of its own
    active = SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: target.arch)
    active.get_current_stream = lambda device: 0
    driver.set_active(active)
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.dtype == "tf32" else "ieee"
    launch, kernels = JITFunction.run, []

    def compile_only(kernel, *arguments, grid, warmup, **named):
        if f".{case.operator}." in kernel.fn.__module__:
            kernels.append((kernel.fn.__name__, named, launch(kernel, *arguments, grid=grid, warmup=True, **named)))

    # decides how many splits a call has and whether its tokens are few, not how a kernel is compiled; 132: an H100's
    processors = 10**6 if case.few else 132
    machine = {"architecture": lambda device: case.architecture, "multiprocessors": lambda device: processors}
    tensors = torch.device("meta")
    with tensors, patch.multiple(triton_runtime, **machine), patch.object(JITFunction, "run", compile_only):
        yield kernels


def _mlp(width, hidden):
    """The parameters of token_mlp."""
    shapes = (width, width), width, width, width, (hidden, width), hidden, (width, hidden), width
    return [torch.empty(shape) for shape in shapes]


def _image(channels, dtype):
    """The image of the first stage, or tokens of the second."""
    side, form = (IMAGE, torch.contiguous_format) if channels == 3 else (IMAGE // 4, torch.channels_last)
    return torch.empty(BATCH, channels, side, side, dtype=dtype, memory_format=form)


def _folded(weight, bias, gamma, beta, channels, window, dtype, pixels):
    """The operands of a forward kernel, and the columns of an image of bytes."""
    norm = gamma is not None
    shapes = operand_shapes(*weight.shape, norm, channels, window, bool(pixels), False)
    found = split._fold(weight, bias, gamma, beta, norm, channels, *window, dtype, pixels, False)
    return folded_of(shapes.filled(found))


def _performer_attention(case):
    """Forward and backward; with a third size (:data:`FULL`) also a key mask, d_w, and a gradient to add to d_v."""
    from t2t_fast.ops.performer_attention.triton.backward import launch_backward

    width, features, *full = case.sizes
    q, k, v, grad, skip, *found = (torch.empty(BATCH, LENGTH, width, dtype=DTYPES[case.dtype]) for _ in range(8))
    w, mask = torch.empty(features, width), torch.empty(BATCH, LENGTH, dtype=torch.bool) if full else None
    _, lz, state = attention._forward(q, k, v, w, 1e-8, mask)
    launch_backward(grad, q, k, v, w, 1e-8, mask, lz, state, skip if full else None, bool(full), *found)


def _soft_split_linear(case):
    """Forward and backward, without LayerNorm or bytes where its size for that is 0; bytes have no gradient."""
    channels, outputs, kernel, stride, padding, normed, as_bytes = case.sizes
    window, dtype = square(kernel, stride, padding), DTYPES[case.dtype]
    x = _image(channels, torch.uint8 if as_bytes else dtype)
    columns = channels * window.taps
    weight, bias, gamma, beta = map(torch.empty, ((outputs, columns), outputs, columns, columns))
    if not normed:
        gamma = beta = None
    pixels = normalisation([0.5] * channels, [0.25] * channels) if as_bytes else ()
    h, w = window.grid(*x.shape[2:])
    grad = torch.empty(BATCH, h * w, outputs, dtype=dtype)
    folded, pixels = _folded(weight, bias, gamma, beta, channels, window, dtype, pixels)
    y, mean, rstd = split._forward(x, *folded, outputs, 1e-5 if normed else None, *window, dtype, pixels)
    needed = [True, True, bool(normed), bool(normed)]
    products = x, grad, mean, rstd, bool(normed), *window, pixels
    split._products(*products, weight, gamma, beta, torch.float32, needed)
    if not as_bytes:
        taps, offset, *_ = split._fold(weight, bias, gamma, beta, bool(normed), channels, *window, dtype, (), True)
        split._image_gradient(grad, x, taps, offset if normed else None, y, mean, rstd, *window)


def _token_mlp(case):
    """Forward and backward on a view of a packed v, with every gradient; ``dropout`` is 0 or 1."""
    width, hidden, dropout = case.sizes
    kqv, y, grad = (torch.empty(BATCH, LENGTH, n, dtype=DTYPES[case.dtype]) for n in (3 * width, width, width))
    v, mlp = kqv[..., 2 * width :], _mlp(width, hidden)
    drop, seed = 0.1 * dropout, torch.empty((), dtype=torch.int64)
    token_mlp._forward(y, v, seed, [1e-5, drop, drop], mlp)
    token_mlp._backward(grad, y, v, seed, [1e-5, drop, drop], mlp, True)


def _performer_layer(case):
    """Both launches of a layer's forward in training, in T2T's first or second stage."""
    from t2t_fast.ops.performer_layer.triton.forward import launch_read_out_mlp, launch_split_keys

    channels, width, features, hidden, dropout = case.sizes
    window, dtype = T2T_WINDOWS[0 if channels == 3 else 1], DTYPES[case.dtype]
    x, columns = _image(channels, dtype), channels * window.taps
    weight, bias, gamma, beta = map(torch.empty, ((3 * width, columns), 3 * width, columns, columns))
    w, mlp = torch.empty(features, width), MlpParameters(*_mlp(width, hidden))
    drop, seed = 0.1 * dropout, torch.empty((), dtype=torch.int64)
    folded, _ = _folded(weight, bias, gamma, beta, channels, window, dtype, ())
    kqv, lz, state, *_ = launch_split_keys(x, folded, w, 1e-5, window, dtype, None, bool(dropout))
    launch_read_out_mlp(kqv, w, 1e-8, lz, state, mlp, Options(1e-5, drop, drop), seed)


def _block(case):
    """The kernels of a transformer block in training, with a float32 stream, as under autocast; ``dropout``: 0 or 1."""
    width, hidden, dropout = case.sizes
    dtype, drops, seed = DTYPES[case.dtype], [0.1 * dropout, 0.1], torch.empty((), dtype=torch.int64)
    branch, h = (torch.empty(BATCH, TOKENS, size, dtype=dtype) for size in (width, hidden))
    gamma, bias, skip = torch.empty(width), torch.empty(hidden), torch.empty(BATCH, TOKENS, width)
    fc1, fc2 = (torch.empty(shape, dtype=dtype) for shape in ((hidden, width), (width, hidden)))
    t, n = norm._forward(skip, branch, gamma, gamma, 1e-5, dtype, seed, drops)
    norm._backward(branch, skip, t, gamma, gamma, 1e-5, dtype, seed, drops, True)
    norm._branch_gradient(skip, dtype, seed, 2 * drops)
    block_mlp._fc1_gelu(n, fc1, bias, seed, drops[0], True)
    block_mlp._fc2_add(h, fc2, gamma, t, seed, 2 * drops)
    block_mlp._fc2_gelu_backward(n, fc2, h, seed, drops[0])


def _rounds(name, case, arguments):
    """How often a kernel's main loop runs for one tile, and how often the code around it where that runs per tile.

    Counts all programs together; ``None``: unknown.
    """
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
BLOCKS = (384, 1152, 0), (512, 1536, 1)
OPERATORS = {
    "performer_attention": (_performer_attention, ((64, 32),)),
    "soft_split_linear": (_soft_split_linear, SPLITS),
    "token_mlp": (_token_mlp, ((64, 64, 1),)),
    "add_layer_norm": (_block, BLOCKS),
    "layer_norm_mlp": (_block, BLOCKS),
    "performer_layer": (_performer_layer, ((3, 64, 32, 64, 1), (64, 64, 32, 64, 1))),
}
"""Name -> (the call of a :class:`Case`, the sizes of T2T-ViT's calls)."""


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
        """What is wrong with the kernel, as text."""
        kernel, limit, found = self.kernel, SHARED_LIMITS[self.case.architecture], []
        if kernel.code.spills or kernel.stack:
            found.append(f"spills ({kernel.code.spills} instructions, {kernel.stack} bytes of stack)")
        if kernel.shared > limit:
            found.append(f"{kernel.shared} bytes of shared memory where {limit} are allowed")
        return found

    def plain(self):
        """The row as a dictionary; :class:`machine_code.Code` objects are in it."""
        own = {name: value for name, value in vars(self).items() if name not in ("case", "kernel")}
        return {**vars(self.case), **own, **vars(self.kernel), "faults": self.faults()}


def compiled(case):
    """Compile every kernel of a case and read its machine code. Returns a list of :class:`Row`."""
    rows = []
    with _compiling(case) as kernels:
        OPERATORS[case.operator][0](case)
    for name, arguments, result in kernels:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(result.asm["cubin"])
            file.flush()
            (kernel,) = machine_code.read(file.name, machine_code.find_tool(triton_first=True))
        # the machine code declares less shared memory: the rest is requested at launch
        kernel.name, kernel.architecture, kernel.shared = name, case.architecture, result.metadata.shared
        tokens, warps = arguments.get("TOKENS", arguments.get("PIXELS")), result.metadata.num_warps
        rounds = _rounds(name, case, arguments) if tokens else None
        per_token = rounds and (kernel.once_round * rounds[0] + kernel.around * rounds[1]) * warps / tokens
        whole = rounds == (1, 0) and arguments.get("FEATURES", 0) >= case.sizes[1]
        chunk = arguments.get("FEATURES", arguments.get("BLOCK")) if tokens and not whole else None
        rows.append(Row(case, warps, result.metadata.num_stages, tokens, chunk, kernel, per_token))
    return rows

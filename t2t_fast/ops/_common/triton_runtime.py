"""Runtime shared by the operators with Triton kernels: support checks, registration, and the self-test at the first
call.

Triton is imported when a kernel is first launched, so that importing this package stays fast. With
``TRITON_INTERPRET=1`` the kernels run on the CPU in Triton's interpreter; this is for tests.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ... import config
from ...backends import Request
from ...errors import LaunchTableError
from . import replay
from .library import AUTOCAST_DEVICES, accumulation_dtype, opaque_obstacle

INTERPRETED = config.triton_interpreted()
"""Whether kernels run on the CPU; Triton decides this when they are defined, so it is constant."""

_MISSING = None if find_spec("triton") is not None else "Triton is not installed (pip install triton)"
_DEVICES = ("cpu",) if INTERPRETED else ("cuda",)
_library = torch.library.Library("t2t_fast_triton", "DEF")
operators = SimpleNamespace()
"""The operators ``torch.ops.t2t_fast_triton`` as functions, which a recorder (``replay.py``) looks into."""
_trials: dict[tuple, str | None] = {}
_trying = threading.RLock()

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Supported dtypes of the kernels' operands."""

FUSION = {"enable_fp_fusion": True}
"""Fused multiply-add, independent of the default of the Triton version."""

FEW = 128
"""Largest number of tokens per multiprocessor of a call with few tokens: larger tiles would leave some idle."""

LARGEST_TILE = 256
OFFSET_LIMIT = 2**31
"""Offsets inside a tile of at most LARGEST_TILE tokens must be below this limit, to fit into 32 bits."""

TRIAL_TOKENS = 40 if INTERPRETED else 150
"""Tokens of a sequence in a self-test, more than a default tile; fewer for the slow interpreter."""

ALLOWED = {torch.float32: 2e-5, "tf32": 2e-2, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Allowed relative errors in a self-test: several times the errors in the tests, far below those of a wrong kernel."""


def operand_dtype(request: Request, name: str) -> torch.dtype:
    """The dtype of one of a call's operands: ``request.sizes[name]`` if the caller gives it.

    The default is float32 under AMP, which leaves images, parameters and ``w`` in float32, else the call's dtype.
    """
    kind = request.device
    mixed = kind in AUTOCAST_DEVICES and torch.is_autocast_enabled(kind)
    return request.sizes.get(name) or (torch.float32 if mixed else request.dtype)


def reason(request: Request) -> str | None:
    """Why no Triton kernel can run ``request``, or ``None``."""
    if _MISSING is not None:
        return _MISSING
    if request.device not in _DEVICES:
        where = "on the CPU under TRITON_INTERPRET=1 only" if INTERPRETED else "on CUDA devices"
        return f"Triton kernels run {where}"
    return opaque_obstacle(request, DTYPES, "Triton")


def passed_over(request: Request) -> str | None:
    """Why ``auto`` passes over the kernels although they can run, or ``None``."""
    return "Triton's interpreter is for tests" if request.device == "cpu" else None


def operator(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: registers a function as ``torch.ops.t2t_fast_triton.<signature>``, opaque to ``torch.compile``."""
    name = signature.partition("(")[0]
    _library.define(signature, tags=(torch.Tag.needs_fixed_stride_order,))

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with torch.cuda.device_of(next(t for t in arguments if isinstance(t, torch.Tensor))):
                return function(*arguments)

        _library.impl(name, function if INTERPRETED else run, "CPU" if INTERPRETED else "CUDA")
        registered = getattr(torch.ops.t2t_fast_triton, name).default

        @wraps(function)
        def call(*arguments: Any) -> Any:
            if replay.recording() is None:
                return registered(*arguments)
            return function(*arguments) if INTERPRETED else run(*arguments)

        setattr(operators, name, call)
        return function

    return register


def fake(name: str) -> Callable[..., Any]:
    """Decorator: registers the fake implementation of the operator ``name``."""
    return torch.library.register_fake(f"t2t_fast_triton::{name}", lib=_library)


@cache
def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors; a small number in the interpreter."""
    return 4 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


@cache
def architecture(device: torch.device) -> str:
    """The architecture, such as ``"sm_90"``; ``"cpu"`` in the interpreter."""
    if INTERPRETED:
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


_thread = threading.local()


@contextmanager
def crowded() -> Iterator[None]:
    """Inside the block, calls of this thread use the launch parameters for many tokens."""
    before, _thread.crowded = getattr(_thread, "crowded", False), True
    try:
        yield
    finally:
        _thread.crowded = before


def section(device: torch.device, tokens: int) -> str:
    """The section of a launch table for a call with ``tokens`` tokens: the architecture, such as ``"sm_90"``.

    With few tokens (:data:`FEW`), ``"sm_90-few"``.
    """
    name = architecture(device)
    few = not (getattr(_thread, "crowded", False) or INTERPRETED) and tokens <= FEW * multiprocessors(device)
    return f"{name}-few" if few else name


def allows_tf32() -> bool:
    """Whether torch's setting allows TF32 for float32 matrix products."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def fixed(size: int) -> int:
    """A size as a constant: ``torch.compile`` recompiles for another one (a range cannot be symbolic)."""
    return len(range(size))


def readable(x: torch.Tensor) -> torch.Tensor:
    """A (..., L, E) tensor, or a copy if an offset inside a tile would not fit into 32 bits."""
    token, column = x.stride()[-2:]
    return x if LARGEST_TILE * token + x.shape[-1] * column < OFFSET_LIMIT else x.contiguous()


def trial(
    name: str, run: Callable[..., Any], expected: Callable[..., Any], index: int | None, dtype: torch.dtype, *call: Any
) -> str | None:
    """The self-test: why a kernel cannot be used on a device, or ``None``. Runs once for each kind of call.

    Args:
        name: the operator's name, for the warning.
        run, expected: functions of (device, dtype, *call) that return tensors, with the kernels and without. They must
            agree within :data:`ALLOWED`, relative to their norm. ``expected`` may return a pair instead of a tensor:
            the tensor and another one whose norm counts as well, because terms of that size cancel in the tensor.
        index: index of the CUDA device, ``None`` for the current one (or for the CPU, in the interpreter).
        dtype, call: the properties that select a kernel.

    A failure is warned about once, with the rank in a distributed run. The verdict is per rank, because a collective
    would deadlock if not all ranks reach it. An out-of-memory error and a wrong launch table are raised and not cached
    as a verdict. While a CUDA graph is captured, no test can run and nothing is cached.
    """
    if not INTERPRETED and index is None:
        if not torch.cuda.is_available():
            return "PyTorch finds no CUDA device"
        index = torch.cuda.current_device()
    key = (name, index, dtype, dtype == torch.float32 and allows_tf32(), *call)
    if key in _trials:
        return _trials[key]
    with _trying:  # threads of DataParallel call this concurrently
        if key in _trials:
            return _trials[key]
        if not INTERPRETED and torch.cuda.is_current_stream_capturing():
            return None
        device = torch.device("cpu" if INTERPRETED else f"cuda:{index}")
        verdict = _trials[key] = _try(run, expected, device, dtype, call)
    if verdict is not None:
        message = f"t2t_fast: {name} leaves its Triton kernel: {verdict}{_of_rank()}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return verdict


def _of_rank() -> str:
    """The part of a warning about the rank; empty outside a distributed run."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return ""
    return (
        f" (rank {distributed.get_rank()} of {distributed.get_world_size()}; the others may run another backend: "
        "choose one for all by T2T_FAST_BACKEND or t2t_fast.backend)"
    )


@contextmanager
def _alone(device: torch.device) -> Iterator[None]:
    """A context for the self-test that is independent of the caller's: real tensors, no autocast, the given device."""
    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        yield


def _out_of_memory(error: BaseException) -> bool:
    """Triton has no exception type for it; exceeding a multiprocessor's resources has another message."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def _try(
    run: Callable[..., Any],
    expected: Callable[..., Any],
    device: torch.device,
    dtype: torch.dtype,
    call: tuple[Any, ...],
) -> str | None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    allowed = ALLOWED["tf32" if dtype == torch.float32 and allows_tf32() else dtype]
    with _alone(device):
        try:
            results = [t.to(accumulation_dtype(dtype)) for t in run(device, dtype, *call)]
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # launches are asynchronous
        except Exception as error:  # compilers and drivers raise various types; the error becomes the reason
            if _out_of_memory(error) or isinstance(error, LaunchTableError):
                raise
            text = str(error).strip().splitlines() or [""]
            return f"its first run failed with {type(error).__name__}: {text[-1][:300]}"
        for value, exact in zip(results, expected(device, dtype, *call), strict=True):
            exact, *others = exact if isinstance(exact, tuple) else (exact,)
            difference = (value - exact).norm().item()
            size = max(t.norm().item() for t in (exact, *others))
            if not difference <= allowed * size:
                relative = difference / size if size else difference
                return f"its self-test on {device} gave an error of {relative:.1e}, {allowed:.1e} is allowed"
    return None

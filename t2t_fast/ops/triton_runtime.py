"""What every operator with Triton kernels shares: when they can run, registration, and the first run's self-test.

Triton itself is imported where a kernel is first launched, so that importing this package stays light. Under
``TRITON_INTERPRET=1`` the kernels run on the CPU, in Triton's interpreter; that is for tests.
"""

import warnings
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .. import config
from ..errors import FLOATING
from .library import accumulation_dtype, opaque_obstacle

INTERPRETED = config.triton_interpreted()
"""Whether kernels run on the CPU; Triton decides it when they are defined, so it is asked once."""

_MISSING = None if find_spec("triton") is not None else "Triton is not installed (pip install triton)"
_DEVICES = ("cpu",) if INTERPRETED else ("cuda",)
_library = torch.library.Library("t2t_fast_triton", "DEF")
_trials: dict[tuple, str | None] = {}

FUSION = {"enable_fp_fusion": True}
"""Multiply and add round once, in every version of Triton."""

FEW = 128
"""Tokens a multiprocessor, up to which a call has few: larger tiles would leave some without work."""

LARGEST_TILE = 256
OFFSET_LIMIT = 2**31
"""Offsets inside a tile of at most that many tokens are 32 bits wide."""

TRIAL_TOKENS = 40 if INTERPRETED else 150
"""Of a sequence in a trial, more than a tile by default; the interpreter takes its time over each."""

ALLOWED = {torch.float32: 2e-5, "tf32": 2e-2, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative errors in a trial; several times what the tests find, and far below what a wrong kernel gives."""


def reason(request, dtypes=FLOATING):
    """Why no Triton kernel for ``dtypes`` can run ``request``, or ``None``."""
    if _MISSING is not None:
        return _MISSING
    if request.device not in _DEVICES:
        where = "on the CPU under TRITON_INTERPRET=1 only" if INTERPRETED else "on CUDA devices"
        return f"Triton kernels run {where}"
    return opaque_obstacle(request, dtypes, "Triton")


def passed_over(request):
    """Why ``auto`` leaves what the interpreter can run to another backend, or ``None``."""
    return "Triton's interpreter is for tests" if request.device == "cpu" else None


def operator(signature):
    """Decorator: registers a function as ``torch.ops.t2t_fast_triton.<signature>``, opaque to ``torch.compile``."""
    name = signature.partition("(")[0]
    _library.define(signature, tags=(torch.Tag.needs_fixed_stride_order,))

    def register(function):
        def run(*arguments):
            with torch.cuda.device_of(next(t for t in arguments if isinstance(t, torch.Tensor))):
                return function(*arguments)

        _library.impl(name, function if INTERPRETED else run, "CPU" if INTERPRETED else "CUDA")
        return function

    return register


def fake(name):
    """Decorator: what the operator ``name`` returns for fake tensors."""
    return torch.library.register_fake(f"t2t_fast_triton::{name}", lib=_library)


@cache
def multiprocessors(device):
    """How many programs run side by side for each that a multiprocessor holds; a few where kernels are interpreted."""
    return 4 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


@cache
def architecture(device):
    """``"sm_90"``; ``"cpu"`` where kernels are interpreted."""
    if INTERPRETED:
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


_crowded = False


@contextmanager
def crowded():
    """Inside, calls take the launch parameters that they have with many tokens."""
    global _crowded
    before, _crowded = _crowded, True
    try:
        yield
    finally:
        _crowded = before


def section(device, tokens):
    """The part of a launch table that a call with so many tokens reads: its architecture's, such as ``"sm_90"``.

    Or that one's for few tokens (:data:`FEW`), ``"sm_90-few"``.
    """
    name = architecture(device)
    few = not (_crowded or INTERPRETED) and tokens <= FEW * multiprocessors(device)
    return f"{name}-few" if few else name


def allows_tf32():
    """Whether torch's setting for matrix products of float32 lets them run in TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def fixed(size):
    """A size as a constant: ``torch.compile`` compiles anew for another one (a range cannot be symbolic)."""
    return len(range(size))


def readable(x):
    """A (..., L, E) tensor, or a copy of it where an offset inside a tile would not fit into 32 bits."""
    token, column = x.stride()[-2:]
    return x if LARGEST_TILE * token + x.shape[-1] * column < OFFSET_LIMIT else x.contiguous()


def trial(name, run, expected, index, dtype, *sizes):
    """Why a kernel cannot be used on a device, or ``None``; tried once for each dtype and size class, then remembered.

    Args:
        name: the operator's, for the warning.
        run, expected: functions of (device, dtype, *sizes) that return tensors: by the kernel, and by a form that needs
            none. They must agree within :data:`ALLOWED`.
        index: of the CUDA device, ``None`` for the current one (or the CPU, where kernels are interpreted).

    A failure is warned of once. While a CUDA graph is captured nothing can be tried, and nothing is remembered.
    """
    key = (name, index, dtype, *sizes)
    if key in _trials:
        return _trials[key]
    if not INTERPRETED:
        if not torch.cuda.is_available():
            return "PyTorch finds no CUDA device"
        if torch.cuda.is_current_stream_capturing():
            return None
        if index is None:
            return trial(name, run, expected, torch.cuda.current_device(), dtype, *sizes)
    _trials[key] = _try(run, expected, torch.device("cpu" if INTERPRETED else f"cuda:{index}"), dtype, sizes)
    if _trials[key] is not None:
        warnings.warn(f"t2t_fast: {name} leaves its Triton kernel: {_trials[key]}", RuntimeWarning, stacklevel=2)
    return _trials[key]


@contextmanager
def _alone(device):
    """A state for the trial that does not depend on where it is asked for: real tensors, no autocast, that device."""
    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        yield


def _try(run, expected, device, dtype, sizes):
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    allowed = ALLOWED["tf32" if dtype == torch.float32 and allows_tf32() else dtype]
    with _alone(device):
        try:
            found = [t.to(accumulation_dtype(dtype)) for t in run(device, dtype, *sizes)]
        except Exception as error:  # noqa: BLE001 - a compiler and a driver raise what they like; it becomes the reason
            text = str(error).strip().splitlines() or [""]
            return f"its first run failed with {type(error).__name__}: {text[-1][:300]}"
        for value, exact in zip(found, expected(device, dtype, *sizes), strict=True):
            error = ((value - exact).norm() / exact.norm()).item()
            if not error <= allowed:
                return f"its self-test on {device} gave an error of {error:.1e}, {allowed:.1e} is allowed"
    return None

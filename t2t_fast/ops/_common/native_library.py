"""The native operators ``torch.ops.t2t_fast_native``: their availability, and helpers for fake implementations.

Availability is queried once, at import, so that ``torch.compile`` only sees constants.
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ... import _extension, backends
from ...errors import FLOATING
from .cached import FOLDED
from .library import opaque_obstacle

_MISSING = _extension.operators_error()
_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


def _defined(name: str) -> bool:
    return _MISSING is None and hasattr(torch.ops.t2t_fast_native, name)


def instruction_set(bf16: bool = False) -> str | None:
    """The instruction set of the layers' CPU kernels with products of float32, or of bfloat16; ``None`` if the loaded
    library has none.
    """
    if not devices("performer_layer"):
        return None
    return torch.ops.t2t_fast_native.cpu_instruction_set("", bf16)


def use_instruction_set(name: str, bf16: bool = False) -> None:
    """Run the layers' CPU kernels of another instruction set from now on, in the whole process; for tests.

    Raises:
        RuntimeError: this CPU does not have it.
    """
    torch.ops.t2t_fast_native.cpu_instruction_set(name, bf16)
    FOLDED.clear()  # packed weights have the layout of an instruction set


def devices(name: str) -> tuple[str, ...]:
    """Device types for which the loaded library has a kernel of operator ``name``."""
    if not _defined(name):
        return ()
    operator = f"t2t_fast_native::{name}"
    return tuple(kind for kind, key in _KEYS.items() if torch._C._dispatch_has_kernel_for_dispatch_key(operator, key))


def reason(request: backends.Request, kinds: Sequence[str], dtypes: Sequence[torch.dtype] = FLOATING) -> str | None:
    """Why a native operator with kernels for device types ``kinds`` and ``dtypes`` cannot run ``request``, or ``None``.

    A missing library is reported last, so that the reason implies that the call would run with it.
    """
    obstacle = opaque_obstacle(request, dtypes, "native")
    if obstacle is not None:
        return obstacle
    if _MISSING is not None:
        return f"the native operators are missing: {_MISSING}"
    if request.device not in kinds:
        return f"no native kernel for {request.device} in this build"
    return None


CUDA_KERNELS = ("soft_split", "soft_composition", "fused_fold_unfold")
"""Operators with CUDA kernels in a library that is built with CUDA."""

_COST = {
    # python -m benchmarks --suite module: aten against native, 2.8 (inference) and 3.6 (training) on two cores
    "cpu": "a Performer T2T module takes about three times as long",
    "cuda": "it takes more time and memory, how much has not been measured",
}
_warned = False


def noticed(op: str, request: backends.Request, name: str, chosen: str) -> str:
    """Return ``chosen``, the backend of a call of ``op`` that requested ``name``.

    Warns once per process if ``auto`` selected ``aten`` only because the native code was not built.
    """
    if chosen == "aten" and name == "auto" and backends.automatic(op):
        why = backends.reason(op, "native", request)
        if why in (f"the native operators are missing: {_MISSING}", "no native kernel for cuda in this build"):
            _warn(op, request.device)
    return chosen


def _warn(op: str, device: str) -> None:
    global _warned
    there = {
        "cpu": torch.backends.cpu.get_cpu_capability().startswith("AVX"),  # else auto passes over native layers
        "cuda": op in CUDA_KERNELS,
    }
    why = _extension.lacking(device)
    if _warned or why is None or sys.platform != "linux" or not there.get(device):
        return
    _warned = True
    text = (
        f"t2t_fast: {op} runs as plain PyTorch operations, since the native operators for {device} are {why}: "
        f"{_COST[device]}. To build them, run in its source folder: {_extension.COMMAND.format(device)} "
        "(T2T_FAST_BACKEND=aten keeps plain operations and silences this)"
    )
    warnings.warn(" ".join(text.split()), RuntimeWarning, stacklevel=5)


# what torch.compiler.assume_constant_result sets, without its import of the compiler; dynamo warns when it traces
_warn._dynamo_marked_constant = True  # type: ignore[attr-defined]


def fake(name: str) -> Callable[..., Any]:
    """Decorator: registers the fake implementation of native operator ``name``, if the operator is loaded."""
    return torch.library.register_fake(f"t2t_fast_native::{name}") if _defined(name) else lambda function: function


_SLOW = None
if instruction_set() == "baseline":
    _SLOW = "this CPU has neither AVX2 nor AVX-512, without which PyTorch's own products are faster"


def passed_over(request: backends.Request) -> str | None:
    """Why ``auto`` passes over the library's kernel of a layer on the CPU, or ``None``."""
    return _SLOW if request.device == "cpu" else None


SINGLE = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of the operators whose tensors are float32; their argument ``bf16`` makes matrix products bfloat16."""


def single(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The tensors in float32, for operators with dtypes :data:`SINGLE`; ``None`` stays ``None``."""
    return [t if t is None else t.to(torch.float32) for t in tensors]


def gradient(value: torch.Tensor, tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A native backward's result ``value`` for ``tensor``, in its dtype; ``None`` without a tensor or result."""
    return None if tensor is None or value.numel() < tensor.numel() else value.to(tensor.dtype)


def image_gradient(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """The gradient of the float32 image ``x``, from the memory order of the native backward's result."""
    if value.dim() == 1:
        return None
    return value.permute(0, 3, 1, 2) if x.stride(1) == 1 else value


def fake_image_gradient(x: torch.Tensor, needed: bool) -> torch.Tensor:
    """The fake result of a native backward for an image: (B, H, W, C) if its channels are adjacent, empty if not
    needed.
    """
    batch, channels, height, width = x.shape
    if not needed:
        return x.new_empty(0)
    return x.new_empty((batch, height, width, channels) if x.stride(1) == 1 else x.shape)


def fake_gradients(x: torch.Tensor, *tensors: torch.Tensor | None) -> list[torch.Tensor]:
    """One empty tensor in the shape of each of ``tensors``, of no elements for ``None``."""
    return [x.new_empty(0 if t is None else t.shape) for t in tensors]

"""Detection of PyTorch's program transformations during a call.

An opaque kernel has no tangents, no batching rule and no node that another program could run. A hand-written
``autograd.Function`` has a backward, but neither tangents nor a batching rule. Under a transformation that needs them,
such an implementation reports the transformation as the reason why it cannot run, and ``auto`` selects one that
consists of plain operations, in the last resort the "reference" backend.
"""

import warnings
from typing import Any

import torch
from torch.autograd import forward_ad

from ...backends import Request

FUNCTIONAL = "torch.func transforms (grad, vjp, jvp, vmap)"
FORWARD_MODE = "forward-mode derivatives"
TRACING = "torch.jit.trace"


def active() -> str | None:
    """The active transformation, one of this module's constants, or ``None``."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return FUNCTIONAL
    if forward_ad._current_level >= 0:
        return FORWARD_MODE
    if torch.jit.is_tracing():
        return TRACING
    return None


def constant(size: Any) -> Any:
    """A size that must be constant, as an int also under ``torch.jit.trace``, where sizes are tensors."""
    if not isinstance(size, torch.Tensor):
        return size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return int(size)


def is_exporting() -> bool:
    """Whether ``torch.export`` is recording a program."""
    # not torch.compiler.is_exporting(): inside torch.compile, dynamo of torch 2.11 evaluates it to True
    return getattr(torch.compiler, "_is_exporting_flag", False)


# Dynamo calls it while tracing, and guards on the first two itself.
active._dynamo_marked_constant = True  # type: ignore[attr-defined]


def plain(request: Request) -> str | None:
    """The ``supports`` of an implementation in PyTorch operations with a hand-written backward."""
    if request.transform in (FUNCTIONAL, FORWARD_MODE):
        return f"its hand-written backward does not support {request.transform}"
    if request.transform == TRACING and request.sizes.get("training", True) and not torch.onnx.is_in_onnx_export():
        return f"its hand-written backward cannot be recorded by {TRACING}"
    return None

"""What calls must have in common for one to stand for the others: properties of tensors and states of PyTorch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch._C import _dynamo

from . import transforms

_guards: Any = _dynamo.guards  # its types name symbolic sizes only

PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
"""Types of the tensors that a remembered call may have."""

MOST = 64
"""Kinds of calls that one :class:`Kinds` keeps; beyond it, it forgets all."""

_suspended = 0


@contextmanager
def suspended() -> Iterator[None]:
    """Inside, no call is remembered or replayed, in any thread: launch parameters differ from the usual ones."""
    global _suspended
    _suspended += 1
    try:
        yield
    finally:
        _suspended -= 1


def state(x: torch.Tensor) -> tuple[Any, ...] | None:
    """All on which a call with ``x`` depends, besides its tensors (:func:`guard`) and its other arguments.

    ``None`` if a call must not be replayed, because something else follows it: a compiler, a trace, a mode, a
    transformation or the profiler.
    """
    if (
        _suspended
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or transforms.active() is not None
        or transforms.is_exporting()
        or not (x.is_cuda or x.is_cpu)
    ):
        return None
    return (
        torch.is_grad_enabled(),
        torch.get_autocast_dtype("cuda" if x.is_cuda else "cpu"),
        torch._C._get_fp32_precision_getter("cuda", "matmul"),
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
        torch._C._get_cudnn_sdp_enabled(),
    )


def capturing(x: torch.Tensor) -> bool:
    """Whether a CUDA graph is captured on x's device."""
    found: bool = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return found


def guard(tensors: Sequence[torch.Tensor]) -> Any:
    """Guards whose ``check(*others)`` tells whether other tensors, in the same states of PyTorch, can replace these.

    They compare type, shape, strides, dtype, device, ``requires_grad``, and PyTorch's dispatch keys, and with them
    autocast, inference mode and lazy negation. ``None`` if one of these tensors is not plain.
    """
    for tensor in tensors:
        if type(tensor) not in PLAIN or tensor.layout is not torch.strided or tensor.is_neg():
            return None
        if tensor.is_nested or tensor._is_zerotensor() or tensor.is_quantized:
            return None
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    return _guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)


_Value = TypeVar("_Value")


class Kinds(Generic[_Value]):
    """A value for each kind of call: calls with equal options, and tensors that pass the same :func:`guard`."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: list[tuple[Any, Any, _Value]] = []

    def __len__(self) -> int:
        return len(self._known)

    def find(self, options: Any, tensors: Sequence[torch.Tensor | None]) -> _Value | None:
        """The value of calls like this one, or ``None``."""
        options, present = _split(options, tensors)
        for known, guards, value in self._known:
            if known == options and guards.check(*present):
                return value
        return None

    def add(self, options: Any, tensors: Sequence[torch.Tensor | None], value: _Value) -> _Value | None:
        """Keep a value for calls like this one, and return it; ``None`` if one of the tensors is not plain."""
        options, present = _split(options, tensors)
        guards = guard(present)
        if guards is None:
            return None
        if len(self._known) >= MOST:
            self._known.clear()
        self._known.append((options, guards, value))
        return value


def _split(options: Any, tensors: Sequence[torch.Tensor | None]) -> tuple[Any, list[torch.Tensor]]:
    """The options with the places of the absent tensors, or the number of tensors; and those that are present."""
    present = [tensor for tensor in tensors if tensor is not None]
    number = len(tensors)
    return (options, number if len(present) == number else tuple([tensor is None for tensor in tensors])), present

"""Which implementation of an operator runs, and why the others do not.

Every operator has a table of :class:`Implementation` records. ``auto`` goes through :data:`ORDER` and selects the first
one that supports the call and is not passed over; it never falls back on an exception. An explicit name works or raises
:class:`BackendUnavailable` with every reason. The backend is selected once, before the operator is called, and is an
argument of the operator: forward and backward agree, and ``torch.compile`` sees no Python state inside the operator.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from . import config
from .errors import BackendUnavailable

ORDER = ("triton", "native", "aten", "reference")


class Request(NamedTuple):
    """The call that a capability check sees: device type, dtype, and the operator's own sizes by name."""

    device: str
    dtype: torch.dtype
    sizes: dict[str, Any]
    transform: str | None = None
    """The PyTorch transformation that follows the call's operations, if any (``ops/_common/transforms.py``)."""


def always(request: Request) -> str | None:
    """The ``supports`` of an implementation in plain PyTorch operations."""
    return None


class Implementation(NamedTuple):
    """One way to run an operator.

    ``call`` takes the operator's arguments without the backend name and is differentiable. ``supports`` takes a
    :class:`Request` and returns ``None`` or the reason why not; ``passed_over`` likewise, for calls that it can run
    but ``auto`` leaves to a faster one. ``graph`` is ``call`` for the compiler of another runtime, in inference only:
    plain expressions of a few large operations, of which everything that depends on weights alone can be folded.
    """

    call: Callable[..., Any]
    supports: Callable[[Request], str | None]
    passed_over: Callable[[Request], str | None] = always
    graph: Callable[..., Any] | None = None


_tables: dict[str, dict[str, Implementation]] = {}
_absent: dict[str, dict[str, str]] = {}
_DEFAULT = config.default_backend()


class _Block(NamedTuple):
    """One open ``with backend(name, op):`` block; compared by identity."""

    name: str
    op: str | None


_open: ContextVar[tuple[_Block, ...]] = ContextVar("t2t_fast_backend", default=())
_last: tuple[_Block, ...] = ()
"""The open blocks after the last change in any thread, for compilers that cannot trace a ContextVar."""


def _traces_context() -> bool:
    """Whether dynamo traces a read of a ContextVar and guards on its value (PyTorch 2.11 does not)."""
    from torch._dynamo.variables import misc

    return hasattr(misc, "ContextVarVariable")


setattr(_traces_context, "_dynamo_marked_constant", True)  # noqa: B010 - functions have no such attribute for mypy


def _change(blocks: tuple[_Block, ...]) -> None:
    global _last
    _open.set(blocks)
    _last = blocks


def _selected(op: str) -> str:
    """The backend of the innermost open block for ``op``, else the environment's."""
    blocks = _last if torch.compiler.is_dynamo_compiling() and not _traces_context() else _open.get()
    for block in reversed(blocks):
        if block.op is None or block.op == op:
            return block.name
    return _DEFAULT


def selection() -> object:
    """A hashable value that changes with the backends that :func:`backend` selects in this context."""
    return _open.get()


def register(op: str, implementations: Mapping[str, Implementation], absent: Mapping[str, str]) -> None:
    """Set the table of operator ``op``; ``absent`` has the reason for each backend without an implementation."""
    missing = set(ORDER) - set(implementations) - set(absent)
    if missing or set(implementations) & set(absent):
        raise ValueError(f"{op}: every backend needs an implementation or a reason, {sorted(missing)} has neither")
    _tables[op] = dict(implementations)
    _absent[op] = dict(absent)


def implementation(op: str, name: str) -> Implementation:
    """The registered implementation; used by the operators themselves, with a resolved name."""
    return _tables[op][name]


def operators() -> tuple[str, ...]:
    """Names of all registered operators."""
    return tuple(_tables)


def reason(op: str, name: str, request: Request) -> str | None:
    """Why ``name`` cannot run ``request``, or ``None``."""
    found = _tables[op].get(name)
    return _absent[op][name] if found is None else found.supports(request)


def problem() -> str | None:
    """The error in the value of ``T2T_FAST_BACKEND``, or ``None``."""
    if _DEFAULT in config.BACKENDS:
        return None
    return f"T2T_FAST_BACKEND must be one of {', '.join(config.BACKENDS)}, got {_DEFAULT!r}"


def automatic(op: str) -> bool:
    """Whether a call of ``op`` without an explicit backend uses the first one that can run it."""
    return _selected(op) == "auto"


def resolve(op: str, request: Request, name: str = "auto") -> str:
    """The backend that runs ``request``: the argument if given, else the context's backend, else the first in order."""
    if name not in config.BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(config.BACKENDS)}, got {name!r}")
    if name == "auto":
        name = _selected(op)
        if name not in config.BACKENDS:  # the environment's value has not been checked before
            raise ValueError(problem())
    if name != "auto":
        if reason(op, name, request) is not None:
            raise BackendUnavailable(_refusal(op, name, request))
        return name
    for candidate in ORDER:
        found = _tables[op].get(candidate)
        if found is not None and found.passed_over(request) is None and found.supports(request) is None:
            return candidate
    raise BackendUnavailable(_refusal(op, "auto", request))


def runs(op: str, name: str, request: Request) -> bool:
    """Whether a call of ``op`` without an explicit backend is free to run ``request`` by ``name``, and it can."""
    if _selected(op) not in ("auto", name):
        return False
    return reason(op, name, request) is None and implementation(op, name).passed_over(request) is None


def _refusal(op: str, name: str, request: Request) -> str:
    dtype = str(request.dtype).removeprefix("torch.")
    lines = [f"{op}: backend {name!r} cannot run on {request.device} with {dtype}"]
    for candidate in ORDER:
        lines.append(f"  {candidate}: {reason(op, candidate, request) or 'available'}")
    return "\n".join(lines)


@contextmanager
def backend(name: str, op: str | None = None) -> Iterator[None]:
    """Select the backend inside a ``with`` block, for every operator or for one.

    The selection holds in the thread and the asyncio task that opened the block; new threads start without one. Blocks
    may overlap without nesting: each ends its own selection, and the innermost open one counts. (Code compiled by a
    PyTorch that cannot trace a ``ContextVar``, such as 2.11, sees the selection of any thread.)

    Args:
        name: "auto", "triton", "native", "aten" or "reference".
        op: an operator's name, or ``None`` for all.

    Raises:
        ValueError: unknown backend or operator. A backend that cannot run a call raises
            :class:`BackendUnavailable` at that call.
    """
    if name not in config.BACKENDS:
        raise ValueError(f"backend: name must be one of {', '.join(config.BACKENDS)}, got {name!r}")
    if op is not None and op not in _tables:
        raise ValueError(f"backend: op must be one of {', '.join(_tables)} or None, got {op!r}")
    block = _Block(name, op)
    _change((*_open.get(), block))
    try:
        yield
    finally:
        _change(tuple(each for each in _open.get() if each is not block))


@dataclass(frozen=True)
class Explanation:
    """Rows of (operator, backend, "chosen" | "available ..." | why it cannot run); ``str()`` is a table."""

    device: str
    dtype: torch.dtype
    rows: tuple[tuple[str, str, str], ...]

    def chosen(self, op: str) -> str | None:
        """The backend that runs ``op``, or ``None`` if the requested one cannot."""
        return next((name for row_op, name, verdict in self.rows if row_op == op and verdict == "chosen"), None)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        width = max(len(op) for op, _, _ in self.rows)
        lines = [f"{'operator':{width}}  backend    on {self.device}, {dtype}"]
        for op, name, verdict in self.rows:
            lines.append(f"{op:{width}}  {name:9}  {verdict}")
        return "\n".join(lines)


def explain(
    op: str | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    **sizes: Any,
) -> Explanation:
    """For each operator: the selected backend, and why the others were rejected.

    Args:
        op: one operator's name, or ``None`` for all.
        device: "cpu", "cuda" or a ``torch.device``; by default "cuda" if there is one.
        dtype: the inputs' dtype.
        sizes: the operator's own sizes, where a capability depends on them.
    """
    if op is not None and op not in _tables:
        raise ValueError(f"explain: op must be one of {', '.join(_tables)} or None, got {op!r}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    request = Request(torch.device(device).type, dtype, sizes)
    rows = []
    for each in [op] if op else _tables:
        try:
            chosen: str | None = resolve(each, request)
        except BackendUnavailable:
            chosen = None
        for name in ORDER:
            verdict = reason(each, name, request)
            if verdict is None:
                slower = _tables[each][name].passed_over(request)
                verdict = "available" if slower is None else f"available, passed over by auto: {slower}"
            rows.append((each, name, "chosen" if name == chosen else verdict))
    return Explanation(request.device, dtype, tuple(rows))

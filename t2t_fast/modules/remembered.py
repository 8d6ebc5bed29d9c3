"""Calls that were made before: a module skips the checks of its fused functions if nothing has changed.

The checks of a call, the gate's view of its parameters, and the choice of the backend take longer than anything else
that a call does in Python. They depend on the properties of tensors, on other arguments, and on a few states of the
process. All of these are compared anew in every call (:func:`entry`), in C++ for the tensors: a call with other
properties is checked like the first one. Nothing else is remembered, in particular no tensor, and not the children,
which :func:`fusion.children` looks at in every call. So a remembered call cannot become stale.

The first call of a kind is checked. The second one is recorded (``ops/_common/replay.py``), and the next ones are
replayed: a module's whole ``forward`` if autograd does not record it and no child is called in it, else operator by
operator. What cannot be recorded, as on a CPU, runs without the checks.

Nothing is stored in the module itself: copies and pickles begin without remembered calls. While a compiler or another
transformation follows the call, nothing is recalled.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .. import backends, config
from ..ops._common import replay
from ..ops._common.library import wants_gradient
from ..ops._common.philox import fresh_seed
from ..ops._common.spec import Window

_MOST = 64
"""Entries of a module; beyond it, it forgets all."""

INTERPRETED = config.triton_interpreted()

_CONSTANT = frozenset((int, float, bool, str, type(None), Window))
_SEQUENCES = (tuple, list)


class Recalled:
    """A function of tensors that was called before: recorded in the second call, replayed in the next ones.

    Attributes:
        guards: what the tensors of a call must pass.
    """

    __slots__ = ("_attempted", "_function", "_program", "guards")

    def __init__(self, function: Callable[..., Any], guards: Any) -> None:
        self._function, self.guards = function, guards
        self._program: replay.Program | None = None
        self._attempted = False

    def __call__(self, *tensors: torch.Tensor | None) -> Any:
        if self._program is not None:
            return self._program(*tensors)
        if self._attempted or replay.recording() is not None or _capturing(tensors[0]):
            return self._function(*tensors)
        self._attempted = True
        result, self._program, _ = replay.record(self._function, tensors)
        return result


class Entry:
    """What a module remembers of calls with the same options and properties of tensors.

    Attributes:
        calls: fused function -> its calls, which differ in the properties of tensors that the module's key lacks.
        whole: the module's ``forward``, if it was recorded.
        replayable: whether ``forward`` may be recorded: autograd does not record it, and no attempt failed.
        passed: whether the module's ``obstacle()`` was ``None``; seen: whether there was a call, in which the operators
            chose their backends.
    """

    __slots__ = ("calls", "guards", "options", "passed", "replayable", "seen", "whole")

    def __init__(self, options: Any, guards: Any, replayable: bool) -> None:
        self.options, self.guards = options, guards
        self.calls: dict[Any, list[Recalled]] = {}
        self.whole: replay.Program | None = None
        self.replayable = replayable
        self.passed = self.seen = False


Arguments: TypeAlias = tuple[Sequence[Any], tuple[Any, ...]]
"""Tensors and options of a call (:func:`entry`)."""

_entries: WeakKeyDictionary[nn.Module, list[Entry]] = WeakKeyDictionary()


def _capturing(x: Any) -> bool:
    """Whether a CUDA graph is captured, when the choice of the backend makes no self-test."""
    captures: bool = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return captures


def entry(module: nn.Module, tensors: Sequence[Any], options: tuple[Any, ...]) -> Entry | None:
    """What a module remembers of calls like this one; ``None``: it must be checked.

    Args:
        tensors: the module's input and all parameters on which its gate and its results depend.
        options: all else.
    """
    x, kinds = tensors[0], tuple(map(type, options))
    state = replay.state(x) if type(x) in replay.PLAIN and _CONSTANT.issuperset(kinds) else None
    if state is None:
        return None
    present = [tensor for tensor in tensors if tensor is not None]
    absent = len(present) < len(tensors) and tuple([tensor is None for tensor in tensors])
    found = (options, kinds, absent, backends.selection(), *state)
    entries = _entries.get(module)
    if entries is None:
        entries = _entries.setdefault(module, [])
    for known in entries:
        if known.options == found and known.guards.check(*present):
            return known
    guards = replay.guard(present)
    if guards is None:
        return None
    if len(entries) >= _MOST:
        entries.clear()
    entries.append(Entry(found, guards, not wants_gradient(*present)))
    return entries[-1]


def run(found: Entry | None, function: Any, tensors: Sequence[Any], /, **named: Any) -> Any:
    """``function(*tensors, **named)``, recalled from an :func:`entry` if it was called before.

    Args:
        function: one that :func:`functional.arguments.checked` made.
        tensors: its tensors in the order of ``function.tensors``.
        named: depends on the entry's options only.
    """
    if found is None:
        return function(**dict(zip(function.tensors, tensors, strict=True)), **named)
    calls = found.calls.setdefault(function, [])
    present = [tensor for tensor in tensors if tensor is not None]
    for call in calls:
        if call.guards.check(*present):
            return call(*tensors)
    arguments = function.arguments(**dict(zip(function.tensors, tensors, strict=True)), **named)
    guards = replay.guard(present)
    if guards is not None and len(calls) < _MOST and not _capturing(tensors[0]):
        calls.append(Recalled(_unchecked(function, arguments), guards))
    return function.operator(*arguments)


def _unchecked(function: Any, arguments: Sequence[Any]) -> Callable[..., Any]:
    """The operator of ``function`` as a function of its ``tensors``, with these other arguments."""
    seed = None if function.seed is None or arguments[function.seed] is None else function.seed
    places, constants = tuple(function.tensors.values()), list(arguments)
    for place in (*places, *(() if seed is None else (seed,))):
        constants[place] = None

    def call(*tensors: torch.Tensor | None) -> Any:
        found = constants.copy()
        for place, tensor in zip(places, tensors, strict=True):
            found[place] = tensor
        if seed is not None:
            found[seed] = fresh_seed(found[0].device)
        return function.operator(*found)

    return call


def forward(found: Entry | None, fused: Callable[[], Any], tensors: Sequence[Any]) -> Any:
    """``fused()``, the forward of a module that calls no child, as a function of ``tensors`` (those of ``found``)."""
    if found is not None and found.whole is not None:
        return found.whole(*tensors)
    if found is None or not found.replayable:
        return fused()
    if not found.seen or replay.recording() is not None or _capturing(tensors[0]):
        found.seen = True
        return fused()
    result, found.whole, _ = replay.record(lambda *_: fused(), tensors)
    found.replayable = found.whole is not None
    return result


def replays(x: torch.Tensor) -> bool:
    """Whether a whole forward can be replayed on x: without autograd, and where Python launches the kernels."""
    return (x.is_cuda or INTERPRETED) and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def passes(found: Entry | None, module: Any) -> bool:
    """Whether ``module.obstacle()`` is ``None``, which it stays for calls with the same :func:`entry`.

    The children's own checks must have been made (:func:`fusion.children`).
    """
    if found is not None and found.passed:
        return True
    if module.obstacle() is not None:
        return False
    if found is not None:
        found.passed = True
    return True


def constants_of(pixel_norm: Any) -> tuple[Any, ...]:
    """A ``pixel_norm`` as options of :func:`entry`: its numbers, if it consists of tuples or lists."""
    if pixel_norm is None:
        return ()
    if type(pixel_norm) not in _SEQUENCES or any(type(part) not in _SEQUENCES for part in pixel_norm):
        return (pixel_norm,)
    return tuple(value for part in pixel_norm for value in (len(part), *part))

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
transformation follows the call, nothing is remembered.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .. import backends, config
from ..ops._common.guards import PLAIN, Kinds, capturing, state
from ..ops._common.library import wants_gradient
from ..ops._common.philox import fresh_seed
from ..ops._common.replay import Replay
from ..ops._common.spec import Window

_INTERPRETED = config.triton_interpreted()

_CONSTANT = frozenset((int, float, bool, str, type(None), Window))
_SEQUENCES = (tuple, list)


class Entry:
    """What a module remembers of calls with the same options and properties of tensors.

    Attributes:
        calls: fused function -> its unchecked operator and that one's replay, for each kind of its tensors, which are
            the module's or were computed from them.
        whole: the replay of the module's ``forward``; ``None`` if autograd records it.
        passed: whether the module has no obstacle; seen: whether there was a call, in which the operators chose their
            backends.
    """

    __slots__ = ("calls", "passed", "seen", "whole")

    def __init__(self, tensors: Sequence[torch.Tensor | None]) -> None:
        self.calls: dict[Any, Kinds[tuple[Callable[..., Any], Replay]]] = {}
        self.whole = None if wants_gradient(*tensors) else Replay()
        self.passed = self.seen = False


Dependencies: TypeAlias = tuple[Sequence[Any], tuple[Any, ...]]
"""Tensors and options on which a call depends (:func:`entry`)."""

_entries: WeakKeyDictionary[nn.Module, Kinds[Entry]] = WeakKeyDictionary()


def entry(module: nn.Module, tensors: Sequence[Any], options: tuple[Any, ...]) -> Entry | None:
    """What a module remembers of calls like this one; ``None``: it must be checked.

    Args:
        tensors: the module's input and all parameters on which its gate and its results depend.
        options: all else.
    """
    x, types = tensors[0], tuple(map(type, options))
    found = state(x) if type(x) in PLAIN and _CONSTANT.issuperset(types) else None
    if found is None:
        return None
    entries = _entries.get(module)
    if entries is None:
        entries = _entries.setdefault(module, Kinds())
    found = (options, types, backends.selection(), found)
    return entries.find(found, tensors) or entries.add(found, tensors, Entry(tensors))


def run(found: Entry | None, function: Any, tensors: Sequence[Any], /, **named: Any) -> Any:
    """``function(*tensors, **named)``, without the checks if an :func:`entry` has such a call.

    Args:
        function: one that :func:`functional.arguments.checked` made.
        tensors: its tensors in the order of ``function.tensors``.
        named: depends on the entry's options only.
    """
    if found is None:
        return function(**dict(zip(function.tensors, tensors, strict=True)), **named)
    calls = found.calls.setdefault(function, Kinds())
    call = calls.find(None, tensors)
    if call is not None:
        operator, replay = call
        return replay(operator, tensors)
    arguments = function.arguments(**dict(zip(function.tensors, tensors, strict=True)), **named)
    if not capturing(tensors[0]):
        calls.add(None, tensors, (_unchecked(function, arguments), Replay()))
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
    if found is None or found.whole is None:
        return fused()
    if not found.seen:
        found.seen = True
        return fused()
    return found.whole(lambda *_: fused(), tensors)


def replays(x: torch.Tensor) -> bool:
    """Whether a whole forward can be replayed on x: without autograd, and where Python launches the kernels."""
    return (x.is_cuda or _INTERPRETED) and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def passes(found: Entry | None, obstacle: Callable[[], str | None]) -> bool:
    """Whether a module's ``obstacle()`` is ``None``, which it stays for calls with the same :func:`entry`.

    The children's own checks must have been made (:func:`fusion.children`).
    """
    if found is not None and found.passed:
        return True
    if obstacle() is not None:
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

"""Calls whose arguments were checked before: a module skips the checks of its fused functions if nothing has changed.

The checks of a call, the gate's view of its parameters, and the choice of the backend take longer than anything else
that a call does in Python. They depend on the properties of the tensors, on the other arguments, and on a few global
states (:func:`key`). A module remembers a call by all of these, read anew at every call: a call
with other properties is checked like the first one. Nothing else is remembered. In particular not the children, which
:func:`fusion.children` looks at in every call, nor any tensor, so that a remembered call cannot become stale.

Nothing is stored in the module itself: copies and pickles begin without remembered calls. While a compiler or another
transformation follows the call, nothing is recalled.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .. import backends
from ..ops._common import transforms
from ..ops._common.library import AUTOCAST_DEVICES, PLAIN, undisturbed
from ..ops._common.philox import fresh_seed
from ..ops._common.spec import Window
from ..ops._common.triton_runtime import allows_tf32

_MOST = 64
"""Calls that a module remembers; beyond it, it forgets all."""

_CONSTANT = frozenset((int, float, bool, str, type(None), Window))
_SEQUENCES = (tuple, list)


class Call(NamedTuple):
    """A checked call of an operator (``library.define``'s ``straight``), with ``None`` in the ``places`` of tensors."""

    operator: Callable[..., Any]
    arguments: tuple[Any, ...]
    places: tuple[int, ...]
    seed: int | None
    """The place of the dropouts' seed, if one must be drawn."""

    def __call__(self, *tensors: torch.Tensor | None) -> Any:
        arguments = list(self.arguments)
        for place, tensor in zip(self.places, tensors, strict=False):
            arguments[place] = tensor
        if self.seed is not None:
            arguments[self.seed] = fresh_seed(arguments[0].device)
        return self.operator(*arguments)


_calls: WeakKeyDictionary[nn.Module, dict[Any, Any]] = WeakKeyDictionary()


def key(tensors: Sequence[Any], options: tuple[Any, ...]) -> Any:
    """All on which the checks and choices of a module's calls depend; ``None``: they must be checked.

    Not the strides: only launches depend on them.

    Args:
        tensors: the module's input and all parameters on which its gate depends.
        options: all else.
    """
    kinds = tuple(map(type, options))
    if type(tensors[0]) not in PLAIN or not _CONSTANT.issuperset(kinds):
        return None
    if not undisturbed() or transforms.is_exporting():
        return None
    gradient, recording = False, torch.is_grad_enabled()
    found = [kinds, options, backends.selection()]
    for tensor in tensors:
        if tensor is None:
            found.append(None)
            continue
        if type(tensor) not in PLAIN or tensor.is_neg() or tensor._is_zerotensor() or tensor.is_nested:
            return None
        found += (tensor.shape, tensor.dtype, tensor.device, tensor.layout)
        gradient = gradient or (recording and tensor.requires_grad)
    device = tensors[0].device.type
    mixed = device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)
    return (*found, gradient, torch.get_autocast_dtype(device) if mixed else allows_tf32())


def recall(module: nn.Module, function: Any, known: Any) -> Any:
    """The remembered call of ``function`` with this :func:`key`, or ``None``.

    function: one that :func:`functional.arguments.checked` made. The call takes tensors in the order of its ``places``;
    further ones are ignored.
    """
    calls = _calls.get(module)
    if not calls or known is None:
        return None
    try:
        return calls.get((function, known))
    except TypeError:  # an option that is not hashable
        return None


def first(module: nn.Module, function: Any, known: Any, /, *positional: Any, **named: Any) -> Any:
    """``function(*positional, **named)``, which is remembered for :func:`recall` under the :func:`key` ``known``."""
    arguments = function.arguments(*positional, **named)
    x = arguments[0]
    # while a CUDA graph is captured, the choice of the backend makes no self-test
    if known is not None and not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        constants = list(arguments)
        for place in function.places:
            constants[place] = None
        seed = None if function.seed is None or constants[function.seed] is None else function.seed
        calls = _calls.setdefault(module, {})
        if len(calls) >= _MOST:
            calls.clear()
        with suppress(TypeError):  # an option that is not hashable
            calls[function, known] = Call(function.operator.straight, tuple(constants), function.places, seed)
    return function.operator(*arguments)


def run(module: nn.Module, function: Any, known: Any, tensors: Sequence[Any], /, **named: Any) -> Any:
    """``function(*tensors, **named)``, recalled if the :func:`key` ``known`` is that of an earlier call."""
    if known is None:
        return function(*tensors, **named)
    call = recall(module, function, known)
    return first(module, function, known, *tensors, **named) if call is None else call(*tensors)


def passes(module: Any, known: Any) -> bool:
    """Whether ``module.obstacle()`` is ``None``, which it stays for calls with the same :func:`key`.

    The children's own checks must have been made (:func:`fusion.children`).
    """
    if recall(module, passes, known) is not None:
        return True
    if module.obstacle() is not None:
        return False
    if known is not None:
        with suppress(TypeError):
            _calls.setdefault(module, {})[passes, known] = True
    return True


def constants_of(pixel_norm: Any) -> tuple[Any, ...]:
    """A ``pixel_norm`` as options of :func:`recall`: its numbers, if it consists of tuples or lists."""
    if pixel_norm is None:
        return ()
    if type(pixel_norm) not in _SEQUENCES or any(type(part) not in _SEQUENCES for part in pixel_norm):
        return (pixel_norm,)
    return tuple(value for part in pixel_norm for value in (len(part), *part))

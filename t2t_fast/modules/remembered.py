"""Calls whose arguments were checked before: a module skips the checks of its fused functions if nothing has changed.

The checks of a call, the gate's view of its parameters, and the choice of the backend take longer than anything else
that a call does in Python. They depend on the properties of the tensors, on the other arguments, and on a few global
states (:func:`key`). A module remembers a call by all of these, read anew at every call: a call with other properties
is checked like the first one. Nothing else is remembered, in particular no tensor, and not the children, which
:func:`fusion.children` looks at in every call. So a remembered call cannot become stale.

Nothing is stored in the module itself: copies and pickles begin without remembered calls. While a compiler or another
transformation follows the call, nothing is recalled.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import Parameter

from .. import backends
from ..ops._common import transforms
from ..ops._common.library import AUTOCAST_DEVICES, PLAIN, undisturbed
from ..ops._common.philox import fresh_seed
from ..ops._common.spec import Window
from ..ops._common.triton_runtime import allows_tf32

_MOST = 64
"""Entries of a module; beyond it, it forgets all."""

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


Entry: TypeAlias = dict[Any, Any]
"""Function -> its :class:`Call`."""

_entries: WeakKeyDictionary[nn.Module, dict[Any, Entry]] = WeakKeyDictionary()


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
    device = tensors[0].device.type
    found = [kinds, options, backends.selection(), device]
    for tensor in tensors:
        if tensor is None:
            found.append(None)
            continue
        if type(tensor) is not Parameter and (
            type(tensor) is not torch.Tensor or tensor.is_neg() or tensor._is_zerotensor() or tensor.is_nested
        ):
            return None
        # a device's index and whether it is CUDA: comparing devices takes ten times as long
        found += (tensor.shape, tensor.dtype, tensor.layout, tensor.get_device(), tensor.is_cuda)
        gradient = gradient or (recording and tensor.requires_grad)
    mixed = device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)
    return (*found, gradient, torch.get_autocast_dtype(device) if mixed else allows_tf32())


def entry(module: nn.Module, known: Any) -> Entry | None:
    """What a module remembers under a :func:`key`, to be extended by :func:`first`; ``None``: nothing is remembered."""
    if known is None:
        return None
    try:
        return _entries[module][known]
    except KeyError:
        entries = _entries.setdefault(module, {})
        if len(entries) >= _MOST:
            entries.clear()
        return entries.setdefault(known, {})
    except TypeError:  # an option that is not hashable
        return None


def first(found: Entry | None, function: Any, /, *positional: Any, **named: Any) -> Any:
    """``function(*positional, **named)``, which is remembered in an :func:`entry`.

    function: one that :func:`functional.arguments.checked` made. The remembered :class:`Call` takes tensors in the
    order of its ``places``; further ones are ignored.
    """
    arguments = function.arguments(*positional, **named)
    x = arguments[0]
    # while a CUDA graph is captured, the choice of the backend makes no self-test
    if found is not None and not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        constants = list(arguments)
        for place in function.places:
            constants[place] = None
        seed = None if function.seed is None or constants[function.seed] is None else function.seed
        found[function] = Call(function.operator.straight, tuple(constants), function.places, seed)
    return function.operator(*arguments)


def run(found: Entry | None, function: Any, tensors: Sequence[Any], /, **named: Any) -> Any:
    """``function(*tensors, **named)``, recalled from an :func:`entry` if it was called before."""
    if found is None:
        return function(*tensors, **named)
    call = found.get(function)
    return first(found, function, *tensors, **named) if call is None else call(*tensors)


def passes(found: Entry | None, module: Any) -> bool:
    """Whether ``module.obstacle()`` is ``None``, which it stays for calls with the same :func:`entry`.

    The children's own checks must have been made (:func:`fusion.children`).
    """
    if found is not None and passes in found:
        return True
    if module.obstacle() is not None:
        return False
    if found is not None:
        found[passes] = True
    return True


def constants_of(pixel_norm: Any) -> tuple[Any, ...]:
    """A ``pixel_norm`` as options of :func:`key`: its numbers, if it consists of tuples or lists."""
    if pixel_norm is None:
        return ()
    if type(pixel_norm) not in _SEQUENCES or any(type(part) not in _SEQUENCES for part in pixel_norm):
        return (pixel_norm,)
    return tuple(value for part in pixel_norm for value in (len(part), *part))

"""The class of a swapped module: the original class with the fast ``forward``.

A swap changes an object's class and nothing else. The new class inherits from the original one first, so its methods,
properties and class attributes stay, ``isinstance`` holds, and the instance's attributes are
found as before. Only ``forward`` comes from the fast class; its other methods are added.
"""

from __future__ import annotations

import inspect
from functools import cache, wraps
from typing import Any

from torch import nn

from ...modules.block import Fused
from ...modules.fusion import ORIGINAL
from ...modules.windowed import Windowed
from .template import Template


@cache
def swapped_class(
    original: Any,
    fast: Any,
    names: tuple[str, ...] = (),
    template: Template | None = None,
    hidden: tuple[str, ...] = (),
    containers: tuple[tuple[str, type], ...] = (),
) -> type:
    """A class that is both ``original`` and ``fast``, one for each combination.

    Args:
        original, fast: classes of modules.
        names: those of the arguments of ``original.forward``, if those of ``fast`` differ.
        template: describes what ``forward`` returns; ``None`` if it returns what ``fast`` returns.
        hidden: properties of ``fast`` that must not hide attributes of the instance.
        containers: those of a class with :class:`modules.block.Parts`, whose original ``forward`` runs if it is not
            fused.
    """
    forward = fast.forward if template is None else _returning(fast, template)
    forward = _renamed(forward, dict(zip(names, arguments_of(fast), strict=True))) if names else forward
    namespace = {
        "__doc__": f"``{original.__name__}`` with the forward of ``{fast.__name__}``.",
        "__module__": __name__,
        "__reduce_ex__": _reduce,
        ORIGINAL: original,
        "_t2t_fast_arguments": (original, fast, names, template, hidden, containers),
        **dict.fromkeys(hidden),
        "forward": forward,
    }
    if containers or issubclass(fast, Fused):
        namespace["containers"] = containers
    if containers or issubclass(fast, (Fused, Windowed)):
        namespace["_unfused"] = original.forward
    return type(fast.__name__, (fast,) if issubclass(fast, original) else (original, fast), namespace)


def original_class(module: nn.Module) -> type | None:
    """The class that a module had before it was swapped, or ``None``."""
    return type(module).__dict__.get(ORIGINAL)


def is_swapped(module: nn.Module) -> bool:
    """Whether a module was swapped, even if its class was changed again afterwards."""
    return any(ORIGINAL in vars(cls) for cls in type(module).__mro__)


def collisions(module: nn.Module, fast: type) -> set[str]:
    """Names that both a module (or its class) and a fast class define, other than ``forward`` and ``extra_repr``."""
    own = {name for cls in _above_module(fast) for name in vars(cls)} - {"forward", "extra_repr"}
    theirs = {name for cls in _above_module(type(module)) for name in vars(cls)}
    state = set(vars(module)).union(module._parameters, module._buffers, module._modules)
    return {name for name in own & (theirs | state) if not name.startswith("__")}


def _above_module(cls):
    """The class itself and its bases below ``nn.Module`` (or PyTorch's own layers)."""
    return [each for each in cls.__mro__ if issubclass(each, nn.Module) and not each.__module__.startswith("torch.nn")]


def _returning(fast, template):
    @wraps(fast.forward)
    def forward(self, x):
        return template.fill(x, fast._stages(self, x))

    return forward


def arguments_of(cls: Any) -> tuple[str, ...]:
    """The names of the arguments that a class's ``forward`` needs."""
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD)


def _renamed(call, own):
    """``call`` that accepts its arguments under other keywords; own: keyword -> its own one."""

    @wraps(call)
    def forward(self, *arguments, **named):
        return call(self, *arguments, **{own.get(name, name): value for name, value in named.items()})

    return forward


def _reduce(self, protocol):
    """Pickle the arguments of :func:`swapped_class`, since pickle finds the class in no module."""
    if ORIGINAL not in vars(type(self)):  # the class was changed again, as by FSDP2: what that one's copies are
        return object.__reduce_ex__(self, protocol)
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__.copy()  # Python 3.10 has none
    return _restore, type(self)._t2t_fast_arguments, state


def _restore(*arguments):
    cls = swapped_class(*arguments)
    return cls.__new__(cls)

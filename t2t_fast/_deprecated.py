"""Old names that still work for one release, with a ``DeprecationWarning`` that names the new one."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def warn_deprecated(old: str, new: str, *, stacklevel: int = 2) -> None:
    """Warn that ``old`` is deprecated in favour of ``new``.

    Args:
        old, new: as a user writes them, such as ``"memory='low'"`` and ``"recompute=True"``.
        stacklevel: as in :func:`warnings.warn`, counted from the caller of this function: 2 is the caller's caller.
    """
    message = f"{old} is deprecated and will be removed in the next release; use {new} instead"
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel + 1)


def deprecated_alias(old: str, new: str, function: Callable[P, R]) -> Callable[P, R]:
    """``function`` (or a class) under its old name: each call warns and then does what ``function`` does.

    Args:
        old, new: both names with their module, such as ``"t2t_fast.capture"`` and ``"t2t_fast.cuda_graph"``.
    """

    @functools.wraps(function)
    def alias(*args: P.args, **kwargs: P.kwargs) -> R:
        warn_deprecated(old, new)
        return function(*args, **kwargs)

    alias.__name__ = alias.__qualname__ = old.rpartition(".")[2]
    alias.__doc__ = f"Deprecated: use :func:`{new}`."
    return alias


def renamed_arguments(**names: str | tuple[str, Callable[[Any], Any]]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: keyword arguments under old names warn and are handed on under the new ones.

    Args:
        names: old name -> the new one, or (new name, function of the old value that gives the new one).
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in names.keys() & kwargs.keys():
                renamed = names[old]
                new, convert = (renamed, None) if isinstance(renamed, str) else renamed
                warn_deprecated(f"{function.__qualname__}: the argument {old}", new)
                if new in kwargs:
                    raise TypeError(f"{function.__qualname__}: got both {new} and its old name {old}")
                value = kwargs.pop(old)
                kwargs[new] = value if convert is None else convert(value)
            return function(*args, **kwargs)

        return call

    return decorate

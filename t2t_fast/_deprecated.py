"""Old names that still work for one release, with a ``DeprecationWarning`` that names the new one."""

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

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

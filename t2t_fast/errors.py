"""The package's errors, and argument checks whose messages name the argument, what is expected and what was given.

``TypeError`` for a wrong type, ``ValueError`` for a wrong shape, dtype, layout, device or value. All checks run before
anything is allocated or launched, so a failed check has no side effects.

A size is an int, a ``torch.SymInt`` (export, ``torch.compile``, ``make_fx``), or a 0-d tensor while ``torch.jit.trace``
runs. The last two are never converted to an int here, so that traced programs keep symbolic sizes.
"""

import numbers
import operator
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

Size: TypeAlias = int | torch.SymInt | torch.Tensor

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

LARGEST = 2**31 - 1
"""The largest size, stride or padding along an axis, and the largest padded image along it."""
MOST_VALUES = 2**56
"""The most values of a tensor, and of the tokens of a soft split.

Below these limits, sums and products of sizes fit into 64 bits, also in bytes and threads. The native code has the same
limits (``csrc/tensors.h``).
"""


class BackendUnavailable(RuntimeError):
    """An explicitly selected backend cannot run this call; the message lists every reason."""


class NothingToSwap(ValueError):
    """``swap`` found no module that it can replace; the message lists what it looked for."""


class CheckpointError(ValueError):
    """A checkpoint could not be read or does not fit; the model is unchanged."""


class LaunchTableError(ValueError):
    """A ``launch.json`` cannot be read, or has a wrong key or value; the message names the file and the key."""


class CommandError(Exception):
    """A command cannot do what was asked; the text is the whole message. The exit code is 1."""

    code = 1


# ---- tensors


def check_tensor(
    function: str,
    name: str,
    value: Any,
    *,
    ndim: int | tuple[int, ...] | None = None,
    dtypes: Sequence[torch.dtype] = FLOATING,
    optional: bool = False,
) -> None:
    """Raise unless ``value`` is a dense tensor of one of the ranks ``ndim`` (int or tuple) and one of ``dtypes``.

    ``optional`` allows ``None``.
    """
    if not isinstance(value, torch.Tensor):
        if optional and value is None:
            return
        expected = "a torch.Tensor or None" if optional else "a torch.Tensor"
        raise TypeError(f"{function}: {name} must be {expected}, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.").lstrip("_")
        raise ValueError(f"{function}: {name} must be a dense tensor, got a {kind} one")
    if ndim is not None and value.ndim != ndim and (isinstance(ndim, int) or value.ndim not in ndim):
        expected = " or ".join(f"{rank}-D" for rank in ((ndim,) if isinstance(ndim, int) else ndim))
        raise ValueError(f"{function}: {name} must be {expected}, got {value.ndim}-D of shape {tuple(value.shape)}")
    if value.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{function}: {name} must be one of {expected}, got {str(value.dtype).removeprefix('torch.')}")


def check_shape(function: str, name: str, value: torch.Tensor, shape: Sequence[Size], meaning: str) -> None:
    """Raise unless ``value`` has exactly ``shape``; ``meaning`` explains the expected numbers."""
    if not torch.jit.is_tracing() and value.shape == shape:
        return
    if len(value.shape) != len(shape) or any(known(n != m) for n, m in zip(value.shape, shape, strict=True)):
        raise ValueError(f"{function}: {name} must have shape {tuple(shape)} ({meaning}), got {tuple(value.shape)}")


def check_filled(function: str, name: str, value: torch.Tensor, first: int = 0) -> None:
    """Raise if one of the axes of ``value`` from ``first`` on is empty."""
    for size in value.shape[first:]:
        if known(size < 1):
            allowed = " but the first" if first else ""
            raise ValueError(f"{function}: {name} must have no empty axis{allowed}, got shape {tuple(value.shape)}")


def check_together(
    function: str,
    first_name: str,
    first: torch.Tensor,
    *,
    same_dtype: bool = True,
    dtype_of: tuple[str, torch.Tensor] | None = None,
    dtypes: Sequence[torch.dtype] = FLOATING,
    **others: torch.Tensor | None,
) -> None:
    """Raise unless every tensor of ``others`` is dense, of one of ``dtypes`` and on ``first``'s device.

    ``None`` is skipped.

    Args:
        same_dtype: whether the dtype must be that of ``first``, or of the (name, tensor) ``dtype_of``.
    """
    like_name, like = dtype_of or (first_name, first)
    for name, value in others.items():
        if value is None:
            continue
        check_tensor(function, name, value, dtypes=dtypes, optional=True)
        if value.device != first.device:
            raise ValueError(
                f"{function}: {name} must be on the device of {first_name} ({first.device}), got {value.device}"
            )
        if same_dtype and value.dtype != like.dtype:
            raise ValueError(
                f"{function}: {name} must have the dtype of {like_name} ({like.dtype}), got {value.dtype}; "
                "convert one of them, or run under torch.autocast"
            )


# ---- sizes


def known(condition: Any) -> bool:
    """Whether a comparison of sizes holds; ``False`` for a tensor, which it is while ``torch.jit.trace`` runs."""
    return condition if isinstance(condition, bool) else not isinstance(condition, torch.Tensor) and bool(condition)


def exceeds(n: Size, limit: int) -> bool:
    """Whether a size is above a limit; ``False`` for a symbolic size, which must not be restricted."""
    return not torch.compiler.is_compiling() and isinstance(n, int) and n > limit


def check_count(function: str, what: str, *sizes: Size) -> None:
    """Raise unless a tensor of these sizes, with empty ones counted as 1, has at most :data:`MOST_VALUES` values."""
    if torch.compiler.is_compiling():
        return
    count = 1
    for n in sizes:
        if not isinstance(n, int):
            return
        count *= n or 1
    if count > MOST_VALUES:
        raise ValueError(f"{function}: {what} must have at most 2**56 values, got {' x '.join(map(str, sizes))}")


def as_size(value: Any) -> Size | None:
    """``value`` as a size, or ``None``: NumPy integers and 0-d integer tensors are sizes, bool and floats are not."""
    if isinstance(value, (int, torch.SymInt)):
        return None if isinstance(value, bool) else value
    if isinstance(value, torch.Tensor):
        if value.ndim > 0 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            return None
        if torch.jit.is_tracing():
            return value
    if isinstance(value, (tuple, list)):  # dynamo of torch 2.11 does not catch the TypeError
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_pair(function: str, name: str, value: Any, *, minimum: int) -> tuple[int, int]:
    """One integer, or a sequence, array or tensor of two, each at least ``minimum``, as a pair of sizes.

    Annotated as ints, as PyTorch annotates symbolic sizes.
    """
    pair: tuple[Any, ...] = (as_size(value),) * 2
    if pair[0] is None and (isinstance(value, (tuple, list, Sequence)) or getattr(value, "ndim", 0) == 1):
        pair = tuple([as_size(each) for each in value])
    if len(pair) != 2 or pair[0] is None or pair[1] is None:
        raise TypeError(f"{function}: {name} must be an int or a pair of ints, got {value!r}")
    for size in pair:
        if known(size < minimum):
            raise ValueError(f"{function}: {name} must be at least {minimum}, got {value!r}")
        if exceeds(size, LARGEST):
            raise ValueError(f"{function}: {name} must be at most {LARGEST}, got {value!r}")
    return pair[0], pair[1]


def check_sizes(function: str, *, minimum: int = 1, **values: Any) -> None:
    """Raise unless each of ``values`` is an integer from ``minimum`` to :data:`LARGEST`."""
    for name, value in values.items():
        size = as_size(value)
        if size is None:
            raise TypeError(f"{function}: {name} must be an int, got {value!r}")
        if known(size < minimum):
            raise ValueError(f"{function}: {name} must be at least {minimum}, got {value!r}")
        if exceeds(size, LARGEST):
            raise ValueError(f"{function}: {name} must be at most {LARGEST}, got {value!r}")


# ---- numbers


def as_number(value: Any) -> Any:
    """``value`` as a real Python number, or ``None``; accepts what PyTorch's functions accept as a float."""
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        return value
    if isinstance(value, numbers.Real):  # such as NumPy's scalars
        return float(value)
    if isinstance(value, torch.Tensor) and value.ndim == 0 and not value.is_complex() and not value.requires_grad:
        return value.item()
    return None


def check_number(
    function: str,
    name: str,
    value: Any,
    *,
    above: float | None = None,
    minimum: float | None = None,
    below: float | None = None,
    maximum: float | None = None,
) -> Any:
    """``value`` as a Python number within the given bounds; NaN is rejected."""
    number = as_number(value)
    if number is None:
        raise TypeError(f"{function}: {name} must be a number, got {type(value).__name__}")
    bounds = (
        ("above", above, above is None or number > above),
        ("at least", minimum, minimum is None or number >= minimum),
        ("below", below, below is None or number < below),
        ("at most", maximum, maximum is None or number <= maximum),
    )
    if number != number or not all(holds for _, _, holds in bounds):
        expected = " and ".join(f"{word} {bound}" for word, bound, _ in bounds if bound is not None) or "a number"
        raise ValueError(f"{function}: {name} must be {expected}, got {value!r}")
    return float(number) if isinstance(number, int) else number


def check_probability(function: str, name: str, value: Any) -> Any:
    """``value`` as a Python number in [0, 1)."""
    return check_number(function, name, value, minimum=0, below=1)


def check_bool(function: str, name: str, value: object) -> None:
    """Raise unless ``value`` is ``True`` or ``False``."""
    if not isinstance(value, bool):
        raise TypeError(f"{function}: {name} must be True or False, got {value!r}")

"""The package's errors, and the checks that name the argument, what was expected and what came.

``TypeError`` for a wrong type, ``ValueError`` for a wrong shape, dtype, device or value; every check runs before
anything is allocated or launched, so nothing is changed when one fails.

A size is an int, a ``torch.SymInt`` (export, ``torch.compile``, ``make_fx``), or a 0-d tensor while ``torch.jit.trace``
runs. The last two are never converted to an int here, so that traced programs keep free sizes.
"""

import operator
from collections.abc import Sequence

import torch

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class BackendUnavailable(RuntimeError):
    """An explicitly chosen backend cannot run this call; the text lists every reason."""


class NothingToSwap(ValueError):
    """``swap`` found no module that it knows; the text lists what was looked for."""


class CheckpointError(ValueError):
    """A checkpoint could not be read or does not fit; the model is unchanged."""


def check_tensor(function, name, value, *, ndim=None, dtypes=FLOATING):
    """Raise unless ``value`` is a tensor of one of the ranks ``ndim`` (int or tuple) and one of ``dtypes``."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{function}: {name} must be a torch.Tensor, got {type(value).__name__}")
    ranks = (ndim,) if isinstance(ndim, int) else ndim
    if ranks is not None and value.ndim not in ranks:
        expected = " or ".join(f"{rank}-D" for rank in ranks)
        raise ValueError(f"{function}: {name} must be {expected}, got {value.ndim}-D of shape {tuple(value.shape)}")
    if value.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{function}: {name} must be one of {expected}, got {str(value.dtype).removeprefix('torch.')}")


def known(condition):
    """Whether a comparison of sizes holds; ``False`` for a tensor, which it is while ``torch.jit.trace`` runs."""
    return not isinstance(condition, torch.Tensor) and bool(condition)


def check_shape(function, name, value, shape, meaning):
    """Raise unless ``value`` has exactly ``shape``; ``meaning`` says where the expected numbers come from."""
    if len(value.shape) != len(shape) or any(known(n != m) for n, m in zip(value.shape, shape, strict=True)):
        raise ValueError(f"{function}: {name} must have shape {tuple(shape)} ({meaning}), got {tuple(value.shape)}")


def check_together(function, first_name, first, *, same_dtype=True, **others):
    """Raise unless every given tensor is on ``first``'s device and, if asked, of its dtype; ``None`` is skipped."""
    for name, value in others.items():
        if value is None:
            continue
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{function}: {name} must be a torch.Tensor or None, got {type(value).__name__}")
        if value.device != first.device:
            raise ValueError(
                f"{function}: {name} must be on the device of {first_name} ({first.device}), got {value.device}"
            )
        if same_dtype and value.dtype != first.dtype:
            raise ValueError(
                f"{function}: {name} must have the dtype of {first_name} ({first.dtype}), got {value.dtype}; "
                "convert one of them, or run under torch.autocast"
            )


def as_size(value):
    """``value`` as a size, or ``None``: NumPy integers and 0-d integer tensors are sizes, bool and floats are not."""
    if isinstance(value, (int, torch.SymInt)):
        return None if isinstance(value, bool) else value
    if isinstance(value, torch.Tensor):
        if value.ndim > 0 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            return None
        if torch.jit.is_tracing():
            return value
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_pair(function, name, value, *, minimum):
    """One integer, or a sequence, array or tensor of two, each at least ``minimum``, as a pair of sizes."""
    size = as_size(value)
    if size is not None:
        pair = (size, size)
    elif isinstance(value, Sequence) or getattr(value, "ndim", 0) == 1:
        pair = tuple(as_size(each) for each in value)
    else:
        pair = ()
    if len(pair) != 2 or None in pair:
        raise TypeError(f"{function}: {name} must be an int or a pair of ints, got {value!r}")
    if any(known(each < minimum) for each in pair):
        raise ValueError(f"{function}: {name} must be at least {minimum}, got {value!r}")
    return pair


def check_probability(function, name, value):
    """Raise unless ``value`` is a number in [0, 1)."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{function}: {name} must be a number, got {type(value).__name__}")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{function}: {name} must be at least 0 and below 1, got {value!r}")

"""Argument checks and backend selection, shared by the functions."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec, Protocol

import torch

from ..backends import Request, resolve
from ..errors import (
    FLOATING,
    LARGEST,
    as_number,
    check_count,
    check_filled,
    check_pair,
    check_tensor,
    check_together,
    exceeds,
    known,
)
from ..ops._common import transforms, windows
from ..ops._common.library import AUTOCAST_DEVICES, wants_gradient
from ..ops._common.native_library import noticed
from ..ops._common.pixels import PixelNorm, normalisation, values
from ..ops._common.spec import Pair, Window

P = ParamSpec("P")


class Checked(Protocol[P]):
    """A function that checks its arguments and calls an operator (:func:`checked`)."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any: ...


def checked(
    operator: Callable[..., Any], tensors: Mapping[str, int], seed: int | None = None
) -> Callable[[Callable[P, tuple[Any, ...]]], Checked[P]]:
    """Decorator for a function that returns the checked arguments of ``operator``: the function that calls it.

    Modules call both steps by themselves (``modules/remembered.py``). For them the function has the attributes
    ``arguments`` (the decorated function), ``operator``, ``tensors`` and ``seed``.

    Args:
        tensors: the function's names of the tensors, and their positions among the operator's arguments.
        seed: the position of the dropouts' seed.
    """

    def decorate(arguments: Callable[P, tuple[Any, ...]]) -> Checked[P]:
        @wraps(arguments)
        def function(*args: P.args, **kwargs: P.kwargs) -> Any:
            return operator(*arguments(*args, **kwargs))

        vars(function).update(arguments=arguments, operator=operator, tensors=tensors, seed=seed)
        return function

    return decorate


IMAGES = (*FLOATING, torch.uint8)
"""Dtypes of an image for operators that convert uint8 while reading."""


def window(kernel_size: Pair, stride: Pair = 1, padding: Pair = 0, *, function: str = "window") -> Window:
    """The checked :class:`Window` of ints or (height, width) pairs; ``window(...).grid(H, W)`` is its token grid."""
    return Window(
        check_pair(function, "kernel_size", kernel_size, minimum=1),
        check_pair(function, "stride", stride, minimum=1),
        check_pair(function, "padding", padding, minimum=0),
    )


def same_dtype(x: torch.Tensor) -> bool:
    """Whether operands must have the same dtype; under autocast they are cast."""
    kind = x.device.type
    return not (kind in AUTOCAST_DEVICES and torch.is_autocast_enabled(kind))


def as_image(
    function: str, x: torch.Tensor, grid: Pair | None, *, dtypes: Sequence[torch.dtype] = FLOATING
) -> torch.Tensor:
    """(B, C, H, W) view of an image, or of tokens (B, L, C) with a grid."""
    check_tensor(function, "x", x, ndim=(3, 4), dtypes=dtypes)
    check_filled(function, "x", x, first=1)
    if x.ndim == 4:
        if grid is not None:
            raise ValueError(f"{function}: grid is for tokens (3-D), but x is 4-D of shape {tuple(x.shape)}")
        return x
    if grid is None:
        raise ValueError(f"{function}: x is 3-D tokens of shape {tuple(x.shape)}, so grid=(h, w) is needed")
    h, w = check_pair(function, "grid", grid, minimum=1)
    if known(h * w != x.shape[1]):
        raise ValueError(f"{function}: grid {h} x {w} = {h * w} must count the tokens of x, got {x.shape[1]}")
    return windows.as_image(x, (h, w))


def check_pixels(function: str, x: torch.Tensor, pixel_norm: PixelNorm | None) -> list[float]:
    """The argument ``pixels`` of the operators (``ops/_common/pixels.py``); empty for a floating image.

    Args:
        x: (B, C, H, W), uint8 or floating; pixel_norm: (mean, std), each with C numbers, for uint8, else ``None``.
    """
    if x.dtype != torch.uint8:
        if pixel_norm is not None:
            raise ValueError(f"{function}: pixel_norm is for images of uint8, but x is {x.dtype}")
        return []
    if pixel_norm is None:
        where = "an argument of the function, an attribute of the T2T module"
        raise ValueError(f"{function}: x is an image of uint8, so pixel_norm=(mean, std) is needed ({where})")
    return normalisation(*check_pixel_norm(function, pixel_norm, x.shape[1]))


def check_pixel_norm(function: str, pixel_norm: PixelNorm, channels: int) -> tuple[list[float], list[float]]:
    """(mean, std) of an image's channels as two lists of Python numbers."""
    try:
        given = [[as_number(value) for value in each] for each in pixel_norm]
    except TypeError:  # no sequence of sequences
        given = [[None]]
    if any(None in each for each in given):
        raise TypeError(f"{function}: pixel_norm must be (mean, std), two sequences of numbers, got {pixel_norm!r}")
    if [len(each) for each in given] != [channels, channels]:
        raise ValueError(
            f"{function}: pixel_norm must be (mean, std), each with the image's {channels} channels, got {pixel_norm!r}"
        )
    mean, std = given
    if not all(map(math.isfinite, mean)):
        raise ValueError(f"{function}: pixel_norm's mean must be finite, got {pixel_norm[0]!r}")
    if not all(s > 0 for s in std):
        raise ValueError(f"{function}: pixel_norm's std must be above 0, got {pixel_norm[1]!r}")
    return mean, std


def check_parameters(
    function: str, x: torch.Tensor, pixels: Sequence[float], parameters: Mapping[str, torch.Tensor | None]
) -> torch.Tensor:
    """The tensor whose dtype the call uses: ``x``, or the first parameter if ``x`` is an image of bytes.

    Args:
        pixels: result of :func:`check_pixels`; parameters: name -> tensor on x's device with that dtype, or ``None``.
    """
    first = next(iter(parameters))
    leader: Any = (first, parameters[first]) if pixels else ("x", x)
    check_together(function, "x", x, same_dtype=same_dtype(x), dtype_of=leader, **parameters)  # type: ignore[arg-type]
    return leader[1]


def image_values(x: torch.Tensor, pixel_norm: PixelNorm | None, dtype: torch.dtype) -> torch.Tensor:
    """The values of an image of bytes: ``(x / 255 - mean) / std`` in ``dtype``; a floating image unchanged.

    Args:
        x: (B, C, H, W), uint8 or floating; pixel_norm: (mean, std), each with C numbers, for uint8.

    Raises:
        TypeError, ValueError: an argument of the wrong type, rank, dtype or value.
    """
    check_tensor("image_values", "x", x, ndim=(3, 4), dtypes=IMAGES)
    if x.dtype != torch.uint8:
        return x
    return values(x, check_pixels("image_values", x, pixel_norm), dtype)


def check_window(function: str, win: Window, shape: Sequence[int]) -> tuple[int, int]:
    """The token grid of an image of ``shape`` (B, C, H, W), which must have at least one token."""
    batch, channels, *size = shape
    padded = (size[0] + 2 * win.padding[0], size[1] + 2 * win.padding[1])
    h, w = win.grid(*size)
    if known(h < 1) or known(w < 1):
        raise ValueError(
            f"{function}: the window {win.kernel[0]} x {win.kernel[1]} must fit into the padded image, "
            f"got {padded[0]} x {padded[1]}"
        )
    if exceeds(padded[0], LARGEST) or exceeds(padded[1], LARGEST):
        raise ValueError(
            f"{function}: padding must leave the padded image at most {LARGEST} pixels along an axis, "
            f"got {padded[0]} x {padded[1]}"
        )
    check_count(function, "the image", *shape)
    check_count(function, "the unfolded tokens", batch, h, w, channels, *win.kernel)
    return h, w


def choose(op: str, x: torch.Tensor, backend: str, *, dtype: torch.dtype | None = None, **sizes: Any) -> str:
    """The backend that runs ``op`` on ``x``; ``dtype`` is that of ``x`` by default.

    Args:
        sizes: the operator's sizes by name; ``training``: whether a gradient is needed, by default that of ``x``.
    """
    sizes.setdefault("training", wants_gradient(x))
    request = Request(x.device.type, dtype or x.dtype, sizes, transforms.active())
    return noticed(op, request, backend, resolve(op, request, backend))


def running_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of an operator with matrix products: autocast's, or that of ``x``."""
    return x.dtype if same_dtype(x) else torch.get_autocast_dtype(x.device.type)


def check_composition(
    function: str, tokens: torch.Tensor, output_size: Pair, kernel_size: Pair, stride: Pair, padding: Pair
) -> tuple[tuple[int, int], Window]:
    """Check the arguments of a composition; returns the image size and the window."""
    check_tensor(function, "tokens", tokens, ndim=3)
    check_filled(function, "tokens", tokens, first=1)
    size = check_pair(function, "output_size", output_size, minimum=1)
    win = window(kernel_size, stride, padding, function=function)
    h, w = check_window(function, win, (tokens.shape[0], tokens.shape[2] // win.taps, *size))
    if known(tokens.shape[1] != h * w):
        raise ValueError(
            f"{function}: tokens must have {h} x {w} = {h * w} tokens for output_size {size} and {win}, "
            f"got {tokens.shape[1]}"
        )
    if known(tokens.shape[2] % win.taps != 0):
        raise ValueError(
            f"{function}: tokens must have a width that is a multiple of the window's {win.taps} pixels, "
            f"got {tokens.shape[2]}"
        )
    return size, win

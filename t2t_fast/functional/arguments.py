"""Checks and choices that several functions share."""

import torch

from ..backends import Request, resolve
from ..errors import FLOATING, check_pair, check_tensor, check_together, known
from ..ops import transforms, windows
from ..ops.library import AUTOCAST_DEVICES, wants_gradient
from ..ops.native import noticed
from ..ops.pixels import normalisation, values
from ..ops.spec import Window

IMAGES = (*FLOATING, torch.uint8)
"""What an image may hold where its values are made on the way."""


def window(kernel_size, stride=1, padding=0, *, function="window"):
    """The checked :class:`Window` of ints or (height, width) pairs; ``window(...).grid(H, W)`` is its token grid."""
    return Window(
        check_pair(function, "kernel_size", kernel_size, minimum=1),
        check_pair(function, "stride", stride, minimum=1),
        check_pair(function, "padding", padding, minimum=0),
    )


def same_dtype(x):
    """Whether operands must agree in dtype; under autocast they are brought together."""
    kind = x.device.type
    return not (kind in AUTOCAST_DEVICES and torch.is_autocast_enabled(kind))


def as_image(function, x, grid, *, dtypes=FLOATING):
    """(B, C, H, W) view of an image, or of tokens (B, L, C) with a grid."""
    check_tensor(function, "x", x, ndim=(3, 4), dtypes=dtypes)
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


def check_pixels(function, x, pixel_norm):
    """What makes values of an image of bytes (``ops/pixels.py``); empty for an image that holds values.

    Args:
        x: (B, C, H, W), uint8 or floating; pixel_norm: (mean, std), each with C numbers, for uint8; else ``None``.
    """
    if x.dtype != torch.uint8:
        if pixel_norm is not None:
            raise ValueError(f"{function}: pixel_norm is for images of uint8, but x is {x.dtype}")
        return []
    if pixel_norm is None:
        raise ValueError(f"{function}: x is an image of uint8, so pixel_norm=(mean, std) is needed")
    channels = x.shape[1]
    if len(pixel_norm) != 2 or any(len(each) != channels for each in pixel_norm):
        raise ValueError(
            f"{function}: pixel_norm must be (mean, std), each with the {channels} channels of x, got {pixel_norm!r}"
        )
    if not all(s > 0 for s in pixel_norm[1]):
        raise ValueError(f"{function}: pixel_norm's std must be above 0, got {pixel_norm[1]!r}")
    return normalisation(*pixel_norm)


def check_parameters(function, x, pixels, parameters):
    """The tensor in whose dtype the call runs: ``x``, or the first parameter where ``x`` is an image of bytes.

    Args:
        pixels: of :func:`check_pixels`; parameters: by name, on x's device and in that dtype, or ``None``.
    """
    first = next(iter(parameters))
    name, leader = (first, parameters[first]) if pixels else ("x", x)
    check_together(function, "x", x, same_dtype=False, **parameters)
    check_together(function, name, leader, same_dtype=same_dtype(x), **parameters)
    return leader


def image_values(x, pixel_norm, dtype):
    """The values of an image of bytes: ``(x / 255 - mean) / std`` in ``dtype``; an image of values as it is.

    Args:
        x: (B, C, H, W), uint8 or floating; pixel_norm: (mean, std), each with C numbers, for uint8.
    """
    if x.dtype != torch.uint8:
        return x
    return values(x, check_pixels("image_values", x, pixel_norm), dtype)


def check_window(function, win, height, width):
    """The token grid of an image, which must have at least one token."""
    h, w = win.grid(height, width)
    if known(h < 1) or known(w < 1):
        (kh, kw), _, (ph, pw) = win
        raise ValueError(
            f"{function}: the window {kh} x {kw} must fit into the padded image, "
            f"got {height + 2 * ph} x {width + 2 * pw}"
        )
    return h, w


def choose(op, x, backend, *, dtype=None, **sizes):
    """The backend that runs ``op`` on ``x``, in its own dtype unless another one is given.

    Args:
        sizes: of the operator's own; ``training``: whether a gradient is wanted, by default of ``x``.
    """
    sizes.setdefault("training", wants_gradient(x))
    request = Request(x.device.type, dtype or x.dtype, sizes, transforms.active())
    return noticed(op, request, backend, resolve(op, request, backend))


def running_dtype(x):
    """The dtype in which an operator with matrix products runs: autocast's, or that of ``x``."""
    return x.dtype if same_dtype(x) else torch.get_autocast_dtype(x.device.type)

"""Soft composition: the adjoint of the soft split."""

import torch

from ..ops._common.spec import Pair
from ..ops.soft_composition.op import soft_composition as _soft_composition
from .arguments import check_composition, choose


def soft_composition(
    tokens: torch.Tensor,
    output_size: Pair,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair = 0,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Soft composition: overlapping tokens summed into an image; the adjoint of :func:`soft_split`.

    The same numbers as ``F.fold(tokens.transpose(1, 2), output_size, ...)``, summed in a fixed order.

    Args:
        tokens: (B, h*w, C*k*k), columns as :func:`soft_split` makes them.
        output_size: int or (H, W) of the image.
        kernel_size, stride, padding: int or (height, width) pair.

    Returns:
        (B, C, H, W) in ``tokens``' dtype, in channels-last or contiguous memory.

    Numerics:
        native: sums in float32 (float64 for float64), rounded once; aten and reference: sums in ``tokens``' dtype.

    Raises:
        TypeError, ValueError: as :func:`soft_split`, or token counts and widths that do not fit the window.
    """
    size, win = check_composition("soft_composition", tokens, output_size, kernel_size, stride, padding)
    return _soft_composition(tokens, size, *win, choose("soft_composition", tokens, backend, kernel=win.kernel))

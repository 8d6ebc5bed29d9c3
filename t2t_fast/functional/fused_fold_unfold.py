"""Fold, normalise by the overlap, unfold (FuseFormer's F3N)."""

import torch

from ..ops._common.spec import Pair
from ..ops.fused_fold_unfold.op import fused_fold_unfold as _fused_fold_unfold
from .arguments import check_composition, choose


def fused_fold_unfold(
    tokens: torch.Tensor,
    output_size: Pair,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair = 0,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Fold, normalise by the overlap, unfold: each pixel of a token becomes the mean over all tokens that contain it.

    F3N of FuseFormer (Liu et al., ICCV 2021; its ``FusionFeedForward``, as also in E2FGVI and ProPainter) without
    folding ones. It is an orthogonal projection of the tokens, so its gradient is the same operator.

    Args:
        tokens: (B, h*w, C*k*k), columns as :func:`soft_split` makes them.
        output_size: int or (H, W) of the intermediate image.
        kernel_size, stride, padding: int or (height, width) pair.

    Returns:
        (B, h*w, C*k*k) contiguous tokens in ``tokens``' dtype; pixels in the padding are 0.

    Numerics:
        sums and their division in float32 (float64 for float64), rounded once. A second derivative raises an error.

    Raises:
        TypeError, ValueError: as :func:`soft_composition`.
    """
    function = "fused_fold_unfold"
    size, win = check_composition(function, tokens, output_size, kernel_size, stride, padding)
    return _fused_fold_unfold(tokens, size, *win, choose(function, tokens, backend, kernel=win.kernel))

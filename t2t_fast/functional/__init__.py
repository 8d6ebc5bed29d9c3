"""The operators as documented functions: they check their arguments, choose the backend, and call the operator.

Letters: B batch, C channels, H W image, k s p window, h w token grid, L = h*w tokens, E token width, m random features.
An image is (B, C, H, W) with any strides. Tokens (B, L, C) with a grid *are* an image in channels-last memory: give
``grid=(h, w)`` and no copy is made. Every function takes ``backend=`` ("auto" by default), which wins over
:func:`t2t_fast.backend`; an explicit backend that cannot run raises :class:`BackendUnavailable`.
"""

from .arguments import image_values, window
from .layers import performer_attention, performer_layer, token_mlp
from .splits import fused_fold_unfold, refold, soft_composition, soft_split, soft_split_linear

__all__ = [
    "fused_fold_unfold",
    "image_values",
    "performer_attention",
    "performer_layer",
    "refold",
    "soft_composition",
    "soft_split",
    "soft_split_linear",
    "token_mlp",
    "window",
]

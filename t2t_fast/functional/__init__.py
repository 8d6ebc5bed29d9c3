"""The operators as documented functions: they check their arguments, choose the backend, and call the operator.

Notation: B batch, C channels, H W image, k s p window, h w token grid, L = h*w tokens, E token width, m random
features. An image is (B, C, H, W) with any strides. Tokens (B, L, C) with a grid *are* an image in channels-last
memory: with ``grid=(h, w)`` they are not copied. Every function takes ``backend=`` ("auto" by default), which takes
precedence over :func:`t2t_fast.backend`; an explicit backend that cannot run raises :class:`BackendUnavailable`.
"""

from .add_layer_norm import add_layer_norm
from .arguments import image_values, window
from .fused_fold_unfold import fused_fold_unfold
from .layer_norm_linear import layer_norm_linear
from .layer_norm_mlp import layer_norm_mlp
from .performer_attention import performer_attention
from .performer_layer import performer_layer
from .soft_composition import soft_composition
from .soft_split import soft_split
from .soft_split_linear import clear_weight_cache, soft_split_linear
from .soft_split_linear import refold as refold  # deprecated
from .token_mlp import token_mlp
from .transformer_block import transformer_block

__all__ = [
    "add_layer_norm",
    "clear_weight_cache",
    "fused_fold_unfold",
    "image_values",
    "layer_norm_linear",
    "layer_norm_mlp",
    "performer_attention",
    "performer_layer",
    "soft_composition",
    "soft_split",
    "soft_split_linear",
    "token_mlp",
    "transformer_block",
    "window",
]

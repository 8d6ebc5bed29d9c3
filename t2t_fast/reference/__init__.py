"""The upstream models as plain eager modules, shaped and named like upstream's classes.

They are the oracle of the tests, the "before" of the demo and the peer of the benchmarks, so they stay what upstream
does, costs included: no fusion, no tricks, square images (``lanl``: the image size given). They import torch and
numpy only and nothing of the rest of this package.
"""

from . import lanl
from .blocks import Block, BlockDense, BlockGhost, BlockSE, Transition
from .layers import get_sinusoid_encoding
from .t2t_module import T2T_module
from .t2t_vit import (
    T2T_ViT,
    T2T_ViT_Dense,
    T2T_ViT_Ghost,
    T2T_ViT_SE,
    t2t_vit_7,
    t2t_vit_10,
    t2t_vit_12,
    t2t_vit_14,
    t2t_vit_14_resnext,
    t2t_vit_14_se,
    t2t_vit_14_wide,
    t2t_vit_16_ghost,
    t2t_vit_19,
    t2t_vit_24,
    t2t_vit_dense,
    t2t_vit_t_14,
    t2t_vit_t_19,
    t2t_vit_t_24,
)
from .token_performer import Token_performer
from .token_transformer import Token_transformer
from .vit import (
    VisionTransformer,
    vit_base_patch16_224,
    vit_deit_small_patch16_224,
    vit_deit_tiny_distilled_patch16_224,
    vit_deit_tiny_patch16_224,
    vit_small_patch16_224,
)

__all__ = [
    "Block",
    "BlockDense",
    "BlockGhost",
    "BlockSE",
    "T2T_ViT",
    "T2T_ViT_Dense",
    "T2T_ViT_Ghost",
    "T2T_ViT_SE",
    "T2T_module",
    "Token_performer",
    "Token_transformer",
    "Transition",
    "VisionTransformer",
    "get_sinusoid_encoding",
    "lanl",
    "t2t_vit_7",
    "t2t_vit_10",
    "t2t_vit_12",
    "t2t_vit_14",
    "t2t_vit_14_resnext",
    "t2t_vit_14_se",
    "t2t_vit_14_wide",
    "t2t_vit_16_ghost",
    "t2t_vit_19",
    "t2t_vit_24",
    "t2t_vit_dense",
    "t2t_vit_t_14",
    "t2t_vit_t_19",
    "t2t_vit_t_24",
    "vit_base_patch16_224",
    "vit_deit_small_patch16_224",
    "vit_deit_tiny_distilled_patch16_224",
    "vit_deit_tiny_patch16_224",
    "vit_small_patch16_224",
]

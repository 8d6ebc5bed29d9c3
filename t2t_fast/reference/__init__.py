"""Upstream's models, computed step by step as upstream does: the tests' oracle and the "before" of demo and benchmarks.

The T2T module and its layers (``t2t_module.py``, ``token_performer.py``, ``token_transformer.py``, ``layers.py``,
``lanl/tokens.py``) import nothing of this package: they define what the fused operators must compute. Whole models put
them in front of the backbones of :mod:`t2t_fast.models`, with upstream's attention and without any fusion; golden
numbers from upstream's code hold these models to upstream (``tests/models/test_golden.py``).
"""

from . import lanl
from .blocks import Block, BlockDense, BlockGhost, BlockSE, Transition
from .t2t_module import T2T_module
from .t2t_vit import (
    T2T_ViT,
    T2T_ViT_Dense,
    T2T_ViT_Ghost,
    T2T_ViT_SE,
    get_sinusoid_encoding,
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

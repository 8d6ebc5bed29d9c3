"""T2T-ViT and the models around it: a tokeniser and a backbone, freely combined, with upstream's parameter names."""

from . import lanl
from .registry import CONFIGS, build_model, list_models
from .t2t_vit import T2TViT, T2TViTDense, T2TViTGhost, T2TViTSE
from .vit import ViT

FAMILIES = (lanl.FAMILY,)
"""Families of models with parameter names of their own (:class:`family.Family`)."""

__all__ = [
    "CONFIGS",
    "FAMILIES",
    "T2TViT",
    "T2TViTDense",
    "T2TViTGhost",
    "T2TViTSE",
    "ViT",
    "build_model",
    "lanl",
    "list_models",
]

"""Fused soft split and Performer for Tokens-to-Token vision transformers: the same checkpoint, faster, in less memory.

Start with :func:`swap`, :func:`create_model` and :func:`verify`; the operators are in :mod:`t2t_fast.functional`.
"""

__version__ = "0.1.0"

from . import functional, models
from .backends import backend, explain
from .models import T2TViT, list_models
from .modules import SoftComposition, SoftSplit, T2TModule, TokenPerformer, TokenTransformer

__all__ = [
    "SoftComposition",
    "SoftSplit",
    "T2TModule",
    "T2TViT",
    "TokenPerformer",
    "TokenTransformer",
    "backend",
    "explain",
    "functional",
    "list_models",
    "models",
]

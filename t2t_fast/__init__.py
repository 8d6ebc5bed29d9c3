"""Fused soft split and Performer for Tokens-to-Token vision transformers: the same checkpoint, faster, in less memory.

Start with :func:`swap`, :func:`create_model` and :func:`verify`; the operators are in :mod:`t2t_fast.functional`.
"""

__version__ = "0.1.0"

from . import functional, models
from ._deprecated import deprecated_alias
from .backends import backend
from .cuda_graphs import CapturedModel, cuda_graph
from .errors import BackendUnavailable, CheckpointError, NothingToSwap
from .interop import (
    ConvertReport,
    LoadReport,
    SwapReport,
    T2TEmbed,
    convert_checkpoint,
    create_model,
    explain,
    export_model,
    from_pretrained,
    load_checkpoint,
    push_to_hub,
    save_pretrained,
    swap,
    swapped,
    unswap,
)
from .models import T2TViT, list_models
from .modules import FusedFoldUnfold, SoftComposition, SoftSplit, T2TModule, TokenPerformer, TokenTransformer
from .verification import VerifyReport, verify

capture = deprecated_alias("t2t_fast.capture", "t2t_fast.cuda_graph", cuda_graph)

__all__ = [
    "BackendUnavailable",
    "CapturedModel",
    "CheckpointError",
    "ConvertReport",
    "FusedFoldUnfold",
    "LoadReport",
    "NothingToSwap",
    "SoftComposition",
    "SoftSplit",
    "SwapReport",
    "T2TEmbed",
    "T2TModule",
    "T2TViT",
    "TokenPerformer",
    "TokenTransformer",
    "VerifyReport",
    "backend",
    "convert_checkpoint",
    "create_model",
    "cuda_graph",
    "explain",
    "export_model",
    "from_pretrained",
    "functional",
    "list_models",
    "load_checkpoint",
    "models",
    "push_to_hub",
    "save_pretrained",
    "swap",
    "swapped",
    "unswap",
    "verify",
]

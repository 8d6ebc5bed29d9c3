"""Drop-in modules: they hold the parameters and call the functions of :mod:`t2t_fast.functional`."""

from .soft_split import Fold, FusedFoldUnfold, SoftComposition, SoftSplit, Unfold
from .t2t_module import T2TModule
from .token_performer import TokenPerformer
from .token_transformer import TokenTransformer

__all__ = [
    "Fold",
    "FusedFoldUnfold",
    "SoftComposition",
    "SoftSplit",
    "T2TModule",
    "TokenPerformer",
    "TokenTransformer",
    "Unfold",
]

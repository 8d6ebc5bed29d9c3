"""Between this package and others: swapping, checkpoints, timm, export."""

from .checkpoints import LoadReport, load_checkpoint, read_state_dict
from .create import create_model
from .export import ExportReport, export_model
from .swap import ModelExplanation, SwapReport, explain, swap, swapped, unswap
from .timm_embed import T2TEmbed

__all__ = [
    "ExportReport",
    "LoadReport",
    "ModelExplanation",
    "SwapReport",
    "T2TEmbed",
    "create_model",
    "explain",
    "export_model",
    "load_checkpoint",
    "read_state_dict",
    "swap",
    "swapped",
    "unswap",
]

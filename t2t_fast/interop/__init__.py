"""Between this package and others: swapping, checkpoints, timm, export, quantisation."""

from .checkpoints import ConvertReport, LoadReport, convert_checkpoint, load_checkpoint, read_state_dict
from .create import create_model
from .export import ExportReport, export_model, write_triton_repository
from .hub import from_pretrained, push_to_hub, save_pretrained
from .quantization import QuantizationReport, backbone_filter, quantization_report
from .swap import ModelExplanation, SwapReport, explain, swap, swapped, unswap
from .timm_embed import T2TEmbed

__all__ = [
    "ConvertReport",
    "ExportReport",
    "LoadReport",
    "ModelExplanation",
    "QuantizationReport",
    "SwapReport",
    "T2TEmbed",
    "backbone_filter",
    "convert_checkpoint",
    "create_model",
    "explain",
    "export_model",
    "from_pretrained",
    "load_checkpoint",
    "push_to_hub",
    "quantization_report",
    "read_state_dict",
    "save_pretrained",
    "swap",
    "swapped",
    "unswap",
    "write_triton_repository",
]

"""Models as files for other runtimes: ONNX, ``torch.export``, AOTInductor, OpenVINO and ONNX with int8 weights."""

from .export import export_model
from .formats import FORMATS, INT8_TOLERANCE, TOLERANCES
from .onnx_files import FORBIDDEN_NODES
from .report import ExportedFile, ExportReport
from .triton import write_triton_repository

__all__ = [
    "FORBIDDEN_NODES",
    "FORMATS",
    "INT8_TOLERANCE",
    "TOLERANCES",
    "ExportReport",
    "ExportedFile",
    "export_model",
    "write_triton_repository",
]

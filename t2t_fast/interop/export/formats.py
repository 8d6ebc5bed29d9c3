"""The formats, by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from . import onnx_files, openvino_files, torch_files
from .source import Runner, Source

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest allowed error of an exported file, relative to the model's largest output."""

INT8_TOLERANCE = 0.1
"""The same for a file with int8 weights. Measured: 0.03 to 0.05 (docs/deployment.md)."""


@dataclass(frozen=True)
class Format:
    """One kind of file.

    Attributes:
        ending: of its name; summary: what it is, in a few words.
        write: writes a :class:`Source` to a path and returns operator -> number of nodes.
        runner: the file at a path as a function of the image.
        extra: of this package; modules, check_modules: what writing needs, and what the check needs besides.
        dtypes: of the models that it can hold; tolerance: if not that of :data:`TOLERANCES`.
        needs: raises if anything else is missing.
    """

    ending: str
    summary: str
    write: Callable[[Source, Path], dict[str, int]]
    runner: Callable[[Path], Runner]
    extra: str = ""
    modules: tuple[str, ...] = ()
    check_modules: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = tuple(TOLERANCES)
    tolerance: float | None = None
    needs: Callable[[], None] = lambda: None

    def largest_error(self, dtype: torch.dtype) -> float:
        """The allowed error of a model of ``dtype``."""
        return TOLERANCES[dtype] if self.tolerance is None else self.tolerance


FORMATS = {
    "onnx": Format(
        ".onnx",
        "ONNX",
        onnx_files.write_onnx,
        onnx_files.runner,
        extra="export",
        modules=("onnx", "onnxscript"),
        check_modules=("onnxruntime",),
        dtypes=(torch.float32, torch.float16),
    ),
    "program": Format(".pt2", "a torch.export program", torch_files.write_program, torch_files.program_runner),
    "aoti": Format(
        ".aoti.pt2",
        "a package compiled by AOTInductor",
        torch_files.write_aoti,
        torch_files.aoti_runner,
        needs=torch_files.needs_compiler,
    ),
    "openvino": Format(
        ".xml",
        "OpenVINO's .xml and .bin",
        openvino_files.write_openvino,
        openvino_files.openvino_runner,
        extra="openvino",
        modules=("openvino",),
        dtypes=(torch.float32, torch.float16),
    ),
    "onnx-int8": Format(
        ".int8.onnx",
        "ONNX with int8 weights",
        onnx_files.write_int8,
        onnx_files.runner,
        extra="export",
        modules=("onnx", "onnxscript", "onnxruntime"),
        dtypes=(torch.float32,),
        tolerance=INT8_TOLERANCE,
    ),
}
"""Name -> :class:`Format`."""


def check_format(name: str, dtype: torch.dtype, check: bool) -> None:
    """Raise unless a model of ``dtype`` can be written in a format here, and compared if ``check``."""
    format = FORMATS[name]
    if dtype not in format.dtypes:
        expected = " or ".join(str(each).removeprefix("torch.") for each in format.dtypes)
        raise ValueError(f"export_model: files of format {name!r} are {expected}, got a model of {dtype}")
    missing = []
    for package in format.modules + (format.check_modules if check else ()):
        try:
            importlib.import_module(package)
        except ImportError:
            missing.append(package)
    if missing:
        raise ImportError(
            f"export_model: format {name!r} needs {', '.join(missing)}: pip install 't2t_fast[{format.extra}]', "
            "or give other formats, such as formats=('program',)"
        )
    format.needs()

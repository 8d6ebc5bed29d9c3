"""A model repository of the Triton Inference Server."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from .report import ExportReport
from .source import output_names

PLATFORMS = {
    "onnx": ('backend: "onnxruntime"', "model.onnx"),
    "onnx-int8": ('backend: "onnxruntime"', "model.onnx"),
    "aoti": ('platform: "torch_aoti"', "model.pt2"),
}
"""Format -> (the line of ``config.pbtxt`` that selects a backend, the file name that it expects)."""

TYPES = {torch.float32: "TYPE_FP32", torch.float16: "TYPE_FP16", torch.bfloat16: "TYPE_BF16"}


def write_triton_repository(report: ExportReport, folder: str | os.PathLike, *, max_batch_size: int = 64) -> Path:
    """Copy the first file that Triton can serve to ``folder/NAME/1``, and write ``folder/NAME/config.pbtxt``.

    Args:
        report: what :func:`export_model` wrote: "onnx", "onnx-int8" or "aoti" (which Triton 26.05 serves as a preview).
        folder: the model repository, created if missing; the model's files in it are replaced.
        max_batch_size: the largest batch that Triton builds, if the file's batch size is free.

    Returns:
        the model's folder.

    Raises:
        ValueError: no file of the report can be served, or its weights are in a second file.
    """
    file = next((file for file in report.files if file.format in PLATFORMS), None)
    if file is None or report.dtype not in TYPES:
        found = ", ".join(file.format for file in report.files)
        raise ValueError(
            f"write_triton_repository: report must hold a file of {', '.join(PLATFORMS)} in float32, float16 or "
            f"bfloat16, got {found} in {report.dtype}"
        )
    if file.path.stat().st_size != file.size:
        raise ValueError(f"write_triton_repository: {file.path} must hold its weights, they are in a second file")
    selected, filename = PLATFORMS[file.format]
    compiled = file.format == "aoti"  # Triton addresses its tensors by their position
    names = output_names(len(report.outputs))
    if compiled:
        names = [f"OUTPUT__{index}" for index in range(len(names))]
    first = 1 if report.dynamic_batch else 0  # with max_batch_size, dims leave the batch out
    shape = tuple(int(size) if size.isdecimal() else -1 for size in report.free_shape)
    text = [f'name: "{report.name}"', selected, f"max_batch_size: {max_batch_size if report.dynamic_batch else 0}"]
    tensors = [("input", "INPUT__0" if compiled else "image", shape)]
    tensors += [("output", name, dims) for name, dims in zip(names, report.outputs, strict=True)]
    for kind, name, dims in tensors:
        listed = ", ".join(map(str, dims[first:]))
        text.append(f'{kind} [{{ name: "{name}" data_type: {TYPES[report.dtype]} dims: [ {listed} ] }}]')
    target = Path(folder) / report.name
    (target / "1").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file.path, target / "1" / filename)
    (target / "config.pbtxt").write_text("\n".join(text) + "\n")
    return target

"""``export_model``: arguments, the cases of the check, and files that appear only after all have succeeded."""

from __future__ import annotations

import itertools
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from ...errors import check_bool, check_pair
from ..checkpoints import unwrap
from .compare import Outputs, compare
from .formats import FORMATS, check_format
from .report import ExportedFile, ExportReport
from .source import Runner, Source, backbone_linears
from .trace import for_inference, output_shapes, outputs, smallest_size, trace

Cases = list[tuple[torch.Tensor, Outputs]]


def export_model(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    name: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int = 3,
    batch: int = 1,
    dynamic_batch: bool = False,
    dynamic_size: bool = False,
    formats: str | Iterable[str] = ("onnx", "program"),
    opset: int = 20,
    check: bool = True,
    progress: Callable[[str], None] | None = None,
) -> ExportReport:
    """Write ``model`` for inference to ``folder / name`` with the ending of each format, and compare with the model.

    The operators of this package are replaced by those of the "aten" backend: the ONNX file contains no custom operator
    and no Im2Col, Col2Im or Einsum, and ``torch.export.load`` reads the program without this package. All files contain
    CPU tensors, regardless of the model's device; ``torch.export.passes.move_to_device_pass`` moves a program. The
    model is exported in eval mode, with its hooks, and not changed (its training flags are restored). Swap an upstream
    model first: upstream's Performer uses Einsum, which is refused in ONNX files.

    Args:
        model: (B, in_chans, H, W) -> a tensor or a tuple of tensors.
        folder: created if missing; files of the same names are replaced after everything has succeeded.
        name: the files' name; by default that of the model's class, in lower case.
        img_size: int or (H, W), fixed in the file unless ``dynamic_size``; by default what the model or a module of it
            has as ``img_size``.
        batch: batch size, fixed in the file unless ``dynamic_batch``.
        dynamic_size: leave H and W free, from the report's ``smallest`` on: square or not, multiples of 16 or not. The
            position table is interpolated in the file. The models of ``create_model`` accept it; upstream's own forward
            adds a table of fixed size.
        formats: of "onnx", "program" (``torch.export.load``), "aoti" (``torch._inductor.aoti_load_package``; compiled
            for this processor), "openvino" and "onnx-int8" (int8 weights in the backbone).
        opset: ONNX opset, at least 18.
        check: compare each file with the model (for ONNX: ``onnx.checker``, then onnxruntime on the CPU), with
            ``dynamic_batch`` and ``dynamic_size`` at other batch and image sizes too.
        progress: called with a short text before each step.

    Returns:
        an :class:`ExportReport`.

    Raises:
        TypeError, ValueError: a bad argument. ImportError: a package that a format needs is not installed.
        RuntimeError: there is no C++ compiler for "aoti", the model does not accept other sizes, a file holds forbidden
        operators, or differs from the model by more than :data:`TOLERANCES` or, for "onnx-int8",
        :data:`INT8_TOLERANCE`. In every case no file is left behind.
    """
    formats = _check_arguments(model, batch, formats, opset)
    check_bool("export_model", "dynamic_batch", dynamic_batch)
    check_bool("export_model", "dynamic_size", dynamic_size)
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"export_model: folder must be a directory, {folder} is a file")
    model = unwrap(model)
    name = type(model).__name__.lower() if name is None else name
    if not re.fullmatch(r"[\w.+-]+", name):
        raise ValueError(f"export_model: name must be a plain file name, got {name!r}")
    size = _image_size(model) if img_size is None else img_size
    height, width = check_pair("export_model", "img_size", size, minimum=1)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for each in formats:
        check_format(each, dtype, check)
    step = progress or (lambda text: None)

    traced = max(batch, 2) if dynamic_batch else batch  # tracing specialises on a batch of 1
    # with free sizes neither the sides nor the position table's grid may be equal, else tracing could rely on it
    sides = (height + 16, width + 32) if dynamic_size else (height, width)
    with for_inference(model) as model, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own deprecation warnings
        step("trace the model")
        sample = _sample((traced, in_chans, *sides), dtype)
        program = (
            _trace_free_sizes(model, sample, dynamic_batch) if dynamic_size else trace(model, sample, dynamic_batch)
        )
        smallest = smallest_size(program)
        batches = sorted({1, traced, traced + 1}) if dynamic_batch else [batch]
        cases: Cases = []
        if check:
            sizes = _sizes((height, width), smallest) if dynamic_size else [(height, width)] * len(batches)
            for count, pair in zip(itertools.cycle(batches), sizes, strict=False):
                x = _sample((count, in_chans, *pair), dtype)
                cases.append((x, outputs(model(x))))
        weights = [layer.weight for layer in backbone_linears(model).values()]
        files = _write(Source(program, opset, weights), folder, name, formats, cases, dtype, step)
    shape = (traced, in_chans, height, width)
    return ExportReport(name, shape, dynamic_batch, dtype, tuple(files), dynamic_size, smallest, output_shapes(program))


def _check_arguments(model: Any, batch: Any, formats: Any, opset: Any) -> tuple[str, ...]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"export_model: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"export_model: batch must be an int of at least 1, got {batch!r}")
    formats = (formats,) if isinstance(formats, str) else tuple(formats)
    if not formats or not set(formats) <= set(FORMATS):
        raise ValueError(f"export_model: formats must be of {', '.join(FORMATS)}, got {formats!r}")
    if not isinstance(opset, int) or opset < 18:
        raise ValueError(f"export_model: opset must be an int of at least 18, got {opset!r}")
    return tuple(dict.fromkeys(formats))


def _image_size(model: nn.Module) -> Any:
    for module in model.modules():
        size = getattr(module, "img_size", None)
        if size is not None:
            return size
    raise ValueError("export_model: img_size is needed, since no module of the model has an attribute img_size")


def _sample(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _sizes(size: tuple[int, int], smallest: tuple[int, int]) -> list[tuple[int, int]]:
    """Image sizes for the check: the model's own, the smallest, and others, square or not, multiples of 16 or not."""
    height, width = (max(pair) for pair in zip(size, smallest, strict=True))
    return [(height, width), smallest, (height + 21, width + 5), (smallest[0] + 9, width + 16)]


def _trace_free_sizes(model: nn.Module, sample: torch.Tensor, dynamic_batch: bool) -> ExportedProgram:
    """:func:`trace` with free sizes, or an error that says what to do."""
    advice = "; build a T2T-ViT by t2t_fast.create_model, and load its weights by t2t_fast.load_checkpoint"
    what = f"export_model: dynamic_size=True needs a model that accepts images of any size, and {type(model).__name__}"
    odd = sample[:1, :, 11:, 27:]
    try:
        model(odd)
    except (RuntimeError, ValueError, AssertionError) as error:
        shape = "x".join(map(str, odd.shape[2:]))
        raise RuntimeError(f"{what} fails for {shape} ({_first_line(error)}){advice}") from error
    try:
        return trace(model, sample, dynamic_batch, dynamic_size=True)
    except torch._dynamo.exc.UserError as error:
        raise RuntimeError(f"{what} fixes one ({_first_line(error)}){advice}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _write(
    source: Source,
    folder: Path,
    name: str,
    formats: Sequence[str],
    cases: Cases,
    dtype: torch.dtype,
    step: Callable[[str], None],
) -> list[ExportedFile]:
    """Write and check all files in a temporary folder, then move them into place."""
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as scratch:
            files = []
            for format in formats:
                kind, part = FORMATS[format], Path(scratch) / format
                part.mkdir()
                path = part / (name + kind.ending)
                step(f"write {kind.summary}")
                nodes = kind.write(source, path)
                found: tuple[Any, ...] = ()
                if cases:
                    step(f"compare {path.name} with the model")
                    found = _checked(format, kind.runner(path), cases, kind.largest_error(dtype))
                size = sum(each.stat().st_size for each in part.iterdir())
                files.append(ExportedFile(format, folder / path.name, size, nodes, *found))
            for each in Path(scratch).glob("*/*"):
                each.replace(folder / each.name)
    finally:
        if created and not any(folder.iterdir()):
            folder.rmdir()
    return files


def _checked(format: str, run: Runner, cases: Cases, tolerance: float) -> tuple[Any, ...]:
    """Shapes and errors for :class:`ExportedFile`."""
    found = compare(run, cases, f"export_model: the {format} file")
    if not found.max_rel_error <= tolerance:
        raise RuntimeError(
            f"export_model: the {format} file differs from the model by {found.max_rel_error:.1e} of the largest "
            f"output, allowed {tolerance:.0e}"
        )
    return tuple(tuple(x.shape) for x, _ in cases), *found

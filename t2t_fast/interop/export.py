"""Models as files for other runtimes: ONNX, and ``torch.export`` programs of plain ATen operators."""

from __future__ import annotations

import copy
import importlib
import os
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..backends import backend, implementation, operators
from ..errors import check_pair
from .checkpoints import unwrap

FORMATS = {"onnx": ".onnx", "program": ".pt2"}
"""Format -> file name ending: ONNX, and a program that ``torch.export.load`` reads."""

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest allowed error of an exported file, relative to the model's largest output."""

FORBIDDEN_NODES = ("Im2Col", "Col2Im", "Einsum")
"""ONNX nodes that many runtimes do not support, or run slowly."""

SINGLE_FILE_LIMIT = 1_900_000_000
"""Bytes of weights beyond which ONNX, limited to 2 GB a file, keeps them in a second file."""


@dataclass(frozen=True)
class ExportedFile:
    """One written file.

    Attributes:
        format: "onnx" or "program"; path, size: the file and its bytes (weights kept in a second file included).
        nodes: operator -> number of nodes.
        batches: batch sizes at which the file was compared with the model, none without a check.
        max_abs_error, max_rel_error: largest difference from the model's output, and that divided by the largest
            output; ``None`` without a check.
    """

    format: str
    path: Path
    size: int
    nodes: dict[str, int]
    batches: tuple[int, ...] = ()
    max_abs_error: float | None = None
    max_rel_error: float | None = None


@dataclass(frozen=True)
class ExportReport:
    """What :func:`export_model` wrote; ``str()`` is a table.

    Attributes:
        name: the files' name; input_shape: (B, C, H, W) of the input; dynamic_batch: whether B is dynamic.
        dtype: of input and weights; files: one :class:`ExportedFile` for each format.
    """

    name: str
    input_shape: tuple[int, int, int, int]
    dynamic_batch: bool
    dtype: torch.dtype
    files: tuple[ExportedFile, ...]

    def __str__(self):
        shape = ("batch" if self.dynamic_batch else str(self.input_shape[0]), *map(str, self.input_shape[1:]))
        dtype = str(self.dtype).removeprefix("torch.")
        table = [("format", "file", "MB", "nodes", "max abs error", "max rel error", "checked at batch")]
        for file in self.files:
            error = ("-", "-", "not checked")
            if file.batches:
                error = (f"{file.max_abs_error:.1e}", f"{file.max_rel_error:.1e}", ", ".join(map(str, file.batches)))
            table.append((file.format, str(file.path), f"{file.size / 1e6:.2f}", str(sum(file.nodes.values())), *error))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [f"{self.name}: input ({', '.join(shape)}) {dtype}"]
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
        for file in self.files:
            nodes = sorted(file.nodes.items(), key=lambda item: (-item[1], item[0]))
            lines.append(f"{file.format} nodes: " + ", ".join(f"{op} {count}" for op, count in nodes))
        return "\n".join(line.rstrip() for line in lines)


def export_model(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    name: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int = 3,
    batch: int = 1,
    dynamic_batch: bool = False,
    formats: str | Iterable[str] = ("onnx", "program"),
    opset: int = 20,
    check: bool = True,
) -> ExportReport:
    """Write ``model`` for inference to ``folder / name`` with the ending of each format, and compare with the model.

    The operators of this package are replaced by those of the "aten" backend: the ONNX file contains no custom operator
    and no Im2Col, Col2Im or Einsum, and ``torch.export.load`` reads the program without this package. Both contain CPU
    tensors, regardless of the model's device; ``torch.export.passes.move_to_device_pass`` moves a program. The model is
    exported in eval mode, with its hooks, and not changed (its training flags are restored). Swap an upstream model
    first: upstream's Performer uses Einsum, which is refused in ONNX files.

    Args:
        model: (B, in_chans, H, W) -> a tensor or a tuple of tensors.
        folder: created if missing; files of the same names are replaced after everything has succeeded.
        name: the files' name; by default that of the model's class, in lower case.
        img_size: int or (H, W), fixed in the file; by default what the model or a module of it has as ``img_size``.
        batch: batch size, fixed in the file unless ``dynamic_batch``.
        formats: of "onnx" and "program".
        opset: ONNX opset, at least 18.
        check: compare each file with the model (for ONNX: ``onnx.checker``, then onnxruntime on the CPU), with
            ``dynamic_batch`` at other batch sizes too.

    Returns:
        an :class:`ExportReport`.

    Raises:
        TypeError, ValueError: a bad argument. ImportError: a package that a format needs is not installed.
        RuntimeError: a file holds forbidden operators, or differs from the model by more than :data:`TOLERANCES`.
        In every case no file is left behind.
    """
    formats = _check_arguments(model, batch, formats, opset)
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
    if "onnx" in formats:
        _check_onnx(dtype, check)

    traced = max(batch, 2) if dynamic_batch else batch  # tracing specialises on a batch of 1
    batches = sorted({1, traced, traced + 1}) if dynamic_batch else [batch]
    with _for_inference(model) as model:
        inputs = {size: _sample((size, in_chans, height, width), dtype) for size in batches}
        expected = {size: _outputs(model(x)) for size, x in inputs.items()} if check else {}
        program = _trace(model, inputs[traced], dynamic_batch)
        cases = [(x, expected[size]) for size, x in inputs.items()] if check else []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters' own deprecation warnings
            files = _write(program, folder, name, formats, opset, cases, TOLERANCES[dtype])
    return ExportReport(name, (traced, in_chans, height, width), dynamic_batch, dtype, tuple(files))


def _check_arguments(model, batch, formats, opset):
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


def _check_onnx(dtype, check):
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"export_model: ONNX files are float32 or float16, got a model of {dtype}")
    missing = []
    for package in ("onnx", "onnxscript", "onnxruntime") if check else ("onnx", "onnxscript"):
        try:
            importlib.import_module(package)
        except ImportError:
            missing.append(package)
    if missing:
        raise ImportError(
            f"export_model: format 'onnx' needs {', '.join(missing)}: pip install 't2t_fast[export]', "
            "or give formats=('program',)"
        )


def _image_size(model):
    for module in model.modules():
        size = getattr(module, "img_size", None)
        if size is not None:
            return size
    raise ValueError("export_model: img_size is needed, since no module of the model has an attribute img_size")


def _sample(shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _outputs(value):
    """A model's result as a tuple of tensors."""
    values = value if isinstance(value, (tuple, list)) else (value,)
    if not all(isinstance(each, torch.Tensor) for each in values):
        raise TypeError("export_model: model must return a tensor or a tuple of tensors")
    return tuple(values)


@contextmanager
def _for_inference(model):
    """The model in eval mode on the CPU: itself, or a copy if it is on another device."""
    if any(tensor.device.type != "cpu" for tensor in (*model.parameters(), *model.buffers())):
        model = copy.deepcopy(model).cpu()
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            yield model
    finally:
        for module, mode in modes:
            module.training = mode


def _trace(model, sample, dynamic_batch):
    """An ``ExportedProgram`` of ATen operators, without references to source files."""
    shapes = ({0: torch.export.Dim("batch")},) if dynamic_batch else None

    def plain(op):
        return lambda *args: implementation(op, args[-1]).call(*args[:-1])

    with backend("aten"):
        program = torch.export.export(model, (sample,), dynamic_shapes=shapes)
        table = {getattr(torch.ops.t2t_fast, op).default: plain(op) for op in operators()}
        program = program.run_decompositions(table)
    foreign = set()
    for node in _program_nodes(program):
        for key in ("stack_trace", "from_node"):
            node.meta.pop(key, None)
        # The traced strides are not always those at run time (for a batch of 1 several are valid), and view() fails for
        # strides that do not fit.
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace != "aten":
            foreign.add(str(node.target))
    if foreign:
        raise RuntimeError(f"export_model: only ATen operators can be exported, got {', '.join(sorted(foreign))}")
    program.graph_module.recompile()
    return program


def _program_nodes(program):
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            yield from module.graph.nodes


def _write(program, folder, name, formats, opset, cases, tolerance):
    """Write and check all files in a temporary folder, then move them into place."""
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as scratch:
            written = []
            for format in formats:
                path = Path(scratch) / (name + FORMATS[format])
                nodes = _write_onnx(program, path, opset) if format == "onnx" else _write_program(program, path)
                run = _onnx_runner if format == "onnx" else _program_runner
                checked = _compare(format, run(path), cases, tolerance) if cases else ()
                written.append((format, path.name, nodes, *checked))
            sizes = Counter()
            for part in Path(scratch).iterdir():
                sizes[part.name.removesuffix(".data")] += part.stat().st_size
                part.replace(folder / part.name)
    finally:
        if created and not any(folder.iterdir()):
            folder.rmdir()
    return [ExportedFile(format, folder / file, sizes[file], *rest) for format, file, *rest in written]


def _compare(format, run, cases, tolerance):
    """Compare a written file with the model's outputs: batches and errors for :class:`ExportedFile`."""
    worst, relative, batches = 0.0, 0.0, []
    for x, expected in cases:
        got = run(x)
        if [each.shape for each in got] != [each.shape for each in expected]:
            raise RuntimeError(f"export_model: the {format} file returns other shapes than the model")
        for ours, theirs in zip(got, expected, strict=True):
            difference = torch.nan_to_num((ours.double() - theirs.double()).abs(), nan=torch.inf).max().item()
            worst = max(worst, difference)
            relative = max(relative, difference / max(theirs.double().abs().max().item(), 1e-30))
        batches.append(x.shape[0])
    if not relative <= tolerance:
        raise RuntimeError(
            f"export_model: the {format} file differs from the model by {relative:.1e} of the largest output, "
            f"allowed {tolerance:.0e}"
        )
    return tuple(batches), worst, relative


def _write_program(program, path):
    torch.export.save(program, path)
    calls = (node for node in _program_nodes(program) if node.op == "call_function")
    return dict(Counter(getattr(node.target, "__name__", str(node.target)) for node in calls))


def _program_runner(path):
    program = torch.export.load(path).module()
    return lambda x: _outputs(program(x))


def _write_onnx(program, path, opset):
    import onnx

    count = len(program.graph_signature.user_outputs)
    exported = torch.onnx.export(
        program,
        (),
        dynamo=True,
        opset_version=opset,
        input_names=["image"],
        output_names=["output"] if count == 1 else [f"output{index}" for index in range(count)],
        verbose=False,
    )
    proto = exported.model_proto
    _tidy(proto)
    large = sum(value.numel() * value.element_size() for value in program.state_dict.values()) > SINGLE_FILE_LIMIT
    onnx.save_model(proto, str(path), save_as_external_data=large, location=path.name + ".data")
    onnx.checker.check_model(str(path), full_check=True)
    nodes = Counter(node.op_type for node in proto.graph.node)
    foreign = {f"{node.domain}::{node.op_type}" for node in proto.graph.node if node.domain not in ("", "ai.onnx")}
    foreign |= {f"{function.domain}::{function.name}" for function in proto.functions}
    foreign |= set(FORBIDDEN_NODES) & set(nodes)
    if foreign:
        names = ", ".join(sorted(foreign))
        raise RuntimeError(
            f"export_model: the ONNX file must hold plain operators only, got {names}; if they come from upstream's "
            "own T2T module, swap the model first"
        )
    return dict(nodes)


def _tidy(proto):
    """Name the dynamic batch dimension, and remove the exporter's metadata, which contain local paths."""
    batch = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        del value.metadata_props[:]
        for dim in value.type.tensor_type.shape.dim:
            if batch and dim.dim_param:
                dim.dim_param = re.sub(rf"\b{re.escape(batch)}\b", "batch", dim.dim_param)
    for holder in (proto, proto.graph, *proto.graph.node):
        del holder.metadata_props[:]


def _onnx_runner(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: tuple(torch.from_numpy(y) for y in session.run(None, {"image": x.numpy()}))

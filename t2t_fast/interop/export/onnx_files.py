"""ONNX files, in the model's dtype or with int8 weights."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from .source import Runner, Source

FORBIDDEN_NODES = ("Im2Col", "Col2Im", "Einsum")
"""ONNX nodes that many runtimes do not support, or run slowly."""

SINGLE_FILE_LIMIT = 1_900_000_000
"""Bytes of weights beyond which ONNX, limited to 2 GB a file, keeps them in a second file."""


def write_onnx(source: Source, path: Path) -> dict[str, int]:
    """Write the model in its dtype; returns operator -> number of nodes."""
    _save(source, path)
    return _check(path)


def write_int8(source: Source, path: Path) -> dict[str, int]:
    """Write the model with int8 matrix products in the backbone; returns operator -> number of nodes.

    Weights have one scale per output channel. Activations are quantised as a whole at run time, each call by its own
    range. Both are unsigned: on x86 without VNNI, signed weights overflow the 16-bit sums of the product.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain = path.with_suffix(".float")
    _save(source, plain)
    quantize_dynamic(
        plain,
        path,
        weight_type=QuantType.QUInt8,
        per_channel=True,
        nodes_to_quantize=_backbone_products(source),
        use_external_data_format=_large(source),
    )
    for part in (plain, _second(plain)):
        part.unlink(missing_ok=True)
    return _check(path)


def runner(path: Path) -> Runner:
    """The file in ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: tuple(torch.from_numpy(y) for y in session.run(None, {"image": x.numpy()}))


def _large(source: Source) -> bool:
    return source.weight_bytes > SINGLE_FILE_LIMIT


def _second(path: Path) -> Path:
    return path.with_name(path.name + ".data")


def _save(source: Source, path: Path) -> None:
    import onnx

    _tidy(source.onnx)
    # a copy, since saving external data removes them from the message
    proto = onnx.ModelProto()
    proto.CopyFrom(source.onnx)
    onnx.save_model(proto, str(path), save_as_external_data=_large(source), location=_second(path).name)


def _tidy(proto: Any) -> None:
    """Name the free axes of the image, and remove the exporter's metadata, which contain local paths."""
    axes = proto.graph.input[0].type.tensor_type.shape.dim
    names = {axis.dim_param: name for axis, name in zip(axes, ("batch", "", "height", "width"), strict=False)}
    symbols = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in names if symbol) or "$^")
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        del value.metadata_props[:]
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = symbols.sub(lambda match: names[match[0]], dim.dim_param)
    for holder in (proto, proto.graph, *proto.graph.node):
        del holder.metadata_props[:]


def _check(path: Path) -> dict[str, int]:
    """Raise unless the file holds plain operators only; operator -> number of nodes."""
    import onnx

    onnx.checker.check_model(str(path), full_check=True)
    proto = onnx.load(str(path), load_external_data=False)
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


def _backbone_products(source: Source) -> list[str]:
    """The names of the nodes that multiply by a weight of the backbone.

    The exporter renames weights and transposes them, so they are recognised by their values.
    """
    from onnx import numpy_helper

    def key(array: Any) -> tuple[Any, ...]:
        return array.shape, array.tobytes()

    known = set()
    for weight in source.linear_weights:
        array = weight.detach().cpu().numpy()
        known |= {key(array), key(array.T.copy())}
    graph = source.onnx.graph
    weights = {each.name for each in graph.initializer if key(numpy_helper.to_array(each)) in known}
    found = [node.name for node in graph.node if node.op_type in ("MatMul", "Gemm") and weights & set(node.input[1:2])]
    found += [f"{name}_MatMul" for name in found]  # the quantiser's name for the product of a Gemm
    if not found:
        raise RuntimeError("export_model: format 'onnx-int8' found no matrix product of the backbone to quantise")
    return found

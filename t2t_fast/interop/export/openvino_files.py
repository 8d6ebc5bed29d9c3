"""OpenVINO's IR: an .xml file and its weights in a .bin file."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import torch
from torch.export import ExportedProgram

from .source import Runner, Source, output_names
from .trace import image_size


def write_openvino(source: Source, path: Path) -> dict[str, int]:
    """Write both files, in the weights' dtype; returns operator -> number of nodes."""
    import openvino

    converted = openvino.convert_model(_scaled_queries(source.program))
    # the conversion leaves every size free, and OpenVINO then copies what it could read in another layout
    converted.reshape([size if isinstance(size, int) else -1 for size in image_size(source.program)])
    converted.inputs[0].get_tensor().set_names({"image"})
    for output, name in zip(converted.outputs, output_names(len(converted.outputs)), strict=True):
        output.get_tensor().set_names({name})
    openvino.save_model(converted, path, compress_to_fp16=False)
    return dict(Counter(node.get_type_name() for node in converted.get_ops()))


def openvino_runner(path: Path) -> Runner:
    """The file in OpenVINO on the CPU."""
    import openvino

    # without the hint OpenVINO computes in bfloat16 on processors that have it
    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: tuple(torch.from_numpy(y.copy()) for y in model(x.numpy()).values())


def _scaled_queries(program: ExportedProgram) -> ExportedProgram:
    """The program with the scale of every attention applied to its queries.

    OpenVINO 2026.4 takes the default scale instead of the given one where queries, keys and values are transposed, as
    in the T2T module's transformer; there the scale is that of the wider input tokens.
    """
    program = program.run_decompositions({})  # a copy
    graph = program.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.scaled_dot_product_attention.default and node.kwargs.get("scale") is not None:
            query = node.args[0]
            factor = node.kwargs["scale"] * query.meta["val"].shape[-1] ** 0.5
            if not math.isclose(factor, 1):
                with graph.inserting_before(node):
                    scaled = graph.call_function(torch.ops.aten.mul.Tensor, (query, factor))
                scaled.meta = {"val": query.meta["val"]}
                node.args = (scaled, *node.args[1:])
            node.kwargs = {name: value for name, value in node.kwargs.items() if name != "scale"}
    program.graph_module.recompile()
    return program

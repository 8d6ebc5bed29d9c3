"""OpenVINO's IR: an .xml file and its weights in a .bin file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from .source import Runner, Source, output_names


def write_openvino(source: Source, path: Path) -> dict[str, int]:
    """Write both files, in the weights' dtype; returns operator -> number of nodes."""
    import openvino

    converted = openvino.convert_model(source.program)
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

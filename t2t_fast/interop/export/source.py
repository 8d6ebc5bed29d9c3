"""What every format is written from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from ...modules import T2TModule
from ...modules.token_layer import TokenLayer
from .compare import Outputs

Runner = Callable[[torch.Tensor], Outputs]


@dataclass(frozen=True)
class Source:
    """A program, with the opset of ONNX files and the weights that an int8 file may quantise."""

    program: ExportedProgram
    opset: int
    linear_weights: Sequence[torch.Tensor]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(value.numel() * value.element_size() for value in self.program.state_dict.values())

    @cached_property
    def onnx(self) -> Any:
        """The program as an ``onnx.ModelProto``, with the exporter's names and metadata."""
        count = len(self.program.graph_signature.user_outputs)
        exported: Any = torch.onnx.export(
            self.program,
            (),
            dynamo=True,
            opset_version=self.opset,
            input_names=["image"],
            output_names=output_names(count),
            verbose=False,
        )
        return exported.model_proto


def output_names(count: int) -> list[str]:
    """The names of a file's outputs."""
    return ["output"] if count == 1 else [f"output{index}" for index in range(count)]


def backbone_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """All Linear layers outside the T2T module by name, those that int8 weights suit.

    The T2T module's statistics are differences of close numbers, and its exponentials enlarge the error of an exponent.
    """
    inside = {
        child for module in model.modules() if isinstance(module, (TokenLayer, T2TModule)) for child in module.modules()
    }
    return {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear) and each not in inside}

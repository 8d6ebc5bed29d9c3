"""A model as a ``torch.export`` program of plain ATen operators."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from ...backends import backend, implementation, operators
from .simplify import fold_constants, keep_needed_tokens


def outputs(value: Any) -> tuple[torch.Tensor, ...]:
    """A model's result as a tuple of tensors."""
    values = value if isinstance(value, (tuple, list)) else (value,)
    if not all(isinstance(each, torch.Tensor) for each in values):
        raise TypeError("export_model: model must return a tensor or a tuple of tensors")
    return tuple(values)


@contextmanager
def for_inference(model: nn.Module) -> Iterator[nn.Module]:
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


def trace(model: nn.Module, sample: torch.Tensor, dynamic_batch: bool, dynamic_size: bool = False) -> ExportedProgram:
    """The program, without references to source files."""
    free: dict[int, Any] = {0: torch.export.Dim("batch")} if dynamic_batch else {}
    if dynamic_size:
        # The range follows from the model: a grid of one token along an axis is another program.
        free |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}

    def plain(op: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            found = implementation(op, args[-1])
            return (found.graph or found.call)(*args[:-1])

        return call

    with backend("aten"):
        program = torch.export.export(model, (sample,), dynamic_shapes=(free,) if free else None)
        table = {getattr(torch.ops.t2t_fast, op).default: plain(op) for op in operators()}
        program = program.run_decompositions(table)
    foreign = set()
    nodes: list[Any] = list(program_nodes(program))
    for node in nodes:
        for key in ("stack_trace", "from_node"):
            node.meta.pop(key, None)
        if node.target is torch.ops.aten._assert_tensor_metadata.default:  # true for every image of the traced dtype
            node.graph.erase_node(node)
        if node.target is torch.ops.aten.slice.Tensor and node.args[2:] == (0, sys.maxsize):
            node.replace_all_uses_with(node.args[0])
        # The traced strides are not always those at run time (for a batch of 1 several are valid), and view() fails for
        # strides that do not fit.
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace != "aten":
            foreign.add(str(node.target))
    if foreign:
        raise RuntimeError(f"export_model: only ATen operators can be exported, got {', '.join(sorted(foreign))}")
    keep_needed_tokens(program)
    fold_constants(program)
    return program


def image_size(program: ExportedProgram) -> torch.Size:
    """The size (B, C, H, W) of a program's image, symbols where it is free."""
    image = next(node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs)
    size: torch.Size = image.meta["val"].shape
    return size


def smallest_size(program: ExportedProgram) -> tuple[int, int]:
    """The smallest (H, W) of a program's image."""
    sizes = []
    for size in image_size(program)[2:]:
        found = program.range_constraints.get(size.node.expr) if isinstance(size, torch.SymInt) else None
        sizes.append(int(size) if found is None else max(1, int(found.lower)))
    return sizes[0], sizes[1]


def output_shapes(program: ExportedProgram) -> tuple[tuple[int, ...], ...]:
    """The shape of each output, -1 where it is free."""
    names = program.graph_signature.user_outputs
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.name in names}
    return tuple(tuple(n if isinstance(n, int) else -1 for n in values[name].shape) for name in names)


def program_nodes(program: ExportedProgram) -> Iterator[torch.fx.Node]:
    """The nodes of a program and of its nested graphs."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            yield from module.graph.nodes

"""What other runtimes cannot find out from a program: weights to fold, and tokens that the outputs do not need."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node
from torch.fx.node import map_arg

aten = torch.ops.aten

VIEWS = {
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
}
"""Operators that leave the values of a weight as they are; runtimes apply them once, to the stored weight."""


def fold_constants(program: ExportedProgram) -> None:
    """Replace everything that is computed from weights alone by its value, and drop the weights that are not used then.

    Changes the program in place. Operators of :data:`VIEWS` alone are left as they are, and so is what has a free size.
    """
    signature, graph = program.graph_signature, program.graph
    weights = {
        spec.arg.name: program.state_dict[spec.target]
        if spec.kind != InputKind.CONSTANT_TENSOR and spec.target in program.state_dict
        else program.constants[spec.target]
        for spec in signature.input_specs
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    }
    values: dict[Node, Any] = {node: weights[node.name] for node in graph.nodes if node.name in weights}
    computed: set[Node] = set()
    with torch.no_grad():
        for node in graph.nodes:
            if node.op == "call_function" and _is_constant(node, values):
                values[node] = node.target(*map_arg(node.args, values.get), **map_arg(node.kwargs, values.get))
                if node.target not in VIEWS or any(each in computed for each in node.all_input_nodes):
                    computed.add(node)
    last = [node for node in computed if isinstance(values[node], torch.Tensor) and not computed.issuperset(node.users)]
    image = next(node for node in graph.nodes if node.name in signature.user_inputs)
    before = next(i for i, spec in enumerate(signature.input_specs) if spec.kind == InputKind.USER_INPUT)
    for index, node in enumerate(sorted(last)):
        name = f"folded_{index}"
        value = values[node].detach().clone(memory_format=torch.contiguous_format)
        with graph.inserting_before(image):
            constant = graph.placeholder(name)
        constant.meta["val"] = node.meta["val"].clone(memory_format=torch.contiguous_format)
        node.replace_all_uses_with(constant)
        spec = InputSpec(InputKind.BUFFER, TensorArgument(constant.name), name, persistent=True)
        signature.input_specs.insert(before + index, spec)
        program.state_dict[name] = value
    graph.eliminate_dead_code()
    _drop_unused(program, weights)
    program.graph_module.recompile()


def _is_constant(node: Node, values: dict[Node, Any]) -> bool:
    """Whether a node's value follows from ``values`` and is the same at every call."""
    target, found = node.target, node.meta.get("val")
    if isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable
    ):
        return False
    sizes = [size for each in (found if isinstance(found, (tuple, list)) else (found,)) for size in _shape(each)]
    return all(isinstance(size, int) for size in sizes) and values.keys() >= set(node.all_input_nodes)


def _shape(value: Any) -> tuple[Any, ...]:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else (None,)  # a size is not constant


def _drop_unused(program: ExportedProgram, weights: dict[str, Any]) -> None:
    """Remove the weights without a user from the program."""
    unused = {node.name: node for node in program.graph.nodes if node.name in weights and not node.users}
    specs = program.graph_signature.input_specs
    targets = {spec.target for spec in specs if spec.arg.name in unused}
    specs[:] = [spec for spec in specs if spec.arg.name not in unused]
    for target in targets - {spec.target for spec in specs}:
        program.state_dict.pop(target, None)
        program.constants.pop(target, None)
    for node in unused.values():
        program.graph.erase_node(node)


class Kept(NamedTuple):
    """The part of a tensor that is needed: ``start:stop`` along ``dim``."""

    dim: int
    start: int
    stop: int


def keep_needed_tokens(program: ExportedProgram) -> None:
    """Compute only the tokens that the outputs need; changes the program in place.

    A classifier reads one token of the last block's output. That token needs all keys and values, but only its own
    query, projection and MLP.
    """
    needs: dict[Node, Kept] = {}
    graph = program.graph
    graph.eliminate_dead_code()
    for node in reversed(graph.nodes):
        rule = _RULES.get(node.target)
        if rule is None or not isinstance(node.meta.get("val"), torch.Tensor | tuple | list):
            continue
        wanted = {_wanted(user, node, needs) for user in node.users}
        if len(wanted) == 1 and (kept := wanted.pop()) is not None and rule(node, kept) is not None:
            needs[node] = kept
    # only now, since a selection is checked against sizes that change
    taken = {node: kept for node in graph.nodes if (kept := _selection(node)) is not None and node.args[0] in needs}
    rules = {node: _RULES[node.target](node, kept) or {} for node, kept in needs.items()}
    for node, parts in rules.items():
        _narrow(node, needs, parts)
    for node, kept in taken.items():
        if node.target is aten.slice.Tensor:
            node.replace_all_uses_with(node.args[0])
        else:
            node.args = (node.args[0], kept.dim, 0)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _selection(node: Any) -> Kept | None:
    """What a node that takes a fixed part of its input needs of it."""
    if node.target is aten.select.int:
        dim, start = node.args[1:3]
        stop = start + 1 if isinstance(start, int) else None
    elif node.target is aten.slice.Tensor and len(node.args) == 4:
        dim, start, stop = node.args[1:4]
    else:
        return None
    if not (isinstance(start, int) and isinstance(stop, int) and 0 <= start < stop < sys.maxsize):
        return None
    value = node.args[0].meta["val"]
    inside = stop == 1 or _known(stop <= value.shape[dim])
    return Kept(dim % value.ndim, start, stop) if inside else None


def _wanted(user: Node, node: Node, needs: dict[Node, Kept]) -> Kept | None:
    """What ``user`` needs of ``node``; ``None``: all."""
    if user in needs:
        parts = _RULES[user.target](user, needs[user])
        return parts.get(node) if parts else None
    return _selection(user) if user.args and user.args[0] is node else None


def _narrow(node: Node, needs: dict[Node, Kept], parts: dict[Node, Kept]) -> None:
    """Let a node compute its needed part only; parts: what it needs of its inputs."""
    kept, graph = needs[node], node.graph
    for source, part in parts.items():
        if source not in needs:
            with graph.inserting_before(node):
                taken = graph.call_function(aten.slice.Tensor, (source, *part))
            taken.meta["val"] = _part(source.meta["val"], part)
            node.replace_input_with(source, taken)
    if _RULES[node.target] is _reshaped:
        shape: Any = list(node.args[1])  # type: ignore[arg-type]
        shape[kept.dim] = kept.stop - kept.start
        node.args = (node.args[0], shape)
    value = node.meta["val"]
    node.meta["val"] = _part(value, kept) if isinstance(value, torch.Tensor) else [_part(each, kept) for each in value]


def _part(value: torch.Tensor, kept: Kept) -> torch.Tensor:
    return value.new_empty([*value.shape[: kept.dim], kept.stop - kept.start, *value.shape[kept.dim + 1 :]])


Rule = Callable[[Node, Kept], "dict[Node, Kept] | None"]


def _elementwise(node: Node, kept: Kept) -> dict[Node, Kept] | None:
    found, out = {}, node.meta["val"]
    for each in node.all_input_nodes:
        value = each.meta["val"]
        if not isinstance(value, torch.Tensor):
            return None
        dim = kept.dim - out.ndim + value.ndim  # operands with fewer dimensions, or of size 1 there, stay as they are
        if dim >= 0 and not (isinstance(value.shape[dim], int) and value.shape[dim] == 1):
            found[each] = kept._replace(dim=dim)
    return found


def _linear(node: Node, kept: Kept) -> dict[Node, Kept] | None:
    source: Any = node.args[0]
    return {source: kept} if kept.dim < source.meta["val"].ndim - 1 else None


def _normalised(node: Any, kept: Kept) -> dict[Node, Kept] | None:
    source, shape = node.args[:2]
    return {source: kept} if kept.dim < source.meta["val"].ndim - len(shape) else None


def _result(node: Node, kept: Kept) -> dict[Node, Kept] | None:
    """The normalised tokens of native_layer_norm, if nobody reads its statistics."""
    source: Any = node.args[0]
    if source.target is not aten.native_layer_norm.default or len(source.users) > 1 or node.args[1] != 0:
        return None
    return {source: kept} if _normalised(source, kept) else None


def _transposed(node: Any, kept: Kept) -> dict[Node, Kept] | None:
    source: Any = node.args[0]
    order = list(range(source.meta["val"].ndim))
    if node.target is aten.permute.default:
        order = [dim % len(order) for dim in node.args[1]]
    else:
        a, b = (dim % len(order) for dim in node.args[1:3])
        order[a], order[b] = order[b], order[a]
    return {source: kept._replace(dim=order[kept.dim])}


def _reshaped(node: Node, kept: Kept) -> dict[Node, Kept] | None:
    """Where the dimensions up to the kept one stay as they are."""
    source: Any = node.args[0]
    before, after = source.meta["val"].shape, node.meta["val"].shape
    same = kept.dim + 1 < min(len(before), len(after)) and all(
        _known(a == b) for a, b in zip(before[: kept.dim + 1], after[: kept.dim + 1], strict=True)
    )
    return {source: kept} if same else None


def _known(condition: Any) -> bool:
    """Whether a condition on sizes holds for all sizes."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def _queries(node: Node, kept: Kept) -> dict[Node, Kept] | None:
    """Attention without a mask, whose queries are independent of each other."""
    plain = len(node.args) == 3 and set(node.kwargs) <= {"scale"} and node.meta["val"].ndim == 4 and kept.dim == 2
    query: Any = node.args[0]
    return {query: kept} if plain and query not in node.args[1:] else None


_RULES: dict[Any, Rule] = {
    **dict.fromkeys((aten.add.Tensor, aten.mul.Tensor, aten.gelu.default, aten.relu.default), _elementwise),
    **dict.fromkeys((aten.native_layer_norm.default, aten.layer_norm.default), _normalised),
    operator.getitem: _result,
    aten.linear.default: _linear,
    **dict.fromkeys((aten.transpose.int, aten.permute.default), _transposed),
    **dict.fromkeys((aten.view.default, aten.reshape.default), _reshaped),
    aten.scaled_dot_product_attention.default: _queries,
}

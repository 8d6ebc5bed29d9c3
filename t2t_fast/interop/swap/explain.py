"""The backend of each fast module in a model, or why the module is not fused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ... import backends
from ...errors import BackendUnavailable
from ...modules import TokenTransformer
from ...modules.block import Fused
from ...modules.windowed import Windowed
from .rules import FAST, RULES


def backend_of(module: Any) -> str:
    """The backend of a fast module's main operator for the device and dtype of its parameters.

    "PyTorch" if its own functions do the work; "unfused: " and the reason if the module calls its children one by one;
    "none" if no backend is available.
    """
    why = module.obstacle() if hasattr(module, "obstacle") else None
    if why is not None:
        return f"unfused: {why}"
    operators = {rule.form.kind: rule.operator for rule in RULES}
    op = next(operators[cls] for cls in type(module).__mro__ if cls in operators)
    if not op:
        return "PyTorch"
    tensor = next(module.parameters(), torch.empty(0))
    try:
        return backends.resolve(op, backends.Request(tensor.device.type, tensor.dtype, {}))
    except BackendUnavailable:
        return "none"


def skipped(module: Any) -> set[int]:
    """The ids of children that a fast module fuses, and that reports therefore do not list."""
    if isinstance(module, (Fused, TokenTransformer)):
        return set() if module.obstacle() else {id(module.get_submodule(path)) for path, _ in module.containers}
    if isinstance(module, Windowed) and module.obstacle():
        return set()
    return {id(child) for child in module.children() if isinstance(child, (nn.Unfold, nn.Fold))}


@dataclass(frozen=True)
class ModelExplanation:
    """Rows of (path, class, backend or "unfused: ..."), one for each fast module; ``str()`` is a table."""

    rows: tuple[tuple[str, str, str], ...]

    def __str__(self) -> str:
        if not self.rows:
            return "no module of t2t_fast in the model; t2t_fast.swap(model) puts them there"
        table = [("path", "module", "backend"), *((path or "(the model)", *rest) for path, *rest in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)


def explain(
    op: str | nn.Module | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    **sizes: Any,
) -> backends.Explanation | ModelExplanation:
    """The selected backend of each operator, and why the others were rejected.

    For a model: the backend of each fast module, or the child that prevents the fusion, and why.

    Args:
        op: one operator's name, a model, or ``None`` for all operators.
        device: "cpu", "cuda" or a ``torch.device``; by default "cuda" if there is one; unused for a model.
        dtype: the inputs' dtype; unused for a model.
        sizes: sizes of the operator that a backend's support depends on.

    Returns:
        :class:`backends.Explanation`, for a model :class:`ModelExplanation`; ``str()`` of both is a table.

    Raises:
        ValueError: ``op`` is not the name of an operator.
    """
    if not isinstance(op, nn.Module):
        return backends.explain(op, device=device, dtype=dtype, **sizes)
    modules = [(path, module) for path, module in op.named_modules() if isinstance(module, FAST)]
    hidden = {each for _, module in modules for each in skipped(module)}
    return ModelExplanation(
        tuple((path, type(m).__name__, backend_of(m)) for path, m in modules if id(m) not in hidden)
    )

"""What runs in a model: the backend of each fast module, or why it calls its children one by one."""

from dataclasses import dataclass

import torch
from torch import nn

from .. import backends
from ..errors import BackendUnavailable
from ..modules import Fold, TokenPerformer, Unfold
from .swap_rules import FAST

_OPERATORS = {Unfold: "soft_split", Fold: "soft_composition", TokenPerformer: "performer_layer"}


def backend_of(module):
    """The backend of a fast module's main operator, on the device and in the dtype of its parameters.

    Or "unfused: " and the reason, where it calls its children one by one.
    """
    why = module.obstacle() if hasattr(module, "obstacle") else None
    if why is not None:
        return f"unfused: {why}"
    op = next((op for kind, op in _OPERATORS.items() if isinstance(module, kind)), "soft_split_linear")
    tensor = next(module.parameters(), torch.empty(0))
    try:
        return backends.resolve(op, backends.Request(tensor.device.type, tensor.dtype, {}))
    except BackendUnavailable:
        return "none"


@dataclass(frozen=True)
class ModelExplanation:
    """Rows of (path, class, backend or "unfused: ..."), one for each fast module; ``str()`` is a table."""

    rows: tuple[tuple[str, str, str], ...]

    def __str__(self):
        if not self.rows:
            return "no module of t2t_fast in the model; t2t_fast.swap(model) puts them there"
        table = [("path", "module", "backend"), *((path or "(the model)", *rest) for path, *rest in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)


def explain(op=None, *, device=None, dtype=torch.float32, **sizes):
    """For each operator: the backend that would run, and the reason why not each other one.

    For a model: the backend of each fast module in it, or the child that makes it run unfused and why.

    Args:
        op: one operator's name, a model, or ``None`` for all operators.
        device: "cpu", "cuda" or a ``torch.device``; by default "cuda" if there is one. A model's own counts.
        dtype: the inputs' dtype.
        sizes: the operator's own sizes, where a capability depends on them.

    Returns:
        :class:`backends.Explanation`, for a model :class:`ModelExplanation`; ``str()`` of both is a table.

    Raises:
        ValueError: ``op`` is no operator's name.
    """
    if not isinstance(op, nn.Module):
        return backends.explain(op, device=device, dtype=dtype, **sizes)
    modules = [(path, module) for path, module in op.named_modules() if isinstance(module, FAST)]
    parents = {id(child) for _, module in modules for child in module.children() if isinstance(child, nn.Unfold)}
    return ModelExplanation(
        tuple((path, type(m).__name__, backend_of(m)) for path, m in modules if id(m) not in parents)
    )

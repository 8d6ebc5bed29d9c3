"""Rows of ``verify`` for one operator."""

from collections.abc import Iterator, Sequence

import torch

from .. import testing
from ..backends import ORDER, explain
from .report import VerifyRow
from .subjects import raised


def obstacle(op: str, name: str, device: torch.device, dtype: torch.dtype, requested: bool = True) -> str | None:
    """Why backend ``name`` cannot run ``op``, or, unless it was requested, why ``auto`` passes it over; or ``None``."""
    if name == "auto":
        return None
    rows = explain(op, device=device, dtype=dtype).rows
    verdict = next(verdict for _, candidate, verdict in rows if candidate == name)
    runs = verdict in ("chosen", "available") or (requested and verdict.startswith("available"))
    return None if runs else verdict


def operator_rows(op: str, dtype_name: str, names: Sequence[str] | None, device: torch.device) -> Iterator[VerifyRow]:
    """The worst forward and backward error of each backend in ``names``; ``None``: all that ``auto`` considers."""
    dtype = testing.DTYPES[dtype_name]
    for name in ORDER if names is None else names:
        reason = obstacle(op, name, device, dtype, requested=names is not None)
        if reason is not None:
            yield VerifyRow(op, name, dtype_name, "", note=reason)
            continue
        worst = {"forward": (-1.0, ""), "backward": (-1.0, "")}
        try:
            for case, part, whole, row in testing.measure(op, dtype, name, device):
                direction = "forward" if part == "forward" else "backward"
                worst[direction] = max(worst[direction], (max(whole, row / testing.ROW_FACTOR), f"{case}: {part}"))
        except Exception as error:  # noqa: BLE001 - any exception of a backend is a failure that the report shows
            yield VerifyRow(op, name, dtype_name, "", ok=False, note=raised(error))
            continue
        for direction, (size, where) in worst.items():
            allowed = testing.tolerance(op, direction, dtype)
            yield VerifyRow(op, name, dtype_name, direction, size, allowed, where, size <= allowed)

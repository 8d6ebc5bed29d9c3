"""The error of outputs beside those of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

Outputs = tuple[torch.Tensor, ...]


class Errors(NamedTuple):
    """Largest difference; that divided by the largest output; share of rows with the same largest output."""

    max_abs_error: float
    max_rel_error: float
    agreement: float | None


def compare(run: Callable[[torch.Tensor], Outputs], cases: Iterable[tuple[torch.Tensor, Outputs]], what: str) -> Errors:
    """The errors of ``run`` on cases of (input, the model's outputs).

    Args:
        run: from an input to a tuple of tensors.
        cases: outputs whose first is (B, classes) count for the agreement.
        what: names ``run`` in an error.

    Raises:
        RuntimeError: the shapes are not those of the model.
    """
    worst, relative, same, rows = 0.0, 0.0, 0, 0
    for x, expected in cases:
        got = run(x)
        if shapes(got) != shapes(expected):
            raise RuntimeError(f"{what} returns other shapes than the model")
        for ours, theirs in zip(got, expected, strict=True):
            difference = torch.nan_to_num((ours.double() - theirs.double()).abs(), nan=torch.inf).max().item()
            worst = max(worst, difference)
            relative = max(relative, difference / max(theirs.double().abs().max().item(), 1e-30))
        if expected[0].ndim == 2 and expected[0].shape[1] > 1:
            same += int((got[0].argmax(1) == expected[0].argmax(1)).sum())
            rows += len(x)
    return Errors(worst, relative, same / rows if rows else None)


def shapes(tensors: Sequence[torch.Tensor]) -> list[tuple[int, ...]]:
    """The tensors' shapes."""
    return [tuple(each.shape) for each in tensors]

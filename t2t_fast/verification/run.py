"""The function ``verify``: its arguments, and the comparisons in their order."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product

import torch
from torch import nn

from .. import config, testing
from ..environment import environment
from .models import model_rows
from .operators import operator_rows
from .report import VerifyReport, VerifyRow
from .subjects import MODEL, Subject, small_model, users_model


def verify(
    model_or_op: nn.Module | str | None = None,
    x: torch.Tensor | None = None,
    *,
    dtypes: str | torch.dtype | Sequence[str | torch.dtype] | None = None,
    backends: str | Sequence[str] | None = None,
    device: str | torch.device | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> VerifyReport:
    """Compare the fast path with the float64 reference on this machine, forward and every gradient.

    Args:
        model_or_op: ``None`` for every operator and two small T2T-ViT models; an operator's name; "model" for the two
            models; or an ``nn.Module``. A module with fast parts (swapped or built so) is compared as it is, any other
            one as :func:`t2t_fast.swap` would make it; only copies of it are run, in eval mode.
        x: the module's input, (B, C, H, W); an artificial image of the module's image size if ``None``.
        dtypes: names ("fp32", "fp16", "bf16", "fp64") or ``torch.dtype``; all four by default.
        backends: names. By default every backend for operators (one that cannot run, or that ``auto`` passes over, is a
            note) and "auto" for models. A backend requested by name that runs nothing is a failure.
        device: by default the module's, else "cuda" if there is one.
        progress: called as ``progress(done, total, what)``.

    Returns:
        :class:`VerifyReport`. Errors of operators must be within the table of ``t2t_fast/testing.py`` (whole tensor,
        and the worst row), errors of models within its "t2t_module" line or
        :data:`~t2t_fast.verification.models.MODEL_FACTOR` times the unfused model's own error.

    Raises:
        TypeError, ValueError: an unknown operator, dtype or backend, or a module that does not take the input.
        NothingToSwap: the module has nothing that this package accelerates.
    """
    dtype_names = _checked_dtypes(dtypes)
    names = None if backends is None else _checked_backends(backends)
    place = torch.device(_default_device(model_or_op) if device is None else device)
    ops, subjects = _subjects(model_or_op, x)
    total, started, rows = (len(ops) + len(subjects)) * len(dtype_names), time.perf_counter(), list[VerifyRow]()
    report_progress = progress or (lambda *_: None)
    with _full_float32():
        for done, (op, dtype) in enumerate(product(ops, dtype_names)):
            report_progress(done, total, f"{op}, {dtype}")
            rows += operator_rows(op, dtype, names, place)
        for done, (subject, dtype) in enumerate(product(subjects, dtype_names), len(ops) * len(dtype_names)):
            report_progress(done, total, f"{subject.what}, {dtype}")
            rows += model_rows(subject, dtype, names or ["auto"], place)
    report_progress(total, total, "compared")
    if names is not None:
        ran = {row.backend for row in rows if row.error is not None}
        rows = [replace(row, ok=False) if row.ok is None and row.backend not in ran else row for row in rows]
    return VerifyReport(tuple(rows), environment(place), time.perf_counter() - started)


def _checked_dtypes(dtypes: str | torch.dtype | Sequence[str | torch.dtype] | None) -> list[str]:
    given = list(testing.DTYPES) if dtypes is None else dtypes
    given = [given] if isinstance(given, (str, torch.dtype)) else list(given)
    names = [testing.DTYPE_NAMES.get(each, "") if isinstance(each, torch.dtype) else each for each in given]
    if not names or any(name not in testing.DTYPES for name in names):
        raise ValueError(f"verify: dtypes must be of {', '.join(testing.DTYPES)}, got {dtypes!r}")
    return names


def _checked_backends(backends: str | Sequence[str]) -> list[str]:
    names = [backends] if isinstance(backends, str) else list(backends)
    if not names or any(name not in config.BACKENDS for name in names):
        raise ValueError(f"verify: backends must be of {', '.join(config.BACKENDS)}, got {backends!r}")
    return names


def _default_device(model: object) -> str | torch.device:
    for parameter in model.parameters() if isinstance(model, nn.Module) else ():
        return parameter.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _subjects(model_or_op: nn.Module | str | None, x: torch.Tensor | None) -> tuple[list[str], list[Subject]]:
    """The operators and the models to compare."""
    if isinstance(model_or_op, nn.Module):
        return [], [users_model(model_or_op, x)]
    if x is not None:
        raise TypeError("verify: x is the input of a module, but no module was given")
    if model_or_op is not None and not isinstance(model_or_op, str):
        raise TypeError(f"verify: expected an operator's name or a torch.nn.Module, got {type(model_or_op).__name__}")
    if model_or_op in testing.CASES:
        return [model_or_op], []
    if model_or_op not in (None, MODEL):
        known = ", ".join([*testing.CASES, MODEL])
        raise ValueError(f"verify: the operator must be one of {known}, got {model_or_op!r}")
    models = [small_model("performer"), small_model("transformer")]
    return (list(testing.CASES) if model_or_op is None else []), models


@contextmanager
def _full_float32() -> Iterator[None]:
    """Matrix products in full float32: this verifies the package, not the user's choice of TF32.

    PyTorch's newer per-backend flags cannot be read here without changing them; they are left as they are.
    """
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

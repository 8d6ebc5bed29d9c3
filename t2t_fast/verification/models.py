"""Rows of ``verify`` for one model."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .. import testing
from ..backends import backend
from .operators import obstacle
from .report import VerifyRow
from .subjects import Subject, raised

MODEL_FACTOR = 1.5
"""A whole model also rounds in layers outside this package, so its error may also be this many times that of the
same unfused model in the same dtype."""

GRADIENT_FLOOR = 1e-3
"""A parameter's gradient error is relative to its norm, or to this fraction of the whole gradient's norm if larger."""

Result = tuple[list[torch.Tensor], dict[str, torch.Tensor]]
"""Outputs, and gradients by the parameters' names."""


def model_rows(subject: Subject, dtype_name: str, names: Sequence[str], device: torch.device) -> Iterator[VerifyRow]:
    """Half dtypes run under autocast: upstream's Performer needs float32 inside, so it does not run in a half dtype."""
    if subject.left:
        verdict = False if subject.left_is_wrong else None
        yield VerifyRow(subject.what, "auto", dtype_name, "", ok=verdict, note=subject.left)
    dtype = testing.DTYPES[dtype_name]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    plain, fast = (copy.deepcopy(model).to(device, wide) for model in (subject.plain, subject.fast))
    exact = copy.deepcopy(plain).to("cpu", torch.float64)
    x = subject.x.to(device, wide)
    with backend("reference"):
        expected = _run(exact, x.to("cpu", torch.float64), torch.float64, wide)
        try:
            own = _errors(_run(plain, x, dtype, wide), expected)
        except (RuntimeError, NotImplementedError) as error:
            yield VerifyRow(subject.what, "reference", dtype_name, "", note=f"the plain model {raised(error)}")
            return
    for name in names:
        with _preferring(name, device, dtype) as able:
            if not able:
                yield VerifyRow(subject.what, name, dtype_name, "", note="it runs no operator here")
                continue
            try:
                found = _errors(_run(fast, x, dtype, wide), expected)
            except Exception as error:  # noqa: BLE001 - as for operators
                yield VerifyRow(subject.what, name, dtype_name, "", ok=False, note=raised(error))
                continue
        for direction, (size, where) in found.items():
            allowed = testing.tolerance("t2t_module", direction, dtype)
            if own[direction][0] < float("inf"):
                allowed = max(allowed, MODEL_FACTOR * own[direction][0])
            yield VerifyRow(subject.what, name, dtype_name, direction, size, allowed, where, size <= allowed)


@contextmanager
def _preferring(name: str, device: torch.device, dtype: torch.dtype) -> Iterator[int]:
    """Select backend ``name`` for the operators that it can run; yields how many those are."""
    with ExitStack() as stack:
        able = [op for op in testing.CASES if obstacle(op, name, device, dtype) is None]
        for op in able:
            stack.enter_context(backend(name, op))
        yield len(able)


def _tensors(value: Any) -> list[torch.Tensor]:
    """The floating tensors in a model's result, in order."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def _run(model: nn.Module, x: torch.Tensor, dtype: torch.dtype, round_to: torch.dtype) -> Result:
    """Outputs and gradients for a random upstream gradient rounded to ``round_to``. A half ``dtype`` means autocast."""
    model.zero_grad(set_to_none=True)
    half = dtype in (torch.float16, torch.bfloat16)
    with torch.autocast(x.device.type, dtype if half else None, enabled=half):
        results = _tensors(model(x))
    differentiable = [result for result in results if result.requires_grad]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(r.shape, generator=generator, dtype=torch.float64) for r in differentiable]
    if differentiable:
        torch.autograd.backward(
            differentiable, [g.to(round_to).to(r) for g, r in zip(upstream, differentiable, strict=True)]
        )
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return [result.detach() for result in results], gradients


def _errors(result: Result, expected: Result) -> dict[str, tuple[float, str]]:
    """Direction -> (worst error, where)."""
    (outputs, gradients), (exact_outputs, exact_gradients) = result, expected
    if len(outputs) != len(exact_outputs) or set(gradients) != set(exact_gradients):
        differing = sorted(set(gradients) ^ set(exact_gradients))
        raise AssertionError(f"not the same outputs and gradients as the plain model: {', '.join(differing)}")

    def size(value: torch.Tensor, exact: torch.Tensor) -> float:
        whole, row = testing.errors(value.cpu(), exact)
        return max(whole, row / testing.ROW_FACTOR)

    pairs = zip(outputs, exact_outputs, strict=True)
    worst = {"forward": max((size(v, e), f"output {i}") for i, (v, e) in enumerate(pairs))}
    if gradients:
        floor = GRADIENT_FLOOR * torch.stack([g.norm() for g in exact_gradients.values()]).norm().item()
        shares = {name: g.norm().item() / floor if floor else 1.0 for name, g in exact_gradients.items()}
        worst["backward"] = max(
            (size(gradients[name], exact) * min(1.0, shares[name] or 1 / floor), name)
            for name, exact in exact_gradients.items()
        )
    return worst

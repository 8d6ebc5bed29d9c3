"""The demo's measurements, and the report of them."""

import copy
import datetime
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from .. import reference
from ..environment import environment
from ..errors import CommandError
from ..interop.checkpoints import load_checkpoint
from ..interop.swap import swap
from . import half, measure, page
from .photo import batch, load_photo

PARITY = 1e-4
"""Largest difference of the logits before and after, relative to their norm, in float32."""

SCATTER = 0.3
"""From this distance of the 20th and 80th percentile, relative to the median, a timing is called scattered."""

SEED = 0
RANDOM = (
    f"The weights are random (seed {SEED}), so the class scores are meaningless; the check is that both models produce "
    "identical logits."
)
MODELS = tuple(name for name in reference.__all__ if name.startswith("t2t_vit"))
"""Names of the models that the demo knows."""


class Progress(Protocol):
    """Reports that a step begins, and details of the current step."""

    total: int

    def step(self, text: str) -> None: ...

    def detail(self, text: str) -> None: ...


@dataclass(frozen=True)
class Settings:
    """What the demo runs; files are image files and checkpoints, ``None`` for the sample and for random weights."""

    model: str
    img_size: int
    device: torch.device
    batch: int
    seconds: float
    compile: bool = True
    photo: str | None = None
    checkpoint: str | None = None


def make_report(settings: Settings, out: Path, progress: Progress) -> tuple[dict[str, Any], Path]:
    """Measure and write the report into the folder ``out``.

    Returns:
        the numbers, as in ``report.json``, and the page's path.
    """
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    progress.total = 12 if settings.compile else 11
    progress.step("read the photograph, build the model, swap a copy of it")
    photo = load_photo(settings.photo)
    x = batch(photo, settings.img_size, settings.batch).to(settings.device)
    before, checkpoint = _model(settings)
    before.to(settings.device)
    after = copy.deepcopy(before)
    swapped = swap(after)
    progress.step("compare the logits")
    logits, parity = _parity(before, after, x[:1])
    times, notes = _times(before, after, x, settings, progress)
    memory = _memory(before, after, x, progress)
    progress.step("half precision: which tokens stay finite")
    module, own = half.performer_module(before, settings.img_size)
    halves = half.experiment(module.to(settings.device), x[:1])
    if not own:
        notes.append(f"{settings.model} has no Performer: the half-precision experiment used a module of its own.")
    if checkpoint is None:
        notes.append(RANDOM)
    data: dict[str, Any] = {
        "photo": dict(name=photo.name, credit=photo.credit, box=list(photo.box), img_size=settings.img_size)
        | dict(zip(("width", "height"), photo.image.size, strict=True)),
        "model": dict(name=settings.model, checkpoint=checkpoint, seed=SEED, img_size=settings.img_size)
        | dict(batch=settings.batch, parameters=sum(p.numel() for p in before.parameters()), swap=str(swapped)),
        "parity": parity,
        "time": times,
        "memory": memory,
        "half": [result.row() for result in halves],
        "notes": notes,
        "environment": environment(settings.device),
        "made": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    progress.step("draw the pictures")
    with torch.no_grad():
        stages = after.eval().tokens_to_token.forward_stages(x[:1])
    paths = page.draw(out, photo, x[:1].cpu(), stages, logits, data, halves)
    progress.step("write the report")
    data["seconds"] = round(time.perf_counter() - started, 1)
    return data, page.write(out, data, paths)


def _model(settings: Settings) -> tuple[Any, str | None]:
    """The upstream-shaped model, and a report on the loaded checkpoint (``None`` for random weights)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = getattr(reference, settings.model)(img_size=settings.img_size).eval()
    if settings.checkpoint is None:
        return model, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = str(load_checkpoint(model, settings.checkpoint))
    return model, "\n".join([loaded, *(str(warning.message) for warning in caught)])


def _parity(
    before: nn.Module, after: nn.Module, x: torch.Tensor
) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, Any]]:
    """Both forms' logits of the photograph, compared with each other and with float64."""
    exact_model = copy.deepcopy(before).to("cpu", torch.float64)
    with torch.no_grad():
        first, second = (model.eval()(x)[0].double().cpu() for model in (before, after))
        exact = exact_model(x.cpu().double())[0]
    for form, logits in (("before", first), ("after", second)):
        if not logits.isfinite().all():
            raise CommandError(f"the logits {form} the swap are not finite, so they cannot be compared")
    relative = ((second - first).norm() / first.norm()).item()
    top = [logits.topk(min(5, len(logits))).indices.tolist() for logits in (first, second)]
    parity = {
        "max_abs_difference": (second - first).abs().max().item(),
        "relative_difference": relative,
        "cosine": torch.nn.functional.cosine_similarity(first, second, dim=0).item(),
        "error_before": ((first - exact).norm() / exact.norm()).item(),
        "error_after": ((second - exact).norm() / exact.norm()).item(),
        "classes": len(first),
        "top5_before": top[0],
        "top5_after": top[1],
        "top5_logits_before": first[top[0]].tolist(),
        "top5_logits_after": second[top[1]].tolist(),
        "tolerance": PARITY,
        "ok": relative <= PARITY,
    }
    return (first, second), parity


def _times(
    before: Any, after: Any, x: torch.Tensor, settings: Settings, progress: Progress
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of timings, and notes on what was not timed or scattered."""
    modules = before.tokens_to_token, after.tokens_to_token
    rows, notes, scattered = [], list[str](), list[str]()

    def row(label: str, pair: tuple[Any, ...], make: Callable[[nn.Module, torch.Tensor], Callable[[], None]]) -> None:
        progress.step(f"time: {label}")
        contenders = {form: make(module, x) for form, module in zip(("before", "after"), pair, strict=True)}
        found = measure.interleaved(
            contenders, settings.device, settings.seconds, lambda rounds: progress.detail(f"{rounds} rounds")
        )
        ratio = found["before"].median / found["after"].median
        rows.append({"what": label, **{form: vars(timing) for form, timing in found.items()}, "ratio": ratio})
        if max(timing.scatter for timing in found.values()) > SCATTER:
            scattered.append(label)

    row("T2T module, inference", modules, measure.inference)
    row("T2T module, training step", modules, measure.training_step)
    if settings.compile:
        # without a GPU, PyTorch's compiler logs a warning about CUDA that does not matter here
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        try:
            compiled = tuple(torch.compile(module) for module in modules)
            row("T2T module, inference with torch.compile", compiled, measure.inference)
        except RuntimeError as error:  # most often: no C++ compiler
            notes.append(f"torch.compile was not timed: {str(error).strip().splitlines()[0]}")
    row("whole model, inference", (before, after), measure.inference)
    row("whole model, training step", (before, after), measure.training_step)
    if scattered:
        notes.append(f"These timings scatter widely (is the machine busy?): {'; '.join(scattered)}.")
    return rows, notes


def _memory(before: Any, after: Any, x: torch.Tensor, progress: Progress) -> list[dict[str, Any]]:
    """Rows of bytes."""
    parts = {"T2T module": (before.tokens_to_token, after.tokens_to_token), "whole model": (before, after)}
    rows = []
    for what, step, bytes_of in (
        ("kept for backward", "what a training forward keeps for backward", measure.kept_bytes),
        ("peak of a step", "peak of a training step", measure.step_peak),
    ):
        progress.step(f"memory: {step}")
        for part, pair in parts.items():
            first, second = (bytes_of(form, x) for form in pair)
            rows.append({"what": f"{part}, {what}", "before": first, "after": second, "ratio": first / second})
    return rows

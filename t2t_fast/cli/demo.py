"""``t2t-fast demo``: a photograph through an upstream-shaped T2T-ViT before and after ``t2t_fast.swap``."""

import copy
import datetime
import logging
import time
import warnings
from pathlib import Path

import torch

from .. import reference
from ..environment import environment
from ..interop.checkpoints import load_checkpoint
from ..interop.swap import swap
from . import half, measure
from .common import CommandError, Progress, UsageError, choose_device, require

PARITY = 1e-4
"""Largest difference of the logits before and after, relative to their norm, in float32."""

SCATTER = 0.3
"""Distance of the 20th and 80th percentile, relative to the median, from which on a timing is called scattered."""

SEED = 0


def run(options):
    """Make the report; 1 if the logits differ."""
    require("demo", "matplotlib", "PIL")
    from . import report
    from .photo import batch, load_photo

    started = time.perf_counter()
    _check(options)
    device = choose_device(options.device)
    count = options.batch or (64 if device.type == "cuda" else 4)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    progress = Progress(11 if options.no_compile else 12)
    try:
        progress.step("read the photograph, build the model, swap a copy of it")
        photo = load_photo(options.photo)
        x = batch(photo, options.img_size, count).to(device)
        before, checkpoint = _model(options)
        before.to(device)
        after = copy.deepcopy(before)
        swapped = swap(after)
        progress.step("compare the logits")
        logits, parity = _parity(before, after, x[:1])
        times, notes = _times(before, after, x, options, progress)
        memory = _memory(before, after, x, progress)
        progress.step("half precision: which tokens stay finite")
        module, own = half.performer_module(before, options.img_size)
        halves = half.experiment(module.to(device), x[:1])
        if not own:
            notes.append(f"{options.model} has no Performer: the half-precision experiment used a module of its own.")
        data = {
            "photo": _describe_photo(photo, options.img_size),
            "model": {
                "name": options.model,
                "parameters": sum(p.numel() for p in before.parameters()),
                "checkpoint": checkpoint,
                "seed": SEED,
                "img_size": options.img_size,
                "batch": count,
                "swap": str(swapped),
            },
            "parity": parity,
            "time": times,
            "memory": memory,
            "half": [_half_row(result) for result in halves],
            "notes": notes,
            "environment": environment(device),
            "made": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
        progress.step("draw the pictures")
        pictures = report.draw(out, photo, x[:1].cpu(), _stages(after, x[:1]), logits, data, halves)
        data["seconds"] = round(time.perf_counter() - started, 1)
        progress.step("write the report")
        page = report.write(out, data, pictures)
    finally:
        progress.close()
    print(report.summary(data))
    print(f"\nreport: {page}")
    return 0 if parity["ok"] else 1


def _check(options):
    names = [name for name in reference.__all__ if name.startswith("t2t_vit")]
    if options.model not in names:
        raise UsageError(f"--model must be one of {', '.join(names)}, got {options.model!r}")
    if options.img_size % 16 or options.img_size < 32:
        raise UsageError(f"--img-size must be a multiple of 16 from 32 on (upstream's models), got {options.img_size}")
    if options.checkpoint is not None and not Path(options.checkpoint).is_file():
        raise UsageError(f"--checkpoint: there is no file {options.checkpoint}")
    if options.photo is not None and not Path(options.photo).is_file():
        raise UsageError(f"--photo: there is no file {options.photo}")


def _model(options):
    """The upstream-shaped model, and what was loaded into it (``None`` for random weights)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = getattr(reference, options.model)(img_size=options.img_size).eval()
    if options.checkpoint is None:
        return model, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = str(load_checkpoint(model, options.checkpoint))
    return model, "\n".join([loaded, *(str(warning.message) for warning in caught)])


def _parity(before, after, x):
    """Both forms' logits of the photograph, and how they compare with each other and with float64."""
    exact_model = copy.deepcopy(before).to("cpu", torch.float64)
    with torch.no_grad():
        first, second = (model.eval()(x)[0].double().cpu() for model in (before, after))
        exact = exact_model(x.cpu().double())[0]
    for form, logits in (("before", first), ("after", second)):
        if not logits.isfinite().all():
            raise CommandError(f"the logits {form} the swap are not finite, so there is nothing to compare")
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
        "top5_logits_after": second[top[0]].tolist(),
        "tolerance": PARITY,
        "ok": relative <= PARITY,
    }
    return (first, second), parity


def _times(before, after, x, options, progress):
    """Rows of timings, and notes on what could not be timed."""
    modules = before.tokens_to_token, after.tokens_to_token
    rows, notes = [], []

    def row(label, pair, make):
        progress.step(f"time: {label}")
        contenders = dict(zip(("before", "after"), (make(module, x) for module in pair), strict=True))
        found = measure.interleaved(
            contenders, x.device, options.seconds, lambda rounds: progress.detail(f"{rounds} rounds")
        )
        ratio = found["before"].median / found["after"].median
        rows.append({"what": label, **{name: vars(timing) for name, timing in found.items()}, "ratio": ratio})

    row("T2T module, inference", modules, measure.inference)
    row("T2T module, training step", modules, measure.training_step)
    if not options.no_compile:
        # Where there is no GPU, PyTorch's compiler says so in a warning that means nothing here.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        try:
            row("T2T module, inference with torch.compile", [torch.compile(m) for m in modules], measure.inference)
        except RuntimeError as error:  # most often: no C++ compiler
            first_line = str(error).strip().splitlines()[0]
            notes.append(f"torch.compile was not timed: {first_line}")
    row("whole model, inference", (before, after), measure.inference)
    row("whole model, training step", (before, after), measure.training_step)
    scattered = [r["what"] for r in rows if max(_scatter(r["before"]), _scatter(r["after"])) > SCATTER]
    if scattered:
        notes.append(f"These timings scatter widely, as on a machine that does other work: {'; '.join(scattered)}.")
    return rows, notes


def _scatter(timing):
    return (timing["high"] - timing["low"]) / timing["median"]


def _memory(before, after, x, progress):
    """Rows of bytes."""
    parts = {"T2T module": (before.tokens_to_token, after.tokens_to_token), "whole model": (before, after)}
    rows = []
    for what, step, bytes_of in (
        ("kept for backward", "what a training forward keeps for backward", measure.kept_bytes),
        ("peak of a step", "peak of a training step", measure.step_peak),
    ):
        progress.step(f"memory: {step}")
        rows += [_bytes_row(f"{part}, {what}", *(bytes_of(form, x) for form in pair)) for part, pair in parts.items()]
    return rows


def _bytes_row(what, before, after):
    return {"what": what, "before": before, "after": after, "ratio": before / after}


def _half_row(result):
    finite = result.error == result.error
    return {
        "gain": result.gain,
        "dtype": result.dtype,
        "form": result.form,
        "inner_tokens": result.broken.numel(),
        "inner_tokens_not_finite": int(result.broken.sum()),
        "tokens": result.tokens,
        "tokens_not_finite": result.broken_out,
        "error": result.error if finite else None,
    }


def _stages(after, x):
    """Tokens and grid of the T2T module's three stages."""
    after.eval()
    with torch.no_grad():
        return after.tokens_to_token.forward_stages(x)


def _describe_photo(photo, img_size):
    return {
        "name": photo.name,
        "credit": photo.credit,
        "width": photo.image.width,
        "height": photo.image.height,
        "box": list(photo.box),
        "img_size": img_size,
    }

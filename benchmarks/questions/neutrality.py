"""Does a swapped model train like upstream's?

``python -m benchmarks.questions.neutrality [--device cpu|cuda] [--quick]``. T2T-ViT-7 learns where on a photograph a
crop was taken: in float32, and under autocast in bf16 and fp16 (with a gradient scaler), as upstream writes it and
swapped. All start from the same weights and see the same images in the same order; dropout is off, so that nothing
random is left. Training amplifies every rounding, so equal curves cannot be asked for. Upstream itself is therefore
trained in float32 several times more: from weights changed by 1e-6 of their size, and from other weights. A curve's
distance from upstream's in float32 is the mean difference of their smoothed losses.

The swapped model is neutral in a dtype if it gets no farther than upstream itself does by changed weights, by other
weights or by the dtype, and within :data:`ROOM` times what changed weights and the dtype do (in fp16, where upstream
may not be finite, bf16). In fp16, the scaler must not skip a step once it has found its scale.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import t2t_fast
from t2t_fast import reference
from t2t_fast.demo.photo import MEAN, STD, load_photo
from t2t_fast.errors import CommandError
from t2t_fast.testing import DTYPES

CELLS = 4
"""Rows and columns of the photograph's cells; which one a crop's place belongs to is its class."""

SEED, OTHER_SEED = 42, 43
"""Of the initial weights; the first is the default of upstream's training script."""

CHANGE = 1e-6
"""By how much of itself every initial weight is changed, at one standard deviation."""

CHANGED_RUNS = 2
ROOM = 10.0
"""Other kernels round otherwise, but not by orders of magnitude more; a wrong gradient shows at 1000 times and more."""

RATE, DECAY = 5e-4, 0.03
WARM_UP = 0.1
"""Share of the steps over which the learning rate rises, and after which a scaler must have found its scale."""

VIEWS = 2048
FINEST = 1e-7
"""A smaller difference than the figure shows; a loss in float32 has steps of 2e-7."""
COLORS = {"fp32": "#0072b2", "bf16": "#009e73", "fp16": "#d55e00"}


class Settings(NamedTuple):
    """Sizes of the runs."""

    size: int = 224
    batch: int = 32
    steps: int = 300


QUICK = Settings(64, 16, 30)


class Run(NamedTuple):
    """One training run: "upstream" or "t2t_fast", its dtype, the seed of its weights, and the number of its change."""

    form: str
    dtype: str
    seed: int = SEED
    change: int = 0

    @property
    def name(self):
        words = f"{self.form} {self.dtype}"
        if self.change:
            words += f", weights changed by {CHANGE:g} ({self.change})"
        return words if self.seed == SEED else f"{words}, other weights"


BASE = Run("upstream", "fp32")


def plan(dtypes):
    """The runs in their order: upstream in float32, what it is compared with, then its own spread."""
    pairs = [Run(form, dtype) for dtype in dtypes for form in ("upstream", "t2t_fast")]
    spread = [BASE._replace(change=1 + index) for index in range(CHANGED_RUNS)]
    return [BASE, *(run for run in pairs if run != BASE), *spread, BASE._replace(seed=OTHER_SEED)]


def views(photo, size, count, seed=0):
    """Crops of a photograph, mirrored or not: (count, 3, size, size) bytes, and the class of each."""
    from PIL import Image, ImageOps

    generator = torch.Generator().manual_seed(seed)
    width, height = photo.image.size
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    labels = torch.empty(count, dtype=torch.int64)
    for index, (share, across, down, flip) in enumerate(torch.rand(count, 4, generator=generator).tolist()):
        side = max(1.0, (0.3 + 0.2 * share) * min(width, height))
        left, top = across * (width - side), down * (height - side)
        view = photo.image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        view = ImageOps.mirror(view) if flip < 0.5 else view
        images[index] = torch.frombuffer(bytearray(view.tobytes()), dtype=torch.uint8).view(size, size, 3).movedim(2, 0)
        labels[index] = int(down * CELLS) * CELLS + int(across * CELLS)
    return images, labels


def model_for(run, size):
    """The model of a run, without dropout."""
    torch.manual_seed(run.seed)
    model = reference.t2t_vit_7(img_size=size, num_classes=CELLS**2)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if run.change:
        generator = torch.Generator().manual_seed(run.change)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + CHANGE * torch.randn(parameter.shape, generator=generator))
    if run.form == "t2t_fast":
        t2t_fast.swap(model)
    return model.train()


def train(run, settings, data, device):
    """Losses of every step, and the steps that the gradient scaler skipped.

    Args:
        data: images and labels of :func:`views`.
    """
    images, labels = (t.to(device) for t in data)
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD))
    model = model_for(run, settings.size).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE, weight_decay=DECAY)
    rising = max(1, round(WARM_UP * settings.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / rising))
    scaler = torch.amp.GradScaler(device, enabled=run.dtype == "fp16")
    order = torch.Generator().manual_seed(0)
    losses, skipped = [], []
    for step in range(settings.steps):
        chosen = torch.randint(len(images), (settings.batch,), generator=order).to(device)
        x = (images[chosen].float() / 255 - mean) / std
        with torch.autocast(device, DTYPES[run.dtype], enabled=run.dtype != "fp32"):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < before:
            skipped.append(step)
        schedule.step()
        losses.append(loss.item())
    return losses, skipped


def smooth(losses):
    """A running mean over a twentieth of the steps."""
    window = max(1, len(losses) // 20)
    return torch.tensor(losses, dtype=torch.float64).unfold(0, window, 1).mean(1)


def distance(losses, others):
    """The mean difference of two smoothed curves, NaN if a loss is not finite."""
    return (smooth(losses) - smooth(others)).abs().mean().item()


class Verdict(NamedTuple):
    """Of the swapped model in a dtype."""

    dtype: str
    distance: float
    allowed: float
    skipped: list[int]
    """Steps that the scaler skipped after its warm-up."""

    @property
    def ok(self):
        return self.distance <= self.allowed and not self.skipped  # not where it is NaN


def judge(found, dtypes, steps):
    """A :class:`Verdict` for each dtype; ``found``: run -> (losses, skipped steps)."""
    away = {run: distance(losses, found[BASE][0]) for run, (losses, _) in found.items()}
    changed = [away[run] for run in found if run.change]
    others = [away[run] for run in found if run.seed != SEED]
    verdicts = []
    for dtype in dtypes:
        halves = [] if dtype == "fp32" else [away[Run("upstream", each)] for each in (dtype, *dtypes) if each != "fp32"]
        known = [value for value in halves if math.isfinite(value)][:1]
        allowed = max([*known, *changed, *others])
        if known or not halves:
            allowed = min(allowed, ROOM * max([*known, *changed]))
        _, skipped = found[Run("t2t_fast", dtype)]
        late = [step for step in skipped if step >= WARM_UP * steps]
        verdicts.append(Verdict(dtype, away[Run("t2t_fast", dtype)], allowed, late))
    return verdicts


def lines(found, verdicts):
    """The report."""
    yield f"{'run':50}  first loss  last loss  distance  skipped steps"
    for run, (losses, skipped) in found.items():
        ends = smooth(losses)
        away = distance(losses, found[BASE][0])
        yield f"{run.name:50}  {ends[0]:10.4f}  {ends[-1]:9.4f}  {away:8.2e}  {len(skipped)}"
    for verdict in verdicts:
        words = "neutral" if verdict.ok else "NOT neutral"
        late = f", skipped steps after the warm-up: {verdict.skipped}" if verdict.skipped else ""
        yield f"{verdict.dtype}: {words}, distance {verdict.distance:.2e}, allowed {verdict.allowed:.2e}{late}"


def draw(found, words, path):
    """The smoothed curves, and how far each is from upstream's in float32, as a PNG. Returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 5.2), layout="constrained")
    base = smooth(found[BASE][0])
    for run, (losses, _) in found.items():
        own = run.change or run.seed != SEED
        style = {"color": "#999999" if own else COLORS[run.dtype], "linewidth": 1.0 if own else 1.6}
        style["linestyle"] = ":" if run.seed != SEED else "-" if own or run.form == "t2t_fast" else "--"
        label = None if run.change > 1 else run.name.removesuffix(" (1)")
        left.plot(smooth(losses), label=label, **style)
        if run != BASE:
            right.plot((smooth(losses) - base).abs().clamp_min(FINEST), **style)
    left.set_title("loss, smoothed", loc="left", fontsize=11)
    right.set_title("difference from upstream fp32", loc="left", fontsize=11)
    right.set_yscale("log")
    for axis in (left, right):
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(words, fontsize=9, color="#555555")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def write(path, settings, environment, found, verdicts=()):
    """The runs so far as JSON."""
    runs = [
        {"name": run.name, **run._asdict(), "losses": losses, "skipped": skipped}
        for run, (losses, skipped) in found.items()
    ]
    content = {"environment": environment, **settings._asdict(), "runs": runs}
    content["verdicts"] = [verdict._asdict() | {"ok": verdict.ok} for verdict in verdicts]
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def _backend(device, dtype):
    """What runs the swapped model's Performer layers."""
    op = "performer_layer"
    return t2t_fast.explain(op, device=device, dtype=DTYPES[dtype], training=True).chosen(op)


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.questions.neutrality", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK.size} px and {QUICK.steps} steps")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(COLORS), default=list(COLORS))
    for name in Settings._fields:
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--photo", help="an image file; by default Matplotlib's sample photograph")
    parser.add_argument("--out", type=Path, help="folder for neutrality.json and neutrality.png")
    return parser.parse_args(argv)


def main(argv=None):
    """Train, print the table, write what is asked for; exit code 1 if the swapped model is not neutral."""
    from ..measure import machine

    arguments = parse(argv)
    settings = QUICK if arguments.quick else Settings()
    given = {name: getattr(arguments, name) for name in Settings._fields}
    settings = settings._replace(**{name: value for name, value in given.items() if value is not None})
    try:
        photo = load_photo(arguments.photo)
    except CommandError as error:
        print(f"python -m benchmarks.questions.neutrality: {error}", file=sys.stderr)
        return 2
    data = views(photo, settings.size, min(VIEWS, settings.steps * settings.batch))
    environment, found = machine.describe(arguments.device), {}
    environment["backends"] = {name: _backend(arguments.device, name) for name in arguments.dtypes}
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
    for run in plan(arguments.dtypes):
        found[run] = train(run, settings, data, arguments.device)
        print(f"{run.name}: loss {smooth(found[run][0])[-1]:.4f}", flush=True)
        if arguments.out is not None:
            write(arguments.out / "neutrality.json", settings, environment, found)
    verdicts = judge(found, arguments.dtypes, settings.steps)
    print("\n".join(lines(found, verdicts)))
    if arguments.out is not None:
        write(arguments.out / "neutrality.json", settings, environment, found, verdicts)
        words = f"T2T-ViT-7, {settings.size} px, batch {settings.batch}, {arguments.device}, torch {torch.__version__}"
        print(f"figure: {draw(found, words, arguments.out / 'neutrality.png')}")
    return 0 if all(verdict.ok for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())

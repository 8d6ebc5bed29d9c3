"""Does a swapped model train like upstream's?

``python -m benchmarks.questions.neutrality [--device cpu|cuda] [--quick]``. T2T-ViT-7 learns where in a picture a crop
was taken, in float32 and under autocast in bf16 and fp16 (with a gradient scaler), as upstream writes it and swapped.
The picture is noise with a photograph's spectrum. All runs start from the same weights and see the same crops in the
same order; dropout is off. Training amplifies every rounding, so the curves cannot be equal. Upstream itself is
therefore trained in float32 several times more: from weights changed by 1e-6 of their size, and from other weights. The
distance of a curve is the mean difference of its smoothed losses from upstream's in float32.

The swapped model is neutral in a dtype if its distance is at most upstream's own by changed weights, other weights or
the dtype, and within :data:`ROOM` times that by changed weights and the dtype (in fp16, where upstream may not be
finite, bf16). In fp16 the scaler must not skip a step once it has found its scale.
"""

import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import t2t_fast
from t2t_fast import reference
from t2t_fast.testing import DTYPES, natural_images

from ..measure.text_tables import aligned
from .common import COLORS, panels, parser, save

CELLS = 4
"""Rows and columns of the picture's cells; the cell of a crop's place is its class."""

SEED, OTHER_SEED = 42, 43
"""Of the initial weights; the first is the default of upstream's training script."""

CHANGE, CHANGED_RUNS = 1e-6, 2
"""Standard deviation of the relative change of every initial weight, and the number of such runs."""

ROOM = 10.0
"""Other kernels round differently, but not by orders of magnitude; a wrong gradient shows at 1000 times and more."""

RATE, DECAY = 5e-4, 0.03
WARM_UP = 0.1
"""Share of the steps over which the learning rate rises, and after which a scaler must have found its scale."""

FINEST = 1e-7
"""Lower end of the figure's differences; losses in float32 have steps of 2e-7."""


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
        change = f", weights changed by {CHANGE:g} ({self.change})" if self.change else ""
        return f"{self.form} {self.dtype}{change}{'' if self.seed == SEED else ', other weights'}"


BASE = Run("upstream", "fp32")


def plan(dtypes):
    """The runs in their order: upstream in float32, what it is compared with, then its own spread."""
    pairs = [Run(form, dtype) for dtype in dtypes for form in ("upstream", "t2t_fast")]
    spread = [BASE._replace(change=1 + index) for index in range(CHANGED_RUNS)]
    return [BASE, *(run for run in pairs if run != BASE), *spread, BASE._replace(seed=OTHER_SEED)]


def crops(picture, size, count, generator):
    """Crops of a picture, mirrored or not: (count, 3, size, size), and the class of each."""
    share, across, down, flip = torch.rand(4, count, generator=generator)
    scale = 0.3 + 0.2 * share  # of the picture's side
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = torch.where(flip < 0.5, -scale, scale), scale
    theta[:, 0, 2], theta[:, 1, 2] = (2 * across - 1) * (1 - scale), (2 * down - 1) * (1 - scale)
    labels = (down * CELLS).long() * CELLS + (across * CELLS).long()
    grid = F.affine_grid(theta.to(picture.device), (count, 3, size, size), align_corners=False)
    images = F.grid_sample(picture.expand(count, -1, -1, -1), grid, padding_mode="border", align_corners=False)
    return images, labels.to(picture.device)


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


def train(run, settings, device):
    """Losses of every step, and the steps that the gradient scaler skipped."""
    picture = natural_images(1, 3, 2 * settings.size, 2 * settings.size).to(device)
    model = model_for(run, settings.size).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE, weight_decay=DECAY)
    rising = max(1, round(WARM_UP * settings.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / rising))
    scaler = torch.amp.GradScaler(device, enabled=run.dtype == "fp16")
    order = torch.Generator().manual_seed(0)
    losses, skipped = [], []
    for step in range(settings.steps):
        x, labels = crops(picture, settings.size, settings.batch, order)
        with torch.autocast(device, DTYPES[run.dtype], enabled=run.dtype != "fp32"):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), labels)
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
    return torch.tensor(losses, dtype=torch.float64).unfold(0, max(1, len(losses) // 20), 1).mean(1)


def distance(losses, others):
    """The mean difference of two smoothed curves, NaN if a loss is not finite."""
    return (smooth(losses) - smooth(others)).abs().mean().item()


class Verdict(NamedTuple):
    """Of the swapped model in a dtype; ``skipped``: steps that the scaler skipped after its warm-up."""

    dtype: str
    distance: float
    allowed: float
    skipped: list[int]

    @property
    def ok(self):
        return self.distance <= self.allowed and not self.skipped  # False for NaN


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
        late = [step for step in found[Run("t2t_fast", dtype)][1] if step >= WARM_UP * steps]
        verdicts.append(Verdict(dtype, away[Run("t2t_fast", dtype)], allowed, late))
    return verdicts


def lines(found, verdicts):
    """The report."""
    heads = ("run", "first loss", "last loss", "distance", "skipped steps")
    rows = []
    for run, (losses, skipped) in found.items():
        ends, away = smooth(losses), distance(losses, found[BASE][0])
        rows.append((run.name, f"{ends[0]:.4f}", f"{ends[-1]:.4f}", f"{away:.2e}", len(skipped)))
    yield from aligned(heads, rows, right=heads[1:])
    for verdict in verdicts:
        words = "neutral" if verdict.ok else "NOT neutral"
        late = f", skipped steps after the warm-up: {verdict.skipped}" if verdict.skipped else ""
        yield f"{verdict.dtype}: {words}, distance {verdict.distance:.2e}, allowed {verdict.allowed:.2e}{late}"


def draw(found, words, path):
    """The smoothed curves, and their differences from upstream's in float32, as a PNG. Returns its path."""
    figure, (left, right) = panels(words, "loss, smoothed", "difference from upstream fp32")
    base = smooth(found[BASE][0])
    for run, (losses, _) in found.items():
        own = run.change or run.seed != SEED
        style = {"color": "#999999" if own else COLORS[run.dtype], "linewidth": 1.0 if own else 1.6}
        style["linestyle"] = ":" if run.seed != SEED else "-" if own or run.form == "t2t_fast" else "--"
        left.plot(smooth(losses), label=None if run.change > 1 else run.name.removesuffix(" (1)"), **style)
        if run != BASE:
            right.plot((smooth(losses) - base).abs().clamp_min(FINEST), **style)
    right.set_yscale("log")
    left.set_xlabel("step")
    right.set_xlabel("step")
    return save(figure, path)


def write(path, settings, environment, found, verdicts=()):
    """The runs so far as JSON."""
    content = {"environment": environment, **settings._asdict()}
    content["runs"] = [
        {"name": run.name, **run._asdict(), "losses": losses, "skipped": skipped}
        for run, (losses, skipped) in found.items()
    ]
    content["verdicts"] = [verdict._asdict() | {"ok": verdict.ok} for verdict in verdicts]
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def _backend(device, dtype):
    """The backend of the swapped model's Performer layers."""
    op = "performer_layer"
    return t2t_fast.explain(op, device=device, dtype=DTYPES[dtype], training=True).chosen(op)


def main(argv=None):
    """Train, print the table, write what is asked for; exit code 1 if the swapped model is not neutral."""
    from ..measure import machine

    command = parser("neutrality", __doc__)
    command.add_argument("--quick", action="store_true", help=f"{QUICK.size} px and {QUICK.steps} steps")
    command.add_argument("--dtypes", nargs="+", choices=tuple(COLORS), default=list(COLORS))
    for name in Settings._fields:
        command.add_argument(f"--{name}", type=int)
    command.add_argument("--out", type=Path, help="folder for neutrality.json and neutrality.png")
    arguments = command.parse_args(argv)
    given = {name: value for name in Settings._fields if (value := getattr(arguments, name)) is not None}
    settings = (QUICK if arguments.quick else Settings())._replace(**given)
    out, environment, found = arguments.out, machine.describe(arguments.device), {}
    environment["backends"] = {name: _backend(arguments.device, name) for name in arguments.dtypes}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    for run in plan(arguments.dtypes):
        found[run] = train(run, settings, arguments.device)
        print(f"{run.name}: loss {smooth(found[run][0])[-1]:.4f}", flush=True)
        if out is not None:
            write(out / "neutrality.json", settings, environment, found)
    verdicts = judge(found, arguments.dtypes, settings.steps)
    print("\n".join(lines(found, verdicts)))
    if out is not None:
        write(out / "neutrality.json", settings, environment, found, verdicts)
        words = f"T2T-ViT-7, {settings.size} px, batch {settings.batch}, {arguments.device}, torch {torch.__version__}"
        print(f"figure: {draw(found, words, out / 'neutrality.png')}")
    return 0 if all(verdict.ok for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())

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

from ..measure import machine
from ..measure.text_tables import markdown
from .common import NAMES, parser, selected

FULL = {"size": 224, "batch": 32, "steps": 300}
QUICK = {"size": 64, "batch": 16, "steps": 30}

CELLS = 4  # rows and columns of the picture's cells; the cell of a crop's place is its class
SEED, OTHER_SEED = 42, 43  # of the initial weights; the first is the default of upstream's training script
CHANGE, CHANGED_RUNS = 1e-6, 2  # standard deviation of each weight's relative change, and the number of such runs
# Other kernels round differently, but not by orders of magnitude; a wrong gradient shows at 1000 times and more
ROOM = 10.0
RATE, DECAY = 5e-4, 0.03
# Share of the steps over which the learning rate rises, and after which a scaler must have found its scale
WARM_UP = 0.1


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


def train(run, device, size, batch, steps):
    """Losses of every step, and the steps that the gradient scaler skipped."""
    picture = natural_images(1, 3, 2 * size, 2 * size).to(device)
    model = model_for(run, size).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE, weight_decay=DECAY)
    rising = max(1, round(WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / rising))
    scaler = torch.amp.GradScaler(device, enabled=run.dtype == "fp16")
    order = torch.Generator().manual_seed(0)
    losses, skipped = [], []
    for step in range(steps):
        x, labels = crops(picture, size, batch, order)
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


def judge(found, dtypes, steps):
    """A verdict on the swapped model for each dtype; ``found``: run -> (losses, steps that the scaler skipped)."""
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
        own = away[Run("t2t_fast", dtype)]
        ok = own <= allowed and not late  # False for NaN
        verdicts.append({"dtype": dtype, "distance": own, "allowed": allowed, "skipped": late, "ok": ok})
    return verdicts


def report(found, verdicts):
    """Lines: a table of the runs, and a sentence for each verdict."""
    rows = []
    for run, (losses, skipped) in found.items():
        ends, away = smooth(losses), distance(losses, found[BASE][0])
        rows.append((run.name, f"{ends[0]:.4f}", f"{ends[-1]:.4f}", f"{away:.2e}", len(skipped)))
    yield from markdown(("run", "first loss", "last loss", "distance", "skipped steps"), rows)
    for verdict in verdicts:
        words = "neutral" if verdict["ok"] else "NOT neutral"
        late = f", skipped steps after the warm-up: {verdict['skipped']}" if verdict["skipped"] else ""
        distances = "distance {distance:.2e}, allowed {allowed:.2e}".format(**verdict)
        yield f"{verdict['dtype']}: {words}, {distances}{late}"


def main(argv=None):
    """Train, print the table, write what is asked for; exit code 1 if the swapped model is not neutral."""
    command = parser("neutrality", __doc__)
    command.add_argument("--quick", action="store_true", help=f"{QUICK['size']} px and {QUICK['steps']} steps")
    command.add_argument("--dtypes", nargs="+", choices=NAMES, default=NAMES)
    for name, default in FULL.items():
        command.add_argument(f"--{name}", type=int, help=f"default: {default}, with --quick {QUICK[name]}")
    command.add_argument("--out", type=Path, help="folder for neutrality.json, with every loss")
    arguments = command.parse_args(argv)
    device, dtypes, out = arguments.device, arguments.dtypes, arguments.out
    defaults = QUICK if arguments.quick else FULL
    sizes = {name: getattr(arguments, name) or default for name, default in defaults.items()}
    backends = selected("performer_layer", device, dtypes)
    content = {"environment": machine.describe(device), "backends": backends, **sizes, "runs": [], "verdicts": []}
    found = {}
    try:
        for run in plan(dtypes):
            found[run] = losses, skipped = train(run, device, **sizes)
            print(f"{run.name}: loss {smooth(losses)[-1]:.4f}", flush=True)
            content["runs"].append({"name": run.name, **run._asdict(), "losses": losses, "skipped": skipped})
        content["verdicts"] = judge(found, dtypes, sizes["steps"])
    finally:  # an interrupted run keeps what it has
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / "neutrality.json").write_text(json.dumps(content, indent=1) + "\n")
    print("\n".join(report(found, content["verdicts"])))
    return 0 if all(verdict["ok"] for verdict in content["verdicts"]) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Error of Performer attention against the norm of its queries and keys: upstream's form under autocast, and ours.

``python -m benchmarks.questions.stability [--device cpu|cuda] [--backend NAME] [--figure PATH]`` prints a Markdown
table. q, k and v are rounded to the dtype, w stays in float32 as the layer holds it, and the truth is float64 on the
same numbers. As eps gates the output to 0 with growing norms, errors are relative to the problem without a gate
(eps = 0): of the output, and the worst of dq, dk, dv, each relative to its own norm or that of dv if larger (at norm 0
dq vanishes). "NaN" means that a number is not finite.
"""

import math
import sys
from functools import partial

import torch

from t2t_fast.errors import BackendUnavailable
from t2t_fast.functional import performer_attention
from t2t_fast.testing import DTYPES, exact_attention, features

from ..measure.text_tables import markdown
from ..suites.attention import upstream
from .common import NAMES, parser, selected

NORMS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 16, 32, 100)
SEEDS = 5
BATCH, LENGTH, WIDTH, FEATURES = 2, 256, 64, 32
COLUMNS = [(form, name) for name in NAMES for form in ("upstream", "t2t_fast")]
COLORS = {"fp32": "#0072b2", "bf16": "#009e73", "fp16": "#d55e00"}
FLOOR, CROSSES = 1e-9, 10.0  # lower end of the figure's errors, and the place of the crosses for what is not finite


def inputs(norm, seed, length=LENGTH):
    """q and k with rows of one norm and independent directions, v, w, and a gradient for the output."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(BATCH, length, WIDTH, generator=generator) for _ in range(3))
    q, k = (norm * x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    w = features(generator, FEATURES, WIDTH)
    return q, k, v, w, torch.randn(BATCH, length, WIDTH, generator=generator)


def _run(function, tensors, w, gradient):
    """The output and the gradients of q, k and v."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves, w)
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient.to(y))]


def mean_gate(norm, seeds=SEEDS, length=LENGTH):
    """The share of the output that eps = 1e-8 lets through, over all tokens and seeds."""
    return sum(exact_attention(*inputs(norm, seed, length)[:4])[1].mean().item() for seed in range(seeds)) / seeds


def _errors(device, dtype, function, tensors, w, gradient):
    """Error of the output and worst error of a gradient; NaN if anything is not finite."""
    exact = _run(lambda *args: exact_attention(*args)[0], [t.double() for t in tensors], w, gradient)
    ungated = _run(lambda *args: exact_attention(*args, eps=0)[0], [t.double() for t in tensors], w, gradient)
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        results = _run(function, [t.to(device) for t in tensors], w.to(device), gradient.to(device))
    scales = torch.stack([t.norm() for t in ungated])
    scales[1:] = scales[1:].maximum(scales[-1])
    found = torch.stack([(value.cpu().double() - truth).norm() for value, truth in zip(results, exact, strict=True)])
    found = (found / scales).nan_to_num(math.nan, math.nan)
    return torch.stack((found[0], found[1:].amax()))


def measure(device, backend="auto", norms=NORMS, seeds=SEEDS, length=LENGTH):
    """Norm -> {"gate": its mean, (form, dtype name): (output error, worst gradient error), the worst of all seeds}.

    Raises:
        BackendUnavailable: the backend cannot run here.
    """
    functions = {"upstream": upstream, "t2t_fast": partial(performer_attention, backend=backend)}
    found = {}
    for norm in norms:
        found[norm] = {"gate": mean_gate(norm, seeds, length)}
        for form, name in COLUMNS:
            errors = []
            for seed in range(seeds):
                *tensors, w, gradient = inputs(norm, seed, length)
                *tensors, gradient = (t.to(DTYPES[name]) for t in (*tensors, gradient))
                errors.append(_errors(device, DTYPES[name], functions[form], tensors, w, gradient))
            found[norm][form, name] = tuple(torch.stack(errors).amax(0).tolist())  # NaN if there is one
    return found


def table(found):
    """Markdown: one row for each norm, cells "output / worst gradient"."""

    def number(value):
        return "NaN" if math.isnan(value) else "0" if value == 0 else f"{value:.1e}"

    rows = []
    for norm, cells in found.items():
        gate = f"{cells['gate']:.2f}" if cells["gate"] >= 0.01 else number(cells["gate"])
        rows.append((f"{norm:g}", gate, *(" / ".join(map(number, cells[column])) for column in COLUMNS)))
    return "\n".join(markdown(("norm", "mean gate", *(f"{form}, {name}" for form, name in COLUMNS)), rows))


def heading(device, backend="auto"):
    """What was measured, in a line."""
    backends = dict.fromkeys(NAMES, backend)
    if backend == "auto":
        backends = selected("performer_attention", device, NAMES, width=WIDTH, features=FEATURES)
    ours = ", ".join(f"{name} {chosen}" for name, chosen in backends.items())
    size = f"Batch {BATCH}, {LENGTH} tokens of width {WIDTH}, {FEATURES} features; worst of {SEEDS} seeds."
    return f"t2t_fast: {ours}. {device}, torch {torch.__version__}. {size}"


def draw(found, words, path):
    """Draw the table into a PNG: error of the output and of the worst gradient; ``words``: what was measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 5.4), layout="constrained")
    figure.suptitle(f"{words} Crosses: not finite.", fontsize=9, color="#555555")
    titles = ("error of the output", "error of the worst gradient (of dq, dk, dv)")
    for part, axis in enumerate(figure.subplots(1, 2)):
        axis.set(title=titles[part], xlabel="norm of each query and key", yscale="log", ylim=(FLOOR, 3 * CROSSES))
        for form, name in COLUMNS:
            values = [max(cells[form, name][part], FLOOR) for cells in found.values()]  # NaN stays NaN
            style = {"linestyle": "--", "mfc": "white"} if form == "upstream" else {}
            style |= {"color": COLORS[name], "clip_on": False, "label": f"{form}, {name}"}
            axis.plot(values, marker="o", **style)
            lost = [place for place, value in enumerate(values) if math.isnan(value)]
            axis.plot(lost, [CROSSES] * len(lost), "x", color=COLORS[name], ms=9, mew=2.5)
        axis.set_xticks(range(len(found)), [f"{norm:g}" for norm in found])
    figure.axes[0].set_ylabel("relative to the problem without a gate")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=110)


def main(argv=None):
    """Print the table, draw the figure if asked; exit code 1 if any of our results is not finite."""
    command = parser("stability", __doc__)
    backends = ("auto", "aten", "native", "triton")
    command.add_argument("--backend", choices=backends, default="auto", help="of t2t_fast; default: auto")
    command.add_argument("--figure", metavar="PATH", help="draw the table into this PNG")
    arguments = command.parse_args(argv)
    try:
        found = measure(arguments.device, arguments.backend)
    except BackendUnavailable as error:
        command.error(str(error))
    words = heading(arguments.device, arguments.backend)
    print(f"{table(found)}\n\n{words}")
    if arguments.figure:
        draw(found, words, arguments.figure)
    ours = [value for cells in found.values() for name in NAMES for value in cells["t2t_fast", name]]
    return 1 if any(map(math.isnan, ours)) else 0


if __name__ == "__main__":
    sys.exit(main())

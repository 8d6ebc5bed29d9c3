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

from t2t_fast.backends import explain
from t2t_fast.errors import BackendUnavailable
from t2t_fast.functional import performer_attention
from t2t_fast.testing import DTYPES, exact_attention, features

from ..measure.text_tables import markdown
from ..suites.attention import upstream
from .common import COLORS, panels, parser, save

NORMS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 16, 32, 100)
SEEDS = 5
BATCH, LENGTH, WIDTH, FEATURES = 2, 256, 64, 32
NAMES, FORMS = tuple(COLORS), ("upstream", "t2t_fast")
COLUMNS = [(form, name) for name in NAMES for form in FORMS]

FLOOR, TOP = 1e-9, 1e2
"""Ends of the figure's error axis; above 1 is room for the crosses."""
NAN_ROWS = {"fp32": 4.0, "bf16": 25.0, "fp16": 10.0}


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


def _largest(values):
    """The largest; NaN if there is one."""
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def _errors(results, exact, ungated):
    """(error of the output, worst error of a gradient); NaN if anything is not finite."""
    floor = ungated[-1].norm()
    scales = [ungated[0].norm(), *(torch.maximum(t.norm(), floor) for t in ungated[1:])]
    shares = [
        ((value.cpu().double() - truth).norm() / scale).item()
        for value, truth, scale in zip(results, exact, scales, strict=True)
    ]
    output, *gradients = (share if math.isfinite(share) else math.nan for share in shares)
    return output, _largest(gradients)


def _both(device, backend, dtype, tensors, w, gradient):
    """Form -> errors, for tensors that are rounded to ``dtype``."""
    wide = [t.double() for t in tensors]
    exact = _run(lambda *args: exact_attention(*args)[0], wide, w, gradient)
    ungated = _run(lambda *args: exact_attention(*args, eps=0)[0], wide, w, gradient)
    found = {}
    for form, function in zip(FORMS, (upstream, partial(performer_attention, backend=backend)), strict=True):
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            result = _run(function, [t.to(device) for t in tensors], w.to(device), gradient.to(device))
        found[form] = _errors(result, exact, ungated)
    return found


def measure(device, backend="auto", norms=NORMS, seeds=SEEDS, length=LENGTH):
    """Norm -> {"gate": its mean, (form, dtype name): (output error, worst gradient error), the worst of all seeds}.

    Raises:
        BackendUnavailable: the backend cannot run here.
    """
    found = {}
    for norm in norms:
        errors = {}
        for seed in range(seeds):
            *tensors, w, gradient = inputs(norm, seed, length)
            for name in NAMES:
                dtype = DTYPES[name]
                rounded = [t.to(dtype) for t in tensors]
                for form, pair in _both(device, backend, dtype, rounded, w, gradient.to(dtype)).items():
                    errors.setdefault((form, name), []).append(pair)
        worst = {column: tuple(map(_largest, zip(*pairs, strict=True))) for column, pairs in errors.items()}
        found[norm] = {"gate": mean_gate(norm, seeds, length), **worst}
    return found


def finite(found):
    """Whether all our results are."""
    return not any(math.isnan(value) for cells in found.values() for name in NAMES for value in cells["t2t_fast", name])


def _number(value):
    return "NaN" if math.isnan(value) else "0" if value == 0 else f"{value:.1e}"


def table(found):
    """Markdown: one row for each norm, cells "output / worst gradient"."""
    rows = []
    for norm, cells in found.items():
        gate = f"{cells['gate']:.2f}" if cells["gate"] >= 0.01 else _number(cells["gate"])
        rows.append((f"{norm:g}", gate, *(" / ".join(map(_number, cells[column])) for column in COLUMNS)))
    return "\n".join(markdown(("norm", "mean gate", *(f"{form}, {name}" for form, name in COLUMNS)), rows))


def heading(device, backend="auto", seeds=SEEDS, length=LENGTH):
    """What was measured, in a line."""
    op, ran = "performer_attention", {}
    for name in NAMES:
        explained = explain(op, device=device, dtype=DTYPES[name], width=WIDTH, features=FEATURES, training=True)
        ran.setdefault(explained.chosen(op) if backend == "auto" else backend, []).append(name)
    ours = ", ".join(f"{chosen} ({', '.join(names)})" for chosen, names in ran.items())
    return (
        f"t2t_fast: {ours}. {device}, torch {torch.__version__}. Batch {BATCH}, {length} tokens of width {WIDTH}, "
        f"{FEATURES} features; worst of {seeds} seeds."
    )


def curves(axis, found, part):
    """Errors over the norms, at least :data:`FLOOR`; NaN as a cross in the area above 1."""
    places = range(len(found))
    for form, name in COLUMNS:
        values = [cells[form, name][part] for cells in found.values()]
        style = {"linestyle": "--", "mfc": "white"} if form == "upstream" else {}
        drawn = [max(value, FLOOR) for value in values]  # NaN stays NaN
        axis.plot(places, drawn, marker="o", color=COLORS[name], label=f"{form}, {name}", clip_on=False, ms=5, **style)
        lost = [place for place, value in zip(places, values, strict=True) if math.isnan(value)]
        axis.plot(lost, [NAN_ROWS[name]] * len(lost), "x", color=COLORS[name], ms=9, mew=2.5)
    axis.set(yscale="log", ylim=(FLOOR, TOP), xlabel="norm of each query and key")
    powers = range(round(math.log10(FLOOR)), 1)
    axis.set_yticks([*(10.0**power for power in powers), TOP**0.5], [*(f"1e{power}" for power in powers), "NaN"])
    axis.minorticks_off()
    axis.axhspan(1, TOP, color="#f0f0f0", zorder=0)
    axis.set_xticks(places, [f"{norm:g}" for norm in found])


def draw(found, words, path):
    """Draw the table into a PNG: error of the output and of the worst gradient. Returns its path."""
    figure, axes = panels(words, "error of the output", "error of the worst gradient (of dq, dk, dv)")
    for part, axis in enumerate(axes):
        curves(axis, found, part)
    axes[0].set_ylabel("relative to the problem without a gate")
    return save(figure, path)


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
        print(f"figure: {draw(found, words, arguments.figure)}")
    return 0 if finite(found) else 1


if __name__ == "__main__":
    sys.exit(main())

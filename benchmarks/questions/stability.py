"""Error of Performer attention against the norm of its queries and keys: upstream's form under autocast, and ours.

``python -m benchmarks.questions.stability [--device cpu|cuda] [--backend NAME] [--figure PATH]`` prints a
Markdown table. q, k and v are rounded to the dtype, w stays in float32 as the layer holds it, and the truth is float64
on the same numbers.
As eps gates the output to 0 with growing norms, errors are relative to the problem without a gate (eps = 0): of the
output, and the worst of dq, dk, dv, each relative to its own norm or that of dv if larger (at norm 0 dq vanishes).
"NaN" means that a number is not finite.
"""

import argparse
import math
import sys
from functools import partial

import torch

from t2t_fast.backends import explain
from t2t_fast.errors import BackendUnavailable
from t2t_fast.functional import performer_attention
from t2t_fast.testing import DTYPES, exact_attention, features

from ..suites.attention import upstream

NORMS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 16, 32, 100)
SEEDS = 5
BATCH, LENGTH, WIDTH, FEATURES = 2, 256, 64, 32
NAMES = ("fp32", "bf16", "fp16")
FORMS = ("upstream", "t2t_fast")
BACKENDS = ("auto", "aten", "native", "triton")

COLORS = {"fp32": "#0072b2", "bf16": "#009e73", "fp16": "#d55e00"}
STYLES = {"upstream": {"linestyle": "--", "marker": "o", "mfc": "white"}, "t2t_fast": {"linestyle": "-", "marker": "o"}}
FLOOR, TOP = 1e-9, 1e2
"""Ends of the figure's error axis; above 1 is room for the crosses."""
NAN_ROWS = {"fp32": 4.0, "bf16": 25.0, "fp16": 10.0}


def inputs(norm, seed, length=LENGTH):
    """q and k with rows of one norm and independent directions, v, w, and a gradient for the output."""
    generator = torch.Generator().manual_seed(seed)

    def rows():
        return torch.randn(BATCH, length, WIDTH, generator=generator)

    q, k = (norm * x / x.norm(dim=-1, keepdim=True) for x in (rows(), rows()))
    return q, k, rows(), features(generator, FEATURES, WIDTH), rows()


def _run(function, tensors, w, gradient):
    """The output and the gradients of q, k and v."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves, w)
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient.to(y))]


def mean_gate(norm, seeds=SEEDS, length=LENGTH):
    """How much of the output eps = 1e-8 lets through, over all tokens and seeds."""
    gates = []
    for seed in range(seeds):
        q, k, v, w, _ = inputs(norm, seed, length)
        gates.append(exact_attention(q, k, v, w)[1].mean().item())
    return sum(gates) / len(gates)


def _largest(values):
    """The largest; NaN if there is one."""
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def _errors(found, exact, ungated):
    """(error of the output, worst error of a gradient); NaN if anything in it is not finite."""
    floor = ungated[-1].norm()
    scales = [ungated[0].norm(), *(torch.maximum(t.norm(), floor) for t in ungated[1:])]
    shares = [
        ((value.cpu().double() - truth).norm() / scale).item()
        for value, truth, scale in zip(found, exact, scales, strict=True)
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
    """Whether everything of ours is."""
    ours = (cells["t2t_fast", name] for cells in found.values() for name in NAMES)
    return not any(math.isnan(value) for pair in ours for value in pair)


def _number(value):
    return "NaN" if math.isnan(value) else "0" if value == 0 else f"{value:.1e}"


def gate_text(gate):
    """A mean gate in the table."""
    return f"{gate:.2f}" if gate >= 0.01 else _number(gate)


def table(found):
    """Markdown: one row for each norm, cells "output / worst gradient"."""
    columns = [(form, name) for name in NAMES for form in FORMS]
    lines = [f"| norm | mean gate | {' | '.join(f'{form}, {name}' for form, name in columns)} |"]
    lines.append("|---" * (2 + len(columns)) + "|")
    for norm, cells in found.items():
        numbers = (" / ".join(map(_number, cells[column])) for column in columns)
        lines.append(f"| {norm:g} | {gate_text(cells['gate'])} | {' | '.join(numbers)} |")
    return "\n".join(lines)


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


def _curves(axis, found, part):
    """Errors over the norms; what is below :data:`FLOOR` stands on the axis, NaN as a cross in the row above."""
    places = range(len(found))
    for form, name in [(form, name) for form in FORMS for name in NAMES]:
        values = [cells[form, name][part] for cells in found.values()]
        drawn = [max(value, FLOOR) if math.isfinite(value) else math.nan for value in values]
        style = {"color": COLORS[name], "markersize": 5, "linewidth": 1.8, **STYLES[form]}
        axis.plot(places, drawn, label=f"{form}, {name}", clip_on=False, **style)
        lost = [place for place, value in zip(places, values, strict=True) if math.isnan(value)]
        axis.plot(lost, [NAN_ROWS[name]] * len(lost), "x", color=COLORS[name], ms=9, mew=2.5)
    powers = range(round(math.log10(FLOOR)), 1)
    labels = [f"≤ 1e{power}" if power == powers[0] else f"1e{power}" for power in powers]
    axis.set_yscale("log")
    axis.set_ylim(FLOOR, TOP)
    axis.set_yticks([*(10.0**power for power in powers), TOP**0.5], [*labels, "NaN"])
    axis.minorticks_off()
    axis.axhspan(1, TOP, color="#f0f0f0", zorder=0)
    axis.set_xticks(places, [f"{norm:g}" for norm in found])
    axis.set_xlabel("norm of each query and key")
    axis.spines[["top"]].set_visible(False)


def draw(found, words, path):
    """Draw the table into a PNG: error of the output and of the worst gradient, and the mean gate. Returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(12.5, 5.6), sharey=True, layout="constrained")
    for part, (axis, title) in enumerate(zip(panels, ("output", "worst gradient (of dq, dk, dv)"), strict=True)):
        _curves(axis, found, part)
        axis.set_title(f"error of the {title}", loc="left", fontsize=11)
        gates = axis.twinx()
        gate = [cells["gate"] for cells in found.values()]
        (line,) = gates.plot(range(len(found)), gate, color="#777777", linewidth=0.9)
        gates.set_ylim(0, math.log(TOP / FLOOR) / math.log(1 / FLOOR))  # 1 stands where the room for crosses begins
        gates.set_yticks([0, 0.25, 0.5, 0.75, 1])
        gates.spines[["top"]].set_visible(False)
        gates.tick_params(colors="#777777", labelright=part == 1)
    gates.set_ylabel("mean gate", color="#777777")
    panels[0].set_ylabel("relative to the problem without a gate")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend([*handles, line], [*labels, "mean gate"], loc="outside lower center", ncols=7, frameon=False)
    figure.suptitle(words, fontsize=9, color="#555555")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def main(argv=None):
    """Print the table, draw the figure if asked; exit code 1 if anything of ours is not finite."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.questions.stability", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="of t2t_fast; default: auto")
    parser.add_argument("--figure", metavar="PATH", help="draw the table into this PNG")
    arguments = parser.parse_args(argv)
    try:
        found = measure(arguments.device, arguments.backend)
    except BackendUnavailable as error:
        parser.error(str(error))
    words = heading(arguments.device, arguments.backend)
    print(f"{table(found)}\n\n{words}")
    if arguments.figure:
        print(f"figure: {draw(found, words, arguments.figure)}")
    return 0 if finite(found) else 1


if __name__ == "__main__":
    sys.exit(main())

"""The pictures of a run: what each shows, and whether a run has rows for it."""

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

from ..suites.groups import LITE
from . import chart, crossover, dots, latency_chart, memory_chart, roofline, scaling_chart
from .cases import cases, headline, main_dtype, of


class Picture(NamedTuple):
    """A PNG file of the report.

    ``make``: from a run to a matplotlib figure, ``None`` where the run has no rows for it.
    """

    name: str
    alt: str
    make: Callable


def _front(run, wanted):
    """The headline cases of models and T2T modules in one dtype; ``wanted``: which of them."""
    found = _in_one_dtype(headline(of(run.rows, "models", "training", "module")))
    return cases([row for row in found if wanted(row)])


def _in_one_dtype(found):
    return [row for row in found if row["dtype"] == main_dtype(found)]


def _first(row):
    return row["level"] == "module" or row["subject"] in LITE


def _larger(row):
    return not _first(row)


def _with_memory(run):
    """Cases of which upstream's memory and another provider's are known: others have nothing to compare."""
    drawn = []
    for case in _front(run, lambda row: True):
        known = [row["provider"] for row in case.rows if row["saved_bytes"] or row["peak_bytes"]]
        if "upstream" in known and len(known) > 1:
            drawn.append(case)
    return drawn


def _drawn(make, members, run):
    return make(members, run.environment) if members else None


PICTURES = (
    Picture(
        "chart",
        "bars of the speed-up over upstream: lite models and T2T modules",
        lambda run: _drawn(chart.speed, _front(run, _first), run),
    ),
    Picture(
        "chart-models",
        "bars of the speed-up over upstream: larger models",
        lambda run: _drawn(chart.speed, _front(run, _larger), run),
    ),
    Picture(
        "chart-operators",
        "points of the speed-up over upstream, operator by operator",
        lambda run: _drawn(dots.operators, headline(of(run.rows, "ops")), run),
    ),
    Picture(
        "memory",
        "bars of the memory that a call keeps and needs, relative to upstream",
        lambda run: _drawn(memory_chart.memory, _with_memory(run), run),
    ),
    Picture(
        "fits",
        "bars of the largest batch whose training step fits",
        lambda run: _drawn(memory_chart.fits, memory_chart.fit_cases(run.fits), run),
    ),
    Picture(
        "floor",
        "points of the share of its floor that each case reaches, the farthest first",
        lambda run: _drawn(roofline.floor, run.rows, run),
    ),
    Picture(
        "roofline",
        "speed reached against arithmetic intensity, below the measured limits of the machine",
        lambda run: _drawn(roofline.roofline, run.rows, run),
    ),
    Picture(
        "scaling",
        "lines of the time an image against batch and against image side",
        lambda run: _drawn(scaling_chart.scaling, of(run.rows, "scaling"), run),
    ),
    Picture(
        "crossover",
        "lines of time and memory a token against the number of tokens",
        lambda run: _drawn(crossover.draw, crossover.curves(run.rows), run),
    ),
    Picture(
        "processes",
        "lines of images a second against the number of processes",
        lambda run: _drawn(scaling_chart.processes, run.processes, run),
    ),
    Picture(
        "latency",
        "bars of the latency of single calls",
        lambda run: _drawn(latency_chart.latency, cases(_in_one_dtype(of(run.rows, "latency"))), run),
    ),
)
"""In the order of the report."""


def obstacle():
    """Why nothing can be drawn here, in words, or ``None``: a machine that measures need not be able to draw."""
    for package, module in (("matplotlib", "matplotlib"), ("pillow", "PIL")):
        try:
            import_module(module)
        except ImportError as failure:
            return f"pictures need {package} ({failure}); where it is, python -m benchmarks.report draws them"
    return None


def draw(run, folder):
    """Write the PNG files for which a run has rows. Returns name -> path."""
    paths = {}
    for picture in PICTURES:
        figure = picture.make(run)
        if figure is not None:
            paths[picture.name] = chart.save(figure, folder / f"{picture.name}.png")
    return paths

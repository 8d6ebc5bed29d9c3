"""Where Performer attention overtakes softmax attention: every provider's time and memory a token, by the length."""

from math import exp, log
from typing import NamedTuple

from ..measure.statistics import ratios
from ..suites.groups import MODES
from .chart import HALO, INK, TEXT, TITLE, blank, legend
from .scaling_chart import lines, logarithmic

OURS, SOFTMAX = "t2t_fast", "sdpa"
SUBJECT = "performer_attention-L"
PICTURE = "crossover.png"


class Curve(NamedTuple):
    """The rows of one provider in one mode by their number of tokens, shortest first."""

    mode: str
    provider: str
    rows: dict[int, dict]


def curves(found):
    """The :class:`Curve` of every provider and mode; none if the run has fewer than two lengths.

    In one dtype: the one with the most rows.
    """
    members = [row for row in found if row["subject"].startswith(SUBJECT)]
    dtypes = [row["dtype"] for row in members]
    members = [row for row in members if row["dtype"] == max(dtypes, key=dtypes.count)]
    if len({_length(row) for row in members}) < 2:
        return []
    drawn = []
    for mode in MODES:
        for provider in dict.fromkeys(row["provider"] for row in members):
            rows = [row for row in members if (row["mode"], row["provider"]) == (mode, provider)]
            if rows:
                drawn.append(Curve(mode, provider, {_length(row): row for row in sorted(rows, key=_length)}))
    return drawn


def _length(row):
    return int(row["subject"].removeprefix(SUBJECT))


def tokens(row):
    """Tokens of a call."""
    return row["batch"] * _length(row)


def speedups(drawn, mode):
    """[(length, how many times faster ours is than softmax attention)] where both were measured."""
    by_provider = {curve.provider: curve.rows for curve in drawn if curve.mode == mode}
    ours, softmax = by_provider.get(OURS, {}), by_provider.get(SOFTMAX, {})
    return [(n, ratios(softmax[n]["times"], ours[n]["times"])["median"]) for n in ours if n in softmax]


def crossing(points):
    """The length from which on ours is faster, between two measured lengths; ``None`` if it is not between any.

    Straight lines between logarithms: at long lengths softmax attention grows with L^2 and Performer attention with L.
    """
    for (short, before), (long, after) in zip(points[-2::-1], points[:0:-1], strict=True):
        if after <= 1:
            return None
        if before <= 1:
            return exp(log(short) + (log(long) - log(short)) * -log(before) / (log(after) - log(before)))
    return None


def words(mode, dtype, points):
    """What the points of a mode say, in a sentence."""
    (first, slowest), (last, fastest) = points[0], points[-1]
    measured = f"{slowest:.2f}x its speed at {first} tokens, {fastest:.2f}x at {last}"
    where = crossing(points)
    if where is not None:
        verdict = f"faster than softmax attention from about {where:.0f} tokens on"
    elif all(speedup > 1 for _, speedup in points):
        verdict = "faster than softmax attention at every measured length"
    else:
        verdict = "not faster than softmax attention at the longest measured length"
    return f"{dtype}, {mode}: t2t_fast is {verdict} ({measured})"


def sentences(drawn):
    """One for each mode in which both were measured."""
    found = []
    for mode in MODES:
        points = speedups(drawn, mode)
        if points:
            dtype = next(iter(drawn[0].rows.values()))["dtype"]
            found.append(words(mode, dtype, points))
    return found


def _mark(axis, where):
    axis.axvline(where, color=INK, linewidth=0.8, linestyle=":")
    axis.annotate(
        f"crossing at L = {where:.0f}",
        (where, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -4),
        textcoords="offset points",
        va="top",
        fontsize=TEXT,
        bbox=HALO,
    )


def _nanoseconds(row):
    return 1e9 * row["seconds"]["median"] / tokens(row)


def _peak(row):
    return None if not row["peak_bytes"] else row["peak_bytes"] / tokens(row)


def draw(drawn, environment):
    """Times above, memory below, a column for each mode."""
    modes = [mode for mode in MODES if any(curve.mode == mode for curve in drawn)]
    lengths = sorted({n for curve in drawn for n in curve.rows})
    figure, axes = blank(8.2, environment, nrows=2, ncols=len(modes), sharex=True)
    for column, mode in enumerate(modes):
        members = [row for curve in drawn if curve.mode == mode for row in curve.rows.values()]
        top, bottom = axes[:, column]
        lines(top, members, _length, _nanoseconds)
        lines(bottom, members, _length, _peak)
        for axis in (top, bottom):
            logarithmic(axis, lengths, rotation=45)
        # memory a token hardly changes: from 0 on, its size can be read
        bottom.set_yscale("linear")
        bottom.set_ylim(bottom=0)
        where = crossing(speedups(drawn, mode))
        if where is not None:
            _mark(top, where)
        top.set_title(f"Performer attention, {members[0]['dtype']}, {mode}", loc="left", fontsize=TITLE, color=INK)
        top.set_ylabel("time a token, ns", fontsize=TEXT)
        bottom.set_ylabel("peak memory of a call, bytes a token", fontsize=TEXT)
        bottom.set_xlabel("tokens of a sequence, L", fontsize=TEXT)
    legend(figure, axes, columns=3)
    return figure

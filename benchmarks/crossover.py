"""Where Performer attention overtakes softmax attention: every provider's time and memory a token, by the length."""

from math import exp, log
from pathlib import Path
from typing import NamedTuple

from .chart import COLORS
from .groups import MODES
from .statistics import ratios

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


def _lines(axis, members, value):
    """A line for each provider; rows without the value are left out."""
    for curve in members:
        points = [(n, value(row)) for n, row in curve.rows.items() if value(row) is not None]
        if not points:
            continue
        row = next(iter(curve.rows.values()))
        axis.plot(
            *zip(*points, strict=True),
            marker="o",
            markersize=4,
            color=COLORS[curve.provider],
            label=row["label"] + (" †" if row["another_function"] else ""),
            linestyle="--" if curve.provider.endswith("-compiled") else "-",
            linewidth=2.4 if curve.provider == OURS else 1.3,
        )
    axis.set_xscale("log")
    axis.grid(True, which="major", linewidth=0.4)
    axis.spines[["top", "right"]].set_visible(False)


def _mark(axis, where):
    axis.axvline(where, color="black", linewidth=0.8, linestyle=":")
    axis.annotate(
        f"crossing at L = {where:.0f}",
        (where, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -4),
        textcoords="offset points",
        va="top",
        fontsize=9,
    )


def _nanoseconds(row):
    return 1e9 * row["seconds"]["median"] / tokens(row)


def _peak(row):
    return None if not row["peak_bytes"] else row["peak_bytes"] / tokens(row)


def draw(drawn, heading, folder):
    """Draw ``crossover.png``: times above, memory below, a column for each mode. Returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    modes = [mode for mode in MODES if any(curve.mode == mode for curve in drawn)]
    figure, axes = plt.subplots(
        2, len(modes), figsize=(1 + 7 * len(modes), 10), sharex=True, squeeze=False, layout="constrained"
    )
    for column, mode in enumerate(modes):
        members = [curve for curve in drawn if curve.mode == mode]
        top, bottom = axes[:, column]
        _lines(top, members, _nanoseconds)
        top.set_yscale("log")
        _lines(bottom, members, _peak)
        bottom.set_ylim(bottom=0)
        where = crossing(speedups(drawn, mode))
        if where is not None:
            _mark(top, where)
        dtype = next(iter(members[0].rows.values()))["dtype"]
        top.set_title(f"Performer attention, {dtype}, {mode}", fontsize=11)
        top.set_ylabel("time a token, ns")
        bottom.set_ylabel("peak memory of a call, bytes a token")
        bottom.set_xlabel("tokens of a sequence, L")
        lengths = sorted({n for curve in members for n in curve.rows})
        bottom.set_xticks(lengths, [f"{n:,}".replace(",", "\u2009") for n in lengths], rotation=45, fontsize=8)
        bottom.minorticks_off()
    handles = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(f"{heading}\n† computes another function", fontsize=8, wrap=True)
    path = Path(folder) / PICTURE
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path

"""Pictures of growth: time an image against batch and image side, images a second against processes."""

from math import log

from ..suites.groups import MODES
from .cases import OURS, SIDE, subject
from .chart import COLORS, HALO, INK, LINE, MUTED, TEXT, TITLE, blank, legend, marker
from .words import label, number


def line(axis, entries, x, y):
    """A provider's line through the places (x, y) of its entries, in the order of x."""
    entries = sorted(entries, key=x)
    first = entries[0]
    axis.plot(
        [x(each) for each in entries],
        [y(each) for each in entries],
        marker=marker(first["provider"]),
        markersize=5,
        color=COLORS[first["provider"]],
        label=label(first),
        gid=first["provider"],
        linestyle="--" if first["provider"].endswith("-compiled") else "-",
        linewidth=2.6 if first["provider"] == OURS else 1.5,
        zorder=3 if first["provider"] == OURS else 2,
    )


def lines(axis, entries, x, y):
    """A line for every provider; entries whose y is ``None`` are left out."""
    entries = [each for each in entries if y(each) is not None]
    for provider in dict.fromkeys(each["provider"] for each in entries):
        line(axis, [each for each in entries if each["provider"] == provider], x, y)


def logarithmic(axis, places, rotation=0):
    """A logarithmic x axis with a tick at every measured place, and a logarithmic y axis with plain numbers."""
    from matplotlib.ticker import NullLocator

    axis.set_xscale("log")
    axis.xaxis.set_minor_locator(NullLocator())
    labels, last = [], 0.0
    for place in places:
        far = not last or log(place / last) > CLOSE * log(places[-1] / places[0])
        labels.append(grouped(place) if far else "")
        last = place if far else last
    axis.set_xticks(places, labels, rotation=rotation)
    axis.set_yscale("log")
    plain(axis.yaxis)
    axis.grid(color=LINE, linewidth=0.8)


CLOSE = 0.05
"""Of an axis' length: ticks closer to the one before have no number, which would stand on its."""


def plain(axis):
    """Plain numbers at 1, 2 and 5 times the powers of ten on a logarithmic axis, or fewer where it spans many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 3000 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}".replace(",", THIN)))
    axis.set_minor_formatter(NullFormatter())


THIN = "\u2009"


def grouped(count):
    """A whole number with thin spaces between thousands."""
    return f"{count:,}".replace(",", THIN)


def _milliseconds(row):
    return 1e3 * row["seconds"]["median"] / row["batch"]


def _sweeps(found):
    """(title, x, rows) of the batch and of the image side; one with a single place says nothing."""
    sweeps = [
        ("batch", f"batch, {SIDE} px", [row for row in found if row["size"] == SIDE]),
        ("size", "image side in pixels, batch 1", [row for row in found if row["batch"] == 1]),
    ]
    return [(key, words, rows) for key, words, rows in sweeps if len({row[key] for row in rows}) > 1]


def scaling(found, environment):
    """Time an image against the batch and the image side, a row of panels for each mode; ``None`` without a sweep."""
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in found)]
    sweeps = _sweeps(found)
    if not sweeps:
        return None
    figure, axes = blank(0.9 + 3.6 * len(modes), environment, nrows=len(modes), ncols=len(sweeps))
    for mode, across in zip(modes, axes, strict=True):
        for axis, (key, words, rows) in zip(across, sweeps, strict=True):
            members = [row for row in rows if row["mode"] == mode]
            lines(axis, members, lambda row, key=key: row[key], _milliseconds)
            logarithmic(axis, sorted({row[key] for row in rows}))
            axis.set_title(f"{subject(found[0])}, {found[0]['dtype']}, {mode}", loc="left", fontsize=TITLE, color=INK)
            axis.set_xlabel(words, fontsize=TEXT)
            axis.set_ylabel("ms an image", fontsize=TEXT)
    legend(figure, axes)
    return figure


def processes(entries, environment):
    """Images a second of all processes against their number, with what a perfect division would give."""
    settings = {}
    for each in entries:
        words = f"{each['subject']}, {each['size']} px, batch {each['batch']} a process, {each['dtype']}"
        settings.setdefault(words, []).append(each)
    figure, axes = blank(0.8 + 3.6 * len(settings), environment, nrows=len(settings))
    for axis, (words, members) in zip(axes[:, 0], settings.items(), strict=True):
        lines(axis, members, lambda each: each["processes"], lambda each: each["images_per_s"])
        counts = sorted({each["processes"] for each in members})
        for each in members:
            axis.annotate(
                number(each["images_per_s"]),
                (each["processes"], each["images_per_s"]),
                (0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=TEXT,
                color=COLORS[each["provider"]],
                bbox=HALO,
            )
            if each["processes"] == counts[0]:
                whole = [each["images_per_s"] * count / counts[0] for count in counts]
                axis.plot(counts, whole, color=MUTED, linewidth=1, linestyle=":", label="perfect division", zorder=1)
        axis.set_xticks(counts)
        axis.set_ylim(bottom=0)
        axis.margins(x=0.06, y=0.12)
        axis.grid(color=LINE, linewidth=0.8)
        axis.set_title(words, loc="left", fontsize=TITLE, color=INK)
        axis.set_xlabel("processes, one thread each", fontsize=TEXT)
        axis.set_ylabel("images/s of all", fontsize=TEXT)
    legend(figure, axes)
    return figure

"""Pictures of memory: what a call keeps and needs, and how many images of a training step fit."""

from functools import partial

from .cases import Case
from .chart import ALARM, COLORS, INK, MUTED, TEXT, Rows, blank
from .words import megabytes_per_image, number

PANELS = {"saved_bytes": "kept for backward", "peak_bytes": "peak of a call"}


def _share(row, key, baselines):
    """A memory field over upstream's of the same case; ``None`` where one of both is unknown or upstream has none."""
    base = baselines.get(row["group"])
    if row[key] is None or base is None or not base[key]:
        return None
    return row[key] / base[key]


def _numbers(row, key, baselines):
    share = _share(row, key, baselines)
    return number(megabytes_per_image(row, key)), ALARM if share is not None and share > 1 else INK


def memory(cases, environment):
    """Bars of every row's memory relative to upstream eager, with MB an image in numbers."""
    rows = Rows(cases)
    baselines = {row["group"]: row for _, row in rows.entries if row["provider"] == "upstream"}
    figure, (axes,) = blank(rows.height, environment, ncols=2, sharey=True)
    for axis, (key, words) in zip(axes, PANELS.items(), strict=True):
        shares = {place: _share(row, key, baselines) for place, row in rows.entries}
        for place, row in rows.entries:
            if shares[place] is not None:
                axis.barh(place, shares[place], height=0.74, color=COLORS[row["provider"]])
        rows.frame(axis, labels=axis is axes[0])
        axis.set_xlim(0, 1.05 * max([1.0, *(share for share in shares.values() if share is not None)]))
        axis.axvline(1, color=INK, linewidth=1)
        axis.set_xlabel(f"{words}, relative to upstream eager", fontsize=TEXT)
        rows.column(axis, 52, "MB / image", partial(_numbers, key=key, baselines=baselines))
    return figure


def fit_cases(fits):
    """A case for every group of largest batches."""
    groups = {}
    for each in fits:
        groups.setdefault(each["group"], []).append(each)
    return [
        Case(
            f"{members[0]['subject']}, {members[0]['size']} px, {members[0]['dtype']}, {members[0]['mode']} step in "
            f"{members[0]['limit_bytes'] / 1e9:.3g} GB",
            members,
        )
        for members in groups.values()
    ]


def fits(cases, environment):
    """Bars of the largest batch of every provider, with images and times upstream's in numbers."""
    rows = Rows(cases)
    baselines = {each["group"]: each["batch"] for _, each in rows.entries if each["provider"] == "upstream"}
    figure, ((axis,),) = blank(rows.height, environment)
    for place, each in rows.entries:
        axis.barh(place, each["batch"], height=0.74, color=COLORS[each["provider"]])
    rows.frame(axis, labels=True)
    axis.set_xlim(0, 1.05 * max([1, *(each["batch"] for _, each in rows.entries)]))
    axis.set_xlabel("largest batch whose training step fits, images", fontsize=TEXT)
    rows.column(axis, 58, "images", lambda each: f"{each['batch']}" if each["batch"] else ("none fits", ALARM))

    def ratio(each):
        base = baselines.get(each["group"])
        if each["provider"] == "upstream" or not base:
            return "", MUTED
        return f"{number(each['batch'] / base)}×", ALARM if each["batch"] < base else INK

    rows.column(axis, 132, "× upstream", ratio)
    return figure

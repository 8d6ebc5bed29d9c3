"""Picture of latency: how long one call with few images takes, and how long in the worst of twenty."""

from .chart import COLORS, INK, TEXT, Rows, blank, speedup_text
from .words import number


def latency(cases, environment):
    """Bars of the median time of a call; a tick marks the 95th percentile of the rounds."""
    rows = Rows(cases)
    figure, ((axis,),) = blank(rows.height, environment)
    for place, row in rows.entries:
        seconds = row["seconds"]
        axis.barh(place, 1e3 * seconds["median"], height=0.74, color=COLORS[row["provider"]])
        axis.plot([1e3 * seconds[key] for key in ("p20", "p80")], [place, place], color=INK, linewidth=1)
        axis.plot([1e3 * row["p95_s"]] * 2, [place - 0.37, place + 0.37], color=INK, linewidth=1.6)
    rows.frame(axis, labels=True)
    axis.set_xlim(left=0)
    axis.set_xlabel("ms a call; thin lines: 20th to 80th percentile, ticks: 95th percentile", fontsize=TEXT)
    rows.column(axis, 44, "ms", lambda row: number(1e3 * row["seconds"]["median"]))
    rows.column(axis, 90, "95 %", lambda row: number(1e3 * row["p95_s"]))
    rows.column(axis, 210, "speed-up", speedup_text)
    return figure

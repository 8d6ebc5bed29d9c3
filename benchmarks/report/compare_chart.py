"""The picture of a comparison of two runs: the ratio of every row with its noise band."""

COLORS = {
    "slower": "#c5221f",
    "faster": "#188038",
    "within noise": "#e8a33d",
    "same": "#5f6368",
}
TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10)
ROW = 0.24
"""Inches of a row's height."""


def _places(axis, changes):
    """Dots and bands from the top down, coloured by verdict."""
    for verdict, color in COLORS.items():
        members = [(place, each) for place, each in enumerate(changes) if each.verdict == verdict]
        if not members:
            continue
        places = [place for place, _ in members]
        middles = [each.ratio for _, each in members]
        reach = [
            [each.ratio - each.low for _, each in members],
            [each.high - each.ratio for _, each in members],
        ]
        label = f"{verdict} ({len(members)})"
        axis.errorbar(middles, places, xerr=reach, fmt="o", color=color, markersize=5, linewidth=1.6, label=label)


def draw(comparison, path):
    """Draw the rows that were judged by time or speed-up into a PNG, the worst on top.

    Returns:
        the path.

    Raises:
        ValueError: there is no such row.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    changes = sorted(
        (each for each in comparison.changes if each.low is not None and each.verdict in COLORS),
        key=lambda each: -each.ratio,
    )
    if not changes:
        raise ValueError("no row was judged by time or speed-up, nothing to draw")
    figure = Figure(figsize=(13, 2.4 + ROW * len(changes)), layout="constrained")
    axis = figure.subplots()
    axis.axvspan(1 / (1 + comparison.threshold), 1 + comparison.threshold, color="#e8eaed", zorder=0)
    axis.axvline(1, color="black", linewidth=0.8, zorder=1)
    _places(axis, changes)
    axis.set_xscale("log")
    # a few wide bands must not squeeze all others
    low = min(0.8, min(each.ratio for each in changes) / 1.3)
    high = max(1.25, max(each.ratio for each in changes) * 1.3)
    axis.set_xlim(low, high)
    axis.xaxis.set_major_locator(FixedLocator([tick for tick in TICKS if low <= tick <= high]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_ylim(len(changes) - 0.4, -0.6)
    axis.set_yticks(range(len(changes)), [f"{each.group}  {each.provider}" for each in changes], fontsize=9)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", linewidth=0.4)
    axis.spines[["top", "right", "left"]].set_visible(False)
    measure = "speed-up over upstream eager, A / B" if comparison.by == "speedup" else "time, B / A"
    axis.set_xlabel(f"{measure} (more than 1: slower in B); bars: noise band, cut at the edges; grey: threshold")
    for place, each in enumerate(changes):
        if each.verdict in ("slower", "faster"):
            style = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "fontsize": 8}
            axis.annotate(f"{each.ratio:.2f}", (each.ratio, place), **style)
    figure.legend(loc="outside upper right", ncols=len(COLORS), fontsize=9, frameon=False)
    runs = [
        f"{name}: {each.get('date', '?')[:10]}, {each.get('device', '?')}; t2t_fast {each.get('t2t_fast', '?')}"
        for name, each in zip("AB", comparison.environments, strict=True)
    ]
    figure.suptitle("\n".join(runs), fontsize=9, x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    return path

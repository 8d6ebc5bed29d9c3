"""How far from the machine's limits a run's rows are: a roofline, and the share of its floor that each case reaches."""

from math import cos, pi, sin

from .cases import OURS, floor_share, headline, main_dtype, of, subject
from .chart import ALARM, COLORS, HALO, INK, LINE, MUTED, SMALL, TEXT, blank, legend, marker
from .dots import panels
from .scaling_chart import plain
from .words import label, number, percent

FAR = 0.25
"""A case that reaches less than this share of its floor is marked."""


def _chosen(found):
    """The headline rows that have a floor."""
    return [row for row in headline(of(found, "models", "training", "module", "ops")) if floor_share(row) is not None]


def _name(row):
    return f"{subject(row)}, {row['mode']}"


def ranked(found):
    """Words -> rows of every headline case, the farthest from its floor first, by our share in the main dtype.

    A case where this package has no row comes last.
    """
    rows = _chosen(found)
    lines, ours = {}, {}
    for row in rows:
        lines.setdefault(_name(row), []).append(row)
        if row["provider"] == OURS and (row["dtype"] == main_dtype(rows) or _name(row) not in ours):
            ours[_name(row)] = floor_share(row)
    names = sorted(lines, key=lambda name: ours.get(name, float("inf")))
    return {f"{name}  {rank}": lines[name] for rank, name in enumerate(names, 1)}


def floor(found, environment):
    """The share of its floor that every provider of every headline case reaches, a panel for each dtype."""
    lines = ranked(found)
    if not lines:
        return None
    dtypes = dict.fromkeys(row["dtype"] for rows in lines.values() for row in rows)
    members = {dtype: lambda row, dtype=dtype: row["dtype"] == dtype for dtype in dtypes}

    def ours(row):
        share = floor_share(row)
        return f"{percent(share, 2)} %", ALARM if share < FAR else INK

    figure, axes = panels(lines, members, environment, floor_share, ("t2t_fast", ours))
    reach = max(1.0, *(floor_share(row) for rows in lines.values() for row in rows))
    for axis in axes:
        axis.axvspan(0, FAR, color=ALARM, alpha=0.06, linewidth=0)
        axis.axvline(1, color=INK, linewidth=1)
        axis.set_xlim(0, 1.04 * reach)
        step = 0.25 if len(axes) == 1 and reach <= 1.5 else 0.5 if reach <= 2 else 1.0
        ticks = [index * step for index in range(1 + int(reach / step))]
        axis.set_xticks(ticks, [f"{100 * tick:.0f}" for tick in ticks])
        axis.set_xlabel("% of the floor's speed", fontsize=TEXT)
    legend(figure, axes, columns=3)
    return figure


def intensity(row):
    """FLOP for each byte that a fused implementation moves."""
    return 1e3 * row["tflop_per_s"] / row["gb_per_s"]


def roofline(found, environment):
    """TFLOP/s against FLOP per byte below the measured roofs; the numbers at our points are those of :func:`floor`."""
    lines = ranked(found)
    numbers = {name.rpartition("  ")[0]: name.rpartition("  ")[2] for name in lines}
    rows = [row for members in lines.values() for row in members if row["tflop_per_s"]]
    if not rows:
        return None
    dtype = main_dtype(rows)
    rows = [row for row in rows if row["dtype"] == dtype]
    figure, axes = blank(7.2, environment)
    axis = axes[0, 0]
    axis.set_xscale("log")
    axis.set_yscale("log")
    xs = [intensity(row) for row in rows]
    limits = environment["limits"]
    knees = [speed / limits["bytes_per_s"] for speed in limits["flop_per_s"].values()]
    left, right = min(0.6 * min(xs), 0.1 * min(knees)), 1.8 * max(*xs, *knees)
    for row in sorted(rows, key=lambda row: row["provider"] == OURS):
        color = COLORS[row["provider"]]
        style = dict(marker=marker(row["provider"]), edgecolor=color, label=label(row), gid=row["provider"])
        axis.scatter(
            intensity(row),
            row["tflop_per_s"],
            s=62 if row["provider"] == OURS else 34,
            facecolor="white" if row["another_function"] else color,
            zorder=3 if row["provider"] == OURS else 2,
            **style,
        )
    _roofs(axis, limits, left, right)
    axis.set_xlim(left, right)
    axis.grid(color=LINE, linewidth=0.8)
    plain(axis.xaxis)
    plain(axis.yaxis)
    axis.set_xlabel("FLOP per byte that a fused implementation moves", fontsize=TEXT)
    axis.set_ylabel(f"TFLOP/s reached, {dtype}", fontsize=TEXT)
    legend(figure, axes, columns=3)
    _number(figure, axis, [(row, numbers[_name(row)]) for row in rows if row["provider"] == OURS])
    return figure


def _roofs(axis, limits, left, right):
    """The speed of a copy up to the products' speed, which goes on flat, once for each dtype."""
    slope = limits["bytes_per_s"] / 1e12
    style = dict(textcoords="offset points", ha="right", fontsize=SMALL, color=MUTED)
    knees = []
    for dtype, speed in sorted(limits["flop_per_s"].items(), key=lambda item: item[1]):
        flat = speed / 1e12
        axis.plot([left, flat / slope, right], [left * slope, flat, flat], color=MUTED, linewidth=1.4, zorder=1)
        knees.append((flat, f"{dtype} {number(flat)}"))
    # above the slope nothing else can stand; dtypes of nearly one speed share a line of words
    while knees:
        flat = knees[0][0]
        near = [words for speed, words in knees if speed < 1.5 * flat]
        axis.annotate(f"products, {', '.join(near)} TFLOP/s", (flat / slope, flat), (-6, 0), va="center", **style)
        knees = knees[len(near) :]
    middle = (left * min(limits["flop_per_s"].values()) / limits["bytes_per_s"]) ** 0.5
    axis.annotate(f"copy, {number(1e3 * slope)} GB/s", (middle, middle * slope), (-8, 4), va="bottom", **style)


def _number(figure, axis, points):
    """Write each point's number where neither another number nor another of our points stands, with a line to it."""
    figure.draw_without_rendering()  # the places in pixels are known only after the layout
    scale = figure.dpi / 72
    spots = [axis.transData.transform((intensity(row), row["tflop_per_s"])) / scale for row, _ in points]
    taken = [*spots, *_words(axis, scale)]
    for (row, text), (x, y) in sorted(zip(points, spots, strict=True), key=lambda point: tuple(point[1])):
        dx, dy = min(AROUND, key=lambda step: (_crowd((x + step[0], y + step[1]), taken), AROUND.index(step)))
        taken.append((x + dx, y + dy))
        axis.annotate(
            text,
            (intensity(row), row["tflop_per_s"]),
            (dx, dy),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=SMALL,
            color=INK,
            zorder=5,
            bbox={**HALO, "pad": 0.4},
            arrowprops=dict(arrowstyle="-", color=INK, linewidth=0.6, shrinkA=0, shrinkB=0),
        )


def _words(axis, scale):
    """Places, in points, along the words that stand on an axis."""
    boxes = [text.get_window_extent() for text in axis.texts]
    return [
        (box.x0 / scale + step, (box.y0 + box.y1) / 2 / scale)
        for box in boxes
        for step in range(0, round(box.width / scale), 8)
    ]


AROUND = [
    (round(radius * cos(turn * pi / 8)), round(radius * sin(turn * pi / 8)))
    for radius in (16, 26, 38, 52, 68, 86)
    for turn in (2, 6, 10, 14, 0, 8, 4, 12, *range(1, 16, 2))
]
"""Places around a point for its number, in points: the near ones first."""


def _crowd(spot, taken):
    """How many of the places that are taken lie under a number at ``spot``."""
    return sum(abs(spot[0] - x) < 17 and abs(spot[1] - y) < 12 for x, y in taken)

"""The pictures of a run; each is made from the frame, and left out where the run has no rows for it."""

from importlib import import_module
from math import cos, pi, sin

from ..suites.groups import LITE, MODES
from . import crossover as sweep
from .frame import OURS, SIDE, cases, headline, in_main_dtype, main_dtype, timed
from .style import (
    ALARM,
    COLORS,
    HALO,
    INK,
    LINE,
    MUTED,
    SMALL,
    TEXT,
    Panel,
    bars,
    blank,
    dots,
    legend,
    lines,
    logarithmic,
    name_axes,
    plain,
    point,
    ratio_axis,
    save,
    speedup_text,
)
from .words import amdahl, number, percent

FAR = 0.25
"""A case that reaches less than this share of its floor is marked."""


def _front(found):
    """The headline rows of models and T2T modules in the main dtype; ``first``: a lite model or a T2T module."""
    rows = in_main_dtype(headline(timed(found, "models", "training", "module")))
    return rows.assign(first=(rows["level"] == "module") | rows["subject"].isin(LITE))


def _milliseconds(row):
    return number(1e3 * row.median_s), INK


def speed_first(run, found):
    """Bars of the speed-up over upstream: lite models and T2T modules."""
    return _speed(run, _front(found).query("first"))


def speed_others(run, found):
    """Bars of the speed-up over upstream: larger models."""
    return _speed(run, _front(found).query("not first"))


def _speed(run, rows):
    """Bars from 1 to the speed-up of every row, with Amdahl's limit beside a model."""
    if rows.empty:
        return None
    titled = [("; ".join(filter(None, (title, amdahl(members)))), members) for title, members in cases(rows)]

    def scatter(axis, y, row):
        if row.provider != "upstream":
            axis.plot([row.speedup_p20, row.speedup_p80], [y, y], color=INK, linewidth=1, solid_capstyle="butt")

    words = "speed-up over upstream eager; thin lines: 20th to 80th percentile of rounds"
    columns = ((118, "speed-up", speedup_text), (178, "ms", _milliseconds))
    figure, (axis,) = bars(titled, run.environment, Panel(words, "speedup_median", 1.0, columns, scatter))
    ratio_axis(axis, min(1.0, rows["speedup_p20"].min()), max(1.0, rows["speedup_p80"].max()))
    return figure


def operators(run, found):
    """Points of the speed-up of every operator in the main dtype, a panel for each mode."""
    rows = in_main_dtype(headline(timed(found, "ops"))).dropna(subset="speedup_median")
    if rows.empty:
        return None
    groups = rows.groupby(["what", "batch"], sort=False)
    members = {f"{what}, batch {batch:.0f}": list(each.itertuples()) for (what, batch), each in groups}
    modes = [mode for mode in MODES if (rows["mode"] == mode).any()]
    panels = {f"{main_dtype(rows)}, {mode}": lambda row, mode=mode: row.mode == mode for mode in modes}

    def ours(row):
        words, color = speedup_text(row)
        return words.partition(" ")[0], color

    figure, axes = dots(members, panels, run.environment, "speedup_median", ("t2t_fast", ours))
    for axis in axes:
        ratio_axis(axis, rows["speedup_median"].min(), rows["speedup_median"].max())
        name_axes(axis, "speed-up over upstream eager (median of rounds)")
    legend(figure, axes)
    return figure


def memory(run, found):
    """Bars of what a call keeps and needs relative to upstream, for cases where upstream's and another are known."""
    rows = _front(found)
    known = rows[(rows["saved_bytes"] > 0) | (rows["peak_bytes"] > 0)].groupby("group")["provider"]
    both = [group for group, names in known if "upstream" in set(names) and len(names) > 1]
    rows = rows[rows["group"].isin(both)]
    if rows.empty:
        return None
    panels = []
    for key, words in (("saved", "kept for backward"), ("peak", "peak of a call")):
        base = rows[rows["provider"] == "upstream"].set_index("group")[f"{key}_mb"].replace(0, float("nan"))
        rows[f"{key}_share"] = rows[f"{key}_mb"] / rows["group"].map(base)

        def text(row, key=key):
            more = getattr(row, f"{key}_share") > 1
            return number(getattr(row, f"{key}_mb")), ALARM if more else INK

        words = f"{words}, relative to upstream eager"
        panels.append(Panel(words, f"{key}_share", 0.0, ((52, "MB / image", text),)))
    figure, axes = bars(cases(rows), run.environment, *panels)
    for axis, panel in zip(axes, panels, strict=True):
        axis.set_xlim(0, 1.05 * max(1.0, rows[panel.value].fillna(0).max()))
        axis.axvline(1, color=INK, linewidth=1)
    return figure


def fits(run, found):
    """Bars of the largest batch of every provider."""
    rows = found[found["suite"] == "memory"]
    if rows.empty:
        return None
    base = rows["group"].map(rows[rows["provider"] == "upstream"].set_index("group")["batch"]).replace(0, float("nan"))
    rows = rows.assign(ratio=(rows["batch"] / base).where(rows["provider"] != "upstream"))
    titled = [
        (f"{row.what}, {row.size:.0f} px, {row.dtype}, {row.mode} step in {row.limit_bytes / 1e9:.3g} GB", members)
        for _, members in cases(rows)
        for row in members[:1]
    ]
    columns = (
        (58, "images", lambda row: (f"{row.batch:.0f}", INK) if row.batch else ("none fits", ALARM)),
        (132, "× upstream", _times_upstream),
    )
    panel = Panel("largest batch whose training step fits, images", "batch", 0.0, columns)
    figure, (axis,) = bars(titled, run.environment, panel)
    axis.set_xlim(0, 1.05 * max(1, rows["batch"].max()))
    return figure


def _times_upstream(row):
    return f"{number(row.ratio)}×" if row.ratio > 0 else "", ALARM if row.ratio < 1 else INK


def latency(run, found):
    """Bars of the median time of a call; a tick marks the 95th percentile of the rounds."""
    rows = in_main_dtype(timed(found, "latency"))
    if rows.empty:
        return None
    rows = rows.assign(ms=1e3 * rows["median_s"])

    def scatter(axis, y, row):
        axis.plot([1e3 * row.p20_s, 1e3 * row.p80_s], [y, y], color=INK, linewidth=1)
        axis.plot([1e3 * row.p95_s] * 2, [y - 0.37, y + 0.37], color=INK, linewidth=1.6)

    columns = (
        (44, "ms", _milliseconds),
        (90, "95 %", lambda row: (number(1e3 * row.p95_s), INK)),
        (210, "speed-up", speedup_text),
    )
    words = "ms a call; thin lines: 20th to 80th percentile, ticks: 95th percentile"
    figure, (axis,) = bars(cases(rows), run.environment, Panel(words, "ms", 0.0, columns, scatter))
    axis.set_xlim(left=0)
    return figure


def ranked(found):
    """The headline rows that have a floor, with ``rank``: cases by our share of it in the main dtype, lowest first."""
    rows = headline(timed(found, "models", "training", "module", "ops")).dropna(subset="floor_share")
    rows = rows.assign(line=rows["what"] + ", " + rows["mode"])
    ours = rows[rows["provider"] == OURS]
    shares = ours.sort_values("dtype", key=lambda each: each != main_dtype(rows), kind="stable")
    shares = shares.drop_duplicates("line").set_index("line")["floor_share"]
    order = rows.drop_duplicates("line").assign(share=lambda each: each["line"].map(shares))
    order = order.sort_values("share", kind="stable", na_position="last")["line"]
    return rows.assign(rank=rows["line"].map({line: place for place, line in enumerate(order, 1)})).sort_values(
        "rank", kind="stable"
    )


def floor(run, found):
    """Points of the share of its floor that every provider reaches, a panel for each dtype."""
    rows = ranked(found)
    if rows.empty:
        return None
    members = {f"{each['line'].iloc[0]}  {rank}": list(each.itertuples()) for rank, each in rows.groupby("rank")}
    panels = {dtype: lambda row, dtype=dtype: row.dtype == dtype for dtype in rows["dtype"].unique()}

    def ours(row):
        return f"{percent(row.floor_share, 2)} %", ALARM if row.floor_share < FAR else INK

    figure, axes = dots(members, panels, run.environment, "floor_share", ("t2t_fast", ours))
    reach = max(1.0, rows["floor_share"].max())
    step = 0.25 if len(axes) == 1 and reach <= 1.5 else 0.5 if reach <= 2 else 1.0
    ticks = [index * step for index in range(1 + int(reach / step))]
    for axis in axes:
        axis.axvspan(0, FAR, color=ALARM, alpha=0.06, linewidth=0)
        axis.axvline(1, color=INK, linewidth=1)
        axis.set_xlim(0, 1.04 * reach)
        axis.set_xticks(ticks, [f"{100 * tick:.0f}" for tick in ticks])
        name_axes(axis, "% of the floor's speed")
    legend(figure, axes)
    return figure


def roofline(run, found):
    """TFLOP/s against FLOP per byte below the measured roofs; the numbers at our points are those of :func:`floor`."""
    rows = ranked(found)
    rows = in_main_dtype(rows[rows["tflop_per_s"] > 0])
    if rows.empty:
        return None
    rows = rows.assign(intensity=1e3 * rows["tflop_per_s"] / rows["gb_per_s"])
    limits = run.environment["limits"]
    knees = [speed / limits["bytes_per_s"] for speed in limits["flop_per_s"].values()]
    left = min(0.6 * rows["intensity"].min(), 0.1 * min(knees))
    right = 1.8 * max(rows["intensity"].max(), *knees)
    figure, axes = blank(7.2, run.environment)
    axis = axes[0, 0]
    axis.set_xscale("log")
    axis.set_yscale("log")
    for row in rows.itertuples():
        point(axis, row.intensity, row.tflop_per_s, row)
    _roofs(axis, limits, left, right)
    axis.set_xlim(left, right)
    axis.grid(color=LINE, linewidth=0.8)
    plain(axis.xaxis)
    plain(axis.yaxis)
    words = f"TFLOP/s reached, {main_dtype(rows)}"
    name_axes(axis, "FLOP per byte that a fused implementation moves", words)
    legend(figure, axes)
    _number(figure, axis, rows[rows["provider"] == OURS])
    return figure


def _roofs(axis, limits, left, right):
    """The speed of a copy up to the products' speed, and that speed from there on, once for each dtype."""
    slope = limits["bytes_per_s"] / 1e12
    style = dict(textcoords="offset points", ha="right", fontsize=SMALL, color=MUTED)
    knees = []
    for dtype, speed in sorted(limits["flop_per_s"].items(), key=lambda item: item[1]):
        flat = speed / 1e12
        axis.plot([left, flat / slope, right], [left * slope, flat, flat], color=MUTED, linewidth=1.4, zorder=1)
        knees.append((flat, f"{dtype} {number(flat)}"))
    while knees:  # dtypes of nearly one speed share a line of words
        flat = knees[0][0]
        near = [words for speed, words in knees if speed < 1.5 * flat]
        axis.annotate(f"products, {', '.join(near)} TFLOP/s", (flat / slope, flat), (-6, 0), va="center", **style)
        knees = knees[len(near) :]
    middle = (left * min(limits["flop_per_s"].values()) / limits["bytes_per_s"]) ** 0.5
    axis.annotate(f"copy, {number(1e3 * slope)} GB/s", (middle, middle * slope), (-8, 4), va="bottom", **style)


AROUND = [
    (round(radius * cos(turn * pi / 8)), round(radius * sin(turn * pi / 8)))
    for radius in (16, 26, 38, 52, 68, 86)
    for turn in (2, 6, 10, 14, 0, 8, 4, 12, *range(1, 16, 2))
]
"""Places around a point for its number, in points: the near ones first."""


def _number(figure, axis, rows):
    """Write each row's rank where it covers no other number, point or word, with a line to its point."""
    figure.draw_without_rendering()  # the places in pixels are known only after the layout
    scale = figure.dpi / 72
    spots = [tuple(spot / scale) for spot in axis.transData.transform(rows[["intensity", "tflop_per_s"]].to_numpy())]
    taken = list(spots)
    for box in (text.get_window_extent() for text in axis.texts):
        steps = range(0, round(box.width / scale), 8)
        taken += [(box.x0 / scale + step, (box.y0 + box.y1) / 2 / scale) for step in steps]

    def crowd(x, y):
        return sum(abs(x - other) < 17 and abs(y - height) < 12 for other, height in taken)

    style = dict(textcoords="offset points", ha="center", va="center", fontsize=SMALL, color=INK, zorder=5)
    style["arrowprops"] = dict(arrowstyle="-", color=INK, linewidth=0.6, shrinkA=0, shrinkB=0)
    for (x, y), row in sorted(zip(spots, rows.itertuples(), strict=True), key=lambda each: each[0]):
        dx, dy = min(AROUND, key=lambda step: crowd(x + step[0], y + step[1]))
        taken.append((x + dx, y + dy))
        axis.annotate(f"{row.rank}", (row.intensity, row.tflop_per_s), (dx, dy), bbox={**HALO, "pad": 0.4}, **style)


def scaling(run, found):
    """Time an image against the batch and the image side, a row of panels for each mode."""
    rows = timed(found, "scaling")
    rows = rows.assign(ms=1e3 * rows["median_s"] / rows["batch"])
    sweeps = [
        ("batch", f"batch, {SIDE} px", rows[rows["size"] == SIDE]),
        ("size", "image side in pixels, batch 1", rows[rows["batch"] == 1]),
    ]
    sweeps = [each for each in sweeps if each[2][each[0]].nunique() > 1]
    modes = [mode for mode in MODES if (rows["mode"] == mode).any()]
    if not sweeps:
        return None
    figure, axes = blank(0.9 + 3.6 * len(modes), run.environment, nrows=len(modes), ncols=len(sweeps))
    for mode, across in zip(modes, axes, strict=True):
        for axis, (key, words, members) in zip(across, sweeps, strict=True):
            lines(axis, members[members["mode"] == mode], key, "ms")
            logarithmic(axis, sorted(members[key].unique()))
            name_axes(axis, words, "ms an image", f"{rows['what'].iloc[0]}, {rows['dtype'].iloc[0]}, {mode}")
    legend(figure, axes, 4)
    return figure


def crossover(run, found):
    """Time a token above, memory a token below, against the number of tokens; a column for each mode."""
    rows = sweep.curves(found)
    if rows.empty:
        return None
    tokens = rows["batch"] * rows["length"]
    rows = rows.assign(ns=1e9 * rows["median_s"] / tokens, peak=(rows["peak_bytes"] / tokens).replace(0, float("nan")))
    modes = [mode for mode in MODES if (rows["mode"] == mode).any()]
    figure, axes = blank(8.2, run.environment, nrows=2, ncols=len(modes), sharex=True)
    for mode, (top, bottom) in zip(modes, axes.T, strict=True):
        for axis, key in ((top, "ns"), (bottom, "peak")):
            lines(axis, rows[rows["mode"] == mode], "length", key)
            logarithmic(axis, sorted(rows["length"].unique()), rotation=45)
        bottom.set_yscale("linear")  # memory a token hardly changes: from 0 on, its size can be read
        bottom.set_ylim(bottom=0)
        where = sweep.crossing(sweep.speedups(rows, mode, sweep.rounds(run)))
        if where is not None:
            top.axvline(where, color=INK, linewidth=0.8, linestyle=":")
            place = dict(xycoords=("data", "axes fraction"), xytext=(4, -4), textcoords="offset points", va="top")
            top.annotate(f"crossing at L = {where:.0f}", (where, 1), fontsize=TEXT, bbox=HALO, **place)
        name_axes(top, "", "time a token, ns", f"Performer attention, {main_dtype(rows)}, {mode}")
        name_axes(bottom, "tokens of a sequence, L", "peak memory of a call, bytes a token")
    legend(figure, axes)
    return figure


def processes(run, found):
    """Images a second of all processes against their number, with what a perfect division would give."""
    rows = found[found["suite"] == "processes"]
    if rows.empty:
        return None
    settings = list(rows.groupby(["what", "size", "batch", "dtype"], sort=False))
    figure, axes = blank(0.8 + 3.6 * len(settings), run.environment, nrows=len(settings))
    for axis, ((what, size, batch, dtype), members) in zip(axes[:, 0], settings, strict=True):
        lines(axis, members, "processes", "images_per_s")
        counts = sorted(members["processes"].unique())
        style = dict(textcoords="offset points", ha="center", fontsize=TEXT, bbox=HALO)
        for row in members.itertuples():
            place = row.processes, row.images_per_s
            axis.annotate(number(row.images_per_s), place, (0, 8), color=COLORS[row.provider], **style)
            if row.processes == counts[0]:
                whole = [row.images_per_s * count / counts[0] for count in counts]
                axis.plot(counts, whole, color=MUTED, linewidth=1, linestyle=":", label="perfect division", zorder=1)
        axis.set_xticks(counts)
        axis.set_ylim(bottom=0)
        axis.margins(x=0.06, y=0.12)
        axis.grid(color=LINE, linewidth=0.8)
        title = f"{what}, {size:.0f} px, batch {batch:.0f} a process, {dtype}"
        name_axes(axis, "processes, one thread each", "images/s of all", title)
    legend(figure, axes, 4)
    return figure


PICTURES = {
    "chart": speed_first,
    "chart-models": speed_others,
    "chart-operators": operators,
    "memory": memory,
    "fits": fits,
    "floor": floor,
    "roofline": roofline,
    "scaling": scaling,
    "crossover": crossover,
    "processes": processes,
    "latency": latency,
}
"""Name -> function of a run and its frame that returns a figure, in the order of the report.

The function returns ``None`` where the run has no rows for it; its docstring describes the picture."""


def obstacle():
    """Why nothing can be drawn here, in words, or ``None``: a machine that measures need not be able to draw."""
    for package, module in (("matplotlib", "matplotlib"), ("pillow", "PIL")):
        try:
            import_module(module)
        except ImportError as failure:
            return f"pictures need {package} ({failure}); where it is, python -m benchmarks.report draws them"
    return None


def draw(run, found, folder):
    """Write the PNG files for which a run has rows. Returns name -> path."""
    figures = ((name, make(run, found)) for name, make in PICTURES.items())
    return {name: save(figure, folder / f"{name}.png") for name, figure in figures if figure is not None}

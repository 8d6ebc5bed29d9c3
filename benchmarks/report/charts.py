"""The pictures of a run: :data:`PICTURES` says from which rows of the frame each is made, and by which function."""

from functools import partial

from ..suites.groups import LITE, MODES
from . import crossover as sweep
from .frame import BASELINE, OURS, SIDE, headline, in_main_dtype, main_dtype, pd, timed
from .style import COLORS, INK, MUTED, STYLE, blank, legend, listing, logarithmic, look, save
from .words import number, percent

FAR = 0.25
"""Below this share of its floor, our number is red."""


def _bars(run, rows, words, draw):
    """A listing of every row with a bar, drawn by ``draw``, below the headings of the column ``case``."""
    lines = []
    for case, group in rows.groupby("case", sort=False):
        members = list(group.itertuples())
        left = next((f"; not fused: {row.unfused}" for row in members if isinstance(row.unfused, str)), "")
        lines.append((case + left, []))
        lines += [(row.name, [row]) for row in members]
    figure, (axis,) = listing(lines, run.environment, {words: draw})
    axis.grid(visible=False, axis="y")
    return figure, axis


def speed(run, rows):
    """Bars of the speed-up of every implementation over upstream, with its time a call."""

    def draw(axis, y, row):
        slowest = "" if pd.isna(row.p95_s) else f", 95 %: {number(1e3 * row.p95_s)} ms"
        times = f"{number(1e3 * row.median_s)} ms{slowest}"
        if pd.isna(row.speedup_median):
            return times, False
        axis.barh(y, row.speedup_median - 1, left=1, height=0.74, color=COLORS[row.provider])
        axis.plot([row.speedup_p20, row.speedup_p80], [y, y], color=INK, linewidth=1)
        middle, low, high = map(number, (row.speedup_median, row.speedup_p20, row.speedup_p80))
        return f"{'1×' if row.provider == BASELINE else f'{middle}× ({low}–{high})'}, {times}", row.lost

    words = "speed-up over upstream eager; thin lines: 20th to 80th percentile of rounds"
    figure, axis = _bars(run, rows, words, draw)
    axis.axvline(1, color=INK, linewidth=1)
    logarithmic(axis.xaxis, "×")
    return figure


def fits(run, rows):
    """Bars of the largest batch of every implementation."""
    base = rows[rows["provider"] == BASELINE].set_index("group")["batch"]
    cases = [f"{row.what}, {row.size:.0f} px, {row.dtype}, {row.limit_bytes / 1e9:.3g} GB" for row in rows.itertuples()]
    rows = rows.assign(case=cases, ratio=rows["batch"] / rows["group"].map(base).replace(0, float("nan")))

    def draw(axis, y, row):
        axis.barh(y, row.batch, height=0.74, color=COLORS[row.provider])
        ratio = "" if row.provider == BASELINE or pd.isna(row.ratio) else f", {number(row.ratio)}× upstream"
        return f"{row.batch:.0f} images{ratio}" if row.batch else "none fits", row.ratio < 1 or not row.batch

    return _bars(run, rows, "largest batch whose training step fits, images", draw)[0]


def processes(run, rows):
    """Bars of the images a second of all processes together, by their number."""
    cases = [f"{row.what}, {row.size:.0f} px, batch {row.batch:.0f} each, {row.dtype}" for row in rows.itertuples()]
    rows = rows.assign(case=cases).sort_values("processes", kind="stable")
    rows["gain"] = rows["images_per_s"] / rows.groupby(["case", "provider"])["images_per_s"].transform("first")
    rows["name"] += ", processes: " + rows["processes"].map("{:.0f}".format)

    def draw(axis, y, row):
        axis.barh(y, row.images_per_s, height=0.74, color=COLORS[row.provider])
        return f"{number(row.images_per_s)}, {number(row.gain)}×", False

    words = "images/s of all processes, one thread each; ×: relative to the fewest processes"
    return _bars(run, rows, words, draw)[0]


def _points(run, rows, panels, text):
    """A listing of the column ``line`` with a point for every provider, and our number beside it.

    Args:
        panels: words below the axis -> column along it, NaN where a row has no point.
        text: function of our value that returns it as text, and whether it is bad.
    """

    def draw(column, axis, y, row):
        value = getattr(row, column)
        if pd.isna(value):
            return "", False
        axis.plot(value, y, **{**look(row), "linestyle": ""})
        return text(value) if row.provider == OURS else ("", False)

    lines = [(line, list(members.itertuples())) for line, members in rows.groupby("line", sort=False)]
    panels = {words: partial(draw, column) for words, column in panels.items()}
    figure, axes = listing(lines, run.environment, panels)
    for axis in axes:
        axis.axvline(1, color=INK, linewidth=1)
    legend(figure)
    return figure, axes[0]


def _by_mode(rows, column, words):
    """``rows`` with the name of their ``line`` and with ``column`` as a column for each mode, and the panels."""
    lines = rows["what"] + ", batch " + rows["batch"].map("{:.0f}".format)
    rows = rows.assign(line=lines, **{mode: rows[column].where(rows["mode"] == mode) for mode in MODES})
    return rows, {f"{words}, {main_dtype(rows)} {mode}": mode for mode in _modes(rows)}


def _modes(rows):
    return [mode for mode in MODES if (rows["mode"] == mode).any()]


def operators(run, rows):
    """Points of the speed-up of every implementation of an operator over upstream."""
    rows, panels = _by_mode(rows, "speedup_median", "speed-up over upstream eager")
    figure, axis = _points(run, rows, panels, lambda value: (f"{number(value)}×", value < 1))
    logarithmic(axis.xaxis, "×")
    return figure


def memory(run, rows):
    """Points of the memory that a call keeps for backward and needs at its peak, relative to upstream."""
    words = {"saved": "kept for backward", "peak": "peak of a call"}
    panels = {f"{words[key]}, relative to upstream eager": f"{key}_share" for key in words}
    rows = rows.assign(line=rows["case"])
    figure, axis = _points(run, rows, panels, lambda value: (f"{number(value)}×", value > 1))
    logarithmic(axis.xaxis, "×")
    return figure


def floor(run, rows):
    """Points of the share of its floor that every implementation reaches; our lowest share first."""
    rows, panels = _by_mode(rows, "floor_share", "share of the floor's speed")
    ours = rows[rows["provider"] == OURS].groupby("line")["floor_share"].min()
    rows = rows.sort_values("line", key=lambda lines: lines.map(ours), kind="stable")
    figure, axis = _points(run, rows, panels, lambda value: (f"{percent(value, 2)} %", value < FAR))
    axis.set_xlim(left=0)
    axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    return figure


def roofline(run, rows):
    """TFLOP/s against FLOP per byte of every case with products, below the measured speed of copies and products."""
    rows = rows.assign(intensity=1e3 * rows["tflop_per_s"] / rows["gb_per_s"])
    dtype, limits = main_dtype(rows), run.environment["limits"]
    slope, top = limits["bytes_per_s"] / 1e12, limits["flop_per_s"][dtype] / 1e12
    figure, ((axis,),) = blank(6, run.environment)
    places = sorted((rows["intensity"].min() / 2, top / slope, 2 * rows["intensity"].max()))
    roofs = f"copy {number(1e3 * slope)} GB/s, products {number(top)} TFLOP/s"
    axis.plot(places, [min(top, slope * place) for place in places], color=MUTED, label=roofs)
    for row in rows.itertuples():
        axis.plot(row.intensity, row.tflop_per_s, **{**look(row), "linestyle": ""})
    axis.set(xlabel="FLOP per byte that a fused implementation moves", ylabel=f"TFLOP/s reached, {dtype}")
    logarithmic(axis.xaxis)
    logarithmic(axis.yaxis)
    legend(figure)
    return figure


def _lines(axis, rows, x, y, **labels):
    """A line for every provider through the columns ``x`` and ``y``, with a tick at every measured ``x``."""
    for _, members in rows.dropna(subset=[y]).sort_values(x).groupby("provider", sort=False):
        axis.plot(members[x], members[y], **look(next(members.itertuples())))
    logarithmic(axis.xaxis)
    axis.set_xticks(sorted(rows[x].unique()))
    axis.set(**labels)


def scaling(run, rows):
    """Time an image against the batch and the image side."""
    rows, modes = rows.assign(ms=1e3 * rows["median_s"] / rows["batch"]), _modes(rows)
    figure, axes = blank(0.9 + 3.6 * len(modes), run.environment, nrows=len(modes), ncols=2)
    for mode, (left, right) in zip(modes, axes, strict=True):
        members = rows[rows["mode"] == mode]
        labels = {"title": f"{rows['what'].iloc[0]}, {rows['dtype'].iloc[0]}, {mode}", "ylabel": "ms an image"}
        _lines(left, members[members["size"] == SIDE], "batch", "ms", xlabel=f"batch, {SIDE} px", **labels)
        _lines(right, members[members["batch"] == 1], "size", "ms", xlabel="image side in pixels, batch 1", **labels)
        logarithmic(left.yaxis)
        logarithmic(right.yaxis)
    legend(figure)
    return figure


def crossover(run, rows):
    """Time and peak memory a token against the number of tokens."""
    tokens = rows["batch"] * rows["length"]
    rows = rows.assign(ns=1e9 * rows["median_s"] / tokens, peak=(rows["peak_bytes"] / tokens).replace(0, float("nan")))
    modes, length = _modes(rows), "tokens of a sequence, L"
    figure, axes = blank(8.2, run.environment, nrows=2, ncols=len(modes), sharex=True)
    for mode, (top, bottom) in zip(modes, axes.T, strict=True):
        members, title = rows[rows["mode"] == mode], f"Performer attention, {main_dtype(rows)}, {mode}"
        _lines(top, members, "length", "ns", title=title, ylabel="time a token, ns")
        _lines(bottom, members, "length", "peak", xlabel=length, ylabel="peak memory of a call, bytes a token")
        logarithmic(top.yaxis)
        bottom.set_ylim(bottom=0)  # memory a token hardly changes: from 0 on, its size can be read
        bottom.tick_params(axis="x", rotation=90)
        if (where := sweep.crossing(sweep.speedups(rows, mode, run))) is not None:
            top.axvline(where, color=INK, linestyle=":", label=f"crossing, {mode}: L = {where:.0f}")
    legend(figure)
    return figure


def _headline(found, *suites):
    return in_main_dtype(headline(timed(found, *suites)))


def _front(found):
    """The headline rows of models and T2T modules, with memory relative to upstream; ``first``: lite or a module."""
    rows = _headline(found, "models", "training", "module")
    base = rows[rows["provider"] == BASELINE].set_index("group")
    for key in ("saved", "peak"):
        rows[f"{key}_share"] = rows[f"{key}_mb"] / rows["group"].map(base[f"{key}_mb"]).replace(0, float("nan"))
    return rows.assign(first=(rows["level"] == "module") | rows["subject"].isin(LITE))


_FLOOR = ("models", "training", "module", "ops")
PICTURES = {
    "chart": (lambda found: _front(found).query("first"), speed),
    "chart-models": (lambda found: _front(found).query("not first"), speed),
    "chart-operators": (lambda found: _headline(found, "ops").dropna(subset="speedup_median"), operators),
    "memory": (lambda found: _front(found).dropna(subset=["saved_share", "peak_share"], how="all"), memory),
    "fits": (lambda found: found[found["suite"] == "memory"], fits),
    "floor": (lambda found: _headline(found, *_FLOOR).dropna(subset="floor_share"), floor),
    "roofline": (lambda found: _headline(found, *_FLOOR).query("tflop_per_s > 0"), roofline),
    "scaling": (lambda found: timed(found, "scaling"), scaling),
    "crossover": (sweep.curves, crossover),
    "processes": (lambda found: found[found["suite"] == "processes"], processes),
    "latency": (lambda found: in_main_dtype(timed(found, "latency")), speed),
}
"""Name -> (function of the frame that selects rows, function of run and rows that returns a figure), in the order of
the report. A run without such rows has no such picture. The docstring of the second function describes the picture."""


def figures(run, found):
    """Name -> figure of every picture for which a run has rows."""
    selected = {name: (select(found), make) for name, (select, make) in PICTURES.items()}
    return {name: make(run, rows) for name, (rows, make) in selected.items() if len(rows)}


def draw(run, found, folder):
    """Write the PNG files for which a run has rows. Returns name -> path."""
    from matplotlib import style

    with style.context(STYLE):
        return {name: save(figure, folder / f"{name}.png") for name, figure in figures(run, found).items()}

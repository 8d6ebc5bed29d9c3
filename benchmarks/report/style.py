"""How the report's charts look, and the parts that they share: bars with columns of numbers, axes, the legend."""

from io import BytesIO
from math import log
from typing import Any, NamedTuple

from .frame import OURS, pd
from .words import number, signature

WIDTH = 11.0
"""Inches of every picture's width, so that text has the same size in all of them."""

SMALL, TEXT, TITLE = 8.5, 9.5, 11
"""Points."""

DPI = 100
INK, MUTED, LINE, ALARM = "#1c2530", "#5f6b7a", "#e3e8ee", "#c8323a"
HALO = {"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.85}
ROW, LETTER = 0.25, 0.56 * TEXT
"""Inches of a row with a bar; points of a letter's width, on average."""

COLORS = {
    "upstream": "#a3aab3",
    "upstream-compiled": "#6b7480",
    "upstream-graph": "#39424d",
    "t2t_fast": "#0a7d72",
    "t2t_fast-compiled": "#04463f",
    "t2t_fast-low": "#6fbab1",
    "t2t_fast-graph": "#12b3a0",
    "aten": "#8ab4f8",
    "aten-compiled": "#4285f4",
    "native": "#f2a65a",
    "triton": "#d9541e",
    "unfold": "#b39ddb",
    "convolution": "#c9a227",
    "two-sdpa": "#ab47bc",
    "performer-pytorch": "#8d6e63",
    "flash-linear-attention": "#9e9d24",
    "sdpa": "#e07aa8",
    "vit-pytorch": "#c2185b",
    "timm-vit-small": "#5c6bc0",
    "timm-vit-little": "#9fa8da",
    "timm-resnet50": "#bf8f00",
}
"""Of every provider, the same in every picture."""

MARKERS = {"-compiled": "D", "-graph": "s", "-low": "v"}
"""By the ending of a provider's name, so that forms of one implementation differ by more than colour."""


def blank(height, environment, **options):
    """A figure of the common width with its axes, signed with the machine and versions."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(MUTED)
        axis.tick_params(labelsize=TEXT, color=MUTED, labelcolor=INK)
        axis.set_axisbelow(True)
    figure.supxlabel(signature(environment), x=0.008, ha="left", fontsize=SMALL, color=MUTED)
    return figure, axes


def name_axes(axis, x, y=None, title=None):
    """The words at an axis, where given."""
    axis.set_xlabel(x, fontsize=TEXT)
    if y is not None:
        axis.set_ylabel(y, fontsize=TEXT)
    if title is not None:
        axis.set_title(title, loc="left", fontsize=TITLE, color=INK)


def legend(figure, axes, columns=3):
    """One legend above all axes with each provider once; artists name their provider in ``gid``."""
    handles = {}
    for axis in axes.flat:
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(text, handle)
    order = [*COLORS, None]
    handles = dict(sorted(handles.items(), key=lambda item: order.index(item[1].get_gid())))
    style = dict(loc="outside upper left", ncols=columns, fontsize=TEXT, frameon=False)
    figure.legend(handles.values(), handles.keys(), **style)


def save(figure, path, dpi=DPI):
    """Write a PNG with the colours of this file and few shades of them, which keeps it small. Returns its path."""
    from matplotlib.colors import to_rgb
    from PIL import Image

    shades = {INK: (1, 0.65, 0.3), MUTED: (1, 0.5), ALARM: (1, 0.5), LINE: (1,), "white": (1,)}
    shades |= dict.fromkeys(COLORS.values(), (1, 0.5))
    palette = Image.new("P", (1, 1))
    palette.putpalette(
        [round(255 * (1 - share * (1 - part))) for color in shades for share in shades[color] for part in to_rgb(color)]
    )
    drawn = BytesIO()
    figure.savefig(drawn, dpi=dpi, facecolor="white", format="png")
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE).save(path, optimize=True)
    return path


def marker(provider):
    """The marker of a provider's points."""
    return next((shape for ending, shape in MARKERS.items() if provider.endswith(ending)), "o")


def point(axis, x, y, row, **style):
    """The marker of a row; another function has an empty one, ours is larger and lies above the others."""
    ours, color = row.provider == OURS, COLORS[row.provider]
    fill = "white" if row.another_function else color
    style = dict(marker=marker(row.provider), facecolor=fill, edgecolor=color, zorder=3 if ours else 2, **style)
    axis.scatter(x, y, s=62 if ours else 34, label=row.name, gid=row.provider, **style)


def lines(axis, rows, x, y):
    """A line for every provider through the columns ``x`` and ``y`` of a frame."""
    for provider, members in rows.dropna(subset=[y]).sort_values(x).groupby("provider", sort=False):
        ours, color = provider == OURS, COLORS[provider]
        style = dict(linestyle="--" if provider.endswith("-compiled") else "-", linewidth=2.6 if ours else 1.5)
        style |= dict(label=members["name"].iloc[0], gid=provider, zorder=3 if ours else 2)
        axis.plot(members[x], members[y], marker=marker(provider), markersize=5, color=color, **style)


def beside(axis, y, offset, text, color):
    """Text that ends ``offset`` points right of an axis, at height ``y``."""
    style = dict(fontsize=TEXT, ha="right", va="center_baseline", annotation_clip=False, color=color)
    axis.annotate(text, (1, y), (offset, 0), ("axes fraction", "data"), "offset points", **style)


class Panel(NamedTuple):
    """An axis of :func:`bars`.

    Attributes:
        words: what its x axis shows; value: column with the end of a row's bar, NaN for none; start: of the bars;
            columns: (offset in points, heading, function of a row that gives (text, colour)) right of the axis;
            marks: function of (axis, place, row) that draws on a bar, or ``None``.
    """

    words: str
    value: str
    start: float
    columns: tuple[Any, ...]
    marks: Any = None


def bars(cases, environment, *panels):
    """Panels of bars side by side: cases from the top down, each a title with its rows below.

    Args:
        cases: of :func:`frame.cases`; panels: :class:`Panel`.

    Returns:
        the figure and its axes.
    """
    titles, entries, place = [], [], 0.0
    for text, rows in cases:
        titles.append((place, text))
        entries += [(place + 1 + index, row) for index, row in enumerate(rows)]
        place += len(rows) + 1.6
    figure, (axes,) = blank(1.15 + ROW * (place + 0.4), environment, ncols=len(panels), sharey=True)
    for axis, panel in zip(axes, panels, strict=True):
        for y, row in entries:
            value = getattr(row, panel.value)
            if not pd.isna(value):
                axis.barh(y, value - panel.start, left=panel.start, height=0.74, color=COLORS[row.provider])
                if panel.marks:
                    panel.marks(axis, y, row)
        axis.set_ylim(place - 0.6, -1.0)
        axis.set_yticks([y for y, _ in entries], [row.name for _, row in entries])
        axis.tick_params(axis="y", length=0, labelleft=axis is axes[0])
        axis.spines["left"].set_visible(False)
        axis.grid(axis="x", color=LINE, linewidth=0.8)
        name_axes(axis, panel.words)
        for offset, head, text in panel.columns:
            beside(axis, -0.1, offset, head, MUTED)
            for y, row in entries:
                beside(axis, y, offset, *text(row))
    # the titles begin about where the longest of the providers' names does
    left = -LETTER * max(len(row.name) for _, row in entries)
    for y, text in titles:
        style = dict(fontsize=TEXT, weight="bold", color=INK, va="center", annotation_clip=False, bbox=HALO)
        axes[0].annotate(text, (0, y), (left, 0), ("axes fraction", "data"), "offset points", **style)
    return figure, axes


def dots(lines, panels, environment, value, column):
    """Panels of points side by side that share their lines; on each line a point for every provider.

    Args:
        lines: words -> rows; panels: title -> predicate of a row; value: the column along the axis; column: (heading,
            function of our row that gives (text, colour)), right of each panel.

    Returns:
        the figure and its axes.
    """
    figure, (axes,) = blank(1.75 + ROW * len(lines), environment, ncols=len(panels), sharey=True)
    head, text = column
    for axis, (name, belongs) in zip(axes, panels.items(), strict=True):
        beside(axis, -1, 52, head, MUTED)
        for y, rows in enumerate(lines.values()):
            for row in rows:
                if belongs(row) and not pd.isna(getattr(row, value)):
                    point(axis, getattr(row, value), y, row)
                    if row.provider == OURS:
                        beside(axis, y, 52, *text(row))
        axis.set_title(name, loc="left", fontsize=TITLE, color=INK)
        axis.set_ylim(len(lines) - 0.4, -1.5)
        axis.set_yticks(range(len(lines)), list(lines))
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        axis.grid(axis="y", color=LINE, linewidth=0.8)
    return figure, axes


def ratio_axis(axis, low, high):
    """A logarithmic axis of ratios that holds ``low`` to ``high`` and 1, with plain numbers and a line at 1."""
    from matplotlib.ticker import NullLocator

    low, high = 0.92 * min(low, 0.9), 1.15 * max(high, 1.3)
    ticks = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)
    if high / low < 12:
        ticks = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 10)
    ticks = [tick for tick in ticks if low <= tick <= high]
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axis.axvline(1, color=INK, linewidth=1)


def plain(axis):
    """Plain numbers at 1, 2 and 5 times the powers of ten on a logarithmic axis, or fewer where it spans many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 3000 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}".replace(",", "\u2009")))
    axis.set_minor_formatter(NullFormatter())


def logarithmic(axis, places, rotation=0):
    """Logarithmic axes: a tick at every measured place along x, plain numbers along y."""
    from matplotlib.ticker import NullLocator

    axis.set_xscale("log")
    axis.xaxis.set_minor_locator(NullLocator())
    labels, last = [], 0.0
    for place in places:
        # a tick closer than a twentieth of the axis to the labelled one before it has no label
        far = not last or log(place / last) > 0.05 * log(places[-1] / places[0])
        labels.append(f"{place:,.0f}".replace(",", "\u2009") if far else "")
        last = place if far else last
    axis.set_xticks(places, labels, rotation=rotation)
    axis.set_yscale("log")
    plain(axis.yaxis)
    axis.grid(color=LINE, linewidth=0.8)


def speedup_text(row):
    """The speed-up with its range and its colour, red where the row is slower than upstream."""
    if pd.isna(row.speedup_median):
        return "no upstream", MUTED
    if row.provider == "upstream":
        return "1×", MUTED
    middle, low, high = (number(getattr(row, f"speedup_{key}")) for key in ("median", "p20", "p80"))
    return f"{middle}× ({low}–{high})", ALARM if row.lost else INK

"""How the report's pictures look: their size, the colour of every provider, and rows with bars and numbers."""

from io import BytesIO

from .cases import lost
from .words import amdahl, label, number, signature

WIDTH = 11.0
"""Inches of every picture's width, so that a point is as large in all of them: on a page of 1280 px it shows
1.5 px wide."""

SMALL, TEXT, TITLE = 8.5, 9.5, 11
"""Points; nothing is smaller than the first."""

DPI = 150
INK, MUTED, LINE, ALARM = "#1c2530", "#5f6b7a", "#e3e8ee", "#c8323a"
HALO = {"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.85}
"""Keeps text readable on lines."""

ROW = 0.25
"""Inches of a row with a bar."""

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
"""By the ending of a provider's name, so that colour is not all that tells forms of one implementation apart."""


def marker(provider):
    """The marker of a provider in pictures of points."""
    return next((shape for ending, shape in MARKERS.items() if provider.endswith(ending)), "o")


def blank(height, environment, **options):
    """A figure of the common width, signed with where it was measured, and its axes (``options``: of their making)."""
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


def legend(figure, axes, columns=4):
    """One legend above all axes, each provider once; artists name their provider in ``gid``."""
    handles = {}
    for axis in axes.flat:
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(text, handle)
    order = [*COLORS, None]
    handles = dict(sorted(handles.items(), key=lambda item: order.index(item[1].get_gid())))
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper left", ncols=columns, fontsize=TEXT, frameon=False
    )


def save(figure, path):
    """Write a PNG of 256 colours, a third as large as one of all. Returns its path."""
    from PIL import Image

    drawn = BytesIO()
    figure.savefig(drawn, dpi=DPI, facecolor="white", format="png")
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    return path


class Rows:
    """Cases from the top down, each a title with its entries' rows below, and columns of numbers right of the axes."""

    def __init__(self, cases):
        self.cases, self.entries, self.titles, place = cases, [], [], 0.0
        for case in cases:
            self.titles.append(place)
            for row in case.rows:
                place += 1.0
                self.entries.append((place, row))
            place += 1.6
        self.end = place - 0.6

    @property
    def height(self):
        """Inches of a picture with these rows, the axis and the signature below them included."""
        return 1.15 + ROW * (self.end + 1)

    def frame(self, axis, labels):
        """The rows' places on an axis; ``labels``: titles and providers too."""
        axis.set_ylim(self.end, -1.0)
        axis.set_yticks([place for place, _ in self.entries], [label(row) for _, row in self.entries])
        axis.tick_params(axis="y", length=0, labelleft=labels)
        axis.spines["left"].set_visible(False)
        axis.grid(axis="x", color=LINE, linewidth=0.8)
        if labels:
            # about where the longest of the providers' names begins
            left = -LETTER * max(len(label(row)) for _, row in self.entries)
            for place, case in zip(self.titles, self.cases, strict=True):
                style = dict(fontsize=TEXT, weight="bold", color=INK, va="center", annotation_clip=False, bbox=HALO)
                axis.annotate(case.title, (0, place), (left, 0), ("axes fraction", "data"), "offset points", **style)

    def column(self, axis, offset, head, text):
        """Numbers that end ``offset`` points right of an axis; ``text``: of a row, a string or (string, colour)."""
        place = ("axes fraction", "data")
        style = dict(fontsize=TEXT, ha="right", va="center_baseline", annotation_clip=False)
        axis.annotate(head, (1, -0.1), (offset, 0), place, "offset points", color=MUTED, **style)
        for y, row in self.entries:
            words = text(row)
            words, color = words if isinstance(words, tuple) else (words, INK)
            if words:
                axis.annotate(words, (1, y), (offset, 0), place, "offset points", color=color, **style)


LETTER = 0.56 * TEXT
"""Points of a letter's width, on average."""


def ratio_axis(axis, low, high):
    """A logarithmic axis of ratios that holds ``low`` to ``high`` and 1, with plain numbers and a line at 1."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    low, high = 0.92 * min(low, 0.9), 1.15 * max(high, 1.3)
    ticks = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)
    if high / low < 12:
        ticks = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 10)
    ticks = [tick for tick in ticks if low <= tick <= high]
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axis.axvline(1, color=INK, linewidth=1)


def speedup_text(row):
    """The speed-up with its range, red where it is a loss."""
    if row["speedup"] is None:
        return "no upstream", MUTED
    if row["provider"] == "upstream":
        return "1×", MUTED
    middle, low, high = (number(row["speedup"][key]) for key in ("median", "p20", "p80"))
    return f"{middle}× ({low}–{high})", ALARM if lost(row) else INK


def speed(cases, environment):
    """Bars from 1 to the speed-up of every row of some cases, with the speed-up and the time in numbers."""
    # beside a model, what the speed-up of its front end alone can bring
    rows = Rows([case._replace(title="; ".join(filter(None, (case.title, amdahl(case.rows))))) for case in cases])
    figure, ((axis,),) = blank(rows.height, environment)
    reach = [1.0]
    for place, row in rows.entries:
        if row["speedup"] is None:
            continue
        middle, low, high = (row["speedup"][key] for key in ("median", "p20", "p80"))
        reach += [low, high]
        axis.barh(place, middle - 1, left=1, height=0.74, color=COLORS[row["provider"]])
        if row["provider"] != "upstream":
            axis.plot([low, high], [place, place], color=INK, linewidth=1, solid_capstyle="butt")
    rows.frame(axis, labels=True)
    ratio_axis(axis, min(reach), max(reach))
    axis.set_xlabel("speed-up over upstream eager; thin lines: 20th to 80th percentile of rounds", fontsize=TEXT)
    rows.column(axis, 118, "speed-up", speedup_text)
    rows.column(axis, 178, "ms", lambda row: number(1e3 * row["seconds"]["median"]))
    return figure

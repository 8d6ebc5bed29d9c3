"""How the report's pictures look: colours, axes, and charts that list rows from the top down."""

from io import BytesIO
from math import inf

from .frame import OURS
from .words import signature

WIDTH, ROW = 11.0, 0.25
"""Inches: the width of every picture, so that text has the same size in all of them; the height of a listed row."""

INK, MUTED, ALARM = "#1c2530", "#5f6b7a", "#c8323a"
STYLE = ("seaborn-v0_8-whitegrid", {"font.size": 9.5, "font.sans-serif": "DejaVu Sans", "grid.color": "0.9"})
"""For :func:`matplotlib.style.context`, in which pictures are made and saved."""

COLORS = {
    "upstream": "#a3aab3",
    "upstream-compiled": "#6b7480",
    "upstream-graph": "#39424d",
    "t2t_fast": "#0a7d72",
    "t2t_fast-compiled": "#04463f",
    "t2t_fast-low": "#6fbab1",
    "t2t_fast-graph": "#12b3a0",
    "t2t_fast-fp32": "#3d5a2a",
    "openvino": "#7e57c2",
    "onnxruntime": "#00a1c9",
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

MARKERS = {"compiled": "D", "graph": "s", "low": "v", "fp32": "^"}
"""By the last word of a provider's name, so that forms of one implementation differ by more than colour."""


def look(row):
    """Keyword arguments of ``Axes.plot`` for the provider of a row; hollow markers: another function is computed."""
    ours, color = row.provider == OURS, COLORS[row.provider]
    return {
        "color": color,
        "linestyle": "--" if row.provider.endswith("-compiled") else "-",
        "linewidth": 2.6 if ours else 1.5,
        "marker": MARKERS.get(row.provider.rpartition("-")[2], "o"),
        "markersize": 7.5 if ours else 5.5,
        "markerfacecolor": "white" if row.another_function else color,
        "zorder": 3 if ours else 2,
        "label": row.name,
    }


def blank(height, environment, **options):
    """A figure of the common width with its axes, signed with the machine and versions."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(squeeze=False, **options)
    figure.supxlabel(signature(environment), x=0.008, ha="left", fontsize=8.5, color=MUTED)
    return figure, axes


def listing(lines, environment, panels):
    """Panels side by side that list the same lines from the top down, with numbers on the right of each.

    Args:
        lines: (words, rows); without rows, the words are the heading of the lines below.
        panels: words below the axis -> function of (axis, y, row) that draws a row and returns its number as text,
            and whether it is bad.

    Returns:
        the figure and its axes.
    """
    figure, (axes,) = blank(1.6 + ROW * len(lines), environment, ncols=len(panels), sharex=True, sharey=True)
    for axis, (words, draw) in zip(axes, panels.items(), strict=True):
        axis.set_xlabel(words)
        for y, (_, rows) in enumerate(lines):
            for row in rows:
                text, bad = draw(axis, y, row)
                place = {"transform": axis.get_yaxis_transform(), "va": "center_baseline"}
                axis.text(1.02, y, text, color=ALARM if bad else INK, **place)
    axes[0].set_ylim(len(lines) - 0.4, -0.6)
    axes[0].set_yticks(range(len(lines)), [words if rows else "" for words, rows in lines])
    for y, (words, rows) in enumerate(lines):
        if not rows:
            style = {"weight": "bold", "backgroundcolor": "white", "va": "center_baseline", "in_layout": False}
            axes[0].annotate(words, (0.008, y), xycoords=("figure fraction", "data"), **style)
    return figure, axes


def legend(figure):
    """One legend above all axes with each provider once."""
    found = [zip(*axis.get_legend_handles_labels(), strict=True) for axis in figure.axes]
    handles = {text: handle for each in found for handle, text in each}
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=3)


def logarithmic(axis, unit=""):
    """Make the x or y axis ``axis`` logarithmic, with plain numbers that end with ``unit``."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    places = {15: (1, 1.5, 2, 3, 5, 7), 100: (1, 2, 5), 3000: (1, 3), inf: (1,)}
    axis.set_major_locator(LogLocator(subs=next(places[span] for span in places if high / low < span)))
    axis.set_major_formatter(lambda value, _: f"{value:,.10g}{unit}".replace(",", "\u2009"))
    axis.set_minor_locator(NullLocator())


def save(figure, path):
    """Write a PNG with few colours, which keeps it small. Returns its path."""
    from PIL import Image

    drawn = BytesIO()
    figure.savefig(drawn)
    with Image.open(drawn) as image:
        few = image.convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
    return path

"""The report's charts: logits before and after, time, memory, and tokens that are not finite in half precision."""

from collections.abc import Callable, Sequence
from math import floor, log10
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .half import GAINS, HalfResult
from .photo import as_pixels
from .style import AFTER, ALARM, BEFORE, FAINT, INK, LABELS, picture, subplots

Bar = tuple[float, float | None, float | None]
"""A value, and its low and high percentile (``None`` for exact values)."""


def logits_figure(before: torch.Tensor, after: torch.Tensor) -> Figure:
    """All classes sorted by their logit before the swap: both forms in one plot, and their difference."""
    before, order = before.cpu().double().sort(descending=True)
    after = after.cpu().double()[order]
    difference = after - before
    rank = range(1, len(before) + 1)
    figure, (top, bottom) = subplots(9.6, 5.2, 2, 1, sharex=True, height_ratios=(1.6, 1))
    top.plot(rank, before.numpy(), color=BEFORE, linewidth=6, solid_capstyle="round", label=LABELS[0])
    top.plot(rank, after.numpy(), color=AFTER, linewidth=1.6, label=LABELS[1])
    top.set_title(f"logits of the {len(before)} classes, sorted")
    top.legend()
    scale = difference.abs().max().item()
    exponent = 0 if scale == 0 else floor(log10(scale))
    bottom.axhline(0, color=FAINT, linewidth=1)
    width = 1 if len(rank) > 100 else 4
    bottom.vlines(rank, 0, (difference / 10.0**exponent).numpy(), color=AFTER, linewidth=width)
    bottom.set_title(f"after minus before, in units of 1e{exponent}: at most {scale:.1e}")
    bottom.set_xlabel("class, from the highest logit to the lowest")
    bottom.set_xlim(1 - 0.01 * len(rank), 1.01 * len(rank))
    return figure


def bars_figure(pairs: Sequence[tuple[str, Bar, Bar]], text: Callable[[float], str], unit: str) -> Figure:
    """Two bars per row, relative to the row's "before", and the ratio.

    Args:
        pairs: (label, before, after).
        text: formats a value.
        unit: what the bars show.
    """
    figure, axes = subplots(9.6, 0.95 + 0.92 * len(pairs))
    longest = 100 * max((high or value) / before[0] for _, before, after in pairs for value, _, high in (before, after))
    limit = min(longest, 250) + 48
    for index, (_, before, after) in enumerate(pairs):
        for shift, bar, colour in ((-0.19, before, BEFORE), (0.19, after, AFTER)):
            share, low, high = (100 * (bound or bar[0]) / before[0] for bound in bar)
            axes.barh(index + shift, share, height=0.34, color=colour)
            if high > low:
                axes.plot([low, high], [index + shift] * 2, color=INK, linewidth=1.1, alpha=0.65, solid_capstyle="butt")
            axes.text(min(max(share, high), limit - 48) + 1.2, index + shift, text(bar[0]), va="center", fontsize=9)
        ratio = before[0] / after[0]
        style: dict[str, Any] = dict(va="center", ha="right", fontsize=13, weight="bold")
        axes.text(limit, index, f"{ratio:.2f}×", color=AFTER if ratio >= 1 else ALARM, **style)
    axes.set(xlim=(0, limit), ylim=(len(pairs) - 0.5, -0.5))
    axes.set_yticks(range(len(pairs)), [label.replace(", ", ",\n", 1) for label, _, _ in pairs])
    axes.set_xticks([0, 25, 50, 75, 100], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_xlabel(f"{unit}, relative to before; right: before / after", loc="left")
    axes.axvline(100, color=FAINT, linewidth=1, zorder=0)
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in (BEFORE, AFTER)]
    figure.legend(handles, LABELS, loc="outside upper left", ncols=2)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", labelsize=9.5, labelcolor=INK)
    return figure


def half_figure(x: torch.Tensor, results: Sequence[HalfResult], dtype: str = "fp16") -> Figure:
    """The photograph with the second layer's non-finite tokens in red, before and after, for every gain."""
    pixels, side = as_pixels(x[0]), x.shape[-1]
    figure, grid = subplots(9.6, 6.9, 2, len(GAINS))
    for axes, (form, gain) in zip(grid.flat, [(f, g) for f in ("before", "after") for g in GAINS], strict=True):
        broken = next(r.broken for r in results if (r.gain, r.dtype, r.form) == (gain, dtype, form))
        count = int(broken.sum())
        words = f"{count} of {broken.numel()} not finite" if count else "all finite"
        picture(axes, pixels, f"{form}, weights × {gain:g}: {words}", ALARM if count else INK, alpha=0.9)
        paint = torch.zeros(*broken.shape, 4)
        paint[broken] = torch.tensor([0.78, 0.16, 0.2, 0.8])
        axes.imshow(paint.numpy(), extent=(-0.5, side - 0.5, side - 0.5, -0.5))
    return figure

"""The demo's charts: logits before and after, time, memory, and which tokens survive half precision."""

from math import floor, log10

import torch
from matplotlib.patches import Rectangle

from .half import GAINS
from .photo import as_pixels
from .pictures import AFTER, ALARM, BEFORE, FAINT, INK, MUTED, canvas, caption, picture


def _plain(axes):
    """No box, light ticks."""
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(FAINT)
    axes.tick_params(labelsize=9, colors=MUTED, length=0)


def logits_figure(before, after):
    """All classes sorted by their logit before the swap: both forms over each other, and their difference."""
    before, after = before.cpu().double(), after.cpu().double()
    order = before.argsort(descending=True)
    before, after = before[order], after[order]
    difference = after - before
    before, after, difference = before.numpy(), after.numpy(), difference.numpy()
    rank = range(1, len(before) + 1)
    figure = canvas(9.6, 5.2)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1.6, 1))
    top.plot(rank, before, color=BEFORE, linewidth=6, solid_capstyle="round", label="before (upstream's form)")
    top.plot(rank, after, color=AFTER, linewidth=1.6, label="after t2t_fast.swap")
    caption(top, f"logits of the {len(before)} classes, sorted")
    top.legend(frameon=False, fontsize=9.5, labelcolor=INK)
    scale = float(abs(difference).max())
    exponent = 0 if scale == 0 else floor(log10(scale))
    bottom.axhline(0, color=FAINT, linewidth=1)
    bottom.vlines(rank, 0, difference / 10.0**exponent, color=AFTER, linewidth=1 if len(rank) > 100 else 4)
    caption(bottom, f"after minus before, in units of 1e{exponent}: at most {scale:.1e}")
    bottom.set_xlabel("class, from the highest logit to the lowest", fontsize=9, color=MUTED)
    bottom.set_xlim(1 - 0.01 * len(rank), 1.01 * len(rank))
    for axes in (top, bottom):
        _plain(axes)
    return figure


def bars_figure(pairs, text, unit):
    """Two bars a row, relative to the row's "before", and the ratio.

    Args:
        pairs: (label, before, after), each form as (value, low, high); low and high are ``None`` for exact values.
        text: a function from a value to words.
        unit: what the bars show.
    """
    figure = canvas(9.6, 0.95 + 0.92 * len(pairs))
    axes = figure.subplots()
    longest = 100 * max((high or value) / before[0] for _, before, after in pairs for value, _, high in (before, after))
    limit = min(longest, 250) + 48
    for index, (_, before, after) in enumerate(pairs):
        for shift, (value, low, high), colour in ((-0.19, before, BEFORE), (0.19, after, AFTER)):
            share, low, high = (100 * (bound or value) / before[0] for bound in (value, low, high))
            axes.barh(index + shift, share, height=0.34, color=colour)
            if high > low:
                axes.plot([low, high], [index + shift] * 2, color=INK, linewidth=1.1, alpha=0.65, solid_capstyle="butt")
            end = min(max(share, high), limit - 48)
            axes.text(end + 1.2, index + shift, text(value), va="center", fontsize=9, color=INK)
        ratio = before[0] / after[0]
        colour = AFTER if ratio >= 1 else ALARM
        axes.text(limit, index, f"{ratio:.2f}×", va="center", ha="right", fontsize=13, color=colour, weight="bold")
    axes.set_yticks(range(len(pairs)), [label.replace(", ", ",\n", 1) for label, _, _ in pairs])
    axes.set_ylim(len(pairs) - 0.5, -0.5)
    axes.set_xlim(0, limit)
    axes.set_xticks([0, 25, 50, 75, 100], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_xlabel(f"{unit}, relative to before; right: before / after", fontsize=9, color=MUTED, loc="left")
    axes.axvline(100, color=FAINT, linewidth=1, zorder=0)
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in (BEFORE, AFTER)]
    labels = ["before (upstream's form)", "after t2t_fast.swap"]
    style = dict(ncols=2, frameon=False, fontsize=9.5, labelcolor=INK)
    figure.legend(handles, labels, loc="outside upper left", **style)
    _plain(axes)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", labelsize=9.5, labelcolor=INK)
    return figure


def half_figure(x, results, dtype="fp16"):
    """The photograph with the second layer's broken tokens painted over, before and after, for every gain."""
    pixels = as_pixels(x[0])
    figure = canvas(9.6, 6.9)
    grid = figure.subplots(2, len(GAINS))
    for row, form in enumerate(("before", "after")):
        for column, gain in enumerate(GAINS):
            found = next(r for r in results if (r.gain, r.dtype, r.form) == (gain, dtype, form))
            axes = grid[row, column]
            broken = int(found.broken.sum())
            words = f"{broken} of {found.broken.numel()} broken" if broken else "all finite"
            picture(axes, pixels, "", interpolation="none", alpha=0.9)
            caption(axes, f"{form}, weights × {gain:g}: {words}", ALARM if broken else INK)
            paint = torch.zeros(*found.broken.shape, 4)
            paint[found.broken] = torch.tensor([0.78, 0.16, 0.2, 0.8])
            side = x.shape[-1]
            axes.imshow(paint.numpy(), extent=(-0.5, side - 0.5, side - 0.5, -0.5), interpolation="none")
    return figure

"""The look of the report's pictures."""

from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, FAINT = "#1c2530", "#5f6b7a", "#d5dbe3"
BEFORE, AFTER, ALARM = "#a9b3c0", "#0a7d72", "#c8323a"
LABELS = ("before (upstream's form)", "after t2t_fast.swap")

TICKS = {"color": MUTED, "labelsize": 9, "major.size": 0}
RC: dict[Any, Any] = {
    "axes.edgecolor": FAINT,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.facecolor": "white",
    "image.interpolation": "none",
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "savefig.dpi": 144,
    "text.color": INK,
    **{f"{axis}tick.{name}": value for axis in "xy" for name, value in TICKS.items()},
}
"""Matplotlib settings, for ``matplotlib.rc_context``."""


def subplots(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of ``width`` x ``height`` inches and its axes."""
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, **options)


def picture(axes: Axes, image: Any, title: str, colour: str = INK, **options: Any) -> None:
    """Draw an image in a frame, without ticks, under a title."""
    axes.imshow(image.cpu().numpy() if isinstance(image, torch.Tensor) else image, **options)
    axes.set(anchor="N", xticks=[], yticks=[])
    axes.set_title(title, color=colour)
    axes.spines[:].set_visible(True)

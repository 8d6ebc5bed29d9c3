"""Pictures of points: a line for each case, on it a point for every provider, panels side by side."""

from ..suites.groups import MODES
from .cases import OURS, main_dtype, subject
from .chart import COLORS, INK, LINE, MUTED, ROW, TEXT, TITLE, blank, legend, marker, ratio_axis, speedup_text
from .words import label


def panels(lines, members, environment, value, column):
    """A figure with a panel for each of ``members`` (title -> predicate of a row), which share the ``lines``.

    Args:
        lines: words -> rows; value: of a row, its place along the axis, or ``None``; column: (heading, function of our
            row that gives its words and their colour), written right of each panel.

    Returns:
        the figure and its axes.
    """
    figure, (axes,) = blank(1.75 + ROW * len(lines), environment, ncols=len(members), sharey=True)
    head, text = column
    place = ("axes fraction", "data")
    for axis, (name, belongs) in zip(axes, members.items(), strict=True):
        style = dict(fontsize=TEXT, ha="right", va="center_baseline", annotation_clip=False)
        axis.annotate(head, (1, -1), (52, 0), place, "offset points", color=MUTED, **style)
        for y, rows in enumerate(lines.values()):
            _line(axis, y, [row for row in rows if belongs(row) and value(row) is not None], value)
            for row in rows:
                if belongs(row) and row["provider"] == OURS and value(row) is not None:
                    words, color = text(row)
                    axis.annotate(words, (1, y), (52, 0), place, "offset points", color=color, **style)
        axis.set_title(name, loc="left", fontsize=TITLE, color=INK)
        axis.set_ylim(len(lines) - 0.4, -1.5)
        axis.set_yticks(range(len(lines)), list(lines))
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        axis.grid(axis="y", color=LINE, linewidth=0.8)
    return figure, axes


def _line(axis, y, rows, value):
    """The points of one case, ours last, so that no other one hides it."""
    for row in sorted(rows, key=lambda row: row["provider"] == OURS):
        color = COLORS[row["provider"]]
        axis.scatter(
            value(row),
            y,
            s=62 if row["provider"] == OURS else 34,
            marker=marker(row["provider"]),
            facecolor="white" if row["another_function"] else color,
            edgecolor=color,
            label=label(row),
            gid=row["provider"],
        )


def operators(found, environment):
    """Speed-ups of operators over upstream eager, a panel for each mode, in the dtype with the most rows."""
    dtype = main_dtype(found)
    lines = {}
    for row in found:
        if row["dtype"] == dtype and row["speedup"] is not None:
            lines.setdefault(f"{subject(row)}, batch {row['batch']}", []).append(row)
    if not lines:
        return None
    members = {
        f"{dtype}, {mode}": lambda row, mode=mode: row["mode"] == mode
        for mode in MODES
        if any(row["mode"] == mode for rows in lines.values() for row in rows)
    }

    def ours(row):
        words, color = speedup_text(row)
        return words.partition(" ")[0], color

    figure, axes = panels(lines, members, environment, lambda row: row["speedup"]["median"], ("t2t_fast", ours))
    reach = [row["speedup"]["median"] for rows in lines.values() for row in rows]
    for axis in axes:
        ratio_axis(axis, min(reach), max(reach))
        axis.set_xlabel("speed-up over upstream eager (median of rounds)", fontsize=TEXT)
    legend(figure, axes, columns=3)
    return figure

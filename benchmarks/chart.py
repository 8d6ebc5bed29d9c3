"""The chart of a run: speed-up and memory of every provider, case by case, relative to upstream eager."""

COLORS = {
    "upstream": "#9aa0a6",
    "upstream-compiled": "#5f6368",
    "aten": "#8ab4f8",
    "aten-compiled": "#4285f4",
    "t2t_fast": "#f2a65a",
    "t2t_fast-compiled": "#d9541e",
    "t2t_fast-low": "#c9733a",
    "t2t_fast-graph": "#a83a12",
    "unfold": "#b39ddb",
    "convolution": "#81c784",
    "two-sdpa": "#ab47bc",
    "performer-pytorch": "#26a69a",
    "flash-linear-attention": "#9e9d24",
    "sdpa": "#e6a0c4",
}
MEMORY = {"peak_bytes": ("#cdbdae", "peak of a call"), "saved_bytes": ("#7d5a3c", "saved for backward")}
HALO = {"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.85}
"""Keeps text readable on the line of the baseline."""

BAR = 0.26
"""Inches of a bar's height."""


def _positions(cases):
    """Bar positions from the top down, and where each case's title stands."""
    positions, titles, place = [], [], 0.0
    for case in cases:
        titles.append(place)
        place += 1.0
        for row in case.rows:
            positions.append((place, row))
            place += 1.0
        place += 0.5
    return positions, titles, place


def _short(value):
    """Three significant digits without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _speed(axis, positions):
    for place, row in positions:
        speedup = row["speedup"]
        if speedup is None:
            continue
        middle = speedup["median"]
        reach = [[middle - speedup["p20"]], [speedup["p80"] - middle]]
        axis.barh(place, middle, height=0.8, color=COLORS[row["provider"]])
        axis.errorbar(middle, place, xerr=reach, color="black", linewidth=1, capsize=2)
        axis.annotate(
            f"{middle:.2f}×  {_short(1e3 * row['seconds']['median'])} ms",
            (max(middle, speedup["p80"]), place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            bbox=HALO,
        )
    axis.axvline(1, color="black", linewidth=0.8, zorder=0)
    axis.set_xlabel("speed-up over upstream eager (median, 20 % to 80 %)")
    axis.set_xlim(0, 1.35 * max((row["speedup"] or {"p80": 1})["p80"] for _, row in positions))


def _memory(axis, positions, baselines):
    widest = 1.0
    for place, row in positions:
        base, end, words = baselines.get(row["group"]), 0.0, []
        for offset, (key, (color, _)) in zip((-0.2, 0.2), MEMORY.items(), strict=True):
            if base is None or row[key] is None or not base[key]:
                continue
            share = row[key] / base[key]
            end = max(end, share)
            axis.barh(place + offset, share, height=0.38, color=color)
            words.append(f"{_short(row[key] / row['batch'] / 1e6)} MB {key.partition('_')[0]}")
        widest = max(widest, end)
        style = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 8, "bbox": HALO}
        if words:
            axis.annotate(", ".join(words), (end, place), **style)
    for color, label in MEMORY.values():
        axis.barh(0, 0, color=color, label=label)
    axis.legend(loc="upper right", ncols=2, fontsize=8, frameon=False, borderaxespad=0)
    axis.axvline(1, color="black", linewidth=0.8, zorder=0)
    axis.set_xlabel("memory per image, relative to upstream eager")
    axis.set_xlim(0, 1.6 * widest)


def draw(cases, heading, path):
    """Draw cases (a title and rows each) into a PNG. Returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    positions, titles, height = _positions(cases)
    baselines = {row["group"]: row for _, row in positions if row["provider"] == "upstream"}
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(15, 1.6 + BAR * height), sharey=True, width_ratios=(3, 2), layout="constrained"
    )
    _speed(left, positions)
    _memory(right, positions, baselines)
    left.set_ylim(height - 0.3, -0.8)
    left.set_yticks([place for place, _ in positions], [row["label"] for _, row in positions], fontsize=8)
    left.tick_params(axis="y", length=0)
    right.tick_params(axis="y", length=0)
    for place, case in zip(titles, cases, strict=True):
        style = {"xytext": (2, 0), "textcoords": "offset points", "va": "center", "weight": "bold", "bbox": HALO}
        left.annotate(case.title, (0, place), **style)
    for axis in (left, right):
        axis.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle(heading, fontsize=8, wrap=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path

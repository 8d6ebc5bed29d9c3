"""The number of tokens from which Performer attention is faster than softmax attention."""

import numpy as np

from ..measure.statistics import ratios
from ..suites.groups import MODES
from .frame import OURS, main_dtype

SOFTMAX = "sdpa"
SUBJECT = "performer_attention-L"


def curves(found):
    """The rows of the sweep over lengths in its main dtype, with a column ``length``; empty for fewer than two."""
    rows = found[found["subject"].astype(str).str.startswith(SUBJECT)]
    rows = rows[rows["dtype"] == main_dtype(rows)]
    rows = rows.assign(length=[int(each.removeprefix(SUBJECT)) for each in rows["subject"]]).sort_values("length")
    return rows if rows["length"].nunique() > 1 else rows.iloc[:0]


def speedups(rows, mode, run):
    """[(length, speed-up over softmax attention)] of the lengths at which both were measured."""
    times = {(row["group"], row["provider"]): row.get("times") for row in run.rows}
    groups = rows[(rows["mode"] == mode) & (rows["provider"] == OURS)].itertuples()
    both = [(row, times[row.group, SOFTMAX]) for row in groups if (row.group, SOFTMAX) in times]
    return [(row.length, ratios(softmax, times[row.group, OURS])["median"]) for row, softmax in both]


def crossing(points):
    """The length from which on ours is faster, between two measured lengths; ``None`` if it is not between any.

    Straight lines between logarithms: at long lengths softmax attention grows with L^2 and Performer attention with L.
    """
    lengths, speedups = np.log(np.array(points, dtype=float).reshape(-1, 2).T)
    slower = np.flatnonzero(speedups <= 0)
    if not len(slower) or slower[-1] == len(points) - 1:
        return None
    between = slice(slower[-1], slower[-1] + 2)
    return float(np.exp(np.interp(0, speedups[between], lengths[between])))


def words(mode, dtype, points):
    """What the points of a mode show, in a sentence."""
    (first, slowest), (last, fastest) = points[0], points[-1]
    if (where := crossing(points)) is not None:
        verdict = f"faster than softmax attention from about {where:.0f} tokens on"
    elif fastest > 1:
        verdict = "faster than softmax attention at every measured length"
    else:
        verdict = "not faster than softmax attention at the longest measured length"
    measured = f"{slowest:.2f}x its speed at {first} tokens, {fastest:.2f}x at {last}"
    return f"{dtype}, {mode}: t2t_fast is {verdict} ({measured})"


def sentences(rows, run):
    """One for each mode in which both kinds of attention were measured."""
    found = {mode: speedups(rows, mode, run) for mode in MODES}
    return [words(mode, main_dtype(rows), points) for mode, points in found.items() if points]

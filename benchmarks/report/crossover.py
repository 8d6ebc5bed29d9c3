"""The number of tokens from which Performer attention is faster than softmax attention."""

from math import exp, log

from ..measure.statistics import ratios
from ..suites.groups import MODES
from .frame import OURS, main_dtype, pd

SOFTMAX = "sdpa"
SUBJECT = "performer_attention-L"


def curves(found):
    """The rows of the sweep over lengths in its main dtype, with a column ``length``; empty for fewer than two."""
    rows = found[found["subject"].str.startswith(SUBJECT)] if len(found) else found
    rows = rows[rows["dtype"] == main_dtype(rows)]
    rows = rows.assign(length=[int(each.removeprefix(SUBJECT)) for each in rows["subject"]]).sort_values("length")
    return rows if rows["length"].nunique() > 1 else rows.iloc[:0]


def speedups(rows, mode, times):
    """[(length, speed-up over softmax attention)] where both were measured; ``times``: (group, provider) -> rounds."""
    groups = pd.unique(rows.loc[rows["mode"] == mode, "group"])
    lengths = rows.drop_duplicates("group").set_index("group")["length"]
    both = [group for group in groups if (group, OURS) in times and (group, SOFTMAX) in times]
    return [(lengths[each], ratios(times[each, SOFTMAX], times[each, OURS])["median"]) for each in both]


def rounds(run):
    """(group, provider) -> the seconds of the rounds."""
    return {(row["group"], row["provider"]): row["times"] for row in run.rows}


def crossing(points):
    """The length from which on ours is faster, between two measured lengths; ``None`` if it is not between any.

    Straight lines between logarithms: at long lengths softmax attention grows with L^2 and Performer attention with L.
    """
    for (short, before), (long, after) in zip(points[-2::-1], points[:0:-1], strict=True):
        if after <= 1:
            return None
        if before <= 1:
            return exp(log(short) + (log(long) - log(short)) * -log(before) / (log(after) - log(before)))
    return None


def words(mode, dtype, points):
    """What the points of a mode show, in a sentence."""
    (first, slowest), (last, fastest) = points[0], points[-1]
    where = crossing(points)
    if where is not None:
        verdict = f"faster than softmax attention from about {where:.0f} tokens on"
    elif all(speedup > 1 for _, speedup in points):
        verdict = "faster than softmax attention at every measured length"
    else:
        verdict = "not faster than softmax attention at the longest measured length"
    measured = f"{slowest:.2f}x its speed at {first} tokens, {fastest:.2f}x at {last}"
    return f"{dtype}, {mode}: t2t_fast is {verdict} ({measured})"


def sentences(rows, run):
    """One for each mode in which both kinds of attention were measured."""
    found = {mode: speedups(rows, mode, rounds(run)) for mode in MODES}
    return [words(mode, main_dtype(rows), points) for mode, points in found.items() if points]

"""Whether one run is slower than another: ``python -m benchmarks --compare A.json B.json``.

Rows are matched by group and provider. Every ratio is defined so that more than 1 means worse in B: the time of B over
that of A, or the speed-up of A over that of B. A row's speed-up is the median of its rounds' ratios to upstream eager
in the same group. On a shared machine only speed-ups can be compared between runs, so they decide unless ``--by time``
is given. The rows of upstream eager, and rows without it, have no speed-up: they are shown and not judged.

The noise band of a ratio comes from an interval for each of its two medians (:func:`interval`): the low end of one over
the high end of the other, and the other way round. A row is "slower" if its ratio is above 1 + threshold and the whole
band above 1, "faster" the other way round, "within noise" if its ratio is beyond the threshold and the band holds 1,
and "same" if its ratio is within the threshold. The band covers the scatter of rounds and visits, but not what affects
a whole run, such as a busy neighbour or another clock speed; the threshold is for that. Run the same commit twice to
see how large it has to be on a machine.

Memory (more than 1 % more or less) and the largest batch that fits do not scatter and have no band. A row that A has
and B failed to measure is worse as well; a row that B left out for another reason is listed. Only changes for the worse
in this package's own rows are regressions. Runs on different devices are compared by speed-up, with a warning.
"""

import sys
from itertools import accumulate
from math import comb, isfinite
from statistics import median
from typing import NamedTuple

import numpy as np

from ..measure import run_file
from ..measure.text_tables import aligned
from .frame import BASELINE, own, pd

CONFIDENCE, THRESHOLD, MEMORY_TOLERANCE, LIMITS_TOLERANCE = 0.95, 0.05, 0.01, 0.1
MEASURES = {
    "speedup": ("speed-up", 1, "slower", "faster"),
    "time": ("time, ms", 1e3, "slower", "faster"),
    "saved_bytes": ("kept for backward, MB", 1e-6, "more memory", "less memory"),
    "peak_bytes": ("peak memory, MB", 1e-6, "more memory", "less memory"),
    "batch": ("largest batch", 1, "fewer images", "more images"),
}
"""What is compared: its name and factor in the table, and the verdicts on a change for the worse and for the better."""

WORSE = ("failed", "slower", "more memory", "fewer images")
ORDER = (*WORSE, "faster", "less memory", "more images", "within noise", "not judged", "gone", "new", "same")
"""Verdicts, in the order of the table."""

CONDITIONS = ["device", "threads", "malloc", "driver", "torch", "compile_mode", "float32_matmul_precision"]
CONDITIONS += ["quick", "visits"]
"""Parts of the environment that should be the same in both runs."""

KEY = ["group", "provider"]
"""Names an entry of a run."""

HEADS = {name: name for name in ("verdict", *KEY, "what", "a", "b", "ratio", "low", "high", "reason")}
HEADS |= {"what": "measure", "a": "A", "b": "B", "ratio": "ratio (> 1: worse)", "low": "noise from", "high": "to"}
"""Column of the changes -> heading in the table."""

NUMBERS = [*(f"{measure}{end}" for measure in MEASURES for end in ("", "_low", "_high")), "limit_bytes"]


class Comparison(NamedTuple):
    """Two runs side by side.

    Attributes:
        environments: of A and of B; threshold: share, as in 0.05.
        warnings: why the runs are hard to compare, in words.
        ratios: key of :data:`MEASURES` -> frame by group and provider, of :func:`_ratios`.
        changes: frame of the same columns with ``group`` and ``provider``, the worst first; ``what`` is "row" where
            only one run has the row.
    """

    environments: tuple[dict, dict]
    threshold: float
    warnings: list[str]
    ratios: dict[str, pd.DataFrame]
    changes: pd.DataFrame

    @property
    def regressions(self):
        """The changes for the worse of this package's own rows."""
        return self.changes[self.changes["verdict"].isin(WORSE) & self.changes["provider"].map(own)]

    def repeated(self, measure, drift=1.0):
        """(rows whose medians differ by less than the threshold, rows), with B's times divided by ``drift``."""
        found = self.ratios[measure]["ratio"] / drift
        return int((np.maximum(found, 1 / found) < 1 + self.threshold).sum()), len(found)

    @property
    def drift(self):
        """How much longer the same work took in B: the median ratio of upstream's times; ``None`` without any."""
        found = self.ratios["time"].query("provider == @BASELINE")["ratio"]
        return found.median() if len(found) else None


def interval(values, visits=()):
    """A 95 % confidence interval for the median, widened to hold the median of each visit.

    Of n sorted values it is the k-th from below and the k-th from above, whatever their distribution. The median lies
    outside with probability 2 * sum(C(n, i) for i < k) / 2**n, and k is the largest for which that is at most 5 %.
    Fewer than 6 values cannot reach 95 %: the interval is then the smallest and the largest (n = 5: 93.8 %).

    Args:
        values: a number a round; visits: how many of them are of each visit, in their order; empty if not known.
    """
    count = len(values)
    outside = accumulate(2 * comb(count, i) / 2**count for i in range(count))
    k = max(1, sum(probability <= 1 - CONFIDENCE for probability in outside))
    medians = [np.median(each) for each in np.split(np.asarray(values), np.cumsum(visits, dtype=int)) if len(each)]
    ends = sorted(values)[k - 1], sorted(values)[count - k]
    return min(*ends, *medians), max(*ends, *medians)


def _numbers(run, name):
    """A frame with a line for each row of a run: :data:`KEY` and :data:`NUMBERS`; ``name``: for errors."""
    keys = pd.DataFrame(run.rows, columns=KEY)
    if keys.isna().any(axis=None):
        raise ValueError(f"run {name}: a row has no group or no provider")
    if keys.duplicated().any():
        raise ValueError(f"run {name}: {', '.join(keys[keys.duplicated()].iloc[0])} is there twice")
    baselines = {row["group"]: row.get("times") for row in run.rows if row["provider"] == BASELINE}
    lines = []
    for row in run.rows:
        if row["suite"] == "memory":
            lines.append({key: row[key] for key in (*KEY, "batch", "limit_bytes")})
            continue
        times, base = row.get("times"), baselines.get(row["group"])
        entry = f"run {name}: {row['group']}, {row['provider']}"
        if not times:
            raise ValueError(f"{entry} has no times of its rounds")
        rounds = {"time": times}
        # a row without a speed-up was not measured in turn with the baseline
        if row["provider"] != BASELINE and base and row.get("speedup") is not None:
            if len(times) != len(base):
                raise ValueError(f"{entry} has {len(times)} rounds, {BASELINE} {len(base)}")
            rounds["speedup"] = np.divide(base, times)
        line = {key: row.get(key) for key in (*KEY, "saved_bytes", "peak_bytes")}
        for measure, values in rounds.items():
            low, high = interval(values, row.get("visits", ()))
            line |= {measure: median(values), f"{measure}_low": low, f"{measure}_high": high}
        lines.append(line)
    return pd.DataFrame(lines, columns=[*KEY, *NUMBERS]).astype(dict.fromkeys(NUMBERS, float))


def _ratios(rows, measure, threshold):
    """The ratios of a measure where both runs have it, by :data:`KEY`.

    Columns: ``a`` and ``b`` (speed-ups, seconds, bytes of a call or images), ``ratio`` (infinite or 0 if one of them is
    0), its noise band ``low`` to ``high`` (NaN if there is none), ``what`` (the measure), ``verdict`` and ``reason``.
    """
    a, b = ({end: rows[f"{measure}{end}_{run}"] for end in ("", "_low", "_high")} for run in "ab")
    above, below = (a, b) if measure in ("speedup", "batch") else (b, a)
    ratio = (above[""] / below[""]).mask(a[""] == b[""], 1.0)
    if measure == "batch":
        ratio = ratio.where(rows["limit_bytes_a"] == rows["limit_bytes_b"])
    low, high = above["_low"] / below["_high"], above["_high"] / below["_low"]
    tolerance = {"speedup": threshold, "time": threshold, "batch": 0.0}.get(measure, MEMORY_TOLERANCE)
    same = ratio.between(1 / (1 + tolerance), 1 + tolerance)
    *_, worse, better = MEASURES[measure]
    cases = [ratio.isna(), same, low.fillna(ratio) > 1, high.fillna(ratio) < 1]
    verdict = np.select(cases, ["not judged", "same", worse, better], "within noise")
    reason = np.where(ratio.isna(), "the limits differ", "")
    found = {"a": a[""], "b": b[""], "ratio": ratio, "low": low, "high": high}
    return pd.DataFrame(found).assign(what=measure, verdict=verdict, reason=reason).dropna(subset=["a", "b"])


def _changes(rows, ratios, by, left_out):
    """What is listed, the worst first; ``rows``: the numbers of both runs; ``left_out``: B's reasons by row."""
    memory = [ratios[measure].query("verdict != 'same'") for measure in ("saved_bytes", "peak_bytes")]
    reason = "no speed-up over upstream in both runs"
    unjudged = ratios["time"].drop(ratios[by].index).assign(verdict="not judged", reason=reason)
    new = rows[rows["side"] == "right_only"].assign(verdict="new", reason="")
    gone = rows[rows["side"] == "left_only"]
    gone = gone.assign(reason=[left_out.get(key, "not in the run") for key in gone.index])
    gone["verdict"] = ["failed" if reason.startswith("failed") else "gone" for reason in gone["reason"]]
    alone = pd.concat([gone, new])[["verdict", "reason"]].assign(what="row")
    found = pd.concat([ratios[by], ratios["batch"], *memory, unjudged, alone]).reset_index()
    distance = np.log(found["ratio"].where(found["ratio"] > 0, 1)).abs()
    found = found.assign(place=found["verdict"].map(ORDER.index), distance=-distance)
    return found.sort_values(["place", "distance", *KEY, "what"], ignore_index=True)


def _warnings(a, b):
    """Why the runs of two files are hard to compare."""
    for condition in CONDITIONS:
        before, after = (run.environment.get(condition) for run in (a, b))
        if before != after:
            yield f"{condition}: {before} in A, {after} in B"
    before, after = (", ".join(sorted({row.get("dtype", "?") for row in run.rows})) for run in (a, b))
    if before != after:
        yield f"dtypes: {before} in A, {after} in B"
    speeds = pd.json_normalize([run.environment.get("limits", {}) for run in (a, b)])
    for name, ratio in (speeds.iloc[1] / speeds.iloc[0]).dropna().items():
        if max(ratio, 1 / ratio) > 1 + LIMITS_TOLERANCE:
            what = "copy bandwidth" if name == "bytes_per_s" else f"{name.removeprefix('flop_per_s.')} products"
            yield f"the machine's own {what}: B has {ratio:.2f} times A's"
    for name, run in (("A", a), ("B", b)):
        if not run.complete:
            yield f"run {name} was cut off: {run.finished} of {run.planned} planned rows"


def compare(a, b, threshold=THRESHOLD, by="speedup"):
    """Compare two runs; the module's docstring says how.

    Args:
        a, b: :class:`run_file.RunFile`, the base and the new run; threshold: share by which a ratio may differ from 1;
            by: "speedup" or "time".

    Returns:
        a :class:`Comparison`.

    Raises:
        ValueError: a bad threshold, a file without what is compared, no row in common, or times of different devices.
    """
    if not (isfinite(threshold) and threshold >= 0):
        raise ValueError(f"threshold: expected a share of at least 0, as in 0.05, got {threshold}")
    devices = [run.environment.get("device") for run in (a, b)]
    if by == "time" and devices[0] != devices[1]:
        names = "; ".join(map(str, devices))
        raise ValueError(f"by: times of different devices ({names}) say nothing about the code, compare speed-ups")
    rows = _numbers(a, "A").merge(_numbers(b, "B"), "outer", KEY, suffixes=("_a", "_b"), indicator="side")
    rows = rows.set_index(KEY)
    ratios = {measure: _ratios(rows, measure, threshold) for measure in MEASURES}
    left_out = {(each["group"], each["provider"]): each["reason"] for each in b.left_out}
    changes = _changes(rows, ratios, by, left_out)
    if changes["verdict"].isin(("gone", "new")).all():
        raise ValueError("the runs have no row in common")
    return Comparison((a.environment, b.environment), threshold, list(_warnings(a, b)), ratios, changes)


def summary(comparison):
    """Lines: how many rows were the same by either measure, the machine's drift, and counts of verdicts."""
    counts, regressions = comparison.changes["verdict"].value_counts(), len(comparison.regressions)
    lines, drift, limit = [], comparison.drift, f"differ by less than {comparison.threshold:.3g}"
    for measure, name in (("speedup", "speed-ups"), ("time", "times")):
        same, total = comparison.repeated(measure)
        lines += [f"{name}: {same} of {total} rows {limit}"] * bool(total)
    if drift is not None:
        same, total = comparison.repeated("time", drift)
        lines.append(f"drift: upstream takes {drift:.3f} times as long in B; without it, {same} of {total} {limit}")
    words = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ORDER if verdict in counts)
    ours = f"{regressions or 'no'} regression{'s' * (regressions != 1)} of t2t_fast's rows (with any backend)"
    return [*lines, f"{words}; {ours}"]


def text(comparison):
    """The comparison as plain text: warnings, a table with the worst first, and the lines of :func:`summary`.

    Rows that are the same are only counted. Providers of a group that only one run has share a line.
    """
    lines = []
    for name, environment in zip("AB", comparison.environments, strict=True):
        known = (environment.get(key, "?") for key in ("date", "device", "t2t_fast", "torch"))
        lines.append("{}  {}, {}; t2t_fast {}, torch {}".format(name, *known))
    lines += [f"warning: {warning}" for warning in comparison.warnings]
    changes = comparison.changes.query("verdict != 'same'")
    alone = changes["verdict"].isin(("gone", "new"))
    names, factors = ({what: words[place] for what, words in MEASURES.items()} for place in (0, 1))
    together = changes[alone].groupby(["verdict", "group", "what", "reason"], sort=False)["provider"].agg(", ".join)
    shown = pd.concat([changes[~alone], together.reset_index()])
    shown[["a", "b"]] = shown[["a", "b"]].mul(shown["what"].map(factors), axis=0)
    shown = shown.replace({"what": names})[list(HEADS)].rename(columns=HEADS)
    cells = shown.map(lambda cell: cell if isinstance(cell, str) else "" if pd.isna(cell) else f"{cell:.4g}")
    lines += ["", *aligned(cells.columns, cells.itertuples(index=False), list(HEADS.values())[4:9])]
    return "\n".join([*lines, "", *summary(comparison)])


def run(a, b, threshold=THRESHOLD, by="speedup"):
    """Compare two run files and print the result.

    Returns:
        the exit code: 1 if there is a regression, else 0; 2, and why on standard error, if they cannot be compared.
    """
    try:
        found = compare(run_file.read(a), run_file.read(b), threshold, by)
    except (OSError, ValueError) as failure:
        print(f"python -m benchmarks --compare: {failure}", file=sys.stderr)
        return 2
    print(text(found))
    return 1 if len(found.regressions) else 0

"""Whether one run is slower than another: ``python -m benchmarks.report.compare A.json B.json``.

Rows are matched by group and provider. Every ratio is defined so that more than 1 means worse in B: the time of B over
that of A, or the speed-up of A over that of B. A row's speed-up is the median of its rounds' ratios to upstream eager
in the same group. On a machine that other work shares only that can be compared between runs, so rows are judged by it
unless ``--by time`` says otherwise. Upstream eager's own rows, and rows without it, have no speed-up: they are shown
and not judged.

The noise band of a ratio comes from an interval for each of its two medians (:func:`interval`): the low end of one over
the high end of the other, and the other way round. A row is

* "slower" if its ratio is above 1 + threshold and the whole band above 1, "faster" the other way round;
* "within noise" if its ratio is beyond the threshold and the band holds 1;
* "same" if its ratio is within the threshold.

The band covers the scatter of the rounds and, where a run visited its groups several times, the medians of the visits.
It does not cover what holds for a whole run: a neighbour that was busy all the time, another clock speed, drift from
one run to the next. So the threshold stands beside it. How large that has to be on a machine shows when the same commit
is run twice.

Memory (more than 1 % more or less) and the largest batch that fits (an image more or less) do not scatter and have no
band. A row that A has and B failed to measure is worse as well; one that B left out for another reason is listed. What
is worse is a regression if the row is this package's own: peers that became slower are told, and decide nothing.

Runs on different devices can be compared by speed-up, with a warning. By time they are refused.

Exit code: 1 if there is a regression, else 0; 2 if there is nothing to compare.
"""

import argparse
import json
import sys
from math import comb, inf, isfinite, log
from pathlib import Path
from statistics import median
from typing import NamedTuple

from ..measure import run_file
from .cases import BASELINE, ours

CONFIDENCE = 0.95
THRESHOLD = 0.05
MEMORY_TOLERANCE = 0.01
MEASURES = {"speedup": "speed-up", "time": "time"}
MEMORY = {"saved_bytes": "kept for backward", "peak_bytes": "peak memory"}
LIMITS_TOLERANCE = 0.1
"""Measured limits that differ by more mean another machine, or one that was busy."""

WORSE = ("failed", "slower", "more memory", "fewer images")
BETTER = ("faster", "less memory", "more images")
ORDER = (*WORSE, *BETTER, "within noise", "not judged", "gone", "new", "same")
"""Verdicts, in the order of the table."""

CONDITIONS = (
    "device",
    "threads",
    "malloc",
    "driver",
    "torch",
    "compile_mode",
    "float32_matmul_precision",
    "quick",
    "visits",
)
"""What is warned of where the runs' environments differ."""


class Rounds(NamedTuple):
    """A row's numbers, one a round (seconds, or speed-ups), and how many of them are of each visit, in their order."""

    values: list[float]
    visits: list[int]


class Ratio(NamedTuple):
    """Two medians (seconds, or speed-ups), their ratio (more than 1: worse in B) and its noise band."""

    a: float
    b: float
    value: float
    low: float
    high: float


class Change(NamedTuple):
    """What became of one measure of one row.

    Attributes:
        verdict: one of :data:`ORDER`.
        what: "speed-up", "time", "kept for backward", "peak memory", "largest batch", or "row".
        a, b: speed-ups, seconds, bytes of a call or images; ``None`` on a side without the number.
        ratio: more than 1 means worse in B; infinite where A had nothing, ``None`` where there is no ratio.
        low, high: the noise band of ``ratio``, or ``None``.
        reason: why there is no verdict or no number, in words.
    """

    verdict: str
    group: str
    provider: str
    what: str
    a: float | None = None
    b: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str = ""


class Comparison(NamedTuple):
    """Two runs side by side.

    Attributes:
        environments: of A and of B.
        by: "speedup" or "time"; threshold: share, as in 0.05.
        warnings: what makes the runs hard to compare, in words.
        changes: of every row, the worst first.
        ratios: {"time": {(group, provider): :class:`Ratio`}, "speedup": the same without the baseline's rows}.
    """

    environments: tuple[dict, dict]
    by: str
    threshold: float
    warnings: list[str]
    changes: list[Change]
    ratios: dict[str, dict[tuple[str, str], Ratio]]

    @property
    def regressions(self):
        """The changes for the worse of this package's own rows; those of its peers are told and decide nothing."""
        return [change for change in self.changes if change.verdict in WORSE and ours(change.provider)]

    def repeated(self, measure, drift=1.0):
        """(rows whose medians differ by less than the threshold, rows) by a measure: "speedup" or "time".

        Args:
            drift: a factor that all of B's numbers are taken to have, see :attr:`drift`.
        """
        found = [ratio.value / drift for ratio in self.ratios[measure].values()]
        return sum(max(value, 1 / value) < 1 + self.threshold for value in found), len(found)

    @property
    def drift(self):
        """How much longer the same work took in B: the median of upstream's ratios, which no change of ours moves.

        ``None`` without rows of upstream in both runs.
        """
        found = [ratio.value for (_, provider), ratio in self.ratios["time"].items() if provider == BASELINE]
        return median(found) if found else None


def median_interval(values):
    """A 95 % confidence interval for the median that assumes nothing about the distribution.

    Of n sorted values it is the k-th from below and the k-th from above. The median lies outside with probability
    2 * sum(C(n, i) for i < k) / 2**n, and k is the largest for which that is at most 5 %. Fewer than 6 values cannot
    reach 95 %: the interval is then the smallest and the largest (n = 5: 93.8 %).

    Returns:
        (low, high), in the values' unit.
    """
    values = sorted(values)
    count = len(values)
    outside = k = 0
    while 2 * (outside + comb(count, k)) <= (1 - CONFIDENCE) * 2**count:
        outside += comb(count, k)
        k += 1
    k = max(k, 1)
    return values[k - 1], values[count - k]


def interval(rounds):
    """:func:`median_interval` of all :class:`Rounds`, widened to hold the median of each visit.

    Returns:
        (low, high), in the values' unit.
    """
    ends, start = list(median_interval(rounds.values)), 0
    for count in rounds.visits:
        ends.append(median(rounds.values[start : start + count]))
        start += count
    return min(ends), max(ends)


def judge(ratio, threshold):
    """ "slower", "faster", "within noise" or "same"; swapping the runs swaps the first two."""
    if max(ratio.value, 1 / ratio.value) <= 1 + threshold:
        return "same"
    if ratio.low > 1:
        return "slower"
    return "faster" if ratio.high < 1 else "within noise"


def _ratio(a, b, above, below):
    """The :class:`Ratio` of the medians of ``above`` over ``below``, which are ``a`` and ``b`` in either order."""
    (low_above, high_above), (low_below, high_below) = interval(above), interval(below)
    middle = median(above.values) / median(below.values)
    return Ratio(median(a.values), median(b.values), middle, low_above / high_below, high_above / low_below)


def _index(entries, name):
    """Entries by group and provider; ``name`` of the run for errors."""
    found = {}
    for position, entry in enumerate(entries):
        missing = {"group", "provider"} - entry.keys()
        if missing:
            raise ValueError(f"run {name}: entry {position} has no {', '.join(sorted(missing))}")
        key = entry["group"], entry["provider"]
        if key in found:
            raise ValueError(f"run {name}: {key[0]}, {key[1]} is there twice")
        found[key] = entry
    return found


def _timed(run, name):
    found = _index([*run.rows, *run.processes], name)
    for (group, provider), row in found.items():
        if not row.get("times"):
            raise ValueError(f"run {name}: {group}, {provider} has no times of its rounds")
    return found


def _speedups(rows, name):
    """The rounds' ratios to the baseline, :class:`Rounds` by group and provider, for the rows that have them."""
    found = {}
    for (group, provider), row in rows.items():
        baseline = rows.get((group, BASELINE))
        # without a speed-up of its own, a row's rounds were not measured in turn with the baseline's
        if provider == BASELINE or baseline is None or row.get("speedup") is None:
            continue
        if len(row["times"]) != len(baseline["times"]):
            raise ValueError(
                f"run {name}: {group}, {provider} has {len(row['times'])} rounds, {BASELINE} {len(baseline['times'])}"
            )
        values = [base / own for base, own in zip(baseline["times"], row["times"], strict=True)]
        found[group, provider] = _rounds(row)._replace(values=values)
    return found


def _rounds(row):
    """The seconds of a row's rounds; files from before there were several visits, and processes, do not tell any."""
    return Rounds(row["times"], row.get("visits", []))


def _time_changes(by, threshold, times, speedups):
    """A change for each row that both runs timed."""
    judged = speedups if by == "speedup" else times
    changes = []
    for key, ratio in times.items():
        if key in judged:
            a, b, *rest = judged[key]
            changes.append(Change(judge(judged[key], threshold), *key, MEASURES[by], a, b, *rest))
        else:
            reason = "the baseline itself" if key[1] == BASELINE else "no rounds with the baseline in both runs"
            changes.append(Change("not judged", *key, "time", *ratio, reason))
    return changes


def _memory_changes(a, b):
    """A change for each memory number that moved by more than the tolerance or is there in one run only."""
    changes = []
    for key in a.keys() & b.keys():
        for field, what in MEMORY.items():
            before, after = a[key].get(field), b[key].get(field)
            if before is None and after is None:
                continue
            if before is None or after is None:
                changes.append(Change("new" if before is None else "gone", *key, what, before, after))
                continue
            ratio = after / before if before else (inf if after else 1.0)
            if ratio > 1 + MEMORY_TOLERANCE:
                changes.append(Change("more memory", *key, what, before, after, ratio))
            elif ratio < 1 / (1 + MEMORY_TOLERANCE):
                changes.append(Change("less memory", *key, what, before, after, ratio))
    return changes


def _fit_changes(a, b):
    """A change for each largest batch that both runs looked for."""
    changes = []
    for key in a.keys() & b.keys():
        before, after = a[key]["batch"], b[key]["batch"]
        ratio = before / after if after else (inf if before else 1.0)
        if a[key]["limit_bytes"] != b[key]["limit_bytes"]:
            sizes = " and ".join(f"{each['limit_bytes'] / 1e9:.3g} GB" for each in (a[key], b[key]))
            change = Change("not judged", *key, "largest batch", before, after, reason=f"limits of {sizes}")
        else:
            verdict = "fewer images" if after < before else "more images" if after > before else "same"
            change = Change(verdict, *key, "largest batch", before, after, ratio)
        changes.append(change)
    return changes


def _missing(a, b, left_out):
    """Changes for what only one run has; ``left_out`` gives B's reasons."""
    changes = [Change("new", *key, "row") for key in b.keys() - a.keys()]
    for key in a.keys() - b.keys():
        reason = left_out.get(key, "not in the run")
        changes.append(Change("failed" if reason.startswith("failed") else "gone", *key, "row", reason=reason))
    return changes


def _warnings(a, b):
    """Why the runs of two files are hard to compare."""
    found = []
    for condition in CONDITIONS:
        # no settings (an empty "malloc") are the same as a file from before they were noted
        before, after = a.environment.get(condition) or None, b.environment.get(condition) or None
        if before != after:
            found.append(f"{condition}: {before} in A, {after} in B")
    dtypes = [sorted({row.get("dtype", "?") for row in run.rows}) for run in (a, b)]
    if dtypes[0] != dtypes[1]:
        found.append(f"dtypes: {', '.join(dtypes[0])} in A, {', '.join(dtypes[1])} in B")
    for what, before, after in _limits(a.environment, b.environment):
        if max(before / after, after / before) > 1 + LIMITS_TOLERANCE:
            found.append(f"the machine's own {what}: B has {after / before:.2f} times A's")
    for name, run in (("A", a), ("B", b)):
        if not run.complete:
            found.append(f"run {name} was cut off: {run.finished} of {run.planned} planned rows")
    return found


def _limits(*environments):
    """(what, A's, B's) for each measured limit of both runs."""
    a, b = (environment.get("limits", {}) for environment in environments)
    if "bytes_per_s" in a and "bytes_per_s" in b:
        yield "copy bandwidth", a["bytes_per_s"], b["bytes_per_s"]
    for dtype, speed in a.get("flop_per_s", {}).items():
        if dtype in b.get("flop_per_s", {}):
            yield f"{dtype} products", speed, b["flop_per_s"][dtype]


def _severity(change):
    distance = 0.0 if change.ratio is None or change.ratio <= 0 else abs(log(change.ratio))
    return ORDER.index(change.verdict), -distance, change.group, change.provider, change.what


def compare(a, b, threshold=THRESHOLD, by="speedup"):
    """Compare two runs; the module's docstring says how.

    Args:
        a, b: :class:`run_file.RunFile`, the base and the new run; threshold: share by which a ratio may differ from 1;
            by: "speedup" or "time".

    Returns:
        a :class:`Comparison`.

    Raises:
        ValueError: a bad argument, a file without what is compared, no row in common, or times of different devices.
    """
    if by not in MEASURES:
        raise ValueError(f'by: expected "speedup" or "time", got {by!r}')
    if not (isfinite(threshold) and threshold >= 0):
        raise ValueError(f"threshold: expected a share of at least 0, as in 0.05, got {threshold}")
    devices = [run.environment.get("device") for run in (a, b)]
    if by == "time" and devices[0] != devices[1]:
        raise ValueError(
            f"by: times of different devices ({devices[0]}; {devices[1]}) say nothing about the code, compare speed-ups"
        )
    rows_a, rows_b = _timed(a, "A"), _timed(b, "B")
    fits_a, fits_b = _index(a.fits, "A"), _index(b.fits, "B")
    faster_a, faster_b = _speedups(rows_a, "A"), _speedups(rows_b, "B")
    rounds = {key: (_rounds(row), _rounds(rows_b[key])) for key, row in rows_a.items() if key in rows_b}
    times = {key: _ratio(before, after, after, before) for key, (before, after) in rounds.items()}
    faster = {key: (values, faster_b[key]) for key, values in faster_a.items() if key in faster_b}
    speedups = {key: _ratio(before, after, before, after) for key, (before, after) in faster.items()}
    reasons = {(each["group"], each["provider"]): each["reason"] for each in b.left_out}
    changes = _time_changes(by, threshold, times, speedups) + _memory_changes(rows_a, rows_b)
    changes += _fit_changes(fits_a, fits_b)
    changes += _missing(rows_a, rows_b, reasons) + _missing(fits_a, fits_b, reasons)
    if all(change.verdict in ("gone", "new") for change in changes):
        raise ValueError("the runs have no row in common")
    return Comparison(
        (a.environment, b.environment),
        by,
        threshold,
        _warnings(a, b),
        sorted(changes, key=_severity),
        {"time": times, "speedup": speedups},
    )


def main(argv=None):
    """Compare two files. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report.compare", description=__doc__.splitlines()[0])
    parser.add_argument("a", metavar="A.json", type=Path, help="rows.json of the base")
    parser.add_argument("b", metavar="B.json", type=Path, help="rows.json of the new run")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="share, by default %(default)s")
    parser.add_argument("--by", choices=tuple(MEASURES), default="speedup", help="by default %(default)s")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the same as data")
    parser.add_argument("--picture", type=Path, metavar="OUT.png", help="draw every row's ratio with its noise band")
    arguments = parser.parse_args(argv)
    from .compare_words import data, text

    try:
        runs = [run_file.read(path) for path in (arguments.a, arguments.b)]
        found = compare(*runs, arguments.threshold, arguments.by)
    except (OSError, ValueError) as failure:
        print(f"{parser.prog}: {failure}", file=sys.stderr)
        return 2
    print(text(found))
    try:
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(data(found), indent=1, allow_nan=False) + "\n")
        if arguments.picture is not None:
            from .compare_chart import draw

            draw(found, arguments.picture)
    except (ImportError, OSError, ValueError) as failure:
        print(f"{parser.prog}: {failure}", file=sys.stderr)
        return 2
    return 1 if found.regressions else 0


if __name__ == "__main__":
    raise SystemExit(main())

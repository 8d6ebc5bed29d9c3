"""Whether one run is slower than another: ``python -m benchmarks.report.compare A.json B.json``.

Rows are matched by group and provider. Every ratio is defined so that more than 1 means worse in B: the time of B over
that of A, or the speed-up of A over that of B. A row's speed-up is the median of its rounds' ratios to upstream eager
in the same group. On a shared machine only speed-ups can be compared between runs, so they decide unless ``--by time``
is given. The rows of upstream eager, and rows without it, have no speed-up: they are shown and not judged.

The noise band of a ratio comes from an interval for each of its two medians (:func:`interval`): the low end of one over
the high end of the other, and the other way round. A row is "slower" if its ratio is above 1 + threshold and the whole
band above 1, "faster" the other way round, "within noise" if its ratio is beyond the threshold and the band holds 1,
and "same" if its ratio is within the threshold.

The band covers the scatter of the rounds and the medians of the visits. It does not cover what holds for a whole run,
such as a busy neighbour or another clock speed; the threshold is for that. Run the same commit twice to see how large
it has to be on a machine.

Memory (more than 1 % more or less) and the largest batch that fits do not scatter and have no band. A row that A has
and B failed to measure is worse as well; a row that B left out for another reason is listed. Only changes for the worse
in this package's own rows are regressions. Runs on different devices are compared by speed-up, with a warning.

Exit code: 1 if there is a regression, else 0; 2 if there is nothing to compare.
"""

import argparse
import json
import sys
from math import comb, inf, isfinite
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from ..measure import run_file
from .frame import BASELINE, own, pd

CONFIDENCE, THRESHOLD, MEMORY_TOLERANCE, LIMITS_TOLERANCE = 0.95, 0.05, 0.01, 0.1
MEASURES = {"speedup": "speed-up", "time": "time"}
MEMORY = {"saved_bytes": "kept for backward", "peak_bytes": "peak memory"}
WORSE = ("failed", "slower", "more memory", "fewer images")
BETTER = ("faster", "less memory", "more images")
ORDER = (*WORSE, *BETTER, "within noise", "not judged", "gone", "new", "same")
"""Verdicts, in the order of the table."""

CONDITIONS = (
    *("device", "threads", "malloc", "driver", "torch", "compile_mode", "float32_matmul_precision", "quick", "visits"),
)
"""Parts of the environment that should be the same in both runs."""

KEY = ["group", "provider"]
COLUMNS = ["verdict", *KEY, "what", "a", "b", "ratio", "low", "high", "reason"]
HEAD = ("verdict", "row", "provider", "measure", "A", "B", "ratio (> 1: worse)", "noise band")
VERDICT_COLORS = {"slower": "#c5221f", "faster": "#188038", "within noise": "#e8a33d", "same": "#5f6368"}


class Comparison(NamedTuple):
    """Two runs side by side.

    Attributes:
        environments: of A and of B; by: "speedup" or "time"; threshold: share, as in 0.05.
        warnings: why the runs are hard to compare, in words.
        changes: frame of :data:`COLUMNS`, the worst first. ``what`` is "speed-up", "time", "kept for backward", "peak
            memory", "largest batch" or "row"; ``a`` and ``b`` are speed-ups, seconds, bytes of a call or images;
            ``ratio`` is infinite where A had 0 and NaN where there is none; ``low`` to ``high`` is the noise band.
        ratios: measure -> frame by group and provider with ``a``, ``b``, ``ratio``, ``low``, ``high``.
    """

    environments: tuple[dict, dict]
    by: str
    threshold: float
    warnings: list[str]
    changes: pd.DataFrame
    ratios: dict[str, pd.DataFrame]

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


def median_interval(values):
    """A 95 % confidence interval for the median, without an assumption about the distribution.

    Of n sorted values it is the k-th from below and the k-th from above. The median lies outside with probability
    2 * sum(C(n, i) for i < k) / 2**n, and k is the largest for which that is at most 5 %. Fewer than 6 values cannot
    reach 95 %: the interval is then the smallest and the largest (n = 5: 93.8 %).
    """
    values = sorted(values)
    count, outside, k = len(values), 0, 0
    while 2 * (outside + comb(count, k)) <= (1 - CONFIDENCE) * 2**count:
        outside += comb(count, k)
        k += 1
    k = max(k, 1)
    return values[k - 1], values[count - k]


def interval(values, visits):
    """:func:`median_interval` of all rounds, widened to hold the median of each visit.

    Args:
        values: a number a round; visits: how many of them are of each visit, in their order; empty if not known.
    """
    ends, start = list(median_interval(values)), 0
    for count in visits:
        ends.append(median(values[start : start + count]))
        start += count
    return min(ends), max(ends)


def judge(ratio, low, high, threshold):
    """ "slower", "faster", "within noise" or "same"; swapping the runs swaps the first two."""
    if max(ratio, 1 / ratio) <= 1 + threshold:
        return "same"
    return "slower" if low > 1 else "faster" if high < 1 else "within noise"


def _entries(entries, name):
    """Entries of a run by group and provider; ``name`` of the run for errors."""
    found = {}
    for position, entry in enumerate(entries):
        missing = set(KEY) - entry.keys()
        if missing:
            raise ValueError(f"run {name}: entry {position} has no {', '.join(sorted(missing))}")
        key = entry["group"], entry["provider"]
        if key in found:
            raise ValueError(f"run {name}: {key[0]}, {key[1]} is there twice")
        found[key] = entry
    return found


def _rounds(run, name):
    """The timed rows of a run, and for each measure (group, provider) -> (a number a round, visits)."""
    rows = _entries([*run.rows, *run.processes], name)
    times, speedups = {}, {}
    for (group, provider), row in rows.items():
        if not row.get("times"):
            raise ValueError(f"run {name}: {group}, {provider} has no times of its rounds")
        visits = row.get("visits", [])
        times[group, provider] = row["times"], visits
        baseline = rows.get((group, BASELINE))
        # a row without a speed-up was not measured in turn with the baseline
        if provider == BASELINE or baseline is None or row.get("speedup") is None:
            continue
        counts = len(row["times"]), len(baseline["times"])
        if counts[0] != counts[1]:
            raise ValueError(f"run {name}: {group}, {provider} has {counts[0]} rounds, {BASELINE} {counts[1]}")
        ratios = [base / own for base, own in zip(baseline["times"], row["times"], strict=True)]
        speedups[group, provider] = ratios, visits
    return rows, {"time": times, "speedup": speedups}


def _ratios(a, b, measure):
    """The frame of ratios of the rows that both runs have; more than 1 is worse in B."""
    found = []
    for key in (key for key in a if key in b):
        above, below = (b[key], a[key]) if measure == "time" else (a[key], b[key])
        (low_above, high_above), (low_below, high_below) = interval(*above), interval(*below)
        ratio = median(above[0]) / median(below[0])
        band = low_above / high_below, high_above / low_below
        found.append((*key, median(a[key][0]), median(b[key][0]), ratio, *band))
    return pd.DataFrame(found, columns=[*KEY, "a", "b", "ratio", "low", "high"]).set_index(KEY)


def _time_changes(by, threshold, ratios):
    """A change for each row that both runs timed."""
    judged = ratios[by]
    for row in ratios["time"].itertuples():
        if row.Index in judged.index:
            found = judged.loc[row.Index]
            verdict = judge(found["ratio"], found["low"], found["high"], threshold)
            yield verdict, *row.Index, MEASURES[by], *found, ""
        else:
            reason = "the baseline itself" if row.Index[1] == BASELINE else "no rounds with the baseline in both runs"
            yield "not judged", *row.Index, "time", *row[1:], reason


def _memory_changes(a, b):
    """A change for each memory number that moved by more than the tolerance or is in one run only."""
    for key in a.keys() & b.keys():
        for field, what in MEMORY.items():
            before, after = a[key].get(field), b[key].get(field)
            if (before is None) != (after is None):
                yield "new" if before is None else "gone", *key, what, before, after, None, None, None, ""
            elif before is not None:
                ratio = after / before if before else inf if after else 1.0
                if ratio > 1 + MEMORY_TOLERANCE or ratio < 1 / (1 + MEMORY_TOLERANCE):
                    verdict = "more memory" if ratio > 1 else "less memory"
                    yield verdict, *key, what, before, after, ratio, None, None, ""


def _fit_changes(a, b):
    """A change for each largest batch that both runs looked for."""
    for key in a.keys() & b.keys():
        before, after = a[key]["batch"], b[key]["batch"]
        if a[key]["limit_bytes"] != b[key]["limit_bytes"]:
            yield "not judged", *key, "largest batch", before, after, None, None, None, "the limits differ"
            continue
        ratio = before / after if after else inf if before else 1.0
        verdict = "fewer images" if after < before else "more images" if after > before else "same"
        yield verdict, *key, "largest batch", before, after, ratio, None, None, ""


def _missing(a, b, left_out):
    """Changes for what only one run has; ``left_out``: B's reasons."""
    nothing = [None] * 5
    for key in b.keys() - a.keys():
        yield "new", *key, "row", *nothing, ""
    for key in a.keys() - b.keys():
        reason = left_out.get(key, "not in the run")
        yield "failed" if reason.startswith("failed") else "gone", *key, "row", *nothing, reason


def _warnings(a, b):
    """Why the runs of two files are hard to compare."""
    for condition in CONDITIONS:
        # files from before a setting was noted have none, which is the same as no settings (an empty "malloc")
        before, after = (run.environment.get(condition) or None for run in (a, b))
        if before != after:
            yield f"{condition}: {before} in A, {after} in B"
    dtypes = [", ".join(sorted({row.get("dtype", "?") for row in run.rows})) for run in (a, b)]
    if dtypes[0] != dtypes[1]:
        yield f"dtypes: {dtypes[0]} in A, {dtypes[1]} in B"
    limits = [run.environment.get("limits", {}) for run in (a, b)]
    speeds = [{"copy bandwidth": each["bytes_per_s"]} if "bytes_per_s" in each else {} for each in limits]
    for found, each in zip(speeds, limits, strict=True):
        found |= {f"{dtype} products": speed for dtype, speed in each.get("flop_per_s", {}).items()}
    for what in (what for what in speeds[0] if what in speeds[1]):
        ratio = speeds[1][what] / speeds[0][what]
        if max(ratio, 1 / ratio) > 1 + LIMITS_TOLERANCE:
            yield f"the machine's own {what}: B has {ratio:.2f} times A's"
    for name, run in (("A", a), ("B", b)):
        if not run.complete:
            yield f"run {name} was cut off: {run.finished} of {run.planned} planned rows"


def _sorted(changes):
    """The frame of changes, the worst first."""
    found = pd.DataFrame(changes, columns=COLUMNS)
    ratio = found["ratio"].astype(float)
    place = found["verdict"].map(ORDER.index)
    found = found.assign(place=place, distance=-np.log(ratio.where(ratio > 0, 1)).abs())
    return found.sort_values(["place", "distance", *KEY, "what"]).reset_index(drop=True)[COLUMNS]


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
        names = "; ".join(map(str, devices))
        raise ValueError(f"by: times of different devices ({names}) say nothing about the code, compare speed-ups")
    (rows_a, rounds_a), (rows_b, rounds_b) = _rounds(a, "A"), _rounds(b, "B")
    fits_a, fits_b = _entries(a.fits, "A"), _entries(b.fits, "B")
    ratios = {measure: _ratios(rounds_a[measure], rounds_b[measure], measure) for measure in ("time", "speedup")}
    reasons = {(each["group"], each["provider"]): each["reason"] for each in b.left_out}
    changes = [*_time_changes(by, threshold, ratios), *_memory_changes(rows_a, rows_b), *_fit_changes(fits_a, fits_b)]
    changes += [*_missing(rows_a, rows_b, reasons), *_missing(fits_a, fits_b, reasons)]
    if all(verdict in ("gone", "new") for verdict, *_ in changes):
        raise ValueError("the runs have no row in common")
    environments = a.environment, b.environment
    return Comparison(environments, by, threshold, list(_warnings(a, b)), _sorted(changes), ratios)


def _value(what, value):
    if value is None or pd.isna(value):
        return ""
    if what == "time":
        return f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.3g} s"
    words = {"speed-up": f"{value:.2f}x", "largest batch": f"{value:.0f}"}
    return words.get(what, f"{value / 1e6:.2f} MB")


def _cells(change, others):
    """A line of the table; ``others``: ratios by the measure that is not judged by."""
    other = change.what in MEASURES.values() and change.verdict != "not judged" and (change[2:4] in others.index)
    ratio, low, high = ("" if pd.isna(each) else f"{each:.3f}" for each in (change.ratio, change.low, change.high))
    values = [_value(change.what, each) for each in (change.a, change.b)]
    beside = f"{others.loc[change[2:4], 'ratio']:.3f}" if other else ""
    return [*change[1:5], *values, ratio, low and f"{low} to {high}", beside, change.reason]


def _aligned(lines):
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def summary(comparison):
    """Counts of verdicts, and how many rows were the same by either measure; one line."""
    counts, regressions = comparison.changes["verdict"].value_counts(), len(comparison.regressions)
    words = [f"{counts[verdict]} {verdict}" for verdict in ORDER if verdict in counts]
    words.append(f"{regressions or 'no'} regression{'s' * (regressions != 1)} of t2t_fast")
    shares, drift = [], comparison.drift
    for measure, name in MEASURES.items():
        same, total = comparison.repeated(measure)
        shares.append(f"{name}s of {same} of {total} rows ({same / total:.0%})" if total else f"no {name}s")
    if drift is not None:
        same, total = comparison.repeated("time", drift)
        shares.append(f"and of {same} ({same / total:.0%}) without the machine's drift, {drift:.3f} by upstream's rows")
    return f"{', '.join(words)}; within {comparison.threshold:.3g} of each other: {', '.join(shares)}"


def text(comparison):
    """The comparison as plain text: warnings, a table with the worst first, a last line with counts.

    Rows that are the same are only counted.
    """
    known = ("date", "device", "t2t_fast", "torch")
    lines = [
        "{}  {}, {}; t2t_fast {}, torch {}".format(name, *(environment.get(key, "?") for key in known))
        for name, environment in zip("AB", comparison.environments, strict=True)
    ]
    lines += [f"warning: {warning}" for warning in comparison.warnings]
    one_sided = comparison.changes["verdict"].isin(("gone", "new"))
    shown = comparison.changes[~one_sided & (comparison.changes["verdict"] != "same")]
    if len(shown):
        other, heading = ("time", "time B/A") if comparison.by == "speedup" else ("speedup", "speed-up A/B")
        cells = [_cells(change, comparison.ratios[other]) for change in shown.itertuples()]
        lines += ["", *_aligned([[*HEAD, heading, ""], *cells])]
    if one_sided.any():
        groups = comparison.changes[one_sided].groupby(["verdict", "group", "what", "reason"], sort=False)["provider"]
        cells = [(key[0], key[1], ", ".join(names), key[2].replace("row", ""), key[3]) for key, names in groups]
        lines += ["", *_aligned(cells)]
    return "\n".join([*lines, "", summary(comparison)])


def data(comparison):
    """The comparison as plain data for JSON. Ratios that are infinite are ``None``."""
    measures = {}
    for measure, found in comparison.ratios.items():
        same, total = comparison.repeated(measure)
        rows = found.rename(columns={"ratio": "value"}).reset_index().to_dict("records")
        measures[measure] = {"within_threshold": same, "of": total, "rows": rows}
    if (drift := comparison.drift) is not None:
        measures["time"] |= {"drift": drift, "within_threshold_without_drift": comparison.repeated("time", drift)[0]}
    return {
        "environments": dict(zip("ab", comparison.environments, strict=True)),
        "by": comparison.by,
        "threshold": comparison.threshold,
        "warnings": comparison.warnings,
        "regressions": len(comparison.regressions),
        "changes": json.loads(comparison.changes.replace([inf], np.nan).to_json(orient="records", double_precision=15)),
        **measures,
    }


def draw(comparison, path):
    """Draw the ratio of every judged row with its noise band into a PNG, the worst on top.

    Raises:
        ValueError: there is no such row.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    rows = comparison.changes.dropna(subset="low")
    rows = rows[rows["verdict"].isin(VERDICT_COLORS)].sort_values("ratio", ascending=False).reset_index(drop=True)
    if rows.empty:
        raise ValueError("no row was judged by time or speed-up, nothing to draw")
    figure = Figure(figsize=(13, 2.4 + 0.24 * len(rows)), layout="constrained")
    axis = figure.subplots()
    axis.axvspan(1 / (1 + comparison.threshold), 1 + comparison.threshold, color="#e8eaed", zorder=0)
    axis.axvline(1, color="black", linewidth=0.8, zorder=1)
    for verdict, color in VERDICT_COLORS.items():
        members = rows[rows["verdict"] == verdict]
        if len(members):
            reach = [members["ratio"] - members["low"], members["high"] - members["ratio"]]
            style = dict(fmt="o", color=color, markersize=5, linewidth=1.6, label=f"{verdict} ({len(members)})")
            axis.errorbar(members["ratio"], members.index, xerr=reach, **style)
        if verdict in ("slower", "faster"):
            for row in members.itertuples():
                place = dict(xytext=(0, 5), textcoords="offset points", ha="center", fontsize=8)
                axis.annotate(f"{row.ratio:.2f}", (row.ratio, row.Index), **place)
    # the range follows the ratios, since a few wide bands would squeeze all others
    low, high = min(0.8, rows["ratio"].min() / 1.3), max(1.25, rows["ratio"].max() * 1.3)
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    ticks = (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlim(low, high)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_yticks(rows.index, rows["group"] + "  " + rows["provider"], fontsize=9)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", linewidth=0.4)
    axis.spines[["top", "right", "left"]].set_visible(False)
    measure = "speed-up over upstream eager, A / B" if comparison.by == "speedup" else "time, B / A"
    axis.set_xlabel(f"{measure} (more than 1: slower in B); bars: noise band, cut at the edges; grey: threshold")
    figure.legend(loc="outside upper right", ncols=len(VERDICT_COLORS), fontsize=9, frameon=False)
    runs = [
        f"{name}: {each.get('date', '?')[:10]}, {each.get('device', '?')}; t2t_fast {each.get('t2t_fast', '?')}"
        for name, each in zip("AB", comparison.environments, strict=True)
    ]
    figure.suptitle("\n".join(runs), fontsize=9, x=0.01, ha="left")
    figure.savefig(path, dpi=110)


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
    try:
        runs = [run_file.read(path) for path in (arguments.a, arguments.b)]
        found = compare(*runs, arguments.threshold, arguments.by)
        print(text(found))
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(data(found), indent=1, allow_nan=False) + "\n")
        if arguments.picture is not None:
            draw(found, arguments.picture)
    except (ImportError, OSError, ValueError) as failure:
        print(f"{parser.prog}: {failure}", file=sys.stderr)
        return 2
    return 1 if len(found.regressions) else 0


if __name__ == "__main__":
    raise SystemExit(main())

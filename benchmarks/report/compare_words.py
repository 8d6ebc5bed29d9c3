"""A comparison of two runs in words and as plain data."""

from collections import Counter
from math import inf

from .compare import MEASURES, ORDER

COLUMNS = ("verdict", "row", "provider", "measure", "A", "B", "ratio (> 1: worse)", "noise band")
OTHER = {"speedup": ("time", "time B/A"), "time": ("speedup", "speed-up A/B")}
"""The measure that is not judged by, and the heading of its ratio."""


def _value(what, value):
    if value is None:
        return ""
    if what == "speed-up":
        return f"{value:.2f}x"
    if what == "time":
        return f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.3g} s"
    return f"{value:.0f}" if what == "largest batch" else f"{value / 1e6:.2f} MB"


def _cells(change, others):
    other = others.get((change.group, change.provider)) if change.what in MEASURES.values() else None
    return (
        change.verdict,
        change.group,
        change.provider,
        change.what,
        _value(change.what, change.a),
        _value(change.what, change.b),
        "" if change.ratio is None else f"{change.ratio:.3f}",
        "" if change.low is None else f"{change.low:.3f} to {change.high:.3f}",
        "" if other is None or change.verdict == "not judged" else f"{other.value:.3f}",
        change.reason,
    )


def _aligned(lines):
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def _one_sided(changes):
    """A line for each group with rows that one run lacks: verdict, group, providers, reason."""
    providers = {}
    for change in changes:
        what = "" if change.what == "row" else change.what
        providers.setdefault((change.verdict, change.group, what, change.reason), []).append(change.provider)
    return [
        (verdict, group, ", ".join(names), what, reason) for (verdict, group, what, reason), names in providers.items()
    ]


def _run(environment):
    known = [environment.get(key, "?") for key in ("date", "device", "t2t_fast", "torch")]
    return "{}, {}; t2t_fast {}, torch {}".format(*known)


def summary(comparison):
    """Counts of verdicts, and how many rows were the same by either measure; one line."""
    counts = Counter(change.verdict for change in comparison.changes)
    words = [f"{counts[verdict]} {verdict}" for verdict in ORDER if counts[verdict]]
    shares = []
    for measure, word in MEASURES.items():
        same, total = comparison.repeated(measure)
        shares.append(f"{word}s of {same} of {total} rows ({same / total:.0%})" if total else f"no {word}s")
    words.append(
        f"{len(comparison.regressions) or 'no'} regression{'s' if len(comparison.regressions) != 1 else ''} of t2t_fast"
    )
    drift = comparison.drift
    if drift is not None:
        same, total = comparison.repeated("time", drift)
        shares.append(f"and of {same} ({same / total:.0%}) without the machine's drift, {drift:.3f} by upstream's rows")
    return f"{', '.join(words)}; within {comparison.threshold:.3g} of each other: {', '.join(shares)}"


def text(comparison):
    """The comparison as plain text: warnings, a table with the worst first, a last line with counts.

    Rows that are the same are counted only.
    """
    lines = [f"{name}  {_run(env)}" for name, env in zip("AB", comparison.environments, strict=True)]
    lines += [f"warning: {warning}" for warning in comparison.warnings]
    one_sided = [change for change in comparison.changes if change.verdict in ("gone", "new")]
    told = [change for change in comparison.changes if change.verdict not in ("gone", "new", "same")]
    if told:
        other, heading = OTHER[comparison.by]
        cells = [_cells(change, comparison.ratios[other]) for change in told]
        lines += ["", *_aligned([(*COLUMNS, heading, ""), *cells])]
    if one_sided:
        lines += ["", *_aligned(_one_sided(one_sided))]
    return "\n".join([*lines, "", summary(comparison)])


def data(comparison):
    """The comparison as plain data for JSON. Ratios that are infinite are ``None``."""
    changes = [change._asdict() for change in comparison.changes]
    for change in changes:
        if change["ratio"] == inf:
            change["ratio"] = None
    measures = {}
    for measure, found in comparison.ratios.items():
        same, total = comparison.repeated(measure)
        rows = [{"group": group, "provider": name, **ratio._asdict()} for (group, name), ratio in found.items()]
        measures[measure] = {"within_threshold": same, "of": total, "rows": rows}
    if comparison.drift is not None:
        measures["time"] |= {"drift": comparison.drift}
        measures["time"]["within_threshold_without_drift"] = comparison.repeated("time", comparison.drift)[0]
    return {
        "environments": dict(zip("ab", comparison.environments, strict=True)),
        "by": comparison.by,
        "threshold": comparison.threshold,
        "warnings": comparison.warnings,
        "regressions": len(comparison.regressions),
        "changes": changes,
        **measures,
    }

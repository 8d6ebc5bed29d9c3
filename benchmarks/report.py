"""Table and chart of a run, from its JSON alone: ``python -m benchmarks.report rows.json --out DIR``."""

import argparse
import json
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from . import crossover
from .chart import draw
from .goals import judge
from .groups import BATCHES, HEADLINE_LENGTH

TITLES = {"module": "T2T modules", "model": "Whole models", "op": "Operators"}
COLUMNS = (
    "case",
    "provider",
    "ms (20 % – 80 %)",
    "× upstream (20 % – 80 %)",
    "images/s",
    "GB/s",
    "% of copy",
    "TFLOP/s",
    "× floor",
    "saved MB/img",
    "peak MB/img",
    "first call s",
    "error",
)
NOTES = """\
Rows of a case were measured interleaved, round by round; a speed-up is the median of the rounds' ratios to upstream
eager. "× floor" is the time over the least that a fused implementation could take with this machine's own copy
bandwidth and dense products, GB/s and TFLOP/s are that implementation's bytes and FLOPs over the measured time (so
they say how close a row is to it, not what it moved); "% of copy" is these GB/s over those of a copy. Saved: bytes
kept for backward, inputs included; peak: most bytes that a call allocates at a time; neither with the parameters. First
call: compilation and autotuning, or an eager first call. Error: relative, against float64, output and worst gradient.
† computes another function: a yardstick, no replacement."""
"""Explains the columns."""


def read(path):
    """(environment, rows, left out) of a normalised file, or of the raw pytest-benchmark file of these suites."""
    content = json.loads(Path(path).read_text())
    if "benchmarks" not in content:
        return content["environment"], content["rows"], content["left_out"]
    found = [
        {**benchmark["extra_info"]["row"], "times": benchmark["stats"]["data"]} for benchmark in content["benchmarks"]
    ]
    return content["machine_info"]["t2t_fast"], found, []


class Case(NamedTuple):
    """A group's rows."""

    title: str
    rows: list


def cases(found):
    """Rows by group, in their order."""
    return [
        Case(title(group[0]), group)
        for group in (list(members) for _, members in groupby(found, key=lambda row: row["group"]))
    ]


def title(row):
    """A group in words."""
    subject = row["subject"].replace("-stage", ", stage ").replace("-L", ", L = ").replace("-", ", ")
    if row["level"] == "module":
        subject = f"T2T module, {subject.capitalize()}"
    size = "" if row["size"] is None else f"{row['size']} px, "
    return f"{subject}, {size}batch {row['batch']}, {row['dtype']}, {row['mode']}"


def number(value, digits=3):
    """Three significant digits without an exponent."""
    if value is None:
        return ""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def spread(summary, factor=1.0):
    """median (p20 – p80)."""
    if summary is None:
        return ""
    middle, low, high = (number(factor * summary[key]) for key in ("median", "p20", "p80"))
    return f"{middle} ({low} – {high})"


def _memory(row, key):
    return number(None if row[key] is None else row[key] / row["batch"] / 1e6)


def _percent(share):
    return number(None if share is None else 100 * share)


def _error(row):
    if row["error"] is None:
        return "within dropout's noise"
    gradient = "" if row["gradient_error"] is None else f" / {row['gradient_error']:.0e}"
    return f"{row['error']:.0e}{gradient}"


def _cells(row):
    return (
        row["label"] + (" †" if row["another_function"] else ""),
        spread(row["seconds"], 1e3),
        "1" if row["provider"] == "upstream" else spread(row["speedup"]),
        number(row["images_per_s"]),
        number(row["gb_per_s"]),
        _percent(row.get("copy_share")),  # runs from before this column have none
        number(row["tflop_per_s"]),
        number(row["times_floor"]),
        _memory(row, "saved_bytes"),
        _memory(row, "peak_bytes"),
        number(row["first_call_s"]),
        _error(row),
    )


def _line(cells):
    return "| " + " | ".join(cells) + " |"


def _heading(environment):
    limits = environment["limits"]
    products = ", ".join(f"{name} {speed / 1e12:.2f} TFLOP/s" for name, speed in limits["flop_per_s"].items())
    where = environment["device"]
    if environment.get("driver"):
        where += f", driver {environment['driver']}"
    return (
        f"{environment['date'][:10]}, {where}; t2t_fast {environment['t2t_fast']}, torch {environment['torch']}, "
        f'Python {environment["Python"]}; torch.compile mode "{environment["compile_mode"]}"; '
        f"measured limits: copy {limits['bytes_per_s'] / 1e9:.1f} GB/s, {products}."
    )


def table(environment, found, left_out):
    """The whole report as markdown."""
    lines = [_heading(environment), ""]
    goals = judge(found)
    if goals:
        lines += ["### Goals", "", _line(("goal", "wanted", "measured", "")), _line(["---"] * 4)]
        lines += [_line((g.what, g.wanted, g.measured, g.verdict)) for g in goals]
        lines.append("")
    for level, heading in TITLES.items():
        members = [row for row in found if row["level"] == level]
        if not members:
            continue
        drawn = crossover.curves(members)
        if drawn:
            lines += ["### Performer attention by the number of tokens", ""]
            lines += [f"- {sentence}" for sentence in crossover.sentences(drawn)]
            lines += ["", f"![Time and memory a token against the number of tokens]({crossover.PICTURE})", ""]
        lines += [f"### {heading}", "", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
        for case in cases(members):
            name = case.title + amdahl(case.rows)
            for row in case.rows:
                lines.append(_line((name, *_cells(row))))
                name = ""
        lines.append("")
    lines += [NOTES, ""]
    if left_out:
        lines += ["Without numbers:", ""]
        lines += [*_without_numbers(left_out), ""]
    return "\n".join(lines)


def _without_numbers(left_out):
    """A line for each provider and reason, with its groups or, of more than three, their number."""
    groups = {}
    for each in left_out:
        groups.setdefault((each["provider"], each["reason"]), []).append(each["group"])
    return [
        f"- {', '.join(names) if len(names) <= 3 else f'{len(names)} cases'}, {provider}: {reason}"
        for (provider, reason), names in groups.items()
    ]


def amdahl(members):
    """What replacing the front end alone can bring to a model, or nothing."""
    for row in members:
        if row["amdahl_limit"]:
            share = 100 * row["front_end_share"]
            return f"; front end {share:.0f} % of upstream's time, Amdahl's limit {row['amdahl_limit']:.2f}×"
    return ""


def headline(found):
    """The rows for the chart: 224 px, or the number of tokens at 224 px, and, but for operators, the headline batch;
    all if there are none."""
    batches = {sizes[0] for sizes in BATCHES.values()}
    sized = [row for row in found if row["size"] == 224 or row["subject"].endswith(f"-L{HEADLINE_LENGTH}")]
    return [row for row in sized if row["level"] == "op" or row["batch"] in batches] or found


def write(source, folder):
    """Write ``table.md`` and the charts for which a JSON file has rows into a folder: ``chart.png``,
    ``chart-operators.png`` and ``crossover.png``.

    Returns:
        the paths written.
    """
    environment, found, left_out = read(source)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "table.md"]
    written[0].write_text(table(environment, found, left_out))
    for name, levels in (("chart.png", ("module", "model")), ("chart-operators.png", ("op",))):
        drawn = cases(headline([row for row in found if row["level"] in levels]))
        if drawn:
            written.append(draw(drawn, _heading(environment), folder / name))
    curves = crossover.curves(found)
    if curves:
        written.append(crossover.draw(curves, _heading(environment), folder))
    return written


def main(argv=None):
    """The report of one JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("json", type=Path, help="rows.json or the raw pytest-benchmark JSON")
    parser.add_argument("--out", type=Path, help="folder for the report; by default that of the JSON")
    arguments = parser.parse_args(argv)
    for path in write(arguments.json, arguments.out or arguments.json.parent):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

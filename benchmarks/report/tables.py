"""A run as tables: markdown with every row, and CSV files with flat columns that stay the same from run to run."""

import csv

from . import crossover
from .cases import SUITES, cases, floor_share, lost, of, suite
from .goals import judge
from .words import (
    NOTES,
    amdahl,
    error,
    heading,
    label,
    megabytes_per_image,
    number,
    percent,
    spread,
    without_numbers,
)

COLUMNS = (
    "case",
    "provider",
    "ms (20 % – 80 %)",
    "× upstream (20 % – 80 %)",
    "images/s",
    "GB/s",
    "% of copy",
    "TFLOP/s",
    "% of floor",
    "saved MB/img",
    "peak MB/img",
    "first call s",
    "error",
)

_ENTRY = ("group", "level", "subject", "size", "batch", "dtype", "mode", "provider", "label", "another_function")
ROWS = (
    "suite",
    *_ENTRY,
    "backends",
    "median_s",
    "p20_s",
    "p80_s",
    "p95_s",
    "visits",
    "rounds",
    "speedup_median",
    "speedup_p20",
    "speedup_p80",
    "images_per_s",
    "gb_per_s",
    "tflop_per_s",
    "copy_share",
    "floor_s",
    "floor_share",
    "saved_bytes",
    "peak_bytes",
    "first_call_s",
    "warm_up_s",
    "error",
    "gradient_error",
    "amdahl_limit",
)
FITS = ("suite", *_ENTRY, "limit_bytes", "used_bytes", "over_bytes")
PROCESSES = ("suite", *_ENTRY, "processes", "threads", "median_s", "p20_s", "p80_s", "rounds", "images_per_s")


def _cells(row):
    return (
        label(row),
        spread(row["seconds"], 1e3),
        "1" if row["provider"] == "upstream" else spread(row["speedup"]) + (" ▼" if lost(row) else ""),
        number(row["images_per_s"]),
        number(row["gb_per_s"]),
        percent(row.get("copy_share")),  # runs from before this column have none
        number(row["tflop_per_s"]),
        percent(floor_share(row)),
        number(megabytes_per_image(row, "saved_bytes")),
        number(megabytes_per_image(row, "peak_bytes")),
        number(row["first_call_s"]),
        error(row),
    )


def _line(cells):
    return "| " + " | ".join(cells) + " |"


def _head(cells):
    return [_line(cells), _line(["---"] * len(cells))]


def _suite(name, members):
    lines = [f"### {SUITES[name]}", "", *_head(COLUMNS)]
    for case in cases(members):
        words = "; ".join(part for part in (case.title, amdahl(case.rows)) if part)
        for row in case.rows:
            lines.append(_line((words, *_cells(row))))
            words = ""
    return [*lines, ""]


def _fits(fits):
    lines = ["### Largest batch whose training step fits", "", *_head(("case", "provider", "images", "used", "limit"))]
    for each in fits:
        what = f"{each['subject']}, {each['size']} px, {each['dtype']}"
        used = "" if each["used_bytes"] is None else f"{each['used_bytes'] / 1e9:.2f} GB"
        lines.append(_line((what, label(each), str(each["batch"]), used, f"{each['limit_bytes'] / 1e9:.2f} GB")))
    return [*lines, ""]


def _processes(entries):
    columns = ("case", "provider", "processes", "threads each", "ms a step (20 % – 80 %)", "images/s of all")
    lines = ["### Training by several processes", "", *_head(columns)]
    for each in entries:
        what = f"{each['subject']}, {each['size']} px, batch {each['batch']} each, {each['dtype']}"
        counts = str(each["processes"]), str(each["threads"])
        cells = (*counts, spread(each["seconds"], 1e3), number(each["images_per_s"]))
        lines.append(_line((what, each["label"], *cells)))
    return [*lines, ""]


def table(environment, found, left_out, fits=(), processes=()):
    """The whole report as markdown."""
    lines = [heading(environment), ""]
    goals = judge(found)
    if goals:
        lines += ["### Goals", "", *_head(("goal", "wanted", "measured", ""))]
        lines += [*(_line((g.what, g.wanted, g.measured, g.verdict)) for g in goals), ""]
    for name in SUITES:
        members = of(found, name)
        drawn = crossover.curves(members)
        if drawn:
            lines += ["### Performer attention by the number of tokens", ""]
            lines += [f"- {sentence}" for sentence in crossover.sentences(drawn)]
            lines += ["", f"![Time and memory a token against the number of tokens]({crossover.PICTURE})", ""]
        if members:
            lines += _suite(name, members)
    if fits:
        lines += _fits(fits)
    if processes:
        lines += _processes(processes)
    lines += [NOTES, ""]
    if left_out:
        lines += ["Without numbers:", ""]
        lines += [*(f"- {groups}, {provider}: {reason}" for groups, provider, reason in without_numbers(left_out)), ""]
    return "\n".join(lines)


def flat(row):
    """A timed row as one level of plain values: :data:`ROWS` are the columns, seconds in seconds, memory in bytes."""
    speedup = row["speedup"] or {}
    backends = row.get("backends")
    return {
        **row,
        "suite": suite(row),
        "backends": None if backends is None else "; ".join(f"{op}={name}" for op, name in backends.items()),
        **_seconds(row),
        "visits": len(row.get("visits", [])) or 1,
        **{f"speedup_{key}": speedup.get(key) for key in ("median", "p20", "p80")},
        "floor_share": floor_share(row),
    }


def _seconds(entry):
    found = {f"{key}_s": entry["seconds"][key] for key in ("median", "p20", "p80")}
    return {**found, "rounds": len(entry["times"])}


def write_csv(path, columns, entries):
    """One line an entry; an empty field where an entry has none. Returns the path."""
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(entries)
    return path


def write(run, folder):
    """Write ``table.md``, ``rows.csv`` and, where the run has such entries, ``fits.csv`` and ``processes.csv``.

    Returns:
        the paths written.
    """
    text = table(run.environment, run.rows, run.left_out, run.fits, run.processes)
    (folder / "table.md").write_text(text, encoding="utf-8")
    written = [folder / "table.md", write_csv(folder / "rows.csv", ROWS, [flat(row) for row in run.rows])]
    if run.fits:
        written.append(write_csv(folder / "fits.csv", FITS, run.fits))
    if run.processes:
        entries = [{"suite": "processes", **each, **_seconds(each)} for each in run.processes]
        written.append(write_csv(folder / "processes.csv", PROCESSES, entries))
    return written

"""The README's numbers from committed runs: ``python -m benchmarks.report.readme [--check] [--readme README.md]``.

Replaces what stands between ``<!-- numbers: FOLDER[, FOLDER...] -->`` and ``<!-- /numbers -->`` with text made from the
folders' ``rows.json``; the folders are named relative to the README's own. A case that several folders measured is told
from the first. Runs of different devices are told apart, and no ratio is taken across two runs.
"""

import argparse
import difflib
import re
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

from ..measure import run_file
from ..suites.groups import LITE
from .cases import BASELINE, OURS, ours
from .goals import judge
from .words import number

WIDTH = 120
MARKED = re.compile(r"(?<=^<!-- numbers: )(?P<folders>[^\n]*) -->\n(?P<text>.*?)(?=^<!-- /numbers -->$)", re.M | re.S)
HOW = "benchmarks/results/README.md"
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
MODULE_COLUMNS = {
    "upstream": "upstream",
    "upstream-compiled": "upstream, `torch.compile`",
    "t2t_fast": "t2t_fast",
    "t2t_fast-compiled": "t2t_fast, `torch.compile`",
}
LATENCY_COLUMNS = {
    **MODULE_COLUMNS,
    "upstream-graph": "upstream, CUDA graph",
    "t2t_fast-graph": "t2t_fast, CUDA graph",
}
EMPTY = "–"
FLOOR = "Floor: the least time that a fused implementation could take by the machine's own copies and products."


class Folder(NamedTuple):
    """A folder of results: as the README names it, where it is, and its run."""

    name: str
    path: Path
    run: run_file.RunFile


class Machine(NamedTuple):
    """All that was measured on one device; of a group only the first folder's rows."""

    folders: list[Folder]
    rows: list[dict]
    fits: list[dict]


def _first(folders, entries):
    """Entries of the folders, each group from the first folder that has it."""
    owner, found = {}, []
    for folder in folders:
        for entry in entries(folder.run):
            if owner.setdefault(entry["group"], folder.name) == folder.name:
                found.append(entry)
    return found


def machines(folders):
    """A :class:`Machine` for each device, in the folders' order."""
    by_device = {}
    for folder in folders:
        by_device.setdefault(folder.run.environment["device"], []).append(folder)
    return [
        Machine(members, _first(members, lambda run: run.rows), _first(members, lambda run: run.fits))
        for members in by_device.values()
    ]


def _paragraph(text):
    """Wrapped, code in one piece."""
    kept = re.sub(r"`[^`]*`", lambda code: code[0].replace(" ", "\0"), text)
    return textwrap.fill(kept, WIDTH, break_long_words=False, break_on_hyphens=False).replace("\0", " ")


def _table(head, lines):
    first, *rest = ("| " + " | ".join(cells) + " |" for cells in (head, *lines))
    return "\n".join([first, "|" + "---|" * len(head), *rest])


def _seconds(seconds):
    return f"{number(seconds)} s" if seconds >= 1 else f"{number(1e3 * seconds)} ms"


def _time(row):
    return _seconds(row["seconds"]["median"])


def _times(value):
    return f"{value:.2f}×"


def _speedup(row):
    """Median (20th – 80th percentile)."""
    found = row["speedup"]
    return EMPTY if found is None else f"{_times(found['median'])} ({found['p20']:.2f} – {found['p80']:.2f})"


def _floor(row):
    share = row.get("floor_share")
    share = 1 / row["times_floor"] if share is None and row.get("times_floor") else share
    return EMPTY if share is None else f"{100 * share:.0f} %"


def _of(rows, prefix):
    """Rows whose group begins so, in the first of their dtypes, the headline's."""
    members = [row for row in rows if row["group"].startswith(f"{prefix}-")]
    return [row for row in members if row["dtype"] == members[0]["dtype"]]


def _cases(rows):
    """(subject, size, batch) -> {(mode, provider): row}, in the rows' order."""
    found = {}
    for row in rows:
        found.setdefault((row["subject"], row["size"], row["batch"]), {})[row["mode"], row["provider"]] = row
    return found


def _models(rows):
    """Whole models, the lite ones first."""
    rows = _of(rows, "model")
    cases = sorted(_cases(rows).items(), key=lambda case: LITE.index(case[0][0]) if case[0][0] in LITE else len(LITE))
    lines = []
    for (subject, size, batch), case in cases:
        cells, limits = [f"`{subject}`, {size} px, batch {batch}"], []
        for mode in ("inference", "training"):
            before, after = case.get((mode, BASELINE)), case.get((mode, OURS))
            if before is None or after is None:
                cells += [EMPTY, EMPTY]
                continue
            cells += [f"{_time(before)} → {_time(after)}", _speedup(after)]
            limits.append(_times(after["amdahl_limit"]) if after["amdahl_limit"] else EMPTY)
        lines.append([*cells, " / ".join(limits) or EMPTY])
    if not lines:
        return []
    head = (f"whole model, {DTYPES[rows[0]['dtype']]}", "inference", "speed-up", "training step", "speed-up", "limit")
    note = (
        "Limit: what the speed-up would be if the front end, all that the package replaces, took no time (Amdahl), by "
        "its share of upstream's time."
    )
    return [_table(head, lines), _paragraph(note)]


def _module(rows):
    """The T2T module of the headline, its floor, and the other batches and sizes."""
    rows = _of(rows, "module")
    cases = _cases(rows)
    if not cases:
        return []
    (subject, size, batch), case = next(iter(cases.items()))
    names = {name: words for name, words in MODULE_COLUMNS.items() if any(name == each for _, each in case)}
    lines = []
    for mode, words in (("inference", "inference"), ("training", "training: forward and backward")):
        found = [case.get((mode, name)) for name in names]
        lines.append([words, *(EMPTY if row is None else _module_cell(row) for row in found)])
    saved = [case.get(("training", name)) for name in names]
    kept = [EMPTY if row is None or row["saved_bytes"] is None else _megabytes(row) for row in saved]
    lines.append(["kept for backward, per image", *kept])
    head = (f"T2T module ({subject.capitalize()}), {size} px, batch {batch}, {DTYPES[rows[0]['dtype']]}",)
    blocks = [_table([*head, *names.values()], lines)]
    mine = [case[mode, OURS] for mode in ("inference", "training") if (mode, OURS) in case]
    floors = [f"{_floor(row)} of the {_time(row)}" for row in mine if _floor(row) != EMPTY]
    if floors:
        blocks.append(_paragraph(f"By this machine's own copies and products the floor is {' and '.join(floors)}."))
    return [*blocks, *_other_cases(cases)]


def _module_cell(row):
    return _time(row) if row["provider"] == BASELINE else f"{_time(row)}, {_speedup(row)}"


def _megabytes(row):
    return f"{number(row['saved_bytes'] / row['batch'] / 1e6)} MB"


def _other_cases(cases):
    """t2t_fast against upstream, both eager, for every T2T module, size and batch."""
    subjects = list(dict.fromkeys(subject for subject, _, _ in cases))
    columns = sorted({(size, batch) for _, size, batch in cases})
    if len(cases) < 2:
        return []
    lines = []
    for subject in subjects:
        cells = []
        for size, batch in columns:
            case = cases.get((subject, size, batch), {})
            found = [case.get((mode, OURS)) for mode in ("inference", "training")]
            speeds = [_times(row["speedup"]["median"]) for row in found if row is not None and row["speedup"]]
            cells.append(" / ".join(speeds) or EMPTY)
        lines.append([f"{subject.capitalize()} module", *cells])
    head = ("eager, inference / training", *(f"{size} px, batch {batch}" for size, batch in columns))
    return [_table(head, lines)]


def _latency(rows):
    """One image at a time."""
    rows = _of(rows, "latency")
    names = {name: words for name, words in LATENCY_COLUMNS.items() if any(row["provider"] == name for row in rows)}
    lines = []
    for (subject, size, _), case in _cases(rows).items():
        cells = [case.get(("inference", name)) for name in names]
        lines.append([f"`{subject}`, {size} px", *(EMPTY if row is None else _latency_cell(row) for row in cells)])
    if not lines:
        return []
    head = (f"one image, {DTYPES[rows[0]['dtype']]}: median, 95th percentile", *names.values())
    return [_table(head, lines)]


def _latency_cell(row):
    words = f"{_time(row)}, {_seconds(row['p95_s'])}"
    return (
        words
        if row["provider"] == BASELINE or row["speedup"] is None
        else f"{words}; {_times(row['speedup']['median'])}"
    )


def _operators(rows):
    """Every operator at 224 px, a line for all its places in the T2T module."""
    rows = [row for row in _of(rows, "op") if row["size"] == 224]
    by_operator = {}
    for (subject, _, _), case in _cases(rows).items():
        op, _, where = subject.partition("-")
        by_operator.setdefault(op, {})[where.replace("stage", "").replace("fuseformer", "FuseFormer")] = case
    lines = []
    for op, places in by_operator.items():
        cells = [f"`{op}`", " / ".join(places)]
        for mode in ("inference", "training"):
            found = [case.get((mode, OURS)) for case in places.values()]
            if not any(found):
                cells += [EMPTY, EMPTY]
                continue
            speeds = [EMPTY if row is None or not row["speedup"] else _times(row["speedup"]["median"]) for row in found]
            floors = [EMPTY if row is None else _floor(row) for row in found]
            cells += [" / ".join(speeds), " / ".join(each.removesuffix(" %") for each in floors) + " %"]
        lines.append(cells)
    if not lines:
        return []
    head = (f"operator, batch {rows[0]['batch']}, {DTYPES[rows[0]['dtype']]}", "stage", "forward", "floor / time")
    return [_table([*head, "forward and backward", "floor / time"], lines)]


def _fits(fits):
    """The largest batches, a line for all sizes of a model."""
    names = {fit["provider"]: fit["label"] for fit in fits}
    cases = {}
    for fit in fits:
        case = cases.setdefault((fit["subject"], fit["dtype"], fit["limit_bytes"]), {})
        case.setdefault(fit["size"], {})[fit["provider"]] = fit["batch"]
    lines = []
    for (subject, dtype, limit), sizes in cases.items():
        where = f"`{subject}`, {DTYPES[dtype]}, {' / '.join(map(str, sizes))} px, {number(limit / 1e9)} GB"
        batches = [[f"{case[name]}" if name in case else EMPTY for case in sizes.values()] for name in names]
        lines.append([where, *(" / ".join(each) for each in batches)])
    return [_table(["largest batch whose training step fits", *names.values()], lines)] if lines else []


def _losses(rows):
    """How many rows are slower than upstream eager, and which."""
    judged = [row for row in rows if row["speedup"] is not None and row["provider"] != BASELINE]
    own = [row for row in judged if row["provider"].partition("-")[0] == OURS]
    others = [row for row in judged if ours(row["provider"]) and row not in own]
    if not own:
        return []
    lost = [row for row in own if row["speedup"]["median"] < 1]
    named = "; ".join(f"`{row['group']}` {row['label']}, {_times(row['speedup']['median'])}" for row in lost)
    words = f"Of t2t_fast's {len(own)} rows {len(lost) or 'none'} {'is' if len(lost) < 2 else 'are'} slower than "
    words += f"upstream eager{': ' if named else ''}{named}."
    if others:
        slower = sum(row["speedup"]["median"] < 1 for row in others)
        backends = ", ".join(dict.fromkeys(row["provider"].partition("-")[0] for row in others))
        words += f" Backends that are not chosen here ({backends}) are slower in {slower} of their {len(others)} rows."
    return [words]


def _goals(rows):
    """How many goals were reached, and which not."""
    goals = judge(rows)
    if not goals:
        return []
    missed = [goal for goal in goals if goal.verdict != "reached"]
    words = (
        f"Of {len(goals)} [goals](benchmarks/report/goals.py) with numbers here {len(goals) - len(missed)} are reached"
    )
    named = "; ".join(f"{goal.what} ({goal.measured}, wanted {goal.wanted})" for goal in missed)
    return [f"{words}, not: {named}." if missed else f"{words}."]


def _links(folders):
    """Where the rows are."""
    found = []
    for folder in folders:
        files = {"table.md": "table", "report.html": "report", "rows.csv": "CSV"}
        links = [f"[{word}]({folder.name}/{file})" for file, word in files.items() if (folder.path / file).exists()]
        found.append(f"{Path(folder.name).name}: {', '.join(links)}")
    words = f"All rows, also those that lose: {'; '.join(found)}."
    missing = sum(len(folder.run.left_out) for folder in folders)
    return words + (f" Planned rows without numbers: {missing}; the tables say why." if missing else "")


def _where(machine):
    """Where and when, in a sentence."""
    environments = [folder.run.environment for folder in machine.folders]
    versions = [
        f"{each['date'][:10]}, t2t_fast {each['t2t_fast']}, torch {each['torch']}, Python {each['Python']}"
        for each in environments
    ]
    return f"Measured on {environments[0]['device']} ({'; '.join(dict.fromkeys(versions))})."


def numbers(folders):
    """The text between the markers.

    Args:
        folders: of :class:`Folder`, the most important first.
    """
    blocks = []
    if (folders[0].path / "chart.png").exists():
        alt = "Speed-up and memory of every implementation, relative to upstream eager"
        blocks.append(f"![{alt}]({folders[0].name}/chart.png)")
    how = (
        "The implementations of a case were measured in one run, round by round in turn. Times are medians; a speed-up "
        "is the median of the rounds' ratios to upstream eager, in brackets their 20th and 80th percentile "
        f"([how]({HOW})). `python -m benchmarks` measures all of it, "
        "`python -m benchmarks.report.readme` writes this section."
    )
    for machine in machines(folders):
        words = _where(machine)
        if how:
            words, how = f"{words} {how}", ""
            if not any(folder.run.environment.get("gpu") for folder in folders):
                words += " Nothing here is from a GPU yet."
        blocks.append(_paragraph(words))
        for part in (_models, _module, _latency, _operators):
            blocks += part(machine.rows)
        blocks += _fits(machine.fits)
        blocks.append(_paragraph(" ".join([FLOOR, *_losses(machine.rows), *_goals(machine.rows)])))
        blocks.append(_paragraph(_links(machine.folders)))
    return "\n\n".join(blocks)


def _read(root, name):
    path = root / name
    if not (path / "rows.json").is_file():
        raise ValueError(f"numbers: expected a folder with rows.json, got {name}")
    return Folder(name, path, run_file.read(path / "rows.json"))


def generated(readme):
    """The README with its numbers made anew.

    Args:
        readme: path of the README; the marker's folders are relative to its own.

    Returns:
        (the text as it is, the text as it should be).

    Raises:
        ValueError: there is not one pair of markers, or a folder that is no run's.
    """
    readme = Path(readme)
    text = readme.read_text()
    marked = list(MARKED.finditer(text))
    if len(marked) != 1:
        pair = "<!-- numbers: FOLDER[, FOLDER...] --> and <!-- /numbers -->"
        raise ValueError(f"{readme}: expected {pair} once, each on a line, got {len(marked)} pairs")
    (found,) = marked
    names = [name.strip() for name in found["folders"].split(",")]
    body = numbers([_read(readme.parent, name) for name in names])
    return text, f"{text[: found.start('text')]}\n{body}\n\n{text[found.end('text') :]}"


def main(argv=None):
    """Write the README's numbers, or check them. Returns 0; 1 if they differ; 2 if they cannot be made."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report.readme", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; show what differs")
    default = Path(__file__).resolve().parents[2] / "README.md"
    parser.add_argument("--readme", type=Path, default=default, help="by default the project's own")
    arguments = parser.parse_args(argv)
    try:
        text, wanted = generated(arguments.readme)
    except (OSError, ValueError) as failure:
        print(f"{parser.prog}: {failure}", file=sys.stderr)
        return 2
    if not arguments.check:
        arguments.readme.write_text(wanted)
        print(arguments.readme)
        return 0
    name = arguments.readme.name
    difference = list(
        difflib.unified_diff(text.splitlines(), wanted.splitlines(), name, f"{name}, generated", "", "", 1, "")
    )
    print("\n".join(difference) if difference else f"{name}: the numbers are those of the runs")
    return 1 if difference else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The numbers of README.md and docs/performance.md: ``python -m benchmarks.report.readme [--check] [--readme FILE]``.

Replaces the text between ``<!-- numbers: FOLDER[, FOLDER...] -->`` and ``<!-- /numbers -->`` by tables made from the
folders' run files; between ``<!-- headline: ... -->`` and ``<!-- /headline -->`` by the headline rows alone. Folders
are named relative to the page. A case that several folders measured is taken from the first. Each device has a part of
its own, and no ratio is taken across two runs.
"""

import argparse
import difflib
import re
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

from ..measure import run_file
from .frame import BASELINE, OURS, frame, pd, timed
from .goals import judge
from .tables import template
from .words import number

MARKED = re.compile(
    r"^<!-- (?P<part>headline|numbers): (?P<folders>[^\n]*) -->\n(?P<text>.*?)(?=^<!-- /(?P=part) -->$)", re.M | re.S
)
ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "README.md", ROOT / "docs" / "performance.md"
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
COLUMNS = {
    "upstream": "upstream",
    "upstream-compiled": "upstream, `torch.compile`",
    "t2t_fast": "t2t_fast",
    "t2t_fast-compiled": "t2t_fast, `torch.compile`",
    "upstream-graph": "upstream, CUDA graph",
    "t2t_fast-graph": "t2t_fast, CUDA graph",
}
EMPTY, MODES, CASE = "–", ("inference", "training"), ["subject", "size", "batch"]


class Folder(NamedTuple):
    """A folder of results: its name in the page, its path, and its run."""

    name: str
    path: Path
    run: run_file.RunFile


def _table(head, lines):
    """A markdown table, or nothing without lines."""
    first, *rest = ("| " + " | ".join(cells) + " |" for cells in (head, *lines))
    return ["\n".join([first, "|" + "---|" * len(head), *rest])] if lines else []


def _seconds(seconds):
    return f"{number(seconds)} s" if seconds >= 1 else f"{number(1e3 * seconds)} ms"


def _times(value):
    return EMPTY if pd.isna(value) else f"{value:.2f}×"


def _speedup(row):
    """Median (20th – 80th percentile)."""
    words = f"{_times(row.speedup_median)} ({row.speedup_p20:.2f} – {row.speedup_p80:.2f})"
    return EMPTY if pd.isna(row.speedup_median) else words


def _share(row):
    return EMPTY if row is None or pd.isna(row.floor_share) else f"{100 * row.floor_share:.0f}"


def _cases(rows):
    """(subject, size, batch) -> {(mode, provider): row}, in the rows' order and the first row's dtype."""
    rows = rows[rows["dtype"] == rows["dtype"].iloc[0]] if len(rows) else rows
    groups = rows.groupby(CASE, sort=False, dropna=False)
    return {key: {(row.mode, row.provider): row for row in members.itertuples()} for key, members in groups}


def _dtype(cases):
    return DTYPES[next(iter(next(iter(cases.values())).values())).dtype]


def _models(found, headline=False):
    """Whole models, the lite ones first; for the headline at the first size and batch only."""
    cases, lines = _cases(timed(found, "models", "training").sort_values("lite", kind="stable")), []
    if headline:
        cases = {key: case for key, case in cases.items() if key[1:] == next(iter(cases))[1:]}
    for (subject, size, batch), case in cases.items():
        cells, limits = [f"`{subject}`, {size:.0f} px, batch {batch:.0f}"], []
        for mode in MODES:
            before, after = case.get((mode, BASELINE)), case.get((mode, OURS))
            if before is None or after is None:
                cells += [EMPTY, EMPTY]
                continue
            cells += [f"{_seconds(before.median_s)} → {_seconds(after.median_s)}", _speedup(after)]
            limits.append(_times(after.amdahl_limit))
        lines.append([*cells, " / ".join(limits) or EMPTY])
    head = [f"whole model, {_dtype(cases)}" if cases else "", "inference", "speed-up", "training step", "speed-up"]
    return _table([*head, "limit"], lines)


def _module_cell(row):
    if row is None:
        return EMPTY
    return _seconds(row.median_s) + ("" if row.provider == BASELINE else f", {_speedup(row)}")


def _module(found, headline=False):
    """The T2T module of the headline; else also its floor, and every module, size and batch."""
    cases = _cases(timed(found, "module"))
    if not cases:
        return []
    (subject, size, batch), case = next(iter(cases.items()))
    names = [name for name in COLUMNS if any(name == each for _, each in case)]
    lines = [
        [words, *(_module_cell(case.get((mode, name))) for name in names)]
        for mode, words in zip(MODES, ("inference", "training: forward and backward"), strict=True)
    ]
    kept = [case.get(("training", name)) for name in names]
    kept = [EMPTY if row is None or pd.isna(row.saved_mb) else f"{number(row.saved_mb)} MB" for row in kept]
    head = f"T2T module ({subject.capitalize()}), {size:.0f} px, batch {batch:.0f}, {_dtype(cases)}"
    blocks = _table([head, *(COLUMNS[name] for name in names)], [*lines, ["kept for backward, per image", *kept]])
    if headline:
        return blocks
    ours = [row for row in (case.get((mode, OURS)) for mode in MODES) if _share(row) != EMPTY]
    if ours:
        floors = " and ".join(f"{_share(row)} % of the {_seconds(row.median_s)}" for row in ours)
        blocks.append(f"At this machine's measured speed of copies and products, the floor is {floors}.")
    return [*blocks, *_other_modules(cases)]


def _other_modules(cases):
    """t2t_fast against upstream, both eager, for every T2T module, size and batch."""
    columns, lines = sorted({(size, batch) for _, size, batch in cases}), []
    for subject in dict.fromkeys(subject for subject, _, _ in cases):
        cells = []
        for column in columns:
            rows = [cases.get((subject, *column), {}).get((mode, OURS)) for mode in MODES]
            cells.append(" / ".join(_times(row.speedup_median) for row in rows if row is not None) or EMPTY)
        lines.append([f"{subject.capitalize()} module", *cells])
    head = ["eager, inference / training", *(f"{size:.0f} px, batch {batch:.0f}" for size, batch in columns)]
    return _table(head, lines) if len(cases) > 1 else []


def _latency(found):
    """One image at a time."""
    rows = timed(found, "latency")
    cases, names = _cases(rows), [name for name in COLUMNS if name in set(rows["provider"])]

    def cell(row):
        if row is None:
            return EMPTY
        words = f"{_seconds(row.median_s)}, {_seconds(row.p95_s)}"
        plain = row.provider == BASELINE or pd.isna(row.speedup_median)
        return words if plain else f"{words}; {_times(row.speedup_median)}"

    lines = [
        [f"`{subject}`, {size:.0f} px", *(cell(case.get(("inference", name))) for name in names)]
        for (subject, size, _), case in cases.items()
    ]
    head = f"one image, {_dtype(cases)}: median, 95th percentile" if cases else ""
    return _table([head, *(COLUMNS[name] for name in names)], lines)


def _operators(found):
    """Every operator at 224 px, a line for all its places in the T2T module."""
    rows = timed(found, "ops")
    cases, operators = _cases(rows[rows["size"] == 224]), {}
    for (subject, _, _), case in cases.items():
        name, _, where = subject.partition("-")
        place = where.replace("stage", "").replace("fuseformer", "FuseFormer")
        operators.setdefault(name, {})[place] = case
    lines = []
    for name, places in operators.items():
        cells = [f"`{name}`", " / ".join(places)]
        for mode in MODES:
            ours = [case.get((mode, OURS)) for case in places.values()]
            speeds = " / ".join(EMPTY if row is None else _times(row.speedup_median) for row in ours)
            shares = f"{' / '.join(map(_share, ours))} %"
            cells += [speeds, shares] if any(ours) else [EMPTY, EMPTY]
        lines.append(cells)
    first = f"operator, batch {next(iter(cases))[2]:.0f}, {_dtype(cases)}" if cases else ""
    return _table([first, "stage", "forward", "floor / time", "forward and backward", "floor / time"], lines)


def _fits(found):
    """The largest batches, a line for all sizes of a model."""
    fits, lines = found[found["suite"] == "memory"], []
    names = dict(zip(fits["provider"], fits["label"], strict=True))
    for (subject, dtype, limit), rows in fits.groupby(["subject", "dtype", "limit_bytes"], sort=False):
        sizes = rows.pivot(index="size", columns="provider", values="batch").reindex(rows["size"].unique())
        where = " / ".join(f"{size:.0f}" for size in sizes.index)
        cells = [[EMPTY if pd.isna(each) else f"{each:.0f}" for each in sizes.get(name, [])] for name in names]
        lines.append(
            [f"`{subject}`, {DTYPES[dtype]}, {where} px, {number(limit / 1e9)} GB", *(" / ".join(c) for c in cells)]
        )
    return _table(["largest batch whose training step fits", *names.values()], lines)


def _losses(found):
    """What is slower than upstream eager, in words."""
    rows = timed(found).query("provider != @BASELINE").dropna(subset="speedup_median").sort_index()
    form = rows["provider"].str.partition("-")[0] if len(rows) else rows["provider"]
    ours, others = rows[form == OURS], rows[rows["own"] & (form != OURS)]
    if ours.empty:
        return ""
    lost = ours[ours["lost"]]
    named = "; ".join(f"`{row.group}` {row.label}, {_times(row.speedup_median)}" for row in lost.itertuples())
    words = f"Of t2t_fast's {len(ours)} rows {len(lost) or 'none'} {'is' if len(lost) < 2 else 'are'} slower than "
    words += f"upstream eager{': ' if named else ''}{named}."
    if len(others):
        names = ", ".join(form[others.index].unique())
        words += f" The backends that are not chosen here ({names}) are slower in {others['lost'].sum()} of their "
        words += f"{len(others)} rows."
    return words


def _goals(rows, root):
    """How many goals were reached, and which were not; ``root``: the path from the page to the repository."""
    goals = judge(rows)
    missed = [f"{goal.what} ({goal.measured}, wanted {goal.wanted})" for goal in goals if goal.verdict != "reached"]
    link = f"[goals]({root}benchmarks/report/goals.py)"
    words = f"{len(goals) - len(missed)} of the {len(goals)} {link} with numbers here are "
    return f"{words}reached{', not: ' if missed else ''}{'; '.join(missed)}." if goals else ""


def _links(folders):
    """Where the rows are."""
    files = {"table.md": "table", "report.html": "report", "rows.csv": "CSV", "rows.json.gz": "data"}
    found = []
    for folder in folders:
        there = [f"[{word}]({folder.name}/{file})" for file, word in files.items() if (folder.path / file).exists()]
        found.append(f"{Path(folder.name).name}: {', '.join(there)}")
    missing = sum(len(folder.run.left_out) for folder in folders)
    words = f"All rows, including those that are slower: {'; '.join(found)}."
    return words + (f" Planned rows without numbers: {missing}; the report says why." if missing else "")


def _where(folders):
    """Where and when, in a sentence."""
    environments = [folder.run.environment for folder in folders]
    versions = dict.fromkeys(
        f"{each['date'][:10]}, t2t_fast {each['t2t_fast']}, torch {each['torch']}, Python {each['Python']}"
        for each in environments
    )
    return f"Measured on {environments[0]['device']} ({'; '.join(versions)})."


def _machine(folders, root):
    """The blocks of one device; of a group only the first folder's rows."""
    runs, known, rows, fits = [folder.run for folder in folders], set(), [], []
    for run in runs:
        rows += [row for row in run.rows if row["group"] not in known]
        fits += [fit for fit in run.fits if fit["group"] not in known]
        known |= {each["group"] for each in (*run.rows, *run.fits)}
    found = frame(run_file.RunFile(runs[0].environment, rows, fits, [], []))
    tables = {make.__name__[1:]: make(found) for make in (_models, _module, _latency, _operators, _fits)}
    return {
        "where": _where(folders),
        "losses": _losses(found),
        "goals": _goals(rows, root),
        "links": _links(folders),
        "headline": [*_models(found, headline=True), *_module(found, headline=True)],
        **tables,
    }


def _wrapped(text):
    """Paragraphs of 120 characters with code in one piece; tables and pictures as they are."""
    blocks = []
    for block in re.split(r"\n{2,}", text.strip()):
        if not block.startswith(("|", "![")):
            kept = re.sub(r"`[^`]*`", lambda code: code[0].replace(" ", "\0"), " ".join(block.split()))
            block = textwrap.fill(kept, 120, break_long_words=False, break_on_hyphens=False).replace("\0", " ")
        blocks.append(block)
    return "\n\n".join(blocks)


def numbers(folders, part="numbers"):
    """The text between the markers.

    Args:
        folders: of :class:`Folder`, the most important first.
        part: the template's name, "headline" or "numbers".
    """
    devices = {}
    for folder in folders:
        devices.setdefault(folder.run.environment["device"], []).append(folder)
    chart = folders[0].name if (folders[0].path / "chart.png").exists() else ""
    gpu = any(folder.run.environment.get("gpu") for folder in folders)
    root = re.match(r"(\.\./)*", folders[0].name)[0]
    machines = [_machine(members, root) for members in devices.values()]
    return _wrapped(template(f"{part}.md").render(chart=chart, machines=machines, gpu=gpu, root=root))


def _read(root, name):
    for file in ("rows.json", "rows.json.gz"):
        if (root / name / file).is_file():
            return Folder(name, root / name, run_file.read(root / name / file))
    raise ValueError(f"numbers: expected a folder with rows.json or rows.json.gz, got {name}")


def generated(readme):
    """A page with its numbers made anew.

    Args:
        readme: path of the page; the marker's folders are relative to its own.

    Returns:
        (the text as it is, the text as it should be).

    Raises:
        ValueError: there is not one pair of markers, or a folder that is no run's.
    """
    text = readme.read_text()
    marked = list(MARKED.finditer(text))
    if len(marked) != 1:
        pair = "<!-- numbers: FOLDER[, FOLDER...] --> and <!-- /numbers --> (or headline)"
        raise ValueError(f"{readme}: expected {pair} once, each on a line, got {len(marked)} pairs")
    (found,) = marked
    body = numbers([_read(readme.parent, name.strip()) for name in found["folders"].split(",")], found["part"])
    return text, f"{text[: found.start('text')]}\n{body}\n\n{text[found.end('text') :]}"


def main(argv=None):
    """Write the numbers of the pages, or check them. Returns 0; 1 if they differ; 2 if they cannot be made."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report.readme", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; show what differs")
    parser.add_argument("--readme", type=Path, help="one page; by default README.md and docs/performance.md")
    arguments = parser.parse_args(argv)
    differs = False
    for page in [arguments.readme] if arguments.readme else PAGES:
        try:
            text, wanted = generated(page)
        except (OSError, ValueError) as failure:
            print(f"{parser.prog}: {failure}", file=sys.stderr)
            return 2
        if not arguments.check:
            page.write_text(wanted)
            print(page)
            continue
        lines = text.splitlines(), wanted.splitlines()
        difference = list(difflib.unified_diff(*lines, page.name, f"{page.name}, generated", "", "", 1, ""))
        print("\n".join(difference) if difference else f"{page.name}: the numbers are those of the runs")
        differs |= bool(difference)
    return 1 if differs else 0


if __name__ == "__main__":
    raise SystemExit(main())

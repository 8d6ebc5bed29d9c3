"""A run as tables: markdown with every row, and CSV files whose columns stay the same from run to run."""

from pathlib import Path

import jinja2

from ..measure.run_file import RunFile
from . import words
from .crossover import curves, sentences
from .frame import FITS, PROCESSES, ROWS, SUITES, cases, frame, timed
from .goals import judge
from .words import number, percent

COLUMNS = (
    *("case", "provider", "ms (20 % – 80 %)", "× upstream (20 % – 80 %)", "images/s", "GB/s", "% of copy"),
    *("TFLOP/s", "% of floor", "saved MB/img", "peak MB/img", "first call s", "error"),
)
WHOLE = (
    "size",
    "batch",
    "visits",
    "rounds",
    "saved_bytes",
    "peak_bytes",
    "used_bytes",
    "over_bytes",
    "processes",
    "threads",
)


def template(name, **options):
    """A file of the folder ``templates``, with the functions of :mod:`words` as filters."""
    options |= dict(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    found = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")), **options)
    for function in (words.number, words.percent, words.spread, words.error):
        found.filters[function.__name__] = function
    found.filters["whole"] = lambda value: "" if value != value else f"{value:.0f}"
    return found.get_template(name)


def _cells(row):
    shares = [percent(row.copy_share), number(row.tflop_per_s), percent(row.floor_share)]
    memory = [number(row.saved_mb), number(row.peak_mb), number(row.first_call_s), words.error(row)]
    speeds = [words.spread(row, "seconds", 1e3), words.speedup(row), number(row.images_per_s), number(row.gb_per_s)]
    return [row.name, *speeds, *shares, *memory]


def _titled(found):
    for title, rows in cases(found):
        yield "; ".join(filter(None, (title, words.amdahl(rows)))), rows


def table(environment, rows, left_out, fits=(), processes=()):
    """The whole report as markdown."""
    run = RunFile(environment, rows, list(fits), list(processes), left_out)
    found = frame(run)
    return template("table.md").render(
        heading=words.heading(environment),
        goals=judge(rows),
        suites=SUITES,
        suite_cases={name: list(_titled(timed(found, name))) for name in SUITES if (found["suite"] == name).any()},
        sentences=sentences(curves(found), run),
        columns=COLUMNS,
        cells=_cells,
        fits=list(found[found["suite"] == "memory"].itertuples()),
        processes=list(found[found["suite"] == "processes"].itertuples()),
        notes=words.NOTES,
        left_out=words.left_out(left_out),
    )


def write(run, found, folder):
    """Write ``table.md``, ``rows.csv`` and, where the run has such entries, ``fits.csv`` and ``processes.csv``."""
    path = folder / "table.md"
    path.write_text(table(*run[:2], run.left_out, run.fits, run.processes), encoding="utf-8")
    written = [path]
    files = {"rows": (timed(found).sort_index(), ROWS), "fits": (found[found["suite"] == "memory"], FITS)}
    files["processes"] = found[found["suite"] == "processes"], PROCESSES
    for name, (rows, columns) in files.items():
        if name == "rows" or len(rows):
            whole = [key for key in WHOLE if key in columns and (rows[key].dropna() % 1 == 0).all()]
            rows = rows[list(columns)].astype(dict.fromkeys(whole, "Int64"))
            written.append(folder / f"{name}.csv")
            rows.to_csv(written[-1], index=False, lineterminator="\n", encoding="utf-8")
    return written

"""The report of a run, from its ``rows.json`` alone: ``python -m benchmarks.report rows.json --out DIR``.

``report.html`` holds everything in one file; beside it lie its pictures, ``table.md`` and the CSV files.
"""

import argparse
import sys
from pathlib import Path

from ..measure import run_file
from . import charts, page, tables
from .frame import frame


def write(source, folder):
    """Write the report of the run file ``source`` into ``folder``, which is made if it is missing.

    ``report.html``, ``table.md``, ``rows.csv``; ``fits.csv``, ``processes.csv`` and the PNG files of
    :data:`charts.PICTURES` where the run has rows for them. A picture or CSV file of an earlier report of this folder
    that this run has no rows for is removed. Where nothing can be drawn, the page says why, and standard error too.

    Returns:
        the paths written, the page first.

    Raises:
        ValueError: ``source`` is no run file.
    """
    run = run_file.read(source)
    found = frame(run)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*(f"{picture}.png" for picture in charts.PICTURES), "fits.csv", "processes.csv"):
        (folder / name).unlink(missing_ok=True)
    undrawn = charts.obstacle()
    if undrawn is not None:
        print(f"report: {undrawn}", file=sys.stderr)
    paths = charts.draw(run, found, folder) if undrawn is None else {}
    written = tables.write(run, found, folder)
    path = folder / "report.html"
    path.write_text(page.report(run, found, paths, undrawn), encoding="utf-8")
    return [path, *written, *paths.values()]


def main(argv=None):
    """The report of one JSON file. Returns 0, or 2 if the file is missing or no run file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, help="rows.json or the raw pytest-benchmark JSON")
    parser.add_argument("--out", type=Path, help="folder for the report; by default that of the JSON")
    arguments = parser.parse_args(argv)
    try:
        written = write(arguments.json, arguments.out or arguments.json.parent)
    except (ValueError, OSError) as failure:
        print(f"python -m benchmarks.report: {failure}", file=sys.stderr)
        return 2
    for path in written:
        print(path)
    return 0

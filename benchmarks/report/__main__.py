"""The report of a run, from its file alone: ``python -m benchmarks.report rows.json --out DIR``.

``report.html`` holds everything in one file; its pictures and ``rows.csv`` are beside it.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from ..measure import run_file


def obstacle(what, *packages):
    """Why ``what`` cannot be made here, or ``None``: a machine that only measures does not need the packages."""
    missing = " and ".join(name for name in packages if find_spec(name) is None)
    again = "pip install 't2t_fast[bench]', then python -m benchmarks.report"
    return f"{what} needs {missing}: {again}" if missing else None


def write(source, folder):
    """Write the report of the run file ``source`` into ``folder``, which is made if it is missing.

    ``report.html``, ``rows.csv`` and the PNG files of :data:`charts.PICTURES` for which the run has rows. Pictures of
    an earlier report are removed. If nothing can be drawn, the page and standard error give the reason. Without pandas
    or jinja2, standard error says so and nothing is written.

    Returns:
        the paths written, the page first.

    Raises:
        ValueError: ``source`` is no run file.
    """
    if reason := obstacle("the report", "pandas", "jinja2"):
        print(reason, source, file=sys.stderr)
        return []
    from . import charts, page
    from .frame import COLUMNS, frame

    run = run_file.read(source)
    found, folder = frame(run), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in charts.PICTURES:
        (folder / f"{name}.png").unlink(missing_ok=True)
    if undrawn := obstacle("a report with pictures", "matplotlib", "PIL"):
        print(undrawn, source, file=sys.stderr)
    paths = {} if undrawn else charts.draw(run, found, folder)
    path = folder / "report.html"
    path.write_text(page.report(run, found, paths, undrawn), encoding="utf-8")
    table = folder / "rows.csv"
    # without the conversion, whole numbers would get a decimal point where one of their column is missing
    found[COLUMNS].convert_dtypes().to_csv(table, index=False, lineterminator="\n", encoding="utf-8")
    return [path, table, *paths.values()]


def main(argv=None):
    """The report of one run file. Returns 0, or 2 if it cannot be made."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, help="rows.json or rows.json.gz of a run")
    parser.add_argument("--out", type=Path, help="folder for the report; by default that of the JSON")
    arguments = parser.parse_args(argv)
    try:
        written = write(arguments.json, arguments.out or arguments.json.parent)
    except (ValueError, OSError) as failure:
        print(f"{parser.prog}: {failure}", file=sys.stderr)
        return 2
    print(*written, sep="\n")
    return 0 if written else 2


if __name__ == "__main__":
    raise SystemExit(main())

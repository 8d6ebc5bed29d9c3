"""The report's templates, and a run as a CSV file whose columns stay the same from run to run."""

from pathlib import Path

import jinja2

from . import words
from .frame import COLUMNS


def template(name, **options):
    """A file of the folder ``templates``, with the functions of :mod:`words` as filters."""
    options |= dict(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    found = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")), **options)
    for function in (words.number, words.percent, words.spread, words.error):
        found.filters[function.__name__] = function
    found.filters["whole"] = lambda value: "" if value != value else f"{value:.0f}"
    return found.get_template(name)


def write(found, folder):
    """Write a frame as ``rows.csv`` into a folder. Returns its path."""
    path = folder / "rows.csv"
    # without the conversion, whole numbers would get a decimal point where one of their column is missing
    found[COLUMNS].convert_dtypes().to_csv(path, index=False, lineterminator="\n", encoding="utf-8")
    return path

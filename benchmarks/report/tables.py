"""The report's templates, and a run as a CSV file whose columns stay the same from run to run."""

from pathlib import Path

import jinja2

from . import words
from .frame import COLUMNS

WHOLE = ["size", "batch", "visits", "rounds", "saved_bytes", "peak_bytes", "used_bytes", "over_bytes"]
WHOLE += ["processes", "threads"]
"""Columns of whole numbers, which pandas would write with a decimal point where one is missing."""


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
    whole = [key for key in WHOLE if (found[key].dropna() % 1 == 0).all()]
    path = folder / "rows.csv"
    found[COLUMNS].astype(dict.fromkeys(whole, "Int64")).to_csv(
        path, index=False, lineterminator="\n", encoding="utf-8"
    )
    return path

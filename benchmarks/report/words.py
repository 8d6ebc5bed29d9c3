"""Numbers and sentences of the report, and the templates that use them."""

from pathlib import Path

import jinja2

from .frame import pd

NOTES = """\
The rows of a case were measured in turn, round by round. A speed-up is the median of the rounds' ratios to upstream
eager. "% of floor" is the floor's time over the measured time; the floor is the least time that a fused implementation
could take at this machine's measured copy bandwidth and speed of dense products. GB/s and TFLOP/s are that
implementation's bytes and FLOPs over the measured time: they show how close a row is to it, not what it moves. Saved:
bytes kept for backward, inputs included. Peak: the most bytes that a call allocates at a time. Neither includes the
parameters. Error: relative to float64, of the output and of the worst gradient. † computes another function: a
reference for comparison, not a replacement. ▼ slower than upstream eager."""
"""Explains the columns."""


def number(value, digits=3):
    """A number with so many significant digits and no exponent; "" for a missing one."""
    if pd.isna(value):
        return ""
    return f"{value:.0f}" if value >= 10**digits - 0.5 else f"{value:#.{digits}g}".rstrip(".")


def percent(share, digits=3):
    """A share of 1 in percent, without the sign."""
    return number(100 * share, digits)


def spread(row, key, factor=1.0):
    """median (p20 – p80) of ``key``: "seconds" or "speedup"; "" where it was not measured."""
    form = "{}_s" if key == "seconds" else "speedup_{}"
    middle, low, high = (number(factor * getattr(row, form.format(each))) for each in ("median", "p20", "p80"))
    return middle and f"{middle} ({low} – {high})"


def error(row):
    """The relative errors of the output and, where there is one, of the worst gradient."""
    if pd.isna(row.error):
        return "not compared" if row.another_function else "within dropout's noise"
    return f"{row.error:.0e}" + ("" if pd.isna(row.gradient_error) else f" / {row.gradient_error:.0e}")


def products(limits):
    """The measured speed of dense products in each dtype."""
    return ", ".join(f"{name} {speed / 1e12:.2f} TFLOP/s" for name, speed in limits["flop_per_s"].items())


def signature(environment):
    """When, where and with what a run was measured, in one short line for pictures."""
    parts = [environment["date"][:10], environment["device"], f"torch {environment['torch']}"]
    return " · ".join([*parts, f"t2t_fast {environment['t2t_fast']}"])


def left_out(entries):
    """(cases, provider, reason) for each provider and reason: its groups or, of more than three, their number."""
    found = pd.DataFrame(entries, columns=["group", "provider", "reason"]).groupby(["provider", "reason"], sort=False)
    return [(", ".join(each) if len(each) <= 3 else f"{len(each)} cases", *key) for key, each in found["group"]]


def template(name, **options):
    """A file of the folder ``templates``, with some functions of this module as filters."""
    options |= dict(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    found = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")), **options)
    found.filters |= {function.__name__: function for function in (number, percent, spread, error)}
    found.filters["whole"] = lambda value: "" if value != value else f"{value:.0f}"
    return found.get_template(name)

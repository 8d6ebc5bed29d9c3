"""What a run's rows are about: the suite and the case of each, the order in which they are shown, which come first."""

from typing import NamedTuple

from ..suites.groups import BATCHES, HEADLINE_LENGTH, LITE

SUITES = {
    "models": "Whole models",
    "training": "Training steps of whole models",
    "module": "T2T modules",
    "latency": "Latency of few images",
    "ops": "Operators",
    "scaling": "Scaling with batch and image side",
}
"""Every suite of timed rows with its heading, in the order of the report."""

LEVELS = {"model": "models", "module": "module", "op": "ops"}
"""The suite of a row from before rows noted theirs."""

BASELINE, OURS = "upstream", "t2t_fast"
"""The provider that others are compared with, and this package as it is by itself."""

FORMS = (OURS, "aten", "native", "triton")
"""Names of our own providers, which may have an ending such as "-compiled"."""

SIDE = 224
"""Pixels of the headline image's side."""


class Case(NamedTuple):
    """A group's rows under its name in words."""

    title: str
    rows: list


def suite(row):
    """The name of a timed row's suite."""
    return row.get("suite") or LEVELS[row["level"]]


def ours(provider):
    """Whether a provider is a form of this package."""
    return provider.startswith(FORMS)


def floor_share(row):
    """The floor's time over the measured one (1: no fused implementation could be faster); ``None`` without a floor."""
    if "floor_share" in row or row["times_floor"] is None:
        return row.get("floor_share")
    return 1 / row["times_floor"]  # runs from before this column


def lost(row):
    """Whether a row is slower than upstream eager of the same case."""
    return row["speedup"] is not None and row["speedup"]["median"] < 1 and row["provider"] != BASELINE


def subject(row):
    """What was measured, in words."""
    words = row["subject"].replace("-stage", ", stage ").replace("-L", ", L = ").replace("-", ", ")
    return f"T2T module, {words.capitalize()}" if row["level"] == "module" else words


def title(row):
    """A group in words."""
    size = "" if row["size"] is None else f"{row['size']} px, "
    return f"{subject(row)}, {size}batch {row['batch']}, {row['dtype']}, {row['mode']}"


def cases(found):
    """A :class:`Case` for every group, in the order of their first rows."""
    groups = {}
    for row in found:
        groups.setdefault(row["group"], []).append(row)
    return [Case(title(members[0]), members) for members in groups.values()]


def ordered(found):
    """Rows in the order of the report: suite by suite, lite models first, else as they were measured."""
    names = list(SUITES)

    def place(row):
        # the smaller a model, the more of its time is the front end
        lite = LITE.index(row["subject"]) if row["subject"] in LITE else len(LITE)
        return names.index(suite(row)), lite if row["level"] == "model" else 0

    return sorted(found, key=place)


def of(found, *names):
    """The rows of some suites, in the order of the report."""
    return [row for row in ordered(found) if suite(row) in names]


def main_dtype(found):
    """The dtype with the most rows, of several the first."""
    dtypes = [row["dtype"] for row in found]
    return max(dict.fromkeys(dtypes), key=dtypes.count)


def headline(found):
    """Of every subject, dtype and mode the rows of one group: at 224 px, or at the number of tokens of 224 px, and at
    the headline batch; where there is no such group, of the one with the largest batch."""
    batches = {sizes[0] for sizes in BATCHES.values()}

    def fit(row):
        sized = row["size"] == SIDE or row["subject"].endswith(f"-L{HEADLINE_LENGTH}")
        return sized, row["batch"] in batches, row["batch"]

    best = {}
    for row in found:
        # all lengths of the attention's sweep are one subject
        key = suite(row), row["subject"].partition("-L")[0], row["dtype"], row["mode"]
        if key not in best or fit(row) > fit(best[key]):
            best[key] = row
    chosen = {row["group"] for row in best.values()}
    return [row for row in found if row["group"] in chosen]

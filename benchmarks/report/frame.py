"""A run as one pandas frame: a line for each timed row, largest batch and process count.

Every table, chart and page is made from it. Numbers that were not measured are NaN.
"""

import sys

try:
    import pandas as pd
except ModuleNotFoundError as failure:
    print(f"the report needs {failure.name}: pip install 't2t_fast[bench]'", file=sys.stderr)
    raise SystemExit(2) from failure

from ..suites.groups import BATCHES, HEADLINE_LENGTH, LITE

SUITES = ["models", "training", "module", "latency", "ops", "scaling"]
"""Suites of timed rows, in the order of the report."""

BASELINE, OURS = "upstream", "t2t_fast"
FORMS = (OURS, "aten", "native", "triton")
"""How the names of this package's own providers begin."""

SIDE = 224
"""The headline image side, in pixels."""

COLUMNS = [
    *("suite", "group", "level", "subject", "size", "batch", "dtype", "mode", "provider", "label", "another_function"),
    *("backends", "median_s", "p20_s", "p80_s", "p95_s", "visits", "rounds"),
    *("speedup_median", "speedup_p20", "speedup_p80", "images_per_s", "gb_per_s", "tflop_per_s", "copy_share"),
    *("floor_s", "floor_share", "saved_bytes", "peak_bytes", "first_call_s", "warm_up_s", "error", "gradient_error"),
    *("unfused", "limit_bytes", "used_bytes", "over_bytes", "processes", "threads"),
]
"""Of ``rows.csv``: seconds, bytes, shares of 1."""

_TEXT = {
    "suite",
    "group",
    "level",
    "subject",
    "dtype",
    "mode",
    "provider",
    "label",
    "another_function",
    "backends",
    "unfused",
}
_NESTED = {f"seconds.{key}": f"{key}_s" for key in ("median", "p20", "p80")}
_NESTED |= {f"speedup.{key}": f"speedup_{key}" for key in ("median", "p20", "p80")}


def subject(row):
    """What was measured, in words; ``row``: of a frame."""
    words = row.subject.replace("-stage", ", stage ").replace("-L", ", L = ").replace("-", ", ")
    return f"T2T module, {words.capitalize()}" if row.level == "module" else words


def title(row):
    """The name of a group in words."""
    size = "" if pd.isna(row.size) else f"{row.size:.0f} px, "
    return f"{subject(row)}, {size}batch {row.batch:.0f}, {row.dtype}, {row.mode}"


def frame(run):
    """The frame of a :class:`run_file.RunFile`, in the order of the file.

    Besides :data:`COLUMNS` it has ``name`` (the label, with † where another function is computed), ``what`` and
    ``case`` (subject and group in words), ``saved_mb`` and ``peak_mb`` (an image), ``lost`` (slower than upstream
    eager), ``own`` (a form of this package) and ``lite`` (place among the lite models).
    """
    found = pd.json_normalize(run.rows, max_level=1).rename(columns=_NESTED).reindex(columns=COLUMNS)
    backends = [(row.get("backends") or {}).items() for row in run.rows]
    found["backends"] = ["; ".join(f"{op}={name}" for op, name in each) or None for each in backends]
    found["visits"] = [len(row["visits"]) if "visits" in row else None for row in run.rows]
    found["rounds"] = [len(row["times"]) if "times" in row else None for row in run.rows]
    numbers = [name for name in found if name not in _TEXT]
    found[numbers] = found[numbers].astype(float)
    found["another_function"] = found["another_function"].eq(True)
    found["name"] = found["label"] + found["another_function"].map({True: "\u00a0†", False: ""})
    rows = list(found.itertuples())
    found["what"], found["case"] = [subject(row) for row in rows], [title(row) for row in rows]
    for key in ("saved", "peak"):
        found[f"{key}_mb"] = found[f"{key}_bytes"] / found["batch"] / 1e6
    found["lost"] = (found["speedup_median"] < 1) & (found["provider"] != BASELINE)
    found["own"] = found["provider"].map(own)
    found["lite"] = found["subject"].map({name: place for place, name in enumerate(LITE)}).fillna(len(LITE))
    return found


def own(provider):
    """Whether a provider is a form of this package."""
    return provider.startswith(FORMS)


def timed(found, *suites):
    """The timed rows of some suites (by default all) in the order of the report: lite models before the others."""
    found = found[found["suite"].isin(suites or SUITES)]
    suite = found["suite"].map(SUITES.index)
    order = found.assign(suite_place=suite, model_place=found["lite"].where(found["level"] == "model", 0))
    return found.loc[order.sort_values(["suite_place", "model_place"], kind="stable").index]


def main_dtype(found):
    """The dtype with the most rows; of several, the first."""
    return found.groupby("dtype", sort=False).size().idxmax() if len(found) else None


def in_main_dtype(found):
    """The rows of :func:`main_dtype`."""
    return found[found["dtype"] == main_dtype(found)]


def headline(found):
    """One group of every suite, subject, dtype and mode: at 224 px (or as many tokens) and the headline batch.

    Where there is no such group, the one nearest to it with the largest batch.
    """
    subjects = found["subject"].str.partition("-L")[0] if len(found) else found["subject"]
    ranked = found.assign(
        subject=subjects,
        sized=(found["size"] == SIDE) | found["subject"].str.endswith(f"-L{HEADLINE_LENGTH}"),
        usual=found["batch"].isin([batches[0] for batches in BATCHES.values()]),
    ).sort_values(["sized", "usual", "batch"], ascending=False, kind="stable")
    best = ranked.drop_duplicates(["suite", "subject", "dtype", "mode"])
    return found[found["group"].isin(best["group"])]

"""Whether a run reached the goals (``suites/goals.py``); every goal compares rows of one run."""

from typing import NamedTuple

from ..measure.statistics import ratios
from ..suites.goals import GOALS


class Judgement(NamedTuple):
    """A goal and what was measured, in words."""

    what: str
    wanted: str
    measured: str
    verdict: str


WORDS = {
    "times": "{ours} faster than {against}",
    "saved_bytes": "{ours} fewer saved bytes than {against}",
    "peak_bytes": "{ours} less peak memory than {against}",
    "copy_share": "bytes that must move, at the speed of a copy",
    "saved_share": "q, k, v and 8.3 kB a sequence of what is saved for backward",  # 4 m (E + 1) bytes of key state
}


HALF = {"bf16": ", bfloat16", "fp16": ", float16"}


def judge(rows):
    """A :class:`Judgement` for every goal whose rows are in ``rows``, the timed rows of a run file, with its field."""
    by_name = {(row["group"], row["provider"]): row for row in rows}
    found = []
    for goal in GOALS:
        row, other = by_name.get((goal.group, goal.ours), {}), by_name.get((goal.group, goal.against), {})
        ours, against = row.get(goal.field), other.get(goal.field)
        if ours is None or (against is None and goal.against is not None):
            continue
        wanted = f"{goal.wanted:.3g}x"
        if goal.against is None:
            value, wanted, measured = ours, f"{100 * goal.wanted:.4g} %", f"{100 * ours:.4g} %"
        elif goal.field == "times":
            ratio = ratios(against, ours)
            value, measured = ratio["median"], f"{ratio['median']:.2f}x ({ratio['p20']:.2f} to {ratio['p80']:.2f})"
        else:
            value, measured = against / ours, f"{against / ours:.2f}x"
        subject = f"{'T2T module, ' if row['level'] == 'module' else ''}{row['subject'].replace('-L', ', L = ')}"
        subject += f"{', one image' if row['suite'] == 'latency' else ''}{HALF.get(row['dtype'], '')}"
        what = f"{subject}, {row['mode']}: {WORDS[goal.field].format(**goal._asdict())}"
        found.append(Judgement(what, wanted, measured, "reached" if value >= goal.wanted else "not reached"))
    return found

"""The goals of the package, and whether a run reached them; every goal is a ratio inside one run."""

from typing import NamedTuple

from ..measure.statistics import ratios
from ..suites.groups import HEADLINE_LENGTH

FIELDS = {"times": "faster", "saved_bytes": "fewer saved bytes", "peak_bytes": "less peak memory"}
SHARES = {
    "copy_share": "bytes that must move, at the speed of a copy",
    "saved_share": "q, k, v and 8.3 kB a sequence of what is saved for backward",  # 4 m (E + 1) bytes of key state
}


class Goal(NamedTuple):
    """A wanted ratio of two providers in one group: their times, or a memory field.

    With ``against`` None, a wanted share of 1: ``field`` of one provider's row already compares it with a bound.
    """

    what: str
    group: str
    ours: str
    against: str | None
    wanted: float
    field: str = "times"


class Judgement(NamedTuple):
    """A goal and what was measured, in words."""

    what: str
    wanted: str
    measured: str
    verdict: str


def _goals(what, group, *wanted):
    """Goals of a subject; ``group``: with ``{}`` for the mode; ``wanted``: (mode, ours, against, ratio, field)."""
    for mode, ours, against, ratio, field in wanted:
        text = SHARES[field] if against is None else f"{ours} {FIELDS[field]} than {against}"
        yield Goal(f"{what}, {mode}: {text}", group.format(mode), ours, against, ratio, field)


def _faster(*wanted):
    """(mode, against, ratio) of times."""
    return [(mode, "t2t_fast", against, ratio, "times") for mode, against, ratio in wanted]


CPU, GPU = "224px-b8-fp32-{}", "224px-b256-bf16-{}"
COMPILED = "upstream-compiled"
LENGTH = f"performer_attention, L = {HEADLINE_LENGTH}"
ATTENTION = f"op-performer_attention-L{HEADLINE_LENGTH}-crossover"
SAVED = ("training", "t2t_fast", None, 0.999, "saved_share")
_WANTED = (
    (
        *("T2T module, performer", f"module-performer-{CPU}"),
        *_faster(("inference", "upstream", 3.0), ("inference", COMPILED, 2.5)),
        *_faster(("training", "upstream", 2.0), ("training", COMPILED, 1.8)),
        ("training", "t2t_fast", "upstream", 10.0, "saved_bytes"),
    ),
    *(
        (f"{name}-{place}", f"op-{name}-{place}-{CPU}", *_faster(("inference", "upstream", wanted)))
        for name, wanted in (("soft_split", 2.0), ("soft_composition", 3.0))
        for place in ("stage1", "stage2", "stage3", "fuseformer")
    ),
    (
        *("T2T module, performer", f"module-performer-{GPU}"),
        *_faster(("inference", "upstream", 8.0), ("inference", COMPILED, 3.0)),
        *_faster(("training", "upstream", 6.0), ("training", COMPILED, 3.0)),
        ("training", "t2t_fast", "upstream", 5.0, "peak_bytes"),
        ("training", "t2t_fast-low", "upstream", 6.0, "peak_bytes"),
    ),
    (
        *("T2T module, transformer", f"module-transformer-{GPU}"),
        *_faster(("inference", "upstream", 5.0), ("training", "upstream", 5.0)),
        ("training", "t2t_fast", "upstream", 25.0, "peak_bytes"),
    ),
    (
        *(LENGTH, f"{ATTENTION}-b64-bf16-{{}}", ("inference", "t2t_fast", None, 0.6, "copy_share")),
        *_faster(("inference", "sdpa", 5.0), ("inference", "upstream", 8.0), ("training", "upstream", 5.0)),
        SAVED,
    ),
    (LENGTH, f"{ATTENTION}-b8-fp32-{{}}", SAVED),
    (
        *("t2t_vit_7", f"model-t2t_vit_7-{GPU}"),
        *_faster(("inference", "upstream", 3.0), ("inference", COMPILED, 1.5), ("training", "upstream", 2.5)),
    ),
    (
        *("t2t_vit_14", f"model-t2t_vit_14-{GPU}"),
        *_faster(("inference", "upstream", 2.0), ("inference", COMPILED, 1.25), ("training", "upstream", 1.8)),
    ),
    (
        *("t2t_vit_7, one image", "latency-t2t_vit_7-224px-b1-bf16-{}"),
        ("inference", "t2t_fast-graph", "upstream", 4.0, "times"),
    ),
)
GOALS = [goal for each in _WANTED for goal in _goals(*each)]


def _judge(goal, ours, against):
    """(wanted, measured, reached), in words and a bool; ``None`` where a row lacks the field."""
    if goal.field == "times":
        ratio = ratios(against["times"], ours["times"])
        words = f"{ratio['median']:.2f}x ({ratio['p20']:.2f} to {ratio['p80']:.2f})"
        return f"{goal.wanted:g}x", words, ratio["median"] >= goal.wanted
    share = ours.get(goal.field)
    if share is None or (against is not None and against.get(goal.field) is None):
        return None
    if against is None:
        return f"{100 * goal.wanted:.4g} %", f"{100 * share:.4g} %", share >= goal.wanted
    ratio = against[goal.field] / share
    return f"{goal.wanted:g}x", f"{ratio:.2f}x", ratio >= goal.wanted


def judge(rows):
    """A :class:`Judgement` for every goal whose rows are in ``rows``, the timed rows of a run file."""
    by_name = {(row["group"], row["provider"]): row for row in rows}
    found = []
    for goal in GOALS:
        ours, against = by_name.get((goal.group, goal.ours)), by_name.get((goal.group, goal.against))
        if ours is None or (against is None and goal.against is not None):
            continue
        if (judged := _judge(goal, ours, against)) is not None:
            wanted, measured, reached = judged
            found.append(Judgement(goal.what, wanted, measured, "reached" if reached else "not reached"))
    return found

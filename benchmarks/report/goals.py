"""What the package wants to reach, and whether a run reached it; ratios inside one run."""

from typing import NamedTuple

from ..measure.statistics import ratios
from ..suites.groups import HEADLINE_LENGTH, Group


class Goal(NamedTuple):
    """A wanted ratio of two providers in one group: their times, or a memory field.

    With ``against`` None, a wanted share: ``field`` of one provider's row is already measured against a floor.
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


def _module(cell, subject, wanted):
    """Goals of a T2T module at a size, batch and dtype; ``wanted``: (mode, ours, against, ratio, field)."""
    names = {"times": "faster", "saved_bytes": "fewer saved bytes", "peak_bytes": "less peak memory"}
    return [
        Goal(
            f"T2T module, {subject}, {mode}: {ours} {names[field]} than {against}",
            f"module-{subject}-{cell}-{mode}",
            ours,
            against,
            ratio,
            field,
        )
        for mode, ours, against, ratio, field in wanted
    ]


def _operator(subject, against, wanted):
    """A goal of an operator that copies or adds up, on a CPU: forward only."""
    return Goal(
        f"{subject}: t2t_fast faster than {against}", f"op-{subject}-{CPU}-inference", "t2t_fast", against, wanted
    )


def _model(model, mode, against, wanted):
    return Goal(
        f"{model}, {mode}: t2t_fast faster than {against}",
        f"model-{model}-224px-b256-bf16-{mode}",
        "t2t_fast",
        against,
        wanted,
    )


def _attention(batch, dtype, mode, against, wanted):
    """A goal of Performer attention at its headline length."""
    return Goal(
        f"performer_attention, L = {HEADLINE_LENGTH}, {mode}: t2t_fast faster than {against}",
        _attention_group(batch, dtype, mode),
        "t2t_fast",
        against,
        wanted,
    )


def _attention_group(batch, dtype, mode):
    return Group("op", f"performer_attention-L{HEADLINE_LENGTH}", None, batch, dtype, mode).id


def _attention_saved(batch, dtype):
    """Only q, k, v and the key state, 4 m (E + 1) bytes a sequence, are kept for backward."""
    return Goal(
        f"performer_attention, L = {HEADLINE_LENGTH}: q, k, v and 8.3 kB a sequence of what is saved for backward",
        _attention_group(batch, dtype, "training"),
        "t2t_fast",
        None,
        0.999,
        "saved_share",
    )


CPU, GPU = "224px-b8-fp32", "224px-b256-bf16"
PLACES = ("stage1", "stage2", "stage3", "fuseformer")
GOALS = (
    *_module(
        CPU,
        "performer",
        [
            ("inference", "t2t_fast", "upstream", 3.0, "times"),
            ("inference", "t2t_fast", "upstream-compiled", 2.5, "times"),
            ("training", "t2t_fast", "upstream", 2.0, "times"),
            ("training", "t2t_fast", "upstream-compiled", 1.8, "times"),
            ("training", "t2t_fast", "upstream", 10.0, "saved_bytes"),
        ],
    ),
    *(_operator(f"soft_split-{where}", "upstream", 2.0) for where in PLACES),
    *(_operator(f"soft_composition-{where}", "upstream", 3.0) for where in PLACES),
    *_module(
        GPU,
        "performer",
        [
            ("inference", "t2t_fast", "upstream", 8.0, "times"),
            ("inference", "t2t_fast", "upstream-compiled", 3.0, "times"),
            ("training", "t2t_fast", "upstream", 6.0, "times"),
            ("training", "t2t_fast", "upstream-compiled", 3.0, "times"),
            ("training", "t2t_fast", "upstream", 5.0, "peak_bytes"),
            ("training", "t2t_fast-low", "upstream", 6.0, "peak_bytes"),
        ],
    ),
    *_module(
        GPU,
        "transformer",
        [
            ("inference", "t2t_fast", "upstream", 5.0, "times"),
            ("training", "t2t_fast", "upstream", 5.0, "times"),
            ("training", "t2t_fast", "upstream", 25.0, "peak_bytes"),
        ],
    ),
    Goal(
        f"performer_attention, L = {HEADLINE_LENGTH}, inference: bytes that must move, at the speed of a copy",
        _attention_group(64, "bf16", "inference"),
        "t2t_fast",
        None,
        0.6,
        "copy_share",
    ),
    _attention(64, "bf16", "inference", "sdpa", 5.0),
    _attention(64, "bf16", "inference", "upstream", 8.0),
    _attention(64, "bf16", "training", "upstream", 5.0),
    _attention_saved(64, "bf16"),
    _attention_saved(8, "fp32"),
    _model("t2t_vit_7", "inference", "upstream", 3.0),
    _model("t2t_vit_7", "inference", "upstream-compiled", 1.5),
    _model("t2t_vit_7", "training", "upstream", 2.5),
    _model("t2t_vit_14", "inference", "upstream", 2.0),
    _model("t2t_vit_14", "inference", "upstream-compiled", 1.25),
    _model("t2t_vit_14", "training", "upstream", 1.8),
    Goal(
        "t2t_vit_7, inference of one image: t2t_fast-graph faster than upstream",
        "latency-t2t_vit_7-224px-b1-bf16-inference",
        "t2t_fast-graph",
        "upstream",
        4.0,
    ),
)


def _judge(goal, ours, against):
    """Whether a goal is reached and what was measured, in words; ``None`` where a row lacks the field."""
    if goal.field == "times":
        ratio = ratios(against["times"], ours["times"])
        return ratio["median"] >= goal.wanted, f"{ratio['median']:.2f}x ({ratio['p20']:.2f} to {ratio['p80']:.2f})"
    if ours[goal.field] is None:
        return None
    if goal.against is None:
        return ours[goal.field] >= goal.wanted, _percent(ours[goal.field])
    if against[goal.field] is None:
        return None
    ratio = against[goal.field] / ours[goal.field]
    return ratio >= goal.wanted, f"{ratio:.2f}x"


def _percent(share):
    return f"{100 * share:.4g} %"


def judge(found):
    """A :class:`Judgement` for every goal whose rows are in ``found``."""
    by_name = {(row["group"], row["provider"]): row for row in found}
    judgements = []
    for goal in GOALS:
        ours, against = by_name.get((goal.group, goal.ours)), by_name.get((goal.group, goal.against))
        if ours is None or (against is None and goal.against is not None):
            continue
        judged = _judge(goal, ours, against)
        if judged is None:
            continue
        reached, measured = judged
        wanted = _percent(goal.wanted) if goal.against is None else f"{goal.wanted:g}x"
        judgements.append(Judgement(goal.what, wanted, measured, "reached" if reached else "not reached"))
    return judgements

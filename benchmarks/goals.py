"""What the package wants to reach, and whether a run reached it; ratios inside one run."""

from typing import NamedTuple

from .statistics import ratios


class Goal(NamedTuple):
    """A wanted ratio of two providers in one group: their times, or a memory field."""

    what: str
    group: str
    ours: str
    against: str
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
    _model("t2t_vit_7", "inference", "upstream", 3.0),
    _model("t2t_vit_7", "inference", "upstream-compiled", 1.5),
    _model("t2t_vit_7", "training", "upstream", 2.5),
    _model("t2t_vit_14", "inference", "upstream", 2.0),
    _model("t2t_vit_14", "inference", "upstream-compiled", 1.25),
    _model("t2t_vit_14", "training", "upstream", 1.8),
)


def judge(found):
    """A :class:`Judgement` for every goal whose two rows are in ``found``."""
    by_name = {(row["group"], row["provider"]): row for row in found}
    judgements = []
    for goal in GOALS:
        ours, against = by_name.get((goal.group, goal.ours)), by_name.get((goal.group, goal.against))
        if ours is None or against is None:
            continue
        if goal.field == "times":
            ratio = ratios(against["times"], ours["times"])
            measured = f"{ratio['median']:.2f}x ({ratio['p20']:.2f} to {ratio['p80']:.2f})"
            reached = ratio["median"] >= goal.wanted
        elif ours[goal.field] is None or against[goal.field] is None:
            continue
        else:
            ratio = against[goal.field] / ours[goal.field]
            measured, reached = f"{ratio:.2f}x", ratio >= goal.wanted
        verdict = "reached" if reached else "not reached"
        judgements.append(Judgement(goal.what, f"{goal.wanted:g}x", measured, verdict))
    return judgements

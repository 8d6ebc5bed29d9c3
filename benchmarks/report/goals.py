"""The goals of the package, and whether a run reached them; every goal compares rows of one run."""

from typing import NamedTuple

from ..measure.statistics import ratios


class Goal(NamedTuple):
    """A wanted ratio of ``field`` between two providers of a group: ``ours`` is that much faster or smaller.

    ``field``: "times" for the speed-up, or the name of a memory field. If ``against`` is ``None``, ``wanted`` is a
    share (0.6 is 60 %), and ``field`` of our row is already a ratio to a bound.
    """

    group: str
    field: str
    wanted: float
    against: str | None = "upstream"
    ours: str = "t2t_fast"


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

GOALS = (
    Goal("module-performer-224px-b8-fp32-inference", "times", 3.0),
    Goal("module-performer-224px-b8-fp32-inference", "times", 2.5, against="upstream-compiled"),
    Goal("module-performer-224px-b8-fp32-training", "times", 2.0),
    Goal("module-performer-224px-b8-fp32-training", "times", 1.8, against="upstream-compiled"),
    Goal("module-performer-224px-b8-fp32-training", "saved_bytes", 10.0),
    Goal("op-soft_split-stage1-224px-b8-fp32-inference", "times", 2.0),
    Goal("op-soft_split-stage2-224px-b8-fp32-inference", "times", 2.0),
    Goal("op-soft_split-stage3-224px-b8-fp32-inference", "times", 2.0),
    Goal("op-soft_split-fuseformer-224px-b8-fp32-inference", "times", 2.0),
    Goal("op-soft_composition-stage1-224px-b8-fp32-inference", "times", 3.0),
    Goal("op-soft_composition-stage2-224px-b8-fp32-inference", "times", 3.0),
    Goal("op-soft_composition-stage3-224px-b8-fp32-inference", "times", 3.0),
    Goal("op-soft_composition-fuseformer-224px-b8-fp32-inference", "times", 3.0),
    Goal("module-performer-224px-b256-bf16-inference", "times", 8.0),
    Goal("module-performer-224px-b256-bf16-inference", "times", 3.0, against="upstream-compiled"),
    Goal("module-performer-224px-b256-bf16-training", "times", 6.0),
    Goal("module-performer-224px-b256-bf16-training", "times", 3.0, against="upstream-compiled"),
    Goal("module-performer-224px-b256-bf16-training", "peak_bytes", 5.0),
    Goal("module-performer-224px-b256-bf16-training", "peak_bytes", 6.0, ours="t2t_fast-low"),
    Goal("module-transformer-224px-b256-bf16-inference", "times", 5.0),
    Goal("module-transformer-224px-b256-bf16-training", "times", 5.0),
    Goal("module-transformer-224px-b256-bf16-training", "peak_bytes", 25.0),
    Goal("op-performer_attention-L3136-crossover-b64-bf16-inference", "copy_share", 0.6, against=None),
    Goal("op-performer_attention-L3136-crossover-b64-bf16-inference", "times", 5.0, against="sdpa"),
    Goal("op-performer_attention-L3136-crossover-b64-bf16-inference", "times", 8.0),
    Goal("op-performer_attention-L3136-crossover-b64-bf16-training", "times", 5.0),
    Goal("op-performer_attention-L3136-crossover-b64-bf16-training", "saved_share", 0.999, against=None),
    Goal("op-performer_attention-L3136-crossover-b8-fp32-training", "saved_share", 0.999, against=None),
    Goal("model-t2t_vit_7-224px-b8-fp32-inference", "times", 2.0),
    Goal("model-t2t_vit_14-224px-b8-fp32-inference", "times", 1.2),
    Goal("model-t2t_vit_7-224px-b8-fp32-training", "times", 1.5),
    Goal("model-t2t_vit_14-224px-b8-fp32-training", "times", 1.2),
    Goal("model-t2t_vit_14-224px-b8-fp32-training", "saved_bytes", 1 / 0.6),
    Goal("model-t2t_vit_7-224px-b256-bf16-inference", "times", 3.5),
    Goal("model-t2t_vit_7-224px-b256-bf16-inference", "times", 1.5, against="upstream-compiled"),
    Goal("model-t2t_vit_7-224px-b256-bf16-training", "times", 3.0),
    Goal("model-t2t_vit_14-224px-b256-bf16-inference", "times", 2.4),
    Goal("model-t2t_vit_14-224px-b256-bf16-inference", "times", 1.25, against="upstream-compiled"),
    Goal("model-t2t_vit_14-224px-b256-bf16-training", "times", 2.2),
    Goal("latency-t2t_vit_7-224px-b1-bf16-inference", "times", 4.0, ours="t2t_fast-graph"),
)


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
        what = f"{subject}, {row['mode']}: {WORDS[goal.field].format(**goal._asdict())}"
        found.append(Judgement(what, wanted, measured, "reached" if value >= goal.wanted else "not reached"))
    return found

"""The goals of the package: wanted ratios of rows of one run. ``report/goals.py`` judges a run."""

from typing import NamedTuple


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


# Over OpenVINO, which a user without a GPU would run: (model, dtype) -> ratio, for batches and for one image
DEPLOYED = {
    ("t2t_vit_7", "fp32"): 1.15,
    ("t2t_vit_14", "fp32"): 1.05,
    ("t2t_vit_7", "bf16"): 1.05,
    ("t2t_vit_14", "bf16"): 1.0,
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
    *(
        Goal(f"{kind}-{model}-224px-{batch}-{dtype}-inference", "times", wanted, against="openvino")
        for kind, batch in (("model", "b8"), ("latency", "b1"))
        for (model, dtype), wanted in DEPLOYED.items()
    ),
    Goal("model-t2t_vit_7-224px-b8-bf16-training", "times", 2.2),
    Goal("model-t2t_vit_14-224px-b8-bf16-training", "times", 1.6),
    Goal("module-performer-224px-b8-bf16-inference", "times", 2.0, against="t2t_fast-fp32"),
    Goal("module-performer-224px-b8-bf16-training", "times", 1.6, against="t2t_fast-fp32"),
    Goal("model-t2t_vit_7-224px-b256-bf16-inference", "times", 3.5),
    Goal("model-t2t_vit_7-224px-b256-bf16-inference", "times", 1.5, against="upstream-compiled"),
    Goal("model-t2t_vit_7-224px-b256-bf16-training", "times", 3.0),
    Goal("model-t2t_vit_14-224px-b256-bf16-inference", "times", 2.4),
    Goal("model-t2t_vit_14-224px-b256-bf16-inference", "times", 1.25, against="upstream-compiled"),
    Goal("model-t2t_vit_14-224px-b256-bf16-training", "times", 2.2),
    Goal("latency-t2t_vit_7-224px-b1-bf16-inference", "times", 4.0, ours="t2t_fast-graph"),
)

ROWS = {(goal.group, name) for goal in GOALS for name in ("upstream", goal.ours, goal.against)}
"""(group, provider) of every row that a goal compares, and of upstream's in its group."""

"""What the benchmarks measure: costs, groups and their peers, the check before the timing, goals."""

import pytest
import torch

from benchmarks.measure import harness
from benchmarks.report.goals import judge
from benchmarks.suites import costs, groups, subjects
from benchmarks.suites.goals import GOALS
from benchmarks.suites.groups import Group
from benchmarks.suites.providers import Provider, providers
from support.rows import made_run
from t2t_fast import memory
from t2t_fast.models.registry import CONFIGS
from t2t_fast.ops._common.costs import Cost, soft_split

# Bytes/s and FLOP/s that the published floors assume (one H200, bf16)
COPY, PRODUCT = 4.3e12, 790e12

# Cost table of docs/math.md, section 7, bf16, per image. By stage, then the total: MB forward, MB backward, GFLOP
# forward, GFLOP backward, floor in microseconds forward and backward.
COST_TABLE = {
    ("performer", 224): [
        (2.75, 5.65, 0.305, 0.498, 0.64, 1.31),
        (1.03, 2.88, 0.206, 0.427, 0.30, 0.72),
        (0.25, 0.50, 0.087, 0.173, 0.11, 0.22),
        (4.03, 9.04, 0.598, 1.10, 1.05, 2.26),
    ],
    ("performer", 384): [
        (8.05, 16.6, 0.898, 1.46, 1.88, 3.85),
        (2.98, 8.40, 0.604, 1.26, 0.88, 2.11),
        (0.74, 1.47, 0.255, 0.510, 0.32, 0.65),
        (11.8, 26.4, 1.76, 3.23, 3.07, 6.61),
    ],
    ("transformer", 224): [
        (4.35, 7.18, 2.77, 6.68, 3.82, 8.79),
        (1.41, 3.24, 0.350, 0.792, 0.49, 1.09),
        (0.25, 0.50, 0.087, 0.173, 0.11, 0.22),
        (6.02, 10.9, 3.21, 7.64, 4.42, 10.1),
    ],
    ("transformer", 384): [
        (12.8, 21.1, 22.5, 55.5, 29.4, 71.2),
        (4.16, 9.51, 1.93, 4.57, 2.57, 6.05),
        (0.74, 1.47, 0.255, 0.510, 0.32, 0.65),
        (17.7, 32.1, 24.7, 60.6, 32.3, 77.9),
    ],
}

# MB and microseconds of a forward pass that keeps nothing
INFERENCE = {
    ("performer", 224): (3.50, 0.95),
    ("performer", 384): (10.2, 2.78),
    ("transformer", 224): (6.02, 4.42),
    ("transformer", 384): (17.7, 32.3),
}

SAVED_MB = {("performer", 224): 2.36, ("performer", 384): 6.89, ("transformer", 224): 2.86, ("transformer", 384): 8.40}


def _numbers(cost):
    forward, backward = Cost(cost.forward), Cost(cost.backward)
    return (
        forward.bytes("inference") / 1e6,
        backward.bytes("inference") / 1e6,
        forward.flops("inference") / 1e9,
        backward.flops("inference") / 1e9,
        1e6 * forward.floor("inference", COPY, PRODUCT),
        1e6 * backward.floor("inference", COPY, PRODUCT),
    )


@pytest.mark.parametrize(("tokens_type", "size"), COST_TABLE, ids=lambda value: str(value))
def test_costs_are_those_of_the_published_table(tokens_type, size):
    stages = costs.t2t_stages(tokens_type, size)
    module = costs.t2t_module(tokens_type, size)
    for cost, printed in zip([*stages, module], COST_TABLE[tokens_type, size], strict=True):
        # the table prints two or three digits
        assert _numbers(cost) == pytest.approx(printed, rel=6e-3, abs=6e-3)
    assert module.saved / 1e6 == pytest.approx(SAVED_MB[tokens_type, size], abs=6e-3)
    moved, floor = module.bytes("inference") / 1e6, 1e6 * module.floor("inference", COPY, PRODUCT)
    assert (moved, floor) == pytest.approx(INFERENCE[tokens_type, size], rel=6e-3, abs=6e-3)


def test_a_training_step_costs_forward_and_backward():
    cost = costs.t2t_module("performer", 224)
    assert cost.bytes("training") == pytest.approx(13.07e6, rel=2e-3)
    assert cost.floor("training", COPY, PRODUCT) == pytest.approx(3.31e-6, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "moved", "flops"), [("t2t_vit_7", 20, 1.72), ("t2t_vit_14", 64, 8.97), ("t2t_vit_24", 145, 26.7)]
)
def test_cost_of_the_blocks(name, moved, flops):
    """The published bytes in MB and FLOPs in G of an image of 224 px (math: backbone bytes), with a float32 stream."""
    config = CONFIGS[name]
    width = config["embed_dim"]
    block = costs.block(197, width, int(config["mlp_ratio"] * width), config["num_heads"])
    assert config["depth"] * block.bytes("inference") / 1e6 == pytest.approx(moved, rel=2e-2)
    assert config["depth"] * block.flops("inference") / 1e9 == pytest.approx(flops, rel=5e-3)


def test_float32_moves_twice_the_bytes_of_activations():
    half = soft_split(3, 224, 224, costs.T2T_WINDOWS[0])
    single = soft_split(3, 224, 224, costs.T2T_WINDOWS[0], element=4)
    assert single.bytes("inference") == 2 * half.bytes("inference")


def test_upstream_keeps_the_published_bytes_for_backward():
    """20.4 MB per image without dropout's masks (math: cost model), measured on the real module."""
    subject = subjects.build(Group("module", "performer", 224, 1, "fp32", "training"), "cpu")
    implementation = subject.make("upstream")
    saved = memory.saved_bytes(
        lambda: implementation.function(**implementation.inputs[0]), implementation.module.parameters()
    )
    assert saved / 1e6 == pytest.approx(20.4, rel=0.03)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("suite", groups.SUITES)
def test_every_group_has_its_peers(suite, device):
    full = groups.groups(suite, device, quick=False)
    assert all(group.suite == suite for group in full)
    quick = groups.groups(suite, device, quick=True)
    assert {group.id for group in quick} <= {group.id for group in full}
    for group in full:
        names = [provider.name for provider in providers(group, "cpu")]
        assert names[0] == "upstream" and "t2t_fast" in names
        assert ({"upstream-compiled", "t2t_fast-compiled"} <= set(names)) == group.compiled


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [True, False])
def test_a_name_is_one_group_of_all_suites(device, quick):
    names = [group.id for suite in groups.SUITES for group in groups.groups(suite, device, quick)]
    assert len(set(names)) == len(names)


def test_large_inputs_do_not_rotate():
    small, large = torch.empty(10), torch.empty(2**26, device="meta")
    assert subjects.copies([small]) == subjects.copies([small, small]) == subjects.COPIES > 1
    assert subjects.copies([small, large]) == 1


def test_lite_models_come_first():
    for suite in ("models", "training"):
        subjects = [group.subject for group in groups.groups(suite, "cuda", quick=False) if group.dtype == "bf16"]
        assert subjects[:3] == list(groups.LITE)


def test_the_sweeps_reach_as_far_as_they_should():
    scaled = groups.groups("scaling", "cuda", quick=False)
    assert {1, 1024} <= {group.batch for group in scaled} and {224, 2048} <= {group.size for group in scaled}
    for device in ("cpu", "cuda"):
        assert {196, 1_000_000} <= groups.LENGTHS[device].keys()
        fits = groups.groups("memory", device, quick=False)
        assert {group.size for group in fits} == {224, 384, 512}


@pytest.mark.parametrize(
    ("change", "there"),
    [
        ({}, True),
        ({"suite": "models", "batch": 32}, False),
        ({"suite": "training", "mode": "training"}, False),
        ({"suite": "ops", "level": "op", "subject": "soft_split"}, False),
    ],
    ids=["one image", "a batch", "training", "an operator"],
)
def test_graphs_are_for_the_latency_of_one_image(change, there):
    group = Group("model", "t2t_vit_7", 224, 1, "bf16", "inference", suite="latency")._replace(**change)
    graphs = {"upstream-graph", "t2t_fast-graph"}
    assert (graphs <= {provider.name for provider in providers(group, "cuda")}) == there
    assert not graphs & {provider.name for provider in providers(group, "cpu")}


def test_low_memory_is_a_row_of_the_performers_training():
    group = Group("module", "performer", 224, 256, "bf16", "training", suite="module")
    for each, device, there in (
        (group, "cuda", True),
        (group, "cpu", False),
        (group._replace(mode="inference"), "cuda", False),
        (group._replace(subject="transformer"), "cuda", False),
        (group._replace(level="model", subject="t2t_vit_7", suite="memory", batch=None), "cuda", True),
        (group._replace(level="model", subject="t2t_vit_t_14", suite="memory", batch=None), "cuda", False),
    ):
        assert ("t2t_fast-low" in {provider.name for provider in providers(each, device)}) == there


def test_goals_name_rows_that_exist():
    rows = {
        (group.id, provider.name)
        for device in ("cpu", "cuda")
        for suite in groups.SUITES
        for group in groups.groups(suite, device, quick=False)
        for provider in providers(group, device)
    }
    for goal in GOALS:
        names = {goal.ours, goal.against} - {None}
        assert {(goal.group, name) for name in names} <= rows, goal


@pytest.mark.parametrize("name", groups.OPERATORS)
def test_every_way_to_compute_an_operator_agrees_with_float64(name):
    """Every source of every operator, forward and gradients, as the harness checks them before it times anything."""
    subject = subjects.build(Group("op", name, 64, 1, "fp32", "training"), "cpu")
    # optional packages have tests of their own
    for source in sorted({provider.source for provider in providers(subject.group, "cpu") if not provider.package}):
        implementation = subject.make(source)
        forward = harness._forward(subject, Provider("made up", "", source), implementation, "cpu")
        out = forward(0)
        subject.backward(out)(out)
        error, _ = subject.check(out.detach(), implementation.gradients(0), implementation)
        assert error < 1e-5


def test_a_wrong_result_is_not_timed(monkeypatch):
    group = Group("op", "token_mlp-stage1", 64, 1, "fp32", "inference")
    subject = subjects.build(group, "cpu")
    make = subject.make

    def wrong(source):
        implementation = make(source)
        if source == "t2t_fast":
            function = implementation.function
            implementation.function = lambda **tensors: function(**tensors).index_fill(1, torch.tensor([5]), 0.0)
        return implementation

    subject.make = wrong
    monkeypatch.setattr(subjects, "build", lambda *_: subject)
    results = harness.measure(group, ["upstream", "t2t_fast"], "cpu", 0.0, lambda text: None)
    assert isinstance(results["t2t_fast"], AssertionError)
    assert "output is wrong by" in str(results["t2t_fast"])
    assert len(results["upstream"].times) == harness.MIN_ROUNDS


@pytest.mark.parametrize("level", ["op", "module"])
def test_a_later_visit_has_as_many_rounds_and_needs_no_truth(monkeypatch, level):
    group = Group(level, {"op": "token_mlp-stage1", "module": "performer"}[level], 64, 1, "fp32", "training", False)
    build, made = subjects.build, []

    def without_truth(*place):
        made.append(build(*place))
        monkeypatch.setattr(made[-1], "truth_of", lambda function: pytest.fail("asks for the truth"))
        return made[-1]

    monkeypatch.setattr(subjects, "build", without_truth)
    results = harness.measure(group, ["upstream", "t2t_fast"], "cpu", 0.0, lambda text: None, visits=3, rounds=2)
    assert [len(participant.times) for participant in results.values()] == [2, 2]
    for participant in results.values():
        facts = participant.facts
        assert facts["error"] is facts["gradient_error"] is None and "peak_bytes" not in facts
        module = participant.implementation.module
        assert module is None or module.training  # as it is timed at the first visit


def test_a_provider_that_does_not_fit_is_left_out_with_its_reason(monkeypatch):
    monkeypatch.setattr(harness, "available_bytes", lambda device: 1e6)
    group = Group("module", "transformer", 64, 1, "fp32", "inference")
    results = harness.measure(group, ["upstream", "t2t_fast"], "cpu", 0.0, lambda text: None)
    assert isinstance(results["upstream"], groups.LeftOut)
    assert results["t2t_fast"].times


def test_goals_are_judged_and_losses_stay():
    verdicts = {(g.what, g.verdict): g.measured for g in judge(made_run())}
    assert verdicts[("T2T module, performer, inference: t2t_fast faster than upstream", "reached")].startswith("4.00x")
    lost = "T2T module, performer, training: t2t_fast faster than upstream"
    assert verdicts[(lost, "not reached")].startswith("1.00x")
    saved = "T2T module, performer, training: t2t_fast fewer saved bytes than upstream"
    assert verdicts[(saved, "reached")] == "10.00x"

"""Models of other packages beside ours: their own truth, no floor of ours, and what is said where one is missing."""

import pytest
import torch

from benchmarks.measure import harness, rows
from benchmarks.suites import costs, groups, packages, subjects
from benchmarks.suites.groups import Group
from benchmarks.suites.providers import providers
from support.runs import FIRST


@pytest.mark.parametrize("name", packages.MODELS)
def test_context_models_are_measured_beside_ours_or_say_why_not(name):
    model = packages.MODELS[name]
    group = Group("model", model.beside[-1], 64, 1, "fp32", "inference", False, "models")
    assert name in {provider.name for provider in providers(group, "cpu")}
    try:
        subject = subjects.build(group, "cpu")
        implementation = subject.make(name)
    except groups.LeftOut as reason:
        assert "is not installed" in str(reason)
        pytest.skip(str(reason))
    with torch.no_grad():
        out = implementation.function(**implementation.inputs[0])
    error, _ = subject.check(out, {}, implementation)
    assert out.shape == (1, 1000) and error < 1e-4
    with pytest.raises(AssertionError, match="output is wrong"):
        subject.check(1.01 * out, {}, implementation)


def test_batch_norm_in_train_mode_must_be_finite_at_least():
    module = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    implementation = subjects.Implementation(module, [], {}, module, truth=(torch.ones(2, 3), {}))
    subject = subjects.Subject(FIRST, "cpu")
    subject.check(5 * torch.ones(2, 3), {}, implementation, noisy=True)
    with pytest.raises(AssertionError, match="wrong"):
        subject.check(torch.full((2, 3), float("nan")), {}, implementation, noisy=True)


def test_a_model_of_another_package_has_no_floor_of_ours():
    group = Group("model", "t2t_vit_14", 224, 2, "fp32", "inference", False, "models")
    cost = costs.t2t_vit("t2t_vit_14", 224, 4)
    limits = {"bytes_per_s": 1e10, "flop_per_s": {"fp32": 1e11}}
    facts = {**dict.fromkeys(rows.FACTS), "cost": cost}
    results = {
        name: harness.Participant(name, None, None, None, times=[1.0], facts=facts)
        for name in ("t2t_fast", "timm-resnet50")
    }
    found = rows.rows(group, results, limits, "cpu", {})
    ours = found["t2t_fast"]
    assert 0 < ours["floor_share"] == pytest.approx(ours["floor_s"])
    assert not {"floor_s", "floor_share", "gb_per_s", "tflop_per_s"} & found["timm-resnet50"].keys()
    assert found["timm-resnet50"]["images_per_s"] == 2


def test_a_missing_package_says_so(tmp_path, monkeypatch):
    with pytest.raises(groups.LeftOut, match="the package made-up is not installed"):
        packages.load("made-up", "made_up.part")
    (tmp_path / "broken_one.py").write_text("import another_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(groups.LeftOut, match=r"cannot be imported \(No module named 'another_that_is_missing'\)"):
        packages.load("broken-one", "broken_one")

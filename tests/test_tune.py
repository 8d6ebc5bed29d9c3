"""Tuning of launch parameters: its control flow, with stand-ins for the launch table and the timer."""

import json
from contextlib import contextmanager

import pytest
import torch

from benchmarks import tune
from t2t_fast.ops.performer_attention.launch import TABLE as real_launch


class FakeLaunch:
    """A launch table whose parameters are a number, the time that the pass takes; 13 does not compile."""

    def __init__(self, path):
        self.path = path
        self.current = {"keys": 5, "queries": 5, "keys_backward": 5}
        self.seen = []

    @property
    def passes(self):
        return tuple(self.current)

    def candidates(self, name, present):
        return [{"tokens": number} for number in (4, 5, 13, 7)]

    def chosen(self, name, architecture, dtype, width, features):
        return {"tokens": self.current[name]}

    def shape_class(self, dtype, width, features):
        return f"{dtype}-{width}-{features}"

    @contextmanager
    def override(self, name, parameters):
        before = self.current[name]
        self.current[name] = parameters["tokens"]
        try:
            yield
        finally:
            self.current[name] = before


class FakeProblem:
    name = "a problem"

    def __init__(self, launch):
        self.launch = launch

    def check(self, backward):
        if 13 in self.launch.current.values():
            raise RuntimeError("out of shared memory\nand a long trace")
        if 7 in self.launch.current.values() and backward:
            raise AssertionError("error 1.0e-01")

    def call(self, backward):
        self.launch.seen.append(dict(self.launch.current))


class FakeTimer:
    """A call takes as long as all its parameters say, and some noise more."""

    def __init__(self, launch, noise=0.0):
        self.launch, self.noise, self.turns = launch, noise, 0

    def turn(self, call, implementation, calls):
        call()
        self.turns += 1
        return sum(self.launch.seen[-1].values()) + self.noise * (self.turns % 3)


def _tune(tmp_path, noise=0.0, write=True):
    path = tmp_path / "launch.json"
    path.write_text('{"sm_80": {"keys": {"other": {"tokens": 1}}}, "sm_90": {"queries": {"other": {"tokens": 2}}}}')
    launch, lines = FakeLaunch(path), []
    timer = FakeTimer(launch, noise)
    sizes = ("bf16", 64, 32)
    changed = tune.tune(launch, "sm_90", FakeProblem(launch), sizes, launch.passes, timer, 5, lines.append, write)
    return changed, lines, json.loads(path.read_text()), launch


def test_tuning_writes_what_is_faster_for_this_architecture_only(tmp_path):
    changed, lines, table, launch = _tune(tmp_path)
    assert changed == 3
    assert table["sm_80"] == {"keys": {"other": {"tokens": 1}}}
    assert table["sm_90"]["queries"] == {"other": {"tokens": 2}, "bf16-64-32": {"tokens": 4}}
    assert table["sm_90"]["keys_backward"] == {"bf16-64-32": {"tokens": 4}}
    # a pass is tuned with what the passes before it have been given, and everything is undone in the end
    assert {"keys": 4, "queries": 4, "keys_backward": 4} in launch.seen
    assert launch.current == {"keys": 5, "queries": 5, "keys_backward": 5}
    assert lines[0] == "sm_90, a problem, keys:"
    assert "  tokens 4: 14000000.0 us, 1.071x" in lines
    assert "  tokens 5: 15000000.0 us, 1.000x (present)" in lines
    assert "  tokens 13: skipped, RuntimeError: out of shared memory" in lines
    assert "  tokens 7: skipped, AssertionError: error 1.0e-01" in lines
    assert [line for line in lines if "tokens 7: 17" in line]


def test_tuning_takes_nothing_within_the_noise(tmp_path):
    changed, lines, table, _ = _tune(tmp_path, noise=20.0)
    assert changed == 0
    assert table["sm_90"] == {"queries": {"other": {"tokens": 2}}}
    assert all(line.endswith("not beyond the noise") for line in lines if "once more" in line)


def test_tuning_can_leave_the_table_alone(tmp_path):
    changed, _, table, _ = _tune(tmp_path, write=False)
    assert changed == 3
    assert "keys" not in table["sm_90"]


def test_a_wrong_start_is_an_error(tmp_path):
    launch = FakeLaunch(tmp_path / "never-written.json")
    launch.current["keys"] = 13
    with pytest.raises(RuntimeError, match="out of shared memory"):
        tune.tune(launch, "sm_90", FakeProblem(launch), ("bf16", 64, 32), ["keys"], None, 5, print, True)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_tuned_problem_is_checked_against_float64(dtype):
    problem = tune.Problem(dtype, 32, 16, 50, 2, device="cpu", backend="aten")
    for backward in (False, True):
        problem.check(backward)
        problem.call(backward)
        problem.call(backward)
    problem.truth = problem.truth.roll(1, dims=1)
    problem.true_gradients = [gradient.roll(1, dims=1) for gradient in problem.true_gradients]
    for backward in (False, True):
        with pytest.raises(AssertionError, match="performer_attention"):
            problem.check(backward)


def test_the_launch_table_has_what_tuning_asks_for():
    sizes = (torch.bfloat16, 64, 32)
    for name in real_launch.passes:
        present = real_launch.chosen(name, "sm_90", *sizes)
        candidates = real_launch.candidates(name, present)
        assert len(candidates) > 1
        assert present.keys() == candidates[0].keys()
        with real_launch.override(name, candidates[0]):
            assert real_launch.chosen(name, "sm_90", *sizes) == candidates[0]
    chunked = real_launch.candidates("keys", {"features": 32})
    assert {each["features"] for each in chunked} == {0, 32} and len(chunked) == 2 * len(candidates)
    json.loads(real_launch.path.read_text())
    assert isinstance(real_launch.shape_class(*sizes), str)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_without_a_gpu_says_so(capsys):
    assert tune.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_tuning_a_pass_on_a_gpu(tmp_path, monkeypatch, capsys):
    table = tmp_path / "launch.json"
    table.write_text("{}")
    few = real_launch.candidates("keys", {"features": 0})[:3]
    monkeypatch.setattr(real_launch, "path", table)
    monkeypatch.setattr(real_launch, "candidates", lambda name, present: few)
    sizes = ["--length", "300", "--batch", "4", "--rounds", "7"]
    assert tune.main(["--dtypes", "bf16", "--passes", "keys", "queries_backward", *sizes]) == 0
    assert capsys.readouterr().out.count("(present)") == 2
    json.loads(table.read_text())

"""Tuning of launch parameters: its control flow, with stand-ins for table and timer, and with every operator's own."""

import json
import time
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import tune
from t2t_fast.ops._common import triton_runtime

TABLES = {op: tune.table(op) for op in tune.STAGES}
BACKWARD = {"keys_backward"}


class FakeTable:
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

    def shape_class(self, name, dtype, width, features):
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
    """A call takes as long as all its parameters say, and some noise more."""

    name = "a problem"

    def __init__(self, table, noise=0.0):
        self.table, self.noise, self.turns = table, noise, 0

    def passes(self):
        return {name: (name in BACKWARD, "sm_90", "bf16", 64, 32) for name in self.table.passes}

    def check(self, backward):
        if 13 in self.table.current.values():
            raise RuntimeError("out of shared memory\nand a long trace")
        if 7 in self.table.current.values() and backward:
            raise AssertionError("error 1.0e-01")

    def seconds(self, backward):
        self.table.seen.append(dict(self.table.current))
        self.turns += 1
        return sum(self.table.current.values()) + self.noise * (self.turns % 3)


@pytest.fixture
def tuned(tmp_path, capsys):
    """Function that tunes the stand-in: the keys with better parameters, the printed lines, the file, the table."""

    def run(noise=0.0, **options):
        path = tmp_path / "launch.json"
        path.write_text('{"sm_80": {"keys": {"other": {"tokens": 1}}}, "sm_90": {"queries": {"other": {"tokens": 2}}}}')
        table = FakeTable(path)
        found = tune.tune(FakeProblem(table, noise), 5, **options)
        return found, capsys.readouterr().out.splitlines(), json.loads(path.read_text()), table

    return run


def keys(*names):
    return {("sm_90", name, "bf16-64-32") for name in names}


def test_tuning_writes_what_is_faster_for_this_architecture_only(tuned):
    found, lines, rows, table = tuned()
    assert found == {key: {"tokens": 4} for key in keys("keys", "queries", "keys_backward")}
    assert rows["sm_80"] == {"keys": {"other": {"tokens": 1}}}
    assert rows["sm_90"]["queries"] == {"other": {"tokens": 2}, "bf16-64-32": {"tokens": 4}}
    assert rows["sm_90"]["keys_backward"] == {"bf16-64-32": {"tokens": 4}}
    # a pass is tuned with the better parameters of the passes before it; all overrides are undone in the end
    assert {"keys": 4, "queries": 4, "keys_backward": 4} in table.seen
    assert table.current == {"keys": 5, "queries": 5, "keys_backward": 5}
    assert lines[0] == "sm_90, a problem, keys:"
    assert "  tokens 4: 14000000.0 us, 1.071x" in lines
    assert "  tokens 5: 15000000.0 us, 1.000x (present)" in lines
    assert "  tokens 13: skipped, RuntimeError: out of shared memory" in lines
    assert "  tokens 7: skipped, AssertionError: error 1.0e-01" in lines
    assert [line for line in lines if "tokens 7: 17" in line]


def test_tuning_takes_nothing_within_the_noise(tuned):
    found, lines, rows, _ = tuned(noise=20.0)
    assert found == dict.fromkeys(keys("keys", "queries", "keys_backward"))
    assert rows["sm_90"] == {"queries": {"other": {"tokens": 2}}}
    assert all(line.endswith("not beyond the noise") for line in lines if "once more" in line)


def test_tuning_leaves_out_what_it_has_measured(tuned):
    """Two stages may ask for the same parameters."""
    found, lines, rows, _ = tuned(done=keys("keys"))
    assert found.keys() == keys("queries", "keys_backward") and "keys" not in rows["sm_90"]
    assert "a problem, keys: measured before" in lines


def test_tuning_starts_nothing_without_time(tuned):
    found, lines, _, _ = tuned(deadline=time.monotonic() - 1)
    assert found == {}
    assert lines == [f"a problem, {name}: no time left" for name in ("keys", "queries", "keys_backward")]


def test_wrong_present_parameters_are_an_error(tmp_path):
    table = FakeTable(tmp_path / "never-written.json")
    table.current["keys"] = 13
    with pytest.raises(RuntimeError, match="out of shared memory"):
        tune.tune(FakeProblem(table), 5)


QUICK = {("performer_attention", "bf16"), ("soft_split_linear", "fp32"), ("token_mlp", "bf16")}


@pytest.mark.parametrize(
    ("op", "dtype"),
    [
        pytest.param(op, dtype, marks=[] if (op, dtype) in QUICK else pytest.mark.slow)
        for op, dtype in product(TABLES, ("fp32", "bf16"))
    ],
)
def test_the_tuned_problem_is_checked_against_float64(op, dtype):
    problem = tune.Problem(op, "stage1", 16, 2, dtype, device="cpu", backend="aten")
    for backward in (False, True):
        problem.check(backward)
        problem.call(backward)
    for subject, _ in problem._sides:
        out, gradients = subject.truth
        subject.truth = (out.flip(1), {name: gradient.flip(0) for name, gradient in gradients.items()})
    for backward in (False, True):
        with pytest.raises(AssertionError, match=op):
            problem.check(backward)


SIZES = {
    "performer_attention": (64, 32),
    "soft_split_linear": (64, 192),
    "token_mlp": (64, 64),
    "performer_layer": (64, 32, 64),
    "add_layer_norm": (384,),
    "layer_norm_mlp": (1152, 384),
}


def test_every_operator_with_a_table_is_tuned():
    folders = Path(tune.t2t_fast.__file__).parent / "ops"
    assert set(TABLES) == {path.parent.parent.name for path in folders.glob("*/triton/launch.py")}


@pytest.mark.parametrize("op", TABLES)
def test_a_launch_table_has_what_tuning_asks_for(op):
    table, sizes = TABLES[op], (torch.bfloat16, *SIZES[op])
    for name in table.passes:
        present = table.chosen(name, "sm_90", *sizes)
        candidates = table.candidates(name, present)
        assert len(candidates) > 1
        for candidate in candidates:
            assert candidate.keys() == present.keys()
        with table.override(name, candidates[0]):
            assert table.chosen(name, "sm_90", *sizes) == candidates[0]
        assert isinstance(table.shape_class(name, *sizes), str)
    json.loads(table.path.read_text())


def test_candidates_of_the_attention_with_chunks_and_without():
    table = TABLES["performer_attention"]
    chunked = table.candidates("keys", {"features": 32})
    assert {each["features"] for each in chunked} == {0, 32}
    assert len(chunked) == 2 * len(table.candidates("keys", {"features": 0}))


interpreted = pytest.mark.skipif(not triton_runtime.INTERPRETED, reason="not under TRITON_INTERPRET=1")


@pytest.mark.interpret
@interpreted
def test_the_passes_of_a_problem():
    """The first stage's image wants no gradient, the second's tokens do."""
    found = {}
    for stage in ("stage1", "stage2"):
        problem = tune.Problem("soft_split_linear", stage, 16, 1, "fp32", device="cpu")
        found[stage] = {name: key[0] for name, key in problem.passes().items()}
    assert found["stage1"].items() >= {"forward": False, "weight": True}.items()
    assert found["stage2"] == found["stage1"] | {"image": True, "scalars": True}


TUNED = {
    "performer_attention": "queries",
    "soft_split_linear": "weight",
    "token_mlp": "token_mlp",
    "performer_layer": "read_out_mlp",
    "add_layer_norm": "layer_norm_backward",
    "layer_norm_mlp": "fc2_add",
}


@pytest.mark.interpret
@interpreted
@pytest.mark.parametrize(
    ("op", "name"),
    [
        pytest.param(op, name, id=op, marks=pytest.mark.slow if op == "performer_layer" else [])
        for op, name in TUNED.items()
    ],
)
def test_tuning_the_real_kernels(op, name, tmp_path, monkeypatch, capsys):
    """From the passes of a call to the written table; only the times are made up: a smaller tile is faster."""
    problem, path = tune.Problem(op, "stage1", 16, 1, "fp32", device="cpu"), tmp_path / "launch.json"
    table, passes = problem.table, problem.passes()
    path.write_text("{}")

    def seconds(backward):
        """As many as the tokens of the call's tiles, over all passes."""
        tokens, chosen = [], table.chosen

        def note(name, *key):
            parameters = chosen(name, *key)
            tokens.append(parameters["tokens"])
            return parameters

        with monkeypatch.context() as patch:
            patch.setattr(table, "chosen", note)
            problem.call(backward)
        return float(sum(tokens))

    monkeypatch.setattr(problem, "seconds", seconds)
    monkeypatch.setattr(problem, "passes", lambda: {name: passes[name]})
    monkeypatch.setattr(table, "path", path)
    monkeypatch.setattr(table, "candidates", lambda name, present: [{**present, "tokens": 16}])
    _, architecture, *sizes = passes[name]
    present = table.chosen(name, architecture, *sizes)
    better, shape_class = {**present, "tokens": 16}, table.shape_class(name, *sizes)
    with table.override(name, {"tokens": 32}):
        assert tune.tune(problem, 1) == {(architecture, name, shape_class): better}
    assert json.loads(path.read_text()) == {"cpu": {name: {shape_class: better}}}
    assert table.chosen(name, architecture, *sizes) == present
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"cpu, {problem.name}, {name}:"
    assert sum("accepted" in line for line in lines) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_without_a_gpu_says_so(capsys):
    assert tune.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("op", TABLES)
def test_tuning_on_a_gpu(op, tmp_path, monkeypatch, capsys):
    table, path = TABLES[op], tmp_path / "launch.json"
    path.write_text("{}")
    candidates = table.candidates
    monkeypatch.setattr(table, "path", path)
    monkeypatch.setattr(table, "candidates", lambda name, present: candidates(name, present)[:3])
    assert tune.main(["--op", op, "--dtypes", "bf16", "--size", "64", "--batch", "4", "--rounds", "7"]) == 0
    assert capsys.readouterr().out.count("(present)") >= len(table.passes)
    json.loads(path.read_text())

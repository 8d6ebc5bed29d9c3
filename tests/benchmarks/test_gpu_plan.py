"""The plan of ``python -m benchmarks.gpu``: its parts, what it compiles, and a run of it on the processor."""

import subprocess
import sys

import pytest
import torch

from benchmarks.gpu import compile as gpu_compile
from benchmarks.gpu import plan as gpu_plan
from benchmarks.gpu import run as gpu
from benchmarks.measure import harness, run_file
from benchmarks.suites.groups import Group, groups
from benchmarks.suites.providers import BY_NAME
from support import ROOT
from support.gpu_visit import FakeGpu, archived, summary_in


@pytest.mark.parametrize("quick", [True, False], ids=["quick", "default"])
def test_gpu_plan(tmp_path, quick, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    device = gpu.Gpu()
    device.architecture, device.capability = (lambda: "sm_90"), (lambda: "9.0")
    parts = gpu.plan(device, tmp_path, quick, 4)
    assert len({part.name for part in parts}) == len(parts)
    run = [part for part in parts if part.command is not None]
    stages = dict.fromkeys(part.stage.name if part.stage else part.name for part in run)
    assert list(stages) == ["build", "compile", "headline", "checks", *([] if quick else ["compiled", "suites"])]
    own = ["env", "TORCH_CUDA_ARCH_LIST=9.0", sys.executable, "setup.py", "build_ext", "--inplace"]
    assert run[0].command(45.0) == own
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert gpu.plan(device, tmp_path, quick, 4)[0].command(45.0) == own[2:]
    shares = [part.command(50.0) for part in run if part.name.startswith("compile-")]
    assert [words[words.index("--share") + 1] for words in shares] == ["1/4", "2/4", "3/4", "4/4"]
    headline = next(part for part in run if part.name == "headline").command(300.0)
    compiled = {*shares[0][shares[0].index("--suite") + 1 :]} if quick else {"all"}
    measured = {*headline[headline.index("--suite") + 1 : headline.index("--filter")]} if quick else {"all"}
    assert compiled == measured
    assert headline[1:7] == ["-m", "benchmarks", "--device", "cuda", "--report", str(tmp_path / "headline")]
    assert headline[headline.index("--max-seconds") + 1] == "270"
    assert "--quick" in headline
    # what has no limit finds time, even if all others need theirs
    total = gpu_plan.TOTAL_SECONDS[quick]
    assert total - gpu_plan.END_SECONDS - gpu._reserved(run) >= gpu_plan.WORTH_STARTING
    assert total <= (170 if quick else 480)


def test_gpu_plan_compiles_what_the_headline_rows_launch():
    """Each call once, in one of the shares."""
    found = gpu_compile.calls(gpu_plan.QUICK_SUITES, "cuda")
    wanted = {group.id for suite in gpu_plan.QUICK_SUITES for group in groups(suite, "cuda", True)}
    assert {group.id for group, _ in found} == wanted
    assert {provider.name for _, provider in found} >= {"t2t_fast", "t2t_fast-low"}
    assert not [provider.name for _, provider in found if provider.compiled or provider.captured]
    shared = [call for number in (1, 2, 3) for call in found[gpu_compile._share(f"{number}/3")]]
    assert sorted(map(str, shared)) == sorted(map(str, found))


def test_gpu_compile_makes_first_calls_forward_and_backward(monkeypatch, capsys):
    """On this processor; what runs out of memory is left to the rows, what fails is told, the rest goes on."""
    small, failing, large = (
        (Group("op", "token_mlp-stage1", 32, batch, "fp32", "training", False, "ops"), BY_NAME["aten"])
        for batch in (1, 2, 3)
    )
    prepare, made = harness.prepare, []

    def watched(subject, *arguments, **named):
        if subject.group.batch == 2:
            raise ValueError("no kernel")
        if subject.group.batch == 3:
            raise torch.OutOfMemoryError("full")
        made.append(prepare(subject, *arguments, **named))
        return made[-1]

    monkeypatch.setattr(harness, "prepare", watched)
    monkeypatch.setattr(gpu_compile, "calls", lambda suites, device: [failing, large, small])
    assert gpu_compile.main(["--device", "cpu", "--share", "2/2"]) == 0
    assert gpu_compile.main(["--device", "cpu"]) == 1
    printed = capsys.readouterr().out.splitlines()[1:]
    assert printed == [
        "op-token_mlp-stage1-32px-b2-fp32-training, aten: ValueError: no kernel",
        "op-token_mlp-stage1-32px-b3-fp32-training, aten: too little memory beside the other processes",
        "op-token_mlp-stage1-32px-b1-fp32-training, aten: ready",
    ]
    assert made[0].facts["error"] is None and made[0].facts["first_call_s"] > 0
    with pytest.raises(SystemExit):
        gpu_compile.main(["--share", "3/2"])
    assert "must be like 2/8, got '3/2'" in capsys.readouterr().err


def test_gpu_plan_knows_every_operator_and_test_file():
    from t2t_fast.testing import CASES

    verified = [op for operators in gpu_plan.VERIFIED.values() for op in operators]
    assert sorted(verified) == sorted(["model", *CASES])
    assert all(
        (ROOT / "tests" / file).exists() for file, _ in (*gpu_plan.TESTS.values(), *gpu_plan.QUICK_TESTS.values())
    )


def _small(parts):
    """The plan's parts with boxes for two CPU cores and a minute; of the checks, one of each kind comes first."""
    boxes = {"build": 150, "headline": 150, "compiled": 2, "suites": 2}
    parts = [
        part._replace(
            seconds=boxes.get(part.name, 12),
            stage=part.stage and gpu.Stage(part.stage.name, 12, len(KINDS)),
        )
        for part in parts
    ]
    named = {part.name: part for part in parts}
    measure = named["headline"].command
    # rows of a few seconds: those of its first suite take longer than its box where the machine is busy
    named["headline"] = named["headline"]._replace(command=lambda limit: [*measure(limit), "--suite", "latency"])
    order = ["build", "compile-1", "headline", *KINDS]
    return [named[name] for name in [*order, *(name for name in named if name not in order)]]


KINDS = ("verify-others-bf16", "tests-native", "neutrality", "half-precision", "stability", "kernels")


@pytest.mark.slow
def test_gpu_plan_on_the_processor(tmp_path, monkeypatch):
    """Its own commands, each at least begun; the build and the headline rows for real."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for each other beside other tests take minutes
    out = tmp_path / "run"
    status = ["git", "status", "--porcelain", "t2t_fast", "csrc"]
    before = subprocess.run(status, cwd=ROOT, capture_output=True, text=True).stdout
    code = gpu.main(["--out", str(out), "--total", "420"], FakeGpu(), lambda *place: _small(gpu.plan(*place)))
    summary, parts = summary_in(out)
    results = {name: part["result"] for name, part in parts.items()}
    assert set(results.values()) <= {"ok", "cut off at its limit", "no time left"}, results
    assert code == (0 if set(results.values()) <= {"ok", "no time left"} else 1)
    assert results["build"] == "ok" and summary["finished"]
    for name, part in parts.items():
        assert "reason" in part if results[name] == "no time left" else (out / part["log"]).exists(), name
    assert "no time left" not in {results[name] for name in ("compile-1", "compiled", "suites", *KINDS)}
    run = run_file.read(out / "headline" / "rows.json")
    assert run.environment["device"] and "cpu" in run.environment["command"]
    assert any(row["provider"] == "t2t_fast" and min(row["times"]) > 0 for row in run.rows)
    assert summary["suites"]["headline"]["rows"] == len(run.rows)
    page = (out / "summary.md").read_text()
    assert all(name in page or f"| {name.partition('-')[0]}-* (" in page for name in results) and "## headline" in page
    files = {path for path in out.rglob("*") if path.is_file()}
    assert archived(out) == {f"run/{path.relative_to(out)}": path.read_bytes() for path in files}
    # the build in place left the checkout as it was
    assert subprocess.run(status, cwd=ROOT, capture_output=True, text=True).stdout == before
    native = "from t2t_fast import _extension; assert _extension.operators_error() is None; import t2t_fast._C"
    subprocess.run([sys.executable, "-c", native], cwd=ROOT, check=True)

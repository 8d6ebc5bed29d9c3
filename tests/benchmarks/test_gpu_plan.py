"""The plan of ``python -m benchmarks.gpu``: its parts, what it compiles, and a run of it on the CPU."""

import subprocess
import sys

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import compile as gpu_compile
from benchmarks.gpu import plan as gpu_plan
from benchmarks.measure import harness, run_file
from benchmarks.suites.groups import Group, groups
from benchmarks.suites.providers import BY_NAME
from support import ROOT
from support.gpu_visit import archived, summary_in


@pytest.mark.parametrize("quick", [True, False], ids=["quick", "default"])
def test_gpu_plan(tmp_path, quick, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    stages = gpu_plan.plan(tmp_path, quick, 4)
    assert [stage.name for stage in stages] == [
        *("build", "compile", "headline", "checks"),
        *([] if quick else ["compiled", "suites"]),
    ]
    parts = {part.name: part for stage in stages for part in stage.parts}
    assert len(parts) == sum(len(stage.parts) for stage in stages)
    own = ["env", "TORCH_CUDA_ARCH_LIST=9.0", sys.executable, "setup.py", "build_ext", "--inplace"]
    assert parts["build"].command == own
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert gpu_plan.plan(tmp_path, quick, 4)[0].parts[0].command == own[2:]
    shares = [part.command for part in parts.values() if part.name.startswith("compile-")]
    assert [words[-2:] for words in shares] == [[str(share), "4"] for share in (1, 2, 3, 4)]
    headline = parts["headline"].words(300.0)
    compiled = {*shares[0][shares[0].index("--suite") + 1 : -3]} if quick else {"all"}
    measured = {*headline[headline.index("--suite") + 1 : headline.index("--filter")]} if quick else {"all"}
    assert compiled == measured
    place = ["--device", "cuda", "--report", str(tmp_path / "headline"), "--resume", "--quick"]
    assert headline[1:9] == ["-m", "benchmarks", *place]
    assert headline[-2:] == ["--max-seconds", "270"]
    assert quick or parts["kernels"].command[3:5] == ["--architecture", "sm_90"]
    # the part without a limit has time left even if all other stages use theirs
    (free,) = [part for stage in stages if stage.seconds is None for part in stage.parts]
    total = gpu_plan.TOTAL_SECONDS[quick]
    assert total - gpu_plan.END_SECONDS - sum(stage.seconds or 0 for stage in stages) > free.least
    assert total <= (170 if quick else 480)


def test_gpu_plan_compiles_what_the_headline_rows_launch():
    found = gpu_compile.calls(gpu_plan.QUICK_SUITES, "cuda")
    wanted = {group.id for suite in gpu_plan.QUICK_SUITES for group in groups(suite, "cuda", True)}
    assert {group.id for group, _ in found} == wanted
    assert {provider.name for _, provider in found} >= {"t2t_fast", "t2t_fast-low"}
    assert not [provider.name for _, provider in found if provider.compiled or provider.captured]


def test_gpu_compile_makes_first_calls_forward_and_backward(monkeypatch, capsys):
    """On the CPU: running out of memory is no failure; other errors are reported, and the remaining calls are made."""
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
    assert gpu_compile.main(["--device", "cpu", "--share", "2", "2"]) == 0
    assert gpu_compile.main(["--device", "cpu"]) == 1
    printed = capsys.readouterr().out.splitlines()[1:]
    assert printed == [
        "op-token_mlp-stage1-32px-b2-fp32-training, aten: ValueError: no kernel",
        "op-token_mlp-stage1-32px-b3-fp32-training, aten: too little memory beside the other processes",
        "op-token_mlp-stage1-32px-b1-fp32-training, aten: ready",
    ]
    assert made[0].facts["error"] is None and made[0].facts["first_call_s"] > 0


def test_gpu_plan_knows_every_operator_and_test_file():
    from t2t_fast.testing import CASES

    verified = [op for operators in gpu_plan.VERIFIED.values() for op in operators]
    assert sorted(verified) == sorted(["model", *CASES])
    assert all(
        (ROOT / "tests" / file).exists() for file, _ in (*gpu_plan.TESTS.values(), *gpu_plan.QUICK_TESTS.values())
    )


KINDS = ("verify-others-bf16", "tests-native", "neutrality", "half-precision", "stability", "kernels")


def _small(stages):
    """The plan's stages with short limits for two CPU cores; one check of each kind comes first."""
    limits = {"build": 150, "compile": 12, "headline": 150, "checks": 12, "compiled": 2, "suites": 2}
    small = {stage.name: stage._replace(seconds=limits[stage.name]) for stage in stages}
    small["checks"].parts.sort(key=lambda part: part.name not in KINDS)
    small["checks"] = small["checks"]._replace(jobs=len(KINDS))
    # short rows: on a busy machine those of the first suite take longer than the limit
    small["headline"].parts[0].command.extend(["--suite", "latency"])
    return list(small.values())


@pytest.mark.slow
def test_gpu_plan_on_the_processor(tmp_path, monkeypatch):
    """Starts the plan's own commands; the build must succeed, and headline rows must be measured."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # on shared cores, threads that wait for each other take minutes
    monkeypatch.setattr(gpu_plan.Part, "least", 1)
    out = tmp_path / "run"
    status = ["git", "status", "--porcelain", "t2t_fast", "csrc"]
    before = subprocess.run(status, cwd=ROOT, capture_output=True, text=True).stdout
    code = gpu.main(["--out", str(out), "--total", "420"], "cpu", lambda *place: _small(gpu.plan(*place)))
    summary, parts = summary_in(out)
    results = {name: part["result"] for name, part in parts.items()}
    assert set(results.values()) <= {"ok", "cut off at its limit", "no time left"}, results
    assert code == (0 if set(results.values()) <= {"ok", "no time left"} else 1)
    assert results["build"] == "ok" and summary["finished"]
    for number, name in enumerate(parts, 1):
        assert (out / f"{number:02d}-{name}.log").exists() == (results[name] != "no time left"), name
    assert "no time left" not in {results[name] for name in ("compile-1", "compiled", "suites", *KINDS)}
    run = run_file.read(out / "headline" / "rows.json")
    assert run.environment["device"] and "cpu" in run.environment["command"]
    assert any(row["provider"] == "t2t_fast" and min(row["times"]) > 0 for row in run.rows)
    assert summary["suites"]["headline"]["measured"] == len(run.rows)
    page = (out / "summary.md").read_text()
    assert all(f"| {name} |" in page for name in results) and "## headline" in page
    files = {path for path in out.rglob("*") if path.is_file()}
    assert archived(out) == {f"run/{path.relative_to(out)}": path.read_bytes() for path in files}
    # the in-place build did not change the checkout
    assert subprocess.run(status, cwd=ROOT, capture_output=True, text=True).stdout == before
    native = "from t2t_fast import _extension; assert _extension.operators_error() is None; import t2t_fast._C"
    subprocess.run([sys.executable, "-c", native], cwd=ROOT, check=True)

"""``make gpu``: its control flow, with a stand-in for the device, and what it says where there is none."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from support.rows import ENVIRONMENT, made_run

ROOT = Path(__file__).resolve().parent.parent


class FakeGpu:
    def __init__(self, obstacle=None):
        self._obstacle = obstacle

    def obstacle(self):
        return self._obstacle

    def describe(self):
        return {"gpu": "an imagined one", "driver": "1.0"}

    def run_name(self):
        return "never used: --out is given"


def _say(text, code=0):
    return lambda seconds: [sys.executable, "-c", f"print({text!r}); raise SystemExit({code})"]


def _sleep(seconds):
    return lambda limit: [sys.executable, "-c", f"import time; print('begun', flush=True); time.sleep({seconds})"]


def test_gpu_run_goes_on_after_a_failure_and_a_time_out(tmp_path, capsys):
    def plan(out, quick):
        assert quick
        return [
            gpu.Part("build", 30, _say("built")),
            gpu.Part("tests", 30, _say("one failed", 1)),
            gpu.Part("verify", 2, _sleep(60)),
            gpu.Part("headline", None, lambda seconds: _say(f"had {seconds:.0f} s")(seconds)),
        ]

    started = time.monotonic()
    assert gpu.main(["--out", str(tmp_path), "--quick"], FakeGpu(), plan) == 1
    assert time.monotonic() - started < 30
    summary_file = json.loads((tmp_path / "summary.json").read_text())
    assert summary_file["environment"]["gpu"] == "an imagined one"
    results = {part["part"]: (part["result"], part["code"]) for part in summary_file["parts"]}
    assert results == {
        "build": ("ok", 0),
        "tests": ("failed", 1),
        "verify": ("cut off at its limit", None),
        "headline": ("ok", 0),
    }
    assert summary_file["finished"]
    assert (tmp_path / "2-tests.log").read_text() == "one failed\n"
    assert (tmp_path / "3-verify.log").read_text() == "begun\n"
    assert str(ROOT) not in (tmp_path / "summary.json").read_text()
    assert "had" in capsys.readouterr().out


def test_gpu_run_that_is_cut_off_keeps_its_finished_parts(tmp_path):
    def interrupt(seconds):
        raise KeyboardInterrupt

    parts = [gpu.Part("build", 30, _say("built")), gpu.Part("tests", 30, interrupt)]
    with pytest.raises(KeyboardInterrupt):
        gpu.run(parts, tmp_path, {})
    assert [part["part"] for part in json.loads((tmp_path / "summary.json").read_text())["parts"]] == ["build"]


def test_gpu_run_starts_nothing_without_time(tmp_path):
    summary_file = {}
    parts = [gpu.Part("build", 30, _say("built")), gpu.Part("suites", None, _say("never"))]
    # not a failure: what was started succeeded
    assert gpu.run(parts, tmp_path, summary_file, total=gpu.WORTH_STARTING)
    assert [part["result"] for part in summary_file["parts"]] == ["ok", "no time left"]
    assert not (tmp_path / "2-suites.log").exists()


def test_gpu_run_puts_the_goals_into_its_summary(tmp_path):
    (tmp_path / "headline").mkdir()
    content = {"environment": ENVIRONMENT, "rows": made_run(), "left_out": []}
    (tmp_path / "headline" / "rows.json").write_text(json.dumps(content))
    assert gpu.run([gpu.Part("build", 30, _say("built"))], tmp_path, {})
    headline = json.loads((tmp_path / "summary.json").read_text())["suites"]["headline"]
    assert headline["rows"] == 7
    assert {goal["verdict"] for goal in headline["goals"]} == {"reached", "not reached"}


@pytest.mark.parametrize("quick", [True, False], ids=["quick", "default"])
def test_gpu_plan(tmp_path, quick):
    parts = gpu.plan(tmp_path, quick)
    fixed = ["build", "tests", "verify", "half-precision", "stability", "kernels", "neutrality", "headline"]
    assert [part.name for part in parts] == fixed + ([] if quick else ["suites"])
    headline = parts[7].command(300.0)
    assert headline[1:5] == ["-m", "benchmarks", "--device", "cuda"]
    assert headline[-3:] == ["--max-seconds", "225", "--quick"]
    assert sum(part.seconds or 0 for part in parts) < gpu.TOTAL_SECONDS < 600


def test_gpu_run_says_in_one_line_why_it_cannot_run(capsys):
    assert gpu.main([], FakeGpu("no such device")) == 1
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err == "python -m benchmarks.gpu: cannot run here: no such device\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_run_on_this_machine_is_one_line():
    found = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (1, "")
    assert len(found.stderr.splitlines()) == 1
    assert "cannot run here: " in found.stderr


def test_gpu_run_without_torch_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('not installed')\n")
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1
    assert found.stderr == "python -m benchmarks.gpu: cannot run here: torch cannot be imported (not installed)\n"

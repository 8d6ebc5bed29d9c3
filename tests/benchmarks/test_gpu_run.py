"""``python -m benchmarks.gpu``: a run whose parts fail, hang, are killed or have no time left, and its summary."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import process as gpu_process
from benchmarks.gpu import summary as gpu_summary
from benchmarks.gpu.plan import END_SECONDS, Stage
from benchmarks.measure import machine, run_file
from support import ROOT
from support.gpu_visit import (
    alone,
    archived,
    python_part,
    results_in,
    run_plan,
    run_stages,
    say,
    sleep,
    summary_in,
)
from support.rows import ENVIRONMENT, made_run


def test_gpu_run_goes_on_after_a_failure_and_a_time_out(tmp_path, capsys):
    out = tmp_path / "run"
    stages = [
        alone(say("build", "built")),
        alone(say("other", f"one failed in {ROOT}", 1)),
        alone(sleep("verify", 60), 1.5),
        alone(say("last", "good")),
    ]
    started = time.monotonic()
    assert run_plan(out, stages, "--quick") == 1
    assert time.monotonic() - started < 30
    assert results_in(out) == {"build": "ok", "other": "failed", "verify": "cut off at its limit", "last": "ok"}
    summary, _ = summary_in(out)
    assert summary["finished"] and summary["quick"] and summary["environment"]["torch"] == torch.__version__
    assert (out / "02-other.log").read_text() == "one failed in .\n"
    assert (out / "03-verify.log").read_text().startswith("begun\n")
    assert str(ROOT) not in (out / "summary.json").read_text()
    page = (out / "summary.md").read_text()
    assert "**0 of 0 checks passed. FAILED: other.**" in page
    assert "| build | ok | 0." in page and "| built |" in page and "| exit code 1: one failed in . |" in page
    assert "build: started, at most 30 s, 01-build.log" in capsys.readouterr().out
    files = {path for path in out.rglob("*") if path.is_file()}
    assert archived(out) == {f"run/{path.relative_to(out)}": path.read_bytes() for path in files}


def test_gpu_run_archives_its_results_on_sigterm(tmp_path):
    """On SIGTERM, as sent by ``timeout``, the child ends, and its result and log are archived."""
    out, log = tmp_path / "run", tmp_path / "run" / "02-tests.log"

    def tell():
        while not (log.exists() and log.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    told = threading.Thread(target=tell)
    told.start()
    assert run_plan(out, [alone(say("build", "built")), alone(sleep("tests", 60)), alone(say("more", ""))]) == 130
    told.join()
    assert results_in(out) == {"build": "ok", "tests": "interrupted", "more": "not run"}
    assert "did not finish" in (out / "summary.md").read_text()
    assert archived(out)["run/02-tests.log"].startswith(b"begun\n")
    assert json.loads(archived(out)["run/summary.json"]) == summary_in(out)[0]


def _ended(pid):
    """Whether a process is gone or a zombie."""
    state = Path("/proc", pid, "stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_gpu_part_that_ignores_signals_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_process, "GRACE", 0.5)
    deaf = "[signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM)]"
    child = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import signal; {deaf}; "
    child += "import time; time.sleep(60)']).pid, flush=True)"
    stages = [alone(sleep("deaf", 60, f"{deaf}; {child}"), 1.5), alone(python_part("leaving", child))]
    started = time.monotonic()
    assert not run_stages(stages, tmp_path)
    assert 2 <= time.monotonic() - started < 10
    assert results_in(tmp_path) == {"deaf": "cut off at its limit", "leaving": "ok"}
    for log in ("01-deaf.log", "02-leaving.log"):
        assert _ended((tmp_path / log).read_text().split()[0])


def test_gpu_stage_runs_its_parts_side_by_side(tmp_path):
    """Two parts run at a time: the first two wait for each other, the last has no time left."""
    meet = "import pathlib, time; own, other = map(pathlib.Path, {}); own.touch()\n"
    meet += "while not other.exists(): time.sleep(.1)"
    places = [str(tmp_path / name) for name in "ab"]
    parts = [
        python_part("a", meet.format(places)),
        python_part("b", meet.format(places[::-1])),
        sleep("c", 60),
        sleep("d", 60),
        say("e", "never"),
    ]
    assert not run_stages([Stage("checks", 3, parts, 2), alone(say("after", "begun"))], tmp_path)
    results = ["ok", "ok", "cut off at its limit", "cut off at its limit", "no time left", "ok"]
    assert list(results_in(tmp_path).values()) == results
    assert "more than 1 s are needed" in summary_in(tmp_path)[1]["e"]["said"]
    assert not (tmp_path / "05-e.log").exists()


@pytest.mark.parametrize(("total", "gone", "said"), [(140, 0, "70"), (200, 60, "70"), (80, 0, None)])
def test_gpu_stage_without_a_limit_reserves_later_stages_time(tmp_path, total, gone, said):
    """No group of rows starts in the stage's last 30 seconds; time counts from the start of the process."""
    rows = python_part("headline", "import sys; print(sys.argv[1:])", rows=True)
    checks = Stage("checks", 30, [say("a", ""), say("b", "")], 2)
    stages = [alone(rows, None), checks, alone(say("c", ""), 10)]
    started = time.monotonic() - gone
    # a part without time is no failure: all started parts succeeded
    assert run_stages(stages, tmp_path, END_SECONDS + total, started)
    summary, lines = summary_in(tmp_path)
    assert gone <= summary["seconds"] < gone + 10
    if said is None:
        assert lines["headline"]["result"] == "no time left"
        assert lines["headline"]["said"] == "more than 50 s are needed, 40 s were left"
    else:
        assert lines["headline"]["said"] == f"['--max-seconds', '{said}']"


@pytest.mark.parametrize("most", [60_000, 20_000])
def test_gpu_archive_leaves_out_large_files(tmp_path, monkeypatch, most):
    """Logs are left out before other large files; random bytes cannot be compressed."""
    monkeypatch.setattr(gpu_summary, "ARCHIVE_BYTES", most)
    for name, size in (("a.log", 30_000), ("b.log", 40_000), ("c.png", 25_000), ("rows/rows.json", 15_000)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(os.urandom(size))
    run_stages([alone(say("build", "built"))], tmp_path)
    left_out = {60_000: ["b.log", "a.log"], 20_000: ["b.log", "a.log", "01-build.log", "c.png"]}[most]
    archive = Path(f"{tmp_path}.tar.gz")
    assert archive.stat().st_size <= most
    kept = {"summary.json", "summary.md", "rows/rows.json", "01-build.log", "c.png"} - set(left_out)
    assert set(archived(tmp_path)) == {f"{tmp_path.name}/{name}" for name in kept}
    assert summary_in(tmp_path)[0]["not_in_archive"] == left_out
    assert f"Too large for the archive: {', '.join(left_out)}" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"verify-a": "green", "tests-a": "== 5 passed, 2 skipped in 3.00s =="}, "2 of 2 checks passed."),
        ({"verify-a": "green", "tests-a": "== 202 skipped in 3.00s =="}, "1 of 2 checks passed."),
        (
            {"verify-a": "fault", "tests-a": "== 1 passed in 3.00s =="},
            "1 of 2 checks passed. FAILED: verify-a. Do not trust the numbers of this run.",
        ),
    ],
)
def test_gpu_summary_states_the_checks(tmp_path, parts, words):
    """At the top of the page, and in the heading of the numbers if not all checks passed."""
    _rows(tmp_path / "headline")
    stages = [alone(say(name, said, int(said == "fault"))) for name, said in parts.items()]
    assert run_stages(stages, tmp_path) == ("FAILED" not in words)
    page = (tmp_path / "summary.md").read_text().splitlines()
    assert page[2] == f"**{words}**"
    assert ("## headline" if words.startswith("2") else "## headline: NOT ALL CHECKS PASSED") in page


def test_gpu_killed_run_leaves_no_process_and_resumes(tmp_path):
    out = tmp_path / "run"
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from support.gpu_visit import alone, run_plan, say, sleep
run_plan(Path({str(out)!r}), [alone(say("build", "built")), alone(sleep("tests-a", 60))])
"""
    log = out / "02-tests-a.log"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL) as process:
        while not (log.exists() and log.read_text().startswith("begun")):
            assert process.poll() is None
            time.sleep(0.05)
        (child,) = Path("/proc", str(process.pid), "task", str(process.pid), "children").read_text().split()
        process.kill()
    deadline = time.monotonic() + 10
    while not _ended(child):
        assert time.monotonic() < deadline, "the part goes on without its run"
        time.sleep(0.05)
    assert results_in(out) == {"build": "ok", "tests-a": "not run"}
    assert run_plan(out, [alone(say("build", "never")), alone(say("tests-a", "good"))]) == 0
    assert log.read_text() == "good\n" and (out / "01-build.log").read_text() == "built\n"


def test_gpu_second_call_goes_on(tmp_path, capsys, monkeypatch):
    """Successful parts are kept if the folder, the code and the machine are the same."""
    out, runs, codes = tmp_path / "run", tmp_path / "runs", {"other": 1}

    def call(*words):
        """The exit code of a call, and the parts that it ran."""
        runs.write_text("")
        stages = []
        for name in ("build", "verify-a", "verify-b", "other"):
            text = f"open({str(runs)!r}, 'a').write({name + ' '!r}); raise SystemExit({codes.get(name, 0)})"
            stages.append(alone(python_part(name, text)))
        return run_plan(out, stages, *words), runs.read_text().split()

    assert call("--only", "build", "other") == (1, ["build", "other"])
    assert list(results_in(out).values()) == ["ok", "not run", "not run", "failed"]
    codes.clear()
    assert call() == (0, ["verify-a", "verify-b", "other"])
    assert list(results_in(out).values()) == ["ok"] * 4
    assert call("--only", "verify") == (0, ["verify-a", "verify-b"])
    for words, message in (
        (("--only", "everything"), "--only must name some of build, verify-a, verify-b, other, got 'everything'"),
        (("--total", "5"), "--total must be more than"),
    ):
        with pytest.raises(SystemExit):
            call(*words)
        assert message in capsys.readouterr().err
    describe, written = machine.describe, (out / "summary.json").read_bytes()
    monkeypatch.setattr(machine, "describe", lambda device: {**describe(device), "driver": "another"})
    assert call() == (1, [])
    assert "holds another run" in capsys.readouterr().err
    monkeypatch.undo()
    assert call("--quick") == (1, [])
    monkeypatch.setattr(gpu, "source_digest", lambda: "other code")
    assert call() == (1, [])
    assert (out / "summary.json").read_bytes() == written


def _rows(folder, left_out=()):
    folder.mkdir(parents=True, exist_ok=True)
    run_file.write(folder / "rows.json", run_file.RunFile(ENVIRONMENT, made_run(), list(left_out), 9))


def test_gpu_second_call_resumes_the_rows(tmp_path):
    """A finished part runs again, since some rows may have had no time; one named by --only starts from scratch."""
    rows, seen = tmp_path / "run" / "headline" / "rows.json", tmp_path / "seen"
    text = f"import pathlib; print(pathlib.Path({str(rows)!r}).exists(), file=open({str(seen)!r}, 'a'))"
    for number, words in enumerate(((), (), ("--only", "headline")), 1):
        assert run_plan(tmp_path / "run", [alone(python_part("headline", text, rows=True), 90)], *words) == 0
        assert seen.read_text().split() == ["False", "True", "False"][:number]
        _rows(rows.parent)


def test_gpu_run_puts_the_goals_into_its_summary(tmp_path):
    _rows(tmp_path / "headline", [{"group": "g", "provider": "upstream", "reason": "no memory"}])
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "rows.json").write_text("{")
    assert run_stages([alone(say("build", "built"))], tmp_path)
    found = summary_in(tmp_path)[0]["suites"]
    assert found["headline"]["measured"] == 7
    assert {goal["verdict"] for goal in found["headline"]["goals"]} == {"reached", "not reached"}
    assert "not JSON" in found["suites"]["error"]
    page = (tmp_path / "summary.md").read_text()
    assert "7 of 9 rows with numbers: headline/rows.json" in page
    assert "- 1 without: no memory" in page and "| reached |" in page
    assert "suites/rows.json cannot be read" in page


@pytest.mark.parametrize("missing", [False, True], ids=["no GPU", "no torch"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_run_that_cannot_run_says_why_in_one_line(tmp_path, missing):
    if missing:
        (tmp_path / "torch.py").write_text("raise ImportError('not installed')\n")
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "run")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (found.returncode, found.stdout) == (1, "")
    why = "torch cannot be imported (not installed)" if missing else f"torch {torch.__version__} sees no GPU"
    assert found.stderr == f"python -m benchmarks.gpu: cannot run here: {why}\n"
    assert not (tmp_path / "run").exists()

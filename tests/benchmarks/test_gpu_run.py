"""``python -m benchmarks.gpu``: a run whose parts fail, hang, are killed or have no time left, and its summary."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import plan as gpu_plan
from benchmarks.gpu import process as gpu_process
from benchmarks.gpu import run as gpu
from benchmarks.gpu import summary as gpu_summary
from benchmarks.measure import run_file
from support import ROOT
from support.gpu_visit import FakeGpu, archived, made_summary, python_part, run_plan, say, sleep, summary_in
from support.rows import ENVIRONMENT, made_run


def test_gpu_run_goes_on_after_a_failure_and_a_time_out(tmp_path, capsys):
    out = tmp_path / "run"

    def plan(device, out, quick, jobs):
        assert quick and device.name == "cpu" and jobs >= 1
        return [
            gpu.Part("build", 30, say("built")),
            gpu.Part("tests", 30, say(f"one failed in {ROOT}", 1)),
            gpu.Part("verify", 1.5, sleep(60)),
            gpu.Part("headline", None, lambda seconds: say(f"had {seconds:.0f} s")(seconds)),
            gpu.Part("suites", None, None),
        ]

    started = time.monotonic()
    assert run_plan(out, plan, "--quick") == 1
    assert time.monotonic() - started < 30
    summary, parts = summary_in(out)
    assert summary["environment"]["gpu"] == "an imagined one"
    assert {name: (part["result"], part["code"]) for name, part in parts.items()} == {
        "build": ("ok", 0),
        "tests": ("failed", 1),
        "verify": ("cut off at its limit", None),
        "headline": ("ok", 0),
        "suites": ("left out in a quick run", None),
    }
    assert summary["finished"]
    assert (out / "02-tests.log").read_text() == "one failed in .\n"
    assert (out / "03-verify.log").read_text().startswith("begun\n")
    assert str(ROOT) not in (out / "summary.json").read_text()
    page = (out / "summary.md").read_text()
    assert "| [tests](02-tests.log) | failed |" in page and "exit code 1" in page
    assert "**FAILED: tests. No check ran.**" in page
    assert "| [build](01-build.log) | ok | 0 | 30 | built |" in page
    assert "had" in (out / "04-headline.log").read_text()
    assert "headline: started, at most" in capsys.readouterr().out
    files = {path for path in out.rglob("*") if path.is_file()}
    assert archived(out) == {f"run/{path.relative_to(out)}": path.read_bytes() for path in files}


def test_gpu_run_that_is_cut_off_keeps_its_finished_parts(tmp_path):
    def interrupt(seconds):
        raise KeyboardInterrupt

    parts = [gpu.Part("build", 30, say("built")), gpu.Part("tests", 30, interrupt)]
    with pytest.raises(KeyboardInterrupt):
        gpu.run(parts, tmp_path, made_summary())
    assert list(summary_in(tmp_path)[1]) == ["build"]
    assert "did not finish" in (tmp_path / "summary.md").read_text()


def test_gpu_run_that_is_told_to_end_writes_what_it_has(tmp_path):
    """SIGTERM, as ``timeout`` sends it: the child ends, its line and its log are in the archive."""
    out, log = tmp_path / "run", tmp_path / "run" / "02-tests.log"

    def tell():
        while not (log.exists() and log.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    told = threading.Thread(target=tell)
    told.start()
    parts = [gpu.Part("build", 30, say("built")), gpu.Part("tests", 30, sleep(60)), gpu.Part("more", 30, say(""))]
    assert run_plan(out, lambda *_: parts) == 130
    told.join()
    summary, lines = summary_in(out)
    assert {name: line["result"] for name, line in lines.items()} == {"build": "ok", "tests": "interrupted"}
    assert "finished" not in summary
    assert archived(out)["run/02-tests.log"].startswith(b"begun\n")
    assert json.loads(archived(out)["run/summary.json"]) == summary


def _ended(pid):
    """Whether a process is gone, or dead and not yet waited for."""
    state = Path("/proc", pid, "stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_gpu_part_that_ignores_signals_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_process, "GRACE", 0.5)
    deaf = "[signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM)]"
    child = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import signal; {deaf}; "
    child += "import time; time.sleep(60)']).pid, flush=True)"
    parts = [gpu.Part("deaf", 1.5, sleep(60, f"{deaf}; {child}")), gpu.Part("leaving", 30, python_part(child))]
    started = time.monotonic()
    assert not gpu.run(parts, tmp_path, made_summary())
    assert 2 <= time.monotonic() - started < 10
    assert [line["result"] for line in summary_in(tmp_path)[1].values()] == ["cut off at its limit", "ok"]
    for log in ("01-deaf.log", "02-leaving.log"):
        assert _ended((tmp_path / log).read_text().split()[0])


def test_gpu_run_starts_nothing_without_time(tmp_path):
    parts = [gpu.Part("build", 30, say("built")), gpu.Part("suites", None, say("never"))]
    # not a failure: what was started succeeded
    assert gpu.run(parts, tmp_path, made_summary(), total=gpu_plan.END_SECONDS + gpu_plan.WORTH_STARTING)
    lines = summary_in(tmp_path)[1]
    assert [line["result"] for line in lines.values()] == ["ok", "no time left"]
    assert "more than 50 s are needed" in lines["suites"]["reason"]
    assert not (tmp_path / "02-suites.log").exists()


def test_gpu_stage_runs_its_parts_side_by_side(tmp_path):
    """Two at a time: the first two need each other; the last finds no time."""
    stage = gpu.Stage("checks", 3, 2)
    meet = "import pathlib, time; own, other = map(pathlib.Path, {}); own.touch()\n"
    meet += "while not other.exists(): time.sleep(.1)"
    places = [str(tmp_path / name) for name in "ab"]
    parts = [
        gpu.Part("a", 60, python_part(meet.format(places)), stage=stage),
        gpu.Part("b", 60, python_part(meet.format(places[::-1])), stage=stage),
        gpu.Part("c", 1, sleep(60), stage=stage),
        gpu.Part("d", 60, sleep(60), stage=stage),
        gpu.Part("e", 60, sleep(60), stage=stage),
        gpu.Part("f", 60, say("never"), stage=stage),
        gpu.Part("after", None, say("begun")),
    ]
    assert not gpu.run(parts, tmp_path, made_summary())
    lines = summary_in(tmp_path)[1]
    results = [line["result"] for line in lines.values()]
    assert results == ["ok", "ok", *["cut off at its limit"] * 3, "no time left", "ok"]
    assert lines["f"]["reason"] == "2 at a time, its stage had 3 s"
    assert not (tmp_path / "06-f.log").exists()


def test_gpu_part_without_a_limit_leaves_later_parts_theirs(tmp_path):
    checks = gpu.Stage("checks", 30, 1)
    parts = [
        gpu.Part("headline", None, lambda seconds: say(f"{seconds:.0f}")(seconds)),
        gpu.Part("a", 20, say(""), stage=checks),
        gpu.Part("b", 20, say(""), stage=checks),
        gpu.Part("c", 10, say("")),
    ]
    assert gpu.run(parts, tmp_path, made_summary(), total=gpu_plan.END_SECONDS + 140)
    assert (tmp_path / "01-headline.log").read_text() == "100\n"


def test_gpu_run_counts_its_time_from_its_start(tmp_path):
    parts = [gpu.Part("headline", None, lambda seconds: say(f"{seconds:.0f}")(seconds))]
    assert gpu.run(parts, tmp_path, made_summary(), total=gpu_plan.END_SECONDS + 200, started=time.monotonic() - 120)
    assert (tmp_path / "01-headline.log").read_text() == "80\n"
    assert 120 <= summary_in(tmp_path)[0]["seconds"] < 130


def test_gpu_run_puts_its_page_and_its_archive_where_it_is_told(tmp_path, capsys):
    page, archive = tmp_path / "there" / "page.md", tmp_path / "there" / "all.tgz"
    words = ["--summary", str(page), "--archive", str(archive)]
    plan = [gpu.Part("build", 30, say("built")), gpu.Part("tests-a", 30, say("3 passed in 1 s"))]
    assert run_plan(tmp_path / "run", lambda *_: plan, *words) == 0
    assert page.read_text() == (tmp_path / "run" / "summary.md").read_text()
    assert "**Every part that ran succeeded, and every check passed.**" in page.read_text()
    assert not (tmp_path / "run.tar.gz").exists()
    with tarfile.open(archive) as file:
        assert "run/02-tests-a.log" in file.getnames()
    assert capsys.readouterr().out.splitlines()[-2:] == [str(page), str(archive)]
    assert run_plan(tmp_path / "run", lambda *_: plan, "--summary", str(tmp_path)) == 1
    assert f"--out, --summary, --archive: {tmp_path} is a folder" in capsys.readouterr().err


@pytest.mark.parametrize("most", [60_000, 20_000])
def test_gpu_archive_leaves_out_the_largest_logs_and_then_what_else_is_large(tmp_path, monkeypatch, most):
    """30 kB each, of which nothing can be compressed away."""
    monkeypatch.setattr(gpu_summary, "ARCHIVE_BYTES", most)
    for name, size in (("a.log", 30_000), ("b.log", 40_000), ("c.png", 25_000), ("rows/rows.json", 15_000)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(os.urandom(size))
    gpu.run([gpu.Part("build", 30, say("built"))], tmp_path, made_summary())
    left_out = {60_000: ["b.log", "a.log"], 20_000: ["b.log", "a.log", "01-build.log", "c.png"]}[most]
    archive = Path(f"{tmp_path}.tar.gz")
    assert archive.stat().st_size <= most
    kept = {"summary.json", "summary.md", "rows/rows.json", "01-build.log", "c.png"} - set(left_out)
    assert set(archived(tmp_path)) == {f"{tmp_path.name}/{name}" for name in kept}
    assert summary_in(tmp_path)[0]["not_in_archive"] == left_out
    assert f"Too large for the archive: {', '.join(left_out)}" in (tmp_path / "summary.md").read_text()


def test_gpu_run_whose_checks_fail_says_so_beside_every_number(tmp_path):
    _rows(tmp_path / "headline")
    error = "torch.AcceleratorError: CUDA error: an illegal memory access was encountered"
    parts = [
        gpu.Part("headline", 30, say("measured")),
        gpu.Part("verify-a", 30, say(f"row 1\n{error}\nCompile with TORCH_USE_CUDA_DSA\nlast words", 1)),
        gpu.Part("tests-a", 30, say("1 passed in 1 s")),
        gpu.Part("tests-b", 30, say("1 passed in 1 s")),
    ]
    assert not gpu.run(parts, tmp_path, made_summary())
    lines = summary_in(tmp_path)[1]
    assert [line["result"] for line in lines.values()] == ["ok", "failed", "ok", "ok"]
    assert lines["verify-a"]["reason"] == "exit code 1: CUDA error: an illegal memory access was encountered"
    page = (tmp_path / "summary.md").read_text()
    assert "**CHECKS FAILED: verify-a. Do not trust the numbers of this run.**" in page.splitlines()[2]
    assert "## headline: CHECKS FAILED" in page and "| measured (CHECKS FAILED) |" in page
    assert "| tests-* (2) | ok |" in page
    assert len(page.splitlines()) < 60


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"verify-a": "green", "tests-a": "== 5 passed, 2 skipped in 3.00s =="}, "Every part that ran succeeded, and"),
        ({"verify-a": "green", "tests-a": "== 202 skipped in 3.00s =="}, "1 of 2 checks are incomplete."),
        ({"build": "built"}, "No check ran."),
    ],
)
def test_gpu_run_says_what_was_checked(tmp_path, parts, words):
    assert gpu.run([gpu.Part(name, 30, say(said)) for name, said in parts.items()], tmp_path, made_summary())
    assert (tmp_path / "summary.md").read_text().splitlines()[2].startswith(f"**{words}")


def test_gpu_run_that_is_killed_leaves_nothing_running_and_goes_on(tmp_path):
    out = tmp_path / "run"
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from benchmarks.gpu import run as gpu
from support.gpu_visit import FakeGpu, say, sleep
parts = [gpu.Part("build", 30, say("built")), gpu.Part("tests-a", 30, sleep(60))]
gpu.main(["--out", {str(out)!r}], FakeGpu(), lambda *_: parts)
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
    assert [line["part"] for line in summary_in(out)[0]["parts"]] == ["build"]
    parts = [gpu.Part("build", 30, say("never")), gpu.Part("tests-a", 30, say("good"))]
    assert run_plan(out, lambda *_: parts) == 0
    assert log.read_text() == "good\n" and (out / "01-build.log").read_text() == "built\n"


def _counted(tmp_path, name, code=0):
    """A command that notes each of its runs."""
    text = f"open({str(tmp_path / 'runs')!r}, 'a').write({name + ' '!r}); raise SystemExit({code})"
    return python_part(text)


def _runs(tmp_path):
    path = tmp_path / "runs"
    names = path.read_text().split()
    path.unlink()
    return names


def test_gpu_second_call_goes_on(tmp_path, capsys):
    """It keeps what ended well, in the same folder, from the same code and machine."""
    out = tmp_path / "run"
    codes = {"tests": 1}

    def plan(device, out, quick, jobs):
        names = ("build", "verify-a", "verify-b", "tests")
        return [gpu.Part(name, 30, _counted(tmp_path, name, codes.get(name, 0))) for name in names]

    assert run_plan(out, plan, "--only", "build", "tests") == 1
    assert _runs(tmp_path) == ["build", "tests"]
    assert [line["result"] for line in summary_in(out)[0]["parts"]] == [
        "ok",
        "not asked for",
        "not asked for",
        "failed",
    ]
    codes.clear()
    assert run_plan(out, plan) == 0
    assert _runs(tmp_path) == ["verify-a", "verify-b", "tests"]
    assert [line["result"] for line in summary_in(out)[0]["parts"]] == ["ok"] * 4
    assert run_plan(out, plan, "--only", "verify") == 0
    assert _runs(tmp_path) == ["verify-a", "verify-b"]
    # another machine: begun anew, what was there is still there
    assert run_plan(out, plan, driver="2.0") == 0
    assert len(_runs(tmp_path)) == 4
    assert summary_in(tmp_path / "run-1")[0]["environment"]["driver"] == "1.0"
    assert json.loads(archived(tmp_path / "run-1")["run/summary.json"])["environment"]["driver"] == "1.0"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run_plan(out, plan, "--only", "everything")
    assert "--only must name some of build, verify-a, verify-b, tests, got 'everything'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_plan(out, plan, "--total", "5")
    assert "--total must be more than" in capsys.readouterr().err


def _rows(folder, left_out=()):
    folder.mkdir(parents=True, exist_ok=True)
    run_file.write(folder / "rows.json", run_file.RunFile(ENVIRONMENT, made_run(), [], [], list(left_out), 9))


def test_gpu_second_call_resumes_the_rows(tmp_path):
    """Some may have had no time; the suites know which. A finished part that is asked for by name starts anew."""
    out, seen = tmp_path / "run", tmp_path / "seen"
    command = python_part(f"import sys; open({str(seen)!r}, 'a').write(' '.join(sys.argv[1:]) + ';')")
    plan = [gpu.Part("headline", 30, command, out / "headline")]
    for wanted, words in ((";", ()), (";--resume;", ()), (";--resume;;", ("--only", "headline"))):
        assert run_plan(out, lambda *_: plan, *words) == 0
        assert seen.read_text() == wanted
        _rows(out / "headline")


def test_gpu_run_puts_the_goals_into_its_summary(tmp_path):
    _rows(tmp_path / "headline", [{"group": "g", "provider": "upstream", "reason": "no memory"}])
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "rows.json").write_text("{")
    assert gpu.run([gpu.Part("build", 30, say("built"))], tmp_path, made_summary())
    found = summary_in(tmp_path)[0]["suites"]
    assert found["headline"]["rows"] == 7
    assert {goal["verdict"] for goal in found["headline"]["goals"]} == {"reached", "not reached"}
    assert "not JSON" in found["suites"]["error"]
    page = (tmp_path / "summary.md").read_text()
    assert (
        "7 of 9 rows with numbers: headline/rows.json" in page
        and "- 1 without: no memory" in page
        and "| reached |" in page
    )
    assert "suites/rows.json cannot be read" in page


def test_gpu_run_says_in_one_line_why_it_cannot_run(capsys):
    assert gpu.main([], FakeGpu("no such device")) == 1
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err == "python -m benchmarks.gpu: cannot run here: no such device\n"


def test_gpu_run_says_in_one_line_what_is_wrong_with_its_folder(tmp_path, capsys):
    (tmp_path / "summary.json").write_text("[]")
    assert run_plan(tmp_path, lambda *_: []) == 1
    assert "is no summary of such a run" in capsys.readouterr().err


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

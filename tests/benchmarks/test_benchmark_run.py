"""A run of the suites as a whole: progress, a stop half-way, going on, refusing to overwrite, the command."""

import contextlib
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.measure import clocks, harness, run_file, session
from benchmarks.report import files as report
from benchmarks.suites import subjects
from benchmarks.suites.groups import ContextLost
from support import ROOT
from support.rows import ENVIRONMENT, made_row
from support.runs import FIRST, FITTING, SECOND, finished_row, resumed, written
from t2t_fast.cli import main as t2t_fast_command

needs_pytest_benchmark = pytest.mark.skipif(
    importlib.util.find_spec("pytest_benchmark") is None, reason="pytest-benchmark is not installed"
)


def test_a_resumed_run_keeps_whole_groups_and_measures_parts_again(tmp_path):
    planned = [(group, name) for group in (FIRST, SECOND) for name in ("upstream", "aten", "t2t_fast")]
    # of the second group the last provider is missing: its peers must be measured in turn with it
    path = written(tmp_path, [finished_row(group, name) for group, name in planned[:-1]], planned=6)
    run = resumed(path, *planned)
    assert [run.kept(group, name) is not None for group, name in planned] == [True] * 3 + [False] * 3
    kind, entry = run.kept(FIRST, "aten")
    assert (kind, entry["times"]) == ("rows", [0.1, 0.2, 0.3])
    run.finish("rows", finished_row(SECOND, "upstream"), SECOND, "upstream")
    run.save()
    after = run_file.read(path)
    assert [row["group"] for row in after.rows] == [FIRST.id] * 3 + [SECOND.id]
    assert after.environment == {**ENVIRONMENT, "command": "a command"}
    assert (after.finished, after.planned, after.complete) == (4, 6, False)


def test_no_row_stands_beside_peers_of_other_rounds(tmp_path):
    path = written(tmp_path, [finished_row(FIRST, "upstream"), finished_row(FIRST, "upstream-compiled")])
    run = resumed(path, (FIRST, "upstream"), (FIRST, "aten"))
    for name in ("upstream", "aten"):
        run.finish("rows", finished_row(FIRST, name), FIRST, name)
    run.save()
    assert [row["provider"] for row in run_file.read(path).rows] == ["upstream", "aten"]


@pytest.mark.parametrize(
    ("reason", "again"),
    [("the package x is not installed", False), ("the time limit of 5 s had passed", True), ("failed: no", True)],
)
def test_what_was_left_out_is_tried_again_where_that_may_help(tmp_path, reason, again):
    left_out = [{"group": FIRST.id, "provider": "sdpa", "reason": reason}]
    run = resumed(written(tmp_path, [finished_row(FIRST, "upstream")], left_out), (FIRST, "upstream"), (FIRST, "sdpa"))
    assert (run.kept(FIRST, "sdpa") is None) == again
    # and so is everyone who would be measured beside it
    assert (run.kept(FIRST, "upstream") is None) == again


def test_a_resumed_run_notes_every_command(tmp_path):
    path = written(tmp_path, [finished_row(FIRST, "upstream")])
    for command_line, noted in (("one", "one"), ("one", "one"), ("two", "one\ntwo"), ("two", "one\ntwo")):
        run = session.Run("cpu", True, path, None, command_line, lambda text: None)
        run.add(SECOND, "upstream")
        run.begin()
        run.finish("rows", finished_row(SECOND, "upstream"), SECOND, "upstream")
        run.save()
        assert run_file.read(path).environment["command"] == noted


def test_largest_batches_are_kept_one_by_one(tmp_path):
    found = {"group": FITTING.id, "provider": "upstream", "batch": 7}
    run = resumed(written(tmp_path, [], fits=[found]), (FITTING, "upstream"), (FITTING, "t2t_fast"))
    assert run.kept(FITTING, "upstream") == ("fits", found)
    assert run.kept(FITTING, "t2t_fast") is None


def test_rows_of_another_selection_stay_in_the_file(tmp_path):
    path = written(tmp_path, [finished_row(FIRST, "upstream")], planned=1)
    run = resumed(path, (SECOND, "upstream"))
    run.finish("rows", finished_row(SECOND, "upstream"), SECOND, "upstream")
    run.save()
    after = run_file.read(path)
    assert [row["group"] for row in after.rows] == [FIRST.id, SECOND.id]
    assert (after.finished, after.planned) == (2, 2)


def test_what_an_earlier_part_did_not_come_to_is_still_missing(tmp_path):
    path = written(tmp_path, [finished_row(FIRST, "upstream")], planned=9)
    run = resumed(path, (SECOND, "upstream"))
    run.finish("rows", finished_row(SECOND, "upstream"), SECOND, "upstream")
    run.save()
    after = run_file.read(path)
    assert (after.finished, after.planned, after.complete) == (2, 9, False)


def test_suites_that_are_killed_keep_their_rows_and_say_so(tmp_path, monkeypatch, capsys):
    def killed(arguments, out):
        written(out, [finished_row(FIRST, "upstream")])
        return -signal.SIGKILL

    monkeypatch.setattr(command, "run_suites", killed)
    assert command.main(["--quick", "--device", "cpu", "--report", str(tmp_path)]) == 128 + signal.SIGKILL
    said = capsys.readouterr()
    assert "ended by SIGKILL" in said.err and "stopped after 1 of 99 rows" in said.out
    assert (tmp_path / "report.html").exists()


def test_large_inputs_do_not_rotate():
    small, large = torch.empty(10), torch.empty(2**26, device="meta")
    assert subjects.copies([small]) == subjects.copies([small, small]) == subjects.COPIES > 1
    assert subjects.copies([small, large]) == 1


def test_progress_counts_rows_and_tells_the_time_left(monkeypatch):
    said, now = [], 100.0
    monkeypatch.setattr(session.time, "monotonic", lambda: now)
    run = session.Run("cpu", True, None, None, "a command", said.append, live=True)
    for name in ("upstream", "t2t_fast"):
        run.add(FIRST, name)
    run.say("begins")
    now += 90
    run.finish("rows", {**finished_row(FIRST, "upstream"), "visits": [3]}, FIRST, "upstream")
    run.say("goes on")
    now += 90
    run.finish("rows", finished_row(FIRST, "t2t_fast"), FIRST, "t2t_fast")
    run.say("goes on")
    assert said == [
        f"{'░' * 24} [visit 1 of 3: 0/2 rows, 0:00] begins",
        f"{'█' * 4 + '░' * 20} [visit 1 of 3: 1/2 rows, 1:30, about 7:30 left] goes on",
        f"{'█' * 16 + '░' * 8} [visit 1 of 3: 2/2 rows, 3:00, about 1:30 left] goes on",
    ]


def test_a_run_is_resumed_in_its_own_environment_only():
    now = {**ENVIRONMENT, "threads": 2, "quick": False}
    assert session.differences(now, {**now, "date": "another"}) == []
    assert session.differences(now, {**now, "quick": True, "torch": "9"}) == [
        "torch was '2.11' and is '9'",
        "quick was False and is True",
    ]


def test_a_run_is_not_overwritten(tmp_path, capsys):
    path = written(tmp_path, [finished_row(FIRST, "upstream")])
    before = path.read_bytes()
    assert command.main(["--quick", "--device", "cpu", "--report", str(tmp_path)]) == 2
    assert "holds a run already: --resume goes on with it" in capsys.readouterr().err
    assert command.main(["--quick", "--device", "cpu", "--report", str(tmp_path), "--resume"]) == 2
    assert "--resume: another run lies in" in capsys.readouterr().err
    assert path.read_bytes() == before
    path.write_text("{}")
    assert command.main(["--quick", "--device", "cpu", "--report", str(tmp_path), "--resume"]) == 2
    assert "not a run of these benchmarks" in capsys.readouterr().err


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "rows.json"
    for text, words in (("{", "not JSON"), ("[1]", "not a run"), ('{"benchmarks": []}', "not a run")):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            run_file.read(path)


def test_the_command_of_a_run_measures_the_same_again(tmp_path):
    words = ["--device", "cpu", "--quick", "--suite", "module", "ops", "--filter", "b8 and not aten"]
    given = command.parser().parse_args([*words, "--report", str(tmp_path), "--resume"])
    assert command.command_line(given) == (
        "python -m benchmarks --device cpu --quick --suite module ops --filter 'b8 and not aten'"
    )
    files = [word for word in command.suite_command(given, tmp_path) if word.endswith(".py")]
    assert [Path(file).stem for file in files] == ["test_module", "test_ops"]


LOSING = """
from benchmarks.measure import clocks, harness, machine, session

session.VISITS["cpu"], session.QUICK_BUDGETS["op"] = 1, 0.1
machine.limits = lambda device: {"bytes_per_s": 1e10, "flop_per_s": {"fp32": 1e11}}
prepare, lost = harness.prepare, []
clocks.context_lost = lambda device: bool(lost)

def losing(subject, provider, *arguments, **named):
    if provider.name == "aten":
        lost.append(True)
        raise RuntimeError("CUDA error: an illegal memory access was encountered\\nCUDA kernel errors might be ...")
    if lost:
        raise RuntimeError("no call works any more")
    return prepare(subject, provider, *arguments, **named)

harness.prepare = losing
"""


@needs_pytest_benchmark
@pytest.mark.slow
def test_a_row_that_ends_the_cuda_context_is_left_out_and_the_run_goes_on_in_another_process(
    tmp_path, monkeypatch, capfd
):
    """Simulated: a provider fails, and so does every later call in its process."""
    (tmp_path / "losing.py").write_text(LOSING)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p losing")
    monkeypatch.setattr(report, "write", lambda rows, out: [])
    out = tmp_path / "run"
    words = ["--device", "cpu", "--quick", "--suite", "ops", "--filter", "token_mlp and inference"]
    assert command.main([*words, "--report", str(out)]) == 1
    run = run_file.read(out / "rows.json")
    assert {row["provider"] for row in run.rows} == {"upstream", "t2t_fast"}
    ((group, provider, reason),) = (each.values() for each in run.left_out)
    assert (group, provider) == ("op-token_mlp-stage1-224px-b8-fp32-inference", "aten")
    expected = (
        "its call ended the process's CUDA context: RuntimeError: CUDA error: an illegal memory access was encountered"
    )
    assert reason == expected
    assert f"{group}, aten: {expected}; going on in another process" in capfd.readouterr().err


def test_a_lost_context_in_a_timed_turn_is_its_participants(monkeypatch):
    class Clock:
        def turn(self, step, implementation, calls):
            raise ValueError("wrong")

    participant = harness.Participant("aten", None, None, None)
    monkeypatch.setattr(harness.clocks, "context_lost", lambda device: device == "cuda")
    with pytest.raises(ContextLost, match="ValueError: wrong") as failure:
        harness.interleave([participant], Clock(), 1, "cuda")
    assert failure.value.provider == "aten"
    with pytest.raises(ValueError, match="wrong"):
        harness.interleave([participant], Clock(), 1, "cpu")


def test_a_lost_context_is_one_that_cannot_be_waited_for(monkeypatch):
    assert not clocks.context_lost("cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert not clocks.context_lost("cuda")

    def fail():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    assert clocks.context_lost("cuda")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its settings are glibc's")
def test_memory_that_is_kept_is_noted_and_part_of_the_command(tmp_path, monkeypatch):
    def suites(arguments, out):
        environment = {**ENVIRONMENT, **session.describe("cpu", True, command.command_line(arguments))}
        run_file.write(
            out / "rows.json", run_file.RunFile(environment, [finished_row(FIRST, "upstream")], [], [], [], 1)
        )
        return 0

    monkeypatch.setattr(command, "run_suites", suites)
    monkeypatch.setattr(command.os, "environ", dict(os.environ))
    words = ["--quick", "--device", "cpu", "--keep-memory", "--report", str(tmp_path)]
    assert command.main(words) == 0
    environment = run_file.read(tmp_path / "rows.json").environment
    assert environment["malloc"] == command.KEEP_MEMORY and environment["command"].endswith("--quick --keep-memory")
    before = {**environment, "malloc": {}}
    (difference,) = session.differences(before, environment)
    assert difference.startswith("malloc was {} and is {'MALLOC_")


def test_memory_is_kept_by_glibc_only(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(command.os, "environ", dict(os.environ))
    assert command.main(["--device", "cpu", "--keep-memory", "--report", str(tmp_path / "new")]) == 2
    assert "--keep-memory needs glibc, this is" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_compare_through_the_users_command(tmp_path, capsys):
    for name, seconds in (("a", 0.02), ("b", 0.03)):
        found = [made_row("upstream", [0.1] * 9), made_row("t2t_fast", [seconds] * 9)]
        run_file.write(tmp_path / name, run_file.RunFile(ENVIRONMENT, found, [], [], []))
    pair = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert t2t_fast_command(["bench", "--compare", *pair]) == 1
    assert "1 regression of t2t_fast" in capsys.readouterr().out
    assert t2t_fast_command(["bench", "--compare", *pair[::-1]]) == 0
    assert t2t_fast_command(["bench", "--compare", *pair, "--threshold", "0.6"]) == 0
    assert t2t_fast_command(["bench", "--compare", pair[0], str(tmp_path / "nothing")]) == 2


def _on_a_terminal(words, environment):
    """Exit code and output of a command whose output is a terminal of 80 columns."""
    mine, its = os.openpty()
    with subprocess.Popen(words, cwd=ROOT, env=environment, stdout=its, stderr=its) as process:
        os.close(its)
        said = b""
        # a terminal whose other side has been closed answers with an error
        with open(mine, "rb", buffering=0) as terminal, contextlib.suppress(OSError):
            while part := terminal.read(4096):
                said += part
        return process.wait(), said.decode()


@needs_pytest_benchmark
def test_a_run_that_is_stopped_half_way_can_be_resumed(tmp_path):
    words = [
        sys.executable,
        "-m",
        "benchmarks",
        "--quick",
        "--device",
        "cpu",
        "--suite",
        "ops",
        "--report",
        str(tmp_path),
    ]
    words += ["--filter", "token_mlp"]
    options = dict(cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True)
    path = tmp_path / "rows.json"

    def hear():
        """A shell without job control has its jobs in the background ignore SIGINT, these tests among them."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(words, stderr=subprocess.STDOUT, preexec_fn=hear, **options) as process:
        deadline = time.monotonic() + 120
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == command.INTERRUPTED, said
    before = run_file.read(path)
    assert before.begun > 0 and not before.complete
    rows_of = f"{before.finished} of {before.planned} rows, {before.begun} more half-way"
    assert f"stopped after {rows_of}; to go on: python -m benchmarks" in said
    assert "--resume" in said
    code, said = _on_a_terminal([*words, "--resume"], options["env"])
    assert code == 0, said
    assert re.search(rf"\x1b\[2K█+░+ \[visit 1 of 3: {before.begun}/{before.planned} rows, 0:\d\d\] op-token_mlp", said)
    after, raw = run_file.read(path), run_file.read(tmp_path / "raw.json")
    assert after.complete and after.planned == before.planned
    for row, whole in zip(before.rows, after.rows, strict=False):
        first = len(row["times"])
        assert first == row["visits"][0] == whole["visits"][0] and whole["times"][:first] == row["times"]
    times = {(row["group"], row["provider"]): row["times"] for row in after.rows}
    assert {(row["group"], row["provider"]): row["times"] for row in raw.rows} == times


def test_run_files_are_strict_json(tmp_path):
    """A NaN would be written as something that other readers refuse."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        run_file.write(tmp_path / "rows.json", run_file.RunFile({"x": float("nan")}, [], [], [], []))
    assert not (tmp_path / "rows.json").exists()
    run_file.write(tmp_path / "rows.json", run_file.RunFile({}, [], [], [], []))
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == []

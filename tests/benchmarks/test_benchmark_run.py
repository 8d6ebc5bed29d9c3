"""A run of the suites as a whole: interruption, resumption, protection of existing files, exit codes, the command."""

import contextlib
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest

from benchmarks import __main__ as command
from benchmarks.measure import harness, run_file, session
from benchmarks.measure.statistics import ratios
from benchmarks.report import __main__ as report
from benchmarks.suites import groups, subjects
from benchmarks.suites.groups import Group
from benchmarks.suites.providers import matching
from support import ROOT
from support.rows import ENVIRONMENT, made_row
from support.runs import FIRST, FITTING, SECOND, finished_row, resumed, written
from t2t_fast.cli import main as t2t_fast_command

QUICK = ["--quick", "--device", "cpu"]


def _missing(run, *planned):
    """Rows that a run will measure."""
    return [(group, name) for group, name in planned if (group.id, name) not in run.found]


def test_resume_repeats_incomplete_groups(tmp_path):
    planned = [(group, name) for group in (FIRST, SECOND) for name in ("upstream", "aten", "t2t_fast")]
    # the second group lacks its last provider: its peers must be measured again, interleaved with it
    path = written(tmp_path, [finished_row(group, name) for group, name in planned[:-1]], planned=6)
    run = resumed(path, *planned)
    assert _missing(run, *planned) == planned[3:]
    assert run.found[FIRST.id, "aten"]["times"] == [0.1, 0.2, 0.3]
    run.add(finished_row(SECOND, "upstream"))
    after = run_file.read(path)
    assert [row["group"] for row in after.rows] == [FIRST.id] * 3 + [SECOND.id]
    assert after.environment == {**ENVIRONMENT, "command": "a command"}
    assert (after.finished, after.planned, after.complete) == (4, 6, False)


def test_resume_repeats_peers_of_a_missing_row(tmp_path):
    path = written(tmp_path, [finished_row(FIRST, "upstream"), finished_row(FIRST, "upstream-compiled")])
    run = resumed(path, (FIRST, "upstream"), (FIRST, "aten"))
    assert run.found == {}


@pytest.mark.parametrize(
    ("reason", "again"),
    [("the package x is not installed", False), ("the time limit of 5 s had passed", True), ("failed: no", True)],
)
def test_resume_retries_left_out_rows(tmp_path, reason, again):
    left_out = [{"group": FIRST.id, "provider": "sdpa", "reason": reason}]
    planned = (FIRST, "upstream"), (FIRST, "sdpa")
    run = resumed(written(tmp_path, [finished_row(FIRST, "upstream")], left_out), *planned)
    # the other rows of its group are measured again with it
    assert _missing(run, *planned) == (list(planned) if again else [])


def test_a_resumed_run_notes_every_command(tmp_path):
    path = written(tmp_path, [finished_row(FIRST, "upstream")])
    for words, noted in (("one", "one"), ("one", "one"), ("two", "one\ntwo"), ("two", "one\ntwo")):
        session.Run({SECOND: ["upstream"]}, "cpu", True, path, words).add()
        assert run_file.read(path).environment["command"] == noted


def test_resume_keeps_each_largest_batch(tmp_path):
    found, planned = (
        {"group": FITTING.id, "provider": "upstream", "batch": 7},
        ((FITTING, "upstream"), (FITTING, "aten")),
    )
    run = resumed(written(tmp_path, [found]), *planned)
    assert run.found[FITTING.id, "upstream"] == found
    assert _missing(run, *planned) == [(FITTING, "aten")]


@pytest.mark.parametrize(("planned", "complete"), [(1, True), (9, False)])
def test_resume_with_another_selection(tmp_path, planned, complete):
    path = written(tmp_path, [finished_row(FIRST, "upstream")], planned=planned)
    run = resumed(path, (SECOND, "upstream"))
    run.add(finished_row(SECOND, "upstream"))
    after = run_file.read(path)
    assert [row["group"] for row in after.rows] == [FIRST.id, SECOND.id]
    assert (after.finished, after.planned, after.complete) == (2, max(2, planned), complete)


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
    assert command.main([*QUICK, "--report", str(tmp_path)]) == 2
    assert "holds a run already: --resume continues it" in capsys.readouterr().err
    assert command.main([*QUICK, "--report", str(tmp_path), "--resume"]) == 2
    assert "holds another run: " in capsys.readouterr().err
    assert path.read_bytes() == before
    path.write_text("{}")
    assert command.main([*QUICK, "--report", str(tmp_path), "--resume"]) == 2
    assert "not a run of these benchmarks" in capsys.readouterr().err


def test_files_of_a_run_are_strict_json(tmp_path):
    path = tmp_path / "rows.json"
    with pytest.raises(ValueError, match="not JSON compliant"):
        # strict JSON has no NaN, so other readers would reject the file
        run_file.write(path, run_file.RunFile({"x": float("nan")}, [], []))
    assert not path.exists()
    run_file.write(path, run_file.RunFile({}, [], []))
    assert json.loads(path.read_text())["rows"] == []
    for text, words in (("{", "not JSON"), ("[1]", "not a run"), ('{"benchmarks": []}', "not a run")):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            run_file.read(path)


def test_committed_runs_can_be_read():
    paths = sorted((ROOT / "benchmarks" / "results").glob("*/rows.json*"))
    runs = [run_file.read(path) for path in paths]
    assert runs and all(run.rows and run.complete for run in runs)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("", "abc"),
        ("module", "ab"),
        ("module and not 384PX", "a"),
        ("(384px or ops) and not (upstream or triton)", "c"),
        ("nothing", ""),
    ],
)
def test_filter_expressions(expression, expected):
    names = {"a": "module module-performer-224px-upstream", "b": "module module-384px-triton", "c": "ops op-token_mlp"}
    assert "".join(key for key, name in names.items() if matching(expression)(name)) == expected


@pytest.mark.parametrize("expression", ["module and", "a b", "not", ")"])
def test_invalid_filter(expression, tmp_path, capsys):
    with pytest.raises(ValueError, match=re.escape(repr(expression))):
        matching(expression)
    assert command.main([*QUICK, "--report", str(tmp_path), "--filter", expression]) == 2
    assert "--filter" in capsys.readouterr().err


def test_recorded_command_line(tmp_path):
    words = ["--device", "cpu", "--quick", "--suite", "module", "ops", "--filter", "b8 and not aten"]
    given = command.parser().parse_args([*words, "--max-seconds", "60", "--report", str(tmp_path), "--resume"])
    assert command.command_line(given) == (
        "python -m benchmarks --device cpu --quick --suite module ops --filter 'b8 and not aten' --max-seconds 60"
    )


def test_killed_suites_keep_their_rows(tmp_path, monkeypatch, capsys):
    def killed(arguments, out):
        written(out, [finished_row(FIRST, "upstream")])
        return -signal.SIGKILL

    monkeypatch.setattr(command, "run_suites", killed)
    assert command.main([*QUICK, "--report", str(tmp_path)]) == 128 + signal.SIGKILL
    said = capsys.readouterr()
    assert "SIGKILL ended the suites" in said.err and "stopped after 1 of 99 rows" in said.out
    assert (tmp_path / "report.html").exists()


def test_missing_report_package_keeps_the_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "run_suites", lambda arguments, out: not written(out, [finished_row(FIRST, "aten")]))
    monkeypatch.setattr(report, "find_spec", lambda name: None if name == "jinja2" else True)
    assert command.main([*QUICK, "--report", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "the report needs jinja2" in said.err and str(tmp_path / "rows.json") in said.out


def _exit_code(filter, **more):
    given = {"suites": ["ops"], "device": "cpu", "quick": True, "expression": filter, "path": None, "command": ""}
    with pytest.raises(SystemExit) as end:
        session.work(**{**given, "limit": None, "cache": "", **more})
    return end.value.code


@pytest.mark.parametrize(
    ("what", "code"),
    [("rows", 0), ("failure", 1), (groups.ContextLost("aten", ValueError()), 75), (KeyboardInterrupt(), 130)],
)
def test_exit_codes_of_the_suites(monkeypatch, what, code):
    def run(self):
        self.failed = what == "failure"
        if isinstance(what, BaseException):
            raise what

    for name in ("collect", "freeze"):
        monkeypatch.setattr(session.gc, name, lambda: None)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.setattr(session.Run, "run", run)
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert _exit_code("token_mlp") == code
    finally:
        signal.signal(signal.SIGINT, handler)


def test_filter_without_matches(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    assert _exit_code("nothing") == session.NO_ROW == 5
    monkeypatch.setattr(command, "run_suites", lambda arguments, out: session.NO_ROW)
    assert command.main([*QUICK, "--out", str(tmp_path), "--filter", "nothing"]) == 5
    assert capsys.readouterr().err == "python -m benchmarks: no row matches --suite and --filter\n"


LOSING = """
import json, os, sys, time

def work(suites, device, quick, expression, path, command, limit, cache):
    if expression == "wait":
        path.touch()
        time.sleep(60)
    assert os.path.isdir(cache) and not os.listdir(cache)
    found = {"environment": {}, "rows": [], "left_out": [], "planned": 9}
    found = json.loads(path.read_text()) if path.exists() else found
    if len(found["left_out"]) < 2:
        reason = "its call ended the process's CUDA context: RuntimeError: CUDA error"
        found["left_out"].append({"group": "g", "provider": str(len(found["left_out"])), "reason": reason})
        path.write_text(json.dumps(found))
        sys.exit(75)
    sys.exit(0)
"""


@pytest.fixture
def losing(tmp_path, monkeypatch):
    """Replaces the suites by a process that loses its CUDA context twice, or sleeps if the filter is "wait"."""
    (tmp_path / "losing_suites.py").write_text(LOSING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(session, "work", importlib.import_module("losing_suites").work)
    yield
    del sys.modules["losing_suites"]


def test_lost_cuda_context_continues_in_a_new_process(losing, tmp_path, capfd):
    given = command.parser().parse_args(QUICK)
    assert command.run_suites(given, tmp_path) == 1
    left_out = run_file.read(tmp_path / "rows.json").left_out
    assert [entry["provider"] for entry in left_out] == ["0", "1"]
    said = capfd.readouterr().err
    assert said.count("CUDA context: RuntimeError: CUDA error; another process continues the run") == 2


def test_a_run_that_is_interrupted_ends_its_process(losing, tmp_path):
    path, given = tmp_path / "rows.json", command.parser().parse_args([*QUICK, "--filter", "wait"])

    def interrupt():
        while not path.exists():
            time.sleep(0.02)
        path.unlink()
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        assert command.run_suites(given, tmp_path) == session.INTERRUPTED
    finally:
        thread.join()
        signal.signal(signal.SIGINT, handler)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the memory settings are those of glibc")
def test_keep_memory_is_recorded(tmp_path, monkeypatch):
    def suites(arguments, out):
        environment = {**ENVIRONMENT, **session.describe("cpu", True, command.command_line(arguments))}
        rows = [finished_row(FIRST, "upstream")]
        run_file.write(out / "rows.json", run_file.RunFile(environment, rows, [], 1))
        return 0

    monkeypatch.setattr(command, "run_suites", suites)
    monkeypatch.setattr(report, "write", lambda rows, out: [])
    monkeypatch.setattr(command.os, "environ", dict(os.environ))
    assert command.main([*QUICK, "--keep-memory", "--report", str(tmp_path)]) == 0
    environment = run_file.read(tmp_path / "rows.json").environment
    assert {name: float(value) for name, value in environment["malloc"].items()} == command.KEEP_MEMORY
    assert environment["command"].endswith("--quick --keep-memory")
    (difference,) = session.differences({**environment, "malloc": {}}, environment)
    assert difference.startswith("malloc was {} and is {'MALLOC_")


def test_keep_memory_requires_glibc(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(command.os, "environ", dict(os.environ))
    assert command.main(["--device", "cpu", "--keep-memory", "--report", str(tmp_path / "new")]) == 2
    assert "--keep-memory needs glibc, got " in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_compare_through_the_users_command(tmp_path, capsys):
    for name, seconds in (("a", 0.02), ("b", 0.03)):
        found = [made_row("upstream", [0.1] * 9), made_row("t2t_fast", [seconds] * 9)]
        run_file.write(tmp_path / name, run_file.RunFile(ENVIRONMENT, found, []))
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
        # reading from a terminal fails once its other side is closed
        with open(mine, "rb", buffering=0) as terminal, contextlib.suppress(OSError):
            while part := terminal.read(4096):
                said += part
        return process.wait(), said.decode()


@pytest.mark.slow
def test_a_real_run_that_is_stopped_half_way_and_resumed(tmp_path):
    """Check, interleaved timing, visits, both parts of the file and the report, through the real command."""
    words = [sys.executable, "-m", "benchmarks", *QUICK, "--suite", "ops", "--report", str(tmp_path)]
    words += ["--filter", "token_mlp and inference"]
    environment, path = {**os.environ, "OMP_NUM_THREADS": "1"}, tmp_path / "rows.json"

    def hear():
        """Restore SIGINT: background jobs of a shell without job control ignore it, possibly including these tests."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    options = dict(cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(words, preexec_fn=hear, **options) as process:
        deadline = time.monotonic() + 120
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == session.INTERRUPTED, said
    before = run_file.read(path)
    assert before.begun > 0 and not before.complete
    rows_of = f"{before.finished} of {before.planned} rows, {before.begun} more half-way"
    assert f"stopped after {rows_of}; to continue: python -m benchmarks" in said
    assert "--resume" in said
    code, said = _on_a_terminal([*words, "--resume"], environment)
    assert code == 0, said
    assert re.search(rf"\x1b\[2K.*\[visit 2 of 2: 0/{before.planned} rows.*\] op-token_mlp", said)
    after = run_file.read(path)
    assert after.complete and after.planned == before.planned
    for row, whole in zip(before.rows, after.rows, strict=False):
        first = len(row["times"])
        assert first == row["visits"][0] == whole["visits"][0] and whole["times"][:first] == row["times"]
    assert after.environment["command"].endswith("--quick --suite ops --filter 'token_mlp and inference'")
    assert after.environment["limits"]["bytes_per_s"] > 0
    upstream, *_, ours = after.rows
    assert len(upstream["times"]) == len(ours["times"]) >= harness.MIN_ROUNDS
    assert ours["speedup"] == ratios(upstream["times"], ours["times"]) and ours["peak_bytes"] > 0
    assert "op-token_mlp-stage1-224px-b8-fp32-inference" in (tmp_path / "rows.csv").read_text()
    assert (tmp_path / "report.html").exists()


@pytest.mark.skipif(importlib.util.find_spec("pytest_benchmark") is None, reason="pytest-benchmark is not installed")
@pytest.mark.slow
def test_pytest_benchmark_times_the_same_rows(tmp_path):
    words = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-m", "headline", "-k", "token_mlp and inference"]
    found = subprocess.run(
        [*words, f"--benchmark-json={tmp_path / 'raw.json'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr
    raw = json.loads((tmp_path / "raw.json").read_text())
    names = [each["params"]["name"] for each in raw["benchmarks"]]
    assert {"upstream", "t2t_fast"} <= set(names)
    assert {each["group"] for each in raw["benchmarks"]} == {"op-token_mlp-stage1-224px-b8-fp32-inference"}


def test_a_row_of_the_pytest_entry_is_checked_and_timed(monkeypatch):
    from benchmarks import test_suites

    class Benchmark(SimpleNamespace):
        def __call__(self, call):
            call()

    made = Benchmark(extra_info={})
    group = Group("op", "token_mlp-stage1", 64, 1, "fp32", "training", suite="ops")
    subject_of = partial(subjects.build, device="cpu")
    test_suites.test_row(group, "t2t_fast", made, subject_of)
    assert made.extra_info["error"] < 1e-5 and made.group == "op-token_mlp-stage1-64px-b1-fp32-training"
    missing = groups.LeftOut("not installed")
    monkeypatch.setattr(test_suites.harness, "prepare", lambda *_, **__: (_ for _ in ()).throw(missing))
    with pytest.raises(pytest.skip.Exception, match="not installed"):
        test_suites.test_row(FIRST._replace(size=64, batch=1), "upstream", made, subject_of)

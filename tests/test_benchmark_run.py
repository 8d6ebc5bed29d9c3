"""A run of the suites as a whole: progress, a stop half-way, going on, refusing to overwrite; and largest batches."""

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
import weakref
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import clocks, context, fit, groups, harness, packages, processes, rows, run_file, session, subjects
from benchmarks.groups import Group
from benchmarks.providers import BY_NAME, providers
from support.rows import ENVIRONMENT, made_row
from t2t_fast.cli import main as t2t_fast_command

ROOT = Path(__file__).resolve().parent.parent

needs_pytest_benchmark = pytest.mark.skipif(
    importlib.util.find_spec("pytest_benchmark") is None, reason="pytest-benchmark is not installed"
)

FIRST, SECOND = (Group("op", f"token_mlp-stage{stage}", 224, 8, "fp32", "inference", False, "ops") for stage in (1, 2))
FITTING = Group("model", "t2t_vit_7", 224, None, "fp32", "training", False, "memory")


def _row(group, provider):
    return made_row(provider, [0.1, 0.2, 0.3], **{**group._asdict(), "group": group.id, "visits": [1, 1, 1]})


def _file(folder, found, left_out=(), fits=(), planned=99):
    path = folder / "rows.json"
    run_file.write(path, run_file.RunFile(ENVIRONMENT, list(found), list(fits), [], list(left_out), planned))
    return path


def _resumed(path, *planned):
    run = session.Run("cpu", True, path, None, "a command", lambda text: None)
    for group, name in planned:
        run.add(group, name)
    run.begin()
    return run


def test_a_resumed_run_keeps_whole_groups_and_measures_parts_again(tmp_path):
    planned = [(group, name) for group in (FIRST, SECOND) for name in ("upstream", "aten", "t2t_fast")]
    # of the second group the last provider is missing: its peers must be measured in turn with it
    path = _file(tmp_path, [_row(group, name) for group, name in planned[:-1]], planned=6)
    run = _resumed(path, *planned)
    assert [run.kept(group, name) is not None for group, name in planned] == [True] * 3 + [False] * 3
    kind, entry = run.kept(FIRST, "aten")
    assert (kind, entry["times"]) == ("rows", [0.1, 0.2, 0.3])
    run.finish("rows", _row(SECOND, "upstream"), SECOND, "upstream")
    run.save()
    after = run_file.read(path)
    assert [row["group"] for row in after.rows] == [FIRST.id] * 3 + [SECOND.id]
    assert after.environment == {**ENVIRONMENT, "command": "a command"}
    assert (after.finished, after.planned, after.complete) == (4, 6, False)


def test_no_row_stands_beside_peers_of_other_rounds(tmp_path):
    path = _file(tmp_path, [_row(FIRST, "upstream"), _row(FIRST, "upstream-compiled")])
    run = _resumed(path, (FIRST, "upstream"), (FIRST, "aten"))
    for name in ("upstream", "aten"):
        run.finish("rows", _row(FIRST, name), FIRST, name)
    run.save()
    assert [row["provider"] for row in run_file.read(path).rows] == ["upstream", "aten"]


@pytest.mark.parametrize(
    ("reason", "again"),
    [("the package x is not installed", False), ("the time limit of 5 s had passed", True), ("failed: no", True)],
)
def test_what_was_left_out_is_tried_again_where_that_may_help(tmp_path, reason, again):
    left_out = [{"group": FIRST.id, "provider": "sdpa", "reason": reason}]
    run = _resumed(_file(tmp_path, [_row(FIRST, "upstream")], left_out), (FIRST, "upstream"), (FIRST, "sdpa"))
    assert (run.kept(FIRST, "sdpa") is None) == again
    # and so is everyone who would be measured beside it
    assert (run.kept(FIRST, "upstream") is None) == again


def test_a_resumed_run_notes_every_command(tmp_path):
    path = _file(tmp_path, [_row(FIRST, "upstream")])
    for command_line, noted in (("one", "one"), ("one", "one"), ("two", "one\ntwo"), ("two", "one\ntwo")):
        run = session.Run("cpu", True, path, None, command_line, lambda text: None)
        run.add(SECOND, "upstream")
        run.begin()
        run.finish("rows", _row(SECOND, "upstream"), SECOND, "upstream")
        run.save()
        assert run_file.read(path).environment["command"] == noted


def test_largest_batches_are_kept_one_by_one(tmp_path):
    found = {"group": FITTING.id, "provider": "upstream", "batch": 7}
    run = _resumed(_file(tmp_path, [], fits=[found]), (FITTING, "upstream"), (FITTING, "t2t_fast"))
    assert run.kept(FITTING, "upstream") == ("fits", found)
    assert run.kept(FITTING, "t2t_fast") is None


def test_rows_of_another_selection_stay_in_the_file(tmp_path):
    path = _file(tmp_path, [_row(FIRST, "upstream")], planned=1)
    run = _resumed(path, (SECOND, "upstream"))
    run.finish("rows", _row(SECOND, "upstream"), SECOND, "upstream")
    run.save()
    after = run_file.read(path)
    assert [row["group"] for row in after.rows] == [FIRST.id, SECOND.id]
    assert (after.finished, after.planned) == (2, 2)


def test_what_an_earlier_part_did_not_come_to_is_still_missing(tmp_path):
    path = _file(tmp_path, [_row(FIRST, "upstream")], planned=9)
    run = _resumed(path, (SECOND, "upstream"))
    run.finish("rows", _row(SECOND, "upstream"), SECOND, "upstream")
    run.save()
    after = run_file.read(path)
    assert (after.finished, after.planned, after.complete) == (2, 9, False)


def test_suites_that_are_killed_keep_their_rows_and_say_so(tmp_path, monkeypatch, capsys):
    def killed(arguments, out):
        _file(out, [_row(FIRST, "upstream")])
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
    run.finish("rows", {**_row(FIRST, "upstream"), "visits": [3]}, FIRST, "upstream")
    run.say("goes on")
    now += 90
    run.finish("rows", _row(FIRST, "t2t_fast"), FIRST, "t2t_fast")
    run.say("goes on")
    assert said == [
        f"{'░' * 24} [visit 1 of 3: 0/2 rows, 0:00] begins",
        f"{'█' * 4 + '░' * 20} [visit 1 of 3: 1/2 rows, 1:30, about 7:30 left] goes on",
        f"{'█' * 16 + '░' * 8} [visit 1 of 3: 2/2 rows, 3:00, about 1:30 left] goes on",
    ]


class MadeMeasurements:
    """Takes the place of :func:`harness.measure`: two rounds a visit of 1 + visit seconds, at a cost of its own.

    ``fails``: (group, provider, visit) -> exception. ``asked``: what was asked for, in order.
    """

    def __init__(self, fails=()):
        self.fails, self.asked, self.made = dict(fails), [], []

    def __call__(self, group, names, device, budget, say, thorough, visits, rounds):
        visit = sum(group == before for before, *_ in self.asked)
        self.asked.append((group, tuple(names), thorough, rounds))
        say("measures")
        found = {}
        for name in names:
            facts = {**dict.fromkeys(rows.FACTS), "cost": COST, "first_call_s": 7.0 + visit}
            facts = facts if rounds is None else {"cost": COST, "first_call_s": 7.0 + visit}
            found[name] = harness.Participant(name, None, None, None, times=[1.0 + visit] * 2, facts=facts)
            found[name] = self.fails.get((group, name, visit), found[name])
        if group.level == "model":
            found[harness.FRONT_END] = harness.Participant(harness.FRONT_END, None, None, None, times=[0.5 + visit] * 2)
        self.made.append(weakref.ref(next(iter(found.values()))))
        return found


COST = subjects.costs.t2t_vit("performer", 224, 256, 7, 2, 4)
MODEL = Group("model", "t2t_vit_7", 224, 8, "fp32", "training", False, "training")


def _measured(monkeypatch, planned, path=None, limit=None, fails=(), said=None):
    """A run of made measurements, and these."""
    measurements = MadeMeasurements(fails)
    monkeypatch.setattr(harness, "measure", measurements)
    run = session.Run("cpu", False, path, limit, "a command", (lambda text: None) if said is None else said.append)
    for group, name in planned:
        run.add(group, name)
    run.environment = {**ENVIRONMENT, "visits": session.VISITS["cpu"]}
    run.begin()
    return run, measurements


def test_all_groups_are_visited_in_turn_and_their_rounds_taken_together(monkeypatch, tmp_path):
    planned, said = [(group, name) for group in (FIRST, MODEL) for name in ("upstream", "t2t_fast")], []
    run, measurements = _measured(monkeypatch, planned, tmp_path / "rows.json", said=said)
    found = {(group, name): run.timed(group, name) for group, name in planned}
    both = ("upstream", "t2t_fast")
    assert measurements.asked == [
        (group, both, first, None if first else 2) for first in (True, False, False) for group in (FIRST, MODEL)
    ]
    for row in found.values():
        assert (row["times"], row["visits"]) == ([1.0, 1.0, 2.0, 2.0, 3.0, 3.0], [2, 2, 2])
        assert row["seconds"]["median"] == 2.0 and row["speedup"]["median"] == 1.0
        assert row["first_call_s"] == 7.0  # compiled code was on disk at the second
    front_end = [0.5, 0.5, 1.5, 1.5, 2.5, 2.5]
    assert found[MODEL, "upstream"]["front_end_times"] == front_end
    assert found[MODEL, "t2t_fast"]["front_end_times"] is None
    assert found[MODEL, "upstream"]["front_end_share"] == pytest.approx((1.5 / 2 + 1.5 / 2) / 2)
    assert [re.match(r"\[(.*?) rows", line)[1] for line in said] == [
        f"visit {visit} of 3: {rows}/4" for visit in (1, 2, 3) for rows in (0, 2)
    ]
    assert said[-1].endswith(f"{MODEL.id}: measures")
    run.save()
    assert run_file.read(tmp_path / "rows.json").complete


def test_a_run_lets_go_of_a_group_before_the_next_and_before_memory_is_measured(monkeypatch):
    run, measurements = _measured(monkeypatch, [(FIRST, "upstream"), (SECOND, "upstream")])
    alive = []
    measure = harness.measure

    def looks_first(*arguments, **options):
        alive.extend(made() for made in measurements.made)
        return measure(*arguments, **options)

    monkeypatch.setattr(harness, "measure", looks_first)
    run.timed(FIRST, "upstream")
    alive.extend(made() for made in measurements.made)
    assert len(measurements.made) == 6 and set(alive) == {None}


def test_who_fails_at_a_later_visit_has_no_row_and_the_others_do(monkeypatch, tmp_path):
    planned, path = [(FIRST, name) for name in ("upstream", "aten", "t2t_fast")], tmp_path / "rows.json"
    failure = AssertionError("output is wrong")
    run, measurements = _measured(monkeypatch, planned, path, fails={(FIRST, "aten", 1): failure})
    assert run.timed(FIRST, "t2t_fast")["visits"] == [2, 2, 2]
    assert run.kept(FIRST, "aten") is None
    with pytest.raises(AssertionError, match="output is wrong"):
        run.timed(FIRST, "aten")
    assert [names for _, names, *_ in measurements.asked][-1] == ("upstream", "t2t_fast")
    run.save()
    left_out = run_file.read(path).left_out
    assert left_out == [{"group": FIRST.id, "provider": "aten", "reason": "failed: AssertionError: output is wrong"}]


def test_no_row_without_the_inputs_of_its_group(monkeypatch):
    run, _ = _measured(monkeypatch, [(FIRST, "upstream"), (SECOND, "upstream")])
    measure = harness.measure

    def no_inputs(group, *arguments, **options):
        if group == FIRST:
            raise MemoryError("no inputs")
        return measure(group, *arguments, **options)

    monkeypatch.setattr(harness, "measure", no_inputs)
    with pytest.raises(MemoryError, match="no inputs"):
        run.timed(FIRST, "upstream")
    assert run.timed(SECOND, "upstream")["visits"] == [2, 2, 2]


@pytest.mark.parametrize(("seconds", "first", "second"), [(-1, [], []), (2, [2], [2]), (3, [2, 2], [2])])
def test_a_time_limit_takes_the_last_visits_first(monkeypatch, seconds, first, second):
    """Each measurement takes 1.25 seconds of a clock that stands still otherwise."""
    planned, now = [(FIRST, "upstream"), (SECOND, "upstream")], 100.0
    monkeypatch.setattr(session.time, "monotonic", lambda: now)
    run, _ = _measured(monkeypatch, planned, limit=seconds)
    measure = harness.measure

    def slow(*arguments, **options):
        nonlocal now
        now += 1.25
        return measure(*arguments, **options)

    monkeypatch.setattr(harness, "measure", slow)
    for (group, name), expected in zip(planned, (first, second), strict=True):
        if expected:
            assert run.timed(group, name)["visits"] == expected
        else:
            with pytest.raises(groups.LeftOut, match="the time limit of -1 s had passed"):
                run.timed(group, name)


def test_a_run_stopped_between_visits_goes_on_with_the_next(monkeypatch, tmp_path):
    planned, path = [(group, "upstream") for group in (FIRST, SECOND)], tmp_path / "rows.json"
    environment = {**ENVIRONMENT, "visits": 3}
    twice, once = {"times": [5.0] * 4, "visits": [2, 2]}, {"visits": [3]}
    before = [{**_row(FIRST, "upstream"), **twice}, {**_row(SECOND, "upstream"), **once}]
    run_file.write(path, run_file.RunFile(environment, before, [], [], [], 2))
    assert not run_file.read(path).complete
    run, measurements = _measured(monkeypatch, planned, path)
    assert run.timed(FIRST, "upstream")["times"] == [5.0] * 4 + [1.0] * 2
    assert run.timed(SECOND, "upstream")["visits"] == [3, 2, 2]
    assert run.kept(SECOND, "upstream")[1]["times"] == [0.1, 0.2, 0.3] + [1.0] * 2 + [2.0] * 2
    assert [group for group, *_ in measurements.asked] == [SECOND, FIRST, SECOND]
    run.save()
    assert run_file.read(path).complete


def test_rows_with_other_visits_than_their_peers_are_measured_again(tmp_path):
    peer = {**_row(FIRST, "aten"), "times": [0.1] * 4, "visits": [2, 2]}
    run = _resumed(_file(tmp_path, [_row(FIRST, "upstream"), peer]), (FIRST, "upstream"), (FIRST, "aten"))
    assert run.found == {}


def test_a_run_is_resumed_in_its_own_environment_only():
    now = {**ENVIRONMENT, "threads": 2, "quick": False}
    assert session.differences(now, {**now, "date": "another"}) == []
    assert session.differences(now, {**now, "quick": True, "torch": "9"}) == [
        "torch was '2.11' and is '9'",
        "quick was False and is True",
    ]


def test_a_run_is_not_overwritten(tmp_path, capsys):
    path = _file(tmp_path, [_row(FIRST, "upstream")])
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its settings are glibc's")
def test_memory_that_is_kept_is_noted_and_part_of_the_command(tmp_path, monkeypatch):
    def suites(arguments, out):
        environment = {**ENVIRONMENT, **session.describe("cpu", True, command.command_line(arguments))}
        run_file.write(out / "rows.json", run_file.RunFile(environment, [_row(FIRST, "upstream")], [], [], [], 1))
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
    for row, resumed in zip(before.rows, after.rows, strict=False):
        first = len(row["times"])
        assert first == row["visits"][0] == resumed["visits"][0] and resumed["times"][:first] == row["times"]
    times = {(row["group"], row["provider"]): row["times"] for row in after.rows}
    assert {(row["group"], row["provider"]): row["times"] for row in raw.rows} == times


@pytest.mark.parametrize(
    ("offset", "slope", "limit", "expected"),
    [(100, 10, 1000, 90), (0, 10, 1000, 100), (995, 10, 1000, 0), (0, 400, 1000, 2), (0, 0.001, 50, 50_000)],
    ids=["a line", "exactly full", "not even one", "between the probes", "a small step"],
)
def test_largest_batch_on_a_line(offset, slope, limit, expected):
    tries = []

    def used(batch):
        tries.append(batch)
        return offset + slope * batch

    batch, bytes_used, over = fit.largest(used, limit)
    assert batch == expected
    assert over > limit >= bytes_used
    assert len(tries) == len(set(tries)) <= 9


def test_largest_batch_where_memory_bends_and_allocations_are_refused():
    """An allocator that keeps what it had, and says nothing but no beyond the limit."""
    tries = []

    def used(batch):
        tries.append(batch)
        return None if batch > 777 else 50 * batch + batch**2 / 100

    assert fit.largest(used, 1e6) == (777, used(777), None)
    assert len(tries) < 20


def test_largest_batch_without_end():
    batch, _, _ = fit.largest(lambda batch: 0, 1)
    assert batch == fit.MOST


@pytest.mark.slow
def test_the_largest_batch_of_a_model(monkeypatch):
    monkeypatch.setitem(fit.LIMIT_BYTES, "cpu", 1e8)
    group, said = FITTING._replace(size=64), []
    found = [fit.measure(group, name, "cpu", said.append) for name in ("upstream", "t2t_fast")]
    for entry in found:
        assert entry["used_bytes"] <= entry["limit_bytes"] < entry["over_bytes"]
    upstream, ours = found
    assert ours["batch"] > upstream["batch"] > 3
    assert "a step of 1 image" in said
    trainer = fit.Trainer(group, BY_NAME["upstream"], "cpu")
    trainer.used(1, 1e8)  # makes the optimizer's state
    assert trainer.used(upstream["batch"], 1e8) == pytest.approx(upstream["used_bytes"], rel=0.02)


@pytest.mark.slow
def test_two_processes_train_together():
    group = Group("model", "t2t_vit_7", 64, 2, "fp32", "training", False, "processes", 2)
    entry = processes.measure(group, "t2t_fast", lambda text: None)
    assert len(entry["times"]) == processes.ROUNDS
    assert entry["images_per_s"] == pytest.approx(4 / entry["seconds"]["median"])
    assert (entry["group"], entry["processes"]) == ("processes-t2t_vit_7-64px-b2-fp32-training-n2", 2)


def test_a_process_that_fails_tells_why():
    group = Group("model", "no_such_model", 64, 2, "fp32", "training", False, "processes", 1)
    with pytest.raises(RuntimeError, match=r"a process ended with code 1: .*no attribute 'no_such_model'"):
        processes.measure(group, "t2t_fast", lambda text: None)


def test_latency_is_the_wait_for_one_call():
    assert clocks.clock("cpu", "latency").calls(1e-6) == 1
    assert isinstance(clocks.clock("cuda", "latency"), clocks.CudaLatencyClock)
    assert clocks.clock("cpu", "ops").calls(1e-3) == 10
    least, most = harness.ROUNDS["latency"]
    assert harness.rounds_for(1.0, 1.0, "latency") == least and harness.rounds_for(0.0, 1.0, "latency") == most


def test_a_cuda_latency_ends_with_the_last_kernel(monkeypatch):
    now, order = 0.0, []

    def synchronize():
        nonlocal now
        order.append("synchronize")
        now += 5.0

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: now)
    implementation = type("Made", (), {"clear": lambda self: order.append("clear")})()
    seconds = clocks.CudaLatencyClock().turn(lambda: order.append("step"), implementation, 1)
    assert (seconds, order) == (5.0, ["clear", "synchronize", "step", "synchronize"])


def test_the_timer_is_pytest_benchmarks_own():
    timers = pytest.importorskip("pytest_benchmark.timers")
    assert clocks.CpuClock().timer is timers.default_timer is time.perf_counter


@pytest.mark.parametrize("name", context.MODELS)
def test_context_models_are_measured_beside_ours_or_say_why_not(name):
    model = context.MODELS[name]
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
    implementation = subjects.Implementation(module, [], {}, truth=(torch.ones(2, 3), {}), batch_norm=True)
    subject = subjects.Subject(FIRST, "cpu", lambda: (None, {}), None, None, None)
    subject.check(5 * torch.ones(2, 3), {}, implementation, noisy=True)
    with pytest.raises(AssertionError, match="wrong"):
        subject.check(torch.full((2, 3), float("nan")), {}, implementation, noisy=True)


def test_a_model_of_another_package_has_no_floor_of_ours():
    group = Group("model", "t2t_vit_14", 224, 2, "fp32", "inference", False, "models")
    cost = subjects.costs.t2t_vit("performer", 224, 384, 14, 3, 4)
    limits = {"bytes_per_s": 1e10, "flop_per_s": {"fp32": 1e11}}
    found = {
        name: rows.row(
            group,
            name,
            {name: harness.Participant(name, None, None, None, times=[1.0], facts={"cost": cost, "saved_bytes": None})},
            limits,
            "cpu",
        )
        for name in ("t2t_fast", "timm-resnet50")
    }
    ours = found["t2t_fast"]
    assert ours["floor_share"] == pytest.approx(ours["floor_s"]) == pytest.approx(1 / ours["times_floor"])
    assert all(found["timm-resnet50"][key] is None for key in rows.AGAINST_COST)
    assert found["timm-resnet50"]["images_per_s"] == 2


def test_a_missing_package_says_so(tmp_path, monkeypatch):
    with pytest.raises(groups.LeftOut, match="the package made-up is not installed"):
        packages.load("made-up", "made_up.part")
    (tmp_path / "broken_one.py").write_text("import another_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(groups.LeftOut, match=r"cannot be imported \(No module named 'another_that_is_missing'\)"):
        packages.load("broken-one", "broken_one")


def test_run_files_are_strict_json(tmp_path):
    """A NaN would be written as something that other readers refuse."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        run_file.write(tmp_path / "rows.json", run_file.RunFile({"x": float("nan")}, [], [], [], []))
    assert not (tmp_path / "rows.json").exists()
    run_file.write(tmp_path / "rows.json", run_file.RunFile({}, [], [], [], []))
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == []

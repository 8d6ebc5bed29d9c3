"""Visits to the groups of a run: order, pooled rounds, failures, time limits, and resumption between visits."""

import gc
import re
import weakref
from copy import copy

import pytest

from benchmarks.measure import fit, harness, rows, run_file, session
from benchmarks.suites import costs, groups
from benchmarks.suites.groups import Group
from benchmarks.suites.providers import plan
from support.rows import ENVIRONMENT
from support.runs import FIRST, FITTING, SECOND, finished_row, plan_of, resumed, written


class MadeMeasurements:
    """Replaces :func:`harness.measure`: two rounds of 1 + visit seconds at each visit, with :data:`COST` as the cost.

    ``fails``: (group, provider, visit) -> exception; with the provider ``None`` the whole group fails. ``asked``: the
    requested measurements, in order. ``alive``: earlier results that still exist when a measurement begins.
    """

    def __init__(self, fails):
        self.fails, self.asked, self.made, self.alive = dict(fails), [], [], []

    def __call__(self, group, names, device, budget, say, thorough, visits, rounds):
        visit = sum(group == before for before, *_ in self.asked)
        self.alive += [each for made in self.made if (each := made()) is not None]
        self.asked.append((group, tuple(names), rounds))
        say("measures")
        if (group, None, visit) in self.fails:
            raise self.fails[group, None, visit]
        found = {}
        for name in names:
            facts = {**dict.fromkeys(rows.FACTS), "cost": COST, "first_call_s": 7.0 + visit}
            facts = facts if rounds is None else {"cost": COST, "first_call_s": 7.0 + visit}
            found[name] = harness.Participant(name, None, None, None, times=[1.0 + visit] * 2, facts=facts)
            try:
                if (group, name, visit) in self.fails:
                    failure = self.fails[group, name, visit]
                    raise failure if isinstance(failure, groups.ContextLost) else copy(failure)
            except groups.ContextLost:
                raise
            except Exception as failure:  # noqa: BLE001 - its traceback refers to this frame, like a real one
                found[name] = failure
        self.made.append(weakref.ref(next(iter(found.values()))))
        return found


COST = costs.t2t_vit("t2t_vit_7", 224, 4)
MODEL = Group("model", "t2t_vit_7", 224, 8, "fp32", "training", False, "training")


@pytest.fixture(autouse=True, scope="module")
def _few_objects():
    """A run collects garbage often; imported objects are excluded, because scanning them is slow."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def measured(monkeypatch):
    """A function that returns a run with fake measurements, these measurements, and the lines of progress."""

    def make(planned, path=None, limit=None, fails=()):
        said, measurements = [], MadeMeasurements(fails)
        monkeypatch.setattr(harness, "measure", measurements)
        monkeypatch.setattr(session, "describe", lambda *arguments: {**ENVIRONMENT, "visits": 3})
        monkeypatch.setattr(session.machine, "limits", lambda device: ENVIRONMENT["limits"])
        write = lambda rows, passed, done, left, text: said.append((rows, passed, done, left, text))  # noqa: E731
        return session.Run(plan_of(planned), "cpu", False, path, "a command", limit, write), measurements, said

    return make


def _row(run, group, name):
    return run.found[group.id, name]


def _reason(run, group, name):
    return run.found[group.id, name]["reason"]


def test_groups_are_visited_in_turn_and_rounds_pooled(measured, tmp_path):
    planned = [(group, name) for group in (FIRST, MODEL) for name in ("upstream", "t2t_fast")]
    run, measurements, said = measured(planned, tmp_path / "rows.json")
    run.run()
    both = ("upstream", "t2t_fast")
    assert measurements.asked == [(group, both, rounds) for rounds in (None, 2, 2) for group in (FIRST, MODEL)]
    for group, name in planned:
        row = _row(run, group, name)
        assert (row["times"], row["visits"]) == ([1.0, 1.0, 2.0, 2.0, 3.0, 3.0], [2, 2, 2])
        assert row["seconds"]["median"] == 2.0 and row["speedup"]["median"] == 1.0
        assert row["first_call_s"] == 7.0  # of the first visit: later ones find compiled code on disk
    assert [line[0] for line in said[1:]] == [f"visit {v} of 3: {rows}/4 rows" for v in (1, 2, 3) for rows in (0, 2)]
    assert said[-1][-1] == f"{MODEL.id}: measures"
    assert run_file.read(tmp_path / "rows.json").complete and not run.failed


def test_progress_estimates_the_time_that_is_left(measured, capsys):
    planned = [(FIRST, "upstream"), (FIRST, "t2t_fast")]
    run, _, said = measured(planned)
    run.add({**finished_row(FIRST, "upstream"), "visits": [3]})
    run.say(FIRST, "goes on")
    ((rows_done, _, done, left, text),) = said
    assert (rows_done, text) == ("visit 1 of 3: 1/2 rows", f"{FIRST.id}: goes on")
    assert left == pytest.approx(5 * done) == pytest.approx(5 * (1.0 + session.SECONDS["op"]))
    session.show(rows_done, 90.0, done, left, text)
    out = capsys.readouterr().out
    assert re.fullmatch(rf"\[visit 1 of 3: 1/2 rows(, 01:30, 07:(29|30) left)?\] {FIRST.id}: goes on\n", out)


@pytest.mark.parametrize("why", [None, groups.LeftOut("not installed"), AssertionError("wrong")], ids=repr)
def test_group_is_freed_before_the_next(measured, why):
    fails = {(FIRST, "aten", 0): why} if why else {}
    run, measurements, _ = measured([(FIRST, "upstream"), (FIRST, "aten"), (SECOND, "upstream")], fails=fails)
    run.run()
    assert len(measurements.made) == 6 and measurements.alive == []
    assert run.failed == isinstance(why, AssertionError)


def test_failure_at_a_later_visit_drops_one_row(measured, tmp_path, capsys):
    planned, path = [(FIRST, name) for name in ("upstream", "aten", "t2t_fast")], tmp_path / "rows.json"
    run, measurements, _ = measured(planned, path, fails={(FIRST, "aten", 1): AssertionError("output is wrong")})
    run.run()
    assert _row(run, FIRST, "t2t_fast")["visits"] == [2, 2, 2]
    assert [names for _, names, _ in measurements.asked][-1] == ("upstream", "t2t_fast")
    left_out = run_file.read(path).left_out
    assert left_out == [{"group": FIRST.id, "provider": "aten", "reason": "failed: AssertionError: output is wrong"}]
    assert run.failed and "AssertionError: output is wrong" in capsys.readouterr().err


def test_failed_inputs_drop_the_group(measured):
    run, _, _ = measured(
        [(FIRST, "upstream"), (SECOND, "upstream")], fails={(FIRST, None, 0): MemoryError("no inputs")}
    )
    run.run()
    assert _reason(run, FIRST, "upstream") == "failed: MemoryError: no inputs"
    assert _row(run, SECOND, "upstream")["visits"] == [2, 2, 2]


@pytest.mark.parametrize("culprit", ["aten", "upstream"])
def test_row_that_loses_the_cuda_context(measured, tmp_path, culprit):
    planned, path = [(MODEL, name) for name in ("upstream", "aten")], tmp_path / "rows.json"
    lost = groups.ContextLost(culprit, RuntimeError("CUDA error: an illegal memory access\nmore"))
    run, _, _ = measured(planned, path, fails={(MODEL, "upstream", 1): lost})
    with pytest.raises(groups.ContextLost):
        run.run()
    blamed = "aten" if culprit == "aten" else "upstream"
    (entry,) = run_file.read(path).left_out
    reason = "its call ended the process's CUDA context: RuntimeError: CUDA error: an illegal memory access"
    assert entry == {"group": MODEL.id, "provider": blamed, "reason": reason}
    # the next process measures the group again without that row
    again, measurements, _ = measured(planned, path)
    again.run()
    assert {names for _, names, _ in measurements.asked} == {("upstream",) if culprit == "aten" else ("aten",)}


@pytest.mark.parametrize(("seconds", "first", "second"), [(-1, None, None), (2, [2], [2]), (3, [2, 2], [2])])
def test_time_limit_drops_the_last_visits_first(measured, monkeypatch, seconds, first, second):
    """Each measurement advances a fake clock by 1.25 seconds."""
    now = 100.0
    monkeypatch.setattr(session.time, "monotonic", lambda: now)
    run, _, _ = measured([(FIRST, "upstream"), (SECOND, "upstream")], limit=seconds)
    measure = harness.measure

    def slow(*arguments, **options):
        nonlocal now
        now += 1.25
        return measure(*arguments, **options)

    monkeypatch.setattr(harness, "measure", slow)
    run.run()
    for group, expected in ((FIRST, first), (SECOND, second)):
        if expected is None:
            assert _reason(run, group, "upstream") == "the time limit of -1 s had passed"
        else:
            assert _row(run, group, "upstream")["visits"] == expected


def test_largest_batches_are_measured_one_by_one(measured, monkeypatch, tmp_path):
    def largest(group, name, device, say):
        say("a step of 1 image")
        if name == "upstream":
            raise RuntimeError("no")
        return {"group": group.id, "provider": name, "batch": 7}

    monkeypatch.setattr(fit, "measure", largest)
    run, _, said = measured([(FITTING, "upstream"), (FITTING, "t2t_fast")], tmp_path / "rows.json")
    run.run()
    assert _row(run, FITTING, "t2t_fast")["batch"] == 7
    assert _reason(run, FITTING, "upstream") == "failed: RuntimeError: no"
    assert [(line[0], line[-1]) for line in said[1:]] == [
        (f"{done}/2 rows", f"{FITTING.id}: a step of 1 image") for done in (0, 1)
    ]


def test_a_run_stopped_between_visits_goes_on_with_the_next(measured, tmp_path):
    planned, path = [(group, "upstream") for group in (FIRST, SECOND)], tmp_path / "rows.json"
    environment = {**ENVIRONMENT, "visits": 3}
    twice, once = {"times": [5.0] * 4, "visits": [2, 2]}, {"visits": [3]}
    before = [{**finished_row(FIRST, "upstream"), **twice}, {**finished_row(SECOND, "upstream"), **once}]
    run_file.write(path, run_file.RunFile(environment, before, [], 2))
    assert not run_file.read(path).complete
    run, measurements, _ = measured(planned, path)
    run.run()
    assert _row(run, FIRST, "upstream")["times"] == [5.0] * 4 + [1.0] * 2
    assert _row(run, SECOND, "upstream")["visits"] == [3, 2, 2]
    assert _row(run, SECOND, "upstream")["times"] == [0.1, 0.2, 0.3] + [1.0] * 2 + [2.0] * 2
    assert [group for group, *_ in measurements.asked] == [SECOND, FIRST, SECOND]
    assert run_file.read(path).complete


def test_rows_with_other_visits_than_their_peers_are_measured_again(tmp_path):
    peer = {**finished_row(FIRST, "aten"), "times": [0.1] * 4, "visits": [2, 2]}
    run = resumed(written(tmp_path, [finished_row(FIRST, "upstream"), peer]), (FIRST, "upstream"), (FIRST, "aten"))
    assert run.found == {}


def test_a_quick_run_takes_less_than_ten_minutes():
    """Estimated for two idle cores; the bound leaves room for a machine that takes 1.5 times as long."""
    planned = plan(groups.SUITES, "cpu", quick=True)
    estimated = session.START_SECONDS + sum(
        session.estimate(group, names, name, "cpu", True, visit)
        for group, names in planned.items()
        for name in names
        for visit in range(session.visits(group, "cpu", True))
    )
    print(f"estimated: {estimated:.0f} s, {sum(map(len, planned.values()))} rows")
    assert estimated < 400

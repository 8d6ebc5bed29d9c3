"""Visits to the groups of a run: in turn, rounds taken together, failures, limits, and a stop between them."""

import re
import weakref

import pytest

from benchmarks.measure import harness, rows, run_file, session
from benchmarks.suites import groups, subjects
from benchmarks.suites.groups import Group
from support.rows import ENVIRONMENT
from support.runs import FIRST, SECOND, finished_row, resumed, written


class MadeMeasurements:
    """Takes the place of :func:`harness.measure`: two rounds a visit of 1 + visit seconds, at a cost of its own.

    ``fails``: (group, provider, visit) -> exception. ``asked``: what was asked for, in order.
    """

    def __init__(self, fails=()):
        self.fails, self.asked, self.made = dict(fails), [], []

    def __call__(self, group, names, device, budget, say, thorough, visits, rounds):
        visit = sum(group == before for before, *_ in self.asked)
        assert thorough
        self.asked.append((group, tuple(names), rounds))
        say("measures")
        found = {}
        for name in names:
            facts = {**dict.fromkeys(rows.FACTS), "cost": COST, "first_call_s": 7.0 + visit}
            facts = facts if rounds is None else {"cost": COST, "first_call_s": 7.0 + visit}
            found[name] = harness.Participant(name, None, None, None, times=[1.0 + visit] * 2, facts=facts)
            try:
                if (group, name, visit) in self.fails:
                    raise self.fails[group, name, visit]
            except Exception as failure:  # noqa: BLE001 - by its traceback it holds this frame, and so does a real one
                found[name] = failure
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
    assert measurements.asked == [(group, both, rounds) for rounds in (None, 2, 2) for group in (FIRST, MODEL)]
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


@pytest.mark.parametrize("why", [None, groups.LeftOut("not installed"), AssertionError("wrong")], ids=repr)
def test_a_run_lets_go_of_a_group_before_the_next_and_before_memory_is_measured(monkeypatch, why):
    fails = {(FIRST, "aten", 0): why} if why else {}
    run, measurements = _measured(
        monkeypatch, [(FIRST, "upstream"), (FIRST, "aten"), (SECOND, "upstream")], fails=fails
    )
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
    assert [names for _, names, _ in measurements.asked][-1] == ("upstream", "t2t_fast")
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
    before = [{**finished_row(FIRST, "upstream"), **twice}, {**finished_row(SECOND, "upstream"), **once}]
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
    peer = {**finished_row(FIRST, "aten"), "times": [0.1] * 4, "visits": [2, 2]}
    run = resumed(written(tmp_path, [finished_row(FIRST, "upstream"), peer]), (FIRST, "upstream"), (FIRST, "aten"))
    assert run.found == {}

"""Turns of a provider: what the clock of each device measures, their order, and the number of rounds."""

import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks.measure import clocks, harness
from benchmarks.measure.statistics import ratios, summary
from benchmarks.suites.groups import ContextLost
from benchmarks.suites.providers import BY_NAME


class Time:
    """A fake clock that advances only by :meth:`spend`."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def spend(self, seconds):
        self.now += seconds


def test_cpu_clock_times_the_calls_and_not_what_comes_before():
    time = Time()
    implementation = SimpleNamespace(clear=lambda: time.spend(1000.0))
    clock = clocks.CpuClock(timer=time)
    assert clock.turn(lambda: time.spend(0.25), implementation, 4) == 0.25
    assert [clock.calls(seconds) for seconds in (0.0, 0.0004, 0.004, 1.0)] == [20, 20, 3, 1]


def test_latency_is_the_wait_for_one_call():
    assert clocks.clock("cpu", "latency").calls(1e-6) == 1
    assert clocks.clock("cuda", "latency").single
    assert clocks.clock("cpu", "ops").calls(1e-3) == 10


def test_a_cuda_latency_ends_with_the_last_kernel(monkeypatch):
    time, order = Time(), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("synchronize") or time.spend(5.0))
    monkeypatch.setattr(clocks.time, "perf_counter", time)
    implementation = SimpleNamespace(clear=lambda: order.append("clear"))
    seconds = clocks.clock("cuda", "latency").turn(lambda: order.append("step"), implementation, 1)
    assert (seconds, order) == (5.0, ["clear", "synchronize", "step", "synchronize"])


def test_cuda_clock_takes_do_bench_median_and_clears_gradients(monkeypatch):
    seen = {}

    def do_bench(step, **options):
        seen.update(options, result=step())
        return 12.5

    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "triton.testing", SimpleNamespace(do_bench=do_bench))
    implementation = SimpleNamespace(all_leaves=lambda: ["a leaf"])
    assert clocks.clock("cuda").turn(lambda: "called", implementation, 1) == 0.0125
    assert (seen["result"], seen["grad_to_none"], seen["return_mode"]) == ("called", ["a leaf"], "median")


def test_failing_synchronize_means_a_lost_context(monkeypatch):
    assert not clocks.context_lost("cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert not clocks.context_lost("cuda")

    def fail():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    assert clocks.context_lost("cuda")


class RecordingClock:
    """A turn takes the provider's cost times the machine's drift, which grows every three turns."""

    def __init__(self, time, **cost):
        self.time, self.cost, self.order = time, cost, []

    def turn(self, step, implementation, calls):
        name = step()
        self.order.append(name)
        seconds = (1 + len(self.order) // 3) * self.cost[name]
        self.time.spend(seconds)
        return seconds


def _participants(names):
    return [harness.Participant(name, None, None, lambda name=name: name) for name in names]


def test_rounds_are_interleaved_and_their_order_rotates():
    clock, participants = RecordingClock(Time(), a=1.0, b=2.0, c=4.0), _participants("abc")
    harness.interleave(participants, clock, 4)
    assert "".join(clock.order) == "abcbcacababc"
    assert [len(each.times) for each in participants] == [4, 4, 4]


@pytest.mark.parametrize(("seconds", "rounds"), [(1.0, 20), (100.0, 7), (1e-6, 60)])
def test_there_are_as_many_rounds_as_the_budget_allows(monkeypatch, seconds, rounds):
    time = Time()
    monkeypatch.setattr(harness.time, "perf_counter", time)
    (alone,) = _participants("a")
    clock = SimpleNamespace(turn=lambda *call: time.spend(seconds) or seconds)
    harness.interleave([alone], clock, harness.MIN_ROUNDS, harness.MAX_ROUNDS, 20.0)
    assert len(alone.times) == rounds


def test_lost_context_names_its_provider(monkeypatch):
    def turn(*call):
        raise ValueError("wrong")

    monkeypatch.setattr(harness.clocks, "context_lost", lambda device: device == "cuda")
    monkeypatch.setattr(harness, "BY_NAME", {"a": BY_NAME["upstream"]})
    with pytest.raises(ContextLost, match="wrong") as failure:
        harness.interleave(_participants("a"), SimpleNamespace(turn=turn), 1, device="cuda")
    assert failure.value.provider == "a"
    failures = harness.interleave(_participants("a"), SimpleNamespace(turn=turn), 1, device="cpu")
    assert [(name, str(failure)) for name, failure in failures.items()] == [("a", "wrong")]


def test_a_participant_that_fails_has_no_further_turn(monkeypatch):
    monkeypatch.setattr(harness, "BY_NAME", dict.fromkeys("abc", BY_NAME["upstream"]))
    order = []

    def turn(step, implementation, calls):
        order.append(step())
        if order[-1] == "b" and order.count("b") == 2:
            raise RuntimeError("ended")
        return 1.0

    participants = _participants("abc")
    failures = harness.interleave(participants, SimpleNamespace(turn=turn), 4, before=lambda: order.append("."))
    assert "".join(order) == ".a.b.c.b.c.a.c.a.a.c" and list(failures) == ["b"]
    assert [len(each.times) for each in participants] == [4, 1, 4]


def test_other_processes_wait_until_the_threads_of_this_one_sleep(monkeypatch):
    busy, now = [1.0, 0.5, 0.0, 1.0], Time()
    monkeypatch.setattr(
        harness, "time", SimpleNamespace(process_time=now, sleep=lambda seconds: now.spend(seconds * busy.pop(0)))
    )
    harness.settle()
    assert busy == [1.0]  # two looks at busy threads, and one at sleeping threads
    busy = [1.0] * 2 * harness.LOOKS
    harness.settle()
    assert len(busy) == harness.LOOKS  # threads that never sleep do not stop a run


def test_a_step_in_another_process_measures_itself():
    time = Time()
    implementation = SimpleNamespace(clear=lambda: None)
    assert clocks.CpuClock(timer=time).turn(lambda: time.spend(5.0) or 0.25, implementation, 4) == 0.25


def test_ratios_are_taken_inside_a_round():
    # the machine becomes 100 times slower halfway: medians of times would compare different halves
    slow = [1.0, 1.0, 1.0, 100.0, 100.0]
    ours = [0.5, 0.5, 0.5, 50.0, 50.0]
    assert ratios(slow, ours) == {"median": 2.0, "p20": 2.0, "p80": 2.0}
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])


def test_percentiles():
    assert summary([5.0, 1.0, 2.0, 4.0, 3.0]) == pytest.approx({"median": 3.0, "p20": 1.8, "p80": 4.2})
    assert summary([7.0], p95=0.95) == {"p95": 7.0}

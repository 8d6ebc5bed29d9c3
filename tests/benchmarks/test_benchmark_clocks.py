"""What a turn of a provider is on each device, and when its clock starts and stops."""

import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks.measure import clocks, harness
from benchmarks.measure.clocks import CpuClock, CudaClock


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


def test_cpu_clock_times_the_calls_and_not_what_comes_before():
    now = 0.0

    def timer():
        return now

    def spend(seconds):
        nonlocal now
        now += seconds

    implementation = SimpleNamespace(clear=lambda: spend(1000.0))
    clock = CpuClock(timer)
    assert clock.turn(lambda: spend(0.25), implementation, 4) == 0.25
    assert clock.calls(0.0004) == 20
    assert clock.calls(0.004) == 3
    assert clock.calls(1.0) == 1


def test_cuda_clock_takes_do_bench_median_and_clears_gradients(monkeypatch):
    seen = {}

    def do_bench(step, **options):
        seen.update(options, result=step())
        return 12.5

    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "triton.testing", SimpleNamespace(do_bench=do_bench))
    implementation = SimpleNamespace(all_leaves=lambda: ["a leaf"])
    assert CudaClock().turn(lambda: "called", implementation, 1) == 0.0125
    assert (seen["result"], seen["grad_to_none"], seen["return_mode"]) == ("called", ["a leaf"], "median")

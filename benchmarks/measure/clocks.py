"""How long one call takes: wall clock on a CPU, events on a GPU, and on both the wait for a single result.

``time.perf_counter`` is pytest-benchmark's own timer (``pytest_benchmark.timers.default_timer``).
"""

import time
from math import ceil

import torch


class CpuClock:
    """Wall clock around single calls; what comes before a call (clearing gradients) is not timed."""

    long_enough = 0.01
    """Seconds of a turn: it has as many calls as fit, so that short calls do not drown in the change of provider."""

    def __init__(self, timer=time.perf_counter):
        self.timer = timer

    def calls(self, seconds):
        """Calls in a turn of a provider that takes ``seconds`` a call."""
        return max(1, min(20, ceil(self.long_enough / seconds))) if seconds > 0 else 20

    def turn_seconds(self, seconds, calls):
        """How long a turn takes."""
        return seconds * calls

    def turn(self, step, implementation, calls):
        """Mean seconds of a call over ``calls`` calls."""
        total = 0.0
        for _ in range(calls):
            implementation.clear()
            start = self.timer()
            step()
            total += self.timer() - start
        return total / calls

    def once(self, step, implementation):
        """Seconds of one call, compilation included if it is the first."""
        return self.turn(step, implementation, 1)


class CudaClock:
    """Median of ``triton.testing.do_bench``: CUDA events, L2 cache emptied before each call."""

    milliseconds = 25

    def calls(self, seconds):
        """``do_bench`` counts by itself."""
        return 1

    def turn_seconds(self, seconds, calls):
        """How long a turn takes: five calls to estimate, then warm-up and repetitions, at least one of each."""
        return 5 * seconds + max(seconds, 0.005) + max(seconds, self.milliseconds / 1e3)

    def turn(self, step, implementation, calls):
        """Median seconds of a call."""
        from triton.testing import do_bench

        leaves = implementation.all_leaves()
        return do_bench(step, warmup=5, rep=self.milliseconds, grad_to_none=leaves, return_mode="median") / 1e3

    def once(self, step, implementation):
        """Seconds of one call up to its last kernel, compilation included if it is the first."""
        return _until_done(step, implementation)


class CpuLatencyClock(CpuClock):
    """The wait for one call: a turn is a single call, so that its rounds have a distribution."""

    def calls(self, seconds):
        """One."""
        return 1


class CudaLatencyClock(CudaClock):
    """The wait for one call on a GPU: wall clock from the call to its last kernel, Python and launches included."""

    def turn_seconds(self, seconds, calls):
        """How long a turn takes."""
        return seconds

    def turn(self, step, implementation, calls):
        """Seconds of one call."""
        return _until_done(step, implementation)


def _until_done(step, implementation):
    implementation.clear()
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def context_lost(device):
    """Whether the CUDA context of this process has ended with an error, which every later call would raise again."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def clock(device, suite=None):
    """The clock of a device: for the suite "latency" the wait for a single call."""
    if suite == "latency":
        return CudaLatencyClock() if device == "cuda" else CpuLatencyClock()
    return CudaClock() if device == "cuda" else CpuClock()

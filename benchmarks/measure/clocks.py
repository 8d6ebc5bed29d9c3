"""The duration of a call: wall clock on a CPU, CUDA events on a GPU; for latency, wall clock until the result."""

import time
from math import ceil

import torch


class CpuClock:
    """Wall clock around single calls, without clearing gradients; ``single``: a turn is one call, for latency.

    A step that returns seconds has measured itself, in another process.
    """

    # minimum seconds of a turn: several short calls in a row reduce the effect of switching between providers
    long_enough = 0.01

    def __init__(self, single=False, timer=time.perf_counter):
        self.single, self.timer = single, timer

    def calls(self, seconds):
        """Calls in a turn of a provider that takes ``seconds`` a call."""
        return 1 if self.single else max(1, min(20, ceil(self.long_enough / max(seconds, 1e-9))))

    def turn(self, step, implementation, calls):
        """Mean seconds of a call over ``calls`` calls."""
        total = 0.0
        for _ in range(calls):
            implementation.clear()
            start = self.timer()
            own = step()
            total += self.timer() - start if own is None else own
        return total / calls

    def once(self, step, implementation):
        """Seconds of one call, compilation included if it is the first."""
        return self.turn(step, implementation, 1)


class CudaClock:
    """Median of ``triton.testing.do_bench``: CUDA events, L2 cache emptied before each call.

    ``single``: instead wall clock from one call to its last kernel, Python and launches included.
    """

    milliseconds = 25

    def __init__(self, single=False):
        self.single = single

    def calls(self, seconds):
        """One: ``do_bench`` repeats the call itself."""
        return 1

    def turn(self, step, implementation, calls):
        """Median seconds of a call."""
        if self.single:
            return self.once(step, implementation)
        from triton.testing import do_bench

        leaves = implementation.all_leaves()
        return do_bench(step, warmup=5, rep=self.milliseconds, grad_to_none=leaves, return_mode="median") / 1e3

    def once(self, step, implementation):
        """Seconds of one call up to its last kernel, compilation included if it is the first."""
        implementation.clear()
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        return time.perf_counter() - start


def clock(device, suite=None):
    """The clock of a device: for the suite "latency" the wait for a single call."""
    return (CudaClock if device == "cuda" else CpuClock)(single=suite == "latency")


def context_lost(device):
    """Whether the CUDA context of this process has ended with an error, which every later call would raise again."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False

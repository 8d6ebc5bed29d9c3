"""Functions that a worker process of the benchmarks loads in tests; they do not import PyTorch."""

import os
import signal
import sys
import time

import numpy as np

from benchmarks.suites.groups import LeftOut


def scaled(factor):
    """A function that multiplies by ``factor``."""
    return lambda image: image * factor


def places():
    """A function that returns where its input is, and whether PyTorch is imported."""
    return lambda image: np.array([image.ctypes.data, "torch" in sys.modules])


def slow(seconds):
    """A function that takes so long."""
    return lambda image: time.sleep(seconds) or image


def broken(kind):
    """Fails to load: with another package's exception, or because it cannot be measured here."""
    if kind == "left out":
        raise LeftOut("not on this processor")

    class ForeignError(Exception):
        pass

    raise ForeignError(f"the graph is {kind}")


def dying(path, dtype, threads, after=5):
    """Kills its process at a call, as a runtime that runs out of memory."""
    calls = 0

    def call(image):
        nonlocal calls
        calls += 1
        if calls > after:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.zeros((len(image), 4, 384), np.float32)

    return call

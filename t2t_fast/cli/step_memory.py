"""Peak memory of one training step on a CPU; run in a process of its own, whose peak nothing else has raised."""

import ctypes
import gc
import json
import sys
from pathlib import Path

import torch

from .. import reference
from ..interop.swap import swap
from .measure import training_step

PARTS = ("module", "model")
"""The tokens-to-token module alone, and the whole model."""

_M_MMAP_THRESHOLD = -3


def measure(model, img_size, batch, swapped):
    """Bytes by which the resident set grows at its peak in a training step.

    Args:
        model: name of an upstream-shaped model; img_size, batch: of the input.
        swapped: whether the fast form runs.

    Returns:
        part -> bytes, for each of :data:`PARTS`.
    """
    _return_freed_memory()
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))  # the other form is measured at the same time
    torch.manual_seed(0)
    net = getattr(reference, model)(img_size=img_size)
    if swapped:
        swap(net)
    return {part: _step(net if part == "model" else net.tokens_to_token, img_size, batch) for part in PARTS}


def _step(subject, img_size, batch):
    # Libraries load and caches fill on first use.
    training_step(subject, torch.randn(1, 3, img_size, img_size))()
    subject.zero_grad(set_to_none=True)
    step = training_step(subject, torch.randn(batch, 3, img_size, img_size))
    gc.collect()
    before = _restart()
    step()
    peak = _peak()
    subject.zero_grad(set_to_none=True)
    return peak - before


def _return_freed_memory():
    """Have glibc give large blocks back when they are freed, so that the resident set follows what is in use."""
    try:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 17)
    except (OSError, TypeError, AttributeError):  # another C library: its own habits show in the numbers
        return


def _status(field):
    """A field of Linux's /proc/self/status in bytes, or ``None`` elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":")), None)


def _restart():
    """Reset the peak where the system lets us, and return what is resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak()  # the peak so far: what the step needs beyond it is a lower bound
    return _status("VmRSS")


def _peak():
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:
        sys.exit("this system does not tell a process its peak memory")
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(text):
    """Measure the case given as JSON and print the result as JSON."""
    print(json.dumps(measure(**json.loads(text))))

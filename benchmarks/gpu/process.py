"""The commands of ``make gpu``: each with a log, a time limit, and a process group that can be ended."""

import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress

from .plan import ROOT

GRACE = 10
"""Seconds between SIGINT, after which pytest and the suites still report what they have, and SIGKILL."""

TROUBLE = re.compile(
    r"its call ended the process's CUDA context.*|CUDA error: .*|CUDA_ERROR_\w+.*|.*uncorrectable ECC.*"
)
"""Errors after which a process cannot use its GPU any more; the first one in a log is the cause."""


def cores():
    """Processor cores for this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _child():
    """In the new process: take SIGINT, which background jobs of a shell ignore, and get one if the run is killed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGINT)  # PR_SET_PDEATHSIG


class Running:
    """A running command with its log; it leads a process group of its own.

    Args:
        command: argv; log: path of the log; seconds: its time limit; threads: for PyTorch's parallel loops, or ``None``
            for its default.
    """

    def __init__(self, command, log, seconds, threads=None):
        self.command, self.log, self.seconds = command, log, seconds
        self.stopped, self.begun = False, time.monotonic()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # the log of a killed process is complete
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        with log.open("wb") as sink:
            streams = {"stdin": subprocess.DEVNULL, "stdout": sink, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, start_new_session=True, preexec_fn=_child, **streams
            )

    @property
    def over(self):
        """Whether the process has ended or reached its limit."""
        return self.process.poll() is not None or time.monotonic() - self.begun >= self.seconds

    def words(self):
        """The command as one line, without the path of this checkout."""
        words = ["python" if word == sys.executable else word for word in self.command]
        return shlex.join(words).replace(f"{ROOT}/", "").replace(str(ROOT), ".")

    def signal(self, number):
        """Send a signal to the process group."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def end(running):
    """End these commands and everything they started, and remove local paths from their logs."""
    waiting = [each for each in running if each.process.poll() is None]
    for each in waiting:
        each.stopped = True
        each.signal(signal.SIGINT)
    deadline = time.monotonic() + GRACE
    while any(each.process.poll() is None for each in waiting) and time.monotonic() < deadline:
        time.sleep(0.05)
    for each in running:
        each.signal(signal.SIGKILL)  # also compilers that an ended command has left running
        each.process.wait()
        text = each.log.read_text(errors="replace").replace(str(ROOT), ".").replace(sys.prefix, "<python>")
        each.log.write_text(text)

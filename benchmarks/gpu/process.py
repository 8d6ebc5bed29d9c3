"""The commands of ``make gpu``: each with a log, a time limit, and a process group that can be ended."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

from .plan import ROOT

# Seconds between SIGINT, after which pytest and the suites still report what they have, and SIGKILL
GRACE = 10


def _child():
    """In the new process: take SIGINT, which background jobs of a shell ignore, and get one if the run is killed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGINT)  # PR_SET_PDEATHSIG


class Running(subprocess.Popen):
    """A running command with its log, in a process group of its own; ``jobs``: how many commands share the cores."""

    def __init__(self, command, log, jobs=1):
        self.log, self.begun, self.stopped = log, time.monotonic(), False
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # the log of a killed process is complete
        if jobs > 1:
            environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // jobs))
        with log.open("wb") as sink:
            streams = {"stdin": subprocess.DEVNULL, "stdout": sink, "stderr": subprocess.STDOUT}
            super().__init__(command, cwd=ROOT, env=environment, start_new_session=True, preexec_fn=_child, **streams)

    def send_signal(self, number):
        """Send a signal to the process group."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)


def end(commands):
    """End running commands and everything they started, and remove local paths from their logs."""
    for each in commands:
        if each.poll() is None:
            each.stopped = True
            each.send_signal(signal.SIGINT)
    deadline = time.monotonic() + GRACE
    while any(each.poll() is None for each in commands) and time.monotonic() < deadline:
        time.sleep(0.05)
    for each in commands:
        each.send_signal(signal.SIGKILL)  # also compilers that an ended command has left running
        each.wait()
        text = each.log.read_text(errors="replace").replace(str(ROOT), ".").replace(sys.prefix, "<python>")
        each.log.write_text(text)

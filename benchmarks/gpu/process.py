"""Commands of ``make gpu`` on their way: each with a log, a time limit, and a group of processes that can be ended."""

import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from .plan import ROOT

PATIENCE = ((signal.SIGINT, 6), (signal.SIGTERM, 4), (signal.SIGKILL, 5))
"""How a process is ended: pytest and the suites still tell what they found after the first signal; seconds for each."""


def cores():
    """Processor cores for this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


PLAUSIBLE_AGE = 120
"""Seconds that imports may take; some containers count from another moment than the system's start."""


def process_age():
    """Seconds since the start of this process, imports included; 0 where the system does not tell."""
    try:
        # the start is the 22nd field, in ticks since the system's start; the second one is a name in parentheses
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):
        return 0.0
    return age if 0 <= age < PLAUSIBLE_AGE else 0.0


TROUBLE = re.compile(
    r"its call ended the process's CUDA context.*|CUDA error: .*|CUDA_ERROR_\w+.*|.*uncorrectable ECC.*"
)
"""What a log says of an error after which a process cannot use its GPU any more; the first such line is the cause."""


def trouble(text):
    """The first line of a log that tells of the GPU's trouble, without what stands before it; ``None``: of none."""
    found = TROUBLE.search(text)
    return None if found is None else found[0].strip()[:200]


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def _child():
    """Hear SIGINT, which a shell without job control makes its jobs in the background ignore, and these inherit.

    Get one when the run is killed: nothing then uses the GPU or writes into the folder while the next call goes on.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGINT)


class Running:
    """A command on its way, its output going into a log; a group of processes of its own.

    Args:
        command: argv; log: path of the log; seconds: its time limit; threads: for the parallel loops of PyTorch, or
            ``None`` for its own choice.
    """

    def __init__(self, command, log, seconds, threads=None):
        self.command, self.log, self.seconds = command, log, seconds
        self.stopped = False
        self.begun = time.monotonic()
        # so that the log holds what was said when a process is ended
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_child,
            )

    @property
    def ended(self):
        """Whether the process came to its end."""
        return self.process.poll() is not None

    @property
    def over(self):
        """Whether it came to its end or its limit."""
        return self.ended or time.monotonic() - self.begun >= self.seconds

    def words(self):
        """The command as one line, without where this checkout lies."""
        words = ["python" if word == sys.executable else word for word in self.command]
        return shlex.join(words).replace(f"{ROOT}/", "").replace(str(ROOT), ".")

    def signal(self, number):
        """Send a signal to what is left of the group."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def end(running):
    """End all these, with what they have started: ask, and insist ten seconds later; clean their logs."""
    waiting = [each for each in running if not each.ended]
    for each in waiting:
        each.stopped = True
    for request, patience in PATIENCE:
        for each in waiting:
            each.signal(request)
        deadline = time.monotonic() + patience
        while any(not each.ended for each in waiting) and time.monotonic() < deadline:
            time.sleep(0.05)
        waiting = [each for each in waiting if not each.ended]
    for each in running:
        # compilers that it left behind would disturb the next part
        each.signal(signal.SIGKILL)
        each.process.wait()
        # what is committed should not tell where this checkout lies
        text = each.log.read_text(errors="replace").replace(str(ROOT), ".").replace(sys.prefix, "<python>")
        each.log.write_text(text)

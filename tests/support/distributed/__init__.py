"""Checks that run in several processes: their registry, and the launch that runs them.

A suite is a module of this folder. Its checks are functions that every process calls, each check in a process group of
its own. Starting the processes takes seconds, so all checks of some suites share one launch, and one test reads the
result of one check. By hand, with times, and with ``--only`` and the names of some checks:
``python -m torch.distributed.run --standalone --nproc-per-node 2 -m support.distributed ddp``.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from .. import ROOT

PROCESSES = 2
SECONDS = 600  # time limit of a launch

Check = Callable[[], None]

_CHECKS: dict[str, dict[str, Check]] = {}


def check(function: Callable[..., None]) -> Callable[..., None]:
    """Register a function of no arguments as a check of its module."""
    _add(function.__module__, function.__name__, function)
    return function


def check_each(*values: Iterable[object]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a check for each combination of ``values``, one list of strings for each argument of the function."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        combinations: list[tuple[object, ...]] = [()]
        for each in values:
            combinations = [(*found, value) for found in combinations for value in each]
        for found in combinations:
            _add(
                function.__module__,
                f"{function.__name__}[{', '.join(map(str, found))}]",
                lambda found=found: function(*found),
            )
        return function

    return register


def _add(module: str, name: str, function: Check) -> None:
    _CHECKS.setdefault(module.rpartition(".")[2], {})[name] = function


def checks(suite: str) -> dict[str, Check]:
    """Name -> check, for all checks of a suite."""
    importlib.import_module(f"{__name__}.{suite}")
    return _CHECKS[suite]


def launch(*suites: str) -> dict[str, dict[str, str]]:
    """Run suites in :data:`PROCESSES` processes.

    Returns:
        suite -> check -> the tracebacks of the processes in which it failed.

    Raises:
        AssertionError: the processes themselves failed; the text has the end of their output.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    environment.pop("TRITON_INTERPRET", None)  # the processes run no Triton kernel
    with tempfile.TemporaryDirectory(prefix="t2t-fast-distributed-") as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
        command += ["-m", __name__, *suites, "--out", folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
        ranks = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank*.json"))]
    if len(ranks) != PROCESSES:
        raise AssertionError(f"the processes of {suites} failed:\n{done.stdout[-2000:]}{done.stderr[-6000:]}")
    return {
        suite: {
            name: "\n".join(f"rank {rank}: {each[suite][name]}" for rank, each in enumerate(ranks) if each[suite][name])
            for name in names
        }
        for suite, names in ranks[0].items()
    }

"""One run of the suites: the plan, the group being measured, progress, and the file that grows row by row."""

import json
import time
from pathlib import Path

from . import harness, machine, rows
from .providers import BY_NAME

BUDGETS = {"op": 6.0, "module": 20.0, "model": 20.0}
QUICK_BUDGETS = {"op": 1.5, "module": 10.0, "model": 6.0}
"""Seconds of interleaved rounds in a group."""

WEIGHTS = {"op": 1.0, "module": 3.0, "model": 6.0}
COMPILE_WEIGHT = 8.0
"""How long a row of a level takes, relative to an operator's, and a compiled one more; for the time that is left."""


def weight(group, name):
    """How long a row takes, relative to others."""
    return WEIGHTS[group.level] + COMPILE_WEIGHT * BY_NAME[name].compiled


def clock_time(seconds):
    """m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Run:
    """State of a pytest session.

    Args:
        device: "cpu" or "cuda"; quick: only the headline rows; path: of the normalised rows, or ``None``; limit:
            seconds after which no new group starts, or ``None``; write_line: prints a line of progress.
    """

    def __init__(self, device, quick, path, limit, write_line):
        self.device, self.quick, self.path, self.limit = device, quick, path, limit
        self.write_line = write_line
        self.plan = {}
        self.finished, self._weight = 0, 0.0
        self.started = time.monotonic()
        self.environment = None
        self.rows, self.left_out = [], []
        self._group, self._results = None, {}

    def add(self, group, name):
        """Plan a row. Only planned providers take part when their group is measured."""
        self.plan.setdefault(group, []).append(name)

    def say(self, text):
        """A line of progress: rows done, time passed and left."""
        seconds = time.monotonic() - self.started
        planned = sum(len(names) for names in self.plan.values())
        left = ""
        if self.finished:
            total = sum(weight(group, name) for group, names in self.plan.items() for name in names)
            left = f", about {clock_time(seconds * (total - self._weight) / self._weight)} left"
        self.write_line(f"[{self.finished}/{planned} rows, {clock_time(seconds)}{left}] {text}")

    def out_of_time(self, group):
        """Whether the limit forbids to start this group."""
        started = group == self._group
        return self.limit is not None and not started and time.monotonic() - self.started > self.limit

    def result(self, group, name):
        """What became of a provider; its whole group is measured when the first of its rows asks."""
        if self.environment is None:
            self.say("copy bandwidth and matrix products of this machine")
            self.environment = {**machine.describe(self.device), "quick": self.quick}
            self.environment["limits"] = machine.limits(self.device)
        if group != self._group:
            self._group, self._results = group, {}
            names, budgets = self.plan[group], QUICK_BUDGETS if self.quick else BUDGETS

            def say(text):
                self.say(f"{group.id}: {text}")

            try:
                self._results = harness.measure(
                    group, names, self.device, budgets[group.level], say, thorough=not self.quick
                )
            except Exception as failure:  # noqa: BLE001
                # without its inputs or truth no row of the group can be measured; each says so
                self._results = dict.fromkeys(names, failure)
        return self._results[name]

    def row(self, group, name):
        """The finished row of a provider that was timed."""
        found = rows.row(group, name, self._results, self.environment["limits"], self.device)
        self.rows.append(found)
        self._finish(group, name)
        return found

    def leave_out(self, group, name, reason):
        """Note why a planned row has no numbers."""
        self.left_out.append({"group": group.id, "provider": name, "reason": reason})
        self._finish(group, name)

    def _finish(self, group, name):
        self.finished += 1
        self._weight += weight(group, name)
        if self.path is not None and self.environment is not None:
            content = {"environment": self.environment, "rows": self.rows, "left_out": self.left_out}
            # whole or not at all, so a run that is cut off leaves what it had measured
            partial = Path(self.path).with_suffix(".part")
            partial.write_text(json.dumps(content, indent=1) + "\n")
            partial.replace(self.path)

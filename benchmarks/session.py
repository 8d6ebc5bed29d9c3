"""One run of the suites: the plan, the group being measured, progress, and the file that grows row by row."""

import gc
import time

from . import harness, machine, rows, run_file
from .groups import TIMED
from .providers import BY_NAME

BUDGETS = {"op": 6.0, "module": 20.0, "model": 20.0}
QUICK_BUDGETS = {"op": 4.0, "module": 15.0, "model": 12.0}
"""Seconds of interleaved rounds in a group, by level. (With 1.5 for an operator, 10 for a module and 8 for a model, the
medians of two quick runs differed by more than 5 % in 33 of 171 rows.)"""

SUITE_BUDGETS = {"latency": (10.0, 5.0), "scaling": (8.0, 4.0)}
"""Where a suite has its own, in full and quick."""

WEIGHTS = {"op": 1.0, "module": 3.0, "model": 6.0}
SUITE_WEIGHTS = {"scaling": 2.0, "memory": 10.0, "processes": 10.0}
COMPILE_WEIGHT = 8.0
"""How long a row takes, relative to an operator's, and a compiled one more; for the time that is left."""

BAR = 24
"""Characters of the progress bar."""

SAME_RUN = ("device", "threads", "t2t_fast", "torch", "compile_mode", "float32_matmul_precision", "quick")
"""What a resumed run must have in common with its first part."""


KINDS = ("rows", "fits", "processes", "left_out")
"""The lists of the run file."""

TIME_LIMIT, FAILED = "the time limit of", "failed:"
TRY_AGAIN = (TIME_LIMIT, FAILED)
"""Reasons that may be gone when a run is resumed."""


def weight(group, name):
    """How long a row takes, relative to others."""
    own = SUITE_WEIGHTS.get(group.suite, WEIGHTS[group.level])
    return own + COMPILE_WEIGHT * BY_NAME[name].compiled


def budget(group, quick):
    """Seconds of interleaved rounds in a group."""
    if group.suite in SUITE_BUDGETS:
        return SUITE_BUDGETS[group.suite][quick]
    return (QUICK_BUDGETS if quick else BUDGETS)[group.level]


def clock_time(seconds):
    """m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def describe(device, quick, command):
    """What is noted of the machine before anything is measured."""
    return {**machine.describe(device), "quick": quick, "command": command}


def differences(before, now):
    """Why a run in the environment ``now`` cannot go on with one from ``before``: a list of words, empty if it can."""
    return [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in SAME_RUN if before.get(key) != now.get(key)
    ]


class Run:
    """State of a pytest session.

    Args:
        device: "cpu" or "cuda"; quick: only the headline rows; path: of the run file, or ``None``; limit: seconds after
            which no new group starts, or ``None``; command: that started the run; write: prints a line of progress, or
            rewrites it if ``live``. What the file holds already is kept, and not measured again.
    """

    def __init__(self, device, quick, path, limit, command, write, live=False):
        self.device, self.quick, self.path, self.limit = device, quick, path, limit
        self.command, self.write, self.live = command, write, live
        self.plan = {}
        self.started = time.monotonic()
        self.environment = None
        self.found = {}
        """(group id, provider) -> (kind, entry) in the order of the file, kind being one of :data:`KINDS`."""
        self._fresh, self._unsaved = 0.0, False
        self._group, self._results = None, {}
        self._before = run_file.read(path) if path is not None and path.exists() else None

    def add(self, group, name):
        """Plan a row. Only planned providers take part when their group is measured."""
        self.plan.setdefault(group, []).append(name)

    def begin(self):
        """Take over what the file holds and need not be measured again; the plan is complete."""
        if self._before is None:
            return
        commands = [*self._before.environment.get("command", "").splitlines(), self.command]
        self.environment = {**self._before.environment, "command": "\n".join(dict.fromkeys(commands))}
        kept = {
            (entry["group"], entry["provider"]): (kind, entry)
            for kind in KINDS
            for entry in getattr(self._before, kind)
            if kind != "left_out" or not entry["reason"].startswith(TRY_AGAIN)
        }
        for group, names in self.plan.items():
            # providers of a group are compared round by round: rows of other rounds must not stand beside new ones
            if group.suite in TIMED and not all((group.id, name) in kept for name in names):
                kept = {key: found for key, found in kept.items() if key[0] != group.id}
        self.found = kept

    def kept(self, group, name):
        """(kind, entry) of a row that was finished before the run was resumed, or ``None``."""
        return self.found.get((group.id, name))

    def say(self, text):
        """Progress: rows done, time passed and left."""
        seconds = time.monotonic() - self.started
        planned = [(group, name) for group, names in self.plan.items() for name in names]
        finished = sum((group.id, name) in self.found for group, name in planned)
        waiting = sum(weight(group, name) for group, name in planned if (group.id, name) not in self.found)
        left = f", about {clock_time(seconds * waiting / self._fresh)} left" if self._fresh else ""
        filled = BAR * finished // max(1, len(planned))
        bar = f"{'█' * filled}{'░' * (BAR - filled)} " if self.live else ""
        self.write(f"{bar}[{finished}/{len(planned)} rows, {clock_time(seconds)}{left}] {text}")

    def out_of_time(self, group):
        """Whether the limit forbids to start this group."""
        started = group == self._group
        return self.limit is not None and not started and time.monotonic() - self.started > self.limit

    def measure_machine(self):
        """Describe the machine and take its limits, once in a run."""
        self.save()
        if self.environment is None:
            self.say("copy bandwidth and matrix products of this machine")
            self.environment = describe(self.device, self.quick, self.command)
            self.environment["limits"] = machine.limits(self.device)

    def result(self, group, name):
        """What became of a provider; its whole group is measured when the first of its rows asks."""
        self.measure_machine()
        if group != self._group:
            self._group, self._results = group, {}
            names = self.plan[group]

            def say(text):
                self.say(f"{group.id}: {text}")

            try:
                self._results = harness.measure(
                    group, names, self.device, budget(group, self.quick), say, thorough=not self.quick
                )
            except Exception as failure:  # noqa: BLE001
                # without its inputs or truth no row of the group can be measured; each says so
                self._results = dict.fromkeys(names, failure)
        return self._results[name]

    def release(self):
        """Let go of the last group's models and inputs, which would take memory from what comes next."""
        self._group, self._results = None, {}
        gc.collect()

    def row(self, group, name):
        """The finished row of a provider that was timed."""
        found = rows.row(group, name, self._results, self.environment["limits"], self.device)
        self.finish("rows", found, group, name)
        return found

    def leave_out(self, group, name, reason):
        """Note why a planned row has no numbers."""
        self.finish("left_out", {"group": group.id, "provider": name, "reason": reason}, group, name)

    def finish(self, kind, entry, group, name):
        """Put an entry into one of the file's lists."""
        # one that was left out before and measured now takes a place at the end
        self.found.pop((group.id, name), None)
        self.found[group.id, name] = (kind, entry)
        self._fresh += weight(group, name)
        self._unsaved = True
        if group.suite not in TIMED:
            self.save()  # these take long each; rows of a group are finished within moments of each other

    def save(self):
        """Write the file, if there is anything new. Called before whatever takes long."""
        if self._unsaved and self.path is not None and self.environment is not None:
            run_file.write(self.path, self.content())
            self._unsaved = False

    def content(self):
        """Everything so far, as a :class:`run_file.RunFile`."""
        lists = {kind: [] for kind in KINDS}
        for kind, entry in self.found.values():
            lists[kind].append(entry)
        planned = len({(group.id, name) for group, names in self.plan.items() for name in names} | self.found.keys())
        # what an earlier part of the run did not come to is still missing, whether this part plans it or not
        before = 0 if self._before is None else self._before.planned or 0
        return run_file.RunFile(self.environment, **lists, planned=max(planned, before))

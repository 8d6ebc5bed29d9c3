"""One run of the suites: the plan, the visits to its groups, progress, and the file that grows as they end.

A machine that other work shares is slow for seconds or minutes at a time, and a tensor keeps its pages, good or bad, as
long as it lives. Rounds that follow each other share such luck. So each timed group is visited several times, all other
groups in between and everything in it made anew, and the rounds of its visits are taken together.
"""

import gc
import time
import traceback

from ..suites.groups import LOST, TIMED, ContextLost, LeftOut
from ..suites.providers import BY_NAME
from . import harness, machine, rows, run_file

VISITS = {"cpu": 3, "cuda": 1}
"""To each timed group. What disturbs one of three moves a median little. A GPU is nobody else's, and a visit costs."""

BUDGETS = {"op": 6.0, "module": 20.0, "model": 20.0}
QUICK_BUDGETS = {"op": 3.0, "module": 12.0, "model": 10.0}
"""Seconds of interleaved rounds in a group, all visits together, by level."""

SUITE_BUDGETS = {"latency": (10.0, 5.0), "scaling": (8.0, 4.0)}
"""Where a suite has its own, in full and quick."""

WEIGHTS = {"op": 1.0, "module": 2.0, "model": 5.0}
SUITE_WEIGHTS = {"latency": 1.5, "scaling": 2.0, "memory": 6.0, "processes": 5.0}
COMPILE_WEIGHT, AGAIN_WEIGHT = 11.0, 0.7
"""How long a row takes, relative to an operator's, and a compiled one more, at its first visit and at each later one,
which finds compiled code on disk; for the time that is left. Taken from a quick run."""

BAR = 24
"""Characters of the progress bar."""

SAME_RUN = (
    "device",
    "threads",
    "malloc",
    "t2t_fast",
    "torch",
    "compile_mode",
    "float32_matmul_precision",
    "quick",
    "visits",
)
"""What a resumed run must have in common with its first part."""

KINDS = ("rows", "fits", "processes", "left_out")
"""The lists of the run file."""

CONTEXT_LOST = 75
"""Exit code of a pytest session whose process has lost its CUDA context; a new one can go on with the run."""

TIME_LIMIT, FAILED = "the time limit of", "failed:"
TRY_AGAIN = (TIME_LIMIT, FAILED)
"""Reasons that may be gone when a run is resumed."""


def visits(group, device):
    """How many times a group is measured."""
    return VISITS[device] if group.suite in TIMED else 1


def weight(group, name, device, visit):
    """How long a row takes at a visit (0 is the first), relative to others."""
    own = SUITE_WEIGHTS.get(group.suite, WEIGHTS[group.level]) / visits(group, device)
    return own + BY_NAME[name].compiled * (AGAIN_WEIGHT if visit else COMPILE_WEIGHT)


def budget(group, quick):
    """Seconds of interleaved rounds in a group, all visits together."""
    if group.suite in SUITE_BUDGETS:
        return SUITE_BUDGETS[group.suite][quick]
    return (QUICK_BUDGETS if quick else BUDGETS)[group.level]


def clock_time(seconds):
    """m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def describe(device, quick, command):
    """What is noted of the machine before anything is measured."""
    return {**machine.describe(device), "quick": quick, "visits": VISITS[device], "command": command}


def differences(before, now):
    """Why a run in the environment ``now`` cannot go on with one from ``before``: a list of words, empty if it can."""
    return [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in SAME_RUN if before.get(key) != now.get(key)
    ]


def _whole(kept, group, names):
    """Whether all of a group's rows are there, with as many visits each."""
    found = [kept.get((group.id, name)) for name in names]
    return None not in found and len({len(entry["visits"]) for kind, entry in found if kind == "rows"}) <= 1


def _release(failure):
    """Let go of the inputs and models in the frames of a failure's traceback: it is kept until its row raises it."""
    while failure is not None:
        traceback.clear_frames(failure.__traceback__)
        failure = failure.__cause__ or failure.__context__


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
        self._failures = {}
        """(group id, provider) -> the exception that its row raises."""
        self._visit = 0
        self._fresh, self._unsaved = 0.0, False
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
            if group.suite in TIMED and not _whole(kept, group, names):
                kept = {
                    (name, provider): (kind, entry)
                    for (name, provider), (kind, entry) in kept.items()
                    if name != group.id or LOST in entry.get("reason", "")
                }
        self.found = kept

    def kept(self, group, name):
        """(kind, entry) of a row that needs no measurement any more, or ``None``."""
        done = self._visited(group, name) >= visits(group, self.device) and (group.id, name) not in self._failures
        return self.found[group.id, name] if done else None

    def _visited(self, group, name):
        """How many visits a row has behind it. One that was left out needs none."""
        kind, entry = self.found.get((group.id, name), (None, None))
        if kind is None:
            return 0
        return len(entry["visits"]) if kind == "rows" else visits(group, self.device)

    def say(self, text):
        """Progress: rows done (by this visit, while there are several), time passed and left."""
        seconds = time.monotonic() - self.started
        done = {(group, name): self._visited(group, name) for group, names in self.plan.items() for name in names}
        finished = sum(count > self._visit or count >= visits(group, self.device) for (group, _), count in done.items())
        work = waiting = 0.0
        for (group, name), count in done.items():
            shares = [weight(group, name, self.device, visit) for visit in range(visits(group, self.device))]
            work, waiting = work + sum(shares), waiting + sum(shares[count:])
        left = f", about {clock_time(seconds * waiting / self._fresh)} left" if self._fresh else ""
        filled = round(BAR * (1 - waiting / work)) if work else 0
        bar = f"{'█' * filled}{'░' * (BAR - filled)} " if self.live else ""
        several = VISITS[self.device]
        visiting = several > 1 and any(group.suite in TIMED and count < several for (group, _), count in done.items())
        visit = f"visit {self._visit + 1} of {several}: " if visiting else ""
        self.write(f"{bar}[{visit}{finished}/{len(done)} rows, {clock_time(seconds)}{left}] {text}")

    def _out_of_time(self):
        return self.limit is not None and time.monotonic() - self.started > self.limit

    def check_time(self):
        """Raise :class:`LeftOut` if the limit forbids to start anything."""
        if self._out_of_time():
            raise LeftOut(f"{TIME_LIMIT} {self.limit:.0f} s had passed")

    def measure_machine(self):
        """Describe the machine and take its limits, once in a run."""
        self.save()
        if self.environment is None:
            self.say("copy bandwidth and matrix products of this machine")
            self.environment = describe(self.device, self.quick, self.command)
            self.environment["limits"] = machine.limits(self.device)

    def timed(self, group, name):
        """The finished row of a provider that is timed. The first to ask has all groups of its dtype measured.

        Raises:
            LeftOut: there was no time for its group, or there is a reason why it has no numbers.
            ContextLost: nothing else can be measured in this process; the row that is to blame is left out.
            Exception: what went wrong when it was measured.
        """
        for visit in range(visits(group, self.device)):
            self._visit = visit
            for other in self.plan:
                if other.suite in TIMED and other.dtype == group.dtype:
                    self._measure(other)
        if (group.id, name) in self._failures:
            raise self._failures[group.id, name]
        if (group.id, name) not in self.found:
            self.check_time()
        return self.found[group.id, name][1]

    def _measure(self, group):
        """Visit a group, unless it has been visited this time or no time is left."""
        names = [name for name in self.plan[group] if self._visited(group, name) == self._visit]
        if not names or self._out_of_time():
            return
        self.measure_machine()
        earlier = {name: self.found[group.id, name][1] for name in names if self._visit}
        try:
            results = harness.measure(
                group,
                names,
                self.device,
                budget(group, self.quick),
                lambda text: self.say(f"{group.id}: {text}"),
                thorough=not self.quick,
                visits=visits(group, self.device),
                rounds=next((row["visits"][0] for row in earlier.values()), None),
            )
        except ContextLost as failure:
            # the front end's turns run upstream's code
            culprit = failure.provider if failure.provider in names else names[0]
            self.leave_out(group, culprit, LeftOut(failure))
            raise
        except Exception as failure:  # noqa: BLE001
            # without its inputs or truth no row of the group can be measured; each says so
            results = dict.fromkeys(names, failure)
        rows.join(results, earlier)
        for name in names:
            if isinstance(results[name], Exception):
                _release(results[name])
                self._failures[group.id, name] = results[name]
                self.leave_out(group, name, results[name])
            else:
                found = rows.row(group, name, results, self.environment["limits"], self.device, earlier.get(name))
                self.finish("rows", found, group, name)
        # models and inputs would take memory from what comes next
        del results
        gc.collect()

    def leave_out(self, group, name, failure):
        """Note why a planned row has no numbers."""
        reason = str(failure) if isinstance(failure, LeftOut) else f"{FAILED} {type(failure).__name__}: {failure}"
        self.finish("left_out", {"group": group.id, "provider": name, "reason": reason}, group, name)

    def finish(self, kind, entry, group, name):
        """Put an entry into one of the file's lists."""
        before = self.found.get((group.id, name))
        if before is not None and before[0] != kind:
            # one that was left out before and measured now takes a place at the end
            del self.found[group.id, name]
        done = self._visited(group, name)
        self.found[group.id, name] = (kind, entry)
        for visit in range(done, self._visited(group, name)):
            self._fresh += weight(group, name, self.device, visit)
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

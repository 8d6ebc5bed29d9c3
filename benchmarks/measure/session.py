"""One run of the suites: the visits to its groups, progress, and the file that grows as they end.

A shared machine can be slow for seconds or minutes, and a tensor keeps its memory pages for its lifetime; consecutive
rounds share these effects. Each timed group is therefore visited several times, with all other groups in between. Every
visit builds its inputs and models again, and the rounds of all visits are pooled.
"""

import ctypes
import gc
import os
import platform
import shutil
import signal
import sys
import time
import traceback
from contextlib import suppress
from functools import partial
from importlib import import_module

from ..suites.groups import DTYPES, LOST, TIMED, ContextLost, LeftOut
from ..suites.providers import BASELINE, BY_NAME, matching, plan
from ..suites.runtimes import RUNTIMES
from . import fit, harness, machine, processes, rows, run_file

# visits to each timed group in a full and a quick run; GPUs are exclusive, so one visit suffices
VISITS = {"cpu": (3, 2), "cuda": (1, 1)}
# seconds of interleaved rounds in a group, of all visits together, in a full and a quick run; by suite, or by level
BUDGETS = {"op": (6, 2), "module": (20, 12), "model": (20, 10), "latency": (10, 4), "scaling": (8, 4)}
# Estimated seconds on two idle cores, for the remaining time and for the test of --quick's duration: the set-up of a
# row per visit; compilation at the first visit, and at later ones with the code on disk; imports, limits and the report
SECONDS = {"op": 0.13, "module": 0.7, "model": 1.3, "latency": 0.4, "scaling": 0.9, "memory": 15.0, "processes": 10.0}
COMPILE_SECONDS, COMPILE_AGAIN_SECONDS, START_SECONDS = 18.0, 1.2, 30.0
RUNTIME_SECONDS = 2.0  # of a row in another runtime: half of an export, the start of its process, the check
# settings that must not change when a run is resumed
SAME_RUN = ("device", "threads", "malloc", "t2t_fast", "torch", "compile_mode", "float32_matmul_precision", "quick")
SAME_RUN += ("visits",)
# suites whose rows are measured one by one, and the module that measures one
ALONE = {"memory": fit, "processes": processes}
# exit codes of :func:`work`; after CONTEXT_LOST a new process continues the run
FAILED_ROW, NO_ROW, CONTEXT_LOST, INTERRUPTED = 1, 5, 75, 130
TIME_LIMIT, FAILED = TRY_AGAIN = ("the time limit of", "failed:")  # rows with these reasons are retried on resumption


def _own(table, group):
    """The entry of a table for a group's suite, otherwise for its level."""
    return table.get(group.suite, table[group.level])


def visits(group, device, quick):
    """The number of visits to a group."""
    return VISITS[device][quick] if group.suite in TIMED else 1


def estimate(group, names, name, device, quick, visit):
    """Estimated seconds of one row at a visit (0 is the first); ``names``: all rows of its group."""
    rounds = _own(BUDGETS, group)[quick] / len(names) / visits(group, device, quick) if group.suite in TIMED else 0.0
    compilation = COMPILE_AGAIN_SECONDS if visit else COMPILE_SECONDS
    elsewhere = (name in RUNTIMES) * RUNTIME_SECONDS
    return rounds + _own(SECONDS, group) + BY_NAME[name].compiled * compilation + elsewhere


def describe(device, quick, command):
    """The environment record: machine, versions, settings and command."""
    return {**machine.describe(device), "quick": quick, "visits": VISITS[device][quick], "command": command}


def differences(before, now):
    """The settings in which ``now`` differs from ``before``, so that a run cannot be resumed; empty if it can."""
    return [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in SAME_RUN if before.get(key) != now.get(key)
    ]


def _whole(kept, group, names):
    """Whether all rows of a group exist and have the same number of visits."""
    found = [kept.get((group.id, name)) for name in names]
    return None not in found and len({len(entry["visits"]) for entry in found if "reason" not in entry}) <= 1


class Run:
    """A run, or the continuation of one: rows in the file at ``path`` are not measured again.

    Args:
        planned: :func:`providers.plan`; path: of the run file, or ``None``; command: that started the run; limit:
            seconds after which no new group starts, or ``None``; write: shows a line of progress.
    """

    def __init__(self, planned, device, quick, path=None, command="", limit=None, write=print):
        self.plan, self.device, self.quick, self.path = planned, device, quick, path
        self._visits = partial(visits, device=device, quick=quick)
        self.command, self.limit, self.write = command, limit, write
        self.started, self.environment, self.visit, self.failed = time.monotonic(), None, 0, False
        self.cells = [(group, name) for group, names in planned.items() for name in names]
        self.found = {}  # (group id, provider) -> row, or entry with the reason why it was left out
        self._before = run_file.read(path) if path is not None and path.exists() else None
        if self._before is not None:
            self._take_over(self._before)
        self._at_start = self._left()

    def _take_over(self, before):
        commands = [*before.environment.get("command", "").splitlines(), self.command]
        self.environment = {**before.environment, "command": "\n".join(dict.fromkeys(commands))}
        kept = {
            (entry["group"], entry["provider"]): entry
            for entry in (*before.rows, *before.left_out)
            if not entry.get("reason", "").startswith(TRY_AGAIN)
        }
        # ratios are taken within a round, so the rows of a group must come from the same rounds
        parts = {
            group.id for group, names in self.plan.items() if group.suite in TIMED and not _whole(kept, group, names)
        }
        self.found = {
            key: entry for key, entry in kept.items() if key[0] not in parts or LOST in entry.get("reason", "")
        }

    def visited(self, group, name):
        """The number of visits that a row has completed; all of them if it was left out."""
        entry = self.found.get((group.id, name), {"visits": []})
        return len(entry["visits"]) if "visits" in entry else self._visits(group)

    def _left(self):
        """Estimated seconds of the remaining measurements."""
        return sum(
            estimate(group, self.plan[group], name, self.device, self.quick, visit)
            for group, name in self.cells
            for visit in range(self.visited(group, name), self._visits(group))
        )

    def say(self, group, text):
        """Progress: rows done (by this visit, while there are several), time passed and left."""
        done = sum(self.visited(*cell) > min(self.visit, self._visits(cell[0]) - 1) for cell in self.cells)
        visit = f"visit {self.visit + 1} of {self._visits(group)}: " if self._visits(group) > 1 else ""
        passed, left = time.monotonic() - self.started, self._left()
        self.write(f"{visit}{done}/{len(self.cells)} rows", passed, self._at_start - left, left, f"{group.id}: {text}")

    def run(self):
        """Measure the missing rows, starting with the headline dtype of every suite.

        Raises:
            ContextLost: the CUDA context is lost and this process cannot continue; the row that caused it is left out.
        """
        for dtype in DTYPES[self.device]:
            groups = [group for group in self.plan if group.dtype == dtype]
            for visit in range(VISITS[self.device][self.quick]):
                self.visit = visit
                for group in groups:
                    if group.suite in TIMED:
                        self._measure_together(group)
            for group in groups:
                if group.suite not in TIMED:
                    self._measure_alone(group)
        for group, name in self.cells:
            if (group.id, name) not in self.found:
                self._leave_out(group, name, LeftOut(f"{TIME_LIMIT} {self.limit:.0f} s had passed"))

    def _may_start(self, group):
        """Whether the time limit allows another group; the first call records the environment and its limits."""
        if self.limit is not None and time.monotonic() - self.started > self.limit:
            return False
        if self.environment is None:
            self.say(group, "copy bandwidth and matrix products of this machine")
            self.environment = describe(self.device, self.quick, self.command)
            self.environment["limits"] = machine.limits(self.device)
        return True

    def _measure_together(self, group):
        """Measure the rows of a group that lack this visit, if the time limit allows it."""
        names = [name for name in self.plan[group] if self.visited(group, name) == self.visit]
        if not names or not self._may_start(group):
            return
        earlier = {name: self.found[group.id, name] for name in names if self.visit}
        try:
            results = harness.measure(
                group,
                names,
                self.device,
                _own(BUDGETS, group)[self.quick],
                partial(self.say, group),
                thorough=not self.quick,
                visits=self._visits(group),
                rounds=next((row["visits"][0] for row in earlier.values()), None),
            )
        except ContextLost as failure:
            # the front end is part of upstream's model
            self._leave_out(group, failure.provider if failure.provider in names else BASELINE, LeftOut(failure))
            raise
        except Exception as failure:  # noqa: BLE001
            # without inputs or the float64 result no row of the group can be measured
            results = dict.fromkeys(names, failure)
        good = {name: each for name, each in results.items() if not isinstance(each, Exception)}
        for name in names:
            if name not in good:
                self._leave_out(group, name, results[name])
        self.add(*rows.rows(group, good, self.environment["limits"], self.device, earlier).values())
        del results, good
        free_memory()

    def _measure_alone(self, group):
        """Measure the providers of a group one after the other."""
        measure = ALONE[group.suite].measure
        for name in self.plan[group]:
            if self.visited(group, name) or not self._may_start(group):
                continue
            try:
                with harness.blaming(name, self.device):
                    self.add(measure(group, name, self.device, lambda text: self.say(group, text)))
            except ContextLost as failure:
                self._leave_out(group, name, LeftOut(failure))
                raise
            except Exception as failure:  # noqa: BLE001
                self._leave_out(group, name, failure)
            free_memory()

    def _leave_out(self, group, name, failure):
        """Record why a planned row was not measured."""
        reason = str(failure)
        if not isinstance(failure, LeftOut):
            self.failed = True
            reason = f"{FAILED} {type(failure).__name__}: {failure}"
            print(f"\n{group.id}, {name}:", *traceback.format_exception(failure), file=sys.stderr, flush=True)
        self.add({"group": group.id, "provider": name, "reason": reason})

    def add(self, *entries):
        """Add rows, or entries with the reason of a row that was left out, and write the file."""
        for entry in entries:
            key = entry["group"], entry["provider"]
            self.found.pop(key, None)
            self.found[key] = entry
        if self.path is not None and self.environment is not None:
            run_file.write(self.path, self.content())

    def content(self):
        """Everything so far, as a :class:`run_file.RunFile`."""
        left_out = [entry for entry in self.found.values() if "reason" in entry]
        measured = [entry for entry in self.found.values() if "reason" not in entry]
        planned = len({(group.id, name) for group, name in self.cells} | self.found.keys())
        # rows that an earlier part of the run did not measure are still missing, even if they are not planned now
        before = 0 if self._before is None else self._before.planned
        return run_file.RunFile(self.environment, measured, left_out, max(planned, before))


def free_memory():
    """Return the memory of earlier models and inputs, which glibc keeps, to the system: the largest models need it."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def show(rows, passed, done, left, text):
    """Print progress: a line, or on a terminal a bar in place. The remaining time needs tqdm."""
    live, line = sys.stdout.isatty(), f"[{rows}]"
    with suppress(ImportError):
        from tqdm import tqdm

        form = f"{'{bar:24} ' * live}[{rows}, {{elapsed}}, {{remaining}} left]"
        line = tqdm.format_meter(done, done + left, passed, bar_format=form)
    if live:
        print(f"\r\x1b[2K{f'{line} {text}'[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
    else:
        print(line, text, flush=True)


def work(suites, device, quick, expression, path, command, limit, cache):
    """Run the suites in a process of their own, which ends with an exit code.

    ``expression``: for :func:`providers.matching`; ``cache``: an empty folder for Inductor, so that "first call"
    includes compilation; the others are those of :class:`Run`.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    try:
        planned = plan(suites, device, quick, matching(expression))
        if not planned:
            sys.exit(NO_ROW)
        run = Run(planned, device, quick, path, command, limit, show)
        if any(BY_NAME[name].compiled for _, name in run.cells):
            import_module("torch._inductor.compile_fx")  # keeps the import out of the first compilation's time
        # garbage is collected before each group; imported objects are excluded, because scanning them is slow
        gc.collect()
        gc.freeze()
        run.run()
    except ContextLost:
        sys.exit(CONTEXT_LOST)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(INTERRUPTED)
    sys.exit(FAILED_ROW if run.failed else 0)

"""Everything that a GPU machine can tell, offline, in eight minutes: ``python -m benchmarks.gpu --out DIR``.

Builds in place, compiles kernels, measures the headline rows, verifies, tests, runs the questions and the kernel
report, then measures as many other rows as fit into the remaining time; ``plan.py`` lists the stages and their parts.
``--total`` sets the time limit, counted from the start of the process; ``--quick`` takes under three minutes.

Each part is a process with a time limit and a log of its own, so that a CUDA error ends no other part. As soon as a
part ends, its result is in ``summary.json`` and ``summary.md``, and everything is in one archive of at most 16 MB,
``DIR.tar.gz``. An interrupted or killed run keeps its results, and a second call with the same folder resumes it. A
folder with results of other code or of another machine is refused. Without a GPU: a line with the reason, exit code 1.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

from .plan import END_SECONDS, ROOT, TOTAL_SECONDS, plan
from .process import Running, end
from .summary import CUT_OFF, FAILED, INTERRUPTED, NO_TIME, NOT_RUN, OK, archive_of, collect, write

COMMAND = "python -m benchmarks.gpu"
# The files on which the results depend
SOURCES = ("*.py", "t2t_fast/**/*.py", "t2t_fast/**/*.json", "csrc/**/*.*", "build_support/*.py", "benchmarks/**/*.py")
SOURCES += ("tests/**/*.py",)


def obstacle():
    """Why nothing can run here, in one line, or ``None``."""
    try:
        import torch
    except ImportError as failure:
        return f"torch cannot be imported ({failure})".splitlines()[0]
    return None if torch.cuda.is_available() else f"torch {torch.__version__} sees no GPU"


def _named(stage, part, words):
    """Whether one of the words is the part's name, its group ("verify", "tests") or its stage."""
    return any(word in (part.name, stage.name) or part.name.startswith(f"{word}-") for word in words)


class Run:
    """Runs the stages of a plan; both summaries and the archive are written as each part ends.

    Args:
        stages: of :func:`plan`; out: folder; summary: the first entries of ``summary.json`` ("started", "quick",
            "source", "environment"), completed here; total: time limit in seconds; started: when it began to count, on
            the monotonic clock; earlier: "parts" of an earlier call's summary.
    """

    def __init__(self, stages, out, summary, total, started, earlier=()):
        self.stages, self.out, self.summary = stages, out, {**summary, "total": total}
        self.started, self.end, self.succeeded = started, started + total - END_SECONDS, True
        names = [part.name for stage in stages for part in stage.parts]
        self.lines = {name: {"part": name, "result": NOT_RUN, "seconds": 0, "said": ""} for name in names}
        self.lines |= {line["part"]: line for line in earlier}

    def run(self, only=None):
        """Run the parts that ``only`` names, by default all that are not finished.

        Returns:
            whether no part that was started went wrong.
        """
        self.write()
        chosen = [stage._replace(parts=self._choose(stage, only)) for stage in self.stages]
        chosen = [stage for stage in chosen if stage.parts]
        for number, stage in enumerate(chosen):
            left = self.end - time.monotonic()
            if stage.seconds is None:
                left -= sum(later.seconds or 0 for later in chosen[number + 1 :])
            self._run_stage(stage, min(left, stage.seconds or left))
        self.summary["finished"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.write()
        return self.succeeded

    def _choose(self, stage, only):
        """The parts of a stage to run. Finished suites run again as rows may be missing; if named, from the start."""
        finished = {part.name for part in stage.parts if self.lines[part.name]["result"] == OK}
        if only is None:
            return [part for part in stage.parts if part.rows or part.name not in finished]
        parts = [part for part in stage.parts if _named(stage, part, only)]
        for part in parts:
            if part.rows and part.name in finished:
                (self.out / part.name / "rows.json").unlink(missing_ok=True)
        return parts

    def _run_stage(self, stage, seconds):
        """Run a stage's parts side by side; those that find no time are noted."""
        deadline = time.monotonic() + seconds
        waiting, active = list(stage.parts), {}
        try:
            while waiting or active:
                left = deadline - time.monotonic()
                while waiting and left <= waiting[0].least:
                    part = waiting.pop(0)
                    self._note(part.name, NO_TIME, f"more than {part.least} s are needed, {left:.0f} s were left")
                while waiting and len(active) < stage.jobs:
                    part = waiting.pop(0)
                    log = self.out / f"{1 + list(self.lines).index(part.name):02d}-{part.name}.log"
                    print(f"{part.name}: started, at most {left:.0f} s, {log.name}", flush=True)
                    active[part.name] = Running(part.words(left), log, stage.jobs)
                over = [name for name, running in active.items() if left <= 0 or running.poll() is not None]
                end([active[name] for name in over])
                for name in over:
                    self._finish(name, active.pop(name), CUT_OFF)
                time.sleep(0.1 if active else 0)
        finally:  # only an interrupted run has active parts here
            end(active.values())
            for name, running in active.items():
                self._finish(name, running, INTERRUPTED)

    def _finish(self, name, running, stopped):
        """Note the result of a part that has ended; ``stopped``: the result if it was ended from here."""
        code, log = running.returncode, running.log.read_text(errors="replace").strip()
        said = log.splitlines()[-1].strip("= ")[:200] if log else ""
        if running.stopped:
            result = stopped
        elif code:
            result, said = FAILED, f"exit code {code}: {said}"
        else:
            result = OK
        self._note(name, result, said, time.monotonic() - running.begun)

    def _note(self, name, result, said, seconds=0.0):
        """Set a part's entry of the summary, print it, and write everything; ``said``: a reason, or the log's end."""
        self.lines[name] = {"part": name, "result": result, "seconds": round(seconds, 1), "said": said}
        self.succeeded &= result in (OK, NO_TIME)
        print(f"{name}: {result}, {seconds:.0f} s, {said}", flush=True)
        self.write()

    def write(self):
        """Both summaries and the archive."""
        self.summary["seconds"] = round(time.monotonic() - self.started, 1)
        self.summary["parts"] = list(self.lines.values())
        self.summary["suites"] = collect(self.out)
        write(self.out, self.summary)


def source_digest():
    """A short hash of the code on which the results depend, committed or not."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file()}):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def earlier_parts(out, summary):
    """The lines of an earlier call with this folder, () if there was none.

    Raises:
        ValueError: the folder holds something else.
    """
    path = out / "summary.json"
    if not path.exists():
        return ()
    before = json.loads(path.read_text())
    if any(before.get(key) != summary[key] for key in ("quick", "source", "environment")):
        raise ValueError(f"{out} holds another run: other code, machine or --quick; choose another folder")
    return before["parts"]


def _interrupt(number, frame):
    """SIGTERM and SIGHUP act like SIGINT, so that the results so far are written."""
    signal.signal(number, signal.SIG_IGN)  # once is enough
    raise KeyboardInterrupt(signal.Signals(number).name)


def main(argv=None, device="cuda", make_plan=plan):
    """Run everything; tests replace ``device`` and ``make_plan``.

    Returns:
        0 if no part that was started went wrong, else 1; 130 if the run was interrupted.
    """
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="module and lite model only, under three minutes")
    only = 'run these alone, finished or not; "verify", "tests" and "checks" name several'
    parser.add_argument("--only", nargs="+", metavar="PART", help=only)
    limit = "time limit, from the start of the process; default: {}, with --quick {}".format(*TOTAL_SECONDS.values())
    parser.add_argument("--total", type=float, metavar="SECONDS", help=limit)
    arguments = parser.parse_args(argv)
    total = TOTAL_SECONDS[arguments.quick] if arguments.total is None else arguments.total
    if total <= END_SECONDS:
        parser.error(f"--total must be more than {END_SECONDS} seconds, got {total:g}")
    if device == "cuda" and (reason := obstacle()):
        print(f"{COMMAND}: cannot run here: {reason}", file=sys.stderr)
        return 1
    from ..measure import machine

    out, environment = arguments.out.resolve(), machine.describe(device)
    summary = {"started": environment.pop("date"), "quick": arguments.quick}
    summary |= {"source": source_digest(), "environment": environment}
    stages = make_plan(out, arguments.quick, max(1, len(os.sched_getaffinity(0)) - 2), device)
    for word in arguments.only or ():
        if not any(_named(stage, part, [word]) for stage in stages for part in stage.parts):
            names = ", ".join(part.name for stage in stages for part in stage.parts)
            parser.error(f"--only must name some of {names}, got {word!r}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        earlier = earlier_parts(out, summary)
    except (OSError, ValueError) as failure:
        print(f"{COMMAND}: --out: {failure}", file=sys.stderr)
        return 1
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        succeeded = Run(stages, out, summary, total, started, earlier).run(arguments.only)
    except KeyboardInterrupt:
        print(f"{COMMAND}: interrupted; the results so far are in {archive_of(out)}", file=sys.stderr)
        return 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    print(out / "summary.md", archive_of(out), sep="\n")
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())

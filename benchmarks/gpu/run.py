"""Everything that a GPU machine can tell, offline, in eight minutes: ``python -m benchmarks.gpu --out DIR``.

Builds in place for the card's own architecture, compiles kernels on all cores, measures the headline rows, runs
``t2t-fast verify``, the gpu tests that are not slow, the half-precision comparison, the attention's error against the
norm, a short neutrality training and the kernel report, then rows with ``torch.compile``, and as many other rows as fit
into the remaining time. ``--total`` sets the time limit, counted from the start of the process; ``--quick`` takes under
three minutes; ``plan.py`` lists the parts.

Each part is a process with a time limit and a log of its own, so that a CUDA error ends no other part. Its line is in
``summary.json`` and ``summary.md`` as soon as it ends; everything goes into one archive of at most 16 MB,
``DIR.tar.gz`` or ``--archive FILE``, and ``summary.md`` also to ``--summary FILE``. An interrupted or killed run keeps
its results, and a second call with the same folder resumes it. Without a GPU: one line with the reason, exit code 1.
"""

import argparse
import hashlib
import json
import signal
import sys
import time
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path

from .plan import END_SECONDS, ROOT, TOTAL_SECONDS, WORTH_STARTING, Part, Stage, plan
from .process import TROUBLE, Running, cores, end
from .summary import CUT_OFF, FAILED, INTERRUPTED, LEFT_OUT, NO_TIME, NOT_ASKED, OK, SUCCESS, archive_of, collect, write

__all__ = ["Gpu", "Part", "Stage", "main", "plan", "run"]

COMMAND = "python -m benchmarks.gpu"
SOURCES = ("*.py", "t2t_fast/**/*.py", "t2t_fast/**/*.json", "csrc/**/*.*", "build_support/*.py", "benchmarks/**/*.py")
SOURCES += ("tests/**/*.py",)
"""The files on which the results depend."""


class Gpu:
    """Whether there is a GPU, and which. Imports torch when asked, not before."""

    name = "cuda"

    def obstacle(self):
        """Why nothing can run here, in one line, or ``None``."""
        try:
            import torch
        except ImportError as failure:
            return f"torch cannot be imported ({failure})".splitlines()[0]
        if torch.version.cuda is None:
            return f"this torch ({torch.__version__}) is built without CUDA"
        return None if torch.cuda.is_available() else f"torch {torch.__version__} sees no GPU"

    def describe(self):
        """GPU, driver, versions, commit, date."""
        from ..measure import machine

        return machine.describe(self.name)

    def run_name(self):
        """Name of the results' folder."""
        from ..measure import machine

        return machine.run_name(self.name)

    def capability(self):
        """The compute capability as in ``TORCH_CUDA_ARCH_LIST`` ("9.0")."""
        import torch

        return ".".join(map(str, torch.cuda.get_device_capability()))

    def architecture(self):
        """The architecture ("sm_90") if the kernel report knows it, else ``None``."""
        from ..kernels.triton_report import SHARED_LIMITS

        name = f"sm_{self.capability().replace('.', '')}"
        return name if name in SHARED_LIMITS else None


def _now():
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _asked(part, only):
    """Whether ``only`` names the part or its group ("verify", "tests", "checks")."""
    stage = part.stage.name if part.stage else part.name
    return any(word in (part.name, stage) or part.name.startswith(f"{word}-") for word in only)


def _reserved(parts):
    """The maximum time of these parts in seconds, as far as they have limits."""
    stages = {part.stage for part in parts if part.stage is not None}
    return sum(part.seconds or 0 for part in parts if part.stage is None) + sum(stage.seconds for stage in stages)


class _Run:
    """A plan on its way: the parts' lines, and the files that are written as each part ends."""

    def __init__(self, parts, out, summary, total, started, **files):
        self.parts, self.out, self.summary, self.files = parts, out, summary, files
        self.end, self.started, self.lines = started + total - END_SECONDS, started, {}
        self.succeeded = True
        summary["total"] = total

    def add(self, part, result, seconds=0.0, limit=0.0, **more):
        """Note the result of a part, and write everything."""
        line = {"part": part.name, "result": result, "code": None, "seconds": round(seconds, 1)}
        self.lines[part.name] = {**line, "limit": round(max(0.0, limit), 1), "ended": _now(), **more}
        self.succeeded &= result in SUCCESS
        reason = f" ({more['reason']})" if "reason" in more else ""
        print(f"[{len(self.lines)}/{len(self.parts)}] {part.name}: {result}, {seconds:.0f} s{reason}", flush=True)
        self.write()

    def write(self):
        """Both summaries and the archive."""
        self.summary["seconds"] = round(time.monotonic() - self.started, 1)
        self.summary["parts"] = [self.lines[part.name] for part in self.parts if part.name in self.lines]
        self.summary["suites"] = collect(self.out)
        write(self.out, self.summary, **self.files)

    def choose(self, earlier, only):
        """The parts to run; the lines of the others are noted."""
        chosen = []
        for part in self.parts:
            line = earlier.get(part.name)
            never = {"part": part.name, "result": NOT_ASKED, "code": None, "seconds": 0.0, "limit": 0.0}
            finished = line is not None and line["result"] == OK
            if part.command is None:
                self.lines[part.name] = never | {"result": LEFT_OUT}
            elif only is not None and not _asked(part, only):
                self.lines[part.name] = line or never
            elif only is None and finished and part.folder is None:  # suites resume, as rows may be missing
                self.lines[part.name] = line
                print(f"{part.name}: kept, finished at {line['ended']}", flush=True)
            else:
                if only is not None and finished and part.folder is not None:
                    (part.folder / "rows.json").unlink(missing_ok=True)  # asked for by name: measured again
                chosen.append(part)
        return chosen

    def begin(self, part, seconds, threads):
        """Start a part. Existing rows are of the same code and machine, and are kept."""
        resume = part.folder is not None and (part.folder / "rows.json").exists()
        log = self.out / f"{1 + self.parts.index(part):02d}-{part.name}.log"
        print(f"{part.name}: started, at most {seconds:.0f} s, {log.name}", flush=True)
        return Running([*part.command(seconds), *(["--resume"] if resume else [])], log, seconds, threads)

    def ended(self, part, running, interrupted=False):
        """Note the result of a part that has ended."""
        code = None if running.stopped else running.process.returncode
        result = (INTERRUPTED if interrupted else CUT_OFF) if running.stopped else FAILED if code else OK
        more = {"code": code, "log": running.log.name, "command": running.words()}
        log = running.log.read_text(errors="replace").strip()
        if result == FAILED:
            cause = TROUBLE.search(log)
            more["reason"] = f"exit code {code}" + (f": {cause[0].strip()[:200]}" if cause else "")
        elif result == OK and log:
            more["said"] = log.splitlines()[-1].strip("= ")[:160]
        self.add(part, result, time.monotonic() - running.begun, running.seconds, **more)

    def together(self, parts, seconds, jobs):
        """Run parts side by side."""
        deadline, waiting, active = time.monotonic() + seconds, list(parts), []
        threads = None if jobs == 1 else max(1, cores() // jobs)
        try:
            while waiting or active:
                left = deadline - time.monotonic()
                while waiting and left > 1 and len(active) < jobs:
                    part = waiting.pop(0)
                    active.append((part, self.begin(part, min(left, part.seconds or left), threads)))
                while waiting and left <= 1:
                    self.add(waiting.pop(0), NO_TIME, reason=f"{jobs} at a time, its stage had {seconds:.0f} s")
                over = [pair for pair in active if pair[1].over]
                end([running for _, running in over])
                active = [pair for pair in active if pair not in over]
                for part, running in over:
                    self.ended(part, running)
                time.sleep(0.1 if active else 0)
        finally:  # only an interrupted run has active parts here
            end([running for _, running in active])
            for part, running in active:
                self.ended(part, running, interrupted=True)

    def run(self, chosen):
        """Run the chosen parts, stage by stage."""
        stages = [list(members) for _, members in groupby(chosen, key=lambda part: part.stage or part.name)]
        for number, members in enumerate(stages):
            stage, left, least = members[0].stage, self.end - time.monotonic(), 1
            box = members[0].seconds if stage is None else stage.seconds
            if box is None:  # the time that later parts leave
                box = left = left - _reserved([part for later in stages[number + 1 :] for part in later])
                least = WORTH_STARTING
            if left > least:
                self.together(members, min(box, left), 1 if stage is None else stage.jobs)
                continue
            for part in members:
                reason = f"{max(0.0, left):.0f} s were left, more than {least} s are needed"
                self.add(part, NO_TIME, limit=left, reason=reason)


def run(parts, out, summary, total=TOTAL_SECONDS[False], earlier=None, only=None, started=None, **files):
    """Run the parts; both summaries and the archive are written after each. Returns whether nothing went wrong.

    Args:
        parts: of :func:`plan`; out: folder; summary: the first entries of ``summary.json`` ("started", "quick",
            "environment"), completed here; total: time limit in seconds, counted from ``started`` (of the clock, by
            default now); earlier: lines of an earlier call, whose finished parts are kept; only: names of the parts to
            run, all other lines being kept; files: ``page`` and ``archive`` of :func:`summary.write`.
    """
    this = _Run(parts, out, summary, total, time.monotonic() if started is None else started, **files)
    chosen = this.choose({line["part"]: line for line in earlier or ()}, only)
    this.write()
    this.run(chosen)
    summary["finished"] = _now()
    this.write()
    return this.succeeded


def source_digest():
    """A short hash of the code on which the results depend, committed or not."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file()}):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _identity(summary):
    """What two calls with one folder must have in common."""
    return summary["quick"], summary["source"], {**summary["environment"], "date": None}


def _earlier(out, summary):
    """The lines of an earlier call with this folder by the same code on the same machine; other results are moved.

    Raises:
        ValueError: the folder's summary cannot be read.
    """
    path = out / "summary.json"
    if not path.exists():
        return []
    try:
        before = json.loads(path.read_text())
        lines, identity = before["parts"], _identity(before)
    except (ValueError, KeyError, TypeError) as failure:
        raise ValueError(f"{path} is no summary of such a run ({failure!r}); choose another folder") from failure
    if identity == _identity(summary):
        return lines
    aside = next(name for number in range(1, 1000) if not (name := out.with_name(f"{out.name}-{number}")).exists())
    print(f"{out} holds another run, moved to {aside.name}", flush=True)
    out.rename(aside)
    if archive_of(out).exists():  # an archive that --archive named is replaced
        archive_of(out).rename(archive_of(aside))
    out.mkdir()
    return []


def _interrupt(number, frame):
    """SIGTERM and SIGHUP act like SIGINT, so that the results so far are written."""
    signal.signal(number, signal.SIG_IGN)  # once is enough
    raise KeyboardInterrupt(signal.Signals(number).name)


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0])
    full, quick = TOTAL_SECONDS[False], TOTAL_SECONDS[True]
    parser.add_argument("--out", type=Path, help="folder for the results; default: benchmarks/results/<name of run>")
    parser.add_argument("--quick", action="store_true", help="module and lite model only, under three minutes")
    only = 'run only these, also if they are finished; "verify", "tests" and "checks" name several'
    parser.add_argument("--only", nargs="+", metavar="PART", help=only)
    total = f"time limit, from the start of the process; default: {full}, with --quick {quick}"
    parser.add_argument("--total", type=float, metavar="SECONDS", help=total)
    parser.add_argument("--summary", type=Path, metavar="FILE", help="copy summary.md to this file")
    parser.add_argument("--archive", type=Path, metavar="FILE", help="default: DIR.tar.gz, beside the folder")
    arguments = parser.parse_args(argv)
    if arguments.total is None:
        arguments.total = TOTAL_SECONDS[arguments.quick]
    if arguments.total <= END_SECONDS:
        parser.error(f"--total must be more than {END_SECONDS} seconds, got {arguments.total:g}")
    return parser, arguments


def main(argv=None, device=None, make_plan=plan):
    """Run everything.

    Args:
        argv: the command line; device, make_plan: replaced in tests.

    Returns:
        0 if no part that was started went wrong, else 1; 130 if the run was interrupted.
    """
    started = time.monotonic()
    parser, arguments = parse(argv)
    device = Gpu() if device is None else device
    if obstacle := device.obstacle():
        print(f"{COMMAND}: cannot run here: {obstacle}", file=sys.stderr)
        return 1
    out = (arguments.out or ROOT / "benchmarks" / "results" / device.run_name()).resolve()
    parts = make_plan(device, out, arguments.quick, max(1, cores() - 2))
    unknown = [word for word in arguments.only or () if not any(_asked(part, [word]) for part in parts)]
    if unknown:
        parser.error(f"--only must name some of {', '.join(part.name for part in parts)}, got {unknown[0]!r}")
    environment, source = device.describe(), source_digest()
    summary = {"started": _now(), "quick": arguments.quick, "source": source, "environment": environment}
    page = arguments.summary and arguments.summary.resolve()
    archive = arguments.archive.resolve() if arguments.archive else archive_of(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        earlier = _earlier(out, summary)
        for path in filter(None, (page, archive)):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise ValueError(f"{path} is a folder")
    except (OSError, ValueError) as failure:
        print(f"{COMMAND}: --out, --summary, --archive: {failure}", file=sys.stderr)
        return 1
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        files = {"page": page, "archive": archive}
        succeeded = run(parts, out, summary, arguments.total, earlier, arguments.only, started, **files)
    except KeyboardInterrupt:
        print(f"{COMMAND}: interrupted; the results so far are in {archive}", file=sys.stderr)
        return 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for path in (page or out / "summary.md", archive):
        print(path)
    return 0 if succeeded else 1

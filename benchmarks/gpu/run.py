"""Everything that a GPU machine can tell, offline, in eight minutes: ``python -m benchmarks.gpu --out DIR``.

Builds in place for the card's own architecture, compiles kernels by all cores, measures the headline rows, runs
``t2t-fast verify``, the gpu-marked tests that are not slow, the half-precision comparison, attention's error against
norm, a short training run of a swapped model beside upstream's and the kernel report, then measures rows by
``torch.compile``, and as many of the other rows as fit into the time that is left. ``--total`` sets that time, which
counts from the start of the process; ``--quick`` takes under three minutes; ``gpu_plan.py`` has the parts.

Every part is a process with a time limit and a log of its own: an error that ends its CUDA context ends no other part.
Its line is in ``summary.json`` and ``summary.md`` as soon as it ends; all of it then goes into one archive of at most
16 MB, ``DIR.tar.gz`` or ``--archive FILE``, and ``summary.md`` also to ``--summary FILE``. A run that is cut off or
killed leaves what it had, and a second call into the same folder goes on. Without a GPU: one line that says why, exit
code 1.
"""

import argparse
import hashlib
import json
import signal
import sys
import time
from contextlib import contextmanager
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path

from .plan import END_SECONDS, ROOT, TOTAL_SECONDS, WORTH_STARTING, Part, Stage, plan
from .process import Running, cores, end, trouble
from .summary import CUT_OFF, FAILED, INTERRUPTED, LEFT_OUT, NO_TIME, NOT_ASKED, OK, SUCCESS, archive_of, collect, write

__all__ = ["Gpu", "Part", "Stage", "main", "plan", "run"]

REPORT_SECONDS = 20
"""For the pictures of rows whose own run did not come to draw them."""

SOURCES = ("*.py", "t2t_fast/**/*.py", "t2t_fast/**/*.json", "csrc/**/*.*", "build_support/*.py", "benchmarks/*.py")
SOURCES += ("tests/**/*.py",)
"""What the results depend on."""


class Gpu:
    """The device layer: whether there is a GPU, and what it is. Imports torch when asked, not before."""

    name = "cuda"

    def obstacle(self):
        """Why nothing can run here, in one line, or ``None``."""
        try:
            import torch
        except ImportError as failure:
            return f"torch cannot be imported ({failure})".splitlines()[0]
        if torch.version.cuda is None:
            return f"this torch ({torch.__version__}) is built without CUDA"
        if not torch.cuda.is_available():
            return f"torch {torch.__version__} sees no GPU"
        return None

    def describe(self):
        """GPU, driver, versions, commit, date."""
        from ..measure import machine

        return machine.describe(self.name)

    def run_name(self):
        """Name of the results' folder."""
        from ..measure import machine

        return machine.run_name(self.name)

    def capability(self):
        """The card's compute capability, as ``TORCH_CUDA_ARCH_LIST`` names it ("9.0")."""
        import torch

        return ".".join(map(str, torch.cuda.get_device_capability()))

    def architecture(self):
        """The card's, if the kernel report knows it ("sm_90"), else ``None``."""
        import torch

        from ..kernels.triton_report import SHARED_LIMITS

        major, minor = torch.cuda.get_device_capability()
        return name if (name := f"sm_{major}{minor}") in SHARED_LIMITS else None


@contextmanager
def _signals():
    """SIGTERM and SIGHUP interrupt like SIGINT, so that a run that is told to end still writes what it has."""

    def interrupt(number, frame):
        signal.signal(number, signal.SIG_IGN)  # once is enough
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Progress:
    """The lines of a plan's parts, and the files that are written as each part ends.

    Args:
        parts: the plan; out: folder of the run; summary: what ``summary.json`` says besides; started: of the clock,
            when the run began; page, archive: of :func:`gpu_summary.write`.
    """

    def __init__(self, parts, out, summary, started, page=None, archive=None):
        self.parts, self.out, self.summary, self.started = parts, out, summary, started
        self.page, self.archive = page, archive
        self.lines = {}
        self.succeeded = True
        """Whether nothing that this call has started went wrong."""

    def log(self, part, more=""):
        """The path of a part's log; ``more`` ends its name."""
        number = 1 + [each.name for each in self.parts].index(part.name)
        return self.out / f"{number:02d}-{part.name}{more}.log"

    def idle(self, part, result, line=None):
        """Note a part that does not run, or keep its line from an earlier call."""
        never = {"part": part.name, "result": result, "code": None, "seconds": 0.0, "limit": 0.0}
        self.lines[part.name] = line or never

    def add(self, part, result, seconds=0.0, limit=0.0, **more):
        """Note what became of a part; everything is written."""
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
        write(self.out, self.summary, self.page, self.archive)


def _now():
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _finished(part, line):
    """Whether an earlier call did all of a part: it succeeded, and no row waits for time."""
    if line is None or line["result"] != OK:
        return False
    if part.folder is None:
        return True
    from ..measure.session import TRY_AGAIN

    found = collect(part.folder.parent).get(part.folder.name, {"error": "no rows"})
    return "error" not in found and not any(each["reason"].startswith(TRY_AGAIN) for each in found["left_out"])


def _asked(part, only):
    """Whether ``only`` names the part, or the parts that it is one of ("verify", "tests", "checks")."""
    stage = part.stage.name if part.stage else part.name
    return any(word in (part.name, stage) or part.name.startswith(f"{word}-") for word in only)


def _choose(progress, earlier, only):
    """The parts to run; the others are noted."""
    chosen = []
    for part in progress.parts:
        line = earlier.get(part.name)
        if part.command is None:
            progress.idle(part, LEFT_OUT)
        elif only is not None and not _asked(part, only):
            progress.idle(part, NOT_ASKED, line)
        elif only is None and _finished(part, line):
            progress.idle(part, OK, line)
            print(f"{part.name}: kept, it ended at {line['ended']}", flush=True)
        else:
            if part.folder is not None and _finished(part, line):
                (part.folder / "rows.json").unlink()  # named, so measured again
            chosen.append(part)
    return chosen


def _begin(part, seconds, progress, threads):
    """Start a part. Rows that the folder holds already are of the same code and machine, and are kept."""
    command = part.command(seconds)
    if part.folder is not None and (part.folder / "rows.json").exists():
        command = [*command, "--resume"]
    return Running(command, progress.log(part), seconds, threads)


def _note(part, running, progress, interrupted):
    """Note what became of a part that is over, and draw the rows of one that was ended before it could."""
    code = None if running.stopped else running.process.returncode
    result = (INTERRUPTED if interrupted else CUT_OFF) if running.stopped else FAILED if code else OK
    more = {"code": code, "log": running.log.name, "command": running.words()}
    log = running.log.read_text(errors="replace")
    if result == FAILED:
        cause = trouble(log)
        more["reason"] = f"exit code {code}{cause and ': '}{cause or ''}"
    elif result == OK and (lines := log.strip().splitlines()):
        more["said"] = lines[-1].strip("= ")[:160]
    progress.add(part, result, time.monotonic() - running.begun, running.seconds, **more)
    if part.folder is None or not (part.folder / "rows.json").exists():
        return
    rows, table = part.folder / "rows.json", part.folder / "table.md"
    if not table.exists() or table.stat().st_mtime < rows.stat().st_mtime:
        command = [sys.executable, "-m", "benchmarks.report", str(rows), "--out", str(part.folder)]
        drawing = Running(command, progress.log(part, "-report"), REPORT_SECONDS)
        try:
            while not drawing.over:
                time.sleep(0.05)
        finally:
            end([drawing])
            progress.write()


def _show(source):
    sys.stdout.write(source.read().decode(errors="replace"))
    sys.stdout.flush()


def _together(parts, seconds, jobs, progress):
    """Run parts side by side; a single one shows its output as it comes."""
    deadline = time.monotonic() + seconds
    waiting, active = list(parts), []
    single, threads = len(parts) == 1, None if jobs == 1 else max(1, cores() // jobs)
    interrupted, source = True, None
    try:
        while waiting or active:
            left = deadline - time.monotonic()
            while waiting and len(active) < jobs and left > 1:
                part = waiting[0]
                active.append((part, _begin(part, min(left, part.seconds or left), progress, threads)))
                waiting.pop(0)
                print(f"{part.name}: begun, at most {active[-1][1].seconds:.0f} s", flush=True)
                source = active[-1][1].log.open("rb") if single else None
            while waiting and left <= 1:
                progress.add(waiting.pop(0), NO_TIME, reason=f"{jobs} at a time, its stage had {seconds:.0f} s")
            over = [pair for pair in active if pair[1].over]
            end([running for _, running in over])
            active = [pair for pair in active if pair not in over]
            if source is not None:
                _show(source)
            for part, running in over:
                _note(part, running, progress, interrupted=False)
            if active:
                time.sleep(0.1)
        interrupted = False
    finally:
        if source is not None:
            source.close()
        end([running for _, running in active])
        for part, running in active:
            _note(part, running, progress, interrupted)


def _reserved(parts):
    """Seconds that these parts may take at most, as far as that is known."""
    stages = {part.stage for part in parts if part.stage is not None}
    return sum(part.seconds or 0 for part in parts if part.stage is None) + sum(stage.seconds for stage in stages)


def run(parts, out, summary, total=TOTAL_SECONDS[False], earlier=None, only=None, started=None, **files):
    """Run the parts; both summaries and the archive are written after each.

    Args:
        parts: of :func:`plan`; out: folder; summary: what ``summary.json`` says besides ("started", "quick",
            "environment"), completed here; total: seconds of the whole run; earlier: lines of a call before whose
            finished parts need not run again; only: names of parts to run, all other lines being kept; started: of the
            clock, what the total counts from, by default now; files: ``page`` and ``archive`` of
            :func:`gpu_summary.write`.

    Returns:
        whether nothing that was started went wrong.
    """
    started = time.monotonic() if started is None else started
    progress = Progress(parts, out, summary, started, **files)
    summary["total"] = total
    chosen = _choose(progress, {line["part"]: line for line in earlier or ()}, only)
    progress.write()
    stages = [list(members) for _, members in groupby(chosen, key=lambda part: part.stage or part.name)]
    for number, members in enumerate(stages):
        stage = members[0].stage
        left = total - END_SECONDS - (time.monotonic() - started)
        box = members[0].seconds if stage is None else stage.seconds
        least = 1
        if box is None:
            left -= _reserved([part for later in stages[number + 1 :] for part in later])
            box, least = left, WORTH_STARTING
        if left <= least:
            for part in members:
                reason = f"{max(0.0, left):.0f} s were left, more than {least} s are needed"
                progress.add(part, NO_TIME, limit=left, reason=reason)
            continue
        _together(members, min(box, left), 1 if stage is None else stage.jobs, progress)
    summary["finished"] = _now()
    progress.write()
    return progress.succeeded


def source_digest():
    """A short name for the code that the results depend on, as it is, committed or not."""
    found = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file()}):
        found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:12]


def _earlier(out, summary):
    """The lines of an earlier call into this folder by the same code on the same machine.

    What lies there by other code, or from another machine, is moved aside.

    Raises:
        ValueError: the folder's summary cannot be read.
    """
    path = out / "summary.json"
    if not path.exists():
        return []
    try:
        before = json.loads(path.read_text())
        lines, sameness = before["parts"], _sameness(before)
    except (ValueError, KeyError, TypeError) as failure:
        raise ValueError(f"{path} is no summary of such a run ({failure!r}); choose another folder") from failure
    if sameness == _sameness(summary):
        return lines
    aside = next(name for number in range(1, 1000) if not (name := out.with_name(f"{out.name}-{number}")).exists())
    print(f"{out} holds another run, moved to {aside.name}", flush=True)
    out.rename(aside)
    if archive_of(out).exists():  # one that --archive named is replaced
        archive_of(out).rename(archive_of(aside))
    out.mkdir()
    return []


def _sameness(summary):
    """What two calls into one folder must have in common."""
    return summary["quick"], summary["source"], {**summary["environment"], "date": None}


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the results; by default benchmarks/results/<name of run>")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"under {TOTAL_SECONDS[True] // 60 + 1} minutes: module and lite model, and what tells most about them",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PART",
        help='run these only, also if they ended well before; "verify", "tests" and "checks" name several',
    )
    parser.add_argument(
        "--total",
        type=float,
        metavar="SECONDS",
        help="of this call, from the start of the process; "
        f"by default {TOTAL_SECONDS[False]}, with --quick {TOTAL_SECONDS[True]}",
    )
    parser.add_argument("--summary", type=Path, metavar="FILE", help="where a copy of summary.md goes")
    parser.add_argument("--archive", type=Path, metavar="FILE", help="by default DIR.tar.gz, beside the folder")
    found = parser.parse_args(argv)
    if found.total is None:
        found.total = TOTAL_SECONDS[found.quick]
    if found.total <= END_SECONDS:
        parser.error(f"--total must be more than {END_SECONDS} seconds, got {found.total:g}")
    return parser, found


def main(argv=None, device=None, make_plan=plan, started=None):
    """Run everything.

    Args:
        argv: the command line; device, make_plan: replaced by the tests of this control flow; started: of the clock,
            when the process started, by default now.

    Returns:
        0 if no part that was started went wrong, else 1; 130 if somebody stopped the run.
    """
    started = time.monotonic() if started is None else started
    parser, arguments = parse(argv)
    device = Gpu() if device is None else device
    obstacle = device.obstacle()
    if obstacle is not None:
        print(f"python -m benchmarks.gpu: cannot run here: {obstacle}", file=sys.stderr)
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
        print(f"python -m benchmarks.gpu: --out, --summary, --archive: {failure}", file=sys.stderr)
        return 1
    try:
        with _signals():
            succeeded = run(
                parts, out, summary, arguments.total, earlier, arguments.only, started, page=page, archive=archive
            )
    except KeyboardInterrupt:
        print(f"python -m benchmarks.gpu: interrupted; what there is lies in {archive}", file=sys.stderr)
        return 130
    for path in (page or out / "summary.md", archive):
        print(path)
    return 0 if succeeded else 1

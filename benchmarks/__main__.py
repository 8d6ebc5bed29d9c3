"""Run the suites: ``python -m benchmarks [--quick] [--report DIR] [--filter WORDS] [--device cpu|cuda] [--resume]``.

Writes into the folder ``report.html`` with its pictures, ``rows.csv`` and ``rows.json``, from which the others are made
and which grows row by row. A run that was stopped keeps what it measured and continues with ``--resume``.
``--compare A.json B.json`` measures nothing and reports what became slower. ``python -m benchmarks host`` measures the
time of the package's own Python instead.
"""

import argparse
import multiprocessing
import os
import platform
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path

from .suites.groups import LOST, SUITES

ROOT = Path(__file__).resolve().parent.parent

# glibc settings under which a process keeps freed memory. By default, blocks of some MB are requested from the system
# page by page at every call, which takes a varying time, above all on a virtual machine.
KEEP_MEMORY = {"MALLOC_TOP_PAD_": 1e9, "MALLOC_MMAP_THRESHOLD_": 4e9, "MALLOC_TRIM_THRESHOLD_": 8e9}


def parser():
    """The command line's parser."""
    found = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    add = found.add_argument
    add("--quick", action="store_true", help="only the headline rows: under ten minutes on two CPU cores")
    add("--report", "--out", type=Path, metavar="DIR", help="folder, by default .benchmarks/<date-machine-commit-time>")
    add("--resume", action="store_true", help="continue the run in that folder, if there is one")
    add("--suite", nargs="+", choices=SUITES, metavar="NAME", help=f"some of {', '.join(SUITES)}")
    add("--filter", default="", help='rows whose name matches, like -k of pytest: "module and performer and not 384px"')
    add("--device", choices=("cpu", "cuda"), help='by default "cuda" if there is a GPU')
    add("--keep-memory", action="store_true", help="let glibc keep freed memory, for all implementations")
    add("--max-seconds", type=float, metavar="N", help="start no group of rows, and no further visit, after N seconds")
    add(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="runs: rows that are worse in B; exit code 1 if one is of t2t_fast",
    )
    add("--threshold", type=float, default=0.05, metavar="X", help="of --compare; by default %(default)s")
    add("--by", choices=("speedup", "time"), default="speedup", help="of --compare: over upstream in each run, or time")
    return found


def command_line(arguments):
    """The command that repeats the measurement, without the folder and ``--resume``."""
    words = ["python", "-m", "benchmarks"]
    for name in ("device", "quick", "suite", "filter", "keep_memory", "max_seconds"):
        value = getattr(arguments, name)
        if value not in (None, False, ""):
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *(f"{v:g}" if isinstance(v, float) else v for v in values)]
    return shlex.join(words)


def run_suites(arguments, out):
    """Run the suites in a process of their own, and whenever a row has ended its CUDA context in another one.

    Returns:
        the exit code of the last process; 1 if it is 0 and a row has ended a CUDA context.
    """
    from .measure import run_file, session

    started, lost, rows, limit = time.monotonic(), [], out / "rows.json", arguments.max_seconds
    suites = [suite for suite in SUITES if suite in (arguments.suite or SUITES)]
    plan = (suites, arguments.device, arguments.quick, arguments.filter, rows, command_line(arguments))
    while True:
        with tempfile.TemporaryDirectory(prefix="t2t-fast-bench-") as cache:
            process = multiprocessing.get_context("spawn").Process(target=session.work, args=(*plan, limit, cache))
            process.start()
            try:
                process.join()
            except KeyboardInterrupt:
                # a terminal sends the signal to the process as well, ``kill`` does not
                os.kill(process.pid, signal.SIGINT)
                process.join()
                return session.INTERRUPTED
        before, lost = lost, []
        if rows.exists():
            lost = [row for row in run_file.read(rows).left_out if LOST in row["reason"]]
        if process.exitcode != session.CONTEXT_LOST or len(lost) <= len(before):
            return process.exitcode or min(1, len(before))
        words = "python -m benchmarks: {group}, {provider}: {reason}; another process continues the run"
        print(words.format(**lost[-1]), file=sys.stderr, flush=True)
        if limit is not None:
            limit = max(0.0, arguments.max_seconds + started - time.monotonic())


def check(arguments, out):
    """Raise ``ValueError`` if these rows cannot be measured here into this folder."""
    import torch

    from .measure import run_file, session
    from .suites.providers import matching

    matching(arguments.filter)
    if arguments.keep_memory and platform.libc_ver()[0] != "glibc":
        raise ValueError(f"--keep-memory needs glibc, got {platform.libc_ver()[0] or platform.system()}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU, torch.cuda.is_available() is False")
    if not (out / "rows.json").exists():
        return
    if not arguments.resume:
        raise ValueError(f"--report {out} holds a run already: --resume continues it; or choose another folder")
    before = run_file.read(out / "rows.json").environment
    found = session.differences(before, session.describe(arguments.device, arguments.quick, ""))
    if found:
        raise ValueError(f"--resume: {out} holds another run: {'; '.join(found)}")


def main(argv=None):
    """Run the suites and write the report.

    Returns:
        0; 1 if a row failed; 2 for bad usage; 5 if no row was selected; 130 after an interrupt; 128 plus the number of
        a signal that ended the suites. With ``--compare``: 0; 1 if something became slower; 2 for unsuitable files.
    """
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["host"]:
        from .questions import host

        return host.main(words[1:])
    found = parser()
    arguments = found.parse_args(words)
    if arguments.compare is not None:
        from .report import compare

        return compare.run(*arguments.compare, arguments.threshold, arguments.by)
    if arguments.resume and arguments.report is None:
        found.error("--resume needs --report DIR, the folder of the run")
    import torch

    from .measure import machine, run_file, session
    from .report import __main__ as report
    from .report.goals import judge

    if arguments.device is None:
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"{machine.run_name(arguments.device)}-{time.strftime('%H%M%S')}"
    out = (arguments.report or ROOT / ".benchmarks" / name).resolve()
    if arguments.keep_memory:
        os.environ.update({name: f"{value:.0f}" for name, value in KEEP_MEMORY.items()})
    try:
        check(arguments, out)
    except ValueError as failure:
        print(f"python -m benchmarks: {failure}", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    code = run_suites(arguments, out)
    print()
    if code < 0:
        name = signal.Signals(-code).name
        print(f"python -m benchmarks: {name} ended the suites; SIGKILL: out of memory?", file=sys.stderr)
        code = 128 - code
    rows = out / "rows.json"
    if not rows.exists():
        reason = "no row matches --suite and --filter" if code == session.NO_ROW else "no row was measured"
        print(f"python -m benchmarks: {reason}", file=sys.stderr)
        return code or 1
    run = run_file.read(rows)
    print(rows, *report.write(rows, out), sep="\n")
    for goal in judge(run.rows):
        print(f"{goal.verdict:11}  {goal.measured:24}  wanted {goal.wanted:6}  {goal.what}")
    if not run.complete:
        again = f"{command_line(arguments)} --resume --report {out}"
        half_way = f", {run.begun} more half-way" if run.begun else ""
        print(f"stopped after {run.finished} of {run.planned} rows{half_way}; to continue: {again}")
    return code


if __name__ == "__main__":
    raise SystemExit(main())

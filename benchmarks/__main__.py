"""Run the suites: ``python -m benchmarks [--quick] [--report DIR] [--filter WORDS] [--device cpu|cuda] [--resume]``.

Writes into the folder ``report.html`` with its pictures, ``rows.csv`` and ``rows.json``, from which the others are made
and which grows row by row. A run that was stopped keeps what it measured and continues with ``--resume``.
``--compare A.json B.json`` measures nothing and reports what became slower.
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

# glibc settings under which freed memory stays with the process. By default, blocks of some MB come from the system
# page by page at every call, and the price of a page varies, on a virtual machine above all.
KEEP_MEMORY = {"TOP_PAD_": "1000000000", "MMAP_THRESHOLD_": "4000000000", "TRIM_THRESHOLD_": "8000000000"}
KEEP_MEMORY = {f"MALLOC_{name}": value for name, value in KEEP_MEMORY.items()}


def parser():
    """The command line's parser."""
    found = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    add = found.add_argument
    add("--quick", action="store_true", help="only the headline rows: under ten minutes on two CPU cores")
    add("--report", "--out", type=Path, metavar="DIR", help="folder, by default .benchmarks/<date-machine-commit>")
    add("--resume", action="store_true", help="go on with the run in that folder, if there is one")
    add("--suite", nargs="+", choices=SUITES, metavar="NAME", help=f"some of {', '.join(SUITES)}")
    add("--filter", help='rows whose name fits, as pytest\'s -k: "module and performer and not 384px"')
    add("--device", choices=("cpu", "cuda"), help='by default "cuda" if there is a GPU')
    add("--keep-memory", action="store_true", help="have glibc keep freed memory: fewer fresh pages for everyone")
    add("--max-seconds", type=float, metavar="N", help="start no new group of rows after N seconds")
    add("--compare", nargs=2, type=Path, metavar=("A", "B"), help="what became slower in run file B; 1 if anything did")
    add("--threshold", type=float, default=0.05, metavar="X", help="of --compare; by default %(default)s")
    add(
        "--by",
        choices=("speedup", "time"),
        default="speedup",
        help="of --compare: against upstream in each run, or time",
    )
    return found


def command_line(arguments):
    """The command that measures the same again: without where the results go, and without a resumption."""
    words = ["python", "-m", "benchmarks"]
    for name in ("device", "quick", "suite", "filter", "keep_memory", "max_seconds"):
        value = getattr(arguments, name)
        if value not in (None, False, ""):
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *(f"{v:g}" if isinstance(v, float) else v for v in values)]
    return shlex.join(words)


def run_suites(arguments, out):
    """Run the suites in a process of their own; each time a row has cost it its CUDA context, another one goes on.

    Returns:
        its exit code, 1 if a row did that.
    """
    from .measure import run_file, session

    started, losses, rows = time.monotonic(), [], out / "rows.json"
    suites = [suite for suite in SUITES if suite in (arguments.suite or SUITES)]
    plan = (suites, arguments.device, arguments.quick, arguments.filter, rows, command_line(arguments))
    while True:
        most = arguments.max_seconds
        limit = None if most is None else max(0.0, most - (time.monotonic() - started))
        with tempfile.TemporaryDirectory(prefix="t2t-fast-bench-") as cache:
            process = multiprocessing.get_context("spawn").Process(target=session.work, args=(*plan, limit, cache))
            process.start()
            try:
                process.join()
            except KeyboardInterrupt:
                # from a terminal it has been told as well
                os.kill(process.pid, signal.SIGINT)
                process.join()
                return session.INTERRUPTED
        left_out = run_file.read(rows).left_out if rows.exists() else []
        found = [
            f"{each['group']}, {each['provider']}: {each['reason']}" for each in left_out if LOST in each["reason"]
        ]
        if process.exitcode != session.CONTEXT_LOST or len(found) <= len(losses):
            return process.exitcode or min(1, len(losses))
        losses = found
        print(f"python -m benchmarks: {losses[-1]}; going on in another process", file=sys.stderr, flush=True)


def obstacle(arguments, out):
    """Why nothing can be measured, in one line, or ``None``."""
    import torch

    from .measure import run_file, session
    from .suites.providers import matching

    try:
        matching(arguments.filter or "")
    except ValueError as failure:
        return f"--filter {failure}"
    if arguments.keep_memory and platform.libc_ver()[0] != "glibc":
        return f"--keep-memory needs glibc, this is {platform.system()} with {platform.libc_ver()[0] or 'another libc'}"
    if arguments.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda needs a GPU, torch.cuda.is_available() is False"
    rows = out / "rows.json"
    if not rows.exists():
        return None
    if not arguments.resume:
        return f"--report {out} holds a run already: --resume goes on with it; or choose another folder"
    try:
        before = run_file.read(rows).environment
    except ValueError as failure:
        return f"--resume: {failure}"
    found = session.differences(before, session.describe(arguments.device, arguments.quick, ""))
    return f"--resume: another run lies in {out}: {'; '.join(found)}" if found else None


def main(argv=None):
    """Run the suites and write the report.

    Returns:
        0; 1 if a row failed, 5 if none was selected; 2 for bad usage; 130 if somebody stopped it; 128 and the signal's
        number if one ended the suites. With ``--compare``: 0, 1 if something became slower, 2 for unsuitable files.
    """
    found = parser()
    arguments = found.parse_args(argv)
    if arguments.compare is not None:
        from .report import compare

        return compare.run(*arguments.compare, arguments.threshold, arguments.by)
    if arguments.resume and arguments.report is None:
        found.error("--resume needs --report DIR, the folder of the run to go on with")
    import torch

    from .measure import machine, run_file

    if arguments.device is None:
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    name = machine.run_name(arguments.device)
    names = (name, *(f"{name}-{number}" for number in range(2, 1000)))
    free = (folder for folder in (ROOT / ".benchmarks" / name for name in names) if not (folder / "rows.json").exists())
    out = (arguments.report or next(free)).resolve()
    if arguments.keep_memory:
        os.environ.update(KEEP_MEMORY)
    reason = obstacle(arguments, out)
    if reason is not None:
        print(f"python -m benchmarks: {reason}", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    code = run_suites(arguments, out)
    print()
    if code < 0:
        name = signal.Signals(-code).name
        print(f"python -m benchmarks: the suites were ended by {name}; SIGKILL: out of memory?", file=sys.stderr)
        code = 128 - code
    rows = out / "rows.json"
    if not rows.exists():
        print("python -m benchmarks: no row was measured", file=sys.stderr)
        return code or 1
    run = run_file.read(rows)
    print(rows)
    try:
        from .report import __main__ as report
        from .report.goals import judge

        for path in report.write(rows, out):
            print(path)
        for goal in judge(run.rows):
            print(f"{goal.verdict:11}  {goal.measured:24}  wanted {goal.wanted:6}  {goal.what}")
    except ImportError as failure:  # the rows are there, and the report can be made from them on another machine
        print(f"python -m benchmarks: no report ({failure}); pip install 't2t_fast[bench]'", file=sys.stderr)
    if not run.complete:
        again = f"{command_line(arguments)} --resume --report {out}"
        half_way = f", {run.begun} more half-way" if run.begun else ""
        print(f"stopped after {run.finished} of {run.planned} rows{half_way}; to go on: {again}")
    return code


if __name__ == "__main__":
    raise SystemExit(main())

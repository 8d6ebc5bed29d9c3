"""Everything that a GPU machine can tell, offline, in under ten minutes: ``python -m benchmarks.gpu --out DIR``.

Builds in place, runs the gpu-marked tests that are not slow, ``t2t-fast verify``, the half-precision comparison,
attention's error against norm, the kernel report, a short training run of a swapped model beside upstream's, the
headline rows of the suites, and as many of the other rows as fit into what is left of the time. Every part has a time
limit, a log of its own, and its line in ``summary.json`` as soon as it ends, so a run that is cut off leaves what it
had. Without a GPU: one line that says why, exit code 1.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from . import report
from .goals import judge

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 570
"""Of a whole run; what the other parts leave belongs to the suites."""

SUITES_MARGIN = 75
"""Seconds between the suites' last start of a group and the end of their part: a group takes that long."""

WORTH_STARTING = 90
"""Seconds that a part without a limit of its own needs at least."""


NO_TIME = "no time left"


class Gpu:
    """The device layer: whether there is a GPU, and what it is. Imports torch when asked, not before."""

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
        from . import machine

        return machine.describe("cuda")

    def run_name(self):
        """Name of the results' folder."""
        from . import machine

        return machine.run_name("cuda")


class Part(NamedTuple):
    """One step: a name, its time limit (``None``: what is left), and its command for a limit."""

    name: str
    seconds: float | None
    command: Callable[[float], list[str]]


def plan(out, quick):
    """The parts in their order."""

    def python(*words):
        return lambda seconds: [sys.executable, *words]

    def suites(folder, *more):
        def command(seconds):
            limit = f"{max(1.0, seconds - SUITES_MARGIN):.0f}"
            words = ["--device", "cuda", "--out", str(out / folder), "--max-seconds", limit]
            return [sys.executable, "-m", "benchmarks", *words, *more]

        return command

    neutrality = ("-m", "benchmarks.neutrality", "--device", "cuda", "--steps", "50", "--out", str(out / "neutrality"))
    parts = [
        Part("build", 180, python("setup.py", "build_ext", "--inplace")),
        Part("tests", 150, python("-m", "pytest", "-m", "gpu and not slow", "-q")),
        Part("verify", 60, python("-m", "t2t_fast", "verify")),
        Part("half-precision", 45, python("-m", "benchmarks.amp", "--device", "cuda", "--json")),
        Part("stability", 30, python("-m", "benchmarks.stability", "--device", "cuda")),
        Part("kernels", 60, python("-m", "benchmarks.kernel_report")),
        Part("neutrality", 44, python(*neutrality)),
        Part("headline", None, suites("headline", "--quick")),
    ]
    return parts if quick else [*parts, Part("suites", None, suites("suites"))]


def run_part(part, seconds, log):
    """Run a command into a log that is shown as it grows; end its whole process group at the limit.

    Returns:
        exit code, or ``None`` where the limit ended it.
    """
    deadline = time.monotonic() + seconds
    with log.open("wb") as sink, log.open("rb") as source:
        process = subprocess.Popen(
            part.command(seconds), cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
                _show(source)
            code = process.poll()
        finally:
            if process.poll() is None:
                _end(process)
        _show(source)
    # what is committed should not tell where this checkout lies
    text = log.read_text(errors="replace").replace(str(ROOT), ".").replace(sys.prefix, "<python>")
    log.write_text(text)
    return code


def _show(source):
    sys.stdout.write(source.read().decode(errors="replace"))
    sys.stdout.flush()


def _end(process):
    """Ask the process group to end, and insist ten seconds later."""
    for request, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, request)
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            process.wait()
        return


def _write(path, summary):
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(summary, indent=1) + "\n")
    partial.replace(path)


def collect(out):
    """What the suites' files hold so far: folder -> number of rows, rows without numbers, goals."""
    found = {}
    for path in sorted(out.glob("*/rows.json")):
        _, rows, left_out = report.read(path)
        goals = [judgement._asdict() for judgement in judge(rows)]
        found[path.parent.name] = {"rows": len(rows), "left_out": left_out, "goals": goals}
    return found


def run(parts, out, summary, total=TOTAL_SECONDS):
    """Run the parts, writing ``summary.json`` after each. Returns whether all that were started succeeded."""
    started = time.monotonic()
    summary["parts"] = []
    for number, part in enumerate(parts, 1):
        left = total - (time.monotonic() - started)
        seconds = left if part.seconds is None else min(part.seconds, left)
        log = out / f"{number}-{part.name}.log"
        line = {"part": part.name, "result": NO_TIME, "code": None, "seconds": 0.0, "limit": max(0.0, seconds)}
        if seconds > (WORTH_STARTING if part.seconds is None else 1):
            print(f"[{number}/{len(parts)}] {part.name}, at most {seconds:.0f} s", flush=True)
            begun = time.monotonic()
            code = run_part(part, seconds, log)
            result = "cut off at its limit" if code is None else "ok" if code == 0 else "failed"
            words = ["python" if word == sys.executable else word for word in part.command(seconds)]
            command = shlex.join(words).replace(str(ROOT), ".")
            spent = time.monotonic() - begun
            line |= {"result": result, "code": code, "seconds": round(spent, 1), "log": log.name, "command": command}
        summary["parts"].append(line)
        summary["suites"] = collect(out)
        _write(out / "summary.json", summary)
        print(f"[{number}/{len(parts)}] {part.name}: {line['result']}, {line['seconds']:.0f} s", flush=True)
    summary["finished"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    _write(out / "summary.json", summary)
    return all(line["result"] in ("ok", NO_TIME) for line in summary["parts"])


def main(argv=None, device=None, make_plan=plan):
    """Run everything.

    Args:
        argv: the command line; device, make_plan: replaced by the tests of this control flow.

    Returns:
        0 if every part succeeded, else 1.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the results; by default benchmarks/results/<name of run>")
    parser.add_argument("--quick", action="store_true", help="only the headline rows of the suites")
    arguments = parser.parse_args(argv)
    device = Gpu() if device is None else device
    obstacle = device.obstacle()
    if obstacle is not None:
        print(f"python -m benchmarks.gpu: cannot run here: {obstacle}", file=sys.stderr)
        return 1
    out = (arguments.out or ROOT / "benchmarks" / "results" / device.run_name()).resolve()
    out.mkdir(parents=True, exist_ok=True)
    summary = {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "quick": arguments.quick,
        "environment": device.describe(),
    }
    succeeded = run(make_plan(out, arguments.quick), out, summary)
    print(out / "summary.json")
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())

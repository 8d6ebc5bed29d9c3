"""``python -m benchmarks.gpu`` on the processor: parts that are small programs, and what a run wrote."""

import json
import sys
import tarfile
import time

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.plan import Part, Stage


def python_part(name, text, rows=False):
    return Part(name, [sys.executable, "-c", text], rows)


def say(name, text, code=0):
    return python_part(name, f"print({text!r}); raise SystemExit({code})")


def sleep(name, seconds, first="pass"):
    return python_part(name, f"import time, signal; {first}; print('begun', flush=True); time.sleep({seconds})")


def alone(part, seconds=30):
    """A stage of one part."""
    return Stage(part.name, seconds, [part])


def summary_in(out):
    summary = json.loads((out / "summary.json").read_text())
    return summary, {part["part"]: part for part in summary["parts"]}


def results_in(out):
    return {name: part["result"] for name, part in summary_in(out)[1].items()}


def archived(out):
    """Name -> content of the archive beside a folder."""
    with tarfile.open(f"{out}.tar.gz") as file:
        return {member.name: file.extractfile(member).read() for member in file}


def run_stages(stages, out, total=480, started=None):
    """Whether nothing went wrong."""
    summary = {"started": "2026-01-02", "quick": False, "source": "abc", "environment": {"gpu": "an imagined one"}}
    return gpu.Run(stages, out, summary, total, time.monotonic() if started is None else started).run()


def run_plan(out, stages, *words):
    """The whole command with this plan, on the CPU."""
    return gpu.main(["--out", str(out), *words], "cpu", lambda *_: stages)

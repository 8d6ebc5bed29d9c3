"""GPU runs without a GPU: a fake device, small programs as parts, and readers of a run's files."""

import json
import sys
import tarfile
import time

from benchmarks.gpu import run as gpu


class FakeGpu:
    """The CPU in place of a GPU."""

    name = "cpu"

    def __init__(self, obstacle=None, driver="1.0"):
        self._obstacle, self._driver = obstacle, driver

    def obstacle(self):
        return self._obstacle

    def describe(self):
        return {"date": str(time.time()), "gpu": "an imagined one", "driver": self._driver}

    def run_name(self):
        return "never used: --out is given"

    def architecture(self):
        return "sm_90"

    def capability(self):
        return None  # build for all architectures, like the environment


def python_part(text):
    return lambda seconds: [sys.executable, "-c", text]


def say(text, code=0):
    return python_part(f"print({text!r}); raise SystemExit({code})")


def sleep(seconds, first="pass"):
    return python_part(f"import time, signal; {first}; print('begun', flush=True); time.sleep({seconds})")


def made_summary():
    return {"started": "2026-01-02", "quick": False, "source": "abc", "environment": {"gpu": "an imagined one"}}


def summary_in(out):
    summary = json.loads((out / "summary.json").read_text())
    return summary, {part["part"]: part for part in summary["parts"]}


def archived(out):
    """Name -> content of the files in the archive next to a folder."""
    with tarfile.open(f"{out}.tar.gz") as file:
        return {member.name: file.extractfile(member).read() for member in file}


def run_plan(out, plan, *words, **device):
    return gpu.main(["--out", str(out), *words], FakeGpu(**device), plan)

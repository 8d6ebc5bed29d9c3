"""Runs compilers in parallel; with ninja only for changed sources, without it for all."""

import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from .toolchain import CannotBuild

MEMORY_PER_JOB = 2 << 30  # bytes; nvcc takes the most


class Step(NamedTuple):
    """A command that makes ``output`` from ``inputs``; compilers write the headers they read to ``output``.d."""

    output: Path
    inputs: list[Path]
    command: list[str]


def available_memory():
    """Bytes available without swapping, including Linux's page cache, which is freed on demand."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def job_count():
    """``MAX_JOBS``, else the number of cores, limited by the memory that compilers need."""
    chosen = os.environ.get("MAX_JOBS", "")
    if chosen.isdigit() and int(chosen) > 0:
        return int(chosen)
    return max(1, min(len(os.sched_getaffinity(0)), available_memory() // MEMORY_PER_JOB))


def find_ninja():
    """The ninja of this environment, else the one on ``PATH``, else ``None``."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = ""
    return (BIN_DIR and shutil.which("ninja", path=BIN_DIR)) or shutil.which("ninja")


def run_steps(root, folder, compilations, link, jobs, environment):
    """Run all compilations, ``jobs`` at a time, then the link, in ``root``; ninja's state is in ``folder`` below it.

    Raises:
        CannotBuild: a command failed; its output has been printed.
    """
    (root / folder).mkdir(parents=True, exist_ok=True)
    ninja = find_ninja()
    if ninja is None:
        with ThreadPoolExecutor(jobs) as pool:
            results = list(pool.map(partial(run, root, environment), compilations))
        good = all(results) and run(root, environment, link)
    else:
        plan = folder / "build.ninja"
        (root / plan).write_text(ninja_plan(folder, compilations, link))
        command = [ninja, "-f", plan, "-j", str(jobs)]
        good = subprocess.run(command, cwd=root, env=environment).returncode == 0
    if not good:
        raise CannotBuild("a compiler failed, its messages are above")


def run(root, environment, step):
    """Whether the step succeeded; prints its output in one piece."""
    (root / step.output).parent.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(
        step.command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode != 0:
        print(shlex.join(step.command))
    print(result.stdout, end="", flush=True)
    return result.returncode == 0


def ninja_plan(folder, compilations, link):
    """The text of build.ninja."""
    lines = [
        f"builddir = {escape(folder)}",
        "rule compile",
        "  command = $line",
        "  description = compile $in",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $line",
        "  description = link $out",
    ]
    for rule, step in [*(("compile", step) for step in compilations), ("link", link)]:
        inputs = " ".join(map(escape, step.inputs))
        line = shlex.join(step.command).replace("$", "$$")
        lines += [f"build {escape(step.output)}: {rule} {inputs}", f"  line = {line}"]
    return "\n".join(lines) + "\n"


def escape(path):
    """A path, escaped for ninja."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

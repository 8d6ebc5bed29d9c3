"""The parts of ``make gpu`` in their order, and the time limit of each.

The native operators are built for the card's own architecture, and the kernels of the headline rows are compiled on all
cores. Then come these rows, each checked before it is timed, then the checks, then the other rows. No kernel is
compiled when a run starts, and Triton takes about a second for each (the shared test cases alone need 163 in bf16), so
parts that are not timed run side by side, one process per core. Rows with ``torch.compile``, which tunes for minutes,
are a part of their own.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

TOTAL_SECONDS = {False: 480, True: 170}
"""Of a full and a quick run, from the start of the process, :data:`END_SECONDS` included."""

END_SECONDS = 25
"""Reserved for what follows the last part's limit: ending its processes, summaries, archive."""

SUITES_MARGIN = 30
"""Seconds between the last start of a group and the limit of a suites part: a group with new kernels takes that."""

MOST_COMPILING = 12
"""Compiling processes side by side: each loads PyTorch and takes GPU memory for a context."""

CHECKS = ("verify-", "tests-")
"""Prefixes of the parts whose failure means that the run's numbers are not to be trusted."""

LEAST_FOR_ROWS = 10.0
"""Seconds in which the suites start groups, however short their part is."""

WORTH_STARTING = 50
"""Minimum seconds for a part without a limit of its own."""


class Stage(NamedTuple):
    """Consecutive parts that run side by side: their total time, and how many run at once."""

    name: str
    seconds: float
    jobs: int


class Part(NamedTuple):
    """One step: its time limit (``None``: the time that later parts leave), and its command for a limit in seconds.

    ``command`` is ``None`` where a quick run leaves the part out; ``folder`` is for the rows of suites.
    """

    name: str
    seconds: float | None
    command: Callable[[float], list[str]] | None
    folder: Path | None = None
    stage: Stage | None = None


VERIFIED = {
    "split": ("soft_split_linear",),
    "layer": ("performer_layer", "token_mlp"),
    "others": ("model", "performer_attention", "soft_split", "soft_composition", "fused_fold_unfold"),
}
"""Operators of one ``verify`` process: with 66, 57 and 40 kernels to compile per dtype."""

CUDA, LAYERS, NATIVE = (f"gpu/test_{name}.py" for name in ("triton_cuda", "triton_cuda_layers", "native_cuda"))
COVERED = "not against_float64"
"""``verify`` compares the same cases within the same tolerances."""

TESTS = {
    "attention": (CUDA, f"{COVERED} and not widths"),
    "widths": (CUDA, "widths"),
    "layers": (LAYERS, "not golden"),
    "golden": (LAYERS, "golden"),
    "native": (NATIVE, COVERED),
}
"""A file and an expression for each pytest process; one more runs the gpu tests of other files."""

TELLING = "(graphs or current_stream or peak_memory or swapped_model) and not fp16 and not fp32"
"""Tests of a quick run: what ``verify`` and the rows cannot see, in bf16."""

QUICK_TESTS = {"attention": (CUDA, TELLING), "layers": (LAYERS, TELLING), "native": (NATIVE, TELLING)}
QUICK_SUITES = ("module", "models", "training")


def _part(name, seconds, *words, **more):
    return Part(name, seconds, lambda limit: [sys.executable, *map(str, words)], **more)


def _build(device, seconds):
    """The native operators in place, for the card's own architecture unless the environment names others."""
    own = device.capability()
    words = [] if own is None or "TORCH_CUDA_ARCH_LIST" in os.environ else ["env", f"TORCH_CUDA_ARCH_LIST={own}"]
    return Part("build", seconds, lambda limit: [*words, sys.executable, "setup.py", "build_ext", "--inplace"])


def _compile(device, jobs, seconds, *suites):
    """The kernels of the headline rows of some suites (default: all), in several processes."""
    shares = min(jobs, MOST_COMPILING)
    stage = Stage("compile", seconds, shares)
    suite = ("--suite", *suites) if suites else ()
    for share in range(1, shares + 1):
        words = ("--device", device.name, "--share", f"{share}/{shares}", *suite)
        yield _part(f"compile-{share}", seconds, "-m", "benchmarks.gpu.compile", *words, stage=stage)


def _suites(name, box, device, out, *more):
    """A part that measures rows into a folder of its name."""

    def command(seconds):
        limit = max(LEAST_FOR_ROWS, seconds - SUITES_MARGIN)
        words = ("--device", device.name, "--report", str(out / name), "--max-seconds", f"{limit:.0f}", *more)
        return [sys.executable, "-m", "benchmarks", *words]

    return Part(name, box, command, out / name)


def _verify(device, stage, *dtypes):
    for dtype in dtypes:
        for name, operators in VERIFIED.items():
            words = [word for op in operators for word in ("--op", op)]
            command = ("-m", "t2t_fast", "verify", "--device", device.name, "--dtype", dtype, *words)
            # the largest compiles for about 70 seconds
            yield _part(f"verify-{name}-{dtype}", 140, *command, stage=stage)


def _tests(chosen, stage, others=False):
    """Pytest on some files; ``others``: also on the remaining files with gpu tests."""
    # one line per test: a log that ends early still shows its progress; short tracebacks: a lost context fails all
    words = ("-m", "pytest", "-v", "--tb=short", "--durations=10", "-m", "gpu and not slow")
    for name, (file, expression) in chosen.items():
        yield _part(f"tests-{name}", 160, *words, "-k", expression, Path("tests", file), stage=stage)
    if others:
        files = {path for path in ROOT.glob("tests/*/test_*.py") if "pytest.mark.gpu" in path.read_text()}
        files -= {ROOT / "tests" / file for file, _ in chosen.values()}
        yield _part("tests-others", 160, *words, *(path.relative_to(ROOT) for path in sorted(files)), stage=stage)


def _numbers(device, out, stage):
    """How exact, finite and neutral the package is, and its compiled kernels."""
    commands = {
        # nine trainings of 50 steps, three dtypes to compile
        "neutrality": (150, ("questions.neutrality", "--steps", "50", "--out", out / "neutrality")),
        # three dtypes of a module to compile
        "half-precision": (120, ("questions.amp", "--json")),
        # three dtypes of the attention to compile
        "stability": (90, ("questions.stability",)),
    }
    for name, (seconds, (module, *words)) in commands.items():
        yield _part(name, seconds, "-m", f"benchmarks.{module}", "--device", device.name, *words, stage=stage)
    # 112 kernels of one architecture, on all cores; last, since it needs no GPU
    own = ("--architecture", device.architecture()) if device.architecture() else ()
    words = ("-m", "benchmarks.kernels.report", *own, "--json", out / "kernels.json")
    yield _part("kernels", 90, *words, stage=stage)


def _full(device, out, jobs):
    checks = Stage("checks", 140, jobs)
    return [
        # one architecture takes two cores 20 seconds
        _build(device, 45),
        # at most 5 groups of rows for each of 12 processes, 10 seconds of them to start
        *_compile(device, jobs, 50),
        # bf16 without torch.compile: modules, models, training, latency, operators, scaling, memory, as far as they fit
        _suites("headline", 100, device, out, "--quick", "--filter", "not compiled"),
        # bf16 first: the most important, should the stage run out of time
        *_verify(device, checks, "bf16"),
        *_tests(TESTS, checks, others=True),
        *_verify(device, checks, "fp16", "fp32", "fp64"),
        *_numbers(device, out, checks),
        # max-autotune takes up to a minute for each of four compiled rows: the module's inference, then its training
        _suites("compiled", 65, device, out, "--quick", "--suite", "module", "--filter", "not aten"),
        # the remaining time; the next call with the same folder resumes
        _suites("suites", None, device, out, "--filter", "not compiled"),
    ]


def _quick(device, out, jobs):
    checks = Stage("checks", 38, jobs)
    return [
        # a card's first build; a second call reuses what is compiled by then
        _build(device, 30),
        *_compile(device, jobs, 25, *QUICK_SUITES),
        # the time that build and checks leave, at least 60 seconds: the module's rows, then the lite model's
        _suites("headline", None, device, out, "--quick", "--suite", *QUICK_SUITES, "--filter", "not compiled"),
        *_verify(device, checks, "bf16"),
        *_tests(QUICK_TESTS, checks),
    ]


def plan(device, out, quick, jobs):
    """The parts in their order; those that a quick run leaves out have no command.

    Args:
        device: has a ``name`` for ``--device``, an ``architecture()`` for the kernel report and a ``capability()`` for
            the build; out: folder of the run; jobs: how many parts may run side by side.
    """
    parts = _full(device, out, jobs)
    if not quick:
        return parts
    chosen = {part.name: part for part in _quick(device, out, jobs)}
    return [chosen.get(part.name, part._replace(command=None, stage=None)) for part in parts]

"""What ``make gpu`` runs: its parts in their order, and the most time that each may take.

The native operators are built for the card's own architecture, and the kernels of the headline rows are compiled by all
cores. Then come these rows, which check every result before they time it, then the checks, then the rest. No kernel is
compiled when a run begins, and each takes Triton about a second: the shared test cases alone need 163 of them in bf16.
What is not timed therefore runs side by side, one process a core. What ``torch.compile`` tunes for minutes has a part
of its own, so that it cannot use up the time of the other rows.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

TOTAL_SECONDS = {False: 480, True: 170}
"""Of a whole run and of a quick one, from the start of its process, with everything that :data:`END_SECONDS` is for."""

END_SECONDS = 25
"""Of a run's time, for what comes after the last part's limit: ten to end its processes, the report, the archive."""

SUITES_MARGIN = 30
"""Seconds between the suites' last start of a group and the end of their part: a group with new kernels takes that."""

MOST_COMPILING = 12
"""Processes that compile kernels side by side: each loads PyTorch and takes memory of the GPU for a context."""

CHECKS = ("verify-", "tests-")
"""How the names of the parts begin whose failure says that the run's numbers are not to be trusted."""

LEAST_FOR_ROWS = 10.0
"""Seconds in which the suites start groups, however short their part is; with less they would measure nothing."""

WORTH_STARTING = 50
"""Seconds that a part without a limit of its own needs at least."""


class Stage(NamedTuple):
    """Parts that follow each other in a plan and run side by side: the most time of all, and how many at once."""

    name: str
    seconds: float
    jobs: int


class Part(NamedTuple):
    """One step: a name, its time limit (``None``: what later parts leave), and its command for a limit in seconds.

    ``command`` is ``None`` where a quick run leaves the part out; ``folder`` is where suites put their rows; a part
    with a ``stage`` runs beside its neighbours of that stage.
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
"""Operators of one process of ``verify``: each has about as many kernels to compile, 66, 57 and 40 in a dtype."""

COVERED = "not against_float64"
"""``verify`` compares the same cases within the same tolerances."""

TESTS = {
    "attention": ("gpu/test_triton_cuda.py", f"{COVERED} and not widths"),
    "widths": ("gpu/test_triton_cuda.py", "widths"),
    "layers": ("gpu/test_triton_cuda_layers.py", "not golden"),
    "golden": ("gpu/test_triton_cuda_layers.py", "golden"),
    "native": ("gpu/test_native_cuda.py", COVERED),
}
"""Tests of one process: a file, and which of it. Those that are marked gpu elsewhere run in one more."""

TELLING = "(graphs or current_stream or peak_memory or swapped_model) and not fp16 and not fp32"
"""Tests of a quick run: what ``verify`` and the rows cannot see, in bf16."""

QUICK_TESTS = {
    "attention": ("gpu/test_triton_cuda.py", TELLING),
    "layers": ("gpu/test_triton_cuda_layers.py", TELLING),
    "native": ("gpu/test_native_cuda.py", TELLING),
}


QUICK_SUITES = ("module", "models", "training")


def _python(*words):
    return lambda seconds: [sys.executable, *map(str, words)]


def _build(device, seconds):
    """The native operators in place, for the card's own architecture unless the environment names others."""
    own = device.capability()
    words = [] if own is None or "TORCH_CUDA_ARCH_LIST" in os.environ else ["env", f"TORCH_CUDA_ARCH_LIST={own}"]
    return Part("build", seconds, lambda limit: [*words, sys.executable, "setup.py", "build_ext", "--inplace"])


def _compile(device, jobs, seconds, *suites):
    """The kernels of the headline rows of some suites (none: of all), in several processes."""
    shares = min(jobs, MOST_COMPILING)
    stage = Stage("compile", seconds, shares)
    for share in range(1, shares + 1):
        words = ["--device", device.name, "--share", f"{share}/{shares}", *(["--suite", *suites] if suites else [])]
        yield Part(f"compile-{share}", seconds, _python("-m", "benchmarks.gpu.compile", *words), stage=stage)


def _suites(name, box, device, out, *more):
    """A part that measures rows into a folder of its name."""

    def command(seconds):
        limit = max(LEAST_FOR_ROWS, seconds - SUITES_MARGIN)
        words = ["--device", device.name, "--report", out / name, "--max-seconds", f"{limit:.0f}", *more]
        return _python("-m", "benchmarks", *words)(seconds)

    return Part(name, box, command, out / name)


def _verify(device, dtypes):
    for dtype in dtypes:
        for name, operators in VERIFIED.items():
            words = [word for op in operators for word in ("--op", op)]
            command = _python("-m", "t2t_fast", "verify", "--device", device.name, "--dtype", dtype, *words)
            # the largest compiles for about 70 seconds
            yield Part(f"verify-{name}-{dtype}", 140, command)


def _tests(chosen, others):
    """Pytest on some files; ``others``: also on the remaining ones with tests marked gpu."""
    # a line a test: a log that ends early tells how far it came; a lost context fails all, so tracebacks are short
    words = ("-m", "pytest", "-v", "--tb=short", "--durations=10", "-m", "gpu and not slow")
    for name, (file, expression) in chosen.items():
        yield Part(f"tests-{name}", 160, _python(*words, "-k", expression, Path("tests", file)))
    if others:
        files = {path for path in ROOT.glob("tests/*/test_*.py") if "pytest.mark.gpu" in path.read_text()}
        files -= {ROOT / "tests" / file for file, _ in chosen.values()}
        yield Part("tests-others", 160, _python(*words, *(path.relative_to(ROOT) for path in sorted(files))))


def _numbers(device, out):
    """What tells how exact, how finite and how neutral the package is, and what the compilers made of its kernels."""
    neutrality = ("--steps", "50", "--out", out / "neutrality")
    # nine trainings of 50 steps, three dtypes to compile
    yield Part(
        "neutrality", 150, _python("-m", "benchmarks.questions.neutrality", "--device", device.name, *neutrality)
    )
    # three dtypes of a module to compile
    yield Part("half-precision", 120, _python("-m", "benchmarks.questions.amp", "--device", device.name, "--json"))
    # three dtypes of the attention to compile
    yield Part("stability", 90, _python("-m", "benchmarks.questions.stability", "--device", device.name))
    # 112 kernels of one architecture, by all cores; last, since it alone needs no GPU
    only = [word for word in ("--architecture", device.architecture()) if device.architecture()]
    yield Part("kernels", 90, _python("-m", "benchmarks.kernels.report", *only, "--json", out / "kernels.json"))


def _full(device, out, jobs):
    checks = Stage("checks", 140, jobs)
    return [
        # one architecture takes two cores 20 seconds
        _build(device, 45),
        # at most 5 groups of rows for each of 12 processes, 10 seconds of them to start
        *_compile(device, jobs, 50),
        # bf16, nothing by torch.compile: modules, models, training, latency, operators, scaling, memory as they fit
        _suites("headline", 100, device, out, "--quick", "--filter", "not compiled"),
        # bf16 first: what matters most, should the stage's time not do for all
        *(part._replace(stage=checks) for part in _verify(device, ("bf16",))),
        *(part._replace(stage=checks) for part in _tests(TESTS, others=True)),
        *(part._replace(stage=checks) for part in _verify(device, ("fp16", "fp32", "fp64"))),
        *(part._replace(stage=checks) for part in _numbers(device, out)),
        # max-autotune takes up to a minute for each of four compiled rows: the module's inference, then its training
        _suites("compiled", 65, device, out, "--quick", "--suite", "module", "--filter", "not aten"),
        # what is left; the next call into the same folder goes on
        _suites("suites", None, device, out, "--filter", "not compiled"),
    ]


def _quick(device, out, jobs):
    checks = Stage("checks", 38, jobs)
    return [
        # a card's first build; what it has compiled at the limit, the next one keeps
        _build(device, 30),
        *_compile(device, jobs, 25, *QUICK_SUITES),
        # what build and checks leave, 60 seconds and more: the module's inference and training, then the lite model's
        _suites("headline", None, device, out, "--quick", "--suite", *QUICK_SUITES, "--filter", "not compiled"),
        *(part._replace(stage=checks) for part in _verify(device, ("bf16",))),
        *(part._replace(stage=checks) for part in _tests(QUICK_TESTS, others=False)),
    ]


def plan(device, out, quick, jobs):
    """The parts in their order; in a quick run also, without a command, those that it leaves out.

    Args:
        device: has a ``name`` for ``--device``, an ``architecture()`` for the kernel report and a ``capability()`` for
            the build; out: folder of the run; jobs: how many parts may run side by side.
    """
    parts = _full(device, out, jobs)
    if not quick:
        return parts
    chosen = {part.name: part for part in _quick(device, out, jobs)}
    return [chosen.get(part.name, part._replace(command=None, stage=None)) for part in parts]

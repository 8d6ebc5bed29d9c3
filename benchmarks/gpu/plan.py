"""The stages of ``make gpu`` in their order, and the time limit of each.

The native operators are built for the GPU's own architecture, and the kernels of the headline rows are compiled on all
cores. Then come these rows, each checked before it is timed, then the checks, then the other rows. A run starts without
compiled kernels, and Triton takes about a second for each (the shared test cases alone need 163 in bf16). Parts that
are not timed therefore run side by side, one process per core. Rows with ``torch.compile``, which tunes for minutes,
are a part of their own.
"""

import os
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

# Of a full and a quick run, from the start of the process
TOTAL_SECONDS = {False: 480, True: 170}
# Of these, reserved for what follows the last part's limit: ending its processes, summaries, archive
END_SECONDS = 25
# Between the last start of a group of rows and the limit of its part: a group with new kernels takes that
SUITES_MARGIN = 30
# Compiling processes side by side: each loads PyTorch and takes GPU memory for a context
MOST_COMPILING = 12
# Parts whose failure means that the run's numbers are not to be trusted
CHECKS = ("verify-", "tests-")


class Part(NamedTuple):
    """One command. ``rows``: it runs suites, whose rows go into the folder of its name; called again, it resumes."""

    name: str
    command: list[str]
    rows: bool = False

    @property
    def least(self):
        """The part is started if more seconds than these are left."""
        return SUITES_MARGIN + 20 if self.rows else 1

    def words(self, seconds):
        """The command for a time limit in seconds."""
        return [*self.command, "--max-seconds", f"{seconds - SUITES_MARGIN:.0f}"] if self.rows else self.command


class Stage(NamedTuple):
    """Parts that run ``jobs`` at a time, all within ``seconds`` (``None``: the time that later stages leave)."""

    name: str
    seconds: float | None
    parts: list[Part]
    jobs: int = 1


# Operators of one ``verify`` process, which compile up to 66 kernels per dtype
VERIFIED = {
    "split": ("soft_split_linear",),
    "layer": ("performer_layer", "token_mlp"),
    "block": ("add_layer_norm", "layer_norm_linear", "layer_norm_mlp"),
    "others": (
        "model",
        "performer_attention",
        "soft_split",
        "soft_composition",
        "fused_fold_unfold",
        "transformer_block",
    ),
}

CUDA, LAYERS, NATIVE = (f"gpu/test_{name}.py" for name in ("triton_cuda", "triton_cuda_layers", "native_cuda"))
# ``verify`` compares the same cases within the same tolerances
COVERED = "not against_float64"
# File and expression of each pytest process; one more runs the gpu tests of other files
TESTS = {
    "attention": (CUDA, f"{COVERED} and not widths"),
    "widths": (CUDA, "widths"),
    "layers": (LAYERS, "not golden"),
    "golden": (LAYERS, "golden"),
    "native": (NATIVE, COVERED),
}
# Tests of a quick run: what ``verify`` and the rows cannot see, in bf16
TELLING = "(graphs or current_stream or peak_memory or swapped_model) and not fp16 and not fp32"
QUICK_TESTS = {"attention": (CUDA, TELLING), "layers": (LAYERS, TELLING), "native": (NATIVE, TELLING)}
QUICK_SUITES = ("module", "models", "training")
# one line per test: a log that ends early still shows its progress; short tracebacks: a lost context fails all tests
PYTEST = ("pytest", "-v", "--tb=short", "--durations=10", "-m", "gpu and not slow")


def _module(name, *words, rows=False):
    """A part that runs ``python -m`` with these words."""
    return Part(name, [sys.executable, "-m", *map(str, words)], rows)


def _compile(n, *words):
    """Parts that share the kernels of the headline rows."""
    return [_module(f"compile-{k}", "benchmarks.gpu.compile", *words, "--share", k, n) for k in range(1, n + 1)]


def _verify(on, *dtypes):
    for dtype in dtypes:
        for name, operators in VERIFIED.items():
            words = ("t2t_fast", "verify", *on, "--dtype", dtype, *(f"--op={op}" for op in operators))
            yield _module(f"verify-{name}-{dtype}", *words)


def _tests(chosen):
    return [_module(f"tests-{name}", *PYTEST, "-k", words, f"tests/{file}") for name, (file, words) in chosen.items()]


def _other_tests():
    """The gpu tests of the files that are not in :data:`TESTS`."""
    files = {path for path in ROOT.glob("tests/*/test_*.py") if "pytest.mark.gpu" in path.read_text()}
    files -= {ROOT / "tests" / file for file, _ in TESTS.values()}
    return _module("tests-others", *PYTEST, *(path.relative_to(ROOT) for path in sorted(files)))


def plan(out, quick, jobs, device="cuda"):
    """The stages in their order.

    Args:
        out: folder of the run; quick: the module and the lite model alone; jobs: how many parts may run side by side;
        device: "cuda"; "cpu" in tests.
    """
    # native operators in place for the GPU's own architecture, unless the environment names others
    build = Part("build", [sys.executable, "setup.py", "build_ext", "--inplace"])
    architecture = []
    if device == "cuda":
        import torch

        from ..kernels.triton_report import SHARED_LIMITS

        major, minor = torch.cuda.get_device_capability()
        if "TORCH_CUDA_ARCH_LIST" not in os.environ:
            build.command[:0] = ["env", f"TORCH_CUDA_ARCH_LIST={major}.{minor}"]
        if f"sm_{major}{minor}" in SHARED_LIMITS:
            architecture = ["--architecture", f"sm_{major}{minor}"]
    on = ("--device", device)

    def rows(name, *options):
        return [_module(name, "benchmarks", *on, "--report", out / name, "--resume", *options, rows=True)]

    shares, eager = min(jobs, MOST_COMPILING), ("--filter", "not compiled")
    if quick:
        suites = ("--suite", *QUICK_SUITES)
        return [
            # a GPU's first build; a second call reuses what is compiled by then
            Stage("build", 30, [build]),
            Stage("compile", 25, _compile(shares, *on, *suites), shares),
            # the time that build and checks leave, at least 60 seconds: the module's rows, then the lite model's
            Stage("headline", None, rows("headline", "--quick", *suites, *eager)),
            Stage("checks", 38, [*_verify(on, "bf16"), *_tests(QUICK_TESTS)], jobs),
        ]
    checks = [
        # bf16 first: the most important, should the stage run out of time; the largest compiles for about 70 seconds
        *_verify(on, "bf16"),
        *_tests(TESTS),
        _other_tests(),
        *_verify(on, "fp16", "fp32", "fp64"),
        # nine trainings; these three compile for three dtypes
        _module("neutrality", "benchmarks.questions.neutrality", *on, "--steps", 50, "--out", out / "neutrality"),
        _module("half-precision", "benchmarks.questions.amp", *on),
        _module("stability", "benchmarks.questions.stability", *on),
        # 112 kernels of one architecture, on all cores; last, since it needs no GPU
        _module("kernels", "benchmarks.kernels.report", *architecture, "--json", out / "kernels.json"),
    ]
    return [
        # one architecture takes two cores 20 seconds
        Stage("build", 45, [build]),
        # at most 5 groups of rows for each of 12 processes, 10 seconds of them to start
        Stage("compile", 50, _compile(shares, *on), shares),
        # bf16 without torch.compile: modules, models, training, latency, operators, scaling, memory, as far as they fit
        Stage("headline", 100, rows("headline", "--quick", *eager)),
        Stage("checks", 140, checks, jobs),
        # max-autotune takes up to a minute for each of four compiled rows: the module's inference, then its training
        Stage("compiled", 65, rows("compiled", "--quick", "--suite", "module", "--filter", "not aten")),
        # the remaining time; the next call with the same folder resumes
        Stage("suites", None, rows("suites", *eager)),
    ]

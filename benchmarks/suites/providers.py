"""The table of providers (the competing implementations), and the plan of a run."""

import re
from typing import NamedTuple

import t2t_fast
from t2t_fast.testing import DTYPES

from . import operators, packages, runtimes
from .goals import ROWS
from .groups import groups

COMPILE_MODES = {"cuda": "max-autotune", "cpu": "default"}  # modes of ``torch.compile``, for every provider


class Provider(NamedTuple):
    """One implementation.

    ``source``: which implementation of a subject it runs (see ``subjects.py``); ``another``: it computes another
    function, for orientation only; ``package``: it needs an optional package, and its failure leaves out its row but
    does not fail the run; ``captured``: it replays a CUDA graph; ``recompute``: its Performer layers recompute;
    ``float32``: it runs without autocast in a group of a half type.
    """

    name: str
    label: str
    source: str
    compiled: bool = False
    another: bool = False
    package: bool = False
    captured: bool = False
    recompute: bool = False
    float32: bool = False


def _package(name, label, another=True):
    return Provider(name, label, name, another=another, package=True)


# In the order of every table; the others are compared with the first
PROVIDERS = (
    Provider("upstream", "upstream, eager", "upstream"),
    Provider("upstream-compiled", "upstream, torch.compile", "upstream", compiled=True),
    Provider("upstream-graph", "upstream, CUDA graph", "upstream", captured=True),
    *(_package(name, f"upstream, {runtime.label}", False) for name, runtime in runtimes.RUNTIMES.items()),
    Provider("aten", "t2t_fast aten, eager", "aten"),
    Provider("aten-compiled", "t2t_fast aten, torch.compile", "aten", compiled=True),
    Provider("native", "t2t_fast native, eager", "native"),
    Provider("triton", "t2t_fast triton, eager", "triton"),
    Provider("t2t_fast", "t2t_fast, eager", "t2t_fast"),
    Provider("t2t_fast-compiled", "t2t_fast, torch.compile", "t2t_fast", compiled=True),
    Provider("t2t_fast-low", "t2t_fast, low memory", "t2t_fast", recompute=True),
    Provider("t2t_fast-graph", "t2t_fast, CUDA graph", "t2t_fast", captured=True),
    Provider("t2t_fast-fp32", "t2t_fast, eager, float32", "t2t_fast", float32=True),
    Provider("unfold", "F.unfold alone, tokens not contiguous", "unfold"),
    Provider("convolution", "convolution of the same shape, no LayerNorm", "convolution", another=True),
    Provider("two-sdpa", "log-space form by two scaled_dot_product_attention", "two-sdpa"),
    _package("performer-pytorch", "performer-pytorch, same features, no eps"),
    _package("flash-linear-attention", "flash-linear-attention, same features, causal, no eps"),
    Provider("sdpa", "scaled_dot_product_attention (softmax)", "sdpa", another=True),
    *(_package(name, model.label) for name, model in packages.MODELS.items()),
)
BASELINE = PROVIDERS[0].name
OURS = "t2t_fast"
BY_NAME = {provider.name: provider for provider in PROVIDERS}
BACKENDS = ("aten", "native", "triton")  # sources that are this package with an explicit backend


def backends(device, dtype):
    """The backend that each operator selects with "auto"."""
    explanation = t2t_fast.explain(device=device, dtype=DTYPES[dtype])
    return {op: explanation.chosen(op) for op in dict.fromkeys(op for op, _, _ in explanation.rows)}


def _sources(group, device):
    operator = group.subject.partition("-")[0]
    _, sources = operators.OPERATORS.get(operator, (None, operators.BOTH))
    if group.suite in ("memory", "processes"):
        return sources  # nobody would train with another backend
    if group.level == "model":
        sources = (*sources, *(name for name, model in packages.MODELS.items() if group.subject in model.beside))
    if device == "cpu" and group.suite in ("models", "latency"):
        sources = (*sources, *runtimes.RUNTIMES)
    verdicts = {backend: set() for backend in BACKENDS}
    for op, backend, verdict in t2t_fast.explain(device=device, dtype=DTYPES[group.dtype]).rows:
        if backend in BACKENDS and (group.level != "op" or op == operator):
            verdicts[backend].add(verdict)
    # "t2t_fast" runs the selected backend; every other backend that supports all of the work is a row of its own
    return (*sources, *(name for name in BACKENDS if verdicts[name] in ({"available"}, {"available", "chosen"})))


def providers(group, device):
    """The providers of a group, in the table's order."""
    sources = _sources(group, device)
    graphs = device == "cuda" and group.suite in ("latency", "module") and group.mode == "inference"
    # on a CPU the native layers keep little without recompute
    performer = group.level != "op" and group.subject != "transformer" and "_t_" not in group.subject
    keeping = device == "cuda" and performer and group.mode == "training" and group.suite in ("module", "memory")
    half = device == "cpu" and group.dtype != "fp32"  # whether autocast pays depends on the processor
    return [
        provider
        for provider in PROVIDERS
        if provider.source in sources
        and (group.compiled or not provider.compiled)
        and (graphs or not provider.captured)
        and (keeping or not provider.recompute)
        and (half or not provider.float32)
    ]


def named(group, name):
    """The keys that identify a row in the run file."""
    own = {"provider": name, "label": BY_NAME[name].label, "another_function": BY_NAME[name].another}
    return {"group": group.id, **group._asdict(), **own}


def matching(expression):
    """A predicate of names for an expression in the syntax of pytest's ``-k``; ``ValueError`` for bad syntax."""

    def word(match):
        return match[0] if match[0] in ("and", "or", "not") else f"{match[0].lower()!r} in name"

    try:
        code = compile(re.sub(r"[^\s()]+", word, expression) or "True", "<filter>", "eval")
    except SyntaxError as failure:
        raise ValueError(f"--filter {expression!r}: {failure.msg}") from failure
    return lambda name: bool(eval(code, {"name": name.lower()}))  # of quoted words only


def plan(suites, device, quick, wanted=lambda name: True):
    """The rows of a run: group -> names of its providers.

    ``wanted``: predicate of "<suite> <group>-<provider>", with " goal" behind it if a goal compares the row.
    """
    planned = {}
    for group in (group for suite in suites for group in groups(suite, device, quick)):
        for provider in providers(group, device):
            # compilation takes most of a quick run's time
            left_out = quick and provider.compiled and provider.source in BACKENDS
            goal = " goal" if (group.id, provider.name) in ROWS else ""
            if not left_out and wanted(f"{group.suite} {group.id}-{provider.name}{goal}"):
                planned.setdefault(group, []).append(provider.name)
    return planned

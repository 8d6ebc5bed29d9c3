"""The one table of providers: what competes, under which name, compiled or not."""

from typing import NamedTuple

import torch

import t2t_fast
from t2t_fast.testing import DTYPES

from . import context, operators

COMPILE_MODES = {"cuda": "max-autotune", "cpu": "default"}
"""Mode of ``torch.compile``, the same for everyone."""


class Provider(NamedTuple):
    """A competitor.

    ``source`` says which implementation of a subject it runs (see ``subjects.py``); ``another`` that it computes
    another function, so that it is a yardstick and no replacement; ``package`` that it is somebody else's optional
    package, whose failure leaves its row out and fails no run; ``captured`` that it replays a CUDA graph; ``memory``
    what its Performer layers keep for backward.
    """

    name: str
    label: str
    source: str
    compiled: bool = False
    another: bool = False
    package: bool = False
    captured: bool = False
    memory: str = "fast"


PROVIDERS = (
    Provider("upstream", "upstream, eager", "upstream"),
    Provider("upstream-compiled", "upstream, torch.compile", "upstream", compiled=True),
    Provider("upstream-graph", "upstream, CUDA graph", "upstream", captured=True),
    Provider("aten", "t2t_fast aten, eager", "aten"),
    Provider("aten-compiled", "t2t_fast aten, torch.compile", "aten", compiled=True),
    Provider("native", "t2t_fast native, eager", "native"),
    Provider("triton", "t2t_fast triton, eager", "triton"),
    Provider("t2t_fast", "t2t_fast, eager", "t2t_fast"),
    Provider("t2t_fast-compiled", "t2t_fast, torch.compile", "t2t_fast", compiled=True),
    Provider("t2t_fast-low", "t2t_fast, low memory", "t2t_fast", memory="low"),
    Provider("t2t_fast-graph", "t2t_fast, CUDA graph", "t2t_fast", captured=True),
    Provider("unfold", "F.unfold alone, tokens not contiguous", "unfold"),
    Provider("convolution", "convolution of the same shape, no LayerNorm", "convolution", another=True),
    Provider("two-sdpa", "log-space form by two scaled_dot_product_attention", "two-sdpa"),
    Provider(
        "performer-pytorch",
        "performer-pytorch, same features, no eps",
        "performer-pytorch",
        another=True,
        package=True,
    ),
    Provider(
        "flash-linear-attention",
        "flash-linear-attention, same features, causal, no eps",
        "flash-linear-attention",
        another=True,
        package=True,
    ),
    Provider("sdpa", "scaled_dot_product_attention (softmax)", "sdpa", another=True),
    *(Provider(name, model.label, name, another=True, package=True) for name, model in context.MODELS.items()),
)
"""In the order of every table; the first is what the others are compared with."""

BASELINE = PROVIDERS[0].name
OURS = "t2t_fast"
BY_NAME = {provider.name: provider for provider in PROVIDERS}
BACKENDS = ("aten", "native", "triton")
"""Sources that are the package with a backend of one's own choice."""


def backends(device, dtype):
    """The backend that each operator resolves to by itself."""
    explanation = t2t_fast.explain(device=device, dtype=DTYPES[dtype])
    return {op: explanation.chosen(op) for op in dict.fromkeys(op for op, _, _ in explanation.rows)}


def _able(device, dtype):
    """Operator -> the backends that could run it here, without those that ``auto`` passes over as slower."""
    found = {}
    for op, backend, verdict in t2t_fast.explain(device=device, dtype=DTYPES[dtype]).rows:
        found.setdefault(op, set()).update([backend] if verdict in ("chosen", "available") else [])
    return found


def _sources(group, device):
    chosen, able = backends(device, group.dtype), _able(device, group.dtype)
    sources = ("upstream", OURS)
    if group.level == "op":
        op = group.subject.partition("-")[0]
        chosen, able, sources = {op: chosen[op]}, {op: able[op]}, operators.SOURCES[op]
    if group.suite in ("memory", "processes"):
        return sources  # no other backend is what one would train with
    if group.level == "model":
        sources = (*sources, *context.beside(group.subject))
    # "t2t_fast" is what the package chooses by itself; another backend is a row where it could do the same work
    others = [
        backend
        for backend in BACKENDS
        if all(backend in names for names in able.values()) and any(name != backend for name in chosen.values())
    ]
    return (*sources, *others)


def providers(group, device):
    """The providers of a group, in the table's order."""
    sources = _sources(group, device)
    graphs = device == "cuda" and group.suite == "latency"
    # on a CPU the native layers keep little by themselves
    performer = group.level != "op" and group.subject != "transformer" and "_t_" not in group.subject
    keeping = device == "cuda" and performer and group.mode == "training" and group.suite in ("module", "memory")
    return [
        provider
        for provider in PROVIDERS
        if provider.source in sources
        and (group.compiled or not provider.compiled)
        and (graphs or not provider.captured)
        and (keeping or provider.memory == "fast")
    ]


def compiled(function, device):
    """``function`` under ``torch.compile`` as every compiled provider runs it."""
    return torch.compile(function, mode=COMPILE_MODES[device], dynamic=False)

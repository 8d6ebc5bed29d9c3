"""The one table of providers: what competes, under which name, compiled or not."""

from typing import NamedTuple

import torch

import t2t_fast
from t2t_fast.testing import DTYPES

from . import operators

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
    Provider("aten", "t2t_fast aten, eager", "aten"),
    Provider("aten-compiled", "t2t_fast aten, torch.compile", "aten", compiled=True),
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
)
"""In the order of every table; the first is what the others are compared with."""

BASELINE = PROVIDERS[0].name
BY_NAME = {provider.name: provider for provider in PROVIDERS}


def backends(device, dtype):
    """The backend that each operator resolves to by itself."""
    explanation = t2t_fast.explain(device=device, dtype=DTYPES[dtype])
    return {op: explanation.chosen(op) for op in dict.fromkeys(op for op, _, _ in explanation.rows)}


def _sources(group, device):
    chosen = backends(device, group.dtype)
    sources = ("upstream", "t2t_fast")
    if group.level == "op":
        op = group.subject.partition("-")[0]
        chosen, sources = {op: chosen[op]}, operators.SOURCES[op]
    # "t2t_fast" is what the package chooses by itself; the aten form is a row of its own only where that differs
    if any(name != "aten" for name in chosen.values()):
        sources = (*sources, "aten")
    return sources


def providers(group, device):
    """The providers of a group, in the table's order."""
    sources = _sources(group, device)
    latency = device == "cuda" and group.level != "op" and group.batch == 1 and group.mode == "inference"
    # on a CPU the native layers keep little by themselves
    keeping = device == "cuda" and (group.level, group.subject, group.mode) == ("module", "performer", "training")
    return [
        provider
        for provider in PROVIDERS
        if provider.source in sources
        and (group.compiled or not provider.compiled)
        and (latency or not provider.captured)
        and (keeping or provider.memory == "fast")
    ]


def compiled(function, device):
    """``function`` under ``torch.compile`` as every compiled provider runs it."""
    return torch.compile(function, mode=COMPILE_MODES[device], dynamic=False)

"""Records that describe modules to ``swap``, and families of models to ``swap`` and ``load_checkpoint``.

A swap rule is one record. The rules of upstream's modules are in ``interop/swap/rules.py``; a package of
:mod:`t2t_fast.models` declares its rules in a :class:`Family`, which ``models.FAMILIES`` lists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isqrt, prod
from operator import attrgetter
from typing import Any

from torch import nn

from ..functional import window as make_window
from ..modules import TokenTransformer
from ..modules.block import Fused
from ..modules.t2t_module import window_of

SOFT_SPLITS = ("soft_split0", "soft_split1", "soft_split2")


@dataclass(frozen=True)
class Form:
    """A fast class, and everything that a module may have to become one of that class.

    Attributes:
        kind: the fast class.
        children, parameters: names of the module's own children, and of its own parameters and buffers. A module with
            any other is refused.
        attributes: names of other attributes that the module's ``forward`` may read.
        label: the name in reports, by default that of the class.
    """

    kind: type[nn.Module]
    children: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    label: str = ""

    @property
    def name(self) -> str:
        """The name in reports."""
        return self.label or self.kind.__name__


@dataclass(frozen=True)
class Rule:
    """What ``swap`` looks for, by structure and never by class, and the class that a match gets.

    Attributes:
        name: the class that the rule is about, for messages.
        structure: what a match has, for messages.
        form: the fast class that a match gets.
        matches: module -> whether it has the structure.
        refusal: matching module -> the reason why it cannot be swapped, or ``None``.
        probes: matching module -> input shapes for the proof; the first on which the original runs is used.
        arguments: matching module -> the further arguments of ``forward`` in the proof.
        inner: child -> the fast class that it gets along with the module.
        containers: path of a child whose parts the module's fast class reads -> what it may have, with its own class.
        operator: the operator whose backend reports show; empty if PyTorch's own functions do the work.
        soft_splits: ``nn.Unfold`` or ``nn.Fold`` that the fast form does not call -> layer that computes it too, empty
            for the module itself; reported as "(fused)". If the module cannot be swapped, these children are, if the
            proof allows it.
        caution: why a match is swapped only if a pattern of ``include`` matches its own path; empty if always.
    """

    name: str
    structure: str
    form: Form
    matches: Callable[[Any], bool]
    probes: Callable[[Any], list[tuple[int, ...]]]
    operator: str
    refusal: Callable[[Any], str | None] = lambda module: None
    arguments: Callable[[Any], tuple[Any, ...]] = lambda module: ()
    inner: Mapping[str, Form] = field(default_factory=dict)
    containers: Mapping[str, Form] = field(default_factory=dict)
    soft_splits: Mapping[str, str] = field(default_factory=dict)
    caution: str = ""


@dataclass(frozen=True)
class Family:
    """A family of models with parameter names of its own.

    Attributes:
        name: the name in reports.
        swap_rules: rules for its modules.
        checkpoint_names: regular expression that is found in names of its state dicts, and in no other project's.
        model: the class here that its weights fit, for messages.
    """

    name: str
    swap_rules: tuple[Rule, ...]
    checkpoint_names: str
    model: str


def has(module: Any, **kinds: type) -> bool:
    """Whether ``module`` has the named attributes, each of its class."""
    return all(isinstance(getattr(module, name, None), kind) for name, kind in kinds.items())


def has_token_layer(module: Any, mlp: str) -> bool:
    """Whether a module has norm1, attn (qkv, proj, scale, num_heads), norm2 and, named ``mlp``, fc1, act and fc2."""
    return (
        has(module, norm1=nn.Module, norm2=nn.Module, attn=nn.Module, **{mlp: nn.Module})
        and has(getattr(module, mlp), fc1=nn.Linear, fc2=nn.Linear, act=nn.Module)
        and has(module.attn, qkv=nn.Linear, proj=nn.Linear)
        and hasattr(module.attn, "scale")
        and hasattr(module.attn, "num_heads")
    )


def window_refusal(split: Any) -> str | None:
    """Why an ``nn.Unfold`` or ``nn.Fold`` has no fast form: its dilation, or a window with impossible numbers."""
    if split.dilation not in (1, (1, 1), [1, 1]):
        return f"dilation {split.dilation}: a soft split has dilation 1"
    try:
        make_window(split.kernel_size, split.stride, split.padding, function="swap")
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def token_probes(module: Any) -> list[tuple[int, ...]]:
    """A probe of tokens for a layer with ``attn.qkv``: (2, 7, width)."""
    return [(2, 7, module.attn.qkv.in_features)]


def tokeniser_rule(name: str, form: Form, layers: tuple[str, str], first_linear: tuple[str, ...]) -> Rule:
    """The rule of a whole tokens-to-token module: three unfolds ``soft_split0..2``, two layers, a Linear ``project``.

    Args:
        name: as :class:`Rule`.
        form: without its children, which follow from ``layers``.
        layers: names of the two layers.
        first_linear: paths in the first layer where its first Linear may be; the image's channels follow from it.
    """

    def matches(module: Any) -> bool:
        splits, blocks = dict.fromkeys(SOFT_SPLITS, nn.Unfold), dict.fromkeys(layers, nn.Module)
        return has(module, **splits, project=nn.Linear, **blocks)

    def width(module: Any) -> int | None:
        """Input width of the first layer's first Linear, or ``None``."""
        for path in first_linear:
            try:
                return module.get_submodule(f"{layers[0]}.{path}").in_features
            except AttributeError:
                continue
        return None

    def refusal(module: Any) -> str | None:
        for split in SOFT_SPLITS:
            reason = window_refusal(getattr(module, split))
            if reason is not None:
                return reason
        first: Any = window_of(module.soft_split0)
        inputs, taps = width(module), first.taps
        if inputs is None:
            return f"{layers[0]} is {type(getattr(module, layers[0])).__name__}, whose input width is unknown"
        if inputs % taps:
            return f"the first layer's width {inputs} is not a multiple of its window's {taps} pixels"
        return None

    def probes(module: Any) -> list[tuple[int, ...]]:
        """Images of two sizes, and of the size that ``num_patches`` stands for."""
        windows: list[Any] = [window_of(getattr(module, split)) for split in SOFT_SPLITS]
        inputs: Any = width(module)
        channels, stride = inputs // windows[0].taps, prod(window.stride[0] for window in windows)
        patches = getattr(module, "num_patches", None)
        steps = [2, 3, isqrt(patches) if isinstance(patches, int) and patches > 0 else 2]
        return [(2, channels, step * stride, step * stride) for step in dict.fromkeys(steps)]

    children = (*SOFT_SPLITS, *layers, "project")
    return Rule(
        name=name,
        structure=f"soft_split0..2 (nn.Unfold), {', '.join(layers)}, project (nn.Linear)",
        form=Form(form.kind, children, attributes=form.attributes, label=form.label),
        matches=matches,
        refusal=refusal,
        probes=probes,
        operator="soft_split_linear",
        soft_splits=dict(zip(SOFT_SPLITS, (*layers, "project"), strict=True)),
    )


_LINEAR = ("qkv", "proj", "fc1", "fc2")


def _at(module: Any, path: str) -> Any:
    """The attribute at a dotted path, ``None`` where there is none."""
    try:
        return attrgetter(path)(module)
    except AttributeError:
        return None


def fused_rule(
    name: str,
    kind: type[Fused] | type[TokenTransformer],
    operator: str = "layer_norm_mlp",
    *,
    attributes: Mapping[str, tuple[str, ...]] | None = None,
    only: Callable[[Any], bool] = lambda module: True,
    refusal: Callable[[Any], str | None] = lambda module: None,
    parameters: tuple[str, ...] = (),
    probe: tuple[int, ...] = (2, 7),
) -> Rule:
    """The rule of a fused class, which follows from its parts.

    Args:
        name: as :class:`Rule`; kind: the fused class, with ``parts``.
        attributes: container, or "" for the module itself -> other attributes that its ``forward`` may read.
        only: a further condition of a match.
        refusal: as :class:`Rule`; parameters: of the module itself, as :class:`Form`.
        probe: the sizes of a probe before its width.
    """
    parts, given = kind.parts, attributes or {}
    linears = [getattr(parts, role) for role in _LINEAR if getattr(parts, role)] + list(parts.linears)
    needed: dict[str, type] = dict.fromkeys(linears, nn.Linear) | dict.fromkeys(parts.cheap, nn.Conv1d)
    needed |= dict.fromkeys(parts.paths().difference(needed, parts.idle), nn.Module)
    numbers = tuple(path for path in (parts.num_heads, parts.scale) if path)
    paths = (*parts.paths(), *numbers)

    def names(container: str) -> set[str]:
        """The parts' names inside a container, ``""`` for the module itself."""
        start = f"{container}." if container else ""
        return {path.removeprefix(start).partition(".")[0] for path in paths if path.startswith(start)}

    def form(container: str, kind: type[nn.Module]) -> Form:
        found = tuple(sorted(names(container)))
        own = () if container else parameters
        return Form(kind, found, own, attributes=(*found, *given.get(container, ())))

    def matches(module: Any) -> bool:
        if not all(isinstance(_at(module, path), cls) for path, cls in needed.items()):
            return False
        if any(_at(module, path) is None for path in (*numbers, *parameters)) or not only(module):
            return False
        if not parts.qkv:
            return True
        qkv, proj = _at(module, parts.qkv), _at(module, parts.proj) if parts.proj else None
        width = qkv.out_features // 3 if proj is None else proj.in_features
        if qkv.out_features != 3 * width:
            return False
        # a token layer may change the width
        return proj is None or issubclass(kind, TokenTransformer) or proj.out_features == qkv.in_features

    def width(module: Any) -> int:
        first = _at(module, next(iter(linears), parts.norm2))
        return first.in_features if isinstance(first, nn.Linear) else first.normalized_shape[-1]

    return Rule(
        name=name,
        structure=", ".join((*sorted(needed), *numbers)),
        form=form("", kind),
        matches=matches,
        refusal=refusal,
        probes=lambda module: [(*probe, width(module))],
        operator=operator,
        containers={path: form(path, nn.Module) for path in parts.containers()},
    )

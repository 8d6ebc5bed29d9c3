"""Fused attention, MLP and transformer block, for any names of their children.

A class says where its parts are (:class:`Parts`), and the fused ``forward`` reads them there. If a part is hooked,
replaced or wrapped, the module runs unfused: a swapped module by its original ``forward``, a module of
:mod:`t2t_fast.models` child by child.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..functional import add_layer_norm, layer_norm_linear, layer_norm_mlp, transformer_block
from ..functional.transformer_block import native as native_block
from ..ops._common.guards import PLAIN
from . import fusion, remembered
from .attention import attend, heads, merged


class Parts(NamedTuple):
    """Dotted paths of a module's parts; empty for a part that is absent.

    Attributes:
        norm1, norm2: LayerNorm before the attention and before the MLP.
        qkv, proj: Linear; qkv packs q, k and v in that order, each with its heads one after the other.
        num_heads, scale: attributes; the scale of q k^T.
        softmax, attn_drop: of the weights; proj_drop: dropout behind proj.
        gate: a module that is called on proj's result, one of ``called``.
        skip: whether v is added to proj's result.
        fc1, act, fc2: Linear, GELU, Linear; hidden_drop, drop: dropout behind GELU and behind fc2.
        drop_path1, drop_path2: stochastic depth of attention and MLP.
        linears, cheap: further Linears, and factors of each channel stored as depthwise convolutions (T2T_ViT_Ghost).
        idle: children that must have no effect: absent, ``None`` or ``nn.Identity``.
        called: children that the fused form calls.
    """

    norm1: str = ""
    qkv: str = ""
    num_heads: str = ""
    scale: str = ""
    softmax: str = ""
    attn_drop: str = ""
    proj: str = ""
    gate: str = ""
    proj_drop: str = ""
    skip: bool = False
    drop_path1: str = ""
    norm2: str = ""
    fc1: str = ""
    act: str = ""
    hidden_drop: str = ""
    fc2: str = ""
    drop: str = ""
    drop_path2: str = ""
    linears: tuple[str, ...] = ()
    cheap: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    called: tuple[str, ...] = ()

    def checks(self) -> dict[str, fusion.Check]:
        """Path -> what :func:`fusion.obstacle` checks there."""
        found = {getattr(self, role): check for role, check in _CHECKS.items() if getattr(self, role)}
        more = (self.linears, fusion.linear), (self.cheap, fusion.channel_factors), (self.idle, fusion.idle)
        return found | {path: check for paths, check in more for path in paths}

    def named(self, roles: Sequence[str]) -> tuple[str, ...]:
        """The paths of the parts with these roles that are present."""
        return tuple(getattr(self, role) for role in roles if getattr(self, role))

    def paths(self) -> set[str]:
        """The paths of all children."""
        return {*self.checks(), *self.called}

    def containers(self) -> list[str]:
        """The paths of the children that hold parts, outer ones first."""
        return sorted({parent for path in self.paths() for parent in _parents(path)})


_CHECKS: dict[str, fusion.Check] = {
    "norm1": fusion.layer_norm,
    "qkv": fusion.linear,
    "softmax": fusion.softmax,
    "attn_drop": fusion.dropout,
    "proj": fusion.linear,
    "proj_drop": fusion.dropout,
    "drop_path1": fusion.drop_path,
    "norm2": fusion.layer_norm,
    "fc1": fusion.linear,
    "act": fusion.gelu,
    "hidden_drop": fusion.dropout,
    "fc2": fusion.linear,
    "drop": fusion.dropout,
    "drop_path2": fusion.drop_path,
}


def _parents(path: str) -> list[str]:
    """The paths of the modules around a path, outer ones first."""
    names = path.split(".")
    return [".".join(names[:length]) for length in range(1, len(names))]


ATTENTION = Parts(
    qkv="qkv", num_heads="num_heads", scale="scale", attn_drop="attn_drop", proj="proj", proj_drop="proj_drop"
)
MLP = Parts(fc1="fc1", act="act", hidden_drop="drop", fc2="fc2", drop="drop")
"""Upstream's ``Attention`` and ``Mlp``."""


def block_parts(attention: Parts, attn: str, mlp: Parts, mlp_name: str, **own: Any) -> Parts:
    """The parts of a block with an attention and an MLP as its children ``attn`` and ``mlp_name``; own: its own."""
    found = Parts(**own)
    for parts, prefix in ((attention, attn), (mlp, mlp_name)):
        for role, path in parts._asdict().items():
            if isinstance(path, tuple):
                path = (*getattr(found, role), *(f"{prefix}.{each}" for each in path))
            elif isinstance(path, str) and path:
                path = f"{prefix}.{path}"
            if path:
                found = found._replace(**{role: path})
    return found


class Fused(nn.Module):
    """A module whose ``forward`` calls operators on its children's parameters, unless there is an obstacle.

    Attributes:
        parts: where the parts are.
        containers: path and class of each child that holds parts, whose ``forward`` is skipped as well.
        recompute: whether backward computes the MLP's first product again (:func:`layer_norm_mlp`).
    """

    parts: ClassVar[Parts]
    containers: ClassVar[tuple[tuple[str, type[nn.Module]], ...]] = ()
    recompute = False

    _part_checks: ClassVar[fusion.Checks]
    # the paths of the parts that have a weight, an eps, and a probability
    _weighted: ClassVar[tuple[str, ...]]
    _normed: ClassVar[tuple[str, ...]]
    _dropped: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        parts = getattr(cls, "parts", None)
        if parts is not None:
            cls._part_checks = part_checks(cls)
            cls._normed, cls._dropped = parts.named(_NORMS), parts.named(_DROPS)
            cls._weighted = (*parts.named((*_NORMS, *_LINEARS)), *parts.linears, *parts.cheap)

    def obstacle(self) -> str | None:
        """Why this module runs unfused, or ``None``."""
        return fusion.obstacle(self, self._part_checks)

    def forward(self, x: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        """(B, N, dim) -> (B, N, dim); with other arguments, which only a swapped module takes, unfused."""
        if others or named or x.ndim != 3:
            return self._unfused(x, *others, **named)
        if torch.compiler.is_compiling():
            if self.obstacle() is not None:
                return self._unfused(x)
            paths = (path for path in self.parts.checks() if path not in self.parts.idle)
            return self._fused(x, Children({path: attrgetter(path)(self) for path in paths}, None))
        call = self.dependencies(x)
        if call is None:
            return self._unfused(x)
        arguments, children = call
        found = remembered.entry(self, *arguments)
        if not remembered.passes(found, self.obstacle):
            return self._unfused(x)
        fused = partial(self._fused, x, Children(children, found))
        out: torch.Tensor = fused() if self.parts.called else remembered.forward(found, fused, arguments[0])
        return out

    def dependencies(self, x: torch.Tensor) -> tuple[remembered.Dependencies, Mapping[str, Any]] | None:
        """What a fused call depends on, for :func:`remembered.entry`, and its children; ``None``: it is not fused."""
        children = fusion.children(self, self._part_checks)
        if children is None:
            return None
        tensors: list[torch.Tensor | None] = [x]
        for path in self._weighted:
            tensors += fusion.weights(children[path])
        options: list[Any] = [self.recompute]
        options += [fusion.rate(children[path]) for path in self._dropped]
        options += [children[path].eps for path in self._normed]
        if self.parts.num_heads:
            options += (self._scale(), attrgetter(self.parts.num_heads)(self))
        return (tensors, tuple(options)), children

    def _scale(self) -> float:
        """The factor of q k^T."""
        scale: float = attrgetter(self.parts.scale)(self)
        return scale

    def _fused(self, x: torch.Tensor, children: Children) -> torch.Tensor:
        raise NotImplementedError

    def _unfused(self, x: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        raise NotImplementedError


_NORMS = ("norm1", "norm2")
_LINEARS = ("qkv", "proj", "fc1", "fc2")
_DROPS = ("attn_drop", "proj_drop", "drop_path1", "hidden_drop", "drop", "drop_path2")


def part_checks(cls: Any) -> fusion.Checks:
    """The table of :func:`fusion.obstacle` for a class: its containers first, then its parts."""
    paths, checks = cls.parts.paths(), dict[str, fusion.Check]()
    for path, kind in cls.containers:
        inside = {each.removeprefix(f"{path}.").partition(".")[0] for each in paths if each.startswith(f"{path}.")}
        checks[path] = fusion.holder(kind, inside)
    return fusion.Checks({**checks, **cls.parts.checks()})


class Children(NamedTuple):
    """The children of a fused module in one call, and what the module remembers of such calls."""

    found: Mapping[str, Any]
    entry: remembered.Entry | None

    def weights(self, *paths: str) -> list[Any]:
        """Weight and bias of each child, ``None`` where the path is empty."""
        return [each for path in paths for each in (fusion.weights(self.found[path]) if path else (None, None))]

    def rate(self, path: str) -> float:
        """The current probability of a dropout or stochastic depth, 0 where the path is empty."""
        return fusion.rate(self.found[path]) if path else 0.0

    def eps(self, path: str) -> Any:
        """LayerNorm's eps, ``None`` where the path is empty."""
        return self.found[path].eps if path else None


def attention(module: Fused, x: torch.Tensor, children: Children) -> tuple[torch.Tensor, torch.Tensor]:
    """Self-attention up to ``gate``, (B, N, dim), and x for the residual connection around it."""
    parts = module.parts
    if parts.norm1:
        tensors = (x, *children.weights(parts.norm1, parts.qkv))
        eps = children.eps(parts.norm1)
        packed, x = remembered.run(children.entry, layer_norm_linear, tensors, norm_eps=eps)
    else:
        packed = F.linear(x, *children.weights(parts.qkv))
    y, v = attended(module, packed, children)
    if parts.proj:
        y = F.linear(y, *children.weights(parts.proj))
    if parts.skip:
        y = merged(v) + y
    return attrgetter(parts.gate)(module)(y) if parts.gate else y, x


def attended(module: Fused, packed: torch.Tensor, children: Children) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of packed q, k and v: its result (B, N, dim), and v (B, heads, N, head width)."""
    parts = module.parts
    q, k, v = heads(packed, attrgetter(parts.num_heads)(module))
    rate = children.rate(parts.attn_drop)
    return merged(attend(q, k, v, module._scale(), rate)), v


def mlp(
    module: Fused, x: torch.Tensor, children: Children, branch: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    """The MLP from ``norm2`` on; branch and options: of :func:`layer_norm_mlp`."""
    parts = module.parts
    options |= {"norm_eps": children.eps(parts.norm2), "recompute": module.recompute}
    options |= {"hidden_drop": children.rate(parts.hidden_drop), "drop": children.rate(parts.drop)}
    tensors = (x, branch, *children.weights(parts.norm2, parts.fc1, parts.fc2))
    out: torch.Tensor = remembered.run(children.entry, layer_norm_mlp, tensors, **options)
    return out


def block(module: Fused, x: torch.Tensor, children: Children) -> torch.Tensor:
    """A whole block by :func:`functional.transformer_block`."""
    parts = module.parts
    options = {
        "heads": attrgetter(parts.num_heads)(module),
        "scale": module._scale(),
        "norm1_eps": children.eps(parts.norm1),
        "norm2_eps": children.eps(parts.norm2),
        "drop_path1": children.rate(parts.drop_path1),
        "drop_path2": children.rate(parts.drop_path2),
    }
    tensors = (x, *children.weights(*_block_paths(parts)))
    out: torch.Tensor = remembered.run(children.entry, transformer_block, tensors, **options)
    return out


def _block_paths(parts: Parts) -> tuple[str, ...]:
    """The paths of the children with weights, in the order of :func:`functional.transformer_block`."""
    return parts.norm1, parts.qkv, parts.proj, parts.norm2, parts.fc1, parts.fc2


def _is_square(x: torch.Tensor, qkv_weight: torch.Tensor, proj_weight: torch.Tensor) -> bool:
    """Whether q, k and v are as wide as x; pruned heads make them narrower."""
    width = x.shape[2]
    return qkv_weight.shape[0] == 3 * width and proj_weight.shape[1] == width


class FusedAttention(Fused):
    """Self-attention that forms no N x N tensor."""

    parts = ATTENTION

    def _fused(self, x: torch.Tensor, children: Children) -> torch.Tensor:
        y, _ = attention(self, x, children)
        return _dropped(y, children.rate(self.parts.proj_drop))


class FusedAttentionSE(FusedAttention):
    """Self-attention with squeeze-and-excitation behind the projection."""

    parts = ATTENTION._replace(gate="se_layer", called=("se_layer",))


def _dropped(x: torch.Tensor, rate: float) -> torch.Tensor:
    return F.dropout(x, rate) if rate else x


def _scaled(x: torch.Tensor, convolution: nn.Conv1d) -> torch.Tensor:
    """(B, N, C) times a factor of each channel."""
    return x * convolution.weight.flatten().to(x.dtype)


class FusedAttentionGhost(FusedAttention):
    """Self-attention that computes q, k and v for half of the channels; the others are scaled copies of them."""

    parts = ATTENTION._replace(
        qkv="", linears=("q", "k", "v"), cheap=("cheap_operation_q", "cheap_operation_k", "cheap_operation_v")
    )

    def _fused(self, x: torch.Tensor, children: Children) -> torch.Tensor:
        packed = []
        for linear, cheap in zip(self.parts.linears, self.parts.cheap, strict=True):
            half = F.linear(x, *children.weights(linear))
            packed += [half, _scaled(half, children.found[cheap])]
        y, _ = attended(self, torch.cat(packed, dim=2), children)
        return _dropped(F.linear(y, *children.weights(self.parts.proj)), children.rate(self.parts.proj_drop))


class FusedMlp(Fused):
    """An MLP that saves its input and its first product, and nothing else of hidden width."""

    parts = MLP

    def _fused(self, x: torch.Tensor, children: Children) -> torch.Tensor:
        return mlp(self, x, children, residual=False)


class FusedMlpGhost(Fused):
    """MLP of three parts: one is computed, two are scaled copies of it, activated again."""

    parts = MLP._replace(cheap=("cheap_operation2", "cheap_operation3"))

    def _fused(self, x: torch.Tensor, children: Children) -> torch.Tensor:
        parts = self.parts
        a = F.gelu(F.linear(x, *children.weights(parts.fc1)))
        a = torch.cat([a, *(F.gelu(_scaled(a, children.found[cheap])) for cheap in parts.cheap)], dim=2)
        a = _dropped(a, children.rate(parts.hidden_drop))
        return _dropped(F.linear(a, *children.weights(parts.fc2)), children.rate(parts.drop))


class FusedResidual(Fused):
    """A pre-norm block with any attention and MLP, which are called: the first sum and ``norm2`` are fused."""

    parts = Parts(norm2="norm2", drop_path1="drop_path", drop_path2="drop_path", called=("norm1", "attn", "mlp"))

    def _fused(self, x: torch.Tensor, children: Children) -> torch.Tensor:
        inner: Any = self
        y = inner.attn(inner.norm1(x))
        options = {"norm_eps": children.eps(self.parts.norm2), "drop_path": children.rate(self.parts.drop_path1)}
        t, n = add_layer_norm(x, y, *children.weights(self.parts.norm2), **options)
        return t + inner.drop_path(inner.mlp(n))


class FusedBlock(Fused):
    """A pre-norm transformer block: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    parts = block_parts(
        ATTENTION, "attn", MLP, "mlp", norm1="norm1", norm2="norm2", drop_path1="drop_path", drop_path2="drop_path"
    )

    def _fused(self, x: torch.Tensor, children: Children) -> torch.Tensor:
        if self._whole(x, children):
            return block(self, x, children)
        branch, x = attention(self, x, children)
        rates = {
            name: children.rate(path)
            for name, path in (
                ("branch_drop", self.parts.proj_drop),
                ("branch_path", self.parts.drop_path1),
                ("drop_path", self.parts.drop_path2),
            )
        }
        return mlp(self, x, children, branch, **rates)

    def _whole(self, x: torch.Tensor, children: Children) -> bool:
        """Whether the block runs as one operator, which only the native backend gains from."""
        parts = self.parts
        if x.is_cuda or parts.skip or parts.called or self.recompute:
            return False
        if any(map(children.rate, (parts.attn_drop, parts.proj_drop, parts.hidden_drop, parts.drop))):
            return False
        tensors = x, *children.weights(*_block_paths(parts))
        plain = all(t is None or type(t) in PLAIN for t in tensors)
        return plain and native_block(x) and _is_square(x, *tensors[3:7:2])


class FusedBlockSE(FusedBlock):
    """A block with squeeze-and-excitation behind the attention's projection."""

    parts = FusedBlock.parts._replace(gate="attn.se_layer", called=("attn.se_layer",))


class FusedBlockDense(FusedBlock):
    """A block that appends new channels to its input: (B, N, dim) -> (B, N, dim + growth_rate)."""

    parts = FusedBlock.parts._replace(called=("dense_linear",))

    def _fused(self, x: torch.Tensor, children: Children) -> torch.Tensor:
        dense: Any = self.dense_linear
        return torch.cat([x, dense(super()._fused(x, children))], dim=2)

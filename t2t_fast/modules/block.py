"""Fused attention, MLP and transformer block, for any names of their children.

A class says where its parts are (:class:`Parts`), and the fused ``forward`` reads them there. If a part is hooked,
replaced or wrapped, the module runs unfused: a swapped module by its original ``forward``, a module of
:mod:`t2t_fast.models` child by child.
"""

from __future__ import annotations

from functools import cache
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..functional import add_layer_norm, layer_norm_linear, layer_norm_mlp
from . import fusion
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

    def obstacle(self) -> str | None:
        """Why this module runs unfused, or ``None``."""
        kind: Any = type(self)
        return fusion.obstacle(self, _checks(kind))

    def forward(self, x: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        """(B, N, dim) -> (B, N, dim); with other arguments, which only a swapped module takes, unfused."""
        if others or named or x.ndim != 3 or self.obstacle() is not None:
            return self._unfused(x, *others, **named)
        return self._fused(x)

    def _scale(self) -> float:
        """The factor of q k^T."""
        return _get(self, self.parts.scale)

    def _fused(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _unfused(self, x: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        raise NotImplementedError


@cache
def _checks(cls: Any) -> dict[str, fusion.Check]:
    """The table of :func:`fusion.obstacle` for a class: its containers first, then its parts."""
    paths, checks = cls.parts.paths(), {}
    for path, kind in cls.containers:
        inside = {each.removeprefix(f"{path}.").partition(".")[0] for each in paths if each.startswith(f"{path}.")}
        checks[path] = fusion.holder(kind, inside)
    return {**checks, **cls.parts.checks()}


def _get(module: nn.Module, path: str) -> Any:
    """The part at a path, ``None`` if it is absent."""
    return attrgetter(path)(module) if path else None


def _rate(module: nn.Module, path: str) -> float:
    """The current probability of the dropout or stochastic depth at a path."""
    return fusion.rate(_get(module, path)) if path else 0.0


def attention(module: Fused, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Self-attention up to ``gate``, (B, N, dim), and x for the residual connection around it."""
    parts = module.parts
    qkv, norm, proj = (_get(module, path) for path in (parts.qkv, parts.norm1, parts.proj))
    if norm is None:
        packed = F.linear(x, qkv.weight, qkv.bias)
    else:
        packed, x = layer_norm_linear(x, norm.weight, norm.bias, qkv.weight, qkv.bias, norm_eps=norm.eps)
    q, k, v = heads(packed, _get(module, parts.num_heads))
    y = merged(attend(q, k, v, module._scale(), _get(module, parts.attn_drop)))
    if proj is not None:
        y = F.linear(y, proj.weight, proj.bias)
    if parts.skip:
        y = merged(v) + y
    return _get(module, parts.gate)(y) if parts.gate else y, x


def mlp(module: Fused, x: torch.Tensor, branch: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    """The MLP from ``norm2`` on; branch and options: of :func:`layer_norm_mlp`."""
    parts = module.parts
    norm, fc1, fc2 = (_get(module, path) for path in (parts.norm2, parts.fc1, parts.fc2))
    weight, bias, eps = (None, None, None) if norm is None else (norm.weight, norm.bias, norm.eps)
    return layer_norm_mlp(
        x,
        weight,
        bias,
        fc1.weight,
        fc1.bias,
        fc2.weight,
        fc2.bias,
        branch,
        norm_eps=eps,
        hidden_drop=_rate(module, parts.hidden_drop),
        drop=_rate(module, parts.drop),
        **options,
    )


class FusedAttention(Fused):
    """Self-attention that forms no N x N tensor."""

    parts = ATTENTION

    def _fused(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = attention(self, x)
        return _dropped(y, _rate(self, self.parts.proj_drop))


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

    def _fused(self, x: torch.Tensor) -> torch.Tensor:
        packed = []
        for linear, cheap in zip(self.parts.linears, self.parts.cheap, strict=True):
            half = F.linear(x, _get(self, linear).weight, _get(self, linear).bias)
            packed += [half, _scaled(half, _get(self, cheap))]
        q, k, v = heads(torch.cat(packed, dim=2), _get(self, self.parts.num_heads))
        y = merged(attend(q, k, v, self._scale(), _get(self, self.parts.attn_drop)))
        proj = _get(self, self.parts.proj)
        return _dropped(F.linear(y, proj.weight, proj.bias), _rate(self, self.parts.proj_drop))


class FusedMlp(Fused):
    """An MLP that saves its input and its first product, and nothing else of hidden width."""

    parts = MLP

    def _fused(self, x: torch.Tensor) -> torch.Tensor:
        return mlp(self, x, residual=False, recompute=self.recompute)


class FusedMlpGhost(Fused):
    """MLP of three parts: one is computed, two are scaled copies of it, activated again."""

    parts = MLP._replace(cheap=("cheap_operation2", "cheap_operation3"))

    def _fused(self, x: torch.Tensor) -> torch.Tensor:
        fc1, fc2 = _get(self, self.parts.fc1), _get(self, self.parts.fc2)
        a = F.gelu(F.linear(x, fc1.weight, fc1.bias))
        a = torch.cat([a, *(F.gelu(_scaled(a, _get(self, cheap))) for cheap in self.parts.cheap)], dim=2)
        a = _dropped(a, _rate(self, self.parts.hidden_drop))
        return _dropped(F.linear(a, fc2.weight, fc2.bias), _rate(self, self.parts.drop))


class FusedResidual(Fused):
    """A pre-norm block with any attention and MLP, which are called: the first sum and ``norm2`` are fused."""

    parts = Parts(norm2="norm2", drop_path1="drop_path", drop_path2="drop_path", called=("norm1", "attn", "mlp"))

    def _fused(self, x: torch.Tensor) -> torch.Tensor:
        inner: Any = self
        norm, rate = _get(self, self.parts.norm2), _rate(self, self.parts.drop_path1)
        y = inner.attn(inner.norm1(x))
        t, n = add_layer_norm(x, y, norm.weight, norm.bias, norm_eps=norm.eps, drop_path=rate)
        return t + inner.drop_path(inner.mlp(n))


class FusedBlock(Fused):
    """A pre-norm transformer block: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    parts = block_parts(
        ATTENTION, "attn", MLP, "mlp", norm1="norm1", norm2="norm2", drop_path1="drop_path", drop_path2="drop_path"
    )

    def _fused(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.parts
        branch, x = attention(self, x)
        return mlp(
            self,
            x,
            branch,
            branch_drop=_rate(self, parts.proj_drop),
            branch_path=_rate(self, parts.drop_path1),
            drop_path=_rate(self, parts.drop_path2),
            recompute=self.recompute,
        )


class FusedBlockSE(FusedBlock):
    """A block with squeeze-and-excitation behind the attention's projection."""

    parts = FusedBlock.parts._replace(gate="attn.se_layer", called=("attn.se_layer",))


class FusedBlockDense(FusedBlock):
    """A block that appends new channels to its input: (B, N, dim) -> (B, N, dim + growth_rate)."""

    parts = FusedBlock.parts._replace(called=("dense_linear",))

    def _fused(self, x: torch.Tensor) -> torch.Tensor:
        dense: Any = self.dense_linear
        return torch.cat([x, dense(super()._fused(x))], dim=2)

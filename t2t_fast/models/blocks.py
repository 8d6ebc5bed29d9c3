"""Backbone blocks with upstream's parameter names: plain, squeeze-and-excitation, ghost, dense.

Sources in yitu-opensource/T2T-ViT: ``models/transformer_block.py``, ``t2t_vit_se.py``, ``t2t_vit_ghost.py``,
``t2t_vit_dense.py``. A class with "Plain" in its name calls its children one by one, as upstream; the others are fused
(``modules/block.py``) unless a child prevents it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..modules.attention import attend, heads, merged
from ..modules.block import (
    FusedAttention,
    FusedAttentionGhost,
    FusedAttentionSE,
    FusedBlock,
    FusedBlockDense,
    FusedBlockSE,
    FusedMlpGhost,
    FusedResidual,
)
from ..modules.drop_path import DropPath
from ..modules.options import check_options
from ..modules.token_transformer import Mlp


class PlainAttention(nn.Module):
    """Multi-head self-attention on (B, N, dim); ``qk_scale`` replaces ``head_dim ** -0.5``."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_options("Attention", locals())
        if dim % num_heads:
            raise ValueError(f"Attention: num_heads must divide dim, got dim={dim}, num_heads={num_heads}")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self._make_projections(dim, qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def _make_projections(self, dim: int, qkv_bias: bool) -> None:
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, k and v as (B, heads, N, head_dim)."""
        return heads(self.qkv(x), self.num_heads, self.qkv)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v, self.scale, self.attn_drop)

    def _gate(self, y: torch.Tensor) -> torch.Tensor:
        return y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, dim) -> (B, N, dim)."""
        y = merged(self._attend(*self._project(x)))
        return self.proj_drop(self._gate(self.proj(y)))


class SELayer(nn.Module):
    """Squeeze-and-excitation over tokens: channels of (B, N, C) scaled by a gate of their token mean."""

    def __init__(self, channel: int, reduction: int = 16) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channel // reduction, channel, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, channel) -> (B, N, channel)."""
        return x * self.fc(x.mean(dim=1)).unsqueeze(1)


class PlainAttentionSE(PlainAttention):
    """Self-attention whose projected output passes an :class:`SELayer`."""

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        self.se_layer = SELayer(dim)

    def _gate(self, y: torch.Tensor) -> torch.Tensor:
        return self.se_layer(y)


class Attention(FusedAttention, PlainAttention):
    """Multi-head self-attention, fused."""

    _unfused = PlainAttention.forward


class AttentionSE(FusedAttentionSE, PlainAttentionSE):
    """Self-attention with squeeze-and-excitation, fused."""

    _unfused = PlainAttentionSE.forward


def _cheap_operation(channels: int) -> nn.Conv1d:
    """A learned factor per channel, stored as upstream's depthwise 1x1 convolution."""
    return nn.Conv1d(channels, channels, kernel_size=1, groups=channels, bias=False)


def _convolved(convolution: nn.Conv1d, x: torch.Tensor) -> torch.Tensor:
    """A cheap operation on (B, N, C) as upstream computes it."""
    return convolution(x.transpose(1, 2)).transpose(1, 2)


class PlainAttentionGhost(PlainAttention):
    """Self-attention that computes q, k and v for half of the channels; the others are scaled copies of them."""

    def _make_projections(self, dim: int, qkv_bias: bool) -> None:
        half = dim // 2
        self.q = nn.Linear(dim, half, bias=qkv_bias)
        self.k = nn.Linear(dim, half, bias=qkv_bias)
        self.v = nn.Linear(dim, half, bias=qkv_bias)
        self.cheap_operation_q = _cheap_operation(half)
        self.cheap_operation_k = _cheap_operation(half)
        self.cheap_operation_v = _cheap_operation(half)

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        def ghost_heads(linear: nn.Linear, cheap: nn.Conv1d) -> torch.Tensor:
            half = linear(x)
            full = torch.cat([half, _convolved(cheap, half)], dim=2)
            return full.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)

        return (
            ghost_heads(self.q, self.cheap_operation_q),
            ghost_heads(self.k, self.cheap_operation_k),
            ghost_heads(self.v, self.cheap_operation_v),
        )


class AttentionGhost(FusedAttentionGhost, PlainAttentionGhost):
    """Self-attention with ghost features, fused."""

    _unfused = PlainAttentionGhost.forward


class PlainMlpGhost(nn.Module):
    """MLP of three parts: one is computed, two are scaled copies of it, activated again."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        if hidden_features != 3 * in_features:
            raise ValueError(
                f"MlpGhost: mlp_ratio must be 3 (three concatenated parts), got {hidden_features / in_features}"
            )
        self.fc1 = nn.Linear(in_features, in_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features)
        self.drop = nn.Dropout(drop)
        self.cheap_operation2 = _cheap_operation(in_features)
        self.cheap_operation3 = _cheap_operation(in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, in_features) -> (B, N, out_features)."""
        x = self.act(self.fc1(x))
        copies = (self.act(_convolved(cheap, x)) for cheap in (self.cheap_operation2, self.cheap_operation3))
        return self.drop(self.fc2(self.drop(torch.cat([x, *copies], dim=2))))


class MlpGhost(FusedMlpGhost, PlainMlpGhost):
    """MLP with ghost features, fused."""

    _unfused = PlainMlpGhost.forward


class PlainBlock(nn.Module):
    """Pre-norm transformer block: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    attention_layer: type[nn.Module] = PlainAttention
    mlp_layer: type[nn.Module] = Mlp

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        check_options(type(self).__name__, locals())
        self.norm1 = norm_layer(dim)
        self.attn = self.attention_layer(
            dim, num_heads=num_heads, qkv_bias=qkv_bias, qk_scale=qk_scale, attn_drop=attn_drop, proj_drop=drop
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = self.mlp_layer(dim, int(dim * mlp_ratio), dim, act_layer=act_layer, drop=drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, dim) -> (B, N, dim)."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PlainBlockDense(PlainBlock):
    """Block that appends ``growth_rate`` new channels to its input: (B, N, dim) -> (B, N, dim + growth_rate)."""

    def __init__(self, growth_rate: int, dim: int, num_heads: int, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.dense_linear = nn.Linear(dim, growth_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, dim) -> (B, N, dim + growth_rate)."""
        return torch.cat([x, self.dense_linear(super().forward(x))], dim=2)


class Block(FusedBlock, PlainBlock):
    """Transformer block, fused."""

    attention_layer = Attention
    containers = (("attn", Attention), ("mlp", Mlp))
    _unfused = PlainBlock.forward


class BlockSE(FusedBlockSE, PlainBlock):
    """Block with squeeze-and-excitation after the attention, fused."""

    attention_layer = AttentionSE
    containers = (("attn", AttentionSE), ("mlp", Mlp))
    _unfused = PlainBlock.forward


class BlockGhost(FusedResidual, PlainBlock):
    """Block with ghost features in attention and MLP; ``mlp_ratio`` must be 3."""

    attention_layer = AttentionGhost
    mlp_layer = MlpGhost
    _unfused = PlainBlock.forward


class BlockDense(FusedBlockDense, PlainBlockDense):
    """Block that appends new channels, fused."""

    attention_layer = Attention
    containers = (("attn", Attention), ("mlp", Mlp))
    _unfused = PlainBlockDense.forward


class Transition(nn.Module):
    """Narrowing layer between dense stages: Linear, then activation."""

    def __init__(self, in_features: int, out_features: int, act_layer: Callable[..., nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.act = act_layer()
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, in_features) -> (B, N, out_features)."""
        return self.act(self.linear(x))


BLOCKS = {"plain": Block, "se": BlockSE, "ghost": BlockGhost, "dense": BlockDense}
"""Block classes by name. "dense" blocks widen the tokens, the others keep the width."""


def block_stack(
    kind: str,
    embed_dim: int,
    depth: int,
    drop_path_rate: float,
    growth_rate: int,
    block_config: Sequence[int],
    options: Mapping[str, Any],
    classes: Mapping[str, type[nn.Module]] = BLOCKS,
) -> tuple[nn.ModuleList, list[int]]:
    """The backbone's blocks and the widths of their outputs.

    Args:
        kind: "plain", "se", "ghost" or "dense".
        embed_dim, depth: width and number of blocks ("dense" takes its depth from ``block_config``).
        drop_path_rate: stochastic depth of the last block (dense: of the last stage), growing linearly from 0.
        growth_rate, block_config: for "dense": channels a block adds, blocks per stage.
        options: arguments of every block.
        classes: {kind: class of the block}.
    """
    if kind == "dense":
        return _dense_blocks(classes["dense"], embed_dim, drop_path_rate, growth_rate, block_config, options)
    rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
    return nn.ModuleList(classes[kind](embed_dim, drop_path=rate, **options) for rate in rates), [embed_dim] * depth


def _dense_blocks(
    block: Callable[..., nn.Module],
    width: int,
    drop_path_rate: float,
    growth_rate: int,
    block_config: Sequence[int],
    options: Mapping[str, Any],
) -> tuple[nn.ModuleList, list[int]]:
    """Stages of :class:`BlockDense`, with a halving :class:`Transition` between stages, as one list."""
    blocks, widths = nn.ModuleList(), []
    rates = torch.linspace(0, drop_path_rate, len(block_config), device="cpu").tolist()
    for stage, (count, rate) in enumerate(zip(block_config, rates, strict=True)):
        if stage > 0:
            blocks.append(Transition(width, width // 2))
            width //= 2
            widths.append(width)
        for _ in range(count):
            blocks.append(block(growth_rate, width, drop_path=rate, **options))
            width += growth_rate
            widths.append(width)
    return blocks, widths

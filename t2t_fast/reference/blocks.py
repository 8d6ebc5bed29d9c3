"""Upstream-shaped eager backbone blocks: plain, squeeze-and-excitation, dense, ghost.

Sources in yitu-opensource/T2T-ViT: ``models/transformer_block.py``, ``t2t_vit_se.py``, ``t2t_vit_dense.py``,
``t2t_vit_ghost.py`` (section 3.2 and table 6 of the T2T-ViT paper).
"""

import torch
from torch import nn

from .layers import DropPath, Mlp


def _attend(q, k, v, scale, attn_drop):
    """Softmax attention on (B, heads, N, head_dim), merged back to (B, N, heads * head_dim)."""
    weights = attn_drop(((q @ k.transpose(-2, -1)) * scale).softmax(dim=-1))
    return (weights @ v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head self-attention on (B, N, dim); ``qk_scale`` replaces ``head_dim ** -0.5``."""

    def __init__(self, dim, num_heads=8, qkv_bias=False, qk_scale=None, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x):
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.proj_drop(self.proj(_attend(*qkv.unbind(0), self.scale, self.attn_drop)))


class SELayer(nn.Module):
    """Squeeze-and-excitation over tokens: (B, N, C) scaled per channel by a gate of the token mean."""

    def __init__(self, channel, reduction=16):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction, bias=False),
            nn.ReLU(),
            nn.Linear(channel // reduction, channel, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x):
        return x * self.fc(x.mean(dim=1)).unsqueeze(1)


class AttentionSE(Attention):
    """Self-attention whose projected output passes an :class:`SELayer`."""

    def __init__(self, dim, **options):
        super().__init__(dim, **options)
        self.se_layer = SELayer(dim)

    def forward(self, x):
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        y = self.proj(_attend(*qkv.unbind(0), self.scale, self.attn_drop))
        return self.proj_drop(self.se_layer(y))


def _per_channel(dim):
    """A learned factor per channel; upstream's "cheap operation"."""
    return nn.Conv1d(dim, dim, kernel_size=1, groups=dim, bias=False)


def _apply_per_channel(conv, x):
    return conv(x.transpose(1, 2)).transpose(1, 2)


class AttentionGhost(nn.Module):
    """Self-attention whose q, k and v are computed for half the channels and copied by per-channel factors."""

    def __init__(self, dim, num_heads=8, qkv_bias=False, qk_scale=None, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        half = dim // 2
        self.q = nn.Linear(dim, half, bias=qkv_bias)
        self.k = nn.Linear(dim, half, bias=qkv_bias)
        self.v = nn.Linear(dim, half, bias=qkv_bias)
        self.cheap_operation_q = _per_channel(half)
        self.cheap_operation_k = _per_channel(half)
        self.cheap_operation_v = _per_channel(half)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def _heads(self, x, linear, cheap):
        half = linear(x)
        full = torch.cat([half, _apply_per_channel(cheap, half)], dim=2)
        return full.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x):
        q = self._heads(x, self.q, self.cheap_operation_q)
        k = self._heads(x, self.k, self.cheap_operation_k)
        v = self._heads(x, self.v, self.cheap_operation_v)
        return self.proj_drop(self.proj(_attend(q, k, v, self.scale, self.attn_drop)))


class MlpGhost(nn.Module):
    """MLP of three parts, one computed and two copied by per-channel factors and activated again; hidden = 3 * in."""

    def __init__(self, in_features, hidden_features, out_features, act_layer=nn.GELU, drop=0.0):
        super().__init__()
        self.fc1 = nn.Linear(in_features, in_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features)
        self.drop = nn.Dropout(drop)
        self.cheap_operation2 = _per_channel(in_features)
        self.cheap_operation3 = _per_channel(in_features)

    def forward(self, x):
        x = self.act(self.fc1(x))
        copies = [self.act(_apply_per_channel(cheap, x)) for cheap in (self.cheap_operation2, self.cheap_operation3)]
        return self.drop(self.fc2(self.drop(torch.cat([x, *copies], dim=2))))


class Block(nn.Module):
    """Pre-norm transformer block: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    attention_layer = Attention
    mlp_layer = Mlp

    def __init__(
        self,
        dim,
        num_heads,
        mlp_ratio=4.0,
        qkv_bias=False,
        qk_scale=None,
        drop=0.0,
        attn_drop=0.0,
        drop_path=0.0,
        act_layer=nn.GELU,
        norm_layer=nn.LayerNorm,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = self.attention_layer(
            dim, num_heads=num_heads, qkv_bias=qkv_bias, qk_scale=qk_scale, attn_drop=attn_drop, proj_drop=drop
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = self.mlp_layer(dim, int(dim * mlp_ratio), dim, act_layer=act_layer, drop=drop)

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class BlockSE(Block):
    """Block with squeeze-and-excitation after the attention."""

    attention_layer = AttentionSE


class BlockGhost(Block):
    """Block with ghost features in attention and MLP."""

    attention_layer = AttentionGhost
    mlp_layer = MlpGhost


class BlockDense(Block):
    """Block that appends ``growth_rate`` new channels to its input: (B, N, dim) -> (B, N, dim + growth_rate)."""

    def __init__(self, growth_rate, dim, num_heads, **options):
        super().__init__(dim, num_heads, **options)
        self.dense_linear = nn.Linear(dim, growth_rate)

    def forward(self, x):
        y = super().forward(x)
        return torch.cat([x, self.dense_linear(y)], dim=2)


class Transition(nn.Module):
    """Narrowing layer between dense stages: activation, then Linear."""

    def __init__(self, in_features, out_features, act_layer=nn.GELU):
        super().__init__()
        self.act = act_layer()
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, x):
        return self.act(self.linear(x))

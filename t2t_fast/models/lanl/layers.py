"""Attention, MLP, token transformer and backbone block, with the articles' names of classes and parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ...modules.attention import attend, heads, merged
from ...modules.block import FusedBlock, Parts, block_parts
from ...modules.options import check_options
from ...modules.token_transformer import TokenTransformer as _TokenTransformer


class Attention(nn.Module):
    """Multi-head attention from width ``dim`` to width ``chan``, with a skip through ``v`` after the projection."""

    def __init__(
        self, dim: int, chan: int, num_heads: int = 1, qkv_bias: bool = False, qk_scale: float | None = None
    ) -> None:
        super().__init__()
        check_options("Attention", locals())
        if chan % num_heads:
            raise ValueError(f"Attention: num_heads must divide chan, got chan={chan}, num_heads={num_heads}")
        self.num_heads = num_heads
        self.chan = chan
        self.head_dim = chan // num_heads
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        self.qkv = nn.Linear(dim, chan * 3, bias=qkv_bias)
        self.proj = nn.Linear(chan, chan)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, dim) -> (B, T, chan)."""
        q, k, v = heads(self.qkv(x), self.num_heads, self.qkv)
        return merged(v) + self.proj(merged(attend(q, k, v, self.scale)))


class NeuralNet(nn.Module):
    """Linear, activation, Linear."""

    def __init__(
        self,
        in_chan: int,
        hidden_chan: int | None = None,
        out_chan: int | None = None,
        act_layer: Callable[..., nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        check_options("NeuralNet", locals())
        hidden_chan = in_chan if hidden_chan is None else hidden_chan
        self.fc1 = nn.Linear(in_chan, hidden_chan)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_chan, in_chan if out_chan is None else out_chan)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_chan) -> (..., out_chan)."""
        return self.fc2(self.act(self.fc1(x)))


_PARTS = block_parts(
    Parts(qkv="qkv", num_heads="num_heads", scale="scale", proj="proj", skip=True),
    "attn",
    Parts(fc1="fc1", act="act", fc2="fc2"),
    "neuralnet",
    norm1="norm1",
    norm2="norm2",
)
_CONTAINERS = (("attn", Attention), ("neuralnet", NeuralNet))


class TokenTransformer(_TokenTransformer):
    """LayerNorm and attention (the width changes), then LayerNorm and MLP with a skip: (B, T, dim) -> (B, T, chan)."""

    parts = _PARTS
    containers = _CONTAINERS

    def __init__(
        self,
        dim: int,
        chan: int,
        num_heads: int,
        hidden_chan_mul: float = 1.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
    ) -> None:
        nn.Module.__init__(self)
        check_options("TokenTransformer", locals())
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, chan, num_heads=num_heads, qkv_bias=qkv_bias, qk_scale=qk_scale)
        self.norm2 = norm_layer(chan)
        self.neuralnet = NeuralNet(chan, int(chan * hidden_chan_mul), chan, act_layer)

    def _unfused(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attn(self.norm1(x))
        return x + self.neuralnet(self.norm2(x))


class PlainEncoding(nn.Module):
    """Backbone block: pre-norm attention and MLP, both with skips (and the skip through ``v`` inside)."""

    attention_layer: type[nn.Module] = Attention

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        hidden_chan_mul: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        check_options("Encoding", locals())
        self.norm1 = norm_layer(dim)
        self.attn = self.attention_layer(dim, dim, num_heads=num_heads, qkv_bias=qkv_bias, qk_scale=qk_scale)
        self.norm2 = norm_layer(dim)
        self.neuralnet = NeuralNet(dim, int(dim * hidden_chan_mul), dim, act_layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, dim) -> (B, T, dim)."""
        x = x + self.attn(self.norm1(x))
        return x + self.neuralnet(self.norm2(x))


class FusedEncoding(FusedBlock):
    """The fused form of a block with these names."""

    parts = _PARTS


class Encoding(FusedEncoding, PlainEncoding):
    """Backbone block, fused."""

    containers = _CONTAINERS
    _unfused = PlainEncoding.forward

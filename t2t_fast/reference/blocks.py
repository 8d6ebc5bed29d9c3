"""The backbone blocks of :mod:`t2t_fast.models`, computed as upstream does: softmax attention step by step.

Parameters, their order and their initialisation are those of the blocks in ``models/blocks.py``. Upstream's attention
forms the N x N weights, and its ghost blocks call a convolution. Both cost time and memory, so the "before" of every
comparison must do the same.
"""

from ..models import blocks
from ..models.blocks import Transition

__all__ = ["BLOCKS", "Attention", "Block", "BlockDense", "BlockGhost", "BlockSE", "Transition"]


class _Softmax:
    def _attend(self, q, k, v):
        weights = self.attn_drop(((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1))
        return weights @ v


def _convolved(convolution, x):
    """Upstream's "cheap operation": a depthwise 1x1 convolution of (B, N, C) along N."""
    return convolution(x.transpose(1, 2)).transpose(1, 2)


class Attention(_Softmax, blocks.Attention):
    """Multi-head self-attention on (B, N, dim)."""


class AttentionSE(_Softmax, blocks.AttentionSE):
    """Self-attention with squeeze-and-excitation of its output."""


class AttentionGhost(_Softmax, blocks.AttentionGhost):
    """Self-attention with ghost features."""

    scale_channels = staticmethod(_convolved)


class MlpGhost(blocks.MlpGhost):
    """MLP with ghost features."""

    scale_channels = staticmethod(_convolved)


class Block(blocks.Block):
    """Pre-norm transformer block."""

    attention_layer = Attention


class BlockSE(blocks.BlockSE):
    """Block with squeeze-and-excitation after the attention."""

    attention_layer = AttentionSE


class BlockGhost(blocks.BlockGhost):
    """Block with ghost features in attention and MLP."""

    attention_layer = AttentionGhost
    mlp_layer = MlpGhost


class BlockDense(blocks.BlockDense):
    """Block that appends ``growth_rate`` new channels to its input."""

    attention_layer = Attention


BLOCKS = {"plain": Block, "se": BlockSE, "ghost": BlockGhost, "dense": BlockDense}
"""By name, as in ``models/blocks.py``."""

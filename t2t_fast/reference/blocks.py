"""The backbone blocks of :mod:`t2t_fast.models`, computed as upstream does: softmax attention step by step.

Parameters, their order and their initialisation are those of the blocks in ``models/blocks.py``, whose plain forms are
the base. Upstream's attention forms the N x N weights, and its ghost blocks call a convolution. Both cost time and
memory, so the "before" of every comparison must do the same.
"""

from ..models import blocks
from ..models.blocks import Transition
from .layers import Mlp

__all__ = ["BLOCKS", "Attention", "Block", "BlockDense", "BlockGhost", "BlockSE", "Transition"]


class _Softmax:
    def _attend(self, q, k, v):
        weights = self.attn_drop(((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1))
        return weights @ v


class Attention(_Softmax, blocks.PlainAttention):
    """Multi-head self-attention on (B, N, dim)."""


class AttentionSE(_Softmax, blocks.PlainAttentionSE):
    """Self-attention with squeeze-and-excitation of its output."""


class AttentionGhost(_Softmax, blocks.PlainAttentionGhost):
    """Self-attention with ghost features."""


class Block(blocks.PlainBlock):
    """Pre-norm transformer block."""

    attention_layer = Attention
    mlp_layer = Mlp


class BlockSE(Block):
    """Block with squeeze-and-excitation after the attention."""

    attention_layer = AttentionSE


class BlockGhost(Block):
    """Block with ghost features in attention and MLP."""

    attention_layer = AttentionGhost
    mlp_layer = blocks.PlainMlpGhost


class BlockDense(blocks.PlainBlockDense):
    """Block that appends ``growth_rate`` new channels to its input."""

    attention_layer = Attention
    mlp_layer = Mlp


BLOCKS = {"plain": Block, "se": BlockSE, "ghost": BlockGhost, "dense": BlockDense}
"""By name, as in ``models/blocks.py``."""

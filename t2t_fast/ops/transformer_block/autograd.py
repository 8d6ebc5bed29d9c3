"""The arguments of transformer_block, and its forward composed of the implementations of its parts."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .._common.attention import heads, merged
from .._common.philox import Drops, branch_masks


class Parameters(NamedTuple):
    """The parameters; biases and those of the LayerNorms may be ``None``."""

    norm1_weight: torch.Tensor | None
    norm1_bias: torch.Tensor | None
    qkv_weight: torch.Tensor
    qkv_bias: torch.Tensor | None
    proj_weight: torch.Tensor
    proj_bias: torch.Tensor | None
    norm2_weight: torch.Tensor | None
    norm2_bias: torch.Tensor | None
    fc1_weight: torch.Tensor
    fc1_bias: torch.Tensor | None
    fc2_weight: torch.Tensor
    fc2_bias: torch.Tensor | None


class Options(NamedTuple):
    """The arguments that are not tensors.

    Attributes:
        norm1_eps, norm2_eps: of the LayerNorms.
        heads: number of the attention's heads; scale: the factor of q k^T.
        drop_path1, drop_path2: stochastic depth of the attention and of the MLP.
        dtype: of the matrix products.
    """

    norm1_eps: float
    norm2_eps: float
    heads: int
    scale: float
    drop_path1: float
    drop_path2: float
    dtype: torch.dtype

    def factors(self, shape: tuple[int, ...], seed: torch.Tensor | None) -> torch.Tensor | None:
        """What stochastic depth multiplies the two branches of every sample with, float32 (2, B); ``None`` for 1."""
        drops = Drops(0.0, self.drop_path1), Drops(0.0, self.drop_path2)
        masks = [branch_masks(seed, shape, *drops, index)[1] for index in range(2)]
        if masks == [None, None]:
            return None
        rows = [
            torch.ones(shape[0]) if mask is None else mask.flatten().to(torch.float32) / (1 - drop.path)
            for mask, drop in zip(masks, drops, strict=True)
        ]
        return torch.stack(rows)


def unpack(*arguments):
    """The operator's arguments after x, as :class:`Parameters`, :class:`Options` and the seed."""
    *tensors, heads, scale, drop_path1, drop_path2, dtype, seed = arguments
    norm1_eps, norm2_eps = tensors.pop(2), tensors.pop(8)
    return Parameters(*tensors), Options(norm1_eps, norm2_eps, heads, scale, drop_path1, drop_path2, dtype), seed


def composed(linear, attention, mlp):
    """The operator's forward.

    Args:
        linear, mlp: the forwards of ``layer_norm_linear`` and ``layer_norm_mlp``, which are differentiable.
        attention: (q, k, v, scale) -> softmax attention, (B, heads, N, D) each.
    """

    def forward(x, *arguments):
        """(B, N, D) -> (B, N, D) in x's dtype."""
        p, o, seed = unpack(*arguments)
        packed, x = linear(x, p.norm1_weight, p.norm1_bias, o.norm1_eps, p.qkv_weight, p.qkv_bias, o.dtype)
        y = merged(attention(*heads(packed, o.heads), o.scale))
        branch = F.linear(y, p.proj_weight.to(o.dtype), None if p.proj_bias is None else p.proj_bias.to(o.dtype))
        norm = p.norm2_weight, p.norm2_bias, o.norm2_eps
        drops = 0.0, o.drop_path1, 0.0, 0.0, o.drop_path2
        return mlp(
            x, branch, *norm, p.fc1_weight, p.fc1_bias, p.fc2_weight, p.fc2_bias, *drops, True, False, o.dtype, seed
        )

    return forward

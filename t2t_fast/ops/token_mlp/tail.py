"""The arguments of the tail of a token layer, as its operator and those that end with it take them (op.SIGNATURE)."""

from typing import NamedTuple

import torch


class Tail(NamedTuple):
    """The parameters of the tail; biases and LayerNorm's two may be ``None``."""

    proj_weight: torch.Tensor
    proj_bias: torch.Tensor | None
    norm_weight: torch.Tensor | None
    norm_bias: torch.Tensor | None
    fc1_weight: torch.Tensor
    fc1_bias: torch.Tensor | None
    fc2_weight: torch.Tensor
    fc2_bias: torch.Tensor | None


class Options(NamedTuple):
    """LayerNorm's eps and the two dropout probabilities."""

    norm_eps: float
    proj_drop: float
    mlp_drop: float


def unpack(
    proj_weight,
    proj_bias,
    norm_weight,
    norm_bias,
    norm_eps,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    proj_drop,
    mlp_drop,
    seed,
):
    """The operators' last arguments, in their order, as a :class:`Tail`, :class:`Options` and the seed."""
    tail = Tail(proj_weight, proj_bias, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return tail, Options(norm_eps, proj_drop, mlp_drop), seed

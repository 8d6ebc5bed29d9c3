"""Stochastic depth."""

import torch
from torch import nn

from .options import check_options


class DropPath(nn.Module):
    """In training, zero whole samples of a residual branch with probability ``drop_prob`` and rescale the others.

    Source: Huang et al., "Deep networks with stochastic depth"; timm's form, which upstream uses.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        check_options("DropPath", locals())
        self.drop_prob = drop_prob

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop_prob
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        return x * x.new_empty(shape).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"

"""Small layers that several upstream-shaped models share: stochastic depth, MLP, position table, initialisation."""

import numpy as np
import torch
from torch import nn


class DropPath(nn.Module):
    """Stochastic depth: in training, zero whole samples with probability ``drop_prob`` and rescale the rest."""

    def __init__(self, drop_prob=0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * (mask / keep)


class Mlp(nn.Module):
    """Linear, activation, dropout, Linear, dropout: (..., in_features) -> (..., out_features)."""

    def __init__(self, in_features, hidden_features, out_features, act_layer=nn.GELU, drop=0.0):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


def get_sinusoid_encoding(n_position, d_hid):
    """Sinusoidal position table (1, n_position, d_hid), computed in float64, returned in float32.

    Source: "Attention is all you need", section 3.5; upstream ``models/transformer_block.py``.
    """
    frequency = 1.0 / np.power(10000.0, 2 * (np.arange(d_hid) // 2) / d_hid)
    table = np.arange(n_position)[:, None] * frequency[None, :]
    table[:, 0::2] = np.sin(table[:, 0::2])
    table[:, 1::2] = np.cos(table[:, 1::2])
    return torch.from_numpy(table).float().unsqueeze(0)


def init_weights(module):
    """Upstream's initialisation: Linear weights truncated normal (std 0.02), biases 0, LayerNorm identity."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)

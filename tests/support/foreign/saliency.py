"""Saliency models: a T2T module that returns its stages, and decoders that upsample tokens by ``nn.Fold``."""

import torch
from torch import nn

from t2t_fast import reference


class Stages(reference.T2T_module):
    """The tokens of 1/16, 1/8 and 1/4."""

    def forward(self, x):
        quarter = self.attention1(self.soft_split0(x).transpose(1, 2))
        eighth = self.attention2(self.soft_split1(self.restructurize(quarter)).transpose(1, 2))
        return self.project(self.soft_split2(self.restructurize(eighth)).transpose(1, 2)), eighth, quarter


class InputSkip(reference.Token_performer):
    """VST's decoder layer: the skip around the attention is the layer's input, not ``v``."""

    def forward(self, x):
        k, q, v = self.kqv(self.norm1(x)).chunk(3, -1)
        k, q = self.prm_exp(k), self.prm_exp(q)
        y = q @ (k.mT @ v) / (q @ k.sum(1)[..., None] + self.epsilon)
        x = x + self.dp(self.proj(y))
        return x + self.mlp(self.norm2(x))


class Upsampling(nn.Module):
    """A reverse T2T step: Linear, ``nn.Fold``, and tokens of the encoder beside the result."""

    def __init__(self, dim, token_dim, size, window, fuse=True, layer=InputSkip):
        super().__init__()
        kernel, stride, padding = window
        self.fuse = fuse
        self.norm, self.mlp = nn.LayerNorm(dim), nn.Sequential(nn.Linear(dim, token_dim), nn.GELU())
        self.project = nn.Linear(token_dim, token_dim * kernel**2)
        self.upsample = nn.Fold(size, kernel, stride=stride, padding=padding)
        if fuse:
            self.concat = nn.Linear(2 * token_dim, token_dim)
            self.att = nn.Identity() if layer is None else layer(token_dim, token_dim)

    def forward(self, x, encoder=None):
        x = self.upsample(self.project(self.mlp(self.norm(x))).transpose(1, 2))
        x = x.view(*x.shape[:2], -1).transpose(1, 2)
        return self.att(self.concat(torch.cat([x, encoder], 2))) if self.fuse else x


class Saliency(nn.Module):
    """Encoder, decoder of 1/8, 1/4 and 1/1, and a map; ``layer`` is VST's, or ``None`` as in M3Net."""

    def __init__(self, size=(64, 64), dim=48, depth=2, heads=3, token_dim=32, layer=InputSkip):
        super().__init__()
        self.size = size
        self.tokens_to_token = Stages(size[0], "transformer", 3, dim, token_dim)
        self.blocks = nn.ModuleList(reference.Block(dim, heads, mlp_ratio=3.0) for _ in range(depth))
        small, large = (3, 2, 1), (7, 4, 2)
        eighth, quarter = tuple(n // 8 for n in size), tuple(n // 4 for n in size)
        self.decoder1 = Upsampling(dim, token_dim, eighth, small, layer=layer)
        self.decoder2 = Upsampling(token_dim, token_dim, quarter, small, layer=layer)
        self.decoder3 = Upsampling(token_dim, token_dim, size, large, fuse=False)
        self.head = nn.Linear(token_dim, 1)

    def forward(self, x):
        x, eighth, quarter = self.tokens_to_token(x)
        for block in self.blocks:
            x = block(x)
        x = self.decoder3(self.decoder2(self.decoder1(x, eighth), quarter))
        return self.head(x).transpose(1, 2).unflatten(2, self.size)

"""vit-pytorch's T2T-ViT: another network with the same soft split, either PyTorch's or the package's.

It keeps the unfolded widths, has full residual transformers between the splits, and learns its position table.
Parameter names are vit-pytorch's.
"""

from math import isqrt

import torch
from torch import nn

import t2t_fast


class Attention(nn.Module):
    def __init__(self, dim, heads, dim_head):
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        self.norm = nn.LayerNorm(dim)
        self.attend, self.dropout = nn.Softmax(dim=-1), nn.Dropout(0.0)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        single = heads == 1 and dim_head == dim
        self.to_out = nn.Identity() if single else nn.Sequential(nn.Linear(heads * dim_head, dim), nn.Dropout(0.0))

    def forward(self, x):
        q, k, v = self.to_qkv(self.norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = self.dropout(self.attend(q @ k.mT * self.scale))
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Dropout(0.0),
            nn.Linear(hidden, dim),
            nn.Dropout(0.0),
        )

    def forward(self, x):
        return self.net(x)


class Transformer(nn.Module):
    def __init__(self, dim, depth, heads, dim_head, mlp_dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([Attention(dim, heads, dim_head), FeedForward(dim, mlp_dim)]) for _ in range(depth)
        )

    def forward(self, x):
        for attention, feed_forward in self.layers:
            x = x + attention(x)
            x = x + feed_forward(x)
        return self.norm(x)


class ToImage(nn.Module):
    def forward(self, x):
        side = isqrt(x.shape[1])
        return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], side, side)


class Transpose(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


class T2TViT(nn.Module):
    """``family`` "fast" splits with :class:`t2t_fast.SoftSplit`, "reference" with ``nn.Unfold`` and a transpose."""

    def __init__(
        self,
        family,
        *,
        image_size,
        num_classes,
        dim,
        depth,
        heads,
        mlp_dim,
        dim_head=64,
        channels=3,
        pool="cls",
        t2t_layers=((7, 4), (3, 2), (3, 2)),
    ):
        super().__init__()
        self.pool = pool
        layers, width, size = [], channels, image_size
        for index, (kernel, stride) in enumerate(t2t_layers):
            width *= kernel**2
            size = (size + 2 * (stride // 2) - kernel) // stride + 1
            window = dict(kernel_size=kernel, stride=stride, padding=stride // 2)
            fast, last = family == "fast", index == len(t2t_layers) - 1
            layers += [
                nn.Identity() if index == 0 else ToImage(),
                t2t_fast.SoftSplit(**window) if fast else nn.Unfold(**window),
                nn.Identity() if fast else Transpose(),
                nn.Identity() if last else Transformer(width, depth=1, heads=1, dim_head=width, mlp_dim=width),
            ]
        self.to_patch_embedding = nn.Sequential(*layers, nn.Linear(width, dim))
        self.pos_embedding = nn.Parameter(torch.zeros(1, size**2 + 1, dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.transformer = Transformer(dim, depth, heads, dim_head, mlp_dim)
        self.mlp_head = nn.Linear(dim, num_classes)

    def forward(self, x):
        x = self.to_patch_embedding(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.transformer(x + self.pos_embedding)
        return self.mlp_head(x.mean(dim=1) if self.pool == "mean" else x[:, 0])

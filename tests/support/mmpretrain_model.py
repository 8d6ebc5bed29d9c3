"""mmpretrain's T2T-ViT with mmpretrain's parameter names and its actual (not the documented) attention scale."""

import torch
from torch import nn

from t2t_fast import SoftSplit
from t2t_fast.models.position import sinusoid_table


class Attention(nn.Module):
    """Multiplies q k by the square root of the head's width, for any configured scale."""

    def __init__(self, input_dims, embed_dims, num_heads):
        super().__init__()
        self.num_heads, self.shortcut = num_heads, input_dims != embed_dims
        self.qkv = nn.Linear(input_dims, 3 * embed_dims, bias=False)
        self.proj = nn.Linear(embed_dims, embed_dims)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = (q @ k.mT * q.shape[-1] ** 0.5).softmax(-1) @ v
        y = self.proj(y.transpose(1, 2).flatten(2))
        return v.transpose(1, 2).flatten(2) + y if self.shortcut else y


class FFN(nn.Module):
    def __init__(self, dims, hidden):
        super().__init__()
        self.layers = nn.Sequential(nn.Sequential(nn.Linear(dims, hidden), nn.GELU()), nn.Linear(hidden, dims))

    def forward(self, x):
        return self.layers(x)


class Layer(nn.Module):
    def __init__(self, input_dims, embed_dims, num_heads, hidden):
        super().__init__()
        self.ln1 = nn.LayerNorm(input_dims)
        self.attn = Attention(input_dims, embed_dims, num_heads)
        self.ln2 = nn.LayerNorm(embed_dims)
        self.ffn = FFN(embed_dims, hidden)

    def forward(self, x):
        y = self.attn(self.ln1(x))
        x = y if self.attn.shortcut else x + y
        return x + self.ffn(self.ln2(x))


class T2TModule(nn.Module):
    def __init__(self, token_dims, embed_dims):
        super().__init__()
        self.splits = nn.ModuleList([SoftSplit(7, 4, 2), SoftSplit(3, 2, 1), SoftSplit(3, 2, 1)])
        self.attention1 = Layer(3 * 49, token_dims, 1, token_dims)
        self.attention2 = Layer(9 * token_dims, token_dims, 1, token_dims)
        self.project = nn.Linear(9 * token_dims, embed_dims)

    def forward(self, x):
        for split, layer in zip(self.splits, (self.attention1, self.attention2, self.project), strict=True):
            x = layer(split(x))
            side = round(x.shape[1] ** 0.5)
            tokens, x = x, x.transpose(1, 2).unflatten(2, (side, side))
        return tokens


class T2TViT(nn.Module):
    """The backbone for square images: (B, 3, S, S) -> the class token (B, embed_dims)."""

    def __init__(self, img_size=64, embed_dims=48, num_layers=2, token_dims=32, num_heads=3, hidden=144):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dims))
        self.tokens_to_token = T2TModule(token_dims, embed_dims)
        self.register_buffer("pos_embed", sinusoid_table((img_size // 16) ** 2 + 1, embed_dims))
        self.encoder = nn.ModuleList(Layer(embed_dims, embed_dims, num_heads, hidden) for _ in range(num_layers))
        self.norm = nn.LayerNorm(embed_dims)

    def forward(self, x):
        tokens = self.tokens_to_token(x)
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + self.pos_embed
        for layer in self.encoder:
            x = layer(x)
        return self.norm(x)[:, 0]


class Classifier(nn.Module):
    """A whole model: backbone and head, as mmpretrain nests them."""

    def __init__(self, num_classes=10, **options):
        super().__init__()
        self.backbone = T2TViT(**options)
        self.head = nn.Module()
        self.head.layers = nn.Sequential()
        self.head.layers.add_module("head", nn.Linear(self.backbone.norm.normalized_shape[0], num_classes))

    def forward(self, x):
        return self.head.layers.head(self.backbone(x))

"""mmpretrain's ``T2T_ViT`` under its own names: its layers in the T2T module too, and the grid beside the tokens."""

import torch
from torch import nn

from ..blocks import MmBlock


class Layer(MmBlock):
    """``T2TTransformerLayer`` of any width; in a T2T module its input is wider, and ``v`` is its skip."""

    def __init__(self, inputs, dim, heads, hidden):
        super().__init__()
        self.v_shortcut = self.attn.v_shortcut = inputs != dim
        self.ln1, self.ln2 = nn.LayerNorm(inputs), nn.LayerNorm(dim)
        self.attn.embed_dims, self.attn.num_heads, self.attn.head_dims = dim, heads, dim // heads
        self.attn.qkv, self.attn.proj = nn.Linear(inputs, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.ffn.layers[0][0], self.ffn.layers[1] = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        if not self.v_shortcut:
            return super().forward(x)
        x = self.attn(self.ln1(x))
        return self.ffn(self.ln2(x), identity=x)


class Module(nn.Module):
    def __init__(self, token_dim, dim):
        super().__init__()
        for index, (kernel, stride, padding) in enumerate(((7, 4, 2), (3, 2, 1), (3, 2, 1))):
            self.add_module(f"soft_split{index}", nn.Unfold(kernel, stride=stride, padding=padding))
        self.attention1 = Layer(147, token_dim, 1, token_dim)
        self.attention2 = Layer(9 * token_dim, token_dim, 1, token_dim)
        self.project = nn.Linear(9 * token_dim, dim)

    @staticmethod
    def _size(unfold, size):
        return tuple((n + 2 * unfold.padding - unfold.kernel_size) // unfold.stride + 1 for n in size)

    def forward(self, x):
        size = self._size(self.soft_split0, x.shape[2:])
        x = self.soft_split0(x).transpose(1, 2)
        for step in (1, 2):
            x = getattr(self, f"attention{step}")(x).transpose(1, 2).unflatten(2, size)
            split = getattr(self, f"soft_split{step}")
            size = self._size(split, size)
            x = split(x).transpose(1, 2)
        return self.project(x), size


class T2TViT(nn.Module):
    """The backbone, as a map of features."""

    def __init__(self, dim=48, depth=2, heads=3, token_dim=32):
        super().__init__()
        self.tokens_to_token = Module(token_dim, dim)
        self.encoder = nn.ModuleList(Layer(dim, dim, heads, 3 * dim) for _ in range(depth))
        self.cls_token, self.norm = nn.Parameter(torch.zeros(1, 1, dim)), nn.LayerNorm(dim)

    def forward(self, x):
        x, size = self.tokens_to_token(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for layer in self.encoder:
            x = layer(x)
        return self.norm(x)[:, 1:].transpose(1, 2).unflatten(2, size)

"""The articles' T2T module, eager and as they compute it; imports nothing of this package.

Source: the ``modules`` folder of lanl/vision_transformers_explained. It differs from the official T2T module in the
scale of the token attention (its output width, not its input width) and in the window: stride ``ceil(k / 2)`` and
padding ``ceil(k / 4)`` as integer halves.
"""

import math

from torch import nn


def count_tokens(w, h, k, s, p):
    """Grid of an unfold with square window k, stride s, padding p: (new_w, new_h, tokens). Width comes first."""

    def steps(n):
        return math.floor((n + 2 * p - (k - 1) - 1) / s + 1)

    return steps(w), steps(h), steps(w) * steps(h)


class Attention(nn.Module):
    """Multi-head attention from width ``dim`` to width ``chan`` with a skip through ``v`` after the projection."""

    def __init__(self, dim, chan, num_heads=1, qkv_bias=False, qk_scale=None):
        super().__init__()
        self.num_heads = num_heads
        self.chan = chan
        self.head_dim = chan // num_heads
        self.scale = qk_scale or self.head_dim**-0.5
        self.qkv = nn.Linear(dim, chan * 3, bias=qkv_bias)
        self.proj = nn.Linear(chan, chan)

    def forward(self, x):
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        y = self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, self.chan))
        return v.transpose(1, 2).reshape(batch, tokens, self.chan) + y


class NeuralNet(nn.Module):
    """Linear, activation, Linear."""

    def __init__(self, in_chan, hidden_chan=None, out_chan=None, act_layer=nn.GELU):
        super().__init__()
        self.fc1 = nn.Linear(in_chan, hidden_chan or in_chan)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_chan or in_chan, out_chan or in_chan)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class TokenTransformer(nn.Module):
    """LayerNorm and attention (the width changes), then LayerNorm and MLP with a skip: (B, T, dim) -> (B, T, chan)."""

    def __init__(
        self,
        dim,
        chan,
        num_heads,
        hidden_chan_mul=1.0,
        qkv_bias=False,
        qk_scale=None,
        act_layer=nn.GELU,
        norm_layer=nn.LayerNorm,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, chan, num_heads=num_heads, qkv_bias=qkv_bias, qk_scale=qk_scale)
        self.norm2 = norm_layer(chan)
        self.neuralnet = NeuralNet(chan, int(chan * hidden_chan_mul), chan, act_layer)

    def forward(self, x):
        x = self.attn(self.norm1(x))
        return x + self.neuralnet(self.norm2(x))


class Tokens2Token(nn.Module):
    """(B, C, H, W) image, H and W free -> (B, tokens, token_len); window (k, (k+1)//2, (k+1)//4) per kernel k."""

    def __init__(
        self,
        img_size=(1, 1000, 300),
        softsplit_kernels=(7, 3, 3),
        num_heads=1,
        token_chan=64,
        token_len=768,
        hidden_chan_mul=1.0,
        qkv_bias=False,
        qk_scale=None,
        act_layer=nn.GELU,
        norm_layer=nn.LayerNorm,
    ):
        super().__init__()
        channels, height, width = img_size
        options = dict(
            num_heads=num_heads,
            hidden_chan_mul=hidden_chan_mul,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            act_layer=act_layer,
            norm_layer=norm_layer,
        )
        self.token_chan = token_chan
        self.windows = [(k, (k + 1) // 2, (k + 1) // 4) for k in softsplit_kernels]
        for index, (k, s, p) in enumerate(self.windows):
            width, height, self.num_tokens = count_tokens(width, height, k, s, p)
            self.add_module(f"soft_split{index}", nn.Unfold(kernel_size=k, stride=s, padding=p))
        k0, k1, k2 = softsplit_kernels
        self.transformer1 = TokenTransformer(channels * k0 * k0, token_chan, **options)
        self.transformer2 = TokenTransformer(token_chan * k1 * k1, token_chan, **options)
        self.project = nn.Linear(token_chan * k2 * k2, token_len)

    def forward(self, x):
        batch, _, height, width = x.shape
        x = self.transformer1(self.soft_split0(x).transpose(1, 2))
        width, height, _ = count_tokens(width, height, *self.windows[0])
        x = x.transpose(1, 2).reshape(batch, self.token_chan, height, width)
        x = self.transformer2(self.soft_split1(x).transpose(1, 2))
        width, height, _ = count_tokens(width, height, *self.windows[1])
        x = x.transpose(1, 2).reshape(batch, self.token_chan, height, width)
        return self.project(self.soft_split2(x).transpose(1, 2))


class Patch_Tokenization(nn.Module):
    """Square, non-overlapping patches by unfold and Linear: (B, C, H, W) -> (B, tokens, token_len)."""

    def __init__(self, img_size=(1, 60, 100), patch_size=50, token_len=768):
        super().__init__()
        channels, height, width = img_size
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"Patch_Tokenization: patch_size {patch_size} must divide the image, got height {height}, width {width}"
            )
        self.num_tokens = (height // patch_size) * (width // patch_size)
        self.split = nn.Unfold(kernel_size=patch_size, stride=patch_size, padding=0)
        self.project = nn.Linear(channels * patch_size**2, token_len)

    def forward(self, x):
        """(B, C, H, W) -> (B, tokens, token_len)."""
        return self.project(self.split(x).transpose(1, 2))

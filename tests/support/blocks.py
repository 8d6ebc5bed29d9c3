"""Transformer blocks as other projects write them: their names, and their softmax step by step."""

from functools import partial

import torch
from torch import nn

from t2t_fast import reference

WIDTH, HEADS, HIDDEN = 24, 3, 48


class DropPath(nn.Module):
    """timm's and mmcv's."""

    def __init__(self, drop_prob=0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.drop_prob or not self.training:
            return x
        keep = 1 - self.drop_prob
        return x / keep * (torch.rand(len(x), 1, 1) < keep)


def softmax_attention(q, k, v, attn_mask=None, dropout_p=0.0, scale=None):
    """mmpretrain's: divides by the scale."""
    weights = (q @ k.transpose(-2, -1) / (scale or q.shape[-1] ** 0.5)).softmax(-1)
    return torch.dropout(weights, dropout_p, True) @ v


class MmAttention(nn.Module):
    def __init__(self, qk_scale=None, drop=0.0):
        super().__init__()
        self.embed_dims, self.num_heads, self.head_dims = WIDTH, HEADS, WIDTH // HEADS
        self.v_shortcut, self.attn_drop = False, 0.0
        self.scaled_dot_product_attention = (
            nn.functional.scaled_dot_product_attention
            if qk_scale is None
            else partial(softmax_attention, scale=qk_scale)
        )
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.proj_drop, self.out_drop, self.gamma1 = nn.Dropout(drop), DropPath(0.1), nn.Identity()

    def forward(self, x):
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dims).permute(2, 0, 3, 1, 4)
        rate = self.attn_drop if self.training else 0.0
        x = self.scaled_dot_product_attention(q, k, v, dropout_p=rate)
        x = x.transpose(1, 2).reshape(batch, tokens, self.embed_dims)
        x = self.out_drop(self.gamma1(self.proj_drop(self.proj(x))))
        return v.squeeze(1) + x if self.v_shortcut else x


class FFN(nn.Module):
    """mmcv's."""

    def __init__(self):
        super().__init__()
        self.add_identity = True
        first = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Dropout(0.0))
        self.layers = nn.Sequential(first, nn.Linear(HIDDEN, WIDTH), nn.Dropout(0.0))
        self.dropout_layer, self.gamma2 = DropPath(0.1), nn.Identity()

    def forward(self, x, identity=None):
        out = self.gamma2(self.layers(x))
        return (x if identity is None else identity) + self.dropout_layer(out) if self.add_identity else out


class MmBlock(nn.Module):
    """mmpretrain's ``T2TTransformerLayer``."""

    def __init__(self, qk_scale=None):
        super().__init__()
        self.v_shortcut = False
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.ffn = MmAttention(qk_scale), FFN()

    def forward(self, x):
        x = x + self.attn(self.ln1(x))
        return self.ffn(self.ln2(x), identity=x)


class TimmAttention(nn.Module):
    """timm's, with its optional arguments and the parts that most models leave out."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = HEADS, WIDTH // HEADS, WIDTH
        self.scale, self.fused_attn = self.head_dim**-0.5, False
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm, self.norm = nn.Identity(), nn.Identity(), nn.Identity()
        self.gate = None
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x, attn_mask=None, is_causal=False):
        batch, tokens, _ = x.shape
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            x = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask)
        else:
            logits = q * self.scale @ k.transpose(-2, -1)
            logits = logits if attn_mask is None else logits + attn_mask
            x = self.attn_drop(logits.softmax(-1)) @ v
        x = self.norm(x.transpose(1, 2).reshape(batch, tokens, self.attn_dim))
        return self.proj_drop(self.proj(x if gate is None else x * gate))


class TimmMlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)
        self.drop1, self.norm, self.drop2 = nn.Dropout(0.0), nn.Identity(), nn.Dropout(0.0)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class LayerNorm(nn.LayerNorm):
    """timm's."""

    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class TimmBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(WIDTH, eps=1e-6), LayerNorm(WIDTH, eps=1e-6)
        self.attn, self.mlp = TimmAttention(), TimmMlp()
        self.ls1, self.ls2, self.drop_path1, self.drop_path2 = (
            nn.Identity(),
            nn.Identity(),
            DropPath(0.1),
            nn.Identity(),
        )

    def forward(self, x, attn_mask=None):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class MapAttention(reference.blocks.Attention):
    """Stores its attention maps, for visualisation."""

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        self.attention_map = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj_drop(self.proj((self.attention_map @ v).transpose(1, 2).reshape(batch, tokens, width)))


def with_maps():
    """Upstream's block, whose attention stores its maps."""
    block = reference.Block(WIDTH, HEADS, mlp_ratio=2.0)
    block.attn = MapAttention(WIDTH, HEADS)
    return block

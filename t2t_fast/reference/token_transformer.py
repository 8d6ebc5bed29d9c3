"""Upstream-shaped eager Transformer layer of the T2T module.

Source: ``models/token_transformer.py`` of yitu-opensource/T2T-ViT.
"""

from torch import nn

from .layers import DropPath, Mlp


class Attention(nn.Module):
    """Softmax attention from width ``dim`` to width ``in_dim`` with a skip through ``v``.

    The default scale is ``(dim // num_heads) ** -0.5`` where ``dim`` is the *unfolded* width (147, 576), not the
    head width: checkpoints were trained with it. Each head is ``in_dim`` wide and the skip drops the head axis, so
    only ``num_heads=1`` is meaningful.
    """

    def __init__(self, dim, num_heads=8, in_dim=None, qkv_bias=False, qk_scale=None, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        self.num_heads = num_heads
        self.in_dim = in_dim
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, in_dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(in_dim, in_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x):
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.in_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        y = (self.attn_drop(weights) @ v).transpose(1, 2).reshape(batch, tokens, self.in_dim)
        return v.squeeze(1) + self.proj_drop(self.proj(y))


class Token_transformer(nn.Module):
    """LayerNorm and attention (no skip around them: the width changes), then LayerNorm and MLP with a skip."""

    def __init__(
        self,
        dim,
        in_dim,
        num_heads,
        mlp_ratio=1.0,
        qkv_bias=False,
        qk_scale=None,
        drop=0.0,
        attn_drop=0.0,
        drop_path=0.0,
        act_layer=nn.GELU,
        norm_layer=nn.LayerNorm,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(
            dim,
            num_heads=num_heads,
            in_dim=in_dim,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop=attn_drop,
            proj_drop=drop,
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(in_dim)
        self.mlp = Mlp(in_dim, int(in_dim * mlp_ratio), in_dim, act_layer=act_layer, drop=drop)

    def forward(self, x):
        """(B, T, dim) -> (B, T, in_dim)."""
        x = self.attn(self.norm1(x))
        return x + self.drop_path(self.mlp(self.norm2(x)))

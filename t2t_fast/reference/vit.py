"""Upstream-shaped eager plain ViT, the paper's baseline.

Source: ``models/vit.py`` of yitu-opensource/T2T-ViT (itself after timm's VisionTransformer and DeiT).
"""

from collections import OrderedDict
from functools import partial

import torch
from torch import nn

from .blocks import Block
from .layers import init_weights


class PatchEmbed(nn.Module):
    """Non-overlapping patches by a strided convolution: (B, C, H, W) -> (B, H/P * W/P, embed_dim)."""

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=768):
        super().__init__()
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """ViT with learned positions; ``representation_size`` adds a tanh layer before the head, ``distilled`` a second
    token with its own head (in eval mode the mean of both heads is returned, in training both)."""

    def __init__(
        self,
        img_size=224,
        patch_size=16,
        in_chans=3,
        num_classes=1000,
        embed_dim=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4.0,
        qkv_bias=True,
        qk_scale=None,
        representation_size=None,
        distilled=False,
        drop_rate=0.0,
        attn_drop_rate=0.0,
        drop_path_rate=0.0,
        norm_layer=None,
    ):
        super().__init__()
        norm_layer = norm_layer or partial(nn.LayerNorm, eps=1e-6)
        self.num_features = self.embed_dim = embed_dim
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if distilled else None
        extra = 2 if distilled else 1
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + extra, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            Block(
                dim=embed_dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                drop=drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=rate,
                norm_layer=norm_layer,
            )
            for rate in torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        )
        self.norm = norm_layer(embed_dim)
        self.pre_logits = nn.Identity()
        if representation_size and not distilled:
            self.num_features = representation_size
            self.pre_logits = nn.Sequential(OrderedDict(fc=nn.Linear(embed_dim, representation_size), act=nn.Tanh()))
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.head_dist = None
        if distilled:
            self.head_dist = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        for table in (self.cls_token, self.dist_token, self.pos_embed):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)
        self.apply(init_weights)

    def forward_features(self, x):
        x = self.patch_embed(x)
        tokens = [self.cls_token] if self.dist_token is None else [self.cls_token, self.dist_token]
        x = torch.cat([token.expand(x.shape[0], -1, -1) for token in tokens] + [x], dim=1)
        x = self.pos_drop(x + self.pos_embed)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.dist_token is None:
            return self.pre_logits(x[:, 0])
        return x[:, 0], x[:, 1]

    def forward(self, x):
        x = self.forward_features(x)
        if self.head_dist is None:
            return self.head(x)
        logits, distilled = self.head(x[0]), self.head_dist(x[1])
        return (logits, distilled) if self.training else (logits + distilled) / 2


def vit_small_patch16_224(**overrides):
    """ViT-S/16 of the T2T-ViT paper's table: depth 8, width 768, 8 heads, MLP ratio 3, LayerNorm eps 1e-5."""
    config = dict(embed_dim=768, depth=8, num_heads=8, mlp_ratio=3.0, qkv_bias=False, norm_layer=nn.LayerNorm)
    return VisionTransformer(**{**config, **overrides})


def vit_base_patch16_224(**overrides):
    """ViT-B/16: depth 12, width 768, 12 heads."""
    return VisionTransformer(**overrides)


def vit_deit_tiny_patch16_224(**overrides):
    """DeiT-Ti/16: depth 12, width 192, 3 heads."""
    return VisionTransformer(**{**dict(embed_dim=192, num_heads=3), **overrides})


def vit_deit_small_patch16_224(**overrides):
    """DeiT-S/16: depth 12, width 384, 6 heads."""
    return VisionTransformer(**{**dict(embed_dim=384, num_heads=6), **overrides})


def vit_deit_tiny_distilled_patch16_224(**overrides):
    """DeiT-Ti/16 with a distillation token."""
    return vit_deit_tiny_patch16_224(**{"distilled": True, **overrides})

"""Upstream-shaped eager T2T-ViT models and their factories.

Sources in yitu-opensource/T2T-ViT: ``models/t2t_vit.py``, ``t2t_vit_se.py``, ``t2t_vit_dense.py``,
``t2t_vit_ghost.py`` (table 1 of the T2T-ViT paper for the configurations).
"""

import torch
from torch import nn

from .blocks import Block, BlockDense, BlockGhost, BlockSE, Transition
from .layers import get_sinusoid_encoding, init_weights
from .t2t_module import T2T_module


class T2T_ViT(nn.Module):
    """Tokens-to-token module, class token, position table, transformer blocks, classifier on the class token.

    Args are upstream's. Input (B, in_chans, img_size, img_size), output (B, num_classes) logits; with
    ``num_classes=0`` the normalised class token (B, embed_dim).
    """

    block = Block

    def __init__(
        self,
        img_size=224,
        tokens_type="performer",
        in_chans=3,
        num_classes=1000,
        embed_dim=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4.0,
        qkv_bias=False,
        qk_scale=None,
        drop_rate=0.0,
        attn_drop_rate=0.0,
        drop_path_rate=0.0,
        norm_layer=nn.LayerNorm,
        token_dim=64,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        self.tokens_to_token = T2T_module(img_size, tokens_type, in_chans, embed_dim, token_dim)
        positions = self.tokens_to_token.num_patches + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(get_sinusoid_encoding(positions, embed_dim), requires_grad=False)
        self.pos_drop = nn.Dropout(drop_rate)
        options = dict(
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            drop=drop_rate,
            attn_drop=attn_drop_rate,
            norm_layer=norm_layer,
        )
        self.num_features = self._build_blocks(embed_dim, depth, drop_path_rate, options)
        self.norm = norm_layer(self.num_features)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_weights)

    def _build_blocks(self, embed_dim, depth, drop_path_rate, options):
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(self.block(dim=embed_dim, drop_path=rate, **options) for rate in rates)
        return embed_dim

    def forward_features(self, x):
        x = self.tokens_to_token(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.pos_drop(x + self.pos_embed)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]

    def forward(self, x):
        return self.head(self.forward_features(x))


class T2T_ViT_SE(T2T_ViT):
    """T2T-ViT with squeeze-and-excitation blocks."""

    block = BlockSE


class T2T_ViT_Ghost(T2T_ViT):
    """T2T-ViT with ghost blocks; needs ``mlp_ratio=3``."""

    block = BlockGhost


class T2T_ViT_Dense(T2T_ViT):
    """T2T-ViT with densely growing blocks: stages of ``block_config`` blocks with halving transitions between."""

    def __init__(self, growth_rate=32, block_config=(3, 4, 6, 3), **options):
        self._growth = growth_rate, tuple(block_config)
        super().__init__(depth=len(block_config), **options)

    def _build_blocks(self, embed_dim, depth, drop_path_rate, options):
        growth_rate, block_config = self._growth
        width = embed_dim
        self.blocks = nn.ModuleList()
        for stage, rate in enumerate(torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()):
            if stage > 0:
                self.blocks.append(Transition(width, width // 2))
                width //= 2
            for _ in range(block_config[stage]):
                self.blocks.append(BlockDense(growth_rate, width, drop_path=rate, **options))
                width += growth_rate
        return width


def _factory(name, cls, **config):
    def build(**overrides):
        return cls(**{**config, **overrides})

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"Upstream's ``{name}``, randomly initialised; keyword arguments override its configuration."
    return build


def _performer(name, embed_dim, depth, num_heads, mlp_ratio, cls=T2T_ViT, tokens_type="performer"):
    return _factory(
        name, cls, tokens_type=tokens_type, embed_dim=embed_dim, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio
    )


t2t_vit_7 = _performer("t2t_vit_7", 256, 7, 4, 2.0)
t2t_vit_10 = _performer("t2t_vit_10", 256, 10, 4, 2.0)
t2t_vit_12 = _performer("t2t_vit_12", 256, 12, 4, 2.0)
t2t_vit_14 = _performer("t2t_vit_14", 384, 14, 6, 3.0)
t2t_vit_19 = _performer("t2t_vit_19", 448, 19, 7, 3.0)
t2t_vit_24 = _performer("t2t_vit_24", 512, 24, 8, 3.0)
t2t_vit_t_14 = _performer("t2t_vit_t_14", 384, 14, 6, 3.0, tokens_type="transformer")
t2t_vit_t_19 = _performer("t2t_vit_t_19", 448, 19, 7, 3.0, tokens_type="transformer")
t2t_vit_t_24 = _performer("t2t_vit_t_24", 512, 24, 8, 3.0, tokens_type="transformer")
t2t_vit_14_resnext = _performer("t2t_vit_14_resnext", 384, 14, 32, 3.0)
t2t_vit_14_wide = _performer("t2t_vit_14_wide", 768, 4, 12, 3.0)
t2t_vit_14_se = _performer("t2t_vit_14_se", 384, 14, 6, 3.0, cls=T2T_ViT_SE)
t2t_vit_16_ghost = _performer("t2t_vit_16_ghost", 384, 16, 6, 3.0, cls=T2T_ViT_Ghost)
t2t_vit_dense = _factory(
    "t2t_vit_dense", T2T_ViT_Dense, growth_rate=64, block_config=(3, 6, 6, 4), embed_dim=128, num_heads=8, mlp_ratio=2.0
)

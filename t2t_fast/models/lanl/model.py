"""The two models: patch tokens or soft splits in front of one backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ...errors import check_pair
from ...modules import fusion
from ...modules.options import check_options
from ...ops._common.spec import grid_after, square
from ..backbone import init_weights
from ..position import add_positions, resize_position_table, sinusoid_table
from .layers import Encoding
from .tokens import PatchTokenization, Tokens2Token, check_image, split_window


class ViTBackbone(nn.Module):
    """Class token, frozen sinusoidal positions, :class:`Encoding` blocks, norm, and a head on the class token."""

    block: type[nn.Module] = Encoding

    def __init__(
        self,
        preds: int = 1,
        token_len: int = 768,
        grid_size: tuple[int, int] = (4, 4),
        num_heads: int = 1,
        Encoding_hidden_chan_mul: float = 4.0,
        depth: int = 12,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
    ):
        super().__init__()
        check_options("ViTBackbone", locals())
        self.grid_size = check_pair("ViTBackbone", "grid_size", grid_size, minimum=1)
        entries = self.grid_size[0] * self.grid_size[1] + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, token_len))
        self.pos_embed = nn.Parameter(sinusoid_table(entries, token_len), requires_grad=False)
        options: dict[str, Any] = dict(
            num_heads=num_heads,
            hidden_chan_mul=Encoding_hidden_chan_mul,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            act_layer=act_layer,
            norm_layer=norm_layer,
        )
        self.blocks = nn.ModuleList(self.block(token_len, **options) for _ in range(depth))
        self.norm = norm_layer(token_len)
        self.head = nn.Linear(token_len, preds)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward(self, tokens: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """Tokens (B, h*w, token_len) -> (B, preds); positions are resized if ``grid`` is not the stored one."""
        table = resize_position_table(self.pos_embed, self.grid_size, self.grid_size if grid is None else grid)
        x = add_positions(tokens, self.cls_token, table)
        for block in self.blocks:
            x = block(x)
        plain = fusion.layer_norm(self.norm) is None and not fusion.watched()
        return self.head(self.norm(x[:, :1] if plain else x)[:, 0])


class ViTModel(nn.Module):
    """Patch tokens and :class:`ViTBackbone`: (B, C, H, W) -> (B, preds); any H and W that the patch divides."""

    tokeniser: type[nn.Module] = PatchTokenization
    classifier: type[nn.Module] = ViTBackbone

    def __init__(
        self,
        img_size: Sequence[int] = (1, 400, 100),
        patch_size: int = 50,
        token_len: int = 768,
        preds: int = 1,
        num_heads: int = 1,
        Encoding_hidden_chan_mul: float = 4.0,
        depth: int = 12,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
    ):
        super().__init__()
        check_options("ViTModel", locals())
        self.patch_tokens = self.tokeniser(img_size, patch_size, token_len)
        self.windows = (square(patch_size, patch_size, 0),)
        self.backbone = self.classifier(
            preds,
            token_len,
            grid_after(self.windows, *check_image("ViTModel", img_size)[1:]),
            num_heads,
            Encoding_hidden_chan_mul,
            depth,
            qkv_bias,
            qk_scale,
            act_layer,
            norm_layer,
        )
        self.apply(init_weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, preds)."""
        return self.backbone(self.patch_tokens(x), grid_after(self.windows, *x.shape[2:]))


class T2TViT(nn.Module):
    """:class:`Tokens2Token` and :class:`ViTBackbone`: (B, C, H, W) -> (B, preds)."""

    tokeniser: type[nn.Module] = Tokens2Token
    classifier: type[nn.Module] = ViTBackbone

    def __init__(
        self,
        img_size: Sequence[int] = (1, 1700, 500),
        softsplit_kernels: Sequence[int] = (31, 3, 3),
        preds: int = 1,
        token_len: int = 768,
        token_chan: int = 64,
        num_heads: int = 1,
        T2T_hidden_chan_mul: float = 1.0,
        Encoding_hidden_chan_mul: float = 4.0,
        depth: int = 12,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
    ):
        super().__init__()
        check_options("T2TViT", locals())
        self.tokens_to_token = self.tokeniser(
            img_size,
            softsplit_kernels,
            num_heads,
            token_chan,
            token_len,
            T2T_hidden_chan_mul,
            qkv_bias,
            qk_scale,
            act_layer,
            norm_layer,
        )
        self.windows = tuple(split_window(kernel) for kernel in softsplit_kernels)
        self.vit_backbone = self.classifier(
            preds,
            token_len,
            grid_after(self.windows, *check_image("T2TViT", img_size)[1:]),
            num_heads,
            Encoding_hidden_chan_mul,
            depth,
            qkv_bias,
            qk_scale,
            act_layer,
            norm_layer,
        )
        self.apply(init_weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, preds)."""
        return self.vit_backbone(self.tokens_to_token(x), grid_after(self.windows, *x.shape[2:]))

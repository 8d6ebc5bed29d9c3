"""The plain ViT that the T2T-ViT paper compares with, with upstream's parameter names.

Source: ``models/vit.py`` of yitu-opensource/T2T-ViT (after timm's VisionTransformer and DeiT).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import check_bool
from .backbone import Backbone, check_model
from .patch import PatchEmbed


class ViT(Backbone):
    """Plain vision transformer: (B, in_chans, H, W) -> (B, num_classes) logits; any H and W that the patch divides.

    Args:
        img_size: int or (H, W); decides the stored position table, which is learned.
        representation_size: width of a tanh layer before the head, or ``None``; left out with ``distilled``.
        distilled: a second token with its own head; eval mode returns the mean of both heads, training mode both.
        global_pool: see :class:`Backbone`; not "avg" with ``distilled``.
        norm_layer: LayerNorm with eps 1e-6 by default.
        block, growth_rate, block_config: the backbone's block, as :class:`T2TViT`.
        others: as upstream's ``VisionTransformer``.
    """

    heads = ("head", "head_dist")

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        representation_size: int | None = None,
        distilled: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        block: str = "plain",
        growth_rate: int = 32,
        block_config: Sequence[int] = (3, 4, 6, 3),
        global_pool: str = "token",
    ) -> None:
        norm_layer = partial(nn.LayerNorm, eps=1e-6) if norm_layer is None else norm_layer
        check_model(type(self).__name__, locals())
        tokeniser = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        super().__init__(
            "patch_embed",
            tokeniser,
            windows=tokeniser.windows,
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            norm_layer=norm_layer,
            block=block,
            growth_rate=growth_rate,
            block_config=block_config,
            global_pool=global_pool,
            learned_positions=True,
            distilled=distilled,
        )
        self.distilled_training = distilled
        self.pre_logits: nn.Module = nn.Identity()
        if representation_size and not distilled:
            layer = nn.Linear(self.num_features, representation_size)
            self.pre_logits = nn.Sequential(OrderedDict(fc=layer, act=nn.Tanh()))
            self.head_hidden_size = representation_size
        self.head = self._make_head(self.head_hidden_size)
        self.head_dist = self._make_head(self.num_features) if distilled else None
        self._initialise()

    def get_classifier(self) -> Any:
        """The classifier; with ``distilled`` the pair of both."""
        return self.head if self.head_dist is None else (self.head, self.head_dist)

    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether a ``distilled`` model in training mode returns the logits of both heads (upstream) or their mean."""
        check_bool(f"{type(self).__name__}.set_distilled_training", "enable", enable)
        self.distilled_training = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that upstream's recipes exempt from weight decay."""
        return {"pos_embed", "cls_token", "dist_token"}

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """See :meth:`Backbone.prune_intermediate_layers`; the tanh layer belongs to the head."""
        taken = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            self.pre_logits, self.head_hidden_size = nn.Identity(), self.num_features
        return taken

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> Any:
        """(B, extra + h*w, num_features) -> logits, or, with ``pre_logits``, the head's input.

        With ``distilled`` and the pooling "token": the mean of both heads' logits or inputs; in training the pair of
        both logits, if :meth:`set_distilled_training` is on.
        """
        if self.head_dist is None or self.global_pool != "token":
            x = self.pre_logits(self.pool(x))
            return x if pre_logits else self.head(x)
        if pre_logits:
            return (x[:, 0] + x[:, 1]) / 2
        logits, distilled = self.head(x[:, 0]), self.head_dist(x[:, 1])
        return (logits, distilled) if self.training and self.distilled_training else (logits + distilled) / 2

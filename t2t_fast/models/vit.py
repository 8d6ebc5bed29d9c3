"""The plain ViT that the T2T-ViT paper compares with, with upstream's parameter names.

Source: ``models/vit.py`` of yitu-opensource/T2T-ViT (after timm's VisionTransformer and DeiT).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from ..modules.options import check_options
from ..ops._common.windows import as_image
from .backbone import Backbone, check_model, init_weights
from .patch import PatchEmbed


class ViT(Backbone):
    """Plain vision transformer: (B, in_chans, H, W) -> (B, num_classes) logits; any H and W that the patch divides.

    Args:
        img_size: int or (H, W); decides the stored position table, which is learned.
        representation_size: width of a tanh layer before the head, or ``None``; left out with ``distilled``.
        distilled: a second token with its own head; eval mode returns the mean of both heads, training mode both.
        norm_layer: LayerNorm with eps 1e-6 by default.
        block, growth_rate, block_config: the backbone's block, as :class:`T2TViT`.
        others: as upstream's ``VisionTransformer``.
    """

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
    ) -> None:
        norm_layer = partial(nn.LayerNorm, eps=1e-6) if norm_layer is None else norm_layer
        check_model(type(self).__name__, locals())
        tokeniser = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        super().__init__(
            "patch_embed",
            tokeniser,
            windows=tokeniser.windows,
            img_size=img_size,
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
            learned_positions=True,
            distilled=distilled,
        )
        self.num_classes = num_classes
        width = self.num_features
        self.pre_logits: nn.Module = nn.Identity()
        if representation_size and not distilled:
            self.pre_logits = nn.Sequential(OrderedDict(fc=nn.Linear(width, representation_size), act=nn.Tanh()))
            self.num_features = representation_size
        self.head = self._make_head(self.num_features)
        self.head_dist = self._make_head(width) if distilled else None
        self._initialise()

    def _make_head(self, width: int) -> nn.Module:
        return nn.Linear(width, self.num_classes) if self.num_classes > 0 else nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str = "") -> None:
        """New, freshly initialised heads for ``num_classes``; 0 leaves them out."""
        check_options(type(self).__name__, {"num_classes": num_classes})
        self.num_classes = num_classes
        for name in ("head", "head_dist"):
            if getattr(self, name) is not None:
                head = self._make_head(self.num_features)
                init_weights(head)
                setattr(self, name, head.to(self.cls_token))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that upstream's recipes exempt from weight decay."""
        return {"pos_embed", "cls_token", "dist_token"}

    def forward_features(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The input of the head: (B, num_features), or a pair of (B, embed_dim) with ``distilled``."""
        x = self.encode(*self.tokens(x), slice(self.extra_tokens))
        if self.dist_token is None:
            return self.pre_logits(x[:, 0])
        return x[:, 0], x[:, 1]

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """(B, in_chans, H, W) -> (B, num_classes); with ``distilled`` in training a pair of them, one a head."""
        features = self.forward_features(x)
        if self.head_dist is None:
            return self.head(features)
        logits, distilled = self.head(features[0]), self.head_dist(features[1])
        return (logits, distilled) if self.training else (logits + distilled) / 2

    def forward_stages(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The one feature map of a plain ViT: a list of one (B, C, h, w) at the patch's stride."""
        tokens, grid = self.tokens(x)
        x = self.encode(tokens, grid, slice(self.extra_tokens, None))
        return [as_image(x, grid)]

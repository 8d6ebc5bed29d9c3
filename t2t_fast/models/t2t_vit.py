"""T2T-ViT models with upstream's parameter names, for any image size.

Sources in yitu-opensource/T2T-ViT: ``models/t2t_vit.py``, ``t2t_vit_se.py``, ``t2t_vit_dense.py``,
``t2t_vit_ghost.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..modules.options import check_choice, check_options
from ..modules.t2t_module import TOKENS_TYPES, T2TModule
from ..ops._common.spec import T2T_WINDOWS, Window, square
from ..ops._common.windows import as_image
from .backbone import Backbone, check_model, init_weights
from .patch import PatchEmbed


class T2TViT(Backbone):
    """Tokens-to-token ViT: (B, in_chans, H, W) -> (B, num_classes) logits; H and W are free at call time.

    Args:
        img_size: int or (H, W); decides the stored position table.
        tokens_type: "performer", "transformer", "convolution" or "patch" (``patch_size`` pixels square).
        block: "plain", "se", "ghost" or "dense" (with ``growth_rate`` and ``block_config``).
        token_dim: width of the T2T module's inner tokens.
        others: as upstream's ``T2T_ViT``; ``num_classes=0`` leaves the head out.
    """

    tokens_module: type[nn.Module] = T2TModule

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        tokens_type: str = "performer",
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        token_dim: int = 64,
        *,
        patch_size: int = 16,
        block: str = "plain",
        growth_rate: int = 32,
        block_config: Sequence[int] = (3, 4, 6, 3),
    ):
        check_model(type(self).__name__, locals())
        check_choice(type(self).__name__, "tokens_type", tokens_type, (*TOKENS_TYPES, "patch"))
        windows: tuple[Window, ...]
        if tokens_type == "patch":
            name, windows = "patch_embed", (square(patch_size, patch_size, 0),)
            tokeniser: nn.Module = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        else:
            name, windows = "tokens_to_token", T2T_WINDOWS
            tokeniser = self.tokens_module(img_size, tokens_type, in_chans, embed_dim, token_dim)
        super().__init__(
            name,
            tokeniser,
            windows=windows,
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
        )
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self._initialise()

    def reset_classifier(self, num_classes: int, global_pool: str = "") -> None:
        """A new, freshly initialised head for ``num_classes``; 0 leaves the head out."""
        check_options(type(self).__name__, {"num_classes": num_classes})
        weight = self.cls_token
        self.num_classes = num_classes
        head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        init_weights(head)
        self.head = head.to(device=weight.device, dtype=weight.dtype)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """The normalised class token (B, num_features)."""
        return self.encode(*self.tokens(x), slice(1))[:, 0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, num_classes)."""
        return self.head(self.forward_features(x))

    def forward_stages(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps for dense prediction: a list of (B, C, h, w) at strides 4, 8 and 16.

        The first two are the T2T module's tokens (token_dim channels), the last the backbone's normalised tokens
        (num_features channels). A "patch" tokeniser has only the last.
        """
        stages = [self.tokens(x)] if len(self.windows) == 1 else self.tokeniser(x, stages=True)
        tokens, grid = stages[-1]
        stages[-1] = self.encode(tokens, grid, slice(self.extra_tokens, None)), grid
        return [as_image(tokens, grid) for tokens, grid in stages]


class T2TViTSE(T2TViT):
    """T2T-ViT with squeeze-and-excitation blocks (upstream ``T2T_ViT_SE``)."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"block": "se", **options})


class T2TViTGhost(T2TViT):
    """T2T-ViT with ghost blocks (upstream ``T2T_ViT_Ghost``); ``mlp_ratio`` must be 3."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"block": "ghost", **options})


class T2TViTDense(T2TViT):
    """T2T-ViT with densely growing blocks (upstream ``T2T_ViT_Dense``).

    Args:
        growth_rate: channels a block adds.
        block_config: blocks per stage; a transition halves the width between stages.
        others: as :class:`T2TViT` (``depth`` has no meaning here).
    """

    def __init__(self, growth_rate: int = 32, block_config: Sequence[int] = (3, 4, 6, 3), **options: Any):
        super().__init__(growth_rate=growth_rate, block_config=block_config, **{"block": "dense", **options})

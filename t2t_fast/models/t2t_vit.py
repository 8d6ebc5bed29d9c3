"""T2T-ViT models with upstream's parameter names, for any image size.

Sources in yitu-opensource/T2T-ViT: ``models/t2t_vit.py``, ``t2t_vit_se.py``, ``t2t_vit_dense.py``,
``t2t_vit_ghost.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..modules.options import check_choice
from ..modules.t2t_module import TOKENS_TYPES, T2TModule
from ..ops._common.spec import T2T_WINDOWS, Window, square
from .backbone import Backbone, check_model
from .patch import PatchEmbed


class T2TViT(Backbone):
    """Tokens-to-token ViT: (B, in_chans, H, W) -> (B, num_classes) logits; H and W are free at call time.

    Args:
        img_size: int or (H, W); decides the stored position table.
        tokens_type: "performer", "transformer", "convolution" or "patch" (``patch_size`` pixels square).
        block: "plain", "se", "ghost" or "dense" (with ``growth_rate`` and ``block_config``).
        token_dim: width of the T2T module's inner tokens.
        global_pool: see :class:`Backbone`.
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
        global_pool: str = "token",
    ):
        check_model(type(self).__name__, locals())
        check_choice(type(self).__name__, "tokens_type", tokens_type, (*TOKENS_TYPES, "patch"))
        windows: tuple[Window, ...]
        stages: tuple[str, ...] = ()
        if tokens_type == "patch":
            name, windows = "patch_embed", (square(patch_size, patch_size, 0),)
            tokeniser: nn.Module = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        else:
            name, windows = "tokens_to_token", T2T_WINDOWS
            tokeniser = self.tokens_module(img_size, tokens_type, in_chans, embed_dim, token_dim)
            stages = ("soft_split0", "soft_split1") if tokens_type == "convolution" else ("attention1", "attention2")
        super().__init__(
            name,
            tokeniser,
            windows=windows,
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
            stages=[(f"{name}.{stage}", token_dim) for stage in stages],
            global_pool=global_pool,
        )
        self.head = self._make_head(self.num_features)
        self._initialise()


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

"""Models by name: every configuration is one line, a tokeniser and a backbone.

Sources: the factories of yitu-opensource/T2T-ViT and table 6 of the T2T-ViT paper ("from CNN to ViT").
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import FLOATING
from .t2t_vit import T2TViT, T2TViTDense, T2TViTGhost, T2TViTSE
from .vit import ViT

_t2t: Callable[..., dict[str, Any]] = partial(dict, cls=T2TViT)
_vit: Callable[..., dict[str, Any]] = partial(dict, cls=ViT, qkv_bias=False, norm_layer=nn.LayerNorm)
_vit_s = partial(_vit, embed_dim=768, depth=8, num_heads=8, mlp_ratio=3.0)

CONFIGS: dict[str, dict[str, Any]] = {
    # T2T-ViT, table 1 of the paper
    "t2t_vit_7": _t2t(embed_dim=256, depth=7, num_heads=4, mlp_ratio=2.0),
    "t2t_vit_10": _t2t(embed_dim=256, depth=10, num_heads=4, mlp_ratio=2.0),
    "t2t_vit_12": _t2t(embed_dim=256, depth=12, num_heads=4, mlp_ratio=2.0),
    "t2t_vit_14": _t2t(embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.0),
    "t2t_vit_19": _t2t(embed_dim=448, depth=19, num_heads=7, mlp_ratio=3.0),
    "t2t_vit_24": _t2t(embed_dim=512, depth=24, num_heads=8, mlp_ratio=3.0),
    "t2t_vit_t_14": _t2t(tokens_type="transformer", embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.0),
    "t2t_vit_t_19": _t2t(tokens_type="transformer", embed_dim=448, depth=19, num_heads=7, mlp_ratio=3.0),
    "t2t_vit_t_24": _t2t(tokens_type="transformer", embed_dim=512, depth=24, num_heads=8, mlp_ratio=3.0),
    # the tokens-type that the paper compares with (table 4, "T2T-ViT_c")
    "t2t_vit_c_14": _t2t(tokens_type="convolution", embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.0),
    # "from CNN to ViT", table 6, with T2T (its deep-narrow row is t2t_vit_14 itself)
    "t2t_vit_14_resnext": _t2t(embed_dim=384, depth=14, num_heads=32, mlp_ratio=3.0),
    "t2t_vit_14_wide": _t2t(embed_dim=768, depth=4, num_heads=12, mlp_ratio=3.0),
    "t2t_vit_14_se": dict(cls=T2TViTSE, embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.0),
    "t2t_vit_16_ghost": dict(cls=T2TViTGhost, embed_dim=384, depth=16, num_heads=6, mlp_ratio=3.0),
    "t2t_vit_dense": dict(
        cls=T2TViTDense, growth_rate=64, block_config=(3, 6, 6, 4), embed_dim=128, num_heads=8, mlp_ratio=2.0
    ),
    # the same without T2T; upstream has code for ViT-S/16 only. Depth and width of the others are the paper's, heads
    # and MLP ratio those of the corresponding T2T model or of ViT-S/16
    "vit_small_patch16_224": _vit_s(),
    "vit_deep_narrow_patch16_224": _vit(embed_dim=384, depth=16, num_heads=6, mlp_ratio=3.0),
    "vit_shallow_wide_patch16_224": _vit(embed_dim=1024, depth=4, num_heads=8, mlp_ratio=3.0),
    "vit_dense_patch16_224": _vit(
        block="dense", growth_rate=64, block_config=(3, 6, 6, 4), embed_dim=128, num_heads=8, mlp_ratio=2.0
    ),
    "vit_se_patch16_224": _vit_s(block="se"),
    "vit_resnext_patch16_224": _vit(embed_dim=768, depth=8, num_heads=32, mlp_ratio=3.0),
    "vit_ghost_patch16_224": _vit_s(block="ghost"),
    # the other plain ViTs of upstream's models/vit.py
    "vit_base_patch16_224": dict(cls=ViT),
    "vit_deit_tiny_patch16_224": dict(cls=ViT, embed_dim=192, num_heads=3),
    "vit_deit_small_patch16_224": dict(cls=ViT, embed_dim=384, num_heads=6),
    "vit_deit_tiny_distilled_patch16_224": dict(cls=ViT, embed_dim=192, num_heads=3, distilled=True),
}


def list_models() -> list[str]:
    """The names that :func:`create_model` accepts."""
    return list(CONFIGS)


def build_model(
    name: str,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> nn.Module:
    """A randomly initialised model by name; options override its configuration.

    Args:
        device, dtype: where and as what its parameters are made; ``None``: PyTorch's defaults.

    Raises:
        ValueError: unknown name. TypeError, ValueError: an option of the wrong type or value.
    """
    if name not in CONFIGS:
        raise ValueError(f"create_model: name must be one of {', '.join(CONFIGS)}, got {name!r}")
    if dtype is not None and dtype not in FLOATING:
        names = ", ".join(str(each).removeprefix("torch.") for each in FLOATING)
        raise ValueError(f"create_model: dtype must be one of {names}, or None, got {dtype!r}")
    config = {**CONFIGS[name], **options}
    with nullcontext() if device is None else torch.device(device):
        model: nn.Module = config.pop("cls")(**config)
    return model.to(dtype=dtype)

"""T2T-ViT as upstream computes it: the model of :mod:`t2t_fast.models` around upstream's T2T module and attention.

Sources in yitu-opensource/T2T-ViT: ``models/t2t_vit.py``, ``t2t_vit_se.py``, ``t2t_vit_dense.py``,
``t2t_vit_ghost.py``. ``tests/golden`` holds these models to upstream's own outputs and gradients.
"""

from collections.abc import Mapping

import torch
from torch import nn

from .. import models
from ..models.position import sinusoid_table as get_sinusoid_encoding
from .blocks import BLOCKS
from .layers import init_weights
from .t2t_module import T2T_module

__all__ = ["T2T_ViT", "T2T_ViT_Dense", "T2T_ViT_Ghost", "T2T_ViT_SE", "get_sinusoid_encoding", "init_weights"]


class Upstream:
    """Upstream's blocks, and its position table as it is: images of another size than ``img_size`` fail."""

    block_classes: Mapping[str, type[nn.Module]] = BLOCKS

    def tokens(self, x):
        return self.tokeniser(x), self.grid_size

    def encode(self, tokens, grid, kept=slice(None)):
        extra = [token for token in (self.cls_token, self.dist_token) if token is not None]
        x = torch.cat([*(token.expand(tokens.shape[0], -1, -1) for token in extra), tokens], dim=1)
        x = self.pos_drop(x + self.pos_embed)
        for block in self.blocks:
            x = self._run(block, x)
        return self.norm(x)[:, kept]


class T2T_ViT(Upstream, models.T2TViT):
    """(B, in_chans, img_size, img_size) -> (B, num_classes) logits; square images only."""

    tokens_module = T2T_module


class T2T_ViT_SE(Upstream, models.T2TViTSE):
    """T2T-ViT with squeeze-and-excitation blocks."""

    tokens_module = T2T_module


class T2T_ViT_Ghost(Upstream, models.T2TViTGhost):
    """T2T-ViT with ghost blocks; needs ``mlp_ratio=3``."""

    tokens_module = T2T_module


class T2T_ViT_Dense(Upstream, models.T2TViTDense):
    """T2T-ViT with densely growing blocks."""

    tokens_module = T2T_module


_CLASSES = {
    models.T2TViT: T2T_ViT,
    models.T2TViTSE: T2T_ViT_SE,
    models.T2TViTGhost: T2T_ViT_Ghost,
    models.T2TViTDense: T2T_ViT_Dense,
}


def factory(name, classes=_CLASSES):
    """Upstream's function ``name``: a randomly initialised model of ``models.CONFIGS``, in upstream's form."""
    config = dict(models.CONFIGS[name])
    cls = classes[config.pop("cls")]

    def build(**overrides):
        return cls(**{**config, **overrides})

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"Upstream's ``{name}``, randomly initialised; keyword arguments override its configuration."
    return build


t2t_vit_7 = factory("t2t_vit_7")
t2t_vit_10 = factory("t2t_vit_10")
t2t_vit_12 = factory("t2t_vit_12")
t2t_vit_14 = factory("t2t_vit_14")
t2t_vit_19 = factory("t2t_vit_19")
t2t_vit_24 = factory("t2t_vit_24")
t2t_vit_t_14 = factory("t2t_vit_t_14")
t2t_vit_t_19 = factory("t2t_vit_t_19")
t2t_vit_t_24 = factory("t2t_vit_t_24")
t2t_vit_14_resnext = factory("t2t_vit_14_resnext")
t2t_vit_14_wide = factory("t2t_vit_14_wide")
t2t_vit_14_se = factory("t2t_vit_14_se")
t2t_vit_16_ghost = factory("t2t_vit_16_ghost")
t2t_vit_dense = factory("t2t_vit_dense")

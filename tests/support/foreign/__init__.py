"""Models of other projects, written here from their structure: the shapes that ``swap`` meets outside upstream."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from t2t_fast import reference

from .. import vit_pytorch
from . import forks, grids, inpainting, mmpretrain, saliency


@dataclass(frozen=True)
class Foreign:
    """A model, its input in a test, and its options and input at a realistic size for a measurement."""

    build: Callable[..., nn.Module]
    shape: tuple[int, ...]
    real: dict[str, Any] = field(default_factory=dict)
    real_shape: tuple[int, ...] = (2, 3, 224, 224)

    def model(self, real: bool = False) -> nn.Module:
        torch.manual_seed(0)
        return self.build(**(self.real if real else {})).eval()

    def images(self, real: bool = False) -> torch.Tensor:
        shape = self.real_shape if real else self.shape
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _upstream(**options):
    small = {"img_size": 64, "num_classes": 10, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 3.0}
    return reference.T2T_ViT(tokens_type="performer", **{**small, **options})


def _vit_pytorch(**options):
    small = {"image_size": 32, "num_classes": 4, "dim": 24, "depth": 1, "heads": 2, "mlp_dim": 48, "dim_head": 8}
    small["channels"] = 1
    return vit_pytorch.T2TViT("reference", **{**small, **options})


def _lanl(image=(1, 60, 100), **options):
    return reference.lanl.Tokens2Token(image, (7, 3, 3), 1, 32, 48, **options)


def _high_quality(**options):
    return inpainting.ProPainter(**options, ffn=inpainting.HighQualityFeedForward)


def _m3net(**options):
    return saliency.Saliency(**options, layer=None)


_NET = {"size": 224, "dim": 256, "depth": 4, "heads": 4, "token_dim": 64}
_MAPS = {**_NET, "size": (224, 224), "dim": 384, "heads": 6}
_VIDEO = {"channels": 128, "dim": 512, "hidden": 1960, "heads": 4, "depth": 2}
_FIXED = {**_VIDEO, "size": (60, 108)}
_FRAMES = (2, 128, 60, 108)

FOREIGN = {
    "T2T-ViT": Foreign(
        _upstream, (2, 3, 64, 64), {"img_size": 224, "embed_dim": 256, "depth": 7, "num_heads": 4, "mlp_ratio": 2.0}
    ),
    "DVT": Foreign(forks.Dynamic, (2, 3, 64, 64), _NET),
    "AdaViT": Foreign(forks.Adaptive, (2, 3, 64, 64), _NET),
    "LocalViT": Foreign(forks.Local, (2, 3, 64, 64), _NET),
    "CrossViT": Foreign(forks.Cross, (2, 3, 96, 96), {**_NET, "size": 240}, (1, 3, 240, 240)),
    "shared blocks": Foreign(forks.Shared, (2, 3, 64, 64), _NET),
    "mmpretrain": Foreign(
        mmpretrain.T2TViT, (2, 3, 64, 96), {"dim": 384, "depth": 4, "heads": 6, "token_dim": 64}, (2, 3, 224, 224)
    ),
    "vit-pytorch": Foreign(
        _vit_pytorch,
        (2, 1, 32, 32),
        {
            "image_size": 112,
            "channels": 3,
            "num_classes": 1000,
            "dim": 256,
            "depth": 4,
            "heads": 4,
            "mlp_dim": 512,
            "dim_head": 64,
        },
        (1, 3, 112, 112),
    ),
    "LANL": Foreign(_lanl, (2, 1, 60, 100), {"image": (1, 400, 100)}, (4, 1, 400, 100)),
    "VST": Foreign(saliency.Saliency, (2, 3, 64, 64), _MAPS, (1, 3, 224, 224)),
    "M3Net": Foreign(_m3net, (2, 3, 64, 64), _MAPS, (1, 3, 224, 224)),
    "FuseFormer": Foreign(inpainting.FuseFormer, (2, 4, 20, 32), _FIXED, _FRAMES),
    "E2FGVI": Foreign(inpainting.E2FGVI, (2, 4, 20, 32), _FIXED, _FRAMES),
    "E2FGVI-HQ": Foreign(_high_quality, (2, 4, 20, 32), _VIDEO, _FRAMES),
    "ProPainter": Foreign(inpainting.ProPainter, (2, 4, 20, 32), _VIDEO, _FRAMES),
    "VOLO": Foreign(grids.Volo, (2, 3, 64, 96), {"dim": 192, "heads": 6, "depth": 4}, (4, 3, 224, 224)),
    "PTNet": Foreign(grids.PTNet, (2, 1, 16, 24), {"width": 32, "dim": 512, "heads": 4, "depth": 3}, (1, 1, 112, 128)),
}

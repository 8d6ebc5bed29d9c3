"""Peers from other packages, and their models of about a T2T-ViT's size.

These models compute other functions with weights of their own: they show the speed of alternatives to a T2T-ViT. If a
package is missing, its row is left out with that reason.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import NamedTuple

from t2t_fast.models.registry import CONFIGS

from .groups import LeftOut


def load(package, module):
    """A module of an optional package; :class:`LeftOut` says that it is not installed or cannot be imported."""
    try:
        return import_module(module)
    except ImportError as failure:
        if failure.name == module.partition(".")[0]:
            raise LeftOut(f"the package {package} is not installed") from failure
        raise LeftOut(f"the package {package} cannot be imported ({failure})") from failure


class Model(NamedTuple):
    """A peer model; ``beside``: T2T-ViTs that it is compared with; ``build``: (name of one, image side) -> module."""

    label: str
    beside: tuple[str, ...]
    build: Callable


def _vit_pytorch(name, size):
    """Its T2TViT has softmax attention over all 147 and 1323 columns where T2T-ViT has 64: far more work."""
    width, depth, ratio = (CONFIGS[name][key] for key in ("embed_dim", "depth", "mlp_ratio"))
    shape = dict(dim=width, depth=depth, heads=width // 64, mlp_dim=int(ratio * width), dim_head=64)
    return load("vit-pytorch", "vit_pytorch.t2t").T2TViT(image_size=size, num_classes=1000, **shape)


def _timm(model, name, size):
    sized = {} if model.startswith("resnet") else {"img_size": size}
    return load("timm", "timm").create_model(model, pretrained=False, **sized)


_14 = ("t2t_vit_14",)
MODELS = {
    "vit-pytorch": Model("vit-pytorch T2TViT, softmax attention, eager", ("t2t_vit_7", *_14), _vit_pytorch),
    "timm-vit-small": Model("timm ViT-S/16, 22 M, eager", _14, partial(_timm, "vit_small_patch16_224")),
    "timm-vit-little": Model("timm ViT-little/16, 23 M, eager", _14, partial(_timm, "vit_little_patch16_reg4_gap_256")),
    "timm-resnet50": Model("timm ResNet-50, 26 M, eager", _14, partial(_timm, "resnet50")),
}

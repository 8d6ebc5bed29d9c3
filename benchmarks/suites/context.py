"""Models of other packages, of about the same size, to see a T2T-ViT's speed beside what else one might train.

They compute other functions with weights of their own: yardsticks, no replacements. A package that is missing leaves
its row out, with the reason.
"""

from collections.abc import Callable
from typing import NamedTuple

from . import packages

SHAPES = {"t2t_vit_7": (256, 7, 4, 512), "t2t_vit_14": (384, 14, 6, 1152)}
"""Width, depth, heads and hidden width of the backbones, for the T2TViT of vit-pytorch."""


class ContextModel(NamedTuple):
    """``beside``: names of the T2T-ViTs that it stands beside; ``build``: (name of one, image side) -> module."""

    label: str
    beside: tuple[str, ...]
    build: Callable


def _vit_pytorch(name, size):
    """Its T2TViT has softmax attention over all 147 and 1323 columns where T2T-ViT has 64: far more work."""
    width, depth, heads, hidden = SHAPES[name]
    t2t = packages.load("vit-pytorch", "vit_pytorch.t2t")
    return t2t.T2TViT(
        image_size=size, num_classes=1000, dim=width, depth=depth, heads=heads, mlp_dim=hidden, dim_head=width // heads
    )


def _timm(model, **options):
    def build(name, size):
        sized = {} if model.startswith("resnet") else {"img_size": size}
        return packages.load("timm", "timm").create_model(model, pretrained=False, **sized, **options)

    return build


MODELS = {
    "vit-pytorch": ContextModel("vit-pytorch T2TViT, softmax attention, eager", tuple(SHAPES), _vit_pytorch),
    "timm-vit-small": ContextModel("timm ViT-S/16, 22 M, eager", ("t2t_vit_14",), _timm("vit_small_patch16_224")),
    "timm-vit-little": ContextModel(
        "timm ViT-little/16, 23 M, eager", ("t2t_vit_14",), _timm("vit_little_patch16_reg4_gap_256")
    ),
    "timm-resnet50": ContextModel("timm ResNet-50, 26 M, eager", ("t2t_vit_14",), _timm("resnet50")),
}


def beside(subject):
    """Names of the context models that stand beside a T2T-ViT."""
    return tuple(name for name, model in MODELS.items() if subject in model.beside)

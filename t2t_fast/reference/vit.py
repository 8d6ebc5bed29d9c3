"""The plain ViT, the paper's baseline, as upstream computes it.

Source: ``models/vit.py`` of yitu-opensource/T2T-ViT (itself after timm's VisionTransformer and DeiT).
"""

from .. import models
from .t2t_vit import Upstream, factory


class VisionTransformer(Upstream, models.ViT):
    """(B, in_chans, img_size, img_size) -> (B, num_classes) logits; arguments as :class:`t2t_fast.models.ViT`."""


_CLASSES = {models.ViT: VisionTransformer}

vit_small_patch16_224 = factory("vit_small_patch16_224", _CLASSES)
vit_base_patch16_224 = factory("vit_base_patch16_224", _CLASSES)
vit_deit_tiny_patch16_224 = factory("vit_deit_tiny_patch16_224", _CLASSES)
vit_deit_small_patch16_224 = factory("vit_deit_small_patch16_224", _CLASSES)
vit_deit_tiny_distilled_patch16_224 = factory("vit_deit_tiny_distilled_patch16_224", _CLASSES)

"""The family of the articles "Vision Transformers, Explained", under their names: non-square images, free kernels.

Source: the ``modules`` folder of lanl/vision_transformers_explained; parameters have its names and shapes. It differs
from the official T2T-ViT in three things: the token attention's scale is that of its output width, *every* attention
adds ``v`` to its output (the backbone's too), and the window follows from the kernel: stride ``(k + 1) // 2``, padding
``(k + 1) // 4``. H and W are free at call time.
"""

from .family import FAMILY
from .layers import Attention, Encoding, NeuralNet, TokenTransformer
from .model import T2TViT, ViTBackbone, ViTModel
from .tokens import PatchTokenization, Tokens2Token, check_image, count_tokens, split_window

__all__ = [
    "FAMILY",
    "Attention",
    "Encoding",
    "NeuralNet",
    "PatchTokenization",
    "T2TViT",
    "TokenTransformer",
    "Tokens2Token",
    "ViTBackbone",
    "ViTModel",
    "check_image",
    "count_tokens",
    "split_window",
]

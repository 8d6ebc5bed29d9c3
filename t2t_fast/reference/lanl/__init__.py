"""The models of the articles "Vision Transformers, Explained", as they compute them.

The backbone is that of :mod:`t2t_fast.models.lanl` with the attention of ``tokens.py``, which forms its weights.
``tests/golden`` holds these models to the articles' own outputs and gradients.
"""

import torch

from ...models import lanl
from ...models.lanl.layers import PlainEncoding
from ..layers import init_weights
from .tokens import Attention, NeuralNet, Patch_Tokenization, Tokens2Token, TokenTransformer, count_tokens

__all__ = [
    "Attention",
    "Encoding",
    "NeuralNet",
    "Patch_Tokenization",
    "T2T_ViT",
    "TokenTransformer",
    "Tokens2Token",
    "ViT_Backbone",
    "ViT_Model",
    "count_tokens",
]


class Encoding(PlainEncoding):
    """Backbone block: pre-norm attention and MLP, both with skips (and the skip through ``v`` inside)."""

    attention_layer = Attention


class ViT_Backbone(lanl.ViTBackbone):
    """Class token, positions of ``grid_size`` as they are, :class:`Encoding` blocks, norm and head."""

    block = Encoding

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.apply(init_weights)

    def forward(self, tokens, grid=None):
        """Tokens (B, T, token_len) -> (B, preds); ``grid`` is ignored, since the articles resize no positions."""
        x = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class ViT_Model(lanl.ViTModel):
    """Patch tokens and :class:`ViT_Backbone`: (B, C, H, W) -> (B, preds)."""

    tokeniser = Patch_Tokenization
    classifier = ViT_Backbone


class T2T_ViT(lanl.T2TViT):
    """:class:`Tokens2Token` and :class:`ViT_Backbone`: (B, C, H, W) -> (B, preds)."""

    tokeniser = Tokens2Token
    classifier = ViT_Backbone

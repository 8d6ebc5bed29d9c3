"""The golden cases' models, built from the eager reference package or from the fast modules.

A family is "reference" or "fast". :func:`build` returns the model, the map of its names to upstream's keys, the call
whose result is in the file, and the names of the backbone's blocks and of the T2T module for hooks.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

import t2t_fast
from t2t_fast import models, modules, reference
from t2t_fast.models import blocks as fast_blocks
from t2t_fast.reference import blocks as reference_blocks
from t2t_fast.reference import vit as reference_vit

from . import mmpretrain, vit_pytorch


@dataclass
class Built:
    """A model and its relation to the golden files."""

    model: nn.Module
    call: Callable
    upstream_key: Callable[[str], str] = lambda key: key
    blocks: str | None = None
    tokens: str | None = None


OFFICIAL = {
    "reference": {
        "t2t_vit:T2T_ViT": reference.T2T_ViT,
        "t2t_vit:T2T_module": reference.T2T_module,
        "t2t_vit_se:T2T_ViT_SE": reference.T2T_ViT_SE,
        "t2t_vit_dense:T2T_ViT_Dense": reference.T2T_ViT_Dense,
        "t2t_vit_ghost:T2T_ViT_Ghost": reference.T2T_ViT_Ghost,
        "transformer_block:Block": reference_blocks.Block,
        "t2t_vit_se:Block": reference_blocks.BlockSE,
        "t2t_vit_dense:Block": reference_blocks.BlockDense,
        "t2t_vit_ghost:Block": reference_blocks.BlockGhost,
        "t2t_vit_dense:Transition": reference_blocks.Transition,
        "vit:VisionTransformer": reference.VisionTransformer,
        "token_performer:Token_performer": reference.Token_performer,
        "token_transformer:Token_transformer": reference.Token_transformer,
    },
    "fast": {
        "t2t_vit:T2T_ViT": t2t_fast.T2TViT,
        "t2t_vit:T2T_module": t2t_fast.T2TModule,
        "t2t_vit_se:T2T_ViT_SE": models.T2TViTSE,
        "t2t_vit_dense:T2T_ViT_Dense": models.T2TViTDense,
        "t2t_vit_ghost:T2T_ViT_Ghost": models.T2TViTGhost,
        "transformer_block:Block": fast_blocks.Block,
        "t2t_vit_se:Block": fast_blocks.BlockSE,
        "t2t_vit_dense:Block": fast_blocks.BlockDense,
        "t2t_vit_ghost:Block": fast_blocks.BlockGhost,
        "t2t_vit_dense:Transition": fast_blocks.Transition,
        "vit:VisionTransformer": models.ViT,
        "token_performer:Token_performer": modules.TokenPerformer,
        "token_transformer:Token_transformer": modules.TokenTransformer,
    },
}

LANL = {
    "reference": {
        "t2t_vit:Tokens2Token": reference.lanl.Tokens2Token,
        "t2t_vit:T2T_ViT": reference.lanl.T2T_ViT,
        "vit:ViT_Model": reference.lanl.ViT_Model,
        "attention:Attention": reference.lanl.Attention,
        "t2t_vit:TokenTransformer": reference.lanl.TokenTransformer,
        "vit:Encoding": reference.lanl.Encoding,
    },
    "fast": {
        "t2t_vit:Tokens2Token": models.lanl.Tokens2Token,
        "t2t_vit:T2T_ViT": models.lanl.T2TViT,
        "vit:ViT_Model": models.lanl.ViTModel,
        "attention:Attention": models.lanl.Attention,
        "t2t_vit:TokenTransformer": models.lanl.TokenTransformer,
        "vit:Encoding": models.lanl.Encoding,
    },
}


def _official_factory(family, name):
    if family == "fast":
        return lambda **options: models.build_model(name, **options)
    return getattr(reference, name, None) or getattr(reference_vit, name)


def tuples(options):
    """JSON lists as tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def build(case, family):
    """The model of a golden case, in one of the two families."""
    if case["upstream"] == "mmpretrain":
        model = mmpretrain.build(case, family)
        return Built(model, model, mmpretrain.upstream_key, "net.blocks", "net.tokens_to_token")
    if case["upstream"] == "vit-pytorch":
        model = vit_pytorch.T2TViT(family, **tuples(case["kwargs"]))
        return Built(model, model, tokens="to_patch_embedding")
    options = tuples(case["kwargs"])
    if case["upstream"] == "lanl":
        model = LANL[family][case["target"]](**options)
        backbone = next((name for name in ("vit_backbone", "backbone") if hasattr(model, name)), None)
        tokens = next((name for name in ("tokens_to_token", "patch_tokens") if hasattr(model, name)), None)
        return Built(model, model, blocks=backbone and f"{backbone}.blocks", tokens=tokens)
    known = OFFICIAL[family].get(case["target"])
    model = (known or _official_factory(family, case["target"].partition(":")[2]))(**options)
    tokens = next((name for name in ("tokens_to_token", "patch_embed") if hasattr(model, name)), None)
    return Built(model, model, blocks="blocks" if hasattr(model, "blocks") else None, tokens=tokens)

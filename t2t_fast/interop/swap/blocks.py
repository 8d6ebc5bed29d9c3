"""The rules of transformer blocks, attention and MLP: one record for each way in which projects name their parts."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F

from ...functional import layer_norm_linear, performer_attention
from ...models.family import fused_rule
from ...modules import TokenTransformer, remembered
from ...modules.block import (
    ATTENTION,
    MLP,
    Children,
    Fused,
    FusedAttention,
    FusedAttentionGhost,
    FusedAttentionSE,
    FusedBlock,
    FusedBlockDense,
    FusedBlockSE,
    FusedMlp,
    FusedMlpGhost,
    FusedResidual,
    Parts,
    block_parts,
    mlp,
)

TIMM_ATTENTION = ATTENTION._replace(idle=("q_norm", "k_norm", "norm", "gate"))
TIMM_MLP = MLP._replace(hidden_drop="drop1", drop="drop2", idle=("norm",))


class TimmAttention(FusedAttention):
    """Self-attention of timm."""

    parts = TIMM_ATTENTION


class TimmMlp(FusedMlp):
    """MLP of timm."""

    parts = TIMM_MLP


class TimmBlock(FusedBlock):
    """Block of timm's vision transformers."""

    parts = block_parts(
        TIMM_ATTENTION,
        "attn",
        TIMM_MLP,
        "mlp",
        norm1="norm1",
        norm2="norm2",
        drop_path1="drop_path1",
        drop_path2="drop_path2",
        idle=("ls1", "ls2"),
    )


class PreNormAttention(FusedAttention):
    """Self-attention of vit-pytorch, with its LayerNorm."""

    parts = Parts(
        norm1="norm",
        qkv="to_qkv",
        num_heads="heads",
        scale="scale",
        softmax="attend",
        attn_drop="dropout",
        proj="to_out.0",
        proj_drop="to_out.1",
    )


class PreNormHead(PreNormAttention):
    """The same with one head of the tokens' width, which has no projection."""

    parts = PreNormAttention.parts._replace(proj="", proj_drop="", idle=("to_out",))


class PreNormMlp(FusedMlp):
    """MLP of vit-pytorch, with its LayerNorm."""

    parts = Parts(norm2="net.0", fc1="net.1", act="net.2", hidden_drop="net.3", fc2="net.4", drop="net.5")


_MMPRETRAIN = block_parts(
    Parts(qkv="qkv", num_heads="num_heads", proj="proj", proj_drop="proj_drop", idle=("gamma1",)),
    "attn",
    Parts(
        fc1="layers.0.0", act="layers.0.1", hidden_drop="layers.0.2", fc2="layers.1", drop="layers.2", idle=("gamma2",)
    ),
    "ffn",
    norm1="ln1",
    norm2="ln2",
    drop_path1="attn.out_drop",
    drop_path2="ffn.dropout_layer",
)


def _mmpretrain_scale(layer: Any) -> float:
    """The factor of q k^T: mmpretrain's attention divides by its ``scale``, by default the root of the head width."""
    scale = getattr(layer.attn.scaled_dot_product_attention, "keywords", {}).get("scale")
    return layer.attn.head_dims**-0.5 if scale is None else 1.0 / scale


class MmpretrainBlock(FusedBlock):
    """Block of mmpretrain's T2T-ViT."""

    parts = _MMPRETRAIN
    _scale = _mmpretrain_scale


class MmpretrainTokenTransformer(TokenTransformer):
    """Layer of mmpretrain's T2T module; its unfused form is the original ``forward``."""

    parts = _MMPRETRAIN
    containers = ()
    _scale = _mmpretrain_scale

    def _weights_dropout(self) -> float:
        rate: float = self.attn.attn_drop if self.attn.training else 0.0
        return rate


class PerformerBlock(Fused):
    """A ``Token_performer`` whose skip is its input, as in the decoders of VST: input and output have one width."""

    parts = Parts(
        norm1="norm1",
        qkv="kqv",
        proj="proj",
        proj_drop="dp",
        norm2="norm2",
        fc1="mlp.0",
        act="mlp.1",
        fc2="mlp.2",
        drop="mlp.3",
    )

    def dependencies(self, x: torch.Tensor) -> tuple[remembered.Dependencies, Mapping[str, Any]] | None:
        call = super().dependencies(x)
        if call is None:
            return None
        inner: Any = self
        (tensors, options), children = call
        return ((*tensors, inner.w), (*options, inner.epsilon)), children

    def _fused(self, x: torch.Tensor, children: Children) -> torch.Tensor:
        inner: Any = self
        tensors = (x, *children.weights("norm1", "kqv"))
        packed, x = remembered.run(children.entry, layer_norm_linear, tensors, norm_eps=children.eps("norm1"))
        k, q, v = packed.chunk(3, dim=-1)
        y = F.linear(performer_attention(q, k, v, inner.w, inner.epsilon), *children.weights("proj"))
        return mlp(self, x, children, y, branch_drop=children.rate("dp"))


class OnGrid(Fused):
    """A fused module whose tokens are a grid (B, H, W, dim), as in VOLO."""

    def forward(self, x: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        """(B, H, W, dim) -> the same shape; anything else runs the original ``forward``."""
        if others or named or x.ndim != 4 or self.obstacle() is not None:
            return self._unfused(x, *others, **named)
        return super().forward(x.flatten(1, 2)).view(x.shape)


class GridBlock(OnGrid, FusedBlock):
    """A block of tokens on a grid."""


class GridAttention(OnGrid, FusedAttention):
    """Self-attention of tokens on a grid."""


class GridMlpBlock(FusedResidual):
    """A block of tokens on a grid with any attention, which is called: everything behind it is fused."""

    parts = block_parts(
        Parts(), "attn", MLP, "mlp", norm2="norm2", drop_path1="drop_path", drop_path2="drop_path",
        called=("norm1", "attn"),
    )  # fmt: skip

    def forward(self, x: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        """(B, H, W, dim) -> the same shape; anything else runs the original ``forward``."""
        if others or named or x.ndim != 4 or self.obstacle() is not None:
            return self._unfused(x, *others, **named)
        inner: Any = self
        branch = inner.attn(inner.norm1(x))
        paths = (path for path in self.parts.checks() if path not in self.parts.idle)
        children = Children({path: attrgetter(path)(self) for path in paths}, None)
        drops = {"branch_path": self.parts.drop_path1, "drop_path": self.parts.drop_path2}
        rates = {name: children.rate(path) for name, path in drops.items()}
        return mlp(self, x.flatten(1, 2), children, branch.flatten(1, 2), **rates).view(x.shape)


class TimmGridBlock(OnGrid, TimmBlock):
    """A block of timm's VOLO."""


class TimmGridMlpBlock(GridMlpBlock):
    """A block of timm's VOLO with outlook attention."""

    parts = block_parts(
        Parts(), "attn", TIMM_MLP, "mlp", norm2="norm2", drop_path1="drop_path1", drop_path2="drop_path2",
        called=("norm1", "attn"),
    )  # fmt: skip


def _mmpretrain_refusal(module: Any) -> str | None:
    if module.v_shortcut or module.attn.v_shortcut:
        return "v_shortcut is True"
    return f"attn.attn_drop is {module.attn.attn_drop}" if module.attn.attn_drop else None


def _mmpretrain_token_refusal(module: Any) -> str | None:
    heads = module.attn.num_heads
    return None if heads == 1 else f"attn.num_heads is {heads}: its skip through v is defined for 1 head only"


def _keeps_width(module: Any) -> bool:
    """Whether a block's tokens keep their width, unlike in a token layer with the same names."""
    shapes = [getattr(norm, "normalized_shape", None) for norm in (module.norm1, module.norm2)]
    return shapes[0] is not None and shapes[0] == shapes[1]


_GRID = (2, 2, 3)
_MMPRETRAIN_ATTRIBUTES = {
    "": ("v_shortcut",),
    "attn": ("head_dims", "embed_dims", "attn_drop", "scaled_dot_product_attention", "v_shortcut"),
    "ffn": ("add_identity",),
}
_HEADS = {"attn": ("head_dim",)}
_TIMM = ("fused_attn", "head_dim", "attn_dim")

PERFORMER_BLOCK = fused_rule(
    "Token_performer with a skip of its input",
    PerformerBlock,
    attributes={"": ("emb", "m", "head_cnt", "epsilon", "w")},
    parameters=("w",),
    refusal=lambda module: None if hasattr(module, "epsilon") else "it has no epsilon",
)
"""Behind the rule of ``Token_performer``, which has the same structure."""

RULES = (
    PERFORMER_BLOCK,
    fused_rule("Block of T2T_ViT_SE", FusedBlockSE, attributes=_HEADS),
    fused_rule("Block of T2T_ViT_Dense", FusedBlockDense, attributes=_HEADS),
    fused_rule("Block of timm", TimmBlock, attributes={"attn": _TIMM}),
    fused_rule("Block", FusedBlock, attributes=_HEADS),
    fused_rule(
        "T2TTransformerLayer of mmpretrain's T2T module",
        MmpretrainTokenTransformer,
        "soft_split_linear",
        attributes=_MMPRETRAIN_ATTRIBUTES,
        only=lambda module: getattr(module, "v_shortcut", False),
        refusal=_mmpretrain_token_refusal,
    ),
    fused_rule(
        "T2TTransformerLayer of mmpretrain",
        MmpretrainBlock,
        attributes=_MMPRETRAIN_ATTRIBUTES,
        refusal=_mmpretrain_refusal,
    ),
    fused_rule("Block with another attention or MLP", FusedResidual, "add_layer_norm", only=_keeps_width),
    fused_rule("Block on a grid", GridBlock, attributes=_HEADS, probe=_GRID),
    fused_rule("Block on a grid with another attention", GridMlpBlock, only=_keeps_width, probe=_GRID),
    fused_rule("Block of timm's VOLO", TimmGridBlock, attributes={"attn": _TIMM}, probe=_GRID),
    fused_rule("Block of timm's VOLO with another attention", TimmGridMlpBlock, only=_keeps_width, probe=_GRID),
    fused_rule("Attention of T2T_ViT_Ghost", FusedAttentionGhost, "", attributes={"": _HEADS["attn"]}),
    fused_rule("Mlp of T2T_ViT_Ghost", FusedMlpGhost, ""),
    fused_rule("Attention of T2T_ViT_SE", FusedAttentionSE, "", attributes={"": _HEADS["attn"]}),
    fused_rule("Attention of timm", TimmAttention, "", attributes={"": _TIMM}),
    fused_rule("Attention", FusedAttention, "", attributes={"": _HEADS["attn"]}),
    fused_rule("Attention on a grid", GridAttention, "", attributes={"": _HEADS["attn"]}, probe=_GRID),
    fused_rule("Mlp of timm", TimmMlp),
    fused_rule("Mlp", FusedMlp),
    fused_rule("Attention of vit-pytorch", PreNormAttention, "layer_norm_linear"),
    fused_rule("Attention of vit-pytorch with one head", PreNormHead, "layer_norm_linear"),
    fused_rule("FeedForward of vit-pytorch", PreNormMlp),
)

"""How ``swap`` finds modules of the articles' own code, and how their checkpoints are recognised."""

from typing import Any

from ..family import Family, Form, Rule, fused_rule, has_token_layer, token_probes, tokeniser_rule
from .layers import Attention, FusedEncoding, NeuralNet, TokenTransformer
from .tokens import Tokens2Token


def _is_token_transformer(module: Any) -> bool:
    """The backbone block has the same children, but equal widths and a skip around ``attn``."""
    return has_token_layer(module, "neuralnet") and module.attn.qkv.in_features != module.attn.proj.in_features


def _refusal(module: Any) -> str | None:
    width, heads = module.attn.proj.in_features, module.attn.num_heads
    return f"attn.num_heads {heads} does not divide {width}" if width % heads else None


TOKENISER = tokeniser_rule(
    "Tokens2Token",
    Form(
        Tokens2Token,
        # k0, s0, p0, ... repeat the kernels, strides and paddings of the unfolds
        attributes=("token_chan", "windows", "num_tokens", *(f"{letter}{i}" for letter in "ksp" for i in range(3))),
        label="lanl.Tokens2Token",
    ),
    layers=("transformer1", "transformer2"),
    first_linear=("attn.qkv",),
)
LAYER = Rule(
    name="TokenTransformer",
    structure="norm1, norm2, attn (qkv, proj, scale, num_heads), neuralnet (fc1, act, fc2); no skip around attn",
    form=Form(TokenTransformer, ("norm1", "attn", "norm2", "neuralnet"), label="lanl.TokenTransformer"),
    matches=_is_token_transformer,
    refusal=_refusal,
    probes=token_probes,
    operator="soft_split_linear",
    inner={
        "attn": Form(Attention, ("qkv", "proj"), attributes=("num_heads", "chan", "head_dim", "scale")),
        "neuralnet": Form(NeuralNet, ("fc1", "act", "fc2")),
    },
)
BLOCK = fused_rule("Encoding", FusedEncoding, attributes={"attn": ("chan", "head_dim")})
FAMILY = Family(
    name="lanl",
    swap_rules=(TOKENISER, LAYER, BLOCK),
    checkpoint_names=r"(?<![^.])tokens_to_token\.transformer[12]\.",
    model="t2t_fast.models.lanl.T2TViT",
)

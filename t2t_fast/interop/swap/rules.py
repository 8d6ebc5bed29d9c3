"""The rules of ``swap``, one record each: upstream's modules here, and those that families of models declare.

To add a rule, add a :class:`Rule` to ``RULES``, or to the ``swap_rules`` of a family in :mod:`t2t_fast.models`.
"""

from typing import Any

from torch import nn

from ...errors import check_pair
from ...models import FAMILIES
from ...models.family import Form, Rule, has, has_token_layer, token_probes, tokeniser_rule, window_refusal
from ...modules import Fold, T2TModule, TokenPerformer, TokenTransformer, Unfold
from ...modules.t2t_module import window_of
from ...modules.token_transformer import Mlp, TokenAttention
from ...ops._common.spec import Window
from . import blocks, windowed


def _is_performer(module: Any) -> bool:
    linear, norm = dict.fromkeys(("kqv", "proj"), nn.Linear), dict.fromkeys(("norm1", "norm2"), nn.LayerNorm)
    return has(module, **linear, **norm, mlp=nn.Sequential, w=nn.Parameter)


def _performer_refusal(module: Any) -> str | None:
    if not has(module, dp=nn.Module) or not hasattr(module, "epsilon"):
        return "has kqv, proj and w of a Token_performer, but no dp or no epsilon"
    if len(module.mlp) != 4:
        return f"mlp has {len(module.mlp)} layers, expected Linear, GELU, Linear, Dropout"
    width, shape, packed = module.proj.in_features, tuple(module.w.shape), module.kqv.out_features
    if len(shape) != 2 or shape[1] != width or packed != 3 * width:
        return f"w {shape} and kqv ({packed}) do not fit the token width {width}"
    if getattr(module, "m", shape[0]) != shape[0]:
        return f"m is {module.m}, but w has {shape[0]} random features"
    return None


def _is_token_transformer(module: Any) -> bool:
    return has_token_layer(module, "mlp") and hasattr(module.attn, "in_dim")


def _token_transformer_refusal(module: Any) -> str | None:
    if module.attn.num_heads != 1:
        return f"attn.num_heads is {module.attn.num_heads}: upstream's skip through v is defined for 1 head only"
    if not has(module.attn, attn_drop=nn.Dropout, proj_drop=nn.Dropout):
        return "attn has no attn_drop or no proj_drop"
    return None


def _window(module: Any) -> Window:
    """The window of a module that :func:`window_refusal` accepts."""
    window: Any = window_of(module)
    return window


def _unfold_probes(module: Any) -> list[tuple[int, ...]]:
    height, width = _window(module).kernel
    return [(1, 2, height + 3, width + 2)]


def _fold_grid(module: Any) -> tuple[int, int]:
    return _window(module).grid(*check_pair("swap", "output_size", module.output_size, minimum=1))


def _fold_refusal(module: Any) -> str | None:
    reason = window_refusal(module)
    if reason is not None:
        return reason
    try:
        fits = min(_fold_grid(module)) >= 1
    except (TypeError, ValueError) as error:
        return str(error)
    return None if fits else f"its window {_window(module)} does not fit into its output_size {module.output_size}"


def _fold_probes(module: Any) -> list[tuple[int, ...]]:
    h, w = _fold_grid(module)
    return [(1, 2 * _window(module).taps, h * w)]


RULES = (
    tokeniser_rule(
        "T2T_module",
        Form(T2TModule, attributes=("num_patches", "tokens_type")),
        layers=("attention1", "attention2"),
        first_linear=("kqv", "attn.qkv"),
    ),
    Rule(
        name="Token_performer",
        structure=(
            "kqv, proj (Linear), norm1, norm2 (LayerNorm), mlp (Sequential of 4), dp, parameter w (m, emb), epsilon"
        ),
        form=Form(
            TokenPerformer,
            children=("kqv", "dp", "proj", "norm1", "norm2", "mlp"),
            parameters=("w",),
            attributes=("emb", "m", "head_cnt", "epsilon"),
        ),
        matches=_is_performer,
        refusal=_performer_refusal,
        probes=lambda module: [(2, 7, module.kqv.in_features)],
        operator="performer_layer",
    ),
    Rule(
        name="Token_transformer",
        structure=(
            "norm1, norm2, attn (qkv, proj, scale, num_heads, in_dim), mlp (fc1, act, fc2), drop_path; "
            "no skip around attn"
        ),
        form=Form(TokenTransformer, ("norm1", "attn", "drop_path", "norm2", "mlp")),
        matches=_is_token_transformer,
        refusal=_token_transformer_refusal,
        probes=token_probes,
        operator="soft_split_linear",
        inner={
            "attn": Form(
                TokenAttention,
                ("qkv", "attn_drop", "proj", "proj_drop"),
                attributes=("num_heads", "in_dim", "scale"),
            ),
            "mlp": Form(Mlp, ("fc1", "act", "fc2", "drop")),
        },
    ),
    *blocks.RULES,
    *windowed.RULES,
    Rule(
        name="nn.Unfold",
        structure="if include names it; also soft_split0..2 of a T2T module that cannot be swapped as a whole",
        form=Form(Unfold),
        matches=lambda module: isinstance(module, nn.Unfold),
        refusal=window_refusal,
        probes=_unfold_probes,
        operator="soft_split",
        caution=(
            "its result would be a transposed view, on which view() fails if it merges the first two dimensions; if "
            "the code behind it takes any strides, name it in include"
        ),
    ),
    Rule(
        name="nn.Fold",
        structure="of any name",
        form=Form(Fold),
        matches=lambda module: isinstance(module, nn.Fold),
        refusal=_fold_refusal,
        probes=_fold_probes,
        operator="soft_composition",
    ),
    *(rule for family in FAMILIES for rule in family.swap_rules),
)

FAST = tuple(rule.form.kind for rule in RULES)
"""The classes of fast modules, swapped or constructed."""

"""Bytes and FLOPs of the T2T module and whole models; ``t2t_fast/ops/_common/costs.py`` has those of the operators."""

from math import prod

from t2t_fast.ops._common.costs import (
    FEATURES,
    WIDTH,
    Cost,
    Kernel,
    chain,
    fused_fold_unfold,
    performer_attention,
    performer_layer,
    soft_composition,
    soft_split,
    soft_split_linear,
    token_mlp,
)
from t2t_fast.ops._common.spec import T2T_WINDOWS

__all__ = [
    "FEATURES",
    "WIDTH",
    "Cost",
    "Kernel",
    "backbone",
    "chain",
    "fused_fold_unfold",
    "performer_attention",
    "performer_layer",
    "soft_composition",
    "soft_split",
    "soft_split_linear",
    "softmax_attention",
    "t2t_module",
    "t2t_stages",
    "t2t_vit",
    "token_mlp",
]


def softmax_attention(length, width=WIDTH, element=2):
    """Flash attention with one head; backward rebuilds the weights from the saved logsumexp (4 bytes a token)."""
    row, product = width * length * element, 4 * length * length * width
    return Cost(
        (Kernel(4 * row + 4 * length, product),),
        (Kernel(9 * row + 8 * length, 2.5 * product),),
        4 * row + 4 * length,
    )


def t2t_stages(tokens_type, size=224, embed_dim=384, element=2):
    """The three stages of a T2T module, a :class:`Cost` each."""
    stages, channels, height = [], 3, size
    for index, window in enumerate(T2T_WINDOWS):
        size = channels, height, height, window
        if index == 2:
            stages.append(soft_split_linear(*size, embed_dim, element, norm=False))
            break
        if tokens_type == "performer":
            stages.append(performer_layer(*size, element, image_gradient=index > 0))
        else:
            length = prod(window.grid(height, height))
            first = soft_split_linear(*size, 3 * WIDTH, element, image_gradient=index > 0)
            attention, tail = softmax_attention(length, element=element), token_mlp(length, element=element)
            # the tail keeps y and v, which the attention has kept already
            stages.append(chain(first, attention, tail._replace(saved=0)))
        channels, height = WIDTH, window.grid(height, height)[0]
    return stages


def t2t_module(tokens_type, size=224, embed_dim=384, element=2):
    """A whole T2T module."""
    return chain(*t2t_stages(tokens_type, size, embed_dim, element))


def backbone(tokens, dim, depth, mlp_ratio, element=2):
    """Plain transformer blocks with LayerNorm fused into the product that follows and flash attention."""
    row = tokens * dim * element

    def product(columns_in, columns_out):
        return 2 * tokens * columns_in * columns_out

    hidden = dim * mlp_ratio
    attention = 4 * tokens * tokens * dim
    forward = (
        Kernel(4 * row, product(dim, 3 * dim)),
        Kernel(4 * row, attention),
        Kernel(3 * row, product(dim, dim)),
        Kernel((1 + mlp_ratio) * row, product(dim, hidden)),
        Kernel((mlp_ratio + 2) * row, product(hidden, dim)),
    )
    backward = (
        Kernel(8 * row, 2 * product(dim, 3 * dim)),
        Kernel(9 * row, 2.5 * attention),
        Kernel(5 * row, 2 * product(dim, dim)),
        Kernel((3 + 3 * mlp_ratio) * row, 2 * product(dim, hidden)),
        Kernel((3 + 3 * mlp_ratio) * row, 2 * product(hidden, dim)),
    )
    return Cost(forward * depth, backward * depth)


def t2t_vit(tokens_type, size, dim, depth, mlp_ratio, element=2):
    """A whole T2T-ViT without its classifier; what the backbone keeps for backward is not counted."""
    tokens = (size // 16) ** 2 + 1
    module = t2t_module(tokens_type, size, dim, element)._replace(saved=0)
    return chain(module, backbone(tokens, dim, depth, mlp_ratio, element))

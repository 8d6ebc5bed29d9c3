"""Bytes and FLOPs of the T2T module and whole models; ``t2t_fast/ops/_common/costs.py`` has those of the operators."""

from math import prod

from t2t_fast.models.registry import CONFIGS
from t2t_fast.ops._common.costs import (
    WIDTH,
    Cost,
    Kernel,
    block,
    chain,
    performer_layer,
    soft_split_linear,
    token_mlp,
)
from t2t_fast.ops._common.spec import T2T_WINDOWS


def softmax_attention(length, width=WIDTH, element=2):
    """Flash attention with one head; backward rebuilds the weights from the saved logsumexp (4 bytes a token)."""
    row, product = width * length * element, 4 * length * length * width
    forward, backward = Kernel(4 * row + 4 * length, product), Kernel(9 * row + 8 * length, 2.5 * product)
    return Cost((forward,), (backward,), 4 * row + 4 * length)


def t2t_stages(tokens_type, size=224, embed_dim=384, element=2):
    """The three stages of a T2T module, a :class:`Cost` each."""
    stages, channels, height = [], 3, size
    for index, window in enumerate(T2T_WINDOWS):
        shape, image_gradient = (channels, height, height, window), index > 0
        if index == 2:
            stages.append(soft_split_linear(*shape, embed_dim, element, norm=False))
        elif tokens_type == "performer":
            stages.append(performer_layer(*shape, element, image_gradient=image_gradient))
        else:
            length = prod(window.grid(height, height))
            first = soft_split_linear(*shape, 3 * WIDTH, element, image_gradient=image_gradient)
            # token_mlp keeps y and v, which the attention has kept already
            mlp = token_mlp(length, element=element)._replace(saved=0)
            stages.append(chain(first, softmax_attention(length, element=element), mlp))
        channels, height = WIDTH, window.grid(height, height)[0]
    return stages


def t2t_module(tokens_type, size=224, embed_dim=384, element=2):
    """A whole T2T module."""
    return chain(*t2t_stages(tokens_type, size, embed_dim, element))


def t2t_vit(name, size, element=2):
    """A whole T2T-ViT without its classifier; what is kept for backward is not counted."""
    config = CONFIGS[name]
    width, tokens = config["embed_dim"], (size // 16) ** 2 + 1
    module = t2t_module(config.get("tokens_type", "performer"), size, width, element)._replace(saved=0)
    each = block(tokens, width, int(config["mlp_ratio"] * width), config["num_heads"], element)._replace(saved=0)
    return chain(module, *[each] * config["depth"])

"""Bytes and FLOPs of the T2T module and whole models; ``t2t_fast/ops/_common/costs.py`` has those of the operators."""

from math import prod

from t2t_fast.ops._common.costs import WIDTH, Cost, Kernel, chain, performer_layer, soft_split_linear, token_mlp
from t2t_fast.ops._common.spec import T2T_WINDOWS

# (tokens_type, width, depth, MLP ratio) of the measured models; heads have 64 columns
MODELS = {
    "t2t_vit_7": ("performer", 256, 7, 2),
    "t2t_vit_10": ("performer", 256, 10, 2),
    "t2t_vit_12": ("performer", 256, 12, 2),
    "t2t_vit_14": ("performer", 384, 14, 3),
    "t2t_vit_t_14": ("transformer", 384, 14, 3),
}


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


def backbone(tokens, dim, depth, mlp_ratio, element=2):
    """Plain transformer blocks with flash attention, and LayerNorm fused into the following product."""
    row, hidden, attention = tokens * dim * element, dim * mlp_ratio, 4 * tokens * tokens * dim

    def product(columns_in, columns_out):
        return 2 * tokens * columns_in * columns_out

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


def t2t_vit(name, size, element=2):
    """A whole T2T-ViT without its classifier; what the backbone keeps for backward is not counted."""
    tokens_type, dim, depth, mlp_ratio = MODELS[name]
    module = t2t_module(tokens_type, size, dim, element)._replace(saved=0)
    return chain(module, backbone((size // 16) ** 2 + 1, dim, depth, mlp_ratio, element))

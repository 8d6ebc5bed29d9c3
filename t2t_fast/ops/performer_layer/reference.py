"""A Performer layer as upstream computes it: soft split, LayerNorm, ``kqv``, attention, then token_mlp."""

from ..performer_attention import reference as attention
from ..soft_split_linear import reference as split
from ..token_mlp import reference as mlp


def forward(
    x,
    kqv_weight,
    kqv_bias,
    norm1_weight,
    norm1_bias,
    norm1_eps,
    kernel,
    stride,
    padding,
    dtype,
    pixels,
    w,
    eps,
    *arguments,
):
    """(B, C, H, W) -> (B, L, E), in ``dtype``, as kqv. Autograd saves every intermediate, also with ``recompute``."""
    *mlp_arguments, _ = arguments
    linear = (kqv_weight, kqv_bias, norm1_weight, norm1_bias, norm1_eps)
    kqv = split.forward(x, *linear, kernel, stride, padding, dtype, pixels)
    k, q, v = kqv.chunk(3, dim=-1)
    return mlp.forward(attention.forward(q, k, v, w, eps), v, *mlp_arguments)

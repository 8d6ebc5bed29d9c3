"""A Performer layer as upstream computes it: soft split, LayerNorm, ``kqv``, attention, then the tail."""

from ..performer_attention import reference as attention
from ..soft_split_linear import reference as split
from ..token_mlp import reference as tail


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
    w,
    eps,
    *tail_arguments,
):
    """(B, C, H, W) -> (B, L, E), in ``dtype``, as kqv."""
    kqv = split.forward(x, kqv_weight, kqv_bias, norm1_weight, norm1_bias, norm1_eps, kernel, stride, padding, dtype)
    k, q, v = kqv.chunk(3, dim=-1)
    return tail.forward(attention.forward(q, k, v, w, eps), v, *tail_arguments)

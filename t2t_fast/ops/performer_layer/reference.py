"""A Performer layer after its ``kqv`` Linear, as upstream computes it: attention, then the tail."""

from ..performer_attention import reference as attention
from ..token_mlp import reference as tail


def forward(kqv, w, eps, *tail_arguments):
    """(B, L, 3E) packed k, q, v -> (B, L, E)."""
    k, q, v = kqv.chunk(3, dim=-1)
    return tail.forward(attention.forward(q, k, v, w, eps), v, *tail_arguments)

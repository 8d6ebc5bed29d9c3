"""``t2t_fast::performer_block``: a whole Performer layer after its ``kqv`` Linear.

The one operator that is made of others: it may import the implementations of ``performer_attention`` and
``token_mlp``, and nothing else crosses between operators.
"""

from ...backends import Implementation, always
from ..library import define
from ..token_mlp.op import SIGNATURE
from . import aten_impl, reference

performer_block = define(
    "performer_block",
    "Tensor kqv, Tensor w, float eps, " + SIGNATURE,
    implementations={
        "aten": Implementation(aten_impl.forward, always),
        "reference": Implementation(reference.forward, always),
    },
    absent={
        "triton": "no Triton kernel in this version",
        "native": "no native kernel in this version",
    },
    autocast=lambda call, dtype, kqv, *rest: call(kqv.to(dtype), *rest),
)

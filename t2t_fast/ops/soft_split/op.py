"""``t2t_fast::soft_split``: overlapping windows of an image as tokens."""

from ...backends import Implementation, always
from .._common import transforms
from .._common.library import define
from . import aten, native, reference

soft_split = define(
    "soft_split",
    "Tensor x, int[2] kernel, int[2] stride, int[2] padding",
    implementations={
        "native": Implementation(native.forward, native.supports),
        "aten": Implementation(aten.forward, transforms.plain),
        "reference": Implementation(reference.forward, always),
    },
    absent={
        "triton": "no Triton kernel planned: where the split feeds a Linear, soft_split_linear never forms its tokens",
    },
    # The operator is a copy and keeps its input's dtype under autocast, like nn.Unfold.
    autocast=lambda call, dtype, *args: call(*args),
)

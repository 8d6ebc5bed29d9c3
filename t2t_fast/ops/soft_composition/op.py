"""``t2t_fast::soft_composition``: overlapping tokens added up into an image."""

from ...backends import Implementation, always
from .._common import transforms
from .._common.library import define
from . import aten, native, reference

soft_composition = define(
    "soft_composition",
    "Tensor tokens, SymInt[2] size, int[2] kernel, int[2] stride, int[2] padding",
    implementations={
        "native": Implementation(native.forward, native.supports),
        "aten": Implementation(aten.forward, transforms.plain),
        "reference": Implementation(reference.forward, always),
    },
    absent={"triton": "no Triton kernel planned: the native one serves CUDA"},
    autocast=lambda call, dtype, *args: call(*args),
)

"""``t2t_fast::soft_composition``: overlapping tokens added up into an image."""

from ...backends import Implementation, always
from .. import transforms
from ..library import define
from . import aten_impl, native_impl, reference

soft_composition = define(
    "soft_composition",
    "Tensor tokens, SymInt[2] size, int[2] kernel, int[2] stride, int[2] padding",
    implementations={
        "native": Implementation(native_impl.forward, native_impl.supports),
        "aten": Implementation(aten_impl.forward, transforms.plain),
        "reference": Implementation(reference.forward, always),
    },
    absent={"triton": "no Triton kernel planned: the native one serves CUDA"},
    autocast=lambda call, dtype, *args: call(*args),
)

"""``t2t_fast::fused_fold_unfold``: tokens folded into an image, normalised by their overlap, and unfolded again."""

from ...backends import Implementation, always
from .. import transforms
from ..library import define
from . import aten_impl, native_impl, reference

fused_fold_unfold = define(
    "fused_fold_unfold",
    "Tensor tokens, SymInt[2] size, int[2] kernel, int[2] stride, int[2] padding",
    implementations={
        "native": Implementation(native_impl.forward, native_impl.supports),
        "aten": Implementation(aten_impl.forward, transforms.plain),
        "reference": Implementation(reference.forward, always),
    },
    absent={"triton": "no Triton kernel planned: the native one serves CUDA"},
    # Upstream's fold and unfold keep the dtype they are given under autocast, and so does this.
    autocast=lambda call, dtype, *args: call(*args),
)

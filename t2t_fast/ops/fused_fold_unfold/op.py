"""``t2t_fast::fused_fold_unfold``: tokens folded into an image, normalised by their overlap, and unfolded again."""

from ...backends import Implementation, always
from .._common import transforms
from .._common.library import define
from . import aten, native, reference

fused_fold_unfold = define(
    "fused_fold_unfold",
    "Tensor tokens, SymInt[2] size, int[2] kernel, int[2] stride, int[2] padding",
    implementations={
        "native": Implementation(native.forward, native.supports),
        "aten": Implementation(aten.forward, transforms.plain),
        "reference": Implementation(reference.forward, always),
    },
    absent={"triton": "no Triton kernel planned: the native one serves CUDA"},
    # Like upstream's fold and unfold, the operator keeps its input's dtype under autocast.
    autocast=lambda call, dtype, *args: call(*args),
)

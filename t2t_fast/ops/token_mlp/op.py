"""``t2t_fast::token_mlp``: everything after the attention of a token layer, which is all per token."""

from ...backends import Implementation, always
from .. import native, transforms, triton_runtime
from ..library import define
from . import aten_impl, native_impl, reference, triton_impl

SIGNATURE = (
    "Tensor proj_weight, Tensor? proj_bias, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, "
    "Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, "
    "float proj_drop, float mlp_drop, Tensor? seed"
)

token_mlp = define(
    "token_mlp",
    "Tensor y, Tensor v, " + SIGNATURE,
    implementations={
        "triton": Implementation(triton_impl.forward, triton_impl.supports, triton_runtime.passed_over),
        "native": Implementation(native_impl.forward, native_impl.supports, native.passed_over),
        "aten": Implementation(aten_impl.forward, transforms.plain),
        "reference": Implementation(reference.forward, always),
    },
    absent={},
    autocast=lambda call, dtype, y, v, *rest: call(y.to(dtype), v.to(dtype), *rest),
)

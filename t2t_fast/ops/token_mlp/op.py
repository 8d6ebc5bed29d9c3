"""``t2t_fast::token_mlp``: everything after the attention of a token layer; all of it is per token."""

from ...backends import Implementation, always
from .._common import native_library, transforms, triton_runtime
from .._common.library import define
from . import aten, graph, native, reference
from .triton import operators as triton
from .triton import support

SIGNATURE = (
    "Tensor proj_weight, Tensor? proj_bias, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, "
    "Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, "
    "float proj_drop, float mlp_drop, Tensor? seed"
)

token_mlp = define(
    "token_mlp",
    "Tensor y, Tensor v, " + SIGNATURE,
    implementations={
        "triton": Implementation(triton.forward, support.supports, triton_runtime.passed_over),
        "native": Implementation(native.forward, native.supports, native_library.passed_over),
        "aten": Implementation(aten.forward, transforms.plain, graph=graph.forward),
        "reference": Implementation(reference.forward, always),
    },
    absent={},
    autocast=lambda call, dtype, y, v, *rest: call(y.to(dtype), v.to(dtype), *rest),
)

"""``t2t_fast::performer_attention``: positive random-feature attention, upstream's eps included."""

from ...backends import Implementation, always
from .. import native, transforms, triton_runtime
from ..library import define
from . import aten_impl, native_impl, reference, triton_impl


def _autocast(call, dtype, q, k, v, w, eps, key_mask):
    """q, k and v take autocast's dtype, as a matrix product's operands do; the features stay in float32."""
    return call(q.to(dtype), k.to(dtype), v.to(dtype), w, eps, key_mask)


performer_attention = define(
    "performer_attention",
    "Tensor q, Tensor k, Tensor v, Tensor w, float eps, Tensor? key_mask",
    implementations={
        "triton": Implementation(triton_impl.forward, triton_impl.supports, triton_runtime.passed_over),
        "native": Implementation(native_impl.forward, native_impl.supports, native.passed_over),
        "aten": Implementation(aten_impl.forward, transforms.plain),
        "reference": Implementation(reference.forward, always),
    },
    absent={},
    autocast=_autocast,
)

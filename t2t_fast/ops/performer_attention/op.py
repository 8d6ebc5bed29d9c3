"""``t2t_fast::performer_attention``: positive random-feature attention, upstream's eps included."""

from ...backends import Implementation, always
from .._common import native_library, transforms, triton_runtime
from .._common.library import define
from . import aten, native, reference
from .triton import operators as triton
from .triton import support


def _autocast(call, dtype, q, k, v, w, *options):
    """q, k and v are cast to autocast's dtype, as operands of a matrix product; the features stay in float32."""
    return call(q.to(dtype), k.to(dtype), v.to(dtype), w, *options)


performer_attention = define(
    "performer_attention",
    "Tensor q, Tensor k, Tensor v, Tensor w, float eps, Tensor? key_mask, bool causal, bool normalize",
    implementations={
        "triton": Implementation(triton.forward, support.supports, triton_runtime.passed_over),
        "native": Implementation(native.forward, native.supports, native_library.passed_over),
        "aten": Implementation(aten.forward, transforms.plain),
        "reference": Implementation(reference.forward, always),
    },
    absent={},
    autocast=_autocast,
)

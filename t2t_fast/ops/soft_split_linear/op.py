"""``t2t_fast::soft_split_linear``: soft split, LayerNorm and Linear without unfolded tokens."""

from ...backends import Implementation, always
from .._common import native_library, transforms, triton_runtime
from .._common.library import define
from . import aten, graph, native, reference
from .triton import operators as triton
from .triton import support


def _autocast(call, dtype, x, weight, bias, norm_weight, norm_bias, norm_eps, kernel, stride, padding, _dtype, pixels):
    """The output, and without LayerNorm the image, are cast to autocast's dtype.

    A float32 image that will be normalised stays float32: LayerNorm magnifies the rounding of a bright flat region up
    to 316 times, and autocast in upstream also rounds only after LayerNorm.
    """
    if norm_eps is None and not pixels:
        x = x.to(dtype)
    return call(x, weight, bias, norm_weight, norm_bias, norm_eps, kernel, stride, padding, dtype, pixels)


soft_split_linear = define(
    "soft_split_linear",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float? norm_eps, "
    "int[2] kernel, int[2] stride, int[2] padding, ScalarType dtype, float[] pixels",
    implementations={
        "triton": Implementation(triton.forward, support.supports, triton_runtime.passed_over),
        "native": Implementation(native.forward, native.supports, native_library.passed_over),
        "aten": Implementation(aten.forward, transforms.plain, graph=graph.forward),
        "reference": Implementation(reference.forward, always),
    },
    absent={},
    autocast=_autocast,
)

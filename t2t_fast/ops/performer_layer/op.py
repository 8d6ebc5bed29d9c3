"""``t2t_fast::performer_layer``: a whole Performer layer, from the image or the tokens before its soft split.

The one operator that is made of others: it may import the implementations of ``soft_split_linear``,
``performer_attention`` and ``token_mlp``, and nothing else crosses between operators.
"""

from ...backends import Implementation, always
from .. import native, transforms, triton_runtime
from ..library import define
from ..token_mlp.op import SIGNATURE
from . import aten_impl, native_impl, reference, triton_impl

DTYPE = 9  # the argument's place


def _autocast(call, dtype, *args):
    """kqv and what follows take autocast's dtype; the image stays what it is, as in soft_split_linear's rule."""
    return call(*args[:DTYPE], dtype, *args[DTYPE + 1 :])


performer_layer = define(
    "performer_layer",
    "Tensor x, Tensor kqv_weight, Tensor? kqv_bias, Tensor? norm1_weight, Tensor? norm1_bias, float norm1_eps, "
    "int[2] kernel, int[2] stride, int[2] padding, ScalarType dtype, float[] pixels, "
    f"Tensor w, float eps, {SIGNATURE}, bool low_memory",
    implementations={
        "triton": Implementation(triton_impl.forward, triton_impl.supports, triton_runtime.passed_over),
        "native": Implementation(native_impl.forward, native_impl.supports, native.passed_over),
        "aten": Implementation(aten_impl.forward, transforms.plain),
        "reference": Implementation(reference.forward, always),
    },
    absent={},
    autocast=_autocast,
)

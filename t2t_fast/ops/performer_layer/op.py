"""``t2t_fast::performer_layer``: a whole Performer layer, from the image or the tokens before its soft split.

It is composed of the implementations of ``soft_split_linear``, ``performer_attention`` and ``token_mlp``.
"""

from ...backends import Implementation, always
from .._common import native_library, transforms, triton_runtime
from .._common.library import define
from ..token_mlp.op import SIGNATURE
from . import aten, graph, native, reference
from .triton import operators as triton
from .triton import support

DTYPE = 9  # index of the argument


def _autocast(call, dtype, *args):
    """kqv and the steps after it use autocast's dtype; the image keeps its dtype, as in soft_split_linear."""
    return call(*args[:DTYPE], dtype, *args[DTYPE + 1 :])


performer_layer = define(
    "performer_layer",
    "Tensor x, Tensor kqv_weight, Tensor? kqv_bias, Tensor? norm1_weight, Tensor? norm1_bias, float norm1_eps, "
    "int[2] kernel, int[2] stride, int[2] padding, ScalarType dtype, float[] pixels, "
    f"Tensor w, float eps, {SIGNATURE}, bool recompute",
    implementations={
        "triton": Implementation(triton.forward, support.supports, triton_runtime.passed_over),
        "native": Implementation(native.forward, native.supports, native_library.passed_over),
        "aten": Implementation(aten.forward, transforms.plain, graph=graph.forward),
        "reference": Implementation(reference.forward, always),
    },
    absent={},
    autocast=_autocast,
)

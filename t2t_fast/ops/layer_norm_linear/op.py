"""``t2t_fast::layer_norm_linear``: LayerNorm and Linear, and the tokens for the residual connection around them."""

from ...backends import Implementation, always
from .._common import transforms, triton_runtime
from .._common.library import define
from ..add_layer_norm.op import NO_NATIVE
from ..add_layer_norm.triton import operators as norm
from ..add_layer_norm.triton import support
from . import aten, reference
from .autograd import differentiable

DTYPE = 6  # index of the argument


def _autocast(call, dtype, *args):
    """The product runs in autocast's dtype, LayerNorm in float32."""
    return call(*args[:DTYPE], dtype)


layer_norm_linear = define(
    "layer_norm_linear",
    "Tensor x, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, Tensor weight, Tensor? bias, ScalarType dtype",
    returns="(Tensor, Tensor)",
    implementations={
        "triton": Implementation(differentiable(norm), support.supports, triton_runtime.passed_over),
        "aten": Implementation(aten.forward, transforms.plain),
        "reference": Implementation(reference.forward, always),
    },
    absent={"native": NO_NATIVE},
    autocast=_autocast,
)

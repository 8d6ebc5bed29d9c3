"""``t2t_fast::add_layer_norm``: a residual branch is added to the stream of tokens, and the sum is normalised."""

from ...backends import Implementation, always
from .._common import transforms, triton_runtime
from .._common.library import define
from . import aten, reference
from .triton import operators as triton
from .triton import support

NO_NATIVE = "none of its own: on a CPU the native transformer_block contains it; alone, the aten form runs"

DTYPE = 7  # index of the argument


def _autocast(call, dtype, *args):
    """The stream keeps its dtype, usually float32; the normalised tokens are operands of a product."""
    return call(*args[:DTYPE], dtype, *args[DTYPE + 1 :])


add_layer_norm = define(
    "add_layer_norm",
    "Tensor x, Tensor branch, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, float drop, float drop_path, "
    "ScalarType dtype, Tensor? seed",
    returns="(Tensor, Tensor)",
    implementations={
        "triton": Implementation(triton.forward, support.supports, triton_runtime.passed_over),
        "aten": Implementation(aten.forward, transforms.plain),
        "reference": Implementation(reference.forward, always),
    },
    absent={"native": NO_NATIVE},
    autocast=_autocast,
)

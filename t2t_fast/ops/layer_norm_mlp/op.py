"""``t2t_fast::layer_norm_mlp``: the second half of a transformer block, from the attention's projection on."""

from ...backends import Implementation, always
from .._common import transforms, triton_runtime
from .._common.library import define
from ..add_layer_norm.op import NO_NATIVE
from . import aten, graph, reference
from .triton import operators as triton
from .triton import support

DTYPE = 16  # index of the argument


def _autocast(call, dtype, *args):
    """The products run in autocast's dtype; the stream keeps its own, usually float32."""
    return call(*args[:DTYPE], dtype, *args[DTYPE + 1 :])


layer_norm_mlp = define(
    "layer_norm_mlp",
    "Tensor x, Tensor? branch, Tensor? norm_weight, Tensor? norm_bias, float? norm_eps, "
    "Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, float branch_drop, float branch_path, "
    "float hidden_drop, float drop, float drop_path, bool residual, bool recompute, ScalarType dtype, Tensor? seed",
    implementations={
        "triton": Implementation(triton.forward, support.supports, triton_runtime.passed_over),
        "aten": Implementation(aten.forward, transforms.plain, graph=graph.forward),
        "reference": Implementation(reference.forward, always),
    },
    absent={"native": NO_NATIVE},
    autocast=_autocast,
)

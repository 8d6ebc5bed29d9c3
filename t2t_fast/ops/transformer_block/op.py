"""``t2t_fast::transformer_block``: a whole pre-norm transformer block, which the native backend runs as one kernel."""

from ...backends import Implementation, always
from .._common import native_library, transforms
from .._common.library import define
from . import aten, native, reference

DTYPE = 19  # index of the argument


def _autocast(call, dtype, *args):
    """The products run in autocast's dtype; the stream of tokens keeps its own, usually float32."""
    return call(*args[:DTYPE], dtype, *args[DTYPE + 1 :])


transformer_block = define(
    "transformer_block",
    "Tensor x, Tensor? norm1_weight, Tensor? norm1_bias, float norm1_eps, Tensor qkv_weight, Tensor? qkv_bias, "
    "Tensor proj_weight, Tensor? proj_bias, Tensor? norm2_weight, Tensor? norm2_bias, float norm2_eps, "
    "Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, int heads, float scale, "
    "float drop_path1, float drop_path2, ScalarType dtype, Tensor? seed",
    implementations={
        "native": Implementation(native.forward, native.supports, native_library.passed_over),
        "aten": Implementation(aten.forward, transforms.plain),
        "reference": Implementation(reference.forward, always),
    },
    absent={"triton": "on a GPU a block is layer_norm_linear, attention and layer_norm_mlp"},
    autocast=_autocast,
)

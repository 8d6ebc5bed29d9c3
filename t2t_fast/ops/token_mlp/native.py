"""token_mlp as a native operator (``csrc/cpu``), a tile of tokens at a time. Products are of bfloat16 for that dtype,
everything else is float32.

Saved for backward: y, v, the dropout seed and the parameters; everything else is recomputed.
"""

import torch

from .._common import native_library
from .._common.native_library import fake_gradients, gradient, single
from .autograd import differentiable

_KINDS = native_library.devices("token_mlp")


def supports(request):
    return native_library.reason(request, _KINDS, native_library.SINGLE)


@native_library.fake("token_mlp")
def _fake(y, v, *rest):
    return y.new_empty(y.shape)


@native_library.fake("token_mlp_backward")
def _fake_backward(grad, y, v, proj_weight, proj_bias, norm_weight, norm_bias, norm_eps, *rest):
    return fake_gradients(y, y, y, proj_weight, proj_bias, norm_weight, norm_bias, *rest[:4])


def _arguments(y, v, mlp, options, seed):
    """The native operator's arguments, with tensors in float32; ``options`` are norm_eps, proj_drop and mlp_drop."""
    norm_eps, *drops = options
    y, v, proj_weight, proj_bias, norm_weight, norm_bias, *fc = single(y, v, *mlp)
    return y, v, proj_weight, proj_bias, norm_weight, norm_bias, norm_eps, *fc, *drops, seed


def run(y, v, mlp, options, seed):
    """Forward without autograd."""
    bf16 = y.dtype == torch.bfloat16
    return torch.ops.t2t_fast_native.token_mlp(*_arguments(y, v, mlp, options, seed), bf16).to(y.dtype)


def run_backward(grad, y, v, mlp, options, seed, needed):
    """All gradients, needed or not, each in the dtype of its tensor."""
    arguments = _arguments(y, v, mlp, options, seed)
    bf16 = y.dtype == torch.bfloat16
    found = torch.ops.t2t_fast_native.token_mlp_backward(grad.to(torch.float32), *arguments, bf16)
    d_y, d_v, *gradients = (gradient(value, tensor) for value, tensor in zip(found, (y, v, *mlp), strict=True))
    return d_y, d_v, gradients


forward = differentiable(run, run_backward)

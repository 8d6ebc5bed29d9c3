"""The operators ``t2t_fast_triton::token_mlp`` and ``token_mlp_backward``, and the function that autograd records.

Saved for backward: y, v, the dropout seed and the parameters; everything else is recomputed. The only tensors of token
length that the kernels write are the results. Triton is imported at the first launch.
"""

import torch

from ..._common.triton_runtime import fake, operator, operators
from ..autograd import MlpParameters, differentiable

_ORDER = (
    "proj_weight",
    "proj_bias",
    "fc1_weight",
    "norm_weight",
    "norm_bias",
    "fc1_bias",
    "fc2_weight",
    "fc2_bias",
)
"""The order in which the backward kernel concatenates the parameters' gradients."""


@operator("token_mlp(Tensor y, Tensor v, Tensor? seed, float[] options, Tensor?[] mlp) -> Tensor")
def _forward(*arguments):
    from .forward import launch_token_mlp

    return launch_token_mlp(*arguments)


@fake("token_mlp")
def _fake(y, v, seed, options, mlp):
    return y.new_empty(y.shape)


def lengths(mlp):
    """The number of values of each gradient in :data:`_ORDER`, also for absent parameters."""
    hidden, width = mlp.fc1_weight.shape
    return width * width, width, width * hidden, width, width, hidden, width * hidden, width


@operator(
    "token_mlp_backward(Tensor grad, Tensor y, Tensor v, Tensor? seed, float[] options, Tensor?[] mlp, "
    "bool need_parameters) -> (Tensor, Tensor, Tensor)"
)
def _backward(*arguments):
    from .backward import launch_token_mlp_backward

    return launch_token_mlp_backward(*arguments)


@fake("token_mlp_backward")
def _fake_backward(grad, y, v, seed, options, mlp, need_parameters):
    length = sum(lengths(MlpParameters(*mlp))) if need_parameters else 0
    return y.new_empty(y.shape), y.new_empty(y.shape), y.new_empty(length, dtype=torch.float32)


def run(y, v, mlp, options, seed):
    """Forward without autograd."""
    return operators.token_mlp(y, v, seed, list(options), list(mlp))


def _like(values, parameter):
    """A flat gradient in the shape and dtype of its parameter."""
    if parameter.ndim > 1:
        values = values.view(parameter.shape)
    return values if values.dtype == parameter.dtype else values.to(parameter.dtype)


def run_backward(grad, y, v, mlp, options, seed, needed):
    """All gradients, those of y and v in y's dtype."""
    d_y, d_v, flat = operators.token_mlp_backward(grad, y, v, seed, list(options), list(mlp), any(needed))
    if not any(needed):
        return d_y, d_v, [None] * len(mlp)
    found = dict(zip(_ORDER, flat.split_with_sizes(lengths(mlp)), strict=True))
    gradients = [
        _like(found[name], parameter) if wanted and parameter is not None else None
        for name, parameter, wanted in zip(MlpParameters._fields, mlp, needed, strict=True)
    ]
    return d_y, d_v, gradients


forward = differentiable(run, run_backward)

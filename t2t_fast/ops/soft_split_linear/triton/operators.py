"""The operators ``t2t_fast_triton::soft_split_linear...``, and the function that autograd records.

One implicit matrix product forward, three backward. Saved for backward: the image, ``mu`` and ``r`` (8 bytes a token),
the parameters, and the output if the image requires a gradient. Triton is imported at the first launch.
"""

import torch

from ..._common import triton_runtime as runtime
from ..._common.spec import Window
from ..._common.triton_runtime import fake, operator
from ..._common.windows import in_layout
from ..autograd import differentiable, parameter_gradients
from .operands import operands, packed_taps, pixel_columns


@operator(
    "soft_split_linear(Tensor x, Tensor weight, Tensor? used, Tensor? row_sums, Tensor offset, int outputs, "
    "float? norm_eps, int[] kernel, int[] stride, int[] padding, ScalarType dtype, Tensor[]? pixels) "
    "-> (Tensor, Tensor, Tensor)"
)
def _forward(*arguments):
    from .forward import launch_split_linear

    return launch_split_linear(*arguments)


@fake("soft_split_linear")
def _fake(x, weight, used, row_sums, offset, outputs, norm_eps, kernel, stride, padding, dtype, pixels):
    h, w = Window(tuple(kernel), tuple(stride), tuple(padding)).grid(*x.shape[2:])
    statistics = (x.shape[0], h, w) if norm_eps is not None else (0,)
    single = [x.new_empty(statistics, dtype=torch.float32) for _ in range(2)]
    return x.new_empty((x.shape[0], h * w, outputs), dtype=dtype), *single


@operator(
    "soft_split_linear_products(Tensor x, Tensor grad, Tensor mean, Tensor rstd, bool norm, int[] kernel, "
    "int[] stride, int[] padding, Tensor[]? pixels) -> (Tensor, Tensor)"
)
def _products(*arguments):
    from .weight_gradient import launch_weight_products

    return launch_weight_products(*arguments)


@fake("soft_split_linear_products")
def _fake_products(x, grad, mean, rstd, norm, kernel, stride, padding, pixels):
    products = x.new_empty((grad.shape[2], x.shape[1] * kernel[0] * kernel[1]), dtype=torch.float32)
    return products, products.new_empty(grad.shape[2] if grad.dtype != torch.float32 else 0)


@operator(
    "soft_split_linear_image_gradient(Tensor grad, Tensor x, Tensor weight, Tensor? offset, Tensor? y, Tensor mean, "
    "Tensor rstd, int[] kernel, int[] stride, int[] padding) -> Tensor"
)
def _image_gradient(*arguments):
    from .image_gradient import launch_image_gradient

    return launch_image_gradient(*arguments)


@fake("soft_split_linear_image_gradient")
def _fake_image_gradient(grad, x, *rest):
    return in_layout(x.new_empty(x.shape), x.stride(1) == 1)


def _run(x, weight, bias, norm_weight, norm_bias, norm_eps, window, dtype, pixels, keep):
    found, columns = operands(x, weight, bias, norm_weight, norm_bias, norm_eps, window, dtype, pixels, keep)
    return torch.ops.t2t_fast_triton.soft_split_linear(x, *found, weight.shape[0], norm_eps, *window, dtype, columns)


def run(x, weight, bias, norm_weight, norm_bias, norm_eps, window, dtype, pixels=()):
    """Forward without autograd (:func:`autograd.differentiable`)."""
    return _run(x, weight, bias, norm_weight, norm_bias, norm_eps, window, dtype, pixels, False)


def infer(x, weight, bias, norm_weight, norm_bias, norm_eps, window, dtype, pixels=()):
    """As :func:`run`, with the operands cached for the next call."""
    return _run(x, weight, bias, norm_weight, norm_bias, norm_eps, window, dtype, pixels, True)


def run_backward(grad, x, weight, bias, norm_weight, norm_bias, norm_eps, window, y, mean, rstd, needed, pixels=()):
    """Gradients of the image and every parameter (:func:`autograd.differentiable`)."""
    need_x, need_weight, _, need_gamma, _ = needed
    norm, operators = norm_eps is not None, torch.ops.t2t_fast_triton
    channels = runtime.fixed(x.shape[1])
    d_x = products = total = None
    if need_weight or need_gamma:
        columns = pixel_columns(pixels, weight, channels, window)
        products, total = operators.soft_split_linear_products(x, grad, mean, rstd, norm, *window, columns)
        total = total if total.shape[0] else None
    if need_x:
        found = packed_taps(weight, bias, norm_weight, norm_bias, norm_eps, channels, grad.dtype)
        d_x = operators.soft_split_linear_image_gradient(grad, x, *found, y, mean, rstd, *window)
    return d_x, *parameter_gradients(products, total, grad, weight, bias, norm_weight, norm_bias, needed[1:])


forward = differentiable(run, run_backward, infer)

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
from .layout import operand_shapes
from .operands import operands, packed, packed_taps


@operator(
    "soft_split_linear_fold(Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, bool norm, "
    "int channels, int[] kernel, int[] stride, int[] padding, ScalarType dtype, float[] pixels, bool turned) "
    "-> Tensor[]"
)
def _fold(*arguments):
    from .parameters import launch_fold

    return launch_fold(*arguments)


@fake("soft_split_linear_fold")
def _fake_fold(weight, bias, norm_weight, norm_bias, norm, channels, kernel, stride, padding, dtype, pixels, turned):
    window = Window(tuple(kernel), tuple(stride), tuple(padding))
    sizes = (runtime.fixed(size) for size in weight.shape)
    shapes = operand_shapes(*sizes, norm, channels, window, bool(pixels), turned).present()
    return [weight.new_empty(shape, dtype=torch.float32 if index else dtype) for index, shape in enumerate(shapes)]


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
    "int[] stride, int[] padding, Tensor[]? pixels, Tensor weight, Tensor? norm_weight, Tensor? norm_bias, "
    "ScalarType bias_dtype, bool[] needed) -> Tensor[]"
)
def _products(*arguments):
    from .weight_gradient import launch_weight_gradient

    return launch_weight_gradient(*arguments)


@fake("soft_split_linear_products")
def _fake_products(
    x, grad, mean, rstd, norm, kernel, stride, padding, pixels, weight, norm_weight, norm_bias, bias_dtype, needed
):
    bias = weight.new_empty(weight.shape[0], dtype=bias_dtype)
    tensors = zip((weight, bias, norm_weight, norm_bias), needed, strict=True)
    return [t.new_empty(t.shape) for t, wanted in tensors if wanted]


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
    return runtime.operators.soft_split_linear(x, *found, weight.shape[0], norm_eps, *window, dtype, columns)


def run(x, weight, bias, norm_weight, norm_bias, norm_eps, window, dtype, pixels=()):
    """Forward without autograd (:func:`autograd.differentiable`)."""
    return _run(x, weight, bias, norm_weight, norm_bias, norm_eps, window, dtype, pixels, False)


def infer(x, weight, bias, norm_weight, norm_bias, norm_eps, window, dtype, pixels=()):
    """As :func:`run`, with the operands cached for the next call."""
    return _run(x, weight, bias, norm_weight, norm_bias, norm_eps, window, dtype, pixels, True)


def run_backward(grad, x, weight, bias, norm_weight, norm_bias, norm_eps, window, y, mean, rstd, needed, pixels=()):
    """Gradients of the image and every parameter (:func:`autograd.differentiable`)."""
    need_x, *rest = needed
    norm, operators = norm_eps is not None, runtime.operators
    channels = runtime.fixed(x.shape[1])
    if rest[0] or rest[2]:
        columns = None
        if pixels:
            parameters = weight, bias, norm_weight, norm_bias, norm_eps
            columns = packed(*parameters, channels=channels, window=window, dtype=grad.dtype, pixels=pixels)[1]
        dtype = weight.dtype if bias is None else bias.dtype
        found = iter(
            operators.soft_split_linear_products(
                x, grad, mean, rstd, norm, *window, columns, weight, norm_weight, norm_bias, dtype, rest
            )
        )
        gradients = [next(found) if wanted else None for wanted in rest]
    else:
        gradients = parameter_gradients(None, None, grad, weight, bias, norm_weight, norm_bias, rest)
    if not need_x:
        return None, *gradients
    found = packed_taps(weight, bias, norm_weight, norm_bias, norm_eps, channels, window, grad.dtype)
    return operators.soft_split_linear_image_gradient(grad, x, *found, y, mean, rstd, *window), *gradients


forward = differentiable(run, run_backward, infer)

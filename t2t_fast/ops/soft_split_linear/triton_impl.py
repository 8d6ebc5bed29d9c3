"""Soft split, LayerNorm and Linear by Triton kernels: one implicit matrix product forward; backward three.

Saved for backward: the image, ``mu`` and ``r`` (8 bytes a token), the parameters, and, where the image wants a
gradient, the output.
"""

import math

import torch

from .. import triton_runtime as runtime
from ..kept import FOLDED
from ..launch import cut
from ..pixels import normalisation
from ..spec import Window
from ..triton_runtime import fake, operator
from ..windows import in_layout
from . import aten_impl
from .aten_impl import fold_norm
from .call import Call, Folded
from .gradient import differentiable, parameter_gradients
from .layout import NARROW, layout, pack_taps, pad_outputs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_IMAGE = 4
"""Channels of an image of bytes."""

T2T = {"channels": 64, "window": Window((3, 3), (2, 2), (1, 1)), "outputs": 192, "normed": True, "training": False}
"""Stage 2 of T2T-ViT: what is asked about where a question names no sizes."""


def obstacle(request):
    """Why the kernels are not for a call, or ``None``; nothing is tried."""
    why = runtime.reason(request, DTYPES)
    if why is None and request.sizes.get("bytes") and request.sizes["channels"] > LARGEST_IMAGE:
        why = f"the Triton kernels read bytes of 1 to {LARGEST_IMAGE} channels, got {request.sizes['channels']}"
    return why


def kind(request):
    """What makes kernels differ: the image's dtype, its channels, the window's six numbers, outputs, and whether there
    is LayerNorm, backward, and a gradient of the image.

    torch.compile takes a trial's result for a constant and hands over constants only.
    """
    image = torch.uint8 if request.sizes.get("bytes") else runtime.operand_dtype(request, "image")
    channels, window, outputs, normed, training = (request.sizes.get(name, usual) for name, usual in T2T.items())
    numbers = [runtime.fixed(n) for n in (channels, *window[0], *window[1], *window[2], outputs)]
    image_gradient = training and image != torch.uint8 and request.sizes.get("image_gradient", True)
    return image, *numbers, bool(normed), bool(training), bool(image_gradient)


def supports(request):
    """Why the kernels cannot run a call, or ``None``; a first call of its kind on a device is tried out."""
    return obstacle(request) or _trial(request.sizes.get("index"), request.dtype, *kind(request))


def _trial(index, dtype, *call):
    return runtime.trial("soft_split_linear", _tried, _expected, index, dtype, *call)


# torch.compiler.assume_constant_result sets this, and imports the compiler to do so
_trial._dynamo_marked_constant = True


def problem(device, dtype, image, channels, window, outputs, normed, least=1):
    """Two images of dtype ``image`` with at least 16, or ``least``, tokens each, and parameters as AMP has them.

    Returns:
        the image and the four parameters; its ``pixels``; an upstream gradient in ``dtype``.
    """
    generator = torch.Generator().manual_seed(0)
    down = max(4, math.isqrt(least) + 1)
    height, width = (k + (down - 1) * s for k, s in zip(window.kernel, window.stride, strict=True))
    h, w = window.grid(height, width)
    columns = channels * window.taps
    kept = dtype if image == torch.uint8 else image

    def random(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(device, kept)

    x = random(2, channels, height, width)
    pixels = ()
    if image == torch.uint8:
        x = torch.randint(256, x.shape, generator=generator, dtype=image).to(device)
        pixels = normalisation([0.5] * channels, [0.25] * channels)
    elif layout(channels, window).cell is None:
        x = x.contiguous(memory_format=torch.channels_last)  # tokens
    norm = (1 + random(columns, scale=0.1), random(columns, scale=0.1)) if normed else (None, None)
    tensors = (x, random(outputs, columns, scale=columns**-0.5), random(outputs), *norm)
    return tensors, pixels, random(2, h * w, outputs).to(dtype)


def _both(forward, backward, dtype, tensors, pixels, grad, window, normed, needed):
    rest = 1e-5 if normed else None, window
    y, mean, rstd = forward(*tensors, *rest, dtype, pixels)
    if not any(needed):
        return [y], rstd
    gradients = backward(grad, *tensors, *rest, y, mean, rstd, needed, pixels)
    return [y, *(t for t in gradients if t is not None)], rstd


def called(image, channels, kh, kw, sh, sw, ph, pw, outputs, normed, training, image_gradient):
    """What :func:`problem` takes behind the dtype, and which gradients are needed."""
    window = Window((kh, kw), (sh, sw), (ph, pw))
    needed = [image_gradient, training, training, training and normed, training and normed]
    return (image, channels, window, outputs, normed), needed


def _tried(device, dtype, *call):
    of_problem, needed = called(*call)
    tensors, pixels, grad = problem(device, dtype, *of_problem)
    *_, window, _, normed = of_problem
    with runtime.crowded():
        again, *_ = run(*tensors, 1e-5 if normed else None, window, dtype, pixels)
    return [again, *_both(run, run_backward, dtype, tensors, pixels, grad, window, normed, needed)[0]]


def _expected(device, dtype, *call):
    of_problem, needed = called(*call)
    tensors, pixels, grad = problem(device, dtype, *of_problem)
    x, *parameters = [None if t is None or t.dtype == torch.uint8 else t.float() for t in tensors]
    tensors, grad = (tensors[0] if pixels else x, *parameters), grad.float()
    *_, window, _, normed = of_problem
    call = torch.float32, tensors, pixels, grad, window, normed, needed
    (y, *exact), rstd = _both(aten_impl.run, aten_impl.run_backward, *call)
    if exact and normed:
        # LayerNorm of one or two values leaves nothing of these, or next to nothing: what it takes them from
        weight, _, gamma, _ = parameters
        scaled = grad * rstd.flatten(1).unsqueeze(-1)
        linear, none = (weight * gamma, None, None, None, None, window), rstd.new_empty(0)
        few = [*needed[:2], False, False, False]
        d_x, d_weight, *_ = aten_impl.run_backward(scaled, tensors[0], *linear, y, none, none, few, pixels)
        of_parameters = [(exact[-4], d_weight), exact[-3], (exact[-2], (weight * d_weight).sum(0)), exact[-1]]
        exact = [*([(exact[0], d_x)] if needed[0] else []), *of_parameters]
    return [y, y, *exact]


def _groups(outputs, parts):
    """How many groups of ``parts`` x NARROW outputs there are."""
    return -(-outputs // (NARROW * parts))


def _divisor(number, most):
    """The largest divisor of ``number`` that is at most ``most``."""
    return next(part for part in range(min(number, most), 0, -1) if number % part == 0)


@operator(
    "soft_split_linear(Tensor x, Tensor weight, Tensor? used, Tensor? row_sums, Tensor offset, int outputs, "
    "float? norm_eps, int[] kernel, int[] stride, int[] padding, ScalarType dtype, Tensor[]? pixels) "
    "-> (Tensor, Tensor, Tensor)"
)
def _forward(x, weight, used, row_sums, offset, outputs, norm_eps, kernel, stride, padding, dtype, pixels):
    from . import kernels

    call = Call(x, dtype, (kernel, stride, padding), outputs, pixels)
    parameters = call.parameters("forward")
    out = torch.empty((x.shape[0], call.length, outputs), dtype=dtype, device=x.device)
    mean, rstd = (offset.new_empty(0) if norm_eps is None else call.singles() for _ in range(2))
    if out.numel():
        grid = -(-call.tokens // parameters["tokens"]), _groups(outputs, parameters["parts"])
        kernels.split_linear_kernel[grid](
            call.image(),
            Folded(weight, used, row_sums, offset),
            norm_eps,
            out,
            mean,
            rstd,
            *x.shape[2:],
            call.grid[1],
            call.length,
            call.tokens,
            outputs,
            LAYOUT=call.layout,
            NORM=norm_eps is not None,
            SHIFT=x.dtype == torch.float32 or x.dtype != dtype,
            TOKENS=parameters["tokens"],
            BLOCK=call.layout.block(parameters["block"]),
            PARTS=parameters["parts"],
            WIDTH=weight.shape[1],
            **call.constants(parameters),
        )
    return out, mean, rstd


@fake("soft_split_linear")
def _fake(x, weight, used, row_sums, offset, outputs, norm_eps, kernel, stride, padding, dtype, pixels):
    h, w = Window(tuple(kernel), tuple(stride), tuple(padding)).grid(*x.shape[2:])
    statistics = (x.shape[0], h, w) if norm_eps is not None else (0,)
    single = [x.new_empty(statistics, dtype=torch.float32) for _ in range(2)]
    return x.new_empty((x.shape[0], h * w, outputs), dtype=dtype), *single


@operator(
    "soft_split_linear_products(Tensor x, Tensor grad, Tensor mean, Tensor rstd, bool norm, int[] kernel, "
    "int[] stride, int[] padding, Tensor[]? pixels) -> Tensor"
)
def _products(x, grad, mean, rstd, norm, kernel, stride, padding, pixels):
    """``sum_t G_t xhat_t^T`` as (O, K) float32."""
    from . import kernels_weight as kernels

    FOLDED.clear()  # somebody is training, and may write where no version counter sees it
    call = Call(x, grad.dtype, (kernel, stride, padding), grad.shape[2], pixels)
    if not grad.numel():
        return grad.new_zeros((call.outputs, call.layout.values), dtype=torch.float32)
    parameters = call.parameters("weight")
    parts = _divisor(-(-call.outputs // NARROW), parameters["parts"])
    groups = -(-call.outputs // (NARROW * parts))
    block = call.layout.block(parameters["block"])
    blocks = _divisor(-(-call.layout.columns // block), parameters["blocks"])
    column_groups = -(-call.layout.columns // (block * blocks))
    wanted = parameters["programs"] * runtime.multiprocessors(x.device)
    splits, tiles = cut(call.tokens, column_groups * groups, parameters["tokens"], wanted)
    shape = splits, groups * parts * NARROW, column_groups * blocks * block
    found = torch.empty(shape, dtype=torch.float32, device=x.device)
    kernels.split_linear_weight_kernel[column_groups, groups, splits](
        call.image(),
        grad.contiguous(),
        mean,
        rstd,
        found,
        *x.shape[2:],
        call.grid[1],
        call.length,
        call.tokens,
        call.outputs,
        tiles,
        LAYOUT=call.layout,
        NORM=norm,
        TOKENS=parameters["tokens"],
        BLOCK=block,
        BLOCKS=blocks,
        PARTS=parts,
        TURNED=parameters["turned"],
        **call.constants(parameters),
    )
    return call.layout.unpack(found.sum(0).t(), call.outputs).contiguous()


@fake("soft_split_linear_products")
def _fake_products(x, grad, mean, rstd, norm, kernel, stride, padding, pixels):
    return x.new_empty((grad.shape[2], x.shape[1] * kernel[0] * kernel[1]), dtype=torch.float32)


@operator(
    "soft_split_linear_image_gradient(Tensor grad, Tensor x, Tensor weight, Tensor? offset, Tensor? y, Tensor mean, "
    "Tensor rstd, int[] kernel, int[] stride, int[] padding) -> Tensor"
)
def _image_gradient(grad, x, weight, offset, y, mean, rstd, kernel, stride, padding):
    """d_x in x's dtype and memory format (:func:`windows.in_layout`); ``offset`` where there is a LayerNorm."""
    from . import kernels_image as kernels

    call = Call(x, grad.dtype, (kernel, stride, padding), grad.shape[2])
    grad, norm = grad.contiguous(), offset is not None
    alpha = None
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if not d_x.numel():
        return in_layout(d_x, x.stride(1) == 1)
    if norm:
        parameters = call.parameters("scalars")
        alpha = call.singles()
        kernels.token_scalars_kernel[(-(-call.tokens // parameters["tokens"]),)](
            grad,
            y,
            offset,
            rstd,
            alpha,
            call.tokens,
            call.outputs,
            VALUES=call.layout.values,
            TOKENS=parameters["tokens"],
            NARROW=NARROW,
            EVEN=call.outputs % NARROW == 0,
            num_warps=parameters["warps"],
            **runtime.FUSION,
        )
    parameters = call.parameters("image")
    (height, width), (down, right) = x.shape[2:], call.window.stride
    tiles = -(-x.shape[0] * -(-height // down) * -(-width // right) // parameters["tokens"])
    block = min(parameters["block"], weight.shape[2])
    blocks = -(-x.shape[1] // block)
    parts = _divisor(weight.shape[1] // NARROW, parameters["parts"])
    # phases of one program read the same G, where enough programs are left
    wanted = parameters["programs"] * runtime.multiprocessors(x.device)
    groups = min(down * right, max(1, wanted // (tiles * blocks)))
    own = -(-down * right // groups)
    kernels.split_linear_image_kernel[tiles, -(-down * right // own), blocks](
        grad,
        weight,
        mean,
        rstd,
        alpha,
        x,
        x.stride(),
        d_x,
        height,
        width,
        *call.grid,
        call.length,
        x.shape[0],
        call.outputs,
        own,
        CHANNELS=x.shape[1],
        WINDOW=tuple(call.window),
        NORM=norm,
        PIXELS=parameters["tokens"],
        BLOCK=block,
        PARTS=parts,
        GROUPS=weight.shape[1] // NARROW // parts,
        WIDTH=weight.shape[2],
        **call.constants(parameters),
    )
    return in_layout(d_x, x.stride(1) == 1)


@fake("soft_split_linear_image_gradient")
def _fake_image_gradient(grad, x, *rest):
    return in_layout(x.new_empty(x.shape), x.stride(1) == 1)


def _folded(weight, bias, norm_weight, norm_bias, norm_eps, dtype):
    """The weight as operand, its row sums (``None`` without LayerNorm) and the offset."""
    if norm_eps is not None:
        return fold_norm(weight, bias, norm_weight, norm_bias, dtype)
    offset = weight.new_zeros(weight.shape[0]) if bias is None else bias
    return weight.to(dtype), None, offset


def pixel_columns(pixels, weight, channels, window):
    """Scale and shift of every column of windows over an image of bytes (``ops/pixels.py``); ``None`` for values.

    Made by filling, since a graph may be captured meanwhile and can copy nothing from the host.
    """
    if not pixels:
        return None
    filled = [torch.stack([weight.new_full((), p, dtype=torch.float32) for p in part]) for part in _halves(pixels)]
    return [layout(channels, window).spread(row.repeat_interleave(window.taps)) for row in filled]


def _halves(pixels):
    return pixels[: len(pixels) // 2], pixels[len(pixels) // 2 :]


def packed(weight, bias, norm_weight, norm_bias, norm_eps, channels, window, dtype):
    """What a forward kernel takes for the parameters, a :class:`Folded`."""
    operand, row_sums, offset = _folded(weight, bias, norm_weight, norm_bias, norm_eps, dtype)
    found = layout(channels, window)
    used = None
    if found.columns != weight.shape[1] or (found.gather and row_sums is not None):
        used = found.spread(torch.ones_like(weight[0], dtype=torch.float32))
    if row_sums is not None:
        row_sums = pad_outputs(row_sums)
    return Folded(found.pack(operand), used, row_sums, pad_outputs(offset))


def packed_taps(weight, bias, norm_weight, norm_bias, norm_eps, channels, dtype):
    """What the image's gradient takes for them: weight, offset (``None`` without LayerNorm)."""
    operand, row_sums, offset = _folded(weight, bias, norm_weight, norm_bias, norm_eps, dtype)
    return pack_taps(operand, channels), None if row_sums is None else pad_outputs(offset)


def operands(x, weight, bias, norm_weight, norm_bias, norm_eps, window, dtype, pixels, keep):
    """What a forward kernel takes beside the image: :func:`packed` and :func:`pixel_columns`.

    keep: to keep it for the next call with the same parameters.
    """
    tensors, rest = (weight, bias, norm_weight, norm_bias), (runtime.fixed(x.shape[1]), window)

    def make():
        return packed(*tensors, norm_eps, *rest, dtype), pixel_columns(pixels, weight, *rest)

    return FOLDED.get(tensors, (norm_eps is not None, *rest, dtype, *pixels), make) if keep else make()


def _run(x, weight, bias, norm_weight, norm_bias, norm_eps, window, dtype, pixels, keep):
    found, columns = operands(x, weight, bias, norm_weight, norm_bias, norm_eps, window, dtype, pixels, keep)
    return torch.ops.t2t_fast_triton.soft_split_linear(x, *found, weight.shape[0], norm_eps, *window, dtype, columns)


def run(x, weight, bias, norm_weight, norm_bias, norm_eps, window, dtype, pixels=()):
    """Forward without autograd (:func:`gradient.differentiable`)."""
    return _run(x, weight, bias, norm_weight, norm_bias, norm_eps, window, dtype, pixels, False)


def infer(x, weight, bias, norm_weight, norm_bias, norm_eps, window, dtype, pixels=()):
    """As :func:`run`, with what was made of the parameters kept for the next call."""
    return _run(x, weight, bias, norm_weight, norm_bias, norm_eps, window, dtype, pixels, True)


def run_backward(grad, x, weight, bias, norm_weight, norm_bias, norm_eps, window, y, mean, rstd, needed, pixels=()):
    """Gradients of the image and every parameter (:func:`gradient.differentiable`)."""
    need_x, need_weight, _, need_gamma, _ = needed
    norm, operators = norm_eps is not None, torch.ops.t2t_fast_triton
    channels = runtime.fixed(x.shape[1])
    d_x = products = None
    if need_weight or need_gamma:
        columns = pixel_columns(pixels, weight, channels, window)
        products = operators.soft_split_linear_products(x, grad, mean, rstd, norm, *window, columns)
    if need_x:
        found = packed_taps(weight, bias, norm_weight, norm_bias, norm_eps, channels, grad.dtype)
        d_x = operators.soft_split_linear_image_gradient(grad, x, *found, y, mean, rstd, *window)
    return d_x, *parameter_gradients(products, grad, weight, bias, norm_weight, norm_bias, needed[1:])


forward = differentiable(run, run_backward, infer)

"""Support of the soft_split_linear kernels: which calls they accept, and the self-test before the first call."""

import math

import torch

from ..._common import triton_runtime as runtime
from ..._common.pixels import normalisation
from ..._common.spec import Window
from .. import aten
from .layout import layout
from .operators import run, run_backward

LARGEST_IMAGE = 4
"""Supported channels of an image of bytes."""


T2T = {"channels": 64, "window": Window((3, 3), (2, 2), (1, 1)), "outputs": 192, "normed": True, "training": False}
"""Stage 2 of T2T-ViT: the default for requests without sizes."""


def obstacle(request):
    """Why the kernels do not support a call, or ``None``, without a self-test."""
    why = runtime.reason(request)
    if why is None and request.sizes.get("bytes") and request.sizes["channels"] > LARGEST_IMAGE:
        why = f"the Triton kernels read bytes of 1 to {LARGEST_IMAGE} channels, got {request.sizes['channels']}"
    return why


def kind(request):
    """The properties that select a kernel: the image's dtype, its channels, the window's six numbers, outputs, and
    whether there is LayerNorm, a backward pass and a gradient of the image.

    torch.compile treats the self-test's result as a constant, so all arguments are constants.
    """
    image = torch.uint8 if request.sizes.get("bytes") else runtime.operand_dtype(request, "image")
    channels, window, outputs, normed, training = (request.sizes.get(name, usual) for name, usual in T2T.items())
    numbers = [runtime.fixed(n) for n in (channels, *window[0], *window[1], *window[2], outputs)]
    image_gradient = training and image != torch.uint8 and request.sizes.get("image_gradient", True)
    return image, *numbers, bool(normed), bool(training), bool(image_gradient)


def supports(request):
    """Why the kernels cannot run a call, or ``None``; runs the self-test at the first call of a kind on a device."""
    return obstacle(request) or _trial(request.sizes.get("index"), request.dtype, *kind(request))


def _trial(index, dtype, *call):
    return runtime.trial("soft_split_linear", _tried, _expected, index, dtype, *call)


# what torch.compiler.assume_constant_result sets, without its import of the compiler
_trial._dynamo_marked_constant = True


def problem(device, dtype, image, channels, window, outputs, normed, least=1):
    """Two images of dtype ``image`` with at least 16, or ``least``, tokens each, and parameters in the dtypes of AMP.

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
    """The arguments of :func:`problem` after the dtype, and which gradients are needed."""
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
    (y, *exact), rstd = _both(aten.run, aten.run_backward, *call)
    if exact and normed:
        # LayerNorm of one or two values cancels these (almost) entirely: compare to the terms that cancel
        weight, _, gamma, _ = parameters
        scaled = grad * rstd.flatten(1).unsqueeze(-1)
        linear, none = (weight * gamma, None, None, None, None, window), rstd.new_empty(0)
        few = [*needed[:2], False, False, False]
        d_x, d_weight, *_ = aten.run_backward(scaled, tensors[0], *linear, y, none, none, few, pixels)
        of_parameters = [(exact[-4], d_weight), exact[-3], (exact[-2], (weight * d_weight).sum(0)), exact[-1]]
        exact = [*([(exact[0], d_x)] if needed[0] else []), *of_parameters]
    return [y, y, *exact]

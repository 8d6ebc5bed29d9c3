"""Soft split, LayerNorm and Linear by Triton kernels: one implicit matrix product forward; backward three.

Saved for backward: the image, ``mu`` and ``r`` (8 bytes a token), the parameters, and, where the image wants a
gradient, the output.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from .. import triton_runtime as runtime
from ..launch import padded
from ..library import first_order, wants_gradient
from ..spec import Window
from ..triton_runtime import fake, operator
from . import aten_impl, launch
from .aten_impl import fold_norm

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


T2T = {"channels": 64, "window": Window((3, 3), (2, 2), (1, 1)), "outputs": 192, "normed": True, "training": False}
"""Stage 2 of T2T-ViT: what is asked about where a question names no sizes."""


def supports(request):
    """Why the kernels cannot run a call, or ``None``; a first call of its kind on a device is tried out."""
    why = runtime.reason(request, DTYPES)
    if why is not None:
        return why
    channels, window, outputs, normed, training = (request.sizes.get(name, usual) for name, usual in T2T.items())
    # torch.compile takes the trial's result for a constant and hands over constants only: a range fixes a symbolic size
    numbers = [len(range(n)) for n in (channels, *window[0], *window[1], *window[2], outputs)]
    return _trial(request.sizes.get("index"), request.dtype, *numbers, bool(normed), bool(training))


def _trial(index, dtype, channels, kh, kw, sh, sw, ph, pw, *rest):
    window = Window((kh, kw), (sh, sw), (ph, pw))
    return runtime.trial("soft_split_linear", _run, _expected, index, dtype, channels, window, *rest)


# torch.compiler.assume_constant_result sets this, and imports the compiler to do so
_trial._dynamo_marked_constant = True


def _problem(device, dtype, channels, window, outputs, normed):
    """Two images of a few tokens each, the parameters, and an upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    height, width = (k + 3 * s for k, s in zip(window.kernel, window.stride, strict=True))
    h, w = window.grid(height, width)
    columns = channels * window.taps

    def random(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(device, dtype)

    x = random(2, channels, height, width).contiguous(memory_format=torch.channels_last)
    norm = (1 + random(columns, scale=0.1), random(columns, scale=0.1)) if normed else (None, None)
    tensors = (x, random(outputs, columns, scale=columns**-0.5), random(outputs), *norm, 1e-5 if normed else None)
    return tensors, random(2, h * w, outputs)


def _run(device, dtype, channels, window, outputs, normed, training):
    tensors, grad = _problem(device, dtype, channels, window, outputs, normed)
    y, mean, rstd = _forward(*tensors, *window, dtype)
    if not training:
        return (y,)
    d_x, products = _backward(grad, *tensors, *window, y, mean, rstd, True, True)
    return y, d_x, products if not normed else products * tensors[3]


def _expected(device, dtype, channels, window, outputs, normed, training):
    (x, weight, *rest), grad = _problem(device, dtype, channels, window, outputs, normed)
    wide = [None if t is None else t.float() for t in (x, weight, *rest[:3])]
    leaves = [t.requires_grad_(training) for t in wide[:2]]
    with torch.set_grad_enabled(training):
        y = aten_impl.forward(*leaves, *wide[2:], rest[3], *window, torch.float32)
    if not training:
        return (y,)
    d_x, d_weight = torch.autograd.grad(y, leaves, grad.float())
    if normed:  # what beta adds is none of the kernel's
        d_weight = d_weight - torch.outer(grad.float().sum((0, 1)), wide[4])
    return y, d_x, d_weight


class _Sizes(NamedTuple):
    """Of a call: what no kernel is compiled for."""

    batch: int
    grid: tuple
    outputs: int

    @property
    def length(self):
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self):
        return self.batch * self.length


class _Call:
    """What the kernels of one call share.

    Args:
        x: (B, C, H, W), any strides; dtype: of the operands of products; window, outputs: the call's.
    """

    def __init__(self, x, dtype, window, outputs):
        self.x, self.dtype, self.window = x, dtype, window
        self.channels, self.size = x.shape[1], x.shape[2:]
        self.sizes = _Sizes(x.shape[0], window.grid(*self.size), outputs)
        block = launch.block(self.channels)
        self.gather = block is None or x.stride(1) != 1

    @property
    def columns(self):
        return self.channels * self.window.taps

    def parameters(self, name):
        architecture = runtime.architecture(self.x.device)
        return launch.TABLE.chosen(name, architecture, self.dtype, self.channels, self.sizes.outputs)

    def constants(self, parameters):
        tf32 = self.dtype == torch.float32 and runtime.allows_tf32()
        return {
            **_window_constants(self.window),
            "CHANNELS": self.channels,
            "OPERAND": _triton_dtype(self.dtype),
            "NARROW": launch.NARROW,
            "EVEN": self.sizes.outputs % launch.NARROW == 0,
            "PRECISION": "tf32" if tf32 else "tf32x3",
            "num_warps": parameters["warps"],
            "num_stages": parameters["stages"],
            **runtime.FUSION,
        }

    def geometry(self):
        return *self.size, self.sizes.grid[1], self.sizes.length, self.sizes.tokens, self.sizes.outputs

    def singles(self):
        """An empty float32 value for each token, (B, h, w)."""
        return torch.empty((self.sizes.batch, *self.sizes.grid), dtype=torch.float32, device=self.x.device)


def _triton_dtype(dtype):
    from triton import language as tl

    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


@lru_cache(maxsize=64)
def _window_constants(window):
    names = ("KERNEL", "STRIDE", "PADDING")
    return {f"{name}_{axis}": pair[i] for name, pair in zip(names, window, strict=True) for i, axis in enumerate("HW")}


def _groups(outputs, parts):
    """How many groups of ``parts`` x NARROW outputs there are."""
    return -(-outputs // (launch.NARROW * parts))


def _block(call, parameters):
    return padded(parameters["block"]) if call.gather else min(parameters["block"], launch.block(call.channels))


def pack(weight, channels, block, width):
    """(O, K), columns by channel then tap, as (columns by tap then channel up to whole blocks, O up to ``width``)."""
    outputs, columns = weight.shape
    packed = weight.view(outputs, channels, -1).permute(2, 1, 0).reshape(columns, outputs)
    return torch.nn.functional.pad(packed, (0, width - outputs, 0, -columns % block)).contiguous()


def unpack(packed, channels, columns, outputs):
    """The (O, K) matrix that :func:`pack` packed."""
    return packed[:columns, :outputs].view(-1, channels, outputs).permute(2, 1, 0).reshape(outputs, columns)


def _folded(x, weight, bias, norm_weight, norm_bias, norm_eps, dtype):
    """The weight as operand, its row sums (``None`` without LayerNorm) and the offset."""
    if norm_eps is not None:
        return fold_norm(weight, bias, norm_weight, norm_bias, dtype)
    offset = weight.new_zeros(weight.shape[0]) if bias is None else bias
    return weight.to(dtype), None, offset.float()


def _fill(vector, width):
    return torch.nn.functional.pad(vector.float(), (0, width - vector.shape[0]))


@operator(
    "soft_split_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float? norm_eps, "
    "int[] kernel, int[] stride, int[] padding, ScalarType dtype) -> (Tensor, Tensor, Tensor)"
)
def _forward(x, weight, bias, norm_weight, norm_bias, norm_eps, kernel, stride, padding, dtype):
    from . import kernels

    call = _Call(x, dtype, Window(tuple(kernel), tuple(stride), tuple(padding)), weight.shape[0])
    parameters = call.parameters("forward")
    operand, row_sums, offset = _folded(x, weight, bias, norm_weight, norm_bias, norm_eps, dtype)
    sizes, block = call.sizes, _block(call, parameters)
    groups = _groups(sizes.outputs, parameters["parts"])
    width = groups * launch.NARROW * parameters["parts"]
    out = torch.empty((sizes.batch, sizes.length, sizes.outputs), dtype=dtype, device=x.device)
    mean, rstd = (offset.new_empty(0) if norm_eps is None else call.singles() for _ in range(2))
    if out.numel():
        kernels.split_linear_kernel[-(-sizes.tokens // parameters["tokens"]), groups](
            x,
            *x.stride(),
            pack(operand, call.channels, block, width),
            None if row_sums is None else _fill(row_sums, width),
            _fill(offset, width),
            norm_eps,
            out,
            mean,
            rstd,
            *call.geometry(),
            NORM=norm_eps is not None,
            SHIFT=x.dtype == torch.float32 or x.dtype != dtype,
            GATHER=call.gather,
            TOKENS=parameters["tokens"],
            BLOCK=block,
            PARTS=parameters["parts"],
            **call.constants(parameters),
        )
    return out, mean, rstd


def _fake_sizes(x, weight, kernel, stride, padding):
    h, w = Window(tuple(kernel), tuple(stride), tuple(padding)).grid(*x.shape[2:])
    return x.shape[0], h, w, weight.shape[0]


@fake("soft_split_linear")
def _fake(x, weight, bias, norm_weight, norm_bias, norm_eps, kernel, stride, padding, dtype):
    batch, h, w, outputs = _fake_sizes(x, weight, kernel, stride, padding)
    statistics = (batch, h, w) if norm_eps is not None else (0,)
    single = [x.new_empty(statistics, dtype=torch.float32) for _ in range(2)]
    return x.new_empty((batch, h * w, outputs), dtype=dtype), *single


def _gradient_dtype(dtype):
    """Of operands that hold ``r G``, which may leave the range of float16."""
    return torch.float32 if dtype == torch.float16 else dtype


def _products(call, grad, mean, rstd, norm):
    """``sum_t xhat_t G_t^T`` as (O, K) float32."""
    from . import kernels

    parameters, sizes = call.parameters("weight"), call.sizes
    block, groups = _block(call, parameters), _groups(sizes.outputs, parameters["parts"])
    blocks = -(-call.columns // block)
    tiles = -(-sizes.tokens // parameters["tokens"])
    wanted = parameters["programs"] * runtime.multiprocessors(call.x.device)
    splits = max(1, min(wanted // (blocks * groups), tiles))
    each = max(1, -(-tiles // splits))
    splits = max(1, -(-tiles // each))
    width = groups * launch.NARROW * parameters["parts"]
    found = torch.empty((splits, blocks * block, width), dtype=torch.float32, device=call.x.device)
    kernels.split_linear_weight_kernel[blocks, groups, splits](
        call.x,
        *call.x.stride(),
        grad,
        mean,
        rstd,
        found,
        *call.geometry(),
        each,
        NORM=norm,
        GATHER=call.gather,
        TOKENS=parameters["tokens"],
        BLOCK=block,
        PARTS=parameters["parts"],
        **call.constants(parameters),
    )
    return unpack(found.sum(0), call.channels, call.columns, sizes.outputs)


def _image_gradient(call, grad, operand, offset, y, mean, rstd, norm):
    """d_x (B, C, H, W) in x's dtype, channels last."""
    from . import kernels

    x, sizes = call.x, call.sizes
    alpha = kappa = None
    if norm:
        parameters = call.parameters("scalars")
        width = -(-sizes.outputs // launch.NARROW) * launch.NARROW
        alpha, kappa = call.singles(), call.singles()
        kernels.token_scalars_kernel[(-(-sizes.tokens // parameters["tokens"]),)](
            grad,
            y,
            _fill(offset, width),
            mean,
            rstd,
            alpha,
            kappa,
            sizes.tokens,
            sizes.outputs,
            call.columns,
            TOKENS=parameters["tokens"],
            NARROW=launch.NARROW,
            EVEN=sizes.outputs % launch.NARROW == 0,
            num_warps=parameters["warps"],
            **runtime.FUSION,
        )
    parameters = call.parameters("image")
    wider = _gradient_dtype(call.dtype) if norm else call.dtype
    block = min(parameters["block"], padded(call.channels))
    blocks = -(-call.channels // block)
    width = -(-sizes.outputs // launch.NARROW) * launch.NARROW
    packed = operand.view(sizes.outputs, call.channels, -1).permute(2, 0, 1)
    packed = torch.nn.functional.pad(packed, (0, blocks * block - call.channels, 0, width - sizes.outputs)).contiguous()
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    height, image_width = call.size
    (stride_h, stride_w), pixels = call.window.stride, parameters["tokens"]
    phase = sizes.batch * -(-height // stride_h) * -(-image_width // stride_w)
    constants = call.constants(parameters)
    if wider != call.dtype:
        constants |= {"OPERAND": _triton_dtype(wider), "PRECISION": "tf32"}
    kernels.split_linear_image_kernel[-(-phase // pixels), stride_h * stride_w, blocks](
        grad,
        packed,
        rstd,
        alpha,
        kappa,
        x,
        *x.stride(),
        d_x,
        *d_x.stride(),
        height,
        image_width,
        *sizes.grid,
        sizes.length,
        sizes.batch,
        sizes.outputs,
        NORM=norm,
        PIXELS=pixels,
        BLOCK=block,
        **constants,
    )
    return d_x


@operator(
    "soft_split_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, "
    "Tensor? norm_bias, float? norm_eps, int[] kernel, int[] stride, int[] padding, Tensor? y, Tensor mean, "
    "Tensor rstd, bool need_image, bool need_products) -> (Tensor, Tensor)"
)
def _backward(
    grad,
    x,
    weight,
    bias,
    norm_weight,
    norm_bias,
    norm_eps,
    kernel,
    stride,
    padding,
    y,
    mean,
    rstd,
    need_image,
    need_products,
):
    call = _Call(x, grad.dtype, Window(tuple(kernel), tuple(stride), tuple(padding)), weight.shape[0])
    grad, norm = grad.contiguous(), norm_eps is not None
    empty = weight.new_empty(0, dtype=torch.float32)
    d_x, products = x.new_empty(0), empty
    if need_products:
        products = _products(call, grad, mean, rstd, norm) if grad.numel() else empty.new_zeros(weight.shape)
    if need_image and x.numel():
        operand, _, offset = _folded(x, weight, bias, norm_weight, norm_bias, norm_eps, call.dtype)
        d_x = _image_gradient(call, grad, operand, offset, y, mean, rstd, norm)
    elif need_image:
        d_x = torch.empty_like(x)
    return d_x, products


@fake("soft_split_linear_backward")
def _fake_backward(grad, x, weight, *rest):
    *_, need_image, need_products = rest
    d_x = x.new_empty(0)
    if need_image:
        d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return d_x, weight.new_empty(weight.shape if need_products else 0, dtype=torch.float32)


class SoftSplitLinear(torch.autograd.Function):
    """Gradients for the image and every parameter (derivation: docs/math.md, section 1)."""

    @staticmethod
    def forward(x, weight, bias, norm_weight, norm_bias, norm_eps, window, dtype):
        return torch.ops.t2t_fast_triton.soft_split_linear(
            x, weight, bias, norm_weight, norm_bias, norm_eps, *window, dtype
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.norm_eps, ctx.window, _ = inputs
        y, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        keep = ctx.needs_input_grad[0] and ctx.norm_eps is not None
        ctx.save_for_backward(*tensors, mean, rstd, y if keep else None)

    @staticmethod
    @first_order
    def backward(ctx, grad, _mean, _rstd):
        x, weight, bias, norm_weight, norm_bias, mean, rstd, y = ctx.saved_tensors
        need_x, need_weight, need_bias, need_gamma, need_beta = ctx.needs_input_grad[:5]
        d_x, products = torch.ops.t2t_fast_triton.soft_split_linear_backward(
            grad,
            x,
            weight,
            bias,
            norm_weight,
            norm_bias,
            ctx.norm_eps,
            *ctx.window,
            y,
            mean,
            rstd,
            need_x,
            need_weight or need_gamma,
        )
        total = grad.sum((0, 1), dtype=torch.float32) if need_bias or need_weight or need_beta else None
        d_weight, d_gamma, d_beta = parameter_gradients(
            products, total, weight, norm_weight, norm_bias, need_weight, need_gamma, need_beta
        )
        d_bias = total.to(bias.dtype) if need_bias else None
        return d_x if need_x else None, d_weight, d_bias, d_gamma, d_beta, None, None, None


def parameter_gradients(products, total, weight, norm_weight, norm_bias, need_weight, need_gamma, need_beta):
    """Gradients of weight, gamma and beta from ``P = sum_t G_t xhat_t^T`` and ``sum_t G_t``; ``None`` unless needed."""
    d_weight = d_gamma = d_beta = None
    if need_weight:
        d_weight = products if norm_weight is None else products * norm_weight
        if norm_bias is not None:
            d_weight = torch.addcmul(d_weight, total.unsqueeze(1), norm_bias.to(d_weight.dtype))
        d_weight = d_weight.to(weight.dtype)
    if need_gamma:
        d_gamma = (weight.to(products.dtype) * products).sum(0).to(norm_weight.dtype)
    if need_beta:
        d_beta = (total @ weight.to(total.dtype)).to(norm_bias.dtype)
    return d_weight, d_gamma, d_beta


def forward(x, weight, bias, norm_weight, norm_bias, norm_eps, kernel, stride, padding, dtype):
    window = tuple(map(tuple, (kernel, stride, padding)))
    arguments = (x, weight, bias, norm_weight, norm_bias, norm_eps)
    if wants_gradient(x, weight, bias, norm_weight, norm_bias):
        return SoftSplitLinear.apply(*arguments, window, dtype)[0]
    return torch.ops.t2t_fast_triton.soft_split_linear(*arguments, *window, dtype)[0]

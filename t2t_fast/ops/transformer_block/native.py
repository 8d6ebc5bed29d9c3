"""transformer_block as one native operator (``csrc/cpu``), an image and a tile of tokens at a time.

The tokens are float32; products are of bfloat16 for that dtype, else of float32. The Linears are packed, with the
LayerNorm before them folded in; inference keeps the packed weights. Saved for backward: x, qkv, the attention's result
and log-sum-exp, the sum behind the attention, fc1's output, and the parameters.
"""

from functools import partial

import torch

from .._common import native_library
from .._common.cached import FOLDED
from .._common.library import first_order, wants_gradient
from .._common.native_library import SINGLE, single
from .._common.replay import atomic, recorded_forward
from .autograd import Parameters, unpack

_KINDS = native_library.devices("transformer_block")

_LINEARS = (("qkv", "norm1"), ("proj", None), ("fc1", "norm2"), ("fc2", None))
"""Each Linear, and the LayerNorm before it."""


def supports(request):
    if torch.compiler.is_compiling():
        return "a compiled program cannot keep its packed weights"
    return native_library.reason(request, _KINDS, SINGLE)


@native_library.fake("pack_linear")
def _fake_pack(weight, bias, norm_weight, norm_bias, bf16, back):
    outputs, inputs = weight.shape
    return weight.new_empty(torch.ops.t2t_fast_native.packed_linear_size(inputs, outputs, bf16, back))


@native_library.fake("transformer_block")
def _fake(x, qkv, proj, fc1, fc2, heads, hidden, scale, norm1_eps, norm2_eps, factors, bf16, save):
    batch, length, width = x.shape
    dtype = torch.bfloat16 if bf16 else torch.float32

    def rows(columns, dtype=dtype):
        return x.new_empty((batch, length, columns) if save else 0, dtype=dtype)

    lse = x.new_empty((batch, heads, length) if save else 0)
    return x.new_empty(x.shape), rows(3 * width), rows(width), lse, rows(width, torch.float32), rows(hidden)


@native_library.fake("transformer_block_backward")
def _fake_backward(grad, x, qkv, proj, fc1, fc2, heads, hidden, *rest):
    width, needed = x.shape[2], rest[-1]
    shapes = (3 * width, width), (width, width), (hidden, width), (width, hidden)
    found = [x.new_empty(x.shape)]
    for (outputs, inputs), wants in zip(shapes, needed, strict=True):
        found += [x.new_empty((outputs, inputs) if wants else 0), x.new_empty(outputs if wants else 0)]
    return tuple(found)


def _parts(parameters, linear, norm):
    """Weight and bias of a Linear, and of the LayerNorm before it."""
    names = [f"{linear}_weight", f"{linear}_bias", *([f"{norm}_weight", f"{norm}_bias"] if norm else [])]
    return [*(getattr(parameters, name) for name in names), *([] if norm else [None, None])]


def _pack(parameters, bf16, back):
    """The four Linears, packed for the instruction set in use."""
    operator = torch.ops.t2t_fast_native.pack_linear
    return [operator(*single(*_parts(parameters, *names)), bf16, back) for names in _LINEARS]


@atomic
def _kept(bf16, *parameters):
    """The packed Linears of inference."""
    return FOLDED.get(parameters, ("transformer_block", bf16), partial(_pack, Parameters(*parameters), bf16, False))


def _run(x, parameters, options, seed, save):
    bf16 = options.dtype == torch.bfloat16
    packed = _pack(parameters, bf16, False) if save else _kept(bf16, *parameters)
    numbers = _options(x, parameters, options, seed)
    return torch.ops.t2t_fast_native.transformer_block(x.to(torch.float32), *packed, *numbers, save)


def _options(x, parameters, options, seed):
    numbers = options.heads, parameters.fc1_weight.shape[0], options.scale, options.norm1_eps, options.norm2_eps
    return *numbers, options.factors(x.shape, seed), options.dtype == torch.bfloat16


def _gradients(parameters, linear, norm, products, sums, needed):
    """The gradients of a Linear's parameters and of the LayerNorm's before it, by name.

    products: sum over tokens of G xhat^T, sums: of G. Formulas: docs/math.md, section 1.
    """
    weight, _, gamma, beta = single(*_parts(parameters, linear, norm))
    found = {f"{linear}_bias": sums}
    if norm and needed[f"{norm}_weight"]:
        found[f"{norm}_weight"] = (weight * products).sum(0)
    if norm and needed[f"{norm}_bias"]:
        found[f"{norm}_bias"] = sums @ weight
    if needed[f"{linear}_weight"]:
        products = products if gamma is None else products.mul_(gamma)
        found[f"{linear}_weight"] = products if beta is None else products.addr_(sums, beta)
    return found


class TransformerBlock(torch.autograd.Function):
    """Gradients for x and every parameter."""

    @staticmethod
    @recorded_forward
    def forward(ctx, x, seed, options, *parameters):
        out, *saved = _run(x, Parameters(*parameters), options, seed, True)
        ctx.options = options
        ctx.save_for_backward(x, seed, *saved, *parameters)
        return out.to(x.dtype)

    @staticmethod
    @first_order
    def backward(ctx, grad):
        x, seed, *saved = ctx.saved_tensors
        saved, parameters = saved[:5], Parameters(*saved[5:])
        needed = dict(zip(Parameters._fields, ctx.needs_input_grad[3:], strict=True))
        wanted = [
            any(needed[f"{name}_{kind}"] for name in names if name for kind in ("weight", "bias")) for names in _LINEARS
        ]
        bf16 = ctx.options.dtype == torch.bfloat16
        d_x, *found = torch.ops.t2t_fast_native.transformer_block_backward(
            *single(grad, x),
            *_pack(parameters, bf16, True),
            *_options(x, parameters, ctx.options, seed),
            *saved,
            [int(each) for each in wanted],
        )
        gradients = dict.fromkeys(Parameters._fields)
        for names, wants, products, sums in zip(_LINEARS, wanted, found[::2], found[1::2], strict=True):
            if wants:
                gradients |= _gradients(parameters, *names, products, sums, needed)
        given = [
            None if parameter is None or not needed[name] else gradients[name].to(parameter.dtype)
            for name, parameter in parameters._asdict().items()
        ]
        return d_x.to(x.dtype), None, None, *given


def forward(x, *arguments):
    """(B, N, D) -> (B, N, D) in x's dtype."""
    parameters, options, seed = unpack(*arguments)
    if wants_gradient(x, *parameters):
        return TransformerBlock.apply(x, seed, options, *parameters)
    return _run(x, parameters, options, seed, False)[0].to(x.dtype)

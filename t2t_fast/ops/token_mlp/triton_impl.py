"""The tail of a token layer by Triton kernels: one pass over the tokens forward, one backward.

Saved for backward: y, v, the dropout seed and the parameters; everything else is computed again. Nothing of token
length but the results is written.
"""

import math
from functools import lru_cache

import torch

from .. import triton_runtime as runtime
from ..launch import cut, padded
from ..triton_runtime import fake, operator
from . import aten_impl, launch
from .tail import Options, Tail, differentiable

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

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
"""How the backward kernel lays the parameters' gradients one behind the other."""


def _sizes(request):
    """Channels and hidden units."""
    width = request.sizes.get("width", 64)
    return width, request.sizes.get("hidden", width)


def obstacle(request):
    """Why the kernels are not for a call, or ``None``; nothing is tried."""
    why = runtime.reason(request, DTYPES)
    for size, of in zip(_sizes(request), ("channels", "hidden units"), strict=True):
        if why is None and not 1 <= size <= launch.LARGEST:
            why = f"the Triton kernels of the tail take 1 to {launch.LARGEST} {of}, got {size}"
    return why


def kind(request):
    """What makes kernels differ: the parameters' dtype, channels, hidden units, and whether there is dropout and
    backward. Constants, as torch.compile needs them.
    """
    width, hidden = (runtime.fixed(size) for size in _sizes(request))
    training = bool(request.sizes.get("training", True))
    dropout = bool(request.sizes.get("dropout", training))
    # LayerNorm of one or two values leaves nothing of gradients, or next to nothing: no error could be relative to that
    return runtime.operand_dtype(request, "parameters"), max(width, 3), hidden, dropout, training


def supports(request):
    """Why the kernels cannot run a call, or ``None``; a first call of its kind on a device is tried out."""
    return obstacle(request) or _trial(request.sizes.get("index"), request.dtype, *kind(request))


def _trial(index, dtype, *call):
    return runtime.trial("token_mlp", _run, _expected, index, dtype, *call)


# torch.compiler.assume_constant_result sets this, and imports the compiler to do so
_trial._dynamo_marked_constant = True


def problem(device, dtype, parameters, width, hidden, dropout):
    """Two sequences longer than a tile, v inside a wider tensor; an upstream gradient, parameters and a seed."""
    generator = torch.Generator().manual_seed(0)
    shape = 2, runtime.TRIAL_TOKENS
    grad, y, packed = (
        torch.randn(*shape, size, generator=generator).to(device, dtype) for size in (width, width, 3 * width)
    )
    shapes = Tail((width, width), width, width, width, (hidden, width), hidden, (width, hidden), width)
    drawn = [torch.randn(shape, generator=generator) * width**-0.5 for shape in shapes]
    drawn[Tail._fields.index("norm_weight")] += 1
    tail = Tail(*(t.to(device, parameters) for t in drawn))
    drops, seed = (0.0, 0.0), None
    if dropout:
        drops, seed = (0.1, 0.2), torch.tensor(-(2**40) - 1, device=device)
    return grad, y, packed[..., -width:], tail, Options(1e-5, *drops), seed


def _both(forward, backward, grad, arguments, training):
    out = forward(*arguments)
    if not training:
        return (out,)
    d_y, d_v, gradients = backward(grad, *arguments, [True] * len(Tail._fields))
    return out, d_y, d_v, *gradients


def _run(device, dtype, *call):
    *sizes, training = call
    grad, *arguments = problem(device, dtype, *sizes)
    with runtime.crowded():
        again = run(*arguments)
    return [again, *_both(run, run_backward, grad, arguments, training)]


def _expected(device, dtype, *call):
    *sizes, training = call
    grad, y, v, tail, *rest = problem(device, dtype, *sizes)
    arguments = [y.float(), v.float(), Tail(*(t.float() for t in tail)), *rest]
    out, *gradients = _both(aten_impl.run, aten_impl.run_backward, grad.float(), arguments, training)
    return [out, out, *gradients]


@lru_cache(maxsize=1024)
def _plan(found, dtype, width, hidden, sequences, length, processors, tf32):
    """Grid, what a kernel takes behind its tensors, the launch parameters, and the kernels' common constants."""
    parameters = dict(found)
    tokens = parameters["tokens"]
    tiles = -(-length // tokens)
    programs, own = cut(sequences * tiles * tokens, 1, tokens, parameters["programs"] * processors)
    constants = {
        "WIDTH": padded(width),
        "HIDDEN": padded(hidden),
        "TOKENS": tokens,
        "EVEN": padded(width) == width,
        "OCTETS": width % 8 == 0,
        "KEEP": bool(parameters["keep"]),
        "PRECISION": "tf32" if tf32 else "tf32x3",
        "num_warps": parameters["warps"],
        "num_stages": parameters["stages"],
        **runtime.FUSION,
    }
    sizes = length, width, hidden, sequences * tiles, own
    return programs, sizes, parameters, constants


def _planned(name, y, tail, sequences):
    length, width = y.shape[-2:]
    hidden = tail.fc1_weight.shape[0]
    # forward by how many tokens there are, too
    section = runtime.section(y.device, sequences * length) if name == "tail" else runtime.architecture(y.device)
    found = launch.TABLE.chosen(name, section, y.dtype, width, hidden)
    tf32 = y.dtype == torch.float32 and runtime.allows_tf32()
    return _plan(
        tuple(found.items()),
        y.dtype,
        width,
        hidden,
        sequences,
        length,
        runtime.multiprocessors(y.device),
        tf32,
    )


def _strided(x):
    """A (..., L, E) tensor as the kernels take it: itself, and strides of sequence, token and column."""
    x = runtime.readable(x if x.ndim == 3 else x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:]))
    return x, *x.stride()


def _inner(strided):
    """The strides of token and column of some tensors (:func:`_strided`), one behind the other."""
    return tuple(stride for _, _, *of_token_and_column in strided for stride in of_token_and_column)


def dropout(options, seed):
    """The seed and what the masks of projection and MLP are made by (philox.py), ``None`` where there is no dropout."""
    p1, p2 = options.proj_drop, options.mlp_drop
    a, b = round(65536 * p1), round(65536 * p2)
    begin = a - round(a * b / 65536)
    proj = None, float(a) if p1 > 0 else None, 1.0 / (1.0 - p1)
    mlp = float(begin), float(b) if p2 > 0 else None, 1.0 / (1.0 - p2)
    return seed if p1 > 0 or p2 > 0 else None, proj, mlp


@operator("token_mlp(Tensor y, Tensor v, Tensor? seed, float[] options, Tensor?[] tail) -> Tensor")
def _forward(y, v, seed, options, tail):
    from . import kernels

    tail, options = Tail(*tail), Options(*options)
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if not out.numel():
        return out
    programs, sizes, found, constants = _planned("tail", y, tail, math.prod(y.shape[:-2]))
    parameters = Tail(*(None if t is None else t.contiguous() for t in tail))
    strided = [_strided(x) for x in (y, v)]
    kernels.tail_kernel[(programs,)](
        *strided,
        out,
        parameters,
        options.norm_eps,
        *dropout(options, seed),
        *sizes,
        STRIDES=_inner(strided),
        LEAN=found["lean"],
        **constants,
    )
    return out


@fake("token_mlp")
def _fake(y, v, seed, options, tail):
    return y.new_empty(y.shape)


def _lengths(tail):
    """How many values each gradient of :data:`_ORDER` has, whether or not the parameter is there."""
    hidden, width = tail.fc1_weight.shape
    return width * width, width, width * hidden, width, width, hidden, width * hidden, width


@operator(
    "token_mlp_backward(Tensor grad, Tensor y, Tensor v, Tensor? seed, float[] options, Tensor?[] tail, "
    "bool need_tail) -> (Tensor, Tensor, Tensor)"
)
def _backward(grad, y, v, seed, options, tail, need_tail):
    from . import kernels_backward

    tail, options = Tail(*tail), Options(*options)
    d_y, d_v = (torch.empty(y.shape, dtype=y.dtype, device=y.device) for _ in range(2))
    length = sum(_lengths(tail)) if need_tail else 0
    if not y.numel():
        return d_y, d_v, torch.zeros(length, dtype=torch.float32, device=y.device)
    programs, sizes, parameters, constants = _planned("tail_backward", y, tail, math.prod(y.shape[:-2]))
    shares = torch.empty(programs, length, dtype=torch.float32, device=y.device)
    strided = [_strided(x) for x in (grad, y, v)]
    tail = Tail(*(None if t is None else t.contiguous() for t in tail))
    # what a launch computes: d_y and d_v, the projection's gradients, those behind it
    parts = [(True, need_tail, need_tail)]
    if parameters["split"] and need_tail:
        parts = [(True, True, False), (False, False, True)]
    for need_inputs, need_proj, need_mlp in parts:
        kernels_backward.tail_backward_kernel[(programs,)](
            *strided,
            d_y,
            d_v,
            shares,
            tail,
            options.norm_eps,
            *dropout(options, seed),
            *sizes,
            STRIDES=_inner(strided),
            NEED_INPUTS=need_inputs,
            NEED_PROJ=need_proj,
            NEED_MLP=need_mlp,
            SCALED=y.dtype == torch.float16,
            LEAN=parameters["lean"],
            **constants,
        )
    return d_y, d_v, shares.sum(0)


@fake("token_mlp_backward")
def _fake_backward(grad, y, v, seed, options, tail, need_tail):
    length = sum(_lengths(Tail(*tail))) if need_tail else 0
    return y.new_empty(y.shape), y.new_empty(y.shape), y.new_empty(length, dtype=torch.float32)


def run(y, v, tail, options, seed):
    """Forward without autograd."""
    return torch.ops.t2t_fast_triton.token_mlp(y, v, seed, list(options), list(tail))


def run_backward(grad, y, v, tail, options, seed, needed):
    """All gradients, those of y and v in y's dtype."""
    d_y, d_v, flat = torch.ops.t2t_fast_triton.token_mlp_backward(
        grad, y, v, seed, list(options), list(tail), any(needed)
    )
    if not any(needed):
        return d_y, d_v, [None] * len(tail)
    found = dict(zip(_ORDER, flat.split(_lengths(tail)), strict=True))
    gradients = [
        found[name].view(parameter.shape).to(parameter.dtype) if wanted and parameter is not None else None
        for name, parameter, wanted in zip(Tail._fields, tail, needed, strict=True)
    ]
    return d_y, d_v, gradients


forward = differentiable(run, run_backward)

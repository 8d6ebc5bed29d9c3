"""Performer attention by Triton kernels: two passes over the tokens forward, two backward.

The kernels are in kernels.py and kernels_backward.py, those for large states in kernels_chunked.py. Saved for
backward: q, k, v, w, the mask and the key state, m (E + 1) floats a sequence. No float32 tensor of token length is ever
written.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch

from .. import triton_runtime as runtime
from ..launch import cut, padded
from ..library import first_order, wants_gradient
from ..triton_runtime import fake, operator
from . import aten_impl, launch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEADROOM = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 6.0}
"""How far below 1 (in powers of 2) the weights start, so that later ones have room: float16 ends at 2^16."""


def obstacle(request):
    """Why the kernels are not for a call, or ``None``; nothing is tried."""
    why = runtime.reason(request, DTYPES)
    width = request.sizes.get("width", 64)
    if why is None and width > launch.LARGEST_WIDTH:
        why = f"the Triton kernels take up to {launch.LARGEST_WIDTH} channels, got {width}"
    return why


def kind(request):
    """What makes kernels differ: w's dtype, the channels, the features, and whether there is a key mask, backward, and
    a gradient of w. Constants, as torch.compile needs them.
    """
    sizes = request.sizes
    # from some number of features on, more of them are more chunks for the same kernels
    width, features = runtime.fixed(sizes.get("width", 64)), runtime.fixed(sizes.get("features", 32))
    masked, training = bool(sizes.get("masked", False)), bool(sizes.get("training", False))
    w_gradient = training and bool(sizes.get("w_gradient", False))
    return runtime.operand_dtype(request, "w"), width, min(features, launch.ALIKE), masked, training, w_gradient


def supports(request):
    """Why the kernels cannot run a call, or ``None``; a first call of its kind on a device is tried out."""
    return obstacle(request) or _trial(request.sizes.get("index"), request.dtype, *kind(request))


def _trial(index, dtype, *call):
    return runtime.trial("performer_attention", _run, _expected, index, dtype, *call)


# torch.compiler.assume_constant_result sets this, and imports the compiler to do so
_trial._dynamo_marked_constant = True


def problem(device, dtype, w_dtype, width, features):
    """Two sequences of norm 2, longer than a tile, side by side in one tensor: q, k, v; w; and an upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, runtime.TRIAL_TOKENS, width, generator=generator) for _ in range(4))
    w = torch.randn(features, width, generator=generator)
    packed = torch.cat([2 * width**-0.5 * k, 2 * width**-0.5 * q, v], -1).to(device, dtype)
    k, q, v = packed.chunk(3, dim=-1)
    return q, k, v, w.to(device, w_dtype), grad.to(device, dtype)


def _mask_of_problem(k, masked):
    """Every third key is left out."""
    return torch.arange(k.shape[1], device=k.device).remainder(3).ne(0).repeat(k.shape[0], 1) if masked else None


def _run(device, dtype, w_dtype, width, features, masked, training, w_gradient):
    *tensors, grad = problem(device, dtype, w_dtype, width, features)
    rest = 1e-8, _mask_of_problem(tensors[1], masked)
    y, lz, state = _forward(*tensors, *rest)
    if not training:
        return (y,)
    *found, d_w = _backward(grad, *tensors, *rest, lz, state, w_gradient)
    return (y, *found, d_w) if w_gradient else (y, *found)


def _expected(device, dtype, w_dtype, width, features, masked, training, w_gradient):
    *tensors, grad = (t.float() for t in problem(device, dtype, w_dtype, width, features))
    rest = 1e-8, _mask_of_problem(tensors[1], masked)
    y, lz, state = aten_impl.attend(*tensors, *rest)
    if not training:
        return (y,)
    d_q, d_k, *others = aten_impl.gradients(grad, *tensors, *rest, lz, state, w_gradient)
    # a softmax over one feature does not depend on q: d_q is what of two terms of d_k's size does not cancel
    return (y, (d_q, d_k) if features == 1 else d_q, d_k, *(t for t in others if t is not None))


class _Plan(NamedTuple):
    """A pass over the tokens of a call: how it is cut, and the constants that its kernel takes."""

    splits: int
    tiles: int
    chunks: int
    """Of the features; 0: a program takes all at once."""
    constants: dict


@lru_cache(maxsize=1024)
def _plan(found, dtype, width, features, length, sequences, processors, tf32, backward):
    from triton import language as tl

    parameters = dict(found)
    whole = padded(width)
    constants = {
        "WIDTH": whole,
        "FEATURES": parameters["features"] or padded(features),
        "TOKENS": parameters["tokens"],
        "EVEN": whole == width,
        "PRECISION": "tf32" if tf32 else "tf32x3",
        "num_warps": parameters["warps"],
        "num_stages": parameters["stages"],
        **runtime.FUSION,
    }
    if parameters["features"]:
        constants["maxnreg"] = 255
    if backward:
        constants["GRADIENT"] = tl.bfloat16 if dtype == torch.bfloat16 else tl.float32
    divided = cut(length, sequences, parameters["tokens"], parameters["programs"] * processors)
    chunks = -(-features // parameters["features"]) if parameters["features"] else 0
    return _Plan(divided.splits, divided.tiles, chunks, constants)


class Call:
    """What the passes of one call share, like the shape of its sequences."""

    def __init__(self, like, w):
        shape = like.shape
        self.dtype, self.device, self.w = like.dtype, like.device, w
        self.outer, self.width, self.features = shape[:-2], shape[-1], w.shape[0]
        self.heads = shape[1] if len(shape) == 4 else 1
        self.sequences = shape[0] * self.heads
        self.directions = (w, *w.stride())

    def plan(self, name, length):
        """The :class:`_Plan` of a pass."""
        architecture = runtime.architecture(self.device)
        found = launch.TABLE.chosen(name, architecture, self.dtype, self.width, self.features)
        tf32 = self.dtype == torch.float32 and runtime.allows_tf32()
        return _plan(
            tuple(found.items()),
            self.dtype,
            self.width,
            self.features,
            length,
            self.sequences,
            runtime.multiprocessors(self.device),
            tf32,
            name.endswith("backward"),
        )

    def sizes(self, length, tiles):
        return self.heads, length, self.width, self.features, tiles

    def log_eps(self, eps):
        return math.log2(self.features * eps) if eps > 0 else -math.inf

    def key_states(self, *splits):
        """Empty lz and S in float32."""
        lz = torch.empty((self.sequences, *splits, self.features), dtype=torch.float32, device=self.device)
        return lz, lz.new_empty((*lz.shape, self.width))


def strided(x):
    """A (B, L, E) or (B, heads, L, E) tensor as a kernel takes it: with four strides."""
    strides = x.stride()
    return (x, strides[0], 0, *strides[1:]) if len(strides) == 3 else (x, *strides)


def readable(x):
    """:func:`strided` of an input, or of a copy where it must be."""
    return strided(runtime.readable(x))


def _mask(key_mask):
    return None if key_mask is None else (key_mask, *key_mask.stride())


def key_state(call, k, v, key_mask):
    from . import kernels

    length = k.shape[-2]
    splits, tiles, chunks, constants = call.plan("keys", length)
    lz, state = call.key_states(splits)
    if call.sequences:
        kernels.keys_kernel[call.sequences, splits, chunks or 1](
            readable(k),
            readable(v),
            call.directions,
            _mask(key_mask),
            lz,
            state,
            *call.sizes(length, tiles),
            HEADROOM=HEADROOM[call.dtype],
            SPECULATE=call.dtype != torch.float32,  # there it costs the registers that products in three parts need
            **constants,
        )
    return merged(call, lz, state)


def merged(call, lz, state):
    """One key state of several splits' ``lz`` (sequences, splits, m) and ``state`` (sequences, splits, m, E)."""
    from . import kernels

    splits = lz.shape[1]
    if splits > 1 and call.sequences:
        parts, (lz, state) = (lz, state), call.key_states()
        kernels.merge_kernel[call.sequences, call.features](
            *parts,
            lz,
            state,
            call.width,
            call.features,
            splits,
            WIDTH=padded(call.width),
            BLOCK=32,
            **runtime.FUSION,
        )
    return lz.view(*call.outer, call.features), state.view(*call.outer, call.features, call.width)


@operator("performer_read_out(Tensor q, Tensor w, float eps, Tensor lz, Tensor state) -> Tensor")
def read_out(q, w, eps, lz, state):
    """The pass over the queries, forward: y (..., L, E), contiguous."""
    from . import kernels, kernels_chunked

    call, length = Call(q, w), q.shape[-2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    splits, tiles, chunks, constants = call.plan("queries", length)
    kernel = kernels_chunked.queries_chunked_kernel if chunks else kernels.queries_kernel
    if out.numel():
        kernel[call.sequences, splits](
            readable(q),
            call.directions,
            lz,
            state,
            call.log_eps(eps),
            strided(out),
            *call.sizes(length, tiles),
            **constants,
        )
    return out


@fake("performer_read_out")
def _fake_read_out(q, w, eps, lz, state):
    return q.new_empty(q.shape)


def _queries_backward(call, grad, q, eps, lz, state, need_w, d_q):
    from . import kernels_backward, kernels_chunked

    length = q.shape[-2]
    splits, tiles, chunks, constants = call.plan("queries_backward", length)
    d_lz, d_state = call.key_states(splits)
    d_w = torch.empty_like(d_state) if need_w else None
    kernel = kernels_chunked.queries_backward_chunked_kernel if chunks else kernels_backward.queries_backward_kernel
    if call.sequences:
        kernel[call.sequences, splits, chunks or 1](
            readable(grad),
            readable(q),
            call.directions,
            lz,
            state,
            call.log_eps(eps),
            strided(d_q),
            d_lz,
            d_state,
            d_w,
            *call.sizes(length, tiles),
            **constants,
        )
    if splits == 1:
        return d_lz, d_state, d_w
    return d_lz.sum(1), d_state.sum(1), d_w


def _keys_backward(call, k, v, key_mask, lz, state, d_lz, d_state, skip, need_w, d_k, d_v):
    from . import kernels_backward, kernels_chunked

    length = k.shape[-2]
    splits, tiles, chunks, constants = call.plan("keys_backward", length)
    d_w = call.key_states(splits)[1] if need_w else None
    kernel = kernels_chunked.keys_backward_chunked_kernel if chunks else kernels_backward.keys_backward_kernel
    if call.sequences:
        kernel[call.sequences, splits, chunks if chunks and need_w else 1](
            readable(k),
            readable(v),
            call.directions,
            _mask(key_mask),
            lz,
            state,
            d_lz,
            d_state,
            None if skip is None else readable(skip),
            strided(d_k),
            strided(d_v),
            d_w,
            *call.sizes(length, tiles),
            **constants,
        )
    return d_w


def gradients(grad, q, k, v, w, eps, key_mask, lz, state, skip, need_w, d_q, d_k, d_v):
    """Write d_q, d_k and d_v (any strides; ``skip`` is added to d_v). Returns d_w (m, E) float32, or ``None``."""
    call = Call(q, w)
    d_lz, d_state, from_queries = _queries_backward(call, grad, q, eps, lz, state, need_w, d_q)
    from_keys = _keys_backward(call, k, v, key_mask, lz, state, d_lz, d_state, skip, need_w, d_k, d_v)
    return from_queries.sum((0, 1)) + from_keys.sum((0, 1)) if need_w else None


@operator(
    "performer_attention(Tensor q, Tensor k, Tensor v, Tensor w, float eps, Tensor? key_mask) "
    "-> (Tensor, Tensor, Tensor)"
)
def _forward(q, k, v, w, eps, key_mask):
    lz, state = key_state(Call(q, w), k, v, key_mask)
    return read_out(q, w, eps, lz, state), lz, state


@fake("performer_attention")
def _fake(q, k, v, w, eps, key_mask):
    single = q.new_empty(0, dtype=torch.float32)
    lz = single.new_empty(*q.shape[:-2], w.shape[0])
    return q.new_empty(q.shape), lz, single.new_empty(*q.shape[:-2], *w.shape)


@operator(
    "performer_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor w, float eps, Tensor? key_mask, "
    "Tensor lz, Tensor state, bool need_w) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _backward(grad, q, k, v, w, eps, key_mask, lz, state, need_w):
    d_q, d_k, d_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    d_w = gradients(grad, q, k, v, w, eps, key_mask, lz, state, None, need_w, d_q, d_k, d_v)
    return d_q, d_k, d_v, lz.new_empty(0) if d_w is None else d_w


@fake("performer_attention_backward")
def _fake_backward(grad, q, k, v, w, eps, key_mask, lz, state, need_w):
    return *(t.new_empty(t.shape) for t in (q, k, v)), lz.new_empty(w.shape if need_w else 0)


class PerformerAttention(torch.autograd.Function):
    """Gradients for q, k, v, and for w where it is asked for."""

    @staticmethod
    def forward(q, k, v, w, eps, key_mask):
        return torch.ops.t2t_fast_triton.performer_attention(q, k, v, w, eps, key_mask)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.eps, key_mask = inputs
        _, lz, state = output
        ctx.mark_non_differentiable(lz, state)
        ctx.save_for_backward(*tensors, key_mask, lz, state)

    @staticmethod
    @first_order
    def backward(ctx, grad, _lz, _state):
        q, k, v, w, key_mask, lz, state = ctx.saved_tensors
        need_w = ctx.needs_input_grad[3]
        *found, d_w = torch.ops.t2t_fast_triton.performer_attention_backward(
            grad, q, k, v, w, ctx.eps, key_mask, lz, state, need_w
        )
        return *found, d_w.to(w.dtype) if need_w else None, None, None


def forward(q, k, v, w, eps, key_mask):
    if wants_gradient(q, k, v, w):
        return PerformerAttention.apply(q, k, v, w, eps, key_mask)[0]
    return torch.ops.t2t_fast_triton.performer_attention(q, k, v, w, eps, key_mask)[0]

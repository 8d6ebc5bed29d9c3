"""Performer attention by Triton kernels (kernels.py): two passes over the tokens forward, two backward.

Saved for backward: q, k, v, w, the mask and the key state, m (E + 1) floats a sequence. No float32 tensor of token
length is ever written.
"""

import math

import torch

from .. import triton_runtime as runtime
from ..library import first_order, wants_gradient
from ..triton_runtime import fake, operator
from . import aten_impl, launch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEADROOM = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 6.0}
"""How far below 1 (in powers of 2) the weights start, so that later ones have room: float16 ends at 2^16."""

OFFSET_LIMIT = 2**31
"""Offsets inside a tile are 32 bits wide."""


def supports(request):
    """Why the kernels cannot run a call, or ``None``; a first call of its kind on a device is tried out."""
    why = runtime.reason(request, DTYPES)
    if why is not None:
        return why
    width, features = int(request.sizes.get("width", 64)), int(request.sizes.get("features", 32))
    if width > launch.LARGEST_WIDTH or features > launch.LARGEST_FEATURES:
        limits = f"{launch.LARGEST_WIDTH} channels and {launch.LARGEST_FEATURES} features"
        return f"the Triton kernels take up to {limits}, got {width} and {features}"
    sizes = launch.padded(width), launch.padded(features), bool(request.sizes.get("training", False))
    return _trial(request.sizes.get("index"), request.dtype, *sizes)


def _trial(index, dtype, width, features, training):
    return runtime.trial("performer_attention", _run, _expected, index, dtype, width, features, training)


# torch.compiler.assume_constant_result sets this, and imports the compiler to do so
_trial._dynamo_marked_constant = True


def _problem(device, dtype, width, features):
    """Two sequences of norm 2, longer than a tile, and an upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, 150, width, generator=generator) for _ in range(4))
    w = torch.randn(features, width, generator=generator)
    scaled = (2 * width**-0.5 * q, 2 * width**-0.5 * k, v, w, grad)
    return [t.to(device, dtype) for t in scaled]


def _run(device, dtype, width, features, training):
    *tensors, grad = _problem(device, dtype, width, features)
    y, lz, state = _forward(*tensors, 1e-8, None)
    return (y, *_backward(grad, *tensors, 1e-8, None, lz, state, True)) if training else (y,)


def _expected(device, dtype, width, features, training):
    *tensors, grad = (t.float() for t in _problem(device, dtype, width, features))
    y, lz, state = aten_impl.attend(*tensors, 1e-8, None)
    return (y, *aten_impl.gradients(grad, *tensors, 1e-8, None, lz, state, True)) if training else (y,)


class _Call:
    """What the launches of one call share: sizes, dtypes, how products round."""

    def __init__(self, like, w):
        *self.outer, _, self.width = like.shape
        self.features = w.shape[0]
        self.heads = self.outer[1] if len(self.outer) == 2 else 1
        self.sequences = math.prod(self.outer)
        self.dtype, self.device, self.w = like.dtype, like.device, w

    def parameters(self, name, length):
        """Launch parameters of a pass, its cut, and the constants that every kernel takes."""
        from triton import language as tl

        found = launch.chosen(name, runtime.architecture(self.device), self.dtype, self.width, self.features)
        programs = found["programs"] * runtime.multiprocessors(self.device)
        width = launch.padded(self.width)
        constants = {
            "WIDTH": width,
            "FEATURES": launch.padded(self.features),
            "TOKENS": found["tokens"],
            "EVEN": width == self.width,
            "SPLIT": self.w.dtype != self.dtype,
            "PRECISION": "tf32" if runtime.allows_tf32() else "tf32x3",
            "UPCAST": runtime.INTERPRETED and self.dtype == torch.bfloat16,
            "num_warps": found["warps"],
            "num_stages": found["stages"],
        }
        if name.endswith("backward"):
            constants["GRADIENT"] = tl.bfloat16 if self.dtype == torch.bfloat16 else tl.float32
        return launch.cut(length, self.sequences, found["tokens"], programs), constants

    def view(self, x, name):
        """A tensor as a kernel takes it: itself, or a copy where its strides are too large, and its four strides."""
        reach = sum((size - 1) * abs(stride) for size, stride in zip((512, x.shape[-1]), x.stride()[-2:], strict=True))
        x = x if reach < OFFSET_LIMIT else x.contiguous()
        batch, *head, token, column = x.stride()
        strides = zip(("batch", "head", "token", "column"), (batch, *(head or (0,)), token, column), strict=True)
        return {name: x, **{f"{name}_{axis}": stride for axis, stride in strides}}

    def directions(self):
        return {"w": self.w, "w_row": self.w.stride(0), "w_column": self.w.stride(1)}

    def mask(self, key_mask):
        if key_mask is None:
            return {"mask": None, "mask_batch": 0, "mask_token": 0, "MASKED": False}
        batch, token = key_mask.stride()
        return {"mask": key_mask, "mask_batch": batch, "mask_token": token, "MASKED": True}

    def sizes(self, length, tiles):
        return {
            "heads": self.heads,
            "length": length,
            "width": self.width,
            "features": self.features,
            "tiles_per_split": tiles,
        }

    def log_eps(self, eps):
        return math.log2(self.features * eps) if eps > 0 else -math.inf

    def empty(self, *shape):
        return torch.empty(shape, dtype=torch.float32, device=self.device)


def _key_state(call, k, v, key_mask):
    from . import kernels

    length = k.shape[-2]
    (splits, tiles), constants = call.parameters("keys", length)
    lz = call.empty(call.sequences, splits, call.features)
    state = call.empty(call.sequences, splits, call.features, call.width)
    if call.sequences:
        kernels.keys_kernel[call.sequences, splits](
            **call.view(k, "k"),
            **call.view(v, "v"),
            **call.directions(),
            **call.mask(key_mask),
            **call.sizes(length, tiles),
            **constants,
            lz=lz,
            state=state,
            HEADROOM=HEADROOM[call.dtype],
            SPECULATE=True,
        )
    if splits > 1 and call.sequences:
        merged_lz, merged_state = call.empty(call.sequences, call.features), call.empty(*lz.shape[::2], call.width)
        kernels.merge_kernel[call.sequences, call.features](
            lz=lz,
            state=state,
            merged_lz=merged_lz,
            merged_state=merged_state,
            width=call.width,
            features=call.features,
            splits=splits,
            WIDTH=constants["WIDTH"],
            BLOCK=32,
        )
        lz, state = merged_lz, merged_state
    return lz.view(*call.outer, call.features), state.view(*call.outer, call.features, call.width)


@operator("performer_read_out(Tensor q, Tensor w, float eps, Tensor lz, Tensor state) -> Tensor")
def read_out(q, w, eps, lz, state):
    """The pass over the queries, forward: y (..., L, E), contiguous."""
    from . import kernels

    call = _Call(q, w)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    (splits, tiles), constants = call.parameters("queries", q.shape[-2])
    if out.numel():
        kernels.queries_kernel[call.sequences, splits](
            **call.view(q, "q"),
            **call.view(out, "out"),
            **call.directions(),
            **call.sizes(q.shape[-2], tiles),
            **constants,
            lz=lz,
            state=state,
            log_eps=call.log_eps(eps),
        )
    return out


@fake("performer_read_out")
def _fake_read_out(q, w, eps, lz, state):
    return q.new_empty(q.shape)


def _queries_backward(call, grad, q, eps, lz, state, need_w, d_q):
    from . import kernels

    length = q.shape[-2]
    (splits, tiles), constants = call.parameters("queries_backward", length)
    d_lz = call.empty(call.sequences, splits, call.features)
    d_state = call.empty(call.sequences, splits, call.features, call.width)
    d_w = torch.empty_like(d_state) if need_w else None
    if call.sequences:
        kernels.queries_backward_kernel[call.sequences, splits](
            **call.view(grad, "grad"),
            **call.view(q, "q"),
            **call.view(d_q, "d_q"),
            **call.directions(),
            **call.sizes(length, tiles),
            **constants,
            lz=lz,
            state=state,
            d_lz=d_lz,
            d_state=d_state,
            d_w=d_w,
            log_eps=call.log_eps(eps),
            NEED_W=need_w,
        )
    return d_lz.sum(1), d_state.sum(1), d_w


def _keys_backward(call, k, v, key_mask, lz, state, d_lz, d_state, skip, need_w, d_k, d_v):
    from . import kernels

    length = k.shape[-2]
    (splits, tiles), constants = call.parameters("keys_backward", length)
    d_w = call.empty(call.sequences, splits, call.features, call.width) if need_w else None
    if call.sequences:
        kernels.keys_backward_kernel[call.sequences, splits](
            **call.view(k, "k"),
            **call.view(v, "v"),
            **call.view(v if skip is None else skip, "skip"),
            **call.view(d_k, "d_k"),
            **call.view(d_v, "d_v"),
            **call.directions(),
            **call.mask(key_mask),
            **call.sizes(length, tiles),
            **constants,
            lz=lz,
            state=state,
            d_lz=d_lz,
            d_state=d_state,
            d_w=d_w,
            SKIP=skip is not None,
            NEED_W=need_w,
        )
    return d_w


def gradients(grad, q, k, v, w, eps, key_mask, lz, state, skip, need_w, d_q, d_k, d_v):
    """Write d_q, d_k and d_v (any strides; ``skip`` is added to d_v). Returns d_w (m, E) float32, or ``None``."""
    call = _Call(q, w)
    d_lz, d_state, from_queries = _queries_backward(call, grad, q, eps, lz, state, need_w, d_q)
    from_keys = _keys_backward(call, k, v, key_mask, lz, state, d_lz, d_state, skip, need_w, d_k, d_v)
    return from_queries.sum((0, 1)) + from_keys.sum((0, 1)) if need_w else None


@operator(
    "performer_attention(Tensor q, Tensor k, Tensor v, Tensor w, float eps, Tensor? key_mask) "
    "-> (Tensor, Tensor, Tensor)"
)
def _forward(q, k, v, w, eps, key_mask):
    lz, state = _key_state(_Call(q, w), k, v, key_mask)
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

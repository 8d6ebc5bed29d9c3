"""A Performer layer of Triton kernels: the soft split with Linear, the attention, the tail.

Forward, the pass over the queries and the tail are one launch where launch.py says so, and y never reaches memory.
The gradients of k, q and v, the skip's share of v's among them, are written side by side into one tensor.
"""

from functools import lru_cache

import torch

from .. import triton_runtime as runtime
from ..launch import cut, padded
from ..performer_attention import aten_impl as plain_attention
from ..performer_attention import triton_impl as attention
from ..soft_split_linear import triton_impl as split
from ..token_mlp import aten_impl as plain_tail
from ..token_mlp import triton_impl as tail
from ..token_mlp.tail import Options, Tail
from ..triton_runtime import fake, operator
from . import launch
from .composed import compose


def supports(request):
    """Why one of the kernels cannot run a call, or ``None``."""
    return attention.supports(request) or split.supports(request) or tail.supports(request)


@operator(
    "performer_kqv_backward(Tensor grad, Tensor kqv, Tensor w, float eps, Tensor lz, Tensor state, Tensor skip, "
    "bool need_w) -> (Tensor, Tensor)"
)
def _kqv_backward(grad, kqv, w, eps, lz, state, skip, need_w):
    k, q, v = kqv.chunk(3, dim=-1)
    d_kqv = torch.empty(kqv.shape, dtype=kqv.dtype, device=kqv.device)
    d_k, d_q, d_v = d_kqv.chunk(3, dim=-1)
    d_w = attention.gradients(grad, q, k, v, w, eps, None, lz, state, skip, need_w, d_q, d_k, d_v)
    return d_kqv, lz.new_empty(0) if d_w is None else d_w


@fake("performer_kqv_backward")
def _fake_kqv_backward(grad, kqv, w, eps, lz, state, skip, need_w):
    return kqv.new_empty(kqv.shape), lz.new_empty(w.shape if need_w else 0)


@lru_cache(maxsize=1024)
def _plan(found, dtype, width, features, hidden, length, sequences, processors, tf32):
    """Splits of a sequence, what the kernel takes behind its tensors, and its constants."""
    parameters = dict(found)
    splits, tiles = cut(length, sequences, parameters["tokens"], parameters["programs"] * processors)
    constants = {
        "WIDTH": width,
        "FEATURES": padded(features),
        "HIDDEN": padded(hidden),
        "TOKENS": parameters["tokens"],
        "KEEP": bool(parameters["keep"]),
        "PRECISION": "tf32" if tf32 else "tf32x3",
        "num_warps": parameters["warps"],
        "num_stages": parameters["stages"],
        **runtime.FUSION,
    }
    return splits, (length, features, hidden, tiles), constants


def read_out_tail(kqv, w, eps, lz, state, parameters, options, seed):
    """The layer's output by one launch, of the key state and the queries; for sizes that fit (launch.py)."""
    from . import kernels

    _, q, v = kqv.chunk(3, dim=-1)
    call, length = attention.Call(q, w), q.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    hidden = parameters.fc1_weight.shape[0]
    found = launch.TABLE.chosen(
        "read_out_tail", runtime.architecture(q.device), q.dtype, call.width, call.features, hidden
    )
    splits, sizes, constants = _plan(
        tuple(found.items()),
        q.dtype,
        call.width,
        call.features,
        hidden,
        length,
        call.sequences,
        runtime.multiprocessors(q.device),
        q.dtype == torch.float32 and runtime.allows_tf32(),
    )
    kernels.read_out_tail_kernel[call.sequences, splits](
        attention.readable(q),
        attention.readable(v),
        call.directions,
        lz,
        state,
        call.log_eps(eps),
        attention.strided(out),
        Tail(*(None if t is None else t.contiguous() for t in parameters)),
        options.norm_eps,
        *tail.dropout(options, seed),
        *sizes,
        **constants,
    )
    return out


def _trial(index, dtype, width, features, hidden):
    return runtime.trial("performer_layer", _run, _expected, index, dtype, width, features, hidden)


def _problem(device, dtype, width, features, hidden):
    """Two sequences longer than a tile, whose keys and queries have norm 2."""
    *_, parameters, options, seed = tail.problem(device, dtype, width, hidden)
    k, q, v, w, _ = attention.problem(device, dtype, width, features)
    return torch.cat([k, q, v], dim=-1), w, 1e-8, parameters, options, seed


def _run(device, dtype, width, features, hidden):
    kqv, w, eps, *rest = _problem(device, dtype, width, features, hidden)
    k, q, v = kqv.chunk(3, dim=-1)
    return (read_out_tail(kqv, w, eps, *attention.key_state(attention.Call(q, w), k, v, None), *rest),)


def _expected(device, dtype, width, features, hidden):
    kqv, w, eps, *rest = _problem(device, dtype, width, features, hidden)
    k, q, v = kqv.float().chunk(3, dim=-1)
    return (plain_tail.run(plain_attention.attend(q, k, v, w.float(), eps, None)[0], v, *rest),)


def _fused(kqv, w, hidden):
    """Whether the pass over the queries and the tail are one launch: by sizes and table, if it works on the device."""
    width, features = kqv.shape[-1] // 3, w.shape[0]
    if not launch.fits(width, features, hidden):
        return False
    architecture = runtime.architecture(kqv.device)
    if not launch.TABLE.chosen("read_out_tail", architecture, kqv.dtype, width, features, hidden)["fused"]:
        return False
    return _trial(kqv.device.index, kqv.dtype, padded(width), padded(features), padded(hidden)) is None


@operator(
    "performer_block(Tensor kqv, Tensor w, float eps, Tensor? seed, float[] options, Tensor?[] tail) "
    "-> (Tensor, Tensor, Tensor)"
)
def _forward(kqv, w, eps, seed, options, parameters):
    k, q, v = kqv.chunk(3, dim=-1)
    parameters, options = Tail(*parameters), Options(*options)
    lz, state = attention.key_state(attention.Call(q, w), k, v, None)
    if _fused(kqv, w, parameters.fc1_weight.shape[0]):
        return read_out_tail(kqv, w, eps, lz, state, parameters, options, seed), lz, state
    y = attention.read_out(q, w, eps, lz, state)
    return tail.run(y, v, parameters, options, seed), lz, state


@fake("performer_block")
def _fake(kqv, w, eps, seed, options, parameters):
    batch, length, width = kqv.shape
    lz = kqv.new_empty(batch, w.shape[0], dtype=torch.float32)
    return kqv.new_empty(batch, length, width // 3), lz, lz.new_empty(batch, *w.shape)


def _block(kqv, w, eps, parameters, options, seed):
    return torch.ops.t2t_fast_triton.performer_block(kqv, w, eps, seed, list(options), list(parameters))


def _rebuild(kqv, w, eps, lz, state):
    _, q, v = kqv.chunk(3, dim=-1)

    def finish(d_y, d_skip, need_w):
        d_kqv, d_w = torch.ops.t2t_fast_triton.performer_kqv_backward(d_y, kqv, w, eps, lz, state, d_skip, need_w)
        return d_kqv, d_w.to(w.dtype) if need_w else None

    return torch.ops.t2t_fast_triton.performer_read_out(q, w, eps, lz, state), v, finish


forward = compose(split, _block, _rebuild, tail.run_backward)

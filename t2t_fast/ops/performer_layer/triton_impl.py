"""A Performer layer of Triton kernels: the soft split with Linear, the attention, the tail.

Forward, the soft split and the pass over the keys are one launch where launch.py says so, and k is written for backward
alone; so are the pass over the queries and the tail, and y never reaches memory. The gradients of k, q and v, the
skip's share of v's among them, are written side by side into one tensor.
"""

from functools import lru_cache

import torch

from .. import triton_runtime as runtime
from ..launch import cut, padded
from ..performer_attention import aten_impl as plain_attention
from ..performer_attention import triton_impl as attention
from ..soft_split_linear import aten_impl as plain_split
from ..soft_split_linear import triton_impl as split
from ..soft_split_linear.call import Call, Folded
from ..soft_split_linear.layout import layout
from ..spec import Window
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


def split_keys(x, folded, w, norm_eps, window, dtype, pixels, whole):
    """kqv (of which q and v alone unless ``whole``), the windows' statistics (empty then), and the key state.

    By one launch, for sizes that fit (launch.py). folded, pixels: ``soft_split_linear``'s ``operands``.
    """
    from . import kernels

    features, width = w.shape
    call = Call(x, dtype, window, 3 * width, pixels)
    section = runtime.section(x.device, call.tokens)
    found = launch.TABLE.chosen("split_keys", section, dtype, width, features, call.layout.channels)
    wanted = found["programs"] * runtime.multiprocessors(x.device)
    splits, tiles = cut(call.length, x.shape[0], found["tokens"], wanted)
    out = torch.empty(x.shape[0], call.length, (3 if whole else 2) * width, dtype=dtype, device=x.device)
    mean, rstd = (call.singles() if whole else None for _ in range(2))
    sequences = attention.Call(out[..., :width], w)
    lz, state = sequences.key_states(splits)
    if sequences.sequences:
        kernels.split_keys_kernel[x.shape[0], splits](
            call.image(),
            folded,
            norm_eps,
            out,
            mean,
            rstd,
            sequences.directions,
            lz,
            state,
            *x.shape[2:],
            call.grid[1],
            call.length,
            features,
            tiles,
            LAYOUT=call.layout,
            SHIFT=x.dtype == torch.float32 or x.dtype != dtype,
            TOKENS=found["tokens"],
            BLOCK=call.layout.block(found["block"]),
            PACKED=folded.weight.shape[1],
            WIDTH=width,
            FEATURES=padded(features),
            HEADROOM=attention.HEADROOM[dtype],
            SPECULATE=dtype != torch.float32,
            WHOLE=whole,
            **call.products(found),
        )
    statistics = (mean, rstd) if whole else (lz.new_empty(0), lz.new_empty(0))
    return out, *statistics, *attention.merged(sequences, lz, state)


def _keys_trial(index, dtype, channels, window, width, features):
    return runtime.trial(
        "performer_layer", _tried_keys, _expected_keys, index, dtype, channels, window, width, features
    )


def _keys_problem(device, dtype, channels, window, width, features):
    tensors, _ = split.problem(device, dtype, channels, window, 3 * width, True)
    *_, w, _ = attention.problem(device, dtype, width, features)
    return tensors, w


def _tried_keys(device, dtype, channels, window, width, features):
    (x, *linear), w = _keys_problem(device, dtype, channels, window, width, features)
    found, _ = split.operands(x, *linear, 1e-5, window, dtype, (), False)
    arguments = x, found, w, 1e-5, window, dtype, None, True
    with runtime.crowded():
        again = split_keys(*arguments)
    return [*split_keys(*arguments), *again]


def _expected_keys(device, dtype, channels, window, width, features):
    (x, *linear), w = _keys_problem(device, dtype, channels, window, width, features)
    kqv, mean, rstd = plain_split.run(x.float(), *(t.float() for t in linear), 1e-5, window, torch.float32)
    k, _, v = kqv.chunk(3, dim=-1)
    lz, state = plain_attention.key_state(k, v, w.float())
    return 2 * [kqv, mean, rstd, lz.squeeze(-1), state]


def _keys_fused(x, dtype, window, width, features):
    """Whether the soft split and the pass over the keys are one launch: by sizes and table, if it works there."""
    if not launch.fits(width, features):
        return False
    channels, (h, w) = runtime.fixed(x.shape[1]), window.grid(*x.shape[2:])
    section, values = runtime.section(x.device, x.shape[0] * h * w), layout(channels, window).channels
    if not launch.TABLE.chosen("split_keys", section, dtype, width, features, values)["fused"]:
        return False
    return _keys_trial(x.device.index, dtype, channels, window, width, padded(features)) is None


@operator(
    "performer_project(Tensor x, Tensor weight, Tensor? used, Tensor row_sums, Tensor offset, Tensor w, "
    "float norm_eps, int[] kernel, int[] stride, int[] padding, ScalarType dtype, Tensor[]? pixels, bool fused, "
    "bool whole) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _project_op(x, weight, used, row_sums, offset, w, norm_eps, kernel, stride, padding, dtype, pixels, fused, whole):
    window, folded = (kernel, stride, padding), Folded(weight, used, row_sums, offset)
    if fused:
        return split_keys(x, folded, w, norm_eps, window, dtype, pixels, whole)
    kqv, mean, rstd = split._forward(x, *folded, 3 * w.shape[1], norm_eps, *window, dtype, pixels)
    k, q, v = kqv.chunk(3, dim=-1)
    return kqv, mean, rstd, *attention.key_state(attention.Call(q, w), k, v, None)


@fake("performer_project")
def _fake_project(x, weight, used, row_sums, offset, w, norm_eps, kernel, stride, padding, dtype, pixels, fused, whole):
    h, w_grid = Window(tuple(kernel), tuple(stride), tuple(padding)).grid(*x.shape[2:])
    features, width = w.shape
    parts, statistics = (2, (0,)) if fused and not whole else (3, (x.shape[0], h, w_grid))
    mean, rstd = (x.new_empty(statistics, dtype=torch.float32) for _ in range(2))
    lz = x.new_empty((x.shape[0], features), dtype=torch.float32)
    out = x.new_empty((x.shape[0], h * w_grid, parts * width), dtype=dtype)
    return out, mean, rstd, lz, lz.new_empty(x.shape[0], features, width)


def _project(x, linear, w, layer, whole, keep):
    arguments = layer.norm1_eps, layer.window, layer.dtype, layer.pixels
    found, columns = split.operands(x, *linear, *arguments, keep)
    features, width = (runtime.fixed(size) for size in w.shape)
    fused = _keys_fused(x, layer.dtype, layer.window, width, features)
    return torch.ops.t2t_fast_triton.performer_project(
        x, *found, w, layer.norm1_eps, *layer.window, layer.dtype, columns, fused, whole
    )


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
        "LEAN": parameters["lean"],
        "PRECISION": "tf32" if tf32 else "tf32x3",
        "num_warps": parameters["warps"],
        "num_stages": parameters["stages"],
        **runtime.FUSION,
    }
    return splits, (length, features, hidden, tiles), constants


def _queries_and_values(kqv, width):
    """q and v of kqv, or of what has them alone."""
    return kqv[..., -2 * width : -width], kqv[..., -width:]


def read_out_tail(kqv, w, eps, lz, state, parameters, options, seed):
    """The layer's output by one launch, of the key state, q and v; for sizes that fit (launch.py)."""
    from . import kernels

    q, v = _queries_and_values(kqv, w.shape[1])
    call, length = attention.Call(q, w), q.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    hidden = parameters.fc1_weight.shape[0]
    section = runtime.section(q.device, call.sequences * length)
    found = launch.TABLE.chosen("read_out_tail", section, q.dtype, call.width, call.features, hidden)
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
    q, v = attention.readable(q), attention.readable(v)
    kernels.read_out_tail_kernel[call.sequences, splits](
        q,
        v,
        call.directions,
        lz,
        state,
        call.log_eps(eps),
        out,
        Tail(*(None if t is None else t.contiguous() for t in parameters)),
        options.norm_eps,
        *tail.dropout(options, seed),
        *sizes,
        STRIDES=(*q[-2:], *v[-2:]),
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
    arguments = kqv, w, eps, *attention.key_state(attention.Call(q, w), k, v, None), *rest
    with runtime.crowded():
        again = read_out_tail(*arguments)
    return read_out_tail(*arguments), again


def _expected(device, dtype, width, features, hidden):
    kqv, w, eps, *rest = _problem(device, dtype, width, features, hidden)
    k, q, v = kqv.float().chunk(3, dim=-1)
    return 2 * [plain_tail.run(plain_attention.attend(q, k, v, w.float(), eps, None)[0], v, *rest)]


def _fused(q, w, hidden):
    """Whether the pass over the queries and the tail are one launch: by sizes and table, if it works on the device."""
    features, width = w.shape
    if not launch.fits(width, features, hidden):
        return False
    section = runtime.section(q.device, q.shape[0] * q.shape[1])
    if not launch.TABLE.chosen("read_out_tail", section, q.dtype, width, features, hidden)["fused"]:
        return False
    return _trial(q.device.index, q.dtype, padded(width), padded(features), padded(hidden)) is None


@operator(
    "performer_finish(Tensor kqv, Tensor w, float eps, Tensor lz, Tensor state, Tensor? seed, float[] options, "
    "Tensor?[] tail) -> Tensor"
)
def _finish_op(kqv, w, eps, lz, state, seed, options, parameters):
    parameters, options = Tail(*parameters), Options(*options)
    q, v = _queries_and_values(kqv, w.shape[1])
    if _fused(q, w, parameters.fc1_weight.shape[0]):
        return read_out_tail(kqv, w, eps, lz, state, parameters, options, seed)
    return tail.run(attention.read_out(q, w, eps, lz, state), v, parameters, options, seed)


@fake("performer_finish")
def _fake_finish(kqv, w, eps, lz, state, seed, options, parameters):
    return kqv.new_empty(*kqv.shape[:2], w.shape[1])


def _finish(kqv, w, eps, lz, state, parameters, options, seed):
    return torch.ops.t2t_fast_triton.performer_finish(kqv, w, eps, lz, state, seed, list(options), list(parameters))


def _rebuild(kqv, w, eps, lz, state):
    _, q, v = kqv.chunk(3, dim=-1)

    def finish(d_y, d_skip, need_w):
        d_kqv, d_w = torch.ops.t2t_fast_triton.performer_kqv_backward(d_y, kqv, w, eps, lz, state, d_skip, need_w)
        return d_kqv, d_w.to(w.dtype) if need_w else None

    return torch.ops.t2t_fast_triton.performer_read_out(q, w, eps, lz, state), v, finish


forward = compose(split, _project, _finish, _rebuild, tail.run_backward)

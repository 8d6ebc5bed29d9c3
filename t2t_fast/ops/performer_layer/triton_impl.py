"""A Performer layer of Triton kernels: the soft split with Linear, the attention, the tail.

Forward, the soft split and the pass over the keys are one launch where launch.py says so, and k is written for backward
alone; so are the pass over the queries and the tail, and y never reaches memory. The gradients of k, q and v, the
skip's share of v's among them, are written side by side into one tensor.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch

from .. import triton_runtime as runtime
from ..launch import cut, padded
from ..performer_attention import aten_impl as plain_attention
from ..performer_attention import triton_impl as attention
from ..pixels import values
from ..soft_split_linear import aten_impl as plain_split
from ..soft_split_linear import triton_impl as split
from ..soft_split_linear.call import Call, Folded
from ..soft_split_linear.layout import layout
from ..spec import Window
from ..token_mlp import aten_impl as plain_tail
from ..token_mlp import triton_impl as tail
from ..token_mlp.tail import Options, Tail
from ..triton_runtime import fake, operator
from . import aten_impl as plain
from . import launch
from .composed import Layer, compose


def supports(request):
    """Why the kernels cannot run a call, or ``None``; a first call of its kind on a device is tried out."""
    for each in (attention, split, tail):
        why = each.obstacle(request)
        if why is not None:
            return why
    (w_dtype, _, *of_attention), of_tail = attention.kind(request), tail.kind(request)
    call = w_dtype, of_tail[1], *of_attention, *split.kind(request), *of_tail
    low_memory = bool(request.sizes.get("low_memory", False))
    return _trial(request.sizes.get("index"), request.dtype, low_memory, *call)


def _trial(index, dtype, *call):
    return runtime.trial("performer_layer", _tried, _expected, index, dtype, *call)


# torch.compiler.assume_constant_result sets this, and imports the compiler to do so
_trial._dynamo_marked_constant = True


class _Problem(NamedTuple):
    """A layer on two small images, whose keys and queries have norm 2; what ``run`` takes, and an upstream gradient."""

    layer: Layer
    seed: torch.Tensor | None
    w: torch.Tensor
    tensors: tuple
    grad: torch.Tensor
    needed: list


def _problem(device, dtype, low_memory, *call):
    of_attention, of_split, of_tail = call[:6], call[6:-5], call[-5:]
    w_dtype, width, features, _, training, w_gradient = of_attention
    (image, channels, window, _, _), needed = split.called(*of_split)
    sizes = channels, window, 3 * width, True, runtime.TRIAL_TOKENS
    x_and_linear, pixels, _ = split.problem(device, dtype, image, *sizes)
    x_and_linear[1][: 2 * width] *= 2 * width**-0.5
    *_, w, _ = attention.problem(device, dtype, w_dtype, width, features)
    _, y, _, parameters, options, seed = tail.problem(device, dtype, *of_tail[:-1])
    length = math.prod(window.grid(*x_and_linear[0].shape[2:]))
    grad = y[:, :1].expand(-1, length, -1).contiguous()
    # inference keeps as little as low memory does
    layer = Layer(1e-5, window, dtype, pixels, 1e-8, options, low_memory or not training)
    needed = [w_gradient, *needed, *[training] * len(parameters)]
    return _Problem(layer, seed, w, (*x_and_linear, *parameters), grad, needed)


def _both(forward, backward, problem):
    layer, seed, w, tensors, grad, needed = problem
    out, *kept = forward(layer, seed, w, *tensors)
    if not any(needed):
        return [out]
    gradients = backward(grad, kept, layer, seed, w, *tensors, needed=needed)
    return [out, *(t for t, wanted in zip(gradients, needed, strict=True) if wanted)]


def _tried(device, dtype, *call):
    problem = _problem(device, dtype, *call)
    with runtime.crowded():
        again, *_ = run(problem.layer, problem.seed, problem.w, *problem.tensors)
    return [again, *_both(run, run_backward, problem)]


def _expected(device, dtype, *call):
    problem = _problem(device, dtype, *call)
    wide = [t.float() if t.is_floating_point() else t for t in problem.tensors]
    problem = problem._replace(
        layer=problem.layer._replace(dtype=torch.float32),
        w=problem.w.float(),
        tensors=wide,
        grad=problem.grad.float(),
    )
    out, *gradients = _both(plain.run, plain.run_backward, problem)
    return [out, out, *gradients]


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


def _keys_trial(index, dtype, *call):
    return runtime.trial("performer_layer", _tried_keys, _expected_keys, index, dtype, *call)


def _keys_problem(device, dtype, image, w_dtype, channels, window, width, features, whole):
    tensors, pixels, _ = split.problem(device, dtype, image, channels, window, 3 * width, True)
    *_, w, _ = attention.problem(device, dtype, w_dtype, width, features)
    return tensors, pixels, w


def _tried_keys(device, dtype, *call):
    (x, *linear), pixels, w = _keys_problem(device, dtype, *call)
    *_, window, _, _, whole = call
    found, columns = split.operands(x, *linear, 1e-5, window, dtype, pixels, False)
    arguments = x, found, w, 1e-5, window, dtype, columns, whole
    with runtime.crowded():
        again = split_keys(*arguments)
    return [t for t in (*split_keys(*arguments), *again) if t.numel()]


def _expected_keys(device, dtype, *call):
    (x, *linear), pixels, w = _keys_problem(device, dtype, *call)
    *_, window, _, _, whole = call
    x = values(x, pixels, torch.float32).float()
    kqv, _, rstd = plain_split.run(x, *(t.float() for t in linear), 1e-5, window, torch.float32)
    k, q, v = kqv.chunk(3, dim=-1)
    lz, state = plain_attention.key_state(k, v, w.float())
    mean, rest = plain_split.patch_statistics(plain_split.centred_pixels(x), window, 1e-5)[0][-1]
    found = [kqv, mean + rest, rstd] if whole else [torch.cat([q, v], -1)]
    return 2 * [*found, lz.squeeze(-1), state]


def _keys_fused(x, dtype, window, w, whole):
    """Whether the soft split and the pass over the keys are one launch: by sizes and table, if it works there."""
    features, width = (runtime.fixed(size) for size in w.shape)
    if not launch.fits(width, features):
        return False
    channels, (h, across) = runtime.fixed(x.shape[1]), window.grid(*x.shape[2:])
    section, of_tap = runtime.section(x.device, x.shape[0] * h * across), layout(channels, window).channels
    if not launch.TABLE.chosen("split_keys", section, dtype, width, features, of_tap)["fused"]:
        return False
    call = x.dtype, w.dtype, channels, window, width, features, whole
    return _keys_trial(x.device.index, dtype, *call) is None


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
    fused = _keys_fused(x, layer.dtype, layer.window, w, whole)
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


def _queries_trial(index, dtype, *call):
    return runtime.trial("performer_layer", _tried_queries, _expected_queries, index, dtype, *call)


def _queries_problem(device, dtype, w_dtype, width, features, *of_tail):
    """Two sequences longer than a tile, whose keys and queries have norm 2."""
    *_, parameters, options, seed = tail.problem(device, dtype, *of_tail)
    q, k, v, w, _ = attention.problem(device, dtype, w_dtype, width, features)
    return torch.cat([k, q, v], dim=-1), w, 1e-8, parameters, options, seed


def _tried_queries(device, dtype, *call):
    kqv, w, eps, *rest = _queries_problem(device, dtype, *call)
    k, _, v = kqv.float().chunk(3, dim=-1)
    lz, state = plain_attention.key_state(k, v, w.float())
    arguments = kqv, w, eps, lz.squeeze(-1), state, *rest
    with runtime.crowded():
        again = read_out_tail(*arguments)
    return read_out_tail(*arguments), again


def _expected_queries(device, dtype, *call):
    kqv, w, eps, parameters, *rest = _queries_problem(device, dtype, *call)
    k, q, v = kqv.float().chunk(3, dim=-1)
    y, _, _ = plain_attention.attend(q, k, v, w.float(), eps, None)
    return 2 * [plain_tail.run(y, v, Tail(*(t.float() for t in parameters)), *rest)]


def _fused(q, w, parameters, dropout):
    """Whether the pass over the queries and the tail are one launch: by sizes and table, if it works on the device."""
    (features, width), hidden = w.shape, parameters.fc1_weight.shape[0]
    if not launch.fits(width, features, hidden):
        return False
    section = runtime.section(q.device, q.shape[0] * q.shape[1])
    if not launch.TABLE.chosen("read_out_tail", section, q.dtype, width, features, hidden)["fused"]:
        return False
    call = w.dtype, width, features, parameters.proj_weight.dtype, width, hidden, dropout
    return _queries_trial(q.device.index, q.dtype, *call) is None


@operator(
    "performer_finish(Tensor kqv, Tensor w, float eps, Tensor lz, Tensor state, Tensor? seed, float[] options, "
    "Tensor?[] tail) -> Tensor"
)
def _finish_op(kqv, w, eps, lz, state, seed, options, parameters):
    parameters, options = Tail(*parameters), Options(*options)
    q, v = _queries_and_values(kqv, w.shape[1])
    if _fused(q, w, parameters, seed is not None):
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


forward, run, run_backward = compose(split, _project, _finish, _rebuild, tail.run_backward)

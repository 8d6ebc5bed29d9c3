"""Decides whether two steps of a layer are fused: by sizes and launch table, and the self-test of the fused kernel."""

import torch

from ..._common import triton_runtime as runtime
from ..._common.pixels import values
from ...performer_attention import aten as plain_attention
from ...performer_attention.triton import support as attention
from ...soft_split_linear import aten as plain_split
from ...soft_split_linear.triton import support as split
from ...soft_split_linear.triton.layout import layout
from ...soft_split_linear.triton.operands import operands
from ...token_mlp import aten as plain_mlp
from ...token_mlp.autograd import MlpParameters
from ...token_mlp.triton import support as mlp
from . import launch


def _keys_trial(index, dtype, *call):
    return runtime.trial("performer_layer", _tried_keys, _expected_keys, index, dtype, *call)


def _keys_problem(device, dtype, image, w_dtype, channels, window, width, features, whole):
    tensors, pixels, _ = split.problem(device, dtype, image, channels, window, 3 * width, True)
    *_, w, _ = attention.problem(device, dtype, w_dtype, width, features)
    return tensors, pixels, w


def _tried_keys(device, dtype, *call):
    from .forward import launch_split_keys

    (x, *linear), pixels, w = _keys_problem(device, dtype, *call)
    *_, window, _, _, whole = call
    found, columns = operands(x, *linear, 1e-5, window, dtype, pixels, False)
    arguments = x, found, w, 1e-5, window, dtype, columns, whole
    with runtime.crowded():
        again = launch_split_keys(*arguments)
    return [*launch_split_keys(*arguments), *again]


def _expected_keys(device, dtype, *call):
    (x, *linear), pixels, w = _keys_problem(device, dtype, *call)
    *_, window, _, _, whole = call
    x = values(x, pixels, torch.float32).float()
    kqv, _, rstd = plain_split.run(x, *(t.float() for t in linear), 1e-5, window, torch.float32)
    k, q, v = kqv.chunk(3, dim=-1)
    lz, state = plain_attention.key_state(k, v, w.float())
    mean, rest = plain_split.patch_statistics(plain_split.centred_pixels(x), window, 1e-5)[0][-1]
    found = [kqv if whole else torch.cat([q, v], -1), lz.squeeze(-1), state]
    return 2 * [*found, *((mean + rest, rstd) if whole else ())]


def keys_fused(x, dtype, window, w, whole):
    """Whether the soft split and the pass over the keys are fused: by sizes, launch table and self-test."""
    features, width = (runtime.fixed(size) for size in w.shape)
    if not launch.fits(width, features):
        return False
    channels, (h, across) = runtime.fixed(x.shape[1]), window.grid(*x.shape[2:])
    section, of_tap = runtime.section(x.device, x.shape[0] * h * across), layout(channels, window).channels
    if not launch.TABLE.chosen("split_keys", section, dtype, width, features, of_tap)["fused"]:
        return False
    call = x.dtype, w.dtype, channels, window, width, features, whole
    return _keys_trial(x.device.index, dtype, *call) is None


def _queries_trial(index, dtype, *call):
    return runtime.trial("performer_layer", _tried_queries, _expected_queries, index, dtype, *call)


def _queries_problem(device, dtype, w_dtype, width, features, *of_mlp):
    """Two sequences longer than a tile, whose keys and queries have norm 2."""
    *_, parameters, options, seed = mlp.problem(device, dtype, *of_mlp)
    q, k, v, w, _ = attention.problem(device, dtype, w_dtype, width, features)
    return torch.cat([k, q, v], dim=-1), w, 1e-8, parameters, options, seed


def _tried_queries(device, dtype, *call):
    from .forward import launch_read_out_mlp

    kqv, w, eps, *rest = _queries_problem(device, dtype, *call)
    k, _, v = kqv.float().chunk(3, dim=-1)
    lz, state = plain_attention.key_state(k, v, w.float())
    arguments = kqv, w, eps, lz.squeeze(-1), state, *rest
    with runtime.crowded():
        again = launch_read_out_mlp(*arguments)
    return launch_read_out_mlp(*arguments), again


def _expected_queries(device, dtype, *call):
    kqv, w, eps, parameters, *rest = _queries_problem(device, dtype, *call)
    k, q, v = kqv.float().chunk(3, dim=-1)
    y, _, _ = plain_attention.attend(q, k, v, w.float(), eps, None)
    return 2 * [plain_mlp.run(y, v, MlpParameters(*(t.float() for t in parameters)), *rest)]


def queries_fused(kqv, w, parameters, dropout):
    """Whether the pass over the queries and token_mlp are fused: by sizes, launch table and self-test."""
    (features, width), hidden = w.shape, parameters.fc1_weight.shape[0]
    if not launch.fits(width, features, hidden):
        return False
    device, dtype = kqv.device, kqv.dtype
    section = runtime.section(device, kqv.shape[0] * kqv.shape[1])
    if not launch.TABLE.chosen("read_out_mlp", section, dtype, width, features, hidden)["fused"]:
        return False
    call = w.dtype, width, features, parameters.proj_weight.dtype, width, hidden, dropout
    return _queries_trial(device.index, dtype, *call) is None

"""The operators ``t2t_fast_triton::performer_...`` of a whole layer, and the function that autograd records.

In forward, fusion.py decides whether the soft split and the pass over the keys are one launch (k is then written only
for backward), and whether the pass over the queries and token_mlp are (y is then never written). The gradients of k, q
and v, with the skip's part in that of v, are written side by side into one tensor. Triton is imported at the first
launch.
"""

import torch

from ..._common.spec import Window
from ..._common.triton_runtime import fake, operator, operators
from ...soft_split_linear.triton import operators as split
from ...soft_split_linear.triton.operands import operands
from ...token_mlp.triton import operators as mlp
from ..autograd import compose
from .fusion import keys_fused


@operator(
    "performer_kqv_backward(Tensor grad, Tensor kqv, Tensor w, float eps, Tensor lz, Tensor state, Tensor skip, "
    "bool need_w) -> (Tensor, Tensor)"
)
def _kqv_backward(grad, kqv, w, eps, lz, state, skip, need_w):
    from ...performer_attention.triton.backward import launch_backward

    k, q, v = kqv.chunk(3, dim=-1)
    d_kqv = torch.empty(kqv.shape, dtype=kqv.dtype, device=kqv.device)
    d_k, d_q, d_v = d_kqv.chunk(3, dim=-1)
    d_w = launch_backward(grad, q, k, v, w, eps, None, lz, state, skip, need_w, d_q, d_k, d_v)
    return d_kqv, lz.new_empty(0) if d_w is None else d_w


@fake("performer_kqv_backward")
def _fake_kqv_backward(grad, kqv, w, eps, lz, state, skip, need_w):
    return kqv.new_empty(kqv.shape), lz.new_empty(w.shape if need_w else 0)


@operator(
    "performer_project(Tensor x, Tensor weight, Tensor? used, Tensor row_sums, Tensor offset, Tensor w, "
    "float norm_eps, int[] kernel, int[] stride, int[] padding, ScalarType dtype, Tensor[]? pixels, bool fused, "
    "bool whole) -> Tensor[]"
)
def _project_op(*arguments):
    from .forward import launch_project

    return launch_project(*arguments)


@fake("performer_project")
def _fake_project(x, weight, used, row_sums, offset, w, norm_eps, kernel, stride, padding, dtype, pixels, fused, whole):
    h, w_grid = Window(tuple(kernel), tuple(stride), tuple(padding)).grid(*x.shape[2:])
    features, width = w.shape
    parts = 2 if fused and not whole else 3
    statistics = [x.new_empty((x.shape[0], h, w_grid), dtype=torch.float32) for _ in range(2)] if whole else []
    lz = x.new_empty((x.shape[0], features), dtype=torch.float32)
    out = x.new_empty((x.shape[0], h * w_grid, parts * width), dtype=dtype)
    return [out, lz, lz.new_empty(x.shape[0], features, width), *statistics]


def _project(x, linear, w, layer, whole, keep):
    arguments = layer.norm1_eps, layer.window, layer.dtype, layer.pixels
    found, columns = operands(x, *linear, *arguments, keep)
    fused = keys_fused(x, layer.dtype, layer.window, w, whole)
    out, lz, state, *statistics = operators.performer_project(
        x, *found, w, layer.norm1_eps, *layer.window, layer.dtype, columns, fused, whole
    )
    return out, *(statistics or (None, None)), lz, state


@operator(
    "performer_output(Tensor kqv, Tensor w, float eps, Tensor lz, Tensor state, Tensor? seed, float[] options, "
    "Tensor?[] mlp) -> Tensor"
)
def _output_op(*arguments):
    from .forward import launch_output

    return launch_output(*arguments)


@fake("performer_output")
def _fake_output(kqv, w, eps, lz, state, seed, options, parameters):
    return kqv.new_empty(*kqv.shape[:2], w.shape[1])


def _output(kqv, w, eps, lz, state, parameters, options, seed):
    return operators.performer_output(kqv, w, eps, lz, state, seed, options, parameters)


def _recompute_attention(kqv, w, eps, lz, state):
    _, q, v = kqv.chunk(3, dim=-1)

    def attention_backward(d_y, d_skip, need_w):
        d_kqv, d_w = operators.performer_kqv_backward(d_y, kqv, w, eps, lz, state, d_skip, need_w)
        return d_kqv, d_w.to(w.dtype) if need_w else None

    return operators.performer_read_out(q, w, eps, lz, state), v, attention_backward


forward, run, run_backward = compose(split, _project, _output, _recompute_attention, mlp.run_backward)

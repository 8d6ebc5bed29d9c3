"""FLOPs of the opaque operators, for ``torch.utils.flop_counter.FlopCounterMode``.

The numbers are those of the cost table (``costs.py``): the fused implementation, including what backward recomputes.
The counter's module imports Triton, so the formulas are registered only once that module has been imported elsewhere.
"""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from . import costs
from .spec import Window


def _flops(kernels: Iterable[costs.Kernel]) -> float:
    return sum(kernel.flops for kernel in kernels)


def _split_linear(
    x: Any, outputs: int, kernel: Any, stride: Any, padding: Any, *, image_gradient: bool = True
) -> tuple[int, costs.Cost]:
    batch, channels, height, width = x
    window = Window(tuple(kernel), tuple(stride), tuple(padding))
    return batch, costs.soft_split_linear(channels, height, width, window, outputs, image_gradient=image_gradient)


def _native_split_linear(
    x: Any, weight: Any, bias: Any, norm_weight: Any, norm_bias: Any, norm_eps: Any, *window: Any, out_shape: Any
) -> float:
    batch, cost = _split_linear(x, weight[0], *window)
    return batch * _flops(cost.forward)


def _native_split_linear_backward(
    grad: Any,
    x: Any,
    weight: Any,
    bias: Any,
    norm_weight: Any,
    norm_bias: Any,
    norm_eps: Any,
    *rest: Any,
    out_shape: Any,
) -> float:
    *window, need_image, need_weight = rest
    batch, cost = _split_linear(x, weight[0], *window, image_gradient=need_image)
    product, *image = cost.backward
    return batch * (need_weight * product.flops + _flops(image))


def _triton_split_linear(
    x: Any,
    weight: Any,
    used: Any,
    row_sums: Any,
    offset: Any,
    outputs: int,
    norm_eps: Any,
    kernel: Any,
    stride: Any,
    padding: Any,
    *_: Any,
    out_shape: Any,
) -> float:
    batch, cost = _split_linear(x, outputs, kernel, stride, padding)
    return batch * _flops(cost.forward)


def _products(
    x: Any, grad: Any, mean: Any, rstd: Any, norm: Any, kernel: Any, stride: Any, padding: Any, *_: Any, out_shape: Any
) -> float:
    batch, cost = _split_linear(x, grad[2], kernel, stride, padding, image_gradient=False)
    return batch * _flops(cost.backward)


def _image_gradient(
    grad: Any, x: Any, weight: Any, offset: Any, y: Any, mean: Any, rstd: Any, *window: Any, out_shape: Any
) -> float:
    batch, cost = _split_linear(x, grad[2], *window)
    return batch * cost.backward[1].flops


def _attention(q: Any, keys: int, w: Any, passes: str) -> float:
    """FLOPs of a pass over the keys and one over the queries, "forward" or "backward"; heads are sequences."""
    features, width = w
    sequences = 1
    for size in q[:-2]:
        sequences *= size
    table = [getattr(costs.performer_attention(length, width, features), passes) for length in (keys, q[-2])]
    first, second = (0, 1) if passes == "forward" else (1, 0)
    return sequences * (table[0][first].flops + table[1][second].flops)


def _attention_forward(q: Any, k: Any, v: Any, w: Any, *_: Any, out_shape: Any) -> float:
    return _attention(q, k[-2], w, "forward")


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, w: Any, *_: Any, out_shape: Any) -> float:
    return _attention(q, k[-2], w, "backward")


def _mlp(y: Any, hidden: int) -> costs.Cost:
    *batch, length, width = y
    tokens = length
    for size in batch:
        tokens *= size
    return costs.token_mlp(tokens, width, hidden)


def _native_mlp(y: Any, v: Any, *mlp: Any, out_shape: Any) -> float:
    return _flops(_mlp(y, mlp[5][0]).forward)


def _native_mlp_backward(grad: Any, y: Any, v: Any, *mlp: Any, out_shape: Any) -> float:
    return _flops(_mlp(y, mlp[5][0]).backward)


def _triton_mlp(y: Any, v: Any, seed: Any, options: Any, mlp: Any, *_: Any, out_shape: Any) -> float:
    return _flops(_mlp(y, mlp[4][0]).forward)


def _triton_mlp_backward(
    grad: Any, y: Any, v: Any, seed: Any, options: Any, mlp: Any, *_: Any, out_shape: Any
) -> float:
    return _flops(_mlp(y, mlp[4][0]).backward)


def _layer(x: Any, window: Any, w: Any, hidden: int, *, image_gradient: bool = False) -> tuple[int, costs.Cost]:
    batch, channels, height, across = x
    features, width = w
    window = Window(*(tuple(pair) for pair in window))
    sizes = {"embed": width, "features": features, "hidden": hidden}
    return batch, costs.performer_layer(channels, height, across, window, image_gradient=image_gradient, **sizes)


def _native_layer(
    x: Any, weight: Any, bias: Any, norm1_weight: Any, norm1_bias: Any, norm1_eps: Any, *rest: Any, out_shape: Any
) -> float:
    *window, w, _, _, _, _, _, _, fc1 = rest[:11]
    batch, cost = _layer(x, window, w, fc1[0])
    return batch * _flops(cost.forward)


def _native_layer_backward(
    grad: Any,
    x: Any,
    weight: Any,
    bias: Any,
    norm1_weight: Any,
    norm1_bias: Any,
    norm1_eps: Any,
    *rest: Any,
    out_shape: Any,
) -> float:
    *window, w, _, _, _, _, _, _, fc1 = rest[:11]
    need_image, need_weight, _ = rest[-3:]
    batch, cost = _layer(x, window, w, fc1[0], image_gradient=need_image)
    queries, keys, product, *image = cost.backward
    again = cost.forward[0].flops  # kqv and the key state are recomputed
    return batch * (again + queries.flops + keys.flops + need_weight * product.flops + _flops(image))


def _project(
    x: Any,
    weight: Any,
    used: Any,
    row_sums: Any,
    offset: Any,
    w: Any,
    norm_eps: Any,
    kernel: Any,
    stride: Any,
    padding: Any,
    *_: Any,
    out_shape: Any,
) -> float:
    batch, cost = _layer(x, (kernel, stride, padding), w, w[1])
    return batch * cost.forward[0].flops


def _finish(
    kqv: Any, w: Any, eps: Any, lz: Any, state: Any, seed: Any, options: Any, mlp: Any, out_shape: Any
) -> float:
    batch, length, _ = kqv
    features, width = w
    (token_mlp_kernel,) = _mlp((batch, length, width), mlp[4][0]).forward
    return batch * costs.performer_attention(length, width, features).forward[1].flops + token_mlp_kernel.flops


def _read_out(q: Any, w: Any, *_: Any, out_shape: Any) -> float:
    features, width = w
    length = out_shape[-2]
    sequences = 1
    for size in out_shape[:-2]:
        sequences *= size
    return sequences * costs.performer_attention(length, width, features).forward[1].flops


def _kqv_backward(grad: Any, kqv: Any, w: Any, *_: Any, out_shape: Any) -> float:
    batch, length, _ = kqv
    features, width = w
    return batch * _flops(costs.performer_attention(length, width, features).backward)


def _linear(x: Any, weight: Any, *_: Any, out_shape: Any) -> float:
    tokens = 1
    for size in x[:-1]:
        tokens *= size
    return 2 * tokens * weight[0] * weight[1]


def _block(x: Any, heads: int, hidden: int) -> tuple[int, costs.Cost]:
    batch, length, width = x
    return batch, costs.block(length, width, hidden, heads)


def _native_block(
    x: Any, qkv: Any, proj: Any, fc1: Any, fc2: Any, heads: int, hidden: int, *_: Any, out_shape: Any
) -> float:
    batch, cost = _block(x, heads, hidden)
    return batch * _flops(cost.forward)


def _native_block_backward(
    grad: Any, x: Any, qkv: Any, proj: Any, fc1: Any, fc2: Any, heads: int, hidden: int, *rest: Any, out_shape: Any
) -> float:
    batch, cost = _block(x, heads, hidden)
    _, length, width = x
    weights = 3 * width * width, width * width, hidden * width, width * hidden
    spared = sum(weight for weight, needed in zip(weights, rest[-1], strict=True) if not needed)
    return batch * (_flops(cost.backward) - 2 * length * spared)


def _composition(tokens: Any, *_: Any, out_shape: Any) -> float:
    batch, length, columns = tokens
    return batch * length * columns  # the additions of costs.soft_composition


FORMULAS = {
    "t2t_fast_native": {
        "soft_composition": _composition,
        "fused_fold_unfold": _composition,
        "soft_split_linear": _native_split_linear,
        "soft_split_linear_backward": _native_split_linear_backward,
        "performer_attention": _attention_forward,
        "performer_attention_backward": _attention_backward,
        "token_mlp": _native_mlp,
        "token_mlp_backward": _native_mlp_backward,
        "performer_layer": _native_layer,
        "performer_layer_backward": _native_layer_backward,
        "transformer_block": _native_block,
        "transformer_block_backward": _native_block_backward,
    },
    "t2t_fast_triton": {
        "soft_split_linear": _triton_split_linear,
        "soft_split_linear_products": _products,
        "soft_split_linear_image_gradient": _image_gradient,
        "performer_attention": _attention_forward,
        "performer_attention_backward": _attention_backward,
        "performer_read_out": _read_out,
        "performer_project": _project,
        "performer_output": _finish,
        "performer_kqv_backward": _kqv_backward,
        "token_mlp": _triton_mlp,
        "token_mlp_backward": _triton_mlp_backward,
        "fc1_gelu": _linear,
        "fc2_add": _linear,
        "fc2_gelu_backward": _linear,
    },
}
"""Library -> operator -> function of a call's arguments, with shapes for tensors, that returns its FLOPs."""


def teach() -> None:
    """Register the formulas in PyTorch's table, and in every active counter."""
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    for library, formulas in FORMULAS.items():
        for name, formula in formulas.items():
            packet = getattr(getattr(torch.ops, library), name, None)
            if packet is not None and packet not in module.flop_registry:
                module.register_flop_formula(packet)(formula)
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, module.FlopCounterMode):
            for packet, formula in module.flop_registry.items():
                counter.flop_registry.setdefault(packet, formula)

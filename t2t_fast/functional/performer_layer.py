"""A whole Performer layer on the soft split of an image."""

from typing import Any

import torch

from .._deprecated import renamed_arguments
from ..errors import check_bool, check_count, check_filled, check_number, check_shape, check_tensor, check_together
from ..ops._common.library import wants_gradient
from ..ops._common.pixels import PixelNorm
from ..ops._common.spec import Pair
from ..ops.performer_layer.op import performer_layer as _performer_layer
from .arguments import (
    IMAGES,
    as_image,
    check_parameters,
    check_pixels,
    check_window,
    checked,
    choose,
    running_dtype,
    window,
)
from .performer_attention import check_features
from .token_mlp import check_token_mlp, seed_for


def recompute_of(memory: object, function: str = "performer_layer") -> bool:
    """The option ``recompute`` for the old ``memory``, "fast" or "low"."""
    if not isinstance(memory, str) or memory not in ("fast", "low"):
        raise ValueError(f"{function}: memory must be one of fast, low, got {memory!r}")
    return memory == "low"


@renamed_arguments(
    memory=("recompute", recompute_of),
    norm_weight="norm2_weight",
    norm_bias="norm2_bias",
    norm_eps="norm2_eps",
)
@checked(
    _performer_layer,
    tensors={
        "x": 0,
        "kqv_weight": 1,
        "kqv_bias": 2,
        "norm1_weight": 3,
        "norm1_bias": 4,
        "w": 11,
        "proj_weight": 13,
        "proj_bias": 14,
        "norm2_weight": 15,
        "norm2_bias": 16,
        "fc1_weight": 18,
        "fc1_bias": 19,
        "fc2_weight": 20,
        "fc2_bias": 21,
    },
    seed=24,
)
def performer_layer(
    x: torch.Tensor,
    kqv_weight: torch.Tensor,
    kqv_bias: torch.Tensor | None,
    w: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor | None,
    norm2_weight: torch.Tensor | None,
    norm2_bias: torch.Tensor | None,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor | None,
    kernel_size: Pair = 1,
    stride: Pair = 1,
    padding: Pair = 0,
    *,
    norm1_weight: torch.Tensor | None = None,
    norm1_bias: torch.Tensor | None = None,
    norm1_eps: float = 1e-5,
    eps: float = 1e-8,
    norm2_eps: float = 1e-5,
    proj_drop: float = 0.0,
    mlp_drop: float = 0.0,
    seed: torch.Tensor | None = None,
    pixel_norm: PixelNorm | None = None,
    grid: Pair | None = None,
    recompute: bool = False,
    backend: str = "auto",
) -> tuple[Any, ...]:
    """A whole Performer layer on the soft split of ``x``: LayerNorm, ``kqv``, :func:`performer_attention`, token_mlp.

    Upstream: ``Token_performer.forward`` of the unfolded, transposed image. As one operator, it saves neither the
    unfolded tokens nor the attention's output for backward, and k, q and v only without ``recompute``.

    Args:
        x: (B, C, H, W) image with any strides, or (B, H*W, C) tokens with ``grid=(H, W)``.
        kqv_weight: (3E, C*k*k), rows in upstream's order k, q, v; kqv_bias: (3E) or ``None``.
        w: (m, E) random features; eps: the attention's.
        norm1_weight, norm1_bias, norm1_eps: LayerNorm over the unfolded tokens, parameters (C*k*k) or ``None``.
        norm2_weight, norm2_bias, norm2_eps: LayerNorm before the MLP, parameters (E) or ``None``.
        pixel_norm: (mean, std) for an image of uint8, as in :func:`soft_split_linear`.
        recompute: whether backward recomputes k, q and v from ``x`` instead of saving them: the same numbers with less
            memory (by 6E bytes a token in half precision, 12E in float32) in more time. The "native" backend always
            recomputes, "reference" saves every intermediate.
        others: as :func:`soft_split_linear` and :func:`token_mlp`.

    Returns:
        (B, h*w, E) in ``kqv_weight``'s dtype (under autocast: autocast's), which is ``x``'s unless that is uint8.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
    """
    function = "performer_layer"
    x = as_image(function, x, grid, dtypes=IMAGES)
    pixels = check_pixels(function, x, pixel_norm)
    win = window(kernel_size, stride, padding, function=function)
    tokens = check_window(function, win, x.shape)
    check_tensor(function, "kqv_weight", kqv_weight, ndim=2)
    check_filled(function, "kqv_weight", kqv_weight)
    check_tensor(function, "w", w, ndim=2)
    width, columns = w.shape[1], x.shape[1] * win.taps
    mlp = {
        "proj_weight": proj_weight,
        "proj_bias": proj_bias,
        "norm2_weight": norm2_weight,
        "norm2_bias": norm2_bias,
        "fc1_weight": fc1_weight,
        "fc1_bias": fc1_bias,
        "fc2_weight": fc2_weight,
        "fc2_bias": fc2_bias,
    }
    linear = {
        "kqv_weight": (kqv_weight, (3 * width, columns), "3 * width of w, channels * window pixels"),
        "kqv_bias": (kqv_bias, (3 * width,), "3 * width of w"),
        "norm1_weight": (norm1_weight, (columns,), "channels * window pixels"),
        "norm1_bias": (norm1_bias, (columns,), "channels * window pixels"),
    }
    leader = check_parameters(function, x, pixels, {name: value for name, (value, _, _) in linear.items()})
    check_together(function, "x", x, same_dtype=False, w=w)
    for name, (value, shape, meaning) in linear.items():
        if value is not None:
            check_shape(function, name, value, shape, meaning)
    norm1_eps = check_number(function, "norm1_eps", norm1_eps, above=0)
    check_count(function, "k, q and v", x.shape[0], *tokens, kqv_weight.shape[0])
    check_features(function, w, width, leader.dtype)
    eps = check_number(function, "eps", eps, minimum=0)
    norm2_eps, proj_drop, mlp_drop = check_token_mlp(
        function, leader, width, mlp, norm2_eps, proj_drop, mlp_drop, "norm2"
    )
    check_bool(function, "recompute", recompute)
    seed = seed_for(function, x, seed, proj_drop, mlp_drop)
    chosen = choose(
        function,
        x,
        backend,
        dtype=running_dtype(leader),
        channels=x.shape[1],
        bytes=x.dtype == torch.uint8,
        window=win,
        outputs=3 * width,
        width=width,
        features=w.shape[0],
        hidden=fc1_weight.shape[0],
        training=wants_gradient(x, kqv_weight, kqv_bias, norm1_weight, norm1_bias, w, *mlp.values()),
        index=x.device.index,
    )
    return (
        x,
        kqv_weight,
        kqv_bias,
        norm1_weight,
        norm1_bias,
        norm1_eps,
        *win,
        leader.dtype,
        pixels,
        w,
        eps,
        proj_weight,
        proj_bias,
        norm2_weight,
        norm2_bias,
        norm2_eps,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        proj_drop,
        mlp_drop,
        seed,
        recompute,
        chosen,
    )

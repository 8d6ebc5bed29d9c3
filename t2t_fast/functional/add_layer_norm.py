"""The residual connection and the LayerNorm behind it."""

from typing import Any

import torch

from ..errors import (
    check_count,
    check_filled,
    check_number,
    check_probability,
    check_shape,
    check_tensor,
    check_together,
)
from ..ops._common.library import wants_gradient
from ..ops.add_layer_norm.op import add_layer_norm as _add_layer_norm
from .arguments import checked, choose, running_dtype, same_dtype
from .token_mlp import seed_for


@checked(_add_layer_norm, tensors={"x": 0, "branch": 1, "norm_weight": 2, "norm_bias": 3}, seed=8)
def add_layer_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    *,
    norm_eps: float = 1e-5,
    drop: float = 0.0,
    drop_path: float = 0.0,
    seed: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[Any, ...]:
    """``t = x + drop_path(drop(branch))`` and ``LayerNorm(t)``: a residual connection and the next branch's input.

    Upstream: ``Block.forward`` of ``models/transformer_block.py``, from the attention's result to ``norm2``.

    Args:
        x: (B, N, D), the stream of tokens; branch: (B, N, D), what is added to it.
        norm_weight, norm_bias, norm_eps: of the LayerNorm; parameters (D) or ``None``.
        drop, drop_path: probabilities of dropout and of stochastic depth (of a sample's whole branch), 0 for none.
        seed: int64 scalar tensor that determines the masks (``ops/_common/philox.py``); drawn from torch's generator
            if ``None``.

    Returns:
        t in x's dtype, and its LayerNorm in x's dtype (under autocast: autocast's).

    Numerics:
        the sum and LayerNorm in float32 (float64 for float64). Backward computes the statistics again from t; a second
        derivative raises an error.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
    """
    function = "add_layer_norm"
    check_tokens(function, x)
    check_branch(function, x, branch)
    norm_eps = check_norm(function, x, norm_weight, norm_bias, norm_eps)
    drop, drop_path = (check_probability(function, n, p) for n, p in (("drop", drop), ("drop_path", drop_path)))
    seed = seed_for(function, x, seed, drop, drop_path)
    chosen = choose(
        function,
        x,
        backend,
        dtype=running_dtype(x),
        stream=x.dtype,
        width=x.shape[2],
        dropout=drop > 0 or drop_path > 0,
        training=wants_gradient(x, branch, norm_weight, norm_bias),
        index=x.device.index,
    )
    return (x, branch, norm_weight, norm_bias, norm_eps, drop, drop_path, running_dtype(x), seed, chosen)


def check_tokens(function: str, x: torch.Tensor) -> None:
    """Raise unless ``x`` is tokens (B, N, D) with D of at least 1."""
    check_tensor(function, "x", x, ndim=3)
    check_count(function, "x", *x.shape)
    check_filled(function, "x", x, first=2)


def check_branch(function: str, x: torch.Tensor, branch: torch.Tensor) -> None:
    """Raise unless a residual branch fits the tokens ``x``."""
    check_tensor(function, "branch", branch, ndim=3)
    check_shape(function, "branch", branch, x.shape, "the shape of x")
    check_together(function, "x", x, same_dtype=same_dtype(x), branch=branch)


def check_norm(
    function: str,
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    norm_eps: float,
    name: str = "norm",
) -> float:
    """Check a LayerNorm over x's last axis, arguments ``name``_weight and so on; returns its eps as a Python number."""
    given: dict[str, Any] = {f"{name}_weight": norm_weight, f"{name}_bias": norm_bias}
    check_together(function, "x", x, same_dtype=same_dtype(x), **given)
    for each, value in given.items():
        if value is not None:
            check_shape(function, each, value, x.shape[2:], "the width of x")
    return check_number(function, f"{name}_eps", norm_eps, above=0)


def check_linear(
    function: str, x: torch.Tensor, name: str, weight: torch.Tensor, bias: torch.Tensor | None, inputs: int
) -> int:
    """Check a Linear's weight (O, ``inputs``) and bias (O), arguments ``name``_weight and so on; returns O."""
    prefix = f"{name}_" if name else ""
    check_tensor(function, f"{prefix}weight", weight, ndim=2)
    check_filled(function, f"{prefix}weight", weight)
    outputs = weight.shape[0]
    given: dict[str, Any] = {f"{prefix}weight": weight, f"{prefix}bias": bias}
    check_together(function, "x", x, same_dtype=same_dtype(x), **given)
    check_shape(function, f"{prefix}weight", weight, (outputs, inputs), "outputs, inputs")
    if bias is not None:
        check_shape(function, f"{prefix}bias", bias, (outputs,), "outputs")
    return outputs

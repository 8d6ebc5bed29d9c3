"""LayerNorm and Linear as one operator."""

from typing import Any

import torch

from ..errors import check_count
from ..ops._common.library import wants_gradient
from ..ops.layer_norm_linear.op import layer_norm_linear as _layer_norm_linear
from .add_layer_norm import check_linear, check_norm, check_tokens
from .arguments import checked, choose, running_dtype


@checked(_layer_norm_linear, tensors={"x": 0, "norm_weight": 1, "norm_bias": 2, "weight": 4, "bias": 5})
def layer_norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm_eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Any, ...]:
    """``Linear(LayerNorm(x))``, and x for the residual connection around it; the normalised tokens are not saved.

    Upstream: ``norm1`` and ``attn.qkv`` of ``Block.forward`` (``models/transformer_block.py``).

    Args:
        x: (B, N, D) tokens.
        norm_weight, norm_bias, norm_eps: of the LayerNorm; parameters (D) or ``None``.
        weight: (O, D); bias: (O) or ``None``.

    Returns:
        (B, N, O) in x's dtype (under autocast: autocast's), and x. A residual connection that uses this x has its
        gradient added to LayerNorm's in the same pass; nothing changes for one that uses the argument.

    Numerics:
        LayerNorm in float32 (float64 for float64), the product in the result's dtype. Backward normalises x again; a
        second derivative raises an error.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
    """
    function = "layer_norm_linear"
    check_tokens(function, x)
    norm_eps = check_norm(function, x, norm_weight, norm_bias, norm_eps)
    outputs = check_linear(function, x, "", weight, bias, x.shape[2])
    check_count(function, "the result", *x.shape[:2], outputs)
    chosen = choose(
        function,
        x,
        backend,
        dtype=running_dtype(x),
        stream=x.dtype,
        width=x.shape[2],
        branch=False,
        dropout=False,
        training=wants_gradient(x, norm_weight, norm_bias, weight, bias),
        index=x.device.index,
    )
    return (x, norm_weight, norm_bias, norm_eps, weight, bias, running_dtype(x), chosen)

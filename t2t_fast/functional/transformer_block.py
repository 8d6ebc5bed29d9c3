"""A whole transformer block as one operator."""

from typing import Any

import torch

from ..backends import Request, runs
from ..errors import check_count, check_number, check_probability, check_sizes, known
from ..ops._common import transforms
from ..ops._common.library import wants_gradient
from ..ops.transformer_block.op import transformer_block as _transformer_block
from .add_layer_norm import check_linear, check_norm, check_tokens
from .arguments import checked, choose, running_dtype
from .token_mlp import seed_for


@checked(
    _transformer_block,
    tensors={
        "x": 0,
        "norm1_weight": 1,
        "norm1_bias": 2,
        "qkv_weight": 4,
        "qkv_bias": 5,
        "proj_weight": 6,
        "proj_bias": 7,
        "norm2_weight": 8,
        "norm2_bias": 9,
        "fc1_weight": 11,
        "fc1_bias": 12,
        "fc2_weight": 13,
        "fc2_bias": 14,
    },
    seed=20,
)
def transformer_block(
    x: torch.Tensor,
    norm1_weight: torch.Tensor | None,
    norm1_bias: torch.Tensor | None,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor | None,
    norm2_weight: torch.Tensor | None,
    norm2_bias: torch.Tensor | None,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor | None,
    *,
    heads: int,
    scale: float | None = None,
    norm1_eps: float = 1e-5,
    norm2_eps: float = 1e-5,
    drop_path1: float = 0.0,
    drop_path2: float = 0.0,
    seed: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[Any, ...]:
    """``t = x + proj(attention(LayerNorm(x)))``, then ``t + fc2(gelu(fc1(LayerNorm(t))))``.

    Upstream: ``Block.forward`` of ``models/transformer_block.py``. One kernel on a CPU; on a GPU its parts are the
    operators ``layer_norm_linear`` and ``layer_norm_mlp`` around PyTorch's attention.

    Args:
        x: (B, N, D) tokens.
        norm1_weight, norm1_bias, norm1_eps: of the LayerNorm before the attention, norm2_...: before the MLP;
            parameters (D) or ``None``.
        qkv_weight: (3 D, D); q, k and v one after the other, each with its heads one after the other.
        proj_weight: (D, D); fc1_weight: (hidden, D); fc2_weight: (D, hidden); biases of their rows or ``None``.
        heads: number of heads, a divisor of D.
        scale: the factor of q k^T; ``None``: (D / heads) ** -0.5.
        drop_path1, drop_path2: stochastic depth of the attention and of the MLP.
        seed: int64 scalar tensor that determines its masks (``ops/_common/philox.py``); drawn from torch's generator
            if ``None``.

    Returns:
        (B, N, D) in x's dtype.

    Numerics:
        sums, softmax and LayerNorm in float32 (float64 for float64), products in x's dtype or autocast's, GELU by erf.
        The native backend adds the branches in float32 and multiplies float16 as float32. Saved for backward: qkv, the
        attention's result and its log-sum-exp, the sum behind it, fc1's output. A second derivative raises an error.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
    """
    function = "transformer_block"
    check_tokens(function, x)
    width = x.shape[2]
    norm1_eps = check_norm(function, x, norm1_weight, norm1_bias, norm1_eps, "norm1")
    norm2_eps = check_norm(function, x, norm2_weight, norm2_bias, norm2_eps, "norm2")
    hidden = check_linear(function, x, "fc1", fc1_weight, fc1_bias, width)
    linears = {
        "qkv": (qkv_weight, qkv_bias, width, 3 * width),
        "proj": (proj_weight, proj_bias, width, width),
        "fc2": (fc2_weight, fc2_bias, hidden, width),
    }
    for name, (weight, bias, inputs, rows) in linears.items():
        outputs = check_linear(function, x, name, weight, bias, inputs)
        if known(outputs != rows):
            raise ValueError(f"{function}: {name}_weight must have {rows} rows, got {outputs}")
    check_sizes(function, heads=heads)
    if known(width % heads != 0):
        raise ValueError(f"{function}: heads must divide the width of x, {width}, got {heads}")
    scale = (transforms.constant(width) // heads) ** -0.5 if scale is None else check_number(function, "scale", scale)
    check_count(function, "q, k and v", *x.shape[:2], 3 * width)
    check_count(function, "the hidden units", *x.shape[:2], hidden)
    drop_path1 = check_probability(function, "drop_path1", drop_path1)
    drop_path2 = check_probability(function, "drop_path2", drop_path2)
    seed = seed_for(function, x, seed, drop_path1, drop_path2)
    attention = norm1_weight, norm1_bias, norm1_eps, qkv_weight, qkv_bias, proj_weight, proj_bias
    mlp = norm2_weight, norm2_bias, norm2_eps, fc1_weight, fc1_bias, fc2_weight, fc2_bias
    tensors = [each for each in (*attention, *mlp) if isinstance(each, torch.Tensor)]
    chosen = choose(
        function, x, backend, dtype=running_dtype(x), width=width, heads=heads, training=wants_gradient(x, *tensors)
    )
    return (x, *attention, *mlp, heads, scale, drop_path1, drop_path2, running_dtype(x), seed, chosen)


def native(x: torch.Tensor) -> bool:
    """Whether a call on x is free to run by the native backend, and it can."""
    request = Request(x.device.type, running_dtype(x), {}, transforms.active())
    return runs("transformer_block", "native", request)

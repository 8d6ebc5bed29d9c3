"""The second half of a transformer block: residual connection, LayerNorm, MLP, residual connection."""

from typing import Any

import torch

from ..errors import check_bool, check_count, check_probability
from ..ops._common.library import wants_gradient
from ..ops.layer_norm_mlp.op import layer_norm_mlp as _layer_norm_mlp
from .add_layer_norm import check_branch, check_linear, check_norm, check_tokens
from .arguments import checked, choose, running_dtype
from .token_mlp import seed_for


@checked(
    _layer_norm_mlp,
    tensors={
        "x": 0,
        "branch": 1,
        "norm_weight": 2,
        "norm_bias": 3,
        "fc1_weight": 5,
        "fc1_bias": 6,
        "fc2_weight": 7,
        "fc2_bias": 8,
    },
    seed=17,
)
def layer_norm_mlp(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor | None,
    *,
    norm_eps: float | None = 1e-5,
    branch_drop: float = 0.0,
    branch_path: float = 0.0,
    hidden_drop: float = 0.0,
    drop: float = 0.0,
    drop_path: float = 0.0,
    residual: bool = True,
    recompute: bool = False,
    seed: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[Any, ...]:
    """``t = x + branch``, then ``t + fc2(gelu(fc1(LayerNorm(t))))``, with every dropout of a transformer block.

    Upstream: ``Block.forward`` of ``models/transformer_block.py``, from the attention's result on; without ``branch``,
    LayerNorm and residual it is ``Mlp.forward``.

    Args:
        x: (B, N, D) tokens; branch: (B, N, D), added to x first, or ``None``.
        norm_weight, norm_bias, norm_eps: of the LayerNorm; parameters (D) or ``None``. ``norm_eps=None``: no LayerNorm.
        fc1_weight: (hidden, D); fc2_weight: (O, hidden), O = D with ``residual``; biases (hidden), (O) or ``None``.
        branch_drop, branch_path: probabilities of the branch's dropout and stochastic depth.
        hidden_drop: probability of the dropout behind GELU.
        drop, drop_path: probabilities of dropout and stochastic depth of the MLP's output.
        residual: whether t is added to the MLP's output.
        recompute: whether backward computes fc1 again instead of saving its output: less memory, more time.
        seed: int64 scalar tensor that determines the masks (``ops/_common/philox.py``); drawn from torch's generator
            if ``None``.

    Returns:
        (B, N, D) in x's dtype; without ``residual`` (B, N, O) in x's dtype (under autocast: autocast's).

    Numerics:
        sums and LayerNorm in float32 (float64 for float64), products in x's dtype or autocast's, GELU by erf. Saved for
        backward: t and fc1's output. A second derivative raises an error.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
    """
    function = "layer_norm_mlp"
    check_tokens(function, x)
    if branch is not None:
        check_branch(function, x, branch)
    check_bool(function, "residual", residual)
    check_bool(function, "recompute", recompute)
    if norm_eps is not None:
        norm_eps = check_norm(function, x, norm_weight, norm_bias, norm_eps)
    for name, value in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if norm_eps is None and value is not None:
            raise ValueError(f"{function}: {name} must be None without LayerNorm (norm_eps=None), got a tensor")
    hidden = check_linear(function, x, "fc1", fc1_weight, fc1_bias, x.shape[2])
    outputs = check_linear(function, x, "fc2", fc2_weight, fc2_bias, hidden)
    if residual and outputs != x.shape[2]:
        raise ValueError(f"{function}: fc2_weight must have {x.shape[2]} rows for the residual, got {outputs}")
    check_count(function, "the hidden units", *x.shape[:2], hidden)
    check_count(function, "the result", *x.shape[:2], outputs)
    names = "branch_drop", "branch_path", "hidden_drop", "drop", "drop_path"
    given = branch_drop, branch_path, hidden_drop, drop, drop_path
    drops = [check_probability(function, name, p) for name, p in zip(names, given, strict=True)]
    seed = seed_for(function, x, seed, *drops)
    parameters = norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias
    chosen = choose(
        function,
        x,
        backend,
        dtype=running_dtype(x),
        stream=x.dtype,
        width=x.shape[2],
        hidden=hidden,
        outputs=outputs,
        branch=branch is not None,
        normed=norm_eps is not None,
        dropout=any(drops),
        residual=residual,
        training=wants_gradient(x, branch, *parameters),
        index=x.device.index,
    )
    return (
        x,
        branch,
        norm_weight,
        norm_bias,
        norm_eps,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        *drops,
        residual,
        recompute,
        running_dtype(x),
        seed,
        chosen,
    )

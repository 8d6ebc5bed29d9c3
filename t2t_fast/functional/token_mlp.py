"""The end of a token layer: projection, skip, LayerNorm and MLP."""

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import check_count, check_number, check_probability, check_shape, check_tensor, check_together
from ..ops._common.library import wants_gradient
from ..ops._common.philox import fresh_seed
from ..ops.token_mlp.op import token_mlp as _token_mlp
from .arguments import checked, choose, running_dtype, same_dtype


@checked(
    _token_mlp,
    tensors={
        "y": 0,
        "v": 1,
        "proj_weight": 2,
        "proj_bias": 3,
        "norm_weight": 4,
        "norm_bias": 5,
        "fc1_weight": 7,
        "fc1_bias": 8,
        "fc2_weight": 9,
        "fc2_bias": 10,
    },
    seed=13,
)
def token_mlp(
    y: torch.Tensor,
    v: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor | None,
    *,
    norm_eps: float = 1e-5,
    proj_drop: float = 0.0,
    mlp_drop: float = 0.0,
    seed: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[Any, ...]:
    """token_mlp: ``t = v + drop(proj(y))``, then ``t + drop(fc2(gelu(fc1(LayerNorm(t)))))``.

    Upstream: ``Token_performer.single_attn``'s last line and ``forward``'s last; ``Token_transformer`` likewise.

    Args:
        y: (B, L, E) attention output; v: (B, L, E) values, the skip.
        proj_weight: (E, E); fc1_weight: (hidden, E); fc2_weight: (E, hidden); biases and LayerNorm's two parameters
            of matching width, each may be ``None``.
        norm_eps: LayerNorm's eps.
        proj_drop, mlp_drop: dropout probabilities after the projection and after the MLP, 0 for none.
        seed: int64 scalar tensor that determines the dropout masks (``ops/_common/philox.py``); drawn from torch's
            generator if ``None``.

    Returns:
        (B, L, E) in y's dtype.

    Numerics:
        matrix products in y's dtype, LayerNorm and sums in float32 (float64 for float64), GELU by erf. Backward
        recomputes everything from y and v; masks are regenerated, not stored; a second derivative raises an error.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
    """
    function = "token_mlp"
    check_tensor(function, "y", y, ndim=3)
    check_count(function, "y", *y.shape)
    check_tensor(function, "v", v, ndim=3)
    check_shape(function, "v", v, y.shape, "the shape of y")
    check_together(function, "y", y, same_dtype=same_dtype(y), v=v)
    mlp = {
        "proj_weight": proj_weight,
        "proj_bias": proj_bias,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "fc1_weight": fc1_weight,
        "fc1_bias": fc1_bias,
        "fc2_weight": fc2_weight,
        "fc2_bias": fc2_bias,
    }
    norm_eps, proj_drop, mlp_drop = check_token_mlp(function, y, y.shape[-1], mlp, norm_eps, proj_drop, mlp_drop)
    seed = seed_for(function, y, seed, proj_drop, mlp_drop)
    chosen = choose(
        function,
        y,
        backend,
        dtype=running_dtype(y),
        width=y.shape[-1],
        hidden=fc1_weight.shape[0],
        training=wants_gradient(y, v, *mlp.values()),
        index=y.device.index,
    )
    return (
        y,
        v,
        proj_weight,
        proj_bias,
        norm_weight,
        norm_bias,
        norm_eps,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        proj_drop,
        mlp_drop,
        seed,
        chosen,
    )


def check_token_mlp(
    function: str,
    x: torch.Tensor,
    width: int,
    mlp: Mapping[str, Any],
    norm_eps: float,
    proj_drop: float,
    mlp_drop: float,
    norm: str = "norm",
) -> tuple[float, float, float]:
    """Check the arguments that ``token_mlp`` and ``performer_layer`` share; returns the three numbers as Python
    numbers.
    """
    for name in ("proj_weight", "fc1_weight", "fc2_weight"):
        check_tensor(function, name, mlp[name], ndim=2)
    check_together(function, "the tokens", x, same_dtype=same_dtype(x), **mlp)
    hidden = mlp["fc1_weight"].shape[0]
    shapes = {
        "proj_weight": ((width, width), "(E, E)"),
        "proj_bias": ((width,), "E"),
        f"{norm}_weight": ((width,), "E"),
        f"{norm}_bias": ((width,), "E"),
        "fc1_weight": ((hidden, width), "(hidden, E)"),
        "fc1_bias": ((hidden,), "hidden"),
        "fc2_weight": ((width, hidden), "(E, hidden)"),
        "fc2_bias": ((width,), "E"),
    }
    for name, (shape, meaning) in shapes.items():
        if mlp[name] is not None:
            check_shape(function, name, mlp[name], shape, meaning)
    return (
        check_number(function, f"{norm}_eps", norm_eps, above=0),
        check_probability(function, "proj_drop", proj_drop),
        check_probability(function, "mlp_drop", mlp_drop),
    )


def seed_for(function: str, x: torch.Tensor, seed: torch.Tensor | None, *drops: float) -> torch.Tensor | None:
    """The seed of the dropouts with these probabilities, a new one unless given; ``None`` without dropout."""
    check_tensor(function, "seed", seed, ndim=0, dtypes=(torch.int64,), optional=True)
    check_together(function, "the tokens", x, same_dtype=False, dtypes=(torch.int64,), seed=seed)
    if not any(drops):
        return None
    return fresh_seed(x.device) if seed is None else seed

"""Performer attention, the tail of a token layer, and a whole Performer layer."""

import torch

from ..errors import (
    check_count,
    check_filled,
    check_number,
    check_probability,
    check_shape,
    check_tensor,
    check_together,
    known,
)
from ..ops._common.library import wants_gradient
from ..ops._common.philox import fresh_seed
from ..ops.performer_attention.op import performer_attention as _performer_attention
from ..ops.performer_layer.op import performer_layer as _performer_layer
from ..ops.token_mlp.op import token_mlp as _token_mlp
from .arguments import (
    IMAGES,
    as_image,
    check_parameters,
    check_pixels,
    check_window,
    choose,
    running_dtype,
    same_dtype,
    window,
)


def performer_attention(q, k, v, w, eps=1e-8, *, key_mask=None, backend="auto"):
    """Performer attention with positive random features (Choromanski et al., lemma 1; upstream ``token_performer.py``).

    With ``phi(x) = exp(w x - |x|^2 / 2) / sqrt(m)``, ``y_t = phi(q_t) S / (phi(q_t) z + eps)`` where
    ``S = sum_t phi(k_t) v_t^T`` and ``z = sum_t phi(k_t)``. ``eps`` is a gate, not a guard: it closes as the
    norms of q and k grow, and checkpoints are trained with it, so it is reproduced exactly.

    Args:
        q, k, v: (B, L, E) or (B, heads, L, E), any strides (views of one packed tensor too); L of q may differ.
        w: (m, E) random features, in q's dtype or float32.
        eps: at least 0.
        key_mask: (B, L of k) bool, ``True`` where the token takes part, the same for all heads; ``None`` for all.

    Returns:
        (B, L, E) or (B, heads, L, E), in q's dtype; 0 in a sample where no token of k takes part.

    Numerics:
        float32 inside (float64 for float64), in log space: equal to the defining form where that is finite in exact
        arithmetic, and finite where it overflows or divides 0 by 0 in floating point. Gradients for q, k, v and w;
        a second derivative is refused. What k and v hold where ``key_mask`` is ``False`` (NaN and inf too) changes
        neither the output nor a gradient, and their gradients are exactly 0 there. The "reference" backend, which
        multiplies by the mask, keeps neither this nor the 0 without tokens at ``eps = 0``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
    """
    function = "performer_attention"
    check_tensor(function, "q", q, ndim=(3, 4))
    check_tensor(function, "k", k, ndim=q.ndim)
    check_tensor(function, "v", v, ndim=q.ndim)
    check_tensor(function, "w", w, ndim=2)
    check_together(function, "q", q, same_dtype=same_dtype(q), k=k, v=v)
    check_together(function, "q", q, same_dtype=False, w=w)
    check_shape(function, "k", k, (*q.shape[:-2], k.shape[-2], q.shape[-1]), "batch and width of q")
    check_shape(function, "v", v, k.shape, "the shape of k")
    _check_features(function, w, q.shape[-1], q.dtype)
    check_count(function, "q", *q.shape)
    check_count(function, "k", *k.shape)
    if known(k.shape[-2] < 1):
        raise ValueError(f"{function}: k must have at least one token, got shape {tuple(k.shape)}")
    eps = check_number(function, "eps", eps, minimum=0)
    check_together(function, "q", q, same_dtype=False, dtypes=(torch.bool,), key_mask=key_mask)
    if key_mask is not None:
        check_tensor(function, "key_mask", key_mask, ndim=2, dtypes=(torch.bool,))
        check_shape(function, "key_mask", key_mask, (k.shape[0], k.shape[-2]), "batch and tokens of k")
    chosen = choose(
        function,
        q,
        backend,
        dtype=running_dtype(q),
        width=q.shape[-1],
        features=w.shape[0],
        masked=key_mask is not None,
        training=wants_gradient(q, k, v, w),
        index=q.device.index,
    )
    return _performer_attention(q, k, v, w, eps, key_mask, chosen)


def _check_features(function, w, width, dtype):
    check_shape(function, "w", w, (w.shape[0], width), "(random features, token width)")
    if known(w.shape[0] < 1):
        raise ValueError(f"{function}: w must have at least one random feature, got shape {tuple(w.shape)}")
    if w.dtype not in (dtype, torch.float32):
        allowed = " or ".join(map(str, dict.fromkeys((dtype, torch.float32))))
        raise ValueError(f"{function}: w must be {allowed}, got {w.dtype}")


def _check_tail(function, x, width, tail, norm_eps, proj_drop, mlp_drop):
    """The arguments of ``token_mlp`` that ``performer_layer`` shares; its three numbers as Python numbers."""
    for name in ("proj_weight", "fc1_weight", "fc2_weight"):
        check_tensor(function, name, tail[name], ndim=2)
    check_together(function, "the tokens", x, same_dtype=same_dtype(x), **tail)
    hidden = tail["fc1_weight"].shape[0]
    shapes = {
        "proj_weight": ((width, width), "(E, E)"),
        "proj_bias": ((width,), "E"),
        "norm_weight": ((width,), "E"),
        "norm_bias": ((width,), "E"),
        "fc1_weight": ((hidden, width), "(hidden, E)"),
        "fc1_bias": ((hidden,), "hidden"),
        "fc2_weight": ((width, hidden), "(E, hidden)"),
        "fc2_bias": ((width,), "E"),
    }
    for name, (shape, meaning) in shapes.items():
        if tail[name] is not None:
            check_shape(function, name, tail[name], shape, meaning)
    return (
        check_number(function, "norm_eps", norm_eps, above=0),
        check_probability(function, "proj_drop", proj_drop),
        check_probability(function, "mlp_drop", mlp_drop),
    )


MEMORY = ("fast", "low")
"""What :func:`performer_layer` keeps for backward."""


def check_memory(function, memory):
    """Raise unless ``memory`` is one of :data:`MEMORY`."""
    if not isinstance(memory, str) or memory not in MEMORY:
        raise ValueError(f"{function}: memory must be one of {', '.join(MEMORY)}, got {memory!r}")


def _seed_for(function, x, seed, proj_drop, mlp_drop):
    """The seed of the dropouts, a fresh one unless it is given; ``None`` without a dropout."""
    check_tensor(function, "seed", seed, ndim=0, dtypes=(torch.int64,), optional=True)
    check_together(function, "the tokens", x, same_dtype=False, dtypes=(torch.int64,), seed=seed)
    if not proj_drop and not mlp_drop:
        return None
    return fresh_seed(x.device) if seed is None else seed


def token_mlp(
    y,
    v,
    proj_weight,
    proj_bias,
    norm_weight,
    norm_bias,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    *,
    norm_eps=1e-5,
    proj_drop=0.0,
    mlp_drop=0.0,
    seed=None,
    backend="auto",
):
    """The tail of a token layer: ``t = v + drop(proj(y))``, then ``t + drop(fc2(gelu(fc1(LayerNorm(t)))))``.

    Upstream: ``Token_performer.single_attn``'s last line and ``forward``'s last; ``Token_transformer`` likewise.

    Args:
        y: (B, L, E) attention output; v: (B, L, E) values, the skip.
        proj_weight: (E, E); fc1_weight: (hidden, E); fc2_weight: (E, hidden); biases and LayerNorm's two parameters
            of matching width, each may be ``None``.
        norm_eps: LayerNorm's eps.
        proj_drop, mlp_drop: dropout probabilities after the projection and after the MLP, 0 for none.
        seed: int64 scalar tensor that decides the dropout masks (see ``ops/philox.py``); drawn from torch's generator
            if ``None``.

    Returns:
        (B, L, E) in y's dtype.

    Numerics:
        matrix products in y's dtype, LayerNorm and sums in float32 (float64 for float64), GELU by erf. Backward
        recomputes everything from y and v; masks are regenerated, not stored; a second derivative is refused.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
    """
    function = "token_mlp"
    check_tensor(function, "y", y, ndim=3)
    check_count(function, "y", *y.shape)
    check_tensor(function, "v", v, ndim=3)
    check_shape(function, "v", v, y.shape, "the shape of y")
    check_together(function, "y", y, same_dtype=same_dtype(y), v=v)
    tail = {
        "proj_weight": proj_weight,
        "proj_bias": proj_bias,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "fc1_weight": fc1_weight,
        "fc1_bias": fc1_bias,
        "fc2_weight": fc2_weight,
        "fc2_bias": fc2_bias,
    }
    norm_eps, proj_drop, mlp_drop = _check_tail(function, y, y.shape[-1], tail, norm_eps, proj_drop, mlp_drop)
    seed = _seed_for(function, y, seed, proj_drop, mlp_drop)
    chosen = choose(
        function,
        y,
        backend,
        dtype=running_dtype(y),
        width=y.shape[-1],
        hidden=fc1_weight.shape[0],
        training=wants_gradient(y, v, *tail.values()),
        index=y.device.index,
    )
    return _token_mlp(
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


def performer_layer(
    x,
    kqv_weight,
    kqv_bias,
    w,
    proj_weight,
    proj_bias,
    norm_weight,
    norm_bias,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    kernel_size=1,
    stride=1,
    padding=0,
    *,
    norm1_weight=None,
    norm1_bias=None,
    norm1_eps=1e-5,
    eps=1e-8,
    norm_eps=1e-5,
    proj_drop=0.0,
    mlp_drop=0.0,
    seed=None,
    pixel_norm=None,
    grid=None,
    memory="fast",
    backend="auto",
):
    """A whole Performer layer on the soft split of ``x``: LayerNorm, ``kqv``, :func:`performer_attention`, the tail.

    Upstream: ``Token_performer.forward`` of the unfolded, transposed image. In one operator, because then neither the
    unfolded tokens nor the attention's output need be kept for backward, nor k, q and v.

    Args:
        x: (B, C, H, W) image with any strides, or (B, H*W, C) tokens with ``grid=(H, W)``.
        kqv_weight: (3E, C*k*k), rows in upstream's order k, q, v; kqv_bias: (3E) or ``None``.
        w: (m, E) random features; eps: the attention's.
        norm1_weight, norm1_bias, norm1_eps: LayerNorm over the unfolded tokens, parameters (C*k*k) or ``None``.
        pixel_norm: (mean, std) for an image of uint8, as :func:`soft_split_linear` takes it.
        memory: "fast" keeps k, q and v for backward, "low" computes them again from ``x``: the same numbers for less
            memory (6E bytes a token in half precision, 12E in float32) and more time. The "native" backend always does
            the latter, "reference" keeps everything that it computes.
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
    tail = {
        "proj_weight": proj_weight,
        "proj_bias": proj_bias,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
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
    _check_features(function, w, width, leader.dtype)
    eps = check_number(function, "eps", eps, minimum=0)
    norm_eps, proj_drop, mlp_drop = _check_tail(function, leader, width, tail, norm_eps, proj_drop, mlp_drop)
    check_memory(function, memory)
    seed = _seed_for(function, x, seed, proj_drop, mlp_drop)
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
        training=wants_gradient(x, kqv_weight, kqv_bias, norm1_weight, norm1_bias, w, *tail.values()),
        index=x.device.index,
    )
    return _performer_layer(
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
        memory == "low",
        chosen,
    )

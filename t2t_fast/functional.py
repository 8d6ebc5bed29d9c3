"""The operators as documented functions: they check their arguments, choose the backend, and call the operator.

Letters: B batch, C channels, H W image, k s p window, h w token grid, L = h*w tokens, E token width, m random features.
An image is (B, C, H, W) with any strides. Tokens (B, L, C) with a grid *are* an image in channels-last memory: give
``grid=(h, w)`` and no copy is made. Every function takes ``backend=`` ("auto" by default), which wins over
:func:`t2t_fast.backend`; an explicit backend that cannot run raises :class:`BackendUnavailable`.
"""

import torch

from .backends import Request, resolve
from .errors import check_pair, check_probability, check_shape, check_tensor, check_together
from .ops.fused_fold_unfold.op import fused_fold_unfold as _fused_fold_unfold
from .ops.library import AUTOCAST_DEVICES
from .ops.performer_attention.op import performer_attention as _performer_attention
from .ops.performer_layer.op import performer_layer as _performer_layer
from .ops.philox import fresh_seed
from .ops.soft_composition.op import soft_composition as _soft_composition
from .ops.soft_split.op import soft_split as _soft_split
from .ops.soft_split_linear.op import soft_split_linear as _soft_split_linear
from .ops.spec import Window
from .ops.token_mlp.op import token_mlp as _token_mlp

__all__ = [
    "fused_fold_unfold",
    "performer_attention",
    "performer_layer",
    "soft_composition",
    "soft_split",
    "soft_split_linear",
    "token_mlp",
    "window",
]


def window(kernel_size, stride=1, padding=0, *, function="window"):
    """The checked :class:`Window` of ints or (height, width) pairs; ``window(...).grid(H, W)`` is its token grid."""
    return Window(
        check_pair(function, "kernel_size", kernel_size, minimum=1),
        check_pair(function, "stride", stride, minimum=1),
        check_pair(function, "padding", padding, minimum=0),
    )


def _same_dtype(x):
    """Whether operands must agree in dtype; under autocast they are brought together."""
    kind = x.device.type
    return not (kind in AUTOCAST_DEVICES and torch.is_autocast_enabled(kind))


def _image(function, x, grid):
    """(B, C, H, W) view of an image, or of tokens (B, L, C) with a grid."""
    check_tensor(function, "x", x, ndim=(3, 4))
    if x.ndim == 4:
        if grid is not None:
            raise ValueError(f"{function}: grid is for tokens (3-D), but x is 4-D of shape {tuple(x.shape)}")
        return x
    if grid is None:
        raise ValueError(f"{function}: x is 3-D tokens of shape {tuple(x.shape)}, so grid=(h, w) is needed")
    h, w = check_pair(function, "grid", grid, minimum=1)
    if h * w != x.shape[1]:
        raise ValueError(f"{function}: grid {h} x {w} = {h * w} must count the tokens of x, got {x.shape[1]}")
    return x.transpose(1, 2).unflatten(2, (h, w))


def _check_window(function, win, height, width):
    h, w = win.grid(height, width)
    if h < 1 or w < 1:
        (kh, kw), _, (ph, pw) = win
        raise ValueError(
            f"{function}: the window {kh} x {kw} must fit into the padded image, "
            f"got {height + 2 * ph} x {width + 2 * pw}"
        )
    return h, w


def _resolve(op, x, backend, **sizes):
    return resolve(op, Request(x.device.type, x.dtype, sizes), backend)


def soft_split(x, kernel_size, stride=1, padding=0, *, grid=None, backend="auto"):
    """Soft split: overlapping windows of an image as tokens (T2T-ViT paper, section 3.1, equation 3).

    The same numbers as ``F.unfold(x, kernel_size, stride=stride, padding=padding).transpose(1, 2)``.

    Args:
        x: (B, C, H, W) image with any strides, or (B, H*W, C) tokens with ``grid=(H, W)``; float16, bfloat16,
            float32 or float64.
        kernel_size, stride, padding: int or (height, width) pair.
        grid: the image size of tokens.

    Returns:
        (B, h*w, C*k*k) contiguous tokens in ``x``'s dtype; column ``c*k*k + dy*k + dx`` of token (i, j) is pixel
        (i*s - p + dy, j*s - p + dx) of channel c, 0 outside. h = floor((H + 2p - k) / s) + 1, w likewise.

    Raises:
        TypeError, ValueError: an argument of the wrong type, rank, dtype or value, or a window larger than the image.
    """
    x = _image("soft_split", x, grid)
    win = window(kernel_size, stride, padding, function="soft_split")
    _check_window("soft_split", win, *x.shape[2:])
    return _soft_split(x, *win, _resolve("soft_split", x, backend, kernel=win.kernel))


def soft_composition(tokens, output_size, kernel_size, stride=1, padding=0, *, backend="auto"):
    """Soft composition: overlapping tokens added up into an image; the adjoint of :func:`soft_split`.

    The same numbers as ``F.fold(tokens.transpose(1, 2), output_size, ...)``, summed in a fixed order.

    Args:
        tokens: (B, h*w, C*k*k), columns as :func:`soft_split` makes them.
        output_size: int or (H, W) of the image.
        kernel_size, stride, padding: int or (height, width) pair.

    Returns:
        (B, C, H, W) in ``tokens``' dtype, in channels-last or contiguous memory.

    Numerics:
        native: sums in float32 (float64 for float64), rounded once; aten and reference: sums in ``tokens``' dtype.

    Raises:
        TypeError, ValueError: as :func:`soft_split`, or token counts and widths that do not fit the window.
    """
    size, win = _composition("soft_composition", tokens, output_size, kernel_size, stride, padding)
    return _soft_composition(tokens, size, *win, _resolve("soft_composition", tokens, backend, kernel=win.kernel))


def fused_fold_unfold(tokens, output_size, kernel_size, stride=1, padding=0, *, backend="auto"):
    """Fold, normalise by the overlap, unfold: each pixel of a token becomes the mean over all tokens that show it.

    F3N of FuseFormer (Liu et al., ICCV 2021; its ``FusionFeedForward``, as also in E2FGVI and ProPainter) without
    folding ones. An orthogonal projection of the tokens, so it is its own gradient.

    Args:
        tokens: (B, h*w, C*k*k), columns as :func:`soft_split` makes them.
        output_size: int or (H, W) of the image in between.
        kernel_size, stride, padding: int or (height, width) pair.

    Returns:
        (B, h*w, C*k*k) contiguous tokens in ``tokens``' dtype; what lies in the padding is 0.

    Numerics:
        sums and their division in float32 (float64 for float64), rounded once. A second derivative is refused.

    Raises:
        TypeError, ValueError: as :func:`soft_composition`.
    """
    function = "fused_fold_unfold"
    size, win = _composition(function, tokens, output_size, kernel_size, stride, padding)
    return _fused_fold_unfold(tokens, size, *win, _resolve(function, tokens, backend, kernel=win.kernel))


def _composition(function, tokens, output_size, kernel_size, stride, padding):
    """The checked image size and window of tokens that are to be composed."""
    check_tensor(function, "tokens", tokens, ndim=3)
    size = check_pair(function, "output_size", output_size, minimum=1)
    win = window(kernel_size, stride, padding, function=function)
    h, w = _check_window(function, win, *size)
    if tokens.shape[1] != h * w:
        raise ValueError(
            f"{function}: tokens must have {h} x {w} = {h * w} tokens for output_size {size} and {win}, "
            f"got {tokens.shape[1]}"
        )
    if tokens.shape[2] % win.taps:
        raise ValueError(
            f"{function}: the token width must be a multiple of the window's {win.taps} pixels, got {tokens.shape[2]}"
        )
    return size, win


def soft_split_linear(
    x,
    weight,
    bias=None,
    kernel_size=1,
    stride=1,
    padding=0,
    *,
    norm_weight=None,
    norm_bias=None,
    norm_eps=None,
    grid=None,
    backend="auto",
):
    """Soft split, LayerNorm and Linear in one: ``Linear(LayerNorm(soft_split(x)))`` without the unfolded tokens.

    Upstream: ``self.kqv(self.norm1(self.soft_split0(x).transpose(1, 2)))`` of ``Token_performer``, ``self.project`` of
    ``T2T_module``. Zero padding counts in LayerNorm's statistics, as upstream.

    Args:
        x: (B, C, H, W) image with any strides, or (B, H*W, C) tokens with ``grid=(H, W)``.
        weight: (O, C*k*k), upstream's column order; bias: (O) or ``None``.
        kernel_size, stride, padding: int or (height, width) pair.
        norm_weight, norm_bias: (C*k*k) LayerNorm parameters or ``None``; need ``norm_eps``.
        norm_eps: LayerNorm's eps; ``None`` leaves LayerNorm out.
        grid: the image size of tokens.

    Returns:
        (B, h*w, O) contiguous tokens in ``x``'s dtype (under autocast: autocast's).

    Numerics:
        statistics, sums and the normalisation in float32 (float64 for float64), also for half inputs; they survive a
        large common offset. Gradients for x, weight, bias, norm_weight, norm_bias; a second derivative is refused.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
    """
    function = "soft_split_linear"
    x = _image(function, x, grid)
    win = window(kernel_size, stride, padding, function=function)
    _check_window(function, win, *x.shape[2:])
    check_tensor(function, "weight", weight, ndim=2)
    columns = x.shape[1] * win.taps
    check_shape(function, "weight", weight, (weight.shape[0], columns), "(O, channels * window pixels)")
    if norm_eps is None and (norm_weight is not None or norm_bias is not None):
        raise ValueError(f"{function}: norm_weight and norm_bias need norm_eps, got norm_eps=None")
    if norm_eps is not None and not norm_eps > 0:
        raise ValueError(f"{function}: norm_eps must be above 0, got {norm_eps!r}")
    check_together(
        function,
        "x",
        x,
        same_dtype=_same_dtype(x),
        weight=weight,
        bias=bias,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
    )
    for name, value, shape, meaning in (
        ("bias", bias, (weight.shape[0],), "weight's rows"),
        ("norm_weight", norm_weight, (columns,), "channels * window pixels"),
        ("norm_bias", norm_bias, (columns,), "channels * window pixels"),
    ):
        if value is not None:
            check_shape(function, name, value, shape, meaning)
    chosen = _resolve(function, x, backend, kernel=win.kernel, out=weight.shape[0])
    return _soft_split_linear(x, weight, bias, norm_weight, norm_bias, norm_eps, *win, chosen)


def performer_attention(q, k, v, w, eps=1e-8, *, backend="auto"):
    """Performer attention with positive random features (Choromanski et al., lemma 1; upstream ``token_performer.py``).

    With ``phi(x) = exp(w x - |x|^2 / 2) / sqrt(m)``, ``y_t = phi(q_t) S / (phi(q_t) z + eps)`` where
    ``S = sum_t phi(k_t) v_t^T`` and ``z = sum_t phi(k_t)``. ``eps`` is a gate, not a guard: it closes as the
    norms of q and k grow, and checkpoints are trained with it, so it is reproduced exactly.

    Args:
        q, k, v: (B, L, E) or (B, heads, L, E), any strides (views of one packed tensor too); L of q may differ.
        w: (m, E) random features, in q's dtype or float32.
        eps: at least 0.

    Returns:
        (B, L, E) or (B, heads, L, E), in q's dtype.

    Numerics:
        float32 inside (float64 for float64), in log space: equal to the defining form where that is finite in exact
        arithmetic, and finite where it overflows or divides 0 by 0 in floating point. Gradients for q, k, v and w;
        a second derivative is refused.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
    """
    function = "performer_attention"
    check_tensor(function, "q", q, ndim=(3, 4))
    check_tensor(function, "k", k, ndim=q.ndim)
    check_tensor(function, "v", v, ndim=q.ndim)
    check_tensor(function, "w", w, ndim=2)
    check_together(function, "q", q, same_dtype=_same_dtype(q), k=k, v=v)
    check_together(function, "q", q, same_dtype=False, w=w)
    check_shape(function, "k", k, (*q.shape[:-2], k.shape[-2], q.shape[-1]), "batch and width of q")
    check_shape(function, "v", v, k.shape, "the shape of k")
    _check_features(function, w, q.shape[-1], q.dtype)
    if k.shape[-2] < 1:
        raise ValueError(f"{function}: k must have at least one token, got shape {tuple(k.shape)}")
    _check_eps(function, eps)
    chosen = _resolve(function, q, backend, width=q.shape[-1], features=w.shape[0])
    return _performer_attention(q, k, v, w, eps, chosen)


def _check_features(function, w, width, dtype):
    check_shape(function, "w", w, (w.shape[0], width), "(random features, token width)")
    if w.shape[0] < 1:
        raise ValueError(f"{function}: w must have at least one random feature, got shape {tuple(w.shape)}")
    if w.dtype not in (dtype, torch.float32):
        allowed = " or ".join(map(str, dict.fromkeys((dtype, torch.float32))))
        raise ValueError(f"{function}: w must be {allowed}, got {w.dtype}")


def _check_eps(function, eps):
    if not isinstance(eps, (int, float)):
        raise TypeError(f"{function}: eps must be a number, got {type(eps).__name__}")
    if not eps >= 0:
        raise ValueError(f"{function}: eps must be at least 0, got {eps!r}")


def _check_tail(function, x, width, tail, norm_eps, proj_drop, mlp_drop):
    """The arguments of ``token_mlp`` that ``performer_block`` shares."""
    for name in ("proj_weight", "fc1_weight", "fc2_weight"):
        check_tensor(function, name, tail[name], ndim=2)
    check_together(function, "the tokens", x, same_dtype=_same_dtype(x), **tail)
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
    if not norm_eps > 0:
        raise ValueError(f"{function}: norm_eps must be above 0, got {norm_eps!r}")
    check_probability(function, "proj_drop", proj_drop)
    check_probability(function, "mlp_drop", mlp_drop)


def _seed_for(function, x, seed, proj_drop, mlp_drop):
    if not proj_drop and not mlp_drop:
        return None
    if seed is None:
        return fresh_seed(x.device)
    check_tensor(function, "seed", seed, ndim=0, dtypes=(torch.int64,))
    check_together(function, "the tokens", x, same_dtype=False, seed=seed)
    return seed


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
    check_tensor(function, "v", v, ndim=3)
    check_shape(function, "v", v, y.shape, "the shape of y")
    check_together(function, "y", y, same_dtype=_same_dtype(y), v=v)
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
    _check_tail(function, y, y.shape[-1], tail, norm_eps, proj_drop, mlp_drop)
    seed = _seed_for(function, y, seed, proj_drop, mlp_drop)
    chosen = _resolve(function, y, backend, width=y.shape[-1], hidden=fc1_weight.shape[0])
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
    grid=None,
    backend="auto",
):
    """A whole Performer layer on the soft split of ``x``: LayerNorm, ``kqv``, :func:`performer_attention`, the tail.

    Upstream: ``Token_performer.forward`` of the unfolded, transposed image. In one operator, because then neither the
    unfolded tokens nor, for backward, k, q, v or the attention's output need be kept.

    Args:
        x: (B, C, H, W) image with any strides, or (B, H*W, C) tokens with ``grid=(H, W)``.
        kqv_weight: (3E, C*k*k), rows in upstream's order k, q, v; kqv_bias: (3E) or ``None``.
        w: (m, E) random features; eps: the attention's.
        norm1_weight, norm1_bias, norm1_eps: LayerNorm over the unfolded tokens, parameters (C*k*k) or ``None``.
        others: as :func:`soft_split_linear` and :func:`token_mlp`.

    Returns:
        (B, h*w, E) in ``x``'s dtype (under autocast: autocast's).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
    """
    function = "performer_layer"
    x = _image(function, x, grid)
    win = window(kernel_size, stride, padding, function=function)
    _check_window(function, win, *x.shape[2:])
    check_tensor(function, "kqv_weight", kqv_weight, ndim=2)
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
    check_together(
        function, "x", x, same_dtype=_same_dtype(x), **{name: value for name, (value, _, _) in linear.items()}
    )
    check_together(function, "x", x, same_dtype=False, w=w)
    for name, (value, shape, meaning) in linear.items():
        if value is not None:
            check_shape(function, name, value, shape, meaning)
    if not norm1_eps > 0:
        raise ValueError(f"{function}: norm1_eps must be above 0, got {norm1_eps!r}")
    _check_features(function, w, width, x.dtype)
    _check_eps(function, eps)
    _check_tail(function, x, width, tail, norm_eps, proj_drop, mlp_drop)
    seed = _seed_for(function, x, seed, proj_drop, mlp_drop)
    chosen = _resolve(function, x, backend, kernel=win.kernel, width=width, features=w.shape[0])
    return _performer_layer(
        x,
        kqv_weight,
        kqv_bias,
        norm1_weight,
        norm1_bias,
        norm1_eps,
        *win,
        x.dtype,
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
        chosen,
    )

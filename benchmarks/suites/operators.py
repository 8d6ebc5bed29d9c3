"""The operators at T2T-ViT's sizes, each with its competing implementations.

"upstream" computes what upstream's modules compute, including the change from tokens to an image; "t2t_fast" is the
function of :mod:`t2t_fast.functional`. The others are the usual alternatives: ``F.unfold`` and ``F.fold`` alone, the
bare convolution, softmax attention.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

import torch
import torch.nn.functional as F

from t2t_fast import functional
from t2t_fast.ops._common import costs
from t2t_fast.ops._common.spec import T2T_WINDOWS, square
from t2t_fast.testing import features, natural_images, token_mlp_parameters

from . import attention

NORM_EPS = 1e-5


@dataclass
class Operator:
    """One operator at one size; ``name`` is its function and its line in the tolerance table.

    ``moving``: tensors that scale with the batch, which rotate between calls; ``image``: whether they are an image that
    stays float32 under autocast and gets no gradient, as in the first stage; ``parameters``: the other tensors.
    ``sources``: name -> function of keyword tensors; ``cost``: element size -> bytes and FLOPs; ``truths``: the float64
    function of each source that computes another function than upstream; ``load``: (source, mode, device) -> function,
    if not from ``sources``; it may raise :class:`groups.LeftOut`.
    """

    name: str
    moving: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]
    sources: dict[str, Callable]
    cost: Callable
    image: bool = False
    truths: dict[str, Callable] = field(default_factory=dict)
    load: Callable | None = None


def _generator():
    return torch.Generator().manual_seed(0)


def _stage(stage, size, channels=128):
    """Channels, height, width and window of a stage's input, or of FuseFormer's (``None``) with these channels."""
    if stage is None:
        return channels, 60, 108, square(7, 3, 3)
    side = size
    for window in T2T_WINDOWS[: stage - 1]:
        side = window.grid(side, side)[0]
    return (3 if stage == 1 else costs.WIDTH), side, side, T2T_WINDOWS[stage - 1]


def length(stage, size):
    """Number of tokens of a stage's attention."""
    _, *side, window = _stage(stage, size)
    return prod(window.grid(*side))


def _input(stage, size, batch):
    """A stage's input and its grid: an image, or tokens with a photograph's spectrum."""
    channels, height, width, _ = _stage(stage, size)
    image = natural_images(batch, channels, height, width)
    if stage in (1, None):
        return image, None
    return image.flatten(2).transpose(1, 2).contiguous(), (height, width)


def _tokens(batch, channels, height, width, window):
    return torch.randn(batch, prod(window.grid(height, width)), channels * window.taps, generator=_generator())


def _as_image(x, grid):
    """Upstream's change of tokens to an image."""
    return x if grid is None else x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid)


def soft_split(stage, size, batch):
    """A stage's split, or FuseFormer's."""
    x, grid = _input(stage, size, batch)
    *_, window = shape = _stage(stage, size)
    kernel, step, pad = window

    def unfold(x):
        return F.unfold(_as_image(x, grid), kernel, stride=step, padding=pad)

    return Operator(
        "soft_split",
        {"x": x},
        {},
        {
            "upstream": lambda x: unfold(x).transpose(1, 2).contiguous(),
            "t2t_fast": lambda x: functional.soft_split(x, *window, grid=grid),
            "unfold": lambda x: unfold(x).transpose(1, 2),
        },
        lambda element: costs.soft_split(*shape, element),
    )


def soft_composition(stage, size, batch):
    """The adjoint of :func:`soft_split`."""
    _, *side, window = shape = _stage(stage, size)
    kernel, step, pad = window
    return Operator(
        "soft_composition",
        {"tokens": _tokens(batch, *shape)},
        {},
        {
            "upstream": lambda tokens: F.fold(tokens.transpose(1, 2), side, kernel, stride=step, padding=pad),
            "t2t_fast": lambda tokens: functional.soft_composition(tokens, side, *window),
        },
        lambda element: costs.soft_composition(*shape, element),
    )


def fused_fold_unfold(stage, size, batch):
    """FuseFormer's feed-forward between its two Linears."""
    _, *side, window = shape = _stage(stage, size, channels=40)
    kernel, step, pad = window

    def upstream(tokens):
        x = tokens.permute(0, 2, 1)
        ones = tokens.new_ones(tokens.shape[0], tokens.shape[1], window.taps).permute(0, 2, 1)
        folded = (F.fold(each, side, kernel, stride=step, padding=pad) for each in (x, ones))
        image = next(folded) / next(folded)
        return F.unfold(image, kernel, stride=step, padding=pad).permute(0, 2, 1).contiguous()

    return Operator(
        "fused_fold_unfold",
        {"tokens": _tokens(batch, *shape)},
        {},
        {"upstream": upstream, "t2t_fast": lambda tokens: functional.fused_fold_unfold(tokens, side, *window)},
        lambda element: costs.fused_fold_unfold(*shape, element),
    )


def soft_split_linear(stage, size, batch):
    """Stages 1 and 2 with LayerNorm to 192 columns, stage 3 without to 384."""
    x, grid = _input(stage, size, batch)
    channels, *_, window = shape = _stage(stage, size)
    kernel, step, pad = window
    columns, norm = channels * window.taps, stage < 3
    out = 3 * costs.WIDTH if norm else 384
    generator = _generator()
    weight = torch.randn(out, columns, generator=generator) * columns**-0.5
    parameters = {"weight": weight, "bias": 0.05 * torch.randn(out, generator=generator)}
    if norm:
        parameters["norm_weight"] = 1 + 0.1 * torch.randn(columns, generator=generator)
        parameters["norm_bias"] = 0.1 * torch.randn(columns, generator=generator)

    def upstream(x, weight, bias, norm_weight=None, norm_bias=None):
        tokens = F.unfold(_as_image(x, grid), kernel, stride=step, padding=pad).transpose(1, 2)
        if norm:
            tokens = F.layer_norm(tokens, (columns,), norm_weight, norm_bias, NORM_EPS)
        return F.linear(tokens, weight, bias)

    def ours(x, weight, bias, **affine):
        eps = NORM_EPS if norm else None
        return functional.soft_split_linear(x, weight, bias, *window, grid=grid, norm_eps=eps, **affine)

    def convolution(x, weight, bias, **affine):
        image = x if grid is None else x.transpose(1, 2).unflatten(2, grid)
        image = image.contiguous(memory_format=torch.channels_last)
        y = F.conv2d(image, weight.view(out, channels, *kernel), bias, stride=step, padding=pad)
        return y.permute(0, 2, 3, 1).flatten(1, 2)

    return Operator(
        "soft_split_linear",
        {"x": x},
        parameters,
        {"upstream": upstream, "t2t_fast": ours, "convolution": convolution},
        lambda element: costs.soft_split_linear(*shape, out, element, norm=norm, image_gradient=stage > 1),
        image=stage == 1,
        truths={"convolution": convolution} if norm else {},
    )


def performer_attention(stage, size, batch, tokens=None):
    """A stage's attention, or attention with a given number of tokens."""
    tokens = tokens or length(stage, size)
    moving, parameters = attention.inputs(tokens, batch, _generator())
    return Operator(
        "performer_attention",
        moving,
        parameters,
        attention.FUNCTIONS,
        lambda element: costs.performer_attention(tokens, element=element),
        truths=attention.TRUTHS,
        load=lambda source, mode, device: attention.load(source, tokens, batch, mode, device),
    )


def _mlp(y, v, **p):
    """Upstream's ``v + proj(y)``, then ``x + mlp(norm2(x))``."""
    t = v + F.linear(y, p["proj_weight"], p["proj_bias"])
    n = F.layer_norm(t, t.shape[-1:], p["norm_weight"], p["norm_bias"], NORM_EPS)
    return t + F.linear(F.gelu(F.linear(n, p["fc1_weight"], p["fc1_bias"])), p["fc2_weight"], p["fc2_bias"])


def token_mlp(stage, size, batch):
    """Without dropout, so that every gradient can be checked."""
    tokens, generator = length(stage, size), _generator()
    y, v = (torch.randn(batch, tokens, costs.WIDTH, generator=generator) for _ in range(2))
    return Operator(
        "token_mlp",
        {"y": y, "v": v},
        token_mlp_parameters(generator, costs.WIDTH),
        {"upstream": _mlp, "t2t_fast": functional.token_mlp},
        lambda element: costs.token_mlp(tokens, element=element),
    )


def performer_layer(stage, size, batch):
    """The whole layer of stage 1 or 2, without dropout, so that every gradient can be checked."""
    linear, generator = soft_split_linear(stage, size, batch), _generator()
    split, renamed = linear.sources["upstream"], {"weight": "kqv_weight", "bias": "kqv_bias"}
    *_, window = shape = _stage(stage, size)
    _, grid = _input(stage, size, 1)
    first = {renamed.get(name, name.replace("norm_", "norm1_")): value for name, value in linear.parameters.items()}
    first["kqv_weight"] = 2 * costs.WIDTH**-0.5 * first["kqv_weight"]  # k and q of norm 2

    def upstream(x, w, kqv_weight, kqv_bias, norm1_weight, norm1_bias, **mlp):
        kqv = split(x, kqv_weight, kqv_bias, norm1_weight, norm1_bias)
        k, q, v = torch.split(kqv, costs.WIDTH, dim=-1)
        mlp = {name.replace("norm2_", "norm_"): value for name, value in mlp.items()}
        return _mlp(attention.upstream(q, k, v, w), v, **mlp)

    def layer(x, **parameters):
        kernel, step, pad = window
        return functional.performer_layer(x, kernel_size=kernel, stride=step, padding=pad, grid=grid, **parameters)

    return Operator(
        "performer_layer",
        linear.moving,
        {
            **first,
            "w": features(generator, costs.FEATURES, costs.WIDTH),
            **token_mlp_parameters(generator, costs.WIDTH, norm="norm2"),
        },
        {"upstream": upstream, "t2t_fast": layer},
        lambda element: costs.performer_layer(*shape, element, image_gradient=stage > 1),
        image=linear.image,
    )


BOTH = ("upstream", "t2t_fast")
# Operator -> its builder, and its sources, which are known before anything is built
OPERATORS = {
    "soft_split": (soft_split, (*BOTH, "unfold")),
    "soft_composition": (soft_composition, BOTH),
    "fused_fold_unfold": (fused_fold_unfold, BOTH),
    "soft_split_linear": (soft_split_linear, (*BOTH, "convolution")),
    "performer_attention": (performer_attention, attention.SOURCES),
    "token_mlp": (token_mlp, BOTH),
    "performer_layer": (performer_layer, BOTH),
}


def build(subject, size, batch):
    """The operator of a subject such as "token_mlp-stage1", or "performer_attention-L3136" without a size."""
    name, _, where = subject.partition("-")
    if where.startswith("L"):
        return performer_attention(None, size, batch, tokens=int(where[1:]))
    stage = int(where.removeprefix("stage")) if where.startswith("stage") else None
    return OPERATORS[name][0](stage, size, batch)

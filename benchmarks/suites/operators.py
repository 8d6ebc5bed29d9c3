"""The operators at T2T-ViT's sizes, each with its competing implementations.

"upstream" computes what upstream's modules compute, including the change from tokens to an image; "t2t_fast" is the
function of :mod:`t2t_fast.functional`. The others are the usual alternatives: ``F.unfold`` alone, a convolution without
LayerNorm, softmax attention.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import prod

import torch
import torch.nn.functional as F

from t2t_fast import functional
from t2t_fast.ops._common import costs
from t2t_fast.ops._common.spec import T2T_WINDOWS, grid_after, square
from t2t_fast.testing import features, natural_images, token_mlp_parameters, transformer_block_parameters

from . import attention


@dataclass
class Operator:
    """One operator at one size.

    ``moving``: tensors that scale with the batch, which rotate between calls; ``parameters``: the other tensors;
    ``sources``: name -> function of keyword tensors; ``cost``: element size -> bytes and FLOPs; ``image``: whether
    ``moving`` is an image, which stays float32 under autocast and gets no gradient, as in the first stage; ``stream``:
    the name of a transformer block's tokens, which stay float32 as well; ``truths``:
    the float64 function of each source that computes another function than upstream; ``load``: (source, mode, device)
    -> function, if not from ``sources``; it may raise :class:`groups.LeftOut`.
    """

    moving: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]
    sources: dict[str, Callable]
    cost: Callable
    image: bool = False
    stream: str | None = None
    truths: dict[str, Callable] = field(default_factory=dict)
    load: Callable | None = None


class Split:
    """The soft split of a stage at an image side, or FuseFormer's (stage ``None``) of an image with these channels.

    ``shape``: (channels, height, width, window), as the costs need it; ``side``: (height, width); ``grid``: the side
    if the input is tokens; ``options``: the window as keyword arguments; ``length``, ``columns``: size of the output.
    """

    def __init__(self, stage, size, channels=128):
        self.side, self.window = (60, 108), square(7, 3, 3)
        if stage is not None:
            self.side, self.window = grid_after(T2T_WINDOWS[: stage - 1], size, size), T2T_WINDOWS[stage - 1]
            channels = 3 if stage == 1 else costs.WIDTH
        self.shape = (channels, *self.side, self.window)
        self.grid = None if stage in (1, None) else self.side
        self.options = dict(zip(("kernel_size", "stride", "padding"), self.window, strict=True))
        self.length, self.columns = prod(self.window.grid(*self.side)), channels * self.window.taps

    def inputs(self, batch):
        """An image, or tokens, with a photograph's spectrum."""
        image = natural_images(batch, self.shape[0], *self.side)
        return {"x": image if self.grid is None else image.flatten(2).transpose(1, 2).contiguous()}

    def tokens(self, batch):
        """Random tokens of the output's shape."""
        return {"tokens": torch.randn(batch, self.length, self.columns, generator=_generator())}

    def image(self, x):
        """The input as an image, as upstream changes it."""
        return x if self.grid is None else x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *self.grid)

    def unfold(self, x):
        """The output, not contiguous."""
        return F.unfold(self.image(x), **self.options).transpose(1, 2)

    def fold(self, columns):
        """The adjoint of ``F.unfold``."""
        return F.fold(columns, self.side, **self.options)

    def linear(self, x, weight, bias, norm_weight=None, norm_bias=None):
        """Soft split, LayerNorm if it has parameters, Linear."""
        tokens = self.unfold(x)
        if norm_weight is not None:
            tokens = F.layer_norm(tokens, (self.columns,), norm_weight, norm_bias)
        return F.linear(tokens, weight, bias)


def _generator():
    return torch.Generator().manual_seed(0)


def length(stage, size):
    """Number of tokens of a stage's attention."""
    return Split(stage, size).length


def soft_split(stage, size, batch):
    """A stage's split, or FuseFormer's."""
    split = Split(stage, size)
    sources = {
        "upstream": lambda x: split.unfold(x).contiguous(),
        "t2t_fast": partial(functional.soft_split, **split.options, grid=split.grid),
        "unfold": split.unfold,
    }
    return Operator(split.inputs(batch), {}, sources, lambda element: costs.soft_split(*split.shape, element))


def soft_composition(stage, size, batch):
    """The adjoint of :func:`soft_split`."""
    split = Split(stage, size)
    sources = {
        "upstream": lambda tokens: split.fold(tokens.transpose(1, 2)),
        "t2t_fast": partial(functional.soft_composition, output_size=split.side, **split.options),
    }
    return Operator(split.tokens(batch), {}, sources, lambda element: costs.soft_composition(*split.shape, element))


def fused_fold_unfold(stage, size, batch):
    """FuseFormer's feed-forward between its two Linears."""
    split = Split(stage, size, channels=40)

    def upstream(tokens):
        ones = tokens.new_ones(tokens.shape[0], tokens.shape[1], split.window.taps)
        image = split.fold(tokens.permute(0, 2, 1)) / split.fold(ones.permute(0, 2, 1))
        return split.unfold(image).contiguous()

    ours = partial(functional.fused_fold_unfold, output_size=split.side, **split.options)
    sources = {"upstream": upstream, "t2t_fast": ours}
    return Operator(split.tokens(batch), {}, sources, lambda element: costs.fused_fold_unfold(*split.shape, element))


def _linear_parameters(names, columns, out, gain=1.0):
    """Weight and bias of a Linear; if there are four names, weight and bias of the LayerNorm before it."""
    generator = _generator()
    weight = gain * columns**-0.5 * torch.randn(out, columns, generator=generator)
    bias = 0.05 * torch.randn(out, generator=generator)
    norm_weight, norm_bias = (0.1 * torch.randn(columns, generator=generator) for _ in range(2))
    return dict(zip(names, (weight, bias, 1 + norm_weight, norm_bias), strict=False))


def soft_split_linear(stage, size, batch):
    """Stages 1 and 2 with LayerNorm to 192 columns, stage 3 without to 384."""
    split, norm = Split(stage, size), stage < 3
    out, eps = (3 * costs.WIDTH, 1e-5) if norm else (384, None)
    names = ("weight", "bias", "norm_weight", "norm_bias")[: 4 if norm else 2]
    ours = partial(functional.soft_split_linear, **split.options, grid=split.grid, norm_eps=eps)

    def convolution(x, weight, bias, **affine):
        image = split.image(x).contiguous(memory_format=torch.channels_last)
        y = F.conv2d(image, weight.unflatten(1, (-1, *split.window.kernel)), bias, *split.window[1:])
        return y.permute(0, 2, 3, 1).flatten(1, 2)

    return Operator(
        split.inputs(batch),
        _linear_parameters(names, split.columns, out),
        {"upstream": split.linear, "t2t_fast": ours, "convolution": convolution},
        lambda element: costs.soft_split_linear(*split.shape, out, element, norm=norm, image_gradient=stage > 1),
        image=stage == 1,
        truths={"convolution": convolution} if norm else {},
    )


def performer_attention(stage, size, batch, tokens=None):
    """A stage's attention, or attention with a given number of tokens."""
    tokens = tokens or length(stage, size)
    return Operator(
        *attention.inputs(tokens, batch, _generator()),
        attention.FUNCTIONS,
        lambda element: costs.performer_attention(tokens, element=element),
        truths=attention.TRUTHS,
        load=lambda source, mode, device: attention.load(source, tokens, batch, mode, device),
    )


def _mlp(y, v=None, norm="norm", **p):
    """Upstream's ``v + proj(y)``, or y without v, then ``x + mlp(norm(x))``; ``norm``: the name of its LayerNorm."""
    x = y if v is None else v + F.linear(y, p["proj_weight"], p["proj_bias"])
    normed = F.layer_norm(x, x.shape[-1:], p[f"{norm}_weight"], p[f"{norm}_bias"])
    # without a name for the hidden tensor, which would keep its memory for longer than upstream does
    return x + F.linear(F.gelu(F.linear(normed, p["fc1_weight"], p["fc1_bias"])), p["fc2_weight"], p["fc2_bias"])


def token_mlp(stage, size, batch):
    """Without dropout, so that every gradient can be checked."""
    tokens, generator = length(stage, size), _generator()
    moving = {name: torch.randn(batch, tokens, costs.WIDTH, generator=generator) for name in ("y", "v")}
    parameters = token_mlp_parameters(generator, costs.WIDTH)
    sources = {"upstream": _mlp, "t2t_fast": functional.token_mlp}
    return Operator(moving, parameters, sources, lambda element: costs.token_mlp(tokens, element=element))


def performer_layer(stage, size, batch):
    """The whole layer of stage 1 or 2, without dropout, so that every gradient can be checked."""
    split, generator = Split(stage, size), _generator()
    names = ("kqv_weight", "kqv_bias", "norm1_weight", "norm1_bias")
    gain = 2 * costs.WIDTH**-0.5  # k and q of norm 2

    def upstream(x, w, kqv_weight, kqv_bias, norm1_weight, norm1_bias, **mlp):
        kqv = split.linear(x, kqv_weight, kqv_bias, norm1_weight, norm1_bias)
        k, q, v = torch.split(kqv, costs.WIDTH, dim=-1)
        return _mlp(attention.upstream(q, k, v, w), v, norm="norm2", **mlp)

    ours = partial(functional.performer_layer, **split.options, grid=split.grid)
    return Operator(
        split.inputs(batch),
        {
            **_linear_parameters(names, split.columns, 3 * costs.WIDTH, gain),
            "w": features(generator, costs.FEATURES, costs.WIDTH),
            **token_mlp_parameters(generator, costs.WIDTH, norm="norm2"),
        },
        {"upstream": upstream, "t2t_fast": ours},
        lambda element: costs.performer_layer(*split.shape, element, image_gradient=stage > 1),
        image=stage == 1,
    )


def layer_norm_mlp(stage, size, batch, width=384, hidden=1152):
    """T2T-ViT-14's transformer block from the attention's result on, whatever the stage."""
    tokens, generator, fc2 = (size // 16) ** 2 + 1, _generator(), ("fc2_weight", "fc2_bias")
    moving = {name: torch.randn(batch, tokens, width, generator=generator) for name in ("x", "branch")}
    fc1 = _linear_parameters(("fc1_weight", "fc1_bias", "norm_weight", "norm_bias"), width, hidden)
    sources = {"upstream": lambda x, branch, **p: _mlp(x + branch, **p), "t2t_fast": functional.layer_norm_mlp}
    cost = partial(costs.layer_norm_mlp, tokens, width, hidden)
    return Operator(moving, fc1 | _linear_parameters(fc2, hidden, width), sources, cost, stream="x")


def add_layer_norm(stage, size, batch):
    """The stream of that block and its LayerNorm, concatenated."""
    op = layer_norm_mlp(stage, size, batch)

    def upstream(x, branch, norm_weight, norm_bias):
        return torch.cat([x + branch, F.layer_norm(x + branch, x.shape[-1:], norm_weight, norm_bias)], -1)

    op.parameters = {name: op.parameters[name] for name in ("norm_weight", "norm_bias")}
    op.sources = {"upstream": upstream, "t2t_fast": lambda **given: torch.cat(functional.add_layer_norm(**given), -1)}
    op.cost = partial(costs.add_layer_norm, *op.moving["x"].shape[1:])
    return op


def transformer_block(stage, size, batch, width=384, hidden=1152, heads=6):
    """T2T-ViT-14's transformer block, whatever the stage."""
    tokens, generator = (size // 16) ** 2 + 1, _generator()

    def upstream(x, norm1_weight, norm1_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, **mlp):
        packed = F.linear(F.layer_norm(x, x.shape[-1:], norm1_weight, norm1_bias), qkv_weight, qkv_bias)
        q, k, v = packed.reshape(*x.shape[:2], 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(-2, -1) * (width // heads) ** -0.5).softmax(-1) @ v
        y = y.transpose(1, 2).reshape(x.shape)
        return _mlp(y, x, norm="norm2", proj_weight=proj_weight, proj_bias=proj_bias, **mlp)

    return Operator(
        {"x": torch.randn(batch, tokens, width, generator=generator)},
        transformer_block_parameters(generator, width, hidden),
        {"upstream": upstream, "t2t_fast": partial(functional.transformer_block, heads=heads)},
        partial(costs.block, tokens, width, hidden, heads),
        stream="x",
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
    "add_layer_norm": (add_layer_norm, BOTH),
    "layer_norm_mlp": (layer_norm_mlp, BOTH),
    "transformer_block": (transformer_block, BOTH),
}


def build(subject, size, batch):
    """The operator of a subject such as "token_mlp-stage1", or "performer_attention-L3136" without a size."""
    name, _, where = subject.partition("-")
    if where.startswith("L"):
        return performer_attention(None, size, batch, tokens=int(where[1:]))
    stage = int(where.removeprefix("stage")) if where.startswith("stage") else None
    return OPERATORS[name][0](stage, size, batch)

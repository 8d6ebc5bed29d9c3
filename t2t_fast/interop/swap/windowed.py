"""The rules of modules around windows: video inpainting, outlook attention."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from ...models.family import Form, Rule, has, window_refusal
from ...modules import windowed
from ...modules.t2t_module import window_of
from ...modules.windowed import stored_window
from ...ops._common.spec import Window

_STORED = ("t2t_params", "t2t_param", "kernel_size", "stride", "padding", "kernel_shape", "n_vecs", "f_h", "f_w")
"""Attributes with numbers of the window and of the grid, which a ``forward`` may read."""


def _arguments(module: Any) -> int:
    """How many arguments a ``forward`` takes."""
    return len(inspect.signature(type(module).forward).parameters) - 1


def _size(window: Window, height: int, width: int) -> tuple[int, int]:
    """An image size whose token grid is ``height`` x ``width``."""
    numbers = zip((height, width), *window, strict=True)
    first, second = [max(1, (n - 1) * stride + kernel - 2 * padding) for n, kernel, stride, padding in numbers]
    return first, second


def _small(window: Window) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size and the token grid of a small image that is not square."""
    size = _size(window, 3, 2)
    return size, window.grid(*size)


def _window(module: Any) -> Window:
    """The window of an ``nn.Unfold`` or ``nn.Fold`` that :func:`window_refusal` accepts."""
    window: Any = window_of(module)
    return window


def _is_sequence(module: Any, *names: str) -> bool:
    """Whether the named children are each a Linear, or an ``nn.Sequential`` with one."""
    children = [getattr(module, name, None) for name in names]
    return all(isinstance(child, (nn.Linear, nn.Sequential)) and _linear(child) is not None for child in children)


def _linear(child: nn.Module) -> nn.Linear | None:
    return next((each for each in child.modules() if isinstance(each, nn.Linear)), None)


def _width(module: Any, first: str) -> int:
    linear: Any = _linear(getattr(module, first))
    return int(linear.in_features)


def _feed_forward(name: str, kind: type[windowed.FusionFeedForward]) -> Rule:
    """The rule of a feed-forward that takes the image size, for its names of its children."""

    def stored(module: Any) -> Window:
        window: Any = stored_window(module, "t2t_params")
        return window

    def probes(module: Any) -> list[tuple[int, ...]]:
        _, (height, width) = _small(stored(module))
        return [(2, 2 * height * width, _width(module, kind.first))]

    return Rule(
        name=name,
        structure=f"{kind.first}, {kind.second} (Linear or Sequential), t2t_params; forward(x, output_size)",
        form=Form(kind, (kind.first, kind.second), attributes=_STORED),
        matches=lambda module: (
            _is_sequence(module, kind.first, kind.second)
            and isinstance(getattr(module, "t2t_params", None), dict)
            and stored_window(module, "t2t_params") is not None
        ),
        probes=probes,
        arguments=lambda module: (_small(stored(module))[0],),
        operator="fused_fold_unfold",
    )


def _fixed_feed_forward(name: str, kind: type[windowed.FusionFeedForward]) -> Rule:
    """The rule of a feed-forward with ``nn.Fold`` and ``nn.Unfold``, for its names of its children."""

    def probes(module: Any) -> list[tuple[int, ...]]:
        height, width = _window(module.fold).grid(*_pair(module.fold.output_size))
        return [(1, height * width, _width(module, kind.first))]

    return Rule(
        name=name,
        structure=f"{kind.first}, {kind.second} (Linear or Sequential), fold (nn.Fold), unfold (nn.Unfold)",
        form=Form(kind, (kind.first, kind.second, "fold", "unfold"), attributes=_STORED),
        matches=lambda module: (
            _is_sequence(module, kind.first, kind.second) and has(module, fold=nn.Fold, unfold=nn.Unfold)
        ),
        refusal=lambda module: window_refusal(module.fold) or window_refusal(module.unfold),
        probes=probes,
        operator="fused_fold_unfold",
        soft_splits={"fold": "", "unfold": ""},
    )


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _embedding(name: str, kind: type[windowed.SplitEmbedding], structure: str, number: int, grid: bool) -> Rule:
    """The rule of ``t2t`` (nn.Unfold) and ``embedding`` (nn.Linear).

    Args:
        structure: the forward, for messages; number: of its arguments; grid: whether ``f_h`` and ``f_w`` are stored.
    """

    def size(module: Any) -> tuple[int, int]:
        window = _window(module.t2t)
        return _size(window, module.f_h, module.f_w) if grid else _small(window)[0]

    def probes(module: Any) -> list[tuple[int, ...]]:
        channels = module.embedding.in_features // _window(module.t2t).taps
        return [(2 if grid else 4, channels, *size(module))]

    def arguments(module: Any) -> tuple[Any, ...]:
        return (1 if grid else 2, size(module))[: number - 1]

    return Rule(
        name=name,
        structure=f"t2t (nn.Unfold), embedding (nn.Linear); {structure}",
        form=Form(kind, ("t2t", "embedding", "dropout"), attributes=_STORED),
        matches=lambda module: (
            has(module, t2t=nn.Unfold, embedding=nn.Linear)
            and _arguments(module) == number
            and all(hasattr(module, each) for each in ("f_h", "f_w")) == grid
        ),
        refusal=lambda module: window_refusal(module.t2t),
        probes=probes,
        arguments=arguments,
        operator="soft_split_linear",
        soft_splits={"t2t": ""},
    )


def _composition_probes(module: Any) -> list[tuple[int, ...]]:
    window: Any = stored_window(module)
    return [(1, 2, *_small(window)[1], module.embedding.in_features)]


def _composition_arguments(module: Any) -> tuple[Any, ...]:
    window: Any = stored_window(module)
    return 2, _small(window)[0]


def _layer_width(module: Any) -> int:
    """The input width of the layer behind a soft split, 0 if it is unknown."""
    for path in ("kqv", "attn.qkv"):
        try:
            return int(module.transformer.get_submodule(path).in_features)
        except AttributeError:
            continue
    return 0


def _layer_refusal(module: Any) -> str | None:
    reason = window_refusal(module.sw)
    width, taps = _layer_width(module), _window(module.sw).taps
    if reason is None and (width == 0 or width % taps):
        return f"the layer's width {width} is not a multiple of its window's {taps} pixels"
    return reason


def _layer_probes(module: Any) -> list[tuple[int, ...]]:
    window = _window(module.sw)
    return [(2, _layer_width(module) // window.taps, *_small(window)[0])]


def _outlook_probes(module: Any) -> list[tuple[int, ...]]:
    window = _window(module.unfold)
    return [(2, 3 * window.stride[0], 2 * window.stride[1], module.v.in_features)]


RULES = (
    _fixed_feed_forward("FusionFeedForward", windowed.FusionFeedForward),
    _fixed_feed_forward("FusionFeedForward with fc1 and fc2", windowed.FusionMlp),
    _feed_forward("FusionFeedForward of any size", windowed.SizedFusionFeedForward),
    _feed_forward("FusionFeedForward of any size with fc1 and fc2", windowed.SizedFusionMlp),
    _embedding("SoftSplit", windowed.SplitEmbedding, "forward(x, b)", 2, False),
    _embedding("SoftSplit on a grid", windowed.GridEmbedding, "f_h, f_w; forward(x, b)", 2, True),
    _embedding("SoftSplit of any size", windowed.SizedGridEmbedding, "forward(x, b, output_size)", 3, False),
    Rule(
        name="SoftComp of any size",
        structure="embedding (Linear), bias_conv (Conv2d), kernel_size, stride, padding; forward(x, t, output_size)",
        form=Form(windowed.Composition, ("relu", "embedding", "bias_conv"), attributes=_STORED),
        matches=lambda module: (
            has(module, embedding=nn.Linear, bias_conv=nn.Conv2d) and stored_window(module) is not None
        ),
        probes=_composition_probes,
        arguments=_composition_arguments,
        operator="soft_composition",
    ),
    Rule(
        name="Soft split and layer",
        structure="sw (nn.Unfold), transformer (a Token_performer or Token_transformer)",
        form=Form(windowed.SplitLayer, ("sw", "transformer")),
        matches=lambda module: has(module, sw=nn.Unfold, transformer=nn.Module),
        refusal=_layer_refusal,
        probes=_layer_probes,
        operator="soft_split_linear",
        soft_splits={"sw": "transformer"},
    ),
    Rule(
        name="OutlookAttention",
        structure="v, attn, proj (Linear), attn_drop, proj_drop, unfold (nn.Unfold), pool, num_heads, scale",
        form=Form(
            windowed.OutlookAttention,
            ("v", "attn", "attn_drop", "proj", "proj_drop", "unfold", "pool"),
            attributes=("num_heads", "kernel_size", "padding", "stride", "scale"),
        ),
        matches=lambda module: (
            has(module, v=nn.Linear, attn=nn.Linear, proj=nn.Linear, unfold=nn.Unfold, pool=nn.Module)
            and has(module, attn_drop=nn.Module, proj_drop=nn.Module)
            and hasattr(module, "num_heads")
        ),
        refusal=lambda module: window_refusal(module.unfold),
        probes=_outlook_probes,
        operator="soft_split",
        soft_splits={"unfold": ""},
    ),
)

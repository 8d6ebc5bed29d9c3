"""What ``swap`` looks for: upstream's modules by structure (children, attributes, shapes), never by their class.

A rule takes a module and returns ``None`` (no match), a :class:`Plan`, or raises :class:`Mismatch` with the reason why
something that looks like a match cannot be swapped.
"""

from math import isqrt, prod
from typing import NamedTuple

from torch import nn

from ..errors import check_pair
from ..functional import window
from ..models import lanl
from ..modules import Fold, T2TModule, TokenPerformer, TokenTransformer, Unfold
from ..modules.soft_split import SoftSplit
from ..modules.token_transformer import TokenAttention


class Change(NamedTuple):
    """One module's class to be changed, and the attributes that the new class needs beside the old ones."""

    module: nn.Module
    kind: type
    attributes: dict


class Plan(NamedTuple):
    """A match: the changes it takes (the module itself last), shapes of inputs to prove it with.

    ``caution`` is why the module is swapped only if a pattern of ``include`` matches its own path.
    """

    changes: list[Change]
    probes: list[tuple[int, ...]]
    caution: str = ""


class Mismatch(Exception):
    """A module that looks like a candidate but cannot be swapped; the text is the reason."""


def _children(module, **kinds):
    """Whether ``module`` has the named children, each of its class."""
    return all(isinstance(getattr(module, name, None), kind) for name, kind in kinds.items())


def _window(unfold):
    if unfold.dilation not in (1, (1, 1), [1, 1]):
        raise Mismatch(f"dilation {unfold.dilation}: a soft split has dilation 1")
    try:
        return window(unfold.kernel_size, unfold.stride, unfold.padding, function="swap")
    except (TypeError, ValueError) as error:
        raise Mismatch(str(error)) from error


def _token_performer(module):
    """kqv, proj (Linear), norm1, norm2 (LayerNorm), mlp (Sequential of 4), dp, parameter w (m, emb), epsilon"""
    if not (
        _children(module, kqv=nn.Linear, proj=nn.Linear, norm1=nn.LayerNorm, norm2=nn.LayerNorm, mlp=nn.Sequential)
        and isinstance(getattr(module, "w", None), nn.Parameter)
    ):
        return None
    if not (isinstance(getattr(module, "dp", None), nn.Module) and hasattr(module, "epsilon")):
        raise Mismatch("has kqv, proj and w of a Token_performer, but no dp or no epsilon")
    if len(module.mlp) != 4:
        raise Mismatch(f"mlp has {len(module.mlp)} layers, expected Linear, GELU, Linear, Dropout")
    width = module.proj.in_features
    if module.w.ndim != 2 or module.w.shape[1] != width or module.kqv.out_features != 3 * width:
        raise Mismatch(
            f"w {tuple(module.w.shape)} and kqv ({module.kqv.out_features}) do not fit the token width {width}"
        )
    return Plan([Change(module, TokenPerformer, {})], [(2, 7, module.kqv.in_features)])


def _attention_layer(module, mlp_name):
    """The parts that both token transformers share: norm1, attn with qkv and proj, norm2, an MLP with fc1, act, fc2."""
    mlp = getattr(module, mlp_name, None)
    attn = getattr(module, "attn", None)
    return (
        _children(module, norm1=nn.Module, norm2=nn.Module, attn=nn.Module)
        and isinstance(mlp, nn.Module)
        and _children(mlp, fc1=nn.Linear, fc2=nn.Linear, act=nn.Module)
        and _children(attn, qkv=nn.Linear, proj=nn.Linear)
        and hasattr(attn, "scale")
        and hasattr(attn, "num_heads")
    )


def _token_transformer(module):
    """norm1, norm2, attn (qkv, proj, scale, num_heads, in_dim), mlp (fc1, act, fc2), drop_path; no skip around attn"""
    if not _attention_layer(module, "mlp") or not hasattr(module.attn, "in_dim"):
        return None
    attn = module.attn
    if attn.num_heads != 1:
        raise Mismatch(f"attn.num_heads is {attn.num_heads}: upstream's skip through v only has a meaning for 1")
    if not _children(attn, attn_drop=nn.Dropout, proj_drop=nn.Dropout):
        raise Mismatch("attn has no attn_drop or no proj_drop")
    changes = [Change(attn, TokenAttention, {}), Change(module, TokenTransformer, {})]
    return Plan(changes, [(2, 7, attn.qkv.in_features)])


def _lanl_token_transformer(module):
    """norm1, norm2, attn (qkv, proj, scale, num_heads), neuralnet (fc1, act, fc2); no skip around attn"""
    if not _attention_layer(module, "neuralnet"):
        return None
    attn = module.attn
    if attn.qkv.in_features == attn.proj.in_features:
        return None  # the articles' backbone block: the same children, but with a skip around attn
    if attn.proj.in_features % attn.num_heads:
        raise Mismatch(f"attn.num_heads {attn.num_heads} does not divide {attn.proj.in_features}")
    changes = [Change(attn, lanl.Attention, {}), Change(module, lanl.TokenTransformer, {})]
    return Plan(changes, [(2, 7, attn.qkv.in_features)])


def _module_of(kind, first, second, sizes_of):
    """A whole tokens-to-token module: three unfolds ``soft_split0..2``, two token layers, a Linear ``project``."""

    def fits(module):
        splits = [getattr(module, f"soft_split{i}", None) for i in range(3)]
        layers = [getattr(module, name, None) for name in (first, second)]
        project = getattr(module, "project", None)
        if not all(isinstance(split, nn.Unfold) for split in splits) or not isinstance(project, nn.Linear):
            return None
        if not all(isinstance(layer, nn.Module) for layer in layers):
            return None
        windows = tuple(_window(split) for split in splits)
        changes = [Change(split, SoftSplit, {"window": win}) for split, win in zip(splits, windows, strict=True)]
        sizes = sizes_of(module, windows)
        attributes = {"windows": windows, **sizes.attributes}
        return Plan([*changes, Change(module, kind, attributes)], sizes.probes)

    return fits


class _Sizes(NamedTuple):
    attributes: dict
    probes: list


def _first_width(module, layer_name, linear_names):
    """Input width of the first Linear of a token layer."""
    for name in linear_names:
        try:
            return getattr(module, layer_name).get_submodule(name).in_features
        except AttributeError:
            continue
    raise Mismatch(f"{layer_name} is {type(getattr(module, layer_name)).__name__}, whose input width is unknown")


def _channels(width, win):
    if width % win.taps:
        raise Mismatch(f"the first layer's width {width} is not a multiple of its window's {win.taps} pixels")
    return width // win.taps


def _official_sizes(module, windows):
    channels = _channels(_first_width(module, "attention1", ("kqv", "attn.qkv")), windows[0])
    stride = prod(win.stride[0] for win in windows)
    side = stride * isqrt(getattr(module, "num_patches", 4))
    attributes = {"img_size": (side, side), "tokens_type": getattr(module, "tokens_type", "performer")}
    return _Sizes(attributes, [(1, channels, 2 * stride, 2 * stride), (1, channels, side, side)])


def _lanl_sizes(module, windows):
    channels = _channels(_first_width(module, "transformer1", ("attn.qkv",)), windows[0])
    stride = prod(win.stride[0] for win in windows)
    return _Sizes({}, [(1, channels, 2 * stride, 3 * stride)])


def _bare_unfold(module, path):
    """nn.Unfold named soft_split0, soft_split1, ... (others if include names them), of no module swapped as a whole"""
    if not isinstance(module, nn.Unfold):
        return None
    win = _window(module)
    caution = ""
    if not path.rpartition(".")[2].removeprefix("soft_split").isdigit():
        # Nothing tells that a transpose follows, and view() on what the fast form returns fails where it merges
        # the first two dimensions.
        caution = "its result would be a transposed view; if what follows takes any strides, name it in include"
    return Plan([Change(module, Unfold, {"window": win})], [(1, 2, win.kernel[0] + 3, win.kernel[1] + 2)], caution)


def _bare_fold(module, path):
    """nn.Fold, of any name"""
    if not isinstance(module, nn.Fold):
        return None
    win = _window(module)
    try:
        h, w = win.grid(*check_pair("swap", "output_size", module.output_size, minimum=1))
    except (TypeError, ValueError) as error:
        raise Mismatch(str(error)) from error
    if h < 1 or w < 1:
        raise Mismatch(f"its window {win} does not fit into its output_size {module.output_size}")
    return Plan([Change(module, Fold, {"window": win})], [(1, 2 * win.taps, h * w)])


RULES = (
    _module_of(T2TModule, "attention1", "attention2", _official_sizes),
    _module_of(lanl.Tokens2Token, "transformer1", "transformer2", _lanl_sizes),
    _token_performer,
    _token_transformer,
    _lanl_token_transformer,
)


def match(module, path):
    """The :class:`Plan` of the first rule that fits, or ``None``; may raise :class:`Mismatch`."""
    plans = (plan for rule in RULES if (plan := rule(module)) is not None)
    return next(plans, None) or _bare_unfold(module, path) or _bare_fold(module, path)


LOOKED_FOR = [
    "T2T_module: soft_split0..2 (nn.Unfold), attention1, attention2, project (nn.Linear)",
    "Tokens2Token: soft_split0..2 (nn.Unfold), transformer1, transformer2, project (nn.Linear)",
    f"Token_performer: {_token_performer.__doc__}",
    f"Token_transformer: {_token_transformer.__doc__}",
    f"TokenTransformer: {_lanl_token_transformer.__doc__}",
    f"nn.Unfold: {_bare_unfold.__doc__}",
    f"nn.Fold: {_bare_fold.__doc__}",
]

FAST = (T2TModule, lanl.Tokens2Token, TokenPerformer, TokenTransformer, Unfold, Fold)
"""Classes that a swapped (or natively fast) module has; ``lanl.TokenTransformer`` is a ``TokenTransformer``."""

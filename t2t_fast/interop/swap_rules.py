"""What ``swap`` looks for: upstream's modules by structure (children, attributes, shapes), never by their class.

A rule takes a module and returns ``None`` (no match), a :class:`Plan`, or raises :class:`Mismatch` with the reason why
something that looks like a match cannot be swapped.
"""

import dis
import inspect
from math import isqrt, prod
from types import CodeType
from typing import NamedTuple

from torch import nn

from ..errors import check_pair
from ..functional import window
from ..models import lanl
from ..modules import Fold, T2TModule, TokenPerformer, TokenTransformer, Unfold
from ..modules.token_transformer import Mlp, TokenAttention
from .swap_classes import argument_of, collisions
from .swap_proof import Mismatch, Template


class Change(NamedTuple):
    """One module's class to be changed: see :func:`swap_classes.swapped_class`."""

    module: nn.Module
    kind: type
    argument: str | None = None
    hidden: tuple[str, ...] = ()
    template: Template | None = None


class Plan(NamedTuple):
    """A match: the changes it takes (the module itself last), shapes of inputs to prove it with.

    Attributes:
        reason: why the module itself stays as it is; then there are no changes.
        fused: path of a child that is not called any more -> path of the child that does its work.
        parts: changes of children to make where the module itself stays.
        caution: why the module is swapped only if a pattern of ``include`` matches its own path.
    """

    changes: list[Change]
    probes: list[tuple[int, ...]]
    reason: str = ""
    fused: tuple[tuple[str, str], ...] = ()
    parts: tuple[Change, ...] = ()
    caution: str = ""


_BARE = frozenset(nn.Module().__dict__)
_YIELDING = {"num_patches", "grid_size", "img_size", "tokens_type"}
"""Names of a fast class that an instance's own attributes may hide."""


def _change(module, kind, *, parameters=(), children=(), attributes=()):
    """The change of ``module`` into ``kind``, if the fast form leaves out nothing that the module has.

    Args:
        parameters, children: names that it may have directly; attributes: of those that its forward may read.
    """
    extra = [name for held in (module._parameters, module._buffers) for name in held if name not in parameters]
    if extra:
        raise Mismatch(f"{type(module).__name__} has {', '.join(extra)}, which the fast form does not have")
    extra = [name for name in module._modules if name not in children]
    if extra:
        raise Mismatch(f"{type(module).__name__} has the child {', '.join(extra)}, which the fast form does not call")
    names, stored = _names_in_forward(type(module))
    known = {*parameters, *children, *attributes, "training"}
    if stored - known:
        raise Mismatch(f"its forward stores {', '.join(sorted(stored - known))}, which the fast form does not")
    data = set(vars(module)) - _BARE | {name for cls in _own_classes(type(module)) for name in _data(cls)}
    if unknown := sorted(names & data - known):
        raise Mismatch(f"its forward reads {', '.join(unknown)}, which the fast form does not")
    taken = collisions(module, kind)
    if clash := sorted(taken - _YIELDING):
        raise Mismatch(f"it has {', '.join(clash)} of its own, which the fast form has too")
    hidden = tuple(sorted(name for name in taken if isinstance(getattr(kind, name), property)))
    return Change(module, kind, _argument(module, kind), hidden)


def _own_classes(cls):
    return [each for each in cls.__mro__ if not each.__module__.startswith("torch.nn") and each is not object]


def _data(cls):
    """Names of class attributes that are neither methods nor descriptors."""
    for name, value in vars(cls).items():
        if not name.startswith("__") and not callable(value) and not hasattr(value, "__get__"):
            yield name


def _names_in_forward(cls):
    """Attribute names in the code of ``forward`` and of the methods that it names, and those that it stores."""
    if _code(cls.forward) is None:
        raise Mismatch(f"its forward is a {type(cls.forward).__name__}, not Python code that can be read")
    names, stored, waiting, seen = set(), set(), ["forward"], set()
    while waiting:
        name = waiting.pop()
        codes = {_code(vars(each).get(name)) for each in _own_classes(cls)} - seen - {None}
        seen |= codes
        for part in (part for code in codes for part in _parts(code)):
            waiting += set(part.co_names) - names
            names.update(part.co_names)
            stored.update(step.argval for step in dis.get_instructions(part) if step.opname == "STORE_ATTR")
    return names, stored


def _code(value):
    """The code of a method, property, class or static method, inside any ``functools.wraps``; else ``None``."""
    value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    while hasattr(value, "__wrapped__"):
        value = value.__wrapped__
    return getattr(value, "__code__", None)


def _parts(code):
    """A code object and those of the functions and comprehensions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _parts(constant)


def _argument(module, kind):
    """The name of ``forward``'s only argument, if it is not that of the fast one."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if len(parameters) != 1 or parameters[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        raise Mismatch(f"its forward takes ({', '.join(map(str, parameters))}), the fast one an input alone")
    return None if parameters[0].name == argument_of(kind) else parameters[0].name


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
    if getattr(module, "m", module.w.shape[0]) != module.w.shape[0]:
        raise Mismatch(f"m is {module.m}, but w has {module.w.shape[0]} random features")
    change = _change(
        module,
        TokenPerformer,
        parameters=("w",),
        children=("kqv", "dp", "proj", "norm1", "norm2", "mlp"),
        attributes=("emb", "m", "head_cnt", "epsilon"),
    )
    return Plan([change], [(2, 7, module.kqv.in_features)])


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
    changes = [
        _change(
            attn,
            TokenAttention,
            children=("qkv", "attn_drop", "proj", "proj_drop"),
            attributes=("num_heads", "in_dim", "scale"),
        ),
        _change(module.mlp, Mlp, children=("fc1", "act", "fc2", "drop")),
        _change(module, TokenTransformer, children=("norm1", "attn", "drop_path", "norm2", "mlp")),
    ]
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
    changes = [
        _change(
            attn,
            lanl.Attention,
            children=("qkv", "proj"),
            attributes=("num_heads", "chan", "head_dim", "scale"),
        ),
        _change(module.neuralnet, lanl.NeuralNet, children=("fc1", "act", "fc2")),
        _change(module, lanl.TokenTransformer, children=("norm1", "attn", "norm2", "neuralnet")),
    ]
    return Plan(changes, [(2, 7, attn.qkv.in_features)])


SPLITS = ("soft_split0", "soft_split1", "soft_split2")


def _module_of(kind, first, second, attributes, linear_names):
    """A whole tokens-to-token module: three unfolds ``soft_split0..2``, two token layers, a Linear ``project``."""

    def fits(module):
        splits = [getattr(module, name, None) for name in SPLITS]
        layers = [getattr(module, name, None) for name in (first, second)]
        project = getattr(module, "project", None)
        if not all(isinstance(split, nn.Unfold) for split in splits) or not isinstance(project, nn.Linear):
            return None
        if not all(isinstance(layer, nn.Module) for layer in layers):
            return None
        windows = [_window(split) for split in splits]
        probes = _probes(module, first, linear_names, windows)
        parts = tuple(_change(split, Unfold) for split in splits if type(split).forward is nn.Unfold.forward)
        try:
            whole = [_change(module, kind, children=(*SPLITS, first, second, "project"), attributes=attributes)]
        except Mismatch as mismatch:
            return Plan([], probes, str(mismatch), parts=parts)
        fused = tuple(zip(SPLITS, (first, second, "project"), strict=True))
        return Plan(whole, probes, fused=fused, parts=parts)

    return fits


def _probes(module, layer_name, linear_names, windows):
    """Images of two sizes, and of the size that the module says it is for."""
    layer = getattr(module, layer_name)
    widths = [linear.in_features for name in linear_names if (linear := _submodule(layer, name)) is not None]
    if not widths:
        raise Mismatch(f"{layer_name} is {type(layer).__name__}, whose input width is unknown")
    if widths[0] % windows[0].taps:
        raise Mismatch(
            f"the first layer's width {widths[0]} is not a multiple of its window's {windows[0].taps} pixels"
        )
    channels, stride = widths[0] // windows[0].taps, prod(win.stride[0] for win in windows)
    patches = getattr(module, "num_patches", 4)
    sides = [
        2 * stride,
        3 * stride,
        stride * isqrt(patches) if isinstance(patches, int) and patches > 0 else 2 * stride,
    ]
    return [(2, channels, side, side) for side in dict.fromkeys(sides)]


def _submodule(module, path):
    try:
        found = module.get_submodule(path)
    except AttributeError:
        return None
    return found if hasattr(found, "in_features") else None


def _bare_unfold(module):
    """nn.Unfold that include names, and soft_split0..2 of a T2T module that cannot be swapped as a whole"""
    if not isinstance(module, nn.Unfold):
        return None
    win = _window(module)
    caution = (
        "its result would be a transposed view, which view() refuses where it merges the first two dimensions; if what "
        "follows takes any strides, name it in include"
    )
    return Plan([_change(module, Unfold)], [(1, 2, win.kernel[0] + 3, win.kernel[1] + 2)], caution=caution)


def _bare_fold(module):
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
    return Plan([_change(module, Fold)], [(1, 2 * win.taps, h * w)])


RULES = (
    _module_of(T2TModule, "attention1", "attention2", ("num_patches", "tokens_type"), ("kqv", "attn.qkv")),
    _module_of(
        lanl.Tokens2Token,
        "transformer1",
        "transformer2",
        # kernels, strides and paddings are those of the unfolds
        ("token_chan", "windows", "num_tokens", *(f"{letter}{index}" for letter in "ksp" for index in range(3))),
        ("attn.qkv",),
    ),
    _token_performer,
    _token_transformer,
    _lanl_token_transformer,
    _bare_unfold,
    _bare_fold,
)


def match(module):
    """The :class:`Plan` of the first rule that fits, or ``None``; may raise :class:`Mismatch`."""
    try:
        return next((plan for rule in RULES if (plan := rule(module)) is not None), None)
    except Mismatch:
        raise
    except Exception as error:  # a property or __getattr__ of somebody else's may raise anything
        raise Mismatch(f"it could not be examined: {type(error).__name__}: {error}") from error


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

"""The check before every fusion: a module skips the calls of its children only if that is not observable.

A fused operator reads the parameters of child modules and does not call them. This requires that each skipped child is
a plain layer: an instance of the expected class with that class's ``forward``, without hooks, and with plain dense
tensors that the operator can read. Otherwise (a hook, a replaced ``forward``, a subclass, an adapter, a quantised
layer, a wrapper) the layer runs child by child, as upstream does, which is only slower.

Only properties of classes are cached between calls, so every change takes effect at the next call. :func:`children`
takes about half a microsecond per child; the parameters are compared with those of earlier calls (``remembered.py``).
"""

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as _registry
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import FLOATING
from .drop_path import DropPath

Check: TypeAlias = Callable[[Any], str | None]
"""Function of a child module: why the child cannot be skipped, for a message, or ``None``."""

_CALLS = ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__")
_BARE = frozenset(nn.Module().__dict__)
"""Names in the ``__dict__`` of a module without any state."""


def watched() -> bool:
    """Whether a hook is registered for all modules of the process."""
    return bool(
        _registry._global_forward_hooks
        or _registry._global_forward_pre_hooks
        or _registry._global_backward_hooks
        or _registry._global_backward_pre_hooks
    )


def _name(cls: type, expected: type) -> str:
    """The name of a class for a message; qualified if it equals the name of the expected class."""
    return cls.__name__ if cls.__name__ != expected.__name__ else f"{cls.__module__}.{cls.__qualname__}"


def difference(child: Any, kind: type[nn.Module]) -> str | None:
    """How a call of ``child`` differs from ``kind.forward``, for a message, or ``None``."""
    cls = type(child)
    if cls is not kind:
        if child is None or not isinstance(child, kind) or cls.forward is not kind.forward:
            return "is missing" if child is None else f"is {_name(cls, kind)}"
        if any(getattr(cls, name) is not getattr(nn.Module, name) for name in _CALLS):
            return f"is {_name(cls, kind)}"
    state = child.__dict__
    modules = state["_modules"]
    if "parametrizations" in modules:
        return "is parametrised"
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return "has hooks"
    if "forward" in state or "__call__" in state or "_call_impl" in state or "_wrapped_call_impl" in state:
        return "overrides forward"
    if state.get("_compiled_call_impl") is not None:
        return "is compiled"
    return None


def linear(child: Any) -> str | None:
    return difference(child, nn.Linear)


def layer_norm(child: Any) -> str | None:
    """``nn.LayerNorm`` over one axis, or a subclass that computes the same (timm has one)."""
    why = difference(child, nn.LayerNorm)
    if why is not None and isinstance(child, nn.LayerNorm) and difference(child, type(child)) is None:
        why = None if _behaves(type(child), child, _is_layer_norm) else why
    if why is None and len(child.normalized_shape) != 1:
        return f"normalises {len(child.normalized_shape)} dimensions"
    return why


def dropout(child: Any) -> str | None:
    """A dropout that an operator can apply; ``nn.Identity`` is one with probability 0."""
    if type(child) is nn.Identity:
        return difference(child, nn.Identity)
    why = difference(child, nn.Dropout)
    if why is None and child.training and child.p >= 1:
        return "drops everything"
    return why


def no_dropout(child: Any) -> str | None:
    """A dropout without effect in the current mode."""
    why = dropout(child)
    return "is active" if why is None and rate(child) > 0 else why


def no_drop_path(child: Any) -> str | None:
    """Stochastic depth without effect in the current mode."""
    why = drop_path(child)
    return "is active" if why is None and rate(child) > 0 else why


def drop_path(child: Any) -> str | None:
    """Stochastic depth, or ``nn.Identity``; also another project's class that does the same with ``drop_prob``."""
    if type(child) is nn.Identity:
        return difference(child, nn.Identity)
    why = difference(child, DropPath)
    if why is not None and isinstance(child, nn.Module) and difference(child, type(child)) is None:
        why = None if _behaves(type(child), child, _is_drop_path) else why
    return why


def channel_factors(child: Any) -> str | None:
    """A factor for each channel, stored as a depthwise ``nn.Conv1d`` with one tap and no bias."""
    why = difference(child, nn.Conv1d)
    if why is None and (child.weight.shape != (child.in_channels, 1, 1) or child.bias is not None):
        return "is no factor for each channel"
    return why


def idle(child: Any) -> str | None:
    """A child without effect: absent, or ``nn.Identity``."""
    return None if child is None else difference(child, nn.Identity)


def softmax(child: Any) -> str | None:
    """``nn.Softmax`` over the last axis."""
    why = difference(child, nn.Softmax)
    return f"is a softmax over axis {child.dim}" if why is None and child.dim != -1 else why


def gelu(child: Any) -> str | None:
    """Exact GELU: ``nn.GELU``, or a class without state that computes the same."""
    if isinstance(child, nn.GELU):
        why = difference(child, nn.GELU)
        return f"is GELU(approximate={child.approximate!r})" if why is None and child.approximate != "none" else why
    if not isinstance(child, nn.Module):
        return "is missing" if child is None else f"is {type(child).__name__}"
    why = difference(child, type(child))
    if why is None and not (_BARE.issuperset(child.__dict__) and not child._modules and _is_exact_gelu(type(child))):
        return f"is {_name(type(child), nn.GELU)}"
    return why


_known: WeakKeyDictionary[type, bool] = WeakKeyDictionary()


def _is_exact_gelu(cls: type) -> bool:
    """Whether modules of a class without state compute GELU."""
    return _behaves(cls, None, _is_gelu)


def _behaves(cls: Any, child: Any, test: Callable[[Any], bool]) -> bool:
    """Whether a module of a foreign class does what ``test`` tests, on a copy of its attributes; once per class."""
    if cls not in _known:
        module: Any = cls.__new__(cls)
        nn.Module.__init__(module)
        if child is not None:
            module.__dict__.update({name: value for name, value in child.__dict__.items() if name not in _BARE})
        with _disable_current_modes(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            try:
                _known[cls] = test(module)
            except Exception:  # noqa: BLE001 - foreign code, on an input that it may not expect
                _known[cls] = False
    return _known[cls]


_behaves._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_gelu(module: Any) -> bool:
    return _agrees(module, (3, 9, 37), F.gelu)


def _is_layer_norm(module: Any) -> bool:
    width = 37
    module.normalized_shape = (width,)
    for name, value in (("weight", torch.linspace(-1, 2, width)), ("bias", torch.linspace(1, -1, width))):
        module._parameters[name] = value.cpu()

    def expected(x: torch.Tensor) -> torch.Tensor:
        weight, bias = (module._parameters[name].to(x.dtype) for name in ("weight", "bias"))
        return F.layer_norm(x, (width,), weight, bias, module.eps)

    return _agrees(module, (3, 9, width), expected)


def _agrees(module: Any, shape: tuple[int, ...], expected: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether a module computes a function of one tensor, in two dtypes and both modes."""
    for dtype in (torch.float32, torch.float64):
        x = torch.linspace(-9, 9, 999, dtype=dtype, device="cpu").view(shape)
        module.to(dtype)
        for training in (False, True):
            y = module.train(training)(x.clone())
            if not isinstance(y, torch.Tensor) or y.dtype != dtype or y.shape != x.shape:
                return False
            if not torch.allclose(y, expected(x), rtol=1e-6, atol=1e-6):
                return False
    return True


def _is_drop_path(module: Any) -> bool:
    """Whether a module is the identity in eval mode, and in training drops half of the samples and doubles the others
    with ``drop_prob`` 0.5."""
    if module._parameters or module._buffers or module._modules or not hasattr(module, "drop_prob"):
        return False
    module.drop_prob = 0.5
    x = torch.ones(4096, 3, 2, device="cpu")
    if not torch.equal(module.eval()(x.clone()), x):
        return False
    y = module.train()(x.clone())
    kept = y[:, 0, 0]
    uniform = torch.equal(y, kept.view(-1, 1, 1).expand_as(y))
    return uniform and set(kept.tolist()) == {0.0, 2.0} and abs(kept.mean().item() - 1.0) < 0.1  # 6 deviations


ORIGINAL = "_t2t_fast_original"
"""Attribute of a swapped module's class: the class that the module had before (``interop/swap/classes.py``)."""


def holder(kind: type[nn.Module], names: Collection[str]) -> Check:
    """A child that was of class ``kind`` before any swap, has no other children than the named ones, and no hooks."""

    def check(child: Any) -> str | None:
        cls = type(child)
        why = difference(child, cls) if vars(cls).get(ORIGINAL, cls) is kind else difference(child, kind)
        if why is None:
            others = [name for name, each in child._modules.items() if each is not None and name not in names]
            return f"has the child {', '.join(others)}" if others else None
        return why

    return check


def rate(child: Any) -> float:
    """The current probability of a dropout or stochastic depth that the checks accept: 0 in eval mode."""
    if not child.training or type(child) is nn.Identity:
        return 0.0
    return child.p if isinstance(child, nn.Dropout) else child.drop_prob or 0.0


def weights(child: Any) -> tuple[Any, Any]:
    """``child.weight, child.bias`` of a Linear or LayerNorm that passed its check."""
    own = child._parameters
    if "weight" in own and "bias" in own:  # faster than the attributes
        return own["weight"], own["bias"]
    return child.weight, child.bias


_FAKES = ("torch._subclasses.fake_tensor.FakeTensor", "torch._subclasses.functional_tensor.FunctionalTensor")


def _is_fake(cls: type) -> bool:
    """Whether a tensor class is one of PyTorch's stand-ins for plain tensors during tracing."""
    for path in _FAKES:
        module, _, name = path.rpartition(".")
        if cls is getattr(sys.modules.get(module), name, None):
            return True
    return False


def _unreadable(tensor: torch.Tensor, first: torch.Tensor, dtypes: Sequence[torch.dtype]) -> str | None:
    """Why an operator that reads ``first`` cannot also read ``tensor``, for a message, or ``None``."""
    cls = type(tensor)
    if cls is not nn.Parameter and cls is not torch.Tensor and not _is_fake(cls):
        return f"is a {cls.__name__}"
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        return "is not dense"
    if tensor.dtype not in FLOATING or tensor.dtype not in dtypes:
        return f"is {tensor.dtype}, the layer's first parameter {first.dtype}"
    if tensor.is_meta:
        return "is on the meta device"
    if tensor.device != first.device:
        return f"is on {tensor.device}, the layer's first parameter on {first.device}"
    return None


def unreadable(module: nn.Module, first: torch.Tensor | None = None, *allowed: torch.dtype) -> str | None:
    """Why an operator cannot read a module's own parameters, for a message, or ``None``.

    Args:
        first: a parameter whose device and dtype they must share; by default the module's first.
        allowed: other dtypes that are accepted.
    """
    for name, tensor in module._parameters.items():
        if tensor is not None:
            first = tensor if first is None else first
            why = _unreadable(tensor, first, (first.dtype, *allowed))
            if why is not None:
                return f"{name} {why}"
    return None


class Checks(dict[str, Check]):
    """Dotted path of a child that would be skipped -> its check; a parent comes before its children.

    Attributes:
        places: path, the parent's path, name and check of each.
    """

    def __init__(self, parts: Mapping[str, Check]) -> None:
        super().__init__(parts)
        self.places = [(path, *path.rpartition(".")[::2], check) for path, check in parts.items()]


def children(layer: nn.Module, parts: Checks) -> dict[str, Any] | None:
    """Path -> child for each of ``parts`` (and "" -> ``layer``) if all pass their checks, else ``None``.

    Unlike :func:`obstacle`, it does not look at parameters: those of a remembered call (``remembered.py``) have the
    properties of others that passed.
    """
    if watched():
        return None
    found: dict[str, Any] = {"": layer}
    for path, parent, name, check in parts.places:
        child = found[path] = found[parent]._modules.get(name)
        if check(child) is not None:
            return None
    return found


def obstacle(layer: nn.Module, parts: Checks) -> str | None:
    """Why ``layer`` must call its children one by one, for a message, or ``None``.

    Args:
        layer: a module.
        parts: the children that would be skipped. Their parameters must have one dtype; the layer's own may be
            float32.
    """
    if watched():
        return "a hook is registered for all modules"
    modules: dict[str, Any] = {"": layer}
    first: torch.Tensor | None = None
    for path, parent, name, check in parts.places:
        child = modules[path] = modules[parent]._modules.get(name)
        why = check(child)
        if why is not None:
            return f"{path} {why}"
        if child is None:
            continue
        if first is None:
            first = next((t for t in child._parameters.values() if t is not None), None)
        why = unreadable(child, first)
        if why is not None:
            return f"{path}.{why}"
    return unreadable(layer, first, torch.float32)


def values_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a module's input: that of its first floating parameter, else float32."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)

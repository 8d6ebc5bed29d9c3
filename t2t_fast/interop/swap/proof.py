"""The proof of a swap: a twin of the module gives the same results and gradients before and after.

The twin has the module's structure and attributes and perturbed values: the effect of a parameter that is 0 (a gate
before training, LayerScale) or of an initial running statistic would not show. It is on the CPU, in float64 if the
original runs in it, has no hooks, and is called in eval and in training mode with all dropout off. The model itself,
the random state and the settings of the process are not changed.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...backends import backend
from ...modules.block import Fused
from ...modules.windowed import Windowed
from .classes import swapped_class
from .match import Change
from .template import Mismatch, Template, recognised

_BARE = frozenset(nn.Module().__dict__)

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest relative difference between a module and its fast form, in results and in each gradient."""


def prove(
    module: nn.Module,
    changes: Sequence[Change],
    probes: Iterable[tuple[int, ...]],
    arguments: tuple[Any, ...] = (),
) -> Template | None:
    """Raise :class:`Mismatch` unless a twin of ``module`` computes the same before and after ``changes``.

    Args:
        changes: [:class:`match.Change`] of ``module`` and of modules inside it.
        probes: input shapes; the first one on which the original runs is used.
        arguments: further arguments of its ``forward``.

    Returns:
        a :class:`Template` if the original returns a structure of tensors and sizes; ``None`` if a tensor.
    """
    try:
        with _neutral():
            x, expected, original = _original(module, probes, arguments)
            template = None
            if not isinstance(original, torch.Tensor) and changes[-1].module is module:
                template = _template(module, changes, x, original)
            fast = _swapped_twin(module, changes, x.dtype, template)
            if isinstance(fast, (Fused, Windowed)) and (why := fast.obstacle()) is not None:
                raise Mismatch(why)  # it would run its own forward, and the comparison would show nothing
            found = _fast_results(fast, x, arguments)
            if template is not None:
                _check_sizes(module, fast, probes, x.dtype)
            _compare(found, expected, TOLERANCE[x.dtype])
    except Mismatch:
        raise
    except Exception as error:  # code, classes and attributes of another project
        raise Mismatch(f"it cannot be tried out on a copy: {_words(error)}") from error
    return template


_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_NEUTRAL = ("p", "drop_prob", "training")
"""Attributes that a proof sets itself."""


def signature(module: nn.Module, changes: Sequence[Change]) -> Hashable | None:
    """What a proof of some changes depends on, other than values of tensors; ``None`` if that is not known.

    Equal for the blocks of a backbone, of which one proof is then enough.
    """
    forms = {id(change.module): change[1:] for change in changes}
    found: list[Hashable] = []
    for path, each in module.named_modules():
        plain: list[Hashable] = []
        for name, value in each.__dict__.items():
            if name in _BARE or name in _NEUTRAL:
                continue
            try:
                plain.append((name, _plain_values(value)))
            except TypeError:
                return None
        tensors = [
            (name, t.shape, t.dtype, t.device.type, t.requires_grad, type(t), t.layout)
            for held in (each._parameters, each._buffers)
            for name, t in held.items()
            if t is not None
        ]
        found.append((path, type(each), tuple(plain), tuple(tensors), forms.get(id(each))))
    return tuple(found)


def _plain_values(value):
    """A value of plain numbers and texts, also in containers, as a hashable one; ``TypeError`` for any other."""
    if isinstance(value, dict):
        return tuple((name, _plain_values(item)) for name, item in value.items())
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain_values, value))
    if not isinstance(value, _PLAIN):
        raise TypeError
    return value


def _fast_results(twin, x, arguments):
    try:
        return _evaluate(twin, x, arguments)[0]
    except Mismatch:
        raise
    except Exception as error:
        raise Mismatch(f"the fast form does not run on a probe: {_words(error)}") from error


def _words(error):
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' + lines[0][:200] if lines else ''}"


@contextmanager
def _neutral():
    """Settings that do not depend on the caller's: CPU, gradients, no autocast, the reference backend."""
    with (
        torch.device("cpu"),
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        backend("reference"),
    ):
        torch.default_generator.manual_seed(0)  # of the CPU only, which fork_rng restores
        yield


def _original(module, probes, arguments):
    """The first probe on which the original runs, in float64 if it can, its evaluation, and its result."""
    failures = []
    for dtype in TOLERANCE:
        twin = _twin(module, dtype)
        for shape in probes:
            x = torch.randn(shape, dtype=dtype)
            try:
                return x, *_evaluate(twin, x, arguments)
            except Mismatch:
                raise
            except Exception as error:  # noqa: BLE001 - a forward of another project may raise anything
                failures.append(f"{' x '.join(map(str, shape))} ({_words(error)})")
    failures = failures[: len(probes)]
    raise Mismatch(f"the original does not run on a probe of {', nor of '.join(failures)}")


def _twin(module, dtype):
    """A copy of ``module`` on the CPU with perturbed values in ``dtype`` and without hooks."""
    generator = torch.Generator("cpu").manual_seed(0)
    for each in module.modules():
        if "forward" in each.__dict__:
            raise Mismatch(f"{_path(module, each)}forward is replaced on the instance")
    try:
        return copied(module, lambda tensor: _perturbed(tensor, dtype, generator), hooks=False)
    except Mismatch:
        raise
    except Exception as error:
        raise Mismatch(f"it cannot be copied, so nothing can be proved: {_words(error)}") from error


def copied(module: nn.Module, replaced: Callable[[torch.Tensor], torch.Tensor], hooks: bool = True) -> nn.Module:
    """A deep copy of a module, even if it holds results of autograd, which ``copy.deepcopy`` refuses.

    Args:
        replaced: function of a tensor that returns its replacement in the copy.
        hooks: whether hooks are copied.
    """
    memo: dict[int, Any] = {}
    kept: list[torch.Tensor] = []
    for each in module.modules():
        for name, value in each.__dict__.items():
            if not hooks and isinstance(value, dict) and "_hooks" in name:
                memo[id(value)] = OrderedDict()
            for tensor in _tensors(value):
                if id(tensor) not in memo:
                    kept.append(tensor)  # keeps the id from being used again
                    memo[id(tensor)] = replaced(tensor)
    return copy.deepcopy(module, memo)


def _path(module, inner):
    path = next((path for path, each in module.named_modules() if each is inner), "")
    return f"{path}." if path else "its "


def _tensors(value):
    """The tensors in a value, also inside containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _tensors(item)


def _perturbed(tensor, dtype, generator):
    """``tensor`` in ``dtype`` with noise added to its values."""
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        name = type(tensor).__name__
        hint = "; swap before fully_shard and parallelize_module" if name == "DTensor" else ""
        raise Mismatch(f"it holds a {name}, which no copy on a CPU stands for{hint}")
    if tensor.is_meta:
        raise Mismatch("its parameters are on the meta device, so the fast form could not be proved equal")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        raise Mismatch("it holds a tensor that is not dense")
    value = tensor.detach().to("cpu", copy=True)
    if value.is_floating_point():
        value = value.to(dtype).nan_to_num()
        noise = torch.randn(value.shape, generator=generator, dtype=dtype, device="cpu")
        positive = value.numel() > 0 and bool((value >= 0).all())
        spread = value.std().item() if value.numel() > 1 else 0.0
        value = value + noise * (0.02 + 0.1 * spread)
        value = value.abs() if positive else value  # a variance stays positive
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(value, requires_grad=value.is_floating_point())
    return value


def _swapped_twin(module, changes, dtype, template):
    """A twin whose modules have their new classes."""
    twin = _twin(module, dtype)
    twins = dict(zip(map(id, module.modules()), twin.modules(), strict=True))
    for change in changes:
        own = template if change.module is module else change.template
        apply(change._replace(module=twins[id(change.module)], template=own))
    return twin


def apply(change: Change) -> None:
    """Give a module its new class."""
    module = change.module
    original: Any = type(module)
    kind: Any = change.form.kind
    module.__class__ = swapped_class(original, kind, change.names, change.template, change.hidden, change.containers)


def _evaluate(twin, x, arguments):
    """Results and gradients in eval and in training mode, [(name, tensor)], and the value of the first call."""
    for each in twin.modules():
        for name in ("p", "drop_prob"):
            if isinstance(each.__dict__.get(name), (int, float)):
                setattr(each, name, 0.0)
    rows, first = [], None
    for mode in ("eval", "training"):
        twin.train(mode == "training")
        twin.zero_grad(set_to_none=True)
        given = x.clone().requires_grad_()
        returned = twin(given.clone(), *arguments)  # not a leaf, so that it may be changed in place
        first = returned if first is None else first
        results = list(_tensors(returned))
        if not results:
            raise Mismatch(f"the original returns a {type(returned).__name__} without tensors")
        rows += [(f"in {mode} mode its result", result.detach().clone()) for result in results]
        weights = [torch.linspace(-1, 1, result.numel(), dtype=x.dtype).view(result.shape) for result in results]
        if not all(result.requires_grad for result in results):
            raise Mismatch(f"in {mode} mode its result has no gradient")
        sum((result * weight).sum() for result, weight in zip(results, weights, strict=True)).backward()
        rows.append((f"in {mode} mode the gradient of its input", given.grad))
        rows += [(f"in {mode} mode the gradient of {name}", p.grad) for name, p in twin.named_parameters()]
    return rows, first


def _compare(found, expected, tolerance):
    if [name for name, _ in found] != [name for name, _ in expected]:
        raise Mismatch("the fast form returns another number of tensors")
    gradients = [value.norm() for name, value in expected if value is not None and "gradient" in name]
    floor = 1e-3 * max(gradients).item()
    for (name, ours), (_, theirs) in zip(found, expected, strict=True):
        if ours is None and theirs is None:
            continue
        ours = torch.zeros_like(theirs) if ours is None else ours
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        if ours.shape != theirs.shape:
            raise Mismatch(f"{name} on a probe has the shape {tuple(theirs.shape)}, not {tuple(ours.shape)}")
        scale = max(theirs.norm().item(), floor if "gradient" in name else 0.0, 1e-12)
        error = (ours - theirs).norm().item() / scale
        if not error <= tolerance:
            raise Mismatch(
                f"its forward computes something else: on a probe the results differ by {error:.1e} ({name})"
            )


def _check_sizes(module, fast, probes, dtype):
    """Raise unless the original and its fast twin return the same sizes for every probe that the original runs on."""
    twin = _twin(module, dtype)
    twin.eval()  # not chained: train() may return None
    fast.eval()
    for shape in probes:
        x = torch.randn(shape, dtype=dtype)
        try:
            theirs = twin(x)
        except Exception:  # noqa: BLE001 - a size that the original does not accept
            continue
        if list(_sizes(theirs)) != list(_sizes(fast(x))):
            raise Mismatch("the sizes that it returns do not follow from its stages")


def _sizes(value):
    """The sizes in what a module returns, including those of tensors."""
    if isinstance(value, torch.Tensor):
        yield tuple(value.shape)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _sizes(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _sizes(item)
    else:
        yield value


def _template(module, changes, x, returned):
    """The template of a structure that the original returned for ``x``, from the stages of the fast twin."""
    *_, outer = changes
    if not hasattr(outer.form.kind, "_stages"):
        raise Mismatch(f"the original returns a {type(returned).__name__}, not a tensor")
    twin = _swapped_twin(module, changes, x.dtype, None)
    twin.eval()
    with torch.no_grad():
        stages = outer.form.kind._stages(twin, x)
    return recognised(returned, x, stages)

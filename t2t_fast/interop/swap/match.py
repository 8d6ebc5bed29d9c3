"""The changes that a rule makes to a module, or the reason why the module cannot be swapped."""

from __future__ import annotations

import dis
import inspect
from types import CodeType
from typing import Any, NamedTuple

from torch import nn

from ...models.family import Form, Rule
from ...modules import Fold, Unfold
from .classes import arguments_of, collisions, original_class
from .rules import RULES
from .template import Mismatch, Template

_BARE = frozenset(nn.Module().__dict__)
_SPLITS: dict[Any, type[nn.Module]] = {nn.Unfold.forward: Unfold, nn.Fold.forward: Fold}
"""``forward`` of a child that can be swapped alone, and its fast class."""
_YIELDING = {"num_patches", "grid_size", "img_size", "tokens_type"}
"""Names defined by fast classes that attributes of an instance may hide."""


class Change(NamedTuple):
    """The new class of one module: see :func:`classes.swapped_class`."""

    module: nn.Module
    form: Form
    names: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    template: Template | None = None
    containers: tuple[tuple[str, type], ...] = ()


class Plan(NamedTuple):
    """A match: the rule, the changes (the module itself last), input shapes and further arguments for the proof.

    Attributes:
        reason: why the module itself cannot be swapped; then there are no changes.
        parts: changes of children to make if the module itself cannot be swapped.
    """

    rule: Rule
    changes: list[Change]
    probes: list[tuple[int, ...]]
    reason: str = ""
    parts: tuple[Change, ...] = ()
    arguments: tuple[Any, ...] = ()


def match(module: nn.Module) -> list[Plan]:
    """A :class:`Plan` for each rule that fits and whose form the module can get, in the order of the rules.

    No rule fits a wrapper: its child is the candidate.

    Raises:
        Mismatch: rules fit, and the module cannot be swapped by any of them; the reason is the first one's.
    """
    if _is_wrapper(module):
        return []
    plans: list[Plan] = []
    reasons: list[Mismatch] = []
    try:
        for rule in RULES:
            if rule.matches(module):
                try:
                    plans.append(_plan(rule, module))
                except Mismatch as mismatch:
                    reasons.append(mismatch)
    except Exception as error:  # a property or __getattr__ of another project may raise anything
        raise Mismatch(f"it could not be examined: {type(error).__name__}: {error}") from error
    if reasons and not plans:
        raise reasons[0]
    return plans


def _is_wrapper(module):
    """Whether a module shows the attributes of its only child as its own, as PyTorch's ``CheckpointWrapper`` does."""
    return len(module._modules) == 1 and type(module).__getattr__ is not nn.Module.__getattr__


def _plan(rule, module):
    reason = rule.refusal(module)
    if reason is not None:
        raise Mismatch(reason)
    probes = rule.probes(module)
    splits = [getattr(module, name) for name in rule.soft_splits]
    kinds = [(split, _SPLITS.get(type(split).forward)) for split in splits]
    parts = tuple(_change(split, Form(kind)) for split, kind in kinds if kind is not None)
    arguments = rule.arguments(module)
    try:
        changes = [_change(getattr(module, name), form) for name, form in rule.inner.items()]
        changes.append(_change(module, rule.form)._replace(containers=_containers(rule, module)))
    except Mismatch as mismatch:
        if not rule.soft_splits:
            raise
        return Plan(rule, [], probes, str(mismatch), parts, arguments)
    return Plan(rule, changes, probes, parts=parts, arguments=arguments)


def _containers(rule, module):
    """Path and class of each container of a fused class; :class:`Mismatch` if it would ignore a part of one."""
    found = []
    for path, form in rule.containers.items():
        container = module.get_submodule(path)
        _check(container, form)
        found.append((path, original_class(container) or type(container)))
    return tuple(found)


def _change(module, form):
    """The change of ``module`` into ``form``; :class:`Mismatch` if the fast class would ignore a part of the module."""
    _check(module, form)
    taken = collisions(module, form.kind)
    if clash := sorted(taken - _YIELDING):
        raise Mismatch(f"it defines {', '.join(clash)}, which the fast form defines too")
    hidden = tuple(sorted(name for name in taken if isinstance(getattr(form.kind, name), property)))
    return Change(module, form, _names(module, form.kind), hidden)


def _check(module, form):
    """Raise :class:`Mismatch` if a module has parameters, children or attributes that its form does not have."""
    extra = [name for held in (module._parameters, module._buffers) for name in held if name not in form.parameters]
    if extra:
        raise Mismatch(f"{type(module).__name__} has {', '.join(extra)}, which the fast form does not have")
    extra = [name for name in module._modules if name not in form.children]
    if extra:
        raise Mismatch(f"{type(module).__name__} has the child {', '.join(extra)}, which the fast form does not call")
    names, stored = _names_in_forward(type(module))
    known = {*form.parameters, *form.children, *form.attributes, "training"}
    if stored - known:
        raise Mismatch(f"its forward stores {', '.join(sorted(stored - known))}, which the fast form does not")
    data = set(vars(module)) - _BARE | {name for cls in _own_classes(type(module)) for name in _data(cls)}
    if unknown := sorted(names & data - known):
        raise Mismatch(f"its forward reads {', '.join(unknown)}, which the fast form does not")


def _own_classes(cls):
    return [each for each in cls.__mro__ if not each.__module__.startswith("torch.nn") and each is not object]


def _data(cls):
    """Names of class attributes that are neither methods nor descriptors."""
    for name, value in vars(cls).items():
        if not name.startswith("__") and not callable(value) and not hasattr(value, "__get__"):
            yield name


def _names_in_forward(cls):
    """Attribute names that ``forward`` and the methods it names read, and those that they store; from bytecode."""
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
    """A code object and those of functions and comprehensions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _parts(constant)


def _names(module, kind):
    """The names of ``forward``'s arguments, empty if those of the fast one are the same."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    more = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(kind.forward).parameters.values())
    optional = [p for p in parameters[1:] if more and p.default is not p.empty]
    required = [p for p in parameters if p not in optional]
    own, names = arguments_of(kind), tuple(p.name for p in required)
    if len(required) != len(own) or any(p.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD for p in required):
        given = ", ".join(map(str, parameters))
        if len(own) == 1:
            raise Mismatch(f"its forward takes ({given}), the fast one an input alone")
        raise Mismatch(f"its forward takes ({given}), the fast one ({', '.join(own)})")
    return () if names == own else names

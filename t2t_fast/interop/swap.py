"""``swap``: the fast forms in place of upstream's modules, on the instances that a model holds.

A swap changes a module's class and nothing else: the object stays, and with it its parameters, hooks, training flag,
dtype, device and every reference to it (an optimizer's, a wrapper's); ``unswap`` gives the class back. This works
because the fast modules keep upstream's names of children and parameters. What is a T2T module is decided by
structure (children, attributes, shapes), never by importing the other project; and because structure cannot show what
a ``forward`` does, every match is proved on a copy with a small random input before anything is changed.
"""

import copy
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn

from ..backends import Request, resolve
from ..errors import BackendUnavailable, NothingToSwap
from ..models import lanl
from ..modules import Fold, TokenPerformer, Unfold
from .swap_rules import FAST, LOOKED_FOR, Change, Mismatch, match

_RECORD = "_t2t_fast_swapped"
_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, IndexError)
"""What a module's forward may raise on a probe that does not suit it."""

PROBE_TOLERANCE = 1e-3
"""Largest relative difference between a module and its fast form on the probe, in float32."""


class Row(NamedTuple):
    """One line of a report. ``target`` is empty where a module was left as it was, and ``reason`` says why."""

    path: str
    source: str
    target: str
    backend: str
    reason: str


@dataclass(frozen=True)
class SwapReport:
    """What was swapped (or would be, or came back) and what was left; ``str()`` is a table."""

    rows: tuple[Row, ...]
    done: str

    @property
    def swapped(self):
        """Paths of the modules that changed."""
        return [row.path for row in self.rows if row.target]

    @property
    def left(self):
        """Path -> reason of the candidates that did not change."""
        return {row.path: row.reason for row in self.rows if not row.target}

    def __str__(self):
        if not self.rows:
            return f"0 modules {self.done}"
        table = [("path", "from", "to", "backend", "reason")]
        for path, source, target, name, reason in self.rows:
            table.append((path or "(the model)", source, target or "-", name or "-", reason))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
        return "\n".join([*lines, f"{len(self.swapped)} modules {self.done}, {len(self.left)} left"])


def _apply(changes):
    """Change classes. A record of what to undo stays in each module's ``__dict__``, out of ``state_dict``."""
    for module, kind, attributes in changes:
        before = {name: module.__dict__[name] for name in attributes if name in module.__dict__}
        module.__dict__[_RECORD] = (type(module), before, tuple(attributes))
        module.__class__ = kind
        module.__dict__.update(attributes)


def _undo(module):
    original, before, names = module.__dict__.pop(_RECORD)
    for name in names:
        del module.__dict__[name]
    module.__dict__.update(before)
    module.__class__ = original
    return original


def _prove(module, plan, inner):
    """Raise :class:`Mismatch` unless a copy of ``module`` gives the same result before and after its swap.

    Args:
        plan: of the module itself; inner: plans, proved already, of modules inside it.
    """
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        raise Mismatch("its parameters are on the meta device, so the fast form could not be proved equal")
    clone = copy.deepcopy(module)
    for each in clone.modules():
        for hooks in (each._forward_hooks, each._forward_pre_hooks, each._backward_hooks, each._backward_pre_hooks):
            hooks.clear()
    clone = clone.to("cpu", torch.float32).eval()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        x, expected = _run_original(clone, plan.probes)
        twins = {id(old): new for old, new in zip(module.modules(), clone.modules(), strict=True)}
        for each in (*inner, plan):
            _apply(Change(twins[id(old)], kind, attributes) for old, kind, attributes in each.changes)
        try:
            result = clone(x)
        except _FAILURES as error:
            raise Mismatch(f"the fast form does not run on a probe: {error}") from error
    if result.shape != expected.shape:
        raise Mismatch(f"the original's result on a probe has shape {tuple(expected.shape)}, not {tuple(result.shape)}")
    both = torch.isfinite(expected) & torch.isfinite(result)
    scale = expected[both].norm().clamp_min(1e-12)
    error = ((result - expected)[both].norm() / scale).item()
    if not both.any() or error > PROBE_TOLERANCE:
        raise Mismatch(f"its forward computes something else: on a probe the results differ by {error:.1e}")


def _run_original(clone, shapes):
    """The first probe that the original runs on, and its result."""
    generator = torch.Generator().manual_seed(0)
    failures = []
    for shape in shapes:
        x = torch.randn(shape, generator=generator)
        try:
            expected = clone(x)
        except _FAILURES as error:
            failures.append(f"{' x '.join(map(str, shape))} ({error})")
            continue
        if not isinstance(expected, torch.Tensor):
            raise Mismatch(f"the original returns a {type(expected).__name__}, not a tensor")
        return x, expected
    raise Mismatch(f"the original does not run on a probe of {', nor of '.join(failures)}")


def _patterns(name, value):
    if value is None:
        return None
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, (tuple, list, set)) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"swap: {name} must be a pattern or patterns of module paths, got {value!r}")
    return tuple(patterns)


def _matches(path, patterns):
    """Whether a path, or a module that contains it, matches one of the patterns (as in file names: ``*``, ``?``)."""
    parents = [path]
    while "." in parents[-1]:
        parents.append(parents[-1].rpartition(".")[0])
    return any(fnmatchcase(parent, pattern) for parent in parents for pattern in patterns)


def _find(model, include, exclude):
    """What matches, [(path, module, plan)], and [Row] of what is left."""
    found, left, claimed = [], [], set()
    for path, module in model.named_modules():
        if id(module) in claimed:
            continue
        source = type(module).__name__
        if isinstance(module, FAST):
            left.append(Row(path, source, "", "", "is fast already"))
            continue
        try:
            plan = match(module, path)
        except Mismatch as mismatch:
            left.append(Row(path, source, "", "", str(mismatch)))
            continue
        if plan is None:
            continue
        if (include is not None and not _matches(path, include)) or (exclude is not None and _matches(path, exclude)):
            left.append(Row(path, source, "", "", "not selected by include and exclude"))
            continue
        if plan.caution and not (include is not None and any(fnmatchcase(path, pattern) for pattern in include)):
            left.append(Row(path, source, "", "", plan.caution))
            continue
        claimed.update(id(change.module) for change in plan.changes)
        found.append((path, module, plan))
    return found, left


_OPERATORS = {Unfold: "soft_split", Fold: "soft_composition", TokenPerformer: "performer_layer"}


def _backend_of(module, kind):
    """The backend of the main operator of ``kind`` on the device and in the dtype of the module's parameters."""
    op = _OPERATORS.get(kind, "soft_split_linear")
    tensor = next(module.parameters(), torch.empty(0))
    try:
        return resolve(op, Request(tensor.device.type, tensor.dtype, {}))
    except BackendUnavailable:
        return "none"


def swap(model, *, include=None, exclude=None, dry_run=False):
    """Put the fast forms in place of upstream's T2T modules, in place, on this instance.

    Swapped are, wherever they are in the model: the whole tokens-to-token module (both token types; also lanl's
    ``Tokens2Token``), single ``Token_performer`` and ``Token_transformer`` layers, every ``nn.Fold``, and the
    ``nn.Unfold`` of a module that is not swapped as a whole: what is named ``soft_split0`` and so on, another one only
    if ``include`` matches its own path, because the fast form returns a transposed view. Parameters, hooks, training
    flag, dtype and device stay: the module objects are the same, only their class changes. A layer whose inner modules
    have hooks runs unfused, so that every hook fires. Each swap is proved first, on a copy with a random input.

    Args:
        model: any ``nn.Module``.
        include, exclude: a pattern or patterns of module paths (``"tokens_to_token"``, ``"*.attention2"``); a pattern
            also selects what is inside. Both given: what ``include`` selects and ``exclude`` does not.
        dry_run: only report.

    Returns:
        :class:`SwapReport`: path, from, to, backend, and the reason for every candidate that was left.

    Raises:
        TypeError: ``model`` is not a module.
        NothingToSwap: nothing was found that could be swapped (and nothing is fast already); the text lists what was
            looked for. The model is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap: model must be a torch.nn.Module, got {type(model).__name__}")
    include, exclude = _patterns("include", include), _patterns("exclude", exclude)
    found, left = _find(model, include, exclude)
    proved, rows = [], list(left)
    # From the inside out: a layer that cannot be swapped stays as it is inside its module.
    for path, module, plan in reversed(found):
        inside = {id(each) for each in module.modules()}
        try:
            _prove(module, plan, [inner for _, other, inner in proved if id(other) in inside])
        except Mismatch as mismatch:
            rows.append(Row(path, type(module).__name__, "", "", str(mismatch)))
        else:
            proved.append((path, module, plan))
    if not proved and not any(isinstance(module, FAST) for module in model.modules()):
        reasons = [f"left: {row.path or '(the model)'} ({row.source}): {row.reason}" for row in rows]
        lines = [f"swap: nothing to swap in {type(model).__name__}. Looked for", *LOOKED_FOR, *reasons]
        raise NothingToSwap("\n  ".join(lines))
    for path, module, plan in proved:
        kind = plan.changes[-1].kind
        rows.append(Row(path, type(module).__name__, _name(kind), _backend_of(module, kind), ""))
        if not dry_run:
            _apply(plan.changes)
    order = {path: index for index, (path, _) in enumerate(model.named_modules())}
    rows.sort(key=lambda row: order[row.path])
    return SwapReport(tuple(rows), "would be swapped" if dry_run else "swapped")


def _name(kind):
    package = "lanl." if kind.__module__ == lanl.__name__ else ""
    return f"{package}{kind.__name__}"


def unswap(model):
    """Undo :func:`swap`: every module gets its original class back.

    Args:
        model: a model that :func:`swap` changed, wholly or in part.

    Returns:
        :class:`SwapReport` of what came back; no rows if nothing was swapped.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unswap: model must be a torch.nn.Module, got {type(model).__name__}")
    rows = []
    for path, module in model.named_modules():
        if _RECORD not in module.__dict__:
            continue
        fast = type(module)
        original = _undo(module)
        if issubclass(fast, FAST):
            rows.append(Row(path, _name(fast), original.__name__, "", ""))
    return SwapReport(tuple(rows), "unswapped")


@contextmanager
def swapped(model, *, include=None, exclude=None):
    """:func:`swap` inside a ``with`` block; at its end what this block swapped comes back, even after an error.

    Yields:
        :class:`SwapReport`.
    """
    before = set()
    if isinstance(model, nn.Module):
        before.update(id(module) for module in model.modules() if _RECORD in module.__dict__)
    report = swap(model, include=include, exclude=exclude)
    try:
        yield report
    finally:
        for module in model.modules():
            if _RECORD in module.__dict__ and id(module) not in before:
                _undo(module)

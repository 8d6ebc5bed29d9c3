"""``swap``: replaces upstream's modules by their fast forms, on the instances that a model holds.

A swap changes a module's class and nothing else (``classes.py``): the object stays, and with it its parameters,
hooks, attributes, methods and every reference to it (an optimizer's, a wrapper's); ``unswap`` restores the class. This
works because the fast modules keep upstream's names of children and parameters. Modules are found by structure
(``rules.py``, ``match.py``), never by importing the other project; structure cannot show what a ``forward`` does, so
every match is proved on a twin before anything is changed (``proof.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from ...errors import NothingToSwap
from .classes import is_swapped, original_class
from .explain import backend_of, skipped
from .match import Change
from .match import match as match_of
from .proof import apply, prove, signature
from .report import FUSED, Row, SwapReport
from .rules import FAST, RULES
from .template import Mismatch


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


def _selected(path, include, exclude):
    return (include is None or _matches(path, include)) and (exclude is None or not _matches(path, exclude))


def _named(path, include):
    """Whether a pattern matches the path itself."""
    return include is not None and any(fnmatchcase(path, pattern) for pattern in include)


def _find(model, include, exclude):
    """The matches, [(path, module, plans)], and a :class:`Row` for each candidate that is left."""
    found, left, claimed = [], [], set()
    for path, module in model.named_modules():
        if id(module) in claimed:
            continue
        source = type(module).__name__
        if isinstance(module, FAST):
            claimed |= skipped(module)
            left.append(Row(path, source, "", "", "is fast already"))
            continue
        try:
            plans = match_of(module)
        except Mismatch as mismatch:
            left.append(Row(path, source, "", "", str(mismatch)))
            continue
        if not plans:
            continue
        if not _chosen(path, plans[0], include, exclude):
            left.append(Row(path, source, "", "", "not selected by include and exclude"))
        elif plans[0].rule.caution and not _named(path, include):
            left.append(Row(path, source, "", "", plans[0].rule.caution))
        else:
            claimed.update(id(change.module) for change in (*plans[0].changes, *plans[0].parts))
            found.append((path, module, [plan for plan in plans if _chosen(path, plan, include, exclude)]))
    return found, left


def _chosen(path, plan, include, exclude):
    """Whether a module's path and those of the containers that its fast form skips are selected."""
    inside = (f"{path}.{name}" if path else name for name in plan.rule.containers)
    return all(_selected(each, include, exclude) for each in (path, *inside))


class _Swap(NamedTuple):
    """The proved changes of one module; the last one is that of the module at ``path``."""

    path: str
    changes: list[Change]
    fused: Mapping[str, str] = {}


def _prove_all(model, found, include, exclude):
    """A :class:`_Swap` for each proved match, and a :class:`Row` for each other one; inner modules first.

    A match inside a block is tried only if the block cannot be swapped, since the block's fused form skips it.
    """
    proved, left = [], []
    matches = {id(module): (path, module, plans) for path, module, plans in found}
    results = {}  # signature -> Template, None or Mismatch

    def result(module, plan, inner):
        """The template of one plan's proof; equal modules share one proof."""
        if plan.reason:
            raise Mismatch(plan.reason)
        changes = [*inner, *plan.changes]
        known = signature(module, changes)
        if known is None or known not in results:
            try:
                results[known] = prove(module, changes, plan.probes, plan.arguments)
            except Mismatch as mismatch:
                results[known] = mismatch
        if isinstance(results[known], Mismatch):
            raise results[known]
        return results[known]

    def attempt(path, module, plans):
        own = {id(each) for each in module.modules()}
        inner = [change for swap in proved for change in swap.changes if id(change.module) in own]
        reasons, skipped = [], []
        for plan in plans:
            try:
                template = result(module, plan, inner)
                whole = plan.changes[-1]._replace(template=template)
                proved.append(_Swap(path, [*plan.changes[:-1], whole], plan.rule.soft_splits))
                skipped = inside(module, [plan])
                break
            except Mismatch as mismatch:
                reasons.append(str(mismatch))
        else:
            left.append(Row(path, type(module).__name__, "", "", reasons[0]))
            proved.extend(_prove_parts(module, path, plans[0], inner, include, exclude))
        for each in inside(module, plans):
            if each in matches and each not in skipped:
                attempt(*matches[each])

    def inside(module, plans):
        """The ids of the children that the fast forms of plans skip."""
        paths = dict.fromkeys(path for plan in plans for path in plan.rule.containers)
        return [id(module.get_submodule(path)) for path in paths]

    deferred = {each for _, module, plans in found for each in inside(module, plans)}
    for match in reversed(found):
        if id(match[1]) not in deferred:
            attempt(*match)
    return proved, left


def _prove_parts(module, path, plan, inner, include, exclude):
    """A :class:`_Swap` for each child that can be swapped in a module that is left."""
    paths = {id(child): f"{path}.{name}" if path else name for name, child in module.named_modules()}
    parts = [change for change in plan.parts if _selected(paths[id(change.module)], include, exclude)]
    try:
        if parts:
            prove(module, [*inner, *parts], plan.probes, plan.arguments)
    except Mismatch:
        return []  # the reason of the module itself is reported
    return [_Swap(paths[id(change.module)], [change]) for change in parts]


def swap(
    model: nn.Module,
    *,
    include: str | Sequence[str] | set[str] | None = None,
    exclude: str | Sequence[str] | set[str] | None = None,
    dry_run: bool = False,
) -> SwapReport:
    """Replace upstream's T2T modules by their fast forms, in place.

    These modules are swapped, wherever they are in the model: the whole tokens-to-token module (both token types; also
    one that returns its stages or their sizes beside the tokens), single ``Token_performer`` and ``Token_transformer``
    layers, transformer blocks, every ``nn.Fold``, the feed-forward, soft split and composition of video inpainting,
    outlook attention, and the corresponding modules of the families in ``models.FAMILIES``. The fast form of
    ``nn.Unfold`` returns a transposed view: an ``nn.Unfold`` is swapped if ``include`` matches its own path, or if the
    proof shows that the T2T module around it accepts the view.

    Parameters, hooks, attributes, methods, training flag, dtype and device stay: the module objects are the same, and
    their new class inherits from the old one. If something inside a module is hooked, replaced or wrapped, before the
    swap or later, the module calls its children one by one (:func:`explain`). Each swap is proved first, on a perturbed
    twin, in float64, in eval and in training mode, with gradients. A module that cannot be proved, or has something
    that the fast form would ignore, is left, and the report gives the reason.

    Args:
        model: any ``nn.Module``.
        include, exclude: a pattern or patterns of module paths (``"tokens_to_token"``, ``"*.attention2"``); a pattern
            also selects what is inside. With both, a module must match ``include`` and not ``exclude``.
        dry_run: only report.

    Returns:
        :class:`SwapReport`: path, old class, new class and backend of each module, and why a candidate was left.

    Raises:
        TypeError: ``model`` is not a module.
        NothingToSwap: no module can be swapped, and none is fast already; the text lists the rules and the reasons.
            The model is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap: model must be a torch.nn.Module, got {type(model).__name__}")
    include, exclude = _patterns("include", include), _patterns("exclude", exclude)
    found, left = _find(model, include, exclude)
    proved, unproved = _prove_all(model, found, include, exclude)
    left += unproved
    if not proved and not any(isinstance(module, FAST) for module in model.modules()):
        reasons = [f"left: {row.path or '(the model)'} ({row.source}): {row.reason}" for row in left]
        looked_for = [f"{rule.name}: {rule.structure}" for rule in RULES]
        lines = [f"swap: nothing to swap in {type(model).__name__}. Looked for", *looked_for, *reasons]
        raise NothingToSwap("\n  ".join(lines))
    sources = {path: type(module).__name__ for path, module in model.named_modules()}
    changes = [change for swap in proved for change in swap.changes]
    for change in changes:
        apply(change)
    try:
        rows = left + [row for swap in proved for row in _rows(model, swap, sources)]
    finally:
        if dry_run:
            for change in changes:
                _undo(change.module)
    order = {path: index for index, (path, _) in enumerate(model.named_modules())}
    rows.sort(key=lambda row: order[row.path])
    return SwapReport(tuple(rows), "would be swapped" if dry_run else "swapped")


def _rows(model, swap, sources):
    """The rows of one swap; called while the swap is in effect."""
    change, path = swap.changes[-1], swap.path
    returns = f"returns a {change.template}" if change.template is not None else ""
    yield Row(path, sources[path], change.form.name, backend_of(change.module), returns)
    for child, worker in swap.fused.items():
        if not worker or isinstance(getattr(change.module, worker), (*FAST, nn.Linear)):
            child_path = f"{path}.{child}" if path else child
            yield Row(child_path, sources[child_path], FUSED, "", f"with {worker or 'its module'}")


def _undo(module):
    """Restore a module's original class."""
    module.__class__ = original_class(module)


def unswap(model: nn.Module) -> SwapReport:
    """Undo :func:`swap`: restore the original class of every module.

    Args:
        model: a model that :func:`swap` changed, wholly or in part.

    Returns:
        :class:`SwapReport` of the restored modules; no rows if none was swapped. A module whose class was changed after
        the swap (by FSDP2's ``fully_shard``) is left, with the reason.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unswap: model must be a torch.nn.Module, got {type(model).__name__}")
    rows = []
    for path, module in model.named_modules():
        original = original_class(module)
        if original is not None:
            if isinstance(module, FAST):
                rows.append(Row(path, type(module).__name__, original.__name__, "", ""))
            _undo(module)
        elif is_swapped(module):
            rows.append(Row(path, type(module).__name__, "", "", "its class was changed again after the swap"))
    return SwapReport(tuple(rows), "unswapped")


@contextmanager
def swapped(
    model: nn.Module,
    *,
    include: str | Sequence[str] | set[str] | None = None,
    exclude: str | Sequence[str] | set[str] | None = None,
) -> Iterator[SwapReport]:
    """:func:`swap` for the length of a ``with`` block; also after an error, its end restores what this block swapped.

    Yields:
        :class:`SwapReport`.
    """
    before: set[int] = set()
    if isinstance(model, nn.Module):
        before.update(id(module) for module in model.modules() if original_class(module) is not None)
    report = swap(model, include=include, exclude=exclude)
    try:
        yield report
    finally:
        for module in model.modules():
            if original_class(module) is not None and id(module) not in before:
                _undo(module)

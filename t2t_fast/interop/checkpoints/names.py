"""Matches the names of a checkpoint with those of a model: wrappers, other projects' names, prefixes.

The names of both sides are translated to upstream's (``projects.py``), so any project's file can go into any project's
model. :func:`match` then finds the prefixes under which most names agree.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .projects import from_project
from .report import Refused, listed

# Modules that wrap another one: DataParallel and DDP, torch.compile, activation checkpointing, FSDP.
_WRAPPER = re.compile(r"(?<![^.])(module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def without_wrappers(names: Iterable[str]) -> dict[str, str]:
    """{name: name without wrapping modules}; names that would become equal stay as they are."""
    return _apart(names, lambda name: _WRAPPER.sub("", name))


def check_distinct(names: Iterable[str]) -> None:
    """Raise :class:`Refused` if two of a checkpoint's names differ only by prefixes of wrapping modules."""
    seen: dict[str, str] = {}
    for name in names:
        short = _WRAPPER.sub("", name)
        if short in seen:
            same = listed([seen[short], name])
            raise Refused(f"it has the same name twice, with and without the prefix of a wrapper: {same}")
        seen[short] = name


def comparable(names: Iterable[str]) -> dict[str, str]:
    """{name: upstream's name, without wrappers}; names that would become equal are not translated."""
    short = without_wrappers(names)
    upstreams = _apart(short.values(), from_project)
    return {name: upstreams[value] for name, value in short.items()}


def _apart(names, change):
    changed = {name: change(name) for name in names}
    count = Counter(changed.values())
    return {name: value if count[value] == 1 else name for name, value in changed.items()}


@dataclass(frozen=True)
class Match:
    """The names of a checkpoint in terms of a model's.

    Attributes:
        names: {name in the checkpoint: name in the model's terms}, whether the model has it or not. What would fall
            together with another name is left out.
        prefix: (prefix of the checkpoint's names, the model's prefix that replaces it).
        score: (names with equal shapes, equal names).
    """

    names: dict[str, str]
    prefix: tuple[str, str]
    score: tuple[int, int]


def match(source: Mapping[str, tuple[int, ...] | None], target: Mapping[str, tuple[int, ...] | None]) -> Match:
    """Find the prefixes under which ``source`` fits ``target`` best.

    A pair (prefix of the source, prefix of the target) is tried if at least half of the smaller side could agree under
    it; names outside of both may agree under shorter ones (a classifier beside its backbone).

    Args:
        source, target: {name: shape}, with ``None`` for what has none.

    Returns:
        a :class:`Match`.

    Raises:
        Refused: the same name twice, or several prefixes fit equally well.
    """
    if source.keys() <= target.keys() or target.keys() <= source.keys():
        same = {name: name for name in source}
        return Match(same, ("", ""), _score(same, source, target))
    check_distinct(source)
    theirs, ours = comparable(source), comparable(target)
    named = {value: name for name, value in theirs.items()}
    needed = (min(len(source), len(target)) + 1) // 2
    best, score = None, (0, 0)
    rivals: list[tuple[str, str]] = []
    for old in _prefixes(named, needed):
        for new in _prefixes(ours.values(), needed):
            pairs = {
                named[old + value.removeprefix(new)]: name
                for name, value in ours.items()
                if value.startswith(new) and old + value.removeprefix(new) in named
            }
            found = _score(pairs, source, target)
            if found > score:
                best, score, rivals = (old, new, pairs), found, []
            elif found == score and best is not None and pairs != best[2]:
                rivals.append((old, new))
    if best is None or score[1] < needed:
        best, score, rivals = ("", "", {}), (0, 0), []
    old, new, pairs = best
    if rivals and score[0]:
        rival = " and ".join(repr(prefix) for prefix in ((old, new), rivals[0]))
        raise Refused(
            f"its names fit the model's equally well under several prefixes (of the checkpoint, of the model): "
            f"{rival}; give the state dict, or the part of the model, that is meant"
        )
    return Match(_renamed(theirs, ours, old, new, pairs), (old, new), score)


def _score(pairs, source, target):
    """The number of pairs with equal shapes, and of all pairs. PaddlePaddle's matrices are transposed."""
    pairs = [(source[theirs], target[ours]) for theirs, ours in pairs.items() if ours in target]
    return sum(a is not None and b is not None and a in (b, b[::-1]) for a, b in pairs), len(pairs)


def _prefixes(names, needed):
    """Dotted prefixes that at least ``needed`` of the names have, the shortest first."""
    count = Counter({"": needed})
    for name in names:
        end = name.find(".")
        while end >= 0:
            count[name[: end + 1]] += 1
            end = name.find(".", end + 1)
    return sorted((prefix for prefix, many in count.items() if many >= needed), key=lambda prefix: prefix.count("."))


def _renamed(theirs, ours, old, new, pairs):
    """The pairs, and all other names with the nearest outer prefixes under which the model has them."""
    names, taken = dict(pairs), set(pairs.values())
    free = {value: name for name, value in ours.items() if name not in taken}
    for name, value in theirs.items():
        candidates = [b + value[len(a) :] for a in _outer(old) for b in _outer(new) if value.startswith(a)]
        found = next((free[candidate] for candidate in candidates if candidate in free), candidates[0])
        if name not in names and found not in taken:
            names[name] = found
            taken.add(found)
    return names


def _outer(prefix):
    """The prefix and its own prefixes, the longest first, the last one empty."""
    yield prefix
    while prefix:
        prefix = prefix[: prefix[:-1].rfind(".") + 1]
        yield prefix

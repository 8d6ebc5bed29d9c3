"""Finds the state dict in a checkpoint, and converts its values to tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from .report import Refused, listed

_DEPTH = 2
"""Depth of nesting at which a state dict is looked for."""
_CANDIDATES = 100
"""How many dicts of tensors, the largest ones, are compared with the model."""
_NAME_LENGTH = 1000
"""Longest accepted name of a tensor."""
_KNOWN = ("tensors", "state_dict", "model_state_dict", "model", "net", "module", "state_dict_ema", "model_ema")
"""Names that decide between entries that fit equally well, in order of preference."""
_AVERAGED = re.compile(r"(?<![^._])ema(?![^._])", re.IGNORECASE)


def choose(content: Any, *, use_ema: bool, rate: Callable[[dict[str, Any]], int]) -> tuple[dict[str, Any], str]:
    """The state dict in the content of a file, and the name of its entry ("tensors" if it is the top level).

    Args:
        content: what was read, nested dicts.
        use_ema: prefer averaged weights, entries with "ema" in their name; ``False``: do not use them.
        rate: function of {name: value} that returns a score, larger for a better fit.

    Raises:
        Refused: no dict of tensors, or several that fit equally well.
    """
    if not isinstance(content, Mapping):
        raise Refused(f"it must hold a dict of tensors, alone or under a name, got {type(content).__name__}")
    largest = sorted(_dicts_of_tensors(content, (), set()), key=lambda item: -len(item[1]))
    found = dict(largest[:_CANDIDATES])
    if not found:
        raise Refused(f"it holds no tensors; its entries are {listed(_kinds(content))}")
    rates = {source: rate(entry) for source, entry in found.items()}
    if not any(rates.values()):
        rates = {source: len(entry) for source, entry in found.items()}
    fitting = [source for source in found if 2 * rates[source] >= max(rates.values())]
    averaged = [source for source in fitting if _AVERAGED.search(source)]
    plain = [source for source in fitting if source not in averaged]
    wanted = averaged or plain if use_ema else plain
    if not wanted:
        raise Refused(f"it holds averaged weights alone ({listed(averaged)}); use_ema=True loads them")
    best = max(rates[source] for source in wanted)
    rivals = sorted((source for source in wanted if rates[source] == best), key=_preference)
    if len(rivals) > 1 and _preference(rivals[0]) == _preference(rivals[1]):
        raise Refused(f"it holds several state dicts that fit equally well, {listed(rivals)}; give one as a state dict")
    return found[rivals[0]], rivals[0]


def _preference(source):
    return _KNOWN.index(source) if source in _KNOWN else len(_KNOWN)


def _dicts_of_tensors(content, path, seen):
    """(name, {name: value}) of every dict that holds tensors, outermost first; each dict once."""
    seen.add(id(content))
    names = [name for name in content if isinstance(name, str)]
    if any(len(name) > _NAME_LENGTH for name in names):
        raise Refused(f"it holds a name of {max(map(len, names))} characters")
    if any(isinstance(content[name], (torch.Tensor, np.ndarray)) for name in names):
        yield ".".join(path) or "tensors", {name: content[name] for name in names}
    for name in names:
        if isinstance(content[name], Mapping) and len(path) < _DEPTH and id(content[name]) not in seen:
            yield from _dicts_of_tensors(content[name], (*path, name), seen)


def _kinds(content):
    return [f"{name} ({type(value).__name__})" for name, value in content.items() if isinstance(name, str)] or ["none"]


def as_tensor(value: Any) -> Any:
    """A tensor if the value is a tensor, array or number; otherwise the value itself."""
    try:
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
        if isinstance(value, (bool, int, float, np.bool_, np.number)):
            return torch.as_tensor(value)
    except (RuntimeError, TypeError, ValueError):  # a dtype that torch does not have
        return value
    return value

"""The checks of constructor options: an option has the same check in every class."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from .._deprecated import warn_deprecated
from ..errors import as_size, check_number, check_sizes
from ..functional.performer_layer import recompute_of

Check: TypeAlias = Callable[[str, str, Any], Any]
"""Function of (owner, name, value) that raises for a wrong value."""


def check_choice(owner: str, name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise unless ``value`` is one of ``choices``, which are strings."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{owner}: {name} must be one of {', '.join(choices)}, got {value!r}")


def check_series(owner: str, name: str, value: Any, *, length: int | None = None) -> None:
    """Raise unless ``value`` is a sequence (or 1-D array) of integers of at least 1, ``length`` of them if given."""
    is_series = isinstance(value, Sequence) or getattr(value, "ndim", 0) == 1
    if not is_series or any(as_size(each) is None for each in value):
        raise TypeError(f"{owner}: {name} must be a sequence of ints, got {value!r}")
    if length is not None and len(value) != length:
        raise ValueError(f"{owner}: {name} must be {length} ints, got {value!r}")
    for each in value:
        check_sizes(owner, **{name: each})


def _size(minimum: int) -> Check:
    return lambda owner, name, value: check_sizes(owner, minimum=minimum, **{name: value})


def _number(**bounds: float) -> Check:
    return lambda owner, name, value: check_number(owner, name, value, **bounds)


def _or_none(check: Check) -> Check:
    return lambda owner, name, value: None if value is None else check(owner, name, value)


def _makes_modules(owner: str, name: str, value: Any) -> None:
    if not callable(value):
        raise TypeError(f"{owner}: {name} must be callable (a class or function that makes a module), got {value!r}")


OPTIONS = {
    name: check
    for names, check in (
        ("dim in_dim head_cnt num_heads in_chans embed_dim token_dim patch_size growth_rate in_features", _size(1)),
        ("chan in_chan token_chan token_len preds", _size(1)),
        ("hidden_features out_features hidden_chan out_chan", _or_none(_size(1))),
        ("num_classes depth", _size(0)),
        ("representation_size", _or_none(_size(0))),
        ("mlp_ratio kernel_ratio", _number(above=0)),
        ("hidden_chan_mul T2T_hidden_chan_mul Encoding_hidden_chan_mul", _number(above=0)),
        ("qk_scale", _or_none(_number())),
        ("drop_rate attn_drop_rate dp1 dp2 drop attn_drop proj_drop", _number(minimum=0, maximum=1)),
        ("drop_path drop_path_rate drop_prob", _number(minimum=0, below=1)),
        ("norm_layer act_layer", _makes_modules),
        ("block_config", check_series),
    )
    for name in names.split()
}
"""Name of an option -> its check."""


def check_options(owner: str, options: Mapping[str, Any]) -> None:
    """Check the arguments of a constructor that are in :data:`OPTIONS`.

    Args:
        owner: name of the class, the beginning of an error message.
        options: name -> value, such as ``locals()`` at the beginning of ``__init__``.

    Raises:
        TypeError, ValueError: an option of the wrong type or value.
    """
    for name, value in options.items():
        if name in OPTIONS:
            OPTIONS[name](owner, name, value)


def deprecated_memory(owner: str) -> property:
    """The property ``memory``, "fast" or "low": the old name of ``recompute``, ``False`` or ``True``."""
    names = f"{owner}.memory", f"{owner}.recompute"

    def get(module: Any) -> str:
        warn_deprecated(*names)
        return "low" if module.recompute else "fast"

    def set_(module: Any, memory: Any) -> None:
        warn_deprecated(*names)
        module.recompute = recompute_of(memory, owner)

    return property(get, set_, doc=f"Deprecated: use :attr:`{names[1]}`.")

"""The report of a load, and the error that refuses a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_LISTED = 20
"""How many names an error or a report lists."""
_LENGTH = 200
"""Characters of a name that are shown."""


class Refused(Exception):
    """The checkpoint is broken, hostile, or not a checkpoint; the text gives the reason, the caller adds the path."""


def listed(names: Sequence[str]) -> str:
    """The first names, without control characters, and the number of the others."""
    shown = [name if name.isprintable() and len(name) <= _LENGTH else f"{name[:_LENGTH]!r}" for name in names[:_LISTED]]
    return ", ".join(shown) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_checkpoint` did; ``str()`` is a table.

    Attributes:
        path: the file, "state dict" for an object; source: the entry of it that was read ("state_dict_ema",
            "state_dict", "net", ..., nested ones with dots; "tensors" if the tensors are at the top).
        layout: whose names the checkpoint had: "upstream", "mmpretrain", "paddle" (PaddleViT's), "timm" (with
            :class:`T2TEmbed`), "vit-pytorch", or those of one of ``models.FAMILIES``.
        prefix: (prefix of the checkpoint's names, prefix of the model's that took its place).
        loaded, total: tensors of the model that were loaded, and all of them.
        resized: (name, old grid, new grid) of position tables.
        rescaled: (name, factor) of weights whose queries were multiplied for another attention scale.
        reinitialised: the head's tensors, if they were newly initialised.
        new_modules: heads that are new objects; an existing optimizer does not have their parameters.
        left_out: the checkpoint's tensors of a head that was not requested.
        ignored: the checkpoint's entries that are not tensors and that the model does not have.
        missing, unexpected: names that only the model, or only the checkpoint has.
        mismatched: (name, what the checkpoint has, what the model has) where shape or kind differ.
        notes: the assumptions that were made.
    """

    path: str
    source: str
    layout: str
    loaded: int
    total: int
    prefix: tuple[str, str] = ("", "")
    resized: tuple[tuple[str, tuple[int, int], tuple[int, int]], ...] = ()
    rescaled: tuple[tuple[str, float], ...] = ()
    reinitialised: tuple[str, ...] = ()
    new_modules: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether each tensor of the model and of the checkpoint has a counterpart or was left out on purpose."""
        return not (self.missing or self.unexpected or self.mismatched)

    def problems(self) -> list[str]:
        """Lines that list the tensors without counterpart."""
        mismatched = [f"{name} (checkpoint {theirs}, model {ours})" for name, theirs, ours in self.mismatched]
        rows = (("missing", self.missing), ("unexpected", self.unexpected), ("does not fit", mismatched))
        return [row(label, names) for label, names in rows if names]

    def __str__(self):
        rows = (
            ("prefix", [f"{self.prefix[0]!r} -> {self.prefix[1]!r}"] if any(self.prefix) else []),
            ("resized", [f"{name} {a} x {b} -> {c} x {d}" for name, (a, b), (c, d) in self.resized]),
            ("rescaled", [f"{name} x {factor:.6g}" for name, factor in self.rescaled]),
            ("initialised", self.reinitialised),
            ("new module", self.new_modules),
            ("left out", self.left_out),
            ("no tensors", self.ignored),
        )
        names = "" if self.layout == "upstream" else f", {self.layout}'s names"
        lines = [f"{self.path} ({self.source}{names}): {self.loaded} of {self.total} tensors loaded"]
        lines += [row(label, entries) for label, entries in rows if entries]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines + self.problems())


def row(label: str, names: Sequence[str]) -> str:
    """A line of a report: the label, the number of names, the first of them."""
    return f"  {label:12} {len(names):4}  {listed(names)}"

"""The report of a swap, as rows and as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

FUSED = "(fused)"


class Row(NamedTuple):
    """One line of a report.

    ``target`` is the new class; "(fused)" for a child that a swapped module no longer calls; empty for a module that
    was left, with the reason in ``reason``.
    """

    path: str
    source: str
    target: str
    backend: str
    reason: str


@dataclass(frozen=True)
class SwapReport:
    """The modules that were swapped (or would be, or were restored) and those that were left; ``str()`` is a table."""

    rows: tuple[Row, ...]
    done: str

    @property
    def swapped(self) -> list[str]:
        """Paths of the modules that changed."""
        return [row.path for row in self.rows if row.target and row.target != FUSED]

    @property
    def left(self) -> dict[str, str]:
        """Path -> reason, for the candidates that did not change."""
        return {row.path: row.reason for row in self.rows if not row.target}

    def __str__(self) -> str:
        if not self.rows:
            return f"0 modules {self.done}"
        table = [("path", "from", "to", "backend", "reason")]
        for path, source, target, name, reason in self.rows:
            table.append((path or "(the model)", source, target or "-", name or "-", reason))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
        count = len(self.swapped)
        return "\n".join([*lines, f"{count} module{'s' * (count != 1)} {self.done}, {len(self.left)} left"])

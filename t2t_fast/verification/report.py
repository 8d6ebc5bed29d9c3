"""The result of ``verify``: rows, a table of them, a block to paste into a bug report."""

from collections.abc import Iterable
from dataclasses import dataclass

from .. import testing


@dataclass(frozen=True)
class VerifyRow:
    """One comparison.

    Attributes:
        what: an operator's name, or the model.
        backend, dtype: names; the dtype is "fp32", "fp16", "bf16" or "fp64".
        direction: "forward", or "backward" for the worst of all gradients.
        error, tolerance: relative to the float64 reference; ``None`` where nothing was computed.
        worst: the case and the tensor with that error.
        ok: ``None`` where nothing was computed and this backend was not requested explicitly.
        note: why nothing was computed, or the exception.
    """

    what: str
    backend: str
    dtype: str
    direction: str
    error: float | None = None
    tolerance: float | None = None
    worst: str = ""
    ok: bool | None = None
    note: str = ""

    @property
    def severity(self) -> tuple[bool, float]:
        """Sort key: whether it failed, then the fraction of the tolerance that the error uses."""
        return self.ok is False, (self.error or 0.0) / (self.tolerance or 1.0)


@dataclass(frozen=True)
class VerifyReport:
    """Rows and the environment they were computed in; ``str()`` is a table, :meth:`paste` a block for a bug report."""

    rows: tuple[VerifyRow, ...]
    environment: dict[str, str]
    seconds: float

    @classmethod
    def merged(cls, reports: Iterable["VerifyReport"]) -> "VerifyReport":
        """Several reports of one machine as one."""
        first, *others = reports
        rows = sum((each.rows for each in others), first.rows)
        return cls(rows, first.environment, sum((each.seconds for each in others), first.seconds))

    @property
    def checked(self) -> list[VerifyRow]:
        """The rows that passed or failed."""
        return [row for row in self.rows if row.ok is not None]

    @property
    def failures(self) -> list[VerifyRow]:
        """The rows that failed."""
        return [row for row in self.rows if row.ok is False]

    @property
    def ok(self) -> bool:
        """Whether at least one comparison was made and all are within their tolerances."""
        return bool(self.checked) and not self.failures

    @property
    def verdict(self) -> str:
        """The result in one line."""
        if not self.checked:
            return "FAILED: nothing could be compared"
        if self.failures:
            return f"FAILED: {len(self.failures)} of {len(self.checked)} comparisons"
        return f"ok: {len(self.checked)} comparisons within their tolerances"

    def _grouped(self) -> dict[tuple[str, str, str], dict[str, VerifyRow]]:
        """(what, backend, dtype) -> its checked rows by direction."""
        groups: dict[tuple[str, str, str], dict[str, VerifyRow]] = {}
        for row in self.checked:
            groups.setdefault((row.what, row.backend, row.dtype), {})[row.direction] = row
        return groups

    def notes(self) -> list[str]:
        """One line for each reason why something did not run or raised."""
        subjects: dict[tuple[str, str], dict[str, None]] = {}
        for row in sorted((row for row in self.rows if row.note), key=lambda row: row.backend):
            subjects.setdefault((row.backend, row.note), {})[row.what] = None
        lines = [f"{name}: {note} ({', '.join(what)})" for (name, note), what in subjects.items()]
        if any(row.what not in testing.CASES for row in self.checked):
            lines.append("models run under autocast in fp16 and bf16, as in training and serving")
        return lines

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [("what", "backend", "dtype", "forward", "of", "backward", "of", "", "worst")]
        for (what, name, dtype), rows in self._grouped().items():
            numbers = [
                "-" if row is None or value is None else f"{value:.1e}"
                for row in (rows.get("forward"), rows.get("backward"))
                for value in ((row.error, row.tolerance) if row else (None, None))
            ]
            worst = max(rows.values(), key=lambda row: row.severity)
            table.append((what, name, dtype, *numbers, "ok" if worst.ok else "FAILED", worst.worst or "see below"))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
        return "\n".join(
            [*lines, *self.notes(), f"{self.verdict} ({self.environment['device']}, {self.seconds:.0f} s)"]
        )

    def paste(self) -> str:
        """A compact Markdown block: environment, then worst forward / backward error per backend and dtype."""
        dtypes = [name for name in testing.DTYPES if any(row.dtype == name for row in self.checked)]
        table: dict[tuple[str, str], dict[str, str]] = {}
        for (what, name, dtype), rows in self._grouped().items():
            errors = " / ".join(f"{row.error:.1e}" for row in rows.values() if row.error is not None)
            ok = all(row.ok for row in rows.values())
            table.setdefault((what, name), {})[dtype] = errors if ok else f"**FAILED** {errors}"
        lines = [f"**t2t-fast verify: {self.verdict}**", ""]
        lines += [f"- {name}: {value}" for name, value in self.environment.items()]
        lines += [
            "",
            f"| forward / backward error of | backend | {' | '.join(dtypes)} |",
            "|---" * (len(dtypes) + 2) + "|",
        ]
        for (what, name), cells in table.items():
            lines.append(f"| {what} | {name} | {' | '.join(cells.get(dtype, '-') for dtype in dtypes)} |")
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes())])

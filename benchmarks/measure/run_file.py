"""The file of a run, ``rows.json``: what was measured, where, and what was left out; grows as the run goes on.

The report, the comparison of two runs and the README's numbers are made from it alone.
"""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple


class RunFile(NamedTuple):
    """What one run has measured so far.

    Attributes:
        environment: of :func:`machine.describe`, with the command line, the suites' ``quick`` and the measured limits.
        rows: timed rows (:mod:`rows`), some with fewer visits than planned if the run was stopped.
        fits: largest batches (:func:`fit.measure`); processes: several processes (:func:`processes.measure`).
        left_out: {"group", "provider", "reason"} of each planned row without numbers.
        planned: rows, fits and processes that the run is to measure; ``None`` in files from before it was noted.
    """

    environment: dict[str, Any]
    rows: list[dict]
    fits: list[dict]
    processes: list[dict]
    left_out: list[dict]
    planned: int | None = None

    @property
    def begun(self):
        """Timed rows that were not visited as often as planned."""
        return sum(len(row.get("visits", [])) < self.environment.get("visits", 0) for row in self.rows)

    @property
    def finished(self):
        """Planned rows that are complete: numbers of all visits, or a reason why there are none."""
        return len(self.rows) + len(self.fits) + len(self.processes) + len(self.left_out) - self.begun

    @property
    def complete(self):
        """Whether the run came to its end."""
        return self.planned is None or self.finished >= self.planned


def read(path):
    """The :class:`RunFile` at ``path``, which may be compressed by gzip (a name that ends in ``.gz``).

    Raises:
        ValueError: the file holds something else.
    """
    data = Path(path).read_bytes()
    try:
        content = json.loads(gzip.decompress(data) if str(path).endswith(".gz") else data)
    except (json.JSONDecodeError, UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as failure:
        raise ValueError(f"{path}: not JSON ({failure})") from failure
    if not isinstance(content, dict) or not {"environment", "rows", "left_out"} <= content.keys():
        raise ValueError(f"{path}: not a run of these benchmarks: wanted environment, rows and left_out")
    known = {key: content[key] for key in RunFile._fields if key in content}
    return RunFile(**{"fits": [], "processes": [], **known})


def write(path, run):
    """Write a :class:`RunFile`, whole or not at all, so that an interrupted run leaves what it had measured."""
    partial = Path(path).with_suffix(".part")
    partial.write_text(json.dumps(run._asdict(), indent=1, allow_nan=False) + "\n")
    partial.replace(path)

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
        rows: timed rows (:func:`rows.row`), some with fewer visits than planned if the run was stopped.
        fits: largest batches (:func:`fit.row`).
        processes: several processes side by side (:func:`processes.row`).
        left_out: {"group", "provider", "reason"} of each planned row without numbers.
        planned: rows, fits and processes that the run set out to measure; ``None`` in files from before it was noted.
    """

    environment: dict[str, Any]
    rows: list[dict]
    fits: list[dict]
    processes: list[dict]
    left_out: list[dict]
    planned: int | None = None

    @property
    def finished(self):
        """Planned rows that have become something: numbers of all visits, or a reason why there are none."""
        visits = self.environment.get("visits", 0)
        timed = sum(len(row.get("visits", [])) >= visits for row in self.rows)
        return timed + len(self.fits) + len(self.processes) + len(self.left_out)

    @property
    def begun(self):
        """Timed rows that were not visited as often as planned."""
        return len(self.rows) + len(self.fits) + len(self.processes) + len(self.left_out) - self.finished

    @property
    def complete(self):
        """Whether the run came to its end."""
        return self.planned is None or self.finished >= self.planned


def read(path):
    """The :class:`RunFile` in ``rows.json``, or in the raw pytest-benchmark file of these suites (timed rows alone).

    A name that ends in ``.gz`` means a file compressed by gzip.

    Raises:
        ValueError: the file holds something else.
    """
    data = Path(path).read_bytes()
    try:
        content = json.loads(gzip.decompress(data) if str(path).endswith(".gz") else data)
    except (json.JSONDecodeError, UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as failure:
        raise ValueError(f"{path}: not JSON ({failure})") from failure
    if isinstance(content, dict) and "benchmarks" in content and "t2t_fast" in content.get("machine_info", {}):
        rows = [{**each["extra_info"]["row"], "times": each["stats"]["data"]} for each in content["benchmarks"]]
        return RunFile(content["machine_info"]["t2t_fast"], rows, [], [], [])
    if not isinstance(content, dict) or not {"environment", "rows", "left_out"} <= content.keys():
        raise ValueError(f"{path}: not a run of these benchmarks: wanted environment, rows and left_out")
    return RunFile(
        content["environment"],
        content["rows"],
        content.get("fits", []),
        content.get("processes", []),
        content["left_out"],
        content.get("planned"),
    )


def write(path, run):
    """Write a :class:`RunFile`, whole or not at all, so that a run which is cut off leaves what it had measured."""
    path = Path(path)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(run._asdict(), indent=1, allow_nan=False) + "\n")
    partial.replace(path)

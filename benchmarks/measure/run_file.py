"""The file of a run, ``rows.json``: measurements, environment, and what was left out; grows during the run.

The report, the comparison of two runs and the README's numbers are made from this file alone.
"""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple


class RunFile(NamedTuple):
    """The content of the file.

    Attributes:
        environment: of :func:`machine.describe`, with the command line, the suites' ``quick`` and the measured limits.
        rows: timed rows (:mod:`rows`), some with fewer visits than planned if the run was stopped; of the suite
            "memory" largest batches (:func:`fit.measure`), of "processes" :func:`processes.measure`.
        left_out: {"group", "provider", "reason"} of each planned row without numbers.
        planned: number of rows that the run is to measure.
    """

    environment: dict[str, Any]
    rows: list[dict]
    left_out: list[dict]
    planned: int = 0

    @property
    def begun(self):
        """Number of timed rows that have fewer visits than planned."""
        planned = self.environment.get("visits", 0)
        return sum("visits" in row and len(row["visits"]) < planned for row in self.rows)

    @property
    def finished(self):
        """Number of planned rows that have the numbers of all visits, or a reason why there are none."""
        return len(self.rows) + len(self.left_out) - self.begun

    @property
    def complete(self):
        """Whether all planned rows are finished."""
        return self.finished >= self.planned


def read(path):
    """The :class:`RunFile` at ``path``: a file, compressed by gzip if its name ends in ``.gz``, or a folder with one.

    Raises:
        ValueError: it is no run file, or there is none in the folder.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("rows.json*"))
        if not found:
            raise ValueError(f"{path}: expected rows.json or rows.json.gz in this folder")
        path = found[0]
    data = path.read_bytes()
    try:
        content = json.loads(gzip.decompress(data) if str(path).endswith(".gz") else data)
    except (json.JSONDecodeError, UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as failure:
        raise ValueError(f"{path}: not JSON ({failure})") from failure
    if not isinstance(content, dict) or content.keys() != set(RunFile._fields):
        raise ValueError(f"{path}: not a run of these benchmarks: expected {', '.join(RunFile._fields)}")
    return RunFile(**content)


def write(path, run):
    """Write a :class:`RunFile` atomically, so that an interrupted run keeps its earlier measurements."""
    partial = Path(path).with_suffix(".part")
    partial.write_text(json.dumps(run._asdict(), indent=1, allow_nan=False) + "\n")
    partial.replace(path)

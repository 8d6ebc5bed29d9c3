"""T2T modules against their peers, one test a row; run with ``pytest benchmarks`` or ``python -m benchmarks``."""

import pytest

from .measure.harness import REPLAY

SUITE = "module"


@pytest.mark.benchmark(timer=REPLAY)
def test_row(row, record):
    record()

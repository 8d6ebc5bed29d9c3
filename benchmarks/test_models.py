"""Inference of whole models, one test a row; run with ``pytest benchmarks`` or ``python -m benchmarks``."""

import pytest

from .measure.harness import REPLAY

SUITE = "models"


@pytest.mark.benchmark(timer=REPLAY)
def test_row(row, record):
    record()

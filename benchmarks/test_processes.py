"""Data-parallel training on a CPU, one test a row; run with ``pytest benchmarks`` or ``python -m benchmarks``."""

SUITE = "processes"


def test_row(row, side_by_side):
    side_by_side()

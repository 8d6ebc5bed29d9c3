"""The largest batch that fits, one test a row; run with ``pytest benchmarks`` or ``python -m benchmarks``."""

SUITE = "memory"


def test_row(row, largest_batch):
    largest_batch()

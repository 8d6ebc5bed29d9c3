"""Benchmarks: operators, T2T modules and whole models against their peers; see ``python -m benchmarks --help``."""

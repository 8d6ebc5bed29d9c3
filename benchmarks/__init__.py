"""Benchmarks: operators, T2T modules and whole models against their honest peers.

``python -m benchmarks --help`` runs them; ``python -m benchmarks.gpu`` does everything that a GPU machine can tell.
"""

"""What the questions share: the command line, and the backends that ``auto`` selects."""

import argparse

import torch

from t2t_fast import explain
from t2t_fast.testing import DTYPES

NAMES = ("fp32", "bf16", "fp16")


def parser(name, doc):
    """A command line with ``--device``; ``doc`` is the docstring of ``benchmarks.questions.NAME``."""
    found = argparse.ArgumentParser(prog=f"python -m benchmarks.questions.{name}", description=doc.splitlines()[0])
    found.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    return found


def selected(op, device, names, **sizes):
    """Dtype name -> the backend that ``auto`` selects for an operator in training."""
    return {name: explain(op, device=device, dtype=DTYPES[name], training=True, **sizes).chosen(op) for name in names}

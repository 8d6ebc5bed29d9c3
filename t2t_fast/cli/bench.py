"""``t2t-fast bench``: the benchmark suite, which lives beside the package in a source checkout."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

from .common import CommandError

ROOT = Path(__file__).parents[2]
"""The folder that holds the package; in a source checkout, ``benchmarks`` too."""


def run(options: argparse.Namespace) -> int:
    """Run the main function of ``benchmarks`` with these arguments."""
    if not (ROOT / "benchmarks" / "__main__.py").is_file():
        raise CommandError(
            "the benchmark suite is part of the source tree and not of the installed package: there is no folder "
            f"benchmarks beside {ROOT / 't2t_fast'}; clone the repository and run `make bench` there"
        )
    arguments = [f"--{name}" for name in ("quick", "resume") if getattr(options, name)]
    if options.report is not None:
        arguments += ["--report", options.report]
    if options.compare is not None:
        arguments += ["--compare", *options.compare]
    sys.path.insert(0, str(ROOT))
    try:
        suite = import_module("benchmarks.__main__")
    except ImportError as error:
        raise CommandError(f"the benchmark suite cannot be loaded: {error}; pip install 't2t_fast[bench]'") from error
    return int(suite.main([*arguments, *options.rest]))

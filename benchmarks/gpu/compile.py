"""Compile the kernels of the headline rows without timing them: ``python -m benchmarks.gpu.compile --share 1/8``.

Triton compiles a kernel at its first launch, in about a second on one core. Before the rows, ``make gpu`` runs several
of these processes side by side: each makes the first calls of its share of the rows, which fills Triton's cache.
"""

import argparse
import gc
import re
import sys

import torch

from ..measure import clocks, harness
from ..suites import subjects
from ..suites.groups import SUITES, TIMED, groups
from ..suites.providers import BACKENDS, OURS, providers


def calls(suites, device):
    """(group, provider) of each call of this package that a quick run makes without ``torch.compile``."""
    return [
        (group, provider)
        for suite in suites
        if suite in TIMED
        for group in groups(suite, device, quick=True)
        for provider in providers(group, device)
        if provider.source in (OURS, *BACKENDS) and not (provider.compiled or provider.captured)
    ]


def compile_calls(found, device):
    """Make each first call, forward and backward. Returns the exit code: 1 if one failed.

    Calls that do not fit into the memory beside the other processes are compiled when they are measured.
    """
    code = 0
    for group, provider in found:
        try:
            clock = clocks.clock(device, group.suite)
            harness.prepare(subjects.build(group, device), provider, device, clock, check=False)
            print(f"{group.id}, {provider.name}: ready", flush=True)
        except torch.OutOfMemoryError:
            print(f"{group.id}, {provider.name}: too little memory beside the other processes", flush=True)
        except Exception as failure:  # noqa: BLE001 - the others are still compiled
            code = 1
            print(f"{group.id}, {provider.name}: {type(failure).__name__}: {failure}", flush=True)
            if clocks.context_lost(device):
                break
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return code


def _share(text):
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if match is None or int(match[1]) > int(match[2]):
        raise argparse.ArgumentTypeError(f"must be like 2/8, got {text!r}")
    return slice(int(match[1]) - 1, None, int(match[2]))


def main(argv=None):
    """Compile a share."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.compile", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--share", type=_share, default="1/1", metavar="K/N", help="every N-th call, from the K-th on")
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=SUITES, metavar="NAME")
    arguments = parser.parse_args(argv)
    return compile_calls(calls(arguments.suite, arguments.device)[arguments.share], arguments.device)


if __name__ == "__main__":
    sys.exit(main())

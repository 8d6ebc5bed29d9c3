"""Compile the kernels of the headline rows without timing them: ``python -m benchmarks.gpu.compile --share 1 8``.

Triton compiles a kernel at its first launch, in about a second on one core. Before it measures the rows, ``make gpu``
runs several of these processes in parallel. Each makes the first calls of a share of the rows to fill Triton's cache.
"""

import argparse
import gc
import sys

import torch

from ..measure import clocks, harness
from ..suites import subjects
from ..suites.groups import SUITES, TIMED, groups
from ..suites.providers import BACKENDS, OURS, providers


def calls(suites, device):
    """(group, provider) of each row of this package in a quick run, without ``torch.compile`` and CUDA graphs."""
    return [
        (group, provider)
        for suite in suites
        if suite in TIMED
        for group in groups(suite, device, quick=True)
        for provider in providers(group, device)
        if provider.source in (OURS, *BACKENDS) and not (provider.compiled or provider.captured)
    ]


def main(argv=None):
    """Make the first calls of a share, forward and backward. Returns the exit code: 1 if a call failed.

    If the other processes leave too little memory for a call, it is compiled when it is measured.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.compile", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--share", nargs=2, type=int, default=(1, 1), metavar=("K", "N"), help="calls K, K+N, ...")
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=SUITES, metavar="NAME")
    arguments = parser.parse_args(argv)
    device, (first, step), code = arguments.device, arguments.share, 0
    for group, provider in calls(arguments.suite, device)[first - 1 :: step]:
        try:
            subject, clock = subjects.build(group, device), clocks.clock(device, group.suite)
            harness.prepare(subject, provider, device, clock, check=False)
            said = "ready"
        except torch.OutOfMemoryError:
            said = "too little memory beside the other processes"
        except Exception as failure:  # noqa: BLE001 - the other calls follow
            code, said = 1, f"{type(failure).__name__}: {failure}"
        print(f"{group.id}, {provider.name}: {said}", flush=True)
        if code and clocks.context_lost(device):
            break
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return code


if __name__ == "__main__":
    sys.exit(main())

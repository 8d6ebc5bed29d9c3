"""What compiled kernels there are, from the registry: ``python -m benchmarks.kernel_report``.

For every operator and compiled backend: that it has an implementation, or the registered reason why not.
"""

import sys

import torch

import t2t_fast

COMPILED = ("triton", "native")


def lines():
    """The report, line by line."""
    verdicts = {}
    for device in ("cpu", "cuda"):
        for op, backend, verdict in t2t_fast.explain(device=device, dtype=torch.float32).rows:
            if backend in COMPILED:
                words = "has a kernel" if verdict in ("chosen", "available") else verdict
                verdicts.setdefault((op, backend), {})[device] = words
    kernels = sum("has a kernel" in devices.values() for devices in verdicts.values())
    if kernels:
        head = f"{kernels} operator and backend pairs have compiled kernels."
    else:
        head = (
            "No operator has a Triton, CUDA or other compiled kernel in this version: there are no registers, spills "
            "or instructions to report. Every operator runs as plain PyTorch operations."
        )
    found = [head]
    for (op, backend), devices in sorted(verdicts.items()):
        for words in dict.fromkeys(devices.values()):
            where = " and ".join(device for device in devices if devices[device] == words)
            found.append(f"{op:20} {backend:7} on {where:12} {words}")
    return found


def main():
    """Print the report."""
    print("\n".join(lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What compiled kernels there are: ``python -m benchmarks.kernels.report [LIBRARY]``; ``--help`` tells the options.

For every operator and compiled backend: that it has an implementation, or the registered reason why not. For every
CUDA kernel in the operators' library (the installed one, or the one given) and every Triton kernel, on every
architecture: registers, spills, shared memory, matrix instructions, and the widths of its global loads and stores, read
from the machine code. No GPU is needed. Triton's kernels are compiled for T2T's shape, with ``--shape E M`` for
another, with ``--all`` for every one.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import torch

import t2t_fast
from t2t_fast import _extension

from . import machine_code, triton_report

COMPILED = ("triton", "native")


def installed_library():
    """The operators' library with CUDA kernels and ``None``, or ``None`` and why there is none."""
    if reason := _extension.operators_error():
        return None, f"the native operators are missing: {reason}"
    info = _extension.build_info()
    if info is not None and info["cuda"] is None:
        return None, "the native operators are built without CUDA"
    return _extension.LIBRARY, None


def cuda_kernels(library=None):
    """The kernels of the installed library or of the one given, and why there are none (or ``None``)."""
    if library is None:
        library, reason = installed_library()
        if library is None:
            return [], f"No CUDA kernels to report: {reason}."
    tool = machine_code.find_tool()
    if tool is None:
        name = machine_code.TOOL
        return [], f"CUDA kernels not read: {name} is neither on PATH nor in a CUDA toolkit nor in Triton's package."
    found = machine_code.read(library, tool)
    return found, None if found else f"{Path(library).name} has no CUDA kernels."


def cuda_lines(kernels):
    """The report's part on CUDA kernels, line by line."""
    found = [
        "CUDA kernels; loads and stores: how many instructions of each width. Shared memory is what a kernel declares;",
        "1024 bytes of it the system's own from sm_90 on; tiled kernels ask for more at the launch.",
        f"{'kernel':28} {'arch':7} {'registers':>9} {'stack B':>7} {'spills':>6} {'shared B':>8}  loads | stores",
    ]
    for kernel in sorted(kernels, key=lambda k: (k.name, int(re.sub(r"\D", "", k.architecture) or 0))):
        code = kernel.code
        found.append(
            f"{kernel.name:28} {kernel.architecture:7} {kernel.registers:9} {kernel.stack:7} {code.spills:6} "
            f"{kernel.shared:8}  {machine_code.widths(code.loads)} | {machine_code.widths(code.stores)}"
        )
    return found


def triton_rows(*which):
    """The rows of Triton's kernels, with progress on stderr, and why there are none (or ``None``).

    which: arguments of :func:`triton_report.cases`.
    """
    reason = triton_report.reason()
    if reason is not None:
        return [], f"No Triton kernels to report: {reason}."
    cases, found = triton_report.cases(*which), []
    for number, rows in enumerate(triton_report.rows(cases), 1):
        found += rows
        print(f"\r{number} of {len(cases)} calls compiled", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found, None


def triton_lines(rows):
    """The report's part on Triton kernels, line by line."""
    import triton

    head = f"{'kernel':31} {'call':18} {'arch':7} {'launch':9} {'registers':>9} {'stack B':>7} {'spills':>6}"
    found = [
        f"Triton kernels, compiled by Triton {triton.__version__} for T2T's calls or the sizes asked for; fp32 is",
        "float32 without TF32, tf32 with it. Launch: tokens (or pixels) of a tile x warps x stages, and by how many",
        "features or columns at a time, if not all at once. Matrix instructions, loads and stores are those of the",
        "main loop; per token (of an image's gradient, pixel): instructions of all warps there, and where that loop",
        "walks the columns or outputs of one tile, those around it; what seldom runs left out.",
        f"{head} {'shared B':>8} {'per token':>9}  matrix | loads | stores",
    ]
    for row in rows:
        case, kernel, loop = row.case, row.kernel, row.kernel.loop
        call = f"{case.dtype} {' '.join(map(str, case.sizes))}"
        launch = f"{row.tokens or '-'}x{row.warps}x{row.stages}" + (f"/{row.chunk}" if row.chunk else "")
        per_token = "-" if row.instructions_per_token is None else f"{row.instructions_per_token:.1f}"
        matrix = " ".join(f"{kind}:{count}" for kind, count in sorted(loop.matrix.items())) or "none"
        found.append(
            f"{kernel.name:31} {call:18} {case.architecture:7} {launch:9} {kernel.registers:9} {kernel.stack:7} "
            f"{kernel.code.spills:6} {kernel.shared:8} {per_token:>9}  "
            f"{matrix} | {machine_code.widths(loop.loads)} | {machine_code.widths(loop.stores)}"
        )
    faults = [(row, fault) for row in rows for fault in row.faults()]
    found.append(f"{len(rows)} kernels, {len(faults)} faults." if faults else f"{len(rows)} kernels, none at fault.")
    found += [f"{row.kernel.name} of {row.case.words()}: {fault}" for row, fault in faults]
    return found


def registry_lines():
    """The report's part on operators and backends, line by line."""
    verdicts = {}
    for device in ("cpu", "cuda"):
        for op, backend, verdict in t2t_fast.explain(device=device, dtype=torch.float32).rows:
            if backend in COMPILED:
                words = "has a kernel" if verdict.startswith(("chosen", "available")) else verdict
                verdicts.setdefault((op, backend), {})[device] = words
    kernels = sum("has a kernel" in devices.values() for devices in verdicts.values())
    if kernels:
        head = f"{kernels} operator and backend pairs have compiled kernels."
    else:
        head = "No operator has a compiled kernel here: every one runs as plain PyTorch operations."
    found = [head]
    for (op, backend), devices in sorted(verdicts.items()):
        for words in dict.fromkeys(devices.values()):
            where = " and ".join(device for device in devices if devices[device] == words)
            found.append(f"{op:20} {backend:7} on {where:12} {words}")
    return found


def _arguments(given):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.report", description="What compiled kernels are."
    )
    parser.add_argument(
        "library", nargs="?", type=Path, help="a library with CUDA kernels instead of the installed one"
    )
    parser.add_argument("--triton-only", action="store_true", help="only the Triton kernels")
    some = parser.add_mutually_exclusive_group()
    some.add_argument(
        "--all", action="store_true", help="the attention in every padded shape, instead of T2T's kernels"
    )
    some.add_argument("--shape", type=int, nargs=2, metavar=("E", "M"), help="the attention in this shape instead")
    parser.add_argument("--full", action="store_true", help="Triton kernels with key mask, skip and gradient of w")
    some.add_argument("--few", action="store_true", help="T2T's calls with the launch parameters for few tokens")
    parser.add_argument(
        "--architecture",
        nargs="+",
        choices=tuple(triton_report.SHARED_LIMITS),
        default=list(triton_report.SHARED_LIMITS),
        help="Triton kernels for these only",
    )
    parser.add_argument("--json", type=Path, help="also write all that is known about each kernel to this file")
    found = parser.parse_args(given)
    if found.library is not None and not found.library.is_file():
        parser.error(f"no such file: {found.library}")
    return found


def main(given=None):
    """Print the report."""
    arguments = _arguments(given)
    cuda = []
    if not arguments.triton_only:
        cuda, reason = cuda_kernels(arguments.library)
        print("\n".join([*registry_lines(), "", *([reason] if reason else cuda_lines(cuda)), ""]))
    shapes = triton_report.every_shape() if arguments.all else [tuple(arguments.shape)] if arguments.shape else None
    triton, reason = triton_rows(shapes, arguments.full, arguments.few, arguments.architecture)
    print(reason if reason else "\n".join(triton_lines(triton)))
    if arguments.json is not None:
        found = {"cuda": [kernel.plain() for kernel in cuda], "triton": [row.plain() for row in triton]}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Report on compiled kernels: ``python -m benchmarks.kernels.report [LIBRARY]``; no GPU is needed.

CUDA kernels of the operators' library (the installed one, or LIBRARY) and Triton kernels, for every architecture:
registers, spills, shared memory, matrix instructions, and the widths of global loads and stores, read from the machine
code. The Triton kernels are compiled for T2T's shape, for another with ``--shape E M``, or for all with ``--all``.
"""

import argparse
import json
import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from t2t_fast import _extension

from ..measure.text_tables import aligned
from . import machine_code, triton_report

RESOURCES = ("registers", "stack B", "spills", "shared B")


def cuda_kernels(library=None):
    """The kernels of the given or installed library, and why there are none (or ``None``)."""
    if library is None:
        library, info = _extension.LIBRARY, _extension.build_info()
        if reason := _extension.operators_error():
            return [], f"No CUDA kernels to report: the native operators are missing: {reason}."
        if info is not None and info["cuda"] is None:
            return [], "No CUDA kernels to report: the native operators are built without CUDA."
    tool = machine_code.find_tool()
    if tool is None:
        return [], f"CUDA kernels not read: {machine_code.NO_TOOL}."
    kernels = machine_code.read(library, tool)
    return kernels, None if kernels else f"{Path(library).name} has no CUDA kernels."


def _resources(kernel):
    return kernel.registers, kernel.stack, kernel.code.spills, kernel.shared


def _accesses(code):
    """Loads and stores by their widths: ``16B:4 4B:1 | -``."""
    loads, stores = (
        " ".join(f"{width}B:{count}" for width, count in sorted(accesses.items(), reverse=True)) or "-"
        for accesses in (code.loads, code.stores)
    )
    return f"{loads} | {stores}"


def cuda_lines(kernels):
    """The report's section on CUDA kernels, line by line."""
    order = sorted(kernels, key=lambda k: (k.name, int(re.sub(r"\D", "", k.architecture) or 0)))
    rows = [(each.name, each.architecture, *_resources(each), _accesses(each.code)) for each in order]
    return [
        "CUDA kernels. Loads and stores: instructions of each width. Shared memory: what a kernel declares, including",
        "1024 bytes of the system from sm_90 on; tiled kernels request more at launch.",
        *aligned(("kernel", "arch", *RESOURCES, "loads | stores"), rows, RESOURCES),
    ]


def triton_rows(*which):
    """The rows of :func:`triton_report.cases` and ``None``, or why there are none; progress is printed on stderr."""
    if reason := triton_report.reason():
        return [], f"No Triton kernels to report: {reason}."
    cases, found = triton_report.cases(*which), []
    # one process per core; spawn: a process that has used CUDA or threads must not fork
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        for number, rows in enumerate(pool.map(triton_report.compiled, cases), 1):
            found += rows
            print(f"\r{number} of {len(cases)} calls compiled", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found, None


def _triton_cells(row):
    case, kernel, loop = row.case, row.kernel, row.kernel.loop
    return (
        kernel.name,
        f"{case.dtype} {' '.join(map(str, case.sizes))}",
        case.architecture,
        f"{row.tokens or '-'}x{row.warps}x{row.stages}" + (f"/{row.chunk}" if row.chunk else ""),
        *_resources(kernel),
        "-" if row.instructions_per_token is None else f"{row.instructions_per_token:.1f}",
        f"{' '.join(f'{kind}:{number}' for kind, number in sorted(loop.matrix.items())) or 'none'} | {_accesses(loop)}",
    )


def triton_lines(rows):
    """The report's section on Triton kernels, line by line."""
    import triton

    heads = ("kernel", "call", "arch", "launch", *RESOURCES, "per token", "matrix | loads | stores")
    faults = [(row, fault) for row in rows for fault in row.faults()]
    return [
        f"Triton kernels, compiled by Triton {triton.__version__}. fp32 is float32 without TF32, tf32 with it. Launch:",
        "tokens (or pixels) per tile x warps x stages / features or columns per step, if not all in one step. Matrix",
        "instructions, loads, stores: of the main loop. Per token (per pixel in an image's gradient): instructions of",
        "all warps in the main loop, plus those around it where the loop covers the columns or outputs of one tile;",
        "rarely executed code is not counted.",
        *aligned(heads, map(_triton_cells, rows), (*RESOURCES, "per token")),
        f"{len(rows)} kernels, {len(faults)} faults." if faults else f"{len(rows)} kernels, none at fault.",
        *(f"{' '.join(_triton_cells(row)[:3])}: {fault}" for row, fault in faults),
    ]


def main(argv=None):
    """Print the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.report", description=__doc__.splitlines()[0])
    parser.add_argument("library", nargs="?", type=Path, help="a library with CUDA kernels; default: the installed one")
    parser.add_argument("--triton-only", action="store_true", help="only the Triton kernels")
    shapes = parser.add_mutually_exclusive_group()
    shapes.add_argument("--all", action="store_true", help="the attention in every padded shape instead of T2T's calls")
    shapes.add_argument("--shape", type=int, nargs=2, metavar=("E", "M"), help="the attention in this shape instead")
    shapes.add_argument("--full", action="store_true", help="the attention with all its options instead")
    shapes.add_argument("--few", action="store_true", help="T2T's calls with the launch parameters for few tokens")
    for name, choices in (("architecture", triton_report.SHARED_LIMITS), ("dtype", triton_report.DTYPES)):
        words = f"compile Triton kernels for these; default: {' '.join(choices)}"
        parser.add_argument(f"--{name}", nargs="+", choices=tuple(choices), default=list(choices), help=words)
    parser.add_argument("--json", type=Path, help="also write everything known about each kernel to this file")
    arguments = parser.parse_args(argv)
    if arguments.library is not None and not arguments.library.is_file():
        parser.error(f"no such file: {arguments.library}")
    cuda = []
    if not arguments.triton_only:
        cuda, reason = cuda_kernels(arguments.library)
        print(reason if reason else "\n".join(cuda_lines(cuda)), end="\n\n")
    shapes = triton_report.EVERY_SHAPE if arguments.all else arguments.shape and [arguments.shape]
    shapes = [triton_report.FULL] if arguments.full else shapes
    triton, reason = triton_rows(shapes, arguments.few, arguments.architecture, arguments.dtype)
    print(reason if reason else "\n".join(triton_lines(triton)))
    if arguments.json is not None:
        content = {"cuda": cuda, "triton": [row.plain() for row in triton]}
        arguments.json.write_text(json.dumps(content, indent=1, default=vars) + "\n")


if __name__ == "__main__":
    main()

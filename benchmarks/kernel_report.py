"""What compiled kernels there are: ``python -m benchmarks.kernel_report [LIBRARY]``.

For every operator and compiled backend: that it has an implementation, or the registered reason why not. For every
CUDA kernel in the operators' library (the installed one, or the one given) and every architecture: registers, spills,
shared memory, and the widths of its global loads and stores, read from the machine code. No GPU is needed.
"""

import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

import t2t_fast
from t2t_fast import _extension

COMPILED = ("triton", "native")
TOOL = "cuobjdump"

# Template arguments of one letter in a mangled name.
_TYPES = {"f": "float", "d": "double", "t": "2 bytes", "j": "4 bytes", "m": "8 bytes"}
_FUNCTION = re.compile(r"^\s*Function\s*:?\s+([\w$]+)\s*:?\s*$")
_ARCHITECTURE = re.compile(r"^\s*(?:arch\s*=|code for)\s*(sm_\w+)")
_USAGE = re.compile(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:(\d+)\s+LOCAL:(\d+)")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)")


@dataclass
class Kernel:
    """One kernel of one architecture; ``loads`` and ``stores`` count global accesses by their bytes."""

    name: str
    architecture: str
    registers: int = 0
    stack: int = 0
    shared: int = 0
    spills: int = 0
    loads: Counter = field(default_factory=Counter)
    stores: Counter = field(default_factory=Counter)


def find_tool(name=TOOL):
    """A program of the CUDA toolkit: on ``PATH``, beside nvcc, or in Triton's package; ``None`` where it is nowhere."""
    found = shutil.which(name)
    if found:
        return found
    folders = [Path("/usr/local/cuda/bin")]
    if nvcc := shutil.which("nvcc"):
        # nvcc may be a wrapper script: what it would run tells where the toolkit is
        told = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
        folders += [Path(top) / "bin" for top in re.findall(r"^#\$ TOP=(.*)$", told, re.MULTILINE)]
    triton = find_spec("triton")
    if triton is not None and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return next((str(path) for folder in folders if (path := folder / name).is_file()), None)


def readable(mangled):
    """``split_tiles<float>`` from a mangled name, or the name itself where it is of another kind."""
    name, rest = mangled, mangled.removeprefix("_ZN" if mangled.startswith("_ZN") else "_Z")
    if rest == mangled:
        return mangled
    while number := re.match(r"(\d+)(?=\D)", rest):
        end = number.end() + int(number[1])
        name, rest = rest[number.end() : end], rest[end:]
    argument = re.match(r"I(?:([a-z])|N?(?:S\w*?_)?(\d+)(\w+))", rest)
    if argument is None:
        return name
    letter, length, text = argument.groups()
    return f"{name}<{_TYPES.get(letter, letter) if letter else text[: int(length)]}>"


def _width(opcode):
    """Bytes that a load or store moves per thread."""
    for part in opcode.split("."):
        if match := re.fullmatch(r"[US]?(8|16|32|64|128|256)", part):
            return int(match[1]) // 8
    return 4


def parse(usage, code):
    """Kernels from what ``cuobjdump -res-usage`` and ``cuobjdump -sass`` print."""
    kernels, architecture, kernel = {}, "", None

    def at(name):
        return kernels.setdefault((architecture, name), Kernel(readable(name), architecture))

    for line in usage.splitlines():
        if match := _ARCHITECTURE.match(line):
            architecture = match[1]
        elif match := _FUNCTION.match(line):
            kernel = at(match[1])
        elif kernel and (match := _USAGE.search(line)):
            kernel.registers, kernel.stack, kernel.shared = (int(match[i]) for i in (1, 2, 3))
    kernel = None
    for line in code.splitlines():
        if match := _ARCHITECTURE.match(line):
            architecture, kernel = match[1], None
        elif match := _FUNCTION.match(line):
            kernel = at(match[1])
        elif kernel and (match := _INSTRUCTION.match(line)):
            opcode = match[1]
            kind = opcode.partition(".")[0]
            if kind in ("LDG", "LDGSTS"):
                kernel.loads[_width(opcode)] += 1
            elif kind == "STG":
                kernel.stores[_width(opcode)] += 1
            elif kind in ("LDL", "STL"):
                kernel.spills += 1
    return list(kernels.values())


def cuda_kernels(library, tool):
    """The kernels in a library; empty where it has none.

    Raises:
        subprocess.CalledProcessError: the tool failed.
    """
    texts = []
    for option in ("-res-usage", "-sass"):
        run = subprocess.run([tool, option, str(library)], capture_output=True, text=True)
        if "does not contain device code" in run.stdout + run.stderr:
            return []
        run.check_returncode()
        texts.append(run.stdout + run.stderr)
    return parse(*texts)


def installed_library():
    """The operators' library with CUDA kernels and ``None``, or ``None`` and why there is none."""
    if reason := _extension.operators_error():
        return None, f"the native operators are missing: {reason}"
    info = _extension.build_info()
    if info is not None and info["cuda"] is None:
        return None, "the native operators are built without CUDA"
    return _extension.LIBRARY, None


def _widths(accesses):
    return "-" if not accesses else " ".join(f"{width}B:{accesses[width]}" for width in sorted(accesses, reverse=True))


def cuda_lines(library=None):
    """The report's part on CUDA kernels, line by line."""
    if library is None:
        library, reason = installed_library()
        if library is None:
            return [f"No CUDA kernels to report: {reason}."]
    tool = find_tool()
    if tool is None:
        return [f"CUDA kernels not read: {TOOL} is neither on PATH nor in a CUDA toolkit nor in Triton's package."]
    kernels = cuda_kernels(library, tool)
    if not kernels:
        return [f"{Path(library).name} has no CUDA kernels."]
    found = [
        "CUDA kernels; loads and stores: how many instructions of each width. Shared memory is what a kernel declares;",
        "1024 bytes of it the system's own from sm_90 on; tiled kernels ask for more at the launch.",
        f"{'kernel':28} {'arch':7} {'registers':>9} {'stack B':>7} {'spills':>6} {'shared B':>8}  loads | stores",
    ]
    for kernel in sorted(kernels, key=lambda k: (k.name, int(re.sub(r"\D", "", k.architecture) or 0))):
        found.append(
            f"{kernel.name:28} {kernel.architecture:7} {kernel.registers:9} {kernel.stack:7} {kernel.spills:6} "
            f"{kernel.shared:8}  {_widths(kernel.loads)} | {_widths(kernel.stores)}"
        )
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


def lines(library=None):
    """The report, line by line."""
    return [*registry_lines(), "", *cuda_lines(library)]


def main(arguments=None):
    """Print the report."""
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) > 1 or (given and not Path(given[0]).is_file()):
        print(f"usage: python -m benchmarks.kernel_report [LIBRARY]; no such file: {' '.join(given)}", file=sys.stderr)
        return 2
    print("\n".join(lines(given[0] if given else None)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

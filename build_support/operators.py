"""Builds the library of operators from csrc/, against LibTorch's stable ABI: one file for every PyTorch and Python."""

import hashlib
import os
import shlex
from pathlib import Path
from typing import NamedTuple

from .compiling import Step, job_count, run_steps
from .toolchain import Torch, find_architectures, find_compiler, find_toolkit, find_torch, gencode

FLAGS = ["-std=c++20", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-g0"]
CUDA_FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11, the oldest PyTorch that the library supports
FOLDER = Path("build", "operators")


class Operators(NamedTuple):
    """The built library, and what it was built with; ``cuda`` is ``None`` for the CPU only."""

    library: Path
    headers: Path
    torch: Torch
    cuda: str | None
    architectures: list[str]


def build(root, with_cuda):
    """Build the library in ``root``/build, which keeps the object files for the next build.

    Raises:
        CannotBuild: something is missing, or a compiler failed.
    """
    compiler = find_compiler()
    torch = find_torch()
    headers = torch.root / "include"
    host = [*compiler, *FLAGS, "-fPIC", "-Icsrc", TARGET, "-isystem", str(headers)]
    host += [f"-ffile-prefix-map={headers}=torch"]  # no path of this machine in error messages
    host += shlex.split(f"{os.environ.get('CPPFLAGS', '')} {os.environ.get('CXXFLAGS', '')}")
    compilers = {"csrc/operators.cpp": host, "csrc/cpu/**/*.cpp": host}
    # libtorch.so depends on libtorch_cpu.so and, in a CUDA build of PyTorch, on libtorch_cuda.so. The loader finds them
    # by name among the libraries that PyTorch has loaded, so no path is recorded and the file works with every PyTorch.
    libraries = ["-L", str(torch.root / "lib"), "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
    toolkit, architectures = None, []
    if with_cuda:
        toolkit = find_toolkit(torch)
        architectures = find_architectures(toolkit)
        compilers["csrc/cuda/*.cpp"] = [*host, "-DUSE_CUDA", *toolkit.includes]
        gencodes = [flag for name in architectures for flag in gencode(name)]
        compilers["csrc/cuda/*.cu"] = [*nvcc(toolkit, compiler), *gencodes]
        # a static CUDA runtime with hidden symbols, since PyTorch's may have another version
        libraries += [*toolkit.libraries, "-lcudart_static", "-lrt", "-lpthread", "-ldl", "-Wl,--exclude-libs,ALL"]

    compilations = [
        compilation(source.relative_to(root), command, torch.version)
        for pattern, command in compilers.items()
        for source in sorted(root.glob(pattern))
    ]
    objects = [step.output for step in compilations]
    linker = [*compiler, "-shared", *shlex.split(os.environ.get("LDFLAGS", ""))]
    library = FOLDER / digest([*linker, *map(str, objects), *libraries]) / "_ops.so"
    link = Step(library, objects, [*linker, "-o", str(library), *map(str, objects), *libraries])
    run_locked(root, compilations, link)
    return Operators(root / library, headers, torch, toolkit and toolkit.version, architectures)


def nvcc(toolkit, compiler):
    """nvcc with the C++ compiler of ``CXX``, else with its default one."""
    return [toolkit.nvcc, *CUDA_FLAGS, "-Icsrc", *(["-ccbin", compiler[0]] if os.environ.get("CXX") else [])]


def compilation(source, command, torch):
    """The step that compiles a source; the output's folder depends on the flags and PyTorch's version."""
    output = FOLDER / digest([torch, *command]) / source.with_suffix(f"{source.suffix}.o")
    return Step(output, [source], [*command, "-MD", "-MF", f"{output}.d", "-c", str(source), "-o", str(output)])


def digest(words):
    """A short hash of a list of words."""
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:12]


def run_locked(root, compilations, link):
    """Run the steps under a lock, so that builds of one folder do not run at the same time."""
    import fcntl  # on Linux, the only system that find_torch accepts

    jobs = job_count()
    environment = dict(os.environ)
    kernels = sum(step.inputs[0].suffix == ".cu" for step in compilations)
    if kernels:  # by the environment, since it does not affect the output and commands are hashed
        threads = max(1, jobs // kernels)
        environment["NVCC_APPEND_FLAGS"] = f"{environment.get('NVCC_APPEND_FLAGS', '')} --threads={threads}"
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    with open(root / FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run_steps(root, FOLDER, compilations, link, jobs, environment)

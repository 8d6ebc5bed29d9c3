"""Finds what the operators are built with: PyTorch, a C++ compiler, the CUDA toolkit and its architectures."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

OLDEST_TORCH = (2, 11)
USUAL_NVCC = "/usr/local/cuda/bin/nvcc"
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")  # the last one that nvcc knows is built as PTX too


class CannotBuild(Exception):
    """What the message says is missing or has failed; a smaller build may do without it."""


class Torch(NamedTuple):
    """The PyTorch to build against: its folder, its version, and that of its CUDA (``None``: without CUDA)."""

    root: Path
    version: str
    cuda: str | None


class Toolkit(NamedTuple):
    """A CUDA toolkit: its nvcc, its version, and the flags that lead a C++ compiler to its headers and libraries."""

    nvcc: str
    version: str
    includes: list[str]
    libraries: list[str]


def find_compiler():
    """The C++ compiler's command line: ``CXX``, else the one that built Python, else ``c++``."""
    chosen = os.environ.get("CXX")
    command = shlex.split(chosen or sysconfig.get_config_var("CXX") or "c++")
    if not chosen and shutil.which(command[0]) is None:
        command = ["c++"]
    if shutil.which(command[0]) is None:
        raise CannotBuild(f"there is no C++ compiler: {command[0]} is not found")
    return command


def find_torch():
    """The PyTorch that this Python imports, if operators can be built against it."""
    if sys.platform != "linux":
        raise CannotBuild("they are built on Linux only")
    try:
        import torch
    except (ImportError, OSError) as error:
        raise CannotBuild(
            f"this build cannot import PyTorch ({error}); pip install --no-build-isolation uses the installed one"
        ) from error
    found = Torch(Path(torch.__file__).parent, str(torch.__version__), torch.version.cuda)
    if tuple(int(number) for number in found.version.split(".")[:2]) < OLDEST_TORCH:
        raise CannotBuild(f"PyTorch {found.version} is older than {'.'.join(map(str, OLDEST_TORCH))}")
    if not (found.root / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        raise CannotBuild(f"PyTorch {found.version} is installed without its C++ headers")
    return found


def find_toolkit(torch):
    """The CUDA toolkit that ``CUDA_HOME`` (or ``CUDA_PATH``) names, else that of the nvcc on ``PATH``."""
    if torch.cuda is None:
        raise CannotBuild(f"PyTorch {torch.version} is built without CUDA")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which(os.path.join(home, "bin", "nvcc") if home else "nvcc")
    if nvcc is None and home:
        raise CannotBuild(f"CUDA_HOME is {home}, where no bin/nvcc can be run")
    nvcc = nvcc or shutil.which(USUAL_NVCC)
    if nvcc is None:
        raise CannotBuild("nvcc is not found, neither by CUDA_HOME nor on PATH")
    # A dry run tells version and folders of the toolkit also where nvcc is a script that starts another one.
    told = ask(nvcc, "--dryrun", "none.cu")
    version = re.search(r"-D__CUDACC_VER_MAJOR__=(\d+) -D__CUDACC_VER_MINOR__=(\d+)", told)
    if version is None:
        raise CannotBuild(f"{nvcc} --dryrun does not tell its version")
    if version[1] != torch.cuda.split(".")[0]:
        raise CannotBuild(f"nvcc is of CUDA {version[1]}.{version[2]}, PyTorch {torch.version} of CUDA {torch.cuda}")
    flags = {name: shlex.split(words) for name, words in re.findall(r"^#\$ (\w+)=(.*)$", told, re.MULTILINE)}
    includes = flags.get("INCLUDES", []) + flags.get("SYSTEM_INCLUDES", [])
    return Toolkit(nvcc, f"{version[1]}.{version[2]}", includes, flags.get("LIBRARIES", []))


def ask(nvcc, *arguments):
    """What nvcc answers, or why it cannot."""
    try:
        result = subprocess.run([nvcc, *arguments], capture_output=True, text=True)
    except OSError as error:
        raise CannotBuild(f"{nvcc} does not run: {error}") from error
    if result.returncode != 0:
        last = (result.stderr or result.stdout).strip().splitlines()[-1:] or [f"exit status {result.returncode}"]
        raise CannotBuild(f"{nvcc} fails: {last[0]}")
    return result.stdout + result.stderr


def find_architectures(toolkit):
    """What ``TORCH_CUDA_ARCH_LIST`` names, as in ``8.0;9.0a+PTX``, else what the toolkit can build of the default."""
    known = {int(digits) for digits in re.findall(r"compute_(\d+)", ask(toolkit.nvcc, "--list-gpu-arch"))}
    chosen = re.split(r"[;\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;"))
    if chosen == [""]:
        chosen = [name for name in ARCHITECTURES if int(name.replace(".", "")) in known]
        return [*chosen[:-1], *(f"{name}+PTX" for name in chosen[-1:])]
    for name in chosen:
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", name)
        if match is None:
            raise CannotBuild(f"TORCH_CUDA_ARCH_LIST must be like '8.0;9.0a;12.0+PTX', got {name!r} in it")
        if int(match[1] + match[2]) not in known:
            there = f"{min(known) / 10} to {max(known) / 10}"
            raise CannotBuild(f"TORCH_CUDA_ARCH_LIST names {name}, nvcc {toolkit.version} builds {there}")
    return chosen


def gencode(architecture):
    """nvcc's flags for one: machine code, and with ``+PTX`` also code that the driver translates for newer devices."""
    digits = architecture.removesuffix("+PTX").replace(".", "")
    flags = [f"-gencode=arch=compute_{digits},code=sm_{digits}"]
    if architecture.endswith("+PTX"):
        flags.append(f"-gencode=arch=compute_{digits},code=compute_{digits}")
    return flags

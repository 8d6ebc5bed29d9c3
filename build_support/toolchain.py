"""Finds the tools for building the operators: PyTorch, a C++ compiler, the CUDA toolkit and its architectures.

PyTorch is located but never imported: a build against the stable ABI needs only its headers, its libraries and the text
of ``torch/version.py``.
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

OLDEST_TORCH = (2, 11)
USUAL_NVCC = "/usr/local/cuda/bin/nvcc"
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")  # the last one that nvcc knows is built as PTX too


class CannotBuild(Exception):
    """Something is missing or has failed, as the message says; a smaller build may be possible without it."""


class Torch(NamedTuple):
    """The PyTorch to build against.

    ``root`` is its folder, ``cuda`` its CUDA version (``None``: without CUDA), ``place`` the environment that has it
    (empty: that of the running Python).
    """

    root: Path
    version: str
    cuda: str | None
    place: str = ""

    @property
    def name(self):
        """Its name in messages."""
        return f"PyTorch {self.version}{self.place and ' of '}{self.place}"


class Toolkit(NamedTuple):
    """A CUDA toolkit: nvcc, version, and the C++ compiler's flags for its headers and libraries."""

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
    """The PyTorch to build against, if operators can be built against it.

    That is the one that this Python would import. In an isolated build there is none on the path; then it is that of
    the first environment that has one: the environment that pip installs into, the active one, the front end's own, the
    base Python. Operators built with one PyTorch run under every other one.

    Raises:
        CannotBuild: there is none, or the first one is unsuitable.
    """
    if sys.platform != "linux":
        raise CannotBuild("they are built on Linux only")
    spec = find_spec("torch")
    if spec is not None and spec.origin is not None:
        return described(Path(spec.origin).parent, "")
    outside, asked = front_end(), set()
    for interpreter, place in interpreters(outside):
        if interpreter not in asked and (root := located(interpreter, outside.variables)) is not None:
            return described(root, place)
        asked.add(interpreter)
    raise CannotBuild("no PyTorch is found; install it first, and activate its environment")


class FrontEnd(NamedTuple):
    """The process that started this build: its working folder, command line and environment variables.

    pip and uv change variables for the build only, so these are the user's.
    """

    folder: str
    command: list[str]
    variables: dict[str, str]


def front_end():
    """The front end according to /proc; if that cannot be read, this process's own folder and variables."""
    process = Path("/proc", str(os.getppid()))

    def words(name):
        try:
            return [os.fsdecode(word) for word in (process / name).read_bytes().split(b"\0") if word]
        except OSError:
            return []

    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    variables = dict(word.partition("=")[::2] for word in words("environ"))
    return FrontEnd(os.path.realpath(process / "cwd"), words("cmdline"), variables or own)


def interpreters(outside):
    """The Pythons whose PyTorch an isolated build may use, best first: (path, description)."""
    # pip runs an isolated build with the interpreter of the target environment, and hides its packages
    yield sys.executable, "the environment it installs into"
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        for folder in filter(None, (outside.variables.get(name), os.environ.get(name))):
            yield os.path.join(folder, "bin", "python"), "the active environment"
    # as in "ENV/bin/python -m build" and "uv pip install --python ENV"; .venv is uv's default
    for word in [*outside.command, ".venv"]:
        path = os.path.join(outside.folder, word.removeprefix("--python="))
        python = path if re.fullmatch(r"python[\d.]*", os.path.basename(path)) else os.path.join(path, "bin", "python")
        yield python, "the front end's environment"
    yield getattr(sys, "_base_executable", None) or sys.executable, "the base Python"


LOCATE = """
import sys
from importlib.util import find_spec
sys.path = [folder for folder in sys.path if folder]
spec = find_spec("torch")
print(spec.origin if spec is not None else None)
"""


def located(interpreter, variables):
    """The folder of the PyTorch that an interpreter would import with these environment variables, or ``None``."""
    if not (os.path.isfile(interpreter) and os.access(interpreter, os.X_OK)):
        return None
    try:
        result = subprocess.run([interpreter, "-c", LOCATE], env=variables, capture_output=True, text=True)
    except OSError:
        return None
    last = result.stdout.strip().rpartition("\n")[2]  # a .pth file may print something first
    return None if result.returncode != 0 or last in ("", "None") else Path(last).parent


def described(root, place):
    """The PyTorch in a folder.

    Raises:
        CannotBuild: no operators can be built against it.
    """
    try:
        told = {name: text for name, text in assignments(root / "version.py") if name in ("__version__", "cuda")}
    except (OSError, SyntaxError) as error:
        raise CannotBuild(f"PyTorch{place and ' of '}{place} does not tell its version: {error}") from error
    found = Torch(root, str(told.get("__version__")), told.get("cuda"), place)
    number = re.match(r"(\d+)\.(\d+)", found.version)
    if number is None:
        raise CannotBuild(f"{found.name} has no version of the form 2.11")
    if tuple(map(int, number.groups())) < OLDEST_TORCH:
        raise CannotBuild(f"{found.name} is older than {'.'.join(map(str, OLDEST_TORCH))}")
    if not (root / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        raise CannotBuild(f"{found.name} is installed without its C++ headers")
    try:
        kinds = [kind_of_binary(path) for path in (root / "lib" / "libtorch.so", "/proc/self/exe")]
    except OSError as error:
        raise CannotBuild(f"{found.name} is installed without its libraries: {error.strerror}") from error
    if kinds[0] != kinds[1]:
        raise CannotBuild(f"{found.name} is built for another kind of processor")
    return found


def assignments(path):
    """(name, value) of each constant that a module's source assigns to a name; nothing is executed."""
    for node in ast.parse(path.read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(getattr(node, "value", None), ast.Constant):
            yield from ((target.id, node.value.value) for target in targets if isinstance(target, ast.Name))


def kind_of_binary(path):
    """The processor that a binary is for, from its ELF header: word size, byte order, instruction set."""
    with open(path, "rb") as file:
        head = file.read(20)
    return head[4:6], head[18:20]


def find_toolkit(torch):
    """The CUDA toolkit of ``CUDA_HOME`` (or ``CUDA_PATH``), else that of the nvcc on ``PATH``."""
    if torch.cuda is None:
        raise CannotBuild(f"{torch.name} is built without CUDA")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which(os.path.join(home, "bin", "nvcc") if home else "nvcc")
    if nvcc is None and home:
        raise CannotBuild(f"CUDA_HOME is {home}, where no bin/nvcc can be run")
    nvcc = nvcc or shutil.which(USUAL_NVCC)
    if nvcc is None:
        raise CannotBuild("nvcc is not found, neither by CUDA_HOME nor on PATH")
    # a dry run prints the toolkit's version and folders, also where nvcc is a script that starts another nvcc
    told = ask(nvcc, "--dryrun", "none.cu")
    version = re.search(r"-D__CUDACC_VER_MAJOR__=(\d+) -D__CUDACC_VER_MINOR__=(\d+)", told)
    if version is None:
        raise CannotBuild(f"{nvcc} --dryrun does not tell its version")
    if version[1] != torch.cuda.split(".")[0]:
        raise CannotBuild(f"nvcc is of CUDA {version[1]}.{version[2]}, {torch.name} is built with CUDA {torch.cuda}")
    flags = {name: shlex.split(words) for name, words in re.findall(r"^#\$ (\w+)=(.*)$", told, re.MULTILINE)}
    includes = flags.get("INCLUDES", []) + flags.get("SYSTEM_INCLUDES", [])
    return Toolkit(nvcc, f"{version[1]}.{version[2]}", includes, flags.get("LIBRARIES", []))


def ask(nvcc, *arguments):
    """The output of nvcc."""
    try:
        result = subprocess.run([nvcc, *arguments], capture_output=True, text=True)
    except OSError as error:
        raise CannotBuild(f"{nvcc} does not run: {error}") from error
    if result.returncode != 0:
        last = (result.stderr or result.stdout).strip().splitlines()[-1:] or [f"exit status {result.returncode}"]
        raise CannotBuild(f"{nvcc} fails: {last[0]}")
    return result.stdout + result.stderr


def find_architectures(toolkit):
    """The architectures of ``TORCH_CUDA_ARCH_LIST``, as in ``8.0;9.0a+PTX``, else the default ones that nvcc knows."""
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
    """nvcc's flags for one architecture: machine code, and with ``+PTX`` also PTX for newer devices."""
    digits = architecture.removesuffix("+PTX").replace(".", "")
    flags = [f"-gencode=arch=compute_{digits},code=sm_{digits}"]
    if architecture.endswith("+PTX"):
        flags.append(f"-gencode=arch=compute_{digits},code=compute_{digits}")
    return flags

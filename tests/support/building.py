"""Shared by the tests of building and installing: copies of the project, stand-ins for missing tools.

Builds run on copies in temporary folders, offline, with the tools of the running environment.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

from build_support.toolchain import (
    CannotBuild,
    find_architectures,
    find_compiler,
    find_toolkit,
    find_torch,
    located,
)
from support import ROOT

MODULE = f"_C{EXTENSION_SUFFIXES[0]}"
LIBRARY = "_ops.so"
NOWHERE = {"CC": "/nowhere/cc", "CXX": "/nowhere/c++"}
TINY_MODULE = """#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C"};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
"""


def reason(find, *arguments):
    """The reason why ``find`` fails, or ``None``."""
    try:
        find(*arguments)
    except CannotBuild as error:
        return str(error)
    return None


NO_COMPILER = reason(find_compiler)
NO_OPERATORS = NO_COMPILER or reason(find_torch)
NO_CUDA = NO_OPERATORS or reason(lambda: find_architectures(find_toolkit(find_torch())))
# not with find_spec: setuptools' import hook takes it for a running pip, and torch.compile fails in the whole process
PIP = any(metadata.distributions(name="pip"))

# from an isolated virtual environment a build would still find the PyTorch of the base Python
BASE = getattr(sys, "_base_executable", None) or sys.executable
BASE_HAS_TORCH = located(BASE, {}) is not None

needs_no_torch = pytest.mark.skipif(BASE_HAS_TORCH, reason="the base Python here has PyTorch, so every build finds it")
needs_compiler = pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))
needs_operators = pytest.mark.skipif(NO_OPERATORS is not None, reason=f"operators cannot be built: {NO_OPERATORS}")
needs_pip = pytest.mark.skipif(not PIP, reason="pip is not installed here")


def copy_project(folder, kernels=True, module=True):
    """Copy the files that an installation needs, without binaries and git.

    Without ``kernels`` only the operators' schemas are compiled; without ``module``, ``_C`` is an empty one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "Makefile"):
        shutil.copy(ROOT / name, folder)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("build_support", "csrc", "t2t_fast"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    if not kernels:
        for name in ("cpu", "cuda"):
            shutil.rmtree(folder / "csrc" / name)
    if not module:
        (folder / "csrc" / "bindings.cpp").write_text(TINY_MODULE)
    return folder


def stand_in_torch(folder, version="2.11.0+cpu", cuda=None):
    """A PYTHONPATH with the parts of PyTorch ``version`` that a build uses; headers and libraries are the real ones.

    It cannot be imported, since a build need not import it.
    """
    package = folder / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('a build imports PyTorch')")
    (package / "version.py").write_text(f"__version__ = {version!r}\ncuda: str | None = {cuda!r}\n")
    for name in ("include", "lib"):
        (package / name).symlink_to(Path(torch.__file__).parent / name)
    return str(folder)


def tools(folder, *names):
    """A PYTHONPATH with only these packages of the running environment, as a front end passes to a build."""
    folder.mkdir()
    for name in names:
        package = metadata.distribution(name)
        for top in {file.parts[0] for file in package.files} - {"..", "__pycache__"}:
            (folder / top).symlink_to(package.locate_file(top))
    return str(folder)


def stand_in_nvcc(home, version="13.0", architectures=(75, 80, 90, 100), compiles="exit 1"):
    """A CUDA_HOME whose nvcc answers queries and runs ``compiles`` instead of compiling."""
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    major, minor = version.split(".")
    nvcc.write_text(f"""#!/bin/sh
case "$*" in
*--dryrun*)
  echo '#$ TOP={home}' >&2
  echo '#$ INCLUDES="-I{home}/include"  ' >&2
  echo '#$ SYSTEM_INCLUDES="-isystem" "{home}/include/cccl"  ' >&2
  echo '#$ LIBRARIES=  "-L{home}/lib"' >&2
  echo '#$ gcc -D__CUDACC_VER_MAJOR__={major} -D__CUDACC_VER_MINOR__={minor} "none.cu"' >&2;;
*--list-gpu-arch*) printf 'compute_%s\\n' {" ".join(map(str, architectures))};;
*) {compiles};;
esac
""")
    nvcc.chmod(0o755)
    return home


def run(folder, *command, **variables):
    """Run a command; the result's stdout contains both streams."""
    decided = {"T2T_FAST_BUILD", "SOURCE_DATE_EPOCH", "PYTHONPATH", "CC", "CXX", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST"}
    decided |= {"MAKEFLAGS", "MAKELEVEL", "VIRTUAL_ENV", "CONDA_PREFIX"}
    environment = {name: value for name, value in os.environ.items() if name not in decided}
    environment |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    return subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def python(folder, *arguments, **variables):
    return run(folder, sys.executable, *arguments, **variables)


def build_in_place(folder, interpreter=sys.executable, **variables):
    """Through a shell: a build reads the environment of its parent process, which must not be pytest's."""
    command = [interpreter, "setup.py", "build_ext", "--inplace"]
    return run(folder, shutil.which("sh"), "-c", '"$@"; exit $?', "sh", *command, **variables)


def build_wheel(source, into, **variables):
    """The path of the wheel that pip builds from a folder or an archive, without network, isolation or dependencies."""
    arguments = ["-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", into, source]
    result = python(source.parent, *arguments, **variables)
    assert result.returncode == 0, result.stdout
    (wheel,) = into.glob("*.whl")
    return wheel


def pip_install(interpreter, source, *options, **variables):
    command = [sys.executable, "-m", "pip", "--python", interpreter, "install", "--no-deps"]
    result = run(source.parent, *command, *options, source, **variables)
    assert result.returncode == 0, result.stdout
    return result


def make_wheelhouse(folder, *names):
    """A folder with wheels of these installed packages, from which an isolated build installs them without network."""
    folder.mkdir()
    for name in names:
        package = metadata.distribution(name)
        (tag,) = re.findall("^Tag: (.*)$", package.read_text("WHEEL"), re.MULTILINE)
        files = [file for file in package.files if ".." not in file.parts and file.suffix != ".pyc"]
        (record,) = (file for file in files if file.name == "RECORD" and len(file.parts) == 2)
        with zipfile.ZipFile(folder / f"{name}-{package.version}-{tag}.whl", "w") as wheel:
            for file in files:
                if file is not record:
                    wheel.write(file.locate(), str(file))
            wheel.writestr(str(record), "".join(f"{file},,\n" for file in files))
    return str(folder)


def make_venv(folder, *paths):
    """The Python of an empty virtual environment that also imports from these folders, after its own packages."""
    folder.mkdir(parents=True, exist_ok=True)
    run(folder, sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    interpreter = folder / "venv" / "bin" / "python"
    own = run(folder, interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    Path(own, "outer.pth").write_text("\n".join(map(str, paths)))
    return interpreter


def said(result):
    """The single line in which setup.py reports what it built."""
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("t2t_fast:")]
    return line


def binaries(folder):
    """The names of a project's native libraries."""
    return {path.name for path in (folder / "t2t_fast").glob("*.so")}

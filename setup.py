"""Builds the native code of ``t2t_fast``; the metadata is in pyproject.toml.

There are two files: ``_ops.so`` with the operators (LibTorch's stable ABI), and the module ``_C`` with build
information and the CPU's features. ``T2T_FAST_BUILD`` selects what to build:
  auto  (default) what this machine can, down to a pure-Python package; never breaks an installation
  cuda  everything, or an error that says why not
  cpu   everything but the CUDA operators, or an error that says why not
  none  a pure-Python package
``T2T_FAST_LOCAL_VERSION`` appends a local version that names the operators inside, as in 0.1.0+cpu and 0.1.0+cu130.
"""

import json
import os
import re
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info
from setuptools.errors import BaseError, CCompilerError, SetupError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # pip runs this file without its folder on sys.path

from build_support import operators  # noqa: E402
from build_support.toolchain import CannotBuild, find_compiler  # noqa: E402

OPERATORS, MODULE = "t2t_fast._ops", "t2t_fast._C"
PARTS = {"auto": ("cuda", "cpu"), "cuda": ("cuda",), "cpu": ("cpu",), "none": ()}  # the first one that can be built


def build_mode():
    """The validated value of ``T2T_FAST_BUILD``."""
    mode = os.environ.get("T2T_FAST_BUILD", "auto")
    if mode not in PARTS:
        raise SetupError(f"T2T_FAST_BUILD must be one of {', '.join(PARTS)}, got {mode!r}")
    return mode


def local_version():
    """The value of ``T2T_FAST_LOCAL_VERSION``; empty by default. BuildExt compares it with what is built."""
    label = os.environ.get("T2T_FAST_LOCAL_VERSION", "")
    if label and not re.fullmatch(r"cpu|cu\d+", label):
        raise SetupError(f"T2T_FAST_LOCAL_VERSION must be like cpu or cu130, got {label!r}")
    return label


def commit():
    """The checkout's commit, with "+" if files differ from it; empty where there is no git checkout."""
    if not (ROOT / ".git").exists():  # a copy inside another project's checkout must not report that project's commit
        return ""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def build_date():
    """Now, or the moment that ``SOURCE_DATE_EPOCH`` fixes for a reproducible build, in UTC."""
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat()


def pybind11_headers(built):
    """The folder of pybind11's headers: of the package, else of the copy in PyTorch."""
    try:
        import pybind11
    except ImportError:
        if built is None:
            raise CannotBuild("pybind11 is not installed") from None
        return str(built.headers)
    return pybind11.get_include()


class EggInfo(egg_info):
    """Appends :func:`local_version` to the version."""

    def finalize_options(self):
        if label := local_version():
            self.tag_build = f"+{label}"
        super().finalize_options()


class BuildExt(build_ext):
    """Builds the parts of :func:`build_mode` and prints one line: what was built, and why not more."""

    def run(self):
        self.mode = build_mode()
        self.missing = {}  # part -> why it is not built
        self.folders = [self.build_lib, *([ROOT] if self.inplace else [])]  # setuptools clears inplace while it builds
        self.operators = self.build_operators()
        if self.operators is None:
            self.leave_out(OPERATORS)
        if self.mode == "none":
            self.leave_out(MODULE)
        super().run()
        self.check_local_version()
        self.record()
        print(f"t2t_fast: {self.summary()} (T2T_FAST_BUILD={self.mode})", flush=True)

    def check_local_version(self):
        """Refuse a local version that does not name the operators inside."""
        cuda = self.operators and self.operators.cuda
        inside = f"cu{cuda.replace('.', '')}" if cuda else "cpu" if self.operators else ""
        if (label := local_version()) and label != inside:
            what = f"operators that are {inside}" if inside else "no operators"
            raise SetupError(f"T2T_FAST_LOCAL_VERSION={label}: this build has {what}: {self.summary()}")

    def record(self):
        """Write the mode and the missing parts to ``_build.json`` in the package, for ``_extension.py``."""
        path = Path(self.folders[-1], "t2t_fast", "_build.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"mode": self.mode, "missing": self.missing}) + "\n")

    def build_operators(self):
        """The library with as many of the requested operators as can be built, or ``None``."""
        for part in PARTS[self.mode]:
            try:
                return operators.build(ROOT, with_cuda=part == "cuda")
            except (CannotBuild, OSError) as error:
                self.give_up(part, "the operators", error)
        return None

    def give_up(self, part, name, reason):
        """Record that a part is not built; an error if it was requested explicitly."""
        if self.mode != "auto":
            raise SetupError(f"T2T_FAST_BUILD={self.mode}: {name} cannot be built: {reason}")
        self.missing[part] = str(reason)

    def build_extensions(self):
        for extension in list(self.extensions):
            if extension.name == OPERATORS:
                path = self.get_ext_fullpath(extension.name)
                self.mkpath(os.path.dirname(path))
                self.copy_file(str(self.operators.library), path)
                continue
            try:
                find_compiler()
                self.configure(extension)
                self.build_extension(extension)
            except (BaseError, CCompilerError, CannotBuild, OSError) as error:
                compiler_failed = isinstance(error, CCompilerError)
                reason = "a compiler failed, its messages are above" if compiler_failed else error
                self.give_up(MODULE, MODULE, reason)
                self.leave_out(MODULE)

    def copy_file(self, infile, outfile, *args, **kwargs):
        """Copy atomically: a process that imports the package meanwhile finds the complete old or new file."""
        path = Path(outfile)
        beside = path.with_name(f".{os.getpid()}-{path.name}")  # with the same suffix, so that it is treated alike
        _, copied = super().copy_file(infile, str(beside), *args, **kwargs)
        if beside.exists():  # a dry run copies nothing
            beside.replace(path)
        return outfile, copied

    def configure(self, extension):
        """Set the module's include path, flags and build information."""
        self.force = True  # an old object would contain an old commit, date and mode
        built = self.operators
        told = {
            "MODE": self.mode,
            "FLAGS": " ".join(operators.FLAGS),
            "OPERATORS": "" if built is None else "cpu" if built.cuda is None else "cpu cuda",
            "TORCH": built.torch.version if built else "",
            "CUDA": built.cuda or "" if built else "",
            "ARCHITECTURES": " ".join(built.architectures) if built else "",
            "COMMIT": commit(),
            "DATE": build_date(),
        }
        extension.include_dirs = [pybind11_headers(built)]
        extension.extra_compile_args = operators.FLAGS
        extension.define_macros = [(f"T2T_FAST_{name}", f'"{text}"') for name, text in told.items()]

    def summary(self):
        """What was built, and why not more."""
        names = {extension.name for extension in self.extensions}
        if not names:
            reasons = dict.fromkeys(self.missing[part] for part in ("cpu", MODULE) if part in self.missing)
            return f"pure Python, nothing native is built: {'; '.join(reasons) or 'not asked for'}"
        built = [MODULE] if MODULE in names else []
        if self.operators is not None:
            cuda, architectures = self.operators.cuda, " ".join(self.operators.architectures)
            kinds = f"CPU and CUDA {cuda} ({architectures})" if cuda else "the CPU"
            built.append(f"the operators for {kinds} with {self.operators.torch.name}")
        parts = {"cuda": "CUDA operators", "cpu": "operators", MODULE: MODULE}
        if self.operators is None:
            del parts["cuda"]  # the same reason as for the other operators
        lacking = [f"no {name}: {self.missing[part]}" for part, name in parts.items() if part in self.missing]
        return "; ".join(["built " + " and ".join(built), *lacking])

    def get_ext_filename(self, fullname):
        """The file's name; without a Python tag for the operators, which do not use Python."""
        *folders, name = fullname.split(".")
        return os.path.join(*folders, "_ops.so") if name == "_ops" else super().get_ext_filename(fullname)

    def leave_out(self, name):
        """Drop an extension and its binary of an earlier build; a wheel without extensions is platform-independent."""
        for folder in self.folders:
            Path(folder, self.get_ext_filename(name)).unlink(missing_ok=True)
        self.extensions = [extension for extension in self.extensions if extension.name != name]
        self.distribution.ext_modules = self.extensions
        wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
        if wheel is not None:
            wheel.root_is_pure = not self.extensions


# Not in pyproject.toml, where old and new setuptools need different spellings: SPDX expressions exist from 77 on, and
# a build without isolation uses the environment's version, which may be older.
LICENSE_FIELD = "license_expression" if int(setuptools.__version__.split(".")[0]) >= 77 else "license"

setup(
    ext_modules=[
        Extension(OPERATORS, []),  # built by build_support, copied by BuildExt
        Extension(MODULE, ["csrc/bindings.cpp"], depends=["csrc/cpu_features.h"], language="c++"),
    ],
    cmdclass={"build_ext": BuildExt, "egg_info": EggInfo},
    **{LICENSE_FIELD: "BSD-3-Clause"},
)

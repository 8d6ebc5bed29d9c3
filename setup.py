"""Builds the native module ``t2t_fast._C``; what the package is and needs stands in pyproject.toml.

``T2T_FAST_BUILD`` says what to build:
  auto  (default) the native module if this machine can, else a pure-Python package; never breaks an installation
  cpu   the native module, or an error that says why not
  cuda  an error: this version has no CUDA sources
  none  a pure-Python package
"""

import os
import shutil
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, SetupError

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "cuda", "none")
FLAGS = ["-std=c++17", "-fvisibility=hidden", "-g0"]


def build_mode():
    """The validated value of ``T2T_FAST_BUILD``."""
    mode = os.environ.get("T2T_FAST_BUILD", "auto")
    if mode not in MODES:
        raise SetupError(f"T2T_FAST_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "cuda":
        raise SetupError("T2T_FAST_BUILD=cuda: this version has no CUDA sources; use auto, cpu or none")
    return mode


def commit():
    """The checkout's commit, with "+" if files differ from it; empty where there is no git checkout."""
    if not (ROOT / ".git").exists():  # a copy inside some other project's checkout must not report that one's commit
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


class BuildExt(build_ext):
    """Builds what :func:`build_mode` asks for and prints one line that says what was built, or why nothing was."""

    def run(self):
        mode = build_mode()
        inplace = self.inplace  # setuptools clears it while it builds
        try:
            if mode == "none":
                raise SetupError("not asked for")
            self.configure(mode)
            super().run()
        except (BaseError, CCompilerError, OSError) as error:
            compiler_failed = isinstance(error, CCompilerError)
            reason = "the C++ compiler failed, its messages are above" if compiler_failed else error
            if mode == "cpu":
                raise SetupError(f"T2T_FAST_BUILD=cpu: t2t_fast._C cannot be built: {reason}") from error
            self.leave_out(inplace)
            print(f"t2t_fast: pure Python, t2t_fast._C is not built: {reason} (T2T_FAST_BUILD={mode})", flush=True)
        else:
            print(f"t2t_fast: built t2t_fast._C for the CPU (T2T_FAST_BUILD={mode})", flush=True)

    def configure(self, mode):
        """Give the module its include path, flags and what it says about its own build."""
        try:
            import pybind11
        except ImportError:
            raise SetupError("pybind11 is not installed") from None
        self.force = True  # an old object would tell an old commit, date and mode
        told = {"MODE": mode, "FLAGS": " ".join(FLAGS), "COMMIT": commit(), "DATE": build_date()}
        for extension in self.extensions:
            extension.include_dirs = [pybind11.get_include()]
            extension.extra_compile_args = FLAGS
            extension.define_macros = [(f"T2T_FAST_{name}", f'"{text}"') for name, text in told.items()]

    def build_extensions(self):
        command = getattr(self.compiler, "compiler_cxx", None)  # only compilers of the Unix kind have it
        if command and shutil.which(command[0]) is None:
            raise SetupError(f"there is no C++ compiler: {command[0]} is not found")
        super().build_extensions()

    def leave_out(self, inplace):
        """Go on as a pure-Python package: without the binary of an earlier build, no platform in the wheel's name."""
        for extension in self.extensions:
            for folder in [self.build_lib, *([ROOT] if inplace else [])]:
                Path(folder, self.get_ext_filename(extension.name)).unlink(missing_ok=True)
        self.extensions = self.distribution.ext_modules = []
        wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
        if wheel is not None:
            wheel.root_is_pure = True


setup(
    license="BSD-3-Clause",  # here, not in pyproject.toml: no spelling there suits both old and new setuptools
    ext_modules=[Extension("t2t_fast._C", ["csrc/bindings.cpp"], depends=["csrc/cpu_features.h"], language="c++")],
    cmdclass={"build_ext": BuildExt},
)

"""Building and installing: every mode of ``T2T_FAST_BUILD``, what the native module says, what a bad binary does.

Builds run on copies of the project in temporary folders, offline, with the tools of the running environment.
"""

import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import t2t_fast

ROOT = Path(__file__).resolve().parent.parent
BINARY = f"_C{EXTENSION_SUFFIXES[0]}"
COMPILER = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
NOWHERE = {"CC": "/nowhere/cc", "CXX": "/nowhere/c++"}

CAN_COMPILE = shutil.which(COMPILER.split()[0]) is not None and importlib.util.find_spec("pybind11") is not None
NO_COMPILER = f"the native module needs pybind11 and a C++ compiler ({COMPILER}); one of them is not here"

needs_compiler = pytest.mark.skipif(not CAN_COMPILE, reason=NO_COMPILER)
# not by find_spec: setuptools' import hook takes that for pip running, and torch.compile fails in the whole process
PIP = any(metadata.distributions(name="pip"))
needs_pip = pytest.mark.skipif(not PIP, reason="pip is not installed here")


def copy_project(folder):
    """What an installation needs, as a checkout has it: no binaries, no git."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "Makefile"):
        shutil.copy(ROOT / name, folder)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "t2t_fast"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    return folder


def run(folder, *command, **variables):
    """The finished process; its output has both streams."""
    decided = {"T2T_FAST_BUILD", "SOURCE_DATE_EPOCH", "PYTHONPATH", "CC", "CXX", "MAKEFLAGS", "MAKELEVEL"}
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


def build_in_place(folder, **variables):
    return python(folder, "setup.py", "build_ext", "--inplace", **variables)


def build_wheel(source, into, **variables):
    """The path of the wheel that pip makes of a folder or an archive, without network, isolation or dependencies."""
    arguments = ["-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", into, source]
    result = python(source.parent, *arguments, **variables)
    assert result.returncode == 0, result.stdout
    (wheel,) = into.glob("*.whl")
    return wheel


def said(result):
    """The line that setup.py prints about the native module; it must be one."""
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("t2t_fast:")]
    return line


@pytest.fixture
def project(tmp_path):
    return copy_project(tmp_path / "project")


@pytest.fixture
def without_pybind11(tmp_path):
    """A PYTHONPATH under which ``import pybind11`` fails."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "pybind11.py").write_text("raise ImportError")
    return str(tmp_path / "hidden")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A project with the native module built in place at second 0 of 1970, and what the build printed."""
    folder = copy_project(tmp_path_factory.mktemp("built") / "project")
    return folder, build_in_place(folder, SOURCE_DATE_EPOCH="0")


@pytest.fixture
def native(built):
    """The native module of :func:`built`."""
    spec = importlib.util.spec_from_file_location("_C", built[0] / "t2t_fast" / BINARY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fresh_venv(tmp_path):
    """The Python of an empty virtual environment that also sees this environment's packages, after its own."""
    run(tmp_path, sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    interpreter = tmp_path / "venv" / "bin" / "python"
    own = run(tmp_path, interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    Path(own, "outer.pth").write_text(sysconfig.get_path("purelib"))
    return interpreter


def pip_install(interpreter, source, *options, **variables):
    command = [sys.executable, "-m", "pip", "--python", interpreter, "install", "--no-build-isolation", "--no-deps"]
    result = run(source.parent, *command, *options, source, **variables)
    assert result.returncode == 0, result.stdout


@needs_compiler
class TestNativeModule:
    def test_auto_builds_it_and_says_so_in_one_line(self, built):
        folder, result = built
        assert result.returncode == 0, result.stdout
        assert said(result) == "t2t_fast: built t2t_fast._C for the CPU (T2T_FAST_BUILD=auto)"
        assert (folder / "t2t_fast" / BINARY).is_file()

    def test_build_info(self, native):
        info = native.build_info()
        assert info.pop("compiler").split()[0] in ("GCC", "Clang")
        assert "-std=c++17" in info.pop("flags")
        assert info == {
            "mode": "auto",
            "cxx_standard": "C++17",
            "cuda": None,
            "architectures": [],
            "commit": None,  # the project copy is no git checkout
            "date": "1970-01-01T00:00:00+00:00",
        }

    def test_cpu_features_are_flags(self, native):
        features = native.cpu_features()
        assert all(isinstance(name, str) and isinstance(present, bool) for name, present in features.items())

    @pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="reads x86 /proc/cpuinfo")
    def test_cpu_features_agree_with_the_kernel(self, native):
        text = Path("/proc/cpuinfo").read_text()
        flags = next(line for line in text.splitlines() if line.startswith("flags")).split()
        features = native.cpu_features()
        assert {"sse4_2", "avx", "avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_tile"} <= set(features)
        assert features == {name: name in flags for name in features}

    @pytest.mark.slow
    def test_the_same_date_gives_the_same_bytes(self, built, project):
        build_in_place(project, SOURCE_DATE_EPOCH="0")
        assert (project / "t2t_fast" / BINARY).read_bytes() == (built[0] / "t2t_fast" / BINARY).read_bytes()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed here")
def test_the_commit_is_that_of_the_checkout_and_of_no_other(project):
    def commit():
        code = "import runpy, setuptools; setuptools.setup = dict; print(runpy.run_path('setup.py')['commit']())"
        return python(project, "-c", code).stdout.strip()

    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    run(project.parent, *git, "init")
    assert commit() == "", "the commit of a checkout around the project"
    run(project, *git, "init")
    run(project, *git, "add", ".")
    run(project, *git, "commit", "-m", "all")
    head = run(project, *git, "rev-parse", "HEAD").stdout.strip()
    assert len(head) == 40
    assert commit() == head
    (project / "LICENSE").write_text("changed")
    assert commit() == head + "+"


def pure_python(folder, result):
    """Check that the build went on without the native module, and return the line that says why."""
    assert result.returncode == 0, result.stdout
    assert not list((folder / "t2t_fast").glob("*.so")), "the binary of an earlier build stayed"
    line = said(result)
    assert line.startswith("t2t_fast: pure Python, t2t_fast._C is not built: ")
    return line


@pytest.mark.parametrize("mode", ["none", "auto-nowhere", "auto-path", "auto-pybind11", "auto-source"])
def test_pure_python_with_its_reason(project, without_pybind11, mode):
    (project / "t2t_fast" / BINARY).write_text("of an earlier build")
    variables, reason = {
        "none": ({"T2T_FAST_BUILD": "none"}, "not asked for (T2T_FAST_BUILD=none)"),
        "auto-nowhere": (NOWHERE, "there is no C++ compiler: /nowhere/c++ is not found (T2T_FAST_BUILD=auto)"),
        "auto-path": ({"PATH": str(project)}, "is not found (T2T_FAST_BUILD=auto)"),
        "auto-pybind11": ({"PYTHONPATH": without_pybind11}, "pybind11 is not installed (T2T_FAST_BUILD=auto)"),
        "auto-source": ({}, "the C++ compiler failed, its messages are above (T2T_FAST_BUILD=auto)"),
    }[mode]
    if mode == "auto-source":
        if not CAN_COMPILE:
            pytest.skip(NO_COMPILER)
        (project / "csrc" / "bindings.cpp").write_text("no C++")
    assert pure_python(project, build_in_place(project, **variables)).endswith(reason)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"T2T_FAST_BUILD": "cpu", **NOWHERE}, "T2T_FAST_BUILD=cpu: t2t_fast._C cannot be built: there is no C++ "),
        ({"T2T_FAST_BUILD": "cuda"}, "T2T_FAST_BUILD=cuda: this version has no CUDA sources"),
        ({"T2T_FAST_BUILD": "gpu"}, "T2T_FAST_BUILD must be one of auto, cpu, cuda, none, got 'gpu'"),
    ],
    ids=["cpu-without-compiler", "cuda", "unknown"],
)
def test_what_cannot_be_built_is_an_error(project, variables, message):
    result = build_in_place(project, **variables)
    assert result.returncode != 0
    assert f"error: {message}" in result.stdout
    assert "Traceback" not in result.stdout


def test_cpu_without_pybind11_is_an_error(project, without_pybind11):
    result = build_in_place(project, T2T_FAST_BUILD="cpu", PYTHONPATH=without_pybind11)
    assert result.returncode != 0
    assert "error: T2T_FAST_BUILD=cpu: t2t_fast._C cannot be built: pybind11 is not installed" in result.stdout


def test_the_version_is_read_without_importing_torch(project):
    (project / "torch.py").write_text("raise ImportError('torch was imported')")
    result = python(project, "setup.py", "--version", PYTHONPATH=str(project))
    assert result.stdout.splitlines()[-1] == t2t_fast.__version__


@needs_pip
@pytest.mark.slow
class TestWheel:
    def test_pure_python_wheel(self, project, tmp_path):
        stale = project / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "t2t_fast"
        stale.mkdir(parents=True)
        (stale / BINARY).write_text("of an earlier build")
        wheel = build_wheel(project, tmp_path, T2T_FAST_BUILD="none")
        assert wheel.name == f"t2t_fast-{t2t_fast.__version__}-py3-none-any.whl"
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            (metadata,) = [archive.read(name).decode() for name in names if name.endswith("/METADATA")]
            (scripts,) = [archive.read(name).decode() for name in names if name.endswith("/entry_points.txt")]
        assert not [name for name in names if name.endswith(".so")]
        modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "t2t_fast").rglob("*.py")}
        assert modules <= set(names)
        assert not {name.split("/")[0] for name in names} & {"tests", "benchmarks", "csrc"}
        assert "t2t-fast = t2t_fast.cli:main" in scripts
        fields = Parser().parsestr(metadata)
        assert fields["License"] == "BSD-3-Clause"
        assert {"demo", "export", "checkpoints", "timm", "bench", "test"} == set(fields.get_all("Provides-Extra"))
        requirements = [Requirement(text) for text in fields.get_all("Requires-Dist")]
        assert {r.name for r in requirements if r.marker is None} == {"torch", "numpy"}
        assert {bound.operator for r in requirements for bound in r.specifier} == {">="}, "lower bounds only"

    @needs_compiler
    def test_archive_to_wheel_has_the_native_module(self, project, tmp_path):
        result = python(project, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path)
        assert result.returncode == 0, result.stdout
        (archive,) = tmp_path.glob("*.tar.gz")
        with tarfile.open(archive) as names:
            inside = {name.split("/", 1)[-1] for name in names.getnames()}
        assert {"csrc/bindings.cpp", "csrc/cpu_features.h", "LICENSE", "pyproject.toml", "setup.py"} <= inside
        wheel = build_wheel(archive, tmp_path / "wheels", T2T_FAST_BUILD="cpu")
        assert f"-{sys.implementation.name[:2]}{sys.version_info.major}{sys.version_info.minor}-" in wheel.name
        assert f"t2t_fast/{BINARY}" in zipfile.ZipFile(wheel).namelist()


@needs_pip
@pytest.mark.slow
class TestInstall:
    def test_editable(self, project, fresh_venv):
        pip_install(fresh_venv, project, "--editable", T2T_FAST_BUILD="none")
        where = "import importlib.util; print(importlib.util.find_spec('t2t_fast').origin)"
        assert run("/", fresh_venv, "-c", where).stdout.strip() == str(project / "t2t_fast" / "__init__.py")
        assert (fresh_venv.parent / "t2t-fast").is_file()

    @needs_compiler
    def test_installed_package_runs_with_its_native_module(self, project, fresh_venv):
        pip_install(fresh_venv, project, T2T_FAST_BUILD="cpu")
        code = "from t2t_fast import _extension as e; print(e.load_error(), e.load().__file__, e.build_info()['mode'])"
        result = run("/", fresh_venv, "-c", code)
        assert result.returncode == 0, result.stdout
        error, path, mode = result.stdout.split()[-3:]
        assert (error, mode) == ("None", "cpu")
        assert Path(path).is_relative_to(fresh_venv.parent.parent)


class TestExtension:
    """``_extension.py`` in a package of its own, beside binaries of every kind."""

    @pytest.fixture
    def package(self, tmp_path, monkeypatch, request):
        """The folder of an empty package with ``_extension.py``; its name is that of no other test."""
        folder = tmp_path / f"package_{abs(hash(request.node.name))}"
        folder.mkdir()
        (folder / "__init__.py").touch()
        shutil.copy(ROOT / "t2t_fast" / "_extension.py", folder)
        monkeypatch.syspath_prepend(tmp_path)
        return folder

    @staticmethod
    def load(package):
        return importlib.import_module(f"{package.name}._extension")

    @staticmethod
    def refused(extension):
        """Check that nothing is usable and nothing raises, and return the reason."""
        assert extension.load() is None
        assert extension.build_info() is None
        assert extension.cpu_features() == {}
        return extension.load_error()

    def test_not_built(self, package):
        assert self.refused(self.load(package)).startswith("not built: pure-Python installation")

    def test_for_another_python(self, package):
        (package / "_C.cpython-38-x86_64-linux-gnu.so").touch()
        reason = self.refused(self.load(package))
        assert reason.startswith("built for another Python: found _C.cpython-38-x86_64-linux-gnu.so, this one loads ")

    @pytest.mark.parametrize("content", [b"", b"no ELF file", b"\x7fELF" + bytes(100)], ids=["empty", "text", "header"])
    def test_broken(self, package, content):
        (package / BINARY).write_bytes(content)
        assert self.refused(self.load(package)).startswith("broken: ")

    def test_another_modules_binary(self, package):
        folder = sysconfig.get_config_var("DESTSHARED")
        others = sorted(Path(folder).glob(f"*{EXTENSION_SUFFIXES[0]}")) if folder else []
        if not others:
            pytest.skip("this Python has no extension module of its own to borrow")
        shutil.copy(others[0], package / BINARY)
        assert self.refused(self.load(package)).startswith("broken: ")

    def test_a_module_of_the_same_name(self, package):
        (package / "_C.py").touch()
        assert self.refused(self.load(package)).startswith(f"foreign: {package / '_C.py'} is not the native module")

    @needs_compiler
    def test_good(self, package, built):
        shutil.copy(built[0] / "t2t_fast" / BINARY, package)
        extension = self.load(package)
        assert extension.load_error() is None
        assert extension.build_info() == extension.load().build_info()
        assert extension.cpu_features() == extension.load().cpu_features()


@pytest.mark.slow
def test_a_broken_binary_does_not_break_the_import(project):
    (project / "t2t_fast" / BINARY).write_text("no binary")
    code = (
        "import sys, t2t_fast; tried = 't2t_fast._C' in sys.modules; "
        "from t2t_fast import _extension; print(t2t_fast.__file__, tried, _extension.load_error())"
    )
    result = python(project, "-c", code)
    assert result.returncode == 0, result.stdout
    assert result.stdout.splitlines()[-1].startswith(f"{project / 't2t_fast' / '__init__.py'} False broken: ")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed here")
class TestMakefile:
    def test_help_lists_every_target(self, project):
        result = run(project, "make")
        assert result.returncode == 0
        listed = [line.split()[1] for line in result.stdout.splitlines()]
        assert listed == ["help", "demo", "test", "gpu", "bench", "lint", "env"]

    @pytest.mark.slow
    def test_environment_is_made_once_and_again_where_it_was_left_half_made(self, project):
        command = ["make", "--silent", ".venv/.ready", "PIP=true", f"PYTHON={sys.executable}"]
        environment = project / ".venv"
        making, installing = f"Making .venv with {sys.executable}", "Installing PyTorch and what t2t_fast needs"

        first = run(project, *command)
        assert first.returncode == 0, first.stdout
        assert making in first.stdout
        assert installing in first.stdout
        assert run(project, *command).stdout == "", "the second time it has nothing to do"

        os.utime(project / "setup.py")
        changed = run(project, *command).stdout
        assert changed.startswith("Installing t2t_fast into .venv again")

        (environment / "half").touch()
        failing = [*command[:-2], "PIP=false", command[-1]]
        (environment / ".ready").unlink()
        assert run(project, *failing).returncode != 0
        again = run(project, *command).stdout
        assert making in again
        assert not (environment / "half").exists()

"""Source archives, wheels and installations of every kind, and the Makefile."""

import json
import os
import shutil
import stat
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from packaging.requirements import Requirement

import t2t_fast
from build_support.toolchain import find_compiler
from support.building import (
    LIBRARY,
    MODULE,
    NO_CUDA,
    ROOT,
    binaries,
    build_wheel,
    copy_project,
    make_venv,
    make_wheelhouse,
    needs_no_torch,
    needs_operators,
    needs_pip,
    pip_install,
    python,
    run,
    stand_in_torch,
)

REPORT = """
import json, torch, t2t_fast
from t2t_fast import _extension
from t2t_fast.functional import soft_split

x = torch.randn(2, 3, 9, 7)
_extension.operators()
print(json.dumps({
    "from": t2t_fast.__file__,
    "torch": torch.__version__,
    "build": _extension.build_info(),
    "errors": [_extension.load_error(), _extension.operators_error()],
    "equal": torch.equal(soft_split(x, 3, 2, 1, backend="native"), soft_split(x, 3, 2, 1, backend="reference")),
}))
"""


OWN = ("*.py", "*.json", "*.html", "py.typed")
"""The package's own files."""
NOT_ISOLATED = "--no-build-isolation"
NO_HOME = "/dev/null/home"
"""No user can write below it, not even root."""


@pytest.fixture
def project(tmp_path):
    """A copy of the project whose operators have no kernels: it compiles in a moment."""
    return copy_project(tmp_path / "project", kernels=False)


@pytest.fixture
def fresh_venv(tmp_path):
    return make_venv(tmp_path, sysconfig.get_path("purelib"))


@needs_pip
def test_pure_python_wheel(project, tmp_path):
    stale = project / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "t2t_fast"
    stale.mkdir(parents=True)
    for name in (MODULE, LIBRARY):
        (stale / name).write_text("of an earlier build")
    wheel = build_wheel(project, tmp_path, T2T_FAST_BUILD="none")
    assert wheel.name == f"t2t_fast-{t2t_fast.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [archive.read(name).decode() for name in names if name.endswith("/METADATA")]
        (scripts,) = [archive.read(name).decode() for name in names if name.endswith("/entry_points.txt")]
    assert not [name for name in names if name.endswith(".so")]
    own = {path.relative_to(ROOT).as_posix() for kind in OWN for path in (ROOT / "t2t_fast").rglob(kind)}
    assert own <= set(names)
    assert not {name.split("/")[0] for name in names} & {"tests", "benchmarks", "csrc", "build_support"}
    assert "t2t-fast = t2t_fast.cli:main" in scripts
    fields = Parser().parsestr(metadata)
    assert (fields["License-Expression"] or fields["License"]) == "BSD-3-Clause"  # setuptools 77 introduced the former
    assert "Typing :: Typed" in fields.get_all("Classifier") and "t2t_fast/py.typed" in names
    assert "t2t_fast/_build.json" in names and [name for name in names if name.endswith("/licenses/LICENSE")]
    requirements = [Requirement(text) for text in fields.get_all("Requires-Dist")]
    assert {r.name for r in requirements if r.marker is None} == {"torch", "numpy"}
    assert {bound.operator for r in requirements for bound in r.specifier} == {">="}, "lower bounds only"


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The source archive of the whole project."""
    folder = tmp_path_factory.mktemp("archive")
    project = copy_project(folder / "project")
    result = python(project, "setup.py", "--quiet", "sdist", "--dist-dir", folder)
    assert result.returncode == 0, result.stdout
    (archive,) = folder.glob("*.tar.gz")
    return archive


def test_a_source_archive_has_the_benchmarks_without_their_results(tmp_path):
    project = copy_project(tmp_path / "project")
    for name in ("report/templates/page.html", "results/machine/rows.json.gz"):
        path = project / "benchmarks" / name
        path.parent.mkdir(parents=True)
        path.touch()
    assert python(project, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path).returncode == 0
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = [name.partition("/")[2] for name in packed.getnames()]
    assert "benchmarks/report/templates/page.html" in names
    assert not [name for name in names if name.startswith("benchmarks/results")]


@pytest.fixture(scope="module")
def wheel(archive):
    """The archive's wheel, with CUDA kernels for one architecture where they can be built at all."""
    mode = "cpu" if NO_CUDA else "cuda"
    return build_wheel(archive, archive.parent / "wheels", T2T_FAST_BUILD=mode, TORCH_CUDA_ARCH_LIST="8.0")


@pytest.fixture(scope="module")
def unpacked(wheel):
    """The folder with the contents of the wheel."""
    folder = wheel.parent / "unpacked"
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@needs_pip
@needs_operators
class TestArchiveAndItsWheel:
    @staticmethod
    def report(folder, interpreter):
        result = run("/", interpreter, "-c", REPORT, PYTHONPATH=str(folder), OMP_NUM_THREADS="1")
        assert result.returncode == 0, result.stdout
        report = json.loads(result.stdout.splitlines()[-1])
        assert report["from"] == str(folder / "t2t_fast" / "__init__.py")
        return report

    def test_the_archive_has_all_sources(self, archive):
        with tarfile.open(archive) as names:
            inside = {name.split("/", 1)[-1] for name in names.getnames()}
        sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*")}
        tables = {path.relative_to(ROOT).as_posix() for kind in OWN for path in (ROOT / "t2t_fast").rglob(kind)}
        tables.discard("t2t_fast/_build.json")  # the record of a build of this checkout
        assert sources | tables | {"build_support/operators.py", "LICENSE", "pyproject.toml", "setup.py"} <= inside

    @pytest.mark.slow
    def test_the_wheel_is_for_this_python_and_platform(self, wheel):
        assert f"-{sys.implementation.name[:2]}{sys.version_info.major}{sys.version_info.minor}-" in wheel.name
        assert {f"t2t_fast/{MODULE}", f"t2t_fast/{LIBRARY}"} <= set(zipfile.ZipFile(wheel).namelist())

    @pytest.mark.slow
    def test_it_runs(self, unpacked):
        report = self.report(unpacked, sys.executable)
        assert report["errors"] == [None, None]
        assert report["equal"]
        build = report["build"]
        assert build["torch"] == report["torch"] == torch.__version__
        if NO_CUDA:
            assert (build["operators"], build["cuda"], build["architectures"]) == (["cpu"], None, [])
        else:
            assert (build["operators"], build["architectures"]) == (["cpu", "cuda"], ["8.0"])
            assert build["cuda"].split(".")[0] == torch.version.cuda.split(".")[0]

    @pytest.mark.slow
    def test_it_runs_under_another_pytorch(self, unpacked):
        """One build serves all: the operators load under any Python, ``_C`` only under the version it was built for."""
        others = [path for path in os.environ.get("T2T_FAST_TEST_PYTHON", "").split(os.pathsep) if path]
        if not others:
            pytest.skip("T2T_FAST_TEST_PYTHON names no Python with another PyTorch (several: separated as in PATH)")
        for other in others:
            report = self.report(unpacked, other)
            assert report["errors"][1] is None
            assert report["equal"]

    @pytest.mark.slow
    def test_it_loads_where_pytorch_has_no_cuda(self, unpacked, tmp_path):
        """Such a PyTorch lacks libtorch_cuda.so. The stand-in is a libtorch.so that links only libtorch_cpu.so."""
        real = os.path.join(torch.__path__[0], "lib")
        source = tmp_path / "empty.cpp"
        source.touch()
        flags = ["-shared", source, "-o", tmp_path / "libtorch.so", "-Wl,-soname,libtorch.so", f"-Wl,-rpath,{real}"]
        result = run(tmp_path, *find_compiler(), *flags, f"-L{real}", "-Wl,--no-as-needed", "-ltorch_cpu")
        assert result.returncode == 0, result.stdout
        load = f"import ctypes; ctypes.CDLL({str(unpacked / 't2t_fast' / LIBRARY)!r})"
        code = f"{load}; maps = open('/proc/self/maps').read(); print('libtorch_cpu' in maps, 'libtorch_cuda' in maps)"
        result = python(tmp_path, "-c", code, LD_LIBRARY_PATH=str(tmp_path))
        assert result.stdout.split() == ["True", "False"], result.stdout


@needs_pip
class TestInstall:
    def test_editable(self, project, fresh_venv):
        pip_install(fresh_venv, project, NOT_ISOLATED, "--editable", T2T_FAST_BUILD="none")
        where = "import importlib.util; print(importlib.util.find_spec('t2t_fast').origin)"
        assert run("/", fresh_venv, "-c", where).stdout.strip() == str(project / "t2t_fast" / "__init__.py")
        assert (fresh_venv.parent / "t2t-fast").is_file()
        assert not binaries(project)

    @pytest.mark.slow
    @needs_operators
    def test_editable_with_native_code(self, project, fresh_venv):
        pip_install(fresh_venv, project, NOT_ISOLATED, "--editable", T2T_FAST_BUILD="cpu")
        assert binaries(project) == {MODULE, LIBRARY}

    @pytest.mark.slow
    @needs_operators
    def test_installed_where_nothing_can_be_written(self, project, fresh_venv):
        pip_install(fresh_venv, project, NOT_ISOLATED, T2T_FAST_BUILD="cpu")
        code = (
            "from t2t_fast import _extension as e; e.operators(); "
            "print(e.load_error(), e.operators_error(), e.build_info()['mode'], e.load().__file__, e.LIBRARY)"
        )
        find = "import sysconfig; print(sysconfig.get_path('platlib'))"
        package = os.path.join(run("/", fresh_venv, "-c", find).stdout.strip(), "t2t_fast")
        folders = [folder for folder, _, _ in os.walk(package)]
        before = {folder: os.listdir(folder) for folder in folders}
        for folder in folders:
            os.chmod(folder, stat.S_IRUSR | stat.S_IXUSR)
        try:
            result = run("/", fresh_venv, "-c", code, PYTHONDONTWRITEBYTECODE="1")
        finally:
            for folder in folders:
                os.chmod(folder, stat.S_IRWXU)
        assert result.returncode == 0, result.stdout
        files = [os.path.join(package, name) for name in (MODULE, LIBRARY)]
        assert result.stdout.split()[-5:] == ["None", "None", "cpu", *files]
        assert {folder: os.listdir(folder) for folder in folders} == before


def installed(interpreter):
    """The folder of the package in an environment, and the record of its build."""
    find = "import sysconfig; print(sysconfig.get_path('platlib'))"
    folder = Path(run("/", interpreter, "-c", find).stdout.strip(), "t2t_fast")
    return folder, json.loads((folder / "_build.json").read_text())


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """Environment variables that let front ends find the requirements of the build without network."""
    folder = make_wheelhouse(tmp_path_factory.mktemp("offline") / "wheels", "setuptools", "pybind11")
    return {"PIP_FIND_LINKS": folder, "UV_FIND_LINKS": folder, "UV_NO_INDEX": "1", "UV_OFFLINE": "1"}


UV = shutil.which("uv") or shutil.which("uv", path=sysconfig.get_path("scripts"))


@needs_pip
@needs_operators
class TestIsolation:
    """A front end hides the environment's packages from the build, which must still find PyTorch."""

    @pytest.fixture
    def small(self, tmp_path):
        return copy_project(tmp_path / "project", kernels=False, module=False)

    @pytest.fixture
    def user(self, tmp_path):
        """The Python of an environment with a PyTorch of its own, built without CUDA."""
        return make_venv(tmp_path, stand_in_torch(tmp_path / "packages", "2.12.0+cpu"))

    WITHOUT_CUDA: ClassVar = {"mode": "auto", "missing": {"cuda": "PyTorch 2.12.0+cpu of {} is built without CUDA"}}

    def check(self, record, place):
        assert record == json.loads(json.dumps(self.WITHOUT_CUDA).replace("{}", place))

    def test_pip(self, small, fresh_venv, offline):
        """Into an environment that sees this one's PyTorch; the user has no writable home."""
        result = pip_install(fresh_venv, small, "-v", T2T_FAST_BUILD="cpu", HOME=NO_HOME, **offline)
        place = f"PyTorch {torch.__version__} of the environment it installs into"
        what = f"t2t_fast._C and the operators for the CPU with {place}"
        assert f"t2t_fast: built {what} (T2T_FAST_BUILD=cpu)" in result.stdout
        code = "from t2t_fast import SoftSplit, _extension as e; import torch; SoftSplit(3)(torch.ones(1, 3, 8, 8)); "
        code += "print(e.operators_error(), e.LIBRARY)"
        result = run("/", fresh_venv, "-W", "error", "-c", code, HOME=NO_HOME)
        folder, record = installed(fresh_venv)
        assert result.stdout.split() == ["None", str(folder / LIBRARY)]
        assert record == {"mode": "cpu", "missing": {}}

    @pytest.mark.slow
    def test_pip_into_an_environment_whose_pytorch_has_no_cuda(self, small, user, offline):
        pip_install(user, small, **offline)
        folder, record = installed(user)
        self.check(record, "the environment it installs into")
        assert {MODULE, LIBRARY} <= {path.name for path in folder.iterdir()}

    @pytest.mark.slow
    @needs_no_torch
    def test_pip_without_pytorch(self, small, tmp_path, offline):
        """It installs, and the first call warns what is missing, what that costs, and how to fix it."""
        bare = make_venv(tmp_path)
        result = pip_install(bare, small, "-v", **offline)
        missing = "no PyTorch is found; install it first, and activate its environment"
        assert f"t2t_fast: built t2t_fast._C; no operators: {missing} (T2T_FAST_BUILD=auto)" in result.stdout
        folder, record = installed(bare)
        assert record == {"mode": "auto", "missing": {"cuda": missing, "cpu": missing}}
        assert not (folder / LIBRARY).exists()
        code = "import torch, t2t_fast; t2t_fast.SoftSplit(3)(torch.ones(1, 3, 8, 8))"
        result = run("/", bare, "-c", code, PYTHONPATH=sysconfig.get_path("purelib"))
        assert result.returncode == 0, result.stdout
        if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
            assert (
                "RuntimeWarning: t2t_fast: soft_split runs as plain PyTorch operations, since the native"
                in result.stdout
            )
            assert f"are not built ({missing}): " in result.stdout

    @pytest.mark.slow
    @pytest.mark.skipif(not any(metadata.distributions(name="build")), reason="build is not installed here")
    def test_build_in_the_active_environment(self, small, user, offline, tmp_path):
        """``build`` makes an environment of its own and leaves VIRTUAL_ENV as it is."""
        command = ["-m", "build", "--wheel", "--outdir", tmp_path / "wheels", small]
        result = python(tmp_path, *command, VIRTUAL_ENV=str(user.parent.parent), **offline)
        assert result.returncode == 0, result.stdout
        (wheel,) = (tmp_path / "wheels").glob("*.whl")
        assert not wheel.name.endswith("-none-any.whl")
        with zipfile.ZipFile(wheel) as archive:
            self.check(json.loads(archive.read("t2t_fast/_build.json")), "the active environment")
            assert {f"t2t_fast/{MODULE}", f"t2t_fast/{LIBRARY}"} <= set(archive.namelist())

    @pytest.mark.slow
    @pytest.mark.skipif(UV is None, reason="uv is not installed here")
    @pytest.mark.parametrize("how", ["named", "active"])
    def test_uv(self, small, user, offline, tmp_path, how):
        """``uv`` makes an environment of its own too, and sets VIRTUAL_ENV to that."""
        folder = str(user.parent.parent)
        named, place = ["--python", folder], "the front end's environment"
        variables = {**offline, "UV_CACHE_DIR": str(tmp_path / "cache")}
        if how == "active":
            named, place, variables = [], "the active environment", {**variables, "VIRTUAL_ENV": folder}
        result = run(tmp_path, UV, "pip", "install", "--no-deps", *named, small, **variables)
        assert result.returncode == 0, result.stdout
        folder, record = installed(user)
        self.check(record, place)
        assert {MODULE, LIBRARY} <= {path.name for path in folder.iterdir()}


TESTS = ("test", "test-slow", "test-all")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed here")
class TestMakefile:
    def test_quick_and_slow_tests_are_all_tests(self, project):
        """``make test`` and ``make test-slow`` differ in the marker that they select; ``make test-all`` has none."""
        quick, slow, all_tests = (run(project, "make", "-n", target, "ARGS=-x").stdout for target in TESTS)
        assert quick.replace('"not slow"', "slow") == slow and " -m slow -x" in slow
        assert all_tests == slow.replace(" -m slow", "")

    def test_help_lists_every_target(self, project):
        result = run(project, "make")
        assert result.returncode == 0
        listed = [line.split()[1] for line in result.stdout.splitlines()]
        assert listed == ["help", "demo", *TESTS, "properties", "sanitize", "gpu", "bench", "lint", "env"]

    def test_gpu_uses_its_own_variable_for_the_output_folder(self, project):
        """The variable is GPU_OUT; OUT may belong to the surrounding system."""
        command = run(project, "make", "-n", "gpu", "GPU_OUT=/there", "ARGS=--quick", OUT="/of/the/system").stdout
        assert command.strip().endswith("-m benchmarks.gpu --out /there --quick")
        assert "/of/the/system" not in run(project, "make", "-n", "gpu", OUT="/of/the/system").stdout

    @pytest.mark.slow
    def test_environment_is_made_once_and_again_if_incomplete(self, project):
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

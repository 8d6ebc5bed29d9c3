"""Builds in place: every mode of ``T2T_FAST_BUILD``, missing requirements, and the message of the build."""

import importlib.util
import json
import os
import platform
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import t2t_fast
from build_support import compiling, operators
from support.building import (
    LIBRARY,
    MODULE,
    NO_COMPILER,
    NO_CUDA,
    NO_OPERATORS,
    NOWHERE,
    ROOT,
    binaries,
    build_in_place,
    copy_project,
    make_venv,
    needs_no_torch,
    needs_operators,
    python,
    run,
    said,
    stand_in_nvcc,
    stand_in_torch,
    tools,
)
from t2t_fast import _extension

BOTH = {MODULE, LIBRARY}
NO_TORCH = "no PyTorch is found; install it first, and activate its environment"
FAILED = "a compiler failed, its messages are above"
CPU = "the operators for the CPU with PyTorch 2.11.0+cpu"


@pytest.fixture
def project(tmp_path):
    """A copy of the project whose native code compiles in a moment."""
    return copy_project(tmp_path / "project", kernels=False, module=False)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A project without kernels, built in place with the date 1970-01-01, and the result of the build."""
    folder = copy_project(tmp_path_factory.mktemp("built") / "project", kernels=False)
    return folder, build_in_place(folder, T2T_FAST_BUILD="cpu", SOURCE_DATE_EPOCH="0")


@pytest.fixture
def native(built):
    """The module ``_C`` of :func:`built`."""
    spec = importlib.util.spec_from_file_location("_C", built[0] / "t2t_fast" / MODULE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_this_installation_has_all_that_this_machine_can_build():
    """``make test`` installs with ``auto``; missing native code in its environment is a failure."""
    info = _extension.build_info()
    if info is None and (Path(sys.prefix) != ROOT / ".venv" or os.environ.get("T2T_FAST_BUILD") == "none"):
        pytest.skip(f"t2t_fast runs here without its native code: {_extension.load_error()}")
    if info is not None and info["mode"] != "auto":
        pytest.skip(f"it was built with T2T_FAST_BUILD={info['mode']}")
    if NO_COMPILER:
        pytest.skip(NO_COMPILER)
    assert info is not None, _extension.load_error()
    expected = [] if NO_OPERATORS else ["cpu"] if NO_CUDA else ["cpu", "cuda"]
    assert info["operators"] == expected
    assert bool(info["cuda"]) == bool(info["architectures"]) == ("cuda" in expected)
    assert _extension.operators() == bool(expected), _extension.operators_error()


@needs_operators
class TestBuilt:
    def test_the_message_is_one_line(self, built):
        folder, result = built
        assert result.returncode == 0, result.stdout
        what = f"t2t_fast._C and the operators for the CPU with PyTorch {torch.__version__}"
        assert said(result) == f"t2t_fast: built {what} (T2T_FAST_BUILD=cpu)"
        assert binaries(folder) == BOTH

    def test_build_info(self, native):
        info = native.build_info()
        assert info.pop("compiler").split()[0] in ("GCC", "Clang")
        assert {"-std=c++20", "-O3"} <= set(info.pop("flags").split())
        assert info == {
            "mode": "cpu",
            "cxx_standard": "C++20",
            "operators": ["cpu"],
            "torch": torch.__version__,
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

    @pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed here")
    def test_the_library_needs_libtorch_but_no_rpath_and_no_python(self, built):
        library = built[0] / "t2t_fast" / LIBRARY
        dynamic = run("/", "readelf", "--wide", "--dynamic", library).stdout
        needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
        assert "libtorch.so" in needed
        assert not re.search("RPATH|RUNPATH", dynamic)
        assert not [name for name in needed if re.search("python|cuda|c10", name)]
        symbols = run("/", "readelf", "--wide", "--dyn-syms", library).stdout
        assert re.search(r" UND aoti_torch_\w+", symbols)
        assert not re.search(r" UND _?Py", symbols)

    def test_no_file_contains_the_build_path(self, built):
        for name in BOTH:
            content = (built[0] / "t2t_fast" / name).read_bytes()
            for folder in (built[0], Path(torch.__file__).parent):
                assert str(folder).encode() not in content

    @pytest.mark.slow
    def test_the_same_date_gives_the_same_bytes(self, built, tmp_path):
        again = copy_project(tmp_path / "again", kernels=False)
        build_in_place(again, T2T_FAST_BUILD="cpu", SOURCE_DATE_EPOCH="0")
        for name in BOTH:
            assert (again / "t2t_fast" / name).read_bytes() == (built[0] / "t2t_fast" / name).read_bytes()


@needs_operators
@pytest.mark.parametrize("with_ninja", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["ninja", "no-ninja"])
def test_only_what_has_changed_is_compiled_again(project, monkeypatch, with_ninja):
    """With ninja. Without it, every file is compiled again."""
    if not with_ninja:
        monkeypatch.setattr(compiling, "find_ninja", lambda: None)
    elif compiling.find_ninja() is None:
        pytest.skip("ninja is not installed here")
    kernels = project / "csrc" / "cpu"
    kernels.mkdir()
    (kernels / "number.h").write_text("inline int number() { return 1; }")
    (kernels / "kernel.cpp").write_text('#include "number.h"\nint kernel() { return number(); }')

    def build():
        """The modification time of each object file."""
        found = operators.build(project, with_cuda=False)
        assert found.library.is_file()
        assert (found.torch.version, found.cuda, found.architectures) == (torch.__version__, None, [])
        return {path.name: path.stat().st_mtime_ns for path in (project / "build").rglob("*.o")}

    first = build()
    assert set(first) == {"operators.cpp.o", "kernel.cpp.o"}
    assert (build() == first) == with_ninja
    (kernels / "number.h").write_text("inline int number() { return 2; }")
    third = build()
    assert third["kernel.cpp.o"] != first["kernel.cpp.o"]
    assert (third["operators.cpp.o"] == first["operators.cpp.o"]) == with_ninja


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed here")
def test_the_commit_is_that_of_the_checkout_and_of_no_other(project):
    def commit():
        code = "import runpy, setuptools; setuptools.setup = dict; print(runpy.run_path('setup.py')['commit']())"
        return python(project, "-c", code, PYTHONDONTWRITEBYTECODE="1").stdout.strip()

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


def test_a_pure_python_package_that_was_asked_for(project):
    for name in BOTH:
        (project / "t2t_fast" / name).write_text("of an earlier build")
    result = build_in_place(project, T2T_FAST_BUILD="none")
    assert result.returncode == 0, result.stdout
    assert said(result) == "t2t_fast: pure Python, nothing native is built: not asked for (T2T_FAST_BUILD=none)"
    assert not binaries(project)
    assert json.loads((project / "t2t_fast" / "_build.json").read_text()) == {"mode": "none", "missing": {}}


@pytest.mark.parametrize("case", ["nowhere", "path", pytest.param("no-torch-no-pybind11", marks=needs_no_torch)])
def test_auto_without_anything_to_build_with(project, tmp_path, case):
    variables, why = {
        "nowhere": (NOWHERE, "there is no C++ compiler: /nowhere/c++ is not found"),
        "path": ({"PATH": str(tmp_path)}, "there is no C++ compiler: c++ is not found"),
        "no-torch-no-pybind11": (
            {"PYTHONPATH": tools(tmp_path / "tools", "setuptools"), "interpreter": make_venv(tmp_path)},
            f"{NO_COMPILER}" if NO_COMPILER else f"{NO_TORCH}; pybind11 is not installed",
        ),
    }[case]
    for name in BOTH:
        (project / "t2t_fast" / name).write_text("of an earlier build")
    result = build_in_place(project, **variables)
    assert result.returncode == 0, result.stdout
    assert said(result) == f"t2t_fast: pure Python, nothing native is built: {why} (T2T_FAST_BUILD=auto)"
    assert not binaries(project), "a binary of an earlier build stayed"


@needs_operators
class TestAuto:
    """Every part that can be built is built, and one line gives the reasons for the others."""

    @staticmethod
    def build(project, files, **variables):
        """The build's message after ``t2t_fast: built``. Binaries of an earlier build must be gone."""
        for name in BOTH - files:
            (project / "t2t_fast" / name).write_text("of an earlier build")
        result = build_in_place(project, **variables)
        assert result.returncode == 0, result.stdout
        assert binaries(project) == files
        return said(result).removeprefix("t2t_fast: built ").removesuffix(" (T2T_FAST_BUILD=auto)")

    @needs_no_torch
    def test_no_pytorch(self, project, tmp_path):
        """The build has pybind11, as in every isolated environment, and finds no PyTorch anywhere."""
        path = tools(tmp_path / "tools", "setuptools", "pybind11")
        line = self.build(project, {MODULE}, PYTHONPATH=path, interpreter=make_venv(tmp_path))
        assert line == f"t2t_fast._C; no operators: {NO_TORCH}"

    def test_pytorch_without_cuda(self, project, tmp_path):
        line = self.build(project, BOTH, PYTHONPATH=stand_in_torch(tmp_path / "torch"))
        cpu = "t2t_fast._C and the operators for the CPU with PyTorch 2.11.0+cpu"
        assert line == f"{cpu}; no CUDA operators: PyTorch 2.11.0+cpu is built without CUDA"
        record = json.loads((project / "t2t_fast" / "_build.json").read_text())
        assert record == {"mode": "auto", "missing": {"cuda": "PyTorch 2.11.0+cpu is built without CUDA"}}

    def test_an_older_pytorch(self, project, tmp_path):
        line = self.build(project, {MODULE}, PYTHONPATH=stand_in_torch(tmp_path / "torch", "2.9.1"))
        assert line == "t2t_fast._C; no operators: PyTorch 2.9.1 is older than 2.11"

    def test_pytorch_without_headers(self, project, tmp_path):
        path = stand_in_torch(tmp_path / "torch")
        (tmp_path / "torch" / "torch" / "include").unlink()
        line = self.build(project, {MODULE}, PYTHONPATH=path)
        assert line == "t2t_fast._C; no operators: PyTorch 2.11.0+cpu is installed without its C++ headers"

    def test_no_toolkit(self, project, tmp_path):
        path = stand_in_torch(tmp_path / "torch", cuda="13.0")
        line = self.build(project, BOTH, PYTHONPATH=path, CUDA_HOME="/nowhere")
        assert line.endswith(CPU + "; no CUDA operators: CUDA_HOME is /nowhere, where no bin/nvcc can be run")

    def test_nvcc_fails(self, project, tmp_path):
        (project / "csrc" / "cuda").mkdir()
        (project / "csrc" / "cuda" / "kernel.cu").touch()
        home = stand_in_nvcc(tmp_path / "cuda", compiles="echo unsupported; exit 1")
        path = stand_in_torch(tmp_path / "torch", cuda="13.0")
        line = self.build(project, BOTH, PYTHONPATH=path, CUDA_HOME=str(home))
        assert line.endswith(CPU + "; no CUDA operators: " + FAILED)

    @pytest.mark.slow
    def test_pybind11_of_pytorch_serves_where_there_is_none(self, tmp_path):
        (tmp_path / "hidden").mkdir()
        (tmp_path / "hidden" / "pybind11.py").write_text("raise ImportError")
        project = copy_project(tmp_path / "project", kernels=False)
        path = os.pathsep.join([str(tmp_path / "hidden"), stand_in_torch(tmp_path / "torch")])
        assert self.build(project, BOTH, PYTHONPATH=path).startswith(f"t2t_fast._C and {CPU}; ")

    def test_only_the_module_fails(self, project, tmp_path):
        (project / "csrc" / "bindings.cpp").write_text("no C++")
        line = self.build(project, {LIBRARY}, PYTHONPATH=stand_in_torch(tmp_path / "torch"))
        reasons = ["no CUDA operators: PyTorch 2.11.0+cpu is built without CUDA", f"no t2t_fast._C: {FAILED}"]
        assert line.split("; ") == [CPU, *reasons]

    def test_only_the_operators_fail(self, project, tmp_path):
        (project / "csrc" / "operators.cpp").write_text("no C++")
        line = self.build(project, {MODULE}, PYTHONPATH=stand_in_torch(tmp_path / "torch"))
        assert line == "t2t_fast._C; no operators: " + FAILED


OPERATORS_CANNOT = "the operators cannot be built"


@pytest.mark.parametrize(
    "case",
    [
        "value",
        "nowhere",
        pytest.param("no-torch", marks=needs_no_torch),
        "cpu-only",
        "no-toolkit",
        "source",
        "module",
    ],
)
def test_a_requested_part_that_cannot_be_built_is_an_error(project, tmp_path, case):
    if case in ("no-torch", "cpu-only", "no-toolkit", "source", "module") and NO_OPERATORS:
        pytest.skip(NO_OPERATORS)
    cpu = {"T2T_FAST_BUILD": "cpu", "PYTHONPATH": stand_in_torch(tmp_path / "torch")}
    cuda = {"T2T_FAST_BUILD": "cuda", "PYTHONPATH": stand_in_torch(tmp_path / "torch13", "2.11.0", "13.0")}
    variables, message = {
        "value": ({"T2T_FAST_BUILD": "gpu"}, "T2T_FAST_BUILD must be one of auto, cuda, cpu, none, got 'gpu'"),
        "nowhere": (cpu | NOWHERE, f"cpu: {OPERATORS_CANNOT}: there is no C++ compiler: /nowhere/c++ is not found"),
        "no-torch": (
            {
                "T2T_FAST_BUILD": "cpu",
                "PYTHONPATH": tools(tmp_path / "tools", "setuptools"),
                "interpreter": make_venv(tmp_path) if case == "no-torch" else None,
            },
            f"cpu: {OPERATORS_CANNOT}: {NO_TORCH}",
        ),
        "cpu-only": (
            cpu | {"T2T_FAST_BUILD": "cuda"},
            f"cuda: {OPERATORS_CANNOT}: PyTorch 2.11.0+cpu is built without CUDA",
        ),
        "no-toolkit": (cuda | {"CUDA_HOME": "/nowhere"}, f"cuda: {OPERATORS_CANNOT}: CUDA_HOME is /nowhere, where no "),
        "source": (cpu, f"cpu: {OPERATORS_CANNOT}: {FAILED}"),
        "module": (cpu, f"cpu: t2t_fast._C cannot be built: {FAILED}"),
    }[case]
    if case in ("source", "module"):
        (project / "csrc" / {"source": "operators.cpp", "module": "bindings.cpp"}[case]).write_text("no C++")
    result = build_in_place(project, **variables)
    assert result.returncode != 0
    assert f"error: {'' if case == 'value' else 'T2T_FAST_BUILD='}{message}" in result.stdout
    assert "Traceback" not in result.stdout


def test_the_version_is_read_without_importing_torch(project):
    (project / "torch.py").write_text("raise SystemExit('torch was imported')")
    result = python(project, "setup.py", "--version", PYTHONPATH=str(project))
    assert result.stdout.splitlines()[-1] == t2t_fast.__version__

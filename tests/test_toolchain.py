"""What a build finds: the compiler, the CUDA toolkit behind any kind of nvcc, architectures, ninja, how many jobs."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from build_support import compiling, toolchain
from build_support.compiling import Step
from build_support.toolchain import CannotBuild, Toolkit, Torch
from building import NO_CUDA, stand_in_nvcc

TORCH = Torch(Path("/torch"), "2.11.0", "13.0")


@pytest.fixture(autouse=True)
def undecided(monkeypatch):
    """No variable decides anything."""
    for name in ("CC", "CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)


class TestCompiler:
    def test_cxx_is_a_command_line(self, monkeypatch):
        monkeypatch.setenv("CXX", f"'{sys.executable}' -m compiler")
        assert toolchain.find_compiler() == [sys.executable, "-m", "compiler"]

    def test_one_that_built_python_elsewhere_is_replaced(self, monkeypatch):
        monkeypatch.setattr(toolchain.sysconfig, "get_config_var", lambda name: "/nowhere/g++ -pthread")
        monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name == "c++" else None)
        assert toolchain.find_compiler() == ["c++"]


class TestToolkit:
    def test_cuda_home_goes_before_path(self, monkeypatch, tmp_path):
        chosen, other = (stand_in_nvcc(tmp_path / name) for name in ("chosen", "other"))
        monkeypatch.setenv("PATH", f"{other / 'bin'}{os.pathsep}{os.environ['PATH']}")
        assert toolchain.find_toolkit(TORCH).nvcc == str(other / "bin" / "nvcc")
        monkeypatch.setenv("CUDA_HOME", str(chosen))
        assert toolchain.find_toolkit(TORCH) == Toolkit(
            nvcc=str(chosen / "bin" / "nvcc"),
            version="13.0",
            includes=[f"-I{chosen}/include", "-isystem", f"{chosen}/include/cccl"],
            libraries=[f"-L{chosen}/lib"],
        )

    def test_folders_are_those_of_the_toolkit_behind_a_wrapper(self, monkeypatch, tmp_path):
        home = stand_in_nvcc(tmp_path / "cuda")
        wrapper = tmp_path / "wrapper" / "nvcc"
        wrapper.parent.mkdir()
        wrapper.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
        wrapper.chmod(0o755)
        monkeypatch.setenv("PATH", f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}")
        found = toolchain.find_toolkit(TORCH)
        assert (found.nvcc, found.libraries) == (str(wrapper), [f"-L{home}/lib"])

    @pytest.mark.parametrize(
        ("torch", "nvcc", "words"),
        [
            (TORCH._replace(cuda=None), {}, "PyTorch 2.11.0 is built without CUDA"),
            (TORCH, {"version": "12.9"}, "nvcc is of CUDA 12.9, PyTorch 2.11.0 of CUDA 13.0"),
        ],
        ids=["cpu-only", "other-major"],
    )
    def test_one_that_does_not_fit(self, monkeypatch, tmp_path, torch, nvcc, words):
        monkeypatch.setenv("CUDA_HOME", str(stand_in_nvcc(tmp_path / "cuda", **nvcc)))
        with pytest.raises(CannotBuild, match=words):
            toolchain.find_toolkit(torch)

    def test_another_minor_version_fits(self, monkeypatch, tmp_path):
        monkeypatch.setenv("CUDA_HOME", str(stand_in_nvcc(tmp_path / "cuda", version="13.2")))
        assert toolchain.find_toolkit(TORCH).version == "13.2"

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("#!/bin/sh\necho first; echo no toolkit here >&2; exit 1", "nvcc fails: no toolkit here"),
            ("#!/bin/sh\nexit 3", "nvcc fails: exit status 3"),
            ("#!/nowhere/sh", "nvcc does not run: "),
            ("#!/bin/sh\necho '#$ TOP=/nowhere'", "does not tell its version"),
        ],
        ids=["fails", "silent", "no-program", "tells-nothing"],
    )
    def test_a_broken_nvcc(self, monkeypatch, tmp_path, text, words):
        home = stand_in_nvcc(tmp_path / "cuda")
        (home / "bin" / "nvcc").write_text(text)
        monkeypatch.setenv("CUDA_HOME", str(home))
        with pytest.raises(CannotBuild, match=words):
            toolchain.find_toolkit(TORCH)

    def test_none(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(toolchain, "USUAL_NVCC", "/nowhere/nvcc")
        with pytest.raises(CannotBuild, match="nvcc is not found, neither by CUDA_HOME nor on PATH"):
            toolchain.find_toolkit(TORCH)


class TestArchitectures:
    @staticmethod
    def find(home, *known):
        nvcc = stand_in_nvcc(home, architectures=known) / "bin" / "nvcc"
        return toolchain.find_architectures(Toolkit(str(nvcc), "13.0", [], []))

    @pytest.mark.parametrize("value", [None, "", " ; "], ids=["unset", "empty", "blank"])
    def test_default_is_what_the_toolkit_can_and_ptx_of_the_newest(self, monkeypatch, tmp_path, value):
        if value is not None:
            monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)
        known = (75, 80, 86, 87, 88, 89, 90, 100, 110, 103, 120, 121)
        assert self.find(tmp_path / "new", *known) == ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"]
        assert self.find(tmp_path / "old", *known[:7]) == ["8.0", "8.6", "8.9", "9.0+PTX"]

    @pytest.mark.parametrize("text", ["8.0;9.0a+PTX", "8.0 9.0a+PTX", " 8.0 ; 9.0a+PTX;"])
    def test_those_that_are_named(self, monkeypatch, tmp_path, text):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
        assert self.find(tmp_path / "cuda", 80, 90) == ["8.0", "9.0a+PTX"]

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("Hopper", r"must be like '8.0;9.0a;12.0\+PTX', got 'Hopper'"),
            ("80", "got '80' in it"),
            ("8.0;13.0", "names 13.0, nvcc 13.0 builds 8.0 to 9.0"),
        ],
    )
    def test_those_that_cannot_be_built(self, monkeypatch, tmp_path, text, words):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
        with pytest.raises(CannotBuild, match=words):
            self.find(tmp_path / "cuda", 80, 90)

    def test_flags(self):
        assert toolchain.gencode("9.0a") == ["-gencode=arch=compute_90a,code=sm_90a"]
        both = ["-gencode=arch=compute_120,code=sm_120", "-gencode=arch=compute_120,code=compute_120"]
        assert toolchain.gencode("12.0+PTX") == both


@pytest.mark.skipif(NO_CUDA is not None, reason=f"no CUDA build is possible here: {NO_CUDA}")
def test_the_toolkit_of_this_machine():
    toolkit = toolchain.find_toolkit(toolchain.find_torch())
    folders = [Path(word.removeprefix("-I")) for word in toolkit.includes if word.startswith("-I")]
    assert any((folder / "cuda_runtime.h").is_file() for folder in folders)
    folders = [Path(word.removeprefix("-L")) for word in toolkit.libraries]
    assert any((folder / "libcudart_static.a").is_file() for folder in folders)
    assert toolchain.find_architectures(toolkit)[-1].endswith("+PTX")


class TestJobs:
    @pytest.mark.parametrize(("value", "jobs"), [("5", 5), ("1", 1)])
    def test_max_jobs(self, monkeypatch, value, jobs):
        monkeypatch.setenv("MAX_JOBS", value)
        assert compiling.job_count() == jobs

    @pytest.mark.parametrize("value", [None, "", "0", "many"])
    @pytest.mark.parametrize(("gigabytes", "jobs"), [(64, 4), (6, 3), (1, 1)])
    def test_cores_and_memory(self, monkeypatch, value, gigabytes, jobs):
        if value is not None:
            monkeypatch.setenv("MAX_JOBS", value)
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3})
        monkeypatch.setattr(compiling, "available_memory", lambda: gigabytes << 30)
        assert compiling.job_count() == jobs

    def test_memory_that_holds_files_is_available(self, monkeypatch):
        lines = "MemTotal: 8000 kB\nMemFree: 100 kB\nMemAvailable: 5000 kB\n"
        monkeypatch.setattr(Path, "read_text", lambda self: lines)
        monkeypatch.setattr(Path, "exists", lambda self: True)
        assert compiling.available_memory() == 5000 * 1024

    def test_memory_of_a_system_without_meminfo(self, monkeypatch):
        monkeypatch.setattr(Path, "exists", lambda self: False)
        monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": 7, "SC_PAGE_SIZE": 4096}.get)
        assert compiling.available_memory() == 7 * 4096


@pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "no-ninja"])
class TestSteps:
    @pytest.fixture
    def build(self, monkeypatch, tmp_path, ninja):
        """Makes ``out`` of ``a`` and ``b`` by a shell, in a folder whose name a careless quoting would break."""
        if not ninja:
            monkeypatch.setattr(compiling, "find_ninja", lambda: None)
        elif compiling.find_ninja() is None:
            pytest.skip("ninja is not installed here")
        folder = Path("an $odd: folder")
        (tmp_path / folder).mkdir()
        steps = []
        for name in "ab":
            (tmp_path / name).write_text(name)
            output = folder / f"{name}.o"
            words = 'cat "$0" > "$1"; printf "%s:" $2 > "$1.d"; test "$0" != "$FORBIDDEN"'
            steps.append(Step(output, [Path(name)], ["sh", "-c", words, name, str(output), "x"]))
        inputs = [step.output for step in steps]
        out = folder / "out"
        link = Step(out, inputs, ["sh", "-c", 'cat "$1" "$2" > "$0"', str(out), *map(str, inputs)])

        def run(**variables):
            compiling.run_steps(tmp_path, folder, steps, link, 2, {**os.environ, **variables})
            return (tmp_path / out).read_text()

        return run

    def test_all_steps_run(self, build):
        assert build() == "ab"

    def test_a_step_that_fails(self, build):
        with pytest.raises(CannotBuild, match="a compiler failed, its messages are above"):
            build(FORBIDDEN="b")


def test_ninja_is_found_in_the_environment_first(monkeypatch):
    places = {"/environment": "/environment/ninja", None: "on PATH"}
    monkeypatch.setattr(shutil, "which", lambda name, path=None: places.get(path))
    package = type(sys)("ninja")
    monkeypatch.setitem(sys.modules, "ninja", package)
    for folder, found in (("/environment", "/environment/ninja"), ("/nowhere", "on PATH"), ("", "on PATH")):
        package.BIN_DIR = folder
        assert compiling.find_ninja() == found
    monkeypatch.setitem(sys.modules, "ninja", None)
    assert compiling.find_ninja() == "on PATH"


def test_the_message_of_a_failing_compiler_is_printed(capfd, monkeypatch, tmp_path):
    monkeypatch.setattr(compiling, "find_ninja", lambda: None)
    step = Step(Path("a.o"), [Path("a")], ["sh", "-c", "echo this is wrong; exit 1"])
    with pytest.raises(CannotBuild):
        compiling.run_steps(tmp_path, Path("build"), [step], step, 1, dict(os.environ))
    assert "this is wrong" in capfd.readouterr().out

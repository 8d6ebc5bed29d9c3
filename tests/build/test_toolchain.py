"""What a build finds: compiler, PyTorch, CUDA toolkit behind any kind of nvcc, architectures, ninja, number of jobs."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from build_support import compiling, toolchain
from build_support.compiling import Step
from build_support.toolchain import CannotBuild, FrontEnd, Toolkit, Torch
from support.building import NO_CUDA, NO_OPERATORS, ROOT, make_venv, python, run, stand_in_nvcc, stand_in_torch

TORCH = Torch(Path("/torch"), "2.11.0", "13.0")


@pytest.fixture(autouse=True)
def undecided(monkeypatch):
    """Unset the variables that influence a build."""
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


@pytest.mark.skipif(sys.platform != "linux", reason="operators are built on Linux only")
class TestTorch:
    """Where an isolated build finds PyTorch, and which ones it rejects."""

    @pytest.fixture
    def environment(self, tmp_path):
        """Makes an environment with the given version of PyTorch (``None``: without one) and returns its Python."""

        def make(name, version=None):
            paths = [] if version is None else [stand_in_torch(tmp_path / name / "packages", version)]
            return make_venv(tmp_path / name, *paths)

        return make

    @pytest.fixture
    def isolated(self, monkeypatch, environment, tmp_path):
        """Isolates this process: its Python and the base Python have no PyTorch. Returns a setter of the front end."""
        bare = str(environment("bare"))
        monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
        monkeypatch.setattr(sys, "executable", bare)
        monkeypatch.setattr(sys, "_base_executable", bare)
        for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
            monkeypatch.delenv(name, raising=False)

        def set_front_end(*command, **variables):
            found = FrontEnd(str(tmp_path), list(map(str, command)), {"PATH": os.environ["PATH"], **variables})
            monkeypatch.setattr(toolchain, "front_end", lambda: found)

        set_front_end("make")
        return set_front_end

    @pytest.mark.skipif(NO_OPERATORS is not None, reason=str(NO_OPERATORS))
    def test_torch_is_found_without_importing_it(self):
        code = "import sys; from build_support.toolchain import find_torch; print(find_torch()); print(*sys.modules)"
        found, modules = python(ROOT, "-c", code).stdout.splitlines()
        assert f"version='{torch.__version__}', cuda={torch.version.cuda!r}, place=''" in found
        assert "torch" not in modules.split()

    def test_no_environment_has_one(self, isolated):
        with pytest.raises(CannotBuild, match="no PyTorch is found; install it first, and activate its environment"):
            toolchain.find_torch()

    @pytest.mark.parametrize(
        ("lead", "place"),
        [
            ("executable", "the environment it installs into"),
            ("VIRTUAL_ENV", "the active environment"),
            ("CONDA_PREFIX", "the active environment"),
            ("own VIRTUAL_ENV", "the active environment"),
            ("interpreter", "the front end's environment"),
            ("--python FOLDER", "the front end's environment"),
            ("--python=FOLDER", "the front end's environment"),
            (".venv", "the front end's environment"),
            ("base", "the base Python"),
        ],
    )
    def test_environments(self, isolated, environment, monkeypatch, tmp_path, lead, place):
        interpreter = environment("full", "2.14.0")
        folder = interpreter.parent.parent
        if lead == "executable":
            monkeypatch.setattr(sys, "executable", str(interpreter))
        elif lead == "base":
            monkeypatch.setattr(sys, "_base_executable", str(interpreter))
        elif lead == "own VIRTUAL_ENV":
            monkeypatch.setenv("VIRTUAL_ENV", str(folder))
        elif lead == ".venv":
            (tmp_path / ".venv").symlink_to(folder)
        elif lead.isupper():
            isolated("uv", "build", **{lead: str(folder)})
        else:
            words = {
                "interpreter": [interpreter.relative_to(tmp_path), "-m", "build"],
                "--python FOLDER": ["/usr/bin/uv", "pip", "install", "--python", folder, "."],
                "--python=FOLDER": ["/usr/bin/uv", "pip", "install", f"--python={folder.relative_to(tmp_path)}", "."],
            }
            isolated(*words[lead])
        found = toolchain.find_torch()
        assert (found.version, found.cuda, found.place) == ("2.14.0", None, place)
        assert found.name == f"PyTorch 2.14.0 of {place}"

    def test_the_environment_that_is_installed_into_goes_first(self, isolated, environment, monkeypatch):
        monkeypatch.setattr(sys, "executable", str(environment("target", "2.12.0")))
        isolated("pip", VIRTUAL_ENV=str(environment("active", "2.13.0").parent.parent))
        assert toolchain.find_torch().version == "2.12.0"

    def test_the_users_pythonpath_is_searched(self, isolated, tmp_path):
        """pip removes PYTHONPATH from an isolated build; environment modules of computing centres set it."""
        isolated("pip", PYTHONPATH=stand_in_torch(tmp_path / "modules", "2.13.0"))
        assert toolchain.find_torch().version == "2.13.0"

    def test_interpreters_that_do_not_run_are_skipped(self, isolated, environment, tmp_path):
        broken = tmp_path / "python2"
        broken.write_text("#!/nowhere/sh")
        broken.chmod(0o755)
        failing = tmp_path / "python3"
        failing.write_text("#!/bin/sh\necho /nowhere/torch/__init__.py; exit 1")
        failing.chmod(0o755)
        isolated(broken, failing, VIRTUAL_ENV=str(tmp_path / "gone"), CONDA_PREFIX=str(environment("conda", "2.13.0")))
        with pytest.raises(CannotBuild, match="no PyTorch is found"):
            toolchain.find_torch()

    @pytest.mark.parametrize(
        ("case", "words"),
        [
            ("old", "PyTorch 2.9.1 of the environment it installs into is older than 2.11"),
            ("headers", "PyTorch 2.14.0 of the environment it installs into is installed without its C.. headers"),
            ("lib", "PyTorch 2.14.0 of the environment it installs into is installed without its libraries: No such "),
            ("processor", "PyTorch 2.14.0 of the environment it installs into is built for another kind of processor"),
            ("silent", "PyTorch of the environment it installs into does not tell its version: "),
            ("nonsense", "PyTorch None of the environment it installs into has no version of the form 2.11"),
        ],
    )
    def test_one_that_does_not_fit(self, isolated, environment, monkeypatch, tmp_path, case, words):
        """The first PyTorch that is found is used, even if another environment has a suitable one."""
        monkeypatch.setattr(sys, "executable", str(environment("full", "2.9.1" if case == "old" else "2.14.0")))
        isolated("pip", VIRTUAL_ENV=str(environment("other", "2.14.0").parent.parent))
        package = tmp_path / "full" / "packages" / "torch"
        if case in ("headers", "lib", "processor"):
            (package / {"headers": "include"}.get(case, "lib")).unlink()
        if case == "processor":
            (package / "lib").mkdir()
            own = Path(sys._base_executable).resolve().read_bytes()[:20]
            (package / "lib" / "libtorch.so").write_bytes(own[:18] + bytes([own[18] ^ 1, own[19]]))
        if case == "silent":
            (package / "version.py").unlink()
        if case == "nonsense":
            (package / "version.py").write_text("debug = False")
        with pytest.raises(CannotBuild, match=words):
            toolchain.find_torch()

    def test_the_front_end_is_the_parent_process(self, tmp_path):
        code = f"import sys; sys.path.append({str(ROOT)!r})\nfrom build_support.toolchain import front_end as f\n"
        code += "import json; print(json.dumps(f()))"
        command = ["sh", "-c", 'VIRTUAL_ENV=/of/the/build "$@"; exit $?', "front", sys.executable, "-c", code]
        result = run(tmp_path, *command, VIRTUAL_ENV="/of/the/user")
        folder, words, variables = json.loads(result.stdout)
        assert (folder, words, variables["VIRTUAL_ENV"]) == (str(tmp_path), command, "/of/the/user")

    def test_without_a_front_end_that_can_be_read(self, monkeypatch):
        monkeypatch.setattr(os, "getppid", lambda: 0)
        monkeypatch.setenv("PYTHONPATH", "/of/the/build")
        monkeypatch.setenv("VIRTUAL_ENV", "/of/the/user")
        _, command, variables = toolchain.front_end()
        assert command == []
        assert variables == {
            name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")
        }


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
            (TORCH, {"version": "12.9"}, "nvcc is of CUDA 12.9, PyTorch 2.11.0 is built with CUDA 13.0"),
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
        ids=["fails", "silent", "no-program", "no-version"],
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
    def test_default_is_what_the_toolkit_supports_and_newest_ptx(self, monkeypatch, tmp_path, value):
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

    def test_page_cache_counts_as_available(self, monkeypatch):
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
        """Makes ``out`` from ``a`` and ``b`` with a shell, in a folder whose name requires correct quoting."""
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

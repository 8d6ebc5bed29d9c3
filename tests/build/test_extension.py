"""Loading native code: good, missing, damaged and foreign binaries, and the reasons that are reported."""

import importlib
import json
import re
import shutil
import struct
import sys
import sysconfig
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import t2t_fast
from build_support.toolchain import find_compiler
from support.building import LIBRARY, MODULE, ROOT, copy_project, needs_compiler, python, run
from t2t_fast import _extension, backends, functional
from t2t_fast.ops._common import native_library as native

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads the head of Linux's binaries")
NOT_BINARIES = {"empty": b"", "text": b"no ELF file", "windows": b"MZ" + bytes(500)}


@pytest.fixture
def package(tmp_path, monkeypatch, request):
    """The folder of an empty package with ``_extension.py``; each test has a package name of its own."""
    folder = tmp_path / f"package_{abs(hash(request.node.nodeid))}"
    folder.mkdir()
    (folder / "__init__.py").touch()
    shutil.copy(ROOT / "t2t_fast" / "_extension.py", folder)
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def load(package):
    return importlib.import_module(f"{package.name}._extension")


def record(package, mode, **missing):
    """Write the record of a build as ``setup.py`` does."""
    (package / "_build.json").write_text(json.dumps({"mode": mode, "missing": missing}))


def library(path, text, *flags):
    """Compile C++ text into a shared library."""
    source = path.with_suffix(".cpp")
    source.write_text(text)
    result = run(path.parent, *find_compiler(), "-shared", "-fPIC", source, "-o", path, *flags)
    assert result.returncode == 0, result.stdout
    return path


def damaged(content, kind):
    """A binary's bytes, cut off by an incomplete copy or altered to those of another machine's build."""
    content = bytearray(content)
    if kind == "cut":
        return content[: len(content) // 2]
    if kind == "head":
        return content[:40]
    if kind == "processor":
        content[18:20] = struct.pack("=H", 40 if content[18] != 40 else 62)  # 32-bit ARM, or x86-64
    if kind == "32-bit":
        content[4] = 3 - content[4]
    return content


class TestModule:
    @staticmethod
    def refused(extension):
        """Check that nothing is usable and nothing raises, and return the reason."""
        assert extension.load() is None
        assert extension.build_info() is None
        assert extension.cpu_features() == {}
        return extension.load_error()

    def test_not_built(self, package):
        assert self.refused(load(package)).startswith("not built (T2T_FAST_BUILD=cpu at installation builds it, ")

    def test_not_built_for_a_reason_that_is_known(self, package):
        record(package, "auto", **{"t2t_fast._C": "there is no C++ compiler"})
        assert self.refused(load(package)) == "not built (there is no C++ compiler)"

    def test_for_another_python(self, package):
        (package / "_C.cpython-38-x86_64-linux-gnu.so").touch()
        reason = self.refused(load(package))
        assert reason.startswith("built for another Python: found _C.cpython-38-x86_64-linux-gnu.so, this one loads ")

    @pytest.mark.parametrize("content", NOT_BINARIES.values(), ids=NOT_BINARIES)
    def test_no_binary(self, package, content):
        (package / MODULE).write_bytes(content)
        assert self.refused(load(package)).startswith("broken: ")

    @pytest.fixture
    def borrowed(self):
        """An extension module of this Python."""
        folder = sysconfig.get_config_var("DESTSHARED")
        others = sorted(Path(folder).glob(f"*{EXTENSION_SUFFIXES[0]}")) if folder else []
        if not others:
            pytest.skip("this Python has no extension module to copy")
        return others[0]

    def test_another_modules_binary(self, package, borrowed):
        shutil.copy(borrowed, package / MODULE)
        assert self.refused(load(package)).startswith("broken: ")

    @ON_LINUX
    @pytest.mark.parametrize("kind", ["cut", "processor"])
    def test_damaged(self, package, borrowed, kind):
        """Loading a file that is cut off would crash the process."""
        (package / MODULE).write_bytes(damaged(borrowed.read_bytes(), kind))
        words = {"cut": "broken: {} is cut off; ", "processor": "foreign: {} is built for another kind of processor; "}
        assert self.refused(load(package)).startswith(words[kind].format(package / MODULE))

    def test_a_module_of_the_same_name(self, package):
        (package / "_C.py").touch()
        assert self.refused(load(package)).startswith(f"foreign: {package / '_C.py'} is not the native module")

    @pytest.mark.skipif(_extension.load() is None, reason=f"t2t_fast._C is not loaded here: {_extension.load_error()}")
    def test_good(self):
        assert _extension.load_error() is None
        assert _extension.build_info() == _extension.load().build_info()
        assert _extension.cpu_features() == _extension.load().cpu_features()


class TestOperators:
    @staticmethod
    def refused(extension):
        assert extension.operators() is False
        return extension.operators_error()

    def test_not_built(self, package):
        assert self.refused(load(package)).startswith("not built (T2T_FAST_BUILD=cpu at installation builds it, ")

    @pytest.mark.parametrize("content", ["", "{", "[]", '"auto"', '{"mode": 1}', '{"missing": {}}'])
    def test_a_record_without_information(self, package, content):
        (package / "_build.json").write_text(content)
        assert self.refused(load(package)).startswith("not built (T2T_FAST_BUILD=cpu at installation builds it, ")

    @pytest.mark.parametrize(
        ("mode", "missing", "words", "lacking"),
        [
            ("auto", {"cpu": "no compiler", "cuda": "no compiler"}, "not built (no compiler)", ("cpu", "cuda")),
            ("cpu", {}, "not built (T2T_FAST_BUILD=cpu at installation builds it, or says why it cannot)", ("cpu",)),
            ("none", {}, "not built, as T2T_FAST_BUILD=none asked for at installation", ()),
        ],
    )
    def test_not_built_for_the_reason_in_the_record(self, package, mode, missing, words, lacking):
        record(package, mode, **missing)
        extension = load(package)
        assert self.refused(extension) == words
        for device in ("cpu", "cuda"):
            assert extension.lacking(device) == (words if device in lacking else None)

    @pytest.mark.parametrize("content", NOT_BINARIES.values(), ids=NOT_BINARIES)
    def test_no_binary(self, package, content):
        (package / LIBRARY).write_bytes(content)
        assert self.refused(load(package)).startswith("broken: ")

    @ON_LINUX
    @needs_compiler
    @pytest.mark.parametrize(
        ("kind", "words"),
        [
            ("cut", "broken: {} is cut off; reinstall t2t_fast to build it again"),
            ("head", "broken: {} is no shared library; reinstall t2t_fast to build it again"),
            ("processor", "foreign: {} is built for another kind of processor; reinstall t2t_fast to build it again"),
            ("32-bit", "foreign: {} is built for another kind of processor; reinstall t2t_fast to build it again"),
        ],
    )
    def test_damaged(self, package, kind, words):
        path = library(package / LIBRARY, "int nothing;")
        path.write_bytes(damaged(path.read_bytes(), kind))
        assert self.refused(load(package)) == words.format(path)

    @ON_LINUX
    @needs_compiler
    def test_built_for_another_pytorch(self, package):
        library(package / LIBRARY, 'extern "C" int torch_of_tomorrow(); int now = torch_of_tomorrow();')
        words = f"broken: PyTorch {torch.__version__} has no torch_of_tomorrow, the file is built for another version; "
        assert self.refused(load(package)).startswith(words)

    @ON_LINUX
    @needs_compiler
    def test_a_library_that_it_needs_is_not_here(self, package):
        other = library(package / "libother.so", "int other() { return 1; }")
        library(package / LIBRARY, "int other(); int now = other();", f"-L{package}", "-lother")
        other.unlink()
        assert self.refused(load(package)).startswith("broken: it needs libother.so, which is not found; ")

    def test_a_newer_system(self):
        error = OSError("libm.so.6: version `GLIBC_2.99' not found (required by _ops.so)")
        words = _extension._words(error, "PyTorch")
        assert words.startswith("built on a newer system, this one has no GLIBC_2.99; ")

    @ON_LINUX
    @needs_compiler
    def test_a_library_without_operators(self, package, monkeypatch):
        library(package / LIBRARY, "int nothing;")
        # this process may have loaded the real operators
        monkeypatch.setattr(torch.ops, "t2t_fast_native", object(), raising=False)
        words = f"foreign: {package / LIBRARY} has no operators of t2t_fast; remove it"
        assert self.refused(load(package)) == words

    def test_tried_once(self, package):
        extension = load(package)
        first = self.refused(extension)
        (package / LIBRARY).write_text("came later")
        assert self.refused(extension) == first

    @pytest.mark.skipif(
        not _extension.operators(), reason=f"t2t_fast._ops is not loaded here: {_extension.operators_error()}"
    )
    def test_good(self):
        assert _extension.operators_error() is None
        assert torch.ops.t2t_fast_native.soft_split.default._schema.name == "t2t_fast_native::soft_split"


WITHOUT_NATIVE_CODE = """
import sys, warnings

warnings.simplefilter("always")
warnings.showwarning = lambda message, category, *place: print("warned:", category.__name__, message)
import torch, t2t_fast
from t2t_fast import functional, reference

x, w = torch.randn(1, 3, 8, 8), torch.randn(4, 147)
print(t2t_fast.explain("soft_split").chosen("soft_split"))
functional.soft_split(x, 3, 2, 1, backend="aten")
functional.soft_split_linear(x.double(), w.double(), kernel_size=7, stride=4, padding=2)
with t2t_fast.backend("aten"):
    functional.soft_split(x, 3, 2, 1)
torch.export.export(t2t_fast.SoftSplit(3, 2, 1), (x,))
print("called")
call = lambda x: functional.soft_split_linear(functional.soft_split(x, 3, 2, 1), w[:, :27], kernel_size=1, grid=(4, 4))
if sys.argv[1] == "compiled":
    call = torch.compile(call, backend="eager", fullgraph=True)
call(x)
call(torch.cat([x, x]))
"""


@pytest.fixture(scope="module")
def without_native_code(tmp_path_factory):
    """A PYTHONPATH with a copy of the package without native code."""
    folder = tmp_path_factory.mktemp("pure")
    shutil.copytree(ROOT / "t2t_fast", folder / "t2t_fast", ignore=shutil.ignore_patterns("*.so", "_build.json"))
    return folder


class TestWarning:
    """``auto`` warns once, at the first call, if it selects plain operations only because native code was not built."""

    @pytest.fixture
    def missing(self, monkeypatch):
        """Simulate a process without native operators that has not warned yet."""
        monkeypatch.setattr(native, "_MISSING", "not built (for a test)")
        monkeypatch.setattr(native, "_warned", False)
        monkeypatch.setattr(_extension, "lacking", lambda device: "not built (for a test)")
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        torch._dynamo.reset()

    @staticmethod
    def call(dtype=torch.float32, **options):
        return functional.soft_split(torch.ones(1, 3, 8, 8, dtype=dtype), 3, 2, 1, **options)

    @ON_LINUX
    @pytest.mark.parametrize(
        ("mode", "how"),
        [
            ("auto", "compiled"),
            pytest.param("auto", "eager", marks=pytest.mark.slow),
            pytest.param("none", "compiled", marks=pytest.mark.slow),
        ],
    )
    def test_an_installation_without_native_code(self, without_native_code, how, mode):
        if mode == "auto" and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
            pytest.skip("auto would not select the native layers on this CPU")
        record(without_native_code / "t2t_fast", mode, cpu="there is no C++ compiler: c++ is not found")
        path = str(without_native_code)
        result = python("/", "-c", WITHOUT_NATIVE_CODE, how, PYTHONPATH=path, OMP_NUM_THREADS="1")
        assert result.returncode == 0, result.stdout
        first, second, *warned = [line for line in result.stdout.splitlines() if "t2t_fast" in line or " " not in line]
        assert (first, second) == ("aten", "called")
        words = [
            "warned: RuntimeWarning t2t_fast: soft_split runs as plain PyTorch operations, since the native operators",
            "for cpu are not built (there is no C++ compiler: c++ is not found): a Performer T2T module takes about",
            "three times as long. To build them, run in its source folder:",
            "T2T_FAST_BUILD=cpu pip install --force-reinstall --no-deps .",
            "(T2T_FAST_BACKEND=aten keeps plain operations and silences this)",
        ]
        assert warned == ([" ".join(words)] if mode == "auto" else [])

    def test_once(self, missing):
        with pytest.warns(RuntimeWarning, match="soft_split runs as plain PyTorch operations") as found:
            self.call()
            self.call()
            functional.soft_composition(torch.ones(1, 16, 27), (8, 8), 3, 2, 1)
        assert len(found) == 1
        assert "\n" not in str(found[0].message)

    @pytest.mark.parametrize("case", ["argument", "context", "variable", "no kernel", "mask", "old CPU", "explain"])
    def test_never_where_something_else_decides(self, missing, monkeypatch, recwarn, case):
        if case == "argument":
            self.call(backend="aten")
        if case == "context":
            with t2t_fast.backend("aten", op="soft_split"):
                self.call()
        if case == "variable":
            monkeypatch.setattr(backends, "_DEFAULT", "aten")
            self.call()
        if case == "no kernel":
            x, w = torch.ones(1, 3, 8, 8, dtype=torch.float64), torch.ones(4, 27, dtype=torch.float64)
            functional.soft_split_linear(x, w, kernel_size=3)
        if case == "mask":
            q = torch.ones(1, 4, 8)
            functional.performer_attention(q, q, q, torch.ones(4, 8), key_mask=torch.ones(1, 4, dtype=torch.bool))
        if case == "old CPU":
            monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
            self.call()
        if case == "explain":
            t2t_fast.explain(dtype=torch.float64)  # no Triton kernels, whose self-test takes long in the interpreter
        assert [str(each.message) for each in recwarn if "t2t_fast" in str(each.message)] == []

    def test_a_warning_turned_into_an_error_is_raised_once(self, missing):
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            with pytest.raises(RuntimeWarning, match="T2T_FAST_BUILD=cpu pip install"):
                self.call()
            self.call()

    def test_on_cuda_only_for_operators_with_a_cuda_kernel(self, missing):
        """Tests the choice of the backend alone, which needs no device."""
        for op in backends.operators():
            native._warned = False
            request = backends.Request("cuda", torch.float32, {})
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                assert native.noticed(op, request, "auto", "aten") == "aten"
            said = [str(each.message) for each in found]
            assert len(said) == (op in native.CUDA_KERNELS)
            assert all("T2T_FAST_BUILD=cuda pip install" in text for text in said)

    def test_the_operators_that_have_a_kernel_on_cuda(self):
        registered = re.findall(r'library\.impl\("(\w+)"', (ROOT / "csrc" / "cuda" / "operators.cpp").read_text())
        assert set(registered) == set(native.CUDA_KERNELS)


@pytest.mark.slow
@ON_LINUX
@needs_compiler
def test_broken_binaries_break_neither_the_import_nor_env(tmp_path):
    """The package works without native code, and ``env`` reports the fault of both files."""
    project = copy_project(tmp_path / "project")
    (project / "t2t_fast" / MODULE).write_text("no binary")
    path = library(project / "t2t_fast" / LIBRARY, "int nothing;")
    path.write_bytes(damaged(path.read_bytes(), "cut"))
    result = python(project, "-c", "import t2t_fast; print(t2t_fast.__file__)")
    assert result.returncode == 0, result.stdout
    assert result.stdout.splitlines()[-1] == str(project / "t2t_fast" / "__init__.py")
    report = python(project, "-m", "t2t_fast", "env", OMP_NUM_THREADS="1", TRITON_INTERPRET="0")
    assert report.returncode == 0, report.stdout
    lines = [line.split(maxsplit=1) for line in report.stdout.splitlines() if line.startswith("  t2t_fast._")]
    assert {name: words.split(": ")[0] for name, words in lines} == {"t2t_fast._C": "broken", "t2t_fast._ops": "broken"}
    assert "_ops.so is cut off" in report.stdout

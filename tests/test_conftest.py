"""Tests of conftest.py: filled memory, seeds, caches, scheduling, skips, ``--require-backend``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import conftest
from conftest import scope
from t2t_fast.ops._common import triton_runtime
from t2t_fast.testing import CASES

pytest_plugins = ["pytester"]

SOURCE = """
import pytest

@pytest.mark.parametrize("backend", ["triton", "aten"])
def test_by_parameter(backend):
    pytest.skip("not here")

def test_by_reason():
    pytest.skip("backend 'native' has no implementation")

def test_unrelated():
    pytest.skip("no alternative")

@pytest.mark.xfail(reason="triton is wrong", strict=True)
def test_expected_failure():
    raise ValueError
"""


@pytest.fixture
def suite(pytester):
    """A folder with this suite's conftest, in which generated tests run."""
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text())
    pytester.makeini("[pytest]\nmarkers = gpu: needs a CUDA device")
    return pytester


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(1000),
        lambda: torch.ones(10, 100).new_empty(1000),
        lambda: torch.empty_like(torch.ones(10, 100, dtype=torch.bfloat16)),
        lambda: torch.empty_strided((10, 10), (1, 10), dtype=torch.float64),
    ],
    ids=["empty", "new_empty", "empty_like", "empty_strided"],
)
def test_unwritten_memory_is_nan(allocate):
    assert allocate().isnan().all()


@pytest.mark.parametrize("turn", [1, 2])
def test_every_test_starts_from_the_same_seed(turn):
    value = torch.rand(())
    torch.manual_seed(0)
    assert torch.rand(()) == value


@pytest.mark.parametrize(
    ("required", "outcome"),
    [
        ([], {"skipped": 4, "xfailed": 1}),
        (["triton"], {"skipped": 3, "failed": 1, "xfailed": 1}),
        (["native"], {"skipped": 3, "failed": 1, "xfailed": 1}),
        (["triton", "native", "aten"], {"skipped": 1, "failed": 3, "xfailed": 1}),
    ],
    ids=["none", "by-parameter", "by-reason", "several"],
)
def test_require_backend_turns_a_skip_into_a_failure(suite, required, outcome):
    suite.makepyfile(SOURCE)
    result = suite.runpytest(*(f"--require-backend={name}" for name in required))
    result.assert_outcomes(**outcome)


def test_require_backend_holds_for_a_module_that_skips_itself(suite):
    suite.makepyfile("import pytest\npytest.importorskip('triton_that_is_not_installed', reason='triton is missing')")
    suite.runpytest().assert_outcomes(skipped=1)
    result = suite.runpytest("--require-backend=triton")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*--require-backend triton, but *would be skipped: *triton is missing*"])


def test_require_backend_rejects_an_unknown_name(suite):
    result = suite.runpytest("--require-backend=cuda")
    assert result.ret == pytest.ExitCode.USAGE_ERROR


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device, no gpu test is skipped")
def test_gpu_tests_say_why_they_are_skipped(suite):
    suite.makepyfile("import pytest\n@pytest.mark.gpu\ndef test_device(): raise AssertionError")
    result = suite.runpytest("-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*no CUDA device*"])


CACHE_TEST = """
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")

@pytest.mark.parametrize("turn", [1, 2])
def test_caches(turn):
    folders = [os.environ[name] for name in VARIABLES]
    assert cache_dir() == folders[0] and not any(list(Path(folder).glob("*")) for folder in folders)
    child = "import os, sys; print(*[os.environ[name] for name in sys.argv[1:]])"
    assert subprocess.check_output([sys.executable, "-c", child, *VARIABLES], text=True).split() == folders
    with open("folders", "a") as file:
        print(*folders, file=file)
"""


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)], ids=["one process", "workers"])
def test_compile_caches_are_new_in_each_run_and_removed_after_it(suite, monkeypatch, workers):
    """Workers and child processes share the caches; after a run in this process the caller's variables are restored."""
    before = [os.environ[name] for name in conftest.CACHES]
    users = suite.mkdir("users")
    for name in conftest.CACHES:
        monkeypatch.setenv(name, str(users))
    suite.makepyfile(CACHE_TEST)
    if workers:
        pytest.importorskip("xdist")
        own = Path(conftest.__file__)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(own.parents[1]), str(own.parent)]))
        suite.runpytest_subprocess("-n", str(workers)).assert_outcomes(passed=2)
    else:
        for _ in range(2):
            suite.runpytest().assert_outcomes(passed=2)
    assert [os.environ[name] for name in conftest.CACHES] == 2 * [str(users)] and not list(users.iterdir())
    runs = set((suite.path / "folders").read_text().splitlines())
    assert len(runs) == (1 if workers else 2)
    folders = {Path(folder) for run in runs for folder in run.split()}
    assert len(folders) == 2 * len(runs) and not folders & {users, *map(Path, before)}
    assert not any(folder.parent.exists() for folder in folders)


COMPILES = """
import torch

def test_compile():
    compiled = torch.compile(lambda x: x.sin() + x.cos())
    x = torch.randn(37)
    torch.testing.assert_close(compiled(x), x.sin() + x.cos())
"""


@pytest.mark.slow
def test_a_broken_library_in_the_users_cache_does_not_matter(suite, monkeypatch):
    """An empty library, as a killed run leaves it, breaks a process that uses that cache, but not the tests."""
    users = suite.mkdir("users")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(users))
    path = suite.makepyfile(COMPILES)
    code = f"import runpy; runpy.run_path({str(path)!r})['test_compile']()"

    def in_the_users_cache():
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).returncode == 0

    if not in_the_users_cache():
        pytest.skip("torch.compile does not work here")
    libraries = list(users.rglob("*.so"))
    for library in libraries:
        library.write_bytes(b"")
    assert libraries and not in_the_users_cache()
    own = Path(conftest.__file__)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(own.parents[1]), str(own.parent)]))
    suite.runpytest_subprocess().assert_outcomes(passed=1)


def test_commands_do_not_inherit_xdist_variables():
    assert not [name for name in os.environ if name.startswith("PYTEST_XDIST_")]


def test_scope_is_the_file_if_it_has_a_module_fixture():
    checks = [f"tests/build/test_packaging.py::test_one[{name}]" for name in ("a", "b")]
    assert {scope(nodeid) for nodeid in checks} == {"tests/build/test_packaging.py"}
    alone = ["tests/interop/test_swap.py::test_one", "tests/interop/test_swap.py::TestSome::test_two[a::b]"]
    assert [scope(nodeid) for nodeid in alone] == alone


@pytest.mark.slow
def test_a_file_with_a_module_fixture_runs_in_one_worker(pytester, monkeypatch):
    pytest.importorskip("xdist")
    own = Path(conftest.__file__)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(own.parents[1]), str(own.parent)]))
    pytester.makeconftest(
        f"""
        from importlib.util import module_from_spec, spec_from_file_location

        spec = spec_from_file_location("suite", {str(own)!r})
        suite = module_from_spec(spec)
        spec.loader.exec_module(suite)
        suite.ROOT = suite.Path(__file__).parent
        pytest_xdist_make_scheduler = suite.pytest_xdist_make_scheduler
        """
    )
    shared = """
        import os
        import pytest

        @pytest.fixture(scope="module")
        def worker():
            return os.getpid()

        @pytest.mark.parametrize("number", range(6))
        def test_shared(worker, number):
            with open(f"{__name__}-{worker}", "a"):
                pass
        """
    pytester.makepyfile(test_a=shared, test_b=shared)
    result = pytester.runpytest_subprocess("-n", "2", "--dist", "loadgroup")
    result.assert_outcomes(passed=12)
    made = sorted(path.name.partition("-")[0] for path in pytester.path.glob("test_?-*"))
    assert made == ["test_a", "test_b"]


@pytest.mark.interpret
@pytest.mark.skipif(not triton_runtime.INTERPRETED, reason="not under TRITON_INTERPRET=1")
def test_the_interpreter_patches_its_language_once_per_launch(monkeypatch):
    """Once for each module whose functions the launch runs; the patches are removed at the end."""
    from triton import language
    from triton.runtime import interpreter

    launches, modules = [], []
    prepare, launch = interpreter._patch_lang_tensor, interpreter.GridExecutor.__call__
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", lambda *rest: modules.append(rest) or prepare(*rest))
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *a, **b: launches.append(a) or launch(*a, **b))
    before = dict(vars(language))
    CASES["performer_attention"]()[0].run("triton")
    assert launches and len(launches) <= len(modules) <= 6 * len(launches)
    assert vars(language) == before


@pytest.mark.interpret
@pytest.mark.skipif(not triton_runtime.INTERPRETED, reason="not under TRITON_INTERPRET=1")
@pytest.mark.parametrize("shape", [(), (16,), (1, 32, 4)], ids=str)
@pytest.mark.parametrize("name", ["int1", "uint8", "int64", "float16", "bfloat16", "float32", "pointer"])
def test_remembered_types_equal_computed_ones(name, shape):
    """Twice: the first value of a type is computed, the next ones are looked up."""
    from triton.language import core
    from triton.runtime import interpreter

    element = core.pointer_type(core.float16) if name == "pointer" else getattr(core, name)
    for _ in range(2):
        found, expected = (core.block_type.__new__(core.block_type) for _ in range(2))
        if shape:
            core.block_type.__init__(found, element, [core.constexpr(shape[0]), *shape[1:]])
            core.block_type.__init__.__wrapped__(expected, element, list(shape))
            assert str(vars(found)) == str(vars(expected)) and found == expected
        kind = found if shape else element
        assert interpreter._get_np_dtype(kind) == interpreter._get_np_dtype.__wrapped__(kind)
        values = [core.tensor.__new__(core.tensor) for _ in range(2)]
        core.tensor.__init__(values[0], None, kind)
        core.tensor.__init__.__wrapped__(values[1], None, kind)
        assert vars(values[0]).keys() == vars(values[1]).keys()
        assert repr(vars(values[0])["shape"].values) == repr(vars(values[1])["shape"].values)
        assert values[0].numel == values[1].numel and values[0].dtype == values[1].dtype == element


def test_a_shape_that_is_no_power_of_two_is_still_refused():
    language = pytest.importorskip("triton.language")
    with pytest.raises(ValueError, match="power of 2"):
        language.block_type(language.float32, [3])

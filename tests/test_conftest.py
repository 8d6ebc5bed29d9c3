"""The suite's own rules: filled memory, seeds, division among processes, skips, ``--require-backend``."""

import os
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
    """A folder with this suite's conftest, to run other tests under it."""
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


def test_require_backend_knows_the_names(suite):
    result = suite.runpytest("--require-backend=cuda")
    assert result.ret == pytest.ExitCode.USAGE_ERROR


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, so nothing is skipped for want of one")
def test_gpu_tests_say_why_they_are_skipped(suite):
    suite.makepyfile("import pytest\n@pytest.mark.gpu\ndef test_device(): raise AssertionError")
    result = suite.runpytest("-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*no CUDA device*"])


def test_a_command_does_not_learn_that_it_was_started_by_one_worker_of_several():
    assert not [name for name in os.environ if name.startswith("PYTEST_XDIST_")]


def test_tests_that_share_what_takes_long_stay_together():
    checks = [
        f"tests/benchmarks/test_triton_report.py::test_machine_code[{name}]" for name in ("registers", "completeness")
    ]
    assert {scope(nodeid) for nodeid in checks} == {"tests/benchmarks/test_triton_report.py"}
    alone = ["tests/interop/test_swap.py::test_one", "tests/interop/test_swap.py::TestSome::test_two[a::b]"]
    assert [scope(nodeid) for nodeid in alone] == alone


def test_workers_get_files_that_share_as_a_whole(pytester, monkeypatch):
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
def test_the_interpreter_prepares_its_language_once_a_launch(monkeypatch):
    """For each module whose functions the launch runs; and takes all of it back at the end."""
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

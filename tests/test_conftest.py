"""The suite's own rules: filled memory, seeds, division among processes, skips, ``--require-backend``."""

import os
from pathlib import Path

import pytest
import torch

from conftest import divide
from t2t_fast.ops import triton_runtime
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


SHARING = """
import pytest

def test_alone():
    pass

@pytest.fixture
def own():
    pass

@pytest.fixture(scope="module")
def made_once():
    pass

@pytest.fixture(scope="module", params=["a", "b"])
def made_once_each(request):
    pass

@pytest.fixture
def by_another(made_once):
    pass

@pytest.mark.parametrize("number", [1, 2])
def test_own(own, tmp_path_factory, number):
    pass

def test_first(made_once):
    pass

@pytest.mark.slow
def test_each(made_once_each):
    pass

class TestInside:
    def test_second(self, by_another):
        pass

    @pytest.mark.slow
    def test_each_again(self, made_once_each):
        pass
"""


def test_what_shares_stays_together_and_what_is_slow_comes_first(pytester):
    items = pytester.getitems(SHARING)
    divide(items)
    groups = {item.name: [mark.args[0] for mark in item.iter_markers("xdist_group")] for item in items}
    each = {
        f"test_each{again}[{name}]": [f"{items[0].path.stem}-{number}"]
        for again in ("", "_again")
        for number, name in enumerate("ab")
    }
    together = [items[0].path.stem]
    alone = {"test_alone": [], "test_own[1]": [], "test_own[2]": []}
    assert groups == {**each, **alone, "test_first": together, "test_second": together}
    assert {item.name for item in items[: len(each)]} == set(each)
    # nothing else has moved
    assert [item.name for item in items[len(each) :]] == [*alone, "test_first", "test_second"]


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

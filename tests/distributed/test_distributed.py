"""Two processes on a CPU (gloo) run the checks of ``support.distributed``, which says how to run some by hand."""

from functools import cache

import pytest
import torch.distributed

from support import distributed

QUICK, SLOW = ("ddp", "fsdp", "orders"), ("parallel", "compiled")

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this PyTorch has no gloo", allow_module_level=True)


@pytest.fixture(scope="module")
def results():
    """Suites -> their results; the suites of one argument share one launch."""
    return cache(lambda suites: distributed.launch(*suites))


@pytest.mark.parametrize(
    "suites, suite, name",
    [
        pytest.param(suites, suite, name, marks=[pytest.mark.slow] if suites is SLOW else [], id=f"{suite}-{name}")
        for suites in (QUICK, SLOW)
        for suite in suites
        for name in distributed.checks(suite)
    ],
)
def test_in_two_processes(results, suites, suite, name):
    failures = results(suites)[suite][name]
    assert not failures, f"\n{failures}"


def test_a_failure_is_reported():
    """A check that fails in one process fails in the test, with that process's traceback, and the next ones run."""
    found = distributed.launch("examples")["examples"]
    assert found["passes"] == found["passes_again"] == ""
    assert "rank 1" in found["fails_in_one"] and "only here" in found["fails_in_one"]
    assert "rank 0" in found["fails_in_one"], "its collective ends at once, with the group of the other process"

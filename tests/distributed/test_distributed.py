"""Two processes on a CPU (gloo): the checks of ``support.distributed``, one launch for each suite.

By hand, with times: ``python -m torch.distributed.run --standalone --nproc-per-node 2 -m support.distributed ddp``.
"""

from functools import cache

import pytest
import torch.distributed

from support import distributed

SUITES = {"ddp": False, "fsdp": False, "orders": False, "parallel": True, "compiled": True}
"""Name -> whether it is slow."""

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this PyTorch has no gloo", allow_module_level=True)


@pytest.fixture(scope="module")
def results():
    """Suite -> its results; each suite runs once."""
    return cache(lambda suite: distributed.launch(suite, ()))


@pytest.mark.parametrize(
    "suite, name",
    [
        pytest.param(suite, name, marks=[pytest.mark.slow] if slow else [], id=f"{suite}-{name}")
        for suite, slow in SUITES.items()
        for name in distributed.checks(suite)
    ],
)
def test_in_two_processes(results, suite, name):
    failures = results(suite)[name]
    assert not failures, f"\n{failures}"

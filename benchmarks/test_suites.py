"""The timed rows under pytest-benchmark: ``pytest benchmarks -m headline -k "token_mlp and inference"``.

Each row is checked against float64 and then timed alone, for pytest-benchmark's own files, histograms and comparisons.
The time of a row in another process includes the request and the answer.
Ratios between rows need interleaved rounds: ``python -m benchmarks``.
"""

import pytest
import torch

from .measure import clocks, harness
from .suites import subjects
from .suites.groups import TIMED, LeftOut
from .suites.providers import BY_NAME, plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def subject_of():
    """A function that returns the subject of a group and keeps the last one."""
    kept = {}

    def close():
        while kept:
            kept.popitem()[1].close()

    def subject(group):
        if group not in kept:
            close()
            kept[group] = subjects.build(group, DEVICE)
        return kept[group]

    yield subject
    close()


def _rows():
    headline = {(group.id, name) for group, names in plan(TIMED, DEVICE, True).items() for name in names}
    for group, names in plan(TIMED, DEVICE, False).items():
        for name in names:
            marks = [pytest.mark.headline] if (group.id, name) in headline else []
            yield pytest.param(group, name, id=f"{group.id}-{name}", marks=marks)


@pytest.mark.parametrize(("group", "name"), list(_rows()))
def test_row(group, name, benchmark, subject_of):
    torch._dynamo.reset()
    try:
        clock = clocks.clock(DEVICE, "latency")
        row = harness.prepare(subject_of(group), BY_NAME[name], DEVICE, clock, thorough=False)
    except LeftOut as reason:
        pytest.skip(str(reason))

    def call():
        row.implementation.clear()
        row.step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group, benchmark.extra_info["error"] = group.id, row.facts["error"]
    benchmark(call)

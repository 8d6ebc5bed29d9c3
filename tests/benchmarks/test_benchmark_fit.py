"""The largest batch that fits, and processes that train side by side."""

import pytest

from benchmarks.measure import fit, processes
from benchmarks.suites.groups import Group
from benchmarks.suites.providers import BY_NAME
from support.runs import FITTING


@pytest.mark.parametrize(
    ("offset", "slope", "limit", "expected"),
    [(100, 10, 1000, 90), (0, 10, 1000, 100), (995, 10, 1000, 0), (0, 400, 1000, 2), (0, 0.001, 50, 50_000)],
    ids=["a line", "exactly full", "not even one", "between the probes", "a small step"],
)
def test_largest_batch_on_a_line(offset, slope, limit, expected):
    tries = []

    def used(batch):
        tries.append(batch)
        return offset + slope * batch

    batch, bytes_used, over = fit.largest(used, limit)
    assert batch == expected
    assert over > limit >= bytes_used
    assert len(tries) == len(set(tries)) <= 9


def test_largest_batch_with_nonlinear_memory():
    """Memory grows quadratically, and a failed allocation reports no size."""
    tries = []

    def used(batch):
        tries.append(batch)
        return None if batch > 777 else 50 * batch + batch**2 / 100

    assert fit.largest(used, 1e6) == (777, used(777), None)
    assert len(tries) < 20


def test_largest_batch_is_bounded():
    batch, _, _ = fit.largest(lambda batch: 0, 1)
    assert batch == fit.MOST


@pytest.mark.slow
def test_the_largest_batch_of_a_model(monkeypatch):
    monkeypatch.setitem(fit.LIMIT_BYTES, "cpu", 1e8)
    group, said = FITTING._replace(size=64), []
    found = [fit.measure(group, name, "cpu", said.append) for name in ("upstream", "t2t_fast")]
    for entry in found:
        assert entry["used_bytes"] <= entry["limit_bytes"] < entry["over_bytes"]
    upstream, ours = found
    assert ours["batch"] > upstream["batch"] > 3
    assert "a step of 1 image" in said
    trainer = fit.Trainer(group, BY_NAME["upstream"], "cpu")
    trainer.used(1, 1e8)  # makes the optimizer's state
    assert trainer.used(upstream["batch"], 1e8) == pytest.approx(upstream["used_bytes"], rel=0.02)


@pytest.mark.slow
def test_two_processes_train_together():
    group = Group("model", "t2t_vit_7", 64, 2, "fp32", "training", False, "processes", 2)
    entry = processes.measure(group, "t2t_fast", "cpu", lambda text: None)
    assert len(entry["times"]) == processes.ROUNDS
    assert entry["images_per_s"] == pytest.approx(4 / entry["seconds"]["median"])
    assert (entry["group"], entry["processes"]) == ("processes-t2t_vit_7-64px-b2-fp32-training-n2", 2)


def test_failed_process_reports_its_error():
    group = Group("model", "no_such_model", 64, 2, "fp32", "training", False, "processes", 1)
    with pytest.raises(AttributeError, match="no attribute 'no_such_model'"):
        processes.measure(group, "t2t_fast", "cpu", lambda text: None)

"""What calls must have in common for one to stand for the others (ops/_common/guards.py)."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from t2t_fast.ops._common import guards


class Subclass(torch.Tensor):
    pass


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


STATES = {
    "suspended": guards.suspended,
    "dispatch mode": Mode,
    "function mode": torch.overrides.BaseTorchFunctionMode,
    "default device": lambda: torch.device("cpu"),
    "profiler": lambda: torch.autograd.profiler.profile(),
}


@pytest.mark.parametrize("name", STATES)
def test_states_in_which_nothing_is_replayed(name):
    x = torch.randn(3)
    assert guards.state(x) is not None
    with STATES[name]():
        assert guards.state(x) is None
    assert guards.state(x) is not None
    assert guards.state(x.to("meta")) is None


def test_nothing_is_replayed_in_a_transformation():
    found = []

    def function(x):
        found.append(guards.state(x))
        return x.sum()

    x = torch.randn(3)
    torch.func.grad(function)(x), torch.func.vmap(function)(x[None]), torch.func.jvp(function, (x,), (x,))
    torch.jit.trace(function, x, check_trace=False)
    assert len(found) == 4 and found == 4 * [None]


def _precision(value):
    old = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = value
    return lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", old)


def _sdp(name):
    switch = getattr(torch.backends.cuda, f"enable_{name}_sdp")
    switch(False)
    return lambda: switch(True)


CHANGES = {
    "tf32": lambda: _precision("tf32"),
    **{name: partial(_sdp, name) for name in ("flash", "mem_efficient", "math", "cudnn")},
}


@pytest.mark.parametrize("name", CHANGES)
def test_states_on_which_a_call_depends(name):
    x = torch.randn(3)
    before = guards.state(x)
    restore = CHANGES[name]()
    try:
        assert guards.state(x) != before
    finally:
        restore()
    assert guards.state(x) == before
    with torch.no_grad():
        assert guards.state(x) != before
    with torch.autocast("cpu", torch.float16):
        assert guards.state(x) != before


def test_guards():
    x = torch.randn(2, 3, 4)
    known = guards.guard([x, torch.randn(5)])

    def passes(*tensors):
        return known.check(*tensors)

    y = torch.randn(5)
    assert passes(torch.randn(2, 3, 4), y)
    assert passes(torch.randn(3, 3, 4)[1:], y), "the address is not a property"
    assert not passes(torch.randn(2, 3, 5), y)
    assert not passes(torch.randn(2, 4, 3).mT, y)
    assert not passes(x.double(), y)
    assert not passes(torch.randn(2, 3, 4, requires_grad=True), y)
    assert not passes(torch.nn.Parameter(x, requires_grad=False), y)
    assert not passes(x.to("meta"), y)
    assert not passes(x.as_subclass(Subclass), y)
    assert not passes(x, torch.complex(y, -y).conj().imag)
    with torch.autocast("cpu", torch.float16):
        assert not passes(x, y)
    with torch.inference_mode():
        assert not passes(x.clone(), y)
    assert guards.guard([x.to_sparse()]) is None
    assert guards.guard([x.as_subclass(Subclass)]) is None
    assert guards.guard([torch.complex(y, -y).conj().imag]) is None
    assert guards.guard([torch._efficientzerotensor(3)]) is None
    assert guards.guard([torch.nested.nested_tensor([y, y[:3]])]) is None


def test_kinds(monkeypatch):
    """Options, properties of tensors, and which tensors are absent; beyond the limit all are forgotten."""
    monkeypatch.setattr(guards, "MOST", 3)
    x, y, kinds = torch.randn(3), torch.randn(4), guards.Kinds()
    assert kinds.find(1, (x, y)) is None and len(kinds) == 0
    calls = {"a": (1, (x, y)), "b": (1, (x, None)), "c": (1, (None, x))}
    for value, call in calls.items():
        assert kinds.add(*call, value) == value
    assert [kinds.find(*call) for call in calls.values()] == ["a", "b", "c"]
    assert kinds.find(2, (x, y)) is None and kinds.find(1, (y, x)) is None and kinds.find(1, (x,)) is None
    assert kinds.add(1, (x.to_sparse(),), "d") is None and len(kinds) == 3
    assert kinds.add(2, (x, y), "e") == "e" and len(kinds) == 1
    assert kinds.find(1, (x, y)) is None and kinds.find(2, (x, y)) == "e"

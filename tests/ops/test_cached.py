"""The cache of values derived from parameters: reused while they are unchanged, recomputed after a counted change."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from t2t_fast import backends
from t2t_fast.functional import clear_weight_cache, soft_split_linear
from t2t_fast.ops._common import cached as kept
from t2t_fast.ops._common import triton_runtime
from t2t_fast.testing import assert_close

REASON = triton_runtime.reason(backends.Request("cpu", torch.float32, {}))


class Counted:
    """Copies a tensor and counts the calls."""

    def __init__(self, tensor):
        self.tensor, self.calls = tensor, 0

    def __call__(self):
        self.calls += 1
        return self.tensor.detach().clone()


CHANGES = {
    "in place": lambda p: p.detach().mul_(2),
    "an optimiser's step": lambda p: (p.sum().backward(), torch.optim.SGD([p], lr=0.1).step()),
    "copied into": lambda p: p.detach().copy_(torch.zeros(3)),
    "another storage": lambda p: setattr(p, "data", torch.full((3,), 7.0)),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_change_is_seen(change):
    parameter, store = torch.nn.Parameter(torch.ones(3)), kept.WeightCache()
    make = Counted(parameter)
    first = store.get((parameter, None), "key", make)
    assert store.get((parameter, None), "key", make) is first and make.calls == 1
    CHANGES[change](parameter)
    assert torch.equal(store.get((parameter, None), "key", make), parameter.detach()) and make.calls == 2


def test_keys_tensors_and_views_are_cached_separately():
    parameter, store = torch.randn(2, 3), kept.WeightCache()
    makes = [Counted(t) for t in (parameter, parameter, parameter[0], parameter[1], parameter.t())]
    for make, key in zip(makes, "abaaa", strict=True):
        assert torch.equal(store.get((make.tensor,), key, make), make.tensor)
    assert [make.calls for make in makes] == [1] * 5 and len(store) == 5


def test_entries_are_freed_with_their_tensor():
    """A new tensor at the same address does not get the old value, and the old entry's memory is freed."""
    store = kept.WeightCache()
    for value in range(20):
        parameter = torch.full((1000,), float(value))
        assert store.get((parameter,), "key", parameter.clone)[0] == value
        del parameter
    assert len(store) == 1


def test_the_least_recently_used_entry_is_evicted(monkeypatch):
    monkeypatch.setattr(kept, "_SIZE", 2)
    store, tensors = kept.WeightCache(), [torch.ones(1) for _ in range(3)]
    makes = [Counted(t) for t in tensors]
    for index in (0, 1, 0, 2, 0, 1):
        store.get((tensors[index],), "key", makes[index])
    assert len(store) == 2 and [make.calls for make in makes] == [1, 2, 1]


def _subclass(tensor):
    class Other(torch.Tensor):
        pass

    return tensor.as_subclass(Other)


def _inference(tensor):
    with torch.inference_mode():
        return tensor.clone()


@pytest.mark.parametrize("made", [_subclass, _inference], ids=["subclass", "inference tensor"])
def test_subclasses_and_inference_tensors_are_not_cached(made):
    tensor, store = made(torch.ones(3)), kept.WeightCache()
    make = Counted(tensor)
    for _ in range(2):
        store.get((tensor,), "key", make)
    assert make.calls == 2 and not len(store)


def test_no_caching_under_fsdp(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert "FSDP" in kept.obstacle([torch.ones(1)])


def test_fake_values_are_not_cached():
    """A trace with fake tensors may read real parameters; later calls must not get its fake results."""
    parameter, store = torch.ones(3), kept.WeightCache()
    make = Counted(parameter)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(store.get((parameter,), "key", make), FakeTensor)
    assert not len(store) and torch.equal(store.get((parameter,), "key", make), parameter)


def test_a_hidden_write_needs_clear():
    """``.data`` hides a write from the version counter: the documented limitation."""
    parameter, store = torch.nn.Parameter(torch.ones(3)), kept.WeightCache()
    make = Counted(parameter)
    store.get((parameter,), "key", make)
    parameter.data.mul_(2)
    assert store.get((parameter,), "key", make)[0] == 1
    store.clear()
    assert store.get((parameter,), "key", make)[0] == 2


@pytest.mark.interpret
@pytest.mark.skipif(REASON is not None, reason=f"triton: {REASON}")
class TestFoldedWeights:
    """The operator itself, with its Triton kernels."""

    def setup_method(self):
        kept.FOLDED.clear()
        self.x = torch.randn(1, 16, 5, 5)
        columns = 16 * 9
        self.parameters = {
            "weight": torch.nn.Parameter(torch.randn(8, columns)),
            "bias": torch.nn.Parameter(torch.randn(8)),
            "norm_weight": torch.nn.Parameter(torch.rand(columns)),
            "norm_bias": torch.nn.Parameter(torch.randn(columns)),
        }

    def call(self, backend="triton"):
        return soft_split_linear(
            self.x, **self.parameters, kernel_size=3, stride=2, padding=1, norm_eps=1e-5, backend=backend
        )

    @pytest.mark.parametrize("name", ["weight", "bias", "norm_weight", "norm_bias"])
    def test_never_stale(self, name):
        with torch.no_grad():
            for _ in range(2):
                self.call()
            assert len(kept.FOLDED) == 1
            self.parameters[name].add_(1)
            assert_close(self.call(), self.call("reference").double(), "soft_split_linear", "forward", torch.float32)

    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    def test_backward_clears_the_cache(self, compiled):
        """A teacher whose weights are updated from its student's through ``.data``, as moving averages often do."""
        student = {name: parameter.detach().clone().requires_grad_() for name, parameter in self.parameters.items()}
        teacher = self.parameters
        for _ in range(2):
            with torch.no_grad():
                assert_close(
                    self.call(), self.call("reference").double(), "soft_split_linear", "forward", torch.float32
                )
            assert len(kept.FOLDED) == 1
            self.parameters = student
            call = torch.compile(self.call, backend="aot_eager") if compiled else self.call
            call().sum().backward()
            self.parameters = teacher
            assert not len(kept.FOLDED)
            for name, parameter in teacher.items():
                parameter.data.mul_(0.5).add_(student[name].data - student[name].grad, alpha=0.5)

    def test_refold_after_a_hidden_write(self):
        with torch.no_grad():
            before = self.call()
            self.parameters["weight"].data.mul_(2)
            assert torch.equal(self.call(), before)
            clear_weight_cache()
            assert_close(self.call(), self.call("reference").double(), "soft_split_linear", "forward", torch.float32)

"""What a swap keeps of a module, and that its proof does not depend on the state of the process."""

import threading

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import t2t_fast
from support.swapping import LAYERS, images, layer, module, same
from t2t_fast import reference
from t2t_fast.errors import NothingToSwap
from t2t_fast.interop.swap import swap, unswap
from t2t_fast.modules import T2TModule, TokenPerformer, TokenTransformer


class Named(reference.T2T_module):
    """An extra method, a class attribute, a property, and another name for the input."""

    family = "T2T"

    def forward(self, image):
        return super().forward(image)

    def halves(self, x):
        return self.attention1(self.soft_split0(x).transpose(1, 2)).chunk(2, dim=1)

    @property
    def stride(self):
        return 16

    @classmethod
    def tiny(cls):
        return cls(32, "performer", 3, 24, 16)


def test_methods_and_attributes_stay():
    model = module(cls=Named)
    expected, halves = model(images()), model.halves(images())
    report = swap(model)
    assert report.swapped == ["", *LAYERS]
    assert isinstance(model, Named) and isinstance(model, T2TModule) and isinstance(model, reference.T2T_module)
    assert model.family == "T2T" and model.stride == 16 and model.num_patches == 4 and model.tokens_type == "performer"
    same(model(images()), expected)
    same(model(image=images()), expected)
    same(model.halves(images()), halves)
    same(model.attention1(model.soft_split0(images()).transpose(1, 2)).chunk(2, dim=1), halves)
    assert isinstance(type(model).tiny(), Named)
    model.recompute = True
    assert model.attention1.recompute
    assert type(unswap(model) and model) is Named


def test_one_class_for_each_pair_of_classes():
    first, second = layer(), layer()
    swap(nn.ModuleList([first, second]))
    assert type(first) is type(second) and type(first).__name__ == "TokenPerformer"
    assert set(vars(first)) == set(vars(layer())), "nothing is written into the instance"


def test_a_class_that_was_changed_after_the_swap():
    model = nn.ModuleDict({"t": module()})
    swap(model)
    model["t"].__class__ = type("Sharded", (type(model["t"]),), {})
    report = unswap(model)
    assert report.left == {"t": "its class was changed again after the swap"}
    assert isinstance(model["t"], T2TModule) and len(report.swapped) == 2


def test_tensors_that_a_module_keeps():
    """After prune, an old spectral norm, or a stored map, a module holds tensors that cannot be deep-copied."""
    model = module()
    nn.utils.prune.l1_unstructured(model.attention1.kqv, "weight", 0.5)
    nn.utils.prune.l1_unstructured(model.project, "weight", 0.5)
    nn.utils.spectral_norm(model.attention2.proj)
    model.attention2.kept = [model.attention2.kqv(torch.ones(1, 2, 144)), {"x": model.project.weight * 2}]
    expected = model(images())
    report = swap(model)
    assert report.swapped == ["", *LAYERS]
    rows = {row.path: row.backend for row in report.rows}
    assert rows["attention1"] == "unfused: kqv has hooks" and rows[""] == "unfused: project has hooks"
    same(model(images()), expected)


def test_what_cannot_be_copied_is_left():
    model = nn.ModuleDict({"t": module(), "l": layer()})
    model["t"].lock = threading.Lock()
    report = swap(model)
    assert "it cannot be copied" in report.left["t"] and report.swapped == ["t.attention1", "t.attention2", "l"]
    model["t"](images())


STATES = {
    "float64 by default": lambda: _default_dtype(torch.float64),
    "meta by default": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "triton": lambda: t2t_fast.backend("triton"),
    "deterministic": lambda: torch.random.fork_rng(devices=[]),
}


class _default_dtype:
    def __init__(self, dtype):
        self.dtype = dtype

    def __enter__(self):
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_):
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_states_of_the_process(state):
    model = module("transformer")
    expected = model(images())
    random = torch.get_rng_state()
    with state():
        report = swap(model)
    assert report.swapped == ["", *LAYERS] and not report.left
    assert torch.equal(torch.get_rng_state(), random)
    same(model(images()), expected)


def test_a_half_model_and_one_whose_weights_are_broken():
    model = module().half()
    swap(model)
    assert isinstance(model.attention1, TokenPerformer) and model.project.weight.dtype == torch.float16
    model = module()
    model.project.weight.data.fill_(float("nan"))
    assert "" in swap(model).swapped


def test_the_live_module_is_never_called():
    calls = []

    class Counting(reference.Token_transformer):
        def forward(self, x):
            calls.append(id(self))
            return super().forward(x)

    model = layer(Counting, 1)
    swap(model)
    assert isinstance(model, TokenTransformer) and calls and id(model) not in calls


class Digits(nn.Module):
    """Unfolds named ``0`` and ``soft_split0``, whose results are viewed."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Unfold(3, padding=1)])
        self.soft_split0 = nn.Unfold(3)

    def forward(self, x):
        return self.layers[0](x).view(x.shape[0], -1), self.soft_split0(x).view(x.shape[0], -1)


def test_a_name_alone_is_not_enough():
    model = Digits()
    with pytest.raises(NothingToSwap, match="name it in include"):
        swap(model)
    model(images())
    model.t = module()
    assert swap(model).swapped == ["t", "t.attention1", "t.attention2"]
    model(images())

"""A load writes all tensors or none, for any kind of tensor in the model and at any interruption."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from support.checkpoints import exact_state, same, saved, small
from t2t_fast.errors import CheckpointError
from t2t_fast.interop.checkpoints import commit as writing
from t2t_fast.interop.checkpoints import load_checkpoint
from t2t_fast.models import T2TViT


def norm(size=4, **options):
    return nn.LayerNorm(size, **options)


WEIGHTS = {"weight": torch.arange(4.0), "bias": torch.full((4,), 2.0)}


class Marked(torch.Tensor):
    """A subclass, as quantised and sharded tensors are."""


def _subclass(model):
    model.bias = nn.Parameter(torch.zeros(4).as_subclass(Marked))


def _quantised(model):
    del model.bias
    model.register_buffer("bias", torch.quantize_per_tensor(torch.zeros(4), 1.0, 0, torch.qint8))


def _sparse(model):
    del model.bias
    model.register_buffer("bias", torch.zeros(4).to_sparse())


def _meta_buffer(model):
    del model.bias
    model.register_buffer("bias", torch.zeros(4, device="meta"))


def _freed(model):
    model.bias.untyped_storage().resize_(0)


def _copied(model):
    def hook(module, state, prefix, _):
        state[prefix + "bias_copy"] = state.pop(prefix + "bias").clone()

    model.register_state_dict_post_hook(hook)


def _read_only(model):
    path = model.path
    np.zeros(4096, dtype=np.float32).tofile(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the array is not writable
        model.bias = nn.Parameter(torch.from_numpy(np.memmap(path, dtype=np.float32, mode="r"))[:4])


UNWRITABLE = {
    "subclass": (_subclass, "model a Parameter|model a Marked"),
    "quantised": (_quantised, "model quantised qint8"),
    "sparse": (_sparse, "model sparse_coo"),
    "meta buffer": (_meta_buffer, "model on the meta device"),
    "freed memory": (_freed, "model without memory"),
    "copied by a hook": (_copied, r"model a copy that the model's state_dict\(\) makes"),
    "read-only memory": (_read_only, "model in memory that is read-only"),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(("change", "text"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_tensors_that_cannot_be_written(tmp_path, change, text):
    model = norm()
    model.path = tmp_path / "array"
    change(model)
    name = "bias_copy" if change is _copied else "bias"
    state = {"weight": WEIGHTS["weight"], name: WEIGHTS["bias"]}
    with pytest.raises(CheckpointError, match=text):
        load_checkpoint(model, state)
    assert (model.weight == 1).all()
    report = load_checkpoint(model, state, strict=False)
    assert report.loaded == 1 and [entry[0] for entry in report.mismatched] == [name]
    assert torch.equal(model.weight, WEIGHTS["weight"])


def test_a_model_whose_shapes_are_unknown():
    model = nn.LazyLinear(4)
    with pytest.raises(CheckpointError, match="model a UninitializedParameter"):
        load_checkpoint(model, nn.Linear(4, 4).state_dict())
    assert model.has_uninitialized_params()


def _expanded(model):
    model.bias = nn.Parameter(torch.zeros(1).expand(4))


def _shared_memory(model):
    model.share_memory()


def _inference(model):
    with torch.inference_mode():
        model.bias = nn.Parameter(torch.zeros(4))


def _view(model):
    model.weight.requires_grad_(False)
    model.bias = nn.Parameter(torch.zeros(8)[::2])


def _row_of_many(model):
    model.weight, model.bias = (nn.Parameter(row) for row in torch.ones(2, 4).unbind())


WRITABLE = [_expanded, _shared_memory, _inference, _view, _row_of_many]


@pytest.mark.parametrize("change", WRITABLE)
def test_tensors_that_can_be_written(change):
    model = norm()
    change(model)
    places = [(id(p), p.data_ptr(), p.stride()) for p in model.parameters()]
    assert load_checkpoint(model, WEIGHTS).complete
    assert same(model, WEIGHTS)
    assert places == [(id(p), p.data_ptr(), p.stride()) for p in model.parameters()]


def test_reparametrised_weights():
    for change in (lambda m: prune.l1_unstructured(m, "weight", 1), parametrizations.weight_norm):
        source, model = nn.Linear(4, 4), nn.Linear(4, 4)
        for each in (source, model):
            change(each)
        assert load_checkpoint(model, source.state_dict()).complete and same(model, source.state_dict())
        x = torch.randn(2, 4)
        assert torch.equal(model(x), source(x))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight


def test_tied_parameters():
    model, weight = Tied(), torch.randn(4, 4)
    assert load_checkpoint(model, {"a.weight": weight, "b.weight": weight.clone()}).complete
    assert torch.equal(model.b.weight, weight)
    report = load_checkpoint(model, {"b.weight": weight + 1})  # as safetensors stores them
    assert report.complete and report.loaded == report.total == 2
    assert torch.equal(model.a.weight, weight + 1) and model.a.weight is model.b.weight
    before = exact_state(model)
    with pytest.raises(CheckpointError, match=r"memory that the model shares: a\.weight"):
        load_checkpoint(model, {"a.weight": weight, "b.weight": weight + 1})
    assert exact_state(model) == before


def test_overlapping_and_expanded_parameters():
    memory = torch.zeros(6)
    model = nn.ParameterDict({"left": nn.Parameter(memory[:4]), "right": nn.Parameter(memory[2:])})
    assert load_checkpoint(model, {"left": torch.arange(4.0), "right": torch.arange(2.0, 6.0)}).complete
    assert torch.equal(memory, torch.arange(6.0))
    before = exact_state(model)
    with pytest.raises(CheckpointError, match="memory that the model shares: left"):
        load_checkpoint(model, {"left": torch.zeros(4), "right": torch.ones(4)})
    assert exact_state(model) == before
    model = norm()
    _expanded(model)
    with pytest.raises(CheckpointError, match="memory that the model shares: bias"):
        load_checkpoint(model, {"weight": torch.zeros(4), "bias": torch.arange(4.0)})
    assert (model.weight == 1).all() and not model.bias.any()
    assert load_checkpoint(model, {"weight": torch.full((4,), torch.nan), "bias": torch.full((4,), torch.nan)}).complete


def test_a_state_dict_of_the_models_own_tensors():
    """An earlier write would overwrite values that are still to be read."""
    model = norm()
    load_checkpoint(model, WEIGHTS)
    load_checkpoint(model, {"weight": model.bias, "bias": model.weight})
    assert same(model, {"weight": WEIGHTS["bias"], "bias": WEIGHTS["weight"]})
    load_checkpoint(model, {"weight": model.weight.flip(0), "bias": model.bias[:1].expand(4)})
    assert (model.bias == WEIGHTS["weight"][0]).all()


class Computed(T2TViT):
    """``num_classes`` is a read-only property, computed from the head."""

    num_classes = property(lambda self: self.head.out_features)


class Checked(T2TViT):
    """Rejects a head with another class count."""

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "head" and value.out_features != 10:
            raise TypeError("the head must have 10 classes")


@pytest.mark.parametrize("cls", [Computed, Checked])
def test_a_head_that_the_model_refuses(tmp_path, cls):
    source, model = small(), small()
    model.__class__ = cls
    before = exact_state(model)
    with pytest.raises(CheckpointError, match=r"num_classes|must have 10 classes"):
        load_checkpoint(model, saved(tmp_path / "m.pth", source.state_dict()), num_classes=4)
    assert exact_state(model) == before
    assert load_checkpoint(model, source.state_dict()).complete and same(model, source.state_dict())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
@pytest.mark.parametrize("after", [0, 1, 20])
def test_interrupted_writes_are_rolled_back(monkeypatch, error, after):
    source, model, copy = small(), small(), writing._copy
    before, left = exact_state(model), [after]

    def interrupted(target, value):
        left[0] -= 1
        copy(target, value)  # worst case: this tensor is already overwritten
        if left[0] == -1:
            raise error("now")

    monkeypatch.setattr(writing, "_copy", interrupted)
    monkeypatch.setattr(writing, "conflicts", lambda copies: [])
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else CheckpointError, match="now"):
        load_checkpoint(model, source.state_dict(), num_classes=4)
    assert left[0] < -1 and exact_state(model) == before
    monkeypatch.undo()
    assert load_checkpoint(model, source.state_dict()).complete and same(model, source.state_dict())


def test_values_out_of_range():
    model = norm().half()
    model.register_buffer("count", torch.tensor(0, dtype=torch.uint8))
    state = {**WEIGHTS, "count": torch.tensor(3)}
    assert load_checkpoint(model, state).complete and model.count == 3
    before = exact_state(model)
    for name, value in (("weight", torch.full((4,), 1e6)), ("count", torch.tensor(300)), ("count", torch.tensor(-1))):
        with pytest.raises(CheckpointError, match=rf"{name} .*whose range is too small"):
            load_checkpoint(model, {**state, name: value})
        assert exact_state(model) == before
    load_checkpoint(model, {**state, "weight": torch.tensor([torch.inf, torch.nan, 1e-9, 1.0])})
    assert model.weight.isinf().sum() == 1 and model.weight.isnan().sum() == 1


def test_a_warning_that_is_an_error_comes_before_the_write(tmp_path):
    source, model = small(), small(num_classes=4)
    before = exact_state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="another class count"):
            load_checkpoint(model, source.state_dict())
    assert exact_state(model) == before


def test_heads_that_cannot_be_made(tmp_path):
    state = small().state_dict()
    for change in (lambda m: setattr(m, "num_features", "8"), lambda m: None):
        model = small(num_classes=0)
        change(model)
        before = exact_state(model)
        with pytest.raises(CheckpointError):
            load_checkpoint(model, state, num_classes=10**15)
        assert exact_state(model) == before


def test_optimizers_and_graphs_see_the_new_values():
    """Writes are in place and increment the version counters, so values cached for the old weights are dropped."""
    model = small()
    versions = {name: p._version for name, p in model.named_parameters()}
    load_checkpoint(model, small().state_dict())
    assert all(p._version > versions[name] for name, p in model.named_parameters())
    model.eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        first = model(x)
        load_checkpoint(model, small().state_dict())
        assert not torch.equal(model(x), first)

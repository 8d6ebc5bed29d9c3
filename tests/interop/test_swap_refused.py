"""Modules that swap leaves as they are, because the fast form would ignore a part of them."""

import copy

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

from support.swapping import LAYERS, images, layer, module, same
from t2t_fast import reference
from t2t_fast.interop.swap import swap, unswap
from t2t_fast.models.family import SOFT_SPLITS as SPLITS


class Gate(reference.T2T_module):
    """A gate that is 0 before training."""

    def __init__(self, *args):
        super().__init__(*args)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return super().forward(x) * (1 + self.gate)


class Statistics(reference.T2T_module):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("running_mean", torch.zeros(24))

    def forward(self, x):
        return super().forward(x) - self.running_mean


class Scaled(reference.Token_performer):
    """LayerScale as a child, initially 1."""

    def __init__(self, *args):
        super().__init__(*args)
        self.scale = nn.Linear(1, 1)

    def forward(self, x):
        return super().forward(x) * self.scale.weight.squeeze()


class Switch(reference.Token_performer):
    """A flag of the instance, initially off."""

    def __init__(self, *args):
        super().__init__(*args)
        self.double = False

    def forward(self, x):
        return super().forward(x) * (2 if self.double else 1)


class ClassSwitch(reference.Token_performer):
    double = False

    def forward(self, x):
        return self.finish(super().forward(x))

    def finish(self, x):
        return sum(2 * x if self.double else x for _ in range(1))


class Maps(reference.Token_performer):
    """Stores its output in an attribute."""

    def forward(self, x):
        y = super().forward(x)
        self.last = y
        return y


class Optional(reference.Token_performer):
    def forward(self, x, mask=None):
        return super().forward(x)


class Own(reference.Token_performer):
    def obstacle(self):
        return "its own"


class Detached(reference.Token_performer):
    def forward(self, x):
        return super().forward(x).detach() + 0 * super().forward(x)


class Undecided(reference.Token_performer):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class TrainsOtherwise(reference.Token_performer):
    def forward(self, x):
        y = super().forward(x)
        return 2 * y if self.training else y


class FunctionalDropout(reference.Token_performer):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Cuda(reference.Token_performer):
    def forward(self, x):
        return super().forward(x.cuda())


class Raising(reference.Token_performer):
    def forward(self, x):
        raise KeyError("no such input")


class Property(reference.Token_performer):
    @property
    def kqv(self):
        raise RuntimeError("not ready")


REFUSED = {
    Scaled: "has the child scale, which the fast form does not call",
    Switch: "its forward reads double, which the fast form does not",
    ClassSwitch: "its forward reads double, which the fast form does not",
    Maps: "its forward stores last, which the fast form does not",
    Optional: "its forward takes (x, mask=None), the fast one an input alone",
    Own: "it defines obstacle, which the fast form defines too",
    Detached: "in eval mode the gradient of its input",
    Undecided: "in eval mode its result has no gradient",
    TrainsOtherwise: "in training mode its result",
    FunctionalDropout: "in training mode its result",
    Cuda: "the original does not run on a probe of 2 x 7 x 27",
    Raising: "the original does not run on a probe of 2 x 7 x 27 (KeyError: 'no such input')",
}


@pytest.mark.parametrize(("cls", "reason"), REFUSED.items(), ids=lambda v: getattr(v, "__name__", ""))
def test_a_layer_is_left_with_the_reason(cls, reason):
    model = nn.ModuleDict({"l": layer(cls), "plain": layer()})
    report = swap(model)
    assert reason in report.left["l"] and type(model["l"]) is cls and report.swapped == ["plain"]


@pytest.mark.parametrize(("cls", "name"), [(Gate, "gate"), (Statistics, "running_mean")])
def test_a_module_is_left_with_the_reason(cls, name):
    model = nn.ModuleDict({"t": module(cls=cls)})
    report = swap(model)
    assert report.left["t"] == f"{cls.__name__} has {name}, which the fast form does not have"
    assert report.swapped == [f"t.{part}" for part in (*SPLITS, *LAYERS)]
    getattr(model["t"], name).data.fill_(0.5)
    twin = copy.deepcopy(model)
    unswap(twin)
    same(model["t"](images()), twin["t"](images()))


def test_a_module_that_cannot_be_examined_is_left():
    broken = layer()
    broken.__class__ = Property
    model = nn.ModuleDict({"broken": broken, "plain": layer()})
    report = swap(model)
    assert "could not be examined: RuntimeError: not ready" in report.left["broken"] and report.swapped == ["plain"]


def test_a_forward_patched_on_the_instance_is_left():
    """Its closure holds the original module, whose class must not change."""
    model = module()
    original = model.attention1.forward
    model.attention1.forward = lambda x: original(x).clamp(-1, 1)
    expected = model(images())
    report = swap(model)
    assert "forward is replaced on the instance" in report.left["attention1"]
    assert type(model.attention1) is reference.Token_performer
    same(model(images()), expected)
    # the proof of the module around it cannot copy that layer either
    assert "attention1.forward is replaced on the instance" in report.left[""]

"""T2T modules that return more than tokens: swapped if the result consists of their stages, else only their parts."""

import copy
import pickle

import pytest
from torch import nn

from support.swapping import LAYERS, images, module, same
from t2t_fast import reference
from t2t_fast.interop.swap import swap, unswap
from t2t_fast.models.family import SOFT_SPLITS as SPLITS
from t2t_fast.modules import Unfold


class Saliency(reference.T2T_module):
    """Returns its stages as VST and M3Net do: tokens of 1/16, 1/8 and 1/4."""

    def forward(self, x):
        quarter = self.attention1(self.soft_split0(x).transpose(1, 2))
        eighth = self.attention2(self.soft_split1(self.restructurize(quarter)).transpose(1, 2))
        return self.project(self.soft_split2(self.restructurize(eighth)).transpose(1, 2)), eighth, quarter


class Pyramid(Saliency):
    """A dictionary of maps and tokens."""

    def forward(self, x):
        tokens, eighth, quarter = super().forward(x)
        return {"tokens": tokens, "maps": [self.restructurize(quarter), self.restructurize(eighth)], "mask": None}


class WithSize(reference.T2T_module):
    """Returns tokens and their grid, like mmpretrain's module."""

    def forward(self, x):
        tokens = super().forward(x)
        side = int(tokens.shape[1] ** 0.5)
        return tokens, (side, side)


class WithInput(reference.T2T_module):
    def forward(self, x):
        return super().forward(x), x.shape, x


@pytest.mark.parametrize("kind", ["performer", "transformer"])
@pytest.mark.parametrize(
    ("cls", "returns"),
    [
        (Saliency, "tuple of tokens 3, tokens 2, tokens 1"),
        (Pyramid, "dict of tokens: tokens 3, maps: list of image 1, image 2, mask: none"),
        (WithSize, "tuple of tokens 3, grid 3"),
        (WithInput, "tuple of tokens 3, input size, input"),
    ],
)
def test_modules_that_return_their_stages(kind, cls, returns):
    model = module(kind, cls)
    expected = model(images())
    report = swap(model)
    assert report.swapped == ["", *LAYERS] and not report.left
    assert f"returns a {returns}" in str(report)
    found = model(images())
    same(found, expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same(twin(images()), expected)
    assert [row.path for row in report.rows if row.target == "(fused)"] == list(SPLITS)
    assert model.forward_with_grid(images())[1] == (2, 2), "the fast form's own methods return what they say"
    unswap(model)
    assert type(model) is cls


class Summary(reference.T2T_module):
    """Returns a tensor that is none of its stages."""

    def forward(self, x):
        tokens = super().forward(x)
        return tokens, tokens.mean(1)


class Constant(reference.T2T_module):
    def forward(self, x):
        return super().forward(x), (2, 2)


class Viewing(reference.T2T_module):
    """Views the output of a soft split, so that its strides matter."""

    def forward(self, x):
        tokens = super().forward(x)
        return tokens, self.soft_split0(x).view(x.shape[0], 3, -1).sum(-1)


@pytest.mark.parametrize(
    ("cls", "reason", "splits"),
    [
        (Summary, "returns a tensor (2, 24) that is none of its stages", SPLITS),
        (Constant, "the sizes that it returns do not follow from its stages", SPLITS),
        (Viewing, "returns a tensor (2, 3) that is none of its stages", ()),
    ],
)
def test_the_parts_of_a_module_that_is_not_swapped(cls, reason, splits):
    """Its layers are swapped; its soft splits only where the module was proved to take their strides."""
    model = nn.ModuleDict({"t": module(cls=cls)})
    expected = model["t"](images())
    report = swap(model)
    assert reason in report.left["t"] and type(model["t"]) is cls
    assert report.swapped == [f"t.{name}" for name in (*splits, *LAYERS)]
    assert all(isinstance(getattr(model["t"], name), Unfold) for name in splits)
    same(model["t"](images()), expected)
    unswap(model)
    assert all(type(getattr(model["t"], name)) is nn.Unfold for name in SPLITS)

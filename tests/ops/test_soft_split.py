"""Soft split and soft composition: exact against unfold and fold, adjoint, any layout."""

import pytest
import torch
import torch.nn.functional as F

from t2t_fast.functional import soft_composition, soft_split, window
from t2t_fast.ops._common import native_library as native
from t2t_fast.testing import WINDOW_CASES

WINDOWS = [pytest.param(*case[1:], id=case[0]) for case in WINDOW_CASES]
NATIVE = pytest.param(
    "native",
    marks=pytest.mark.skipif("cpu" not in native.devices("soft_split"), reason="no native operators for this CPU"),
)
BACKENDS = [NATIVE, "aten", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "channels", "height", "width", "k", "s", "p"), WINDOWS)
def test_same_numbers_as_unfold(batch, channels, height, width, k, s, p, backend):
    x = torch.randn(batch, channels, height, width)
    tokens = soft_split(x, k, s, p, backend=backend)
    assert torch.equal(tokens, F.unfold(x, k, stride=s, padding=p).transpose(1, 2))
    assert tokens.is_contiguous()
    h, w = window(k, s, p).grid(height, width)
    assert tokens.shape[1] == h * w


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_with_a_grid_are_an_image(backend):
    tokens = torch.randn(2, 12 * 9, 5)
    image = tokens.transpose(1, 2).reshape(2, 5, 12, 9)
    split = soft_split(tokens, 3, 2, 1, grid=(12, 9), backend=backend)
    assert torch.equal(split, soft_split(image, 3, 2, 1, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_format_does_not_matter(backend):
    x = torch.randn(2, 5, 13, 17)
    expected = soft_split(x, 3, 2, 1, backend=backend)
    assert torch.equal(soft_split(x.contiguous(memory_format=torch.channels_last), 3, 2, 1, backend=backend), expected)
    assert torch.equal(soft_split(x.mT.contiguous().mT, 3, 2, 1, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "channels", "height", "width", "k", "s", "p"), WINDOWS)
def test_composition_is_the_adjoint(batch, channels, height, width, k, s, p, backend):
    """<split(x), t> = <x, compose(t)> in float64."""
    x = torch.randn(batch, channels, height, width, dtype=torch.float64)
    split = soft_split(x, k, s, p, backend=backend)
    t = torch.randn_like(split)
    image = soft_composition(t, (height, width), k, s, p, backend=backend)
    torch.testing.assert_close((split * t).sum(), (x * image).sum(), rtol=1e-12, atol=1e-12)


def test_composition_of_a_split_counts_the_overlap():
    """compose(split(x)) is x times the number of windows that cover each pixel; uncovered pixels are 0."""
    x = torch.rand(1, 2, 11, 8, dtype=torch.float64) + 1
    count = soft_composition(soft_split(torch.ones_like(x), 4, 3, 0), (11, 8), 4, 3, 0)
    torch.testing.assert_close(soft_composition(soft_split(x, 4, 3, 0), (11, 8), 4, 3, 0), x * count)
    assert count[0, 0, -1, 0] == 0 and count[0, 0, 3, 3] == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_never_aliases_the_input(backend):
    """Even where the split only reshapes."""
    x = torch.randn(1, 4, 3, 5).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    soft_split(x, 1, backend=backend).zero_()
    soft_composition(soft_split(x, 1), (3, 5), 1, backend=backend).zero_()
    assert torch.equal(x, before)

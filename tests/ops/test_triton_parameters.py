"""The Triton kernels that fold LayerNorm into a packed weight, and that compute the gradients of the parameters."""

import pytest
import torch
import torch.nn.functional as F

from t2t_fast import backends
from t2t_fast.ops._common import triton_runtime
from t2t_fast.ops._common.pixels import normalisation
from t2t_fast.ops._common.spec import Window, square
from t2t_fast.ops.soft_split_linear.aten import fold_norm
from t2t_fast.ops.soft_split_linear.autograd import parameter_gradients
from t2t_fast.ops.soft_split_linear.triton.layout import layout
from t2t_fast.ops.soft_split_linear.triton.operands import packed, packed_taps

REASON = triton_runtime.reason(backends.Request("cpu", torch.float32, {}))
pytestmark = [pytest.mark.interpret, pytest.mark.skipif(REASON is not None, reason=f"triton: {REASON}")]

OUTPUTS = 20
LAYOUTS = {
    "tokens": (32, square(3, 2, 1)),
    "many columns": (128, square(3, 2, 1)),
    "cells": (3, square(7, 4, 2)),
    "cells of another height": (4, Window((6, 3), (4, 2), (1, 0))),
    "gathered": (5, square(3, 2, 1)),
}
every_layout = pytest.mark.parametrize("name", list(LAYOUTS))


def columns_of(channels, window):
    """For each column of a packed weight the index of its value in upstream's order, -1 for padding; by definition."""
    found, (kh, kw) = layout(channels, window), window.kernel
    index = torch.arange(channels * kh * kw).view(channels, kh, kw)
    if found.cell is None:
        return F.pad(index.flatten(1).t().flatten(), (0, -found.columns % 64 if found.gather else 0), value=-1)
    high, wide = found.cell[:2]
    index = F.pad(index, (0, -kw % wide, 0, -kh % high), value=-1)
    return index.unfold(1, high, high).unfold(2, wide, wide).permute(1, 2, 0, 3, 4).flatten()


def spread(matrix, index):
    """The columns ``index`` of a matrix as rows, 0 for -1."""
    return torch.where(index[:, None] >= 0, matrix.t()[index], 0)


def parameters(name, dtype=torch.float32):
    channels, window = LAYOUTS[name]
    columns = channels * window.taps
    shapes = (OUTPUTS, columns), (OUTPUTS,), (columns,), (columns,)
    return channels, window, [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_layout
def test_fold(name, dtype):
    """The weight is that of the aten form up to its last bit; the row sums are those of the rounded weight."""
    channels, window, (weight, bias, gamma, beta) = parameters(name)
    index = columns_of(channels, window)
    pixels = normalisation([0.1 * c for c in range(channels)], [0.2] * channels) if channels < 5 else ()
    found, columns = packed(
        weight, bias, gamma, beta, 1e-5, channels=channels, window=window, dtype=dtype, pixels=pixels
    )
    expected, _, offset = fold_norm(weight, bias, gamma, beta, dtype)
    assert found.weight.shape == (len(index), 64) and found.weight.dtype == dtype
    rows = found.weight[:, :OUTPUTS].float()
    torch.testing.assert_close(rows, spread(expected.float(), index), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert not found.weight[:, OUTPUTS:].any() and not found.weight[index < 0].any()
    torch.testing.assert_close(found.row_sums[:OUTPUTS], rows.double().sum(0).float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.offset[:OUTPUTS], offset, rtol=1e-5, atol=1e-4)
    assert not found.offset[OUTPUTS:].any() and not found.row_sums[OUTPUTS:].any()
    if found.used is not None:
        assert torch.equal(found.used, (index >= 0).float())
    assert (found.used is None) == bool((index >= 0).all() and not layout(channels, window).gather)
    if pixels:
        both = torch.tensor(pixels).view(2, channels, 1).expand(-1, -1, window.taps).flatten(1)
        assert torch.equal(torch.stack(columns, 1), spread(both, index))
    else:
        assert columns is None


@every_layout
def test_a_weight_without_norm(name):
    channels, window, (weight, *_) = parameters(name, torch.bfloat16)
    rest = {"channels": channels, "window": window, "dtype": torch.bfloat16, "pixels": ()}
    found, _ = packed(weight, None, None, None, None, **rest)
    assert torch.equal(found.weight[:, :OUTPUTS], spread(weight, columns_of(channels, window)))
    assert found.row_sums is None and not found.offset.any()


@pytest.mark.parametrize("norm_eps", [1e-5, None])
@pytest.mark.parametrize("name", ["tokens", "gathered"])
def test_fold_for_the_gradient_of_the_image(name, norm_eps):
    channels, window, (weight, bias, gamma, _) = parameters(name)
    norm = (gamma, None) if norm_eps else (None, None)
    found, offset = packed_taps(weight, bias, *norm, norm_eps, channels, window, torch.float32)
    expected = fold_norm(weight, bias, *norm, torch.float32)[0] if norm_eps else weight
    expected = expected.view(OUTPUTS, channels, -1).permute(2, 0, 1)
    torch.testing.assert_close(found[:, :OUTPUTS, :channels], expected, rtol=1e-6, atol=1e-6)
    assert not found[:, OUTPUTS:].any() and not found[..., channels:].any()
    assert offset is None if norm_eps is None else torch.equal(offset[:OUTPUTS], bias)


@pytest.mark.parametrize("normed", [True, False])
@every_layout
def test_gradients_of_the_parameters(name, normed):
    """From products in two splits, with padding that must not be read."""
    from t2t_fast.ops.soft_split_linear.triton.parameters import launch_parameter_gradients

    channels, window, (weight, bias, gamma, beta) = parameters(name)
    gamma, beta = (gamma, beta) if normed else (None, None)
    index, grad = columns_of(channels, window), torch.randn(2, 7, OUTPUTS)
    products = torch.randn(2, OUTPUTS, weight.shape[1])
    given = torch.stack([spread(each, index).t() for each in products])
    given = F.pad(torch.where(index >= 0, given, torch.nan), (0, 64, 0, 44), value=torch.nan)
    exact = [t if t is None else t.double() for t in (products.sum(0), grad, weight, bias, gamma, beta)]
    for needed in ([True, True, normed, normed], [True, False, False, False], [False, True, normed, False]):
        expected = [t for t in parameter_gradients(exact[0], None, *exact[1:], needed) if t is not None]
        sizes = bias.dtype, channels, layout(channels, window)
        found = launch_parameter_gradients(given, None, grad, weight, gamma, beta, *sizes, needed)
        for value, truth in zip(found, expected, strict=True):
            torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-4)

"""Images of bytes: every backend gives the same results as for the normalised values; bad arguments raise."""

import pytest
import torch

from t2t_fast import backends
from t2t_fast.errors import BackendUnavailable
from t2t_fast.functional import soft_split_linear
from t2t_fast.ops._common import triton_runtime
from t2t_fast.ops._common.pixels import normalisation, values
from t2t_fast.testing import assert_close

MEAN, STD = (0.485, 0.456, 0.406, 0.5), (0.229, 0.224, 0.225, 0.3)
WINDOWS = {"cells": (3, 7, 4, 2), "gathered": (3, 3, 2, 1), "one channel": (1, 7, 4, 2), "four channels": (4, 3, 2, 1)}


def problem(channels, kernel, normed=True, size=(2, 19, 22)):
    """An image of bytes with flat bright patches, its values in float64, pixel_norm, and parameters."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (size[0], channels, *size[1:]), dtype=torch.uint8, generator=generator)
    x[..., :9, :9] = 240 + x[..., :9, :9] % 16
    norm = MEAN[:channels], STD[:channels]
    exact = (x.double() / 255 - torch.tensor(norm[0]).double().view(-1, 1, 1)) / torch.tensor(norm[1]).view(-1, 1, 1)
    columns = channels * kernel**2
    parameters = {
        "weight": torch.randn(20, columns, generator=generator) / columns**0.5,
        "bias": torch.randn(20, generator=generator),
    }
    options = {}
    if normed:
        parameters["norm_weight"] = 1 + 0.1 * torch.randn(columns, generator=generator)
        parameters["norm_bias"] = 0.1 * torch.randn(columns, generator=generator)
        options["norm_eps"] = 1e-5
    return x, exact, norm, parameters, options


def reference(exact, parameters, options, window):
    """Tokens and the parameters' gradients in float64."""
    leaves = {name: t.double().requires_grad_() for name, t in parameters.items()}
    out = soft_split_linear(exact, **leaves, **options, **window, backend="reference")
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return out, upstream, torch.autograd.grad(out, list(leaves.values()), upstream)


@pytest.mark.parametrize("normed", [True, False], ids=["LayerNorm", "plain"])
@pytest.mark.parametrize("name", list(WINDOWS))
@pytest.mark.parametrize("backend", ["triton", "native", "aten", "reference"])
def test_bytes_match_float_images(backend, name, normed):
    """Forward and every parameter's gradient; padding is zero after the normalisation."""
    channels, *sizes = WINDOWS[name]
    window = dict(zip(("kernel_size", "stride", "padding"), sizes, strict=True))
    x, exact, norm, parameters, options = problem(channels, sizes[0], normed)
    _skip_unless(backend)
    expected, upstream, gradients = reference(exact, parameters, options, window)
    leaves = {key: t.clone().requires_grad_() for key, t in parameters.items()}
    out = soft_split_linear(x, **leaves, **options, **window, pixel_norm=norm, backend=backend)
    assert out.dtype == torch.float32
    assert_close(out, expected, "soft_split_linear", "forward", torch.float32)
    for value, wanted in zip(torch.autograd.grad(out, list(leaves.values()), upstream.float()), gradients, strict=True):
        assert_close(value, wanted, "soft_split_linear", "backward", torch.float32)


def _skip_unless(backend):
    try:
        backends.resolve("soft_split_linear", backends.Request("cpu", torch.float32, {}), backend)
    except BackendUnavailable as error:
        pytest.skip(f"{backend}: {error}")


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["cells", "gathered"])
@pytest.mark.parametrize("backend", ["triton", "aten"])
def test_half_precision_under_autocast(backend, name, dtype):
    """Bytes are exact: rounding costs no more on flat bright patches than elsewhere."""
    _skip_unless(backend)
    channels, *sizes = WINDOWS[name]
    window = dict(zip(("kernel_size", "stride", "padding"), sizes, strict=True))
    x, exact, norm, parameters, options = problem(channels, sizes[0])
    expected, _, _ = reference(exact, parameters, options, window)
    with torch.autocast("cpu", dtype):
        out = soft_split_linear(x, **parameters, **options, **window, pixel_norm=norm, backend=backend)
    assert out.dtype == dtype
    assert_close(out, expected, "soft_split_linear", "forward", dtype)


def test_bytes_are_saved_for_backward_not_their_values():
    x, _, norm, parameters, options = problem(3, 7)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        soft_split_linear(
            x, **{k: t.requires_grad_() for k, t in parameters.items()}, **options,
            kernel_size=7, stride=4, padding=2, pixel_norm=norm, backend="aten",
        )  # fmt: skip
    assert [t.dtype for t in kept if t.shape == x.shape] == [torch.uint8]


def test_values_of_bytes():
    x = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 2, 1, 2)
    found = values(x, normalisation((0.5, 0.25), (0.5, 0.25)), torch.float64)
    assert torch.allclose(found, torch.tensor([[[[-1.0, 1.0]], [[-1.0, 3.0]]]], dtype=torch.float64))


BAD = {
    "bytes without pixel_norm": (None, torch.uint8, "x is an image of uint8, so pixel_norm"),
    "values with pixel_norm": ((MEAN[:3], STD[:3]), torch.float32, "pixel_norm is for images of uint8"),
    "other channels": ((MEAN[:2], STD[:2]), torch.uint8, "each with the image.s 3 channels"),
    "a mean alone": ((MEAN[:3],), torch.uint8, "must be .mean, std."),
    "no deviation": ((MEAN[:3], (0.1, 0.0, 0.1)), torch.uint8, "std must be above 0"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_arguments(name):
    norm, dtype, words = BAD[name]
    x = torch.zeros(1, 3, 8, 8, dtype=dtype)
    with pytest.raises(ValueError, match=f"soft_split_linear: .*{words}"):
        soft_split_linear(x, torch.zeros(4, 27), None, 3, 2, 1, pixel_norm=norm)


def test_more_channels_than_the_kernels_read():
    request = backends.Request("cpu", torch.float32, {"channels": 5, "bytes": True})
    from t2t_fast.ops.soft_split_linear.triton import support

    if triton_runtime.reason(request) is not None:
        pytest.skip("Triton cannot run here")
    assert "bytes of 1 to 4 channels, got 5" in support.supports(request)

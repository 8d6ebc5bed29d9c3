"""soft_split_linear: accuracy of the folded form with offsets, flat images, padding and unusual windows."""

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from t2t_fast.functional import soft_split_linear
from t2t_fast.ops._common import library
from t2t_fast.ops._common.spec import Window, square
from t2t_fast.ops.soft_split_linear.aten import centred_pixels, fold_norm, patch_statistics
from t2t_fast.testing import DTYPES, assert_close, errors, natural_images


def relative_to_spread(offset, channels, kernel, stride, padding, dtype, backend):
    """Error of y against float64 on the same input; ``offset`` of the patches is in standard deviations."""
    generator = torch.Generator().manual_seed(0)
    columns = channels * kernel**2
    x = (torch.randn(2, channels, 32, 32, generator=generator) + offset).to(dtype)
    parameters = {
        "weight": torch.randn(16, columns, generator=generator) / columns**0.5,
        "bias": torch.randn(16, generator=generator),
        "norm_weight": 1 + 0.1 * torch.randn(columns, generator=generator),
        "norm_bias": 0.1 * torch.randn(columns, generator=generator),
    }
    parameters = {name: p.to(dtype) for name, p in parameters.items()}
    window = dict(kernel_size=kernel, stride=stride, padding=padding, norm_eps=1e-5)
    wide = {name: p.double() for name, p in parameters.items()}
    expected = soft_split_linear(x.double(), **wide, **window, backend="reference")
    # Border patches would contain zeros besides the offset, so their spread would be the offset itself.
    out = soft_split_linear(x, **parameters, **window, backend=backend)
    return errors(out, expected)


@pytest.mark.parametrize(("channels", "kernel", "stride", "padding"), [(3, 7, 4, 0), (64, 3, 2, 0)], ids=["s1", "s2"])
@pytest.mark.parametrize(
    ("dtype", "offset", "allowed"),
    [
        (torch.float32, 0, 2e-6),
        (torch.float32, 10, 2e-5),
        (torch.float32, 100, 2e-4),
        (torch.float32, 1000, 2e-3),
        (torch.bfloat16, 1, 8e-3),
        (torch.bfloat16, 10, 8e-3),
        (torch.bfloat16, 30, 1.2e-2),
        (torch.float16, 10, 1e-3),
        (torch.float16, 100, 2e-3),
    ],
)
def test_large_common_offset(channels, kernel, stride, padding, dtype, offset, allowed, fused):
    """float32 loses no more than the digits of the offset; half precision loses only the rounding of the input."""
    whole, row = relative_to_spread(offset, channels, kernel, stride, padding, dtype, fused)
    assert whole <= allowed and row <= 8 * allowed


@pytest.mark.parametrize("offset", [0.0, 10.0, 1e3, 1e4, 1e6])
@pytest.mark.parametrize(("channels", "window"), [(3, square(7, 4, 2)), (64, square(3, 2, 1))], ids=["s1", "s2"])
def test_statistics_survive_an_offset(channels, window, offset):
    """The merged statistics against float64; E[x^2] - mu^2 would have no correct digit at an offset of 1e4."""
    x = torch.randn(2, channels, 32, 32) + offset
    levels, rstd = patch_statistics(centred_pixels(x), window, 1e-5)
    tokens = F.unfold(x.double(), window.kernel, stride=window.stride, padding=window.padding)
    var, mu = torch.var_mean(tokens, dim=1, correction=0)
    mean, rest = (part.flatten(1).double() for part in levels[-1])
    # in standard deviations, since windows at the border contain zeros besides the offset
    assert ((mean + rest - mu) * torch.rsqrt(var + 1e-5)).abs().max() < 1e-6
    torch.testing.assert_close(rstd.flatten(1).double(), torch.rsqrt(var + 1e-5), rtol=2e-6, atol=0)


@pytest.mark.parametrize(("white", "allowed"), [(2.6, 1e-4), (255.0, 1e-2)], ids=["normalised", "bytes"])
def test_flat_white_image(white, allowed, fused):
    """Variance 0: the output is the bias, up to the rounding of a dot product times LayerNorm's largest factor, 316."""
    x = torch.full((1, 3, 32, 32), white)
    weight, bias = 0.02 * torch.randn(8, 147), torch.randn(8)
    out = soft_split_linear(x, weight, bias, 7, 4, 0, norm_eps=1e-5, backend=fused)
    torch.testing.assert_close(out, bias.expand_as(out), rtol=0, atol=allowed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_row_sums_come_from_the_rounded_weight(dtype):
    weight = torch.randn(6, 40)
    centred, rows, _ = fold_norm(weight, None, torch.rand(40) + 0.5, None, dtype)
    assert centred.dtype == dtype
    torch.testing.assert_close(rows, centred.float().sum(1))
    assert rows.abs().max() > 0, "rounding must leave something to subtract, or this test shows nothing"


def test_padding_counts_in_the_statistics(fused):
    """A border token, compared with unfold, LayerNorm and Linear."""
    x = natural_images(1, 3, 16, 16)
    weight = torch.randn(4, 147)
    out = soft_split_linear(x, weight, None, 7, 4, 2, norm_eps=1e-5, backend=fused)
    tokens = F.unfold(x, 7, stride=4, padding=2).transpose(1, 2)
    expected = F.linear(F.layer_norm(tokens, (147,)), weight)
    torch.testing.assert_close(out[:, 0], expected[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_result_does_not_depend_on_the_batch(dtype, fused):
    x = natural_images(3, 3, 32, 32).to(dtype)
    weight = torch.randn(8, 147).to(dtype)
    together = soft_split_linear(x, weight, None, 7, 4, 2, norm_eps=1e-5, backend=fused)
    alone = torch.cat(
        [soft_split_linear(each, weight, None, 7, 4, 2, norm_eps=1e-5, backend=fused) for each in x.split(1)]
    )
    assert errors(together, alone)[1] <= {torch.bfloat16: 1e-2, torch.float16: 1e-3}.get(dtype, 2e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_weight_gradient_of_flat_bright_patches(channels, fused):
    """Half of the image is flat and bright, and all tokens have the same gradient, so errors do not average out.

    Subtracting the means from the convolution's weight gradient would lose three digits; eager PyTorch loses none.
    """
    x = natural_images(2, channels, 64, 64)
    x[:, :, :, 32:] = 2.6
    columns = 49 * channels
    parameters = {
        "weight": 0.02 * torch.randn(16, columns),
        "norm_weight": 1 + 0.1 * torch.randn(columns),
        "norm_bias": 0.1 * torch.randn(columns),
    }
    upstream = torch.randn(16).expand(2, 256, 16)

    def gradients(backend, dtype):
        leaves = {name: p.to(dtype).clone().requires_grad_() for name, p in parameters.items()}
        out = soft_split_linear(
            x.to(dtype), **leaves, kernel_size=7, stride=4, padding=2, norm_eps=1e-5, backend=backend
        )
        out.backward(upstream.to(dtype))
        return {name: p.grad for name, p in leaves.items()}

    exact = gradients("reference", torch.float64)
    for name, gradient in gradients(fused, torch.float32).items():
        assert errors(gradient, exact[name])[0] <= 6e-6, name


def test_convolutions_follow_the_matmul_precision():
    """cuDNN defaults to TF32; a convolution that replaces a Linear must not be less accurate than the Linear."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    seen = []
    for precision, expected in [("highest", "ieee"), ("high", "tf32")]:
        torch.set_float32_matmul_precision(precision)
        try:
            with library._convolution_as_matmul():
                seen.append(conv.fp32_precision)
        finally:
            torch.set_float32_matmul_precision("highest")
        assert seen[-1] == expected and conv.fp32_precision == before
    assert isinstance(library.matmul_precision(torch.randn(1)), nullcontext)


def weight_gradient(x, grad, window, backend):
    weight = torch.zeros(grad.shape[-1], x.shape[1] * window.taps, dtype=x.dtype, requires_grad=True)
    soft_split_linear(x, weight, None, *window, backend=backend).backward(grad)
    return weight.grad


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_of_one_pixel_with_gaps(dtype, channels_last):
    """PyTorch's own weight gradient writes out of bounds here, which may crash the process later."""
    window = Window((1, 1), (1, 4), (0, 0))
    x, grad = torch.randn(3, 7, 14, 16).to(dtype), torch.randn(3, 14 * 4, 8).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    exact = weight_gradient(x.double(), grad.double(), window, "reference")
    for _ in range(20):
        assert_close(weight_gradient(x, grad, window, "aten"), exact, "soft_split_linear", "backward", dtype)


UNSEEN = """
import torch
from t2t_fast.functional import soft_split_linear
for channels, size, window in [(3, (3, 1), ((1, 3), (3, 2), (0, 1))), (4, (5, 2), ((2, 4), (1, 4), (0, 2)))]:
    weight = torch.zeros(16, channels * window[0][0] * window[0][1], dtype=torch.bfloat16, requires_grad=True)
    out = soft_split_linear(torch.ones(2, channels, *size).bfloat16(), weight, None, *window, backend="aten")
    out.backward(torch.ones_like(out))
    unseen = torch.nn.functional.unfold(torch.ones(1, channels, *size), window[0], 1, window[2], window[1]).sum(-1) == 0
    assert unseen.any() and (weight.grad[:, unseen[0]] == 0).all() and (weight.grad[:, ~unseen[0]] > 0).all()
"""


def test_taps_over_padding_alone_have_zero_gradient():
    """In bfloat16 PyTorch's own weight gradient leaves them uninitialised; glibc fills the memory to show it."""
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.perturb=165"}
    found = subprocess.run([sys.executable, "-c", UNSEEN], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr

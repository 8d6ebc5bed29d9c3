"""A common offset of images and tokens costs no accuracy beyond the rounding of the input itself."""

import pytest
import torch
import torch.nn.functional as F

from support.calls import skip_unless_available, with_gradients
from t2t_fast.functional import soft_split_linear, token_mlp, transformer_block
from t2t_fast.testing import errors, token_mlp_parameters, tolerance, transformer_block_parameters

OFFSETS = [0.0, 1e2, 1e4, 1e6]
FUSED = ["aten", "native", "triton"]
WINDOWS = {
    "an image": dict(channels=3, size=(15, 18), kernel_size=7, stride=4, padding=2),
    "tokens": dict(channels=16, size=(9, 8), kernel_size=3, stride=2, padding=1),
    "one channel": dict(channels=1, size=(9, 8), kernel_size=3, stride=2, padding=0),
}


def split_problem(channels, size, offset, dtype, **window):
    """A rounded image with the offset (half of it with 1.5 times the offset), and parameters."""
    generator = torch.Generator().manual_seed(0)
    columns = channels * window["kernel_size"] ** 2
    x = torch.randn(2, channels, *size, generator=generator, dtype=torch.float64) + offset
    x[..., size[1] // 2 :] += offset / 2
    drawn = {
        "weight": torch.randn(20, columns, generator=generator) / columns**0.5,
        "bias": torch.randn(20, generator=generator),
        "norm_weight": 1 + 0.1 * torch.randn(columns, generator=generator),
        "norm_bias": 0.1 * torch.randn(columns, generator=generator),
    }
    return {"x": x.to(dtype), **{name: t.to(dtype) for name, t in drawn.items()}}


def exact_split(x, weight, bias, norm_weight, norm_bias, kernel_size, stride, padding):
    """The result in float64; the means are subtracted twice."""
    tokens = F.unfold(x, kernel_size, stride=stride, padding=padding).mT
    centred = tokens - tokens.mean(-1, keepdim=True)
    centred = centred - centred.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
    return F.linear(normed * norm_weight + norm_bias, weight, bias)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("name", list(WINDOWS))
def test_soft_split_linear(name, backend, offset):
    """aten and native lose nothing; Triton loses the rounding of a window's mean, which is stored as float32."""
    skip_unless_available("soft_split_linear", backend, torch.float32)
    kind = dict(WINDOWS[name])
    tensors = split_problem(offset=offset, dtype=torch.float32, **kind)
    del kind["channels"], kind["size"]
    exact = with_gradients(lambda **t: exact_split(**t, **kind), {n: t.double() for n, t in tensors.items()})
    found = with_gradients(lambda **t: soft_split_linear(**t, **kind, norm_eps=1e-5, backend=backend), tensors)
    for each, value in found.items():
        direction = "forward" if each == "out" else "backward"
        allowed = tolerance("soft_split_linear", direction, torch.float32)
        if backend == "triton" and direction == "backward":
            allowed += 1.5 * offset * torch.finfo(torch.float32).eps
        assert errors(value, exact[each])[0] <= allowed, each


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e8])
@pytest.mark.parametrize("name", list(WINDOWS))
def test_soft_split_linear_in_float64(name, offset):
    kind = dict(WINDOWS[name])
    tensors = split_problem(offset=offset, dtype=torch.float64, **kind)
    del kind["channels"], kind["size"]
    exact = with_gradients(lambda **t: exact_split(**t, **kind), tensors)
    found = with_gradients(lambda **t: soft_split_linear(**t, **kind, norm_eps=1e-5, backend="aten"), tensors)
    for each, value in found.items():
        assert errors(value, exact[each])[0] <= 1e-13, each


@pytest.mark.parametrize("value", [1e4, 1e4 + 0.1, 255.0, 3e6])
@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("name", list(WINDOWS))
def test_a_flat_image(name, backend, value):
    """Its LayerNorm is 0: the output is the bias, and the gradient of LayerNorm's weight is 0."""
    skip_unless_available("soft_split_linear", backend, torch.float32)
    kind = dict(WINDOWS[name], padding=0)
    tensors = split_problem(offset=0.0, dtype=torch.float32, **kind)
    del kind["channels"], kind["size"]
    tensors["x"].fill_(value)
    found = with_gradients(lambda **t: soft_split_linear(**t, **kind, norm_eps=1e-5, backend=backend), tensors)
    bias = tensors["bias"] + tensors["weight"] @ tensors["norm_bias"]
    torch.testing.assert_close(found["out"], bias.expand_as(found["out"]), rtol=2e-6, atol=2e-6)
    exact = with_gradients(lambda **t: exact_split(**t, **kind), {n: t.double() for n, t in tensors.items()})
    assert found["norm_weight"].abs().max() <= 1e-4
    assert errors(found["x"], exact["x"])[0] <= 6e-6


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("backend", FUSED)
def test_token_mlp(backend, offset):
    """t contains the offset of the values and is rounded with it; the additional error is within the table's."""
    skip_unless_available("token_mlp", backend, torch.float32)
    check_token_mlp(backend, offset, torch.float32, 2 * tolerance("token_mlp", "backward", torch.float32))


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e8])
def test_token_mlp_in_float64(offset):
    check_token_mlp("aten", offset, torch.float64, 1e-13)


def check_token_mlp(backend, offset, dtype, allowed):
    generator = torch.Generator().manual_seed(0)
    width = 32
    y, v = torch.randn(2, 2, 40, width, generator=generator, dtype=torch.float64)
    tensors = {"y": y, "v": v + offset, **token_mlp_parameters(generator, width)}
    tensors = {name: t.to(dtype) for name, t in tensors.items()}

    def exact(y, v, proj_weight, proj_bias, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
        """Without the offset, which LayerNorm removes."""
        t = (v - offset) + F.linear(y, proj_weight, proj_bias)
        n = F.layer_norm(t, (width,), norm_weight, norm_bias)
        return t + F.linear(F.gelu(F.linear(n, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)

    expected = with_gradients(exact, {name: t.double() for name, t in tensors.items()})
    found = with_gradients(lambda **t: token_mlp(**t, backend=backend), tensors)
    found["out"] = found["out"].double() - offset
    for name, value in found.items():
        assert errors(value, expected[name])[0] <= allowed + 0.5 * offset * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("backend", ["aten", "native"])
def test_transformer_block(backend, offset):
    """Both LayerNorms remove the tokens' offset; the additional error is that of the rounded sum between them."""
    skip_unless_available("transformer_block", backend, torch.float32)
    generator, width = torch.Generator().manual_seed(0), 32
    x = torch.randn(2, 40, width, generator=generator, dtype=torch.float64) + offset
    tensors = {"x": x.float(), **transformer_block_parameters(generator, width, 48)}

    def exact(x, **parameters):
        return transformer_block(x - offset, **parameters, heads=2, backend="reference")

    expected = with_gradients(exact, {name: t.double() for name, t in tensors.items()})
    found = with_gradients(lambda **t: transformer_block(**t, heads=2, backend=backend), tensors)
    found["out"] = found["out"].double() - offset
    for name, value in found.items():
        allowed = tolerance("transformer_block", "backward", torch.float32) + offset * torch.finfo(torch.float32).eps
        assert errors(value, expected[name])[0] <= allowed, name

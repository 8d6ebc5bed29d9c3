"""Mixed precision: dtypes, errors compared with upstream's, and inputs where upstream returns NaN."""

import copy

import pytest
import torch

from support.calls import skip_unless_available
from t2t_fast import reference
from t2t_fast.functional import performer_attention, soft_split, soft_split_linear
from t2t_fast.interop.swap import swap
from t2t_fast.testing import Case, errors, features, natural_images, transformer_block_parameters

HALVES = [torch.bfloat16, torch.float16]


def module(tokens_type, gain, seed=0):
    """Upstream's module: its initialisation, random biases and norms, and scaled k, q, v weights."""
    torch.manual_seed(seed)
    net = reference.T2T_module(64, tokens_type, 3, 64, 64)
    net.apply(reference.t2t_vit.init_weights)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for layer in (net.attention1, net.attention2):
            (layer.kqv if tokens_type == "performer" else layer.attn.qkv).weight.mul_(gain)
    return net.eval()


def run(net, x, dtype):
    net.zero_grad(set_to_none=True)
    upstream = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        out = net(x)
    out.backward(upstream.to(out.dtype))
    return out.detach(), {n: p.grad for n, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("gain", [1, 2])
@pytest.mark.parametrize("tokens_type", ["performer", "transformer"])
@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
def test_error_is_at_most_upstreams(dtype, tokens_type, gain):
    """Finite, and errors against float64 at most 1.25 times upstream's under autocast (forward, worst gradient)."""
    net = module(tokens_type, gain)
    x = natural_images(2, 3, 64, 64)
    exact, exact_gradients = run(copy.deepcopy(net).double(), x.double(), None)
    theirs, their_gradients = run(net, x, dtype)
    swap(net)
    ours, our_gradients = run(net, x, dtype)
    assert ours.dtype == dtype
    assert ours.isfinite().all() and all(g.isfinite().all() for g in our_gradients.values())
    assert errors(ours, exact)[0] <= 1.25 * errors(theirs, exact)[0]
    worst = {n: errors(g, exact_gradients[n])[0] for n, g in our_gradients.items()}
    their_worst = max(errors(g, exact_gradients[n])[0] for n, g in their_gradients.items())
    assert max(worst.values()) <= 1.25 * their_worst, max(worst, key=worst.get)


# batch, tokens, heads, width, hidden units: enough values that chance does not decide
BLOCKS = [(2, 50, 4, 256, 512), (2, 197, 2, 64, 192), (1, 300, 3, 36, 40), (8, 37, 1, 72, 72), (16, 13, 4, 32, 33)]


@pytest.mark.parametrize("gain", [1, 8])
@pytest.mark.parametrize("sizes", BLOCKS, ids=str)
def test_error_of_a_native_block_is_at_most_the_references(sizes, gain):
    """Under bfloat16's autocast, against float64: of the output, and of all gradients together."""
    skip_unless_available("transformer_block", "native")
    batch, length, heads, width, hidden = sizes
    generator = torch.Generator().manual_seed(0)
    tensors = {"x": torch.randn(batch, length, width, generator=generator)}
    tensors |= transformer_block_parameters(generator, width, hidden)
    options = {"heads": heads, "scale": gain * (width / heads) ** -0.5}
    case = Case("transformer_block", "", tensors, options, tuple(tensors))
    exact, exact_gradients = case.cast(torch.float64).run_backward("reference", torch.float32)

    def error(backend):
        with torch.autocast("cpu", torch.bfloat16):
            out, gradients = case.run_backward(backend)
        assert out.dtype == torch.float32
        square = [errors(gradients[name], exact_gradients[name])[0] ** 2 for name in gradients]
        return errors(out, exact)[0], (sum(square) / len(square)) ** 0.5

    for ours, theirs in zip(error("native"), error("reference"), strict=True):
        assert ours <= theirs


def test_upstream_makes_nan_in_float16_and_ours_does_not():
    """The reported bug: with longer keys and queries D underflows in half precision, where eps rounds to 0."""
    torch.manual_seed(0)
    layer = reference.Token_performer(147, 64).eval()
    with torch.no_grad():
        layer.kqv.weight.mul_(3)
    x = torch.randn(2, 196, 147)
    with torch.autocast("cpu", torch.float16):
        assert not layer.half()(x.half()).isfinite().all()
    exact = layer.double()(x.double())
    layer.half()
    swap(layer)
    ours = layer(x.half())
    assert ours.isfinite().all() and errors(ours, exact)[0] < 5e-3


@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
def test_dtypes_under_autocast(dtype):
    x = natural_images(1, 3, 32, 32)
    weight = torch.randn(8, 147)
    with torch.autocast("cpu", dtype):
        assert soft_split(x, 7, 4, 2).dtype == torch.float32
        assert soft_split_linear(x, weight, None, 7, 4, 2).dtype == dtype
        assert soft_split_linear(x, weight, None, 7, 4, 2, norm_eps=1e-5).dtype == dtype
        q = torch.randn(1, 5, 8)
        assert performer_attention(q, q.to(dtype), q, features(torch.Generator(), 4, 8)).dtype == dtype
    assert soft_split_linear(x, weight, None, 7, 4, 2).dtype == torch.float32


def test_a_bright_flat_region_keeps_its_texture_under_autocast():
    """Texture of one grey level on white: rounding the image before LayerNorm would erase it."""
    x = 2.2 + 0.017 * torch.randint(0, 2, (1, 3, 32, 32)).float()
    weight = torch.randn(8, 147) / 12
    exact = soft_split_linear(x.double(), weight.double(), None, 7, 4, 0, norm_eps=1e-5, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        out = soft_split_linear(x, weight, None, 7, 4, 0, norm_eps=1e-5, backend="aten")
    assert errors(out, exact)[0] < 4e-3


def test_gradients_are_in_the_parameters_dtype():
    net = module("performer", 1)
    swap(net)
    _, gradients = run(net, natural_images(2, 3, 64, 64), torch.bfloat16)
    assert {g.dtype for g in gradients.values()} == {torch.float32}


@pytest.mark.parametrize("tokens_type", ["performer", "transformer"])
def test_backward_inside_the_autocast_region(tokens_type):
    """Autocast does not affect the hand-written backward passes, inside the region or after it."""
    net = module(tokens_type, 1)
    swap(net)
    x = natural_images(2, 3, 64, 64)
    _, expected = run(net, x, torch.bfloat16)
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    net.zero_grad(set_to_none=True)
    upstream = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        net(x).backward(upstream.bfloat16())
    for name, parameter in net.named_parameters():
        if name in expected:
            assert torch.equal(parameter.grad, expected[name]), name

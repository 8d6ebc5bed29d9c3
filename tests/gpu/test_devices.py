"""Properties that hold on every device; without CUDA only the CPU half of each test runs."""

import copy

import pytest
import torch

import t2t_fast
from t2t_fast import reference
from t2t_fast.functional import soft_split_linear
from t2t_fast.ops._common.philox import keep_masks
from t2t_fast.testing import CASES, DTYPES, assert_close, errors, natural_images

on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
TINY = dict(img_size=64, num_classes=4, embed_dim=24, depth=1, num_heads=2, mlp_ratio=2.0)


@on_each_device
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("op", list(CASES))
def test_operators_against_float64(op, dtype, device):
    """Forward and every gradient of every case, against the reference in float64 on the CPU."""
    dtype = DTYPES[dtype]
    for case in CASES[op]():
        rounded = case.cast(dtype)
        expected, expected_gradients = rounded.cast(torch.float64).run_backward("reference", dtype)
        out, gradients = rounded.cast(dtype, device).run_backward()
        assert out.device.type == device
        assert_close(out.cpu(), expected, op, "forward", dtype, case.name)
        for name, gradient in gradients.items():
            assert_close(gradient.cpu(), expected_gradients[name], op, "backward", dtype, f"{case.name}: {name}")


@on_each_device
def test_masks_are_the_same_on_every_device(device):
    seed = torch.tensor(-31415926535)
    for mask, expected in zip(
        keep_masks(seed.to(device), (3, 700_001), 0.1, 0.2), keep_masks(seed, (3, 700_001), 0.1, 0.2), strict=True
    ):
        assert torch.equal(mask.cpu(), expected)


@on_each_device
def test_a_swapped_model_moves(device):
    """Swapped then moved, or moved then swapped: the same logits, and gradients for every parameter."""
    torch.manual_seed(0)
    model = reference.T2T_ViT(**TINY).eval()
    x = natural_images(2, 3, 64, 64)
    expected = copy.deepcopy(model).double()(x.double())
    first = copy.deepcopy(model)
    t2t_fast.swap(first)
    first.to(device)
    second = copy.deepcopy(model).to(device)
    t2t_fast.swap(second)
    for swapped in (first, second):
        out = swapped(x.to(device))
        out.sum().backward()
        assert errors(out.cpu(), expected)[0] < 1e-5
        assert all(p.grad is not None and p.grad.device.type == device for p in swapped.parameters() if p.requires_grad)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_training_step_is_finite(device, dtype):
    """The weights of k, q and v are four times as large, which makes upstream's float16 loss NaN."""
    torch.manual_seed(0)
    model = reference.T2T_ViT(**TINY).to(device)
    with torch.no_grad():
        for layer in (model.tokens_to_token.attention1, model.tokens_to_token.attention2):
            layer.kqv.weight.mul_(4)
    t2t_fast.swap(model)
    x = natural_images(4, 3, 64, 64).to(device)
    with torch.autocast(device, dtype):
        loss = model(x).float().square().mean()
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@on_each_device
def test_bitwise_repeatable(device):
    model = t2t_fast.T2TModule(64, embed_dim=32).to(device).train()
    x = natural_images(2, 3, 64, 64).to(device)

    def run():
        model.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        out = model(x)
        out.square().sum().backward()
        return [out, *(p.grad for p in model.parameters() if p.requires_grad)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@on_each_device
def test_float32_is_float32(device):
    """By default cuDNN's convolutions would use TF32, with errors near 1e-3."""
    torch.manual_seed(0)
    x, weight = natural_images(2, 64, 56, 56).to(device), torch.randn(192, 576, device=device)
    exact = soft_split_linear(x.double(), weight.double(), None, 3, 2, 1, norm_eps=1e-5, backend="reference")
    out = soft_split_linear(x, weight, None, 3, 2, 1, norm_eps=1e-5)
    assert errors(out, exact)[0] < 5e-6


@on_each_device
def test_verify_is_green(device):
    report = t2t_fast.verify(t2t_fast.T2TModule(64, embed_dim=32).to(device), natural_images(2, 3, 64, 64).to(device))
    assert report.ok, str(report)


@pytest.mark.gpu
def test_a_cuda_graph_replays_a_swapped_model():
    torch.manual_seed(0)
    model = reference.T2T_ViT(**TINY).cuda().eval()
    t2t_fast.swap(model)
    images = natural_images(4, 3, 64, 64).cuda()
    held = images[:2].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):
            model(held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = model(held)
    held.copy_(images[2:])
    graph.replay()
    with torch.no_grad():
        assert errors(out, model(images[2:]))[0] < 1e-5


@pytest.mark.gpu
def test_operands_on_two_devices_are_refused():
    with pytest.raises(ValueError, match="soft_split_linear: weight must be on"):
        soft_split_linear(torch.randn(1, 3, 8, 8, device="cuda"), torch.randn(4, 27), None, 3)

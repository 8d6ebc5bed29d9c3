"""The whole T2T module on interpreted Triton kernels: training with dropout, both variants."""

import pytest
import torch

import t2t_fast
from t2t_fast import backends
from t2t_fast.modules import T2TModule
from t2t_fast.ops._common import triton_runtime
from t2t_fast.testing import DTYPES, assert_close, natural_images

REASON = triton_runtime.reason(backends.Request("cpu", torch.float32, {}))
pytestmark = [pytest.mark.interpret, pytest.mark.skipif(REASON is not None, reason=f"triton: {REASON}")]

NORM = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def module(tokens_type, dtype, **options):
    """A narrow module in training mode, with biases and norms away from their initial values; rounded to a dtype."""
    torch.manual_seed(0)
    t2t = T2TModule(tokens_type=tokens_type, token_dim=16, embed_dim=24, **options)
    with torch.no_grad():
        for name, parameter in t2t.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "qkv" in name or "kqv" in name:
                parameter.mul_(2)
    return t2t.to(dtype)


def run(t2t, x, backend, upstream):
    """Tokens and all gradients. The dropout seeds are drawn from the same generator state in every run."""
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    torch.manual_seed(1)
    with t2t_fast.backend(backend):
        out = t2t(x)
    leaves = {name: p for name, p in t2t.named_parameters() if p.requires_grad} | ({"x": x} if x.requires_grad else {})
    return out, dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), upstream.to(out)), strict=True))


def check(tokens_type, dtype, x, exact, **options):
    upstream = torch.randn(x.shape[0], 9, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    t2t = module(tokens_type, dtype, **options)
    out, gradients = run(t2t, x, "triton", upstream)
    expected, expected_gradients = run(t2t.double(), exact, "reference", upstream)
    assert out.dtype == dtype
    assert_close(out, expected, "t2t_module", "forward", dtype)
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], "t2t_module", "backward", dtype, name)
    return out


@pytest.mark.parametrize(
    ("dtype", "recompute"),
    [
        ("fp32", False),
        ("bf16", False),
        ("fp16", True),
        pytest.param("fp16", False, marks=pytest.mark.slow),
        pytest.param("fp32", True, marks=pytest.mark.slow),
    ],
)
def test_performer_module_in_training(dtype, recompute):
    """Backward must draw forward's masks again. Both layers have two dropouts of 0.1."""
    x = natural_images(2, 3, 40, 36, seed=3).to(DTYPES[dtype])
    out = check("performer", DTYPES[dtype], x, x.double(), recompute=recompute)
    again, _ = run(module("performer", DTYPES[dtype], recompute=recompute).eval(), x, "triton", torch.zeros(2, 9, 24))
    assert not torch.equal(out, again), "dropout must have done something"


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_transformer_module_in_training(dtype):
    """The attention is PyTorch's, with upstream's scale; the kernels compute the soft split and the mlp."""
    x = natural_images(2, 3, 40, 36, seed=3).to(DTYPES[dtype])
    check("transformer", DTYPES[dtype], x, x.double())


def test_a_module_on_bytes():
    x = torch.randint(0, 256, (2, 3, 40, 36), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(part, dtype=torch.float64).view(-1, 1, 1) for part in NORM)
    check("performer", torch.float32, x, (x.double() / 255 - mean) / std, pixel_norm=NORM)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    """Parameters and gradients stay float32."""
    t2t, x = module("performer", torch.float32).eval(), natural_images(2, 3, 40, 36, seed=3)
    with t2t_fast.backend("reference"):
        expected = t2t.double()(x.double())
    t2t.float()
    with t2t_fast.backend("triton"), torch.autocast("cpu", dtype):
        out = t2t(x)
    assert_close(out, expected, "t2t_module", "forward", dtype)
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in t2t.parameters() if p.requires_grad)

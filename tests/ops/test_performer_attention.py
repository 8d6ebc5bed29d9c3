"""Performer attention: exact eps, finite everywhere, and what half precision does to the defining form."""

import math

import pytest
import torch

from t2t_fast.functional import performer_attention
from t2t_fast.testing import DTYPES, errors, features


def inputs(norm, length=256, width=64, m=32, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def rows():
        x = torch.randn(2, length, width, generator=generator)
        return (x / x.norm(dim=-1, keepdim=True) * norm).to(dtype)

    v = torch.randn(2, length, width, generator=generator).to(dtype)
    return rows(), rows(), v, features(generator, m, width).to(dtype)


def exact(q, k, v, w, eps=1e-8):
    """The gated log-space form in float64: exact where the defining form underflows even there."""
    q, k, v, w = (t.double() for t in (q, k, v, w))
    lz = torch.logsumexp(k @ w.T - k.square().sum(-1, keepdim=True) / 2, dim=1)
    state = torch.softmax(k @ w.T - k.square().sum(-1, keepdim=True) / 2, dim=1).mT @ v
    scores = q @ w.T + lz.unsqueeze(1)
    lse = scores.logsumexp(-1) - q.square().sum(-1) / 2
    gate = torch.sigmoid(lse - math.log(w.shape[0] * eps))
    return scores.softmax(-1) @ state * gate.unsqueeze(-1)


@pytest.mark.parametrize("norm", [0.0, 1.0, 2.0, 4.0, 5.0, 6.0])
def test_float32_equals_the_defining_form(norm, fused):
    q, k, v, w = inputs(norm)
    expected = performer_attention(*(t.double() for t in (q, k, v, w)), backend="reference")
    whole, row = errors(performer_attention(q, k, v, w, backend=fused), expected)
    assert whole <= 5e-6 and row <= 4e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", [0.0, 1.0, 4.0, 6.0, 8.0, 16.0, 100.0, 1000.0])
def test_finite_at_any_norm(norm, dtype, fused):
    """Forward and gradients; the error of v + y (what the layer goes on with) is that of the dtype."""
    q, k, v, w = (t.requires_grad_() for t in inputs(norm, dtype=dtype))
    y = performer_attention(q, k, v, w, backend=fused)
    y.float().square().sum().backward()
    assert y.isfinite().all()
    assert all(t.grad.isfinite().all() for t in (q, k, v, w))
    expected = exact(*(t.detach() for t in (q, k, v, w)))
    error = (y.double() - expected).norm() / v.double().norm()
    assert error <= {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]


def test_half_precision_breaks_the_defining_form(fused):
    """The reason for the log-space form: the defining form in float16 divides 0 by 0, at norm 6 for some tokens."""
    for norm in (6.0, 20.0):
        q, k, v, w = inputs(norm, dtype=torch.float16)
        a = k @ w.T - k.square().sum(-1, keepdim=True) / 2
        kp, qp = a.exp() / 32**0.5, (q @ w.T - q.square().sum(-1, keepdim=True) / 2).exp() / 32**0.5
        naive = (qp @ (kp.mT @ v)) / (qp @ kp.sum(1).unsqueeze(-1) + 1e-8)
        assert not naive.isfinite().all()
        assert performer_attention(q, k, v, w, backend=fused).isfinite().all()


def test_features_that_would_overflow(fused):
    """A wide w: exp(a) overflows float32 in the defining form (inf / inf), the exact value comes out here."""
    generator = torch.Generator().manual_seed(0)
    w = features(generator, 256, 256)
    k = (w[:8] * 1.0).expand(1, 8, 256).contiguous()
    v = torch.randn(1, 8, 256, generator=generator)
    assert not performer_attention(k, k, v, w, backend="reference").isfinite().all()
    out = performer_attention(k, k, v, w, backend=fused)
    assert errors(out, exact(k, k, v, w))[0] <= 1e-4


def test_eps_is_a_gate():
    """Shorter rows open it, eps = 0 takes it away, a larger eps closes it; all as the defining form in float64."""
    q, k, v, w = inputs(6.5, dtype=torch.float64)
    ungated = performer_attention(q, k, v, w, 0.0, backend="aten")
    for eps in (1e-12, 1e-8, 1e-4):
        y = performer_attention(q, k, v, w, eps, backend="aten")
        torch.testing.assert_close(y, performer_attention(q, k, v, w, eps, backend="reference"), rtol=1e-9, atol=1e-12)
        assert (y.norm(dim=-1) <= ungated.norm(dim=-1) * (1 + 1e-12)).all()
    small = performer_attention(q / 4, k / 4, v, w, 1e-8, backend="aten")
    torch.testing.assert_close(
        small, performer_attention(q / 4, k / 4, v, w, 0.0, backend="aten"), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_views_of_one_packed_tensor(dtype, fused):
    packed = torch.randn(2, 50, 3 * 16).to(dtype) / 2
    k, q, v = packed.chunk(3, dim=-1)
    w = features(torch.Generator().manual_seed(0), 8, 16).to(dtype)
    expected = performer_attention(q.contiguous(), k.contiguous(), v.contiguous(), w, backend=fused)
    torch.testing.assert_close(performer_attention(q, k, v, w, backend=fused), expected)


def test_heads_are_a_batch_dimension(fused):
    q, k, v = torch.randn(3, 2, 4, 9, 8).unbind(0)
    w = features(torch.Generator().manual_seed(0), 4, 8)
    together = performer_attention(q, k, v, w, backend=fused)
    for head in range(4):
        alone = performer_attention(q[:, head], k[:, head], v[:, head], w, backend=fused)
        torch.testing.assert_close(together[:, head], alone, rtol=1e-5, atol=1e-6)


def test_order_of_keys_does_not_matter(fused):
    q, k, v, w = inputs(3.0)
    order = torch.randperm(k.shape[1])
    shuffled = performer_attention(q, k[:, order], v[:, order], w, backend=fused)
    assert errors(shuffled, performer_attention(q, k, v, w, backend=fused))[1] <= 2e-5

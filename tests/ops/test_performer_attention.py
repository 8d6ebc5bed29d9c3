"""Performer attention: exact eps, finite at any norm, and the failure of the defining form in half precision."""

import math

import pytest
import torch

from t2t_fast.backends import explain
from t2t_fast.errors import BackendUnavailable
from t2t_fast.functional import performer_attention
from t2t_fast.testing import DTYPES, errors, exact_attention, features


def inputs(norm, length=256, width=64, m=32, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def rows():
        x = torch.randn(2, length, width, generator=generator)
        return (x / x.norm(dim=-1, keepdim=True) * norm).to(dtype)

    v = torch.randn(2, length, width, generator=generator).to(dtype)
    return rows(), rows(), v, features(generator, m, width).to(dtype)


@pytest.mark.parametrize("norm", [0.0, 1.0, 2.0, 4.0, 5.0, 6.0])
def test_float32_equals_the_defining_form(norm, attending):
    q, k, v, w = inputs(norm)
    expected = performer_attention(*(t.double() for t in (q, k, v, w)), backend="reference")
    whole, row = errors(performer_attention(q, k, v, w, backend=attending), expected)
    assert whole <= 5e-6 and row <= 4e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", [0.0, 1.0, 4.0, 6.0, 8.0, 16.0, 100.0, 1000.0])
def test_finite_at_any_norm(norm, dtype, attending):
    """Forward and gradients are finite; the error relative to v (the layer computes v + y) is that of the dtype."""
    q, k, v, w = (t.requires_grad_() for t in inputs(norm, length=128, dtype=dtype))
    y = performer_attention(q, k, v, w, backend=attending)
    y.float().square().sum().backward()
    assert y.isfinite().all()
    assert all(t.grad.isfinite().all() for t in (q, k, v, w))
    expected, _ = exact_attention(*(t.detach() for t in (q, k, v, w)))
    error = (y.double() - expected).norm() / v.double().norm()
    assert error <= {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]


def test_half_precision_breaks_the_defining_form(attending):
    """The reason for the log-space form: the defining form in float16 divides 0 by 0, at norm 6 for some tokens."""
    for norm in (6.0, 20.0):
        q, k, v, w = inputs(norm, dtype=torch.float16)
        a = k @ w.T - k.square().sum(-1, keepdim=True) / 2
        kp, qp = a.exp() / 32**0.5, (q @ w.T - q.square().sum(-1, keepdim=True) / 2).exp() / 32**0.5
        naive = (qp @ (kp.mT @ v)) / (qp @ kp.sum(1).unsqueeze(-1) + 1e-8)
        assert not naive.isfinite().all()
        assert performer_attention(q, k, v, w, backend=attending).isfinite().all()


def test_features_that_would_overflow(attending):
    """A wide w: exp(a) overflows float32 in the defining form (inf / inf), but not here."""
    generator = torch.Generator().manual_seed(0)
    w = features(generator, 128, 128)
    k = (w[:8] * 1.0).expand(1, 8, 128).contiguous()
    v = torch.randn(1, 8, 128, generator=generator)
    assert not performer_attention(k, k, v, w, backend="reference").isfinite().all()
    out = performer_attention(k, k, v, w, backend=attending)
    assert errors(out, exact_attention(k, k, v, w)[0])[0] <= 1e-4


def test_eps_is_a_gate():
    """Shorter rows open the gate, a larger eps closes it, eps = 0 removes it, as in the defining form in float64."""
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
def test_views_of_one_packed_tensor(dtype, attending):
    packed = torch.randn(2, 50, 3 * 16).to(dtype) / 2
    k, q, v = packed.chunk(3, dim=-1)
    w = features(torch.Generator().manual_seed(0), 8, 16).to(dtype)
    expected = performer_attention(q.contiguous(), k.contiguous(), v.contiguous(), w, backend=attending)
    torch.testing.assert_close(performer_attention(q, k, v, w, backend=attending), expected)


def test_heads_are_a_batch_dimension(attending):
    q, k, v = torch.randn(3, 2, 4, 9, 8).unbind(0)
    w = features(torch.Generator().manual_seed(0), 4, 8)
    together = performer_attention(q, k, v, w, backend=attending)
    for head in range(4):
        alone = performer_attention(q[:, head], k[:, head], v[:, head], w, backend=attending)
        torch.testing.assert_close(together[:, head], alone, rtol=1e-5, atol=1e-6)


def test_order_of_keys_does_not_matter(attending):
    q, k, v, w = inputs(3.0)
    order = torch.randperm(k.shape[1])
    shuffled = performer_attention(q, k[:, order], v[:, order], w, backend=attending)
    assert errors(shuffled, performer_attention(q, k, v, w, backend=attending))[1] <= 2e-5


def masked_inputs(*shape, share=0.6, m=8, dtype=torch.float32):
    """q, k, v, w and a key mask (B, L) that keeps the first key of every sample and masks the last."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = ((torch.randn(3, *shape, generator=generator) / 2).to(dtype)).unbind(0)
    keep = torch.rand(shape[0], shape[-2], generator=generator) < share
    keep[:, 0], keep[:, -1] = True, False
    return q, k, v, features(generator, m, shape[-1]).to(dtype), keep


def run_masked(q, k, v, w, keep, eps=1e-8, backend="aten"):
    """The output and the gradients of q, k, v and w for one upstream gradient."""
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v, w)]
    y = performer_attention(*leaves, eps, key_mask=keep, backend=backend)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y))
    return y.detach(), *(t.grad for t in leaves)


@pytest.mark.parametrize("shape", [(3, 41, 16), (2, 3, 19, 16)], ids=["3-D", "heads"])
@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_a_key_mask_equals_leaving_the_keys_out(backend, shape):
    """Forward and all gradients, sample by sample; the gradients of masked keys are exactly 0."""
    q, k, v, w, keep = masked_inputs(*shape, dtype=torch.float64)
    y, d_q, d_k, d_v, d_w = run_masked(q, k, v, w, keep, backend=backend)
    leaves = [t.clone().requires_grad_() for t in (q, k, v, w)]
    alone = [
        performer_attention(
            leaves[0][i : i + 1],
            leaves[1][i : i + 1, ..., keep[i], :],
            leaves[2][i : i + 1, ..., keep[i], :],
            leaves[3],
            backend=backend,
        )
        for i in range(len(q))
    ]
    expected = torch.cat(alone)
    expected.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y))
    torch.testing.assert_close(y, expected.detach(), rtol=1e-12, atol=1e-13)
    for found, leaf in zip((d_q, d_k, d_v, d_w), leaves, strict=True):
        torch.testing.assert_close(found, leaf.grad, rtol=1e-11, atol=1e-12)
    for found in (d_k, d_v):
        assert not found.movedim(-2, 1)[~keep].any()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(3, 41, 16), (2, 3, 19, 16)], ids=["3-D", "heads"])
def test_values_of_masked_keys_are_ignored(shape, dtype):
    """NaN, infinities and the largest numbers change no bit of the output or of a gradient."""
    q, k, v, w, keep = masked_inputs(*shape, dtype=dtype)
    clean = run_masked(q, k, v, w, keep)
    dropped = ~keep.view(shape[0], *(1,) * (len(shape) - 3), -1, 1).expand(shape)
    for rubbish in (math.nan, math.inf, -math.inf, torch.finfo(dtype).max):
        spoilt = run_masked(q, k.masked_fill(dropped, rubbish), v.masked_fill(dropped, rubbish), w, keep)
        for value, expected in zip(spoilt, clean, strict=True):
            assert value.isfinite().all()
            assert torch.equal(value, expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_a_sample_without_keys_gives_zero(eps, dtype):
    """Its output and gradients are 0 for any values of the keys, and the other samples are unaffected."""
    q, k, v, w, keep = masked_inputs(3, 21, 16, dtype=dtype)
    keep[1] = False
    for rubbish in (None, math.nan):
        if rubbish is not None:
            k[1], v[1] = rubbish, rubbish
        y, *gradients = run_masked(q, k, v, w, keep, eps)
        assert all(t.isfinite().all() for t in (y, *gradients))
        assert not any(t[1].any() for t in (y, *gradients[:3]))
        rest = [0, 2]
        y_rest = performer_attention(q[rest], k[rest], v[rest], w, eps, key_mask=keep[rest], backend="aten")
        torch.testing.assert_close(y[rest], y_rest)


@pytest.mark.parametrize("norm", [8.0, 100.0])
def test_key_mask_at_large_norms(norm):
    """Where scores are large and the gate is closed, masking is as accurate as leaving the keys out."""
    q, k, v, w = inputs(norm)
    keep = torch.arange(k.shape[1]).expand(2, -1) % 3 != 0
    for eps in (1e-8, 0.0):
        y = performer_attention(q, k, v, w, eps, key_mask=keep, backend="aten")
        expected = performer_attention(q, k[:, keep[0]], v[:, keep[0]], w, eps, backend="aten")
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eps", [1e-2, 0.0])
def test_gradcheck_with_a_key_mask(eps):
    """Finite differences; one sample has no keys."""
    q, k, v, w, keep = masked_inputs(3, 2, 5, 4, m=3, dtype=torch.float64)
    keep[1] = False

    def run(*tensors):
        return performer_attention(*tensors, eps, key_mask=keep, backend="aten")

    torch.autograd.gradcheck(run, [t.clone().requires_grad_() for t in (q, k, v, w)])


def test_a_full_mask_changes_nothing():
    q, k, v, w, keep = masked_inputs(2, 30, 16)
    everything = torch.ones_like(keep)
    for value, expected in zip(run_masked(q, k, v, w, everything), run_masked(q, k, v, w, None), strict=True):
        assert torch.equal(value, expected)


def test_backend_without_key_masks_raises():
    q, k, v, w, keep = masked_inputs(2, 30, 16)
    with pytest.raises(BackendUnavailable, match=r"native: (no key mask in the native kernels|.*are missing)"):
        performer_attention(q, k, v, w, key_mask=keep, backend="native")
    assert explain("performer_attention", device="cpu", masked=True).chosen("performer_attention") == "aten"


@pytest.mark.parametrize("gradient", [True, False], ids=["training", "inference"])
def test_a_key_mask_is_traced(gradient):
    """opcheck with dynamic shapes, torch.compile and torch.export; the mask is an input of the graph."""
    q, k, v, w, keep = masked_inputs(2, 3, 11, 8)
    leaves = [t.clone().requires_grad_(gradient) for t in (q, k, v, w)]
    torch.library.opcheck(torch.ops.t2t_fast.performer_attention.default, (*leaves, 1e-8, keep, False, False, "aten"))

    class Attend(torch.nn.Module):
        def forward(self, q, k, v, w, keep):
            return performer_attention(q, k, v, w, key_mask=keep)

    whole = torch.compile(Attend(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(*leaves, keep), Attend()(*leaves, keep))
    if not gradient:
        program = torch.export.export(Attend(), (q, k, v, w, keep))
        torch.testing.assert_close(program.module()(q, k, v, w, keep), Attend()(q, k, v, w, keep))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_key_mask_under_autocast(dtype):
    """The mask is unchanged; q, k and v are cast to autocast's dtype."""
    q, k, v, w, keep = masked_inputs(3, 21, 16)
    with torch.autocast("cpu", dtype):
        y = performer_attention(q, k, v, w, key_mask=keep)
    assert y.dtype == dtype
    rounded = (t.to(dtype) for t in (q, k, v))
    assert torch.equal(y, performer_attention(*rounded, w, key_mask=keep, backend="aten"))

"""Options of Performer attention beyond T2T-ViT: causal, weights of keys, features per head, width of v, normalize.

The attention that performer-pytorch's ``FastAttention`` computes is written here in plain operations and compared in
float64; if that package is installed, its own code is compared too.
"""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from t2t_fast.backends import explain
from t2t_fast.errors import BackendUnavailable
from t2t_fast.functional import performer_attention
from t2t_fast.ops._common import causal as pairs
from t2t_fast.testing import DTYPES, errors, features


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(*shape, m=8, v_width=None, heads=None, norm=1.5, dtype=torch.float64):
    """q, k of about one norm, v, and w: (m, E), or (heads, m, E)."""
    q, k = (normal(*shape, seed=seed) * norm / shape[-1] ** 0.5 for seed in (0, 1))
    v = normal(*shape[:-1], v_width or shape[-1], seed=2)
    w = torch.stack([features(torch.Generator().manual_seed(seed), m, shape[-1]) for seed in range(heads or 1)])
    return tuple(t.to(dtype) for t in (q, k, v, w if heads else w[0]))


def with_gradients(call, *tensors, seed=9):
    """The result of ``call`` and the gradients of all tensors, for one upstream gradient."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = call(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, normal(*y.shape, seed=seed, dtype=y.dtype))]


def assert_equal_up_to_rounding(found, expected, tolerance=1e-11):
    for index, (value, wanted) in enumerate(zip(found, expected, strict=True)):
        assert errors(value, wanted)[0] <= tolerance, f"result {index}"


def exact(q, k, v, w, eps=0.0, weights=None):
    """Causal attention in float64 and log space, pair by pair and feature by feature."""
    q, k, v, w = (t.double() for t in (q, k, v, w))
    a = k @ w.mT - k.square().sum(-1, keepdim=True) / 2
    if weights is not None:
        a = a + weights.double().log().unsqueeze(-1)
    exponents = (q @ w.mT).unsqueeze(-2) + a.unsqueeze(-3)
    later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1).unsqueeze(-1)
    logs = exponents.masked_fill(later, -math.inf).logsumexp(-1)
    total = logs.logsumexp(-1, keepdim=True)
    if eps > 0:
        total = torch.logaddexp(total, q.square().sum(-1, keepdim=True) / 2 + math.log(w.shape[-2] * eps))
    return (logs - total).exp() @ v


# ---- performer-pytorch


def softmax_features(x, w, kernel_eps, axes):
    """FAVOR+ features of the kernel exp(q k / sqrt(E)) with a maximum over ``axes``: (..., L, E) -> (..., L, m)."""
    x = x * x.shape[-1] ** -0.25
    along = x @ w.mT
    return torch.exp(along - x.square().sum(-1, keepdim=True) / 2 - along.amax(axes, keepdim=True)) + kernel_eps


def fast_attention(q, k, v, w, *, causal=False, kernel_eps=0.0, eps=0.0):
    """What ``FastAttention`` computes, with its constants in features and denominator; all pairs of tokens at once."""
    qp, kp = softmax_features(q, w, kernel_eps, -1), softmax_features(k, w, kernel_eps, (-1, -2))
    weights = qp @ kp.mT
    weights = weights.tril() if causal else weights
    # its features have a factor 1 / sqrt(m), and eps is added to each sum of a key's features
    return weights @ v / (weights.sum(-1, keepdim=True) + eps * w.shape[0] ** 0.5 * qp.sum(-1, keepdim=True))


@pytest.mark.parametrize("causal", [False, True], ids=["all keys", "causal"])
@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_equals_fast_attention_in_float64(backend, causal):
    """Forward and every gradient, on the same features, without the constants."""
    tensors = problem(2, 3, 150, 16, m=11, v_width=10, norm=4.0)
    expected = with_gradients(lambda *t: fast_attention(*t, causal=causal), *tensors)
    found = with_gradients(
        lambda *t: performer_attention(*t, 0.0, causal=causal, normalize=True, backend=backend), *tensors
    )
    assert_equal_up_to_rounding(found, expected)


@pytest.mark.parametrize("causal", [False, True], ids=["all keys", "causal"])
def test_equals_the_package_performer_pytorch(causal):
    package = pytest.importorskip("performer_pytorch.performer_pytorch")
    q, k, v, w = problem(2, 3, 150, 16, m=11, norm=4.0)

    def theirs(q, k, v):
        kernel = dict(projection_matrix=w, eps=0.0)
        q = package.softmax_kernel(q, is_query=True, **kernel)
        k = package.softmax_kernel(k, is_query=False, **kernel)
        return (
            package.causal_linear_attention_noncuda(q, k, v, eps=0.0) if causal else package.linear_attention(q, k, v)
        )

    def ours(q, k, v):
        return performer_attention(q, k, v, w, 0.0, causal=causal, normalize=True)

    assert_equal_up_to_rounding(with_gradients(ours, q, k, v), with_gradients(theirs, q, k, v))

    module = package.FastAttention(16, nb_features=11, causal=causal).double()
    module.projection_matrix.copy_(w)
    module.causal_linear_fn = package.causal_linear_attention_noncuda
    whole = module(q, k, v)
    # as docs/performer.md says: its module adds 1e-4 to each feature (and 1e-6 to each causal sum of them)
    assert 1e-3 < errors(ours(q, k, v), whole)[0] < 0.1
    constants = {"kernel_eps": 1e-4, "eps": 1e-6 if causal else 0.0}
    assert errors(fast_attention(q, k, v, w, causal=causal, **constants), whole)[0] < 1e-12


# ---- causal


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
def test_each_query_attends_to_its_own_and_earlier_keys(length):
    """Query by query equal to attention over the keys so far."""
    q, k, v, w = problem(2, length, 16, v_width=5)
    for eps in (0.0, 1e-2):
        y = performer_attention(q, k, v, w, eps, causal=True)
        for t in (0, length // 2, length - 1):
            alone = performer_attention(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], w, eps, backend="reference")
            torch.testing.assert_close(y[:, t : t + 1], alone, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize("norm", [0.0, 2.0, 6.0, 8.0, 100.0, 1000.0])
def test_causal_is_finite_and_exact_at_any_norm(norm, eps, dtype):
    """Where the definition overflows or divides 0 by 0; errors are relative to v."""
    q, k, v, w = (t.requires_grad_() for t in problem(2, 150, 64, m=32, norm=norm, dtype=dtype))
    y = performer_attention(q, k, v, w, eps, causal=True)
    gradients = torch.autograd.grad(y, (q, k, v, w), torch.ones_like(y))
    assert all(t.isfinite().all() for t in (y, *gradients))
    error = (y.double() - exact(q, k, v, w, eps)).norm() / v.double().norm()
    # at norm 1000 the exponents are 5e5, and their rounding in float32 is 0.03
    allowed = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    assert error <= max(allowed, 1e-9 * norm**2 * (norm > 10) * 10)


@pytest.mark.parametrize("order", [1, -1], ids=["rising", "falling"])
@pytest.mark.parametrize("length", [8, 64, 130])
def test_keys_of_very_different_norms(length, order):
    """Exponents of -5000 to 0: a shift by a maximum over the chunk would leave the first queries 0 / 0."""
    q, k, v, w = problem(1, length, 16, norm=1.0)
    k = k * torch.linspace(0.0, 100.0, length, dtype=k.dtype).flip(0 if order > 0 else ()).unsqueeze(-1)
    single = [t.float() for t in (q, k, v, w)]
    found = with_gradients(lambda *t: performer_attention(*t, 0.0, causal=True), *single)
    expected = with_gradients(lambda *t: exact(*t), *single)
    assert errors(found[0], expected[0])[0] < 2e-3  # the rounding of exponents around 5000 in float32
    wide = with_gradients(lambda *t: performer_attention(*t, 0.0, causal=True), q, k, v, w)
    for value, wanted in zip(wide, with_gradients(lambda *t: exact(*t), q, k, v, w), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-8, atol=1e-10)  # some gradients are as small as 1e-66


@pytest.mark.parametrize("change", [100.0, math.nan, math.inf])
def test_later_tokens_change_no_bit(change):
    q, k, v, w = problem(2, 3, 150, 16, dtype=torch.float32)
    y = performer_attention(q, k, v, w, causal=True)
    for t in (1, 63, 64, 100, 149):
        others = [x.clone() for x in (q, k, v)]
        for x in others:
            x[..., t:, :] = change
        assert torch.equal(performer_attention(*others, w, causal=True)[..., :t, :], y[..., :t, :])


def test_gradients_of_later_tokens_are_zero():
    q, k, v, w = (t.requires_grad_() for t in problem(1, 100, 8))
    y = performer_attention(q, k, v, w, causal=True)
    for gradient in torch.autograd.grad(y[:, :70].sum(), (q, k, v)):
        assert gradient[:, :70].any()
        assert not gradient[:, 70:].any()


class Sizes(TorchDispatchMode):
    """The number of values of each tensor that an operation returned."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.found.update(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        return out


def test_memory_of_causal_attention_is_linear():
    """Forward and backward hold no (L, L) and no (L, m, E): nothing larger than a few tensors of (L, E)."""
    length, m, width = 2048, 16, 16
    leaves = [t.requires_grad_() for t in problem(1, length, width, m=m, dtype=torch.float32)]
    with Sizes() as sizes:
        performer_attention(*leaves, causal=True).sum().backward()
    assert max(sizes.found) <= 2 * length * (width + 1)


# ---- weights of keys


@pytest.mark.parametrize("causal", [False, True], ids=["all keys", "causal"])
@pytest.mark.parametrize("shape", [(2, 90, 16), (2, 3, 90, 16)], ids=["3-D", "heads"])
def test_a_weight_counts_a_key_so_often(shape, causal):
    """Weights 0, 1, 2 equal a sequence where keys are left out or repeated (checked at the last query)."""
    q, k, v, w = problem(*shape)
    counts = torch.arange(90) % 3
    weights = counts.to(q.dtype).expand(2, 90)
    y = performer_attention(q, k, v, w, key_mask=weights, causal=causal)
    repeated = (x.repeat_interleave(counts, dim=-2) for x in (k, v))
    expected = performer_attention(q[..., -1:, :], *repeated, w)
    torch.testing.assert_close(y[..., -1:, :], expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("causal", [False, True], ids=["all keys", "causal"])
def test_weights_of_0_and_1_equal_a_bool_mask(causal):
    q, k, v, w = problem(2, 3, 90, 16, dtype=torch.float32)
    keep = torch.rand(2, 3, 90, generator=torch.Generator().manual_seed(3)) < 0.6
    expected = with_gradients(
        lambda *t: performer_attention(*t, key_mask=keep, causal=causal, backend="aten"), q, k, v, w
    )
    found = with_gradients(
        lambda *t: performer_attention(*t, key_mask=keep.float(), causal=causal, backend="aten"), q, k, v, w
    )
    assert all(map(torch.equal, found, expected))


def test_a_common_factor_of_the_weights_only_opens_the_gate():
    q, k, v, w = problem(2, 50, 16, norm=6.0)
    half = torch.full((2, 50), 0.5, dtype=q.dtype)
    y = performer_attention(q, k, v, w, 1e-8, key_mask=half)
    torch.testing.assert_close(y, performer_attention(q, k, v, w, 2e-8), rtol=1e-11, atol=1e-13)
    additive = normal(2, 50, seed=5)
    y = performer_attention(q, k, v, w, 0.0, key_mask=additive.exp())
    torch.testing.assert_close(y, performer_attention(q, k, v, w, 0.0, key_mask=(additive + 3).exp()))


@pytest.mark.parametrize("causal", [False, True], ids=["all keys", "causal"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_key_of_weight_0_is_ignored(dtype, causal):
    """Whatever its values; its gradients and that of its weight are exactly 0."""
    q, k, v, w = problem(2, 80, 16, dtype=dtype)
    weights = torch.rand(2, 80, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weights = torch.where(weights < 0.4, 0.0, weights).to(torch.float32 if dtype == torch.bfloat16 else dtype)
    dropped = (weights == 0).unsqueeze(-1).expand_as(k)

    def run(k, v):
        return with_gradients(lambda *t: performer_attention(*t[:4], key_mask=t[4], causal=causal), q, k, v, w, weights)

    clean = run(k, v)
    for rubbish in (math.nan, math.inf):
        spoilt = run(k.masked_fill(dropped, rubbish), v.masked_fill(dropped, rubbish))
        assert all(map(torch.equal, spoilt, clean))
    assert not clean[2][dropped].any() and not clean[3][dropped].any() and not clean[5][weights == 0].any()
    assert clean[5].dtype == weights.dtype and clean[5][weights > 0].all()


@pytest.mark.parametrize("causal", [False, True], ids=["all keys", "causal"])
def test_bad_weights_are_not_hidden(causal):
    """A negative or NaN weight gives NaN in its sample and in no other one."""
    q, k, v, w = problem(3, 20, 16, dtype=torch.float32)
    good = torch.ones(3, 20)
    expected = performer_attention(q, k, v, w, key_mask=good, causal=causal)
    for bad in (-1.0, math.nan):
        weights = good.clone()
        weights[1, 0] = bad
        y = performer_attention(q, k, v, w, key_mask=weights, causal=causal)
        assert y[1].isnan().all()
        assert torch.equal(y[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize("kind", ["bool", "weights"])
@pytest.mark.parametrize("causal", [False, True], ids=["all keys", "causal"])
def test_queries_without_keys_give_zero(causal, kind, eps):
    """A sample without keys, and causal queries before the first key; all gradients are finite."""
    q, k, v, w = problem(2, 3, 150, 16, heads=3, dtype=torch.float32)
    keep = torch.ones(2, 150, dtype=torch.bool)
    keep[0], keep[1, :70] = False, False
    weights = keep if kind == "bool" else keep.float()
    y, *gradients = with_gradients(
        lambda *t: performer_attention(*t, eps, key_mask=weights, causal=causal, normalize=True), q, k, v, w
    )
    assert all(t.isfinite().all() for t in (y, *gradients))
    assert not any(t[0].any() for t in (y, *gradients[:3]))
    assert y[1, :, 70:].any()
    if causal:
        assert not y[1, :, :70].any() and not gradients[0][1, :, :70].any()


# ---- features per head, width of v, normalize


@pytest.mark.parametrize("causal", [False, True], ids=["all keys", "causal"])
def test_features_mask_and_values_of_each_head(causal):
    """Heads with their own features and masks equal separate calls; v may be wider or narrower."""
    for v_width in (1, 24):
        q, k, v, w = problem(2, 3, 70, 16, v_width=v_width, heads=3)
        keep = torch.rand(2, 3, 70, generator=torch.Generator().manual_seed(3)) < 0.6
        keep[..., 0] = True
        y = performer_attention(q, k, v, w, key_mask=keep, causal=causal)
        assert y.shape == (2, 3, 70, v_width)
        for head in range(3):
            alone = performer_attention(
                q[:, head], k[:, head], v[:, head], w[head], key_mask=keep[:, head], causal=causal, backend="reference"
            )
            torch.testing.assert_close(y[:, head], alone, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_normalize_scales_q_and_k_without_rounding_them(dtype):
    q, k, v, w = problem(2, 30, 10, dtype=dtype)
    y = performer_attention(q, k, v, w, normalize=True)
    wide = [t.double() for t in (q, k, v, w)]
    expected = performer_attention(wide[0] / 10**0.25, wide[1] / 10**0.25, *wide[2:])
    assert y.dtype == dtype
    assert errors(y, expected)[0] <= {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 4 * torch.finfo(dtype).eps)


OPTIONS = [
    {"causal": True},
    {"causal": True, "eps": 0.0, "normalize": True},
    {"causal": True, "mask": "weights", "own": True},
    {"causal": True, "mask": "dropped", "eps": 0.0},
    {"mask": "weights", "own": True, "normalize": True},
    {"mask": "head weights", "eps": 0.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ", ".join(map(str, options.values())))
def test_gradcheck(options, monkeypatch):
    """Finite differences for q, k, v, w and weights, over several chunks."""
    monkeypatch.setattr(pairs, "CHUNK", 2)
    options = dict(options)
    own, mask, key_mask = options.pop("own", False), options.pop("mask", None), None
    q, k, v, w = problem(2, 2, 5, 4, m=3, v_width=3, heads=2 if own else None)
    inputs = [q, k, v, w]
    if mask == "dropped":
        key_mask = torch.tensor([[False, False, True, False, True], [False] * 5])
    elif mask is not None:
        inputs.append(normal(*((2, 2, 5) if "head" in mask else (2, 5)), seed=4).abs() + 0.1)

    def run(q, k, v, w, key_mask=key_mask):
        return performer_attention(q, k, v, w, key_mask=key_mask, backend="aten", **{"eps": 0.05, **options})

    torch.autograd.gradcheck(run, [t.requires_grad_() for t in inputs])


# ---- PyTorch's machinery


REFUSALS = {
    "causal": ({"causal": True}, "no causal attention in the {} kernels"),
    "normalize": ({"normalize": True}, "no normalization of q and k in the {} kernels"),
    "weights": ({"key_mask": torch.ones(2, 20)}, "no weights of keys in the {} kernels"),
    "mask per head": ({"key_mask": torch.ones(2, 3, 20) > 0}, "no key mask per head in the {} kernels"),
    "features per head": ({"heads": 3}, "no random features per head in the {} kernels"),
    "narrow v": ({"v_width": 4}, "the {} kernels need v as wide as k, got 4 and 16"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_compiled_kernels_say_what_they_cannot_do(name, monkeypatch):
    options, text = REFUSALS[name]
    options = dict(options)
    q, k, v, w = problem(
        2, 3, 20, 16, heads=options.pop("heads", None), v_width=options.pop("v_width", None), dtype=torch.float32
    )
    reason = text.format("native") if options.get("key_mask") is None else "no key mask in the native kernels"
    with pytest.raises(BackendUnavailable, match=f"native: {reason}"):
        performer_attention(q, k, v, w, **options, backend="native")
    from t2t_fast.ops.performer_attention.triton import support

    monkeypatch.setattr(support.runtime, "reason", lambda request: None)
    with pytest.raises(BackendUnavailable, match=f"triton: {text.format('Triton')}"):
        performer_attention(q, k, v, w, **options, backend="triton")
    assert torch.equal(
        performer_attention(q, k, v, w, **options), performer_attention(q, k, v, w, **options, backend="aten")
    )


def test_explain_names_the_options():
    for name in ("causal", "normalize", "weighted", "head_mask", "head_features"):
        assert explain("performer_attention", device="cpu", **{name: True}).chosen("performer_attention") == "aten"
    assert explain("performer_attention", device="cpu", width=16, v_width=8).chosen("performer_attention") == "aten"


class Attend(torch.nn.Module):
    def forward(self, q, k, v, w, key_mask):
        return performer_attention(q, k, v, w, key_mask=key_mask, causal=True, normalize=True)


@pytest.mark.parametrize("length", [6, pytest.param(70, marks=pytest.mark.slow)])
def test_torch_compile(length):
    """One graph, forward and backward."""
    compiled = torch.compile(Attend(), fullgraph=True, backend="aot_eager")
    tensors = (*problem(2, 3, length, 16, v_width=5, heads=3), normal(2, 3, length, seed=4).abs())
    assert_equal_up_to_rounding(with_gradients(compiled, *tensors), with_gradients(Attend(), *tensors))


@pytest.mark.parametrize("length", [6, pytest.param(70, marks=pytest.mark.slow)])
def test_torch_export(length):
    """The batch is free; the number of tokens is that of the example."""
    tensors = (*problem(2, length, 16), normal(2, length, seed=4).abs())
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(Attend(), tensors, dynamic_shapes=(batch, batch, batch, None, batch))
    q, k, v, w, weights = tensors
    more = *(torch.cat([t, t]) for t in (q, k, v)), w, torch.cat([weights, weights])
    torch.testing.assert_close(program.module()(*more), Attend()(*more))


def test_transformations_use_the_reference():
    """vmap, grad and jvp of torch.func over all options."""
    q, k, v, w = problem(2, 3, 20, 16, v_width=5, heads=3)
    weights = normal(2, 3, 20, seed=4).abs() + 0.1
    attend = Attend()
    each = torch.func.vmap(lambda *t: attend(*(x.unsqueeze(0) for x in t[:3]), w, t[3].unsqueeze(0)).squeeze(0))
    torch.testing.assert_close(each(q, k, v, weights), attend(q, k, v, w, weights))
    gradient = torch.func.grad(lambda weights: attend(q, k, v, w, weights).square().sum())(weights)
    leaf = weights.clone().requires_grad_()
    (expected,) = torch.autograd.grad(attend(q, k, v, w, leaf).square().sum(), leaf)
    torch.testing.assert_close(gradient, expected)
    _, tangent = torch.func.jvp(lambda weights: attend(q, k, v, w, weights), (weights,), (torch.ones_like(weights),))
    assert tangent.isfinite().all()


def test_no_second_derivative():
    q, k, v, w = problem(1, 20, 8)
    q.requires_grad_()
    y = performer_attention(q, k, v, w, causal=True)
    with pytest.raises(RuntimeError, match=r"no second derivative .* use t2t_fast.backend\('reference'\)"):
        torch.autograd.grad(y.square().sum(), q, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    """q, k and v are cast to autocast's dtype, features and weights are not."""
    q, k, v, w = problem(2, 3, 70, 16, heads=3, dtype=torch.float32)
    weights = normal(2, 3, 70, seed=4, dtype=torch.float32).abs()
    with torch.autocast("cpu", dtype):
        y = performer_attention(q, k, v, w, key_mask=weights, causal=True)
    rounded = (t.to(dtype) for t in (q, k, v))
    assert y.dtype == dtype and torch.equal(y, performer_attention(*rounded, w, key_mask=weights, causal=True))


def test_empty_batch():
    q, k, v, w = problem(0, 70, 16)
    found = with_gradients(lambda *t: performer_attention(*t, causal=True), q, k, v, w)
    assert found[0].shape == (0, 70, 16) and not found[4].any()


@pytest.mark.parametrize("gradient", [True, False], ids=["training", "inference"])
def test_meta_tensors(gradient):
    """The fake form gives shape and dtype."""
    tensors = [
        t.to("meta").requires_grad_(gradient) for t in problem(2, 3, 70, 16, v_width=5, heads=3, dtype=torch.half)
    ]
    y = performer_attention(*tensors, key_mask=torch.ones(2, 3, 70, device="meta"), causal=True, normalize=True)
    assert y.shape == (2, 3, 70, 5) and y.dtype == torch.half and y.is_meta
    if gradient:
        gradients = torch.autograd.grad(y.sum(), tensors)
        assert [g.shape for g in gradients] == [t.shape for t in tensors]

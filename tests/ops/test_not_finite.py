"""NaN, infinity and vanishing features affect the same values as in the reference, and no others."""

from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F

from support.calls import skip_unless_available, with_gradients
from t2t_fast.functional import (
    fused_fold_unfold,
    performer_attention,
    performer_layer,
    soft_composition,
    soft_split,
    soft_split_linear,
    token_mlp,
    transformer_block,
)
from t2t_fast.ops.performer_attention.triton.launch import TABLE as ATTENTION
from t2t_fast.testing import errors, features, token_mlp_parameters, tolerance, transformer_block_parameters

# from NumPy, which Triton's interpreter uses
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in reduce:RuntimeWarning")

FUSED = ["aten", "native", "triton"]
NAN, INF = float("nan"), float("inf")


def assert_as(found, expected, op, dtype, label=""):
    """Non-finite at the same positions, and within the tolerance elsewhere."""
    for name, value in found.items():
        exact = expected[name]
        finite = exact.isfinite()
        assert torch.equal(value.isfinite(), finite), f"{label} {name}: {(value.isfinite() != finite).sum()} differ"
        kept, wanted = value.where(finite, 0.0), exact.where(finite, 0.0)
        allowed = tolerance(op, "forward" if name == "out" else "backward", dtype)
        assert errors(kept, wanted)[0] <= allowed, f"{label} {name}"


# ---- keys whose features are all 0, since |k|^2 overflows or nearly does

VANISHING = {"overflow": 1e20, "almost": 1.5e19, "beyond NOTHING": 3e15, "long": 1e6}


def attention_problem(batch=3, length=40):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, batch, length, 16, generator=generator)
    return {"q": q, "k": k, "v": v, "w": features(generator, 8, 16)}


def check_attention(tensors, backend, dtype, mask=None):
    skip_unless_available("performer_attention", backend, dtype, masked=mask is not None)
    tensors = {name: t.to(dtype) for name, t in tensors.items()}

    def run(tensors, backend):
        return with_gradients(lambda **t: performer_attention(**t, key_mask=mask, backend=backend), tensors)

    exact = run({name: t.double() for name, t in tensors.items()}, "reference")
    found = run(tensors, backend)
    assert all(t.isfinite().all() for t in exact.values())
    assert_as(found, exact, "performer_attention", dtype)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("length", VANISHING.values(), ids=VANISHING)
def test_all_keys_vanish(length, backend, dtype):
    """0 / (0 + eps) and every gradient are 0."""
    tensors = attention_problem()
    tensors["k"].fill_(length)
    found = check_attention(tensors, backend, dtype)
    assert all((t == 0).all() for t in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", FUSED)
def test_the_keys_of_one_sample_and_some_of_another_vanish(backend, dtype):
    tensors = attention_problem()
    tensors["k"][1] = 1e20
    tensors["k"][2, ::2] = 1e20
    tensors["k"][2, 1:9] = 1.5e19
    found = check_attention(tensors, backend, dtype)
    assert (found["out"][1] == 0).all() and (found["k"][2, ::2] == 0).all()


@pytest.mark.parametrize("backend", FUSED)
def test_the_keys_of_one_part_vanish(backend):
    """All keys of one worker or program, then all keys of the sequence."""
    tensors = attention_problem(batch=1, length=300)
    tensors["k"][:, :160] = 1e20
    check_attention(tensors, backend, torch.float32)
    tensors["k"].fill_(1e20)
    assert (check_attention(tensors, backend, torch.float32)["out"] == 0).all()


def test_keys_vanish_where_features_come_in_chunks():
    skip_unless_available("performer_attention", "triton")
    tensors = attention_problem()
    tensors["w"] = features(torch.Generator().manual_seed(0), 20, 16)
    tensors["k"][1] = 1e20
    parameters = {"tokens": 16, "warps": 4, "stages": 1, "programs": 8, "features": 16}
    with ExitStack() as stack:
        for name in ATTENTION.passes:
            stack.enter_context(ATTENTION.override(name, parameters))
        found = check_attention(tensors, "triton", torch.float32)
    assert (found["out"][1] == 0).all()


@pytest.mark.parametrize("backend", FUSED)
def test_some_features_of_all_keys_vanish(backend):
    tensors = attention_problem()
    tensors["q"], tensors["k"] = tensors["q"].abs(), tensors["k"].abs() + 0.1
    tensors["w"][0], tensors["w"][3] = -1e36, -1e30
    check_attention(tensors, backend, torch.float32)


@pytest.mark.parametrize("backend", ["aten", "triton"])
def test_mask_with_vanishing_keys(backend):
    tensors = attention_problem()
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[0, :20] = mask[1] = False
    tensors["k"][0, 20:] = 1e20
    tensors["k"][2, :30] = 1e20
    check_attention(tensors, backend, torch.float32, mask)


@pytest.mark.parametrize("backend", FUSED)
def test_vanishing_queries(backend):
    tensors = attention_problem()
    tensors["q"][1] = 1e20
    tensors["q"][0, :7] = 1e16
    check_attention(tensors, backend, torch.float32)


@pytest.mark.parametrize("backend", FUSED)
def test_the_keys_of_a_layer_vanish(backend):
    """Without LayerNorm the keys are so long that all their features are 0."""
    skip_unless_available("performer_layer", backend)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "x": torch.randn(2, 16, 7, 6, generator=generator),
        "kqv_weight": torch.randn(48, 144, generator=generator) / 12,
        "w": features(generator, 8, 16),
        **token_mlp_parameters(generator, 16, norm="norm2"),
    }
    tensors["kqv_weight"][:16] *= 1e20

    def run(tensors, backend):
        return with_gradients(
            lambda **t: performer_layer(**t, kqv_bias=None, kernel_size=3, stride=2, padding=1, backend=backend),
            tensors,
        )

    exact, found = run({n: t.double() for n, t in tensors.items()}, "reference"), run(tensors, backend)
    assert_as(found, exact, "performer_layer", torch.float32)


# ---- pixels that no window covers, or only some windows

WINDOWS = {
    "cells, a border": dict(channels=3, size=(18, 17), kernel_size=7, stride=4, padding=2),
    "cells, gaps": dict(channels=1, size=(11, 14), kernel_size=3, stride=4, padding=1),
    "tokens, gaps": dict(channels=16, size=(13, 12), kernel_size=2, stride=3, padding=0),
    "tokens, a border": dict(channels=16, size=(8, 10), kernel_size=3, stride=2, padding=0),
    "gathered, gaps": dict(channels=5, size=(11, 10), kernel_size=2, stride=3, padding=0),
    "gathered, a border": dict(channels=3, size=(16, 17), kernel_size=5, stride=3, padding=0),
}


def window_problem(name, normed, dtype):
    kind = dict(WINDOWS[name])
    channels, size = kind.pop("channels"), kind.pop("size")
    generator = torch.Generator().manual_seed(0)
    columns = channels * kind["kernel_size"] ** 2
    tensors = {
        "x": torch.randn(2, channels, *size, generator=generator),
        "weight": torch.randn(20, columns, generator=generator) / columns**0.5,
        "bias": torch.randn(20, generator=generator),
    }
    if normed:
        tensors["norm_weight"] = 1 + 0.1 * torch.randn(columns, generator=generator)
        tensors["norm_bias"] = 0.1 * torch.randn(columns, generator=generator)
        kind["norm_eps"] = 1e-5
    return {n: t.to(dtype) for n, t in tensors.items()}, kind


def covered(size, kernel_size, stride, padding, norm_eps=None):
    """Mask (1, 1, H, W) of the pixels that some window covers."""
    window = dict(kernel_size=kernel_size, stride=stride, padding=padding)
    return F.fold(F.unfold(torch.ones(1, 1, *size), **window), size, **window) > 0


HALF_TOO = [
    (name, dtype)
    for name in WINDOWS
    for dtype in (torch.float32, torch.float16)
    if "cells" in name or dtype.itemsize == 4
]


@pytest.mark.parametrize("normed", [True, False], ids=["LayerNorm", "Linear"])
@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(("name", "dtype"), HALF_TOO)
def test_pixels_that_no_window_covers(name, dtype, backend, normed):
    """They affect no output, and their gradient is exactly 0."""
    skip_unless_available("soft_split_linear", backend, dtype)
    tensors, window = window_problem(name, normed, dtype)
    there = covered(tensors["x"].shape[2:], **window).expand_as(tensors["x"])
    assert not there.all()

    def run(tensors, backend):
        return with_gradients(lambda **t: soft_split_linear(**t, **window, backend=backend), tensors)

    expected = run({n: t.double() for n, t in tensors.items()}, "reference")
    tensors["x"] = tensors["x"].where(there, NAN)
    found = run(tensors, backend)
    assert_as(found, expected, "soft_split_linear", dtype)
    assert (found["x"][~there] == 0).all()


@pytest.mark.parametrize(("normed", "value"), [(True, NAN), (True, INF), (False, NAN)])
@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(("name", "dtype"), HALF_TOO)
def test_a_pixel_reaches_the_windows_that_cover_it(name, dtype, backend, normed, value):
    """It does not affect neighbouring windows, even where Triton reads it with them; there is one exception."""
    skip_unless_available("soft_split_linear", backend, dtype)
    tensors, window = window_problem(name, normed, dtype)
    tensors["x"][0, 0, 7, 7] = tensors["x"][1, -1, 1, 3] = value

    def run(tensors, backend):
        return with_gradients(lambda **t: soft_split_linear(**t, **window, backend=backend), tensors)

    expected = run({n: t.double() for n, t in tensors.items()}, "reference")
    assert expected["out"].isfinite().any()
    found = run(tensors, backend)
    if backend == "triton" and normed and dtype == torch.float16 and name.startswith("cells"):
        # the products of half-precision images read whole cells, which include pixels outside the window
        assert not found["out"][~expected["out"].isfinite()].isfinite().any()
        assert found["out"].isfinite().any()
    else:
        assert_as(found, expected, "soft_split_linear", dtype)


@pytest.mark.parametrize("backend", FUSED)
def test_pixels_that_no_window_of_a_layer_covers(backend):
    skip_unless_available("performer_layer", backend)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "x": torch.randn(1, 3, 13, 14, generator=generator),
        "kqv_weight": torch.randn(48, 147, generator=generator) / 12,
        "w": features(generator, 8, 16),
        **token_mlp_parameters(generator, 16, norm="norm2"),
    }
    window = dict(kernel_size=7, stride=4, padding=0)
    there = covered((13, 14), **window).expand_as(tensors["x"])

    def run(tensors, backend):
        return with_gradients(lambda **t: performer_layer(**t, kqv_bias=None, **window, backend=backend), tensors)

    expected = run({n: t.double() for n, t in tensors.items()}, "reference")
    tensors["x"] = tensors["x"].where(there, NAN)
    found = run(tensors, backend)
    assert_as(found, expected, "performer_layer", torch.float32)
    assert (found["x"][~there] == 0).all()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backend", ["aten", "native"])
@pytest.mark.parametrize("name", list(WINDOWS))
def test_split_and_composition_ignore_uncovered_pixels(name, backend, channels_last):
    """The value of an uncovered pixel, or its upstream gradient, affects nothing."""
    tensors, window = window_problem(name, False, torch.float32)
    x = tensors["x"]
    size = x.shape[2:]
    there = covered(size, **window).expand_as(x)
    order = torch.channels_last if channels_last else torch.contiguous_format
    for op in ("soft_split", "soft_composition", "fused_fold_unfold"):
        skip_unless_available(op, backend)
    holes = x.where(there, NAN).contiguous(memory_format=order).requires_grad_()
    tokens = soft_split(holes, **window, backend=backend)
    assert torch.equal(tokens, soft_split(x, **window, backend="reference"))
    (gradient,) = torch.autograd.grad(tokens.square().sum(), holes)
    assert gradient.isfinite().all() and (gradient[~there] == 0).all()
    leaf = tokens.detach().requires_grad_()
    image = soft_composition(leaf, size, **window, backend=backend)
    assert (image[~there] == 0).all()
    (gradient,) = torch.autograd.grad(image, leaf, holes.detach())
    assert gradient.isfinite().all()
    assert fused_fold_unfold(leaf, size, **window, backend=backend).isfinite().all()


# ---- NaN and infinity under dropout, which multiplies by 0 instead of selecting


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float32, NAN), (torch.float32, INF), (torch.float16, NAN), (torch.bfloat16, NAN)]
)
@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("where", ["proj_weight", "fc2_weight", "y", "v"])
def test_dropout_propagates_non_finite_values(where, backend, dtype, value):
    """A dropped non-finite value becomes NaN, in either of the two dropouts."""
    skip_unless_available("token_mlp", backend, dtype)
    generator = torch.Generator().manual_seed(0)
    y, v = torch.randn(2, 1, 60, 16, generator=generator)
    tensors = {name: t.to(dtype) for name, t in {"y": y, "v": v, **token_mlp_parameters(generator, 16)}.items()}
    tensors[where].view(-1)[5] = value
    drops = dict(proj_drop=0.4, mlp_drop=0.4, seed=torch.tensor(3))

    def run(tensors, backend):
        return with_gradients(lambda **t: token_mlp(**t, **drops, backend=backend), tensors)

    expected = run({n: t.double() for n, t in tensors.items()}, "reference")
    found = run(tensors, backend)
    assert not expected["out"].isfinite().all()
    for name, each in found.items():
        assert torch.equal(each.isfinite(), expected[name].isfinite()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", FUSED)
def test_dropout_propagates_nan_gradients(backend, dtype):
    """NaN in the upstream gradient of values that the dropouts drop or keep."""
    skip_unless_available("token_mlp", backend, dtype)
    generator = torch.Generator().manual_seed(0)
    y, v = torch.randn(2, 1, 60, 16, generator=generator)
    tensors = {name: t.to(dtype) for name, t in {"y": y, "v": v, **token_mlp_parameters(generator, 16)}.items()}
    upstream = torch.randn(1, 60, 16, generator=generator).to(dtype)
    upstream[0, torch.arange(0, 60, 3), torch.arange(0, 60, 3) % 16] = NAN
    drops = dict(proj_drop=0.4, mlp_drop=0.4, seed=torch.tensor(3))

    def run(tensors, backend):
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        out = token_mlp(**leaves, **drops, backend=backend)
        found = torch.autograd.grad(out, list(leaves.values()), upstream.to(out.dtype))
        return dict(zip(leaves, found, strict=True))

    expected = run({n: t.double() for n, t in tensors.items()}, "reference")
    for name, each in run(tensors, backend).items():
        assert torch.equal(each.isfinite(), expected[name].isfinite()), name


# ---- transformer blocks


def block_problem(length=300):
    """More keys than one part of the native kernel."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, length, 24, generator=generator)
    return {"x": x, **transformer_block_parameters(generator, 24, 40)}


def check_block(tensors, backend, dtype, upstream=None):
    """Non-finite where the reference in float64 is."""
    skip_unless_available("transformer_block", backend, dtype)
    tensors = {name: t.to(dtype) for name, t in tensors.items()}

    def run(tensors, backend):
        def call(**t):
            out = transformer_block(**t, heads=2, backend=backend)
            return out if upstream is None else out * upstream.to(out)

        return with_gradients(call, tensors)

    exact, found = run({n: t.double() for n, t in tensors.items()}, "reference"), run(tensors, backend)
    assert_as(found, exact, "transformer_block", dtype)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("token", "value"), [(0, NAN), (299, INF)])
@pytest.mark.parametrize("backend", ["aten", "native"])
def test_a_token_reaches_its_sample_only(backend, token, value, dtype):
    tensors = block_problem()
    tensors["x"][1, token, 3] = value
    found = check_block(tensors, backend, dtype)
    assert found["out"][1].isnan().all() and found["out"][[0, 2]].isfinite().all()
    assert found["x"][[0, 2]].isfinite().all()


@pytest.mark.parametrize("name", ["qkv_weight", "proj_bias", "norm2_weight", "fc1_weight", "fc2_bias"])
@pytest.mark.parametrize("backend", ["aten", "native"])
def test_a_parameter_that_is_not_finite(backend, name):
    if backend == "aten" and name == "qkv_weight":
        pytest.skip("PyTorch's attention on a CPU returns 0 for a query that is NaN")
    tensors = block_problem(length=9)
    tensors[name].view(-1)[5] = NAN
    skip_unless_available("transformer_block", backend)
    out = transformer_block(**tensors, heads=2, backend=backend)
    expected = transformer_block(**tensors, heads=2, backend="reference")
    assert torch.equal(out.isfinite(), expected.isfinite()) and not out.isfinite().all()


@pytest.mark.parametrize("backend", ["aten", "native"])
def test_a_gradient_that_is_not_finite_stays_in_its_sample(backend):
    upstream = torch.ones(3, 300, 24)
    upstream[2, 7, 1] = NAN
    found = check_block(block_problem(), backend, torch.float32, upstream)
    assert found["x"][:2].isfinite().all() and found["x"][2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("backend", ["aten", "native"])
def test_long_queries_and_keys(backend, sign, dtype):
    """Logits of 1e4 and more: a softmax of one key, whose maximum may be in any part of the keys."""
    tensors = block_problem()
    tensors["qkv_weight"][:24] *= 300 * sign
    tensors["qkv_weight"][24:48] *= 300
    skip_unless_available("transformer_block", backend, dtype)
    tensors = {name: t.to(dtype) for name, t in tensors.items()}
    found = with_gradients(lambda **t: transformer_block(**t, heads=2, backend=backend), tensors)
    assert all(t.isfinite().all() for t in found.values())
    if dtype == torch.float32:
        exact = transformer_block(**{n: t.double() for n, t in tensors.items()}, heads=2, backend="reference")
        assert errors(found["out"], exact)[0] <= 1e-2  # the logits' rounding is 1e-3 where two keys are close

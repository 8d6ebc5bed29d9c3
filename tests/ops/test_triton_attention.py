"""The Triton kernels of Performer attention, interpreted: splits, chunks, masks, shifts and rounding."""

from contextlib import ExitStack

import pytest
import torch

from support.attention import case_of, check
from t2t_fast import backends
from t2t_fast.functional import performer_attention
from t2t_fast.ops._common import triton_runtime
from t2t_fast.ops._common.launch_table import cut
from t2t_fast.ops.performer_attention.triton.launch import TABLE
from t2t_fast.testing import CASES, DTYPES, Case, errors, exact_attention, tolerance

REASON = triton_runtime.reason(backends.Request("cpu", torch.float32, {}))
pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [pytest.mark.interpret, pytest.mark.skipif(REASON is not None, reason=f"triton: {REASON}")]


@pytest.fixture
def small_tiles():
    """Tiles of 16 tokens in many small splits, in every pass."""
    parameters = {"tokens": 16, "warps": 4, "stages": 2, "programs": 8}
    with (
        TABLE.override("keys", parameters),
        TABLE.override("queries", parameters),
        TABLE.override("queries_backward", parameters),
        TABLE.override("keys_backward", parameters),
    ):
        yield


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 97])
def test_tiles_and_splits(length, dtype):
    """Partial tiles, one split and several with a merge; output and gradients."""
    splits, tiles = cut(length, 1, 16, 32)
    assert (splits > 1) == (length > 16) and (splits - 1) * tiles * 16 < length <= splits * tiles * 16
    # one token attends to itself: the gradients of q, k and w are only significant with a half-open gate
    check(case_of(length, eps=0.1 if length == 1 else 1e-8), DTYPES[dtype])


@pytest.fixture
def chunks(small_tiles):
    """Small tiles, and features in chunks of 16, in every pass."""
    with ExitStack() as stack:
        for name in TABLE.passes:
            small = TABLE.chosen(name, "cpu", torch.float32, 16, 16)
            stack.enter_context(TABLE.override(name, {**small, "features": 16}))
        yield


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("length", "m"), [(1, 33), (97, 16), (97, 40), (70, 48)])
def test_features_in_chunks(length, m, dtype):
    """One chunk and several, a partial last chunk, more chunks than tiles and fewer; every gradient."""
    check(case_of(length, m=m, batch=2, eps=0.1 if length == 1 else 1e-8), DTYPES[dtype])


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_chunks_with_masks_with_and_without_gradient_of_w(dtype):
    """Without a gradient for w one program handles a split's keys; the results are bitwise equal."""
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[0, :20] = mask[0, 32:48] = mask[0, 64:] = False
    mask[1] = torch.arange(70) == 37
    case = case_of(70, m=40, batch=2, mask=mask)
    check(case, DTYPES[dtype])
    _, every = case.cast(DTYPES[dtype]).run_backward("triton")
    frozen = Case(case.op, case.name, case.tensors, case.options, ("q", "k", "v"))
    _, fewer = frozen.cast(DTYPES[dtype]).run_backward("triton")
    assert set(every) - set(fewer) == {"w"} and all(torch.equal(every[name], fewer[name]) for name in fewer)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("norm", [0.0, 10.0, 100.0])
def test_chunks_at_any_norm(norm, dtype):
    """The running maximum spans all chunks: a closed gate gives 0 instead of NaN."""
    check_at_norm(norm, DTYPES[dtype])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("queries", "keys"), [(3, 40), (40, 3)])
def test_different_numbers_of_queries_and_keys(queries, keys):
    check(case_of(queries, keys, batch=2), torch.float32)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_masks_that_empty_whole_splits(dtype):
    """The first tiles, a middle one and the last have no key; one sample keeps a single key."""
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[0, :20] = mask[0, 32:48] = mask[0, 64:] = False
    mask[1] = torch.arange(70) == 37
    check(case_of(70, batch=2, mask=mask), DTYPES[dtype])


WIDTHS = [(32, 16), (64, 64), (96, 40), (128, 128), (256, 16), (7, 100), (16, 300), (1, 1)]


@pytest.mark.parametrize(("width", "m"), WIDTHS)
def test_widths_and_features(width, m):
    """Sizes of the matrix instructions and sizes padded to them; with default chunks."""
    check(case_of(20, width=width, m=m, norm=1.0, eps=0.1), torch.float32)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("norm", [0.0, 1.0, 5.0, 10.0, 100.0])
def test_gradients_at_any_norm(norm, dtype):
    check_at_norm(norm, DTYPES[dtype])


def check_at_norm(norm, dtype):
    """Errors relative to the results without a gate, since a closed gate gives 0; upstream gives NaN in float16."""
    case = case_of(45, width=64, m=32, norm=norm).cast(dtype)
    out, gradients = case.run_backward("triton")
    wide = {name: t.double().requires_grad_() for name, t in case.tensors.items()}
    upstream = (
        torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype).double()
    )

    def exact(eps):
        y, _ = exact_attention(*wide.values(), eps)
        return y, dict(zip(wide, torch.autograd.grad(y, list(wide.values()), upstream), strict=True))

    (y, expected), (open_y, open_gradients) = exact(1e-8), exact(0.0)
    assert (out.double() - y).norm() <= tolerance(case.op, "forward", dtype) * open_y.norm()
    for name, gradient in gradients.items():
        scale = max(open_gradients[name].norm(), open_gradients["v"].norm())
        error = (gradient.double() - expected[name]).norm()
        assert error <= tolerance(case.op, "backward", dtype) * scale, name


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_a_shift_that_does_not_hold(dtype):
    """The first tile's keys are so long that later weights would overflow: the split is streamed again."""
    dtype = DTYPES[dtype]
    case = case_of(40, width=64, m=32)
    case.tensors["k"][:, :17] *= 10
    case = case.cast(dtype)
    q, k, v, w = (t.double() for t in case.tensors.values())
    exponents = k @ w.T - k.square().sum(-1, keepdim=True) / 2
    first, later = exponents[0, :16].amax(0), exponents[0, 16:].amax(0)
    assert ((later - first) > 90).any(), "the first tile's maximum must be hopeless, or nothing is tested"
    with TABLE.override("keys", {"tokens": 16, "warps": 4, "stages": 2, "programs": 0}):
        out = case.run("triton")
        check(case, dtype)
    exact, _ = exact_attention(q, k, v, w)
    assert errors(out, exact)[0] <= tolerance(case.op, "forward", dtype)


def test_weights_are_summed_as_rounded():
    """For values of 1 the output is the gate, here 1: the rounding of the weights and of their sum cancels exactly."""
    case = case_of(150, width=64, m=32).cast(torch.float16)
    case.tensors["v"].fill_(1)
    assert (case.run("triton") == 1).all()


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["T2T stage 3", "norm 4", "one token"])
def test_float32_in_three_tf32_products(name, dtype, matrix_units):
    """Within the table's tolerance: float32 from three TF32 products, float16's gradients from one."""
    case = next(case for case in CASES["performer_attention"]() if case.name == name)
    check(case, DTYPES[dtype], name)
    assert matrix_units == ({"tf32"} if dtype == "fp32" else {"float16", "tf32"})


@pytest.mark.parametrize("name", ["T2T stage 3", "norm 4"])
def test_tf32_where_torch_allows_it(name, matrix_units, monkeypatch):
    """Computed operands are rounded, not truncated: the error is within the analysis' 5e-3 and far above 1e-5."""
    monkeypatch.setattr(triton_runtime, "allows_tf32", lambda: True)
    case = next(case for case in CASES["performer_attention"]() if case.name == name)
    expected, expected_gradients = case.cast(torch.float64).run_backward("reference", torch.float32)
    out, gradients = case.run_backward("triton")
    found = [errors(out, expected)[0], *(errors(gradients[n], e)[0] for n, e in expected_gradients.items())]
    assert matrix_units == {"tf32"} and 1e-5 < max(found) <= 5e-3


def test_torch_decides_about_tf32():
    before = torch.get_float32_matmul_precision()
    try:
        for precision, allowed in (("highest", False), ("high", True)):
            torch.set_float32_matmul_precision(precision)
            assert triton_runtime.allows_tf32() == allowed
    finally:
        torch.set_float32_matmul_precision(before)


def test_features_in_float32_lose_nothing_in_half_precision():
    """Under autocast w stays float32 and is split into two parts: rounding it would cost far more at a large norm."""
    case = case_of(60, width=64, m=32, norm=20.0, eps=0.0)
    q, k, v = (case.tensors[name].half() for name in ("q", "k", "v"))
    w = case.tensors["w"]
    exact, _ = exact_attention(*(t.double() for t in (q, k, v, w)), 0.0)
    ours = errors(performer_attention(q, k, v, w, 0.0, backend="triton"), exact)[0]
    rounded, _ = exact_attention(*(t.double() for t in (q, k, v, w.half())), 0.0)
    assert ours <= tolerance(case.op, "forward", torch.float16) and errors(rounded, exact)[0] > 3 * ours

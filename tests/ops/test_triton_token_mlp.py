"""The Triton kernels of token_mlp, interpreted: tiles, programs, masks, scales, self-test, compilation."""

import warnings
from contextlib import ExitStack

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from t2t_fast import backends
from t2t_fast.errors import BackendUnavailable
from t2t_fast.functional import token_mlp
from t2t_fast.ops._common import triton_runtime
from t2t_fast.ops._common.philox import _lanes, keep_masks
from t2t_fast.ops.token_mlp import aten as aten_impl
from t2t_fast.ops.token_mlp.autograd import MlpParameters, Options
from t2t_fast.ops.token_mlp.triton import launch, support
from t2t_fast.ops.token_mlp.triton import operators as triton_impl
from t2t_fast.ops.token_mlp.triton.launch import TABLE
from t2t_fast.testing import CASES, DTYPES, ROW_FACTOR, Case, errors, token_mlp_parameters, tolerance

REASON = triton_runtime.reason(backends.Request("cpu", torch.float32, {}))
triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language", reason="triton is not installed")
kernels = pytest.importorskip("t2t_fast.ops._common.elementwise", reason="triton is not installed")
pytestmark = [pytest.mark.interpret, pytest.mark.skipif(REASON is not None, reason=f"triton: {REASON}")]

SHARED = CASES["token_mlp"]()


def case_of(length, width=16, hidden=16, batch=1, drops=(0.0, 0.0), missing=()):
    """A case in which every tensor requires a gradient."""
    generator = torch.Generator().manual_seed(length)
    tensors = {name: torch.randn(batch, length, width, generator=generator) for name in ("y", "v")}
    tensors |= token_mlp_parameters(generator, width, hidden)
    wants = tuple(name for name in tensors if name not in missing)
    tensors |= dict.fromkeys(missing)
    seed = {"seed": torch.tensor(-1234567890123)}
    return Case("token_mlp", "made up", tensors | seed, {"proj_drop": drops[0], "mlp_drop": drops[1]}, wants)


DROPOUT = case_of(49, batch=2, drops=(0.1, 0.1))


def cast(case, dtype):
    """Like :meth:`Case.cast`, but a parameter may be absent."""
    tensors = {name: t.to(dtype) if t is not None and t.is_floating_point() else t for name, t in case.tensors.items()}
    return Case(case.op, case.name, tensors, case.options, case.wants_gradient)


def run_backward(case, backend, round_to=None):
    """Like :meth:`Case.run_backward`, but a parameter may be absent."""
    tensors = {name: t.detach().requires_grad_() for name, t in case.tensors.items() if name in case.wants_gradient}
    out = case.call(**case.tensors | tensors, **case.options, backend=backend)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out.backward(upstream.to(round_to or out.dtype).to(out))
    return out.detach(), {name: t.grad for name, t in tensors.items()}


def check(case, dtype):
    """Forward and every gradient against the reference in float64."""
    rounded = cast(case, dtype)
    expected, expected_gradients = run_backward(cast(rounded, torch.float64), "reference", dtype)
    out, gradients = run_backward(rounded, "triton")
    wanted = {"forward": expected, **expected_gradients}
    for name, value in {"forward": out, **gradients}.items():
        whole, row = errors(value, wanted[name])
        allowed = tolerance(case.op, "forward" if name == "forward" else "backward", dtype)
        assert whole <= allowed and row <= ROW_FACTOR * allowed, (name, whole, row, allowed)


@pytest.fixture
def large_tiles():
    """Large tiles save time: the interpreter takes as long for a small tile as for a large one."""
    with ExitStack() as stack:
        for name in TABLE.passes:
            stack.enter_context(TABLE.override(name, {"tokens": 128}))
        yield


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("case", SHARED, ids=lambda case: case.name)
def test_shared_cases(case, dtype):
    check(case, DTYPES[dtype])


@pytest.fixture(
    params=[(1, 0, 2), (0, 0, 1), (0, 0, 3), (0, 1, 2)],
    ids=["weights kept", "weights read again", "products apart", "two launches"],
)
def small_tiles(request):
    """Tiles of 16 tokens, several programs with one or more tiles each; every option that saves registers."""
    keep, split, lean = request.param
    with ExitStack() as stack:
        for name in TABLE.passes:
            small = {"tokens": 16, "warps": 4, "stages": 1, "programs": 1, "keep": keep, "split": split, "lean": lean}
            stack.enter_context(TABLE.override(name, small))
        yield


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize(("length", "batch"), [(1, 1), (16, 1), (17, 3), (65, 2)])
def test_tiles_and_programs(length, batch, dtype):
    """Partial tiles; programs with one tile, several tiles, and tiles of two sequences."""
    check(case_of(length, batch=batch, drops=(0.3, 0.2)), DTYPES[dtype])


SIZES = [(20, 60, (0.0, 0.0)), (60, 20, (0.3, 0.4)), (24, 24, (0.4, 0.0)), (7, 1, (0.0, 0.5)), (128, 128, (0.1, 0.1))]


@pytest.mark.parametrize(("width", "hidden", "drops"), SIZES)
def test_widths(width, hidden, drops):
    """Padded widths, widths that are not multiples of eight, and only one of the two dropouts."""
    check(case_of(20, width, hidden, drops=drops), torch.float32)


MISSING = ("proj_bias", "norm_weight", "norm_bias", "fc1_bias", "fc2_bias")


@pytest.mark.parametrize("missing", [MISSING, *((name,) for name in MISSING)], ids=lambda names: "+".join(names))
def test_absent_parameters(missing):
    check(case_of(20, 24, 16, missing=missing), torch.float32)


@pytest.mark.parametrize("width", [8, 24, 12, 7])
def test_masks_are_those_of_every_backend(width):
    """The weights are 0 and the biases constant, so the output shows the masks."""
    shape, (p, q), seed = (3, 37, width), (0.3, 0.25), torch.tensor(-(2**62) - 12345)
    zero, one = torch.zeros(width, width), torch.ones(width)
    tokens = torch.zeros(shape)
    first, second = keep_masks(seed, shape, p, q)
    mlp = MlpParameters(zero, one, None, None, zero, None, zero, 16 * one)
    out = token_mlp(tokens, tokens, *mlp, proj_drop=p, mlp_drop=q, seed=seed, backend="triton")
    assert torch.equal(out > 10, second)
    assert torch.equal(out - second * 16 / (1 - q) > 1, first)


@pytest.mark.parametrize("octets", [True, False])
def test_masks_beyond_32_bits(octets):
    """The low word of the counter overflows into the high word within a tile of 16 tokens of 16 elements."""
    found, token = torch.zeros(16, 16, dtype=torch.int32), torch.tensor(2**31 - 3)
    lanes_kernel[(1,)](torch.tensor(7), token, found, octets)
    expected = torch.stack(_lanes(2**32 - 6, 2**32 + 26, torch.tensor(7)), dim=-1)
    assert torch.equal(found.flatten(), expected.flatten().int())


@triton.jit
def lanes_kernel(seed, token, out, OCTETS: tl.constexpr):
    lanes = kernels.random_lanes(tl.load(seed), tl.load(token), 16, 16, 16, OCTETS)
    row = tl.arange(0, 16)
    tl.store(out + row[:, None] * 16 + row[None, :], lanes.to(tl.int32))


@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
def test_gradients_of_any_size_in_float16(size):
    """The loss scale is far too large or too small; gradients that are representable are right."""
    case = case_of(70, 64, 64, batch=2, drops=(0.1, 0.1)).cast(torch.float16)
    y, v, *mlp, seed = case.tensors.values()
    mlp, options = MlpParameters(*(t.float() for t in mlp)), Options(1e-5, 0.1, 0.1)
    grad = (size * torch.randn(y.shape)).clamp(-6e4, 6e4).half()
    *_, found = triton_impl.run_backward(grad, y, v, mlp, options, seed, [True] * 8)
    wide = MlpParameters(*(t.double() for t in mlp))
    *_, wanted = aten_impl.run_backward(grad.double(), y.double(), v.double(), wide, options, seed, [True] * 8)
    for name, value, expected in zip(MlpParameters._fields, found, wanted, strict=True):
        assert errors(value, expected)[0] <= tolerance("token_mlp", "backward", torch.float16), name


def test_packed_views_are_read_in_place():
    case = case_of(30, batch=2, drops=(0.1, 0.1))
    packed = torch.randn(2, 30, 3 * 16)
    y, _, v = packed.chunk(3, dim=-1)
    assert launch.strided(v)[0] is v
    case.tensors |= {"y": y.contiguous(), "v": v.contiguous()}
    expected = case.run("triton")
    case.tensors |= {"y": y, "v": v}
    assert torch.equal(case.run("triton"), expected)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_programs_change_nothing_but_the_order_of_sums(dtype):
    """Bitwise repeatable; out, d_y and d_v do not depend on the number of programs."""
    case = DROPOUT.cast(DTYPES[dtype])
    found = []
    for programs in (1, 1, 4):
        with ExitStack() as stack:
            for name in TABLE.passes:
                small = {"tokens": 16, "warps": 4, "stages": 1, "programs": programs, "keep": 1, "split": 0}
                stack.enter_context(TABLE.override(name, small))
            out, gradients = case.run_backward("triton")
        found.append({"out": out, **gradients})
    first, again, other = found
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) for name in ("out", "y", "v"))


def test_no_parameter_gradients_when_frozen():
    """d_y and d_v are bitwise the same, and no other sums are computed."""
    _, every = DROPOUT.run_backward("triton")
    frozen = Case(DROPOUT.op, DROPOUT.name, DROPOUT.tensors, DROPOUT.options, ("y", "v"))
    _, fewer = frozen.run_backward("triton")
    assert set(fewer) == {"y", "v"} and all(torch.equal(every[name], fewer[name]) for name in fewer)
    y, v, *mlp, seed = DROPOUT.tensors.values()
    *_, flat = triton_impl._backward(torch.ones_like(y), y, v, seed, [1e-5, 0.1, 0.1], mlp, False)
    assert flat.numel() == 0


def test_autocast_runs_the_kernels_in_its_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        out = DROPOUT.run("triton")
    y, v, *mlp, seed = DROPOUT.tensors.values()
    expected = triton_impl.run(y.bfloat16(), v.bfloat16(), MlpParameters(*mlp), Options(1e-5, 0.1, 0.1), seed)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


@pytest.mark.slow
@pytest.mark.self_test
def test_one_graph_under_compile():
    """Forward, backward and self-test are opaque to the compiler: no graph break, bitwise equal to eager."""
    torch._dynamo.reset()
    tensors = {name: t for name, t in DROPOUT.tensors.items() if name not in ("y", "v", "proj_weight")}

    def step(y, v, weight):
        return token_mlp(y * 1, v, weight, **tensors, **DROPOUT.options, backend="triton").sin()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    inputs = [DROPOUT.tensors[name].clone().requires_grad_() for name in ("y", "v", "proj_weight")]
    out, expected = compiled(*inputs), step(*inputs)
    assert torch.equal(out, expected)
    found, wanted = (torch.autograd.grad(t.sum(), inputs) for t in (out, expected))
    assert all(torch.equal(gradient, other) for gradient, other in zip(found, wanted, strict=True))
    torch._dynamo.reset()


def test_activation_checkpointing_draws_the_same_masks():
    tensors = {name: t for name, t in DROPOUT.tensors.items() if name not in ("y", "seed")}
    found = []
    for kept in (True, False):
        torch.manual_seed(5)
        y = DROPOUT.tensors["y"].clone().requires_grad_()

        def call(y):
            return token_mlp(y, **tensors, **DROPOUT.options, backend="triton")

        out = call(y) if kept else checkpoint(call, y, use_reentrant=False)
        out.square().sum().backward()
        found.append((out, y.grad))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_second_derivative_is_refused():
    tensors = {**DROPOUT.tensors, "y": DROPOUT.tensors["y"].clone().requires_grad_()}
    out = token_mlp(**tensors, **DROPOUT.options, backend="triton")
    with pytest.raises(RuntimeError, match=r"no second derivative .* use t2t_fast.backend\('reference'\)"):
        torch.autograd.grad(out.square().sum(), tensors["y"], create_graph=True)


def broken(*_):
    raise RuntimeError("first line\nPTXAS error: no such instruction")


WRONG = {
    "an exception": (broken, "its first run failed with RuntimeError: PTXAS error: no such instruction"),
    "a wrong result": (lambda y, *rest: y * 0, "its self-test on cpu gave an error of 1.0e+00, 2.0e-05 is allowed"),
    "not a number": (lambda y, *rest: y * torch.nan, "its self-test on cpu gave an error of nan"),
}


@pytest.mark.self_test
@pytest.mark.parametrize("how", list(WRONG))
def test_failing_kernel_is_disabled_with_one_warning(how, monkeypatch):
    """``auto`` falls back to the next backend, an explicit choice raises, and both report the reason."""
    run, words = WRONG[how]
    table = backends._tables["token_mlp"]
    monkeypatch.setitem(table, "triton", table["triton"]._replace(passed_over=backends.always))
    monkeypatch.setattr(support, "run", run)
    with pytest.warns(RuntimeWarning, match="token_mlp leaves its Triton kernel: its") as caught:
        out = DROPOUT.run()
    (warning,) = [each for each in caught if each.category is RuntimeWarning]
    assert words in str(warning.message)
    torch.testing.assert_close(out, DROPOUT.run("aten"), rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DROPOUT.run()
        with pytest.raises(BackendUnavailable, match=r"first run failed|self-test on cpu"):
            DROPOUT.run("triton")


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (case_of(4, width=129), "take 1 to 128 channels, got 129"),
        (case_of(4, hidden=200), "take 1 to 128 hidden units, got 200"),
        (case_of(4).cast(torch.float64), "no Triton kernel for float64"),
    ],
)
def test_unsupported_calls_raise(case, words):
    with pytest.raises(BackendUnavailable, match=words):
        case.run("triton")
    case.run()


def test_an_infinite_gradient_stays_in_its_token():
    """As with a loss scale that is too large for float16: the gradients of the other tokens are unaffected."""
    case = cast(case_of(20, width=16, hidden=16, batch=2), torch.float16)
    y, v = case.tensors["y"], case.tensors["v"]
    mlp, grad = MlpParameters(*(case.tensors[name] for name in MlpParameters._fields)), torch.randn(2, 20, 16).half()
    needed = [False] * len(mlp)
    expected = triton_impl.run_backward(grad, y, v, mlp, Options(1e-5, 0.0, 0.0), None, needed)
    grad[0, 3, 5] = torch.inf
    found = triton_impl.run_backward(grad, y, v, mlp, Options(1e-5, 0.0, 0.0), None, needed)
    others = torch.ones(2, 20, dtype=torch.bool)
    others[0, 3] = False
    for value, wanted in zip(found[:2], expected[:2], strict=True):
        assert not value[0, 3].isfinite().all()
        assert errors(value[others], wanted[others].double())[0] <= tolerance("token_mlp", "backward", torch.float16)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("name", ["T2T stage 3", "dropout"])
def test_float32_in_three_tf32_products(name, matrix_units):
    """Within the table's tolerance when every product is the sum of three products of truncated TF32 operands."""
    check(next(case for case in SHARED if case.name == name), torch.float32)
    assert matrix_units == {"tf32"}

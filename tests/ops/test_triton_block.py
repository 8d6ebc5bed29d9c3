"""The Triton kernels of a transformer block, interpreted: add_layer_norm, layer_norm_linear, layer_norm_mlp."""

import warnings
from contextlib import ExitStack, contextmanager

import pytest
import torch

from t2t_fast import backends
from t2t_fast.errors import BackendUnavailable
from t2t_fast.functional import add_layer_norm, layer_norm_mlp
from t2t_fast.ops._common import triton_runtime
from t2t_fast.ops._common.philox import HIDDEN, Drops, _lanes, branch_masks, keep_masks
from t2t_fast.ops.add_layer_norm.triton import launch as norm_launch
from t2t_fast.ops.add_layer_norm.triton import support as norm_support
from t2t_fast.ops.layer_norm_mlp.triton import operators as mlp
from t2t_fast.ops.layer_norm_mlp.triton import support
from t2t_fast.ops.layer_norm_mlp.triton.launch import TABLE as MLP
from t2t_fast.testing import CASES, DTYPES, Case, assert_close, errors, tolerance

REASON = triton_runtime.reason(backends.Request("cpu", torch.float32, {}))
triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language", reason="triton is not installed")
kernels = pytest.importorskip("t2t_fast.ops._common.elementwise", reason="triton is not installed")
norm_backward = pytest.importorskip("t2t_fast.ops.add_layer_norm.triton.backward", reason="triton is not installed")
pytestmark = [pytest.mark.interpret, pytest.mark.skipif(REASON is not None, reason=f"triton: {REASON}")]

OPS = ("add_layer_norm", "layer_norm_linear", "layer_norm_mlp")
SHARED = [case for op in OPS for case in CASES[op]()]
DROPS = {"branch_drop": 0.3, "branch_path": 0.4, "hidden_drop": 0.2, "drop": 0.25, "drop_path": 0.3}


def block(length=20, width=32, hidden=48, batch=2, outputs=None, missing=(), drops=False, **options):
    """A case of layer_norm_mlp in which every tensor requires a gradient."""
    generator = torch.Generator().manual_seed(length)
    outputs = outputs or width
    shapes = {"x": (batch, length, width), "branch": (batch, length, width), "norm_weight": (width,)}
    shapes |= {"norm_bias": (width,), "fc1_weight": (hidden, width), "fc1_bias": (hidden,)}
    shapes |= {"fc2_weight": (outputs, hidden), "fc2_bias": (outputs,)}
    tensors = {
        name: torch.randn(shape, generator=generator) * (1 if len(shape) == 3 else shape[-1] ** -0.5)
        for name, shape in shapes.items()
        if name not in missing
    }
    options |= dict.fromkeys(missing) | (DROPS if drops else {})
    seed = {"seed": torch.tensor(-1234567890123)}
    return Case("layer_norm_mlp", f"{length} x {width} x {hidden}", tensors | seed, options, tuple(tensors))


@contextmanager
def launched_with(**parameters):
    """Every launch of a product uses these parameters."""
    with ExitStack() as stack:
        for name in MLP.passes:
            stack.enter_context(MLP.override(name, parameters))
        yield


def check(case, dtype):
    """Forward and every gradient against the reference in float64."""
    rounded = case.cast(dtype)
    expected, expected_gradients = rounded.cast(torch.float64).run_backward("reference", dtype)
    out, gradients = rounded.run_backward("triton")
    assert_close(out, expected, case.op, "forward", dtype, case.name)
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        assert_close(gradient, expected_gradients[name], case.op, "backward", dtype, f"{case.name}: {name}")


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("case", [case for case in SHARED if case.name == "T2T-ViT-7"], ids=lambda case: case.op)
def test_shapes_of_t2t(case, dtype):
    """Those too large for test_all_ops.py."""
    check(case, DTYPES[dtype])


@pytest.mark.parametrize("fused", [0, 1])
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize(("length", "width", "hidden"), [(1, 32, 64), (16, 48, 40), (67, 19, 130)])
def test_tiles(length, width, hidden, parts, fused):
    """Partial tiles of rows, columns and depth, in the order of several groups; PyTorch's product and ours."""
    small = {"tokens": 16, "columns": 64, "block": 32, "warps": 4, "stages": 1, "parts": parts, "fused": fused}
    with launched_with(**small):
        check(block(length, width, hidden, drops=True), torch.float16)


@pytest.mark.parametrize("name", ["T2T-ViT-7", "every dropout"])
def test_float32_in_three_tf32_products(name, matrix_units):
    """Within the table's tolerance when every product is the sum of three products of truncated TF32 operands."""
    with launched_with(fused=1):
        check(next(case for case in CASES["layer_norm_mlp"]() if case.name == name), torch.float32)
    assert matrix_units == {"tf32"}


@pytest.mark.parametrize(("tokens", "programs"), [(1, 1), (2, 3), (16, 1)])
@pytest.mark.parametrize("width", [64, 20])
def test_rows_and_programs(width, tokens, programs):
    """Programs with one tile, several tiles and a partial one; x and branch get bitwise the same gradients."""
    case, found = block(21, width, 16, drops=True), []
    for parameters in ({"tokens": tokens, "warps": 1, "programs": programs}, {}):
        with ExitStack() as stack:
            for name in norm_launch.PASSES:
                own = {key: value for key, value in parameters.items() if key != "programs" or "backward" in name}
                stack.enter_context(norm_launch.TABLE.override(name, own))
            check(case, torch.float32)
            found.append(case.run_backward("triton")[1])
    for name in ("x", "branch", "fc1_weight"):
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-5, atol=1e-6)


NORM = ("norm_weight", "norm_bias")
MISSING = [NORM, NORM[:1], NORM[1:], ("fc1_bias", "fc2_bias"), ("branch",)]


@pytest.mark.parametrize("missing", MISSING, ids="+".join)
@pytest.mark.parametrize("recompute", [False, True])
def test_absent_parameters(missing, recompute):
    check(block(missing=missing, recompute=recompute, drops=True), torch.float32)


@pytest.mark.parametrize(
    "case",
    [
        block(missing=(*NORM, "branch"), norm_eps=None, residual=False, outputs=24),
        block(missing=(*NORM, "branch"), norm_eps=None, residual=True),
        block(missing=NORM, norm_eps=None, drops=True),
        block(missing=NORM, norm_eps=None, drops=True, recompute=True),
        block(residual=False, outputs=24, drops=True),
    ],
    ids=["Mlp", "residual", "branch", "recompute", "LayerNorm without residual"],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_without_layer_norm_or_residual(case, dtype):
    check(case, DTYPES[dtype])


@pytest.mark.parametrize("width", [24, 20])
def test_masks_are_those_of_every_backend(width):
    """Constant branches and hidden units show each mask; a width of 24 draws eight at a time, 20 one by one."""
    shape, seed = (5, 37, width), torch.tensor(-(2**62) - 12345)
    first, second, hidden_drop = Drops(0.3, 0.4), Drops(0.25, 0.5), 0.2
    zero, one = torch.zeros(shape), torch.ones(shape)
    t, _ = add_layer_norm(zero, one, None, None, drop=first.drop, drop_path=first.path, seed=seed, backend="triton")
    keep, path = branch_masks(seed, shape, first)
    assert torch.equal(t > 0, keep & path)
    weight = torch.zeros(width, width)
    drops = {"branch_drop": first.drop, "branch_path": first.path, "drop": second.drop, "drop_path": second.path}
    arguments = (zero, zero, None, None, weight, torch.full((width,), 9.0), torch.eye(width), None)
    with launched_with(columns=16):
        out = layer_norm_mlp(*arguments, hidden_drop=hidden_drop, **drops, seed=seed, backend="triton")
    keep, path = branch_masks(seed, shape, first, second, 1)
    hidden, _ = keep_masks(seed, shape, hidden_drop, 0.0, HIDDEN)
    assert torch.equal(out > 0, keep & path & hidden)
    for mask, p in ((keep, second.drop), (hidden, hidden_drop), (path, second.path)):
        assert abs(mask.float().mean().item() - (1 - p)) < 0.5  # neither everything nor nothing
        assert mask.any() and not mask.all()


@triton.jit
def lanes_kernel(seed, token, out, column: tl.constexpr, OCTETS: tl.constexpr):
    lanes = kernels.random_lanes(tl.load(seed), tl.load(token), 48, 16, 16, OCTETS, column, 2)
    row = tl.arange(0, 16)
    tl.store(out + row[:, None] * 16 + row[None, :], lanes.to(tl.int32))


@pytest.mark.parametrize("octets", [True, False])
def test_lanes_of_a_tile_inside_a_row(octets):
    """Columns 16 to 32 of rows of 48, where the low word of the counter overflows within the tile; stream 2."""
    found, token = torch.zeros(16, 16, dtype=torch.int32), 2**35 // 48 - 5
    lanes_kernel[(1,)](torch.tensor(7), torch.tensor(token), found, 16, octets)
    first = token * 48 // 8
    assert first < 2**32 < first + 16 * 6
    expected = torch.stack(_lanes(first, first + 16 * 6, torch.tensor(7), 2), dim=-1).view(16, 48)[:, 16:32]
    assert torch.equal(found, expected.int())


def test_strided_tokens_are_read_in_place():
    """x and branch inside wider tensors, as views of packed tokens are."""
    case = block(30, drops=True)
    expected, expected_gradients = case.run_backward("triton")
    for name in ("x", "branch"):
        wide = torch.randn(2, 30, 3 * 32)
        wide[..., 32:64] = case.tensors[name]
        case.tensors[name] = wide[..., 32:64]
        assert norm_launch.rows_of(case.tensors[name]).data_ptr() == case.tensors[name].data_ptr()
    out, gradients = case.run_backward("triton")
    assert torch.equal(out, expected)
    assert all(torch.equal(gradients[name], expected_gradients[name]) for name in gradients)


def test_autocast_keeps_the_stream_in_float32():
    """A float32 stream and parameters, a branch and products in bfloat16; every gradient in its tensor's dtype."""
    case = block(40, 64, 128, drops=True)
    case.tensors["branch"] = case.tensors["branch"].bfloat16()
    expected, wanted = case.cast(torch.float64).run_backward("reference", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, gradients = case.run_backward("triton")
    assert out.dtype == torch.float32
    assert errors(out, expected)[0] <= tolerance(case.op, "forward", torch.bfloat16)
    for name, gradient in gradients.items():
        assert gradient.dtype == case.tensors[name].dtype, name
        assert errors(gradient, wanted[name])[0] <= tolerance(case.op, "backward", torch.bfloat16), name


def test_backward_twice_is_bit_identical():
    case = block(130, 64, 96, drops=True).cast(torch.float16)
    first, second = (case.run_backward("triton") for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_frozen_parameters(monkeypatch):
    """Only x requires a gradient: the same one, and no n is written for a weight's gradient."""
    case = block(drops=True)
    _, every = case.run_backward("triton")
    written = []
    frozen = Case(case.op, case.name, case.tensors, case.options, ("x",))
    launch = norm_backward.launch_layer_norm_backward
    monkeypatch.setattr(
        norm_backward,
        "launch_layer_norm_backward",
        lambda *arguments: written.append(launch(*arguments)) or written[-1],
    )
    _, alone = frozen.run_backward("triton")
    assert torch.equal(alone["x"], every["x"])
    ((_, d_branch, n, _),) = written
    assert d_branch.numel() == n.numel() == 0


@pytest.mark.self_test
@pytest.mark.parametrize("case", SHARED, ids=lambda case: f"{case.op}: {case.name}")
def test_self_tests_pass(case):
    """The kinds of the shared cases, with warnings as errors."""
    if case.name == "T2T-ViT-7":
        pytest.skip("odd sizes say as much")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="triton.runtime.interpreter")
        case.run_backward("triton")


def broken(*_):
    raise RuntimeError("first line\nPTXAS error: no such instruction")


WRONG = {
    "an exception": (broken, "its first run failed with RuntimeError: PTXAS error: no such instruction"),
    "a wrong result": (lambda a, t, *rest: t * 0, "its self-test on cpu gave an error of 1.0e+00, 2.0e-05 is allowed"),
}


@pytest.mark.self_test
@pytest.mark.parametrize("how", list(WRONG))
def test_failing_kernel_is_disabled_with_one_warning(how, monkeypatch):
    """``auto`` falls back to the next backend, an explicit choice raises, and both report the reason."""
    run, words = WRONG[how]
    table, case = backends._tables["layer_norm_mlp"], block()
    monkeypatch.setitem(table, "triton", table["triton"]._replace(passed_over=backends.always))
    monkeypatch.setattr(mlp, "fc2_add", run)
    with pytest.warns(RuntimeWarning, match="layer_norm_mlp leaves its Triton kernel: its") as caught:
        out = case.run()
    (warning,) = [each for each in caught if each.category is RuntimeWarning]
    assert words in str(warning.message)
    torch.testing.assert_close(out, case.run("aten"), rtol=1e-4, atol=1e-5)
    with pytest.raises(BackendUnavailable, match=r"first run failed|self-test on cpu"):
        case.run("triton")


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (block(1, 4097, 8), "take 1 to 4096 channels, got width 4097"),
        (block(1, 8, 8, outputs=5000, residual=False), "take 1 to 4096 channels, got outputs 5000"),
        (block(4).cast(torch.float64), "no Triton kernel for float64"),
    ],
)
def test_unsupported_calls_raise(case, words):
    with pytest.raises(BackendUnavailable, match=words):
        case.run("triton")
    case.run()


def test_kinds_name_everything_that_selects_a_kernel():
    """A call that differs in one of these runs another kernel, and needs a self-test of its own."""
    sizes = {"width": 64, "hidden": 96, "outputs": 64, "training": True}
    changes = [{"branch": False}, {"normed": False}, {"dropout": False}, {"residual": False}, {"training": False}]
    changes += [{"width": 48}, {"hidden": 48}, {"stream": torch.bfloat16}, {"parameters": torch.bfloat16}]
    kinds = {support.kind(backends.Request("cpu", torch.float32, sizes | change)) for change in ({}, *changes)}
    assert len(kinds) == 1 + len(changes)
    norms = {norm_support.kind(backends.Request("cpu", torch.float32, sizes | change)) for change in ({}, *changes)}
    assert len(norms) == 1 + len(changes) - 3  # without the MLP's own


@pytest.mark.slow
@pytest.mark.self_test
def test_one_graph_under_compile():
    """Forward, backward and self-test are opaque to the compiler: no graph break, bitwise equal to eager."""
    torch._dynamo.reset()
    case = block(drops=True)
    rest = {name: t for name, t in case.tensors.items() if name not in ("x", "branch", "fc1_weight")}

    def step(x, branch, weight):
        return layer_norm_mlp(x * 1, branch=branch, fc1_weight=weight, **rest, **case.options, backend="triton").sin()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    inputs = [case.tensors[name].clone().requires_grad_() for name in ("x", "branch", "fc1_weight")]
    out, expected = compiled(*inputs), step(*inputs)
    assert torch.equal(out, expected)
    found, wanted = (torch.autograd.grad(t.sum(), inputs) for t in (out, expected))
    assert all(torch.equal(gradient, other) for gradient, other in zip(found, wanted, strict=True))
    torch._dynamo.reset()

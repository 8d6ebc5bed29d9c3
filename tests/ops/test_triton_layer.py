"""A whole Performer layer of Triton kernels, interpreted: its gradients, and its fused launches of two steps.

One fuses the soft split with the pass over the keys, the other the pass over the queries with token_mlp.
"""

import warnings
from contextlib import contextmanager

import pytest
import torch

from t2t_fast import backends
from t2t_fast.ops._common import triton_runtime
from t2t_fast.ops._common.pixels import normalisation
from t2t_fast.ops._common.spec import Window
from t2t_fast.ops.performer_attention import aten as aten_attention
from t2t_fast.ops.performer_attention.triton.call import Call
from t2t_fast.ops.performer_layer.autograd import Layer
from t2t_fast.ops.performer_layer.triton import fusion, launch
from t2t_fast.ops.performer_layer.triton import operators as triton_impl
from t2t_fast.ops.performer_layer.triton.launch import TABLE
from t2t_fast.ops.token_mlp import aten as aten_mlp
from t2t_fast.ops.token_mlp.autograd import MlpParameters, Options
from t2t_fast.testing import DTYPES, Case, assert_close, errors, features, natural_images, token_mlp_parameters

REASON = triton_runtime.reason(backends.Request("cpu", torch.float32, {}))
kernels = pytest.importorskip("t2t_fast.ops.performer_layer.triton.forward", reason="triton is not installed")
pytestmark = [pytest.mark.interpret, pytest.mark.skipif(REASON is not None, reason=f"triton: {REASON}")]


def case_of(shape=(2, 8, 9, 7), kernel=3, stride=2, padding=1, width=16, m=8, hidden=16, drops=(0.3, 0.2), eps=1e-8):
    """A case in which every tensor requires a gradient; k and q have norms near 2."""
    generator = torch.Generator().manual_seed(sum(shape))
    columns = shape[1] * kernel**2
    tensors = {
        "x": natural_images(*shape, seed=1),
        "kqv_weight": torch.randn(3 * width, columns, generator=generator) * 2 / (columns * width) ** 0.5,
        "kqv_bias": torch.randn(3 * width, generator=generator) * 0.05,
        "norm1_weight": 1 + 0.1 * torch.randn(columns, generator=generator),
        "norm1_bias": 0.1 * torch.randn(columns, generator=generator),
        "w": features(generator, m, width),
        **token_mlp_parameters(generator, width, hidden, norm="norm2"),
    }
    wants = tuple(tensors)
    options = {"kernel_size": kernel, "stride": stride, "padding": padding, "eps": eps}
    options |= {"proj_drop": drops[0], "mlp_drop": drops[1]}
    return Case("performer_layer", "made up", tensors | {"seed": torch.tensor(-987654321)}, options, wants)


def check(case, dtype):
    """Forward and every gradient against the reference in float64, with the same masks."""
    rounded = case.cast(dtype)
    expected, expected_gradients = rounded.cast(torch.float64).run_backward("reference", dtype)
    out, gradients = rounded.run_backward("triton", dtype)
    assert_close(out, expected, case.op, "forward", dtype)
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], case.op, "backward", dtype, name)


SMALL = {"tokens": 16, "warps": 4, "stages": 1, "programs": 1, "keep": 1, "lean": 0}
SMALL_SPLIT = {"tokens": 16, "warps": 4, "stages": 1, "programs": 1, "block": 16}


@contextmanager
def launches(fused):
    """One launch for every pair of steps (``fused`` 1) or two (0), with tiles of 16 tokens."""
    with (
        TABLE.override("read_out_mlp", {**SMALL, "fused": fused}),
        TABLE.override("split_keys", {**SMALL_SPLIT, "fused": fused}),
    ):
        yield


@pytest.fixture
def small_tiles():
    """One launch for two steps, with tiles of 16 tokens."""
    with launches(1):
        yield


@pytest.mark.parametrize("fused", [1, 0], ids=["one launch", "two launches"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_gradients(dtype, fused):
    """With both dropouts: the gradients are only right if backward draws the same masks as forward."""
    with launches(fused):
        check(case_of(), DTYPES[dtype])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"shape": (1, 16, 9, 7)}, id="batch 1"),
        pytest.param({"shape": (2, 3, 7, 7), "kernel": 7, "stride": 4, "padding": 0, "eps": 0.1}, id="one token"),
        pytest.param({"shape": (1, 5, 9, 8), "width": 20, "m": 11, "hidden": 28, "drops": (0.0, 0.4)}, id="odd sizes"),
    ],
)
def test_sizes(sizes, dtype):
    """One token attends to itself: the gradients of k, q and w are only significant with a half-open gate."""
    check(case_of(**sizes), DTYPES[dtype])


@pytest.mark.usefixtures("small_tiles")
def test_empty_batch():
    out, gradients = case_of((0, 8, 9, 7)).run_backward("triton")
    assert out.shape == (0, 20, 16) and gradients["x"].shape == (0, 8, 9, 7)
    assert all(not gradient.any() for gradient in gradients.values())


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("layout", ["channels_last", "every other column", "tokens"])
def test_layouts_of_the_input(layout):
    """It is read through its strides: the same output and gradient as for a contiguous copy."""
    case = case_of()
    x = case.tensors["x"]
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "every other column":
        x = torch.stack([x, torch.full_like(x, torch.nan)], dim=-1).flatten(3)[..., ::2]
    else:
        x = x.flatten(2).mT
        case.options["grid"] = (9, 7)
    expected, expected_gradients = case_of().cast(torch.float64).run_backward("reference", torch.float32)
    case.tensors["x"] = x
    out, gradients = case.run_backward("triton")
    assert_close(out, expected, case.op, "forward", torch.float32)
    d_x = gradients["x"].mT.unflatten(2, (9, 7)) if layout == "tokens" else gradients["x"]
    assert_close(d_x, expected_gradients["x"], case.op, "backward", torch.float32)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_same_bits_twice(dtype):
    first, second = (case_of().cast(DTYPES[dtype]).run_backward("triton") for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(gradient, second[1][name]) for name, gradient in first[1].items())


def block_of(length, width=16, m=8, hidden=16, drops=(0.3, 0.2), batch=2, dtype=torch.float32):
    """The arguments, in order, of the steps after kqv."""
    generator = torch.Generator().manual_seed(length)
    kqv = torch.randn(batch, length, 3 * width, generator=generator)
    kqv[..., : 2 * width] *= 2 * width**-0.5
    w, mlp = features(generator, m, width), MlpParameters(**token_mlp_parameters(generator, width, hidden))
    return kqv.to(dtype), w, 1e-8, mlp, Options(1e-5, *drops), torch.tensor(2**40 + 7)


def run(arguments, fused, **parameters):
    kqv, w, eps, *rest = arguments
    k, q, v = kqv.chunk(3, dim=-1)
    lz, state = kernels.launch_key_state(Call(q.shape, w, q.dtype), k, v, None)
    with TABLE.override("read_out_mlp", {**SMALL, "fused": fused, **parameters}):
        return triton_impl._output(kqv, w, eps, lz, state, *rest)


def same(dtype):
    """The allowed difference of equal results.

    A value halfway between two numbers may round to either, and the order of summation of the interpreter's float32
    products depends on their sizes and the processor.
    """
    return max(torch.finfo(dtype).eps, 8 * torch.finfo(torch.float32).eps)


ONE_LAUNCH = [
    pytest.param(97, {"batch": 1}, {}, id="a tile that ends early"),
    pytest.param(33, {"batch": 3}, {"programs": 4}, id="several splits"),
    pytest.param(16, {"drops": (0.0, 0.3)}, {"keep": 0}, id="weights read again"),
    pytest.param(40, {"drops": (0.3, 0.0)}, {"lean": 1}, id="biases read again"),
    pytest.param(20, {"width": 32, "m": 11, "hidden": 28, "drops": (0.4, 0.0)}, {}, id="odd sizes"),
    pytest.param(20, {"width": 64, "m": 64, "hidden": 64, "drops": (0.0, 0.0)}, {}, id="the largest"),
    pytest.param(1, {"width": 16, "m": 1, "hidden": 3}, {}, id="the smallest"),
]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("length", "sizes", "parameters"), ONE_LAUNCH)
def test_one_launch_matches_two(length, sizes, parameters, dtype, monkeypatch):
    """Equal within one rounding; the separate kernels are not launched."""
    arguments = block_of(length, dtype=DTYPES[dtype], **sizes)
    expected = run(arguments, fused=0)
    for module, name in ((kernels, "launch_read_out"), (kernels.mlp, "run")):
        monkeypatch.setattr(module, name, None)
    out = run(arguments, fused=1, **parameters)
    assert errors(out, expected)[0] <= same(out.dtype)


def projection_of(shape, kernel, stride, padding, width=16, m=8, dtype=torch.float32, pixels=()):
    """The arguments of the steps before the key state: image, Linear, w and the layer's constants."""
    case = case_of(shape, kernel, stride, padding, width, m).cast(dtype)
    names = ("kqv_weight", "kqv_bias", "norm1_weight", "norm1_bias")
    linear = tuple(case.tensors[name] for name in names)
    x = case.tensors["x"]
    if pixels:
        x = (60 * x + 128).clamp(0, 255).to(torch.uint8)
    window = Window((kernel, kernel), (stride, stride), (padding, padding))
    layer = Layer(1e-5, window, dtype, list(pixels), 1e-8, Options(1e-5, 0.0, 0.0), False)
    return x, linear, case.tensors["w"], layer


def project(arguments, fused, whole=True, **parameters):
    with TABLE.override("split_keys", {**SMALL_SPLIT, "fused": fused, **parameters}):
        return triton_impl._project(*arguments, whole, False)


CELLS = {"shape": (2, 3, 23, 30), "kernel": 7, "stride": 4, "padding": 2}
TOKENS = {"shape": (2, 16, 9, 7), "kernel": 3, "stride": 2, "padding": 1}
PROJECTIONS = [
    pytest.param(CELLS, {}, id="cells"),
    pytest.param(CELLS, {"block": 32, "programs": 8}, id="cells, several splits"),
    pytest.param(CELLS | {"pixels": normalisation((0.5,) * 3, (0.25,) * 3)}, {}, id="bytes"),
    pytest.param(TOKENS, {}, id="tokens"),
    pytest.param(TOKENS | {"shape": (1, 32, 20, 9), "width": 32, "m": 11}, {"programs": 8}, id="odd features"),
    pytest.param(TOKENS | {"shape": (3, 5, 9, 7), "m": 1}, {}, id="gathered"),
    pytest.param(TOKENS | {"width": 64, "m": 64}, {"tokens": 32}, id="the largest"),
    pytest.param(CELLS | {"shape": (2, 3, 7, 7), "padding": 0}, {}, id="one token"),
]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("sizes", "parameters"), PROJECTIONS)
def test_one_launch_for_split_and_keys_matches_two(sizes, parameters, dtype, monkeypatch):
    """kqv, statistics and key state equal within rounding, q and v alone bitwise; no separate kernel is launched."""
    arguments = projection_of(dtype=DTYPES[dtype], **sizes)
    expected = project(arguments, fused=0)
    for module, name in ((kernels, "launch_key_state"), (kernels, "launch_split_linear")):
        monkeypatch.setattr(module, name, None)
    found = project(arguments, fused=1, **parameters)
    for value, other in zip(found, expected, strict=True):
        assert value.shape == other.shape and value.dtype == other.dtype
        assert errors(value, other)[0] <= 2 * same(DTYPES[dtype])
    narrow, *statistics, lz, state = project(arguments, fused=1, whole=False, **parameters)
    width = arguments[2].shape[1]
    assert torch.equal(narrow, found[0][..., width:]) and statistics == [None, None]
    assert torch.equal(lz, found[3]) and torch.equal(state, found[4])


# the sums of the first attempt overflow, as intended
@pytest.mark.filterwarnings("ignore:overflow encountered in reduce:RuntimeWarning")
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_keys_that_outgrow_the_speculated_shift(dtype):
    """Long keys are followed by short ones, whose weights overflow with the first tile's shift; the tokens run again.

    In the flat part of the image the output of LayerNorm is its bias, here 0.
    """
    arguments = projection_of((1, 16, 20, 20), 3, 2, 1, dtype=DTYPES[dtype])
    x, (weight, _, _, norm_bias), _, _ = arguments
    x[:, :, 10:], weight[:16] = 0.5, 8 * weight[:16]
    norm_bias.zero_()
    found, expected = (project(arguments, fused) for fused in (1, 0))
    k = found[0][..., :16].double()
    exponents = k @ arguments[2].double().T - k.square().sum(-1, keepdim=True) / 2
    ahead = exponents[:, 16:].amax(1) - exponents[:, :16].amax(1)
    assert ahead.max() > 60, "else this tests nothing"
    for value, other in zip(found[3:], expected[3:], strict=True):
        assert value.isfinite().all() and errors(value, other)[0] <= 2 * same(DTYPES[dtype])


@pytest.mark.parametrize(("name", "size"), [("width", 128), ("width", 24), ("m", 65), ("hidden", 65)])
def test_sizes_that_do_not_fit_take_two_launches(name, size, monkeypatch):
    monkeypatch.setattr(kernels, "read_out_mlp_kernel", None)
    sizes = {"width": 16, "m": 8, "hidden": 16}
    assert launch.fits(*sizes.values()) and not launch.fits(*(sizes | {name: size}).values())
    out = run(block_of(5, **sizes | {name: size}), fused=1)
    assert out.isfinite().all()


def test_few_tokens_may_have_other_launches(monkeypatch):
    """The table's section for few tokens selects the number of launches: here two for 6 tokens, one for 40."""
    monkeypatch.setattr(TABLE, "rows", {"few": {"split_keys": {"fp32-E16-m16-C16": {"fused": 0}}}})
    monkeypatch.setattr(TABLE, "_selected", {})
    monkeypatch.setattr(triton_runtime, "section", lambda device, tokens: "few" if tokens <= 10 else "many")
    widths = [
        triton_impl._project(*projection_of(shape, 3, 2, 1), False, False)[0].shape[1:]
        for shape in ((1, 16, 3, 5), (2, 16, 9, 7))
    ]
    assert widths == [(6, 3 * 16), (20, 2 * 16)]


@pytest.mark.parametrize("sizes", [{"width": 24}, {"m": 65}])
def test_a_projection_that_does_not_fit_takes_two_launches(sizes, monkeypatch):
    monkeypatch.setattr(kernels, "split_keys_kernel", None)
    kqv, *_, state = project(projection_of(**TOKENS | sizes), fused=1, whole=False)
    width = sizes.get("width", 16)
    assert kqv.shape[-1] == 3 * width and state.isfinite().all()


@pytest.mark.parametrize(("architecture", "dtype"), [("sm_90", "bf16"), ("cpu", "fp32")])
@pytest.mark.parametrize(("name", "small", "last"), [("read_out_mlp", SMALL, 64), ("split_keys", SMALL_SPLIT, 96)])
def test_parameters_come_from_the_table(architecture, dtype, name, small, last):
    found = TABLE.chosen(name, architecture, DTYPES[dtype], 64, 32, last)
    assert set(found) == {*small, "fused"}
    candidates = launch.candidates(name, found)
    assert all(set(each) == set(found) for each in candidates) and candidates[-1]["fused"] == 0


@pytest.mark.self_test
def test_failing_fused_kernel_is_replaced_by_two_launches(monkeypatch):
    """One warning; the layer keeps its other Triton kernels."""
    wrong = fusion._expected_queries
    monkeypatch.setattr(fusion, "_tried_queries", lambda *call: [2 * t for t in wrong(*call)])
    arguments = block_of(5)
    with pytest.warns(RuntimeWarning, match="performer_layer leaves its Triton kernel: its self-test on cpu"):
        out = run(arguments, fused=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert torch.equal(run(arguments, fused=1), out)
    assert torch.equal(run(arguments, fused=0), out)


@pytest.mark.self_test
def test_failing_fused_projection_is_replaced_by_two_launches(monkeypatch):
    wrong = fusion._expected_keys
    monkeypatch.setattr(fusion, "_tried_keys", lambda *call: [2 * t for t in wrong(*call)])
    arguments = projection_of(**TOKENS)
    with pytest.warns(RuntimeWarning, match="performer_layer leaves its Triton kernel: its self-test on cpu"):
        found = project(arguments, fused=1)
    assert all(torch.equal(*pair) for pair in zip(found, project(arguments, fused=0), strict=True))


@pytest.mark.self_test
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_fused_kernels_pass_their_self_tests(dtype):
    dtype = DTYPES[dtype]
    for single in {dtype, torch.float32}:
        assert fusion._queries_trial(None, dtype, single, 16, 16, single, 16, 16, single == dtype) is None
        for channels, window in ((3, Window((7, 7), (4, 4), (2, 2))), (16, Window((3, 3), (2, 2), (1, 1)))):
            assert fusion._keys_trial(None, dtype, single, single, channels, window, 16, 16, True) is None


def test_float32_in_three_tf32_products(matrix_units):
    """Within the layer's tolerance when every product is the sum of three TF32 products."""
    check(case_of(), torch.float32)
    assert matrix_units == {"tf32"}


def test_tf32_where_torch_allows_it(matrix_units, monkeypatch):
    """y is rounded, not truncated, before the product: the error is within the analysis' 2e-3 and far above 1e-5."""
    arguments = block_of(40, width=64, m=32, hidden=64)
    kqv, w, eps, mlp, options, seed = arguments
    k, q, v = kqv.double().chunk(3, dim=-1)
    y, _, _ = aten_attention.attend(q, k, v, w.double(), eps, None)
    exact = aten_mlp.run(y, v, MlpParameters(*(t.double() for t in mlp)), options, seed)
    monkeypatch.setattr(triton_runtime, "allows_tf32", lambda: True)
    out = run(arguments, fused=1)
    assert matrix_units == {"tf32"} and 1e-5 < errors(out, exact)[0] <= 2e-3


def test_what_is_saved_for_backward():
    """kqv, the key state and the statistics are saved; y is not."""
    case, kept = case_of(), {}
    tensors = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in case.tensors.items()}
    inputs = {t.untyped_storage().data_ptr() for t in tensors.values()}
    hook = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), id)
    with hook:
        case.call(**tensors, **case.options, backend="triton")
    shapes = sorted(tuple(t.shape) for place, t in kept.items() if place not in inputs)
    assert shapes == sorted([(2, 20, 48), (2, 8), (2, 8, 16), (2, 5, 4), (2, 5, 4)])


@pytest.mark.slow
def test_one_graph_under_compile():
    """Forward and backward are opaque to the compiler: no graph break, bitwise equal to eager."""
    torch._dynamo.reset()
    case = case_of()
    tensors = {name: t for name, t in case.tensors.items() if name not in ("x", "kqv_weight")}

    def step(x, weight):
        return case.call(x * 1, weight, **tensors, **case.options, backend="triton").sin()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    inputs = [case.tensors[name].clone().requires_grad_() for name in ("x", "kqv_weight")]
    out, expected = compiled(*inputs), step(*inputs)
    assert torch.equal(out, expected)
    found, wanted = (torch.autograd.grad(t.sum(), inputs) for t in (out, expected))
    assert all(torch.equal(gradient, other) for gradient, other in zip(found, wanted, strict=True))
    torch._dynamo.reset()

"""The Triton kernels of soft_split_linear, interpreted: tiles, blocks, strides, rounding, self-test, compilation."""

import warnings
from contextlib import ExitStack

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import t2t_fast
from t2t_fast import backends, functional
from t2t_fast.functional import soft_split_linear
from t2t_fast.ops._common import triton_runtime
from t2t_fast.ops._common.spec import Window, square
from t2t_fast.ops.soft_split_linear.triton import launch, support
from t2t_fast.ops.soft_split_linear.triton import operators as triton_impl
from t2t_fast.ops.soft_split_linear.triton.layout import layout
from t2t_fast.testing import CASES, DTYPES, Case, assert_close, errors, tolerance

REASON = triton_runtime.reason(backends.Request("cpu", torch.float32, {}))
pytest.importorskip("t2t_fast.ops.soft_split_linear.triton.forward", reason="triton is not installed")
pytestmark = [pytest.mark.interpret, pytest.mark.skipif(REASON is not None, reason=f"triton: {REASON}")]


def case_of(channels=16, size=(9, 7), outputs=20, kernel=3, stride=2, padding=1, batch=2, normed=True, offset=0.0):
    """An image, a Linear and its LayerNorm; every tensor requires a gradient."""
    generator = torch.Generator().manual_seed(0)
    columns = channels * functional.window(kernel).taps
    tensors = {
        "x": torch.randn(batch, channels, *size, generator=generator) + offset,
        "weight": torch.randn(outputs, columns, generator=generator) / columns**0.5,
        "bias": torch.randn(outputs, generator=generator),
    }
    options = {"kernel_size": kernel, "stride": stride, "padding": padding}
    if normed:
        tensors["norm_weight"] = 1 + 0.1 * torch.randn(columns, generator=generator)
        tensors["norm_bias"] = 0.1 * torch.randn(columns, generator=generator)
        options["norm_eps"] = 1e-5
    return Case("soft_split_linear", "made up", tensors, options, tuple(tensors))


def check(case, dtype, label=""):
    """Forward and every gradient against the reference in float64."""
    rounded = case.cast(dtype)
    expected, expected_gradients = rounded.cast(torch.float64).run_backward("reference", dtype)
    out, gradients = rounded.run_backward("triton")
    assert_close(out, expected, case.op, "forward", dtype, label)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], case.op, "backward", dtype, f"{label} {name}")


@pytest.fixture
def small_tiles():
    """Tiles of 16 tokens, many splits, one group of outputs per program, in every pass."""
    with ExitStack() as stack:
        for name in launch.PASSES:
            small = {"tokens": 16, "warps": 4, "stages": 2, "block": 16, "parts": 1, "programs": 8, "blocks": 3}
            stack.enter_context(launch.TABLE.override(name, small))
        yield


SIZES = {
    "a partial tile": case_of(),
    "one token": case_of(size=(3, 3), padding=0, batch=1),
    "several blocks of channels": case_of(channels=32, size=(5, 6)),
    "channels that fill no block": case_of(channels=5, size=(6, 6)),
    "several groups of outputs": case_of(outputs=130, size=(5, 5)),
    "outputs that fill a group": case_of(outputs=64, size=(5, 5)),
    "an image in cells": case_of(channels=3, size=(14, 11), kernel=7, stride=4, padding=2),
    "an image gathered": case_of(channels=3, size=(9, 8), batch=1),
    "a large window": case_of(channels=1, size=(13, 11), kernel=9, stride=5, padding=2, batch=1),
    "stride 1": case_of(size=(4, 5), stride=1, batch=1),
    "gaps between windows": case_of(size=(11, 8), kernel=2, stride=3, padding=0),
    "without LayerNorm": case_of(normed=False),
}


HALF = ("a partial tile", "an image in cells", "an image gathered", "without LayerNorm")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "fp32") for name in SIZES] + [(name, dtype) for name in HALF for dtype in ("fp16", "bf16")],
)
def test_tiles_and_blocks(name, dtype):
    check(SIZES[name], DTYPES[dtype], name)


@pytest.mark.parametrize("name", ["a partial tile", "an image in cells", "several groups of outputs"])
def test_default_tiles(name):
    check(SIZES[name], torch.float32, name)


@pytest.mark.parametrize("turned", [0, 1])
@pytest.mark.parametrize("name", ["a partial tile", "an image in cells", "an image gathered", "a small grid"])
def test_blocks_of_the_weights_gradient(name, turned):
    """Several blocks of columns per program, turned or not; tiles of many images, and splits of several tiles."""
    shape = {"tokens": 32, "warps": 4, "stages": 2, "block": 16, "parts": 2, "blocks": 3, "turned": turned}
    case = case_of(size=(5, 3), padding=1, batch=17) if name == "a small grid" else SIZES[name]
    with launch.TABLE.override("weight", {**shape, "programs": 1}):
        check(case, torch.float32, name)


@pytest.mark.parametrize("programs", [1, 1000])
def test_phases_of_the_images_gradient(programs):
    """A window with unequal strides; one program for all phases of a tile, or one for each phase."""
    shape = {"tokens": 16, "warps": 4, "stages": 1, "block": 16, "parts": 2, "programs": programs}
    case = case_of(size=(9, 8), outputs=130, kernel=(5, 3), stride=(3, 2), padding=(2, 1))
    with launch.TABLE.override("image", shape):
        check(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_flat_images_gradient_stays_in_range(dtype):
    """With r = 316, ``r G`` would exceed float16's range; r multiplies the product, in float32."""
    case = case_of(padding=0)
    x = torch.full_like(case.tensors["x"], 0.5).to(dtype).requires_grad_()
    rest = {name: t.to(dtype) for name, t in case.tensors.items() if name != "x"}
    out = soft_split_linear(x, **rest, **case.options, backend="triton")
    upstream = torch.full_like(out, 300.0) * (-1.0) ** torch.arange(out.shape[-1])
    (found,) = torch.autograd.grad(out, x, upstream)
    wide = x.detach().double().requires_grad_()
    out = soft_split_linear(wide, **{n: t.double() for n, t in rest.items()}, **case.options, backend="reference")
    (expected,) = torch.autograd.grad(out, wide, upstream.double())
    scale = torch.finfo(dtype).max
    assert torch.isfinite(found[expected.abs() < scale / 2]).all()
    assert errors(found.clamp(-scale, scale), expected.clamp(-scale, scale))[0] <= tolerance(case.op, "backward", dtype)


@pytest.mark.parametrize("layout", ["channels last", "tokens", "sliced", "turned", "packed"])
def test_any_strides(layout):
    """Any layout is read in place and gives the same output and image gradient."""
    case = case_of(size=(8, 8))
    x = case.tensors["x"]
    views = {
        "channels last": lambda: x.contiguous(memory_format=torch.channels_last),
        "tokens": lambda: x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).unflatten(2, (8, 8)),
        "sliced": lambda: torch.cat([x, x], 3).to(memory_format=torch.channels_last)[..., 8:],
        "turned": lambda: x.transpose(2, 3).contiguous().transpose(2, 3),
        "packed": lambda: torch.stack([x, x], 2)[:, :, 1],
    }
    expected, gradients = case.run_backward("triton")
    view = views[layout]().requires_grad_()
    others = [case.tensors[name] for name in ("weight", "bias")]
    out = soft_split_linear(
        view,
        *others,
        3,
        2,
        1,
        norm_weight=case.tensors["norm_weight"],
        norm_bias=case.tensors["norm_bias"],
        norm_eps=1e-5,
        backend="triton",
    )
    assert_close(out, expected.double(), case.op, "forward", torch.float32)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (found,) = torch.autograd.grad(out, view, upstream.to(out))
    assert_close(found, gradients["x"].double(), case.op, "backward", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 30.0, 1000.0])
def test_autocast_of_a_bright_image(offset, dtype):
    """A float32 image is rounded after subtracting its centre, which costs no more than rounding normalised values."""
    case = case_of(channels=3, size=(19, 19), kernel=7, stride=4, padding=0, offset=offset)
    expected, _ = case.cast(torch.float64).run_backward("reference")
    with torch.autocast("cpu", dtype):
        out = case.run("triton")
    assert out.dtype == dtype
    assert errors(out, expected)[0] <= tolerance(case.op, "forward", dtype)


def statistics(x, window, dtype):
    """Mean and reciprocal standard deviation of every window, from the kernel and in float64."""
    columns = x.shape[1] * window.taps
    _, *found = triton_impl.run(x, torch.ones(8, columns), None, None, None, 1e-5, window, dtype)
    patches = torch.nn.functional.unfold(x.double(), *window[:1], padding=window.padding, stride=window.stride)
    return [t.flatten(1) for t in found], [patches.mean(1), (patches.var(1, correction=0) + 1e-5).rsqrt()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels, window", [(16, square(3, 2, 0)), (3, square(7, 4, 0)), (5, square(3, 2, 0))])
@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4])
def test_statistics_survive_an_offset(offset, channels, window, dtype):
    """The statistics of the rounded image are accurate for any offset."""
    x = (case_of(channels=channels, size=(19, 23)).tensors["x"] + offset).to(dtype)
    for found, exact in zip(*statistics(x, window, dtype), strict=True):
        assert errors(found, exact)[0] <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_statistics_where_the_centre_stands_out(dtype):
    """All values minus the centre are then far from 0, and the variance is small compared with their squares."""
    x, window = torch.zeros(1, 64, 3, 3, dtype=dtype), square(3, 2, 0)
    x[0, 0, 1, 1] = 1000.0
    (mean, rstd), (exact_mean, exact_rstd) = statistics(x, window, dtype)
    allowed = 1e-6 if dtype == torch.float32 else 64 * 9 * torch.finfo(torch.float32).eps
    assert ((mean - exact_mean).abs() * exact_rstd).max() <= 1e-6  # in standard deviations
    assert errors(rstd, exact_rstd)[0] <= allowed
    x[0, 5, 2, 2] = float("nan")
    assert torch.stack(statistics(x, window, dtype)[0]).isnan().all()


LAYOUTS = {
    "tokens": (32, ((3, 3), (2, 2), (1, 1))),
    "cells": (3, ((7, 7), (4, 4), (2, 2))),
    "cells of another height": (4, ((6, 3), (4, 2), (1, 0))),
    "gathered": (5, ((3, 3), (2, 2), (1, 1))),
}


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_every_layout_against_float64(name):
    """Cells times the packed weight is the convolution, for any values in the spare columns."""
    channels, window = LAYOUTS[name]
    found = layout(channels, Window(*window))
    assert (found.cell is None, found.gather) == (not name.startswith("cells"), name == "gathered")
    case = case_of(channels, (13, 12), 20, *(pair for pair in window), normed=False)
    check(case, torch.float32, name)


@pytest.mark.usefixtures("small_tiles")
def test_two_runs_are_equal_bit_by_bit():
    case = case_of(size=(12, 12))
    first, second = (case.run_backward("triton") for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


class Largest(TorchDispatchMode):
    """Records the size of the largest new tensor."""

    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.values = max([self.values, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def test_no_tensor_of_unfolded_width():
    case = case_of(channels=32, size=(24, 24), outputs=16)
    with Largest() as largest:
        case.run_backward("triton")
    assert largest.values <= max(t.numel() for t in case.tensors.values()) < 2 * 12 * 12 * 32 * 9


def test_image_without_gradient():
    """Only the statistics are saved, not the output."""
    case = case_of(channels=3, size=(15, 15), kernel=7, stride=4, padding=2)
    frozen = Case(case.op, case.name, case.tensors, case.options, ("weight", "bias", "norm_weight", "norm_bias"))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _, gradients = frozen.run_backward("triton")
    assert set(gradients) == set(frozen.wants_gradient)
    tokens = 2 * 4 * 4
    own = {t.shape for t in case.tensors.values()}
    assert sum(t.numel() for t in kept if t.shape not in own) == 2 * tokens


@pytest.mark.slow
@pytest.mark.self_test
@pytest.mark.parametrize("dynamic", [False, True])
def test_one_graph_under_compile(dynamic):
    """Forward, backward and self-test are opaque to the compiler: no graph break, bitwise equal to eager."""
    torch._dynamo.reset()
    case = case_of()
    tensors = {name: t.clone().requires_grad_() for name, t in case.tensors.items()}

    def step(x):
        rest = {name: t for name, t in tensors.items() if name != "x"}
        return soft_split_linear(x * 1, **rest, **case.options, backend="triton").sin()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in ((9, 7), (8, 6)):
        x = tensors["x"][..., : size[0], : size[1]].detach().clone().requires_grad_()
        out = compiled(x)
        found = torch.autograd.grad(out.sum(), [x, tensors["weight"]])
        wanted = step(x)
        assert torch.equal(out, wanted)
        for value, expected in zip(found, torch.autograd.grad(wanted.sum(), [x, tensors["weight"]]), strict=True):
            assert torch.equal(value, expected)
    torch._dynamo.reset()


def test_a_second_derivative_is_refused():
    case = case_of(size=(5, 5))
    x = case.tensors["x"].clone().requires_grad_()
    out = soft_split_linear(x, case.tensors["weight"], None, 3, 2, 1, norm_eps=1e-5, backend="triton")
    with pytest.raises(RuntimeError, match=r"no second derivative .* use t2t_fast.backend\('reference'\)"):
        torch.autograd.grad(out.square().sum(), x, create_graph=True)


@pytest.mark.self_test
def test_failing_kernel_is_disabled_with_a_warning(monkeypatch):
    """``auto`` falls back to the next backend, an explicit choice raises with the reason; each kind is tried once."""
    table = backends._tables["soft_split_linear"]
    monkeypatch.setitem(table, "triton", table["triton"]._replace(passed_over=backends.always))
    case = case_of()
    right = case.run("aten")
    monkeypatch.setattr(support, "_tried", lambda *sizes: [t * 2 for t in support._expected(*sizes)])
    with pytest.warns(RuntimeWarning, match="soft_split_linear leaves its Triton kernel: its self-test on cpu gave"):
        out = case.run()
    assert_close(out, right.double(), case.op, "forward", torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case.run()
        with pytest.raises(backends.BackendUnavailable, match="self-test on cpu"):
            case.run("triton")
    assert len(triton_runtime._trials) == 1


def test_layer_runs_on_triton():
    """Triton runs every operator of the Performer layers, from the image on."""
    layer = t2t_fast.modules.T2TModule(token_dim=16, embed_dim=24).eval()
    x = torch.randn(1, 3, 24, 20)
    with t2t_fast.backend("reference"):
        expected = layer.double()(x.double())
    layer.float()
    with t2t_fast.backend("triton", "performer_layer"), t2t_fast.backend("triton", "soft_split_linear"):
        out = layer(x)
    assert_close(out, expected, "performer_layer", "forward", torch.float32)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", ["stage2, LayerNorm", "non-square window, LayerNorm", "batch 0, LayerNorm"])
def test_shared_cases(name, dtype):
    check(next(case for case in CASES["soft_split_linear"]() if case.name == name), DTYPES[dtype], name)


def test_float64_raises():
    with pytest.raises(backends.BackendUnavailable, match="no Triton kernel for float64"):
        case_of().cast(torch.float64).run("triton")


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["a partial tile", "an image in cells"])
def test_float32_in_three_tf32_products(name, dtype, matrix_units):
    """Float32 from three products is within the table's tolerance; float16 needs no TF32, forward or backward."""
    check(SIZES[name], DTYPES[dtype], name)
    assert matrix_units == {"tf32" if dtype == "fp32" else "float16"}


def test_tf32_where_torch_allows_it(matrix_units, monkeypatch):
    """The error is within the analysis' 5e-3 and far above 1e-5."""
    monkeypatch.setattr(triton_runtime, "allows_tf32", lambda: True)
    case = case_of()
    expected, expected_gradients = case.cast(torch.float64).run_backward("reference", torch.float32)
    out, gradients = case.run_backward("triton")
    found = [errors(out, expected)[0], *(errors(gradients[n], e)[0] for n, e in expected_gradients.items())]
    assert matrix_units == {"tf32"} and 1e-5 < max(found) <= 5e-3

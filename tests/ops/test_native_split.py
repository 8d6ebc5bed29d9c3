"""The native soft split, soft composition and fold-normalise-unfold: every layout, window and dtype, any threads."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F

from t2t_fast import functional
from t2t_fast.ops._common import native_library as native
from t2t_fast.testing import DTYPES, WINDOW_CASES, assert_close

pytestmark = pytest.mark.skipif(
    "cpu" not in native.devices("soft_split"),
    reason=f"the native operators cannot run on this CPU: {native._extension.operators_error()}",
)

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "slice": lambda x: F.pad(x, (2, 3, 1, 2), value=float("nan"))[:, :, 1:-2, 2:-3],
    "channels of a channels-last image": lambda x: F.pad(x, (0, 0, 0, 0, 3, 2), value=float("nan")).contiguous(
        memory_format=torch.channels_last
    )[:, 3:-2],
    "every second pixel": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}

TOKEN_LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.mT.contiguous().mT,
    "slice": lambda t: F.pad(t, (1, 2, 3, 1), value=float("nan"))[:, 3:-1, 1:-2],
    "every second column": lambda t: t.repeat_interleave(2, dim=2)[..., ::2],
    "batch last": lambda t: t.permute(1, 2, 0).contiguous().permute(2, 0, 1),
}


def some_windows():
    """The shared cases, several blocks of channels and tiles of columns, and random windows."""
    yield from (pytest.param(*case[1:], id=case[0]) for case in WINDOW_CASES)
    yield pytest.param(1, 130, 9, 12, 7, 3, 3, id="several blocks of channels")
    yield pytest.param(1, 2, 5, 6000, (2, 3), (1, 2), 0, id="several tiles of columns")
    yield pytest.param(1, 40, 7, 1500, (5, 9), (2, 4), (4, 4), id="blocks and tiles")
    yield pytest.param(1, 3, 9, 2000, (1, 2), (3, 7), (2, 3), id="tiles with gaps")
    yield pytest.param(2, 3, 5, 5, 3, 1, 9, id="windows that lie in the padding")
    draw = random.Random(0)
    for index in range(12):
        k, s, p = ([draw.randint(low, 9) for _ in range(2)] for low in (1, 1, 0))
        h, w = (draw.randint(max(1, k[i] - 2 * p[i]), 28) for i in range(2))
        yield pytest.param(draw.randint(1, 2), draw.choice([1, 3, 17, 33]), h, w, k, s, p, id=f"random {index}")


WINDOWS = list(some_windows())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "channels", "height", "width", "k", "s", "p"), WINDOWS)
def test_split_is_exact_in_every_layout(batch, channels, height, width, k, s, p, dtype):
    x = torch.randn(batch, channels, height, width).to(DTYPES[dtype])
    expected = functional.soft_split(x.double(), k, s, p, backend="reference").to(x.dtype)
    for name, layout in LAYOUTS.items():
        image = layout(x)
        assert torch.equal(image, x)
        tokens = functional.soft_split(image, k, s, p, backend="native")
        assert tokens.is_contiguous() and torch.equal(tokens, expected), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["soft_composition", "fused_fold_unfold"])
@pytest.mark.parametrize(("batch", "channels", "height", "width", "k", "s", "p"), WINDOWS)
def test_sums_in_every_layout_and_with_any_number_of_threads(batch, channels, height, width, k, s, p, op, dtype):
    """Within the tolerance of the float64 reference, and bitwise equal for all layouts and numbers of threads."""
    win = functional.window(k, s, p)
    h, w = win.grid(height, width)
    tokens = torch.randn(batch, h * w, channels * win.taps).to(DTYPES[dtype])
    call = getattr(functional, op)
    arguments = ((height, width), *win)
    expected = call(tokens.double(), *arguments, backend="reference")
    first = None
    before = torch.get_num_threads()
    try:
        for threads, (name, layout) in itertools.product((1, 2, 3), TOKEN_LAYOUTS.items()):
            torch.set_num_threads(threads)
            result = call(layout(tokens), *arguments, backend="native")
            if first is None:
                first = result
                assert_close(result, expected, op, "forward", tokens.dtype)
            assert result.is_contiguous() and torch.equal(result, first), f"{name}, {threads} threads"
    finally:
        torch.set_num_threads(before)


def test_expanded_inputs():
    """Strides of 0, as in the gradient of ``sum()``."""
    row = torch.randn(1, 3, 1, 9)
    image = row.expand(2, 3, 8, 9)
    expected = functional.soft_split(image.contiguous(), 3, 2, 1, backend="native")
    assert torch.equal(functional.soft_split(image, 3, 2, 1, backend="native"), expected)
    one = torch.ones(()).expand(2, 20, 27)
    for op in (functional.soft_composition, functional.fused_fold_unfold):
        expected = op(one.contiguous(), (8, 9), 3, 2, 1, backend="native")
        assert torch.equal(op(one, (8, 9), 3, 2, 1, backend="native"), expected)


def test_offsets_beyond_32_bits():
    """Strides of an image and of tokens that need 64 bits."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # otherwise 4 GB would be written
    far = 2**31 + 10
    memory = torch.empty(far + 64, dtype=torch.float16)  # only the touched pages are allocated
    x = memory.as_strided((2, 1, 4, 4), (far, 16, 4, 1))
    x.copy_(torch.randn(2, 1, 4, 4))
    for image in (x, x.transpose(0, 1)):
        expected = functional.soft_split(image.contiguous(), 3, 1, 1, backend="reference")
        assert torch.equal(functional.soft_split(image, 3, 1, 1, backend="native"), expected)
    tokens = memory.as_strided((2, 2, 4), (8, 4, 1), far)
    tokens.copy_(torch.randn(2, 2, 4))
    tokens = memory.as_strided((1, 2, 4), (1, far, 1))
    expected = functional.soft_composition(tokens.contiguous(), (2, 4), 2, 2, backend="native")
    assert torch.equal(functional.soft_composition(tokens, (2, 4), 2, 2, backend="native"), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once_and_to_even(dtype):
    """Every value is preserved, and a sum of two is the rounded exact sum (subnormal, infinite and NaN included)."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    same = functional.soft_composition(values.view(1, -1, 1), (256, 256), 1, backend="native").flatten()
    assert torch.equal(same.isnan(), values.isnan())
    assert torch.equal(same.nan_to_num(), values.nan_to_num())
    scale = torch.exp(8 * torch.randn(1 << 16))
    pairs = torch.stack([torch.randn(1 << 16) * scale, torch.randn(1 << 16) * scale], dim=1).to(dtype)
    sums = functional.soft_composition(pairs.view(1, -1, 2), (1, (1 << 16) + 1), (1, 2), backend="native").flatten()
    exact = pairs[1:, 0].double() + pairs[:-1, 1].double()
    assert torch.equal(sums[1:-1].nan_to_num(), exact.float().to(dtype).nan_to_num())


def test_gradient_has_the_memory_format_of_the_image():
    x = torch.randn(2, 5, 8, 9)
    for order in (torch.contiguous_format, torch.channels_last):
        image = x.clone(memory_format=order).requires_grad_()
        functional.soft_split(image, 3, 2, 1, backend="native").sum().backward()
        assert image.grad.is_contiguous(memory_format=order)
    tokens = torch.randn(2, 72, 5, requires_grad=True)
    functional.soft_split(tokens, 3, 2, 1, grid=(8, 9), backend="native").sum().backward()
    assert tokens.grad.is_contiguous()


OPCHECKS = {
    "soft_split": lambda: (torch.randn(2, 3, 8, 9), [3, 5], [2, 1], [1, 2]),
    "soft_split, tokens": lambda: (torch.randn(2, 72, 3).mT.unflatten(2, (8, 9)), [3, 5], [2, 1], [1, 2]),
    "soft_composition": lambda: (torch.randn(2, 36, 45), [8, 9], [3, 5], [2, 1], [1, 2], False),
    "soft_composition, channels last": lambda: (torch.randn(2, 36, 45), [8, 9], [3, 5], [2, 1], [1, 2], True),
    "fused_fold_unfold": lambda: (torch.randn(2, 36, 45), [8, 9], [3, 5], [2, 1], [1, 2]),
}


@pytest.mark.parametrize("name", OPCHECKS)
def test_opcheck_of_the_native_operator(name):
    """Schema, fake tensors (sizes and strides), AOT dispatch with dynamic shapes."""
    operator = getattr(torch.ops.t2t_fast_native, name.partition(",")[0]).default
    torch.library.opcheck(operator, OPCHECKS[name]())


BAD = {
    "rank": lambda ops: ops.soft_split(torch.randn(3, 8, 8), [3, 3], [1, 1], [0, 0]),
    "pair": lambda ops: ops.soft_split(torch.randn(1, 3, 8, 8), [3], [1, 1], [0, 0]),
    "stride 0": lambda ops: ops.soft_split(torch.randn(1, 3, 8, 8), [3, 3], [0, 1], [0, 0]),
    "window": lambda ops: ops.soft_split(torch.randn(1, 3, 8, 8), [3, 9], [1, 1], [0, 0]),
    "dtype": lambda ops: ops.soft_split(torch.ones(1, 3, 8, 8, dtype=torch.int32), [3, 3], [1, 1], [0, 0]),
    "tokens": lambda ops: ops.soft_composition(torch.randn(1, 5, 9), [8, 8], [3, 3], [2, 2], [1, 1], False),
    "width": lambda ops: ops.fused_fold_unfold(torch.randn(1, 16, 10), [8, 8], [3, 3], [2, 2], [1, 1]),
}


@pytest.mark.parametrize("name", BAD)
def test_native_operators_check_their_arguments(name):
    """Called without the checks of ``t2t_fast.functional``."""
    with pytest.raises(RuntimeError, match=r"t2t_fast_native::\w+: .* must"):
        BAD[name](torch.ops.t2t_fast_native)


class Layers(torch.nn.Module):
    """The three operators in sequence, for static and dynamic sizes."""

    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def forward(self, x):
        size = x.shape[2:]
        tokens = functional.soft_split(x, 3, 2, 1, backend=self.backend)
        tokens = functional.fused_fold_unfold(tokens.sin(), tuple(size), 3, 2, 1, backend=self.backend)
        return functional.soft_composition(tokens.cos(), tuple(size), 3, 2, 1, backend=self.backend)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_in_one_graph(dynamic):
    """Forward and backward equal eager mode; ``auto`` selects native inside the graph."""
    torch._dynamo.reset()
    for backend in ("native", "auto"):
        model = Layers(backend)
        compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for order in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 4, 8, 10).contiguous(memory_format=order)
            eager_x, compiled_x = x.clone().requires_grad_(), x.clone().requires_grad_()
            eager, other = model(eager_x), compiled(compiled_x)
            torch.testing.assert_close(other, eager)
            eager.square().sum().backward()
            other.square().sum().backward()
            torch.testing.assert_close(compiled_x.grad, eager_x.grad)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_exported_program_has_no_native_operator(strict):
    exported = torch.export.export(Layers("auto"), (torch.randn(1, 4, 8, 10),), strict=strict)
    targets = {str(node.target) for node in exported.run_decompositions().graph.nodes if node.op == "call_function"}
    assert targets and not any("native" in target for target in targets)

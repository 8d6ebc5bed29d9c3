"""The CUDA kernels of the soft split, the soft composition and fold-normalise-unfold, on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from support import sanitizer
from t2t_fast import functional
from t2t_fast.ops._common import native_library as native
from t2t_fast.testing import CASES, DTYPES, assert_close

OPERATORS = ("soft_split", "soft_composition", "fused_fold_unfold")

pytestmark = pytest.mark.gpu

STAGE1, STAGE2, FUSEFORMER = functional.window(7, 4, 2), functional.window(3, 2, 1), functional.window(7, 3, 3)


@pytest.fixture(autouse=True)
def native_cuda():
    missing = [name for name in OPERATORS if "cuda" not in native.devices(name)]
    if missing:
        pytest.skip(
            f"no native kernel on CUDA of {', '.join(missing)} (T2T_FAST_BUILD=cuda at installation builds them)"
        )


def split(x, window, **options):
    return functional.soft_split(x, *window, backend="native", **options)


def compose(tokens, size, window):
    return functional.soft_composition(tokens, size, *window, backend="native")


def project(tokens, size, window):
    return functional.fused_fold_unfold(tokens, size, *window, backend="native")


def tokens_for(batch, channels, size, window, dtype=torch.float32, device="cuda"):
    h, w = window.grid(*size)
    return torch.randn(batch, h * w, channels * window.taps, device=device).to(dtype)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("op", OPERATORS)
def test_against_float64(op, dtype):
    """Forward and gradient of every shared case, against the reference in float64 on the CPU."""
    dtype = DTYPES[dtype]
    for case in CASES[op]():
        rounded = case.cast(dtype)
        expected, expected_gradients = rounded.cast(torch.float64).run_backward("reference", dtype)
        out, gradients = rounded.cast(dtype, "cuda").run_backward("native")
        assert_close(out.cpu(), expected, op, "forward", dtype, case.name)
        for name, gradient in gradients.items():
            assert_close(gradient.cpu(), expected_gradients[name], op, "backward", dtype, f"{case.name}: {name}")


LAYOUTS = {
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "slice": lambda x: F.pad(x, (3, 2, 1, 2), value=float("nan"))[:, :, 1:-2, 3:-2],
    "aligned slice": lambda x: F.pad(x, (8, 8, 1, 2), value=float("nan"))[:, :, 1:-2, 8:-8],
    "some channels of channels-last": lambda x: F.pad(x, (0, 0, 0, 0, 8, 8), value=float("nan")).contiguous(
        memory_format=torch.channels_last
    )[:, 8:-8],
    "odd channels of channels-last": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2), value=float("nan")).contiguous(
        memory_format=torch.channels_last
    )[:, 1:-2],
    "every second pixel": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "one image for all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(
    ("channels", "height", "width", "window"),
    [(3, 64, 96, STAGE1), (64, 28, 28, STAGE2), (16, 30, 45, FUSEFORMER), (5, 19, 31, STAGE2)],
    ids=["stage 1", "stage 2", "FuseFormer", "odd"],
)
def test_layouts_of_the_image(channels, height, width, window, layout, dtype):
    x = torch.randn(2, channels, height, width, dtype=torch.float64).to(DTYPES[dtype]).cuda()
    x = LAYOUTS[layout](x)
    expected = F.unfold(x.double(), window.kernel, stride=window.stride, padding=window.padding).transpose(1, 2)
    assert torch.equal(split(x, window).double(), expected)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_tokens_with_a_grid(dtype):
    tokens = torch.randn(2, 20 * 30, 64, device="cuda").to(DTYPES[dtype])
    image = tokens.transpose(1, 2).reshape(2, 64, 20, 30).contiguous()
    assert torch.equal(split(tokens, STAGE2, grid=(20, 30)), split(image, STAGE2))


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize(("channels", "window"), [(3, STAGE1), (64, STAGE2), (40, FUSEFORMER), (97, STAGE1)])
def test_tokens_at_any_address(channels, window, offset, dtype):
    """Unaligned tokens, and both memory formats of the image."""
    size, dtype = (30, 44), DTYPES[dtype]
    tokens = tokens_for(2, channels, size, window, dtype)
    moved = torch.empty(tokens.numel() + offset, dtype=dtype, device="cuda")[offset:].view_as(tokens).copy_(tokens)
    assert torch.equal(compose(moved, size, window), compose(tokens, size, window))
    assert torch.equal(project(moved, size, window), project(tokens, size, window))
    strided = tokens.mT.contiguous().mT
    assert torch.equal(compose(strided, size, window), compose(tokens, size, window))
    one, other = (torch.ops.t2t_fast_native.soft_composition(moved, size, *window, order) for order in (False, True))
    assert one.is_contiguous()
    assert other.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(one, other)


def test_a_window_that_no_tile_holds():
    window, size = functional.window(330, 7, 0), (340, 337)
    x = torch.randn(1, 1, *size, device="cuda")
    tokens = split(x, window)
    assert torch.equal(tokens, F.unfold(x, 330, stride=7).transpose(1, 2))
    assert torch.allclose(compose(tokens, size, window), F.fold(tokens.mT, size, 330, stride=7), rtol=1e-5)
    assert torch.allclose(project(tokens, size, window), tokens, rtol=1e-5)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_a_projection(dtype):
    """It leaves the tokens of a split unchanged up to one rounding, and is idempotent."""
    dtype = DTYPES[dtype]
    x = torch.randn(2, 40, 60, 108, device="cuda").to(dtype)
    tokens = split(x, FUSEFORMER)
    assert_close(project(tokens, (60, 108), FUSEFORMER), tokens, "fused_fold_unfold", "forward", dtype)
    once = project(torch.randn_like(tokens), (60, 108), FUSEFORMER)
    assert_close(project(once, (60, 108), FUSEFORMER), once, "fused_fold_unfold", "forward", dtype)


def run_all(x, size, window):
    tokens = split(x, window)
    return tokens, compose(tokens, size, window), project(tokens * 1.5 + 1, size, window)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(("channels", "size", "window"), [(64, (56, 56), STAGE2), (40, (60, 108), FUSEFORMER)])
def test_results_repeat_bit_by_bit(channels, size, window, dtype):
    """Even while another stream keeps the device busy, and independently of the rest of the batch."""
    x = torch.randn(16, channels, *size, device="cuda").to(DTYPES[dtype])
    expected = run_all(x, size, window)
    noise, other = torch.randn(1024, 1024, device="cuda"), torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(other):
            noise = noise @ noise.sigmoid() / 1024
        for value, first in zip(run_all(x, size, window), expected, strict=True):
            assert torch.equal(value, first)
    for value, first in zip(run_all(x[3:4], size, window), expected, strict=True):
        assert torch.equal(value, first[3:4])
    other.synchronize()


def test_the_current_stream_is_used():
    """A slow stream writes the input first: the result is only right for launches on that stream."""
    x, source = torch.zeros(8, 64, 56, 56, device="cuda"), torch.randn(8, 64, 56, 56, device="cuda")
    expected = run_all(source, (56, 56), STAGE2)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.copy_(source)
        found = run_all(x, (56, 56), STAGE2)
    stream.synchronize()
    for value, wanted in zip(found, expected, strict=True):
        assert torch.equal(value, wanted)


def test_nothing_waits_for_the_device():
    x = torch.randn(2, 64, 56, 56, device="cuda")
    begin, end = torch.cuda.Event(), torch.cuda.Event()
    torch.cuda.synchronize()
    torch.cuda._sleep(500_000_000)
    begin.record()
    run_all(x, (56, 56), STAGE2)
    end.record()
    assert not begin.query()
    torch.cuda.synchronize()


@pytest.mark.parametrize("window", [STAGE2, FUSEFORMER, functional.window(60, 3, 2)], ids=str)
def test_graphs(window):
    """Captured once, replayed with other data."""
    size, channels = (64, 64), 8
    x = torch.randn(2, channels, *size, device="cuda")
    run_all(x, size, window)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_all(x, size, window)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        graph.replay()
        for value, expected in zip(captured, run_all(x, size, window), strict=True):
            assert torch.equal(value, expected)


def test_the_device_of_the_tensor_is_used():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    x = torch.randn(2, 64, 28, 28)
    expected = run_all(x.to("cuda:0"), (28, 28), STAGE2)
    with torch.cuda.device(0):
        found = run_all(x.to("cuda:1"), (28, 28), STAGE2)
        assert torch.cuda.current_device() == 0
    for value, wanted in zip(found, expected, strict=True):
        assert value.device == torch.device("cuda:1")
        assert torch.equal(value.cpu(), wanted.cpu())


@pytest.mark.parametrize("shape", [(0, 3, 32, 32), (2, 0, 32, 32)])
def test_empty(shape):
    x = torch.empty(shape, device="cuda")
    tokens, image, projected = run_all(x, shape[2:], STAGE1)
    assert tokens.shape == projected.shape == (shape[0], 64, shape[1] * 49)
    assert image.shape == shape


def test_more_than_two_billion_elements():
    """Input and output offsets beyond 32 bits: the last image has the same result as alone."""
    batch = 2**31 // (3136 * 147) + 2
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("less than 20 GB of free device memory")
    x = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.float16)
    tokens = split(x, STAGE1)
    assert torch.equal(tokens[-1:], split(x[-1:].clone(), STAGE1))
    image = compose(tokens, (224, 224), STAGE1)
    assert torch.equal(image[-1:], compose(tokens[-1:].clone(), (224, 224), STAGE1))
    last = project(tokens[-1:].clone(), (224, 224), STAGE1)
    assert torch.equal(project(tokens, (224, 224), STAGE1)[-1:], last)


SANITIZED = """
import torch
from t2t_fast import functional
for channels, size, window in [
    (3, (40, 57), (7, 4, 2)), (64, (15, 20), (3, 2, 1)), (8, (15, 24), (7, 3, 3)), (97, (11, 18), (7, 4, 2)),
    (2, (19, 23), (2, 3, 0)), (1, (340, 337), (330, 7, 0)),
]:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for order in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, channels, *size).to(dtype).cuda().contiguous(memory_format=order)
            tokens = functional.soft_split(x, *window, backend="native")
            functional.soft_composition(tokens, size, *window, backend="native")
            functional.fused_fold_unfold(tokens, size, *window, backend="native")
torch.cuda.synchronize()
print("ran to the end")
"""


@pytest.mark.slow
@pytest.mark.parametrize("tool", sanitizer.TOOLS)
def test_compute_sanitizer(tool):
    sanitizer.check(tool, SANITIZED)

"""The Triton kernels on a GPU: parity of every operator, and the attention's tests that are interpreted elsewhere."""

from copy import deepcopy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import t2t_fast
from benchmarks.questions import amp
from support import sanitizer
from t2t_fast import reference, testing
from t2t_fast.errors import BackendUnavailable
from t2t_fast.functional import performer_attention
from t2t_fast.ops._common.launch_table import cut
from t2t_fast.ops.performer_attention.triton.launch import TABLE
from t2t_fast.testing import CASES, DTYPES, assert_close, errors, exact_attention, features, tolerance

HALVES = (torch.float16, torch.bfloat16)
BLOCK = ("add_layer_norm", "layer_norm_linear", "layer_norm_mlp")
OPERATORS = ("performer_attention", "performer_layer", "soft_split_linear", "token_mlp", *BLOCK)

pytestmark = pytest.mark.gpu


def inputs(batch, length, dtype=torch.bfloat16, width=64, m=32, norm=2.0, seed=0):
    """q, k, v that require gradients, w and an upstream gradient, on the GPU; k, q and v are views of one tensor."""
    generator = torch.Generator("cuda").manual_seed(seed)
    packed = torch.randn(batch, length, 3 * width, generator=generator, device="cuda")
    packed[..., : 2 * width] *= norm * width**-0.5
    k, q, v = packed.to(dtype).chunk(3, dim=-1)
    w = features(torch.Generator().manual_seed(0), m, width).cuda()
    grad = torch.randn(batch, length, width, generator=generator, device="cuda").to(dtype)
    return [t.detach().requires_grad_() for t in (q, k, v)], w, grad


def run(leaves, w, grad, eps=1e-8, **options):
    """Output and gradients of q, k, v."""
    y = performer_attention(*leaves, w, eps, **options)
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "fp64"])
@pytest.mark.parametrize("op", OPERATORS)
def test_against_float64(op, dtype):
    """Forward and gradient of every shared case, against the reference in float64 on the CPU."""
    dtype = DTYPES[dtype]
    for case in CASES[op]():
        rounded = case.cast(dtype)
        try:
            out, gradients = rounded.cast(dtype, "cuda").run_backward("triton", dtype)
        except BackendUnavailable as error:  # an option that the kernels do not have
            assert "in the Triton kernels" in str(error)
            continue
        expected, expected_gradients = rounded.cast(torch.float64).run_backward("reference", dtype)
        assert_close(out.cpu(), expected, op, "forward", dtype, case.name)
        for name, gradient in gradients.items():
            assert_close(gradient.cpu(), expected_gradients[name], op, "backward", dtype, f"{case.name}: {name}")


def test_auto_takes_it():
    for dtype in (torch.float32, *HALVES):
        for op in OPERATORS:
            assert t2t_fast.explain(op, device="cuda", dtype=dtype).chosen(op) == "triton"


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("norm", [0.0, 1.0, 2.0, 4.0, 5.0, 6.0, 8.0, 10.0, 16.0, 100.0])
def test_error_against_norm(norm, dtype):
    """Forward and gradients at the length of stage 1, relative to the results without a gate."""
    leaves, w, grad = inputs(2, 3136, dtype, norm=norm)
    found = run(leaves, w, grad)
    wide = [t.detach().double().requires_grad_() for t in leaves]

    def exact(eps):
        y, _ = exact_attention(*wide, w.double(), eps)
        return y.detach(), *torch.autograd.grad(y, wide, grad.double())

    expected, opened = exact(1e-8), exact(0.0)
    for index, (value, wanted) in enumerate(zip(found, expected, strict=True)):
        scale = opened[0].norm() if index == 0 else max(opened[index].norm(), opened[3].norm())
        allowed = tolerance("performer_attention", "backward" if index else "forward", dtype)
        assert value.isfinite().all() and (value.double() - wanted).norm() <= allowed * scale, index


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(
    ("width", "m"), [(16, 8), (32, 16), (64, 64), (96, 40), (128, 32), (128, 128), (256, 128), (64, 300)]
)
def test_widths_and_features(width, m, dtype):
    leaves, w, grad = inputs(2, 333, dtype, width, m, norm=1.0)
    found = run(leaves, w.to(dtype), grad)
    with t2t_fast.backend("reference"):
        expected = run([t.detach().double().requires_grad_() for t in leaves], w.to(dtype).double(), grad.double())
    for index, (value, wanted) in enumerate(zip(found, expected, strict=True)):
        assert_close(value, wanted, "performer_attention", "backward" if index else "forward", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_shift_that_does_not_hold(dtype):
    """The first keys are so long that later weights overflow and the split is streamed again."""
    leaves, w, _ = inputs(2, 1000, dtype)
    with torch.no_grad():
        leaves[1][:, :300] *= 10
    parameters = TABLE.chosen("keys", "any", dtype, 64, 32)
    with TABLE.override("keys", {**parameters, "programs": 0}):  # one split
        y = performer_attention(*leaves, w)
    exact, _ = exact_attention(*(t.detach().double() for t in leaves), w.double())
    assert errors(y, exact)[0] <= tolerance("performer_attention", "forward", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_key_mask(dtype):
    """The same result as without the masked keys, for any values of them; their gradients are 0."""
    leaves, w, grad = inputs(2, 1000, dtype)
    mask = torch.arange(1000, device="cuda") % 3 > 0
    with torch.no_grad():
        leaves[1][:, ~mask], leaves[2][:, ~mask] = torch.nan, torch.inf
    y, d_q, d_k, d_v = run(leaves, w, grad, key_mask=mask.expand(2, -1))
    kept = [leaves[0], *(t.detach()[:, mask].requires_grad_() for t in leaves[1:])]
    expected = run(kept, w, grad)
    for value, wanted in zip((y, d_q, d_k[:, mask], d_v[:, mask]), expected, strict=True):
        assert_close(value, wanted, "performer_attention", "backward", dtype)
    assert not d_k[:, ~mask].any() and not d_v[:, ~mask].any()


def test_a_million_tokens():
    """One sequence is split over the whole GPU and merged; compared with float64 on the same input."""
    leaves, w, _ = inputs(1, 1_000_000)
    splits, _ = cut(1_000_000, 1, 64, torch.cuda.get_device_properties(0).multi_processor_count)
    assert splits > 1
    y = performer_attention(*leaves, w)
    exact, _ = exact_attention(*(t.detach().double() for t in leaves), w.double())
    assert_close(y, exact, "performer_attention", "forward", torch.bfloat16)


def test_offsets_beyond_32_bits():
    """The last of many sequences has the same result as alone."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("less than 40 GB of free device memory")
    batch = 2**31 // (3136 * 192) + 2
    packed = torch.randn(batch, 3136, 192, device="cuda", dtype=torch.bfloat16) / 4
    k, q, v = packed.chunk(3, dim=-1)
    w = features(torch.Generator().manual_seed(0), 32, 64).cuda()
    y = performer_attention(q, k, v, w)
    alone = performer_attention(q[-1:], k[-1:], v[-1:], w)
    assert_close(y[-1:], alone.double(), "performer_attention", "forward", torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("batch", "length"), [(16, 3136), (1, 50_000)])
def test_results_repeat_bit_by_bit(batch, length, dtype):
    """Even while another stream keeps the device busy; the gradient of w is included."""
    leaves, w, grad = inputs(batch, length, dtype)
    leaves = [*leaves, w.requires_grad_()]

    def everything():
        y = performer_attention(*leaves)
        return y, *torch.autograd.grad(y, leaves, grad)

    expected = everything()
    noise, other = torch.randn(1024, 1024, device="cuda"), torch.cuda.Stream()
    for _ in range(10):
        with torch.cuda.stream(other):
            noise = noise @ noise.sigmoid() / 1024
        for value, first in zip(everything(), expected, strict=True):
            assert torch.equal(value, first)
    other.synchronize()


def test_the_current_stream_is_used():
    """A slow stream writes the input first: the result is only right for launches on that stream."""
    leaves, w, grad = inputs(4, 784)
    expected = run(leaves, w, grad)
    late = [torch.zeros_like(t).requires_grad_() for t in leaves]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        with torch.no_grad():
            for empty, full in zip(late, leaves, strict=True):
                empty.copy_(full)
        found = run(late, w, grad)
    stream.synchronize()
    for value, wanted in zip(found, expected, strict=True):
        assert torch.equal(value, wanted)


def test_nothing_waits_for_the_device():
    leaves, w, grad = inputs(4, 784)
    run(leaves, w, grad)
    begin, end = torch.cuda.Event(), torch.cuda.Event()
    torch.cuda.synchronize()
    torch.cuda._sleep(500_000_000)
    begin.record()
    run(leaves, w, grad)
    end.record()
    assert not begin.query()
    torch.cuda.synchronize()


def test_graphs():
    """Forward and backward are captured once and replayed with other data."""
    leaves, w, grad = inputs(4, 784)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(leaves, w, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(leaves, w, grad)
    for seed in range(1, 4):
        fresh, _, other = inputs(4, 784, seed=seed)
        with torch.no_grad():
            for leaf, values in zip((*leaves, grad), (*fresh, other), strict=True):
                leaf.copy_(values)
        graph.replay()
        for value, expected in zip(captured, run(fresh, w, other), strict=True):
            assert torch.equal(value, expected)


def test_the_device_of_the_tensor_is_used():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    leaves, w, grad = inputs(2, 784)
    expected = run(leaves, w, grad)
    with torch.cuda.device(0):
        moved = [t.detach().to("cuda:1").requires_grad_() for t in leaves]
        found = run(moved, w.to("cuda:1"), grad.to("cuda:1"))
        assert torch.cuda.current_device() == 0
    for value, wanted in zip(found, expected, strict=True):
        assert value.device == torch.device("cuda:1")
        assert torch.equal(value.cpu(), wanted.cpu())


def test_peak_memory():
    """Forward and backward allocate their results and a few key states, but no other wide tensor of token length."""
    leaves, w, grad = inputs(64, 3136)
    run(leaves, w, grad)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = run(leaves, w, grad)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= 1.15 * sum(t.nbytes for t in found)


@pytest.mark.slow
def test_one_graph_under_compile():
    leaves, w, grad = inputs(4, 784)
    expected = run(leaves, w, grad)
    compiled = torch.compile(lambda q, k, v: performer_attention(q, k, v, w), fullgraph=True)
    y = compiled(*leaves)
    for value, wanted in zip((y, *torch.autograd.grad(y, leaves, grad)), expected, strict=True):
        assert torch.equal(value, wanted)


def test_activation_checkpointing():
    leaves, w, grad = inputs(4, 784)
    y = checkpoint(lambda *t: performer_attention(*t, w), *leaves, use_reentrant=False)
    for value, wanted in zip((y, *torch.autograd.grad(y, leaves, grad)), run(leaves, w, grad), strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("gain", [1.0, 2.0, 4.0])
def test_the_module_under_autocast(gain, dtype):
    """With large weights of k, q and v, as after training: within tolerance, while upstream's float16 is not finite."""
    upstream = amp._module(gain).cuda()
    swapped = deepcopy(upstream)
    t2t_fast.swap(swapped)
    images = testing.natural_images(2, 3, 224, 224).cuda()
    gradient = torch.randn(2, 196, 384, generator=torch.Generator().manual_seed(1)).cuda()
    truth, _ = amp._run(deepcopy(upstream).double(), images, gradient, "cuda", torch.float64)
    out, gradients = amp._run(swapped, images, gradient, "cuda", dtype)
    assert errors(out, truth)[0] <= tolerance("t2t_module", "forward", dtype)
    assert all(g.isfinite().all() for g in gradients.values())
    if dtype == torch.float16 and gain > 1:
        assert not amp._run(upstream, images, gradient, "cuda", dtype)[0].isfinite().all()


def test_a_swapped_model_uses_it():
    model = reference.t2t_vit_7().cuda().eval()
    report = t2t_fast.swap(model)
    assert {row.backend for row in report.rows if row.target == "TokenPerformer"} == {"triton"}
    assert t2t_fast.verify(model, testing.natural_images(2, 3, 224, 224)).ok


SANITIZED = """
import torch
from t2t_fast.errors import BackendUnavailable
from t2t_fast.functional import performer_attention
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    for batch, length, width, m in ((2, 77, 64, 32), (1, 1, 32, 16), (1, 1500, 96, 40), (3, 130, 10, 5)):
        for masked in (False, True):
            packed = (torch.randn(batch, length, 3 * width) / 4).to(dtype).cuda()
            leaves = [t.detach().requires_grad_() for t in packed.chunk(3, dim=-1)]
            w = torch.randn(m, width).cuda().requires_grad_()
            mask = (torch.arange(length) % 3 > 0).expand(batch, -1).cuda() if masked else None
            performer_attention(*leaves, w, key_mask=mask, backend="triton").sum().backward()
torch.cuda.synchronize()
print("ran to the end")
"""


@pytest.mark.slow
@pytest.mark.parametrize("tool", sanitizer.TOOLS)
def test_compute_sanitizer(tool):
    sanitizer.check(tool, SANITIZED)

"""The native layers on the CPU: every instruction set, every division of the work, memory, strides."""

import pytest
import torch

from t2t_fast import backends
from t2t_fast.errors import BackendUnavailable
from t2t_fast.functional import performer_attention, performer_layer, soft_split_linear, token_mlp
from t2t_fast.ops._common import native_library as native
from t2t_fast.testing import CASES, Case, assert_close, errors, features, token_mlp_parameters

OPS = ["soft_split_linear", "performer_attention", "token_mlp", "performer_layer"]
INSTRUCTION_SETS = ["avx512", "avx2", "baseline"]
REASON = native.reason(backends.Request("cpu", torch.float32, {}), native.devices("performer_layer"))

pytestmark = pytest.mark.skipif(REASON is not None, reason=f"native: {REASON}")


@pytest.fixture
def instruction_set(request):
    """Run the test with the kernels of one instruction set."""
    use = torch.ops.t2t_fast_native.cpu_instruction_set
    before = use()
    try:
        use(request.param)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    yield request.param
    use(before)


@pytest.fixture
def threads():
    """A function that sets the number of threads, which is restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("op", OPS)
def test_every_instruction_set_is_right(op, instruction_set):
    """All cases, forward and gradients; each set has its own tile edges and remainders."""
    for index, case in enumerate(CASES[op]()):
        try:
            out, gradients = case.run_backward("native")
        except BackendUnavailable as error:  # an option that the native kernels do not have
            assert index > 0 and "in the native kernels" in str(error)
            continue
        expected, expected_gradients = case.cast(torch.float64).run_backward("reference", torch.float32)
        assert_close(out, expected, op, "forward", torch.float32, case.name)
        for name, gradient in gradients.items():
            assert_close(gradient, expected_gradients[name], op, "backward", torch.float32, f"{case.name}: {name}")


def layer_case(batch, height, width, channels=5, drop=0.1, embed=16):
    """``performer_layer`` with k3 s2 p1 and dropout; every tensor requires a gradient."""
    generator = torch.Generator().manual_seed(batch * height + width)
    columns = channels * 9
    tensors = {
        "x": torch.randn(batch, channels, height, width, generator=generator),
        "kqv_weight": torch.randn(3 * embed, columns, generator=generator) * 2 / (columns * embed) ** 0.5,
        "kqv_bias": torch.randn(3 * embed, generator=generator) * 0.05,
        "norm1_weight": torch.rand(columns, generator=generator) + 0.5,
        "norm1_bias": torch.randn(columns, generator=generator) * 0.1,
        "w": features(generator, 8, embed),
        **token_mlp_parameters(generator, embed, norm="norm2"),
    }
    options = {"kernel_size": 3, "stride": 2, "padding": 1, "proj_drop": drop, "mlp_drop": drop}
    return Case("performer_layer", "layer", {**tensors, "seed": torch.tensor(5)}, options, tuple(tensors))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_division_of_work_changes_only_rounding(batch, count, threads):
    """Whole images per worker, images divided among workers, both in one call; halos in the image's gradient."""
    case = layer_case(batch, 41, 38)
    expected, expected_gradients = case.cast(torch.float64).run_backward("reference", torch.float32)
    threads(count)
    out, gradients = case.run_backward("native")
    again, again_gradients = case.run_backward("native")
    assert torch.equal(out, again), "two runs differ"
    assert_close(out, expected, case.op, "forward", torch.float32)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, again_gradients[name]), f"{name}: two runs differ"
        assert_close(gradient, expected_gradients[name], case.op, "backward", torch.float32, name)


def test_more_workers_than_rows(threads):
    """One row of tokens for eight workers: some have neither tokens nor pixels."""
    case = layer_case(1, 2, 1100, drop=0.0)
    expected, expected_gradients = case.cast(torch.float64).run_backward("reference", torch.float32)
    threads(8)
    out, gradients = case.run_backward("native")
    assert_close(out, expected, case.op, "forward", torch.float32)
    assert_close(gradients["x"], expected_gradients["x"], case.op, "backward", torch.float32)


STRIDED = {
    "sliced": lambda x: torch.cat([x, x], 1).repeat(1, 1, 2, 2)[:, ::2, 1:-3:2, 2::2],
    "expanded batch": lambda x: x[:1].expand(3, -1, -1, -1),
    "expanded row": lambda x: x[:, :, :1].expand(-1, -1, 9, -1),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
    "one of more channels": lambda x: x.permute(0, 2, 3, 1).repeat(1, 1, 1, 2)[..., :4].permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
def test_image_of_any_strides(view):
    generator = torch.Generator().manual_seed(0)
    x = view(torch.randn(2, 4, 9, 12, generator=generator))
    weight = torch.randn(7, 36, generator=generator)

    def gradients(x, weight, backend):
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        out = soft_split_linear(x, weight, None, 3, 2, 1, norm_eps=1e-5, backend=backend)
        out.backward(torch.ones_like(out).cumsum(1))
        return out.detach(), x.grad, weight.grad

    for value, expected in zip(
        gradients(x, weight, "native"), gradients(x.double(), weight.double(), "reference"), strict=True
    ):
        assert errors(value, expected)[1] <= 2e-5


def test_tokens_with_gaps_between_rows():
    """Slices of a wider tensor, and a tensor whose last dimension is not the innermost."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 70, 3, 24, generator=generator)
    y, v = wide[:, ::2, 0], wide[:, ::2, 2]
    mlp = token_mlp_parameters(generator, 24)
    expected = token_mlp(y.contiguous(), v.contiguous(), **mlp, backend="native")
    assert torch.equal(token_mlp(y, v, **mlp, backend="native"), expected)
    across = y.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(token_mlp(across, v, **mlp, backend="native"), expected)


def test_attention_with_different_query_and_key_lengths(threads):
    """One of the two lengths may be smaller than the number of workers."""
    generator = torch.Generator().manual_seed(0)
    w = features(generator, 8, 16)
    threads(4)
    for queries, keys in [(1, 3000), (3000, 1), (2000, 517)]:
        q, k, v = (torch.randn(1, n, 16, generator=generator) / 2 for n in (queries, keys, keys))
        leaves = [t.requires_grad_() for t in (q, k, v, w)]
        wide = [t.detach().double().requires_grad_() for t in leaves]
        # with a single key the gradients of q, k and w are only significant with a half-open gate
        out = performer_attention(*leaves, eps=0.1, backend="native")
        expected = performer_attention(*wide, eps=0.1, backend="reference")
        assert_close(out, expected, "performer_attention", "forward", torch.float32)
        found = torch.autograd.grad(out.sum(), leaves)
        for gradient, truth in zip(found, torch.autograd.grad(expected.sum(), wide), strict=True):
            assert errors(gradient, truth)[0] <= 2e-5
        w = w.detach()


def test_nan_stays_in_its_sample():
    """NaN in one sample does not reach the others, whichever worker computes it."""
    case = layer_case(3, 21, 20, drop=0.0)
    clean = case.run("native")
    poisoned = case.tensors["x"].clone()
    poisoned[1, 0, 3, 3] = float("nan")
    out = performer_layer(**{**case.tensors, "x": poisoned}, **case.options, backend="native")
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


def test_backward_keeps_neither_kqv_nor_the_unfolded_tokens():
    """Besides inputs and output, m (E + 1) floats per sample are saved."""
    case = layer_case(2, 31, 30)
    inputs = {t.untyped_storage().data_ptr() for t in case.tensors.values()}
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    tensors = {name: t.requires_grad_(name in case.wants_gradient) for name, t in case.tensors.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        performer_layer(**tensors, **case.options, backend="native")
    assert sum(size for where, size in kept.items() if where not in inputs) == 2 * 8 * (16 + 1) * 4


WRONG = {
    "length of v": lambda ops, t, w: ops.performer_attention(t, t, t[:, :3], w, 1e-8),
    "width of k": lambda ops, t, w: ops.performer_attention(t, t[..., :4], t, w, 1e-8),
    "width of w": lambda ops, t, w: ops.performer_attention(t, t, t, w[:, :4], 1e-8),
    "no keys": lambda ops, t, w: ops.performer_attention(t, t[:, :0], t[:, :0], w, 1e-8),
    "dtype": lambda ops, t, w: ops.performer_attention(t, t, t.double(), w, 1e-8),
    "rank": lambda ops, t, w: ops.performer_attention(t[0], t[0], t[0], w, 1e-8),
    "weight": lambda ops, t, w: ops.soft_split_linear(
        t.unsqueeze(1), w, None, None, None, None, (3, 3), (1, 1), (1, 1)
    ),
    "window": lambda ops, t, w: ops.soft_split_linear(
        t.unsqueeze(1), w, None, None, None, None, (9, 9), (1, 1), (0, 0)
    ),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_native_operators_check_their_arguments(call):
    """Without the checks of ``t2t_fast.functional`` the operators refuse arguments that would read out of bounds."""
    with pytest.raises(RuntimeError, match="t2t_fast_native::"):
        call(torch.ops.t2t_fast_native, torch.randn(2, 5, 8), torch.randn(4, 8))

"""The native layers on the CPU: every instruction set, every division of the work, memory, strides."""

import pytest
import torch

from t2t_fast import backends
from t2t_fast.errors import BackendUnavailable
from t2t_fast.functional import performer_attention, performer_layer, soft_split_linear, token_mlp
from t2t_fast.ops._common import native_library as native
from t2t_fast.testing import (
    CASES,
    Case,
    assert_close,
    errors,
    features,
    token_mlp_parameters,
    transformer_block_parameters,
)

OPS = ["soft_split_linear", "performer_attention", "token_mlp", "performer_layer"]
INSTRUCTION_SETS = ["avx512", "avx2", "baseline"]
# of a block's products; the first one multiplies bfloat16, the others convert it to float32
BLOCK_SETS = [(each, bf16) for bf16 in (False, True) for each in (["avx512_bf16"] * bf16 + INSTRUCTION_SETS)]
over_block_sets = pytest.mark.parametrize(
    "instruction_set", BLOCK_SETS, indirect=True, ids=lambda given: f"{given[0]}-{'bf16' if given[1] else 'fp32'}"
)
REASON = native.reason(backends.Request("cpu", torch.float32, {}), native.devices("performer_layer"))

pytestmark = pytest.mark.skipif(REASON is not None, reason=f"native: {REASON}")


@pytest.fixture
def instruction_set(request):
    """Run the test with the kernels of one instruction set, of a given kind of products or of float32."""
    use = torch.ops.t2t_fast_native.cpu_instruction_set
    name, bf16 = request.param if isinstance(request.param, tuple) else (request.param, False)
    before = use("", bf16)
    try:
        use(name, bf16)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    yield request.param
    use(before, bf16)


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


@over_block_sets
def test_every_instruction_set_is_right_for_blocks(instruction_set):
    """All cases, forward and gradients, with products of float32 and of bfloat16."""
    dtype = torch.bfloat16 if instruction_set[1] else torch.float32
    for case in CASES["transformer_block"]():
        case = case.cast(dtype)
        out, gradients = case.run_backward("native")
        expected, expected_gradients = case.cast(torch.float64).run_backward("reference", dtype)
        assert_close(out, expected, case.op, "forward", dtype, case.name)
        for name, gradient in gradients.items():
            assert_close(gradient, expected_gradients[name], case.op, "backward", dtype, f"{case.name}: {name}")


def test_one_instruction_set_after_another():
    """Packed weights have the layout of an instruction set: each has its own among the kept ones."""
    use = torch.ops.t2t_fast_native.cpu_instruction_set
    case = CASES["transformer_block"]()[1]
    for dtype in (torch.float32, torch.bfloat16):
        rounded, bf16 = case.cast(dtype), dtype == torch.bfloat16
        before = use("", bf16)
        try:
            expected = rounded.run("native")
            for name in ("baseline", before, "baseline"):
                use(name, bf16)
                out = rounded.run("native")
                assert_close(out, expected.double(), case.op, "forward", dtype)
                assert torch.equal(out, expected) or name != before
        finally:
            use(before, bf16)


def block_case(batch, length, width=36, heads=3, hidden=40):
    """``transformer_block`` with stochastic depth; every tensor requires a gradient."""
    generator = torch.Generator().manual_seed(batch * length)
    tensors = {"x": torch.randn(batch, length, width, generator=generator)}
    tensors |= transformer_block_parameters(generator, width, hidden)
    options = {"heads": heads, "drop_path1": 0.2, "drop_path2": 0.2}
    return Case("transformer_block", "block", {**tensors, "seed": torch.tensor(5)}, options, tuple(tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("batch", "length"),
    [
        (1, 1),
        (1, 120),
        (2, 103),
        (5, 37),
        pytest.param(3, 600, marks=pytest.mark.xfail(reason="a group of long images is as large as the workers")),
    ],
)
def test_a_block_is_the_same_for_any_number_of_threads(batch, length, dtype, threads):
    """Bit for bit, output and gradients: nothing is added up by worker."""
    case = block_case(batch, length).cast(dtype)
    threads(1)
    out, gradients = case.run_backward("native")
    for count in (2, 3, 7):
        threads(count)
        other, other_gradients = case.run_backward("native")
        assert torch.equal(other, out), count
        for name, gradient in gradients.items():
            assert torch.equal(other_gradients[name], gradient), (count, name)


def test_a_block_without_tokens(threads):
    """An empty result, and gradients of 0, as the reference's."""
    threads(3)
    for shape in ((2, 0), (0, 0)):
        case = block_case(*shape)
        out, gradients = case.run_backward("native")
        expected, expected_gradients = case.run_backward("reference")
        assert out.shape == expected.shape
        assert all(torch.equal(gradient, expected_gradients[name]) for name, gradient in gradients.items())


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


NUMBERS = 0.5, 1e-5, 1e-5  # scale and eps of a block


def packed(t, back=False):
    """The four Linears of a block with tokens t and 12 hidden units."""
    width = t.shape[-1]
    shapes = (3 * width, width), (width, width), (12, width), (width, 12)
    operator = torch.ops.t2t_fast_native.pack_linear
    return [operator(torch.ones(shape), None, None, None, False, back) for shape in shapes]


def backward_of(ops, t, spoil, needed=(1, 1, 1, 1), grad=None):
    """The backward operator of a block, with spoilt saved tensors."""
    _, *saved = ops.transformer_block(t, *packed(t), 2, 12, *NUMBERS, None, False, True)
    arguments = t, *packed(t, True), 2, 12, *NUMBERS, None, False
    return ops.transformer_block_backward(t if grad is None else grad, *arguments, *spoil(saved), list(needed))


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
    "packed weight": lambda ops, t, w: ops.transformer_block(t, w, *packed(t)[1:], 2, 12, *NUMBERS, None, False, True),
    "heads": lambda ops, t, w: ops.transformer_block(t, *packed(t), 3, 12, *NUMBERS, None, False, True),
    "no heads": lambda ops, t, w: ops.transformer_block(t, *packed(t), 0, 12, *NUMBERS, None, False, True),
    "hidden": lambda ops, t, w: ops.transformer_block(t, *packed(t), 2, 700, *NUMBERS, None, False, True),
    "factors": lambda ops, t, w: ops.transformer_block(t, *packed(t), 2, 12, *NUMBERS, w, False, True),
    "tokens": lambda ops, t, w: ops.transformer_block(t[0], *packed(t), 2, 12, *NUMBERS, None, False, True),
    "pack_linear": lambda ops, t, w: ops.pack_linear(w, w[0], None, None, False, False),
    "saved": lambda ops, t, w: ops.transformer_block_backward(
        t, t, *packed(t, True), 2, 12, *NUMBERS, None, False, t, t, t, t, t, [1, 1, 1, 1]
    ),
    "saved dtype": lambda ops, t, w: backward_of(ops, t, lambda saved: [each.double() for each in saved]),
    "saved strides": lambda ops, t, w: backward_of(ops, t, lambda saved: [each.mT.contiguous().mT for each in saved]),
    "needed": lambda ops, t, w: backward_of(ops, t, lambda saved: saved, needed=[1]),
    "incoming gradient": lambda ops, t, w: backward_of(ops, t, lambda saved: saved, grad=t[:, 1:]),
    "window": lambda ops, t, w: ops.soft_split_linear(
        t.unsqueeze(1), w, None, None, None, None, (9, 9), (1, 1), (0, 0)
    ),
}


def test_the_operators_of_a_block_accept_right_arguments():
    """Those of :data:`WRONG`, unspoilt."""
    backward_of(torch.ops.t2t_fast_native, torch.randn(2, 5, 8), lambda saved: saved)


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_native_operators_check_their_arguments(call):
    """Without the checks of ``t2t_fast.functional`` the operators refuse arguments that would read out of bounds."""
    with pytest.raises(RuntimeError, match="t2t_fast_native::"):
        call(torch.ops.t2t_fast_native, torch.randn(2, 5, 8), torch.randn(4, 8))

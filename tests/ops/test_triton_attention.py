"""The Triton kernels of Performer attention, interpreted: cuts, shifts, roundings, self-test, compilation."""

import warnings
from contextlib import ExitStack

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import t2t_fast
from t2t_fast import backends, functional
from t2t_fast.errors import BackendUnavailable
from t2t_fast.functional import performer_attention
from t2t_fast.ops import triton_runtime
from t2t_fast.ops.launch import cut
from t2t_fast.ops.performer_attention import aten_impl, triton_impl
from t2t_fast.ops.performer_attention.launch import TABLE
from t2t_fast.testing import CASES, DTYPES, Case, assert_close, errors, exact_attention, features, tolerance

REASON = triton_runtime.reason(backends.Request("cpu", torch.float32, {}), triton_impl.DTYPES)
kernels = pytest.importorskip("t2t_fast.ops.performer_attention.kernels", reason="triton is not installed")
pytestmark = [pytest.mark.interpret, pytest.mark.skipif(REASON is not None, reason=f"triton: {REASON}")]

T2T = CASES["performer_attention"]()[0]


def case_of(length, keys=None, width=16, m=8, batch=1, norm=2.0, eps=1e-8, mask=None):
    """q and k of a norm, every tensor wanting a gradient."""
    generator = torch.Generator().manual_seed(length)
    q, k, v = (
        torch.randn(batch, tokens, width, generator=generator) * std
        for tokens, std in ((length, norm / width**0.5), (keys or length, norm / width**0.5), (keys or length, 1.0))
    )
    tensors = {"q": q, "k": k, "v": v, "w": features(generator, m, width)}
    wants = tuple(tensors)
    if mask is not None:
        tensors["key_mask"] = mask
    return Case("performer_attention", "made up", tensors, {"eps": eps}, wants)


def check(case, dtype, label=""):
    """Forward and every gradient against the reference in float64."""
    rounded = case.cast(dtype)
    expected, expected_gradients = rounded.cast(torch.float64).run_backward("reference", dtype)
    out, gradients = rounded.run_backward("triton")
    assert_close(out, expected, case.op, "forward", dtype, label)
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], case.op, "backward", dtype, f"{label} {name}")


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
    """Tiles that end early, one split and several, and a merge; gradients too."""
    splits, tiles = cut(length, 1, 16, 32)
    assert (splits > 1) == (length > 16) and (splits - 1) * tiles * 16 < length <= splits * tiles * 16
    # one token attends to itself: only a half-open gate gives q, k and w a gradient worth comparing
    check(case_of(length, eps=0.1 if length == 1 else 1e-8), DTYPES[dtype])


@pytest.fixture
def chunks(small_tiles):
    """Besides, features in chunks of 16, in every pass."""
    with ExitStack() as stack:
        for name in TABLE.passes:
            small = TABLE.chosen(name, "cpu", torch.float32, 16, 16)
            stack.enter_context(TABLE.override(name, {**small, "features": 16}))
        yield


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("length", "m"), [(1, 33), (97, 16), (97, 40), (70, 48)])
def test_features_in_chunks(length, m, dtype):
    """One chunk and several, the last one partly filled, more chunks than tiles and fewer; every gradient."""
    check(case_of(length, m=m, batch=2, eps=0.1 if length == 1 else 1e-8), DTYPES[dtype])


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_chunks_with_masks_and_a_gradient_of_the_features_or_none(dtype):
    """Without a gradient for w one program does a split's keys; the numbers are the same bits."""
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
    """A running maximum over chunks: the gate still takes all to 0 without a NaN."""
    check_at_norm(norm, DTYPES[dtype])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("queries", "keys"), [(3, 40), (40, 3)])
def test_queries_and_keys_of_different_number(queries, keys):
    check(case_of(queries, keys, batch=2), torch.float32)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_masks_that_empty_whole_splits(dtype):
    """The first tiles, a middle and the last one without a key; one sample keeps a single key."""
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[0, :20] = mask[0, 32:48] = mask[0, 64:] = False
    mask[1] = torch.arange(70) == 37
    check(case_of(70, batch=2, mask=mask), DTYPES[dtype])


WIDTHS = [(32, 16), (64, 64), (96, 40), (128, 128), (256, 16), (256, 70), (7, 100), (16, 300), (1, 1)]


@pytest.mark.parametrize(("width", "m"), WIDTHS)
def test_widths_and_features(width, m):
    """Sizes of the matrix instructions and what is padded up to them; at once and in chunks, as by default."""
    check(case_of(20, width=width, m=m, norm=1.0, eps=0.1), torch.float32)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("norm", [0.0, 1.0, 5.0, 10.0, 100.0])
def test_gradients_at_any_norm(norm, dtype):
    check_at_norm(norm, DTYPES[dtype])


def check_at_norm(norm, dtype):
    """Errors relative to the problem without a gate, since the gate takes all to 0; upstream's are NaN in float16."""
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
    """The first tile's keys lie far out, so that later weights would leave every range: streamed again, still right."""
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
    """Values of 1 come out as the gate, which is 1 here: rounding of weights and of their sum cancel exactly."""
    case = case_of(150, width=64, m=32).cast(torch.float16)
    case.tensors["v"].fill_(1)
    assert (case.run("triton") == 1).all()


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["T2T stage 3", "norm 4", "one token"])
def test_float32_in_three_tf32_products(name, dtype, matrix_units):
    """What runs in TF32 stays within the table's tolerance: float32 by three products, float16's gradients by one."""
    case = next(case for case in CASES["performer_attention"]() if case.name == name)
    check(case, DTYPES[dtype], name)
    assert matrix_units == ({"tf32x3"} if dtype == "fp32" else {"float16", "tf32"})


@pytest.mark.parametrize("name", ["T2T stage 3", "norm 4"])
def test_tf32_where_torch_allows_it(name, matrix_units, monkeypatch):
    """Operands rounded rather than cut wherever they are made here: within the error analysis' 5e-3, far above 1e-5."""
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
    """Under autocast w stays float32 and enters in two parts: rounding it would cost far more at a large norm."""
    case = case_of(60, width=64, m=32, norm=20.0, eps=0.0)
    q, k, v = (case.tensors[name].half() for name in ("q", "k", "v"))
    w = case.tensors["w"]
    exact, _ = exact_attention(*(t.double() for t in (q, k, v, w)), 0.0)
    ours = errors(performer_attention(q, k, v, w, 0.0, backend="triton"), exact)[0]
    rounded, _ = exact_attention(*(t.double() for t in (q, k, v, w.half())), 0.0)
    assert ours <= tolerance(case.op, "forward", torch.float16) and errors(rounded, exact)[0] > 3 * ours


def test_autocast_runs_the_kernels_in_its_dtype():
    q, k, v, w = T2T.tensors.values()
    with torch.autocast("cpu", torch.bfloat16):
        out = performer_attention(q, k, v, w, backend="triton")
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, performer_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), w, backend="triton"))


@pytest.mark.parametrize("heads", [None, 2])
def test_packed_views_are_read_in_place(heads):
    """k, q, v of one tensor, heads side by side or not, through their strides alone."""
    packed = torch.randn(2, 30, 3, 32) / 2
    k, q, v = (part if heads is None else part.unflatten(-1, (heads, 16)).transpose(1, 2) for part in packed.unbind(2))
    w = features(torch.Generator().manual_seed(0), 8, k.shape[-1])
    assert all(triton_impl._readable(t)[0] is t for t in (q, k, v))
    out = performer_attention(q, k, v, w, backend="triton")
    expected = performer_attention(*(t.contiguous() for t in (q, k, v)), w, backend="triton")
    assert torch.equal(out, expected)


class NewTensors(TorchDispatchMode):
    """Remembers every tensor that an operation made."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.made.update((t.data_ptr(), t) for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        return out


class NotLaunched:
    """A kernel that does nothing; the interpreter copies what a GPU reads in place."""

    def __getitem__(self, grid):
        return lambda *arguments, **constants: None


def test_no_wide_tensor_of_token_length_and_what_is_saved(monkeypatch):
    """Forward and backward in float16: all that grows with the tokens is y, dq, dk and dv; the key state is kept."""
    length, width, m = 331, 64, 32
    q, k, v, grad = torch.randn(4, 2, length, width).half()
    w = features(torch.Generator().manual_seed(0), m, width)
    with monkeypatch.context() as patch:
        for name in ("keys", "merge", "queries", "queries_backward", "keys_backward"):
            patch.setattr(kernels, f"{name}_kernel", NotLaunched())
        with NewTensors() as mode:
            _, lz, state = triton_impl._forward(q, k, v, w, 1e-8, None)
            triton_impl._backward(grad, q, k, v, w, 1e-8, None, lz, state, True)
    assert [t.dtype for t in mode.made.values() if t.shape == q.shape] == [torch.float16] * 4
    assert not [t.shape for t in mode.made.values() if t.dtype == torch.float32 and length in t.shape]
    kept = []
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        performer_attention(*leaves, w, backend="triton")
    own = {t.untyped_storage().data_ptr() for t in (*leaves, w)}
    assert sum(t.nbytes for t in kept if t.untyped_storage().data_ptr() not in own) == 2 * 4 * m * (width + 1)


def test_strides_beyond_32_bits_are_copied_away(monkeypatch):
    expected, _ = T2T.run_backward("triton")
    monkeypatch.setattr(triton_runtime, "OFFSET_LIMIT", 1000)
    out, _ = T2T.run_backward("triton")
    assert torch.equal(out, expected)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_one_graph_under_compile(dynamic, monkeypatch):
    """Opaque to the compiler, self-test included, forward and backward, without a break; the same bits as eager."""
    monkeypatch.setattr(triton_runtime, "_trials", {})
    torch._dynamo.reset()
    q, k, v, w = T2T.tensors.values()

    def step(q, k, v):
        return performer_attention(q * 1, k, v, w, backend="triton").sin()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (196, 150):
        inputs = [t[:, :length].clone().requires_grad_() for t in (q, k, v)]
        out = compiled(*inputs)
        found = torch.autograd.grad(out.sum(), inputs)
        expected = step(*inputs)
        assert torch.equal(out, expected)
        for gradient, wanted in zip(found, torch.autograd.grad(expected.sum(), inputs), strict=True):
            assert torch.equal(gradient, wanted)
    with torch.no_grad():
        assert torch.equal(compiled(q, k, v), step(q, k, v))
    torch._dynamo.reset()


def test_a_second_derivative_is_refused():
    case = case_of(20)
    q = case.tensors["q"].requires_grad_()
    out = performer_attention(q, *(case.tensors[name] for name in ("k", "v", "w")), backend="triton")
    with pytest.raises(RuntimeError, match=r"no second derivative .* use t2t_fast.backend\('reference'\)"):
        torch.autograd.grad(out.square().sum(), q, create_graph=True)


def test_activation_checkpointing():
    expected, gradients = T2T.run_backward("triton")
    leaves = [T2T.tensors[name].clone().requires_grad_() for name in ("q", "k", "v")]
    out = checkpoint(
        lambda *t: performer_attention(*t, T2T.tensors["w"], backend="triton"), *leaves, use_reentrant=False
    )
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out.backward(upstream.to(out))
    assert torch.equal(out, expected)
    for name, leaf in zip(("q", "k", "v"), leaves, strict=True):
        assert torch.equal(leaf.grad, gradients[name])


def test_a_module_runs_on_it():
    """TokenPerformer by its layer's operator; unfused, where a hook makes it so, by the attention's."""
    layer = t2t_fast.TokenPerformer(27, 16).eval()
    x = torch.randn(2, 20, 27)
    with t2t_fast.backend("reference"):
        expected = layer.double()(x.double())
    layer.float()
    with t2t_fast.backend("triton", "performer_layer"):
        assert_close(layer(x), expected, "performer_layer", "forward", torch.float32)
    layer.proj.register_forward_hook(lambda *_: None)
    with t2t_fast.backend("triton", "performer_attention"):
        assert_close(layer(x), expected, "performer_layer", "forward", torch.float32)


@pytest.fixture
def untried(monkeypatch):
    """Nothing was tried yet, and ``auto`` may take interpreted kernels."""
    monkeypatch.setattr(triton_runtime, "_trials", {})
    table = backends._tables["performer_attention"]
    monkeypatch.setitem(table, "triton", table["triton"]._replace(passed_over=backends.always))


def broken(*_):
    raise RuntimeError("first line\nPTXAS error: no such instruction")


WRONG = {
    "an exception": (broken, "its first run failed with RuntimeError: PTXAS error: no such instruction"),
    "a wrong result": (lambda q, *rest: q * 0, "its self-test on cpu gave an error of 1.0e+00, 2.0e-05 is allowed"),
    "not a number": (lambda q, *rest: q * torch.nan, "its self-test on cpu gave an error of nan"),
}


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("how", list(WRONG))
def test_a_kernel_that_fails_is_left_once_with_a_warning(how, monkeypatch):
    """``auto`` goes on with the next backend, an explicit choice raises, and both say why."""
    run, words = WRONG[how]
    monkeypatch.setattr(triton_impl, "read_out", run)
    with pytest.warns(RuntimeWarning, match="leaves its Triton kernel: its") as caught:
        out = T2T.run()
    (warning,) = [each for each in caught if each.category is RuntimeWarning]
    assert words in str(warning.message)
    assert torch.equal(out, T2T.run(next(name for name in ("native", "aten") if name != refused(name))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        T2T.run()
        with pytest.raises(BackendUnavailable, match=r"first run failed|self-test on cpu"):
            T2T.run("triton")
        rows = t2t_fast.explain("performer_attention", device="cpu").rows
    assert words in next(verdict for _, name, verdict in rows if name == "triton")


def refused(name):
    """The name back if that backend cannot run on this machine."""
    return name if backends._reason("performer_attention", name, backends.Request("cpu", torch.float32, {})) else None


@pytest.mark.usefixtures("untried")
def test_each_kind_of_call_is_tried_once(monkeypatch):
    """A dtype, a size class, forward or both: one run each, whatever the length and the batch."""
    runs, trial = [], triton_impl._run
    monkeypatch.setattr(triton_impl, "_run", lambda *args: runs.append(args[1:]) or trial(*args))
    for length in (5, 20):
        case_of(length, width=60, m=30).run()
    assert runs == [(torch.float32, 64, 32, False)]
    case_of(5).run_backward()
    case_of(5).cast(torch.float16).run()
    assert runs[1:] == [(torch.float32, 16, 16, True), (torch.float16, 16, 16, False)]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_self_test_does_not_depend_on_where_it_is_asked_for(dtype, monkeypatch, matrix_units):
    """Inside an autocast region, in inference mode, with TF32 allowed, whatever the matrix units round."""
    for tf32 in (False, True):
        monkeypatch.setattr(triton_runtime, "_trials", {})
        monkeypatch.setattr(triton_runtime, "allows_tf32", lambda tf32=tf32: tf32)
        case = T2T.cast(DTYPES[dtype])
        for autocast in (False, True):
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                case.run("triton")
        assert set(triton_runtime._trials.values()) == {None}


def test_the_self_test_leaves_the_generator_alone_and_sees_real_tensors(monkeypatch):
    """Also when the call that it precedes is one of fake tensors."""
    monkeypatch.setattr(triton_runtime, "_trials", {})
    state = torch.get_rng_state()
    with FakeTensorMode() as mode:
        out = performer_attention(*(mode.from_tensor(t) for t in T2T.tensors.values()), backend="triton")
    assert out.shape == T2T.tensors["q"].shape and list(triton_runtime._trials.values()) == [None]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (case_of(4, width=257), "take up to 256 channels, got 257"),
        (case_of(4).cast(torch.float64), "no Triton kernel for float64"),
    ],
)
def test_what_it_cannot_run(case, words):
    with pytest.raises(BackendUnavailable, match=words):
        case.run("triton")
    case.run()


def test_auto_leaves_the_interpreter_to_tests():
    explanation = t2t_fast.explain("performer_attention", device="cpu")
    verdict = next(verdict for _, name, verdict in explanation.rows if name == "triton")
    assert verdict == "available, passed over by auto: Triton's interpreter is for tests"


def test_gradients_of_the_portable_form_agree():
    """What the self-test compares with is itself the reference's gradient."""
    q, k, v, w, grad = (t.double() for t in triton_impl._problem("cpu", torch.float32, 16, 16))
    _, lz, state = aten_impl.attend(q, k, v, w, 1e-8, None)
    found = aten_impl.gradients(grad, q, k, v, w, 1e-8, None, lz, state, True)
    leaves = [t.requires_grad_() for t in (q, k, v, w)]
    out = functional.performer_attention(*leaves, backend="reference")
    for value, wanted in zip(found, torch.autograd.grad(out, leaves, grad), strict=True):
        assert errors(value, wanted)[0] < 1e-12

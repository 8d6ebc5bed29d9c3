"""Calls of the Triton attention, interpreted: layouts, memory, compilation, autograd, self-test and refusals."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import t2t_fast
from support.attention import case_of
from t2t_fast import backends, functional
from t2t_fast.errors import BackendUnavailable
from t2t_fast.functional import performer_attention
from t2t_fast.ops._common import triton_runtime
from t2t_fast.ops.performer_attention import aten as aten_impl
from t2t_fast.ops.performer_attention.triton import operators as triton_impl
from t2t_fast.ops.performer_attention.triton import support
from t2t_fast.ops.performer_attention.triton.call import readable
from t2t_fast.testing import CASES, DTYPES, assert_close, errors, features

REASON = triton_runtime.reason(backends.Request("cpu", torch.float32, {}))
kernels = pytest.importorskip("t2t_fast.ops.performer_attention.triton.forward", reason="triton is not installed")
kernels_backward = pytest.importorskip("t2t_fast.ops.performer_attention.triton.backward", reason="triton is missing")
pytestmark = [pytest.mark.interpret, pytest.mark.skipif(REASON is not None, reason=f"triton: {REASON}")]

T2T = CASES["performer_attention"]()[0]


def test_autocast_runs_the_kernels_in_its_dtype():
    q, k, v, w = T2T.tensors.values()
    with torch.autocast("cpu", torch.bfloat16):
        out = performer_attention(q, k, v, w, backend="triton")
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, performer_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), w, backend="triton"))


@pytest.mark.parametrize("heads", [None, 2])
def test_packed_views_are_read_in_place(heads):
    """k, q and v are views of one tensor, with or without adjacent heads, and are read through their strides."""
    packed = torch.randn(2, 30, 3, 32) / 2
    k, q, v = (part if heads is None else part.unflatten(-1, (heads, 16)).transpose(1, 2) for part in packed.unbind(2))
    w = features(torch.Generator().manual_seed(0), 8, k.shape[-1])
    assert all(readable(t)[0] is t for t in (q, k, v))
    out = performer_attention(q, k, v, w, backend="triton")
    expected = performer_attention(*(t.contiguous() for t in (q, k, v)), w, backend="triton")
    assert torch.equal(out, expected)


class NewTensors(TorchDispatchMode):
    """Records every tensor that an operation creates."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.made.update((t.data_ptr(), t) for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        return out


class NotLaunched:
    """A kernel that does nothing; the interpreter would copy tensors that a GPU reads in place."""

    def __getitem__(self, grid):
        return lambda *arguments, **constants: None


def test_intermediate_and_saved_tensors(monkeypatch):
    """In float16 the only wide tensors of token length are y, dq, dk and dv; only the key state is saved."""
    length, width, m = 331, 64, 32
    q, k, v, grad = torch.randn(4, 2, length, width).half()
    w = features(torch.Generator().manual_seed(0), m, width)
    with monkeypatch.context() as patch:
        for module in (kernels, kernels_backward):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                patch.setattr(module, name, NotLaunched())
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


def test_tensors_with_strides_beyond_32_bits_are_copied(monkeypatch):
    expected, _ = T2T.run_backward("triton")
    monkeypatch.setattr(triton_runtime, "OFFSET_LIMIT", 1000)
    out, _ = T2T.run_backward("triton")
    assert torch.equal(out, expected)


@pytest.mark.slow
@pytest.mark.self_test
@pytest.mark.parametrize("dynamic", [False, True])
def test_one_graph_under_compile(dynamic):
    """Forward, backward and self-test are opaque to the compiler: no graph break, bitwise equal to eager."""
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


def test_module_runs_on_triton():
    """TokenPerformer runs the layer's operator; unfused because of a hook, it runs the attention's."""
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
def selectable(monkeypatch):
    """``auto`` may select interpreted kernels."""
    table = backends._tables["performer_attention"]
    monkeypatch.setitem(table, "triton", table["triton"]._replace(passed_over=backends.always))


def broken(*_):
    raise RuntimeError("first line\nPTXAS error: no such instruction")


WRONG = {
    "an exception": (broken, "its first run failed with RuntimeError: PTXAS error: no such instruction"),
    "a wrong result": (lambda q, *rest: q * 0, "its self-test on cpu gave an error of 1.0e+00, 2.0e-05 is allowed"),
    "not a number": (lambda q, *rest: q * torch.nan, "its self-test on cpu gave an error of nan"),
}


@pytest.mark.self_test
@pytest.mark.usefixtures("selectable")
@pytest.mark.parametrize("how", list(WRONG))
def test_failing_kernel_is_disabled_with_one_warning(how, monkeypatch):
    """``auto`` falls back to the next backend, an explicit choice raises, and both report the reason."""
    run, words = WRONG[how]
    monkeypatch.setattr(kernels, "launch_read_out", run)
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
    """``name`` if that backend cannot run on this machine, else ``None``."""
    return name if backends.reason("performer_attention", name, backends.Request("cpu", torch.float32, {})) else None


@pytest.mark.self_test
@pytest.mark.usefixtures("selectable")
def test_each_kind_of_call_is_tried_once(monkeypatch):
    """One run per dtype, size class, and forward or both passes, regardless of length and batch."""
    runs, trial = [], support._run
    monkeypatch.setattr(support, "_run", lambda *args: runs.append(args[1:]) or trial(*args))
    for length in (5, 20):
        case_of(length, width=60, m=30).run()
    assert [run[:6] for run in runs] == [(torch.float32, torch.float32, 60, 30, False, False)]
    case_of(5).run_backward()
    case_of(5).cast(torch.float16).run()
    case_of(5, mask=torch.ones(1, 5, dtype=torch.bool)).run()
    assert [run[:6] for run in runs[1:]] == [
        (torch.float32, torch.float32, 16, 8, False, True),
        (torch.float16, torch.float16, 16, 8, False, False),
        (torch.float32, torch.float32, 16, 8, True, False),
    ]


@pytest.mark.self_test
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_self_test_does_not_depend_on_its_context(dtype, monkeypatch, matrix_units):
    """It passes inside an autocast region, in inference mode, with TF32 allowed, and with emulated matrix units."""
    for tf32 in (False, True):
        monkeypatch.setattr(triton_runtime, "_trials", {})
        monkeypatch.setattr(triton_runtime, "allows_tf32", lambda tf32=tf32: tf32)
        case = T2T.cast(DTYPES[dtype])
        for autocast in (False, True):
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                case.run("triton")
        assert set(triton_runtime._trials.values()) == {None}


@pytest.mark.self_test
def test_self_test_runs_on_real_tensors_and_keeps_the_rng_state():
    """Even before a call with fake tensors."""
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
def test_unsupported_calls_raise(case, words):
    with pytest.raises(BackendUnavailable, match=words):
        case.run("triton")
    case.run()


def test_auto_skips_the_interpreter():
    explanation = t2t_fast.explain("performer_attention", device="cpu")
    verdict = next(verdict for _, name, verdict in explanation.rows if name == "triton")
    assert verdict == "available, passed over by auto: Triton's interpreter is for tests"


def test_aten_gradients_match_the_reference():
    """The self-test's expected gradients equal the reference's."""
    q, k, v, w, grad = (t.double() for t in support.problem("cpu", torch.float32, torch.float32, 16, 16))
    _, lz, state = aten_impl.attend(q, k, v, w, 1e-8, None)
    *found, of_mask = aten_impl.gradients(grad, q, k, v, w, 1e-8, None, lz, state, True)
    assert of_mask is None
    leaves = [t.requires_grad_() for t in (q, k, v, w)]
    out = functional.performer_attention(*leaves, backend="reference")
    for value, wanted in zip(found, torch.autograd.grad(out, leaves, grad), strict=True):
        assert errors(value, wanted)[0] < 1e-12

"""Remembered calls: after any change between two calls, the second result is that of a module without a memory."""

import copy
import pickle
import threading
from contextlib import ExitStack

import pytest
import torch
from torch import nn

import t2t_fast
from support.freed import assert_freed
from t2t_fast import BackendUnavailable, backends, reference
from t2t_fast.functional import performer_layer, soft_split_linear, token_mlp
from t2t_fast.modules import remembered
from t2t_fast.ops._common import guards, triton_runtime

REASON = triton_runtime.reason(backends.Request("cpu", torch.float32, {}))
INTERPRETED = pytest.mark.interpret, pytest.mark.skipif(REASON is not None, reason=f"triton: {REASON}")
FUNCTIONS = performer_layer, soft_split_linear, token_mlp
KINDS = ("performer", "transformer")


def module(kind="performer", swapped=False):
    torch.manual_seed(0)
    made = (reference.T2T_module if swapped else t2t_fast.T2TModule)(32, kind, embed_dim=24, token_dim=16).eval()
    if swapped:
        t2t_fast.swap(made)
    for parameter in made.parameters():
        parameter.data.mul_(2)
    return made


def image(height=32, width=32, dtype=torch.float32):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture
def checks(monkeypatch):
    """The functions whose arguments were checked, in order."""
    names = []
    for function in FUNCTIONS:

        def counted(*args, original=function.arguments, name=function.__name__, **named):
            names.append(name)
            return original(*args, **named)

        monkeypatch.setattr(function, "arguments", counted)
    return names


@pytest.mark.parametrize("swapped", [False, True], ids=["own", "swapped"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_first_call_of_a_kind_is_checked(kind, swapped, checks):
    t2t, x = module(kind, swapped), image()
    checks.clear()
    with torch.no_grad():
        first = t2t(x)
        expected = 2 * ["performer_layer"] if kind == "performer" else 2 * ["soft_split_linear", "token_mlp"]
        assert checks == [*expected, "soft_split_linear"]
        checks.clear()
        assert torch.equal(t2t(x.clone()), first) and not checks
        t2t(image(40, 24))
        assert checks
        checks.clear()
        t2t(image(40, 24)), t2t(x)
        assert not checks
        t2t(x.contiguous(memory_format=torch.channels_last))
        assert checks, "other strides"
    t2t(x)
    assert checks, "a call with gradients"


def _replaced(t2t):
    t2t.attention1.norm1 = nn.LayerNorm(147, eps=1.0)
    t2t.project = nn.Linear(144, 24)


def _data(t2t):
    for parameter in t2t.parameters():
        parameter.data = parameter.data.flip(0) + 0.1


def _swapped_tensors(t2t):
    weight = t2t.attention1.norm1.weight
    torch.utils.swap_tensors(weight, nn.Parameter(weight.detach() + 1))


def _subclass(t2t):
    class Absolute(nn.Linear):
        def forward(self, x):
            return super().forward(x).abs()

    t2t.project.__class__ = t2t.attention1.get_submodule(_linear(t2t)).__class__ = Absolute


def _linear(t2t):
    return "kqv" if hasattr(t2t.attention1, "kqv") else "attn.qkv"


def _instance(t2t):
    for child in (t2t.project, t2t.attention2.norm2):
        child.forward = lambda x, forward=child.forward: forward(x).abs()


def _assigned(t2t):
    state = {name: value + 0.1 for name, value in t2t.state_dict().items()}
    t2t.load_state_dict(state, assign=True)


def _in_place(t2t):
    with torch.no_grad():
        for parameter in t2t.parameters():
            parameter.mul_(0.5)


def _eps(t2t):
    t2t.attention1.norm1.eps = t2t.attention2.norm2.eps = 3.0


def _frozen(t2t):
    for parameter in t2t.attention1.parameters():
        parameter.requires_grad_(False)


CHANGES = {
    "nothing": lambda t2t: None,
    "in place": _in_place,
    "data": _data,
    "assigned": _assigned,
    "tensors swapped": _swapped_tensors,
    "eps": _eps,
    "children": _replaced,
    "class": _subclass,
    "forward": _instance,
    "parametrised": lambda t2t: nn.utils.parametrizations.weight_norm(t2t.attention1.get_submodule(_linear(t2t))),
    "hook": lambda t2t: t2t.attention1.norm1.register_forward_hook(lambda module, inputs, out: 0.5 * out),
    "pre-hook": lambda t2t: t2t.project.register_forward_pre_hook(lambda module, inputs: (0.5 * inputs[0],)),
    "hook of a layer": lambda t2t: t2t.attention2.register_forward_hook(lambda module, inputs, out: 0.5 * out),
    "hooks dictionary": lambda t2t: setattr(t2t.project, "_forward_hooks", {0: lambda module, inputs, out: 0.5 * out}),
    "padding": lambda t2t: setattr(t2t.soft_split1, "padding", (2, 2)),
    "dilation": lambda t2t: setattr(t2t, "soft_split2", nn.Unfold(3, dilation=2, stride=2, padding=2)),
    "frozen": _frozen,
    "no bias": lambda t2t: t2t.project.register_parameter("bias", None),
    "dropout of p 1": lambda t2t: [setattr(m.train(), "p", 1.0) for m in t2t.modules() if type(m) is nn.Dropout],
    "activation": lambda t2t: setattr(t2t.attention1.mlp, "1" if hasattr(t2t.attention1, "kqv") else "act", nn.ReLU()),
}


@pytest.mark.parametrize(
    ("backend", "training"),
    [
        ("auto", False),
        ("auto", True),
        pytest.param("triton", False, marks=INTERPRETED),
        pytest.param("triton", True, marks=[*INTERPRETED, pytest.mark.slow]),
    ],
)
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_change_between_calls(kind, name, backend, training):
    """The module, whose calls are remembered or replayed, against a copy, which begins without remembered calls."""
    t2t, x = module(kind), image(16, 16) if backend == "triton" else image()
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(training))
        for op in FUNCTIONS:
            stack.enter_context(t2t_fast.backend(backend, op.__name__))
        for _ in range(3):
            before = t2t(x).detach()
        CHANGES[name](t2t)
        twin = copy.deepcopy(t2t)
        assert twin not in remembered._entries
        found, expected = t2t(x), twin(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found.shape == before.shape and torch.equal(found, before)) == (name in ("nothing", "frozen"))
    if training and name != "forward":  # the copy's function calls the original
        found.square().sum().backward()
        expected.square().sum().backward()
        for parameter, other in zip(t2t.parameters(), twin.parameters(), strict=True):
            assert (parameter.grad is None) == (other.grad is None)
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_hooks_for_all_modules():
    t2t, x, seen = module(), image(), []
    t2t(x), t2t(x)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        t2t(x)
    finally:
        handle.remove()
    assert t2t.attention1.mlp[1] in seen


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_autocast_and_backend_of_each_call(kind, checks):
    """``to`` keeps the Parameter objects; the states are those of the call, not those of the first one."""
    t2t, x = module(kind), image()
    with torch.no_grad():
        exact = t2t(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert t2t(x).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.float16):
            assert t2t(x).dtype == torch.float16
        assert torch.equal(t2t(x), exact)
        double = t2t.double()(x.double())
        torch.testing.assert_close(double.float(), exact, rtol=1e-4, atol=1e-4)
        with pytest.raises(BackendUnavailable), t2t_fast.backend("triton"):
            t2t(x.double())
        with pytest.raises(ValueError, match="must have the dtype of x"):
            t2t(x)
        t2t.float()
        checks.clear()
        with t2t_fast.backend("reference"):
            torch.testing.assert_close(t2t(x), exact, rtol=1e-4, atol=1e-4)
        assert checks
        checks.clear()
        assert torch.equal(t2t(x), exact) and not checks


def test_a_backend_of_another_thread():
    t2t, x, results = module(), image(dtype=torch.float64), []
    t2t.double()
    with torch.no_grad():
        t2t(x), t2t(x)

        def work():
            with torch.no_grad():
                results.append(t2t(x))

        with t2t_fast.backend("triton"), pytest.raises(BackendUnavailable):
            t2t(x)
        with t2t_fast.backend("triton"):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
    assert torch.equal(results[0], t2t(x))


def test_errors_are_those_of_a_first_call():
    t2t, x = module(), image()
    layer, tokens = t2t.attention1, torch.randn(1, 5, 147)
    t2t(x), t2t(x), layer(tokens), layer(tokens)
    for bad in (None, x[0], x.int(), x.to_sparse(), x[:, :2], x[..., :0], x.to("meta"), [x]):
        found = []
        for each in (t2t, copy.deepcopy(t2t)):
            with pytest.raises((TypeError, ValueError)) as raised:
                each(bad)
            found.append(str(raised.value))
        assert found[0] == found[1]
    with pytest.raises(ValueError, match="norm1_eps"):
        layer.norm1.eps = 0.0
        layer(tokens)
    with pytest.raises(TypeError, match="recompute"):
        layer.norm1.eps, layer.recompute = 1e-5, 1
        layer(tokens)


class Watched(torch.Tensor):
    """Records the functions that it is an argument of."""

    seen: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_tensors_whose_memory_is_not_their_value():
    """Inputs that PyTorch resolves before a kernel reads them, and tensor subclasses."""
    t2t, x = module(), image()
    with torch.no_grad():
        expected = t2t(x)
        negative = torch.complex(x, -x).conj().imag
        assert negative.is_neg() and torch.equal(t2t(negative), expected)
        assert torch.equal(t2t(x.as_subclass(Watched)).as_subclass(torch.Tensor), expected) and Watched.seen
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = t2t(mode.from_tensor(x))
        assert isinstance(fake, torch._subclasses.FakeTensor) and fake.shape == expected.shape
        assert torch.func.vmap(t2t)(x[:, None]).shape == (2, 1, 4, 24)


def test_a_normalisation_that_is_changed_in_place():
    t2t, x = module(), (50 * image()).abs().to(torch.uint8)
    t2t.pixel_norm = [[0.5, 0.5, 0.5], [0.25, 0.25, 0.25]]
    with torch.no_grad():
        before = t2t(x)
        assert torch.equal(t2t(x), before)
        t2t.pixel_norm[0][0] = 0.1
        assert not torch.equal(t2t(x), before) and torch.equal(t2t(x), copy.deepcopy(t2t)(x))
        mean = t2t.pixel_norm[1] = torch.full((3,), 0.25)
        before = t2t(x)
        mean.fill_(0.5)
        assert not torch.equal(t2t(x), before)


def test_nothing_is_stored_in_the_module_and_no_tensor_is_kept():
    t2t, x = module(), image()
    names = [sorted(vars(each)) for each in t2t.modules()]
    t2t(x), t2t(x)
    assert names == [sorted(vars(each)) for each in t2t.modules()]
    assert torch.equal(pickle.loads(pickle.dumps(t2t))(x), t2t(x))
    owned = [t2t]
    del t2t
    assert_freed(owned)


def test_a_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(guards, "MOST", 3)
    t2t = module()
    with torch.no_grad():
        for width in range(16, 90, 8):
            t2t(image(32, width))
    assert len(remembered._entries[t2t.attention1]) <= 3

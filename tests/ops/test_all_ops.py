"""What holds for every operator: parity, registration, gradients, determinism, layout, memory."""

import sys
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from t2t_fast import backends, testing
from t2t_fast.errors import BackendUnavailable
from t2t_fast.ops.add_layer_norm.triton.launch import TABLE as NORM
from t2t_fast.ops.layer_norm_mlp.triton.launch import TABLE as MLP
from t2t_fast.ops.performer_attention.triton.launch import TABLE as ATTENTION
from t2t_fast.ops.performer_layer.triton.launch import TABLE as LAYER
from t2t_fast.ops.soft_split_linear.triton.launch import TABLE as SPLIT
from t2t_fast.ops.token_mlp.triton.launch import TABLE as TOKEN_MLP
from t2t_fast.testing import CASES, DTYPES, assert_close

OPS = list(CASES)
ALL_CASES = [pytest.param(case, id=f"{op}: {case.name}") for op in OPS for case in CASES[op]()]


@pytest.fixture(autouse=True)
def large_tiles():
    """Large tiles save time: the interpreter takes as long for a small tile. The kernels' own tests use small ones."""
    with ExitStack() as stack:
        for table in (ATTENTION, LAYER, MLP, NORM, SPLIT, TOKEN_MLP):
            for name in table.passes:
                stack.enter_context(table.override(name, {"tokens": 256}))
        yield


def backends_of(op):
    """The backends that have an implementation of an operator, whether or not it can run here."""
    return [name for name in backends.ORDER if name in backends._tables[op]]


@contextmanager
def running(backend):
    """Skip, with the reason, where a backend cannot run the call."""
    try:
        yield
    except BackendUnavailable as error:
        pytest.skip(next(line.strip() for line in str(error).splitlines() if line.startswith(f"  {backend}: ")))


INTERPRETED_VALUES = 2**13
INTERPRETED_WINDOW = 16


def quick(case, backend):
    """Whether a case is fast enough to run here.

    Large cases take seconds in Triton's interpreter; the kernels' own tests cover them.
    """
    largest = next(iter(case.tensors.values())).numel()
    window = case.options.get("kernel_size", 1)
    small = (
        largest <= INTERPRETED_VALUES and (max(window) if isinstance(window, tuple) else window) < INTERPRETED_WINDOW
    )
    return backend != "triton" or case.op == "performer_attention" or small


def with_backends(cases, without=()):
    """(case, backend) for every backend of the case's operator."""
    return [
        pytest.param(case, name, id=f"{case.op}: {case.name}-{name}")
        for case in (param.values[0] for param in cases)
        for name in backends_of(case.op)
        if name not in without and quick(case, name)
    ]


OP_AND_BACKEND = [pytest.param(op, name, id=f"{op}-{name}") for op in OPS for name in backends_of(op)]
OP_AND_FUSED = [param for param in OP_AND_BACKEND if param.values[1] != "reference"]


def registered(case):
    return getattr(torch.ops.t2t_fast, case.op).default


def schema_arguments(case, backend):
    """The operator's positional arguments for a case, as the functional layer passes them."""
    operator, function = registered(case), getattr(testing.functional, case.op)
    if hasattr(function, "arguments"):
        case.run(backend)  # raises where the backend cannot run
        return operator, function.arguments(**case.tensors, **case.options, backend=backend)
    calls = []
    name = f"_{case.op}"
    module = sys.modules[function.__module__]
    original = getattr(module, name)
    setattr(module, name, lambda *args: calls.append(args) or original(*args))
    try:
        case.run(backend)
    finally:
        setattr(module, name, original)
    return operator, calls[0]


# The reference is left out in half precision: it rounds every intermediate.
PARITY = [
    pytest.param(*param.values, dtype, id=f"{param.id}-{dtype}")
    for param in with_backends(ALL_CASES)
    for dtype in DTYPES
    if param.values[1] != "reference" or dtype in ("fp64", "fp32")
]


@pytest.mark.parametrize(("case", "backend", "dtype"), PARITY)
def test_parity_with_the_float64_reference(case, backend, dtype):
    """Forward and every gradient, within the table's tolerance, on inputs rounded to the dtype."""
    dtype = DTYPES[dtype]
    rounded = case.cast(dtype)
    expected, expected_gradients = rounded.cast(torch.float64).run_backward("reference", dtype)
    with running(backend):
        out, gradients = rounded.run_backward(backend)
    assert out.dtype == dtype
    assert_close(out, expected, case.op, "forward", dtype, case.name)
    for name, gradient in gradients.items():
        assert gradient.dtype == rounded.tensors[name].dtype
        assert_close(gradient, expected_gradients[name], case.op, "backward", dtype, f"{case.name}: {name}")


@pytest.mark.parametrize(("case", "backend"), with_backends(ALL_CASES, without=("reference", "triton")))
def test_gradients_under_activation_checkpointing(case, backend):
    """Equal bit for bit. A checkpoint lets a backward read each saved tensor once."""

    def gradients(around):
        leaves = {name: case.tensors[name].detach().requires_grad_() for name in case.wants_gradient}
        traced = testing.Case(case.op, case.name, {**case.tensors, **leaves}, case.options, case.wants_gradient)
        out = around(lambda *_: traced.run(backend), *leaves.values())
        total = sum(each.square().sum() for each in tree_leaves(out))
        return torch.autograd.grad(total, list(leaves.values()))

    with running(backend):
        expected = gradients(lambda call, *tensors: call(*tensors))
    found = gradients(partial(checkpoint, use_reentrant=False))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def slow(params, where):
    """The parameters, marked slow where ``where(*values)`` is true."""
    return [
        pytest.param(*p.values, id=p.id, marks=[*p.marks, *([pytest.mark.slow] if where(*p.values) else [])])
        for p in params
    ]


def opcheck(case, backend, *tests):
    """Run some of torch.library's own checks of an operator."""
    tensors = {
        name: t.detach().requires_grad_(name in case.wants_gradient) if t.is_floating_point() else t
        for name, t in case.tensors.items()
    }
    case = testing.Case(case.op, case.name, tensors, case.options, case.wants_gradient)
    with running(backend):
        operator, arguments = schema_arguments(case, backend)
    torch.library.opcheck(operator, arguments, test_utils=tests, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("case", "backend"), with_backends(ALL_CASES))
def test_registration(case, backend):
    """Schema, autograd registration, fake tensors."""
    opcheck(case, backend, "test_schema", "test_autograd_registration", "test_faketensor")


# The cases that differ in the structure of their graph. Tracing takes seconds each, with aten up to twenty.
TRACED = {
    "soft_split": {"stage2"},
    "soft_composition": {"stage2"},
    "fused_fold_unfold": {"stage2"},
    "soft_split_linear": {"stage2, LayerNorm", "stage2, Linear", "one pixel window, LayerNorm"},
    "performer_attention": {"heads", "odd sizes", "causal, mask"},
    "token_mlp": {"dropout"},
    "performer_layer": {"stage2", "dropout"},
    "add_layer_norm": {"dropout, stochastic depth"},
    "layer_norm_linear": {"odd sizes"},
    "layer_norm_mlp": {"every dropout", "recompute, no branch"},
    "transformer_block": {"stochastic depth"},
}
QUICK_WITH_ATEN = {
    ("soft_split", "stage2"),
    ("soft_composition", "stage2"),
    ("soft_split_linear", "one pixel window, LayerNorm"),
    ("performer_attention", "odd sizes"),
    ("token_mlp", "dropout"),
    ("layer_norm_linear", "odd sizes"),
    ("layer_norm_mlp", "recompute, no branch"),
}


def _traced_slowly(case, backend):
    """Whether the graph consists of many PyTorch operators; opaque operators are one node each."""
    return backend == "reference" or (backend == "aten" and (case.op, case.name) not in QUICK_WITH_ATEN)


@pytest.mark.parametrize(
    ("case", "backend"),
    slow(with_backends(p for p in ALL_CASES if p.values[0].name in TRACED[p.values[0].op]), _traced_slowly),
)
def test_traced_with_free_sizes(case, backend):
    """Outputs and gradients of the graphs that AOTAutograd traces with symbolic sizes are the operator's own."""
    opcheck(case, backend, "test_aot_dispatch_dynamic")


SMALL = {
    "soft_split": lambda: dict(x=(2, 2, 5, 6), kernel_size=3, stride=2, padding=1),
    "soft_composition": lambda: dict(tokens=(2, 9, 18), output_size=(5, 6), kernel_size=3, stride=2, padding=1),
    "fused_fold_unfold": lambda: dict(tokens=(2, 9, 18), output_size=(5, 6), kernel_size=3, stride=2, padding=1),
    "soft_split_linear": lambda: dict(
        x=(2, 2, 5, 6), weight=(4, 18), bias=(4,), norm_weight=(18,), norm_bias=(18,),
        kernel_size=3, stride=2, padding=1, norm_eps=1e-5,
    ),
    "performer_attention": lambda: dict(q=(2, 5, 4), k=(2, 3, 4), v=(2, 3, 4), w=(3, 4), eps=1e-2),
    "token_mlp": lambda: dict(
        y=(2, 3, 4), v=(2, 3, 4), proj_weight=(4, 4), proj_bias=(4,), norm_weight=(4,), norm_bias=(4,),
        fc1_weight=(6, 4), fc1_bias=(6,), fc2_weight=(4, 6), fc2_bias=(4,),
        proj_drop=0.25, mlp_drop=0.5, seed=torch.tensor(7),
    ),
    "performer_layer": lambda: dict(
        x=(2, 2, 5, 6), kqv_weight=(12, 18), kqv_bias=(12,), w=(3, 4), proj_weight=(4, 4), proj_bias=(4,),
        norm2_weight=(4,), norm2_bias=(4,), fc1_weight=(4, 4), fc1_bias=(4,), fc2_weight=(4, 4), fc2_bias=(4,),
        norm1_weight=(18,), norm1_bias=(18,), kernel_size=3, stride=2, padding=1,
        eps=1e-2, proj_drop=0.25, mlp_drop=0.5, seed=torch.tensor(7),
    ),
    "add_layer_norm": lambda: dict(
        x=(2, 3, 4), branch=(2, 3, 4), norm_weight=(4,), norm_bias=(4,), drop=0.25, drop_path=0.5, seed=torch.tensor(7),
    ),
    "layer_norm_linear": lambda: dict(x=(2, 3, 4), norm_weight=(4,), norm_bias=(4,), weight=(6, 4), bias=(6,)),
    "layer_norm_mlp": lambda: dict(
        x=(2, 3, 4), branch=(2, 3, 4), norm_weight=(4,), norm_bias=(4,), fc1_weight=(6, 4), fc1_bias=(6,),
        fc2_weight=(4, 6), fc2_bias=(4,), branch_drop=0.25, branch_path=0.5, hidden_drop=0.25, drop=0.5, drop_path=0.25,
        seed=torch.tensor(7),
    ),
    "transformer_block": lambda: dict(
        x=(2, 3, 4), norm1_weight=(4,), norm1_bias=(4,), qkv_weight=(12, 4), qkv_bias=(12,), proj_weight=(4, 4),
        proj_bias=(4,), norm2_weight=(4,), norm2_bias=(4,), fc1_weight=(6, 4), fc1_bias=(6,), fc2_weight=(4, 6),
        fc2_bias=(4,), heads=2, drop_path1=0.25, drop_path2=0.5, seed=torch.tensor(7),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("op", "backend"), OP_AND_BACKEND)
def test_gradcheck(op, backend):
    """Finite differences in float64, for every input; the seed fixes the dropout masks."""
    arguments = SMALL[op]()
    names = [name for name, value in arguments.items() if isinstance(value, tuple) and name != "output_size"]
    inputs = [torch.randn(arguments.pop(name), dtype=torch.float64, requires_grad=True) for name in names]
    call = testing.Case(op, "small", {}).call

    def run(*tensors):
        return call(**dict(zip(names, tensors, strict=True)), **arguments, backend=backend)

    with running(backend):
        torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize(("op", "backend"), OP_AND_FUSED)
def test_second_derivative_is_refused(op, backend):
    """Hand-written backward passes raise when they are differentiated; they never return a wrong result silently."""
    case = CASES[op]()[1].cast(torch.float64)
    name = case.wants_gradient[0]
    tensors = {**case.tensors, name: case.tensors[name].detach().requires_grad_()}
    with running(backend):
        out = case.call(**tensors, **case.options, backend=backend)
    with pytest.raises(RuntimeError, match=r"no second derivative .* use t2t_fast.backend\('reference'\)"):
        torch.autograd.grad(out.square().sum(), tensors[name], create_graph=True)
    if (op, backend) == ("transformer_block", "aten"):
        return  # the gradient inside depends on x, whatever that of the output does
    (gradient,) = torch.autograd.grad(out.sum(), tensors[name], create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


@pytest.mark.parametrize(("case", "backend"), with_backends(ALL_CASES, without=("reference",)))
def test_two_runs_are_bit_identical(case, backend):
    with running(backend):
        first, first_gradients = case.run_backward(backend)
    second, second_gradients = case.run_backward(backend)
    assert torch.equal(first, second)
    for name, gradient in first_gradients.items():
        assert torch.equal(gradient, second_gradients[name]), name


def scattered(t):
    """The same numbers with other strides: cut out of a wider, transposed tensor."""
    if t.ndim < 2:
        return torch.stack([t, t], dim=-1)[..., 0]
    wide = torch.zeros(*t.shape[:-2], t.shape[-1] + 3, t.shape[-2] + 2, dtype=t.dtype)
    view = wide.transpose(-1, -2)[..., 1:-1, 2:-1]
    view.copy_(t)
    return view


@pytest.mark.parametrize(("case", "backend"), with_backends(ALL_CASES, without=("reference",)))
def test_any_strides(case, backend):
    """Sliced and transposed inputs give the same numbers as contiguous ones."""
    with running(backend):
        expected, expected_gradients = case.run_backward(backend)
    tensors = {name: scattered(t) if t.is_floating_point() else t for name, t in case.tensors.items()}
    strided = testing.Case(case.op, case.name, tensors, case.options, case.wants_gradient)
    out, gradients = strided.run_backward(backend)
    assert_close(out, expected, case.op, "forward", torch.float32)
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], case.op, "backward", torch.float32, name)


# each parameter of a layer takes another run in the interpreter
ALONE = slow(OP_AND_FUSED, lambda op, backend: backend == "triton" and op in ("performer_layer", "token_mlp"))


@pytest.mark.parametrize(("op", "backend"), ALONE)
def test_only_the_gradients_asked_for(op, backend):
    """With one input requiring a gradient: the same gradient as with all of them, and none for the others."""
    case = CASES[op]()[1]
    with running(backend):
        _, everything = case.run_backward(backend)
    for name in case.wants_gradient:
        alone = testing.Case(op, case.name, case.tensors, case.options, (name,))
        _, gradients = alone.run_backward(backend)
        assert_close(gradients[name], everything[name], op, "backward", torch.float32, name)


SEVERAL = [p for p in ALL_CASES if next(iter(p.values[0].tensors.values())).shape[0] >= 2]


@pytest.mark.parametrize(("case", "backend"), with_backends(SEVERAL, without=("reference",)))
def test_nan_passes_through_and_stays_in_its_sample(case, backend):
    first = {
        "soft_composition": "tokens",
        "fused_fold_unfold": "tokens",
        "performer_attention": "v",
        "token_mlp": "y",
    }
    name = first.get(case.op, "x")
    with running(backend):
        clean = case.run(backend)
    poisoned = case.tensors[name].clone()
    poisoned[0].fill_(float("nan"))
    out = testing.Case(case.op, case.name, {**case.tensors, name: poisoned}, case.options).run(backend)
    assert out[0].isnan().all() or case.op in ("soft_split", "soft_composition", "fused_fold_unfold")
    assert out[0].isnan().any()
    torch.testing.assert_close(out[1:], clean[1:])
    assert poisoned[0].isnan().all(), "the input was changed"


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel, self.op = 0, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.numel() > self.numel:
                self.numel, self.op = t.numel(), func
        return out


@pytest.mark.parametrize("image_gradient", [False, True])
@pytest.mark.parametrize(("channels", "kernel", "stride", "padding"), [(3, 7, 4, 2), (64, 3, 2, 1)], ids=["s1", "s2"])
def test_no_tensor_of_unfolded_width(channels, kernel, stride, padding, image_gradient):
    """In forward and backward of soft_split_linear every tensor is smaller than the unfolded tokens."""
    batch, side, out = 2, 32, 16
    x = torch.randn(batch, channels, side, side, requires_grad=image_gradient)
    columns = channels * kernel**2
    parameters = [torch.randn(out, columns), torch.randn(out), torch.rand(columns), torch.randn(columns)]
    weight, bias, gamma, beta = (p.requires_grad_() for p in parameters)
    win = testing.functional.window(kernel, stride, padding)
    unfolded = batch * columns * win.grid(side, side)[0] ** 2
    with LargestTensor() as largest:
        y = testing.functional.soft_split_linear(
            x, weight, bias, kernel, stride, padding, norm_weight=gamma, norm_bias=beta, norm_eps=1e-5, backend="aten"
        )
        y.sum().backward()
    assert x.numel() < unfolded and largest.numel < unfolded, f"{largest.op} returned {largest.numel} values"


def saved_bytes(case, backend="aten"):
    """Bytes saved for backward; each storage counts once, inputs and output are excluded."""
    inputs = {t.untyped_storage().data_ptr() for t in case.tensors.values()}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    tensors = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in case.tensors.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = case.call(**tensors, **case.options, backend=backend)
    kept.pop(out.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def test_what_is_saved_for_backward():
    """Besides inputs and output: statistics (4 bytes per token), the key state (m (E + 1) floats per sample), kqv."""
    split = next(c for c in CASES["soft_split_linear"]() if c.name == "stage1, LayerNorm")
    batch, tokens = 2, 16 * 16
    assert saved_bytes(split) == 4 * batch * tokens
    attention = CASES["performer_attention"]()[0]
    state = 2 * 32 * (64 + 1) * 4
    assert saved_bytes(attention) == state
    kqv = 4 * 3 * 64 * batch * tokens
    assert saved_bytes(CASES["performer_layer"]()[0]) == kqv + 4 * batch * tokens + state
    assert saved_bytes(CASES["token_mlp"]()[1]) == 0


@pytest.mark.parametrize("backend", ["aten", "native"])
@pytest.mark.parametrize("op", ["soft_split", "soft_composition", "fused_fold_unfold"])
def test_a_split_saves_nothing_for_backward(op, backend):
    with running(backend):
        assert saved_bytes(CASES[op]()[0], backend) == 0


def test_every_operator_has_cases_and_tolerances():
    assert set(backends.operators()) == set(CASES)
    for op in CASES:
        for direction in ("forward", "backward"):
            for allowed, measured in testing.TOLERANCES[op, direction].values():
                assert measured <= allowed

"""Replay (ops/_common/replay.py): a program does what its function does, or there is none, with a reason."""

import gc
import threading
import weakref
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from t2t_fast.ops._common import guards, replay


class Kernel:
    """Stands for a Triton kernel: ``out = factor * x`` on tensors that it sees as addresses, like a kernel."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        def run(x, out, factor, **constants):
            self.launches.append((grid, x.data_ptr(), constants))
            flat = (each.as_strided(grid, (1,)) for each in (x, out))
            torch.mul(next(flat), factor, out=next(flat))

        return run


scale = Kernel()


def scaled(x, factor=2.0, **constants):
    out = torch.empty_like(x)
    replay.launch(scale, (x.numel(),), x, out, factor, BLOCK=16, **constants)
    return out


def recorded(function, *tensors):
    """The function's result and its program."""
    result, program, why = replay.record(function, tensors)
    assert why is None, why
    return result, program


def unrecorded(function, *tensors):
    result, program, why = replay.record(function, tensors)
    assert program is None and replay.recording() is None
    return result, why


def steps(program):
    return [line.strip() for line in program.source.splitlines()[1:]]


def test_the_text_of_a_program():
    """Sizes and views are computed once; what nobody reads is left out; tensors are deleted after their last use."""

    def function(x, weight, bias):
        _unused = torch.empty(7)
        rows = x.flatten(0, 1)
        assert rows.shape[1] == weight.shape[1]
        product = F.linear(scaled(rows), weight)
        return scaled(product.view(*x.shape[:2], -1), 0.5)

    x, weight = torch.randn(2, 3, 4), torch.randn(5, 4)
    first, program = recorded(function, x, weight, None)
    assert (
        program.source
        == (
            "def replay(a0, a1, a2):\n"
            "    t4 = c2((6, 4), (4, 1), c3)\n"
            "    c4(a0, t4, c5)\n"
            "    t5 = c6(t4, a1)\n"
            "    del t4\n"
            "    t7 = c8((2, 3, 5), (15, 5, 1), c9)\n"
            "    c10(t5, t7, 0.5)\n"
            "    del t5\n"
            "    return t7\n"
        )
        or program.source
    )
    torch.testing.assert_close(first, F.linear(x, weight))
    y = torch.randn(2, 3, 4)
    torch.testing.assert_close(program(y, weight, None), F.linear(y, weight))


def test_launches_have_their_grid_constants_and_options():
    scale.launches.clear()
    x = torch.randn(6)
    _, program = recorded(partial(scaled, num_warps=4), x)
    y = torch.randn(6)
    program(y)
    (grid, at, constants), (grid_again, at_again, constants_again) = scale.launches
    assert (grid, constants) == (grid_again, constants_again) == ((6,), {"BLOCK": 16, "num_warps": 4})
    assert (at, at_again) == (x.data_ptr(), y.data_ptr())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32])
def test_allocations_have_shape_strides_and_dtype(dtype):
    def function(x):
        scaled(x)
        whole = torch.empty(2, 3, 4, dtype=dtype), x.new_empty((3, 0), dtype=dtype), torch.empty_like(x)
        strided = torch.empty_strided((2, 3), (1, 2), dtype=dtype), torch.empty_like(x.mT, dtype=dtype)
        return [each.zero_() for each in (*whole, *strided, torch.zeros(4), torch.full((2,), 3.0))]

    x = torch.randn(3, 5)
    result, program = recorded(function, x)
    again = program(x)
    assert type(again) is list
    for old, new in zip(result, again, strict=True):
        assert (old.shape, old.stride(), old.dtype) == (new.shape, new.stride(), new.dtype)
        assert torch.equal(old, new) and (old is not new)


def test_results_in_sequences():
    """Functions that return lists, tuples and named tuples; and results that are tuples."""

    def function(x):
        first, _, third = scaled(x).split(2)
        values, indices = third.max(0)
        top = torch.topk(x, 2)
        return first, None, (values, [indices.float(), 3, True, "text"]), top.values

    x = torch.randn(6)
    result, program = recorded(function, x)
    again = program(x)
    torch.testing.assert_close(result[0], again[0])
    assert again[1] is None and again[2][1][1:] == [3, True, "text"]
    torch.testing.assert_close(result[2][0], again[2][0])
    torch.testing.assert_close(result[3], again[3])


def test_writes_are_kept():
    """In-place functions, ``out=``, assignments to an index, and launches without a result that is read."""

    def function(x, buffer):
        buffer.add_(1)
        buffer[0] = x[0]
        torch.mul(x, 3, out=buffer[2:])
        half = x.half()
        buffer[1].copy_(half[1])
        replay.launch(scale, (1,), x, buffer[:1], 5.0)

    x, buffer = torch.randn(4), torch.zeros(6)
    assert recorded(function, x, buffer)[0] is None
    _, program = recorded(function, x, torch.zeros(6))
    y, expected = torch.randn(4), torch.zeros(6)
    program(y, buffer.zero_())
    function(y, expected)
    assert torch.equal(buffer, expected) and buffer.abs().sum() > 0


def test_a_program_keeps_no_tensor_and_frees_what_is_read():
    """No tensor of the recorded call stays; in a replay an intermediate tensor is freed before the next step."""
    alive = []

    class Watch(Kernel):
        def __getitem__(self, grid):
            def run(x, out, *rest):
                alive.append([ref() is not None for ref in made])
                made.append(weakref.ref(x))
                super(Watch, self).__getitem__(grid)(x, out, *rest)

            return run

    made, kernel = [], Watch()

    def function(x):
        for _ in range(4):
            out = torch.empty_like(x)
            replay.launch(kernel, (4,), x, out, 2.0)
            x = out
        return x

    x = torch.randn(4)
    result, program = recorded(function, x)
    refs = [weakref.ref(x), weakref.ref(result)]
    del x, result
    gc.collect()
    assert not any(ref() is not None for ref in refs + made)
    made.clear(), alive.clear()
    y = torch.randn(4)
    torch.testing.assert_close(program(y), 16 * y)
    assert alive == [[], [True], [True, False], [True, False, False]]


@pytest.mark.parametrize("outside", [False, True])
def test_autocast(outside):
    """Each call has the state of its place, and the caller's state is restored, also after an error."""

    def function(x, weight):
        first = F.linear(x, weight)
        with torch.autocast("cpu", enabled=False):
            second = F.linear(x, weight)
        with torch.autocast("cpu", torch.float16):
            third = F.linear(x, weight)
        return scaled(x), first, second, third

    x, weight = torch.randn(3, 4), torch.randn(2, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.float16, enabled=outside):
        result, program = recorded(function, x, weight)
        again = program(x, weight)
        assert torch.is_autocast_enabled("cpu") == outside
        assert [each.dtype for each in result] == [each.dtype for each in again]
        with pytest.raises(RuntimeError):
            program(x, weight[:, :3])
        assert torch.is_autocast_enabled("cpu") == outside
    assert all(torch.equal(old, new) for old, new in zip(result, again, strict=True))


def test_another_autocast_dtype_cannot_be_recorded():
    def function(x):
        with torch.autocast("cpu", torch.bfloat16):
            return scaled(x), F.linear(x, x)

    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        _, why = unrecorded(function, torch.randn(3, 3))
    assert "autocast" in why


class Scale(torch.autograd.Function):
    """``2 * x + shift`` by the kernel, with what a context can hold."""

    @staticmethod
    @replay.recorded_forward
    def forward(ctx, x, shift, factor):
        ctx.set_materialize_grads(False)
        out = scaled(x, factor)
        if shift is not None:
            out += shift
        ctx.save_for_backward(x, None, shift)
        ctx.factor = factor
        return out

    @staticmethod
    def backward(ctx, grad):
        _, nothing, shift = ctx.saved_tensors
        assert nothing is None
        grad_shift = grad.sum(0) if ctx.needs_input_grad[1] else None
        assert grad_shift is None or shift is not None
        return scaled(grad.contiguous(), ctx.factor) if ctx.needs_input_grad[0] else None, grad_shift, None


def leaf(*shape):
    return torch.randn(*shape).requires_grad_()


def test_gradients():
    def function(x, shift):
        return Scale.apply(x, shift, 2.0)

    x, shift = leaf(3, 4), leaf(4)
    result, program = recorded(function, x, shift)
    assert result.grad_fn is not None
    for _ in range(3):
        scale.launches.clear()
        out = program(x, shift)
        assert torch.equal(out, result) and out.requires_grad
        grads = torch.autograd.grad(out.square().sum(), (x, shift))
        torch.testing.assert_close(grads, (4 * out.detach(), 2 * out.detach().sum(0)))
        assert len(scale.launches) == 2
    with torch.no_grad():
        assert not program(x, shift).requires_grad


def test_gradients_of_other_layouts_and_needs():
    """Backward is recorded anew for other properties of the upstream gradient and for other tensors that need one."""

    def function(x, shift):
        return Scale.apply(x, shift, 2.0)

    x, shift = leaf(3, 4), leaf(4)
    _, program = recorded(function, x, shift)
    upstream = torch.randn(3, 4), torch.randn(4, 3).mT, torch.randn(3, 1).expand(3, 4), torch.ones(()).expand(3, 4)
    for grad in 3 * upstream:
        for wanted in ((x, shift), (x,), (shift,)):
            out = program(x, shift)
            found = torch.autograd.grad(out, wanted, grad)
            expected = {id(x): 2 * grad, id(shift): grad.sum(0)}
            torch.testing.assert_close(found, tuple(expected[id(each)] for each in wanted))


def test_the_limit_of_recorded_backward_passes(monkeypatch):
    monkeypatch.setattr(guards, "MOST", 2)
    _, program = recorded(lambda x: Scale.apply(x, None, 2.0), leaf(3, 4))
    for width in range(1, 5):
        x = leaf(3, 4)
        grad = torch.randn(3, 4 * width)[:, ::width]
        torch.testing.assert_close(torch.autograd.grad(program(x), x, grad)[0], 2 * grad)
    assert len(program._gradients._replays) == 2


def test_what_autograd_checks_is_checked():
    """A saved tensor that changed, a second backward pass, hooks on saved tensors, and a second derivative."""
    x, shift = leaf(3, 4), leaf(4)
    _, program = recorded(lambda x, shift: Scale.apply(x, shift, 2.0), x, shift)
    out = program(x, shift)
    with torch.no_grad():
        shift.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    out = program(x, shift)
    out.sum().backward(retain_graph=True)
    out.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        out = program(x, shift)
    assert len(packed) == 2
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], torch.full((3, 4), 2.0))


def test_an_error_leaves_nothing_behind():
    def function(x):
        scaled(x)
        raise KeyError("own")

    with pytest.raises(KeyError, match="own"):
        replay.record(function, (torch.randn(3),))
    assert replay.recording() is None and not torch._C._len_torch_function_stack()
    recorded(scaled, torch.randn(3))


def _reads_a_value(x):
    return scaled(x) * x[0].item()


def _branches(x):
    return scaled(x) if x.sum() > 0 else x


def _differentiates(x):
    return scaled(x.detach()) * x


def _differentiates_twice(x):
    return Scale.apply(Scale.apply(x, None, 2.0), None, 3.0)


def _goes_on(x):
    return Scale.apply(x, None, 2.0).detach().clone(), 1


def _takes_another_tensor(x, foreign=torch.ones(3)):  # noqa: B008
    return scaled(x) + foreign


def _nests(x):
    replay.launch(lambda: None, (1,), {"a": x})


class Ignoring(torch.autograd.Function):
    @staticmethod
    @replay.recorded_forward
    def forward(ctx, x, other):
        return scaled(x)


def _differentiates_no_argument(x, other=leaf(3)):  # noqa: B008
    return Ignoring.apply(x, other)


REASONS = {
    _reads_a_value: "item returns no tensor",
    _branches: "__bool__ returns no tensor",
    _differentiates: "mul is differentiated by itself",
    _differentiates_twice: "it is differentiated in two parts",
    _goes_on: "its result is not that of its autograd function",
    _takes_another_tensor: "it reads a tensor that is neither an argument nor made by a noted call",
    _differentiates_no_argument: "its autograd function differentiates a tensor that is no argument",
    lambda x: x + 1: "it launches no kernel",
}


@pytest.mark.parametrize("function", REASONS, ids=lambda function: function.__name__.strip("_<>"))
def test_what_cannot_be_recorded(function):
    """The call itself is not affected."""
    x = torch.rand(3).requires_grad_("differentiates" in function.__name__ or function is _goes_on)
    result, why = unrecorded(function, x)
    assert why is not None and REASONS[function] in why
    torch.testing.assert_close(result, function(x))


def test_the_same_tensor_twice():
    x = torch.randn(3)
    assert unrecorded(lambda x, y: scaled(x) + y, x, x)[1] == "two arguments are the same tensor"


def test_threads_do_not_see_each_other():
    """What another thread does meanwhile is not noted."""
    started, done = threading.Event(), threading.Event()

    def work():
        started.wait()
        scaled(torch.randn(3))
        done.set()

    def function(x):
        started.set()
        assert done.wait(10)
        return scaled(x)

    thread = threading.Thread(target=work)
    thread.start()
    _, program = recorded(function, torch.randn(3))
    thread.join()
    assert len(steps(program)) == 3


@pytest.mark.gpu
def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    x = torch.randn(8, device="cuda:1")
    _, program = recorded(scaled, x)
    torch.testing.assert_close(program(x), 2 * x)
    assert torch.cuda.current_device() == 0

"""Replay: the launches and PyTorch calls of a function as straight Python code, without the code that chose them.

Sizes, layouts, launch parameters and the choice of kernels take most of a call's time in Python, and are the same for
all tensors with the same properties. :func:`record` runs a function once and notes each launch (:func:`launch`) and
each call of PyTorch (as a ``TorchFunctionMode``). It writes a Python function that makes the same calls with other
tensors, and deletes each tensor after its last use. ``Program.source`` is its text.

A function cannot be recorded if it reads a value of a tensor, reads a tensor that is neither an argument nor made by a
noted call, or calls a differentiable function outside of one hand-written ``autograd.Function``. Then :func:`record`
returns no program, and ``Recorder.why`` says why.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch._C import _dynamo
from torch.overrides import TorchFunctionMode

from . import guards

_READS = {"__get__", "size", "stride", "dim", "numel", "storage_offset", "is_contiguous", "get_device", "__len__"}
"""Names of functions that read properties of a tensor, and no values."""

_ALLOCATIONS = (torch.empty, torch.Tensor.new_empty, torch.empty_like)


def _empty(x: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Inductor's (size, stride, dtype) -> an empty tensor on the current device of x's type, with little overhead."""
    return _dynamo.guards.__dict__["_empty_strided_cuda" if x.is_cuda else "_empty_strided_cpu"]


_NATIVE = "torch._ops.t2t_fast_native"

_thread = threading.local()


def recording() -> "Recorder | None":
    """The recorder of this thread, or ``None``."""
    return getattr(_thread, "recorder", None)


@contextmanager
def _paused() -> Iterator[None]:
    """Inside, nothing is noted."""
    recorder, _thread.recorder = recording(), None
    try:
        with nullcontext() if recorder is None else torch._C.DisableTorchFunction():
            yield
    finally:
        _thread.recorder = recorder


def launch(kernel: Any, grid: tuple[int, ...], /, *arguments: Any, **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)`` of a Triton kernel, noted by a recorder."""
    recorder = recording()
    if recorder is not None:
        recorder.note_launch(kernel[grid], arguments, constants)
    with _paused():  # Triton's interpreter calls PyTorch
        kernel[grid](*arguments, **constants)


def atomic(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: a recorder notes a call of ``function`` as one call, since it does not always do the same."""

    @wraps(function)
    def call(*arguments: Any) -> Any:
        recorder = recording()
        if recorder is None:
            return function(*arguments)
        with _paused():
            result = function(*arguments)
        recorder.note_call(function, arguments, {}, result, atomic=True)
        return result

    return call


def recorded_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of the ``forward(ctx, ...)`` of an ``autograd.Function``, which a recorder needs to see."""

    @wraps(forward)
    def noted(ctx: Any, *inputs: Any) -> Any:
        result = forward(ctx, *inputs)
        recorder = recording()
        if recorder is not None:
            recorder.note_function(ctx, inputs, result)
        return result

    return noted


class Unrecordable(Exception):
    """The reason why a function cannot be replayed."""


class _Step(NamedTuple):
    """A line of a program, what it reads and makes, whether it can be left out, and autocast's state."""

    line: str
    reads: set[str]
    makes: list[str]
    optional: bool
    autocast: bool | None = None


class _Function(NamedTuple):
    """A call of an ``autograd.Function``."""

    backward: Callable[..., Any]
    attributes: dict[str, Any]
    inputs: tuple[Any, ...]
    outputs: Any
    saved: tuple[Any, ...]


class Recorder(TorchFunctionMode):
    """Notes what a function does with its arguments; ``None`` for absent tensors.

    Attributes:
        why: why it cannot be replayed, or ``None``.
    """

    def __init__(self, tensors: Sequence[torch.Tensor | None]) -> None:
        super().__init__()
        self.why: str | None = None
        self._arguments = [f"a{index}" for index in range(len(tensors))]
        self._names: dict[int, str] = {}
        self._bases: dict[str, str] = {}
        self._held: list[torch.Tensor] = []
        """All named tensors: while they live, their ids are unique."""
        self._steps: list[_Step] = []
        self._constants: dict[str, Any] = {}
        self._launches = 0  # of Triton kernels, and calls of native operators
        self._function: _Function | None = None
        self._first = next(tensor for tensor in tensors if tensor is not None)
        self._device = self._first.device.type
        self._differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        self._autocast = torch.is_autocast_enabled(self._device)
        self._autocast_dtype = torch.get_autocast_dtype(self._device)
        for name, tensor in zip(self._arguments, tensors, strict=True):
            if tensor is not None:
                if id(tensor) in self._names:
                    self.why = "two arguments are the same tensor"
                self._name(tensor, name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.note_call(func, args, kwargs or {}, result)
        return result

    def note_call(self, function: Any, args: Any, named: dict[str, Any], result: Any, atomic: bool = False) -> None:
        """Note a call of PyTorch, or of a function that is ``atomic``."""
        if self.why is not None:
            return
        try:
            self._note(function, args, named, result, atomic)
        except Unrecordable as reason:
            self.why = str(reason)

    def _note(self, function: Any, args: Any, named: dict[str, Any], result: Any, atomic: bool) -> None:
        name = getattr(function, "__name__", "")
        writes = atomic or name == "__setitem__" or named.get("out") is not None
        writes = writes or (name.endswith("_") and not name.endswith("__"))
        found = list(_tensors(result))
        if not found and not writes:
            if name not in _READS and _some((args, named)):
                raise Unrecordable(f"{name} returns no tensor")
            return
        fresh = [(path, tensor) for path, tensor in found if id(tensor) not in self._names]
        if not fresh and not writes:
            return
        if any(tensor.requires_grad for _, tensor in found) and torch.is_grad_enabled():
            raise Unrecordable(f"{name} is differentiated by itself")
        reads: set[str] = set()
        if function in _ALLOCATIONS and result.is_contiguous() and result.device == self._first.device:
            call = f"{self._constant(_empty(result))}({tuple(result.shape)}, {result.stride()}, "
            call += f"{self._constant(result.dtype)})"
        else:
            arguments = [self._text(each, reads) for each in args]
            arguments += [f"{key}={self._text(each, reads)}" for key, each in named.items()]
            call = f"{self._constant(function)}({', '.join(arguments)})"
        self._launches += getattr(function, "__module__", "").startswith(_NATIVE)
        made = {path: self._name(tensor) for path, tensor in fresh}
        if not atomic and isinstance(result, torch.Tensor) and fresh:
            for _, tensor in _tensors(args):  # a view that begins where its base does
                if tensor.dtype == result.dtype and tensor.data_ptr() == result.data_ptr() != 0:
                    base = self._names[id(tensor)]
                    self._bases[made[()]] = self._bases.get(base, base)
                    break
        depth = max(map(len, made), default=0)
        if depth == 0:
            line = f"{made[()]} = {call}" if made else call
        elif depth == 1 and set(made) == {(index,) for index in range(len(result))}:
            line = f"{', '.join(made.values())}, = {call}"
        else:
            items = (f"{each} = result{''.join(f'[{index!r}]' for index in path)}" for path, each in made.items())
            line = "; ".join((f"result = {call}", *items, "result = None"))
        enabled = torch.is_autocast_enabled(self._device)
        if enabled and torch.get_autocast_dtype(self._device) != self._autocast_dtype:
            raise Unrecordable("the dtype of autocast changes in it")
        self._steps.append(_Step(line, reads, list(made.values()), not writes, enabled))

    def note_launch(self, run: Callable[..., Any], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        """Note the launch of a kernel, which sees of a tensor only its dtype and its address."""
        if self.why is not None:
            return
        reads: set[str] = set()
        self._launches += 1
        try:
            given = [self._text(each, reads, True) for each in arguments]
            given += [f"{key}={self._text(each, reads, True)}" for key, each in constants.items() if _some(each)]
        except Unrecordable as reason:
            self.why = str(reason)
        else:
            run = partial(run, **{key: each for key, each in constants.items() if not _some(each)})
            self._steps.append(_Step(f"{self._constant(run)}({', '.join(given)})", reads, [], False))

    def note_function(self, ctx: Any, inputs: tuple[Any, ...], outputs: Any) -> None:
        """Note a call of an ``autograd.Function``."""
        if self._function is not None:
            self.why = "it is differentiated in two parts"
        backward, attributes = type(ctx)._forward_cls.backward, dict(vars(ctx))
        self._function = _Function(backward, attributes, inputs, outputs, tuple(ctx.to_save or ()))

    def program(self, result: Any) -> "Program | None":
        """What was recorded, as a function of the arguments that returns ``result``; ``None`` if that is impossible."""
        if self.why is None and not self._launches:
            self.why = "it launches no kernel"
        if self.why is None and self._differentiated and self._function is None:
            self.why = "its autograd function is not noted"
        if self.why is None:
            try:
                return self._program(result)
            except Unrecordable as reason:
                self.why = str(reason)
        return None

    def _program(self, result: Any) -> "Program":
        reads: set[str] = set()
        returned = self._text(result, reads)
        function = self._function
        if function is None:
            return Program(self._written(returned, reads), None)
        if [id(each) for _, each in _tensors(result)] != [id(each) for _, each in _tensors(function.outputs)]:
            raise Unrecordable("its result is not that of its autograd function")
        places = []
        for each in function.inputs:
            name = self._names.get(id(each)) if isinstance(each, torch.Tensor) else None
            places.append(self._arguments.index(name) if name in self._arguments else None)
            if places[-1] is None and isinstance(each, torch.Tensor) and each.requires_grad:
                raise Unrecordable("its autograd function differentiates a tensor that is no argument")
        saved = self._text(list(function.saved), reads) if function.saved else "()"
        written = self._written(f"{self._text(function.outputs, reads)}, {saved}", reads)
        gradients = Gradients(function.backward, function.attributes, places, len(function.saved))
        return Program(written, gradients)

    def _written(self, returned: str, results: set[str]) -> "_Written":
        """The source of the steps that are needed for ``results``, and the function."""
        steps, needed = [], set(results)
        for step in reversed(self._steps):
            if not step.optional or needed.intersection(step.makes):
                steps.append(step)
                needed |= step.reads
        steps.reverse()
        last = {name: index for index, step in enumerate(steps) for name in (*step.makes, *step.reads)}
        dead: dict[int, list[str]] = {}
        for name, index in last.items():
            if name not in results and name not in self._arguments:
                dead.setdefault(index, []).append(name)
        lines, autocast = [], self._autocast
        for index, step in enumerate(steps):
            if step.autocast not in (None, autocast):
                autocast = step.autocast
                lines.append(f"set_autocast_enabled({self._device!r}, {autocast})")
            lines.append(step.line)
            if index in dead:
                lines.append(f"del {', '.join(dead[index])}")
        if any(line.startswith("set_autocast") for line in lines):
            body = [f"    {line}" for line in lines] + [f"    return {returned}"]
            lines = ["try:", *body, "finally:", f"    set_autocast_enabled({self._device!r}, {self._autocast})"]
        else:
            lines.append(f"return {returned}")
        source = "\n    ".join((f"def replay({', '.join(self._arguments)}):", *lines)) + "\n"
        names = {"set_autocast_enabled": torch.set_autocast_enabled, **self._constants}
        exec(compile(source, "<t2t_fast replay>", "exec"), names)
        return _Written(source, names["replay"])

    def _name(self, tensor: torch.Tensor, name: str | None = None) -> str:
        self._held.append(tensor)
        found = self._names[id(tensor)] = name or f"t{len(self._held)}"
        return found

    def _constant(self, value: Any) -> str:
        name = f"c{len(self._constants)}"
        self._constants[name] = value
        return name

    def _text(self, value: Any, reads: set[str], base: bool = False) -> str:
        """An expression for ``value``; base: where a tensor's address and dtype suffice, and views need not be made."""
        if isinstance(value, torch.Tensor):
            if id(value) not in self._names:
                raise Unrecordable("it reads a tensor that is neither an argument nor made by a noted call")
            name = self._names[id(value)]
            name = self._bases.get(name, name) if base else name
            reads.add(name)
            return name
        if value is None or type(value) in (bool, int):
            return repr(value)
        if not _some(value):
            return self._constant(value)
        if isinstance(value, dict):
            raise Unrecordable("a dictionary contains tensors")
        inside = "".join(f"{self._text(each, reads, base)}, " for each in value)
        if type(value) is list:
            return f"[{inside}]"
        return f"({inside})" if type(value) is tuple else f"{self._constant(type(value))}({inside})"


def _tensors(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], torch.Tensor]]:
    """The tensors in nested tuples, lists and dictionaries, with their indices."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, (tuple, list, dict)):
        for index, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(each, (*path, index))


def _some(value: Any) -> bool:
    """Whether there is a tensor in it."""
    return next(_tensors(value), None) is not None


class _Written(NamedTuple):
    source: str
    run: Callable[..., Any]


class Program:
    """A recorded function of tensors, which does the same with other tensors of the same kind (:class:`guards.Kinds`).

    Attributes:
        source: its Python text.
    """

    def __init__(self, written: _Written, gradients: "Gradients | None") -> None:
        self.source, self._run = written
        self._gradients = gradients

    def __call__(self, *tensors: torch.Tensor | None) -> Any:
        first: Any = tensors[0]
        if first.is_cuda and first.get_device() != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return self._call(tensors)
        return self._call(tensors)

    def _call(self, tensors: tuple[torch.Tensor | None, ...]) -> Any:
        if self._gradients is None:
            return self._run(*tensors)
        return _Replayed.apply(self._run, self._gradients, *tensors)


class _Replayed(torch.autograd.Function):
    """The forward of a :class:`Program` and the backward of the function that was recorded."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], gradients: "Gradients", *tensors: torch.Tensor | None) -> Any:
        result, saved = run(*tensors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        ctx.gradients = gradients
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        return None, None, *ctx.gradients(ctx.needs_input_grad[2:], grads, ctx.saved_tensors)


class Gradients:
    """The backward of an ``autograd.Function``, replayed from the second call with the same properties on.

    Args:
        backward: the static method; attributes: of its context.
        places: for each input of the function its place among the arguments of the program, or ``None``.
        saved: the number of saved tensors.
    """

    def __init__(
        self, backward: Callable[..., Any], attributes: dict[str, Any], places: list[int | None], saved: int
    ) -> None:
        self._backward, self._attributes, self._places, self._saved = backward, attributes, places, saved
        self._replays: guards.Kinds[Replay] = guards.Kinds()

    def __call__(
        self, needed: tuple[bool, ...], grads: tuple[torch.Tensor | None, ...], saved: tuple[torch.Tensor | None, ...]
    ) -> Any:
        """The gradients of all arguments of the program, ``None`` unless needed."""
        tensors, run = (*grads, *saved), partial(self._run, needed)
        state = None if grads[0] is None else guards.state(grads[0])
        if state is None or torch.is_grad_enabled():  # a second derivative is wanted
            return run(*tensors)
        options = needed, state
        replay = self._replays.find(options, tensors) or self._replays.add(options, tensors, Replay())
        return run(*tensors) if replay is None else replay(run, tensors)

    def _run(self, needed: tuple[bool, ...], *tensors: torch.Tensor | None) -> Any:
        context = SimpleNamespace(**self._attributes)
        context.needs_input_grad = tuple([place is not None and needed[place] for place in self._places])
        number = len(tensors) - self._saved
        context.saved_tensors = tensors[number:]
        gradients: list[Any] = [None] * len(needed)
        for place, gradient in zip(self._places, self._backward(context, *tensors[:number]), strict=True):
            if place is not None:
                gradients[place] = gradient
        return tuple(gradients)


def record(
    function: Callable[..., Any], tensors: Sequence[torch.Tensor | None]
) -> tuple[Any, Program | None, str | None]:
    """``function(*tensors)``, its program, and why there is none."""
    recorder = _thread.recorder = Recorder(tensors)
    try:
        with recorder:
            result = function(*tensors)
    finally:
        _thread.recorder = None
    return result, recorder.program(result), recorder.why


class Replay:
    """Runs a function of tensors: records its first call and replays that in the next ones, if it can be replayed.

    It keeps the program, not the function. Nothing is recorded inside another record or while a CUDA graph is captured.
    """

    __slots__ = ("_attempted", "_program")

    def __init__(self) -> None:
        self._program: Program | None = None
        self._attempted = False

    def __call__(self, function: Callable[..., Any], tensors: Sequence[torch.Tensor | None]) -> Any:
        """``function(*tensors)``."""
        if self._program is not None:
            return self._program(*tensors)
        first: Any = tensors[0]
        if self._attempted or recording() is not None or guards.capturing(first):
            return function(*tensors)
        self._attempted = True
        result, self._program, _ = record(function, tensors)
        return result

"""``cuda_graph``: a model's inference for one input shape, recorded as a CUDA graph.

``torch.cuda.make_graphed_callables`` does this for training; it checks neither the input nor the parameters at a call.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn


class Graphs(Protocol):
    """What :class:`CapturedModel` needs of CUDA; a parameter, so that tests run without a GPU."""

    def warm_up(self, run: Callable[[], Any], device: torch.device, times: int) -> None:
        """Call ``run`` several times before the capture."""

    def record(self, run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        """Capture ``run``. Returns a function that replays it, and the result that each replay overwrites."""


class CudaGraphs:
    """:class:`Graphs` by PyTorch's CUDA graphs."""

    def warm_up(self, run: Callable[[], Any], device: torch.device, times: int) -> None:
        """Call ``run`` on a side stream, as PyTorch's documentation requires; kernels are compiled and tested here."""
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(times):
                run()
        torch.cuda.current_stream(device).wait_stream(stream)

    def record(self, run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        """Capture ``run`` into a ``torch.cuda.CUDAGraph``."""
        graph = torch.cuda.CUDAGraph()
        # a stream of this device: PyTorch's default one belongs to the device of the first capture in the process;
        # "thread_local" lets other threads use CUDA meanwhile
        capturing = torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local")
        with torch.cuda.device(device), capturing:
            result = run()
        return graph.replay, result


class CapturedModel:
    """A model's forward pass in inference for one shape, dtype and device of its input; made by :func:`cuda_graph`.

    Not safe for concurrent use by several threads or streams: the input and the output are one buffer each.
    """

    def __init__(self, model: nn.Module, x: torch.Tensor, warmup: int, graphs: Graphs) -> None:
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self.model = model
        # in inference mode, neither input nor output could be written to later, outside it
        with torch.inference_mode(False):
            self._x = x.detach().clone()

        def run() -> Any:
            # a weight in autocast's cache would be cast outside the graph, and a replay would not see it change
            casting = torch.autocast(kind, autocast[1], enabled=autocast[0], cache_enabled=False)
            with torch.inference_mode(False), torch.no_grad(), casting:
                return model(self._x)

        graphs.warm_up(run, x.device, warmup)
        self._replay, self._result = graphs.record(run, x.device)
        _map_tensors(lambda tensor: tensor, self._result)
        self._slots = [(path, held, name, _identity(held[name])) for path, held, name in _slots(model)]

    def __call__(self, x: torch.Tensor, *, copy: bool = True) -> Any:
        """The model's result for ``x``.

        Args:
            x: of the captured shape, dtype and device, any strides.
            copy: ``False`` returns the graph's own output, which the next call overwrites.

        Raises:
            TypeError, ValueError: ``x`` is not a tensor, or has another shape, dtype or device.
            RuntimeError: a parameter, a buffer or a module was replaced, or the model is in training mode.
        """
        _check_tensor("CapturedModel", x)
        expected, given = _signature(self._x), _signature(x)
        if given != expected:
            raise ValueError(f"CapturedModel: x must be {_describe(expected)}, as captured, got {_describe(given)}")
        self._check_model()
        self._x.copy_(x.detach())
        self._replay()
        return _map_tensors(torch.clone, self._result) if copy else self._result

    def _check_model(self) -> None:
        if self.model.training:
            raise RuntimeError("CapturedModel: the model is in training mode, but it was captured in eval mode")
        for path, held, name, before in self._slots:
            if _identity(held.get(name)) != before:
                raise RuntimeError(
                    f"CapturedModel: {path} was replaced after the capture, but the graph still uses the old one; "
                    "capture the model again"
                )


def cuda_graph(model: nn.Module, x: torch.Tensor, *, warmup: int = 3) -> CapturedModel:
    """Capture a model's inference as a CUDA graph, for inputs of one shape.

    At batch 1 a GPU waits for Python to launch its kernels; replaying a graph launches them all at once. There is no
    gain where the kernels themselves take longer than their launches.

    Everything is computed inside the graph, so in-place changes of parameters (``copy_``, ``load_state_dict``, an
    optimizer) change its results. Replaced parameters, buffers and modules (``p.data = ...``, ``model.to(...)``,
    ``model.head = ...``) are detected at the next call, which then raises: every call compares the address and layout
    of each, which takes well under a microsecond. The autocast state, the backends and the precision
    of matrix products are those at the time of the capture.

    Args:
        model: any ``nn.Module`` on one CUDA device, in eval mode, whose forward takes a tensor, neither synchronises
            with the device nor reads from it, and returns a tensor, or tuples, lists and dictionaries of tensors.
        x: an input with the shape, dtype and device of later calls.
        warmup: number of calls before the capture, at least 1.

    Returns:
        :class:`CapturedModel`, called like the model: ``captured(x)``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, device or value, or a result of another type.
        RuntimeError: there is no CUDA device.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"cuda_graph: model must be a torch.nn.Module, got {type(model).__name__}")
    _check_tensor("cuda_graph", x)
    if not isinstance(warmup, int) or warmup < 1:
        raise ValueError(f"cuda_graph: warmup must be an int of at least 1, got {warmup!r}")
    training = next((path for path, module in model.named_modules() if module.training), None)
    if training is not None:
        raise ValueError(
            f"cuda_graph: model must be in eval mode (model.eval()), but {training or 'the model'} is in training mode"
        )
    if not torch.cuda.is_available():
        raise RuntimeError("cuda_graph: PyTorch finds no CUDA device, and other devices have no CUDA graphs")
    if x.device.type != "cuda":
        raise ValueError(f"cuda_graph: x must be on a CUDA device, got {x.device}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device != x.device:
            raise ValueError(f"cuda_graph: {name} must be on the device of x ({x.device}), got {tensor.device}")
    return CapturedModel(model, x, warmup, CudaGraphs())


def _check_tensor(function: str, x: object) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{function}: x must be a torch.Tensor, got {type(x).__name__}")


def _slots(model: nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Where the parameters, buffers and children of every module are stored: path, dictionary and key."""
    for prefix, module in model.named_modules():
        for held in (module._parameters, module._buffers, module._modules):
            for name in held:
                yield f"{prefix}.{name}" if prefix else name, held, name


def _identity(value: object) -> object:
    """What must not change for a replay to be right: a tensor's memory and layout; a module itself."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr(), value.shape, value.stride(), value.dtype
    return value


def _signature(x: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
    return tuple(x.shape), x.dtype, x.device


def _describe(signature: tuple[tuple[int, ...], torch.dtype, torch.device]) -> str:
    shape, dtype, device = signature
    return f"{shape} {str(dtype).removeprefix('torch.')} on {device}"


def _map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """``function`` of every tensor in a model's result, in the same containers."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return type(value)((name, _map_tensors(function, item)) for name, item in value.items())
    if isinstance(value, (tuple, list)):
        items = [_map_tensors(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    raise TypeError(
        "cuda_graph: the model must return a tensor or tuples, lists and dictionaries of them, "
        f"got {type(value).__name__}"
    )

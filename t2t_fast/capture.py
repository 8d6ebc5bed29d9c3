"""``capture``: a model's inference for one shape as a CUDA graph, so that a call costs one launch."""

import torch
from torch import nn


class CudaGraphs:
    """The two things that :class:`CapturedModel` asks of CUDA."""

    @staticmethod
    def warm_up(run, device, times):
        """Call ``run`` on a side stream, as a capture wants it; kernels are compiled and tried out here."""
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(times):
                run()
        torch.cuda.current_stream(device).wait_stream(stream)

    @staticmethod
    def record(run, device):
        """Capture ``run``. Returns the function that replays it, and the result that a replay writes."""
        graph = torch.cuda.CUDAGraph()
        # a stream of this device: torch's own belongs to the first one that captured; and other threads may go on
        capturing = torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local")
        with torch.cuda.device(device), capturing:
            result = run()
        return graph.replay, result


class CapturedModel:
    """A model's forward pass in inference for one shape, dtype and device of its input; made by :func:`capture`.

    Not for several threads or streams at a time: there is one input and one output in memory.
    """

    def __init__(self, model, x, warmup, graphs):
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self.model = model
        # in inference mode, neither input nor output could be written to later, outside it
        with torch.inference_mode(False):
            self._x = x.detach().clone()

        def run():
            # a weight in autocast's cache would be cast outside the graph, and a replay would not see it change
            casting = torch.autocast(kind, autocast[1], enabled=autocast[0], cache_enabled=False)
            with torch.inference_mode(False), torch.no_grad(), casting:
                return model(self._x)

        graphs.warm_up(run, x.device, warmup)
        self._replay, self._result = graphs.record(run, x.device)
        _each(lambda tensor: tensor, self._result)
        self._places = [(path, held, name, _identity(held[name])) for path, held, name in _places(model)]

    def __call__(self, x, *, copy=True):
        """The model's result for ``x``.

        Args:
            x: of the captured shape, dtype and device, any strides.
            copy: ``False`` gives the graph's own output, which the next call overwrites.

        Raises:
            TypeError, ValueError: ``x`` is no tensor, or of another shape, dtype or device.
            RuntimeError: a parameter, a buffer or a module was replaced, or the model is in training mode.
        """
        _check_tensor("CapturedModel", x)
        wanted, found = _form(self._x), _form(x)
        if found != wanted:
            raise ValueError(f"CapturedModel: x must be {_words(wanted)}, as captured, got {_words(found)}")
        self._check_model()
        self._x.copy_(x.detach())
        self._replay()
        return _each(torch.clone, self._result) if copy else self._result

    def _check_model(self):
        if self.model.training:
            raise RuntimeError("CapturedModel: the model is in training mode, but its eval mode was captured")
        for path, held, name, before in self._places:
            if _identity(held.get(name)) != before:
                raise RuntimeError(
                    f"CapturedModel: {path} was replaced after the capture, and the graph would go on with what was "
                    "there before; capture the model again"
                )


def capture(model, x, *, warmup=3):
    """Capture a model's inference as a CUDA graph, for inputs of one shape.

    At batch 1 a GPU waits for Python to launch its kernels; a replay launches them all at once. It helps where that
    is so, and does not where the kernels themselves take the time.

    Everything is computed inside the graph, so parameters that change in place (``copy_``, ``load_state_dict``, an
    optimizer) change its results. Parameters, buffers and modules that are replaced (``p.data = ...``,
    ``model.to(...)``, ``model.head = ...``) are noticed at the next call, which then raises: every call compares the
    address and layout of each, which takes well under a microsecond. The autocast state, the backends and the precision
    of matrix products are those of the place of the capture.

    Args:
        model: any ``nn.Module`` on one CUDA device, in eval mode, whose forward takes a tensor, neither waits for the
            device nor reads from it, and returns a tensor, or tuples, lists and dictionaries of tensors.
        x: an input with the shape, dtype and device of those to come.
        warmup: calls before the capture, at least 1.

    Returns:
        :class:`CapturedModel`, called like the model: ``captured(x)``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, device or value, or a result of another type.
        RuntimeError: there is no CUDA device.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"capture: model must be a torch.nn.Module, got {type(model).__name__}")
    _check_tensor("capture", x)
    if not isinstance(warmup, int) or warmup < 1:
        raise ValueError(f"capture: warmup must be an int of at least 1, got {warmup!r}")
    training = next((path for path, module in model.named_modules() if module.training), None)
    if training is not None:
        raise ValueError(
            f"capture: model must be in eval mode (model.eval()), but {training or 'the model'} is in training mode"
        )
    if not torch.cuda.is_available():
        raise RuntimeError("capture: PyTorch finds no CUDA device, and only CUDA has graphs")
    if x.device.type != "cuda":
        raise ValueError(f"capture: x must be on a CUDA device, got {x.device}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device != x.device:
            raise ValueError(f"capture: {name} must be on the device of x ({x.device}), got {tensor.device}")
    return CapturedModel(model, x, warmup, CudaGraphs)


def _check_tensor(function, x):
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{function}: x must be a torch.Tensor, got {type(x).__name__}")


def _places(model):
    """Where parameters, buffers and children of every module are held: path, dictionary and key."""
    for prefix, module in model.named_modules():
        for held in (module._parameters, module._buffers, module._modules):
            for name in held:
                yield f"{prefix}.{name}" if prefix else name, held, name


def _identity(value):
    """What must not change for a replay to be right: a tensor's memory and layout; a module itself."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr(), value.shape, value.stride(), value.dtype
    return value


def _form(x):
    return tuple(x.shape), x.dtype, x.device


def _words(form):
    shape, dtype, device = form
    return f"{shape} {str(dtype).removeprefix('torch.')} on {device}"


def _each(function, value):
    """``function`` of every tensor in a model's result."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return type(value)((name, _each(function, item)) for name, item in value.items())
    if isinstance(value, (tuple, list)):
        items = [_each(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    raise TypeError(
        f"capture: the model must return a tensor or tuples, lists and dictionaries of them, got {type(value).__name__}"
    )

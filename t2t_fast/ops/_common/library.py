"""Registration of the package's operators in ``torch.library``.

Each operator ``t2t_fast::<name>`` takes the resolved backend as its last argument. It is a composite operator,
which ``torch`` decomposes: the plain-PyTorch backends need no fake implementation, autograd formula (other than a
hand-written ``autograd.Function``) or Inductor lowering, and ``torch.export`` can decompose it. The ``call`` of a
backend with compiled kernels calls separate opaque operators, which register a fake implementation and autograd.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F

from ... import backends
from . import flops, transforms
from .spec import Window

OPAQUE = ("triton", "native")
"""Backends whose kernels are opaque to PyTorch."""

_library = torch.library.Library("t2t_fast", "DEF")

AUTOCAST_DEVICES = frozenset(kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind))
"""Device types with autocast; queried once, since torch 2.11 cannot trace the query."""


def define(
    name: str,
    signature: str,
    implementations: Mapping[str, backends.Implementation],
    absent: Mapping[str, str],
    autocast: Callable[..., Any],
    returns: str = "Tensor",
) -> Callable[..., Any]:
    """Define ``t2t_fast::<name>(<signature>, str backend) -> <returns>``.

    Args:
        name: the operator's name.
        signature: its arguments in ``torch.library`` schema language.
        implementations: backend name -> :class:`backends.Implementation`.
        absent: backend name -> why there is no such implementation.
        returns: what it returns, in the same language.
        autocast: the operator's autocast rule, ``autocast(call, dtype, *args)``, which runs with autocast disabled;
            ``call(*args)`` runs the operator.

    Returns:
        the operator as a function; its attribute ``straight`` is a function for arguments that :func:`direct` allows.
    """
    backends.register(name, implementations, absent)
    _library.define(f"{name}({signature}, str backend) -> {returns}")

    def composite(*args: Any) -> Any:
        *values, backend = args
        if backend in OPAQUE:
            if (transform := transforms.active()) is not None:
                raise RuntimeError(f"t2t_fast::{name}: backend {backend!r} does not support {transform}")
            if torch._C._len_torch_dispatch_stack():
                flops.teach()
        return _trusting(False, backends.implementation(name, backend).call, *values)

    _library.impl(name, composite, "CompositeImplicitAutograd")
    operator = getattr(torch.ops.t2t_fast, name).default

    def under_autocast(device: str, call: Callable[..., Any], *args: Any) -> Any:
        *values, backend = args
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return autocast(lambda *a: call(*a, backend), dtype, *values)

    for device in ("cpu", "cuda"):
        _library.impl(name, partial(under_autocast, device, operator), f"Autocast{device.upper()}")

    def straight(*args: Any) -> Any:
        *values, backend = args
        call, device = backends.implementation(name, backend).call, values[0].device.type
        if not (device in ("cpu", "cuda") and torch.is_autocast_enabled(device)):
            return _trusting(True, call, *values)
        torch.set_autocast_enabled(device, False)  # torch.autocast takes ten times as long
        try:
            return _trusting(True, autocast, call, torch.get_autocast_dtype(device), *values)
        finally:
            torch.set_autocast_enabled(device, True)

    @wraps(operator)
    def run(*args: Any) -> Any:
        if direct(args):
            return straight(*args)
        if transforms.active() is None:
            return operator(*args)
        # Transformations have no rule for the operator itself, and a trace would record it as one opaque node.
        device = args[0].device.type
        autocasts = device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)
        # ONNX export is for inference, and ONNX has no node for a hand-written backward
        with torch.no_grad() if torch.onnx.is_in_onnx_export() else nullcontext():
            return under_autocast(device, composite, *args) if autocasts else composite(*args)

    setattr(run, "straight", straight)  # noqa: B010 - functions have no such attribute for mypy
    return run


PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_CONSTANT = frozenset((int, float, bool, str, type(None), torch.dtype, Window))


def undisturbed() -> bool:
    """Whether only the kernels' own code depends on a call: no compiler, trace, mode, transformation, profiler."""
    return not torch.compiler.is_compiling() and not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or transforms.active() is not None
    )


def direct(arguments: Sequence[Any]) -> bool:
    """Whether a Python kernel may be called with these arguments instead of its operator, with the same result.

    PyTorch's dispatcher takes about 10 microseconds for such a call. It is needed if something else follows the call
    (:func:`undisturbed`), and for tensors whose memory is not their value.
    """
    return undisturbed() and _plain(arguments)


def _plain(values: Sequence[Any]) -> bool:
    """Whether none of these values (and of lists among them) is a tensor that a kernel cannot read as it is."""
    for value in values:
        kind = type(value)
        if kind in _CONSTANT:
            continue
        if kind in PLAIN:
            if value.is_neg() or value._is_zerotensor():
                return False
        elif isinstance(value, torch.Tensor) or (isinstance(value, (list, tuple)) and not _plain(value)):
            return False
    return True


class _Trust(threading.local):
    """``given``: whether this thread is in a call that :func:`direct` allowed, with its tensors or those it made."""

    given = False


trust = _Trust()


def _trusting(given: bool, call: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """``call(*args, **named)``, in which :data:`trust` is ``given`` or not."""
    before, trust.given = trust.given, given
    try:
        return call(*args, **named)
    finally:
        trust.given = before


def directly(tensors: Sequence[torch.Tensor | None], call: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """``call(*args, **named)`` of a backward pass with these tensors, which are checked once for all its operators."""
    if torch.compiler.is_compiling():
        return call(*args, **named)
    return _trusting(direct(tensors), call, *args, **named)


def opaque_obstacle(request: backends.Request, dtypes: Sequence[torch.dtype], kind: str) -> str | None:
    """Why opaque kernels of a kind ("native", "Triton") for ``dtypes`` cannot run a :class:`Request`, or ``None``."""
    if request.dtype not in dtypes:
        return f"no {kind} kernel for {str(request.dtype).removeprefix('torch.')}"
    if request.transform == transforms.TRACING:
        return f"a traced program would need the {kind} kernels where it runs"
    if request.transform is not None:
        return f"the {kind} kernels do not support {request.transform}"
    if transforms.is_exporting():
        return f"an exported program would need the {kind} kernels where it runs"
    return None


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd would record an operation on these tensors (``None`` is skipped)."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for a hand-written backward: disables autocast, raises an error if a second derivative is requested,
    and returns no gradients if there is no incoming gradient."""
    once = torch.autograd.function.once_differentiable(backward)

    @wraps(backward)
    def guarded(ctx: Any, *grads: torch.Tensor | None) -> Any:
        if torch.is_grad_enabled() and any(grad is not None and grad.requires_grad for grad in grads):
            raise RuntimeError(
                "t2t_fast: this operator has no second derivative (its backward was asked for one by "
                "create_graph=True); use t2t_fast.backend('reference') for it"
            )
        if grads[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        kind = grads[0].device.type
        if kind not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(kind):
            return once(ctx, *grads)
        with torch.autocast(kind, enabled=False):
            return once(ctx, *grads)

    return guarded


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, exponents and sums: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def _convolution_as_matmul() -> Iterator[None]:
    convolution: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolution.fp32_precision
    convolution.fp32_precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    try:
        yield
    finally:
        convolution.fp32_precision = before


def matmul_precision(x: torch.Tensor) -> AbstractContextManager[None]:
    """A context that applies torch's precision setting for matrix products to a convolution of float32 ``x``.

    By default cuDNN convolutions use TF32 and matrix products do not; here the convolution implements a Linear. In a
    graph compiled by ``torch.compile`` the convolution runs later, under cuDNN's own setting.
    """
    return _convolution_as_matmul() if x.is_cuda and x.dtype == torch.float32 else nullcontext()


def product(
    x: torch.Tensor, matrix: torch.Tensor, into: torch.Tensor | None = None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``x @ matrix + bias`` for (..., N, I) and (I, O), written into ``into`` (a dead buffer or a slice) if it fits.

    On a CPU, the first access to new memory costs more than such a product. Not under ``torch.jit.trace``, since a
    traced program may be differentiated.
    """
    if (
        into is None
        or torch.jit.is_tracing()
        or into.dtype != x.dtype
        or into.shape != (*x.shape[:-1], matrix.shape[1])
    ):
        return x @ matrix if bias is None else F.linear(x, matrix.T, bias)
    rows, out = x.flatten(0, -2), into.flatten(0, -2)
    if bias is None:
        torch.mm(rows, matrix, out=out)
    else:
        torch.addmm(bias, rows, matrix, out=out)
    return into

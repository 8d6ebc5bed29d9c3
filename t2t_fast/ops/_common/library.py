"""Registration of the package's operators in ``torch.library``.

Each operator ``t2t_fast::<name>`` takes the resolved backend as its last argument. It is a composite operator,
which ``torch`` decomposes: the plain-PyTorch backends need no fake implementation, autograd formula (other than a
hand-written ``autograd.Function``) or Inductor lowering, and ``torch.export`` can decompose it. The ``call`` of a
backend with compiled kernels calls separate opaque operators, which register a fake implementation and autograd.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F

from ... import backends
from . import flops, replay, transforms
from .cached import FOLDED

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
        the operator as a function.
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
        return backends.implementation(name, backend).call(*values)

    _library.impl(name, composite, "CompositeImplicitAutograd")
    operator = getattr(torch.ops.t2t_fast, name).default

    def under_autocast(device: str, call: Callable[..., Any], *args: Any) -> Any:
        *values, backend = args
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return autocast(lambda *a: call(*a, backend), dtype, *values)

    for device in ("cpu", "cuda"):
        _library.impl(name, partial(under_autocast, device, operator), f"Autocast{device.upper()}")

    @wraps(operator)
    def run(*args: Any) -> Any:
        if transforms.active() is None and replay.recording() is None:
            return operator(*args)
        # Transformations have no rule for the operator itself, and a trace would record it as one opaque node.
        device = args[0].device.type
        autocasts = device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)
        # ONNX export is for inference, and ONNX has no node for a hand-written backward
        with torch.no_grad() if torch.onnx.is_in_onnx_export() else nullcontext():
            return under_autocast(device, composite, *args) if autocasts else composite(*args)

    return run


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
    returns no gradients if there is no incoming gradient, and clears the cached weights, which change next."""
    once = torch.autograd.function.once_differentiable(backward)

    @wraps(backward)
    def guarded(ctx: Any, *grads: torch.Tensor | None) -> Any:
        if torch.is_grad_enabled() and any(grad is not None and grad.requires_grad for grad in grads):
            raise RuntimeError(
                "t2t_fast: this operator has no second derivative (its backward was asked for one by "
                "create_graph=True); use t2t_fast.backend('reference') for it"
            )
        if not torch.compiler.is_compiling():
            FOLDED.clear()
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

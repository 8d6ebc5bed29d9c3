"""Support of the token_mlp kernels: which calls they accept, and the self-test before the first call."""

import torch

from ..._common import triton_runtime as runtime
from .. import aten
from ..autograd import MlpParameters, Options
from . import launch
from .operators import run, run_backward


def _sizes(request):
    """Channels and hidden units."""
    width = request.sizes.get("width", 64)
    return width, request.sizes.get("hidden", width)


def obstacle(request):
    """Why the kernels do not support a call, or ``None``, without a self-test."""
    why = runtime.reason(request)
    for size, of in zip(_sizes(request), ("channels", "hidden units"), strict=True):
        if why is None and not 1 <= size <= launch.LARGEST:
            why = f"the Triton kernels of token_mlp take 1 to {launch.LARGEST} {of}, got {size}"
    return why


def kind(request):
    """The properties that select a kernel: the parameters' dtype, channels, hidden units, and whether there is dropout
    and a backward pass. All are constants, as torch.compile needs.
    """
    width, hidden = (runtime.fixed(size) for size in _sizes(request))
    training = bool(request.sizes.get("training", True))
    dropout = bool(request.sizes.get("dropout", training))
    # LayerNorm of one or two values cancels gradients (almost) entirely: a relative error would be meaningless
    return runtime.operand_dtype(request, "parameters"), max(width, 3), hidden, dropout, training


def supports(request):
    """Why the kernels cannot run a call, or ``None``; runs the self-test at the first call of a kind on a device."""
    return obstacle(request) or _trial(request.sizes.get("index"), request.dtype, *kind(request))


def _trial(index, dtype, *call):
    return runtime.trial("token_mlp", _run, _expected, index, dtype, *call)


# what torch.compiler.assume_constant_result sets, without its import of the compiler
_trial._dynamo_marked_constant = True


def problem(device, dtype, parameters, width, hidden, dropout):
    """Two sequences longer than a tile, v inside a wider tensor; an upstream gradient, parameters and a seed."""
    generator = torch.Generator().manual_seed(0)
    shape = 2, runtime.TRIAL_TOKENS
    grad, y, packed = (
        torch.randn(*shape, size, generator=generator).to(device, dtype) for size in (width, width, 3 * width)
    )
    shapes = MlpParameters((width, width), width, width, width, (hidden, width), hidden, (width, hidden), width)
    drawn = [torch.randn(shape, generator=generator) * width**-0.5 for shape in shapes]
    drawn[MlpParameters._fields.index("norm_weight")] += 1
    mlp = MlpParameters(*(t.to(device, parameters) for t in drawn))
    drops, seed = (0.0, 0.0), None
    if dropout:
        drops, seed = (0.1, 0.2), torch.tensor(-(2**40) - 1, device=device)
    return grad, y, packed[..., -width:], mlp, Options(1e-5, *drops), seed


def _both(forward, backward, grad, arguments, training):
    out = forward(*arguments)
    if not training:
        return (out,)
    d_y, d_v, gradients = backward(grad, *arguments, [True] * len(MlpParameters._fields))
    return out, d_y, d_v, *gradients


def _run(device, dtype, *call):
    *sizes, training = call
    grad, *arguments = problem(device, dtype, *sizes)
    with runtime.crowded():
        again = run(*arguments)
    return [again, *_both(run, run_backward, grad, arguments, training)]


def _expected(device, dtype, *call):
    *sizes, training = call
    grad, y, v, mlp, *rest = problem(device, dtype, *sizes)
    arguments = [y.float(), v.float(), MlpParameters(*(t.float() for t in mlp)), *rest]
    out, *gradients = _both(aten.run, aten.run_backward, grad.float(), arguments, training)
    return [out, out, *gradients]

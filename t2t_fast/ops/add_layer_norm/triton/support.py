"""Support of add_layer_norm's kernels: which calls they accept, and the self-test before the first call."""

import torch

from ..._common import triton_runtime as runtime
from ..._common.philox import NONE, Drops
from .. import aten
from ..autograd import Norm
from . import launch, operators


def obstacle(request):
    """Why the kernels do not support a call, or ``None``, without a self-test."""
    why, width = runtime.reason(request), request.sizes.get("width", 64)
    if why is None and not 1 <= width <= launch.LARGEST:
        why = f"the Triton kernels of LayerNorm take 1 to {launch.LARGEST} channels, got {width}"
    return why


def kind(request):
    """The properties that select a kernel: dtypes of stream and parameters, width, whether there is a branch, dropout
    or stochastic depth, and a backward pass. All are constants, as torch.compile needs.
    """
    given = request.sizes
    # LayerNorm of one or two values cancels gradients (almost) entirely: a relative error would be meaningless
    width, training = max(runtime.fixed(given.get("width", 64)), 3), bool(given.get("training", True))
    dtypes = (runtime.operand_dtype(request, name) for name in ("stream", "parameters"))
    return *dtypes, width, bool(given.get("branch", True)), bool(given.get("dropout", training)), training


def supports(request):
    """Why the kernels cannot run a call, or ``None``; runs the self-test at the first call of a kind on a device."""
    return obstacle(request) or _trial(request.sizes.get("index"), request.dtype, *kind(request))


def _trial(index, dtype, *call):
    return runtime.trial("add_layer_norm", _run, _expected, index, dtype, *call)


# what torch.compiler.assume_constant_result sets, without its import of the compiler
_trial._dynamo_marked_constant = True


def problem(device, dtype, stream, parameters, width, branch, dropout):
    """Two samples of several tiles: upstream gradients of n and t, x, a branch or ``None``, norm, seed, drops."""
    generator = torch.Generator().manual_seed(0)
    shape = 2, runtime.TRIAL_TOKENS, width
    skip, grad, x, added = (torch.randn(shape, generator=generator) for _ in range(4))
    weight, bias = (torch.randn(width, generator=generator) * 0.1 + one for one in (1, 0))
    norm = Norm(weight.to(device, parameters), bias.to(device, parameters), 1e-5)
    masks = (torch.tensor(5, device=device), Drops(0.1, 0.5)) if dropout else (None, NONE)
    skip, x = skip.to(device, stream), x.to(device, stream)
    return grad.to(device, dtype), skip, x, added.to(device, dtype) if branch else None, norm, masks


def _both(parts, grad, skip, x, branch, norm, masks, dtype, training):
    t, n = parts.add_normalised(x, norm, dtype, branch, *masks)
    if not training:
        return t, n
    found = parts.normalised_backward(grad, skip, t, norm, None if branch is None else branch.dtype, *masks)
    return t, n, *(each for each in found if each is not None)


def _run(device, dtype, *call):
    *sizes, training = call
    return _both(operators, *problem(device, dtype, *sizes), dtype, training)


def _expected(device, dtype, *call):
    *sizes, training = call
    *tensors, norm, masks = problem(device, dtype, *sizes)
    tensors = [None if t is None else t.float() for t in tensors]
    norm = Norm(norm.weight.float(), norm.bias.float(), norm.eps)
    return _both(aten, *tensors, norm, masks, torch.float32, training)

"""Support of layer_norm_mlp's kernels: which calls they accept, and the self-test before the first call."""

import torch

from ..._common import triton_runtime as runtime
from ..._common.philox import NONE, Drops
from ...add_layer_norm import aten as plain_norm
from ...add_layer_norm.triton import launch as norm_launch
from ...add_layer_norm.triton import operators as norm
from .. import aten
from ..autograd import Options, Parameters, run, run_backward
from . import operators


def obstacle(request):
    """Why the kernels do not support a call, or ``None``, without a self-test."""
    why, most = runtime.reason(request), norm_launch.LARGEST
    for name in ("width", "outputs"):
        size = request.sizes.get(name, 64)
        if why is None and not 1 <= size <= most:
            why = f"the Triton kernels of layer_norm_mlp take 1 to {most} channels, got {name} {size}"
    return why


def kind(request):
    """The properties that select a kernel: dtypes of stream and parameters, width, hidden units, outputs; whether there
    are a branch, LayerNorm, dropout of any kind, the residual, and a backward pass. All are constants, as
    torch.compile needs.
    """
    given = request.sizes
    training = bool(given.get("training", True))
    width = max(runtime.fixed(given.get("width", 64)), 3)  # as in add_layer_norm's support
    hidden, outputs = (runtime.fixed(given.get(name, width)) for name in ("hidden", "outputs"))
    dtypes = (runtime.operand_dtype(request, name) for name in ("stream", "parameters"))
    options = (bool(given.get(name, default)) for name, default in (("branch", True), ("normed", True)))
    dropout, residual = bool(given.get("dropout", training)), bool(given.get("residual", True))
    return *dtypes, width, hidden, width if residual else outputs, *options, dropout, residual, training


def supports(request):
    """Why the kernels cannot run a call, or ``None``; runs the self-test at the first call of a kind on a device."""
    return obstacle(request) or _trial(request.sizes.get("index"), request.dtype, *kind(request))


def _trial(index, dtype, *call):
    return runtime.trial("layer_norm_mlp", _run, _expected, index, dtype, *call)


# what torch.compiler.assume_constant_result sets, without its import of the compiler
_trial._dynamo_marked_constant = True


def problem(device, dtype, stream, parameters, width, hidden, outputs, branch, normed, dropout, residual):
    """Two samples of several tiles: an upstream gradient, x, a branch or ``None``, the seed, options, parameters."""
    generator = torch.Generator().manual_seed(0)
    tokens = 2, runtime.TRIAL_TOKENS
    grad, x, added = (torch.randn(*tokens, size, generator=generator) for size in (outputs, width, width))
    shapes = Parameters(width, width, (hidden, width), hidden, (outputs, hidden), outputs)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    scales = Parameters(0.1, 0.1, width**-0.5, 0.1, hidden**-0.5, 0.1)
    drawn = [scale * t.to(device) for scale, t in zip(scales, drawn, strict=True)]
    drawn[0] = 1 + drawn[0]
    mlp = Parameters(*(t.to(parameters) for t in drawn))
    if not normed:
        mlp = mlp._replace(norm_weight=None, norm_bias=None)
    drops, hidden_drop, seed = (NONE, NONE), 0.0, None
    if dropout:
        drops, hidden_drop, seed = (Drops(0.1, 0.5), Drops(0.2, 0.3)), 0.1, torch.tensor(5, device=device)
    options = Options(1e-5 if normed else None, drops, hidden_drop, residual, False, dtype)
    out_dtype = stream if residual else dtype
    added = added.to(device, dtype) if branch else None
    return grad.to(device, out_dtype), x.to(device, stream), added, seed, options, mlp


def _both(of_norm, of_mlp, grad, x, branch, seed, options, mlp, training):
    out, t, h = run(of_norm, of_mlp, x, branch, seed, options, mlp, training)
    if not training:
        return (out,)
    dtype = None if branch is None else branch.dtype
    needed = [True] * len(mlp)
    found = run_backward(of_norm, of_mlp, grad, t, h, dtype, seed, options, mlp, needed)
    return out, *(each for each in found if each is not None)


def _run(device, dtype, *call):
    *sizes, training = call
    return _both(norm, operators, *problem(device, dtype, *sizes), training)


def _expected(device, dtype, *call):
    *sizes, training = call
    *tensors, seed, options, mlp = problem(device, dtype, *sizes)
    tensors = [None if t is None else t.float() for t in tensors]
    mlp = Parameters(*(None if t is None else t.float() for t in mlp))
    options = options._replace(dtype=torch.float32)
    return _both(plain_norm, aten, *tensors, seed, options, mlp, training)

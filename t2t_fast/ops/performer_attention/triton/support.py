"""Support of the attention kernels: which calls they accept, and the self-test before the first call."""

import torch

from ..._common import triton_runtime as runtime
from .. import aten
from . import launch


def obstacle(request):
    """Why the kernels do not support a call, or ``None``, without a self-test."""
    why = runtime.reason(request) or aten.beyond_kernels(request, "Triton")
    width = request.sizes.get("width", 64)
    if why is None and width > launch.LARGEST_WIDTH:
        why = f"the Triton kernels take up to {launch.LARGEST_WIDTH} channels, got {width}"
    return why


def kind(request):
    """The properties that select a kernel: w's dtype, the channels, the features, and whether there is a key mask,
    a backward pass and a gradient of w. All are constants, as torch.compile needs.
    """
    sizes = request.sizes
    # beyond some number of features, more features only add chunks to the same kernels
    width, features = runtime.fixed(sizes.get("width", 64)), runtime.fixed(sizes.get("features", 32))
    masked, training = bool(sizes.get("masked", False)), bool(sizes.get("training", False))
    w_gradient = training and bool(sizes.get("w_gradient", False))
    return runtime.operand_dtype(request, "w"), width, min(features, launch.ALIKE), masked, training, w_gradient


def supports(request):
    """Why the kernels cannot run a call, or ``None``; runs the self-test at the first call of a kind on a device."""
    return obstacle(request) or _trial(request.sizes.get("index"), request.dtype, *kind(request))


def _trial(index, dtype, *call):
    return runtime.trial("performer_attention", _run, _expected, index, dtype, *call)


# what torch.compiler.assume_constant_result sets, without its import of the compiler
_trial._dynamo_marked_constant = True


def problem(device, dtype, w_dtype, width, features):
    """Two sequences of norm 2, longer than a tile, side by side in one tensor: q, k, v; w; and an upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, runtime.TRIAL_TOKENS, width, generator=generator) for _ in range(4))
    w = torch.randn(features, width, generator=generator)
    packed = torch.cat([2 * width**-0.5 * k, 2 * width**-0.5 * q, v], -1).to(device, dtype)
    k, q, v = packed.chunk(3, dim=-1)
    return q, k, v, w.to(device, w_dtype), grad.to(device, dtype)


def _mask_of_problem(k, masked):
    """Every third key is masked."""
    return torch.arange(k.shape[1], device=k.device).remainder(3).ne(0).repeat(k.shape[0], 1) if masked else None


def _run(device, dtype, w_dtype, width, features, masked, training, w_gradient):
    *tensors, grad = problem(device, dtype, w_dtype, width, features)
    rest = 1e-8, _mask_of_problem(tensors[1], masked)
    y, lz, state = runtime.operators.performer_attention(*tensors, *rest)
    if not training:
        return (y,)
    *found, d_w = runtime.operators.performer_attention_backward(grad, *tensors, *rest, lz, state, w_gradient)
    return (y, *found, d_w) if w_gradient else (y, *found)


def _expected(device, dtype, w_dtype, width, features, masked, training, w_gradient):
    *tensors, grad = (t.float() for t in problem(device, dtype, w_dtype, width, features))
    rest = 1e-8, _mask_of_problem(tensors[1], masked)
    y, lz, state = aten.attend(*tensors, *rest)
    if not training:
        return (y,)
    d_q, d_k, *others = aten.gradients(grad, *tensors, *rest, lz, state, w_gradient)
    # a softmax over one feature does not depend on q: two terms as large as d_k cancel in d_q
    return (y, (d_q, d_k) if features == 1 else d_q, d_k, *(t for t in others if t is not None))

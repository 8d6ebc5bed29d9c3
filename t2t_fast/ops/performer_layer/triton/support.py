"""Support of the layer's kernels: which calls they accept, and the self-test before the first call."""

import math
from typing import NamedTuple

import torch

from ..._common import triton_runtime as runtime
from ...performer_attention.triton import support as attention
from ...soft_split_linear.triton import support as split
from ...token_mlp.triton import support as mlp
from .. import aten
from ..autograd import Layer
from .operators import run, run_backward


def supports(request):
    """Why the kernels cannot run a call, or ``None``; runs the self-test at the first call of a kind on a device."""
    for each in (attention, split, mlp):
        why = each.obstacle(request)
        if why is not None:
            return why
    (w_dtype, _, *of_attention), of_mlp = attention.kind(request), mlp.kind(request)
    call = w_dtype, of_mlp[1], *of_attention, *split.kind(request), *of_mlp
    recompute = bool(request.sizes.get("recompute", False))
    return _trial(request.sizes.get("index"), request.dtype, recompute, *call)


def _trial(index, dtype, *call):
    return runtime.trial("performer_layer", _tried, _expected, index, dtype, *call)


# what torch.compiler.assume_constant_result sets, without its import of the compiler
_trial._dynamo_marked_constant = True


class _Problem(NamedTuple):
    """A layer on two small images, whose keys and queries have norm 2; the arguments of ``run``, and an upstream
    gradient.
    """

    layer: Layer
    seed: torch.Tensor | None
    w: torch.Tensor
    tensors: tuple
    grad: torch.Tensor
    needed: list


def _problem(device, dtype, recompute, *call):
    of_attention, of_split, of_mlp = call[:6], call[6:-5], call[-5:]
    w_dtype, width, features, _, training, w_gradient = of_attention
    (image, channels, window, _, _), needed = split.called(*of_split)
    sizes = channels, window, 3 * width, True, runtime.TRIAL_TOKENS
    x_and_linear, pixels, _ = split.problem(device, dtype, image, *sizes)
    x_and_linear[1][: 2 * width] *= 2 * width**-0.5
    *_, w, _ = attention.problem(device, dtype, w_dtype, width, features)
    _, y, _, parameters, options, seed = mlp.problem(device, dtype, *of_mlp[:-1])
    length = math.prod(window.grid(*x_and_linear[0].shape[2:]))
    grad = y[:, :1].expand(-1, length, -1).contiguous()
    # inference saves as little as training with recompute
    layer = Layer(1e-5, window, dtype, pixels, 1e-8, options, recompute or not training)
    needed = [w_gradient, *needed, *[training] * len(parameters)]
    return _Problem(layer, seed, w, (*x_and_linear, *parameters), grad, needed)


def _both(forward, backward, problem):
    layer, seed, w, tensors, grad, needed = problem
    out, *kept = forward(layer, seed, w, *tensors)
    if not any(needed):
        return [out]
    gradients = backward(grad, kept, layer, seed, w, *tensors, needed=needed)
    return [out, *(t for t, wanted in zip(gradients, needed, strict=True) if wanted)]


def _tried(device, dtype, *call):
    problem = _problem(device, dtype, *call)
    with runtime.crowded():
        again, *_ = run(problem.layer, problem.seed, problem.w, *problem.tensors)
    return [again, *_both(run, run_backward, problem)]


def _expected(device, dtype, *call):
    problem = _problem(device, dtype, *call)
    wide = [t.float() if t.is_floating_point() else t for t in problem.tensors]
    problem = problem._replace(
        layer=problem.layer._replace(dtype=torch.float32),
        w=problem.w.float(),
        tensors=wide,
        grad=problem.grad.float(),
    )
    out, *gradients = _both(aten.run, aten.run_backward, problem)
    return [out, out, *gradients]

"""The arguments of layer_norm_mlp, and its autograd function, composed of add_layer_norm's parts and the MLP's."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .._common.library import first_order, wants_gradient
from .._common.philox import Drops
from .._common.replay import recorded_forward
from ..add_layer_norm.autograd import Norm
from ..layer_norm_linear.autograd import linear_gradients


class Parameters(NamedTuple):
    """The parameters; biases and LayerNorm's two may be ``None``."""

    norm_weight: torch.Tensor | None
    norm_bias: torch.Tensor | None
    fc1_weight: torch.Tensor
    fc1_bias: torch.Tensor | None
    fc2_weight: torch.Tensor
    fc2_bias: torch.Tensor | None


class Options(NamedTuple):
    """The arguments that are not tensors.

    Attributes:
        norm_eps: ``None`` without LayerNorm.
        drops: of the branch that is added first, and of the MLP's output.
        hidden_drop: dropout of the hidden units.
        residual: whether the MLP's output is added to its input.
        recompute: whether backward computes fc1 again.
        dtype: of the matrix products.
    """

    norm_eps: float | None
    drops: tuple[Drops, Drops]
    hidden_drop: float
    residual: bool
    recompute: bool
    dtype: torch.dtype


def unpack(
    norm_weight,
    norm_bias,
    norm_eps,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    branch_drop,
    branch_path,
    hidden_drop,
    drop,
    drop_path,
    residual,
    recompute,
    dtype,
    seed,
):
    """The operator's arguments after x and branch, as :class:`Parameters`, :class:`Options` and the seed."""
    drops = Drops(branch_drop, branch_path), Drops(drop, drop_path)
    parameters = Parameters(norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return parameters, Options(norm_eps, drops, hidden_drop, residual, recompute, dtype), seed


def run(norm, mlp, x, branch, seed, options, parameters, keep):
    """The output, the stream (x itself without a branch), and fc1's output, ``None`` unless ``keep``."""
    of_norm = Norm(*parameters[:2], options.norm_eps)
    t, n = norm.add_normalised(x, of_norm, options.dtype, branch, seed, options.drops[0])
    h, a = mlp.fc1_gelu(n, parameters, options, seed, keep)
    buffer = None if options.norm_eps is None else n  # without LayerNorm, n may be the input itself
    return mlp.fc2_add(a, t, parameters, options, seed, buffer), t, h


def run_backward(norm, mlp, grad, t, h, branch_dtype, seed, options, parameters, needed):
    """The gradients of x, of the branch (``None`` without ``branch_dtype``) and of the parameters, ``None`` unless
    needed.
    """
    of_norm, fc1, fc2 = Norm(*parameters[:2], options.norm_eps), parameters[2:4], parameters[4:]
    n = None
    if h is None:
        _, n = norm.add_normalised(t, of_norm, options.dtype)
        h = F.linear(n, *(None if p is None else p.to(options.dtype) for p in fc1))
    d_f, sums = mlp.fc2_gradient(grad, options, seed)
    d_h, a, fc1_sums = mlp.fc2_gelu_backward(d_f, h, parameters, options, seed)
    d_fc2 = linear_gradients(d_f, a, *fc2, needed[4:], sums)
    skip, again = grad if options.residual else None, needed[2] and n is None
    d_n = d_h @ parameters.fc1_weight.to(options.dtype)
    d_x, d_branch, found, *d_norm = norm.normalised_backward(
        d_n, skip, t, of_norm, branch_dtype, seed, options.drops[0], again
    )
    d_fc1 = linear_gradients(d_h, found if again else n, *fc1, needed[2:4], fc1_sums)
    return d_x, d_branch, *d_norm, *d_fc1, *d_fc2


def differentiable(norm, mlp):
    """The operator's forward; saves the stream, fc1's output (unless ``recompute``), the seed and the parameters.

    Args:
        norm: add_layer_norm's implementation, a module with the functions of its ``aten.py``.
        mlp: a module with the functions ``fc1_gelu``, ``fc2_add``, ``fc2_gradient`` and ``fc2_gelu_backward`` of
            ``aten.py``.
    """

    class LayerNormMlp(torch.autograd.Function):
        """Gradients for the stream, the branch and every parameter."""

        @staticmethod
        @recorded_forward
        def forward(ctx, x, branch, seed, options, *parameters):
            out, t, h = run(norm, mlp, x, branch, seed, options, Parameters(*parameters), not options.recompute)
            ctx.options, ctx.branch_dtype = options, None if branch is None else branch.dtype
            ctx.save_for_backward(t, h, seed, *parameters)
            return out

        @staticmethod
        @first_order
        def backward(ctx, grad):
            t, h, seed, *parameters = ctx.saved_tensors
            branch_dtype = ctx.branch_dtype if ctx.needs_input_grad[1] else None
            needed = ctx.needs_input_grad[4:]
            d_x, d_branch, *gradients = run_backward(
                norm, mlp, grad, t, h, branch_dtype, seed, ctx.options, Parameters(*parameters), needed
            )
            return d_x, d_branch, None, None, *gradients

    def forward(x, branch, *arguments):
        parameters, options, seed = unpack(*arguments)
        if wants_gradient(x, branch, *parameters):
            return LayerNormMlp.apply(x, branch, seed, options, *parameters)
        return run(norm, mlp, x, branch, seed, options, parameters, False)[0]

    return forward

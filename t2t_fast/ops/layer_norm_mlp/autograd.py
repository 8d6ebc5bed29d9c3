"""The arguments of layer_norm_mlp, and its autograd function, composed of add_layer_norm's parts and the MLP's."""

from typing import NamedTuple

import torch

from .._common.library import first_order, wants_gradient
from .._common.philox import Drops
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


def differentiable(norm, mlp):
    """The operator's forward; saves the stream, fc1's output (unless ``recompute``), the seed and the parameters.

    Args:
        norm: add_layer_norm's implementation, a module with the functions of its ``aten.py``.
        mlp: a module with the functions ``fc1_gelu``, ``fc2_add`` and ``fc2_gelu_backward`` of ``aten.py``.
    """

    def tokens(t, parameters, options):
        """fc1's input."""
        if options.norm_eps is None:
            return t.to(options.dtype)
        return norm.normalised(t, parameters.norm_weight, parameters.norm_bias, options.norm_eps, options.dtype)

    def run(x, branch, seed, options, parameters, keep):
        """The output, the stream (x itself without a branch), and fc1's output, ``None`` unless ``keep``."""
        t = x if branch is None else norm.add(x, branch, seed, options.drops)
        n = tokens(t, parameters, options)
        h, a = mlp.fc1_gelu(n, parameters, options, seed, keep)
        buffer = None if options.norm_eps is None else n  # without LayerNorm, n may be the input itself
        return mlp.fc2_add(a, t, parameters, options, seed, buffer), t, h

    def run_backward(grad, t, h, seed, options, parameters, needed):
        """The gradients of the stream, in the accumulation dtype, and of the parameters, ``None`` unless needed."""
        fc1, fc2 = parameters[2:4], parameters[4:]
        if h is None:
            h, _ = mlp.fc1_gelu(tokens(t, parameters, options), parameters, options, seed, True)
        d_f = norm.dropped(grad, seed, options.drops, 1, options.dtype)
        d_h, a = mlp.fc2_gelu_backward(d_f, h, parameters, options, seed)
        d_fc2 = linear_gradients(d_f, a, *fc2, needed[4:])
        d_n = d_h @ parameters.fc1_weight.to(options.dtype)
        skip = grad if options.residual else None
        d_norm = None, None
        if options.norm_eps is None:
            n, d_t = t.to(options.dtype), d_n if skip is None else skip + d_n
        else:
            n, d_t, *d_norm = norm.normalised_backward(d_n, skip, t, *parameters[:2], options.norm_eps)
        return d_t, *d_norm, *linear_gradients(d_h, n, *fc1, needed[2:4]), *d_fc2

    class LayerNormMlp(torch.autograd.Function):
        """Gradients for the stream, the branch and every parameter."""

        @staticmethod
        def forward(x, branch, seed, options, *parameters):
            out, t, h = run(x, branch, seed, options, Parameters(*parameters), not options.recompute)
            return out, None if branch is None else t, h

        @staticmethod
        def setup_context(ctx, inputs, output):
            x, branch, seed, ctx.options, *parameters = inputs
            _, t, h = output
            ctx.dtypes = x.dtype, None if branch is None else branch.dtype
            ctx.mark_non_differentiable(*(each for each in (t, h) if each is not None))
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(x if t is None else t, h, seed, *parameters)

        @staticmethod
        @first_order
        def backward(ctx, grad, *_):
            t, h, seed, *parameters = ctx.saved_tensors
            x_dtype, branch_dtype = ctx.dtypes
            d_t, *gradients = run_backward(
                grad, t, h, seed, ctx.options, Parameters(*parameters), ctx.needs_input_grad[4:]
            )
            d_branch = None
            if ctx.needs_input_grad[1]:
                d_branch = norm.dropped(d_t, seed, ctx.options.drops, 0, branch_dtype)
            return d_t.to(x_dtype), d_branch, None, None, *gradients

    def forward(x, branch, *arguments):
        parameters, options, seed = unpack(*arguments)
        if wants_gradient(x, branch, *parameters):
            return LayerNormMlp.apply(x, branch, seed, options, *parameters)[0]
        return run(x, branch, seed, options, parameters, False)[0]

    return forward

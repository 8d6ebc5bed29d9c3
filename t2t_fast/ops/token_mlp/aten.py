"""token_mlp; backward recomputes everything from (y, v) and the dropout seed.

    t = v + m1 (y Wp^T + bp)     n = LN(t)     h = n W1^T + b1     out = t + m2 (gelu(h) W2^T + b2)

Matrix products run in the inputs' dtype; sums, LayerNorm and GELU in float32 (float64 for float64).

Buffers of dead values are reused: on a CPU, the first access to new memory costs more than the arithmetic.
"""

import torch
import torch.nn.functional as F

from .._common.library import accumulation_dtype, product
from .._common.philox import dropout_, keep_masks
from .._common.transforms import constant
from .autograd import MlpParameters, differentiable


def _linear(x, weight, bias, into=None):
    return product(x, weight.to(x.dtype).T, into, None if bias is None else bias.to(x.dtype))


def _skip(v, y, mlp, options, keep):
    """``t``: a new tensor in the accumulation dtype."""
    t = _linear(y, mlp.proj_weight, mlp.proj_bias).to(accumulation_dtype(y.dtype))
    return dropout_(t, options.proj_drop, keep).add_(v)


def run(y, v, mlp, options, seed):
    """Forward without autograd."""
    keep_proj, keep_mlp = keep_masks(seed, y.shape, options.proj_drop, options.mlp_drop)
    t = _skip(v, y, mlp, options, keep_proj)
    gamma, beta = (None if p is None else p.to(t.dtype) for p in (mlp.norm_weight, mlp.norm_bias))
    centred = t - t.mean(-1, keepdim=True)  # else layer_norm subtracts the mean last, where an offset costs precision
    n = F.layer_norm(centred, (constant(t.shape[-1]),), gamma, beta, options.norm_eps).to(y.dtype)
    a = torch.ops.aten.gelu_(_linear(n, mlp.fc1_weight, mlp.fc1_bias, into=centred))
    f = _linear(a, mlp.fc2_weight, mlp.fc2_bias, into=n).to(t.dtype)
    return t.add_(dropout_(f, options.mlp_drop, keep_mlp)).to(y.dtype)


def _weight_gradient(grad, x):
    """``sum over tokens of grad x^T`` for (..., L, O) and (..., L, I): (O, I)."""
    return grad.flatten(0, -2).T @ x.flatten(0, -2)


def run_backward(grad, y, v, mlp, options, seed, needed):
    """All gradients; d_v is a new tensor in the accumulation dtype."""
    dtype, wide = y.dtype, accumulation_dtype(y.dtype)
    width = y.shape[-1]
    gradients = MlpParameters(*[None] * 8)._asdict()

    def want(name):
        return needed[MlpParameters._fields.index(name)] and getattr(mlp, name) is not None

    def give(name, value):
        gradients[name] = value.to(getattr(mlp, name).dtype)

    def give_bias(name, value):
        if want(name):
            give(name, value.flatten(0, -2).sum(0, dtype=wide))

    gamma = y.new_ones(width, dtype=wide) if mlp.norm_weight is None else mlp.norm_weight.to(wide)
    keep_proj, keep_mlp = keep_masks(seed, y.shape, options.proj_drop, options.mlp_drop)
    xhat = _skip(v, y, mlp, options, keep_proj)
    for _ in range(2):  # the second pass removes the rounding error of the mean
        xhat.sub_(xhat.mean(-1, keepdim=True))
    rstd = torch.rsqrt(torch.linalg.vecdot(xhat, xhat).unsqueeze(-1) / width + options.norm_eps)
    xhat.mul_(rstd)
    n = xhat * gamma
    n = (n if mlp.norm_bias is None else n.add_(mlp.norm_bias.to(wide))).to(dtype)
    h = _linear(n, mlp.fc1_weight, mlp.fc1_bias)

    grad = grad.to(wide)
    d_f = (grad if keep_mlp is None else dropout_(grad.clone(), options.mlp_drop, keep_mlp)).to(dtype)
    d_h = d_f @ mlp.fc2_weight.to(dtype)
    torch.ops.aten.gelu_backward.grad_input(d_h, h, grad_input=d_h)
    if want("fc2_weight"):
        give("fc2_weight", _weight_gradient(d_f, torch.ops.aten.gelu_(h)))
    give_bias("fc2_bias", d_f)
    if want("fc1_weight"):
        give("fc1_weight", _weight_gradient(d_h, n))
    give_bias("fc1_bias", d_h)

    d_n = product(d_h, mlp.fc1_weight.to(dtype), into=h).to(wide)
    give_bias("norm_bias", d_n)
    products = torch.mul(d_n, xhat, out=n) if n.dtype == wide else d_n * xhat
    give_bias("norm_weight", products)
    along = (products @ gamma).unsqueeze(-1).div_(width)
    mean = (d_n @ gamma).unsqueeze(-1).div_(width)
    d_t = d_n.mul_(gamma).sub_(mean).sub_(xhat.mul_(along)).mul_(rstd).add_(grad)
    d_p = (d_t if keep_proj is None else dropout_(products.copy_(d_t), options.proj_drop, keep_proj)).to(dtype)
    if want("proj_weight"):
        give("proj_weight", _weight_gradient(d_p, y))
    give_bias("proj_bias", d_p)
    return product(d_p, mlp.proj_weight.to(dtype), into=xhat), d_t, list(gradients.values())


forward = differentiable(run, run_backward)

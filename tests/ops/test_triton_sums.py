"""Long sums in float32: matrix units truncate their sums, so the Triton kernels accumulate the tiles themselves."""

import pytest
import torch

from t2t_fast import backends
from t2t_fast.ops._common import triton_runtime
from t2t_fast.ops._common.spec import square
from t2t_fast.ops.performer_attention.triton.call import Call
from t2t_fast.ops.performer_attention.triton.launch import TABLE as ATTENTION
from t2t_fast.ops.soft_split_linear.triton import operators as split
from t2t_fast.ops.soft_split_linear.triton.launch import TABLE as SPLIT
from t2t_fast.ops.token_mlp import aten as aten_impl
from t2t_fast.ops.token_mlp.autograd import MlpParameters, Options
from t2t_fast.ops.token_mlp.triton import operators as triton_impl
from t2t_fast.ops.token_mlp.triton.launch import TABLE as TOKEN_MLP
from t2t_fast.testing import errors, token_mlp_parameters, tolerance

REASON = triton_runtime.reason(backends.Request("cpu", torch.float32, {}))
triton = pytest.importorskip("triton", reason="triton is not installed")
tl = triton.language
kernels = pytest.importorskip("t2t_fast.ops.performer_attention.triton.forward", reason="triton is not installed")
pytestmark = [pytest.mark.interpret, pytest.mark.skipif(REASON is not None, reason=f"triton: {REASON}")]

SIDE = 64
TOKENS = SIDE * SIDE
"""4096 tokens in one program, 512 rounds of a matrix unit per product; a batch of 256 images has at least 57,344."""


@triton.jit
def inside_the_unit(a, b, acc, PRECISION: tl.constexpr, APART: tl.constexpr = False):
    """``acc + a b`` with the sum in the matrix unit from the first tile to the last."""
    large_a = (a.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
    large_b = (b.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
    acc = tl.dot(a - large_a, large_b, acc, input_precision="tf32")
    acc = tl.dot(large_a, b - large_b, acc, input_precision="tf32")
    return tl.dot(large_a, large_b, acc, input_precision="tf32")


def weights_of_a_linear():
    """The gradient of a Linear's weight; all values are positive, so every step truncates in the same direction."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 16, SIDE, SIDE, generator=generator).contiguous(memory_format=torch.channels_last)
    grad = torch.rand(1, TOKENS, 16, generator=generator)
    single = torch.empty(0)
    with SPLIT.override("weight", {"tokens": 32, "warps": 4, "stages": 1, "programs": 0}):
        found, _ = split._products(x, grad, single, single, False, *square(1, 1, 0), None)
    exact = grad[0].double().T @ x.permute(0, 2, 3, 1).reshape(TOKENS, 16).double()
    return {"weight": (found, exact)}


def parameters_of_a_mlp():
    generator = torch.Generator().manual_seed(0)
    mlp = MlpParameters(**token_mlp_parameters(generator, 16))
    mlp = mlp._replace(norm_bias=mlp.norm_bias + 2, fc1_weight=mlp.fc1_weight.abs())  # hidden units far above 0
    y, v, grad = torch.rand(3, 1, TOKENS, 16, generator=generator)
    rest = Options(1e-5, 0.0, 0.0), None
    with TOKEN_MLP.override("token_mlp_backward", {"tokens": 32, "warps": 4, "stages": 1, "programs": 0}):
        *_, found = triton_impl.run_backward(grad, y, v, mlp, *rest, [True] * 8)
    wide = MlpParameters(*(t.double() for t in mlp))
    *_, exact = aten_impl.run_backward(grad.double(), y.double(), v.double(), wide, *rest, [True] * 8)
    pairs = dict(zip(MlpParameters._fields, zip(found, exact, strict=True), strict=True))
    return {name: pairs[name] for name in ("proj_weight", "fc1_weight", "fc2_weight")}


def state_of_keys():
    generator = torch.Generator().manual_seed(0)
    k, v = torch.rand(2, 1, TOKENS, 16, generator=generator)
    w = torch.randn(8, 16, generator=generator) / 4
    with ATTENTION.override("keys", {"tokens": 32, "warps": 4, "stages": 1, "programs": 0}):
        _, found = kernels.launch_key_state(Call(k, w), k, v, None)
    a = k.double() @ w.double().T - k.double().square().sum(-1, keepdim=True) / 2
    return {"state": (found, a.softmax(-2).mT @ v.double())}


SUMS = {
    "weights of a Linear": (weights_of_a_linear, "soft_split_linear", ["soft_split_linear.triton.weight_gradient"]),
    "parameters token_mlp": (
        parameters_of_a_mlp,
        "token_mlp",
        ["token_mlp.triton.forward", "token_mlp.triton.backward"],
    ),
    "state of keys": (state_of_keys, "performer_attention", ["performer_attention.triton.forward"]),
}


@pytest.mark.parametrize("name", list(SUMS))
def test_many_tokens_in_one_accumulator(name, matrix_units, monkeypatch):
    """Within the table's tolerance, which a sum in the matrix unit would exceed."""
    from importlib import import_module

    compute, op, modules = SUMS[name]
    found = {each: errors(*pair)[0] for each, pair in compute().items()}
    assert max(found.values()) <= tolerance(op, "backward", torch.float32), found
    for module in modules:
        monkeypatch.setattr(import_module(f"t2t_fast.ops.{module}"), "dot", inside_the_unit)
    drifted = {each: errors(*pair)[0] for each, pair in compute().items()}
    assert max(drifted.values()) > 5 * max(found.values()), (found, drifted)
    assert max(drifted.values()) > tolerance(op, "backward", torch.float32), drifted
    assert matrix_units == {"tf32"}

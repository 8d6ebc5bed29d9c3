"""Swapped transformer blocks on a GPU: parity under autocast, and no tensor of the attention weights' size.

The Triton path also runs on the CPU, in Triton's interpreter.
"""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import t2t_fast
from t2t_fast import reference
from t2t_fast.ops._common import triton_runtime
from t2t_fast.testing import errors

BLOCK = ("add_layer_norm", "layer_norm_linear", "layer_norm_mlp")
CARD = dict(batch=8, length=197, width=384, heads=6)
SMALL = dict(batch=2, length=9, width=32, heads=2)
INTERPRETED = [
    pytest.mark.interpret,
    pytest.mark.skipif(not triton_runtime.INTERPRETED, reason="needs TRITON_INTERPRET=1"),
]
WHERE = [
    pytest.param("cpu", torch.float32, SMALL, marks=INTERPRETED, id="interpreted"),
    pytest.param("cuda", torch.bfloat16, CARD, marks=pytest.mark.gpu, id="cuda-bf16"),
    pytest.param("cuda", torch.float16, CARD, marks=pytest.mark.gpu, id="cuda-fp16"),
]


class Sizes(TorchDispatchMode):
    """The largest number of values that an operation returned."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.largest = max(self.largest, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)), 0)
        return out


def trained(block, x, dtype):
    """Output and gradients of a training step, under autocast for a half type."""
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, dtype if dtype != torch.float32 else None, enabled=dtype != torch.float32):
        out = block(x)
    block.zero_grad()
    out.backward(torch.ones_like(out).mul_(torch.linspace(-1, 1, out.shape[-1], device=out.device)))
    return {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in block.named_parameters()}}


@pytest.mark.parametrize(("device", "dtype", "sizes"), WHERE)
def test_a_swapped_block(device, dtype, sizes):
    """Output and every gradient are at most 1.5 times as far from float64 as upstream's own."""
    torch.manual_seed(0)
    upstream = reference.Block(sizes["width"], sizes["heads"], mlp_ratio=3.0).to(device).train()
    x = torch.randn(sizes["batch"], sizes["length"], sizes["width"], device=device)
    exact = trained(copy.deepcopy(upstream).double(), x.double(), torch.float32)
    known = trained(upstream, x, dtype)
    t2t_fast.swap(upstream)
    assert upstream.obstacle() is None
    with (
        t2t_fast.backend("triton", BLOCK[0]),
        t2t_fast.backend("triton", BLOCK[1]),
        t2t_fast.backend("triton", BLOCK[2]),
    ):
        found = trained(upstream, x, dtype)
        with Sizes() as sizes_of:
            trained(upstream, x, dtype)
    rounding = torch.finfo(dtype).eps
    for name, value in found.items():
        assert errors(value, exact[name])[0] <= 1.5 * errors(known[name], exact[name])[0] + rounding, name
    if device == "cuda":
        most = sizes["batch"] * sizes["length"] * 3 * sizes["width"]
        assert sizes_of.largest <= most < sizes["batch"] * sizes["heads"] * sizes["length"] ** 2

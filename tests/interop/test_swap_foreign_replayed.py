"""A swapped layer of another project on interpreted Triton kernels: a replayed call equals one that is not."""

import pytest
import torch
from torch import nn

import t2t_fast
from support.foreign import saliency
from t2t_fast import backends
from t2t_fast.interop.swap import swap
from t2t_fast.ops._common import guards, triton_runtime

REASON = triton_runtime.reason(backends.Request("cpu", torch.float32, {}))
pytestmark = [pytest.mark.interpret, pytest.mark.skipif(REASON is not None, reason=f"triton: {REASON}")]


def test_performer_with_a_skip_of_its_input():
    torch.manual_seed(0)
    model, x = saliency.InputSkip(16, 16).eval(), torch.randn(4, 2, 9, 16)
    expected = [model(each) for each in x]
    swap(nn.ModuleList([model]))
    with torch.no_grad(), t2t_fast.backend("triton"):
        for each, result in zip(x, expected, strict=True):
            found = model(each)
            assert torch.allclose(found, result, atol=1e-5)
            with guards.suspended():
                assert torch.equal(found, model(each))
        model.w.data.mul_(0.5)
        model.epsilon = 0.1
        found = model(x[0])
        with guards.suspended():
            assert torch.equal(found, model(x[0]))
        assert not torch.allclose(found, expected[0], atol=1e-3)

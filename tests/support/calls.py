"""Functions for tests of several operators: skip a backend that cannot run a call, compute gradients."""

import pytest
import torch

from t2t_fast import backends


def skip_unless_available(op, backend, dtype=torch.float32, **sizes):
    """Skip the test, with the reason, where ``backend`` cannot run ``op`` in ``dtype`` on the CPU."""
    reason = backends.reason(op, backend, backends.Request("cpu", dtype, {"channels": 1, **sizes}))
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def with_gradients(call, tensors):
    """The output of ``call(**tensors)``, under "out", and every tensor's gradient for a fixed upstream gradient."""
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    out = call(**leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    gradients = torch.autograd.grad(out, list(leaves.values()), upstream)
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}

"""Two thousand training steps leak no memory, no tensor and no Python object."""

import gc
from pathlib import Path

import pytest
import torch

import t2t_fast
from t2t_fast import _extension
from t2t_fast.modules import T2TModule

STATM = Path("/proc/self/statm")
PAGE = 4096
STEPS, WARM_UP = 2000, 200


def standing():
    """The number of tensors, the number of other objects, and the resident memory of this process in kB."""
    gc.collect()
    objects = gc.get_objects()
    tensors = sum(issubclass(type(each), torch.Tensor) for each in objects)  # isinstance would query proxies
    return tensors, len(objects) - tensors, int(STATM.read_text().split()[1]) * PAGE // 1024


@pytest.fixture
def one_thread():
    """In steps this small, several threads would spend most of the time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize(
    ("backend", "tokens_type"), [("native", "performer"), ("native", "transformer"), ("aten", "performer")]
)
def test_two_thousand_steps(one_thread, backend, tokens_type):
    if backend == "native" and not _extension.operators():
        pytest.skip(f"native: {_extension.operators_error()}")
    module = T2TModule(32, tokens_type, embed_dim=16, token_dim=8)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)
    images = [torch.randn(2, 3, 16, 16), torch.randn(1, 3, 16, 24)]

    def step(index):
        optimizer.zero_grad()
        module(images[index % 2]).square().mean().backward()
        optimizer.step()

    with t2t_fast.backend(backend):
        for index in range(WARM_UP):
            step(index)
        before = standing()
        for index in range(STEPS):
            step(index)
        after = standing()
    assert after[0] <= before[0]
    assert after[1] - before[1] < STEPS / 20, (before, after)
    assert after[2] - before[2] < STEPS, f"{before[2]} kB, {after[2]} kB after {STEPS} steps"  # less than 1 kB a step

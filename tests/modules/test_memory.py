"""Saved and peak memory, measured on calls whose memory is known."""

import os
import subprocess
import sys

import pytest
import torch

from support import ROOT
from t2t_fast import backends, memory
from t2t_fast.demo import measure
from t2t_fast.modules import TokenPerformer
from t2t_fast.ops._common import native_library as native
from t2t_fast.ops._common.spec import T2T_WINDOWS


def test_saved_bytes_count_each_storage_once_and_no_parameter():
    weight = torch.ones(8, 4, requires_grad=True)
    x = torch.ones(16, 4, requires_grad=True)

    def forward():
        y = x @ weight.T
        # y is saved twice, as itself and as a view
        return (y.exp() * y.view(-1).sin().view(16, 8)).sum()

    x_bytes, y_bytes = 4 * 16 * 4, 4 * 16 * 8
    # x, y, exp(y), sin(y)
    assert memory.saved_bytes(forward, [weight]) == x_bytes + 3 * y_bytes
    assert memory.saved_bytes(forward, []) == 4 * weight.numel() + x_bytes + 3 * y_bytes


def test_peak_bytes_count_live_tensors():
    def call():
        for _ in range(3):
            a = torch.ones(1000, 250)
            b = a + 1
            del a, b

    assert memory.peak_bytes(call, "cpu") == pytest.approx(2e6, rel=0.01)


def test_the_profiler_prints_nothing():
    code = "import torch; from t2t_fast import memory; print(memory.peak_bytes(lambda: torch.ones(1000), 'cpu'))"
    environment = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert int(done.stdout) >= 4000 and done.stderr == ""


def test_the_peak_of_a_training_step_exceeds_its_saved_bytes():
    module = torch.nn.Sequential(torch.nn.Linear(50, 400), torch.nn.GELU(), torch.nn.Linear(400, 10))
    x = torch.randn(100, 50)
    # the first Linear's output, saved for GELU, and GELU's output, saved for the second Linear
    assert measure.kept_bytes(module, x) == 2 * 100 * 400 * 4
    assert measure.step_peak(module, x) > 2 * 100 * 400 * 4


def test_peak_counts_the_scratch_memory_of_native_operators():
    """The scratch memory holds kqv of an image: 192 floats per token."""
    reason = native.reason(backends.Request("cpu", torch.float32, {}), native.devices("performer_layer"))
    if reason is not None:
        pytest.skip(f"native: {reason}")
    layer = TokenPerformer(147, 64).eval()
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        peak = memory.peak_bytes(lambda: layer(image, window=T2T_WINDOWS[0]), "cpu")
    assert peak >= 3136 * (192 + 64) * 4

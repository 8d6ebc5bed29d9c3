"""`import t2t_fast` adds little to the import of torch, loads no optional package, and starts no device context."""

import json
import subprocess
import sys

import pytest

HEAVY = ["timm", "torchvision", "safetensors", "onnx", "onnxruntime", "matplotlib", "jinja2", "PIL", "torch._dynamo"]
CODE = f"""
import json, sys, time
start = time.process_time()
import torch
middle = time.process_time()
import t2t_fast
end = time.process_time()
heavy = [name for name in {HEAVY!r} if name in sys.modules]
print(json.dumps(dict(ratio=(end - middle) / (middle - start), heavy=heavy, cuda=torch.cuda.is_initialized())))
"""


def imported():
    """Time, optional packages and CUDA state after an import in a new process."""
    return json.loads(subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout)


@pytest.fixture(scope="module")
def first():
    return imported()


def test_import_adds_less_than_half_the_time_of_torch(first):
    """In CPU time, the best of up to three runs."""
    assert first["ratio"] < 0.5 or min(imported()["ratio"] for _ in range(2)) < 0.5


def test_import_loads_no_optional_package(first):
    assert first["heavy"] == []


def test_import_starts_no_device_context(first):
    assert first["cuda"] is False

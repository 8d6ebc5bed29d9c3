"""`import t2t_fast` is as light as importing torch, and starts nothing."""

import subprocess
import sys
import time

HEAVY = ["timm", "torchvision", "safetensors", "onnx", "onnxruntime", "matplotlib", "PIL", "torch._dynamo"]


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_costs_less_than_half_of_torch_more():
    """The best of several turns each, taken alternately, so that a busy machine slows down both."""
    best = {"import torch": float("inf"), "import t2t_fast": float("inf")}
    for _ in range(4):
        for statement in best:
            start = time.perf_counter()
            python(statement)
            best[statement] = min(best[statement], time.perf_counter() - start)
    assert best["import t2t_fast"] < 1.5 * best["import torch"]


def test_import_loads_no_optional_package():
    code = f"import t2t_fast, sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert python(code).strip() == "[]"


def test_import_starts_no_device_context():
    assert python("import torch, t2t_fast; print(torch.cuda.is_initialized())").strip() == "False"

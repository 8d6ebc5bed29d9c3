"""`import t2t_fast` is as light as importing torch, and starts nothing."""

import subprocess
import sys
import time

HEAVY = ["timm", "torchvision", "safetensors", "onnx", "onnxruntime", "matplotlib", "PIL", "torch._inductor.compile_fx"]


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def seconds(statement):
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        python(statement)
        best = min(best, time.perf_counter() - start)
    return best


def test_import_costs_less_than_half_of_torch_more():
    torch_alone = seconds("import torch")
    assert seconds("import t2t_fast") < 1.5 * torch_alone


def test_import_loads_no_optional_package():
    code = f"import t2t_fast, sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert python(code).strip() == "[]"


def test_import_starts_no_device_context():
    assert python("import torch, t2t_fast; print(torch.cuda.is_initialized())").strip() == "False"

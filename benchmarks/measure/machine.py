"""The environment of a run: versions, device, settings, and measured limits of the machine."""

import os
import platform
import re
import timeit
from datetime import datetime, timezone

import torch
import torch.nn.functional as F

from t2t_fast.environment import commit, cpu_name, driver, environment, version
from t2t_fast.testing import DTYPES

from ..suites.groups import DTYPES as MEASURED
from ..suites.providers import COMPILE_MODES

COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
SIDE = {"cpu": 1536, "cuda": 8192}
REPEATS = 7

# Packages whose versions are recorded, ``None`` if not installed
PACKAGES = ["torch", "triton", "performer-pytorch", "flash-linear-attention", "fla-core", "vit-pytorch", "timm"]
PACKAGES += ["openvino", "onnxruntime", "onnx", "onnxscript"]


def describe(device):
    """The environment of a run, as plain data."""
    found = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        **environment(device),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "malloc": {name: os.environ[name] for name in sorted(os.environ) if name.startswith("MALLOC_")},
        "compile_mode": COMPILE_MODES[device],
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "packages": {name: version(name) for name in PACKAGES},
    }
    if device == "cuda":
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "driver": driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        }
    return found


def run_name(device):
    """date-machine-commit: the name of a folder of results."""
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()} {torch.get_num_threads()} threads"
    machine = re.sub(r"\((r|tm)\)|@.*?ghz|\bcpu\b|nvidia", " ", machine.lower())
    words = re.findall(r"[a-z0-9]+", machine or platform.machine())
    return "-".join([datetime.now(timezone.utc).strftime("%Y-%m-%d"), *words, (commit() or "nocommit").rstrip("+")])


def _seconds(call, device):
    """Seconds of the fastest of several calls, since a limit is reached when nothing disturbs the machine."""
    call()
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(call, warmup=20, rep=100, return_mode="min") / 1e3
    return min(timeit.repeat(call, number=1, repeat=REPEATS))


def _product_speed(device, dtype):
    """FLOP/s of the faster of two dense products: a large square one, and T2T's second convolution in one batch."""
    side = SIDE[device]
    a = torch.randn(side, side, device=device).to(dtype)
    out = torch.empty_like(a)
    square = 2 * side**3 / _seconds(lambda: torch.mm(a, a, out=out), device)
    image = torch.randn(32, 64, 56, 56, device=device).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(192, 64, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
    flops = 2 * 32 * 28 * 28 * 576 * 192
    return max(square, flops / _seconds(lambda: F.conv2d(image, weight, stride=2, padding=1), device))


def limits(device):
    """Measured limits of the machine.

    Returns:
        {"bytes_per_s": read and written by a large copy, "flop_per_s": {dtype name: of dense products}}.
    """
    source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bytes_per_s = 2 * source.numel() / _seconds(lambda: target.copy_(source), device)
    with torch.no_grad():
        speeds = {name: _product_speed(device, DTYPES[name]) for name in MEASURED[device]}
    return {"bytes_per_s": bytes_per_s, "flop_per_s": speeds}

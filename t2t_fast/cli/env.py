"""``t2t-fast env``: versions, devices, the native build and the backends."""

import argparse
import json
import os
import platform
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch

from .. import _extension, backends, config
from ..environment import commit, cpu_name, driver, version
from ..ops._common import native_library
from ..testing import DTYPES

OPTIONAL: tuple[str, ...] = (
    "triton",
    "numpy",
    "timm",
    "torchvision",
    "safetensors",
    "onnx",
    "onnxscript",
    "onnxruntime",
)
OPTIONAL += ("onnxruntime", "jinja2", "matplotlib", "pillow", "pytest", "pytest-benchmark")


def run(options: argparse.Namespace) -> int:
    """Print the report."""
    report = collect()
    print(json.dumps(report, indent=2) if options.json else as_text(report))
    return 0


def collect() -> dict[str, Any]:
    """The report as plain data: strings, numbers, lists and dicts."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    problem = backends.problem()
    with nullcontext() if problem is None else backends.backend("auto"):
        table = {device: _backends(device) for device in devices}
    return {
        "versions": _versions(),
        "system": {
            "system": platform.platform(),
            "machine": platform.machine(),
            "CPU": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "CPU capability of torch": torch.backends.cpu.get_cpu_capability(),
            "CPU features": sorted(name for name, there in _extension.cpu_features().items() if there),
        },
        "GPUs": _gpus(),
        "native build": _native(),
        "settings": {
            "float32 matmul precision": _matmul_precision(),
            **config.variables(),
            **({"problem": f"{problem}; until it is, only a call that names its backend runs"} if problem else {}),
        },
        "backends": table,
    }


def _versions() -> dict[str, Any]:
    from .. import __version__

    return {
        "t2t_fast": __version__,
        "commit": commit(),
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
        "cuDNN of torch": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        **{package: version(package) for package in OPTIONAL},
    }


def _gpus() -> dict[str, Any]:
    if not torch.cuda.is_available():
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch finds no CUDA device"
        return {"driver": driver(), "devices": [], "reason": why}
    devices = [
        {
            "name": found.name,
            "capability": f"{found.major}.{found.minor}",
            "memory GiB": round(found.total_memory / 2**30, 1),
            "multiprocessors": found.multi_processor_count,
        }
        for found in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    return {"driver": driver(), "devices": devices, "reason": None}


def _native() -> dict[str, Any]:
    reasons = {"t2t_fast._C": _extension.load_error(), "t2t_fast._ops": _extension.operators_error()}
    loaded = {name: "loaded" if reason is None else reason for name, reason in reasons.items()}
    products = native_library.instruction_set()
    if products is not None:
        loaded["CPU kernels"] = f"float32 by {products}, {_bfloat16(native_library.instruction_set(bf16=True))}"
    info = _extension.build_info() or {}
    if info and info["cuda"] is None and (why := _extension.lacking("cuda")):
        loaded["operators for CUDA"] = why
    return loaded | info


def _bfloat16(products: str | None) -> str:
    """How the CPU kernels multiply bfloat16."""
    if products in ("amx", "avx512_bf16"):
        return f"bfloat16 by {products}"
    return f"bfloat16 by float32 products of {products}: neither AMX nor AVX512_BF16"


def _matmul_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set by PyTorch's newer per-operator flags
        return "set per operator"


def _backends(device: str) -> dict[str, Any]:
    """Operator -> selected backend per dtype, and why the others were rejected (float32)."""
    table = {}
    for op in backends.operators():
        reasons = {name: verdict for _, name, verdict in backends.explain(op, device=device).rows}
        chosen = {name: backends.explain(op, device=device, dtype=dtype).chosen(op) for name, dtype in DTYPES.items()}
        table[op] = {"chosen": chosen, "reasons": reasons}
    return table


def _words(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "-"
    return str(value)


def _section(title: str, items: Iterable[tuple[str, Any]]) -> list[str]:
    pairs = list(items)
    width = max(len(name) for name, _ in pairs)
    return [title, *(f"  {name:{width}}  {_words(value)}" for name, value in pairs), ""]


def as_text(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = _section("versions", report["versions"].items())
    lines += _section("system", report["system"].items())
    gpus = report["GPUs"]
    found = [
        (f"GPU {index}", f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory GiB']} GiB")
        for index, gpu in enumerate(gpus["devices"])
    ]
    lines += _section("GPUs", [*(found or [("none", gpus["reason"])]), ("driver", gpus["driver"])])
    lines += _section("native build", report["native build"].items())
    lines += _section("settings", report["settings"].items())
    for device, table in report["backends"].items():
        lines += _backend_table(device, table)
    return "\n".join(lines).rstrip()


def _backend_table(device: str, table: dict[str, Any]) -> list[str]:
    rows = []
    for op, entry in table.items():
        chosen = set(entry["chosen"].values())
        words = chosen.pop() if len(chosen) == 1 else ", ".join(f"{k}: {v}" for k, v in entry["chosen"].items())
        words = "none: the requested backend cannot run" if words is None else words
        rows.append((op, words))
        for name, verdict in entry["reasons"].items():
            if verdict != "chosen":
                rows.append((f"  {name}", verdict))
    return _section(f"backends on {device}", rows)

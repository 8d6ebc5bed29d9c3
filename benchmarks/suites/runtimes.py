"""OpenVINO and ONNX Runtime: upstream's model as a user without a GPU would deploy it.

The graph is that of ``torch.onnx.export``, for one batch size. Each runtime gets its setting for one call at a time, as
many threads as PyTorch, and a process of its own (:mod:`remote`).
"""

import platform
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

from .groups import LeftOut

INPUT = "image"
ARM = ("aarch64", "arm64")


def require(*packages):
    """Raise :class:`LeftOut` for the first package that is not installed, without importing any."""
    for name in packages:
        if find_spec(name) is None:
            raise LeftOut(f"the package {name} is not installed")


def export(module, images, path):
    """Write the graph of a module in eval mode for images of this shape; returns the path as text."""
    require("onnx", "onnxscript")
    import torch

    with torch.no_grad():
        torch.onnx.export(module, (images,), path, input_names=[INPUT], dynamo=True, verbose=False)
    return str(path)


def load_openvino(path, dtype, threads):
    """The graph as a function of an array, in OpenVINO on the CPU."""
    import openvino

    core = openvino.Core()
    if dtype == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise LeftOut("OpenVINO computes in bfloat16 only on processors that have it")
    settings = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[dtype],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_HYPER_THREADING": True,  # otherwise one thread for each core, however many are asked for
    }
    request = core.compile_model(path, "CPU", settings).create_infer_request()

    def call(image):
        request.set_input_tensor(openvino.Tensor(image, shared_memory=True))
        request.infer()
        return request.get_output_tensor().data

    return call


def load_onnxruntime(path, dtype, threads):
    """The graph as a function of an array, in ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    # its threads wait actively inside a call, which is faster, and sleep between calls
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if dtype == "bf16":
        if platform.machine() not in ARM:
            raise LeftOut("ONNX Runtime computes float32 models in bfloat16 only on 64-bit Arm processors")
        options.add_session_config_entry("mlas.enable_gemm_fastmath_arm64_bfloat16", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {INPUT: image})[0]


class Runtime(NamedTuple):
    """A runtime; ``load``: (path of a graph, dtype, number of threads) -> function of an array."""

    label: str
    load: Callable


RUNTIMES = {"openvino": Runtime("OpenVINO", load_openvino), "onnxruntime": Runtime("ONNX Runtime", load_onnxruntime)}
"""By the name of its package, which is also that of its provider."""

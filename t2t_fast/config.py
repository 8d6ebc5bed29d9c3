"""The only module that reads environment variables. Variables set defaults; an argument takes precedence.

``T2T_FAST_BACKEND``: the backend that ``auto`` stands for, one of auto, triton, native, aten, reference.
``TRITON_INTERPRET``: Triton's own; kernels then run on the CPU.
(``T2T_FAST_BUILD`` and ``TORCH_CUDA_ARCH_LIST`` are read by ``setup.py`` at build time, not here.)
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

BACKENDS = ("auto", "triton", "native", "aten", "reference")


def default_backend() -> str:
    """The value of ``T2T_FAST_BACKEND``, "auto" if unset. Checked where it is used, so that importing never fails."""
    return os.environ.get("T2T_FAST_BACKEND", "auto")


def variables() -> dict[str, str]:
    """The package's environment variables, by name."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("T2T_FAST_")}


def triton_interpreted() -> bool:
    """Whether ``TRITON_INTERPRET`` makes Triton run its kernels on the CPU; read as Triton reads it."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "y", "on")


@contextmanager
def quiet_profiler() -> Iterator[None]:
    """Suppress the messages of PyTorch's profiler library on stderr, unless ``KINETO_LOG_LEVEL`` is set."""
    if "KINETO_LOG_LEVEL" in os.environ:
        yield
        return
    os.environ["KINETO_LOG_LEVEL"] = "99"
    try:
        yield
    finally:
        del os.environ["KINETO_LOG_LEVEL"]

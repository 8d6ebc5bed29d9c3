"""The package's only reader of the environment. Variables set defaults; an argument always wins.

``T2T_FAST_BACKEND``: the backend that ``auto`` stands for, one of auto, triton, native, aten, reference.
(``T2T_FAST_BUILD`` and ``TORCH_CUDA_ARCH_LIST`` are read by ``setup.py`` at build time, not here.)
"""

import os

BACKENDS = ("auto", "triton", "native", "aten", "reference")


def default_backend():
    """The validated value of ``T2T_FAST_BACKEND``, "auto" when unset."""
    name = os.environ.get("T2T_FAST_BACKEND", "auto")
    if name not in BACKENDS:
        raise ValueError(f"T2T_FAST_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name

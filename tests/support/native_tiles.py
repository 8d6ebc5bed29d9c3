"""The native layers with the tiles of AMX emulated, so that every CPU runs the kernels of that instruction set.

As a program, inside a copy of the package whose library emulates them: compares every case of every operator with the
float64 reference, and prints the number of results compared.
"""

import shutil
import subprocess
import sys
from pathlib import Path

OPERATORS = ("soft_split_linear", "performer_attention", "token_mlp", "performer_layer", "transformer_block")
FLAGS = "-DT2T_FAST_EMULATE_TILES -Wno-psabi"


def run(root: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Build ``root``/csrc, copy the package with that library into ``folder``, and run this file with it."""
    from support.native_sanitizer import build

    library = build(root, FLAGS)
    shutil.copytree(root / "t2t_fast", folder / "t2t_fast", ignore=shutil.ignore_patterns("_ops.so", "__pycache__"))
    shutil.copy(library, folder / "t2t_fast" / "_ops.so")
    command = [sys.executable, "-P", __file__, folder]
    return subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True)


def compare() -> int:
    """The number of results that agree with the reference; an assertion fails at the first one that does not."""
    import torch

    from t2t_fast.errors import BackendUnavailable
    from t2t_fast.testing import CASES, assert_close

    assert torch.ops.t2t_fast_native.cpu_instruction_set("", True) == "amx"
    compared = 0
    for op in OPERATORS:
        for case in CASES[op]():
            case = case.cast(torch.bfloat16)
            try:
                out, gradients = case.run_backward("native")
            except BackendUnavailable:  # an option that the native kernels do not have
                continue
            expected, exact = case.cast(torch.float64).run_backward("reference", torch.bfloat16)
            assert_close(out, expected, op, "forward", torch.bfloat16, case.name)
            for name, gradient in gradients.items():
                assert_close(gradient, exact[name], op, "backward", torch.bfloat16, f"{case.name}: {name}")
            compared += 1 + len(gradients)
    return compared


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    print(compare())

"""Files that PyTorch loads: a ``torch.export`` program, and code that AOTInductor compiled from it."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import torch

from .source import Runner, Source
from .trace import outputs, program_nodes


def write_program(source: Source, path: Path) -> dict[str, int]:
    """Write the program; returns operator -> number of nodes."""
    torch.export.save(source.program, path)
    calls = (node for node in program_nodes(source.program) if node.op == "call_function")
    return dict(Counter(getattr(node.target, "__name__", str(node.target)) for node in calls))


def program_runner(path: Path) -> Runner:
    """The program in PyTorch."""
    program = torch.export.load(path).module()
    return lambda x: outputs(program(x))


def needs_compiler() -> None:
    """Raise unless Inductor finds a C++ compiler."""
    from torch._inductor import cpp_builder, exc

    try:
        compiler = cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        compiler = None
    if not compiler:
        raise RuntimeError(
            "export_model: format 'aoti' needs a C++ compiler, and none was found: install g++, or give its path in "
            "the environment variable CXX"
        )


def write_aoti(source: Source, path: Path) -> dict[str, int]:
    """Compile the program for this processor and write the package; there are no nodes to count."""
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(source.program, package_path=os.fspath(path))
    return {}


def aoti_runner(path: Path) -> Runner:
    """The package in PyTorch."""
    from torch._inductor import aoti_load_package

    package = aoti_load_package(os.fspath(path))
    return lambda x: outputs(package(x))

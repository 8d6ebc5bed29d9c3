"""The report on compiled kernels, and what the machine code of every CUDA kernel must hold."""

import json
import shutil
import subprocess

import pytest

from benchmarks.kernels import machine_code, triton_report
from benchmarks.kernels import report as kernel_report
from t2t_fast import _extension

VECTORISED = ("split_tiles", "compose_tiles", "project_tiles")


@pytest.fixture
def without_triton(monkeypatch):
    """The report does not compile Triton's kernels: tests/benchmarks/test_triton_report.py does."""
    monkeypatch.setattr(triton_report, "reason", lambda: "another test's")


def test_the_report_without_kernels(monkeypatch, capsys, without_triton):
    monkeypatch.setattr(_extension, "operators_error", lambda: "not built")
    kernel_report.main([])
    printed = capsys.readouterr().out
    assert "No CUDA kernels to report: the native operators are missing: not built." in printed
    assert "No Triton kernels to report: another test's." in printed


def test_the_report_without_the_tool(monkeypatch, tmp_path):
    monkeypatch.setattr(machine_code, "find_tool", lambda: None)
    kernels, reason = kernel_report.cuda_kernels(tmp_path / "library.so")
    assert not kernels
    assert "cuobjdump is neither" in reason


def test_a_library_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        kernel_report.main(["no/such/library.so"])
    assert "no such file: no/such/library.so" in capsys.readouterr().err


def test_a_library_without_kernels(tmp_path):
    tool, compiler = machine_code.find_tool(), shutil.which("cc")
    if tool is None or compiler is None:
        pytest.skip("cuobjdump or a C compiler is not found")
    (tmp_path / "empty.c").write_text("int nothing;\n")
    library = tmp_path / "empty.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "empty.c"], check=True)
    assert kernel_report.cuda_kernels(library) == ([], "empty.so has no CUDA kernels.")


def test_json(monkeypatch, tmp_path, without_triton):
    kernel = machine_code.Kernel("plain", "sm_90", 64, code=machine_code.Code(2, loads={16: 1}))
    monkeypatch.setattr(kernel_report, "cuda_kernels", lambda library: ([kernel], None))
    kernel_report.main(["--json", str(tmp_path / "report.json")])
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["triton"] == []
    (row,) = found["cuda"]
    assert (row["name"], row["registers"], row["code"]["loads"]) == ("plain", 64, {"16": 1})


@pytest.fixture(scope="module")
def kernels():
    """Every kernel of the installed library in every architecture."""
    found, reason = kernel_report.cuda_kernels()
    assert not (reason and "has no CUDA kernels" in reason), "built with CUDA, but there is no kernel"
    if reason:
        pytest.skip(reason)
    return found


def test_architectures_are_those_of_the_build(kernels):
    built = {f"sm_{name.split('+')[0].replace('.', '')}" for name in _extension.build_info()["architectures"]}
    found = {kernel.architecture for kernel in kernels}
    assert found == built
    for architecture in found:
        names = {kernel.name.split("<")[0] for kernel in kernels if kernel.architecture == architecture}
        assert set(VECTORISED) <= names


def test_no_kernel_spills(kernels):
    spilling = [kernel for kernel in kernels if kernel.code.spills or kernel.stack]
    assert not spilling


def test_tiled_kernels_move_16_bytes_at_a_time(kernels):
    """Tokens are what a call mostly moves: vectors out of a split, asynchronous vectors into a composition."""
    tiled = [kernel for kernel in kernels if kernel.name.startswith(VECTORISED)]
    assert tiled
    for kernel in tiled:
        assert max(kernel.code.loads) == 16, kernel
        assert max(kernel.code.stores) == 16, kernel


def test_tiled_kernels_leave_room_for_several_blocks(kernels):
    """256 threads a block: four blocks of 64 registers fill a multiprocessor, three of 80, two of 128."""
    for kernel in kernels:
        if kernel.name.startswith(VECTORISED):
            limit = 64 if "project" not in kernel.name else 128 if "double" in kernel.name else 80
            assert kernel.registers <= limit, kernel


def test_lines_of_the_report(kernels, monkeypatch, capsys, without_triton):
    monkeypatch.setattr(machine_code, "read", lambda path, tool: kernels)
    kernel_report.main([str(_extension.LIBRARY)])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("split_tiles<float>", "split_tiles<4 bytes>")) for line in lines)
    assert len([line for line in lines if " sm_" in line and "B:" in line]) == len(kernels)

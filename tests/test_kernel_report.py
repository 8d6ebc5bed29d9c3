"""The report on compiled kernels, and what the machine code of every CUDA kernel must hold."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import kernel_report
from benchmarks.kernel_report import Kernel, parse, readable
from t2t_fast import _extension

ROOT = Path(__file__).resolve().parent.parent
VECTORISED = ("split_tiles", "compose_tiles", "project_tiles")

USAGE = """
Fatbin elf code:
================
arch = sm_80

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN8t2t_fast4cuda12_GLOBAL__N_x11split_tilesItEEvNS0_4PlanEPT_:
  REG:64 STACK:8 SHARED:16 LOCAL:0 CONSTANT[0]:968 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
CODE = """
	code for sm_80
		Function : _ZN8t2t_fast4cuda12_GLOBAL__N_x11split_tilesItEEvNS0_4PlanEPT_
	.headerflags	@"EF_CUDA_SM80"
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;     /* 0x00 */
                                                                        /* 0x00 */
        /*0010*/              @!P0 LDG.E.U16 R4, desc[UR4][R2.64] ;     /* 0x00 */
        /*0020*/                   LDGSTS.E.BYPASS.128 [R7], [R2.64] ;  /* 0x00 */
        /*0030*/             @!UP1 STG.E desc[UR4][R2.64], R4 ;         /* 0x00 */
        /*0040*/                   STG.E.64 desc[UR4][R2.64], R4 ;      /* 0x00 */
        /*0050*/                   STL.S16 [R1], R4 ;                   /* 0x00 */
        /*0060*/                   LDS.128 R4, [R3] ;                   /* 0x00 */
	code for sm_90
		Function : plain
        /*0000*/                   LDG.E R4, desc[UR4][R2.64] ;         /* 0x00 */
"""


def test_parsing():
    first, second = parse(USAGE, CODE)
    assert first == Kernel(
        "split_tiles<2 bytes>", "sm_80", 64, 8, 16, spills=1, loads={16: 2, 2: 1}, stores={4: 1, 8: 1}
    )
    assert (second.name, second.architecture, second.loads) == ("plain", "sm_90", {4: 1})


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        ("plain", "plain"),
        ("_Z6squarev", "square"),
        ("_ZN1a1bIfEEvv", "b<float>"),
        ("_ZN8t2t_fast4cuda12_GLOBAL__N_x13compose_tilesINS0_8BFloat16EEEvNS0_4PlanEPKT_", "compose_tiles<BFloat16>"),
        ("_ZN8t2t_fast4cuda12_GLOBAL__N_x13compose_tilesIdEEvNS0_4PlanEPKT_", "compose_tiles<double>"),
    ],
)
def test_names(mangled, name):
    assert readable(mangled) == name


def test_every_operator_is_in_the_report():
    head, *lines = kernel_report.registry_lines()
    assert "compiled kernel" in head
    operators = {line.split()[0] for line in lines}
    assert {"soft_split", "soft_composition", "soft_split_linear", "performer_attention", "token_mlp"} <= operators
    assert all("kernel" in line or "native" in line for line in lines)


def test_the_report_without_cuda_kernels(monkeypatch, capsys):
    monkeypatch.setattr(_extension, "operators_error", lambda: "not built")
    assert kernel_report.main([]) == 0
    assert "No CUDA kernels to report: the native operators are missing: not built." in capsys.readouterr().out


def test_the_report_without_the_tool(monkeypatch, tmp_path):
    monkeypatch.setattr(kernel_report, "find_tool", lambda: None)
    assert "cuobjdump is neither" in kernel_report.cuda_lines(tmp_path / "library.so")[0]


def test_a_library_that_is_not_there(capsys):
    assert kernel_report.main(["no/such/library.so"]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_library_without_kernels(tmp_path):
    tool, compiler = kernel_report.find_tool(), shutil.which("cc")
    if tool is None or compiler is None:
        pytest.skip("cuobjdump or a C compiler is not found")
    (tmp_path / "empty.c").write_text("int nothing;\n")
    library = tmp_path / "empty.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "empty.c"], check=True)
    assert kernel_report.cuda_lines(library) == ["empty.so has no CUDA kernels."]


@pytest.fixture(scope="module")
def kernels():
    """Every kernel of the installed library in every architecture."""
    library, reason = kernel_report.installed_library()
    if library is None:
        pytest.skip(f"no CUDA kernels: {reason}")
    tool = kernel_report.find_tool()
    if tool is None:
        pytest.skip("cuobjdump is not found: it is in the CUDA toolkit and in Triton's package")
    found = kernel_report.cuda_kernels(library, tool)
    assert found, "the build info tells of CUDA, but there is no kernel"
    return found


def test_architectures_are_those_of_the_build(kernels):
    built = {f"sm_{name.split('+')[0].replace('.', '')}" for name in _extension.build_info()["architectures"]}
    found = {kernel.architecture for kernel in kernels}
    assert found == built
    for architecture in found:
        names = {kernel.name.split("<")[0] for kernel in kernels if kernel.architecture == architecture}
        assert set(VECTORISED) <= names


def test_no_kernel_spills(kernels):
    spilling = [kernel for kernel in kernels if kernel.spills or kernel.stack]
    assert not spilling


def test_tiled_kernels_move_16_bytes_at_a_time(kernels):
    """Tokens are what a call mostly moves: vectors out of a split, asynchronous vectors into a composition."""
    tiled = [kernel for kernel in kernels if kernel.name.startswith(VECTORISED)]
    assert tiled
    for kernel in tiled:
        assert max(kernel.loads) == 16, kernel
        assert max(kernel.stores) == 16, kernel


def test_tiled_kernels_leave_room_for_several_blocks(kernels):
    """256 threads a block: four blocks of 64 registers fill a multiprocessor, three of 80, two of 128."""
    for kernel in kernels:
        if kernel.name.startswith(VECTORISED):
            limit = 64 if "project" not in kernel.name else 128 if "double" in kernel.name else 80
            assert kernel.registers <= limit, kernel


def test_the_command(kernels):
    command = [sys.executable, "-m", "benchmarks.kernel_report", str(_extension.LIBRARY)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "split_tiles<float>" in found or "split_tiles<4 bytes>" in found

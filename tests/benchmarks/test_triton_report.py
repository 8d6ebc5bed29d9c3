"""What the machine code of every Triton kernel must hold, compiled for architectures that need not be here.

The report runs in a process of its own, where Triton compiles instead of interpreting.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from benchmarks.kernels import machine_code, triton_report
from benchmarks.kernels import report as kernel_report
from benchmarks.kernels.machine_code import Code, Kernel
from benchmarks.kernels.triton_report import Case, Row
from support import ROOT
from t2t_fast.ops._common.launch_table import padded
from t2t_fast.ops.performer_attention.triton import launch

pytest.importorskip("triton", reason="Triton is not installed")

KIB = 1024
HALF = ("bf16", "fp16")
EVERYWHERE = 99 * KIB
"""Shared memory that a block may have on every architecture from sm_80 on: that of sm_86, sm_89 and sm_120."""

ATTENTION = {"keys_kernel", "queries_kernel", "queries_backward_kernel", "keys_backward_kernel"}
SPLIT = {"split_linear_kernel", "split_linear_weight_kernel", "split_linear_image_kernel"}
TOKEN_MLP = {"token_mlp_kernel", "token_mlp_backward_kernel", "read_out_mlp_kernel"}
WITH_PRODUCTS = ATTENTION | SPLIT | TOKEN_MLP | {"split_keys_kernel", "product_kernel"}
NORM = {"add_layer_norm_kernel", "layer_norm_backward_kernel"}
FORWARD = {"split_linear_kernel", "split_keys_kernel"}
CROWDED = {("token_mlp_backward_kernel", "fp32", "sm_120")}
STORING = ATTENTION - {"keys_kernel"}
MATRIX = {"sm_80": {"HMMA"}, "sm_90": {"HGMMA", "HMMA"}, "sm_100": {"UTCHMMA", "HMMA"}, "sm_120": {"HMMA"}}

# a token (an image's gradient: pixel), by the first of the call's sizes: channels, of the attention and token_mlp E
INSTRUCTIONS = {
    ("keys_kernel", 64): 26,
    ("queries_kernel", 64): 31,
    ("queries_backward_kernel", 64): 84,
    ("keys_backward_kernel", 64): 47,
    ("split_linear_kernel", 3): 208,
    ("split_linear_kernel", 64): 334,
    ("split_linear_weight_kernel", 3): 119,  # with the sums of the upstream gradient, like
    ("split_linear_weight_kernel", 64): 310,
    ("token_scalars_kernel", 3): 69,
    ("token_scalars_kernel", 64): 69,
    ("split_linear_image_kernel", 3): 111,
    ("split_linear_image_kernel", 64): 54,
    ("token_mlp_kernel", 64): 117,
    ("token_mlp_backward_kernel", 64): 205,
    ("split_keys_kernel", 3): 149,
    ("split_keys_kernel", 64): 291,
    ("read_out_mlp_kernel", 3): 138,
    ("read_out_mlp_kernel", 64): 138,
    ("layer_norm_backward_kernel", 384): 770,
    ("layer_norm_backward_kernel", 512): 950,
    ("product_kernel", 384): 7,
    ("product_kernel", 512): 7,
}


def output(python, *arguments):
    """What ``python`` prints, where Triton compiles instead of interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [str(python), *map(str, arguments)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def report(python, folder, *options):
    """The rows that ``python`` reports, and why there are none (or ``None``)."""
    path = folder / "report.json"
    printed = output(python, "-m", "benchmarks.kernels.report", "--triton-only", "--json", path, *options)
    reason = printed.strip() if printed.startswith("No Triton kernels") else None
    return json.loads(path.read_text())["triton"], reason


def where(row):
    return f"{row['name']} {row['dtype']} {row['architecture']} {row['tokens']}x{row['warps']}x{row['stages']}"


def check_completeness(rows, cases):
    measured = {(row["name"], row["sizes"][0]) for row in rows if row["instructions_per_token"]}
    assert measured == INSTRUCTIONS.keys()
    found = Counter((row["architecture"], row["dtype"], row["name"]) for row in rows)
    times = {
        "merge_kernel": 1,
        **dict.fromkeys(ATTENTION | TOKEN_MLP, 1),
        **dict.fromkeys(SPLIT, 4),
        "split_linear_image_kernel": 3,  # not of bytes
        "token_scalars_kernel": 2,  # nor without LayerNorm
        "cells_kernel": 4,  # of two images, forward and backward
        "fold_kernel": 7,  # for the forward kernel, and for the image's gradient but of bytes
        "parameter_gradients_kernel": 4,
        "split_keys_kernel": 2,  # of both stages, like
        "read_out_mlp_kernel": 2,
        "add_layer_norm_kernel": 2,  # of two widths, like
        "layer_norm_backward_kernel": 4,  # with LayerNorm, and of a branch alone
        "product_kernel": 6,  # with three epilogues
    }
    assert found == {(*case, name): count for case in cases for name, count in times.items()}


def check_registers(rows):
    """None spills but token_mlp backward in float32: 15 accesses of 2,800 on sm_120, 18 by Triton 3.9, 2 by 3.6.

    There ptxas fills all 255 registers whatever the sums, the order of the products, barriers or rounds ask for.
    """

    def allowed(row):
        return 20 if (row["name"], row["dtype"], row["architecture"]) in CROWDED else 0

    assert not [f"{where(row)}: {row['faults']}" for row in rows if row["code"]["spills"] > allowed(row)]
    assert not [f"{where(row)}: {row['stack']}" for row in rows if row["stack"] and not allowed(row)]


def check_shared_memory(rows):
    assert not [f"{where(row)}: {row['shared']}" for row in rows if row["shared"] > EVERYWHERE]


def check_matrix_instructions(rows):
    for row in rows:
        kinds = set(row["loop"]["matrix"])
        pytorch = row["name"] == "product_kernel" and row["dtype"] not in HALF  # multiplies in float32
        if row["name"] not in WITH_PRODUCTS or pytorch:
            assert not kinds, where(row)
            continue
        assert kinds and kinds <= MATRIX[row["architecture"]], (where(row), kinds)
        if row["architecture"] == "sm_90" and row["dtype"] in HALF:
            assert "HGMMA" in kinds, (where(row), kinds)


def check_accesses(rows):
    """Tokens are read and written 16 bytes at a time; float32 operands are partly fetched 4 bytes at a time."""
    for row in rows:
        loads, stores = ({int(width) for width in row["loop"][kind]} for kind in ("loads", "stores"))
        if row["name"] in TOKEN_MLP:  # a tile of 16 tokens has 8 bytes for each thread of 8 warps
            assert min(loads) >= 8 or row["dtype"] in ("fp32", "tf32"), (where(row), loads)
        if row["name"] in ATTENTION:
            allowed = {16} if row["dtype"] in HALF else {4, 16}
            assert {16} <= loads <= allowed, (where(row), loads)
            assert stores == ({16} if row["name"] in STORING else set()), (where(row), stores)
        if row["name"] in FORWARD and row["sizes"][0] == 64:
            assert loads == {16}, (where(row), loads)
        if row["name"] in FORWARD and row["sizes"][0] == 3:  # cells; 4 bytes: the vectors of their columns
            assert {16} <= loads and min(loads) >= 4, (where(row), loads)
        if row["name"] in NORM:  # 8 bytes: gamma and beta
            found = [{int(width) for width in row["code"][kind]} for kind in ("loads", "stores")]
            assert found == [{8, 16}, {16}], (where(row), found)
        if row["name"] == "product_kernel":  # 4 bytes: the column sums
            assert loads == ({16} if row["dtype"] in HALF else set()), (where(row), loads)
            assert {int(width) for width in row["code"]["stores"]} <= {4, 16}, where(row)
        if row["name"] == "cells_kernel":  # pixels are read one by one, and cells written whole
            assert {int(width) for width in row["code"]["stores"]} == {16}, where(row)
        if row["name"] in SPLIT | FORWARD | {"cells_kernel", "fold_kernel", "parameter_gradients_kernel"}:
            continue  # of windows the centre is one value; parameters are packed in another order
        everything = {int(width) for kind in ("loads", "stores") for width in row["code"][kind]}
        assert min(everything) >= 4, (where(row), everything)


def check_instructions(rows):
    """Of half types on sm_90 at most a tenth more than any of Triton 3.6, 3.8 and 3.9 makes of them."""
    found = {}
    for row in rows:
        if row["architecture"] == "sm_90" and row["dtype"] in HALF and row["instructions_per_token"]:
            key = row["name"], row["sizes"][0]
            found[key] = max(found.get(key, 0.0), row["instructions_per_token"])
    assert not {key: (count, INSTRUCTIONS[key]) for key, count in found.items() if count > INSTRUCTIONS[key]}


CASES = [(architecture, dtype) for architecture in triton_report.SHARED_LIMITS for dtype in triton_report.DTYPES]
CHECKS = [
    check_registers,
    check_shared_memory,
    check_matrix_instructions,
    check_accesses,
    check_instructions,
]


SOME_CALLS = """
import json, sys
from benchmarks.kernels.triton_report import Case, compiled

cases = [Case(*target, op, tuple(sizes)) for target in json.loads(sys.argv[1]) for op, sizes in json.loads(sys.argv[2])]
json.dump([row.plain() for case in cases for row in compiled(case)], sys.stdout, default=vars)
"""


def rows_of(targets, calls):
    """The kernels of some calls (operator, sizes) for (architecture, dtype) pairs, compiled by this Python's Triton."""
    if machine_code.find_tool(triton_first=True) is None:
        pytest.skip(machine_code.NO_TOOL)
    return json.loads(output(sys.executable, "-c", SOME_CALLS, json.dumps(targets), json.dumps(calls)))


@pytest.fixture(scope="module")
def rows():
    """The kernels of every operator's first call, for one architecture and dtype."""
    return rows_of([("sm_90", "bf16")], [(op, sizes[0]) for op, (_, sizes) in triton_report.OPERATORS.items()])


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_machine_code(rows, check):
    check(rows)


def test_every_kernel_is_launched(rows):
    """A kernel that no call of the report launches would go unnoticed; chunked ones are for large states."""
    sources = (path.read_text() for path in (ROOT / "t2t_fast" / "ops").glob("*/**/*.py"))
    defined = {name for text in sources for name in re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)}
    launched = {row["name"] for row in rows}
    assert launched <= defined
    assert {name for name in defined - launched if "_chunked" not in name} == set()


@pytest.mark.slow
def test_machine_code_everywhere(tmp_path):
    """Every architecture with a half type and float32, and every dtype on sm_90; another Triton's test has them all."""
    first, reason = report(sys.executable, tmp_path, "--dtype", "bf16", "fp32")
    if reason is not None:
        pytest.skip(reason)
    rest, _ = report(sys.executable, tmp_path, "--dtype", "fp16", "tf32", "--architecture", "sm_90")
    found = first + rest
    check_completeness(found, [case for case in CASES if case[0] == "sm_90" or case[1] in ("bf16", "fp32")])
    for check in CHECKS:
        check(found)


@pytest.mark.slow
def test_machine_code_for_few_tokens(tmp_path):
    """Smaller tiles, and as clean."""
    found, reason = report(sys.executable, tmp_path, "--few", "--architecture", "sm_90", "--dtype", "bf16", "fp32")
    if reason is not None:
        pytest.skip(reason)
    forward = [row for row in found if row["name"] in FORWARD | {"token_mlp_kernel", "read_out_mlp_kernel"}]
    assert Counter(row["name"] for row in forward) == Counter(
        split_linear_kernel=8, split_keys_kernel=4, token_mlp_kernel=2, read_out_mlp_kernel=4
    )
    assert all(row["few"] and row["tokens"] <= 32 for row in forward)
    assert not [f"{where(row)}: {row['faults']}" for row in forward if row["faults"]]


@pytest.mark.slow
def test_a_large_state_fits_every_card(tmp_path):
    """E and m of 128, in chunks; a few registers may spill, of which the report tells."""
    found, reason = report(sys.executable, tmp_path, "--shape", "128", "128", "--dtype", "bf16", "fp32")
    if reason is not None:
        pytest.skip(reason)
    passes = {row["name"] for row in found} - {"merge_kernel"}
    assert {name.replace("_chunked", "") for name in passes} == ATTENTION and len(found) == 5 * len(CASES) / 2
    assert all(row["chunk"] for row in found if row["name"] in passes)
    check_shared_memory(found)
    # a twentieth of the instructions; of one kernel in float32, Triton 3.8 spills more on sm_100 and sm_120 (NOTES.md)
    beyond = [row for row in found if row["code"]["spills"] > row["code"]["instructions"] / 20]
    assert {(row["name"], row["dtype"]) for row in beyond} <= {("keys_backward_chunked_kernel", "fp32")}
    assert all(row["code"]["spills"] <= 150 for row in beyond)


@pytest.mark.slow
def test_an_attention_with_all_its_options(tmp_path):
    """The backward pass spills up to 17 instructions in float32, and 35 in float16 on sm_90; the forward pass none."""
    found, reason = report(sys.executable, tmp_path, "--full", "--dtype", "fp16", "fp32")
    if reason is not None:
        pytest.skip(reason)
    assert {row["name"] for row in found} == ATTENTION | {"merge_kernel"} and len(found) == 5 * len(CASES) / 2
    check_shared_memory(found)
    check_matrix_instructions(found)
    spilling = {where(row): row["code"]["spills"] for row in found if row["faults"]}
    assert all(" fp32 " in kernel or " fp16 sm_90 " in kernel for kernel in spilling), spilling
    assert all("backward_kernel" in kernel for kernel in spilling) and max(spilling.values(), default=0) <= 40, spilling


OTHER_CALLS = {
    "five channels": ("soft_split_linear", (5, 64, 3, 2, 1, 1, 0)),
    "one channel, window 31": ("soft_split_linear", (1, 64, 31, 20, 5, 1, 0)),
    "stride 1": ("soft_split_linear", (64, 130, 3, 1, 1, 1, 0)),
    "a narrow mlp": ("token_mlp", (24, 60, 0)),
    "a wide mlp": ("token_mlp", (128, 128, 1)),
    "an attention of odd sizes": ("performer_attention", (7, 100)),
    "a narrow layer": ("performer_layer", (64, 32, 11, 32, 0)),
    "a narrow LayerNorm": ("add_layer_norm", (20, 60, 0)),
    "a wide LayerNorm": ("add_layer_norm", (4096, 64, 1)),
    "a narrow block": ("layer_norm_mlp", (20, 60, 1)),
    "a block of T2T-ViT-19": ("layer_norm_mlp", (448, 1344, 1)),
}


@pytest.mark.slow
def test_calls_that_t2t_does_not_make():
    """They compile for a half type on sm_90 and float32 on sm_80, and fit every card; split and layer do not spill.

    The backward pass of token_mlp fits the registers at T2T's width only: at 128 x 128 it spills 610 of 4,995
    instructions in bfloat16 on sm_90, and 1,303 of 8,516 in float32 on sm_80 (Triton 3.8).
    """
    found = rows_of([("sm_90", "bf16"), ("sm_80", "fp32")], list(OTHER_CALLS.values()))
    assert {row["operator"] for row in found} == set(triton_report.OPERATORS)
    check_shared_memory(found)
    assert {row["operator"] for row in found if row["faults"]} <= {"token_mlp", "performer_attention"}


@pytest.mark.slow
def test_machine_code_of_another_triton(tmp_path):
    others = [path for path in os.environ.get("T2T_FAST_TEST_PYTHON", "").split(os.pathsep) if path]
    if not others:
        pytest.skip("T2T_FAST_TEST_PYTHON names no Python with another Triton (several: separated as in PATH)")
    reasons = []
    for number, other in enumerate(others):
        folder = tmp_path / str(number)
        folder.mkdir()
        found, reason = report(other, folder)
        if reason is None:
            check_completeness(found, CASES)
            for check in CHECKS:
                check(found)
        else:
            reasons.append(f"{other}: {reason}")
    if len(reasons) == len(others):
        pytest.skip("; ".join(reasons))


def test_the_interpreter_compiles_nothing(monkeypatch):
    monkeypatch.setattr(triton_report.triton_runtime, "INTERPRETED", True)
    assert "TRITON_INTERPRET" in triton_report.reason()


def test_the_report_without_triton(monkeypatch):
    monkeypatch.setattr(triton_report, "find_spec", lambda name: None)
    assert kernel_report.triton_rows() == ([], "No Triton kernels to report: Triton is not installed.")


def test_all_shapes():
    shapes = triton_report.EVERY_SHAPE
    assert {width for width, _ in shapes} == {padded(width) for width in range(1, launch.LARGEST_WIDTH + 1)}
    cases = triton_report.cases(shapes)
    assert {case.sizes for case in cases} == set(shapes)
    assert len(cases) == len(set(cases)) == len(shapes) * len(CASES)


def row(**changes):
    """A row without faults, but for ``changes`` of its kernel."""
    code = Code(10, loads=Counter({4: 1, 16: 2}), matrix=Counter(HMMA=4))
    facts = dict(name="keys_kernel", architecture="sm_120", registers=128, shared=EVERYWHERE, code=code, loop=code)
    return Row(Case("sm_120", "fp16"), 4, 2, 64, 16, Kernel(**facts | changes), 0.625)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        pytest.param({}, None, id="none"),
        pytest.param({"code": Code(spills=3), "stack": 8}, "spills (3 instructions, 8 bytes of stack)", id="spills"),
        pytest.param({"stack": 8}, "spills (0 instructions, 8 bytes of stack)", id="stack"),
        pytest.param({"shared": EVERYWHERE + 1}, "101377 bytes of shared memory where 101376 are allowed", id="shared"),
    ],
)
def test_faults(changes, fault):
    found = row(**changes)
    assert found.faults() == ([] if fault is None else [fault])
    last = kernel_report.triton_lines([found])[-1]
    assert last == (f"keys_kernel fp16 64 32 sm_120: {fault}" if fault else "1 kernels, none at fault.")


def test_a_line_of_the_report():
    (line,) = [line for line in kernel_report.triton_lines([row()]) if line.startswith("keys_kernel")]
    expected = "keys_kernel fp16 64 32 sm_120 64x4x2/16 128 0 0 101376 0.6 HMMA:4 | 16B:2 4B:1 | -"
    assert line.split() == expected.split()


def test_a_row_as_json():
    found = json.loads(json.dumps(row().plain(), default=vars))
    expected = {"name": "keys_kernel", "dtype": "fp16", "tokens": 64, "registers": 128, "faults": []}
    assert found.items() >= expected.items()
    assert found["loop"]["matrix"] == {"HMMA": 4}


def test_the_tool_of_tritons_package_comes_first():
    if machine_code.find_tool(triton_first=True) is None:
        pytest.skip("cuobjdump is not found: it is in the CUDA toolkit and in Triton's package")
    assert "triton" in machine_code.find_tool(triton_first=True)

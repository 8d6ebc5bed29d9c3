"""The reader of machine code, on small made-up listings."""

import pytest

from benchmarks.kernels.machine_code import Code, Instruction, Kernel, main_loop, parse, readable

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
        /*0070*/                   HMMA.16816.F32.BF16 R4, R8, R6, R4 ; /* 0x00 */
        /*0080*/                   NOP ;                                /* 0x00 */
	code for sm_90
		Function : plain
        /*0000*/                   LDG.E R4, desc[UR4][R2.64] ;         /* 0x00 */
"""
ONE_KERNEL_USAGE = """
Resource usage:
 Function keys_kernel:
  REG:156 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:640 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
ONE_KERNEL = """
	code for sm_120a
		Function : keys_kernel
        /*0000*/                   LDGSTS.E.BYPASS.128 [R7], [R2.64]    &wr=0x5   ?trans1;   /* 0x00 */
        /*0010*/              @!P6 BRA P5, 0x0                                    ?trans6;   /* 0x00 */
        /*0020*/                   EXIT                                               ?trans5;   /* 0x00 */
"""


def test_kernels_of_a_library():
    first, second = parse(USAGE + CODE)
    code = Code(8, loads={16: 2, 2: 1}, stores={4: 1, 8: 1}, matrix={"HMMA": 1}, spills=1)
    assert first == Kernel("split_tiles<2 bytes>", "sm_80", 64, 8, 16, code)
    assert (second.name, second.architecture, second.code.loads) == ("plain", "sm_90", {4: 1})


def test_the_resources_of_one_kernel_have_no_architecture():
    (kernel,) = parse(ONE_KERNEL_USAGE + ONE_KERNEL)
    turn = Code(2, loads={16: 1})
    assert kernel == Kernel(
        "keys_kernel", "sm_120a", 156, 0, 1024, Code(3, loads={16: 1}), turn, once_round=2, around=1
    )


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        ("plain", "plain"),
        ("_Z6squarev", "square"),
        ("_ZN1a1bIfEEvv", "b<float>"),
        ("_ZN8t2t_fast4cuda12_GLOBAL__N_x13compose_tilesINS0_8BFloat16EEEvNS0_4PlanEPKT_", "compose_tiles<BFloat16>"),
        ("_ZN8t2t_fast4cuda12_GLOBAL__N_x13compose_tilesIjEEvNS0_4PlanEPKT_", "compose_tiles<4 bytes>"),
    ],
)
def test_names(mangled, name):
    assert readable(mangled) == name


def instructions(text):
    """A listing of one instruction a line, 16 bytes each: ``guard? opcode operands``; a line may start with ``name:``.

    A branch may name a line instead of an address.
    """
    lines = [line.strip() for line in text.strip().splitlines()]
    names = {line.partition(":")[0]: f"0x{16 * index:x}" for index, line in enumerate(lines) if ":" in line}
    found = []
    for index, line in enumerate(lines):
        words = line.partition(":")[2].split() if ":" in line else line.split()
        guard = words.pop(0) if words[0].startswith("@") else None
        opcode, *operands = words
        found.append(Instruction(16 * index, guard, opcode, " ".join(names.get(word, word) for word in operands)))
    return found


NO_LOOP = """
    LDG.E.128 R4
    @P0 EXIT
    HMMA.16816.F32 R4
    EXIT
    end: BRA end
"""
LOOP = """
    HMMA.16816.F32 R0
    loop: LDG.E.128 R4
    HMMA.16816.F32 R4
    @P0 BRA loop
    EXIT
    end: BRA end
"""
# the products of a pipeline's first turn stand before the inner loop
NESTED = """
    again: MOV R1
    HGMMA.64x32x16.F32 R0
    HGMMA.64x32x16.F32 R0
    loop: LDGSTS.E.128 R4
    HGMMA.64x32x16.F32 R4
    BRA.U UP1, loop
    @!P0 BRA P2, again
    EXIT
"""
WAITING = """
    loop: LDGSTS.E.128 R4
    UTCHMMA R4
    wait: SYNCS R1
    MOV R2
    MOV R3
    @!P1 BRA wait
    STG.E.128 R4
    @P0 BRA loop
    EXIT
"""
# ptxas moves what seldom runs behind the end: the jump back from there ends no loop
OUT_OF_LINE = """
    loop: LDG.E.128 R4
    @P1 BRA seldom
    back: HMMA.16816.F32 R4
    @P0 BRA loop
    EXIT
    seldom: MOV R1
    MOV R2
    LDL R3
    BRA back
"""
SKIPPED = """
    loop: HMMA.16816.F32 R4
    @P1 BRA over
    MOV R1
    MOV R2
    over: MOV R3
    @P0 BRA loop
    EXIT
"""
NO_PRODUCTS = """
    wait: SYNCS R1
    MOV R2
    MOV R3
    @P1 BRA wait
    loop: LDG.E R4
    @P0 BRA loop
    many: LDG.E.128 R4
    LDG.E.128 R4
    STG.E.64 R4
    @P0 BRA many
    EXIT
"""
LEFT = """
    loop: HMMA.16816.F32 R4
    @P1 BRA left
    BRA loop
    left: EXIT
"""
GUARDED_END = """
    loop: HMMA.16816.F32 R4
    MOV R1
    @P1 EXIT
    BRA loop
"""
CALLED_END = """
    again: MOV R1
    loop: HMMA.16816.F32 R4
    @P1 BRA loop
    @P0 CALL.REL.NOINC end
    BRA again
    end: EXIT
"""
UNREACHABLE = """
    EXIT
    loop: HMMA.16816.F32 R4
    BRA loop
"""


@pytest.mark.parametrize(
    ("listing", "code", "once_round", "around"),
    [
        pytest.param(NO_LOOP, Code(), 0, 0, id="none"),
        pytest.param(LOOP, Code(3, loads={16: 1}, matrix={"HMMA": 1}), 3, 2, id="one"),
        pytest.param(NESTED, Code(3, loads={16: 1}, matrix={"HGMMA": 1}), 3, 4, id="nested"),
        pytest.param(WAITING, Code(8, {16: 1}, {16: 1}, {"UTCHMMA": 1}), 8, 1, id="waiting-inside"),
        pytest.param(OUT_OF_LINE, Code(8, loads={16: 1}, matrix={"HMMA": 1}, spills=1), 4, 1, id="out-of-line"),
        pytest.param(SKIPPED, Code(6, matrix={"HMMA": 1}), 4, 1, id="skipped"),
        pytest.param(NO_PRODUCTS, Code(4, {16: 2}, {8: 1}), 4, 7, id="no-products"),
        pytest.param(LEFT, Code(3, matrix={"HMMA": 1}), 3, 1, id="left-in-the-middle"),
        pytest.param(GUARDED_END, Code(4, matrix={"HMMA": 1}), 4, 0, id="guarded-end"),
        pytest.param(CALLED_END, Code(2, matrix={"HMMA": 1}), 2, 3, id="called-end"),
        pytest.param(UNREACHABLE, Code(), 0, 0, id="unreachable"),
    ],
)
def test_the_main_loop(listing, code, once_round, around):
    assert main_loop(instructions(listing)) == (code, once_round, around)

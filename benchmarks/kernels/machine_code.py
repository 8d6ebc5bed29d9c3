"""Compiled kernels as cuobjdump shows them: resources, memory accesses, matrix instructions, and the main loop."""

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from heapq import heappop, heappush
from importlib.util import find_spec
from pathlib import Path

TOOL = "cuobjdump"

# Template arguments of one letter in a mangled name.
_TYPES = {"f": "float", "d": "double", "t": "2 bytes", "j": "4 bytes", "m": "8 bytes"}
_FUNCTION = re.compile(r"^\s*Function\s*:?\s+([\w$]+)\s*:?\s*$")
_ARCHITECTURE = re.compile(r"^\s*(?:arch\s*=|code for)\s*(sm_\w+)")
_USAGE = re.compile(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:(\d+)\s+LOCAL:(\d+)")
_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)\s*([^;&?]*)"
)
_TARGET = re.compile(r"(?:.*[\s,])?0x([0-9a-f]+)\s*$")
_ENDS = ("EXIT", "RET", "BRX", "JMX", "KILL")


@dataclass
class Code:
    """What some instructions do; ``loads`` and ``stores`` count global accesses by their bytes, ``matrix`` by kind."""

    instructions: int = 0
    loads: Counter = field(default_factory=Counter)
    stores: Counter = field(default_factory=Counter)
    matrix: Counter = field(default_factory=Counter)
    spills: int = 0


@dataclass
class Kernel:
    """One kernel of one architecture: all its code, and the loop in which it spends its time (empty without one).

    ``once_round``: the fewest instructions of a warp for one time round the loop; ``around``: the fewest of what is
    around it, up to the loop that it is in, or up to the whole kernel.
    """

    name: str
    architecture: str
    registers: int = 0
    stack: int = 0
    shared: int = 0
    code: Code = field(default_factory=Code)
    loop: Code = field(default_factory=Code)
    once_round: int = 0
    around: int = 0

    def plain(self):
        """The kernel as dictionaries, for JSON."""
        return {**vars(self), "code": vars(self.code), "loop": vars(self.loop)}


def _triton_tool(name):
    triton = find_spec("triton")
    found = triton and triton.origin and Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
    return str(found) if found and found.is_file() else None


def find_tool(name=TOOL, triton_first=False):
    """A program of the CUDA toolkit: on ``PATH``, beside nvcc, or in Triton's package; ``None`` where it is nowhere.

    ``triton_first``: what Triton compiled may be newer than the toolkit, so its package comes first.
    """
    found = (triton_first and _triton_tool(name)) or shutil.which(name)
    if found:
        return found
    folders = [Path("/usr/local/cuda/bin")]
    if nvcc := shutil.which("nvcc"):
        # nvcc may be a wrapper script: what it would run tells where the toolkit is
        told = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
        folders += [Path(top) / "bin" for top in re.findall(r"^#\$ TOP=(.*)$", told, re.MULTILINE)]
    return next((str(path) for folder in folders if (path := folder / name).is_file()), None) or _triton_tool(name)


def readable(mangled):
    """``split_tiles<float>`` from a mangled name, or the name itself where it is of another kind."""
    name, rest = mangled, mangled.removeprefix("_ZN" if mangled.startswith("_ZN") else "_Z")
    if rest == mangled:
        return mangled
    while number := re.match(r"(\d+)(?=\D)", rest):
        end = number.end() + int(number[1])
        name, rest = rest[number.end() : end], rest[end:]
    argument = re.match(r"I(?:([a-z])|N?(?:S\w*?_)?(\d+)(\w+))", rest)
    if argument is None:
        return name
    letter, length, text = argument.groups()
    return f"{name}<{_TYPES.get(letter, letter) if letter else text[: int(length)]}>"


def _width(opcode):
    """Bytes that a load or store moves per thread."""
    for part in opcode.split("."):
        if match := re.fullmatch(r"[US]?(8|16|32|64|128|256)", part):
            return int(match[1]) // 8
    return 4


def _count(opcodes):
    found = Code(instructions=len(opcodes))
    for opcode in opcodes:
        kind = opcode.partition(".")[0]
        if kind in ("LDG", "LDGSTS"):
            found.loads[_width(opcode)] += 1
        elif kind == "STG":
            found.stores[_width(opcode)] += 1
        elif kind in ("LDL", "STL"):
            found.spills += 1
        elif kind.endswith("MMA"):
            found.matrix[kind] += 1
    return found


def _blocks(instructions):
    """The flow graph: ranges of instructions that run as one, and for each the blocks that may follow it."""
    places = {address: index for index, (address, *_) in enumerate(instructions)}
    starts, jumps = {0}, {}
    for index, (_, guard, opcode, operands) in enumerate(instructions):
        kind = opcode.partition(".")[0]
        # ptxas makes some conditional branches calls that never return; other calls return
        if (
            (kind == "BRA" or (kind == "CALL" and guard))
            and (target := _TARGET.match(operands))
            and int(target[1], 16) in places
        ):
            # a condition is before the instruction or among its operands: BRA P2, 0x40
            sure = not guard and target[0].strip() == f"0x{target[1]}"
            jumps[index] = (places[int(target[1], 16)], sure)
            starts |= {jumps[index][0], index + 1}
        elif kind in _ENDS and not guard:
            jumps[index] = (None, True)
            starts.add(index + 1)
    order = sorted(start for start in starts if start < len(instructions))
    numbers = {start: number for number, start in enumerate(order)}
    blocks, following = [], []
    for start, end in zip(order, [*order[1:], len(instructions)], strict=True):
        target, sure = jumps.get(end - 1, (None, False))
        after = [] if target is None else [numbers[target]]
        blocks.append(range(start, end))
        following.append(after + ([numbers[end]] if not sure and end in numbers else []))
    return blocks, following


def _reachable(following):
    """The blocks to which a way leads from the first, and what comes before each of them."""
    preceding, wanted = {0: []}, [0]
    while wanted:
        block = wanted.pop()
        for other in following[block]:
            if other not in preceding:
                preceding[other] = []
                wanted.append(other)
            preceding[other].append(block)
    return preceding


def _loops(preceding):
    """The natural loops of a flow graph: the first block of each, all its blocks, and those that lead back."""
    dominators = {block: {0} if block == 0 else set(preceding) for block in preceding}
    changed = True
    while changed:
        changed = False
        for block in preceding.keys() - {0}:
            found = {block} | set.intersection(*(dominators[other] for other in preceding[block]))
            changed |= found != dominators[block]
            dominators[block] = found
    for head in preceding:
        ends = {block for block in preceding[head] if head in dominators[block]}
        body, wanted = {head}, list(ends)
        while wanted:
            if (block := wanted.pop()) not in body:
                body.add(block)
                wanted += preceding[block]
        if ends:
            yield head, body, ends


def _fewest(blocks, following, first, ends, inside, free=frozenset()):
    """The fewest instructions of a way ``inside`` from the block ``first`` through one of ``ends``, 0 where none leads.

    Those of ``free`` blocks are not counted.
    """
    least, open_ways = {}, [(0 if first in free else len(blocks[first]), first)]
    while open_ways:
        count, block = heappop(open_ways)
        if block in ends:
            return count
        if block not in least:
            least[block] = count
            for other in inside.intersection(following[block]):
                heappush(open_ways, (count + (0 if other in free else len(blocks[other])), other))
    return 0


def main_loop(instructions):
    """What the innermost loop with the most work does, and a :class:`Kernel`'s ``once_round`` and ``around``.

    Work is matrix instructions, and where there are none, accesses to global memory: a loop that only waits has
    neither. What seldom runs is counted with the rest of the loop, but on no way round it.

    Args:
        instructions: (address, guard, opcode, operands) of each, in their order.
    """
    blocks, following = _blocks(instructions)
    found, reachable = [], _reachable(following)
    for head, body, ends in _loops(reachable):
        code = _count([instructions[index][2] for block in body for index in blocks[block]])
        found.append((code, head, body, ends))
    exits = {block for block in reachable if any(instructions[i][2].startswith("EXIT") for i in blocks[block])}
    everything = 0, set(reachable), exits
    for work in (lambda code: code.matrix.total(), lambda code: code.loads.total() + code.stores.total()):
        working = [loop for loop in found if work(loop[0])]
        inner = [loop for loop in working if not any(other[2] < loop[2] for other in working)]
        if inner:
            code, head, body, ends = max(inner, key=lambda loop: (work(loop[0]), loop[0].instructions))
            wider = [loop[1:] for loop in found if body < loop[2]]
            first, inside, last = min(wider, key=lambda loop: len(loop[1]), default=everything)
            before = _fewest(blocks, following, first, {head}, inside, body)
            behind = _fewest(blocks, following, head, last, inside, body)
            return code, _fewest(blocks, following, head, ends, body), before + behind
    return Code(), 0, 0


def parse(usage, code):
    """Kernels from what ``cuobjdump -res-usage`` and ``cuobjdump -sass`` print."""
    kernels, listings, architecture, key = {}, {}, "", None
    for line in usage.splitlines():
        if match := _ARCHITECTURE.match(line):
            architecture = match[1]
        elif match := _FUNCTION.match(line):
            key = (architecture, match[1])
            kernels[key] = Kernel(readable(match[1]), architecture)
        elif key and (match := _USAGE.search(line)):
            kernel = kernels[key]
            kernel.registers, kernel.stack, kernel.shared = (int(match[i]) for i in (1, 2, 3))
    key = None
    for line in code.splitlines():
        if match := _ARCHITECTURE.match(line):
            architecture, key = match[1], None
        elif match := _FUNCTION.match(line):
            key = (architecture, match[1])
            # the resources of a file for one architecture are printed without its name
            kernel = kernels.pop(("", match[1]), None) or kernels.get(key) or Kernel(readable(match[1]), architecture)
            kernel.architecture = architecture
            kernels[key] = kernel
        elif key and (match := _INSTRUCTION.match(line)):
            address, guard, opcode, operands = match.groups()
            listings.setdefault(key, []).append((int(address, 16), guard, opcode, operands))
    for key, instructions in listings.items():
        kernel = kernels[key]
        # what follows the last branch fills a line of the instruction cache
        kernel.code = _count([opcode for _, _, opcode, _ in instructions if opcode != "NOP"])
        kernel.loop, kernel.once_round, kernel.around = main_loop(instructions)
    return list(kernels.values())


def read(path, tool):
    """The kernels in a file (a library or one kernel's binary); empty where it has none.

    Raises:
        subprocess.CalledProcessError: the tool failed.
    """
    texts = []
    for option in ("-res-usage", "-sass"):
        run = subprocess.run([tool, option, str(path)], capture_output=True, text=True)
        if "does not contain device code" in run.stdout + run.stderr:
            return []
        run.check_returncode()
        texts.append(run.stdout + run.stderr)
    return parse(*texts)


def widths(accesses):
    """Counts of accesses as words: ``16B:4 4B:1``."""
    return " ".join(f"{width}B:{accesses[width]}" for width in sorted(accesses, reverse=True)) or "-"

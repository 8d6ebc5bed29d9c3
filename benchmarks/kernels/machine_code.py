"""Read compiled kernels with cuobjdump: resources, memory accesses, matrix instructions, and the main loop."""

import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import networkx  # a dependency of torch
import torch

NO_TOOL = "cuobjdump is neither on PATH nor in a CUDA toolkit nor in Triton's package"

# Template arguments that stand for any type of their size
_TYPES = {"unsigned short": "2 bytes", "unsigned int": "4 bytes", "unsigned long": "8 bytes"}
_FUNCTION = re.compile(r"^\s*Function\s*:?\s+([\w$]+)\s*:?\s*$")
_ARCHITECTURE = re.compile(r"^\s*(?:arch\s*=|code for)\s*(sm_\w+)")
_USAGE = re.compile(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:(\d+)")
_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)\s*([^;&?]*)"
)
_TARGET = re.compile(r"(?:.*[\s,])?0x([0-9a-f]+)\s*$")
_ENDS = ("EXIT", "RET", "BRX", "JMX", "KILL")


class Instruction(NamedTuple):
    """One line of a listing; ``guard`` is its predicate, or ``None``."""

    address: int
    guard: str | None
    opcode: str
    operands: str

    @property
    def kind(self):
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]


@dataclass
class Code:
    """Instruction counts; ``loads`` and ``stores`` count global accesses by their bytes, ``matrix`` by kind."""

    instructions: int = 0
    loads: Counter = field(default_factory=Counter)
    stores: Counter = field(default_factory=Counter)
    matrix: Counter = field(default_factory=Counter)
    spills: int = 0


@dataclass
class Kernel:
    """A kernel compiled for one architecture: the counts of all its code and of its main loop (empty without one).

    ``once_round``: the fewest instructions of a warp in one iteration of the main loop; ``around``: the fewest
    instructions outside of it, within the enclosing loop or the whole kernel.
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


@cache
def find_tool(triton_first=False):
    """The path of cuobjdump: on ``PATH``, beside nvcc, or in Triton's package; ``None`` if it is not found.

    ``triton_first``: search Triton's package first, since its compiler may be newer than the toolkit.
    """
    triton, folders = find_spec("triton"), [*os.get_exec_path(), "/usr/local/cuda/bin"]
    if nvcc := shutil.which("nvcc"):
        # nvcc may be a wrapper script; a dry run prints the toolkit's folder
        printed = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
        folders += [f"{top}/bin" for top in re.findall(r"^#\$ TOP=(.*)$", printed, re.MULTILINE)]
    if triton and triton.origin:
        folders.insert(0 if triton_first else len(folders), f"{Path(triton.origin).parent}/backends/nvidia/bin")
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


def readable(mangled):
    """``split_tiles<float>`` from a mangled name: the function and its first template argument, without namespaces."""
    name = torch._C._demangle(mangled).replace("(anonymous namespace)::", "")
    function, argument = re.match(r"(?:void )?(?:\w+::)*([\w$]+)(?:<(?:\w+::)*([\w ]+))?", name).groups()
    return f"{function}<{_TYPES.get(argument, argument)}>" if argument else function


def _width(opcode):
    """Bytes that a load or store moves per thread."""
    match = re.search(r"\.[US]?(8|16|32|64|128|256)(?![\w])", opcode)
    return int(match[1]) // 8 if match else 4


def count(instructions):
    """The :class:`Code` of some instructions."""
    code = Code(instructions=len(instructions))
    for each in instructions:
        if each.kind in ("LDG", "LDGSTS"):
            code.loads[_width(each.opcode)] += 1
        elif each.kind == "STG":
            code.stores[_width(each.opcode)] += 1
        elif each.kind in ("LDL", "STL"):
            code.spills += 1
        elif each.kind.endswith("MMA"):
            code.matrix[each.kind] += 1
    return code


def _flow_graph(instructions):
    """The reachable basic blocks, each named by the index of its first instruction, and the jumps between them."""
    places = {each.address: index for index, each in enumerate(instructions)}
    starts, jumps = {0}, {}  # index of a jump: (index of its target, whether it is unconditional)
    for index, each in enumerate(instructions):
        # ptxas turns some conditional branches into calls that never return; other calls return
        branch = each.kind == "BRA" or (each.kind == "CALL" and each.guard)
        target = _TARGET.match(each.operands) if branch else None
        if target and (place := places.get(int(target[1], 16))) is not None:
            # the condition is the guard or one of the operands: BRA P2, 0x40
            jumps[index] = place, not each.guard and target[0].strip() == f"0x{target[1]}"
            starts |= {place, index + 1}
        elif each.kind in _ENDS and not each.guard:
            jumps[index] = None, True
            starts.add(index + 1)
    graph, order = networkx.DiGraph(), sorted(starts | {len(instructions)})
    for start, end in pairwise(order):
        graph.add_node(start, code=instructions[start:end])
        target, unconditional = jumps.get(end - 1, (None, False))
        if target is not None:
            graph.add_edge(start, target)
        if not unconditional and end < len(instructions):
            graph.add_edge(start, end)
    return graph.subgraph({0} | networkx.descendants(graph, 0)).copy() if instructions else graph


class _Loop(NamedTuple):
    head: int
    body: set
    latches: set
    """The blocks that jump back to the head."""
    code: Code


def _loops(graph):
    """The natural loops of a flow graph: jumps from blocks back to a head that dominates them."""
    dominators = networkx.immediate_dominators(graph, 0)
    tree = networkx.DiGraph((dominators.get(block) or 0, block) for block in graph)  # the entry, 0, has no dominator
    for head in graph:
        latches = set(graph.predecessors(head)) & {head, *networkx.descendants(tree, head)}
        if latches:
            without = networkx.restricted_view(graph, [head], [])
            body = {head, *latches}.union(*(networkx.ancestors(without, each) for each in latches - {head}))
            yield _Loop(head, body, latches, count([each for block in body for each in graph.nodes[block]["code"]]))


def _fewest(graph, first, last, inside, free=()):
    """The fewest instructions on a path ``inside`` from the block ``first`` to one of ``last``; 0 without a path.

    Instructions of ``free`` blocks are not counted.
    """
    sizes = {block: 0 if block in free else len(code) for block, code in graph.nodes("code")}
    inner = graph.subgraph(inside)
    lengths = networkx.single_source_dijkstra_path_length(inner, first, weight=lambda _, block, __: sizes[block])
    return min((sizes[first] + lengths[block] for block in last if block in lengths), default=0)


def main_loop(instructions):
    """The counts of the innermost loop with the most work, and a :class:`Kernel`'s ``once_round`` and ``around``.

    Work is matrix instructions or, in kernels without them, global memory accesses; this excludes loops that only wait.
    Rarely executed blocks are in the loop's counts, but not on its shortest path.
    """
    graph = _flow_graph(instructions)
    loops = list(_loops(graph)) if graph else []
    for work in (lambda code: code.matrix.total(), lambda code: code.loads.total() + code.stores.total()):
        working = [loop for loop in loops if work(loop.code)]
        inner = [loop for loop in working if not any(other.body < loop.body for other in working)]
        if inner:
            loop = max(inner, key=lambda loop: (work(loop.code), loop.code.instructions))
            exits = {block for block, code in graph.nodes("code") if any(each.kind == "EXIT" for each in code)}
            wider = [other for other in loops if loop.body < other.body]
            outer = min(wider, key=lambda other: len(other.body), default=_Loop(0, set(graph), exits, Code()))
            before = _fewest(graph, outer.head, {loop.head}, outer.body, loop.body)
            behind = _fewest(graph, loop.head, outer.latches, outer.body, loop.body)
            return loop.code, _fewest(graph, loop.head, loop.latches, loop.body), before + behind
    return Code(), 0, 0


def parse(text):
    """Kernels from the output of ``cuobjdump -res-usage -sass``."""
    usage, listings, architecture, function = {}, {}, "", None
    for line in text.splitlines():
        if match := _ARCHITECTURE.match(line):
            architecture, function = match[1], None
        elif match := _FUNCTION.match(line):
            function = match[1]
        elif function and (match := _USAGE.search(line)):
            usage[architecture, function] = [int(size) for size in match.groups()]
        elif function and (match := _INSTRUCTION.match(line)):
            address, *words = match.groups()
            listings.setdefault((architecture, function), []).append(Instruction(int(address, 16), *words))
    kernels = []
    for (architecture, name), instructions in listings.items():
        # for a file of one architecture the resources are printed without its name
        resources = usage.get((architecture, name)) or usage.get(("", name), (0, 0, 0))
        # the NOPs behind the last branch fill a line of the instruction cache
        code = count([each for each in instructions if each.opcode != "NOP"])
        kernels.append(Kernel(readable(name), architecture, *resources, code, *main_loop(instructions)))
    return kernels


def read(path, tool):
    """The kernels in a file (a library or a cubin); an empty list if it has none.

    Raises:
        subprocess.CalledProcessError: the tool failed.
    """
    run = subprocess.run([tool, "-res-usage", "-sass", str(path)], capture_output=True, text=True)
    if "does not contain device code" in run.stdout + run.stderr:
        return []
    run.check_returncode()
    return parse(run.stdout + run.stderr)

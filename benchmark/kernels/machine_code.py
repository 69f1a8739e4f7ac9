"""Disassembled machine code of a GPU kernel (SASS), and the instructions that a loop executes.

Which branches a warp takes at run time is not in the code. What a loop does over and over is: of
all ways around it that do the stated work (so many tensor core operations, loads, copies), the
shortest. Whatever is rare (another request begins, a maximum rises) is a detour from it.
"""

import heapq
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from operator import add
from pathlib import Path

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
FUNCTION = re.compile(r"^\s*Function : (\S+)$")
Barriers = frozenset[tuple[str, int]]  # name, block
Node = tuple[int, Barriers]
Counts = tuple[int, ...]
State = tuple[Node, Counts]

ADDRESS = re.compile(r"0x[0-9a-f]+")

# By the unit that executes them; the first that fits. Source: opcode names of NVIDIA's
# documentation of cuobjdump ("Instruction Set Reference").
CLASSES: Mapping[str, tuple[str, ...]] = {
    "tensor core": ("HMMA", "IMMA", "HGMMA"),
    "copy to shared memory": ("LDGSTS", "LDGDEPBAR", "UBLKCP", "DEPBAR"),
    "load matrix": ("LDSM",),
    "shared memory": ("LDS", "STS", "STSM", "ATOMS"),
    "global memory": ("LDG", "STG", "LD", "ST", "LDC", "LDCU", "ULDC", "LDL", "STL", "RED", "ATOM"),
    "exchange between lanes": ("SHFL", "MOVM", "VOTE", "VOTEU", "REDUX", "WARPSYNC", "R2UR"),
    "byte permutation": ("PRMT", "UPRMT"),
    "logic and shift": ("LOP3", "PLOP3", "SHF", "SHL", "SHR", "LEA", "SGXT", "ULOP3", "USHF"),
    "floating point": (
        *("FADD", "FMUL", "FFMA", "FMNMX", "FSETP", "FSEL", "FSET", "MUFU", "HADD2", "HMUL2"),
        *("HFMA2", "HMNMX2", "FADD2", "FMUL2", "FFMA2", "FMNMX3", "F2F", "F2FP", "I2F", "F2I"),
    ),
    "control": (
        *("BRA", "BSSY", "BSYNC", "EXIT", "NOP", "BAR", "CALL", "RET", "BREAK", "YIELD"),
        *("ACQBULK", "ERRBAR", "MEMBAR", "WARPSYNC", "BMOV"),
    ),
}


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # "" or as it stands: @P0, @!UP1
    opcode: str  # with its modifiers: LDSM.16.MT88.4
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def kind(self) -> str:
        """The class of CLASSES, or "integer" for all others."""
        return next((kind for kind, names in CLASSES.items() if self.name in names), "integer")

    @property
    def target(self) -> int | None:
        """Where a BRA or BSSY leads."""
        found = ADDRESS.findall(self.operands)
        return int(found[-1], 16) if found else None


def disassemble(cuobjdump: str, binary: Path) -> dict[str, list[Instruction]]:
    """Each function's instructions, with what pads its end. Raises CalledProcessError."""
    command = [cuobjdump, "-sass", str(binary)]
    return parse(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def parse(listing: str) -> dict[str, list[Instruction]]:
    functions: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in listing.splitlines():
        if found := FUNCTION.match(line):
            code = functions.setdefault(found[1], [])
        elif found := INSTRUCTION.match(line):
            address, predicate, opcode, operands = found.groups()
            code.append(Instruction(int(address, 16), predicate or "", opcode, operands))
    return functions


@dataclass(frozen=True)
class Block:
    """Instructions that are executed together, and what may come next (block numbers)."""

    code: tuple[Instruction, ...]
    next: tuple[int, ...]
    opens: tuple[str, int] | None = None  # BSSY: barrier, block where its BSYNC leads
    closes: str | None = None  # BSYNC: the barrier that says what comes next


class Flow:
    """The control flow graph of one function."""

    def __init__(self, code: Sequence[Instruction]) -> None:
        self._code = code

    @cached_property
    def blocks(self) -> list[Block]:
        code, size = self._code, len(self._code)
        index = {each.address: i for i, each in enumerate(code)}
        starts = {0}
        for i, each in enumerate(code):
            if each.name in ("BRA", "BSSY") and each.target in index:
                starts.add(index[each.target])
            if each.name in ("BRA", "BSSY", "BSYNC", "EXIT", "RET", "CALL") and i + 1 < size:
                starts.add(i + 1)
        order = sorted(starts)
        number = {start: block for block, start in enumerate(order)}
        return [
            self._block(begin, end, index, number)
            for begin, end in zip(order, [*order[1:], size], strict=True)
        ]

    def _block(
        self, begin: int, end: int, index: Mapping[int, int], number: Mapping[int, int]
    ) -> Block:
        code = tuple(self._code[begin:end])
        last = code[-1]
        target = index.get(last.target) if last.target is not None else None
        after = (number[end],) if end in number else ()
        if last.name == "BRA" and target is not None:
            conditional = last.predicate or "," in last.operands
            return Block(code, (number[target], *(after if conditional else ())))
        if last.name == "BSSY" and target is not None:
            return Block(code, after, opens=(last.operands.split(",")[0], number[target]))
        if last.name == "BSYNC":
            return Block(code, after if last.predicate else (), closes=last.operands)
        if last.name in ("EXIT", "RET", "CALL"):  # calls are made where division is slow
            return Block(code, after if last.predicate else ())
        return Block(code, after)

    @cached_property
    def edges(self) -> dict[Node, list[Node]]:
        """What may follow what, from the function's entry on. A node is a block and where the
        barriers that are open there lead: a BSYNC goes where its BSSY has said."""
        edges: dict[Node, list[Node]] = {}
        ahead: list[Node] = [(0, frozenset())]
        while ahead:
            node = ahead.pop()
            if node not in edges:
                edges[node] = list(self._onward(*node))
                ahead += edges[node]
        return edges

    def _onward(self, number: int, barriers: Barriers) -> Iterator[Node]:
        block = self.blocks[number]
        if block.opens:
            barriers = frozenset(b for b in barriers if b[0] != block.opens[0]) | {block.opens}
        for name, target in barriers:
            if name == block.closes:
                yield target, barriers - {(name, target)}
        for following in block.next:
            yield following, barriers

    def shortest_loop(self, work: Mapping[str, int]) -> list[Instruction]:
        """Of the ways around a loop that execute at least `work` instructions of each name (one at
        least), the one with the fewest instructions. Raises ValueError if there is none."""
        work = {name: number for name, number in work.items() if number}
        full = tuple(work.values())
        does = [
            tuple(sum(each.name == name for each in block.code) for name in work)
            for block in self.blocks
        ]
        rarest = min(range(len(full)), key=lambda i: sum(each[i] > 0 for each in does))
        starts = [node for node in self.edges if does[node[0]][rarest]]
        ways = [self._around(start, does, full) for start in starts]
        best = min((way for way in ways if way), key=len, default=None)
        if best is None:
            raise ValueError(f"no loop executes {dict(work)}")
        return best

    def _around(
        self, start: Node, does: Sequence[Counts], full: Counts
    ) -> list[Instruction] | None:
        """Dijkstra's algorithm over nodes and the work that has been done on the way there."""
        origin: State = (start, (0,) * len(full))
        came_from: dict[State, State] = {}
        best = {origin: 0}
        ahead = [(0, 0, origin)]
        tickets = count(1)
        while ahead:
            length, _, state = heapq.heappop(ahead)
            node, done = state
            if node == start and done == full:
                return self._code_on_the_way(came_from, origin, state)
            made = tuple(map(min, map(add, done, does[node[0]]), full))
            cost = length + len(self.blocks[node[0]].code)
            for following in self.edges[node]:
                to: State = (following, made)
                if cost < best.get(to, cost + 1):
                    best[to], came_from[to] = cost, state
                    heapq.heappush(ahead, (cost, next(tickets), to))
        return None

    def _code_on_the_way(
        self, came_from: Mapping[State, State], origin: State, state: State
    ) -> list[Instruction]:
        numbers: list[int] = []
        while not numbers or state != origin:
            state = came_from[state]
            numbers.append(state[0][0])
        return [each for number in reversed(numbers) for each in self.blocks[number].code]


def by_kind(code: Sequence[Instruction]) -> dict[str, int]:
    """Number of instructions of each class, the most frequent first."""
    return dict(Counter(each.kind for each in code).most_common())

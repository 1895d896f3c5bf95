"""Checks that barriers, shuffles and matrices are reached by all threads of a threadgroup, or all lanes of a simdgroup.

Every value may differ among simdgroups, among groups of consecutive lanes, or among lanes of such a group. That follows
from the attributes of a kernel's arguments, through the instructions of the optimised IR. A block that some threads
skip differs as its conditions do. A sum over lanes no longer differs among them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cached_property

from .clang import Program, Violation
from .ir import Function, Instruction
from .walk import kernel_violations

SAME, SIMDGROUPS, GROUPS, LANES = 0, 1, 2, 4  # threads among which a value may differ, as bits
ALL_LANES = GROUPS | LANES
ALL = SIMDGROUPS | ALL_LANES
SIMD_BITS = 5  # bits of a lane's number
VARIES = {
    "thread_position_in_grid": ALL,
    "thread_position_in_threadgroup": ALL,
    "thread_index_in_threadgroup": ALL,
    "thread_index_in_simdgroup": ALL_LANES,
    "thread_index_in_quadgroup": LANES,
    "quadgroup_index_in_threadgroup": SIMDGROUPS | GROUPS,
    "simdgroup_index_in_threadgroup": SIMDGROUPS,
}
# Numbers that count lanes: the lowest bits differ among the lanes of a group.
COUNTED = ("thread_index_in_threadgroup", "thread_position_in_threadgroup", "thread_index_in_simdgroup")
SAME_IN_SIMDGROUP = re.compile(
    r"simd_(sum|product|max|min|and|or|xor|all|any|ballot|broadcast|broadcast_first|active_threads_mask)"
)
OWN_IN_THREAD = re.compile(r"simd_prefix_\w+|simd_shuffle_\w+|\w+_is_first|quad_\w+")
OF_THREADGROUP = ("threadgroup_barrier", "tensor_operation")
OF_SIMDGROUP = re.compile(r"simdgroup_\w+|quadgroup_barrier")
OF_PARTNERS = re.compile(r"(simd|quad)_(shuffle\w*|broadcast)")  # among lanes that may all take the same way


class Uniformity:
    """The threads among which a kernel's values differ, and its blocks."""

    def __init__(self, function: Function, attributes: dict[str, str]) -> None:
        self.function = function
        self.values: dict[str, int] = {}  # a value that is absent here is the same everywhere
        self.counted: set[str] = set()
        for name in function.arguments:
            attribute = attributes.get(name.removesuffix(".coerce"), "")
            self.values[name] = VARIES.get(attribute, SAME)
            if attribute in COUNTED:
                self.counted.add(name)
        self.block: dict[str, int] = dict.fromkeys(function.blocks, SAME)
        self.stored: dict[str, list[Instruction]] = {}  # stores into a thread's own arrays
        for instruction in function.instructions():
            if instruction.opcode in ("store", "call"):
                for operand in instruction.operands:
                    self.stored.setdefault(self.held(operand), []).append(instruction)
        self.solve()

    def solve(self) -> None:
        """Spreads differences until nothing changes."""
        changed = True
        while changed:
            changed = False
            for instruction in self.function.instructions():
                found = self.of_instruction(instruction) | self.values.get(instruction.result, SAME)
                if instruction.result and found != self.values.get(instruction.result, SAME):
                    self.values[instruction.result] = found
                    changed = True
            for name, branches in self.depends.items():
                found = union(self.of_branch(b) | self.block[b] for b in branches) | self.block[name]
                if found != self.block[name]:
                    self.block[name] = found
                    changed = True

    def of(self, names: Iterable[str]) -> int:
        return union(self.values.get(name, SAME) for name in names)

    def of_branch(self, block: str) -> int:
        last = self.function.blocks[block][-1]
        return self.of(last.operands) if last.opcode in ("br", "switch") else SAME

    def of_instruction(self, instruction: Instruction) -> int:
        found, opcode = self.of(instruction.operands), instruction.opcode
        if opcode == "phi":
            ways = union(self.block[b] | self.of_branch(b) for _, b in instruction.incoming)
            return found | (ways & ~self.block[instruction.block])
        if opcode == "load" and (array := self.held(next(iter(instruction.operands), ""))):
            return found | union(self.of_stored(store, array) for store in self.stored.get(array, []))
        if opcode == "call":
            return self.of_call(instruction, instruction.operands)
        return found & ~self.agreed(instruction)

    def of_stored(self, store: Instruction, array: str) -> int:
        others = [name for name in store.operands if self.held(name) != array]
        return self.block[store.block] | (self.of(others) if store.opcode == "store" else self.of_call(store, others))

    def of_call(self, call: Instruction, operands: list[str]) -> int:
        name, found = call.called, self.of(operands)
        if name.startswith("atomic_"):
            return ALL
        if SAME_IN_SIMDGROUP.fullmatch(name):
            return found & ~ALL_LANES
        if name == "simd_shuffle" and not self.of(operands[1:]) & ALL_LANES:
            return found & ~ALL_LANES
        return found | ALL_LANES if OWN_IN_THREAD.fullmatch(name) else found

    def agreed(self, instruction: Instruction) -> int:
        """Returns the threads that agree on a lane number after this instruction: lane / 8, tid & ~31, tid < 32."""
        number = re.search(r", (-?\d+)(?:,|$)", instruction.text)
        if not self.counted & set(instruction.operands):
            return SAME
        if instruction.opcode in ("zext", "trunc"):
            self.counted.add(instruction.result)
        n = int(number[1]) if number else 0
        bits = {"lshr": n, "udiv": low_zeros(n), "and": low_zeros(n)}.get(instruction.opcode, 0) if number else 0
        comparison = re.search(r"icmp \w*?\s?[us](lt|ge|gt|le) ", instruction.text)
        if comparison:
            bits = low_zeros(n + (comparison[1] in ("gt", "le"))) // SIMD_BITS * SIMD_BITS
        return ALL_LANES if bits >= SIMD_BITS else LANES if bits > 0 else SAME

    def held(self, pointer: str) -> str:
        """Returns the array of the thread's own memory that a pointer leads into, or ""."""
        seen: set[str] = set()
        while pointer not in seen:
            seen.add(pointer)
            by = self.function.definitions.get(pointer)
            if by is None:
                return ""
            if by.opcode == "alloca":
                return pointer
            if by.opcode not in ("getelementptr", "freeze", "select", "phi") or not by.operands:
                return ""
            pointer = next((o for o in by.operands if o in self.function.definitions), "")
        return ""

    @cached_property
    def depends(self) -> dict[str, set[str]]:
        """For each block, the blocks whose branches decide whether it runs."""
        after = post_dominators(self.function)
        found: dict[str, set[str]] = {name: set() for name in self.function.blocks}
        for name, ways in self.function.successors.items():
            for way in ways if len(ways) > 1 else []:
                for block in after[way] - (after[name] - {name}):
                    found[block].add(name)
        return found


def union(sets: Iterable[int]) -> int:
    found = SAME
    for one in sets:
        found |= one
    return found


def low_zeros(n: int) -> int:
    """Counts the zero bits at the end of a number."""
    return (n & -n).bit_length() - 1 if n else 32


def post_dominators(function: Function) -> dict[str, set[str]]:
    """Finds, for each block, the blocks on every way from it to the end, itself included."""
    successors, every = function.successors, set(function.blocks)
    order = list(reversed(list(function.blocks)))
    after = {name: {name} if not successors[name] else every for name in order}
    changed = True
    while changed:
        changed = False
        for name in order:
            if successors[name]:
                new = {name} | set.intersection(*(after[way] for way in successors[name]))
                if new != after[name]:
                    after[name] = new
                    changed = True
    return after


def uniformity_violations(program: Program) -> Iterator[Violation]:
    return kernel_violations("uniformity", program, divided)


def divided(function: Function, attributes: dict[str, str]) -> Iterator[tuple[Instruction, str]]:
    """Yields the calls that need all threads, or all lanes, where some take another way."""
    known = Uniformity(function, attributes)
    for call in function.instructions():
        message = fault_of_call(call, known) if call.called else ""
        if message:
            yield call, message


def fault_of_call(call: Instruction, known: Uniformity) -> str:
    name, apart = call.called, known.block[call.block]
    if name in OF_THREADGROUP and apart:
        return f"{name} in a branch or loop that not all threads of a threadgroup take alike"
    if (OF_SIMDGROUP.fullmatch(name) and apart & ALL_LANES) or (OF_PARTNERS.fullmatch(name) and apart & LANES):
        return f"{name} in a branch or loop that not all lanes of a simdgroup take alike"
    if name.endswith("_broadcast") and known.of(call.operands[1:]) & ALL_LANES:
        return f"{name} from a lane that lanes do not agree on"
    return ""

"""Estimates what a kernel takes of a GPU's core: registers of a thread, and memory of a threadgroup.

Both come from optimised LLVM IR. The memory is exact. The registers are those of the values that live at once, and of
the arrays of a thread: Apple's compiler orders instructions anew, keeps what is the same for all threads elsewhere, and
packs halves. So they are an estimate from above, at most what a thread can have. What a thread has of a cooperative
tensor is not in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

from support.paths import KERNELS

from .clang import METAL_4, NO_WARNING, Program
from .ir import Function, Instruction, functions

SCALAR_BYTES = {
    "i1": 0,
    "i8": 1,
    "i16": 2,
    "half": 2,
    "bfloat": 2,
    "i32": 4,
    "float": 4,
    "i64": 8,
    "double": 8,
    "ptr": 8,
}
MOST = 128  # registers that a thread can have
TYPE = re.compile(
    r'\[\d+ x |<\d+ x |[\]>]|%(?:"[^"]+"|[\w.:-]+)|\b(?:i1|i8|i16|i32|i64|half|bfloat|float|double|ptr)\b|[{}]'
)
STRUCTURE = re.compile(r'^(%(?:"[^"]+"|[\w.:-]+)) = type (\{.*\})$', re.MULTILINE)
GLOBAL = re.compile(r"^@(\S+) = .*addrspace\(3\) global (.*?)(?: zeroinitializer| undef)", re.MULTILINE)
HOST = re.compile(r"^@\S*host_names_function_(\d+) = .* ptr @(\S+),", re.MULTILINE)


class Sizes:
    """Sizes of types, in bytes, as a text of IR names them."""

    def __init__(self, ir: str) -> None:
        self._structures = dict(STRUCTURE.findall(ir))
        self.of = cache(self._of)

    def _of(self, text: str) -> int:
        """Return the bytes of the first type in a text; of "{ a, b }" the sum."""
        factors: list[int] = []
        total, depth = 0, 0
        for found in TYPE.finditer(text):
            word = found[0]
            if word in "{}":
                depth += 1 if word == "{" else -1
            elif word[0] in "[<":
                factors.append(int(re.findall(r"\d+", word)[0]))
            elif word in "]>":
                factors.pop()
            else:
                inner = self._structures.get(word, "")
                total += prod(factors) * (self.of(inner) if inner else SCALAR_BYTES.get(word, 0))
            if depth == 0 and not factors:
                break
        return total

    def result(self, at: Instruction) -> int:
        """Return the bytes of an instruction's result, of a thread's array those that it has room for."""
        if not at.result:
            return 0
        words = at.text.split(f" {at.opcode} ", 1)[-1]
        if at.opcode == "extractvalue":  # one of two elements, of matrices
            return 4
        if at.opcode in ("icmp", "fcmp"):
            return 0
        if " to " in words and at.opcode.endswith(("ext", "trunc", "cast", "toi", "tof", "p")):
            words = words.rpartition(" to ")[2]
        if at.opcode == "getelementptr":
            words = "ptr"
        if at.opcode == "select":
            words = words.partition(", ")[2]
        return self.of(words)


def registers(function: Function, sizes: Sizes) -> int:
    """Count the 32-bit registers of the values that live at once, at the worst place, and of a thread's arrays."""
    nbytes = {at.result: sizes.result(at) for at in function.instructions()}
    arrays = sum(nbytes[at.result] for at in function.instructions() if at.opcode == "alloca")
    nbytes |= {at.result: 0 for at in function.instructions() if at.opcode == "alloca"}
    after = {name: frozenset[str]() for name in function.blocks}
    before = dict(after)
    changed = True
    while changed:
        changed = False
        for name in reversed(function.blocks):
            after[name] = frozenset().union(
                *(_entering(function, before, name, to) for to in function.successors[name])
            )
            live = frozenset(list(_live(function.blocks[name], after[name]))[-1])
            changed |= live != before[name]
            before[name] = live
    worst = max(
        sum(nbytes.get(value, 0) for value in live)
        for name, body in function.blocks.items()
        for live in _live(body, after[name])
    )
    return min(MOST, -(-(worst + arrays) // 4))


def _live(body: list[Instruction], after: frozenset[str]) -> Iterator[set[str]]:
    """Yield the values that live after the last instruction of a block, before it, before the one above, ..."""
    live = set(after)
    yield set(live)
    for at in reversed(body):
        live.discard(at.result)
        if at.opcode != "phi":
            live.update(at.operands)
        yield set(live)


def _entering(function: Function, before: dict[str, frozenset[str]], origin: str, to: str) -> frozenset[str]:
    """Return the values that a block hands to the next one."""
    phis = [at for at in function.blocks[to] if at.opcode == "phi"]
    given = {value[1:] for at in phis for value, block in at.incoming if block == origin and value.startswith("%")}
    return (before[to] - {at.result for at in phis}) | given


def resources(kernels: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return (registers, bytes of threadgroup memory) of each of these kernels that the usual sources have."""
    wanted, found = set(kernels), dict[str, tuple[int, int]]()
    for file in sorted(KERNELS.glob("*.metal")):
        with TemporaryDirectory() as folder:
            program = Program(file, Path(folder), [KERNELS], NO_WARNING, METAL_4)
            names = {str(i): instance.host_name for i, instance in enumerate(program.source.instances)}
            if wanted.isdisjoint(names.values()):
                continue
            ir, _ = program.optimised
            sizes, defined = Sizes(ir), functions(ir)
            memory = [(name, sizes.of(text)) for name, text in GLOBAL.findall(ir)]
            for number, mangled in HOST.findall(ir):
                if names.get(number) in wanted and mangled in defined:
                    own = sum(n for name, n in memory if name.startswith(f"_ZZ{mangled.removeprefix('_Z')}E"))
                    found[names[number]] = (registers(defined[mangled], sizes), own)
    return found

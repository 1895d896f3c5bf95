"""Checks memory that threads share: accesses that are unaligned, loops that wait for others, reads that are too early.

A rule objects only if the optimised IR of a kernel proves the fault. Addresses are sums of a buffer's begin, constants
and multiples of values; the numbers of threads take every value.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from .clang import Program, Violation
from .ir import Function, Instruction
from .uniformity import VARIES
from .walk import kernel_violations

SIZES = {"half": 2, "bfloat": 2, "float": 4, "double": 8, "ptr": 8}
MEM_THREADGROUP = 2  # the bit of mem_flags


@dataclass
class Address:
    """base + constant + the sum of value * factor."""

    base: str
    constant: int = 0
    terms: Counter[str] = field(default_factory=Counter)

    def key(self) -> tuple[int, frozenset[tuple[str, int]]]:
        return self.constant, frozenset(self.terms.items())


def size_of(type_: str) -> int | None:
    """Returns the bytes of a scalar, vector or array type. A vector of three takes the bytes of four."""
    type_ = type_.strip()
    several = re.fullmatch(r"[<\[](\d+) x (.*)[>\]]", type_)
    if several is None:
        return int(type_[1:]) // 8 if re.fullmatch(r"i\d+", type_) else SIZES.get(type_)
    element, n = size_of(several[2]), int(several[1])
    return None if element is None else element * (4 if n == 3 and type_[0] == "<" else n)


GEP = re.compile(
    r"getelementptr (?:\w+ )*?(\[.*?\]|<.*?>|\w+), ptr(?: addrspace\(\d\))? ([%@][^,]+)((?:, i\d+ [^,]+)*)"
)
SCALED = re.compile(r" (shl|mul) (?:\w+ )*?i\d+ %([^,]+), (\d+)")
SUM = re.compile(r" (?:add|or disjoint) (?:\w+ )*?i\d+ %([^,]+), (%?[^,]+)")
WIDER = re.compile(r" (?:zext|sext)(?: nneg)? i\d+ %(\S+) to ")


class Addresses:
    """Splits the addresses of a kernel into base, constant and terms."""

    def __init__(self, function: Function) -> None:
        self.definitions = function.definitions

    def of(self, pointer: str) -> Address:
        """Returns the address of %name or @name."""
        by = self.definitions.get(pointer[1:]) if pointer.startswith("%") else None
        match = GEP.search(by.text) if by is not None and by.opcode == "getelementptr" else None
        if match is None:
            return Address(pointer)
        address = self.of(match[2])
        stride_of = match[1]
        for index in re.findall(r", i\d+ ([^,]+)", match[3]):
            stride = size_of(stride_of)
            if stride is None:
                return Address(pointer)
            self.add(address, index, stride)
            inner = re.fullmatch(r"[<\[]\d+ x (.*)[>\]]", stride_of)
            stride_of = inner[1] if inner else ""
        return address

    def add(self, address: Address, index: str, factor: int) -> None:
        if not index.startswith("%"):
            address.constant += int(index) * factor
            return
        by = self.definitions.get(index[1:])
        if by is not None and (wider := WIDER.search(by.text)):
            self.add(address, "%" + wider[1], factor)
        elif by is not None and (scaled := SCALED.search(by.text)):
            times = int(scaled[3]) if scaled[1] == "mul" else 1 << int(scaled[3])
            self.add(address, "%" + scaled[2], factor * times)
        elif by is not None and (summed := SUM.search(by.text)):
            self.add(address, "%" + summed[1], factor)
            self.add(address, summed[2], factor)
        else:
            address.terms[index[1:]] += factor


def memory_violations(program: Program) -> Iterator[Violation]:
    return kernel_violations("memory", program, misused)


def misused(function: Function, attributes: dict[str, str]) -> Iterator[tuple[Instruction, str]]:
    """Yields unaligned accesses, loops that wait for other threads, and reads that are too early."""
    yield from unaligned(function, attributes)
    yield from waits(function)
    yield from early(function)


# ---- alignment ---------------------------------------------------------------------------------------------------


def unaligned(function: Function, attributes: dict[str, str]) -> Iterator[tuple[Instruction, str]]:
    """Yields accesses to vectors whose address is no multiple of their alignment, for some thread at least."""
    addresses = Addresses(function)
    numbers = {name for name in function.arguments if attributes.get(name) in VARIES}
    for at in function.instructions():
        found = re.search(
            r"(?:load|store) (<[^>]*>)[^%@]*(?:%\S+, )?ptr addrspace\([123]\) ([%@][^,]+), align (\d+)", at.text
        )
        if at.opcode not in ("load", "store") or found is None:
            continue
        align, address = int(found[3]), addresses.of(found[2])
        if address.base.lstrip("%@") not in function.arguments and not address.base.startswith("@"):
            continue
        odd = {name for name, factor in address.terms.items() if factor % align}
        if (odd or address.constant % align) and odd <= numbers:
            yield at, f"a {found[1]} is not aligned to {align} bytes"


# ---- waiting -----------------------------------------------------------------------------------------------------


def waits(function: Function) -> Iterator[tuple[Instruction, str]]:
    """Yields loops that end only when another thread writes, which may never run before."""
    for loop in loops(function):
        calls = [i for name in loop for i in function.blocks[name] if i.opcode == "call" and i.callee]
        loads = [i for i in calls if i.called in ("atomic_load_explicit", "atomic_exchange_explicit")]
        loads += [i for name in loop for i in function.blocks[name] if "load volatile" in i.text and "space(" in i.text]
        if any("compare_exchange" in call.called for call in calls):
            continue
        leaves = any(way not in loop for name in loop for way in function.successors[name])
        if loads and leaves and not ends_otherwise(function, loop):
            yield loads[0], "a loop waits for what another thread writes"


def ends_otherwise(function: Function, loop: frozenset[str]) -> bool:
    """Whether some way out of a loop depends on a count of its own, or on other memory."""
    for name in loop:
        if all(way in loop for way in function.successors[name]):
            continue
        new, seen = list(function.blocks[name][-1].operands), set[str]()
        while new:
            by = function.definitions.get(new.pop())
            if by is None or by.block not in loop or by.result in seen:
                continue
            seen.add(by.result)
            if by.opcode == "phi" or (by.opcode == "call" and not by.called.startswith("atomic_")):
                return True
            if by.opcode != "call":
                new += by.operands
    return False


def reached(function: Function, start: str) -> set[str]:
    """Returns the blocks that may run after a block; the block itself if it lies in a loop."""
    found, new = set[str](), list(function.successors[start])
    while new:
        name = new.pop()
        if name not in found:
            found.add(name)
            new += function.successors[name]
    return found


def loops(function: Function) -> set[frozenset[str]]:
    """Returns each loop as the set of its blocks."""
    after = {name: reached(function, name) for name in function.blocks}
    return {frozenset(b for b in after[a] if a in after[b]) for a in function.blocks if a in after[a]}


# ---- order -------------------------------------------------------------------------------------------------------


def early(function: Function) -> Iterator[tuple[Instruction, str]]:
    """Yields reads of threadgroup memory that another thread wrote, on a way without a barrier."""
    addresses = Addresses(function)
    touched = {
        id(at): addresses.of(found[1])
        for at in function.instructions()
        if at.opcode in ("load", "store") and (found := re.search(r"ptr addrspace\(3\) ([%@][^,]+)", at.text))
    }
    stores = [at for at in function.instructions() if at.opcode == "store" and id(at) in touched]
    own = {(touched[id(at)].base, touched[id(at)].key()) for at in stores}
    for at in stores:
        wrote = touched[id(at)]
        if wrote.base.startswith("@"):
            for read in before_barrier(function, at):
                other = touched.get(id(read))
                is_own = other is None or (other.base, other.key()) in own
                if read.opcode == "load" and other and other.base == wrote.base and not is_own:
                    yield read, f"{wrote.base[1:]} is read where another thread wrote, with no barrier between"
                    break


def is_barrier(at: Instruction) -> bool:
    flags = re.search(r"\(i32 noundef (\d+)\)", at.text)
    return at.called in ("threadgroup_barrier", "simdgroup_barrier") and not (
        flags and not int(flags[1]) & MEM_THREADGROUP
    )


def before_barrier(function: Function, store: Instruction) -> Iterator[Instruction]:
    """Yields the instructions after a store, until a barrier or the next turn of a loop."""
    order = {name: i for i, name in enumerate(function.blocks)}
    body = function.blocks[store.block]
    at = next(i for i, one in enumerate(body) if one is store)
    new, seen = [(store.block, at + 1)], set[str]()
    while new:
        name, begin = new.pop()
        for instruction in function.blocks[name][begin:]:
            if is_barrier(instruction):
                break
            yield instruction
        else:
            ways = [way for way in function.successors[name] if way not in seen and order[way] > order[name]]
            new += [(way, 0) for way in ways]
            seen.update(ways)

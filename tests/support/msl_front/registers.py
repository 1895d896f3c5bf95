"""Arrays that must live in registers: none is indexed by a variable once loops are unrolled.

Registers have no addresses. What stays indexed is what Apple's compiler moves to memory or, if it is a matrix, refuses.
"""

from __future__ import annotations

from collections.abc import Iterator

from .clang import Program, Violation
from .ir import Function, Instruction, Places, functions

ADDRESSES = ("getelementptr", "phi", "select", "freeze")  # what makes a pointer of pointers


def register_violations(program: Program) -> list[Violation]:
    """Loops that do not unroll though they say so, and private arrays that a variable indexes."""
    ir, loops = program.optimised
    places = Places(ir)
    found = set(loops)
    for function in functions(ir).values():
        for array, at in indexed(function):
            message = f"{function.name} indexes %{array.result}, which a thread holds, by a variable"
            found.add(Violation("registers", *places.place(at), message))
    return sorted(found, key=str)


def indexed(function: Function) -> Iterator[tuple[Instruction, Instruction]]:
    """(array, instruction that indexes it) for all that a thread holds."""
    users: dict[str, list[Instruction]] = {}
    for instruction in function.instructions():
        if instruction.opcode in ADDRESSES:
            for operand in instruction.operands:
                users.setdefault(operand, []).append(instruction)
    for array in function.instructions():
        if array.opcode == "alloca":
            yield from ((array, at) for at in derived(array.result, users) if is_variable(at))


def derived(pointer: str, users: dict[str, list[Instruction]]) -> list[Instruction]:
    """The instructions that make a pointer of this one, or of one that was made of it."""
    known: dict[str, Instruction] = {}
    new = [pointer]
    while new:
        for user in users.get(new.pop(), []):
            if user.result not in known:
                known[user.result] = user
                new.append(user.result)
    return list(known.values())


def is_variable(at: Instruction) -> bool:
    """Whether the address depends on more than the pointer: an index, or which way was taken."""
    if at.opcode == "getelementptr":
        return len([name for name in at.operands if not name.startswith(('"struct', "struct", '"class', "class"))]) > 1
    return at.opcode in ("phi", "select")


def matrix_violations(program: Program) -> Iterator[Violation]:
    """Arrays of simdgroup matrices that a variable indexes, which no simdgroup has registers for."""
    if "simdgroup_matrix" not in program.ir:
        return
    ir, _ = program.optimised
    places = Places(ir)
    for function in functions(ir).values():
        for array, at in indexed(function):
            if "simdgroup_matrix" in array.text:
                message = f"{function.name} indexes an array of simdgroup matrices by a variable"
                yield Violation("matrices", *places.place(at), message)

"""Checks arrays that must live in registers: no variable may index one once loops are unrolled.

Registers have no addresses. Apple's compiler moves such an array to memory; of matrices it refuses it.
"""

from __future__ import annotations

from collections.abc import Iterator

from .clang import Program, Violation
from .ir import Function, Instruction, Places, functions

ADDRESSES = ("getelementptr", "phi", "select", "freeze")  # instructions that derive a pointer from pointers


def register_violations(program: Program) -> list[Violation]:
    """Lists loops that do not unroll though they ask for it, and private arrays that a variable indexes."""
    ir, loops = program.optimised
    places = Places(ir)
    found = set(loops)
    for function in functions(ir).values():
        for array, at in indexed(function):
            message = f"{function.name} indexes %{array.result}, which a thread holds, by a variable"
            found.add(Violation("registers", *places.place(at), message))
    return sorted(found, key=str)


def indexed(function: Function) -> Iterator[tuple[Instruction, Instruction]]:
    """Yields (array, instruction that indexes it by a variable) for the arrays of a thread."""
    users: dict[str, list[Instruction]] = {}
    for instruction in function.instructions():
        if instruction.opcode in ADDRESSES:
            for operand in instruction.operands:
                users.setdefault(operand, []).append(instruction)
    for array in function.instructions():
        if array.opcode == "alloca":
            yield from ((array, at) for at in derived(array.result, users) if is_variable(at))


def derived(pointer: str, users: dict[str, list[Instruction]]) -> list[Instruction]:
    """Lists the instructions that derive a pointer from this one, directly or not."""
    known: dict[str, Instruction] = {}
    new = [pointer]
    while new:
        for user in users.get(new.pop(), []):
            if user.result not in known:
                known[user.result] = user
                new.append(user.result)
    return list(known.values())


def is_variable(at: Instruction) -> bool:
    """Whether the address depends on an index, or on the way that was taken."""
    if at.opcode == "getelementptr":
        return len([name for name in at.operands if not name.startswith(('"struct', "struct", '"class', "class"))]) > 1
    return at.opcode in ("phi", "select")


def matrix_violations(program: Program) -> Iterator[Violation]:
    """Yields arrays of simdgroup matrices that a variable indexes: registers cannot hold them."""
    if "simdgroup_matrix" not in program.ir:
        return
    ir, _ = program.optimised
    places = Places(ir)
    for function in functions(ir).values():
        for array, at in indexed(function):
            if "simdgroup_matrix" in array.text:
                message = f"{function.name} indexes an array of simdgroup matrices by a variable"
                yield Violation("matrices", *places.place(at), message)

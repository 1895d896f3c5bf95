"""Walks over the kernels of a program's optimised IR: a check looks at one kernel, and its findings get their place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from .clang import Program, Violation
from .ir import Function, Instruction, Places, functions
from .source import Kernel

#: Takes a kernel and the attribute of each of its arguments; yields instructions that break a rule, with a message.
Check = Callable[[Function, dict[str, str]], Iterable[tuple[Instruction, str]]]


def kernel_violations(rule: str, program: Program, check: Check) -> Iterator[Violation]:
    """Yields what ``check`` finds in each kernel of the program, as violations of the rule."""
    ir, _ = program.optimised
    places = Places(ir)
    for function in functions(ir).values():
        attributes = attributes_of(function, program.source.kernels)
        if attributes is None:
            continue
        for at, message in check(function, attributes):
            yield Violation(rule, *places.place(at), f"{message} ({function.name})")


def attributes_of(function: Function, kernels: list[Kernel]) -> dict[str, str] | None:
    """Returns the attribute of each argument by its name, or None if the function is no kernel."""
    for kernel in kernels:
        names = {re.findall(r"\w+", p.text.partition("[")[0])[-1]: p.attributes for p in kernel.parameters if p.text}
        is_named = re.search(rf"(?<!\d){len(kernel.name)}{kernel.name}", function.name)
        if is_named and len(names) == len(function.arguments):
            return {name: attributes[0] for name, attributes in names.items() if attributes}
    return None

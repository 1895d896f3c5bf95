"""Checks the parts of a kernel that a host sees: names, attributes and arguments."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from .clang import Violation
from .source import Instance, Kernel, Parameter, Source

MAX_BUFFER = 30
VECTOR_IDS = {"uint", "uint2", "uint3", "ushort", "ushort2", "ushort3"}
SCALAR_IDS = {"uint", "ushort"}
# The attributes of a compute kernel's arguments and the types that they may have (MSL specification, "Compute function
# input attributes").
GRID_IDS = {
    "dispatch_quadgroups_per_threadgroup": SCALAR_IDS,
    "dispatch_simdgroups_per_threadgroup": SCALAR_IDS,
    "dispatch_threads_per_threadgroup": VECTOR_IDS,
    "grid_origin": VECTOR_IDS,
    "grid_size": VECTOR_IDS,
    "quadgroup_index_in_threadgroup": SCALAR_IDS,
    "quadgroups_per_threadgroup": SCALAR_IDS,
    "simdgroup_index_in_threadgroup": SCALAR_IDS,
    "simdgroups_per_threadgroup": SCALAR_IDS,
    "thread_execution_width": SCALAR_IDS,
    "thread_index_in_quadgroup": SCALAR_IDS,
    "thread_index_in_simdgroup": SCALAR_IDS,
    "thread_index_in_threadgroup": SCALAR_IDS,
    "thread_position_in_grid": VECTOR_IDS,
    "thread_position_in_threadgroup": VECTOR_IDS,
    "threadgroup_position_in_grid": VECTOR_IDS,
    "threadgroups_per_grid": VECTOR_IDS,
    "threads_per_grid": VECTOR_IDS,
    "threads_per_simdgroup": SCALAR_IDS,
    "threads_per_threadgroup": VECTOR_IDS,
}
# Attributes that stand elsewhere than on an argument. All others are unknown to MSL, or not for compute kernels.
OTHERS = {"kernel", "host_name", "max_total_threads_per_threadgroup", "maybe_unused", "unused", "function_constant"}


def attribute_violations(source: Source) -> Iterator[Violation]:
    for attribute in source.attributes:
        name = attribute.text.partition("(")[0]
        if name not in {"buffer", "threadgroup", *GRID_IDS, *OTHERS}:
            yield Violation("attribute", attribute.file, attribute.line, f"[[{attribute.text}]] is none of a kernel's")


def kernel_violations(kernel: Kernel) -> Iterator[Violation]:
    """Checks that every argument has one legal attribute, and that buffers count 0, 1, 2 … as in the launcher."""

    def broken(rule: str, message: str) -> Violation:
        return Violation(rule, kernel.file, kernel.line, f"kernel {kernel.name}: {message}")

    counts: Counter[str] = Counter()
    buffers: list[int] = []
    for parameter in kernel.parameters:
        if len(parameter.attributes) != 1:
            yield broken("attribute", f"'{parameter.text}' needs one attribute, and has {len(parameter.attributes)}")
            continue
        attribute = parameter.attributes[0]
        buffer = re.fullmatch(r"buffer\((\w+)\)", attribute)
        if buffer is None:
            counts[attribute] += 1
            yield from (broken("attribute", message) for message in grid_id_faults(parameter))
        elif not buffer[1].isdigit() or int(buffer[1]) > MAX_BUFFER:
            yield broken("buffer", f"[[{attribute}]]: the index of a buffer is a number up to {MAX_BUFFER}")
        else:
            buffers.append(int(buffer[1]))
            if not re.match(r"((const|volatile) )*(device|constant)\b.*[*&]", parameter.text):
                yield broken("buffer", f"'{parameter.text}' is no pointer or reference to device or constant memory")
    widths = {p.attributes[0]: width(p) for p in kernel.parameters if len(p.attributes) == 1 and has_width(p)}
    if len(set(widths.values())) > 1:
        said = ", ".join(f"{name} has {n}" for name, n in widths.items())
        yield broken("attribute", f"grid attributes have one number of components: {said}")
    yield from (broken("attribute", f"[[{name}]] stands twice") for name, n in counts.items() if n > 1)
    if buffers != list(range(len(buffers))):
        yield broken("buffer", f"buffers {buffers} are not 0 to {len(buffers) - 1}, in order")


def has_width(parameter: Parameter) -> bool:
    """Whether the attribute's argument may be a vector. In a kernel all of these have the same width."""
    return GRID_IDS.get(parameter.attributes[0]) is VECTOR_IDS


def width(parameter: Parameter) -> int:
    vector = re.search(r"\bu(?:int|short)([234])\b", parameter.text)
    return int(vector[1]) if vector else 1


def grid_id_faults(parameter: Parameter) -> Iterator[str]:
    name = parameter.attributes[0]
    if name not in GRID_IDS:
        yield f"[[{name}]] is no attribute of a kernel's argument"
    elif parameter.text.split()[0] not in GRID_IDS[name]:
        yield f"'{parameter.text}' [[{name}]] is of none of the types {', '.join(sorted(GRID_IDS[name]))}"


def instance_violations(instances: list[Instance], kernels: list[Kernel]) -> Iterator[Violation]:
    """Checks that host names are unique over all files, and name kernels."""
    first: dict[str, Instance] = {}
    known = {kernel.name for kernel in kernels}
    for instance in instances:
        before = first.setdefault(instance.host_name, instance)
        if before is not instance:
            message = f"host_name {instance.host_name!r} is taken by {before.file}:{before.line}"
            yield Violation("host_name", instance.file, instance.line, message)
        if not re.fullmatch(r"[A-Za-z_]\w*", instance.host_name):
            yield Violation("host_name", instance.file, instance.line, f"{instance.host_name!r} is no name")
        if instance.function.partition("<")[0] not in known:
            message = f"{instance.host_name!r} names {instance.function}, which is no kernel"
            yield Violation("host_name", instance.file, instance.line, message)

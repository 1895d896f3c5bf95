"""The layout of structures in memory: by MSL's rules, and by clang."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .clang import Program
from .rules import offset

# Bytes and alignment of scalars (MSL specification, "Size and alignment of scalar data types").
SCALAR_BYTES = {
    "bool": 1, "char": 1, "uchar": 1, "short": 2, "ushort": 2, "half": 2, "bfloat": 2, "int": 4, "uint": 4, "float": 4,
    "long": 8, "ulong": 8,
}  # fmt: skip
TYPE = re.compile(r"(?P<scalar>[a-z]+)(?P<n>[234])?(?P<extents>(?:\[\d+\])*)")
Structures = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Layout:
    size: int
    alignment: int
    offsets: dict[str, int]


def size_and_alignment(type_: str, structures: Structures) -> tuple[int, int]:
    """Returns size and alignment of a scalar, vector, array or structure. A vector of three takes the room of four."""
    if type_ in structures:
        of = by_rules(structures[type_], structures)
        return of.size, of.alignment
    match = TYPE.fullmatch(type_)
    if match is None or match["scalar"] not in SCALAR_BYTES:
        raise ValueError(f"{type_}: no rule for the layout of this type")
    size = SCALAR_BYTES[match["scalar"]] * {None: 1, "2": 2, "3": 4, "4": 4}[match["n"]]
    count = 1
    for extent in re.findall(r"\d+", match["extents"]):
        count *= int(extent)
    return size * count, size


def by_rules(fields: Mapping[str, str], structures: Structures) -> Layout:
    """Places each field at the next multiple of its alignment; the size is a multiple of the largest alignment."""
    at, largest, offsets = 0, 1, {}
    for name, type_ in fields.items():
        size, alignment = size_and_alignment(type_, structures)
        at = -(-at // alignment) * alignment
        offsets[name] = at
        at += size
        largest = max(largest, alignment)
    return Layout(-(-at // largest) * largest, largest, offsets)


def structures(program: Program, header: str) -> dict[str, dict[str, str]]:
    """Reads the fields of each structure that a header defines, in order, with their MSL types."""
    found: dict[str, dict[str, str]] = {}
    aliases: dict[str, str] = {}
    for node in program.tree["inner"]:
        begin = offset(node.get("range", {}).get("begin", {}))
        if begin is None or Path(program.place(begin)[0]).name != header:
            continue
        if node["kind"] == "TypedefDecl":
            aliases[node["name"]] = node["type"]["qualType"]
        if node["kind"] == "CXXRecordDecl" and node.get("completeDefinition"):
            members = [inner for inner in node["inner"] if inner["kind"] == "FieldDecl"]
            found[node["name"]] = {member["name"]: spelled(member, aliases) for member in members}
    return found


def spelled(member: dict[str, Any], aliases: dict[str, str]) -> str:
    name, bracket, extents = str(member["type"]["qualType"]).partition("[")
    return aliases.get(name, name) + bracket + extents


def by_clang(text: str, fields_of: dict[str, dict[str, str]], folder: Path, includes: list[Path]) -> dict[str, Layout]:
    """Returns clang's layouts of the structures of an MSL text."""
    for name, fields in fields_of.items():
        offsets = "".join(f", __builtin_offsetof({name}, {field})" for field in fields)
        text += f"\n__attribute__((used)) constant constexpr ulong layout_{name}[] = "
        text += f"{{sizeof({name}), alignof({name}){offsets}}};"
    path = folder / "layouts.metal"
    path.write_text(text)
    program = Program(path, folder, includes)
    assert program.errors == []
    found = {}
    for name, fields in fields_of.items():
        numbers = re.search(rf"layout_{name} = .*constant \[\d+ x i64\] (?:\[(.*?)\]|zeroinitializer)", program.ir)
        assert numbers is not None, name
        size, alignment, *offsets_ = (int(number) for number in re.findall(r"i64 (\d+)", numbers[1]))
        found[name] = Layout(size, alignment, dict(zip(fields, offsets_, strict=True)))
    return found

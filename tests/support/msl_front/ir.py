"""Reads optimised LLVM IR: functions as blocks of instructions, with their operands and places."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

NAME = r'(?:"[^"]+"|[\w.$-]+)'
DEFINE = re.compile(rf"define [^@]*@({NAME})\((.*)\)[^()]*(?:\([^()]*\)[^()]*)*\{{$")
LABEL = re.compile(rf"({NAME}):")
RESULT = re.compile(rf"  (?:%({NAME}) = )?(?:tail |musttail |notail )?(\w+)")
VALUE = re.compile(rf"%({NAME})")
TARGET = re.compile(rf"label %({NAME})")
INCOMING = re.compile(rf"\[ ([^\[\]]+), %({NAME}) \]")
CALLEE = re.compile(rf"call .*?@({NAME})\(")
METADATA = re.compile(
    r"^(!\d+) = (?:distinct )?!(DILocation|DISubprogram|DILexicalBlock\w*|DIFile)\((.*)\)$", re.MULTILINE
)
FIELD = re.compile(r'(\w+): ("[^"]*"|[^,]+)')


@dataclass
class Instruction:
    text: str
    result: str
    opcode: str
    block: str
    operands: list[str]
    callee: str = ""  # mangled
    incoming: list[tuple[str, str]] = field(default_factory=list)  # for a phi: (value, block it comes from)

    @property
    def called(self) -> str:
        """The plain name of a function of metal:: that is called."""
        name = re.match(r"_ZN5metal(?:L?\d+(?:fast|precise))?(\d+)(.*)", self.callee)
        return name[2][: int(name[1])] if name else ""


@dataclass
class Function:
    name: str
    arguments: list[str]
    blocks: dict[str, list[Instruction]]

    @cached_property
    def definitions(self) -> dict[str, Instruction]:
        return {i.result: i for i in self.instructions() if i.result}

    @cached_property
    def successors(self) -> dict[str, list[str]]:
        return {name: list(dict.fromkeys(TARGET.findall(body[-1].text))) for name, body in self.blocks.items()}

    def instructions(self) -> Iterator[Instruction]:
        for body in self.blocks.values():
            yield from body


def functions(ir: str) -> dict[str, Function]:
    """Reads the functions that a text of IR defines."""
    found: dict[str, Function] = {}
    current: Function | None = None
    block, pending = "", ""
    for line in ir.splitlines():
        if current is None:
            head = DEFINE.match(line) if line.startswith("define") else None
            if head:
                names = [VALUE.findall(part) for part in arguments_of(head[2])]
                current = found[head[1]] = Function(head[1], [n[-1] if n else "" for n in names], {})
                block = ""
        elif line == "}":
            current = None
        elif line.startswith("  "):
            pending += line
            if pending.startswith("  switch") and "]" not in pending:
                continue
            current.blocks.setdefault(block or "entry", []).append(instruction(pending, block or "entry"))
            pending = ""
        elif label := LABEL.match(line):
            block = label[1]
    return found


def arguments_of(text: str) -> list[str]:
    """Splits the arguments of a definition at the commas outside brackets."""
    parts, depth, begin = [], 0, 0
    for at, sign in enumerate(text):
        depth += (sign in "([<{") - (sign in ")]>}")
        if sign == "," and depth == 0:
            parts.append(text[begin:at])
            begin = at + 1
    return [*parts, text[begin:]] if text else []


def instruction(text: str, block: str) -> Instruction:
    head = RESULT.match(text)
    assert head is not None, text
    result, opcode, rest = head[1] or "", head[2], text[head.end() :]
    incoming = [(value.strip(), origin) for value, origin in INCOMING.findall(rest)] if opcode == "phi" else []
    if opcode == "phi":
        operands = [value[1:] for value, _ in incoming if value.startswith("%")]
    else:
        operands = VALUE.findall(TARGET.sub("", rest))
    callee = CALLEE.search(text) if opcode == "call" else None
    return Instruction(text, result, opcode, block, operands, callee[1] if callee else "", incoming)


class Places:
    """Finds the file and line of an instruction."""

    def __init__(self, ir: str) -> None:
        self.nodes: dict[str, dict[str, str]] = {}
        for name, kind, text in METADATA.findall(ir):
            self.nodes[name] = dict(FIELD.findall(text)) | {"kind": kind}

    def place(self, instruction: Instruction) -> tuple[str, int]:
        at = re.search(r"!dbg (!\d+)", instruction.text)
        location = self.nodes.get(at[1], {}) if at else {}
        scope = self.nodes.get(location.get("scope", ""), {})
        while scope and "file" not in scope:
            scope = self.nodes.get(scope.get("scope", ""), {})
        file = self.nodes.get(scope.get("file", ""), {}).get("filename", '""')
        return file.strip('"'), int(location.get("line", "0"))

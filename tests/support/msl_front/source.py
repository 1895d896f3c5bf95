"""Turns MSL into C++ for clang: reads constructs beyond C++ out of the text, or spells them in C++."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from .tokens import SPACES, Token, closing, joined, segments, split, tokenize

FLOAT_LITERAL = re.compile(r"(\d+\.\d*|\.\d+)([eE][+-]?\d+)?|\d+[eE][+-]?\d+")
SCALARS = ("bool", "char", "uchar", "short", "ushort", "int", "uint", "long", "ulong", "half", "bfloat", "float")
HOST = "host_names_function_"  # prefix of variables that keep the instances' functions
INSTANTIATE = "MSL_INSTANTIATE"  # a macro around explicit instantiations: a compiler may skip them
VECTORS = frozenset(f"{scalar}{n}" for scalar in SCALARS for n in (2, 3, 4))


@dataclass
class Attribute:
    text: str  # one attribute, such as "buffer(0)"
    file: str
    line: int


@dataclass
class Parameter:
    text: str  # without attributes
    attributes: list[str]


@dataclass
class Kernel:
    """A kernel function or a template of one."""

    name: str
    parameters: list[Parameter]
    file: str
    line: int


@dataclass
class Instance:
    """An instance that a host can launch: a name and the C++ expression of its function."""

    host_name: str
    function: str
    file: str
    line: int


@dataclass
class Source:
    """A kernel file. ``text`` is C++ for clang; ``tokens`` are the MSL of every file but metal_stdlib."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    attributes: list[Attribute] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    instances: list[Instance] = field(default_factory=list)


def of_group(path: Path, folder: Path) -> Path | None:
    """Writes a short form of a source of a group of types into ``folder``; None if it is no such source.

    Such a source has all kernels of its types, whose texts other sources show. Here it has a few, which read all
    blocks.
    """
    text, every = path.read_text(), '#include "kernels_of_types.h"'
    if every not in text:
        return None
    few = "\n".join(f'#include "{name}.metal"' for name in ("mul_mv", "mul_mm", "embed"))
    (folder / path.name).write_text(text.replace(every, few))
    return folder / path.name


def read(preprocessed: str, standard_folder: str) -> Source:
    """Reads a preprocessed kernel file. Text from ``standard_folder`` is C++ already."""
    source = Source()
    aliases: set[str] = set()
    for file, line, text in segments(preprocessed):
        if file.startswith((standard_folder, "<")):
            source.text += f'# {line} "{file}" 3\n{text}'  # 3: a system header
            continue
        source.text += f'# {line} "{file}"\n'
        tokens = list(tokenize(text, file, line))
        source.tokens += [Token(**vars(token)) for token in tokens]
        aliases |= vector_aliases(tokens)
        find_kernels(tokens, source)
        find_instances(tokens, source)
        take_attributes(tokens, source)
        choose_members(tokens)
        place_threadgroup_memory(tokens)
        spell_array_parameters(tokens)
        suffix_literals(tokens)
        spell_constructors(tokens, aliases)
        spell_casts(tokens, template_types(tokens) - aliases)
        source.text += "".join(token.space + token.text for token in tokens) + "\n"
    for i, instance in enumerate(source.instances):
        source.text += f'# {instance.line} "{instance.file}"\n'
        kept = f"static auto* const {HOST}{i} __attribute__((used)) = &{instance.function};"
        source.text += f"{INSTANTIATE}({kept})\n"
    return source


def drop(tokens: list[Token], begin: int, end: int) -> None:
    for i in range(begin, end):
        tokens[i].text = ""
    compact(tokens)


def compact(tokens: list[Token]) -> None:
    """Gives the blanks of removed tokens to the next token, so that line numbers stay."""
    kept: list[Token] = []
    space = ""
    for token in tokens:
        if token.text:
            token.space = space + token.space
            space = ""
            kept.append(token)
        else:
            space += token.space
    tokens[:] = kept


def is_attribute(tokens: list[Token], i: int) -> bool:
    return tokens[i].text == "[" and i + 1 < len(tokens) and tokens[i + 1].text == "[" and tokens[i + 1].space == ""


def split_attributes(tokens: list[Token]) -> tuple[list[Token], list[list[Token]]]:
    """Splits tokens into those outside attributes and those of each attribute."""
    plain: list[Token] = []
    attributes: list[list[Token]] = []
    i = 0
    while i < len(tokens):
        if is_attribute(tokens, i):
            end = closing(tokens, i)
            attributes += split(tokens[i + 2 : end - 1])
            i = end + 1
        else:
            plain.append(tokens[i])
            i += 1
    return plain, attributes


# ---- what the host sees ------------------------------------------------------------------------------------------


def find_kernels(tokens: list[Token], source: Source) -> None:
    for i, token in enumerate(tokens):
        if token.text != "kernel":
            continue
        rest = tokens[i + 1 :]
        while rest and rest[0].text == "]":
            rest = rest[1:]
        if not rest or rest[0].text != "void":
            continue
        open_ = next(j for j, t in enumerate(rest) if t.text == "(")
        name = rest[open_ - 1]
        parameters = []
        for part in split(rest[open_ + 1 : closing(rest, open_)]):
            plain, attributes = split_attributes(part)
            parameters.append(Parameter(joined(plain), [joined(a) for a in attributes]))
        source.kernels.append(Kernel(name.text, parameters, name.file, name.line))


def statement_end(tokens: list[Token], at: int) -> int:
    while tokens[at].text != ";":
        at = closing(tokens, at) + 1 if tokens[at].text in ("(", "[", "{") else at + 1
    return at


def find_instances(tokens: list[Token], source: Source) -> None:
    """Finds the explicit instantiations with a host_name."""
    for i, token in enumerate(tokens):
        if token.text == "host_name" and tokens[i + 1].text == "(" and tokens[i - 3].text == "template":
            name = "".join(t.text[1:-1] for t in tokens[i + 2 : closing(tokens, i + 1)])
            end = statement_end(tokens, i - 2)
            function = instantiated_function(tokens[i - 2 : end])
            source.instances.append(Instance(name, function, token.file, token.line))
            tokens[i - 3].text, tokens[end].text = f"{INSTANTIATE}(template", ";)"


def instantiated_function(declaration: list[Token]) -> str:
    """Returns ``f<...>`` of ``[[...]] decltype(f<...>) f<...>``, or of an instantiation by type."""
    plain, _ = split_attributes(declaration)
    if plain and plain[0].text == "decltype":
        return joined(plain[closing(plain, 1) + 1 :])
    open_ = next((j for j, t in enumerate(plain) if t.text == "<"), 1)
    return joined(plain[max(open_ - 1, 0) : closing(plain, open_) + 1]) if open_ < len(plain) else ""


# ---- what C++ does not have --------------------------------------------------------------------------------------


def take_attributes(tokens: list[Token], source: Source) -> None:
    """Removes every [[...]]. A function constant, whose value the host gives, gets a value."""
    i = 0
    while i < len(tokens):
        if not is_attribute(tokens, i):
            i += 1
            continue
        end = closing(tokens, i) + 1
        own = [joined(part) for part in split(tokens[i + 2 : end - 2])]
        source.attributes += [Attribute(text, tokens[i].file, tokens[i].line) for text in own]
        if own and own[0].startswith("function_constant") and tokens[end].text == ";":
            tokens[end].text = " = {};"
        if own == ["kernel"] and tokens[end].text == "void" and not is_instantiation(tokens, i):
            tokens[end].text = "kernel void"
        for token in tokens[i:end]:
            token.text = ""
        i = end
    compact(tokens)


def is_instantiation(tokens: list[Token], at: int) -> bool:
    """Whether the word before the removed attributes at ``at`` is `template`."""
    before = next((token.text for token in reversed(tokens[:at]) if token.text), "")
    return before.endswith("template")


def choose_members(tokens: list[Token]) -> None:
    """Keeps the members for `thread` objects, and removes those for other address spaces, which C++ does not know."""
    i = 0
    while i + 2 < len(tokens):
        i += 1
        space = i + 1 if tokens[i].text == "const" and tokens[i - 1].text == ")" else i
        if tokens[space - 1].text not in (")", "const") or tokens[space].text not in SPACES:
            continue
        if tokens[space - 1].text == "const" and tokens[space - 2].text != ")":
            continue
        if tokens[space + 1].text not in ("{", ":", ";", "noexcept"):
            continue
        if tokens[space].text == "thread":
            drop(tokens, space, space + 1)
            continue
        begin = space
        while tokens[begin - 1].text not in ("{", "}", ";", ":"):
            begin -= 1
        body = space + 1
        while tokens[body].text not in ("{", ";"):
            body += 1
        end = closing(tokens, body) + 1 if tokens[body].text == "{" else body + 1
        drop(tokens, begin, end)
        i = max(begin - 2, 0)


def place_threadgroup_memory(tokens: list[Token]) -> None:
    """Makes `threadgroup T name[n];` in a function static: C++ has no other variable there in an address space."""
    for i, token in enumerate(tokens):
        if token.text != "threadgroup" or (i > 0 and tokens[i - 1].text not in (";", "{", "}")):
            continue
        end = statement_end(tokens, i)
        declared = tokens[i + 1 : end]
        if not declared or any(t.text in ("*", "&", "=", "(", ",") for t in outside_angles(declared)):
            continue
        extents = [j for j, t in enumerate(declared) if t.text == "[" and angle_depth(declared, j) == 0]
        last = extents[0] if extents else len(declared)
        name, extent, kind = declared[last - 1].text, joined(declared[last:]), joined(declared[: last - 1])
        for t in declared:
            t.text = ""
        bytes_ = f"threadgroup_{name}"
        # No constructor runs there: MSL refuses a type whose constructor is for objects of a thread.
        token.text = (
            f'static_assert(__is_trivially_constructible({kind}), "{name} has a constructor, for `thread` alone"); '
            f"alignas(16) static threadgroup unsigned char {bytes_}[sizeof({kind}{extent})]; "
            f"threadgroup {kind} (&{name}){extent} = *(threadgroup {kind} (*){extent}){bytes_}"
        )
    compact(tokens)


def spell_array_parameters(tokens: list[Token]) -> None:
    """Makes the parameter `constant T name[n]` a pointer to elements in its address space."""
    for i, token in enumerate(tokens):
        if token.text != "[" or i < 2 or tokens[i - 1].kind != "word":
            continue
        end = closing(tokens, i)
        begin = i - 1
        while begin > 0 and (tokens[begin - 1].kind == "word" or tokens[begin - 1].text in ("::", "<", ">")):
            begin -= 1
        is_parameter = tokens[begin - 1].text in ("(", ",") and tokens[end + 1].text in (")", ",")
        if is_parameter and any(t.text in SPACES for t in tokens[begin : i - 1]):
            tokens[i - 1].text = "*" + tokens[i - 1].text
            for t in tokens[i : end + 1]:
                t.text = ""
    compact(tokens)


def angle_depth(tokens: list[Token], end: int) -> int:
    return sum((t.text == "<") - (t.text == ">") for t in tokens[:end])


def outside_angles(tokens: list[Token]) -> list[Token]:
    """Yields the tokens outside <> and []."""
    out: list[Token] = []
    depth = 0
    for token in tokens:
        depth += token.text in ("<", "[")
        if depth == 0:
            out.append(token)
        depth -= token.text in (">", "]")
    return out


def suffix_literals(tokens: list[Token]) -> None:
    """Adds suffixes: 1.5 is a float in MSL, and 1.5h a half."""
    for token in tokens:
        if token.kind != "number":
            continue
        if FLOAT_LITERAL.fullmatch(token.text):
            token.text += "f"
        elif token.text[-1] in "hH" and FLOAT_LITERAL.fullmatch(token.text[:-1]):
            token.text = f"half({token.text[:-1]}f)"


def vector_aliases(tokens: list[Token]) -> set[str]:
    """Finds the names that the text gives to vector types."""
    names: set[str] = set()
    for i, token in enumerate(tokens):
        if token.text == "using" and i + 3 < len(tokens) and tokens[i + 2].text == "=":
            target = tokens[i + 3 : statement_end(tokens, i)]
            if is_vector(target, names):
                names.add(tokens[i + 1].text)
        if token.text == "typedef":
            declared = tokens[i + 1 : statement_end(tokens, i)]
            if is_vector(declared[:-1], names):
                names.add(declared[-1].text)
    return names


def is_vector(spelled: list[Token], aliases: set[str]) -> bool:
    words = [t.text for t in spelled if t.text not in ("metal", "::", "const", "typename")]
    if not words:
        return False
    return (len(words) == 1 and words[0] in VECTORS | aliases) or (words[0] == "vec" and words[-1] == ">")


def spell_constructors(tokens: list[Token], aliases: set[str]) -> None:
    """Turns V(a, b) into make<V>(a, b) and (V)x into Cast<V>{} ->* x, for the vector types V in the text."""
    for i, token in enumerate(tokens):
        if token.text not in VECTORS | aliases | {"vec"}:
            continue
        end = closing(tokens, i + 1) if i + 1 < len(tokens) and tokens[i + 1].text == "<" else i
        if end + 1 >= len(tokens) or (token.text == "vec" and end == i):
            continue
        begin = qualified_from(tokens, i)
        before, after = tokens[begin - 1].text if begin else "", tokens[end + 1].text
        if after == "(" and before not in ("operator", "struct") and not begins_declarator(tokens, end + 1):
            tokens[begin].text = "::metal::make<" + tokens[begin].text
            tokens[end].text += ">"
        elif before == "(" and after == ")" and is_cast(tokens, begin - 1, end + 1):
            tokens[begin - 1].text, tokens[end + 1].text = "::metal::Cast<", ">{} ->* "


def qualified_from(tokens: list[Token], i: int) -> int:
    """Returns the first token of a qualified name of metal::."""
    if i < 2 or tokens[i - 1].text != "::":
        return i
    if tokens[i - 2].text == "metal":
        return i - 2
    return i if tokens[i - 2].kind == "word" and tokens[i - 2].text != "return" else i - 1


def template_types(tokens: list[Token]) -> set[str]:
    """Finds the type parameters of templates."""
    names: set[str] = set()
    for i, token in enumerate(tokens):
        if token.text == "template" and tokens[i + 1].text == "<":
            parameters = split(tokens[i + 2 : closing(tokens, i + 1)])
            names |= {p[1].text for p in parameters if len(p) > 1 and p[0].text in ("class", "typename")}
    return names


def spell_casts(tokens: list[Token], types: set[str]) -> None:
    """Spells (T)x where T is a template's parameter, which may be a vector type."""
    for i in range(2, len(tokens) - 2):
        is_alone = tokens[i - 1].text == "(" and tokens[i + 1].text == ")"
        if tokens[i].text in types and is_alone and is_cast(tokens, i - 1, i + 1):
            tokens[i - 1].text, tokens[i + 1].text = "::metal::Cast<", ">{} ->* "


def begins_declarator(tokens: list[Token], open_: int) -> bool:
    """Whether the parenthesis declares, as in `float4 (*name)` and `float4 (&name)`, and does not construct."""
    return tokens[open_].space != "" and tokens[open_ + 1].text in ("*", "&")


def is_cast(tokens: list[Token], open_: int, close: int) -> bool:
    before, after = tokens[open_ - 1], tokens[close + 1]
    if before.kind == "word" and before.text != "return":
        return False
    return before.text not in (")", "]", ">") and (after.kind in ("word", "number") or after.text in ("(", "*", "-"))

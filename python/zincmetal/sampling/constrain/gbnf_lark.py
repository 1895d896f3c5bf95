"""Writes a grammar in GBNF in llguidance's Lark, so that it means the same texts.

GBNF goes by characters. Lark goes by lexemes, each of which takes as many characters as it can: ``("a" | "ab") "b"``
would not allow "ab". So a grammar that goes round in a circle has a lexeme for each character. One without a circle is
a regular expression: then the whole answer is one lexeme, and masks are faster.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import UsageError
from .gbnf import LAST_CHARACTER, Characters, Choice, Node, Reference, Repeated, Sequence, Token, parsed, references

MOST_RULES = 5000


def lark_of(text: str) -> str:
    """Return the grammar in Lark. Raises UsageError for what is wrong, or has no equivalent."""
    rules = parsed(text)
    if len(rules) > MOST_RULES:
        raise UsageError(f"grammar: {len(rules):,} rules are more than {MOST_RULES:,}")
    used = _used(rules)
    whole = _is_regular(rules, used)
    names = {name: f"T{i}" if whole else f"r{i}" for i, name in enumerate(used)}
    lines = [f"start: {names['root']}", *(f"{names[name]}: {_written(rules[name], names)}" for name in used)]
    return "\n".join(lines) + "\n"


def _used(rules: Mapping[str, Node]) -> list[str]:
    """Return the names of the rules that the root needs, the root first."""
    found, left = dict[str, None](), ["root"]
    while left:
        name = left.pop()
        if name not in found:
            found[name] = None
            left += references(rules[name])
    return list(found)


def _is_regular(rules: Mapping[str, Node], used: list[str]) -> bool:
    """Return True if no rule needs itself, and none has a token."""
    if any(_has_token(rules[name]) for name in used):
        return False
    needs = {name: set(references(rules[name])) for name in used}
    done = set[str]()
    while len(done) < len(needs):
        ready = [name for name in needs if name not in done and needs[name] <= done]
        if not ready:
            return False
        done.update(ready)
    return True


def _has_token(node: Node) -> bool:
    if isinstance(node, (Sequence, Choice)):
        return any(map(_has_token, node.items))
    return _has_token(node.item) if isinstance(node, Repeated) else isinstance(node, Token)


def _written(node: Node, names: Mapping[str, str]) -> str:
    """Write a tree as an expression of Lark."""
    if isinstance(node, Reference):
        return names[node.name]
    if isinstance(node, Token):
        return node.text
    if isinstance(node, Characters):
        return f"/{_class(node)}/"
    if isinstance(node, Choice):
        return " | ".join(_within(item, names) for item in node.items)
    if isinstance(node, Sequence):
        return " ".join(_within(item, names) for item in node.items) or '""'
    return _within(node.item, names) + _bounds(node)


def _within(node: Node, names: Mapping[str, str]) -> str:
    """Write a tree as a part of an expression."""
    written = _written(node, names)
    return f"({written})" if isinstance(node, (Choice, Sequence, Repeated)) else written


def _bounds(node: Repeated) -> str:
    short = {(0, None): "*", (1, None): "+", (0, 1): "?"}.get((node.least, node.most))
    return short or f"{{{node.least},{'' if node.most is None else node.most}}}"


def _class(node: Characters) -> str:
    if node.negated and not node.ranges:
        return "(?s:.)"
    if node.negated and (0, LAST_CHARACTER) in node.ranges:
        raise UsageError("grammar: a class allows no character")
    return f"[{'^' * node.negated}{''.join(f'{_code(a)}-{_code(b)}' if a < b else _code(a) for a, b in node.ranges)}]"


def _code(code: int) -> str:
    return chr(code) if chr(code).isascii() and chr(code).isalnum() else rf"\x{{{code:x}}}"

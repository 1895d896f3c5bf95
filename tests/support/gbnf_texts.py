"""Grammars in GBNF as people write them, and a recogniser that goes through texts by their definition."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import cached_property

from zincmetal.sampling.constrain.gbnf import (
    Characters,
    Choice,
    Node,
    Reference,
    Repeated,
    Sequence,
    parsed,
)

ARITHMETIC = r"""
root  ::= (expr "=" ws term "\n")+
expr  ::= term ([-+*/] term)*
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t\n]*
"""
CHESS = r"""
# A game: each line has the moves of both sides.
root ::= (
    "1. " move " " move "\n"

    # one or two digits
    ([1-9] [0-9]? ". " move " " move "\n")+
)
move    ::= (pawn | nonpawn | castle) [+#]?
pawn    ::= ([a-h] "x")? [a-h] [1-8] ("=" [NBKQR])?
nonpawn ::= [NBKQR] [a-h]? [1-8]? "x"? [a-h] [1-8]
castle  ::= "O-O" "-O"?
"""
JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
# Optional space: by convention, applied in this grammar after literal chars when allowed
ws ::= | " " | "\n" [ \t]{0,20}
"""
LIST = r"""
root ::= item+
# Excludes various line break characters
item ::= "- " [^\r\n\x0b\x0c\x85\u2028\u2029]+ "\n"
"""
KANA = r"""
root   ::= jp-char+ ([ \t\n] jp-char+)*
jp-char ::= hiragana | katakana | punctuation
hiragana ::= [ぁ-ゟ]
katakana ::= [ァ-ヿ]
punctuation ::= [、-〾]
"""
C_LIKE = r"""
root ::= declaration*
declaration ::= dataType identifier "(" parameter? ")" "{" statement* "}"
dataType ::= "int" ws | "char" ws
identifier ::= [a-zA-Z_] [a-zA-Z_0-9]*
parameter ::= dataType identifier
statement ::= identifier ws "=" ws expression ";" |
  "return" ws expression ";" |
  "while" "(" expression ")" "{" statement* "}"
expression ::= term (("+" | "-") term)*
term ::= unary | identifier | number | "(" expression ")"
unary ::= "-" term
number ::= [0-9]+
ws ::= ([ \t\n]+)
"""
AMBIGUOUS = r"""
root ::= ("a" | "ab") ("bc" | "c") tail
tail ::= "x" tail "y" | ([a-z] "1" | "z2")?
"""
GRAMMARS = {
    "arithmetic": ARITHMETIC,
    "chess": CHESS,
    "json": JSON,
    "list": LIST,
    "kana": KANA,
    "c": C_LIKE,
    "ambiguous": AMBIGUOUS,
}
ODD = 'a1" \n\\{}[]():,-+=x0é日あ'


class Recogniser:
    """Says whether a grammar allows a text, by trying all ways through it; and makes texts that it allows."""

    def __init__(self, text: str, seed: int = 0) -> None:
        self.rules: Mapping[str, Node] = parsed(text)
        self._random = random.Random(seed)

    def allows(self, text: str) -> bool:
        return len(text) in _Ends(self.rules, text).of(Reference("root"), 0)

    def made(self, depth: int = 9) -> str:
        """A text that it allows; deeper than ``depth`` it takes the shortest way."""
        return self._made(Reference("root"), depth)

    def changed(self, text: str) -> str:
        """A text with a character more, less or another."""
        at, new = self._random.randrange(len(text) + 1), self._random.choice(ODD + text)
        kind = self._random.randrange(3)
        return text[:at] + (new if kind else "") + text[at + (kind != 2) :]

    def _made(self, node: Node, depth: int) -> str:
        rng = self._random
        if isinstance(node, Characters):
            return chr(self._character(node))
        if isinstance(node, Reference):
            return self._made(self.rules[node.name], depth - 1)
        if isinstance(node, Choice):
            least = min(self._costs[id(item)] for item in node.items)
            cheap = [item for item in node.items if self._costs[id(item)] == least]
            return self._made(rng.choice(cheap if depth < 0 else node.items), depth)
        if isinstance(node, Repeated):
            most = node.least + 3 if node.most is None else node.most
            n = node.least if depth < 0 else rng.randint(node.least, min(most, node.least + 3))
            return "".join(self._made(node.item, depth) for _ in range(n))
        assert isinstance(node, Sequence)
        return "".join(self._made(item, depth) for item in node.items)

    def _character(self, node: Characters) -> int:
        if not node.negated:
            return self._random.randint(*self._random.choice(node.ranges))
        codes = [ord(c) for c in ODD]
        return self._random.choice([code for code in codes if not any(a <= code <= b for a, b in node.ranges)])

    @cached_property
    def _costs(self) -> dict[int, int]:
        """How deep the least deep text of each tree goes through rules."""
        costs, found = dict.fromkeys(self.rules, 10**6), dict[int, int]()

        def cost(node: Node) -> int:
            if isinstance(node, Reference):
                made = costs[node.name] + 1
            elif isinstance(node, Choice):
                made = min(map(cost, node.items))
            elif isinstance(node, Sequence):
                made = max(map(cost, node.items), default=0)
            else:
                made = cost(node.item) if isinstance(node, Repeated) and node.least else 0
            if isinstance(node, Repeated):
                cost(node.item)
            found[id(node)] = made
            return made

        for _ in range(len(self.rules) + 1):
            costs.update({name: cost(node) for name, node in self.rules.items()})
        return found


class _Ends:
    """Where each tree can end in a text from each place on. Rules are tried until nothing new is found."""

    def __init__(self, rules: Mapping[str, Node], text: str) -> None:
        self._rules, self._text = rules, text
        self._known: dict[tuple[str, int], set[int]] = {}
        self._grew = False

    def of(self, node: Node, at: int) -> set[int]:
        while True:
            self._grew, self._open = False, set[tuple[str, int]]()
            found = self._of(node, at)
            if not self._grew:
                return found

    def _of(self, node: Node, at: int) -> set[int]:
        if isinstance(node, Characters):
            inside = at < len(self._text) and any(a <= ord(self._text[at]) <= b for a, b in node.ranges)
            return {at + 1} if at < len(self._text) and inside != node.negated else set()
        if isinstance(node, Reference):
            return self._of_rule(node.name, at)
        if isinstance(node, Choice):
            return {end for item in node.items for end in self._of(item, at)}
        if isinstance(node, Sequence):
            ends = {at}
            for item in node.items:
                ends = {end for begin in ends for end in self._of(item, begin)}
            return ends
        assert isinstance(node, Repeated)
        ends = {at}
        for _ in range(node.least):
            ends = {end for begin in ends for end in self._of(node.item, begin)}
        all_ends, n = set(ends), node.least
        while ends and (node.most is None or n < node.most):
            ends = {end for begin in ends for end in self._of(node.item, begin)} - all_ends
            all_ends |= ends
            n += 1
        return all_ends

    def _of_rule(self, name: str, at: int) -> set[int]:
        key = name, at
        known = self._known.setdefault(key, set())
        if key not in self._open:
            self._open.add(key)
            new = self._of(self._rules[name], at) - known
            if new:
                known |= new
                self._grew = True
        return set(known)

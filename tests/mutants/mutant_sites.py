"""Finds the sites of mutants in a kernel's source: barriers and bounds. Each can be made wrong at run time.

In a copy of the source the bound ``p.n`` of ``i < p.n`` reads ``moved<7>(p.n)``. That is p.n unless a mutant of site 7
is live. A barrier is skipped if its mutant is live. So one build holds all mutants.

Sites are: every barrier; the right side of every comparison between integers; the limits given to min, max and clamp;
counts rounded up, (n + tile - 1) / tile. No sites are: compile-time constants (the preprocessor, static_assert,
constexpr, template arguments), and comparisons of floats. Only the compiler can tell floats: such a site is in the
copy, but not in the build's own list.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

_TOKEN = re.compile(
    r"(?P<comment>//[^\n]*|/\*.*?\*/)|(?P<directive>^[ \t]*#(?:[^\n]*\\\n)*[^\n]*)|(?P<string>\"[^\"\n]*\")|"
    r"\w+|::|<<=|>>=|<<|(?<= )>>(?= )|<=|>=|==|!=|&&|\|\||->|\+\+|--|\S",
    re.S | re.M,
)
_COMPARISONS = {"<", ">", "<=", ">=", "==", "!="}
_ENDS_OPERAND = {*_COMPARISONS, "&&", "||", ";", ")", "]", "}", ",", "?", ":", "&", "|", "^", "="}
_CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}
_BARRIERS = ("threadgroup_barrier", "simdgroup_barrier")


@dataclass(frozen=True)
class Mutant:
    """One change of a source: ``text`` is the line, ``change`` its new form, ``number`` selects it in the build."""

    number: int
    file: str
    line: int
    text: str
    change: str

    @property
    def site(self) -> int:
        return self.number // 2


class Source:
    """A kernel source, its sites numbered from ``first_site``."""

    def __init__(self, name: str, text: str, first_site: int) -> None:
        self.name, self.text, self.n_sites = name, text, 0
        self.mutants: list[Mutant] = []
        self.n_constant = 0
        self._first_site = first_site
        self._inserts: list[tuple[int, int, str]] = []  # position, order there, text
        self._seen: Counter[str] = Counter()
        matches = [m for m in _TOKEN.finditer(text) if not m["comment"]]
        self._n_directive = sum(_n_comparisons(m.group()) for m in matches if m["directive"])
        self._matches = [m for m in matches if not m["directive"]]
        self._tokens = [self._bracket(m) for m in self._matches]
        self._closed_by = self._pair()
        self._constant = self._constant_ranges()
        self._find()

    # ---- tokens

    def _bracket(self, m: re.Match[str]) -> str:
        """Returns the token; marks a < or > that brackets template arguments: clang-format sets it close."""
        token = m.group()
        if token not in "<>":
            return token
        spaced = self.text[m.start() - 1].isspace() and self.text[m.end()].isspace()
        return token if spaced else f"template{token}"

    def _pair(self) -> dict[int, int]:
        """Finds the closing bracket of every opening one."""
        closed_by, open_brackets = {}, []
        for i, token in enumerate(self._tokens):
            if token in ("(", "[", "{", "template<"):
                open_brackets.append(i)
            elif token in (")", "]", "}", "template>"):
                closed_by[open_brackets.pop()] = i
        assert not open_brackets, f"{self.name}: brackets do not match"
        return closed_by

    def _constant_ranges(self) -> list[range]:
        """Finds the tokens that only the compiler evaluates."""
        ranges = []
        for i, token in enumerate(self._tokens):
            if token == "static_assert" or token == "template<":
                ranges.append(range(i, self._closed_by[i + (token == "static_assert")]))
            elif token == "constexpr":
                ranges.append(range(i, self._tokens.index(";", i)))
        return ranges

    def _is_constant(self, i: int) -> bool:
        return any(i in r for r in self._constant)

    def _operand_end(self, i: int) -> int:
        """Returns the token after the comparison's operand that begins with token i."""
        while self._tokens[i] not in _ENDS_OPERAND:
            i = self._closed_by.get(i, i) + 1
        return i

    def _primary_end(self, i: int) -> int:
        """Returns the token after the name, call or parenthesis that begins with token i."""
        i = self._closed_by.get(i, i) + 1
        while self._tokens[i] in ("::", ".", "(", "[", "template<"):
            i = self._closed_by.get(i, i + 1) + 1
        return i

    def _arguments(self, i: int) -> list[tuple[int, int]]:
        """Returns the token ranges of the arguments in the bracket that token i opens."""
        end, begin, found = self._closed_by[i], i + 1, []
        j = begin
        while j < end:
            if self._tokens[j] == ",":
                found.append((begin, j))
                begin = j + 1
            j = self._closed_by.get(j, j) + 1
        return [*found, (begin, end)]

    # ---- sites

    def _find(self) -> None:
        self.n_constant = self._n_directive
        for i, token in enumerate(self._tokens):
            following = self._tokens[i + 1] if i + 1 < len(self._tokens) else ""
            if token in _COMPARISONS:
                self._add_bound(i, i + 1, self._operand_end(i + 1), f"{token} {{}}")
            elif token in ("min", "max", "clamp") and following == "(":
                arguments = self._arguments(i + 1)
                for n, (begin, end) in enumerate(arguments):
                    places = ", ".join("{}" if j == n else ".." for j in range(len(arguments)))
                    self._add_bound(i, begin, end, f"{token}({places})")
            elif token == "/" and self._tokens[i - 3 : i] == ["-", "1", ")"]:
                begin = next(o for o, c in self._closed_by.items() if c == i - 1)
                self._add_bound(i, begin, self._primary_end(i + 1), "{}")
            elif token in _BARRIERS and following == "(":
                self._add_barrier(i)

    def _add_bound(self, i: int, begin: int, end: int, change: str) -> None:
        """Adds a site at the tokens [begin, end), which stand for {} in ``change``. Token i made it a site."""
        if self._is_constant(i):
            self.n_constant += 1
            return
        site = self._new_site()
        start, stop = self._matches[begin].start(), self._matches[end - 1].end()
        # If several sites begin at one token, the widest is outermost; if several end, it is last.
        self._inserts.append((start, -stop, f"::zinc_mutants::moved<{site}>("))
        self._inserts.append((stop, stop - start, ")"))
        operand = " ".join(self.text[start:stop].split())
        for number, by in ((2 * site, "+ 1"), (2 * site + 1, "- 1")):
            self._add_mutant(number, i, change.replace("{}", f"{operand} {by}"))

    def _add_barrier(self, i: int) -> None:
        site = self._new_site()
        start = self._matches[i].start()
        self._inserts.append((start, 0, f"if (!::zinc_mutants::deleted<{site}>()) "))
        self._add_mutant(2 * site, i, "deleted")

    def _new_site(self) -> int:
        self.n_sites += 1
        return self._first_site + self.n_sites - 1

    def _add_mutant(self, number: int, i: int, change: str) -> None:
        at = self._matches[i].start()
        line = self.text.count("\n", 0, at) + 1
        text = self.text.splitlines()[line - 1].split("//")[0].strip()
        self._seen[text + change] += 1
        if self._seen[text + change] > 1:  # the same line again, further down
            change += f" (#{self._seen[text + change]})"
        self.mutants.append(Mutant(number, self.name, line, text, change))

    # ---- the copy

    def mutated(self) -> str:
        """Returns the source with a switch at every site."""
        out, at = [f'#include "mutants.h"\n#line 1 "{self.name}"\n'], 0
        for position, _, inserted in sorted(self._inserts):
            out += [self.text[at:position], inserted]
            at = position
        return "".join([*out, self.text[at:]])


def _n_comparisons(text: str) -> int:
    return len(re.findall(r" (?:[<>]=?|[=!]=) ", text))


HEADER = """\
// Written by tests/mutants/mutants.py.
#pragma once
#include <type_traits>
extern "C" {
void zinc_mutant_site(int site);
int zinc_mutant_moves(int site);
}
namespace zinc_mutants {
template <int site>
struct Known {
    static const int in_build;
};
template <int site>
const int Known<site>::in_build = (zinc_mutant_site(site), 0);

#ifdef ZINC_CHECKED
template <int site, class T>
__attribute__((always_inline)) inline auto moved(T x) {
    if constexpr (std::is_enum_v<T>) return moved<site>(std::underlying_type_t<T>(x));
    else if constexpr (std::is_integral_v<T> && !std::is_same_v<T, bool>) {
        (void)&Known<site>::in_build;
        return T(x + T(zinc_mutant_moves(site)));
    } else return x;
}
template <int site>
__attribute__((always_inline)) inline bool deleted() {
    (void)&Known<site>::in_build;
    return zinc_mutant_moves(site) != 0;
}
#else
template <int site, class T>
inline T moved(T x) { return x; }
template <int site>
inline bool deleted() { return false; }
#endif
}  // namespace zinc_mutants
"""

#: The state in the build: the live mutant's number; for every site flags, 1: it is built, 2: it was reached.
RUNTIME = """\
// Written by tests/mutants/mutants.py.
#include "mutants.h"
#include <cstdlib>
#define EXPORTED __attribute__((visibility("default"), used))
#define UNCHECKED __attribute__((no_sanitize("thread"), noinline))
extern "C" {
EXPORTED UNCHECKED unsigned char zinc_mutant_sites[%(n_sites)d];
EXPORTED int zinc_mutant = getenv("ZINCMETAL_MUTANT") ? atoi(getenv("ZINCMETAL_MUTANT")) : -1;
UNCHECKED void zinc_mutant_site(int site) { zinc_mutant_sites[site] |= 1; }
UNCHECKED int zinc_mutant_moves(int site) {
    zinc_mutant_sites[site] |= 2;
    return zinc_mutant == 2 * site ? 1 : zinc_mutant == 2 * site + 1 ? -1 : 0;
}
}
"""

"""Grammars in GBNF: what a grammar allows is what its Lark allows, character by character."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from support.constrain_lab import Walker, bytes_vocabulary
from support.gbnf_texts import GRAMMARS, JSON, Recogniser
from zincmetal.errors import UsageError
from zincmetal.sampling.constrain.compiler import Compiler
from zincmetal.sampling.constrain.gbnf import is_gbnf
from zincmetal.sampling.constrain.gbnf_lark import lark_of
from zincmetal.sampling.constrain.grammar import Grammar

VOCABULARY = bytes_vocabulary("<think>", "</think>")
THINK, END_THINK = 257, 258
LONGER = ['"', "{", '"}', "ab", " ", "1.", "- ", "é"]

every_grammar = pytest.mark.parametrize("name", GRAMMARS)


@cache
def compiler() -> Compiler:
    return Compiler(VOCABULARY)


def allows(grammar: Grammar, text: str | list[int]) -> bool:
    """Whether a grammar allows a text, or ids, as a whole."""
    matcher: Any = compiler().matcher(grammar)
    ids = list(text.encode()) if isinstance(text, str) else text
    return all(matcher.consume_token(id) for id in ids) and bool(matcher.is_accepting())


def ask(text: str, answer: str | list[int]) -> bool:
    return allows(Grammar.of_gbnf(text), answer)


@every_grammar
def test_a_grammar_allows_what_it_allowed_before(name: str) -> None:
    """Texts made from the grammar, and those with a character changed."""
    recogniser, grammar = Recogniser(GRAMMARS[name], seed=len(name)), Grammar.of_gbnf(GRAMMARS[name])
    changed = list[bool]()
    for i in range(60):
        text = recogniser.made(depth=i % 9)
        assert recogniser.allows(text)
        assert allows(grammar, text), text
        other = recogniser.changed(text)
        changed.append(recogniser.allows(other))
        assert allows(grammar, other) is changed[-1], other
    assert len(set(changed)) == 2


@every_grammar
def test_answers_that_are_drawn_follow_the_grammar(name: str) -> None:
    walker, recogniser = Walker(VOCABULARY, seed=7), Recogniser(GRAMMARS[name])
    ended = 0
    for _ in range(6):
        try:
            text = walker.walk(Grammar.of_gbnf(GRAMMARS[name]), length=20, most=200).decode()
        except (AssertionError, UnicodeDecodeError):  # it goes on and on, or ends within a character
            continue
        ended += 1
        assert recogniser.allows(text), text
    assert ended


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("arithmetic", ["1+2=3\n", "(a1 *2)=x\n", "a=b\nb=1\n"], ["1+=3\n", "1+2=3", "(a=b\n"]),
        ("chess", ["1. e4 e5\n2. Nf3 Nc6\n", "1. d4 d5\n10. O-O-O exd8=Q#\n"], ["1. e4 e5\n", "1. e9 e5\n2. a1 a1\n"]),
        (
            "json",
            ['{"a": [1, -2.5e3, {"b": null}]}', "{}", '{"é\\u00e9": true}'],
            ["[]", '{"a" 1}', '{"a":01}', '{"\\x"}'],
        ),
        ("list", ["- eggs\n- milk\n"], ["- eggs", "eggs\n", "- a\x0bb\n"]),
        ("kana", ["こんにちは", "カタカナ ひらがな、"], ["hello", " あ", "日本"]),
        ("c", ["int f(char c){return c+1;}", "", "int f(){while(x){x = -(2-y);}}"], ["int f(){", "return 1;"]),
        ("ambiguous", ["abc", "ac", "abbc", "abcxxa1yy", "acz2"], ["ab", "abcx", "abcxa1", "acb2"]),
    ],
)
def test_texts_of_known_grammars(name: str, good: list[str], bad: list[str]) -> None:
    grammar, recogniser = Grammar.of_gbnf(GRAMMARS[name]), Recogniser(GRAMMARS[name])
    assert [recogniser.allows(text) for text in [*good, *bad]] == [True] * len(good) + [False] * len(bad)
    assert [allows(grammar, text) for text in good] == [True] * len(good)
    assert [allows(grammar, text) for text in bad] == [False] * len(bad)


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        ('root ::= "a"{2,3}', ["aa", "aaa"], ["a", "aaaa"]),
        ('root ::= "ab"{ 2 }', ["abab"], ["ab", "abb", "ababab"]),
        ('root ::= [ab]{1,}"c"', ["ac", "abbac"], ["c"]),
        ('root ::= "a"+? "b"', ["b", "aab"], ["a"]),
        ('root ::= . "\\n" .', ["a\n\n", "日\né"], ["\n", "a\n"]),
        ("root ::= [^a-c\\]]", ["d", "[", "\n", "é"], ["a", "]", ""]),
        ("root ::= [-a] [a-] [\\-b]", ["--b", "aa-"], ["b-b", "aba"]),
        (r'root ::= "\x41\u00e9\U0001F600\"\\\t\r\n\[\]"', ['Aé😀"\\\t\r\n[]'], ["A"]),
        ("root ::= | [a]", ["", "a"], ["b"]),
        ('root ::= "a" |\n  "b" | # more\n  "c"', ["a", "b", "c"], ["d"]),
        ('root ::=\n  "a"\nother ::= "b"', ["a"], ["b"]),
        ('root ::= (\n "a" # one\n\n (b |\n c)\n)\nb ::= "b"\r\nc::="c"', ["ab", "ac"], ["a"]),
        ('root ::= A_b-1\nA_b-1 ::= "x"', ["x"], ["y"]),
        ('root ::= "a"\nroot ::= "b"', ["b"], ["a"]),
        ('# a comment with "\nroot ::= "#" [#] # and one more', ["##"], ["#"]),
        ('root ::= root "b" | "a"', ["a", "abb"], ["b", ""]),
        ('root ::= ("a"?)*"b"', ["b", "aab"], ["a"]),
        ('root ::= x x\nx ::= "" | "a" x', ["", "a", "aaa"], ["b"]),
    ],
)
def test_what_the_parts_of_a_grammar_mean(grammar: str, good: list[str], bad: list[str]) -> None:
    assert [ask(grammar, text) for text in good] == [True] * len(good)
    assert [ask(grammar, text) for text in bad] == [False] * len(bad)
    recogniser = Recogniser(grammar)
    assert [recogniser.allows(text) for text in [*good, *bad]] == [True] * len(good) + [False] * len(bad)


def test_tokens_stand_for_themselves() -> None:
    for grammar in ('root ::= <think> [a-z]* </think> "."', 'root ::= <[257]> [a-z]* <[258]> "."'):
        assert ask(grammar, [THINK, *b"ab", END_THINK, *b"."])
        assert not ask(grammar, [*b"<think>ab</think>."])
    with pytest.raises(UsageError, match="<hello>"):
        ask("root ::= <hello>", "")


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ("", "a rule named root"),
        ('start ::= "a"', "a rule named root"),
        ("root ::= item", "'item' is not defined"),
        ('root ::= "a\n', "line 1: a text or a class does not end"),
        ('\n\nroot ::= [a"', "line 3: a text or a class does not end"),
        (r'root ::= "\q"', r"no escape of GBNF"),
        (r'root ::= "\u12"', "4 hexadecimal digits"),
        (r'root ::= "\ud800"', "0xd800 is no character"),
        (r"root ::= [\U00110000]", "0x110000 is no character"),
        ("root ::= [z-a]", "from 'z' to 'a'"),
        ("root ::= []", "between"),
        ('root ::= ("a"', r"\) is expected"),
        ('root ::= "a")', "a line break is expected"),
        ('root = "a"', "::= is expected"),
        ('root ::= "a"{3,2}', "upwards"),
        ('root ::= "a"{2001}', "2000 at most"),
        ('root ::= "a"{,3}', "a repetition such as"),
        ('root ::= "a"\n"b"', "line 2: the name of a rule"),
        ("root ::= !<think>", "not supported; write the characters"),
        ("root ::= < a>", "a token such as"),
        (f"root ::= {'(' * 200}", "more than 100 parentheses"),
        ("root ::= [^\\x00-\\U0010FFFF]", "allows no character"),
    ],
)
def test_a_wrong_grammar_is_refused_by_its_line(grammar: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ask(grammar, "")


def test_a_grammar_without_a_circle_is_one_lexeme() -> None:
    assert "r0" not in lark_of(GRAMMARS["chess"])
    assert "T0" not in lark_of(JSON)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('root ::= "a"', True),
        ('# x\n  root::= "a"', True),
        ("start: /a/", False),
        ('start: "root ::= a"', False),
        ("start: A\nA: /::=/", False),
    ],
)
def test_gbnf_is_known_by_its_rules(text: str, found: bool) -> None:
    assert is_gbnf(text) is found

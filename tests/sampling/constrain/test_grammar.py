"""Grammars as plain data: their makers, and what stands in their rules."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest

from support.constrain_lab import Walker, accepts, bytes_vocabulary, file_vocabulary
from zincmetal.errors import UsageError
from zincmetal.sampling.constrain import compiler, grammar
from zincmetal.sampling.constrain.grammar import Grammar, control_term
from zincmetal.sampling.constrain.masks import Masks
from zincmetal.sampling.draws import unpacked

BYTES = bytes_vocabulary("<|call|>", "[TOOL_CALLS]", "<a b>", "<｜tool▁sep｜>")
MASKS = Masks(BYTES)


def takes(made: Grammar, text: str) -> bool:
    return accepts(BYTES, made, text.encode(), MASKS)


def test_a_grammar_is_plain_data():
    made = Grammar.of_regex("a|b")
    assert pickle.loads(pickle.dumps(made)) == made
    assert made == Grammar.of_regex("a|b")
    assert len({made, Grammar.of_regex("a|b")}) == 1


def test_making_a_grammar_needs_no_other_package():
    code = (
        "import sys; from zincmetal.sampling.constrain.grammar import Grammar; Grammar.of_schema({'type': 'object'}); "
        "Grammar.of_regex('a'); assert 'llguidance' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_llguidance_the_error_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UsageError, match=r"pip install 'zincmetal\[grammar\]'"):
        Masks(BYTES).of(Grammar.of_object(), None, 0)


def test_a_library_that_is_too_old_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(compiler.library(), "__version__", "1.8.0")
    with pytest.raises(UsageError, match=r"1\.8\.0 is too old: pip install -U"):
        Masks(BYTES).of(Grammar.of_object(), None, 0)


@pytest.mark.parametrize(
    ("regex", "matching", "others"),
    [
        ("[A-Z][a-z]+", ["Paris"], ["paris", "P", "Paris "]),
        ("a/b", ["a/b"], ["a\\/b"]),
        (r"a\/b", ["a/b"], ["a"]),
        ("//|#", ["//", "#"], ["/"]),
        (r"\d{2}", ["42"], ["4", "421", "٤٢"]),
        (r"[\d_]+[^\d]\D", ["4_xy"], ["٤x", "4_1x", "4_x1"]),
        (r"[/]\[\d", ["/[1"], ["[1"]),
        ("a\nb", ["a\nb"], ["ab"]),
        (r'"\\"', ['"\\"'], ['"']),
        ("", [""], ["a"]),
        ("a*", ["", "aaa"], ["b"]),
        ("(?i)yes", ["yes", "YES"], ["no"]),
        ("^ab$", ["ab"], ["b", "a"]),
        ("é|😀", ["é", "😀"], ["e"]),
        (r"[^\n/]+", ["a b"], ["a/b", "a\n"]),
    ],
)
def test_a_regular_expression_matches_the_whole_answer(regex, matching, others):
    made = Grammar.of_regex(regex)
    compiler.check(made)
    assert [takes(made, text) for text in matching] == [True] * len(matching)
    assert [takes(made, text) for text in others] == [False] * len(others)


@pytest.mark.parametrize("regex", ["(", "a\\", "(?=a)", r"(a)\1", r"\bword", "x" * (grammar.MAX_REGEX + 1), 5])
def test_an_expression_that_cannot_be_followed_is_refused(regex):
    with pytest.raises(UsageError):
        compiler.check(Grammar.of_regex(regex))


TEXTS = ["yes", "no", 'say "hi"', "back\\slash", "line\nbreak", "\x7f\x00", "ünï 😀", "/x/", "// no", "{", " ", "%json"]


def test_one_of_the_choices_and_nothing_else():
    made = Grammar.of_choices(TEXTS)
    assert all(takes(made, text) for text in TEXTS)
    assert not any(takes(made, text) for text in ["", "ye", "yesno", "yes ", "No"])


def test_a_choice_may_be_empty_or_the_beginning_of_another():
    made = Grammar.of_choices(["", "a", "ab"])
    assert [takes(made, text) for text in ("", "a", "ab", "b")] == [True, True, True, False]


@pytest.mark.parametrize("choices", [[], [5], ["\ud800"], ["x"] * (grammar.MAX_CHOICES + 1)])
def test_choices_that_are_none_are_refused(choices):
    with pytest.raises(UsageError):
        Grammar.of_choices(choices)


@pytest.mark.parametrize("lark", ["", "start", "start: other", "start: /a", 'start: <nothing> "a"', 5, "x" * 5_000_000])
def test_a_wrong_grammar_is_refused_when_it_is_made_into_a_mask(lark):
    with pytest.raises(UsageError):
        MASKS.of(Grammar(lark), None, 0)


def test_a_grammar_inside_another_one():
    parts = {
        "schema": Grammar.of_schema({"type": "array", "items": {"type": "integer"}}),
        "regex": Grammar.of_regex("a/b+"),
        "choices": Grammar.of_choices(["x", "y"]),
        "lark": Grammar('start: one two\none: "(" /[0-9]/\ntwo: ")"'),
    }
    lines = "".join(made.rule(name) for name, made in parts.items())
    made = Grammar(f'start: "<" (schema | regex | choices | lark) ">"\n{lines}')
    for text in ("<[1,2]>", "<a/bb>", "<y>", "<(7)>"):
        assert takes(made, text), text
    for text in ("<[x]>", "<z>", "<(7>", "[1]"):
        assert not takes(made, text), text


def test_a_text_like_a_control_token_is_spelled(smollm2):
    vocab = file_vocabulary(smollm2)
    walker = Walker(vocab, seed=1)
    for text in ("<|im_end|>", "a<|im_start|>b", "<|endoftext|>"):
        for made in (Grammar.of_choices([text]), Grammar.of_schema({"const": text})):
            assert text.encode() in walker.walk(made)


@pytest.mark.parametrize("text", ["<|call|>", "[TOOL_CALLS]", "<a b>", "<｜tool▁sep｜>"])
def test_a_grammar_names_a_control_token_of_any_form(text):
    token = BYTES.tokens.index(text.encode())
    mask = MASKS.of(Grammar(f'start: {control_term(text)} "x"'), None, 0)
    assert mask([]).tolist() == BYTES.only([token]).tolist()
    assert mask([token]).tolist() == BYTES.only([ord("x")]).tolist()


def test_no_rule_for_text_allows_a_control_token():
    controls = set(BYTES.special - BYTES.ends)
    for made in (Grammar("start: /a(.|\n)b/"), Grammar.of_schema({"type": "string"}), Grammar.of_choices(["<|call|>"])):
        mask, ids = MASKS.of(made, None, 0), list[int]()
        for _ in range(3):
            allowed = np.flatnonzero(unpacked(mask(ids), len(BYTES))).tolist()
            assert not controls.intersection(allowed)
            ids.append(allowed[-1] if allowed[-1] < 256 else allowed[0])

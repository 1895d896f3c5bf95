"""The budget of reasoning: alone, and over a grammar."""

from __future__ import annotations

import json
import pickle
import random

import numpy as np
import pytest

from support.constrain_lab import END, PROMPT, bytes_vocabulary
from zincmetal.errors import UsageError
from zincmetal.sampling.constrain.budget import Budget
from zincmetal.sampling.constrain.grammar import Grammar
from zincmetal.sampling.constrain.masks import Masks
from zincmetal.sampling.draws import unpacked

OPEN, CLOSE = 257, 258
BYTES = bytes_vocabulary("<think>", "</think>")
MASKS = Masks(BYTES)
N = len(BYTES)
JSON = Grammar.of_schema(
    {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
)
THEN_JSON = Grammar("start: thought </think> body\nthought: /(.|\\n)*/\n" + JSON.rule("body"))


def generate(grammar: Grammar | None, budget: Budget | None, wish, most: int = 80) -> list[int]:
    """Takes the token that ``wish(number)`` gives if it is allowed, else the first that is."""
    mask, ids = MASKS.of(grammar, budget, len(PROMPT)), list(PROMPT)
    while len(ids) < most:
        words = mask(ids) if mask else None
        allowed = range(N) if words is None else np.flatnonzero(unpacked(words, N)).tolist()
        token = wish(len(ids) - len(PROMPT))
        token = token if token in allowed else min(allowed, key=lambda t: (t != END, not 32 < t < 127, t))
        if token == END:
            break
        ids.append(token)
    return ids[len(PROMPT) :]


def text(ids: list[int]) -> str:
    return b"".join(BYTES.tokens[i] for i in ids).decode()


def thinker(thought: str = "hmm "):
    """Wishes for thought for ever."""

    def wish(number: int) -> int:
        return ord(thought[number % len(thought)])

    return wish


def test_a_budget_is_plain_data():
    budget = Budget(5, "</think>", "\n</think>\n", "<think>")
    assert pickle.loads(pickle.dumps(budget)) == budget


@pytest.mark.parametrize(
    "made", [lambda: Budget(-1, "x"), lambda: Budget(5, ""), lambda: Budget(5, "</think>", forced="enough")]
)
def test_a_budget_without_sense_is_refused(made):
    with pytest.raises(UsageError):
        made()


@pytest.mark.parametrize("tokens", [0, 1, 4, 9])
def test_after_the_budget_the_end_of_reasoning_is_forced(tokens):
    ids = generate(None, Budget(tokens, "</think>"), thinker(), most=20)
    assert ids.index(CLOSE) == tokens
    assert ids.count(CLOSE) == 1
    assert text(ids[:tokens]) == ("hmm " * 5)[:tokens]


def test_the_text_that_is_forced_may_be_longer_than_the_end():
    ids = generate(None, Budget(4, "</think>", forced="\nEnough.\n</think>\n\n"), thinker(), most=40)
    assert text(ids).startswith("hmm \nEnough.\n</think>\n\n")
    assert text(ids).count("Enough") == 1


def test_an_end_that_is_text_is_forced_byte_by_byte():
    ids = generate(None, Budget(3, "[END]"), thinker(), most=30)
    assert text(ids).startswith("hmm[END]")
    assert text(ids).count("[END]") == 1


def test_a_model_that_ends_its_reasoning_in_time_is_left_alone():
    told = [*b"ok", CLOSE, *b"answer that is long", END]
    ids = generate(None, Budget(5, "</think>"), lambda n: told[n])
    assert ids == told[:-1]


def test_an_end_in_several_tokens_counts_too():
    told = [*b"ok[END]answer that is long", END]
    ids = generate(None, Budget(9, "[END]"), lambda n: told[n])
    assert ids == told[:-1]


def test_a_character_is_not_cut():
    told = "ééééééé".encode()
    ids = generate(None, Budget(3, "</think>"), lambda n: told[n % len(told)], most=20)
    assert ids.index(CLOSE) == 4
    assert text(ids[:4]) == "éé"


def test_reasoning_that_the_answer_begins_itself():
    budget = Budget(3, "</think>", begin="<think>")
    told = [*b"\n", OPEN, *b"hmm hmm hmm hmm hmm"]
    ids = generate(None, budget, lambda n: told[n % len(told)], most=20)
    assert text(ids).startswith("\n<think>hmm</think>")


def test_an_answer_without_reasoning_has_no_budget():
    told = b"an answer that is longer than the budget, and speaks of <think> too"
    ids = generate(None, Budget(3, "</think>", begin="<think>"), lambda n: told[n] if n < len(told) else END)
    assert bytes(ids) == told


def test_a_grammar_goes_on_after_the_end_that_was_forced():
    ids = generate(THEN_JSON, Budget(6, "</think>"), thinker("?"), most=60)
    assert ids.index(CLOSE) == 6
    assert json.loads(text(ids[7:])) in ({"a": True}, {"a": False})


def test_without_a_budget_the_same_grammar_lets_it_think():
    assert CLOSE not in generate(THEN_JSON, None, thinker(), most=60)


def test_where_the_grammar_does_not_allow_the_end_the_grammar_goes_first():
    at_least = Grammar('start: /[hm ]{10,}/ </think> "x"')
    ids = generate(at_least, Budget(4, "</think>"), thinker(), most=30)
    assert text(ids) == "hmm hmm hm</think>x"


def test_calls_that_are_repeated_or_begin_again_give_the_same_masks():
    budget, rng = Budget(4, "[END]", begin="<think>"), random.Random(1)
    told = [OPEN, *b"hmm [END]answer"]
    mask = MASKS.of(None, budget, len(PROMPT))
    for _ in range(80):
        n = rng.randint(0, len(told))
        ids = [*PROMPT, *told[:n]]
        fresh = MASKS.of(None, budget, len(PROMPT))
        for k in range(n):
            fresh([*PROMPT, *told[:k]])
        one, other = mask(ids), fresh(ids)
        if n >= 6:  # what was forced is known to those who saw it
            continue
        assert (one is None) == (other is None), n
        assert one is None or np.array_equal(one, other)


def test_a_budget_alone_needs_no_llguidance(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    mask = Masks(BYTES).of(None, Budget(0, "</think>"), len(PROMPT))
    assert mask(PROMPT).tolist() == BYTES.only([CLOSE]).tolist()


def test_masks_of_drafts_end_before_the_budget_does():
    mask = MASKS.of(None, Budget(6, "</think>"), len(PROMPT))
    assert mask is not None
    mask([*PROMPT, *b"abc"])
    assert mask.draft(list(b"de")) == [None, None]
    assert mask.draft(list(b"def")) == []
    mask = MASKS.of(THEN_JSON, Budget(9, "</think>"), len(PROMPT))
    assert mask is not None
    ids = [*PROMPT, *b"ab", CLOSE]
    mask(ids)
    found = mask.draft(list(b'{"a'))
    other = MASKS.of(THEN_JSON, Budget(9, "</think>"), len(PROMPT))
    assert other is not None
    assert len(found) == 3
    for i, words in enumerate(found):
        assert np.array_equal(words, other([*ids, *b'{"a'[: i + 1]]))

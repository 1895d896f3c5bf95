"""Masks of answers: token by token, again from the beginning, where nothing is constrained, and dead ends."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest

from support.constrain_lab import END, PROMPT, allowed_texts, bytes_vocabulary
from zincmetal.errors import GrammarError, UsageError
from zincmetal.sampling.constrain import compiler
from zincmetal.sampling.constrain.constraint import Constraint
from zincmetal.sampling.constrain.grammar import Grammar
from zincmetal.sampling.constrain.masks import Masks
from zincmetal.sampling.constrain.vocabulary import Vocabulary
from zincmetal.sampling.draws import unpacked

CALL = 257
BYTES = bytes_vocabulary("<|call|>")
MASKS = Masks(BYTES)
WORDS = Grammar('start: "ab" ("c" | "d") | "xyz"')
ANYTHING = Grammar("start: /(.|\\n)*/")
LAZY = Grammar('start: (free /[0-9]/ ";")* tail\nfree[lazy]: /(.|\\n)*call:/\ntail: /(.|\\n)*/')


def mask_of(grammar: Grammar, n_prompt: int = len(PROMPT), vocab: Vocabulary = BYTES):
    mask = (MASKS if vocab is BYTES else Masks(vocab)).of(grammar, None, n_prompt)
    assert mask is not None
    return mask


def after(text: bytes) -> list[int]:
    return [*PROMPT, *text]


def test_the_prompt_does_not_count():
    for prompt in ([], [1], list(b"abc")):
        assert allowed_texts(BYTES, mask_of(WORDS, len(prompt))(prompt)) == {b"a", b"x"}


def test_token_by_token_and_at_once_give_the_same_masks():
    grammar, text = Grammar.of_schema({"type": "object", "required": ["a"]}), b'{"a": [1, {"b": "x\\n"}]}'
    one = mask_of(grammar)
    for n in range(len(text) + 1):
        assert np.array_equal(one(after(text[:n])), mask_of(grammar)(after(text[:n])))
    assert one(after(text)).tolist() == BYTES.only([END]).tolist()


def test_a_call_that_is_repeated_gives_the_same_mask():
    mask = mask_of(WORDS)
    first = mask(after(b"ab"))
    assert np.array_equal(first, mask(after(b"ab")))
    assert allowed_texts(BYTES, mask(after(b"ab"))) == {b"c", b"d"}


def test_masks_that_were_given_out_do_not_change():
    mask = mask_of(WORDS)
    first = mask(after(b""))
    before = first.copy()
    mask(after(b"ab"))
    assert np.array_equal(first, before)


def test_it_begins_again_with_a_shorter_or_another_answer():
    mask, rng = mask_of(WORDS), random.Random(3)
    answers = [b"", b"a", b"ab", b"abc", b"abd", b"x", b"xy", b"xyz"]
    for _ in range(60):
        text = rng.choice(answers)
        assert np.array_equal(mask(after(text)), mask_of(WORDS)(after(text))), text


def test_the_end_is_allowed_where_the_grammar_accepts_and_nowhere_else():
    mask = mask_of(Grammar.of_regex("a{2,3}"))
    ends = [END in np.flatnonzero(unpacked(mask(after(b"a" * n)), len(BYTES))) for n in range(4)]
    assert ends == [False, False, True, True]
    assert mask(after(b"aaa")).tolist() == BYTES.only([END]).tolist()


def test_all_end_tokens_are_allowed():
    vocab = Vocabulary(
        [bytes([i]) for i in range(256)] + [b"<end>", b"<turn>"], [256], [256, 257], lambda text, special: []
    )
    mask = mask_of(Grammar.of_choices(["a"]), vocab=vocab)
    assert mask(after(b"a")).tolist() == vocab.only([256, 257]).tolist()


def test_the_words_of_a_mask_are_those_of_the_logits():
    for n_vocab in (258, 300, 320, 257):
        vocab = bytes_vocabulary("<|call|>", n_vocab=n_vocab)
        mask = mask_of(ANYTHING if n_vocab == 257 else Grammar('start: <|call|> | "a"'), vocab=vocab)
        if n_vocab == 257:  # the control token has no logit
            assert len(vocab) == 257
            continue
        words = mask(PROMPT)
        assert words.dtype == np.uint32
        assert words.size == -(-n_vocab // 32)
        assert np.flatnonzero(unpacked(words, n_vocab)).tolist() == [ord("a"), CALL]


def test_a_file_without_an_end_token_cannot_follow_a_grammar():
    vocab = Vocabulary([bytes([i]) for i in range(256)], [], [], lambda text, special: list(text.encode()))
    with pytest.raises(UsageError, match="no end token"):
        Masks(vocab).of(ANYTHING, None, 0)


# ---- where nothing is constrained ----------------------------------------------------------------------------------


def test_where_any_text_may_follow_there_is_no_mask():
    mask = mask_of(ANYTHING)
    assert mask(after(b"")) is None
    assert mask(after(b"some text")) is None


def test_within_a_character_its_bytes_are_constrained():
    mask = mask_of(ANYTHING)
    words = mask(after("é".encode()[:1]))
    assert allowed_texts(BYTES, words) == {bytes([i]) for i in range(0x80, 0xC0)}
    assert mask(after("é".encode())) is None


def test_a_constrained_part_follows_its_marker_and_then_anything_again():
    mask = mask_of(LAZY)
    assert mask(after(b"text call")) is None
    assert allowed_texts(BYTES, mask(after(b"text call:"))) == {bytes([i]) for i in b"0123456789"}
    assert allowed_texts(BYTES, mask(after(b"text call:7"))) == {b";"}
    assert mask(after(b"text call:7;")) is None
    assert mask(after(b"text call:7; more")) is None
    assert allowed_texts(BYTES, mask(after(b"text call:7; more call:"))) == {bytes([i]) for i in b"0123456789"}


def test_tokens_that_are_no_text_count_as_nothing_where_any_text_may_follow():
    mask = mask_of(LAZY)
    odd = [0xC0, CALL, 0xFF, CALL]
    ids = after(b"text ca")
    for token in odd:
        ids.append(token)
        assert mask(ids) is None
    ids += b"ll:"
    assert allowed_texts(BYTES, mask(ids)) == {bytes([i]) for i in b"0123456789"}
    assert np.array_equal(mask_of(LAZY)(ids), mask(ids))


def test_a_text_that_may_not_end_yet_is_constrained():
    mask = mask_of(Grammar('start: free "x"\nfree[lazy]: /(.|\\n)*call:/'))
    words = mask(PROMPT)
    assert words is not None
    assert not unpacked(words, len(BYTES))[END]


# ---- dead ends -----------------------------------------------------------------------------------------------------


def test_a_token_that_the_mask_forbids_is_an_error_of_this_answer_alone():
    one, other = mask_of(WORDS), mask_of(WORDS)
    one(PROMPT)
    with pytest.raises(GrammarError, match="token"):
        one(after(b"q"))
    assert allowed_texts(BYTES, other(after(b"ab"))) == {b"c", b"d"}
    assert allowed_texts(BYTES, mask_of(WORDS)(after(b"ab"))) == {b"c", b"d"}


def test_a_grammar_that_becomes_too_complex_is_an_error_of_this_answer_alone(monkeypatch):
    limits = {**compiler.LIMITS, "step_lexer_fuel": 300, "step_max_items": 50}
    monkeypatch.setattr(compiler, "LIMITS", limits)
    masks = Masks(BYTES)
    mask = masks.of(Grammar('start: (/[a-z]*b[a-z]{20}c/ | /[a-z]*c[a-z]{30}d/ | "a" "b" start)'), None, 0)
    with pytest.raises(GrammarError, match="cannot go on"):
        [mask(list(b"ab" * n)) for n in range(200)]
    assert masks.of(Grammar.of_choices(["a"]), None, 0)([]) is not None


class Matcher:
    def deep_copy(self):
        return self


@pytest.mark.parametrize("fault", [ValueError("odd"), type("PanicException", (BaseException,), {})("panic")])
def test_a_fault_of_the_library_is_an_error_of_this_answer_alone(fault):
    class Broken(Matcher):
        def compute_bitmask(self):
            raise fault

    with pytest.raises(GrammarError, match="failed"):
        Constraint(Broken(), BYTES.only([1]), 0)([])


def test_an_interrupt_passes_through():
    class Interrupted(Matcher):
        def compute_bitmask(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Constraint(Interrupted(), BYTES.only([1]), 0)([])


def test_a_tokenizer_that_fails_does_not_stop_an_answer():
    def failing(text: str, special: bool) -> list[int]:
        raise RuntimeError("no token for this")

    vocab = Vocabulary([bytes([i]) for i in range(256)] + [b"<end>"], [256], [256], failing)
    mask = mask_of(Grammar.of_choices(["forced text"]), vocab=vocab)
    assert mask(after(b"forced")).tolist() == vocab.only([ord(" ")]).tolist()


def test_a_grammar_without_an_answer_is_refused_at_once():
    with pytest.raises(UsageError, match="no answer"):
        mask_of(Grammar('start: %json {"$ref": "#"}'))


# ---- many answers --------------------------------------------------------------------------------------------------


def test_answers_of_one_grammar_do_not_know_each_other():
    masks = [mask_of(WORDS) for _ in range(5)]
    texts = [b"", b"a", b"ab", b"x", b"xyz"]
    for mask, text in zip(masks, texts, strict=True):
        mask(after(text))
    for mask, text in zip(masks, texts, strict=True):
        assert np.array_equal(mask(after(text)), mask_of(WORDS)(after(text)))


def test_a_grammar_is_compiled_once_as_long_as_it_is_kept(monkeypatch):
    made = []
    masks = Masks(BYTES)
    masks.of(WORDS, None, 0)
    library = compiler.library()
    keep = masks._compiler._module.LLMatcher  # noqa: SLF001
    monkeypatch.setattr(library, "LLMatcher", type("Counted", (), {
        "grammar_from_lark": staticmethod(keep.grammar_from_lark),
        "__new__": lambda cls, *args, **options: made.append(args) or keep(*args, **options),
    }))  # fmt: skip
    for _ in range(3):
        masks.of(WORDS, None, 0)
        masks.of(LAZY, None, 0)
    assert len(made) == 1
    for i in range(compiler.KEPT):
        masks.of(Grammar.of_choices([f"{i}"]), None, 0)
    masks.of(WORDS, None, 0)
    assert len(made) == 2 + compiler.KEPT


def test_threads_may_ask_for_masks_at_once():
    masks, wrong = Masks(bytes_vocabulary()), []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(30):
            choice = rng.choice("abc") * rng.randint(1, 3)
            mask = masks.of(Grammar.of_choices([choice, "z"]), None, 0)
            if allowed_texts(masks.vocabulary, mask([])) != {choice[:1].encode(), b"z"}:
                wrong.append(choice)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- the vocabulary ------------------------------------------------------------------------------------------------


def test_a_text_is_encoded_so_that_its_bytes_are_exact():
    tokens = [b"", b"a", b"b", b"ab", b" ", b" a", b"<c>", b"\xc3", b"\xa9"]

    def spaced(text: str, special: bool) -> list[int]:
        return [5 if text.startswith("a") else 4]  # as a tokenizer that puts a space in front

    vocab = Vocabulary(tokens, [6], [6], spaced)
    assert vocab.exact(b"ab") == [3]
    assert vocab.exact(b"aab") == [1, 3]
    assert vocab.exact("é".encode()) == [7, 8]
    assert vocab.exact(b"\xff") == []
    assert vocab.exact(b"<c>") == []  # a control token is no text
    assert Vocabulary(tokens, [6], [6], lambda text, special: [6]).exact(b"<c>") == []
    assert Vocabulary(tokens, [6], [6], lambda text, special: [6]).exact(b"<c>", special=True) == [6]


def test_only():
    words = BYTES.only([0, 31, 32, CALL])
    assert np.flatnonzero(unpacked(words, len(BYTES))).tolist() == [0, 31, 32, CALL]


def test_masks_of_drafts_are_those_of_the_steps():
    """Also after drafts that went wrong, and where any text may follow. A draft changes nothing."""
    rng = random.Random(3)
    for grammar, text in (
        (Grammar.of_schema({"type": "object", "required": ["a"]}), b'{"a": [1, {"b": "x\\n"}]}'),
        (LAZY, b"hello call:5;then"),
        (WORDS, b"abc"),
    ):
        mask = mask_of(grammar)
        for n in range(len(text)):
            draft = list(text[n : n + rng.randint(1, 6)])
            if rng.random() < 0.5:
                draft[rng.randrange(len(draft))] = rng.randrange(len(BYTES))
            first = mask(after(text[:n]))
            found = mask.draft(draft)
            assert len(found) <= len(draft)
            other = mask_of(grammar)
            for i, words in enumerate(found):
                before = other([*after(text[:n]), *draft[:i]])
                assert before is None or before[draft[i] >> 5] >> (draft[i] & 31) & 1
                expected = other([*after(text[:n]), *draft[: i + 1]])
                assert (words is None) == (expected is None)
                assert words is None or np.array_equal(words, expected)
            if len(found) < len(draft):  # the next token is forbidden, or it leads nowhere
                here = other([*after(text[:n]), *draft[: len(found)]])
                assert here is None or not here[draft[len(found)] >> 5] >> (draft[len(found)] & 31) & 1
            again = mask(after(text[:n]))
            assert (first is None) == (again is None)
            assert first is None or np.array_equal(first, again)


def test_a_draft_into_a_dead_end_changes_nothing():
    """The vocabulary lacks the last byte of a text: its first byte leads nowhere. Other texts go on, drafted or not."""
    tokens = [bytes([i]) if i != 0xA9 else b"\xff\xff" for i in range(256)]
    vocab = Vocabulary([*tokens, b"<end>"], [256], [256], lambda text, special: [])
    mask = mask_of(Grammar('start: "ab" ("cde" | "é" | free)\nfree: /x(.|\\n)*/'), vocab=vocab)
    for n in (1, 2, 2, 3, 4):
        text = b"abcde"[:n]
        before = mask(after(text))
        for _ in range(2):  # also if nothing was asked in between
            assert mask.draft(list("é".encode())) == []
            assert len(mask.draft(list(b"abcd"[n:]))) == 4 - n
        assert np.array_equal(mask(after(text)), before)
    assert mask(after(b"abcde")).tolist() == vocab.only([256]).tolist()

"""Roles of tokens: ends of text and of turns, found by type, name, ids and template together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from support.vocab_builder import CONTROL, NORMAL, UNUSED, USER_DEFINED, byte_level, id_of, sentencepiece
from zincmetal.errors import UsageError
from zincmetal.text.tokenizer import Tokenizer

PIECES = dict.fromkeys("▁abcdefghijklmnopqrstuvwxyz<>_|/[]", -9.0)


def ends(tokenizer: Tokenizer) -> set[str]:
    return {tokenizer.token_bytes(i).decode() for i in tokenizer.eog_ids}


def with_template(meta: Mapping[str, Any], template: str) -> dict[str, Any]:
    return {**meta, "tokenizer.chat_template": template}


@pytest.mark.parametrize(
    "name",
    [
        *[
            "<|im_end|>",
            "<|eot_id|>",
            "<|eom_id|>",
            "<|eot|>",
            "<|eom|>",
            "<|end|>",
            "<|endoftext|>",
            "<|end_of_text|>",
        ],
        *["<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|END_OF_TURN_TOKEN|>", "<end_of_turn>", "<turn|>"],
        *["<|tool_response>", "[|endofturn|]", "<|assistant_end|>", "<|role_end|>", "<|message_sep|>", "<eos>", "[e~["],
        *["<seed:eos>", "<[end▁of▁sentence]>", "<｜end▁of▁sentence｜>", "_<EOT>", "▁<EOT>", "<|EOT|>"],
        *["<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<reponame>", "<fim_pad>"],
    ],
)
@pytest.mark.parametrize("kind", [CONTROL, NORMAL, USER_DEFINED])
def test_known_ends_count_whatever_their_type(name: str, kind: int) -> None:
    metas = [byte_level(special={name: kind})]
    metas += [sentencepiece(PIECES, {name: kind}, add_space_prefix=False, eos_token_id=None, add_bos_token=False)]
    for meta in metas:
        tokenizer = Tokenizer.from_metadata(meta)
        assert name in ends(tokenizer)
        token = id_of(meta, name)
        assert tokenizer.encode(f"a{name}b", parse_special=True)[1:-1] == [token]
        assert token not in tokenizer.encode(f"a{name}b")
        assert tokenizer.is_special(token)
        assert name in tokenizer.control_texts
        assert tokenizer.decode([token]) == name


@pytest.mark.parametrize("kind", [CONTROL, NORMAL, USER_DEFINED])
def test_turn_tokens_of_a_template_are_one_token_of_any_type(kind: int) -> None:
    turns = ["<start_of_turn>", "<end_of_turn>"]
    template = "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    meta = with_template(
        sentencepiece(PIECES | {"\n": -9.0}, dict.fromkeys(turns, kind), add_space_prefix=False), template
    )
    tokenizer = Tokenizer.from_metadata(meta)
    start, end = (id_of(meta, turn) for turn in turns)
    ids = tokenizer.prompt("<start_of_turn>user\nhi<end_of_turn>\n", parse_special=True)
    assert len(ids) == 1 + 1 + 5 + 2 + 1 + 1
    assert (ids[1], ids[-2]) == (start, end)
    assert ends(tokenizer) == {"</s>", "<end_of_turn>"}
    assert set(turns) <= set(tokenizer.control_texts)


@pytest.mark.parametrize(
    "name",
    ["<|im_start|>", "<|user|>", "<start_of_turn>", "<|start_header_id|>", "<|start|>", "[INST]", "]~b]", "<|turn>"],
)
@pytest.mark.parametrize("kind", [CONTROL, NORMAL, USER_DEFINED])
def test_what_opens_a_turn_is_read_only_where_special_tokens_are(name: str, kind: int) -> None:
    meta = byte_level(special={name: kind})
    tokenizer = Tokenizer.from_metadata(meta)
    assert tokenizer.control_texts == (name,)
    assert tokenizer.eog_ids == frozenset()
    assert tokenizer.encode(f"a{name}", parse_special=True)[1:] == [256]
    assert 256 not in tokenizer.encode(f"a{name}")


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("{% for m in messages %}<human>{{ m.content }}<stop>{% endfor %}", "<stop>"),
        ("{{ '<|assistant|>' + message['content'] + '<|turn_end|>' }}", "<|turn_end|>"),
        ("{{ message.content | trim }}{{ '<|close_eos|>' }}", None),
        ("<|start|>assistant\n{{- m['content'].strip() ~ '</s>' }}", "</s>"),
        ("{{ m.reasoning_content }}<stop>", None),
        ("[INST] {{ m.content }} [/INST]", None),
        ("{{ m.content }}<end_of_think>", None),
        ("{% set text = m.content %}{{ m.role }}: {{ text }}<stop>", "<stop>"),
        ("{% set e = '<|turn_end|>' %}{{ m.role + m.content + e }}", "<|turn_end|>"),
        ("{{ m.role }}<end_header>{{ text }}", None),
    ],
)
def test_what_a_template_writes_behind_a_content_ends_a_turn(template: str, end: str | None) -> None:
    names = ["<stop>", "<|turn_end|>", "</s>", "[/INST]", "<end_of_think>", "<end>", "<end_header>"]
    meta = with_template(byte_level(special=dict.fromkeys(names, NORMAL)), template)
    assert ends(Tokenizer.from_metadata(meta)) == ({end} if end else set())


def test_a_template_that_writes_a_known_end_tells_no_others() -> None:
    template = "{{ m.content }}<|END_RESPONSE|>{{ '' }}<|END_OF_TURN_TOKEN|>"
    names = ["<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>"]
    tokenizer = Tokenizer.from_metadata(with_template(byte_level(special=dict.fromkeys(names, CONTROL)), template))
    assert ends(tokenizer) == {"<|END_OF_TURN_TOKEN|>"}


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        # harmony and Solar: "<|end|>" ends a message, and the answer goes on
        (["<|start|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"], {"<|return|>", "<|call|>"}),
        (["<|begin|>", "<|end|>", "<|flush|>", "<|calls|>"], {"<|flush|>", "<|calls|>"}),
        (["<|user|>", "<|end|>"], {"<|end|>"}),  # Phi-3
        (["<|end|>", "<|call|>"], {"<|end|>", "<|call|>"}),
        (["[gMASK]", "<sop>", "<|user|>", "<|observation|>"], {"<|user|>", "<|observation|>"}),
        (["<|turn>", "<turn|>", "<|tool_response>", "<eos>", "</s>"], {"<turn|>", "<|tool_response>", "<eos>"}),
        (["[EOS]", "[EOT]", "[PAD]", "<|im_end|>", "<|im_user|>"], {"[EOS]", "[EOT]", "[PAD]", "<|im_end|>"}),
        (["]~!b[", "]~b]", "[e~["], {"[e~["}),
        (["<|begin_of_text|>", "<|eot_id|>", "<|eom_id|>"], {"<|eot_id|>", "<|eom_id|>"}),
        (["<|header_start|>", "<|header_end|>", "<|eot|>", "<|eom|>"], {"<|eot|>", "<|eom|>"}),
        (["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"], {"<|end_of_text|>"}),
        (["<PAD>", "[INST]", "[/INST]", "</s>"], {"<PAD>", "</s>"}),
        (["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>"], {"<|fim_pad|>"}),
    ],
)
def test_ends_of_families(tokens: Sequence[str], expected: set[str]) -> None:
    assert ends(Tokenizer.from_metadata(byte_level(special=dict.fromkeys(tokens, CONTROL)))) == expected


def test_ids_named_by_the_file_end_a_text() -> None:
    special = dict.fromkeys(["<a>", "<b>", "<c>", "<d>", "<e>", "<f>"], CONTROL)
    keys = {
        "eos_token_id": 256,
        "eot_token_id": 257,
        "eom_token_id": [258],
        "eos_token_ids": [256, 259],
        "fim_pad_token_id": 260,
    }
    assert ends(Tokenizer.from_metadata(byte_level(special=special, **keys))) == {"<a>", "<b>", "<c>", "<d>", "<e>"}
    several = Tokenizer.from_metadata(byte_level(special=special, eos_token_id=[257, 258], eog_token_ids=[256]))
    assert (several.eos_id, ends(several)) == (257, {"<a>", "<b>", "<c>"})


@pytest.mark.parametrize("kind", [NORMAL, USER_DEFINED])
def test_text_that_only_looks_like_an_end_stays_text(kind: int) -> None:
    special = {
        "</s>": kind,
        "[EOS]": kind,
        "<PAD>": kind,
        "<b>": kind,
        "<s>": kind,
        "<|": kind,
        "<think>": USER_DEFINED,
    }
    meta = byte_level(special=special)
    tokenizer = Tokenizer.from_metadata(meta)
    assert tokenizer.eog_ids == frozenset()
    assert tokenizer.control_texts == ()
    expected = [id_of(meta, "</s>")] if kind == USER_DEFINED else tokenizer.encode("</s>")
    assert tokenizer.encode("</s>", parse_special=True) == tokenizer.encode("</s>") == expected
    assert tokenizer.encode("<think>") == tokenizer.encode("<think>", parse_special=True) == [id_of(meta, "<think>")]


def test_html_that_the_file_names_as_its_end_is_one() -> None:
    meta = byte_level(special={"</s>": NORMAL, "<b>": NORMAL}, eos_token_id=256)
    tokenizer = Tokenizer.from_metadata(meta)
    assert ends(tokenizer) == {"</s>"}
    assert tokenizer.encode("<b></s>", parse_special=True) == [*tokenizer.encode("<b>"), 256]


def test_a_templates_other_tokens_are_matched_as_wholes() -> None:
    template = "{{ '<think>' }}{{ m.content }}<tools><b>"
    meta = with_template(
        sentencepiece(
            PIECES | {"<b": -3.0, "<b>": -2.0}, {"<think>": NORMAL, "<tools>": NORMAL}, add_space_prefix=False
        ),
        template,
    )
    tokenizer = Tokenizer.from_metadata(meta)
    for text in ("<think>", "<tools>"):
        assert tokenizer.encode(text, add_bos=False) == [id_of(meta, text)]
        assert not tokenizer.is_special(id_of(meta, text))
        assert text not in tokenizer.control_texts
    # "<b>" is a normal piece, merged from two.
    assert tokenizer.encode("a<b>", add_bos=False) == [id_of(meta, "a"), id_of(meta, "<b>")]


def test_what_a_template_knows_of_special_tokens() -> None:
    special = {"<|a|>": CONTROL, "<|b|>": CONTROL, "<|c|>": CONTROL, "<|d|>": UNUSED}
    keys = {"bos_token_id": 256, "eos_token_id": 257, "padding_token_id": 258, "unknown_token_id": 2**31}
    tokenizer = Tokenizer.from_metadata(byte_level(special=special, **keys))
    assert tokenizer.special_texts == {"bos_token": "<|a|>", "eos_token": "<|b|>", "pad_token": "<|c|>"}
    assert (tokenizer.bos_text, tokenizer.eos_text) == ("<|a|>", "<|b|>")


def test_tokens_that_are_never_drawn() -> None:
    tokenizer = Tokenizer.from_metadata(byte_level(suppress_tokens=[3, 255, 256, -1]))
    assert tokenizer.suppressed == {3, 255}


def test_phi3s_turn_tokens_swallow_the_break_behind_them() -> None:
    special = dict.fromkeys(["<|user|>", "<|end|>"], CONTROL)
    meta = sentencepiece(PIECES | {"\n": -9.0, "▁hi": -1.0, "▁h": -1.5}, special, add_bos_token=False)
    text = "<|user|>\nhi<|end|>\n<s>\n"
    phi = Tokenizer.from_metadata({**meta, "general.architecture": "phi3"})
    turn, end, line = id_of(meta, "<|user|>"), id_of(meta, "<|end|>"), [id_of(meta, "▁"), id_of(meta, "\n")]
    assert phi.encode(text, parse_special=True) == [turn, id_of(meta, "▁hi"), end, 1, *line]
    other = Tokenizer.from_metadata(meta)
    hi = [id_of(meta, letter) for letter in "hi"]
    assert other.encode(text, parse_special=True) == [turn, *line, *hi, end, *line, 1, *line]


INFILL = ("<PRE>", "<SUF>", "<MID>")


@pytest.mark.parametrize("keys", [("fim_pre", "fim_suf", "fim_mid"), ("prefix", "suffix", "middle")])
def test_a_gap_by_the_ids_that_a_file_names(keys: Sequence[str]) -> None:
    meta = byte_level(special=dict.fromkeys(INFILL, CONTROL))
    ids = [id_of(meta, text) for text in INFILL]
    tokenizer = Tokenizer.from_metadata(
        meta | {f"tokenizer.ggml.{key}_token_id": i for key, i in zip(keys, ids, strict=True)}
    )
    assert tokenizer.infill("a", "b") == [ids[0], *tokenizer.encode("a"), ids[1], *tokenizer.encode("b"), ids[2]]
    with pytest.raises(UsageError, match="fill in the middle"):
        Tokenizer.from_metadata(meta).infill("a", "b")


@pytest.mark.parametrize(
    "texts",
    [
        ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
        ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ],
)
def test_a_gap_by_well_known_texts(texts: Sequence[str]) -> None:
    meta = sentencepiece(PIECES, dict.fromkeys(texts, CONTROL), add_space_prefix=False, add_bos_token=True)
    tokenizer = Tokenizer.from_metadata(meta)
    made = tokenizer.infill("ab", texts[2])
    assert made[0] == tokenizer.bos_id
    assert [made[1], made[-1]] == [id_of(meta, texts[0]), id_of(meta, texts[2])]
    assert made.count(id_of(meta, texts[2])) == 1  # the text behind the gap has none
    assert Tokenizer.from_metadata(sentencepiece(PIECES)).infill_ids is None


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("texts", [("[PREFIX]", "[SUFFIX]"), ("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>")])
def test_a_gap_whose_end_comes_first(texts: Sequence[str], named: bool) -> None:
    """As Codestral and Seed-Coder were trained, also if the file names the ids."""
    meta = byte_level(special=dict.fromkeys(texts, CONTROL))
    ids = [id_of(meta, text) for text in texts]
    if named:
        keys = ("fim_pre", "fim_suf", "fim_mid")
        meta |= {f"tokenizer.ggml.{key}_token_id": i for key, i in zip(keys, ids, strict=False)}
    tokenizer = Tokenizer.from_metadata(meta)
    assert tokenizer.infill("a", "b") == [ids[1], *tokenizer.encode("b"), ids[0], *tokenizer.encode("a"), *ids[2:]]
    ordinary = byte_level(special=dict.fromkeys(texts, NORMAL))
    assert Tokenizer.from_metadata(ordinary).infill_ids is None


def test_the_text_behind_a_gap_begins_no_word() -> None:
    meta = sentencepiece(PIECES | {"▁ab": -1.0, "ab": -2.0, "\n": -9.0}, dict.fromkeys(INFILL, CONTROL))
    keys = zip(("fim_pre", "fim_suf", "fim_mid"), INFILL, strict=True)
    tokenizer = Tokenizer.from_metadata(meta | {f"tokenizer.ggml.{k}_token_id": id_of(meta, text) for k, text in keys})
    made = tokenizer.infill("ab", "ab")
    assert tokenizer.decode(made).count("ab") == 2
    assert made[-2] == id_of(meta, "ab")
    assert id_of(meta, "▁ab") in made

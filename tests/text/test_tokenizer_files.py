"""Tokenizer metadata of real files: assumptions with a warning, named errors, models on ids alone, closed files."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import gguf_builder as b
from support.paths import ROOT
from support.vocab_builder import BYTE, CONTROL, LETTERS, NORMAL, USER_DEFINED, byte_level, id_of, sentencepiece
from zincmetal import gguf
from zincmetal.errors import TokenizerError, UsageError
from zincmetal.text.stream import TextStream
from zincmetal.text.tokenizer import Tokenizer
from zincmetal.text.tokenizer_keys import KEYS, Handling, handling

K = "tokenizer.ggml."


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "zincmetal.text" and r.levelno == logging.WARNING]


# --- assumed, with a warning


@pytest.mark.parametrize("name", ["bos", "eos", "eot", "eom", "padding", "fim_pad", "unknown", "mask"])
@pytest.mark.parametrize("value", [256, -1, 2**32 - 1, 10**30, np.uint32(2**31)])
def test_an_id_that_is_no_tokens_counts_as_absent(name: str, value: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer.from_metadata(byte_level(**{f"{name}_token_id": value}))
    (message,) = messages(caplog)  # one warning, about this key
    assert f"{K}{name}_token_id is {value}" in message
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eog_ids, tokenizer.special_texts) == (None, None, set(), {})


def test_ids_of_a_list_that_are_in_range_count(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer.from_metadata(byte_level(eos_token_id=7, eos_token_ids=np.array([7, 300, 9], np.uint32)))
    assert tokenizer.eog_ids == {7, 9}
    assert "eos_token_ids is 300" in messages(caplog)[0]


@pytest.mark.parametrize("name", ["bos", "eos"])
@pytest.mark.parametrize("token", [None, 999])
def test_a_flag_for_a_token_that_is_not_there(name: str, token: int | None, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer.from_metadata(byte_level(**{f"add_{name}_token": True, f"{name}_token_id": token}))
    assert f"add_{name}_token is set" in messages(caplog)[-1]
    assert tokenizer.encode("a") == tokenizer.prompt("a") == [LETTERS.index("a")]


@pytest.mark.parametrize("kind", [bool, int, np.bool_, np.uint8, np.uint32, np.int64])
@pytest.mark.parametrize("on", [0, 1])
def test_flags_of_any_width(kind: type, on: int, caplog: pytest.LogCaptureFixture) -> None:
    flags = {"add_bos_token": kind(on), "add_eos_token": kind(on)}
    tokenizer = Tokenizer.from_metadata(byte_level(bos_token_id=1, eos_token_id=2, **flags))
    assert tokenizer.encode("a") == ([1, LETTERS.index("a"), 2] if on else [LETTERS.index("a")])
    meta = sentencepiece({"▁a": -1.0, "▁": -2.0, "a": -3.0}, add_space_prefix=kind(on))
    assert Tokenizer.from_metadata(meta).encode("a", add_bos=False) == [id_of(meta, "▁a" if on else "a")]
    assert messages(caplog) == []


@pytest.mark.parametrize("value", [2, -1, 1.0, "true", [True]])
def test_what_is_no_flag_is_refused(value: Any) -> None:
    with pytest.raises(TokenizerError, match="add_bos_token"):
        Tokenizer.from_metadata(byte_level(bos_token_id=1, add_bos_token=value))


@pytest.mark.parametrize(
    "dtype", [np.int8, np.uint8, np.int16, np.uint32, np.int64, np.uint64, np.float32, list, tuple]
)
def test_types_and_scores_of_any_array(dtype: Any) -> None:
    meta = sentencepiece({"▁": -1.0, "a": -2.0, "▁a": -0.5}, {"<x>": CONTROL})
    types = meta[K + "token_type"].tolist()
    other = meta | {
        K + "token_type": dtype(types) if isinstance(dtype, type) and dtype in (list, tuple) else np.array(types, dtype)
    }
    ranks = [-100 if t == BYTE else -i for i, t in enumerate(types)]
    whole = meta | {K + "scores": np.array(ranks, np.float32)}
    for text in ("a a<x>é", "<0x0A>"):
        expected = Tokenizer.from_metadata(meta).encode(text, parse_special=True)
        assert Tokenizer.from_metadata(other).encode(text, parse_special=True) == expected
        for scores in (np.array(ranks, np.float64), np.array(ranks, np.int32), ranks):
            encoded = Tokenizer.from_metadata(whole | {K + "scores": scores}).encode(text)
            assert encoded == Tokenizer.from_metadata(whole).encode(text)


def test_lists_past_the_end_and_types_that_are_not_known(caplog: pytest.LogCaptureFixture) -> None:
    meta = byte_level(special={"<x>": CONTROL})
    types = [*meta[K + "token_type"].tolist(), CONTROL]
    assert Tokenizer.from_metadata(meta | {K + "token_type": types}).encode("<x>", parse_special=True) == [256]
    assert Tokenizer.from_metadata(meta | {K + "token_type": [9] * 256 + [CONTROL]}).encode("a") == [LETTERS.index("a")]
    assert ["token_type has 258 entries" in messages(caplog)[0], "token_type holds 9" in messages(caplog)[1]] == [
        True
    ] * 2


def test_a_token_that_occurs_twice(caplog: pytest.LogCaptureFixture) -> None:
    tokens = [*LETTERS, "a", "<|im_end|>", "<|im_end|>", "b"]
    types = [*[NORMAL] * 257, NORMAL, CONTROL, NORMAL]
    tokenizer = Tokenizer.from_metadata(byte_level(tokens=tokens, token_type=types))
    assert f"{K}tokens[97] and [256] are both 'a' and 2 more pairs" in messages(caplog)[0]
    assert tokenizer.encode("ab") == [LETTERS.index("a"), LETTERS.index("b")]
    assert tokenizer.encode("<|im_end|>", parse_special=True) == [258]
    assert tokenizer.eog_ids == {257, 258}
    assert tokenizer.decode([256, 257, 258, 259]) == "a<|im_end|><|im_end|>b"


def test_control_tokens_that_are_typed_as_text_are_named(caplog: pytest.LogCaptureFixture) -> None:
    Tokenizer.from_metadata(byte_level(special={"<|im_end|>": NORMAL, "<end_of_turn>": USER_DEFINED}))
    assert re.search(r"'<\|im_end\|>', '<end_of_turn>' are no control token", messages(caplog)[0])


# --- nothing passes unread


def test_the_table_in_the_docs_is_that_of_the_code() -> None:
    text = (ROOT / "docs/tokenizer-keys.md").read_text("utf-8")
    words = {Handling.READ: "read", Handling.CHAT: "chat", Handling.OFF: "off", Handling.IRRELEVANT: "no effect"}
    rows = dict(re.findall(r"^\| `([^`]+)` \| ([a-z ]+) \| [^|]+ \|$", text, re.MULTILINE))
    assert rows == {key: words[what] for key, what in KEYS.items()}
    assert handling("chat_template.tool_use") is Handling.CHAT


@pytest.mark.parametrize("key", [key for key, what in KEYS.items() if what is Handling.READ])
def test_keys_that_the_table_calls_read_are_read(key: str) -> None:
    asked: set[str] = set()

    class Watched(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            asked.add(name)
            return super().__getitem__(name)

        def get(self, name: str, default: Any = None) -> Any:
            asked.add(name)
            return super().get(name, default)

    value: Any = [3] if key in ("ggml.eos_token_ids", "ggml.suppress_tokens") else 0
    for meta in (byte_level(), sentencepiece({"a": -1.0})):
        given = {f"tokenizer.{key}": value} if f"tokenizer.{key}" not in meta else {}
        Tokenizer.from_metadata(Watched(meta | given))
    assert f"tokenizer.{key}" in asked


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("ggml.add_sep_token", True, True),
        ("ggml.add_sep_token", False, False),
        ("ggml.remove_extra_whitespaces", True, True),
        ("ggml.precompiled_charsmap", np.ones(8, np.uint8), True),
        ("ggml.precompiled_charsmap", np.ones(0, np.uint8), False),
        ("ggml.normalizer.lowercase", 1, True),
        ("ggml.add_space_prefix", True, True),  # a byte-level vocabulary's
        ("ggml.add_space_prefix", False, False),
        ("ggml.token_type_count", 2, False),
        ("ggml.add_pad_token", True, False),
        ("ggml.split_digits", True, True),
        ("ggml.normalizer.nfkc", True, True),
        ("chat_template.tool_use", "{{ x }}", False),
        ("chat_templates", ["tool_use"], False),
        ("huggingface.json", "{}", False),
        ("something.else", 1, True),
        ("ggml.eog_token_ids", [1], False),
    ],
)
def test_a_key_that_is_not_applied_is_named(
    key: str, value: Any, named: bool, caplog: pytest.LogCaptureFixture
) -> None:
    Tokenizer.from_metadata(byte_level() | {f"tokenizer.{key}": value})
    assert [f"tokenizer.{key}" in message for message in messages(caplog)] == [True] * named


# --- ids alone


def test_a_file_without_a_tokenizer_runs_on_ids(caplog: pytest.LogCaptureFixture) -> None:
    for meta in ({}, {K + "model": "none"}, {K + "model": "t5", K + "tokens": ["a"], K + "eos_token_id": 5}):
        tokenizer = Tokenizer.for_ids(meta)
        assert tokenizer.eog_ids == ({5} if len(meta) == 3 else set())
        assert tokenizer.decode([0, 7, 2**20]) == ""
        stream = TextStream(tokenizer, ("x",))
        assert (stream.push(3), stream.finish(), stream.stopped) == ("", "", False)
        for use in (tokenizer.encode, tokenizer.prompt):
            with pytest.raises(TokenizerError, match=rf"{re.escape(K)}model.*pass ids"):
                use("a")
        with pytest.raises(UsageError, match="token id"):
            tokenizer.decode(["a"])  # type: ignore[list-item]
    assert len(messages(caplog)) == 3


@pytest.mark.parametrize("wrong", [{"pre": "no-such-model"}, {"merges": ["a é"]}, {"merges": None}, {"pre": 3}])
def test_ids_have_text_where_only_encoding_fails(wrong: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    meta = byte_level(special={"<|im_end|>": CONTROL}, **wrong)
    tokenizer = Tokenizer.for_ids(meta)
    assert tokenizer.decode([LETTERS.index("a"), 256]) == "a<|im_end|>"
    assert tokenizer.eog_ids == {256}
    with pytest.raises(TokenizerError, match=f"{K}{next(iter(wrong))}"):
        tokenizer.encode("a")
    assert len(messages(caplog)) == 1
    with pytest.raises(TokenizerError, match=f"{K}{next(iter(wrong))}"):
        Tokenizer.from_metadata(meta)


def test_a_whole_tokenizer_is_the_same_for_ids(caplog: pytest.LogCaptureFixture) -> None:
    meta = byte_level([("a", "b")], {"<|im_end|>": CONTROL})
    assert Tokenizer.for_ids(meta).encode("ab") == Tokenizer.from_metadata(meta).encode("ab")
    assert messages(caplog) == []


def test_vocabulary_without_bytes_is_built_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer.for_ids({K + "model": "gpt2", K + "tokens": ["t0", "t1"], K + "pre": "gpt-2"})
    assert tokenizer.decode([1]) == "t1"
    assert messages(caplog) == []
    with pytest.raises(TokenizerError, match="pass ids"):
        tokenizer.encode("t0")


class Raises:
    """An index whose conversion to an integer fails."""

    def __index__(self) -> int:
        raise RuntimeError("no")


@pytest.mark.parametrize("token", [10**5000, -(10**5000), Raises(), None, np.zeros(2), 1.0], ids=range(6))
def test_what_is_no_id_is_a_usage_error(token: Any) -> None:
    for tokenizer in (Tokenizer.from_metadata(byte_level()), Tokenizer.for_ids({})):
        if tokenizer.vocab_size or not isinstance(token, int):
            with pytest.raises(UsageError, match="token id"):
                tokenizer.decode([token])
            with pytest.raises(UsageError, match="token id"):
                tokenizer.stream().push(token)
        with pytest.raises(UsageError, match="token ids are needed"):
            tokenizer.decode(5)  # type: ignore[arg-type]


def test_metadata_with_integers_of_any_length(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer.from_metadata(byte_level(eos_token_id=10**5000, suppress_tokens=[2, -(10**5000)]))
    assert (tokenizer.eos_id, tokenizer.suppressed) == (None, {2})
    assert ["an integer of about 5001 digits" in message for message in messages(caplog)] == [True, True]


def test_a_list_that_is_not_utf8_leaves_ids(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    keys = [b.key(K + "model", b.STR, b.string("gpt2")), b.key(K + "tokens", b.ARRAY, b.strings([b"a", b"\xff"]))]
    path.write_bytes(b.gguf([b.key("general.architecture", b.STR, b.string("llama")), *keys]))
    with gguf.open(path) as file:
        assert Tokenizer.for_ids(file.metadata).decode([1]) == ""
        with pytest.raises(TokenizerError, match="not UTF-8"):
            Tokenizer.from_metadata(file.metadata)


# --- files that close


def file_of(path: Path) -> Path:
    keys = [
        b.key("general.architecture", b.STR, b.string("llama")),
        b.key(K + "model", b.STR, b.string("gpt2")),
        b.key(K + "pre", b.STR, b.string("gpt-2")),
        b.key(K + "tokens", b.ARRAY, b.strings([*LETTERS, "ab"])),
        b.key(K + "token_type", b.ARRAY, b.numbers(b.I32, [NORMAL] * 257)),
        b.key(K + "merges", b.ARRAY, b.strings(["a b"])),
    ]
    path.write_bytes(b.gguf(keys))
    return path


def test_a_tokenizer_outlives_its_file(tmp_path: Path) -> None:
    with gguf.open(file_of(tmp_path / "a.gguf")) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    assert tokenizer.encode("ab") == [256]


def test_a_file_that_was_closed_before_is_a_usage_error(tmp_path: Path) -> None:
    with gguf.open(file_of(tmp_path / "a.gguf")) as file:
        pass
    for build in (Tokenizer.from_metadata, Tokenizer.for_ids):
        with pytest.raises(UsageError, match="closed"):
            build(file.metadata)


class ClosingMap(Mapping[str, Any]):
    """Metadata whose lists vanish after some reads, as if another thread closed the file."""

    def __init__(self, values: Mapping[str, Any], gone: str) -> None:
        self._values, self._gone = values, gone

    def __getitem__(self, key: str) -> Any:
        if key == K + self._gone and key in self._values:
            raise ValueError("mmap closed or invalid")
        return self._values[key]

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@pytest.mark.parametrize("gone", ["tokens", "token_type", "merges", "scores", "eos_token_ids"])
def test_a_file_that_closes_meanwhile_is_a_usage_error(gone: str) -> None:
    meta = sentencepiece({"a": -1.0}) if gone == "scores" else byte_level(eos_token_ids=[1])
    for build in (Tokenizer.from_metadata, Tokenizer.for_ids):
        with pytest.raises(UsageError, match=f"closed while {K}{gone} was read"):
            build(ClosingMap(meta, gone))


def test_threads_that_encode_their_first_text_together() -> None:
    tokenizer = Tokenizer.from_metadata(byte_level([("a", "b")]))
    results: list[list[int]] = []
    threads = [threading.Thread(target=lambda: results.append(tokenizer.encode("ab"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[256]] * 8

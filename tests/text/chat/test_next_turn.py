"""Where the next turn's prompt leaves this one: by the template's own words, and as a number of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.template_styles import STYLES
from support.text_model import save
from support.vocab_builder import CONTROL, byte_level, sentencepiece
from zincmetal import gguf
from zincmetal.api.text import NEAR, ModelText
from zincmetal.engine.prefix_cache import Mark
from zincmetal.text.chat.canonical import canonical
from zincmetal.text.chat.capabilities import Capabilities
from zincmetal.text.chat.next_turn import TokenEnds, common_length, kept
from zincmetal.text.chat.template import CHATML, ChatTemplate
from zincmetal.text.tokenizer import Tokenizer

TOOL = {"type": "function", "function": {"name": "look", "description": "looks", "parameters": {"type": "object"}}}
CALL = {"id": "a", "type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
ASKED = [{"role": "system", "content": "rules"}, {"role": "user", "content": "well?"}]
LOOP = [
    *ASKED,
    {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [CALL]},
    {"role": "tool", "content": "seen", "tool_call_id": "a", "name": "look"},
]


def of(style: str, messages: list[dict[str, Any]], **variables: Any) -> tuple[str, list[str], str]:
    """Returns a prompt, its ends that the next prompts do not have, and what other conversations share."""
    template = ChatTemplate(STYLES[style].source, "<s>", "</s>")
    can = Capabilities.of(template)
    given = canonical(messages, can)
    tools = [TOOL] if can.tools else None
    variables = {**can.preserving, **variables}
    shown = template.prompt(given, tools=tools, **variables)
    found = kept(template, can, shown, given, tools, variables)
    return shown, [shown[n:] for n in found.turns], shown[: found.system]


@pytest.mark.parametrize(
    ("style", "asked", "looped"),
    [
        ("qwen2.5", [], []),
        ("qwen3", [], ["hink>\nhm"]),  # a call begins with these letters too
        ("qwen3.5", ["<think>\n"], ["hink>\nhm"]),
        ("qwen3.6", [], []),  # with preserve_thinking
        ("llama3", [], []),
        ("gemma", [], []),
        ("glm", [], []),
        ("gpt-oss", [], ["<|channel|>analysis<|message|>hm"]),
        ("mistral", [], []),
        ("deepseek", [], []),
        ("kimi", [], ["hm</think>"]),
    ],
)
def test_what_the_next_prompt_changes(style: str, asked: list[str], looped: list[str]) -> None:
    for messages, wanted in ((ASKED, asked), (LOOP, looped)):
        shown, gone, _ = of(style, messages)
        assert [text[: len(w)] for text, w in zip(gone, wanted, strict=True)] == wanted
        assert shown


@pytest.mark.parametrize("style", [style for style in STYLES if style != "gemma"])
def test_other_conversations_share_rules_and_tools(style: str) -> None:
    shown, _, shared = of(style, ASKED)
    assert "rules" in shared
    assert "looks" in shared
    assert shown.startswith(shared)
    assert "well?" not in shared


def test_a_variable_of_the_request_is_minded() -> None:
    assert of("qwen3.6", ASKED, preserve_thinking=False)[1] == ["<think>\n"]
    assert of("qwen3.5", ASKED, enable_thinking=False)[1][0] == "<think>\n\n</think>\n\n"


def test_without_rules_and_tools_nothing_is_shared() -> None:
    template = ChatTemplate(CHATML)
    messages = ASKED[1:]
    found = kept(template, Capabilities.of(template), template.prompt(messages), messages)
    assert found == (0, ())


def test_a_template_that_refuses_the_trial_is_no_error() -> None:
    source = "{% if messages | length > 2 %}{{ raise_exception('no') }}{% endif %}" + CHATML
    template = ChatTemplate(source)
    found = kept(template, Capabilities.of(template), template.prompt(ASKED), ASKED)
    assert found.turns == ()


@pytest.mark.parametrize(
    ("a", "b", "n"), [("", "", 0), ("a", "", 0), ("abc", "abd", 2), ("abc", "abc", 3), ("ab", "abc", 2)]
)
def test_common_length(a: str, b: str, n: int) -> None:
    assert common_length(a, b) == common_length(b, a) == n
    assert common_length("x" * 1000 + a, "x" * 1000 + b) == 1000 + n


# ---- tokens --------------------------------------------------------------------------------------------------------

TEXT = "<|im_start|>he é\U0001f600\n<|im_end|>"


@pytest.mark.parametrize("begins", [False, True])
def test_tokens_before_a_place(begins: bool) -> None:
    special = {"<|im_start|>": CONTROL, "<|im_end|>": CONTROL}
    keys = byte_level([("h", "e")], special, bos_token_id=257, add_bos_token=begins)
    tokenizer = Tokenizer.from_metadata(keys)
    text = TEXT.removeprefix("<|im_start|>") if begins else TEXT
    ids = tokenizer.prompt(text, parse_special=True)
    ends = TokenEnds(tokenizer)
    places = list(range(len(text) + 1))
    found = ends.before(ids, text, places)
    for n, count in zip(places, found, strict=True):
        before, place = b"".join(map(tokenizer.token_bytes, ids[begins:count])), len(text[:n].encode())
        assert len(before) <= place
        left = [
            i
            for i in range(count, len(ids))
            if sum(len(tokenizer.token_bytes(t)) for t in ids[begins : i + 1]) <= place
        ]
        assert left == [] or (len(left) == 1 and ids[count] not in tokenizer.control_ids)
    assert found[-1] == len(ids)
    assert ends.before(ids, text, places) == found


def test_tokens_of_another_text_have_no_place() -> None:
    tokenizer = Tokenizer.from_metadata(byte_level([], {}))
    ends = TokenEnds(tokenizer)
    assert ends.before([1, 2, 3], "abcdefgh", [2]) == []
    assert ends.before([1] * 30, "abc", [2]) == []
    assert ends.before([], "abc", [2]) == []


def test_a_space_before_the_text_is_no_part_of_it() -> None:
    """SentencePiece puts one there."""
    tokenizer = Tokenizer.from_metadata(sentencepiece({"▁": -1.0, "▁he": -1.0, "he": -2.0}))
    ids = tokenizer.prompt("he he")
    assert TokenEnds(tokenizer).before(ids, "he he", [2, 5]) == [1, 3]


# ---- marks ---------------------------------------------------------------------------------------------------------


def text_of(folder: Path, style: str, recurrent: bool) -> ModelText:
    special = dict.fromkeys(STYLES[style].special, CONTROL)
    text = ModelText(gguf.open(save(folder / "text.gguf", special, STYLES[style].source)))
    text.__dict__["recurrent"] = recurrent
    return text


def marks_of(text: ModelText, messages: list[dict[str, Any]]) -> tuple[dict[int, Mark], str, list[int]]:
    given = canonical(messages, text.capabilities)
    shown = text.chat_template.prompt(given, tools=[TOOL])
    ids = text.tokenizer.prompt(shown, parse_special=True)
    return text.chat_marks(ids, shown, given, [TOOL], {}), shown, ids


def test_marks_are_where_the_prompts_part(tmp_path: Path) -> None:
    text = text_of(tmp_path, "qwen3.5", recurrent=True)
    marks, shown, ids = marks_of(text, ASKED)
    before = {text.tokenizer.decode(ids[:at]): mark for at, mark in marks.items()}
    assert before[shown.removesuffix("\n<think>\n")] == Mark.TURN
    assert before[shown.partition("\nwell?")[0]] == Mark.SYSTEM


def test_marks_that_are_near_each_other_are_one(tmp_path: Path) -> None:
    marks, _, _ = marks_of(text_of(tmp_path, "qwen3.5", recurrent=True), LOOP)
    places = sorted(marks)
    predicted = [at for at in places if marks[at] == Mark.SYSTEM]
    assert len(predicted) == 1
    assert not any(predicted[0] - NEAR <= at < predicted[0] for at in places)


def test_a_family_without_a_token_for_turns_has_marks_too(tmp_path: Path) -> None:
    marks, shown, ids = marks_of(text_of(tmp_path, "glm", recurrent=True), ASKED)
    system = next(at for at, mark in marks.items() if mark == Mark.SYSTEM)
    assert shown.partition("\nwell?")[0] == text_of(tmp_path, "glm", True).tokenizer.decode(ids[:system])


def test_a_model_without_recurrent_states_has_none(tmp_path: Path) -> None:
    assert marks_of(text_of(tmp_path, "qwen3.5", recurrent=False), ASKED)[0] == {}


def test_the_family_says_if_it_is_recurrent(tmp_path: Path) -> None:
    assert ModelText(gguf.open(save(tmp_path / "llama.gguf"))).recurrent is False
    hybrid = Path(__file__).parents[2] / "data" / "qwen35-q4_k_m.gguf"
    assert ModelText(gguf.open(hybrid)).recurrent is True

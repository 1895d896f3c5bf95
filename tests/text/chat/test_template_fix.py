"""The switch that templates get which drop the reasoning of earlier turns."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.template_styles import STYLES
from support.text_model import save
from support.vocab_builder import CONTROL
from zincmetal import gguf
from zincmetal.api.text import ModelText
from zincmetal.text.chat.canonical import canonical
from zincmetal.text.chat.template_fix import SWITCH, with_switch

CALL = {"id": "a", "type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
TOOL = {"type": "function", "function": {"name": "look", "description": "looks", "parameters": {"type": "object"}}}
LOOP = [
    {"role": "user", "content": "well?"},
    {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [CALL]},
    {"role": "tool", "content": "seen", "tool_call_id": "a", "name": "look"},
]
AFTER = [*LOOP, {"role": "assistant", "content": "so", "reasoning_content": "aha"}, {"role": "user", "content": "and?"}]


def text_of(style: str, folder: Path, fix: bool) -> ModelText:
    special = dict.fromkeys(STYLES[style].special, CONTROL)
    return ModelText(gguf.open(save(folder / f"{style}.gguf", special, STYLES[style].source)), template_fix=fix)


def prompt(text: ModelText, messages: list[dict[str, object]], **variables: object) -> str:
    can = text.capabilities
    return text.chat_template.prompt(canonical(messages, can), tools=[TOOL], **{**can.preserving, **variables})


@pytest.mark.parametrize("style", ["qwen3", "qwen3.5", "gpt-oss", "kimi"])
def test_a_loop_stays_as_it_was_when_the_next_question_comes(style: str, tmp_path: Path) -> None:
    plain, fixed = (text_of(style, tmp_path, fix) for fix in (False, True))
    turn = prompt(plain, LOOP).partition("hm")[0]
    assert "hm" not in prompt(plain, AFTER)
    assert prompt(fixed, AFTER).startswith(turn + "hm")
    assert prompt(fixed, AFTER, preserve_thinking=False) == prompt(plain, AFTER)  # a request may turn it off
    assert prompt(fixed, LOOP) == prompt(plain, LOOP)
    assert fixed.capabilities.stable
    assert not plain.capabilities.stable


@pytest.mark.parametrize("style", ["qwen2.5", "qwen3.6", "glm", "llama3"])
def test_others_stay_as_they_are(style: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = text_of(style, tmp_path, True)
    assert text.chat_template.source == STYLES[style].source
    assert len(caplog.records) == 1
    assert "stays as it is" in caplog.text


def test_a_source_that_has_a_switch_gets_no_other() -> None:
    assert with_switch("{{ loop.index0 > ns.last }}") != "{{ loop.index0 > ns.last }}"
    for source in ("{{ clear_thinking }}{{ loop.index0 > ns.last }}", f"{{{{ {SWITCH} or loop.index0 > ns.last }}}}"):
        assert with_switch(source) == source

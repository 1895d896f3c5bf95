"""Prompts of requests: what the template gets, and what is refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.scripted import scripted
from support.template_styles import STYLES
from support.vocab_builder import CONTROL
from zincmetal.api.text import ModelText
from zincmetal.errors import UsageError
from zincmetal.serve import prompt
from zincmetal.serve.ask import Ask, Thinking, Tool
from zincmetal.serve.errors import BadRequest
from zincmetal.serve.prompt import prompt_of
from zincmetal.text.chat.marks import unmarked
from zincmetal.text.chat.template import CHATML

USER = {"role": "user", "content": "hi"}
Texts = Callable[[str], ModelText]


@pytest.fixture
def text(tmp_path: Path) -> Texts:
    def make(source: str) -> ModelText:
        special = dict.fromkeys(STYLES[source].special, CONTROL) if source in STYLES else {}
        template = STYLES[source].source if source in STYLES else source
        return scripted(tmp_path, lambda *_: "", template=template, special=special).text

    return make


def shown(text: ModelText, **fields: Any) -> str:
    made = prompt_of(Ask("", **{"messages": [USER], **fields}), text)
    assert text.tokenizer.decode(made.ids) == unmarked(made.shown)
    return unmarked(made.shown)


SHOWS = CHATML + "{{ enable_thinking }}|{{ reasoning_effort }}|{{ preserve_thinking }}"


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({}, "||"),
        ({"thinking": Thinking("none")}, "False||"),
        ({"thinking": Thinking("high")}, "True|high|"),
        ({"variables": {"enable_thinking": False}}, "False||"),
        ({"variables": {"enable_thinking": True}}, "True||"),
        ({"thinking": Thinking("high"), "variables": {"reasoning_effort": "odd"}}, "True|odd|"),
        ({"variables": {"preserve_thinking": 7}}, "||7"),
    ],
)
def test_variables_of_reasoning(text: Texts, fields: dict[str, Any], end: str) -> None:
    assert shown(text(SHOWS), **fields).endswith("assistant\n" + end)


def test_reasoning_is_kept_unless_the_request_says_no(text: Texts) -> None:
    talk = [USER, {"role": "assistant", "content": "so", "reasoning": "because"}, USER]
    model = text("qwen3.6")
    assert "because" in shown(model, messages=talk)
    assert "because" not in shown(model, messages=talk, variables={"preserve_thinking": False})


def test_a_template_without_variables_of_reasoning_warns_once(text: Texts, caplog: pytest.LogCaptureFixture) -> None:
    model = text(CHATML)
    for _ in range(3):
        shown(model, thinking=Thinking("high"))
    assert [r.message for r in caplog.records if "reasoning" in r.message] == [caplog.records[0].message]


@pytest.mark.parametrize("name", sorted(prompt.RESERVED))
def test_variables_that_the_request_sets_are_refused(text: Texts, name: str) -> None:
    with pytest.raises(BadRequest, match=name):
        shown(text(CHATML), variables={name: "x"})


@pytest.mark.parametrize("name", ["can", "shown", "template", "opens", "documents", "ids", "calls", "variables"])
def test_other_variables_are_only_variables(text: Texts, name: str) -> None:
    value: Any = [{"a": "b"}] if name == "documents" else "x"
    model = text("qwen3.5")
    model.__dict__["recurrent"] = True
    made = prompt_of(Ask("", messages=[USER], variables={name: value}), model)
    assert made.marks(model)


def test_tools_have_their_seen_names_and_no_dialect(text: Texts) -> None:
    schema = {"$schema": "x://draft", "type": "object"}
    made = shown(text("qwen2.5"), tools=[Tool("look", "looks", schema, space="eyes")])
    assert '"name": "eyes.look"' in made
    assert "$schema" not in made


def test_tools_are_described_where_the_template_has_no_place(text: Texts) -> None:
    model = text("gemma")
    talk = [{"role": "system", "content": "rules"}, USER]
    made = shown(model, messages=talk, tools=[Tool("look", "looks", {"type": "object"})])
    assert made.index("rules") < made.index('"name": "look"') < made.index("hi<end_of_turn>")
    assert "<tool_call>" not in shown(model, messages=talk)


def test_prompts_without_messages(text: Texts) -> None:
    model = text(CHATML)
    made = prompt_of(Ask("", prompt="he said"), model)
    assert (made.shown, model.tokenizer.decode(made.ids)) == ("he said", "he said")
    assert prompt_of(Ask("", prompt=made.ids), model).shown == "he said"
    assert made.marks(model) is None
    made.remember(model, [1, 2], {"role": "assistant", "content": "x"})
    assert prompt.memory_of(model).echo.nbytes == 0
    for wrong in ([], [10**6], [-1]):
        with pytest.raises((BadRequest, UsageError)):
            prompt_of(Ask("", prompt=wrong), model)


def test_a_control_text_in_a_message_is_no_token(text: Texts) -> None:
    model = text(CHATML)
    made = prompt_of(Ask("", messages=[{"role": "user", "content": "<|im_end|>"}]), model)
    assert made.ids.count(258) == 1


def test_what_is_wrong_with_a_message_is_named(text: Texts) -> None:
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}
    with pytest.raises(UsageError, match=r"messages\[0\].content\[0\].*image_url"):
        shown(text(CHATML), messages=[image, {"role": "assistant", "content": "x"}, USER])


def test_memory_ends_with_the_model(text: Texts) -> None:
    model = text(CHATML)
    memory = weakref.ref(prompt.memory_of(model))
    assert memory() is prompt.memory_of(model)
    del model
    gc.collect()
    assert memory() is None


def test_an_answer_is_continued(text: Texts) -> None:
    talk = [USER, {"role": "assistant", "content": [{"type": "text", "text": "once"}]}]
    assert shown(text(CHATML), messages=talk, continue_final=True).endswith("assistant\nonce")

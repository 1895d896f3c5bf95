"""Every request shape by every template of a folder: nothing is dropped without a word, and nothing is refused.

``ZINCMETAL_TEMPLATES`` names a folder, with one Jinja file for each template in it or below it. Without it the
templates of ``support/template_styles.py`` are used, which are short forms of those of well-known families.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from support.template_styles import STYLES
from zincmetal.text.chat.canonical import canonical, described
from zincmetal.text.chat.capabilities import Capabilities
from zincmetal.text.chat.template import ChatTemplate

FOLDER = os.environ.get("ZINCMETAL_TEMPLATES")
SOURCES: Mapping[str, str] = (
    {path.stem: path.read_text("utf-8") for path in sorted(Path(FOLDER).rglob("*.jinja"))}
    if FOLDER
    else {name: style.source for name, style in STYLES.items()}
)
# What the makers of a template left out, and no other message can stand for. By its name: the shapes.
UNABLE: Mapping[str, set[str]] = {
    # It translates, and its messages name two languages.
    "google-translategemma-4b-it": {"*"},
    # Of an answer with a call they show the call only, and they refuse two answers in a row.
    "Mistral-Small-3.2-24B-Instruct-2506": {"text and a call"},
    "mistralai-Mistral-Nemo-Instruct-2407": {"text and a call"},
    # Text before a call is a thought there, and goes with the thoughts when the final answer comes.
    "openai-gpt-oss-120b": {"text and a call"},
    # It needs the functions and the date as texts.
    "fireworks-ai-llama-3-firefunction-v2": {"*"},
}

TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "looks",
        "parameters": {"type": "object", "properties": {"place": {"type": "string", "description": "where"}}},
    },
}


def call(name: str = "call_0123456789abcdefghijklmn", arguments: Any = '{"place": "pinwheel"}') -> dict[str, Any]:
    return {"id": name, "type": "function", "function": {"name": "look", "arguments": arguments}}


def say(role: str, content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **keys}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


RESULT = say("tool", "sawdust", tool_call_id="call_0123456789abcdefghijklmn")
TWO = [call("call_a"), call("call_b", '{"place": "windmill"}')]
TWO_RESULTS = [say("tool", "stardust", tool_call_id="call_b"), say("tool", "sawdust", tool_call_id="call_a")]
ASK = say("user", "whereabouts")

# For each shape: the messages, and the words that the prompt must have in this order.
SHAPES: Mapping[str, tuple[list[dict[str, Any]], str]] = {
    "developer": ([say("developer", "obedience"), ASK], "obedience whereabouts"),
    "list": ([say("system", parts("obed", "ience")), say("user", parts("where", "abouts"))], "ience whereabouts"),
    "arguments as text": (
        [ASK, say("assistant", "", tool_calls=[call()]), RESULT],
        "whereabouts look pinwheel sawdust",
    ),
    "arguments as object": (
        [ASK, say("assistant", "", tool_calls=[call(arguments={"place": "pinwheel"})]), RESULT],
        "whereabouts look pinwheel sawdust",
    ),
    "arguments that are no JSON": (
        [ASK, say("assistant", "", tool_calls=[call(arguments='{"pinwheel')]), RESULT],
        "pinwheel sawdust",
    ),
    "two systems": ([say("system", "obedience"), say("system", "patience"), ASK], "obedience patience whereabouts"),
    "system later": ([say("system", "obedience"), ASK, say("system", "patience")], "obedience whereabouts patience"),
    "system in the middle": (
        [ASK, say("system", "patience"), say("assistant", "yonder"), say("user", "thanks")],
        "whereabouts patience yonder thanks",
    ),
    "system after an answer": (
        [ASK, say("assistant", "yonder"), say("system", "patience"), say("user", "thanks")],
        "whereabouts yonder patience thanks",
    ),
    "system after a result": (
        [ASK, say("assistant", None, tool_calls=[call()]), RESULT, say("system", "patience")],
        "sawdust patience",
    ),
    "two users": ([ASK, say("user", "thanks")], "whereabouts thanks"),
    "two users later": ([ASK, say("assistant", "yonder"), ASK, say("user", "thanks")], "yonder whereabouts thanks"),
    "user after a result": (
        [ASK, say("assistant", None, tool_calls=[call()]), RESULT, say("user", "thanks")],
        "pinwheel sawdust thanks",
    ),
    "no content": ([ASK, say("assistant", None, tool_calls=[call()]), RESULT], "pinwheel sawdust"),
    "tools": ([ASK], "look"),
    "text and a call": (
        [ASK, say("assistant", "yonder", tool_calls=[call()]), RESULT, say("assistant", "found"), ASK],
        "yonder pinwheel sawdust found",
    ),
    "two calls": (
        [ASK, say("assistant", None, tool_calls=TWO), *TWO_RESULTS, say("assistant", "yonder"), ASK],
        "pinwheel windmill yonder",
    ),
    "results in order": ([ASK, say("assistant", None, tool_calls=TWO), *TWO_RESULTS], "sawdust stardust"),
    "a loop": (
        [
            say("system", "obedience"), ASK,
            say("assistant", None, reasoning_content="hm", tool_calls=[call()]), RESULT,
            say("assistant", None, reasoning_content="hm", tool_calls=[call("call_z")]),
            say("tool", parts("star", "dust"), tool_call_id="call_z"),
            say("assistant", "yonder"), say("user", "thanks"),
        ],
        "obedience whereabouts pinwheel sawdust pinwheel stardust yonder thanks",
    ),
    "older functions": (
        [
            ASK, say("assistant", None, function_call={"name": "look", "arguments": '{"place": "pinwheel"}'}),
            say("function", "sawdust", name="look"), say("assistant", "yonder"), say("user", "thanks"),
        ],
        "pinwheel sawdust yonder thanks",
    ),
}  # fmt: skip
WITH_TOOLS = [name for name, (messages, _) in SHAPES.items() if "call" in str(messages) or name == "tools"]


@pytest.fixture(scope="module")
def templates() -> dict[str, tuple[ChatTemplate, Capabilities]]:
    made = {name: ChatTemplate(source, "<s>", "</s>") for name, source in SOURCES.items()}
    return {name: (template, Capabilities.of(template)) for name, template in made.items()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SOURCES)
def test_nothing_is_dropped_and_nothing_is_refused(
    templates: dict[str, tuple[ChatTemplate, Capabilities]], name: str, shape: str
) -> None:
    if {"*", shape} & UNABLE.get(name, set()):
        pytest.skip("its makers left this out")
    template, can = templates[name]
    messages, words = SHAPES[shape]
    tools = [TOOL] if shape in WITH_TOOLS or name.endswith("-tool_use") else None
    if tools and not can.tools:
        messages, tools = described(messages, tools), None
    prompt = template.prompt(canonical(messages, can), tools=tools)
    at = 0
    for word in words.split():
        found = prompt.find(word, at)
        assert found >= 0, (word, prompt)
        at = found + len(word)

"""Answers that chat templates of other projects render are read back, one character at a time.

``make test-templates`` downloads the templates and runs these tests.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from support.answer_writer import Writer
from support.answers import TOOLS, Read, checked, events_of
from zincmetal.errors import ChatTemplateError, UsageError
from zincmetal.text.chat.template import ChatTemplate
from zincmetal.text.tools.format import Format, Wanted, format_of

FOLDER = os.environ.get("ZINCMETAL_TEMPLATES", "")
PATHS = sorted(Path(FOLDER).rglob("*.jinja")) if FOLDER else []

USER = {"role": "user", "content": "How is the weather?"}
FUNCTIONS = [{"name": name, "description": "It helps.", "parameters": schema} for name, schema in TOOLS.items()]
ARGUMENTS: dict[str, Any] = {
    "city": 'Zürich "a" <b> \\ {c}\n  d',
    "days": 3,
    "options": {"list": [1, 2.5, True, None, "s"], "deep": {"k": "v"}},
}
WEATHER, NOW = ("get_weather", ARGUMENTS), ("now", {"zone": "UTC"})
ANSWERS = [Read(r, t, c) for r in ("", "Hm.\n\nSo.") for t in ("", "Look.") for c in ([WEATHER], [NOW], [WEATHER, NOW])]
CONTROL = re.compile(r"<[|｜][^<>\s{}]+[|｜]>")
#: Families whose calls no format reads: nested tags, or a head that is part of the prompt.
UNKNOWN = {"MiniMax-M3", "Kimi-K3", "muse-glimmer", "meetkai-functionary-medium-v3.2"}
#: Templates that write null or lists as Python does, characters as escapes, or no end of calls. Grammars have JSON.
UNUSUAL = {
    "ByteDance-Seed-OSS",
    "LFM2.5-8B-A1B",
    "Reka-Edge",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    "google-gemma-4-31B-it",
    "google-gemma-4-31B-it-interleaved",
    "openbmb-MiniCPM5-1B",
}
# Texts behind an answer, that a model never writes.
ENDS = (
    "<|im_end|>",
    "</assistant>",
    "<|role_end|>",
    "<sep>",
    "<｜hy_eos:opensource｜>",
    "<|eot|>",
    "<|end_of_text|>",
    "<|call|>",
    "<|eot_id|>",
    "<|END_OF_TURN_TOKEN|>",
)

pytestmark = pytest.mark.skipif(not PATHS, reason="ZINCMETAL_TEMPLATES names no folder with templates")


def _message(answer: Read) -> dict[str, Any]:
    calls = [
        {"id": f"call0000{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(answer.calls)
    ]
    reasoning = {"reasoning_content": answer.reasoning} if answer.reasoning else {}
    return {"role": "assistant", "content": answer.text or None, "tool_calls": calls, **reasoning}


def _shown(template: ChatTemplate, answer: Read) -> tuple[str, str, str] | None:
    """Render an answer: what stands in front of it, its text, and the prompt for it. None without a place for calls."""
    tools = [{"type": "function", "function": function} for function in FUNCTIONS]
    try:
        before = template.render([USER], tools=tools)
        after = template.render([USER, _message(answer)], False, tools=tools)
    except (ChatTemplateError, UsageError):
        return None
    at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(before))
    if at < len(before):  # the prompt ends in what this answer does not begin with; cut in front of its last tag
        at = max(after.rfind(mark, 0, at) for mark in "<[\n")
    text = after[at:]
    for end in ENDS:
        text = text.split(end)[0]
    shown = [name for name, _ in answer.calls if name in text]
    return (after[:at], text, before) if len(shown) == len(answer.calls) else None


def _expected(answer: Read, text: str, form: Format, tail: str) -> Read:
    """Leave out what the template does not show."""
    open_to_the_end = form.thinks(tail) and not any(end in text for end in form.shape.think_end)
    if form.name == "harmony" or open_to_the_end:  # a text in front of a call is shown as reasoning
        return Read(answer.reasoning if "So." in text else answer.text, "", answer.calls)
    return Read(answer.reasoning if "So." in text else "", answer.text if "Look." in text else "", answer.calls)


def _allows(form: Format, tail: str, text: str) -> bool:
    """Tell if the grammar of a free answer allows the text."""
    grammar = form.grammar(Wanted(TOOLS), tail)
    assert grammar is not None
    return Writer(form).refused(grammar, text) is None


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_answers_are_read_back(path: Path) -> None:
    template = ChatTemplate(path.read_text())
    form = format_of(template.source, CONTROL.findall(template.source))
    if path.stem in UNKNOWN:
        pytest.skip("no format has the calls of this template")
    shown = 0
    for answer in ANSWERS:
        if (rendered := _shown(template, answer)) is None:
            continue
        shown += 1
        tail, text = rendered[0][-256:], rendered[1]
        if answer.reasoning and form.thinks(rendered[2]) and not any(mark in text for mark in form.shape.think):
            tail = rendered[2]  # where the prompt begins the reasoning, and no history shows how
        events = events_of(form, text, tail)
        assert events == events_of(form, [text], tail)
        read = checked(events)
        assert path.stem in UNUSUAL or _allows(form, tail, text)
        assert Read(read.reasoning.strip(), read.text.strip(), read.calls) == _expected(answer, text, form, tail), text
    if not shown:
        pytest.skip("the template shows no calls")

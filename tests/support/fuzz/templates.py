"""Any text as a chat template: it renders, or is a ChatTemplateError in bounded time. It reaches nothing outside.

It is compiled here, where a fuzzer sees what runs, and rendered by the process of templates. What that process has
rendered within its bounds is rendered here too. The process is a fork, which starts ten times as fast as a Python.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any
from unittest import mock

from support.fuzz.reading import check_message, spelled
from zincmetal.errors import ChatTemplateError, UsageError
from zincmetal.text.chat import sandbox, template
from zincmetal.text.chat.renderer import Renderer
from zincmetal.text.chat.template import ChatTemplate

WORDS = (
    *("{{", "}}", "{%", "%}", "{#", "#}", "{%-", "-%}", " for ", " in ", " if ", " else ", " elif ", "endif", "endfor"),
    *(
        "set ",
        "macro ",
        "endmacro",
        "call",
        "filter ",
        "generation",
        "endgeneration",
        "break",
        "continue",
        "namespace(",
    ),
    *("messages", "message", "m", ".role", ".content", "['content']", "tools", "|tojson", "|join", "|map", "|sort"),
    *(
        "|attr(",
        "|format(",
        "range(",
        "dict(",
        "loop",
        ".index",
        "self",
        "caller()",
        "__class__",
        "__mro__",
        "__init__",
    ),
    *("__globals__", ".__subclasses__()", "cycler", "joiner", "lipsum", "strftime_now(", "raise_exception(", "'%s'"),
    *(
        "'{0}'",
        "'a'",
        "1",
        "0",
        "99999999",
        "*",
        "**",
        "//",
        "%",
        "~",
        "+",
        "-",
        "(",
        ")",
        "[",
        "]",
        ",",
        ":",
        "==",
        " ",
    ),
    *("'", '"', "\n", ".update(", ".append(", ".format_map(", ".split(", ".replace(", " is defined", " not ", " and "),
    *("add_generation_prompt", "bos_token", "block x", "endblock", "extends ", "include ", "import ", "raw", "endraw"),
)
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<|im_end|>"}]


#: To reach these takes less time than to reach the usual ones.
BOUNDS: dict[str, Any] = {"TIME_LIMIT": 0.3, "MEMORY_LIMIT": 128 << 20}


@cache
def _environment() -> Any:
    return sandbox.environment()


@cache
def _renderer() -> Renderer:
    return Renderer()


def _render_here(source: str) -> None:
    request = {"source": source, "longest": template.LONGEST}
    variables = {"messages": MESSAGES, "add_generation_prompt": True, "bos_token": ""}
    (reply,) = sandbox.answer(_environment(), _environment().from_string, {**request, "variables": [variables]})
    assert reply.keys() <= {"result", "error"}


def run(data: bytes) -> None:
    """Compile and render a template of these bytes, each a word or a character."""
    source = spelled(data, WORDS)
    found = sandbox.attempt(lambda: sandbox.names_read(_environment(), source), 1000)
    assert found.keys() <= {"result", "error"}
    if "error" in found:
        return
    if "error" in sandbox.attempt(lambda: _environment().compile(source), 1000):
        return
    try:
        with (
            mock.patch.multiple(template, _renderer=_renderer(), **BOUNDS),
            mock.patch.object(sys, "frozen", True, create=True),
        ):
            text = ChatTemplate(source).render(MESSAGES, add_generation_prompt=True)
    except (ChatTemplateError, UsageError) as error:
        check_message(error)
        return
    _render_here(source)
    assert "<class" not in text
    assert " at 0x" not in text or "function" in text or "object" in text or "generator" in text


def seeds() -> list[bytes]:
    """Templates, whole and in words."""
    texts = [
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        "{% set ns = namespace(x=1) %}{% for m in messages %}{% set ns.x = ns.x + 1 %}{% endfor %}{{ ns.x }}",
        "{% macro a(b) %}{{ b|tojson }}{% endmacro %}{{ a(messages) }}{% generation %}x{% endgeneration %}",
        "{{ ''.__class__ }}{{ messages|attr('append') }}{{ '%s' % 'a' }}{{ 'a' * 99999999 }}",
        "{{ dict.update(messages[0], x=1) }}{{ range(10)|map('string')|join(',') }}",
    ]
    words = {word: 128 + i for i, word in enumerate(WORDS)}
    tokens = [("{{", "messages", "|tojson", "}}"), ("{%", " for ", "m", " in ", "messages", "%}", "{%", "endfor", "%}")]
    return [text.encode() for text in texts] + [bytes(words[w] for w in ws) for ws in tokens]
